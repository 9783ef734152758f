"""Steps that workers of a Ray cluster share: the losses are those of one, also when a worker's node is lost.

Run alone: pytest -n 0 tests/swarm/test_workers.py
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_body import CONTEXT, LEARNING, V, windows

import organism as o

ROOT = Path(__file__).resolve().parents[2]
STEPS = 10


@pytest.fixture
def shared(cluster, add_node):
    """Settings by which two workers, one on each of two nodes, share each step; and the second node."""
    pytest.importorskip("torch", reason="PyTorch is not installed: pip install -e '.[torch]'")
    node = add_node()
    yield dataclasses.replace(LEARNING, engine="torch", ray=cluster.address, workers=2), node
    from swarm import workers

    workers.crew(cluster.address, 2, None).disband()
    workers.crew.cache_clear()


def course(learning: o.LearningConfig, between=lambda step: None, field: bool = True) -> tuple[np.ndarray, o.Body]:
    """Losses of a child's first steps, each on five windows of its own, and the child."""
    body = o.Body("child", V, o.BodyConfig(field=field, context=CONTEXT), 1)
    trainer, losses = o.Trainer(body, learning, engine="torch", threads=None if learning.ray else 1, seed=9), []
    x, y, view = windows(field, 8, CONTEXT)
    for n in range(STEPS):
        between(n)
        order = np.random.default_rng(n).permutation(8)[:5]
        rows = (order[:, None] * CONTEXT + np.arange(CONTEXT)).ravel()
        seen = None if view is None else view.take(rows)
        losses.append(trainer.step(x[order], y[order], seen, o.learning_rate(n, learning)))
    trainer.close()
    return np.array(losses), body


def assert_alike(body: o.Body, other: o.Body) -> None:
    assert body.steps == other.steps == STEPS
    for name in o.Arena.ARRAYS:
        mine, its = getattr(body.arena, name), getattr(other.arena, name)
        assert np.linalg.norm(mine - its) < 1e-3 * np.linalg.norm(its), name


def test_two_workers_have_the_losses_of_one_and_outlive_the_loss_of_a_node(shared, cluster):
    learning, node = shared
    wanted, reference = course(LEARNING)
    losses, body = course(learning)
    assert np.abs(losses - wanted).max() < 1e-4
    assert_alike(body, reference)
    from swarm.workers import crew

    nodes = {
        place
        for place, _ in (
            o.organ("workers").the_ray().get(w.place.remote()) for w in crew(cluster.address, 2, None).workers
        )
    }
    assert nodes == {node.node_id, cluster.head_node.node_id}, "one on each node"

    def cut(step: int) -> None:
        if step == STEPS // 2:
            raylet = node.all_processes["raylet"][0].process.pid
            for pid in map(int, Path(f"/proc/{raylet}/task/{raylet}/children").read_text().split()):
                os.kill(pid, signal.SIGKILL)
            cluster.remove_node(node, allow_graceful=False)

    losses, body = course(learning, cut)
    assert np.abs(losses - wanted).max() < 1e-4
    assert_alike(body, reference)


def test_a_run_of_train_leaves_the_same_losses_and_a_home_that_any_engine_wakes(shared, cluster, tmp_path):
    corpus = tmp_path / "notes.txt"
    corpus.write_bytes((ROOT / "nonames.txt").read_bytes()[:30_000])

    def train(home: str, *how: str) -> list[dict]:
        command = [sys.executable, str(ROOT / "organism.py"), "train", "--corpus", str(corpus), "--home", str(tmp_path / home),
                   "--seed", "7", "--steps", "6", "--batch", "5", "--json", *how]  # fmt: skip
        told = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert told.returncode == 0, told.stderr
        return [json.loads(line) for line in told.stdout.splitlines()]

    *one, _ = train("one", "--engine", "torch", "--threads", "1")
    *two, done = train("two", "--ray", cluster.address, "--workers", "2")
    assert len(two) == done["steps"] == 6
    for mine, its in zip(one, two, strict=True):
        assert abs(mine["loss"] - its["loss"]) < 1e-3
    files = [sorted(p.name for p in (tmp_path / home / "body").glob("*/*")) for home in ("one", "two")]
    assert files[0] == files[1]
    with o.Organism(tmp_path / "two", threads=1) as life:
        assert life.published.body.steps == 6 and life.say("Hello.").text


def test_more_workers_than_cores_are_refused(cluster):
    with pytest.raises(o.OrganismError, match="1 cores, and 9 workers"):
        o.organ("workers").crew(cluster.address, 9, None)


# --- What needs no cluster. ---


def refused(*how: str) -> str:
    told = subprocess.run(
        [sys.executable, str(ROOT / "organism.py"), "train", "--corpus", "x.txt", *how], capture_output=True, text=True
    )
    assert told.returncode == 2
    return told.stderr


def test_flags_that_contradict_each_other_are_refused():
    assert "--workers needs --ray" in refused("--workers", "2")
    assert "--ray no other --engine" in refused("--ray", "local", "--engine", "numba")


def test_without_ray_one_sentence_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    learning = dataclasses.replace(LEARNING, ray="127.0.0.1:1", engine="torch")
    with pytest.raises(o.OrganismError, match=r"needs ray, which is not installed: pip install -e '\.\[swarm\]'"):
        o.Trainer(o.Body("embryo", V, o.BodyConfig(), 1), learning, engine="torch")


def test_a_part_of_a_batch_has_its_part_of_loss_and_gradient():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install -e '.[torch]'")
    body, (x, y, view) = o.Body("embryo", V, o.BodyConfig(context=CONTEXT), 1), windows(True, 4, CONTEXT)
    whole, gradients = o.organ("torch").Gradients(body.copy(), LEARNING, 1).of(x, y, view)
    parts, loss = [], 0.0
    for rows in (slice(0, 3), slice(3, 4), slice(4, 4)):
        engine = o.organ("torch").Gradients(body.copy(), LEARNING, 1)
        seen = view[rows.start * CONTEXT : rows.stop * CONTEXT]
        loss += engine.step(x[rows], y[rows], seen, 0.0, 1, x.size, lambda g: parts.append(g.clone()))
    assert loss == pytest.approx(whole, abs=1e-6)
    engine.gradient.copy_(torch.stack(parts).sum(0))
    for name, parameter in engine.parameters.items():
        if parameter.requires_grad:
            assert np.allclose(parameter.grad.numpy(), gradients[name], atol=1e-6), name
