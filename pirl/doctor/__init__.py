"""Checks of this machine or of a cluster, made before a training is started."""

from .check import Check
from .cluster import cluster_checks
from .machine import machine_checks

__all__ = ["Check", "cluster_checks", "machine_checks"]
