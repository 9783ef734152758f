"""Training through the tape against PyTorch eager: tokens/s, paired, at batch 4 and 32.

Usage: python benchmarks/training.py [--rounds 5] [--peer shared/peers/torch_body.py] [STAGE …]
Sequence length 96, vocabulary 643, field off, random targets, two threads, denormals flushed on both sides. Rounds
alternate between the two; figures are medians of the rounds, ratios the median of the paired ratios.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import statistics
import time
from pathlib import Path

import numpy as np
from common import ROOT, table

from organism import STAGES, Body, BodyConfig, LearningConfig, Trainer

MUST = {32: (3.2, 2.6, 2.1, 1.5, 1.3, 1.1), 4: (5, 4.5, 2.8, 1.6, 1.4, 1.2)}
AIM = {32: (5, 4, 3, 2, 1.6, 1.4), 4: (8, 7, 4, 2.2, 1.7, 1.4)}
VOCABULARY, LENGTH = 643, 96


def ours(stage: str, batch: int, threads: int):
    """A function that takes one step."""
    config = dataclasses.replace(LearningConfig(), weight_decay=0.0)
    trainer = Trainer(Body(stage, VOCABULARY, BodyConfig(field=False)), config, "numba", threads)
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, VOCABULARY, (2, batch, LENGTH))
    return lambda: trainer.step(x, y, None, 1e-3), trainer.close


def theirs(peer, stage: str, batch: int):
    """The same for the peer, as its own benchmark does it."""
    import torch

    body = peer.Body(*peer.STAGES[stage])
    optimizer = torch.optim.Adam(body.parameters(), lr=1e-3, fused=True)
    x, y = (torch.randint(0, peer.VOCAB, (batch, peer.LENGTH)) for _ in "xy")

    def step():
        optimizer.zero_grad()
        body(x, y).backward()
        torch.nn.utils.clip_grad_norm_(body.parameters(), 1.0)
        optimizer.step()

    return step


def tokens_per_s(step, batch: int, seconds: float) -> float:
    """Of steps for about so many seconds."""
    began, steps = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        step()
        steps += 1
    return steps * batch * LENGTH / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, nargs="*", default=[32, 4])
    parser.add_argument("--peer", type=Path, default=ROOT.parent / "shared" / "peers" / "torch_body.py")
    parser.add_argument("stages", nargs="*", default=list(STAGES))
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    specification = importlib.util.spec_from_file_location("torch_body", options.peer)
    assert specification and specification.loader
    peer = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(peer)
    rows = []
    for batch in options.batch:
        for stage in options.stages:
            mine, close = ours(stage, batch, options.threads)
            other = theirs(peer, stage, batch)
            for step in (mine, mine, other, other):
                step()
            pairs = [
                (tokens_per_s(mine, batch, options.seconds), tokens_per_s(other, batch, options.seconds))
                for _ in range(options.rounds)
            ]
            close()
            k = list(STAGES).index(stage)
            ratio = statistics.median(a / b for a, b in pairs)
            rows.append(
                (
                    stage,
                    batch,
                    statistics.median(b for _, b in pairs),
                    statistics.median(a for a, _ in pairs),
                    ratio,
                    MUST[batch][k],
                    AIM[batch][k],
                )
            )
            print(rows[-1], flush=True)
    print(
        table("Training", ["stage", "batch", "PyTorch (tokens/s)", "organism (tokens/s)", "ratio", "must", "aim"], rows)
    )


if __name__ == "__main__":
    main()
