"""It does not forget: bits per byte on held-out text of each domain, after each of several domains, one pass each.

Usage: python benchmarks/forgetting.py --domain bible=bible.txt --domain python=python.txt --domain russian=russian.txt

Each life learns the domains in the order given, through the real `organism train`. Beside it lives one with plain
fine-tuning: a single mixer in the field, no replay beyond the last few thousand tokens, no guard. Of each text the last
twentieth, at least 20 KB, is held out. Without --domain: nonames.txt, then a megabyte of Python's library. With --keep the
lives stay in a folder, and a run that was interrupted goes on there.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

from common import ROOT, organism, table, texts

PLAIN = dict(FIELD_DOMAINS=1, LEARNING_EXPERIENCE_TOKENS=4096, LEARNING_GUARD=0, DELTAS_ON_DOMAIN="off")


def split(path: Path, size: int, folder: Path, name: str) -> tuple[Path, Path]:
    """(what is learned, what is held out) of the first `size` bytes of a text."""
    data = path.read_bytes()[:size]
    held = max(20_000, len(data) // 20)
    parts = folder / f"{name}.txt", folder / f"{name}.held"
    for part, content in zip(parts, (data[:-held], data[-held:]), strict=True):
        part.write_bytes(content)
    return parts


def live(
    parts: dict[str, tuple[Path, Path]], settings: dict[str, object], options: list[str], folder: Path
) -> list[dict[str, float]]:
    """After each domain, {domain: bits per byte on what was held out of it}; domains to come as well."""
    variables = {f"ORGANISM_{key}": str(value) for key, value in settings.items()}
    os.environ.update(variables)
    folder.mkdir(parents=True, exist_ok=True)
    home, notes = folder / "home", folder / "measured.json"
    measured = json.loads(notes.read_text()) if notes.exists() else []
    try:
        for learned, _ in list(parts.values())[len(measured) :]:
            done = organism("train", "--corpus", str(learned), "--quiet", "--json", *options, home=home)
            assert done.returncode == 0, done.stderr
            facts = json.loads(done.stdout.splitlines()[-1])
            scores = {name: score(home, held) for name, (_, held) in parts.items()}
            found = {name: bits["bits_per_byte"] for name, bits in scores.items()}
            field = next(iter(scores.values()))["field_bits_per_byte"]
            measured.append(found | dict(stage=facts["stage"], seconds=facts["seconds"], field=field))
            notes.write_text(json.dumps(measured))
    finally:
        for variable in variables:
            del os.environ[variable]
    return measured


def score(home: Path, path: Path) -> dict[str, float]:
    result = organism("eval", str(path), "--json", "--quiet", home=home)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--domain", action="append", default=[], metavar="NAME=PATH", help="a text; in the order of learning"
    )
    parser.add_argument("--bytes", type=int, default=1_000_000, help="of each text (default: 1,000,000)")
    parser.add_argument("--stage", help="hold this stage (default: born as an embryo, grows by its gates)")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION_KEY=VALUE", help="a setting of our life")
    parser.add_argument("--seed", default="1")
    parser.add_argument("--only-ours", action="store_true", help="leave the plain life out")
    parser.add_argument("--keep", metavar="FOLDER", help="keep the lives there, and go on with what is there")
    options = parser.parse_args()
    given = texts(options.domain) if options.domain else {"stories": ROOT / "nonames.txt"} | texts([])
    train = ["--seed", options.seed, *(["--stage", options.stage] if options.stage else [])]
    with tempfile.TemporaryDirectory() as passing:
        folder = Path(options.keep or passing).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        parts = {name: split(path, options.bytes, folder, name) for name, path in given.items()}
        ours = live(parts, dict(item.split("=", 1) for item in options.set), train, folder / "ours")
        plain = [] if options.only_ours else live(parts, PLAIN, train, folder / "plain")
    names, rows = list(parts), []
    for life, measured in (("organism", ours), ("plain fine-tuning", plain)):
        for name, after in zip(names, measured, strict=False):
            rows.append(
                (
                    life,
                    name,
                    after["stage"],
                    *(f"{after[n]:.4f}" for n in names),
                    f"{after['field']:.4f}",
                    f"{after['seconds']:.0f}",
                )
            )
    first, last = names[0], names[-1]
    head = ["life", "after", "stage", *names, f"{first}, field alone", "training (s)"]
    print(table("Held-out bits per byte after each domain", head, rows))
    rise = lambda measured: f"{100 * (measured[-1][first] / measured[0][first] - 1):+.2f} %" if measured else "–"
    paid = f"{100 * (ours[-1][last] / plain[-1][last] - 1):+.2f} %" if plain else "–"
    print(table("Forgetting", ["measure", "organism", "plain fine-tuning", "must", "aim"], [
        (f"rise on held-out {first} after {last}", rise(ours), rise(plain), "2 %", "0 %"),
        (f"what {last} pays for it, against plain fine-tuning", paid, "–", "3 %", "0 %"),
    ]))  # fmt: skip


if __name__ == "__main__":
    main()
