"""Chat templates: messages in, a prompt out, by the Jinja template that the model file carries.

A template is a program from a stranger. It runs in Jinja's immutable sandbox, with a short list of what it may call, a
budget of steps (every turn of a loop and every call costs one) and a bound on the size of every text; whatever goes beyond
is a TemplateError. What it cannot do at all: import, include, reach for attributes that begin with an underscore.

What people and tools said is data. Before the template sees it, each letter that could begin a control token is followed
by `GUARD`, which the tokenizer's caller takes out again after the control tokens were found (`tokenize_prompt`). So the
template writes <|im_start|>, and nobody else can, whatever the template does with their words.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from organism import OrganismError, UsageError
from organs.giant.tokenizer import Tokenizer

GUARD = "\ufdd0"  # a noncharacter of Unicode: no text that was meant to be exchanged holds it
MOST_STEPS = 200_000  # turns of loops and calls
MOST_CHARS = 8_000_000  # of any text that comes up
MOST_SOURCE = 1_000_000  # characters of the template itself
METHODS = {  # of strings, lists and dictionaries: what templates in use call
    "capitalize", "count", "endswith", "find", "index", "isalpha", "isdigit", "isspace", "join", "lower", "lstrip",
    "partition", "removeprefix", "removesuffix", "replace", "rfind", "rpartition", "rsplit", "rstrip", "split", "splitlines",
    "startswith", "strip", "title", "upper", "get", "items", "keys", "values", "strftime",
}  # fmt: skip
FILTERS = {
    "abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "groupby", "int", "items",
    "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "replace", "reverse", "round", "safe",
    "select", "selectattr", "slice", "sort", "string", "sum", "title", "trim", "unique", "upper",
}  # fmt: skip


class TemplateError(OrganismError):
    """A chat template that is broken, refuses these messages, or does what templates may not."""


# Files without a template: the shape is known by the control tokens that the vocabulary holds.
_TURN = "{% for m in messages %}"
_FALLBACKS = [  # (a control token, name, template)
    ("<|im_start|>", "ChatML",
     _TURN + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
     "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"),
    ("<|start_header_id|>", "Llama 3",
     "{{ bos_token }}" + _TURN + "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
     "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"),
    ("<start_of_turn>", "Gemma",
     "{{ bos_token }}" + _TURN + "<start_of_turn>{{ 'model' if m.role == 'assistant' else 'user' }}\n"
     "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"),
    ("[INST]", "Mistral",
     "{{ bos_token }}" + _TURN + "{% if m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
     "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"),
    ("<|user|>", "Zephyr",
     _TURN + "<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
     "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"),
]  # fmt: skip
_PLAIN = (
    "{{ bos_token }}" + _TURN + "{% if m.role == 'system' %}{{ m.content }}\n\n{% else %}"
    "{{ 'Assistant' if m.role == 'assistant' else 'User' }}: {{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


class ChatTemplate:
    """The template of one model. `name` says which ("the file's own", or a fall-back); `stops` are texts that end a turn
    where the model has no token for that."""

    def __init__(self, metadata: Mapping[str, Any], tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        source = metadata.get("tokenizer.chat_template")
        if source is not None and not isinstance(source, str):
            raise TemplateError(f"The file's tokenizer.chat_template is {type(source).__name__}, not a text.")
        self.name, self.source, self.stops = "the file's own", source or "", ()
        if not self.source:
            known = {*tokenizer.markers, *tokenizer.always}
            found = next(((n, t) for marker, n, t in _FALLBACKS if marker in known), ("plain turns", _PLAIN))
            self.name, self.source = found
            self.stops = ("\nUser:",) if self.source is _PLAIN else ()
        if len(self.source) > MOST_SOURCE:
            raise TemplateError(f"The chat template has {len(self.source):,} characters: too many to be one.")
        self._begins = _beginnings([*tokenizer.markers, *(t for t in tokenizer.always if t.startswith("<|"))])

    @functools.cached_property
    def _compiled(self):
        return _Sandbox.compiled(self.source)

    def render(self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Any] | None = None, generate: bool = True,
               **extra: Any) -> str:  # fmt: skip
        """The prompt, guarded (see above). generate: end it where the assistant's answer begins. extra: the template's own
        variables. Raises UsageError for messages that are none, TemplateError."""
        given = dict(
            messages=[self._guarded(m, m["role"] == "assistant") for m in _checked(messages)],
            tools=self._guarded(list(tools)) if tools else None,
            add_generation_prompt=generate, bos_token=self._text(self.tokenizer.bos), eos_token=self._text(self.tokenizer.eos),
            **extra,
        )  # fmt: skip
        return _Sandbox.run(self._compiled, given)

    def tokenize(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """The prompt as tokens, BOS included where the model expects it."""
        return self.tokenize_prompt(self.render(messages, **options))

    def tokenize_prompt(self, prompt: str) -> list[int]:
        """Tokens of a rendered prompt: control tokens are found first, then the guards go."""
        out: list[int] = []
        after_marker = True
        for part in self.tokenizer._parts(prompt, special=True):
            if isinstance(part, int):
                out.append(part)
            elif part:
                out += self.tokenizer._engine.encode(part.replace(GUARD, ""), after_marker)
            after_marker = isinstance(part, int)
        bos = self.tokenizer.bos
        return [bos, *out] if self.tokenizer.add_bos and bos is not None and out[:1] != [bos] else out

    def _text(self, token: int | None) -> str:
        return "" if token is None else self.tokenizer.texts[token]

    def _guarded(self, value: Any, thinks: bool = False) -> Any:
        """The same value, where no text holds a control token any more. thinks: it is the assistant's, whose <think> and
        </think> stay whole, because templates look for them."""
        if isinstance(value, str):
            value = value.replace(GUARD, "\ufffd")
            but = "(?!/?think>)" if thinks else ""
            return re.sub(f"({self._begins}){but}", rf"\1{GUARD}", value)
        if isinstance(value, Mapping):
            return {self._guarded(key): self._guarded(v, thinks) for key, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._guarded(v, thinks) for v in value]
        return value


def _beginnings(markers: list[str]) -> str:
    """A pattern of the letters with which a control token may begin: a sign anywhere, a letter only before the rest of it."""
    signs = sorted({re.escape(text[0]) for text in markers if not text[0].isalnum()})
    words = [f"{re.escape(text[0])}(?={re.escape(text[1:])})" for text in markers if text[0].isalnum()]
    return "|".join([*signs, *words]) or "(?!)"


def _checked(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if isinstance(messages, (str, bytes, Mapping)) or not messages:
        raise UsageError("There is nothing to answer: give at least one message, as {'role': 'user', 'content': '…'}.")
    for n, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UsageError(f"Message {n} is not a dictionary with a role and a content.")
        content = message.get("content")
        if content is None and not message.get("tool_calls"):
            raise UsageError(f"Message {n} ({message['role']}) has no content.")
        if content is not None and not isinstance(content, (str, list)):
            raise UsageError(f"The content of message {n} ({message['role']}) is {type(content).__name__}, not a text.")
    return [{"content": "", **m} if m.get("content") is None else dict(m) for m in messages]


# --- The sandbox. ---


class _Sandbox:
    """Jinja's immutable sandbox with a budget. Built when first used: jinja2 takes a moment to import."""

    @staticmethod
    @functools.cache
    def environment():
        import jinja2
        from jinja2 import nodes
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        class Environment(ImmutableSandboxedEnvironment):
            intercepted_binops = frozenset(["+", "*", "**", "%"])
            intercepted_unops = frozenset()

            def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
                safe = super().is_safe_attribute(obj, attr, value)
                return safe and (attr in METHODS or not callable(value) or isinstance(obj, jinja2.runtime.LoopContext))

            def call(__self, __context, __obj, *args, **kwargs):
                __self.step()
                _watch_call(__obj, args)
                return _sized(super().call(__context, __obj, *args, **kwargs))

            def call_binop(self, context, operator, left, right):
                _watch_operator(operator, left, right)
                return _sized(super().call_binop(context, operator, left, right))

            def step(self) -> str:
                """One turn of a loop, or one call."""
                self.steps += 1
                if self.steps > MOST_STEPS:
                    raise TemplateError(f"The chat template did not end within {MOST_STEPS:,} steps: it loops.")
                return ""

            def join_texts(self, *values: Any) -> str:
                """`a ~ b`, measured."""
                texts = [str(v) for v in values]
                _measure(sum(map(len, texts)))
                return "".join(texts)

            def _parse(self, source, name, filename):
                tree = super()._parse(source, name, filename)
                for forbidden in (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends):
                    if tree.find(forbidden):
                        raise TemplateError("The chat template asks for other files, which templates may not.")
                _counted(tree, nodes)
                return tree

        environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _generation_tag()])
        environment.steps = 0
        environment.filters = {name: environment.filters[name] for name in FILTERS} | {
            "tojson": _to_json, "indent": _indented, "replace": _replaced, "join": _joined,
        }  # fmt: skip
        environment.globals = {
            "range": environment.globals["range"], "namespace": environment.globals["namespace"],
            "dict": dict, "raise_exception": _refuse, "strftime_now": lambda shape: datetime.datetime.now().strftime(shape),
        }  # fmt: skip
        return environment

    @classmethod
    def compiled(cls, source: str):
        import jinja2

        try:
            return cls.environment().from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise TemplateError(f"The chat template is not valid: {_reason(error)}.") from error

    @classmethod
    def run(cls, template: Any, given: dict[str, Any]) -> str:
        import jinja2

        cls.environment().steps = 0
        out, size = [], 0
        try:
            for piece in template.generate(**given):
                size += len(piece)
                _measure(size)
                out.append(piece)
        except TemplateError:
            raise
        except (jinja2.TemplateError, RecursionError, MemoryError) as error:
            raise TemplateError(f"The chat template refused: {_reason(error)}.") from error
        except (TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError) as error:
            raise TemplateError(f"The chat template failed on these messages: {_reason(error)}.") from error
        return "".join(out)


def _counted(tree: Any, nodes: Any) -> None:
    """Make every loop count its turns, and measure what `~` joins."""

    def call(name: str, arguments: list) -> Any:
        return nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None)

    for loop in tree.find_all(nodes.For):
        loop.body.insert(0, nodes.Output([call("step", [])], lineno=loop.lineno))
    for node in list(tree.find_all(nodes.Node)):
        for field, value in node.iter_fields():
            if isinstance(value, nodes.Concat):
                setattr(node, field, call("join_texts", value.nodes))
            elif isinstance(value, list):
                value[:] = [call("join_texts", v.nodes) if isinstance(v, nodes.Concat) else v for v in value]
    tree.set_environment(tree.environment)


@functools.cache
def _generation_tag():
    """`{% generation %}…{% endgeneration %}`, which marks the assistant's words for training: here, just its content."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body)

    return Generation


def _measure(size: int) -> None:
    if size > MOST_CHARS:
        raise TemplateError(
            f"The chat template makes a text of more than {MOST_CHARS:,} characters: it does not end well."
        )


def _sized(value: Any) -> Any:
    if isinstance(value, (str, list, tuple, dict)):
        _measure(len(value))
    return value


def _watch_call(function: Any, arguments: tuple) -> None:
    """Before a method that could make much out of little."""
    text, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
    if name == "replace" and isinstance(text, str) and len(arguments) > 1:
        _measure_replace(text, str(arguments[0]), str(arguments[1]))
    elif name == "join" and isinstance(text, str) and arguments and hasattr(arguments[0], "__len__"):
        _measure(len(text) * len(arguments[0]))


def _measure_replace(text: str, old: str, new: str) -> None:
    _measure(len(text) + text.count(old) * len(new))


def _watch_operator(operator: str, left: Any, right: Any) -> None:
    sizes = [len(v) for v in (left, right) if isinstance(v, (str, list, tuple))]
    if operator == "*" and sizes:
        times = right if isinstance(left, (str, list, tuple)) else left
        _measure(sizes[0] * times if isinstance(times, int) else 0)
    elif operator == "+":
        _measure(sum(sizes))
    elif operator == "%" and isinstance(left, str) and re.search(r"%[-+ #0]*(\d{4,}|\*)", left):
        raise TemplateError("The chat template formats a text wider than any line.")
    elif operator == "**" or (operator == "*" and not sizes):
        if any(isinstance(v, (int, float)) and abs(v) > 10**6 for v in (left, right)):
            raise TemplateError("The chat template counts further than any chat needs.")


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None,
             sort_keys: bool = False) -> str:  # fmt: skip
    """JSON as transformers writes it: without escapes for HTML."""
    if indent is not None and not 0 <= int(indent) <= 16:
        raise TemplateError(f"The chat template indents JSON by {indent}.")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _indented(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    pad = width if isinstance(width, str) else " " * min(int(width), 200)
    lines = str(text).split("\n")
    _measure(len(lines) * len(pad) + len(text))
    return "\n".join(pad + l if (n or first) and (l or blank) else l for n, l in enumerate(lines))


def _joined(values: Any, between: str = "", attribute: str | None = None) -> str:
    texts = [str(v.get(attribute, "") if attribute and isinstance(v, Mapping) else v) for v in values]
    _measure(sum(map(len, texts)) + len(str(between)) * len(texts))
    return str(between).join(texts)


def _replaced(text: str, old: str, new: str, count: int | None = None) -> str:
    _measure_replace(str(text), str(old), str(new))
    return str(text).replace(str(old), str(new), -1 if count is None else count)


def _refuse(message: str) -> None:
    raise TemplateError(f"The chat template refused: {message}")


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
