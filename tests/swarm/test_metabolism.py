"""The network that says what each organism should do more of.

Run alone: pytest -n 0 tests/swarm/test_metabolism.py
"""

from __future__ import annotations

import json

import numpy as np

from organism import Appetites
from swarm.metabolism import LEAST, MOST, Metabolism, Record, worths


def rounds(network: Metabolism, count: int, **others: dict) -> dict[str, Appetites]:
    """`good` gains a hundred times what `bad` gains of the same time."""
    told = {}
    for number in range(1, count + 1):
        facts = {name: dict(spent=10.0 * number, steps=100.0 * number, slope=slope, entropy=1.0, waiting=100)
                 for name, slope in (("good", 1e-3), ("bad", 1e-6))}  # fmt: skip
        told = network.advise(facts | others, cores=2)
    return told


def test_at_first_everything_is_as_usual():
    told = rounds(Metabolism(), 1)
    np.testing.assert_allclose(list(told["good"]), 1.0, atol=0.15)


def test_it_learns_who_should_learn_and_who_should_sleep():
    told = rounds(Metabolism(), 400)
    assert told["good"].learn > 1.5 * told["bad"].learn and told["bad"].sleep > told["good"].sleep
    assert all(LEAST <= factor <= MOST for appetites in told.values() for factor in appetites)


def test_what_a_minute_of_learning_promises_is_told_from_the_slope_and_the_time():
    records = {name: Record((10.0, 100.0, 0.0, 0.0)) for name in "abc"}
    told = worths(records, dict(a=dict(slope=0.01 / 600), b=dict(slope=-1.0), c=dict(slope=None)))
    np.testing.assert_allclose(told, [0.0, -1.0, 1.0], atol=1e-9)


def test_a_counter_that_goes_back_begins_anew():
    record = Record().after((10.0, 0, 0, 0)).after((12.0, 0, 0, 0)).after((1.0, 0, 0, 0))
    np.testing.assert_allclose(record.means[0], 0.9 * 0.2 + 0.1 * 1.0)


def test_nonsense_in_a_heartbeat_and_nobody_do_no_harm():
    broken = dict(spent="x", steps=None, slope=float("nan"), entropy=float("inf"), waiting=-5)
    told = rounds(Metabolism(), 5, broken=broken)
    assert np.isfinite(list(told["broken"])).all() and json.dumps(told["broken"]._asdict())
    assert Metabolism().advise({}, 2) == {}
