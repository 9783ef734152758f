"""A loaded model and its sessions: tokens in, logits out. Text is organs/giant/text.py's concern."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import numpy as np

from organs.giant.gguf import GGUFFile


class ContextFull(ValueError):
    """More tokens than a session's context holds. Nothing was dropped: shorten the prompt, or rewind the session."""


class Giant:
    """A model in memory. Make one by `load`; safe to use from one thread at a time."""

    file: GGUFFile
    vocab_size: int
    context: int  # tokens that a session holds at most

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        *,
        context: int | None = None,
        kv_cache: str = "f16",
        threads: int | None = None,
        offload: str | None = None,
        exact: bool = False,
    ) -> Giant:
        """Read a GGUF and make it ready.

        context: tokens a session holds at most; None: what the model was trained for.
        kv_cache: "f32", "f16", "bf16" or "q8".
        threads: None: the CPUs that this process may use, at most eight.
        exact: prompts are read with 16-bit activations, as single tokens always are; slower, and closer to float32.
        Raises GGUFError for a file that is damaged or not supported, ValueError for settings that are impossible.
        """
        raise NotImplementedError

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """float32 [n, vocab]: logits after every token of a fresh context. Raises ContextFull, ValueError."""
        raise NotImplementedError

    def session(self) -> Session:
        """A fresh context of this model."""
        raise NotImplementedError

    def generate_ids(self, tokens: Sequence[int], count: int, stop: Sequence[int] = ()) -> Iterator[int]:
        """The likeliest token, `count` times, until one of `stop` (which is not yielded)."""
        raise NotImplementedError

    def embed(self, tokens: Sequence[int]) -> np.ndarray:
        """float32 [width]: the mean of the last layer's normed states over the tokens, of length 1."""
        raise NotImplementedError

    def close(self) -> None:
        """Send the threads home and close the file."""
        raise NotImplementedError


class Session:
    """One context: the tokens that were fed, and their keys and values."""

    giant: Giant
    tokens: list[int]

    def feed(self, tokens: Sequence[int]) -> np.ndarray:
        """float32 [vocab], a copy: logits after the last of these tokens (at least one), which join the context.

        A beginning that an earlier session fed is taken from the prefix cache. Raises ContextFull (and changes nothing) where
        they do not fit, ValueError for an id outside of the vocabulary.
        """
        raise NotImplementedError

    def rewind(self, n: int) -> None:
        """Keep the first n tokens only. Raises ValueError unless 0 <= n <= len(tokens)."""
        raise NotImplementedError

    def fork(self) -> Session:
        """A second session with the same context; what they share is held once."""
        raise NotImplementedError

    def close(self) -> None:
        """Give the memory back; the prefix cache may keep what it likes."""
        raise NotImplementedError
