"""Chapter 5: the body against PyTorch and brute force, in training, measuring and speaking, on every engine.

    pytest tests/test_body.py

Everything runs on both executors: "numpy", the reference, and "numba", the kernels.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import sys
import threading

import numpy as np
import pytest

import organism as o

torch = pytest.importorskip("torch")
F = torch.nn.functional
torch.set_num_threads(1)  # small tensors, and pytest runs two files at a time

VOCABULARY = [bytes([i]) for i in range(32, 72)]
V, CONTEXT = len(VOCABULARY), 12
LEARNING = o.LearningConfig(warmup_steps=1)
STAGES, EXECUTORS, FORMS = list(o.STAGES), ["numpy", "numba"], [True, False]
HEADS = {  # of a child
    "half": (),
    "content": ("content",) * 4,
    "hybrid": ("hybrid",) * 4,
    "pure": ("rrpram",) * 4,
    "all kinds": ("content", "hybrid", "hybrid", "rrpram"),
}
on_each_executor = pytest.mark.parametrize("executor", EXECUTORS)
in_each_form = pytest.mark.parametrize("field", FORMS, ids=["field", "plain"])


# --- What is shared: a life of a few tokens, and bodies that have learned something. ---


@functools.cache
def lived() -> tuple[np.ndarray, o.FieldView]:
    """Tokens with some order in them [n], and what a field thought before it read each."""
    rng = np.random.default_rng(0)
    tokens = np.concatenate(
        [np.tile(rng.integers(0, V, 9), 6), rng.integers(0, V, 20), np.tile(rng.integers(0, V, 17), 3)]
    )
    _, view = o.ReferenceField(VOCABULARY, o.FieldConfig(table_mb=1)).read(tokens, views=True)
    return tokens, view


def windows(field: bool, batch: int, length: int) -> tuple[np.ndarray, np.ndarray, o.FieldView | None]:
    """x, y [B, T] and the view of their rows."""
    tokens, view = lived()
    at = 1 + (np.arange(batch) * 7)[:, None] + np.arange(length)
    return tokens[at - 1], tokens[at], view.take(at) if field else None


def schooled(stage: str, field: bool, context: int = CONTEXT, heads: tuple[str, ...] = (), seed: int = 1) -> o.Body:
    """A body none of whose parameters is what it was at birth."""
    body = o.Body(stage, V, o.BodyConfig(field=field, context=context, head_types=heads), seed)
    rng = np.random.default_rng(seed)
    for name, place in body.arena.places.items():
        body.arena[name][:] += rng.standard_normal(place.shape, np.float32) * np.float32(
            1 if name.endswith("alpha") else 0.04
        )
    body.arena.average[:] = body.arena.parameters
    return body


def gradients(body: o.Body, x, y, view, executor: str) -> tuple[float, dict[str, np.ndarray]]:
    """The mean loss and its gradients by name."""
    if executor == "numpy":
        engine = o._ReferenceGradients(body, LEARNING)
        loss, flat = engine.of(x, y, view), engine.flat
    else:
        engine = o.organ("kernels").Gradients(body, LEARNING, 1)
        loss, flat = engine.of(x, y, view)
    engine.close()
    return loss, {name: place.of(flat) for name, place in body.arena.places.items()}


def worst(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> tuple[float, str]:
    """The largest error of a gradient, as a share of its largest number, and whose it is."""
    assert found.keys() == wanted.keys()
    return max((float(np.abs(found[n] - g).max() / np.abs(g).max()), n) for n, g in wanted.items())


def all_log_probs(body: o.Body, x: np.ndarray, view: o.FieldView | None, executor: str) -> np.ndarray:
    """ln p of every token [T, V] after the tokens x [T], by the graph that measures."""
    size, T = body.shape.vocabulary, len(x)
    everything = None if view is None else view.take(np.tile(np.arange(T), size))
    y = np.repeat(np.arange(size), T).reshape(size, T)
    return body.log_probs(np.tile(x, (size, 1)), y, everything, executor == "numba").T


def spoken(body: o.Body, x: np.ndarray, view: o.FieldView | None, executor: str) -> np.ndarray:
    """Logits [T, V] of a decoder that is fed x [T]."""
    decoder = o.Decoder(body, executor=executor)
    return np.array([decoder.feed(int(t), None if view is None else view[i]) for i, t in enumerate(x)])


def log_softmax(logits: np.ndarray) -> np.ndarray:
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


# --- Gradients ---


def plain_graph(P: dict, shape: o.BodyShape, x, y):
    """The mean loss of a plain body, as ../shared/peers/torch_body.py has it: the whole graph once more in PyTorch."""
    T, half = x.shape[1], shape.head_size // 2
    angle = torch.arange(T)[:, None] * 1e4 ** (-torch.arange(half) / half)
    turn = torch.polar(torch.ones_like(angle), angle)
    h = F.embedding(x, P["embedding"])
    for n in range(shape.layers):
        block = {name.split(".")[2]: p for name, p in P.items() if name.startswith(f"blocks.{n}.")}
        normed = F.rms_norm(h, (shape.width,), block["norm1"])
        columns = normed @ block["qkv"]
        parts = columns[..., : 3 * shape.inner].unflatten(-1, (3, shape.heads, shape.head_size)).unbind(2)
        pairs = [torch.view_as_complex(z.unflatten(-1, (half, 2)).contiguous()) for z in parts[:2]]
        q, k = (torch.view_as_real(z * turn[:, None]).flatten(3) for z in pairs)
        scores = torch.einsum("bthd,bshd->bhts", q, k) / shape.head_size**0.5
        content = shape.heads - shape.hybrid
        if shape.hybrid:
            pattern = columns[..., 3 * shape.inner :].unflatten(-1, (shape.hybrid, shape.context))[..., :T]
            blended = torch.lerp(
                scores[:, content:], pattern.permute(0, 2, 1, 3), block["alpha"].sigmoid().view(-1, 1, 1)
            )
            scores = torch.cat([scores[:, :content], blended], 1)
        p = (scores + torch.full((T, T), -math.inf).triu(1)).softmax(-1)
        mixed = torch.einsum("bhts,bshd->bthd", p, parts[2]).flatten(2)
        h = torch.add(h, mixed @ block["out"], alpha=shape.layers**-0.5)
        gate, up = (F.rms_norm(h, (shape.width,), block["norm2"]) @ block["gate_up"]).split(4 * shape.width, -1)
        h = torch.add(h, (F.silu(gate) * up) @ block["down"], alpha=shape.layers**-0.5)
    logits = F.linear(F.rms_norm(h, (shape.width,), P["norm"]), P["embedding"])
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


@functools.cache
def by_torch(stage: str, field: bool, heads: tuple[str, ...] = ()):
    """A body, a batch that is shorter than its context and lacks some tokens, the loss and the gradients by PyTorch."""
    body, (x, y, view) = schooled(stage, field, heads=heads), windows(field, 2, CONTEXT - 2)
    if field:
        x = np.where(np.random.default_rng(2).random(x.shape) < 0.1, -1, x)
    engine = o.organ("torch").Gradients(body, LEARNING, 1)
    return body, (x, y, view), *engine.of(x, y, view)


@pytest.mark.parametrize("stage", STAGES)
def test_the_torch_engine_has_the_graph_of_the_peer(stage):
    body, (x, y, _), loss, found = by_torch(stage, False)
    P = {name: torch.tensor(body.arena[name], requires_grad=True) for name in body.arena.places}
    wanted = plain_graph(P, body.shape, torch.tensor(x), torch.tensor(y))
    wanted.backward()
    assert loss == pytest.approx(wanted.item(), abs=1e-5)
    assert worst(found, {name: p.grad.numpy() for name, p in P.items()}) < (5e-5,)


@on_each_executor
@in_each_form
@pytest.mark.parametrize("stage", STAGES)
def test_gradients_at_every_stage_are_pytorchs(stage, field, executor):
    body, batch, loss, wanted = by_torch(stage, field)
    mine, found = gradients(body, *batch, executor)
    assert mine == pytest.approx(loss, abs=1e-5)
    assert worst(found, wanted) < (1e-4,)


@on_each_executor
@in_each_form
@pytest.mark.parametrize("kind", HEADS)
def test_gradients_of_every_kind_of_head_are_pytorchs(kind, field, executor):
    body, batch, loss, wanted = by_torch("child", field, HEADS[kind])
    mine, found = gradients(body, *batch, executor)
    assert mine == pytest.approx(loss, abs=1e-5)
    assert worst(found, wanted) < (1e-4,)


@on_each_executor
def test_a_mean_gradient_is_the_mean_of_its_sequences(executor):
    body, (x, y, view), T = schooled("child", True), *[windows(True, 3, CONTEXT)], CONTEXT
    _, whole = gradients(body, x, y, view, executor)
    parts = [gradients(body, x[b : b + 1], y[b : b + 1], view[b * T : (b + 1) * T], executor)[1] for b in range(3)]
    assert worst(whole, {name: np.mean([part[name] for part in parts], 0) for name in whole}) < (1e-5,)


def test_head_types_that_do_not_fit_are_refused():
    with pytest.raises(o.UsageError, match="names 2 heads, but stage 'child' has 4"):
        o.Body("child", V, o.BodyConfig(head_types=("content", "hybrid")))


# --- Birth ---


@on_each_executor
@pytest.mark.parametrize("stage", ["embryo", "child"])
def test_a_newborn_on_the_field_is_the_field(stage, executor):
    body = o.Body(stage, V, o.BodyConfig(context=CONTEXT), seed=5)
    x, y, view = windows(True, 2, CONTEXT)
    wanted = view.dense_log()
    found = body.log_probs(x, y, view, executor == "numba")
    assert found.dtype == np.float32 and np.allclose(found.ravel(), wanted[np.arange(y.size), y.ravel()], atol=1e-5)
    assert np.allclose(log_softmax(spoken(body, x[0], view[:CONTEXT], executor)), wanted[:CONTEXT], atol=1e-5)


def test_birth_is_a_function_of_the_seed():
    a, b, c = (o.Body("infant", V, o.BodyConfig(), seed) for seed in (1, 1, 2))
    assert np.array_equal(a.arena.parameters, b.arena.parameters) and not np.array_equal(
        a.arena.parameters, c.arena.parameters
    )
    assert np.array_equal(a.arena.average, a.arena.parameters)
    assert not a.arena.moment1.any() and not a.arena.moment2.any() and a.steps == 0


# --- Measuring and speaking ---


def brute_force(body: o.Body, x: np.ndarray, view: o.FieldView | None) -> np.ndarray:
    """Logits [n, V] in float64, position by position: each sees the newest `context` ones, patterns count from the
    first of these, and rotary angles are those of the positions in the whole text."""
    s, n = body.shape, len(x)
    P = {name: body.arena.view("average", name).astype(np.float64) for name in body.arena.places}
    norm = lambda h, gain: h / np.sqrt((h**2).mean(-1, keepdims=True) + 2.0**-23) * gain
    angle = np.arange(n)[:, None, None] * 1e4 ** (-np.arange(0, s.head_size, 2) / s.head_size)
    turn = lambda z: (z[..., 0::2] + 1j * z[..., 1::2]) * np.exp(1j * angle)
    h = P["embedding"][x]
    if view is not None:
        tokens, p = view.singletons()
        h = h + np.einsum("nk,nkc->nc", p, P["expected"][tokens]) + view.scalars.astype(np.float64) @ P["scalars"]
    for layer in range(s.layers):
        B = {name: P[f"blocks.{layer}.{name}"] for name in ("norm1", "qkv", "out", "norm2", "gate_up", "down")}
        columns = norm(h, B["norm1"]) @ B["qkv"]
        q, k, v = np.moveaxis(columns[:, : 3 * s.inner].reshape(n, 3, s.heads, s.head_size), 1, 0)
        q, k = turn(q), turn(k)
        pattern = columns[:, 3 * s.inner :].reshape(n, -1, s.context)
        mixed = np.zeros((n, s.heads, s.head_size))
        for i in range(n):
            seen = range(max(0, i + 1 - s.context), i + 1)
            for head in range(s.heads):
                scores = np.array([(q[i, head] * k[j, head].conj()).real.sum() for j in seen]) / math.sqrt(s.head_size)
                patterned = head - (s.heads - s.hybrid - s.pure)
                if patterned >= 0:
                    share = 1 / (1 + np.exp(-P[f"blocks.{layer}.alpha"][patterned])) if patterned < s.hybrid else 1.0
                    scores = (1 - share) * scores + share * pattern[i, patterned, : len(seen)]
                mixed[i, head] = np.exp(log_softmax(scores)) @ v[list(seen), head]
        h = h + mixed.reshape(n, -1) @ B["out"] / math.sqrt(s.layers)
        gate, up = np.split(norm(h, B["norm2"]) @ B["gate_up"], 2, axis=1)
        h = h + (gate / (1 + np.exp(-gate)) * up) @ B["down"] / math.sqrt(s.layers)
    h = norm(h, P["norm"])
    if view is None:
        return h @ P["embedding"].T
    made_of = np.concatenate([h, view.scalars, np.ones((n, 1))], axis=1)
    return h @ P["head"].T + (made_of @ P["gain"])[:, None] * view.dense_log()


@on_each_executor
@in_each_form
@pytest.mark.parametrize("kind", HEADS)
def test_speaking_token_by_token_is_measuring_the_window(kind, field, executor):
    body, (x, _, view) = schooled("child", field, heads=HEADS[kind]), windows(field, 1, CONTEXT)
    logits, measured = spoken(body, x[0], view, executor), all_log_probs(body, x[0], view, executor)
    assert logits.dtype == np.float32 and np.allclose(log_softmax(logits), measured, atol=1e-4)
    assert np.allclose(log_softmax(brute_force(body, x[0], view)), measured, atol=1e-4)
    assert np.allclose(np.exp(measured).sum(1), 1, atol=1e-5)


@on_each_executor
@in_each_form
@pytest.mark.parametrize("kind", ["half", "all kinds"])
def test_attention_slides_over_a_text_longer_than_the_cache(kind, field, executor):
    length = 4 * CONTEXT + 3  # the cache holds 2 * CONTEXT: it makes room three times
    body, (x, _, view) = schooled("child", field, heads=HEADS[kind]), windows(field, 1, length)
    found, wanted = spoken(body, x[0], view, executor), brute_force(body, x[0], view)
    for part in (slice(0, CONTEXT), slice(CONTEXT, 2 * CONTEXT), slice(2 * CONTEXT, length)):
        assert np.allclose(found[part], wanted[part], atol=2e-4), np.abs(found[part] - wanted[part]).max()


@on_each_executor
def test_a_decoder_forgets_when_reset(executor):
    body, (x, _, view) = schooled("infant", True), windows(True, 1, CONTEXT)
    decoder = o.Decoder(body, executor=executor)
    rounds = []
    for _ in range(2):
        rounds.append([decoder.feed(int(t), view[i]) for i, t in enumerate(x[0])])
        decoder.reset()
    assert np.array_equal(*rounds)


@on_each_executor
def test_a_decoder_gives_each_time_an_array_of_its_own(executor):
    body, (x, _, view) = schooled("infant", True), windows(True, 1, CONTEXT)
    decoder = o.Decoder(body, executor=executor)
    first = decoder.feed(int(x[0, 0]), view[0])
    kept = first.copy()
    decoder.feed(int(x[0, 1]), view[1])
    assert np.array_equal(first, kept)


@on_each_executor
@in_each_form
def test_averaged_weights_measure_and_speak(field, executor):
    body, (x, y, view) = schooled("infant", field), windows(field, 2, CONTEXT)
    other = body.copy()
    other.arena.parameters[:] = 7.0
    rows = None if view is None else view[:CONTEXT]
    assert np.array_equal(
        body.log_probs(x, y, view, executor == "numba"), other.log_probs(x, y, view, executor == "numba")
    )
    assert np.array_equal(spoken(body, x[0], rows, executor), spoken(other, x[0], rows, executor))


@on_each_executor
def test_measuring_sees_no_future_and_no_other_sequence(executor):
    body, (x, y, view) = schooled("child", True), windows(True, 3, CONTEXT)
    whole = body.log_probs(x, y, view, executor == "numba")
    for T in (1, 5, CONTEXT):
        for b in range(3):
            part = body.log_probs(
                x[b : b + 1, :T], y[b : b + 1, :T], view[b * CONTEXT : b * CONTEXT + T], executor == "numba"
            )
            assert np.allclose(part[0], whole[b, :T], atol=1e-5)


# --- Growing, saving, copying ---


@on_each_executor
@in_each_form
def test_a_larger_vocabulary_keeps_old_rows_and_builds_new_ones_from_parts(field, executor):
    old, grown = o.Tokenizer([(97, 98)]), o.Tokenizer([(97, 98), (259, 99), (260, 100), (101, 261), (260, 262)])
    parts = {260: (259, 99), 261: (259, 100), 262: (101, 100), 263: (259, 100)}  # first and last among the old tokens
    body = o.Body("infant", len(old), o.BodyConfig(field=field, context=CONTEXT), 1)
    rng = np.random.default_rng(6)
    for array in o.Arena.ARRAYS:
        getattr(body.arena, array)[:] = rng.standard_normal(body.arena.size)
    before = body.copy()
    body.grow_vocabulary(grown, len(old))
    assert body.shape.vocabulary == 264 and body.arena.places.keys() == before.arena.places.keys()
    for array in o.Arena.ARRAYS:
        for name in body.arena.places:
            was, now = before.arena.view(array, name), body.arena.view(array, name)
            assert np.array_equal(now[: len(was)], was)
            if name in ("embedding", "expected", "head"):
                for token, (first, last) in parts.items():
                    row = was[first] if name != "embedding" else was[last] if field else (was[first] + was[last]) / 2
                    assert np.array_equal(now[token], row), (array, name, token)
            else:
                assert was.shape == now.shape
    if not field:
        assert np.allclose(np.exp(all_log_probs(body, np.array([97, 263, 258]), None, executor)).sum(1), 1, atol=1e-4)


@in_each_form
def test_a_body_comes_back_from_its_state_bit_for_bit(field):
    body = schooled("child", field, heads=HEADS["all kinds"])
    trainer, batch = o.Trainer(body, LEARNING, engine="numpy"), windows(field, 2, CONTEXT)
    for _ in range(2):
        trainer.step(*batch, 0.01)
    arrays, meta = body.state()
    arrays = {name: array.copy() for name, array in arrays.items()}
    back = o.Body.from_state(json.loads(json.dumps(meta)), arrays, o.BodyConfig(stage="embryo", context=96))
    assert back.shape == body.shape and back.steps == 2 and back.stage == "child" and back.n_params == body.n_params
    for name in o.Arena.ARRAYS:
        assert np.array_equal(getattr(back.arena, name), getattr(body.arena, name)) and getattr(body.arena, name).any()
    both = [o.Trainer(b, LEARNING, engine="numpy", seed=3) for b in (body, back)]
    back.config = body.config
    assert both[0].step(*batch, 0.01) == both[1].step(*batch, 0.01)
    assert np.array_equal(body.arena.parameters, back.arena.parameters)


def test_a_state_that_does_not_fit_is_refused():
    arrays, meta = o.Body("embryo", V, o.BodyConfig()).state()
    arrays.pop("moment1/norm")
    with pytest.raises(o.OrganismError, match="moment1/norm is missing"):
        o.Body.from_state(meta, arrays, o.BodyConfig())
    arrays["moment1/norm"] = np.zeros(3, np.float32)
    with pytest.raises(o.OrganismError, match=r"moment1/norm is \(3,\), not \(16,\)"):
        o.Body.from_state(meta, arrays, o.BodyConfig())


def test_a_copy_is_independent():
    body, batch = schooled("infant", True), windows(True, 2, CONTEXT)
    twin, before = body.copy(), [getattr(body.arena, name).copy() for name in o.Arena.ARRAYS]
    o.Trainer(twin, LEARNING, engine="numpy").step(*batch, 0.01)
    assert twin.steps == 1 and body.steps == 0
    for name, was in zip(o.Arena.ARRAYS, before, strict=True):
        assert np.array_equal(getattr(body.arena, name), was) and not np.array_equal(getattr(twin.arena, name), was)


# --- Training ---

ENGINES = [("numba", 1), ("numba", 2), ("torch", 1)]


def course(engine: str, threads: int, field: bool, steps: int = 12, learning: o.LearningConfig = LEARNING):
    """Losses of a child's first steps, each on another batch, and the child."""
    body = o.Body("child", V, o.BodyConfig(field=field, context=CONTEXT), 1)
    trainer, losses = o.Trainer(body, learning, engine=engine, threads=threads, seed=9), []
    x, y, view = windows(field, 8, CONTEXT)
    for n in range(steps):
        order = np.random.default_rng(n).permutation(8)[:6]
        rows = (order[:, None] * CONTEXT + np.arange(CONTEXT)).ravel()
        losses.append(
            trainer.step(x[order], y[order], None if view is None else view.take(rows), o.learning_rate(n, learning))
        )
    trainer.close()
    return np.array(losses), body


reference_course = functools.cache(lambda field: course("numpy", 1, field))


@in_each_form
@pytest.mark.parametrize(("engine", "threads"), ENGINES)
def test_every_engine_has_the_losses_of_the_reference(engine, threads, field):
    (losses, body), (wanted, reference) = course(engine, threads, field), reference_course(field)
    assert np.abs(losses - wanted).max() < 1e-4 and wanted[-1] < wanted[0] and body.steps == 12
    for name in o.Arena.ARRAYS:
        mine, other = getattr(body.arena, name), getattr(reference.arena, name)
        assert np.linalg.norm(mine - other) < 1e-2 * np.linalg.norm(other), name


@pytest.mark.parametrize("engine", ["numpy", "numba"])
def test_the_same_seed_and_one_thread_give_the_same_weights(engine):
    (a, one), (b, other) = (course(engine, 1, True, steps=4) for _ in range(2))
    assert np.array_equal(a, b) and all(
        np.array_equal(getattr(one.arena, n), getattr(other.arena, n)) for n in o.Arena.ARRAYS
    )


@pytest.mark.parametrize("engine", ["numpy", "numba", "torch"])
@in_each_form
def test_what_is_known_by_heart_stays_finite(field, engine):
    """Targets that are the inputs, for 200 fast steps: gradients shrink to nothing."""
    body = o.Body("embryo", V, o.BodyConfig(field=field, context=CONTEXT, word_dropout=0.0), 1)
    trainer = o.Trainer(body, dataclasses.replace(LEARNING, weight_decay=0.0), engine=engine, threads=1)
    x, _, view = windows(field, 1, CONTEXT)
    losses = [trainer.step(x, x, view, 0.05) for _ in range(200)]
    trainer.close()
    assert np.isfinite(losses).all() and losses[-1] < 0.01
    assert all(np.isfinite(getattr(body.arena, name)).all() for name in o.Arena.ARRAYS)
    assert np.isfinite(body.log_probs(x, x, view, engine == "numba")).all()


@on_each_executor
def test_enormous_weights_give_no_nan(executor):
    body, (x, y, view) = schooled("child", True), windows(True, 2, CONTEXT)
    for name in ("head", "blocks.0.qkv", "blocks.1.qkv"):
        body.arena[name][:] *= 1000
    body.arena.average[:] = body.arena.parameters
    loss, found = gradients(body, x, y, view, executor)
    assert math.isfinite(loss) and all(np.isfinite(g).all() for g in found.values())
    assert np.isfinite(spoken(body, x[0], view[:CONTEXT], executor)).all()


def test_words_are_dropped_by_step_and_seed_alone():
    class Watching:
        def __init__(self):
            self.seen = []

        def step(self, x, y, view, rate, step):
            self.seen.append(x)
            return 0.0

    x, y, view = windows(True, 8, CONTEXT)

    def shown(field: bool, seed: int, first_step: int = 0) -> list[np.ndarray]:
        body = o.Body("embryo", V, o.BodyConfig(field=field, context=CONTEXT, word_dropout=0.3), 1)
        trainer, body.steps = o.Trainer(body, LEARNING, engine="numpy", seed=seed), first_step
        trainer.gradients = Watching()
        for _ in range(2):
            trainer.step(x, y, view, 0.01)
        return trainer.gradients.seen

    a = shown(True, 1)
    assert 0.15 < np.mean(a[0] < 0) < 0.45 and np.array_equal(np.where(a[0] < 0, x, a[0]), x)
    assert np.array_equal(a, shown(True, 1)) and not np.array_equal(a[0], a[1])
    assert np.array_equal(a[1], shown(True, 1, first_step=1)[0]) and not np.array_equal(a, shown(True, 2))
    assert np.array_equal(shown(False, 1), [x, x])


@pytest.mark.parametrize("engine", ["numba", "torch"])
def test_training_pauses_while_a_reply_is_made(engine):
    body = o.Body("embryo", V, o.BodyConfig(context=CONTEXT), 1)
    trainer, batch = o.Trainer(body, LEARNING, engine=engine, threads=1), windows(True, 4, CONTEXT)
    trainer.step(*batch, 0.01)  # compiled and warm
    trainer.yield_flag[0] = 1
    thread = threading.Thread(target=trainer.step, args=(*batch, 0.01), daemon=True)
    thread.start()
    thread.join(0.2)
    assert thread.is_alive() and body.steps == 1
    trainer.yield_flag[0] = 0
    thread.join(20)
    assert not thread.is_alive() and body.steps == 2
    trainer.close()


# --- The torch engine ---


def test_the_torch_engine_works_on_the_arena_itself_where_it_can(monkeypatch):
    monkeypatch.setenv("ORGANISM_TORCH_DEVICE", "cpu")
    body, batch = schooled("embryo", True), windows(True, 2, CONTEXT)
    engine = o.organ("torch").Gradients(body, LEARNING, 1)
    for name in o.Arena.ARRAYS:
        assert np.shares_memory(engine.arrays[name].numpy(), getattr(body.arena, name))
    was = body.arena.average.copy()
    engine.step(*batch, 0.01, 1)
    assert not np.array_equal(body.arena.average, was)


def test_micro_batches_of_the_torch_engine_add_up(monkeypatch):
    body, batch = schooled("child", True), windows(True, 5, CONTEXT)
    loss, whole = o.organ("torch").Gradients(body, LEARNING, 1).of(*batch)
    monkeypatch.setattr(o.organ("torch"), "MICRO_FLOPS", 12 * CONTEXT * body.n_params)  # two sequences
    engine = o.organ("torch").Gradients(body, LEARNING, 1)
    assert engine._micro(5, CONTEXT) == 2
    parts, found = engine.of(*batch)
    assert parts == pytest.approx(loss, abs=1e-6) and worst(found, whole) < (1e-5,)


@in_each_form
def test_half_precision_learns_about_the_same(field):
    losses, body = course("torch", 1, field, learning=dataclasses.replace(LEARNING, precision="bf16"))
    wanted, _ = reference_course(field)
    assert np.abs(losses - wanted).max() < 0.05 and not np.array_equal(losses, wanted)
    assert np.isfinite(body.arena.parameters).all()


@pytest.mark.parametrize("device", ["warp", "cuda:99"])
def test_a_device_that_is_not_there_is_a_usage_error(device, monkeypatch):
    monkeypatch.setenv("ORGANISM_TORCH_DEVICE", device)
    with pytest.raises(o.UsageError, match=f"ORGANISM_TORCH_DEVICE={device} cannot be used: .*[^.]\\.$"):
        o.Trainer(schooled("embryo", True), LEARNING, engine="torch")


def test_without_pytorch_the_engine_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "organs.torch_engine", raising=False)
    with pytest.raises(
        o.OrganismError, match=r"'torch' needs torch, which is not installed: pip install -e '.\[torch\]'"
    ):
        o.Trainer(schooled("embryo", True), LEARNING, engine="torch")


@pytest.mark.cuda
@in_each_form
def test_an_accelerator_has_the_same_losses_and_writes_back(field):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    (losses, body), (wanted, reference) = course("torch", 1, field), reference_course(field)
    assert np.abs(losses - wanted).max() < 5e-3
    assert np.linalg.norm(body.arena.average - reference.arena.average) < 1e-2 * np.linalg.norm(reference.arena.average)
