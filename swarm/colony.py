"""A colony: a folder with a home for each organism, the mesh they share, and the supervisor that runs in the foreground.

COLONY/colony.lock   who supervises: process id and start time (flock: one at a time)
COLONY/mesh.db       the colony's mesh
COLONY/homes/NAME/   an organism each, with its `log`
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from organism import Config, OrganismError, UsageError
from swarm.family import room_for_one_more
from swarm.mesh import ANSWERS, SUPERVISOR, Letter, Mesh, MeshError, SQLiteMesh, start_time
from swarm.metabolism import Metabolism
from swarm.nursery import FRUGAL, HIBERNATES
from swarm.rules import EMBRYO_MB, no_room, who_wakes
from swarm.topology import Monitor, Topology, gammas_of, topology

ROOT = Path(__file__).resolve().parent.parent
BACK_OFF = (1.0, 60.0)  # seconds before a crashed organism is started again: the first time, and at most
STABLE = 60.0  # seconds after which a crash counts as the first again
MONITOR = 30.0  # seconds between two looks at the topology (spec/molequla.md §1.14)
LOOK = 0.5  # seconds between two looks of the supervisor into the mesh
PLACE_SECONDS = 120.0  # that a place is kept for a child whose parent was told that it may divide


class Colony:
    """The folder of a colony. Raises OrganismError in one sentence."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser().absolute()
        self.mesh_path, self.lock_path = self.folder / "mesh.db", self.folder / "colony.lock"

    def homes(self) -> list[str]:
        """Names of those who live here, in order."""
        homes = self.folder / "homes"
        found = (path.name for path in homes.iterdir() if path.is_dir() and not path.name.startswith("."))
        return sorted(found, key=_natural) if homes.is_dir() else []

    def home(self, name: str) -> Path:
        """Of one of them."""
        return self.folder / "homes" / name

    def clear_out(self) -> None:
        """Remove homes of children whose birth was interrupted."""
        for unborn in (self.folder / "homes").glob(".tmp-*"):
            shutil.rmtree(unborn, ignore_errors=True)

    def supervisor(self) -> int | None:
        """Process id of whoever supervises it now; None where nobody does."""
        try:
            pid, started = (int(word) for word in self.lock_path.read_text("ascii").split())
        except (OSError, ValueError):
            return None
        return pid if start_time(pid) == started else None

    def take(self) -> int:
        """Become the supervisor; the handle holds until it is closed."""
        try:
            (self.folder / "homes").mkdir(mode=0o700, parents=True, exist_ok=True)
            handle = os.open(self.lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise OrganismError(f"The colony {self.folder} cannot be used: {error.strerror}.") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise OrganismError(
                f"The colony {self.folder} is supervised by process {self.supervisor()} already: "
                "`organism swarm down` ends that, or choose another --home."
            ) from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()} {start_time(os.getpid()) or 0}\n".encode(), 0)
        return handle

    def status(self) -> list[dict[str, Any]]:
        """Who is known, each checked at this moment; empty where nothing ever ran."""
        if not self.mesh_path.exists():
            return []
        with SQLiteMesh(self.mesh_path) as mesh:
            return [dict(id=p.id, name=Path(p.home).name, pid=p.pid, stage=p.facts.get("stage"), status=p.status,
                         syntropy=p.facts.get("syntropy"), entropy=p.facts.get("entropy"), loss=p.facts.get("loss"),
                         lived_bytes=p.facts.get("lived_bytes"), training_tokens=p.facts.get("training_tokens"), peers=p.facts.get("peers"),
                         heartbeat_age_s=round(p.heartbeat_age_s, 3)) for p in mesh.peers()]  # fmt: skip

    def topology(self) -> Topology:
        """How alike those who live now have become."""
        if not self.mesh_path.exists():
            return topology({})
        with SQLiteMesh(self.mesh_path) as mesh:
            return topology(gammas_of({p.id: mesh.blob(p.id, "gamma") for p in mesh.peers(living=True)}))

    def down(self, patience: float = 60.0) -> int:
        """End the supervisor, and with it everybody; how many were alive. Whoever is left is asked to end directly."""
        alive = [row for row in self.status() if row["status"] == "alive"]
        if (pid := self.supervisor()) is not None:
            os.kill(pid, signal.SIGTERM)
            _await(lambda: self.supervisor() is None, patience)
        for row in self.status():
            if row["status"] == "alive":
                with contextlib.suppress(ProcessLookupError):
                    os.kill(row["pid"], signal.SIGTERM)
        if not _await(lambda: all(row["status"] != "alive" for row in self.status()), patience):
            raise OrganismError(f"Some of the colony {self.folder} do not end: `organism swarm status` shows which.")
        return len(alive)


def _await(condition: Callable[[], bool], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def _natural(name: str) -> list[Any]:
    """Sort key: o2 before o10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]


def names_of(count: int, corpora: Sequence[tuple[str, str]], there: Sequence[str], most: int) -> dict[str, str | None]:
    """Who shall live, as {name: corpus}: one for each corpus, all who were there, then newborns up to `count`."""
    names: dict[str, str | None] = dict(corpora)
    names |= {name: names.get(name) for name in there}
    number = 1
    while len(names) < count:
        names.setdefault(f"o{number}", None)
        number += 1
    if len(names) > most:
        raise UsageError(f"{len(names)} organisms are more than --max {most}: raise it, or start fewer.")
    return names


def corpora_of(given: Sequence[str]) -> list[tuple[str, str]]:
    """NAME=PATH arguments."""
    pairs = []
    for item in given:
        name, separator, path = item.partition("=")
        if not separator or not re.fullmatch(r"[\w-]{1,64}", name):
            raise UsageError(f"--corpus {item!r} is not NAME=PATH, where a name is letters, digits, - and _.")
        if not Path(path).expanduser().exists():
            raise UsageError(f"The corpus {path} of {name} does not exist: check the path.")
        pairs.append((name, str(Path(path).expanduser().absolute())))
    return pairs


def proportional_mb(pid: int) -> float:
    """Proportional set size of a process in MB: pages that n share count as 1/n (Linux); 0 where that cannot be told."""
    with contextlib.suppress(OSError):
        found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
        return int(found[1]) / 1024 if found else 0.0
    return 0.0


class Supervisor:
    """Starts organisms, starts the crashed again, and brings all down; asyncio's own processes and signals.

    It also says who may divide, starts the child whose home then appears, and keeps the beds of those who hibernate: they wake
    when a letter waits for them, or when fewer are awake than the machine has cores.
    """

    def __init__(self, colony: Colony, names: dict[str, str | None], most: int, ram_gb: float | None,
                 say: Callable[[str], None], exchange: bool = False, gammas: bool = False):  # fmt: skip
        self.gammas = gammas
        self.colony, self.names, self.ram_gb, self.say, self.exchange = colony, names, ram_gb, say, exchange
        settings = Config.load().life
        self.most, self.rest = most, settings.rest_seconds
        self.metabolism = Metabolism() if settings.metabolism else None
        self.beds: dict[str, float] = {}  # who hibernates, and since when
        self.places: dict[str, float] = {}  # of children who may be born, and when that was said
        self.monitor, self.monitored = Monitor(), time.monotonic()
        self.called: set[str] = set()  # for whom letters wait
        self.started: dict[str, float] = {}
        self.alive: dict[str, int] = {}  # process ids
        self.crashes: dict[str, int] = {}
        self.stopping = asyncio.Event()
        self.nursery: asyncio.subprocess.Process | None = None
        self.tasks: set[asyncio.Task] = set()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self.stopping.set)
        looking = asyncio.create_task(self._look_about())
        attempts = 0
        while not self.stopping.is_set():
            await self._raise_all()
            if not self.stopping.is_set():  # the nursery itself has gone
                attempts += 1
                await self._pause(min(BACK_OFF[1], 2.0**attempts))
        await looking
        self.say("Everybody is asleep.")

    async def _raise_all(self) -> None:
        """One nursery, until it ends or everything shall."""
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        self.nursery = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "swarm.nursery", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            env={**os.environ, **FRUGAL, "PYTHONPATH": path}, start_new_session=True)  # fmt: skip
        listening = asyncio.create_task(self._listen(self.nursery))
        stop = asyncio.create_task(self.stopping.wait())
        await asyncio.wait((listening, stop), return_when=asyncio.FIRST_COMPLETED)
        for task in self.tasks:
            task.cancel()
        if self.nursery.stdin:
            self.nursery.stdin.close()  # which tells it to bring all down
        await listening
        await self.nursery.wait()
        stop.cancel()

    async def _listen(self, nursery: asyncio.subprocess.Process) -> None:
        assert nursery.stdout
        async for line in nursery.stdout:
            told = json.loads(line)
            if told.get("ready"):
                for name in self.names.keys() - self.beds.keys():
                    self._later(self._start(name))
            elif "started" in told:
                self.started[told["started"]] = time.monotonic()
                self.alive[told["started"]] = told["pid"]
            elif "ended" in told:
                self.alive.pop(told["ended"], None)
                if not self.stopping.is_set():
                    self._ended(told["ended"], told["code"])

    def _later(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def _ended(self, name: str, code: int) -> None:
        if code == HIBERNATES:
            self.beds[name] = time.monotonic()
            self.say(f"{name} hibernates; its bed is kept.")
            return
        if code == 0:
            self.say(f"{name} went to sleep.")
            return
        lived = time.monotonic() - self.started.get(name, time.monotonic())
        self.crashes[name] = 1 if lived > STABLE else self.crashes.get(name, 0) + 1
        pause = min(BACK_OFF[1], BACK_OFF[0] * 2 ** (self.crashes[name] - 1))
        how = (
            f"was killed by signal {-code}"
            if code < 0
            else f"ended with code {code} ({self.colony.folder}/homes/{name}/log)"
        )
        self.say(f"{name} {how}; it is started again in {pause:g} s.")
        self._later(self._start(name, pause))

    async def _start(self, name: str, pause: float = 0.0) -> None:
        await self._pause(pause)
        while (
            self.ram_gb is not None
            and not self.stopping.is_set()
            and self._memory_mb() + EMBRYO_MB > self.ram_gb * 1024
        ):
            self.say(f"{name} waits: {len(self.alive)} organisms fill --ram {self.ram_gb:g} GB.")
            await self._pause(BACK_OFF[1])
        if self.stopping.is_set() or self.nursery is None or self.nursery.stdin is None:
            return
        order = dict(
            start=name,
            home=str(self.colony.home(name)),
            mesh=str(self.colony.mesh_path),
            corpus=self.names[name],
            exchange=self.exchange or self.gammas,
            gammas=self.gammas,
            supervised=True,
        )
        self.nursery.stdin.write(json.dumps(order).encode() + b"\n")

    # Births and beds.

    async def _look_about(self) -> None:
        """Twice a second: letters to the supervisor, homes of children, beds."""
        trouble = ""
        while not self.stopping.is_set():
            try:
                await asyncio.to_thread(self._look)
            except (MeshError, OSError) as error:
                if str(error) != trouble:
                    self.say(f"The supervisor cannot look into the mesh: {error}")
                trouble = str(error)
            for name in self._children():
                self.names[name] = None
                self.places.pop(name, None)
                self.say(f"{name} is born.")
                self._later(self._start(name))
            for name in self._awaited():
                del self.beds[name]
                self._later(self._start(name))
            await self._pause(LOOK)

    def _look(self) -> None:
        """Answer letters, and learn for whom others wait."""
        with SQLiteMesh(self.colony.mesh_path) as mesh:
            for letter in mesh.inbox(SUPERVISOR):
                if letter.kind not in ANSWERS:
                    mesh.post(SUPERVISOR, letter.sender, "answer", self._answer(letter) | dict(to=letter.id))
                mesh.settle([letter.id])
            if time.monotonic() - self.monitored >= MONITOR:
                self.monitored = time.monotonic()
                gammas = gammas_of({peer.id: mesh.blob(peer.id, "gamma") for peer in mesh.peers(living=True)})
                for id, news in self.monitor.look(gammas).items():
                    mesh.post(SUPERVISOR, id, "topology", news)
                self._feed(mesh)
            waiting = mesh.waiting() if self.beds else set()
            self.called = {Path(peer.home).name for peer in mesh.peers() if peer.id in waiting} if waiting else set()

    def _feed(self, mesh: Mesh) -> None:
        """Tell all who are awake what the metabolism would have them do more of, where there is one."""
        if self.metabolism:
            awake = {peer.id: peer.facts for peer in mesh.peers(living=True) if peer.facts.get("answers")}
            for id, wanted in self.metabolism.advise(awake, os.cpu_count() or 1).items():
                mesh.post(SUPERVISOR, id, "metabolism", wanted._asdict())

    def _answer(self, letter: Letter) -> dict[str, Any]:
        """{"home": where a child may be born} or {"error": why not}."""
        try:
            if letter.kind != "divide":
                raise OrganismError(f"The supervisor takes no letters of kind {letter.kind!r}.")
            return dict(home=str(self._place(Path(str(letter.payload.get("home"))).name)))
        except OrganismError as error:
            return dict(error=str(error))

    def _place(self, parent: str) -> Path:
        """A home for a child of this one; OrganismError where there is no room."""
        self.places = {name: at for name, at in self.places.items() if time.monotonic() - at < PLACE_SECONDS}
        if parent not in self.names:
            raise OrganismError(f"{parent} does not live in this colony.")
        if why := no_room(len(self.names), len(self.places), self.most, self._memory_mb(), self.ram_gb):
            raise OrganismError(why)
        room_for_one_more(self.colony.folder)
        taken = {*self.names, *self.places, *self.colony.homes()}
        name = next(name for number in itertools.count(1) if (name := f"{parent}-child{number}") not in taken)
        self.places[name] = time.monotonic()
        return self.colony.home(name)

    def _children(self) -> list[str]:
        """Whose homes have appeared where a place was kept."""
        return [name for name in self.places if (self.colony.home(name) / "birth.json").exists()]

    def _awaited(self) -> list[str]:
        """Who hibernates, and is to wake."""
        return who_wakes(self.beds, self.called, len(self.alive), os.cpu_count() or 1, self.rest, time.monotonic())

    def _memory_mb(self) -> float:
        """What they take together; one that has just been started counts as what it will take."""
        return sum(max(EMBRYO_MB, proportional_mb(pid)) for pid in list(self.alive.values()))

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.stopping.wait(), seconds or 0.001)


def up(
    folder: Path,
    count: int,
    corpora: Sequence[str],
    most: int,
    ram_gb: float | None,
    say: Callable[[str], None],
    exchange: bool = False,
    gammas: bool = False,
) -> None:
    """Supervise a colony until a signal ends it."""
    pairs, colony = corpora_of(corpora), Colony(folder)
    names = names_of(count, pairs, colony.homes(), most)
    handle = colony.take()
    try:
        colony.clear_out()
        say(f"{len(names)} organisms wake in {colony.folder}; Ctrl-C puts them to sleep.")
        asyncio.run(Supervisor(colony, names, most, ram_gb, say, exchange, gammas).run())
    finally:
        os.ftruncate(handle, 0)
        os.close(handle)
