"""Coherence, resonance and outliers, against the definition by loops.

Run alone: pytest -n 0 tests/swarm/test_topology.py
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from organism import OrganismError
from swarm.map import draw, places
from swarm.topology import Monitor, drifts, gammas_of, topology


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


def test_of_many_the_means_are_exact_and_the_pairs_are_near(monkeypatch):
    rng, common = np.random.default_rng(0), np.random.default_rng(1).normal(size=20_000)
    gammas = {f"o{k}": (rng.normal(size=20_000) + (k < 9) * common).astype(np.float32) for k in range(12)}
    gammas |= dict(twin=3 * gammas["o0"], newborn=np.zeros(20_000, np.float32))
    exact = topology(gammas)
    monkeypatch.setattr("swarm.topology.MANY", 4)
    seen = topology(gammas)
    assert abs((seen.coherence or 0) - (exact.coherence or 0)) < 1e-5 and seen.outliers == exact.outliers
    assert [pair[:2] for pair in seen.resonances] == [pair[:2] for pair in exact.resonances] == [("o0", "twin")]
    assert np.nanmax(np.abs(seen.cosines - exact.cosines)) < 0.05
    assert np.isnan(seen.cosines[-1]).all(), "a newborn has no direction"


def test_newborns_alone_are_nothing_to_compare():
    assert topology({f"o{k}": np.zeros(1024, np.float32) for k in range(3)}).coherence is None


def test_broken_blobs_are_left_out():
    good = np.ones((256, 4), np.float32).tobytes()
    assert list(gammas_of(dict(a=good, b=None, c=good[:-3], d=b"", e=np.full(1024, np.nan, np.float32).tobytes()))) == [
        "a"
    ]


# --- Drift. ---


def test_drift_is_how_far_a_gamma_turned_and_grew():
    one = np.ones((256, 4), np.float32)
    half = one.copy()
    half[:128] *= -1
    seen = drifts(
        dict(a=one, b=one, c=one, wide=one), dict(a=one, b=4 * one, c=half, wide=np.ones((256, 8), np.float32), new=one)
    )
    assert set(seen) == {"a", "b", "c"}
    assert seen["a"].turn == 0 == seen["a"].growth and not seen["a"].counts
    assert seen["b"].growth == 3 and seen["b"].counts and abs(seen["c"].turn - 1) < 1e-6 and seen["c"].counts


def test_is_it_me_or_everyone():
    rng = np.random.default_rng(0)
    before = {name: rng.normal(size=1024).astype(np.float32) for name in "abcde"}
    one = drifts(before, before | dict(a=-before["a"]))
    assert one["a"].counts and not one["a"].everyone
    all_but_one = drifts(before, {name: -g for name, g in before.items()} | dict(e=before["e"]))
    assert all_but_one["a"].everyone and all_but_one["e"].everyone and not all_but_one["e"].counts
    assert not drifts(dict(a=before["a"]), dict(a=-before["a"]))["a"].everyone, "alone there is no everyone"


def test_the_monitor_tells_each_new_thing_once():
    one, monitor = np.ones(1024, np.float32), Monitor()
    calm = dict(a=one, b=one, c=one, d=one)
    assert monitor.look(calm) == {}
    told = monitor.look(calm | dict(d=-one))
    assert set(told) == {"d"} and told["d"]["outlier"] and told["d"]["who"] == "me" and told["d"]["turn"] == 2
    assert monitor.look(calm | dict(d=-one)) == {}, "it still stands apart, which is known"


# --- The picture. ---


def test_places_keep_the_distances_that_a_plane_can_hold():
    angles = np.array([0.1, 0.7, 1.9, 3.0, 4.4])
    cosines = np.cos(angles[:, None] - angles).astype(np.float32)
    at = places(cosines)
    distances = np.linalg.norm(at[:, None] - at, axis=2)
    np.testing.assert_allclose(distances, np.sqrt(np.maximum(2 - 2 * cosines, 0)), atol=1e-3)


def test_a_picture_is_drawn_and_nobody_is_an_error(tmp_path):
    pytest.importorskip("matplotlib")
    rng = np.random.default_rng(0)
    seen = topology({f"o{k}": rng.normal(size=1024).astype(np.float32) + 1 for k in range(5)})
    draw(seen, dict(o1="anna"), str(tmp_path / "map.svg"))
    assert "anna" in (tmp_path / "map.svg").read_text() or (tmp_path / "map.svg").stat().st_size > 5000
    for wrong, path in ((topology({}), "map.png"), (seen, "map.nothing"), (seen, "none/map.png")):
        with pytest.raises(OrganismError):
            draw(wrong, {}, str(tmp_path / path))
