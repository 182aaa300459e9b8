"""What is found again: the newest checkpoint that is whole, what it holds, and the best model that belongs to it."""

import json
from pathlib import Path

import pytest
import torch

from sibra_dist.data.storage import Place
from sibra_dist.errors import CheckpointError
from sibra_dist.training.checkpoint import load_candidate, load_newest, published
from sibra_dist.training.position import Candidate, Position
from tests.training.saving import (
    Model,
    best,
    divided,
    hold_writes,
    make_optimizer,
    make_saver,
    newest,
    on_ranks,
    require_equal,
    state_after,
    train_step,
    trained,
)


def save(folder: Path, *steps: int, **settings: int) -> None:
    """Checkpoints of one training, each with the state after so many steps."""
    saver = make_saver(folder, **settings)
    for step in steps:
        saver.save(Position(0, step), state_after(step))
    saver.wait()


def model_after(steps: int) -> dict[str, torch.Tensor]:
    """What is kept of a model apart from checkpoints."""
    return {name: value for name, value in state_after(steps).items() if name.startswith("model/")}


def files(folder: Path, suffix: str) -> list[Path]:
    """Of the checkpoints, the oldest first."""
    return sorted((folder / "checkpoints").glob(f"*{suffix}"))


def test_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    model, _ = trained(4)
    position = Position(1, 3, best=0.5, best_epoch=1, evaluations_since_best=2)
    saver = make_saver(tmp_path)
    saver.save(position, state_after(3))
    saver.wait()

    other = Model()
    fresh = make_optimizer(other)
    read = newest(tmp_path)
    assert read is not None
    assert read.position == position
    assert torch.equal(read.tensors["losses"], torch.arange(3.0))
    read.restore(other, fresh)
    train_step(other, fresh, 3)
    require_equal(dict(other.state_dict()), dict(model.state_dict()))


def test_newest_are_kept(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3, 4, 5, keep=2)
    assert [path.name.rsplit("-", 1)[0] for path in files(tmp_path, ".json")] == [
        "epoch-0000-step-00000004",
        "epoch-0000-step-00000005",
    ]
    assert len(files(tmp_path, "")) == 4


def test_what_lies_further_belongs_to_a_training_that_was_given_up(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3, keep=3)
    save(tmp_path, 2, keep=3)
    assert [path.name[:24] for path in files(tmp_path, ".json")] == ["epoch-0000-step-00000001", "epoch-0000-step-00000002"]
    read = newest(tmp_path)
    assert read is not None
    require_equal(read.tensors, state_after(2))


def test_what_is_no_checkpoint_is_left_alone(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "checkpoints" / "notes.json").write_text("mine")
    save(tmp_path, 2)
    assert (tmp_path / "checkpoints" / "notes.json").read_text() == "mine"
    assert newest(tmp_path) is not None


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "delete", "empty"])
def test_damaged_newest_is_told_and_the_one_before_is_used(
    tmp_path: Path, suffix: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1, 2, keep=2)
    victim = files(tmp_path, suffix)[-1]
    content = bytearray(victim.read_bytes())
    match damage:
        case "cut":
            victim.write_bytes(content[:-9])
        case "flip" if suffix == ".json":
            assert b'"step": 2' in content
            victim.write_bytes(content.replace(b'"step": 2', b'"step": 3'))
        case "flip":
            content[-1] ^= 1
            victim.write_bytes(content)
        case "delete":
            victim.unlink()
        case "empty":
            victim.write_bytes(b"")
    read = newest(tmp_path)
    assert read is not None
    assert read.position.step == 1
    require_equal(read.tensors, state_after(1))
    # A checkpoint whose description is gone was never published.
    assert ("is damaged" in caplog.text) != (suffix == ".json" and damage == "delete")


@pytest.mark.parametrize("damage", ["cut", "flip", "delete"])
@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("world", [1, 3])
def test_a_damaged_part_is_found_by_the_ranks_together(
    tmp_path: Path, part: int, damage: str, world: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Each reads what it needs, and all take the checkpoint before if one of them finds damage."""

    def write(ranks):  # type: ignore[no-untyped-def]
        tables = divided(ranks.rank, 3)
        saver = make_saver(tmp_path, ranks=ranks, tables=tables, keep=2)
        for step in (1, 2):
            saver.save(Position(0, step), state_after(step, *tables["table"][:2]))
        saver.wait()

    assert on_ranks(3, write) == [None] * 3
    victim = files(tmp_path, f"-part-{part:05d}-of-00003.safetensors")[-1]
    content = victim.read_bytes()
    victim.write_bytes(content[:-1] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    if damage == "delete":
        victim.unlink()

    def read(ranks):  # type: ignore[no-untyped-def]
        tables = divided(ranks.rank, world)
        found = newest(tmp_path, ranks=ranks, tables=tables)
        require_equal(found.tensors, state_after(1, *tables["table"][:2]))

    assert on_ranks(world, read) == [None] * world
    assert caplog.text.count("is damaged") == 1


def test_all_damaged_is_an_error(tmp_path: Path) -> None:
    save(tmp_path, 1)
    files(tmp_path, ".safetensors")[0].write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged"):
        newest(tmp_path)


def test_none_is_none(tmp_path: Path) -> None:
    assert newest(tmp_path / "nowhere") is None
    assert best(tmp_path / "nowhere") is None


def test_checkpoint_of_another_dataset_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, keep=2)
    with pytest.raises(CheckpointError, match=r"was made from another dataset \(digest, not bbbbbbbbbbbb\)"):
        load_newest(tmp_path / "checkpoints", "b" * 64)


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    read = newest(tmp_path)
    assert read is not None
    with pytest.raises(CheckpointError, match="belongs to another model"):
        read.restore(torch.nn.Linear(3, 4))


def test_description_is_readable(tmp_path: Path) -> None:
    saver = make_saver(tmp_path)
    saver.save(Position(2, 0, best=0.25, best_epoch=1, evaluations_since_best=1), state_after(1))
    saver.wait()
    said = json.loads(files(tmp_path, ".json")[0].read_text())
    assert said["position"]["best"] == 0.25
    assert said["dataset"] == "digest"
    assert said["config"] == {"seed": 3}
    assert said["world"] == 1
    assert [part["file"] for part in said["parts"]] == [files(tmp_path, ".safetensors")[0].name]


def test_the_best_model_is_the_one_that_the_newest_checkpoint_names(tmp_path: Path) -> None:
    saver = make_saver(tmp_path, keep=2)
    for step, is_best in ((1, True), (2, False), (3, True), (4, False)):
        saver.save(Position(0, step), state_after(step), is_best=is_best)
    saver.wait()
    found = best(tmp_path)
    assert found is not None
    assert found.position.step == 3
    require_equal(found.tensors, {name: value for name, value in state_after(3).items() if name.startswith("model/")})
    assert [name[:24] for name in published(Place.at(tmp_path) / "best")] == ["epoch-0000-step-00000003"]


def test_a_candidate_is_kept_while_a_checkpoint_names_it(tmp_path: Path) -> None:
    """It is written once, told when it can be read, and may become the best when it is judged, as it is."""
    told: list[tuple[str, int]] = []

    def published_(name: str) -> None:
        told.append((name, len(published(Place.at(tmp_path) / "checkpoints"))))
        require_equal(load_candidate(Place.at(tmp_path) / "best", name, "digest").tensors, model_after(int(name[16:24])))

    def kept() -> list[int]:
        return [int(name[16:24]) for name in reversed(published(Place.at(tmp_path) / "best"))]

    saver = make_saver(tmp_path, keep=2, published=published_)
    saver.save(Position(0, 1), state_after(1), is_best=True)
    saver.wait()
    told.clear()
    given = Position(0, 2)
    candidate = Candidate(saver.name(given), 0, 2, 0.5, 7)
    for step in (2, 2, 3):
        saver.save(Position(0, step, candidate=candidate), state_after(step))
    saver.wait()
    assert told == [(candidate.name, 1)]
    assert kept() == [1, 2]
    read = newest(tmp_path)
    assert read is not None
    assert read.position.candidate == candidate
    assert best(tmp_path).position.step == 1  # type: ignore[union-attr]

    saver.best = candidate.name
    for step in (4, 5):
        saver.save(Position(0, step), state_after(step))
    saver.wait()
    assert kept() == [2]
    found = best(tmp_path)
    assert found is not None
    require_equal(found.tensors, model_after(2))


def test_a_candidate_that_is_not_the_best_goes_with_its_last_checkpoint(tmp_path: Path) -> None:
    saver = make_saver(tmp_path, keep=2)
    given = Position(0, 2)
    saver.save(Position(0, 1), state_after(1), is_best=True)
    saver.save(Position(0, 2, candidate=Candidate(saver.name(given), 0, 2, 0.5, 7)), state_after(2))
    counts = []
    for step in (3, 4):
        saver.save(Position(0, step), state_after(step))
        saver.wait()
        counts.append(len(published(Place.at(tmp_path) / "best")))
    assert counts == [2, 1]


def test_a_checkpoint_names_the_best_model_of_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if another is found to be the best while it is written."""
    go_on = hold_writes(monkeypatch)
    saver = make_saver(tmp_path, best_name="one")
    saver.save(Position(0, 1), state_after(1))
    saver.best = "another"
    go_on.set()
    saver.wait()
    assert newest(tmp_path).best == "one"  # type: ignore[union-attr]


def test_no_best_model_is_kept_of_a_training_that_was_given_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The first goes on to step 3 and finds the best there; its checkpoint is lost, and the second turns out otherwise."""
    first = make_saver(tmp_path, keep=3)
    for step, is_best in ((1, True), (2, False), (3, True)):
        first.save(Position(0, step), state_after(step), is_best=is_best)
    first.wait()
    files(tmp_path, ".safetensors")[-1].unlink()

    resumed = newest(tmp_path)
    assert resumed is not None
    assert resumed.position.step == 2
    second = make_saver(tmp_path, keep=3, best_name=resumed.best)
    second.save(Position(0, 3), state_after(30))
    second.wait()
    found = best(tmp_path)
    assert found is not None
    assert found.position.step == 1
    assert len(published(Place.at(tmp_path) / "best")) == 1


def test_dying_between_the_best_model_and_its_checkpoint_changes_nothing(tmp_path: Path) -> None:
    saver = make_saver(tmp_path, keep=2)
    saver.save(Position(0, 1), state_after(1), is_best=True)
    saver.save(Position(0, 2), state_after(2), is_best=True)
    saver.wait()
    files(tmp_path, ".json")[-1].unlink()  # as if it had not been written yet
    found = best(tmp_path)
    assert found is not None
    assert found.position.step == 1


def test_a_damaged_best_model_is_told_and_the_one_before_is_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saver = make_saver(tmp_path, keep=2)
    for step in (1, 2):
        saver.save(Position(0, step), state_after(step), is_best=True)
    saver.wait()
    victims = sorted((tmp_path / "best").glob("*.safetensors"))
    victims[1].write_bytes(b"")
    found = best(tmp_path)
    assert found is not None
    assert found.position.step == 1
    assert "is damaged" in caplog.text
    victims[0].unlink()
    with pytest.raises(CheckpointError, match=r"every checkpoint in .*best is damaged"):
        best(tmp_path)


def test_without_checkpoints_the_newest_best_model_is_used(tmp_path: Path) -> None:
    saver = make_saver(tmp_path, keep=2)
    for step in (1, 2):
        saver.save(Position(0, step), state_after(step), is_best=True)
    saver.wait()
    for file in files(tmp_path, ""):
        file.unlink()
    found = best(tmp_path)
    assert found is not None
    assert found.position.step == 2
