"""A mesh across machines: the file of an SQLite mesh, kept by one Ray actor that every process of a Ray cluster can call.

    ray:local[/PATH]         the cluster that runs on this machine; where none runs, one is started, for this machine alone
    ray:auto[/PATH]          the cluster that this machine belongs to
    ray:HOST:PORT[/PATH]     the cluster with this address, to which this machine belongs
    ray://HOST:PORT[/PATH]   a cluster that this machine does not belong to, through its Ray Client server

The actor is named after the file, so that a file never has two; it is detached, and Ray restarts it when its process or its
node dies. PATH must then be on a disk that all nodes share. Without one the file is the user's own, on the node that was there
first, and the actor is only ever restarted there.

A call is done once. Ray repeats a call whose actor died, so each has a number; what changes something is written in one
transaction with its reply, and a repetition gets that reply. A reply that never arrived is known by the next call, which says
what it saw last: letters that were handed out with a lost reply wait again. And an acknowledged change is on the disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from organism import UsageError
from swarm.mesh import Letter, Mail, Mesh, MeshError, Offer, Row, SQLiteMesh, boot_clock

NAMESPACE = "organism"
ANSWER_SECONDS = 40.0  # for the actor; Ray needs 16 to notice that a node is lost, and to start it on another
FOREVER = 10**9  # seconds that a process waits for a lost cluster before Ray ends it (Ray's default: 60)
ONCE = ("_post", "inbox", "withdraw", "_offer", "claim")  # what must not be done twice


class Address(NamedTuple):
    """cluster: "local", "auto", "HOST:PORT" or "ray://HOST:PORT"; path: of the state, "" for the user's own."""

    cluster: str
    path: str

    @classmethod
    def of(cls, where: str) -> Address:
        match = re.fullmatch(r"ray:(local|auto|(?://)?[^/\s]+:\d+)(/.*)?", where)
        if match is None:
            raise MeshError(f"{where!r} is no address of a Ray mesh: ray:local, ray:HOST:PORT and ray://HOST:PORT are.")
        cluster = f"ray:{match[1]}" if match[1].startswith("//") else match[1]
        return cls(cluster, match[2] or "")


def cluster_of(flag: str) -> str:
    """The cluster that --ray names. Raises UsageError."""
    if not re.fullmatch(r"local|auto|(ray://)?[^/\s]+:\d+", flag):
        raise UsageError(f"--ray {flag!r} is no address of a Ray cluster: local, HOST:PORT and ray://HOST:PORT are.")
    return flag


# --- The actor, and what it keeps. ---


class Ledger(SQLiteMesh):
    """The state inside the actor: a file that nobody else opens, in which each call of each client is done once."""

    pragmas = ("locking_mode = EXCLUSIVE", "journal_mode = WAL", "synchronous = FULL", "wal_autocheckpoint = 4000")

    def __init__(self, path: str | Path):
        super().__init__(path)
        self._began = boot_clock()
        self._heard: dict[str, float] = {}  # when each last said something, since this process began

    def answer(self, client: str, number: int, seen: int, method: str, args: tuple) -> Any:
        """The reply to a client's call `number`, which has seen the reply to its call `seen`."""
        if method not in ONCE and seen == number - 1:
            return getattr(self, method)(*args)
        with self._writing() as connection:
            found = connection.execute("SELECT number, method, reply FROM replies WHERE client = ?", (client,))
            done, what, told = found.fetchone() or (0, "", "null")
            if number < done:
                raise MeshError("A call came after a later one of the same client; it was not done.")
            if number == done:
                return self._again(what, json.loads(told))
            if done > seen:
                self._undo(what, json.loads(told), args)
            reply = getattr(self, method)(*args)
            short = [item.id for item in reply] if isinstance(reply, list) and method in ONCE else reply
            if method in ONCE and reply == [] and seen == number - 1:
                return reply  # nothing was handed out
            note = short if method in ONCE else None
            connection.execute(
                "INSERT OR REPLACE INTO replies VALUES (?, ?, ?, ?, ?)",
                (client, number, method, json.dumps(note), time.time()),
            )
            return reply

    def forget(self, client: str) -> None:
        """A client is done."""
        with self._writing() as connection:
            connection.execute("DELETE FROM replies WHERE client = ?", (client,))

    def _again(self, method: str, told: Any) -> Any:
        """A reply as it was."""
        marks = ", ".join("?" * len(told)) if isinstance(told, list) else ""
        if method == "inbox":
            columns = "id, from_id, to_id, type, payload FROM messages"
            rows = self._all(f"SELECT {columns} WHERE taken = 1 AND id IN ({marks}) ORDER BY id", *told)
            return [Letter(id, sender, to, kind, json.loads(text)) for id, sender, to, kind, text in rows]
        if method == "claim":
            columns = "id, from_id, type, payload FROM offers"
            return [Offer(*row) for row in self._all(f"SELECT {columns} WHERE id IN ({marks}) ORDER BY id", *told)]
        return told

    def _undo(self, method: str, told: Any, args: tuple) -> None:
        """What was handed out with a reply that never arrived waits again."""
        with self._writing() as connection:
            if method == "inbox":
                connection.executemany("UPDATE messages SET taken = 0 WHERE id = ? AND taken = 1", [(i,) for i in told])
            elif method == "claim" and told:
                connection.execute("UPDATE claims SET up_to = ? WHERE up_to = ?", (min(told) - 1, max(told)))

    # How long ago somebody spoke is counted here: the clocks of other machines, and of other boots, say nothing.

    def _enter(self, row: Row) -> None:
        super()._enter(row)
        self._heard[row.id] = boot_clock()

    def _beat(self, id: str, clock: float, facts: str | None, blobs: dict[str, bytes]) -> None:
        super()._beat(id, clock, facts, blobs)
        self._heard[id] = boot_clock()

    def _rows(self, living: bool) -> list[Row]:
        now = boot_clock()
        return [row._replace(silence=now - self._heard.get(row.id, self._began)) for row in super()._rows(living)]


class MeshActor:
    """What Ray runs. A node that restarts it without its file refuses: an empty mesh would have lost what was acknowledged."""

    def __init__(self, path: str):
        self.path = Path(path or _own_path())
        self.ledger: Ledger | None = None

    def call(self, client: str, number: int, seen: int, method: str, args: tuple) -> Any:
        if self.ledger is None:
            from ray.experimental import internal_kv

            known = f"{NAMESPACE}-mesh:{self.path}"  # of the cluster, for as long as it runs
            if not self.path.exists() and internal_kv._internal_kv_exists(known):
                raise MeshError(
                    f"The mesh was moved to a node without {self.path}: give it a path that all nodes share."
                )
            self.ledger = Ledger(self.path)
            internal_kv._internal_kv_put(known, b"born")
        if method == "forget":
            return self.ledger.forget(client)
        return self.ledger.answer(client, number, seen, method, args)

    def place(self) -> tuple[str, int]:
        import ray

        return ray.get_runtime_context().get_node_id(), os.getpid()


def _own_path() -> Path:
    import platformdirs

    return Path(platformdirs.user_data_dir("organism", appauthor=False)) / "ray-mesh.db"


# --- This process in the cluster. ---


def the_ray(cluster: str = "") -> Any:
    """The library, set so that it tells nobody of its use and does not end a process whose cluster is gone."""
    if cluster == "local":
        _show_token()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", str(FOREVER))
    try:
        import ray
    except ImportError as error:
        raise MeshError(
            f"A Ray cluster needs {error.name}, which is not installed: pip install -e '.[swarm]'"
        ) from None
    return ray


class Membership:
    """Of this process in a Ray cluster: one at a time. What else in the process uses Ray is left as it is."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.cluster = ""  # that was joined from here
        self.count = 0  # of joinings, so that handles of an earlier one are known

    def join(self, cluster: str, begin: bool = True) -> None:
        """begin: "local" is started where none runs on this machine."""
        ray = the_ray()
        with self.lock:
            if ray.is_initialized():
                if self.cluster and self.cluster != cluster:
                    raise MeshError(f"This process belongs to the Ray cluster {self.cluster} already: one at a time.")
                return
            try:
                with _signals_kept():
                    address = _found(cluster, begin)
                    ray.init(address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
            except (ConnectionError, RuntimeError, ValueError, OSError, ImportError, AssertionError) as error:
                reason = str(error).strip().partition("\n")[0]
                raise MeshError(
                    f"The Ray cluster {cluster} cannot be joined ({reason}): `ray start --head` starts one."
                ) from error
            ray._private.worker._worker_logs_enabled = (
                False  # what the cluster reports would go to this process's stdout
            )
            self.cluster, self.count = cluster, self.count + 1

    def leave(self) -> None:
        """Let go of a cluster that does not answer, so that the next call joins it anew."""
        with self.lock:
            if self.cluster:
                the_ray().shutdown()
                self.cluster, self.count = "", self.count + 1


membership = Membership()


def _found(cluster: str, begin: bool) -> str:
    """The address that `ray.init` takes, where something listens: it would wait for ever."""
    if cluster.startswith("ray://"):
        return cluster
    if cluster in ("local", "auto"):
        cluster = os.environ.get("RAY_ADDRESS") or _running() or (begin and cluster == "local" and start_local()) or ""
        if not cluster:
            raise ConnectionError("this machine belongs to none")
    host, _, port = cluster.rpartition(":")
    socket.create_connection((host, int(port)), timeout=3.0).close()
    return cluster


def _running() -> str:
    """The address of the cluster that this machine belongs to by its processes, "" where there is none."""
    from ray._private.services import find_gcs_addresses

    found = sorted(find_gcs_addresses())
    if len(found) > 1:
        raise ConnectionError(f"this machine belongs to several, name one: {', '.join(found)}")
    return found[0] if found else ""


def start_local() -> str:
    """The address of a new cluster of this machine, which stays until `ray stop`. Its ports are open to the network, but who
    calls it must know the token that lies in the user's folder."""
    with open(_own_path().with_name("ray-start.lock"), "w") as gate:  # two chats that begin at once start one
        fcntl.flock(gate, fcntl.LOCK_EX)
        if address := _running():
            return address
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--port=0", "--include-dashboard=false",
                   "--disable-usage-stats"]  # fmt: skip
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode:
            raise OSError((done.stderr.strip() or done.stdout.strip() or "no reason").splitlines()[-1])
        return _running()


def _show_token() -> None:
    """Let Ray ask for a token, and show it, made where there is none; before the library is loaded."""
    path = _own_path().with_name("ray-token")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        os.write(handle, secrets.token_hex(32).encode())
        os.close(handle)
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN_PATH", str(path))


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray takes SIGTERM for itself when it is joined from the main thread."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and before is not None:
            signal.signal(signal.SIGTERM, before)


# --- The mesh, from outside. ---


class RayMesh(Mesh):
    """A mesh by the actor of an address; the actor is made where there is none."""

    def __init__(self, where: str, begin: bool = True):
        self.where, self.address, self.begin = where, Address.of(where), begin
        self._client, self._number, self._seen = uuid.uuid4().hex, 0, 0
        self._lock = threading.RLock()
        self._actor: tuple[int, Any] | None = None  # (which joining, handle)
        self._closed = False
        the_ray(self.address.cluster)
        self._call("waiting")  # whatever is wrong is said now

    def _call(self, method: str, *args: Any) -> Any:
        with self._lock:
            if self._closed:
                raise MeshError(f"The mesh {self.where} is closed.")
            self._number += 1
            number, seen = self._number, self._seen
            reply = self._answered(lambda actor: actor.call.remote(self._client, number, seen, method, args))
            self._seen = self._number
            return reply

    def _answered(self, ask: Callable[[Any], Any]) -> Any:
        """What the actor replies, for which Ray repeats the call while the actor is restarted; an actor that is gone is made anew."""
        ray = the_ray()
        until, died = time.monotonic() + ANSWER_SECONDS, None
        while (left := until - time.monotonic()) > 0:
            try:
                return ray.get(ask(self._handle()), timeout=left)
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, MeshError):
                    raise MeshError(str(error.cause)) from None
                raise MeshError(f"The mesh {self.where} failed: {error.cause!r}.") from error
            except ray.exceptions.ActorDiedError as error:
                self._actor, died = None, error
                time.sleep(0.1)
            except (ray.exceptions.RayError, ConnectionError, RuntimeError) as error:
                died = error
                break
        membership.leave()
        reason = type(died).__name__ if died else f"not in {ANSWER_SECONDS:g} s"
        raise MeshError(
            f"The mesh {self.where} does not answer ({reason}): `ray status` shows whether its cluster runs."
        ) from died

    def _handle(self) -> Any:
        ray = the_ray()
        with membership.lock:
            membership.join(self.address.cluster, self.begin)
            if self._actor is None or self._actor[0] != membership.count:
                options = dict(name=f"mesh:{self.address.path or 'own'}", namespace=NAMESPACE, lifetime="detached",
                               get_if_exists=True, num_cpus=0, max_restarts=-1, max_task_retries=-1)  # fmt: skip
                if not self.address.path:
                    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

                    node = ray.get_runtime_context().get_node_id()
                    options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=False)
                actor = ray.remote(MeshActor).options(**options).remote(self.address.path)
                self._actor = membership.count, actor
            return self._actor[1]

    def close(self) -> None:
        with self._lock:
            if not self._closed:
                with contextlib.suppress(MeshError):
                    self._call("forget")
                self._closed = True

    def place(self) -> tuple[str, int]:
        """Where the actor runs at this moment: the node's id in the cluster, and a process id there."""
        return self._answered(lambda actor: actor.place.remote())

    def dismiss(self) -> None:
        """End the actor, and close; its state stays on the disk for the next one."""
        with self._lock:
            actor = self._handle()
            self.close()
            the_ray().kill(actor)

    def _enter(self, row: Row) -> None:
        self._call("_enter", row)

    def _beat(self, id: str, clock: float, facts: str | None, blobs: dict[str, bytes]) -> None:
        self._call("_beat", id, clock, facts, blobs)

    def _leave(self, id: str, clock: float, status: str) -> None:
        self._call("_leave", id, clock, status)

    def _rows(self, living: bool) -> list[Row]:
        return self._call("_rows", living)

    def _bury(self, died: list[tuple[str, int]]) -> None:
        self._call("_bury", died)

    def blob(self, id: str, name: str) -> bytes | None:
        return self._call("blob", id, name)

    def _post(self, sender: str, to: str, kind: str, text: str) -> int:
        return self._call("_post", sender, to, kind, text)

    def inbox(self, id: str, limit: int = 64) -> list[Letter]:
        return self._call("inbox", id, limit)

    def waiting(self) -> dict[str, Mail]:
        return self._call("waiting")

    def settle(self, ids: Iterable[int]) -> None:
        self._call("settle", list(ids))

    def withdraw(self, sender: str, ids: Iterable[int]) -> int:
        return self._call("withdraw", sender, list(ids))

    def _offer(self, sender: str, kind: str, payload: bytes) -> int:
        return self._call("_offer", sender, kind, payload)

    def claim(self, id: str, kind: str, limit: int = 8) -> list[Offer]:
        return self._call("claim", id, kind, limit)
