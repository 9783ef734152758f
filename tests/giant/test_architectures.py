"""Every architecture against `transformers`: small random models, written as GGUF, compared in float32.

Run alone: pytest -n 0 tests/giant/test_architectures.py
"""

from __future__ import annotations

import os

import numpy as np
import pytest

from organs.giant import GGUFError, Giant
from organs.giant.program import rope_of

os.environ.setdefault("HF_HUB_OFFLINE", "1")
gguf = pytest.importorskip("gguf")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

NAMES = {  # of transformers: of GGUF
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
PLAIN_NORMS = {"post_attention_layernorm": "ffn_norm"}
GEMMA_NORMS = {
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip
SIZES = dict(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256, head_dim=16, rms_norm_eps=1e-5,
             initializer_range=0.4, attention_dropout=0.0)  # fmt: skip


def neighbours(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows in the order in which llama.cpp keeps heads whose neighbours rotate together."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write(path, architecture: str, model, **metadata):
    """Write a model of transformers as GGUF, in float32."""
    c, is_gemma = model.config, architecture.startswith("gemma")
    writer = gguf.GGUFWriter(path, architecture)
    facts = dict(block_count=c.num_hidden_layers, context_length=c.max_position_embeddings, embedding_length=c.hidden_size,
                 feed_forward_length=c.intermediate_size)  # fmt: skip
    facts |= {"attention.head_count": c.num_attention_heads, "attention.head_count_kv": c.num_key_value_heads,
              "attention.key_length": c.head_dim, "attention.value_length": c.head_dim,
              "rope.dimension_count": c.head_dim}  # fmt: skip
    for key, value in (facts | {"attention.layer_norm_rms_epsilon": c.rms_norm_eps} | metadata).items():
        kind = {int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32, str: gguf.GGUFValueType.STRING}
        if not isinstance(value, np.ndarray):
            writer.add_key_value(f"{architecture}.{key}", value, kind[type(value)])
    for key, tensor in model.state_dict().items():
        name, array = key.removeprefix("model."), tensor.float().numpy()
        part, _, last = name.rpartition(".")
        if name == "embed_tokens.weight":
            new = "token_embd.weight"
        elif name == "lm_head.weight":
            if c.tie_word_embeddings:
                continue
            new = "output.weight"
        elif name == "norm.weight":
            new = "output_norm.weight"
        else:
            _, layer, inner = part.split(".", 2)
            new = f"blk.{layer}.{(NAMES | (GEMMA_NORMS if is_gemma else PLAIN_NORMS))[inner]}.{last}"
        if is_gemma and new.endswith("norm.weight"):
            array = array + 1
        if architecture in ("llama", "smollm3") and (".attn_q.weight" in new or ".attn_k.weight" in new):
            array = neighbours(array, c.num_attention_heads if "attn_q" in new else c.num_key_value_heads)
        writer.add_tensor(new, np.ascontiguousarray(array))
    for key, value in metadata.items():
        if isinstance(value, np.ndarray):
            writer.add_tensor(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def make(kind: str, **more):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**(SIZES | more))
    name = "Gemma3ForCausalLM" if kind == "Gemma3Text" else f"{kind}ForCausalLM"
    model = getattr(transformers, name)._from_config(config, attn_implementation="eager").eval().float()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.add_(torch.rand_like(parameter) - 0.5)
            elif key.endswith("bias"):
                parameter.normal_()
    return model


def llama3_factors() -> np.ndarray:
    """What llama.cpp's converter stores for rope_type llama3: by how much each pair turns slower."""
    factor, low, high, original = 8.0, 1.0, 4.0, 64
    frequencies = 10000.0 ** (-np.arange(0, 16, 2) / 16)
    length = 2 * np.pi / frequencies
    smooth = (original / length - low) / (high - low)
    mixed = 1 / ((1 - smooth) / factor + smooth)
    return np.where(length < original / high, 1, np.where(length > original / low, factor, mixed)).astype(np.float32)


def rope(kind: str, **more) -> dict:
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=10000.0, **more))


YARN = dict(factor=4.0, original_max_position_embeddings=64)
LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
YARN_KEYS = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64}
CASES = {
    "llama": ("llama", "Llama", {}, {}),
    "llama, tied, one key a query": ("llama", "Llama", dict(num_key_value_heads=4, tie_word_embeddings=True), {}),
    "llama, linear": ("llama", "Llama", rope("linear", factor=4.0), {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
    "llama, yarn": ("llama", "Llama", rope("yarn", **YARN), YARN_KEYS),
    "llama, llama3": ("llama", "Llama", rope("llama3", **LLAMA3), {"rope_freqs.weight": llama3_factors()}),
    "mistral": ("llama", "Mistral", dict(sliding_window=None), {}),
    "smollm3": ("smollm3", "SmolLM3", dict(num_hidden_layers=5, no_rope_layer_interval=4, pad_token_id=0) | rope("default"), {}),
    "qwen2": ("qwen2", "Qwen2", dict(use_sliding_window=False), {}),
    "qwen3": ("qwen3", "Qwen3", dict(head_dim=32), {}),
    "gemma2": ("gemma2", "Gemma2", dict(query_pre_attn_scalar=16, sliding_window=24, hidden_activation="gelu_pytorch_tanh"),
               {"attention.sliding_window": 24, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}),
    "gemma3": ("gemma3", "Gemma3Text", dict(num_hidden_layers=7, query_pre_attn_scalar=16, sliding_window=24),
               {"attention.sliding_window": 24, "rope.freq_base": 1e6}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers(case, tmp_path):
    architecture, kind, more, metadata = CASES[case]
    model = make(kind, **more)
    path = write(tmp_path / "model.gguf", architecture, model, **metadata)
    tokens = np.random.default_rng(0).integers(0, 96, 120)
    with torch.no_grad():
        want = model(torch.tensor(tokens)[None]).logits[0].float().numpy()
    giant = Giant.load(path, kv_cache="f32", threads=1, exact=True)
    together = giant.logits(tokens)
    session = giant.session()
    apart = np.stack([session.feed([int(token)]) for token in tokens])
    giant.close()
    scale = max(1.0, float(np.abs(want).max()) / 10)
    assert np.abs(together - want).max() < 1e-3 * scale
    assert np.abs(apart - want).max() < 1e-3 * scale


def test_an_unknown_architecture_is_named_with_what_is_supported(tmp_path):
    path = write(tmp_path / "model.gguf", "rwkv7", make("Llama"))
    with pytest.raises(GGUFError, match=r"'rwkv7' is not supported; supported are llama"):
        Giant.load(path)


def test_ntk_scaling_is_the_dynamic_one_at_the_length_for_which_it_is_made(tmp_path):
    """Dynamic NTK of factor 3 raises the base for twice the context as NTK of factor 3 · 2 - (3 - 1) = 4 always does."""
    config = transformers.LlamaConfig(**SIZES, **rope("dynamic", factor=3.0))
    dynamic = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["dynamic"]
    want, _ = dynamic(config, "cpu", seq_len=2 * SIZES["max_position_embeddings"])
    metadata = {"rope.scaling.type": "ntk", "rope.scaling.factor": 4.0}
    giant = Giant.load(write(tmp_path / "model.gguf", "llama", make("Llama"), **metadata))
    got = rope_of(giant.file, giant.shape, split=False).frequencies
    giant.close()
    assert np.allclose(got, want.numpy(), rtol=1e-6)


def test_an_unknown_rope_scaling_is_named(tmp_path):
    path = write(tmp_path / "model.gguf", "llama", make("Llama"), **{"rope.scaling.type": "longrope"})
    with pytest.raises(GGUFError, match="'longrope' is not supported"):
        Giant.load(path)
