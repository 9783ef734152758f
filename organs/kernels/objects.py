"""Compiled functions as object files, kept and loaded without numba, whose import alone takes a fifth of a second.

A file holds a digest, the function's symbol and the object that the compiler made of it, with all helpers inside. It names
nothing but what is in every process (the C library): one that needs numba's runtime is not kept.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from organs.kernels import cache

with cache.collecting_later():
    import llvmlite.binding as llvm

FOREIGN = (b"NRT_", b"numba_", b"PyErr_", b"Py_DecRef")  # symbols that only a process with numba can be linked with


@dataclass(frozen=True)
class Code:
    """A compiled C function: its address, how many arguments it takes, and what keeps it alive."""

    address: int
    count: int
    alive: Any

    def __call__(self, *arguments: int) -> None:
        """Call it, if it takes int64 alone and gives nothing, while other threads run."""
        self.from_python(*arguments)

    @functools.cached_property
    def from_python(self) -> Callable[..., None]:
        return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * self.count)(self.address)


@functools.cache
def _engine() -> llvm.ExecutionEngine:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
    return llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)


def load(path: Path, count: int) -> Code | None:
    """The function in a file; None if there is no such file, or not as it was written."""
    try:
        digest, symbol, content = path.read_bytes().split(b"\n", 2)
    except (OSError, ValueError):
        return None
    if digest.decode("ascii", "replace") != _digest(symbol, content):
        return None
    engine = _engine()
    engine.add_object_file(llvm.ObjectFileRef.from_data(content))
    engine.finalize_object()
    return Code(engine.get_function_address(symbol.decode()), count, engine)


def keep(path: Path, symbol: str, content: bytes) -> bool:
    """Write the file, whole or not at all; whether it could be."""
    if any(name in content for name in FOREIGN):
        return False
    name = symbol.encode()
    with suppress(OSError):  # a full disk: it will be compiled anew
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
            file.write(b"\n".join((_digest(name, content).encode(), name, content)))
        os.replace(file.name, path)
        return True
    return False


def _digest(symbol: bytes, content: bytes) -> str:
    return hashlib.blake2b(symbol + content, digest_size=16).hexdigest()
