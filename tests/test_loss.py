"""Loss, gradients, bank and Z: against values recorded from the reference, autograd, and the laws they must obey."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch
import torch.nn.functional as F
from torch import Tensor

from pirl import loss as loss_module
from pirl.config import LossConfig, MemoryConfig
from pirl.data import negative_seeds
from pirl.loss import (
    Contrast,
    ContrastTerm,
    Samples,
    StepLoss,
    plain_term,
    products_at_once,
    products_in_cache,
    scores,
    sums_in_parts,
    weighted_sums,
)
from pirl.memory import MemoryBank
from pirl.negatives import draw_negatives, splitmix64
from pirl.world import World

GOLDEN = np.load(Path(__file__).parent / "data" / "contrast.npz")
KINDS = ("nce", "cross_entropy")
PRECISIONS = {"f32": torch.float32, "f64": torch.float64}
TEMPERATURES = dict(zip(("0p07", "0p1"), GOLDEN["temperatures"].tolist()))  # as rounded to float32 by the reference
K = 24


def golden(name: str) -> Tensor:
    return torch.from_numpy(GOLDEN[name])


def golden_bank(precision: str) -> MemoryBank:
    memory = golden(f"{precision}/memory")
    bank = MemoryBank(*memory.shape, MemoryConfig())
    bank.memory = memory.clone()
    return bank


NO_SEEDS = torch.empty(2, 0, dtype=torch.int64)


def golden_criterion(kind: str, temperature: str, world: World | None = None) -> Contrast:
    config = LossConfig(kind=kind, temperature=TEMPERATURES[temperature], negatives=K)  # type: ignore[arg-type]
    return Contrast(config, world or World())


def golden_step(criterion: Contrast, precision: str, bank: MemoryBank, step: int) -> tuple[StepLoss, Tensor, Tensor]:
    """Return the loss of the recorded inputs and both gradients, and update the bank."""
    patches, images = (
        golden(f"{precision}/embeddings_{view}_{step}").clone().requires_grad_() for view in ("patches", "images")
    )
    ids = golden(f"ids_{step}")
    weights = torch.full((len(ids),), 1 / len(ids), dtype=bank.memory.dtype)
    drawn = golden(f"negatives_patches_{step}"), golden(f"negatives_images_{step}")
    result = criterion(bank, Samples(ids, NO_SEEDS, weights, [len(ids)], drawn=drawn), patches, images)
    result.loss.backward()
    bank.update(result.rows, result.embeddings)
    return result, patches.grad, images.grad  # type: ignore[return-value]


def closed_form(
    kind: str, temperature: float, memory: np.ndarray, index: np.ndarray, raw: np.ndarray, z: float
) -> tuple[float, np.ndarray]:
    """The mean loss of one view in NumPy, and its gradient with respect to the unit embeddings (B, D)."""
    unit = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    rows = memory[index]
    s = np.einsum("bkd,bd->bk", rows, unit) / temperature
    batch, columns = s.shape
    if kind == "nce":
        p, c = np.exp(s) / z, (columns - 1) / len(memory)
        mass = p + c + 1.1920929e-07
        value = -(np.log(p[:, 0] / mass[:, 0]).sum() + np.log(c / mass[:, 1:]).sum()) / batch
        slope = p / mass
        slope[:, 0] -= 1
    else:
        top = s.max(1, keepdims=True)
        softmax = np.exp(s - top) / np.exp(s - top).sum(1, keepdims=True)
        value = -np.log(softmax[:, 0]).mean()
        slope = softmax
        slope[:, 0] -= 1
    return value, np.einsum("bk,bkd->bd", slope, rows) / temperature / batch


def projected(unit_gradient: np.ndarray, raw: np.ndarray) -> np.ndarray:
    """Through x -> x / |x|: the part along x vanishes, which is where float32 loses its digits."""
    norm = np.linalg.norm(raw, axis=1, keepdims=True)
    unit = raw / norm
    return (unit_gradient - (unit_gradient * unit).sum(1, keepdims=True) * unit) / norm


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("kind", KINDS)
def test_two_steps_of_the_reference(kind: str, temperature: str, precision: str) -> None:
    """1e-12 relative in float64, 1e-6 in float32; a float32 loss below 1: 1e-6 of the exact value of the same inputs.

    The recorded float32 losses are rounded at the size of the scores they are a difference of: where they are small,
    they are up to 1.4e-6 off the exact value, and agree to 2e-6.
    A gradient in float32 is compared relative to its largest single contribution, that of a slope of 1: |row| / (B T)
    over the raw embedding's length. The reference takes softmax - 1 and then projects out what lies along the
    embedding; with a sure positive all but 1e-4 of the terms cancels, and the rounding error of the terms remains.
    """
    bank, criterion = golden_bank(precision), golden_criterion(kind, temperature)
    tolerance = 1e-12 if precision == "f64" else 1e-6
    path = f"{precision}/{kind}/{temperature}"
    for step in range(2):
        before = bank.memory.clone()
        result, patch_gradient, image_gradient = golden_step(criterion, precision, bank, step)
        values = {"loss": result.loss, "term_patches": result.patches, "term_images": result.images}
        for name, value in values.items():
            recorded = golden(f"{path}/{name}_{step}").item()
            rounding = 2 if precision == "f32" and recorded < 1 else 1
            assert value.item() == pytest.approx(recorded, rel=rounding * tolerance), name
        for view, value in (("patches", result.patches), ("images", result.images)):
            raw = golden(f"{precision}/embeddings_{view}_{step}").double().numpy()
            index = torch.cat([golden(f"ids_{step}")[:, None], golden(f"negatives_{view}_{step}")], 1).numpy()
            exact, _ = closed_form(
                kind, TEMPERATURES[temperature], before.double().numpy(), index, raw, criterion.z.item()
            )
            assert value.item() == pytest.approx(exact, rel=tolerance), view
        if kind == "nce":
            assert criterion.z.item() == pytest.approx(golden(f"{path}/z_{step}").item(), rel=tolerance)
        for view, gradient in (("patches", patch_gradient), ("images", image_gradient)):
            expected = golden(f"{path}/gradient_{view}_{step}").double()
            scale = expected.abs().max()
            if precision == "f32":
                raw = golden(f"f32/embeddings_{view}_{step}").double()
                row = before.double().abs().max()
                scale = 0.5 * row / (len(raw) * TEMPERATURES[temperature] * raw.norm(dim=1).min())
            assert (gradient.double() - expected).abs().max() < tolerance * scale, view
        ids = golden(f"ids_{step}")
        torch.testing.assert_close(
            bank.memory[ids], golden(f"{precision}/updated_rows_{step}"), rtol=tolerance, atol=tolerance * 0.1
        )
        others = torch.ones(len(before), dtype=torch.bool).index_fill(0, ids, False)
        assert torch.equal(bank.memory[others], before[others])


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("kind", KINDS)
def test_closed_form(kind: str, temperature: str) -> None:
    """The formulas, in NumPy: they and the recorded values must agree with each other too."""
    memory, path = golden("f64/memory").numpy(), f"f64/{kind}/{temperature}"
    for view in ("patches", "images"):
        raw = golden(f"f64/embeddings_{view}_0").numpy()
        index = torch.cat([golden("ids_0")[:, None], golden(f"negatives_{view}_0")], 1).numpy()
        z = golden(f"{path}/z_0").item() if kind == "nce" else 1.0
        value, unit = closed_form(kind, TEMPERATURES[temperature], memory, index, raw, z)
        assert value == pytest.approx(golden(f"{path}/term_{view}_0").item(), rel=1e-12)
        expected = golden(f"{path}/gradient_{view}_0").numpy()
        error = np.abs(0.5 * projected(unit, raw) - expected).max()
        assert error < 1e-12 * max(np.abs(expected).max(), 0.01 * np.abs(unit).max())


def example(kind: str, exclude: bool = False, seed: int = 0) -> tuple[LossConfig, Tensor, Tensor, Tensor, Tensor]:
    """Config, unit embeddings, memory, indices and Z in float64, with repeated negatives and positives among them."""
    generator = torch.Generator().manual_seed(seed)
    config = LossConfig(kind=kind, temperature=0.2, negatives=11, exclude_positive=exclude)  # type: ignore[arg-type]
    embeddings = F.normalize(torch.randn(5, 8, generator=generator, dtype=torch.float64))
    memory = F.normalize(torch.randn(13, 8, generator=generator, dtype=torch.float64))
    indices = torch.randint(13, (5, 12), generator=generator)
    indices[0, 3] = indices[0, 0]
    return config, embeddings, memory, indices, torch.tensor(40.0, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_contrast_term_is_the_plain_form_by_autograd(kind: str) -> None:
    config, embeddings, memory, indices, z = example(kind)
    weights = torch.tensor([0.1, 0.0, 2.0, -1.0, 0.5], dtype=torch.float64)
    plain, fast = embeddings.clone().requires_grad_(), embeddings.clone().requires_grad_()
    plain_losses = plain_term(config, scores(memory, indices, plain, config.temperature), len(memory), z)
    losses, similarity = ContrastTerm.apply(fast, memory, indices[:, 0], indices[:, 1:], config, z)
    torch.testing.assert_close(losses, plain_losses, rtol=1e-12, atol=0)
    (weights * plain_losses).sum().backward()
    (weights * losses).sum().backward()
    torch.testing.assert_close(fast.grad, plain.grad, rtol=1e-12, atol=1e-14)
    cosine = torch.einsum("bkd,bd->bk", memory[indices], embeddings)
    torch.testing.assert_close(similarity, torch.stack([cosine[:, 0], cosine[:, 1:].mean(1)], 1))


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str) -> None:
    config, embeddings, memory, indices, z = example(kind, seed=1)
    raw = (embeddings * torch.arange(1, 6, dtype=torch.float64)[:, None]).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: ContrastTerm.apply(F.normalize(x), memory, indices[:, 0], indices[:, 1:], config, z)[0],
        (raw,),
        rtol=1e-6,
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [1, 2, 5, 1000])
def test_chunks_change_nothing(kind: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config, embeddings, memory, indices, z = example(kind)

    def results() -> list[Tensor]:
        x = embeddings.clone().requires_grad_()
        losses, similarity = ContrastTerm.apply(x, memory, indices[:, 0], indices[:, 1:], config, z)
        losses.sum().backward()
        assert x.grad is not None
        return [losses.detach(), similarity, x.grad]

    whole = results()
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", columns * 8 * 8)
    for value, expected in zip(results(), whole):
        torch.testing.assert_close(value, expected, rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("count", [1, 128, 300])
def test_the_ways_of_a_gpu_give_the_same(count: int) -> None:
    """On this machine's processor, against the plain products and sums; 300 is no multiple of the parts."""
    generator = torch.Generator().manual_seed(count)
    embeddings, memory = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (3, 50))
    negatives = torch.randint(50, (3, count + 1), generator=generator)[:, 1:]  # a view, as after a concatenation
    weights = torch.randn(3, count, generator=generator, dtype=torch.float64)
    products = torch.einsum("bkd,bd->bk", memory[negatives], embeddings)
    torch.testing.assert_close(products_in_cache(memory, negatives, embeddings), products, rtol=0, atol=1e-13)
    torch.testing.assert_close(products_at_once(memory, negatives, embeddings), products, rtol=0, atol=1e-13)
    sums = torch.einsum("bkd,bk->bd", memory[negatives], weights)
    torch.testing.assert_close(weighted_sums(memory, negatives, weights), sums, rtol=0, atol=1e-12)
    torch.testing.assert_close(sums_in_parts(memory, negatives, weights), sums, rtol=0, atol=1e-12)


def test_scores_that_overflow_the_reference() -> None:
    """Below a temperature of 0.0113 exp(score) is infinite in float32, and the reference's loss no number; ours is."""
    config = LossConfig(kind="nce", negatives=2).model_copy(update={"temperature": 0.01})  # recipes have at least 0.02
    memory = torch.tensor([[1.0, 0], [-1, 0], [0.9, math.sqrt(0.19)]])
    x, z, indices = torch.tensor([[1.0, 0]]), torch.tensor(1e30), torch.tensor([[0, 1, 2]])
    assert plain_term(config, scores(memory, indices, x, 0.01), len(memory), z).isnan().all()
    losses, _ = ContrastTerm.apply(x, memory, indices[:, 0], indices[:, 1:], config, z)
    exact = plain_term(config, scores(memory.double(), indices, x.double(), 0.01), len(memory), z.double())
    assert losses.item() == pytest.approx(exact.item(), rel=1e-5)


def test_cross_entropy_of_a_sure_positive_keeps_its_digits() -> None:
    """A positive far above all negatives, and one far below, in float32: no overflow, and the gradient is exact."""
    config = LossConfig(kind="cross_entropy", temperature=0.01, negatives=2)
    memory = torch.tensor([[1.0, 0], [-1, 0], [0.9, math.sqrt(0.19)]])

    def evaluated(indices: list[int]) -> tuple[float, Tensor]:
        x = torch.tensor([[1.0, 0]], requires_grad=True)
        losses, _ = ContrastTerm.apply(
            x, memory, torch.tensor(indices[:1]), torch.tensor([indices[1:]]), config, torch.tensor(1.0)
        )
        losses.sum().backward()
        assert x.grad is not None
        return losses.item(), x.grad

    loss, _ = evaluated([1, 0, 0])  # scores -100, 100, 100
    assert loss == pytest.approx(200 + math.log(2), rel=1e-6)
    loss, gradient = evaluated([0, 2, 2])  # scores 100, 90, 90
    small = 2 * math.exp(-10)
    assert loss == pytest.approx(math.log1p(small), rel=1e-3)
    expected = (memory[2:] - memory[:1]) / 0.01 * small / (1 + small)
    torch.testing.assert_close(gradient, expected, rtol=2e-5, atol=0)


def test_no_gradient_reaches_the_bank() -> None:
    bank = golden_bank("f64")
    bank.memory.requires_grad_()
    golden_step_without_update(bank)
    assert bank.memory.grad is None


def golden_step_without_update(bank: MemoryBank, **changes: Any) -> tuple[StepLoss, Contrast]:
    config = LossConfig(**{"kind": "nce", "temperature": 0.1, "negatives": K, **changes})
    patches, images = (golden(f"f64/embeddings_{view}_0").clone().requires_grad_() for view in ("patches", "images"))
    ids = golden("ids_0")
    criterion = Contrast(config, World())
    weights = torch.full((len(ids),), 1 / len(ids), dtype=torch.float64)
    drawn = golden("negatives_patches_0"), golden("negatives_images_0")
    result = criterion(bank, Samples(ids, NO_SEEDS, weights, [len(ids)], drawn=drawn), patches, images)
    result.loss.backward()
    return result, criterion


def test_patch_weight_mixes_the_terms() -> None:
    results = {w: golden_step_without_update(golden_bank("f64"), patch_weight=w)[0] for w in (0.0, 0.3, 1.0)}
    patches, images = results[0.3].patches.item(), results[0.3].images.item()
    assert results[0.0].loss.item() == pytest.approx(images, rel=1e-14)
    assert results[1.0].loss.item() == pytest.approx(patches, rel=1e-14)
    assert results[0.3].loss.item() == pytest.approx(0.3 * patches + 0.7 * images, rel=1e-14)


def test_weights_of_samples() -> None:
    """A stand-in of weight 0 changes neither loss nor gradient, whatever it is."""
    config, _, memory, indices, _ = example("nce")
    bank = MemoryBank(13, 8, MemoryConfig())
    bank.memory = memory
    criterion = Contrast(config, World())
    criterion.z.fill_(40)

    def loss_and_gradient(stand_in: float) -> tuple[float, Tensor]:
        x = torch.linspace(-1, 1, 40, dtype=torch.float64).view(5, 8).clone()
        x[4] = stand_in
        x.requires_grad_()
        weights = torch.tensor([0.25, 0.25, 0.25, 0.25, 0], dtype=torch.float64)
        ids, negatives = indices[:, 0], indices[:, 1:]
        samples = Samples(ids, NO_SEEDS, weights, [len(ids)], drawn=(negatives, negatives))
        result = criterion(bank, samples, x, x)
        result.loss.backward()
        assert x.grad is not None
        return result.loss.item(), x.grad[:4]

    (first, first_gradient), (second, second_gradient) = loss_and_gradient(1), loss_and_gradient(-3)
    assert first == second
    assert torch.equal(first_gradient, second_gradient)


# ---- negatives


def test_negatives_depend_on_seed_epoch_image_and_view_alone() -> None:
    config = LossConfig(negatives=50)

    def drawn(ids: list[int], seed: int = 3, epoch: int = 2, view: int = 0) -> dict[int, list[int]]:
        seeds = negative_seeds(seed, epoch, np.array(ids), view)
        return dict(zip(ids, draw_negatives(config, 1000, torch.tensor(ids), seeds).tolist()))

    together = drawn([5, 6, 7, 8])
    assert drawn([8, 5]) == {8: together[8], 5: together[5]}  # whatever the batch
    torch.manual_seed(99)
    assert drawn([6])[6] == together[6]  # whatever the global generator
    for other in (drawn([5], seed=4), drawn([5], epoch=3), drawn([5], view=1), {5: together[6]}):
        assert other[5] != together[5]
    assert len({len(set(row)) for row in together.values()} - {50}) > 0  # with replacement: some row repeats one


def test_splitmix64_gives_the_published_words() -> None:
    """Of seed 1234567, as listed for the generator's reference implementation (Vigna, splitmix64.c)."""
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    words = splitmix64(torch.tensor([0, 1234567]), 5)
    assert [word % 2**64 for word in words[1].tolist()] == expected
    assert torch.equal(splitmix64(torch.tensor([1234567]), 3)[0], words[1, :3])  # whatever comes after


def test_negatives_by_an_independent_generator() -> None:
    """A run's draws must never change between versions: two for each word, its low half first."""

    def word(seed: int, k: int) -> int:
        z = (seed + (k + 1) * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    rows, seeds = 1_281_167, [0, 2**53 - 1, 987654321]
    expected = [[(word(seed, k // 2) >> 32 * (k % 2) & 0xFFFFFFFF) * rows >> 32 for k in range(7)] for seed in seeds]
    ids = torch.arange(3)
    assert draw_negatives(LossConfig(negatives=7), rows, ids, torch.tensor(seeds)).tolist() == expected


def test_negatives_are_uniform() -> None:
    """Chi-square over all rows, and its count of the own row: 1/N of the draws, as of any other row."""
    images, draws = 50, 2000
    config = LossConfig(negatives=draws)
    ids = torch.arange(images)
    drawn = draw_negatives(config, images, ids, negative_seeds(0, 0, ids.numpy(), 0))
    assert drawn.min() == 0
    assert drawn.max() == images - 1
    counts = torch.bincount(drawn.flatten(), minlength=images).double()
    chi2 = ((counts - draws) ** 2 / draws).sum().item()  # images * draws / images are expected of each
    assert abs(chi2 - (images - 1)) < 5 * math.sqrt(2 * (images - 1))
    own = (drawn == ids[:, None]).sum().item()
    assert abs(own - draws) < 5 * math.sqrt(draws)
    first, second = drawn[:, ::2].flatten().double(), drawn[:, 1::2].flatten().double()
    correlation = torch.corrcoef(torch.stack([first, second]))[0, 1].item()
    assert abs(correlation) < 5 / math.sqrt(len(first))


def test_exclude_positive_never_draws_the_own_row() -> None:
    images = 7
    config = LossConfig(negatives=500, exclude_positive=True)
    ids = torch.arange(images)
    drawn = draw_negatives(config, images, ids, negative_seeds(1, 1, ids.numpy(), 1))
    assert not (drawn == ids[:, None]).any()
    for row in range(images):
        counts = torch.bincount(drawn[row], minlength=images)
        assert counts[row] == 0
        others = counts[torch.arange(images) != row].double()
        assert (abs(others - 500 / 6) < 6 * math.sqrt(500 / 6)).all()  # and the others evenly, first and last too


# ---- the bank


@pytest.mark.parametrize("dim", [8, 7])
def test_the_checksum_of_a_bank_is_of_its_bits(dim: int) -> None:
    """It changes with the last bit of one value, and does not depend on the order in which threads sum."""
    bank = MemoryBank(100_001, dim, MemoryConfig())
    before = bank.checksum()
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    assert bank.checksum() == before
    torch.set_num_threads(threads)
    value = bank.memory[500, dim - 1]
    value.copy_(torch.nextafter(value, torch.tensor(2.0)))
    assert bank.checksum() != before


def test_bank_starts_with_unit_rows_in_random_directions() -> None:
    bank = MemoryBank(2000, 128, MemoryConfig(), seed=3)
    torch.testing.assert_close(bank.memory.norm(dim=1), torch.ones(2000))
    assert bank.memory.dtype == torch.float32
    assert bank.memory.mean(0).norm() < 5 / math.sqrt(2000)
    assert torch.equal(bank.memory, MemoryBank(2000, 128, MemoryConfig(), seed=3, ranks=4).memory)
    assert not torch.equal(bank.memory, MemoryBank(2000, 128, MemoryConfig(), seed=4).memory)
    # uniform before it was normalised, not normal: a row's largest value is bounded by sqrt(3/D) up to its norm
    assert bank.memory.abs().max() < 1.35 * math.sqrt(3 / 128)


def test_rank_mean_starts_with_the_norm_of_a_mean_of_ranks() -> None:
    """The mean of 32 independent unit rows has norm 1/sqrt(32) = 0.177."""
    bank = MemoryBank(500, 128, MemoryConfig(init="rank_mean"), seed=0, ranks=32)
    assert bank.memory.norm(dim=1).mean().item() == pytest.approx(32**-0.5, rel=0.02)


def test_update_by_hand() -> None:
    bank = MemoryBank(3, 2, MemoryConfig(momentum=0.25))
    bank.memory = torch.tensor([[1.0, 0], [0, 1], [1, 0]])
    bank.update(torch.tensor([2, 0]), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    norm = math.hypot(0.25, 0.75)
    torch.testing.assert_close(bank.memory, torch.tensor([[1, 0], [0, 1], [0.25 / norm, 0.75 / norm]]))


def test_an_id_that_comes_twice_keeps_its_last_update() -> None:
    for count in (2, 50, 5000):
        bank = MemoryBank(4, 8, MemoryConfig(momentum=0.5), seed=1)
        start = bank.memory.clone()
        embeddings = F.normalize(torch.randn(count, 8, generator=torch.Generator().manual_seed(count)))
        bank.update(torch.full((count,), 3), embeddings)
        torch.testing.assert_close(bank.memory[3], F.normalize(0.5 * start[3] + 0.5 * embeddings[-1], dim=0))
        assert torch.equal(bank.memory[:3], start[:3])


# ---- Z, and what a step sees


def test_z_is_n_times_the_mean_over_first_scores_of_the_patches() -> None:
    bank = golden_bank("f64")
    _, criterion = golden_step_without_update(bank, temperature=0.2)
    index = torch.cat([golden("ids_0")[:, None], golden("negatives_patches_0")], 1)
    unit = F.normalize(golden("f64/embeddings_patches_0"))
    s = (golden("f64/memory")[index] * unit[:, None, :]).sum(2) / 0.2
    assert criterion.z.item() == pytest.approx(80 * s.exp().mean().item(), rel=1e-13)


def test_z_is_estimated_once_and_survives_a_checkpoint() -> None:
    bank, criterion = golden_bank("f64"), golden_criterion("nce", "0p07")
    assert criterion.z.item() < 0
    golden_step(criterion, "f64", bank, 0)
    z = criterion.z.clone()
    golden_step(criterion, "f64", bank, 1)
    assert torch.equal(criterion.z, z)
    resumed = golden_criterion("nce", "0p07")
    resumed.load_state_dict(criterion.state_dict())
    golden_step(resumed, "f64", bank, 0)
    assert torch.equal(resumed.z, z)


def test_cross_entropy_leaves_z_alone() -> None:
    criterion = golden_criterion("cross_entropy", "0p07")
    golden_step(criterion, "f64", golden_bank("f64"), 0)
    assert criterion.z.item() == -1


def test_both_terms_see_the_bank_as_it_was_before_the_step() -> None:
    """The same views, negatives and ids in both terms must give the same losses, although the bank is updated."""
    bank = golden_bank("f64")
    before = bank.memory.clone()
    x, ids, negatives = golden("f64/embeddings_images_0"), golden("ids_0"), golden("negatives_images_0")
    weights = torch.full((6,), 1 / 6, dtype=torch.float64)
    criterion = Contrast(LossConfig(negatives=K, temperature=0.1), World())
    result = criterion(bank, Samples(ids, NO_SEEDS, weights, [6], drawn=(negatives, negatives)), x, x)
    assert result.patches.item() == result.images.item()
    assert torch.equal(bank.memory, before)  # moved by `update` alone, after both
    bank.update(result.rows, result.embeddings)
    assert not torch.equal(bank.memory[ids], before[ids])


# ---- two ranks


def one_step(world: World, kind: str, counts: list[int] | None) -> tuple[float, Tensor, Tensor, float, tuple[int, ...]]:
    """A step on this rank's part of the recorded batch: global loss, bank, gradient of all, Z."""
    bank = golden_bank("f64")
    ids, x, y = golden("ids_0"), golden("f64/embeddings_patches_0"), golden("f64/embeddings_images_0")
    counts = counts or [len(ids)]
    mine = range(sum(counts[: world.rank]), sum(counts[: world.rank + 1]))
    part = list(mine) or [0]  # a rank without samples computes on one that counts for nothing
    weight = world.size / len(ids) if len(mine) else 0.0
    patches, images = x[part].clone().requires_grad_(), y[part].clone().requires_grad_()
    criterion = golden_criterion(kind, "0p07", world)
    drawn = golden("negatives_patches_0")[part], golden("negatives_images_0")[part]
    weights = torch.full((len(part),), weight, dtype=torch.float64)
    result = criterion(bank, Samples(ids[part], NO_SEEDS, weights, counts, drawn=drawn), patches, images)
    result.loss.backward()
    bank.update(result.rows, result.embeddings)
    loss = world.sum(result.loss.detach().clone()).item() / world.size
    assert images.grad is not None
    gradient = world.all_gather(images.grad[: len(mine)], counts) / world.size  # as DDP averages over ranks
    return loss, bank.memory, gradient, criterion.z.item(), tuple(result.rows.tolist())


@pytest.mark.parametrize(
    ("kind", "counts"), [("nce", [3, 3]), ("nce", [4, 2]), ("cross_entropy", [4, 2]), ("cross_entropy", [6, 0])]
)
def test_two_ranks_are_one(kind: str, counts: list[int], tmp_path: Path) -> None:
    """Loss, gradient, bank and Z of the recorded global batch, dealt to two real ranks, are those of the reference.

    On embeddings, not on a whole model: batch norm sees each rank's own samples, in the reference as here, so whole
    models differ between world sizes by design. The first batch of a run, which Z comes from, leaves no rank without.
    """
    results = ranks.run(one_step, 2, tmp_path, kind, counts)
    path = f"f64/{kind}/0p07"
    for loss, memory, gradient, z, rows in results:
        assert loss == pytest.approx(golden(f"{path}/loss_0").item(), rel=1e-12)
        expected = golden(f"{path}/gradient_images_0")
        assert (gradient - expected).abs().max() < 1e-12 * expected.abs().max()
        assert rows == tuple(golden("ids_0").tolist())
        torch.testing.assert_close(memory[golden("ids_0")], golden("f64/updated_rows_0"), rtol=1e-12, atol=1e-13)
        if kind == "nce":
            assert z == pytest.approx(golden(f"{path}/z_0").item(), rel=1e-12)
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(results[0][1], one_step(World(), kind, None)[1])
