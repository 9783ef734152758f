"""Training that outgrows one machine: the torch engine by several workers of a Ray cluster, each with a part of every batch.

The organism reads, judges, grows and is saved where its home is; only its steps are shared. Each worker has the whole body and
takes some rows of a batch; torch.distributed adds their gradients up, and each makes the same step of AdamW with the sum. So
the losses are those of one worker with the whole batch, but for the order in which numbers are added.

What was learned comes back when the body is looked at, and every KEEP steps. When a worker is lost, all begin anew, wherever
there is room, from what came back last, and make the steps since then again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import os
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from organism import Arena, Body, BodyConfig, FieldTree, FieldView, LearningConfig, OrganismError, log, organ
from swarm.ray_mesh import cluster_of, membership, the_ray

KEEP = 32  # steps at most that must be made again when a worker is lost
GATHER_SECONDS = 60.0  # for all workers to be there: Ray starts their processes, and they load PyTorch
PATIENCE = 600.0  # seconds that workers wait for each other
ATTEMPTS = 3  # to go on, one after the other


# --- A worker. ---


class Worker:
    """An actor with the whole body and a part of each batch."""

    def __init__(self) -> None:
        self.engine: Any = None
        self.tree: FieldTree | None = None

    def place(self) -> tuple[str, str]:
        """The node it runs on, and an address where the others may meet it."""
        import ray

        with socket.socket() as free:
            free.bind(("", 0))
            address = f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"
        return ray.get_runtime_context().get_node_id(), address

    def meet(self, address: str, rank: int, count: int, threads: int) -> None:
        """Join the others at the address of the first of them."""
        organ("torch")  # says what is missing
        import ray
        import torch
        import torch.distributed as dist

        torch.set_num_threads(threads)
        if name := _interface(ray.util.get_node_ip_address()):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        dist.init_process_group(init_method=f"tcp://{address}", rank=rank, world_size=count,
                                timeout=datetime.timedelta(seconds=PATIENCE))  # fmt: skip

    def load(self, arrays: dict[str, np.ndarray], meta: dict[str, Any], learning: dict[str, Any]) -> None:
        """A body as its checkpoint has it, and the settings of learning."""
        body = Body.from_state(meta, arrays, BodyConfig())
        self.engine = organ("torch").Gradients(body, LearningConfig(**learning))

    def see(self, vocabulary: list[bytes], weights: np.ndarray) -> None:
        """The tree that the views to come are cuts through."""
        self.tree = FieldTree(vocabulary, weights)

    def step(self, x: np.ndarray, y: np.ndarray, view: tuple[np.ndarray, ...] | None, rate: float, step: int,
             targets: int) -> float:  # fmt: skip
        """Its part of a step on a batch of so many targets; returns its part of the mean loss in nats."""
        import torch.distributed as dist

        seen = None if view is None else FieldView(*view, self.tree)  # type: ignore[arg-type]
        return self.engine.step(x, y, seen, rate, step, targets, dist.all_reduce)

    def arrays(self) -> dict[str, np.ndarray]:
        """The flat arrays of its arena, which are alike for all."""
        self.engine.sync()
        return {name: getattr(self.engine.body.arena, name) for name in Arena.ARRAYS}


def _interface(address: str) -> str:
    """The network interface with this IPv4 address, for gloo, which may take the loopback one; "" where it is not found."""
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # SIOCGIFADDR, netdevice(7)
                found = fcntl.ioctl(probe, 0x8915, struct.pack("256s", name.encode()))[20:24]
                if socket.inet_ntoa(found) == address:
                    return name
    return ""


# --- All of them. ---


class Crew:
    """The workers of a cluster. threads: of each; None: the cores of its node, shared with those beside it."""

    def __init__(self, cluster: str, count: int, threads: int | None):
        self.cluster, self.count, self.threads = cluster, count, threads
        self.workers: list[Any] = []
        self.gather()

    def gather(self, fewer: bool = False) -> None:
        """Start all, or `fewer` where there is no room for all any more. Raises OrganismError."""
        ray = the_ray(self.cluster)
        membership.join(self.cluster)
        self.disband()
        until = time.monotonic() + GATHER_SECONDS
        while True:
            have = ray.cluster_resources()
            room, count = int(have.get("CPU", 0)), self.count or sum(node["Alive"] for node in ray.nodes())
            if room < (1 if fewer else count):
                raise OrganismError(
                    f"The Ray cluster {self.cluster} has {room} cores, and {count} workers need one each."
                )
            needs = dict(num_cpus=1, num_gpus=1 if have.get("GPU", 0) >= count else 0)
            actor = ray.remote(Worker).options(scheduling_strategy="SPREAD", **needs)
            self.workers = [actor.remote() for _ in range(min(count, room))]
            try:
                self._meet(ray)
                return
            except ray.exceptions.RayError as error:  # a node may be lost, and Ray not know it yet
                self.disband()
                if isinstance(getattr(error, "cause", None), OrganismError) or time.monotonic() > until:
                    raise _sentence(error) from error

    def _meet(self, ray: Any) -> None:
        """Once all are there, each joins the others."""
        places = ray.get([worker.place.remote() for worker in self.workers], timeout=GATHER_SECONDS / 2)
        cores = {node["NodeID"]: node["Resources"].get("CPU", 1) for node in ray.nodes()}
        nodes = [node for node, _ in places]
        threads = [self.threads or max(1, int(cores[node] / nodes.count(node))) for node in nodes]
        log.info("%d workers on %d nodes, with %s threads", len(nodes), len(set(nodes)), threads)
        meeting = [
            worker.meet.remote(places[0][1], rank, len(nodes), threads[rank])
            for rank, worker in enumerate(self.workers)
        ]
        ray.get(meeting, timeout=GATHER_SECONDS)

    def disband(self) -> None:
        """End all, where there are any."""
        ray = the_ray()
        for worker in self.workers if ray.is_initialized() else ():
            with contextlib.suppress(ray.exceptions.RayError, ValueError):  # of an earlier joining
                ray.kill(worker)
        self.workers = []

    def all(self, method: str, *args: Any) -> list[Any]:
        """What each replies to the same call."""
        ray = the_ray()
        shared = [ray.put(argument) for argument in args]
        return ray.get([getattr(worker, method).remote(*shared) for worker in self.workers])

    def step(self, x: np.ndarray, y: np.ndarray, view: FieldView | None, rate: float, step: int) -> float:
        """One step on tokens x, targets y [B, T], some rows for each worker; the mean loss in nats."""
        (B, T), told = x.shape, []
        bounds = np.linspace(0, B, len(self.workers) + 1).astype(int)
        for worker, low, high in zip(self.workers, bounds, bounds[1:]):
            part = None if view is None else view[low * T : high * T]
            seen = None if part is None else (part.starts, part.logmass, part.scalars)
            told.append(worker.step.remote(x[low:high], y[low:high], seen, rate, step, x.size))
        return sum(the_ray().get(told))


@functools.cache
def crew(cluster: str, count: int, threads: int | None) -> Crew:
    """It stays for the next body: to gather takes seconds."""
    return Crew(cluster, count, threads)


def _sentence(error: Exception) -> OrganismError:
    """Why the workers cannot go on."""
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, OrganismError):
        return type(cause)(str(cause))
    reason = (str(cause).splitlines() or [type(cause).__name__])[0].rstrip(".")
    return OrganismError(f"The workers cannot go on ({reason}): `ray status` shows who takes the cluster's cores.")


# --- The engine. ---


class Gradients:
    """Trains a body by the workers of `config.ray`; for the rest as organs.torch_engine.Gradients."""

    def __init__(self, body: Body, config: LearningConfig, threads: int | None = None):
        self.body, self.config, self.yield_flag = body, config, np.zeros(1, np.int64)
        self.since: list[tuple] = []  # the steps whose outcome has not come back
        self.tree: FieldTree | None = None  # that the workers know
        self.crew = crew(cluster_of(config.ray), config.workers, threads)
        self._sure(self._load)

    def step(self, x: np.ndarray, y: np.ndarray, view: FieldView | None, rate: float, step: int) -> float:
        """One step of AdamW on tokens x, targets y [B, T]; returns the mean loss in nats."""
        while self.yield_flag[0]:
            time.sleep(0.001)
        loss = self._sure(lambda: self._step(x, y, view, rate, step))
        self.since.append((x, y, view, rate, step))
        if len(self.since) >= KEEP:
            self.sync()
        return loss

    def sync(self) -> None:
        """Bring the body's arena up to date."""
        if not self.since:
            return
        arrays = self._sure(lambda: the_ray().get(self.crew.workers[0].arrays.remote()))
        for name, array in arrays.items():
            getattr(self.body.arena, name)[:] = array
        self.since = []

    def close(self) -> None:
        """Write back what was learned; the workers stay for the next body."""
        self.sync()

    def _load(self) -> None:
        arrays, meta = self.body.state()
        self.tree = None
        self.crew.all("load", arrays, meta, dataclasses.asdict(self.config))

    def _step(self, x: np.ndarray, y: np.ndarray, view: FieldView | None, rate: float, step: int) -> float:
        if view is not None and view.tree is not self.tree:
            self.tree = view.tree
            self.crew.all("see", self.tree.vocabulary, self.tree.weights)
        return self.crew.step(x, y, view, rate, step)

    def _sure(self, work: Callable[[], Any]) -> Any:
        """What work returns; where a worker was lost, after all have begun anew and are where they were."""
        ray, lost = the_ray(), None
        for attempt in range(ATTEMPTS):
            try:
                if attempt:
                    self.crew.gather(fewer=True)
                    self._load()
                    for past in self.since:
                        self._step(*past)
                return work()
            except ray.exceptions.RayError as error:
                lost = error
                if isinstance(getattr(error, "cause", None), OrganismError):
                    break
                log.warning("A worker was lost; all begin anew, and make %d steps again.", len(self.since))
        assert lost is not None
        raise _sentence(lost) from lost
