"""A colony on a Ray cluster of two nodes, from the command line: it spreads, survives the loss of a node, and comes home.

Run alone: pytest -n 0 tests/swarm/test_wards.py
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from organism import OrganismError, UsageError
from swarm.colony import Colony, Supervisor, mesh_address
from swarm.commands import run_up
from swarm.mesh import start_time
from swarm.ray_mesh import membership
from swarm.wards import EMBRYO_MB, Here, Ward, WardActor, proportional_mb

ROOT = Path(__file__).resolve().parents[2]


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "organism.py"), "swarm", *arguments]


def organism(*arguments: str, check: bool = True) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=600, check=check)


def until(condition, seconds: float = 90.0) -> None:
    for _ in range(int(seconds / 0.1)):  # of its own time: a machine that is paused is no failure
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("waited in vain")


def alive(colony: Colony) -> dict[str, int]:
    """Process ids by name."""
    return {row["name"]: row["pid"] for row in colony.status() if row["status"] == "alive"}


def family(pid: int) -> set[int]:
    """A process and all that it and its children started."""
    found = {pid}
    for thread in Path(f"/proc/{pid}/task").glob("*"):
        for child in (thread / "children").read_text().split():
            found |= family(int(child))
    return found


def processes(node) -> set[int]:
    """All that run on a node of the cluster."""
    return family(node.all_processes["raylet"][0].process.pid)


# --- On two nodes. ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("colony") / "four"


@pytest.fixture
def colony(cluster, add_node, folder):
    """Four organisms on two nodes; the second node, and the supervisor, are there for one test."""
    second = add_node()
    colony = Colony(folder)
    up = command("up", "-n", "4", "--home", str(folder), "--ray", cluster.address)
    with open(folder.parent / "said", "w") as said:
        supervisor = subprocess.Popen(up, stderr=said)
    try:
        until(lambda: len(alive(colony)) == 4)
        yield colony, supervisor, second
    finally:
        supervisor.send_signal(signal.SIGINT)
        supervisor.wait(600)


def test_it_spreads_answers_and_outlives_the_loss_of_a_node(colony, cluster, folder):
    colony, supervisor, second = colony
    before, there = alive(colony), processes(second)
    lost = {name for name, pid in before.items() if pid in there}
    assert len(lost) == 2, "two live on each node"
    told = json.loads(organism("ask", "Where do you live?", "--home", str(folder), "--json").stdout)
    assert told["text"] and len(told["surprises"]) == 4
    ids = {
        row["name"]: row["id"]
        for row in json.loads(organism("status", "--home", str(folder), "--json").stdout)["organisms"]
    }
    for pid in there:  # the current is cut
        os.kill(pid, signal.SIGKILL)
    cluster.remove_node(second, allow_graceful=False)
    until(lambda: all(start_time(pid) is None for pid in there))
    until(lambda: len(now := alive(colony)) == 4 and not set(now.values()) & there)
    after = alive(colony)
    assert {name for name in after if after[name] != before[name]} == lost
    assert {row["name"]: row["id"] for row in colony.status()} == ids, "nobody was born anew"
    assert set(after.values()) <= processes(cluster.head_node)
    assert "o1" in organism("map", "--home", str(folder)).stdout
    assert organism("down", "--home", str(folder), "--json").stdout == '{"ended": 4}\n'
    assert supervisor.wait(600) == 0
    assert {row["status"] for row in colony.status()} == {"asleep"} and not colony.ray_path.exists()


def test_when_its_supervisor_is_killed_nobody_on_any_node_is_an_orphan(colony, folder):
    colony, supervisor, _ = colony
    pids = set(alive(colony).values())
    supervisor.kill()
    until(lambda: all(start_time(pid) is None for pid in pids))
    assert {row["status"] for row in colony.status()} == {"asleep"}
    assert organism("down", "--home", str(folder), "--json").stdout == '{"ended": 0}\n'
    colony.move_home()
    assert {row["status"] for row in colony.status()} == {"asleep"}, "its mesh is a file again"


def test_from_another_machine_the_supervisor_is_told_by_letter_to_bring_all_down(colony, monkeypatch):
    colony, supervisor, _ = colony
    monkeypatch.setattr("swarm.colony.machine", lambda: "another")
    assert colony.supervisor() is None
    assert colony.down() == 4 and supervisor.wait(600) == 0


# --- What needs no cluster. ---


class Asking:
    """What a command is asked with, as far as `swarm up` looks at it."""

    quiet, home = True, None

    def note(self, text: str) -> None: ...


def up(ray: str, home: Path) -> None:
    asking = Asking()
    asking.home = str(home)
    run_up(asking, 1, (), None, None, False, False, ray)


def test_a_cluster_that_is_none_is_said_and_nothing_is_left_behind(tmp_path, monkeypatch):
    for wrong in ("head", "http://head:1", "head:x", "ray:local"):
        with pytest.raises(UsageError, match="no address of a Ray cluster"):
            up(wrong, tmp_path / "colony")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(OrganismError, match=r"needs ray, which is not installed: pip install -e '\.\[swarm\]'"):
        up("127.0.0.1:1", tmp_path / "colony")
    assert not (tmp_path / "colony").exists()


def test_a_cluster_that_does_not_answer_is_said_and_the_colony_stays_at_home(tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[swarm]'")
    membership.leave()
    with pytest.raises(OrganismError, match="cannot be joined"):
        up("127.0.0.1:1", tmp_path)
    assert Colony(tmp_path).status() == [] and not Colony(tmp_path).ray_path.exists()


def test_a_node_that_does_not_share_the_folder_takes_nobody(tmp_path):
    (tmp_path / "colony.lock").write_text("1 2 elsewhere\n")
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(OrganismError, match="must share the colony's folder"):
            asyncio.run(WardActor().open(str(folder), "7 8 here\n"))


def test_the_address_of_its_mesh_is_that_of_the_cluster_and_the_file():
    path = Path("/shared/colony/mesh.db")
    assert mesh_address("local", path) == "ray:local/shared/colony/mesh.db"
    assert mesh_address("head:6379", path) == "ray:head:6379/shared/colony/mesh.db"
    assert mesh_address("ray://head:10001", path) == "ray://head:10001/shared/colony/mesh.db"


class Room(Ward):
    """A ward that only remembers whom it was told to start."""

    def __init__(self, name: str, cores: int):
        super().__init__()
        self.name = self.place = name
        self.cores, self.told = cores, []

    async def tell(self, order):
        self.told.append(order["start"])


def test_newcomers_are_started_where_fewest_live_for_each_core(tmp_path):
    supervisor = Supervisor(Colony(tmp_path), dict.fromkeys("abcdef"), 9, None, print)
    small, large = Room("small", 1), Room("large", 2)
    supervisor.wards = [small, large]

    async def life() -> None:
        for name in "abcdef":
            await supervisor._start(name)
        assert len(small.told) == 2 and len(large.told) == 4
        supervisor.wards = [small]
        supervisor._lost(large)
        await asyncio.gather(*supervisor.tasks)

    asyncio.run(life())
    assert sorted(small.told) == list("abcdef") and set(supervisor.homes.values()) == {small}


def test_a_ward_tells_what_became_of_whom_and_ends_when_it_is_closed(tmp_path):
    async def life() -> list[dict]:
        ward, heard = Here(Colony(tmp_path)).ward("this machine"), []
        await ward.open()
        while (told := await ward.hear()) is not None:
            heard.append(told)
            if "ready" in told:
                await ward.tell(
                    dict(start="o1", home=str(tmp_path / "o1"), mesh=str(tmp_path / "mesh.db"), corpus=None)
                )
            elif "started" in told:
                assert ward.memory_mb([told["pid"]]) >= EMBRYO_MB and proportional_mb(os.getpid()) > 1
                await ward.close()
        return heard

    ready, started, ended = asyncio.run(life())
    assert ready == dict(ready=True) and started["started"] == ended["ended"] == "o1" and started["pid"] == ended["pid"]
