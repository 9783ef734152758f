"""A lone organism's children: processes of their own that end, at the latest, when their parent does.

A child's home appears beside its parent's (`Organism.bear`), and `python -m swarm.family --birth HOME/birth.json` lives there,
with standard input detached, until its parent's process ends, however that does: then a pipe between the two is at its end, and
the child saves itself. Its home stays, one like any other. In a colony the supervisor starts the child instead, and only `bear` is of use.

Never a runaway: nobody divides in no mesh, where `life.family` live in it, before the cooldown since birth and since the last
division is over, or where memory or disk are short. Whoever divides holds the lock file `mesh.db-births` until its child is
counted (in a Ray mesh one on each machine, so that several machines may each be one too many).
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import platformdirs

from organism import Organism, OrganismError, free_memory, spare_memory
from swarm.mesh import default_mesh, open_mesh

ROOT = Path(__file__).resolve().parent.parent
MEMORY = 256 << 20  # bytes that must be free before somebody is born
DISK = 256 << 20


class Family:
    """The children of one organism. Bearing happens in a thread, so that heartbeats go on."""

    def __init__(self, life: Organism, where: str, say: Callable[[str], None]):
        self.life, self.where, self.say = life, where or default_mesh(), say
        self.children: list[Child] = []
        self._labour: threading.Thread | None = None

    def divide(self) -> None:
        """Bear a child and let it live, where the limits allow that."""
        self._begin(self._divide)

    def bear(self, home: str) -> None:
        """Only prepare the child's home, for a supervisor that waits for it."""
        self._begin(lambda: self.life.bear(home))

    def reap(self) -> None:
        """Forget children that have ended; no zombie is left."""
        self.children = [child for child in self.children if not child.ended]

    def end(self, patience: float = 40.0) -> None:
        """Let a birth under way be finished, put the children to sleep, and wait for them."""
        if self._labour is not None:
            self._labour.join()
        for child in self.children:
            child.release()
        for child in self.children:
            child.await_end(patience)
        self.children = []

    def _begin(self, work: Callable[[], object]) -> None:
        if self._labour is not None and self._labour.is_alive():
            return
        self._labour = threading.Thread(target=self._safely, args=(work,), name="organism-division")
        self._labour.start()

    def _safely(self, work: Callable[[], object]) -> None:
        """A birth that fails is an event, and the parent lives on."""
        try:
            work()
        except OrganismError as error:
            self.life.memory.event("undivided", dict(reason=str(error)))
            self.say(f"It would divide, but cannot: {error}")

    def _divide(self) -> None:
        with _births(self.where), open_mesh(self.where) as mesh:
            alive, most = len(mesh.peers(living=True)), self.life.config.life.family
            if alive >= most:
                raise OrganismError(f"{alive} live in its mesh, and life.family is {most}.")
            room_for_one_more(self.life.home.path, free_memory())
            home = self.life.home.path
            names = (home.with_name(f"{home.name}-child{number}") for number in itertools.count(1))
            facts = self.life.bear(next(path for path in names if not path.exists()))
            child = Child(Path(facts["home"]), self.where)
            self.children.append(child)
            mesh.register(facts["id"], facts["home"], dict(stage=facts["stage"]), facts["parent"], child.process.pid)
        self.say(f"It divided: {facts['id']} is born in {facts['home']}.")


def room_for_one_more(path: Path, free: int | None) -> None:
    """Raises OrganismError where memory, of which so many bytes are free (None: who knows), or the disk of a path is short."""
    if free is not None and free < MEMORY:
        raise OrganismError(f"Only {free >> 20} MB of memory are free.")
    if (left := shutil.disk_usage(path).free) < DISK:
        raise OrganismError(f"Only {left >> 20} MB of its disk are free.")


def births_path(where: str) -> Path:
    """The lock file of births in a mesh: beside its file; of a Ray mesh one on each machine, in the user's folder."""
    if where.startswith("ray:"):
        folder = Path(platformdirs.user_data_dir("organism", appauthor=False))
        return folder / f"ray-{hashlib.sha256(where.encode()).hexdigest()[:16]}-births"
    return Path(f"{Path(where).expanduser()}-births")


@contextlib.contextmanager
def _births(where: str) -> Iterator[None]:
    """One birth at a time in a mesh, so that all are counted."""
    path = births_path(where)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


class Child:
    """The process that lives in a home that `Organism.bear` made."""

    def __init__(self, home: Path, where: str):
        theirs, self._ours = os.pipe()
        command = [sys.executable, "-m", "swarm.family", "--birth", str(home / "birth.json"), "--mesh", where,
                   "--parent", str(theirs)]  # fmt: skip
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                pass_fds=(theirs,), env={**os.environ, "PYTHONPATH": path}, start_new_session=True)  # fmt: skip
        finally:
            os.close(theirs)

    @property
    def ended(self) -> bool:
        """Whether it has; it is reaped by asking."""
        if self.process.poll() is None:
            return False
        self.release()
        return True

    def release(self) -> None:
        """Let go of the pipe: the child ends soon. Safe to call twice."""
        if self._ours >= 0:
            os.close(self._ours)
            self._ours = -1

    def await_end(self, patience: float) -> None:
        try:
            self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m swarm.family", description="Live as a child of somebody's.")
    parser.add_argument("--birth", required=True, type=Path, help="birth.json in the child's home")
    parser.add_argument("--mesh", required=True)
    parser.add_argument("--parent", required=True, type=int, help="what to read from until the parent ends")
    options = parser.parse_args()
    if not options.birth.is_file():
        parser.error(f"{options.birth} does not exist: a child is born by `Organism.bear`.")
    from swarm.nursery import dwell

    spare_memory()
    threading.Thread(target=_end_with, args=(options.parent,), daemon=True).start()
    return dwell(dict(home=str(options.birth.parent), mesh=options.mesh))


def _end_with(pipe: int) -> None:
    """Ask this process to end when nobody holds the other end of a pipe any more."""
    while os.read(pipe, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
