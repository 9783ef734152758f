"""What the benchmarks share: temporary homes, medians, resident memory, and tables in Markdown."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; floats with three significant digits."""
    text = [f"### {title}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    text += ["| " + " | ".join(_cell(c) for c in row) + " |" for row in rows]
    return "\n".join(text) + "\n"


def _cell(value: object) -> str:
    return (
        f"{value:.3g}"
        if isinstance(value, float) and abs(value) < 1000
        else f"{value:,.0f}"
        if isinstance(value, float)
        else str(value)
    )


def texts(given: Sequence[str]) -> dict[str, Path]:
    """NAME=PATH arguments as {name: path}; without any, a megabyte of Python's own library."""
    if given:
        return {name: Path(path) for name, _, path in (item.partition("=") for item in given)}
    path = Path(tempfile.gettempdir()) / "organism-bench-python.txt"
    data = b"".join(p.read_bytes() for p in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))
    path.write_bytes(data[:1_000_000])
    return {"python": path}


@contextmanager
def fresh_home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="organism-bench-") as folder:
        yield Path(folder) / "home"


def organism(
    *arguments: str, home: Path | None = None, cache: Path | None = None, text: str | None = None
) -> subprocess.CompletedProcess:
    """Run the command line of this checkout."""
    environment = dict(os.environ)
    if home:
        environment["ORGANISM_HOME"] = str(home)
    if cache:
        environment["ORGANISM_CACHE"] = str(cache)
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # as on a user's machine
    command = [sys.executable, "-m", "organism", *arguments]  # what the command `organism` does
    return subprocess.run(command, cwd=ROOT, input=text, capture_output=True, text=True, env=environment, check=False)


def median_seconds(action, times: int = 5) -> float:
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def resident_mb(pid: int) -> float:
    """Largest resident size so far, in MB (Linux)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return 0.0


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
