from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError, model_validator

from sibra_dist import config as config_module
from sibra_dist import errors
from sibra_dist.config import (
    Config,
    find_config,
    load_config,
    parse_override,
    recipe_names,
    to_plain,
    to_yaml,
    validate,
    with_override,
)
from sibra_dist.errors import ConfigError, SibraError, nearest


class Identity(Config):
    type: Literal["id"] = "id"
    size: int = 8


class Words(Config):
    type: Literal["words"] = "words"
    id: str = "words may have a field that is another type's name"
    vocabulary: int


Encoder = Annotated[Identity | Words, Field(discriminator="type")]


class Optimizer(Config):
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: float = 0.0


class Training(Config):
    epochs: int = 3
    optimizer: Optimizer = Optimizer()
    header: bool | tuple[str, ...] = True
    schedule: list[Optimizer] | None = None

    @model_validator(mode="after")
    def _not_thirteen(self) -> Self:
        if self.epochs == 13:
            raise ValueError("Thirteen epochs bring bad luck")
        return self


class Everything(Config):
    name: str
    training: Training = Training()
    encoder: Encoder = Identity()
    encoders: dict[str, Encoder] = {}
    steps: tuple[Optimizer, ...] = ()
    cutoff: tuple[int, ...] = (10,)


def written(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def complaint(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(Everything, values, where="here")
    return str(caught.value)


def test_defaults_then_file_then_overrides(tmp_path: Path) -> None:
    path = written(tmp_path, "name: first\ntraining: {epochs: 5, optimizer: {learning_rate: 0.5}}\n")
    loaded = load_config(Everything, path, ["training.epochs=7", "cutoff=[1, 5]", "encoder.type=words", "encoder.vocabulary=9"])
    assert loaded == Everything(
        name="first",
        training=Training(epochs=7, optimizer=Optimizer(learning_rate=0.5, weight_decay=0.0)),
        encoder=Words(vocabulary=9),
        cutoff=(1, 5),
    )


def test_later_overrides_win_and_empty_sections_may_be_filled(tmp_path: Path) -> None:
    path = written(tmp_path, "name: first\ntraining:\n")
    loaded = load_config(Everything, path, ["training.epochs=1", "training.epochs=2", "name=second"])
    assert (loaded.training.epochs, loaded.name) == (2, "second")


def test_scientific_notation_is_a_number_though_yaml_reads_text(tmp_path: Path) -> None:
    loaded = load_config(Everything, written(tmp_path, "name: a\ntraining: {optimizer: {learning_rate: 1e-4}}\n"))
    assert loaded.training.optimizer.learning_rate == 1e-4


def test_a_config_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Optimizer().learning_rate = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, "here: name is required"),
        ({"nam": "a"}, "here: unknown key nam; did you mean name?"),
        ({"name": "a", "training": {"epoch": 1}}, "here: unknown key training.epoch; did you mean epochs?"),
        (
            {"name": "a", "training": {"optimizer": {"lr": 1}}},
            "here: unknown key training.optimizer.lr; known here: learning_rate, weight_decay",
        ),
        (
            {"name": "a", "training": {"epochs": "many"}},
            "here: training.epochs: input should be a valid integer, unable to parse string as an integer",
        ),
        (
            {"name": "a", "training": {"optimizer": {"learning_rate": 0}}},
            "here: training.optimizer.learning_rate: input should be greater than 0",
        ),
        (
            {"name": "a", "training": {"optimizer": {"learning_rate": float("nan")}}},
            "here: training.optimizer.learning_rate: input should be a finite number",
        ),
        ({"name": "a", "training": {"epochs": 13}}, "here: training: thirteen epochs bring bad luck"),
        (
            {"name": "a", "steps": [{}, {"weight_decai": 1}]},
            "here: unknown key steps.1.weight_decai; did you mean weight_decay?",
        ),
        (
            {"name": "a", "training": {"schedule": [{"weight_decai": 1}]}},
            "here: unknown key training.schedule.0.weight_decai; did you mean weight_decay?",
        ),
        ({"name": "a", "encoder": {"size": 3}}, "here: encoder.type is required; known here: id, words"),
        ({"name": "a", "encoder": {"type": "word"}}, "here: encoder.type 'word' is not known; did you mean words?"),
        ({"name": "a", "encoder": {"type": "id", "sise": 3}}, "here: unknown key encoder.sise; did you mean size?"),
        ({"name": "a", "encoder": {"type": "words"}}, "here: encoder.vocabulary is required"),
        (
            {"name": "a", "encoders": {"plot": {"type": "id", "sise": 3}}},
            "here: unknown key encoders.plot.sise; did you mean size?",
        ),
        ({"name": "a", "encoders": {"plot": {"type": "ids"}}}, "here: encoders.plot.type 'ids' is not known; did you mean id?"),
    ],
)
def test_the_first_wrong_key_is_named(values: dict[str, Any], expected: str) -> None:
    assert complaint(values) == expected


def test_an_alternative_of_plain_types_is_no_key() -> None:
    assert complaint({"name": "a", "training": {"header": 3.5}}).startswith("here: training.header: ")


def test_unknown_keys_are_told_before_missing_ones() -> None:
    assert complaint({"nome": "a", "encoder": {"type": "words"}}) == "here: unknown key nome; did you mean name?"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: [", "is not valid YAML: "),
        ("name: 2024-13-45", "is not valid YAML: month must be in 1..12"),
        ("name: a\x00", "is not valid YAML: "),
        ("- a\n- b\n", "must hold keys and values at its top, not a list"),
        ("name", "must hold keys and values at its top, not a str"),
        ("", "name is required"),
        ("1: a", "keys should be strings"),
    ],
)
def test_a_file_that_is_no_config(text: str, expected: str, tmp_path: Path) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(Everything, path)
    assert str(caught.value).startswith(str(path))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(b"name: \xff")
    with pytest.raises(ConfigError, match=r"config\.yaml cannot be read"):
        load_config(Everything, path)
    with pytest.raises(ConfigError, match=r"there is no configuration file .*absent\.yaml; packaged recipes: "):
        load_config(Everything, tmp_path / "absent.yaml")


def test_recipes_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package"
    (package / "recipes").mkdir(parents=True)
    for name in ("pop", "sibrar"):
        (package / "recipes" / f"{name}.yaml").write_text("name: packaged\n")
    monkeypatch.setattr(config_module.resources, "files", lambda _: package)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert recipe_names() == ["pop", "sibrar"]
    assert load_config(Everything, "pop").name == "packaged"
    with pytest.raises(ConfigError, match=r"sibra is neither a file nor a packaged recipe; did you mean sibrar\?"):
        find_config("sibra")
    # A file goes before a recipe; a folder of that name, such as a dataset, does not hide it.
    (here / "pop").mkdir()
    assert find_config("pop") == package / "recipes" / "pop.yaml"
    (here / "sibrar").write_text("name: mine\n")
    assert load_config(Everything, "sibrar").name == "mine"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.b=3", ("a.b", 3)),
        (" a = 0.5", ("a", 0.5)),
        ("a=[1, x]", ("a", [1, "x"])),
        ("a=b=c", ("a", "b=c")),
        ("a=", ("a", None)),
        ("a=null", ("a", None)),
        ("a={b: true}", ("a", {"b": True})),
    ],
)
def test_overrides_are_read_as_yaml(text: str, expected: tuple[str, object]) -> None:
    assert parse_override(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("epochs", "'epochs' is not an override; write key=value"),
        ("=3", "'=3' is not an override"),
        ("a=[1", "the value in 'a=[1' is not valid YAML"),
        ("a=2024-02-31", "the value in 'a=2024-02-31' is not valid YAML"),
    ],
)
def test_what_is_no_override(text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_override(text)
    assert expected in str(caught.value)


def test_an_override_leaves_the_original_alone() -> None:
    values = {"a": {"b": 1, "c": 2}, "d": 3}
    assert with_override(values, "a.b", 9) == {"a": {"b": 9, "c": 2}, "d": 3}
    assert with_override(values, "e.f.g", 9) == {"a": {"b": 1, "c": 2}, "d": 3, "e": {"f": {"g": 9}}}
    assert with_override(values, "d.x", 9) == {"a": {"b": 1, "c": 2}, "d": {"x": 9}}
    assert values == {"a": {"b": 1, "c": 2}, "d": 3}


@given(
    name=st.text(),
    epochs=st.integers(14),
    learning_rate=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    cutoff=st.lists(st.integers()),
    encoders=st.dictionaries(st.text(), st.one_of(st.builds(Identity), st.builds(Words))),
)
def test_what_is_saved_is_read_back(
    name: str,
    epochs: int,
    learning_rate: float,
    cutoff: list[int],
    encoders: dict[str, Encoder],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    made = Everything(
        name=name,
        training=Training(epochs=epochs, optimizer=Optimizer(learning_rate=learning_rate)),
        encoders=encoders,
        cutoff=tuple(cutoff),
    )
    assert validate(Everything, to_plain(made), where="here") == made
    path = tmp_path_factory.mktemp("saved") / "config.yaml"
    path.write_bytes(to_yaml(made).encode())
    assert load_config(Everything, path) == made


def test_saved_keys_stand_in_the_order_of_the_fields() -> None:
    keys = [line.split(":")[0] for line in to_yaml(Everything(name="ä")).splitlines() if not line.startswith((" ", "-"))]
    assert keys == list(Everything.model_fields)
    assert "ä" in to_yaml(Everything(name="ä"))


def test_the_nearest_word() -> None:
    assert nearest("batch_sise", ["epochs", "batch_size"]) == "did you mean batch_size?"
    assert nearest("qqq", ["epochs", "batch_size"]) == "known here: batch_size, epochs"
    assert nearest("qqq", []) == "nothing is known here"


def test_every_error_is_one_that_the_command_line_prints() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert len(kinds) > 5
    assert all(issubclass(kind, SibraError) and kind.__doc__ for kind in kinds)
