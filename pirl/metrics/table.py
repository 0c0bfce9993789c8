"""Every metric of this project, in one table: the code can set no other, and `docs/metrics.md` is made of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    name: str
    """As Prometheus shows it; a counter ends in `_total`."""
    kind: str
    """counter, gauge or histogram."""
    unit: str
    help: str
    labels: tuple[str, ...] = ()
    """Besides `run`, which all have."""
    buckets: tuple[float, ...] = ()


LABELS = {
    "run": "last part of the URI of the run (or of the shards) that is written",
    "rank": "rank in the whole training: as many values as processes",
    "part": "of a step: `data` waiting for the loader; `forward` views, the wait for rank 0's batch statistics, "
    "forward pass; `backward` loss, negatives, all-reduce with the wait for all ranks, update; `other` saving, "
    "logging. Of the loss: `total`, `patches`, `images`",
    "state": "of memory: `allocated`, `reserved`, `peak`; of images: `sharded`, `quarantined`",
    "task": "name of the step: `shard`, `linear_eval`, ...",
    "trunk": "`pretrained` or `random`",
    "probe": "`linear`, `knn`, ...",
    "phase": "of an evaluation: `features of train`, `probes linear`, `neighbours`, ...",
}
STEP_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0, 30.0, 60.0)

TRAINING = (
    Metric("pirl_training_steps_total", "counter", "steps", "Optimiser steps that this process has made."),
    Metric("pirl_training_images_total", "counter", "images", "Images of all ranks in these steps."),
    Metric("pirl_training_step", "gauge", "steps", "Step that the run has reached, over all restarts."),
    Metric("pirl_training_target_steps", "gauge", "steps", "Steps of the whole run."),
    Metric("pirl_training_epoch", "gauge", "epochs", "Position in the run, in epochs."),
    Metric("pirl_training_images_per_second", "gauge", "images/s", "Of all ranks, over the last log interval."),
    Metric(
        "pirl_training_step_duration_seconds",
        "histogram",
        "seconds",
        "From the end of a step to the end of the next, at rank 0; the ranks keep step with each other.",
        buckets=STEP_BUCKETS,
    ),
    Metric("pirl_training_loss", "gauge", "1", "Mean over the ranks and the last log interval.", ("part",)),
    Metric("pirl_training_learning_rate", "gauge", "1", "Of the last step."),
    Metric("pirl_training_gradient_norm", "gauge", "1", "L2 norm of all gradients of the last logged step."),
    Metric(
        "pirl_training_embedding_std",
        "gauge",
        "1",
        "Standard deviation of a batch's embeddings times sqrt(dimension): near 1 spread out, near 0 collapsed.",
    ),
    Metric("pirl_training_restarts_total", "counter", "starts", "Starts of the run that resumed from a checkpoint."),
    Metric(
        "pirl_training_nonfinite_timestamp_seconds",
        "gauge",
        "seconds",
        "Unix time at which the loss was last not finite; kept over restarts, absent where it never happened.",
    ),
    Metric("pirl_bank_norm", "gauge", "1", "Mean L2 norm of the memory bank's rows; each should be 1."),
    Metric(
        "pirl_bank_age_seconds",
        "gauge",
        "seconds",
        "Expected time since a row of the bank was renewed, from the position in the epoch and the time of a step.",
    ),
    Metric("pirl_checkpoints_total", "counter", "checkpoints", "Checkpoints that this process has published."),
    Metric("pirl_checkpoint_failures_total", "counter", "checkpoints", "Checkpoints that could not be saved."),
    Metric(
        "pirl_checkpoint_duration_seconds", "gauge", "seconds", "Of writing the last checkpoint, in the background."
    ),
    Metric("pirl_checkpoint_size_bytes", "gauge", "bytes", "Of the last checkpoint."),
    Metric(
        "pirl_checkpoint_last_success_timestamp_seconds",
        "gauge",
        "seconds",
        "Unix time of the last checkpoint that was published; kept over restarts.",
    ),
    Metric(
        "pirl_training_step_seconds_total",
        "counter",
        "seconds",
        "Time of the steps by part. On GPUs `forward` and `backward` are the device's own time.",
        ("rank", "part"),
    ),
    Metric("pirl_storage_retries_total", "counter", "requests", "Requests to S3 that were repeated.", ("rank",)),
    Metric("pirl_memory_resident_bytes", "gauge", "bytes", "Largest resident memory of the process.", ("rank",)),
    Metric("pirl_gpu_memory_bytes", "gauge", "bytes", "Memory of the rank's GPU; absent on CPU.", ("rank", "state")),
)

TASKS = (
    Metric("pirl_task_duration_seconds", "gauge", "seconds", "Time of the task's last good end.", ("task",)),
    Metric(
        "pirl_task_last_success_timestamp_seconds", "gauge", "seconds", "Unix time of the last good end.", ("task",)
    ),
    Metric(
        "pirl_task_peak_memory_bytes", "gauge", "bytes", "Largest resident memory of one of its processes.", ("task",)
    ),
    Metric("pirl_shard_images", "gauge", "images", "Images of a data set that was sharded.", ("state",)),
    Metric("pirl_shard_size_bytes", "gauge", "bytes", "Size of all its shards."),
    Metric("pirl_evaluation_progress_ratio", "gauge", "0 to 1", "Part of the phase that is done.", ("phase",)),
    Metric("pirl_evaluation_throughput", "gauge", "units/s", "Images or steps of all ranks, in the phase.", ("phase",)),
    Metric("pirl_eval_top1_ratio", "gauge", "0 to 1", "Mean top-1 accuracy.", ("trunk", "probe")),
)

METRICS = {metric.name: metric for metric in (*TRAINING, *TASKS)}


def markdown() -> str:
    """docs/metrics.md."""
    parts = [HEAD]
    for title, metrics in (("Training", TRAINING), ("Sharding and evaluation", TASKS)):
        parts += [f"## {title}\n", "| name | type | unit | labels | what it is |", "|---|---|---|---|---|"]
        for each in metrics:
            labels = ", ".join(f"`{label}`" for label in ("run", *each.labels))
            parts.append(f"| `{each.name}` | {each.kind} | {each.unit} | {labels} | {each.help} |")
        parts.append("")
    parts += ["## Labels\n", "| label | values |", "|---|---|"]
    parts += [f"| `{name}` | {text} |" for name, text in LABELS.items()]
    return "\n".join(parts) + "\n" + TAIL


HEAD = """# Metrics

This page is made from `pirl/metrics/table.py`: `python -m pirl.metrics > docs/metrics.md`.

**Training** answers Prometheus at `http://HOST:PIRL_METRICS_PORT/metrics`; without that variable nothing is served.
The first rank of each machine serves the metrics of all ranks there. In a PyTorchJob the port is 9400, named
`metrics`. Values are read from the device every `--log-every` steps, when the log line asks for them anyway; the step
counters move with each step.

**An evaluation** answers likewise while it runs, with the progress and throughput of its phases. **Sharding and the
steps** end before Prometheus scrapes them: with
`PIRL_METRICS_FILE=/some/folder/pirl-{task}.prom` each leaves a file for node-exporter's textfile collector
(written aside and renamed; `{task}` becomes the step's name).

`kubectl apply -k manifests/overlays/monitoring` has Prometheus scrape the trainings and adds a Grafana dashboard and
alerts: [what each means, and what to do](operations.md#alerts).
"""

TAIL = """
# Logs

One JSON object per line, or lines for a person: `PIRL_LOG` is `json` or `human`. Where it is not set, a pod without a
terminal writes JSON, and everything else writes for people, pipes included. Each JSON line has `time` (UTC), `level`,
`message` or `event`, and where they are known `run`, `rank` and `step`. Passwords, tokens, keys and signatures of
presigned URLs are blanked in both forms.
"""
