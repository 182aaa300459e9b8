"""AdamW, which of a table whose gradient is sparse updates the touched rows alone, and may sum gradients itself."""

from collections.abc import Iterable, Mapping
from itertools import repeat

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from sibra_dist.models.bag_sums import STRETCH, PendingGradient

BETAS, EPSILON = (0.9, 0.999), 1e-8
"""How far moments decay in a step, and what is added to the root of the second: torch's own defaults."""


class LazyAdamW:
    """torch's fused AdamW (Loshchilov and Hutter 2019) where a gradient is dense, bit for bit; lazy where it is sparse.

    Lazy means that in step t a row without a gradient keeps its value and both its moments: they do not decay, and neither
    does its weight. A row g with one is updated as AdamW would,

        m <- b1 m + (1 - b1) g,    v <- b2 v + (1 - b2) g^2,
        w <- (1 - lr decay) w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    where t counts all steps, not those that touched the row. So a row that every step touches follows AdamW exactly, and one
    that is seldom touched keeps its momentum until it is again, where AdamW would go on moving it. It is the rule of
    PyTorch's `SparseAdam` and TensorFlow Addons' `LazyAdam`, with AdamW's decay.

    Of a table whose gradients are pending a stretch of rows is summed and updated at a time, so there never is a gradient of
    the table's size.

    It is none of torch's `Optimizer` classes, but calls their function: they would import torch's compiler, which takes more
    memory than torch needs for all else that a rank does with it.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        learning_rate: float,
        weight_decay: float,
        pending: Mapping[Tensor, list[PendingGradient]] | None = None,
    ) -> None:
        """Prepare to optimise tensors, of some of which there will be gradients `pending`, besides those that they have."""
        self.learning_rate = learning_rate
        self.lengths: dict[Tensor, Tensor] = {}
        """Of the gradients that were pending in the last step, by parameter: float32 []"""
        self._weight_decay = weight_decay
        self._pending = pending or {}
        # Made now, so that what lives as long as training lies together, and not between what a step needs.
        self.state: dict[Tensor, dict[str, Tensor]] = {
            parameter: {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
            }
            for parameter in parameters
        }

    def zero_grad(self) -> None:
        """Forget the gradients, and those that are pending."""
        for parameter in self.state:
            parameter.grad = None
        for pending in self._pending.values():
            pending.clear()

    @torch.no_grad()
    def step(self) -> None:
        """Update all parameters that have a gradient, or one pending."""
        self.lengths.clear()
        whole = []
        for parameter in self.state:
            if self._pending.get(parameter):
                self._update_by_stretches(parameter, self._pending[parameter].pop())
            elif parameter.grad is not None and parameter.grad.is_sparse:
                parameter.grad = parameter.grad.coalesce()  # each row once
                self._update_rows(parameter, parameter.grad)
            elif parameter.grad is not None:
                whole.append((parameter, parameter.grad, *self._moments(parameter), self.state[parameter]["step"]))
        self._update(whole)

    def _moments(self, parameter: Tensor) -> tuple[Tensor, Tensor]:
        return self.state[parameter]["exp_avg"], self.state[parameter]["exp_avg_sq"]

    def _update(self, tensors: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]) -> None:
        """Update parameters from their gradients, with their moments and their numbers of steps, which this counts."""
        if tensors:
            parameters, gradients, averages, squares, steps = map(list, zip(*tensors, strict=True))
            adamw(
                parameters,
                gradients,
                averages,
                squares,
                [],
                steps,
                fused=True,
                amsgrad=False,
                maximize=False,
                beta1=BETAS[0],
                beta2=BETAS[1],
                lr=self.learning_rate,
                weight_decay=self._weight_decay,
                eps=EPSILON,
            )

    def _update_by_stretches(self, parameter: Tensor, pending: PendingGradient) -> None:
        """Follow a pending gradient, and the one that there is besides."""
        own = repeat(None) if parameter.grad is None else parameter.grad.split(STRETCH)
        stretches = zip(*(tensor.split(STRETCH) for tensor in (parameter, *self._moments(parameter))), strict=True)
        before = self.state[parameter]["step"].clone()
        lengths = [torch.zeros((), device=parameter.device)]
        for (weights, average, squares), gradient, added in zip(
            stretches, pending.stretches(len(parameter)), own, strict=False
        ):
            if added is not None:
                gradient += added
            lengths.append(gradient.norm())
            self.state[parameter]["step"] = before.clone()  # each stretch makes the same step
            self._update([(weights, gradient, average, squares, self.state[parameter]["step"])])
        self.lengths[parameter] = torch.linalg.vector_norm(torch.stack(lengths))

    def _update_rows(self, parameter: Tensor, gradient: Tensor) -> None:
        state, (first, second) = self.state[parameter], BETAS
        state["step"] += 1
        rows, values = gradient.indices()[0], gradient.values()
        average = state["exp_avg"][rows].lerp_(values, 1 - first)
        squares = state["exp_avg_sq"][rows].mul_(second).addcmul_(values, values, value=1 - second)
        # Tensors, so that nobody waits for the device to tell the step.
        step = state["step"].double()
        size, scale = self.learning_rate / (1 - first**step), (1 - second**step).sqrt()
        towards = average / (squares.sqrt() / scale.to(values.dtype) + EPSILON) * size.to(values.dtype)
        # Rows are distinct, so these are copies in any order.
        decayed = parameter[rows].mul_(1 - self.learning_rate * self._weight_decay)
        parameter.index_copy_(0, rows, decayed.sub_(towards))
        state["exp_avg"].index_copy_(0, rows, average)
        state["exp_avg_sq"].index_copy_(0, rows, squares)
