"""Registered models: immutable versions with their lineage and model card, and the pointers `latest` and `champion`."""

from pirl.registry.card import model_card
from pirl.registry.embedded import CHAMPION, LATEST, Registry, Version
from pirl.registry.runs import decide, register_run

__all__ = ["CHAMPION", "LATEST", "Registry", "Version", "decide", "model_card", "register_run"]
