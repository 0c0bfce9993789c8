"""Noise contrastive losses of two views against the memory bank (paper, section 3.1; constants as in the reference).

For the unit embedding e_b of a view, its image's row m_b0 and K other rows m_bk, the score is s_bk = <m_bk, e_b> / T.

nce            -mean_b [ ln h(b, 0) + sum_k ln (1 - h(b, k)) ],   h(b, k) = p_bk / (p_bk + K/N),  p_bk = exp(s_bk) / Z
cross_entropy   mean_b [ ln sum_{k=0..K} exp(s_bk) - s_b0 ]

The K rows are drawn for each image, or one sample for all, or all rows: `pirl.negatives`. With all rows, an image's own
row is scored once, as the positive, and K = N - 1.

Z is estimated once, as N times the mean of exp(s) over the first scores of the patches, and kept (Wu et al., 2018).
Gradients flow into the embeddings only. The loss of a step is lambda * patches + (1 - lambda) * images, and both terms
see the bank as it was before the step.

Both losses are sums over rows, so a bank that is cut gives the same: `pirl.rowsums`. Rows drawn from a whole bank keep
a form of their own, `ContrastTerm`, and so the bits of every earlier training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import LossConfig
from .memory import MemoryBank, Queries, gather_updates
from .negatives import draw_negatives
from .rowsums import Terms, softplus
from .terms import EPSILON, Negatives, finish, packed_sums, total_of_exponentials
from .world import World

CHUNK_BYTES = 2 << 20  # of gathered rows at a time: they are still in the cache when their scores are taken
PART = 128  # rows that a GPU adds up one after the other


@dataclass
class StepLoss:
    """`loss` is a scalar with a gradient; the others are detached scalars for the log."""

    loss: Tensor
    patches: Tensor
    """Term of the second views: the patches of the paper's jigsaw."""
    images: Tensor
    positive: Tensor
    """Mean cosine similarity of the image view to its own row."""
    negative: Tensor
    """Mean cosine similarity of the image view to the negatives."""
    rows: Tensor
    """Rows of the bank that this step updates, of all ranks in rank order."""
    embeddings: Tensor
    """Unit image embeddings of these rows."""


@dataclass(frozen=True)
class Samples:
    """A rank's samples of one global batch: which rows are theirs, and where their negatives come from."""

    rows: Tensor
    """(B,) int64 rows of the bank."""
    seeds: Tensor
    """(2, B) int64 seeds of the patches' and the images' negatives."""
    weights: Tensor
    """(B,) shares, so that the mean over ranks of the losses is the mean over the global batch."""
    counts: list[int]
    """Samples of every rank that count; a rank without any has a stand-in of weight 0."""
    step_seed: int = 0
    """Seed of a sample of negatives for the whole step, the same on all ranks."""
    drawn: tuple[Tensor, Tensor] | None = None
    """(B, K) rows for the patches and for the images, instead of those of the seeds; for a whole bank."""


def scores(memory: Tensor, indices: Tensor, embeddings: Tensor, temperature: float) -> Tensor:
    """Return (B, K+1) scores of unit `embeddings` (B, D) against the rows `indices` (B, K+1): the plain form."""
    return torch.einsum("bkd,bd->bk", memory[indices], embeddings) / temperature


def plain_term(config: LossConfig, scores: Tensor, rows: int, z: Tensor) -> Tensor:
    """Return (B,) losses of (B, K+1) scores, column 0 the positive: the module's formulas, left to autograd."""
    if config.kind == "cross_entropy":
        return torch.logsumexp(scores, dim=1) - scores[:, 0]
    p = torch.exp(scores) / z
    noise = (scores.shape[1] - 1) / rows
    positive = torch.log(p[:, 0] / (p[:, 0] + noise + EPSILON))
    negatives = torch.log(noise / (p[:, 1:] + noise + EPSILON)).sum(1)
    return -(positive + negatives)


class ContrastTerm(torch.autograd.Function):
    """The losses of a batch by one view, with their gradients found at once.

    Rows of the bank are read twice, for the scores and for the gradient, and never held: nothing of size (B, K, D)
    exists. The numbers are those of `plain_term`.
    """

    @staticmethod
    def forward(
        ctx: Any, embeddings: Tensor, memory: Tensor, ids: Tensor, negatives: Tensor, config: LossConfig, z: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the (B,) losses and the (B, 2) mean scores of positive and negatives times T, which are cosines.

        Takes (B, D) unit embeddings, own rows (B,) and drawn rows (B, K).
        """
        embeddings, own, temperature = embeddings.detach(), memory[ids], config.temperature
        positive = (own * embeddings).sum(1).div_(temperature)
        products = products_at_once if memory.device.type != "cpu" else products_in_cache
        negative = products(memory, negatives, embeddings).div_(temperature)
        similarity = torch.stack([positive, negative.mean(1)], dim=1).mul_(temperature)
        if config.kind == "cross_entropy":
            negative -= positive[:, None]
            losses = torch.logsumexp(negative, dim=1)
            losses = torch.logaddexp(losses, torch.zeros_like(losses))  # keeps the digits of a sure positive
            slopes = negative.sub_(losses[:, None]).exp_()
            own_slope = -slopes.sum(1)
        else:
            noise = negatives.shape[1] / len(memory)
            shift = torch.log(z * (noise + EPSILON))  # p / (p + c) = sigmoid(ln p - ln c)
            positive -= shift
            negative -= shift
            constant = negatives.shape[1] * math.log1p(EPSILON / noise)
            losses = softplus(negative).sum(1) + softplus(-positive) + constant
            slopes = negative.sigmoid_()
            own_slope = -torch.sigmoid(-positive)
        gradient = (sums_in_parts if memory.device.type != "cpu" else weighted_sums)(memory, negatives, slopes)
        gradient.addcmul_(own, own_slope[:, None]).div_(temperature)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(similarity)
        return losses, similarity

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return grads[0][:, None] * gradient, None, None, None, None, None


def products_in_cache(memory: Tensor, negatives: Tensor, embeddings: Tensor) -> Tensor:
    """(B, K) products of the rows `negatives` (B, K) and the embeddings (B, D), a few thousand rows at a time."""
    products = embeddings.new_empty(negatives.shape)
    columns = max(1, CHUNK_BYTES // (memory.shape[1] * memory.element_size()))
    for sample, embedding in enumerate(embeddings):
        for chosen, out in zip(negatives[sample].split(columns), products[sample].split(columns)):
            # bags of one row: a gather that fetches ahead, faster than index_select
            torch.mv(F.embedding_bag(chosen[:, None], memory, mode="sum"), embedding, out=out)
    return products


def products_at_once(memory: Tensor, negatives: Tensor, embeddings: Tensor) -> Tensor:
    """Return the same in one kernel, for a GPU: they are the slopes of a weighted sum of rows by its weights."""
    batch, count = negatives.shape
    bags = torch.arange(batch, device=negatives.device)
    bag_of_each = bags[:, None].expand(batch, count).reshape(-1)
    products = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        embeddings, memory, negatives.contiguous().view(-1), bags * count, bag_of_each, 0
    )
    return products.view(batch, count)


def weighted_sums(memory: Tensor, negatives: Tensor, weights: Tensor) -> Tensor:
    """(B, D) sums of the rows `negatives` (B, K) times `weights` (B, K)."""
    return F.embedding_bag(negatives, memory, mode="sum", per_sample_weights=weights)


def sums_in_parts(memory: Tensor, negatives: Tensor, weights: Tensor) -> Tensor:
    """Return the same for a GPU, which adds up a bag one row after the other: many small bags keep it busy."""
    batch, count = negatives.shape
    samples, parts = (
        torch.arange(0, end, step, device=negatives.device) for end, step in ((batch * count, count), (count, PART))
    )
    sums = F.embedding_bag(
        negatives.contiguous().view(-1),
        memory,
        (samples[:, None] + parts).view(-1),
        mode="sum",
        per_sample_weights=weights.contiguous().view(-1),
    )
    return sums.view(batch, len(parts), -1).sum(1)


class SummedTerms(torch.autograd.Function):
    """The losses of a batch by both views as sums over the ranks' rows, with their gradients found at once."""

    @staticmethod
    def forward(
        ctx: Any, units: Tensor, criterion: Contrast, bank: MemoryBank, samples: Samples
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the (2, B) losses of (2, B, D) unit embeddings, mean cosines, and the updates of the bank.

        The (2, B, 2) cosines are to the own row and to the negatives; the updates are rows and embeddings of all ranks.
        """
        world, counts = criterion.world, samples.counts
        own = counts[world.rank]
        units, rows = units.detach(), samples.rows
        negatives = Negatives.of_step(criterion.config, bank.images, samples.step_seed)
        local = Queries(rows[:own], units[:, :own], samples.seeds[:, :own].to(rows.device, non_blocking=True))
        queries = bank.gather(world, local, counts)
        criterion.estimate_z_by_rows(bank, negatives, queries, sum(counts))
        terms = criterion.terms(negatives, units.dtype)
        packed = bank.collect(world, packed_sums(bank, negatives, terms, queries), counts)
        results = finish(packed, negatives, terms, local.rows)
        losses, gradient, cosines = (
            torch.cat([each, each.new_zeros(2, len(rows) - own, *each.shape[2:])], dim=1) for each in results
        )
        if bank.cut:
            everyone = queries.rows, queries.units[1]
        else:
            everyone = gather_updates(world, local.rows, local.units[1], counts)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(cosines, *everyone)
        return losses, cosines, *everyone

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return grads[0][..., None] * gradient, None, None, None


class Contrast(nn.Module):
    """The loss of a step against a bank, whole or cut; owner of `z`, the NCE's constant (negative until estimated)."""

    z: Tensor

    def __init__(self, config: LossConfig, world: World) -> None:
        super().__init__()
        self.config, self.world = config, world
        self.z_is_set = False
        self.register_buffer("z", torch.tensor(-1.0, dtype=torch.float64, device=world.device))

    def forward(self, bank: MemoryBank, samples: Samples, patches: Tensor, images: Tensor) -> StepLoss:
        """Return the loss of this rank's samples, and what the bank is to be updated with.

        `patches` and `images` (B, D) are embeddings as the heads give them.
        """
        config = self.config
        patches = F.normalize(patches.to(bank.dtype))
        images = F.normalize(images.to(bank.dtype))
        if bank.cut or not config.draws_per_image or bank.memory.dtype != bank.dtype:
            losses, similarities, rows, embeddings = SummedTerms.apply(
                torch.stack([patches, images]), self, bank, samples
            )
            (patch_losses, image_losses), similarity = losses, similarities[1]
        else:
            drawn = samples.drawn or self._draw(bank, samples)
            self.estimate_z(bank, torch.cat([samples.rows[:, None], drawn[0]], dim=1), patches.detach())
            z = self.z.to(bank.dtype)
            patch_losses, _ = ContrastTerm.apply(patches, bank.memory, samples.rows, drawn[0], config, z)
            image_losses, similarity = ContrastTerm.apply(images, bank.memory, samples.rows, drawn[1], config, z)
            rows, embeddings = self._gather(samples, images.detach())
        weights = samples.weights
        patch_term = (weights * patch_losses).sum()
        image_term = (weights * image_losses).sum()
        loss = config.patch_weight * patch_term + (1 - config.patch_weight) * image_term
        with torch.no_grad():
            positive, negative = (weights[:, None] * similarity).sum(0)
        return StepLoss(loss, patch_term.detach(), image_term.detach(), positive, negative, rows, embeddings)

    def _draw(self, bank: MemoryBank, samples: Samples) -> tuple[Tensor, Tensor]:
        patches, images = (draw_negatives(self.config, bank.images, samples.rows, seeds) for seeds in samples.seeds)
        return patches, images

    def _gather(self, samples: Samples, images: Tensor) -> tuple[Tensor, Tensor]:
        own = samples.counts[self.world.rank]
        return gather_updates(self.world, samples.rows[:own], images[:own], samples.counts)

    @torch.no_grad()
    def estimate_z(self, bank: MemoryBank, indices: Tensor, embeddings: Tensor) -> None:
        """Set Z from the first scores of the patches, over all ranks; keep a Z that is already set.

        Reads a value back from the device, at the first step of a process and no more.
        """
        if not self._needs_z():
            return
        count = torch.tensor(indices.numel(), dtype=self.z.dtype, device=self.z.device)
        total = torch.zeros_like(count)
        for index, embedding in zip(indices, embeddings):
            total += torch.exp(scores(bank.memory, index[None], embedding[None], self.config.temperature)).sum()
        total, count = self.world.sum(torch.stack([total, count]))
        self.z.copy_(bank.images * total / count)

    @torch.no_grad()
    def estimate_z_by_rows(self, bank: MemoryBank, negatives: Negatives, queries: Queries, samples: int) -> None:
        """Do the same from the rows of each rank, for the `samples` of the global batch."""
        if not self._needs_z():
            return
        total = self.world.sum(total_of_exponentials(bank, negatives, queries))
        each = negatives.sample.count if negatives.sample else negatives.count + 1
        self.z.copy_(bank.images * total / (samples * each))

    def terms(self, negatives: Negatives, dtype: torch.dtype) -> Terms:
        """Return what the scores of this step's negatives become."""
        if self.config.kind == "cross_entropy":
            return Terms(self.config.temperature, None)
        noise = negatives.count / negatives.images
        return Terms(self.config.temperature, torch.log(self.z.to(dtype) * (noise + EPSILON)))

    def _needs_z(self) -> bool:
        is_set = self.z_is_set or self.config.kind != "nce"
        self.z_is_set = True
        return not is_set and self.z.item() < 0
