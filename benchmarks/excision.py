"""Excision: ten sources are read, one is forgotten. What does it know of that one afterwards, and of the rest?

Usage: python benchmarks/excision.py [--domain NAME=PATH] [--bytes N] [--stage S]

Beside it a life that never read the source, trained alike. Sources are cut from Python's library, or from the texts that
--domain names, ten in all; the last tenth of each is held out and never read by anybody.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import fresh_home, table, texts

import organism as o


def sources(paths: dict[str, Path], size: int) -> list[bytes]:
    """Ten pieces of `size` bytes, in turns from the texts given."""
    data = [path.read_bytes() for path in paths.values()]
    step = [max(1, (len(d) - size) // 10) for d in data]
    return [data[k % len(data)][(k * step[k % len(data)]) :][:size] for k in range(10)]


def lived(home: Path, names: list[Path], stage: str) -> o.Organism:
    """A life that has read these files, one after the other."""
    life = o.Organism(home, seed=1, threads=1, kernels="wait", stage=stage)
    for path in names:
        life.train([str(path)])
    return life


def bits(life: o.Organism, data: bytes) -> float:
    return life.evaluate(data)["bits_per_byte"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", action="append", default=[], metavar="NAME=PATH", help="texts to cut sources from")
    parser.add_argument("--bytes", type=int, default=20_000, help="bytes of a source (default: 20,000)")
    parser.add_argument("--stage", default="embryo", help="of both lives (default: embryo)")
    parser.add_argument("--gone", type=int, default=4, help="which source is forgotten, 0 to 9 (default: 4)")
    given = parser.parse_args()
    with fresh_home() as home:
        home.parent.mkdir(exist_ok=True)
        cut = given.bytes * 9 // 10
        pieces = sources(texts(given.domain), given.bytes)
        files = [home.parent / f"source{k}.txt" for k in range(10)]
        for path, piece in zip(files, pieces):
            path.write_bytes(piece[:cut])
        others = [path for k, path in enumerate(files) if k != given.gone]
        rest_read = b"".join(piece[:cut] for k, piece in enumerate(pieces) if k != given.gone)[:100_000]
        rest_new = b"".join(piece[cut:] for k, piece in enumerate(pieces) if k != given.gone)
        removed = pieces[given.gone][:cut]
        with lived(home / "ten", files, given.stage) as life:
            before = [bits(life, data) for data in (rest_read, rest_new, removed)]
            life.forget(source=str(files[given.gone]))
            after = [bits(life, data) for data in (rest_read, rest_new, removed)]
        with lived(home / "nine", others, given.stage) as life:
            never = [bits(life, data) for data in (rest_read, rest_new, removed)]
    rows = []
    for name, was, now, other, must, aim in zip(
        ("the rest, as read", "the rest, held out", "the removed source"),
        before,
        after,
        never,
        ("–", "+0.3 %", "±3 %"),
        ("–", "0 %", "±1 %"),
    ):
        change = now / (other if name.startswith("the removed") else was) - 1
        rows.append([name, was, now, other, f"{100 * change:+.2f} %", must, aim])
    head = ["text", "before (bits per byte)", "after forgetting", "never read it", "change", "must", "aim"]
    print(table(f"Excision of one source out of ten ({given.bytes:,} bytes each, {given.stage})", head, rows))
    print("Change: of the rest against before, of the removed source against the life that never read it.")


if __name__ == "__main__":
    main()
