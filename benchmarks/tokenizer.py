"""The tokenizer beside Hugging Face's `tokenizers`: megabytes a second, learning and encoding, one thread each.

Usage: python benchmarks/tokenizer.py [--megabytes 5] [--rounds 3] [--merges 384 4000]
Both learn the same number of merges from Python's own library, and encode it by their own. Theirs is the byte-level
configuration of GPT-2, given the text as documents, as lines or as one text, by each of its calls; its fastest counts.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sysconfig
from collections.abc import Callable
from pathlib import Path

os.environ.update(RAYON_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

import tokenizers
from common import median_seconds, table

import organism as o
from organs.kernels import tokenizer as twin

MIN_COUNT = o.TOKEN_MIN_COUNT


def corpus(size: int) -> list[str]:
    """Files of the standard library, in order of name, until they are `size` bytes."""
    texts, total = [], 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" in path.parts or total >= size:
            continue
        try:
            texts.append(path.read_bytes().decode()[: size - total])
        except UnicodeDecodeError:  # they take text only
            continue
        total += len(texts[-1].encode())
    return texts


def their_tokenizer() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def they_learn(texts: list[str], merges: int) -> tokenizers.Tokenizer:
    tokenizer = their_tokenizer()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=256 + merges, min_frequency=MIN_COUNT, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def we_learn(texts: list[bytes], merges: int) -> o.Tokenizer:
    bare = o.Tokenizer()
    return o.Tokenizer(twin.learn(texts, [], bare.vocabulary, merges, MIN_COUNT, o.character_classes()))


def compare(
    ours: Callable[[], object], theirs: dict[str, Callable[[], object]], rounds: int
) -> tuple[float, float, str]:
    """Median seconds of ours and of their fastest, and its name. Theirs all run once, then the fastest beside ours."""
    trial = {name: median_seconds(action, 1) for name, action in theirs.items()}
    best = min(trial, key=lambda name: trial[name])
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):  # in turns, so that a busy machine is busy for both
        seconds[0].append(median_seconds(ours, 1))
        seconds[1].append(median_seconds(theirs[best], 1))
    return statistics.median(seconds[0]), statistics.median(seconds[1]), best


def compare_learning(texts: list[str], merges: int, rounds: int) -> tuple[float, float, str]:
    whole, ours = "".join(texts), [text.encode() for text in texts]
    forms = {"documents": texts, "lines": whole.splitlines(keepends=True)}
    theirs = {name: lambda form=form: they_learn(form, merges) for name, form in forms.items()}
    return compare(lambda: we_learn(ours, merges), theirs, rounds)


def compare_encoding(texts: list[str], merges: int, rounds: int, cached: bool) -> tuple[float, float, str]:
    """`cached`: both have met the text before; or both begin with an empty cache."""
    whole = "".join(texts)
    mine, state, data = we_learn([whole.encode()], merges), they_learn(texts, merges).to_str(), whole.encode()
    kept = twin.Encoder(mine.merges, o.character_classes()), tokenizers.Tokenizer.from_str(state)
    assert mine.decode(kept[0].encode(data)) == data

    def theirs(call: str, form: list[str]) -> object:
        tokenizer = kept[1] if cached else tokenizers.Tokenizer.from_str(state)
        return [encoding.ids for encoding in getattr(tokenizer, call)(form)]

    def ours() -> object:
        return (kept[0] if cached else twin.Encoder(mine.merges, o.character_classes())).encode(data)

    forms = {"documents": texts, "lines": whole.splitlines(keepends=True), "one text": [whole]}
    calls = [(call, name) for call in ("encode_batch", "encode_batch_fast") for name in forms]
    actions = {f"{call}, {name}": lambda call=call, name=name: theirs(call, forms[name]) for call, name in calls}
    return compare(ours, actions, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--merges", type=int, nargs="+", default=[384, 4000])
    asked = parser.parse_args()
    twin.warm()
    o.character_classes()  # a table that is made once
    texts = corpus(int(asked.megabytes * 1e6))
    megabytes, rows = len("".join(texts).encode()) / 1e6, []
    for merges in asked.merges:
        for task, (ours, theirs, best) in {
            "learn": compare_learning(texts, merges, asked.rounds),
            "encode": compare_encoding(texts, merges, asked.rounds, cached=True),
            "encode, nothing cached": compare_encoding(texts, merges, asked.rounds, cached=False),
        }.items():
            rows.append([task, merges, megabytes / ours, megabytes / theirs, best, theirs / ours])
    head = ["task", "merges", "ours (MB/s)", "theirs (MB/s)", "their fastest", "ratio"]
    print(table(f"Tokenizer, {megabytes:.1f} MB of Python, one thread, medians of {asked.rounds}", head, rows))
    print("Must: 1.0 times theirs. Aim: 3 times.")


if __name__ == "__main__":
    main()
