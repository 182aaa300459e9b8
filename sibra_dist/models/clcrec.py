"""CLCRec: matrix factorization whose id embeddings are tied to embeddings of content by a contrastive loss.

Wei, Wang, Li, Nie, Li, Li, Chua, "Contrastive Learning for Cold-Start Recommendation", MM 2021. An item (or a user) has an
id embedding e and a content embedding z, a network over the encodings of its features side by side. The score is the dot
product, in which e is replaced by z with a probability rho in training ("hybrid training"), and for a cold entity always.
The objective is the loss of the scores plus, of each side with content,

    weight * symmetric InfoNCE of e / |e| and z / |z|

among the candidates of an example for items, and among the users of the global batch for users.

The original compares in one direction, a positive's e with the z of the candidates. The L2 regularisation is left to the
optimizer's `weight_decay`.
"""

from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from sibra_dist.config import Config
from sibra_dist.data.batches import ModalitySampling, in_share, stream, uniform
from sibra_dist.data.dataset import Dataset, Entities
from sibra_dist.data.presence import NOTHING_HIDDEN, Hidden
from sibra_dist.data.transfer import to_device
from sibra_dist.data.user_batches import AnyBatch, UserBatch
from sibra_dist.errors import ConfigError, nearest
from sibra_dist.losses import batch_info_nce, candidates_info_nce
from sibra_dist.models.base import ModelConfig, Recommender, StepOutput
from sibra_dist.models.concatenation import (
    Concatenation,
    ConcatenationRead,
    DistinctInputs,
    NetworkConfig,
    distinct_inputs,
    seen_modalities,
)
from sibra_dist.models.encoder import EncoderConfig
from sibra_dist.models.encoders import ID, presence
from sibra_dist.models.factorization import id_embedding
from sibra_dist.models.linear import unit_length
from sibra_dist.models.side import ModalitiesConfig, SideEncoders, SideName, require_modalities
from sibra_dist.models.tables import Lookup
from sibra_dist.models.towers import ContentTower, Tower


class ContentContrastConfig(Config):
    """The contrastive loss between id and content embeddings."""

    weight: Annotated[float, Field(ge=0)] = 1.0
    """Of the contrastive loss, beside the loss of the scores."""
    temperature: Annotated[float, Field(gt=0)] = 0.1
    """Divides the dot products that are compared."""


class UserContentContrastConfig(ContentContrastConfig):
    """Of users, who are told apart among the users of the global batch."""

    local: bool = False
    """Whether each rank compares its own part of the batch only. Needs no communication, and depends on the number of
    ranks."""


class ContentConfig(NetworkConfig):
    """The content embedding of one side: which features, and the network over their encodings."""

    content: tuple[str, ...] | None = None
    """Names of features; null: every feature of the dataset; []: none, so that the side has id embeddings alone."""
    encoders: dict[str, EncoderConfig] = {}
    """How single features are encoded, by name, where the defaults are not wanted."""
    replace_id: Annotated[float, Field(ge=0, le=1)] = 0.5
    """rho: the probability that in a training step the id embedding of an entity with content is replaced by the content
    embedding, for each occurrence anew."""
    contrast: ContentContrastConfig | None = ContentContrastConfig()
    """null for none."""


class UserContentConfig(ContentConfig):
    """The content embedding of users; by default they have none."""

    content: tuple[str, ...] | None = ()
    """Names of features; null: every feature of the dataset; []: none, so that the side has id embeddings alone."""
    contrast: UserContentContrastConfig | None = UserContentContrastConfig()
    """null for none."""


class CLCRecConfig(ModelConfig):
    """CLCRec."""

    type: Literal["clcrec"] = "clcrec"
    embedding_size: Annotated[int, Field(ge=1)] = 128
    """Width d of the embeddings of users and items."""
    initial_deviation: Annotated[float, Field(gt=0)] = 0.01
    """Id embeddings start normally distributed around 0 with this standard deviation."""
    users: UserContentConfig = UserContentConfig()
    """The content of users."""
    items: ContentConfig = ContentConfig()
    """The content of items."""


class Both(NamedTuple):
    """The embeddings of some entities, by id and by content; what is missing is zeros."""

    ids: Tensor
    """[n, d], of distinct entities"""
    contents: Tensor
    """[n, d], of the same"""
    has_id: Tensor
    """bool [n]"""
    has_content: Tensor
    """bool [n]"""
    inverse: Tensor
    """int64 [*]: where each entity is that was asked for"""

    def embedding(self, replaced: Tensor | None = None) -> Tensor:
        """What is scored, [*, d]: the id embedding, or else, and where bool [*] `replaced` says so, the content's."""
        by_content = ~self.has_id[self.inverse]
        if replaced is not None:
            by_content = by_content | replaced
        by_content = by_content & self.has_content[self.inverse]
        return F.embedding(self.inverse + by_content * len(self.ids), torch.cat([self.ids, self.contents]))

    def pair(self) -> tuple[Tensor, Tensor]:
        """What is compared, [*, d] each, of length 1; where only one is there, it twice."""
        ids = torch.where(self.has_id[:, None], self.ids, self.contents)
        contents = torch.where(self.has_content[:, None], self.contents, self.ids)
        ids, contents = unit_length(ids), unit_length(contents)
        return F.embedding(self.inverse, ids), F.embedding(self.inverse, contents)


class ContentRead(NamedTuple):
    """What is needed of some entities."""

    distinct: DistinctInputs
    ids: Lookup
    content: ConcatenationRead | None


class ContentSide(nn.Module):
    """Id embeddings of one side, and content embeddings if it has content."""

    def __init__(
        self, config: ContentConfig, parent: CLCRecConfig, entities: Entities, other: Entities, side: SideName
    ) -> None:
        """Build the embeddings of `entities` of a `side`, with torch's global generator.

        Raises:
            ConfigError: a feature is not in the dataset or named twice.
        """
        super().__init__()
        names = tuple(entities.features) if config.content is None else config.content
        for name in names:
            if name not in entities.features:
                raise ConfigError(
                    f"model.{side}.content: the dataset's {side} have no feature {name}; {nearest(name, entities.features)}"
                )
        if len(set(names)) < len(names):
            raise ConfigError(f"model.{side}.content names a feature twice: name each once")
        require_modalities(config.encoders, names, f"model.{side}.encoders")
        self.modalities = (ID, *names)
        self.embedding = id_embedding(entities.known, parent.embedding_size, parent.initial_deviation)
        self.content: Concatenation | None = None
        present = presence(ID, entities)[:, None]
        if names:
            read = ModalitiesConfig(modalities=names, encoders=config.encoders)
            encoders = SideEncoders(read, config.input_size, entities, other, side, learned_unknown=False)
            self.content = Concatenation(encoders, config, parent.embedding_size)
            present = torch.cat([present, encoders.present], dim=1)
        self.present = present

    def seen(self, entities: Tensor, hidden: Hidden) -> Tensor:
        """Which modalities of entities int64 [n] are there once some are hidden: bool [n, M]."""
        return self.present[entities] & hidden.visible(self.modalities, entities)

    def read(self, entities: Tensor, seen: Tensor, key: int | None = None) -> "ContentRead":
        """What is needed of entities int64 [*] of which the modalities `seen`, bool [*, M], are there."""
        distinct = distinct_inputs(entities, seen)
        content = None if self.content is None else self.content.read(distinct.entities, distinct.seen[:, 1:], key)
        # Newcomers have no id: what is looked up for them counts for nothing.
        known = distinct.entities.clamp(max=self.embedding.rows - 1)
        return ContentRead(distinct, self.embedding.plan_lookup(known), content)

    def forward(self, read: "ContentRead") -> Both:
        """Embed what was read."""
        distinct, looked_up, content = read
        has_id, has_content = distinct.seen[:, 0], distinct.seen[:, 1:].any(1)
        ids = self.embedding.lookup(looked_up) * has_id[:, None]
        contents = torch.zeros_like(ids)
        if self.content is not None:
            contents = self.content(content) * has_content[:, None]
        return Both(ids, contents, has_id, has_content, distinct.inverse)


class CLCRec(Recommender):
    """See the module's docstring."""

    def __init__(self, config: CLCRecConfig, dataset: Dataset) -> None:
        """Build the model for a dataset, with torch's global generator.

        Raises:
            ConfigError: neither side has content, or what is asked for is not in the dataset.
        """
        super().__init__()
        self.config = config
        self.users = ContentSide(config.users, config, dataset.users, dataset.items, "users")
        self.items = ContentSide(config.items, config, dataset.items, dataset.users, "items")
        if self.users.content is None and self.items.content is None:
            raise ConfigError(
                "model: clcrec needs content of items or of users: name features of the dataset in model.items.content or "
                "model.users.content, or use model.type=mf"
            )
        self._num_items = dataset.items.count

    def read(self, batch: AnyBatch) -> tuple[ContentRead, ContentRead]:
        """See `Recommender`."""
        return (
            _read(self.users, batch.users, batch.user_modalities, stream(batch.noise_key, 0)),
            _read(self.items, batch.items, batch.item_modalities, stream(batch.noise_key, 1)),
        )

    def step(self, batch: AnyBatch, read: tuple[ContentRead, ContentRead]) -> StepOutput:
        """Scores, and the contrastive losses "users.info_nce" and "items.info_nce" of sides with content."""
        users: Both = self.users(read[0])
        items: Both = self.items(read[1])
        examples, candidates = batch.users, batch.items
        if not isinstance(batch, UserBatch):
            # A positive is in an epoch once, so a user and a positive name an example, on whatever rank it is.
            examples = batch.users * self._num_items + batch.items[:, 0]
            candidates = examples[:, None] * self._num_items + batch.items
        scores = self.batch_scores(
            users.embedding(in_share(uniform(stream(batch.noise_key, 2), examples), self.config.users.replace_id)),
            items.embedding(in_share(uniform(stream(batch.noise_key, 3), candidates), self.config.items.replace_id)),
        )
        losses = {}
        if self.users.content is not None and (of_users := self.config.users.contrast) is not None:
            info_nce = batch_info_nce(*users.pair(), batch.weights, of_users.temperature, local=of_users.local)
            losses["users.info_nce"] = of_users.weight * info_nce
        if self.items.content is not None and (of_items := self.config.items.contrast) is not None:
            losses["items.info_nce"] = of_items.weight * candidates_info_nce(*items.pair(), of_items.temperature, len(examples))
        return StepOutput(scores, losses)

    def encode_users(self, users: Tensor, hidden: Hidden = NOTHING_HIDDEN) -> Tensor:
        """See `Recommender`."""
        both: Both = self.users(to_device(self.users.read(users, self.users.seen(users, hidden)), self.device))
        return both.embedding()

    def encode_items(self, items: Tensor, hidden: Hidden = NOTHING_HIDDEN) -> Tensor:
        """See `Recommender`."""
        both: Both = self.items(to_device(self.items.read(items, self.items.seen(items, hidden)), self.device))
        return both.embedding()

    def tower(self, items: bool) -> Tower:
        """See `Recommender`."""
        side = self.items if items else self.users
        return ContentTower(side.embedding, side.content)

    def sampling(self) -> tuple[ModalitySampling, ModalitySampling]:
        """All that is there: whether an id is replaced in the score is drawn in `forward`, as the contrast reads it still."""
        return ModalitySampling(self.users.present), ModalitySampling(self.items.present)

    def modalities(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """See `Recommender`."""
        return self.users.modalities, self.items.modalities

    def seen(self, items: bool, hidden: Hidden = NOTHING_HIDDEN) -> Tensor:
        """See `Recommender`."""
        side = self.items if items else self.users
        return side.seen(torch.arange(len(side.present), device=side.present.device), hidden)


def _read(side: ContentSide, entities: Tensor, drawn: Tensor, key: int) -> ContentRead:
    return side.read(entities, seen_modalities(drawn, len(side.modalities)), key)
