"""Checkpoints are written while training goes on, and what goes wrong then."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from sibra_dist.data.storage import Place
from sibra_dist.errors import CheckpointError
from sibra_dist.training import publishing
from sibra_dist.training.checkpoint import published, state_of
from sibra_dist.training.parts import Part
from sibra_dist.training.position import Position
from sibra_dist.training.ranks import Ranks
from tests.training.saving import (
    ThreadRanks,
    best,
    divided,
    hold_writes,
    make_saver,
    newest,
    on_ranks,
    require_equal,
    state_after,
    train_step,
    trained,
)

ROOT = Path(__file__).parents[2]


def names(folder: Path) -> list[str]:
    """Of the files in a folder of checkpoints, without what is drawn in them."""
    return sorted(path.name[:24] + path.name[33:] for path in folder.iterdir())


def test_what_is_saved_is_the_state_at_that_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on while the write is held up."""
    model, optimizer = trained(2)
    losses = torch.arange(5.0)
    go_on = hold_writes(monkeypatch)
    saver = make_saver(tmp_path)
    saver.save(Position(0, 2), state_of(model, optimizer, losses[:2]), is_best=True)
    for step in range(2, 5):
        train_step(model, optimizer, step)
    losses.zero_()
    assert not torch.equal(state_of(model)["model/table"], state_after(2)["model/table"])
    go_on.set()
    saver.wait()
    for read in (newest(tmp_path), best(tmp_path)):
        assert read is not None
        expected = state_after(2)
        require_equal(read.tensors, {name: expected[name] for name in read.tensors})


def test_there_is_one_copy_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second save waits for the first, which is held up until somebody waits for it."""
    told: list[str] = []
    waited = threading.Event()
    write_part, join = publishing.write_part, threading.Thread.join

    def held_up(folder: Place, file: str, *arguments: Any) -> Part:
        told.append(f"begin {file[:24]}")
        assert waited.wait(60)
        part = write_part(folder, file, *arguments)
        told.append(f"end {file[:24]}")
        return part

    def noticed(self: threading.Thread, timeout: float | None = None) -> None:
        if self.name == "checkpoint":
            waited.set()
        join(self, timeout)

    monkeypatch.setattr(publishing, "write_part", held_up)
    monkeypatch.setattr(threading.Thread, "join", noticed)
    saver = make_saver(tmp_path)
    saver.save(Position(0, 1), state_after(1))
    assert not waited.is_set()
    saver.save(Position(0, 2), state_after(2))
    saver.wait()
    first, second = "epoch-0000-step-00000001", "epoch-0000-step-00000002"
    assert told == [f"begin {first}", f"end {first}", f"begin {second}", f"end {second}"]


def test_close_waits_too(tmp_path: Path) -> None:
    saver = make_saver(tmp_path)
    saver.save(Position(0, 1), state_after(1))
    saver.close()
    assert newest(tmp_path) is not None


STAGES = {"part": "-part-00000-of-00001.safetensors", "description": ".json"}


def refuse(monkeypatch: pytest.MonkeyPatch, suffix: str, folder: str = "checkpoints") -> None:
    """Let the disk be full for files of this kind."""
    write = Place.write

    def full(self: Place, name: str, content: Any) -> None:
        if name.endswith(suffix) and self.uri.endswith(folder):
            raise OSError(28, "No space left on device", name)
        write(self, name, content)

    monkeypatch.setattr(Place, "write", full)


@pytest.mark.parametrize("stage", STAGES)
def test_one_that_cannot_be_written_is_told_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, stage: str
) -> None:
    saver = make_saver(tmp_path)
    saver.save(Position(0, 1), state_after(1))
    saver.wait()
    before = {path.name: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()}
    with monkeypatch.context() as patch:
        refuse(patch, STAGES[stage])
        saver.save(Position(0, 2), state_after(2))
        saver.wait()
    assert "epoch-0000-step-00000002" in caplog.text
    assert "No space left on device" in caplog.text
    assert "the checkpoint before is kept" in caplog.text
    assert {path.name: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()} == before
    saver.save(Position(0, 3), state_after(3))
    saver.wait()
    assert names(tmp_path / "checkpoints") == [f"epoch-0000-step-00000003{suffix}" for suffix in sorted(STAGES.values())]


@pytest.mark.parametrize("stage", STAGES)
def test_the_last_one_that_cannot_be_written_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    saver = make_saver(tmp_path)
    saver.save(Position(0, 1), state_after(1))
    saver.wait()
    refuse(monkeypatch, STAGES[stage])
    saver.save(Position(0, 2), state_after(2), is_last=True)
    with pytest.raises(CheckpointError, match=r"checkpoint .*step-00000002-.* could not be written: .*No space left"):
        saver.wait()
    read = newest(tmp_path)
    assert read is not None
    assert read.position.step == 1


def test_a_best_model_that_cannot_be_written_is_an_error_at_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its checkpoint is not published, for it would name what is not there."""
    saver = make_saver(tmp_path)
    saver.save(Position(0, 1), state_after(1), is_best=True)
    saver.wait()
    refuse(monkeypatch, ".json", "best")
    saver.save(Position(0, 2), state_after(2), is_best=True)
    with pytest.raises(CheckpointError, match=r"best/epoch-0000-step-00000002-.* could not be written"):
        saver.save(Position(0, 3), state_after(3))
    for read in (newest(tmp_path), best(tmp_path)):
        assert read is not None
        assert read.position.step == 1


@pytest.mark.parametrize("what", [".safetensors", ".json"])
def test_a_checkpoint_that_cannot_be_written_again_is_still_the_one_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    saver = make_saver(tmp_path)
    saver.save(Position(0, 1), state_after(1))
    saver.wait()
    refuse(monkeypatch, what, "checkpoints")
    saver.save(Position(0, 1, finished=True), state_after(2))
    saver.wait()
    monkeypatch.undo()
    read = newest(tmp_path)
    assert read is not None
    assert not read.position.finished
    assert all(torch.equal(read.tensors[name], value) for name, value in state_after(1).items())
    saver.save(Position(0, 1, finished=True), state_after(2))
    saver.wait()
    read = newest(tmp_path)
    assert read is not None
    assert read.position.finished
    assert all(torch.equal(read.tensors[name], value) for name, value in state_after(2).items())


def test_a_defect_is_raised_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "write_part", lambda *arguments: 1 / 0)
    saver = make_saver(tmp_path)
    saver.save(Position(0, 1), state_after(1))
    with pytest.raises(ZeroDivisionError):
        saver.wait()


def test_old_ones_that_cannot_be_deleted_are_told_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saver = make_saver(tmp_path)
    saver.save(Position(0, 1), state_after(1))
    saver.wait()

    def stuck(self: Place, files: Any) -> None:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(Place, "delete", stuck)
        saver.save(Position(0, 2), state_after(2), is_last=True)
        saver.wait()
    assert "Read-only file system" in caplog.text
    saver.save(Position(0, 3), state_after(3))
    saver.wait()
    assert len(published(Place.at(tmp_path) / "checkpoints")) == 1


def state_of_rank(step: int, ranks: ThreadRanks) -> dict[str, torch.Tensor]:
    return state_after(step, *divided(ranks.rank, ranks.world)["table"][:2])


@pytest.mark.parametrize("world", [2, 3, 9])
@pytest.mark.parametrize("then", [1, 2, 4])
def test_parts_of_ranks_are_read_on_another_number_of_them(tmp_path: Path, world: int, then: int) -> None:
    """And whole, where the table is no longer divided. The optimizer's state of a row goes with it."""

    def write(ranks: ThreadRanks) -> None:
        saver = make_saver(tmp_path, ranks=ranks, tables=divided(ranks.rank, world))
        saver.save(Position(0, 3), state_of_rank(3, ranks), is_best=True)
        saver.wait()

    assert on_ranks(world, write) == [None] * world
    parts = [f"epoch-0000-step-00000003-part-{rank:05d}-of-{world:05d}.safetensors" for rank in range(world)]
    for folder in ("checkpoints", "best"):
        assert names(tmp_path / folder) == [*parts, "epoch-0000-step-00000003.json"]

    def read(ranks: ThreadRanks) -> None:
        found = newest(tmp_path, ranks=ranks, tables=divided(ranks.rank, then))
        assert found is not None
        require_equal(found.tensors, state_of_rank(3, ranks))

    assert on_ranks(then, read) == [None] * then
    whole = newest(tmp_path)
    assert whole is not None
    require_equal(whole.tensors, state_after(3))
    model, _ = trained(0)
    whole.restore(model, torch.optim.AdamW(model.parameters(), fused=True))


def test_what_ranks_share_is_written_once(tmp_path: Path) -> None:
    """Without divided tables by rank 0 alone, which then waits for nobody."""

    def write(ranks: ThreadRanks) -> None:
        saver = make_saver(tmp_path, ranks=ranks)
        saver.save(Position(0, 1), state_after(1))
        saver.wait()

    assert on_ranks(3, write) == [None] * 3
    assert names(tmp_path / "checkpoints") == [
        "epoch-0000-step-00000001-part-00000-of-00001.safetensors",
        "epoch-0000-step-00000001.json",
    ]


@pytest.mark.parametrize("is_last", [False, True])
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_rank_that_cannot_write_fails_the_checkpoint_on_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, victim: int, is_last: bool
) -> None:
    """At once, as it says so; nothing is published, and the one before is as it was."""

    def write(ranks: ThreadRanks) -> None:
        saver = make_saver(tmp_path, ranks=ranks, tables=divided(ranks.rank, 3), timeout=20.0)
        saver.save(Position(0, 1), state_of_rank(1, ranks))
        saver.wait()
        if ranks.rank == 0:
            refuse(monkeypatch, f"part-{victim:05d}-of-00003.safetensors")
        ranks.gather(None)
        saver.save(Position(0, 2), state_of_rank(2, ranks), is_last=is_last)
        saver.wait()

    results = on_ranks(3, write)
    if is_last:
        assert [type(result) for result in results] == [CheckpointError] * 3
        assert "No space left on device" in str(results[0])
    else:
        assert results == [None] * 3
        assert caplog.text.count("training goes on") == 1
        assert "No space left on device" in caplog.text
    read = newest(tmp_path)
    assert read is not None
    require_equal(read.tensors, state_after(1))


def test_a_part_that_never_appears_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where ranks do not see one folder."""

    def write(ranks: ThreadRanks) -> None:
        saver = make_saver(tmp_path / str(ranks.rank), ranks=ranks, tables=divided(ranks.rank, 2), timeout=0.0)
        saver.save(Position(0, 1), state_of_rank(1, ranks), is_last=True)
        saver.wait()

    told = "the part of rank 1 did not appear in .* all ranks must see this folder"
    results = on_ranks(2, write)
    for result in results:
        with pytest.raises(CheckpointError, match=told):
            raise result  # type: ignore[misc]
    assert list((tmp_path / "0" / "checkpoints").iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.training.saving import make_saver, state_after
from sibra_dist.training.position import Position

folder, states = Path(sys.argv[1]), [state_after(step) for step in range(3)]
for stage in range(1000):
    child = os.fork()
    if child:
        if os.waitpid(child, 0)[1] == 0:
            print(stage)
            break
        continue
    saver = make_saver(folder / str(stage))
    saver.save(Position(0, 1), states[1], is_best=True)
    saver.wait()
    left = stage

    def happens(event, arguments=()):
        global left
        # Whatever changes the disk: a file that is opened to be written, named, deleted or made durable.
        if event in ("os.rename", "os.remove", "os.rmdir", "fsync") or (event == "open" and "w" in str(arguments[1])):
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    fsync = os.fsync
    os.fsync = lambda handle: (happens("fsync"), fsync(handle))
    sys.addaudithook(happens)
    saver.save(Position(0, 2), states[2], is_best=True)
    saver.wait()
    os._exit(0)
"""


def test_killed_at_any_moment_of_a_write_there_is_a_whole_checkpoint(tmp_path: Path) -> None:
    """The one before, or the new one; its best model; and whatever was left behind is gone after the next save."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, cwd=ROOT, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    stages = int(done.stdout)
    assert stages >= 16  # best model and checkpoint, each a part and a description: open, fsync, rename, fsync the folder
    found = []
    for stage in range(stages):
        folder = tmp_path / str(stage)
        read, its_best = newest(folder), best(folder)
        assert read is not None
        assert its_best is not None
        found.append(read.position.step)
        require_equal(read.tensors, state_after(read.position.step))
        assert its_best.position == read.position
        saver = make_saver(folder, best_name=read.best)
        saver.save(Position(0, 3), state_after(3))
        saver.wait()
        assert names(folder / "checkpoints") == [
            "epoch-0000-step-00000003-part-00000-of-00001.safetensors",
            "epoch-0000-step-00000003.json",
        ]
        assert len(names(folder / "best")) == 2
    assert found == sorted(found)
    assert set(found) == {1, 2}


def one_of_two(rank: int, meeting: str, folder: str) -> None:
    """Rank 1 dies at the second save, before its part is durable."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    tables = divided(rank, 2)
    saver = make_saver(Path(folder), ranks=Ranks.current(), tables=tables, timeout=1.0)
    saver.save(Position(0, 1), state_after(1, *tables["table"][:2]), is_best=True)
    saver.wait()
    if rank:
        os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    saver.save(Position(0, 2), state_after(2, *tables["table"][:2]))
    saver.close()
    os._exit(0)  # the other is dead: there is nobody to leave the group with


def test_two_processes_write_parts_and_one_dies_in_the_middle(tmp_path: Path) -> None:
    context = torch.multiprocessing.start_processes(
        one_of_two, args=(str(tmp_path / "meeting"), str(tmp_path)), nprocs=2, join=False, start_method="forkserver"
    )
    for process in context.processes:
        process.join(120)
    assert [process.exitcode for process in context.processes] == [0, -signal.SIGKILL]
    read = newest(tmp_path)
    assert read is not None
    require_equal(read.tensors, state_after(1))
    # What rank 1 has left half done goes with the next save.
    save = make_saver(tmp_path, best_name=read.best)
    save.save(Position(0, 2), state_after(2))
    save.wait()
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
