"""The compiler: numba, with a cache and libraries of our own. Only what compiles, or calls numba's functions from Python,
imports this; ground.py and objects.py do without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from organs.kernels import cache, objects

with cache.collecting_later():
    import llvmlite.binding
    from llvmlite import ir
    from numba import from_dtype, njit, types
    from numba.core import sigutils
    from numba.core.caching import FunctionCache
    from numba.core.ccallback import CFunc
    from numba.core.codegen import JITCodeLibrary
    from numba.core.registry import cpu_target
    from numba.core.runtime import rtsys
    from numba.core.typing import signature
    from numba.extending import intrinsic


WRAPPERS = ("cfunc.", "_ZN7cpython")  # names of what Python and C enter


class _Library(JITCodeLibrary):
    """numba's, with three differences.

    Each has its own copy of every helper it is linked with. numba lets all libraries share the copy that was loaded first;
    copies differ in how they were optimised, hence in their last bits, and what is loaded first differs between a process
    that compiles and one that finds the cache full (a text compressed by the one was lost to the other).

    A helper is optimised, and becomes machine code, only as a part of what it is linked with, unless it is called by itself:
    that takes two thirds of the time.

    One from the cache is only called, so its bitcode is not parsed, nor numba's runtime compiled for one that does not use
    it: half of the time that loading takes.
    """

    _bitcode, _is_optimised, _is_code = b"", False, False

    def _optimize_final_module(self):
        defined = [f for f in self._final_module.functions if not f.is_declaration]
        if any(f.name.startswith(WRAPPERS) for f in defined):
            for f in defined:
                if f.linkage == llvmlite.binding.Linkage.linkonce_odr:
                    f.linkage = "internal"
            super()._optimize_final_module()
            self._is_optimised = True

    @classmethod
    def _unserialize(cls, codegen, state):
        name, kind, data = state
        if kind != "object":
            return super()._unserialize(codegen, state)
        self = codegen.create_library(name)
        (code, self._bitcode), self._is_optimised = data, True
        if b"NRT_" in code:  # names that it is linked with
            rtsys.initialize(cpu_target.target_context)
        self.enable_object_caching()
        self._set_compiled_object(code)
        self._finalize_final_module()
        return self

    def _get_module_for_linking(self):
        if self._shared_module is None and self._bitcode:
            self._shared_module = llvmlite.binding.parse_bitcode(self._bitcode)
        return super()._get_module_for_linking()

    def _finalize_final_module(self):
        self._finalize_dynamic_globals()
        self._finalized = True

    def _become_code(self):
        self._ensure_finalized()
        if self._is_code:
            return
        if not self._is_optimised:
            super()._optimize_final_module()
        self._is_code = True
        super()._finalize_final_module()

    def _get_compiled_object(self):
        self._become_code()
        return super()._get_compiled_object()

    def get_pointer_to_function(self, name):
        self._ensure_finalized()
        if not self._bitcode and name not in {f.name for f in self._final_module.functions if not f.is_declaration}:
            return 0
        self._become_code()
        return self._codegen._engine.get_function_address(name)


def _set_environment(name, environment):
    """numba's, for functions that may not have become code."""
    if _codegen._engine.get_global_value_address(name):
        type(_codegen).set_env(_codegen, name, environment)


_codegen = cpu_target.target_context.codegen()
_codegen._library_class, _codegen.set_env = _Library, _set_environment


class _Cache(FunctionCache):
    """numba's, without the look at all of its own tables before a function is loaded (0.3 to 0.5 s of a profiled start), which
    compiling alone needs."""

    def load_overload(self, sig, target_context):
        with self._guard_against_spurious_io_errors():
            return self._load_overload(sig, target_context)


def entry(**options):
    """numba.njit, cached, for what Python calls."""

    def decorate(f):
        dispatcher = njit(**options)(f)
        dispatcher._cache = _Cache(f)
        return dispatcher

    return decorate


def c_function(sig: Any, f: Callable[..., Any], path: Path, **options: Any) -> objects.Code:
    """Compile a C function and keep its object in a file."""
    known = _signature(sig)
    made = CFunc(f, (known.args, known.return_type), locals={}, options=options)
    made.compile()
    objects.keep(path, made.native_name, made._library._get_compiled_object())
    return objects.Code(made.address, len(known.args), made)


def type_of(value: Any) -> Any:
    """How numba types a global value."""
    if isinstance(value, types.Type):
        return value
    cpu_target.typing_context.refresh()  # it was registered just now
    return cpu_target.typing_context.resolve_value_type(value)


def external(name: str, sig: str) -> types.ExternalFunction:
    """A function of the process, by its symbol."""
    return types.ExternalFunction(name, _signature(sig))


def takes_records(*records: np.dtype) -> Any:
    """The signature void(record, …)."""
    return types.void(*map(from_dtype, records))


def gives_record(record: np.dtype) -> Any:
    """The signature record(int64)."""
    return from_dtype(record)(types.int64)


@intrinsic
def address_of(context, record):
    """Where a record lies, for compiled code."""
    return types.int64(record), lambda context, b, signature, arguments: b.ptrtoint(arguments[0], ir.IntType(64))


def instruction(sig: Any, build: Callable[..., Any]) -> Any:
    """An intrinsic of fixed signature: build(builder, *arguments) emits it."""

    def typed(*arguments):
        known = _signature(sig)

        def emit(context, builder, signature, arguments):
            result = build(builder, *arguments)
            return context.get_dummy_value() if known.return_type == types.void else result

        return known, emit

    return intrinsic(_TYPINGS[len(_signature(sig).args)](typed))


# An intrinsic is typed by the number of its arguments, which must be spelled out.
_TYPINGS: tuple[Callable[..., Any], ...] = (
    lambda typed: lambda context: typed(),
    lambda typed: lambda context, a: typed(a),
    lambda typed: lambda context, a, b: typed(a, b),
    lambda typed: lambda context, a, b, c: typed(a, b, c),
    lambda typed: lambda context, a, b, c, d: typed(a, b, c, d),
    lambda typed: lambda context, a, b, c, d, e: typed(a, b, c, d, e),
    lambda typed: lambda context, a, b, c, d, e, f: typed(a, b, c, d, e, f),
    lambda typed: lambda context, a, b, c, d, e, f, g: typed(a, b, c, d, e, f, g),
)


def _signature(sig: Any) -> Any:
    """Of text, or of a function that gives one: what a signature is made of may need numba."""
    parameters, result = sigutils.normalize_signature(sig() if callable(sig) else sig)
    return signature(result, *parameters)
