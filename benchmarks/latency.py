"""Time to the first token of a reply, idle and while it trains in the background.

Usage: python benchmarks/latency.py [STAGE …]       default: embryo adolescent
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from common import ROOT, fresh_home, percentile, table

from organism import Organism

QUESTIONS = [
    "Hello.",
    "What do you know about the sea?",
    "My cat sleeps all day.",
    "Tell me a story.",
    "Why is the sky blue?",
]


def first_token(life: Organism, question: str) -> float:
    """Seconds from the question to the first piece of the reply."""
    began = time.perf_counter()
    reply = life.say(question)
    next(iter(reply), "")
    took = time.perf_counter() - began
    _ = reply.text
    return took


def measure(stage: str, rounds: int = 60) -> tuple[list[float], list[float], int]:
    """First-token times idle and while training; and the steps trained meanwhile."""
    with (
        fresh_home() as home,
        Organism(home, stage=stage, kernels="wait", overrides={"learning.cooldown": 0.0}) as life,
    ):
        life.learn_now("It rains in the hills, and the river rises.")
        idle = [first_token(life, QUESTIONS[i % len(QUESTIONS)]) for i in range(rounds)]
        text = b"".join(p.read_bytes() for p in sorted(Path(ROOT).glob("*.txt")))
        life.learner.credit = 1e12  # training never runs out
        before = life.learner.body.steps
        life.learn(text[:20_000], "benchmark")
        life.start()
        time.sleep(3)
        busy = []
        for i in range(rounds):
            busy.append(first_token(life, QUESTIONS[i % len(QUESTIONS)]))
            time.sleep(0.2)
        steps = life.learner.body.steps - before
        life._stop.set()
        life.learner.credit = 0.0
    return idle, busy, steps


def main() -> None:
    rows = []
    for stage in sys.argv[1:] or ["embryo", "adolescent"]:
        idle, busy, steps = measure(stage)
        p_idle, p_busy = percentile(idle, 0.95) * 1e3, percentile(busy, 0.95) * 1e3
        must = 150 if stage == "embryo" else 300
        rows.append(
            (
                stage,
                percentile(idle, 0.5) * 1e3,
                p_idle,
                percentile(busy, 0.5) * 1e3,
                p_busy,
                p_busy / p_idle,
                steps,
                f"{must} ms and 3 ×",
                "50 ms",
            )
        )
    head = [
        "stage",
        "idle median (ms)",
        "idle p95",
        "training median",
        "training p95",
        "ratio of p95",
        "steps meanwhile",
        "must",
        "aim",
    ]
    print(table("Time to the first token", head, rows))


if __name__ == "__main__":
    main()
