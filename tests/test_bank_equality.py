"""The bank by rows against values recorded from the reference, and against a whole bank over steps and resumes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch
from banks import KINDS, N, bank_of, cases, config_of, samples_of
from torch import Tensor

from pirl import terms
from pirl.checkpoint import Checkpoints, Cursor, Rows
from pirl.config import LossConfig, MemoryConfig
from pirl.loss import Contrast, Samples
from pirl.memory import RowsBank
from pirl.storage import open_storage
from pirl.world import World

GOLDEN = np.load(Path(__file__).parent / "data" / "contrast.npz")
TEMPERATURES = dict(zip(("0p07", "0p1"), GOLDEN["temperatures"].tolist()))
SIZE, K = 6, 24  # of the recorded batch


def golden(name: str) -> Tensor:
    return torch.from_numpy(GOLDEN[name])


def reference_steps(world: World, kind: str, temperature: str, precision: str) -> list[dict[str, Tensor]]:
    """Take the two recorded steps on a bank that is cut; the seed of a sample stands for its recorded negatives."""
    memory = golden(f"{precision}/memory")
    bank = RowsBank(*memory.shape, MemoryConfig(), 0, world, blank=True)
    bank.memory = memory[bank.first : bank.first + len(bank.memory)].clone()
    criterion = Contrast(
        LossConfig(kind=kind, temperature=TEMPERATURES[temperature], negatives=K),  # type: ignore[arg-type]
        world,
    )
    places = torch.arange(world.rank, SIZE, world.size)
    counts = [len(range(rank, SIZE, world.size)) for rank in range(world.size)]
    draw, results = terms.draw_negatives, []
    for step in range(2):
        drawn = torch.cat([golden(f"negatives_{view}_{step}") for view in ("patches", "images")])
        terms.draw_negatives = lambda config, rows, ids, seeds, drawn=drawn: drawn[seeds]
        samples = Samples(
            golden(f"ids_{step}")[places],
            torch.stack([places, SIZE + places]),
            torch.full((len(places),), world.size / SIZE, dtype=memory.dtype),
            counts,
        )
        raw = [
            golden(f"{precision}/embeddings_{view}_{step}")[places].clone().requires_grad_()
            for view in ("patches", "images")
        ]
        result = criterion(bank, samples, *raw)
        result.loss.backward()
        bank.update(result.rows, result.embeddings)
        rows, _ = bank.own(golden(f"ids_{step}"))
        mean = torch.stack([result.loss.detach(), result.patches, result.images])
        results.append(
            {
                "places": places,
                "losses": world.sum(mean) / world.size,
                "z": criterion.z.clone(),
                "rows": world.sum(rows),
                **{view: each.grad / world.size for view, each in zip(("patches", "images"), raw)},  # type: ignore[operator]
            }
        )
    terms.draw_negatives = draw
    return results


def all_reference_steps(world: World) -> dict[tuple[str, str, str], list[dict[str, Tensor]]]:
    return {
        (precision, kind, temperature): reference_steps(world, kind, temperature, precision)
        for precision in ("f32", "f64")
        for kind in KINDS
        for temperature in TEMPERATURES
    }


@pytest.mark.parametrize("size", [1, 3])
def test_a_cut_bank_takes_two_steps_of_the_reference(size: int, tmp_path: Path) -> None:
    """Loss, gradients, Z and rows of VISSL's own implementation: 1e-12 in float64, the rounding of sums in float32."""
    results = ranks.run(all_reference_steps, size, tmp_path) if size > 1 else [all_reference_steps(World())]
    for result in results:
        for (precision, kind, temperature), values in result.items():
            tolerance = 1e-12 if precision == "f64" else 4e-6
            path = f"{precision}/{kind}/{temperature}"
            for step, value in enumerate(values):
                recorded = [golden(f"{path}/{name}_{step}").item() for name in ("loss", "term_patches", "term_images")]
                assert value["losses"].tolist() == pytest.approx(recorded, rel=tolerance), path
                if kind == "nce":
                    assert value["z"].item() == pytest.approx(golden(f"{path}/z_{step}").item(), rel=tolerance)
                for view in ("patches", "images"):
                    expected = golden(f"{path}/gradient_{view}_{step}")[value["places"]]
                    raw = golden(f"{precision}/embeddings_{view}_{step}")
                    row = golden(f"{precision}/memory").abs().max()  # the largest single contribution
                    scale = 0.5 * row / (SIZE * TEMPERATURES[temperature] * raw.norm(dim=1).min())
                    assert (value[view] - expected).abs().max() < tolerance * scale, path
                rows = golden(f"{precision}/updated_rows_{step}")
                torch.testing.assert_close(value["rows"], rows, rtol=tolerance, atol=tolerance * 0.1)


# ---- many steps, with resumes


BATCH = 10


def continue_steps(world: World, folder: str, cut: bool, steps: range) -> dict[tuple[str, str], dict[str, Any]]:
    """Take steps of every case from its checkpoint, if there is one; save, and return losses and gradients."""
    return {case: _continue(world, f"{folder}/{'-'.join(case)}", cut, steps, *case) for case in cases()}


def _continue(world: World, folder: str, cut: bool, steps: range, kind: str, negatives: str) -> dict[str, Any]:
    checkpoints = Checkpoints(open_storage(folder), world=world)
    bank, criterion = bank_of(world, N, cut, negatives), Contrast(config_of(kind, negatives), world)
    own = range(bank.first, bank.first + len(bank.memory))
    if loaded := checkpoints.load(rows={"bank/memory": own} if cut else None):
        bank.load(loaded[1]["bank"]["memory"])
        criterion.z.copy_(loaded[1]["bank"]["z"])
    losses, gradients = [], []
    for step in steps:
        size = 7 if step % 16 == 15 else BATCH  # the last batch of an epoch
        samples, patches, images, places = samples_of(world, N, size, step)
        patches.requires_grad_(), images.requires_grad_()
        result = criterion(bank, samples, patches, images)
        result.loss.backward()
        bank.update(result.rows, result.embeddings)
        losses.append(world.sum(result.loss.detach().double()) / world.size)
        grads = torch.zeros(2, BATCH, bank.memory.shape[1])
        for view, each in enumerate((patches, images)):
            assert each.grad is not None
            grads[view, places] = each.grad[: len(places)] / world.size
        gradients.append(world.sum(grads))
    memory = Rows(bank.memory, bank.first, N) if cut else bank.memory
    checkpoints.save({"bank": {"memory": memory, "z": criterion.z}}, Cursor(step=steps.stop), "r", "d")
    assert checkpoints.wait() is None
    world.barrier()
    return {"losses": torch.stack(losses), "gradients": torch.stack(gradients)}


@pytest.mark.slow
def test_two_hundred_steps_with_resumes_on_other_numbers_of_ranks(tmp_path: Path) -> None:
    """4 ranks, then 3, 2 and 1: loss, gradients and rows as on a whole bank in one process, in every case."""
    edges = [0, 80, 140, 180, 200]
    parts = [range(start, stop) for start, stop in pairwise(edges)]
    expected = continue_steps(World(), str(tmp_path / "whole"), False, range(200))
    folder = str(tmp_path / "rows")
    for size, part in zip((4, 3, 2, 1), parts):
        result = (
            ranks.run(continue_steps, size, tmp_path / str(size), folder, True, part)[0]
            if size > 1
            else continue_steps(World(), folder, True, part)
        )
        for case, value in result.items():
            losses, gradients = (expected[case][name][part.start : part.stop] for name in ("losses", "gradients"))
            assert ((value["losses"] - losses).abs() <= 2e-6 * (1 + losses)).all(), case
            assert (value["gradients"] - gradients).abs().max() < 4e-6 * gradients.abs().max(), case
    for case in cases():
        name = "-".join(case)
        rows, whole = (Checkpoints(open_storage(str(tmp_path / bank / name))).load() for bank in ("rows", "whole"))
        assert rows
        assert whole
        assert (rows[1]["bank"]["memory"] - whole[1]["bank"]["memory"]).abs().max() < 1e-6, case
