"""Growth: a body becomes larger without a change of what it predicts, and starts to learn with all that is new.

pytest tests/test_growth.py
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import organism as o

VOCABULARY = [bytes([i]) for i in range(32, 72)]
V, CONTEXT = len(VOCABULARY), 12
STAGES, STEPS = list(o.STAGES), list(zip(o.STAGES, list(o.STAGES)[1:], strict=False))
LEARNING = o.LearningConfig(warmup_steps=1)
in_each_form = pytest.mark.parametrize("field", [True, False], ids=["field", "plain"])
on_each_executor = pytest.mark.parametrize("executor", ["numpy", "numba"])


def some_life() -> tuple[np.ndarray, o.FieldView]:
    """Tokens with some order in them [n], and what a field thought before it read each."""
    rng = np.random.default_rng(0)
    tokens = np.concatenate([np.tile(rng.integers(0, V, 9), 6), rng.integers(0, V, 20)])
    _, view = o.ReferenceField(VOCABULARY, o.FieldConfig(table_mb=1)).read(tokens, views=True)
    return tokens, view


TOKENS, VIEW = some_life()


def disturb(body: o.Body, seed: int, dtype=np.float64) -> o.Body:
    """The same body with all parameters and moments moved away from what they were at birth, in another precision."""
    arena, rng = o.Arena(body.shape.layout(), dtype), np.random.default_rng(seed)
    for name, place in arena.places.items():
        size = 1.0 if name.endswith("alpha") else 0.04
        arena[name][:] = body.arena[name] + size * rng.standard_normal(place.shape)
        arena.view("moment1", name)[:] = rng.standard_normal(place.shape)
        arena.view("moment2", name)[:] = rng.random(place.shape)
    arena.average[:] = arena.parameters
    body.arena = arena
    return body


def schooled(stage: str, field: bool, dtype=np.float64, **config) -> o.Body:
    return disturb(o.Body(stage, V, o.BodyConfig(field=field, context=CONTEXT, **config), 1), 1, dtype)


def distribution(body: o.Body, length: int = CONTEXT) -> np.ndarray:
    """float64 [T, V]: ln p of every token after the first T, by the reference in the arena's own precision."""
    with o.no_grad():
        tape = o.Tape(1, length, body.context)
        places = o.layout_places(body.shape.layout())
        h = o.record_hidden(tape, body.shape, places)
        if body.on_field:
            o.field_logits(h, places["head"], places["gain"])
        else:
            o.logits(h, places["embedding"])
        program = tape.plan()
    angles = o.rope_angles(body.context, *body.shape.rope)
    space = np.zeros(program.size, body.arena.dtype)
    view = VIEW[1 : length + 1] if body.on_field else None
    o.execute(
        program,
        o.Machine(body.arena.average, space, angles, TOKENS[:length].astype(np.int64), length=length, view=view),
    )
    begins = program.steps[-1].buffers["out"].offset
    logits = space[begins : begins + length * V].reshape(length, V).astype(np.float64)
    top = logits.max(1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(1, keepdims=True))


def assert_same(after: np.ndarray, before: np.ndarray) -> None:
    assert np.abs(np.exp(after) - np.exp(before)).max() < 1e-9 and np.abs(after - before).max() < 1e-9


# --- The function stays ---


@in_each_form
def test_every_step_of_growth_leaves_the_distribution(field):
    body = schooled("embryo", field)
    for seed, stage in enumerate(STAGES[1:4]):
        before = distribution(body)
        body.grow(stage)
        assert_same(distribution(body), before)
        disturb(body, seed)  # what joined takes part from now on


@in_each_form
@pytest.mark.parametrize("stage,larger", STEPS[3:])
def test_the_late_steps_leave_the_distribution(stage, larger, field):
    body = schooled(stage, field)
    before = distribution(body, 6)
    body.grow(larger)
    assert_same(distribution(body, 6), before)


@in_each_form
def test_an_embryo_may_become_an_adult_at_once(field):
    body = schooled("embryo", field)
    before = distribution(body, 6)
    body.grow("adult")
    assert_same(distribution(body, 6), before)


@on_each_executor
@in_each_form
@pytest.mark.parametrize("stage,larger", STEPS)
def test_growth_in_single_precision(stage, larger, field, executor):
    body = schooled(stage, field, np.float32)
    x, y, view = TOKENS[None, :CONTEXT], TOKENS[None, 1 : CONTEXT + 1], VIEW[1 : CONTEXT + 1] if field else None
    before = body.log_probs(x, y, view, executor == "numba")
    body.grow(larger)
    after = body.log_probs(x, y, view, executor == "numba")
    assert np.abs(np.exp(after) - np.exp(before)).max() < 1e-5 and np.abs(after - before).max() < 1e-4


def test_speaking_goes_on_as_before():
    body = schooled("child", True, np.float32)
    spoken = lambda: np.array([d.feed(int(t), VIEW[i]) for d in [o.Decoder(body)] for i, t in enumerate(TOKENS[:40])])
    before = spoken()
    body.grow("adolescent")  # its heads are larger: keys are turned back by other angles when the cache makes room
    assert np.abs(spoken() - before).max() < 1e-4


sizes = st.integers(0, 3)


@settings(max_examples=25)
@given(
    st.booleans(), st.lists(sizes, min_size=8, max_size=8), st.lists(sizes, min_size=8, max_size=8), st.integers(0, 99)
)
def test_any_shape_may_become_any_larger_one(field, small, more, seed):
    """Width, layers, head size, context and heads of every kind; heads that have no place of their kind turn hybrid."""
    width, layers, size, context, *heads = small
    heads[0] += not sum(heads[:3])
    base = o.BodyShape(8 + 4 * width, 1 + layers, sum(heads[:3]), 2 + 2 * size, heads[1], heads[2], 6 + context, V, field,
                       ("attention",) * (1 + layers))  # fmt: skip
    grown = [a + b for a, b in zip(heads, more[4:], strict=True)]
    turned = min(heads[0], more[3] % 2)  # a content head that becomes hybrid
    wide = o.BodyShape(base.width + 4 * more[0], base.layers + more[1], sum(grown[:3]), base.head_size + 2 * more[2],
                       grown[1] + turned, grown[2], base.context + more[3], V, field, ("attention",) * (base.layers + more[1]))  # fmt: skip
    if grown[0] - turned < 0:
        return
    body = o.Body("embryo", V, o.BodyConfig(field=field))
    body.shape = base
    body.arena = o.Arena(base.layout())
    body._initialise(np.random.default_rng(seed))
    disturb(body, seed)
    before = distribution(body, 6)
    body.refit(o.Growth(base, wide, 0.3), np.random.default_rng(seed))
    for name in body.arena.places:
        if name.endswith("alpha") and turned:
            assert np.isfinite(body.arena[name]).all()
    if turned:  # new hybrid heads must begin with the logit that the growth counted with
        body.config = dataclasses.replace(body.config, hybrid_alpha_init=0.3)
        body.shape, body.arena = base, disturbed(base, seed)
        body.refit(o.Growth(base, wide, 0.3), np.random.default_rng(seed))
    assert_same(distribution(body, 6), before)


def disturbed(shape: o.BodyShape, seed: int) -> o.Arena:
    body = o.Body("embryo", V, o.BodyConfig(field=shape.on_field))
    body.shape, body.arena = shape, o.Arena(shape.layout())
    body._initialise(np.random.default_rng(seed))
    return disturb(body, seed).arena


def test_a_longer_context_changes_nothing_that_fitted_the_shorter_one():
    body = schooled("child", True)
    before = distribution(body)
    body.config = dataclasses.replace(body.config, context=3 * CONTEXT)
    body.grow("adolescent")
    assert body.context == 3 * CONTEXT
    assert_same(distribution(body), before)


def test_growth_shrinks_nothing():
    body = schooled("child", False)
    with pytest.raises(o.UsageError, match="A body only grows: width 64 is more than 16"):
        body.grow("embryo")
    with pytest.raises(o.UsageError, match="There is no stage 'giant': choose one of embryo"):
        body.grow("giant")


def test_heads_that_find_no_place_are_named():
    body = schooled("child", False, head_types=("rrpram",) * 4)
    body.config = dataclasses.replace(body.config, head_types=("content",) * 4)
    with pytest.raises(o.UsageError, match="A pure head of the body finds no place"):
        body.grow("adolescent")


# --- What goes along ---


def test_moments_go_along_by_name_and_scale():
    """m = Σ g and v = Σ g²: where a number was multiplied by c, its gradient is divided by c."""
    body = schooled("child", True)
    old = body.arena
    body.grow("adolescent")
    depth = np.sqrt(4 / 2)
    assert np.allclose(body.arena["blocks.0.down"][:256, :64], old["blocks.0.down"] * depth)
    for array, power in (("moment1", 1), ("moment2", 2)):
        found, before = body.arena.view(array, "blocks.0.down"), old.view(array, "blocks.0.down")
        assert np.allclose(found[:256, :64], before / depth**power)
        assert not found[256:].any() and not found[:, 64:].any()
    assert np.allclose(body.arena.view("average", "embedding")[:, :64], old.view("average", "embedding"))


def test_gamma_does_not_count_growth_as_character():
    body = schooled("child", True, np.float32)
    before = o.Gamma.of(body.arena["embedding"], body.birth)
    body.grow("adolescent")
    after = o.Gamma.of(body.arena["embedding"], body.birth)
    assert after.magnitude == pytest.approx(before.magnitude)


def test_the_angles_of_a_head_that_doubled_are_those_of_the_larger_head():
    assert np.allclose(np.sort(o.rope_frequencies((16, 32))), np.sort(o.rope_frequencies((32,))))
    assert np.array_equal(o.rope_frequencies((16, 32, 40))[:16], o.rope_frequencies((16, 32)))
    assert len(set(o.rope_frequencies((16, 32, 40)).tolist())) == 20


def test_a_grown_body_comes_back_from_its_state():
    body = schooled("child", True, np.float32)
    body.grow("adolescent")
    arrays, meta = body.state()
    twin = o.Body.from_state(o.json.loads(o.json.dumps(meta)), arrays, body.config)
    assert twin.shape == body.shape and twin.grown_at == body.steps
    assert np.array_equal(twin.arena.parameters, body.arena.parameters)


def test_a_body_saved_before_there_was_growth_wakes():
    body = schooled("infant", True, np.float32)
    arrays, meta = body.state()
    old = dict(stage=meta["stage"], steps=meta["steps"],
               shape={k: v for k, v in meta["shape"].items() if k not in ("epsilon", "rope", "deltas")})  # fmt: skip
    state = o.GENERATION_MIGRATIONS[1](dict(format=1, body=old))
    twin = o.Body.from_state(state["body"], arrays, body.config)
    assert twin.shape == body.shape and twin.grown_at is None and twin.deltas == []


# --- New capacity learns ---


@in_each_form
@pytest.mark.parametrize("stage,larger", STEPS[:3])
def test_all_that_is_new_learns_and_nothing_is_a_copy(stage, larger, field):
    """After a few steps every new row and column of every matrix has a gradient, and no two of them are alike."""
    body = schooled(stage, field, np.float32)
    old = body.shape
    body.grow(larger)
    trainer = o.Trainer(body, LEARNING, "numpy")
    x = np.stack([TOKENS[i : i + CONTEXT] for i in range(8)])
    y = np.stack([TOKENS[i + 1 : i + CONTEXT + 1] for i in range(8)])
    at = np.arange(8)[:, None] + 1 + np.arange(CONTEXT)
    view = VIEW.take(at) if field else None
    for _ in range(4):
        trainer.step(x, y, view, 0.003)
    trainer.gradients.of(x, y, view)
    for name, place in body.arena.places.items():
        kind = name.rpartition(".")[2]
        gradient = place.of(trainer.gradients.flat).astype(np.float64)
        if kind in ("out", "down", "gate_up", "norm1", "norm2"):
            moved = np.abs(gradient).reshape(len(gradient), -1).max(1)
            assert (moved > 0).all(), f"{name}: rows without a gradient"
        if kind in ("out", "down"):
            fresh = gradient[:, old.width :].T
            assert np.linalg.matrix_rank(fresh) == min(fresh.shape), f"{name}: new columns move alike"


def test_growth_is_a_function_of_the_seed():
    bodies = [schooled("embryo", True) for _ in range(3)]
    for body, seed in zip(bodies, (1, 1, 2), strict=True):
        body.grow("infant", seed)
    a, b, c = (body.arena.parameters for body in bodies)
    assert np.array_equal(a, b) and not np.array_equal(a, c)


# --- Stages of one's own ---


def test_stages_of_ones_own_follow_the_adult():
    config = o.BodyConfig(stages=("elder 384 7 8 48 900_000", "ancient 512 8 8 64 2000000"))
    assert list(o.stages(config))[-2:] == ["elder", "ancient"]
    assert o.stages(config)["elder"] == (o.Stage(384, 7, 8, 48), 900_000)


@pytest.mark.parametrize(
    "entry", ["elder 384 7 8", "elder 384 7 8 47 900000", "adult 384 7 8 48 900000", "elder 100 7 8 48 900000"]
)
def test_a_stage_that_cannot_be_is_refused(entry):
    with pytest.raises(o.UsageError, match="body.stages has"):
        o.stages(o.BodyConfig(stages=(entry,)))
