"""Files of tensors: what any program reads in them, rows at other divisions, and what is left when one cannot be written."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sibra_dist.data.storage import Place
from sibra_dist.training.parts import Rows, read_parts, write_part
from tests.object_store import ObjectStore

TENSORS = {
    "odd": torch.tensor([True, False, True]),
    "half": torch.arange(5, dtype=torch.bfloat16),
    "count": torch.tensor(7, dtype=torch.int64),
    "bytes": torch.arange(3, dtype=torch.uint8),
    "empty": torch.zeros(0, 4),
    "turned": torch.arange(12.0).reshape(3, 4).T,
    "double": torch.arange(3, dtype=torch.float64),
    "names are of any letters: ä/ü": torch.ones(2, 2, dtype=torch.float16),
}


def whole(name: str) -> None:
    return None


def test_a_file_is_what_safetensors_reads(tmp_path: Path) -> None:
    part = write_part(Place.at(tmp_path), "part.safetensors", TENSORS, {})
    assert part.bytes == (tmp_path / "part.safetensors").stat().st_size
    for found in (load_file(tmp_path / "part.safetensors"), read_parts(Place.at(tmp_path), [part], whole)):
        assert found.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)


def test_it_is_written_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sibra_dist.training.parts.PIECE_BYTES", 7)
    part = write_part(Place.at(tmp_path), "part.safetensors", TENSORS, {})
    assert torch.equal(read_parts(Place.at(tmp_path), [part], whole)["turned"], TENSORS["turned"])


TABLE = torch.arange(30.0).reshape(10, 3)


def division(ranks: int) -> list[Rows]:
    """Of ten rows; of more than ten ranks, some hold none."""
    return [Rows(rank * 10 // ranks, (rank + 1) * 10 // ranks, 10) for rank in range(ranks)]


def write_divided(folder: Place, ranks: int) -> list:  # type: ignore[type-arg]
    parts = []
    for rank, rows in enumerate(division(ranks)):
        tensors = {"table": TABLE[rows.first : rows.last]} | ({"shared": torch.ones(2)} if rank == 0 else {})
        parts.append(write_part(folder, f"{rank}.safetensors", tensors, {"table": rows}))
    return parts


@pytest.mark.parametrize("before", [1, 2, 3, 12])
@pytest.mark.parametrize("after", [1, 2, 5, 12])
def test_rows_are_read_at_any_other_division(tmp_path: Path, before: int, after: int) -> None:
    folder = Place.at(tmp_path)
    parts = write_divided(folder, before)
    assert torch.equal(read_parts(folder, parts, whole)["table"], TABLE)
    for rows in division(after):
        found = read_parts(folder, parts, {"table": rows}.get)
        assert torch.equal(found["table"], TABLE[rows.first : rows.last])
        assert torch.equal(found["shared"], torch.ones(2))


def test_a_whole_table_is_read_by_rows(tmp_path: Path) -> None:
    part = write_part(Place.at(tmp_path), "part", {"table": TABLE}, {})
    assert torch.equal(read_parts(Place.at(tmp_path), [part], {"table": Rows(3, 5, 10)}.get)["table"], TABLE[3:5])


def test_only_parts_that_hold_something_wanted_are_read(tmp_path: Path) -> None:
    folder = Place.at(tmp_path)
    parts = write_divided(folder, 5)
    (tmp_path / "3.safetensors").unlink()
    assert torch.equal(read_parts(folder, parts, {"table": Rows(2, 6, 10)}.get)["table"], TABLE[2:6])
    with pytest.raises(FileNotFoundError):
        read_parts(folder, parts, {"table": Rows(2, 7, 10)}.get)


def test_rows_that_are_missing_or_of_another_table_are_told(tmp_path: Path) -> None:
    folder = Place.at(tmp_path)
    parts = write_divided(folder, 5)
    with pytest.raises(ValueError, match="rows of table are missing"):
        read_parts(folder, [*parts[:2], *parts[3:]], whole)
    with pytest.raises(ValueError, match="table has 10 rows, not 11"):
        read_parts(folder, parts, {"table": Rows(0, 4, 11)}.get)


def test_a_disk_that_is_full_in_the_middle_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_part(Place.at(tmp_path), "part.safetensors", TENSORS, {})
    assert list(tmp_path.iterdir()) == []


def test_an_object_store_that_refuses_leaves_nothing(s3: str, object_store: ObjectStore) -> None:
    large = {"large": torch.zeros(3 * 2**22)}  # so much that it is uploaded in pieces
    object_store.answer = lambda request: "403 Forbidden" if "partNumber=2" in request else None
    with pytest.raises(OSError, match="ACCESS_DENIED"):
        write_part(Place.at(s3), "part.safetensors", large, {})
    object_store.answer = None
    assert Place.at(s3).files() == []
    part = write_part(Place.at(s3), "part.safetensors", large, {})
    assert torch.equal(read_parts(Place.at(s3), [part], whole)["large"], large["large"])


def test_what_a_disk_did_not_keep_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Place.write

    def forgetful(self: Place, name: str, content: object) -> None:
        write(self, name, content)  # type: ignore[arg-type]
        os.truncate(self.path / name, 10)

    monkeypatch.setattr(Place, "write", forgetful)
    with pytest.raises(OSError, match="is not as long as what was written"):
        write_part(Place.at(tmp_path), "part.safetensors", TENSORS, {})
    assert list(tmp_path.iterdir()) == []
