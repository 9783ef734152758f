"""The rules of a colony, each a function of what is known at one moment.

Run alone: pytest -n 0 tests/swarm/test_rules.py
"""

from __future__ import annotations

from typing import NamedTuple

from organism import SEED_CORPUS, Appetites, Standing, SyntropyConfig, Trend, proposal
from swarm.mesh import Mail
from swarm.rules import (
    BRIEF,
    MOST_NAPS,
    NAP_BYTES,
    Bed,
    by_surprise,
    no_room,
    stirs,
    who_wakes,
    worth_giving,
    worth_waking,
)


class Row(NamedTuple):
    source: str


def test_nobody_is_born_beyond_the_number_or_the_memory():
    assert no_room(3, 0, 4, 1000.0, None) is None
    assert "--max is 4" in str(no_room(3, 1, 4, 1000.0, None)), "who is expected counts"
    assert "--ram 1 GB" in str(no_room(3, 0, 9, 1000.0, 1.0)) and no_room(3, 0, 9, 900.0, 1.0) is None


def test_who_is_called_wakes_and_an_idle_core_wakes_who_slept_longest():
    beds = dict(anna=Bed(10.0), otto=Bed(5.0))
    assert who_wakes(beds, dict(anna=Mail(True), nobody=Mail(True)), 9, 2, 60.0, 11.0) == ["anna"]
    assert who_wakes(beds, {}, 1, 2, 60.0, 70.0) == ["otto"]
    assert who_wakes(beds, {}, 2, 2, 60.0, 70.0) == [] == who_wakes(beds, {}, 1, 2, 60.0, 60.0)


def test_texts_wait_until_they_are_worth_waking_for_and_a_question_does_not():
    beds = dict(anna=Bed(10.0))
    wakes = lambda mail: who_wakes(beds, dict(anna=mail), 9, 2, 60.0, 11.0, patience=600.0)
    assert wakes(Mail(False, 2000, 599.0)) == [] and wakes(Mail(False, 2000, 600.0)) == ["anna"]
    assert wakes(Mail(False, NAP_BYTES, 1.0)) == ["anna"] == wakes(Mail(True, 0, 0.0))
    beds["anna"] = Bed(10.0, naps=2)
    assert wakes(Mail(False, 2000, 2399.0)) == [] == wakes(Mail(False, 4 * NAP_BYTES - 1, 1.0))
    assert wakes(Mail(False, 2000, 2400.0)) == ["anna"] == wakes(Mail(False, 4 * NAP_BYTES, 1.0)) == wakes(Mail(True))
    assert stirs(Mail(False, 1, 600.0 * 2**MOST_NAPS), 99, 600.0), "no text waits for ever"
    assert not stirs(Mail(False), 0, 0.0), "nothing waits"


def test_who_sleeps_again_at_once_has_napped():
    assert Bed.after(None, 0.0, 50.0) == Bed(50.0), "the first sleep"
    assert Bed.after(Bed(10.0, 3), 50.0, 50.0 + BRIEF - 1) == Bed(50.0 + BRIEF - 1, 4)
    assert Bed.after(Bed(10.0, 3), 50.0, 50.0 + BRIEF) == Bed(50.0 + BRIEF, 0), "it had something to do"


def test_a_sleeper_is_woken_only_for_what_it_knows_distinctly_better():
    guesses = dict(anna=2.0, otto=1.8, sleeper=1.6)
    assert worth_waking(["anna", "otto"], ["sleeper"], guesses) == ["sleeper"]
    assert worth_waking(["anna", "otto"], ["sleeper"], guesses | dict(sleeper=1.75)) == []
    assert worth_waking([], ["sleeper"], guesses) == ["sleeper"] and worth_waking(["anna"], ["unknown"], guesses) == []


def test_the_least_surprised_is_asked_and_of_equals_the_keenest():
    known = dict(anna=2.0, otto=2.05, hugo=3.0)
    assert by_surprise(known, {}) == ["anna", "otto", "hugo"]
    assert by_surprise(known, dict(otto=1.5, hugo=2.0)) == ["otto", "anna", "hugo"] and by_surprise({}, {}) == []


def test_what_was_said_or_given_is_not_given_on():
    rows = [Row("book"), Row("news"), Row("chat"), Row("mesh:anna"), Row(SEED_CORPUS)]
    assert worth_giving(rows) == [Row("news")] and worth_giving(rows[2:]) == []


# --- What syntropy proposes, and what the metabolism changes about it. ---

CONFIG = SyntropyConfig()
LOADED = Standing([2.0] * 8, [0.5] * 8, Trend(-0.1, 0.01), False, True, 0.0)
RESTED = Standing([1.0] * 8, [0.015] * 8, Trend(0.0, 0.01), True, True, 0.0)


def test_who_is_grown_up_and_overloaded_divides_after_the_cooldown():
    assert proposal(LOADED, [], CONFIG, 1000.0) == "divide"
    assert proposal(LOADED, [], CONFIG, 100.0) is None
    for other in (
        dict(grown_up=False),
        dict(entropies=[1.0] * 8),
        dict(trend=Trend(-0.1, 0.1)),
        dict(entropies=[2.0] * 7),
    ):
        assert proposal(LOADED._replace(**other), [], CONFIG, 1000.0) is None


def test_appetites_move_the_thresholds():
    assert proposal(RESTED, [0.2], CONFIG, 1000.0) is None
    assert proposal(RESTED, [0.2], CONFIG, 1000.0, Appetites(sleep=2.0)) == "hibernate"
    assert proposal(RESTED, [0.0], CONFIG, 1000.0, Appetites(sleep=2.0)) is None, "beside nobody who thrives"
    calmer = LOADED._replace(entropies=[1.2] * 8)
    assert proposal(calmer, [], CONFIG, 1000.0) is None
    assert proposal(calmer, [], CONFIG, 1000.0, Appetites(divide=1.5)) == "divide"
