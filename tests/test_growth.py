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
    """Probabilities to 1e-9; their logarithms to 1e-8, since the constants of growth are stored as float32."""
    assert np.abs(np.exp(after) - np.exp(before)).max() < 1e-9 and np.abs(after - before).max() < 1e-8


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


# --- Whole lives ---


def a_life(home, **options) -> o.Organism:
    settings = {"body.context": 16, "learning.batch": 4, "growth.auto": False, "tokenizer.retrain": "never"}
    return o.Organism(home, overrides=settings, seed=3, threads=1, kernels="wait", **options)


def lived_windows(life: o.Organism) -> tuple:
    learner = life.learner
    return learner.experience.windows(4, 16, 0, np.random.default_rng(0))


def act(life: o.Organism, action: str, step: int) -> o.Organism:
    """Do one thing to a life; what it returns goes on living."""
    if action == "grow":
        if life.next_stage in ("infant", "child"):
            life.grow()
    elif action == "expand":
        learner = life.learner
        learner.grow_vocabulary(len(learner.tokenizer.merges) + 3, life._past)
        life._field_dirty = True
        life._publish(learner, float("nan"), "vocabulary")
    elif action == "delta":
        life.add_delta(f"step {step}")
    elif action == "consolidate":
        life.consolidate_deltas()
    elif action == "learn":
        life.learn_now(f"The {step} lamps of Orrin burn blue, and the keeper counts them at night. " * 4)
    elif action in ("save", "kill"):
        if action == "save":
            life.save()
        home = life.home.path
        life.memory.close()  # and nothing else: whatever was not published is lost
        life.home.close()
        if life._learner is not None:
            life._learner.release()
        return a_life(home)
    return life


def live(home, actions: list[str]) -> np.ndarray:
    """Live through actions and check the invariants on the way; the parameters in the end."""
    life = a_life(home, stage="embryo")
    try:
        for step, action in enumerate(actions):
            windows, before = lived_windows(life), life.published.body
            log_p = before.log_probs(*windows, life.compiled)
            life = act(life, action, step)
            after = life.published.body
            if action in ("grow", "delta", "consolidate", "save", "kill"):
                assert np.abs(after.log_probs(*windows, life.compiled) - log_p).max() < 1e-4, action
                assert after.steps == before.steps
            if action == "expand":  # the old windows, spelled as before
                old = windows[2].tree if windows[2] is not None else None
                assert old is None or len(old) < after.shape.vocabulary
        return life.published.body.arena.parameters.copy()
    finally:
        life.memory.close()
        life.home.close()
        if life._learner is not None:
            life._learner.release()


ACTIONS = st.sampled_from(["grow", "expand", "delta", "consolidate", "learn", "save", "kill"])


def test_a_life_of_everything_keeps_the_invariants(tmp_path):
    """Invariants 1 and 4 of the design: nothing moves that should not, and the same life comes out twice."""
    actions = ["learn", "delta", "grow", "learn", "kill", "expand", "delta", "save", "consolidate", "grow"]
    first, again = (live(tmp_path / str(n), actions) for n in range(2))
    assert np.array_equal(first, again)


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(st.lists(ACTIONS, min_size=2, max_size=7))
def test_any_order_of_growing_keeps_the_invariants(tmp_path_factory, actions):
    first, again = (live(tmp_path_factory.mktemp("life") / "home", actions) for _ in range(2))
    assert np.array_equal(first, again)


def test_growth_is_told_in_the_table_and_its_generation_is_kept(tmp_path):
    with a_life(tmp_path / "home", stage="embryo") as life:
        facts = life.grow()
        assert facts["from"] == "embryo" and facts["stage"] == "infant" and facts["change"] < 1e-4
        number = facts["generation"]
        note = life.memory._all("SELECT note, n_params FROM growth ORDER BY id DESC LIMIT 1")[0]
        assert note == (f"ontogenesis:stage=1|params={facts['n_params']}", facts["n_params"])
        for n in range(5):
            life.add_delta(str(n))
        assert (life.home.body / f"{number:06d}").is_dir()


def test_growth_that_cannot_be_written_has_not_happened(tmp_path, monkeypatch):
    """A crash or a full disk in the middle: it wakes, and lives on, as it was before."""
    home = tmp_path / "home"
    with a_life(home, stage="embryo") as life:
        before = life.published

        def full(*_):
            raise o.OrganismError("The disk is full.")

        for change in (life.grow, lambda: life.add_delta("x")):
            with monkeypatch.context() as patch:
                patch.setattr(life.home, "publish", full)
                with pytest.raises(o.OrganismError, match="full"):
                    change()
            assert life.published is before and life.learner.body.shape == before.body.shape
    with a_life(home) as life:
        assert life.published.body.stage == "embryo" and life.published.body.deltas == []


def test_consolidation_that_cannot_be_written_has_not_happened(tmp_path, monkeypatch):
    home = tmp_path / "home"
    with a_life(home, stage="embryo") as life:
        for reason in "abc":
            life.add_delta(reason)
        with monkeypatch.context() as patch:
            patch.setattr(life.home, "publish", lambda *_: (_ for _ in ()).throw(OSError("The disk is full.")))
            with pytest.raises(OSError, match="full"):
                life.consolidate_deltas()
        assert len(life.published.body.shape.deltas) == 3
    with a_life(home) as life:
        assert [d.reason for d in life.published.body.deltas] == ["a", "b", "c"]
        assert len(life.published.body.shape.deltas) == 3
        life.consolidate_deltas()  # those that rest, a and b
        assert len(life.published.body.shape.deltas) == 2 and len(life.published.body.deltas) == 3


def test_growth_beyond_the_memory_is_refused_before_it_starts(tmp_path, monkeypatch):
    with a_life(tmp_path / "home", stage="embryo") as life:
        monkeypatch.setattr(o, "free_memory", lambda: 100_000)
        with pytest.raises(o.OrganismError, match=r"Growing to infant needs about \d+ MB of memory, and 0 MB are free"):
            life.grow()
        assert life.published.body.stage == "embryo" and life.status()["stage"] == "embryo"


def test_the_last_stage_says_so(tmp_path):
    with a_life(tmp_path / "home", stage="embryo") as life:
        life.published.body.stage = "adult"
        with pytest.raises(o.OrganismError, match="It is at its last stage, 'adult'"):
            life.grow()


def test_the_gates_are_bytes_steps_and_a_flat_curve(tmp_path):
    with a_life(tmp_path / "home", stage="embryo") as life:
        learner = life.learner
        life.state["lived_bytes"] = 30_000
        for n in range(400):
            learner.curve.add(2.0 + 1 / (n + 1))
        gates = life.growth_gates()
        assert gates["next"] == "infant" and gates["bytes_needed"] == 20_000 and gates["ready"] and gates["gain"] < 0.01
        learner.curve = o.LearningCurve([2.0 - 0.02 * n for n in range(50)])
        assert not life.growth_gates()["ready"]  # it still learns well at this size
        life.state["lived_bytes"] = 10_000
        learner.curve = o.LearningCurve([2.0] * 50)
        assert not life.growth_gates()["ready"]  # too little was lived


def test_a_body_without_a_field_is_let_grow_sooner():
    curve = o.LearningCurve([2.0 * 0.999**n for n in range(20)])  # 160 steps, 0.5 % better a quarter
    alone, on_field = (o.Config().replace({"body.field": field}) for field in (False, True))
    gates = o.growth_gates("infant", 30_000, curve, None, alone)
    assert gates["ready"] and gates["steps_needed"] == 100 and gates["flat"] == 0.05
    assert not o.growth_gates("infant", 30_000, curve, None, on_field)["ready"]
    steep = o.LearningCurve([2.0 - 0.05 * n for n in range(20)])
    assert not o.growth_gates("infant", 30_000, steep, None, alone)["ready"]


def test_the_rate_is_dampened_after_growth():
    body, learning, growth = schooled("embryo", True, np.float32), o.LearningConfig(), o.GrowthConfig()
    body.steps = 1000
    usual = o.body_rate(body, learning, growth)
    body.grow("infant")
    rates = []
    for _ in range(growth.window + 1):
        rates.append(o.body_rate(body, learning, growth))
        body.steps += 1
    assert rates[0] < rates[growth.warmup_steps] and rates[-2] == pytest.approx(growth.dampen * usual, rel=0.01)
    assert rates[-1] == pytest.approx(usual, rel=0.01)


def test_windows_a_step_can_be_set_for_each_stage():
    config = o.Config().replace({"growth.batches": ("child 8", "adult 64")})
    assert [o.stage_batch(stage, config) for stage in ("infant", "child", "adult")] == [32, 8, 64]
    with pytest.raises(o.UsageError, match="growth.batches has 'child many'"):
        o.stage_batch("child", o.Config().replace({"growth.batches": ("child many",)}))


# --- Domains and the guard ---


def test_foreign_text_gets_a_mixer_of_its_own_and_the_old_one_rests(sample_text):
    tokenizer = o.Tokenizer()
    english = (b"In the beginning the keeper of the lamps counted the ships, and the sea was calm. " * 40)[:3000]
    russian = "В начале смотритель ламп считал корабли, и море было спокойно. ".encode() * 80
    config = o.FieldConfig(table_mb=1)
    field = o.Field(tokenizer.vocabulary, config)
    for _ in range(2):
        field.read(tokenizer.encode(sample_text[:30_000] + english))
    old = field.copy()
    before = old.copy().read(tokenizer.encode(english), learn=False)[0].sum()
    assert field.route(tokenizer.encode(russian)) == 1 and len(field.resting) == 2
    field.read(tokenizer.encode(russian))
    assert field.route(tokenizer.encode(english)) == 0
    assert all(np.array_equal(a, b) for a, b in zip(field.arrays[:3], old.arrays[:3], strict=True))  # untouched
    field.route(tokenizer.encode(russian))
    after = field.copy().read(tokenizer.encode(english), learn=False)[0].sum()  # finds out by itself whose this is
    assert after < 1.1 * before
    twin = o.Field.from_state(tokenizer.vocabulary, config, field.state())
    assert twin.domain == field.domain and len(twin.resting) == 2
    assert np.array_equal(twin.dense(), field.dense())
    assert np.array_equal(
        twin.read(tokenizer.encode(english), learn=False)[0], field.read(tokenizer.encode(english), learn=False)[0]
    )


def test_unlearned_reading_notices_within_a_few_tokens_that_the_text_has_changed(sample_text):
    tokenizer = o.Tokenizer()
    field = o.Field(tokenizer.vocabulary, o.FieldConfig(table_mb=1))
    field.read(tokenizer.encode(sample_text[:40_000]))
    russian = tokenizer.encode("В начале смотритель ламп считал корабли, и море было спокойно. ".encode() * 40)
    field.route(russian)
    field.read(russian)
    field._turn_to(0)
    news = tokenizer.encode(b"Seven herons guard the copper gate while Quentin paints zebras on velvet. " * 20)
    field.read(news)  # which the second domain does not know
    field.read(np.concatenate([russian[:300], news[:300]]), learn=False)
    assert (field.read_by[200:300] == 1).all()
    late = np.flatnonzero(field.read_by[300:] == 0)[0]
    assert late <= 2 * field.LOOK and (field.read_by[300 + late :] == 0).all()


def test_a_copy_of_a_field_with_domains_is_independent():
    tokenizer = o.Tokenizer()
    field = o.Field(tokenizer.vocabulary, o.FieldConfig(table_mb=1, foreign=1.0))
    field.read(np.tile(np.arange(97, 122), 1000))
    field.route(np.arange(256) % 256)
    assert len(field.resting) == 2
    field.read(np.arange(256))
    twin, known = field.copy(), field.dense()
    twin.route(np.tile(np.arange(97, 122), 20), may_divide=False)
    assert twin.domain == 0 and field.domain == 1
    twin.read(np.zeros(500, np.int64))
    assert np.array_equal(field.dense(), known)
    resting = o._given(field.resting[0])
    assert not np.shares_memory(resting.table, twin.arrays.table)


def an_experience(**settings) -> o.Experience:
    """Nine blocks of domain 0, one of domain 1 which cost more."""
    experience = o.Experience(100_000, 8, None, 0, dataclasses.replace(o.LearningConfig(), **settings))
    experience.append(np.zeros(9 * 1024, np.int32), None, 0, 1.0)
    experience.append(np.ones(1024, np.int32), None, 1, 4.0)
    return experience


@pytest.mark.parametrize(
    "settings,share",
    [(dict(replay_domain=1.0), 0.1), (dict(replay_domain=0.5), 0.25), (dict(replay_domain=0.0), 0.5),
     (dict(replay_domain=1.0, replay_surprise=1.0), 4 / 13), (dict(replay_domain=1.0, replay_age=50.0), 1.0)],
)  # fmt: skip
def test_replay_is_drawn_by_domain_surprise_and_age(settings, share):
    experience = an_experience(**settings)
    x, _, _ = experience.windows(4000, 16, 0, np.random.default_rng(0))
    assert x[:, -1].mean() == pytest.approx(share, abs=0.03)


def test_rare_domains_outlive_the_trim():
    """Of 48 older blocks of one domain and 4 of another half goes: mostly of the large one."""
    left = []
    for seed in range(20):
        experience = o.Experience(64 * 1024, 8, None, seed)
        experience.append(np.zeros(70 * 1024, np.int32), None, 0)
        experience.domains[10 * 1024 : 14 * 1024] = 1
        experience.trim()
        assert experience.length <= 64 * 1024
        left.append((experience.domains[: experience.length] == 1).sum() / (4 * 1024))
    assert np.mean(left) > 0.7


def test_an_experience_of_the_first_format_is_read():
    experience = an_experience()
    arrays = {k: v.copy() for k, v in experience.state().items() if k not in ("domains", "costs")}
    other = o.Experience(100_000, 8, None, 0)
    other.load(arrays)
    assert other.length == experience.length and not other.domains.any()


def test_the_guard_replays_a_domain_that_was_hurt(tmp_path):
    """A body that was made to forget one of two domains wins it back, partly, before it would be published."""
    with a_life(tmp_path / "home", stage="embryo") as life:
        life.learn_now("The lamps of Orrin burn blue. " * 50)
        learner = life.learner
        learner.experience.domains[: learner.experience.length // 2] = 1
        before = learner.body.copy()
        assert learner.guard(before).keys() == {0, 1}
        rng = np.random.default_rng(0)
        for array in ("parameters", "average"):
            learner.body.arena.view(array, "head")[:] += 0.3 * rng.standard_normal(before.arena["head"].shape)
        hurt = learner.domain_bits()
        steps = learner.body.steps
        after = learner.guard(before)
        assert learner.body.steps - steps == life.config.learning.guard_steps
        assert all(after[d][0] < after[d][1] < hurt[d] for d in after)
