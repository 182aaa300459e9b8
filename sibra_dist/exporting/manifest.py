"""What a folder of an exported model holds, and how to tell what was asked and that all of it is there.

    <folder>/
      export.json                         written last: a folder without it is not whole
      <side>/part-*.parquet               user_id (item_id) string, embedding fixed-size list<float32>: a row each, by index
      <side>/embeddings.npy               float32 [count, d]: the same rows
      <side>/ids.jsonl                    the id of each row, a line each, as JSON strings
      towers/<side>.pt2                   if asked for: a program of torch.export
      index/items.faiss                   if asked for: an index of FAISS over the items' rows

Sides are `users` and `items`. A row's number is the index that the user or item has in the dataset.
"""

import json
from typing import Literal, Self

from pydantic import ValidationError

from sibra_dist.config import Config
from sibra_dist.data.manifest import Shard, Side
from sibra_dist.data.storage import Place
from sibra_dist.errors import DatasetError
from sibra_dist.models.base import ScoreName

MANIFEST = "export.json"
EMBEDDINGS, IDS, INDEX = "embeddings.npy", "ids.jsonl", "index/items.faiss"
SCORE_FORMULAS: dict[ScoreName | None, str] = {
    "dot": "dot product of the embeddings of user and item",
    "cosine": "logit(min(max(cosine, 1e-6), 1 - 1e-6)) of the embeddings of user and item",
    None: "computed by a network of the model from both embeddings, and not exported",
}


class ExportRequest(Config):
    """What was asked for: equal requests have equal files."""

    dataset: str
    """Digest of the dataset."""
    checkpoint: str
    """Name of the model's checkpoint; its digits at the end are those of one training."""
    index: bool
    towers: bool
    package_version: str

    def differences(self, other: "ExportRequest") -> list[str]:
        """Names of what the two do not agree on."""
        return [name for name in type(self).model_fields if getattr(self, name) != getattr(other, name)]


class File(Config):
    """A file that is not a shard."""

    path: str
    """Relative to the folder, with forward slashes."""
    bytes: int
    sha256: str


class ExportedSide(Config):
    """The users, or the items."""

    count: int
    """Rows of the embeddings."""
    shards: tuple[Shard, ...]
    embeddings: File
    ids: File


class TowerInput(Config):
    """A tensor that a tower takes."""

    name: str
    modality: str
    dtype: str
    shape: tuple[str | int, ...]
    """`n`: rows asked for; `entries`: those of the lists of all rows."""
    meaning: str
    bound: int | None
    """Values are whole numbers from 0 to below this; null: any number."""


class TowerProgram(Config):
    """A tower: called as `program.module()(present, given)`, it gives embeddings float32 [n, d]."""

    file: File
    modalities: tuple[str, ...]
    """Columns of `present`, bool [n, modalities]."""
    inputs: tuple[TowerInput, ...]
    """Keys of `given`."""


class NeighbourIndex(Config):
    """An index that finds the items of greatest dot product, and how well it does."""

    file: File
    library: str
    kind: str
    unit_length: bool
    """Whether the indexed embeddings were scaled to length 1."""
    k: int
    recall: float
    """Of the k best items, the share that the index finds, on average over the users of the sample."""
    sampled_users: int


class Exported(Config):
    """The manifest of an exported model."""

    format_version: Literal[1] = 1
    request: ExportRequest
    model: str
    """Type of the model."""
    torch: str
    """Version of torch that the towers were made with."""
    embedding_size: int
    """Columns of the embeddings."""
    dtype: Literal["float32"] = "float32"
    score: ScoreName | None
    """How a score is made of embeddings; null: not by a dot product."""
    score_formula: str
    """The same in words."""
    sides: dict[Side, ExportedSide]
    towers: dict[Side, TowerProgram] = {}
    index: NeighbourIndex | None = None

    def files(self) -> list[File | Shard]:
        """All files but the manifest."""
        found: list[File | Shard] = []
        for side in self.sides.values():
            found += [*side.shards, side.embeddings, side.ids]
        found += [tower.file for tower in self.towers.values()]
        return found if self.index is None else [*found, self.index.file]

    @classmethod
    def read(cls, place: Place) -> Self | None:
        """The manifest in a folder; None if there is none.

        Raises:
            DatasetError: it cannot be read.
        """
        try:
            return cls.model_validate(json.loads(place.read(MANIFEST)))
        except FileNotFoundError:
            return None
        except (OSError, ValidationError, ValueError) as error:
            raise DatasetError(
                f"{place / MANIFEST} cannot be read: {' '.join(str(error).split())[:200]}. "
                "Name another folder, or add --overwrite to replace what is there"
            ) from error

    @classmethod
    def of(cls, place: Place) -> Self:
        """The manifest in a folder.

        Raises:
            DatasetError: there is none, or it cannot be read.
        """
        found = cls.read(place)
        if found is None:
            raise DatasetError(f"{place} holds no exported model: it has no {MANIFEST}. Make it with `sibra-dist export`")
        return found

    def write(self, place: Place) -> None:
        """Write it, whole or not at all; `OSError` if it cannot be written."""
        place.write(MANIFEST, json.dumps(self.model_dump(mode="json"), indent=2).encode() + b"\n")
