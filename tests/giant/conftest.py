"""What the giant's tests share: the real model where it was pulled (`organism giant pull smollm2`), small ones elsewhere."""

from __future__ import annotations

import pytest

from organs.giant import pull

from .small import write_llama


@pytest.fixture(scope="session")
def smollm2():
    """Path of SmolLM2, or a skipped test where nobody pulled it."""
    path = pull.kept("smollm2")
    if not path.is_file():
        pytest.skip("SmolLM2 is not here: `organism giant pull smollm2` fetches it")
    return path


@pytest.fixture(scope="session")
def small_llama(tmp_path_factory):
    """Path of a llama of two layers with random weights and a byte-level tokenizer."""
    return write_llama(tmp_path_factory.mktemp("llama") / "small.gguf")
