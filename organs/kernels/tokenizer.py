"""The tokenizer, compiled: the twin of chapter 3's reference, which says the same in plain Python.

`Encoder` gives the ids of `Tokenizer._encode`, `learn` the merges of `_MergeLearner`, for any bytes. Both cut text by
one scanner over bytes and number the segments that they meet. The encoder finds each new segment's tokens once and
copies them from then on; its table starts afresh when it is full. The learner works on the distinct segments only: a
merge visits the places where its pair occurs, and a heap, put in order lazily, gives the next pair.

Arrays, with R segments, M merges, T tokens in the vocabulary, P pairs of tokens and N tokens in all R segments:

    segments  slots int32 [power of two] (by hash: 0, or 1 + the number of a segment), records int64 [R+1, 3] (of a
              segment: hash, where its bytes begin in the text, how often it was met; its bytes end where the next
              one's begin), text uint8, state int64 [4] (below), numbers int32 (the segments of the text last read, in
              order)
    tokens    places int64 [R+1] (where a segment's tokens begin), tokens int32 [N] (all of them, joined), keys int64
              [power of two] (left << 32 | right of a merge, or -1), ranks int32 [power of two] (of the same merge)
    learning  nodes int32 [N, 5] (of a token in a segment: token, node before and node after it in the segment or -1,
              pair that begins here or -1, segment), counts int64 [R], pairs int64 [P, 5] (left token, right token,
              how often it occurs, how often it did when it was last put in order, first link), links int32 [3N, 2] (a
              node where the pair began when it was linked, next link or -1), sides int32 [2, T] (scratch, all -1: the
              pair that the token at work makes with each token after it, before it), heap int64 [P] (pairs, the next
              to merge first), words uint8 and starts int64 [T+1] (bytes of the vocabulary, joined, and where each
              token's begin)
"""

import secrets
import threading
from collections.abc import Iterable, Sequence

import numpy as np

from organs.kernels.calls import entry
from organs.kernels.ground import jit

u64 = np.uint64
compiled = entry()
called = jit(no_cfunc_wrapper=True, no_cpython_wrapper=True)
inlined = jit(forceinline=True, no_cfunc_wrapper=True, no_cpython_wrapper=True)

# What chapter 3 says; tests/test_tokenizer.py compares them.
SPACES_BEFORE, RUN_CHARACTERS = 16, 32
LETTER, OTHER, SPACE = 0, 2, 3
BASE = 259
WINDOW, DISTINCT = 1 << 20, 1_000_000

SEGMENT_BYTES = 4 * (SPACES_BEFORE + RUN_CHARACTERS)  # no segment is longer
CACHED, CACHED_BYTES = 1 << 16, 1 << 20  # records and bytes that an encoder remembers
CHUNK = 1 << 15  # segments that are encoded before another thread may use the encoder
PRIME = u64(0x100000001B3)
SEED = secrets.randbits(63)  # so that nobody can write a text in which all segments share one slot
NEVER = np.int32(0x7FFFFFFF)  # the rank of a pair that does not merge

HASH, TEXT, TIMES = range(3)  # columns of records
AT, USED, START, WRITTEN = range(4)  # state: position in the data, records, where the window began, numbers written
DONE, FULL, MORE = range(3)  # why `cut` stopped
TOKEN, BEFORE, AFTER, PAIR, SEGMENT = range(5)  # columns of nodes
LEFT, RIGHT, COUNT, QUEUED, HEAD = range(5)  # columns of pairs
PAIRS, LINKS, QUEUE = range(3)  # state of learning: how many there are of each


# --- Segments. ---


@called
def _wide(data, at, classes):
    """Bytes and class of a character that is not ASCII, as 4 * bytes + class. A byte that is no UTF-8 is a letter.

    Python escapes every byte of a malformed sequence by itself, so it does not matter how long the sequence is.
    """
    lead, more, code, least = data[at], 0, 0, 0
    if 0xC2 <= lead < 0xE0:
        more, code, least = 1, lead & 0x1F, 0x80
    elif 0xE0 <= lead < 0xF0:
        more, code, least = 2, lead & 0x0F, 0x800
    elif 0xF0 <= lead < 0xF5:
        more, code, least = 3, lead & 0x07, 0x10000
    if more == 0 or at + more >= len(data):
        return 4 + LETTER
    for k in range(1, more + 1):
        byte = np.int64(data[at + k])
        if byte & 0xC0 != 0x80:
            return 4 + LETTER
        code = code << 6 | byte & 0x3F
    if code < least or 0xD800 <= code < 0xE000 or code > 0x10FFFF:
        return 4 + LETTER
    return 4 * (more + 1) + (np.int64(classes[code]) if code < len(classes) else OTHER)


@inlined
def _segment(data, at, classes, seed):
    """Where the segment that starts here ends, and its hash: white space, then a run of one class, both capped."""
    hashed, spaces, run, kind = seed, 0, 0, np.int64(SPACE)
    while at < len(data):
        byte, size = data[at], 1
        if byte < 128:
            here = np.int64(classes[byte])
        else:
            wide = _wide(data, at, classes)
            size, here = wide >> 2, wide & 3
        if here == SPACE:
            if run > 0 or spaces == SPACES_BEFORE:
                break
            spaces += 1
        else:
            if run > 0 and (here != kind or run == RUN_CHARACTERS):
                break
            kind = here
            run += 1
        hashed = (hashed ^ u64(byte)) * PRIME
        for k in range(at + 1, at + size):
            hashed = (hashed ^ u64(data[k])) * PRIME
        at += size
    return at, np.int64((hashed ^ (hashed >> u64(32))) >> u64(1))


@inlined
def _find(slots, records, text, data, begin, end, hashed):
    """The slot of segment data[begin:end], or the empty one where it belongs."""
    slot = hashed & (len(slots) - 1)
    while slots[slot] != 0:
        record = np.int64(slots[slot]) - 1
        first = records[record, TEXT]
        if records[record, HASH] == hashed and records[record + 1, TEXT] - first == end - begin:
            same = 0
            while same < end - begin and text[first + same] == data[begin + same]:
                same += 1
            if same == end - begin:
                break
        slot = (slot + 1) & (len(slots) - 1)
    return slot


@compiled
def cut(data, stop, classes, seed, slots, records, text, state, numbers):
    """Cut data from state[AT] on into the segments that end by `stop`, but at least one after state[START].

    Writes the record of each to numbers, int32 [any], and counts it. Returns DONE, or FULL where there was no room for
    one more record or the bytes of one, or MORE when `numbers` is full: then call again.
    """
    seed, at, used, written, why = u64(seed), state[AT], state[USED], 0, DONE
    while at < len(data):
        if used + 2 >= len(records) or records[used, TEXT] + SEGMENT_BYTES > len(text):
            why = FULL
            break
        if written == len(numbers):
            why = MORE
            break
        end, hashed = _segment(data, at, classes, seed)
        if end > stop and at > state[START]:
            break
        slot = _find(slots, records, text, data, at, end, hashed)
        if slots[slot] == 0:
            first = records[used, TEXT]
            for k in range(end - at):
                text[first + k] = data[at + k]
            records[used, HASH], records[used, TIMES], records[used + 1, TEXT] = hashed, 0, first + end - at
            used += 1
            slots[slot] = used
        numbers[written] = slots[slot] - 1
        records[numbers[written], TIMES] += 1
        written += 1
        at = end
    state[AT], state[USED], state[WRITTEN] = at, used, written
    return why


@compiled
def index(slots, records, used):
    """Fill empty slots with the first `used` records, all of them different."""
    for record in range(used):
        slot = records[record, HASH] & (len(slots) - 1)
        while slots[slot] != 0:
            slot = (slot + 1) & (len(slots) - 1)
        slots[slot] = record + 1


class _Segments:
    """The table of segments, with room for so many records and bytes at first."""

    def __init__(self, character_classes: np.ndarray, records: int, text_bytes: int):
        self.classes, self.state = character_classes, np.zeros(4, np.int64)
        self.slots, self.records = np.zeros(2 * records, np.int32), np.zeros((records, 3), np.int64)
        self.text, self.numbers = np.empty(text_bytes, np.uint8), np.empty(CHUNK, np.int32)

    @property
    def used(self) -> int:
        return int(self.state[USED])

    def cut(self, data: np.ndarray, stop: int) -> int:
        """As the function `cut`; the numbers are in self.numbers, how many is in self.state[WRITTEN]."""
        return cut(data, stop, self.classes, SEED, self.slots, self.records, self.text, self.state, self.numbers)

    def count(self, text: bytes) -> None:
        """Count a text's segments by windows, as the reference does: a window is cut where a segment starts."""
        data, state = np.frombuffer(bytes(text), np.uint8), self.state
        start = 0
        while start < len(data):
            stop = len(data) if len(data) - start <= WINDOW else start + WINDOW - 4
            state[START] = state[AT] = start
            while (why := self.cut(data, stop)) != DONE:
                if why == FULL:
                    self._grow()
            start = int(state[AT])
            if self.used > DISTINCT:
                self._forget()

    def _grow(self) -> None:
        if self.used + 2 >= len(self.records):  # as in `cut`
            self.records = np.concatenate([self.records, np.zeros_like(self.records)])
            self.slots = np.zeros(2 * len(self.slots), np.int32)
            index(self.slots, self.records, self.used)
        if self.records[self.used, TEXT] + SEGMENT_BYTES > len(self.text):
            self.text = np.concatenate([self.text, np.empty_like(self.text)])

    def _forget(self) -> None:
        """Drop the segments seen once."""
        old, sizes = self.records[: self.used].copy(), np.diff(self.records[: self.used + 1, TEXT])
        often = old[:, TIMES] > 1
        kept, kept_text = old[often], self.text[: sizes.sum()][np.repeat(often, sizes)]
        kept[:, TEXT] = np.cumsum(sizes[often]) - sizes[often]
        self.text[: len(kept_text)], self.records[: len(kept)] = kept_text, kept
        self.records[len(kept), TEXT] = len(kept_text)
        self.state[USED] = len(kept)
        self.slots[:] = 0
        index(self.slots, self.records, len(kept))

    def clear(self) -> None:
        """Forget everything."""
        self.slots[:] = self.state[USED] = 0


# --- Encoding. ---


@inlined
def _pair_slot(key, slots):
    return np.int64((u64(key) * u64(0x9E3779B97F4A7C15)) >> u64(36)) & (slots - 1)


@inlined
def _rank(keys, ranks, left, right):
    key = np.int64(left) << 32 | np.int64(right)
    slot = _pair_slot(key, len(keys))
    while keys[slot] != -1:
        if keys[slot] == key:
            return ranks[slot]
        slot = (slot + 1) & (len(keys) - 1)
    return NEVER


@compiled
def index_merges(merges, keys, ranks):
    """Fill empty keys (-1) and their ranks; merges int64 [M, 2]. Where a pair is there twice, the last one counts."""
    for rank in range(len(merges)):
        key = merges[rank, 0] << 32 | merges[rank, 1]
        slot = _pair_slot(key, len(keys))
        while keys[slot] != -1 and keys[slot] != key:
            slot = (slot + 1) & (len(keys) - 1)
        keys[slot], ranks[slot] = key, rank


@called
def _merge_tokens(tokens, begin, count, keys, ranks, scratch):
    """Apply the merges to tokens[begin : begin + count], in place: the lowest rank first; returns how many remain.

    One at a time from the left is everywhere at once: what a merge makes has only higher ranks.
    """
    for i in range(count - 1):
        scratch[i] = _rank(keys, ranks, tokens[begin + i], tokens[begin + i + 1])
    while count > 1:
        best, lowest = 0, NEVER
        for i in range(count - 1):
            if scratch[i] < lowest:
                best, lowest = i, scratch[i]
        if lowest == NEVER:
            break
        count -= 1
        tokens[begin + best] = BASE + lowest
        for i in range(best + 1, count):
            tokens[begin + i] = tokens[begin + i + 1]
        for i in range(best + 1, count - 1):
            scratch[i] = scratch[i + 1]
        if best > 0:
            scratch[best - 1] = _rank(keys, ranks, tokens[begin + best - 1], tokens[begin + best])
        if best < count - 1:
            scratch[best] = _rank(keys, ranks, tokens[begin + best], tokens[begin + best + 1])
    return count


@compiled
def tokenize(records, first, used, text, keys, ranks, places, tokens, scratch):
    """Find the tokens of records first…used - 1, and write them behind those of the records before.

    scratch int32 [SEGMENT_BYTES].
    """
    for record in range(first, used):
        at, begin = places[record], records[record, TEXT]
        size = records[record + 1, TEXT] - begin
        for k in range(size):
            tokens[at + k] = text[begin + k]
        places[record + 1] = at + _merge_tokens(tokens, at, size, keys, ranks, scratch)


@compiled
def emit(numbers, size, places, tokens, out):
    """Write the tokens of the first `size` of the numbered segments to `out`, int32; returns how many."""
    written = 0
    for i in range(size):
        for k in range(places[numbers[i]], places[numbers[i] + 1]):
            out[written] = tokens[k]
            written += 1
    return written


class Encoder:
    """Bytes -> ids for fixed merges [(left, right)]; classes uint8 [CLASSES_END]. Threads may share one."""

    def __init__(self, merges: Sequence[tuple[int, int]], character_classes: np.ndarray):
        self._merges = _merge_table(merges)
        self._segments = _Segments(character_classes, CACHED, CACHED_BYTES)
        self._places, self._tokens = np.zeros(CACHED + 1, np.int64), np.empty(CACHED_BYTES, np.int32)
        self._out = np.empty(CHUNK * SEGMENT_BYTES, np.int32)  # memory that is never written costs nothing
        self._scratch, self._lock = np.empty(SEGMENT_BYTES, np.int32), threading.Lock()

    def encode(self, data: bytes) -> np.ndarray:
        """The tokens of a text, int32 [tokens]."""
        text, at, pieces = np.frombuffer(bytes(data), np.uint8), 0, []
        while at < len(text):
            with self._lock:  # the table is common to all threads, and free between chunks
                piece, at = self._chunk(text, at)
            pieces.append(piece)
        return np.concatenate(pieces) if pieces else np.empty(0, np.int32)

    def _chunk(self, text: np.ndarray, at: int) -> tuple[np.ndarray, int]:
        """Tokens of the next segments, and where they end."""
        segments, known = self._segments, self._segments.used
        segments.state[AT] = at
        why, end = segments.cut(text, len(text)), int(segments.state[AT])
        new = segments.records, known, segments.used, segments.text
        tokenize(*new, *self._merges, self._places, self._tokens, self._scratch)
        written = emit(segments.numbers, int(segments.state[WRITTEN]), self._places, self._tokens, self._out)
        if why == FULL:  # begin again; what is frequent will soon be back
            segments.clear()
        return self._out[:written].copy(), end


def _merge_table(merges: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    size = 1 << (4 * len(merges) + 1).bit_length()
    keys, ranks = np.full(size, -1, np.int64), np.zeros(size, np.int32)
    index_merges(np.array(merges, np.int64).reshape(-1, 2), keys, ranks)
    return keys, ranks


# --- Learning merges. ---


@compiled
def find_pairs(tokens, places, nodes, counts, pairs, links, sides, heads, heap, words, starts, least, state):
    """Make a node of every token, count the pairs, and queue those that occur `least` times.

    tokens, places: as in `tokenize`. heads int32 [T]: scratch, all -1.
    """
    for segment in range(len(counts) - 1, -1, -1):
        for at in range(places[segment + 1] - 1, places[segment] - 1, -1):
            nodes[at, TOKEN], nodes[at, SEGMENT], nodes[at, PAIR] = tokens[at], segment, -1
            nodes[at, BEFORE] = at - 1 if at > places[segment] else -1
            nodes[at, AFTER] = at + 1 if at + 1 < places[segment + 1] else -1
            if nodes[at, AFTER] >= 0:  # chain the nodes by token: `sides` tells the pairs of one token apart
                nodes[at, PAIR] = heads[tokens[at]]
                heads[tokens[at]] = at
    for token in range(len(heads)):
        at, first = np.int64(heads[token]), state[PAIRS]
        while at >= 0:
            following = np.int64(nodes[at, PAIR])
            _link(nodes, counts, pairs, links, sides, state, at, token, np.int64(nodes[nodes[at, AFTER], TOKEN]), token)
            at = following
        _queue(pairs, sides, heap, words, starts, least, state, first)


@inlined
def _link(nodes, counts, pairs, links, sides, state, at, left, right, token):
    """A pair begins at this node, with `token` on one of its sides or both: count it there."""
    side, other = (0, right) if left == token else (1, left)
    pair = np.int64(sides[side, other])
    if pair < 0:
        pair = state[PAIRS]
        state[PAIRS] += 1
        sides[side, other] = pair
        pairs[pair, LEFT], pairs[pair, RIGHT], pairs[pair, COUNT], pairs[pair, HEAD] = left, right, 0, -1
    link = state[LINKS]
    state[LINKS] += 1
    links[link, 0], links[link, 1] = at, pairs[pair, HEAD]
    pairs[pair, HEAD], nodes[at, PAIR] = link, pair
    pairs[pair, COUNT] += counts[nodes[at, SEGMENT]]


@called
def _queue(pairs, sides, heap, words, starts, least, state, first):
    """Clear `sides` of the pairs from `first` on and queue the frequent ones: from here on their counts only fall."""
    for pair in range(first, state[PAIRS]):
        sides[0, pairs[pair, RIGHT]] = -1
        sides[1, pairs[pair, LEFT]] = -1
        if pairs[pair, COUNT] < least:
            continue
        pairs[pair, QUEUED] = pairs[pair, COUNT]
        at = state[QUEUE]
        state[QUEUE] += 1
        while at > 0 and _sooner(pairs, words, starts, pair, heap[(at - 1) >> 1]):
            heap[at] = heap[(at - 1) >> 1]
            at = (at - 1) >> 1
        heap[at] = pair


@called
def _sooner(pairs, words, starts, one, two):
    """Does pair `one` come before `two`? By count, then the bytes of the left token and the right one, then ids."""
    if pairs[one, QUEUED] != pairs[two, QUEUED]:
        return pairs[one, QUEUED] > pairs[two, QUEUED]
    for side in range(2):
        a, b = pairs[one, side], pairs[two, side]
        if a != b:
            at, other = starts[a], starts[b]
            while at < starts[a + 1] and other < starts[b + 1] and words[at] == words[other]:
                at += 1
                other += 1
            if at == starts[a + 1] or other == starts[b + 1]:
                if at < starts[a + 1] or other < starts[b + 1]:
                    return at == starts[a + 1]  # one begins the other
            else:
                return words[at] < words[other]
    if pairs[one, LEFT] != pairs[two, LEFT]:
        return pairs[one, LEFT] < pairs[two, LEFT]
    return pairs[one, RIGHT] < pairs[two, RIGHT]


@compiled
def next_pair(pairs, heap, words, starts, least, state):
    """Take the most frequent pair out of the heap; -1 if none occurs `least` times.

    Counts fall while pairs wait: the first one is put in order until it is where it belongs.
    """
    while state[QUEUE] > 0:
        top = heap[0]
        taken = pairs[top, QUEUED] == pairs[top, COUNT]
        if taken or pairs[top, COUNT] < least:  # it leaves: the last one sinks from its place
            state[QUEUE] -= 1
            moved = heap[state[QUEUE]]
        else:
            pairs[top, QUEUED] = pairs[top, COUNT]
            moved = top
        at, child, size = 0, 1, state[QUEUE]
        while child < size:
            if child + 1 < size and _sooner(pairs, words, starts, heap[child + 1], heap[child]):
                child += 1
            if not _sooner(pairs, words, starts, heap[child], moved):
                break
            heap[at] = heap[child]
            at, child = child, 2 * child + 1
        heap[at] = moved
        if taken:
            return top
    return np.int64(-1)


@compiled
def merge(nodes, counts, pairs, links, sides, heap, words, starts, least, state, pair, token):
    """Replace every occurrence of the pair by the token, from left to right, and queue the pairs which that makes."""
    first, link = state[PAIRS], pairs[pair, HEAD]
    while link >= 0:
        at = np.int64(links[link, 0])
        link = np.int64(links[link, 1])
        if nodes[at, PAIR] != pair:  # it began here once
            continue
        while nodes[at, BEFORE] >= 0 and nodes[nodes[at, BEFORE], PAIR] == pair:  # "aaa" is merged from its left end
            at = np.int64(nodes[at, BEFORE])
        while at >= 0 and nodes[at, PAIR] == pair:
            gone, before, times = np.int64(nodes[at, AFTER]), np.int64(nodes[at, BEFORE]), counts[nodes[at, SEGMENT]]
            after = np.int64(nodes[gone, AFTER])
            pairs[pair, COUNT] -= times
            nodes[at, TOKEN], nodes[at, AFTER], nodes[at, PAIR] = token, after, -1
            if before >= 0:
                pairs[nodes[before, PAIR], COUNT] -= times
                _link(nodes, counts, pairs, links, sides, state, before, np.int64(nodes[before, TOKEN]), token, token)
            if after >= 0:
                pairs[nodes[gone, PAIR], COUNT] -= times
                nodes[after, BEFORE] = at
                _link(nodes, counts, pairs, links, sides, state, at, token, np.int64(nodes[after, TOKEN]), token)
            nodes[gone, PAIR] = -1
            at = after
    _queue(pairs, sides, heap, words, starts, least, state, first)


def learn(
    texts: Iterable[bytes],
    merges: Sequence[tuple[int, int]],
    vocabulary: Sequence[bytes],
    wanted: int,
    min_count: int,
    character_classes: np.ndarray,
) -> list[tuple[int, int]]:
    """The merges that follow `merges`, up to `wanted` in all; `vocabulary` holds the bytes of every token so far."""
    segments = _Segments(character_classes, 1 << 14, 1 << 18)
    for text in texts:
        segments.count(text)
    counts = segments.records[: segments.used, TIMES].copy()
    places, tokens = np.zeros(len(counts) + 1, np.int64), np.empty(segments.records[segments.used, TEXT], np.int32)
    scratch = np.empty(SEGMENT_BYTES, np.int32)
    tokenize(segments.records, 0, segments.used, segments.text, *_merge_table(merges), places, tokens, scratch)
    del segments

    base, most = len(vocabulary), len(vocabulary) + wanted - len(merges)
    words, starts = _joined(vocabulary, most)
    heads, sides = np.full(base, -1, np.int32), np.full((2, most), -1, np.int32)
    size = int(places[-1])  # arrays are as long as can be; memory that is not written costs nothing
    nodes, links, state = np.empty((size, 5), np.int32), np.empty((3 * size, 2), np.int32), np.zeros(3, np.int64)
    room = min(size, base * base) + 2 * most
    pairs, heap = np.empty((room, 5), np.int64), np.empty(room, np.int64)
    find_pairs(tokens, places, nodes, counts, pairs, links, sides, heads, heap, words, starts, min_count, state)

    learned: list[tuple[int, int]] = []
    known = set(vocabulary)
    bytes_of = list(vocabulary)
    while len(bytes_of) < most and (pair := next_pair(pairs, heap, words, starts, min_count, state)) >= 0:
        left, right = int(pairs[pair, LEFT]), int(pairs[pair, RIGHT])
        word, token = bytes_of[left] + bytes_of[right], len(bytes_of)
        if word in known:
            continue
        known.add(word)
        bytes_of.append(word)
        learned.append((left, right))
        starts[token + 1] = starts[token] + len(word)
        words[starts[token] : starts[token + 1]] = np.frombuffer(word, np.uint8)
        if state[PAIRS] + 2 * most > len(pairs):  # a token makes at most two pairs with every other
            pairs, heap = np.concatenate([pairs, np.empty_like(pairs)]), np.concatenate([heap, np.empty_like(heap)])
        merge(nodes, counts, pairs, links, sides, heap, words, starts, min_count, state, pair, token)
    return learned


def _joined(vocabulary: Sequence[bytes], most: int) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of all tokens and where each begins, with room for `most` tokens."""
    starts = np.zeros(most + 1, np.int64)
    starts[1 : len(vocabulary) + 1] = np.cumsum([len(word) for word in vocabulary])
    words = np.empty(int(starts[len(vocabulary)]) + (most - len(vocabulary)) * SEGMENT_BYTES, np.uint8)
    words[: starts[len(vocabulary)]] = np.frombuffer(b"".join(vocabulary), np.uint8)
    return words, starts


def warm() -> None:
    """Compile everything, by a first use."""
    classes = np.full(128, LETTER, np.uint8)
    vocabulary = [bytes([i]) for i in range(256)] + [b""] * 3
    learn([b"abab", "ä".encode()], [], vocabulary, 1, 1, classes)
    index(np.zeros(2, np.int32), np.zeros((1, 3), np.int64), 0)
    Encoder([(97, 98)], classes).encode(b"abab")
