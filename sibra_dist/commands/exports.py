"""The command that writes a model's embeddings, index and towers."""

from functools import partial
from typing import Annotated

import typer

from sibra_dist.commands.options import Workers
from sibra_dist.commands.sharing import share
from sibra_dist.terminal import console


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, a path or URI.")],
    to: Annotated[str, typer.Option(help="Folder or URI of the exported model.")],
    index: Annotated[bool, typer.Option("--index", help="Also an index that finds a user's best items; needs FAISS.")] = False,
    towers: Annotated[
        bool, typer.Option("--towers", help="Also programs that embed users and items with torch alone.")
    ] = False,
    dataset: Annotated[str | None, typer.Option(help="Where the run's dataset lies now, if it has moved.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another export in that place.")] = False,
    workers: Workers = 0,
) -> None:
    """Write the embeddings of users and items, for other programs to read."""
    from sibra_dist.data.storage import Place
    from sibra_dist.exporting.export import Asked
    from sibra_dist.exporting.export import export as write
    from sibra_dist.exporting.manifest import Exported
    from sibra_dist.training.run_folder import open_run

    place = Place.at(to)
    asked = Asked(index, towers, dataset, overwrite)
    folder, settings, _ = open_run(run, dataset)
    act, away = partial(write, asked=asked, to=place), partial(write, asked=asked.anywhere(), to=place)
    if share(folder, settings, act, workers, ("exporting to", "embeddings"), away):
        written = Exported.of(place)
        sizes = " and ".join(f"{about.count:,} {side}" for side, about in written.sides.items())
        console.print(f"embeddings of {sizes}, {written.embedding_size} numbers each, are in {place}", soft_wrap=True)
        for side, tower in written.towers.items():
            console.print(f"tower  {tower.file.path}: {side} from {', '.join(tower.modalities)}", soft_wrap=True)
        if (found := written.index) is not None:
            how_well = f"finds {found.recall:.2%} of the {found.k} best items of {found.sampled_users:,} users"
            console.print(f"index  {found.file.path}: {how_well}", soft_wrap=True)
