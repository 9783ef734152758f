"""Compiled products of quantised matrices, against dequantise-then-multiply in float64; on every path.

Run alone: pytest -n 0 tests/giant/test_products.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from organs.giant import lanes, products
from organs.giant.formats import FORMATS, dequantise

# Where the float16 scales of a block stand: random bits there would be infinities.
SCALES = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "IQ4_NL": [0], "Q2_K": [80, 82], "Q3_K": [108],
    "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_XS": [0],
}  # fmt: skip
ERROR = {
    "plain": 2e-6,
    "wide": 6e-5,
    "double": 6e-5,
    "narrow": 1.5e-2,
}  # of the result, relative to its root mean square


def random_matrix(name: str, rows: int, columns: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(bytes as in a file, float64 [rows, columns] that they mean)."""
    rng, form = np.random.default_rng(seed), FORMATS[name]
    raw = rng.integers(0, 256, (rows * columns // form.block, form.nbytes), np.uint8)
    for at in SCALES.get(name, []):
        raw[:, at : at + 2] = rng.uniform(1e-6, 0.01, len(raw)).astype(np.float16).view(np.uint8).reshape(-1, 2)
    if name == "MXFP4":
        raw[:, 0] = rng.integers(110, 130, len(raw))
    if name in products.PLAIN:
        numbers = rng.standard_normal(rows * columns).astype(np.float32)
        kinds = {
            "F32": numbers,
            "F16": numbers.astype(np.float16),
            "BF16": (numbers.view(np.uint32) >> 16).astype(np.uint16),
        }
        raw = kinds[name].view(np.uint8).reshape(-1, form.nbytes)
    return raw.reshape(-1), dequantise(raw.reshape(-1), name).reshape(rows, columns).astype(np.float64)


def packed(name: str, rows: int, columns: int, raw: np.ndarray) -> np.ndarray:
    panels = products.aligned(-(-rows // products.ROWS) * products.panel_bytes(name, columns))
    products.pack(raw, name, rows, columns, panels)
    return panels


def forms_of(name: str) -> list[str]:
    return sorted({products.form_of(name, fast) for fast in (False, True)})


@pytest.mark.parametrize("name", FORMATS)
def test_a_packed_matrix_means_what_its_bytes_mean(name):
    rows, columns = 21, 2 * max(FORMATS[name].block, 32)
    raw, meaning = random_matrix(name, rows, columns)
    got = products.read_rows(packed(name, rows, columns, raw), name, rows, columns)
    np.testing.assert_allclose(got, meaning, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("name", FORMATS)
def test_products_equal_dequantise_then_multiply(name):
    rows, columns = 21, 3 * max(FORMATS[name].block, 32)
    raw, meaning = random_matrix(name, rows, columns)
    panels, x = (
        packed(name, rows, columns, raw),
        np.random.default_rng(1).standard_normal((5, columns)).astype(np.float32),
    )
    want = x.astype(np.float64) @ meaning.T
    for form in forms_of(name):
        for T in (1, products.TILE):
            got = products.multiply(panels, name, rows, x, form, T)
            error = np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2))
            assert error < ERROR[form], (
                f"{name}, {form} activations, tiles of {T} on the path {lanes.PATH}: {error:.1e}"
            )


@pytest.mark.parametrize("name", ["Q8_0", "Q4_1", "Q6_K", "IQ4_NL"])
def test_the_largest_codes_do_not_overflow(name):
    """Every code and every activation at its peak: where sums of 16 bits would saturate first."""
    form, columns = FORMATS[name], 256
    raw = np.full((16 * columns // form.block, form.nbytes), 255, np.uint8)
    if name == "Q8_0":
        raw[:] = 128  # -128, which ggml's quantiser never writes
    for at in SCALES[name]:
        raw[:, at : at + 2] = np.array([0.5], np.float16).view(np.uint8)
    meaning = dequantise(raw.reshape(-1), name).reshape(16, columns).astype(np.float64)
    panels = packed(name, 16, columns, raw.reshape(-1))
    for sign in (1, -1):
        x = np.full((1, columns), sign * 3.0, np.float32)
        for kind in forms_of(name):
            got = products.multiply(panels, name, 16, x, kind, products.TILE)
            np.testing.assert_allclose(got, x @ meaning.T, rtol=1e-4)


def test_columns_of_a_plain_matrix_need_not_fill_a_block():
    raw, meaning = random_matrix("F16", 10, 40)
    x = np.random.default_rng(1).standard_normal((3, 40)).astype(np.float32)
    got = products.multiply(packed("F16", 10, 40, raw), "F16", 10, x, "plain", 1)
    np.testing.assert_allclose(got, x @ meaning.T, rtol=1e-4, atol=1e-5)


def test_activations_of_zero_and_of_any_size_are_quantised():
    raw, meaning = random_matrix("Q4_1", 16, 64)
    panels = packed("Q4_1", 16, 64, raw)
    for scale in (0.0, 1e-20, 1e15):
        x = np.linspace(-1, 1, 64, dtype=np.float32)[None] * np.float32(scale)
        got = products.multiply(panels, "Q4_1", 16, x, products.form_of("Q4_1", False), 1)
        np.testing.assert_allclose(got, x @ meaning.T, rtol=1e-3, atol=abs(scale) * 1e-4)


def on_path(path: str, code: str) -> subprocess.CompletedProcess:
    environment = dict(os.environ, ORGANISM_KERNELS=path, PYTHONPATH=str(Path(__file__).parents[2]))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("path", ["portable", "avx2"])
def test_forced_paths_say_the_same(path):
    """These very tests, of one format of each kind, in a process that is forced onto the path."""
    names = ("Q4_1", "Q8_0", "F16", "IQ4_NL") + (("Q6_K",) if path == "avx2" else ("Q4_K",))
    code = (
        "from organs.giant import lanes\n"
        "from tests.giant import test_products as t\n"
        f"assert lanes.PATH in ('portable', {path!r}), lanes.PATH\n"
        f"for name in {names}:\n"
        "    t.test_a_packed_matrix_means_what_its_bytes_mean(name)\n"
        "    t.test_products_equal_dequantise_then_multiply(name)\n"
    )
    result = on_path(path, code)
    assert result.returncode == 0, result.stderr[-2000:]


def test_code_for_vnni_contains_its_instructions():
    """This machine may lack AVX-512: then at least what is compiled for it is looked at."""
    code = (
        "from organs.giant import lanes\n"
        "lanes.PATH, lanes.LANES, lanes.HALVES = 'vnni', 16, True\n"
        "from organs.giant import products\n"
        "from llvmlite import binding, ir\n"
        "module = ir.Module(); kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * 6)\n"
        "for name, form in (('Q4_1', 'narrow'), ('Q8_0', 'double'), ('Q6_K', 'wide'), ('IQ4_NL', 'narrow')):\n"
        "    f = ir.Function(module, kind, f'{name}_{form}'); b = ir.IRBuilder(f.append_basic_block())\n"
        "    products._Tile(name, form, 16)(b, *f.args); b.ret_void()\n"
        "binding.initialize_native_target(); binding.initialize_native_asmprinter()\n"
        "target = binding.Target.from_triple('x86_64-unknown-linux-gnu').create_target_machine(cpu='icelake-server', opt=2)\n"
        "parsed = binding.parse_assembly(str(module)); parsed.verify()\n"
        "assembly = target.emit_assembly(parsed)\n"
        "assert 'vpdpbusd' in assembly and 'vpdpwssd' in assembly and 'zmm' in assembly\n"
    )
    if not lanes.ground.X86:
        pytest.skip("no x86")
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
