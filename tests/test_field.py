"""The field: probabilities that sum to one, no leaks, exact replay, and two twins that agree.   pytest tests/test_field.py"""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import organism as o

pytest.importorskip("numba")

BYTES = [bytes([i]) for i in range(256)] + [b""] * 3
WORDS = [b"the", b" the", b"he", b" cat", b" sat", b" on", b" mat", b". ", b"\n", "д".encode(), "да".encode()]
VOCABULARY = BYTES + WORDS
CONFIG = o.FieldConfig(table_mb=1)
TEXT = b"The cat sat on the mat. The dog sat on the log.\n    def f(x):\n        return x + 1\n" * 4
KINDS = ["numba", "numpy", "cooccur"]


def field(kind="numba", vocabulary=VOCABULARY, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    if kind == "cooccur":
        return o.CooccurField(vocabulary, config)
    return (o.Field if kind == "numba" else o.ReferenceField)(vocabulary, config)


def greedy(data: bytes) -> list[int]:
    """Longest tokens first: a tokenizer good enough for tests."""
    tokens, at = [256], 0
    while at < len(data):
        best = max(
            (t for t, word in enumerate(VOCABULARY) if word and data.startswith(word, at)),
            key=lambda t: len(VOCABULARY[t]),
        )
        tokens.append(best)
        at += len(VOCABULARY[best])
    return tokens + [257]


TOKENS = np.array(greedy(TEXT))


def same(a: o.Field, b: o.Field) -> None:
    for name, array in a.state().items():
        other = b.state()[name]
        assert array.dtype == other.dtype and np.array_equal(array, other), f"{name} differs"


# --- The tree ---


def test_the_tree_is_a_partition_in_byte_order_that_balances_weights():
    weights = np.arange(len(VOCABULARY)) % 7
    tree = o.FieldTree(VOCABULARY, weights)
    assert [VOCABULARY[t] for t in tree.leaf] == sorted(VOCABULARY)
    assert np.array_equal(tree.leaf[tree.rank], np.arange(len(VOCABULARY)))
    assert tree.share.sum() == pytest.approx(1) and tree.share[tree.rank[5]] / tree.share[
        tree.rank[1]
    ] == pytest.approx(5.2 / 1.2)
    low, mid, high, left, right, group, local = tree.nodes.T
    leaves = sorted(-1 - child for child in np.concatenate([left, right]) if child < 0)
    assert leaves == list(range(len(VOCABULARY)))
    for node, child in itertools.chain(enumerate(left), enumerate(right)):
        if child >= 0:
            assert child > node and low[node] <= low[child] and high[child] <= high[node]
            assert (
                local[child] == 1
                and group[child] == child
                or local[child] // 2 == local[node]
                and group[child] == group[node]
            )
    weight = lambda a, b: tree.cumulative[b] - tree.cumulative[a]
    big = [n for n in range(len(low)) if high[n] - low[n] > 20]
    assert all(0.3 < weight(low[n], mid[n]) / weight(low[n], high[n]) < 0.7 for n in big)


def test_a_tree_of_hostile_weights_is_not_too_deep():
    for size in (2, 3, 3000):
        tree = o.FieldTree([b"%d" % i for i in range(size)], 2.0 ** (np.arange(size) % 1000))
        depth = np.zeros(size - 1, int)
        for node, child in itertools.product(range(size - 1), (3, 4)):
            if tree.nodes[node, child] >= 0:
                depth[tree.nodes[node, child]] = depth[node] + 1
        assert depth.max() < 63


def test_sizes_and_weights_outside_the_limits_are_refused():
    with pytest.raises(o.OrganismError, match="tokens"):
        o.FieldTree([b"a"])
    with pytest.raises(o.OrganismError, match="65535"):
        o.FieldTree([b"a"] * 65536)
    for weights in (np.zeros(3), np.full(2, np.nan), np.array([-1.0, 1.0])):
        with pytest.raises(ValueError):
            o.FieldTree([b"a", b"b"], weights)


def test_the_largest_vocabularies_work():
    many = BYTES + [b"%x" % i for i in range(65_535 - 259)]
    f = field(vocabulary=many)
    f.read([65_534, 0, 256, 65_534, 0])
    assert f.prob(256) > 0.001 and f.dense().sum() == pytest.approx(1) and f.view().starts.max() > 60_000


# --- Probabilities ---


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_sum_to_one_by_brute_force(kind):
    f = field(kind)
    pieces = 3 if kind == "numba" else 1  # the reference takes a hundredth of a second a token
    for part in np.split(TOKENS[:60], pieces):
        f.read(part)
        dense = f.dense()
        each = [f.prob(t) for t in range(len(VOCABULARY))]
        assert sum(each) == pytest.approx(1, abs=1e-9) and np.allclose(each, dense, rtol=1e-12) and min(each) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_walk_gives_what_the_dense_pass_gives(kind):
    f = field(kind)
    f.read(TOKENS[:80])
    for token in TOKENS[80:110]:
        p = f.dense()[token]
        cost = f.read([token])[0][0]
        assert cost == pytest.approx(-np.log2(p), rel=1e-6)


def test_every_token_is_predicted_by_the_walk_as_by_the_dense_pass():
    f = field()
    f.read(TOKENS)
    dense = f.dense()
    walked = [2.0 ** -f.copy().read([t], learn=False)[0][0] for t in range(len(VOCABULARY))]
    assert np.allclose(walked, dense, rtol=1e-6) and sum(walked) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_read_often_becomes_likely(kind):
    f = field(kind)
    first = f.read(TOKENS)[0].sum()
    assert f.read(TOKENS)[0].sum() < (0.2 if kind != "cooccur" else 0.5) * first
    assert f.seen == 2 * len(TOKENS)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, len(VOCABULARY) - 1), max_size=120), st.integers(0, 120))
def test_any_stream_can_be_read_in_any_parts(tokens, cut):
    whole, parts, single = field(), field(), field()
    costs = whole.read(tokens)[0]
    split = np.concatenate([parts.read(tokens[:cut])[0], parts.read(tokens[cut:])[0]])
    one = np.array([single.learn(t) for t in tokens])
    assert (
        np.array_equal(costs, split) and np.array_equal(costs, one) and np.all(costs > 0) and np.all(np.isfinite(costs))
    )
    same(whole, parts)
    same(whole, single)
    assert whole.dense().sum() == pytest.approx(1)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=400), st.randoms())
def test_the_future_changes_no_cost_of_the_past(tokens, random):
    half = len(tokens) // 2
    future = tokens[half:]
    random.shuffle(future)
    a, views_a = field().read(tokens, views=True)
    b, views_b = field().read(tokens[:half] + future, views=True)
    assert np.array_equal(a[:half], b[:half])
    assert np.array_equal(views_a.logmass[: half + 1], views_b.logmass[: half + 1])


@pytest.mark.parametrize("kind", KINDS)
def test_stopping_and_continuing_changes_nothing(kind):
    f = field(kind)
    f.read(TOKENS[:100])
    f.boost([5, 5, 7])
    stored = {name: array.copy() for name, array in f.state().items()}
    again = type(f).from_state(VOCABULARY, CONFIG, stored)
    assert np.array_equal(f.dense(), again.dense()) and again.seen == 100
    assert np.array_equal(f.read(TOKENS[100:200])[0], again.read(TOKENS[100:200])[0])
    same(f, again)


def test_a_checkpoint_survives_a_file_and_another_config(tmp_path):
    f = field(table_mb=2, contexts="lite")
    f.read(TOKENS)
    np.savez(tmp_path / "field.npz", **f.state())
    with np.load(tmp_path / "field.npz", allow_pickle=False) as arrays:
        again = o.Field.from_state(VOCABULARY, CONFIG, dict(arrays))
    same(f, again)
    assert again.config.table_mb == 2 and again.config.contexts == "lite"
    broken = dict(f.state(), weights=np.zeros((1, 16), np.float32))
    with pytest.raises(o.OrganismError, match="weights"):
        o.Field.from_state(VOCABULARY, CONFIG, broken)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_is_independent(kind):
    f = field(kind)
    f.read(TOKENS[:50])
    f.boost([3])
    twin, before = f.copy(), {name: array.copy() for name, array in f.state().items()}
    twin.read(TOKENS[50:])
    twin.boost([9])
    for name, array in f.state().items():
        assert np.array_equal(array, before[name]), name
    assert np.array_equal(
        f.read(TOKENS[50:])[0], f.__class__.from_state(VOCABULARY, CONFIG, before).read(TOKENS[50:])[0]
    )


def test_ids_outside_the_vocabulary_never_reach_the_kernel():
    f = field()
    for bad in ([-1], [len(VOCABULARY)], [0, 2**40]):
        with pytest.raises(ValueError, match="token ids"):
            f.read(bad)
    assert f.read([])[0].shape == (0,) and len(f.read([], views=True)[1]) == 0


def test_a_full_table_never_hangs_and_a_long_history_wraps(monkeypatch):
    monkeypatch.setattr(o, "_FIELD_HISTORY", 1 << 13)
    f = field()
    rng = np.random.Generator(np.random.PCG64(0))
    f.read(rng.integers(0, 256, 60_000))
    assert len(f.arrays.history) == 1 << 13
    passage = rng.integers(0, 256, 300)
    first, second = f.read(passage)[0].mean(), f.read(passage)[0].mean()
    assert second < first / 4, "the match model finds a passage in the ring"
    assert f.dense().sum() == pytest.approx(1)


# --- Observing, boosting, sampling ---


@pytest.mark.parametrize("kind", KINDS)
def test_observing_moves_contexts_and_learns_nothing(kind):
    f = field(kind)
    f.read(np.tile(TOKENS, 3))
    before = f.state()
    tables = {
        k: v.copy() for k, v in before.items() if k in ("table", "maps", "weights", "match_table", "counts1", "counts4")
    }
    for token in TOKENS[:20]:
        f.observe(token)
    assert all(np.array_equal(f.state()[k], v) for k, v in tables.items()) and f.seen == 3 * len(TOKENS)
    assert f.dense()[TOKENS[20]] > 0.3, "it stands where the passage stands"


@pytest.mark.parametrize("kind", KINDS)
def test_boosts_raise_a_token_when_speaking_only_and_fade(kind):
    f = field(kind)
    f.read(TOKENS)
    token, p, plain = 259, f.prob(259), f.dense()
    f.boost([token, token])
    assert f.prob(token) == p and f.dense().sum() == pytest.approx(1)
    assert f.dense()[token] == pytest.approx(p * 1.6 / (1 + 0.6 * p))
    assert np.exp(f.view().dense_log().astype(float)).sum() == pytest.approx(1, abs=1e-5)
    assert f.view().dense_log()[0, token] > np.log(p)
    for _ in range(20):
        f.decay_boosts()
    assert np.allclose(f.dense(), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_follow_the_distribution(kind):
    f = field(kind)
    f.read(np.tile(TOKENS, 2))
    rng = np.random.Generator(np.random.PCG64(1))
    p = f.dense()
    assert f.sample(rng, temperature=0) == p.argmax()
    f.dense = lambda: p  # the same answer, once
    drawn = np.bincount([f.sample(rng) for _ in range(3000)], minlength=len(p)) / 3000
    assert np.abs(drawn - p).max() < 0.04
    cold = np.mean([f.sample(rng, 0.3) == p.argmax() for _ in range(200)])
    assert cold >= drawn[p.argmax()] - 0.1


# --- Views ---


@pytest.mark.parametrize("kind", KINDS)
def test_a_view_is_close_to_the_distribution_and_sums_to_one(kind):
    f = field(kind)
    f.read(TOKENS)
    view, dense = f.view(), f.dense()
    raw = np.exp(view.logmass.astype(float)) * (view.starts < len(VOCABULARY))
    assert raw.sum() == pytest.approx(1, abs=1e-3)
    p = np.exp(view.dense_log()[0].astype(float))
    assert p.sum() == pytest.approx(1, abs=1e-6)
    assert np.sum(dense * np.log(dense / p)) < 0.02
    assert view.starts.dtype == np.uint16 and view.logmass.dtype == view.scalars.dtype == np.float16


def test_an_unpruned_view_is_the_distribution():
    f = field(view_width=len(VOCABULARY), view_floor=0.0)
    f.read(TOKENS)
    assert np.allclose(f.view().dense_log()[0], np.log(f.dense()), atol=0.005)  # float16 alone


def test_views_of_a_read_are_the_views_before_each_token():
    f, slow = field(), field()
    costs, views = f.read(TOKENS[:70], views=True)
    for i, token in enumerate(TOKENS[:70]):
        row = slow.view()
        for name in ("starts", "logmass", "scalars"):
            assert np.array_equal(getattr(row, name)[0], getattr(views, name)[i]), (i, name)
        slow.learn(token)
    same(f, slow)
    assert np.array_equal(costs, field().read(TOKENS[:70])[0]), "views change nothing"


def test_views_can_be_sliced_joined_and_taken():
    views = field().read(TOKENS[:40], views=True)[1]
    dense = views.dense_log()
    joined = o.FieldView.concat([views[:10], views[10:]])
    assert len(joined) == 40 and np.array_equal(joined.dense_log(), dense)
    assert np.array_equal(views.take([3, 3, 0]).dense_log(), dense[[3, 3, 0]])
    assert len(views[5]) == len(views[-1]) == 1 and np.array_equal(views[-1].dense_log()[0], dense[-1])
    tokens, p = views.singletons()
    row = np.exp(dense[20])
    assert np.allclose(p[20][p[20] > 0], row[tokens[20][p[20] > 0]], rtol=1e-4) and p.sum(1).max() <= 1.001


def test_scalars_say_how_sure_the_field_is():
    f = field()
    f.read(TOKENS)
    views = f.read(TOKENS, views=True)[1]
    entropy, top, length, matched, last, recent = views.scalars.astype(float).T
    assert np.all(np.isfinite(views.scalars)) and matched[40] == 1 and length[60] > length[0]
    exact = -(np.exp(views.dense_log()) * views.dense_log()).sum(1) / 2 - 1
    assert np.abs(entropy - exact).mean() < 0.2 and top.max() <= 1
    assert recent[-1] < recent[0] and last.min() >= -0.5


# --- Twins ---


@pytest.mark.parametrize("contexts", ["full", "lite"])
def test_the_kernel_equals_the_reference(contexts):
    fast, slow = field(contexts=contexts), o.ReferenceField(VOCABULARY, dataclasses.replace(CONFIG, contexts=contexts))
    tokens = np.concatenate([TOKENS, [258, 0, 255], TOKENS[:80]])
    a, views_a = fast.read(tokens, views=True)
    b, views_b = slow.read(tokens, views=True)
    assert np.allclose(a, b, rtol=2e-3, atol=1e-4), f"largest difference {np.abs(a - b).max()} bits"
    assert np.allclose(fast.dense(), slow.dense(), rtol=5e-3)
    assert np.allclose(views_a.dense_log(), views_b.dense_log(), atol=0.1) and np.allclose(
        views_a.scalars, views_b.scalars, atol=0.02
    )
    for name in ("table", "match_table", "registers", "rolling", "history", "visits"):
        assert np.array_equal(getattr(fast.arrays, name), getattr(slow.arrays, name)), name
    for name in ("maps", "weights", "final", "apm", "costs"):
        x, y = getattr(fast.arrays, name), getattr(slow.arrays, name)
        assert np.allclose(x, y, rtol=1e-2, atol=2e-3), name


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, len(VOCABULARY) - 1), min_size=1, max_size=60))
def test_the_twins_agree_on_any_stream(tokens):
    fast, slow = field(), field("numpy")
    assert np.allclose(fast.read(tokens)[0], slow.read(tokens)[0], rtol=1e-3, atol=1e-4)


def test_without_kernels_the_reference_answers(monkeypatch):
    def missing(name):
        raise o.OrganismError("no kernels here")

    monkeypatch.setattr(o, "organ", missing)
    assert o.Field(VOCABULARY, CONFIG).read([1, 2, 3])[0].min() > 0
    with pytest.raises(o.OrganismError):
        o.Field(VOCABULARY, CONFIG, engine="numba")
    assert isinstance(o.make_field(VOCABULARY, CONFIG, None, compiled=False), o.CooccurField)


# --- Counting ---


def test_counting_at_once_counts_the_same_as_token_by_token():
    a, b = field("cooccur"), field("cooccur")
    for part in np.array_split(TOKENS, 7):
        a.read(part)
        b.read(part, costs=False)
    assert (
        a.counts == b.counts and a.contexts == b.contexts and a.near == b.near and np.array_equal(a.dense(), b.dense())
    )
    assert all(sum(c.values()) == sum(t.values()) for c, t in zip(a.counts, a.contexts))


def test_tables_double_with_what_was_read_and_stay_within_bounds():
    sizes = [o.wanted_table_mb(seen, o.FieldConfig()) for seen in (0, 30_000, 100_000, 500_000, 10**9)]
    assert sizes[0] == 4 and sizes == sorted(sizes) and sizes[-1] == 128
    assert o.wanted_table_mb(10**9, o.FieldConfig(table_mb=8, max_table_mb=2)) == 8


def test_settings_are_in_the_checkpoint_as_plain_json():
    made = json.loads(bytes(field(contexts="lite").state()["settings"]))
    assert made["contexts"] == "lite" and made["table_mb"] == 1
