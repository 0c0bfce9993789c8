"""A registry by its URI."""

from __future__ import annotations

from pirl.registry.folder import FolderCatalogue
from pirl.registry.kubeflow import KubeflowCatalogue, is_model_registry
from pirl.registry.registry import Registry


def open_registry(uri: str) -> Registry:
    """Return the registry in a folder, at s3://bucket/prefix, or on the server model-registry+https://host[:port]."""
    return Registry(KubeflowCatalogue(uri) if is_model_registry(uri) else FolderCatalogue(uri))
