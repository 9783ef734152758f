"""How Python calls compiled code: with what fits, or not at all; and without numba once the code is kept.

pytest tests/test_calls.py
"""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("numba")

from numba import njit

import organism as o
from organs.kernels import calls, ground

ROOT = Path(o.__file__).resolve().parent


def a_sum(x, weights, shift, factor):
    total = 0.0
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            total += x[i, j] * weights[i]
    weights[0] = total * factor
    return np.int64(total) + shift


@pytest.fixture(scope="module")
def summed(tmp_path_factory) -> calls.Entry:
    folder = tmp_path_factory.mktemp("calls")
    return calls.entry(folder=lambda: folder)(a_sum)


def numbers(rows: int, columns: int, dtype: type = np.float32) -> np.ndarray:
    return np.arange(rows * columns, dtype=dtype).reshape(rows, columns)


def expected(x, weights, shift) -> int:
    return int((np.asarray(x, np.float64) * np.asarray(weights)[:, None]).sum()) + shift


@given(rows=st.integers(1, 5), columns=st.integers(0, 5), shift=st.integers(-(2**40), 2**40), factor=st.floats(-9, 9))
def test_a_call_is_the_functions_own(summed, rows, columns, shift, factor):
    x, weights = numbers(rows, columns), np.linspace(1, 2, rows)
    true = expected(x, weights, shift)
    assert summed(x, weights, shift, factor) == true and weights[0] == pytest.approx((true - shift) * factor, abs=9)


def test_what_gives_nothing_gives_0(tmp_path):
    @calls.entry(folder=lambda: tmp_path)
    def clear(x):
        for i in range(len(x)):
            x[i] = 0

    x = np.ones(3)
    assert clear(x) == 0 and not x.any()


@pytest.mark.parametrize("shift", [np.int64(3), np.uint8(3), True, np.True_])
@pytest.mark.parametrize("factor", [np.float64(2), np.float32(2)])
def test_numpys_numbers_are_numbers(summed, shift, factor):
    x, weights = numbers(2, 2), np.ones(2)
    assert summed(x, weights, shift, factor) == 6 + int(shift) and weights[0] == 12


def test_other_kinds_get_a_version_of_their_own(summed):
    assert summed(numbers(2, 2, np.float64), np.ones(2, np.float32), 1, 1.0) == 7
    assert summed(numbers(2, 2), np.ones(2), 1, 1.0) == 7
    assert summed(numbers(2, 2), np.ones(2), 1, 2) == 7, "a factor that is whole"
    assert len(summed._versions) >= 3


def test_only_the_very_arrays_that_it_knows_are_looked_into(summed):
    """What differs from the kind it was compiled for would be read as something else."""
    summed(numbers(2, 2), np.ones(2), 1, 1.0)
    (run,) = [v.run for kinds, v in summed._versions.items() if kinds[0].dtype == np.float32 and kinds[3] is float]
    good = numbers(2, 2), np.ones(2), 1, 1.0
    assert run(*good) == 7
    for at, bad in [(0, numbers(2, 2, np.int32)), (0, numbers(2, 4)[:, ::2]), (0, np.ones(4, np.float32)), (0, "xxxx"),
                    (0, numbers(2, 2).astype(">f4")), (1, None), (1, 2.0), (2, 1.0), (2, np.ones(1)), (3, 1)]:  # fmt: skip
        assert run(*good[:at], bad, *good[at + 1 :]) == calls.MISFIT
    assert run(*good[:3]) == run(*good, 1) == run() == calls.MISFIT


def test_what_cannot_be_passed_is_refused_in_a_sentence(summed):
    with pytest.raises(TypeError, match="strides"):
        summed(numbers(2, 4)[:, ::2], np.ones(2), 1, 1.0)
    with pytest.raises(TypeError, match="not str"):
        summed("x", np.ones(2), 1, 1.0)
    with pytest.raises(TypeError, match="takes 4 arguments, not 3"):
        summed(numbers(2, 2), np.ones(2), 1)


def test_of_an_int_64_bits_are_passed(summed):
    assert summed(numbers(2, 2), np.ones(2), 2**64 - 1, 1.0) == 5


def test_what_is_written_to_must_be_writeable(summed):
    x, weights = numbers(2, 2), np.ones(2)
    x.flags.writeable = False
    assert summed(x, weights, 0, 1.0) == 6, "it is only read"
    weights = np.ones(2)
    weights.flags.writeable = False
    with pytest.raises(Exception, match="(?i)read-?only|cannot"):
        summed(x, weights, 0, 1.0)
    assert (weights == 1).all()


def test_arrays_of_other_classes_and_other_objects_of_a_dtype_will_do(summed, tmp_path):
    x = np.memmap(tmp_path / "x", np.float32, "w+", shape=(2, 2))
    x[:] = numbers(2, 2)
    assert summed(x, np.ones(2), 1, 1.0) == 7
    again = pickle.loads(pickle.dumps(np.dtype([("a", np.float32)])))["a"]
    assert summed(numbers(2, 2).view(again), np.ones(2), 1, 1.0) == 7
    if np.dtype(np.longlong) is not np.dtype(np.int64):
        long, wide = (summed(numbers(2, 2, kind), np.ones(2), 1, 1.0) for kind in (np.longlong, np.int64))
        assert long == wide == 7


RECORD = np.dtype([("a", np.int64), ("b", np.float64)], align=True)


def test_records_are_passed_too(tmp_path):
    @calls.entry(folder=lambda: tmp_path)
    def tick(records):
        for i in range(len(records)):
            records[i].a += 1
            records[i].b *= 2
        return len(records)

    records = np.ones(3, RECORD)
    assert tick(records) == 3 and (records["a"] == 2).all() and (records["b"] == 2).all()
    again = records.astype(np.dtype([("a", np.int64), ("b", np.float64)], align=True))
    assert tick(again) == 3 and len(tick._versions) == 1 and (again["a"] == 3).all()


def test_it_can_be_called_from_compiled_code(summed):
    @njit
    def twice(x, weights):
        return summed(x, weights, 1, 1.0) * 2

    assert twice(numbers(2, 2), np.ones(2)) == 14


def test_others_run_meanwhile(tmp_path):
    @calls.entry(folder=lambda: tmp_path)
    def await_change(flag):
        turns = 0
        while flag[0] == 0 and turns < 1 << 40:
            turns += 1
            if turns & 1023 == 0:
                ground.usleep(np.uint32(10))
        return flag[0]

    flag = np.zeros(1, np.int64)
    await_change.prepare(flag)
    answers: list[int] = []
    waiting = threading.Thread(target=lambda: answers.append(await_change(flag)), daemon=True)
    waiting.start()
    flag[0] = 7  # this thread would never come here if the other kept the interpreter
    waiting.join(30)
    assert answers == [7]


def test_a_version_that_is_kept_needs_no_compiler(summed, monkeypatch):
    x, weights = numbers(2, 2), np.ones(2)
    summed(x, weights, 1, 1.0)
    folder = summed._folder()
    again = calls.entry(folder=lambda: folder)(a_sum)
    monkeypatch.setattr(calls, "compiler", None)
    assert again(x, np.ones(2), 1, 1.0) == 7


LIVING = """
import sys, numpy as np, organism as o
from organs import kernels
kernels.compile_parts(kernels.PARTS)
print("loaded", "numba" in sys.modules)
with o.Organism(sys.argv[1], kernels="wait", seed=1) as life:
    print("said", bool(life.say("Hello, who are you?").text), "numba" in sys.modules)
    life.learn_now("It rains in the hills, and the river rises. " * 20)
    life.say("What do you know about the river?").text
    print("learned", "numba" in sys.modules)
tokenizer = o.Tokenizer()
tokenizer.learn([o.seed_corpus()[:20000]], 30)
learner = o.newborn_learner(o.Config(), "embryo", engine="numba", threads=2, seed=1, tokenizer=tokenizer)
print("born", "numba" in sys.modules)
"""


def test_who_finds_all_code_kept_lives_without_numba(tmp_path):
    from organs import kernels

    kernels.warm()
    done = subprocess.run([sys.executable, "-c", LIVING, str(tmp_path / "home")], cwd=ROOT, capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == "loaded False said True False learned False born False".split()
