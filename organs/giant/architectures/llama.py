"""Llama and its look-alikes (Mistral, SmolLM, SmolLM2, TinyLlama, …). arXiv 2302.13971."""

from organs.giant.program import Recorder, rope_of


def record(r: Recorder) -> None:
    """Norm, attention with rotated neighbours, norm, gated feed-forward."""
    rope = rope_of(r.file, r.shape, split=False)
    r.embed()
    for layer in range(r.shape.layers):
        r.attention(layer, rope)
        r.feed_forward(layer)
    r.head()
