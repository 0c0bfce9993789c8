"""Noise contrastive losses of two views against the memory bank (paper, section 3.1; constants as in the reference).

For the unit embedding e_b of a view, its image's row m_b0 and K drawn rows m_bk, the score is s_bk = <m_bk, e_b> / T.

nce            -mean_b [ ln h(b, 0) + sum_k ln (1 - h(b, k)) ],   h(b, k) = p_bk / (p_bk + K/N),  p_bk = exp(s_bk) / Z
cross_entropy   mean_b [ ln sum_{k=0..K} exp(s_bk) - s_b0 ]

Z is estimated once, as N times the mean of exp(s) over the first scores of the patches, and kept (Wu et al., 2018).
Gradients flow into the embeddings only. The loss of a step is lambda * patches + (1 - lambda) * images, and both terms
see the bank as it was before the step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import LossConfig
from .memory import MemoryBank
from .world import World

EPSILON = 1.1920929e-07  # float32's, as the reference adds it, in either precision
CHUNK_BYTES = 2 << 20  # of gathered rows at a time: they are still in the cache when their scores are taken
PART = 128  # rows that a GPU adds up one after the other


@dataclass
class StepLoss:
    """`loss` is a scalar with a gradient; the others are detached scalars for the log."""

    loss: Tensor
    patches: Tensor
    images: Tensor
    positive: Tensor
    """Mean cosine similarity of the image view to its own row."""
    negative: Tensor
    """Mean cosine similarity of the image view to the drawn rows."""


def draw_negatives(config: LossConfig, rows: int, ids: Tensor, seeds: Tensor) -> Tensor:
    """(B, K) int64 rows to contrast with, uniform with replacement, each sample from its own seed.

    A draw is a function of (run, epoch, image, view) alone, whatever ranks, batches and devices it meets. Every 64-bit
    word of a sample's sequence gives two draws, its low half first: r -> floor(r * rows / 2^32), so that a row's
    probability is 1/rows to within rows/2^32 of it. `seeds` (B,) int64 may be on the CPU: nothing waits for a device.
    """
    high = rows - 1 if config.exclude_positive else rows
    words = splitmix64(seeds.to(ids.device, non_blocking=True), -(-config.negatives // 2))
    halves = torch.stack([words & 0xFFFFFFFF, (words >> 32) & 0xFFFFFFFF], dim=2).flatten(1)
    drawn = halves.mul_(high).bitwise_right_shift_(32)[:, : config.negatives]
    if config.exclude_positive:
        drawn += drawn >= ids[:, None]
    return drawn


def splitmix64(seeds: Tensor, n: int) -> Tensor:
    """The first `n` words of the generator SplitMix64 from each seed: (B, n) int64, the bits of unsigned numbers.

    Word k is a mix of seed + k * constant, so that all come at once: Steele et al., "Fast splittable pseudorandom
    number generators", OOPSLA 2014. Integers wrap around.
    """
    words = torch.arange(1, n + 1, device=seeds.device) * (0x9E3779B97F4A7C15 - (1 << 64)) + seeds[:, None]
    words ^= (words >> 30) & ((1 << 34) - 1)  # the masks take the sign's copies away
    words *= 0xBF58476D1CE4E5B9 - (1 << 64)
    words ^= (words >> 27) & ((1 << 37) - 1)
    words *= 0x94D049BB133111EB - (1 << 64)
    words ^= (words >> 31) & ((1 << 33) - 1)
    return words


def scores(memory: Tensor, indices: Tensor, embeddings: Tensor, temperature: float) -> Tensor:
    """(B, K+1) scores of unit `embeddings` (B, D) against the rows `indices` (B, K+1): the plain form, for reading."""
    return torch.einsum("bkd,bd->bk", memory[indices], embeddings) / temperature


def plain_term(config: LossConfig, scores: Tensor, rows: int, z: Tensor) -> Tensor:
    """(B,) losses of (B, K+1) scores, column 0 the positive: the module's formulas, left to autograd."""
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
        """(B, D) unit embeddings, own rows (B,), drawn rows (B, K) -> the (B,) losses, and the (B, 2) mean scores of
        positive and negatives times T, which are cosines."""
        embeddings, own, temperature = embeddings.detach(), memory[ids], config.temperature
        positive = (own * embeddings).sum(1).div_(temperature)
        products = products_at_once if memory.is_cuda else products_in_cache
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
        gradient = (sums_in_parts if memory.is_cuda else weighted_sums)(memory, negatives, slopes)
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
    """The same in one kernel, for a GPU: they are the slopes of a weighted sum of rows by its weights."""
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
    """The same for a GPU, which adds up a bag one row after the other: many small bags keep it busy."""
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


def softplus(x: Tensor) -> Tensor:
    """ln(1 + exp(x)), exact in float64 too."""
    return F.softplus(x, threshold=40)


def contrast(
    config: LossConfig,
    bank: MemoryBank,
    world: World,
    ids: Tensor,
    patch_embeddings: Tensor,
    image_embeddings: Tensor,
    patch_negatives: Tensor,
    image_negatives: Tensor,
    weights: Tensor,
) -> tuple[StepLoss, Tensor]:
    """The loss of this rank's samples, and their (B, D) unit image embeddings for the bank's update.

    `ids` (B,) int64 rows of the bank; embeddings (B, D) as the heads give them; negatives (B, K) int64; `weights` (B,)
    are each sample's share, so that the mean over ranks of the losses is the mean over the global batch.
    """
    patches = F.normalize(patch_embeddings.to(bank.memory.dtype))
    images = F.normalize(image_embeddings.to(bank.memory.dtype))
    if config.kind == "nce":
        estimate_z(config, bank, world, torch.cat([ids[:, None], patch_negatives], dim=1), patches.detach())
    z = bank.z.to(bank.memory.dtype)
    patch_losses, _ = ContrastTerm.apply(patches, bank.memory, ids, patch_negatives, config, z)
    image_losses, similarity = ContrastTerm.apply(images, bank.memory, ids, image_negatives, config, z)
    patch_term = (weights * patch_losses).sum()
    image_term = (weights * image_losses).sum()
    loss = config.patch_weight * patch_term + (1 - config.patch_weight) * image_term
    with torch.no_grad():
        positive, negative = (weights[:, None] * similarity).sum(0)
    return StepLoss(loss, patch_term.detach(), image_term.detach(), positive, negative), images.detach()


@torch.no_grad()
def estimate_z(config: LossConfig, bank: MemoryBank, world: World, indices: Tensor, embeddings: Tensor) -> None:
    """Set the bank's Z from the first scores of the patches, over all ranks; keep a Z that is already there.

    Reads a value back from the device: callers do it at the first step of a run and no more (`bank.z_is_set`).
    """
    if bank.z_is_set:
        return
    if bank.z.item() < 0:
        count = torch.tensor(indices.numel(), dtype=bank.z.dtype, device=bank.z.device)
        total = torch.zeros_like(count)
        for index, embedding in zip(indices, embeddings):
            total += torch.exp(scores(bank.memory, index[None], embedding[None], config.temperature)).sum()
        total, count = world.sum(torch.stack([total, count]))
        bank.z.copy_(len(bank.memory) * total / count)
    bank.z_is_set = True
