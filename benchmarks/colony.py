"""What one more organism of a colony costs: unique memory (proportional set size) of each, all alive and learning; how long
it takes until all are heard, and until `status` tells of four that were killed.

Each reads 20,000 bytes of its own. Once all have trained on that (or --patience is over: then those count that have), memory is
looked at every two seconds, while every ten seconds each is sent 2,000 bytes more. Nobody hibernates (syntropy.plateau = 0), since all
are to be alive. Then four are killed twice: once to see when they live again, and once with their homes locked, so that nobody can
start them before every other one has said that they are gone.

    python benchmarks/colony.py                32 embryos, each with a text to learn
    python benchmarks/colony.py -n 8 --seconds 20

The peer is the same number of processes that share nothing: as many `organism chat` as --alone says, their mean.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from common import ROOT, table, texts

from swarm.colony import Colony
from swarm.mesh import open_mesh
from swarm.wards import proportional_mb

PIECE, FEED = 2000, 10.0  # bytes that each is sent, and seconds between two


def alive(colony: Colony) -> list[dict]:
    return [row for row in colony.status() if row["status"] == "alive"]


def until(condition, what: str, seconds: float = 120.0) -> float:
    """Seconds until it holds. Ends the program where it does not, and says what was waited for."""
    began = time.perf_counter()
    while not condition():
        if time.perf_counter() - began > seconds:
            raise SystemExit(f"error: waited {seconds:g} s in vain: {what}")
        time.sleep(0.02)
    return time.perf_counter() - began


def all_know(colony: Colony, ignorant: set[int], alive_now: int) -> bool:
    """Whether all of these have said, once, that fewer others live; who has said so is taken out."""
    ignorant -= {row["pid"] for row in alive(colony) if row["peers"] < alive_now}
    return not ignorant


def kill(rows: list[dict]) -> set[int]:
    """Their process ids."""
    pids = {row["pid"] for row in rows}
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    return pids


@contextlib.contextmanager
def kept_dead(colony: Colony, rows: list[dict]) -> Iterator[None]:
    """Hold the locks of their homes, so that nobody wakes there."""
    handles = []
    try:
        for row in rows:
            handles.append(os.open(colony.home(row["name"]) / "lock", os.O_RDWR))
            fcntl.flock(handles[-1], fcntl.LOCK_EX)  # at once: whoever held it is dead
        yield
    finally:
        for handle in handles:
            os.close(handle)


def raised(colony: Colony, source: bytes, seconds: float) -> tuple[list[list[float]], int]:
    """(MB of each that has trained, at each look; how many trained meanwhile), while all are fed."""
    before = {row["id"]: row["training_tokens"] for row in alive(colony)}
    began, looks, fed = time.monotonic(), [], 0
    with open_mesh(colony.mesh_path) as mesh:
        while (now := time.monotonic() - began) < seconds:
            if now >= FEED * fed:
                for k, id in enumerate(before):
                    at = (fed * len(before) + k) * PIECE % (len(source) - PIECE)
                    mesh.post("bench", id, "learn", dict(text=source[at : at + PIECE].decode("utf-8", "replace")))
                fed += 1
            if trained := [proportional_mb(row["pid"]) for row in alive(colony) if row["training_tokens"]]:
                looks.append(trained)
            mesh.settle([letter.id for letter in mesh.inbox("bench", 1000)])
            time.sleep(2)
    return looks, sum(row["training_tokens"] > before[row["id"]] for row in alive(colony))


def alone(text: Path, folder: Path, count: int, seconds: float) -> float:
    """Mean MB of `organism chat` processes that learn the same text, each started by itself."""
    command = [
        sys.executable,
        str(ROOT / "organism.py"),
        "chat",
        "--quiet",
        "--threads",
        "1",
        "--mesh",
        "none",
        "--home",
    ]
    chats = [
        subprocess.Popen(
            [*command, str(folder / f"alone{k}")], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        for k in range(count)
    ]
    for one in chats:
        assert one.stdin
        one.stdin.write(f"/learn {text}\n")
        one.stdin.flush()
    time.sleep(seconds)
    mean = statistics.mean(proportional_mb(one.pid) for one in chats)
    for one in chats:
        one.communicate()
    return mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60.0, help="of learning before memory is looked at")
    parser.add_argument("--patience", type=float, default=900.0, help="seconds until all should have trained")
    parser.add_argument("--alone", type=int, default=2, help="processes that share nothing")
    parser.add_argument("--text", action="append", default=[], metavar="NAME=PATH")
    options = parser.parse_args()
    source = next(iter(texts(options.text).values())).read_bytes()
    with tempfile.TemporaryDirectory(prefix="organism-bench-") as name:
        folder = Path(name)
        corpora, part = [], 20_000
        for k in range(options.n):
            path = folder / f"text{k}.txt"
            path.write_bytes(source[k * part % len(source) :][:part])
            corpora += ["--corpus", f"o{k}={path}"]
        colony = Colony(folder / "colony")
        began = time.perf_counter()
        command = [
            sys.executable,
            str(ROOT / "organism.py"),
            "swarm",
            "up",
            "--quiet",
            "--home",
            str(colony.folder),
            *corpora,
        ]
        supervisor = subprocess.Popen(command, env={**os.environ, "ORGANISM_SYNTROPY_PLATEAU": "0"})
        try:
            until(lambda: len(alive(colony)) == options.n, "all are heard")
            heard = time.perf_counter() - began
            with contextlib.suppress(SystemExit):  # then those count that have
                until(
                    lambda: all(row["training_tokens"] for row in alive(colony)), "all have trained", options.patience
                )
            looks, learned = raised(colony, source[options.n * part :] or source, options.seconds)
            if not looks:
                sys.exit("nobody has trained in this time: give them more --patience, or compile the kernels first.")
            rows = alive(colony)
            victims = kill(rows[:4])
            truth = until(lambda: not victims & {row["pid"] for row in alive(colony)}, "`status` without the dead")
            again = truth + until(lambda: len(alive(colony)) == options.n, "the dead live again")
            doomed = rows[-4:]
            survivors = {row["pid"] for row in alive(colony)} - (dead := kill(doomed))
            with kept_dead(colony, doomed):
                known = until(lambda: all_know(colony, survivors, options.n - len(dead)), "every other one knows")
            until(lambda: len(alive(colony)) == options.n, "the others live again")
        finally:
            supervisor.send_signal(signal.SIGINT)
            supervisor.wait()
        single = alone(folder / "text0.txt", folder, options.alone, 20.0) if options.alone else float("nan")
        left = len(alive(colony))
    head = ["", "measured"]
    lines = [
        ["alive, trained before the last look, trained between looks", f"{len(rows)}, {len(looks[-1])}, {learned}"],
        ["MB an organism, proportional set size: mean of all looks", statistics.mean(map(statistics.mean, looks))],
        ["MB an organism: mean at the worst look", max(map(statistics.mean, looks))],
        ["MB of the largest at any look", max(map(max, looks))],
        ["MB a process that shares nothing (`organism chat`), mean", single],
        ["s from `swarm up` to all heard", heard],
        ["s from `kill -9` of 4 to `status` without them", truth],
        ["s from `kill -9` of 4 until they live again", again],
        ["s from `kill -9` of 4 until every other one knows", known],
        ["processes left after Ctrl-C", left],
    ]
    print(table(f"A colony of {options.n}, {os.cpu_count()} cores", head, lines))


if __name__ == "__main__":
    main()
