"""The command that writes recommendations."""

from functools import partial
from typing import Annotated, Literal

import typer

from sibra_dist.commands.options import Workers
from sibra_dist.commands.sharing import share
from sibra_dist.terminal import console

Candidates = Literal["all", "new"]


def recommend(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, a path or URI.")],
    to: Annotated[str, typer.Option(help="Folder or URI of the recommendations.")],
    k: Annotated[int, typer.Option("-k", min=1, help="Items for each user, at most.")] = 100,
    users: Annotated[
        str,
        typer.Option(metavar="all|new|FILE", help="Users: all, those of --new-users, or an id a line or a column user_id."),
    ] = "all",
    exclude: Annotated[
        str,
        typer.Option(
            metavar="seen|none|FILE",
            help="What is not recommended: what the dataset knows of the user, nothing, or a table's pairs user_id, item_id.",
        ),
    ] = "seen",
    new_users: Annotated[
        str | None, typer.Option(metavar="TABLE", help="Users that the dataset does not have, with what is known of them.")
    ] = None,
    new_items: Annotated[
        str | None, typer.Option(metavar="TABLE", help="Items that the dataset does not have, with what is known of them.")
    ] = None,
    candidates: Annotated[Candidates, typer.Option(help="All items, or those of --new-items alone.")] = "all",
    dataset: Annotated[str | None, typer.Option(help="Where the run's dataset lies now, if it has moved.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace other recommendations in that place.")] = False,
    workers: Workers = 0,
) -> None:
    """Write the best items for each user as Parquet files."""
    from sibra_dist.data.storage import Place
    from sibra_dist.recommending.manifest import REJECTED, Recommended
    from sibra_dist.recommending.recommend import Asked
    from sibra_dist.recommending.recommend import recommend as write
    from sibra_dist.training.run_folder import open_run

    place = Place.at(to)
    asked = Asked(k, users, exclude, candidates, new_users, new_items, dataset, overwrite)
    folder, settings, _ = open_run(run, dataset)
    act, away = partial(write, asked=asked, to=place), partial(write, asked=asked.anywhere(), to=place)
    if share(folder, settings, act, workers, ("recommending to", "users"), away):
        written = Recommended.of(place)
        console.print(f"{written.rows:,} recommendations to {written.users:,} users are in {place}", soft_wrap=True)
        for reason, count in written.rejected.items():
            console.print(f"not used  {count:,} {reason}: see {place / REJECTED}", soft_wrap=True)
