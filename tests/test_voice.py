"""The voice: the sampling chain, streaming, recall's change of point of view.   pytest tests/test_voice.py"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import organism as o

PLAIN = dict(frequency_penalty=0.0, presence_penalty=0.0, entropy_boost=1.0, entropy_focus=1.0, temperature=1.0)
OPEN = dict(top_k=0, top_p=1.0, min_p=0.0, typical_p=1.0)


def chain(seed=0, temperature=None, **settings):
    config = o.dataclasses.replace(o.Config().voice, **{**PLAIN, **OPEN, **settings})
    return o.SamplingChain(config, np.random.Generator(np.random.PCG64(seed)), temperature)


def distribution(seed, size=50):
    p = np.random.default_rng(seed).dirichlet(np.full(size, 0.3))
    return p / p.sum()


def test_an_open_chain_draws_from_the_distribution_itself():
    p, sampler = distribution(1, 8), chain()
    counts = np.bincount([sampler.choose(p, []) for _ in range(20_000)], minlength=8)
    assert np.abs(counts / counts.sum() - p).max() < 0.015


@pytest.mark.parametrize("filters", [dict(top_k=1), dict(temperature=0.0), dict(top_p=1e-9), dict(min_p=1.0)])
def test_the_narrowest_filters_leave_the_likeliest_token(filters):
    p = distribution(2)
    sampler = chain(**filters)
    assert {sampler.choose(p, []) for _ in range(20)} == {int(p.argmax())}


@given(
    seed=st.integers(0, 500),
    k=st.integers(1, 60),
    top_p=st.floats(0.05, 1),
    min_p=st.floats(0, 0.9),
    typical=st.floats(0.05, 1),
)
@settings(max_examples=60, deadline=None)
def test_filters_keep_a_distribution_and_respect_their_bounds(seed, k, top_p, min_p, typical):
    p = distribution(seed)
    q = chain(top_k=k, top_p=top_p, min_p=min_p, typical_p=typical)._filtered(p)
    assert q.sum() == pytest.approx(1) and (q > 0).sum() <= k
    assert p[q > 0].min() >= min_p * p.max() * (1 - 1e-12)


def test_top_p_keeps_the_smallest_likeliest_set_that_reaches_it():
    p = np.array([0.4, 0.3, 0.2, 0.1])
    assert (chain(top_p=0.6)._filtered(p) > 0).tolist() == [True, True, False, False]


def test_penalties_lower_what_was_said_and_bans_are_final():
    p = np.array([0.5, 0.3, 0.2])
    sampler = chain(frequency_penalty=100.0, temperature=0.0)
    assert sampler.choose(p, [0, 0]) == 1
    assert sampler.choose(p, [], banned=[0, 1]) == 2


def test_entropy_adaptation_loosens_the_sure_and_focuses_the_unsure():
    adaptive = chain(entropy_boost=1.2, entropy_focus=0.8)
    sure, unsure = np.array([0.95, 0.05]), np.full(64, 1 / 64) + np.linspace(0, 1e-2, 64)
    unsure /= unsure.sum()
    assert adaptive._tempered(np.log(sure))[0] < 0.95
    assert adaptive._tempered(np.log(unsure)).max() > unsure.max()


def test_the_repetition_guard_sees_periods_longer_than_itself():
    assert o.repeats([1, 2, 3, 4] * 2, 4)
    assert o.repeats([9, *([1, 2, 3, 4, 5, 6, 7] * 2)], 4)
    assert not o.repeats([1, 2, 3, 4, 1, 2, 3, 5], 4)
    assert not o.repeats([1] * 50, 0)


@given(st.text(max_size=60), st.lists(st.integers(1, 5), min_size=1, max_size=80))
@settings(max_examples=100, deadline=None)
def test_a_stream_gives_whole_characters_and_the_whole_text(text, cuts):
    data, stream, out, at = text.encode(), o.TextStream(stops=()), [], 0
    for n in cuts:
        out.append(stream.push(data[at : at + n]))
        at += n
    out.append(stream.push(data[at:], last=True))
    assert "".join(out) == text
    assert "�" in text or not any("�" in piece for piece in out)


def test_a_stop_sequence_split_between_pieces_is_never_shown():
    stream = o.TextStream(stops=("\nH:",))
    shown = "".join(stream.push(piece) for piece in (b"Hi there.\n", b"H", b": and so on"))
    assert shown == "Hi there." and stream.stopped


@pytest.mark.parametrize(
    "told, back",
    [
        ("My sister is called Marbeth.", "Your sister is called Marbeth."),
        ("I am allergic to walnuts.", "You are allergic to walnuts."),
        ("I was born in Harrowgate.", "You were born in Harrowgate."),
        ("He said that I'm late.", "He said that you're late."),
        ("The cat sleeps in the piano.", "The cat sleeps in the piano."),
        ("Моя сестра живёт в Риге.", "Моя сестра живёт в Риге."),
    ],
)
def test_what_was_told_is_given_back_from_the_other_side(told, back):
    assert o.seen_from_here(told) == back


# --- The compiled twin. ---


@given(
    seed=st.integers(0, 10_000), size=st.sampled_from([3, 8, 50, 300, 643]), k=st.sampled_from([0, 1, 5, 40, 300]),
    top_p=st.sampled_from([0.3, 0.92, 1.0]), min_p=st.sampled_from([0.0, 0.06, 0.9]), typical=st.sampled_from([0.4, 0.95, 1.0]),
    temperature=st.sampled_from([0.0, 0.3, 0.7, 1.5]), adaptive=st.booleans(), said=st.lists(st.integers(0, 2), max_size=70),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_the_compiled_chain_draws_from_the_same_distribution(
    seed, size, k, top_p, min_p, typical, temperature, adaptive, said
):
    kernels = o.organ("kernels")
    config = o.dataclasses.replace(
        o.Config().voice, top_k=k, top_p=top_p, min_p=min_p, typical_p=typical, temperature=temperature,
        **({} if adaptive else dict(entropy_boost=1.0, entropy_focus=1.0)),
    )  # fmt: skip
    p, banned = distribution(seed, size), [1] if seed % 3 == 0 else []
    plain = o.SamplingChain(config, np.random.Generator(np.random.PCG64(seed)))
    said = said[-o.PENALISED :]
    token = plain.choose(p, said, banned)
    twin = kernels.Chain(config, temperature, size)
    chosen, entropy = twin.choose(p, said, np.array(banned, np.int64), 0.5)
    assert entropy == pytest.approx(plain.entropies[-1], abs=1e-4)
    if temperature == 0:
        assert p[chosen] == pytest.approx(p[token], rel=1e-5)
        return
    log_p = np.log(np.maximum(p, 1e-12))
    for t in said:
        log_p[t] -= config.frequency_penalty
    for t in set(said):
        log_p[t] -= config.presence_penalty
    log_p[banned] = -np.inf
    expected = plain._filtered(plain._tempered(log_p))
    # A token at the edge of a cut may fall on either side of it, by the last bits of float32; all else agrees.
    apart = np.abs(twin.drawn_from - expected)
    assert apart.max() < 1e-4 or np.sum((twin.drawn_from > 0) != (expected > 0)) <= 1


def test_the_compiled_chain_draws_by_the_generator_as_the_reference_does():
    p, config = distribution(7, 300), o.Config().voice
    plain, compiled = (
        o.SamplingChain(config, np.random.Generator(np.random.PCG64(3)), compiled=twin) for twin in (False, True)
    )
    said = []
    for _ in range(200):
        token = plain.choose(p, said)
        assert compiled.choose(p, said) == token
        said.append(token)


@given(seed=st.integers(0, 10_000), g=st.floats(0, 1), reads=st.integers(0, 60))
@settings(max_examples=40, deadline=None)
def test_the_compiled_blend_is_the_reference(seed, g, reads):
    rng = np.random.default_rng(seed)
    field = o.CooccurField([bytes([i]) for i in range(256)] + [b""] * 3, o.FieldConfig())
    field.read(rng.integers(97, 105, reads))
    _, view = field.read(rng.integers(97, 105, 1), views=True)
    logits = rng.normal(0, 3, 259).astype(np.float32)
    base = np.exp(view.dense_log()[0].astype(np.float64))
    expected = g * o._softmax(logits.astype(np.float64)) + (1 - g) * base
    assert np.abs(o.organ("kernels").blended(logits, view, g) - expected / expected.sum()).max() < 2e-6
