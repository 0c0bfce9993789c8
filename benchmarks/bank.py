"""Every row as a negative, and a bank that is cut by rows: time, memory and bytes.

G11  the loss against all 1.28 million rows, beside the reference's with 2 x 32 x 32,000 drawn rows of them, on the CPU
G12  a bank of 16 million rows on four ranks: memory of a rank, time of a rank with one, two and four ranks, bytes sent
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from benchmarks.g4_negatives import Sides, _status
from benchmarks.harness import RESULTS, Result, compare, machine
from pirl import world as pirl_world
from pirl.config import LossConfig, MemoryConfig
from pirl.loss import Contrast, Samples
from pirl.memory import RowsBank
from pirl.world import World, start_world, stop_world

DIM, TEMPERATURE = 128, 0.07
ROWS, RANKS, MOST_BYTES = 16_000_000, 4, 2_600_000_000
FLAT_ROWS, FLAT_BATCH, FLAT_REPEATS = 250_000, 32, 5  # rows of a rank, and samples of the global batch


class AllRows(Sides):
    """Two banks of the same rows: the reference with drawn rows, and this library with all of them."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        config = LossConfig(kind="cross_entropy", temperature=TEMPERATURE, negatives="all")
        self.all = Contrast(config, World())

    def step_with_all(self) -> tuple[Tensor, Tensor, Tensor]:
        patches, images = self.embeddings()
        result = self.all(
            self.bank, Samples(self.ids, torch.zeros(2, 32, dtype=torch.int64), self.weights, [32]), patches, images
        )
        result.loss.backward()
        self.bank.update(result.rows, result.embeddings)
        assert patches.grad is not None
        return result.patches, patches.grad, result.loss.detach()

    def check_all(self) -> None:
        """Loss and gradient of the patches against sums in float64."""
        raw = self.raw[0].double().requires_grad_()
        scores = F.normalize(raw) @ self.bank.memory.double().T / TEMPERATURE
        term = (scores.logsumexp(1) - scores.gather(1, self.ids[:, None])[:, 0]).mean()
        (0.5 * term).backward()
        assert raw.grad is not None
        expected, gradient = term.detach(), raw.grad
        del scores, term
        value, own, _ = self.step_with_all()
        assert abs(value - expected) < 1e-6 * expected, (value, expected)
        assert (own - gradient).abs().max() < 1e-6 * gradient.abs().max()


def speed() -> Result:
    """Compare all rows with the reference's 32,000 in one run, in turns."""
    sides = AllRows()
    return compare(
        goal="G11",
        title="all 1.28 M rows, beside the reference's 2 x 32 x 32,000 drawn ones: forward + backward + update",
        sides={"reference": sides.reference_step, "ours": sides.step_with_all},
        required=2.0,
        repeats=7,
        unit="ms",
        parity=sides.check_all,
        facts={"torch_threads": torch.get_num_threads(), "negatives": {"reference": 32_000, "ours": 1_281_166}},
    )


@dataclass
class Report:
    """What one rank measured."""

    peak_bytes: int
    start_s: float
    cpu_s: list[float]
    """Processor time of each step of this rank."""
    sent_bytes: int
    formula_bytes: int


def measure_rank(rank: int, ranks: int, port: int, rows: int, batch: int, repeats: int) -> Report:
    """Make a rank's part of a bank and take some steps against all rows of it."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world = start_world(timeout_s=1800)
    started = time.perf_counter()
    bank = RowsBank(rows, DIM, MemoryConfig(), 0, world)
    world.barrier()
    start_s = time.perf_counter() - started
    criterion = Contrast(LossConfig(kind="cross_entropy", temperature=TEMPERATURE, negatives="all"), world)
    counts = [batch // ranks] * ranks
    samples = Samples(
        torch.arange(rank * counts[0], (rank + 1) * counts[0]) * (rows // batch),
        torch.zeros(2, counts[0], dtype=torch.int64),
        torch.full((counts[0],), ranks / batch),
        counts,
    )
    sent = {"bytes": 0}
    _count_messages(sent)
    cpu_s = []
    for _ in range(repeats + 1):
        patches, images = torch.randn(2, counts[0], DIM)
        sent["bytes"], begin = 0, time.process_time()
        result = criterion(bank, samples, patches.requires_grad_(), images.requires_grad_())
        result.loss.backward()
        bank.update(result.rows, result.embeddings)
        cpu_s.append(time.process_time() - begin)
    peak = _status("VmHWM")
    stop_world(world)
    formula = (ranks > 1) * batch * 4 * ((2 * DIM + 6) + (3 * DIM + 6))
    return Report(peak, start_s, cpu_s[1:], sent["bytes"], formula)


def _count_messages(sent: dict[str, int]) -> None:
    """Count the bytes of each collective's result: what a rank gathers, and what it gives out to be summed."""
    gather, exchange = pirl_world.gather_single, dist.all_to_all_single

    def gather_counted(out: Tensor, own: Tensor) -> Any:
        sent["bytes"] += out.nbytes
        return gather(out, own)

    def exchange_counted(out: Tensor, own: Tensor) -> Any:
        sent["bytes"] += own.nbytes
        return exchange(out, own)

    pirl_world.gather_single = gather_counted
    dist.all_to_all_single = exchange_counted


def run(ranks: int, rows: int, batch: int, repeats: int) -> list[Report]:
    """Return the reports of `ranks` processes."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with ProcessPoolExecutor(ranks, multiprocessing.get_context("spawn")) as pool:
        made = [pool.submit(measure_rank, rank, ranks, port, rows, batch, repeats) for rank in range(ranks)]
        return [each.result() for each in made]


def size() -> bool:
    """Measure a cut bank; return whether every target is reached."""
    flat = {}
    for ranks in (1, 2, 4):
        reports = run(ranks, FLAT_ROWS * ranks, FLAT_BATCH, FLAT_REPEATS)
        flat[ranks] = statistics.median(second for report in reports for second in report.cpu_s)
        assert all(report.sent_bytes == report.formula_bytes for report in reports), reports
        print(f"  {ranks} ranks x {FLAT_ROWS:,} rows: {flat[ranks] * 1e3:.0f} ms of processor time a step", flush=True)
    reports = run(RANKS, ROWS, FLAT_BATCH, 2)
    assert all(report.sent_bytes == report.formula_bytes for report in reports), reports
    peak = max(report.peak_bytes for report in reports)
    start_s = max(report.start_s for report in reports)
    print(f"G12  {ROWS:,} rows on {RANKS} ranks: {peak / 1e9:.2f} GB a rank, start {start_s:.0f} s", flush=True)
    reached = peak < MOST_BYTES and max(flat.values()) < 1.3 * min(flat.values())
    values = {
        "goal": "G12",
        "rows": ROWS,
        "ranks": RANKS,
        "peak_bytes_a_rank": peak,
        "start_s": round(start_s, 1),
        "cpu_s_a_step_by_ranks": {str(ranks): round(second, 4) for ranks, second in flat.items()},
        "sent_bytes_a_step": reports[0].sent_bytes,
        "reached": reached,
        "facts": machine(),
    }
    (RESULTS / "G12.json").write_text(json.dumps(values, indent=2) + "\n")
    return reached


if __name__ == "__main__":
    chosen = sys.argv[1:] or ["speed", "size"]
    results = [speed().reached if name == "speed" else size() for name in chosen]
    sys.exit(not all(results))
