"""What can be trained: the models with their options, the recipes, and where a model's parameters are."""

import inspect
import types
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

import torch
import yaml
from pydantic.fields import FieldInfo
from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

from sibra_dist.config import RECIPES, Config
from sibra_dist.data.dataset import Dataset
from sibra_dist.errors import ConfigError, nearest
from sibra_dist.models import MODELS, build_model
from sibra_dist.models.base import ModelConfig, parameter_count
from sibra_dist.models.side import PREFIX


class Option(NamedTuple):
    """One key of a configuration."""

    key: str
    """Its dotted path."""
    kind: str
    """The values it takes."""
    default: str
    meaning: str


def model_options(name: str) -> list[Option]:
    """The keys under `model` of a model, in the order of its configuration.

    Raises:
        ConfigError: there is no such model.
    """
    if name not in MODELS:
        raise ConfigError(f"there is no model {name}; {nearest(name, MODELS)}")
    _, config = MODELS[name]
    return [option for option in _options(config, "model.") if option.key != "model.type"]


def packaged_recipes() -> dict[str, str]:
    """Recipes that train a model, and the model of each: `{"cobrar": "single_branch"}`."""
    found = {}
    for file in sorted((resources.files("sibra_dist") / RECIPES).iterdir(), key=lambda file: file.name):
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        if "model" in values:
            found[file.name.removesuffix(".yaml")] = values["model"]["type"]
    return found


def models_table() -> Group:
    """Every model, what it is, and the recipes that use it."""
    table = _table("model", "recipes", "what it is")
    recipes = packaged_recipes()
    for name, (kind, _) in MODELS.items():
        mine = [recipe for recipe, model in recipes.items() if model == name]
        table.add_row(name, "\n".join(mine), _first_sentence(inspect.getmodule(kind)))
    return Group(table, Text("\nThe options of a model: sibra-dist models MODEL"))


def options_table(name: str) -> Table:
    """The options of one model, as `model_options` gives them."""
    table = _table("key", "values", "default", "meaning")
    for option in model_options(name):
        table.add_row(option.key, option.kind, option.default, option.meaning)
    return table


def parameter_counts(config: ModelConfig, dataset: Dataset) -> dict[str, int]:
    """Trained scalars of a model for a dataset, by part; what is shared is counted once.

    A part is an encoder (`users.encoders.interactions`) or else a direct child of the model (`branch`). No memory is taken.
    """
    with torch.device("meta"):
        model = build_model(config, dataset, seed=0)
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        path = [step.removeprefix(PREFIX) for step in name.split(".")]
        part = ".".join(path[:3] if path[1:2] == ["encoders"] else path[:2] if path[0] in ("users", "items") else path[:1])
        counts[part] = counts.get(part, 0) + parameter.numel()
    assert sum(counts.values()) == parameter_count(model)
    return counts


def parameters_table(counted: Sequence[tuple[str, Mapping[str, int]]]) -> Table:
    """The parameters of several models side by side, part by part, with each total as a share of the first one's.

    counted: the models' names, and what `parameter_counts` gives.
    """
    parts = list(dict.fromkeys(part for _, counts in counted for part in counts))
    table = Table(Column("part"), *(Column(name, justify="right") for name, _ in counted), box=None, pad_edge=False)
    for part in parts:
        table.add_row(
            part, *(f"{counts[part]:,}" if part in counts else "" for _, counts in counted), end_section=part == parts[-1]
        )
    totals = [sum(counts.values()) for _, counts in counted]
    table.add_row("total", *(f"{total:,}" for total in totals))
    if len(totals) > 1 and totals[0]:
        table.add_row(f"of {counted[0][0]}", *(f"{total / totals[0]:.1%}" for total in totals))
    return table


def _options(config: type[Config], prefix: str) -> Iterator[Option]:
    for name, field in config.model_fields.items():
        inner, within = _config_within(field.annotation), ""
        if inner is None and get_origin(field.annotation) is dict:
            inner, within = _config_within(get_args(field.annotation)[1]), "NAME."
        meaning = " ".join((field.description or "").split())
        yield Option(prefix + name, _kind(field.annotation), "" if inner else _default(field), meaning)
        if inner is not None:
            yield from _options(inner, f"{prefix}{name}.{within}")


def _config_within(annotation: Any) -> type[Config] | None:
    """The configuration class that a key holds, if it holds one."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType):
        return next(filter(None, map(_config_within, get_args(annotation))), None)
    return None


def _kind(annotation: Any) -> str:
    """An annotation in a user's words."""
    if hasattr(annotation, "__metadata__"):
        return _kind(get_args(annotation)[0])
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " | ".join(map(_kind, arguments))
    if origin is tuple:
        return f"[{_kind(arguments[0])}, ...]"
    if origin is dict:
        return f"{{{_kind(arguments[0])}: {_kind(arguments[1])}}}"
    if annotation is types.NoneType:
        return "null"
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return "section"
    return str(getattr(annotation, "__name__", annotation))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    text = yaml.safe_dump(_plain(field.default), default_flow_style=True).strip()
    return text.removesuffix("...").strip()


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _first_sentence(documented: object) -> str:
    text = " ".join((inspect.getdoc(documented) or "").split())
    return text.split(". ", 1)[0].rstrip(".")


def _table(*headings: str) -> Table:
    return Table(*(Column(heading, overflow="fold") for heading in headings), box=None, pad_edge=False)
