"""What stands in the way of a training on this machine or on a cluster, found before it is started."""

from .check import Check
from .cluster import cluster_checks
from .machine import machine_checks

__all__ = ["Check", "cluster_checks", "machine_checks"]
