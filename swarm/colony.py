"""A colony: a folder with a home for each organism, the mesh they share, and the supervisor that runs in the foreground.

COLONY/colony.lock   who supervises: process id, start time and machine (flock: one at a time)
COLONY/colony.ray    the Ray cluster that it lives on, while it does
COLONY/mesh.db       the colony's mesh; on a cluster it is kept by an actor (swarm/ray_mesh.py)
COLONY/homes/NAME/   an organism each, with its `log`
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from organism import Config, OrganismError, UsageError
from swarm.family import room_for_one_more
from swarm.mesh import ANSWERS, SUPERVISOR, Letter, Mail, Mesh, MeshError, machine, open_mesh, start_time
from swarm.metabolism import Metabolism
from swarm.nursery import HIBERNATES
from swarm.ray_mesh import membership
from swarm.rules import EMBRYO_MB, Bed, no_room, who_wakes
from swarm.thinking import Correspondent
from swarm.topology import Monitor, Topology, gammas_of, topology
from swarm.wards import Cluster, Here

BACK_OFF = (1.0, 60.0)  # seconds before a crashed organism is started again: the first time, and at most
STABLE = 60.0  # seconds after which a crash counts as the first again
MONITOR = 30.0  # seconds between two looks at the topology (spec/molequla.md §1.14)
PATIENT = 3  # looks in a row that do not find the own lock file, before the colony ends
LOOK = 0.5  # seconds between two looks of the supervisor into the mesh
SETTLE = 15.0  # seconds that who is to be started waits for a ward that opens, where another one is open
EXPLORE = 2.0  # seconds between two looks for new places to live
PLACE_SECONDS = 120.0  # that a place is kept for a child whose parent was told that it may divide


class Colony:
    """The folder of a colony. Raises OrganismError in one sentence."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser().absolute()
        self.mesh_path, self.lock_path = self.folder / "mesh.db", self.folder / "colony.lock"
        self.ray_path = self.folder / "colony.ray"

    def homes(self) -> list[str]:
        """Names of those who live here, in order."""
        found = (path.name for path in (self.folder / "homes").glob("*/") if not path.name.startswith("."))
        return sorted(found, key=_natural)

    def home(self, name: str) -> Path:
        """Of one of them."""
        return self.folder / "homes" / name

    def mesh(self, begin: bool = False) -> Mesh:
        """Its mesh, wherever it lives. begin: also where a cluster must be started for that."""
        cluster = self.ray_path.read_text("ascii").strip() if self.ray_path.exists() else ""
        return open_mesh(mesh_address(cluster, self.mesh_path) if cluster else self.mesh_path, begin)

    def move_to(self, cluster: str) -> None:
        """Live on a Ray cluster from now on, whose actor keeps the mesh."""
        self.move_home()
        self.ray_path.write_text(f"{cluster}\n", "ascii")
        self.mesh(begin=True).close()

    def move_home(self) -> None:
        """The mesh is a file as any other again: its actor, where there is one, lets go of it."""
        if self.ray_path.exists():
            with contextlib.suppress(MeshError):  # the cluster is gone, and its actor with it
                self.mesh().dismiss()  # type: ignore[attr-defined]
            membership.leave()
            self.ray_path.unlink()

    def clear_out(self) -> None:
        """Remove homes of children whose birth was interrupted."""
        for unborn in (self.folder / "homes").glob(".tmp-*"):
            shutil.rmtree(unborn, ignore_errors=True)

    def supervisor(self) -> int | None:
        """Process id of whoever supervises it now from this machine; None where nobody does."""
        try:
            pid, started, where = self.claim().split()
        except (OSError, ValueError):
            return None
        return int(pid) if where == machine() and start_time(int(pid)) == int(started) else None

    def claim(self) -> str:
        """What the supervisor has written into its lock file."""
        return self.lock_path.read_text("ascii")

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
                f"The colony {self.folder} is supervised by process {(self.claim().split() or ['?'])[0]} already: "
                "`organism swarm down` ends that, or choose another --home."
            ) from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()} {start_time(os.getpid()) or 0} {machine()}\n".encode(), 0)
        return handle

    def status(self) -> list[dict[str, Any]]:
        """Who is known, each checked at this moment; empty where nothing ever ran."""
        if not self.mesh_path.exists():
            return []
        with self.mesh() as mesh:
            return [dict(id=p.id, name=Path(p.home).name, pid=p.pid, stage=p.facts.get("stage"), status=p.status,
                         syntropy=p.facts.get("syntropy"), entropy=p.facts.get("entropy"), loss=p.facts.get("loss"),
                         lived_bytes=p.facts.get("lived_bytes"), training_tokens=p.facts.get("training_tokens"), peers=p.facts.get("peers"),
                         heartbeat_age_s=round(p.heartbeat_age_s, 3)) for p in mesh.peers()]  # fmt: skip

    def topology(self) -> Topology:
        """How alike those who live now have become."""
        if not self.mesh_path.exists():
            return topology({})
        with self.mesh() as mesh:
            return topology(gammas_of({p.id: mesh.blob(p.id, "gamma") for p in mesh.peers(living=True)}))

    def down(self, patience: float = 60.0) -> int:
        """End the supervisor, and with it everybody; how many were alive. Whoever is left is asked to end directly."""
        alive = self._alive()
        if (pid := self.supervisor()) is not None:
            os.kill(pid, signal.SIGTERM)
            _await(lambda: self.supervisor() is None, patience)
        elif self.ray_path.exists() and self._send([SUPERVISOR], "down", 10 * LOOK):  # it is on another machine
            _await(lambda: not self.ray_path.exists(), patience)
        if left := self._alive():
            self._send(left, "stop", patience / 4)
        if not _await(lambda: not self._alive(), patience):
            raise OrganismError(f"Some of the colony {self.folder} do not end: `organism swarm status` shows which.")
        return len(alive)

    def _alive(self) -> list[str]:
        return [row["id"] for row in self.status() if row["status"] == "alive"]

    def _send(self, to: Sequence[str], kind: str, seconds: float) -> int:
        """A letter to each; how many have answered within some seconds."""
        with self.mesh() as mesh, Correspondent(mesh) as me:
            return len(me.answers({me.send(one, kind) for one in to}, seconds))


def mesh_address(cluster: str, path: Path) -> str:
    """Of the mesh whose file is `path`, on a cluster that is written as `ray_mesh` writes it."""
    return f"{'' if cluster.startswith('ray:') else 'ray:'}{cluster}{path}"


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


class Supervisor:
    """Starts organisms, starts the crashed and the lost again, and brings all down; asyncio's own processes and signals.

    It also says who may divide, starts the child whose home then appears, and keeps the beds of those who hibernate: they wake
    when a letter asks something of them, when texts wait that are worth it (`rules.stirs`), or when fewer are awake than the
    machines have cores.
    """

    def __init__(self, colony: Colony, names: dict[str, str | None], most: int, ram_gb: float | None, say: Callable[[str], None],
                 exchange: bool = False, gammas: bool = False, land: Here | Cluster | None = None):  # fmt: skip
        self.gammas, self.land = gammas, land or Here(colony)
        self.colony, self.names, self.ram_gb, self.say, self.exchange = colony, names, ram_gb, say, exchange
        settings = Config.load().life
        self.most, self.rest, self.patience = most, settings.rest_seconds, settings.nap_seconds
        self.metabolism = Metabolism() if settings.metabolism else None
        self.beds: dict[str, Bed] = {}  # of those who hibernate
        self.left: dict[str, Bed] = {}  # beds that were left, by who has woken
        self.places: dict[str, float] = {}  # of children who may be born, and when that was said
        self.monitor, self.monitored = Monitor(), time.monotonic()
        self.called: dict[str, Mail] = {}  # what waits for whom, while somebody hibernates
        self.started: dict[str, float] = {}
        self.homes: dict[str, Any] = {}  # the ward in which each lives, or was told to
        self.alive: dict[str, int] = {}  # process ids
        self.crashes: dict[str, int] = {}
        self.stopping = asyncio.Event()
        self.wards: list[Any] = []  # that are open
        self.opening: dict[str, float] = {}  # places whose ward is not ready yet, and since when
        self.tending: dict[str, asyncio.Task] = {}  # by place
        self.losses: dict[str, int] = {}  # of wards one after the other, by place
        self.troubles: dict[str, str] = {}  # that were said, by place
        self.tasks: set[asyncio.Task] = set()

    async def run(self) -> None:
        self.loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self.loop.add_signal_handler(number, self.stopping.set)
        looking = asyncio.create_task(self._look_about())
        looking.add_done_callback(lambda _: self.stopping.set())  # who is deaf does not supervise
        for name in self.names:
            self._later(self._start(name))
        await self._explore()
        for task in self.tasks:
            task.cancel()
        for ward in self.wards:
            await ward.close()
        for place in self.opening.keys() - {ward.place for ward in self.wards}:
            self.tending[place].cancel()
        await asyncio.gather(*self.tending.values(), return_exceptions=True)
        await looking
        self.say("Everybody is asleep.")

    # Where they live.

    async def _explore(self) -> None:
        """A ward in each place, also in those that appear later, until everything shall stop."""
        while not self.stopping.is_set():
            for place in await self._places():
                if place not in self.tending or self.tending[place].done():
                    self.opening[place] = time.monotonic()
                    self.tending[place] = asyncio.create_task(self._tend(place))
            await self._pause(EXPLORE)

    async def _places(self) -> list[str]:
        try:
            return await asyncio.to_thread(self.land.places)
        except (OrganismError, ConnectionError) as error:
            self._complain("", f"The places to live are not known: {error}")
            return []

    def _complain(self, place: str, text: str) -> None:
        """Once, until something else is wrong there."""
        if self.troubles.get(place) != text:
            self.say(text)
        self.troubles[place] = text

    async def _tend(self, place: str) -> None:
        """The ward of a place, until it ends."""
        ward, began = self.land.ward(place), time.monotonic()
        try:
            await ward.open()
            self.wards.append(ward)
            if self.stopping.is_set():
                await ward.close()
            while (told := await ward.hear()) is not None:
                if "ready" in told:
                    self.opening.pop(place, None)
                elif "started" in told:
                    self.started[told["started"]] = time.monotonic()
                    self.alive[told["started"]] = told["pid"]
                elif self.homes.get(told["ended"]) is ward:
                    self._ended(told["ended"], told["code"])
        except (OrganismError, OSError) as error:
            self._complain(place, f"Nobody can live on {ward.name}: {error}")
        finally:
            self.opening.pop(place, None)
            if ward in self.wards:
                self.wards.remove(ward)
            if not self.stopping.is_set():
                self._lost(ward)
        if not self.stopping.is_set():
            self.losses[place] = 0 if time.monotonic() - began > STABLE else self.losses.get(place, 0) + 1
            await self._pause(min(BACK_OFF[1], 2.0 ** self.losses[place]))

    def _lost(self, ward: Any) -> None:
        """A ward has ended by itself: whoever lived there goes on from its last generation, wherever there is room."""
        gone = [name for name, where in self.homes.items() if where is ward]
        if gone:
            self.say(f"The ward on {ward.name} has ended; started again: {', '.join(gone)}.")
        for name in gone:
            del self.homes[name]
            self.alive.pop(name, None)
            self._later(self._start(name, BACK_OFF[0]))

    def _awaits_room(self) -> bool:
        """Whether a ward is about to be ready, where some might better live."""
        return any(time.monotonic() - began < SETTLE for began in self.opening.values())

    def _later(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def _ended(self, name: str, code: int) -> None:
        del self.homes[name]
        self.alive.pop(name, None)
        if self.stopping.is_set():
            return
        if code == HIBERNATES:
            now = time.monotonic()
            self.beds[name] = Bed.after(self.left.pop(name, None), self.started.get(name, now), now)
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
        """Where there is most room, once there is any."""
        await self._pause(pause)
        while not self.stopping.is_set():
            if self.ram_gb is not None and await asyncio.to_thread(self._memory_mb) + EMBRYO_MB > self.ram_gb * 1024:
                self.say(f"{name} waits: {len(self.alive)} organisms fill --ram {self.ram_gb:g} GB.")
                await self._pause(BACK_OFF[1])
            elif self.wards and not self._awaits_room():
                break
            else:
                await self._pause(0.1)
        if self.stopping.is_set():
            return
        lodgers = list(self.homes.values())
        self.homes[name] = ward = min(self.wards, key=lambda one: lodgers.count(one) / one.cores)
        order = dict(
            start=name,
            home=str(self.colony.home(name)),
            mesh=str(self.colony.mesh_path),
            corpus=self.names[name],
            exchange=self.exchange or self.gammas,
            gammas=self.gammas,
            supervised=True,
        )
        await ward.tell(order)

    # Births and beds.

    async def _look_about(self) -> None:
        """Twice a second: whether the folder is still its own, letters to the supervisor, homes of children, beds."""
        trouble, strange = "", 0
        while not self.stopping.is_set():
            if self.colony.supervisor() != os.getpid():
                strange += 1
                if strange > PATIENT:
                    self.say(f"The folder {self.colony.folder} was moved, deleted or taken over: everybody ends.")
                    self.stopping.set()
                await self._pause(LOOK)
                continue
            strange = 0
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
                self.left[name] = self.beds.pop(name)
                self._later(self._start(name))
            await self._pause(LOOK)

    def _look(self) -> None:
        """Answer letters, and learn for whom others wait."""
        with self.colony.mesh() as mesh:
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
            waiting = mesh.waiting() if self.beds else {}
            homes = {peer.id: Path(peer.home).name for peer in mesh.peers()} if waiting else {}
            self.called = {homes[id]: mail for id, mail in waiting.items() if id in homes}

    def _feed(self, mesh: Mesh) -> None:
        """Tell all who are awake what the metabolism would have them do more of, where there is one."""
        if self.metabolism:
            awake = {peer.id: peer.facts for peer in mesh.peers(living=True) if peer.facts.get("answers")}
            for id, wanted in self.metabolism.advise(awake, self._cores()).items():
                mesh.post(SUPERVISOR, id, "metabolism", wanted._asdict())

    def _answer(self, letter: Letter) -> dict[str, Any]:
        """{"home": where a child may be born}, {"ending": True} or {"error": why not}."""
        if letter.kind == "down":
            self.loop.call_soon_threadsafe(self.stopping.set)
            return dict(ending=True)
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
        room_for_one_more(self.colony.folder, self._free())
        taken = {*self.names, *self.places, *self.colony.homes()}
        name = next(name for number in itertools.count(1) if (name := f"{parent}-child{number}") not in taken)
        self.places[name] = time.monotonic()
        return self.colony.home(name)

    def _children(self) -> list[str]:
        """Whose homes have appeared where a place was kept."""
        return [name for name in self.places if (self.colony.home(name) / "birth.json").exists()]

    def _awaited(self) -> list[str]:
        """Who hibernates, and is to wake."""
        now = time.monotonic()
        return who_wakes(self.beds, self.called, len(self.alive), self._cores(), self.rest, now, self.patience)

    def _cores(self) -> int:
        """Of all places where they live."""
        return sum(ward.cores for ward in self.wards) or os.cpu_count() or 1

    def _memory_mb(self) -> float:
        """What they take together; one that has just been started counts as what it will take."""
        homes = dict(self.homes)
        here = {ward: [pid for name, pid in self.alive.items() if homes.get(name) is ward] for ward in self.wards}
        return sum(ward.memory_mb(pids) for ward, pids in here.items())

    def _free(self) -> int | None:
        """Bytes of memory that are free where most are."""
        known = [free for ward in self.wards if (free := ward.free()) is not None]
        return max(known, default=None)

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
    ray: str | None = None,
) -> None:
    """Supervise a colony until a signal ends it; on a Ray cluster, where one is named."""
    pairs, colony = corpora_of(corpora), Colony(folder)
    names = names_of(count, pairs, colony.homes(), most)
    land = Cluster(colony, ray) if ray else Here(colony)
    handle = colony.take()
    try:
        colony.clear_out()
        land.enter()
        say(f"{len(names)} organisms wake in {colony.folder}; Ctrl-C puts them to sleep.")
        asyncio.run(Supervisor(colony, names, most, ram_gb, say, exchange, gammas, land).run())
    finally:
        land.leave()
        os.ftruncate(handle, 0)
        os.close(handle)
