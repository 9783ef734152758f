"""Chats that find each other in a mesh, with no supervisor.

Run alone: pytest -n 0 tests/swarm/test_member.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import organism
from organism import Organism
from swarm.member import Member
from swarm.mesh import open_mesh
from swarm.thinking import Correspondent

ROOT = Path(__file__).resolve().parents[2]


def chat(home: Path, mesh: str) -> subprocess.Popen:
    command = [
        sys.executable,
        str(ROOT / "organism.py"),
        "chat",
        "--json",
        "--quiet",
        "--home",
        str(home),
        "--mesh",
        mesh,
    ]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def tell(process: subprocess.Popen, line: str) -> dict:
    assert process.stdin and process.stdout
    process.stdin.write(f"{line}\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


@pytest.fixture
def two(tmp_path):
    """Two chats in one mesh, and the path of it."""
    where = str(tmp_path / "mesh.db")
    chats = [chat(tmp_path / name, where) for name in ("anna", "bert")]
    yield chats, where
    for one in chats:
        one.communicate(timeout=60)


def test_two_chats_find_each_other_say_how_surprised_they_are_and_leave(two):
    chats, where = two
    for one in chats:
        assert tell(one, "hello")["text"]
    end = time.monotonic() + 30
    while tell(chats[0], "/status")["status"]["mesh"]["peers"] != 1:
        assert time.monotonic() < end
        time.sleep(0.2)
    with open_mesh(where) as mesh, Correspondent(mesh) as me:
        peers = mesh.peers(living=True)
        assert len(peers) == 2 and not any(peer.facts["answers"] for peer in peers)
        assert all(isinstance(peer.facts["syntropy"], float) and "entropy" in peer.facts for peer in peers)
        asked = {me.send(peer.id, "surprise", text="Where do you live?") for peer in peers}
        answers = me.answers(asked, 20)
        assert all(0 < letter.payload["bits_per_byte"] < 8 for letter in answers.values()) and len(answers) == 2
        for one in chats:
            tell(one, "/quit")
            one.wait(60)
        assert [peer.status for peer in mesh.peers()] == ["asleep", "asleep"]


def test_mesh_none_joins_nothing(tmp_path):
    one = chat(tmp_path / "anna", "none")
    tell(one, "hello")
    time.sleep(1.5)
    assert tell(one, "/status")["status"]["mesh"] == dict(peers=0)
    one.communicate(timeout=60)
    assert not list(tmp_path.rglob("mesh.db"))


def test_a_mesh_that_cannot_be_used_is_said_once_and_the_chat_goes_on(tmp_path):
    (tmp_path / "mesh.db").write_bytes(b"nothing of the kind" * 999)
    command = [sys.executable, str(ROOT / "organism.py"), "chat", "--json", "--home", str(tmp_path / "anna")]
    one = subprocess.Popen(
        [*command, "--mesh", str(tmp_path / "mesh.db")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert tell(one, "hello")["text"]
    time.sleep(4)
    assert tell(one, "again")["text"]
    _, errors = one.communicate(timeout=60)
    assert errors.count("cannot be used") == 1 and "Traceback" not in errors


def test_a_chat_that_ends_while_it_joins_ends(tmp_path, monkeypatch):
    joins, left = threading.Event(), threading.Event()

    class Slow(Member):
        def __init__(self, *given, **named):
            joins.set()
            left.wait(1)
            super().__init__(*given, **named)

    monkeypatch.setattr("swarm.member.Member", Slow)
    monkeypatch.setattr(organism, "MESH_DELAY", 0.0)

    def brief_chat() -> None:
        with Organism(tmp_path / "home") as life, organism._among_peers(life, str(tmp_path / "mesh.db")):
            joins.wait(10)
        left.set()

    threading.Thread(target=brief_chat, daemon=True).start()
    assert joins.wait(30) and left.wait(30)
    with open_mesh(str(tmp_path / "mesh.db")) as mesh:
        assert not mesh.peers(living=True)
