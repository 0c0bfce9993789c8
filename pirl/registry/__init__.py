"""Registered models: immutable versions with their lineage and model card, and the pointers `latest` and `champion`."""

from pirl.registry.card import model_card
from pirl.registry.embedded import CHAMPION, LATEST, TRUNK, Registry, Version, check_name
from pirl.registry.locate import open_registry

__all__ = ["CHAMPION", "LATEST", "TRUNK", "Registry", "Version", "check_name", "model_card", "open_registry"]
