"""The commands that make datasets, and show them."""

import json
from pathlib import Path
from typing import Annotated

import typer

from sibra_dist.commands.options import ConfigArgument, Overrides
from sibra_dist.config import load_config
from sibra_dist.terminal import console, stages


def fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A public dataset: ml-100k.")],
    to: Annotated[Path | None, typer.Option(help="Folder to fetch into; by default data/NAME.")] = None,
    source: Annotated[Path | None, typer.Option("--from", help="An archive or folder that you have already.")] = None,
) -> None:
    """Fetch a public dataset and verify it.

    It comes from its owner, or else from a mirror.
    """
    from sibra_dist.data.sources import SOURCES
    from sibra_dist.data.sources import fetch as fetch_source

    folder = to or Path("data") / name
    with stages("fetching") as progress:
        fetch_source(name, folder, source, progress)
    console.print(f"{name} is in {folder}\n{SOURCES[name].licence}", soft_wrap=True)


def prepare(
    config: ConfigArgument,
    overrides: Overrides = None,
    to: Annotated[str, typer.Option(help="Folder or URI of the dataset.")] = ...,  # type: ignore[assignment]
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another dataset in that place.")] = False,
    extend: Annotated[
        str | None, typer.Option(metavar="DATASET", help="Keep the indices and encodings of this dataset for what it knows.")
    ] = None,
) -> None:
    """Build a dataset from raw files or tables with Spark."""
    from sibra_dist.etl.config import PrepareConfig
    from sibra_dist.etl.pipeline import STAGES
    from sibra_dist.etl.pipeline import prepare as build
    from sibra_dist.report import dataset_table

    settings = load_config(PrepareConfig, config, overrides or ())
    with stages("preparing", STAGES) as stage:
        manifest = build(settings, to, overwrite, extend, stage)
    console.print(dataset_table(manifest, to), soft_wrap=True)


def synthesize(
    users: Annotated[int, typer.Option(help="How many.")],
    items: Annotated[int, typer.Option(help="How many.")],
    interactions: Annotated[int, typer.Option(help="In all splits together.")],
    to: Annotated[str, typer.Option(help="Folder or URI of the dataset.")],
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    held_out: Annotated[float, typer.Option(help="Share of each user's interactions for validation, and for test.")] = 0.1,
    cold_items: Annotated[
        float, typer.Option(help="Share of the items for validation, and for test, with all their interactions.")
    ] = 0.0,
    evaluated_users: Annotated[
        int | None, typer.Option(help="Users that hold something out; by default all.", show_default=False)
    ] = None,
    user_features: Annotated[str, typer.Option(help="Of category, tags, numeric, vector; or none.")] = "category,numeric",
    item_features: Annotated[str, typer.Option(help="Likewise.")] = "category,tags,numeric,vector",
    missing: Annotated[float, typer.Option(help="Share of users, or items, that lack a feature.")] = 0.2,
    vector_size: Annotated[int, typer.Option(help="Numbers in a vector.")] = 32,
    vector_type: Annotated[str, typer.Option(help="float32 or float16.")] = "float32",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another dataset in that place.")] = False,
) -> None:
    """Write a synthetic dataset of any size, with a structure that can be learned.

    It takes no raw files and no Spark, and memory for one shard.
    """
    from sibra_dist.config import validate
    from sibra_dist.data.synthetic import STAGES, SyntheticConfig
    from sibra_dist.data.synthetic import synthesize as build
    from sibra_dist.report import dataset_table

    asked = {
        "users": users,
        "items": items,
        "interactions": interactions,
        "seed": seed,
        "held_out": held_out,
        "cold_items": cold_items,
        "evaluated_users": evaluated_users,
        "user_features": _names(user_features),
        "item_features": _names(item_features),
        "missing": missing,
        "vector_size": vector_size,
        "vector_type": vector_type,
    }
    with stages("synthesizing", STAGES) as stage:
        manifest = build(validate(SyntheticConfig, asked, "synthesize"), to, overwrite, stage)
    console.print(dataset_table(manifest, to), soft_wrap=True)


def describe(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="Folder or URI of a dataset.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, for machines.")] = False,
) -> None:
    """Show a dataset at a glance: sizes, density, cold shares, history lengths, modalities, rejected records."""
    from sibra_dist.describe import describe as look_at

    description = look_at(dataset)
    if as_json:
        typer.echo(json.dumps(description.model_dump(mode="json"), indent=2))
        return
    from sibra_dist.report import description_table

    console.print(description_table(description), soft_wrap=True)


def _names(text: str) -> tuple[str, ...]:
    """Names between commas; `none` is none."""
    return () if text == "none" else tuple(name.strip() for name in text.split(","))
