"""It divides by itself and hibernates: alone, where its children are processes of its own, and in a colony.

Run alone: pytest -n 0 tests/swarm/test_mitosis.py
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from organism import Appetites, Organism, OrganismError
from swarm.colony import Colony, Supervisor
from swarm.family import Family
from swarm.member import Member
from swarm.mesh import SUPERVISOR, Mail, Mesh, open_mesh, start_time
from swarm.metabolism import Metabolism
from swarm.nursery import HIBERNATES
from swarm.rules import Bed

ROOT = Path(__file__).resolve().parents[2]
LESSON = "The old tower of Brumm stands on a green hill above the river Olse, and its keeper is called Maren Tolk.\n"


def until(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """Has read two books."""
    overrides = {"life.family": 2}
    with Organism(tmp_path_factory.mktemp("family") / "anna", seed=1, threads=1, overrides=overrides) as life:
        for number in range(2):
            life.learn_now(f"{LESSON}In the year {1700 + number} the bells rang {number} times.\n", f"book{number}")
        yield life


@pytest.fixture
def mesh(tmp_path):
    with open_mesh(tmp_path / "mesh.db") as opened:
        yield opened


def path_of(mesh: Mesh) -> str:
    return str(getattr(mesh, "path"))  # noqa: B009


# --- A child. ---


def test_a_child_appears_whole_and_inherits_bursts_and_cooldown(parent, tmp_path):
    facts = parent.bear(tmp_path / "child")
    record = json.loads((tmp_path / "child" / "birth.json").read_bytes())
    assert record["parent"] == parent.home.id and record["inherited"] == parent.syntropy.records
    assert time.time() - parent.syntropy.divided < 60, "the parent's cooldown begins"
    assert not list(tmp_path.glob(".tmp-*"))
    with Organism(tmp_path / "child", threads=1) as child:
        assert child.home.id == facts["id"] and child.published.body.stage == facts["stage"] == "infant"
        assert child.syntropy.records == parent.syntropy.records and child.syntropy.divided == record["born"]
        assert [row.source for row in child.memory.pending()] == ["book1"], "the newer half waits"
    notes = [row["note"] for row in parent.memory.rows("growth", "note")]
    assert f"mitosis:spawn:{facts['id']}" in notes


# --- Alone. ---


def test_a_lone_child_lives_in_its_own_process_within_the_limit_and_ends_with_its_parent(parent, mesh):
    mesh.register(str(parent.home.id), str(parent.home.path), {})
    said: list[str] = []
    family = Family(parent, path_of(mesh), said.append)
    family.divide()
    family.divide()  # while the first is being born: nothing
    until(lambda: any(peer.facts.get("answers") for peer in mesh.peers(living=True)))
    child = next(peer for peer in mesh.peers(living=True) if peer.facts.get("answers"))
    assert child.parent == parent.home.id and child.pid == family.children[0].process.pid
    assert (Path("/proc") / str(child.pid) / "fd" / "0").readlink() == Path("/dev/null")
    family.divide()
    until(lambda: len(said) == 2)
    assert "life.family is 2" in said[1] and parent.memory.events("undivided")[0].data["reason"] in said[1]
    family.end()
    assert start_time(child.pid) is None and [p.status for p in mesh.peers() if p.id == child.id] == ["asleep"]
    assert len(family.children) == 0
    with Organism(child.home, threads=1) as woken:
        assert woken.home.birth_record["parent"] == parent.home.id


def test_when_the_parent_is_killed_its_child_saves_itself_and_ends(parent, mesh, tmp_path):
    parent.bear(tmp_path / "child")
    program = (
        "import sys, time; from pathlib import Path; from swarm.family import Child;"
        "print(Child(Path(sys.argv[1]), sys.argv[2]).process.pid, flush=True); time.sleep(100)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "child"), path_of(mesh)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert holder.stdout
    pid = int(holder.stdout.readline())
    until(lambda: [peer.pid for peer in mesh.peers(living=True)] == [pid])
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    until(lambda: start_time(pid) is None)
    assert [peer.status for peer in mesh.peers()] == ["asleep"]


# --- Hibernation. ---


def run(member: Member) -> threading.Thread:
    thread = threading.Thread(target=member.run, daemon=True)
    thread.start()
    return thread


def test_in_a_chat_it_says_that_it_sleeps_and_a_letter_wakes_it(parent, mesh):
    said: list[str] = []
    member = Member(parent, path_of(mesh), say=said.append)
    parent.start()
    until(lambda: parent._learner is not None)
    thread = run(member)
    parent.proposal = "hibernate"
    until(lambda: bool(said))
    assert said[0].startswith("It sleeps") and parent._learner is None and parent._trainer_thread is None
    assert parent.memory.rows("growth", "note")[-1]["note"] == f"hibernate:{parent.home.id}"
    mesh.post("somebody", str(parent.home.id), "surprise", dict(text="hello"))
    until(lambda: parent._trainer_thread is not None)
    member.end()
    thread.join()
    parent.stop()


def test_in_a_colony_its_process_ends_and_what_waits_for_it_is_seen(parent, mesh):
    member = Member(parent, path_of(mesh), answers=True, supervised=True)
    thread = run(member)
    until(lambda: bool(mesh.peers(living=True)))
    parent.proposal = "hibernate"
    thread.join(60)
    assert member.hibernating and not thread.is_alive()
    (peer,) = mesh.peers()
    assert peer.status == "asleep" and peer.facts["hibernating"]
    assert mesh.waiting() == {}
    mesh.post("somebody", peer.id, "ask", dict(text="hello"))
    mesh.post("somebody", peer.id, "answer", dict(to=1))
    assert mesh.waiting() == {peer.id: Mail(True)}


# --- The supervisor. ---


@pytest.fixture
def supervisor(tmp_path, monkeypatch):
    """Of o1 and o2, with room for one more."""
    colony = Colony(tmp_path / "colony")
    for name in ("o1", "o2"):
        colony.home(name).mkdir(parents=True)
    return Supervisor(colony, dict(o1=None, o2=None), 3, None, print)


def test_it_keeps_a_place_for_one_child_and_refuses_the_next(supervisor):
    home = supervisor._place("o1")
    assert home == supervisor.colony.home("o1-child1") and supervisor._children() == []
    with pytest.raises(OrganismError, match="--max is 3"):
        supervisor._place("o2")
    home.mkdir()
    (home / "birth.json").write_text("{}")
    assert supervisor._children() == ["o1-child1"]


def test_it_refuses_strangers_and_memory_beyond_the_limit(supervisor):
    with pytest.raises(OrganismError, match="does not live"):
        supervisor._place("o9")
    supervisor.ram_gb = 0.05
    with pytest.raises(OrganismError, match="--ram"):
        supervisor._place("o1")


def test_it_wakes_whom_a_letter_waits_for_and_the_longest_asleep_when_a_core_is_idle(supervisor, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    now = time.monotonic()
    supervisor.beds, supervisor.rest = dict(o1=Bed(now - 10), o2=Bed(now - 100)), 60.0
    supervisor.called, supervisor.alive = dict(o1=Mail(True)), dict(o3=1, o4=2)
    assert supervisor._awaited() == ["o1"]
    supervisor.called = {}
    assert supervisor._awaited() == [], "every core has somebody"
    supervisor.alive = dict(o3=1)
    assert supervisor._awaited() == ["o2"]
    supervisor.rest = 1000.0
    assert supervisor._awaited() == []


def test_texts_wait_for_a_sleeper_and_longer_after_each_nap(supervisor, monkeypatch):
    supervisor.say, supervisor.patience, supervisor.alive = (lambda text: None), 600.0, dict.fromkeys("abcdefgh", 1)
    for naps in range(3):
        supervisor.homes["o1"], supervisor.started["o1"] = None, time.monotonic() - 20
        supervisor._ended("o1", HIBERNATES)
        assert supervisor.beds["o1"].naps == naps
        supervisor.called = dict(o1=Mail(False, 2000, 600.0 * 2**naps - 1))
        assert supervisor._awaited() == []
        supervisor.called = dict(o1=Mail(False, 2000, 600.0 * 2**naps))
        assert supervisor._awaited() == ["o1"]
        supervisor.left["o1"] = supervisor.beds.pop("o1")  # as `_look_about` does
    supervisor.homes["o1"], supervisor.started["o1"] = None, time.monotonic() - 3600
    supervisor._ended("o1", HIBERNATES)
    assert supervisor.beds["o1"].naps == 0, "it was awake for long"


def test_a_member_asks_the_supervisor_and_bears_the_child_where_it_is_told(parent, mesh, tmp_path):
    member = Member(parent, path_of(mesh), answers=True, supervised=True)
    thread = run(member)
    parent.proposal = "divide"
    letters = []
    until(lambda: bool(letters.extend(mesh.inbox(SUPERVISOR)) or letters))
    assert letters[0].kind == "divide" and letters[0].sender == parent.home.id
    mesh.post("somebody", letters[0].sender, "answer", dict(to=letters[0].id, home=str(tmp_path / "false")))
    mesh.post(SUPERVISOR, letters[0].sender, "answer", dict(to=letters[0].id, home=str(tmp_path / "true")))
    until(lambda: (tmp_path / "true" / "birth.json").exists())
    member.end()
    thread.join()
    assert not (tmp_path / "false").exists()


# --- Metabolism. ---


def test_the_supervisor_tells_who_is_awake_what_to_do_more_of_where_there_is_a_metabolism(supervisor, mesh):
    mesh.register("o1", "/nowhere", dict(answers=True, slope=None, spent=1.0, steps=8))
    mesh.register("chat", "/nowhere", dict(answers=False))
    assert supervisor.metabolism is None, "it is off by default"
    supervisor._feed(mesh)
    assert not mesh.inbox("o1")
    supervisor.metabolism = Metabolism()
    supervisor._feed(mesh)
    letters = mesh.inbox("o1")
    assert [letter.kind for letter in letters] == ["metabolism"] and not mesh.inbox("chat")
    assert set(letters[0].payload) == set(Appetites._fields)


def test_appetites_come_from_the_supervisor_alone_within_bounds(parent, mesh):
    member = Member(parent, path_of(mesh), answers=True, supervised=True)
    wanted = dict(learn=1.5, sleep=0.5, teach=99.0, divide=1.0, answer=1.0)
    with pytest.raises(OrganismError, match="supervisor"):
        member._fed("somebody", wanted)
    with pytest.raises(OrganismError, match="numbers"):
        member._fed(SUPERVISOR, wanted | dict(learn="all"))
    member._fed(SUPERVISOR, wanted)
    assert parent.appetites == Appetites(1.5, 0.5, 2.0, 1.0, 1.0)
    assert {"slope", "spent", "steps", "answered", "taught", "waiting"} <= set(member.facts())
    parent.appetites = Appetites()
