"""Mixtral: Llama with experts in place of the feed-forward; files of it name themselves llama. arXiv 2401.04088."""

from organs.giant.program import Recorder, rope_of


def record(r: Recorder) -> None:
    """Weights of the chosen experts sum to 1."""
    rope = rope_of(r.file, r.shape, split=False)
    r.embed()
    for layer in range(r.shape.layers):
        r.attention(layer, rope)
        r.mixture(layer, normalised=True)
    r.head()
