import pytest
import torch

from sibra_dist.data.batches import stream
from sibra_dist.models.base import SCORES
from sibra_dist.models.branch import BatchNorm, Branch, BranchConfig, named_dropout
from sibra_dist.models.linear import unit_length


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_keeps_the_mean_and_belongs_to_the_row_name(rate: float) -> None:
    names = torch.arange(4000) * 7919
    ones = torch.ones(4000, 30)
    dropped = named_dropout(ones, rate, stream(4), names)
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / (1 - rate)])
    # 120,000 draws: five standard deviations.
    assert float((dropped == 0).float().mean()) == pytest.approx(rate, abs=5 * (rate * (1 - rate) / 120_000) ** 0.5)
    order = torch.randperm(4000, generator=torch.Generator().manual_seed(0))[:50]
    assert torch.equal(named_dropout(ones[:50], rate, stream(4), names[order]), dropped[order])
    assert not torch.equal(named_dropout(ones, rate, stream(5), names), dropped)
    columns = (dropped == 0).float().mean(0)
    assert float(columns.std()) < 0.02
    together = torch.corrcoef((dropped == 0).float().T).fill_diagonal_(0)
    assert float(together.abs().max()) < 0.1


def test_one_row_passes_batch_normalisation() -> None:
    norm = BatchNorm(3).train()
    assert norm(torch.ones(1, 3)).isfinite().all()
    assert norm(torch.randn(4, 3)).mean(0).abs().max() < 1e-5


def test_running_statistics_are_those_of_what_was_seen_however_little() -> None:
    norm = BatchNorm(2)
    batches = [torch.tensor([[3.0, -1.0], [5.0, 7.0], [4.0, 0.0]]), torch.tensor([[11.0, 2.0], [1.0, 2.5]])]
    norm.train()(batches[0])
    inputs = torch.tensor([[2.0, 9.0]])
    mean, variance = batches[0].mean(0), batches[0].var(0)
    torch.testing.assert_close(norm.eval()(inputs), (inputs - mean) / (variance + norm.eps).sqrt())

    norm.train()(batches[1])
    # The newer has the weight 0.1, the older 0.9 * 0.1.
    mean = (0.9 * batches[0].mean(0) + batches[1].mean(0)) / 1.9
    variance = (0.9 * batches[0].var(0) + batches[1].var(0)) / 1.9
    torch.testing.assert_close(norm.eval()(inputs), (inputs - mean) / (variance + norm.eps).sqrt())


@pytest.mark.parametrize("ranks", [3, 12, 19])
def test_ranks_that_have_seen_nothing_average_to_nothing(ranks: int) -> None:
    """As `Ranks.reduce_step` averages: each rank's share is added up, and 12 times 1/12 is less than 1 in float32."""
    norm = BatchNorm(3).train()
    inputs = torch.tensor([[1.0, -2.0, 0.5]])
    for _ in range(3):
        norm(inputs)
        for statistic in norm.buffers():
            if statistic.is_floating_point():
                share = statistic / ranks
                statistic.zero_()
                for _ in range(ranks):
                    statistic += share
    torch.testing.assert_close(norm.eval()(inputs), inputs / (1 + norm.eps) ** 0.5)


def test_a_row_of_zeros_has_an_ordinary_gradient() -> None:
    """It has no direction: torch's own `normalize` would divide the gradient by 1e-12."""
    branch = Branch(BranchConfig(input_size=4, hidden_sizes=(), input_dropout=0.0, output_activation=False), 3)
    inputs = torch.zeros(2, 4, requires_grad=True)
    branch(inputs, torch.arange(2), None).sum().backward()
    users = torch.zeros(1, 3, requires_grad=True)
    SCORES["cosine"].all_pairs(users, torch.ones(2, 3)).sum().backward()
    for gradient in (inputs.grad, users.grad):
        assert gradient is not None
        assert gradient.abs().max() < 10


def test_rows_of_length_1_have_the_gradient_of_the_quotient() -> None:
    rows = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(unit_length, rows)
    torch.testing.assert_close(unit_length(rows), rows / rows.norm(dim=1, keepdim=True))


def test_a_row_of_zeros_stays_one_and_passes_its_gradient_on() -> None:
    rows = torch.zeros(2, 3, requires_grad=True)
    upstream = torch.tensor([[1.0, -2.0, 3.0], [0.0, 4.0, 0.0]])
    scaled = unit_length(rows)
    scaled.backward(upstream)
    assert not scaled.any()
    assert rows.grad is not None
    assert torch.equal(rows.grad, upstream)
