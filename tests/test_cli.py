"""The command line as its users call it: a whole journey, and every kind of bad input in one line with exit code 2."""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from sibra_dist import __version__
from sibra_dist.cli import main
from sibra_dist.data.manifest import MANIFEST
from tests.planted import write_planted

SPARK = {"master": "local[1]", "driver_memory": "1g", "settings": {"spark.sql.shuffle.partitions": "1"}}
INTERACTIONS = {"path": "interactions.tsv", "rating": "rating"}
PREPARE = {
    "name": "tiny",
    "source": "source",
    "interactions": INTERACTIONS,
    "users": [{"path": "users.tsv", "id": "user_id", "features": {"city": {"kind": "category"}}}],
    "items": [
        {"path": "items.tsv", "id": "item_id", "features": {"genres": {"kind": "tags"}}},
        {"path": "covers.npz", "format": "npz", "id": "ids", "features": {"cover": {"kind": "vector"}}},
    ],
    "filters": {"min_rating": 3},
    "split": {"protocol": "cold_item"},
    "spark": SPARK,
}
SIDE = {"input_size": 8, "hidden_sizes": [8]}
TRAIN = {
    "dataset": "dataset",
    "model": {"type": "single_branch", "embedding_size": 4, "users": SIDE, "items": {**SIDE, "draws": 2, "contrast": {}}},
    "training": {"batch_size": 32, "negatives": 2, "epochs": 2, "device": "cpu"},
}


def write_raw(source: Path) -> None:
    """16 users and 20 items, two lists of side information of the items, and ratings, of which 16 are below 3."""
    source.mkdir()
    pairs = [(user, (user + step) % 20, 3 + step % 3 if step else 1) for user in range(16) for step in range(10)]
    lines = ["user_id\titem_id\trating", *(f"u{user}\ti{item}\t{rating}" for user, item, rating in pairs)]
    (source / "interactions.tsv").write_text("\n".join(lines) + "\n")
    users = ["user_id\tcity", *(f"u{user}\t{('Linz', 'Graz', '')[user % 3]}" for user in range(16))]
    (source / "users.tsv").write_text("\n".join(users) + "\n")
    items = ["item_id\tgenres", *(f"i{item}\t{('drama|comedy', 'comedy', 'war')[item % 3]}" for item in range(20))]
    (source / "items.tsv").write_text("\n".join(items) + "\n")
    vectors = np.random.default_rng(0).normal(size=(19, 3)).astype(np.float32)
    np.savez(source / "covers.npz", ids=np.array([f"i{item}" for item in range(19)]), vectors=vectors)


def write_yaml(path: Path, values: dict[str, object]) -> None:
    path.write_text(yaml.safe_dump(values))


def content(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder under `folder`, with what is in it."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def run_command(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """`sibra-dist COMMAND` in a process of its own, in `folder`, with the cache beside it."""
    environment = {name: value for name, value in os.environ.items() if name != "FORCE_COLOR"}
    environment |= {"SIBRA_CACHE": str(folder.parent / "cache"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "sibra_dist.cli", *command.split()], cwd=folder, env=environment, capture_output=True, text=True
    )


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator["Call"]:
    """Runs a command in this process, in a folder."""
    level = logging.getLogger("sibra_dist").level
    yield Call(capsys, monkeypatch)
    logging.getLogger("sibra_dist").setLevel(level)


class Call:
    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.capsys = capsys
        self.monkeypatch = monkeypatch

    def __call__(self, command: str, folder: Path) -> tuple[int, str, str]:
        """The exit code, and what went to standard output and to standard error."""
        self.monkeypatch.chdir(folder)
        self.monkeypatch.setenv("SIBRA_CACHE", str(folder.parent / "cache"))
        self.monkeypatch.delenv("FORCE_COLOR", raising=False)
        with pytest.raises(SystemExit) as ended:
            main(command.split())
        out, err = self.capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, err


@pytest.mark.spark
@pytest.mark.slow
def test_from_raw_files_to_a_report(tmp_path: Path, call: "Call") -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    write_raw(folder / "source")
    write_yaml(folder / "prepare.yaml", PREPARE)
    write_yaml(folder / "train.yaml", TRAIN)
    raw = content(folder)

    def succeed(command: str, *, here: bool = False) -> tuple[str, str]:
        """What a command prints: in a process of its own, or, once it has run so, in this one."""
        if here:
            code, out, err = call(command, folder)
        else:
            finished = run_command(command, folder)
            code, out, err = finished.returncode, finished.stdout, finished.stderr
        assert code == 0, err
        assert "Traceback" not in err
        assert "arning" not in err
        return out, err

    out, err = succeed("prepare prepare.yaml --to dataset")
    assert "dataset tiny in dataset: 16 users, 20 items, split cold_item (seed 0)" in out
    assert "records: 160 read, 0 rejected, 16 left out (16 min_rating), 144 kept" in out
    assert [line.split()[:4] for line in out.splitlines() if line.startswith("items")] == [
        ["items", "genres", "tags", "3"],
        ["items", "cover", "vector", "3"],
    ]
    stages = [line for line in err.splitlines() if line.startswith("preparing: ")]
    assert stages == [f"preparing: {stage}" for stage in "read validate filter index split features write verify".split()]
    dataset = content(folder / "dataset")

    out_again, err = succeed("prepare prepare.yaml --to dataset")
    assert out_again == out
    assert "nothing to do" in err

    out, err = succeed("train train.yaml --to runs/sibrar")
    assert "trained 2 epochs; best val/ndcg@10" in out
    assert "sibra-dist evaluate runs/sibrar" in out
    assert [line.split()[1] for line in err.splitlines() if line.startswith("epoch ")] == ["1/2", "2/2"]
    run = folder / "runs" / "sibrar"
    assert {path.name for path in run.iterdir()} == {"config.yaml", "environment.json", "metrics.jsonl", "checkpoints", "best"}
    assert yaml.safe_load((run / "config.yaml").read_text())["dataset"] == str((folder / "dataset").resolve())
    assert json.loads((run / "environment.json").read_text())["sibra-dist"] == __version__
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in metrics] == [1, 2]
    trained = content(run)

    out_again, err = succeed("train --resume runs/sibrar", here=True)
    assert out_again == out
    assert content(run) == trained

    out, _ = succeed("evaluate runs/sibrar")
    evaluation = run / "evaluation" / "test"
    found = json.loads((evaluation / "metrics.json").read_text())
    assert f"test split: {found['counts']['users']} users, 2 candidates each" in out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()[1:] if line}
    assert rows["metric"] == ["@1", "@5", "@10", "@20"]
    assert rows["test/ndcg"] == [f"{found['metrics'][f'test/ndcg@{cutoff}']:.4f}" for cutoff in (1, 5, 10, 20)]

    out, _ = succeed("evaluate runs/sibrar --hide items.interactions", here=True)
    assert "test split, without items.interactions: " in out
    hidden = json.loads((evaluation / "metrics-without-items.interactions.json").read_text())
    assert hidden["metrics"] == found["metrics"]  # the test items are cold: they have none
    assert json.loads((evaluation / "metrics.json").read_text()) == found

    succeed("train pop dataset=dataset --to runs/pop", here=True)
    succeed("evaluate runs/pop", here=True)
    out, err = succeed("report runs/sibrar runs/pop")
    popular = json.loads((folder / "runs" / "pop" / "evaluation" / "test" / "metrics.json").read_text())
    table = [line.split() for line in out.splitlines()]
    assert table[0] == ["test", "split", "sibrar", "pop"]
    assert table[1] == ["ndcg@10", *(f"{result['metrics']['test/ndcg@10']:.4f}" for result in (found, popular))]
    assert err == ""

    # Nothing that was given is changed, and nothing stands about that was not asked for.
    assert content(folder / "dataset") == dataset
    assert {path: value for path, value in content(folder).items() if not path.startswith(("dataset", "runs"))} == raw


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of datasets and runs, good and bad, that the commands below start in."""
    folder = tmp_path_factory.mktemp("cli") / "work"
    folder.mkdir()
    dataset = write_planted(folder / "dataset")
    write_planted(folder / "other", seed=1)
    for name in ("cut", "altered", "newer", "replaced"):
        shutil.copytree(dataset, folder / name)
    shard = next(dataset.glob("histories/users/part-00001-*.parquet")).relative_to(dataset)
    whole = (dataset / shard).read_bytes()
    (folder / "cut" / shard).write_bytes(whole[:-1])
    (folder / "altered" / shard).write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    manifest = json.loads((dataset / MANIFEST).read_text())
    (folder / "newer" / MANIFEST).write_text(json.dumps({**manifest, "format_version": 2, "unheard_of": 1}))
    shutil.copytree(dataset, folder / "bare")
    (folder / "bare" / MANIFEST).unlink()

    write_raw(folder / "source")
    write_yaml(folder / "prepare.yaml", PREPARE)
    write_yaml(folder / "column.yaml", {**PREPARE, "interactions": {**INTERACTIONS, "user": "user"}})
    write_yaml(folder / "file.yaml", {**PREPARE, "interactions": {**INTERACTIONS, "path": "interaction.tsv"}})
    (folder / "source" / "lonely.tsv").write_text("user_id\titem_id\trating\nu1\ti1\t5\nu2\ti1\t4\n")
    write_yaml(folder / "lonely.yaml", {**PREPARE, "interactions": {**INTERACTIONS, "path": "lonely.tsv"}})
    write_yaml(folder / "train.yaml", TRAIN)
    write_yaml(folder / "typo.yaml", {**TRAIN, "training": {"batch_sise": 32}})
    (folder / "broken.yaml").write_text("model: {type: pop\n")

    for command in (
        "train train.yaml --to runs/sibrar training.epochs=1",
        "train train.yaml --to runs/replaced training.epochs=1 dataset=replaced",
        "train pop --to runs/pop dataset=dataset",
        "train pop --to runs/other dataset=other",
        "train pop --to runs/new dataset=dataset",
        "evaluate runs/pop",
        "evaluate runs/other",
        "recommend runs/pop --to recommended -k 3",
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setenv("SIBRA_CACHE", str(folder.parent / "cache"))
            with pytest.raises(SystemExit, match=r"^0$"):
                main(command.split())
    shutil.rmtree(folder / "replaced")
    shutil.copytree(folder / "other", folder / "replaced")
    return folder


BAD_INPUT = {
    "no dataset": ("train pop", "pop.yaml: dataset is required"),
    "no configuration": ("train", "give a CONFIG, or --resume RUN"),
    "unknown recipe": ("train popp dataset=dataset", "popp is neither a file nor a packaged recipe; did you mean pop?"),
    "missing file": ("train mine.yaml", "there is no configuration file mine.yaml; packaged recipes: "),
    "not YAML": ("train broken.yaml", "broken.yaml is not valid YAML: "),
    "unknown key in the file": ("train typo.yaml", "unknown key training.batch_sise; did you mean batch_size?"),
    "unknown key in an override": ("train pop dataset=dataset training.epoch=3", "training.epoch; did you mean epochs?"),
    "override without a value": ("train pop dataset", "'dataset' is not an override; write key=value"),
    "key of another command": ("prepare train.yaml --to new", "unknown key dataset; "),
    "value of the wrong kind": ("train pop dataset=dataset training.epochs=many", "training.epochs: "),
    "unknown modality": ("train train.yaml model.items.modalities=[coverr] --to runs/pop", "runs/pop holds a run already"),
    "hide in training what is not read": (
        'train train.yaml training.hide={"items.coverr":0.5} --to runs/never',
        "training.hide items.coverr: the model reads no such modality; did you mean items.cover?",
    ),
    "hide in evaluation what is not read": (
        'train train.yaml evaluation.hide={"users.cover":0.5} --to runs/never',
        "evaluation.hide users.cover: the model reads no such modality; did you mean ",
    ),
    "labels that are not there": (
        "train train.yaml training.labels=weights training.loss=bce --to runs/never",
        "training.labels is weights, but the interactions of ",
        " have none. Set training.labels to binary, or prepare the dataset with weights",
    ),
    "labels for another loss": (
        "train train.yaml training.labels=weights",
        "labels weights are read by the loss bce, not by bpr",
    ),
    "no such folder": ("train pop dataset=nowhere", "nowhere is not a dataset: it has no manifest.json"),
    "folder without manifest": ("train pop dataset=bare", "bare is not a dataset: it has no manifest.json. Make one: "),
    "shard cut short": ("train pop dataset=cut", "part-00001-", ".parquet is damaged: ", "bytes where the manifest says"),
    "shard altered": (
        "train pop dataset=altered",
        "part-00001-",
        ".parquet is damaged: ",
        "checksum",
        "Copy the dataset again",
    ),
    "newer format": ("train pop dataset=newer", "has format version 2, but this sibra-dist reads up to 1. Install a newer one"),
    "run exists": (
        "train pop dataset=dataset --to runs/pop",
        "runs/pop holds a run already. Continue it with --resume runs/pop",
    ),
    "resume with CONFIG": ("train pop --resume runs/pop", "--resume continues a run with its own configuration"),
    "resume with a setting": ("train training.epochs=9 --resume runs/pop", "give no CONFIG, settings or --to beside it"),
    "resume to another folder": ("train --resume runs/pop --to runs/new", "give no CONFIG, settings or --to beside it"),
    "resume of no run": ("train --resume dataset", "dataset is not a run folder: it has no config.yaml"),
    "resume on a replaced dataset": ("train --resume runs/replaced", "was made from another dataset", "start a new run"),
    "evaluate no run": ("evaluate dataset", "dataset is not a run folder: it has no config.yaml"),
    "evaluate on another dataset": ("evaluate runs/sibrar --dataset other", "was made from another dataset"),
    "evaluate on no dataset": ("evaluate runs/sibrar --dataset bare", "bare is not a dataset"),
    "hide what is not read": ("evaluate runs/sibrar --hide items.coverr", "--hide items.coverr: ", "mean items.cover?"),
    "hide of no share": ("evaluate runs/sibrar --hide items.cover=2", "--hide items.cover=2: '2' is not a share from 0 to 1"),
    "hide of a baseline": ("evaluate runs/pop --hide items.cover", "the model reads no such modality"),
    "hide each of a baseline": ("evaluate runs/pop --hide each", "the model reads no modality that could be hidden"),
    "hide each with what is not read": ("evaluate runs/sibrar --hide each --hide items.coverr", "--hide items.coverr: "),
    "hide each of a share": ("evaluate runs/sibrar --hide each=0.5", "--hide each: the model reads no such modality"),
    "gap of a baseline": ("gap runs/pop", "the model reads fewer than two modalities of users, and of items: there is no gap"),
    "gap of no run": ("gap dataset", "dataset is not a run folder: it has no config.yaml"),
    "search in an object store": ("tune train.yaml --to s3://bucket/search", "a search is kept in a folder of this machine"),
    "run on an unknown file system": ("train train.yaml --to ftp://host/run", "ftp://host/run names a file system that is not"),
    "recommend of no run": ("recommend dataset --to new", "dataset is not a run folder: it has no config.yaml"),
    "recommend on another dataset": ("recommend runs/sibrar --dataset other --to new", "was made from another dataset"),
    "recommend to other files": ("recommend runs/pop --to source", "source holds something that is not recommendations"),
    "recommend on an unknown file system": ("recommend runs/pop --to ftp://host/new", "names a file system that is not"),
    "recommend to users of no file": (
        "recommend runs/pop --to new --users nobody.csv",
        "nobody.csv cannot be read: No such file",
    ),
    "recommend without a column": (
        "recommend runs/pop --to new --exclude source/users.tsv",
        "source/users.tsv has no column item_id; known here: city, user_id",
    ),
    "recommend to strangers": (
        "recommend runs/pop --to new --users source/users.tsv",
        "none of the 16 ids of source/users.tsv",
    ),
    "recommend another number": (
        "recommend runs/pop --to recommended -k 4",
        "recommended holds recommendations of another request (not the same k); add --overwrite",
    ),
    "report without evaluation": (
        "report runs/pop runs/new",
        "runs/new has no evaluation of the test split: run `sibra-dist evaluate runs/new`",
    ),
    "report of two datasets": ("report runs/pop runs/other", "evaluated on different datasets"),
    "report of no run": ("report runs/pop source", "source is not a run folder"),
    "compare of one run": ("compare runs/pop", "give two runs or more: the first is what the others are compared with"),
    "compare of no run": ("compare runs/pop source", "source is not a run folder"),
    "compare without evaluation": (
        "compare runs/pop runs/new --split validation",
        "runs/pop has no evaluation of the validation split: run `sibra-dist evaluate runs/pop --split validation`",
    ),
    "compare of two datasets": (
        "compare runs/pop runs/other",
        "runs/other and runs/pop were evaluated on what is not",
    ),
    "compare by what is no metric": ("compare runs/pop runs/pop --metric ndgc@10", "--metric ndgc@10: ", "mean ndcg@10?"),
    "compare by a metric of the catalogue": ("compare runs/pop runs/pop --metric coverage@10", "--metric coverage@10: "),
    "fetch of what is not known": ("fetch ml-100 --to new", "there is no public dataset ml-100; did you mean ml-100k?"),
    "fetch from nowhere": ("fetch ml-100k --to ../new --from nowhere.zip", "nowhere.zip"),
    "interactions that are not there": ("prepare file.yaml --to new", "interaction.tsv; did you mean interactions.tsv?"),
    "prepare over other files": ("prepare prepare.yaml --to source", "source holds something that is not a dataset"),
    "synthesize of a missing feature": (
        "synthesize --users 100 --items 100 --interactions 500 --item-features colour --to new",
        "synthesize: item_features",
    ),
    "synthesize of too many": (
        "synthesize --users 100 --items 100 --interactions 90000 --to new",
        "interactions: 100 users and 100 items can have from 300 to",
    ),
    "synthesize over other files": (
        "synthesize --users 100 --items 100 --interactions 500 --to source",
        "source holds something that is not a dataset",
    ),
    "estimate on no dataset": ("estimate pop dataset=bare", "bare is not a dataset"),
    "estimate of no size": ("estimate pop dataset=dataset --gpu-memory huge", "--gpu-memory huge: write a size such as 24GiB"),
}
BAD_FOR_SPARK = {
    "prepare over another dataset": ("prepare prepare.yaml --to dataset", "add --overwrite to replace it"),
    "missing column": ("prepare column.yaml --to new", "interactions.tsv has no column user, only user_id, ", "mean user_id?"),
    "one item left": ("prepare lonely.yaml --to dataset --overwrite", "split.protocol cold_item leaves no train interactions"),
}


def assert_one_line(code: int, out: str, err: str, told: tuple[str, ...]) -> None:
    assert code == 2
    assert out == ""
    lines = [line for line in err.splitlines() if not line.startswith(("preparing: ", "fetching: "))]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    for words in told:
        assert words in lines[0]


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_line_and_changes_nothing(world: Path, call: Call, name: str) -> None:
    command, *told = BAD_INPUT[name]
    before = content(world)
    assert_one_line(*call(command, world), tuple(told))
    assert content(world) == before


@pytest.mark.spark
@pytest.mark.parametrize("name", BAD_FOR_SPARK)
def test_input_that_spark_finds_bad_is_one_line_and_changes_nothing(world: Path, call: Call, name: str) -> None:
    command, *told = BAD_FOR_SPARK[name]
    before = content(world)
    assert_one_line(*call(command, world), tuple(told))
    assert content(world) == before


def test_a_hidden_share_is_told_in_the_table_and_in_the_name_of_the_file(world: Path, call: Call) -> None:
    code, out, _ = call("evaluate runs/sibrar --hide items.cover=0.5 --hide users.club", world)
    assert code == 0
    assert "test split, without items.cover=0.5, users.club: " in out
    result = world / "runs/sibrar/evaluation/test/metrics-without-items.cover=0.5-users.club.json"
    assert json.loads(result.read_text())["hidden"] == ["items.cover=0.5", "users.club"]


def test_every_modality_in_turn_and_alone(world: Path, call: Call) -> None:
    code, out, err = call("evaluate runs/sibrar --hide each --hide users.club", world)
    assert code == 0
    result = json.loads((world / "runs/sibrar/evaluation/test/modalities-without-users.club.json").read_text())
    values = {(row["kind"], row["modality"]): row for row in result["rows"]}
    line = next(line.split() for line in out.splitlines() if line.startswith("only items.cover"))
    row = values["only", "items.cover"]
    assert line[2:4] == [str(row["counts"]["items_without_modality"]), "items"]
    assert line[4] == f"{row['metrics']['test/ndcg@10']:.4f}"
    assert line[5] == f"{row['metrics']['test/ndcg@10'] - values['full', None]['metrics']['test/ndcg@10']:+.4f}"
    assert out.startswith("test split, without users.club in every row: ")
    assert max(map(len, out.splitlines())) <= 120
    assert err.splitlines()[-1] == "evaluating: 8 of 8 rows"


def test_the_gap_and_its_plot(world: Path, call: Call) -> None:
    code, out, _ = call("gap runs/sibrar --sample 20", world)
    assert code == 0
    folder = world / "runs/sibrar/evaluation"
    pairs = json.loads((folder / "modality-gap.json").read_text())["pairs"]
    assert [pair["side"] for pair in pairs] == ["users", "items", "items", "items"]
    lines = [line.split() for line in out.splitlines()]
    cover = next(pair for pair in pairs if pair["modalities"] == ["tags", "cover"])
    there, back = (way["metrics"]["recall@10/sampled-20"] for way in cover["retrieval"])
    expected = ["items", "tags", "cover", str(cover["entities"]), f"{cover['distance']:.4f}", "@10/sampled-20"]
    assert lines[5] == [*expected, f"{there:.4f}", f"{back:.4f}", "0.5000"]
    assert lines[-1] == ["plot", str(folder / "modality-gap.svg")]
    assert (folder / "modality-gap.svg").exists()


def test_all_items_as_candidates_have_files_of_their_own(world: Path, call: Call) -> None:
    before = (world / "runs/pop/evaluation/test/metrics.json").read_bytes()
    code, out, _ = call("evaluate runs/pop --candidates all", world)
    assert code == 0
    assert ", 80 candidates each (all items)" in out
    result = json.loads((world / "runs/pop/evaluation/test/metrics-all-items.json").read_text())
    assert (result["candidates"], result["users"]["file"]) == ("all", "users-all-items.parquet")
    assert (world / "runs/pop/evaluation/test/metrics.json").read_bytes() == before
    assert json.loads(before)["candidates"] == "split"


def test_recommendations_are_told_of_and_what_was_not_used(world: Path, call: Call, tmp_path: Path) -> None:
    (tmp_path / "users").write_text("u0001\nnobody\n")
    code, out, err = call(f"recommend runs/pop --to {tmp_path / 'to'} -k 5 --users {tmp_path / 'users'} --exclude none", world)
    assert code == 0
    assert out.splitlines() == [
        f"5 recommendations to 1 users are in {tmp_path / 'to'}",
        f"not used  1 unknown id: see {tmp_path / 'to' / 'rejected.csv'}",
    ]
    assert err.splitlines() == ["recommending to: 1 of 1 users"]


def test_bad_input_in_a_process_of_its_own(world: Path) -> None:
    finished = run_command("train pop dataset=altered --to runs/never", world)
    assert_one_line(finished.returncode, finished.stdout, finished.stderr, ("part-00001-", ".parquet is damaged"))
    assert not (world / "runs" / "never").exists()


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("prepare prepare.yaml", "--to"),
        ("recommend", "RUN"),
        ("evaluate runs/pop --split train", "'train' is not one of 'validation', 'test'"),
        ("evaluate runs/pop --workers -1", "--workers"),
        ("train pop --epochs 3", "--epochs"),
        ("report", "RUN"),
        ("compare", "RUN"),
        ("compare runs/pop runs/pop --format pdf", "'pdf' is not one of 'text', 'csv', 'latex', 'markdown'"),
        ("trian pop", "trian"),
    ],
)
def test_wrong_usage_exits_with_2_and_shows_how(world: Path, call: Call, command: str, told: str) -> None:
    code, out, err = call(command, world)
    assert code == 2
    assert out == ""
    assert err.startswith("Usage: sibra-dist")
    assert told in err
    assert "Traceback" not in err


def test_version_is_told(tmp_path: Path, call: Call) -> None:
    assert call("version", tmp_path) == (0, f"{__version__}\n", "")


def test_a_defect_keeps_its_traceback(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sibra_dist.report.comparison_table", lambda runs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["report", str(world / "runs" / "pop")])


def test_a_name_is_shown_by_the_letter(world: Path, call: Call, tmp_path: Path) -> None:
    """Rich takes [...] for a style and :...: for a picture; in the name of a folder they are neither."""
    name = "[bold]:smile:run"
    code, out, _ = call(f"train pop dataset=dataset --to {tmp_path}/{name}", world)
    assert code == 0
    assert f"`sibra-dist evaluate {tmp_path}/{name}`" in out
    assert call(f"evaluate {tmp_path}/{name}", world)[0] == 0
    assert call(f"report {tmp_path}/{name}", world)[1].split()[:3] == ["test", "split", name]
