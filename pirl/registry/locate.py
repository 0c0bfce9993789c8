"""A registry by its URI."""

from __future__ import annotations

from pirl.registry.embedded import Registry
from pirl.registry.kubeflow import KubeflowRegistry, is_model_registry


def open_registry(uri: str) -> Registry:
    """The registry in a folder, at s3://bucket/prefix, or on the server model-registry+https://host[:port]."""
    return KubeflowRegistry(uri) if is_model_registry(uri) else Registry(uri)
