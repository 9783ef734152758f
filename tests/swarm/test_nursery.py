"""Who learns at a time, in a colony.

Run alone: pytest -n 0 tests/swarm/test_nursery.py
"""

from __future__ import annotations

import threading
import time

from swarm.nursery import Turnstile


def test_as_many_learn_at_a_time_as_there_are_places(tmp_path):
    gate, stop = Turnstile(tmp_path, 2), threading.Event()
    inside, most = 0, 0
    lock = threading.Lock()

    def learn() -> None:
        nonlocal inside, most
        with gate.turn(stop):
            with lock:
                inside += 1
                most = max(most, inside)
            time.sleep(0.03)
            with lock:
                inside -= 1

    learners = [threading.Thread(target=learn) for _ in range(6)]
    for one in learners:
        one.start()
    for one in learners:
        one.join(20)
    assert most == 2 and inside == 0


def test_who_shall_stop_does_not_wait_and_a_lost_folder_keeps_nobody_from_learning(tmp_path):
    gate, stop, learned = Turnstile(tmp_path, 1), threading.Event(), []
    with gate.turn(stop):
        stop.set()
        with gate.turn(stop):
            learned.append("who shall stop")
    with Turnstile(tmp_path / "nowhere", 1).turn(threading.Event()):
        learned.append("without a folder")
    assert learned == ["who shall stop", "without a folder"]
