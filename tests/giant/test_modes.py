"""Every mode × kind of cache × cold or warm × length of a prompt around the edges of tiles, pages and chunks: the same logits.

A mode is where the model is: in memory or on disk, on the CPU or on an accelerator (torch's CPU stands for it), all or in part.
Each mode has a home whose results it must have: all in the CPU's memory, or all in the accelerator's, where attention is there
(the two store 4 bits in different ways). All must agree with transformers as far as their kind of cache lets them.

Cold, nothing of a prompt is known. Warm, its beginning comes from the prefix tree, from the tree's folder after a restart, or
is an earlier turn of the session.

Run alone: pytest -n 0 tests/giant/test_modes.py
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from organs.giant import Giant, open_gguf
from organs.giant.cache import PAGE

from .test_convert import SIZE

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from organs.giant import plan, program  # noqa: E402

from .test_experts import COMMON, FEW, HYBRID, converted, logits_of  # noqa: E402

CHUNK = 128  # tokens of a prompt that these giants read together: a quarter of the usual, so that edges come early
LENGTHS = (1, 63, 64, 65, 127, 128, 129)
TOKENS = np.random.default_rng(6).integers(0, SIZE, LENGTHS[-1] + 1)
LAYERS = ["linear_attention", "full_attention"]
MODELS = {  # as test_experts.CASES
    "hybrid": ("Qwen3Next", HYBRID | FEW | dict(num_hidden_layers=2, layer_types=LAYERS, num_experts=16)),
    "gpt-oss": ("GptOss", COMMON | dict(num_local_experts=8, num_experts_per_tok=2, head_dim=32, sliding_window=24)),
}  # recurrent states and a shared expert; a window, sinks and biases
MODES = {  # name: (device, offload, home)
    "cpu": ("cpu", "none", "cpu"),
    "cpu, disk": ("cpu", "disk", "cpu"),
    "torch": ("torch", "none", "torch"),
    "up": ("torch", "up", "torch"),
    "updown": ("torch", "updown", "torch"),
    "experts": ("torch", "experts", "torch"),
    "torch, disk": ("torch", "disk", "torch"),
    "layers=1": ("torch", "layers=1", None),
    "layers=0": ("torch", "layers=0", "cpu"),
}
KINDS = {  # of cache: how far logits of ±10 may be from transformers with float32, from home, from cold to warm
    "f32": (2e-4, 1e-4, 1e-4), "f16": (5e-3, 2e-3, 2e-3), "bf16": (5e-2, 2e-2, 2e-2), "q8": (2e-2, 2e-3, 2e-3),
    "q4": (0.3, 2e-3, 0.3), "q8/q4": (0.3, 2e-3, 2e-3),
}  # fmt: skip
# A page's keys become 4 bits when it is full, and the piece of a prompt that fills it still sees them whole; one that finds it
# in the tree does not. And a router that hesitates may choose another expert for keys that were rounded.
UNDECIDED = 0.25  # of the lengths at most, which need not be near to transformers where the cache rounds


@dataclass
class Case:
    """A giant in one mode with one kind of cache, and what it is compared with."""

    giant: Giant
    model: str
    mode: str
    kind: str
    want: np.ndarray  # transformers' logits of TOKENS
    known: dict[tuple[str, str, str], np.ndarray] = field(repr=False)  # by (model, mode, kind): results of cases so far

    @property
    def results(self) -> np.ndarray:
        """float32 [cold and warm, lengths, 2, vocabulary]: logits after each prompt and after the token behind it.

        Warm, the prompt was read a moment ago: what is read anew is what follows its last full page.
        """
        key = self.model, self.mode, self.kind
        if key not in self.known:
            found = []
            for n in LENGTHS:
                self.giant.prefixes.clear()
                cold = self.read(n)
                found.append([cold, self.read(n, known(n)) if known(n) else cold])
            self.known[key] = np.stack(found, 1)
        return self.known[key]

    def read(self, n: int, begin: int = 0) -> np.ndarray:
        """float32 [2, vocabulary] of a fresh session; begin: how many of the tokens are known."""
        session = self.giant.session()
        first = session.feed(TOKENS[:n])
        assert session.read_from == begin, f"a prompt of {n} tokens was read from {session.read_from} on"
        return np.stack([first, session.feed(TOKENS[n : n + 1])])

    def check(self, got: np.ndarray, want: np.ndarray, most: float, what: str, undecided: float = 0.0) -> None:
        """Fail unless logits [lengths, …] are the same but for `most`, scaled where they are beyond ±10."""
        scale = max(1.0, float(np.abs(want).max()) / 10)
        off = np.abs(got - want).reshape(len(LENGTHS), -1).max(1) / scale
        assert np.mean(off > most) <= undecided, f"{what}: off by {dict(zip(LENGTHS, off.tolist()))}, {most} is allowed"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, tuple[Path, np.ndarray]]:
    """Of each model: (path, transformers' logits of TOKENS)."""
    made = {}
    for name, case in MODELS.items():
        model, path = converted(case, tmp_path_factory.mktemp("modes"))
        made[name] = path, logits_of(model, TOKENS)
    return made


@pytest.fixture(scope="module")
def surroundings():
    """Short chunks on both sides; and one thread of torch, since more wait for each other by turning."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "LONGEST_CHUNK", CHUNK)
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def results() -> dict[tuple[str, str, str], np.ndarray]:
    return {}


def each(*modes: str) -> Any:
    """A case of each kind of cache and of these modes, and of most for the second model; all that need one giant run together."""
    kinds = {model: [kind for kind in KINDS if model == "hybrid" or kind not in ("bf16", "q8/q4")] for model in MODELS}
    params = [(model, kind, mode) for model in MODELS for kind in kinds[model] for mode in modes]
    return pytest.mark.parametrize("case", params, ids=", ".join, indirect=True, scope="module")


@pytest.fixture(scope="module")
def case(request, files, surroundings, results):
    model, kind, mode = request.param
    path, want = files[model]
    giant = loaded(path, mode, kind)
    assert giant._chunk == CHUNK
    yield Case(giant, model, mode, kind, want, results)
    giant.close()


def loaded(path: Path, mode: str, kind: str) -> Giant:
    """A giant; where experts are read or copied when they are wanted, as few stay as there can be."""
    device, offload, _ = MODES[mode]
    settings: dict[str, Any] = dict(context=512, kv_cache=kind, exact=True, threads=1, device=device, offload=offload)
    if offload in ("up", "updown"):
        with open_gguf(path) as file:
            sizes = plan.Sizes.of(file, 512, kind)
        machine = plan.Machine(1e12, 1e10, None, 1.0, plan.Speeds(1e10, 1e10, 0))
        settings["vram"] = next(c.vram for c in plan.choices(sizes, machine) if c.offload == offload) / 1e9
    if offload == "disk":
        probe = Giant.load(path, **settings, ram=1.0)
        assert probe.residency is not None
        slots = plan.LEAST * probe.residency.used
        settings["ram"] = (probe._fixed_bytes() + (slots + 0.5) * probe.residency.slot_bytes) / 1e9
        probe.close()
    return Giant.load(path, **settings)


@each(*MODES)
def test_a_cold_prompt_gives_the_logits_of_the_home_mode(case):
    near, same, _ = KINDS[case.kind]
    want = np.stack([case.want[n - 1 : n + 1] for n in LENGTHS])
    case.check(case.results[0], want, near, "transformers", 0 if case.kind == "f32" else UNDECIDED)
    device, _, home = MODES[case.mode]
    if home is not None:  # modes come in an order in which its results are known
        same = 0 if device == "cpu" or case.mode == "layers=0" else same
        case.check(case.results[0], case.known[case.model, home, case.kind][0], same, home)


@each(*MODES)
def test_a_warm_prompt_gives_the_logits_of_a_cold_one(case):
    cold, warm = case.results
    case.check(warm, cold, KINDS[case.kind][2], "cold")


@each("cpu", "torch")
def test_a_prompt_that_comes_back_from_disk_gives_the_logits_of_a_warm_one(case, tmp_path):
    prefixes, found = case.giant.prefixes, []
    prefixes.clear()
    prefixes.folder = tmp_path
    try:
        for n in LENGTHS[-2:]:
            case.giant.session().feed(TOKENS[:n])
            prefixes.clear()  # as a new process, which knows what is on disk
            found.append(case.read(n, known(n)))
    finally:
        prefixes.folder = None
    warm = case.results[1, -2:]
    assert np.abs(np.stack(found) - warm).max() <= KINDS[case.kind][1] * max(1.0, float(np.abs(warm).max()) / 10)


@each("cpu", "torch", "layers=1")
def test_turns_give_the_logits_of_one_prompt(case):
    """Each length is a turn of one session, and behind it a fork goes on."""
    case.giant.prefixes.clear()
    session, found = case.giant.session(), []
    for before, n in zip((0, *LENGTHS), LENGTHS):
        first = session.feed(TOKENS[before:n])
        found.append(np.stack([first, session.fork().feed(TOKENS[n : n + 1])]))
    case.check(np.stack(found), case.results[0], KINDS[case.kind][0], "one prompt")


def known(n: int) -> int:
    """Up to where a prompt is known that was fed before: its last token's logits are wanted, and short ones are not looked up."""
    return (n - 1) // PAGE * PAGE
