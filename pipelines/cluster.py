"""Settings of the steps for a cluster, without effect on this machine."""

from kfp import dsl, kubernetes

SECRET = "pirl-s3"
"""The Secret, of the namespace that runs the steps, with the credentials of the storage."""
SECRET_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_REGION")
"""Each may be absent there."""


def on_cluster(*tasks: dsl.PipelineTask) -> None:
    """Give the steps the storage's credentials, and disable the cache of their results."""
    for task in tasks:
        # optional: where the steps' service account has a workload identity there is no Secret
        kubernetes.use_secret_as_env(task, SECRET, {key: key for key in SECRET_KEYS}, optional=True)
        task.set_caching_options(False)  # because a step skips finished work itself, by content
