"""Encoders: one a modality, each from an entity's input to a vector of width h.

All take distinct `entities` int64 [n], the `key` of a training step's draws (None in evaluation) and, for interactions
alone, entities of the other side that are `excluded`; they give float [n, h]. They are only ever asked about entities that
have the modality. An encoder is an input layer (a bag sum, an embedding, or linear), hidden layers, and an output. Every
parameter has a gradient after every backward pass, be there rows or none: ranks must not differ in that.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Annotated, Literal
from zlib import crc32

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from sibra_dist.config import Config
from sibra_dist.data.batches import SHOWN, stream
from sibra_dist.data.dataset import Csr, Entities, Feature
from sibra_dist.data.user_batches import Shown
from sibra_dist.errors import ConfigError, nearest
from sibra_dist.models.branch import named_dropout
from sibra_dist.models.histories import Entries, Histories, Weighting, Whole, bag_sum, weigh
from sibra_dist.models.linear import Initialization, UnitLength, initialize_linear

INTERACTIONS, ID = "interactions", "id"


class EncoderConfig(Config):
    """How one modality of one side is encoded."""

    hidden_sizes: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Widths of the layers between the input and the output of width h, each with a ReLU."""
    normalize: Literal["none", "l2", "layer"] = "none"
    """Of the output: `l2` scales it to length 1, `layer` is layer normalisation with learned scale and shift."""
    activation: bool | None = None
    """Whether a ReLU follows the output layer, before it is normalised; null: after interactions, numbers and vectors, and
    not after id, categories and tags."""
    initialization: Initialization = "uniform"
    """Of linear layers, that on interactions included: torch's own, or that of Glorot and Bengio (2010), with biases 0."""
    input_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of zeroing an element of the input in training. For numbers and vectors only."""
    weighting: Weighting = "binary"
    """What an interaction counts: see `sibra_dist.models.histories.weigh`. For interactions only."""
    max_history: Annotated[int, Field(ge=1)] | None = None
    """Interactions of an entity that a training step reads at most, drawn anew in each step; their sum is scaled so that
    that of all is its expected value. Evaluation reads all. For interactions only."""


class InteractionsEncoder(nn.Module):
    """A linear layer, and by default a ReLU, on the row of training interactions, without ever making the row.

    The product of a row and a weight matrix is the sum of those rows of the matrix that the row's entries select, each
    times what the entry counts: a bag sum.
    """

    values: Tensor | None
    transposed_values: Tensor | None

    def __init__(
        self, entities: Entities, other: Entities, width: int, config: EncoderConfig | None = None, where: str = "encoder"
    ) -> None:
        """Read the histories of `entities` over the `other` side; `other.histories` is the same matrix transposed.

        Raises:
            ConfigError: the dataset has not got the weights that are asked for; `where` is the encoder's key.
        """
        super().__init__()
        config = config or EncoderConfig()
        histories = weigh(config.weighting, entities, other, f"{where}.weighting")
        inner = (*config.hidden_sizes, width)[0]
        self.weight = nn.Parameter(torch.empty(other.count, inner))
        self.bias = nn.Parameter(torch.empty(inner))
        initialize_linear(self.weight, self.bias, config.initialization, other.count)
        self.layers = _layers(config, width, activation=True)
        longest = int(histories.rows.lengths().max()) if entities.count else 0
        # A cap that no row reaches is none: whole rows are faster to read.
        self._max_history = config.max_history if config.max_history is not None and config.max_history < longest else None
        _hold(self, "histories", histories.rows)
        _hold(self, "transposed", histories.transposed)
        self.register_buffer("values", histories.values, persistent=False)
        self.register_buffer("transposed_values", histories.transposed_values, persistent=False)

    def forward(
        self,
        entities: Tensor,
        key: int | None = None,
        excluded: Tensor | None = None,
        shown: Shown | None = None,
    ) -> Tensor:
        """See the module's docstring; with `excluded` int64 [n], that entry is left out of each row (-1: none is).

        Entities may then repeat. An excluded entry must be in the row. The other entries count what they did: document
        lengths and frequencies are the dataset's. With `shown` only those entries are read that it says of, and nothing is
        excluded; their sum is divided by the share that is shown, so that that of all is its expected value.
        """
        if shown is not None:
            sums = self._shown_sums(entities, shown, key)
        elif key is not None and self._max_history is not None:
            sums = self._drawn_sums(entities, excluded, self._max_history, key)
        elif excluded is None:
            sums = self._whole_sums(entities)
        else:
            # What is read is each distinct row, once and whole; then one row of the table is taken away again.
            distinct, inverse = torch.unique(entities, return_inverse=True)
            sums = F.embedding(inverse, self._whole_sums(distinct))
            rows = torch.nonzero(excluded >= 0).flatten()
            left_out = F.embedding(excluded[rows], self.weight)
            histories = self._histories()
            if histories.values is not None:
                left_out = left_out * histories.values[histories.find(entities[rows], excluded[rows])][:, None]
            sums = sums.index_add(0, rows, left_out, alpha=-1)  # to distinct rows, so in any order the same
        encoded: Tensor = self.layers(sums + self.bias)
        return encoded

    def _whole_sums(self, entities: Tensor) -> Tensor:
        histories = self._histories()
        return bag_sum(self.weight, histories.whole(entities), Whole(entities, histories))

    def _drawn_sums(self, entities: Tensor, excluded: Tensor | None, at_most: int, key: int) -> Tensor:
        entries, available = self._histories().drawn(entities, excluded, at_most, key)
        scale = (available.to(self.weight.dtype) / at_most).clamp(min=1)
        return bag_sum(self.weight, entries) * scale[:, None]

    def _shown_sums(self, entities: Tensor, shown: Shown, key: int | None) -> Tensor:
        entries, available = self._histories().some(entities, shown)
        scale = torch.full_like(available, 1 / shown.share, dtype=self.weight.dtype)
        if key is not None and self._max_history is not None:
            entries = entries.at_most(self._max_history, stream(key, SHOWN), entities)
            scale *= (available / self._max_history).clamp(min=1)
        return bag_sum(self.weight, entries) * scale[:, None]

    def _histories(self) -> Histories:
        return Histories(_held(self, "histories"), _held(self, "transposed"), self.values, self.transposed_values)


class IdEncoder(nn.Module):
    """An embedding of each entity.

    It starts with standard deviation 1 / sqrt(width), so that its squared length is 1 on average whatever the width: a dot
    product of two is then as small as that of random directions, and the branch gets what it gets of an input scaled to
    length 1, and of the "unknown" one.
    """

    def __init__(self, entities: Entities, width: int, config: EncoderConfig) -> None:
        """Hold an embedding of each of `entities`."""
        super().__init__()
        inner = (*config.hidden_sizes, width)[0]
        self.embedding = nn.Embedding(entities.count, inner)
        nn.init.normal_(self.embedding.weight, std=inner**-0.5)
        self.layers = _layers(config, width, activation=False)

    def forward(self, entities: Tensor, key: int | None = None, excluded: Tensor | None = None) -> Tensor:
        """See the module's docstring."""
        encoded: Tensor = self.layers(self.embedding(entities))
        return encoded


class CategoryEncoder(nn.Module):
    """An embedding of the category's code."""

    codes: Tensor

    def __init__(self, feature: Feature, width: int, config: EncoderConfig) -> None:
        """Read a `category` feature."""
        super().__init__()
        assert isinstance(feature.values, Tensor)
        self.embedding = nn.Embedding(feature.spec.size, (*config.hidden_sizes, width)[0])
        self.layers = _layers(config, width, activation=False)
        self.register_buffer("codes", feature.values, persistent=False)

    def forward(self, entities: Tensor, key: int | None = None, excluded: Tensor | None = None) -> Tensor:
        """See the module's docstring."""
        encoded: Tensor = self.layers(self.embedding(self.codes[entities]))
        return encoded


class TagsEncoder(nn.Module):
    """The sum of the embeddings of the tags."""

    def __init__(self, feature: Feature, width: int, config: EncoderConfig) -> None:
        """Read a `tags` feature."""
        super().__init__()
        assert isinstance(feature.values, Csr)
        self.embedding = nn.Embedding(feature.spec.size, (*config.hidden_sizes, width)[0])
        self.layers = _layers(config, width, activation=False)
        _hold(self, "tags", feature.values)

    def forward(self, entities: Tensor, key: int | None = None, excluded: Tensor | None = None) -> Tensor:
        """See the module's docstring."""
        encoded: Tensor = self.layers(bag_sum(self.embedding.weight, Entries(*_held(self, "tags").gather(entities))))
        return encoded


class DenseEncoder(nn.Module):
    """A linear layer, and by default a ReLU, on a vector or on numbers."""

    inputs: Tensor

    def __init__(self, feature: Feature, width: int, config: EncoderConfig) -> None:
        """Read a `vector` or `numeric` feature."""
        super().__init__()
        assert isinstance(feature.values, Tensor)
        self.linear = _linear(feature.spec.size, (*config.hidden_sizes, width)[0], config)
        self.layers = _layers(config, width, activation=True)
        self._dropout = config.input_dropout
        self._stream = crc32(feature.spec.name.encode())  # features of equal length lose different elements
        self.register_buffer("inputs", feature.values, persistent=False)

    def forward(self, entities: Tensor, key: int | None = None, excluded: Tensor | None = None) -> Tensor:
        """See the module's docstring."""
        inputs = self.inputs[entities]
        if key is not None and self._dropout > 0:
            inputs = named_dropout(inputs, self._dropout, stream(key, self._stream), entities)
        encoded: Tensor = self.layers(self.linear(inputs))
        return encoded


ENCODERS: dict[str, Callable[[Feature, int, EncoderConfig], nn.Module]] = {
    "category": CategoryEncoder,
    "tags": TagsEncoder,
    "numeric": DenseEncoder,
    "vector": DenseEncoder,
}


def build_encoder(
    name: str, entities: Entities, other: Entities, width: int, config: EncoderConfig, where: str = "encoders"
) -> nn.Module:
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


def presence(name: str, entities: Entities) -> Tensor:
    """Which entities have a modality: bool [count]. `interactions` and `id`: those with training interactions."""
    if name in (INTERACTIONS, ID):
        return entities.histories.lengths() > 0
    return entities.features[name].present


def _layers(config: EncoderConfig, width: int, *, activation: bool) -> nn.Sequential:
    """What follows the input layer; `activation` is the default of that kind of modality."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise((*config.hidden_sizes, width)):
        layers += [nn.ReLU(), _linear(fan_in, fan_out, config)]
    if activation if config.activation is None else config.activation:
        layers.append(nn.ReLU())
    if config.normalize == "l2":
        layers.append(UnitLength())
    elif config.normalize == "layer":
        layers.append(nn.LayerNorm(width))
    return nn.Sequential(*layers)


def _linear(fan_in: int, fan_out: int, config: EncoderConfig) -> nn.Linear:
    linear = nn.Linear(fan_in, fan_out)
    if config.initialization != "uniform":
        initialize_linear(linear.weight, linear.bias, config.initialization, fan_in)
    return linear


def _hold(module: nn.Module, name: str, matrix: Csr) -> None:
    """Keep a sparse matrix as buffers, which follow the module to its device and are not saved with it."""
    module.register_buffer(f"{name}_indptr", matrix.indptr, persistent=False)
    module.register_buffer(f"{name}_indices", matrix.indices, persistent=False)


def _held(module: nn.Module, name: str) -> Csr:
    return Csr(module.get_buffer(f"{name}_indptr"), module.get_buffer(f"{name}_indices"))
