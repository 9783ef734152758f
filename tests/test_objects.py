"""Compiled functions as object files: what is loaded does what was compiled, or is not loaded at all.

Run alone: pytest -n 0 tests/test_objects.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba")

from organs.kernels import ground, objects


def double(at):
    ground.longs(at, 1)[0] *= 2


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("objects")
    made = ground.c_function("void(int64)", double, folder, **ground.FAST)
    assert made.count == 1
    (path,) = folder.iterdir()
    return path


def doubled(code: objects.Code, value: int) -> int:
    number = np.array([value])
    code(number.ctypes.data)
    return int(number[0])


def test_what_was_kept_does_what_was_compiled(kept):
    code = objects.load(kept, 1)
    assert code is not None and doubled(code, 21) == 42


@settings(max_examples=60)
@given(data=st.data())
def test_a_damaged_file_is_not_loaded(kept, data):
    whole = kept.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    damaged = kept.with_name("damaged")
    if data.draw(st.booleans()):
        damaged.write_bytes(whole[:at])
    else:
        damaged.write_bytes(whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :])
    assert objects.load(damaged, 1) is None


def test_a_damaged_file_is_compiled_anew(kept, tmp_path):
    path = tmp_path / kept.name
    path.write_bytes(kept.read_bytes()[:-1])
    assert doubled(ground.c_function("void(int64)", double, tmp_path, **ground.FAST), 4) == 8
    assert path.read_bytes() == kept.read_bytes() or objects.load(path, 1) is not None


def test_code_that_needs_numba_in_the_process_is_not_kept(tmp_path):
    path = tmp_path / "f.o"
    assert not objects.keep(path, "f", b"\x7fELF numba_do_raise")
    assert not list(tmp_path.iterdir())
