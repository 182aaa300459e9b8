"""How parameters follow their gradients: the optimizer, its learning rate, and the length of a step.

All of it is a function of the gradients and of how many steps are done, so a run that resumes needs no state for it but the
optimizer's.
"""

import math

import torch
from torch import Tensor, nn

from sibra_dist.training.config import TrainingConfig

EXPONENTS = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}


class Optimization:
    """AdamW with a learning rate for each step."""

    def __init__(self, config: TrainingConfig, model: nn.Module, steps_per_epoch: int) -> None:
        """Prepare to optimise a model whose epochs have so many steps."""
        self._config = config
        self._total = config.epochs * steps_per_epoch
        self._warm_up = config.warmup_epochs * steps_per_epoch
        ratio = config.batch_size / config.reference_batch_size
        self._highest = config.learning_rate * ratio ** EXPONENTS[config.scale_learning_rate]
        self.names, self._parameters = zip(*model.named_parameters(), strict=True)
        self.optimizer = torch.optim.AdamW(self._parameters, self._highest, weight_decay=config.weight_decay, fused=True)

    def learning_rate(self, done: int) -> float:
        """Of the step before which so many are done."""
        rate: float = self._highest
        if self._config.schedule == "cosine":
            rate *= (1 + math.cos(math.pi * done / self._total)) / 2
        if done < self._warm_up:
            rate *= (done + 1) / (self._warm_up + 1)
        return rate

    def clear(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad()

    def norms(self) -> Tensor:
        """The length of each parameter's gradient, in the order of `names`: float32 [P]."""
        return torch.stack(torch._foreach_norm([_gradient(parameter) for parameter in self._parameters]))

    def step(self, done: int, norms: Tensor) -> None:
        """Update the parameters, from gradients of these lengths, when so many steps are done."""
        if self._config.clip_norm is not None:
            scale = (self._config.clip_norm / torch.linalg.vector_norm(norms)).clamp(max=1)
            torch._foreach_mul_([_gradient(parameter) for parameter in self._parameters], scale)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(done)
        self.optimizer.step()


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None  # every parameter has one after every backward pass
    return parameter.grad
