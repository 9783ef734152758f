"""SmolLM3: Llama with every fourth layer unrotated (NoPE)."""

from organs.giant.program import Recorder, rope_of


def record(r: Recorder) -> None:
    """As llama.record, but layers 3, 7, 11, … see no positions."""
    rope = rope_of(r.file, r.shape, split=False)
    r.embed()
    for layer in range(r.shape.layers):
        r.attention(layer, None if layer % 4 == 3 else rope)
        r.feed_forward(layer)
    r.head()
