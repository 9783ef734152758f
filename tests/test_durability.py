"""Nothing acknowledged is lost: `kill -9` at random instants of chat and training.

pytest tests/test_durability.py                 a few kills
pytest tests/test_durability.py -m soak         one hundred (make soak)
"""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import organism as o

PROGRAM = str(Path(o.__file__).resolve())


def start(home, *arguments, **pipes):
    environment = dict(
        os.environ, ORGANISM_HOME=str(home), ORGANISM_LEARNING_COOLDOWN="0", ORGANISM_LIFE_CHECKPOINT_SECONDS="2"
    )
    return subprocess.Popen([sys.executable, PROGRAM, *arguments], env=environment, stderr=subprocess.DEVNULL, **pipes)


def chat_until_killed(home, rng, said):
    """Talk until the process is killed at a random instant; appends every acknowledged message to `said`."""
    child = start(home, "chat", "--json", stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    killer = threading.Timer(rng.uniform(0.3, 5.0), child.kill)
    killer.start()
    try:
        for n in range(10_000):
            message = f"Message {len(said)} of run {rng.random():.12f}, number {n}."
            child.stdin.write(message + "\n")
            child.stdin.flush()
            if not json.loads(child.stdout.readline() or "{}"):
                break
            said.append(message)
    except (BrokenPipeError, json.JSONDecodeError):
        pass
    finally:
        killer.cancel()
        child.kill()
        child.wait()
        child.stdout.close()
        try:
            child.stdin.close()
        except BrokenPipeError:
            pass


def train_until_killed(home, rng, corpus):
    child = start(home, "train", "--corpus", str(corpus), "--seconds", "60", "--save-every", "3", "--batch", "4", "--json", "--quiet",
                  stdout=subprocess.DEVNULL)  # fmt: skip
    time.sleep(rng.uniform(0.3, 5.0))
    child.send_signal(signal.SIGKILL)
    child.wait()


def check(home, said):
    """It wakes, the generation passes its checksums, every acknowledged message is there."""
    if not (Path(home) / "body" / "CURRENT").exists():
        assert not said
        return
    with o.Organism(home, read_only=True, kernels="off") as life:
        stored = {m.text for m in life.memory.messages() if m.role == "user"}
        assert not [m for m in said if m not in stored]
        generation = life.home.latest(verify=True)
        assert generation is not None and generation.number == life.published.number
        assert life.memory.lived_bytes() > 0


def torture(tmp_path, kills, seed):
    rng, home, said = random.Random(seed), tmp_path / "home", []
    corpus = tmp_path / "corpus.txt"
    corpus.write_bytes(b"".join(p.read_bytes() for p in sorted(Path(os.__file__).parent.glob("a*.py"))))
    for n in range(kills):
        if n % 3 == 2:
            train_until_killed(home, rng, corpus)
        else:
            chat_until_killed(home, rng, said)
        check(home, said)
    with o.Organism(home, kernels="off") as life:  # and it lives on
        _ = life.say("Are you still there?").text
    assert said


def test_it_survives_being_killed(tmp_path):
    torture(tmp_path, 4, seed=1)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(4))
def test_it_survives_being_killed_a_hundred_times(tmp_path, seed):
    torture(tmp_path, 25, seed=100 + seed)
