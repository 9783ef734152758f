"""Text to token ids and back, from what a GGUF file says of its own tokenizer; nothing is downloaded.

Three kinds, named by `tokenizer.ggml.model`:

    gpt2     byte-level BPE: the text is cut by the regular expressions of its `pre` type, then merged by rank (the
             `tokenizers` library does both)
    llama    SentencePiece BPE: neighbours are merged in order of the score of what they make, leftmost first; characters
             that no token holds become bytes `<0x..>`. GGUF carries scores and no merges, so this is our own loop
    t5       SentencePiece unigram: the likeliest segmentation (`tokenizers`)

Control tokens such as <|im_start|> are recognised only where the caller says that the text is trusted (`special=True`).
So a user who types one has typed its characters, and nothing else. Tokens of the type "user defined" are ordinary words
of the vocabulary which the merges cannot reach; they are always recognised, as llama.cpp does.
"""

from __future__ import annotations

import functools
import heapq
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from organism import UsageError
from organs.giant.gguf import GGUFError

log = logging.getLogger("organism")

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # values of tokenizer.ggml.token_type
SPACE = "▁"  # how SentencePiece writes a space

# Regular expressions by which text is cut before merging, in turn; each is the one of the model's own tokenizer.json.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = (  # contractions, words with one sign before them, digits in groups of {}, signs, line ends, other spaces
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (  # words that begin anew at a capital letter; {} is what may follow a word, then the digits
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s|\p{{N}}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_HAN = r"[一-龥\x{0800}-一가-\x{D7FF}]+"
_MARKED = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3, _QWEN2 = [_WORDS.format("{1,3}")], [_WORDS.format("")]
PRE_TYPES: dict[str, list[str]] = {
    "default": [r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
    "gpt-2": [_GPT2], "mpt": [_GPT2], "olmo": [_GPT2], "jais": [_GPT2],
    "smollm": [r"\p{N}", _GPT2], "starcoder": [r"\p{N}", _GPT2], "refact": [r"\p{N}", _GPT2],
    "command-r": [r"\p{N}", _GPT2], "codeshell": [r"\p{N}", _GPT2], "exaone": [r"\p{N}", _GPT2],
    "falcon": [r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"],
    "llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3, "falcon3": _LLAMA3, "pixtral": _LLAMA3,
    "lfm2": _LLAMA3, "dbrx": _LLAMA3, "smaug-bpe": _LLAMA3, "chatglm-bpe": _LLAMA3, "glm4": _LLAMA3,
    "qwen2": _QWEN2, "stablelm2": _QWEN2, "hunyuan": _QWEN2, "deepseek-r1-qwen": _QWEN2, "megrez": _QWEN2,
    "qwen35": [_WORDS.format("").replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")],
    "deepseek-llm": [r"[\r\n]", r"\s?[\p{Lu}\p{Ll}\p{Lt}&&[^\x{1D400}-\x{1D7FF}]]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", _HAN,
                     r"\p{N}+"],
    "deepseek-coder": [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN, r"\p{N}"],
    "deepseek-v3": [r"\p{N}{1,3}", r"[一-龥\x{3040}-ゟ゠-ヿ]+", _MARKED],
    "gpt-4o": [_CASED % (_CONTRACTION, _CONTRACTION, "{1,3}")], "llama4": [_CASED % (_CONTRACTION, _CONTRACTION, "{1,3}")],
    "tekken": [_CASED % ("", "", "")],
}  # fmt: skip
WHOLE_WORDS = {
    "llama-bpe",
    "llama3",
    "llama-v3",
    "falcon3",
    "pixtral",
    "lfm2",
    "llama4",
    "tekken",
}  # no merging if in vocabulary
BEGINS = {
    "llama-bpe",
    "llama3",
    "llama-v3",
    "falcon3",
    "pixtral",
    "lfm2",
    "tekken",
    "chatglm-bpe",
}  # begin with BOS by default
END_TEXTS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>",
             "<EOT>", "<|eot|>", "<|return|>", "<｜end▁of▁sentence｜>")  # fmt: skip


class Tokenizer:
    """The tokenizer of one GGUF file.

    vocab_size; bos, eos: token ids or None; ends: ids after which a turn is over; add_bos: whether the model expects BOS
    first (`tokenize` never adds it); markers: {text: id} of the tokens that only trusted text may write.
    Raises GGUFError where the metadata describes no tokenizer that is known here.
    """

    def __init__(self, metadata: Mapping[str, Any]):
        self.model = str(metadata.get("tokenizer.ggml.model", ""))
        if self.model not in ("gpt2", "llama", "t5"):
            what = f"a tokenizer of the kind {self.model!r}" if self.model else "no tokenizer"
            raise GGUFError(
                f"The file carries {what}; supported are gpt2 (byte-level BPE), llama and t5 (SentencePiece)."
            )
        self.texts: Sequence[str] = _array(metadata, "tokens", str)
        self.vocab_size = len(self.texts)
        self.types: Sequence[int] = _array(metadata, "token_type", int, self.vocab_size) or [NORMAL] * self.vocab_size
        self.ids: dict[str, int] = dict(zip(self.texts, range(self.vocab_size)))
        self.bos, self.eos = self._special(metadata, "bos"), self._special(metadata, "eos")
        self.ends = self._find_ends(metadata)
        self.markers = {self.texts[i]: i for i in self._indices(CONTROL, UNKNOWN) if self.texts[i]}
        self.always = {self.texts[i]: i for i in self._indices(USER_DEFINED) if self.texts[i]}
        self._engine = {"gpt2": _ByteLevel, "llama": _ScoredPairs, "t5": _Unigram}[self.model](metadata, self)
        self.pre = str(metadata.get("tokenizer.ggml.pre", "default"))
        default = self.pre in BEGINS if self.model == "gpt2" else self.model == "llama"
        self.add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", default)) and self.bos is not None

    def _indices(self, *types: int) -> list[int]:
        return [i for i, kind in enumerate(self.types) if kind in types]

    def _special(self, metadata: Mapping[str, Any], name: str) -> int | None:
        value = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if value is not None and not 0 <= int(value) < self.vocab_size:
            raise GGUFError(f"The file's {name} token is number {value}, but it has only {self.vocab_size} tokens.")
        return None if value is None else int(value)

    def _find_ends(self, metadata: Mapping[str, Any]) -> frozenset[int]:
        named = [self._special(metadata, name) for name in ("eos", "eot", "eom")]
        known = [self.ids[text] for text in END_TEXTS if text in self.ids and self.types[self.ids[text]] != NORMAL]
        return frozenset(i for i in [*named, *known] if i is not None)

    # Text to ids.

    def tokenize(self, text: str | bytes, special: bool = False) -> list[int]:
        """Token ids of a text, without BOS. special: recognise control tokens too; only for text that is trusted.

        Raises UsageError where the text is not valid UTF-8.
        """
        text = _valid(text)
        out: list[int] = []
        after_marker = True  # SentencePiece writes a space before what begins, or follows a marker
        for part in self._parts(text, special):
            if isinstance(part, int):
                out.append(part)
            elif part:
                out += self._engine.encode(part, after_marker)
            after_marker = isinstance(part, int)
        return out

    def _parts(self, text: str, special: bool) -> Iterator[str | int]:
        """The text cut at the tokens that are recognised as a whole: strings, and ids of those tokens."""
        done = 0
        pattern, known, lengths = self._trusted if special else self._untrusted
        for match in pattern.finditer(text) if known else ():
            at = match.start()
            if at < done:
                continue
            found = next((known[text[at : at + n]] for n in lengths if text[at : at + n] in known), None)
            if found is not None:
                yield text[done:at]
                yield found
                done = at + len(self.texts[found])
        yield text[done:]

    @functools.cached_property
    def _trusted(self) -> tuple[re.Pattern, dict[str, int], list[int]]:
        return _finder(self.always | self.markers)

    @functools.cached_property
    def _untrusted(self) -> tuple[re.Pattern, dict[str, int], list[int]]:
        return _finder(self.always)

    # Ids to text.

    def token_bytes(self, token: int, special: bool = False) -> bytes:
        """The bytes that a token stands for; a control token has none unless `special`."""
        kind, text = self.types[token], self.texts[token]
        if kind in (CONTROL, UNKNOWN, UNUSED):
            return text.encode() if special else b""
        return text.encode() if kind == USER_DEFINED else self._engine.piece(text, kind)

    def detokenize(self, tokens: Iterable[int], special: bool = False) -> bytes:
        """The bytes of a sequence of tokens; half a character at an end stays half a character."""
        return b"".join(self.token_bytes(int(token), special) for token in tokens)

    @functools.cached_property
    def pieces(self) -> list[bytes]:
        """`token_bytes` of every token, in order of ids."""
        return [self.token_bytes(token) for token in range(self.vocab_size)]


def _array(metadata: Mapping[str, Any], name: str, kind: type, size: int | None = None) -> list:
    """An array of the tokenizer's metadata as a plain list of `kind`; empty where an optional one (size given) is missing."""
    values = metadata.get(f"tokenizer.ggml.{name}")
    if values is None:
        if size is None:
            raise GGUFError(f"The file describes a tokenizer without tokenizer.ggml.{name}: it is incomplete.")
        return []
    values = values.tolist() if hasattr(values, "tolist") else list(values)
    if values and not isinstance(values[0], (kind, int) if kind is float else kind):
        raise GGUFError(f"The file's tokenizer.ggml.{name} holds {type(values[0]).__name__}, not {kind.__name__}.")
    if size is not None and len(values) != size:
        raise GGUFError(f"The file's tokenizer.ggml.{name} has {len(values)} entries for {size} tokens.")
    return values


def _valid(text: str | bytes) -> str:
    try:
        if isinstance(text, bytes):
            return text.decode("utf-8")
        if not text.isascii():
            text.encode("utf-8")
        return text
    except UnicodeError as error:
        raise UsageError(f"The text is not valid UTF-8 (at {error.start}: {error.reason}).") from error  # type: ignore[attr-defined]


def _finder(known: dict[str, int]) -> tuple[re.Pattern, dict[str, int], list[int]]:
    """(where a known token may begin, the tokens, their lengths from long to short): tokens are many, first letters few."""
    firsts = "".join(sorted({text[0] for text in known}))
    pattern = re.compile(f"[{re.escape(firsts)}]") if firsts else re.compile("(?!)")
    return pattern, known, sorted({len(text) for text in known}, reverse=True)


# --- Byte-level BPE. ---


@functools.cache
def byte_letters() -> tuple[list[str], dict[str, int]]:
    """The letter that byte-level BPE writes for each byte, and the other way: printable bytes stand for themselves, the
    others for the letters from U+0100 on (GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    letters = [chr(b) if b in printable else chr(next(others)) for b in range(256)]
    return letters, {letter: b for b, letter in enumerate(letters)}


class _ByteLevel:
    def __init__(self, metadata: Mapping[str, Any], owner: Tokenizer):
        from tokenizers import Regex, models, pre_tokenizers
        from tokenizers import Tokenizer as Library

        pre = str(metadata.get("tokenizer.ggml.pre", "default"))
        if pre not in PRE_TYPES:
            log.warning(
                "The pre-tokenizer %r is not known here: the text is cut as for GPT-2, and may differ a little.", pre
            )
        ids = owner.ids
        merges = [
            (m[: m.index(" ", 1)], m[m.index(" ", 1) + 1 :]) for m in _array(metadata, "merges", str) if " " in m[1:]
        ]
        merges = [(a, b) for a, b in merges if a in ids and b in ids and a + b in ids]
        self.library = Library(models.BPE(ids, merges, ignore_merges=pre in WHOLE_WORDS))
        cuts = [pre_tokenizers.Split(Regex(r), "isolated") for r in PRE_TYPES.get(pre, PRE_TYPES["default"])]
        self.library.pre_tokenizer = pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(False, use_regex=False)])  # type: ignore[assignment]

    def encode(self, text: str, after_marker: bool) -> list[int]:
        return self.library.encode(text, add_special_tokens=False).ids

    def piece(self, text: str, kind: int) -> bytes:
        values = byte_letters()[1]
        if all(letter in values for letter in text):
            return bytes(values[letter] for letter in text)
        return text.encode()  # no byte-level spelling: an added token


# --- SentencePiece. ---


class _ScoredPairs:
    """BPE by scores: of all neighbours that make a token, the pair with the highest score is merged first, the leftmost
    of equals; what is left over is a token, or bytes."""

    def __init__(self, metadata: Mapping[str, Any], owner: Tokenizer):
        self.ids, self.types = owner.ids, owner.types
        self.scores = _array(metadata, "scores", float, owner.vocab_size) or [0.0] * owner.vocab_size
        self.prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
        self.unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
        self.bytes = {int(owner.texts[i][3:5], 16): i for i in owner._indices(BYTE) if _is_byte(owner.texts[i])}
        crossing = any(re.search(f"[^{SPACE}]{SPACE}", text) for text in owner.texts)
        self._words = re.compile(".+" if crossing else f"{SPACE}*[^{SPACE}]+|{SPACE}+", re.DOTALL)
        self.word = functools.lru_cache(100_000)(self._word)

    def encode(self, text: str, after_marker: bool) -> list[int]:
        text = (" " + text if self.prefix and after_marker else text).replace(" ", SPACE)
        # No token reaches over the beginning of a word, so words are merged one by one, and remembered.
        return [token for word in self._words.findall(text) for token in self.word(word)]

    def _word(self, text: str) -> tuple[int, ...]:
        symbols: list[str | None] = list(text)
        before, behind = list(range(-1, len(symbols) - 1)), list(range(1, len(symbols) + 1))
        waiting: list[
            tuple[float, int, int, str]
        ] = []  # (-score, position of the left one, of the right one, what they make)

        def offer(left: int, right: int) -> None:
            if left >= 0 and right < len(symbols):
                made = f"{symbols[left]}{symbols[right]}"
                token = self.ids.get(made)
                if token is not None:
                    heapq.heappush(waiting, (-self.scores[token], left, right, made))

        for i in range(len(symbols) - 1):
            offer(i, i + 1)
        while waiting:
            _, left, right, made = heapq.heappop(waiting)
            a, b = symbols[left], symbols[right]
            if a is None or b is None or a + b != made:
                continue  # one of the two was merged with another meanwhile
            symbols[left], symbols[right] = made, None
            behind[left] = behind[right]
            if behind[left] < len(symbols):
                before[behind[left]] = left
            offer(before[left], left)
            offer(left, behind[left])
        return tuple(token for symbol in symbols if symbol for token in self._ids_of(symbol))

    def _ids_of(self, symbol: str) -> list[int]:
        token = self.ids.get(symbol)
        if token is not None:
            return [token]
        return [self.bytes.get(b, self.unknown) for b in symbol.encode()]

    def piece(self, text: str, kind: int) -> bytes:
        if kind == BYTE and _is_byte(text):
            return bytes([int(text[3:5], 16)])
        return text.replace(SPACE, " ").encode()


class _Unigram:
    """The likeliest segmentation under independent pieces, by the library's Viterbi search."""

    def __init__(self, metadata: Mapping[str, Any], owner: Tokenizer):
        from tokenizers import Tokenizer as Library
        from tokenizers import models, normalizers, pre_tokenizers

        scores = _array(metadata, "scores", float, owner.vocab_size) or [0.0] * owner.vocab_size
        unknown = int(metadata.get("tokenizer.ggml.unknown_token_id", 0))
        has_bytes = any(kind == BYTE for kind in owner.types)
        self.library = Library(models.Unigram(list(zip(owner.texts, scores)), unknown, has_bytes))
        charsmap = metadata.get("tokenizer.ggml.precompiled_charsmap")
        steps: list[Any] = [normalizers.Precompiled(bytes(bytearray(charsmap)))] if charsmap is not None else []
        if metadata.get("tokenizer.ggml.remove_extra_whitespaces", False):
            steps += [normalizers.Strip(), normalizers.Replace("  ", " ")]
        self.library.normalizer = normalizers.Sequence(steps)  # type: ignore[assignment]
        self.prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
        self.marked, self.unmarked = (pre_tokenizers.Metaspace(SPACE, s) for s in ("always", "never"))

    def encode(self, text: str, after_marker: bool) -> list[int]:
        self.library.pre_tokenizer = self.marked if self.prefix and after_marker else self.unmarked  # type: ignore[assignment]
        return self.library.encode(text, add_special_tokens=False).ids

    piece = _ScoredPairs.piece


def _is_byte(text: str) -> bool:
    return re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", text) is not None
