"""The bank by rows: the same loss, gradients and rows as the whole bank, on one to four ranks, with all negatives."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.nn.functional as F
from banks import KINDS, D, N, bank_of, cases, config_of, count_reads, samples_of
from conftest import tiny_recipe
from torch import Tensor

from pirl import rowsums
from pirl.checkpoint import Checkpoints, Cursor, Rows
from pirl.checkpoint import state as checkpoint_state
from pirl.config import LossConfig, MemoryConfig
from pirl.errors import CheckpointError, PreemptedError
from pirl.loss import Contrast, StepLoss, plain_term, scores
from pirl.memory import MemoryBank, RowsBank, rows_of
from pirl.negatives import Systematic
from pirl.rowsums import Terms, attend, multiplied
from pirl.storage import open_storage
from pirl.training import placement
from pirl.training.control import Control, Decision
from pirl.training.loop import build_state, train
from pirl.training.placement import cuts_bank
from pirl.training.spec import Options
from pirl.training.state import own_rows
from pirl.world import World

BATCH = 10


def steps(world: World, kind: str, negatives: str, images: int, cut: bool, sizes: list[int]) -> dict[str, Any]:
    """Return losses, gradients and at last the bank of some steps."""
    bank, criterion = bank_of(world, images, cut, negatives), Contrast(config_of(kind, negatives), world)
    seen: dict[str, Any] = {"losses": [], "gradients": [], "cosines": []}
    for step, size in enumerate(sizes):
        samples, patches, images_, _ = samples_of(world, images, size, step)
        patches.requires_grad_(), images_.requires_grad_()
        result: StepLoss = criterion(bank, samples, patches, images_)
        result.loss.backward()
        bank.update(result.rows, result.embeddings)
        assert len(result.rows) == size
        assert patches.grad is not None
        assert images_.grad is not None
        values = torch.stack([result.loss.detach(), result.patches, result.images, result.positive])
        seen["losses"].append(world.sum(values.double()) / world.size)
        count = samples.counts[world.rank]
        grads = torch.stack([patches.grad, images_.grad], dim=1)
        assert not grads[count:].any()  # a stand-in has none
        every = world.all_gather(grads[:count], samples.counts) / world.size
        order = [place for rank in range(world.size) for place in range(rank, size, world.size)]
        seen["gradients"].append(every[torch.tensor(order).argsort()])
    counts = [len(rows_of(images, rank, world.size)) for rank in range(world.size)]
    seen["bank"] = world.all_gather(bank.memory, counts) if cut else bank.memory
    seen["z"] = criterion.z.item()
    return seen


def all_cases(world: World, images: int, sizes: list[int]) -> dict[tuple[str, str, bool], dict[str, Any]]:
    return {
        (kind, negatives, cut): steps(world, kind, negatives, images, cut, sizes)
        for kind, negatives in cases()
        for cut in (False, True)
        if images > 50 or negatives in ("all", "visited")
    }


def assert_same(value: dict[str, Any], expected: dict[str, Any], case: Any) -> None:
    for loss, wanted in zip(value["losses"], expected["losses"]):
        torch.testing.assert_close(loss, wanted, rtol=2e-6, atol=2e-6, msg=lambda text: f"{case}: {text}")
    for gradient, wanted in zip(value["gradients"], expected["gradients"]):
        assert (gradient - wanted).abs().max() <= 2e-6 * wanted.abs().max(), case
    assert (value["bank"] - expected["bank"]).abs().max() < 1e-6, case
    assert value["z"] == pytest.approx(expected["z"], rel=1e-6), case


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_cut_bank_gives_what_a_whole_one_gives(size: int, tmp_path: Path) -> None:
    """Both losses and each kind of negatives; the last batch leaves ranks without samples."""
    sizes = [BATCH, BATCH, 7, 2]
    expected = all_cases(World(), N, sizes)
    results = [all_cases(World(), N, sizes)] if size == 1 else ranks.run(all_cases, size, tmp_path, N, sizes)
    for result in results:
        for case, value in result.items():
            assert_same(value, expected[(*case[:2], False)], case)
            assert torch.equal(value["bank"], results[0][case]["bank"])


def test_more_ranks_than_rows(tmp_path: Path) -> None:
    sizes = [2, 3, 1]
    expected = all_cases(World(), 3, sizes)
    for result in ranks.run(all_cases, 4, tmp_path, 3, sizes):
        for case, value in result.items():
            assert_same(value, expected[case], case)


# ---- the sums


@pytest.mark.parametrize("kind", KINDS)
def test_all_rows_are_the_plain_form_with_every_other_row(kind: str) -> None:
    bank, criterion = (
        bank_of(World(), N, False),
        Contrast(LossConfig(kind=kind, temperature=0.2, negatives="all"), World()),
    )  # type: ignore[arg-type]
    samples, patches, images, _ = samples_of(World(), N, BATCH, 0)
    patches.requires_grad_()
    result = criterion(bank, samples, patches, images)
    result.loss.backward()
    plain = patches.detach().double().requires_grad_()
    others = torch.stack([torch.cat([row[None], torch.arange(N)[torch.arange(N) != row]]) for row in samples.rows])
    s = scores(bank.memory.double(), others, F.normalize(plain), 0.2)
    if kind == "nce":
        assert criterion.z.item() == pytest.approx(s.exp().sum(1).mean().item(), rel=1e-6)
    term = plain_term(criterion.config, s, N, criterion.z).mean()
    (0.5 * term).backward()
    assert result.patches.item() == pytest.approx(term.item(), rel=1e-6)
    assert plain.grad is not None
    assert patches.grad is not None
    assert (patches.grad - plain.grad).abs().max() < 1e-6 * plain.grad.abs().max()


@pytest.mark.parametrize("rows", [1, 3, 511, 5000])
def test_attention_over_rows_is_exact(rows: int) -> None:
    """In float32 against sums in float64, by both ways, with a stride between rows too."""
    generator = torch.Generator().manual_seed(rows)
    memory = F.normalize(torch.randn(2 * rows, 128, generator=generator))[::2]
    queries = F.normalize(torch.randn(9, 128, generator=generator))
    s = queries.double() @ memory.double().T / 0.07
    lse, mean = s.logsumexp(1), s.softmax(1) @ memory.double()
    for values in (attend(memory, queries, 1 / 0.07), attend_multiplied(memory, queries, 1 / 0.07)):
        assert (values[0] - lse).abs().max() < 4e-6
        assert (values[1] - mean).abs().max() < 1e-6


def attend_multiplied(memory: Tensor, queries: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    lses, means = multiplied(memory[None], queries, scale)
    lse = lses.logsumexp(0)
    return lse, ((lses - lse).exp()[..., None] * means).sum(0)


@pytest.mark.parametrize("kind", KINDS)
def test_sums_over_rows_add_up(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over any partition of the rows, in blocks of any size."""
    terms = Terms(0.1, None if kind == "cross_entropy" else torch.tensor(3.0, dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    memory = F.normalize(torch.randn(1000, 8, generator=generator, dtype=torch.float64))
    queries = F.normalize(torch.randn(5, 8, generator=generator, dtype=torch.float64))
    whole = terms.over(memory, queries)
    monkeypatch.setattr(rowsums, "BLOCK_BYTES", 1 << 10)
    monkeypatch.setattr(rowsums, "SIMILARITY_ROWS", 1000)
    parts = [terms.over(part, queries) for part in memory.split([1, 0, 700, 299])]
    for value, expected in zip((sum(column) for column in zip(*parts)), whole):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


def test_a_systematic_sample_has_each_row_equally_often() -> None:
    """And the ranks' views together are the sample."""
    config = LossConfig(negatives=10, shared_negatives=True)
    counts = torch.zeros(43)
    memory = torch.arange(43)
    for seed in range(4000):
        sample = Systematic.of_step(config, 43, seed)
        rows = sample.of(memory, 0)
        assert len(rows) == sample.count
        assert sample.has(memory).nonzero()[:, 0].tolist() == rows.tolist()
        counts[rows] += 1
        parts = [
            sample.of(memory[part.start : part.stop], part.start) for part in (rows_of(43, r, 3) for r in range(3))
        ]
        assert torch.equal(torch.cat(parts), rows)
    assert (counts / 4000 - 1 / 4).abs().max() < 5 * math.sqrt(3 / 16 / 4000)


# ---- the start, and checkpoints


@pytest.mark.parametrize("init", ["shared", "rank_mean"])
def test_rows_start_as_those_of_the_whole_bank(init: str) -> None:
    whole = MemoryBank(40_000, 8, MemoryConfig(init=init), 3, 3).memory  # type: ignore[arg-type]
    parts = [RowsBank(40_000, 8, MemoryConfig(init=init), 3, World(rank, 3)) for rank in range(3)]  # type: ignore[arg-type]
    assert [part.first for part in parts] == [0, 13_333, 26_666]
    assert torch.equal(torch.cat([part.memory for part in parts]), whole)
    bound, generator = 1 / math.sqrt(8 / 3), torch.Generator().manual_seed(3)
    if init == "shared":  # as version 0.1 made it, at once
        assert torch.equal(whole, F.normalize(torch.rand(40_000, 8, generator=generator).mul_(2 * bound).sub_(bound)))


def save_rows(world: World, folder: str, images: int) -> Tensor:
    """Save this rank's rows of a bank in pieces of three rows, among other tensors of every size of element."""
    checkpoint_state.PIECE_BYTES = 3 * 4 * D
    bank = bank_of(world, images, True)
    state = {
        "bank": {"memory": Rows(bank.memory, bank.first, images), "z": torch.tensor(3.0, dtype=torch.float64)},
        "model": {
            "weight": torch.arange(1000.0),
            "half": torch.ones(3, dtype=torch.bfloat16),
            "flag": torch.tensor(True),
        },
    }
    checkpoints = Checkpoints(open_storage(folder), world=world)
    checkpoints.save(state, Cursor(step=7), "r", "d")
    assert checkpoints.wait() is None
    world.barrier()
    return bank.memory


@pytest.mark.parametrize("images", [157, 3])
def test_rows_are_read_on_another_number_of_ranks(images: int, tmp_path: Path) -> None:
    """4 -> 3 -> 1, and as a whole bank; with 3 rows, one of the ranks has none."""
    whole = bank_of(World(), images, False).memory
    folder = tmp_path / "checkpoints"
    ranks.run(save_rows, 4, tmp_path, str(folder), images)
    checkpoints = Checkpoints(open_storage(str(folder)))
    for size in (3, 1, 5):
        for rank in range(size):
            part = rows_of(images, rank, size)
            found = checkpoints.load(rows={"bank/memory": part})
            assert found
            assert torch.equal(found[1]["bank"]["memory"], whole[part.start : part.stop])
            assert torch.equal(found[1]["model"]["weight"], torch.arange(1000.0))
            assert found[1]["model"]["flag"].item() is True
    found = checkpoints.load()
    assert found
    assert torch.equal(found[1]["bank"]["memory"], whole)


def test_a_rank_reads_its_rows_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges with other rows are not read, and a damaged one of them is not noticed; an own one is."""
    save_rows(World(), str(tmp_path), 15_000)
    storage = open_storage(str(tmp_path))
    part = range(3000, 3300)
    sizes = count_reads(monkeypatch)
    found = Checkpoints(storage).load("step-00000007", rows={"bank/memory": part})
    assert found
    assert torch.equal(found[1]["bank"]["memory"], bank_of(World(), 15_000, False).memory[3000:3300])
    file = next((tmp_path / "step-00000007").glob("part-*"))
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    commit = (tmp_path / "step-00000007" / "COMMIT.json").stat().st_size
    assert 300 * 4 * D < sum(sizes) < commit + header + 4 * 1000 + 300 * 4 * D + 20_000
    data = bytearray(file.read_bytes())
    row = header + 8 + 4 * 1000 + 4 * D * 3100
    data[row : row + 4] = b"abcd"
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        Checkpoints(storage).load("step-00000007", rows={"bank/memory": part})
    assert Checkpoints(storage).load("step-00000007", rows={"bank/memory": range(50)})
    with pytest.raises(CheckpointError, match="damaged"):
        Checkpoints(storage).load("step-00000007")


def test_a_whole_bank_continues_by_rows_and_back(tmp_path: Path) -> None:
    """A checkpoint of a whole bank, as version 0.1 wrote it, loads into rows; and one of rows into a whole bank."""
    recipe = tiny_recipe()
    states = {cut: build_state(recipe, 60, World(), cut=cut) for cut in (False, True)}
    for cut, state in states.items():
        state.bank.memory += 0.5 + cut
        state.criterion.z.fill_(5.0 + cut)
        checkpoints = Checkpoints(open_storage(str(tmp_path / str(cut))))
        checkpoints.save(state.to_dict(recipe, "d"), Cursor(), "r", "d")
        assert checkpoints.wait() is None
        other = build_state(recipe, 60, World(), cut=not cut)
        found = checkpoints.load(rows=own_rows(other))
        assert found
        assert set(found[1]["bank"]) == {"memory", "z"}
        other.load_dict(found[1])
        assert torch.equal(other.bank.memory, state.bank.memory)
        assert other.criterion.z.item() == 5.0 + cut


# ---- a whole training


def train_until(world: World, data: str, out: str, bank: str, steps: int) -> None:
    """Train the tiny recipe for `steps` more steps and stop as at a signal, or to its end with 0."""
    agree, made = Control.agree, 0

    def agree_or_stop(self: Control, *arguments: Any) -> Decision:
        nonlocal made
        made += 1
        return Decision.STOP if made == steps else agree(self, *arguments)

    Control.agree = agree_or_stop  # type: ignore[method-assign]
    recipe = tiny_recipe("train.epochs=3", "loss.negatives=all")
    try:
        train(recipe, Options(data=data, out=out, bank=bank, workers=0), world)  # type: ignore[arg-type]
    except PreemptedError:
        pass
    finally:
        Control.agree = agree  # type: ignore[method-assign]


def test_a_training_by_rows_resumes_on_fewer_ranks(shards: str, tmp_path: Path) -> None:
    """4 ranks, then 3, then 1, killed in the middle of epochs, is the same training as with a whole bank."""
    states = {}
    for bank in ("rows", "whole"):
        out = str(tmp_path / bank)
        ranks.run(train_until, 4, tmp_path / "4", shards, out, bank, 4)
        ranks.run(train_until, 3, tmp_path / "3", shards, out, bank, 5)
        train_until(World(), shards, out, bank, 0)
        found = Checkpoints(open_storage(out) / "checkpoints").load()
        assert found
        assert found[0].cursor.step == 15
        states[bank] = found[1]
        values = [json.loads(line) for line in (tmp_path / bank / "events.jsonl").read_text().splitlines()]
        assert [event["event"] for event in values].count("resume") == 2
    rows, whole = (state["bank"]["memory"] for state in states.values())
    assert rows.shape == whole.shape
    assert (rows - whole).abs().max() < 1e-4
    for name, weight in states["whole"]["model"].items():
        torch.testing.assert_close(states["rows"]["model"][name], weight, rtol=1e-3, atol=1e-4)


# ---- where the bank lives


def test_a_bank_is_cut_where_it_would_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe()
    size = 1000 * recipe.model.embedding_dim * 4
    world = World(0, 2)
    monkeypatch.setattr(World, "gather_objects", lambda self, value: [value, value])
    for memory, cut in ((4 * size, False), (4 * size - 1, True)):
        monkeypatch.setattr(placement, "rank_memory_bytes", lambda world, memory=memory: memory)
        assert cuts_bank("auto", recipe, 1000, world)[0] is cut
    assert "25% of a rank's memory" in cuts_bank("auto", recipe, 1000, world)[1]
    assert cuts_bank("whole", recipe, 1000, world)[0] is False
    assert cuts_bank("rows", recipe, 10, World())[0] is True
    assert cuts_bank("auto", recipe, 1000, World())[0] is False


def test_memory_of_a_rank_is_its_part_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    whole = placement.rank_memory_bytes(World())
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert placement.rank_memory_bytes(World()) == whole // 4 > 0
