"""A mesh, whatever is behind it: who is there, letters that are handed out once, offers that each can claim once.

Run alone: pytest -n 0 tests/swarm/test_mesh.py
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm import mesh as mesh_module
from swarm.mesh import Mail, Mesh, MeshError, SQLiteMesh, open_mesh, start_time

ROOT = Path(__file__).resolve().parents[2]
BACKENDS = ["sqlite", "ray"]


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request) -> str:
    """ "sqlite", or "ray:" and the address of a cluster."""
    return "sqlite" if request.param == "sqlite" else f"ray:{request.getfixturevalue('cluster').address}"


@pytest.fixture
def where(backend, tmp_path):
    """The address of an empty mesh."""
    if backend == "sqlite":
        yield str(tmp_path / "mesh.db")
        return
    yield (address := f"{backend}{tmp_path}/mesh.db")
    open_mesh(address).dismiss()


@pytest.fixture
def mesh(where):
    with open_mesh(where) as opened:
        yield opened


def elsewhere(where: str, code: str) -> subprocess.Popen:
    """A process of its own that runs code with `mesh`, and then waits to be killed."""
    opened = f"import time\nfrom swarm.mesh import open_mesh\nmesh = open_mesh({where!r})"
    source = f"{opened}\n{code}\nprint('ready', flush=True)\ntime.sleep(60)"
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    process = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout and process.stdout.readline() == "ready\n"
    return process


# --- Who is there. ---


def test_whoever_registers_is_a_peer_with_what_it_said(mesh: Mesh):
    mesh.register("anna", "/homes/anna", dict(stage="embryo", syntropy=0.5), parent="eve")
    (peer,) = mesh.peers()
    assert (peer.id, peer.home, peer.status, peer.parent) == ("anna", "/homes/anna", "alive", "eve")
    assert peer.pid == os.getpid() and peer.facts["stage"] == "embryo" and peer.listens
    assert 0 <= peer.heartbeat_age_s < 5


def test_a_heartbeat_tells_what_has_changed(mesh: Mesh):
    mesh.register("anna", "", dict(stage="embryo"))
    mesh.heartbeat("anna", dict(stage="infant"), dict(gamma=b"\x01\x02"))
    mesh.heartbeat("anna")
    assert mesh.peers()[0].facts == dict(stage="infant") and mesh.blob("anna", "gamma") == b"\x01\x02"
    assert mesh.blob("anna", "summary") is None and mesh.blob("nobody", "gamma") is None


def test_who_leaves_is_asleep_and_who_returns_is_alive(mesh: Mesh):
    mesh.register("anna", "", {})
    mesh.leave("anna")
    assert mesh.peers()[0].status == "asleep" and mesh.peers(living=True) == []
    mesh.register("anna", "", {})
    assert mesh.peers()[0].status == "alive"


def test_a_killed_process_is_dead_at_once_although_its_row_says_alive(where, mesh: Mesh):
    process = elsewhere(where, "mesh.register('bert', '', {})")
    assert [p.status for p in mesh.peers()] == ["alive"]
    process.kill()
    process.wait()
    assert [p.status for p in mesh.peers()] == ["dead"] and mesh.peers(living=True) == []


def test_a_process_id_that_was_used_again_is_not_mistaken(mesh: Mesh, monkeypatch):
    mesh.register("anna", "", {})
    monkeypatch.setattr(mesh_module, "start_time", lambda pid: -1)  # somebody else has the number now
    assert mesh.peers()[0].status == "dead"


def test_a_stopped_process_is_alive_but_does_not_listen(mesh: Mesh, monkeypatch):
    mesh.register("anna", "", {})
    now = mesh_module.boot_clock()
    monkeypatch.setattr(mesh_module, "boot_clock", lambda: now + 60)
    peer = mesh.peers()[0]
    assert peer.status == "alive" and not peer.listens and peer.heartbeat_age_s >= 60


def test_a_wall_clock_that_jumps_kills_nobody(mesh: Mesh, monkeypatch):
    mesh.register("anna", "", {})
    real = time.time()
    for jump in (-86_400, 86_400 / 2):
        monkeypatch.setattr(time, "time", lambda jump=jump: real + jump)
        mesh.register("bert", "", {})
        assert [p.status for p in mesh.peers()] == ["alive", "alive"]


def test_a_zombie_counts_as_gone():
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert start_time(child.pid) is None and start_time(os.getpid())
    child.wait()


def test_a_peer_of_another_version_is_listed_but_does_not_listen(mesh: Mesh, monkeypatch):
    monkeypatch.setattr(mesh_module, "PROTOCOL", 99)
    mesh.register("future", "", {})
    monkeypatch.undo()
    assert mesh.peers()[0].status == "alive" and not mesh.peers()[0].listens


# --- Letters. ---


def test_letters_arrive_in_order_and_once(mesh: Mesh):
    for n in range(3):
        mesh.post("anna", "bert", "note", dict(n=n))
    assert [(letter.sender, letter.kind, letter.payload["n"]) for letter in mesh.inbox("bert", 2)] == [
        ("anna", "note", 0),
        ("anna", "note", 1),
    ]
    assert [letter.payload["n"] for letter in mesh.inbox("bert")] == [2] and mesh.inbox("bert") == []


@given(st.dictionaries(st.text(max_size=5), st.text(max_size=20) | st.integers() | st.none(), max_size=4))
def test_a_payload_arrives_as_it_was(payload):
    with SQLiteMesh(Path(os.environ["ORGANISM_HOME"]).parent / "payload.db") as mesh:
        payload = {k: v.encode("utf-8", "replace").decode() if isinstance(v, str) else v for k, v in payload.items()}
        mesh.post("anna", "bert", "note", payload)
        assert mesh.inbox("bert")[0].payload == payload


def test_a_letter_to_a_sleeper_waits(mesh: Mesh):
    mesh.register("bert", "", {})
    mesh.leave("bert")
    mesh.post("anna", "bert", "note", {})
    mesh.register("bert", "", {})
    assert len(mesh.inbox("bert")) == 1


def test_what_waits_for_whom_is_told_without_answers_and_news(mesh: Mesh):
    for kind in ("answer", "undelivered", "topology", "metabolism"):
        mesh.post("anna", "bert", kind, {})
    assert mesh.waiting() == {}
    size = len(json.dumps(dict(text="größer"), ensure_ascii=False).encode())
    for _ in range(2):
        mesh.post("anna", "bert", "learn", dict(text="größer"))
    mesh.post("anna", "carl", "ask", {})
    waiting = mesh.waiting()
    assert waiting["carl"] == Mail(True) and waiting["bert"][:2] == (False, 2 * size) and 0 <= waiting["bert"].age < 60
    mesh.post("anna", "bert", "ask", {})
    assert mesh.waiting()["bert"].asks
    mesh.inbox("bert")
    assert set(mesh.waiting()) == {"carl"}, "what was taken does not wait"


def test_what_was_taken_and_not_settled_before_a_death_comes_back_to_the_writer(where, mesh: Mesh):
    mesh.register("anna", "", {})
    settled, lost = mesh.post("anna", "bert", "ask", {}), mesh.post("anna", "bert", "ask", {})
    process = elsewhere(
        where, f"mesh.register('bert', '', {{}}); assert len(mesh.inbox('bert')) == 2; mesh.settle([{settled}])"
    )
    process.kill()
    process.wait()
    mesh.peers()
    (letter,) = mesh.inbox("anna")
    assert (letter.kind, letter.sender, letter.payload["letter"]) == ("undelivered", "bert", lost)


def test_a_letter_that_nobody_took_can_be_withdrawn(mesh: Mesh):
    first, second = mesh.post("anna", "bert", "ask", {}), mesh.post("anna", "bert", "ask", {})
    assert mesh.withdraw("anna", [first]) == 1 and mesh.withdraw("carl", [second]) == 0
    assert [letter.id for letter in mesh.inbox("bert")] == [second] and mesh.withdraw("anna", [second]) == 0


def test_a_letter_of_a_hundred_megabytes_is_refused_in_one_sentence(mesh: Mesh):
    with pytest.raises(MeshError, match=r"too long \(at most 1,048,576\): send the path"):
        mesh.post("anna", "bert", "note", dict(text="x" * 100_000_000))
    with pytest.raises(MeshError, match="too long"):
        mesh.offer("anna", "text", b"x" * 2_000_000)


# --- Offers. ---


def test_each_of_the_others_claims_an_offer_once(mesh: Mesh):
    mesh.offer("anna", "text", b"hello")
    assert mesh.claim("anna", "text") == []
    for reader in ("bert", "carl"):
        assert [(o.sender, o.payload) for o in mesh.claim(reader, "text")] == [("anna", b"hello")]
        assert mesh.claim(reader, "text") == [] and mesh.claim(reader, "gamma") == []


# --- Many at once. ---


def write_much(where: str, k: int, failures) -> None:
    try:
        with open_mesh(where) as mesh:
            mesh.register(f"o{k}", "", {})
            for n in range(25):
                mesh.heartbeat(f"o{k}", dict(syntropy=n))
                mesh.post(f"o{k}", "all", "note", dict(k=k, n=n))
                mesh.settle([letter.id for letter in mesh.inbox("all", 1)])
    except Exception as error:
        failures.put(repr(error))


def test_thirty_two_writers_lose_nothing_and_are_never_locked_out(where):
    """Processes; for Ray, which takes a second to join and cannot be forked, threads with a mesh each."""
    context = multiprocessing.get_context("fork")
    kind = threading.Thread if where.startswith("ray:") else context.Process
    failures = context.Queue()
    writers = [kind(target=write_much, args=(where, k, failures)) for k in range(32)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert failures.empty(), failures.get()
    with open_mesh(where) as mesh:
        assert (
            len(mesh.peers()) == 32 and len(mesh.inbox("all", 10_000)) == 0
        )  # one was taken for each that was written


# --- Only with Ray: the mesh itself is killed. ---


def correspond(where: str, stop: threading.Event, posted: list[int], taken: list[int]) -> list[threading.Thread]:
    """Somebody who writes letters without end, and somebody who takes them."""

    def write() -> None:
        with open_mesh(where) as mesh:
            for n in count():
                if stop.is_set():
                    return
                mesh.post("anna", "bert", "note", dict(n=n))
                posted.append(n)

    def read() -> None:
        with open_mesh(where) as mesh:
            last = False
            while not last:
                last = stop.is_set() and not writer.is_alive()
                letters = mesh.inbox("bert", 5)
                taken.extend(letter.payload["n"] for letter in letters)
                mesh.settle([letter.id for letter in letters])
                last = last and not letters

    writer, reader = threading.Thread(target=write), threading.Thread(target=read)
    writer.start()
    reader.start()
    return [writer, reader]


def test_the_actor_is_killed_again_and_again_and_each_letter_arrives_once(cluster, tmp_path):
    where = f"ray:{cluster.address}{tmp_path}/mesh.db"
    stop, posted, taken = threading.Event(), [], []
    with open_mesh(where) as mesh:
        threads = correspond(where, stop, posted, taken)
        killed = set()
        for _ in range(3):
            before = len(taken)
            _, pid = mesh.place()
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)
            wait_for(lambda before=before: len(taken) > before + 50)
        stop.set()
        for thread in threads:
            thread.join(60)
        assert len(killed) == 3 and posted == list(range(len(posted))) and taken == posted
        mesh.dismiss()


def test_the_node_of_the_mesh_is_killed_and_each_letter_arrives_once(cluster, add_node, tmp_path):
    node = add_node()
    for n in range(30):  # Ray chooses the node
        where = f"ray:{cluster.address}{tmp_path}/mesh{n}.db"
        mesh = open_mesh(where)
        if mesh.place()[0] == node.node_id:
            break
        mesh.dismiss()
    mesh.register("anna", "", {})
    first = mesh.post("anna", "carl", "note", dict(text="before"))
    stop, posted, taken = threading.Event(), [], []
    threads = correspond(where, stop, posted, taken)
    wait_for(lambda: len(taken) > 50)
    cluster.remove_node(node, allow_graceful=False)
    wait_for(lambda: mesh.place()[0] == cluster.head_node.node_id)
    before = len(taken)
    wait_for(lambda: len(taken) > before + 50)
    stop.set()
    for thread in threads:
        thread.join(60)
    assert posted == list(range(len(posted))) and taken == posted
    assert [peer.id for peer in mesh.peers(living=True)] == ["anna"]
    assert [letter.id for letter in mesh.inbox("carl")] == [first] and mesh.inbox("carl") == []
    mesh.dismiss()


def wait_for(condition, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


# --- What only a file can go through. ---


def test_a_writer_killed_within_a_transaction_blocks_nobody(tmp_path):
    where = str(tmp_path / "mesh.db")
    process = elsewhere(where, 'gate = mesh._writing(); gate.__enter__().execute("DELETE FROM organisms")')
    with open_mesh_later(process, where) as mesh:
        mesh.register("anna", "", {})
        assert len(mesh.peers()) == 1


def open_mesh_later(process: subprocess.Popen, where: str) -> Mesh:
    """Opened after the process, which holds the lock, was killed."""
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return open_mesh(where)


def test_a_newer_mesh_another_database_and_a_broken_file_are_refused_in_one_sentence(tmp_path):
    with open_mesh(tmp_path / "newer.db"):
        pass
    connection = sqlite3.connect(tmp_path / "newer.db")
    connection.execute("INSERT INTO _migrations VALUES ('m999_future', 0)")
    connection.commit()
    other = sqlite3.connect(tmp_path / "other.db")
    other.execute("CREATE TABLE t(x)")
    (tmp_path / "broken.db").write_bytes(b"not a database" * 1000)
    for name, sentence in (("newer", "newer organism"), ("other", "not a mesh"), ("broken", "remove the file")):
        with pytest.raises(MeshError, match=sentence):
            open_mesh(tmp_path / f"{name}.db")


def test_no_mesh_is_said(monkeypatch):
    monkeypatch.setenv("ORGANISM_MESH", "none")
    with pytest.raises(MeshError, match="There is no mesh"):
        open_mesh()


def test_the_file_is_for_its_user_only(tmp_path):
    with open_mesh(tmp_path / "folder" / "mesh.db"):
        assert (tmp_path / "folder").stat().st_mode & 0o77 == 0
        assert (tmp_path / "folder" / "mesh.db").stat().st_mode & 0o77 == 0
