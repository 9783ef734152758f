"""The compiled twins: equal to the reference over shapes, on every path, whatever the machine lacks.

pytest tests/test_kernels.py
"""

import dataclasses
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llvmlite.binding import Linkage
from numba import njit

import organism as o
from organs.kernels import cache, executor, ground

ROOT = Path(o.__file__).resolve().parent


# --- Functions that vectorise: their stated errors. ---


@njit
def _exp_all(x, out):
    for i in range(len(x)):
        out[i] = ground.exp(x[i])


@njit
def _log_all(x, out):
    for i in range(len(x)):
        out[i] = ground.log(x[i])


@njit
def _half_all(bits, out):
    for i in range(len(bits)):
        out[i] = ground.half(bits[i])


def test_exp_keeps_its_stated_error():
    x = np.linspace(-86, 87, 200_001).astype(np.float32)
    out = np.zeros_like(x)
    _exp_all(x, out)
    true = np.exp(x.astype(np.float64))
    assert np.abs(out / true - 1).max() < 1e-5
    far = np.zeros(1, np.float32)
    _exp_all(np.array([-1e30], np.float32), far)
    assert far[0] == 0


def test_log_keeps_its_stated_error():
    x = np.exp(np.random.default_rng(0).uniform(-80, 80, 200_000)).astype(np.float32)
    out = np.zeros_like(x)
    _log_all(x, out)
    true = np.log(x.astype(np.float64))
    assert (np.abs(out - true) <= 1e-6 + 2e-7 * np.abs(true)).all()


def test_every_half_is_read_as_numpy_reads_it():
    bits = np.arange(65536, dtype=np.uint16)
    true = bits.view(np.float16).astype(np.float32)
    out = np.zeros(65536, np.float32)
    _half_all(bits, out)
    finite = np.isfinite(true)
    assert np.array_equal(out[finite], true[finite])


# --- The whole program over shapes that fit no vector. ---


def some_text(size: int) -> tuple[o.Tokenizer, np.ndarray, o.FieldView]:
    text = o.seed_corpus()[: 6 * size]
    tokenizer = o.Tokenizer()
    tokenizer.learn([text], 40)
    tokens = tokenizer.encode(text).astype(np.int64)[:size]
    field = o.Field(tokenizer.vocabulary, o.FieldConfig(table_mb=1, view_width=24), engine="numba")
    return tokenizer, tokens, field.read(tokens, views=True)[1]


TOKENIZER, TOKENS, VIEW = some_text(600)


def odd_body(width, layers, heads, size, hybrid, pure, context, on_field, seed=0) -> o.Body:
    body = o.Body("embryo", len(TOKENIZER), dataclasses.replace(o.BodyConfig(), field=on_field), seed)
    body.shape = o.BodyShape(
        width, layers, heads, size, hybrid, pure, context, len(TOKENIZER), on_field, ("attention",) * layers
    )
    body.arena = o.Arena(body.shape.layout())
    body._initialise(np.random.default_rng(seed))
    rng = np.random.default_rng(seed + 1)
    for name in ("head", "gain"):  # zero at birth, where half of the gradients would be zero too
        if on_field:
            body.arena[name][:] += 0.1 * rng.standard_normal(body.arena[name].shape).astype(np.float32)
    body.arena.average[:] = body.arena.parameters
    return body


def a_batch(sequences, length, seed=0):
    ends = np.random.default_rng(seed).integers(length + 1, len(TOKENS), sequences)
    at = ends[:, None] - length + np.arange(length)
    return np.ascontiguousarray(TOKENS[at - 1]), np.ascontiguousarray(TOKENS[at]), VIEW.take(at.ravel())


shapes = st.tuples(
    st.sampled_from([3, 7, 16, 20, 33]), st.integers(1, 2), st.integers(1, 3), st.sampled_from([2, 6, 16, 18]),
    st.integers(0, 2), st.integers(0, 1), st.sampled_from([8, 31, 50]), st.booleans(),
)  # fmt: skip


@given(shape=shapes, sequences=st.integers(1, 6), cut=st.integers(0, 6), threads=st.integers(1, 5))
@settings(max_examples=25)
def test_gradients_are_the_references_for_any_shape(shape, sequences, cut, threads):
    width, layers, heads, size, hybrid, pure, context, on_field = shape
    hybrid, pure = min(hybrid, heads), min(pure, heads - min(hybrid, heads))
    body = odd_body(width, layers, heads, size, hybrid, pure, context, on_field)
    x, y, view = a_batch(sequences, context - cut)
    view = view if on_field else None
    x[:, ::5] = -1
    reference = o._ReferenceGradients(body, o.LearningConfig())
    loss = reference.of(x, y, view)
    gradients = executor.Gradients(body, o.LearningConfig(), threads)
    mine, flat = gradients.of(x, y, view)
    gradients.close()
    assert mine == pytest.approx(loss, rel=2e-6)
    least = 1e-3 * np.abs(reference.flat).max()  # an alpha's gradient is a difference of large sums, maybe nearly 0
    for name, place in body.arena.places.items():
        true, got = place.of(reference.flat), place.of(flat)
        worst = np.abs(true - got).max() / max(np.abs(true).max(), least)
        assert worst < 1e-4, f"{name}: {worst:.1e} of {np.abs(true).max():.1e}"
    measured = body.log_probs(np.maximum(x, 0), y, view, compiled=True)
    assert np.abs(measured - body.log_probs(np.maximum(x, 0), y, view, compiled=False)).max() < 2e-4


def test_a_team_that_shares_its_work_finds_the_same_gradients():
    body = odd_body(16, 1, 2, 16, 1, 0, 32, True)
    x, y, view = a_batch(13, 32)
    results = []
    for shared in (False, True):
        gradients = executor.Gradients(body, o.LearningConfig(), 3, shared=shared)
        results.append(gradients.of(x, y, view)[1])
        gradients.close()
    assert np.abs(results[0] - results[1]).max() < 1e-5


def test_helpers_that_fell_asleep_are_woken():
    body = odd_body(16, 1, 1, 16, 0, 0, 16, False)
    gradients, (x, y, _) = executor.Gradients(body, o.LearningConfig(), 2), a_batch(8, 16)
    losses = []
    for n in range(6):
        losses.append(gradients.step(x, y, None, 1e-3, n + 1))
        o.time.sleep(0.02)  # ten times as long as a helper waits for work
    gradients.close()
    assert losses[-1] < losses[0] and np.isfinite(losses).all()


def test_a_text_known_by_heart_leaves_no_denormals():
    body = odd_body(16, 1, 1, 16, 0, 0, 16, False)
    gradients, (x, _, _) = (
        executor.Gradients(body, dataclasses.replace(o.LearningConfig(), weight_decay=0.0), 1),
        a_batch(4, 16),
    )
    for n in range(300):
        gradients.step(x, x, None, 1e-2, n + 1)
    gradients.close()
    moments = np.abs(np.concatenate([body.arena.moment1, body.arena.moment2]))
    assert not ((moments > 0) & (moments < np.finfo(np.float32).tiny)).any()


# --- Paths: forced, and equal. ---

PROBE = """
import sys; sys.path[:0] = ["tests", "."]
import numpy as np, organism as o, test_kernels as t
from organs.kernels import executor, ground
body = t.odd_body(20, 2, 2, 6, 1, 0, 31, True)
x, y, view = t.a_batch(5, 31)
loss, flat = executor.Gradients(body, o.LearningConfig(), 2).of(x, y, view)
reference = o._ReferenceGradients(body, o.LearningConfig())
true = reference.of(x, y, view)
worst = np.abs(flat - reference.flat).max() / np.abs(reference.flat).max()
decoders = o.Decoder(body, "numpy"), o.Decoder(body, "numba")
far = max(np.abs(np.subtract(*(d.feed(int(t.TOKENS[i]), t.VIEW[i + 1]) for d in decoders))).max() for i in range(70))
slow = o.ReferenceField(t.TOKENIZER.vocabulary, o.FieldConfig(table_mb=1))
fast = o.Field(t.TOKENIZER.vocabulary, o.FieldConfig(table_mb=1), engine="numba")
costs = [f.read(t.TOKENS[:60])[0] for f in (slow, fast)]
text = o.seed_corpus()[:9000] + bytes(range(256)) * 8
same = np.array_equal(t.TOKENIZER.encode(text), t.TOKENIZER._encode(text))
print(f"{abs(loss - true):.9f} {worst:.9f} {far:.9f} {np.abs(costs[0] - costs[1]).max():.9f} {same} {ground.BLAS}")
"""


@pytest.mark.parametrize("path, blas", [("avx2", ""), ("portable", "own")])
def test_a_forced_path_computes_the_same(path, blas, tmp_path):
    if path == "avx2" and "avx2" not in cache.cpu():
        pytest.skip("this CPU has no AVX2: the path cannot run here")
    environment = dict(os.environ, ORGANISM_KERNELS=path, ORGANISM_BLAS=blas)
    done = subprocess.run([sys.executable, "-c", PROBE], cwd=ROOT, env=environment, capture_output=True, text=True,
                          timeout=400, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    loss, gradient, decoder, field, same, product = done.stdout.strip().split(" ", 5)
    assert (
        float(loss) < 1e-5
        and float(gradient) < 1e-4
        and float(decoder) < 1e-4
        and float(field) < 0.05
        and same == "True"
    )
    assert ("our own" in product) == (blas == "own")


@njit("int64(int64)")
def _fibonacci(n):  # calls itself, hence is never inlined
    return n if n < 2 else _fibonacci(n - 1) + _fibonacci(n - 2)


def test_each_compiled_function_has_its_own_copy_of_its_helpers():
    """Else the copy that a process loaded first serves all, and its last bits depend on what was compiled before."""

    @njit("int64(int64)")
    def twice(n):
        return 2 * _fibonacci(n)

    assert twice(10) == 110
    (compiled,) = twice.overloads.values()
    (helper,) = [f for f in compiled.library._final_module.functions if "_fibonacci" in f.name]
    assert helper.linkage == Linkage.internal


def test_the_cache_is_private_and_named_by_what_decides_the_code(monkeypatch, tmp_path):
    code = (
        "from organs.kernels import cache; import os; print(cache.folder(), oct(cache.folder().stat().st_mode & 0o777))"
    )

    def folder(**more):
        environment = dict(os.environ, ORGANISM_CACHE=str(tmp_path / "cache"), **more)
        shown = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        return shown.stdout.split()

    native, portable = folder(), folder(ORGANISM_KERNELS="portable")
    assert native[1] == portable[1] == "0o700" and native[0] != portable[0]
    assert native == folder()


def test_one_at_a_time_fills_the_cache():
    entered = threading.Event()

    def another() -> None:
        with cache.alone():
            entered.set()

    thread = threading.Thread(target=another)
    with cache.alone():
        thread.start()
        assert not entered.wait(0.2)
    assert entered.wait(10)
    thread.join()


def test_a_cache_that_cannot_be_written_is_replaced_by_one_for_this_process(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    code = "from organs.kernels import cache; print(cache.folder()); print(cache.describe()); print(cache.environment()[cache.GIVEN])"
    environment = dict(os.environ, ORGANISM_CACHE=str(tmp_path / "file" / "cache"))
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    folder, described, given = shown.stdout.splitlines()
    assert "organism-kernels-" in folder and given == folder and "cannot be written" in described
    assert not Path(folder).exists(), "it goes with the process"
