"""What a folder of recommendations holds, and how to tell what was asked and whether all of it is there.

    <folder>/
      recommendations.json                  written first, as a plan, and once more at the end: only then it is complete
      recommendations/part-*.parquet        user_id string, item_id string, score float32, rank int32, from 1
      rejected.csv                          file, reason, record: what of the given files was not used, if anything

A shard has the recommendations of `USERS_PER_SHARD` users, the last one of fewer, in the order in which they were asked for,
each user's best first. It is named by its number and the first 8 hexadecimal digits of its SHA-256, as a dataset's shards are.
"""

import json
from typing import Literal, Self

from pydantic import ValidationError

from sibra_dist.config import Config
from sibra_dist.data.manifest import Shard
from sibra_dist.data.storage import Place
from sibra_dist.errors import DatasetError

MANIFEST = "recommendations.json"
TABLE = "recommendations"
REJECTED = "rejected.csv"
USERS_PER_SHARD = 8192
"""Whatever the number of ranks and the size of tiles, so that shards depend on neither; k = 100 makes them some 5 MB."""


class Request(Config):
    """What recommendations were asked for: equal requests have equal shards."""

    dataset: str
    """Digest of the dataset."""
    checkpoint: str
    """Name of the model's checkpoint; its digits at the end are those of one training."""
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
    package_version: str

    def differences(self, other: "Request") -> list[str]:
        """Names of what the two do not agree on."""
        return [name for name in type(self).model_fields if getattr(self, name) != getattr(other, name)]


class Recommended(Config):
    """The manifest of a folder of recommendations."""

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
            raise DatasetError(f"{place} holds no recommendations: it has no {MANIFEST}. Make them with `sibra-dist recommend`")
        return found

    def write(self, place: Place) -> None:
        """Write it, whole or not at all; `OSError` if it cannot be written."""
        place.write(MANIFEST, json.dumps(self.model_dump(mode="json"), indent=2).encode() + b"\n")
