"""Registered models: immutable versions with their lineage and model card, and the pointers `latest` and `champion`."""

from pirl.registry.card import model_card
from pirl.registry.embedded import CHAMPION, LATEST, Registry, Version

__all__ = ["CHAMPION", "LATEST", "Registry", "Version", "model_card"]
