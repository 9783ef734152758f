"""What a Ray mesh needs no Ray for: addresses, and that a call is done once however often it is sent.

With a cluster, its tests are those of every mesh. Run alone: pytest -n 0 tests/swarm/test_ray_mesh.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from swarm.family import births_path
from swarm.mesh import MeshError, open_mesh
from swarm.ray_mesh import Address, Ledger


@pytest.fixture
def ledger(tmp_path):
    with Ledger(tmp_path / "mesh.db") as opened:
        yield opened


def letter(ledger: Ledger, n: int) -> int:
    return ledger.post("anna", "bert", "note", dict(n=n))


def test_addresses():
    assert Address.of("ray:local") == ("local", "") and Address.of("ray:auto/a/mesh.db") == ("auto", "/a/mesh.db")
    assert Address.of("ray:10.0.0.1:6379/a b/mesh.db") == ("10.0.0.1:6379", "/a b/mesh.db")
    assert Address.of("ray://head:10001/a/mesh.db") == ("ray://head:10001", "/a/mesh.db")
    for wrong in ("ray:", "ray:head", "ray:/a/mesh.db", "ray:head:x"):
        with pytest.raises(MeshError, match="no address of a Ray mesh"):
            Address.of(wrong)


def test_without_ray_one_sentence_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MeshError, match=r"needs ray, which is not installed: pip install -e '\.\[swarm\]'"):
        open_mesh("ray:auto")


def test_a_cluster_that_is_not_there_is_said_at_once():
    pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[swarm]'")
    with pytest.raises(MeshError, match="cannot be joined"):
        open_mesh("ray:127.0.0.1:1/mesh.db")


def test_a_letter_that_is_posted_twice_by_one_call_is_one_letter(ledger):
    call = ("client", 1, 0, "_post", ("anna", "bert", "note", "{}"))
    first = ledger.answer(*call)
    assert ledger.answer(*call) == first and [got.id for got in ledger.inbox("bert")] == [first]


def test_what_was_handed_out_is_handed_out_again_to_the_same_call_alone(ledger):
    ids = [letter(ledger, n) for n in range(3)]
    ledger.offer("anna", "text", b"hello")
    took = ledger.answer("client", 1, 0, "inbox", ("bert", 2))
    assert [got.id for got in took] == ids[:2] and ledger.answer("client", 1, 0, "inbox", ("bert", 2)) == took
    assert [got.id for got in ledger.answer("other", 1, 0, "inbox", ("bert", 2))] == ids[2:]
    claimed = ledger.answer("client", 2, 1, "claim", ("bert", "text"))
    assert ledger.answer("client", 2, 1, "claim", ("bert", "text")) == claimed and claimed[0].payload == b"hello"
    assert ledger.answer("client", 3, 2, "claim", ("bert", "text")) == []


def test_what_was_handed_out_with_a_lost_reply_waits_again(ledger):
    first = letter(ledger, 0)
    ledger.answer("client", 1, 0, "inbox", ("bert",))
    ledger.answer("client", 2, 0, "waiting", ())  # the reply to 1 was not seen
    assert [got.id for got in ledger.answer("client", 3, 2, "inbox", ("bert",))] == [first]
    ledger.offer("anna", "text", b"hello")
    ledger.answer("client", 4, 3, "claim", ("bert", "text"))
    assert [gift.payload for gift in ledger.answer("client", 5, 3, "claim", ("bert", "text"))] == [b"hello"]


def test_a_call_that_comes_after_a_later_one_is_not_done(ledger):
    first = letter(ledger, 0)
    ledger.answer("client", 2, 0, "_bury", ([],))
    with pytest.raises(MeshError, match="after a later one"):
        ledger.answer("client", 1, 0, "inbox", ("bert",))
    assert [got.id for got in ledger.inbox("bert")] == [first]


def test_a_reply_outlives_the_process(tmp_path):
    call = ("client", 1, 0, "_post", ("anna", "bert", "note", "{}"))
    with Ledger(tmp_path / "mesh.db") as ledger:
        first = ledger.answer(*call)
    with Ledger(tmp_path / "mesh.db") as ledger:
        assert ledger.answer(*call) == first and len(ledger.inbox("bert")) == 1
        ledger.forget("client")
        assert ledger.answer(*call) != first


def test_a_call_that_fails_is_not_done(ledger):
    with pytest.raises(TypeError):
        ledger.answer("client", 1, 0, "_post", ("anna",))
    assert ledger.answer("client", 2, 0, "_post", ("anna", "bert", "note", "{}")) and len(ledger.inbox("bert")) == 1


def test_births_in_a_ray_mesh_are_counted_one_by_one_on_each_machine(own_home):
    where = births_path("ray:local/shared/mesh.db")
    assert where.is_relative_to(own_home) and where != births_path("ray:auto/shared/mesh.db")
    assert births_path("/a/mesh.db") == Path("/a/mesh.db-births")
