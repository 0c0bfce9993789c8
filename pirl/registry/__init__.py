"""Registered models: immutable versions with their lineage and model card, and the pointers `latest` and `champion`."""

from pirl.registry.card import model_card
from pirl.registry.changes import Decision, data_uri, decide_retrain
from pirl.registry.embedded import CHAMPION, LATEST, Registry, Version, check_name
from pirl.registry.locate import open_registry
from pirl.registry.runs import decide, register_run

__all__ = [
    "CHAMPION",
    "LATEST",
    "Decision",
    "Registry",
    "Version",
    "check_name",
    "data_uri",
    "decide",
    "decide_retrain",
    "model_card",
    "open_registry",
    "register_run",
]
