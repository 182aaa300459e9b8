import json
from pathlib import Path

import pytest
import torch

from sibra_dist.errors import CheckpointError
from sibra_dist.training import checkpoint
from sibra_dist.training.checkpoint import Position, load_newest, save_checkpoint


@pytest.fixture
def model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))


def trained(model: torch.nn.Module, steps: int) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, fused=True)
    for step in range(steps):
        train_step(model, optimizer, step)
    return optimizer


def train_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.zero_grad()
    model(torch.randn(6, 3, generator=torch.Generator().manual_seed(step))).square().sum().backward()
    optimizer.step()


def test_training_goes_on_bit_for_bit(model: torch.nn.Module, tmp_path: Path) -> None:
    optimizer = trained(model, 3)
    save_checkpoint(tmp_path, Position(1, 3, best=0.5), "digest", model, optimizer, torch.arange(3.0))
    train_step(model, optimizer, 3)

    other = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    fresh = torch.optim.AdamW(other.parameters(), 0.1, fused=True)
    read = load_newest(tmp_path, "digest")
    assert read is not None
    assert read.position == Position(1, 3, best=0.5)
    assert torch.equal(read.tensors["losses"], torch.arange(3.0))
    read.restore(other, fresh)
    train_step(other, fresh, 3)
    for one, two in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(one, two)


def test_newest_are_kept(model: torch.nn.Module, tmp_path: Path) -> None:
    for step in range(1, 6):
        save_checkpoint(tmp_path, Position(0, step), "digest", model, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "epoch-0000-step-00000004.json",
        "epoch-0000-step-00000004.safetensors",
        "epoch-0000-step-00000005.json",
        "epoch-0000-step-00000005.safetensors",
    ]


def test_what_was_just_written_is_never_deleted(model: torch.nn.Module, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, Position(7, 0), "digest", model)
    save_checkpoint(tmp_path, Position(6, 0), "digest", model)
    read = load_newest(tmp_path, "digest")
    assert read is not None
    assert read.position.epoch == 6


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "delete", "empty"])
def test_damaged_newest_is_told_and_the_one_before_is_used(
    model: torch.nn.Module, tmp_path: Path, suffix: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, Position(0, step), "digest", model, keep=2)
    victim = tmp_path / f"epoch-0000-step-00000002{suffix}"
    content = bytearray(victim.read_bytes())
    match damage:
        case "cut":
            victim.write_bytes(content[:-9])
        case "flip" if suffix == ".json":
            victim.write_bytes(content.replace(b'"sha256": "', b'"sha256": "0'))
        case "flip":
            content[-1] ^= 1
            victim.write_bytes(content)
        case "delete":
            victim.unlink()
        case "empty":
            victim.write_bytes(b"")
    read = load_newest(tmp_path, "digest")
    assert read is not None
    assert read.position.step == 1
    # A checkpoint whose description is gone was never published.
    assert ("is damaged" in caplog.text) != (suffix == ".json" and damage == "delete")


def test_all_damaged_is_an_error(model: torch.nn.Module, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, Position(0, 1), "digest", model)
    (tmp_path / "epoch-0000-step-00000001.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged"):
        load_newest(tmp_path, "digest")


def test_none_is_none(tmp_path: Path) -> None:
    assert load_newest(tmp_path / "nowhere", "digest") is None


def test_checkpoint_of_another_dataset_is_refused(model: torch.nn.Module, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, Position(0, 1), "a" * 64, model)
    with pytest.raises(CheckpointError, match=r"was made from another dataset \(aaaaaaaaaaaa, not bbbbbbbbbbbb\)"):
        load_newest(tmp_path, "b" * 64)


def test_checkpoint_of_another_model_is_refused(model: torch.nn.Module, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, Position(0, 1), "digest", model)
    read = load_newest(tmp_path, "digest")
    assert read is not None
    with pytest.raises(CheckpointError, match="belongs to another model"):
        read.restore(torch.nn.Linear(3, 4))


@pytest.mark.parametrize("stage", ["tensors", "description"])
def test_a_full_disk_leaves_what_was_there(
    model: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    save_checkpoint(tmp_path, Position(0, 1), "digest", model)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file" if stage == "tensors" else "write_atomically", full)
    with pytest.raises(CheckpointError, match=r"no checkpoint could be written.*No space left"):
        save_checkpoint(tmp_path, Position(0, 2), "digest", model)
    assert before.items() <= {path.name: path.read_bytes() for path in tmp_path.iterdir()}.items()
    read = load_newest(tmp_path, "digest")
    assert read is not None
    assert read.position.step == 1


def test_description_is_readable(model: torch.nn.Module, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, Position(2, 0, best=0.25, best_epoch=1, evaluations_since_best=1), "digest", model)
    said = json.loads((tmp_path / "epoch-0002-step-00000000.json").read_text())
    assert said["best"] == 0.25
    assert said["dataset"] == "digest"
