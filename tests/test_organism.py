"""Life: birth, waking, speaking, learning, remembering; on the reference and on the compiled path.   pytest tests/test_organism.py"""

import json
import os

import numpy as np
import pytest

import organism as o

TINY = "H: Hello.\nA: I am here, and I listen.\n\n" + "".join(
    f"H: What is {w}?\nA: {w.capitalize()} is a word that I have read. It has {len(w)} letters.\n\n"
    for w in ("water", "stone", "bread", "music", "winter", "a river", "a clock", "the moon", "a garden", "friendship")
)


@pytest.fixture
def tiny(monkeypatch):
    """A first breath of a kilobyte, so that births are quick."""
    monkeypatch.setattr(o, "seed_corpus", lambda: TINY.encode())


@pytest.fixture(params=["off", "wait"])
def life(request, tmp_path, tiny):
    with o.Organism(tmp_path / "home", seed=1, threads=1, kernels=request.param) as organism:
        yield organism


def test_a_newborn_answers_at_once_from_the_field(life):
    reply = life.say("Hello.")
    pieces = list(reply)
    assert "".join(pieces).strip() == reply.text and reply.text
    assert reply.source == "field" and reply.tokens > 0 and reply.surprise_bits > 0
    assert set(reply.as_dict()) == {"text", "source", "surprise_bits", "entropy_bits", "tokens", "seconds"}


def test_every_message_is_in_memory_in_order(life):
    for text in ("Hello.", "My sister is called Marbeth.", "Good night."):
        _ = life.say(text).text
    rows = life.memory.messages()
    assert [m.role for m in rows] == ["user", "organism"] * 3
    assert [m.text for m in rows if m.role == "user"] == ["Hello.", "My sister is called Marbeth.", "Good night."]


def test_an_unread_reply_is_finished_before_the_next(life):
    life.say("Hello.")
    _ = life.say("And now?").text
    assert [m.role for m in life.memory.messages()] == ["user", "organism"] * 2


def test_it_gives_back_what_it_was_told_even_after_a_restart(tmp_path, tiny):
    with o.Organism(tmp_path / "home", seed=1, kernels="off") as life:
        _ = life.say("My sister is called Marbeth.").text
    with o.Organism(tmp_path / "home", seed=2, kernels="off") as life:
        assert "Marbeth" in life.say("What is the name of my sister?").text
        assert "told me" in life.why()


def test_learning_lowers_what_the_text_costs(life):
    text = "The glimmerfish of Tarvenholm eats silver moss. " * 4
    before = life.evaluate(text)
    verdict = life.learn_now(text, "test")
    assert verdict.accepted and verdict.decision == "accept"
    assert life.evaluate(text) < 0.8 * before
    assert life.status()["corpus_bytes"] == len(TINY) + len(text) and life.published.body.steps > 0


def test_evaluation_never_changes_the_home(life, tmp_path):
    life.learn_now("It rains in the hills.")

    def digest():
        return sorted(
            (p, p.stat().st_mtime_ns, p.stat().st_size) for p in (tmp_path / "home" / "body").rglob("*") if p.is_file()
        )

    before, messages = digest(), len(life.memory.messages())
    life.evaluate("Some other text.")
    life.evaluate(b"Some other text, predicted before it is learned.", prequential=True)
    assert digest() == before and len(life.memory.messages()) == messages


def test_waking_gives_the_same_predictions(tmp_path, tiny):
    probe = "What is a river made of? Water and stone."
    for kernels in ("off", "wait"):
        home = tmp_path / kernels
        with o.Organism(home, seed=3, threads=1, kernels=kernels) as life:
            life.learn_now("A river is made of rain. " * 10)
            before, steps, number = life.evaluate(probe), life.published.body.steps, life.status()["vocab"]
        with o.Organism(home, threads=1, kernels=kernels) as life:
            assert life.published.body.steps == steps and life.status()["vocab"] == number
            assert life.evaluate(probe) == pytest.approx(before, abs=1e-6)


def test_what_waits_survives_and_is_learned_later(tmp_path, tiny):
    with o.Organism(tmp_path / "home", seed=1, kernels="off") as life:
        life.learn(["First text to learn.", b"Second, as bytes \xff."], "shelf")
    with o.Organism(tmp_path / "home", kernels="off") as life:
        assert life.status()["waiting"] == 2
        life.learn_now("Third.")
        assert life.status()["waiting"] == 0
        assert [r.text for r in life.memory.lived()][-3:] == [
            b"First text to learn.",
            b"Second, as bytes \xff.",
            b"Third.",
        ]


@pytest.mark.parametrize("field", [True, False])
def test_same_seed_same_weights(tmp_path, tiny, field):
    (tmp_path / "text.txt").write_text(TINY * 3)
    arenas = []
    for name in "ab":
        with o.Organism(
            tmp_path / name, seed=7, threads=1, kernels="wait", overrides={"body.field": field, "learning.batch": 4}
        ) as life:
            life.train([str(tmp_path / "text.txt")], steps=6)
            arenas.append(life.published.body.arena.parameters.copy())
    assert np.array_equal(*arenas) and np.isfinite(arenas[0]).all()


def test_training_reports_its_steps_and_resumes_where_it_was(tmp_path, tiny):
    (tmp_path / "text.txt").write_text(TINY * 20)
    events = []
    overrides = {"learning.batch": 4}
    with o.Organism(tmp_path / "home", seed=7, threads=1, kernels="wait", overrides=overrides) as life:
        done = life.train([str(tmp_path / "text.txt")], steps=5, on_event=events.append)
    assert [e["step"] for e in events if e["event"] == "step"] == [1, 2, 3, 4, 5]
    assert (
        done["event"] == "done" and done["steps"] == 5 and done["tokens"] == 5 * 4 * 96 and done["refused_bytes"] == 0
    )
    assert json.loads(json.dumps(done)) == done
    with o.Organism(tmp_path / "home", threads=1, kernels="wait", overrides=overrides) as life:
        assert life.published.body.steps == 5
        life.train([str(tmp_path / "text.txt")], steps=3)
        assert life.published.body.steps == 8


def test_training_in_two_halves_gives_the_weights_of_one(tmp_path, tiny):
    (tmp_path / "text.txt").write_text(TINY * 20)
    arenas = []
    for name, parts in (("one", [8]), ("two", [5, 3])):
        for steps in parts:
            with o.Organism(
                tmp_path / name, seed=7, threads=1, kernels="wait", overrides={"learning.batch": 4}
            ) as life:
                life.train([str(tmp_path / "text.txt")], steps=steps)
                arena = life.published.body.arena.parameters.copy()
        arenas.append(arena)
    assert np.abs(arenas[0] - arenas[1]).max() < 1e-6


def test_a_corpus_that_repeats_is_replayed_evenly(tmp_path, tiny, monkeypatch):
    """While it reads, half of a batch is what came last; afterwards nothing is new any more."""
    fresh, train = [], o.Learner.train
    monkeypatch.setattr(o.Learner, "train", lambda self, n, new, *rest: fresh.append(new) or train(self, n, new, *rest))
    (tmp_path / "text.txt").write_text(TINY * 8)
    overrides = {"learning.batch": 4, "immunity.judge": False}
    with o.Organism(tmp_path / "home", seed=7, threads=1, kernels="wait", overrides=overrides) as life:
        life.train([str(tmp_path / "text.txt")], steps=200)
    assert len(fresh) == 200 and any(fresh[:100]) and not any(fresh[160:])


def test_training_gives_the_field_larger_tables_also_between_vocabularies(tmp_path, tiny):
    (tmp_path / "text.txt").write_text(TINY * 30)
    overrides = {
        "field.table_mb": 1,
        "tokenizer.start_bytes": 10**7,
        "tokenizer.full_bytes": 10**8,
        "immunity.judge": False,
    }
    with o.Organism(tmp_path / "home", seed=7, threads=1, kernels="wait", overrides=overrides) as life:
        life.train([str(tmp_path / "text.txt")], epochs=1)
        field = life.published.field
        assert len(life.published.tokenizer) == 259, "the vocabulary did not grow"
        assert field.config.table_mb == o.wanted_table_mb(field.seen, life.config.field) > 1


def test_a_stage_is_chosen_at_birth_and_kept(tmp_path, tiny):
    with o.Organism(tmp_path / "home", seed=1, kernels="off", stage="infant") as life:
        assert life.status()["stage"] == "infant"
    with pytest.raises(o.UsageError, match="stage"):
        o.Organism(tmp_path / "home", stage="child")
    with pytest.raises(o.UsageError, match="no stage"):
        o.Organism(tmp_path / "other", stage="dragon")


def test_the_background_learns_while_it_talks(tmp_path, tiny):
    with o.Organism(
        tmp_path / "home", seed=1, threads=1, kernels="wait", overrides={"learning.cooldown": 0.0, "learning.batch": 4}
    ) as life:
        life.start()
        deadline = o.time.monotonic() + 60
        _ = life.say("The glimmerfish lives in Tarvenholm, where silver moss grows.").text
        while (life.memory.pending() or not life.published.body.steps) and o.time.monotonic() < deadline:
            o.time.sleep(0.05)
        assert not life.memory.pending() and not life.trouble
        assert b"glimmerfish" in [r.text for r in life.memory.lived()][-1]
        assert life.say("Go on.").as_dict()["source"] == "blend"


def test_who_was_born_before_the_kernels_goes_over_to_them(tmp_path, tiny):
    """As on a machine's first start: it counts until the compiler is done, then the trainer replays what it lived."""
    with o.Organism(tmp_path / "home", seed=1, threads=1, kernels="off", overrides={"learning.cooldown": 0.0}) as life:
        assert isinstance(life.published.field, o.CooccurField)
        life.kernels = "wait"
        life.start()
        life.learn("The glimmerfish lives in Tarvenholm, where silver moss grows.\n" * 4, "file")
        deadline = o.time.monotonic() + 60
        while not (life.published.body.steps or life.trouble) and o.time.monotonic() < deadline:
            o.time.sleep(0.05)
        assert not life.trouble and life.published.body.steps
        assert isinstance(life.published.field, o.Field)


def test_a_home_in_use_is_refused_and_readers_need_no_lock(tmp_path, tiny):
    with o.Organism(tmp_path / "home", seed=1, kernels="off") as life:
        _ = life.say("Hello.").text
        with pytest.raises(o.OrganismError, match=str(os.getpid())):
            o.Organism(tmp_path / "home", kernels="off")
        with o.Organism(tmp_path / "home", read_only=True, kernels="off") as reader:
            assert reader.status()["messages"] == 2


def test_nothing_is_read_as_alive_where_nothing_lives(tmp_path):
    with pytest.raises(o.OrganismError, match="Nothing lives"):
        o.Organism(tmp_path / "void", read_only=True)


def test_the_prequential_figure_ignores_the_future(tmp_path, tiny):
    """Shuffling what comes later changes no bit of what was predicted before."""
    first = (TINY * 12).encode()[:6000]
    curves = []
    with o.Organism(tmp_path / "home", seed=1, threads=1, kernels="wait") as life:
        for rest in (b"abc def " * 3000, b"xyz uvw " * 3000):
            points = []
            life.evaluate(
                first + b"\n" + b"." * 11_000 + rest,
                prequential=True,
                blank=True,
                curve=lambda n, b, p=points: p.append((n, b)),
            )
            curves.append(points)
    assert curves[0][0] == curves[1][0] and curves[0][-1] != curves[1][-1]


def test_words_of_the_user_are_favoured_and_fade(life):
    _ = life.say("Marzipan and cinnamon.").text
    boosts = life._boosts.copy()
    spoken = life.published.tokenizer.encode(" Marzipan and cinnamon.")
    assert boosts[spoken].min() >= 0.3 * 0.7 - 1e-9 and np.count_nonzero(boosts) == len(set(spoken.tolist()))
    for _ in range(12):
        _ = life.say("No.").text
    gone = [t for t in spoken if t not in life.published.tokenizer.encode(" No.")]
    assert life._boosts[gone].max() == 0
    voice = o.Voice(life.published, life.config, np.random.default_rng(0))
    plain = voice.field.dense()
    voice.favour("zebra", np.zeros(0))
    likelier = voice.field.dense() > plain
    assert likelier[life.published.tokenizer.encode(" zebra")].all()


def test_the_second_birth_on_a_machine_is_the_first_one_again(compiled, tmp_path, tiny, monkeypatch):
    """The newborn that is kept beside the kernels is bit for bit the one that reads."""
    monkeypatch.setattr(o.organ("kernels"), "cache_folder", lambda: tmp_path)
    for name in ("first", "second"):
        with o.Organism(tmp_path / name, seed=1, threads=1, kernels="wait") as life:
            state = life.published.field.state() | dict(merges=np.array(life.published.tokenizer.merges))
        if name == "first":
            first = state
            assert len(list(tmp_path.glob("newborn-*.npz"))) == 1
    assert all(np.array_equal(first[key], state[key]) for key in first)
    next(tmp_path.glob("newborn-*.npz")).write_bytes(b"PK damaged")
    with o.Organism(tmp_path / "third", seed=1, threads=1, kernels="wait") as life:
        assert all(np.array_equal(first[key], a) for key, a in life.published.field.state().items())
