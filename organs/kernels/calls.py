"""How Python calls compiled code: with arrays and numbers, and without numba once the code is kept.

    @entry(fastmath=True)
    def scale(x, factor): …

A function has a version for each combination of kinds of arguments that it was given: a C function, loaded from its object
file or else compiled into it, which Python calls as it calls its own built-in ones (METH_FASTCALL). It looks into the objects
by itself, lets other threads run, and answers MISFIT where the arguments are of other kinds; then another version is for them.
"""

from __future__ import annotations

import ctypes
import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from organs.kernels import cache, objects
from organs.kernels.ground import HELP, Lazy, compiler, external, ints, jit, load_or_compile, longs

SIGNATURE, WORDS = "int64(int64, int64, int64)", 3  # PyObject *(PyObject *self, PyObject **arguments, Py_ssize_t)
FASTCALL, METHOD = 0x80, 32  # METH_FASTCALL; bytes of a PyMethodDef
MISFIT = -(1 << 63)

# Where things are in Python's objects and in NumPy's arrays (PyArrayObject_fields, the same in all its versions).
TYPE, HEAD = object.__basicsize__ - 8, object.__basicsize__
DATA, NDIM, SHAPE, DTYPE, FLAGS = HEAD, HEAD + 8, HEAD + 16, HEAD + 40, HEAD + 48
ORDERED, WRITEABLE = 0x101, 0x400  # flags: C-contiguous and aligned; writeable

python_int = external("PyLong_FromLongLong", "int64(int64)")
let_others_run = external("PyEval_SaveThread", "int64()")
run_again = external("PyEval_RestoreThread", "void(int64)")


@dataclass(frozen=True)
class Array:
    """A kind of array. Where it need not be writeable, one that is will do."""

    dtype: np.dtype
    ndim: int
    writeable: bool


Kind = Array | type  # of an argument: an Array, int or float


def kind_of(argument: Any) -> Kind:
    """Raises TypeError for what compiled code cannot be given."""
    if isinstance(argument, (float, np.floating)):
        return float
    if isinstance(argument, (int, np.integer, np.bool_)):
        return int
    if not isinstance(argument, np.ndarray):
        raise TypeError(f"Compiled code takes arrays and numbers, not {type(argument).__name__}.")
    flags, dtype = argument.flags, argument.dtype
    if not argument.ndim or not flags.c_contiguous or not flags.aligned:
        raise TypeError(f"Compiled code takes C-contiguous arrays, not one of strides {argument.strides}.")
    return Array(np.dtype(dtype.str) if dtype.names is None else dtype, argument.ndim, flags.writeable)


def adapted(argument: Any, kind: Kind) -> Any:
    """An argument as compiled code knows this kind: a number of Python's, a plain array of this very dtype object."""
    return argument.view(kind.dtype, np.ndarray) if isinstance(kind, Array) else kind(argument)


def _wanted(kind: Kind) -> tuple[int, int, int, int]:
    """What `fits` compares."""
    if isinstance(kind, Array):
        return id(np.ndarray), id(kind.dtype), kind.ndim, ORDERED | (WRITEABLE if kind.writeable else 0)
    return id(kind), id(bool if kind is int else kind), 0, 0


@jit(forceinline=True, **HELP)
def fits(arguments, wanted, count):
    """Whether so many objects are what they have to be. wanted int64 [count, 4]: of an array its type, dtype, dimensions
    and flags; of a number its type or other type, 0, 0."""
    for i in range(count):
        known, at = longs(wanted + 32 * i, 4), longs(arguments + 8 * i, 1)[0]
        kind = longs(at + TYPE, 1)[0]
        if known[2] == 0:
            if kind != known[0] and kind != known[1]:
                return False
        elif (
            kind != known[0]
            or longs(at + DTYPE, 1)[0] != known[1]
            or ints(at + NDIM, 1)[0] != known[2]
            or ints(at + FLAGS, 1)[0] & known[3] != known[3]
        ):
            return False
    return True


_new_function = ctypes.pythonapi.PyCFunction_NewEx
_new_function.argtypes, _new_function.restype = [ctypes.c_void_p, ctypes.py_object, ctypes.c_void_p], ctypes.py_object


class Version:
    """A function for one kind of each argument; `run(*arguments)` is the answer, or MISFIT."""

    def __init__(self, name: str, kinds: Sequence[Kind], code: objects.Code):
        self.kinds, self.code, self.name = kinds, code, ctypes.create_string_buffer(name.encode())
        method = ctypes.addressof(self.name), code.address, FASTCALL, 0  # PyMethodDef, in four words
        itself = np.array(
            [method, *map(_wanted, kinds)], np.int64
        )  # what Python passes first: it lives as long as `run`
        self.run = _new_function(itself.ctypes.data, itself, None)


class Entry(Lazy):
    """A function of arrays (C-contiguous) and numbers (of an int, 64 bits) that gives an integer, or nothing (0).

    It may not allocate or raise: its code would not be kept.
    """

    _lock = threading.Lock()  # a version is loaded once

    def __init__(self, f: Callable[..., Any], folder: Callable[[], Path], options: dict[str, Any]):
        super().__init__(lambda: compiler().jit(**options, no_cpython_wrapper=True, no_cfunc_wrapper=True)(f))
        self._f, self._folder, self._options = f, folder, options
        self._versions: dict[tuple[Kind, ...], Version] = {}
        self._runs: list[Callable[..., int]] = []
        self.__doc__ = f.__doc__

    def __call__(self, *arguments: Any) -> int:
        for run in self._runs:
            answer = run(*arguments)
            if answer != MISFIT:
                return answer
        version = self.prepare(*arguments)
        return version.run(*map(adapted, arguments, version.kinds))

    def prepare(self, *arguments: Any) -> Version:
        """The version for such arguments, loaded or compiled."""
        if len(arguments) != self._f.__code__.co_argcount:
            raise TypeError(f"{self._f.__name__} takes {self._f.__code__.co_argcount} arguments, not {len(arguments)}.")
        kinds = tuple(map(kind_of, arguments))
        with self._lock:
            if kinds not in self._versions:
                version = Version(self._f.__name__, kinds, self._code(kinds))
                self._versions[kinds] = version
                self._runs.append(version.run)
            return self._versions[kinds]

    def _code(self, kinds: tuple[Kind, ...]) -> objects.Code:
        digest = hashlib.blake2b(repr(kinds).encode(), digest_size=6).hexdigest()
        name, module = f"{self._f.__name__}_{digest}", self._f.__module__

        def compiled(path: Path) -> objects.Code:
            enter = compiler().entered(self.made, name, module, kinds)
            return compiler().c_function(SIGNATURE, enter, path, **self._options)

        return load_or_compile(self._folder() / f"{module}.{name}.o", WORDS, compiled)


def entry(folder: Callable[[], Path] = cache.folder, **options: Any) -> Callable[[Callable[..., Any]], Entry]:
    """What Python calls, compiled with these options of numba.njit; folder(): where it is kept."""
    return lambda f: Entry(f, folder, options)
