"""Writing GGUF files: from a Hugging Face folder (config.json, *.safetensors, tokenizer), or from another GGUF.

One tensor is in memory at a time. What a file needs beyond its weights is taken from the folder: sizes and RoPE from
config.json, the vocabulary from tokenizer.json (or tokenizer.model), control tokens and the chat template from
tokenizer_config.json. `--type` names a mixture, as llama.cpp's quantiser does: most matrices get one format, and those where
errors hurt most (the output, values, the feed-forward's way back) a finer one.
"""

from __future__ import annotations

import json
import logging
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from organism import OrganismError, UsageError
from organs.giant import convert_experts
from organs.giant.formats import FORMATS, dequantise
from organs.giant.gguf import GGUFError, Strings, open_gguf
from organs.giant.quantise import SUPER, quantise
from organs.giant.tokenizer import BYTE, CONTROL, NORMAL, PRE_TYPES, UNKNOWN, UNUSED, USER_DEFINED

log = logging.getLogger("organism")

TYPES = {  # --type: (format of most matrices, the finer one of some, number in general.file_type)
    "f32": ("F32", "F32", 0), "f16": ("F16", "F16", 1), "bf16": ("BF16", "BF16", 32), "q8_0": ("Q8_0", "Q8_0", 7),
    "q4_0": ("Q4_0", "Q4_0", 2), "q4_1": ("Q4_1", "Q4_1", 3), "q5_0": ("Q5_0", "Q5_0", 8), "q5_1": ("Q5_1", "Q5_1", 9),
    "q2_k": ("Q2_K", "Q3_K", 10), "q3_k_s": ("Q3_K", "Q3_K", 11), "q3_k_m": ("Q3_K", "Q5_K", 12),
    "q4_k_s": ("Q4_K", "Q4_K", 14), "q4_k_m": ("Q4_K", "Q6_K", 15), "q5_k_s": ("Q5_K", "Q5_K", 16),
    "q5_k_m": ("Q5_K", "Q6_K", 17), "q6_k": ("Q6_K", "Q6_K", 18),
}  # fmt: skip
_NARROW = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}  # where rows are no multiple of 256
ARCHITECTURES = {  # the class that config.json names: (general.architecture, whether heads rotate neighbours)
    "LlamaForCausalLM": ("llama", True), "MistralForCausalLM": ("llama", True), "SmolLM3ForCausalLM": ("smollm3", True),
    "Qwen2ForCausalLM": ("qwen2", False), "Qwen3ForCausalLM": ("qwen3", False), "Gemma2ForCausalLM": ("gemma2", False),
    "Gemma3ForCausalLM": ("gemma3", False), "MixtralForCausalLM": ("llama", True), "Qwen2MoeForCausalLM": ("qwen2moe", False),
    "Qwen3MoeForCausalLM": ("qwen3moe", False), "OlmoeForCausalLM": ("olmoe", False), "GptOssForCausalLM": ("gpt-oss", False),
    "Qwen3NextForCausalLM": ("qwen3next", False), "Qwen3_5ForCausalLM": ("qwen35", False),
    "Qwen3_5MoeForCausalLM": ("qwen35moe", False), "Qwen3_5ForConditionalGeneration": ("qwen35", False),
    "Qwen3_5MoeForConditionalGeneration": ("qwen35moe", False),
}  # fmt: skip


class Tensor(NamedTuple):
    """One tensor to be written: its shape, row-major, and what gives its numbers, float32, when they are needed."""

    name: str
    shape: tuple[int, ...]
    numbers: Callable[[], np.ndarray]
    was: str = ""  # format that it has where it comes from
    data: Callable[[], np.ndarray] | None = None  # uint8: its bytes in that format
    parts: Sequence[Callable[[], np.ndarray]] = ()  # where given: its numbers, part by part along the first axis


def convert(
    source: Path, target: Path, type: str = "f16", say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Write `target` from a folder or a GGUF; returns {"path", "bytes", "tensors", "bits_per_weight", "formats"}.

    A file that is there is replaced once the new one is complete. Raises UsageError for an unknown type, OrganismError for
    what cannot be converted.
    """
    if type.lower() not in TYPES:
        raise UsageError(f"There is no type {type!r}: choose one of {', '.join(TYPES)}.")
    if target.is_dir() or not target.absolute().parent.is_dir():
        raise UsageError(f"{target} cannot be written: give the path of a file in a folder that exists.")
    if target.exists() and target.samefile(source):
        raise UsageError(f"{target} is what is read: give another file with -o.")
    metadata, tensors = _from_folder(source) if source.is_dir() else _from_gguf(source)
    part = target.with_name(f".{target.name}.part")
    try:
        return _write(part, target, metadata, tensors, type.lower(), say)
    except OSError as error:
        raise OrganismError(f"{target} cannot be written: {error.strerror}.") from error
    finally:
        part.unlink(missing_ok=True)


# --- Which format a tensor gets. ---


def format_of(tensor: Tensor, type: str, layers: int, has_output: bool) -> str:
    """The format of one tensor in a mixture (llama.cpp's rules for the types above)."""
    most, finer, _ = TYPES[type]
    if len(tensor.shape) < 2 or any(part in tensor.name for part in _EXACT) or tensor.name.endswith(".bias"):
        return "F32"
    if tensor.was == "MXFP4":
        return "MXFP4"
    wanted = finer if _is_delicate(tensor.name, type, layers, has_output) else most
    columns = tensor.shape[-1]
    if wanted in _NARROW and columns % SUPER:
        wanted = _NARROW[wanted]
    return wanted if columns % FORMATS[wanted].block == 0 else "F16"


_EXACT = ("norm", "ffn_gate_inp", "ssm_conv1d")  # small, and decisive


def _is_delicate(name: str, type: str, layers: int, has_output: bool) -> bool:
    if name == ("output.weight" if has_output else "token_embd.weight"):
        return True
    if not type.endswith(("_m", "q2_k")) or ".attn_v." not in name and ".ffn_down." not in name:
        return False
    layer, eighth = int(name.split(".")[1]), layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


# --- Writing. ---


def _write(part: Path, target: Path, metadata: dict[str, Any], tensors: list[Tensor], type: str,
           say: Callable[[str], None]) -> dict[str, Any]:  # fmt: skip
    import gguf

    architecture = metadata.pop("general.architecture")
    layers = int(metadata[f"{architecture}.block_count"])
    has_output = any(t.name == "output.weight" for t in tensors)
    formats = [format_of(t, type, layers, has_output) for t in tensors]
    writer = gguf.GGUFWriter(part, architecture)
    metadata |= {"general.file_type": TYPES[type][2], "general.quantization_version": 2}
    for key, value in metadata.items():
        _add(writer, key, value)
    total = 0
    for tensor, form in zip(tensors, formats):
        size = math.prod(tensor.shape) // FORMATS[form].block * FORMATS[form].nbytes
        raw = gguf.GGMLQuantizationType[form]
        shape = (*tensor.shape[:-1], tensor.shape[-1] // FORMATS[form].block * FORMATS[form].nbytes)
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), size, raw)
        total += size
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for n, (tensor, form) in enumerate(zip(tensors, formats), 1):
        if n % 50 == 0:
            say(f"{n} of {len(tensors)} tensors…")
        writer.write_tensor_data(_bytes_of(tensor, form))
    writer.close()
    with open(part, "rb") as stream:
        os.fsync(stream.fileno())
    os.replace(part, target)
    counts = {form: formats.count(form) for form in sorted(set(formats))}
    weights = sum(math.prod(t.shape) for t in tensors)
    return dict(path=str(target), bytes=target.stat().st_size, tensors=len(tensors), formats=counts,
                bits_per_weight=8 * total / weights)  # fmt: skip


def _bytes_of(tensor: Tensor, form: str) -> np.ndarray:
    """uint8: a tensor in its new format; one of parts is quantised part by part."""
    if tensor.was == form and tensor.data is not None:
        return np.ascontiguousarray(tensor.data()).reshape(-1).view(np.uint8)
    reads = tensor.parts or (tensor.numbers,)
    done = [quantise(read().reshape(-1, tensor.shape[-1]), form).reshape(-1).view(np.uint8) for read in reads]
    return done[0] if len(done) == 1 else np.concatenate(done)


def _add(writer: Any, key: str, value: Any) -> None:
    """One value of metadata, in the GGUF type that readers expect."""
    import gguf

    kind = gguf.GGUFValueType
    if isinstance(value, (np.ndarray, Strings)):
        value = value.tolist() if isinstance(value, np.ndarray) else list(value)
    if isinstance(value, list):
        if value:
            writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        small, negative = -(2**31) <= value < 2**32, value < 0
        writer.add_key_value(
            key,
            value,
            (kind.INT32 if negative else kind.UINT32) if small else (kind.INT64 if negative else kind.UINT64),
        )
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, str(value))


# --- From a GGUF. ---


def _from_gguf(path: Path) -> tuple[dict[str, Any], list[Tensor]]:
    file = open_gguf(path)
    metadata = {k: v for k, v in file.metadata.items() if not k.startswith(("GGUF.", "split."))}
    metadata.pop("general.alignment", None)
    architecture = metadata.get("general.architecture")
    if f"{architecture}.block_count" not in metadata:
        raise GGUFError(f"{path}: its metadata lacks {architecture}.block_count: it is no language model")

    def tensor(name: str) -> Tensor:
        info = file.tensors[name]
        numbers = lambda: dequantise(file.data(name), info.format).reshape(info.shape)
        return Tensor(name, info.shape, numbers, info.format, lambda: file.data(name))

    return metadata, [tensor(name) for name in file.tensors]


# --- From a Hugging Face folder. ---


def _from_folder(folder: Path) -> tuple[dict[str, Any], list[Tensor]]:
    config = _json(folder / "config.json")
    if "text_config" in config:
        config = {**config, **config["text_config"]}
    given = (config.get("architectures") or ["nothing"])[0]
    if given not in ARCHITECTURES:
        raise OrganismError(f"{folder} holds a {given}, which is not supported: {', '.join(ARCHITECTURES)} are.")
    architecture, neighbours = ARCHITECTURES[given]
    metadata: dict[str, Any] = {"general.architecture": architecture, "general.type": "model",
                                "general.name": config.get("_name_or_path") or folder.resolve().name}  # fmt: skip
    predicted = convert_experts.mtp_layers(stored.name for stored in _stored(folder))
    sizes = _sizes(config, architecture)
    if predicted:
        sizes["block_count"] += predicted
        sizes["nextn_predict_layers"] = predicted
        if "attention.recurrent_layers" in sizes:
            sizes["attention.recurrent_layers"] += [False] * predicted
    metadata |= {f"{architecture}.{key}": value for key, value in sizes.items()}
    metadata |= _tokenizer(folder, config)
    return metadata, list(_tensors(folder, config, architecture, neighbours, sizes["block_count"]))


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OrganismError(f"{path} cannot be read: {error.strerror}; a model's folder has one.") from error
    except ValueError as error:
        raise OrganismError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(data, dict):
        raise OrganismError(f"{path} is not a JSON object.")
    return data


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """RoPE's settings: `rope_parameters` of newer configurations, `rope_scaling` and `rope_theta` of older ones. Where
    layers with and without a window differ, those without."""
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if "full_attention" in found:
        found = dict(found["full_attention"], local_theta=found.get("sliding_attention", {}).get("rope_theta"))
    found.setdefault("rope_theta", config.get("rope_theta", 10_000.0))
    found["type"] = found.get("rope_type") or found.get("type") or "default"
    if config.get("rope_local_base_freq"):
        found["local_theta"] = config["rope_local_base_freq"]
    return found


def _head(config: dict[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _rotated(config: dict[str, Any], head: int) -> int:
    """How many numbers of a head rotate."""
    share = _rope(config).get("partial_rotary_factor") or config.get("partial_rotary_factor")
    return int(head * float(share)) if share else head


def _sizes(config: dict[str, Any], architecture: str) -> dict[str, Any]:
    """Metadata below the architecture's name."""
    try:
        heads, head = int(config["num_attention_heads"]), _head(config)
        out: dict[str, Any] = {
            "block_count": int(config["num_hidden_layers"]), "context_length": int(config["max_position_embeddings"]),
            "embedding_length": int(config["hidden_size"]),
            "feed_forward_length": int(config.get("intermediate_size") or config["moe_intermediate_size"]),
            "attention.head_count": heads, "attention.head_count_kv": int(config.get("num_key_value_heads") or heads),
            "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]), "attention.key_length": head,
            "attention.value_length": head, "rope.dimension_count": _rotated(config, head), "vocab_size": int(config["vocab_size"]),
        }  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise OrganismError(f"config.json lacks what a model of this kind needs: {error}.") from error
    out |= _rope_sizes(_rope(config)) | convert_experts.sizes(config, architecture)
    if architecture.startswith("qwen35"):
        sections = list(_rope(config).get("mrope_section") or (11, 11, 10))
        out["rope.dimension_sections"] = [*sections, *[0] * (4 - len(sections))]
    if architecture.startswith("gemma"):
        out["attention.sliding_window"] = int(config.get("sliding_window") or 4096)
        out["attention.scale"] = float(config.get("query_pre_attn_scalar") or head) ** -0.5
        for key, name in (("attn_logit_softcapping",) * 2, ("final_logit_softcapping",) * 2):
            out[key] = float(config.get(name) or 0.0)
    return out


def _rope_sizes(rope: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {"rope.freq_base": float(rope["rope_theta"])}
    if rope.get("local_theta"):
        out["rope.freq_base_swa"] = float(rope["local_theta"])
    kind = rope["type"]
    if kind in ("linear", "yarn"):
        out |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
        if rope.get("original_max_position_embeddings"):
            out["rope.scaling.original_context_length"] = int(rope["original_max_position_embeddings"])
        for key, name in (("rope.scaling.yarn_beta_fast", "beta_fast"), ("rope.scaling.yarn_beta_slow", "beta_slow"),
                          ("rope.scaling.attn_factor", "attention_factor")):  # fmt: skip
            if kind == "yarn" and rope.get(name) is not None:
                out[key] = float(rope[name])
        if kind == "yarn" and rope.get("truncate") is not None:
            out["rope.scaling.yarn_truncate"] = bool(rope["truncate"])
    elif kind not in ("default", "llama3"):
        raise OrganismError(
            f"config.json scales RoPE by {kind!r}, which is not supported: linear, yarn and llama3 are."
        )
    return out


def _llama3_factors(rope: dict[str, Any], head: int) -> np.ndarray:
    """float32 [head / 2]: what each frequency is divided by (Llama 3.1: long waves by `factor`, short ones by 1)."""
    wave = 2 * math.pi * float(rope["rope_theta"]) ** (np.arange(0, head, 2) / head)
    old, low, high = (
        float(rope[k]) for k in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    share = np.clip((old / wave - low) / (high - low), 0, 1)  # 1: a short wave
    return (1 / ((1 - share) / float(rope["factor"]) + share)).astype(np.float32)


# Weights.


def _tensors(
    folder: Path, config: dict[str, Any], architecture: str, neighbours: bool, layers: int
) -> Iterator[Tensor]:
    import gguf

    arch = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, layers)
    heads = int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    vocabulary = int(config["vocab_size"])
    found = 0
    for source in convert_experts.prepared(_stored(folder), config, architecture):
        name, shape, read = source.name, source.shape, source.whole
        bare = name.replace("model.language_model.", "model.").removeprefix("language_model.")
        if bare.endswith((".rotary_emb.inv_freq", "lm_head.weight")) and (
            config.get("tie_word_embeddings") or "rotary" in bare
        ):
            continue
        if bare.startswith(("model.visual.", "visual.")):
            continue
        new = names.get_name(bare, try_suffixes=(".weight", ".bias")) or convert_experts.further_name(bare)
        if new is None:
            raise OrganismError(
                f"{folder} holds the tensor {name!r}, which a model of the kind {architecture} does not have."
            )
        found += 1
        if neighbours and (".attn_q." in new or ".attn_k." in new):
            yield Tensor(new, shape, _compose(read, _interleaved, heads if ".attn_q." in new else kv_heads))
        elif architecture.startswith("gemma") and new.endswith("norm.weight"):
            yield Tensor(new, shape, _compose(read, np.add, np.float32(1)))  # Gemma's norms multiply by 1 + weight
        elif new in ("token_embd.weight", "output.weight") and shape[0] > vocabulary:
            yield Tensor(new, (vocabulary, shape[1]), _compose(read, lambda x, n: x[:n], vocabulary))
        elif source.packed:
            data = lambda packed=source.packed: np.concatenate([part().reshape(-1) for part in packed])
            yield Tensor(new, shape, read, "MXFP4", data, source.parts)
        else:
            yield Tensor(new, shape, read, parts=source.parts)
    if not found:
        raise OrganismError(f"{folder} holds no weights: *.safetensors are read.")
    rope = _rope(config)
    if rope["type"] == "llama3":
        factors = _llama3_factors(rope, _head(config))
        yield Tensor("rope_freqs.weight", factors.shape, lambda: factors)


def _compose(
    read: Callable[[], np.ndarray], change: Callable[..., np.ndarray], argument: Any
) -> Callable[[], np.ndarray]:
    return lambda: change(read(), argument)


def _interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a projection of queries or keys, from partners half a head apart (Hugging Face) to neighbours (GGUF's llama)."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def _stored(folder: Path) -> Iterator[Stored]:
    """Every tensor of the folder's safetensors files."""
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    for path in files:
        with open(path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            (length,) = struct.unpack("<Q", stream.read(8).ljust(8, b"\0"))
            if length > size - 8:
                raise OrganismError(f"{path} is no whole safetensors file: it is cut off or damaged.")
            header = json.loads(stream.read(length))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            if entry["dtype"] not in _STORED or 8 + length + end > size:
                raise OrganismError(f"{path}: the tensor {name!r} is {entry['dtype']}, or lies beyond the file's end.")
            yield Stored(name, tuple(entry["shape"]), path, 8 + length + begin, entry["dtype"])


_STORED = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "U8": "u1"}


class Stored(NamedTuple):
    """A tensor in a safetensors file; called, it is read."""

    name: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    kind: str

    def __call__(self) -> np.ndarray:
        """float32 of its shape."""
        return self._read(self.offset, self.shape)

    def part(self, i: int, raw: bool = False) -> np.ndarray:
        """float32 (raw: bytes as they are): the i-th along the first axis."""
        size = math.prod(self.shape[1:]) * np.dtype(_STORED[self.kind]).itemsize
        return self._read(self.offset + i * size, self.shape[1:], raw)

    def _read(self, offset: int, shape: tuple[int, ...], raw: bool = False) -> np.ndarray:
        data = np.fromfile(self.path, _STORED[self.kind], math.prod(shape), offset=offset).reshape(shape)
        if raw:
            return data
        return (data.astype(np.uint32) << 16).view(np.float32) if self.kind == "BF16" else data.astype(np.float32)


# Vocabulary.


def tokenizer_of(path: Path, metadata: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Metadata of a tokenizer.json, with what a tokenizer_config.json beside it says, in place of a GGUF's own.

    What neither says of BOS and EOS stays as in `metadata`. Raises OrganismError where it cannot be read, or has other tokens
    than the model, which has `size`.
    """
    if not path.is_file():
        raise OrganismError(f"There is no tokenizer at {path}: give a tokenizer.json.")
    known = {f"{name}_token_id": metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    vocabulary = _json(path).get("model", {}).get("vocab", {})
    most = max(vocabulary.values() if isinstance(vocabulary, dict) else [len(vocabulary) - 1], default=-1)
    if most >= size:
        raise OrganismError(
            f"{path} has more tokens than the model ({most + 1:,} and {size:,}): it belongs to another one."
        )
    return _tokenizer(path.parent, known | {"vocab_size": size}, path)


def _tokenizer(folder: Path, config: dict[str, Any], file: Path | None = None) -> dict[str, Any]:
    """Metadata of tokenizer.ggml.*, and the chat template; file: the tokenizer.json, where it has another name."""
    settings = _json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    size, file = int(config["vocab_size"]), file or folder / "tokenizer.json"
    if file.exists():
        out = _from_tokenizer_json(_json(file), size, settings)
    elif (folder / "tokenizer.model").exists():
        out = _from_sentencepiece((folder / "tokenizer.model").read_bytes(), size)
    else:
        raise OrganismError(f"{folder} holds no tokenizer: tokenizer.json or tokenizer.model is read.")
    ids = {text: n for n, text in enumerate(out["tokens"])}
    for name, key in (("bos", "bos_token"), ("eos", "eos_token"), ("unknown", "unk_token"), ("padding", "pad_token")):
        text = settings.get(key)
        text = text.get("content") if isinstance(text, Mapping) else text
        number = ids.get(text) if text else config.get(f"{name[:3]}_token_id")
        number = number[0] if isinstance(number, list) else number
        if number is not None and 0 <= number < size:
            out[f"{name}_token_id"] = int(number)
    if settings.get("add_bos_token") is not None:
        out["add_bos_token"] = bool(settings["add_bos_token"])
    metadata = {f"tokenizer.ggml.{key}": value for key, value in out.items()}
    template = _template(folder, settings)
    return metadata | ({"tokenizer.chat_template": template} if template else {})


def _template(folder: Path, settings: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    given = settings.get("chat_template")
    if isinstance(given, list):  # several, by name
        given = next((t.get("template") for t in given if t.get("name") == "default"), None)
    return given


def _from_tokenizer_json(data: dict[str, Any], size: int, settings: dict[str, Any]) -> dict[str, Any]:
    model = data.get("model", {})
    tokens: list[str] = [f"[PAD{n}]" for n in range(size)]
    types = [UNUSED] * size
    vocabulary = model.get("vocab", {})
    pairs = (
        vocabulary.items() if isinstance(vocabulary, dict) else ((text, n) for n, (text, _) in enumerate(vocabulary))
    )
    for text, n in pairs:
        if n < size:
            tokens[n], types[n] = text, NORMAL
    for added in data.get("added_tokens", []):
        if added["id"] < size:
            tokens[added["id"]], types[added["id"]] = (
                added["content"],
                CONTROL if added.get("special") else USER_DEFINED,
            )
    out: dict[str, Any] = dict(tokens=tokens, token_type=types)
    if model.get("type") == "Unigram":
        scores = [float(score) for _, score in vocabulary][:size]
        return out | dict(model="t5", scores=scores + [0.0] * (size - len(scores)), **_begins(data))
    if model.get("type") != "BPE":
        raise OrganismError(
            f"The tokenizer is of the kind {model.get('type')!r}, which is not supported: BPE and Unigram are."
        )
    merges = [m.split(" ", 1) if isinstance(m, str) else list(m) for m in model.get("merges", [])]
    if model.get("byte_fallback"):
        ranks: dict[str, int] = {}
        for rank, (a, b) in enumerate(merges):
            ranks.setdefault(a + b, rank)
        for n, text in enumerate(tokens):
            if types[n] == NORMAL and len(text) == 6 and text.startswith("<0x"):
                types[n] = BYTE
            elif text == model.get("unk_token"):
                types[n] = UNKNOWN
        scores = [
            -float(ranks[text]) if text in ranks else -1e6 if kind == NORMAL else 0.0
            for text, kind in zip(tokens, types)
        ]
        prefix = any('"prepend"' in json.dumps(part).lower() for part in (data.get("normalizer") or {}, data.get("pre_tokenizer") or {})
                     ) or (data.get("pre_tokenizer") or {}).get("prepend_scheme", "never") != "never"  # fmt: skip
        return out | dict(model="llama", scores=scores, add_space_prefix=prefix, **_begins(data))
    return out | dict(model="gpt2", pre=_pre_type(data), merges=[f"{a} {b}" for a, b in merges], **_begins(data))


def _begins(data: dict[str, Any]) -> dict[str, Any]:
    """Whether the post-processor puts one token first: then the model expects BOS."""
    parts = data.get("post_processor") or {}
    parts = parts.get("processors", [parts])
    templates = [p["single"] for p in parts if p.get("type") == "TemplateProcessing"]
    return dict(add_bos_token=any("SpecialToken" in steps[0] for steps in templates if steps))


def _pre_type(data: dict[str, Any]) -> str:
    """The name of the way in which text is cut, by its regular expressions; an unknown one is a warning."""
    wanted: list[str] = []
    part = data.get("pre_tokenizer") or {}
    for step in part.get("pretokenizers", [part]):
        if step.get("type") == "Split" and "Regex" in step.get("pattern", {}):
            wanted.append(step["pattern"]["Regex"])
        elif step.get("type") == "Digits":
            wanted.append(r"\p{N}" if step.get("individual_digits") else r"\p{N}+")
        elif step.get("type") == "ByteLevel" and step.get("use_regex", True):
            wanted += PRE_TYPES["gpt-2"]
    for name, expressions in PRE_TYPES.items():
        if expressions == wanted:
            return name
    log.warning(
        "The pre-tokenizer is not one of the known ones: the model will cut text as GPT-2 does, and may differ a little."
    )
    return "gpt-2"


def _from_sentencepiece(data: bytes, size: int) -> dict[str, Any]:
    """A tokenizer.model, which is a protocol buffer: repeated field 1 holds pieces (1: text, 2: score, 3: type)."""
    tokens, scores, types = [], [], []
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            piece = dict(_fields(value))
            tokens.append(bytes(piece.get(1, b"")).decode("utf-8", "replace"))
            scores.append(struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0)
            types.append(int(piece.get(3, NORMAL)))
    if not tokens:
        raise OrganismError("tokenizer.model holds no pieces: it is damaged, or no SentencePiece model.")
    missing = size - len(tokens)
    tokens += [f"[PAD{n}]" for n in range(missing)]
    return dict(model="llama", tokens=tokens[:size], scores=(scores + [-1e4] * missing)[:size],
                token_type=(types + [UNUSED] * missing)[:size], add_bos_token=True)  # fmt: skip


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field, value) of a protocol buffer's message: integers, or bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    try:
        while at < len(data):
            key = varint()
            if key & 7 == 0:
                yield key >> 3, varint()
                continue
            length = {1: 8, 5: 4}.get(key & 7) or varint()
            if key & 7 not in (1, 2, 5) or at + length > len(data):
                raise IndexError
            yield key >> 3, data[at : at + length]
            at += length
    except IndexError as error:
        raise OrganismError("tokenizer.model is damaged: it ends inside of a field.") from error
