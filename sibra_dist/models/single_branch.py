"""Single-branch recommenders: one network encodes every modality of an entity into one space.

SiBraR: Ganhör, Moscati, Hausberger, Nawaz, Schedl, "A Multimodal Single-Branch Embedding Network for Recommendation in
Cold-Start and Missing Modality Scenarios", RecSys 2024.

In the papers' notation, z_m = f_m(x_m(e)) encodes modality m of entity e, h_m = g(z_m) is the shared branch, and the
embedding of e is the mean of h_m over the modalities that are present, and in training over those drawn in this step.
What is absent from the data, not drawn in a step, or hidden on purpose is one mechanism: a modality that is not there.
An entity with nothing there has a learned input of its own, "unknown".
"""

import math
from itertools import pairwise
from typing import Annotated, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from sibra_dist.config import Config
from sibra_dist.data.batches import ModalitySampling, TrainBatch, hash64
from sibra_dist.data.dataset import Dataset, Entities
from sibra_dist.errors import ConfigError, nearest
from sibra_dist.losses import symmetric_info_nce
from sibra_dist.models.base import NOTHING_HIDDEN, ModelConfig, Recommender, StepOutput
from sibra_dist.models.encoders import ENCODERS, InteractionsEncoder

INTERACTIONS = "interactions"


class BranchConfig(Config):
    """One side (users or items): what is read, and the branch its modalities share."""

    modalities: tuple[str, ...] | None = None
    """`interactions` and names of features; by default interactions and every feature of the dataset."""
    draws: Annotated[int, Field(ge=1)] | None = None
    """Distinct modalities drawn for each occurrence of an entity in training, from those present; by default 1, or 2 for
    items where there is a contrast."""
    input_size: Annotated[int, Field(ge=1)] = 256
    """Width h of the encoders' output, which is the branch's input."""
    hidden_sizes: tuple[Annotated[int, Field(ge=1)], ...] = (256, 256)
    """Widths of the branch's hidden layers; its output has `embedding_size`."""
    normalize_input: bool = True
    """Whether the branch's input is scaled to length 1."""
    input_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    batch_norm_every: int = 2
    """Batch normalisation after every so many hidden layers; -1 for none."""
    output_activation: bool = True
    """Whether a ReLU follows the output layer."""


class ContrastConfig(Config):
    """The contrastive loss that pulls the modalities of one item together (symmetric InfoNCE)."""

    weight: Annotated[float, Field(ge=0)] = 1e-4
    temperature: Annotated[float, Field(gt=0)] = 0.1


class SiBraRConfig(ModelConfig):
    """SiBraR."""

    type: Literal["sibrar"] = "sibrar"
    embedding_size: Annotated[int, Field(ge=1)] = 128
    users: BranchConfig = BranchConfig()
    items: BranchConfig = BranchConfig()
    contrast: ContrastConfig | None = ContrastConfig()
    """Between the first two modalities drawn of each item; null for none."""
    exclude_target: bool = False
    """Whether the pair that a training example asks about is left out of the user's row and of the item's: otherwise the
    input holds the answer. Not in the paper."""

    @model_validator(mode="after")
    def _contrast_needs_two(self) -> Self:
        if self.contrast is not None and self.items.draws == 1:
            raise ValueError("contrast compares two modalities of an item: set items.draws to 2, or contrast to null")
        return self


class SiBraR(Recommender):
    """Users and items by a single branch each; scores are dot products."""

    def __init__(self, config: SiBraRConfig, dataset: Dataset) -> None:
        """Build the model for a dataset, with torch's global generator."""
        super().__init__()
        self.config = config
        users = config.users.model_copy(update={"draws": config.users.draws or 1})
        items = config.items.model_copy(update={"draws": config.items.draws or (2 if config.contrast else 1)})
        self.users = SingleBranch(users, config.embedding_size, dataset.users, dataset.items, "users")
        self.items = SingleBranch(items, config.embedding_size, dataset.items, dataset.users, "items")

    def forward(self, batch: TrainBatch) -> StepOutput:
        """Scores, and the contrastive loss "info_nce" between the two drawn modalities of each example's candidates."""
        target = batch.items[:, 0] if self.config.exclude_target else None
        asked = F.pad(batch.users[:, None], (0, batch.items.shape[1] - 1), value=-1) if self.config.exclude_target else None
        users = self.users(batch.users, batch.user_modalities, batch.noise_key, target).mean(-2)
        by_modality = self.items(batch.items, batch.item_modalities, batch.noise_key, asked)
        scores = torch.einsum("bd,bnd->bn", users, by_modality.mean(-2))
        contrast = self.config.contrast
        if contrast is None:
            return StepOutput(scores)
        info_nce = symmetric_info_nce(by_modality[..., 0, :], by_modality[..., 1, :], contrast.temperature)
        return StepOutput(scores, {"info_nce": contrast.weight * info_nce})

    def encode_users(self, users: Tensor, hidden: frozenset[str] = NOTHING_HIDDEN) -> Tensor:
        """See `Recommender`."""
        return self.users.encode(users, hidden)

    def encode_items(self, items: Tensor, hidden: frozenset[str] = NOTHING_HIDDEN) -> Tensor:
        """See `Recommender`."""
        return self.items.encode(items, hidden)

    def sampling(self) -> tuple[ModalitySampling, ModalitySampling]:
        """See `Recommender`."""
        return self.users.sampling(), self.items.sampling()

    def modalities(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """See `Recommender`."""
        return self.users.modalities, self.items.modalities

    def without_modality(self, items: bool, hidden: frozenset[str] = NOTHING_HIDDEN) -> int:
        """See `Recommender`."""
        side = self.items if items else self.users
        return int((~side.seen(hidden).any(1)).sum())


class SingleBranch(nn.Module):
    """The encoders of one side, and the branch they share."""

    present: Tensor

    def __init__(self, config: BranchConfig, embedding_size: int, entities: Entities, other: Entities, side: str) -> None:
        """Build for the `entities` of a `side`, whose interactions are with the `other` side."""
        super().__init__()
        known = (INTERACTIONS, *entities.features)
        self.modalities = known if config.modalities is None else config.modalities
        for name in self.modalities:
            if name not in known:
                raise ConfigError(f"model.{side}.modalities: the dataset's {side} have no {name}; {nearest(name, known)}")
        if len(set(self.modalities)) < max(len(self.modalities), 1):
            raise ConfigError(f"model.{side}.modalities must name at least one modality, and each only once")
        self._draws = config.draws or 1
        self._num_entities = entities.count
        self._num_others = other.count
        self.encoders = nn.ModuleDict()
        present = []
        for name in self.modalities:
            if name == INTERACTIONS:
                self.encoders[name] = InteractionsEncoder(entities, other, config.input_size)
                present.append(entities.histories.lengths() > 0)
            else:
                feature = entities.features[name]
                self.encoders[name] = ENCODERS[feature.spec.kind](feature, config.input_size)
                present.append(feature.present)
        self.unknown = nn.Parameter(torch.randn(1, config.input_size) / config.input_size**0.5)
        self.register_buffer("present", torch.stack(present, dim=1), persistent=False)
        self.branch = Branch(config, embedding_size)

    def sampling(self) -> ModalitySampling:
        """How modalities are drawn in training."""
        return ModalitySampling(self.present, self._draws)

    def seen(self, hidden: frozenset[str]) -> Tensor:
        """Which modalities are there once some are hidden: bool [entities, M]."""
        visible = torch.tensor([name not in hidden for name in self.modalities], device=self.present.device)
        return self.present & visible

    def forward(self, entities: Tensor, drawn: Tensor, noise_key: int, excluded: Tensor | None = None) -> Tensor:
        """Embed what was drawn: each distinct (entity, modality) is encoded once, then gathered to where it is used.

        Args:
            entities: int64 [*].
            drawn: int64 [*, draws], positions in `modalities`, or their number for "unknown".
            noise_key: of this step's dropout.
            excluded: int64 [*], entities of the other side, each left out of its entity's interactions; -1: none. What
                is left of the same interactions without different entries counts as different inputs.

        Returns:
            [*, draws, d]
        """
        inputs = drawn * self._num_entities + entities[..., None]
        if excluded is not None:
            if INTERACTIONS in self.modalities:
                excluded = torch.where(drawn == self.modalities.index(INTERACTIONS), excluded[..., None], -1)
                inputs = inputs * (self._num_others + 1) + excluded + 1
            else:
                excluded = None
        distinct, inverse = torch.unique(inputs, return_inverse=True)
        if excluded is None:
            embedded = self._embed(distinct, None, noise_key)
        else:
            others = self._num_others + 1
            embedded = self._embed(distinct // others, distinct % others - 1, noise_key)
        return F.embedding(inverse, embedded)

    def encode(self, entities: Tensor, hidden: frozenset[str] = NOTHING_HIDDEN) -> Tensor:
        """Embed distinct entities int64 [n] from all that is there: the mean over modalities, [n, d]."""
        seen = self.seen(hidden)[entities]
        seen = torch.cat([seen, ~seen.any(1, keepdim=True)], dim=1)  # the last column is "unknown"
        modality, row = torch.nonzero(seen.T, as_tuple=True)
        embedded = self._embed(modality * self._num_entities + entities[row], None, None)
        total = embedded.new_zeros(entities.numel(), embedded.shape[1]).index_add_(0, row, embedded)
        return total / seen.sum(1, keepdim=True)

    def _embed(self, pairs: Tensor, excluded: Tensor | None, noise_key: int | None) -> Tensor:
        """Embed pairs modality · entities + entity, int64 [n], grouped by modality: [n, d].

        Every encoder runs, on no rows if need be, so that all parameters have a gradient on every rank.
        """
        limits = torch.arange(len(self.modalities) + 2, device=pairs.device) * self._num_entities
        starts: list[int] = torch.searchsorted(pairs, limits).tolist()
        encoded = []
        for number, (name, encoder) in enumerate(self.encoders.items()):
            group = slice(starts[number], starts[number + 1])
            entities = pairs[group] - number * self._num_entities
            if name == INTERACTIONS and excluded is not None:
                encoded.append(encoder(entities, excluded[group]))
            else:
                encoded.append(encoder(entities))
        encoded.append(self.unknown.expand(starts[-1] - starts[-2], -1))
        embedded: Tensor = self.branch(torch.cat(encoded), pairs, noise_key)
        return embedded


class Branch(nn.Module):
    """The shared network g: [input dropout] (linear, [batch normalisation], ReLU)*, linear, [ReLU]."""

    def __init__(self, config: BranchConfig, embedding_size: int) -> None:
        """Build the layers."""
        super().__init__()
        self._normalize = config.normalize_input
        self._dropout = config.input_dropout
        sizes = [config.input_size, *config.hidden_sizes, embedding_size]
        layers: list[nn.Module] = []
        for depth, (fan_in, fan_out) in enumerate(pairwise(sizes), start=1):
            layers.append(nn.Linear(fan_in, fan_out))
            is_output = depth == len(sizes) - 1
            if not is_output and config.batch_norm_every > 0 and depth % config.batch_norm_every == 0:
                layers.append(BatchNorm(fan_out))
            if not is_output or config.output_activation:
                layers.append(nn.ReLU())
        self.layers = nn.Sequential(*layers)

    def forward(self, inputs: Tensor, names: Tensor, noise_key: int | None) -> Tensor:
        """Apply to inputs [n, h]; dropout only where a key is given, by the rows' names int64 [n]."""
        if self._normalize:
            inputs = F.normalize(inputs, dim=-1)
        if noise_key is not None and self._dropout > 0:
            inputs = named_dropout(inputs, self._dropout, noise_key, names)
        outputs: Tensor = self.layers(inputs)
        return outputs


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation that, given fewer than two rows to take statistics of, uses those it has gathered so far."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise [n, width]."""
        if self.training and input.shape[0] < 2:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(input)


def named_dropout(inputs: Tensor, rate: float, key: int, names: Tensor) -> Tensor:
    """Dropout whose mask is a hash of (key, row name, column): the same for a row on any rank and in any order.

    Args:
        inputs: [n, h].
        rate: probability of zeroing an element, up to 2^-17; the others are divided by 1 - rate.
        key: of this step.
        names: int64 [n].
    """
    width = inputs.shape[1]
    blocks = torch.arange(math.ceil(width / 4), device=inputs.device)
    # Every hash of 64 bits decides on four columns, by 16 bits each.
    bits = hash64(key, names[:, None] * len(blocks) + blocks).view(torch.int16)[:, :width]
    threshold = round(rate * 2**16) - 2**15
    return inputs * (bits >= threshold).to(inputs.dtype).mul_(1 / (1 - rate))
