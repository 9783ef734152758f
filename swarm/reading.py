"""Reading byte by byte: the distribution of the next byte, whatever the tokenizer, so that organisms can be mixed.

An organism predicts tokens. The probability of the bytes so far is the sum over all ways to write them as tokens, the last of
which may reach beyond them:

    P(b₁…bₙ) = Σ over t₁…tₖ:  t₁…tₖ₋₁ end within b₁…bₙ, and t₁…tₖ begins with b₁…bₙ, of Π p(tᵢ | t₁…tᵢ₋₁)

`ByteReader` keeps the ways that matter as *paths*: a state after t₁…tₖ₋₁, the bytes since, and the weight Π p. The next byte's
probability is the weight that goes on with it, over the weight that goes on at all. Ways whose tokens end at the same byte go on as
one, so there is a path for each byte where the token under way may have begun. Paths below a share of the heaviest are dropped, but
never the one whose token has just ended, which alone expects every byte; no state is computed before its path is kept. What was
dropped is made up for by a trace of the uniform distribution; where a byte comes that no path expected, reading goes on from the
last state that ended with its bytes.

An organism whose field has several domains reads each text with the one that it belongs to. Where bytes are known ahead, as of a
question, they tell. Else nobody can tell at the beginning, so the reader looks back after some bytes, and more and more rarely.
"""

from __future__ import annotations

import base64
import bisect
import dataclasses
import functools
import math
from dataclasses import dataclass

import numpy as np

from organism import CooccurField, Decoder, Field, Organism, Snapshot, Tokenizer

END = 256  # the symbol after the last byte
SYMBOLS = 257
TRACE = 1e-4  # of the uniform distribution: 0.00014 bits a byte
PATHS = 16  # that are followed at most
LOOKS = (32, 96, 224, 480)  # bytes after which it looks back, whose text this is; then every RECENT bytes
RECENT = 1024  # bytes that it looks back at, at most
SHARE = 1e-3  # of the heaviest path's weight, below which one is dropped: at most 0.0015 bits of what comes after


class Lexicon:
    """A vocabulary in the order of its bytes: the tokens that begin with a prefix are one range of it."""

    def __init__(self, vocabulary: list[bytes]):
        words = sorted((word, token) for token, word in enumerate(vocabulary) if word)
        self.words = [word for word, _ in words]
        self.order = np.array([token for _, token in words], np.int64)  # [W]: tokens by their bytes
        self.prefix = functools.lru_cache(4096)(self._prefix)

    def _prefix(self, prefix: bytes) -> tuple[int | None, np.ndarray]:
        """Where the prefix itself is a token (None: it is none), and int64 [257], where the words that go on with each byte
        begin and, last, where they end."""
        low = bisect.bisect_left(self.words, prefix)
        exact = low if low < len(self.words) and self.words[low] == prefix else None
        edges = [bisect.bisect_left(self.words, prefix + bytes([byte]), low) for byte in range(256)]
        over = prefix.rstrip(b"\xff")  # the least of all that are greater than whatever begins with the prefix
        beyond = bisect.bisect_left(self.words, over[:-1] + bytes([over[-1] + 1]), low) if over else len(self.words)
        return exact, np.array([*edges, beyond], np.int64)


@dataclass
class State:
    """What an organism knows after some tokens; `sums` float64 [W + 1] of its next token's distribution in the lexicon's
    order, and `end`, the probability that the text is over."""

    field: Field | CooccurField
    decoder: Decoder | None
    sums: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(1))
    end: float = 0.0


@dataclass
class Path:
    """A way to write the bytes so far: `token` is still to be read into a copy of `state`, where it is not None."""

    state: State
    weight: float
    rest: bytes = b""
    token: int | None = None


class ByteReader:
    """One organism's next byte, after a prefix (none: a new line). It reads what is published, frozen. `ahead`: bytes that are known
    to come, by which the domain is chosen. share=0: nothing is joined or dropped, but what exceeds `paths`.

    next() -> float64 [257]: 256 bytes and the end, none of them 0; advance(bytes) moves past some.
    """

    _recent = b""  # the last bytes, with the prefix
    _count, _ahead = 0, 0  # bytes that it has moved past, and that were known ahead

    def __init__(self, snapshot: Snapshot, prefix: bytes = b"", paths: int = PATHS, share: float = SHARE,
                 ahead: bytes = b""):  # fmt: skip
        self.snapshot, self.paths, self.share = snapshot, paths, share
        self.lexicon = lexicon_of(tuple(snapshot.tokenizer.vocabulary))
        self._free: list[Decoder] = []
        self._busy: list[Decoder] = []
        tokens, known = (snapshot.tokenizer.encode(text or b"\n") for text in (prefix, prefix + ahead))
        self._anchor, self._since, self._ahead = self._begin(tokens, known), b"", len(ahead)
        self._recent = prefix[-RECENT:]
        self._paths = [Path(self._anchor, 1.0)]
        self._next: np.ndarray | None = None

    @classmethod
    def of(cls, life: Organism, prefix: bytes = b"", ahead: bytes = b"") -> ByteReader:
        return cls(life.published, prefix, ahead=ahead)

    # The states of an organism.

    def _begin(self, tokens: np.ndarray, known: np.ndarray) -> State:
        """After a prefix, which is read as the tokens that it is usually written with, by the domain of what is known."""
        snap, late = self.snapshot, tokens[-self.snapshot.body.context :]
        reader = snap.field.reader()
        reader.route(known, may_divide=False)
        reader.read(tokens[: len(tokens) - len(late)], learn=False)
        _, views = reader.read(late, views=True, learn=False)
        if not snap.body.steps or views is None:  # a body that has learned nothing is the field
            return self._known(State(reader, None))
        decoder = self._decoder()
        for i, token in enumerate(late[:-1].tolist()):  # beside a token goes the view of the next
            decoder.feed(token, views[i + 1 : i + 2])
        return self._known(State(reader, decoder), int(late[-1]))

    def _decoder(self) -> Decoder:
        decoder = self._free.pop() if self._free else Decoder(
            self.snapshot.body, executor="numba" if self.snapshot.compiled else "numpy")  # fmt: skip
        decoder.reset()
        self._busy.append(decoder)
        return decoder

    def _known(self, state: State, last: int | None = None) -> State:
        """The same state with its next token's distribution; `last` is still to be fed to the body."""
        snap = self.snapshot
        if state.decoder is None or last is None:
            p = state.field.dense()
        else:
            view = state.field.view()
            logits = state.decoder.feed(last, view).astype(np.float64)
            p = np.exp(logits - logits.max())
            g = float(snap.gate.share(view.scalars[0, 0], state.field.domain))
            p = (
                g * p / p.sum() + (1 - g) * state.field.dense()
            )  # as `Learner.predict` has it: the whole field, not its view
        state.end = float(p[Tokenizer.EOS])
        state.sums = np.concatenate([[0.0], np.cumsum(p[self.lexicon.order])])
        return state

    def _after(self, state: State, token: int) -> State:
        """The state after one more token; the one before stays as it is."""
        reader = state.field.reader()
        reader.observe(token)
        if state.decoder is None:
            return self._known(State(reader, None))
        decoder = self._decoder()
        decoder.cache[:], decoder.position = state.decoder.cache, state.decoder.position
        return self._known(State(reader, decoder), token)

    # Bytes.

    def next(self) -> np.ndarray:
        """float64 [257]: the distribution of the next byte, or the end."""
        known = self._next
        if known is None:
            total = np.zeros(SYMBOLS)
            for path in self._paths:
                _, edges = self.lexicon.prefix(path.rest)
                total[:256] += path.weight * np.diff(path.state.sums[edges])
                if not path.rest:
                    total[END] += path.weight * path.state.end
            known = self._next = (1 - TRACE) * np.maximum(total, 0) / total.sum() + TRACE / SYMBOLS
        return known

    def advance(self, data: bytes) -> None:
        """Move past some bytes."""
        for byte in data:
            self._advance(bytes([byte]))
            self._recent, self._count = (self._recent + bytes([byte]))[-RECENT:], self._count + 1
            if self._count > self._ahead and (self._count in LOOKS or self._count % RECENT == 0):
                self._look_back()

    def _look_back(self) -> None:
        """Begin anew with the last bytes where they cost another domain of the field less than the one that reads them."""
        field = self._anchor.field
        if len(getattr(field, "resting", ())) < 2:
            return
        tokens = self.snapshot.tokenizer.encode(self._recent)
        if field.reader().route(tokens[-Field.LOOK :], may_divide=False) != field.domain:
            self._anchor, self._since, self._next = self._begin(tokens, tokens), b"", None
            self._paths = [Path(self._anchor, 1.0)]
            self._recycle()

    def _advance(self, byte: bytes) -> None:
        self._next, self._since = None, self._since + byte
        paths: list[Path] = []
        for path in self._paths:
            rest = path.rest + byte
            exact, edges = self.lexicon.prefix(rest)
            sums = path.state.sums
            if exact is not None:
                weight = path.weight * float(sums[exact + 1] - sums[exact])
                paths.append(Path(path.state, weight, b"", int(self.lexicon.order[exact])))
            if float(sums[edges[-1]] - sums[edges[0]]) > 0:
                paths.append(Path(path.state, path.weight, rest))
        self._paths = self._kept(paths) or [self._again()]
        whole = next((path for path in self._paths if not path.rest), None)
        if whole is not None:
            self._anchor, self._since = whole.state, b""
        self._recycle()

    def _again(self) -> Path:
        """The bytes since the last state that ended with its bytes, as the tokens that they are usually written with."""
        state = self._anchor
        for token in self.snapshot.tokenizer.encode(self._since).tolist():
            state = self._after(state, token)
        return Path(state, 1.0)

    def _mass(self, path: Path) -> float:
        """The weight with which a path goes on."""
        if path.token is not None or not path.rest:
            return path.weight
        _, edges = self.lexicon.prefix(path.rest)
        return path.weight * float(path.state.sums[edges[-1]] - path.state.sums[edges[0]])

    def _kept(self, paths: list[Path]) -> list[Path]:
        """The heaviest, weights scaled so that the best is 1; states that are needed now are computed."""
        paths = self._joined(paths) if self.share else paths
        masses = [self._mass(path) for path in paths]
        if not (most := max(masses, default=0.0)) > 0:
            return []
        ranked = sorted(zip(masses, range(len(paths))), reverse=True)
        kept = [paths[at] for mass, at in ranked[: self.paths] if mass >= self.share * most]
        if self.share and all(path.rest for path in kept):  # only where a token has just ended can every byte follow
            kept += [path for path in paths if not path.rest]
        return [
            Path(self._after(p.state, p.token) if p.token is not None else p.state, p.weight / most, p.rest)
            for p in kept
        ]

    @staticmethod
    def _joined(paths: list[Path]) -> list[Path]:
        """Those whose tokens end here, as one with the weight of all: the same bytes came before, so that what follows
        depends little on how they were written. The heaviest knows it best."""
        ended = [path for path in paths if not path.rest]
        if len(ended) < 2:
            return paths
        best = max(ended, key=lambda path: path.weight)
        whole = dataclasses.replace(best, weight=sum(path.weight for path in ended))
        return [whole, *(path for path in paths if path.rest)]

    def _recycle(self) -> None:
        """Decoders of states that nothing leads from any more serve again."""
        used = {id(path.state.decoder) for path in self._paths} | {id(self._anchor.decoder)}
        self._free += [decoder for decoder in self._busy if id(decoder) not in used]
        self._busy = [decoder for decoder in self._busy if id(decoder) in used]


lexicon_of = functools.lru_cache(16)(lambda vocabulary: Lexicon(list(vocabulary)))


def packed(rows: list[np.ndarray]) -> str:
    """Distributions [n, 257] as text, for a letter: their logarithms as float16."""
    return base64.b64encode(np.log(np.asarray(rows)).astype("<f2").tobytes()).decode("ascii")


def unpacked(text: str) -> np.ndarray:
    """float64 [n, 257], each row summing to 1; ValueError where the text is something else."""
    logs = np.frombuffer(base64.b64decode(text, validate=True), "<f2").reshape(-1, SYMBOLS).astype(np.float64)
    p = np.exp(logs)
    if not np.isfinite(p).all() or not (p.sum(axis=1) > 0).all():
        raise ValueError("These are no distributions.")
    return p / p.sum(axis=1, keepdims=True)


def bits_of(reader: ByteReader, data: bytes) -> np.ndarray:
    """Bits that each byte costs, float64 [len(data)]; the reader has moved past them."""
    bits = np.empty(len(data))
    for i, byte in enumerate(data):
        bits[i] = -math.log2(reader.next()[byte])
        reader.advance(bytes([byte]))
    return bits
