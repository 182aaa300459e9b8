"""One side (users or items) of a model: which modalities are read, how they are drawn, and their encoders.

What is absent from the data, not drawn in a step, or hidden on purpose is one mechanism: a modality that is not there. An
entity with nothing there has a learned input of its own, "unknown".
"""

from collections.abc import Iterator, Mapping
from functools import reduce
from typing import Annotated, Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from sibra_dist.config import Config
from sibra_dist.data.batches import EMPTY, ModalitySampling
from sibra_dist.data.dataset import Entities
from sibra_dist.data.presence import Hidden
from sibra_dist.data.user_batches import Shown
from sibra_dist.errors import ConfigError, nearest
from sibra_dist.models.encoder import Encoder, EncoderConfig
from sibra_dist.models.encoders import ID, INTERACTIONS, build_encoder, presence

SideName = Literal["users", "items"]
Aggregation = Literal["mean", "max"]
Width = Annotated[int, Field(ge=1)]
Probability = Annotated[float, Field(ge=0, lt=1)]


PREFIX = "of_"


class ModalitiesConfig(Config):
    """What is read of one side."""

    modalities: tuple[str, ...] | None = None
    """`interactions`, `id` (an embedding of each entity that has training interactions) and names of features; by default
    interactions and every feature of the dataset."""
    encoders: dict[str, EncoderConfig] = {}
    """How single modalities are encoded, by name, where the defaults are not wanted."""


class Rows(NamedTuple):
    """The distinct inputs of one side in a step, grouped by modality, and where each is used."""

    names: Tensor
    """int64 [n], ascending: modality, entity and excluded entity in one number"""
    entities: Tensor
    """int64 [n]"""
    excluded: Tensor | None
    """int64 [n]: an entity of the other side that is left out of the interactions; -1 for none"""
    starts: list[int]
    """Where the rows of each modality start, those of "unknown", and the end."""
    places: Tensor
    """int64 [*, D]: the row of each drawn modality; EMPTY where a slot is not used"""


class SideRead(NamedTuple):
    """The distinct inputs of one side in a step, and the data of each."""

    rows: Rows
    inputs: tuple[Any, ...]
    """What the encoder of each modality has read."""


class ByModality(nn.Module):
    """Encoders by modality, whose names may be any that a feature has: `type` and `training` are attributes of a module too."""

    def __init__(self, modules: Mapping[str, Encoder]) -> None:
        """Hold the encoders; the parameters of `name` begin with `of_name`."""
        super().__init__()
        for name, module in modules.items():
            self.add_module(f"{PREFIX}{name}", module)

    def __getitem__(self, name: str) -> Encoder:
        return cast(Encoder, self.get_submodule(f"{PREFIX}{name}"))

    def items(self) -> Iterator[tuple[str, Encoder]]:
        """Names and encoders, in order."""
        for name, module in self.named_children():
            yield name.removeprefix(PREFIX), cast(Encoder, module)


class SideEncoders(nn.Module):
    """The encoders of one side, each from its input to a vector of width h, and who has what."""

    unknown: Tensor

    def __init__(
        self,
        config: ModalitiesConfig,
        width: int,
        entities: Entities,
        other: Entities,
        side: SideName,
        *,
        learned_unknown: bool = True,
    ) -> None:
        """Build for the `entities` of a `side`, whose interactions are with the `other` side.

        "Unknown" is a learned vector, or zeros.

        Raises:
            ConfigError: a modality is not in the dataset, is named twice, or cannot be encoded as it is asked to be.
        """
        super().__init__()
        features = (INTERACTIONS, *entities.features)
        self.side: SideName = side
        self.modalities = features if config.modalities is None else config.modalities
        for name in self.modalities:
            if name not in (*features, ID):
                raise ConfigError(
                    f"model.{side}.modalities: the dataset's {side} have no {name}; {nearest(name, (*features, ID))}"
                )
        if len(set(self.modalities)) < max(len(self.modalities), 1):
            raise ConfigError(f"model.{side}.modalities must name at least one modality, and each only once")
        require_modalities(config.encoders, self.modalities, f"model.{side}.encoders")
        self._num_entities = entities.count
        self._num_others = other.count
        self.encoders = ByModality(
            {
                name: build_encoder(
                    name, entities, other, width, config.encoders.get(name, EncoderConfig()), f"model.{side}.encoders"
                )
                for name in self.modalities
            }
        )
        if learned_unknown:
            self.unknown = nn.Parameter(torch.randn(1, width) / width**0.5)
        else:
            self.register_buffer("unknown", torch.zeros(1, width), persistent=False)
        self.present = torch.stack([presence(name, entities) for name in self.modalities], dim=1)

    def sampling(
        self, draws: int | None = None, first: str | None = None, dropout: Mapping[str, float] | None = None
    ) -> ModalitySampling:
        """How modalities are drawn in training: see `ModalitySampling`, where they have numbers instead of names."""
        central = None if first is None else self.modalities.index(first)
        rates = tuple(dropout.get(name, 0.0) for name in self.modalities) if dropout else None
        interactions = self.modalities.index(INTERACTIONS) if INTERACTIONS in self.modalities else None
        return ModalitySampling(self.present, draws, central, rates, interactions)

    def seen(self, entities: Tensor, hidden: Hidden) -> Tensor:
        """Which modalities of entities int64 [n] are there once some are hidden: bool [n, M]."""
        return self.present[entities] & hidden.visible(self.modalities, entities)

    def seen_of_all(self, hidden: Hidden) -> Tensor:
        """Which modalities of every entity are there: bool [entities, M]."""
        return self.seen(torch.arange(self._num_entities, device=self.present.device), hidden)

    def all_seen(self, entities: Tensor, hidden: Hidden) -> Tensor:
        """What a draw of all that is there gives: int64 [n, M], as `sibra_dist.data.batches.draw_modalities`."""
        seen = self.seen(entities, hidden)
        drawn = torch.where(seen, torch.arange(len(self.modalities), device=seen.device), EMPTY)
        drawn[:, 0] = torch.where(seen.any(1), drawn[:, 0], len(self.modalities))
        return drawn

    def rows(self, entities: Tensor, drawn: Tensor, excluded: Tensor | None = None) -> Rows:
        """What has to be encoded, so that each distinct input is encoded once.

        Args:
            entities: int64 [*].
            drawn: int64 [*, D], positions in `modalities`, their number for "unknown", or EMPTY.
            excluded: int64 [*], entities of the other side, each left out of its entity's interactions; -1: none. What
                is left of the same interactions without different entries counts as different inputs.
        """
        used = drawn != EMPTY
        # An unused slot stands for an input that is there anyway: that of some used one.
        modality = torch.where(used, drawn, drawn.amax(-1, keepdim=True))
        names = modality * self._num_entities + entities[..., None]
        others = self._num_others + 1
        if excluded is not None and INTERACTIONS in self.modalities:
            left_out = torch.where(modality == self.modalities.index(INTERACTIONS), excluded[..., None], -1)
            names, inverse = torch.unique(names * others + left_out + 1, return_inverse=True)
            pairs, out = names // others, names % others - 1
        else:
            names, inverse = torch.unique(names, return_inverse=True)
            pairs, out = names, None
        limits = torch.arange(len(self.modalities) + 2, device=pairs.device) * self._num_entities
        starts: list[int] = torch.searchsorted(pairs, limits).tolist()
        return Rows(names, pairs % self._num_entities, out, starts, torch.where(used, inverse, EMPTY))

    def read(self, rows: Rows, key: int | None = None, shown: Shown | None = None) -> "SideRead":
        """The data of rows; `key` is that of the step's draws, None in evaluation, and `shown` the interactions it shows."""
        seen = shown.of_items() if shown is not None and self.side == "items" else shown
        inputs = []
        for number, (_, encoder) in enumerate(self.encoders.items()):
            group = slice(rows.starts[number], rows.starts[number + 1])
            excluded = None if rows.excluded is None else rows.excluded[group]
            inputs.append(encoder.read(rows.entities[group], key, excluded, seen))
        return SideRead(rows, tuple(inputs))

    def forward(self, read: "SideRead") -> Tensor:
        """Encode what was read of n rows: [n, h].

        Every encoder runs, on no rows if need be, so that all parameters have a gradient on every rank.
        """
        encoded = [encoder.encode(inputs) for (_, encoder), inputs in zip(self.encoders.items(), read.inputs, strict=True)]
        encoded.append(self.unknown.expand(read.rows.starts[-1] - read.rows.starts[-2], -1))
        return torch.cat(encoded)


def views(embedded: Tensor, places: Tensor) -> list[Tensor]:
    """The embeddings of drawn modalities, slot by slot: rows [n, d] at places int64 [*, D] give D of [*, d].

    An unused slot holds what a used one holds.
    """
    filled = torch.where(places == EMPTY, places.amax(-1, keepdim=True), places)
    return [F.embedding(slot, embedded) for slot in filled.unbind(-1)]


def aggregate(views: list[Tensor], places: Tensor, how: Aggregation) -> Tensor:
    """The mean, or the elementwise maximum, of the used slots of D views [*, d] at places int64 [*, D]: [*, d]."""
    if how == "max":
        return reduce(torch.maximum, views)
    if len(views) <= 2:  # in which what stands twice is its own mean
        return reduce(torch.add, views) / len(views)
    used = places != EMPTY
    shares = used / used.sum(-1, keepdim=True)
    return reduce(torch.add, [view * share[..., None] for view, share in zip(views, shares.unbind(-1), strict=True)])


def require_modalities(named: Mapping[str, object], modalities: tuple[str, ...], where: str) -> None:
    """Raise a `ConfigError` unless all that is named at `where` is read by the model."""
    for name in named:
        if name not in modalities:
            raise ConfigError(f"{where}: the model reads no modality {name} there; {nearest(name, modalities)}")
