"""An archiver: the organism's prediction before a range coder, so that every prequential figure is a file that decodes.

    blob = compress(data, config, stage="child")      what `organism eval --prequential --blank` says it costs
    data = decompress(blob, config)

The walk is `organism.Prequential`'s, token by token: encoder and decoder make the very same calls. What must agree
between the place where a file was made and the one where it is read is in its header (docs/compress.md).
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from organism import (
    CODE_BYTES,
    STAGES,
    Config,
    Decoder,
    FieldView,
    Learner,
    OrganismError,
    Prequential,
    Tokenizer,
    UsageError,
    __version__,
    kernels_ready,
    newborn_learner,
    organ,
)


class RangeEncoder:
    """Turns choices into bytes, by their shares of a range (Martin 1979, "Range encoding"; carries as in Schindler's).

    A choice is the part low…high of a whole number `total`, up to 2^32. `range` has at least 56 bits between choices,
    so that rounding costs next to nothing. The decoder below mirrors it.
    """

    WHOLE, LEAST = 1 << 64, 1 << 56

    def __init__(self) -> None:
        self.low, self.range, self.out = 0, self.WHOLE, bytearray()

    def put(self, low: int, high: int, total: int) -> None:
        """Write one choice."""
        unit = self.range // total
        self._raise(low * unit)
        self.range = (high - low) * unit
        while self.range < self.LEAST:
            self.out.append(self.low >> 56)
            self.low, self.range = self.low << 8 & self.WHOLE - 1, self.range << 8

    def _raise(self, by: int) -> None:
        """Move the lower end up; a carry runs back over bytes that were written."""
        self.low += by
        if self.low >= self.WHOLE:
            self.low -= self.WHOLE
            at = len(self.out) - 1
            while self.out[at] == 255:
                self.out[at] = 0
                at -= 1
            self.out[at] += 1

    def finish(self) -> bytes:
        """All bytes; the last are the fewest that name a number in the range: a decoder reads zeros behind the end."""
        count = next(n for n in range(9) if -self.low % (self.WHOLE >> 8 * n) < self.range)
        self._raise(-self.low % (self.WHOLE >> 8 * count))
        return bytes(self.out) + self.low.to_bytes(8, "big")[:count]


class CodeEnds(Exception):
    """More was asked of a code than there is."""


class RangeDecoder:
    """Gives back the choices that RangeEncoder was told, if asked with the same totals."""

    def __init__(self, code: bytes):
        self.code, self.at, self.range = code, 8, RangeEncoder.WHOLE
        self.value = int.from_bytes(code[:8].ljust(8, b"\0"), "big")  # of the code, above the lower end of the range

    def get(self, ends: np.ndarray) -> int:
        """The next choice among [0, ends[0]), [ends[0], ends[1]) …; ends int64 ascending, the last is the total."""
        unit = self.range // int(ends[-1])
        choice = int(np.searchsorted(ends, min(self.value // unit, int(ends[-1]) - 1), side="right"))
        low = int(ends[choice - 1]) if choice else 0
        self.value -= low * unit
        self.range = (int(ends[choice]) - low) * unit
        while self.range < RangeEncoder.LEAST:
            if self.at > len(self.code) + 8:  # an encoder never leaves so much out
                raise CodeEnds
            self.value = self.value << 8 | (self.code[self.at] if self.at < len(self.code) else 0)
            self.at, self.range = self.at + 1, self.range << 8
        return choice


class Compression(Prequential):
    """The same walk with each token predicted, coded and learned before the next: a decoder can do no other.

    Encoder and decoder make the very same calls, so their floating-point numbers agree bit for bit. From those of
    `Prequential`, which predicts whole windows, they differ in the last digits.
    """

    SCALE = float(1 << 31)  # of probabilities as whole numbers

    def __init__(self, learner: Learner, past: list[tuple[bytes, int]] | None = None):
        super().__init__(learner, past or [])
        self.views: list[FieldView] = []  # of the present chunk
        self.decoder: Decoder | None = None
        self.weights: np.ndarray | None = None  # that the decoder reads: training may move them elsewhere
        self.last, self.fed = Tokenizer.BOS, False  # the last token; whether the decoder knows what came before it

    def encode(self, data: bytes, report: Callable[[int], None] | None = None) -> bytes:
        """The code of the data."""
        coder = RangeEncoder()
        self._walk(len(data), lambda: self._put(coder, self._spelled(data)), report)
        return coder.finish()

    def decode(self, code: bytes, size: int, report: Callable[[int], None] | None = None) -> bytes:
        """The data, of `size` bytes, whose code this is."""
        coder = RangeDecoder(code)
        self._walk(size, lambda: self._get(coder), report)
        return bytes(self.text)

    def _put(self, coder: RangeEncoder, tokens: Iterator[int]) -> Iterator[int]:
        """Write each token as it passes."""
        for token in tokens:
            ends = self._ends()
            coder.put(int(ends[token - 1]) if token else 0, int(ends[token]), int(ends[-1]))
            self._take(token)
            yield token

    def _get(self, coder: RangeDecoder) -> Iterator[int]:
        """Read token after token; whoever asks knows when to stop."""
        while True:
            token = coder.get(self._ends())
            self._take(token)
            yield token

    # One token.

    def _ends(self) -> np.ndarray:
        """int64 [V]: the distribution of the next token in whole numbers, cumulative; every token has at least 1."""
        p = self._distribution()
        p[Tokenizer.BOS : Tokenizer.BASE] = 0  # no text has specials inside
        total = p.sum()
        if not 0 < total < math.inf:  # weights that went astray must not lose a text
            p, total = np.ones(len(p)), float(len(p))
        return np.cumsum((p * (self.SCALE / total)).astype(np.int64) + 1)

    def _distribution(self) -> np.ndarray:
        """float64 [V], not yet normalised: what `Learner.predict` says of one token, for all of them."""
        learner = self.learner
        if not learner.on_field:
            self.p_body = _softmax(self._feed(None))
            return self.p_body.copy()
        view = learner.field.view()
        self.views.append(view)
        self.p_field = learner.field.dense()
        if not self._body_speaks:
            return self.p_field.copy()
        self.p_body = _softmax(self._feed(view))
        share = learner.gate.share(view.scalars[0, 0], learner.field.domain)
        return share * self.p_body + (1 - share) * self.p_field

    def _feed(self, view: FieldView | None) -> np.ndarray:
        """float32 [V]: the body's logits after the last token; first, of a new chunk, as much of the past as
        `Learner.predict` would show it."""
        learner, body = self.learner, self.learner.body
        if self.decoder is None or self.weights is not body.arena.average:
            self.decoder, self.weights = Decoder(body, "numba" if learner.compiled else "numpy"), body.arena.average
            self.fed = False
        if not self.fed:
            self.decoder.reset()
            self.fed, back = True, min(max(body.context // 2, body.context - self.STEP), len(learner.past) - 1)
            for i in range(back, 0, -1):
                seen = None if view is None else learner.past_view[-i]
                self.decoder.feed(int(learner.past[-1 - i]), seen)
        return self.decoder.feed(self.last, view)

    def _take(self, token: int) -> None:
        """Let field and gate learn a token that was just predicted; other learning waits for the end of the chunk."""
        learner = self.learner
        self.last = token
        if not learner.on_field:
            return
        learner.field.read([token])
        if self._body_speaks:
            body, base = (np.log(np.maximum(p[token : token + 1], 1e-300)) for p in (self.p_body, self.p_field))
            learner.gate.mix(body, base, self.views[-1].scalars[:, 0])

    def _read(self, tokens: np.ndarray) -> None:
        """The end of a chunk: its tokens, predicted and learned one by one, become experience."""
        learner, view = self.learner, FieldView.concat(self.views) if self.views else None
        if view is None:
            learner.read(tokens)
        else:
            learner.experience.append(tokens, view)
        learner.follow(tokens, view)
        self.views, self.fed = [], False


def _softmax(logits: np.ndarray) -> np.ndarray:
    """float64 [V]"""
    e = np.exp(logits.astype(np.float64) - float(logits.max()))
    return e / e.sum()


CODE_MAGIC, CODE_FORMAT = b"\x8fORG", 1
CODE_PATHS = ("reference", "portable", "avx2", "native")  # what computes; their numbers are in files, hence for ever
HEADER = struct.Struct("<4sB3sBBHI2s2s2s2sQ8sI")  # magic, format, CodeHeader, CRC-32 of all the rest of the file
CODE_THREADS = 1024  # at most
assert HEADER.size == CODE_BYTES
CODE_SETTINGS = tuple(
    f"learning.{key}"
    for key in "rate rate_min warmup_steps horizon_steps weight_decay beta1 beta2 epsilon max_grad_norm average "
    "experience_tokens".split()
)


class CodeHeader(NamedTuple):
    """What a decoder must know, and what must be the same there as where the code was made."""

    version: bytes  # of the program, three numbers
    stage: int  # place in STAGES
    path: int  # place in CODE_PATHS
    threads: int
    seed: int
    cpu: bytes  # from here on two bytes of a digest: a mistake is found, at the latest, by `check`
    product: bytes
    libraries: bytes
    settings: bytes
    length: int  # of the text
    check: bytes  # digest of the text

    @staticmethod
    def of(data: bytes, config: Config, stage: str, threads: int, seed: int, compiled: bool) -> CodeHeader:
        """The header of a text that is compressed here and now."""
        if seed >= 1 << 32 or threads > CODE_THREADS:
            raise UsageError(f"Compression takes a --seed below 2^32 and at most {CODE_THREADS} --threads.")
        here = surroundings(compiled) | dict(settings=_code_settings(config))
        names = ("CPU", "product", "libraries", "settings")
        cpu, product, libraries, settings = (_code_digest(here[name], 2) for name in names)
        path = CODE_PATHS.index(here["path"])
        return CodeHeader(_code_version(), list(STAGES).index(stage), path, threads, seed, cpu, product, libraries,
                          settings, len(data), _code_digest(data, 8))  # fmt: skip

    def pack(self, code: bytes) -> bytes:
        """The whole file."""
        head = HEADER.pack(CODE_MAGIC, CODE_FORMAT, *self, 0)[:-4]
        return head + struct.pack("<I", zlib.crc32(head + code)) + code

    @staticmethod
    def unpack(blob: bytes, name: str) -> tuple[CodeHeader, bytes]:
        """(header, code) of a file; an OrganismError says what is wrong with it."""
        if not blob or blob[:4] != CODE_MAGIC[: len(blob)]:
            raise OrganismError(f"{name} is not a file that `organism compress` made.")
        if len(blob) > 4 and blob[4] != CODE_FORMAT:
            raise OrganismError(
                f"{name} has format {blob[4]}, this program reads {CODE_FORMAT}: use the version that made it."
            )
        head, code = blob[: HEADER.size], blob[HEADER.size :]
        if len(head) == HEADER.size:
            *fields, checksum = HEADER.unpack(head)
            header = CodeHeader(*fields[2:])
            possible = header.stage < len(STAGES) and 0 < header.threads <= CODE_THREADS
            if possible and checksum == zlib.crc32(head[:-4] + code):
                return header, code
        raise OrganismError(
            f"{name} is truncated or altered, its checksum is wrong: fetch it again, or compress the original again."
        )

    def must_agree(self, here: CodeHeader, name: str) -> None:
        """Raise an OrganismError where something differs that may change the last bit of a prediction."""
        paths = [CODE_PATHS[h.path] if h.path < len(CODE_PATHS) else f"number {h.path}" for h in (self, here)]
        remedy = f"set ORGANISM_KERNELS={paths[0]}" if here.path else "pip install -e ."
        version, where = ".".join(map(str, self.version)), "decompress it where it was made"
        for differs, what, do in (
            (self.version != here.version, f"by organism {version}, this is {__version__}", "use that version"),
            (self.path != here.path, f"on the CPU path {paths[0]!r}, this is {paths[1]!r}", remedy),
            (self.cpu != here.cpu, "on another CPU, which rounds differently", where),
            (self.product != here.product, "with another matrix product (BLAS), which rounds differently", where),
            (self.libraries != here.libraries, "with another Python, NumPy, numba or C library", where),
            (self.settings != here.settings, "with other settings", "use the same organism.toml and variables"),
        ):
            if differs:
                raise OrganismError(f"{name} was compressed {what}: {do}.")


def surroundings(compiled: bool) -> dict[str, str]:
    """What decides the last bit of a prediction, besides the program: "path", "CPU", "product", "libraries"."""
    features = getattr(getattr(np, "_core", None), "_multiarray_umath", None)
    cpu = f"{platform.machine()} {getattr(features, '__cpu_features__', {})}"
    libraries = f"Python {platform.python_version()} NumPy {np.__version__} {platform.libc_ver()}"
    here = dict(path="reference", product="NumPy's", CPU=cpu, libraries=libraries)
    if compiled:
        kernels = organ("kernels").identity()
        here |= dict(path=kernels["path"], product=kernels["product"])
        here |= {name: f"{here[name]} {kernels[name]}" for name in ("CPU", "libraries")}
    return here


def _code_version() -> bytes:
    """Three numbers; what follows them, as in 1.2.3.dev4, is in the digest of the settings."""
    return bytes(min(int(n), 255) for n in re.findall(r"\d+", __version__)[:3])


def _code_digest(data: str | bytes, size: int) -> bytes:
    return hashlib.blake2b(data.encode() if isinstance(data, str) else data, digest_size=size).digest()


def _code_settings(config: Config) -> str:
    """All settings that shape a newborn and how it learns; the stage is in the header by itself."""
    sections = ("body.", "tokenizer.", "field.")
    values = {k: v for k, v in config.items() if k in CODE_SETTINGS or k.startswith(sections) and k != "body.stage"}
    return f"{__version__} {json.dumps(values)}"


def compress(
    data: bytes, config: Config, *, stage: str, threads: int = 1, seed: int = 0, engine: str = "auto",
    report: Callable[[int], None] | None = None,
) -> bytes:  # fmt: skip
    """The content of a compressed file, which `decompress` makes data again. `report` hears of bytes read."""
    header = CodeHeader.of(data, config, stage, threads, seed, engine != "numpy" and kernels_ready())
    learner = newborn_learner(config, stage, engine=engine, threads=threads, seed=seed)
    return header.pack(Compression(learner).encode(data, report))


def decompress(
    blob: bytes, config: Config, *, threads: int | None = None, seed: int | None = None, engine: str = "auto",
    name: str = "The file", report: Callable[[int], None] | None = None,
) -> bytes:  # fmt: skip
    """What `compress` was given. Stage, threads and seed come from the file, and must agree with those that are given.

    Raises OrganismError where the file is not whole, or was made elsewhere.
    """
    header, code = CodeHeader.unpack(blob, name)
    if header.path == CODE_PATHS.index("reference"):  # which runs everywhere
        engine = "numpy"
    stage, compiled = list(STAGES)[header.stage], engine != "numpy" and kernels_ready()
    header.must_agree(CodeHeader.of(b"", config, stage, header.threads, header.seed, compiled), name)
    for what, theirs, mine in (("threads", header.threads, threads), ("seed", header.seed, seed)):
        if mine is not None and mine != theirs:
            raise OrganismError(f"{name} was compressed with --{what} {theirs}, not {mine}: leave --{what} out.")
    learner = newborn_learner(config, stage, engine=engine, threads=header.threads, seed=header.seed)
    wrong = f"{name} does not decode to what it was, although it is whole: use the machine and program that made it."
    try:
        data = Compression(learner).decode(code, header.length, report)
    except CodeEnds as error:
        raise OrganismError(wrong) from error
    if len(data) != header.length or _code_digest(data, 8) != header.check:
        raise OrganismError(wrong)
    return data
