"""What `organism swarm …` does and prints."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

from organism import Home, OrganismError, UsageError
from swarm import map, thinking
from swarm.colony import Colony, up

BLOCKS = "▁▂▃▄▅▆▇█"


def colony_of(asking: Any) -> Colony:
    """--home is the colony's folder; without one, `colony` beside the default home."""
    return Colony(asking.home or Home.default().with_name("colony"))


def run_up(
    asking: Any,
    n: int | None,
    corpus: tuple[str, ...],
    max: int | None,
    ram: float | None,
    exchange: bool,
    gammas: bool,
    ray: str | None,
) -> None:
    if n is None and not corpus and not colony_of(asking).homes():
        raise UsageError("How many? `organism swarm up -n N` says it.")
    up(colony_of(asking).folder, n or 0, corpus, max or 64, ram, asking.note, exchange, gammas, ray)


def run_status(asking: Any) -> None:
    rows, shape = colony_of(asking).status(), colony_of(asking).topology()
    seen = dict(
        coherence=shape.coherence, resonances=[list(pair) for pair in shape.resonances], outliers=shape.outliers
    )
    text = "\n".join(_row_text(row) for row in rows) or "Nothing runs here: `organism swarm up -n 4` starts a colony."
    if shape.coherence is not None:
        text += f"\ncoherence {shape.coherence:.2f}, {len(shape.resonances)} resonances, {len(shape.outliers)} outliers"
    asking.result(dict(organisms=rows) | seen, text)


def _row_text(row: dict[str, Any]) -> str:
    return (
        f"{row['name']:<12} {row['id']:<12} {row['status']:<6} {row['stage'] or '?':<10} pid {row['pid']:<8}"
        f" heard {row['heartbeat_age_s']:.1f} s ago"
    )


def run_watch(asking: Any) -> None:
    """A table that renews itself twice a second; at something that is no terminal, one table."""
    from rich.live import Live

    colony, losses = colony_of(asking), {}
    if not sys.stdout.isatty():
        run_status(asking)
        return
    with Live(_table(colony, losses), refresh_per_second=4) as live, contextlib.suppress(KeyboardInterrupt):
        while True:
            time.sleep(0.5)
            live.update(_table(colony, losses))


def _table(colony: Colony, losses: dict[str, deque[float]]) -> Any:
    from rich.table import Table

    table = Table(title=f"{colony.folder}")
    for head in ("name", "status", "stage", "lived", "trained", "loss", "", "heard"):
        table.add_column(head, justify="right" if head in ("lived", "trained", "loss", "heard") else "left")
    colours = dict(alive="green", asleep="blue", dead="red")
    for row in colony.status():
        seen = losses.setdefault(row["id"], deque(maxlen=24))
        if row["loss"] is not None:
            seen.append(row["loss"])
        loss = f"{row['loss']:.3f}" if row["loss"] is not None else "–"
        table.add_row(row["name"], f"[{colours[row['status']]}]{row['status']}", row["stage"] or "?", f"{row['lived_bytes'] or 0:,}",
                      f"{row['training_tokens'] or 0:,}", loss, sparkline(seen), f"{row['heartbeat_age_s']:.1f} s")  # fmt: skip
    return table


def sparkline(values: deque[float]) -> str:
    """The values as blocks, lowest to highest."""
    if len(values) < 2 or max(values) == min(values):
        return BLOCKS[0] * len(values)
    low, high = min(values), max(values)
    return "".join(BLOCKS[int((v - low) / (high - low) * 7.99)] for v in values)


def run_map(asking: Any, plot: str | None) -> None:
    """Everybody's nearest, and with --plot a picture."""
    colony = colony_of(asking)
    shape, names = colony.topology(), {row["id"]: row["name"] for row in colony.status()}
    if plot:
        map.draw(shape, names, plot)
    for id, row in zip(shape.ids, shape.cosines):
        near = {names.get(other, other): round(float(c), 3) for other, c in zip(shape.ids, row) if math.isfinite(c)}
        best = sorted(near.items(), key=lambda pair: -pair[1])[:3]
        text = ", ".join(f"{name} {cosine:.2f}" for name, cosine in best) or "nobody that it can be compared with"
        asking.result(
            dict(id=id, name=names.get(id), cosines=near, outlier=id in shape.outliers),
            f"{names.get(id, id):<16} {text}",
        )


def run_logs(asking: Any, name: str | None) -> None:
    colony = colony_of(asking)
    names = colony.homes() if name is None else [name]
    if name is not None and name not in colony.homes():
        known = ", ".join(colony.homes()) or "nobody"
        raise UsageError(f"There is no {name!r} in {colony.folder}: here live {known}.")
    for one in names:
        path = colony.folder / "homes" / one / "log"
        for line in _last_lines(path, 20):
            asking.result(dict(name=one, line=line), f"{one}: {line}")


def _last_lines(path: Path, count: int) -> list[str]:
    with contextlib.suppress(OSError), open(path, "rb") as stream:
        stream.seek(max(0, path.stat().st_size - 65_536))
        return stream.read().decode("utf-8", "replace").splitlines()[-count:]
    return []


def run_ask(asking: Any, text: str, ensemble: bool) -> None:
    colony = colony_of(asking)
    if not colony.mesh_path.exists():
        raise OrganismError(f"There is no colony in {colony.folder}: `organism swarm up -n 4` starts one.")
    with colony.mesh() as mesh:
        answer = thinking.ensemble(mesh, text, seed=asking.seed) if ensemble else thinking.ask(mesh, text)
    asking.result(answer, answer["text"])


def run_down(asking: Any) -> None:
    count = colony_of(asking).down()
    asking.result(dict(ended=count), f"{count} organisms went to sleep." if count else "Nothing ran here.")
