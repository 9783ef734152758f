"""Qwen2 and Qwen2.5 (with biases of queries, keys and values), Qwen3 (with norms of queries and keys). arXiv 2407.10671, 2505.09388."""

from organs.giant.program import Recorder, rope_of


def record(r: Recorder) -> None:
    """Heads rotate by halves; biases and norms are there where the file has them."""
    rope = rope_of(r.file, r.shape, split=True)
    r.embed()
    for layer in range(r.shape.layers):
        r.attention(layer, rope)
        r.feed_forward(layer)
    r.head()
