"""What every encoder is: a reader of the data of some entities, and parameters that make vectors of what was read.

An encoder is an input layer (a bag sum, an embedding, or linear), hidden layers, and an output of width h. It works in two
halves. `read` looks up the data of entities: it touches no parameter, so a step's can be read while the step before is
still computed, and from data that lie on another device than the parameters. `encode` makes vectors of what was read; its
shapes are known by then, so nothing in it waits for the device.
"""

from abc import ABC, abstractmethod
from itertools import pairwise
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from sibra_dist.config import Config
from sibra_dist.data.user_batches import Shown
from sibra_dist.models.linear import Initialization, UnitLength, initialize_linear
from sibra_dist.models.weighting import Weighting


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
    """What an interaction counts: see `sibra_dist.models.weighting.weigh`. For interactions only."""
    max_history: Annotated[int, Field(ge=1)] | None = None
    """Interactions of an entity that a training step reads at most, drawn anew in each step; their sum is scaled so that
    that of all is its expected value. Evaluation reads all. For interactions only."""


class Input(NamedTuple):
    """A tensor that tells one modality of n entities, where that is given and not looked up in a dataset."""

    suffix: str
    """What follows the modality's name in the tensor's; empty where one tensor tells all."""
    dtype: torch.dtype
    shape: tuple[str | int, ...]
    """`n`: entities; `entries`: those of the lists of all entities."""
    meaning: str
    bound: int | None = None
    """Values are whole numbers from 0 to below this; None: any number."""


def list_inputs(bound: int, what: str) -> tuple[Input, Input]:
    """The tensors that tell a list of numbers of each entity."""
    return (
        Input(".indices", torch.int64, ("entries",), f"{what}, the lists of all entities end to end", bound),
        Input(".offsets", torch.int64, ("n",), "where the list of each entity starts, in .indices"),
    )


class Encoder(nn.Module, ABC):
    """Encodes one modality of one side.

    It is only ever asked about entities that have the modality. Every parameter has a gradient after every backward pass,
    be there rows or none: ranks must not differ in that. The data it reads are the dataset's, neither parameters nor
    buffers.
    """

    @abstractmethod
    def read(self, entities: Tensor, key: int | None = None, excluded: Tensor | None = None, shown: Shown | None = None) -> Any:
        """The data of `entities` int64 [n], distinct but for what is excluded: tensors, as `encode` wants them.

        Args:
            entities: on the device of the data.
            key: of a training step's draws; None in evaluation.
            excluded: int64 [n], entities of the other side that are left out of the interactions; -1: none is. Only
                interactions read it, and `shown`.
            shown: the interactions that the step shows; None: all.
        """

    @abstractmethod
    def inputs(self) -> tuple[Input, ...]:
        """The tensors that tell the modality of entities that need not be in the dataset."""

    @abstractmethod
    def given(self, *tensors: Tensor) -> Any:
        """What `read` gives in evaluation, of entities of which the tensors that `inputs` names tell."""

    @abstractmethod
    def encode(self, read: Any) -> Tensor:
        """Vectors [n, h] of what was read, on the device of the parameters."""

    def forward(
        self, entities: Tensor, key: int | None = None, excluded: Tensor | None = None, shown: Shown | None = None
    ) -> Tensor:
        """Both halves, for data and parameters on one device."""
        return self.encode(self.read(entities, key, excluded, shown))


def layers(config: EncoderConfig, width: int, *, activation: bool) -> nn.Sequential:
    """What follows the input layer; `activation` is the default of that kind of modality."""
    modules: list[nn.Module] = []
    for fan_in, fan_out in pairwise((*config.hidden_sizes, width)):
        modules += [nn.ReLU(), linear(fan_in, fan_out, config)]
    if activation if config.activation is None else config.activation:
        modules.append(nn.ReLU())
    if config.normalize == "l2":
        modules.append(UnitLength())
    elif config.normalize == "layer":
        modules.append(nn.LayerNorm(width))
    return nn.Sequential(*modules)


def linear(fan_in: int, fan_out: int, config: EncoderConfig) -> nn.Linear:
    """A linear layer, initialised as the configuration says."""
    layer = nn.Linear(fan_in, fan_out)
    if config.initialization != "uniform":
        initialize_linear(layer.weight, layer.bias, config.initialization, fan_in)
    return layer
