"""The branch: the network that all modalities of a side, or of both sides, share."""

import math
from itertools import pairwise
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from sibra_dist.config import Config
from sibra_dist.data.batches import hash64
from sibra_dist.models.linear import Initialization, initialize_linear, unit_length

Width = Annotated[int, Field(ge=1)]


class BranchConfig(Config):
    """The branch g: [input dropout] (linear, [batch normalisation], ReLU)*, linear, [ReLU]."""

    input_size: Width = 256
    """Width h of the encoders' output, which is the branch's input."""
    hidden_sizes: tuple[Width, ...] | None = (256, 256)
    """Widths of the branch's hidden layers; its output has `embedding_size`. null: no branch, what encoders give is the
    embedding, and `input_size` must be `embedding_size`."""
    normalize_input: bool = True
    """Whether the branch's input is scaled to length 1."""
    input_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Probability of zeroing an element of the input in training."""
    batch_norm_every: int = 2
    """Batch normalisation after every so many hidden layers; -1 for none."""
    output_activation: bool = True
    """Whether a ReLU follows the output layer."""
    initialization: Initialization = "uniform"
    """Of the linear layers; torch's own, or Xavier's with biases of zero."""


class Branch(nn.Module):
    """See `BranchConfig`."""

    def __init__(self, config: BranchConfig, embedding_size: int) -> None:
        """Build the layers."""
        super().__init__()
        self._normalize = config.normalize_input
        self._dropout = config.input_dropout
        sizes = [] if config.hidden_sizes is None else [config.input_size, *config.hidden_sizes, embedding_size]
        layers: list[nn.Module] = []
        for depth, (fan_in, fan_out) in enumerate(pairwise(sizes), start=1):
            linear = nn.Linear(fan_in, fan_out)
            if config.initialization != "uniform":
                initialize_linear(linear.weight, linear.bias, config.initialization, fan_in)
            layers.append(linear)
            is_output = depth == len(sizes) - 1
            if not is_output and config.batch_norm_every > 0 and depth % config.batch_norm_every == 0:
                layers.append(BatchNorm(fan_out))
            if not is_output or config.output_activation:
                layers.append(nn.ReLU())
        self.layers = nn.Sequential(*layers)

    def forward(self, inputs: Tensor, names: Tensor | None = None, noise_key: int | None = None) -> Tensor:
        """Apply to inputs [n, h]; dropout only where a key is given, by the rows' names int64 [n]."""
        if self._normalize:
            inputs = unit_length(inputs)
        if names is not None and noise_key is not None and self._dropout > 0:
            inputs = named_dropout(inputs, self._dropout, noise_key, names)
        outputs: Tensor = self.layers(inputs)
        return outputs


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation whose running statistics are right after few steps too.

    They start from 0 and are divided by the weight that all batches so far have in them, 1 - (1 - momentum)^n after n, as the
    moments of Adam are; a model that has made few steps of large batches is judged by what it has seen. Before the first
    batch they are mean 0 and variance 1. Given fewer than two rows to take statistics of, training uses the running ones.
    """

    seen: Tensor
    """The weight of all batches so far: a statistic like the others, which ranks average"""

    def __init__(self, width: int) -> None:
        """Normalise `width` columns."""
        super().__init__(width)
        assert self.running_var is not None
        self.running_var.zero_()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, input: Tensor) -> Tensor:
        """Normalise [n, width]."""
        mean, variance, momentum = self.running_mean, self.running_var, self.momentum
        assert mean is not None
        assert variance is not None
        assert momentum is not None
        if self.training and input.shape[0] > 1:
            self.seen += momentum * (1 - self.seen)
            return super().forward(input)
        nothing = self.seen == 0
        weight = self.seen + nothing
        return F.batch_norm(input, mean / weight, (variance + nothing) / weight, self.weight, self.bias, eps=self.eps)


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
    # Of this the backward pass keeps a byte an element.
    return torch.where(bits >= threshold, inputs, 0).mul_(1 / (1 - rate))
