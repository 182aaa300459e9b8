"""Single-branch recommenders: one network encodes every modality of an entity into one space.

One class gives a family. With a branch for items and one for users it is SiBraR (Ganhör, Moscati, Hausberger, Nawaz,
Schedl, "A Multimodal Single-Branch Embedding Network for Recommendation in Cold-Start and Missing Modality Scenarios",
RecSys 2024). Where one branch serves users and items, who are read by their interactions, it is CoBraR (Moscati, Nawaz,
Schedl, RecSys 2025); where that branch is not shared, DMF (Xue et al., IJCAI 2017); and one branch for every modality of
both is their combination, the recipe `universal`.

In the papers' notation, z_m = f_m(x_m(e)) encodes modality m of entity e, h_m = g(z_m) is the shared branch, and the
embedding of e is the mean (or maximum) of h_m over the modalities that are present, and in training over those drawn in
this step.
"""

from typing import Annotated, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from sibra_dist.config import Config
from sibra_dist.data.batches import ModalitySampling, stream
from sibra_dist.data.dataset import Dataset
from sibra_dist.data.presence import NOTHING_HIDDEN, Hidden
from sibra_dist.data.transfer import to_device
from sibra_dist.data.user_batches import AnyBatch, UserBatch
from sibra_dist.losses import batch_info_nce, candidates_info_nce
from sibra_dist.models.base import SCORES, ModelConfig, Recommender, ScoreName, StepOutput
from sibra_dist.models.branch import Branch, BranchConfig
from sibra_dist.models.side import (
    Aggregation,
    ModalitiesConfig,
    Probability,
    Rows,
    SideEncoders,
    SideRead,
    aggregate,
    require_modalities,
    views,
)
from sibra_dist.models.towers import BranchTower, Tower


class ContrastConfig(Config):
    """The contrastive loss that pulls two drawn modalities of an entity together (symmetric InfoNCE)."""

    weight: Annotated[float, Field(ge=0)] = 1e-4
    """Of the contrastive loss, beside the loss of the scores."""
    temperature: Annotated[float, Field(gt=0)] = 0.1
    """Divides the dot products that are compared."""
    central: str | None = None
    """A modality that is always one of the two, for entities that have it; by default both are drawn."""


class UserContrastConfig(ContrastConfig):
    """Of users, who are told apart among the users of the global batch."""

    local: bool = False
    """Whether each rank compares its own part of the batch only. Needs no communication, and depends on the number of
    ranks."""


class SideConfig(ModalitiesConfig, BranchConfig):
    """One side (users or items): what is read, what of it is drawn in training, and the branch its modalities share."""

    draws: Annotated[int, Field(ge=1)] | Literal["all"] = 1
    """Distinct modalities drawn for each occurrence of an entity in training, from those present."""
    modality_dropout: dict[str, Probability] = {}
    """Probability of a modality, by name, of being left out of a training step, before the draw."""
    aggregation: Aggregation = "mean"
    """How the embeddings of an entity's modalities become one."""
    contrast: ContrastConfig | None = None
    """Between the first two modalities drawn of each entity; null for none."""

    @model_validator(mode="after")
    def _contrast_needs_two(self) -> Self:
        if self.contrast is not None and self.draws == 1:
            raise ValueError("contrast compares two modalities: set draws to 2 or more, or contrast to null")
        return self


class UserSideConfig(SideConfig):
    """The side of users."""

    contrast: UserContrastConfig | None = None
    """Between the first two modalities drawn of each user; null for none."""


class TowersConfig(ModelConfig):
    """What models share that embed each side by a branch of its own, or both by one."""

    embedding_size: Annotated[int, Field(ge=1)] = 128
    """Width d of the embeddings of users and items."""
    share_branch: bool = False
    """Whether users and items have one branch instead of one each."""
    users: UserSideConfig = UserSideConfig()
    """How users are embedded."""
    items: SideConfig = SideConfig()
    """How items are embedded."""
    exclude_target: bool = False
    """Whether the pair that a training example asks about is left out of the user's row and of the item's: otherwise the
    input holds the answer. Not in the papers."""

    @model_validator(mode="after")
    def _one_branch_has_one_shape(self) -> Self:
        keys = BranchConfig.model_fields
        if self.share_branch:
            for key in keys:
                if getattr(self.users, key) != getattr(self.items, key):
                    raise ValueError(f"share_branch: users and items have one branch, so set users.{key} and items.{key} alike")
        for name, side in (("users", self.users), ("items", self.items)):
            if side.hidden_sizes is None and side.input_size != self.embedding_size:
                raise ValueError(
                    f"{name}.hidden_sizes is null, so there is no branch: set {name}.input_size to the embedding_size "
                    f"({self.embedding_size})"
                )
        return self


class SingleBranchConfig(TowersConfig):
    """The single-branch family."""

    type: Literal["single_branch"] = "single_branch"
    score: ScoreName = "dot"
    """`dot`: the dot product, of which CoBraR's sigmoid(u . i) is the sigmoid. `cosine`: the logit of CoBraR's and DMF's
    max(cos(u, i), 1e-6)."""


class Embedded(NamedTuple):
    """The embeddings of one side in a training batch."""

    embedding: Tensor
    """[*, d]"""
    views: list[Tensor]
    """D of [*, d]: of each drawn modality by itself; an unused slot holds a used one's"""

    def pair(self) -> tuple[Tensor, Tensor]:
        """The first two drawn modalities, [*, d] each; where only one is there, it twice."""
        return self.views[0], self.views[min(len(self.views), 2) - 1]


class Towers(Recommender):
    """Users and items, each embedded from their modalities by a branch; subclasses say how embeddings are scored."""

    def __init__(self, config: TowersConfig, dataset: Dataset) -> None:
        """Build the model for a dataset, with torch's global generator."""
        super().__init__()
        self.config = config
        self.users = SideEncoders(config.users, config.users.input_size, dataset.users, dataset.items, "users")
        self.items = SideEncoders(config.items, config.items.input_size, dataset.items, dataset.users, "items")
        for encoders, side in ((self.users, config.users), (self.items, config.items)):
            central = {side.contrast.central: None} if side.contrast and side.contrast.central else {}
            require_modalities(central, encoders.modalities, f"model.{encoders.side}.contrast.central")
            require_modalities(side.modality_dropout, encoders.modalities, f"model.{encoders.side}.modality_dropout")
        if config.share_branch:
            self.branch = Branch(config.items, config.embedding_size)
        else:
            self.user_branch = Branch(config.users, config.embedding_size)
            self.item_branch = Branch(config.items, config.embedding_size)

    def read(self, batch: AnyBatch) -> tuple[SideRead, SideRead]:
        """See `Recommender`."""
        target = asked = None
        if self.config.exclude_target and not isinstance(batch, UserBatch):  # which never shows what it asks for
            target = batch.items[:, 0]
            asked = F.pad(batch.users[:, None], (0, batch.items.shape[1] - 1), value=-1)
        user_key, item_key = _keys(batch)
        return (
            self.users.read(self.users.rows(batch.users, batch.user_modalities, target), user_key, batch.shown),
            self.items.read(self.items.rows(batch.items, batch.item_modalities, asked), item_key, batch.shown),
        )

    def embed(self, batch: AnyBatch, read: tuple[SideRead, SideRead]) -> tuple[Embedded, Embedded]:
        """The users [B], and the candidates [B, 1+N] or [P], of a batch, from the modalities that were drawn."""
        users, items = (of_side.rows for of_side in read)
        user_inputs, item_inputs = self.users(read[0]), self.items(read[1])
        user_key, item_key = _keys(batch)
        if self.config.share_branch:
            # Together, so that batch normalisation has one set of statistics, as it has in evaluation.
            names = torch.cat([users.names * 2, items.names * 2 + 1])
            embedded = self.branch(torch.cat([user_inputs, item_inputs]), names, batch.noise_key)
            embedded_users, embedded_items = embedded.split([len(user_inputs), len(item_inputs)])
        else:
            embedded_users = self.user_branch(user_inputs, users.names, user_key)
            embedded_items = self.item_branch(item_inputs, items.names, item_key)
        return (
            _embedded(embedded_users, users, self.config.users.aggregation),
            _embedded(embedded_items, items, self.config.items.aggregation),
        )

    def contrasts(self, users: Embedded, items: Embedded, batch: AnyBatch) -> dict[str, Tensor]:
        """The contrastive losses that the configuration asks for, [B] each.

        Items are told apart among the candidates of one example, and users among the users of the global batch.
        """
        losses = {}
        if (of_users := self.config.users.contrast) is not None:
            info_nce = batch_info_nce(*users.pair(), batch.weights, of_users.temperature, local=of_users.local)
            losses["users.info_nce"] = of_users.weight * info_nce
        if (of_items := self.config.items.contrast) is not None:
            info_nce = candidates_info_nce(*items.pair(), of_items.temperature, len(batch.users))
            losses["items.info_nce"] = of_items.weight * info_nce
        return losses

    def encode_users(self, users: Tensor, hidden: Hidden = NOTHING_HIDDEN) -> Tensor:
        """See `Recommender`."""
        return _encode(self.users, self._branch(items=False), self.config.users.aggregation, users, hidden)

    def encode_items(self, items: Tensor, hidden: Hidden = NOTHING_HIDDEN) -> Tensor:
        """See `Recommender`."""
        return _encode(self.items, self._branch(items=True), self.config.items.aggregation, items, hidden)

    def tower(self, items: bool) -> Tower:
        """See `Recommender`."""
        config = self.config.items if items else self.config.users
        return BranchTower(self.items if items else self.users, self._branch(items), config.aggregation)

    def sampling(self) -> tuple[ModalitySampling, ModalitySampling]:
        """See `Recommender`."""
        return _sampling(self.users, self.config.users), _sampling(self.items, self.config.items)

    def modalities(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """See `Recommender`."""
        return self.users.modalities, self.items.modalities

    def seen(self, items: bool, hidden: Hidden = NOTHING_HIDDEN) -> Tensor:
        """See `Recommender`."""
        return (self.items if items else self.users).seen_of_all(hidden)

    def _branch(self, items: bool) -> Branch:
        if self.config.share_branch:
            return self.branch
        return self.item_branch if items else self.user_branch


class SingleBranch(Towers):
    """SiBraR, CoBraR, DMF and `universal`: see the module's docstring."""

    config: SingleBranchConfig

    def __init__(self, config: SingleBranchConfig, dataset: Dataset) -> None:
        """Build the model for a dataset, with torch's global generator."""
        super().__init__(config, dataset)
        self._score = SCORES[config.score]

    def step(self, batch: AnyBatch, read: tuple[SideRead, SideRead]) -> StepOutput:
        """Scores, and the contrastive losses "users.info_nce" and "items.info_nce" where they are wanted."""
        users, items = self.embed(batch, read)
        return StepOutput(self.batch_scores(users.embedding, items.embedding), self.contrasts(users, items, batch))

    @property
    def score_name(self) -> ScoreName:
        """See `Recommender`."""
        return self.config.score

    def score(self, users: Tensor, items: Tensor) -> Tensor:
        """See `Recommender`."""
        return self._score.all_pairs(users, items)

    def candidate_scores(self, users: Tensor, items: Tensor) -> Tensor:
        """See `Recommender`."""
        return self._score.candidates(users, items)


def _sampling(encoders: SideEncoders, config: SideConfig) -> ModalitySampling:
    draws = None if config.draws == "all" else config.draws
    return encoders.sampling(draws, config.contrast.central if config.contrast else None, config.modality_dropout)


def _embedded(embedded: Tensor, rows: Rows, aggregation: Aggregation) -> Embedded:
    by_modality = views(embedded, rows.places)
    return Embedded(aggregate(by_modality, rows.places, aggregation), by_modality)


def _encode(encoders: SideEncoders, branch: nn.Module, how: Aggregation, entities: Tensor, hidden: Hidden) -> Tensor:
    read = encoders.read(encoders.rows(entities, encoders.all_seen(entities, hidden)))
    read = to_device(read, encoders.unknown.device)
    return _embedded(branch(encoders(read), read.rows.names, None), read.rows, how).embedding


def _keys(batch: AnyBatch) -> tuple[int, int]:
    """Of the draws of users, and of items, in a step."""
    return stream(batch.noise_key, 0), stream(batch.noise_key, 1)
