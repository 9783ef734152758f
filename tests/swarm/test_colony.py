"""A colony from the command line: it wakes, answers, tells the truth about the dead, and leaves no orphan.

Run alone: pytest -n 0 tests/swarm/test_colony.py
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import pytest

from organism import UsageError
from swarm.colony import Colony, corpora_of, names_of
from swarm.commands import sparkline
from swarm.mesh import open_mesh, start_time
from swarm.thinking import Correspondent

ROOT = Path(__file__).resolve().parents[2]


def organism(*arguments: str, check: bool = True) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "organism.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=check)


def until(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def alive(colony: Colony) -> list[dict]:
    return [row for row in colony.status() if row["status"] == "alive"]


@pytest.fixture(scope="module")
def colony(tmp_path_factory):
    """Three organisms, one of which has read about a tower; brought down at the end, whatever happened."""
    folder = tmp_path_factory.mktemp("colony") / "three"
    corpus = folder.parent / "tower.txt"
    corpus.write_text("The old tower of Brumm stands on a green hill above the river Olse. " * 3 + "\n")
    command = [
        sys.executable,
        str(ROOT / "organism.py"),
        "swarm",
        "up",
        "-n",
        "3",
        "--home",
        str(folder),
        "--corpus",
        f"t={corpus}",
    ]
    supervisor = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    colony = Colony(folder)
    until(lambda: len(alive(colony)) == 3)
    yield colony
    if supervisor.poll() is None:
        supervisor.send_signal(signal.SIGINT)
        supervisor.wait(60)
    assert not alive(colony)


def test_status_names_each_with_stage_process_and_heartbeat(colony: Colony):
    told = json.loads(organism("swarm", "status", "--json", "--home", str(colony.folder)).stdout)
    assert sorted(row["name"] for row in told["organisms"]) == ["o1", "o2", "t"]
    for row in told["organisms"]:
        assert row["status"] == "alive" and row["stage"] == "embryo" and start_time(row["pid"])
        assert row["heartbeat_age_s"] < 10
    assert set(told) == {"organisms", "coherence", "resonances", "outliers"}
    assert [p.name for p in (colony.folder / "homes").iterdir() if (p / "birth.json").exists()]


def test_a_question_is_answered_by_whom_it_surprises_least(colony: Colony):
    told = json.loads(organism("swarm", "ask", "Where do you live?", "--json", "--home", str(colony.folder)).stdout)
    assert told["text"] and told["source"] == "peer" and told["bits_per_byte"] == min(told["surprises"].values())
    assert len(told["surprises"]) == 3 and told["id"] in told["surprises"]


def test_all_answer_as_one_byte_by_byte(colony: Colony):
    command = (
        "swarm",
        "ask",
        "Where do you live?",
        "--ensemble",
        "--seed",
        "1",
        "--json",
        "--home",
        str(colony.folder),
    )
    told = json.loads(organism(*command).stdout)
    assert told["text"] and told["source"] == "ensemble" and 0 < told["bits_per_byte"] < 4
    assert len(told["shares"]) == 3 and abs(sum(told["shares"].values()) - 1) < 0.01


def test_a_letter_that_makes_no_sense_gets_an_error_and_harms_nobody(colony: Colony):
    with open_mesh(colony.mesh_path) as mesh, Correspondent(mesh) as me:
        peer = alive(colony)[0]["id"]
        letters = {me.send(peer, "surprise", text=7), me.send(peer, "ask"), me.send(peer, "dance", text="")}
        answers = me.answers(letters, 30)
        assert set(answers) == letters and all("error" in letter.payload for letter in answers.values())
    assert len(alive(colony)) == 3


def test_a_second_supervisor_is_told_who_is_there(colony: Colony):
    told = organism("swarm", "up", "-n", "3", "--home", str(colony.folder), check=False)
    assert told.returncode == 1 and f"supervised by process {colony.supervisor()} already" in told.stderr


def test_the_killed_are_dead_at_once_and_start_again(colony: Colony):
    victims = {row["pid"] for row in alive(colony)[:2]}
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    until(lambda: all(start_time(pid) is None for pid in victims), 1)
    assert not victims & {row["pid"] for row in alive(colony)}
    until(lambda: len(alive(colony)) == 3)


def test_when_the_supervisor_is_killed_nobody_is_an_orphan(colony: Colony):
    pids = [row["pid"] for row in alive(colony)]
    os.kill(int(colony.supervisor() or 0), signal.SIGKILL)
    until(lambda: all(start_time(pid) is None for pid in pids))
    assert {row["status"] for row in colony.status()} == {"asleep"} and colony.supervisor() is None
    assert organism("swarm", "down", "--json", "--home", str(colony.folder)).stdout == '{"ended": 0}\n'


# --- What needs no processes. ---


def test_a_colony_whose_folder_is_deleted_ends(tmp_path):
    """Nobody could reach it any more, or bring it down."""
    command = [sys.executable, str(ROOT / "organism.py"), "swarm", "up", "-n", "1", "--home", str(tmp_path / "lost")]
    supervisor = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        until(lambda: len(alive(Colony(tmp_path / "lost"))) == 1)
        (pid,) = (row["pid"] for row in alive(Colony(tmp_path / "lost")))
        shutil.rmtree(tmp_path / "lost")
        _, said = supervisor.communicate(timeout=90)
    finally:
        supervisor.kill()
    assert "moved, deleted or taken over" in said and "Traceback" not in said
    assert start_time(pid) is None and not (tmp_path / "lost").exists(), "and the organism with it, leaving nothing"


def test_where_nothing_runs_status_is_empty_and_asking_fails_in_one_sentence(tmp_path):
    told = organism("swarm", "status", "--json", "--home", str(tmp_path / "none"))
    assert json.loads(told.stdout)["organisms"] == [] and not (tmp_path / "none").exists()
    asked = organism("swarm", "ask", "hello", "--home", str(tmp_path / "none"), check=False)
    assert asked.returncode == 1 and "There is no colony" in asked.stderr
    unsaid = organism("swarm", "up", "--home", str(tmp_path / "none"), check=False)
    assert unsaid.returncode == 2 and "How many?" in unsaid.stderr


def test_who_lives_is_who_was_there_and_newborns_up_to_the_number():
    assert names_of(3, [("bible", "/b")], ["o1"], 64) == {"bible": "/b", "o1": None, "o2": None}
    assert names_of(0, [("bible", "/b")], [], 64) == {"bible": "/b"}
    with pytest.raises(UsageError, match="more than --max 2"):
        names_of(3, [], [], 2)


def test_a_corpus_is_a_name_and_a_path(tmp_path):
    for wrong in ("bible", "a/b=c", f"bible={tmp_path}/nothing"):
        with pytest.raises(UsageError):
            corpora_of([wrong])


def test_a_sparkline_goes_from_lowest_to_highest():
    assert sparkline(deque([1.0, 2.0, 3.0])) == "▁▄█" and sparkline(deque([1.0])) == "▁"
