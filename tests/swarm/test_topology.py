"""Coherence, resonance and outliers, against the definition by loops.

Run alone: pytest -n 0 tests/swarm/test_topology.py
"""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from swarm.topology import gammas_of, topology


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


@given(st.integers(0, 1000), st.integers(2, 6))
def test_cosines_and_coherence_are_what_loops_say(seed, count):
    rng = np.random.default_rng(seed)
    gammas = {f"o{k}": rng.normal(size=(256, 4)).astype(np.float32) for k in range(count)}
    seen = topology(gammas)
    expected = [cosine(gammas[a], gammas[b]) for a in seen.ids for b in seen.ids if a != b]
    np.testing.assert_allclose(seen.cosines[~np.eye(count, dtype=bool)], expected, atol=1e-5)
    assert abs((seen.coherence or 0) - np.mean(expected)) < 1e-5


def test_twins_resonate_and_who_differs_stands_apart():
    one = np.ones((256, 4), np.float32)
    seen = topology(dict(a=one, b=2 * one, c=one + 0.01, d=-one))
    assert [pair[:2] for pair in seen.resonances] == [("a", "b"), ("a", "c"), ("b", "c")] and seen.outliers == ["d"]


def test_other_widths_newborns_and_loners_are_not_compared():
    one = np.ones((256, 4), np.float32)
    assert topology({}).coherence is None and topology(dict(a=one)).coherence is None
    seen = topology(dict(a=one, wide=np.ones((256, 8), np.float32), newborn=0 * one))
    assert seen.coherence is None and not seen.resonances and not seen.outliers


def test_broken_blobs_are_left_out():
    good = np.ones((256, 4), np.float32).tobytes()
    assert list(gammas_of(dict(a=good, b=None, c=good[:-3], d=b"", e=np.full(1024, np.nan, np.float32).tobytes()))) == [
        "a"
    ]
