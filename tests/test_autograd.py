"""Chapter 2: every operation against finite differences and PyTorch; the planner, the arena, AdamW.

    pytest tests/test_autograd.py

A case below is one small graph, written once and read twice: `Recorded` puts it on a tape, `Oracle` computes it in
PyTorch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math

import numpy as np
import pytest

import organism as o

torch = pytest.importorskip("torch")
F = torch.nn.functional
torch.set_num_threads(1)  # small tensors, and pytest runs two files at a time

V, C, H, D, CONTEXT, LENGTH, SEQUENCES = 11, 8, 3, 4, 7, 6, 2
INNER, ROWS = H * D, SEQUENCES * LENGTH
ANGLES = o.rope_angles(CONTEXT, D)
TREE = o.FieldTree([bytes([97 + i]) for i in range(V)], np.arange(V) % 4)


def random_view(rng: np.random.Generator, rows: int) -> o.FieldView:
    """Cuts through TREE at random, with random masses: 1 to 8 ranges, the rest of them unused."""
    starts, mass = np.full((rows, 8), V), np.zeros((rows, 8))
    for r in range(rows):
        used = int(rng.integers(1, 9))
        starts[r, :used] = np.sort(np.append(0, 1 + rng.choice(V - 1, used - 1, replace=False)))
        mass[r, :used] = rng.dirichlet(np.ones(used))
    return o._field_view(starts, np.maximum(mass, 1e-4) * (starts < V), rng.standard_normal((rows, 6)), TREE)


# --- The two readings of a graph. ---


class Recorded:
    """Records on a tape. Without `places` it only finds out which parameters there are: `layout` {name: shape}."""

    def __init__(self, places: dict[str, o.Place] | None = None, length: int = LENGTH):
        self.tape, self.places, self.layout = o.Tape(SEQUENCES, length, CONTEXT), places or {}, {}

    def place(self, name: str, *shape: int) -> o.Place:
        assert self.layout.setdefault(name, shape) == shape
        return self.places.get(name) or o.Place(0, shape)

    def embed(self, name="embedding"):
        return o.embed(self.tape, self.place(name, V, C))

    def field_input(self, x):
        return o.field_input(x, self.place("expected", V, C), self.place("scalars", 6, C))

    def rms_norm(self, x, name):
        return o.rms_norm(x, self.place(name, x.width))

    def linear(self, x, name, outer, scale=1.0, plus=None):
        product = x @ self.place(name, x.width, outer)
        product = product if scale == 1 else scale * product
        return product if plus is None else plus + product

    def rope(self, x):
        return o.rope(x, H, D)

    def attention(self, x, hybrid, pure):
        return o.attention(x, H, D, hybrid, pure, self.place("alpha", hybrid) if hybrid else None)

    def swiglu(self, x):
        return o.swiglu(x)

    def delta_gate(self, x, parts):
        return o.delta_gate(x, parts, self.place("bias", parts), self.place("frozen.strength", parts))

    def cross_entropy(self, x, name="table"):
        return o.cross_entropy(x, self.place(name, V, x.width))

    def field_loss(self, x):
        return o.field_loss(x, self.place("head", V, x.width), self.place("gain", x.width + 7))

    def logits(self, x):
        return o.logits(x, self.place("table", V, x.width))

    def field_logits(self, x):
        return o.field_logits(x, self.place("head", V, x.width), self.place("gain", x.width + 7))


class Oracle:
    """Computes with PyTorch's own operations, in float64; sequences of `length` tokens."""

    def __init__(self, parameters, tokens, targets, view, length):
        self.p, self.length = parameters, length
        self.tokens, self.targets = torch.from_numpy(tokens), torch.from_numpy(targets)
        self.scalars, self.log_field = (
            torch.from_numpy(a.astype(np.float64)) for a in (view.scalars, view.dense_log())
        )
        tokens, p = view.singletons()
        self.expected = np.zeros((len(p), V))
        np.add.at(self.expected, (np.arange(len(p))[:, None], tokens), p)

    def embed(self, name="embedding"):
        return self.p[name][self.tokens.clamp(min=0)] * (self.tokens >= 0)[:, None]

    def field_input(self, x):
        return x + torch.from_numpy(self.expected) @ self.p["expected"] + self.scalars @ self.p["scalars"]

    def rms_norm(self, x, name):
        return F.rms_norm(x, x.shape[1:], self.p[name], torch.finfo(torch.float32).eps)

    def linear(self, x, name, outer, scale=1.0, plus=None):
        return scale * (x @ self.p[name]) + (0 if plus is None else plus)

    def rope(self, x):
        """By complex numbers: a pair is turned by e^(i · position · 10000^(-2k / D))."""
        turns = x[:, : 2 * INNER].reshape(-1, self.length, 2 * H, D // 2, 2).contiguous()
        angle = torch.arange(self.length)[:, None, None] * 1e4 ** (-2 * torch.arange(D // 2).double() / D)
        turned = torch.view_as_real(torch.view_as_complex(turns) * torch.polar(torch.ones_like(angle), angle))
        return torch.cat([turned.reshape(len(x), -1), x[:, 2 * INNER :]], 1)

    def attention(self, x, hybrid, pure):
        """One head after the other."""
        x = x.view(-1, self.length, x.shape[1])
        future, out = torch.ones(self.length, self.length).triu(1).bool(), []
        for head in range(H):
            q, k, v = (x[..., (part * H + head) * D :][..., :D] for part in range(3))
            scores = q @ k.mT / math.sqrt(D)
            if (patterned := head - (H - hybrid - pure)) >= 0:
                pattern = x[..., 3 * INNER + patterned * CONTEXT :][..., : self.length]
                share = torch.sigmoid(self.p["alpha"][patterned]) if patterned < hybrid else 1.0
                scores = (1 - share) * scores + share * pattern
            out.append(scores.masked_fill(future, -math.inf).softmax(-1) @ v)
        return torch.cat(out, -1).flatten(0, 1)

    def swiglu(self, x):
        gate, up = x.chunk(2, 1)
        return F.silu(gate) * up

    def delta_gate(self, x, parts):
        low, z = x[:, :-parts].unflatten(1, (parts, -1)), x[:, -parts:]
        gate = self.p["frozen.strength"] * torch.sigmoid(z + self.p["bias"])
        return (low * gate[..., None]).flatten(1)

    def cross_entropy(self, x, name="table"):
        return -F.cross_entropy(x @ self.p[name].T, self.targets, reduction="none")

    def field_loss(self, x):
        return -F.cross_entropy(self.field_logits(x), self.targets, reduction="none")

    def logits(self, x):
        return x @ self.p["table"].T

    def field_logits(self, x):
        gain = torch.cat([x, self.scalars, torch.ones(len(x), 1)], 1) @ self.p["gain"]
        return x @ self.p["head"].T + gain[:, None] * self.log_field


# --- The cases: for each operation, graphs that end in a loss (or, of those without a gradient, in logits). ---


def heads(hybrid: int, pure: int):
    """A graph whose attention has so many patterned heads."""

    def graph(g):
        x = g.rms_norm(g.embed(), "norm")
        qkv = g.linear(x, "qkv", 3 * INNER + (hybrid + pure) * CONTEXT)
        return g.cross_entropy(g.attention(g.rope(qkv), hybrid, pure))

    return graph


def added(g):
    x = g.embed()
    return g.cross_entropy(g.linear(g.rms_norm(x, "norm"), "weight", C, scale=0.3, plus=x))


def residual(g):
    """A stream of two sums: the gradient of a sum is an alias, and later uses add to it."""
    x = g.embed()
    x = g.linear(g.rms_norm(x, "norm1"), "weight1", C, scale=0.7, plus=x)
    x = g.linear(g.swiglu(g.linear(g.rms_norm(x, "norm2"), "weight2", 2 * C)), "weight3", C, scale=0.7, plus=x)
    return g.cross_entropy(x)


def used_often(g):
    """x is read by two products and added twice, once before and once after another use."""
    x = g.embed()
    a = g.linear(g.rms_norm(x, "norm0"), "weight1", C, plus=x)
    b = g.linear(g.rms_norm(a, "norm"), "weight2", C, plus=x)
    c = g.linear(x, "weight3", C, scale=-2.0, plus=a)
    return g.cross_entropy(g.linear(g.rms_norm(c, "norm2"), "weight4", C, plus=b))


def in_place_of_a_sum(g):
    """The rope lies over a sum, which without gradients lies over what was added."""
    x = g.embed()
    wide = g.linear(x, "weight1", 3 * INNER)
    wide = g.linear(g.rms_norm(wide, "norm"), "weight2", 3 * INNER, plus=wide)
    return g.cross_entropy(g.attention(g.rope(wide), 0, 0))


def swiglu_beside_a_norm(g):
    """The gradient of what swiglu reads must not lie over it: the norm's backward pass still reads it."""
    wide = g.linear(g.embed(), "gate_up", 2 * C)
    other = g.linear(g.rms_norm(wide, "norm"), "weight1", C)
    return g.cross_entropy(g.linear(g.swiglu(wide), "weight2", C, plus=other))


def adapted(g):
    """A product and a delta of two parts beside it, as organism.project has it."""
    x = g.rms_norm(g.embed(), "norm")
    low = g.delta_gate(g.linear(x, "a", 2 * (3 + 1)), 2)
    return g.cross_entropy(g.linear(low, "b", C, scale=0.7, plus=g.linear(x, "weight", C, scale=0.7)))


CASES = {
    "embed": {
        "one": lambda g: g.cross_entropy(g.embed()),
        "tied": lambda g: g.cross_entropy(g.embed(), "embedding"),
    },
    "field_input": {"before a loss": lambda g: g.cross_entropy(g.field_input(g.embed()))},
    "rms_norm": {
        "one": lambda g: g.cross_entropy(g.rms_norm(g.embed(), "norm")),
        "of a norm": lambda g: g.cross_entropy(g.rms_norm(g.rms_norm(g.embed(), "norm"), "norm2")),
    },
    "linear": {
        "product": lambda g: g.cross_entropy(g.linear(g.embed(), "weight", 5)),
        "scaled": lambda g: g.cross_entropy(g.linear(g.embed(), "weight", 5, scale=-1.5)),
        "added": added,
        "residual": residual,
        "used often": used_often,
    },
    "rope": {
        "before attention": heads(0, 0),
        "alone": lambda g: g.cross_entropy(g.rope(g.linear(g.embed(), "qkv", 3 * INNER))),
        "in place of a sum": in_place_of_a_sum,
    },
    "attention": {
        f"{H - hybrid - pure} content, {hybrid} hybrid, {pure} pure": heads(hybrid, pure)
        for hybrid, pure in ((0, 0), (1, 0), (3, 0), (0, 1), (0, 3), (1, 1), (2, 1))
    },
    "swiglu": {
        "one": lambda g: g.cross_entropy(g.swiglu(g.linear(g.embed(), "gate_up", 2 * C))),
        "of what others read": swiglu_beside_a_norm,
    },
    "delta_gate": {
        "one": lambda g: g.cross_entropy(g.delta_gate(g.linear(g.embed(), "a", 1 * (C + 1)), 1)),
        "beside a product": adapted,
    },
    "cross_entropy": {"of a norm": lambda g: g.cross_entropy(g.rms_norm(g.embed(), "norm"))},
    "field_loss": {
        "one": lambda g: g.field_loss(g.embed()),
        "all of the field": lambda g: g.field_loss(g.rms_norm(g.field_input(g.embed()), "norm")),
    },
    "logits": {"one": lambda g: g.logits(g.rms_norm(g.embed(), "norm"))},
    "field_logits": {"one": lambda g: g.field_logits(g.rms_norm(g.field_input(g.embed()), "norm"))},
    "attention_step": {},  # see test_a_step_of_attention_is_a_row_of_attention
}
TRAINED = [(op, case) for op, row in o.OPS.items() if row.backward for case in CASES.get(op, {"no case": None})]


def layout_of(graph) -> dict[str, tuple[int, ...]]:
    recorded = Recorded()
    graph(recorded)
    return recorded.layout


@functools.cache
def program_of(graph, training: bool) -> o.Program:
    recorded = Recorded(o.layout_places(layout_of(graph)))
    graph(recorded)
    with contextlib.nullcontext() if training else o.no_grad():
        return recorded.tape.plan()


class Setting:
    """A graph's parameters, and the tokens, targets and views that it runs on."""

    def __init__(self, graph, length: int = LENGTH, sequences: int = SEQUENCES, dtype=np.float64, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.graph, self.length, self.sequences, rows = graph, length, sequences, sequences * length
        self.arena = o.Arena(layout_of(graph), dtype)
        for name, place in self.arena.places.items():
            self.arena[name][:] = rng.standard_normal(place.shape) / math.sqrt(C if len(place.shape) > 1 else 4)
        self.tokens, self.targets = rng.integers(0, V, (2, rows))
        self.tokens[rng.random(rows) < 0.2] = -1
        self.tokens[1] = self.tokens[0] = 3  # the same row twice: gradients of a table add up
        self.view = random_view(rng, rows)

    def machine(self, program: o.Program, **more) -> o.Machine:
        noise = np.full(program.size, 1e3, self.arena.dtype)  # what was in memory before must not matter
        more |= dict(
            targets=self.targets, view=self.view, log_probs=np.zeros(len(self.tokens)), inverse=1 / len(self.tokens)
        )
        return o.Machine(self.arena.parameters, noise, ANGLES, self.tokens, self.sequences, self.length, **more)

    def log_probs(self) -> np.ndarray:
        """Of a program without gradients."""
        program = program_of(self.graph, False)
        machine = self.machine(program)
        o.execute(program, machine)
        return machine.log_probs

    def gradients(self) -> tuple[np.ndarray, np.ndarray]:
        """ln p of the targets, and the gradient of the mean loss [arena.size], of a program with gradients."""
        program = program_of(self.graph, True)
        machine = self.machine(program, gradients=np.zeros(self.arena.size, self.arena.dtype))
        o.execute(program, machine)
        return machine.log_probs, machine.gradients

    def oracle(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The graph's last value and the gradients of the mean loss, by PyTorch in float64."""
        parameters = {n: torch.from_numpy(self.arena[n].astype(np.float64)).requires_grad_() for n in self.arena.places}
        out = self.graph(Oracle(parameters, self.tokens, self.targets, self.view, self.length))
        (-out.mean()).backward()
        trained = [n for n, place in self.arena.places.items() if place.trained]
        return out.detach().numpy(), {n: parameters[n].grad.numpy() for n in trained}


def worst(arena: o.Arena, flat: np.ndarray, wanted: dict[str, np.ndarray]) -> tuple[float, str]:
    """The largest error of a gradient, as a share of its largest number, and whose it is."""
    return max((float(np.abs(arena.places[n].of(flat) - g).max() / np.abs(g).max()), n) for n, g in wanted.items())


# --- Operations ---


@pytest.mark.parametrize(("op", "case"), TRAINED)
def test_gradients_are_finite_differences_and_what_pytorch_finds(op, case):
    assert CASES.get(op), f"the operation {op} has no test: give it graphs in CASES"
    for length, sequences in ((LENGTH, SEQUENCES), (LENGTH - 2, SEQUENCES), (LENGTH, 1)):
        s = Setting(CASES[op][case], length, sequences)
        log_probs, flat = s.gradients()
        wanted, by_torch = s.oracle()
        assert np.allclose(log_probs, wanted, atol=1e-6)  # rope_angles are float32
        assert worst(s.arena, flat, by_torch) < (1e-6,)
        assert np.allclose(s.log_probs(), log_probs, atol=1e-12), "training and measuring see different losses"
    rng = np.random.default_rng(1)
    for name, place in s.arena.places.items():  # a few numbers of each parameter
        if not place.trained:
            continue
        numbers, gradient = s.arena[name].reshape(-1), place.of(flat).reshape(-1)
        for i in rng.choice(place.size, min(place.size, 12), replace=False):
            loss, value = {}, numbers[i]
            for side in (-1e-5, 1e-5):
                numbers[i] = value + side
                loss[side] = -s.log_probs().mean()
            numbers[i] = value
            difference = (loss[1e-5] - loss[-1e-5]) / 2e-5
            assert difference == pytest.approx(gradient[i], rel=1e-5, abs=1e-8), f"{name}, number {i}"


@pytest.mark.parametrize(("op", "case"), TRAINED)
def test_single_precision_is_close_to_double(op, case):
    s = Setting(CASES[op][case], dtype=np.float32)
    assert worst(s.arena, s.gradients()[1], s.oracle()[1]) < (1e-4,)


@pytest.mark.parametrize("op", [op for op, row in o.OPS.items() if not row.backward])
def test_operations_without_a_gradient_are_tested_too(op):
    assert op in CASES, f"the operation {op} has no test: give it graphs in CASES"
    for graph in CASES[op].values():
        s, program = Setting(graph), program_of(graph, False)
        machine = s.machine(program)
        o.execute(program, machine)
        b = program.steps[-1].buffers["out"]
        out = machine.activations[b.offset : b.offset + ROWS * V].reshape(ROWS, V)
        assert np.allclose(out, s.oracle()[0], atol=1e-6)


@pytest.mark.parametrize(("hybrid", "pure"), [(0, 0), (3, 0), (0, 3), (1, 1)])
def test_a_step_of_attention_is_a_row_of_attention(hybrid, pure):
    rng, width = np.random.default_rng(2), 3 * INNER + (hybrid + pure) * CONTEXT
    rows, arena = rng.standard_normal((CONTEXT, width)), o.Arena({"alpha": (hybrid,)} if hybrid else {}, np.float64)
    if hybrid:
        arena["alpha"][:] = rng.standard_normal(hybrid)

    def run(length: int, sequence) -> np.ndarray:
        """The last value, with x put into a tape that has rope and attention alone."""
        tape = o.Tape(1, length, CONTEXT)
        x = o.rope(o.Tensor(tape, width), H, D)
        o.attention(x, H, D, hybrid, pure, arena.places.get("alpha"))
        with o.no_grad():
            program = tape.plan()
        m = o.Machine(arena.parameters, np.zeros(program.size), ANGLES, np.zeros(1), length=length,
                      cache=np.zeros(program.cache))  # fmt: skip
        source, result = program.steps[0].buffers["x"], program.steps[-1].buffers["out"]
        out = []
        for position, part in enumerate(sequence):
            m.activations[source.offset : source.offset + part.size], m.position = part.reshape(-1), position
            o.execute(program, m)
            out.append(m.activations[result.offset : result.offset + length * INNER].reshape(length, INNER).copy())
        return np.concatenate(out)

    assert np.allclose(run(1, rows[:, None]), run(CONTEXT, rows[None]), atol=1e-12)


def test_a_mean_gradient_is_the_mean_of_its_parts():
    whole = Setting(residual, sequences=2)
    parts = []
    for b in range(2):
        part, rows = Setting(residual, sequences=1), slice(b * LENGTH, (b + 1) * LENGTH)
        part.tokens, part.targets, part.view = whole.tokens[rows], whole.targets[rows], whole.view[rows]
        parts.append(part.gradients()[1])
    assert np.allclose(whole.gradients()[1], np.mean(parts, 0), atol=1e-15)


def test_operations_add_to_gradients_that_are_there():
    s = Setting(residual)
    program, once = program_of(residual, True), s.gradients()[1]
    machine = s.machine(program, gradients=np.zeros(s.arena.size))
    for _ in range(2):
        o.execute(program, machine)
    assert np.allclose(machine.gradients, 2 * once, atol=1e-15)


# --- The tape ---


def test_what_a_tape_cannot_record_is_refused():
    g = Recorded()
    x = g.embed()
    with pytest.raises(AssertionError, match="product of 8 columns"):
        x @ o.Place(0, (C + 1, C))
    with pytest.raises(AssertionError, match="just recorded"):
        2 * x
    product = x @ g.place("w", C, C)
    total = o.Tensor(g.tape, C) + product
    with pytest.raises(AssertionError, match="only once"):
        o.Tensor(g.tape, C) + total
    o.rms_norm(total, g.place("norm", C))
    with pytest.raises(AssertionError, match="just recorded"):
        0.5 * total


def test_a_scale_and_a_sum_are_one_row():
    program = program_of(added, False)
    assert [step.kernel for step in program.steps] == ["embed", "rms_norm", "linear", "cross_entropy"]
    assert program.steps[2].fields["scale"] == 0.3 and "y" in program.steps[2].buffers


def test_an_operation_in_place_needs_an_input_of_its_own():
    def graph(g):
        wide = g.linear(g.embed(), "weight", 3 * INNER)
        turned = g.rope(wide)
        return g.cross_entropy(g.linear(wide, "other", 3 * INNER, plus=turned))

    for training in (True, False):
        with pytest.raises(AssertionError, match="rope needs an input of its own"):
            program_of(graph, training)


def test_a_gradient_that_overwrites_needs_an_input_that_nobody_reads_later():
    def graph(g):
        wide = g.linear(g.embed(), "gate_up", 2 * C)
        inner = g.swiglu(wide)
        other = g.linear(g.rms_norm(wide, "norm"), "weight1", C)
        return g.cross_entropy(g.linear(inner, "weight2", C, plus=other))

    program_of(graph, False)
    with pytest.raises(AssertionError, match="swiglu needs an input of its own"):
        program_of(graph, True)


def test_a_tensor_cannot_be_added_to_a_product_of_itself():
    """The gradient of the sum would lie over what the product still reads."""
    g = Recorded()
    x = g.embed()
    with pytest.raises(AssertionError, match="product of itself"):
        x + x @ g.place("weight", C, C)


# --- The planner ---

PLANNED = {f"{op}, {case}": graph for op, cases in CASES.items() for case, graph in cases.items()}


@pytest.mark.parametrize(
    ("case", "training"), [(c, t) for c in PLANNED for t in (True, False) if not (t and "logits" in c)]
)
def test_buffers_alive_at_one_time_never_overlap(case, training):
    program = program_of(PLANNED[case], training)
    buffers = list({id(b): b for step in program.steps for b in step.buffers.values()}.values())
    assert all(b.offset % 16 == 0 and b.offset >= 0 and b.offset + b.size <= program.size for b in buffers)
    for n, step in enumerate(program.steps):
        assert all(b.first <= n <= b.last for b in step.buffers.values())
    for a, b in itertools.combinations(buffers, 2):
        if a.first <= b.last and b.first <= a.last:
            assert a.offset + a.size <= b.offset or b.offset + b.size <= a.offset


def test_buffers_share_memory_once_nobody_reads_them():
    with o.no_grad():
        shape = o.BodyShape.of("adolescent", V, o.BodyConfig(field=False, context=LENGTH))
        places, sizes = o.layout_places(shape.layout()), {}
        for layers in (1, 4):
            tape = o.Tape(1, LENGTH, LENGTH)
            o.record_hidden(tape, dataclasses.replace(shape, operators=shape.operators[:layers]), places)
            sizes[layers] = tape.plan().size
    assert sizes[1] == sizes[4]


def test_no_grad_plans_no_backward_rows_and_ends_with_its_block():
    assert not any(step.kernel.endswith("_back") for step in program_of(residual, False).steps)
    backward = [step.kernel for step in program_of(residual, True).steps if step.kernel.endswith("_back")]
    assert backward[0] == "cross_entropy_back" and backward[-1] == "embed_back" and len(backward) == 8
    with pytest.raises(ZeroDivisionError), o.no_grad():
        raise ZeroDivisionError
    assert any(step.kernel.endswith("_back") for step in program_of(residual, True).steps)


def test_a_loss_runs_once_in_training():
    kernels = [step.kernel for step in program_of(residual, True).steps]
    assert "cross_entropy" not in kernels and kernels.count("cross_entropy_back") == 1


def test_the_gradient_of_a_sum_is_an_alias_and_later_uses_add_to_it():
    steps = {step.weights[0].offset: step for step in program_of(residual, True).steps if step.kernel == "linear_back"}
    places = o.layout_places(layout_of(residual))
    first, last = (steps[places[name].offset] for name in ("weight1", "weight3"))
    assert first.buffers["d_out"] is last.buffers["d_out"] is first.buffers["d_y"] is last.buffers["d_y"]
    assert first.fields["add_y"] == last.fields["add_y"] == 0
    norms = [step for step in program_of(residual, True).steps if step.kernel == "rms_norm_back"]
    assert [step.fields["add_x"] for step in norms] == [1, 1]  # x was added too, and that came first
    b = next(step.buffers for step in program_of(residual, True).steps if step.kernel == "swiglu_back")
    assert b["d_x"] is b["x"]  # where the table allows it


def test_planning_is_deterministic():
    a, b = (program_of.__wrapped__(used_often, True) for _ in range(2))
    assert a.size == b.size
    for one, other in zip(a.steps, b.steps, strict=True):
        assert one.kernel == other.kernel and one.fields == other.fields and one.weights == other.weights
        assert {n: x.offset for n, x in one.buffers.items()} == {n: x.offset for n, x in other.buffers.items()}


# --- The arena ---

LAYOUT = {"a": (3, 5), "gain": (7,), "b": (2, 9), "bias": (1,), "c": (4, 4)}


def test_matrices_lie_before_vectors_and_nothing_overlaps():
    arena = o.Arena(LAYOUT)
    assert list(arena.places) == ["a", "b", "c", "gain", "bias"] and len(arena) == 15 + 7 + 18 + 1 + 16
    ends = 0
    for place in arena.places.values():
        assert place.offset % 16 == 0 and place.offset >= ends
        ends = place.offset + place.size
    assert ends <= arena.size and arena.decayed == arena.places["gain"].offset
    for name in o.Arena.ARRAYS:
        array = getattr(arena, name)
        assert (
            array.shape == (arena.size,)
            and array.dtype == np.float32
            and array.ctypes.data % 64 == 0
            and not array.any()
        )


def test_parameters_are_views_by_name():
    arena = o.Arena(LAYOUT)
    for number, name in enumerate(LAYOUT, 1):
        arena[name][:] = number
        arena.view("moment2", name)[:] = -number
        assert arena[name].shape == LAYOUT[name]
    assert sorted(set(arena.parameters)) == [0, 1, 2, 3, 4, 5] and arena.parameters.sum() == 15 + 14 + 54 + 4 + 80
    assert np.array_equal(arena.moment2, -arena.parameters)


def test_a_copy_of_an_arena_is_independent():
    arena = o.Arena(LAYOUT)
    for k, name in enumerate(o.Arena.ARRAYS):
        getattr(arena, name)[:] = k + 1
    twin = arena.copy()
    for name in o.Arena.ARRAYS:
        mine, other = getattr(arena, name), getattr(twin, name)
        assert np.array_equal(mine, other) and not np.shares_memory(mine, other) and other.ctypes.data % 64 == 0
        other[:] = 0
        assert mine.all()
    assert twin.places == arena.places and twin.decayed == arena.decayed


def test_padding_and_alignment():
    assert [o.padded(n) for n in (0, 1, 32, 33)] == [0, 32, 32, 64] and o.padded(17, 16) == 32
    for shape, dtype in itertools.product(((1,), (3, 5), (17,)), (np.float32, np.float64, np.int64)):
        array = o.aligned_zeros(*shape, dtype=dtype)
        assert array.shape == shape and array.dtype == dtype and array.ctypes.data % 64 == 0 and not array.any()


# --- AdamW ---


def trained(config: o.LearningConfig, gradients, dtype=np.float64) -> o.Arena:
    """An arena of two matrices and two vectors after one step for each flat gradient."""
    arena, rng = o.Arena({"a": (3, 5), "b": (4, 4), "gain": (7,), "bias": (1,)}, dtype), np.random.default_rng(3)
    for name, place in arena.places.items():
        arena[name][:] = rng.standard_normal(place.shape)
    arena.average[:] = arena.parameters
    for step, g in enumerate(gradients(arena), 1):
        norm = o.adamw(arena, g, 0.01 / step, step, config)
        assert norm == pytest.approx(np.linalg.norm(g))
    return arena


def random_gradients(scale: float):
    """Twenty of them; the gaps between places stay zero."""

    def gradients(arena):
        rng = np.random.default_rng(4)
        for _ in range(20):
            flat = np.zeros(arena.size, arena.dtype)
            for place in arena.places.values():
                place.of(flat)[:] = scale * rng.standard_normal(place.shape)
            yield flat

    return gradients


@pytest.mark.parametrize("scale", [0.01, 3.0])  # below the norm that is clipped to, and above
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_adamw_is_pytorchs(scale, clip):
    config = o.LearningConfig(weight_decay=0.7, max_grad_norm=clip)
    arena, start = trained(config, random_gradients(scale)), trained(config, lambda arena: ())
    tensors = {n: torch.from_numpy(start[n].copy()).requires_grad_() for n in start.places}
    groups = [
        dict(params=[t for t in tensors.values() if (t.ndim > 1) == matrices], weight_decay=0.7 * matrices)
        for matrices in (True, False)
    ]
    adam = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.epsilon)
    average = {n: t.detach().clone() for n, t in tensors.items()}
    for step, flat in enumerate(random_gradients(scale)(start), 1):
        for name, tensor in tensors.items():
            tensor.grad = torch.from_numpy(start.places[name].of(flat).copy())
        if clip:
            torch.nn.utils.clip_grad_norm_(tensors.values(), clip)
        for group in adam.param_groups:
            group["lr"] = 0.01 / step
        adam.step()
        decay = min(config.average, step / (step + 1))
        for name, tensor in tensors.items():
            average[name] = decay * average[name] + (1 - decay) * tensor.detach()
    for name, tensor in tensors.items():
        assert np.allclose(arena[name], tensor.detach(), rtol=0, atol=1e-12)
        assert np.allclose(arena.view("moment1", name), adam.state[tensor]["exp_avg"], atol=1e-12)
        assert np.allclose(arena.view("moment2", name), adam.state[tensor]["exp_avg_sq"], atol=1e-12)
        assert np.allclose(arena.view("average", name), average[name], rtol=0, atol=1e-12)


def test_only_matrices_decay_and_gaps_stay_zero():
    config = o.LearningConfig(weight_decay=2.0)
    start = trained(config, lambda arena: ())
    arena = trained(config, lambda arena: [np.zeros(arena.size)])
    for name in arena.places:
        assert np.allclose(arena[name], start[name] * (0.98 if start[name].ndim > 1 else 1.0), rtol=1e-12)
    covered = np.zeros(arena.size, bool)
    for place in arena.places.values():
        place.of(covered)[:] = True
    busy = trained(config, random_gradients(1.0))
    assert not any(getattr(busy, name)[~covered].any() for name in o.Arena.ARRAYS)


def test_the_average_begins_as_a_plain_mean():
    config, seen = o.LearningConfig(average=0.9), []

    def gradients(arena):
        seen.append(arena.parameters.copy())
        for flat in random_gradients(1.0)(arena):
            yield flat
            seen.append(arena.parameters.copy())
            if len(seen) <= 10:  # the decay is bounded by .9 from the tenth number on
                assert np.allclose(arena.average, np.mean(seen, 0))

    arena = trained(config, gradients)
    assert not np.allclose(arena.average, np.mean(seen, 0))
