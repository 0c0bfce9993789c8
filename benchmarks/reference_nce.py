"""Loss of the reference, written from its description: the slow side of a comparison.

For each view it draws (B, K+1) rows by the alias method, gathers them, multiplies, and leaves the gradient to autograd,
which holds both gathered (B, K+1, D) tensors until the backward pass. Constants and formulas are those of `pirl.loss`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1.1920929e-07


class ReferenceNCE:
    """Bank `memory` (N, D) float32, changed in place, and one step of the loss with it."""

    def __init__(self, memory: Tensor, negatives: int, temperature: float, momentum: float, z: float) -> None:
        self.memory = memory
        device = memory.device
        self.params = torch.tensor([negatives, temperature, z, momentum], device=device)
        # alias tables of equal weights: every cell has its own index
        self.probability = torch.ones(len(memory), device=device)
        self.alias = torch.zeros(len(memory), dtype=torch.int64, device=device)

    def draw(self, count: int) -> Tensor:
        cell = torch.zeros(count, dtype=torch.int64, device=self.memory.device).random_(0, len(self.alias))
        keep = torch.bernoulli(self.probability.index_select(0, cell)).long()
        return cell.mul(keep) + self.alias.index_select(0, cell).mul(1 - keep)

    def probabilities(self, ids: Tensor, embeddings: Tensor, indices: Tensor | None) -> Tensor:
        """Return (B, K+1): of the own row, then of the drawn ones."""
        negatives, temperature, z = int(self.params[0].item()), self.params[1].item(), self.params[2].item()
        batch, dim = embeddings.shape
        if indices is None:
            indices = self.draw(batch * (negatives + 1)).view(batch, -1)
        indices.select(1, 0).copy_(ids)
        rows = self.memory.index_select(0, indices.view(-1)).view(batch, negatives + 1, dim)
        scores = torch.bmm(rows, embeddings.view(batch, dim, 1))
        return torch.exp(scores.div(temperature)).div(z).contiguous()

    def criterion(self, probabilities: Tensor) -> Tensor:
        batch, negatives = len(probabilities), probabilities.shape[1] - 1
        noise = negatives / len(self.memory)
        own, others = probabilities.select(1, 0), probabilities.narrow(1, 1, negatives)
        own_term = own.div(own + (noise + EPSILON)).log()
        other_terms = others.clone().fill_(noise).div(others + (noise + EPSILON)).log()
        return -(own_term.sum(0) + other_terms.view(-1, 1).sum(0)) / batch

    @torch.no_grad()
    def update(self, ids: Tensor, embeddings: Tensor) -> None:
        momentum = self.params[3].item()
        rows = self.memory.index_select(0, ids.view(-1)).mul_(momentum).add_(embeddings.mul(1 - momentum))
        self.memory.index_copy_(0, ids, rows.div(rows.pow(2).sum(1, keepdim=True).pow(0.5)))

    def step(
        self, ids: Tensor, patches: Tensor, images: Tensor, indices: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Return the loss (1,) of (B, D) embeddings; leave gradients in them, and move the bank towards the images.

        `indices`: the rows to use, two (B, K+1), column 0 is overwritten; drawn if None.
        """
        patch_indices, image_indices = indices if indices else (None, None)
        patch_term = self.criterion(self.probabilities(ids, F.normalize(patches), patch_indices))
        unit = F.normalize(images)
        image_probabilities = self.probabilities(ids, unit, image_indices)
        self.update(ids, unit.detach())
        loss = 0.5 * patch_term + 0.5 * self.criterion(image_probabilities)
        loss.backward()
        return loss.detach()
