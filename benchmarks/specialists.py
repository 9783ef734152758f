"""Four organisms, a domain each, against one organism with the compute of all: bits per byte on text that none has read.

    python benchmarks/specialists.py --text bible=/tmp/bible.txt --text python=... --text russian=...

The fourth domain is dialogue: nonames.txt, of which the last part is held out, also from what newborns read. Held-out text comes
in passages. Their first bytes are the question: by them the router chooses (the lowest surprise a byte), and the ensemble's
weights begin to learn; bits count after them. All columns are byte by byte (swarm/reading.py), everything frozen.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from common import ROOT, table, texts

import organism
from organism import Organism
from swarm.ensemble import Mixer
from swarm.member import surprise_per_byte
from swarm.reading import ByteReader

PASSAGE, QUESTION = 600, 150  # bytes
DIALOGUE = "dialogue"


def split(path: Path, train: int, passages: int) -> tuple[bytes, list[bytes]]:
    """(what is learned, passages held out), from the beginning and the end of a text."""
    data = path.read_bytes()
    held = data[-passages * PASSAGE :]
    return data[: min(train, len(data) - len(held))], [held[at : at + PASSAGE] for at in range(0, len(held), PASSAGE)]


def interleaved(parts: dict[str, bytes], piece: int = 4096) -> bytes:
    """All of them in turns."""
    longest = max(map(len, parts.values()))
    return b"".join(part[at : at + piece] for at in range(0, longest, piece) for part in parts.values())


def raise_one(home: Path, text: bytes, steps: int, stage: str, seed: int) -> float:
    """An organism of this home, trained to so many steps; its training FLOPs."""
    corpus = home.with_suffix(".txt")
    corpus.write_bytes(text)
    overrides = {"immunity.judge": False}  # what each is to learn is given, not judged
    newborn = not (home / "body" / "CURRENT").exists()
    with Organism(home, seed=seed, kernels="wait", overrides=overrides, stage=stage if newborn else None) as life:
        left = steps - life.published.body.steps
        if left > 0:
            life.train([str(corpus)], steps=left, hold_stage=True)
        return life.state["training_flops"]


def raise_family(folder: Path, learned: dict[str, bytes], steps: int, stage: str, youth: float) -> float:
    """Homes NAME of clones of one parent, which read `youth` of each text, in turns, and trained as much of all steps; each
    then goes on with the rest of its own. The training FLOPs of all."""
    cut = {name: int(youth * len(text)) for name, text in learned.items()}
    mixed = interleaved({name: text[: cut[name]] for name, text in learned.items()})
    first = round(youth * steps * len(learned))
    total = parents = raise_one(folder / "parent", mixed, first, stage, 1)
    for name, text in learned.items():
        if not (folder / name).exists():
            with Organism(folder / "parent", seed=1) as parent:
                parent.bear(folder / name, clone=True)
        goal = first + round((1 - youth) * steps)
        total += raise_one(folder / name, text[cut[name] :], goal, stage, 1) - parents
    return total


def read(home: Path, passages: dict[str, list[bytes]]) -> tuple[dict[str, list[np.ndarray]], dict[str, list[float]]]:
    """({domain: next-byte distributions of each passage, float32 [n, 257]}, {domain: surprise of each question})."""
    with Organism(home, read_only=True, threads=1) as life:
        told, surprises = {}, {}
        for name, parts in passages.items():
            told[name] = [distributions(ByteReader.of(life), part) for part in parts]
            surprises[name] = [surprise_per_byte(life, part[:QUESTION].decode("utf-8", "replace")) for part in parts]
        return told, surprises


def distributions(reader: ByteReader, data: bytes) -> np.ndarray:
    rows = np.empty((len(data), 257), np.float32)
    for row, byte in zip(rows, data):
        row[:] = reader.next()
        reader.advance(bytes([byte]))
    return rows


def bits(rows: np.ndarray, data: bytes) -> float:
    """Of what follows the question."""
    answer = np.frombuffer(data, np.uint8)[QUESTION:]
    return float(-np.log2(rows[np.arange(QUESTION, len(data)), answer]).sum())


def mixed_bits(rows: list[np.ndarray], data: bytes) -> float:
    """Of what follows the question, by the ensemble, which learns from byte to byte."""
    mixer, total = Mixer(len(rows)), 0.0
    for at, byte in enumerate(data):
        mixer.mix([one[at] for one in rows])
        cost = mixer.learn(byte)
        total += cost if at >= QUESTION else 0.0
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--steps", type=int, default=300, help="of each specialist; the one gets as many as all")
    parser.add_argument("--bytes", type=int, default=200_000, help="that each specialist reads at most")
    parser.add_argument("--passages", type=int, default=5, help="held out of each domain")
    parser.add_argument("--stage", default="child")
    parser.add_argument(
        "--youth", type=float, default=0.0,
        help="share of all compute and text that one parent takes before it divides into the specialists; 0: raised apart",
    )  # fmt: skip
    parser.add_argument(
        "--folder", type=Path, help="where the organisms live (default: a temporary one); again: goes on"
    )
    options = parser.parse_args()
    paths = texts(options.text) | {DIALOGUE: ROOT / "nonames.txt"}
    parts = {name: split(path, options.bytes, options.passages) for name, path in paths.items()}
    learned, held = {n: part[0] for n, part in parts.items()}, {n: part[1] for n, part in parts.items()}
    organism.seed_corpus = lambda: learned[DIALOGUE]  # the first breath of all, without what is held out
    with tempfile.TemporaryDirectory(prefix="organism-bench-") as scratch:
        folder, began = options.folder or Path(scratch), time.perf_counter()
        folder.mkdir(parents=True, exist_ok=True)
        if options.youth:
            spent = raise_family(folder, learned, options.steps, options.stage, options.youth)
        else:
            spent = sum(raise_one(folder / n, text, options.steps, options.stage, 1) for n, text in learned.items())
        alone = raise_one(folder / "one", interleaved(learned), options.steps * len(learned), options.stage, 1)
        seconds = time.perf_counter() - began
        seen = {name: read(folder / name, held) for name in (*learned, "one")}
    rows, hits = [], 0
    for domain, passages in held.items():
        size = sum(len(part) - QUESTION for part in passages)
        cost = {
            name: sum(bits(r, p) for r, p in zip(told[domain], passages)) / size for name, (told, _) in seen.items()
        }
        chosen = [min(learned, key=lambda name, k=k: seen[name][1][domain][k]) for k in range(len(passages))]
        hits += chosen.count(domain)
        routed = sum(bits(seen[c][0][domain][k], p) for k, (c, p) in enumerate(zip(chosen, passages))) / size
        mixed = sum(mixed_bits([seen[n][0][domain][k] for n in learned], p) for k, p in enumerate(passages)) / size
        best = min(cost[name] for name in learned)
        rows.append([domain, best, routed, mixed, cost["one"], f"{routed / best - 1:+.1%}", f"{mixed / best - 1:+.1%}",
                     f"{mixed / cost['one'] - 1:+.1%}"])  # fmt: skip
    head = [
        "held out",
        "best specialist",
        "routed",
        "ensemble",
        "the one",
        "routed / best",
        "ensemble / best",
        "ensemble / one",
    ]
    print(table(f"Bits per byte of four at {options.stage!r}, {options.steps} steps each, and of one with all their compute", head,
                [[*row[:1], *(f"{x:.4f}" for x in row[1:5]), *row[5:]] for row in rows]))  # fmt: skip
    passages = sum(map(len, held.values()))
    print(f"The router chose the specialist for {hits} of {passages} passages of {PASSAGE} bytes, by the first {QUESTION}. Training"
          f" FLOPs: {spent:.3g} of the four, {alone:.3g} of the one. {os.cpu_count()} cores, {seconds:.0f} s of training.")  # fmt: skip


if __name__ == "__main__":
    main()
