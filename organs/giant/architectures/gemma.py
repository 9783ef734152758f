"""Gemma 2 and 3: windows of attention in most layers, norms behind as well as before, embeddings scaled. arXiv 2408.00118, 2503.19786."""

import math

from organs.giant.program import Recorder, rope_of

PERIOD = {"gemma2": 2, "gemma3": 6}  # every so-manieth layer sees everything
LOCAL_BASE = 10_000.0  # RoPE base of Gemma 3's layers with a window


def record(r: Recorder) -> None:
    """The file's norms are stored with 1 added already."""
    name, s, get = r.shape.architecture, r.shape, r.file.get
    far = rope_of(r.file, s, split=True)
    near = far
    if name == "gemma3":
        near = rope_of(r.file, s, split=True, base_key="rope.freq_base_swa", default=LOCAL_BASE, is_scaled=False)
    window = get(f"{name}.attention.sliding_window", int, 0)
    cap = get(f"{name}.attn_logit_softcapping", float, 50.0 if name == "gemma2" else 0.0)
    # The 27B models, and only they, scale by the width a head would have if heads made up the width.
    is_27b = (name, s.layers) in (("gemma2", 46), ("gemma3", 62))
    scale = get(f"{name}.attention.scale", float, 1 / math.sqrt(s.width / s.queries if is_27b else s.head))
    r.embed(factor=math.sqrt(s.width))
    for layer in range(s.layers):
        is_far = layer % PERIOD[name] == PERIOD[name] - 1
        r.attention(layer, far if is_far else near, window=0 if is_far else window, cap=cap, scale=scale)
        r.feed_forward(layer, is_gelu=True)
    r.head(cap=get(f"{name}.final_logit_softcapping", float, 30.0 if name == "gemma2" else 0.0))
