"""The sampling chain against a plain one in NumPy, and its settings.

Run alone: pytest -n 0 tests/giant/test_sampling.py
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from organism import UsageError
from organs.giant.sampling import Sampler, Sampling, logprobs

V = 1000


def reference(logits, settings: Sampling, said=(), allowed=None) -> np.ndarray:
    """float64 [V]: the distribution that the chain draws from, by sorting everything."""
    x = logits.astype(np.float64).copy()
    x[~np.isfinite(x)] = -np.inf
    if allowed is not None:
        x[~allowed] = -np.inf
    for token, bias in settings.logit_bias.items():
        x[token] += bias
    recent = list(said)[-settings.penalty_window :] if settings.penalty_window else []
    for token in set(recent):
        x[token] = x[token] / settings.repetition_penalty if x[token] > 0 else x[token] * settings.repetition_penalty
        x[token] -= settings.frequency_penalty * recent.count(token) + settings.presence_penalty
    order = np.argsort(-x, kind="stable")
    order = order[np.isfinite(x[order])]
    if settings.temperature == 0:
        return np.eye(len(x))[order[0]]
    if settings.top_k:
        order = order[: settings.top_k]
    if settings.typical_p < 1 and len(order) > 1:
        p = softmax(x[order])
        deviation = np.abs(-np.log(p) - -(p * np.log(p)).sum())
        nearest = np.lexsort((order, deviation))
        kept = nearest[: int(np.searchsorted(np.cumsum(p[nearest]), settings.typical_p)) + 1]
        order = order[np.sort(kept)]
    if settings.top_p < 1:
        p = softmax(x[order])
        order = order[: int(np.searchsorted(np.cumsum(p), settings.top_p)) + 1]
    if settings.min_p > 0:
        order = order[x[order] >= x[order[0]] + math.log(settings.min_p)]
    out = np.zeros(len(x))
    out[order] = softmax(x[order] / settings.temperature)
    return out


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def drawn(logits, settings: Sampling, said=(), allowed=None) -> np.ndarray:
    """The distribution that the compiled chain draws from, by asking it with evenly spaced draws instead of random ones."""
    sampler, n = Sampler(settings, len(logits)), 4000

    class Even:
        at = -1

        def random(self):
            self.at += 1
            return (self.at + 0.5) / n

    sampler.rng = Even()  # type: ignore[assignment]
    tokens = [sampler.choose(logits, said, allowed) for _ in range(n)]
    return np.bincount(tokens, minlength=len(logits)) / n


SETTINGS = [
    dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0),
    dict(temperature=0.7, top_k=40, top_p=0.95, min_p=0.05),
    dict(temperature=1.5, top_k=7, top_p=1.0, min_p=0.0),
    dict(temperature=1.0, top_k=0, top_p=0.8, min_p=0.0),
    dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.2),
    dict(temperature=1.0, top_k=0, top_p=0.9, min_p=0.02),
    dict(temperature=1.0, top_k=0, top_p=0.99999, min_p=0.0),
    dict(temperature=1.0, top_k=V, top_p=0.7, min_p=0.1),
    dict(temperature=0.9, top_k=0, top_p=1.0, min_p=0.0, typical_p=0.5),
    dict(temperature=0.9, top_k=100, top_p=0.9, min_p=0.01, typical_p=0.7),
    dict(temperature=1.0, top_k=20, top_p=1.0, min_p=0.0, repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=0.7),
    dict(temperature=1.0, top_k=20, top_p=1.0, min_p=0.0, logit_bias={3: 9.0, 4: -math.inf, 5: math.inf}),
    dict(temperature=0.0),
]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_the_chain_draws_from_the_distribution_of_the_reference(settings, spread):
    rng = np.random.default_rng(7)
    logits = (rng.standard_normal(V) * spread).astype(np.float32)
    said = [3, 3, 5, int(logits.argmax()), int(logits.argmax())]
    chain = Sampling(**settings)
    ours = drawn(logits, chain, said)
    theirs = reference(logits, chain, said) if math.inf not in chain.logit_bias.values() else np.eye(V)[5]
    assert np.abs(ours - theirs).max() < 2e-3
    assert not ours[theirs == 0].any()


@given(
    seed=st.integers(0, 10**6),
    k=st.integers(0, 80),
    p=st.floats(0.05, 1),
    typical=st.floats(0.05, 1),
    m=st.floats(0, 0.5),
)
def test_what_survives_the_cuts_is_what_survives_them_in_the_reference(seed, k, p, typical, m):
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal(300) * rng.uniform(0.5, 6)).astype(np.float32)
    settings = Sampling(temperature=1.0, top_k=k, top_p=p, min_p=m, typical_p=typical, seed=seed)
    theirs = reference(logits, settings)
    sampler = Sampler(settings, 300)
    for _ in range(20):
        # A mass that meets its limit within rounding may fall on either side; then the token is next to the last one kept.
        token = sampler.choose(logits)
        assert theirs[token] > 0 or _borderline(logits, settings, token)


def _borderline(logits, settings: Sampling, token: int) -> bool:
    looser = {name: min(1.0, getattr(settings, name) + 1e-4) for name in ("top_p", "typical_p")}
    return reference(logits, Sampling(1.0, settings.top_k, min_p=settings.min_p * 0.9999, **looser))[token] > 0


def test_the_same_seed_draws_the_same_tokens():
    logits = np.random.default_rng(1).standard_normal(V).astype(np.float32)
    first, second, other = (Sampler(Sampling(seed=s, top_k=0), V) for s in (5, 5, 6))
    a, b, c = ([s.choose(logits) for _ in range(50)] for s in (first, second, other))
    assert a == b != c


def test_only_what_is_allowed_is_drawn_and_nothing_to_draw_is_an_error():
    logits, allowed = np.zeros(V, np.float32), np.zeros(V, bool)
    allowed[[17, 900]] = True
    sampler = Sampler(Sampling(), V)
    assert {sampler.choose(logits, allowed=allowed) for _ in range(50)} == {17, 900}
    with pytest.raises(UsageError, match="No token may be drawn"):
        sampler.choose(logits, allowed=np.zeros(V, bool))


def test_logits_that_are_no_numbers_are_never_drawn():
    logits = np.full(V, np.nan, np.float32)
    logits[[1, 2]] = [-np.inf, 0.5]
    for temperature in (0.0, 1.0):
        assert Sampler(Sampling(temperature=temperature), V).choose(logits) == 2


def test_ties_go_to_the_lower_id():
    logits = np.zeros(V, np.float32)
    assert Sampler(Sampling(temperature=0.0), V).choose(logits) == 0
    assert set(np.flatnonzero(drawn(logits, Sampling(top_k=5, temperature=1.0)))) == set(range(5))


def test_log_probabilities_are_those_of_the_model():
    logits = np.random.default_rng(2).standard_normal(V).astype(np.float32)
    chosen, top = logprobs(logits, 11, top=5)
    expected = np.log(softmax(logits.astype(np.float64)))
    assert chosen.logprob == pytest.approx(expected[11], abs=1e-6)
    assert [c.token for c in top] == list(np.argsort(-expected)[:5])
    assert logprobs(logits, 0)[1] == []


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (dict(temperature=-1), "temperature is -1"),
        (dict(temperature=math.nan), "temperature is nan"),
        (dict(top_k=2.5), "top_k is 2.5: it must be a whole number"),
        (dict(top_p=1.01), "top_p is 1.01"),
        (dict(min_p="x"), "min_p is 'x'"),
        (dict(seed=-3), "seed is -3"),
        (dict(top_q=1), "no sampling setting 'top_q'"),
    ],
)
def test_impossible_settings_are_one_sentence(settings, sentence):
    with pytest.raises(UsageError, match=sentence):
        Sampling.of(**settings)


def test_a_bias_for_a_token_that_is_not_there_is_one_sentence():
    with pytest.raises(UsageError, match="logit_bias names token 5000"):
        Sampler(Sampling(logit_bias={5000: 1.0}), V)
