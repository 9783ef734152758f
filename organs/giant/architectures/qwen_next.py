"""Qwen3-Next and Qwen3.5: three layers of Gated DeltaNet, then one of gated attention; experts (or a plain feed-forward).

Qwen3-Next-80B-A3B and Qwen3.5, as in `transformers`; Gated Delta Networks: arXiv 2412.06464. Norms are stored with 1 added.
"""

import numpy as np

from organs.giant.gguf import GGUFError
from organs.giant.program import Recorder, rope_of


def recurrent_layers(r: Recorder) -> list[bool]:
    """Which layers are Gated DeltaNet, as the file says; else all but every fourth (`full_attention_interval`)."""
    name, layers = r.shape.architecture, r.shape.layers
    given = r.file.metadata.get(f"{name}.attention.recurrent_layers")
    if given is not None:
        if np.ndim(given) != 1 or len(given) < layers:
            raise GGUFError(f"{r.file.path}: {name}.attention.recurrent_layers does not name {layers} layers")
        return [bool(x) for x in given[:layers]]
    interval = r.file.get(f"{name}.full_attention_interval", int, 4)
    if interval < 1:
        raise GGUFError(f"{r.file.path}: {name}.full_attention_interval is {interval}")
    return [(layer + 1) % interval != 0 for layer in range(layers)]


def record(r: Recorder) -> None:
    """Qwen3.5's heads of values are sorted otherwise, and its RoPE in sections is plain RoPE for text."""
    rope = rope_of(r.file, r.shape, split=True)
    r.embed()
    for layer, is_recurrent in enumerate(recurrent_layers(r)):
        if is_recurrent:
            r.delta_net(layer, is_tiled=r.shape.architecture != "qwen3next")
        else:
            r.attention(layer, rope, is_gated=True, behind="none")
        _feed_forward(r, layer)
    r.head()
    layer = r.shape.layers
    if r.is_drafting and r.has(f"blk.{layer}.nextn.eh_proj.weight"):
        r.pair(layer)
        r.attention(layer, rope, is_gated=True, behind="none")
        _feed_forward(r, layer)
        r.head(norm=f"blk.{layer}.nextn.shared_head_norm.weight")


def _feed_forward(r: Recorder, layer: int) -> None:
    if r.has(f"blk.{layer}.ffn_gate_inp.weight"):
        r.mixture(layer, normalised=True, norm="post_attention_norm")
    else:
        r.feed_forward(layer, norm="post_attention_norm")
