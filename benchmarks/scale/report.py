"""The results as tables: bytes, memory, cost of a positive, and the large dataset that they are extrapolated to."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sibra_dist.data.manifest import TABLES, Counts, FeatureSpec, Manifest, Protocol, Records
from sibra_dist.estimate import HELD, holding, rank_memory, read_bytes
from sibra_dist.training.config import TrainConfig
from sibra_dist.training.skeleton import array_bytes

PAPER = "10_000_000x2_000_000x500_000_000"
GPU = "80GiB"
GIB = 1 << 30


def report(results: Sequence[dict[str, Any]], config: Callable[[int], TrainConfig]) -> str:
    """All tables; `config` gives what was trained with a batch of some size."""
    parts = ["## Bytes", _bytes(results), "## Memory", _memory(results), "## Cost", _cost(results), "## On paper"]
    return "\n\n".join([*parts, _paper(results, config)]) + "\n"


def _bytes(results: Sequence[dict[str, Any]]) -> str:
    rows = []
    for found in results:
        entities = found["users"] + found["items"]
        described = found["tables"]["users"] + found["tables"]["items"]
        rows.append(
            [
                *_size(found),
                f"{found['synthesize_seconds']:.1f}",
                f"{found['interactions'] / found['synthesize_seconds'] / 1e6:.2f}",
                f"{found['synthesize_mebibytes']:,.0f}",
                f"{described / entities:.1f}",
                f"{_history_bytes(found) / found['train']:.2f}",
                f"{found['cache_bytes'] / (1 << 20):,.0f}",
                f"{found['open_seconds']:.1f}",
            ]
        )
    headings = (
        *("users", "items", "interactions", "seconds to make", "million a second", "peak MiB"),
        *("bytes an entity", "bytes an interaction, both directions", "cache, MiB", "seconds to open first"),
    )
    return _table(headings, rows)


def _memory(results: Sequence[dict[str, Any]]) -> str:
    rows = [
        [
            *_size(found),
            batch,
            f"{told['estimated'] / GIB:.3f}",
            f"{(told['before'] + told['private']) / GIB:.3f}",
            f"{told['estimated'] / (told['before'] + told['private']):.2f}",
            f"{told['estimated_mapped'] / GIB:.3f}",
            f"{told['mapped'] / GIB:.3f}",
            f"{told['peak_rss'] / GIB:.3f}",
        ]
        for found in results
        for batch, told in found["training"].items()
    ]
    headings = (
        *("users", "items", "interactions", "batch", "private estimated, GiB", "private measured, GiB", "ratio"),
        *("data, GiB", "of which were read, GiB", "peak RSS of the process, GiB"),
    )
    return _table(headings, rows)


def _cost(results: Sequence[dict[str, Any]]) -> str:
    rows = [
        [*_size(found), batch, f"{told['seconds_a_step']:.3f}", f"{1e6 * told['seconds_a_step'] / int(batch):,.0f}"]
        for found in results
        for batch, told in found["training"].items()
    ]
    return _table(("users", "items", "interactions", "batch", "seconds a step", "microseconds a positive"), rows)


def _paper(results: Sequence[dict[str, Any]], config: Callable[[int], TrainConfig]) -> str:
    """What the largest measured costs say of the dataset on paper."""
    users, items, interactions = (int(number) for number in PAPER.split("x"))
    largest = results[-1]
    manifest = _manifest(users, items, interactions)
    described = (largest["tables"]["users"] + largest["tables"]["items"]) / (largest["users"] + largest["items"])
    disk = described * (users + items) + _history_bytes(largest) / largest["train"] * interactions
    arrays = sum(array_bytes(manifest).values())
    rows = [
        ["dataset on disk, GiB", f"{disk / GIB:.1f}"],
        ["arrays mapped by a node, GiB", f"{arrays / GIB:.1f}"],
        [
            "minutes to synthesize on a core",
            f"{interactions / largest['interactions'] * largest['synthesize_seconds'] / 60:.0f}",
        ],
    ]
    gpu = read_bytes(GPU)
    for batch in sorted({int(batch) for found in results for batch in found["training"]}):
        settings = config(batch)
        alone = rank_memory(settings, manifest, 1, None)
        rows.append(
            [f"private memory of one rank on CPUs, batch {batch}, GiB", f"{(alone.training + alone.checkpoint) / GIB:.1f}"]
        )
        for held in HELD:
            on_gpu = rank_memory(holding(settings, held), manifest, 8, gpu)
            assert on_gpu.gpu is not None
            rows.append([f"of each of 8 GPUs, batch {batch}, {held}, GiB", f"{on_gpu.gpu / GIB:.1f}"])
        step = _seconds_a_step(results, alone.parameters, batch)
        rows.append([f"processor hours of an epoch on one core, batch {batch}", f"{step * interactions / batch / 3600:,.0f}"])
    return _table((f"{users:,} users, {items:,} items, {interactions:,} interactions", ""), rows)


def _seconds_a_step(results: Sequence[dict[str, Any]], parameters: int, batch: int) -> float:
    """By least squares of relative errors: seconds of a step = a * batch + b * bytes of parameters."""
    told = [(int(size), step) for found in results for size, step in found["training"].items()]
    seconds = np.array([step["seconds_a_step"] for _, step in told])
    causes = np.array([[size, step["parameters"]] for size, step in told], dtype=np.float64)
    scale = causes.max(axis=0)
    fitted = np.linalg.lstsq(causes / scale / seconds[:, None], np.ones(len(told)), rcond=None)[0]
    return float(np.array([batch, parameters]) / scale @ np.maximum(fitted, 0))


def _manifest(users: int, items: int, interactions: int) -> Manifest:
    """Of a dataset with the features of the measured ones, which nobody has made."""

    def specs(count: int, *kinds: tuple[str, int]) -> tuple[FeatureSpec, ...]:
        return tuple(
            FeatureSpec(
                name=kind,
                kind=kind,
                size=size,
                vocabulary=tuple(map(str, range(size))) if kind in ("category", "tags") else None,
                missing=count // 5,
            )
            for kind, size in kinds
        )

    return Manifest(
        name="paper",
        package_version="0",
        protocol=Protocol(name="random", seed=0, validation=0.1, test=0.1),
        counts=Counts(users=users, items=items, train=interactions, validation=0, test=0),
        records=Records(read=interactions, rejected={}, filtered={}, kept=interactions),
        user_features=specs(users, ("category", 32), ("numeric", 2)),
        item_features=specs(items, ("category", 32), ("tags", 68), ("numeric", 2), ("vector", 32)),
        shards=dict.fromkeys(TABLES, ()),
        config={},
        sources=(),
    )


def _history_bytes(found: dict[str, Any]) -> int:
    tables: dict[str, int] = found["tables"]
    return tables["histories/users"] + tables["histories/items"]


def _size(found: dict[str, Any]) -> list[str]:
    return [f"{found[name]:,}" for name in ("users", "items", "interactions")]


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [" | ".join(headings), " | ".join("---:" for _ in headings), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)
