"""The bodies of `organism giant …`: what each command does with a model, and how it is shown.

`asking` is the command line's (organism.py, chapter 12): json, quiet, seed, threads, note(text), result(data, text).
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from organism import OrganismError, UsageError
from organs.giant import pull as pulling
from organs.giant import settings
from organs.giant.gguf import GGUFError, GGUFFile, open_gguf
from organs.giant.settings import LOADING, named, sentences, setting
from organs.giant.template import ChatTemplate
from organs.giant.text import Chat, Generation, Giant
from organs.giant.tokenizer import Tokenizer

for _needed in ("gguf", "tokenizers", "jinja2"):
    if importlib.util.find_spec(_needed) is None:
        raise ImportError(f"{_needed} is not installed", name=_needed)

SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
CHAT_TOKENS = 1024  # of an answer at most, unless told otherwise


def load(asking: Any, model: str | None, **options: Any) -> Giant:
    """The model of this name or path (settings.load)."""
    return settings.load(model, threads=asking.threads, say=asking.note, **options)


def _settings(asking: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The sampling settings among a command's options, or else of the environment, without those that were not given."""
    given = settings.sampling() | {name: options[name] for name in SAMPLING if options.get(name) is not None}
    return given if asking.seed is None else given | {"seed": asking.seed}


# --- pull, info ---


def pull(asking: Any, name: str) -> None:
    """Fetch a model by name."""
    with sentences():
        path = pulling.pull(name, asking.note)
    size = path.stat().st_size
    text = f"{name} is here ({size / 1e6:.1f} MB): `organism giant chat {name}` talks with it."
    asking.result(dict(name=name, path=str(path), bytes=size), text)


def info(asking: Any, model: str | None, context: int | None) -> None:
    """What a model file says of itself."""
    with sentences(), open_gguf(pulling.find(named(model))) as file:
        facts = _facts(file, context)
    if asking.json:
        asking.result(facts)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=facts["name"], show_header=False, title_justify="left")
    for name, value in _card(facts):
        table.add_row(name, value)
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 110).print(table)


def _facts(file: GGUFFile, context: int | None) -> dict[str, Any]:
    architecture = file.architecture
    number = lambda key, default=0: int(file.metadata.get(f"{architecture}.{key}", default))
    formats: dict[str, dict[str, int]] = {}
    for tensor in file.tensors.values():
        row = formats.setdefault(tensor.format, dict(tensors=0, parameters=0, bytes=0))
        row["tensors"] += 1
        row["parameters"] += math.prod(tensor.shape)
        row["bytes"] += tensor.nbytes
    heads = number("attention.head_count", 1)
    kv_heads, head = number("attention.head_count_kv", heads), number("embedding_length") // max(1, heads)
    context = context or number("context_length")
    cache = 2 * 2 * number("block_count") * kv_heads * number("attention.key_length", head) * context
    facts = dict(
        path=str(file.path), bytes=file.nbytes, name=str(file.metadata.get("general.name", file.path.stem)),
        architecture=architecture, parameters=sum(row["parameters"] for row in formats.values()), context=number("context_length"),
        layers=number("block_count"), width=number("embedding_length"), hidden=number("feed_forward_length"), heads=heads,
        kv_heads=kv_heads, license=file.metadata.get("general.license"), formats=formats,
        memory=dict(weights=sum(row["bytes"] for row in formats.values()), kv_cache_f16=cache, at_context=context),
    )  # fmt: skip
    return facts | _spoken(file)


def _spoken(file: GGUFFile) -> dict[str, Any]:
    """Tokenizer and template; what is wrong with them does not keep the rest from being shown."""
    try:
        tokenizer = Tokenizer(file.metadata)
        described = dict(model=tokenizer.model, pre=tokenizer.pre, tokens=tokenizer.vocab_size, add_bos=tokenizer.add_bos,
                         ends=sorted(tokenizer.texts[i] for i in tokenizer.ends))  # fmt: skip
        return dict(tokenizer=described, template=ChatTemplate(file.metadata, tokenizer).name)
    except (GGUFError, OrganismError) as error:
        return dict(tokenizer=dict(error=str(error)), template=None)


def _card(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    memory, tokenizer = facts["memory"], facts["tokenizer"]
    yield "file", f"{facts['path']}, {facts['bytes'] / 1e6:,.1f} MB"
    yield "architecture", f"{facts['architecture']}, {facts['parameters'] / 1e6:,.1f} million parameters"
    yield "shape", (f"{facts['layers']} layers, width {facts['width']}, hidden {facts['hidden']}, "
                    f"{facts['heads']} heads ({facts['kv_heads']} of keys and values)")  # fmt: skip
    yield "context", f"{facts['context']:,} tokens"
    for name, row in sorted(facts["formats"].items(), key=lambda item: -item[1]["bytes"]):
        bits = 8 * row["bytes"] / row["parameters"]
        yield name, f"{row['tensors']} tensors, {row['bytes'] / 1e6:,.1f} MB, {bits:.2f} bits a weight"
    words = [f"{key} {value if not isinstance(value, list) else ' '.join(value)}" for key, value in tokenizer.items()]
    yield "tokenizer", ", ".join(words)
    yield "template", str(facts["template"])
    total = memory["weights"] + memory["kv_cache_f16"]
    yield "memory", (f"about {total / 1e6:,.0f} MB at a context of {memory['at_context']:,}: weights "
                     f"{memory['weights'] / 1e6:,.0f}, keys and values (f16) {memory['kv_cache_f16'] / 1e6:,.0f}")  # fmt: skip
    if facts["license"]:
        yield "license", str(facts["license"])


# --- generate ---


def generate(asking: Any, model: str | None, **options: Any) -> None:
    """Continue a text, or answer it; or write the logits of a prompt."""
    prompt = _prompt(options)
    giant = load(asking, model, **{name: options[name] for name in LOADING})
    try:
        with sentences():
            if options["logits"]:
                _write_logits(asking, giant, giant.prompt(prompt), options["logits"])
                if not options["max_tokens"]:
                    return
            wishes: dict[str, Any] = dict(
                max_tokens=options["max_tokens"] if options["max_tokens"] is not None else 256
            )
            wishes |= dict(stop=options["stop"], grammar=_text_of(options["grammar"]), top_logprobs=options["logprobs"])
            wishes |= dict(json_schema=_schema(options["json_schema"]))
            answer = giant.generate(prompt, **wishes, **_settings(asking, options))
            _show(asking, answer)
    finally:
        giant.close()


def _prompt(options: dict[str, Any]) -> str | list[dict[str, str]]:
    text = options["prompt"] if options["prompt"] is not None else options["text"]
    if text is None or text == "-":
        try:
            text = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"The prompt on standard input is not valid UTF-8 (byte {error.start}).") from error
    if not text.strip() and (options["chat"] or not text):
        raise UsageError("The prompt is empty: give a TEXT, or pipe one in.")
    if not options["chat"]:
        if options["system"]:
            raise UsageError("--system is for --chat: a plain text has no turns.")
        return text
    system = [{"role": "system", "content": options["system"]}] if options["system"] else []
    return [*system, {"role": "user", "content": text}]


def _text_of(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OrganismError(
            f"The file {path!r} cannot be read: {getattr(error, 'strerror', None) or error}."
        ) from error


def _schema(given: str | None) -> Any:
    """A JSON schema from a file, or written out; "any" is any object."""
    if given is None or given == "any":
        return True if given else None
    text = given if given.lstrip().startswith("{") else _text_of(given)
    try:
        return json.loads(text or "")
    except ValueError as error:
        raise UsageError(f"The JSON schema is not valid JSON: {error}.") from error


def _write_logits(asking: Any, giant: Giant, tokens: list[int], path: str) -> None:
    target = Path(path).expanduser()
    try:
        with open(target, "wb") as out:
            np.save(out, giant.logits(tokens), allow_pickle=False)
    except OSError as error:
        raise OrganismError(f"The logits cannot be written to {path}: {error.strerror}.") from error
    asking.note(f"{path}: logits of {len(tokens)} tokens, float32 [{len(tokens)}, {giant.vocab_size}]")


def _show(asking: Any, answer: Generation) -> None:
    """Stream it to a person, or print one object."""
    if not asking.json:
        _stream(answer)
        asking.note(_figures(answer))
        return
    data = dict(
        text=answer.text, tokens=answer.tokens, prompt_tokens=answer.prompt_tokens,
        prefill_tokens_per_s=answer.prefill_tokens_per_s, decode_tokens_per_s=answer.decode_tokens_per_s,
        rss_bytes=resident_bytes(), finish_reason=answer.finish_reason,
    )  # fmt: skip
    if answer.logprobs:
        data["logprobs"] = [
            dict(token=c.token, logprob=c.logprob, top=[list(t) for t in top]) for c, top in answer.logprobs
        ]
    asking.result(data)


def _stream(answer: Generation) -> None:
    started = False
    for piece in answer:
        shown = piece if started else piece.lstrip(" ")
        started = started or bool(shown)
        sys.stdout.write(shown)
        sys.stdout.flush()
    print(flush=True)


def _figures(answer: Generation) -> str:
    read = answer.prompt_tokens - answer.cached_tokens
    ahead = f" in {answer.forwards} steps" if answer.forwards else ""
    return (f"[{read} tokens read at {answer.prefill_tokens_per_s:,.0f}/s, {len(answer.tokens)} written{ahead} at "
            f"{answer.decode_tokens_per_s:,.0f}/s; {answer.finish_reason}]")  # fmt: skip


def resident_bytes() -> int:
    """Memory that this process holds now."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# --- chat ---

_HELP = """/help            this list
/system TEXT     what the model is told to be; starts anew
/clear           forget the conversation
/again           another answer to the last message
/undo            take the last message and its answer back
/set NAME VALUE  temperature, top_k, top_p, min_p, repetition_penalty, max_tokens …; without NAME: show them
/stats           tokens in the context, and the speed of the last answer
/save FILE       the conversation as JSON
/quit            leave (so does Ctrl-D); Ctrl-C stops an answer"""


def chat(asking: Any, model: str | None, **options: Any) -> None:
    """Talk with a model in a terminal or over a pipe."""
    giant = load(asking, model, **{name: options[name] for name in LOADING})
    wishes = _settings(asking, options) | {"max_tokens": options["max_tokens"] or CHAT_TOKENS}
    try:
        with sentences():
            _Talk(asking, giant, options["system"], wishes).run()
    finally:
        giant.close()


class _Talk:
    """Lines in, answers out."""

    def __init__(self, asking: Any, giant: Giant, system: str | None, wishes: dict[str, Any]):
        self.asking, self.giant, self.system = asking, giant, system
        self.terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self.chat = Chat(giant, system, wishes)
        self.last: Generation | None = None

    def run(self) -> None:
        if self.terminal:
            name = self.giant.file.metadata.get("general.name", self.giant.file.path.stem)
            self.asking.note(f"{name}, context {self.giant.context:,} tokens. /help lists commands.")
        for line in self._lines():
            try:
                if line in ("/quit", "/exit", "/q"):
                    return
                if line.startswith("/"):
                    self._show_text(self._command(line))
                elif line.strip():
                    self._answer(line)
            except OrganismError as error:
                if not self.terminal and not self.asking.json:
                    raise
                self._show_error(str(error))

    def _lines(self) -> Iterator[str]:
        if not self.terminal:
            for line in sys.stdin.buffer:
                yield line.rstrip(b"\r\n").decode("utf-8", "replace")
            return
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  line editing for input()
        while True:
            try:
                yield input("> ")
            except EOFError:
                print(flush=True)
                return

    def _answer(self, text: str) -> None:
        answer = self.last = self.chat.say(text)
        if self.chat.forgotten:
            self.asking.note(f"[the context is full: the {self.chat.forgotten} oldest messages were left out]")
        if self.asking.json:
            _show(self.asking, answer)
            return
        try:
            _stream(answer)
        except KeyboardInterrupt as error:
            if not self.terminal or type(error) is not KeyboardInterrupt:
                raise
            answer.cancel()
            answer._pieces.close()  # type: ignore[attr-defined]  what was said so far is kept
            print(" …", flush=True)

    def _command(self, line: str) -> str:
        name, _, rest = line[1:].partition(" ")
        rest = rest.strip()
        commands = {
            "help": lambda: _HELP, "?": lambda: _HELP, "system": lambda: self._restart(rest or None),
            "clear": lambda: self._restart(self.system), "undo": self._undo, "again": self._again, "set": lambda: self._set(rest),
            "stats": self._stats, "save": lambda: self._save(rest),
        }  # fmt: skip
        if name not in commands:
            raise UsageError(f"There is no command /{name}: /help lists them.")
        return commands[name]()

    def _restart(self, system: str | None) -> str:
        self.system = system
        self.chat.messages = [{"role": "system", "content": system}] if system else []
        return "The conversation begins anew."

    def _undo(self) -> str:
        if not self.chat.messages or self.chat.messages[-1]["role"] != "assistant":
            raise UsageError("There is nothing to take back yet.")
        del self.chat.messages[-2:]
        return "The last message and its answer are taken back."

    def _again(self) -> str:
        if not self.chat.messages or self.chat.messages[-1]["role"] != "assistant":
            raise UsageError("There is no answer yet to give again.")
        text = self.chat.messages[-2]["content"]
        self._undo()
        self._answer(text)
        return ""

    def _set(self, text: str) -> str:
        name, _, value = text.partition(" ")
        if name:
            from organs.giant.sampling import Sampling

            try:
                number: float = int(value) if value.strip().lstrip("-").isdigit() else float(value)
            except ValueError:
                raise UsageError(f"/set {name} needs a number, as in /set temperature 0.7.") from None
            if name != "max_tokens":
                Sampling.of(**{name: number})
            elif number < 1 or number != int(number):
                raise UsageError("max_tokens is a whole number, 1 or more.")
            self.chat.options[name] = number
        return ", ".join(f"{key} {value}" for key, value in self.chat.options.items())

    def _stats(self) -> str:
        used = f"{len(self.chat.session.tokens):,} of {self.giant.context:,} tokens in the context"
        return f"{used}. {_figures(self.last)}" if self.last else f"{used}."

    def _save(self, path: str) -> str:
        if not path:
            raise UsageError("Where to? /save FILE")
        try:
            text = json.dumps(self.chat.messages, ensure_ascii=False, indent=1)
            Path(path).expanduser().write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise OrganismError(f"{path} cannot be written: {error.strerror}.") from error
        return f"{len(self.chat.messages)} messages are in {path}."

    def _show_text(self, text: str) -> None:
        if text:
            self.asking.result(dict(text=text), text)

    def _show_error(self, text: str) -> None:
        if self.asking.json:
            self.asking.result(dict(error=text))
        else:
            print(f"error: {text}", file=sys.stderr, flush=True)


# --- plan ---


def plan(asking: Any, model: str | None, ram: float | None, vram: float | None, device: str | None, context: int | None,
         kv_cache: str | None) -> None:  # fmt: skip
    """What of a model fits, how it should be loaded, and how fast that will be."""
    from organs.giant import plan as planning
    from organs.giant.accelerator import Accelerator, device_of
    from organs.giant.giant import default_threads

    path = pulling.find(named(model))
    with sentences(), open_gguf(path) as file:
        kind = device_of(device or setting("DEVICE") or "auto")
        ram, vram = ram or setting("RAM", float), vram or setting("VRAM", float)
        trained = int(file.metadata.get(f"{file.architecture}.context_length", settings.CONTEXT))
        context = context or setting("CONTEXT", int) or min(trained, settings.CONTEXT)
        sizes = planning.Sizes.of(file, context, kv_cache or setting("KV_CACHE") or "f16")
        accelerator = None if kind == "cpu" else Accelerator(kind, int(1e9 * vram) if vram else None)
        machine = planning.measured(file, sizes, asking.threads or default_threads(), accelerator, 1e9 * ram if ram else None,
                                    1e9 * vram if vram else None)  # fmt: skip
    found = list(planning.choices(sizes, machine))
    best = planning.best_of(found)
    result = dict(offload=best.offload if best else None, context=context, machine=asdict(machine),
                  choices=[asdict(choice) for choice in found])  # fmt: skip
    asking.result(result, "\n".join(_plan_lines(machine, context, found, best)))
    if best is None:
        there = f" and {machine.vram / 1e9:.1f} GB of an accelerator" if machine.vram else ""
        raise OrganismError(
            f"{path.name} does not fit into {machine.ram / 1e9:.1f} GB{there} in any way: take a smaller model or format."
        )


def _plan_lines(machine: Any, context: int, found: list[Any], best: Any) -> Iterator[str]:
    yield (f"{machine.ram / 1e9:.1f} GB of memory at {machine.bandwidth / 1e9:.1f} GB/s"
           + (f", {1e3 * (machine.disk.first + machine.disk.each):.1f} ms to read an expert" if machine.disk else "")
           + f", context {context:,}")  # fmt: skip
    if machine.vram:
        speeds = machine.speeds
        measured = "no accelerator here, so its speed is not known" if math.isnan(speeds.weights) else (
            f"quantised weights at {speeds.weights / 1e9:.2f} GB/s, copies to it at {speeds.link / 1e9:.1f} GB/s")  # fmt: skip
        yield f"{machine.vram / 1e9:.1f} GB of an accelerator: {measured}"
    for choice in found:
        where = f"{choice.memory / 1e9:.2f} GB" + (f" + {choice.vram / 1e9:.2f} GB there" if machine.vram else "")
        fit = "fits" if choice.fits else "does not fit"
        speed = (
            "" if math.isnan(choice.tokens_per_s) or not choice.fits else f", about {choice.tokens_per_s:.1f} tokens/s"
        )
        yield f"{'→' if choice is best else ' '} --offload {choice.offload}: {where}, {fit}{speed} ({choice.reason})"


# --- bench, perplexity, convert ---


def bench(asking: Any, model: str | None, prompt: int | None, generate: int | None, rounds: int | None, context: int | None,
          **loading: Any) -> None:  # fmt: skip
    """Speed of reading and writing, best of some rounds, beside what the machine could do."""
    n, m = prompt or 128, generate or 64
    giant = load(asking, model, context=context or n + m + 1, **loading)
    try:
        with sentences():
            result = _measured(asking, giant, n, m, rounds or 3)
    finally:
        giant.close()
    text = (
        f"prefill {n} tokens: {result['prefill_tokens_per_s']:,.0f} tokens/s "
        f"({result['prefill_gflop_per_s']:,.0f} GFLOP/s; sgemm here: {result['sgemm_gflop_per_s']:,.0f})\n"
        f"decode {m} tokens at context {n}: {result['decode_tokens_per_s']:,.1f} tokens/s "
        f"(reads {result['read_gb_per_s']:.1f} GB/s, {result['read_share']:.0%} of the {result['read_roof_gb_per_s']:.1f} GB/s here)"
    )
    asking.result(result, text)


def _measured(asking: Any, giant: Giant, n: int, m: int, rounds: int) -> dict[str, Any]:
    from organs.giant.roofs import read_roof

    tokens = [1 + i * 7919 % (giant.vocab_size - 1) for i in range(n)]
    giant.prefixes.limit = 0  # each round reads the whole prompt
    best_prefill = best_decode = math.inf
    for number in range(rounds + 1):  # the first warms up
        session = giant.session()
        began = time.perf_counter()
        logits = session.feed(tokens)
        prefill = time.perf_counter() - began
        began = time.perf_counter()
        for _ in range(m):
            logits = session.feed([int(logits.argmax())])
        decode = time.perf_counter() - began
        session.close()
        if number:
            best_prefill, best_decode = min(best_prefill, prefill), min(best_decode, decode)
            asking.note(f"round {number}: prefill {n / prefill:,.0f}, decode {m / decode:,.1f} tokens/s")
    weights = sum(t.nbytes for t in giant.file.tensors.values())
    parameters = sum(math.prod(t.shape) for t in giant.file.tensors.values())
    roof, sgemm = read_roof(max(weights, 64 << 20), giant.threads), _sgemm_gflop_per_s()
    read = weights * m / best_decode / 1e9
    return dict(
        prefill_tokens_per_s=n / best_prefill, decode_tokens_per_s=m / best_decode, prompt=n, generate=m, threads=giant.threads,
        read_gb_per_s=read, read_roof_gb_per_s=roof, read_share=read / roof,
        prefill_gflop_per_s=2 * parameters * n / best_prefill / 1e9, sgemm_gflop_per_s=sgemm, rss_bytes=resident_bytes(),
    )  # fmt: skip


def _sgemm_gflop_per_s(n: int = 1024) -> float:
    """What NumPy's float32 product reaches here, with all its threads: the roof of products in floating point."""
    a, best = np.ones((n, n), np.float32), math.inf
    for _ in range(6):
        began = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best / 1e9


def perplexity(asking: Any, model: str | None, file: str, window: int | None, **loading: Any) -> None:
    """How well a model predicts a text."""
    try:
        data = Path(file).expanduser().read_bytes()
        text = data.decode("utf-8")
    except OSError as error:
        raise OrganismError(f"The file {file!r} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise OrganismError(f"The file {file!r} is not valid UTF-8 (byte {error.start}).") from error
    giant = load(asking, model, context=window or 512, **loading)
    began = time.perf_counter()
    try:
        with sentences():
            tokens = giant.tokenize(text)
            nll, counted = giant.score(
                tokens, window, lambda n, mean: asking.note(f"{n:,} tokens: {math.exp(mean):.4f}")
            )
    finally:
        giant.close()
    bits = nll / counted * len(tokens) / len(data) / math.log(2)
    result = dict(perplexity=math.exp(nll / counted), nll=nll / counted, bits_per_byte=bits, tokens=counted,
                  window=window or 512, seconds=time.perf_counter() - began)  # fmt: skip
    asking.result(result)


def convert(asking: Any, source: str, out: str, type: str | None) -> None:
    """Write a GGUF of a Hugging Face folder or of another GGUF."""
    from organs.giant.convert import convert as write

    given = pulling.find(source) if not Path(source).expanduser().is_dir() else Path(source).expanduser()
    began = time.perf_counter()
    with sentences():
        facts = write(given, Path(out).expanduser(), type or "f16", asking.note)
    facts["seconds"] = time.perf_counter() - began
    text = f"{out}: {facts['tensors']} tensors, {facts['bytes'] / 1e6:,.1f} MB, {facts['bits_per_weight']:.2f} bits a weight"
    asking.result(facts, text)
