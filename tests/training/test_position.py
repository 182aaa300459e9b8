import pytest

from sibra_dist.training.position import Candidate, Position


def after(*values: float, patience: int = 0) -> list[Position]:
    """Where training stands after each of so many evaluations, one an epoch."""
    positions, position = [], Position()
    for epoch, value in enumerate(values, start=1):
        candidate = Candidate(f"model {epoch}", epoch, 10 * epoch, None, 0)
        # It may be judged when training is further.
        given = Position(epoch + 1, 0, position.best, position.best_epoch, position.evaluations_since_best, candidate=candidate)
        position = given.judged(value, patience)
        assert (position.epoch, position.step, position.candidate) == (epoch + 1, 0, None)
        positions.append(position)
    return positions


def test_the_first_of_the_highest_is_the_best() -> None:
    positions = after(0.1, 0.3, 0.2, 0.3, 0.4)
    assert [(each.best, each.best_epoch) for each in positions] == [(0.1, 1), (0.3, 2), (0.3, 2), (0.3, 2), (0.4, 5)]
    assert [each.evaluations_since_best for each in positions] == [0, 0, 1, 2, 0]


def test_a_first_value_of_zero_is_the_best_so_far() -> None:
    assert after(0.0)[0].best_epoch == 1


@pytest.mark.parametrize(("patience", "finished"), [(1, [False, True, True]), (2, [False, False, True]), (3, [False] * 3)])
def test_patience_ends_after_so_many_without_a_better_one(patience: int, finished: list[bool]) -> None:
    assert [each.finished for each in after(0.3, 0.2, 0.3, patience=patience)] == finished


@pytest.mark.parametrize("patience", [0, -1])
def test_without_patience_none_is_lost(patience: int) -> None:
    assert not any(each.finished for each in after(0.3, *[0.1] * 20, patience=patience))


def test_what_is_told_of_a_candidate() -> None:
    trained, untrained = Candidate("a", 2, 30, 0.5, 7), Candidate("b", 0, 0, None, 0)
    assert trained.line({"val/x": 1.0}) == {"epoch": 2, "steps": 30, "loss": 0.5, "val/x": 1.0}
    assert untrained.line({"val/x": 1.0}) == {"epoch": 0, "steps": 0, "val/x": 1.0}
