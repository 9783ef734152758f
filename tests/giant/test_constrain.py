"""Constrained output: grammars and JSON schemas against parsers that know nothing of them.

Run alone: pytest -n 0 tests/giant/test_constrain.py
"""

from __future__ import annotations

import json
import random
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from organism import UsageError
from organs.giant.constrain import Matcher, Vocabulary, _utf8, json_rules, parse

PIECES = [bytes([b]) for b in range(256)] + [
    b'{"', b'":', b'": "', b'", "', b'"}', b"true", b"null", b"name", b"age", b"12", b"3.5", b"[]", b"}, ", "é".encode(), "本本".encode(),
    b" \n", b"", b"ab", b"abc", b"abcd",
]  # fmt: skip
END = PIECES.index(b"")
VOCABULARY = Vocabulary(PIECES, len(PIECES))


def matches(grammar, text: str | bytes) -> bool:
    """Whether the grammar takes exactly this text, byte by byte."""
    matcher = Matcher(grammar, VOCABULARY)
    for byte in text.encode() if isinstance(text, str) else text:
        if not matcher.allowed([END])[byte]:
            return False
        matcher.advance(byte)
    return bool(matcher.allowed([END])[END])


def written(grammar, seed: int, most: int = 400) -> str:
    """A text drawn from whatever is allowed; near the end, what ends soonest is preferred."""
    chance, matcher, out = random.Random(seed), Matcher(grammar, VOCABULARY), b""
    for n in range(most):
        allowed = np.flatnonzero(matcher.allowed([END]))
        assert len(allowed), out
        if END in allowed and (n > 60 or len(allowed) == 1 or chance.random() < 0.3):
            return out.decode()
        closing = [t for t in allowed if PIECES[t] in (b'"', b"}", b"]", b'"}', b"[]", b'":', b"null", b"true")]
        token = int(chance.choice(closing if n > 40 and closing else [t for t in allowed if t != END] or closing))
        matcher.advance(token)
        out += PIECES[token]
    return ""


# --- Grammars. ---


@pytest.mark.parametrize(
    ("grammar", "yes", "no"),
    [
        ('root ::= "yes" | "no"', ["yes", "no"], ["ye", "yesno", ""]),
        ("root ::= [a-c]{2,3}", ["ab", "abc"], ["a", "abca", "ad"]),
        ("root ::= [^a-c\\n]+", ["x", "é本"], ["", "xa", "x\n"]),
        ('root ::= ("a" b)* "c"? # said\nb ::= "b"+', ["", "ab", "abbabc", "c"], ["a", "cc", "ba"]),
        ('root ::= "(" root ")" | "x"', ["x", "((x))"], ["((x)", ")"]),
        ('root ::= . . "\\"" "\\u00e9"', ['é本"é', 'ab"é'], ['a"é']),
        ('root ::= "\\x41\\n" [\\]\\-]', ["A\n]", "A\n-"], ["A\n"]),
        ("root ::= [а-я]{0,2}", ["", "мы"], ["wе", "мир"]),
    ],
)
def test_a_grammar_takes_what_it_describes_and_nothing_else(grammar, yes, no):
    rules = parse(grammar)
    assert all(matches(rules, text) for text in yes) and not any(matches(rules, text) for text in no)


@given(st.integers(0, 0x10FFFF), st.integers(0, 0x10FFFF), st.integers(0, 0x10FFFF))
def test_ranges_of_characters_are_spelled_exactly_in_utf8(first, last, probe):
    first, last = min(first, last), max(first, last)
    probe = probe if not 0xD800 <= probe < 0xE000 else 65
    for code in (probe, first, last):
        if 0xD800 <= code < 0xE000:
            continue
        spelled = chr(code).encode()
        found = sum(
            len(way) == len(spelled) and all(a <= b <= c for b, (a, c) in zip(spelled, way))
            for way in _utf8(first, last)
        )
        assert found == (first <= code <= last)


@given(st.text(alphabet="abcd", max_size=8))
def test_the_mask_is_what_a_regular_expression_says_of_every_token(text):
    rules, pattern = parse('root ::= ("ab" | "abc" "d"? | "b")* '), re.compile(r"(?:ab|abcd?|b)*")
    matcher = Matcher(rules, VOCABULARY)
    done = ""
    for letter in text:
        mask = matcher.allowed([END])
        assert mask[END] == bool(pattern.fullmatch(done))
        for token in (b"ab", b"abc", b"abcd", b"a", b"b", b"c", b"d"):
            candidate = done + token.decode()
            alive = any(pattern.fullmatch(candidate + tail) for tail in ("", "b", "bc", "c", "d"))
            assert mask[PIECES.index(token)] == alive, (done, token)
        if not mask[ord(letter)]:
            return
        matcher.advance(ord(letter))
        done += letter


def test_half_a_character_is_followed_by_its_other_half():
    matcher = Matcher(parse("root ::= [é-ë]"), VOCABULARY)
    matcher.advance("é".encode()[0])
    assert set(np.flatnonzero(matcher.allowed([END]))) == {0xA9, 0xAA, 0xAB}


@pytest.mark.parametrize(
    ("grammar", "sentence"),
    [
        ("", "no rule called root"),
        ('"a"', "begins without a rule"),
        ("root ::= a", "uses the rule a, which it does not have"),
        ('root ::= ("a"', "never closed"),
        ('root ::= "a")', r"a \) too many"),
        ('root ::= "a', "not understood in line 1"),
        ("root ::= * ", "nothing before it"),
        ('root ::= "a"{5000}', "at most 2000"),
        ('root ::= "a"{3,2}', "no less than the least"),
        ("root ::= [z-a]", "runs backwards"),
        ("root ::= []", "empty class"),
        ('root ::= "a"\nroot ::= "b"', "the rule root twice"),
        ('root ::= (("a"{2000}){2000}){2000}', "too large"),
    ],
)
def test_a_broken_grammar_is_one_sentence(grammar, sentence):
    with pytest.raises(UsageError, match=sentence):
        parse(grammar)


def test_left_recursion_is_one_sentence():
    with pytest.raises(UsageError, match="left recursion"):
        Matcher(parse('root ::= root "a" | "b"'), VOCABULARY)


def test_a_token_that_was_not_allowed_is_an_error():
    with pytest.raises(UsageError, match="does not fit"):
        Matcher(parse('root ::= "a"'), VOCABULARY).advance(ord("b"))


# --- JSON. ---

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0},
        "dead": {"type": "boolean"},
    },
    "required": ["name", "age"],
}
TREE = {"$ref": "#/$defs/node", "$defs": {"node": {
    "type": "object", "properties": {"v": {"enum": [1, "é", None]}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
    "required": ["v", "next"]}}}  # fmt: skip


@pytest.mark.parametrize(
    ("schema", "yes", "no"),
    [
        (True, ["{}", '{"a": [1, {"b": -2.5e3}], "c": "\\u00e9\\n"}'], ["[]", "{", '{"a"}', '{"a": 01}', '{"a": "\n"}']),
        (PERSON, ['{"name": "Ann", "age": 3}', '{"name":"","age":0,"dead":true}'],
         ['{"age": 3, "name": "Ann"}', '{"name": "Ann"}', '{"name": "Ann", "age": -3}', '{"name": "123456789", "age": 3}',
          '{"name": "A", "age": 3, "x": 1}']),
        (TREE, ['{"v": 1, "next": {"v": "é", "next": null}}'], ['{"v": 2, "next": null}']),
        ({"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 3}, ["[1, 2]", "[1,2,3]"], ["[1]", "[1,2,3,4]", "[]"]),
        ({"type": "array", "items": {"type": "null"}, "maxItems": 1}, ["[]", "[null]"], ["[null, null]"]),
        ({"type": "array", "prefixItems": [{"type": "string"}, {"type": "number"}], "items": False}, ['["a", 1.5]'],
         ['["a"]', '["a", 1, 2]']),
        ({"type": ["string", "null"]}, ['"x"', "null"], ["1"]),
        ({"type": "integer", "minimum": -1, "maximum": 2}, ["-1", "2"], ["3", "-2"]),
        ({"properties": {"a": {"type": "null"}, "b": {"type": "null"}}}, ["{}", '{"a": null}', '{"b": null}', '{"a": null, "b": null}'],
         ['{"b": null, "a": null}', '{"a": null,}']),
        ({"type": "object", "additionalProperties": {"type": "integer"}}, ["{}", '{"a": 1, "b": 2}'], ['{"a": "x"}']),
        ({"allOf": [{"properties": {"a": {"const": 1}}}, {"properties": {"b": {"const": 2}}, "required": ["b"]}]},
         ['{"a": 1, "b": 2}', '{"b": 2}'], ['{"a": 1}']),
    ],
    ids=lambda value: json.dumps(value)[:30] if not isinstance(value, list) else "",
)  # fmt: skip
def test_a_schema_takes_its_own_texts(schema, yes, no):
    rules = json_rules(schema)
    assert [text for text in yes if not matches(rules, text)] == []
    assert [text for text in no if matches(rules, text)] == []


@pytest.mark.parametrize("schema", [True, PERSON, TREE], ids=["any", "person", "tree"])
def test_whatever_is_written_is_json_of_the_schema(schema):
    rules = json_rules(schema)
    texts = [written(rules, seed) for seed in range(30)]
    assert sum(map(bool, texts)) >= 15
    for text in filter(None, texts):
        data = json.loads(text)
        assert isinstance(data, dict)
        if schema is PERSON:
            assert set(data) <= {"name", "age", "dead"} and isinstance(data["age"], int) and data["age"] >= 0
        if schema is TREE:
            assert data["v"] in (1, "é", None)


@pytest.mark.parametrize(
    ("schema", "sentence"),
    [
        ({"type": "string", "pattern": "a+"}, "'pattern' at the schema"),
        ({"type": "thing"}, "type 'thing'"),
        ({"$ref": "#/nowhere"}, "refers to '#/nowhere'"),
        ({"type": "number", "minimum": 0.5}, "bounds a number"),
        ({"properties": {"a": 3}}, "has 3 at the schema/a"),
    ],
)
def test_a_schema_that_cannot_be_promised_is_one_sentence(schema, sentence):
    with pytest.raises(UsageError, match=sentence):
        json_rules(schema)
