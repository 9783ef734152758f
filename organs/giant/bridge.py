"""The bridge between a giant and an organism: the giant answers with what the organism remembers in its context, the
organism reads along and learns. Used by `organism chat --giant`, `say --giant`, `consult` and `distill`.

The giant knows language and the world, but not this user; the organism knows the user. So each message is answered from:
a system text with the sentences that memory finds for it (what the user said first, then what was read), the last turns
of the conversation, of this session or an earlier one, and the message itself.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import organism
from organism import Memory, Organism, Reply, UsageError, Voice
from organs.giant import settings
from organs.giant.text import Generation, Giant

for _needed in ("gguf", "tokenizers", "jinja2"):
    if importlib.util.find_spec(_needed) is None:
        raise ImportError(f"{_needed} is not installed", name=_needed)

CONTEXT = (
    2048  # tokens, unless the environment says how many: recall and the last turns fit, and reading them stays quick
)
RECALLED = 5  # remembered sentences that join the prompt
MATCH = 0.34  # least score of a sentence that is worth the giant's attention
SMALL = 1 << 30  # bytes of a model up to which it is helped to keep to what is remembered
WHISPER = 3.0  # added, for a small one, to the logits of words that such a sentence has and the question lacks
TURN_CHARS = 600  # of each remembered turn
ANSWER_TOKENS = 320
_WORD = re.compile(r"\w+(?:['’-]\w+)*")
ROLE = "You are a helpful assistant who remembers the user. Answer briefly and truthfully."
KNOWN = 'What the user told you earlier, word for word ("I" is the user):'
READ = "What you have read about this:"


def advisor(model: str, *, name: str = "giant", seed: int | None = None, **loading: Any) -> Advisor:
    """A giant by its path or its pulled name, loaded and sampling as the environment wants (settings.py).

    loading: as settings.load takes it. Raises OrganismError in one sentence.
    """
    return Advisor(settings.load(model, **{"most": CONTEXT} | loading), name, seed, **settings.sampling())


def teacher(spec: str, *, seed: int | None = None, **loading: Any) -> Advisor:
    """An advisor by its SPEC: gguf:PATH, where PATH may be the name of a pulled model. Raises UsageError."""
    kind, colon, rest = spec.partition(":")
    if kind in ("organism", "openai") and colon:
        raise UsageError(f"Teachers of the kind {kind!r} arrive with TEACH: use gguf:PATH for now.")
    if kind != "gguf" or not rest:
        raise UsageError(f"The teacher {spec!r} is not understood: write gguf:PATH, for example gguf:smollm2.")
    return advisor(rest, name=spec, seed=seed, **loading)


class Advisor:
    """A giant beside one organism. `reply` answers a message in the organism's place; `complete` is the teacher's side.

    name: how the teacher is named as a source of what is learned.
    """

    def __init__(self, giant: Giant, name: str = "giant", seed: int | None = None, **sampling: Any):
        self.giant, self.name = giant, name
        self.sampling = {
            "temperature": 0.2,  # a small model leaves what it was told as soon as it is warm
            "repetition_penalty": 1.02,  # more would punish the very words that it is to remember
            "max_tokens": ANSWER_TOKENS,
            "seed": seed,
        } | sampling
        self.session = giant.session()

    @property
    def title(self) -> str:
        """What the model calls itself."""
        return str(self.giant.file.metadata.get("general.name", self.giant.file.path.stem))

    def close(self) -> None:
        """Give the model's memory back."""
        self.session.close()
        self.giant.close()

    def complete(self, messages: Sequence[Mapping[str, Any]], **sampling: Any) -> Iterator[str]:
        """Pieces of the giant's answer to messages."""
        return iter(self.giant.generate(messages, **{**self.sampling, **sampling}))

    def reply(self, life: Organism, text: str, asked: int) -> Reply:
        """A Reply that the giant gives; `asked` is the message's number in memory. It streams when it is iterated."""
        surprise = Voice(life.published, life.config, life.voice_rng).surprise(text)
        remembered = recall(life.memory, text, before=asked)
        turns = last_turns(life.memory, asked, life.config.voice.context_messages)
        generation = self._asked(remembered, turns, text)
        reply = Reply(iter(()))
        reply.source, reply.surprise_bits, reply.temperature = "giant", surprise, float(self.sampling["temperature"])
        reply.remembered = tuple(sentence for _, sentence in remembered)
        reply._pieces = self._told(reply, generation)
        return reply

    def _asked(self, remembered: list[tuple[str, str]], turns: list[dict[str, str]], text: str) -> Generation:
        """The generation for as many of the turns as the context holds beside an answer."""
        room = self.giant.context - min(ANSWER_TOKENS, self.giant.context // 3)
        is_helped = self.giant.file.nbytes < SMALL and any(kind == "told" for kind, _ in remembered)
        if is_helped:  # what was said in between it would only say again
            turns = turns[-2:]
        while True:
            messages = [*_system(remembered), *turns, {"role": "user", "content": text}]
            if len(self.giant.prompt(messages)) <= room or not (turns or remembered):
                whisper = {"logit_bias": self._whispered(remembered, text) if is_helped else {}} | self.sampling
                return self.giant.generate(messages, session=self.session, top_logprobs=0, **whisper)
            if turns:
                turns = turns[2:]
            else:
                remembered = remembered[:-1]

    def _whispered(self, remembered: list[tuple[str, str]], text: str) -> dict[int, float]:
        """A bias for the words of what the user told that the question does not have: in them lies the answer, and a small
        model reads over them."""
        asked, bias = organism.stems_of(text), {}
        for kind, sentence in remembered[:2]:
            for word in _WORD.findall(sentence) if kind == "told" else ():
                if organism.stems_of(word) - asked:
                    bias |= dict.fromkeys(self.giant.tokenize(f" {word}"), WHISPER)
        return bias

    def _told(self, reply: Reply, generation: Generation) -> Iterator[str]:
        began = time.perf_counter()
        with settings.sentences():  # an expert that cannot be read, a device that is full
            for piece in generation:
                reply.first_seconds = reply.first_seconds or time.perf_counter() - began
                yield piece
        reply.tokens, reply.seconds = len(generation.tokens), time.perf_counter() - began
        bits = [-chosen.logprob / math.log(2) for chosen, _ in generation.logprobs]
        reply.entropy_bits = sum(bits) / len(bits) if bits else 0.0  # the mean surprise of its own words estimates it


# --- What the organism lends. ---


def recall(memory: Memory, text: str, before: int | None = None) -> list[tuple[str, str]]:
    """[(kind, sentence)], best first: what the user said ("told") and what was read ("read") that bears on a text."""
    out: list[tuple[str, str]] = []
    for found in memory.search(text, limit=4 * RECALLED, before=before):
        sentence = found.text.strip()
        if found.score < MATCH:
            continue
        if found.kind == "message" and found.role == "user" and not organism.is_question(sentence):
            if organism.tells_who_it_is(sentence):
                continue
            out.append(("told", sentence))
        elif found.kind == "lived" and found.source not in (organism.SEED_CORPUS, "chat", "giant"):
            out.append(("read", found.answer or sentence.removeprefix("A:").strip()))
    return out[:RECALLED]


def last_turns(memory: Memory, before: int, limit: int) -> list[dict[str, str]]:
    """The last turns before a message, as the roles of a chat, from the user's first one on. What the organism answered itself
    is left out, and what it answered: a giant would take its babble for an example."""
    turns: list[dict[str, str]] = []
    asked = ""
    for message in memory.messages(limit=limit, before=before):
        text = message.text.strip()[:TURN_CHARS]
        if message.role == "user":
            asked = text
        elif message.source == "giant" and text and asked:
            turns += [dict(role="user", content=asked), dict(role="assistant", content=text)]
            asked = ""
    return turns


def _system(remembered: list[tuple[str, str]]) -> list[dict[str, str]]:
    parts = [ROLE]
    for kind, head in (("told", KNOWN), ("read", READ)):
        if lines := [f"- {sentence}" for which, sentence in remembered if which == kind]:
            parts.append("\n".join([head, *lines]))
    return [{"role": "system", "content": "\n\n".join(parts)}]


# --- Distilling: the giant writes, the organism learns. ---

_REQUESTS = (
    "Write a short paragraph, in simple words, about: {}",
    "Explain in three plain sentences: {}",
    "Tell a very short story that has to do with: {}",
    "Ask one question about the following and answer it: {}",
)


def distill(life: Organism, advisor: Advisor, seconds: float, on_event: Callable[[dict[str, Any]], None],
            seed: int | None = None) -> dict[str, Any]:  # fmt: skip
    """For so many seconds the giant writes about what the organism met, and the organism is trained on it, each text judged
    by immunity first. Calls on_event with each lesson; returns the last event, "done"."""
    began, totals = time.monotonic(), dict(texts=0, bytes=0, refused_bytes=0, tokens=0)
    for topic, request in topics(life, random.Random(seed)):
        generation = advisor.giant.generate([{"role": "user", "content": request.format(topic)}], **advisor.sampling | {
            "max_tokens": 160, "temperature": 0.8, "session": advisor.session})  # fmt: skip
        with settings.sentences():
            for _ in generation:
                if time.monotonic() - began > seconds and (totals["texts"] or generation.text.strip()):
                    generation.cancel()  # on a machine that is busy, a first text takes longer than one may ask for
        text = generation.text.strip()
        if text:
            verdict = life.learn_now(text + "\n", source=advisor.name)
            size = len(text.encode())
            totals["texts"] += verdict.accepted
            totals["bytes" if verdict.accepted else "refused_bytes"] += size
            totals["tokens"] += len(generation.tokens)
            on_event(
                dict(
                    event="lesson", topic=topic, bytes=size, decision=verdict.decision, reason=verdict.reason, text=text
                )
            )
        if time.monotonic() - began > seconds:
            break
    return dict(event="done", teacher=advisor.name, seconds=time.monotonic() - began, **totals)


def topics(life: Organism, chance: random.Random) -> Iterator[tuple[str, str]]:
    """(what the organism met, how the giant is asked about it), for ever: the user's messages, newest first, then passages
    that were lived, in an order of chance."""
    said = [m.text.strip() for m in reversed(life.memory.messages(limit=200)) if m.role == "user" and m.text.strip()]
    lived = [passage for row in itertools.islice(life.memory.lived(), 200) for passage in _passages(row.text)]
    chance.shuffle(lived)
    met = list(dict.fromkeys([*said, *lived])) or ["a day in the life of a small animal"]
    for turn in itertools.count():
        for n, topic in enumerate(met):
            yield topic[:200], _REQUESTS[(n + turn) % len(_REQUESTS)]


def _passages(text: bytes) -> list[str]:
    lines = (
        line.removeprefix("H: ").removeprefix("A: ").strip() for line in text.decode("utf-8", "replace").splitlines()
    )
    return [line for line in lines if 20 <= len(line) <= 200 and len(organism.content_words(line)) >= 3]
