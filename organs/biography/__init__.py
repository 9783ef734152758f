"""A biography: what a home's memory tells of a life, as chapters in words; `plot` draws the same on one page.

    life = Biography.of(memory, born)     # a moment a row, oldest first
    print(life.as_text())

Only tables are read (growth, syntropy_log, quarantine, events); nothing is loaded, so any home can be told while it lives.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

from organism import Memory


class Moment(NamedTuple):
    """Something that happened: seconds since birth, its kind, and what it was in words."""

    at: float
    kind: str
    text: str


@dataclass(frozen=True)
class Biography:
    """A life as rows. Every `ts` is in seconds since the epoch; curves and moments count from birth."""

    born: float
    growth: list[dict[str, Any]]  # rows of the growth table, oldest first
    syntropy: list[dict[str, Any]]  # rows of syntropy_log
    quarantine: list[dict[str, Any]]  # ts, source, decision, rule of each text that was kept out
    events: list[dict[str, Any]]  # ts, kind, data

    @staticmethod
    def of(memory: Memory, born: float) -> Biography:
        """Read it from memory.db."""
        events = [dict(ts=e.ts, kind=e.kind, data=e.data) for e in reversed(memory.events())]
        refused = memory.rows("quarantine", "id", "ts", "source", "decision", "rule")
        growth = memory.rows(
            "growth", "ts", "step", "vocab_size", "n_params", "corpus_chars", "loss", "gamma_magnitude", "note"
        )
        told = memory.rows("syntropy_log", "ts", "entropy_after", "syntropy_delta", "field_deviation", "purpose_alignment",
                           "action_taken", "note")  # fmt: skip
        return Biography(born, growth, told, refused, events)

    def moments(self) -> list[Moment]:
        """What mattered, in order of time; a run of bursts without news is one moment."""
        found = [*self._turns(), *self._attacks(), *self._moods(), *self._learning()]
        return sorted(found, key=lambda moment: moment.at)

    def _since(self, ts: float) -> float:
        return max(0.0, ts - self.born)

    def _turns(self) -> list[Moment]:
        tell = {
            "birth": lambda d: f"Born at stage {d['stage']}, with {d['vocab']} tokens.",
            "growth": lambda d: f"Grew from {d['from']} to {d['stage']}: {d['n_params']:,} parameters." if "stage" in d
            else f"Could not grow: {d.get('refused')}",
            "vocabulary": lambda d: f"Its vocabulary is {d['size']} tokens now.",
            "domain": lambda d: f"Met a kind of text unlike all before (domain {d['domain'] + 1}).",
            "delta": lambda d: f"Grew delta {d['id']} ({d['reason']}).",
            "noise_rejected": lambda d: f"Took a burst back: {d['reason']}.",
            "trouble": lambda d: f"In trouble: {d['error']}.",
        }  # fmt: skip
        return [
            Moment(self._since(e["ts"]), e["kind"], tell[e["kind"]](e["data"]))
            for e in self.events
            if e["kind"] in tell
        ]

    def _attacks(self) -> list[Moment]:
        """Texts that were kept out, those of one minute together."""
        minutes: dict[int, list[dict[str, Any]]] = {}
        for row in self.quarantine:
            minutes.setdefault(int(self._since(row["ts"]) // 60), []).append(row)
        out = []
        for rows in minutes.values():
            rules = ", ".join(f"{rule} {n}" for rule, n in Counter(row["rule"] for row in rows).most_common(4))
            count = f"{len(rows)} text" + "s" * (len(rows) > 1)
            out.append(Moment(self._since(rows[0]["ts"]), "attack", f"Kept out {count} ({rules})."))
        return out

    def _moods(self) -> list[Moment]:
        """Changes of syntropy's action."""
        out, last = [], None
        for row in self.syntropy:
            if row["action_taken"] != last:
                last = row["action_taken"]
                out.append(Moment(self._since(row["ts"]), "syntropy", f"Syntropy turned to {last}."))
        return out

    def _learning(self) -> list[Moment]:
        """Each time that what it lived had doubled."""
        out, mark = [], 0
        for row in self.growth:
            if row["corpus_chars"] and row["corpus_chars"] >= 2 * mark:
                mark = row["corpus_chars"]
                loss = "" if row["loss"] is None else f", its loss {row['loss']:.2f} nats a token"
                out.append(
                    Moment(self._since(row["ts"]), "lived", f"Had lived {mark:,} bytes in {row['step']:,} steps{loss}.")
                )
        return out

    def as_text(self) -> str:
        """A timeline, a line a moment."""
        head = time.strftime("Born on %Y-%m-%d at %H:%M:%S.", time.localtime(self.born))
        return "\n".join([head, *(f"{age(m.at):>10}  {m.text}" for m in self.moments())])


def age(seconds: float) -> str:
    """3.2 s, 4 min 05 s, 2 h 03 min, 5 d 02 h."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60):02} s"
    if seconds < 86400:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02} min"
    return f"{int(seconds // 86400)} d {int(seconds % 86400 // 3600):02} h"
