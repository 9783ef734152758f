"""The tokenizer beside Hugging Face's `tokenizers`: megabytes a second, learning and encoding, one thread each.

Usage: python benchmarks/tokenizer.py [--megabytes 10] [--rounds 3] [--merges 384 4000]
Both learn the same number of merges from Python's own library, and encode it by their own. Theirs is the byte-level
configuration of GPT-2, given the text as documents, as lines and as one text, by each of its calls; its fastest counts.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

os.environ.update(RAYON_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

import tokenizers  # noqa: E402
from common import table  # noqa: E402

import organism as o  # noqa: E402
from organs.kernels import tokenizer as twin  # noqa: E402

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


def alternate(actions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each action; they take turns, so that a busy machine is busy for all."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            began = time.perf_counter()
            action()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in seconds.items()}


def compare(task: str, merges: int, megabytes: float, actions: dict[str, Callable[[], object]], rounds: int) -> list:
    """A row of the table; the action named "ours" against the fastest other one."""
    seconds = alternate(actions, rounds)
    ours = seconds.pop("ours")
    best = min(seconds, key=lambda name: seconds[name])
    return [task, merges, megabytes / ours, megabytes / seconds[best], best, seconds[best] / ours]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--merges", type=int, nargs="+", default=[384, 4000])
    asked = parser.parse_args()
    twin.warm()
    texts = corpus(int(asked.megabytes * 1e6))
    whole, data, ours = "".join(texts), "".join(texts).encode(), [text.encode() for text in texts]
    lines = whole.splitlines(keepends=True)
    forms = {"documents": texts, "lines": lines, "one text": [whole]}
    rows, megabytes = [], len(data) / 1e6
    for merges in asked.merges:
        actions: dict[str, Callable[[], object]] = {"ours": lambda: we_learn(ours, merges)}
        actions |= {name: lambda form=form: they_learn(form, merges) for name, form in forms.items()}
        rows.append(compare("learn", merges, megabytes, actions, asked.rounds))

        mine, theirs = we_learn(ours, merges), they_learn(texts, merges)
        encoder = twin.Encoder(mine.merges, o.character_classes())
        assert mine.decode(encoder.encode(data)) == data
        actions = {"ours": lambda: encoder.encode(data)}  # warm, as theirs is: both remember what they met
        for call in (theirs.encode_batch, theirs.encode_batch_fast):
            for name, form in forms.items():
                actions[f"{call.__name__}, {name}"] = lambda call=call, form=form: [e.ids for e in call(form)]
        rows.append(compare("encode", merges, megabytes, actions, asked.rounds))
        fresh = {"ours": lambda: twin.Encoder(mine.merges, o.character_classes()).encode(data)}
        state = theirs.to_str()
        fastest = {"documents": texts, "lines": lines}
        fresh |= {
            f"encode_batch_fast, {name}": lambda form=form: [
                e.ids for e in tokenizers.Tokenizer.from_str(state).encode_batch_fast(form)
            ]
            for name, form in fastest.items()
        }
        rows.append(compare("encode, nothing cached", merges, megabytes, fresh, asked.rounds))
    head = ["task", "merges", "ours (MB/s)", "theirs (MB/s)", "their fastest", "ratio"]
    print(table(f"Tokenizer, {megabytes:.1f} MB of Python, one thread, medians of {asked.rounds}", head, rows))
    print("Must: 1.0 times theirs. Aim: 3 times.")


if __name__ == "__main__":
    main()
