"""Small GGUF files for the tests, written by the `gguf` package: vocabularies, and whole models with random weights."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PREFIX = "tokenizer.ggml."


@functools.cache
def trained(size: int = 600) -> tuple[list[str], list[str]]:
    """(tokens, merges) of a byte-level BPE trained on this very module: 3 control tokens, all bytes, then merges."""
    import json

    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(Path(__file__).read_text(encoding="utf-8").splitlines() * 3, trainer)
    model = json.loads(library.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return tokens, [" ".join(pair) for pair in model["merges"]]


def byte_level(pre: str = "gpt-2", **more: Any) -> dict[str, Any]:
    """Metadata of a byte-level tokenizer with ChatML's markers."""
    tokens, merges = trained()
    types = [3] * len(SPECIALS) + [1] * (len(tokens) - len(SPECIALS))
    return {
        PREFIX + "model": "gpt2", PREFIX + "pre": pre, PREFIX + "tokens": tokens, PREFIX + "token_type": types,
        PREFIX + "merges": merges, PREFIX + "bos_token_id": 0, PREFIX + "eos_token_id": 2,
        PREFIX + "add_bos_token": False, "tokenizer.chat_template": CHATML,
    } | {PREFIX + key: value for key, value in more.items()}  # fmt: skip


def sentencepiece(words: str, **more: Any) -> dict[str, Any]:
    """Metadata of a SentencePiece BPE: bytes, then every beginning of each word, better scores for earlier words."""
    pieces = list(dict.fromkeys(word[:n] for word in words.split() for n in range(1, len(word) + 1)))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *pieces]
    types = [2, 3, 3, *[6] * 256, *[1] * len(pieces)]
    scores = [0.0] * 259 + [-float(n) for n in range(len(pieces))]
    return {
        PREFIX + "model": "llama", PREFIX + "tokens": tokens, PREFIX + "token_type": types, PREFIX + "scores": scores,
        PREFIX + "bos_token_id": 1, PREFIX + "eos_token_id": 2, PREFIX + "unknown_token_id": 0,
    } | {PREFIX + key: value for key, value in more.items()}  # fmt: skip


def write_metadata(writer: Any, metadata: dict[str, Any]) -> None:
    """Add key-value pairs of plain Python types to a gguf.GGUFWriter."""
    import gguf

    kinds = {str: gguf.GGUFValueType.STRING, bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32,
             float: gguf.GGUFValueType.FLOAT32}  # fmt: skip
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_key_value(key, value, kinds[type(value)])


def write_llama(path: Path, *, context: int = 256, metadata: dict[str, Any] | None = None, seed: int = 0,
                width: int = 64, layers: int = 2) -> Path:  # fmt: skip
    """A llama of two layers with random float32 weights and the byte-level tokenizer above."""
    import gguf

    metadata = byte_level() if metadata is None else metadata
    vocab, heads, hidden = len(metadata[PREFIX + "tokens"]), 4, 2 * width
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Small Llama")
    writer.add_block_count(layers)
    writer.add_context_length(context)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads // 2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(width // heads)
    writer.add_vocab_size(vocab)
    write_metadata(writer, metadata)

    def matrix(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    writer.add_tensor("token_embd.weight", matrix(vocab, width) * 8)
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
    for n in range(layers):
        shapes = dict(attn_q=(width, width), attn_k=(width // 2, width), attn_v=(width // 2, width), attn_output=(width, width),
                      ffn_gate=(hidden, width), ffn_up=(hidden, width), ffn_down=(width, hidden))  # fmt: skip
        for name, shape in shapes.items():
            writer.add_tensor(f"blk.{n}.{name}.weight", matrix(*shape))
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{n}.{name}.weight", np.ones(width, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
