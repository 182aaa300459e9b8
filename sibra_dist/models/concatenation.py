"""A network that reads all that is known of an entity at once: the encodings side by side, zeros where one is missing."""

from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from sibra_dist.data.batches import EMPTY
from sibra_dist.data.user_batches import Shown
from sibra_dist.errors import ConfigError
from sibra_dist.models.branch import Branch, BranchConfig
from sibra_dist.models.side import SideEncoders, SideRead, Width, views


class NetworkConfig(BranchConfig):
    """The network: [input dropout] (linear, [batch normalisation], ReLU)*, linear, [ReLU]."""

    input_size: Width = 128
    """Width of each modality's encoding. The network reads them side by side: so much a modality."""
    hidden_sizes: tuple[Width, ...] = (256,)
    """Widths of the hidden layers; the output has `embedding_size`."""
    normalize_input: bool = False
    """Whether the network's input is scaled to length 1."""
    input_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of zeroing an element of the input in training."""
    batch_norm_every: int = -1
    """Batch normalisation after every so many hidden layers; -1 for none."""
    output_activation: bool = False
    """Whether a ReLU follows the output layer."""


class Concatenation(nn.Module):
    """The encoders of one side, and a network over what they give side by side."""

    def __init__(self, encoders: SideEncoders, config: NetworkConfig, embedding_size: int) -> None:
        """Build the network.

        Raises:
            ConfigError: there are so many modalities that an entity and what it has do not fit into one number.
        """
        super().__init__()
        count, self._num_modalities = encoders.present.shape
        if count << (self._num_modalities + 1) >= 2**63:  # with one more: a caller may have an id beside them
            raise ConfigError(
                f"model.{encoders.side}: {self._num_modalities} modalities are too many for {count} {encoders.side}; name fewer"
            )
        self.encoders = encoders
        whole = config.model_copy(update={"input_size": self._num_modalities * config.input_size})
        self.network = Branch(whole, embedding_size)

    def read(self, entities: Tensor, seen: Tensor, key: int | None = None, shown: Shown | None = None) -> "ConcatenationRead":
        """What is needed of entities int64 [*] of which the modalities `seen`, bool [*, M], are there.

        Each distinct modality of an entity is encoded once, and each distinct entity with what is seen of it passes
        through the network once. `key` is that of the step's draws, None in evaluation, and `shown`
        the interactions it shows.
        """
        distinct = distinct_inputs(entities, seen)
        drawn = torch.where(distinct.seen, torch.arange(self._num_modalities, device=seen.device), EMPTY)
        # Whoever has nothing is encoded as "unknown", which is zeros.
        drawn[:, 0] = torch.where(distinct.seen.any(1), drawn[:, 0], self._num_modalities)
        return ConcatenationRead(distinct, self.encoders.read(self.encoders.rows(distinct.entities, drawn), key, shown), key)

    def forward(self, read: "ConcatenationRead") -> Tensor:
        """Embeddings [*, d] of what was read."""
        distinct, side, key = read
        places = side.rows.places
        encodings = torch.stack(views(self.encoders(side), places), -2) * (places != EMPTY)[..., None]
        return F.embedding(distinct.inverse, self.network(encodings.flatten(1), distinct.names, key))


class DistinctInputs(NamedTuple):
    """Entities and what is seen of them, each once."""

    names: Tensor
    """int64 [n], ascending: both in one number"""
    entities: Tensor
    """int64 [n]"""
    seen: Tensor
    """bool [n, M]"""
    inverse: Tensor
    """int64 [*]: where each is that was asked for"""


class ConcatenationRead(NamedTuple):
    """What is needed of some entities."""

    distinct: DistinctInputs
    side: SideRead
    key: int | None
    """Of the step's draws; None in evaluation"""


def distinct_inputs(entities: Tensor, seen: Tensor) -> DistinctInputs:
    """The distinct inputs among entities int64 [*] of which the modalities `seen`, bool [*, M], are there."""
    bits = seen.shape[-1]
    modality = torch.arange(bits, device=seen.device)
    names, inverse = torch.unique((entities << bits) + (seen << modality).sum(-1), return_inverse=True)
    return DistinctInputs(names, names >> bits, (names[:, None] >> modality) & 1 == 1, inverse)


def seen_modalities(drawn: Tensor, num_modalities: int) -> Tensor:
    """Which of M modalities are among those drawn, int64 [*, D]: bool [*, M]."""
    return (drawn[..., None] == torch.arange(num_modalities, device=drawn.device)).any(-2)
