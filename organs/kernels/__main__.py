"""`python -m organs.kernels warm [--quiet]`: compile everything, once for this machine."""

from __future__ import annotations

import os
import sys

from organs import kernels


def main(arguments: list[str]) -> int:
    """Exit code 2 for anything but `warm`."""
    if arguments[:1] != ["warm"]:
        print("usage: python -m organs.kernels warm [--quiet]", file=sys.stderr)
        return 2
    if "--quiet" in arguments:  # a child of a conversation: whoever talks comes first
        os.nice(10)
    kernels.warm(lambda text: None if "--quiet" in arguments else print(text, file=sys.stderr, flush=True))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
