"""The fork server of a colony: it loads the libraries and the kernels once, and every organism is a fork of it.

Lines of JSON on stdin: {"start": NAME, "home": …, "mesh": …, "corpus": PATH or null, "exchange": …, "gammas": …, "supervised": true}; on
stdout: {"ready": true}, {"started": NAME, "pid": N}, {"ended": NAME, "pid": N, "code": N}. It has one thread, so that a
fork is clean. When stdin ends (the supervisor wants that, or was killed) it asks all organisms to end, waits, and ends
itself; when it is killed itself, the kernel asks them (PR_SET_PDEATHSIG). So nobody is ever an orphan.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import importlib
import json
import os
import random
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import organism

HIBERNATES = 75  # exit code of who sleeps because others do better, and wants its bed kept (EX_TEMPFAIL of sysexits.h)
PATIENCE = 40.0  # seconds that organisms get to save themselves
# What a process of its own may waste, 32 together may not; NumPy reads it when it is imported. By default it asks for pages of
# 2 MB for large arrays, of which an organism uses a corner.
FRUGAL = dict(NUMPY_MADVISE_HUGEPAGE="0", OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")


def preload(libraries: Sequence[str] = ()) -> None:
    """Everything that organisms share, and these libraries, loaded before the first fork and never collected."""
    import safetensors.numpy  # noqa: F401

    import swarm.member  # noqa: F401

    for name in libraries:
        importlib.import_module(name)
    if organism.kernels_ready():
        kernels = organism.organ("kernels")
        kernels.compile_parts(kernels.PARTS)
        kernels.release_compiler()
    gc.collect()
    gc.freeze()
    organism.close_holes()


def spare_more() -> None:
    """Beyond `organism.spare_memory`: arrays of 128 KB and more go back to the system at once, and all threads share one heap, so
    that what one frees another uses."""
    organism.spare_memory()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 128 << 10)  # M_MMAP_THRESHOLD
        libc.mallopt(-8, 1)  # M_ARENA_MAX


class Nursery:
    """Who was started, by process id."""

    def __init__(self) -> None:
        self.names: dict[int, str] = {}

    def say(self, **data: Any) -> None:
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.write(json.dumps(data) + "\n")
            sys.stdout.flush()

    def run(self) -> None:
        self.say(ready=True)
        waiting = b""
        while True:
            self.reap()
            if not select.select([0], [], [], 0.05)[0]:
                continue
            data = os.read(0, 65_536)
            if not data:
                break
            *lines, waiting = (waiting + data).split(b"\n")
            for line in lines:
                self.start(json.loads(line))
        self.end()

    def start(self, order: dict[str, Any]) -> None:
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = dwell(order) if _ends_with(parent) else 1
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        self.names[pid] = order["start"]
        self.say(started=order["start"], pid=pid)

    def reap(self) -> None:
        for pid in list(self.names):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                self.say(ended=self.names.pop(pid), pid=pid, code=os.waitstatus_to_exitcode(status))

    def end(self) -> None:
        until = time.monotonic() + PATIENCE
        self.signal(signal.SIGTERM)
        while self.names and time.monotonic() < until:
            self.reap()
            time.sleep(0.05)
        self.signal(signal.SIGKILL)

    def signal(self, number: int) -> None:
        for pid in self.names:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def _ends_with(parent: int) -> bool:
    """Let the kernel ask this fork to end when its parent does (PR_SET_PDEATHSIG); False where that has happened already."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    return os.getppid() == parent


def dwell(order: dict[str, Any]) -> int:
    """The life of one organism, in a process of its own; its exit code. 0: it went to sleep because it was told to."""
    home = Path(order["home"])
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    logs = os.open(home / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (logs, 1), (logs, 2)):
        os.dup2(source, target)
    return live(order, home)


class Turnstile:
    """As many at a time learn as the machine has cores: others would only wait for a core with twice the memory, since a burst
    works on copies. Each place is a lock file; who dies lets go of it."""

    def __init__(self, folder: Path, places: int):
        self.paths = [folder / f"learning-{number}" for number in range(places)]

    @contextlib.contextmanager
    def turn(self, stop: threading.Event) -> Iterator[None]:
        """Wait for a place, or until told to stop."""
        handle, last = -1, len(self.paths) - 1
        while handle < 0 and not stop.is_set():
            try:
                handle = self._try(self.paths[random.randint(0, last)])
            except OSError:  # the folder is gone, or the disk full: better too many than none
                break
            if handle < 0:
                stop.wait(0.02)
        try:
            yield
        finally:
            if handle >= 0:
                os.close(handle)

    @staticmethod
    def _try(path: Path) -> int:
        """A handle that holds the place; -1 where somebody else does."""
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return -1
        return handle


def live(order: dict[str, Any], home: Path) -> int:
    from swarm.member import Member

    newborn = not (home / "body" / "CURRENT").exists()
    with organism.Organism(home, threads=1) as life:
        member = Member(life, order["mesh"], answers=True, exchange=bool(order.get("exchange")),
                        supervised=bool(order.get("supervised")), gammas=bool(order.get("gammas")))  # fmt: skip
        if member.supervised:
            life.turn, life.frugal = Turnstile(Path(order["mesh"]).parent, os.cpu_count() or 1).turn, True
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: member.end())
        if newborn and order.get("corpus"):
            life.learn_file(order["corpus"])
        life.start()
        member.run()
    return HIBERNATES if member.hibernating else 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    spare_more()
    preload(sys.argv[1:])
    Nursery().run()
