"""Encoders: one a modality, each from an entity's input to a vector of width h; see `sibra_dist.models.encoder`."""

from collections.abc import Callable
from typing import NamedTuple
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sibra_dist.data.batches import stream
from sibra_dist.data.dataset import Csr, Entities, Feature
from sibra_dist.data.user_batches import Shown
from sibra_dist.errors import ConfigError, nearest
from sibra_dist.models.bag_sums import Bags, bag_sum, plan_gradient
from sibra_dist.models.branch import named_dropout
from sibra_dist.models.encoder import Encoder, EncoderConfig, Input, layers, linear, list_inputs
from sibra_dist.models.histories import Entries
from sibra_dist.models.interactions import InteractionsEncoder
from sibra_dist.models.tables import Lookup, Table

INTERACTIONS, ID = "interactions", "id"


class IdEncoder(Encoder):
    """An embedding of each entity.

    It starts with standard deviation 1 / sqrt(width), so that its squared length is 1 on average whatever the width: a dot
    product of two is then as small as that of random directions, and the branch gets what it gets of an input scaled to
    length 1, and of the "unknown" one.
    """

    def __init__(self, entities: Entities, width: int, config: EncoderConfig) -> None:
        """Hold an embedding of each of `entities`."""
        super().__init__()
        inner = (*config.hidden_sizes, width)[0]
        self.embedding = Table(entities.known, inner, lambda weight: weight.normal_(std=inner**-0.5))
        self.layers = layers(config, width, activation=False)

    def read(
        self, entities: Tensor, key: int | None = None, excluded: Tensor | None = None, shown: Shown | None = None
    ) -> Lookup:
        """See `Encoder`."""
        return self.embedding.plan_lookup(entities)

    def inputs(self) -> tuple[Input, ...]:
        """See `Encoder`."""
        return (id_input(self.embedding),)

    def given(self, *tensors: Tensor) -> Lookup:
        """See `Encoder`."""
        (rows,) = tensors
        return Lookup(rows)

    def encode(self, read: Lookup) -> Tensor:
        """See `Encoder`."""
        encoded: Tensor = self.layers(self.embedding.lookup(read))
        return encoded


class CategoryEncoder(Encoder):
    """An embedding of the category's code."""

    def __init__(self, feature: Feature, width: int, config: EncoderConfig) -> None:
        """Read a `category` feature."""
        super().__init__()
        assert isinstance(feature.values, Tensor)
        self.embedding = nn.Embedding(feature.spec.size, (*config.hidden_sizes, width)[0])
        self.layers = layers(config, width, activation=False)
        self._codes = feature.values

    def read(
        self, entities: Tensor, key: int | None = None, excluded: Tensor | None = None, shown: Shown | None = None
    ) -> Tensor:
        """See `Encoder`."""
        return self._codes[entities]

    def inputs(self) -> tuple[Input, ...]:
        """See `Encoder`."""
        return (Input("", torch.int64, ("n",), "code of the category", self.embedding.num_embeddings),)

    def given(self, *tensors: Tensor) -> Tensor:
        """See `Encoder`."""
        (codes,) = tensors
        return codes

    def encode(self, read: Tensor) -> Tensor:
        """See `Encoder`."""
        encoded: Tensor = self.layers(self.embedding(read))
        return encoded


class TagsEncoder(Encoder):
    """The sum of the embeddings of the tags."""

    def __init__(self, feature: Feature, width: int, config: EncoderConfig) -> None:
        """Read a `tags` feature."""
        super().__init__()
        assert isinstance(feature.values, Csr)
        self.embedding = nn.Embedding(feature.spec.size, (*config.hidden_sizes, width)[0])
        self.layers = layers(config, width, activation=False)
        self._tags = feature.values

    def read(
        self, entities: Tensor, key: int | None = None, excluded: Tensor | None = None, shown: Shown | None = None
    ) -> Bags:
        """See `Encoder`."""
        entries = Entries(*self._tags.gather(entities))
        return Bags(entries, None if key is None else plan_gradient(entries))

    def inputs(self) -> tuple[Input, ...]:
        """See `Encoder`."""
        return list_inputs(self.embedding.num_embeddings, "codes of the tags")

    def given(self, *tensors: Tensor) -> Bags:
        """See `Encoder`."""
        return Bags(Entries(*tensors))

    def encode(self, read: Bags) -> Tensor:
        """See `Encoder`."""
        encoded: Tensor = self.layers(bag_sum(self.embedding.weight, *read))
        return encoded


class RowsOf(NamedTuple):
    """Rows of a tensor that is at hand, not yet taken: a step in parts reads all of them before it computes the first."""

    values: Tensor
    """[N, *]"""
    rows: Tensor
    """int64 [n]"""


class DenseEncoder(Encoder):
    """A linear layer, and by default a ReLU, on a vector or on numbers."""

    def __init__(self, feature: Feature, width: int, config: EncoderConfig) -> None:
        """Read a `vector` or `numeric` feature."""
        super().__init__()
        assert isinstance(feature.values, Tensor)
        self.linear = linear(feature.spec.size, (*config.hidden_sizes, width)[0], config)
        self.layers = layers(config, width, activation=True)
        self._dropout = config.input_dropout
        self._stream = crc32(feature.spec.name.encode())  # features of equal length lose different elements
        self._inputs = feature.values

    def read(
        self, entities: Tensor, key: int | None = None, excluded: Tensor | None = None, shown: Shown | None = None
    ) -> Tensor | RowsOf:
        """See `Encoder`."""
        if key is not None and self._dropout > 0:
            return named_dropout(self._inputs[entities], self._dropout, stream(key, self._stream), entities)
        resident = self._inputs.device == self.linear.weight.device
        return RowsOf(self._inputs, entities) if resident else self._inputs[entities]

    def inputs(self) -> tuple[Input, ...]:
        """See `Encoder`."""
        return (Input("", torch.float32, ("n", self.linear.in_features), "the numbers, as the dataset has them"),)

    def given(self, *tensors: Tensor) -> Tensor:
        """See `Encoder`."""
        (numbers,) = tensors
        return numbers

    def encode(self, read: Tensor | RowsOf) -> Tensor:
        """See `Encoder`."""
        inputs = read.values[read.rows] if isinstance(read, RowsOf) else read
        encoded: Tensor = self.layers(self.linear(inputs.to(self.linear.weight.dtype)))
        return encoded


ENCODERS: dict[str, Callable[[Feature, int, EncoderConfig], Encoder]] = {
    "category": CategoryEncoder,
    "tags": TagsEncoder,
    "numeric": DenseEncoder,
    "vector": DenseEncoder,
}


def build_encoder(
    name: str, entities: Entities, other: Entities, width: int, config: EncoderConfig, where: str = "encoders"
) -> Encoder:
    """Build the encoder of one modality of `entities`, with torch's global generator.

    Args:
        name: `interactions`, `id` or a feature.
        entities: whose modality it is.
        other: the other side, with which their interactions are.
        width: h, of the output.
        config: how it is encoded.
        where: the key of all encoders of this side in the configuration, such as `model.items.encoders`; for errors.

    Raises:
        ConfigError: the dataset has no such modality, or lacks what the configuration asks for, or the configuration asks
            for what this kind of modality does not have.
    """
    where = f"{where}.{name}"
    known = (INTERACTIONS, ID, *entities.features)
    if name not in known:
        raise ConfigError(f"{where}: there is no such modality; {nearest(name, known)}")
    kind = name if name in (INTERACTIONS, ID) else entities.features[name].spec.kind
    if config.input_dropout and kind not in ("numeric", "vector"):
        raise ConfigError(f"{where}.input_dropout: only numbers and vectors have it; leave it out")
    if kind == INTERACTIONS:
        return InteractionsEncoder(entities, other, width, config, where)
    for key in ("weighting", "max_history"):
        if getattr(config, key) != EncoderConfig.model_fields[key].default:
            raise ConfigError(f"{where}.{key}: only interactions have it; leave it out")
    if config.initialization != "uniform" and not config.hidden_sizes and kind in (ID, "category", "tags"):
        raise ConfigError(f"{where}.initialization: there is no linear layer; set hidden_sizes, or leave it out")
    if name == ID:
        return IdEncoder(entities, width, config)
    return ENCODERS[kind](entities.features[name], width, config)


def id_input(table: Table) -> Input:
    """The tensor that tells whose rows of a table are looked up."""
    return Input("", torch.int64, ("n",), "number of the entity: its row in embeddings.npy", table.rows)


def presence(name: str, entities: Entities) -> Tensor:
    """Which entities have a modality: bool [count].

    `interactions`: those with training interactions. `id`: those of them that the parameters know of.
    """
    if name == INTERACTIONS:
        return entities.histories.lengths() > 0
    if name == ID:
        return F.pad(entities.known_histories.lengths() > 0, (0, entities.newcomers))
    return entities.features[name].present
