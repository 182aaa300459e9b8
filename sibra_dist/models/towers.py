"""Towers: what embeds users or items of which everything is given, in place of being looked up in a dataset.

A tower shares its parameters with the model that it is of. It is a function of tensors alone, and takes the same steps
whatever is in them: so it can be traced, and run where there is no dataset and none of this package.
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sibra_dist.models.branch import Branch
from sibra_dist.models.concatenation import Concatenation
from sibra_dist.models.encoder import Input
from sibra_dist.models.encoders import ID, id_input
from sibra_dist.models.side import Aggregation, ByModality, SideEncoders
from sibra_dist.models.tables import Table

Given = dict[str, Tensor]
"""The tensors that tell the modalities, by name: that of the modality and the suffix of the input."""


class Tower(nn.Module, ABC):
    """Embeds users, or items."""

    @abstractmethod
    def inputs(self) -> dict[str, tuple[Input, ...]]:
        """What tells each modality, in the order of the columns of `present`."""

    @abstractmethod
    def forward(self, present: Tensor, given: Given) -> Tensor:
        """Embeddings [n, d]: those that the model gives to entities of which a dataset says the same.

        Args:
            present: bool [n, M], which modalities of each entity are there.
            given: what tells them; of one that is not there, anything that may be told, such as zeros and an empty list.
        """


class BranchTower(Tower):
    """Encodes each modality, passes it through the branch, and takes the mean or the maximum of those that are there."""

    def __init__(self, side: SideEncoders, branch: Branch, how: Aggregation) -> None:
        """Share the parameters of a side and its branch."""
        super().__init__()
        self.side, self.branch = side, branch
        self._how = how

    def inputs(self) -> dict[str, tuple[Input, ...]]:
        """See `Tower`."""
        return _inputs(self.side.encoders)

    def forward(self, present: Tensor, given: Given) -> Tensor:
        """See `Tower`."""
        views = torch.stack([self.branch(encoded) for encoded in _encode(self.side.encoders, given)], dim=1)
        there = present[..., None]
        if self._how == "max":
            embedded = torch.where(there, views, -torch.inf).amax(1)
        else:
            embedded = torch.where(there, views, 0).sum(1) / present.sum(1, keepdim=True).clamp(min=1)
        return torch.where(present.any(1, keepdim=True), embedded, self.branch(self.side.unknown))


class ConcatenationTower(Tower):
    """Encodes each modality, and passes all of them side by side through a network; one that is not there is zeros."""

    def __init__(self, concatenation: Concatenation) -> None:
        """Share the parameters of one side."""
        super().__init__()
        self.concatenation = concatenation

    def inputs(self) -> dict[str, tuple[Input, ...]]:
        """See `Tower`."""
        return _inputs(self.concatenation.encoders.encoders)

    def forward(self, present: Tensor, given: Given) -> Tensor:
        """See `Tower`."""
        encoded = _encode(self.concatenation.encoders.encoders, given)
        there = present.unbind(1)
        side_by_side = [torch.where(column[:, None], rows, 0) for column, rows in zip(there, encoded, strict=True)]
        embedded: Tensor = self.concatenation.network(torch.cat(side_by_side, dim=1))
        return embedded


class ContentTower(Tower):
    """The embedding of an id, or without one that of the content; zeros without either."""

    def __init__(self, embedding: Table, content: Concatenation | None) -> None:
        """Share the parameters of one side; `content` is None if it has ids alone."""
        super().__init__()
        self.embedding = embedding
        self.content = None if content is None else ConcatenationTower(content)

    def inputs(self) -> dict[str, tuple[Input, ...]]:
        """See `Tower`."""
        return {ID: (id_input(self.embedding),), **({} if self.content is None else self.content.inputs())}

    def forward(self, present: Tensor, given: Given) -> Tensor:
        """See `Tower`."""
        has_id, has_contents = present[:, :1], present[:, 1:]
        without: Tensor | int = 0
        if self.content is not None:
            without = torch.where(has_contents.any(1, keepdim=True), self.content(has_contents, given), 0)
        return torch.where(has_id, self.embedding.lookup(given[ID]), without)


class IdTower(Tower):
    """The embedding of an id, and zeros without one; then a bias, if there is one."""

    def __init__(self, embedding: Table, bias: Tensor | float | None) -> None:
        """Share the parameters of one side; `bias` is one of each id, [rows, 1], or the same number for all."""
        super().__init__()
        self.embedding, self.bias = embedding, bias

    def inputs(self) -> dict[str, tuple[Input, ...]]:
        """See `Tower`."""
        return {ID: (id_input(self.embedding),)}

    def forward(self, present: Tensor, given: Given) -> Tensor:
        """See `Tower`."""
        embedded = torch.where(present, self.embedding.lookup(given[ID]), 0)
        if self.bias is None:
            return embedded
        if not isinstance(self.bias, Tensor):
            return F.pad(embedded, (0, 1), value=self.bias)
        return torch.cat([embedded, torch.where(present, F.embedding(given[ID], self.bias), 0)], dim=1)


def _inputs(encoders: ByModality) -> dict[str, tuple[Input, ...]]:
    return {name: encoder.inputs() for name, encoder in encoders.items()}


def _encode(encoders: ByModality, given: Given) -> list[Tensor]:
    """What each encoder makes, [n, h], of what is given."""
    return [
        encoder.encode(encoder.given(*[given[f"{name}{one.suffix}"] for one in encoder.inputs()]))
        for name, encoder in encoders.items()
    ]
