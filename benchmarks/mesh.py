"""Operations a second of a mesh that many processes write at once, and what of it goes wrong.

    python benchmarks/mesh.py                       32 processes, 5 seconds
    python benchmarks/mesh.py --processes 8 --seconds 2

Each process has its own connection and does, in turn: heartbeat with facts, post a letter to its neighbour, empty its
inbox, settle what it took, and now and then offer and claim. The peer is what a program does that has only SQLite: WAL, a
busy timeout of 5 seconds, and the same letters in transactions of their own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sqlite3
import tempfile
import time
from pathlib import Path

from common import table

from swarm.mesh import MeshError, open_mesh


def ours(path: str, k: int, n: int, begin, stop, results) -> None:
    mesh, id, count, errors, sent, got = open_mesh(path), f"o{k}", 0, 0, 0, 0
    mesh.register(id, "/nowhere", {})
    begin.wait()
    while not stop.is_set():
        try:
            mesh.heartbeat(id, dict(stage="embryo", syntropy=0.1, entropy=1.0, n_params=1000))
            mesh.post(id, f"o{(k + 1) % n}", "note", dict(text="x" * 100))
            sent += 1
            letters = mesh.inbox(id)
            got += len(letters)
            count += 3
            if letters:
                mesh.settle([letter.id for letter in letters])
                count += 1
            if sent % 64 == 0:
                mesh.offer(id, "text", b"y" * 200)
                mesh.claim(id, "text")
                count += 2
        except MeshError:
            errors += 1
    results.put((count, errors, sent, got))


def plain(path: str, k: int, n: int, begin, stop, results) -> None:
    connection = sqlite3.connect(path, timeout=5, isolation_level=None)
    count, errors, sent, got = 0, 0, 0, 0
    begin.wait()
    while not stop.is_set():
        try:
            connection.execute("UPDATE organisms SET beat = ? WHERE id = ?", (time.time(), k))
            connection.execute("INSERT INTO messages(to_id, payload) VALUES (?, ?)", ((k + 1) % n, "x" * 100))
            sent += 1
            rows = connection.execute("SELECT id FROM messages WHERE to_id = ?", (k,)).fetchall()
            got += len(rows)
            connection.execute("DELETE FROM messages WHERE to_id = ? AND id <= ?", (k, rows[-1][0] if rows else 0))
            count += 4
        except sqlite3.OperationalError:
            errors += 1
    results.put((count, errors, sent, got))


def measure(target, path: str, processes: int, seconds: float) -> tuple[float, int, int, int]:
    """(operations a second, errors, letters sent, letters got)."""
    context = multiprocessing.get_context("fork")
    stop, results, begin = context.Event(), context.Queue(), context.Barrier(processes + 1)
    args = (processes, begin, stop, results)
    children = [context.Process(target=target, args=(path, k, *args)) for k in range(processes)]
    for child in children:
        child.start()
    begin.wait()
    began = time.perf_counter()
    time.sleep(seconds)
    stop.set()
    rows = [results.get() for _ in children]
    took = time.perf_counter() - began
    for child in children:
        child.join()
    counts, errors, sent, got = (sum(column) for column in zip(*rows))
    return counts / took, errors, sent, got


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=5.0)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="organism-bench-") as folder:
        path = str(Path(folder) / "mesh.db")
        rate, errors, sent, got = measure(ours, path, options.processes, options.seconds)
        with open_mesh(path) as mesh:
            left = sum(len(mesh.inbox(f"o{k}", 10**6)) for k in range(options.processes))
        rows.append(["Mesh (SQLite, a queue at the gate)", rate, errors, sent, got + left, sent - got - left])
        path = str(Path(folder) / "plain.db")
        connection = sqlite3.connect(path)
        connection.executescript(
            "PRAGMA journal_mode = WAL; CREATE TABLE organisms(id INTEGER PRIMARY KEY, beat REAL);"
            "CREATE TABLE messages(id INTEGER PRIMARY KEY, to_id INTEGER, payload TEXT); CREATE INDEX m ON messages(to_id);"
        )
        connection.close()
        rate, errors, sent, got = measure(plain, path, options.processes, options.seconds)
        rows.append(["sqlite3 alone, busy timeout 5 s", rate, errors, sent, got, "–"])
    head = ["mesh", "operations/s", "errors", "letters sent", "letters read", "lost"]
    print(table(f"{options.processes} processes writing for {options.seconds:g} s, {os.cpu_count()} cores", head, rows))


if __name__ == "__main__":
    main()
