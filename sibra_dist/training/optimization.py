"""How parameters follow their gradients: the optimizer, its learning rate, and the length of a step.

All of it is a function of the gradients and of how many steps are done, so a run that resumes needs no state for it but the
optimizer's.
"""

import math

import torch
from torch import Tensor, nn

from sibra_dist.models.bag_sums import PendingGradient
from sibra_dist.models.tables import tables_of
from sibra_dist.training.config import TrainingConfig
from sibra_dist.training.optimizers import LazyAdamW
from sibra_dist.training.ranks import Ranks

EXPONENTS = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}


class Optimization:
    """AdamW with a learning rate for each step, lazy where gradients are sparse."""

    def __init__(self, config: TrainingConfig, model: nn.Module, steps_per_epoch: int, ranks: Ranks | None = None) -> None:
        """Prepare to optimise a model whose epochs have so many steps, on one of some ranks."""
        self._config = config
        self._ranks = ranks or Ranks()
        self._total = config.epochs * steps_per_epoch
        self._warm_up = config.warmup_epochs * steps_per_epoch
        ratio = config.batch_size / config.reference_batch_size
        self._highest = config.learning_rate * ratio ** EXPONENTS[config.scale_learning_rate]
        self.names, self._parameters = zip(*model.named_parameters(), strict=True)
        tables = tables_of(model)
        self._divided = [number for number, name in enumerate(self.names) if name in tables and tables[name].divided]
        pending: dict[Tensor, list[PendingGradient]] = {}
        # Several ranks, and clipping, want gradients before they are followed.
        waits = self._ranks.world == 1 and config.clip_norm is None
        for table in tables.values():
            table.pending = [] if waits and not table.sparse else None
            if table.pending is not None:
                pending[table.weight] = table.pending
        self.optimizer = LazyAdamW(self._parameters, self._highest, config.weight_decay, pending)

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

    def step(self, done: int) -> Tensor:
        """Update the parameters, when so many steps are done.

        Returns:
            The length of each parameter's gradient before it was clipped, in the order of `names`: float32 [P], the same on
            every rank. Of a divided table it is that of all ranks' rows, so all ranks call this together.
        """
        self.optimizer.learning_rate = self.learning_rate(done)
        if self._config.clip_norm is None:
            self.optimizer.step()
            return self._norms()
        norms = self._norms()
        scale = (self._config.clip_norm / torch.linalg.vector_norm(norms)).clamp(max=1)
        torch._foreach_mul_([_gradient(parameter) for parameter in self._parameters], scale)
        self.optimizer.step()
        return norms

    def _norms(self) -> Tensor:
        known = self.optimizer.lengths
        others = [parameter for parameter in self._parameters if parameter not in known]
        lengths = known | dict(zip(others, torch._foreach_norm([_gradient(other) for other in others]), strict=True))
        norms = torch.stack([lengths[parameter] for parameter in self._parameters])
        if self._divided:
            norms[self._divided] = self._ranks.sum(norms[self._divided].double().square()).sqrt().to(norms.dtype)
        return norms


def _gradient(parameter: Tensor) -> Tensor:
    """The gradient's numbers, which may be changed; of a sparse one those of its rows."""
    assert parameter.grad is not None  # every parameter has one after every backward pass
    if not parameter.grad.is_sparse:
        return parameter.grad
    parameter.grad = parameter.grad.coalesce()  # each row once
    return parameter.grad.values()
