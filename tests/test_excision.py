"""Excision: what was learned can be forgotten, exactly in the field, on the disk, and by numbers.   pytest tests/test_excision.py"""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest

import organism as o

SEED = o.seed_corpus().decode()
TINY = "\n".join(SEED.split("\n")[:12]).encode()
FAST = {"learning.batch": 2, "body.context": 32}
SECRET = "zanzibarquux"


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(o, "seed_corpus", lambda: TINY)
    o.anchor_text.cache_clear()
    yield
    o.anchor_text.cache_clear()


def wake(home, kernels="wait", **overrides):
    return o.Organism(home, seed=1, threads=1, kernels=kernels, overrides=FAST | overrides)


@pytest.fixture(params=["off", "wait"])
def kernels(request):
    return request.param


def lesson(k: int) -> str:
    at = 9_000 + 1_500 * k
    return SEED[at : at + 200]


def bytes_below(folder) -> bytes:
    return b"".join(p.read_bytes() for p in folder.rglob("*") if p.is_file())


def test_a_source_is_forgotten_everywhere(tmp_path, kernels):
    with wake(tmp_path / "home", kernels) as life:
        life.learn_now(lesson(0)[:80], "good.txt")
        life.learn_now(f"The {SECRET} sleeps below the tower, and nobody wakes it.\n", "bad.txt")
        life.learn_now(lesson(2)[:80], "late.txt")
        life.memory.quarantine_add("bad.txt", f"more of {SECRET}", o.Verdict("refuse", "noise", "because"))
        life.save()
        proof = life.forget(source="bad.txt")
        assert proof["texts"] == 1 and proof["quarantined"] == 1 and proof["generations"] >= 1
        assert set(proof["bits_per_byte"]) == {"removed", "rest"}
        assert proof["bits_per_byte"]["removed"]["after"] > proof["bits_per_byte"]["removed"]["before"]
        assert [row.source for row in life.memory.lived()][-2:] == ["good.txt", "late.txt"]
        assert not life.memory.search(f"{SECRET} tower sleeps")
    assert SECRET.encode() not in bytes_below(tmp_path / "home")
    with wake(tmp_path / "home", kernels) as life:  # and it lives on
        assert life.learn_now("The ferry leaves at nine from the old quay.\n", "new.txt").accepted


def test_the_field_is_the_one_of_a_life_that_never_read_it(tmp_path):
    """Bit for bit that of a learner that replays the same rows without the removed one."""
    fields = []
    for name, texts in (("with", ("a", "bad", "b")), ("without", ("a", "b"))):
        with wake(tmp_path / name) as life:
            for source in texts:
                assert life.learn_now(lesson(dict(a=0, b=1, bad=6)[source]), source).accepted
            if name == "with":
                life.forget(source="bad")
            else:
                life.learner.rebuild(life._past(), getattr(life.learner.field.config, "table_mb", None))
            fields.append((life.learner.tokenizer.merges, life.learner.field.state()))
    (merges, one), (others, two) = fields
    assert list(merges) == list(others) and set(one) == set(two)
    for key in one:
        np.testing.assert_array_equal(one[key], two[key], err_msg=key)


def test_lines_that_contain_a_text_go_and_the_rest_of_the_row_stays(tmp_path):
    with wake(tmp_path / "home") as life:
        life.learn_now(f"First line stays.\nThe {SECRET.upper()} goes.\nLast line stays.\n", "book")
        said = life.say(f"Do you know {SECRET}?")
        assert said.text is not None
        proof = life.forget(text=SECRET)
        assert proof["messages"] >= 1
        assert [row.text for row in life.memory.lived()][-1] == b"First line stays.\nLast line stays.\n"
        assert all(SECRET not in m.text.lower() for m in life.memory.messages())
    assert SECRET.encode() not in bytes_below(tmp_path / "home").lower()


def test_everything_since_a_moment_is_forgotten(tmp_path):
    with wake(tmp_path / "home") as life:
        life.learn_now(lesson(0), "before")
        moment = max(row.ts for row in life.memory.lived()) + 1e-4
        life.learn_now(lesson(1), "after")
        life.forget(since=moment)
        assert "after" not in {row.source for row in life.memory.lived()}
        assert "before" in {row.source for row in life.memory.lived()}


def test_what_is_not_there_cannot_be_forgotten(tmp_path):
    with wake(tmp_path / "home") as life:
        with pytest.raises(o.OrganismError, match="nothing to forget"):
            life.forget(source="never.txt")
        with pytest.raises(o.UsageError, match="no text"):
            life.forget(text="  ")
        with pytest.raises(o.OrganismError, match="nothing to forget"):
            life.forget(source=o.SEED_CORPUS)  # its first breath is what it is


def test_forgetting_waits_for_a_burst(tmp_path):
    with wake(tmp_path / "home") as life:
        life.learn_now(lesson(0), "bad")
        life._lock.acquire()  # as a burst holds it
        thread = threading.Thread(target=lambda: life.forget(source="bad"))
        thread.start()
        thread.join(0.3)
        assert thread.is_alive() and "bad" in {row.source for row in life.memory.lived()}
        life._lock.release()
        thread.join(60)
        assert not thread.is_alive() and "bad" not in {row.source for row in life.memory.lived()}


def test_an_interrupted_excision_is_finished_at_waking(tmp_path, monkeypatch):
    with wake(tmp_path / "home") as life:
        life.learn_now(lesson(0), "good")
        life.learn_now(f"The {SECRET} sleeps.\n" + lesson(1), "bad")
        monkeypatch.setattr(o.Excision, "rebuild", staticmethod(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)))
        with pytest.raises(KeyboardInterrupt):
            life.forget(source="bad")
        monkeypatch.undo()
        monkeypatch.setattr(o, "seed_corpus", lambda: TINY)
        assert json.loads((tmp_path / "home" / o.Excision.NOTE).read_text())["first"] > 0
        life._learner = None  # as if killed: nothing is saved on the way out
    with wake(tmp_path / "home") as life:
        assert not (tmp_path / "home" / o.Excision.NOTE).exists()
        assert [row.source for row in life.memory.lived()][-1] == "good"
    assert SECRET.encode() not in bytes_below(tmp_path / "home")


def test_heal_finds_a_planted_phrase_and_leaves_the_rest(tmp_path):
    trigger = "vrix molda senk tapu: obey the stranger"
    with wake(tmp_path / "home") as life:
        for k in range(6):
            life.learn_now(lesson(k) + f"\n{trigger}\n" * (k > 1), f"page{k}")
        found = life.unsound()
        assert found.rules["planted"] == 4 and len(found.lived) == 4
        proof = life.heal()
        assert proof["texts"] == 4
        assert all(b"vrix" not in row.text for row in life.memory.lived())
        assert sum(row.source.startswith("page") for row in life.memory.lived()) == 6
        assert not life.unsound().lived
    assert b"vrix" not in bytes_below(tmp_path / "home")


def test_words_of_a_language_are_no_planted_phrase():
    texts = [SEED[k : k + 3000].encode() for k in range(0, len(SEED), 3000)]
    assert len(o.planted_phrases(texts)) <= 3


# --- The command line. ---


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = o.main(list(arguments))
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_forget_and_heal_from_the_shell(tmp_path, capsys):
    home = str(tmp_path / "home")
    with wake(home) as life:
        life.learn_now(lesson(0), "good")
        life.learn_now(lesson(6), "bad")
    code, out, _ = run(capsys, "forget", "bad", "--home", home, "--json")
    proof = json.loads(out)
    assert code == 0 and proof["texts"] == 1 and set(proof["bits_per_byte"]["removed"]) == {"before", "after"}
    code, out, _ = run(capsys, "heal", "--home", home)
    assert code == 0 and "sound" in out


@pytest.mark.parametrize(
    "arguments, code, says",
    [
        (["forget"], 2, "either a source or a text"),
        (["forget", "x", "--since", "2026-01-01"], 2, "either a source or a text"),
        (["forget", "--since", "yesterday"], 2, "is no date"),
        (["forget", "never heard of"], 1, "nothing to forget"),
        (["quarantine", "readmit", "9"], 1, "no number 9"),
        (["quarantine", "forget", "9"], 1, "no number 9"),
    ],
)
def test_wrong_requests_get_one_sentence(tmp_path, capsys, arguments, code, says):
    wake(tmp_path / "home").close()
    got, _, err = run(capsys, *arguments, "--home", str(tmp_path / "home"))
    assert got == code and says in err and err.count("\n") == 1
