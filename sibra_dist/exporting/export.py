"""What a trained model knows, in files that others read: embeddings with ids, an index of the items, towers.

Embeddings go to Parquet shards of a fixed number of rows, which ranks take in turn, and are computed in tiles of fixed
size: so a shard comes from the same computation whoever makes it, and nothing is held that grows with the dataset but its
ids. The arrays and the index are made of the shards. The manifest is written last.
"""

from dataclasses import dataclass, replace

import pyarrow as pa
import torch

from sibra_dist import __version__
from sibra_dist.data.dataset import Dataset, open_dataset
from sibra_dist.data.manifest import SIDES, Shard, Side
from sibra_dist.data.publish import write_shard, writing
from sibra_dist.data.results import ID_COLUMNS
from sibra_dist.data.storage import Place
from sibra_dist.errors import CheckpointError, ConfigError, SibraError, TrainingError
from sibra_dist.exporting.folder import REMEDY, begin, complete_side, shard_table, width_of
from sibra_dist.exporting.index import require_faiss, write_index
from sibra_dist.exporting.manifest import SCORE_FORMULAS, Exported, ExportRequest, TowerProgram
from sibra_dist.exporting.towers import write_tower
from sibra_dist.models.base import Recommender
from sibra_dist.training.placement import pick_device
from sibra_dist.training.progress import Counting, uncounted
from sibra_dist.training.ranks import Ranks
from sibra_dist.training.run_folder import RunFolder

ROWS_PER_SHARD = 65536
"""Whatever the number of ranks; d = 128 makes them 32 MB."""
TILE = 4096
"""Users or items embedded at once."""


@dataclass(frozen=True)
class Asked:
    """What is asked for besides the embeddings."""

    index: bool = False
    towers: bool = False
    dataset: str | None = None
    """Folder of the dataset, where it is not the one the run names."""
    overwrite: bool = False

    def anywhere(self) -> "Asked":
        """The same, where the working folder is another: every path is absolute."""
        return replace(self, dataset=str(Place.at(self.dataset)) if self.dataset is not None else None)


@dataclass(frozen=True)
class Embedding:
    """Whose embeddings are computed, and by which model."""

    model: Recommender
    dataset: Dataset
    ids: dict[Side, pa.ChunkedArray]
    """string [count], by side"""

    def shards(self, side: Side) -> range:
        """The numbers of a side's shards."""
        return range(-(-self.count(side) // ROWS_PER_SHARD))

    def count(self, side: Side) -> int:
        """Rows of a side."""
        return len(self.ids[side])

    @torch.inference_mode()
    def rows(self, side: Side, number: int | None) -> pa.Table:
        """The rows of a shard; None stands for an empty one.

        Every shard takes as many tiles, of no rows if need be: where tables are divided the ranks embed together.

        Raises:
            TrainingError: an embedding is not finite.
        """
        first = self.count(side) if number is None else number * ROWS_PER_SHARD
        stop = min(first + ROWS_PER_SHARD, self.count(side))
        encode = self.model.encode_users if side == "users" else self.model.encode_items
        rows = torch.arange(first, stop, device=self.dataset.device)
        tiles = [encode(rows[start : start + TILE]).float() for start in range(0, ROWS_PER_SHARD, TILE)]
        embedded = torch.cat(tiles)
        wrong = torch.nonzero(~embedded.isfinite().all(1)).flatten()
        if len(wrong):
            name = self.ids[side][first + int(wrong[0])].as_py()
            raise TrainingError(
                f"the embedding of {ID_COLUMNS[side]} {name!r} is not finite; the model has diverged: export an earlier "
                "checkpoint, or train with a lower learning rate"
            )
        return shard_table(side, self.ids[side].slice(first, len(rows)), embedded)


def export(
    run: RunFolder,
    asked: Asked,
    to: Place,
    progress: Counting = uncounted,
    device: torch.device | None = None,
) -> Exported:
    """Write what is asked for of a run's best model to a folder. Where there are ranks, all call this.

    Args:
        run: with a trained model.
        asked: what is asked for.
        to: the folder; if all of it is there already, it stays as it is.
        progress: told how many users and items are embedded, and their number.
        device: by default what the run's configuration says.

    Raises:
        SibraError: the run, its dataset or the folder cannot be used; the model has not got what is asked for; an embedding
            is not finite.
    """
    ranks = Ranks.current()
    config = run.config()
    if asked.index:
        ranks.alone(require_faiss)
    dataset = open_dataset(asked.dataset or config.dataset)
    with torch.inference_mode():
        model, name = run.load_named_best(dataset, device or pick_device(config.training.device), ranks)
    _require(model, config.model.type, asked)
    request = ExportRequest(
        dataset=dataset.manifest.digest,
        checkpoint=name,
        index=asked.index,
        towers=asked.towers,
        package_version=__version__,
    )
    ready: list[bool] = []
    ranks.alone(lambda: ready.append(begin(to, request, asked.overwrite)))
    if ranks.agree(ready)[0]:
        return Exported.of(to)
    embedding = Embedding(model, dataset, {side: dataset.ids(side) for side in SIDES})
    shards = _make(embedding, to, ranks, progress)

    def complete() -> None:
        with writing(to, REMEDY):
            _complete(run, embedding, request, shards, to)

    ranks.alone(complete)
    return Exported.of(to)


def _require(model: Recommender, kind: str, asked: Asked) -> None:
    """Raise a `ConfigError` unless the model has what is asked for."""
    if not model.trainable:
        raise ConfigError(f"model {kind} has no embeddings and no towers: there is nothing to export of it")
    if asked.index and model.score_name is None:
        raise ConfigError(
            f"model {kind} scores by a network, not by a dot product or cosine of embeddings, so no index finds the "
            "best items: drop --index, or use `sibra-dist recommend`"
        )
    if asked.towers and (model.tower(items=False) is None or model.tower(items=True) is None):
        raise ConfigError(f"model {kind} has no towers: drop --towers")


def _make(embedding: Embedding, to: Place, ranks: Ranks, progress: Counting) -> dict[tuple[Side, int], Shard]:
    """Make the shards; ranks take those of a side in turn, and know all of them in the end."""
    shards: dict[tuple[Side, int], Shard] = {}
    total = sum(embedding.count(side) for side in SIDES)
    for side in SIDES:
        numbers = embedding.shards(side)
        for turn in range(0, len(numbers), ranks.world):
            number = numbers[turn + ranks.rank] if turn + ranks.rank < len(numbers) else None
            made: Shard | SibraError | None = None
            try:
                rows = embedding.rows(side, number)
                if number is not None:
                    with writing(to, REMEDY):
                        made = write_shard(rows, to, side, number)[0]
            except SibraError as error:
                made = error
            # Ranks meet after every shard, so that one that fails ends the others too.
            for done, found in ranks.gather((number, made)):
                if isinstance(found, SibraError):
                    raise found
                if done is not None and found is not None:
                    shards[side, done] = found
            progress(sum(shard.rows for shard in shards.values()), total)
    return shards


def _complete(
    run: RunFolder, embedding: Embedding, request: ExportRequest, made: dict[tuple[Side, int], Shard], to: Place
) -> None:
    """Write what is made of the shards, the towers, and the manifest."""
    shards = {side: [made[side, number] for number in embedding.shards(side)] for side in SIDES}
    sides = {side: complete_side(to, side, shards[side]) for side in SIDES}
    score = embedding.model.score_name
    towers: dict[Side, TowerProgram] = {}
    if request.towers:
        # Anew, whole and on the CPU: this one may be on a GPU, or have a part of the tables.
        whole, name = run.load_named_best(embedding.dataset.to(torch.device("cpu")), torch.device("cpu"))
        if name != request.checkpoint:
            raise CheckpointError(f"{run.name} is being trained, and its best model is another one by now; export it again")
        for side in SIDES:
            tower = whole.tower(items=side == "items")
            assert tower is not None
            towers[side] = write_tower(to, side, tower)
    index = None
    if request.index:
        assert score is not None
        index = write_index(to, score, shards["users"], shards["items"], ROWS_PER_SHARD)
    Exported(
        request=request,
        model=run.config().model.type,
        torch=torch.__version__,
        embedding_size=width_of(to, shards["users"][0]),
        score=score,
        score_formula=SCORE_FORMULAS[score],
        sides=sides,
        towers=towers,
        index=index,
    ).write(to)
