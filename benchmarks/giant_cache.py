"""Kinds of cache for keys and values: perplexity, memory, and speed of writing behind a long prompt.

Usage: python benchmarks/giant_cache.py MODEL.gguf [NAME=TEXT ...]
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

from common import table, texts

KINDS = ("f16", "bf16", "q8", "q8/q4", "q4")


def measured(
    model: Path, kind: str, text: str, length: int, window: int, generate: int, threads: int
) -> tuple[float, int, float]:
    """(perplexity of the text's beginning, bytes of a page, median seconds of a token behind `length` others)."""
    from organs.giant import Giant

    giant = Giant.load(model, kv_cache=kind, threads=threads, prefix_bytes=0)
    tokens = giant.tokenize(text)
    nll, counted = giant.score(tokens[: 4 * window], window)
    session, each = giant.session(), [math.nan]
    if length:
        each.clear()
        session.feed((tokens * (length // len(tokens) + 1))[:length])
    for token in tokens[: generate if length else 0]:
        began = time.perf_counter()
        session.feed([token])
        each.append(time.perf_counter() - began)
    nbytes = giant._page_bytes
    giant.close()
    return math.exp(nll / counted), nbytes, sorted(each)[len(each) // 2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a GGUF")
    parser.add_argument("texts", nargs="*", help="NAME=PATH; without any, Python's own library")
    parser.add_argument(
        "--length", type=int, default=8000, help="tokens before those that are timed; 0: nothing is timed"
    )
    parser.add_argument("--window", type=int, default=2048, help="tokens of context for the perplexity")
    parser.add_argument("--generate", type=int, default=32, help="tokens that are timed")
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    for name, path in texts(asked.texts).items():
        text, rows, plain = path.read_text(encoding="utf-8", errors="replace")[:80_000], [], None
        for kind in KINDS:
            found = measured(asked.model, kind, text, asked.length, asked.window, asked.generate, asked.threads)
            plain = plain or found
            rows.append([kind, f"{found[0]:.4f}", f"{100 * (found[0] / plain[0] - 1):+.2f} %", f"{100 * found[1] / plain[1]:.1f} %",
                         1 / found[2], plain[2] / found[2]])  # fmt: skip
        head = ["keys/values", "perplexity", "against f16", "memory", f"tokens/s at {asked.length}", "against f16"]
        print(table(f"{asked.model.name} on {name}, window {asked.window}, {asked.threads} threads", head, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
