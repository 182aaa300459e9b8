"""What every recommender offers: a training step, embeddings of users and items, and scores between them."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from sibra_dist.config import Config
from sibra_dist.data.batches import ModalitySampling, TrainBatch

NOTHING_HIDDEN: frozenset[str] = frozenset()


class ModelConfig(Config):
    """Base of the models' configuration classes; each has a literal `type`, its name in `MODELS`."""

    type: str


@dataclass(frozen=True)
class StepOutput:
    """What a model makes of a batch of B examples."""

    scores: Tensor
    """[B, 1+N] logits; column 0 is the positive"""
    auxiliary_losses: dict[str, Tensor] = field(default_factory=dict)
    """[B] each, already multiplied by their weight in the objective"""


class Recommender(nn.Module, ABC):
    """Base class of the models.

    The training interactions and features are buffers that are not saved: they belong to the dataset, and the
    parameters alone to a checkpoint.
    """

    trainable: ClassVar[bool] = True
    """False where there is nothing to optimise."""

    @abstractmethod
    def encode_users(self, users: Tensor, hidden: frozenset[str] = NOTHING_HIDDEN) -> Tensor:
        """Embeddings [n, d] of users int64 [n], from all that is present but the modalities named in `hidden`."""

    @abstractmethod
    def encode_items(self, items: Tensor, hidden: frozenset[str] = NOTHING_HIDDEN) -> Tensor:
        """Embeddings [n, d] of items int64 [n], likewise."""

    def score(self, users: Tensor, items: Tensor) -> Tensor:
        """Scores [U, I] between embeddings [U, d] and [I, d]; here their dot products."""
        return users @ items.T

    def forward(self, batch: TrainBatch) -> StepOutput:
        """Scores of a training batch. Only for models that are trainable."""
        raise TypeError(f"{type(self).__name__} has nothing to train")

    def sampling(self) -> tuple[ModalitySampling, ModalitySampling]:
        """How modalities of users, and of items, are drawn in training. Only for models that are trainable."""
        raise TypeError(f"{type(self).__name__} has nothing to train")

    def modalities(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of the modalities that the model reads of users, and of items: what can be hidden."""
        return (), ()

    def without_modality(self, items: bool, hidden: frozenset[str] = NOTHING_HIDDEN) -> int:
        """How many users (or items) have none of the modalities that the model reads and that are not hidden."""
        return 0


def parameter_count(model: nn.Module) -> int:
    """Number of trained scalars."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
