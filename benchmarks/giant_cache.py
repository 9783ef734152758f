"""Kinds of cache for keys and values: perplexity, memory, and speed of writing behind a long prompt.

Usage: python benchmarks/giant_cache.py MODEL.gguf [NAME=TEXT ...]
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from pathlib import Path

from common import table, texts

KINDS = ("f16", "bf16", "q8", "q8/q4", "q4")


TURN = 8  # tokens


def perplexity(model: Path, kind: str, text: str, windows: int, window: int, threads: int) -> tuple[float, int]:
    """(perplexity of the text's beginning, bytes of a page)."""
    from organs.giant import Giant

    giant = Giant.load(model, kv_cache=kind, threads=threads, prefix_bytes=0)
    nll, counted = giant.score(giant.tokenize(text)[: windows * window], window)
    nbytes = giant._page_bytes
    giant.close()
    return math.exp(nll / counted), nbytes


def seconds(model: Path, text: str, length: int, generate: int, threads: int) -> list[float]:
    """Of a token behind `length` others, with each kind of cache: medians of turns, since the machine's speed changes."""
    from organs.giant import Giant

    giants = [Giant.load(model, kv_cache=kind, threads=threads, prefix_bytes=0) for kind in KINDS]
    tokens = giants[0].tokenize(text)
    sessions, each = [giant.session() for giant in giants], [[] for _ in KINDS]
    for session in sessions:
        session.feed((tokens * (length // len(tokens) + 1))[:length])
    for first in range(0, generate, TURN):
        for session, took in zip(sessions, each):
            for number, token in enumerate(tokens[first : first + TURN]):
                began = time.perf_counter()
                session.feed([token])
                if number:  # before that, another one's helpers may still be awake
                    took.append(time.perf_counter() - began)
    for giant in giants:
        giant.close()
    return [statistics.median(took) for took in each]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a GGUF")
    parser.add_argument("texts", nargs="*", help="NAME=PATH; without any, Python's own library")
    parser.add_argument(
        "--length", type=int, default=8000, help="tokens before those that are timed; 0: nothing is timed"
    )
    parser.add_argument("--window", type=int, default=2048, help="tokens of context for the perplexity")
    parser.add_argument("--windows", type=int, default=4, help="of them")
    parser.add_argument("--generate", type=int, default=64, help="tokens that are timed")
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    for name, path in texts(asked.texts).items():
        text, rows = path.read_text(encoding="utf-8", errors="replace")[:400_000], []
        found = [perplexity(asked.model, kind, text, asked.windows, asked.window, asked.threads) for kind in KINDS]
        took = [math.nan] * len(KINDS)
        if asked.length:
            took = seconds(asked.model, text, asked.length, asked.generate, asked.threads)
        for kind, (now, nbytes), token in zip(KINDS, found, took, strict=True):
            rows.append([kind, f"{now:.4f}", f"{100 * (now / found[0][0] - 1):+.2f} %", f"{100 * nbytes / found[0][1]:.1f} %",
                         1 / token, took[0] / token])  # fmt: skip
        head = ["keys/values", "perplexity", "against f16", "memory", f"tokens/s at {asked.length}", "against f16"]
        print(table(f"{asked.model.name} on {name}, window {asked.window}, {asked.threads} threads", head, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
