"""Rows of the bank: their start on each rank, rows that no epoch has visited, and storage in bfloat16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from banks import N, bank_of, config_of, count_reads, samples_of
from conftest import tiny_recipe

from pirl import memory as memory_module
from pirl.checkpoint import Checkpoints, Cursor, Rows
from pirl.checkpoint import state as checkpoint_state
from pirl.config import LossConfig, MemoryConfig
from pirl.errors import CheckpointError, ConfigError
from pirl.loss import Contrast
from pirl.memory import MemoryBank
from pirl.storage import open_storage
from pirl.training import loop
from pirl.training.loop import build_state, train
from pirl.training.spec import Options
from pirl.twister import jump
from pirl.world import World

# ---- the start


@pytest.mark.parametrize("values", [0, 1, 623, 624, 625, 1_000_003])
@pytest.mark.parametrize("seed", [0, 5, 2**40 + 7])
def test_a_generator_jumps_to_where_draws_lead(values: int, seed: int) -> None:
    drawn, jumped = (torch.Generator().manual_seed(seed) for _ in range(2))
    torch.empty(values).uniform_(generator=drawn)
    jump(jumped, values)
    assert torch.equal(*(torch.empty(2000).uniform_(generator=each) for each in (drawn, jumped)))


def test_jumps_add_up_where_no_draw_can_follow() -> None:
    """A jump of 10^14 values and the words after it are those of one jump more: the recurrence links them."""
    far, farther = (torch.Generator().manual_seed(3) for _ in range(2))
    jump(far, 10**14)
    jump(farther, 10**14 + 5000)
    assert torch.equal(torch.empty(6000).uniform_(generator=far)[5000:], torch.empty(1000).uniform_(generator=farther))


def test_a_used_generator_does_not_jump() -> None:
    generator = torch.Generator().manual_seed(1)
    torch.empty(3).uniform_(generator=generator)
    with pytest.raises(ValueError, match="has been used"):
        jump(generator, 5)


def test_a_resumed_training_draws_no_rows(shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, options = tiny_recipe("train.epochs=1"), Options(data=shards, out=str(tmp_path / "run"), workers=0)
    draws = []
    random_rows = memory_module._random_rows
    monkeypatch.setattr(memory_module, "_random_rows", lambda *values: draws.append(values) or random_rows(*values))
    monkeypatch.setattr(loop.Trainer, "fit", lambda self: self.saver.save_final(self.cursor, None))
    train(recipe, options, World())
    assert len(draws) == 1
    rows = Checkpoints(open_storage(str(tmp_path / "run" / "checkpoints"))).load()
    assert rows
    monkeypatch.setattr(loop.Trainer, "fit", lambda self: self.state.bank.memory)
    assert torch.equal(train(recipe, options, World()), rows[1]["bank"]["memory"])  # type: ignore[arg-type]
    assert len(draws) == 1


# ---- rows that no epoch has visited


def test_only_visited_rows_are_negatives() -> None:
    """Loss and gradient are those of a softmax over the visited rows and the own one, by autograd in float64."""
    bank, criterion = bank_of(World(), N, False, "visited"), Contrast(config_of("cross_entropy", "visited"), World())
    seen: set[int] = set()
    for step in range(12):
        samples, patches, images, _ = samples_of(World(), N, 20, step)
        before, raw = bank.memory.double(), patches.double().requires_grad_()
        rows = samples.rows.tolist()
        scores = F.normalize(raw) @ before.T / 0.2
        scored = torch.tensor([[n in seen or n == row for n in range(N)] for row in rows])
        own = scores[torch.arange(20), samples.rows]
        term = (scores.masked_fill(~scored, -torch.inf).logsumexp(1) - own).mean()
        (0.5 * term).backward()
        result = criterion(bank, samples, patches.requires_grad_(), images)
        result.loss.backward()
        bank.update(result.rows, result.embeddings)
        assert result.patches.item() == pytest.approx(term.item(), rel=2e-6, abs=1e-7)
        assert patches.grad is not None
        assert raw.grad is not None
        assert (patches.grad - raw.grad).abs().max() <= 2e-6 * raw.grad.abs().max() + 1e-12
        seen.update(rows)
        assert set(bank.memory.any(1).nonzero()[:, 0].tolist()) == seen
    assert len(seen) > N / 2


def test_visits_are_counted_again_from_a_checkpoint(tmp_path: Path) -> None:
    recipe = tiny_recipe("loss.kind=cross_entropy", "loss.negatives=visited", "loss.exclude_positive=false")
    state = build_state(recipe, 60, World())
    assert not state.bank.memory.any()
    state.bank.update(torch.arange(7), F.normalize(torch.randn(7, state.bank.memory.shape[1])))
    checkpoints = Checkpoints(open_storage(str(tmp_path)))
    checkpoints.save(state.to_dict(recipe, "d"), Cursor(), "r", "d")
    assert checkpoints.wait() is None
    for cut in (False, True):
        other = build_state(recipe, 60, World(), cut=cut, blank=True)
        loaded = checkpoints.load()
        assert loaded
        other.load_dict(loaded[1])
        assert other.bank.visited is not None
        assert other.bank.visited.nonzero()[:, 0].tolist() == list(range(7))


def test_visited_needs_cross_entropy() -> None:
    with pytest.raises(ConfigError, match="visited"):
        tiny_recipe("loss.kind=nce", "loss.negatives=visited")


# ---- reading by pieces


@pytest.mark.parametrize("by_rows", [True, False])
def test_pieces_make_up_the_bank(by_rows: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_state, "PIECE_BYTES", 10 * 4 * 16)
    memory = bank_of(World(), N, False).memory
    checkpoints = Checkpoints(open_storage(str(tmp_path)))
    rows = Rows(memory, 0, N) if by_rows else memory
    checkpoints.save({"bank": {"memory": rows}, "model": {"weight": torch.ones(3)}}, Cursor(), "r", "d")
    assert checkpoints.wait() is None
    pieces = list(checkpoints.pieces("step-00000000", "bank/memory"))
    assert max(len(piece) for _, piece in pieces) == (10 if by_rows else N)
    assert [first for first, _ in pieces] == (list(range(0, N, 10)) if by_rows else [0])
    assert torch.equal(torch.cat([piece for _, piece in pieces]), memory)
    if by_rows:
        sizes = count_reads(monkeypatch)
        checkpoints.load(rows={"bank/memory": range(N)})
        everything = sum(sizes)
        sizes.clear()
        loaded = checkpoints.load(rows={"bank/memory": range(0)})
        assert loaded
        assert torch.equal(loaded[1]["model"]["weight"], torch.ones(3))
        assert loaded[1]["bank"]["memory"].shape == (0, 16)
        assert sum(sizes) == everything - memory.nbytes > 0
        with pytest.raises(CheckpointError):
            list(checkpoints.pieces("step-00000009", "bank/memory"))


# ---- bfloat16


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("negatives", ["drawn", "all", "shared"])
def test_rows_in_bfloat16_are_scored_in_float32(negatives: str, cut: bool) -> None:
    """The loss is exactly that of a float32 bank of the same values; an update rounds the moved row once."""
    small, large = (bank_of(World(), N, cut, precision=precision) for precision in ("bf16", "fp32"))
    large.memory.copy_(small.memory)
    samples, patches, images, _ = samples_of(World(), N, 10, 1)
    values = []
    for bank in (small, large):
        criterion = Contrast(config_of("cross_entropy", negatives), World())
        result = criterion(bank, samples, patches, images)
        values.append(result.loss)
        bank.update(result.rows, result.embeddings)
    assert small.memory.dtype == torch.bfloat16
    assert values[0].item() == pytest.approx(values[1].item(), rel=1e-6)
    assert torch.equal(small.memory, large.memory.bfloat16())


def test_the_error_of_bfloat16_is_small() -> None:
    """128 dimensions, T = 0.07: the loss moves by less than 1e-3, its gradient by less than 0.3 %."""
    config = LossConfig(kind="cross_entropy", negatives="all")
    values = []
    for precision in ("fp32", "bf16"):
        bank = MemoryBank(20_000, 128, MemoryConfig(precision=precision), 1)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(2)
        samples, *_ = samples_of(World(), 20_000, 32, 0)
        patches, images = (torch.randn(32, 128, generator=generator).requires_grad_() for _ in range(2))
        result = Contrast(config, World())(bank, samples, patches, images)
        result.loss.backward()
        values.append((result.loss.item(), patches.grad))
    (exact, gradient), (rounded, other) = values
    assert abs(rounded - exact) < 1e-3
    assert (other - gradient).norm() < 0.003 * gradient.norm()  # type: ignore[union-attr, operator]


def test_checksums_of_any_row_size() -> None:
    for dim in (2, 3, 4, 7):
        for precision in ("fp32", "bf16"):
            bank = MemoryBank(5, dim, MemoryConfig(precision=precision))  # type: ignore[arg-type]
            before = bank.checksum()
            bank.update(torch.tensor([4]), F.normalize(torch.ones(1, dim)))
            assert bank.checksum() != before
