"""Metabolism: a small Hebbian network that says what each organism of a colony should do more of.

One network of 5 → 8 → 5 is shared by all who live. Of each it sees how much learning has brought it lately (against the others), how
doubtful it is, how much waits for it, how often it is asked, and how crowded the colony is; its outputs, a softmax, are the shares of
learning, sleeping, teaching, dividing and answering. A fifth is as usual; the factor is the `Appetites` of organism.py.

Connections change by Hebb's rule with a third factor (Frémaux & Gerstner 2016): what fires together is strengthened by what came of
it, and weakened where that was worse than what others got of the same.

    W₂ += rate · value · output · hidden        W₁ += rate · value · hidden · input        both · (1 − forget)

The value of learning is the gain a second of processor time, against that of the whole colony; of sleeping, the opposite; of
answering and teaching, how much more than others it is asked and gives, where it knows more; of dividing, how much room there is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from organism import Appetites

INPUTS, HIDDEN, OUTPUTS = 5, 8, 5
RATE, FORGET = 0.05, 0.001  # of a round (molequla §1.14: 0.01 and 0.001)
LEAST, MOST = 0.25, 2.0  # factors of an appetite
PAST = 0.9  # of what was known of an organism is kept from round to round: about ten rounds count


COUNTERS = ("spent", "steps", "answered", "taught")  # seconds of processor time, steps of training, answers, gifts


class Record(NamedTuple):
    """What is known of one organism: means a round of its COUNTERS, and what they were at the last."""

    means: tuple[float, ...] = (0.0,) * len(COUNTERS)
    counters: tuple[float, ...] | None = None

    def after(self, counters: tuple[float, ...]) -> Record:
        """With one round more. A counter that went back began anew, when its organism woke."""
        if self.counters is None:
            return self._replace(counters=counters)
        new = [now - was if now >= was else now for was, now in zip(self.counters, counters)]
        return Record(tuple(PAST * mean + (1 - PAST) * of for mean, of in zip(self.means, new)), counters)


class Metabolism:
    """The network of a colony. `advise` is called once a round, with what heartbeats told of those who are awake."""

    def __init__(self, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.inner = rng.uniform(-0.5, 0.5, (HIDDEN, INPUTS))
        self.outer = rng.uniform(-0.05, 0.05, (OUTPUTS, HIDDEN))
        self.records: dict[str, Record] = {}
        self.promises: dict[str, float | None] = {}
        self._fired: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}  # input, hidden, output of the last round

    def advise(self, facts: Mapping[str, Mapping[str, Any]], cores: int) -> dict[str, Appetites]:
        """What each should do more of, by their facts: COUNTERS; "slope", nats by which a step lowered the loss lately (None:
        unknown); "entropy"; "waiting", bytes. First the network learns from what came of its last advice."""
        self.promises = {id: of.get("slope") for id, of in facts.items()}
        self.records = {
            id: self.records.get(id, Record()).after(tuple(_number(of.get(k)) for k in COUNTERS)) for id, of in facts.items()
        }  # fmt: skip
        values = {id: value for id, value in self._values(facts, cores).items() if id in self._fired}
        self.inner *= 1 - FORGET
        self.outer *= 1 - FORGET
        for id, value in values.items():
            self._strengthen(*self._fired[id], value, RATE / len(values))
        self._fired = {id: self._fire(x) for id, x in self._inputs(facts, cores).items()}
        return {id: appetites(fired[2]) for id, fired in self._fired.items()}

    def _fire(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        hidden = np.tanh(self.inner @ x)
        drive = self.outer @ hidden
        out = np.exp(drive - drive.max())
        return x, hidden, out / out.sum()

    def _strengthen(self, x: np.ndarray, hidden: np.ndarray, out: np.ndarray, value: np.ndarray, rate: float) -> None:
        self.outer += rate * np.outer(value * out, hidden)
        self.inner += rate * float(value @ out) * np.outer(hidden, x)

    def advantages(self) -> dict[str, float]:
        """In [-1, 1]: how much more a second of learning promises to bring each than it brings the colony; 1 where nobody knows."""
        brings, time = {}, {}
        for id, record in self.records.items():
            time[id], steps = record.means[:2]
            slope = self.promises[id]
            brings[id] = math.inf if slope is None or time[id] <= 0 else max(0.0, _number(slope)) * steps / time[id]
        known = [id for id, rate in brings.items() if rate < math.inf]
        usual = sum(brings[id] * time[id] for id in known) / max(1e-12, sum(time[id] for id in known)) or 1e-12
        return {id: min(1.0, rate / usual - 1) for id, rate in brings.items()}

    def _inputs(self, facts: Mapping[str, Mapping[str, Any]], cores: int) -> dict[str, np.ndarray]:
        entropies = {id: _number(of.get("entropy")) for id, of in facts.items()}
        waiting = {id: math.log1p(max(0.0, _number(of.get("waiting")))) for id, of in facts.items()}
        most, longest = max(entropies.values(), default=0.0) or 1.0, max(waiting.values(), default=0.0) or 1.0
        advantage, crowd = self.advantages(), len(facts) / (len(facts) + cores)
        return {id: np.array([advantage[id], entropies[id] / most, waiting[id] / longest,
                              self._share(id, "answered"), crowd]) for id in facts}  # fmt: skip

    def _share(self, id: str, what: str) -> float:
        """In [-1, 1]: of all answers or gifts, against its equal share."""
        at = COUNTERS.index(what)
        total = sum(record.means[at] for record in self.records.values())
        return math.tanh(self.records[id].means[at] / total * len(self.records) - 1) if total > 0 else 0.0

    def _values(self, facts: Mapping[str, Mapping[str, Any]], cores: int) -> dict[str, np.ndarray]:
        """Of each activity, in the order of `Appetites`."""
        room = float(np.clip((cores - len(facts)) / cores, -1, 1))
        return {id: np.array([a, -a, self._share(id, "taught"), room, self._share(id, "answered")])
                for id, a in self.advantages().items()}  # fmt: skip


def appetites(shares: np.ndarray) -> Appetites:
    """Factors from the shares of the five activities [5]."""
    return Appetites(*np.clip(OUTPUTS * shares, LEAST, MOST).round(4).tolist())


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else 0.0
