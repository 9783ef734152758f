"""Mixtures of experts and hybrids: converted from Hugging Face folders, equal to transformers in every way of reading.

Run alone: pytest -n 0 tests/giant/test_experts.py
"""

from __future__ import annotations

import os

import numpy as np
import pytest

from organism import OrganismError, UsageError
from organs.giant import GGUFError, Giant, open_gguf
from organs.giant.convert import convert

from .test_convert import SIZE, save_tokenizer

os.environ.setdefault("HF_HUB_OFFLINE", "1")
gguf = pytest.importorskip("gguf")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

COMMON = dict(vocab_size=SIZE, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
              num_key_value_heads=2, max_position_embeddings=2048, pad_token_id=None, eos_token_id=2, bos_token_id=0)  # fmt: skip
DELTA = dict(linear_conv_kernel_dim=4, linear_key_head_dim=16, linear_value_head_dim=16, linear_num_key_heads=2,
             linear_num_value_heads=4)  # fmt: skip
HYBRID = COMMON | DELTA | dict(num_hidden_layers=4, head_dim=32)
FEW = dict(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=32, shared_expert_intermediate_size=48)
YARN = dict(
    rope_type="yarn", rope_theta=10000.0, factor=8.0, original_max_position_embeddings=64, beta_fast=32.0, beta_slow=1.0
)
CASES = {  # name: (class, settings)
    "mixtral": ("Mixtral", COMMON | dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=None)),
    "mixtral, one of three, odd heads": ("Mixtral", COMMON | dict(
        num_local_experts=3, num_experts_per_tok=1, hidden_size=72, num_attention_heads=3, num_key_value_heads=1,
        head_dim=24, intermediate_size=40, sliding_window=None)),
    "qwen2moe": ("Qwen2Moe", COMMON | FEW | dict(num_experts_per_tok=2)),
    "qwen2moe, weights summing to 1": ("Qwen2Moe", COMMON | FEW | dict(norm_topk_prob=True, num_experts=17, num_experts_per_tok=5)),
    "qwen2moe, first layer plain": ("Qwen2Moe", COMMON | FEW | dict(mlp_only_layers=[0])),
    "qwen3moe": ("Qwen3Moe", COMMON | dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=32,
                                           norm_topk_prob=True)),
    "qwen3moe, all experts, sums as they are": ("Qwen3Moe", COMMON | dict(
        num_experts=4, num_experts_per_tok=4, moe_intermediate_size=56, head_dim=16, norm_topk_prob=False)),
    "olmoe": ("Olmoe", COMMON | dict(num_experts=8, num_experts_per_tok=4)),
    "olmoe, clipped": ("Olmoe", COMMON | dict(num_experts=8, num_experts_per_tok=2, clip_qkv=0.5, num_key_value_heads=4)),
    "gpt-oss": ("GptOss", COMMON | dict(num_local_experts=4, num_experts_per_tok=2, head_dim=32, sliding_window=24,
                                        rope_parameters=YARN | dict(truncate=False))),
    "gpt-oss, rounded ramp": ("GptOss", COMMON | dict(num_local_experts=6, num_experts_per_tok=4, head_dim=16, sliding_window=16,
                                                      num_hidden_layers=3, rope_parameters=YARN | dict(truncate=True))),
    "qwen3next": ("Qwen3Next", HYBRID | FEW),
    "qwen3next, other heads": ("Qwen3Next", HYBRID | FEW | dict(
        linear_key_head_dim=24, linear_value_head_dim=24, linear_num_key_heads=3, linear_num_value_heads=9, num_attention_heads=5,
        num_key_value_heads=5, head_dim=16, num_experts=9, num_experts_per_tok=1, linear_conv_kernel_dim=3)),
    "qwen3next, layers as listed": ("Qwen3Next", HYBRID | FEW | dict(
        num_hidden_layers=3, layer_types=["full_attention", "linear_attention", "linear_attention"], norm_topk_prob=False)),
    "qwen35": ("Qwen3_5", HYBRID),
    "qwen35, as many heads of keys": ("Qwen3_5", HYBRID | dict(linear_num_key_heads=4)),
    "qwen35moe": ("Qwen3_5Moe", HYBRID | FEW),
}  # fmt: skip


def build(case: tuple[str, dict]):
    """transformers' model of a case, with random weights that matter."""
    kind, settings = case
    torch.manual_seed(3)
    config = getattr(transformers, f"{kind}TextConfig", None) or getattr(transformers, f"{kind}Config")
    if kind == "Qwen3_5Moe":
        settings = {key: value for key, value in settings.items() if key != "intermediate_size"}
    model = getattr(transformers, f"{kind}ForCausalLM")._from_config(config(**settings), attn_implementation="eager")
    model = model.float().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if any(part in key for part in ("norm", "bias", "sinks")):
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif "gate.weight" in key or "router" in key:
                parameter.normal_(0, 0.3)
            elif "A_log" not in key:
                parameter.mul_(4)
    return model


def converted(case: str | tuple[str, dict], folder, type: str = "f32"):
    """(transformers' model, path of the GGUF made of its folder) of one of CASES, or of another one like them."""
    model = build(CASES[case] if isinstance(case, str) else case)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    convert(folder, folder / "model.gguf", type)
    return model, folder / "model.gguf"


def logits_of(model, tokens) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens))[None]).logits[0].float().numpy()


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_transformers_in_every_way_of_reading(name, tmp_path):
    model, path = converted(name, tmp_path)
    tokens = np.random.default_rng(5).integers(0, SIZE, 150)
    want = logits_of(model, tokens)
    giant = Giant.load(path, kv_cache="f32", exact=True, threads=2)
    try:
        together = giant.logits(tokens)
        session = giant.session()
        apart = np.stack([session.feed([int(token)]) for token in tokens])
        mixed = giant.session()  # lengths around tiles, pages and chunks; the prefix cache knows the beginning by now
        ends = [0, 1, 16, 17, 64, 65, 127, 128, 150]
        pieces = [mixed.feed(tokens[a:b]) for a, b in zip(ends[:-1], ends[1:])]
        warm = giant.session().feed(tokens)
        one = giant.session()
        one.feed(tokens[:70])
        others = [one.fork(), one.fork(), one]
        batch = np.stack([giant.feed_all(others, [int(t)] * 3) for t in tokens[70:75]])
    finally:
        giant.close()
    scale = max(1.0, float(np.abs(want).max()) / 10)
    assert np.abs(together - want).max() < 1e-3 * scale
    assert np.abs(apart - want).max() < 1e-3 * scale
    assert np.abs(np.stack(pieces) - want[np.array(ends[1:]) - 1]).max() < 1e-3 * scale
    assert np.abs(warm - want[-1]).max() < 1e-3 * scale
    assert np.abs(batch - want[70:75, None]).max() < 1e-3 * scale


@pytest.mark.parametrize("name", ["qwen3next", "qwen35", "mixtral"])
def test_rewinding_comes_back_to_the_same_state(name, tmp_path):
    model, path = converted(name, tmp_path)
    tokens = np.random.default_rng(6).integers(0, SIZE, 300)
    giant = Giant.load(path, kv_cache="f32", exact=True, threads=1)
    try:
        session = giant.session()
        session.feed(tokens)
        for n in (299, 200, 64, 63, 1):
            session.rewind(n)
            assert session.tokens == tokens[:n].tolist()
            logits = session.feed(tokens[n : n + 1])
            assert np.abs(logits - logits_of(model, tokens[: n + 1])[-1]).max() < 1e-3
    finally:
        giant.close()


def test_a_second_turn_reads_only_what_is_new_also_after_a_restart(tmp_path):
    _, path = converted("qwen3next", tmp_path)
    rng = np.random.default_rng(7)
    first, reply, more = (rng.integers(0, SIZE, n).tolist() for n in (1000, 70, 40))
    read: list[int] = []

    def load():
        giant = Giant.load(path, kv_cache="f32", exact=True, threads=1, prefix_folder=tmp_path / "prefixes")
        plain = giant._step

        def counted(tokens, *a, **k):
            read.append(len(tokens))
            return plain(tokens, *a, **k)

        giant._step = counted
        return giant

    giant = load()
    session = giant.session()
    session.feed(first)
    for token in reply:
        session.feed([token])
    read.clear()
    expected = giant.session().feed(first + reply + more)
    assert sum(read) <= len(more) + 64  # all but what is behind the last snapshot
    read.clear()
    edited = giant.session().feed(first[:900] + more)
    assert sum(read) <= 900 - 512 + len(more)
    giant.close()
    giant = load()
    read.clear()
    again = giant.session().feed(first + reply + more)
    assert sum(read) <= len(more) + 64
    assert np.abs(again - expected).max() < 1e-4
    fresh = giant.session()
    fresh.giant.prefixes.clear()
    fresh.giant.prefixes.folder = None
    assert np.abs(giant.session().feed(first[:900] + more) - edited).max() < 1e-4
    giant.close()


def test_experts_are_read_whether_stored_one_by_one_or_together(tmp_path):
    from safetensors.torch import load_file, save_file

    model, path = converted("qwen3moe", tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    fused = {k: v for k, v in state.items() if ".experts." not in k}
    for layer in range(2):
        begin = f"model.layers.{layer}.mlp.experts."
        get = lambda way, begin=begin: torch.stack([state[f"{begin}{i}.{way}_proj.weight"] for i in range(5)])
        fused[begin + "gate_up_proj"] = torch.cat([get("gate"), get("up")], 1).contiguous()
        fused[begin + "down_proj"] = get("down").contiguous()
    save_file(fused, tmp_path / "model.safetensors")
    convert(tmp_path, tmp_path / "fused.gguf", "f32")
    a, b = open_gguf(path), open_gguf(tmp_path / "fused.gguf")
    assert set(a.tensors) == set(b.tensors)
    for name in a.tensors:
        assert np.array_equal(a.array(name), b.array(name)), name


def test_fused_tensors_of_a_file_are_read_as_split_ones_are(tmp_path):
    """Old files of Qwen3-Next have ssm_in, sorted by head; others gate and up of experts in one tensor."""
    _, path = converted("qwen3next", tmp_path)
    file = open_gguf(path)
    nk, dk = 2, 16

    def changed(name: str, array: np.ndarray):
        block = name.rpartition(".attn_qkv")[0] or name.rpartition(".ffn_gate_exps")[0]
        if ".attn_qkv." in name:
            q, k, v = np.split(array, np.cumsum([nk * dk, nk * dk]))
            z = file.array(f"{block}.attn_gate.weight")
            parts = [x.reshape(nk, -1, array.shape[1]) for x in (q, k, v, z)]
            yield f"{block}.ssm_in.weight", np.concatenate(parts, 1).reshape(-1, array.shape[1])
        elif ".ffn_gate_exps." in name:
            yield (
                f"{block}.ffn_gate_up_exps.weight",
                np.concatenate([array, file.array(f"{block}.ffn_up_exps.weight")], 1),
            )
        elif ".ffn_up_exps." not in name and ".attn_gate." not in name:
            yield name, array

    old = rewritten(file, tmp_path / "old.gguf", changed)
    tokens = np.random.default_rng(8).integers(0, SIZE, 40)
    results = []
    for each in (path, old):
        giant = Giant.load(each, kv_cache="f32", exact=True, threads=1)
        results.append(giant.logits(tokens))
        giant.close()
    assert np.array_equal(*results)


def rewritten(file, path, changed):
    """Write a GGUF anew in float32; changed(name, array) yields what becomes of each tensor."""
    from organs.giant.convert import _add

    writer = gguf.GGUFWriter(path, file.architecture)
    for key, value in file.metadata.items():
        if not key.startswith(("GGUF.", "general.architecture")):
            _add(writer, key, value)
    for name in file.tensors:
        for new, array in changed(name, file.array(name)):
            writer.add_tensor(new, np.ascontiguousarray(array, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_mxfp4_experts_keep_their_bits(tmp_path):
    """gpt-oss's own files hold blocks and scales; a GGUF holds the same numbers in another order of nibbles."""
    from safetensors.torch import load_file, save_file

    from organs.giant.formats import MXFP4_VALUES

    converted("gpt-oss", tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    rng, want = np.random.default_rng(9), {}
    for layer in range(2):
        begin = f"model.layers.{layer}.mlp.experts."
        for way in ("gate_up_proj", "down_proj"):
            experts, columns, rows = state.pop(begin + way).shape
            blocks = rng.integers(0, 256, (experts, rows, columns // 32, 16), dtype=np.uint8)
            scales = rng.integers(120, 126, (experts, rows, columns // 32), dtype=np.uint8)
            state[begin + way + "_blocks"], state[begin + way + "_scales"] = torch.tensor(blocks), torch.tensor(scales)
            codes = np.stack([blocks & 15, blocks >> 4], -1).reshape(experts, rows, columns // 32, 32)
            numbers = MXFP4_VALUES[codes] * np.exp2(scales[..., None].astype(np.float32) - 128)
            want[layer, way] = numbers.reshape(experts, rows, columns).astype(np.float32)
    save_file(state, tmp_path / "model.safetensors")
    convert(tmp_path, tmp_path / "mx.gguf", "q8_0")
    file = open_gguf(tmp_path / "mx.gguf")
    for layer in range(2):
        assert file.tensors[f"blk.{layer}.ffn_down_exps.weight"].format == "MXFP4"
        assert np.array_equal(file.array(f"blk.{layer}.ffn_down_exps.weight"), want[layer, "down_proj"])
        assert np.array_equal(file.array(f"blk.{layer}.ffn_gate_exps.weight"), want[layer, "gate_up_proj"][:, ::2])
        assert np.array_equal(file.array(f"blk.{layer}.ffn_up_exps.weight"), want[layer, "gate_up_proj"][:, 1::2])
    giant = Giant.load(tmp_path / "mx.gguf", threads=1)
    assert np.isfinite(giant.logits([1, 2, 3])).all()
    giant.close()


# --- Experts on disk. ---


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Path of a hybrid with 64 experts in each of 8 layers."""
    settings = HYBRID | FEW | dict(num_experts=64, num_experts_per_tok=4, num_hidden_layers=8)
    return converted(("Qwen3Next", settings), tmp_path_factory.mktemp("many"))[1]


def on_disk(path, slots: int, monkeypatch, **settings) -> Giant:
    """Loaded with room for so many experts."""
    from organs.giant.residency import Residency

    start = Residency.start
    monkeypatch.setattr(Residency, "start", lambda self, budget: start(self, slots * self.slot_bytes))
    return Giant.load(path, offload="disk", ram=1, **settings)


@pytest.mark.parametrize("slots, threads, prefetch, kind", [(16, 2, True, "f32"), (16, 1, False, "q8"), (100, 2, True, "q4"),
                                                            (400, 2, True, "f16"), (512, 1, True, "bf16")])  # fmt: skip
def test_experts_on_disk_compute_bit_for_bit_what_those_in_memory_do(many, monkeypatch, slots, threads, prefetch, kind):
    tokens = np.random.default_rng(5).integers(0, SIZE, 200).tolist()

    def results(giant):
        session = giant.session()
        parts = [giant.logits(tokens), session.feed(tokens[:33]), session.feed(tokens[33:50])]
        parts += [session.feed([token]) for token in tokens[50:90]]
        report = giant.residency.report() if giant.residency else {}
        giant.close()
        return np.concatenate([part.reshape(-1) for part in parts]), report

    want, _ = results(Giant.load(many, threads=threads, kv_cache=kind))
    got, report = results(on_disk(many, slots, monkeypatch, threads=threads, kv_cache=kind, prefetch=prefetch))
    assert np.array_equal(got, want)
    assert report["slots"] == slots
    assert 0 <= report["hits"] <= report["wanted"] and report["wanted"] > 0
    assert (report["guessed"] > 0) == prefetch
    if slots == 512:
        assert report["bytes"] <= 2 * 512 * (report["slot_bytes"] + 3 * 8192)  # each expert once


def test_tables_of_experts_on_disk_agree_whatever_came_and_went(many, monkeypatch):
    giant = on_disk(many, 40, monkeypatch, threads=2)
    session, rng = giant.session(), np.random.default_rng(6)
    session.feed(rng.integers(0, SIZE, 40).tolist())
    for token in rng.integers(0, SIZE, 60).tolist():
        session.feed([token])
    residency = giant.residency
    residency._settle()
    owner, slot_of, where = residency.owner, residency.arrays["slot_of"], residency.where.reshape(-1, 3)
    slots = np.flatnonzero(owner >= 0)
    assert np.array_equal(slot_of[owner[slots]], slots) and np.count_nonzero(slot_of >= 0) == len(slots)
    begins = residency.arrays["pool"].ctypes.data + slots * residency.slot_bytes
    assert np.array_equal(where[owner[slots], 0], begins) and np.count_nonzero(where[:, 0]) == len(slots)
    assert not residency.arrays["left"].any()
    report = residency.report()
    assert 0 < report["ahead"] and 0 < report["right"] <= report["guessed"] and report["hidden"] <= 1
    worth = residency.arrays["worth"].reshape(-1, residency.experts)[: giant.shape.layers]
    assert ((0 <= worth) & (worth <= 1)).all() and (worth.max(1) > 0.2).all()
    giant.close()


def test_a_file_that_is_cut_under_way_is_an_error_and_the_giant_lives_on(many, monkeypatch, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(many.read_bytes())
    giant = on_disk(path, 16, monkeypatch, threads=2)
    giant.session().feed([1])
    whole = path.read_bytes()
    with open(path, "r+b") as file:
        file.truncate(len(whole) // 4)
    with pytest.raises(GGUFError, match="an expert cannot be read"):
        giant.logits(list(range(100)))
    path.open("r+b").write(whole)
    fresh = Giant.load(many, threads=2)
    assert np.array_equal(giant.logits(list(range(100))), fresh.logits(list(range(100))))
    giant.close()
    fresh.close()


def test_too_little_memory_is_said_before_anything_is_read(many):
    with pytest.raises(GGUFError, match=r"GB are left for experts, which hold \d+; at least 16 \(.* GB\) are needed"):
        Giant.load(many, offload="disk", ram=0.01)


# --- Settings by environment. ---

SETTINGS = ("MODEL", "TOKENIZER", "CONTEXT", "OFFLOAD", "KV_CACHE", "NO_PREFETCH", "TEMPERATURE", "TOP_P", "TOP_K",
            "REPEAT_PENALTY", "PRESENCE_PENALTY")  # fmt: skip
THEIRS = dict(MODEL="MODEL_PATH", TOKENIZER="TOKENIZER_PATH", CONTEXT="CONTEXT_LENGTH", KV_CACHE="KV_CACHE_QUANT")


@pytest.mark.parametrize("prefix, names", [
    ("ORGANISM_GIANT_", {name: name for name in SETTINGS}),
    ("PARAMECIA_", {name: THEIRS.get(name, name) for name in SETTINGS}),
])  # fmt: skip
def test_the_environment_sets_what_was_not_given(many, monkeypatch, tmp_path, prefix, names):
    """A value of each, and what it changes."""
    import json
    from types import SimpleNamespace

    from organs.giant import commands

    save_tokenizer(tmp_path)
    other = json.loads((tmp_path / "tokenizer.json").read_text())
    other["model"]["merges"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    values = (str(many), str(tmp_path / "tokenizer.json"), "99", "disk", "q8_0", "1", "0.25", "0.5", "7", "1.5", "0.75")
    for name, value in zip(SETTINGS, values, strict=True):
        monkeypatch.setenv(prefix + names[name], value)
    said: list[str] = []
    asking = SimpleNamespace(threads=1, seed=None, note=said.append)
    giant = commands.load(asking, None)
    plain = Giant.load(many, threads=1)
    assert (giant.context, giant.residency.is_prefetching) == (99, False)
    assert giant._page_bytes < plain._page_bytes * 0.6  # 8 bits
    assert len(giant.tokenize("tokenizer")) == 9 > len(plain.tokenize("tokenizer"))  # without merges, a token a byte
    giant.close()
    plain.close()
    options = dict.fromkeys(commands.SAMPLING) | dict(top_k=3)
    assert commands._settings(asking, options) == dict(temperature=0.25, top_p=0.5, top_k=3, repetition_penalty=1.5,
                                                       presence_penalty=0.75)  # fmt: skip
    monkeypatch.setenv(prefix + names["CONTEXT"], "many")
    with pytest.raises(UsageError, match="should be a number"):
        commands.load(asking, None)


def test_device_and_memory_come_from_the_environment_too(many, monkeypatch):
    from types import SimpleNamespace

    from organs.giant import commands

    for name, value in dict(DEVICE="torch", OFFLOAD="up", VRAM="2.5").items():
        monkeypatch.setenv("ORGANISM_GIANT_" + name, value)
    giant = commands.load(SimpleNamespace(threads=1, seed=None, note=lambda text: None), str(many), context=64)
    assert (giant.accelerator.kind, giant.accelerator.budget) == ("torch", 2_500_000_000)
    giant.close()
    monkeypatch.delenv("ORGANISM_GIANT_DEVICE")
    monkeypatch.setenv("ORGANISM_GIANT_OFFLOAD", "disk")
    monkeypatch.setenv("ORGANISM_GIANT_RAM", "0.01")
    with pytest.raises(OrganismError, match="GB are left for experts"):
        commands.load(SimpleNamespace(threads=1, seed=None, note=lambda text: None), str(many), context=64)


def test_a_model_that_nobody_named_and_a_tokenizer_that_is_none(many, tmp_path, monkeypatch):
    from organs.giant import commands

    monkeypatch.delenv("ORGANISM_GIANT_MODEL", raising=False)
    with pytest.raises(UsageError, match="Which model"):
        commands.named(None)
    giant = Giant.load(many, threads=1)
    with pytest.raises(OrganismError, match="There is no tokenizer at"):
        giant.use_tokenizer(tmp_path / "nowhere.json")
    (tmp_path / "large.json").write_text('{"model": {"type": "BPE", "vocab": {"a": 99999}, "merges": []}}')
    with pytest.raises(OrganismError, match="belongs to another one"):
        giant.use_tokenizer(tmp_path / "large.json")
    giant.close()


# --- Bad input. ---


def broken(tmp_path, changed, name="qwen2moe"):
    _, path = converted(name, tmp_path)
    return rewritten(open_gguf(path), tmp_path / "broken.gguf", changed)


def test_nan_in_a_router_is_an_error_that_names_the_layer(tmp_path):
    def changed(name, array):
        if name == "blk.1.ffn_gate_inp.weight":
            array = array.copy()
            array[2, 3] = np.nan
        yield name, array

    giant = Giant.load(broken(tmp_path, changed), threads=1)
    for tokens in ([1], [1, 2, 3]):
        with pytest.raises(GGUFError, match="the router of layer 1 gives no numbers"):
            giant.session().feed(tokens)
    giant.close()


@pytest.mark.parametrize("part, message", [
    ("ffn_down_shexp", "it lacks the tensor blk.0.ffn_down_shexp.weight"),
    ("ffn_gate_shexp", "shared expert only a part is there"), ("ffn_up_exps", "lacks the tensor blk.0.ffn_up_exps.weight"),
])  # fmt: skip
def test_a_missing_expert_tensor_is_named(part, message, tmp_path):
    path = broken(tmp_path, lambda name, array: [] if f".{part}." in name else [(name, array)])
    with pytest.raises(GGUFError, match=message):
        Giant.load(path)


def test_counts_of_experts_that_disagree_are_named(tmp_path):
    path = broken(tmp_path, lambda name, array: [(name, array[:4] if "ffn_up_exps" in name else array)])
    with pytest.raises(GGUFError, match=r"blk.0.ffn_up_exps.weight has the shape \(4, 32, 64\), not \(6, 32, 64\)"):
        Giant.load(path)


def test_a_folder_that_lacks_an_expert_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    converted("qwen3moe", tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.layers.1.mlp.experts.3.up_proj.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(OrganismError, match="4 of 5 experts have their up_proj; expert 3 has none"):
        convert(tmp_path, tmp_path / "new.gguf")
    assert not (tmp_path / "new.gguf").exists()


# --- Planning. ---


@pytest.fixture(scope="module")
def many_sizes(many):
    from organs.giant import plan

    with open_gguf(many) as file:
        return plan.Sizes.of(file, 256, "f16")


def test_a_plan_takes_memory_where_it_fits_and_the_disk_where_not(many_sizes):
    from organs.giant import plan

    sizes = many_sizes
    assert (sizes.used, sizes.count, sizes.layers) == (4, 64, 8)
    assert sizes.experts == 64 * 8 * sizes.expert and sizes.active < sizes.dense + sizes.experts // 10
    ample, none = sizes.dense + sizes.experts + sizes.cache + (300 << 20), 1 << 20
    half = ample - (100 << 20) - sizes.experts // 2

    def first(ram):
        best = plan.best_of(list(plan.choices(sizes, plan.Machine(ram, 2e10, plan.Reading(0, 1e-3)))))
        return best and best.offload

    assert [first(ram) for ram in (ample, half, none)] == ["none", "disk", None]


def test_a_plan_puts_on_an_accelerator_what_fits_there(many_sizes):
    from organs.giant import plan
    from organs.giant.accelerator import Speeds

    sizes, fast = many_sizes, Speeds(1e11, 1e10, 0)
    rest = sizes.dense + sizes.cache + plan.WORKSPACE

    def best(vram, ram=1e12, speeds=fast):
        found = plan.best_of(list(plan.choices(sizes, plan.Machine(ram, 2e10, plan.Reading(0, 1e-3), vram, speeds))))
        return found and found.offload

    host = sizes.experts + plan.INTERPRETER
    assert best(rest + sizes.experts) == "none"
    assert best(rest + sizes.experts - 1) == "up"
    assert best(rest + sizes.experts // 2) == "updown"
    assert best(rest) == "experts"
    assert best(rest, host - 1) == "disk"
    assert best(rest - 1) is None
    assert best(rest + sizes.experts, speeds=Speeds(float("nan"), float("nan"), 0)) == "none"  # by what fits alone


def test_a_dense_model_is_split_by_layers(small_llama):
    from organs.giant import plan

    with open_gguf(small_llama) as file:
        sizes = plan.Sizes.of(file, 256, "f16")
    half = plan.WORKSPACE + sizes.table + (sizes.dense - sizes.table + sizes.cache) // 2 + 4096
    found = list(plan.choices(sizes, plan.Machine(1e12, 2e10, None, half)))
    assert [(choice.offload, choice.fits) for choice in found] == [("none", False), ("layers=1", True)]


def test_fewer_experts_in_memory_miss_more():
    from organs.giant.plan import miss_rate

    rates = [miss_rate(share, 512, 10) for share in (0.1, 0.25, 0.5, 0.9, 1.0)]
    assert rates == sorted(rates, reverse=True) and rates[-1] == 0 and 0.1 < rates[2] < 0.25


def test_waiting_for_the_disk_is_reckoned_from_what_is_away_and_what_computing_hides():
    from organs.giant import plan

    reading = plan.Reading(first=1e-3, each=2e-3)
    late = 1 - plan.FORESEEN
    # What was foreseen is there when the router chooses …
    assert reading.waiting(1, 1.0, before=1.0, within=0.0) == pytest.approx(1e-3 + 2e-3 * late)
    assert reading.waiting(1, 1.0, 0.0, 0.0) == pytest.approx(1e-3 + 2e-3 * (late + plan.FORESEEN * plan.IN_VAIN))
    assert reading.waiting(2, 0.5, 1.0, 0.0) == pytest.approx(0.75e-3 + 2e-3 * late)
    # … and while one of two is there, it is computed.
    assert reading.waiting(2, 0.5, 1.0, 1.0) == pytest.approx(0.25 * (1e-3 + 4e-3 * late))
    assert reading.waiting(2, 0.0, 0.0, 0.0) == 0
    assert plan._not_hidden(0.1, 1.0) == pytest.approx(0.07) and plan._not_hidden(0.1, 0.01) == pytest.approx(0.09)


def test_reading_experts_is_measured_by_what_serves_them(many):
    from organs.giant.residency import reading_seconds

    with open_gguf(many) as file:
        first, each, work = reading_seconds(file, seconds=0.05)
    assert first >= 0 and each > 0 and work > 0 and first + each < 1


def test_a_model_that_does_not_fit_is_refused_before_it_is_read_with_what_would(many, monkeypatch, many_sizes):
    from organs.giant import giant as engine
    from organs.giant import plan

    least = many_sizes.dense + many_sizes.experts + plan.INTERPRETER - 1
    monkeypatch.setattr(engine, "free_memory", lambda: least)
    with pytest.raises(GGUFError, match="it needs .* GB of memory, and there are .* GB; --offload disk fits"):
        Giant.load(many, context=256)
    monkeypatch.setattr(engine, "free_memory", lambda: 1 << 20)
    with pytest.raises(GGUFError, match="a smaller model or format is needed"):
        Giant.load(many, context=256)


def test_a_snapshot_of_another_model_or_kind_of_cache_is_not_taken(tmp_path):
    """The folder is the same; what is in it belongs to one model with one kind of cache."""
    _, path = converted("qwen3next", tmp_path)
    other = tmp_path / "other.gguf"
    other.write_bytes(path.read_bytes())
    tokens = np.random.default_rng(3).integers(0, SIZE, 600)
    folder = tmp_path / "prefixes"
    for model, kind, read_from in ((path, "f16", 0), (other, "f16", 0), (path, "q8", 0), (path, "f16", 576)):
        giant = Giant.load(model, kv_cache=kind, threads=1, prefix_folder=folder)
        session = giant.session()
        session.feed(tokens)
        assert session.read_from == read_from, (model.name, kind)
        giant.close()
