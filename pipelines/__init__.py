"""The DAG: compiled for a cluster, run unchanged on this machine."""
