"""Arguments and options that several commands take."""

from typing import Annotated

import typer

ConfigArgument = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of a packaged recipe.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="key=value", help="Settings that replace the file's: training.epochs=3")
]
Workers = Annotated[int, typer.Option(min=0, help="Ray Train workers; 0 works in this process.")]
