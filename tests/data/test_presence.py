import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, chi2_contingency

from sibra_dist.data.presence import NOTHING_HIDDEN, Hidden, describe_hide, parse_hide, read_hide
from sibra_dist.errors import ConfigError

COUNT = 20_000
ENTITIES = torch.arange(COUNT)
shares = st.floats(0, 1)
seeds = st.integers(0, 2**31)


def kept(share: float, seed: int = 0, side: str = "items", name: str = "genres") -> torch.Tensor:
    return Hidden(side, {name: share}, seed).visible((name,), ENTITIES)[:, 0]  # type: ignore[arg-type]


def test_nothing_is_hidden_by_default() -> None:
    assert NOTHING_HIDDEN.visible(("genres", "plot"), torch.tensor([3, 1, 2])).tolist() == [[True, True]] * 3


@given(seed=seeds)
def test_share_0_hides_none_and_share_1_all(seed: int) -> None:
    assert kept(0.0, seed).all()
    assert not kept(1.0, seed).any()


@given(share=shares, more=shares, seed=seeds)
def test_who_loses_a_modality_at_a_share_loses_it_at_every_greater_one(share: float, more: float, seed: int) -> None:
    low, high = sorted((share, more))
    assert (kept(low, seed) | ~kept(high, seed)).all()


@pytest.mark.parametrize("share", [0.001, 0.25, 0.5, 0.999])
def test_so_many_are_hidden_as_the_share_says(share: float) -> None:
    hidden = int((~kept(share, seed=5)).sum())
    assert binomtest(hidden, COUNT, share).pvalue > 1e-6


@pytest.mark.parametrize("other", [{"seed": 8}, {"side": "users"}, {"name": "plot"}], ids=str)
def test_another_seed_side_or_modality_hides_others(other: dict[str, object]) -> None:
    """Independently: knowing who loses one says nothing about who loses the other."""
    one, two = kept(0.5, seed=7), kept(0.5, **{"seed": 7, **other})  # type: ignore[arg-type]
    table = [[int((one == a).logical_and(two == b).sum()) for a in (True, False)] for b in (True, False)]
    assert chi2_contingency(table).pvalue > 1e-6


@given(entities=st.lists(st.integers(0, COUNT - 1), min_size=1, max_size=20, unique=True))
def test_an_entity_is_treated_alike_whoever_else_is_asked_about(entities: list[int]) -> None:
    assert (
        kept(0.3, seed=1)[entities].tolist()
        == Hidden("items", {"genres": 0.3}, 1).visible(("genres",), torch.tensor(entities)).flatten().tolist()
    )


def test_a_column_a_modality_in_the_order_of_the_names() -> None:
    hidden = Hidden("users", {"club": 1.0, "age": 0.5}, seed=2)
    visible = hidden.visible(("age", "interactions", "club"), ENTITIES)
    assert visible.shape == (COUNT, 3)
    assert torch.equal(visible[:, 0], kept(0.5, 2, "users", "age"))
    assert visible[:, 1].all()
    assert not visible[:, 2].any()


def test_another_process_hides_the_same_ones() -> None:
    """Python's own hash of a name differs from one process to the next."""
    program = (
        "import torch; from sibra_dist.data.presence import Hidden; "
        "print(Hidden('items', {'genres': 0.5}, 3).visible(('genres',), torch.arange(40))[:, 0].int().tolist())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(kept(0.5, 3)[:40].int().tolist())


def test_shares_are_told_apart_by_side() -> None:
    hide = {"items.genres": 0.25, "users.interactions": 1.0, "items.interactions": 0.5}
    users, items = parse_hide(hide, (("interactions",), ("interactions", "genres")), seed=4)
    assert users == Hidden("users", {"interactions": 1.0}, 4)
    assert items == Hidden("items", {"genres": 0.25, "interactions": 0.5}, 4)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("items.genre", r"did you mean items\.genres\?"),
        ("users.photograph", r"known here: items\.genres, users\.age"),
        ("genres", r"did you mean items\.genres\?"),
    ],
)
def test_what_the_model_does_not_read_cannot_be_hidden(name: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=rf"^training\.hide {name}: the model reads no such modality; {nearest}$"):
        parse_hide({name: 1.0}, (("age",), ("genres",)), 0, "training.hide")


def test_options_are_read_and_told_alike() -> None:
    hide = read_hide(["items.plot", "items.genres=0.25", "users.age=1"])
    assert hide == {"items.plot": 1.0, "items.genres": 0.25, "users.age": 1.0}
    assert describe_hide(hide) == ["items.genres=0.25", "items.plot", "users.age"]
    assert read_hide(describe_hide(hide)) == hide


@pytest.mark.parametrize("option", ["items.plot=", "items.plot=half", "items.plot=1.5", "items.plot=-0.1", "items.plot=nan"])
def test_an_option_that_is_no_share_is_told(option: str) -> None:
    with pytest.raises(ConfigError, match=r"^--hide .* is not a share from 0 to 1; write items\.plot=0\.25, or items\.plot to"):
        read_hide([option])


def test_a_modality_hidden_twice_is_told() -> None:
    assert read_hide(["items.plot", "items.plot=1"]) == {"items.plot": 1.0}
    with pytest.raises(ConfigError, match=r"--hide items.plot is given twice, with 1 and 0.5: give it once"):
        read_hide(["items.plot", "items.plot=0.5"])
