"""Two sides of one comparison, measured in turns on the same machine at the same time."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
SCALE = {"s": 1.0, "ms": 1e3, "us": 1e6}


@dataclass(frozen=True)
class Result:
    """Measured times of one goal in `unit`, and how many times faster `ours` is than `reference`, by medians."""

    goal: str
    title: str
    unit: str
    times: dict[str, list[float]]
    medians: dict[str, float]
    ratio: float
    required: float
    facts: dict[str, Any]

    @property
    def reached(self) -> bool:
        return self.ratio >= self.required


def compare(
    goal: str,
    title: str,
    sides: Mapping[str, Callable[[], object]],
    required: float,
    parity: Callable[[], object],
    repeats: int = 7,
    unit: str = "ms",
    facts: Mapping[str, Any] | None = None,
    results: Path = RESULTS,
    between: Callable[[], object] = lambda: None,
) -> Result:
    """Time the sides `reference` and `ours` in turns, print the table, write `results`/GOAL.json.

    `parity` runs first and raises unless both sides compute the same. Each side then runs once unmeasured, so that no
    first-time cost counts, and `repeats` times measured; `between` runs unmeasured before each time.
    """
    if set(sides) != {"reference", "ours"}:
        raise ValueError(f"a comparison has the sides 'reference' and 'ours', not {sorted(sides)}")
    parity()
    times: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(repeats + 1):
        for side, work in sides.items():
            between()
            started = time.perf_counter()
            work()
            if turn:
                times[side].append((time.perf_counter() - started) * SCALE[unit])
    medians = {side: statistics.median(values) for side, values in times.items()}
    result = Result(
        goal,
        title,
        unit,
        {side: [round(value, 4) for value in values] for side, values in times.items()},
        {side: round(value, 4) for side, value in medians.items()},
        round(medians["reference"] / medians["ours"], 3),
        required,
        {**machine(), **(facts or {})},
    )
    print(f"{goal}  {title}", flush=True)
    for side, values in times.items():
        print(
            f"  {side:9}  median {medians[side]:.4g} {unit}  ({min(values):.4g} to {max(values):.4g}, {repeats} times)"
        )
    print(f"  ratio {result.ratio:.2f}, required {required:g}: {'reached' if result.reached else 'MISSED'}")
    print(f"  {', '.join(f'{name} {value}' for name, value in result.facts.items())}", flush=True)
    results.mkdir(parents=True, exist_ok=True)
    (results / f"{goal}.json").write_text(json.dumps(asdict(result) | {"reached": result.reached}, indent=2) + "\n")
    return result


def finish(results: Sequence[Result]) -> None:
    """End the program, with 1 if a goal was missed."""
    sys.exit(not all(result.reached for result in results))


def machine() -> dict[str, Any]:
    """Return what the figures depend on, and the present load."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
