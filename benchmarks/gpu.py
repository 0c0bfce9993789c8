"""G4b, G5, G6 and G8 on one GPU, in less than 8 minutes: `python -m benchmarks.gpu`.

It writes results/G4b-32.json and so on, and the table results/gpu.md. Without a GPU it prints that and runs all of it
in tiny on the CPU: this checks that both sides work and agree, and measures nothing.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.g4_negatives import DIM, Sides
from benchmarks.gpu_sides import OurStep, ReferenceStep, Scale, full_scale, tiny_scale
from benchmarks.harness import Result, compare
from pirl.checkpoint import Checkpoints, Cursor
from pirl.storage import open_storage
from pirl.training.state import TrainState


def synchronize(scale: Scale) -> None:
    if scale.device == "cuda":
        torch.cuda.synchronize()


def steps(scale: Scale, step: Callable[[], object]) -> None:
    """Run as many steps as one measured time has, to their end."""
    for _ in range(scale.steps):
        step()
    synchronize(scale)


def peak_bytes(scale: Scale, step: Callable[[], object]) -> int:
    """Return the temporary memory of one step on the device."""
    if scale.device != "cuda":
        return 0
    synchronize(scale)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    synchronize(scale)
    return torch.cuda.max_memory_allocated() - before


def copy_bandwidth(scale: Scale) -> float:
    """Return the bytes per second read and written by a copy on the device."""
    source = torch.randn((1 << 28) if scale.device == "cuda" else 1 << 16, device=scale.device)
    target = torch.empty_like(source)
    times = []
    for _ in range(5):
        synchronize(scale)
        started = time.perf_counter()
        target.copy_(source)
        synchronize(scale)
        times.append(time.perf_counter() - started)
    return 2 * source.nbytes / statistics.median(times)


def negatives(scale: Scale, batch: int) -> Result:
    """Measure the loss alone (G4b)."""
    sides = Sides(scale.images, batch, scale.negatives, scale.device)
    temporary = {
        side: peak_bytes(scale, step) for side, step in (("reference", sides.reference_step), ("ours", sides.our_step))
    }
    bandwidth = copy_bandwidth(scale)
    return compare(
        goal=f"G4b-{batch}",
        title=f"NCE against 2 x {batch} x {scale.negatives} rows of {scale.images} on a GPU, in float32",
        sides={"reference": partial(steps, scale, sides.reference_step), "ours": partial(steps, scale, sides.our_step)},
        required=3.0 * scale.demand,
        parity=sides.check,
        repeats=scale.repeats,
        facts={
            **device_facts(scale),
            "steps_a_time": scale.steps,
            "reference_temporary_bytes": temporary["reference"],
            "our_temporary_bytes": temporary["ours"],
            "copy_gb_per_s": round(bandwidth / 1e9, 1),
            "row_bytes_a_pass": 2 * batch * scale.negatives * DIM * 4,
        },
        results=scale.results,
    )


def train_step(scale: Scale, batch: int) -> list[Result]:
    """Measure the step after the photometrics, eager and as a CUDA graph (G5); for the smaller batch G6 too."""
    reference, eager = ReferenceStep(scale, batch), OurStep(scale, batch, "eager")
    on_gpu = scale.device == "cuda"
    parity = partial(same_step, scale, batch)
    best = OurStep(scale, batch, "graph" if on_gpu else "eager")
    facts = {**device_facts(scale), "steps_a_time": scale.steps, "batch": batch}
    results = []
    for name, ours in ((f"G5-{batch}", eager), (f"G5-{batch}-graph", best)):
        results.append(
            compare(
                goal=name,
                title=f"a training step on {batch} images{' as a CUDA graph' if ours is best else ''}",
                sides={"reference": partial(steps, scale, reference), "ours": partial(steps, scale, ours)},
                required=(2.3 if batch == 32 else 3.0) * scale.demand,
                parity=parity,
                repeats=scale.repeats,
                facts=facts,
                results=scale.results,
            )
        )
        speeds = {side: round(1e3 * batch * scale.steps / value) for side, value in results[-1].medians.items()}
        print(f"  images/s: {speeds}", flush=True)
    if batch == scale.batches[0]:
        results.append(host_overhead(scale, reference, eager, best, parity))
    return results


def same_step(scale: Scale, batch: int) -> None:
    """Raise unless both sides' losses agree to bfloat16's precision, from the same weights on the same rows."""
    theirs, ours = ReferenceStep(scale, batch), OurStep(scale, batch, "eager")
    rows = [torch.randint(scale.images, (batch, scale.negatives), device=scale.device) for _ in range(2)]
    with_own = [torch.cat([theirs.inputs.ids[:, None], each], dim=1) for each in rows]
    for _ in range(2):  # the second step depends on the first one's changes
        expected, found = theirs((with_own[0], with_own[1])), ours.step((rows[0], rows[1]))
        torch.testing.assert_close(found.view(1), expected.view(1), rtol=0.02, atol=0)
    moved, expected_rows = (each.inputs.bank.memory[theirs.inputs.ids] for each in (ours, theirs))
    assert F.cosine_similarity(moved, expected_rows).min() > 0.98


def host_overhead(
    scale: Scale, reference: ReferenceStep, eager: OurStep, best: OurStep, parity: Callable[[], object]
) -> Result:
    """Raise if a step waits for the device; measure the host's time to queue one, and the device's idle time (G6)."""
    facts: dict[str, Any] = {**device_facts(scale), "host_syncs_a_step": 0}
    if scale.device == "cuda":
        facts["reference_host_syncs_a_step"] = count_syncs(reference)
        torch.cuda.set_sync_debug_mode("error")  # raises if a call waits
        try:
            eager()
            best()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        facts["gpu_idle_share"] = {"eager": idle_share(scale, eager), "graph": idle_share(scale, best)}
        facts["eager_launch_ms"] = round(launch_ms(scale, eager), 3)
    return compare(
        goal="G6",
        title="host time to queue one training step",
        sides={"reference": reference, "ours": best},
        required=10.0 * scale.demand,  # 1 ms, compared with the 10 ms of an eager step
        parity=parity,
        repeats=scale.repeats,
        facts=facts,
        results=scale.results,
        between=partial(synchronize, scale),
    )


def count_syncs(step: Callable[[], object]) -> int:
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def launch_ms(scale: Scale, step: Callable[[], object]) -> float:
    times = []
    for _ in range(5):
        synchronize(scale)
        started = time.perf_counter()
        step()
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


def idle_share(scale: Scale, step: Callable[[], object]) -> float:
    """Return the share of a step's time in which the device is idle: kernels by the profiler, the step without it."""
    synchronize(scale)
    started = time.perf_counter()
    steps(scale, step)
    wall = time.perf_counter() - started
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        steps(scale, step)
    busy = sum(event.self_device_time_total for event in profile.key_averages()) / 1e6
    return round(max(0.0, 1 - busy / wall), 4)


def compiled(scale: Scale, batch: int) -> Result:
    """Compare this library's step with and without `torch.compile`."""
    plain, other = OurStep(scale, batch, "eager"), OurStep(scale, batch, "compile")
    return compare(
        goal=f"compile-{batch}",
        title=f"this library's training step on {batch} images without and with torch.compile",
        sides={"reference": partial(steps, scale, plain), "ours": partial(steps, scale, other)},
        required=1.0 * scale.demand,
        parity=partial(same_step, scale, batch),
        repeats=scale.repeats,
        facts=device_facts(scale),
        results=scale.results,
    )


def checkpoint_stall(scale: Scale) -> Result:
    """Measure the stall of training for a checkpoint, compared with `torch.save` of the same state (G8)."""
    batch = scale.batches[0]
    step = OurStep(scale, batch, "eager")
    step()
    inputs = step.inputs
    state = TrainState(
        inputs.model, inputs.bank, inputs.criterion, inputs.optimizer, torch.amp.GradScaler(enabled=False)
    ).to_dict(inputs.recipe, "data")
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        checkpoints = Checkpoints(open_storage(folder) / "checkpoints", 1)
        numbers = iter(range(1, 1000))

        def save() -> None:
            checkpoints.save(state, Cursor(step=next(numbers)), "recipe", "data")

        def settle() -> None:
            error = checkpoints.wait()
            assert error is None, error
            synchronize(scale)

        def check() -> None:
            save()
            settle()
            found = checkpoints.load()
            assert found is not None
            assert torch.equal(found[1]["bank"]["memory"], inputs.bank.memory.cpu())

        check()
        facts = {
            **device_facts(scale),
            "folder": folder,
            "speed_while_saving": speed_while_saving(scale, step, save, settle),
        }
        result = compare(
            goal="G8-gpu",
            title="stall of training for a checkpoint",
            sides={"reference": lambda: torch.save(state, Path(folder) / "reference.pt"), "ours": save},
            required=40.0 * scale.demand,
            parity=check,
            repeats=scale.repeats,
            facts=facts,
            results=scale.results,
            between=settle,
        )
        settle()
    return result


def speed_while_saving(
    scale: Scale, step: Callable[[], object], save: Callable[[], None], settle: Callable[[], None]
) -> float:
    """Return the steps per second while a save is written, as a share of those without."""

    def seconds() -> float:
        started = time.perf_counter()
        steps(scale, step)
        return time.perf_counter() - started

    ratios = []
    for _ in range(3):
        alone = seconds()
        save()
        ratios.append(alone / seconds())
        settle()
    return round(statistics.median(ratios), 3)


def device_facts(scale: Scale) -> dict[str, Any]:
    return {"device": torch.cuda.get_device_name() if scale.device == "cuda" else "cpu"}


def table(results: Sequence[Result]) -> str:
    lines = [
        f"On one {results[0].facts['device']}, torch {torch.__version__}; medians.",
        "",
        "| | what | reference | ours | ratio | required |",
        "|---|---|---|---|---|---|",
    ]
    for each in results:
        reference, ours = (f"{each.medians[side]:.3g} {each.unit}" for side in ("reference", "ours"))
        lines.append(f"| {each.goal} | {each.title} | {reference} | {ours} | {each.ratio:.2f} | {each.required:g} |")
    return "\n".join(lines) + "\n"


def run(scale: Scale) -> list[Result]:
    started = time.perf_counter()
    results: list[Result] = []
    for batch in scale.batches:
        results += [negatives(scale, batch), *train_step(scale, batch)]
        release(scale)
    results.append(checkpoint_stall(scale))
    release(scale)
    if scale.device == "cuda" and time.perf_counter() - started < 300:  # compiling takes a minute or two
        results.append(compiled(scale, scale.batches[0]))
    (scale.results / "gpu.md").write_text(table(results))
    return results


def release(scale: Scale) -> None:
    if scale.device == "cuda":
        torch.cuda.empty_cache()


def main() -> int:
    if torch.cuda.is_available():
        return int(not all(result.reached for result in run(full_scale())))
    print("no GPU: nothing is measured; a check in tiny that all of it works follows", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        run(tiny_scale(Path(folder)))
    print("the check is done: both sides work and agree", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
