"""Where compiled code is kept, and which code path is chosen; without numba, which takes a fifth of a second to import.

The folder is private (mode 0700) and named by a digest of whatever decides what compiled code is right: the kernels'
sources, the versions of numba and NumPy, the CPU, the forced path. numba's own cache looks at one source file at a time,
so without the digest a kernel would outlive a change in the file it takes its helpers from.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent
GIVEN = "ORGANISM_KERNEL_FOLDER"  # environment variable: use exactly this folder
PATHS = {  # ORGANISM_KERNELS: (LLVM's name of the CPU, its features); None: the CPU that is here
    "native": (None, None),
    "avx2": ("haswell", "+avx2,+fma,+f16c"),
    "portable": ("x86-64" if platform.machine() == "x86_64" else "generic", ""),
}


def path_name() -> str:
    """native, avx2 or portable: from ORGANISM_KERNELS."""
    name = os.environ.get("ORGANISM_KERNELS", "native").lower()
    return name if name in PATHS else "native"


@functools.cache
def cpu() -> str:
    """What the machine says of its CPU, with all features."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _release(package: str) -> str:
    """What differs between a package's versions, without importlib.metadata, whose import takes longer than all else here."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    files = (Path(spec.origin).with_name(name) for name in ("_version.py", "version.py"))
    return next((file.read_text("utf-8") for file in files if file.exists()), spec.origin)


@functools.cache
def digest() -> str:
    """Names the folder."""
    h = hashlib.sha256()
    for part in (str(FOLDER), sys.version, cpu(), path_name(), *map(_release, ("numba", "llvmlite", "numpy"))):
        h.update(part.encode() + b"\0")
    for source in sorted(FOLDER.glob("*.py")):
        h.update(source.read_bytes() + b"\0")
    return h.hexdigest()[:16]


@functools.cache
def folder() -> Path:
    """The cache of this code on this machine; a temporary one where the user's cache cannot be written."""
    if given := os.environ.get(GIVEN):  # a child fills its parent's folder
        return Path(given)
    base = os.environ.get("ORGANISM_CACHE")
    if not base:
        import platformdirs

        base = platformdirs.user_cache_dir("organism", appauthor=False)
    path = Path(base) / f"kernels-{digest()}"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(path, os.W_OK):
            return path
    except OSError:
        pass
    import atexit
    import shutil
    import tempfile

    path = Path(tempfile.mkdtemp(prefix="organism-kernels-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def prepare() -> None:
    """Tell numba about the folder and the CPU path, before or after it was imported."""
    name, features = PATHS[path_name()]
    settings = {"CACHE_DIR": str(folder()), "CPU_NAME": name, "CPU_FEATURES": features}
    if "numba" in sys.modules:
        import numba

        for key, value in settings.items():
            if value is not None:
                setattr(numba.config, key, value)
    else:
        os.environ.update({f"NUMBA_{key}": value for key, value in settings.items() if value is not None})


@contextmanager
def collecting_later() -> Iterator[None]:
    """Let Python's garbage collector wait. What is loaded inside are objects that stay, a hundred thousand with numba, through
    which it would look again and again: a quarter of the time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@functools.cache
def folder_of(organ: str, sources: tuple[Path, ...]) -> Path:
    """Where another organ's compiled code is kept: a folder of its own inside of ours. sources: the files whose change makes
    that code stale."""
    h = hashlib.sha256()
    for source in sources:
        h.update(source.read_bytes() + b"\0")
    path = folder() / f"{organ}-{h.hexdigest()[:16]}"
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def environment() -> dict[str, str]:
    """For a child that shall fill this very folder."""
    paths = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    return dict(os.environ, **{GIVEN: str(folder())}, PYTHONPATH=os.pathsep.join(paths))


@contextmanager
def alone() -> Iterator[None]:
    """One process at a time fills the folder. The others wait, and find it filled: eight organisms that are born together
    compile once. Where files cannot be locked, each compiles for itself."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(folder() / "compiling", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_marked() -> bool:
    """Whether everything was compiled into the folder."""
    return (folder() / "complete").exists()


def mark() -> None:
    """Everything is compiled: remember it."""
    (folder() / "complete").touch()


def describe() -> list[tuple[str, str]]:
    """(what, which) for the doctor."""
    wish = os.environ.get("ORGANISM_KERNELS")
    reason = "chosen for this CPU" if not wish else f"ORGANISM_KERNELS is {wish}"
    base = os.environ.get("ORGANISM_CACHE")
    where = str(folder())
    if folder().name.startswith("organism-kernels-"):
        where += f", for this process only: {base or 'the user cache'} cannot be written"
    return [("kernel path", f"{path_name()}, {reason}"), ("kernel cache", where)]
