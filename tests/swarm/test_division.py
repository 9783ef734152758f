"""An organism divides: a taught infant or a clone, each in a home of its own that says who its parent is.

Run alone: pytest -n 0 tests/swarm/test_division.py
"""

from __future__ import annotations

import json

import pytest

from organism import SEED_CORPUS, Organism, UsageError

LESSON = "The old tower of Brumm stands on a green hill above the river Olse, and its keeper is called Maren Tolk. "


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    with Organism(tmp_path_factory.mktemp("family") / "parent", seed=1, threads=1) as life:
        for number in range(4):
            life.learn_now(
                f"{LESSON}In the year {1700 + number} the bells rang {number} times.\n", source=f"book{number}"
            )
        yield life


def test_the_infant_has_lived_the_newer_half_and_predicts_it_better_than_a_newborn(parent, tmp_path):
    facts = parent.divide(tmp_path / "child", seconds=5)
    record = json.loads((tmp_path / "child" / "birth.json").read_bytes())
    assert record["parent"] == parent.home.id and record["id"] == facts["id"] != parent.home.id
    assert facts["stage"] == "infant" and facts["training_tokens"] > 0
    with Organism(tmp_path / "child", threads=1) as child, Organism(tmp_path / "new", threads=1) as newborn:
        sources = {row.source for row in child.memory.lived()}
        assert sources == {SEED_CORPUS, "book2", "book3"}
        assert child.evaluate(LESSON) < 0.7 * newborn.evaluate(LESSON)
        assert child.say("Who keeps the tower?").text
    assert parent.memory.events("divide")[-1].data["id"] == facts["id"]


def test_a_clone_is_its_parent_with_another_id_and_diverges(parent, tmp_path):
    facts = parent.divide(tmp_path / "clone", clone=True)
    with Organism(tmp_path / "clone", threads=1) as clone:
        assert clone.home.id == facts["id"] != parent.home.id
        assert clone.home.birth_record["parent"] == parent.home.id
        assert clone.published.body.stage == parent.published.body.stage
        assert abs(clone.evaluate(LESSON) - parent.evaluate(LESSON)) < 1e-6
        lived = parent.state["lived_bytes"]
        clone.learn_now("A clone reads what its parent has never read at all, about ships and harbours.\n")
        assert clone.state["lived_bytes"] > lived == parent.state["lived_bytes"]


def test_a_home_that_is_not_empty_is_refused_and_untouched(parent, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    with pytest.raises(UsageError, match="is not empty"):
        parent.divide(tmp_path / "taken")
    assert (tmp_path / "taken" / "file").read_text() == "mine"
