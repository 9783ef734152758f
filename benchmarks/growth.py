"""Growth leaves the function unchanged, and a body that grew beats one that was born large.

Usage: python benchmarks/growth.py [--domain bible=bible.txt] [--bytes 3000000] [--field off] [--only change|race]
       [--largest STAGE]

First table: the largest change of a probability and of ln p at every step, in float64 by the reference, in float32 by the
kernels. Second: an adult (or --largest) from scratch reads a text once, and what it reaches on held-out text is the goal;
lives that begin as embryos read the same parts of it. One stays an embryo, which shows what size is worth here; one grows
by its own gates; one is made to become as large, at the shares of the text that --schedule gives. Time and FLOPs count
training until held-out text, measured after each part, costs no more than the goal.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from common import ROOT, fresh_home, table, texts

import organism as o

CONTEXT = 96


# --- The change at every step. ---


def schooled(stage: str, field: bool, dtype: type) -> o.Body:
    """A body none of whose parameters is what it was at birth, so that nothing is zero by chance."""
    body = o.Body(stage, 300, o.BodyConfig(field=field, context=CONTEXT), 1)
    return disturbed(body, dtype)


def disturbed(body: o.Body, dtype: type, seed: int = 1) -> o.Body:
    arena, rng = o.Arena(body.shape.layout(), dtype), np.random.default_rng(seed)
    for name, place in arena.places.items():
        size = 0.0 if name.endswith("strength") else 1.0 if name.endswith("alpha") else 0.02
        arena[name][:] = body.arena[name] + size * rng.standard_normal(place.shape)
    arena.average[:] = arena.parameters
    body.arena = arena
    return body


class Probe:
    """One window of a text, with the field's view of it."""

    def __init__(self, data: bytes, length: int):
        tokenizer = o.Tokenizer()
        tokenizer.learn([data], 41)
        self.tokenizer, self.length = tokenizer, length
        tokens = tokenizer.encode(data[:4000]).astype(np.int64)
        _, view = o.Field(tokenizer.vocabulary, o.FieldConfig(table_mb=1)).read(tokens, views=True)
        self.x, self.y, self.view = (
            tokens[1000 : 1000 + length],
            tokens[1001 : 1001 + length],
            o._given(view)[1001 : 1001 + length],
        )

    def logits(self, body: o.Body) -> np.ndarray:
        """float64 [T, V] by the reference, in the precision of the body's arena."""
        with o.no_grad():
            tape, places = o.Tape(1, self.length, CONTEXT), o.layout_places(body.shape.layout())
            h = o.record_hidden(tape, body.shape, places)
            if body.on_field:
                o.field_logits(h, places["head"], places["gain"])
            else:
                o.logits(h, places["embedding"])
            program = tape.plan()
        space = np.zeros(program.size, body.arena.dtype)
        angles = o.rope_angles(CONTEXT, *body.shape.rope)
        view = self.view if body.on_field else None
        o.execute(program, o.Machine(body.arena.average, space, angles, self.x, length=self.length, view=view))
        begins = program.steps[-1].buffers["out"].offset
        return space[begins : begins + self.length * 300].reshape(self.length, 300).astype(np.float64)

    def spoken(self, body: o.Body) -> np.ndarray:
        """float64 [T, V] by the kernels that speak."""
        decoder = o.Decoder(body, "numba")
        return np.array(
            [decoder.feed(int(t), self.view[i] if body.on_field else None) for i, t in enumerate(self.x)], np.float64
        )


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def changes(data: bytes) -> str:
    """The table of changes."""
    probe, rows = Probe(data, 48), []
    events = [
        (f"{a} → {b}", a, lambda body, b=b: body.grow(b)) for a, b in zip(o.STAGES, list(o.STAGES)[1:], strict=False)
    ]
    events += [("embryo → adult at once", "embryo", lambda body: body.grow("adult")),
               ("a delta is born", "child", lambda body: o.add_delta(body, "new", 8)),
               ("four deltas consolidated", "child with deltas", lambda body: o.consolidate_deltas(body)),
               ("child with deltas → adolescent", "child with deltas", lambda body: body.grow("adolescent"))]  # fmt: skip
    for name, start, event in events:
        row = [name]
        for dtype, ask in ((np.float64, probe.logits), (np.float32, probe.spoken)):
            worst = np.zeros(2)
            for field in (True, False):
                body = schooled(start.split()[0], field, dtype)
                for k in range(5 if "deltas" in start else 0):
                    o.add_delta(body, str(k), 8, seed=k, most=9)
                    disturbed(body, dtype, k)
                before = ask(body)
                event(body)
                after = ask(body)
                worst = np.maximum(
                    worst, [np.abs(softmax(after) - softmax(before)).max(), np.abs(after - before).max()]
                )
            row += [f"{worst[0]:.1e}", f"{worst[1]:.1e}"]
        rows.append(row)
    rows.append(("save and load", *same_after_saving()))
    must = ("must", "1e-9", "1e-9", "1e-5", "1e-4")
    head = ["step", "probability, float64", "logit, float64", "probability, float32", "logit, float32"]
    return table("Largest change, on the field and without it", head, [*rows, must])


def same_after_saving() -> tuple[str, ...]:
    body = schooled("child", True, np.float32)
    body.grow("adolescent")
    arrays, meta = body.state()
    twin = o.Body.from_state(meta, {k: v.copy() for k, v in arrays.items()}, body.config)
    same = all(np.array_equal(getattr(body.arena, n), getattr(twin.arena, n)) for n in o.Arena.ARRAYS)
    return ("0 (bit for bit)",) * 4 if same else ("DIFFERS",) * 4


def vocabulary_growth(data: bytes, held: bytes) -> str:
    """Held-out bits per byte before and after the vocabulary grows by a third."""
    with fresh_home() as home, life(home, "child", {}) as organism:
        organism.learn_now(data[:100_000])
        before = organism.evaluate(held)["bits_per_byte"]
        learner = organism.learner
        learner.grow_vocabulary(len(learner.tokenizer.merges) + 128, organism._past)
        organism._field_dirty = True
        organism._publish(learner, float("nan"), "vocabulary")
        after = organism.evaluate(held)["bits_per_byte"]
    change = f"{100 * (after / before - 1):+.2f} %"
    return table("128 tokens more", ["held-out bits/byte before", "after", "change", "must"],
                 [(f"{before:.4f}", f"{after:.4f}", change, "+0.5 %")])  # fmt: skip


# --- The race. ---


def life(home: Path, stage: str, settings: dict[str, object]) -> o.Organism:
    return o.Organism(home, overrides=settings, kernels="wait", seed=1, stage=stage)


def lived(parts: list[Path], held: bytes, settings: dict[str, object], stage: str, schedule: list[float] = (),
          own: bool = False) -> list[dict]:  # fmt: skip
    """After each part of a text: held-out bits per byte, and the training that it took. It grows when `schedule` says.

    All lives read the same parts in the same calls: where a text is cut moves the field more than a body may add.
    """
    names, seconds, out = list(o.STAGES), 0.0, []
    with fresh_home() as home, life(home, stage, settings) as organism:
        for number, part in enumerate(parts):
            while (at := names.index(organism.published.body.stage)) < len(schedule) and number / len(
                parts
            ) >= schedule[at]:
                organism.grow()
            seconds += organism.train([str(part)], hold_stage=not own)["seconds"]
            score = organism.evaluate(held)
            out.append(dict(bits=score["bits_per_byte"], field=score["field_bits_per_byte"], seconds=seconds,
                            flops=organism.state["training_flops"], stage=organism.published.body.stage,
                            read=(number + 1) / len(parts)))  # fmt: skip
    return out


def row(name: str, now: dict, adult: dict) -> tuple:
    saved = [f"{100 * (1 - now[key] / adult[key]):.0f} %" for key in ("seconds", "flops")]
    return (name, now["stage"], f"{now['bits']:.4f}", f"{100 * now['read']:.0f} %", f"{now['seconds']:.1f}",
            f"{now['flops']:.3g}", *saved)  # fmt: skip


def race(data: bytes, held: bytes, options: argparse.Namespace) -> str:
    settings = {"body.field": options.field == "on", "learning.replay": options.replay, "learning.batch": options.batch}
    largest = options.largest
    schedule = [float(share) for share in options.schedule.split(",")][: list(o.STAGES).index(largest)]
    with tempfile.TemporaryDirectory() as folder:
        parts = []
        for n in range(options.parts):
            parts.append(Path(folder) / f"part{n}")
            parts[-1].write_bytes(data[n * len(data) // options.parts : (n + 1) * len(data) // options.parts])
        adult = lived(parts, held, settings, largest)[-1]
        small = lived(parts, held, settings, "embryo")[-1]
        rows = [row(f"{largest} from scratch: the goal", adult, adult), row("embryo that stays one", small, adult)]
        for name, times, own in (
            ("embryo, by its own gates", [], True),
            (f"embryo → {largest}, by --schedule", schedule, False),
        ):
            steps = lived(parts, held, settings, "embryo", times, own)
            reached = next((now for now in steps if now["bits"] <= adult["bits"]), None)
            rows.append(
                row(f"{name}: reaches the goal", reached, adult)
                if reached
                else (f"{name}: goal not reached", *[""] * 5, "–", "–")
            )
            rows.append(row(f"{name}: at the end", steps[-1], adult))
    rows.append(("must / aim", "", "≤ the goal", "", "", "", "30 % / 70 %", "30 % / 70 %"))
    head = ["life", "stage", "held-out bits/byte", "text read", "training (s)", "FLOPs", "time saved", "FLOPs saved"]
    text = table(
        f"{len(data):,} bytes, field {options.field}, {options.replay:g} tokens trained a token read", head, rows
    )
    if options.field == "on":
        gain = 100 * (1 - adult["bits"] / adult["field"])
        text += (f"\nThe field alone: {adult['field']:.4f}; the body from scratch takes {gain:.2f} % off that. Where this is small, "
                 "or below zero, the race says little about bodies: see --field off.\n")  # fmt: skip
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--domain", action="append", default=[], metavar="NAME=PATH", help="a text (default: Python's library)"
    )
    parser.add_argument("--bytes", type=int, default=3_000_000, help="of the text (default: 3,000,000)")
    parser.add_argument(
        "--largest", choices=list(o.STAGES)[1:], default="adult", help="what is raced for (default: adult)"
    )
    parser.add_argument("--field", choices=("on", "off"), default="on", help="whether bodies stand on the field")
    parser.add_argument("--replay", type=float, default=1.0, help="tokens trained a token read (default: 1)")
    parser.add_argument("--batch", type=int, default=8, help="windows a step (default: 8)")
    parser.add_argument("--schedule", default="0.05,0.15,0.35,0.6,0.8", help="shares of the text at which it grows")
    parser.add_argument("--parts", type=int, default=20, help="pieces after which held-out text is measured")
    parser.add_argument("--only", choices=("change", "race"), help="one half alone")
    options = parser.parse_args()
    given = texts(options.domain) if options.domain else texts([])
    data = b"".join(path.read_bytes() for path in given.values())[: options.bytes]
    held, data = data[-(size := max(20_000, len(data) // 20)) :], data[:-size]
    if options.only != "race":
        print(changes((ROOT / "nonames.txt").read_bytes()), flush=True)
        print(vocabulary_growth(data, held), flush=True)
    if options.only != "change":
        print(race(data, held, options), flush=True)


if __name__ == "__main__":
    main()
