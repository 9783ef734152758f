"""Everything compiled (numba): the tape's kernels and their executor, the field, the tokenizer.

The public face. Importing it costs nothing: numba is imported when something compiled is first used. `ready()` says
whether all of it is in the cache, `warm()` compiles it, `warm_in_background()` lets a child process do so.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from organs.kernels import cache

cache.prepare()


def ready() -> bool:
    """Whether everything is compiled, so that using it does not wait for a compiler."""
    return cache.is_marked()


def warm(say: Callable[[str], None] = lambda text: None) -> None:
    """Compile everything that is missing from the cache; `say` hears of each part."""
    for module, what in (("field", "the field"), ("tokenizer", "the tokenizer"), ("executor", "training and speaking")):
        say(f"compiling {what}…")
        importlib.import_module(f"organs.kernels.{module}").warm()
    cache.mark()


def warm_in_background() -> subprocess.Popen:
    """A child process of low priority that compiles everything; poll() says when it is done."""
    return subprocess.Popen(
        [sys.executable, "-m", "organs.kernels", "warm", "--quiet"], stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=cache.ROOT, env=cache.environment(),
    )  # fmt: skip


def cache_folder() -> Path:
    """Where compiled code is kept; also for what else is a function of the code alone."""
    return cache.folder()


def describe() -> list[tuple[str, str]]:
    """(what, which): the paths that run here and why, for the doctor."""
    ground = importlib.import_module("organs.kernels.ground")
    return [*cache.describe(), ("matrix product", ground.BLAS)]


def identity() -> dict[str, str]:
    """What decides the last bit of a result: "path", "CPU", "product" (of matrices), "libraries"."""
    from importlib.metadata import version

    ground = importlib.import_module("organs.kernels.ground")
    libraries = f"numba {version('numba')} llvmlite {version('llvmlite')}"
    return dict(path=cache.path_name(), CPU=cache.cpu(), product=ground.BLAS, libraries=libraries)


compiling = cache.compiling  # for organs with compiled code of their own


def __getattr__(name: str) -> Any:
    """Gradients, Speaker and measure, from the executor, and the module `ground`, when they are first asked for."""
    if name == "ground":  # what compiled code of other organs stands on too
        return importlib.import_module("organs.kernels.ground")
    if name in ("Gradients", "Speaker", "measure"):
        return getattr(importlib.import_module("organs.kernels.executor"), name)
    raise AttributeError(name)
