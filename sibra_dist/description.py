"""The form of what `sibra_dist.describe` finds out about a dataset: stable names, for machines too.

What each field is, `describe` says.
"""

from sibra_dist.config import Config
from sibra_dist.data.dataset import HeldOut
from sibra_dist.data.manifest import Counts, Protocol, Records


class Shares(Config):
    """Of all interactions."""

    train: float | None
    validation: float | None
    test: float | None


class Density(Config):
    """Of all pairs of a user and an item."""

    train: float | None
    all: float | None


class Weights(Config):
    """Of the training interactions."""

    min: float
    mean: float
    max: float


class Times(Config):
    """Of the training interactions, as ISO 8601 dates in UTC."""

    earliest: str
    latest: str


class Cold(Config):
    """Entities without training interactions; each of them is in one of the last three."""

    count: int
    share: float | None
    validation: int
    test: int
    others: int


class HistoryLengths(Config):
    """Training interactions of an entity that has any."""

    entities: int
    min: int
    p1: int
    p10: int
    p25: int
    p50: int
    p75: int
    p90: int
    p99: int
    max: int
    mean: float


class Modality(Config):
    """What entities may have, and how many do."""

    kind: str
    size: int
    present: int
    share: float | None
    share_of_cold: float | None
    unknown: int | None
    unknown_code: bool | None


class WithoutModality(Config):
    """Entities without any modality."""

    count: int
    share: float | None


class EntitiesDescription(Config):
    """The users, or the items."""

    cold: Cold
    history_lengths: HistoryLengths | None
    modalities: dict[str, Modality]
    without_modality: WithoutModality


class Head(Config):
    """The most popular items, and what falls to them."""

    items: int
    share: float


class Popularity(Config):
    """How unevenly the training interactions are spread over the items that have any."""

    items: int
    top_1_percent: Head
    top_20_percent: Head


class HeldOutDescription(Config):
    """What one split holds out; each interaction is in one of the last four."""

    users: int
    candidates: int
    interactions: int
    warm: int
    cold_item: int
    cold_user: int
    cold_both: int


class TableSize(Config):
    """The shards of one table."""

    rows: int
    bytes: int
    shards: int
    smallest_shard: int
    largest_shard: int


class Storage(Config):
    """The shards of all tables."""

    bytes: int
    shards: int
    tables: dict[str, TableSize]


class Description(Config):
    """A dataset at a glance."""

    name: str
    place: str
    digest: str
    format_version: int
    package_version: str
    extends: str | None
    protocol: Protocol
    counts: Counts
    shares: Shares
    density: Density
    weights: Weights | None
    times: Times | None
    users: EntitiesDescription
    items: EntitiesDescription
    held_out: dict[HeldOut, HeldOutDescription]
    popularity: Popularity | None
    records: Records
    rejected_side_information: dict[str, int]
    storage: Storage
