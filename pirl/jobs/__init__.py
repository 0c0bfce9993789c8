"""Training on a Kubernetes cluster: a PyTorchJob, and the launcher that follows it."""

from .launcher import launch_job, prepare
from .pod import job_name, to_yaml
from .pytorchjob import build_job
from .settings import JobSettings, job_settings

__all__ = ["JobSettings", "build_job", "job_name", "job_settings", "launch_job", "prepare", "to_yaml"]
