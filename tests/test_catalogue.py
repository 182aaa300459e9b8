"""`sibra-dist models` and `sibra-dist params`: what can be trained, and how large it is."""

from collections.abc import Callable
from pathlib import Path

import pytest

from sibra_dist.catalogue import model_options, packaged_recipes, parameter_counts
from sibra_dist.cli import main
from sibra_dist.config import load_config
from sibra_dist.data.dataset import Dataset, open_dataset
from sibra_dist.errors import ConfigError
from sibra_dist.models import MODELS
from sibra_dist.training.config import TrainConfig
from tests.planted import write_planted


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_planted(tmp_path_factory.mktemp("catalogue") / "dataset", protocol="random")


@pytest.fixture(scope="module")
def dataset(planted: Path) -> Dataset:
    return open_dataset(planted)


@pytest.mark.parametrize("name", MODELS)
def test_every_option_has_a_meaning(name: str) -> None:
    for option in model_options(name):
        assert option.key.startswith("model.")
        assert option.meaning.endswith("."), option
        assert option.kind


def test_options_reach_into_sections() -> None:
    options = {option.key: option for option in model_options("single_branch")}
    assert options["model.items.contrast.temperature"].default == "0.1"
    assert options["model.users.draws"].kind == "int | all"
    assert options["model.items.hidden_sizes"].default == "[256, 256]"


def test_a_misspelt_model_is_told() -> None:
    with pytest.raises(ConfigError, match="there is no model single_brunch; did you mean single_branch"):
        model_options("single_brunch")


def test_every_recipe_that_trains_is_valid_and_listed_with_its_model() -> None:
    recipes = packaged_recipes()
    assert "ml-1m" not in recipes
    for name, model in recipes.items():
        assert load_config(TrainConfig, name, ["dataset=here"]).model.type == model
    assert set(recipes.values()) == set(MODELS)


def test_cobrar_has_one_branch_where_dmf_has_two(dataset: Dataset) -> None:
    cobrar, dmf = (
        parameter_counts(load_config(TrainConfig, name, ["dataset=here"]).model, dataset) for name in ("cobrar", "dmf")
    )
    branch = 512 * 64 + 64
    towers = {"users.encoders.interactions": (80 + 1) * 512, "items.encoders.interactions": (60 + 1) * 512}
    unknown = {"users.unknown": 512, "items.unknown": 512}
    assert cobrar == towers | unknown | {"branch": branch}
    assert dmf == towers | unknown | {"user_branch": branch, "item_branch": branch}


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command in this process; gives its exit code and what it printed."""

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        shown = capsys.readouterr()
        return int(ended.value.code or 0), shown.out, shown.err

    return call


def test_commands_show_models_options_and_parameters(planted: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    code, listed, _ = run("models")
    assert code == 0
    assert all(name in listed for name in (*MODELS, "sibrar-cold-item", "cobrar"))
    assert "model.items.contrast.temperature" in run("models", "single_branch")[1]
    counted = run("params", "cobrar", "dmf", f"dataset={planted}")[1].splitlines()
    assert counted[0].split() == ["part", "cobrar", "dmf"]
    assert ["branch", "32,832"] in [line.split() for line in counted]
    total = next(line.split() for line in counted if line.startswith("total"))
    assert int(total[2].replace(",", "")) - int(total[1].replace(",", "")) == 32_832


def test_a_file_may_have_any_name(planted: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    (tmp_path / "width=4.yaml").write_text(f"model: {{type: mf, embedding_size: 4}}\ndataset: {planted}\n", encoding="utf-8")
    long = f"model.regularization={{{' ' * 300}}}"
    assert run("params", str(tmp_path / "width=4.yaml"), long)[1].splitlines()[0].split() == ["part", "width=4"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("models", "sibra"), "there is no model sibra"),
        (("params", "dataset=here"), "give at least one CONFIG"),
        (("params", "cobrar"), "dataset is required"),
        (("params", "cobrar", "dataset=nowhere"), "nowhere is not a dataset"),
    ],
)
def test_bad_calls_are_told(arguments: tuple[str, ...], told: str, run: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = run(*arguments)
    assert code == 2
    assert told in err
    assert "Traceback" not in err
