"""The field alone: learning and predicting, tokens/s of one thread and bits per byte.

Usage: python benchmarks/field.py NAME=PATH …      first 1,000,000 bytes of each
Full: the default setting with a 128 MB table. Light: fewer contexts and 32 MB. The vocabulary grows as in a life.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path

import numpy as np
from common import table, texts

from organism import Config, Field, FieldConfig, Tokenizer, growth_points

MUST = dict(bible=1.315, python=1.16, russian=1.24)


def pass_over(data: bytes, config: FieldConfig) -> tuple[float, float]:
    """(bits per byte, tokens/s) of one pass; growing replays what was read, and that time counts."""
    tokenizer, bits, tokens, start = Tokenizer(), 0.0, 0, 0
    policy = growth_points(Config().tokenizer)
    began, field = time.perf_counter(), Field(tokenizer.vocabulary, config, engine="numba")
    for end in [*(n for n in policy if n < len(data)), len(data)]:
        ids = tokenizer.encode(data[start:end])
        bits += float(field.read(ids)[0].sum())
        tokens, start = tokens + len(ids), end
        if end < len(data):
            tokenizer.learn([data[:end]], policy[end])
            past = tokenizer.encode(data[:end])
            field = Field(tokenizer.vocabulary, config, np.bincount(past, minlength=len(tokenizer)), "numba")
            field.read(past)
    return bits / len(data), tokens / (time.perf_counter() - began)


def main() -> None:
    rows = []
    for name, path in texts(sys.argv[1:]).items():
        data = Path(path).read_bytes()[:1_000_000]
        full = FieldConfig(table_mb=128)
        light = dataclasses.replace(full, contexts="lite", table_mb=32)
        pass_over(data[:50_000], full), pass_over(data[:50_000], light)
        for label, config, speed, limit in (
            ("full", full, 100_000, MUST.get(name, "–")),
            ("light, 32 MB", light, 250_000, "4 % behind"),
        ):
            bpb, rate = pass_over(data, config)
            rows.append((name, label, f"{bpb:.4f}", limit, rate, speed))
            print(rows[-1], flush=True)
    print(table("The field alone, one thread", ["text", "setting", "bits/byte", "must", "tokens/s", "must"], rows))


if __name__ == "__main__":
    main()
