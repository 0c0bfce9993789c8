"""Jobs on a Kubernetes cluster, and the launcher that follows one of them to its end.

`kind` is the seam: one class for each kind of job. The rest names none: `pod` builds the objects, `cluster` talks to
the API server, `launcher` is the state machine, `diagnose` and `watch` are its eyes, `settings` what a user sets.
"""

from .settings import JobSettings, job_settings

__all__ = ["JobSettings", "job_settings"]
