"""Typed, frozen configuration: defaults, then a YAML file, then dotted overrides (`training.epochs=3`).

Every room owns its own `Config` classes; this module holds what they share: the strict base class, reading, overriding,
saving, and errors that name the key and the nearest right one.
"""

import types
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from sibra_dist.errors import ConfigError, nearest

RECIPES = "recipes"


class Config(BaseModel):
    """Base of every configuration class: immutable, and an unknown key is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True, use_attribute_docstrings=True
    )


ConfigType = TypeVar("ConfigType", bound=Config)


def load_config(kind: type[ConfigType], source: str | Path, overrides: Sequence[str] = ()) -> ConfigType:
    """Read `source`, apply `overrides` of the form `a.b=value`, and validate.

    `source` is a YAML file, or the name of a recipe that comes with the package (`ml-100k`). A value in an override is
    read as YAML, so `a=3` is a number and `a=[1, 2]` a list.

    Raises:
        ConfigError: the file cannot be read, or the first thing wrong in it, by key.
    """
    path = find_config(source)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    return parse_config(kind, text, str(path), overrides)


def parse_config(kind: type[ConfigType], text: str | bytes, where: str, overrides: Sequence[str] = ()) -> ConfigType:
    """What `load_config` makes of the content of a file, which an error calls `where`.

    Raises:
        ConfigError: the first thing wrong in it, by key.
    """
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist
        raise ConfigError(f"{where} is not valid YAML: {_one_line(error)}") from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must hold keys and values at its top, not a {type(values).__name__}")
    for override in overrides:
        values = with_override(values, *parse_override(override))
    return validate(kind, values, where=where)


def find_config(source: str | Path) -> Path:
    """The path of a configuration: a file, or a recipe of the package given by its bare name."""
    path = Path(source)
    if path.is_file():
        return path
    if path.suffix:
        raise ConfigError(f"there is no configuration file {path}; packaged recipes: {', '.join(recipe_names())}")
    recipe = Path(str(resources.files("sibra_dist"))) / RECIPES / f"{source}.yaml"
    if not recipe.is_file():
        raise ConfigError(f"{source} is neither a file nor a packaged recipe; {nearest(str(source), recipe_names())}")
    return recipe


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package, sorted."""
    folder = Path(str(resources.files("sibra_dist"))) / RECIPES
    return sorted(path.stem for path in folder.glob("*.yaml"))


def parse_override(text: str) -> tuple[str, Any]:
    """Split `a.b=value` into its dotted path and its value, read as YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{text!r} is not an override; write key=value, for example training.epochs=3")
    try:
        return key.strip(), yaml.safe_load(value)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"the value in {text!r} is not valid YAML: {_one_line(error)}") from error


def with_override(values: Mapping[str, Any], dotted: str, value: Any) -> dict[str, Any]:
    """A copy of nested `values` in which the entry at the `dotted` path is `value`."""
    head, _, rest = dotted.partition(".")
    inner = values.get(head)
    if rest:
        value = with_override(inner if isinstance(inner, Mapping) else {}, rest, value)
    return {**values, head: value}


def validate(kind: type[ConfigType], values: Mapping[str, Any], where: str) -> ConfigType:
    """Build a `kind` from plain values, or raise a `ConfigError` that names the first wrong key.

    Unknown keys are told first: a misspelt name often makes a required one missing too. What a configuration's own check
    says comes before a wrong type: where a value may be of several kinds, every kind it is not complains of its type.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        told_first = {"extra_forbidden": 0, "invalid_key": 0, "value_error": 1}
        detail = min(error.errors(), key=lambda detail: told_first.get(detail["type"], 2))
        raise ConfigError(f"{where}: {_explain(kind, detail)}") from error


def to_plain(config: Config) -> dict[str, Any]:
    """The configuration as plain YAML and JSON values; `validate` turns it back into an equal one."""
    return config.model_dump(mode="json")


def to_yaml(config: Config) -> str:
    """The configuration as YAML text, in the order of its fields."""
    return yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True)


def _explain(kind: type[Config], detail: Any) -> str:
    location = [str(part) for part in detail["loc"]]
    last = location[-1] if location else ""
    owner: Any = kind
    within: Any = kind
    shown: list[str] = []
    for part in location:
        owner = within
        within, is_key = _step(owner, part)
        if is_key:
            shown.append(part)
    dotted = ".".join(shown)
    if detail["type"] == "extra_forbidden":
        return f"unknown key {dotted}; {nearest(last, _fields(owner))}"
    if detail["type"] == "missing":
        return f"{dotted} is required"
    if detail["type"] in {"union_tag_invalid", "union_tag_not_found"}:
        tags = [tag for option in _options(within) for tag in get_args(option.model_fields["type"].annotation)]
        given = str(detail.get("ctx", {}).get("tag", ""))
        complaint = f"{given!r} is not known" if given else "is required"
        return f"{dotted}.type {complaint}; {nearest(given, tags)}"
    message = str(detail["msg"]).removeprefix("Value error, ")
    return f"{dotted}: {message[:1].lower()}{message[1:]}" if dotted else message


def _step(annotation: Any, part: str) -> tuple[Any, bool]:
    """The annotation one location part further in, and whether that part is a key the user wrote."""
    annotation = _bare(annotation)
    if isinstance(annotation, type) and issubclass(annotation, Config):
        field = annotation.model_fields.get(part)
        return field.annotation if field else None, True
    if _is_union(annotation):
        # pydantic names the class that the value's type chose, or else each alternative that it tried.
        for option in _options(annotation):
            tags = get_args(option.model_fields["type"].annotation) if "type" in option.model_fields else ()
            if part in (*tags, option.__name__):
                return option, False
        return None, False
    arguments = get_args(annotation)
    if get_origin(annotation) is tuple:
        return arguments[0], True
    return arguments[-1] if arguments else None, True


def _bare(annotation: Any) -> Any:
    """The annotation without its metadata, and without None where that is the only alternative."""
    if hasattr(annotation, "__metadata__"):
        return _bare(get_args(annotation)[0])
    if _is_union(annotation):
        alternatives = [argument for argument in get_args(annotation) if argument is not types.NoneType]
        return _bare(alternatives[0]) if len(alternatives) == 1 else annotation
    return annotation


def _options(annotation: Any) -> list[type[Config]]:
    """Every `Config` class that a value of this annotation may be."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    if _is_union(annotation):
        return [option for argument in get_args(annotation) for option in _options(argument)]
    if hasattr(annotation, "__metadata__"):
        return _options(get_args(annotation)[0])
    return []


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in {Union, types.UnionType}


def _fields(annotation: Any) -> list[str]:
    return [name for option in _options(annotation) for name in option.model_fields]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
