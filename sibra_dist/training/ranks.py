"""What ranks say to each other: one sum a step, and who decides.

Gradients are summed over ranks in buckets of a fixed layout, once the backward pass is done. PyTorch's
DistributedDataParallel would overlap the two, but it lays out its buckets anew after the first step, so that a
restarted run adds in another order than an undisturbed one and drifts from it in the last bit. Little is lost: most of
the gradient is that of the interactions tables, which are a model's first layers and so come last in the backward pass.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from sibra_dist.errors import SibraError
from sibra_dist.models.tables import tables_of

BUCKET_ELEMENTS = 16 * 2**20
Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together."""

    rank: int = 0
    world: int = 1

    @classmethod
    def current(cls) -> "Ranks":
        """As torch.distributed says, or one alone."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return cls(torch.distributed.get_rank(), torch.distributed.get_world_size())
        return cls()

    @property
    def leads(self) -> bool:
        """Whether this rank writes files and shows progress."""
        return self.rank == 0

    def agree(self, value: Value) -> Value:
        """The value that rank 0 has, on every rank."""
        if self.world == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Value) -> list[Value]:
        """The values that the ranks have, on every rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(values, value)
        return values

    def alone(self, act: Callable[[], None]) -> None:
        """Let rank 0 do something; what it finds that the user must put right is raised on every rank."""
        error = None
        if self.leads:
            try:
                act()
            except SibraError as found:
                error = found
        error = self.agree(error)
        if error is not None:
            raise error

    def wait(self) -> None:
        """Go on when every rank has come here."""
        if self.world > 1:
            torch.distributed.barrier()

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the ranks, on every rank."""
        if self.world == 1:
            return values
        total = values.clone()
        torch.distributed.all_reduce(total)
        return total

    def reduce_step(self, model: nn.Module, values: Tensor) -> Tensor:
        """Sum gradients and some values [n] over the ranks, and average running statistics; returns the summed values.

        Every rank must have a gradient for the same parameters. Gradients of divided tables are summed already, in the
        backward pass. Running statistics (batch normalisation's) are averaged so that all ranks evaluate, and save, the same
        model.
        """
        if self.world == 1:
            return values.detach()
        total = values.detach().clone()
        divided = [name for name, table in tables_of(model).items() if table.divided]
        gradients = []
        for name, parameter in model.named_parameters():
            if parameter.grad is None or name in divided:
                continue
            if parameter.grad.is_sparse:
                parameter.grad = self._sum_sparse(parameter.grad)
            else:
                gradients.append(parameter.grad)
        saved = model.state_dict().keys()
        statistics = [buffer for name, buffer in model.named_buffers() if name in saved and buffer.is_floating_point()]
        for statistic in statistics:
            statistic /= self.world
        for bucket in _buckets([total, *gradients, *statistics]):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            torch.distributed.all_reduce(flat)
            for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))
        return total

    def _sum_sparse(self, gradient: Tensor) -> Tensor:
        """The sum of gradients of some rows of a table: of the rows that any rank has one for."""
        gradient = gradient.coalesce()
        rows, values = gradient.indices()[0], gradient.values()
        counts = self._gather_rows(torch.tensor([len(rows)], device=rows.device)).tolist()
        padding = max(counts) - len(rows)
        rows = self._gather_rows(F.pad(rows, (0, padding)))
        values = self._gather_rows(F.pad(values, (0, 0, 0, padding)))
        real = torch.cat([torch.arange(max(counts), device=rows.device) < count for count in counts])
        # In order of rank, and so everywhere in the same order.
        return torch.sparse_coo_tensor(rows[real][None], values[real], gradient.shape, check_invariants=False).coalesce()

    def _gather_rows(self, rows: Tensor) -> Tensor:
        """The rows of all ranks, as many of each, in order of rank."""
        gathered = [torch.empty_like(rows) for _ in range(self.world)]
        torch.distributed.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)


def _buckets(tensors: list[Tensor]) -> list[list[Tensor]]:
    buckets: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if size + tensor.numel() > BUCKET_ELEMENTS and buckets[-1]:
            buckets.append([])
            size = 0
        buckets[-1].append(tensor)
        size += tensor.numel()
    return buckets
