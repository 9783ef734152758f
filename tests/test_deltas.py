"""Deltas: low-rank adapters that are born without effect, routed by a gate, frozen, joined, and moved as files.

pytest tests/test_deltas.py
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from test_growth import CONTEXT, LEARNING, TOKENS, VIEW, assert_same, distribution, disturb, schooled

import organism as o

torch = pytest.importorskip("torch")
on_each_executor = pytest.mark.parametrize("executor", ["numpy", "numba"])
in_each_form = pytest.mark.parametrize("field", [True, False], ids=["field", "plain"])


def adapted(field: bool = True, dtype=np.float64, deltas: int = 3, stage: str = "child") -> o.Body:
    """A body with deltas that have learned something, of which the last is still trained."""
    body = schooled(stage, field, dtype)
    for n in range(deltas):
        o.add_delta(body, f"reason {n}", 2 + n, seed=n)
        disturb(body, n, dtype)
        for k, (parts, _, _) in enumerate(body.shape.deltas):
            body.arena[f"frozen.{k}.strength"][:] = np.ones(parts)
        body.arena.average[:] = body.arena.parameters
    return body


def batch(field: bool):
    at = 1 + (np.arange(3) * 7)[:, None] + np.arange(CONTEXT)
    return TOKENS[at - 1], TOKENS[at], VIEW.take(at) if field else None


# --- The operation ---


def test_each_part_of_a_delta_is_weighed_by_its_gate():
    """strength · sigmoid(z + bias) · low, by hand."""
    body = adapted(deltas=2)
    h = np.random.default_rng(0).standard_normal((5, 64))
    pack = o.single_delta(body, 2)
    a, b, bias = (pack.factors["average", f"blocks.1.qkv.{kind}"] for kind in ("a", "b", "bias"))
    wanted = (h @ a[:, :3] / (1 + np.exp(-(h @ a[:, 3:] + bias)))) @ b
    tape = o.Tape(1, 5, CONTEXT)
    places = o.layout_places(body.shape.layout())
    start = o.embed(tape, o.Place(0, (5, 64)))
    low = o.delta_gate(
        start @ places["deltas.1.blocks.1.qkv.a"], 1, places["deltas.1.blocks.1.qkv.bias"], places["frozen.1.strength"]
    )
    out = low @ places["deltas.1.blocks.1.qkv.b"]
    with o.no_grad():
        program = tape.plan()
    parameters = body.arena.average.copy()
    parameters[: h.size] = h.ravel()
    machine = o.Machine(parameters, np.zeros(program.size), np.zeros(1), np.arange(5), length=5)
    o.execute(program, machine)
    found = machine.activations[out.value.offset : out.value.offset + wanted.size].reshape(wanted.shape)
    assert np.abs(found - wanted).max() < 1e-12


@on_each_executor
@in_each_form
def test_gradients_with_deltas_are_pytorchs(field, executor):
    body = adapted(field, np.float32)
    x, y, view = batch(field)
    engine = o.organ("torch").Gradients(body, LEARNING, 1)
    loss, wanted = engine.of(x, y, view)
    if executor == "numpy":
        reference = o._ReferenceGradients(body, LEARNING)
        mine, flat = reference.of(x, y, view), reference.flat
    else:
        kernels = o.organ("kernels").Gradients(body, LEARNING, 1)
        mine, flat = kernels.of(x, y, view)
        kernels.close()
    assert mine == pytest.approx(loss, abs=1e-5)
    assert not any(name.startswith("frozen.") for name in wanted)
    assert {n for n, place in body.arena.places.items() if place.trained} == wanted.keys()
    for name, gradient in wanted.items():
        found = body.arena.places[name].of(flat)
        assert np.abs(found - gradient).max() < 1e-4 * np.abs(gradient).max(), name


@on_each_executor
def test_speaking_with_deltas_is_measuring(executor):
    body = adapted(True, np.float32)
    x, y, view = TOKENS[None, :CONTEXT], TOKENS[None, 1 : CONTEXT + 1], VIEW[1 : CONTEXT + 1]
    measured = body.log_probs(x, y, view, executor == "numba")[0]
    decoder = o.Decoder(body, executor=executor)
    for i in range(CONTEXT):
        logits = decoder.feed(int(x[0, i]), view[i]).astype(np.float64)
        top = logits.max()
        assert logits[y[0, i]] - top - np.log(np.exp(logits - top).sum()) == pytest.approx(measured[i], abs=1e-4)


# --- The function stays ---


@in_each_form
def test_a_delta_is_born_without_effect(field):
    body = schooled("child", field)
    before = distribution(body)
    o.add_delta(body, "poems", 8)
    assert_same(distribution(body), before)
    assert body.deltas[0].reason == "poems" and body.shape.deltas == ((1, 8, True),)


@in_each_form
def test_deltas_are_consolidated_without_loss(field):
    body = adapted(field)
    before = distribution(body)
    o.consolidate_deltas(body)
    assert body.shape.deltas == ((2, 3, False), (1, 4, True))
    assert_same(distribution(body), before)
    assert [d.reason for d in body.deltas] == ["reason 0", "reason 1", "reason 2"]


def test_too_many_deltas_are_consolidated_when_the_next_one_grows():
    body = schooled("embryo", True)
    for n in range(5):
        o.add_delta(body, str(n), 4, most=2)
        disturb(body, n)
    before = distribution(body)
    o.add_delta(body, "more", 4, most=2)
    assert len(body.shape.deltas) <= 3 and sum(parts for parts, _, _ in body.shape.deltas) == 6
    assert_same(distribution(body), before)


@in_each_form
@pytest.mark.parametrize("larger", ["adolescent", "teen"])
def test_a_body_grows_with_its_deltas(field, larger):
    body = adapted(field)
    before = distribution(body, 6)
    body.grow(larger)
    assert_same(distribution(body, 6), before)


# --- Learning ---


def test_the_newest_delta_learns_and_the_older_ones_rest():
    body = adapted(True, np.float32)
    before = {name: body.arena[name].copy() for name in body.arena.places}
    trainer = o.Trainer(body, LEARNING, "numpy")
    for _ in range(3):
        trainer.step(*batch(True), 0.003)
    for name, was in before.items():
        assert np.array_equal(body.arena[name], was) == name.startswith("frozen."), name


def test_a_newborn_delta_learns_on_every_projection():
    body = schooled("child", True, np.float32)
    o.add_delta(body, "new", 4)
    trainer = o.Trainer(body, LEARNING, "numpy")
    for _ in range(2):
        trainer.step(*batch(True), 0.003)
    for name in body.arena.places:
        if name.startswith("deltas.") and name.endswith(".b"):
            assert (np.abs(body.arena[name]).max(1) > 0).all(), name


# --- The dial ---


def test_a_delta_that_is_off_adds_nothing():
    body = adapted(True)
    with_all = distribution(body)
    o.weigh_delta(body, 2, 1.0, on=False)
    assert np.abs(distribution(body) - with_all).max() > 1e-3 and not body.deltas[1].on
    o.weigh_delta(body, 2, 1.0, on=True)
    assert_same(distribution(body), with_all)


def test_a_delta_that_is_not_there_is_named():
    with pytest.raises(o.UsageError, match=r"There is no delta 7: .* \(1, 2, 3\)"):
        o.weigh_delta(adapted(), 7, 1.0, on=False)


def test_bursts_are_kept_as_runs():
    delta = o.Delta(1, "x", 0)
    for burst in (3, 4, 5, 5, 9):
        delta = delta.trained_by(burst)
    assert delta.bursts == ((3, 5), (9, 9))


# --- Files ---


def test_a_delta_moves_to_another_body_of_its_size(tmp_path):
    body = adapted(True, np.float32)
    o.export_delta(body, 1, tmp_path / "delta")
    other = adapted(True, np.float32, deltas=1)
    delta = o.import_delta(other, tmp_path / "delta")
    assert delta.reason == "imported: reason 0" and [d.id for d in other.deltas] == [2, 1]
    moved, source = (o.single_delta(b, i).factors for b, i in ((other, 2), (body, 1)))
    assert all(np.array_equal(moved["average", n], f) for (array, n), f in source.items() if array == "average")


def test_a_delta_does_not_fit_another_size(tmp_path):
    o.export_delta(adapted(True, np.float32), 1, tmp_path / "delta")
    with pytest.raises(o.OrganismError, match="made beside a body at stage 'child'"):
        o.import_delta(adapted(True, np.float32, stage="infant"), tmp_path / "delta")


def test_a_file_that_is_no_delta_is_refused(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(o.OrganismError, match="There is no file"):
        o.read_export(path, "delta")
    path.write_bytes(b"nonsense")
    with pytest.raises(o.OrganismError, match="is damaged"):
        o.read_export(path, "delta")
    o.write_export(path, "gamma", dict(a=np.zeros(1)), {})
    with pytest.raises(o.OrganismError, match="is no exported delta, but organism-gamma"):
        o.read_export(path, "delta")
    o.write_export(path, "delta", dict(a=np.full(1, np.nan)), {})
    with pytest.raises(o.OrganismError, match="not finite"):
        o.read_export(path, "delta")


def test_a_file_of_a_newer_format_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "file"
    monkeypatch.setattr(o, "EXPORT_FORMAT", 2)
    o.write_export(path, "delta", dict(a=np.zeros(1)), {})
    monkeypatch.setattr(o, "EXPORT_FORMAT", 1)
    with pytest.raises(o.OrganismError, match="has format 2, this program reads 1"):
        o.read_export(path, "delta")


def test_deltas_come_back_from_the_bodys_state():
    body = adapted(True, np.float32)
    arrays, meta = body.state()
    twin = o.Body.from_state(json.loads(json.dumps(meta)), arrays, body.config)
    assert twin.deltas == body.deltas and np.array_equal(twin.arena.parameters, body.arena.parameters)
