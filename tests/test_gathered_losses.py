"""The contrast over the global batch on two real processes, against one."""

from pathlib import Path

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from torch import Tensor

from sibra_dist.losses import batch_info_nce, gather_rows


def global_batch() -> tuple[Tensor, Tensor, Tensor]:
    """6 examples, of which the last is padding, before and after a layer of weights [4, 3]."""
    generator = torch.Generator().manual_seed(4)
    inputs, layer = torch.randn(2, 6, 4, generator=generator), torch.randn(4, 3, generator=generator)
    return inputs, layer, torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.0])


def step(part: slice, local: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The losses of part of the global batch, and the gradients of its first view and of the layer."""
    inputs, layer, weights = global_batch()
    layer.requires_grad_()
    a, b = (inputs[:, part] @ layer).unbind()
    a.retain_grad()
    losses = batch_info_nce(a, b, weights[part], 0.7, local=local)
    ((losses * weights[part]).sum() / weights.sum()).backward()
    assert a.grad is not None
    assert layer.grad is not None
    return losses.detach(), a.grad, layer.grad


def step_of_rank(rank: int, meeting: str, folder: str) -> None:
    """What each of two processes does."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    part = slice(3 * rank, 3 * rank + 3)
    rows = torch.full((1, 2, 2), float(rank + 1), requires_grad=True)
    gathered = gather_rows(rows)
    (gathered * torch.tensor([10.0, 1.0])[rank]).sum().backward()
    found = {"shared": step(part, local=False), "local": step(part, local=True), "gathered": (gathered.detach(), rows.grad)}
    torch.save(found, Path(folder) / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[Tensor, ...]]]:
    """What two real processes found, by rank."""
    folder = tmp_path_factory.mktemp("ranks")
    arguments = (str(folder / "meeting"), str(folder))
    torch.multiprocessing.start_processes(step_of_rank, args=arguments, nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_batch_info_nce_on_two_ranks_is_that_of_one(ranks: list[dict[str, tuple[Tensor, ...]]]) -> None:
    """The losses, the gradient of every example, and the sum over ranks of the gradient of a layer below."""
    losses, views, layer = step(slice(None), local=False)
    torch.testing.assert_close(torch.cat([found["shared"][0] for found in ranks]), losses)
    torch.testing.assert_close(torch.cat([found["shared"][1] for found in ranks]), views)
    torch.testing.assert_close(sum(found["shared"][2] for found in ranks), layer)
    assert losses[-1] == 0
    assert views[-1].eq(0).all()


def test_batch_info_nce_that_is_local_does_not_reach_over_ranks(ranks: list[dict[str, tuple[Tensor, ...]]]) -> None:
    for rank, found in enumerate(ranks):
        # In this process there is nobody to reach: the part alone.
        for got, alone in zip(found["local"], step(slice(3 * rank, 3 * rank + 3), local=False), strict=True):
            assert torch.equal(got, alone)
        assert not torch.allclose(found["local"][0], found["shared"][0])


def test_gathered_rows_are_those_of_all_ranks_and_their_gradients_add_up(ranks: list[dict[str, tuple[Tensor, ...]]]) -> None:
    for found in ranks:
        gathered, gradient = found["gathered"]
        assert torch.equal(gathered, torch.tensor([1.0, 2.0])[:, None, None].expand(2, 2, 2))
        assert torch.equal(gradient, torch.full((1, 2, 2), 11.0))


def test_a_process_alone_gathers_its_own_rows() -> None:
    rows = torch.ones(2, 3)
    assert gather_rows(rows) is rows
