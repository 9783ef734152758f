"""A colony's rules, as functions of what is known at one moment: who may be born, who wakes, who is asked, what is given away.

The supervisor, the members and the simulated day (benchmarks/day.py) ask the same functions. When an organism should divide or
sleep is `organism.proposal`; what each should do more of is said by swarm/metabolism.py.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeVar

from organism import SEED_CORPUS, THOUGHT
from swarm.mesh import Mail

EMBRYO_MB = 60  # that one more organism is expected to take
NAP_BYTES = 16_384  # of text that wake a sleeper; twice as many after each nap
BRIEF = 600.0  # seconds: who sleeps again so soon after it was woken has only napped
MOST_NAPS = 5  # that count: then texts wait 32 times as long, and until they are half a megabyte
DISTINCTLY = 0.95  # of the best who is awake: the summary's bits a byte below which a sleeper is woken
# Sources that are never given away: what was said or thought, and what all have read.
PRIVATE = ("chat", "giant", THOUGHT, SEED_CORPUS)


class Row(Protocol):
    """Of what was lived."""

    @property
    def source(self) -> str: ...


_Row = TypeVar("_Row", bound=Row)


def no_room(living: int, expected: int, most: int, memory_mb: float, ram_gb: float | None) -> str | None:
    """Why nobody may be born where so many live, for `expected` more of whom places are kept already; None where one may."""
    if living + expected >= most:
        return f"{living} live in the colony, and --max is {most}."
    if ram_gb is not None and memory_mb + EMBRYO_MB * (1 + expected) > ram_gb * 1024:
        return f"{living} organisms fill --ram {ram_gb:g} GB."
    return None


class Bed(NamedTuple):
    """Of somebody who hibernates. since: when it fell asleep, in seconds; naps: how many times before this, one after the other, it
    was woken and slept again within BRIEF seconds."""

    since: float
    naps: int = 0

    @staticmethod
    def after(last: Bed | None, woke: float, now: float) -> Bed:
        """Of somebody who falls asleep now; `last`: the bed that it left when it woke, None where it has not slept yet."""
        return Bed(now, last.naps + 1 if last and now - woke < BRIEF else 0)


def stirs(mail: Mail, naps: int, patience: float) -> bool:
    """Whether what waits for a sleeper wakes it: a letter that wants something at once; else as many bytes of text as are worth it,
    or texts that have waited `patience` seconds. Who found nothing new in them is let sleep twice as long, naps after naps."""
    longer = 2 ** min(naps, MOST_NAPS)
    return mail.asks or mail.size >= NAP_BYTES * longer or (mail.size > 0 and mail.age >= patience * longer)


def who_wakes(
    beds: Mapping[str, Bed],
    mail: Mapping[str, Mail],
    awake: int,
    cores: int,
    rest: float,
    now: float,
    patience: float = math.inf,
) -> list[str]:
    """Of those who hibernate: whom their letters wake; and whoever has slept longest, while a core is idle and it has rested.
    `rest`, `patience`: life.rest_seconds, life.nap_seconds."""
    called = [name for name, bed in beds.items() if name in mail and stirs(mail[name], bed.naps, patience)]
    if called or not beds or awake >= cores:
        return called
    longest = min(beds, key=lambda name: beds[name].since)
    return [longest] if now - beds[longest].since >= rest else []


def worth_waking(known: Collection[str], asleep: Sequence[str], guesses: Mapping[str, float]) -> list[str]:
    """The sleeper, if any, that would be distinctly less surprised than the best who is awake (`known`), both by their summaries."""
    sleepers = [id for id in asleep if id in guesses]
    if not sleepers:
        return []
    best = min(sleepers, key=guesses.__getitem__)
    others = [guesses[id] for id in known if id in guesses]
    return [best] if not known or (others and guesses[best] < DISTINCTLY * min(others)) else []


def by_surprise(known: Mapping[str, float], keen: Mapping[str, float]) -> list[str]:
    """In which order those who said how surprised they are (bits a byte) are asked: the least surprised first, but of those whom the
    best does not distinctly surpass the keenest to answer (factors; 1 where nothing is said)."""
    best = min(known.values(), default=0.0)
    near = lambda id: best >= DISTINCTLY * known[id]
    return sorted(known, key=lambda id: (not near(id), -keen.get(id, 1.0) if near(id) else 0.0, known[id]))


def worth_giving(rows: Sequence[_Row]) -> list[_Row]:
    """Of what was lived since the last gift: the newest that was neither said nor thought, nor came from others."""
    return [row for row in rows if row.source not in PRIVATE and not row.source.startswith("mesh:")][-1:]
