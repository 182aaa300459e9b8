"""Tables against dense matrices: sums, lookups and gradients, whole or divided over real processes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from torch import Tensor, nn

from sibra_dist.models import tables
from sibra_dist.models.bag_sums import Bags
from sibra_dist.models.histories import Entries
from sibra_dist.models.tables import Table, TableLayout, drawn, tables_held_as, tables_of

WIDTH = 3


class Task(NamedTuple):
    """What one rank asks of a table of `rows` rows."""

    rows: int
    bags: list[list[int]]
    lookups: list[int]
    counts: bool
    """Whether entries count something else than 1."""

    def entries(self) -> Entries:
        lengths = torch.tensor([len(bag) for bag in self.bags], dtype=torch.int64)
        columns = torch.tensor([column for bag in self.bags for column in bag], dtype=torch.int32)
        values = torch.arange(1.0, len(columns) + 1) / 4 if self.counts else None
        return Entries(columns, lengths.cumsum(0) - lengths, values)

    def dense(self) -> tuple[Tensor, Tensor]:
        """Matrices whose products with the table are the sums and the lookups."""
        columns, _, values = self.entries()
        sums = torch.zeros(len(self.bags), self.rows, dtype=torch.float64)
        row = torch.repeat_interleave(torch.tensor([len(bag) for bag in self.bags], dtype=torch.int64))
        counted = torch.ones(len(columns)) if values is None else values
        sums.index_put_((row, columns.long()), counted.double(), accumulate=True)
        return sums, nn.functional.one_hot(torch.tensor(self.lookups, dtype=torch.int64), self.rows).double()

    def upstream(self, rank: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(rank)
        return tuple(
            torch.randn(len(asked), WIDTH, dtype=torch.float64, generator=generator) for asked in (self.bags, self.lookups)
        )


# By rank. Columns repeat within a bag and are in no order; bags are empty; ranks ask for nothing; and of 5 rows a fourth
# rank holds none.
TASKS: dict[str, list[Task]] = {
    "one rank": [Task(5, [[4, 0, 4], [], [1]], [3, 3, 0], True)],
    "two": [Task(5, [[4, 0, 3], [2, 1], []], [3, 3, 0], True), Task(5, [[0]], [1], True)],
    "one of two asks": [Task(7, [[6, 0, 6], [1, 2, 3, 4]], [5, 5, 2], False), Task(7, [], [], False)],
    "no entries": [Task(4, [[], []], [], True), Task(4, [], [2], True)],
    "four": [
        Task(5, [[0, 4], [2]], [4, 0, 4], False),
        Task(5, [], [], False),
        Task(5, [[1, 3, 1, 0]], [1], False),
        Task(5, [[], [4]], [2, 2], False),
    ],
}


def found_by(rank: int, world: int, task: Task, sparse: bool, planned: bool) -> dict[str, Any]:
    """What the table gives this rank, and the gradient of its rows."""
    torch.manual_seed(7)
    with tables_held_as(TableLayout(rank, world, sparse)):
        table = Table(task.rows, WIDTH, torch.Tensor.normal_).double()
    entries = task.entries()
    sums = table.bag_sum(Bags(entries, table.plan(entries) if planned else None))
    rows = torch.tensor(task.lookups, dtype=torch.int64)
    found = table.lookup(table.plan_lookup(rows) if planned else rows)
    upstream = task.upstream(rank)
    ((sums * upstream[0]).sum() + (found * upstream[1]).sum()).backward()
    return {
        "sums": sums.detach(),
        "lookups": found.detach(),
        "gradient": table.weight.grad,
        "weight": table.weight.detach(),
        "place": (table.first, table.last),
    }


def bytes_sent(rank: int, world: int, task: Task) -> int:
    """By this rank, for bag sums of a table in float32 and their gradient."""
    total, send = 0, torch.distributed.all_to_all_single

    def counted(received: Tensor, sent: Tensor, *sizes: Any) -> None:
        nonlocal total
        total += sent.nbytes
        send(received, sent, *sizes)

    with tables_held_as(TableLayout(rank, world)), pytest.MonkeyPatch.context() as patch:
        table = Table(task.rows, WIDTH, torch.Tensor.zero_)
        patch.setattr(torch.distributed, "all_to_all_single", counted)
        table.bag_sum(Bags(task.entries())).sum().backward()
    return total


def ask_all(rank: int, world: int, folder: str) -> None:
    """What each process does."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting-{world}", rank=rank, world_size=world)
    found: dict[Any, Any] = {
        (name, sparse, planned): found_by(rank, world, tasks[rank], sparse, planned)
        for name, tasks in TASKS.items()
        if len(tasks) == world
        for sparse in (False, True)
        for planned in (False, True)
    }
    for name, tasks in TASKS.items():
        if len(tasks) == world:
            found[name, "bytes sent"] = bytes_sent(rank, world, tasks[rank])
    torch.save(found, Path(folder) / f"{world}-{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, list[Any]]:
    """By task, sparse, planned: what each rank found; and by task, "bytes sent"."""
    folder = tmp_path_factory.mktemp("ranks")
    gathered: dict[Any, list[Any]] = {}
    for world in (2, 4):
        torch.multiprocessing.start_processes(ask_all, args=(world, str(folder)), nprocs=world, start_method="spawn")
        ranks = [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)]
        gathered.update({key: [rank[key] for rank in ranks] for key in ranks[0]})
    for sparse in (False, True):
        for planned in (False, True):
            gathered["one rank", sparse, planned] = [found_by(0, 1, TASKS["one rank"][0], sparse, planned)]
    return gathered


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("name", TASKS)
def test_sums_lookups_and_gradients_are_those_of_dense_products(
    found: dict[Any, list[Any]], name: str, sparse: bool, planned: bool
) -> None:
    tasks, ranks = TASKS[name], found[name, sparse, planned]
    torch.manual_seed(7)
    whole = torch.empty(tasks[0].rows, WIDTH).normal_()
    assert torch.equal(torch.cat([rank["weight"] for rank in ranks]), whole.double())
    weight = whole.double().requires_grad_()
    loss = torch.zeros(())
    for number, (task, rank) in enumerate(zip(tasks, ranks, strict=True)):
        expected = [matrix @ weight for matrix in task.dense()]
        torch.testing.assert_close(rank["sums"], expected[0].detach())
        torch.testing.assert_close(rank["lookups"], expected[1].detach())
        loss = loss + sum((part * up).sum() for part, up in zip(expected, task.upstream(number), strict=True))
    loss.backward()
    assert weight.grad is not None
    touched = torch.cat([torch.cat(task.dense()).ne(0).any(0)[None] for task in tasks]).any(0)
    for rank in ranks:
        first, last = rank["place"]
        gradient = rank["gradient"]
        assert gradient.is_sparse == sparse
        assert gradient.shape == (last - first, WIDTH)
        if sparse:
            assert gradient.coalesce().indices()[0].tolist() == torch.nonzero(touched[first:last]).flatten().tolist()
            gradient = gradient.to_dense()
        torch.testing.assert_close(gradient, weight.grad[first:last])


@pytest.mark.parametrize("name", [name for name, tasks in TASKS.items() if len(tasks) > 1])
def test_what_is_sent_is_what_the_documentation_says(found: dict[Any, list[Any]], name: str) -> None:
    """By all ranks together: 8 h P + 4 (E + P) + 16 W, and 4 E for what entries count."""
    tasks = TASKS[name]
    share = -(-tasks[0].rows // len(tasks))
    entries = sum(len(bag) for task in tasks for bag in task.bags)
    parts = sum(len({column // share for column in bag}) for task in tasks for bag in task.bags)
    expected = 8 * WIDTH * parts + 4 * (entries + parts) + 16 * len(tasks) ** 2 + 4 * entries * tasks[0].counts
    assert sum(found[name, "bytes sent"]) == expected


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ranks_hold_equal_shares_in_order(world: int) -> None:
    for rows in (1, 2, 5, 12):
        held = []
        for rank in range(world):
            with tables_held_as(TableLayout(rank, world)):
                table = Table(rows, WIDTH, torch.Tensor.zero_)
            assert table.divided == (world > 1)
            assert table.weight.shape == (table.last - table.first, WIDTH)
            assert len(table.weight) <= -(-rows // world)
            held += range(table.first, table.last)
        assert held == list(range(rows))


@pytest.mark.parametrize("chunk", [16, 40, 1 << 20])
@pytest.mark.parametrize("rows", [1, 5, 6, 16, 17, 100])
@pytest.mark.parametrize("initialize", [lambda weight: weight.normal_(std=0.3), lambda weight: weight.uniform_(-2, 2)])
def test_initial_values_do_not_depend_on_how_a_table_is_held(
    monkeypatch: pytest.MonkeyPatch, initialize: Callable[[Tensor], object], rows: int, chunk: int
) -> None:
    """Of the table, and of what is drawn after it."""
    monkeypatch.setattr(tables, "CHUNK_ELEMENTS", chunk)
    torch.manual_seed(1)
    whole = torch.empty(rows, WIDTH)
    initialize(whole)
    after = torch.rand(4)
    assert [len(part) for _, part in drawn(rows * WIDTH, torch.Tensor.zero_)][:-1] == [chunk // 16 * 16] * (
        len(list(drawn(rows * WIDTH, torch.Tensor.zero_))) - 1
    )
    for world in (1, 3):
        held = []
        for rank in range(world):
            torch.manual_seed(1)
            with tables_held_as(TableLayout(rank, world)):
                held.append(Table(rows, WIDTH, initialize).weight)
            assert torch.equal(torch.rand(4), after)
        assert torch.equal(torch.cat(held), whole)


def test_tables_are_found_by_the_name_of_their_parameter() -> None:
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(2, 2), Table(4, 2, torch.Tensor.zero_))})
    ((name, table),) = tables_of(model).items()
    assert model.get_parameter(name) is table.weight
    assert list(tables_of(table)) == [name for name, _ in table.named_parameters()]


def test_a_layout_is_that_of_tables_built_in_its_block() -> None:
    with tables_held_as(TableLayout(sparse=True)):
        inside = Table(2, 1, torch.Tensor.zero_)
    after = Table(2, 1, torch.Tensor.zero_)
    assert (inside.sparse, after.sparse) == (True, False)
