"""The mesh: who lives here, letters between them, and offers to all of them.

`Mesh` is the interface, `SQLiteMesh` the default: one file, mesh.db, in WAL mode. Writers queue at a lock file before they
begin a transaction, so that SQLite's own lock is always free when it is asked for: nobody ever sees "database is locked".
`swarm.ray_mesh.RayMesh` reaches such a file across machines.

Three rules. Time is the machine's boot clock, so that a clock that jumps kills nobody. Whether a process of this machine
lives is asked of the machine (its id and the time it started), not of a table, so that a stale row never blocks. A letter
is handed out once: what its reader took and did not settle before it died comes back to whoever wrote it, as a letter of
kind "undelivered".

What only the caller's machine can tell (a process and when it started, its boot clock) is asked in `Mesh`, in the caller's
process; a backend keeps rows.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sqlite3
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from organism import OrganismError

PROTOCOL = 1  # of letters; peers that speak another one are listed, but not spoken to
HEARTBEAT = 2.0  # seconds between two heartbeats
MISSED = 3  # heartbeats that may be missed before one counts as silent
LETTER_BYTES = 1 << 20  # of a letter's payload at most
OFFER_BYTES = 1 << 20
KEEP_SECONDS = 86_400.0  # the dead, letters and offers are kept so long
ANSWERS = ("answer", "undelivered")  # kinds of letters that ask for nothing
NEWS = ("topology", "metabolism")  # and those of the supervisor to who is awake: nobody is woken for them
TEXTS = "learn"  # the kind of those that bring text
SUPERVISOR = "supervisor"  # to whom letters are written that ask the supervisor of a colony
WAIT_SECONDS = 20.0  # for other writers, before giving up


class MeshError(OrganismError):
    """The mesh cannot be used, in one sentence."""


class Peer(NamedTuple):
    """One row of the mesh. status: "alive", "asleep" (left in good order) or "dead"; facts: what it says of itself."""

    id: str
    pid: int
    home: str
    status: str
    heartbeat_age_s: float
    parent: str | None
    protocol: int
    facts: dict[str, Any]

    @property
    def listens(self) -> bool:
        """Whether an answer can be expected: alive, heard of lately, and of the same protocol."""
        return self.status == "alive" and self.protocol == PROTOCOL and self.heartbeat_age_s <= MISSED * HEARTBEAT + 1


class Letter(NamedTuple):
    """From one organism (or a command) to another. kind: "ask", "answer", "stop" …; payload: what JSON can say."""

    id: int
    sender: str
    to: str
    kind: str
    payload: dict[str, Any]


class Mail(NamedTuple):
    """What waits for one reader. asks: some letter wants something at once; size: bytes of the letters that bring text to learn; age:
    seconds that the oldest of those has waited."""

    asks: bool
    size: int = 0
    age: float = 0.0


class Offer(NamedTuple):
    """What one offers to all: each of the others can claim it once."""

    id: int
    sender: str
    kind: str
    payload: bytes


class Row(NamedTuple):
    """Who lives where, as a backend keeps it. beat: the last heartbeat by the boot clock of its own machine; silence: seconds
    since then, as far as the mesh itself can tell."""

    id: str
    pid: int
    started: int
    machine: str
    home: str
    status: str
    beat: float
    parent: str | None
    protocol: int
    facts: str
    silence: float = 0.0


class Mesh(ABC):
    """What an organism needs of a mesh. All methods may be called from any thread, and raise MeshError."""

    def register(
        self, id: str, home: str, facts: dict[str, Any], parent: str | None = None, pid: int | None = None
    ) -> None:
        """Join, or join again after a sleep or a crash: letters that an earlier life took and did not settle go back.
        `pid`: of a child that has just been started, and will say so itself in a moment."""
        pid = pid or os.getpid()
        started = start_time(pid) or 0
        self._enter(Row(id, pid, started, machine(), home, "alive", boot_clock(), parent, PROTOCOL, json.dumps(facts)))

    def heartbeat(self, id: str, facts: dict[str, Any] | None = None, blobs: dict[str, bytes] | None = None) -> None:
        """Say that one still lives, and what has changed; `blobs` ("gamma", "summary") replace those known."""
        self._beat(id, boot_clock(), None if facts is None else json.dumps(facts), blobs or {})

    def leave(self, id: str, status: str = "asleep") -> None:
        """Go in good order."""
        self._leave(id, boot_clock(), status)

    def peers(self, living: bool = False) -> list[Peer]:
        """All who are known (or only who lives now), oldest first, each checked at this moment.

        Whoever notices a death writes it down, and what the dead had taken goes back."""
        now, here, found, died = boot_clock(), machine(), [], []
        for row in self._rows(living):
            age, status = now - row.beat if row.machine == here else row.silence, row.status
            if status == "alive" and not (
                start_time(row.pid) == row.started if row.machine == here else age <= MISSED * HEARTBEAT + 1
            ):
                status = "dead"
                died.append((row.id, row.pid))
            facts = json.loads(row.facts)
            found.append(Peer(row.id, row.pid, row.home, status, age, row.parent, row.protocol, facts))
        if died:
            self._bury(died)
        return [peer for peer in found if peer.status == "alive"] if living else found

    @abstractmethod
    def blob(self, id: str, name: str) -> bytes | None:
        """What a peer said with `heartbeat(blobs=…)`."""

    def post(self, sender: str, to: str, kind: str, payload: dict[str, Any]) -> int:
        """Write a letter; the id of it. It waits if its reader sleeps. At most 1 MB."""
        return self._post(sender, to, kind, _letter_text(payload))

    @abstractmethod
    def inbox(self, id: str, limit: int = 64) -> list[Letter]:
        """Take the letters that wait, oldest first. Each is handed out once, however many ask."""

    @abstractmethod
    def waiting(self) -> dict[str, Mail]:
        """For whom letters wait, without answers and news."""

    @abstractmethod
    def settle(self, ids: Iterable[int]) -> None:
        """Letters that were taken are done with."""

    @abstractmethod
    def withdraw(self, sender: str, ids: Iterable[int]) -> int:
        """Take back letters that nobody has taken yet; how many."""

    def offer(self, sender: str, kind: str, payload: bytes) -> int:
        """Offer something to all others. At most 1 MB."""
        if len(payload) > OFFER_BYTES:
            raise MeshError(f"An offer of {len(payload):,} bytes is too long: at most {OFFER_BYTES:,}.")
        return self._offer(sender, kind, payload)

    @abstractmethod
    def claim(self, id: str, kind: str, limit: int = 8) -> list[Offer]:
        """Offers of others that this one has not claimed before, oldest first."""

    @abstractmethod
    def close(self) -> None:
        """Let go of it. Safe to call twice."""

    # What a backend does of the above.

    @abstractmethod
    def _enter(self, row: Row) -> None: ...

    @abstractmethod
    def _beat(self, id: str, clock: float, facts: str | None, blobs: dict[str, bytes]) -> None: ...

    @abstractmethod
    def _leave(self, id: str, clock: float, status: str) -> None: ...

    @abstractmethod
    def _rows(self, living: bool) -> list[Row]: ...

    @abstractmethod
    def _bury(self, died: list[tuple[str, int]]) -> None: ...

    @abstractmethod
    def _post(self, sender: str, to: str, kind: str, text: str) -> int: ...

    @abstractmethod
    def _offer(self, sender: str, kind: str, payload: bytes) -> int: ...

    def __enter__(self) -> Mesh:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def default_mesh() -> str:
    """ORGANISM_MESH ("none": no mesh), else one a user."""
    if where := os.environ.get("ORGANISM_MESH"):
        return where
    import platformdirs

    return str(Path(platformdirs.user_data_dir("organism", appauthor=False)) / "mesh.db")


def open_mesh(where: str | Path | None = None, begin: bool = True) -> Mesh:
    """The mesh at a path or a Ray address, made where there is none; without one, that of `default_mesh`. begin: "ray:local"
    starts a cluster where none runs."""
    where = str(where or default_mesh())
    if where == "none":
        raise MeshError("There is no mesh: --mesh (or ORGANISM_MESH) says none.")
    if where.startswith("ray:"):
        from swarm.ray_mesh import RayMesh

        return RayMesh(where, begin)
    return SQLiteMesh(where)


# --- Processes. ---


@functools.cache
def machine() -> str:
    """Where a process id means something: this boot of this machine, and this namespace of process ids."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    import platform

    return platform.node()


def start_time(pid: int) -> int | None:
    """When a process of this machine began, in clock ticks since boot; None where there is none (or it is a zombie).

    With the id, it names a process for ever: ids are used again (proc(5), /proc/PID/stat fields 3 and 22).
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
        return 0 if _exists(pid) else None  # elsewhere than on Linux
    fields = stat[stat.rindex(b")") + 2 :].split()
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def boot_clock() -> float:
    """Seconds since this machine was started: alike for all its processes, and nobody can set it."""
    clock = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    return time.clock_gettime(clock)


# --- The SQLite backend. ---

_BORN = """
CREATE TABLE organisms(id TEXT PRIMARY KEY, pid INTEGER NOT NULL, started INTEGER NOT NULL, machine TEXT NOT NULL,
                       home TEXT NOT NULL, stage TEXT, n_params INTEGER, syntropy REAL, entropy REAL,
                       last_heartbeat REAL NOT NULL, parent_id TEXT, status TEXT NOT NULL DEFAULT 'alive',
                       protocol INTEGER NOT NULL, facts TEXT NOT NULL, joined REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE blobs(id TEXT NOT NULL, name TEXT NOT NULL, data BLOB NOT NULL, PRIMARY KEY(id, name)) WITHOUT ROWID;
CREATE TABLE messages(id INTEGER PRIMARY KEY AUTOINCREMENT, from_id TEXT NOT NULL, to_id TEXT NOT NULL,
                      type TEXT NOT NULL, payload TEXT NOT NULL, ts REAL NOT NULL, taken INTEGER NOT NULL DEFAULT 0);
CREATE INDEX messages_to ON messages(to_id, taken, id);
CREATE TABLE offers(id INTEGER PRIMARY KEY AUTOINCREMENT, from_id TEXT NOT NULL, type TEXT NOT NULL,
                    payload BLOB NOT NULL, ts REAL NOT NULL);
CREATE TABLE claims(by_id TEXT NOT NULL, type TEXT NOT NULL, up_to INTEGER NOT NULL, PRIMARY KEY(by_id, type)) WITHOUT ROWID;
"""
_REPLIES = """
CREATE TABLE replies(client TEXT PRIMARY KEY, number INTEGER NOT NULL, method TEXT NOT NULL, reply TEXT NOT NULL,
                     ts REAL NOT NULL) WITHOUT ROWID;
"""
MIGRATIONS: list[tuple[str, str]] = [("m001_born", _BORN), ("m002_replies", _REPLIES)]  # append-only
_COLUMNS = ("stage", "n_params", "syntropy", "entropy")  # facts that have a column, for whoever opens the file


class SQLiteMesh(Mesh):
    """A mesh in one file; whoever can write the file belongs to it (its folder is made with mode 0700)."""

    pragmas: tuple[str, ...] = ("journal_mode = WAL", "synchronous = NORMAL", "wal_autocheckpoint = 4000")

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser().absolute()
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._gate = -1
        try:
            with self._troubles():
                self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._gate = os.open(f"{self.path}-gate", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                self._connection = self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> sqlite3.Connection:
        address = self.path.as_uri()
        connection = sqlite3.connect(address, uri=True, timeout=WAIT_SECONDS, isolation_level=None,
                                     check_same_thread=False, cached_statements=32)  # fmt: skip
        with self._at_the_gate():
            for pragma in self.pragmas:
                connection.execute(f"PRAGMA {pragma}").fetchall()
            connection.execute("PRAGMA cache_size = -512")  # KB; 32 organisms have one each
            self._migrate(connection)
        return connection

    def _migrate(self, connection: sqlite3.Connection) -> None:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if tables and "_migrations" not in tables:
            raise MeshError(f"{self.path} is a database, but not a mesh: choose another --mesh.")
        connection.execute("CREATE TABLE IF NOT EXISTS _migrations(name TEXT PRIMARY KEY, ts REAL NOT NULL)")
        done = {name for (name,) in connection.execute("SELECT name FROM _migrations")}
        if newer := sorted(done - {name for name, _ in MIGRATIONS}):
            raise MeshError(f"{self.path} was made by a newer organism ({newer[-1]}): update this one to join it.")
        for name, script in MIGRATIONS:
            if name not in done:
                note = f"INSERT INTO _migrations VALUES ('{name}', {time.time()});"
                connection.executescript(f"BEGIN IMMEDIATE;\n{script}\n{note}\nCOMMIT;")
                with contextlib.suppress(OSError):
                    self.path.chmod(0o600)

    @contextlib.contextmanager
    def _at_the_gate(self) -> Iterator[None]:
        """One writer at a time. The kernel queues them, so nobody polls; a process that ends leaves the gate."""
        import fcntl

        fcntl.flock(self._gate, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._gate, fcntl.LOCK_UN)

    @contextlib.contextmanager
    def _troubles(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            text = str(error) or type(error).__name__
            hint = "choose another --mesh, or --mesh none"
            if "full" in text or getattr(error, "errno", 0) == 28:
                hint = "free some space on its disk"
            elif "malformed" in text or "not a database" in text:
                hint = "remove the file, and the mesh makes a new one"
            raise MeshError(f"The mesh {self.path} cannot be used ({text}): {hint}.") from error

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction: all or nothing; within one, part of that."""
        with self._lock, self._troubles():
            connection = self._given()
            if connection.in_transaction:
                yield connection
                return
            with self._at_the_gate():
                connection.execute("BEGIN IMMEDIATE")
                try:
                    yield connection
                    connection.execute("COMMIT")
                except BaseException:
                    if connection.in_transaction:
                        connection.execute("ROLLBACK")
                    raise

    def _all(self, sql: str, *values: Any) -> list[tuple]:
        with self._lock, self._troubles():
            return self._given().execute(sql, values).fetchall()

    def _given(self) -> sqlite3.Connection:
        if self._connection is None:
            raise MeshError(f"The mesh {self.path} is closed.")
        return self._connection

    def close(self) -> None:
        with self._lock:
            if self._connection is not None:
                with contextlib.suppress(sqlite3.Error):
                    self._connection.close()
                self._connection = None
            if self._gate >= 0:
                os.close(self._gate)
                self._gate = -1

    # Who is there.

    def _enter(self, row: Row) -> None:
        facts = json.loads(row.facts)
        values = (*row[:5], row.beat, *row[7:10], time.time(), *(facts.get(name) for name in _COLUMNS))
        with self._writing() as connection:
            self._send_back(connection, "to_id = ? AND taken = 1", row.id)
            connection.execute(
                "INSERT INTO organisms(id, pid, started, machine, home, last_heartbeat, parent_id, protocol, facts, joined, "
                "stage, n_params, syntropy, entropy) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) "
                "ON CONFLICT(id) DO UPDATE SET pid = excluded.pid, started = excluded.started, machine = excluded.machine, "
                "home = excluded.home, last_heartbeat = excluded.last_heartbeat, status = 'alive', facts = excluded.facts, "
                "protocol = excluded.protocol, parent_id = coalesce(excluded.parent_id, parent_id), stage = excluded.stage, "
                "n_params = excluded.n_params, syntropy = excluded.syntropy, entropy = excluded.entropy",
                values,
            )
            self._clear_out(connection)

    def _send_back(self, connection: sqlite3.Connection, where: str, *values: Any) -> None:
        """Letters that nobody will settle any more return to their writers (but "undelivered" itself never does)."""
        lost = connection.execute(f"SELECT id, from_id, to_id, type FROM messages WHERE {where}", values).fetchall()
        for letter, sender, to, kind in lost:
            connection.execute("DELETE FROM messages WHERE id = ?", (letter,))
            if kind != "undelivered":
                told = json.dumps(dict(letter=letter, to=to, kind=kind))
                connection.execute(
                    "INSERT INTO messages(from_id, to_id, type, payload, ts) VALUES (?, ?, 'undelivered', ?, ?)",
                    (to, sender, told, time.time()),
                )

    def _clear_out(self, connection: sqlite3.Connection) -> None:
        """What nobody will ask for any more: letters to the long dead go back, old offers and graves are removed."""
        old = time.time() - KEEP_SECONDS
        self._send_back(connection, "ts < ?", old)
        connection.execute("DELETE FROM messages WHERE ts < ? AND type = 'undelivered'", (old - KEEP_SECONDS,))
        connection.execute("DELETE FROM offers WHERE ts < ?", (old,))
        connection.execute("DELETE FROM replies WHERE ts < ?", (old,))
        gone = "SELECT id FROM organisms WHERE status = 'dead' AND joined < ?"
        connection.execute(f"DELETE FROM blobs WHERE id IN ({gone})", (old,))
        connection.execute("DELETE FROM organisms WHERE status = 'dead' AND joined < ?", (old,))

    def _beat(self, id: str, clock: float, facts: str | None, blobs: dict[str, bytes]) -> None:
        with self._writing() as connection:
            if facts is None:
                connection.execute(
                    "UPDATE organisms SET last_heartbeat = ?, status = 'alive' WHERE id = ?", (clock, id)
                )
            else:
                told = json.loads(facts)
                connection.execute(
                    "UPDATE organisms SET last_heartbeat = ?, status = 'alive', facts = ?, stage = ?, n_params = ?, "
                    "syntropy = ?, entropy = ? WHERE id = ?",
                    (clock, facts, *(told.get(name) for name in _COLUMNS), id),
                )
            for name, data in blobs.items():
                connection.execute("INSERT OR REPLACE INTO blobs VALUES (?, ?, ?)", (id, name, data))

    def _leave(self, id: str, clock: float, status: str) -> None:
        with self._writing() as connection:
            self._send_back(connection, "to_id = ? AND taken = 1", id)
            connection.execute("UPDATE organisms SET status = ?, last_heartbeat = ? WHERE id = ?", (status, clock, id))

    def _rows(self, living: bool) -> list[Row]:
        where, now = " WHERE status = 'alive'" if living else "", boot_clock()
        rows = self._all(
            "SELECT id, pid, started, machine, home, status, last_heartbeat, parent_id, protocol, facts "
            f"FROM organisms{where} ORDER BY joined, id"
        )
        silence = lambda beat: now - beat if beat <= now else float("inf")  # of another boot: long ago
        return [Row._make((*row, silence(row[6]))) for row in rows]

    def _bury(self, died: list[tuple[str, int]]) -> None:
        with self._writing() as connection:
            for id, pid in died:
                changed = connection.execute(
                    "UPDATE organisms SET status = 'dead' WHERE id = ? AND pid = ? AND status = 'alive'", (id, pid)
                )
                if changed.rowcount:
                    self._send_back(connection, "to_id = ? AND taken = 1", id)

    def blob(self, id: str, name: str) -> bytes | None:
        return next((data for (data,) in self._all("SELECT data FROM blobs WHERE id = ? AND name = ?", id, name)), None)

    # Letters.

    def _post(self, sender: str, to: str, kind: str, text: str) -> int:
        with self._writing() as connection:
            cursor = connection.execute(
                "INSERT INTO messages(from_id, to_id, type, payload, ts) VALUES (?, ?, ?, ?, ?)",
                (sender, to, kind, text, time.time()),
            )
            return int(cursor.lastrowid or 0)

    def inbox(self, id: str, limit: int = 64) -> list[Letter]:
        waiting = "FROM messages WHERE to_id = ? AND taken = 0"
        if not self._all(f"SELECT 1 {waiting} LIMIT 1", id):  # most of the time: no need to write
            return []
        with self._writing() as connection:
            rows = connection.execute(
                f"SELECT id, from_id, to_id, type, payload {waiting} ORDER BY id LIMIT ?", (id, limit)
            ).fetchall()
            connection.executemany("UPDATE messages SET taken = 1 WHERE id = ?", [(row[0],) for row in rows])
        return [Letter(id, sender, to, kind, json.loads(text)) for id, sender, to, kind, text in rows]

    def waiting(self) -> dict[str, Mail]:
        quiet, now = ", ".join(f"'{kind}'" for kind in (*ANSWERS, *NEWS)), time.time()
        rows = self._all(
            f"SELECT to_id, max(type <> '{TEXTS}'), sum((type = '{TEXTS}') * length(CAST(payload AS BLOB))), "
            f"min(CASE type WHEN '{TEXTS}' THEN ts END) FROM messages WHERE taken = 0 AND type NOT IN ({quiet}) GROUP BY to_id"
        )
        return {
            id: Mail(bool(asks), size, max(0.0, now - oldest) if oldest else 0.0) for id, asks, size, oldest in rows
        }

    def settle(self, ids: Iterable[int]) -> None:
        with self._writing() as connection:
            connection.executemany("DELETE FROM messages WHERE id = ? AND taken = 1", [(i,) for i in ids])

    def withdraw(self, sender: str, ids: Iterable[int]) -> int:
        with self._writing() as connection:
            return sum(
                connection.execute(
                    "DELETE FROM messages WHERE id = ? AND from_id = ? AND taken = 0", (i, sender)
                ).rowcount
                for i in ids
            )

    # Offers.

    def _offer(self, sender: str, kind: str, payload: bytes) -> int:
        with self._writing() as connection:
            cursor = connection.execute(
                "INSERT INTO offers(from_id, type, payload, ts) VALUES (?, ?, ?, ?)",
                (sender, kind, payload, time.time()),
            )
            return int(cursor.lastrowid or 0)

    def claim(self, id: str, kind: str, limit: int = 8) -> list[Offer]:
        claimed = "coalesce((SELECT up_to FROM claims WHERE by_id = ? AND type = ?), 0)"
        new = f"FROM offers WHERE type = ? AND from_id <> ? AND id > {claimed}"
        if not self._all(f"SELECT 1 {new} LIMIT 1", kind, id, id, kind):
            return []
        with self._writing() as connection:
            rows = connection.execute(
                f"SELECT id, from_id, type, payload {new} ORDER BY id LIMIT ?", (kind, id, id, kind, limit)
            ).fetchall()
            if rows:
                connection.execute("INSERT OR REPLACE INTO claims VALUES (?, ?, ?)", (id, kind, rows[-1][0]))
        return [Offer(*row) for row in rows]


def _letter_text(payload: dict[str, Any]) -> str:
    """The payload as JSON, or the MeshError that says why not."""
    text = json.dumps(payload, ensure_ascii=False)
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > LETTER_BYTES:
        raise MeshError(
            f"A letter of {size:,} bytes is too long (at most {LETTER_BYTES:,}): send the path of a file instead."
        )
    return text
