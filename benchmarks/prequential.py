"""Prequential bits per byte of the first megabyte of each text, one pass from birth, beside zpaq -m5 where it is installed.

Usage: python benchmarks/prequential.py [--bytes 1000000] [--stage child] NAME=PATH …
The figures are what `organism eval --prequential --blank` prints; texts as shared/peers/texts.sh makes them, or any.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
from pathlib import Path

from common import organism, table, texts

MUST, AIM = dict(bible=1.26, python=1.11, russian=1.19), dict(bible=1.19, python=1.05, russian=1.12)


def zpaq(path: Path, size: int) -> object:
    """Bits per byte of a zpaq -m5 archive."""
    if not shutil.which("zpaq"):
        return "–"
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "a.zpaq"
        subprocess.run(["zpaq", "a", str(archive), str(path), "-m5"], capture_output=True, check=True)
        return 8 * archive.stat().st_size / size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bytes", type=int, default=1_000_000)
    parser.add_argument("--stage", default=None)
    parser.add_argument("texts", nargs="*", metavar="NAME=PATH")
    options = parser.parse_args()
    rows = []
    for name, source in texts(options.texts).items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "text"
            path.write_bytes(Path(source).read_bytes()[: options.bytes])
            arguments = ["eval", str(path), "--prequential", "--blank", "--json"] + (
                ["--stage", options.stage] if options.stage else []
            )
            finished = organism(*arguments, home=Path(folder) / "home")
            assert finished.returncode == 0, finished.stderr
            result = json.loads(finished.stdout.splitlines()[-1])
            figures = [f"{result[key]:.4f}" for key in ("field_bits_per_byte", "bits_per_byte")]
            zipped, limits = zpaq(path, result["bytes"]), (MUST.get(name, "–"), AIM.get(name, "–"))
            rows.append((name, result["bytes"], zipped, *figures, result["seconds"], *limits))
            print(rows[-1], flush=True)
    head = ["text", "bytes", "zpaq -m5", "field alone", "organism (bits/byte)", "seconds", "must", "aim"]
    print(table("Prequential, one pass from birth", head, rows))


if __name__ == "__main__":
    main()
