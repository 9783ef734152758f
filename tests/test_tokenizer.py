"""The tokenizer: bytes come back, ids never change, twins and Hugging Face agree.   pytest tests/test_tokenizer.py"""

import itertools
import json
import threading

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import organism as o

pytest.importorskip("numba")
from organs.kernels import tokenizer as twin

CLASSES = o.character_classes()
BARE = o.Tokenizer()

# Text that is hard to cut: white space and runs around the caps, scripts, classes beyond ASCII, broken UTF-8.
PIECES = [
    *(
        b"a",
        b"the",
        b" the",
        b"The",
        b"ab" * 3,
        b"7",
        b"1984",
        b"==",
        b"_",
        b"'s",
        b"\n",
        b"\r\n",
        b"\t",
        b" ",
        b"    ",
    ),
    *(b" " * 15, b" " * 16, b" " * 17, b"\n" * 33, b"x" * 31, b"x" * 32, b"x" * 65, b"=" * 40, b"0" * 33),
    *(
        c.encode()
        for c in ("é", "е\u0301", "Привет", "漢字" * 20, "٣", "½", "\u00a0", "\u2028", "\u200b", "€", "😀" * 40)
    ),
    *(c.encode() for c in ("\x00", "\x1c", "\x85", "\ufeff", "\uffff", "\U0002ffff", "\U00030000", "\U0010ffff")),
    *(b"\xff", b"\x80", b"\xc3", b"\xe2\x82", b"\xf0\x9f\x98", b"\xf0\x9f", b"\xf0"),  # cut off
    *(b"\xc0\xaf", b"\xe0\x80\xaf", b"\xf0\x80\x80\xaf", b"\xc1\xbf"),  # overlong
    *(b"\xed\xa0\x80", b"\xed\xbf\xbf", b"\xf4\x90\x80\x80", b"\xf5\x80\x80\x80"),  # surrogates, beyond the last one
]
MIXTURES = st.lists(st.sampled_from(PIECES) | st.binary(max_size=6), max_size=60).map(b"".join)
DATA = st.binary(max_size=300) | st.text(max_size=200).map(lambda s: s.encode("utf-8", "surrogatepass")) | MIXTURES
SMALL = st.lists(
    st.sampled_from([b"a", b"b", b"ab", b"ba", b"aa", b" ", "é".encode(), b"\xff", b"1"]), max_size=80
).map(b"".join)


def reference_learn(texts, merges=(), wanted=60):
    return o._MergeLearner(o.Tokenizer(merges), o._token_counts(texts)).learn(wanted)


def twin_learn(texts, merges=(), wanted=60):
    before = o.Tokenizer(merges)
    return twin.learn(texts, before.merges, before.vocabulary, wanted, o.TOKEN_MIN_COUNT, CLASSES)


def twin_encode(data, merges):
    return twin.Encoder(merges, CLASSES).encode(data).tolist()


def twin_segments(data):
    """The segments of the compiled scanner."""
    table, found = twin._Segments(CLASSES, 1 << 14, 1 << 18), []
    text, why = np.frombuffer(data, np.uint8), None
    while why != twin.DONE:
        why = table.cut(text, len(data))
        bounds = table.records[:, twin.TEXT]
        numbers = table.numbers[: table.state[twin.WRITTEN]]
        found += [table.text[bounds[i] : bounds[i + 1]].tobytes() for i in numbers]
        if why == twin.FULL:
            table.clear()
    return found


def reference_segments(data):
    return [s.encode("utf-8", "surrogateescape") for s in o.segments(data)]


@pytest.fixture(scope="session")
def learned(sample_text) -> o.Tokenizer:
    """300 merges of real text."""
    return o.Tokenizer(twin_learn([sample_text], wanted=300))


@pytest.fixture(params=["reference", "compiled"])
def either(request, monkeypatch):
    """Once by the readable form, once by its twin."""
    monkeypatch.setattr(o, "kernels_ready", lambda: request.param == "compiled")
    return request.param


# --- Segments. ---


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("The cat's 9 lives.", ["The", " cat", "'", "s", " 9", " lives", "."]),
        ("x == 10\n    return", ["x", " ==", " 10", "\n    return"]),
        ("Привет, мир", ["Привет", ",", " мир"]),
        ("na\u0131\u0308ve 漢字٣", ["na\u0131\u0308ve", " 漢字", "٣"]),  # a mark belongs to its letter
        (" " * 17 + "x", [" " * 16, " x"]),
        (" " * 16 + "x  ", [" " * 16 + "x", "  "]),
        ("y" * 70, ["y" * 32, "y" * 32, "y" * 6]),
        ("😀!", ["😀!"]),
        ("", []),
    ],
)
def test_text_is_cut_into_runs_of_one_class_with_the_space_before(text, wanted):
    assert o.segments(text.encode()) == wanted
    assert twin_segments(text.encode()) == [s.encode() for s in wanted]


def test_bytes_that_are_not_text_are_letters():
    assert reference_segments(b"a\xffb \xc3\x28") == [b"a\xffb", b" \xc3", b"\x28"]


@given(DATA)
def test_joined_segments_are_the_data(data):
    assert b"".join(reference_segments(data)) == data
    assert all(len(s) <= 4 * (o.SPACES_BEFORE + o.RUN_CHARACTERS) for s in reference_segments(data))


@given(DATA)
def test_both_cut_alike(data):
    assert twin_segments(data) == reference_segments(data)


def test_both_know_the_class_of_every_character():
    points = itertools.chain(range(0xD800), range(0xE000, 0x110000, 7))
    data = "".join("a" + chr(i) + "1" for i in points).encode()  # the neighbours show whether it is a letter or a digit
    assert twin_segments(data) == reference_segments(data)
    spaces = "".join(chr(i) + " " for i in range(0x3100) if i not in range(0xD800, 0xE000)).encode()
    assert twin_segments(spaces) == reference_segments(spaces)


def test_both_know_what_utf8_is():
    edges = [0x00, 0x41, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC1, 0xC2, 0xDF, 0xE0, 0xE1]
    edges += [0xEC, 0xED, 0xEE, 0xEF, 0xF0, 0xF1, 0xF3, 0xF4, 0xF5, 0xFF]
    leads, tails = [b for b in edges if b >= 0x80], [b for b in edges if b < 0xC1]
    sequences = [bytes(s) for s in itertools.product(leads, tails, tails, tails)]
    for between in (b"", b"1", b"="):
        data = between.join(sequences)
        assert twin_segments(data) == reference_segments(data)


def test_the_twin_has_the_same_constants():
    ours = (
        o.SPACES_BEFORE,
        o.RUN_CHARACTERS,
        o.LETTER,
        o.OTHER,
        o.SPACE,
        o.Tokenizer.BASE,
        o.TOKEN_WINDOW,
        o.TOKEN_DISTINCT,
    )
    its = (
        twin.SPACES_BEFORE,
        twin.RUN_CHARACTERS,
        twin.LETTER,
        twin.OTHER,
        twin.SPACE,
        twin.BASE,
        twin.WINDOW,
        twin.DISTINCT,
    )
    assert ours == its


# --- Encoding. ---


@given(DATA)
@example(b"")
def test_any_bytes_come_back(learned, data):
    ids = learned.encode(data)
    assert ids.dtype == np.int32
    assert learned.decode(ids) == data


def test_long_texts_come_back(either, learned, sample_text):
    data = sample_text + bytes(range(256)) * 50
    ids = o.Tokenizer(learned.merges).encode(data)
    assert ids.dtype == np.int32 and learned.decode(ids) == data
    assert len(ids) < len(data) / 2


@given(st.text(st.characters(), max_size=50))
@example("\ud800 half a pair")
@example("\udcff an escaped byte")
def test_text_is_encoded_as_its_utf8(text):
    assert BARE.decode(BARE.encode(text)) == o._token_bytes(text)
    assert BARE.encode("é").tolist() == list("é".encode())


def test_no_specials_come_of_text(learned):
    assert learned.encode("").size == 0
    assert not {BARE.BOS, BARE.EOS, BARE.PAD} & set(learned.encode("<s></s>\0" * 9).tolist())
    assert learned.decode([256, 104, 105, 257, 258]) == b"hi"


@given(DATA)
def test_both_encode_alike(learned, data):
    assert twin_encode(data, learned.merges) == learned._encode(data).tolist()


@given(SMALL, SMALL)
def test_both_encode_alike_by_merges_of_its_own(corpus, data):
    merges = reference_learn([corpus * 3])
    assert twin_encode(data, merges) == o.Tokenizer(merges)._encode(data).tolist()


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=30),
    st.lists(st.integers(97, 102), max_size=60),
)
def test_both_encode_alike_by_any_merges(picks, data):
    """Merges that no corpus would teach, with pairs twice and several tokens of the same bytes."""
    merges: list[tuple[int, int]] = []
    for picked in picks:
        choices = [*range(97, 103), *range(o.Tokenizer.BASE, o.Tokenizer.BASE + len(merges))]
        merges.append(tuple(choices[k % len(choices)] for k in picked))
    tokenizer = o.Tokenizer(merges)
    if max(map(len, tokenizer.vocabulary)) < 1000:
        assert twin_encode(bytes(data), merges) == tokenizer._encode(bytes(data)).tolist()


def test_a_full_cache_starts_afresh(monkeypatch, learned, sample_text):
    wanted = learned._encode(sample_text).tolist()
    for records, size, chunk in ((8, 1 << 20, 1 << 15), (1 << 16, 200, 1 << 15), (1 << 16, 1 << 20, 7), (64, 1024, 50)):
        monkeypatch.setattr(twin, "CACHED", records)
        monkeypatch.setattr(twin, "CACHED_BYTES", size)
        monkeypatch.setattr(twin, "CHUNK", chunk)
        encoder = twin.Encoder(learned.merges, CLASSES)
        assert encoder.encode(sample_text).tolist() == wanted
        assert encoder.encode(sample_text).tolist() == wanted


def test_threads_share_an_encoder(monkeypatch, learned, sample_text):
    monkeypatch.setattr(twin, "CACHED", 512)
    monkeypatch.setattr(twin, "CHUNK", 100)
    encoder = twin.Encoder(learned.merges, CLASSES)
    texts = [sample_text[i * 50_000 : (i + 1) * 50_000] for i in range(4)]
    found: dict[int, list] = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: encoder.encode(texts[i]).tolist()})) for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(4)] == [learned._encode(text).tolist() for text in texts]


def test_the_reference_encodes_by_windows(monkeypatch, learned, sample_text):
    monkeypatch.setattr(o, "kernels_ready", lambda: False)
    monkeypatch.setattr(o, "TOKEN_WINDOW", 5000)
    assert np.array_equal(o.Tokenizer(learned.merges).encode(sample_text), learned._encode(sample_text))


@pytest.mark.parametrize("unit", [b"a", b" ", b"=", b"\xff", "漢".encode(), "😀".encode(), b"ab", b"a "])
def test_hostile_text_costs_no_more_than_prose(learned, unit):
    """Work is bounded by the distinct segments, of which such a text has few, and a segment's by its length."""
    data = unit * ((1 << 20) // len(unit))
    encoder = twin.Encoder(learned.merges, CLASSES)
    ids = encoder.encode(data)
    assert encoder._segments.used <= 4
    assert o.Tokenizer().decode(ids[:0]) == b"" and learned.decode(ids) == data
    tokenizer = o.Tokenizer(learned.merges)
    assert np.array_equal(tokenizer._encode(data), ids) and len(tokenizer._cache) <= 4
    merges = twin_learn([data], wanted=60)
    assert merges == reference_learn([data], wanted=60)
    assert max(map(len, o.Tokenizer(merges).vocabulary)) <= 4 * (o.SPACES_BEFORE + o.RUN_CHARACTERS)


# --- Cutting. ---


@given(DATA, st.integers(0, 400), DATA)
def test_a_text_is_cut_where_a_segment_starts_whatever_follows(learned, data, near, more):
    cut = o.Tokenizer.boundary(data, near)
    ends = np.cumsum([len(s) for s in reference_segments(data)], dtype=int)
    certain = [int(e) for e in ends if e <= len(data) - 4]
    wanted = max((e for e in certain if e <= near), default=None) or min(certain, default=len(data))
    assert cut == wanted
    for whole in (data, data + more) if cut < len(data) else (data,):
        both = np.concatenate([learned._encode(data[:cut]), learned._encode(whole[cut:])])
        assert np.array_equal(both, learned._encode(whole))


@pytest.mark.parametrize("unit", [b"a", b" ", "é".encode(), "😀".encode(), b"\xff", b"ab 12 == "])
@pytest.mark.parametrize("near", [1, 100, 9_999, 10_000])
def test_long_runs_are_cut_too(unit, near):
    data = unit * (10_000 // len(unit))
    cut = o.Tokenizer.boundary(data, near)
    assert reference_segments(data[:cut]) + reference_segments(data[cut:]) == reference_segments(data)
    assert near - 192 < cut <= max(near, 192)


# --- Learning. ---


def test_the_most_frequent_pair_is_merged_first(either):
    tokenizer = o.Tokenizer()
    assert tokenizer.learn([b"abc abc abc abc xy xy xy xy xy"], 2) == 2
    assert tokenizer.vocabulary[259:] == [b" x", b" xy"]  # five times; ties go to the smaller bytes: b" x" before b"xy"


def test_ties_go_to_the_smaller_bytes(either):
    tokenizer = o.Tokenizer()
    tokenizer.learn([b"zb.zb.zb.zb.\nac\nac\nac\nac\nac"], 3)
    assert tokenizer.vocabulary[259:] == [b"\na", b"\nac", b"zb"]
    tokenizer = o.Tokenizer()
    tokenizer.learn([b"\xff\xfe,\x80\x81," * 4], 2)
    assert tokenizer.vocabulary[259:] == [b"\x80\x81", b"\xff\xfe"]


def test_rare_pairs_are_not_worth_a_token(either):
    tokenizer = o.Tokenizer()
    assert tokenizer.learn([b"ab,ab,ab,"], 10) == 0
    assert tokenizer.learn([b"ab,ab,ab,ab,"], 10) == 1
    assert tokenizer.learn([], 10) == tokenizer.learn([b"", b" "], 10) == tokenizer.learn([b"cd," * 9], 1) == 0


def test_no_two_tokens_have_the_same_bytes(either, sample_text):
    tokenizer = o.Tokenizer()
    tokenizer.learn([b"abc," * 9 + b"bc," * 20 + b"ab=" * 30 + b"bcd," * 4], 50)
    tokenizer.learn([sample_text], 200)
    words = [w for w in tokenizer.vocabulary if w]
    assert len(words) == len(set(words)) == 256 + len(tokenizer.merges)


def test_texts_are_asked_for_once(either):
    tokenizer = o.Tokenizer()
    assert tokenizer.learn(iter([b"ab," * 3, b"ab,"]), 5) == 1


def test_expansion_keeps_every_id(either, sample_text):
    tokenizer = o.Tokenizer()
    assert tokenizer.learn([sample_text[:50_000]], 80) == 80
    merges, vocabulary = list(tokenizer.merges), list(tokenizer.vocabulary)
    ids = tokenizer.encode(sample_text)
    assert tokenizer.learn([sample_text], 200) == 120
    assert tokenizer.merges[:80] == merges and tokenizer.vocabulary[: len(vocabulary)] == vocabulary
    assert tokenizer.decode(ids) == sample_text
    assert len(tokenizer.encode(sample_text)) < len(ids)
    assert len(tokenizer) == 259 + 200


@given(st.lists(SMALL, max_size=4), st.integers(1, 5))
def test_both_learn_alike(texts, times):
    texts = [text * times for text in texts]
    merges = reference_learn(texts)
    assert twin_learn(texts) == merges
    assert twin_learn(texts, merges[:3]) == merges[3:]  # learning goes on where it ended


@given(st.lists(MIXTURES, min_size=1, max_size=3))
def test_both_learn_alike_from_anything(texts):
    assert twin_learn(texts * 4) == reference_learn(texts * 4)


def test_both_learn_alike_from_real_text(sample_text):
    merges = reference_learn([sample_text], wanted=500)
    assert len(merges) == 500 and twin_learn([sample_text], wanted=500) == merges
    other = sample_text[::-1]
    assert twin_learn([other], merges[:100], 300) == reference_learn([other], merges[:100], 300)


def test_both_go_on_alike_from_merges_with_twice_the_same_bytes():
    merges = [(97, 98), (98, 99), (259, 99), (97, 260), (97, 98)]  # "abc" twice, and "ab" twice
    texts = [b"abc,abcabc,bc,bcd,abcd,abcd,abcd" * 4]
    assert twin_learn(texts, merges) == reference_learn(texts, merges)


def test_both_forget_alike(monkeypatch, sample_text):
    """Windows end at the same segments, and what was seen once by then is forgotten when there is too much."""
    whole = reference_learn([sample_text], wanted=100)
    for window, distinct in ((4096, 300), (10_000, 1500), (1 << 20, 100)):
        for module, prefix in ((o, "TOKEN_"), (twin, "")):
            monkeypatch.setattr(module, prefix + "WINDOW", window)
            monkeypatch.setattr(module, prefix + "DISTINCT", distinct)
        texts = [sample_text[:120_000], sample_text[120_000:]]
        table = twin._Segments(CLASSES, 16, 256)
        for text in texts:
            table.count(text)
        bounds = table.records[:, twin.TEXT]
        found = {
            table.text[bounds[i] : bounds[i + 1]].tobytes(): table.records[i, twin.TIMES] for i in range(table.used)
        }
        wanted = o._token_counts(texts)
        assert found == {s.encode("utf-8", "surrogateescape"): n for s, n in wanted.items()}
        assert len(wanted) < len(set(o.segments(sample_text)))
        merges = reference_learn(texts, wanted=100)
        assert twin_learn(texts, wanted=100) == merges and merges[:5] == whole[:5]


# --- Hugging Face's `tokenizers`, given the same merges and the same segments. ---


def byte_letters() -> list[str]:
    """The letter by which byte-level encoders write each byte (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(others)) for b in range(256)]


def test_hugging_face_gives_the_same_ids(learned, sample_text):
    tokenizers = pytest.importorskip("tokenizers")
    letters = byte_letters()
    spelled = ["".join(letters[b] for b in word) for word in learned.vocabulary]
    vocabulary = {word: i for i, word in enumerate(spelled) if word}
    theirs = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, [(spelled[a], spelled[b]) for a, b in learned.merges])
    )
    data = sample_text + b"".join(PIECES)
    for segment in sorted(set(reference_segments(data))):
        ids = theirs.encode("".join(letters[b] for b in segment)).ids
        assert ids == learned._encode(segment).tolist() == twin_encode(segment, learned.merges), segment


# --- State. ---


def test_state_comes_back_through_json(learned, sample_text):
    other = o.Tokenizer.from_state(json.loads(json.dumps(learned.state())))
    assert other.merges == learned.merges and other.vocabulary == learned.vocabulary
    assert np.array_equal(other.encode(sample_text[:9000]), learned.encode(sample_text[:9000]))


def test_a_newer_state_is_refused():
    with pytest.raises(o.OrganismError, match="format 99"):
        o.Tokenizer.from_state({"version": 99, "merges": []})


@pytest.mark.parametrize("pair", [(0, 259), (-1, 5), (256, 5), (5, 258)])
def test_merges_of_tokens_that_do_not_exist_are_refused(pair):
    with pytest.raises(o.OrganismError, match="cannot merge"):
        o.Tokenizer([pair])


# --- The policy. ---


def test_the_vocabulary_grows_slowly_then_by_the_doubling():
    points = o.growth_points(o.TokenizerConfig())
    assert list(points.items())[:4] == [(20_000, 128), (141_421, 256), (1_000_000, 384), (2_000_000, 512)]
    assert list(points.items())[-1] == (32_000_000, 1024)


def test_never_means_after_the_first_time():
    assert o.growth_points(o.TokenizerConfig(retrain="never")) == {20_000: 128}


@given(
    st.builds(
        o.TokenizerConfig,
        start_bytes=st.integers(1, 10**6),
        first_merges=st.integers(0, 2000),
        full_merges=st.integers(300, 2000),
        full_bytes=st.integers(1, 10**7),
        max_merges=st.integers(0, 3000),
        retrain=st.sampled_from(["double", "never"]),
    )
)
def test_wanted_merges_follow_the_points(config):
    points = o.growth_points(config)
    assert list(points) == sorted(points) and list(points.values()) == sorted(set(points.values()))
    assert all(0 < merges <= config.max_merges for merges in points.values())
    assert o.wanted_merges(config.start_bytes - 1, config) == 0
    before = 0
    for size, merges in points.items():
        assert o.wanted_merges(size - 1, config) == before
        assert o.wanted_merges(size, config) == merges
        before = merges
    assert o.wanted_merges(2 * max(points, default=0), config) == before
