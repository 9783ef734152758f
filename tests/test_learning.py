"""Learning: reading files, the buffer, the experience, the gate, the schedule.   pytest tests/test_learning.py"""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

import organism as o


def read(path, **options):
    reader = o.Reader([str(path)], **options)
    return list(reader.pieces()), reader


def test_pieces_of_a_file_join_to_the_file_and_carry_their_offsets(tmp_path):
    data = ("The quick brown fox. " * 9000).encode() + b"\xff\x00\xfe" * 10
    (tmp_path / "a.txt").write_bytes(data)
    pieces, _ = read(tmp_path / "a.txt")
    assert b"".join(p.data for p in pieces) == data and pieces[-1].offset == len(data)
    assert [p.part for p in pieces] == list(range(len(pieces))) and len(pieces) > 2
    again = list(o.Reader([str(tmp_path / "a.txt")]).pieces({str(tmp_path / "a.txt"): pieces[0].offset}))
    assert b"".join(p.data for p in again) == b"".join(p.data for p in pieces[1:])


def test_a_line_without_end_is_read_in_bounded_pieces(tmp_path):
    (tmp_path / "long.txt").write_bytes(b"a" * 3_000_000)
    pieces, _ = read(tmp_path / "long.txt")
    assert max(len(p.data) for p in pieces) <= o.PIECE_BYTES and sum(len(p.data) for p in pieces) == 3_000_000


def test_jsonl_gives_documents_and_reports_malformed_lines(tmp_path, caplog):
    lines = [
        '{"text": "One."}',
        "{broken",
        '{"content": "Two."}',
        "[1, 2]",
        '{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]}',
    ]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    pieces, reader = read(tmp_path / "d.jsonl")
    assert [p.data for p in pieces] == [b"One.", b"Two.", b"H: Hi\nA: Yo\n"] and all(p.part == 0 for p in pieces)
    assert reader.malformed == 2 and "line 2" in caplog.text and "line 4" in caplog.text


def test_json_lists_and_folders_and_tags(tmp_path):
    (tmp_path / "b.json").write_text(json.dumps(["first", {"text": "<p>second</p>"}]))
    (tmp_path / "c.md").write_text("# Head <b>x</b>\n")
    pieces = list(o.Reader([str(tmp_path)], strip_tags=True).pieces())
    assert [p.data for p in pieces] == [b"first", b"second", b"# Head x\n"]


@pytest.mark.parametrize("name, content, word", [("none.txt", None, "no file"), ("empty.txt", b"", "empty")])
def test_what_cannot_be_read_is_said_in_one_sentence(tmp_path, name, content, word):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(o.OrganismError, match=word):
        read(tmp_path / name)


def test_the_buffer_waits_for_bytes_or_novelty_and_for_its_cooldown():
    config = o.dataclasses.replace(o.Config().learning, buffer_bytes=1000, buffer_novelty=0.2, cooldown=10.0)
    buffer = o.QuantumBuffer(config)
    buffer.feed(b"x" * 100, 100 * buffer.usual)
    assert not buffer.ready(100.0)
    buffer.feed(b"x" * 900, 900 * buffer.usual)
    assert buffer.ready(100.0)
    buffer.reset(100.0)
    buffer.feed(b"strange words", 13 * 8.0)
    assert buffer.novelty > 0.2 and not buffer.ready(105.0) and buffer.ready(111.0)


def test_the_rate_warms_up_and_falls_over_the_whole_life():
    config = o.Config().learning
    rates = [o.learning_rate(s, config) for s in range(0, config.horizon_steps + 1, 10)]
    assert rates[0] < config.rate / 10 and max(rates) == pytest.approx(config.rate, rel=0.01)
    assert rates[-1] == pytest.approx(config.rate * config.rate_min, rel=1e-6)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_windows_are_tokens_and_the_tokens_that_follow_them():
    experience = o.Experience(10_000, 4, None)
    experience.append(np.arange(500, dtype=np.int32), None)
    x, y, view = experience.windows(16, 32, 40, np.random.default_rng(0))
    assert view is None and x.shape == y.shape == (16, 32)
    assert (y == x + 1).all() and (np.diff(x, axis=1) == 1).all() and y[0, -1] == 499


def test_a_full_experience_keeps_what_is_new_and_stays_bounded():
    experience = o.Experience(8192, 4, None)
    for start in range(0, 40_000, 1000):
        experience.append(np.arange(start, start + 1000, dtype=np.int32), None)
        experience.trim()
    assert experience.length <= 8192 + 1000 and experience.tokens[experience.length - 1] == 39_999
    assert experience.tokens[:1024].max() < 39_000


def in_memory_of_files() -> int:
    """KB of this process that lie in files."""
    return int(re.search(r"RssFile:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def a_view(tree: o.FieldTree, rows: int, width: int) -> o.FieldView:
    rng = np.random.default_rng(rows)
    starts = np.sort(rng.integers(0, len(tree), (rows, width)), axis=1).astype(np.uint16)
    return o.FieldView(starts, -rng.random((rows, width)).astype(np.float16), np.zeros((rows, 6), np.float16), tree)


def test_an_experience_in_files_is_the_same_and_gives_its_memory_back(tmp_path):
    tree, rows = o.FieldTree([bytes([k]) for k in range(256)]), 50_000
    view = a_view(tree, rows, 64)
    kept = [o.Experience(100_000, 64, tree, folder=folder) for folder in (None, tmp_path)]
    for experience in kept:
        for at in range(0, rows, 10_000):
            experience.append(np.arange(at, at + 10_000, dtype=np.int32), view[at : at + 10_000])
    assert not list(tmp_path.iterdir()), "its files have no names"
    before = in_memory_of_files()
    kept[1].rest()
    assert before - in_memory_of_files() > 0.9 * (view.starts.nbytes + view.logmass.nbytes) / 1024
    (_, _, mine), (_, _, theirs) = (one.windows(8, 96, 0, np.random.default_rng(0)) for one in kept)
    assert (mine.starts == theirs.starts).all() and (mine.logmass == theirs.logmass).all()
    assert all((a == b).all() for a, b in zip(kept[0].state().values(), kept[1].state().values(), strict=True))


def test_an_experience_that_finds_no_place_on_the_disk_stays_in_memory(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(o.os, "posix_fallocate", full)
    tree = o.FieldTree([bytes([k]) for k in range(256)])
    experience = o.Experience(8192, 64, tree, folder=tmp_path)
    experience.append(np.arange(5000, dtype=np.int32), a_view(tree, 5000, 64))
    experience.rest()
    assert (experience.starts[:5000] == a_view(tree, 5000, 64).starts).all()


def test_rollback_forgets_exactly_what_was_appended():
    experience = o.Experience(8192, 4, None)
    experience.append(np.arange(10, dtype=np.int32), None)
    mark = experience.mark()
    experience.append(np.arange(99, dtype=np.int32), None)
    experience.rollback(mark)
    assert experience.state()["tokens"].tolist() == list(range(10))


def test_the_gate_learns_whom_to_trust_and_never_assigns_more_than_one():
    gate = o.Gate()
    good, bad, entropy = np.log(np.full(3000, 0.5)), np.log(np.full(3000, 0.01)), np.zeros(3000)
    mixed = gate.mix(good, bad, entropy)
    assert mixed[-1] == pytest.approx(math.log(0.5), abs=0.05) and mixed.max() < 0
    frozen = gate.copy()
    gate.mix(bad, good, entropy, learn=False)
    assert (gate.weight == frozen.weight).all()
    assert o.Gate().load(gate.state()).weight == pytest.approx(gate.weight)


# --- Domains: whose text the body is asked about, and what is held back to judge it by ---


def test_each_domain_has_a_weight_of_its_own():
    gate = o.Gate()
    good, bad, entropy = np.log(np.full(500, 0.5)), np.log(np.full(500, 0.01)), np.zeros(500)
    gate.refit(0, bad, good, entropy)
    gate.refit(2, good, bad, entropy)
    assert gate.share(0.0, 0) < 0.05 and gate.share(0.0, 1) == 0.5 and gate.share(0.0, 2) > 0.95
    mixed = gate.mix(good[:3], bad[:3], entropy[:3], np.array([0, 1, 2]), learn=False)
    assert mixed[0] < mixed[1] < mixed[2] < 0
    assert o.Gate().load(gate.state()).weight == pytest.approx(gate.weight)


def test_the_weights_of_a_domain_are_the_likeliest():
    """Against a search over all weights; ten tokens that speak for one half are nothing beside 20,000."""
    rng = np.random.default_rng(0)
    body, field = np.log(rng.beta(2, 5, 20_000)), np.log(rng.beta(2, 4, 20_000))
    gate, entropy = o.Gate(), np.full(20_000, -0.9)
    gate.refit(0, body, field, entropy)
    grid = np.linspace(0.01, 0.99, 99)
    cost = [-np.log(g * np.exp(body) + (1 - g) * np.exp(field)).sum() for g in grid]
    assert gate.share(-0.9) == pytest.approx(grid[int(np.argmin(cost))], abs=0.02)


def test_a_gate_from_before_there_were_domains_is_read():
    gate = o.Gate().load(dict(weight=[0.25] * 12, count=[10.0] * 12))
    assert gate.share(0.0) == gate.share(0.0, 3) == 0.25


def a_reader(sample_text: bytes) -> o.Learner:
    tokenizer = o.Tokenizer()
    tokenizer.learn([sample_text[:20_000]], 128)
    learner = o.newborn_learner(o.Config(), "embryo", engine="numba", threads=1, seed=1, tokenizer=tokenizer)
    for part, piece in enumerate([sample_text[:15_000], sample_text[15_000:30_000]]):
        for tokens in learner.slices(piece, part):
            learner.read(tokens)
    return learner


def test_some_ends_of_long_texts_are_held_back_and_a_replay_holds_back_the_same(sample_text):
    learner = a_reader(sample_text)
    held, kept = learner.experience.held[0], learner.experience.tokens[: learner.experience.length]
    assert held
    for stretch in held:
        assert len(stretch.tokens) == stretch.SIZE + 1 and len(stretch.view) == stretch.SIZE
        assert learner.tokenizer.decode(stretch.tokens) in sample_text
        runs = np.lib.stride_tricks.sliding_window_view(kept, 32)
        assert not (runs == stretch.tokens[-32:]).all(1).any()
    learner.rebuild(iter([(sample_text[:15_000], 0), (sample_text[15_000:30_000], 1)]))
    again = learner.experience.held[0]
    assert [s.tokens.tolist() for s in again] == [s.tokens.tolist() for s in held]


def test_short_texts_are_never_held_back(sample_text):
    learner = a_reader(sample_text[:1_000])
    learner.read(learner.encode(b"My cat is called Miso.", 0))
    assert learner.experience.held == {}


def test_a_burst_that_is_undone_leaves_what_was_held_back(sample_text):
    experience = a_reader(sample_text).experience
    mark, before = experience.mark(), experience.held
    experience.hold_back(before[0][0], 1)
    experience.rollback(mark)
    assert experience.held == before


def test_what_is_held_back_comes_back_from_disk(sample_text):
    experience = a_reader(sample_text).experience
    other = o.Experience(experience.capacity, experience.width, experience.tree)
    other.load(experience.state())
    for old, new in zip(experience.held[0], other.held[0], strict=True):
        assert (old.tokens == new.tokens).all() and (old.costs == new.costs).all()
        assert (old.view.starts == new.view.starts).all() and (old.view.scalars == new.view.scalars).all()


def test_a_body_that_went_astray_is_hardly_asked(sample_text):
    learner = a_reader(sample_text)
    learner.weigh()
    learner.body.arena["head"][:] = np.random.default_rng(0).normal(0, 1, learner.body.arena["head"].shape)
    learner.body.arena.average[:] = learner.body.arena.parameters
    assert not learner.weigh()  # nothing was trained
    learner.unweighed = 1 << 20
    assert learner.weigh() and not learner.weigh()
    assert learner.gate.weight[0].max() < 0.15
    learner.rebuild(iter([(sample_text[:30_000], 0)]))
    assert learner.weigh()  # the same body on other views
