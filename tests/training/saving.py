"""A small model with a table that may be divided over ranks, ranks that are threads, and savers for them."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from sibra_dist.data.storage import Place
from sibra_dist.training.checkpoint import Checkpoint, load_best, load_newest, state_of
from sibra_dist.training.parts import Rows
from sibra_dist.training.ranks import Ranks
from sibra_dist.training.saver import Saver

TOTAL = 7
Result = TypeVar("Result")


class Model(torch.nn.Module):
    """A table, of which a rank may hold some rows, and layers that all ranks share."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.table = torch.nn.Parameter(torch.randn(TOTAL, 3, generator=generator))
        self.layer = torch.nn.Linear(3, 4)
        self.norm = torch.nn.BatchNorm1d(4)
        with torch.no_grad():
            for parameter in self.layer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def loss(self, step: int) -> torch.Tensor:
        inputs = torch.randn(6, 3, generator=torch.Generator().manual_seed(step))
        return self.norm(self.layer(inputs)).square().sum() + self.table.square().sum()


def make_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 0.1, fused=True)


def train_step(model: Model, optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.zero_grad()
    model.loss(step).backward()
    optimizer.step()


def trained(steps: int) -> tuple[Model, torch.optim.Optimizer]:
    model = Model()
    optimizer = make_optimizer(model)
    for step in range(steps):
        train_step(model, optimizer, step)
    return model, optimizer


def state_after(steps: int, first: int = 0, last: int = TOTAL) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint after so many steps, with some rows of the table; each call computes them anew."""
    state = state_of(*trained(steps), torch.arange(float(steps)))
    return {name: value[first:last] if "/table" in name and value.dim() else value for name, value in state.items()}


def make_saver(folder: Path | Place, **settings: Any) -> Saver:
    """A saver into folders of `folder`."""
    place = Place.at(folder)
    return Saver(place / "checkpoints", place / "best", "digest", {"seed": 3}, **settings)


def newest(folder: Path | Place, **settings: Any) -> Checkpoint | None:
    return load_newest(Place.at(folder) / "checkpoints", "digest", **settings)


def best(folder: Path | Place) -> Checkpoint | None:
    place = Place.at(folder)
    return load_best(place / "checkpoints", place / "best", "digest")


def require_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@dataclass
class Meeting:
    """Where ranks that are threads exchange values."""

    world: int
    barrier: threading.Barrier = field(init=False)
    values: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.world, timeout=60)


@dataclass(frozen=True)
class ThreadRanks(Ranks):
    """A rank that is a thread."""

    meeting: Meeting = field(default_factory=lambda: Meeting(1))

    def gather(self, value: Any) -> list[Any]:
        self.meeting.barrier.wait()
        self.meeting.values[self.rank] = value
        self.meeting.barrier.wait()
        return [self.meeting.values[rank] for rank in range(self.world)]

    def agree(self, value: Any) -> Any:
        return self.gather(value)[0]


def divided(rank: int, world: int) -> dict[str, Rows]:
    """The rows of the table that a rank holds; of so many ranks that some may hold none."""
    return {"table": Rows(rank * TOTAL // world, (rank + 1) * TOTAL // world, TOTAL)}


def on_ranks(world: int, act: Callable[[ThreadRanks], Result]) -> list[Result | Exception]:
    """What each rank returns, or the error that it raises."""
    meeting = Meeting(world)

    def guarded(rank: int) -> Result | Exception:
        try:
            return act(ThreadRanks(rank, world, meeting))
        except Exception as error:
            return error

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(guarded, range(world)))


def hold_writes(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Let nothing be written anywhere until the event is set."""
    go_on = threading.Event()
    write = Place.write

    def held_up(self: Place, name: str, content: Any) -> None:
        assert go_on.wait(60)
        write(self, name, content)

    monkeypatch.setattr(Place, "write", held_up)
    return go_on
