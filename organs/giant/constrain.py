"""Constrained output: which tokens may come next, so that the text follows a grammar or a JSON schema.

A grammar (GBNF, llama.cpp's notation) becomes a graph over bytes: characters are spelled out in UTF-8. A state is a set of
stacks of places in that graph; states are numbered as they come up, each with a row that gives the next state for every
byte. The vocabulary is a trie, walked in compiled code with those rows; a branch is left at the first byte that leads
nowhere. The tokens allowed in a state are kept, so that a state that was met before (inside of a string, say) costs nothing.
"""

from __future__ import annotations

import collections
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from organism import UsageError
from organs.kernels.ground import entry

ROOT = "root"
MOST_REPEATS = 2000  # of an element in {m,n}
MOST_NODES = 200_000  # of a grammar's graph
DEEPEST = 400  # places on a stack: nesting of what is written
MASKS = 256  # states whose allowed tokens are kept

# --- The graph. A node is (kind, argument, next): ---

BYTE, CALL, SPLIT, RETURN = range(4)  # one of a set of bytes; a rule; (argument: all nexts); the end of a rule


class Grammar:
    """Rules as one graph. nodes: the nodes; begins: {rule: node}; sets: uint8 [n, 256], the sets of bytes."""

    def __init__(self) -> None:
        self.nodes: list[tuple[int, Any, int]] = []
        self.begins: dict[str, int] = {}
        self._sets: dict[bytes, int] = {}

    def node(self, kind: int, argument: Any = None, next: int = -1) -> int:
        if len(self.nodes) >= MOST_NODES:
            raise UsageError("The grammar is too large: repeat fewer elements.")
        self.nodes.append((kind, argument, next))
        return len(self.nodes) - 1

    def bytes_of(self, allowed: Iterable[int]) -> int:
        """The number of a set of bytes."""
        row = np.zeros(256, np.uint8)
        row[list(allowed)] = 1
        return self._sets.setdefault(row.tobytes(), len(self._sets))

    @property
    def sets(self) -> np.ndarray:
        return np.frombuffer(b"".join(self._sets), np.uint8).reshape(-1, 256)

    # What follows builds backwards: each takes the node that comes behind, and returns the node to begin at.

    def literal(self, data: bytes, behind: int) -> int:
        for byte in reversed(data):
            behind = self.node(BYTE, self.bytes_of([byte]), behind)
        return behind

    def characters(self, ranges: Sequence[tuple[int, int]], behind: int) -> int:
        """One character of these ranges of code points, in UTF-8."""
        ways = []
        for first, last in ranges:
            for sequence in _utf8(first, last):
                at = behind
                for low, high in reversed(sequence):
                    at = self.node(BYTE, self.bytes_of(range(low, high + 1)), at)
                ways.append(at)
        return ways[0] if len(ways) == 1 else self.node(SPLIT, tuple(ways))


def _utf8(first: int, last: int) -> list[list[tuple[int, int]]]:
    """Sequences of ranges of bytes that spell exactly the code points first..last (surrogates left out)."""
    edges = [0x80, 0x800, 0xD800, 0xE000, 0x10000, 0x110000]
    out: list[list[tuple[int, int]]] = []
    for begin, end in zip([0, *edges], edges):
        if begin != 0xD800 and max(first, begin) <= min(last, end - 1):
            out += _spelled(chr(max(first, begin)).encode(), chr(min(last, end - 1)).encode())
    return out


def _spelled(low: bytes, high: bytes) -> list[list[tuple[int, int]]]:
    """The same for two spellings of one length."""
    if len(low) == 1 or low == high:
        return [[(a, b) for a, b in zip(low, high)]]
    if low[0] == high[0]:
        return [[(low[0], low[0]), *rest] for rest in _spelled(low[1:], high[1:])]
    least, most = b"\x80" * (len(low) - 1), b"\xbf" * (len(low) - 1)
    out, first, last = [], low[0], high[0]
    if low[1:] != least:
        out += [[(first, first), *rest] for rest in _spelled(low[1:], most)]
        first += 1
    if high[1:] != most:
        last -= 1
    if first <= last:
        out.append([(first, last), *((0x80, 0xBF) for _ in least)])
    if high[1:] != most:
        out += [[(high[0], high[0]), *rest] for rest in _spelled(least, high[1:])]
    return out


# --- GBNF. ---

_TOKEN = re.compile(r"""\s+|\#[^\n]*|(?P<rule>[A-Za-z][\w-]*)\s*::=|(?P<name>[A-Za-z][\w-]*)|(?P<text>"(?:[^"\\\n]|\\.)*")
    |(?P<set>\[(?:[^\]\\]|\\.)*\])|(?P<repeat>\{\s*\d+\s*(?:,\s*\d*\s*)?\})|(?P<sign>[.()|*+?])""", re.VERBOSE)  # fmt: skip
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t"}
_ANY = [(0, 0x10FFFF)]


def parse(text: str) -> Grammar:
    """A grammar in GBNF: `rule ::= …` with "texts", [classes], ., (groups), |, *, +, ?, {m,n}. The first rule to be followed
    is `root`. Raises UsageError that names the line."""
    bodies, name = {}, None
    tokens: list[tuple[str, str, int]] = []
    at = 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        line = text.count("\n", 0, at) + 1
        if match is None:
            raise UsageError(f"The grammar is not understood in line {line}: {text[at : at + 20].splitlines()[0]!r}.")
        if match.lastgroup == "rule":
            name, tokens = match["rule"], []
            if name in bodies:
                raise UsageError(f"The grammar has the rule {name} twice (line {line}).")
            bodies[name] = tokens
        elif match.lastgroup:
            if name is None:
                raise UsageError(f"The grammar begins without a rule (line {line}): write root ::= …")
            tokens.append((match.lastgroup, match[match.lastgroup], line))
        at = match.end()
    if ROOT not in bodies:
        raise UsageError("The grammar has no rule called root, where every text begins.")
    grammar = Grammar()
    for name, tokens in bodies.items():
        tree, rest = _alternatives(tokens, 0)
        if rest < len(tokens):
            raise UsageError(f"The grammar has a ) too many in line {tokens[rest][2]}.")
        grammar.begins[name] = _build(grammar, tree, grammar.node(RETURN))
    for kind, argument, _ in grammar.nodes:
        if kind == CALL and argument not in grammar.begins:
            raise UsageError(f"The grammar uses the rule {argument}, which it does not have.")
    return grammar


def _alternatives(tokens: list, at: int) -> tuple[tuple, int]:
    """("or", [sequence, …]); a sequence is a list of (element, least, most or None)."""
    ways, sequence = [], []
    while at < len(tokens) and tokens[at][:2] != ("sign", ")"):
        kind, text, line = tokens[at]
        at += 1
        if (kind, text) == ("sign", "|"):
            ways.append(sequence)
            sequence = []
        elif (kind, text) == ("sign", "("):
            inner, at = _alternatives(tokens, at)
            if at >= len(tokens):
                raise UsageError(f"The grammar has a ( in line {line} that is never closed.")
            sequence.append([inner, 1, 1])
            at += 1
        elif kind == "repeat" or text in ("*", "+", "?"):
            if not sequence or sequence[-1][1:] != [1, 1]:
                raise UsageError(f"The grammar has a {text} in line {line} with nothing before it.")
            sequence[-1][1:] = _times(text, line)
        else:
            sequence.append([(kind, text), 1, 1])
    return ("or", [*ways, sequence]), at


def _times(text: str, line: int) -> list:
    if text in ("*", "+", "?"):
        return {"*": [0, None], "+": [1, None], "?": [0, 1]}[text]
    least, comma, most = text.strip("{} ").partition(",")
    numbers = [int(least), (int(most) if most.strip() else None) if comma else int(least)]
    if max(n or 0 for n in numbers) > MOST_REPEATS or (numbers[1] is not None and numbers[1] < numbers[0]):
        raise UsageError(
            f"The grammar repeats {text} in line {line}: at most {MOST_REPEATS}, and no less than the least."
        )
    return numbers


def _build(grammar: Grammar, element: tuple, behind: int) -> int:
    kind, value = element
    if kind == "or":
        ways = []
        for sequence in value:
            at = behind
            for item, least, most in reversed(sequence):
                at = _repeated(grammar, item, least, most, at)
            ways.append(at)
        return ways[0] if len(ways) == 1 else grammar.node(SPLIT, tuple(ways))
    if kind == "text":
        return grammar.literal(_unescaped(value[1:-1]).encode(), behind)
    if kind == "set":
        return grammar.characters(_ranges(value[1:-1]), behind)
    if kind == "sign":
        return grammar.characters(_ANY, behind)
    return grammar.node(CALL, value, behind)


def _repeated(grammar: Grammar, item: tuple, least: int, most: int | None, behind: int) -> int:
    at = behind
    if most is None:  # a loop: the split is made first, so that the element can lead back to it
        loop = grammar.node(SPLIT)
        grammar.nodes[loop] = (SPLIT, (_build(grammar, item, loop), behind), -1)
        at = loop
    for _ in range((most or least) - least if most is not None else 0):
        at = grammar.node(SPLIT, (_build(grammar, item, at), behind))
    for _ in range(least):
        at = _build(grammar, item, at)
    return at


def _unescaped(text: str) -> str:
    def plain(match: re.Match) -> str:
        code = match[1]
        return chr(int(code[1:], 16)) if code[0] in "xuU" and len(code) > 1 else _ESCAPES.get(code, code)

    try:
        return re.sub(r"\\(x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|.)", plain, text, flags=re.DOTALL)
    except (ValueError, OverflowError):
        raise UsageError(f"The grammar has a character that Unicode does not: {text[:20]!r}.") from None


def _ranges(text: str) -> list[tuple[int, int]]:
    """The ranges of code points of a class, such as a-z or ^\\n."""
    negative, text = text.startswith("^"), text.removeprefix("^")
    letters = re.findall(r"\\(?:x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|.)|.", text, re.DOTALL)
    found, at = [], 0
    while at < len(letters):
        first = last = ord(_unescaped(letters[at]))
        if at + 2 < len(letters) and letters[at + 1] == "-":
            last, at = ord(_unescaped(letters[at + 2])), at + 2
        at += 1
        if last < first:
            raise UsageError(f"The grammar has a range that runs backwards: [{text}].")
        found.append((first, last))
    if not negative:
        if not found:
            raise UsageError("The grammar has an empty class []: nothing can match it.")
        return found
    out, begin = [], 0
    for first, last in sorted(found):
        if begin < first:
            out.append((begin, first - 1))
        begin = max(begin, last + 1)
    return [*out, (begin, 0x10FFFF)] if begin <= 0x10FFFF else out


# --- JSON schemas, written as GBNF. ---

_JSON = r"""
ws ::= " "? | "\n" [ \t]{0,20}
string ::= "\"" char* "\""
char ::= [^"\\\x00-\x1F\x7F] | "\\" (["\\/bfnrt] | "u" [0-9a-fA-F]{4})
digits ::= "0" | [1-9] [0-9]{0,15}
integer ::= "-"? digits
number ::= integer ("." [0-9]{1,16})? ([eE] [-+]? [0-9]{1,3})?
boolean ::= "true" | "false"
null ::= "null"
object ::= "{" ws ("}" | string ws ":" ws value ("," ws string ws ":" ws value)* "}")
array ::= "[" ws ("]" | value ("," ws value)* "]")
value ::= (string | number | boolean | null | object | array) ws
"""
_NOTES = {
    "title",
    "description",
    "default",
    "examples",
    "$schema",
    "$id",
    "$comment",
    "format",
    "deprecated",
    "readOnly",
    "writeOnly",
}
_KNOWN = {"type", "properties", "required", "additionalProperties", "items", "prefixItems", "minItems", "maxItems", "enum", "const",
          "anyOf", "oneOf", "allOf", "$ref", "$defs", "definitions", "minLength", "maxLength", "minimum", "maximum"}  # fmt: skip


def json_rules(schema: Mapping[str, Any] | bool) -> Grammar:
    """The grammar of the JSON texts of a schema; True: of any object. Properties come in the schema's order, and no others
    unless additionalProperties says so. Raises UsageError for what a schema asks and this cannot promise."""
    if schema is True:
        return parse(f"root ::= object\n{_JSON}")
    writer = _SchemaWriter(schema)
    root = writer.rule_of(schema, "the schema")
    lines = [f"root ::= {root}", *(f"{name} ::= {body}" for name, body in writer.rules.items())]
    return parse("\n".join(lines) + "\n" + _JSON)


class _SchemaWriter:
    """Writes one rule a schema; `rules` are the rules so far."""

    def __init__(self, document: Any):
        self.document, self.rules, self.references = document, {}, {}

    def add(self, body: str) -> str:
        name = f"s{len(self.rules)}"
        self.rules[name] = body
        return name

    def rule_of(self, schema: Any, where: str) -> str:
        """GBNF of a schema's texts: a rule's name, or something in brackets."""
        if schema is True or schema == {}:
            return "value"
        if not isinstance(schema, Mapping):
            raise UsageError(f"The JSON schema has {schema!r} at {where}, where a schema belongs.")
        if unknown := sorted(set(schema) - _KNOWN - _NOTES):
            raise UsageError(f"The JSON schema asks for {unknown[0]!r} at {where}, which cannot be promised here.")
        if "$ref" in schema:
            return self.reference(schema["$ref"], where)
        if "const" in schema or "enum" in schema:
            values = [schema["const"]] if "const" in schema else schema["enum"]
            return "(" + " | ".join(_quoted(json.dumps(v, ensure_ascii=False)) for v in values) + ")"
        for key in ("anyOf", "oneOf"):
            if key in schema:
                return "(" + " | ".join(self.rule_of(s, f"{where}/{key}") for s in schema[key]) + ")"
        if "allOf" in schema:
            return self.rule_of(self.merged(schema), where)
        kinds = schema.get("type", "object" if "properties" in schema else "array" if "items" in schema else None)
        if kinds is None:
            return "value"
        kinds = kinds if isinstance(kinds, list) else [kinds]
        return "(" + " | ".join(self.of_kind(kind, schema, where) for kind in kinds) + ")"

    def reference(self, target: str, where: str) -> str:
        if target not in self.references:
            found = self.document
            for part in target.removeprefix("#").strip("/").split("/") if target != "#" else ():
                found = found.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
            if found is None or not target.startswith("#"):
                raise UsageError(f"The JSON schema refers to {target!r} at {where}, which it does not hold.")
            self.references[target] = name = self.add("")
            self.rules[name] = self.rule_of(found, target)
        return self.references[target]

    def merged(self, schema: Mapping[str, Any]) -> dict[str, Any]:
        out: dict[str, Any] = {k: v for k, v in schema.items() if k != "allOf"}
        for part in schema["allOf"]:
            for key, value in part.items():
                if key == "properties":
                    out[key] = {**out.get(key, {}), **value}
                elif key == "required":
                    out[key] = [*out.get(key, []), *value]
                elif out.setdefault(key, value) != value:
                    raise UsageError(
                        f"The JSON schema's allOf says two things about {key!r}, which cannot be promised here."
                    )
        return out

    def of_kind(self, kind: str, schema: Mapping[str, Any], where: str) -> str:
        if kind == "object":
            return self.object_of(schema, where)
        if kind == "array":
            return self.array_of(schema, where)
        if kind == "string" and ("minLength" in schema or "maxLength" in schema):
            most = schema.get("maxLength", "")
            return f'"\\"" char{{{schema.get("minLength", 0)},{most}}} "\\""'
        if kind in ("integer", "number") and ("minimum" in schema or "maximum" in schema):
            return self.bounded(kind, schema, where)
        if kind not in ("string", "integer", "number", "boolean", "null"):
            raise UsageError(f"The JSON schema has the type {kind!r} at {where}, which JSON does not know.")
        return kind

    def bounded(self, kind: str, schema: Mapping[str, Any], where: str) -> str:
        least, most = schema.get("minimum"), schema.get("maximum")
        if kind == "integer" and least is not None and most is not None and 0 <= most - least <= 1000:
            return "(" + " | ".join(f'"{n}"' for n in range(int(least), int(most) + 1)) + ")"
        if most is None and least == 0:
            return "digits" if kind == "integer" else r'digits ("." [0-9]{1,16})?'
        if most is None and least == 1 and kind == "integer":
            return "[1-9] [0-9]{0,15}"
        raise UsageError(f"The JSON schema bounds a number at {where} in a way that cannot be promised here (integers from 0 or 1 "
                         "on, or at most a thousand different ones, can).")  # fmt: skip

    def object_of(self, schema: Mapping[str, Any], where: str) -> str:
        properties, more = schema.get("properties", {}), schema.get("additionalProperties", "properties" not in schema)
        required = set(schema.get("required", ()))
        if missing := sorted(required - set(properties)):
            properties = {**properties, **{name: True for name in missing}}
        extra = f'string ws ":" ws {self.rule_of(more, where)} ws' if more else ""
        rest = self.add(f'("," ws {extra})* "}}"' if extra else '"}"')
        start = self.add(f'"}}" | {extra} {rest}' if extra else '"}"')
        for name, below in reversed(properties.items()):
            pair = (
                f'{_quoted(json.dumps(name, ensure_ascii=False))} ws ":" ws {self.rule_of(below, f"{where}/{name}")} ws'
            )
            here, then = self.add(pair), f'"," ws {pair} {rest}'
            first = f"{here} {rest}"
            start = self.add(first if name in required else f"{first} | {start}")
            rest = self.add(then if name in required else f"{then} | {rest}")
        return f'"{{" ws {start}'

    def array_of(self, schema: Mapping[str, Any], where: str) -> str:
        first = [self.rule_of(s, f"{where}/prefixItems") + " ws" for s in schema.get("prefixItems", ())]
        items = schema.get("items", not first)
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        if first:
            more = f'("," ws {self.rule_of(items, where)} ws)*' if items else ""
            return '"[" ws ' + ' "," ws '.join(first) + f' {more} "]"'
        item = f"{self.rule_of(items, f'{where}/items')} ws"
        if most == 0:
            return '"[" ws "]"'
        bounds = f"{{{max(least - 1, 0)},{'' if most is None else most - 1}}}"
        filled = f'{item} ("," ws {item}){bounds}'
        return f'"[" ws {filled} "]"' if least else f'"[" ws ({filled})? "]"'


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


# --- The vocabulary as a trie. ---


class Vocabulary:
    """The bytes of all tokens as a trie in preorder; tokens without bytes are never allowed.

    byte uint8 [n], depth int32 [n], end int32 [n] (the node behind the last below), first int32 [n+1] (where a node's
    tokens begin in `order`), order int32 (tokens, sorted by their bytes).
    """

    def __init__(self, pieces: Sequence[bytes], size: int):
        self.size, self.pieces = size, pieces
        order = sorted((n for n, piece in enumerate(pieces) if piece), key=pieces.__getitem__)
        text = np.frombuffer(b"".join(pieces[n] for n in order), np.uint8)
        starts = np.concatenate([[0], np.cumsum([len(pieces[n]) for n in order])]).astype(np.int64)
        self.order = np.array(order, np.int32)
        self.byte, self.depth, self.end, self.first, n = _trie(text, starts)
        self.byte, self.depth, self.end, self.first = self.byte[:n], self.depth[:n], self.end[:n], self.first[: n + 1]
        self.deepest = int(self.depth.max(initial=0)) + 2


@entry(nogil=True)
def _trie(text, starts):
    most = len(text) + 1
    byte, depth, end = np.zeros(most, np.uint8), np.zeros(most, np.int32), np.zeros(most, np.int32)
    first, path, n = np.zeros(most + 1, np.int32), np.zeros(most + 1, np.int64), 0
    for t in range(len(starts) - 1):
        a, length = starts[t], starts[t + 1] - starts[t]
        same, before = 0, starts[t - 1] if t else 0
        while t and same < length and before + same < a and text[before + same] == text[a + same]:
            same += 1
        if t:
            for d in range(same, a - before):
                end[path[d]] = n
        for d in range(same, length):
            byte[n], depth[n], path[d], first[n] = text[a + d], d, n, t
            n += 1
    if len(starts) > 1:
        for d in range(starts[-1] - starts[-2]):
            end[path[d]] = n
    first[n] = len(starts) - 1
    return byte, depth, end, first, n


@entry(nogil=True)
def _walk(byte, depth, end, first, order, rows, ready, state, at, states, mask):
    """Mark the tokens that lead somewhere from `state`. Returns (node, state) where a row is missing, or (-1, -1)."""
    states[0] = state
    n = len(byte)
    while at < n:
        d = depth[at]
        if not ready[states[d]]:
            return at, states[d]
        new = rows[states[d], byte[at]]
        if new < 0:
            at = end[at]
            continue
        states[d + 1] = new
        # A node's own tokens come before those below it, and are exactly as long as its path.
        upper = first[at + 1]
        for i in range(first[at], upper):
            mask[order[i]] = True
        at += 1
    return -1, -1


# --- The states of a text that is under way. ---


class Matcher:
    """Follows one text. `allowed(ends)`: bool [vocabulary], what may come next; `advance(token)`: it came."""

    def __init__(self, grammar: Grammar, vocabulary: Vocabulary):
        self.grammar, self.vocabulary = grammar, vocabulary
        self._sets = grammar.sets.astype(bool)
        self._states: list[frozenset] = []
        self._numbers: dict[frozenset, int] = {}
        self._rows, self._ready = np.full((64, 256), -1, np.int32), np.zeros(64, np.bool_)
        self._masks: collections.OrderedDict[int, np.ndarray] = collections.OrderedDict()
        self.state = self._number(self._closure([(grammar.begins[ROOT], None)]))

    @property
    def complete(self) -> bool:
        """Whether the text could end here."""
        return None in self._states[self.state]

    def allowed(self, ends: Iterable[int]) -> np.ndarray:
        """bool [vocabulary]; `ends` are the tokens that end a text, allowed where it is complete."""
        if self.state not in self._masks:
            mask = self._marked(self.state)
            mask[list(ends)] = self.complete
            self._masks[self.state] = mask
            if len(self._masks) > MASKS:
                self._masks.popitem(last=False)
        self._masks.move_to_end(self.state)
        return self._masks[self.state]

    def advance(self, token: int) -> None:
        """Raises UsageError for a token that was not allowed."""
        for byte in self.vocabulary.pieces[token]:
            new = int(self._row(self.state)[byte])
            if new < 0:
                raise UsageError(f"The token {token} does not fit the grammar here.")
            self.state = new

    def _marked(self, state: int) -> np.ndarray:
        v = self.vocabulary
        mask, states, at = np.zeros(v.size, np.bool_), np.zeros(v.deepest, np.int64), 0
        states[0] = state
        while at >= 0:
            at, missing = _walk(
                v.byte, v.depth, v.end, v.first, v.order, self._rows, self._ready, state, at, states, mask
            )
            if at >= 0:
                self._row(missing)
        return mask

    def _row(self, state: int) -> np.ndarray:
        """int32 [256]: the next state for each byte; bytes that the same stacks accept lead to the same one."""
        if not self._ready[state]:
            row = np.full(256, -1, np.int32)
            stacks = [stack for stack in self._states[state] if stack is not None]
            accepts = (
                self._sets[[self.grammar.nodes[stack[0]][1] for stack in stacks]]
                if stacks
                else np.zeros((0, 256), bool)
            )
            kinds, which = np.unique(accepts, axis=1, return_inverse=True)
            for n in range(kinds.shape[1]):
                if kinds[:, n].any():
                    after = [(self.grammar.nodes[s[0]][2], s[1]) for s, is_in in zip(stacks, kinds[:, n]) if is_in]
                    row[which.reshape(-1) == n] = self._number(self._closure(after))
            self._rows[state], self._ready[state] = row, True
        return self._rows[state]

    def _number(self, stacks: frozenset) -> int:
        if stacks not in self._numbers:
            self._numbers[stacks] = len(self._states)
            self._states.append(stacks)
            if len(self._states) > len(self._rows):
                self._rows = np.concatenate([self._rows, np.full_like(self._rows, -1)])
                self._ready = np.concatenate([self._ready, np.zeros_like(self._ready)])
        return self._numbers[stacks]

    def _closure(self, stacks: Iterable[tuple]) -> frozenset:
        """The stacks whose top takes a byte, after all that takes none; None stands for the end. A stack is (node, below)."""
        waiting, seen, out = [(stack, 0) for stack in stacks], set(), set()
        while waiting:
            stack, calls = waiting.pop()
            if stack in seen:
                continue
            seen.add(stack)
            if stack is None:
                out.add(None)
                continue
            (kind, argument, behind), below = self.grammar.nodes[stack[0]], stack[1]
            if kind == BYTE:
                out.add(stack)
            elif kind == SPLIT:
                waiting += [((way, below), calls) for way in argument]
            elif kind == CALL:
                if calls > DEEPEST:
                    raise UsageError(
                        f"The grammar's rule {argument} calls itself before anything is written (left recursion)."
                    )
                is_last = (
                    self.grammar.nodes[behind][0] == RETURN
                )  # a call at the end of a rule leaves nothing to come back to
                waiting.append(((self.grammar.begins[argument], below if is_last else (behind, below)), calls + 1))
            else:
                waiting.append((below, calls))
        return frozenset(out)
