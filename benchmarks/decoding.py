"""Decoding of the plain body, one stream, one thread, against PyTorch eager with a KV cache; and the whole voice.

Usage: python benchmarks/decoding.py [--rounds 5] [--peers shared/peers] [STAGE …]
Peer and prompt are those of shared/peers/torch_decode.py: 4 tokens of prompt, 92 generated greedily, vocabulary 643. The
voice is body on the field, gate, sampling chain and streaming, tokens/s of whole replies after the first token.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

from common import ROOT, fresh_home, table

from organism import STAGES, Body, BodyConfig, Decoder, Organism

MUST = dict(embryo=40, child=30, adolescent=8, teen=3.5, adult=2)
AIM = dict(embryo=80, child=60, adolescent=15, teen=6, adult=3)
VOCABULARY, PROMPT, COUNT = 643, [5, 6, 7, 8], 92


def ours(decoder: Decoder) -> float:
    """Tokens/s of one greedy text."""
    began = time.perf_counter()
    decoder.generate(PROMPT, COUNT)
    return (len(PROMPT) + COUNT - 1) / (time.perf_counter() - began)


def theirs(peer, body) -> float:
    import torch

    caches = [tuple(torch.zeros(b.heads, peer.LENGTH, b.head) for _ in "kv") for b in body.blocks]
    began = time.perf_counter()
    peer.generate(body, caches, PROMPT, COUNT)
    return (len(PROMPT) + COUNT - 1) / (time.perf_counter() - began)


def voice(stage: str, replies: int = 12) -> float:
    """Tokens/s of whole replies, median."""
    overrides = {"voice.min_tokens": 100, "voice.max_tokens": 100, "voice.repetition_guard": 0}
    rates = []
    with fresh_home() as home, Organism(home, stage=stage, kernels="wait", overrides=overrides, seed=1) as life:
        life.learn_now("It rains in the hills, and the river rises.")
        for _ in range(replies):
            reply = life.say("What do you know about the sea?")
            pieces = iter(reply)
            next(pieces)
            began = time.perf_counter()
            for _ in pieces:
                pass
            rates.append((reply.tokens - 1) / (time.perf_counter() - began))
    return statistics.median(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", type=Path, default=ROOT.parent / "shared" / "peers")
    parser.add_argument("stages", nargs="*", default=list(MUST))
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    sys.path.insert(0, str(options.peers))
    import torch_decode as peer

    rows = []
    for stage in options.stages:
        decoder = Decoder(Body(stage, VOCABULARY, BodyConfig(field=False)), "numba")
        body = peer.Body(*STAGES[stage])
        ours(decoder), theirs(peer, body)
        pairs = [
            (statistics.median(ours(decoder) for _ in range(5)), theirs(peer, body)) for _ in range(options.rounds)
        ]
        ratio = statistics.median(a / b for a, b in pairs)
        rows.append(
            (
                stage,
                statistics.median(b for _, b in pairs),
                statistics.median(a for a, _ in pairs),
                ratio,
                MUST.get(stage, "–"),
                AIM.get(stage, "–"),
            )
        )
        print(rows[-1], flush=True)
    print(
        table(
            "Decoding, one thread", ["stage", "PyTorch (tokens/s)", "organism (tokens/s)", "ratio", "must", "aim"], rows
        )
    )
    said = [
        (stage, voice(stage), must, aim)
        for stage, must, aim in (("embryo", 1000.0, 5000.0), ("adolescent", 700.0, 2500.0))
    ]
    print(table("The whole voice", ["stage", "tokens/s", "must", "aim"], said))


if __name__ == "__main__":
    main()
