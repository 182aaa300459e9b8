"""`sibra-dist describe` as its users see it: the table, the JSON, and what cannot be read in one line."""

import io
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from sibra_dist.cli import main
from sibra_dist.data.manifest import MANIFEST, Counts, Records
from sibra_dist.describe import describe
from sibra_dist.description import Cold, Description, HistoryLengths, Storage, TableSize, Times, Weights
from sibra_dist.report import description_table
from tests.described import replaced, seen, write_tiny
from tests.planted import write_planted


def shown(description: Description, width: int = 100) -> list[str]:
    """The lines as they are printed, without the blanks at their ends."""
    file = io.StringIO()
    console = Console(file=file, width=width, highlight=False, markup=False, emoji=False)
    console.print(description_table(description), soft_wrap=True)
    return [line.rstrip() for line in file.getvalue().splitlines()]


def described(folder: Path) -> Description:
    """A dataset at a glance, with what hangs on the machine, and on how Parquet is written, put in place."""
    description = describe(write_tiny(folder))
    sizes = dict.fromkeys(
        description.storage.tables, TableSize(rows=6, bytes=873, shards=1, smallest_shard=873, largest_shard=873)
    )
    sizes["items"] = TableSize(rows=5, bytes=300 << 20, shards=3, smallest_shard=44 << 20, largest_shard=128 << 20)
    storage = Storage(bytes=1500 << 30, shards=9, tables=sizes)
    return description.model_copy(update={"place": "s3://bucket/tiny", "digest": "f" * 64, "storage": storage})


def test_a_dataset_at_a_glance(tmp_path: Path) -> None:
    assert (
        "\n".join(shown(described(tmp_path / "dataset")))
        == """\
dataset tiny in s3://bucket/tiny
digest ffffffffffff, format 1, made by sibra-dist 0; extends 0123456789ab
split temporal_global (seed 7, 0.15 validation, 0.2 test)
6 users, 5 items
interactions: 10 train (62.5 %), 3 validation (18.8 %), 3 test (18.8 %)
density: 33.3 % of all pairs of a user and an item are in training, 53.3 % in any split
records: 25 read, 3 rejected (2 no user id, 1 no item id), 6 left out (6 min_rating), 16 kept
side information: 1 records rejected (1 duplicate id)

cold (no history)  cold   share  first in validation  first in test  others  no modality   share
users                 2  33.3 %                    0              1       1            1  16.7 %
items                 1  20.0 %                    1              0       0            0   0.0 %

held out    users  candidates  interactions  warm  cold item  cold user  both cold
validation      2           5             3     0          1          1          1
test            2           5             3     1          0          1          1

history lengths  with one  min  p1  p10  p25  p50  p75  p90  p99  max  mean
users                   4    1   1    1    1    2    3    4    4    4   2.5
items                   4    1   1    1    1    2    3    4    4    4   2.5

items by popularity  items  share of training interactions
top 1 %                  1                          40.0 %
top 20 %                 1                          40.0 %
all with a history       4                         100.0 %

side   modality      kind          size  present   share  of the cold  unknown values
users  interactions  interactions     5        4  66.7 %        0.0 %               -
users  club          category         2        4  66.7 %       50.0 %      3 (code 0)
items  interactions  interactions     6        4  80.0 %        0.0 %               -
items  price         numeric          1        4  80.0 %      100.0 %               -

table                rows  on disk  shards  smallest  largest
users                   6    873 B       1     873 B    873 B
items                   5  300 MiB       3  44.0 MiB  128 MiB
histories/users         6    873 B       1     873 B    873 B
histories/items         6    873 B       1     873 B    873 B
held_out/validation     6    873 B       1     873 B    873 B
held_out/test           6    873 B       1     873 B    873 B
rejected                6    873 B       1     873 B    873 B
all                        1.5 TiB       9"""
    )


def test_a_large_dataset_at_a_glance_fits_a_hundred_columns(tmp_path: Path) -> None:
    given = described(tmp_path / "dataset")
    lengths = {f"p{percent}": 2 * percent for percent in (1, 10, 25, 50, 75, 90, 99)}
    lengths |= {"entities": 12_345_678, "min": 1, "p90": 12_345, "p99": 54_321, "max": 1_234_567}
    long = HistoryLengths(**lengths, mean=123.4)
    club = given.users.modalities["club"].model_copy(update={"size": 100_000, "present": 12_345_678, "unknown": 3_456_789})
    users = given.users.model_copy(
        update={
            "cold": Cold(count=1_234_567, share=0.0004, validation=234_567, test=345_678, others=654_322),
            "history_lengths": long,
            "modalities": {"club": club, "plot_summary": club},
        }
    )
    held = given.held_out["test"].model_copy(update={"users": 12_345_678, "interactions": 123_456_789, "warm": 123_456_780})
    rejected = {f"reason {number} of rejection": 1_000_000 + number for number in range(9)}
    records = Records(read=2_345_678_901, rejected=rejected, filtered={}, kept=2_345_678_901 - sum(rejected.values()))
    counts = Counts(users=13_580_245, items=2_345_678, train=2_000_000_000, validation=123_456_789, test=1)
    update = {"users": users, "held_out": {"validation": held, "test": held}, "records": records, "counts": counts}
    update |= {
        "weights": Weights(min=1e-9, mean=12_345.678, max=1e30),
        "times": Times(earliest="2001-01-01", latest="2026-12-31"),
    }
    lines = shown(given.model_copy(update=update))
    assert max(map(len, lines)) <= 100
    text = "\n".join(lines)
    assert "…" not in text
    for words in (
        "13,580,245 users, 2,345,678 items",
        "2,000,000,000 train (94.2 %), 123,456,789 validation (5.8 %), 1 test (<0.1 %)",
        "weights: 1e-09 to 1e+30, mean 12345.7",
        "times: from 2001-01-01 to 2026-12-31",
        "3,456,789 (code 0)",
        "plot_summary",
        "1,234,567  123.4",
    ):
        assert words in text
    assert ["users", "1,234,567", "<0.1", "%", "234,567", "345,678", "654,322", "1", "16.7", "%"] in map(str.split, lines)


def test_a_narrow_terminal_cuts_no_figure_off(tmp_path: Path) -> None:
    given = described(tmp_path / "dataset")
    lines = shown(given, width=50)
    assert max(map(len, lines)) <= 50 or lines[0].startswith("dataset")
    assert "…" not in "".join(lines)


def test_shares_are_told_where_the_protocol_goes_by_them(tmp_path: Path) -> None:
    given = described(tmp_path / "dataset")
    for name, told in (("random", "split random (seed 7, 0.15 validation, 0.2 test)"), ("fixed", "split fixed (seed 7)")):
        protocol = given.protocol.model_copy(update={"name": name})
        assert shown(given.model_copy(update={"protocol": protocol}))[2] == told


def test_nearly_all_is_not_all_and_nearly_nothing_not_nothing(tmp_path: Path) -> None:
    given = described(tmp_path / "dataset")
    told = {None: "-", 0.0: "0.0 %", 0.0009: "<0.1 %", 0.001: "0.1 %", 0.999: "99.9 %", 0.9991: ">99.9 %", 1.0: "100.0 %"}
    for share, text in told.items():
        without = given.items.without_modality.model_copy(update={"share": share})
        items = given.items.model_copy(update={"without_modality": without})
        lines = shown(given.model_copy(update={"items": items}))
        assert next(line for line in lines if line.startswith("items ")).endswith(f" {text}")


Call = Callable[[str], tuple[int, str, str]]


@pytest.fixture
def call(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Call]:
    """Runs a command in this process, in the test's folder: exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    logger = logging.getLogger("sibra_dist")
    level = logger.level

    def run(command: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(command.split())
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, err

    yield run
    logger.setLevel(level)


def test_json_is_one_object_and_nothing_else(tmp_path: Path, call: Call) -> None:
    folder = replaced(write_planted(tmp_path / "dataset"), {}, name="größe [bold]:smile: " + "long " * 50)
    code, out, err = call("describe dataset --json")
    assert (code, err) == (0, "")
    assert out.isascii()  # whatever the encoding of the stream
    assert json.loads(out) == seen(folder)


def test_the_table_says_what_the_json_says(tmp_path: Path, call: Call) -> None:
    write_tiny(tmp_path / "dataset")
    code, out, err = call("describe dataset")
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    assert ["dataset", "tiny", "in", str(tmp_path / "dataset")] in lines
    assert ["users", "club", "category", "2", "4", "66.7", "%", "50.0", "%", "3", "(code", "0)"] in lines
    assert ["validation", "2", "5", "3", "0", "1", "1", "1"] in lines


def test_the_command_starts_neither_spark_nor_ray(tmp_path: Path) -> None:
    write_planted(tmp_path / "dataset")
    code = """
import sys
from sibra_dist.cli import main
try:
    main(["describe", "dataset", "--json"])
finally:
    print([name for name in ("ray", "pyspark") if name in sys.modules], file=sys.stderr)
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (finished.returncode, finished.stderr) == (0, "[]\n")
    assert json.loads(finished.stdout) == seen(tmp_path / "dataset")


def no_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def damaged_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text('{"format_version": 1}')


def newer_format(folder: Path) -> None:
    values = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**values, "format_version": 2}))


def altered_shard(folder: Path) -> None:
    shard = next(folder.glob("histories/items/part-00001-*.parquet"))
    content = shard.read_bytes()
    shard.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])


def lost_shard(folder: Path) -> None:
    next(folder.glob("rejected/*.parquet")).unlink()


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no manifest": (no_manifest, "dataset is not a dataset: it has no manifest.json. Make one: sibra-dist prepare"),
    "damaged manifest": (damaged_manifest, "manifest.json is damaged: "),
    "newer format": (newer_format, "has format version 2, but this sibra-dist reads up to 1"),
    "altered shard": (altered_shard, "is damaged: its content is not what the manifest's checksum says"),
    "lost shard": (lost_shard, ".parquet cannot be read: No such file"),
}


@pytest.mark.parametrize("option", ["", " --json"])
@pytest.mark.parametrize("name", DAMAGE)
def test_what_cannot_be_read_is_told_in_one_line(tmp_path: Path, call: Call, name: str, option: str) -> None:
    damage, told = DAMAGE[name]
    damage(write_planted(tmp_path / "dataset"))
    code, out, err = call(f"describe dataset{option}")
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")
    assert told in err
