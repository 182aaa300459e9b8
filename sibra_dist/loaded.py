"""A trained run in Python: ids and tables in, tables out. For notebooks; see docs/python.md.

Everything is held in memory and computed in this process. Recommendations for millions of users are the command's,
`sibra-dist recommend`.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from sibra_dist.data.dataset import Dataset
from sibra_dist.data.manifest import Side
from sibra_dist.data.results import ID_COLUMNS
from sibra_dist.errors import ConfigError, SourceError
from sibra_dist.evaluation.embedding import ENCODE_TILE, embed_items
from sibra_dist.evaluation.ranking import MASKED, NO_CANDIDATE, top_k
from sibra_dist.models import build_model
from sibra_dist.models.base import Recommender
from sibra_dist.models.linear import unit_length
from sibra_dist.recommending.listings import ITEM, Entities, Rejected, count_rejected, positions
from sibra_dist.recommending.manifest import USERS_PER_SHARD
from sibra_dist.recommending.newcomers import Given, join, read_table, require_embeddings
from sibra_dist.recommending.recommend import ALL, NEW, NONE, SCHEMA, SEEN, Ranking, entities_of, seen_in
from sibra_dist.training.config import TrainConfig
from sibra_dist.training.placement import pick_device
from sibra_dist.training.run_folder import RunFolder, open_run

logger = logging.getLogger("sibra_dist")

Id = str | int
"""Ids are text; a number stands for its digits."""


class ArrowTable(Protocol):
    """What hands over its columns as Arrow does: a `pyarrow.Table`, a data frame of pandas or Polars."""

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object:
        """A stream of record batches."""


Table = ArrowTable | Mapping[str, Sequence[object]] | str | Path
"""A table of newcomers, as `sibra-dist recommend` reads it: its columns by name, or a file."""


def load_run(path: str | Path, dataset: str | None = None, device: Literal["auto", "cpu", "cuda"] = "auto") -> "LoadedRun":
    """Open a run with its best model.

    Args:
        path: the run's folder, or a URI.
        dataset: where its dataset lies now, if it has moved.
        device: where the model computes; `auto`: on a GPU, if there is one.

    Raises:
        SibraError: no trained model or no dataset is there, one of them is damaged, or there is no such device.
    """
    _require("device", device, ("auto", "cpu", "cuda"))
    folder, config, opened = open_run(path, dataset)
    model, _ = folder.load_best(opened, pick_device(device))
    return LoadedRun(folder, config, opened, model)


class LoadedRun:
    """A run with its dataset and its best model; `load_run` opens one."""

    def __init__(self, folder: RunFolder, config: TrainConfig, dataset: Dataset, model: Recommender) -> None:
        """Hold what belongs together; the model is in evaluation mode."""
        self.folder, self.config, self.dataset, self.model = folder, config, dataset, model
        self.rejected: tuple[Rejected, ...] = ()
        """Records of tables of newcomers that were not used, each with its reason."""
        self._known = dataset
        self._tables: dict[Side, Given] = {}

    def __repr__(self) -> str:
        users, items = self.dataset.users, self.dataset.items
        new = f", {users.newcomers} and {items.newcomers} of them new" if self._tables else ""
        return f"LoadedRun({self.folder.name}: {self.config.model.type}, {users.count} users, {items.count} items{new})"

    def with_newcomers(self, *, users: Table | None = None, items: Table | None = None) -> "LoadedRun":
        """The same run with users, items or both that its dataset does not have; they then have ids like all others.

        A table takes the place of one that was given for the same side before. What cannot be used of it is in `rejected`,
        and a warning says how much that is.

        Raises:
            SourceError: a table cannot be read, or none of its rows can be used.
            ConfigError: the model knows that side by ids alone.
        """
        given: dict[Side, Table | None] = {"users": users, "items": items}
        tables = self._tables | {side: _given(table) for side, table in given.items() if table is not None}
        require_embeddings(self.model, self.config.model.type, tables)
        dataset, refused = join(self._known, tables)
        model = build_model(self.config.model, dataset, self.config.seed)
        model.load_state_dict(self.model.state_dict())
        seated = LoadedRun(self.folder, self.config, dataset, model.to(self.model.device).eval())
        seated._known, seated._tables, seated.rejected = self._known, tables, tuple(refused)
        for reason, count in count_rejected(refused).items():
            logger.warning("not used: %d %s; see `rejected`", count, reason)
        return seated

    @torch.inference_mode()
    def recommend(
        self,
        users: Sequence[Id] | None = None,
        k: int = 10,
        *,
        exclude: Literal["seen", "none"] = "seen",
        candidates: Literal["all", "new"] = "all",
    ) -> pa.Table:
        """The k best items for each user, best first: `user_id`, `item_id`, `score`, `rank` from 1.

        Args:
            users: their ids, new ones too; by default all.
            k: items for each; fewer where fewer are left.
            exclude: `seen` leaves out what is known of a user, `none` nothing.
            candidates: all items, or the new ones alone.

        Raises:
            SourceError: a user is not known.
            ConfigError: a word is none of those above, `users` is no list, or k is less than 1.
            NotANumberError: a score is NaN.
        """
        _require("exclude", exclude, (SEEN, NONE))
        _require("candidates", candidates, (ALL, NEW))
        _require_count(k)
        whom = entities_of(self.dataset, "users", ALL) if users is None else self._find("users", users)
        items = entities_of(self.dataset, "items", candidates)
        if not len(whom.indices) or not len(items.indices):
            return SCHEMA.empty_table()
        ranking = Ranking(self.model, whom, items, seen_in(self.dataset) if exclude == SEEN else lambda users: [], k)
        embeddings = self._item_embeddings[items.indices]
        starts = range(0, len(whom.indices), USERS_PER_SHARD)
        found = [(start, ranking.rank(start, start + USERS_PER_SHARD, embeddings)) for start in starts]
        return pa.concat_tables([ranking.rows(start, tiles) for start, tiles in found])

    def embed_users(self, users: Table | Sequence[Id]) -> pa.Table:
        """Embeddings of users, by a table of new ones or by ids: `user_id`, and `embedding`, a list of d numbers.

        Raises:
            SourceError: a user is not known, or the table cannot be used.
            ConfigError: the model knows users by ids alone, and these are new.
        """
        return self._embed("users", users)

    def embed_items(self, items: Table | Sequence[Id]) -> pa.Table:
        """Embeddings of items, by a table of new ones or by ids: `item_id`, and `embedding`; otherwise as `embed_users`."""
        return self._embed("items", items)

    @torch.inference_mode()
    def similar_items(self, item: Id, k: int = 10) -> pa.Table:
        """The k items whose embeddings have the largest cosine with that of an item: `item_id`, `similarity`, `rank` from 1.

        Equal ones are ordered by index, as everywhere. The item itself is left out.

        Raises:
            SourceError: the item is not known.
            ConfigError: the model has no embeddings to compare, or k is less than 1.
        """
        _require_count(k)
        if not self.model.trainable:
            raise ConfigError(f"the model {self.config.model.type} learns no embeddings, so no items are alike to it")
        (index,) = self._find("items", [item]).indices.tolist()
        embeddings = unit_length(self._item_embeddings.float())
        cosines = embeddings[index] @ embeddings.T
        cosines[index] = MASKED
        best = top_k(cosines[None], min(k, len(cosines)))
        there = best.items[0] != NO_CANDIDATE
        found, similarities = best.items[0][there].cpu().numpy(), best.scores[0][there].cpu().numpy()
        ids = self.dataset.ids("items").take(pa.array(found))
        return pa.table({ITEM: ids, "similarity": similarities, "rank": np.arange(1, len(found) + 1, dtype=np.int32)})

    @cached_property
    def _item_embeddings(self) -> Tensor:
        return embed_items(self.model, torch.arange(self.dataset.items.count, device=self.dataset.device))

    @torch.inference_mode()
    def _embed(self, side: Side, given: Table | Sequence[Id]) -> pa.Table:
        if isinstance(given, Sequence) and not isinstance(given, str):
            run, entities = self, self._find(side, given)
        else:
            run = self.with_newcomers(users=given) if side == "users" else self.with_newcomers(items=given)
            entities = entities_of(run.dataset, side, NEW)
        embed: Callable[[Tensor], Tensor] = run.model.encode_users if side == "users" else run.model.encode_items
        embedded = torch.cat([embed(tile) for tile in entities.indices.split(ENCODE_TILE)]).float().cpu()
        column = pa.FixedSizeListArray.from_arrays(pa.array(embedded.numpy().reshape(-1)), embedded.shape[1])
        return pa.table({ID_COLUMNS[side]: entities.ids, "embedding": column})

    def _find(self, side: Side, ids: Sequence[Id]) -> Entities:
        """The entities with some ids, in their order."""
        if isinstance(ids, str):
            raise ConfigError(f"{side} is the text {ids!r}; give a list of ids, such as [{ids!r}]")
        known, wanted = self.dataset.ids(side), pa.array([str(given) for given in ids], pa.string())
        found = positions(wanted, known)
        if (found < 0).any():
            unknown = wanted[int(np.flatnonzero(found < 0)[0])].as_py()
            raise SourceError(
                f"{self.folder.name} knows no {side.removesuffix('s')} {unknown!r} (they are called as {known[0].as_py()!r}); "
                f"describe new {side} in a table, and give it to with_newcomers({side}=TABLE)"
            )
        return Entities(pa.chunked_array([wanted]), torch.from_numpy(found).to(self.dataset.device))


def _given(table: Table) -> Given:
    if isinstance(table, str | Path):
        return read_table(str(table))
    try:
        return Given("the table", "", pa.table(table))
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise SourceError(f"no table can be made of what was given ({error}); give columns by name") from error


def _require(name: str, word: str, known: Sequence[str]) -> None:
    if word not in known:
        raise ConfigError(f"{name} is {word!r}; it can be {' or '.join(known)}")


def _require_count(k: int) -> None:
    if k < 1:
        raise ConfigError(f"k is {k}; ask for 1 or more")
