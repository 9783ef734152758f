"""What bytes of a format mean, against the `gguf` package.

Run alone: pytest -n 0 tests/giant/test_formats.py
"""

from __future__ import annotations

import numpy as np
import pytest

from organs.giant.formats import FORMATS, dequantise

gguf = pytest.importorskip("gguf")


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_mean_what_the_gguf_package_says(name):
    form = FORMATS[name]
    kind = gguf.GGMLQuantizationType[name]
    assert kind.value == form.number and gguf.GGML_QUANT_SIZES[kind] == (form.block, form.nbytes)
    data = np.random.default_rng(form.number).integers(0, 256, (64, form.nbytes), np.uint8)
    with np.errstate(all="ignore"):
        want = gguf.quants.dequantize(data, kind)
        got = dequantise(data.reshape(-1), name).reshape(want.shape)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=0, equal_nan=True)


def test_parts_of_a_block_are_refused():
    with pytest.raises(ValueError, match="no whole blocks"):
        dequantise(np.zeros(19, np.uint8), "Q4_0")
