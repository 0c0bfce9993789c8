"""Registered models: immutable versions with their lineage and model card, and the pointers `latest` and `champion`."""

from pirl.registry.card import model_card
from pirl.registry.catalogue import Catalogue
from pirl.registry.folder import FolderCatalogue
from pirl.registry.locate import open_registry
from pirl.registry.record import CHAMPION, LATEST, TRUNK, Provenance, Version, VersionRecord, check_name
from pirl.registry.registry import Registry

__all__ = [
    "CHAMPION",
    "LATEST",
    "TRUNK",
    "Catalogue",
    "FolderCatalogue",
    "Provenance",
    "Registry",
    "Version",
    "VersionRecord",
    "check_name",
    "model_card",
    "open_registry",
]
