"""Where the organisms of a colony live: a ward on each machine, with a nursery that starts them.

`Here` is this machine; `Cluster` the nodes of a Ray cluster, where an actor keeps the ward of each. The supervisor asks for
the places there are, opens a ward in each, tells it whom to start, and hears what became of them until it is at its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from organism import OrganismError, free_memory
from swarm.nursery import FRUGAL
from swarm.ray_mesh import cluster_of, membership, the_ray
from swarm.rules import EMBRYO_MB

if TYPE_CHECKING:
    from swarm.colony import Colony

log = logging.getLogger("organism.swarm")
ROOT = Path(__file__).resolve().parent.parent
CALL_SECONDS = 20.0  # for a ward on another node to say how it stands
HEAR_SECONDS = 2.0  # between two looks whether this process still belongs to the cluster
OPEN_SECONDS = 120.0  # for a ward on another node to open: Ray starts a process for it


class Ward:
    """On this machine: the nursery is a process, which is told and heard by pipes. `libraries`: to be loaded before it forks."""

    name = place = "this machine"

    def __init__(self, *libraries: str):
        self.libraries, self.process = libraries, None
        self.cores = os.cpu_count() or 1

    async def open(self) -> None:
        """Start the nursery, which says "ready" when it takes orders."""
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "swarm.nursery", *self.libraries, stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE, env={**os.environ, **FRUGAL, "PYTHONPATH": path},
            start_new_session=True)  # fmt: skip

    async def tell(self, order: dict[str, Any]) -> None:
        """An order to the nursery; lost where that has ended, which `hear` says."""
        assert self.process and self.process.stdin
        self.process.stdin.write(json.dumps(order).encode() + b"\n")

    async def hear(self) -> dict[str, Any] | None:
        """What the nursery says next, as soon as it does; None when it has ended."""
        assert self.process and self.process.stdout
        if line := await self.process.stdout.readline():
            return json.loads(line)
        await self.process.wait()
        return None

    async def close(self) -> None:
        """Let the nursery bring all down; `hear` says when it has."""
        assert self.process and self.process.stdin
        self.process.stdin.close()

    def free(self) -> int | None:
        """Bytes of memory that are free; None where that cannot be told."""
        return free_memory()

    def memory_mb(self, pids: list[int]) -> float:
        """What organisms take together; one that has just been started counts as what it will take."""
        return sum(max(EMBRYO_MB, proportional_mb(pid)) for pid in pids)


def proportional_mb(pid: int) -> float:
    """Proportional set size of a process in MB: pages that n share count as 1/n (Linux); 0 where that cannot be told."""
    with contextlib.suppress(OSError):
        found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
        return int(found[1]) / 1024 if found else 0.0
    return 0.0


class Here:
    """This machine alone."""

    def __init__(self, colony: Colony):
        self.colony = colony

    def enter(self) -> None:
        """Make ready, before the first ward is opened."""

    def leave(self) -> None:
        """After the last ward has closed."""

    def places(self) -> list[str]:
        """Names of where a ward can be, at this moment."""
        return [Ward.place]

    def ward(self, place: str) -> Any:
        """A ward there, still to be opened."""
        return Ward()


# --- The nodes of a Ray cluster. ---


class WardActor:
    """A ward as an actor on its node. When its process ends, the nursery's pipe is at its end too, and nobody is an orphan."""

    def __init__(self) -> None:
        self.ward = Ward("ray")

    async def open(self, folder: str, claim: str) -> tuple[str, int]:
        """Open it, where the colony's folder is the supervisor's; (the cluster's address as seen from here, cores)."""
        found = ""
        with contextlib.suppress(OSError):
            found = (Path(folder) / "colony.lock").read_text("ascii")
        if found != claim:
            raise OrganismError(f"{folder} is missing there, or another one: all nodes must share the colony's folder.")
        import ray

        await self.ward.open()
        return ray.get_runtime_context().gcs_address, self.ward.cores

    async def tell(self, order: dict[str, Any]) -> None:
        await self.ward.tell(order)

    async def hear(self) -> dict[str, Any] | None:
        return await self.ward.hear()

    async def close(self) -> None:
        await self.ward.close()

    def free(self) -> int | None:
        return self.ward.free()

    def memory_mb(self, pids: list[int]) -> float:
        return self.ward.memory_mb(pids)


class NodeWard:
    """A ward on a node of the cluster, as the supervisor sees it. A node that is lost is a ward that has ended."""

    def __init__(self, colony: Colony, node: dict[str, Any]):
        self.colony, self.place, self.cores = colony, node["NodeID"], 1
        self.name = f"node {self.place[:8]} ({node['NodeManagerHostname']})"
        self.actor: Any = None
        self.mesh, self.joined = "", membership.count

    async def open(self) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        there = NodeAffinitySchedulingStrategy(self.place, soft=False)
        self.actor = ray.remote(WardActor).options(num_cpus=0, scheduling_strategy=there).remote()
        opening = self.actor.open.remote(str(self.colony.folder), self.colony.claim())
        try:
            address, self.cores = await asyncio.wait_for(opening, OPEN_SECONDS)
        except ray.exceptions.RayTaskError as error:
            if not isinstance(error.cause, OrganismError):
                raise
            raise OrganismError(str(error.cause)) from None
        except (ray.exceptions.RayError, TimeoutError) as error:
            raise OrganismError(f"Ray starts no actor there ({type(error).__name__}).") from error
        self.mesh = f"ray:{address}{self.colony.mesh_path}"

    async def tell(self, order: dict[str, Any]) -> None:
        self.actor.tell.remote(order | dict(mesh=self.mesh))

    async def hear(self) -> dict[str, Any] | None:
        import ray

        try:
            hearing = asyncio.wrap_future(self.actor.hear.remote().future())
            while self.joined == membership.count:  # who has left the cluster hears nothing more
                if (await asyncio.wait({hearing}, timeout=HEAR_SECONDS))[0]:
                    if (told := hearing.result()) is not None:
                        return told
                    break
        except (ray.exceptions.RayError, ConnectionError, RuntimeError) as error:
            log.info("%s is lost: %s", self.name, (str(error).splitlines() or [type(error).__name__])[0])
        if self.joined == membership.count:
            ray.kill(self.actor)  # also where it cannot be heard any more: then nobody shall live there
        return None

    async def close(self) -> None:
        self.actor.close.remote()

    def free(self) -> int | None:
        return self._answer("free", None)

    def memory_mb(self, pids: list[int]) -> float:
        return self._answer("memory_mb", float(EMBRYO_MB * len(pids)), pids)

    def _answer(self, method: str, otherwise: Any, *args: Any) -> Any:
        import ray

        try:
            return ray.get(getattr(self.actor, method).remote(*args), timeout=CALL_SECONDS)
        except (ray.exceptions.RayError, ConnectionError):
            return otherwise


class Cluster:
    """The nodes of a Ray cluster. `cluster`: "local", "auto", "HOST:PORT" or "ray://HOST:PORT"."""

    def __init__(self, colony: Colony, cluster: str):
        self.colony, self.cluster, self.ray = colony, cluster_of(cluster), the_ray(cluster)
        self.nodes: dict[str, dict[str, Any]] = {}

    def enter(self) -> None:
        self.colony.move_to(self.cluster)

    def leave(self) -> None:
        self.colony.move_home()

    def places(self) -> list[str]:
        membership.join(self.cluster, begin=False)
        self.nodes = {node["NodeID"]: node for node in self.ray.nodes() if node["Alive"]}
        return list(self.nodes)

    def ward(self, place: str) -> NodeWard:
        return NodeWard(self.colony, self.nodes[place])
