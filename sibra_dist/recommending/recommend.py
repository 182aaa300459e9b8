"""The k best items of each user, to Parquet shards: for any number of users, in the same files on any number of ranks.

A shard has a fixed number of users, and ranks take the shards that are missing in turn. Within a shard users are embedded
together and ranked in tiles of fixed size, so a shard comes from the same computation whoever makes it. A rank holds the
embeddings of all candidates, the scores of one tile and the rows of one shard: nothing is as large as users x items.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import pyarrow as pa
import torch
from torch import Tensor

from sibra_dist import __version__
from sibra_dist.data.dataset import Csr, Dataset, open_dataset, pairs_of
from sibra_dist.data.manifest import Shard, Side
from sibra_dist.data.publish import write_shard, writing
from sibra_dist.data.storage import Place
from sibra_dist.errors import ConfigError, SibraError
from sibra_dist.evaluation.embedding import embed_items
from sibra_dist.evaluation.ranking import NO_CANDIDATE, NotANumberError, Recommendations, mask_, rank
from sibra_dist.models.base import Recommender
from sibra_dist.recommending.folder import REMEDY, begin, finish
from sibra_dist.recommending.listings import (
    ITEM,
    USER,
    Entities,
    Rejected,
    by_user,
    count_rejected,
    find_pairs,
    find_users,
    read_listing,
    rejected_csv,
)
from sibra_dist.recommending.manifest import TABLE, USERS_PER_SHARD, Recommended, Request
from sibra_dist.recommending.newcomers import join, read_tables, require_embeddings
from sibra_dist.training.placement import keep_freed_memory, pick_device
from sibra_dist.training.progress import Counting, uncounted
from sibra_dist.training.ranks import Ranks
from sibra_dist.training.run_folder import RunFolder

USER_TILE = 256
"""Users ranked at once."""
ITEM_TILE = 65536
"""Candidates scored at once."""
SEEN, NONE = "seen", "none"
ALL, NEW = "all", "new"
SCHEMA = pa.schema([(USER, pa.string()), (ITEM, pa.string()), ("score", pa.float32()), ("rank", pa.int32())])

Excluded = Callable[[Tensor], list[tuple[Tensor, Tensor]]]
"""Users int64 [n] -> pairs (row int64 [m], item int64 [m]) that are not recommended; row is a position among the users."""


@dataclass(frozen=True)
class Asked:
    """What is asked for."""

    k: int = 100
    users: str = ALL
    """`all`; `new`: those of `new_users`; or a file that lists some of either."""
    exclude: str = SEEN
    """`seen`: what is known of a user, in any split and by the tables; `none`; or a file of pairs."""
    candidates: str = ALL
    """`all` items, or `new`: those of `new_items`."""
    new_users: str | None = None
    """A table of users that the dataset does not have; see `sibra_dist.recommending.newcomers`."""
    new_items: str | None = None
    """Likewise of items."""
    dataset: str | None = None
    """Folder of the dataset, where it is not the one the run names."""
    overwrite: bool = False

    def anywhere(self) -> "Asked":
        """The same, where the working folder is another: every path is absolute."""

        def absolute(path: str | None, *words: str) -> str | None:
            return path if path is None or path in words else str(Place.at(path))

        return replace(
            self,
            users=absolute(self.users, ALL, NEW) or ALL,
            exclude=absolute(self.exclude, SEEN, NONE) or SEEN,
            new_users=absolute(self.new_users),
            new_items=absolute(self.new_items),
            dataset=absolute(self.dataset),
        )


@dataclass(frozen=True)
class Ranking:
    """Who is to be recommended what, by which model."""

    model: Recommender
    users: Entities
    items: Entities
    """Candidates, one index after the other"""
    excluded: Excluded
    k: int

    def rank(self, start: int, stop: int, embeddings: Tensor) -> list[Recommendations]:
        """The best of the candidates for users start to stop, tile by tile."""
        users = self.users.indices[start:stop]
        embedded = self.model.encode_users(users)
        found: list[Recommendations] = []
        for tile, embedded_tile in zip(users.split(USER_TILE), embedded.split(USER_TILE), strict=True):
            try:
                found += [self._rank_tile(tile, embedded_tile, embeddings)] if len(tile) else []
            except NotANumberError as error:
                user = self.users.ids[start + len(found) * USER_TILE + error.row].as_py()
                who = f"{type(self.model).__name__} for user {user!r} and item {self.items.ids[error.candidate].as_py()!r}"
                raise NotANumberError(error.row, error.candidate, who) from error
        return found

    def rows(self, start: int, found: Sequence[Recommendations]) -> pa.Table:
        """The rows of a shard: those of users from `start` on, as many as were ranked."""
        items, scores = (torch.cat(parts).cpu() for parts in zip(*found, strict=True))
        there = items != NO_CANDIDATE
        users, ranks = torch.nonzero(there, as_tuple=True)
        columns = [
            self.users.ids.slice(start, len(items)).combine_chunks().take(pa.array(users.numpy())),
            self.items.ids.take(pa.array(items[there].numpy())),
            pa.array(scores[there].numpy(), pa.float32()),
            pa.array((ranks + 1).int().numpy()),
        ]
        return pa.table(columns, schema=SCHEMA)

    def _rank_tile(self, users: Tensor, embedded: Tensor, embeddings: Tensor) -> Recommendations:
        first = int(self.items.indices[0]) if len(self.items.indices) else 0
        pairs = [(rows.to(embedded.device), items.to(embedded.device) - first) for rows, items in self.excluded(users)]

        def scores(start: int, stop: int) -> Tensor:
            tile = self.model.score(embedded, embeddings[start:stop])
            for rows, items in pairs:
                mask_(tile, rows, items, start)
            return tile

        # Places that no candidate can fill would take memory.
        return rank(scores, len(embeddings), min(self.k, len(embeddings)), ITEM_TILE)


@torch.inference_mode()
def recommend(
    run: RunFolder,
    asked: Asked,
    to: Place,
    progress: Counting = uncounted,
    device: torch.device | None = None,
) -> Recommended:
    """Write the recommendations of a run's best model to a folder. Where there are ranks, all call this.

    Args:
        run: with a trained model.
        asked: what is asked for.
        to: the folder; shards of the same request that are there already are kept.
        progress: told how many of the users are done, and their number.
        device: by default what the run's configuration says.

    Raises:
        SibraError: the run, its dataset, a file or the folder cannot be used; or a score is NaN.
    """
    ranks = Ranks.current()
    config = run.config()
    tables = read_tables(asked.new_users, asked.new_items)
    _require_tables(asked)
    dataset, refused = join(open_dataset(asked.dataset or config.dataset), tables)
    users, whose, refused_users = _users(asked, dataset)
    excluded, what, refused_pairs = _excluded(asked, dataset)
    refused += [*refused_users, *refused_pairs]
    model, name = run.load_named_best(dataset, device or pick_device(config.training.device), ranks)
    keep_freed_memory(model.device)
    require_embeddings(model, config.model.type, tables)
    request = Request(
        dataset=dataset.manifest.digest,
        checkpoint=name,
        k=asked.k,
        users=whose,
        candidates=asked.candidates,
        exclude=what,
        **{f"new_{side}": given.sha256 for side, given in tables.items()},
        users_per_shard=USERS_PER_SHARD,
        package_version=__version__,
    )
    plan = Recommended(request=request, users=len(users.indices), rejected=count_rejected(refused))
    shards: dict[int, Shard] = {}
    rejected = rejected_csv(refused) if refused else None
    ranks.alone(lambda: shards.update(begin(to, plan, rejected, asked.overwrite)))
    shards = ranks.agree(shards)
    items = entities_of(dataset, "items", asked.candidates)
    _make(Ranking(model, users, items, excluded, asked.k), plan, shards, to, ranks, progress)
    done = plan

    def complete() -> None:
        nonlocal done
        done = finish(to, plan, shards)

    ranks.alone(complete)
    return ranks.agree(done)


def _make(ranking: Ranking, plan: Recommended, shards: dict[int, Shard], to: Place, ranks: Ranks, progress: Counting) -> None:
    """Make the shards that are missing; ranks take them in turn, and know all of them in the end."""
    missing = [number for number in range(plan.num_shards) if number not in shards]
    if not missing:
        return
    embeddings = embed_items(ranking.model, ranking.items.indices, ranks=(ranks.rank, ranks.world))
    for turn in range(0, len(missing), ranks.world):
        progress(min((plan.num_shards - len(missing) + turn) * USERS_PER_SHARD, plan.users), plan.users)
        number = missing[turn + ranks.rank] if turn + ranks.rank < len(missing) else None
        made: Shard | SibraError | None = None
        try:
            made = _make_one(ranking, number, embeddings, to)
        except SibraError as error:
            made = error
        # Ranks meet after every shard, so that one that fails ends the others too.
        for done, found in ranks.gather((number, made)):
            if isinstance(found, SibraError):
                raise found
            if done is not None and found is not None:
                shards[done] = found
    progress(plan.users, plan.users)


def _make_one(ranking: Ranking, number: int | None, embeddings: Tensor, to: Place) -> Shard | None:
    """Make and write one shard; a rank for which there is none embeds with the others, as where tables are divided it must."""
    if number is None:
        ranking.rank(0, 0, embeddings)
        return None
    start = number * USERS_PER_SHARD
    rows = ranking.rows(start, ranking.rank(start, start + USERS_PER_SHARD, embeddings))
    with writing(to, REMEDY):
        return write_shard(rows, to, TABLE, number)[0]


def _users(asked: Asked, dataset: Dataset) -> tuple[Entities, str, list[Rejected]]:
    """The users, what the request says of them, and what was not used of the file that lists them."""
    if asked.users in (ALL, NEW):
        return entities_of(dataset, "users", asked.users), asked.users, []
    listing = read_listing(asked.users, [USER])
    users, refused = find_users(listing, dataset.ids("users"))
    return users, listing.sha256, refused


def seen_in(dataset: Dataset) -> Excluded:
    """What is known of users, in any split, and what is told of new items."""
    tested = partial(pairs_of, *dataset.held_out["test"])
    told = partial(pairs_of, *_told_of_new_items(dataset))
    return lambda users: [*dataset.masked("test", users), tested(users), told(users)]


def _told_of_new_items(dataset: Dataset) -> tuple[Tensor, Csr]:
    """The users that new items name, int64 ascending, and those items, a row each of these users."""
    first, histories = dataset.items.known, dataset.items.histories
    indptr = histories.indptr[first:]
    items = torch.arange(first, dataset.items.count).repeat_interleave(indptr.diff())
    users = histories.indices[int(indptr[0]) :].long()
    return by_user(users.numpy(), items.numpy(), dataset.items.count)


def entities_of(dataset: Dataset, side: Side, which: str) -> Entities:
    """`all` users (or items), or the `new` ones."""
    entities = dataset.users if side == "users" else dataset.items
    first = entities.known if which == NEW else 0
    return Entities(dataset.ids(side).slice(first), torch.arange(first, entities.count, device=dataset.device))


def _require_tables(asked: Asked) -> None:
    for option, wanted, table in (("users", asked.users, asked.new_users), ("candidates", asked.candidates, asked.new_items)):
        if wanted == NEW and table is None:
            side = "users" if option == "users" else "items"
            raise ConfigError(f"--{option} new: there are no new {side}; give their table with --new-{side} TABLE")


def _excluded(asked: Asked, dataset: Dataset) -> tuple[Excluded, str, list[Rejected]]:
    """What is not recommended, what the request says of it, and what was not used of the file that lists it."""
    if asked.exclude == SEEN:
        return seen_in(dataset), SEEN, []
    if asked.exclude == NONE:
        return lambda users: [], NONE, []
    listing = read_listing(asked.exclude, [USER, ITEM])
    pairs, refused = find_pairs(listing, dataset.ids("users"), dataset.ids("items"))
    return lambda users: [pairs_of(*pairs, users)], listing.sha256, refused
