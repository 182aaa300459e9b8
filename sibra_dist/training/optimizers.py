"""AdamW, which of a table whose gradient is sparse updates the touched rows alone."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class LazyAdamW(torch.optim.AdamW):
    """torch's fused AdamW (Loshchilov and Hutter 2019) where a gradient is dense, bit for bit; lazy where it is sparse.

    Lazy means that in step t a row without a gradient keeps its value and both its moments: they do not decay, and neither
    does its weight. A row g with one is updated as AdamW would,

        m <- b1 m + (1 - b1) g,    v <- b2 v + (1 - b2) g^2,
        w <- (1 - lr decay) w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    where t counts all steps, not those that touched the row. So a row that every step touches follows AdamW exactly, and one
    that is seldom touched keeps its momentum until it is again, where AdamW would go on moving it. It is the rule of
    PyTorch's `SparseAdam` and TensorFlow Addons' `LazyAdam`, with AdamW's decay.
    """

    def __init__(self, parameters: Any, learning_rate: float, weight_decay: float) -> None:
        """Prepare to optimise tensors."""
        super().__init__(parameters, learning_rate, weight_decay=weight_decay, fused=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient; a sparse one must be coalesced."""
        assert closure is None
        sparse: list[tuple[Tensor, Tensor]] = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.grad.is_sparse:
                    self._update_rows(parameter, parameter.grad, group)
                    sparse.append((parameter, parameter.grad))
                    parameter.grad = None
        super().step()
        for parameter, gradient in sparse:
            parameter.grad = gradient

    def _update_rows(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        rows, values = gradient.indices()[0], gradient.values()
        (first, second), rate = group["betas"], group["lr"]
        average = state["exp_avg"][rows].lerp_(values, 1 - first)
        squares = state["exp_avg_sq"][rows].mul_(second).addcmul_(values, values, value=1 - second)
        # Tensors, so that nobody waits for the device to tell the step.
        step = state["step"].double()
        size, scale = rate / (1 - first**step), (1 - second**step).sqrt()
        towards = average / (squares.sqrt() / scale.to(values.dtype) + group["eps"]) * size.to(values.dtype)
        # Rows are distinct, so these are copies in any order.
        parameter.index_copy_(0, rows, parameter[rows].mul_(1 - rate * group["weight_decay"]).sub_(towards))
        state["exp_avg"].index_copy_(0, rows, average)
        state["exp_avg_sq"].index_copy_(0, rows, squares)
