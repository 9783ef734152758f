"""Byte by byte: a reader sums over the ways to write bytes as tokens, a mixer learns whom to believe, a summary ranks.

Run alone: pytest -n 0 tests/swarm/test_reading.py
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from organism import Field, Organism, OrganismError, Tokenizer, seed_corpus
from swarm.ensemble import Mixer
from swarm.reading import SYMBOLS, TRACE, ByteReader, Lexicon, State, bits_of, packed, unpacked
from swarm.summary import Summary

WORDS = [b"", b"a", b"ab", b"b", b"ba", b"bab", b"\xff", b"\xff\xff"]  # the first stands for a token without bytes


@pytest.fixture(scope="module")
def life(tmp_path_factory):
    """Trained for a few steps, so that its body speaks."""
    with Organism(tmp_path_factory.mktemp("reading") / "home", seed=1, threads=1) as one:
        text = "The old tower of Brumm stands on a green hill above the river Olse.\n"
        for k in range(2):
            one.learn_now(f"{text}In {1700 + k} the bells rang {k} times.\n" * 8)
        assert one.published.body.steps > 0
        yield one


# --- The lexicon. ---


@given(st.sampled_from([b"a", b"b", b"ab", b"ba", b"\xff", b"c", b""]))
def test_words_that_begin_with_a_prefix_are_one_range(prefix):
    lexicon = Lexicon(WORDS)
    exact, edges = lexicon.prefix(prefix)
    assert (exact is not None) == (prefix in lexicon.words)
    for byte in range(256):
        within = lexicon.words[edges[byte] : edges[byte + 1]]
        assert within == [word for word in lexicon.words if word.startswith(prefix + bytes([byte]))]


# --- The sum over ways, against all ways. ---


class Toy(ByteReader):
    """A reader of an organism whose next token depends on the last one alone: p[last, next]."""

    def __init__(self, p: np.ndarray):
        self.lexicon, self.paths, self.share = Lexicon(WORDS), 1000, 0.0
        self.p, self._next, self._busy, self._free = p, None, [], []
        self._anchor, self._since = self._at(0), b""
        from swarm.reading import Path

        self._paths = [Path(self._anchor, 1.0)]

    def _at(self, token: int) -> State:
        state = State(None, None)  # type: ignore[arg-type]
        row = self.p[token]
        state.token, state.end = token, 0.0  # type: ignore[attr-defined]
        state.sums = np.concatenate([[0.0], np.cumsum(row[self.lexicon.order])])
        return state

    def _after(self, state: State, token: int) -> State:
        return self._at(token)


def begins(p: np.ndarray, last: int, text: bytes) -> float:
    """P(the bytes to come begin with text), by all tokens that begin with it or that it begins with."""
    if not text:
        return 1.0
    total = 0.0
    for token, word in enumerate(WORDS):
        if word and word.startswith(text):
            total += p[last, token]
        elif word and text.startswith(word):
            total += p[last, token] * begins(p, token, text[len(word) :])
    return total


@given(st.integers(0, 10_000), st.text("ab", min_size=1, max_size=6))
def test_the_next_byte_is_what_all_ways_of_writing_the_text_say(seed, text):
    p = np.random.default_rng(seed).dirichlet(np.ones(len(WORDS) - 1), len(WORDS))
    p = np.concatenate([np.zeros((len(WORDS), 1)), p], axis=1)
    reader, so_far = Toy(p), b""
    for byte in text.encode():
        expected = begins(p, 0, so_far + bytes([byte])) / begins(p, 0, so_far)
        assert reader.next()[byte] == pytest.approx((1 - TRACE) * expected + TRACE / SYMBOLS, rel=1e-9)
        assert reader.next().sum() == pytest.approx(1)
        reader.advance(bytes([byte]))
        so_far += bytes([byte])


# --- Of a real organism. ---


def test_bytes_cost_no_more_than_its_tokens_do(life):
    text = b"The old tower of Brumm stands on a hill. Where do you live? I live on your own machine.\n"
    snap = life.published
    reader = ByteReader.of(life)
    place, state, bits = {t: k for k, t in enumerate(reader.lexicon.order.tolist())}, reader._anchor, 0.0
    for token in snap.tokenizer.encode(text).tolist():
        bits -= np.log2(state.sums[place[token] + 1] - state.sums[place[token]])
        state = reader._after(state, token)
    cost = bits_of(ByteReader.of(life), text).sum()
    assert 0.9 * bits < cost < bits * 1.001


def test_joining_and_dropping_cost_next_to_nothing(life):
    text = b"H: Do you sleep?\nA: When nobody speaks to me, I practise. Zebras are striped.\n"
    exact, quick = (
        bits_of(ByteReader(life.published, paths=paths, share=share), text) for paths, share in ((64, 0.0), (16, 1e-3))
    )
    assert abs(quick.mean() - exact.mean()) < 0.02 and np.abs(quick - exact).max() < 2.0


def test_there_is_always_a_path_that_expects_every_byte(life):
    reader = ByteReader.of(life)
    for byte in b"H: Where do you live?\nA: I live on your own machine, and I listen.\n":
        reader.advance(bytes([byte]))
        assert sum(not path.rest for path in reader._paths) == 1


@pytest.mark.parametrize(
    "text", [b"\xff\xfe\x00 strange \xf0\x9f", "Привет, 世界!".encode(), b"x" * 70, b" \n\t\r\n  "]
)
def test_every_byte_can_come_and_probabilities_sum_to_one(life, text):
    reader = ByteReader.of(life, b"hello")
    for byte in text:
        p = reader.next()
        assert p.shape == (SYMBOLS,) and p.min() > 0 and p.sum() == pytest.approx(1)
        reader.advance(bytes([byte]))


def test_it_turns_to_the_domain_that_a_text_belongs_to(tmp_path, monkeypatch):
    foreign = "".join(f"#{k:03d} ZQX-JKV [{k * k % 97:02d}] WYZ%%QJX\n" for k in range(200))
    familiar = seed_corpus()[:400]
    with Organism(tmp_path / "home", seed=1, threads=1, overrides={"immunity.judge": False}) as one:
        one.learn_now(foreign)
        field = one.published.field
        assert len(field.resting) == 2, "the foreign text has a domain of its own"
        whose = lambda self, tokens: (int(b"ZQX" in one.published.tokenizer.decode(tokens)), 1.0)
        monkeypatch.setattr(Field, "_cheapest", whose)  # both have read all that is familiar
        for text, domain in ((foreign.encode()[:400], 1), (familiar, 0)):
            reader = ByteReader.of(one)
            bits = bits_of(reader, text)
            assert reader._anchor.field.domain == domain and reader.next().sum() == pytest.approx(1)
            assert bits[100:].mean() < 3.0
        reader = ByteReader.of(one, ahead=foreign.encode()[:200])
        assert reader._anchor.field.domain == 1, "at once, where it is known ahead"
        reader.advance(familiar[:100])
        assert reader._anchor.field.domain == 1, "and it does not doubt that before it is past it"
        reader = ByteReader.of(one)
        reader.advance(foreign.encode()[:300] + familiar * 3)
        assert reader._anchor.field.domain == 0, "also when the text changes"


def test_reading_changes_nothing_of_the_organism(life):
    before = life.evaluate(b"The old tower of Brumm")["bits_per_byte"]
    bits_of(ByteReader.of(life), b"The old tower of Brumm stands.")
    assert life.evaluate(b"The old tower of Brumm")["bits_per_byte"] == before
    assert Tokenizer.EOS == 257


def test_distributions_travel_in_letters():
    rows = np.random.default_rng(0).dirichlet(np.ones(SYMBOLS), 3)
    np.testing.assert_allclose(unpacked(packed(list(rows))), rows, rtol=0.01)
    for nonsense in ("AAA", "!!!", "AAAA", packed([np.full(SYMBOLS, np.nan)])):
        with pytest.raises(ValueError):
            unpacked(nonsense)


# --- The mixer. ---


def test_it_soon_believes_the_one_who_knows():
    rng, mixer = np.random.default_rng(0), Mixer(3)
    cost = []
    for _ in range(60):
        symbol = int(rng.integers(SYMBOLS))
        given = [np.full(SYMBOLS, 1 / SYMBOLS)] * 3
        given[1] = np.full(SYMBOLS, 0.1 / SYMBOLS)
        given[1][symbol] += 0.9
        mixer.mix(given)
        cost.append(mixer.learn(symbol))
    assert mixer.shares.argmax() == 1 and np.mean(cost[20:]) < 0.3


def test_two_that_each_know_half_are_together_better_than_each():
    """One knows the high bit, the other the low one: a product is right where an average is not."""
    rng, mixer = np.random.default_rng(1), Mixer(2, rate=0.02)
    cost = []
    for _ in range(400):
        symbol = int(rng.integers(4))
        high = np.array([0.45 if s // 2 == symbol // 2 else 0.05 for s in range(4)])
        low = np.array([0.45 if s % 2 == symbol % 2 else 0.05 for s in range(4)])
        mixer.mix([high, low])
        cost.append(mixer.learn(symbol))
    alone = -np.log2(0.45)
    assert np.mean(cost[200:]) < alone - 0.1


@given(st.integers(0, 1000))
def test_its_gradient_is_that_of_the_cost(seed):
    rng = np.random.default_rng(seed)
    p, symbol, step = rng.dirichlet(np.ones(9), 3), int(rng.integers(9)), 1e-6
    mixer = Mixer(3, rate=1.0)
    mixer.weights = rng.normal(size=4)
    before, expected = mixer.weights.copy(), np.zeros(4)
    for k in range(4):
        for sign in (1, -1):
            mixer.weights = before + sign * step * (np.arange(4) == k)
            expected[k] += sign * np.log(mixer.mix(p)[symbol]) / (2 * step)
    mixer.weights = before.copy()
    mixer.mix(p)
    mixer.learn(symbol)
    np.testing.assert_allclose(mixer.weights - before, expected, atol=1e-5)


def test_who_leaves_is_forgotten():
    mixer = Mixer(3)
    mixer.leave(1)
    assert mixer.mix(np.full((2, 5), 0.2)) == pytest.approx(np.full(5, 0.2)) and mixer.shares.sum() == pytest.approx(1)


# --- Summaries. ---


def test_a_summary_tells_whose_words_these_are(sample_text):
    code, prose = (
        Summary.of([sample_text[:100_000]]),
        Summary.of([seed_corpus()]),
    )
    assert (
        code.bits_per_byte(b"    def __init__(self, name):\n")
        < prose.bits_per_byte(b"    def __init__(self, name):\n") - 0.5
    )
    assert (
        prose.bits_per_byte(b"Where do you live, and what do you remember?\n")
        < code.bits_per_byte(b"Where do you live, and what do you remember?\n") - 0.3
    )
    again = Summary.from_blob(code.blob())
    assert again.bits_per_byte(sample_text[-500:]) == code.bits_per_byte(sample_text[-500:])
    assert Summary.of([]).bits_per_byte(b"any") == pytest.approx(8)


@pytest.mark.parametrize("blob", [b"", b"nonsense", Summary.of([]).blob()[:-9]])
def test_a_broken_summary_is_an_error(blob):
    with pytest.raises(OrganismError):
        Summary.from_blob(blob)
