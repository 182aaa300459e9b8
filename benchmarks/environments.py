"""The environments of other libraries: made once, with fixed versions, in the work folder."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Environment:
    """A virtual environment of Python 3.11 or newer."""

    name: str
    requirements: tuple[str, ...]


ENVIRONMENTS = {
    # RecBole 1.2.1 uses names that NumPy 2 and pandas 3 have removed, and one that setuptools has from version 81 on.
    "recbole": Environment(
        "recbole",
        ("recbole==1.2.1", "torch==2.13.0", "numpy==1.26.4", "scipy==1.13.1", "pandas==2.2.3", "setuptools==80.9.0"),
    ),
    "implicit": Environment("implicit", ("implicit==0.7.3", "numpy==2.4.6", "scipy==1.17.1")),
    # torch selects the best of each user, which ranx is then given.
    "ranx": Environment("ranx", ("ranx==0.3.21", "torch==2.13.0", "numpy==2.4.6", "scipy==1.17.1", "pandas==3.1.1")),
    "cornac": Environment("cornac", ("cornac==3.0.1", "numpy==2.4.6", "scipy==1.17.1")),
}


def interpreter(environment: Environment, folder: Path) -> Path:
    """The interpreter of an environment in `folder`; it is made unless it is there with the same requirements.

    Raises:
        SystemExit: it cannot be made; the message says where to look.
    """
    home = folder / environment.name
    python, complete, log = home / "bin" / "python", home / "requirements.txt", folder / f"{environment.name}.log"
    wanted = "".join(f"{requirement}\n" for requirement in environment.requirements)
    if complete.is_file() and complete.read_text() == wanted:
        return python
    folder.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        for command in (
            [sys.executable, "-m", "venv", "--clear", str(home)],
            [str(python), "-m", "pip", "install", "--no-input", *environment.requirements],
        ):
            if subprocess.run(command, stdout=output, stderr=output, check=False).returncode:
                raise SystemExit(f"{' '.join(command)} failed; see {log}")
    complete.write_text(wanted)  # written last: without it, the environment is not complete
    return python
