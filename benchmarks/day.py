"""A day of 64 organisms in fast time, by the real rules: does anything die out or explode, and who gets the processor?

    python benchmarks/day.py
    python benchmarks/day.py --organisms 16 --hours 6 --seeds 1 --cores 4

What decides is what decides in a colony: `QuantumBuffer` (when a burst begins), `Syntropy` (what it measures and wants),
`proposal` (divide, hibernate), `growth_gates` (grow), and swarm/rules.py (who may be born, who wakes, which sleeper a question wakes,
what is given away) and swarm/metabolism.py. What is made up is what a burst would do: an organism's loss falls by a power law of the
tokens that it trained on, new text raises it again by how new it is to it, and measurements are noisy; text comes to each at a rate
of its own, now and then of a new kind. Cores are shared by all who learn at that moment.

An organism is *still improving* while one more minute of a core would lower its true loss by 0.01 nats (syntropy.plateau).
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import numpy as np
from common import table

from organism import (
    STAGES,
    Appetites,
    Config,
    Health,
    LearningCurve,
    Pulse,
    QuantumBuffer,
    Syntropy,
    growth_gates,
    stages,
)
from swarm.mesh import Mail
from swarm.metabolism import LEAST, MOST, OUTPUTS, Metabolism, appetites, worths
from swarm.rules import Bed, no_room, who_wakes, worth_giving, worth_waking

TICK = 30.0  # seconds: of three bursts at most (Organism._burst); as often speaks the metabolism (colony.MONITOR)
BYTES_PER_TOKEN = 2.0
SPEED = dict(
    zip(STAGES, (345_000, 215_000, 60_000, 10_800, 3_100, 1_440))
)  # tokens a second of a core (docs/benchmarks.md, halved)
FLOOR = dict(zip(STAGES, (0.5, 0.35, 0.22, 0.12, 0.05, 0.0)))  # nats that a stage cannot learn to save
AMPLITUDE, SCALE, POWER = 3.0, 50_000, 0.35  # excess = amplitude · (1 + tokens / scale)^-power
PROBE = 32  # tokens that are measured
MORE = 0.01  # nats that a further minute of a core must bring, or it is no longer improving


class Text(NamedTuple):
    source: str
    size: int
    new: float  # share of it that its reader does not know: in [0, 1]
    came: float = 0.0  # seconds since midnight


class Life:
    """One organism of the day: the rules' own objects, and a made-up mind."""

    def __init__(self, name: str, config: Config, rng: np.random.Generator, stage: str, lived: int, rate: float, newness: float,
                 now: float, like: Life | None = None):  # fmt: skip
        self.name, self.config, self.rng, self.stage, self.lived = name, config, rng, stage, lived
        self.rate, self.newness = rate, newness  # bytes an hour that come to it; how new they are to it
        self.buffer, self.curve, self.syntropy = (
            QuantumBuffer(config.learning),
            LearningCurve(),
            Syntropy(config.syntropy),
        )
        self.domain = like.domain if like else int(rng.integers(8))
        self.tokens = 8.0 * lived / BYTES_PER_TOKEN * rng.uniform(0.1, 1) if like is None else like.tokens / 2
        self.steps, self.grown_at, self.credit, self.waiting = 0, None, 0.0, list[Text]()
        self.syntropy.divided = now
        if like is not None:
            self.syntropy.records = list(like.syntropy.records)  # `Organism._birth_of_child`
        self.pattern, self.direction = rng.normal(0, 0.3, PROBE), rng.normal(0, 1, PROBE)
        self.identity = 0.01 * self.direction
        self.spent = self.answered = self.taught = 0.0  # counters of the heartbeat
        for share in np.linspace(0.2, 1, 64) if like is None else ():  # it learned before this day, too
            self.curve.blocks.append(self._loss(share * self.tokens) + rng.normal(0, 0.02))
        self.slope = self.curve.slope
        self.appetites, self.lived_since_gift = Appetites(), list[Text]()

    @property
    def loss(self) -> float:
        """Nats a token, as nobody can measure it."""
        return self._loss(self.tokens)

    def _loss(self, tokens: float) -> float:
        return 1.2 + FLOOR[self.stage] + AMPLITUDE * (1 + max(0.0, tokens) / SCALE) ** -POWER

    def brings(self, seconds: float) -> float:
        """Nats by which so many more seconds of a core would lower the loss."""
        return self.loss - self._loss(self.tokens + seconds * SPEED[self.stage])

    def hear(self, text: Text) -> None:
        self.waiting.append(text)
        self.buffer.feed(bytes(text.size), 2.5 * text.size * (1 + text.new))

    def ready(self, now: float) -> bool:
        """As `Organism._tick` has it."""
        return self.buffer.ready(now) or self.credit >= self.config.learning.batch * self.config.body.context

    def burst(self, seconds: float, now: float, peers: list[float]) -> str | None:
        """Read what waits and train for so many seconds of a core; what syntropy proposes."""
        before, blocks = self._pulse(), len(self.curve.blocks)
        fresh = sum(text.size for text in self.waiting)
        for text in self.waiting:
            self.tokens *= 1 - text.new * min(1.0, text.size / (self.lived + text.size) * 4)
        self.lived_since_gift += self.waiting
        self.waiting.clear()
        self.lived += fresh
        self.credit += fresh / BYTES_PER_TOKEN * self.config.learning.replay * self.appetites.learn
        trained = min(self.credit, seconds * SPEED[self.stage])
        self.tokens, self.credit = self.tokens + trained, self.credit - trained
        self.spent += trained / SPEED[self.stage]
        per_step = self.config.learning.batch * self.config.body.context
        for _ in range(int(self.steps + trained / per_step) - int(self.steps)):
            self.curve.add(self.loss + self.rng.normal(0, 0.05))
        self.steps += trained / per_step
        if len(self.curve.blocks) != blocks:
            self.slope = self.curve.slope
            self._grow()
        self.buffer.reset(now)
        told = None
        if fresh:
            self.identity = self.identity + 0.01 * self.direction + self.rng.normal(0, 0.02, PROBE)
            told = self.syntropy.decide(before, self._pulse(), self.grown_up, peers, now, self.appetites)
        return told["proposal"] if told else None

    def _pulse(self) -> Pulse:
        entropy = 0.7 * self.loss + self.pattern + self.rng.normal(0, 0.02, PROBE)
        past = -self.loss + self.pattern + self.rng.normal(0, 0.02, PROBE)
        return Pulse(entropy, np.full(PROBE, 1.0), Health(self.identity, past, np.zeros(PROBE), 100))

    def _grow(self) -> None:
        names = list(stages(self.config.body))
        following = names[names.index(self.stage) + 1] if self.stage != names[-1] else None
        if growth_gates(following, self.lived, self.curve, self.grown_at, self.config)["ready"] and following:
            loss = self.loss
            self.stage, self.grown_at, self.curve = following, int(self.steps), LearningCurve()
            excess = max(1e-6, loss - 1.2 - FLOOR[following])  # growth leaves what it does as it was
            self.tokens = SCALE * max(0.0, (excess / AMPLITUDE) ** (-1 / POWER) - 1)

    @property
    def grown_up(self) -> bool:
        names = list(stages(self.config.body))
        return names.index(self.stage) >= names.index(self.config.syntropy.divide_stage)

    def facts(self) -> dict[str, float | None]:
        """As `Member.facts`."""
        return dict(spent=self.spent, steps=self.steps, answered=self.answered, taught=self.taught, slope=self.slope,
                    entropy=self.syntropy.entropy, waiting=sum(text.size for text in self.waiting))  # fmt: skip


Advice = Callable[[dict[str, Life], int], dict[str, Appetites]]


def in_proportion() -> Advice:
    """A fixed rule: everybody learns in proportion to what a minute of it promises, as the network sees it."""
    network = Metabolism()

    def advise(awake: dict[str, Life], cores: int) -> dict[str, Appetites]:
        facts = {name: life.facts() for name, life in awake.items()}
        network.advise(facts, cores)
        worth = worths(network.records, facts)
        return {name: appetites(np.array([1 + of, 1, 1, 1, 1]) / OUTPUTS) for name, of in zip(facts, worth)}

    return advise


def by_truth(awake: dict[str, Life], cores: int) -> dict[str, Appetites]:
    """What could be had: nobody can know this."""
    return {name: Appetites(learn=MOST if life.brings(60) >= MORE else LEAST) for name, life in awake.items()}


def by_metabolism(seed: int) -> Advice:
    network = Metabolism(seed)
    return lambda awake, cores: network.advise({name: life.facts() for name, life in awake.items()}, cores)


class Day:
    """A colony, from midnight to midnight."""

    def __init__(
        self, count: int, cores: int, most: int, mean_rate: float, seed: int, advice: Advice | None, exchange: bool
    ):
        self.config, self.rng, self.cores, self.most = Config(), np.random.default_rng(seed), cores, most
        self.advice, self.exchange, self.mean_rate = advice, exchange, mean_rate
        self.awake: dict[str, Life] = {}
        self.asleep: dict[str, Life] = {}
        self.beds: dict[str, Bed] = {}
        self.left: dict[str, tuple[Bed, float]] = {}  # beds that were left, and when
        self.born = self.hibernated = self.refused = 0
        self.slept = self.latest = 0.0  # hours of sleep of all; seconds that a text has waited for a sleeper at most
        self.improving = self.spent = 0.0  # seconds of cores
        self.counts: list[tuple[int, int]] = []  # (awake, all) at each round
        names = list(STAGES)
        for k in range(count):
            lived = int(np.exp(self.rng.normal(math.log(300_000), 1.0)))
            stage = names[min(5, sum(lived >= stages(self.config.body)[name][1] for name in names[1:]))]
            self._add(
                Life(
                    f"o{k + 1}", self.config, self.rng, stage, lived, self._rate(), float(self.rng.uniform() ** 2), 0.0
                )
            )

    def _rate(self) -> float:
        return float(np.exp(self.rng.normal(math.log(self.mean_rate) - 0.5, 1.0)))

    def _add(self, life: Life) -> None:
        self.awake[life.name] = life

    def run(self, hours: float) -> None:
        for tick in range(int(hours * 3600 / TICK)):
            now = tick * TICK
            self._deliver(now)
            self._ask(now)
            self._wake(now)
            self._learn(now)
            self._round()

    def _deliver(self, now: float) -> None:
        """Text comes; of a new kind, to each about four times a day."""
        for life in (*self.awake.values(), *self.asleep.values()):
            size = int(self.rng.integers(500, 4000))
            if self.rng.random() < life.rate * TICK / 3600 / size:
                other = self.rng.random() < 4 * size / life.rate / 24
                life.domain = int(self.rng.integers(8)) if other else life.domain
                life.hear(Text("feed", size, 1.0 if other else life.newness, now))

    def _ask(self, now: float) -> None:
        """A question a minute: everybody says how surprised it is; who sleeps may be woken by its summary."""
        self.mail = {
            name: Mail(False, sum(text.size for text in life.waiting), now - life.waiting[0].came)
            for name, life in self.asleep.items()
            if life.waiting
        }
        if self.rng.random() > TICK / 60 or not self.awake:
            return
        domain = int(self.rng.integers(8))
        surprise = lambda life: life.loss * (1 if life.domain == domain else 1.6) * self.rng.normal(1, 0.02)
        guesses = {name: surprise(life) for name, life in (self.awake | self.asleep).items()}
        known = {name: guesses[name] for name in self.awake}
        woken = worth_waking(known, list(self.asleep), guesses)
        answers = self.asleep[woken[0]] if woken else self.awake[min(known, key=known.__getitem__)]
        answers.answered += 1
        self.mail |= {name: Mail(True) for name in woken}

    def _wake(self, now: float) -> None:
        rest, patience = self.config.life.rest_seconds, self.config.life.nap_seconds
        for name in who_wakes(self.beds, self.mail, len(self.awake), self.cores, rest, now, patience):
            life, bed = self.asleep.pop(name), self.beds.pop(name)
            self.left[name] = bed, now
            self.slept += (now - bed.since) / 3600
            self.latest = max([self.latest, *(now - text.came for text in life.waiting)])
            life.syntropy = Syntropy(self.config.syntropy, life.syntropy.state())  # as `Organism` does when it wakes
            self._add(life)

    def _learn(self, now: float) -> None:
        learners = [life for life in self.awake.values() if life.ready(now)]
        trends = {name: life.syntropy.trend.mean for name, life in self.awake.items()}
        for life in learners:
            share = min(1.0, self.cores / len(learners))
            improving, spent = life.brings(60) >= MORE, life.spent
            peers = [trend for name, trend in trends.items() if name != life.name]
            proposal = life.burst(share * TICK, now, peers)
            self.spent += life.spent - spent
            self.improving += (life.spent - spent) * improving
            self._consider(life, proposal, now)

    def _consider(self, life: Life, proposal: str | None, now: float) -> None:
        """As `Member._consider` and `Supervisor._place` do."""
        if proposal == "hibernate":
            self.hibernated += 1
            last, woke = self.left.pop(life.name, (None, now))
            self.asleep[life.name], self.beds[life.name] = self.awake.pop(life.name), Bed.after(last, woke, now)
        elif proposal == "divide":
            everybody = len(self.awake) + len(self.asleep)
            if no_room(everybody, 0, self.most, 60.0 * len(self.awake), None):
                self.refused += 1
                return
            self.born += 1
            life.rate /= 2  # what came to one comes to two
            child = Life(
                f"{life.name}-child{self.born}",
                self.config,
                self.rng,
                "infant",
                75_000,
                life.rate,
                life.newness,
                now,
                life,
            )
            child.hear(Text("feed", min(life.lived // 2, 500_000), 0.5))  # the newer half of what its parent lived
            self._add(child)

    def _round(self) -> None:
        self.counts.append((len(self.awake), len(self.awake) + len(self.asleep)))
        if self.advice and self.awake:
            for name, appetite in self.advice(self.awake, self.cores).items():
                self.awake[name].appetites = appetite
        if self.exchange:
            self._trade()

    def _trade(self) -> None:
        """Every other round is a minute: each gives its newest, and each other one takes it, up to eight gifts (`Mesh.claim`)."""
        if len(self.counts) % 2:
            return
        gifts: list[tuple[Life, Text]] = []
        for life in self.awake.values():
            given = worth_giving(life.lived_since_gift)
            life.lived_since_gift.clear()
            life.taught += len(given)
            gifts += [(life, text) for text in given]
        for life in self.awake.values():
            for giver, text in [gift for gift in gifts if gift[0] is not life][:8]:
                new = text.new * (0.5 if giver.domain == life.domain else 1.0)
                life.hear(Text(f"mesh:{giver.name}", min(text.size, 4096), new))


DECIDERS: dict[str, Callable[[int], Advice | None]] = {
    "fixed rules": lambda seed: None,
    "metabolism": by_metabolism,
    "in proportion": lambda seed: in_proportion(),
    "the truth": lambda seed: by_truth,
}


def lived(options: argparse.Namespace, who: str, seed: int) -> Day:
    """A day that is over."""
    day = Day(options.organisms, options.cores, options.max, options.rate, seed, DECIDERS[who](seed), options.exchange)
    day.run(options.hours)
    day.advice = None  # a process cannot send it back
    return day


def summary(days: list[Day]) -> list[object]:
    mean = lambda of: statistics.mean(of(day) for day in days)
    awake = [count for day in days for count, _ in day.counts]
    return [
        f"{min(awake)}–{max(awake)}", max(total for day in days for _, total in day.counts), f"{mean(lambda d: d.born):.1f}",
        f"{mean(lambda d: d.hibernated):.0f}", f"{mean(lambda d: 60 * d.slept / max(1, d.hibernated)):.0f}",
        f"{mean(lambda d: d.latest) / 3600:.1f}", f"{mean(lambda d: d.spent) / 3600:.1f}",
        f"{mean(lambda d: d.improving / d.spent):.1%}",
        f"{mean(lambda d: statistics.mean(life.loss for life in (d.awake | d.asleep).values())):.3f}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--organisms", type=int, default=64)
    parser.add_argument("--hours", type=float, default=24.0)
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--max", type=int, default=128, help="organisms that may live")
    parser.add_argument("--rate", type=float, default=60_000, help="bytes an hour that come to each, in the mean")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--exchange", action="store_true")
    options = parser.parse_args()
    began, rows, shares = time.perf_counter(), [], {}
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        runs = {
            (who, seed): pool.submit(lived, options, who, seed) for who in DECIDERS for seed in range(options.seeds)
        }
        days = {of: run.result() for of, run in runs.items()}
    for who in DECIDERS:
        mine = [days[who, seed] for seed in range(options.seeds)]
        shares[who] = [day.improving / day.spent for day in mine]
        rows.append([who, *summary(mine)])
    head = [
        "who decides",
        "awake",
        "most alive",
        "born",
        "hibernated",
        "min a sleep",
        "a text waited, h",
        "core hours",
        "of them to improvers",
        "mean loss",
    ]
    print(
        table(
            f"A day of {options.organisms}: {options.hours:g} h, {options.cores} cores, {options.seeds} seeds",
            head,
            rows,
        )
    )
    pairs = [after / before - 1 for before, after in zip(shares["fixed rules"], shares["metabolism"])]
    print(f"Share to improvers, metabolism against fixed rules, seed by seed: {', '.join(f'{x:+.1%}' for x in pairs)}."
          f" {time.perf_counter() - began:.0f} s.")  # fmt: skip


if __name__ == "__main__":
    main()
