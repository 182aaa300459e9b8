"""What a folder of recommendations holds, and how to tell what was asked and whether all of it is there.

    <folder>/
      recommendations.json                  written first, as a plan, and once more at the end: only then it is complete
      recommendations/part-*.parquet        user_id string, item_id string, score float32, rank int32, from 1
      rejected.csv                          file, reason, record: what of the given files was not used, if anything

A shard has the recommendations of `USERS_PER_SHARD` users, the last one of fewer, in the order in which they were asked for,
each user's best first. It is named by its number and the first 8 hexadecimal digits of its SHA-256, as a dataset's shards are.
"""

from typing import Literal

from sibra_dist.data import results
from sibra_dist.data.manifest import Shard

MANIFEST = "recommendations.json"
TABLE = "recommendations"
REJECTED = "rejected.csv"
USERS_PER_SHARD = 8192
"""Whatever the number of ranks and the size of tiles, so that shards depend on neither; k = 100 makes them some 5 MB."""


class Request(results.Request):
    """What recommendations were asked for."""

    k: int
    users: str
    """`all`, `new`, or the SHA-256 of the file that lists them."""
    candidates: str = "all"
    """`all` items, or the `new` ones."""
    new_users: str = "none"
    """`none`, or the SHA-256 of the table of users that the dataset does not have."""
    new_items: str = "none"
    """Likewise of items."""
    exclude: str
    """`seen`, `none`, or the SHA-256 of the file that lists them."""
    users_per_shard: int


class Recommended(results.ResultManifest):
    """The manifest of a folder of recommendations."""

    file_name, what, command = MANIFEST, "recommendations", "recommend"

    format_version: Literal[1] = 1
    request: Request
    complete: bool = False
    """Whether every shard is there; before that none is listed."""
    users: int
    """Those asked for that are known, new ones included; some may have nothing left to recommend."""
    rejected: dict[str, int]
    """Records of the given files that were not used, by reason; each is kept in `rejected.csv`."""
    rows: int = 0
    shards: tuple[Shard, ...] = ()

    @property
    def num_shards(self) -> int:
        """How many there are when all are."""
        return -(-self.users // self.request.users_per_shard)
