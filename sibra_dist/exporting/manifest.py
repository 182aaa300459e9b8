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

from typing import Literal

from sibra_dist.config import Config
from sibra_dist.data.manifest import Shard, Side
from sibra_dist.data.results import Request, ResultManifest
from sibra_dist.models.base import ScoreName

MANIFEST = "export.json"
EMBEDDINGS, IDS, INDEX = "embeddings.npy", "ids.jsonl", "index/items.faiss"
SCORE_FORMULAS: dict[ScoreName | None, str] = {
    "dot": "dot product of the embeddings of user and item",
    "cosine": "logit(min(max(cosine, 1e-6), 1 - 1e-6)) of the embeddings of user and item",
    None: "computed by a network of the model from both embeddings, and not exported",
}


class ExportRequest(Request):
    """What was asked for."""

    index: bool
    towers: bool


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


class Exported(ResultManifest):
    """The manifest of an exported model."""

    file_name, what, command = MANIFEST, "exported model", "export"

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
