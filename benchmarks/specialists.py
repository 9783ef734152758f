"""Four organisms, a domain each, against one organism with the compute of all: bits per byte on text that none has read.

    python benchmarks/specialists.py --text bible=/tmp/bible.txt --text python=... --text russian=...

The fourth domain is dialogue: --text dialogue=PATH (benchmarks/dialogues.py makes one), else nonames.txt without its last part. All
hear nonames.txt at birth. Each specialist reads its whole text, but for what is held out, and trains so many steps; the one reads all
of that and spends the training FLOPs of the four together. It also has their memory: four times the experience that is replayed, and
tables of the field that may, for each of its domains, grow as large as theirs together. All have bodies and vocabularies of the same
size, but for who has read less than 200 KB. Texts come as documents of at most 64 KB, to the one those of all domains in turns. Who
has not read all is an error.

Held-out text comes in passages. Their first bytes are the question: by them the router chooses (the lowest surprise a byte), and
the ensemble's weights begin to learn; bits count after them. All is read byte by byte (swarm/reading.py), everything frozen.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from common import ROOT, table, texts

import organism
from organism import Gate, Organism, Piece, Schooling, Snapshot, Tokenizer
from swarm.ensemble import Mixer
from swarm.reading import ByteReader

PASSAGE, QUESTION = 600, 150  # bytes
DOCUMENT = 65_536  # bytes at most
FULL_BYTES = 200_000  # from which on all vocabularies are as large, and so the bodies
DIALOGUE, ONE = "dialogue", "the one"
PARTS = {"field": 0.0, "body": 1.0, "both": None}  # weights of the body that are tried; None: the gate's

Shelf = list[tuple[str, bytes]]  # documents with their names


# --- Texts. ---


def split(path: Path, most: int, passages: int) -> tuple[bytes, list[bytes]]:
    """(what is learned, passages held out), from the beginning and the end of a text."""
    data = path.read_bytes()
    held = data[-passages * PASSAGE :]
    return data[: min(most, len(data) - len(held))], [held[at : at + PASSAGE] for at in range(0, len(held), PASSAGE)]


def documents(name: str, text: bytes) -> Shelf:
    """A text, cut at ends of lines."""
    shelf: Shelf = []
    while text:
        cut = Tokenizer.boundary(text, DOCUMENT) if len(text) > DOCUMENT else len(text)
        shelf.append((f"{name}-{len(shelf)}", text[:cut]))
        text = text[cut:]
    return shelf


def in_turns(shelves: list[Shelf]) -> Shelf:
    """The first of each, then the second of each …"""
    longest = max(map(len, shelves))
    return [shelf[at] for at in range(longest) for shelf in shelves if at < len(shelf)]


# --- Raising. ---


class Budget(Schooling):
    """Reads some documents, then replays what was lived, until the body has trained `steps` steps or so many FLOPs are spent."""

    def __init__(self, life: Organism, shelf: Shelf, steps: float, flops: float):
        super().__init__(life, ["-"], lambda event: None, hold_stage=True)
        self.shelf, self.goal_steps, self.goal_flops = shelf, steps, flops

    def _school(self) -> None:
        self._pay()
        for source, text in self.shelf:
            if source not in self.life.state["reading"] and self._piece(Piece(source, text, 0, len(text), True)):
                return
        self.fresh = 0
        while not self._enough():
            self._step()

    def _enough(self) -> bool:
        return self.learner.body.steps >= self.goal_steps or self.life.state["training_flops"] >= self.goal_flops


class Raised(NamedTuple):
    """What became of an organism. FLOPs and seconds are of its training alone."""

    lived: int  # bytes, with those heard at birth
    steps: int
    tokens: int
    vocabulary: int
    domains: int
    table_mb: int  # of the field, for each domain
    flops: float
    seconds: float


def raise_one(
    home: Path, shelf: Shelf, stage: str, steps: float = np.inf, flops: float = np.inf, like: Sequence[Raised] = ()
) -> Raised:
    """An organism of this home, made or trained on. like: those whose memory it has together."""
    defaults = organism.Config()
    overrides = {
        "immunity.judge": False,  # what each is to learn is given, not judged
        "tokenizer.full_bytes": FULL_BYTES,
        "tokenizer.max_merges": defaults.tokenizer.full_merges,
        "learning.experience_tokens": max(1, len(like)) * defaults.learning.experience_tokens,
        "field.max_table_mb": sum(one.table_mb for one in like) or defaults.field.max_table_mb,
    }
    newborn, began = not (home / "body" / "CURRENT").exists(), time.perf_counter()
    with Organism(home, seed=1, kernels="wait", overrides=overrides, stage=stage if newborn else None) as life:
        with life._lock:
            Budget(life, shelf, steps, flops).run()
        lived = Counter[str]()
        for row in life.memory.lived():
            lived[row.source] += len(row.text)
        read, snapshot, state = sum(lived[source] for source, _ in shelf), life.published, life.state
        if short := [source for source, text in shelf if lived[source] < len(text)]:
            whole = sum(len(text) for _, text in shelf)
            sys.exit(
                f"error: {home.name} has read {read:,} of {whole:,} bytes, not all of {short[0]}: give them more --steps."
            )
        return Raised(state["lived_bytes"], snapshot.body.steps, state["training_tokens"], len(snapshot.tokenizer),
                      len(getattr(snapshot.field, "resting", "1")), snapshot.field.config.table_mb, state["training_flops"],
                      time.perf_counter() - began)  # fmt: skip


def raise_family(folder: Path, shelves: dict[str, Shelf], stage: str, steps: int, youth: float) -> dict[str, Raised]:
    """Clones of one parent, which read `youth` of each text, in turns, and trained as much of all steps; each goes on with the
    rest of its own. What the parent spent is shared among them."""
    cut = {name: round(youth * len(shelf)) for name, shelf in shelves.items()}
    first, count = round(youth * steps * len(shelves)), len(shelves)
    parent = raise_one(
        folder / "parent", in_turns([shelf[: cut[name]] for name, shelf in shelves.items()]), stage, first
    )
    raised = {}
    for name, shelf in shelves.items():
        if not (folder / name).exists():
            with Organism(folder / "parent", seed=1) as life:
                life.bear(folder / name, clone=True)
        one = raise_one(folder / name, shelf[cut[name] :], stage, first + round((1 - youth) * steps))
        own = parent.flops / count + one.flops - parent.flops
        raised[name] = one._replace(flops=own)
    return raised


# --- Reading. ---


def told(snapshot: Snapshot, passages: list[bytes]) -> list[np.ndarray]:
    """The distribution of each byte of each passage, float32 [n, 257]."""
    return [np.stack([*distributions(ByteReader(snapshot, ahead=passage[:QUESTION]), passage)]) for passage in passages]


def distributions(reader: ByteReader, data: bytes) -> Iterator[np.ndarray]:
    for byte in data:
        yield reader.next().astype(np.float32)
        reader.advance(bytes([byte]))


def read(home: Path, passages: dict[str, list[bytes]]) -> dict[str, list[np.ndarray]]:
    """What an organism says of all passages."""
    with Organism(home, read_only=True, threads=1) as life:
        return {name: told(life.published, given) for name, given in passages.items()}


def read_parts(home: Path, passages: list[bytes]) -> dict[str, float]:
    """Bits a byte by the field alone, the body alone and both."""
    with Organism(home, read_only=True, threads=1) as life:
        return {
            part: mean_bits(told(with_gate(life.published, share), passages), passages) for part, share in PARTS.items()
        }


def with_gate(snapshot: Snapshot, share: float | None) -> Snapshot:
    """The same, with this weight of the body everywhere."""
    if share is None:
        return snapshot
    gate = Gate()
    gate.weight[:] = share
    return dataclasses.replace(snapshot, gate=gate, _decoder=None)


# --- Bits. ---


def bits_of_each(rows: np.ndarray, data: bytes) -> np.ndarray:
    return -np.log2(rows[np.arange(len(data)), np.frombuffer(data, np.uint8)])


def mean_bits(rows: list[np.ndarray], passages: list[bytes]) -> float:
    """A byte, of what follows the questions."""
    return float(np.mean([bits_of_each(r, p)[QUESTION:].mean() for r, p in zip(rows, passages, strict=True)]))


def surprise(rows: np.ndarray, data: bytes) -> float:
    """As `swarm.member.surprise_per_byte` of the question."""
    return float(bits_of_each(rows, data)[:QUESTION].mean())


def mixed_bits(rows: list[np.ndarray], data: bytes) -> float:
    """A byte, of what follows the question, by the ensemble, which learns from byte to byte."""
    mixer, costs = Mixer(len(rows)), []
    for at, byte in enumerate(data):
        mixer.mix([one[at] for one in rows])
        costs.append(mixer.learn(byte))
    return float(np.mean(costs[QUESTION:]))


class Row(NamedTuple):
    """Bits a byte of one domain, and how many questions went to its specialist."""

    best: float
    routed: float
    ensemble: float
    others: list[float]  # of the one, and of the larger one
    hits: int


def row_of(
    domain: str, passages: list[bytes], colony: dict[str, list[np.ndarray]], others: list[list[np.ndarray]]
) -> Row:
    routed, mixed, hits = [], [], 0
    for k, passage in enumerate(passages):
        chosen = min(colony, key=lambda name, k=k, passage=passage: surprise(colony[name][k], passage))
        hits += chosen == domain
        routed.append(mean_bits([colony[chosen][k]], [passage]))
        mixed.append(mixed_bits([rows[k] for rows in colony.values()], passage))
    best = min(mean_bits(rows, passages) for rows in colony.values())
    return Row(
        best, float(np.mean(routed)), float(np.mean(mixed)), [mean_bits(rows, passages) for rows in others], hits
    )


def percent(a: float, b: float) -> str:
    return f"{a / b - 1:+.1%}"


# --- The tables. ---


def people(raised: dict[str, Raised]) -> str:
    head = [
        "organism",
        "bytes lived",
        "steps",
        "tokens trained",
        "vocabulary",
        "domains of the field",
        "MB of each one's table",
        "training FLOPs",
        "s",
    ]
    rows = [
        [name, f"{r.lived:,}", f"{r.steps:,}", f"{r.tokens:,}", r.vocabulary, r.domains, r.table_mb, f"{r.flops:.3g}", f"{r.seconds:.0f}"]
        for name, r in raised.items()
    ]  # fmt: skip
    return table("Who was raised", head, rows)


def results(title: str, rows: dict[str, Row], others: list[str]) -> str:
    head = ["held out", "best specialist", "routed", "ensemble", *others, "routed / best", "ensemble / best"]
    head += [f"{what} / {other}" for other in others for what in ("routed", "ensemble")]
    lines = []
    for domain, row in rows.items():
        numbers = [f"{x:.4f}" for x in (row.best, row.routed, row.ensemble, *row.others)]
        ratios = [percent(row.routed, row.best), percent(row.ensemble, row.best)]
        ratios += [percent(x, other) for other in row.others for x in (row.routed, row.ensemble)]
        lines.append([domain, *numbers, *ratios])
    return table(title, head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--steps", type=int, default=1200, help="of each specialist")
    parser.add_argument("--bytes", type=int, default=1_000_000, help="that each specialist reads at most")
    parser.add_argument("--passages", type=int, default=20, help="held out of each domain")
    parser.add_argument("--read", type=int, help="of them that are read (default: all), from the first on")
    parser.add_argument("--stage", default="child")
    parser.add_argument("--larger", metavar="STAGE", help="also one of this stage with as many FLOPs")
    parser.add_argument("--youth", type=float, default=0.0,
                        help="share of all compute and text that one parent takes before it divides into the specialists; "
                             "0: raised apart")  # fmt: skip
    parser.add_argument(
        "--parts", type=int, default=4, help="passages by which field, body and gate are told apart; 0: not"
    )
    parser.add_argument(
        "--folder", type=Path, help="where they live (default: a temporary one); again: reads them again"
    )
    options = parser.parse_args()
    heard = ROOT / "nonames.txt"
    paths = texts(options.text)
    paths[DIALOGUE] = paths.pop(DIALOGUE, heard)  # the last
    parts = {name: split(path, options.bytes, options.passages) for name, path in paths.items()}
    held = {name: part[1][: options.read] for name, part in parts.items()}
    if paths[DIALOGUE] == heard:  # the first breath of all, without what is held out
        organism.seed_corpus = lambda: parts[DIALOGUE][0]
    shelves = {name: [] if paths[name] == heard else documents(name, part[0]) for name, part in parts.items()}
    with tempfile.TemporaryDirectory(prefix="organism-bench-") as scratch:
        folder, began = options.folder or Path(scratch), time.perf_counter()
        folder.mkdir(parents=True, exist_ok=True)
        if options.youth:
            raised = raise_family(folder, shelves, options.stage, options.steps, options.youth)
        else:
            raised = {
                name: raise_one(folder / name, shelf, options.stage, options.steps) for name, shelf in shelves.items()
            }
        budget, alone = sum(one.flops for one in raised.values()), {ONE: options.stage}
        alone |= {f"one {options.larger}": options.larger} if options.larger else {}
        everything = in_turns(list(shelves.values()))
        for name, stage in alone.items():
            raised[name] = raise_one(
                folder / name.replace(" ", "-"), everything, stage, flops=budget, like=[raised[one] for one in shelves]
            )
        print(people(raised), flush=True)
        homes = {name: folder / name.replace(" ", "-") for name in raised}
        training, began = time.perf_counter() - began, time.perf_counter()
        with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
            seen = dict(zip(homes, pool.map(functools.partial(read, passages=held), homes.values())))
            few = {name: held[name][: options.parts] for name in shelves} if options.parts else {}
            made = {(name, domain): pool.submit(read_parts, homes[name], given)
                    for domain, given in few.items() for name in (domain, ONE)}  # fmt: skip
            made = {of: run.result() for of, run in made.items()}
    rows = {domain: row_of(domain, passages, {name: seen[name][domain] for name in shelves}, [seen[name][domain] for name in alone])
            for domain, passages in held.items()}  # fmt: skip
    print(results(f"Bits per byte of four at {options.stage!r}, {options.steps:,} steps each, and of one with all their compute", rows,
                  list(alone)))  # fmt: skip
    if made:
        head = ["held out", *(f"{who}: {part}" for who in ("specialist", ONE) for part in PARTS)]
        lines: list[list[Any]] = [[domain, *(f"{made[who, domain][part]:.4f}" for who in (domain, ONE) for part in PARTS)]
                                  for domain in few]  # fmt: skip
        print(
            table(
                f"Field alone, body alone, and both by the gate; {options.parts} passages of each domain", head, lines
            )
        )
    print(f"The router chose the specialist for {sum(row.hits for row in rows.values())} of {sum(map(len, held.values()))} passages of"
          f" {PASSAGE} bytes, by the first {QUESTION}. {os.cpu_count()} cores; {training:.0f} s of raising,"
          f" {time.perf_counter() - began:.0f} s of reading.")  # fmt: skip


if __name__ == "__main__":
    main()
