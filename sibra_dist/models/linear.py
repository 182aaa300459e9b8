"""How linear layers start."""

from typing import Literal

from torch import Tensor, nn

Initialization = Literal["uniform", "xavier_uniform"]
"""`uniform`: torch's own of `nn.Linear`, within 1/sqrt(fan in). `xavier_uniform`: within sqrt(6 / (fan in + fan out)), with
biases of zero (Glorot and Bengio 2010)."""


def initialize_linear(weight: Tensor, bias: Tensor, how: Initialization, fan_in: int) -> None:
    """Fill a weight matrix, [out, in] or transposed, and its bias, from torch's global generator."""
    if how == "xavier_uniform":
        nn.init.xavier_uniform_(weight)
        nn.init.zeros_(bias)
        return
    bound = max(fan_in, 1) ** -0.5
    nn.init.uniform_(weight, -bound, bound)
    nn.init.uniform_(bias, -bound, bound)
