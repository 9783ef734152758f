"""Which way of loading a model suits a machine: `organism giant plan MODEL.gguf --vram GB --ram GB`, and `--offload auto`.

What fits is arithmetic over the file's tensors. How fast it will be is a model of roofs, whose numbers are measured here: bytes
that a token reads over the speed at which such matrices are multiplied where they lie, and bytes that are missing there over
the bandwidth of the way to them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from organs.giant.accelerator import STREAMED, WORKSPACE, Accelerator, Speeds, layers_of, measure
from organs.giant.gguf import GGUFFile
from organs.giant.program import Shape

SHARE = 0.92  # of the speed of products alone that decoding reaches (docs/benchmarks.md)
COPIED_AHEAD = 0.3  # of experts that an accelerator lacks, how many are copied ahead, as long as computing takes
FORESEEN = 0.78  # of experts that are away, how many are asked for before their layer's attention (docs/decisions.md) …
IN_VAIN = 1.25  # … and how many are read then for each of them, wrong guesses with it
SKEW = 0.8  # popularity of experts ∝ rank^-0.8, as in text
KEPT = 1 / 3  # of its experts, a token shares with the one before it
FEWER = 0.85  # of the experts that would be away, if those stayed that are popular or were used last, are: routers' opinions say more
INTERPRETER = 200 << 20  # bytes that Python, NumPy and compiled code take
CONTEXT = 8192  # tokens that are planned for where nobody says how many
LEAST = 4  # times as many experts as a token uses in a layer have to have room


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model."""

    dense: int  # all but routed experts
    table: int  # of that, the table of embeddings, of which a token reads one row
    head: int  # and what makes logits
    ways: dict[str, int]  # routed experts' gate, up and down matrices
    used: int  # experts that a token uses in a layer
    count: int  # experts of a layer
    layers: int  # with experts
    depth: int  # all layers
    cache: int  # keys and values of the whole context
    format: str  # of most of the bytes

    @property
    def experts(self) -> int:
        return sum(self.ways.values())

    @property
    def expert(self) -> int:
        """One expert of one layer."""
        return self.experts // max(1, self.layers * self.count)

    @property
    def active_dense(self) -> int:
        """What a token reads of all but routed experts."""
        return self.dense - self.table

    @property
    def active_experts(self) -> int:
        return self.experts * self.used // self.count

    @property
    def active(self) -> int:
        """What a token reads."""
        return self.active_dense + self.active_experts

    @classmethod
    def of(cls, file: GGUFFile, context: int, kv_cache: str) -> Sizes:
        """Raises GGUFError for a file that is no model."""
        from organs.giant.attention import layout_of
        from organs.giant.giant import kinds_of

        shape, name = Shape.of(file), file.architecture
        routed = {n: i for n, i in file.tensors.items() if "_exps." in n}
        ways = {
            way: sum(i.nbytes for n, i in routed.items() if f"ffn_{way}_exps" in n) for way in ("gate", "up", "down")
        }
        both = sum(i.nbytes for n, i in routed.items() if "ffn_gate_up_exps" in n)
        ways |= dict(gate=ways["gate"] + both // 2, up=ways["up"] + both - both // 2)
        used = int(file.metadata.get(f"{name}.expert_used_count", 0)) if routed else 0
        count = int(file.metadata.get(f"{name}.expert_count", 1)) if routed else 1
        attended = len([n for n in file.tensors if n.endswith(".attn_k.weight")])
        table = file.tensors["token_embd.weight"].nbytes if "output.weight" in file.tensors else 0
        stretch = layout_of(*kinds_of(kv_cache), shape.head)["stretch"]
        cache = -(-context // 64) * attended * shape.heads * stretch
        formats: dict[str, int] = {}
        for info in file.tensors.values():
            formats[info.format] = formats.get(info.format, 0) + info.nbytes
        dense = sum(formats.values()) - sum(ways.values())
        layers = len({n.split(".")[1] for n in routed})
        head = file.tensors.get("output.weight", file.tensors["token_embd.weight"]).nbytes
        return cls(
            dense, table, head, ways, used, count, layers, shape.layers, cache, max(formats, key=lambda f: formats[f])
        )


@dataclass(frozen=True)
class Reading:
    """What it takes to bring experts from the file to memory, packed."""

    first: float  # seconds of one alone, beside what each costs
    each: float  # seconds
    work: float = 0.0  # seconds for each in which nothing is computed, since readers pack it

    def waiting(self, used: int, rate: float, before: float, within: float) -> float:
        """Seconds that a layer waits for some of the `used` experts of a token, of which a share `rate` is away.

        before: seconds that it computes before its router chooses, in which guesses are read; within: those of its experts, of
        which those that are there are computed while the others are read.
        """
        total = 0.0
        for away in range(1, used + 1):
            chance = math.comb(used, away) * rate**away * (1 - rate) ** (used - away)
            begun = max(0.0, IN_VAIN * FORESEEN * away * self.each - before)
            reading = self.first + begun + (1 - FORESEEN) * away * self.each
            total += chance * max(0.0, reading - within * (1 - away / used))
        return total


@dataclass(frozen=True)
class Machine:
    """What a machine has, in bytes and bytes a second; what was not measured is not a number."""

    ram: float
    bandwidth: float  # of the memory, for products of the file's format
    disk: Reading | None  # of experts that are away; None: the model has none
    vram: float = 0.0  # of an accelerator; 0: there is none
    speeds: Speeds = Speeds(math.nan, math.nan, 0)


@dataclass(frozen=True)
class Choice:
    """One way to load the model: whether it fits, and what can be expected of it."""

    offload: str
    memory: int  # bytes of the machine's memory
    vram: int  # bytes of the accelerator's
    fits: bool
    tokens_per_s: float  # while decoding; not a number where the accelerator could not be measured
    reason: str


def choices(sizes: Sizes, machine: Machine) -> Iterator[Choice]:
    """All ways, the one that needs the most memory first."""
    if machine.vram:
        yield from _on_accelerator(sizes, machine)
        return
    whole = sizes.dense + sizes.experts + sizes.cache + INTERPRETER
    seconds = sizes.active / (SHARE * machine.bandwidth)
    yield Choice(
        "none", whole, 0, whole <= machine.ram, 1 / seconds, f"every token reads {sizes.active / 1e9:.2f} GB of memory"
    )
    if sizes.experts:
        yield _from_disk(sizes, machine, sizes.dense + sizes.cache, 0, seconds)


def _from_disk(sizes: Sizes, machine: Machine, fixed: int, vram: int, seconds: float) -> Choice:
    """fixed: bytes in the machine's memory beside experts; seconds: of a token without reading."""
    fixed += INTERPRETER
    slots, every = int((machine.ram - fixed) // sizes.expert), sizes.count * sizes.layers
    if slots < min(LEAST * sizes.used, every):
        need = fixed + LEAST * sizes.used * sizes.expert
        return Choice("disk", need, vram, False, 0.0, f"at least {need / 1e9:.1f} GB are needed")
    slots = min(slots, every)
    rate = miss_rate(slots / every, sizes.count, sizes.used)
    missed, own = sizes.used * sizes.layers * rate, seconds * sizes.active_experts / sizes.active / sizes.layers
    before = seconds * (1 - sizes.head / sizes.active) / sizes.layers - own
    if machine.disk:
        seconds += sizes.layers * machine.disk.waiting(sizes.used, rate, before, own)
        seconds += missed * (1 - FORESEEN + FORESEEN * IN_VAIN) * machine.disk.work
    else:
        seconds = math.nan
    reason = f"{slots} of {every} experts in memory; about {missed:.1f} are read for a token"
    return Choice("disk", fixed + slots * sizes.expert, vram, vram <= machine.vram or not vram, 1 / seconds, reason)


def _not_hidden(moving: float, computing: float) -> float:
    """Seconds of a token in which an accelerator waits for experts: those that were foreseen are copied while it computes."""
    return moving - min(COPIED_AHEAD * moving, computing)


def _on_accelerator(sizes: Sizes, machine: Machine) -> Iterator[Choice]:
    speeds, vram, ram = machine.speeds, machine.vram, machine.ram
    fixed = sizes.dense + sizes.cache + WORKSPACE
    dense, experts = sizes.active_dense / speeds.weights, sizes.active_experts / speeds.weights
    by_cpu = sizes.active_experts / (SHARE * machine.bandwidth)
    whole = fixed + sizes.experts
    yield Choice("none", INTERPRETER, whole, whole <= vram, 1 / (dense + experts), "all on the accelerator")
    for offload, ways in STREAMED.items() if sizes.experts else ():
        host = sum(sizes.ways[way] for way in ways)
        piece = host // (sizes.count * sizes.layers)
        rest = fixed + sizes.experts - host
        slots = max(LEAST * sizes.used, min(sizes.count * sizes.layers, int((vram - rest) // max(1, piece))))
        missed = sizes.used * sizes.layers * miss_rate(slots / (sizes.count * sizes.layers), sizes.count, sizes.used)
        seconds = dense + experts + _not_hidden(missed * piece / speeds.link, dense + experts)
        fits = rest + LEAST * sizes.used * piece <= vram and host + INTERPRETER <= ram
        reason = (
            f"{' and '.join(ways)} of {slots} experts fit beside the rest; about {missed:.1f} are copied for a token"
        )
        yield Choice(offload, host + INTERPRETER, rest + slots * piece, fits, 1 / seconds, reason)
    if sizes.experts:
        host = sizes.experts + INTERPRETER
        yield Choice(
            "experts",
            host,
            fixed,
            fixed <= vram and host <= ram,
            1 / (dense + by_cpu),
            "experts are computed by the CPU",
        )
        yield _from_disk(sizes, machine, 0, fixed, dense + by_cpu)
        return
    layer = (sizes.dense - sizes.table) / sizes.depth
    n = max(0, min(sizes.depth, int((vram - WORKSPACE - sizes.table) // (layer + sizes.cache / sizes.depth))))
    share = n / sizes.depth
    seconds = share * dense + (1 - share) * sizes.active_dense / (SHARE * machine.bandwidth)
    host = int((1 - share) * (sizes.dense + sizes.cache)) + INTERPRETER
    there = int(share * (sizes.dense + sizes.cache)) + sizes.table + WORKSPACE
    yield Choice(f"layers={n}", host, there, n > 0 and host <= ram, 1 / seconds, f"{n} of {sizes.depth} layers fit")


def best_of(found: Sequence[Choice]) -> Choice | None:
    """The fastest that fits; where speeds are not known, the first, which has the most on the accelerator."""
    fitting = [choice for choice in found if choice.fits]
    known = [choice for choice in fitting if not math.isnan(choice.tokens_per_s)]
    return max(known, key=lambda choice: choice.tokens_per_s) if known else next(iter(fitting), None)


def look(
    file: GGUFFile, sizes: Sizes, threads: int, accelerator: Accelerator | None, ram: float | None
) -> list[Choice]:
    """Measure this machine for a second, and what it can be expected to do with a file. ram: bytes; None: what is free."""
    return list(choices(sizes, measured(file, sizes, threads, accelerator, ram, seconds=1.0)))


def measured(file: GGUFFile, sizes: Sizes, threads: int, accelerator: Accelerator | None, ram: float | None,
             vram: float | None = None, seconds: float = 3.0) -> Machine:  # fmt: skip
    """This machine's numbers, of so many seconds of reading its disk; ram, vram: bytes of another one's."""
    from organs.giant.giant import free_memory
    from organs.giant.residency import reading_seconds
    from organs.giant.roofs import product_roof

    free = free_memory()
    bandwidth = 1e9 * product_roof(sizes.format, min(1 << 29, free // 4), threads, rounds=int(10 * seconds))
    disk = None
    if sizes.experts:
        first, each, work = reading_seconds(file, seconds)
        disk = Reading(first, each, work / threads)  # readers take turns with all threads that compute
    machine = Machine(ram or free, bandwidth, disk, vram or 0.0)
    if accelerator is None:
        return machine
    return replace(machine, vram=vram or float(accelerator.budget), speeds=measure(accelerator, sizes.format))


def too_large(sizes: Sizes, offload: str, free: int, accelerator: Accelerator | None) -> str | None:
    """What is wrong with loading a model so, with what would do; None if nothing is. free: bytes of the machine's memory.

    Keys and values are left out: they take memory when tokens come.
    """
    sizes = replace(sizes, cache=0)
    machine = Machine(free, math.nan, None, float(accelerator.budget) if accelerator else 0.0)
    found = list(choices(sizes, machine))
    if layers_of(offload) is not None or offload == "disk":
        return None  # said where they are loaded, when it is known what else is there
    mine = next((choice for choice in found if choice.offload == offload), None)
    if mine is None or mine.fits:
        return None
    others = [choice.offload for choice in found if choice.fits]
    hint = f"--offload {others[0]} fits" if others else "a smaller model or format is needed"
    there = f", {machine.vram / 1e9:.1f} GB of the accelerator's" if accelerator else ""
    needs = f"{mine.memory / 1e9:.1f} GB of memory" + (
        f" and {mine.vram / 1e9:.1f} GB of the accelerator's" if accelerator else ""
    )
    return f"it needs {needs}, and there are {free / 1e9:.1f} GB{there}; {hint}"


def miss_rate(share: float, experts: int, used: int) -> float:
    """Of the experts that a token wants, how many are away, if a `share` is in memory.

    Those are the most popular ones, popularity ∝ rank^-SKEW, and what the last token wanted: two in a row share KEPT of their
    experts, by their text where chance alone gives less.
    """
    popular = np.arange(1, experts + 1) ** -SKEW
    chance = 1 - np.exp(-popular * _rate(popular, used))
    again = float((chance**2).sum() / chance.sum())
    sticky = max(0.0, (KEPT - again) / (1 - again)) if again < 1 else 0.0
    return FEWER * (1 - sticky) * float(chance[round(share * experts) :].sum() / chance.sum())


def _rate(popular: np.ndarray, used: int) -> float:
    """How often to draw so that `used` different ones are drawn on average."""
    low, high = 0.0, 1e6
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 - np.exp(-popular * middle)).sum() < used else (low, middle)
    return high
