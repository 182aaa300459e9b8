"""Learning rates and lengths of gradients, by hand and against torch's own."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from sibra_dist.training.config import TrainingConfig
from sibra_dist.training.optimization import Optimization


def make(steps_per_epoch: int = 10, **settings: Any) -> tuple[nn.Module, Optimization]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    return model, Optimization(TrainingConfig(**settings), model, steps_per_epoch)


def test_warm_up_grows_in_a_straight_line() -> None:
    _, optimization = make(learning_rate=0.8, warmup_epochs=0.3, epochs=2)
    assert [optimization.learning_rate(done) for done in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])


def test_warm_up_is_a_factor_of_the_cosine() -> None:
    _, optimization = make(learning_rate=0.8, warmup_epochs=0.2, epochs=1, schedule="cosine")
    cosine = [0.4 * (1 + math.cos(math.pi * done / 10)) for done in range(10)]
    assert [optimization.learning_rate(done) for done in range(10)] == pytest.approx(
        [cosine[0] / 3, cosine[1] * 2 / 3, *cosine[2:]]
    )


@pytest.mark.parametrize(("rule", "rate"), [("none", 0.01), ("sqrt", 0.04), ("linear", 0.16)])
def test_the_learning_rate_grows_with_the_batch(rule: str, rate: float) -> None:
    settings = {"learning_rate": 0.01, "batch_size": 4096, "reference_batch_size": 256, "scale_learning_rate": rule}
    _, optimization = make(**settings)
    assert optimization.learning_rate(0) == pytest.approx(rate)


@pytest.mark.parametrize("clip_norm", [0.05, 1e6])
def test_gradients_are_clipped_as_torch_does(clip_norm: float) -> None:
    model, optimization = make(clip_norm=clip_norm, learning_rate=0.1)
    other, _ = make()
    reference = torch.optim.AdamW(other.parameters(), 0.1, weight_decay=0.01)
    inputs = torch.randn(5, 3)
    for step in range(3):
        for one in (model, other):
            one.zero_grad()
            one(inputs).square().sum().backward()
        optimization.step(step)
        torch.nn.utils.clip_grad_norm_(other.parameters(), clip_norm)
        reference.step()
    for found, wanted in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found, wanted)


def test_norms_are_those_of_the_gradients() -> None:
    model, optimization = make()
    model(torch.randn(5, 3)).sum().backward()
    wanted = [parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]
    torch.testing.assert_close(optimization.step(0), torch.stack(wanted))
    assert optimization.names == tuple(name for name, _ in model.named_parameters())
