"""`python -m organs.kernels warm [--quiet] [--nice] [PART…]`: compile everything, or these parts, once for this machine."""

from __future__ import annotations

import os
import sys

from organs import kernels


def main(arguments: list[str]) -> int:
    """Exit code 2 for anything but `warm`."""
    parts = [argument for argument in arguments[1:] if argument not in ("--quiet", "--nice")]
    if arguments[:1] != ["warm"] or not set(parts) <= set(kernels.PARTS):
        print(
            f"usage: python -m organs.kernels warm [--quiet] [--nice] [{' | '.join(kernels.PARTS)}]…", file=sys.stderr
        )
        return 2
    if "--nice" in arguments:  # a child of a conversation: whoever talks comes first
        os.nice(10)
    say = (lambda text: None) if "--quiet" in arguments else (lambda text: print(text, file=sys.stderr, flush=True))
    if parts:
        kernels.compile_parts(parts, say)
    else:
        kernels.warm(say)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
