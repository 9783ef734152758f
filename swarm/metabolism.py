"""Metabolism: a small Hebbian network that says what each organism of a colony should do more of.

One network of 5 → 8 → 5 is shared by all who live. Of each it sees what learning promises to bring, how doubtful it is,
how much waits for it, how often it is asked, and how crowded the colony is; its outputs, a softmax, are the shares of learning,
sleeping, teaching, dividing and answering. A fifth is as usual; the factor is the `Appetites` of organism.py.

Connections change by Hebb's rule with a third factor (Frémaux & Gerstner 2016): what fires together is strengthened by what came of
it, and weakened where that was worse than what others got of the same.

    W₂ += rate · value · output · hidden        W₁ += rate · value · hidden · input        both · (1 − forget)

The value of learning is what a minute of a core promises to bring, by the slope of the organism's learning curve; of sleeping, the
opposite; of answering and teaching, how much more than others it is asked and gives; of dividing, how much room there is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from organism import Appetites

INPUTS, HIDDEN, OUTPUTS = 5, 8, 5
INNER_RATE, OUTER_RATE, FORGET = (
    0.01,
    0.5,
    0.001,
)  # of a round, by the mean of all (molequla §1.14: 0.01, 0.01 and 0.001). Were the
# inner rate as large as the outer, hidden neurons would soon be all on or all off, and tell nobody from another.
STRONGEST = 2.0  # connection: by itself Hebb's rule has no end
WORTH = 0.01  # nats that a minute of a core should bring: as much as a burst, on a plateau (syntropy.plateau)
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
        self._fired: dict[
            str, tuple[np.ndarray, np.ndarray, np.ndarray]
        ] = {}  # input, hidden, output of the last round

    def advise(self, facts: Mapping[str, Mapping[str, Any]], cores: int) -> dict[str, Appetites]:
        """What each should do more of, by their facts: COUNTERS; "slope", nats by which a step lowered the loss lately (None:
        unknown); "entropy"; "waiting", bytes. First the network learns from what came of its last advice."""
        self.records = {
            id: self.records.get(id, Record()).after(tuple(_number(of.get(k)) for k in COUNTERS)) for id, of in facts.items()
        }  # fmt: skip
        if not facts:
            return {}
        values, x = self._seen(facts, cores)
        if known := [k for k, id in enumerate(facts) if id in self._fired]:
            self._learn(values[known], *(np.stack(part) for part in zip(*(self._fired[list(facts)[k]] for k in known))))
        hidden = np.tanh(x @ self.inner.T)
        drive = hidden @ self.outer.T
        out = np.exp(drive - drive.max(axis=1, keepdims=True))
        out /= out.sum(axis=1, keepdims=True)
        self._fired = dict(zip(facts, zip(x, hidden, out)))
        return {id: appetites(shares) for id, shares in zip(facts, out)}

    def _learn(self, values: np.ndarray, x: np.ndarray, hidden: np.ndarray, out: np.ndarray) -> None:
        """Hebb's rule, by the mean over organisms: values [n, 5], inputs [n, 5], hidden [n, 8], outputs [n, 5]. What is common to all
        is left out (the covariance rule, Sejnowski 1977), or all would be told more and more of the same."""
        worth, x, apart = values * out, x - x.mean(axis=0), hidden - hidden.mean(axis=0)
        self.outer += OUTER_RATE * worth.T @ apart / len(x) - FORGET * self.outer
        self.inner += INNER_RATE * (worth.sum(axis=1, keepdims=True) * apart).T @ x / len(x) - FORGET * self.inner
        for weights in (self.inner, self.outer):
            np.clip(weights, -STRONGEST, STRONGEST, out=weights)

    def _seen(self, facts: Mapping[str, Mapping[str, Any]], cores: int) -> tuple[np.ndarray, np.ndarray]:
        """(values of the activities [n, 5], in the order of `Appetites`; the network's inputs [n, 5])."""
        worth = worths(self.records, facts)
        means = np.array([record.means for record in self.records.values()])
        entropy, waiting = (
            np.array([max(0.0, _number(of.get(k))) for of in facts.values()]) for k in ("entropy", "waiting")
        )
        answered, taught = (_beside(means[:, COUNTERS.index(what)]) for what in ("answered", "taught"))
        n = len(facts)
        room = np.full(n, np.clip((cores - n) / cores, -1, 1))
        inputs = worth, _relative(entropy), _relative(np.log1p(waiting)), answered, np.full(n, n / (n + cores))
        return np.stack([worth, -worth, taught, room, answered], axis=1), np.stack(inputs, axis=1)


def worths(records: Mapping[str, Record], facts: Mapping[str, Mapping[str, Any]]) -> np.ndarray:
    """Of a minute of learning for each, in [-1, 1]: what it promises to bring, from a tenth of WORTH to ten times as much; 1 where
    nobody knows."""
    spent, steps, *_ = np.array([records[id].means for id in facts]).T
    slope = np.array([math.nan if of.get("slope") is None else _number(of["slope"]) for of in facts.values()])
    with np.errstate(divide="ignore", invalid="ignore"):
        brings = np.maximum(slope, 1e-12) * steps / spent * 60
    return np.where(np.isfinite(brings), np.clip(np.log10(np.maximum(brings, 1e-12) / WORTH), -1, 1), 1.0)


def _relative(numbers: np.ndarray) -> np.ndarray:
    """As shares of the largest."""
    return numbers / (numbers.max() or 1.0)


def _beside(numbers: np.ndarray) -> np.ndarray:
    """In [-1, 1]: each beside its equal share of all; 0 where there is nothing."""
    return np.tanh(numbers / numbers.mean() - 1) if numbers.any() else np.zeros(len(numbers))


def appetites(shares: np.ndarray) -> Appetites:
    """Factors from the shares of the five activities [5]."""
    return Appetites(*np.clip(OUTPUTS * shares, LEAST, MOST).round(4).tolist())


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else 0.0
