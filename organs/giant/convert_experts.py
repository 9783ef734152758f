"""What `giant convert` does to the weights of mixtures of experts and of hybrids before gguf's own table names them.

Hugging Face keeps experts one by one or as one tensor, with gate and up together or apart; a GGUF has one tensor a layer
for each of gate, up and down. Gated DeltaNet's projections are sorted by kind instead of by head, and its constants stored
as they are used. Layouts: the converters of the ggml project (conversion/qwen.py, gpt_oss.py there), and `gguf`'s tables.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from organism import OrganismError

Read = Callable[[], np.ndarray]
_EXPERT = re.compile(r"^(.*\.)experts\.(\d+)\.(w1|w2|w3|gate_proj|up_proj|down_proj)\.weight$")
_WAYS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}  # Mixtral's names
_MTP = {"fc": "eh_proj", "pre_fc_norm_embedding": "enorm", "pre_fc_norm_hidden": "hnorm", "norm": "shared_head.norm"}


@dataclass
class Source:
    """A tensor on its way: parts, which follow each other along the first axis, are read one at a time."""

    name: str
    shape: tuple[int, ...]
    parts: list[Read]
    packed: list[Read] = field(default_factory=list)  # uint8: bytes of MXFP4 blocks, where that is what it has

    def whole(self) -> np.ndarray:
        """float32 of its shape."""
        return np.concatenate([part().reshape(-1) for part in self.parts]).reshape(self.shape)

    def changed(self, name: str, shape: tuple[int, ...], change: Callable[[np.ndarray], np.ndarray]) -> Source:
        """Another name, shape and, when it is read, other numbers."""
        return Source(name, shape, [lambda: change(self.whole())])


def prepared(stored: Iterable[Any], config: dict[str, Any], architecture: str) -> Iterator[Source]:
    """The tensors of a folder as a GGUF has them, still under Hugging Face's names. stored: convert.Stored, in any order.

    Raises OrganismError where experts are missing or shapes do not fit.
    """
    apart: dict[tuple[str, str], dict[int, Any]] = {}
    blocks: dict[str, dict[str, Any]] = {}
    for tensor in stored:
        found = _EXPERT.match(tensor.name)
        if found:
            begin, number, way = found.groups()
            apart.setdefault((begin, _WAYS.get(way, way)), {})[int(number)] = tensor
        elif tensor.name.endswith(("_proj_blocks", "_proj_scales")):
            begin, _, kind = tensor.name.rpartition("_")
            blocks.setdefault(begin, {})[kind] = tensor
        else:
            yield from _changed(tensor, config, architecture)
    for (begin, way), members in apart.items():
        yield from _gathered(begin, way, members, config, architecture)
    for begin, pair in blocks.items():
        yield from _repacked(begin, pair)


def _gathered(
    begin: str, way: str, members: dict[int, Any], config: dict[str, Any], architecture: str
) -> Iterator[Source]:
    """One tensor of experts that were stored one by one."""
    count = int(config.get("num_local_experts") or config.get("num_experts") or len(members))
    missing = set(range(count)) - set(members)
    if missing or len(members) != count:
        which = min(missing or {count})
        raise OrganismError(
            f"{begin}experts: {len(members)} of {count} experts have their {way}; expert {which} has none."
        )
    shapes = {m.shape for m in members.values()}
    if len(shapes) > 1:
        raise OrganismError(f"{begin}experts: the experts' {way} have different shapes: {sorted(shapes)}.")
    name = _mtp_name(f"{begin.replace('block_sparse_moe', 'mlp')}experts.{way}.weight", config)
    yield Source(name, (count, *shapes.pop()), [members[i] for i in range(count)])


def _mtp_name(name: str, config: dict[str, Any]) -> str:
    """mtp.* becomes one more layer behind the others."""
    bare = name.removeprefix("model.")
    if not bare.startswith("mtp."):
        return name
    first, parts = int(config["num_hidden_layers"]), bare.split(".")
    if parts[1] == "layers":
        return ".".join(["model.layers", str(first + int(parts[2])), *parts[3:]])
    return f"model.layers.{first}.{_MTP.get(parts[1], parts[1])}.{parts[2]}"


def further_name(name: str) -> str | None:
    """GGUF's name of a tensor that gguf's table lacks for these models: of layers without experts, and of prediction (MTP)."""
    if found := re.match(r"model\.layers\.(\d+)\.(eh_proj|enorm|hnorm|shared_head\.norm)\.weight$", name):
        return f"blk.{found.group(1)}.nextn.{found.group(2).replace('.', '_')}.weight"
    if found := re.match(r"model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj\.weight$", name):
        return f"blk.{found.group(1)}.ffn_{found.group(2)}.weight"
    return None


def mtp_layers(names: Iterable[str]) -> int:
    """How many layers of multi-token prediction a folder has."""
    numbers = [int(m.group(1)) for name in names if (m := re.match(r"(?:model\.)?mtp\.layers\.(\d+)\.", name))]
    return max(numbers, default=-1) + 1


def _changed(tensor: Any, config: dict[str, Any], architecture: str) -> Iterator[Source]:
    name, shape = _mtp_name(tensor.name, config), tensor.shape
    source = Source(name, shape, [tensor])
    stem, _, last = name.rpartition(".")
    if "mlp.experts." in name:
        yield from _fused(tensor, name, architecture)
    elif name.endswith("self_attn.sinks"):
        yield Source(name + ".weight", shape, [tensor])
    elif ".linear_attn." in name:
        yield from _delta_net(source, config, architecture)
    elif architecture in ("qwen3next", "qwen35", "qwen35moe") and stem.endswith("norm") and last == "weight":
        yield source.changed(name, shape, lambda x: x + np.float32(1))  # their norms multiply by 1 + weight
    elif name.endswith("shared_expert_gate.weight"):
        yield Source(name, shape[1:], [tensor])
    else:
        yield source


def _fused(tensor: Any, name: str, architecture: str) -> Iterator[Source]:
    """Experts stored as one tensor: gpt-oss's are turned around, with gate and up taking turns; others have gate first."""
    begin, _, last = name.rpartition("experts.")
    last = last.removesuffix(".weight")
    is_bias, way = last.endswith("_bias"), last.removesuffix("_bias")
    experts, turned = tensor.shape[0], architecture == "gpt-oss"
    height = tensor.shape[-1] if turned or is_bias else tensor.shape[-2]
    width = () if is_bias else (tensor.shape[-2] if turned else tensor.shape[-1],)

    def part(i: int, rows: slice) -> Read:
        return lambda: np.ascontiguousarray((tensor.part(i).T if turned and not is_bias else tensor.part(i))[rows])

    if way == "gate_up_proj":
        halves = {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)} if turned else {
            "gate_proj": slice(0, height // 2), "up_proj": slice(height // 2, None)}  # fmt: skip
        height //= 2
    else:
        halves = {way: slice(None)}
    for new, rows in halves.items():
        suffix = "bias" if is_bias else "weight"
        yield Source(
            f"{begin}experts.{new}.{suffix}", (experts, height, *width), [part(i, rows) for i in range(experts)]
        )


def _repacked(begin: str, pair: dict[str, Any]) -> Iterator[Source]:
    """gpt-oss's MXFP4: in a block, byte j held numbers 2j and 2j + 1, and in a GGUF j and j + 16."""
    if set(pair) != {"blocks", "scales"}:
        raise OrganismError(f"{begin}: of _blocks and _scales only {', '.join(pair)} is there.")
    blocks, scales = pair["blocks"], pair["scales"]
    stem, _, way = begin.rpartition("experts.")
    experts, rows, columns = *blocks.shape[:2], blocks.shape[2] * 32

    def packed(i: int, which: slice) -> Read:
        def read() -> np.ndarray:
            q = blocks.part(i, raw=True)[which]
            codes = np.stack([q & 15, q >> 4], -1).reshape(*q.shape[:-1], 32)
            q = codes[..., :16] | codes[..., 16:] << 4
            return np.concatenate([scales.part(i, raw=True)[which][..., None], q], -1).reshape(len(q), -1)

        return read

    def numbers(read: Read) -> Read:
        from organs.giant.formats import dequantise

        return lambda: dequantise(np.ascontiguousarray(read()).reshape(-1), "MXFP4")

    halves = (
        {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)} if way == "gate_up_proj" else {way: slice(None)}
    )
    for new, which in halves.items():
        reads = [packed(i, which) for i in range(experts)]
        yield Source(
            f"{stem}experts.{new}.weight", (experts, rows // len(halves), columns), [numbers(r) for r in reads], reads
        )


def _delta_net(t: Source, config: dict[str, Any], architecture: str) -> Iterator[Source]:
    """Gated DeltaNet's tensors. Qwen3.5's heads of values are sorted so that head i belongs to head i mod n_k of keys."""
    nk, nv = int(config["linear_num_key_heads"]), int(config["linear_num_value_heads"])
    dk, dv = int(config["linear_key_head_dim"]), int(config["linear_value_head_dim"])
    r, name = nv // nk, t.name
    keys, is_tiled = 2 * nk * dk, architecture.startswith("qwen35") and nv != nk

    def tiled(x: np.ndarray, head: int) -> np.ndarray:
        return x.reshape(nk, r, head, -1).swapaxes(0, 1).reshape(x.shape) if is_tiled else x

    if name.endswith("in_proj_qkvz.weight"):
        begin, ends = name.removesuffix("in_proj_qkvz.weight"), np.cumsum([dk, dk, r * dv, r * dv])

        def sorted_by_kind(kinds: range) -> Callable[[np.ndarray], np.ndarray]:
            def change(x: np.ndarray) -> np.ndarray:
                parts = np.split(x.reshape(nk, -1, x.shape[1]), ends[:-1], 1)
                return np.concatenate([parts[i].reshape(-1, x.shape[1]) for i in kinds])

            return change

        width = t.shape[1]
        yield t.changed(begin + "in_proj_qkv.weight", (keys + nv * dv, width), sorted_by_kind(range(3)))
        yield t.changed(begin + "in_proj_z.weight", (nv * dv, width), sorted_by_kind(range(3, 4)))
    elif name.endswith("in_proj_qkv.weight"):
        yield t.changed(name, t.shape, lambda x: np.concatenate([x[:keys], tiled(x[keys:], dv)]))
    elif name.endswith("in_proj_z.weight"):
        yield t.changed(name, t.shape, lambda x: tiled(x, dv))
    elif name.endswith(("in_proj_a.weight", "in_proj_b.weight")):
        yield t.changed(name, t.shape, lambda x: tiled(x, 1))
    elif name.endswith("A_log"):
        yield t.changed(name, t.shape, lambda x: -np.exp(tiled(x, 1)))
    elif name.endswith("dt_bias"):
        yield t.changed(name.removesuffix("dt_bias") + "dt_proj.bias", t.shape, lambda x: tiled(x, 1))
    elif name.endswith("conv1d.weight"):
        shape = (t.shape[0], t.shape[-1])
        yield t.changed(
            name, shape, lambda x: np.concatenate([x.reshape(shape)[:keys], tiled(x.reshape(shape)[keys:], dv)])
        )
    elif name.endswith("out_proj.weight"):
        yield t.changed(name, t.shape, lambda x: np.ascontiguousarray(tiled(np.ascontiguousarray(x.T), dv).T))
    else:
        yield t


def sizes(config: dict[str, Any], architecture: str) -> dict[str, Any]:
    """Metadata of experts and of recurrent layers, below the architecture's name."""
    out: dict[str, Any] = {}
    experts = config.get("num_local_experts") or config.get("num_experts")
    if experts:
        inside = config.get("moe_intermediate_size") or config["intermediate_size"]
        out |= {"expert_count": int(experts), "expert_used_count": int(config["num_experts_per_tok"]),
                "expert_feed_forward_length": int(inside)}  # fmt: skip
        if config.get("shared_expert_intermediate_size"):
            out["expert_shared_feed_forward_length"] = int(config["shared_expert_intermediate_size"])
        if config.get("norm_topk_prob") is not None and architecture not in ("qwen3next", "qwen35moe"):
            out["expert_weights_norm"] = bool(config["norm_topk_prob"])
        elif architecture == "qwen3next" and config.get("norm_topk_prob") is False:
            out["expert_weights_norm"] = False
    if architecture == "gpt-oss":
        out["attention.sliding_window"] = int(config.get("sliding_window") or 0)
    if config.get("clip_qkv"):
        out["attention.clamp_kqv"] = float(config["clip_qkv"])
    if "linear_num_value_heads" in config:
        out |= {"ssm.conv_kernel": int(config["linear_conv_kernel_dim"]), "ssm.state_size": int(config["linear_key_head_dim"]),
                "ssm.group_count": int(config["linear_num_key_heads"]), "ssm.time_step_rank": int(config["linear_num_value_heads"]),
                "ssm.inner_size": int(config["linear_value_head_dim"]) * int(config["linear_num_value_heads"]),
                "full_attention_interval": int(config.get("full_attention_interval") or 4)}  # fmt: skip
        if config.get("layer_types"):
            out["attention.recurrent_layers"] = [t == "linear_attention" for t in config["layer_types"]]
    return out
