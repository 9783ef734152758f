"""The self: syntropy, dissonance, surprise, and how their decisions shape bursts and replies.   pytest tests/test_self.py"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

import organism as o

N, M = 40, 60


def pulse(
    entropy: float, deviation: float = 1.0, identity: np.ndarray | None = None, past: float = -2.0, seed: int = 0
):
    """What syntropy would measure: means with a little spread, the same at each call."""
    spread = 0.01 * np.random.default_rng(seed).standard_normal(M)
    identity = np.zeros(N) if identity is None else identity
    health = o.Health(identity, np.full(N, past) + spread[:N], np.zeros(N), 100)
    return o.Pulse(entropy + spread, np.full(M, deviation), health)


def live(syntropy: o.Syntropy, entropies: list[float], step: np.ndarray | None = None, past: float = 0.0, **rest):
    """Decisions after bursts through these entropies; each moves the identity by `step`, ln p of the past by `past`."""
    told, step = [], np.zeros(N) if step is None else step
    deviation = rest.pop("deviation", 1.0)
    for k, (was, now) in enumerate(zip(entropies, entropies[1:])):
        before = pulse(was, deviation, np.ones(N) + k * step, -2.0 + k * past, seed=k)
        after = pulse(now, deviation, np.ones(N) + (k + 1) * step, -2.0 + (k + 1) * past, seed=k + 1)
        told.append(syntropy.decide(before, after, **rest))
    return told


@pytest.fixture
def syntropy():
    return o.Syntropy(o.SyntropyConfig())


# --- Syntropy decides. ---

FALLING, RISING, FLAT = list(np.linspace(2.0, 1.0, 6)), list(np.linspace(1.0, 2.0, 6)), [1.0] * 6


@pytest.mark.parametrize(
    ("entropies", "step", "deviation", "action"),
    [
        (FALLING, +0.01, 1.0, "amplify"),  # surer and surer, along its own direction
        (FALLING, 0.0, 1.0, "boost"),  # surer, without a direction
        (RISING, 0.0, 1.0, "dampen"),
        (FLAT, 0.0, 13.0, "ground"),  # it has left the field
        (FLAT, 0.0, 0.01, "explore"),  # it only repeats the field
        (FALLING, -0.01, 1.0, "realign"),  # against its own direction
        (FLAT, 0.0, 1.0, "steady"),
    ],
)
def test_the_table_of_actions(syntropy, entropies, step, deviation, action):
    told = live(syntropy, entropies, np.full(N, step), deviation=deviation)
    assert told[-1]["action"] == action
    assert told[-1]["syntropy_delta"] == pytest.approx(entropies[-2] - entropies[-1], abs=0.01)


def test_a_change_within_the_noise_of_the_probe_changes_nothing():
    syntropy, rng = o.Syntropy(o.SyntropyConfig()), np.random.default_rng(3)
    health = pulse(1.0).health
    noisy = [o.Pulse(1.5 + rng.standard_normal(M), np.ones(M), health) for _ in range(9)]
    told = [syntropy.decide(a, b)["action"] for a, b in zip(noisy, noisy[1:])]
    assert told.count("steady") >= 7


def test_a_new_action_has_to_be_wanted_twice(syntropy):
    told = live(syntropy, RISING)
    first = next(k for k, one in enumerate(told) if one["wanted"] == "dampen")
    assert told[first]["action"] == "steady" and told[first + 1]["action"] == "dampen"


def test_an_action_that_made_things_worse_twice_is_softened(syntropy):
    """Two boosts after each of which the past cost more: from then on boost is steady."""
    told = live(syntropy, list(np.linspace(3.0, 1.0, 9)), past=-0.1)
    assert "boost" in [one["action"] for one in told]
    assert told[-1]["softened"] == "boost" and told[-1]["action"] == "steady"


def test_an_overloaded_adult_proposes_to_divide_once_in_a_while(syntropy):
    told = live(syntropy, list(np.linspace(2.0, 3.0, 12)), grown_up=True, now=1000.0)
    assert [one["proposal"] for one in told].count("divide") == 1
    young = live(o.Syntropy(o.SyntropyConfig()), list(np.linspace(2.0, 3.0, 12)), grown_up=False, now=1000.0)
    assert not any(one["proposal"] for one in young)


def test_on_a_plateau_beside_a_thriving_peer_it_proposes_to_sleep(syntropy):
    assert live(syntropy, [1.0] * 10, peers=[0.2])[-1]["proposal"] == "hibernate"
    assert live(o.Syntropy(o.SyntropyConfig()), [1.0] * 10, peers=[0.0])[-1]["proposal"] is None


def test_what_it_decided_outlives_a_sleep(syntropy):
    live(syntropy, RISING)
    woken = o.Syntropy(o.SyntropyConfig(), o.json.loads(o.json.dumps(syntropy.state())))
    assert woken.state() == syntropy.state() and woken.action == "dampen"


def test_it_steers_only_where_it_may_and_within_bounds(syntropy):
    learner = type("Learner", (), {})()
    syntropy.action = "amplify"
    syntropy.steer(learner)
    assert (learner.urge, learner.accumulate) == (1.0, 1)
    syntropy.config = dataclasses.replace(syntropy.config, steer=True)
    for action in o.SYNTROPY_EFFECTS:
        syntropy.action = action
        syntropy.steer(learner)
        assert 0.3 <= learner.urge <= 1.5 and learner.accumulate in (1, 2)


# --- In a life. ---


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """An organism after three bursts that may steer, its rows and events."""
    overrides = {
        "syntropy.steer": True,
        "syntropy.delta_births": True,
        "voice.surprise_shift": 0.05,
        "voice.trend_shift": 0.05,
    }
    home = tmp_path_factory.mktemp("self") / "home"
    text = o.seed_corpus().decode()
    with o.Organism(home, overrides=overrides, seed=3, threads=1) as life:
        for k in range(3):
            life.learn_now(f"{text[2000 * k : 2000 * k + 1500]}\nWe walked along the river for {k + 2} hours.", "walks")
        reply = life.say("qxzvw jkpf ghtr zzz?").as_dict() and life.memory.events("reply", limit=1)[0].data
        data = dict(events=life.memory.events("syntropy"), counts=life.memory.counts(), reply=reply, why=life.why(),
                    status=life.status()["syntropy"], state=life.syntropy.state(), baseline=life.surprise.baseline)  # fmt: skip
    with o.Organism(home, overrides=overrides, seed=3, threads=1) as life:
        data["woken"] = life.syntropy.state()
    return data


def test_each_burst_leaves_a_row_and_an_event(told):
    assert told["counts"]["syntropy_log"] == len(told["events"]) >= 2
    data = told["events"][0].data
    assert data["entropy_before"] > 0 and data["entropy_after"] > 0 and data["field_deviation"] >= -1e-6
    assert -1 <= data["purpose_alignment"] <= 1 and data["purpose_magnitude"] > 0
    assert told["status"] == pytest.approx(data["trend"])


def test_why_tells_the_decision_in_words(told):
    assert "nats from the field" in told["why"] and "I decided to" in told["why"]


def test_the_state_wakes_again(told):
    assert told["woken"] == told["state"]


def test_a_surprised_organism_speaks_more_carefully(told):
    shifts, usual = told["reply"]["shifts"], o.VoiceConfig().temperature
    assert -0.05 <= shifts["surprise"] < 0
    assert abs(shifts["syntropy"]) <= 0.05 + 1e-9
    assert told["reply"]["temperature"] == pytest.approx(usual * (1 + shifts["surprise"]) * (1 + shifts["syntropy"]))


def test_caution_is_bounded():
    surprise = o.Surprise(baseline=2.0)
    assert surprise.caution(1.0, 0.05) == 0 and surprise.caution(3.0, 0.05) == pytest.approx(0.025)
    assert surprise.caution(100.0, 0.05) == 0.05 and surprise.caution(100.0, 0.0) == 0


def test_entropy_and_deviation_equal_what_the_distribution_says(tmp_path):
    """Oracle: a newborn on the field is the field: its deviation is zero, its entropy that of the field's view."""
    with o.Organism(tmp_path / "home", seed=3, threads=1) as life:
        learner = life.learner
        guard = o.Guard(learner)
        felt = life.syntropy.measure(learner, guard, guard.measure(learner))
        x, _, view = guard.probe
        log_p = view.dense_log()[:16].astype(np.float64)
        assert np.abs(felt.deviation).max() < 1e-3
        assert felt.entropy[:16] == pytest.approx(-(np.exp(log_p) * log_p).sum(axis=1), abs=1e-3)


# --- Dissonance. ---


def test_dissonance_hears_a_jump_and_a_lull():
    dissonance = o.Dissonance()
    assert [dissonance.measure(h) for h in (1.0, 1.0, 2.0)] == [1.0, 1.0, 0.8]
    calm = o.Dissonance()
    assert [calm.measure(h) for h in (4.0, 0.1, 0.1, 0.1)] == [1.0, 1.0, 1.0, 1.2]
    assert o.Dissonance().measure(0.0) == 1.0


def test_a_greedy_chain_stays_greedy():
    chain = o.SamplingChain(o.VoiceConfig(), np.random.default_rng(0), temperature=0.0)
    chain.retune(0.5)
    assert chain.temperature == 0


@pytest.mark.parametrize("setting", [{"voice.dissonance": True}, {"voice.anti_field": 1.0}])
def test_it_speaks_with_dissonance_and_with_the_anti_field(tmp_path, setting):
    with o.Organism(tmp_path / "home", overrides=setting, seed=3, threads=1) as life:
        life.learn_now("The lamp stands on the table. " * 3 + "I like the lamp.", "lamps")
        reply = life.say("What stands on the table?")
        assert reply.tokens > 0 or reply.text is not None
        assert math.isfinite(reply.entropy_bits)


# --- Conscience. ---


def test_conscience_weighs_down_while_doubt_rises_and_recovers_as_fast():
    conscience = o.Conscience()
    for entropy in np.linspace(1.0, 2.0, 8):
        low = conscience.measure(float(entropy))
    assert low == pytest.approx(0.95**6)  # from the third reply on
    for entropy in np.linspace(2.0, 0.5, 20):
        conscience.measure(float(entropy))
    assert conscience.scale == 1.0
    for entropy in np.linspace(0.0, 50.0, 60):
        conscience.measure(float(entropy))
    assert conscience.scale == 0.3


def test_conscience_changes_only_how_deltas_are_heard(tmp_path):
    with o.Organism(tmp_path / "home", seed=3, threads=1) as life:
        assert o.Conscience(0.5).weigh(life.published) is life.published  # no deltas
        life.add_delta("for a test")
        before = life.published.body.arena.average.copy()
        weighed = o.Conscience(0.5).weigh(life.published)
        assert [d.strength for d in weighed.body.deltas] == [0.5 * d.strength for d in life.published.body.deltas]
        assert np.array_equal(life.published.body.arena.average, before)
        assert o.Conscience(1.0).weigh(life.published) is life.published


# --- Overthinking. ---


def test_what_it_says_to_itself_is_judged_learned_and_not_recalled(tmp_path):
    overrides = {"learning.batch": 2, "voice.overthink": 2}
    with o.Organism(tmp_path / "home", overrides=overrides, seed=3, threads=1) as life:
        said = life.say("What stands on the table?").text
        waiting = {row.source: row.text for row in life.memory.pending()}
        assert set(waiting) == {"chat", o.THOUGHT}
        thought = waiting[o.THOUGHT].decode()
        assert thought.startswith("A: ") and said in thought and len(thought) > len(f"A: {said}\n")
        life.learn_now("The cat sleeps.", "cats")
        lived = [row for row in life.memory.lived() if row.source == o.THOUGHT]
        assert [row.text for row in lived] == [waiting[o.THOUGHT]]
        indexed = life.memory._all("SELECT ref FROM passages WHERE kind = 'lived'")
        assert lived[0].seq not in {ref for (ref,) in indexed}
        noise = bytes(np.random.default_rng(0).integers(33, 127, 900).astype(np.uint8))
        life.memory.queue(o.THOUGHT, b"A: " + noise)  # as a broken body would think
        assert life.learn_now("The dog sleeps on the warm stone.", "dogs").decision == "refuse"
        assert [row for row in life.memory.lived() if row.source == o.THOUGHT] == lived


def test_thinking_changes_nothing_of_what_is_said(tmp_path):
    with o.Organism(tmp_path / "home", overrides={"voice.overthink": 2}, seed=3, threads=1) as life:
        state = life.voice_rng.bit_generator.state
        _ = life.say("Hello.").text
        after = life.voice_rng.bit_generator.state
        life.voice_rng.bit_generator.state = state
        life._overthink("Hello.", "Hello to you.")
        assert life.voice_rng.bit_generator.state == state != after


# --- The biography. ---


@pytest.fixture(scope="module")
def lived(tmp_path_factory):
    """The home of a short life with an attack in it."""
    home = tmp_path_factory.mktemp("life") / "home"
    with o.Organism(home, seed=3, threads=1) as life:
        life.learn_now(
            "In the morning the baker opened his shop, and the smell of bread went down the street. " * 4, "bread"
        )
        life.learn_now(np.random.default_rng(0).integers(0, 256, 3000, np.uint8).tobytes(), "noise")
        life.learn_now("The river was high that spring; nobody crossed it before May, and the ferry lay idle.", "river")
    return home


def test_the_biography_tells_birth_and_attack_in_order(lived, capsys):
    assert o.main(["biography", "--home", str(lived), "--json"]) in (0, None)
    moments = [o.json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert moments[0]["kind"] == "birth" and [m["at"] for m in moments] == sorted(m["at"] for m in moments)
    attack = next(m for m in moments if m["kind"] == "attack")
    assert "Kept out" in attack["text"]


def test_the_biography_draws_a_page(lived, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    page = tmp_path / "life.png"
    assert o.main(["biography", "--home", str(lived), "--plot", str(page)]) in (0, None)
    assert page.read_bytes().startswith(b"\x89PNG") and "Born on" in capsys.readouterr().out


def test_a_plot_of_an_unknown_kind_is_a_usage_error(lived, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit) as stop:
        raise SystemExit(o.main(["biography", "--home", str(lived), "--plot", str(tmp_path / "life.nonsense")]))
    assert stop.value.code == 2 and "nonsense" in capsys.readouterr().err


def test_ages_are_readable():
    age = o.organ("biography").age
    assert [age(s) for s in (3.21, 245, 7380, 439200)] == ["3.2 s", "4 min 05 s", "2 h 03 min", "5 d 02 h"]
