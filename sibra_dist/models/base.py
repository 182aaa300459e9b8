"""What every recommender offers: a training step, embeddings of users and items, and scores between them."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from sibra_dist.config import Config
from sibra_dist.data.batches import ModalitySampling
from sibra_dist.data.presence import NOTHING_HIDDEN, Hidden
from sibra_dist.data.transfer import to_device
from sibra_dist.data.user_batches import AnyBatch
from sibra_dist.models.branch import Branch
from sibra_dist.models.linear import dots_with_own, unit_length
from sibra_dist.models.towers import Tower
from sibra_dist.phases import phase

COSINE_FLOOR = 1e-6
ScoreName = Literal["dot", "cosine"]


class ModelConfig(Config):
    """Base of the models' configuration classes; each has a literal `type`, its name in `MODELS`."""

    type: str


@dataclass(frozen=True)
class StepOutput:
    """What a model makes of a batch of B examples."""

    scores: Tensor
    """[B, 1+N] logits, with the positive in column 0; [B, P] for a batch of whole users"""
    auxiliary_losses: dict[str, Tensor] = field(default_factory=dict)
    """[B] each, already multiplied by their weight in the objective"""


class Recommender(nn.Module, ABC):
    """Base class of the models.

    The training interactions and features that a model reads are the dataset's tensors, neither parameters nor buffers. They
    may lie on another device than the parameters: what is read of them is taken to the parameters' device, and no more.
    """

    trainable: ClassVar[bool] = True
    """False where there is nothing to optimise."""

    @abstractmethod
    def encode_users(self, users: Tensor, hidden: Hidden = NOTHING_HIDDEN) -> Tensor:
        """Embeddings [n, d] of distinct users int64 [n], from all that is present and not hidden."""

    @abstractmethod
    def encode_items(self, items: Tensor, hidden: Hidden = NOTHING_HIDDEN) -> Tensor:
        """Embeddings [n, d] of distinct items int64 [n], likewise."""

    def score(self, users: Tensor, items: Tensor) -> Tensor:
        """Scores [U, I], logits, between embeddings [U, d] and [I, d]; here their dot products."""
        return users @ items.T

    @property
    def score_name(self) -> ScoreName | None:
        """Which of `SCORES` its score is; None where it is no function of a dot product."""
        return "dot"

    def tower(self, items: bool) -> Tower | None:
        """What embeds users (or items) of which everything is given and nothing looked up; None where that cannot be."""
        return None

    def candidate_scores(self, users: Tensor, items: Tensor) -> Tensor:
        """Scores [B, n], logits, of users [B, d] with candidates of their own [B, n, d]; they agree with `score`."""
        return dots_with_own(users, items)

    def batch_scores(self, users: Tensor, items: Tensor) -> Tensor:
        """Scores of the users [B, d] of a batch with their own candidates [B, n, d], or with one pool of items [P, d]."""
        with phase("score"):
            return self.score(users, items) if items.dim() == 2 else self.candidate_scores(users, items)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next((tensor.device for tensor in [*self.parameters(), *self.buffers()]), torch.device("cpu"))

    def read(self, batch: AnyBatch) -> Any:
        """What a training batch needs of the data: tensors, on the data's device, that depend on no parameter."""
        return None

    def step(self, batch: AnyBatch, read: Any) -> StepOutput:
        """Scores of a training batch, from what was read for it; both on the device of the parameters.

        Nothing in here waits for the device. Only for models that are trainable.
        """
        raise TypeError(f"{type(self).__name__} has nothing to train")

    def forward(self, batch: AnyBatch) -> StepOutput:
        """Scores of a training batch: `read` and `step`."""
        return self.step(*to_device((batch, self.read(batch)), self.device))

    def compile_layers(self) -> None:
        """Let torch.compile fuse the layers of the branches, for any number of rows."""
        for module in self.modules():
            if isinstance(module, Branch):
                module.layers.compile(dynamic=True)

    def sampling(self) -> tuple[ModalitySampling, ModalitySampling]:
        """How modalities of users, and of items, are drawn in training. Only for models that are trainable."""
        raise TypeError(f"{type(self).__name__} has nothing to train")

    def modalities(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of the modalities that the model reads of users, and of items: what can be hidden."""
        return (), ()

    def seen(self, items: bool, hidden: Hidden = NOTHING_HIDDEN) -> Tensor:
        """Which modalities of each user (or item) are there once some are hidden: bool [entities, M], in their order."""
        return torch.ones(0, 0, dtype=torch.bool)

    def without_modality(self, items: bool, hidden: Hidden = NOTHING_HIDDEN) -> int:
        """How many users (or items) have none of the modalities that the model reads and that are not hidden."""
        return int((~self.seen(items, hidden).any(1)).sum())


class Score(NamedTuple):
    """A score of a user and an item as a function of the dot product of their prepared embeddings."""

    prepare: Callable[[Tensor], Tensor]
    """[*, d] -> [*, d]"""
    finish: Callable[[Tensor], Tensor]
    """dot products of prepared embeddings -> logits"""

    def all_pairs(self, users: Tensor, items: Tensor) -> Tensor:
        """[U, d] and [I, d] -> [U, I]."""
        return self.finish(self.prepare(users) @ self.prepare(items).T)

    def candidates(self, users: Tensor, items: Tensor) -> Tensor:
        """Each user [B, d] with candidates of its own [B, n, d] -> [B, n]."""
        return self.finish(dots_with_own(self.prepare(users), self.prepare(items)))


def _same(values: Tensor) -> Tensor:
    return values


def _logit_of_cosine(cosine: Tensor) -> Tensor:
    return torch.logit(cosine.to(torch.promote_types(cosine.dtype, torch.float32)), eps=COSINE_FLOOR)


SCORES: dict[str, Score] = {
    # The sigmoid of the logit is CoBraR's other score, sigmoid(u . i).
    "dot": Score(_same, _same),
    # DMF's and CoBraR's max(cos(u, i), 1e-6) is read as a probability, so that its logit serves every loss. It is kept from
    # 1 by as much: there the logit is infinite.
    "cosine": Score(unit_length, _logit_of_cosine),
}


def parameter_count(model: nn.Module) -> int:
    """Number of trained scalars."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
