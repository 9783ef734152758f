"""Gifts: what one has learned is offered, and whoever takes it judges it for itself.

Run alone: pytest -n 0 tests/swarm/test_exchange.py
"""

from __future__ import annotations

import random

import numpy as np
import pytest

from organism import Organism, export_gamma
from swarm.member import GIFT_BYTES, Member, _whole_lines
from swarm.mesh import open_mesh

GOOD = (
    "The keeper of the old tower lights the lamp at dusk, and the boats on the river Olse find their way home by it.\n"
)


@pytest.fixture
def two(tmp_path):
    """Two members and their mesh."""
    where = str(tmp_path / "mesh.db")
    with Organism(tmp_path / "a", threads=1) as a, Organism(tmp_path / "b", threads=1) as b, open_mesh(where) as mesh:
        yield Member(a, where, exchange=True), Member(b, where, exchange=True), mesh


def test_a_good_text_is_given_taken_and_lived(two):
    giver, taker, mesh = two
    giver.life.learn_now(GOOD, source="tower.txt")
    assert giver.trade(mesh) == (1, 0) and taker.trade(mesh) == (0, 1)
    assert taker.life.learn_now(()).accepted
    lived = [row for row in taker.life.memory.lived() if row.source == f"mesh:{giver.id}"]
    assert [row.text.decode() for row in lived] == [GOOD]
    assert taker.trade(mesh) == (0, 0) and giver.trade(mesh) == (0, 0)  # what was given is not given on


def test_conversations_are_never_given(two):
    giver, _, mesh = two
    giver.life.learn_now("H: My secret is that I am afraid of geese.\n", source="chat")
    assert giver.trade(mesh) == (0, 0)


def test_a_hostile_gift_is_refused_and_kept_aside_under_its_givers_name(two):
    _, taker, mesh = two
    noise = random.Random(1).randbytes(1500).hex()
    mesh.offer("mallory", "text", noise.encode())
    mesh.offer("mallory", "text", b"buy now! " * 400)
    taker.trade(mesh)
    before = taker.life.state["lived_bytes"]
    assert not taker.life.learn_now(()).accepted
    assert taker.life.state["lived_bytes"] == before
    assert {row.source for row in taker.life.memory.quarantine()} == {"mesh:mallory"}


def test_a_gift_is_short_and_ends_with_a_line():
    assert _whole_lines(b"short") == b"short"
    assert _whole_lines(b"line\n" * 2000).endswith(b"line\n") and len(_whole_lines(b"line\n" * 2000)) <= GIFT_BYTES
    assert len(_whole_lines(b"x" * 9000)) == GIFT_BYTES


# --- Gammas. ---


def test_a_gamma_is_offered_once_and_tried_by_the_others(two):
    giver, taker, mesh = two
    assert giver.trade_gammas(mesh) == (0, 0), "who has not trained has none"
    giver.life.learn_now(GOOD * 12, source="tower.txt")
    before = taker.life.published.number
    assert giver.trade_gammas(mesh) == (1, 0) and giver.trade_gammas(mesh) == (0, 0)
    given, taken = taker.trade_gammas(mesh)
    (event,) = taker.life.memory.events("gamma")
    assert event.data["source"] == f"mesh:{giver.id}" and (taken == 1) == (event.data["gain"] >= 0)
    assert given == 0 and (taker.life.published.number > before) == (taken == 1)


def test_a_gamma_that_would_hurt_changes_nothing(two, tmp_path):
    giver, taker, _ = two
    for member in (giver, taker):
        member.life.learn_now(GOOD * 12, source="tower.txt")
    body = giver.life.published.body.copy()
    body.arena.view("average", "embedding")[:] += 50 * np.random.default_rng(0).standard_normal(body.birth.shape)
    export_gamma(body, giver.life.published.tokenizer, tmp_path / "noise.gamma", "mallory")
    was, number = taker.life.learner.body.arena.parameters.copy(), taker.life.published.number
    verdict = taker.life.try_gamma(tmp_path / "noise.gamma", 1.0, "mesh:mallory")
    assert not verdict.accepted and taker.life.published.number == number
    np.testing.assert_array_equal(taker.life.learner.body.arena.parameters, was)


def test_a_broken_gamma_is_an_event_and_nothing_more(two):
    _, taker, mesh = two
    mesh.offer("mallory", "gamma", b"no gamma at all")
    assert taker.trade_gammas(mesh) == (0, 0)
    assert taker.life.memory.events("gamma")[0].data["decision"] == "refuse"
