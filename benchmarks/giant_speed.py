"""The giant against llama.cpp: prefill and decode, paired: both are measured in turn, in one run, on the same file.

Usage: python benchmarks/giant_speed.py MODEL.gguf [--peer PYTHON] [--formats FILE …] [--rounds 4] [--only NAME …]

PYTHON is an interpreter that has llama-cpp-python built for this CPU (its own environment; 0.3.36 here). Without it the peer's
columns stay empty. A row's figures are the best of the rounds; the ratio is the median of the rounds' own ratios, each of two
measurements that follow one another. FILEs: the same model in other formats (`organism giant convert`).
Rows: context, threads, paths (ORGANISM_KERNELS forced for us, native for the peer), formats, long, neighbour, sampling, start.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, table

MUST = {  # (decode, prefill): ratio to llama.cpp
    "context 128": (1.6, None), "context 512": (1.8, 4.0), "avx2": (1.4, 2.5), "format": (1.2, 1.5), "long": (1.5, None),
    "neighbour": (1.5, None),
}  # fmt: skip
ROWS = ("context", "threads", "paths", "formats", "long", "neighbour", "sampling", "start")


# --- Workers: one process each, a measurement a line. ---


def serve(model: str) -> None:
    """The giant as a worker; the protocol is giant_peer.py's."""
    from organs.giant import Giant

    giants: dict[int, Giant] = {}
    for line in sys.stdin:
        wish = json.loads(line)
        if wish["threads"] not in giants:
            giants[wish["threads"]] = Giant.load(model, threads=wish["threads"], prefix_bytes=0)
        session = giants[wish["threads"]].session()
        began = time.perf_counter()
        session.feed([100 + i % 5000 for i in range(wish["prompt"])])
        took, each = time.perf_counter() - began, []
        for i in range(wish["generate"]):
            began = time.perf_counter()
            session.feed([700 + i])
            each.append(time.perf_counter() - began)
        session.close()
        print(json.dumps({"prefill_s": took, "token_s": each}), flush=True)


class Worker:
    """A measuring process; it starts when first asked."""

    def __init__(self, command: list[str], path: str | None = None):
        environment = dict(os.environ, **({"ORGANISM_KERNELS": path} if path else {}))
        if path is None and "giant_peer.py" in command[1]:
            environment.pop("PYTHONPATH", None)
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.measure(16, 2, 2)  # compiles and warms up

    def measure(self, prompt: int, generate: int, threads: int) -> dict:
        assert self.process.stdin and self.process.stdout
        print(json.dumps(dict(prompt=prompt, generate=generate, threads=threads)), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"the worker {self.process.args} has died")
        return json.loads(answer)

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def ours(model: str, path: str | None = None) -> Worker:
    return Worker([sys.executable, __file__, "--worker", model], path)


def theirs(arguments: argparse.Namespace, model: str) -> Worker | None:
    return Worker([arguments.peer, str(ROOT / "benchmarks" / "giant_peer.py"), model]) if arguments.peer else None


# --- Paired measurements. ---


class Pair:
    """Measurements of both in turn. `row` is a row of the table."""

    def __init__(self, us: Worker, them: Worker | None, prompt: int, generate: int, rounds: int, threads: int = 2):
        self.runs: list[tuple[dict, dict | None]] = []
        for i in range(rounds + 1):
            run = (them.measure(prompt, generate, threads) if them else None, us.measure(prompt, generate, threads))
            if i:  # the first warms up
                self.runs.append((run[1], run[0]))
        self.prompt = prompt

    def decode(self, which: int) -> list[float]:
        return [1 / statistics.median(run[which]["token_s"]) for run in self.runs if run[which]]

    def prefill(self, which: int) -> list[float]:
        return [self.prompt / run[which]["prefill_s"] for run in self.runs if run[which]]

    @staticmethod
    def ratio(a: list[float], b: list[float]) -> str:
        return f"{statistics.median(x / y for x, y in zip(a, b, strict=True)):.2f} ×" if b else "–"

    def row(self, name: str, must: tuple) -> list[object]:
        out: list[object] = [name]
        for values, wanted in ((self.decode, must[0]), (self.prefill, must[1])):
            mine, other = values(0), values(1)
            out += [f"{max(mine):,.1f}", f"{max(other):,.1f}" if other else "–", self.ratio(mine, other), wanted or "–"]
        return out

    def latest(self, which: int) -> float:
        """The slowest token over the median one."""
        tokens = [s for run in self.runs if run[which] for s in run[which]["token_s"]]
        return max(tokens) / statistics.median(tokens) if tokens else float("nan")


HEAD = ["what", "decode tokens/s", "llama.cpp", "ratio", "must", "prefill tokens/s", "llama.cpp", "ratio", "must"]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a GGUF file")
    parser.add_argument("--peer", help="a Python interpreter that has llama-cpp-python")
    parser.add_argument("--formats", nargs="*", default=[], help="the same model in other formats")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--generate", type=int, default=48, help="tokens that are decoded, each round")
    parser.add_argument("--only", nargs="*", default=[], choices=ROWS, metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        serve(arguments.model)
        return
    wanted = lambda name: not arguments.only or name in arguments.only
    us, them = ours(arguments.model), theirs(arguments, arguments.model)
    rows, count, rounds = [], arguments.generate, arguments.rounds
    if wanted("context"):
        for prompt in (128, 512):
            name = f"context {prompt}"
            pair = Pair(us, them, prompt, count, rounds)
            rows.append(pair.row(name, MUST[name]))
            if prompt == 128:
                best = max(pair.decode(0))
    if wanted("long"):
        rows.append(Pair(us, them, 4096, 16, max(2, rounds // 2)).row("context 4,096", MUST["long"]))
    if wanted("paths"):
        for path in ("avx2", "portable"):
            forced = ours(arguments.model, path)
            rows.append(Pair(forced, them, 512, count, rounds).row(f"{path} forced, 512", MUST.get(path, (None, None))))
            forced.close()
    if wanted("formats"):
        for file in arguments.formats:
            us_too, them_too = ours(file), theirs(arguments, file)
            rows.append(Pair(us_too, them_too, 512, count, rounds).row(f"{Path(file).stem}, 512", MUST["format"]))
            us_too.close()
            if them_too:
                them_too.close()
    if wanted("neighbour"):
        busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])  # of the same priority as the workers
        pair = Pair(us, them, 128, count, rounds)
        busy.kill()
        rows.append(pair.row("beside a busy process, 128", MUST["neighbour"]))
        print(f"beside a busy process, the latest token took {pair.latest(0):.1f} × the median (llama.cpp: {pair.latest(1):.1f} ×); "
              "must: 5 ×\n")  # fmt: skip
    if rows:
        print(
            table(
                f"The giant against llama.cpp, {Path(arguments.model).name}, 2 threads both, best of {rounds} rounds",
                HEAD,
                rows,
            )
        )
    if wanted("threads"):
        one, two = Pair(us, them, 128, count, rounds, threads=1), Pair(us, them, 128, count, rounds)
        ratio = [Pair.ratio(two.decode(i), one.decode(i)) for i in (0, 1)]
        print(table("Two threads over one, decode at 128", ["giant", "llama.cpp", "must"], [[*ratio, 1.6]]))
    if wanted("context"):
        roofs(arguments.model, best)
    us.close()
    if them:
        them.close()
    if wanted("sampling"):
        sampling(arguments.model)
    if wanted("start"):
        start(arguments.model)


CHAINS = {  # settings of the chain, all cuts and penalties at once first
    "everything": dict(typical_p=0.95, repetition_penalty=1.1, presence_penalty=0.1, frequency_penalty=0.1),
    "by default": {}, "without top-k": dict(top_k=0), "the likeliest": dict(temperature=0),
}  # fmt: skip
GEMMA = 262_144, 292e6  # tokens, and bytes of Gemma 3 270M in Q8_0: the smallest model with so many in use


def sampling(model: str) -> None:
    """What a draw takes, against the step that it follows: this model's, measured; Gemma's, by the roof, so the least it can be."""
    import numpy as np

    from organs.giant import Giant
    from organs.giant.roofs import read_roof
    from organs.giant.sampling import Sampler, Sampling

    session = Giant.load(model, prefix_bytes=0).session()
    logits = session.feed(list(range(100, 228)))
    steps = [_seconds(lambda token=token: session.feed([token])) for token in range(700, 748)]
    more = np.random.default_rng(0).permutation(
        np.resize(logits, GEMMA[0]) - np.repeat([0, 20], [len(logits), GEMMA[0] - len(logits)])
    )
    said, rows = list(range(100, 228)), []
    for scores, step in (
        (logits, statistics.median(steps)),
        (more.astype(np.float32), GEMMA[1] / 1e9 / read_roof(int(GEMMA[1]), 2)),
    ):
        for name, settings in CHAINS.items():
            sampler = Sampler(Sampling(seed=1, **settings), len(scores))
            took = statistics.median(_seconds(lambda: sampler.choose(scores, said)) for _ in range(100))
            rows.append([f"{len(scores):,} tokens, {name}", 1e6 * took, 1e3 * step, f"{took / step:.1%}", "5%"])
    print(table("The sampling chain", ["what", "a draw, µs", "a step, ms", "share", "must"], rows))


def _seconds(act) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def roofs(model: str, tokens_per_s: float) -> None:
    """What decoding reads, against what the machine can read."""
    from organs.giant.roofs import read_roof

    nbytes = Path(model).stat().st_size
    read = tokens_per_s * nbytes / 1e9
    roof, far = read_roof(nbytes, 2), read_roof(400_000_000, 2)
    print(table("Memory, 2 threads", ["decode reads GB/s", f"roof, {nbytes / 1e6:.0f} MB", "share", "must", "roof, 400 MB", "share"],
                [[read, roof, f"{read / roof:.0%}", "75%", far, f"{read / far:.0%}"]]))  # fmt: skip


_START = """
import sys, time, resource
began = time.perf_counter()
from organs.giant import Giant
from organs.giant.sampling import Sampler, Sampling
giant = Giant.load(sys.argv[1])
logits = giant.session().feed([1, 2, 3])
Sampler(Sampling(seed=1), len(logits)).choose(logits)
print(time.perf_counter() - began)
page = int(next(l.split()[1] for l in open("/proc/self/status") if l.startswith("RssAnon")))
print(page * 1024)
"""


def start(model: str) -> None:
    """Load to first token, drawn, with warm and with empty kernel cache, and anonymous memory."""
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="organism-bench-") as folder:
        environment = dict(os.environ, ORGANISM_CACHE=folder)
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        for name in ("cold", "warm", "warm", "warm"):
            out = subprocess.run(
                [sys.executable, "-c", _START, model],
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
                check=True,
            )
            took, memory = map(float, out.stdout.split())
            seconds[name] = min(took, seconds.get(name, 1e9))
    size = Path(model).stat().st_size
    allowed = size + 0.25 * size + 200e6
    print(table("Load to first token, and memory", ["warm, s", "must", "cold cache, s", "must", "memory MB", "file MB", "must below MB"],
                [[seconds["warm"], 0.5, seconds["cold"], 12, memory / 1e6, size / 1e6, allowed / 1e6]]))  # fmt: skip


if __name__ == "__main__":
    main()
