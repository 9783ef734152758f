"""What layers compute on an accelerator, in torch: the same mathematics as the compiled operations, in float32.

A layer is a callable (x [n, width], step) -> x; a step says which tokens of which sequences. Layers with a memory (attention,
Gated DeltaNet) also say how it is made, loaded from a page of the machine's memory and saved to it (accelerator.DevicePages).

Attention is torch's own (`scaled_dot_product_attention`), except with sinks or capped scores, which it has not. Gated
DeltaNet reads a prompt in chunks by the inverse of a triangular matrix (arXiv 2412.06464, §3.3), which equals the step loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from organs.giant.accelerator import SLAB, Accelerator, DevicePages, Slots
from organs.giant.cache import PAGE, Page
from organs.giant.formats import FORMATS
from organs.giant.program import Rope
from organs.giant.torch_formats import dequantise

CHUNK = 64  # tokens that pass a recurrent layer together
GROUP = 32  # numbers that share a scale in a cache of 4 bits
DTYPES = dict(f32=torch.float32, f16=torch.float16, bf16=torch.bfloat16)
TINY = 1e-6  # under the root of a length, as in recurrent.py
CLAMP, SLOPE = 7.0, 1.702  # of gpt-oss's activation
ALL, CHOSEN, APART = range(3)  # as in experts.py
SILU, GELU, CLAMPED = range(3)


@dataclass
class Step:
    """Tokens on their way through the model. together: consecutive ones of a single sequence; else one of each."""

    positions: np.ndarray  # int64 [n]
    sequences: Sequence[DevicePages]
    together: bool
    angles: dict[Rope, tuple[Tensor, Tensor]] = field(default_factory=dict)
    after: list[Callable[[], None]] = field(default_factory=list)  # what happens when nothing can fail any more
    routes: list[tuple[int, Tensor, Tensor]] = field(
        default_factory=list
    )  # layer, chosen experts, whether numbers came

    def turned(self, rope: Rope, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines [n, 1, pairs], computed once a step in float64."""
        if rope not in self.angles:
            angle = self.positions[:, None] * np.array(rope.frequencies)
            both = (rope.magnitude * f(angle) for f in (np.cos, np.sin))
            self.angles[rope] = tuple(torch.from_numpy(x.astype(np.float32)).to(device)[:, None] for x in both)  # type: ignore[assignment]
        return self.angles[rope]


@dataclass
class Weight:
    """A matrix in the format of the file: raw uint8 [rows, bytes]."""

    raw: Tensor
    format: str

    @property
    def columns(self) -> int:
        form = FORMATS[self.format]
        return self.raw.shape[-1] // form.nbytes * form.block

    def rows(self, which: Tensor) -> Tensor:
        """float32 [..., columns] of these rows."""
        return dequantise(self.raw[which], self.format)

    def times(self, x: Tensor) -> Tensor:
        """float32 [n, rows]: x [n, columns] times the transposed matrix, a slab of rows at a time."""
        step = max(1, SLAB // (4 * self.columns))
        parts = [x @ dequantise(rows, self.format).T for rows in self.raw.split(step)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def norm(x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    """x over the root of its mean square, times the weights."""
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
    return y if weight is None else y * weight


def activated(gate: Tensor, up: Tensor, kind: int) -> Tensor:
    """act(gate) · up; gpt-oss: min(gate, 7) · sigmoid(1.702 gate) · (1 + up), up cut to ±7."""
    if kind == CLAMPED:
        gate, up = gate.clamp(max=CLAMP), up.clamp(-CLAMP, CLAMP)
        return gate * torch.sigmoid(SLOPE * gate) * (up + 1)
    return (F.gelu(gate, approximate="tanh") if kind == GELU else F.silu(gate)) * up


@dataclass
class Behind:
    """x + product + bias, or x + norm(product + bias): the end of a layer's part."""

    matrix: Weight
    bias: Tensor | None
    norm: Tensor | None
    epsilon: float

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        out = self.matrix.times(y)
        if self.bias is not None:
            out = out + self.bias
        return x + (out if self.norm is None else norm(out, self.norm, self.epsilon))


@dataclass
class FeedForward:
    """x + down(act(gate(norm(x))) · up(norm(x)))."""

    norm: Tensor
    gate: Weight
    up: Weight
    behind: Behind
    activation: int

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        y = norm(x, self.norm, self.behind.epsilon)
        return self.behind(x, activated(self.gate.times(y), self.up.times(y), self.activation))


# --- Keys and values. ---


class Kind:
    """How a cache of one kind stores vectors: planes, tensors [heads, positions, …] that together mean float32 numbers."""

    def __init__(self, name: str, head: int):
        self.name, self.head = name, head
        self.group = math.gcd(head, GROUP)

    def encode(self, x: Tensor) -> list[Tensor]:
        """Planes of x [heads, n, head]. q8: a scale for each vector; q4: a scale and a least value for each 32 of its numbers."""
        if self.name in DTYPES:
            return [x.to(DTYPES[self.name])]
        if self.name == "q8":
            scale = x.abs().amax(-1, keepdim=True) / 127
            return [torch.round(x / scale.clamp(min=1e-30)).to(torch.int8), scale]
        parts = x.reshape(*x.shape[:-1], -1, self.group)
        low, high = parts.amin(-1, keepdim=True), parts.amax(-1, keepdim=True)
        scale, low = ((high - low) / 15).half(), low.half()
        q = torch.round((parts - low.float()) / scale.float().clamp(min=1e-7)).clamp(0, 15).to(torch.uint8)
        q = q.reshape(*x.shape[:-1], -1)
        return [q[..., ::2] | q[..., 1::2] << 4, scale.squeeze(-1), low.squeeze(-1)]

    def decode(self, planes: Sequence[Tensor], end: int) -> Tensor:
        """[heads, end, head]: as it is stored where that is a number, else float32."""
        planes = [plane[:, :end] for plane in planes]
        if self.name in DTYPES:
            return planes[0]
        if self.name == "q8":
            return planes[0].float() * planes[1]
        q = torch.stack([planes[0] & 15, planes[0] >> 4], -1).reshape(*planes[0].shape[:-1], -1, self.group)
        return (q * planes[1].float()[..., None] + planes[2].float()[..., None]).flatten(-2)

    @property
    def count(self) -> int:
        """Planes."""
        return {"q8": 2, "q4": 3}.get(self.name, 1)


@dataclass
class Attention:
    """x + attention(norm(x)); what may be missing is None or 0. `inside`: where its part of a page begins."""

    accelerator: Accelerator
    before: Tensor  # weights of the norm
    matrices: tuple[Weight, Weight, Weight]  # queries, keys, values
    behind: Behind
    gates: Weight | None
    biases: tuple[Tensor | None, ...]
    whole: tuple[Tensor | None, ...]  # norms over all heads together
    norms: tuple[Tensor | None, ...]  # of each head of queries and keys
    rope: Rope | None
    sinks: Tensor | None
    queries: int
    heads: int
    head: int
    kinds: tuple[Kind, Kind]
    inside: int
    clamp: float
    window: int
    cap: float
    scale: float

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        y = norm(x, self.before, self.behind.epsilon)
        q, k, v = (self._heads(y, i) for i in range(3))
        if self.rope is not None:
            cosines, sines = step.turned(self.rope, x.device)
            q, k = (_rotated(z, cosines, sines, self.rope.split) for z in (q, k))
        if step.together:
            out = self._attend(step.sequences[0], int(step.positions[0]), q, k, v)
        else:
            rows = zip(step.sequences, step.positions.tolist(), q.split(1), k.split(1), v.split(1))
            out = torch.cat([self._attend(*row) for row in rows])
        if self.gates is not None:
            out = out * torch.sigmoid(self.gates.times(y))
        return self.behind(x, out)

    def _heads(self, y: Tensor, i: int) -> Tensor:
        """[n, heads, head] of queries, keys or values."""
        z = self.matrices[i].times(y)
        if (bias := self.biases[i]) is not None:
            z = z + bias
        if self.whole[i] is not None:
            z = norm(z, self.whole[i], self.behind.epsilon)
        if self.clamp:
            z = z.clamp(-self.clamp, self.clamp)
        z = z.reshape(len(y), -1, self.head)
        return z if self.norms[i] is None else norm(z, self.norms[i], self.behind.epsilon)

    def _attend(self, pages: DevicePages, start: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """float32 [n, queries · head]: n tokens of a sequence from `start` on, whose keys and values are remembered."""
        n, planes = len(q), pages.planes[self]
        new = [plane for kind, z in zip(self.kinds, (k, v)) for plane in kind.encode(z.transpose(0, 1))]
        for plane, more in zip(planes, new):
            plane[:, start : start + n] = more
        first = max(0, start - self.window + 1) if self.window else 0
        cut = self.kinds[0].count
        keys, values = (kind.decode(part, start + n)[:, first:]
                        for kind, part in zip(self.kinds, (planes[:cut], planes[cut:])))  # fmt: skip
        # Queries that share a head become heads of a batch, so that keys are read once and never repeated.
        q = q.reshape(n, self.heads, -1, self.head).permute(1, 2, 0, 3)
        keys, values = (z[:, None].expand(-1, q.shape[1], -1, -1) for z in (keys, values))
        at = torch.arange(start, start + n, device=q.device)[:, None] - torch.arange(first, start + n, device=q.device)
        seen = (at >= 0) & (at < self.window) if self.window else at >= 0
        if self.sinks is None and not self.cap:
            if keys.dtype != values.dtype or keys.dtype == torch.float32:
                keys, values = keys.float(), values.float()
            mask = None if n == 1 else seen
            out = F.scaled_dot_product_attention(q.to(keys.dtype), keys, values, attn_mask=mask, scale=self.scale)
        else:
            out = self._softmax(q @ keys.float().transpose(-1, -2) * self.scale, seen) @ values.float()
        return out.float().permute(2, 0, 1, 3).reshape(n, -1)

    def _softmax(self, scores: Tensor, seen: Tensor) -> Tensor:
        """Of scores [heads, group, n, positions]: capped, and with a sink that takes its share and gives nothing."""
        if self.cap:
            scores = self.cap * torch.tanh(scores / self.cap)
        scores = scores.masked_fill(~seen, float("-inf"))
        if self.sinks is None:
            return scores.softmax(-1)
        sinks = self.sinks.reshape(self.heads, -1, 1, 1).expand(*scores.shape[:3], 1)
        return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]

    # What a sequence keeps of it.

    def planes_of(self, positions: int, device: Any) -> list[Tensor]:
        """Empty planes for so many positions."""
        return [
            plane
            for kind in self.kinds
            for plane in kind.encode(torch.zeros(self.heads, positions, self.head, device=device))
        ]

    def make_room(self, pages: DevicePages, end: int) -> None:
        """Twice what there was, where `end` positions do not fit: a token costs the same on average, however many came before."""
        have = pages.planes.get(self)
        room = have[0].shape[1] if have else 0
        if end <= room:
            return
        wanted = -(-max(end, 2 * room) // PAGE) * PAGE
        size = sum(plane.nbytes for plane in self.planes_of(PAGE, "meta")) // PAGE
        self.accelerator.room(size * wanted, f"the cache of {wanted:,} tokens in a layer")
        planes = self.planes_of(wanted, self.accelerator.device)
        for old, new in zip(have or (), planes):
            new[:, :room] = old
        pages.planes[self] = planes

    def page_bytes(self) -> int:
        """Of this layer in a page."""
        return sum(plane.nbytes for plane in self.planes_of(PAGE, "meta"))

    def save(self, pages: DevicePages, page: Page, first: int) -> None:
        at = self.inside
        for plane in pages.planes[self]:
            data = self.accelerator.download(plane[:, first : first + PAGE].contiguous().view(torch.uint8)).reshape(-1)
            page.data[at : at + len(data)] = data
            at += len(data)

    def load(self, pages: DevicePages, page: Page, first: int) -> None:
        at = self.inside
        for plane in pages.planes[self]:
            target = plane[:, first : first + PAGE]
            data = self.accelerator.upload(page.data[at : at + target.nbytes].copy())
            plane[:, first : first + PAGE] = data.view(plane.dtype).reshape(target.shape)
            at += target.nbytes

    def load_state(self, pages: DevicePages) -> None: ...

    def save_state(self, pages: DevicePages) -> None: ...

    __hash__ = object.__hash__
    __eq__ = object.__eq__


def _rotated(x: Tensor, cosines: Tensor, sines: Tensor, split: bool) -> Tensor:
    """x [n, heads, head], its first pairs turned; a number's partner is half of the rotated part away, or its neighbour."""
    pairs = cosines.shape[-1]
    turned, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    a, b = (turned[..., :pairs], turned[..., pairs:]) if split else (turned[..., ::2], turned[..., 1::2])
    both = a * cosines - b * sines, b * cosines + a * sines
    turned = torch.cat(both, -1) if split else torch.stack(both, -1).flatten(-2)
    return torch.cat([turned, rest], -1)


# --- Gated DeltaNet. ---


@dataclass
class DeltaNet:
    """x + Gated DeltaNet of norm(x); see recurrent.py. States are float32: inputs [kernel - 1, channels], S [heads, key, value]."""

    accelerator: Accelerator
    before: Tensor
    matrices: tuple[Weight, Weight, Weight, Weight]  # queries, keys and values; z; β; α
    behind: Behind
    taps: Tensor  # [channels, kernel], oldest first
    decay: Tensor  # [value heads], negative
    bias: Tensor
    norm: Tensor
    key_heads: int
    value_heads: int
    key: int
    value: int
    is_tiled: bool
    at: int  # where its part of a sequence's memory begins

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        y = norm(x, self.before, self.behind.epsilon)
        qkv, z, beta, alpha = (matrix.times(y) for matrix in self.matrices)
        gains = self.decay * F.softplus(alpha + self.bias), torch.sigmoid(beta)
        if step.together:
            out = self._read(step, step.sequences[0], qkv, *gains)
        else:
            rows = zip(step.sequences, *(part.split(1) for part in (qkv, *gains)))
            out = torch.cat([self._read(step, *row) for row in rows])
        out = norm(out, self.norm, self.behind.epsilon) * F.silu(z.reshape(out.shape))
        return self.behind(x, out.flatten(1))

    def _read(self, step: Step, pages: DevicePages, qkv: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
        """float32 [n, value heads, value] of one sequence; its states move on when the step is over."""
        inputs, state = pages.states[self]
        longer = torch.cat([inputs, qkv])
        q, k, v = self._convolved(longer)
        parts = []
        for first in range(0, len(qkv), CHUNK):
            some = slice(first, first + CHUNK)
            out, state = _chunk(q[:, some], k[:, some], v[:, some], decay[some].T, beta[some].T, state)
            parts.append(out)
        after = longer[len(longer) - len(inputs) :].clone(), state
        step.after.append(lambda: pages.states.__setitem__(self, after))
        return torch.cat(parts, 1).transpose(0, 1)

    def _convolved(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys [value heads, n, key] and values, of rows that begin with the last inputs."""
        channels = len(self.taps)
        y = F.silu(F.conv1d(rows.T[None], self.taps[:, None], groups=channels)[0])
        q, k, v = y.split([self.key_heads * self.key, self.key_heads * self.key, self.value_heads * self.value])
        q, k = (z.reshape(self.key_heads, self.key, -1).transpose(1, 2) for z in (q, k))
        q, k = (z * torch.rsqrt(z.square().sum(-1, keepdim=True) + TINY) for z in (q, k))
        ratio = self.value_heads // self.key_heads
        more = (lambda z: z.repeat(ratio, 1, 1)) if self.is_tiled else (lambda z: z.repeat_interleave(ratio, 0))
        return more(q) / math.sqrt(self.key), more(k), v.reshape(self.value_heads, self.value, -1).transpose(1, 2)

    # What a sequence keeps of it.

    def shapes(self) -> list[tuple[int, ...]]:
        return [(self.taps.shape[1] - 1, len(self.taps)), (self.value_heads, self.key, self.value)]

    def memory_bytes(self) -> int:
        return 4 * sum(math.prod(shape) for shape in self.shapes())

    def make_room(self, pages: DevicePages, end: int) -> None:
        if self not in pages.states:
            self.accelerator.room(self.memory_bytes(), "a recurrent state")

    def load_state(self, pages: DevicePages) -> None:
        at, tensors = self.at, []
        for shape in self.shapes():
            data = pages.memory[at : at + 4 * math.prod(shape)].view(np.float32).reshape(shape)
            tensors.append(self.accelerator.upload(data.copy()))
            at += data.nbytes
        pages.states[self] = tuple(tensors)

    def save_state(self, pages: DevicePages) -> None:
        at = self.at
        for tensor in pages.states.get(self, ()):
            data = self.accelerator.download(tensor).reshape(-1).view(np.uint8)
            pages.memory[at : at + len(data)] = data
            at += len(data)

    def save(self, pages: DevicePages, page: Page, first: int) -> None: ...

    def load(self, pages: DevicePages, page: Page, first: int) -> None: ...

    __hash__ = object.__hash__
    __eq__ = object.__eq__


def _chunk(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """(outputs [heads, n, value], the state behind them) of n tokens: q, k [heads, n, key], log decays and β [heads, n]."""
    n, total, beta = q.shape[1], decay.cumsum(1), beta[..., None]
    later = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
    between = (total[:, :, None] - total[:, None]).masked_fill(later, float("-inf")).exp()
    passed = total.exp()[..., None]
    coupling = (beta * k @ k.transpose(1, 2) * between).tril(-1) + torch.eye(n, device=q.device)
    right = torch.cat([beta * v, beta * k * passed], -1)
    solved = torch.linalg.solve_triangular(coupling, right, upper=False, unitriangular=True)
    own, old = solved.split([v.shape[-1], k.shape[-1]], -1)
    delta = own - old @ state
    out = (q * passed) @ state + (q @ k.transpose(1, 2) * between) @ delta
    left = (total[:, -1:] - total).exp()[..., None]
    return out, state * passed[:, -1:] + (k * left).transpose(1, 2) @ delta


# --- Experts. ---


@dataclass
class Resident:
    """One way (gate, up or down) of a layer's experts, all of them on the accelerator: raw uint8 [experts, rows, bytes]."""

    raw: Tensor
    format: str
    bias: Tensor | None  # [experts, rows]


@dataclass
class Streamed:
    """One way of experts that are copied when they are wanted: where it lies in an expert's bytes."""

    at: int
    rows: int
    row_bytes: int
    format: str
    bias: Tensor | None


@dataclass
class Mixture:
    """x + Σ weight · expert(norm(x)) + the shared expert's; `elsewhere`, the CPU has the routed ones."""

    accelerator: Accelerator
    layer: int
    before: Tensor
    epsilon: float
    router: Weight
    router_bias: Tensor | None
    used: int
    gating: int
    normalised: bool
    scale: float
    inside: int
    activation: int
    ways: tuple[Resident | Streamed, ...]  # gate, up, down; empty: elsewhere
    shared: tuple[Weight, Weight, Weight] | None
    shared_gate: Weight | None
    elsewhere: Callable[[Tensor, Tensor], Callable[[], Tensor]] | None
    slots: Slots | None
    following: Mixture | None = None  # of the next layer, for guessing

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        y = norm(x, self.before, self.epsilon)
        logits = self.router.times(y)
        if self.elsewhere is not None:  # the shared expert is computed here while the CPU computes the others
            finish = self.elsewhere(x, logits)
            beside = self._shared(y)
            return finish() + beside if beside is not None else finish()
        weights, chosen = self._route(logits)
        step.routes.append((self.layer, chosen, logits.isfinite().all()))
        beside = self._shared(y)
        if self.slots is None and self._are_few(chosen.numel()):
            routed = self._few(y, chosen)
        else:
            routed = self._many(x, y, chosen)
        out = x + (routed.reshape(*chosen.shape, -1) * weights[..., None]).sum(1)
        return out if beside is None else out + beside

    def _numbers(self) -> int:
        """Bytes of one expert in float32."""
        return 12 * self.inside * self.router.columns

    def _are_few(self, pairs: int) -> bool:
        """Whether so many pairs of a token and an expert fit into a slab, and hardly repeat an expert."""
        return pairs <= self.router.raw.shape[0] and pairs * self._numbers() <= SLAB

    def _route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(weights, experts) [n, used], best first."""
        if self.router_bias is not None and self.gating == CHOSEN:
            logits = logits + self.router_bias
        best, chosen = logits.topk(self.used)
        if self.gating == APART:
            weights = best.sigmoid()
        elif self.gating == ALL and not self.normalised:
            weights = (best - logits.logsumexp(-1, keepdim=True)).exp()
        else:
            weights = best.softmax(-1)
        if self.gating == APART and self.normalised:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights * self.scale, chosen

    def _shared(self, y: Tensor) -> Tensor | None:
        if self.shared is None:
            return None
        gate, up, down = self.shared
        out = down.times(activated(gate.times(y), up.times(y), self.activation))
        return out if self.shared_gate is None else out * torch.sigmoid(self.shared_gate.times(y))

    def _few(self, y: Tensor, chosen: Tensor) -> Tensor:
        """[pairs, width]: each pair of a token and an expert by itself; nothing leaves the device."""
        pairs = chosen.reshape(-1)
        x = y.repeat_interleave(self.used, 0)[:, None]
        return self._through(x, pairs, None)[:, 0]

    def _many(self, x: Tensor, y: Tensor, chosen: Tensor) -> Tensor:
        """[pairs, width], sorted by expert, some experts at a time; those that are wanted often together."""
        guess = self._guess(x) if self.slots is not None and len(x) == 1 else None
        pairs = self.accelerator.download(torch.cat([chosen, guess]) if guess is not None else chosen)
        pairs, guessed = (pairs[:-1], pairs[-1]) if guess is not None else (pairs, None)
        flat = pairs.reshape(-1)
        counts = np.bincount(flat)
        experts = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
        if self.slots is not None:
            self.slots.judge(self.layer, set(experts.tolist()))
        order = np.argsort(flat, kind="stable")
        begins = np.searchsorted(flat[order], experts)
        out = torch.empty(len(flat), y.shape[1], device=y.device)
        wave = max(1, SLAB // self._numbers())
        if self.slots is not None:
            wave = min(wave, self.slots.count // 2)
        for first in range(0, len(experts), wave):
            some = experts[first : first + wave]
            held = None if self.slots is None else self.slots.take(self.layer, some.tolist())
            if self.slots is not None:  # what comes next is copied while this is computed
                if first + wave < len(experts):
                    self.slots.guess(self.layer, experts[first + wave : first + 2 * wave].tolist())
                elif guessed is not None and self.following is not None:
                    self.slots.guess(self.following.layer, guessed.tolist())
            most = int(counts[some[0]])
            places = begins[first : first + wave, None] + np.arange(most)
            is_real = np.arange(most) < counts[some][:, None]
            which = torch.from_numpy(order[np.where(is_real, places, 0)]).to(y.device)
            mask = torch.from_numpy(is_real).to(y.device)
            results = self._through(y[which // self.used], torch.from_numpy(some).to(y.device), held)
            out[which[mask]] = results[mask]
        return out

    def _guess(self, x: Tensor) -> Tensor | None:
        """[1, used]: the experts that the next layer's router would choose for this state."""
        if self.following is None or not (self.slots and self.slots.is_prefetching):
            return None
        other = self.following
        return other._route(other.router.times(norm(x, other.before, other.epsilon)))[1]

    def _through(self, x: Tensor, experts: Tensor, held: Tensor | None) -> Tensor:
        """[experts, tokens, width]: x [experts, tokens, width] through each of these experts."""
        gate, up, down = ((self._matrix(way, experts, held), way.bias) for way in self.ways)

        def product(z: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
            out = z @ matrix.transpose(1, 2)
            return out if bias is None else out + bias[experts][:, None]

        return product(activated(product(x, *gate), product(x, *up), self.activation), *down)

    def _matrix(self, way: Resident | Streamed, experts: Tensor, held: Tensor | None) -> Tensor:
        """float32 [experts, rows, columns]."""
        if isinstance(way, Resident):
            return dequantise(way.raw[experts], way.format)
        assert held is not None
        part = held[:, way.at : way.at + way.rows * way.row_bytes]
        return dequantise(part.reshape(len(held), way.rows, way.row_bytes), way.format)
