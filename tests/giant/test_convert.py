"""Converting: Hugging Face folders of every architecture against transformers, quantisers against the numbers they stand for.

Run alone: pytest -n 0 tests/giant/test_convert.py
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from organism import OrganismError, UsageError
from organs.giant import Giant, open_gguf
from organs.giant.convert import TYPES, Tensor, convert, format_of
from organs.giant.formats import FORMATS, dequantise
from organs.giant.quantise import KERNELS, SIMPLE, quantise
from organs.giant.tokenizer import Tokenizer

from .small import CHATML, SPECIALS, trained

SIZE = 640


def save_tokenizer(folder: Path, pre: dict | None = None) -> None:
    """A byte-level tokenizer.json with ChatML's control tokens, and its settings."""
    tokens, merges = trained()
    split = pre or {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    plain = dict(special=True, single_word=False, lstrip=False, rstrip=False, normalized=False)
    added = [{"id": n, "content": text, **plain} for n, text in enumerate(SPECIALS)]
    model = {"type": "BPE", "vocab": {t: n for n, t in enumerate(tokens)}, "merges": merges}
    data = {"version": "1.0", "model": model, "added_tokens": added, "pre_tokenizer": split}
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    settings = {
        "bos_token": SPECIALS[0],
        "eos_token": {"content": SPECIALS[2]},
        "chat_template": CHATML,
        "add_bos_token": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


# --- Whole models. ---

COMMON = dict(vocab_size=SIZE, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
              num_key_value_heads=2, max_position_embeddings=128)  # fmt: skip
LLAMA3_ROPE = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=64, rope_theta=10000.0)  # fmt: skip
MODELS = {
    "llama": ("Llama", COMMON),
    "llama-tied": ("Llama", COMMON | dict(tie_word_embeddings=True)),
    "llama-3.1": ("Llama", COMMON | dict(rope_parameters=LLAMA3_ROPE)),
    "mistral": ("Mistral", COMMON | dict(sliding_window=None, head_dim=32)),
    "smollm3": ("SmolLM3", COMMON | dict(num_hidden_layers=4, no_rope_layer_interval=4, pad_token_id=0)),
    "qwen2": ("Qwen2", COMMON),
    "qwen3": ("Qwen3", COMMON | dict(head_dim=32)),
    "gemma3": ("Gemma3", COMMON | dict(head_dim=32, num_hidden_layers=7, sliding_window=8, query_pre_attn_scalar=24)),
}  # fmt: skip


def save_model(folder: Path, name: str):
    """A small random model of this kind, saved as Hugging Face does; returns transformers' model."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    kind, settings = MODELS[name]
    torch.manual_seed(3)
    kind = "Gemma3Text" if kind == "Gemma3" else kind
    config = getattr(transformers, f"{kind}Config")(**settings)
    model = getattr(transformers, f"{kind.replace('Text', '')}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key or "bias" in key:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.mul_(4)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_a_converted_model_computes_what_transformers_computes(name, tmp_path):
    model = save_model(tmp_path, name)
    import torch

    convert(tmp_path, tmp_path / "model.gguf", "f32")
    tokens = np.random.default_rng(5).integers(0, SIZE, 40).tolist()
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    giant = Giant.load(tmp_path / "model.gguf", kv_cache="f32", exact=True)
    try:
        assert np.abs(giant.logits(tokens) - expected).max() <= 1e-3 * max(1.0, np.abs(expected).max())
    finally:
        giant.close()


def test_text_goes_through_a_converted_model_as_through_its_tokenizer_json(tmp_path):
    from tokenizers import Tokenizer as Library

    save_tokenizer(tmp_path)
    config = COMMON | dict(architectures=["LlamaForCausalLM"], rms_norm_eps=1e-5)
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    from organs.giant.convert import _tokenizer

    tokenizer = Tokenizer(_tokenizer(tmp_path, config))
    library = Library.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("def f(x):\n    return x", "it's 1234 <|im_start|> é", "  "):
        assert tokenizer.tokenize(text, special=True) == library.encode(text).ids
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pre) == (0, 2, "gpt-2")


# --- Quantisers. ---


def rows(columns: int = 512) -> np.ndarray:
    rng = np.random.default_rng(11)
    return np.concatenate([
        rng.standard_normal((4, columns)), rng.standard_t(3, (4, columns)), 1 + np.abs(rng.standard_normal((2, columns))),
        -np.abs(rng.standard_normal((2, columns))), np.zeros((1, columns)), 1e-6 * rng.standard_normal((1, columns)),
    ]).astype(np.float32)  # fmt: skip


# Root mean squared error over root mean square for normal numbers, a hair above what llama.cpp's quantisers reach.
ERRORS = {"F32": 0, "F16": 3e-4, "BF16": 2.5e-3, "Q8_0": 0.0056, "Q6_K": 0.0181, "Q5_K": 0.037, "Q5_1": 0.04, "Q5_0": 0.045,
          "Q4_K": 0.073, "Q4_1": 0.083, "Q4_0": 0.093, "Q3_K": 0.155, "Q2_K": 0.295}  # fmt: skip


@pytest.mark.parametrize("form", [*SIMPLE, *KERNELS])
def test_quantised_numbers_are_near_what_they_stand_for(form):
    x = rows()
    back = dequantise(quantise(x, form).reshape(-1), form).reshape(x.shape)
    normal = np.random.default_rng(0).standard_normal((32, 1024)).astype(np.float32)
    error = dequantise(quantise(normal, form).reshape(-1), form).reshape(normal.shape) - normal
    assert np.sqrt((error**2).mean()) <= ERRORS[form] * np.sqrt((normal**2).mean())
    assert np.isfinite(back).all() and not back[-2].any()
    size = np.sqrt((x**2).mean(1))
    assert (np.sqrt(((back - x) ** 2).mean(1))[:-1] <= 3 * ERRORS[form] * size[:-1] + 1e-7).all()


@pytest.mark.parametrize("form", [f for f in SIMPLE if f not in ("F32",)])
def test_the_simple_formats_are_the_gguf_packages(form):
    import gguf

    x = rows()
    expected = gguf.quants.quantize(x, gguf.GGMLQuantizationType[form]).view(np.uint8).reshape(len(x), -1)
    assert np.array_equal(quantise(x, form), expected)


def test_quantising_again_what_was_quantised_loses_little():
    x = rows()
    for form in KERNELS:
        once = dequantise(quantise(x, form).reshape(-1), form).reshape(x.shape)
        twice = dequantise(quantise(once, form).reshape(-1), form).reshape(x.shape)
        assert np.sqrt(((twice - once) ** 2).mean()) < 0.35 * np.sqrt(((once - x) ** 2).mean()) + 1e-7, form


# --- From one GGUF to another. ---


@pytest.mark.parametrize("type", TYPES)
def test_every_type_is_written_and_read_again(small_llama, tmp_path, type):
    facts = convert(small_llama, tmp_path / "out.gguf", type)
    with open_gguf(small_llama) as before, open_gguf(tmp_path / "out.gguf") as after:
        assert set(before.tensors) == set(after.tensors)
        assert after.metadata["general.file_type"] == TYPES[type][2]
        assert Tokenizer(after.metadata).tokenize("def f(x)") == Tokenizer(before.metadata).tokenize("def f(x)")
        for name in ("blk.0.attn_q.weight", "blk.1.ffn_down.weight", "token_embd.weight", "output_norm.weight"):
            a, b = before.array(name), after.array(name)
            assert np.sqrt(((a - b) ** 2).mean()) <= 0.35 * np.sqrt((a**2).mean())
        assert facts["tensors"] == len(after.tensors) and facts["bytes"] == after.nbytes


def test_a_quantised_model_still_speaks(small_llama, tmp_path):
    convert(small_llama, tmp_path / "out.gguf", "q8_0")
    a, b = Giant.load(small_llama), Giant.load(tmp_path / "out.gguf")
    x, y = a.logits([5, 6, 7]), b.logits([5, 6, 7])
    assert np.corrcoef(x[-1], y[-1])[0, 1] > 0.99
    a.close()
    b.close()


def test_tensors_that_keep_their_format_keep_their_bytes(small_llama, tmp_path):
    convert(small_llama, tmp_path / "a.gguf", "q4_0")
    convert(tmp_path / "a.gguf", tmp_path / "b.gguf", "q4_0")
    with open_gguf(tmp_path / "a.gguf") as a, open_gguf(tmp_path / "b.gguf") as b:
        assert all(np.array_equal(a.data(name), b.data(name)) for name in a.tensors)


def test_mixtures_give_more_bits_where_errors_hurt():
    def form(name: str, shape=(256, 256), type="q4_k_m", layers=8, has_output=False) -> str:
        return format_of(Tensor(name, shape, np.empty), type, layers, has_output)

    assert form("token_embd.weight") == "Q6_K" and form("token_embd.weight", has_output=True) == "Q4_K"
    assert [form(f"blk.{n}.ffn_down.weight") for n in range(8)].count("Q6_K") == 4
    assert form("blk.3.attn_q.weight") == "Q4_K" and form("blk.3.attn_norm.weight", (256,)) == "F32"
    assert form("blk.3.attn_q.weight", (256, 96)) == "Q5_0", "rows that are no multiple of 256 fall back"
    assert form("blk.3.attn_q.weight", (256, 50)) == "F16"


# --- Bad input. ---


def test_what_cannot_be_converted_is_one_sentence(small_llama, tmp_path):
    out = tmp_path / "out.gguf"
    for source, type, error, sentence in [
        (small_llama, "q9", UsageError, "no type 'q9'"),
        (tmp_path, "f16", OrganismError, "config.json cannot be read"),
    ]:
        with pytest.raises(error, match=sentence):
            convert(source, out, type)
    with pytest.raises(UsageError, match="what is read"):
        convert(small_llama, small_llama, "f16")
    with pytest.raises(UsageError, match="cannot be written"):
        convert(small_llama, tmp_path / "no" / "where.gguf", "f16")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"architectures": ["BertModel"]}, "holds a BertModel"),
        ({"architectures": ["LlamaForCausalLM"]}, "lacks what a model of this kind needs"),
        (COMMON | {"architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5}, "holds no tokenizer"),
        (
            COMMON | {"architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5, "rope_scaling": {"type": "dynamic"}},
            "'dynamic'",
        ),
    ],
)
def test_a_folder_that_is_no_model_is_one_sentence(config, sentence, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(OrganismError, match=sentence):
        convert(tmp_path, tmp_path / "out.gguf")


def test_an_unknown_pre_tokenizer_is_a_warning(tmp_path, caplog):
    from organs.giant.convert import _tokenizer

    save_tokenizer(tmp_path, {"type": "Split", "pattern": {"Regex": "of tomorrow"}, "behavior": "Isolated"})
    assert _tokenizer(tmp_path, dict(vocab_size=SIZE))["tokenizer.ggml.pre"] == "gpt-2"
    assert "not one of the known ones" in caplog.text


def test_rope_factors_of_llama3_leave_short_waves_and_stretch_long_ones():
    from organs.giant.convert import _llama3_factors

    factors = _llama3_factors(LLAMA3_ROPE, 64)
    assert factors[0] == pytest.approx(1) and factors[-1] == pytest.approx(8)
    assert all(a <= b + 1e-6 for a, b in zip(factors, factors[1:])) and math.isfinite(factors.sum())
    assert FORMATS["F32"].nbytes == 4
