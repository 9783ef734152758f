"""Everything compiled (numba): the tape's kernels and their executor, the field, the tokenizer.

The public face. Importing it costs nothing: numba is imported when something compiled is first used. `ready()` says
whether all of it is in the cache, `warm()` compiles it, `warm_in_background()` lets a child process do so.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from organs.kernels import cache

cache.prepare()


def ready() -> bool:
    """Whether everything is compiled, so that using it does not wait for a compiler."""
    return cache.is_marked()


PARTS = dict(field="the field", tokenizer="the tokenizer", executor="training and speaking", sampling="the voice")
FIRST_HALF = ("field", "tokenizer")  # takes about as long to compile as the rest


def warm(say: Callable[[str], None] = lambda text: None) -> None:
    """Compile everything that is missing from the cache, on two cores where there are two; `say` hears of each part."""
    with cache.alone():
        other = _start_warming(*FIRST_HALF) if (os.cpu_count() or 1) > 1 and not ready() else None
        compile_parts([part for part in PARTS if other is None or part not in FIRST_HALF], say)
        if other is not None:
            say(f"compiling {' and '.join(PARTS[part] for part in FIRST_HALF)}…")
            if other.wait() != 0:  # whatever it was, here it is heard of
                compile_parts(FIRST_HALF, say)
        cache.mark()


def compile_parts(parts: Iterable[str], say: Callable[[str], None] = lambda text: None) -> None:
    """Compile, or load, some of PARTS."""
    for part in parts:
        say(f"compiling {PARTS[part]}…")
        importlib.import_module(f"organs.kernels.{part}").warm()


def warm_in_background() -> subprocess.Popen:
    """A child process of low priority that compiles everything; poll() says when it is done."""
    return _start_warming("--nice")


def _start_warming(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "organs.kernels", "warm", "--quiet", *arguments], stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=cache.ROOT, env=cache.environment(),
    )  # fmt: skip


def release_compiler() -> None:
    """Give back the memory of LLVM's code, some 60 MB that only loading and compiling run; what is needed comes back by
    itself, from the file. Worth calling when kernels were loaded. Does nothing where it cannot (elsewhere than on Linux)."""
    with contextlib.suppress(OSError, AttributeError, ValueError):
        advise = ctypes.CDLL(None).madvise
        advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
            if "libllvmlite" in line and " r-xp " in line:  # unwritten pages of a file: nothing in them can be lost
                start, end = (int(address, 16) for address in line.split()[0].split("-"))
                advise(start, end - start, 4)  # MADV_DONTNEED


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


folder_of, collecting_later = cache.folder_of, cache.collecting_later  # for organs with compiled code of their own
_HOMES = dict(Gradients="executor", Speaker="executor", measure="executor", Chain="sampling", blended="sampling")


def __getattr__(name: str) -> Any:
    """What _HOMES lists, from its module, and the module `ground`, when they are first asked for."""
    if name == "ground":  # what compiled code of other organs stands on too
        return importlib.import_module("organs.kernels.ground")
    if name in _HOMES:
        return getattr(importlib.import_module(f"organs.kernels.{_HOMES[name]}"), name)
    raise AttributeError(name)
