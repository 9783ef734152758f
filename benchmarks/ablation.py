"""Ablation: each feature of the self on against off, paired by seed, with 95 % confidence intervals.

Usage: python benchmarks/ablation.py [--quick] [--seeds N] [--domain NAME=PATH]...

A life reads the first domain burst by burst, then the second, and is asked something before each burst; a delta is born
between the two. Measured: bits per byte of held-out text of both at the end; forgetting, the rise of the first domain's bits
per byte while the second is read; and of its replies the share of words in a pair that was said before (repetition), and
different pairs per pair (distinct-2). What shapes bursts needs a life of its own; what shapes speech speaks from the same
body with the same random numbers (for conscience: with the scale that the life's own replies led to).
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from common import ROOT, fresh_home, table, texts

import organism as o

LIVES = {"syntropy.steer": {"syntropy.steer": True},
         "syntropy.steer + delta_births": {"syntropy.steer": True, "syntropy.delta_births": True},
         "voice.overthink": {"voice.overthink": 2}}  # fmt: skip
SPEECH = {"voice.surprise_shift": {"surprise_shift": 0.05}, "voice.trend_shift": {"trend_shift": 0.05},
          "voice.dissonance": {"dissonance": True}, "voice.anti_field": {"anti_field": 0.05},
          "voice.conscience": {"conscience": True}}  # fmt: skip
METRICS = ("held-out bpb", "forgetting, bpb", "repetition", "distinct-2")
PIECE, HELD_OUT = 2_000, 10_000  # bytes of a burst and of the text of each domain that is measured on
STUDENT = {
    2: 12.706,
    3: 4.303,
    4: 3.182,
    5: 2.776,
    6: 2.571,
    7: 2.447,
    8: 2.365,
    9: 2.306,
    10: 2.262,
}  # t of 95 %, by n


def pieces(path: Path, count: int, seed: int) -> Iterator[bytes]:
    """`count` pieces of a text that begin at a place of the seed's, all beyond what is held out."""
    data = path.read_bytes()
    start = HELD_OUT + int(np.random.default_rng(seed).integers(max(1, len(data) - HELD_OUT - count * PIECE)))
    for k in range(count):
        yield data[start + k * PIECE : start + (k + 1) * PIECE]


def live(
    domains: list[Path], bursts: int, seed: int, overrides: dict, aloud: dict[str, dict]
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """(figures of a life, figures of its speech by feature, for those of `aloud`)."""
    first, second = domains
    held_out = [path.read_bytes()[:HELD_OUT] for path in domains]
    with fresh_home() as home, o.Organism(home, overrides=overrides, seed=seed, threads=1, kernels="wait") as life:
        talk(life, pieces(first, bursts, seed), "first")
        before = life.evaluate(held_out[0])["bits_per_byte"]
        life.add_delta("the second domain")
        talk(life, pieces(second, bursts, seed), "second")
        bits = [life.evaluate(text)["bits_per_byte"] for text in held_out]
        figures = {METRICS[0]: float(np.mean(bits)), METRICS[1]: bits[0] - before}
        prompts = [
            line[:60] for text in held_out for line in text.decode(errors="replace").splitlines() if len(line) > 40
        ][::4]
        speech = {name: speak(life, prompts[:24], seed, change) for name, change in {"off": {}, **aloud}.items()}
    return figures | speech["off"], speech


def talk(life: o.Organism, texts: Iterator[bytes], source: str) -> None:
    """Ask it about each text, then let it learn the text and whatever waits."""
    for text in texts:
        line = max(text.decode(errors="ignore").splitlines(), key=len)
        _ = life.say(line[:80]).text
        life.learn_now(text, source)


def speak(life: o.Organism, prompts: list[str], seed: int, change: dict) -> dict[str, float]:
    """Figures of what it answers to prompts under other settings; nothing is remembered between them."""
    config = dataclasses.replace(life.config, voice=dataclasses.replace(life.config.voice, **change))
    pairs, total = Counter(), 0
    rng = np.random.Generator(np.random.PCG64(seed))
    repeated = 0
    for prompt in prompts:
        voice = o.Voice(
            life.conscience.weigh(life.published) if config.voice.conscience else life.published, config, rng
        )
        surprise = voice.surprise(prompt)
        caution = life.surprise.caution(surprise, config.voice.surprise_shift)
        temperature = config.voice.temperature * (1 - caution) * (1 + config.voice.trend_shift * life.syntropy.mood)
        words = voice.speak(f"H: {prompt}\nA:", temperature).text.split()
        mine = list(zip(words, words[1:]))
        repeated += len(mine) - len(set(mine))
        pairs.update(mine)
        total += len(mine)
    return {METRICS[2]: repeated / max(1, total), METRICS[3]: len(pairs) / max(1, total)}


def interval(differences: list[float]) -> str:
    """Mean and half width of the 95 % interval (Student's t), with a star where zero lies outside."""
    mean, n = float(np.mean(differences)), len(differences)
    half = STUDENT[n] * float(np.std(differences, ddof=1)) / math.sqrt(n)
    return f"{mean:+.4f} ± {half:.4f}" + (" *" if abs(mean) > half else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 seeds of 6 bursts a domain")
    parser.add_argument("--bursts", type=int, default=25, help="of each domain (default: 25)")
    parser.add_argument("--seeds", type=int, choices=sorted(STUDENT), default=5)
    parser.add_argument(
        "--domain", action="append", default=[], metavar="NAME=PATH", help="two texts, read in this order"
    )
    asked = parser.parse_args()
    seeds, bursts = (3, 6) if asked.quick else (asked.seeds, asked.bursts)
    found = texts(asked.domain)
    if not asked.domain:  # Python's library, then the prose about this program
        found["docs"] = Path(tempfile.gettempdir()) / "organism-bench-docs.txt"
        found["docs"].write_bytes(b"".join(page.read_bytes() for page in sorted((ROOT / "docs").glob("*.md"))))
    if len(found) < 2:
        parser.error("the lives read two texts, one after the other: give --domain twice")
    domains = list(found.values())[:2]
    differences: dict[str, dict[str, list[float]]] = {}
    off: dict[str, list[float]] = {}
    for seed in range(seeds):
        base, speech = live(domains, bursts, seed, {}, SPEECH)
        for metric, value in base.items():
            off.setdefault(metric, []).append(value)
        results = {name: live(domains, bursts, seed, change, {})[0] for name, change in LIVES.items()}
        results |= {name: speech[name] for name in SPEECH}
        for name, figures in results.items():
            for metric, value in figures.items():
                differences.setdefault(name, {}).setdefault(metric, []).append(value - base[metric])
    rows = [["all off", *(f"{np.mean(off[metric]):.4f}" for metric in METRICS)]]
    rows += [[name, *(interval(by[m]) if m in by else "the same" for m in METRICS)] for name, by in differences.items()]
    names = ", then ".join(list(found)[:2])
    print(table(f"On minus off: {seeds} seeds, {bursts} bursts of {PIECE:,} bytes a domain ({names}); * zero is outside the 95 % interval",
                ["feature", *METRICS], rows))  # fmt: skip


if __name__ == "__main__":
    main()
