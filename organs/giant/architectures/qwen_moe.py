"""Qwen2 and Qwen3 with experts, and OLMoE, which has the same layers (norms of queries and keys over all heads together).

Qwen1.5-MoE and Qwen2 (arXiv 2407.10671), Qwen3 (2505.09388), OLMoE (2409.02060).
"""

from organs.giant.program import Recorder, rope_of


def record(r: Recorder) -> None:
    """Heads rotate by halves; Qwen2 has a shared expert; layers without a router have a plain feed-forward."""
    name = r.shape.architecture
    rope = rope_of(r.file, r.shape, split=True)
    clamp = r.file.get(f"{name}.attention.clamp_kqv", float, 0.0)
    r.embed()
    for layer in range(r.shape.layers):
        r.attention(layer, rope, clamp=clamp)
        if r.has(f"blk.{layer}.ffn_gate_inp.weight"):
            r.mixture(layer, normalised=name == "qwen3moe")
        else:
            r.feed_forward(layer)
    r.head()
