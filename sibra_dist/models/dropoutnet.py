"""DropoutNet: a network over interactions and content, trained with the interactions left out of a share of the examples.

Volkovs, Yu, Poutanen, "DropoutNet: Addressing Cold Start in Recommender Systems", NeurIPS 2017. The input of an entity is
what is known of it side by side: the encodings of its features, and a linear layer on its row of training interactions. A
modality that is missing is zeros, and so are interactions that are left out of a training step, so that the network
learns to do without them. The score is the dot product.

As in the SiBraR paper's comparison everything is trained together, where the original reads the factors of a model that
was trained before and learns to reproduce its scores. Hidden layers have a ReLU in place of the original's tanh.
"""

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from sibra_dist.data.batches import ModalitySampling, stream
from sibra_dist.data.dataset import Dataset, Entities
from sibra_dist.data.presence import NOTHING_HIDDEN, Hidden
from sibra_dist.data.transfer import to_device
from sibra_dist.data.user_batches import AnyBatch, Shown
from sibra_dist.models.base import ModelConfig, Recommender, StepOutput
from sibra_dist.models.concatenation import Concatenation, ConcatenationRead, NetworkConfig, seen_modalities
from sibra_dist.models.encoder import EncoderConfig
from sibra_dist.models.encoders import INTERACTIONS
from sibra_dist.models.side import ModalitiesConfig, Probability, SideEncoders, SideName, require_modalities
from sibra_dist.models.towers import ConcatenationTower, Tower

DROPOUT = 0.5


class DropoutNetSideConfig(ModalitiesConfig, NetworkConfig):
    """One side (users or items)."""

    modality_dropout: dict[str, Probability] | None = None
    """Probability of a modality, by name, of being left out of a training step; null: interactions 0.5, if they are read."""


class DropoutNetConfig(ModelConfig):
    """DropoutNet."""

    type: Literal["dropoutnet"] = "dropoutnet"
    embedding_size: Annotated[int, Field(ge=1)] = 128
    """Width d of the embeddings of users and items."""
    users: DropoutNetSideConfig = DropoutNetSideConfig()
    """How users are embedded."""
    items: DropoutNetSideConfig = DropoutNetSideConfig()
    """How items are embedded."""


class DropoutNet(Recommender):
    """See the module's docstring."""

    def __init__(self, config: DropoutNetConfig, dataset: Dataset) -> None:
        """Build the model for a dataset, with torch's global generator."""
        super().__init__()
        self.config = config
        self.users = _side(config.users, config.embedding_size, dataset.users, dataset.items, "users")
        self.items = _side(config.items, config.embedding_size, dataset.items, dataset.users, "items")

    def read(self, batch: AnyBatch) -> tuple[ConcatenationRead, ConcatenationRead]:
        """See `Recommender`."""
        return (
            _read(self.users, batch.users, batch.user_modalities, stream(batch.noise_key, 0), batch.shown),
            _read(self.items, batch.items, batch.item_modalities, stream(batch.noise_key, 1), batch.shown),
        )

    def step(self, batch: AnyBatch, read: tuple[ConcatenationRead, ConcatenationRead]) -> StepOutput:
        """Scores."""
        return StepOutput(self.batch_scores(self.users(read[0]), self.items(read[1])))

    def encode_users(self, users: Tensor, hidden: Hidden = NOTHING_HIDDEN) -> Tensor:
        """See `Recommender`."""
        embedded: Tensor = self.users(to_device(self.users.read(users, self.users.encoders.seen(users, hidden)), self.device))
        return embedded

    def encode_items(self, items: Tensor, hidden: Hidden = NOTHING_HIDDEN) -> Tensor:
        """See `Recommender`."""
        embedded: Tensor = self.items(to_device(self.items.read(items, self.items.encoders.seen(items, hidden)), self.device))
        return embedded

    def tower(self, items: bool) -> Tower:
        """See `Recommender`."""
        return ConcatenationTower(self.items if items else self.users)

    def sampling(self) -> tuple[ModalitySampling, ModalitySampling]:
        """See `Recommender`."""
        return _sampling(self.users.encoders, self.config.users), _sampling(self.items.encoders, self.config.items)

    def modalities(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """See `Recommender`."""
        return self.users.encoders.modalities, self.items.encoders.modalities

    def seen(self, items: bool, hidden: Hidden = NOTHING_HIDDEN) -> Tensor:
        """See `Recommender`."""
        return (self.items if items else self.users).encoders.seen_of_all(hidden)


def _side(
    config: DropoutNetSideConfig, embedding_size: int, entities: Entities, other: Entities, side: SideName
) -> Concatenation:
    reads_interactions = config.modalities is None or INTERACTIONS in config.modalities
    how = config.encoders.get(INTERACTIONS, EncoderConfig())
    if reads_interactions and how.activation is None:
        linear = how.model_copy(update={"activation": False})
        config = config.model_copy(update={"encoders": {**config.encoders, INTERACTIONS: linear}})
    read = SideEncoders(config, config.input_size, entities, other, side, learned_unknown=False)
    require_modalities(config.modality_dropout or {}, read.modalities, f"model.{side}.modality_dropout")
    return Concatenation(read, config, embedding_size)


def _read(side: Concatenation, entities: Tensor, drawn: Tensor, key: int, shown: Shown | None) -> ConcatenationRead:
    return side.read(entities, seen_modalities(drawn, len(side.encoders.modalities)), key, shown)


def _sampling(encoders: SideEncoders, config: DropoutNetSideConfig) -> ModalitySampling:
    dropout = config.modality_dropout
    if dropout is None:
        dropout = {INTERACTIONS: DROPOUT} if INTERACTIONS in encoders.modalities else {}
    return encoders.sampling(dropout=dropout)
