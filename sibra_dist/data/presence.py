"""Modalities that are hidden on purpose, in training or in evaluation: from all entities of a side, or from a seeded share.

What is hidden is missing: a model treats it as it treats what the dataset lacks. Which entities lose a modality is a hash
of the seed, the modality's name and the entity, so training and evaluation hide the same ones, whatever the number of
ranks, and those that lose it at one share lose it at every greater one.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from sibra_dist.data.batches import HIDING, in_share, stream, uniform
from sibra_dist.errors import ConfigError, nearest

SideName = Literal["users", "items"]
EACH = "each"
"""In place of a modality's name: every one in turn, and alone."""
Share = Annotated[float, Field(ge=0, le=1)]


def _by_dotted_name(hide: object) -> object:
    """`items.genres: 0.5` also where it is written as `items: {genres: 0.5}`, as settings on the command line are.

    What comes later counts: settings come after what a file says.
    """
    if not isinstance(hide, Mapping):
        return hide
    flat: dict[str, object] = {}
    for name, given in hide.items():
        inner = _by_dotted_name(given)
        flat |= {f"{name}.{rest}": share for rest, share in inner.items()} if isinstance(inner, Mapping) else {str(name): inner}
    return flat


Shares = Annotated[dict[str, Share], BeforeValidator(_by_dotted_name)]
"""Of the entities that lose a modality, by dotted name such as `items.genres`."""


@dataclass(frozen=True)
class Hidden:
    """The modalities of one side that are hidden."""

    side: SideName
    shares: Mapping[str, float] = field(default_factory=dict)
    """By modality, the share in [0, 1] of the entities that lose it; the others keep it."""
    seed: int = 0

    def visible(self, names: tuple[str, ...], entities: Tensor) -> Tensor:
        """Which of the modalities `names` the entities int64 [n] may show: bool [n, len(names)], on the entities' device."""
        visible = torch.ones(entities.numel(), len(names), dtype=torch.bool, device=entities.device)
        for column, name in enumerate(names):
            if name in self.shares:
                random = uniform(stream(self.seed, HIDING, _number(f"{self.side}.{name}")), entities)
                visible[:, column] = ~in_share(random, self.shares[name])
        return visible


NOTHING_HIDDEN = Hidden("items")


def parse_hide(
    hide: Mapping[str, float], modalities: tuple[tuple[str, ...], tuple[str, ...]], seed: int, where: str = "hide"
) -> tuple[Hidden, Hidden]:
    """What is hidden of users and of items, from shares by dotted name such as `items.genres`.

    Args:
        hide: the shares, in [0, 1].
        modalities: names of the modalities that the model reads of users, and of items.
        seed: decides which entities lose a modality.
        where: who says so, for the error.

    Raises:
        ConfigError: the model reads no such modality.
    """
    users, items = modalities
    known = [*(f"users.{name}" for name in users), *(f"items.{name}" for name in items)]
    for name in hide:
        if name not in known:
            raise ConfigError(f"{where} {name}: the model reads no such modality; {nearest(name, known)}")
    shares: dict[str, dict[str, float]] = {"users": {}, "items": {}}
    for dotted, share in hide.items():
        side, _, name = dotted.partition(".")
        shares[side][name] = share
    return Hidden("users", shares["users"], seed), Hidden("items", shares["items"], seed)


def read_hide(options: Sequence[str]) -> dict[str, float]:
    """Shares by dotted name from texts such as `items.genres`, which hides all, or `items.genres=0.25`.

    Raises:
        ConfigError: a share is not a number from 0 to 1.
    """
    shares: dict[str, float] = {}
    for option in options:
        name, equals, text = option.partition("=")
        try:
            share = float(text) if equals else 1.0
        except ValueError:
            share = -1.0
        if not 0 <= share <= 1:
            raise ConfigError(f"--hide {option}: {text!r} is not a share from 0 to 1; write {name}=0.25, or {name} to hide all")
        if shares.setdefault(name, share) != share:
            raise ConfigError(f"--hide {name} is given twice, with {shares[name]:g} and {share:g}: give it once")
    return shares


def describe_hide(hide: Mapping[str, float]) -> list[str]:
    """What `read_hide` reads, sorted: `items.genres` where all lose it, `items.genres=0.25` where a share does."""
    return [name if share == 1 else f"{name}={share}" for name, share in sorted(hide.items())]


def _number(name: str) -> int:
    """A number for a name that is the same in every process."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])
