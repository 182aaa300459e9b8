"""Structures of tensors that move as one."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sibra_dist.data.transfer import map_tensors, to_device


class Pair(NamedTuple):
    left: Tensor
    right: Tensor | None


@dataclass(frozen=True)
class Holder:
    name: str
    values: Tensor
    pairs: tuple[Pair, ...]


def make() -> Holder:
    return Holder("a", torch.arange(3), (Pair(torch.arange(2), None), Pair(torch.arange(1), torch.ones(1))))


def test_every_tensor_is_changed_and_nothing_else() -> None:
    changed = map_tensors({"x": [make(), 7, "text"]}, lambda tensor: tensor + 1)
    holder, number, text = changed["x"]
    assert (number, text) == (7, "text")
    assert isinstance(holder, Holder)
    assert holder.name == "a"
    assert holder.values.tolist() == [1, 2, 3]
    assert [type(pair) for pair in holder.pairs] == [Pair, Pair]
    assert holder.pairs[0].left.tolist() == [1, 2]
    assert holder.pairs[0].right is None
    assert holder.pairs[1].right is not None
    assert holder.pairs[1].right.tolist() == [2.0]


def test_what_is_there_already_is_not_copied() -> None:
    holder = make()
    moved = to_device(holder, torch.device("cpu"))
    assert moved.values is holder.values
    assert moved.pairs[0].left is holder.pairs[0].left
    assert to_device(holder, torch.device("meta")).values.is_meta
