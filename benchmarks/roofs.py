"""Where the time of a training step and of a generated token goes, kernel by kernel, and how far the roofs are.

Usage: python benchmarks/roofs.py [STAGE …]
One thread. A training step is forward and backward of one micro-batch (4 × 96 tokens, on the field, vocabulary 643) and
AdamW; a token is one run of the decoder's program at position 90. Each row of a program is timed on its own, repeated.
Roofs: NumPy's sgemm (1024³) and reading 400 MB, both measured here, both on one thread.
"""

from __future__ import annotations

import collections
import os
import sys
import time

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from common import table

from organism import STAGES, Body, BodyConfig, Decoder, Field, FieldConfig, LearningConfig, Tokenizer, seed_corpus
from organs.kernels.executor import MICRO, Gradients, execute, show_view
from organs.kernels.operations import MACHINE, ROW

LENGTH = 96


def roofs() -> tuple[float, float]:
    """(GFLOP/s of sgemm, GB/s of reading) of one thread."""
    a, b = np.ones((1024, 1024), np.float32), np.ones((1024, 1024), np.float32)
    big = np.ones(100_000_000, np.float32)
    flops = max(2 * 1024**3 / seconds(lambda: a @ b) for _ in range(5))
    read = max(big.nbytes / seconds(lambda: big.max()) for _ in range(3))
    return flops / 1e9, read / 1e9


def seconds(action) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def by_kernel(program, rows: np.ndarray, machine: np.ndarray, repeats: int) -> dict[str, float]:
    """Seconds of each kernel in one run of a program: the least of several runs, row by row."""
    best = np.full(len(rows), np.inf)
    for _ in range(repeats):
        for i in range(len(rows)):
            began = time.perf_counter()
            execute(rows[i : i + 1], machine)
            best[i] = min(best[i], time.perf_counter() - began)
    spent: dict[str, float] = collections.defaultdict(float)
    for step, took in zip(program.steps, best, strict=True):
        spent[step.kernel] += max(0.0, took - CALL)
    return spent


def call_cost() -> float:
    """Seconds that calling `execute` from Python takes by itself."""
    empty, machine = np.zeros(0, ROW), np.zeros(1, MACHINE)
    execute(empty, machine)
    return min(seconds(lambda: execute(empty, machine)) for _ in range(2000))


CALL = call_cost()


def some_views() -> tuple[Tokenizer, np.ndarray, object]:
    """A tokenizer of 643 tokens, tokens, and the field's views of them."""
    text = seed_corpus()
    tokenizer = Tokenizer()
    tokenizer.learn([text], 384)
    tokens = tokenizer.encode(text).astype(np.int64)[: MICRO * LENGTH + 1]
    return tokenizer, tokens, Field(tokenizer.vocabulary, FieldConfig(), engine="numba").read(tokens, views=True)[1]


def training(stage: str, tokenizer: Tokenizer, tokens: np.ndarray, view) -> dict[str, float]:
    """Seconds by kernel, AdamW among them."""
    body = Body(stage, len(tokenizer), BodyConfig())
    gradients = Gradients(body, LearningConfig(), threads=1)
    x, y = tokens[:-1].reshape(MICRO, LENGTH).copy(), tokens[1:].reshape(MICRO, LENGTH).copy()
    seen = view[1:]
    gradients.step(x, y, seen, 1e-4, 1)
    m = gradients.machines
    kept = show_view(m, seen)
    m["sequences"], m["length"], m["rows"], m["start"], m["position"], m["inverse"] = (
        MICRO,
        LENGTH,
        x.size,
        0,
        0,
        1 / x.size,
    )
    spent = by_kernel(gradients.program, gradients.arguments[0], m, 5)
    del kept
    whole = min(seconds(lambda: gradients.step(x, y, seen, 1e-4, 2)) for _ in range(5))
    spent["AdamW, clip, calls"] = max(0.0, whole - sum(spent.values()))
    gradients.close()
    return spent


def speaking(stage: str, tokenizer: Tokenizer, tokens: np.ndarray, view) -> dict[str, float]:
    decoder = Decoder(Body(stage, len(tokenizer), BodyConfig()), "numba")
    for i in range(90):
        decoder.feed(int(tokens[i]), view[i + 1])
    kept = show_view(decoder._speaker.m, view[91])
    spent = by_kernel(decoder.program, decoder._speaker.rows, decoder._speaker.m, 200)
    del kept
    return spent


def shares(spent: dict[str, float], most: int = 6) -> str:
    total = sum(spent.values())
    ordered = sorted(spent.items(), key=lambda item: -item[1])[:most]
    return ", ".join(f"{name} {100 * took / total:.0f} %" for name, took in ordered)


def main() -> None:
    flops, read = roofs()
    print(f"Roofs of one thread: sgemm {flops:.0f} GFLOP/s, reading {read:.1f} GB/s\n")
    tokenizer, tokens, view = some_views()
    steps, spoken = [], []
    for stage in sys.argv[1:] or STAGES:
        body = Body(stage, len(tokenizer), BodyConfig())
        spent = training(stage, tokenizer, tokens, view)
        total = sum(spent.values())
        rate = 6 * body.n_params * MICRO * LENGTH / total / 1e9
        steps.append(
            (stage, f"{MICRO * LENGTH / total:,.0f}", f"{rate:.1f}", f"{100 * rate / flops:.0f} %", shares(spent))
        )
        spent = speaking(stage, tokenizer, tokens, view)
        total = sum(spent.values())
        moved = 4 * (body.n_params - body.arena["embedding"].size - body.arena["expected"].size) / total / 1e9
        spoken.append((stage, f"{1e6 * total:.1f}", f"{moved:.1f}", f"{100 * moved / read:.0f} %", shares(spent)))
    print(table("One training step", ["stage", "tokens/s", "GFLOP/s (6 N a token)", "of sgemm", "shares"], steps))
    print(table("One token", ["stage", "µs", "GB/s of weights", "of reading", "shares"], spoken))


if __name__ == "__main__":
    main()
