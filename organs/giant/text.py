"""The giant in words: `Giant` as everybody uses it, with text in and text out over the engine's tokens and logits.

from organs.giant import Giant
giant = Giant.load("model.gguf")
for piece in giant.generate([{"role": "user", "content": "Name three rivers."}], seed=1):
    print(piece, end="", flush=True)
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from organism import TextStream, UsageError
from organs.giant import giant as engine
from organs.giant.sampling import Candidate, Sampler, Sampling, logprobs
from organs.giant.template import ChatTemplate
from organs.giant.tokenizer import Tokenizer

PREFILL = 512  # tokens read at a time: a prompt can be cancelled between two such pieces
TOGETHER = 16  # prompts that are answered at the same time
Messages = Sequence[Mapping[str, Any]]


class Giant(engine.Giant):
    """A model that reads and writes text. Make one by `Giant.load(path)`; use it from one thread at a time."""

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model's file."""
        return Tokenizer(self.file.metadata)

    @functools.cached_property
    def template(self) -> ChatTemplate:
        """The chat template of the model's file, or a fall-back."""
        return ChatTemplate(self.file.metadata, self.tokenizer)

    def use_tokenizer(self, path: str | os.PathLike) -> None:
        """Take a tokenizer.json in place of what the model's file says of its own. Raises OrganismError for one that does not fit."""
        from organs.giant.convert import tokenizer_of

        metadata = dict(self.file.metadata) | tokenizer_of(Path(path).expanduser(), self.file.metadata, self.vocab_size)
        self.tokenizer = Tokenizer(metadata)
        self.template = ChatTemplate(metadata, self.tokenizer)

    def tokenize(self, text: str | bytes, special: bool = False) -> list[int]:
        """Token ids of a text; adds no BOS. special: recognise control tokens, which only trusted text should write."""
        return self.tokenizer.tokenize(text, special)

    def detokenize(self, tokens: Iterable[int], special: bool = False) -> str:
        """The text of tokens; control tokens are left out unless `special`. What is no UTF-8 becomes U+FFFD."""
        return self.tokenizer.detokenize(tokens, special).decode("utf-8", "replace")

    def prompt(self, messages: Messages | str, tools: Sequence[Any] | None = None) -> list[int]:
        """The tokens that `generate` would read: messages through the template, or a plain text to be continued."""
        if not isinstance(messages, str):
            return self.template.tokenize(messages, tools=tools)
        tokens = self.tokenize(messages)
        bos = self.tokenizer.bos
        tokens = [bos, *tokens] if self.tokenizer.add_bos and bos is not None else tokens
        if not tokens:
            raise UsageError("The prompt is empty: there is nothing to continue.")
        return tokens

    def generate(self, messages: Messages | str, *, max_tokens: int | None = None, stop: str | Sequence[str] = (),
                 tools: Sequence[Any] | None = None, grammar: str | None = None, json_schema: Mapping[str, Any] | bool | None = None,
                 top_logprobs: int | None = None, session: engine.Session | None = None, **sampling: Any) -> Generation:  # fmt: skip
        """Answer messages (or continue a plain text): iterate for pieces of text as they come.

        max_tokens: at most so many; None: until the context is full. stop: texts that end the answer and are not part of it.
        grammar: GBNF that the text must follow; json_schema: a JSON schema, or True for any JSON object.
        top_logprobs: also note log-probabilities, of the token itself and of so many others. session: a context to go on
        with, whose common beginning with the prompt is not read again. sampling: temperature, top_k, top_p, min_p, typical_p,
        repetition_penalty, presence_penalty, frequency_penalty, penalty_window, logit_bias, seed.
        Raises UsageError for what is impossible, in one sentence, before anything is computed.
        """
        settings = Sampling.of(**sampling)
        tokens = self.prompt(messages, tools)
        if max_tokens is not None and max_tokens < 0:
            raise UsageError(f"max_tokens is {max_tokens}: it must be 0 or more.")
        if len(tokens) > self.context - (max_tokens != 0):
            raise UsageError(
                f"The prompt has {len(tokens):,} tokens and the context holds {self.context:,}: shorten it, or load the model "
                "with a larger context."
            )
        stops = [stop] if isinstance(stop, str) else [*stop]
        stops += () if isinstance(messages, str) else self.template.stops
        matcher = self._matcher(grammar, json_schema)
        return Generation(
            self, tokens, Sampler(settings, self.vocab_size), max_tokens, stops, matcher, top_logprobs, session
        )

    def _matcher(self, grammar: str | None, json_schema: Mapping[str, Any] | bool | None):
        if grammar is None and not json_schema:
            return None
        if grammar is not None and json_schema:
            raise UsageError("grammar and json_schema both say what the text must be: choose one.")
        from organs.giant import constrain

        rules = constrain.parse(grammar) if grammar is not None else constrain.json_rules(json_schema)
        return constrain.Matcher(rules, self._vocabulary)

    @functools.cached_property
    def _vocabulary(self):
        from organs.giant import constrain

        return constrain.Vocabulary(self.tokenizer.pieces, self.vocab_size)

    def generate_all(self, prompts: Iterable[Messages | str], **options: Any) -> list[Generation]:
        """The complete answers to several prompts, in order, made together: the weights are read once a token for all."""
        runs = [self.generate(prompt, **options) for prompt in prompts]
        for first in range(0, len(runs), TOGETHER):
            self._run_together(runs[first : first + TOGETHER])
        return runs

    def _run_together(self, runs: list[Generation]) -> None:
        sessions = {id(run): self.session() for run in runs}
        for run in runs:
            run._pieces = iter(())  # complete when this returns
        try:
            logits = [(run, run._prefill(sessions[id(run)])) for run in runs]
            while logits:
                going = [(run, run._take(row, sessions[id(run)])) for run, row in logits if row is not None]
                going = [(run, token) for run, token in going if token is not None]
                rows = (
                    self.feed_all([sessions[id(run)] for run, _ in going], [token for _, token in going])
                    if going
                    else ()
                )
                logits = [(run, row) for (run, _), row in zip(going, rows)]
        finally:
            for session in sessions.values():
                session.close()

    def chat(self, system: str | None = None, **options: Any) -> Chat:
        """A conversation; `options` are those of `generate`, for every answer."""
        return Chat(self, system, options)

    def embed(self, text: str | Sequence[int]) -> np.ndarray:
        """float32 [width], of length 1: the mean of the last states over a text, or over tokens."""
        return super().embed(self.prompt(text) if isinstance(text, str) else text)

    def score(self, tokens: Sequence[int], window: int | None = None,
              report: Callable[[int, float], None] = lambda tokens, nll: None) -> tuple[float, int]:  # fmt: skip
        """(sum of the negative log-likelihoods in nats, tokens counted) of a long text, as llama.cpp's perplexity does it:
        windows of 512 tokens (or `window`), in each of which the second half is predicted from at least half a window."""
        window = min(window or 512, self.context)
        if window < 4 or len(tokens) < window:
            raise UsageError(f"A text of {len(tokens):,} tokens is too short to be measured in windows of {window}.")
        bos = self.tokenizer.bos if self.tokenizer.add_bos else None
        total, counted = 0.0, 0
        for start in range(0, len(tokens) - window + 1, window):
            piece = list(tokens[start : start + window])
            if bos is not None:
                piece[0] = bos
            logits = self.logits(piece)[window // 2 : window - 1]
            targets = np.asarray(piece[window // 2 + 1 :])
            total += float((_log_sums(logits) - logits[np.arange(len(targets)), targets]).sum(dtype=np.float64))
            counted += len(targets)
            report(counted, total / counted)
        return total, counted


def _log_sums(logits: np.ndarray) -> np.ndarray:
    """float32 [n]: the logarithm of the sum of the exponentials of each row, row by row to spare memory."""
    out = np.empty(len(logits), np.float64)
    for i, row in enumerate(logits):
        top = row.max()
        out[i] = top + np.log(np.exp(row - top).sum(dtype=np.float64))
    return out


class Generation:
    """An answer while it is made: iterate for pieces of text, always whole characters. Afterwards a value.

    text, tokens; finish_reason: "stop" (it ended, or met a stop text), "length" (max_tokens, or the context is full) or
    "cancelled"; prompt_tokens, cached_tokens (of them, taken from the session's context); prefill_seconds, decode_seconds;
    forwards: steps that the tokens behind the first took, where the model drafts (else 0).
    logprobs: [(Candidate, [Candidate, …]), …], one a token, if they were asked for.
    """

    def __init__(self, giant: Giant, prompt: list[int], sampler: Sampler, max_tokens: int | None, stops: Sequence[str],
                 matcher: Any, top_logprobs: int | None, session: engine.Session | None):  # fmt: skip
        self.giant, self.prompt = giant, prompt
        self.tokens: list[int] = []
        self.logprobs: list[tuple[Candidate, list[Candidate]]] = []
        self.finish_reason = ""
        self.prompt_tokens, self.cached_tokens = len(prompt), 0
        self.prefill_seconds = self.decode_seconds = 0.0
        self.forwards = 0
        self._text = ""
        self._cancelled = threading.Event()
        self._sampler, self._max_tokens, self._stream = sampler, max_tokens, TextStream(stops)
        self._matcher, self._top_logprobs = matcher, top_logprobs
        self._pieces = self._generate(session)

    def __iter__(self) -> Iterator[str]:
        yield from self._pieces

    @property
    def text(self) -> str:
        """The whole answer; waits for what is still to come."""
        for _ in self:
            pass
        return self._text

    def cancel(self) -> None:
        """Stop within a token, or within a piece of the prompt; may be called from any thread."""
        self._cancelled.set()

    @property
    def prefill_tokens_per_s(self) -> float:
        """Of the prompt, as far as it was not in the context already."""
        return (self.prompt_tokens - self.cached_tokens) / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Of the answer; its first token is the prompt's."""
        return (len(self.tokens) - 1) / self.decode_seconds if self.decode_seconds and len(self.tokens) > 1 else 0.0

    def _generate(self, session: engine.Session | None) -> Iterator[str]:
        own, session = session is None, session or self.giant.session()
        feeder = self.giant.feeder(session)
        try:
            logits = self._prefill(session, feeder)
            began = time.perf_counter()
            while logits is not None:
                shown = len(self._text)
                token = self._take(logits, session)
                if len(self._text) > shown:
                    yield self._text[shown:]
                if token is None:
                    break
                logits = feeder.feed([token])
                self.decode_seconds = time.perf_counter() - began
        finally:
            self.finish_reason = self.finish_reason or "cancelled"
            if feeder is not session:
                self.forwards = feeder.forwards
                if not own:
                    feeder.finish()
            if own:
                session.close()

    def _take(self, logits: np.ndarray, session: engine.Session) -> int | None:
        """Draw one token and add what it shows to the text; returns it if the answer goes on."""
        ends, matcher, stream = self.giant.tokenizer.ends, self._matcher, self._stream
        self.finish_reason = "length" if self._max_tokens == 0 else ""
        if not self.finish_reason:
            token = self._sampler.choose(logits, session.tokens, matcher.allowed(ends) if matcher else None)
            if token in ends:
                self.finish_reason = "stop"
            else:
                self._add(token, logits)
                self.finish_reason = self._reason(session)
        if not self.finish_reason:
            return self.tokens[-1]
        if not stream.stopped:
            self._text += stream.push(b"", last=True)
        return None

    def _add(self, token: int, logits: np.ndarray) -> None:
        if self._top_logprobs is not None:
            self.logprobs.append(logprobs(logits, token, self._top_logprobs))
        if self._matcher:
            self._matcher.advance(token)
        self.tokens.append(token)
        self._text += self._stream.push(self.giant.tokenizer.token_bytes(token))

    def _reason(self, session: engine.Session) -> str:
        """Why the answer is over; empty if it is not."""
        if self._stream.stopped:
            return "stop"
        if self._cancelled.is_set():
            return "cancelled"
        full = len(session.tokens) >= self.giant.context
        return "length" if full or len(self.tokens) == self._max_tokens else ""

    def _prefill(self, session: engine.Session, feeder: Any = None) -> np.ndarray | None:
        """Logits after the prompt; what the session holds of it already is kept. None if it was cancelled."""
        began = time.perf_counter()
        same = 0
        for a, b in zip(session.tokens, self.prompt[:-1]):  # the last token is always fed: its logits are wanted
            if a != b:
                break
            same += 1
        session.rewind(same)
        self.cached_tokens, logits, start = same, None, same
        while start < len(self.prompt):
            if self._cancelled.is_set():
                return None
            end = start + PREFILL
            if start == 0:  # what the prefix cache has comes on top: a session looks there when its first tokens come
                end += len(self.giant.prefixes.find(np.asarray(self.prompt[:-1]))) * engine.PAGE
            logits = (feeder or session).feed(self.prompt[start:end])
            start = end
        self.prefill_seconds = time.perf_counter() - began
        return logits


class Chat:
    """A conversation with a giant: what was said so far, and the context that holds it. A context manager.

    messages: the turns so far. forgotten: how many of the oldest were left out of the last prompt to make it fit.
    """

    def __init__(self, giant: Giant, system: str | None = None, options: Mapping[str, Any] | None = None):
        self.giant, self.options = giant, dict(options or {})
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        self.forgotten = 0
        self.session = giant.session()

    def __enter__(self) -> Chat:
        return self

    def __exit__(self, *_: object) -> None:
        self.session.close()

    def say(self, text: str, **options: Any) -> Generation:
        """The answer to a text, as a stream; both join the conversation once the answer is complete (or cancelled)."""
        if not text.strip():
            raise UsageError("There is nothing to answer: the message is empty.")
        asked = {"role": "user", "content": text}
        options = {**self.options, **options}
        shown = self._fitting([*self.messages, asked], options)
        generation = self.giant.generate(shown, session=self.session, **options)
        pieces = generation._pieces

        def told() -> Iterator[str]:
            try:
                yield from pieces
            finally:
                pieces.close()  # type: ignore[attr-defined]
                self.messages += [asked, {"role": "assistant", "content": generation._text.strip()}]

        generation._pieces = told()
        return generation

    def _fitting(self, messages: list[dict[str, Any]], options: dict[str, Any]) -> list[dict[str, Any]]:
        """The messages without as many of the oldest turns as the context cannot hold together with an answer."""
        room = self.giant.context - min(options.get("max_tokens") or 256, self.giant.context // 2)
        first = int(messages[0]["role"] == "system")
        self.forgotten = 0
        while len(self.giant.prompt(messages, options.get("tools"))) > room and len(messages) > first + 2:
            del messages[first : first + 2]
            self.forgotten += 2
        return messages
