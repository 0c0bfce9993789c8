"""Noise contrastive losses of two views against the memory bank (paper, section 3.1; constants as in the reference).

For the unit embedding e_b of a view, its image's row m_b0 and K drawn rows m_bk, the score is s_bk = <m_bk, e_b> / T.

nce            -mean_b [ ln h(b, 0) + sum_k ln (1 - h(b, k)) ],   h(b, k) = p_bk / (p_bk + K/N),  p_bk = exp(s_bk) / Z
cross_entropy   mean_b [ ln sum_{k=0..K} exp(s_bk) - s_b0 ]

Z is estimated once, as N times the mean of exp(s) over the first scores of the patches, and kept (Wu et al., 2018).
Gradients flow into the embeddings only. The loss of a step is lambda * patches + (1 - lambda) * images, and both terms
see the bank as it was before the step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import LossConfig
from .distributed import World
from .memory import MemoryBank

EPSILON = 1.1920929e-07  # float32's, as the reference adds it, in either precision
CHUNK_BYTES = 4 << 20  # of gathered rows at a time: they stay in the cache between the scores and the gradient


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

    A draw is a function of (run, epoch, image, view) alone, whatever ranks and batches it meets. Seeds are on the CPU.
    """
    generator = torch.Generator()
    high = rows - 1 if config.exclude_positive else rows
    drawn = torch.empty((len(ids), config.negatives), dtype=torch.int64)
    for sample, seed in enumerate(seeds.tolist()):
        generator.manual_seed(seed)
        torch.randint(high, (config.negatives,), generator=generator, out=drawn[sample])
    if config.exclude_positive:
        drawn += drawn >= ids.cpu()[:, None]
    return drawn.to(ids.device)


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
    """The sum over a batch of one view's losses, with the gradient found in the same pass over the rows.

    The rows of the bank are gathered a few samples at a time, used for the scores and for the gradient, and dropped:
    nothing of size (B, K, D) outlives a chunk. The numbers are those of `plain_term`.
    """

    @staticmethod
    def forward(
        ctx: Any, embeddings: Tensor, memory: Tensor, indices: Tensor, config: LossConfig, z: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(B, D) unit embeddings -> the (B,) losses and the (B, 2) mean scores of positive and negatives."""
        embeddings = embeddings.detach()
        losses = embeddings.new_empty(len(embeddings))
        similarity = embeddings.new_empty(len(embeddings), 2)
        gradient = torch.empty_like(embeddings)
        columns = indices.shape[1]
        samples = max(1, CHUNK_BYTES // (columns * memory.shape[1] * memory.element_size()))
        for start in range(0, len(embeddings), samples):
            part = slice(start, start + samples)
            rows = memory.index_select(0, indices[part].reshape(-1)).view(-1, columns, memory.shape[1])
            score = torch.bmm(rows, embeddings[part, :, None]).squeeze(2).div_(config.temperature)
            similarity[part, 0] = score[:, 0]
            similarity[part, 1] = score[:, 1:].mean(1)
            if config.kind == "cross_entropy":
                score -= score[:, :1].clone()  # a sure positive has a small loss: keep its digits
                total = torch.logsumexp(score, dim=1)
                losses[part] = total
                slope = torch.exp(score - total[:, None])
                slope[:, 0] = -slope[:, 1:].sum(1)
            else:
                noise = (columns - 1) / len(memory)
                p = torch.exp(score).div_(z)
                mass = p + (noise + EPSILON)
                slope = p / mass
                losses[part] = -torch.log(noise / mass[:, 1:]).sum(1) - torch.log(slope[:, 0])
                slope[:, 0] -= 1
            gradient[part] = torch.bmm(slope[:, None, :], rows).squeeze(1).div_(config.temperature)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(similarity)
        return losses, similarity.mul_(config.temperature)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return grads[0][:, None] * gradient, None, None, None, None


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
    patch_rows = torch.cat([ids[:, None], patch_negatives], dim=1)
    image_rows = torch.cat([ids[:, None], image_negatives], dim=1)
    if config.kind == "nce":
        estimate_z(config, bank, world, patch_rows, patches.detach())
    z = bank.z.to(bank.memory.dtype)
    patch_losses, _ = ContrastTerm.apply(patches, bank.memory, patch_rows, config, z)
    image_losses, similarity = ContrastTerm.apply(images, bank.memory, image_rows, config, z)
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
