"""gpt-oss: experts in MXFP4 with biases and a clamped activation, attention with sinks and, in every other layer, a window.

arXiv 2508.10925; where llama.cpp rounds YaRN's ramp to whole pairs, the model itself (and this file) does not.
"""

from organs.giant import experts
from organs.giant.program import Recorder, rope_of


def record(r: Recorder) -> None:
    """Even layers see `attention.sliding_window` tokens, odd ones all."""
    window = r.file.get(f"{r.shape.architecture}.attention.sliding_window", int, 0)
    is_rounded = r.file.get(f"{r.shape.architecture}.rope.scaling.yarn_truncate", bool, False)
    rope = rope_of(r.file, r.shape, split=True, is_rounded=is_rounded)
    r.embed()
    for layer in range(r.shape.layers):
        r.attention(layer, rope, window=window if layer % 2 == 0 else 0, behind="none")
        r.mixture(layer, normalised=True, gating=experts.CHOSEN, activation=experts.CLAMPED,
                             norm="post_attention_norm")  # fmt: skip
    r.head()
