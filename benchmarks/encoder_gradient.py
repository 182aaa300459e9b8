"""The gradient of the interactions table: two forms of `bag_sum` against PyTorch's own, on the shape of MovieLens 1M.

    python -m benchmarks.encoder_gradient

Each row reads a share of the entities. Times are medians, in milliseconds of processor time on one thread; the last column
is how many times longer PyTorch's embedding-bag backward takes than the form that `SORTING_COST` picks.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sibra_dist.data.dataset import Csr
from sibra_dist.models import bag_sums as module
from sibra_dist.models.bag_sums import SORTING_COST, Whole, bag_sum, plan_gradient
from sibra_dist.models.histories import Entries, Histories

ENTITIES, OTHERS, NNZ, WIDTH = 5_816, 3_294, 640_000, 256


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    histories = _random_histories()
    weight = torch.randn(OTHERS, WIDTH, requires_grad=True)
    table = Table(
        "share of entities", "entries", "sorted", "transposed", "picked", "PyTorch", "ratio", box=None, pad_edge=False
    )
    for share in (0.01, 0.05, 0.1, 0.3, 0.5, 0.7, 1.0):
        entities = torch.randperm(ENTITIES)[: round(share * ENTITIES)].sort().values
        read = histories.whole(entities)
        upstream = torch.randn(len(entities), WIDTH)

        bags = F.embedding_bag(read.columns.long(), weight, read.starts, mode="sum")
        ours = partial(_gradient, weight, read, Whole(entities, histories), upstream)
        with mock.patch.object(module, "SORTING_COST", 0.0):
            by_sorting = _milliseconds(ours())
        with mock.patch.object(module, "SORTING_COST", 1e9):
            by_transposing = _milliseconds(ours())
        theirs = _milliseconds(partial(torch.autograd.grad, bags, weight, upstream, retain_graph=True))
        transposes = len(read.columns) * SORTING_COST >= histories.rows.nnz
        picked = by_transposing if transposes else by_sorting
        table.add_row(
            f"{share:.0%}",
            f"{len(read.columns):,}",
            f"{by_sorting:.1f}",
            f"{by_transposing:.1f}",
            "transposed" if transposes else "sorted",
            f"{theirs:.1f}",
            f"{theirs / picked:.1f}",
        )
    Console(width=100).print(table)


def _gradient(weight: Tensor, read: Entries, whole: Whole, upstream: Tensor) -> Callable[[], object]:
    """Plans the gradient, as every step must, and computes it."""
    sums = bag_sum(weight, read, plan_gradient(read, whole))
    return lambda: (plan_gradient(read, whole), torch.autograd.grad(sums, weight, upstream, retain_graph=True))


def _random_histories() -> Histories:
    """Popularity falls with rank, as in real data."""
    torch.manual_seed(0)
    items = torch.multinomial(1 / torch.arange(20.0, 20 + OTHERS), NNZ, replacement=True)
    pairs = torch.unique(torch.randint(ENTITIES, (NNZ,)) * OTHERS + items)
    rows, columns = pairs // OTHERS, pairs % OTHERS
    return Histories(_csr(rows, columns, ENTITIES), _csr(columns, rows, OTHERS))


def _csr(rows: torch.Tensor, columns: torch.Tensor, count: int) -> Csr:
    order = rows.sort(stable=True).indices
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(rows, minlength=count).cumsum(0)])
    return Csr(indptr, columns[order].int())


def _milliseconds(work: Callable[[], object]) -> float:
    work()
    times = []
    for _ in range(7):
        started = time.process_time()
        work()
        times.append(1000 * (time.process_time() - started))
    return statistics.median(times)


if __name__ == "__main__":
    main()
