"""Body on the field against the field alone: prequential bits per byte from birth.

Usage: python benchmarks/on_field.py [--bytes 400000] [--stage child] NAME=PATH …
The texts of the table are made by shared/peers/texts.sh; any other text will do.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from common import fresh_home, table, texts

from organism import Organism


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bytes", type=int, default=400_000)
    parser.add_argument("--stage", default=None)
    parser.add_argument("texts", nargs="*", metavar="NAME=PATH")
    options = parser.parse_args()
    rows = []
    with fresh_home() as home, Organism(home, kernels="wait", seed=0) as life:
        for name, path in texts(options.texts).items():
            data, began = Path(path).read_bytes()[: options.bytes], time.perf_counter()
            result = life.evaluate(data, prequential=True, blank=True, stage=options.stage)
            field, both = result["field_bits_per_byte"], result["bits_per_byte"]
            rows.append(
                (
                    name,
                    len(data),
                    f"{field:.4f}",
                    f"{both:.4f}",
                    f"{100 * (1 - both / field):.2f} %",
                    time.perf_counter() - began,
                    "3 %",
                    "6 %",
                )
            )
            print(rows[-1], flush=True)
    print(
        table(
            "Body on the field",
            ["text", "bytes", "field alone (bits/byte)", "body on the field", "less", "seconds", "must", "aim"],
            rows,
        )
    )


if __name__ == "__main__":
    main()
