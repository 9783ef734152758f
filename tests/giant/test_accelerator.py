"""A model on an accelerator, all or in part: torch's CPU stands for it here, by the same code.

Run alone: pytest -n 0 tests/giant/test_accelerator.py
"""

from __future__ import annotations

import os

import numpy as np
import pytest

from organs.giant import GGUFError, Giant, open_gguf
from organs.giant.formats import FORMATS, dequantise

from .test_convert import SIZE

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from organs.giant import plan, torch_formats, torch_layers  # noqa: E402
from organs.giant.accelerator import Accelerator, AcceleratorFull, device_of  # noqa: E402

from .test_experts import FEW, HYBRID, converted, logits_of, rewritten  # noqa: E402

MODES = ("none", "up", "updown", "experts", "layers=0", "layers=2", "disk")
CACHES = dict(f32=2e-4, f16=5e-3, bf16=5e-2, q8=2e-2, q4=0.3)  # and how far logits of ±10 may be from those of f32


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads of torch wait for each other by turning; beside other tests that takes for ever."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    """(transformers' model, path) of a Qwen3-Next: recurrent layers, gated attention, experts, a shared one."""
    return converted("qwen3next", tmp_path_factory.mktemp("hybrid"))


def placed(path, offload="none", **settings) -> Giant:
    settings = dict(kv_cache="f32", exact=True, threads=1, device="torch") | settings
    return Giant.load(path, offload=offload, **settings)


def distance(got: np.ndarray, want: np.ndarray) -> float:
    """The largest difference, of logits scaled to ±10 where they are larger."""
    return float(np.abs(got - want).max() / max(1.0, np.abs(want).max() / 10))


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_means_the_same_numbers_as_in_numpy(name):
    raw = np.random.default_rng(1).integers(0, 256, (64, FORMATS[name].nbytes), np.uint8)
    with np.errstate(invalid="ignore", over="ignore"):
        want = dequantise(raw.reshape(-1), name).reshape(64, -1)
    assert np.array_equal(torch_formats.dequantise(torch.from_numpy(raw), name).numpy(), want, equal_nan=True)


@pytest.mark.parametrize(
    "name", ["mixtral", "qwen2moe", "olmoe, clipped", "gpt-oss", "qwen35", "qwen3next, other heads"]
)
def test_logits_equal_those_of_transformers(name, tmp_path):
    model, path = converted(name, tmp_path)
    tokens = np.random.default_rng(5).integers(0, SIZE, 90)
    want = logits_of(model, tokens)
    giant = placed(path)
    try:
        assert distance(giant.logits(tokens), want) < 1e-3
        session = giant.session()
        apart = np.stack([session.feed([int(token)]) for token in tokens[:20]])
        assert distance(apart, want[:20]) < 1e-3
    finally:
        giant.close()


@pytest.mark.parametrize("offload", MODES)
def test_results_are_the_same_in_every_mode(offload, hybrid):
    """Cold and warm, at once, in pieces around pages and chunks, token by token, and several sequences together."""
    model, path = hybrid
    tokens = np.random.default_rng(6).integers(0, SIZE, 150)
    want = logits_of(model, tokens)
    settings = dict(ram=2.0) if offload == "disk" else {}
    giant = placed(path, offload, **settings)
    try:
        assert distance(giant.logits(tokens), want) < 1e-3
        session, ends = giant.session(), [0, 1, 63, 64, 65, 128, 129, 150]
        pieces = [session.feed(tokens[a:b]) for a, b in zip(ends[:-1], ends[1:])]
        assert distance(np.stack(pieces), want[np.array(ends[1:]) - 1]) < 1e-3
        assert distance(giant.session().feed(tokens), want[-1]) < 1e-3  # the prefix tree knows the beginning by now
        sessions = [giant.session() for _ in range(2)]
        for each in sessions:
            each.feed(tokens[:70])
        for token in tokens[70:74]:
            got = giant.feed_all(sessions, [int(token)] * 2)
        assert distance(got, np.stack([want[73]] * 2)) < 1e-3
        assert giant.routes(2).shape == (4, 2, 3)
    finally:
        giant.close()


@pytest.mark.parametrize("kind", CACHES)
def test_every_kind_of_cache_works_there_and_comes_back(kind, hybrid):
    model, path = hybrid
    tokens = np.random.default_rng(7).integers(0, SIZE, 140)
    want = logits_of(model, tokens)
    giant = placed(path, kv_cache=kind)
    try:
        session = giant.session()
        assert distance(session.feed(tokens[:130]), want[129]) < CACHES[kind]
        other = session.fork()
        plain = session.feed(tokens[130:])
        assert distance(plain, want[-1]) < CACHES[kind]
        assert distance(other.feed(tokens[130:]), plain) < 1e-4  # out of pages that were copied there and back
        session.rewind(100)
        assert distance(session.feed(tokens[100:]), want[-1]) < CACHES[kind]
    finally:
        giant.close()


def test_what_prefetch_does_is_counted_and_changes_no_result(tmp_path):
    wide = HYBRID | FEW | dict(num_experts=64, num_experts_per_tok=4, num_hidden_layers=4)
    _, path = converted(("Qwen3Next", wide), tmp_path)
    tokens, results = np.random.default_rng(8).integers(0, SIZE, 60).tolist(), []
    size = plan.Sizes.of(open_gguf(path), 64, "f32")
    few = (size.dense + size.experts + plan.WORKSPACE) / 1e9  # of up and down, only the least fits beside the rest
    for prefetch in (True, False):
        giant = placed(path, "updown", prefetch=prefetch, vram=few, context=64)
        session = giant.session()
        session.feed(tokens[:20])
        results.append(np.stack([session.feed([token]) for token in tokens[20:]]))
        report = giant.accelerator.report()
        giant.close()
        assert 0 < report["hits"] < report["wanted"] and 0 <= report["hidden"] <= 1
        assert (report["guessed"] > 0) == prefetch and report["right"] <= report["guessed"]
        assert report["bytes"] > 0 and report["copying"] > 0 and report["up"] > 0 and report["down"] > 0
    assert np.array_equal(*results)


def test_an_expert_that_cannot_be_copied_is_an_error_and_the_giant_lives_on(hybrid):
    _, path = hybrid
    giant = placed(path, "up")
    want = giant.logits([1, 2, 3])
    slots = giant._runner.placed.slots
    slots.slot_of.clear()
    slots.coming.clear()
    slots.free = list(range(slots.count))
    hosts, slots.hosts = slots.hosts, {layer: host[:, :-1] for layer, host in slots.hosts.items()}
    narrow, slots.pool = slots.pool, slots.pool[:, :1]
    with pytest.raises(GGUFError, match="expert .* of layer .* cannot be copied to the accelerator"):
        giant.session().feed([1, 2, 3])
    slots.hosts, slots.pool = hosts, narrow
    assert np.array_equal(giant.logits([1, 2, 3]), want)
    giant.close()


def test_memory_that_is_full_in_the_middle_of_a_turn_ends_it_and_the_context_stays(hybrid):
    model, path = hybrid
    tokens = np.random.default_rng(9).integers(0, SIZE, 1400)
    giant = placed(path, context=2048)
    session = giant.session()
    session.feed(tokens[:200])
    giant.accelerator.budget = giant.accelerator.held + 40_000  # room for some hundred positions more
    with pytest.raises(AcceleratorFull, match="the accelerator's .* GB are full"):
        session.feed(tokens[200:])  # its first pieces fit, and the states of recurrent layers have gone on
    assert session.tokens == tokens[:200].tolist()
    giant.accelerator.budget = 1 << 40
    want = logits_of(model, tokens[:230])
    assert distance(session.feed(tokens[200:230]), want[-1]) < 1e-3
    giant.close()


def test_nan_in_a_router_is_an_error_there_too(hybrid, tmp_path):
    def changed(name, array):
        yield (
            name,
            np.where(np.arange(array.shape[0])[:, None] == 2, np.nan, array)
            if "blk.1.ffn_gate_inp.w" in name
            else array,
        )

    path = rewritten(open_gguf(hybrid[1]), tmp_path / "nan.gguf", changed)
    giant = placed(path)
    for tokens in ([1], [1, 2, 3]):
        with pytest.raises(GGUFError, match="the router of layer 1 gives no numbers"):
            giant.session().feed(tokens)
    giant.close()


def test_what_does_not_fit_is_said_before_anything_is_loaded_with_what_would(hybrid):
    with pytest.raises(
        GGUFError, match=r"it needs .* GB of memory and .* GB of the accelerator's, .*; a smaller model"
    ):
        placed(hybrid[1], vram=0.2)
    with pytest.raises(ValueError, match="offload is 'most'; it can be none, up"):
        placed(hybrid[1], "most")
    with pytest.raises(ValueError, match="device is 'tpu'; it can be auto, cpu, cuda, mps"):
        placed(hybrid[1], device="tpu")


def test_auto_chooses_what_fits_and_says_why(hybrid):
    said: list[str] = []
    giant = placed(hybrid[1], "auto", say=said.append)
    assert "all on the accelerator" in said[-1] or "computed by the CPU" in said[-1] or "are copied" in said[-1]
    assert "tokens/s" in said[-1]
    giant.close()
    giant = placed(hybrid[1], "auto", device="cpu", say=said.append)
    assert said[-1].startswith("--offload") and giant.accelerator is None
    giant.close()


def test_without_an_accelerator_its_modes_are_the_cpus(hybrid):
    said: list[str] = []
    giant = placed(hybrid[1], "experts", device="cpu", say=said.append)
    assert said == ["there is no accelerator: --offload experts is as none, all on the CPU"]
    giant.close()


def test_a_chunk_of_the_recurrence_equals_its_steps():
    torch.manual_seed(0)
    heads, n, key, value = 3, 50, 8, 5
    q, k = torch.randn(2, heads, n, key, dtype=torch.float64)
    k = k / k.norm(dim=-1, keepdim=True)
    v, state = torch.randn(heads, n, value, dtype=torch.float64), torch.randn(heads, key, value, dtype=torch.float64)
    decay, beta = -torch.rand(heads, n, dtype=torch.float64), torch.rand(heads, n, dtype=torch.float64)
    out, after = torch_layers._chunk(q, k, v, decay, beta, state)
    for t in range(n):
        state = state * decay[:, t, None, None].exp()
        delta = beta[:, t, None] * (v[:, t] - torch.einsum("hkv,hk->hv", state, k[:, t]))
        state = state + k[:, t, :, None] * delta[:, None]
        assert torch.allclose(out[:, t], torch.einsum("hkv,hk->hv", state, q[:, t]))
    assert torch.allclose(after, state)


@pytest.mark.cuda
@pytest.mark.parametrize("offload", ["none", "up", "updown", "experts", "layers=2"])
def test_a_cuda_device_computes_what_the_cpu_does(offload, hybrid):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    tokens = np.random.default_rng(6).integers(0, SIZE, 150)
    giant = placed(hybrid[1], offload, device="cuda")
    assert distance(giant.logits(tokens), logits_of(hybrid[0], tokens)) < 1e-3
    giant.close()


def test_devices_by_name():
    assert device_of("cpu") == "cpu" and device_of("torch") == "torch"
    assert device_of("auto") == (
        "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    )
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="there is no cuda device"):
            device_of("cuda")
    assert Accelerator("torch", 1000).budget == 1000
