"""Computing ahead: a model's own head for multi-token prediction (MTP) drafts the token behind the next one, and both pass together.

The head is a layer of the model's kind that reads [norm(embedding of a token) | norm(state before it)] and says what comes two
further (DeepSeek-V3, arXiv 2412.19437, §2.2; Qwen3-Next). A drafted token is in the same step as the one that was asked for: its
weights are read once for both. If the caller then feeds just that token, its logits are there already; if not, it never happened.
So whoever chooses tokens, and by whatever rule, sees the logits that he would have seen without.

A recurrent state that has gone on too far is put back, and tokens that were fed since are read again beside the next ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from organs.giant.cache import PAGE

if TYPE_CHECKING:
    from organs.giant.giant import Giant, Session

MOST_AGAIN = 2  # tokens that are read again beside others; behind so many, nothing is drafted


@dataclass
class _Guess:
    """A token that was computed before it was asked for."""

    token: int
    logits: np.ndarray  # after it
    state: np.ndarray  # at it
    memory: np.ndarray  # of the sequence before that step
    since: list[int]  # tokens of that step which were asked for


class Ahead:
    """Feeds a session as `session.feed` does, a token ahead where it can. Call `finish` before the session is used otherwise.

    tokens, forwards: how many were fed one by one, and in how many steps.
    """

    def __init__(self, session: Session):
        self.session, self.giant = session, session.giant
        self.tokens = self.forwards = 0
        self._guess: _Guess | None = None
        self._again: list[int] = []  # tokens of the session that its recurrent state does not know any more
        self._state: np.ndarray | None = None  # at the last token
        self._pairs: list[tuple[int, np.ndarray]] = []  # tokens, and states before them, that the head has not read yet

    def feed(self, tokens: Sequence[int]) -> np.ndarray:
        """As Session.feed."""
        try:
            if len(tokens) > 1 or self._state is None:
                return self._prompt(tokens)
            return self._next(int(self.giant._ids(tokens)[0]))
        except BaseException:
            self._guess, self._again, self._state, self._pairs = None, [], None, []
            self.session._is_torn = True
            raise

    def finish(self) -> None:
        """Have the session's state at its last token."""
        if self._guess is not None:
            self._back(self._guess)
        if self._again:
            self.giant._read(self.session._pages, len(self.session.tokens) - len(self._again), np.array(self._again))
            self._again = []

    def _prompt(self, tokens: Sequence[int]) -> np.ndarray:
        """Read several tokens; the head reads them as well, so that it knows what it is about."""
        self.finish()
        session, ids = self.session, self.giant._ids(tokens)
        states = np.zeros((len(ids) + self.giant._tile, self.giant.shape.width), np.float32)
        start = len(session.tokens)
        logits = session.feed(tokens, states)
        first = session.read_from - start  # what the prefix cache had, it has with the head's keys
        before = [] if first or self._state is None else [(int(ids[0]), self._state)]
        self._pairs = before + list(zip(ids[first + 1 :].tolist(), states[first : len(ids) - 1]))
        if self._pairs:
            self._draft()
        self._state = states[len(ids) - 1].copy()
        return logits

    def _next(self, token: int) -> np.ndarray:
        giant, session = self.giant, self.session
        giant._room(len(session.tokens), 1)
        assert self._state is not None
        self.tokens += 1
        self._pairs.append((token, self._state))
        guess, self._guess = self._guess, None
        if guess is not None and guess.token == token:
            if giant._has_state and (len(session.tokens) + 1) % PAGE == 0:
                session._pages.snapshot(len(session.tokens) + 1, is_lasting=False)
            session._joined([token])
            self._state = guess.state
            return guess.logits
        if guess is not None:
            self._back(guess)
        return self._step(token)

    def _back(self, guess: _Guess) -> None:
        """A wrong guess has changed the sequence's memory, where it has one."""
        self._guess = None
        if len(guess.memory):
            self.session._pages.memory[:] = guess.memory
            self._again = guess.since

    def _step(self, token: int) -> np.ndarray:
        """One step: tokens that have to be read again, this one, and the one that will probably follow."""
        giant, session = self.giant, self.session
        pages, n = session._pages, len(session.tokens)
        asked, drafted = [*self._again, token], None
        if len(self._again) < MOST_AGAIN and n + 2 <= giant.context:
            drafted = self._draft()
        ids = np.array(asked if drafted is None else [*asked, drafted])
        start, memory = n - len(self._again), pages.memory.copy()
        logits = np.empty((len(ids) + giant._tile, giant._logits_width), np.float32)
        states = np.empty((len(ids) + giant._tile, giant.shape.width), np.float32)
        with giant._lock:
            pages.own(start)
            pages.reserve(start + len(ids))
            giant._step(ids, np.arange(start, start + len(ids)), [pages], together=len(ids) > 1, logits=logits, is_all=True,
                        states=states)  # fmt: skip
        self.forwards += 1
        last = len(asked) - 1
        self._again, self._state = [], states[last].copy()
        if drafted is not None:
            after = logits[last + 1, : giant.vocab_size].copy()
            self._guess = _Guess(drafted, after, states[last + 1].copy(), memory, asked)
        elif giant._has_state and (n + 1) % PAGE == 0:
            pages.snapshot(n + 1, is_lasting=False)
        session._joined([token])
        return logits[last, : giant.vocab_size].copy()

    def _draft(self) -> int:
        """What will probably follow the token that was asked for last; the head reads all pairs that it has not read."""
        giant, pages = self.giant, self.session._pages
        pairs, self._pairs = self._pairs, []
        end = len(self.session.tokens)  # the last pair's state is at the position before
        if pairs and pairs[-1][1] is not self._state:
            end -= 1  # of a prompt, whose last token has been fed already
        with giant._lock:
            for first in range(0, len(pairs), giant._chunk):
                some = pairs[first : first + giant._chunk]
                start = end - len(pairs) + first
                pages.own(start)
                pages.reserve(start + len(some))
                giant._predict(
                    np.array([token for token, _ in some]), np.stack([state for _, state in some]), start, pages
                )
        return int(giant._logits[: giant.vocab_size].argmax())


def check(giant: Giant) -> None:
    """Raises ValueError where a model's file has no head for multi-token prediction, or it is not supported."""
    if giant._draft_rows is None:
        raise ValueError(
            f"{giant.file.path.name} has no head for multi-token prediction (or of a kind that is not supported)"
        )
