"""SiBraR as PyTorch offers itself to write it: rows of interactions made dense for each batch, and linear layers on them.

It is the model of `sibra_dist.models.single_branch` with interactions of users, and interactions, tags and a vector of items:
given the same parameters and batch it has the same loss, and a test holds it to that. What it does without is what that one
is for: each drawn modality of each occurrence of an entity is encoded by itself.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sibra_dist.models.single_branch import SingleBranchConfig

INTERACTIONS, TAGS, VECTOR = range(3)
UNUSED = -1


class Matrix(NamedTuple):
    """A sparse 0/1 matrix by row."""

    starts: Tensor
    """int64 [rows + 1]"""
    columns: Tensor
    """int64 [entries]"""
    width: int

    def dense(self, rows: Tensor, left_out: Tensor | None = None) -> Tensor:
        """Rows int64 [n] as float32 [n, width]; with `left_out` int64 [n], one entry of each, or none where it is -1, is 0."""
        lengths = self.starts[rows + 1] - self.starts[rows]
        row = torch.repeat_interleave(torch.arange(len(rows)), lengths)
        first = lengths.cumsum(0) - lengths
        place = torch.arange(len(row)) - first[row] + self.starts[rows][row]
        made = torch.zeros(len(rows), self.width)
        made[row, self.columns[place]] = 1
        if left_out is not None:
            losing = torch.nonzero(left_out >= 0).flatten()
            made[losing, left_out[losing]] = 0
        return made


class Inputs(NamedTuple):
    """What the model reads."""

    users: Matrix
    """[users, items]"""
    items: Matrix
    """[items, users]"""
    tags: Tensor
    """float32 [items, tags], 0/1"""
    vectors: Tensor
    """float32 [items, size]"""


class DenseBatch(NamedTuple):
    """B examples."""

    users: Tensor
    """int64 [B]"""
    items: Tensor
    """int64 [B, 1+N]: the positive first"""
    drawn: Tensor
    """int64 [B, 1+N, D]: the item modalities to be read; UNUSED where there are fewer than D"""


class DenseSibrar(nn.Module):
    """See the module's docstring."""

    def __init__(self, inputs: Inputs, config: SingleBranchConfig, num_candidates: int) -> None:
        """Build for inputs, with negatives drawn from so many items."""
        super().__init__()
        assert config.items.contrast is not None
        self.inputs, self.contrast, self.num_candidates = inputs, config.items.contrast, num_candidates
        self.exclude_target = config.exclude_target
        self.user_interactions = nn.Linear(inputs.users.width, config.users.input_size)
        self.item_interactions = nn.Linear(inputs.items.width, config.items.input_size)
        self.item_tags = nn.Linear(inputs.tags.shape[1], config.items.input_size, bias=False)
        self.item_vector = nn.Linear(inputs.vectors.shape[1], config.items.input_size)
        self.user_branch, self.item_branch = (
            _branch([side.input_size, *(side.hidden_sizes or ()), config.embedding_size], side.batch_norm_every)
            for side in (config.users, config.items)
        )
        self.user_dropout, self.item_dropout = nn.Dropout(config.users.input_dropout), nn.Dropout(config.items.input_dropout)

    def forward(self, batch: DenseBatch) -> Tensor:
        """The mean loss: a sampled softmax of the scores, and the contrast of the first two modalities of each item."""
        users, (items, views) = self._users(batch), self._items(batch)
        scores = torch.einsum("bd,bnd->bn", users, items)
        # Each negative stands for as many of the items that may be drawn.
        logits = torch.cat([scores[:, :1], scores[:, 1:] + math.log(self.num_candidates / (scores.shape[1] - 1))], dim=1)
        loss = F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64))
        first = views[:, :, 0]
        second = torch.where(batch.drawn[:, :, 1:2] == UNUSED, first, views[:, :, 1])
        return loss + self.contrast.weight * symmetric_info_nce(first, second, self.contrast.temperature)

    def _users(self, batch: DenseBatch) -> Tensor:
        rows = self.inputs.users.dense(batch.users, batch.items[:, 0] if self.exclude_target else None)
        encoded = F.normalize(F.relu(self.user_interactions(rows)), dim=1)
        embedded: Tensor = self.user_branch(self.user_dropout(encoded))
        return embedded

    def _items(self, batch: DenseBatch) -> tuple[Tensor, Tensor]:
        """Embeddings [B, 1+N, d], and those of each drawn modality by itself, [B, 1+N, D, d]."""
        items = batch.items[..., None].expand_as(batch.drawn)
        known = batch.users[:, None, None].expand_as(batch.drawn).clone()
        known[:, 1:] = -1
        parts, places = [], []
        for modality in (INTERACTIONS, TAGS, VECTOR):
            here = batch.drawn == modality
            parts.append(self._encode(modality, items[here], known[here] if self.exclude_target else None))
            places.append(torch.nonzero(here.flatten()).flatten())
        embedded = self.item_branch(self.item_dropout(F.normalize(torch.cat(parts), dim=1)))
        flat = embedded.new_zeros(batch.drawn.numel(), embedded.shape[1]).index_copy(0, torch.cat(places), embedded)
        views = flat.view(*batch.drawn.shape, -1)
        used = (batch.drawn != UNUSED).sum(-1, keepdim=True)
        return views.sum(2) / used, views

    def _encode(self, modality: int, items: Tensor, known: Tensor | None) -> Tensor:
        encoded: Tensor
        if modality == INTERACTIONS:
            encoded = F.relu(self.item_interactions(self.inputs.items.dense(items, known)))
        elif modality == TAGS:
            encoded = self.item_tags(self.inputs.tags[items])
        else:
            encoded = F.relu(self.item_vector(self.inputs.vectors[items]))
        return encoded


def symmetric_info_nce(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """The mean over examples of the cross-entropies of finding the other view among n candidates, both ways: [B, n, d] each."""
    logits = torch.einsum("bnd,bmd->bnm", a, b) / temperature
    own = torch.arange(a.shape[1]).expand(len(a), -1)
    return F.cross_entropy(logits, own) + F.cross_entropy(logits.transpose(1, 2), own)


def _branch(sizes: list[int], norm_every: int) -> nn.Sequential:
    """Linear layers with a ReLU each, and batch normalisation before every so many hidden ones' ReLU."""
    layers: list[nn.Module] = []
    for depth, (fan_in, fan_out) in enumerate(pairwise(sizes), start=1):
        layers.append(nn.Linear(fan_in, fan_out))
        if depth < len(sizes) - 1 and norm_every > 0 and depth % norm_every == 0:
            layers.append(nn.BatchNorm1d(fan_out))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)
