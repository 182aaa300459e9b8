"""Moves whole structures of tensors to a device: batches, what encoders read, datasets."""

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

Structure = TypeVar("Structure")


def map_tensors(structure: Structure, change: Callable[[Tensor], Tensor]) -> Structure:
    """The same structure with every tensor changed: in dataclasses, tuples, lists and dictionaries, at any depth.

    What is not a tensor stays; so does an object of which nothing has changed.
    """
    return _map(structure, change)  # type: ignore[no-any-return]


def to_device(structure: Structure, device: torch.device) -> Structure:
    """The structure with its tensors on a device; those that are there already are not copied.

    From pinned memory tensors travel beside the computation that goes on.
    """
    return map_tensors(structure, lambda tensor: tensor.to(device, non_blocking=True))


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(part, change) for part in value))
    if isinstance(value, tuple | list):
        return type(value)(_map(part, change) for part in value)
    if isinstance(value, dict):
        return {key: _map(part, change) for key, part in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        changed = {field.name: _map(getattr(value, field.name), change) for field in fields(value) if field.init}
        return replace(value, **changed) if any(getattr(value, name) is not part for name, part in changed.items()) else value
    return value
