"""Gamma: the difference from birth, measured, written into files, and given to others.

pytest tests/test_gamma.py
"""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest

import organism as o

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "nonames.txt").read_bytes()[:20_000]


def vocabulary(merges: int) -> o.Tokenizer:
    tokenizer = o.Tokenizer()
    tokenizer.learn([TEXT], merges)
    return tokenizer


def changed(tokenizer: o.Tokenizer, seed: int, stage: str = "embryo", birth: int = 1) -> o.Body:
    """A body whose embedding has moved since its birth."""
    body = o.Body(stage, len(tokenizer), o.BodyConfig(), birth)
    for array in ("parameters", "average"):
        change = np.random.default_rng(seed).standard_normal(body.birth.shape).astype(np.float32)
        body.arena.view(array, "embedding")[:] += change
    return body


# --- Measures ---


def test_gamma_by_hand():
    birth = np.zeros((4, 3), np.float32)
    now = birth.copy()
    now[1] = (0.3, 0.4, 0.0)
    now[2, 0] = 0.005
    gamma = o.Gamma.of(now, birth)
    assert gamma.magnitude == pytest.approx(np.sqrt(0.25 + 0.005**2)) and gamma.sparsity == pytest.approx(10 / 12)
    assert gamma.most_changed(2) == [1, 2]
    mean = now.mean(0)
    assert gamma.shift == pytest.approx(np.linalg.norm(mean)) and np.allclose(
        gamma.direction, mean / np.linalg.norm(mean)
    )


def test_a_newborn_has_no_gamma():
    body = o.Body("embryo", 259, o.BodyConfig())
    gamma = o.Gamma.of(body.arena["embedding"], body.birth)
    assert (gamma.magnitude, gamma.sparsity, gamma.shift) == (0, 1, 0) and gamma.drift(gamma) == 0


def test_drift_is_between_nought_and_two():
    birth = np.zeros((2, 2), np.float32)
    a, b = (o.Gamma.of(np.array([[1, 0], [x, 0]], np.float32), birth) for x in (1, -3))
    assert a.drift(a) == pytest.approx(0) and a.drift(b) == pytest.approx(2)


def test_tokens_that_join_the_vocabulary_are_no_character():
    tokenizer = vocabulary(20)
    body = changed(tokenizer, 2)
    before = o.Gamma.of(body.arena["embedding"], body.birth).magnitude
    old = len(tokenizer)
    tokenizer.learn([TEXT], 40)
    body.grow_vocabulary(tokenizer, old)
    assert o.Gamma.of(body.arena["embedding"], body.birth).magnitude == pytest.approx(before, rel=1e-5)


# --- Files ---


def test_gamma_moves_to_a_twin_as_it_is(tmp_path):
    tokenizer = vocabulary(30)
    source, twin = changed(tokenizer, 2), o.Body("embryo", len(tokenizer), o.BodyConfig(), 1)
    o.export_gamma(source, tokenizer, tmp_path / "gamma", "anna")
    foreign = o.read_gamma(twin, tokenizer, tmp_path / "gamma")
    assert foreign.fit == 1 and foreign.facts["id"] == "anna"
    o.import_gamma(twin, foreign, 1.0)
    rows = [t for t, token in enumerate(tokenizer.vocabulary) if token]  # specials have no bytes
    assert np.allclose(twin.arena["embedding"][rows], source.arena["embedding"][rows], atol=1e-6)
    assert o.compare_gamma(twin, foreign)["cosine"] == pytest.approx(1)


def test_the_dial_scales_what_is_added(tmp_path):
    tokenizer = vocabulary(30)
    source, half = changed(tokenizer, 2), o.Body("embryo", len(tokenizer), o.BodyConfig(), 1)
    o.export_gamma(source, tokenizer, tmp_path / "gamma", "anna")
    o.import_gamma(half, o.read_gamma(half, tokenizer, tmp_path / "gamma"), 0.5)
    compared = o.compare_gamma(half, o.read_gamma(half, tokenizer, tmp_path / "gamma"))
    assert compared["magnitude"] == pytest.approx(compared["their_magnitude"] / 2, rel=1e-4)


def test_rows_are_aligned_by_the_bytes_of_tokens(tmp_path):
    few, many = vocabulary(10), o.Tokenizer()
    many.learn([bytes(reversed(TEXT))], 25)
    source, other = changed(few, 2), o.Body("embryo", len(many), o.BodyConfig(), 1)
    o.export_gamma(source, few, tmp_path / "gamma", "anna")
    foreign = o.read_gamma(other, many, tmp_path / "gamma")
    common = {t for t in few.vocabulary if t} & {t for t in many.vocabulary if t}
    assert {many.vocabulary[row] for row in foreign.rows} == common and foreign.known == len(
        [t for t in few.vocabulary if t]
    )


def test_organisms_that_were_born_apart_are_turned_into_each_other(tmp_path):
    """Where one birth is a rotation of the other, the rotation is found and the fit is 1; elsewhere it says how poor."""
    tokenizer = vocabulary(10)
    source, turned = changed(tokenizer, 2), o.Body("embryo", len(tokenizer), o.BodyConfig(), 1)
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((16, 16)))[0].astype(np.float32)
    turned.birth = turned.birth @ turn
    for array in ("parameters", "average"):
        turned.arena.view(array, "embedding")[:] = turned.birth
    o.export_gamma(source, tokenizer, tmp_path / "gamma", "anna")
    foreign = o.read_gamma(turned, tokenizer, tmp_path / "gamma")
    change = (source.arena["embedding"] - source.birth) @ turn
    assert foreign.fit == pytest.approx(1, abs=1e-4) and np.allclose(foreign.change, change[foreign.rows], atol=1e-3)
    stranger = o.Body("infant", len(tokenizer), o.BodyConfig(), 9)
    assert o.read_gamma(stranger, tokenizer, tmp_path / "gamma").fit < 0.7


def test_a_gamma_that_is_damaged_or_lacks_something_is_refused(tmp_path):
    tokenizer = vocabulary(10)
    body, path = changed(tokenizer, 2), tmp_path / "gamma"
    o.export_gamma(body, tokenizer, path, "anna")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(o.OrganismError, match="is damaged"):
        o.read_gamma(body, tokenizer, path)
    o.write_export(path, "gamma", dict(change=np.zeros((2, 2))), {})
    with pytest.raises(o.OrganismError, match="lacks something"):
        o.read_gamma(body, tokenizer, path)
    o.write_export(path, "gamma", dict(change=np.zeros((1, 16)), birth=np.zeros((1, 16)), text=np.frombuffer(b"never seen", np.uint8),
                                       ends=np.array([10])), {})  # fmt: skip
    with pytest.raises(o.OrganismError, match="knows none of this organism's tokens"):
        o.read_gamma(body, tokenizer, path)


# --- The command line: growth, deltas and gamma of a real life ---


def organism(home: Path, *arguments: str) -> tuple[int, list[dict], str]:
    """(exit code, objects on stdout, stderr) of one command, in this process: a score of starts would take longer than the test."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        code = o.main([*arguments, "--home", str(home), "--json", "--quiet"])
    return code, [json.loads(line) for line in out.getvalue().splitlines()], error.getvalue()


def test_a_life_grows_has_deltas_and_moves_its_gamma(tmp_path):
    home, other, text = tmp_path / "a", tmp_path / "b", tmp_path / "text.txt"
    text.write_bytes(TEXT)
    assert organism(home, "train", "--corpus", str(text), "--steps", "4", "--seed", "1")[0] == 0
    before = organism(home, "eval", str(text))[1][-1]["bits_per_byte"]
    code, lines, _ = organism(home, "grow")
    assert code == 0 and (lines[-1]["from"], lines[-1]["stage"]) == ("embryo", "infant") and lines[-1]["change"] < 1e-4
    assert organism(home, "delta", "add", "--reason", "songs")[0] == 0
    assert organism(home, "eval", str(text))[1][-1]["bits_per_byte"] == pytest.approx(before, abs=1e-4)
    assert organism(home, "train", "--corpus", str(text), "--steps", "3")[0] == 0
    rows = organism(home, "delta", "list")[1]
    assert [(r["id"], r["reason"], r["trained"], r["on"]) for r in rows] == [(1, "songs", True, True)]
    assert rows[0]["norm"] > 0 and rows[0]["bursts"]
    assert organism(home, "delta", "off", "1")[1][-1]["on"] is False
    assert organism(home, "delta", "export", "1", "-o", str(tmp_path / "d"))[0] == 0
    assert organism(home, "delta", "import", str(tmp_path / "d"))[1][-1]["reason"] == "imported: songs"
    assert organism(home, "delta", "off", "9")[0] == 2
    status = organism(home, "status")[1][-1]
    assert (status["stage"], status["deltas"]) == ("infant", 2) and status["gamma"]["magnitude"] > 0
    assert organism(home, "gamma", "export", "-o", str(tmp_path / "g"))[0] == 0
    assert organism(home, "gamma", "compare", str(tmp_path / "g"))[1][-1]["cosine"] == pytest.approx(1)
    assert organism(other, "train", "--corpus", str(text), "--steps", "2", "--seed", "2", "--stage", "infant")[0] == 0
    imported = organism(other, "gamma", "import", str(tmp_path / "g"), "--strength", "0.5")[1][-1]
    assert imported["common_tokens"] > 256 and imported["fit"] < 1
    assert organism(other, "train", "--corpus", str(text), "--stage", "embryo")[0] == 2
    (tmp_path / "g").write_bytes(b"garbage")
    code, _, error = organism(other, "gamma", "import", str(tmp_path / "g"))
    assert code == 1 and "is damaged" in error and "Traceback" not in error
