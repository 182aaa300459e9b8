"""The commands that tell of models before they are trained."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from sibra_dist.commands.options import ConfigArgument, Overrides
from sibra_dist.config import load_config
from sibra_dist.errors import ConfigError
from sibra_dist.terminal import console


def models(
    name: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="The model whose options are wanted.")] = None,
) -> None:
    """List the models, or the options of one of them."""
    from sibra_dist.catalogue import models_table, options_table

    console.print(models_table() if name is None else options_table(name), soft_wrap=True)


def params(
    arguments: Annotated[
        list[str], typer.Argument(metavar="CONFIG... [key=value]...", help="Configurations to compare, and settings for all.")
    ],
) -> None:
    """Count the parameters of models, part by part and side by side: params cobrar dmf dataset=FOLDER."""
    from sibra_dist.catalogue import parameter_counts, parameters_table
    from sibra_dist.data.dataset import open_dataset
    from sibra_dist.training.config import TrainConfig

    # Not Path.is_file, which raises where a setting is longer than a file's name may be.
    configs = [argument for argument in arguments if "=" not in argument or os.path.isfile(argument)]
    overrides = [argument for argument in arguments if argument not in configs]
    if not configs:
        raise ConfigError("give at least one CONFIG: a YAML file, or the name of a packaged recipe")
    settings = [(Path(config).stem, load_config(TrainConfig, config, overrides)) for config in configs]
    counted = [(name, parameter_counts(config.model, open_dataset(config.dataset))) for name, config in settings]
    console.print(parameters_table(counted), soft_wrap=True)


def estimate(
    config: ConfigArgument,
    overrides: Overrides = None,
    workers: Annotated[int, typer.Option(min=1, help="Ranks that share each batch.")] = 1,
    gpu_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory of a rank's GPU, such as 24GiB; by default, ranks train on CPUs.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, in bytes, for machines.")] = False,
) -> None:
    """Say what memory each rank of a training will need, and on how many GPUs it fits."""
    from sibra_dist.estimate import estimate as estimated
    from sibra_dist.estimate import estimate_table, estimate_values, read_bytes
    from sibra_dist.training.config import TrainConfig

    settings = load_config(TrainConfig, config, overrides or ())
    found = estimated(settings, workers, None if gpu_memory is None else read_bytes(gpu_memory))
    if as_json:
        typer.echo(json.dumps(estimate_values(found), indent=2))
        return
    console.print(estimate_table(found), soft_wrap=True)
