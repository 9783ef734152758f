"""Gated DeltaNet: layers that remember in a matrix of fixed size for each head instead of in keys and values of all tokens.

S_t = g_t S_{t-1} + k_t δ_tᵀ with δ_t = β_t (v_t - (g_t S_{t-1})ᵀ k_t), and o_t = S_tᵀ q_t. Before that, queries, keys and values
pass a causal convolution over a few tokens and SiLU, and queries and keys get the length 1; behind it, a norm and a gate.

The state is swept once a token, not thrice: a sweep adds the token before to S and in the same pass takes k_tᵀ S and q_tᵀ S,
out of which δ_t and o_t follow (o_t = g_t q_tᵀ S + (q_t · k_t) δ_t). S is cut into strips of two vectors of columns, which
do not need each other; a prompt sends all its tokens through one strip, which stays in the nearest cache, before the next.
On a CPU that needs fewer operations than the chunked form with its triangular inverse, and no other rounding than the steps.

Sources: Gated Delta Networks (arXiv 2412.06464); Qwen3-Next as in `transformers` (modeling_qwen3_next.py), its oracle.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from organs.giant.engine import HELP, barrier, exp, f4, floats, ground, i8, jit, longs, operation, record_at
from organs.giant.engine import _root_mean_square as root_mean_square
from organs.giant.engine import _share as share
from organs.giant.gguf import GGUFError, GGUFFile
from organs.giant.lanes import F32, LANES, Loop, const, fma, function, load, splat, store, vector, word
from organs.giant.products import ROWS
from organs.giant.program import Recorder

STRIP = 2 * LANES  # columns of a state that are swept together
TINY = f4(1e-6)  # under the root of a length, as `transformers` has it
FLOATS = vector(F32, LANES)

_WORDS = (
    "qkv", "qkv_stride", "z", "z_stride", "beta", "beta_stride", "alpha", "alpha_stride",  # inputs, float32 a token
    "out", "out_stride",  # [n, value_heads · value], float32
    "gains", "gains_stride",  # room for g and β of every head
    "taps", "kernel",  # float32 [kernel, channels], oldest first
    "decay", "step", "norm",  # float32 [value_heads] (negative), [value_heads], [value]
    "key_heads", "value_heads", "key", "value",  # numbers of heads, and sizes
    "tiled",  # a head of values belongs to head i mod key_heads of keys, instead of to i / (value_heads / key_heads)
    "inputs", "states",  # of a sequence's memory: where the convolution's last inputs and the states begin
)  # fmt: skip
DELTA = np.dtype([(n, i8) for n in _WORDS] + [("epsilon", np.float64)], align=True)
"""A layer of Gated DeltaNet. Channels are those of all queries, then keys, then values."""

_delta = record_at(DELTA)


def _sweep(b, state, before, key, query, rows, gain, space):
    """state [rows, STRIP] = gain · state + before ⊗ space[0]; space[1] = keyᵀ state, space[2] = queryᵀ state (space [3, STRIP])."""
    parts = STRIP // LANES
    deltas = [load(b, space, FLOATS, 4 * LANES * i, 4) for i in range(parts)]
    g = splat(b, gain, LANES)
    loop = Loop(b, rows, [const(FLOATS, 0.0)] * (2 * parts))
    at, row = b.mul(loop.i, word(4 * STRIP)), b.mul(loop.i, word(4))
    k0, k, q = (splat(b, load(b, b.add(x, row), F32, 0, 4), LANES) for x in (before, key, query))
    sums = list(loop.now)
    for i in range(parts):
        s = load(b, b.add(state, at), FLOATS, 4 * LANES * i, 4)
        s = fma(b, k0, deltas[i], b.fmul(s, g))
        store(b, s, b.add(state, at), 4 * LANES * i, 4)
        sums[i], sums[parts + i] = fma(b, k, s, sums[i]), fma(b, q, s, sums[parts + i])
    for i, total in enumerate(loop.close(sums)):
        store(b, total, space, 4 * (STRIP + LANES * i), 4)


_sweep_strip = function("void(int64, int64, int64, int64, int64, float32, int64)", _sweep)


@jit(**HELP)
def _convolve(d, memory, rows, stride, n, first, count, space):
    """Channels first to first + count of n tokens in order become SiLU(convolution); the memory's last inputs move on."""
    channels, K = 2 * d.key_heads * d.key + d.value_heads * d.value, d.kernel
    old = memory + d.inputs
    for i in range(K - 1):  # the inputs that the next token will see, before they are written over
        source = rows + (n - K + 1 + i) * stride if n - K + 1 + i >= 0 else old + 4 * channels * (n + i)
        kept, x = floats(space, i * count, count), floats(source, first, count)
        for c in range(count):
            kept[c] = x[c]
    for t in range(n - 1, -1, -1):  # backwards, so that it can be done in place
        y, w = floats(rows + t * stride, first, count), floats(d.taps, (K - 1) * channels + first, count)
        for c in range(count):
            y[c] *= w[c]
        for j in range(K - 1):
            at = t - K + 1 + j
            x = floats(rows + at * stride if at >= 0 else old + 4 * channels * (K - 1 + at), first, count)
            w = floats(d.taps, j * channels + first, count)
            for c in range(count):
                y[c] += w[c] * x[c]
    for t in range(n):
        y = floats(rows + t * stride, first, count)
        for c in range(count):
            y[c] /= f4(1) + exp(-ground.maximum(y[c], f4(-80)))
    for i in range(K - 1):
        kept, x = floats(space, i * count, count), floats(old, channels * i + first, count)
        for c in range(count):
            x[c] = kept[c]


@jit(**HELP)
def _lengthen(x, n, factor):
    """x [n] becomes factor · x / |x|."""
    v, total = floats(x, 0, n), TINY
    for i in range(n):
        total += v[i] * v[i]
    scale = factor / f4(math.sqrt(total))
    for i in range(n):
        v[i] *= scale


@jit(**HELP)
def _prepare(m, d):
    """Convolve all channels, head by head, normalise queries and keys, and compute every token's g and β."""
    heads, space = 2 * d.key_heads + d.value_heads, m.own + m.scratch
    memories = longs(m.memories, m.n)
    first, end = share(heads, m)
    for head in range(first, end):
        is_value = head >= 2 * d.key_heads
        count = d.value if is_value else d.key
        at = 2 * d.key_heads * d.key + (head - 2 * d.key_heads) * d.value if is_value else head * d.key
        if m.together:
            _convolve(d, memories[0], d.qkv, d.qkv_stride, m.n, at, count, space)
        else:
            for t in range(m.n):
                _convolve(d, memories[t], d.qkv + t * d.qkv_stride, d.qkv_stride, 1, at, count, space)
        if not is_value:
            factor = f4(1 / math.sqrt(d.key)) if head < d.key_heads else f4(1)
            for t in range(m.n):
                _lengthen(d.qkv + t * d.qkv_stride + 4 * at, count, factor)
    first, end = share(m.n, m)
    decay, step = floats(d.decay, 0, d.value_heads), floats(d.step, 0, d.value_heads)
    for t in range(first, end):
        beta, alpha = (
            floats(d.beta + t * d.beta_stride, 0, d.value_heads),
            floats(d.alpha + t * d.alpha_stride, 0, d.value_heads),
        )
        gains = floats(d.gains + t * d.gains_stride, 0, 2 * d.value_heads)
        for h in range(d.value_heads):
            x = alpha[h] + step[h]
            soft = x if x > f4(20) else f4(math.log1p(math.exp(x)))
            gains[2 * h] = f4(math.exp(decay[h] * soft))
            gains[2 * h + 1] = f4(1) / (f4(1) + f4(math.exp(-beta[h])))


@jit(**HELP)
def _advance(d, memory, first, n, head, strip, space):
    """Tokens first to first + n of one sequence go through one strip of one head's state."""
    key_head = head % d.key_heads if d.tiled else head * d.key_heads // d.value_heads
    strips = (d.value + STRIP - 1) // STRIP
    state = memory + d.states + 4 * (head * strips + strip) * d.key * STRIP
    count = min(STRIP, d.value - strip * STRIP)
    delta, from_key, from_query = floats(space, 0, STRIP), floats(space, STRIP, STRIP), floats(space, 2 * STRIP, STRIP)
    nothing = space + 12 * STRIP
    zeros = floats(nothing, 0, d.key)
    for i in range(d.key):
        zeros[i] = f4(0)
    for i in range(STRIP):
        delta[i] = f4(0)
    before, gain = nothing, f4(1)
    for t in range(first, first + n):
        row = d.qkv + t * d.qkv_stride
        query, key = row + 4 * key_head * d.key, row + 4 * (d.key_heads + key_head) * d.key
        v = floats(row + 4 * 2 * d.key_heads * d.key, head * d.value + strip * STRIP, count)
        out = floats(d.out + t * d.out_stride, head * d.value + strip * STRIP, count)
        _sweep_strip(state, before, key, query, d.key, gain, space)
        gains = floats(d.gains + t * d.gains_stride, 2 * head, 2)
        q, k, both = floats(query, 0, d.key), floats(key, 0, d.key), f4(0)
        for i in range(d.key):
            both += q[i] * k[i]
        gain, beta = gains[0], gains[1]
        for i in range(count):
            delta[i] = beta * (v[i] - gain * from_key[i])
            out[i] = gain * from_query[i] + both * delta[i]
        before = key
    _sweep_strip(state, before, nothing, nothing, d.key, gain, space)


@jit(**HELP)
def _finish(m, d):
    """out = norm(out) · SiLU(z), head by head."""
    weights = floats(d.norm, 0, d.value)
    first, end = share(m.n * d.value_heads, m)
    for item in range(first, end):
        t, h = item // d.value_heads, item % d.value_heads
        at = d.out + t * d.out_stride + 4 * h * d.value
        x, z = floats(at, 0, d.value), floats(d.z + t * d.z_stride, h * d.value, d.value)
        factor = root_mean_square(at, d.value, d.epsilon)
        for i in range(d.value):
            x[i] *= factor * weights[i] * z[i] / (f4(1) + exp(-ground.maximum(z[i], f4(-80))))


@operation
def delta_net(r, m):
    """From projections to what the output matrix takes; the sequences' memories move on by their tokens."""
    d = _delta(r.more)
    _prepare(m, d)
    barrier(m)
    memories, strips = longs(m.memories, m.n), (d.value + STRIP - 1) // STRIP
    first, end = share(d.value_heads * strips, m)
    for item in range(first, end):
        if m.together:
            _advance(d, memories[0], 0, m.n, item // strips, item % strips, m.own + m.scratch)
        else:
            for t in range(m.n):
                _advance(d, memories[t], t, 1, item // strips, item % strips, m.own + m.scratch)
    barrier(m)
    _finish(m, d)


# --- Recording. ---


@dataclass(frozen=True)
class Sizes:
    """A layer of Gated DeltaNet, as the metadata says."""

    key: int
    value: int
    key_heads: int
    value_heads: int
    kernel: int

    @property
    def channels(self) -> int:
        """Of queries, keys and values together."""
        return 2 * self.key_heads * self.key + self.value_heads * self.value

    @classmethod
    def of(cls, file: GGUFFile) -> Sizes:
        """Raises GGUFError for what is missing or impossible."""
        number = lambda key: file.get(f"{file.architecture}.ssm.{key}", int)
        names = ("state_size", "group_count", "time_step_rank", "inner_size", "conv_kernel")
        dk, nk, nv, inner, kernel = (number(n) for n in names)
        if (
            min(dk, nk, nv, inner) < 1
            or kernel < 2
            or nv % nk
            or inner % nv
            or max(dk, inner // nv) > 4096
            or kernel > 64
        ):
            raise GGUFError(
                f"{file.path}: {nk} and {nv} heads of {dk} and {inner}, kernel {kernel}: that makes no Gated DeltaNet"
            )
        return cls(dk, inner // nv, nk, nv, kernel)


def projections(r: Recorder, block: str, d: Sizes) -> list[tuple[str, int, np.ndarray | None, int | None]]:
    """(tensor, rows, which rows, of how many) of queries, keys and values together, of z, of β and of α.

    From split tensors, or from fused ones of old files, whose rows are sorted by head of keys.
    """
    z, ratio = d.value_heads * d.value, d.value_heads // d.key_heads
    if r.has(block + "attn_qkv.weight"):
        out = [(block + "attn_qkv.weight", d.channels, None, None), (block + "attn_gate.weight", z, None, None)]
    else:
        rows = np.arange(d.channels + z).reshape(d.key_heads, -1)
        q, k, v, gate = np.split(rows, np.cumsum([d.key, d.key, ratio * d.value]), 1)
        orders = np.concatenate([part.reshape(-1) for part in (q, k, v)]), gate.reshape(-1)
        out = [(block + "ssm_in.weight", len(o), o, d.channels + z) for o in orders]
    if r.has(block + "ssm_ba.weight"):
        rows = np.arange(2 * d.value_heads).reshape(d.key_heads, 2, ratio)
        orders = [rows[:, i].reshape(-1) for i in (0, 1)]
        return [*out, *((block + "ssm_ba.weight", d.value_heads, o, 2 * d.value_heads) for o in orders)]
    return [*out, *((f"{block}ssm_{n}.weight", d.value_heads, None, None) for n in ("beta", "alpha"))]


def constants(r: Recorder, block: str) -> tuple[str, str]:
    """The tensors of decays and of what is added to α, which files name in two ways."""
    decay = block + ("ssm_a" if r.has(block + "ssm_a") else "ssm_a.weight")
    return decay, block + ("ssm_dt.bias" if r.has(block + "ssm_dt.bias") else "ssm_dt")


def mix(r: Recorder, layer: int, *, is_tiled: bool) -> None:
    """x += Gated DeltaNet of norm(x)."""
    s, block, d = r.shape, f"blk.{layer}.", np.zeros(1, DELTA)
    sizes = Sizes.of(r.file)
    dk, dv, nk, nv, kernel = sizes.key, sizes.value, sizes.key_heads, sizes.value_heads, sizes.kernel
    norm = r.keep(r.vector(block + "attn_norm.weight", s.width))
    matrices = [
        r.matrix(name, rows, s.width, order=order, of=of) for name, rows, order, of in projections(r, block, sizes)
    ]
    a = r.quantise("x", (r.x, r.x_stride), s.width, matrices, norm)
    for name, matrix in zip(("qkv", "z", "beta", "alpha"), matrices, strict=True):
        d[0][name], d[0][f"{name}_stride"] = target = r.buffered(f"delta {name}", matrix.panels * ROWS)
        r.product(a, matrix, target, barrier=int(name == "alpha"))
    taps = np.ascontiguousarray(r.array(block + "ssm_conv1d.weight", (sizes.channels, kernel)).T)
    gains, out = r.buffered("delta gains", 2 * nv), r.buffered("delta out", nv * dv)
    inputs = -(-4 * sizes.channels * (kernel - 1) // 64) * 64
    facts = dict(out=out[0], out_stride=out[1], gains=gains[0], gains_stride=gains[1], taps=r.keep(taps), kernel=kernel,
                 **{field: r.keep(r.vector(name, nv)) for field, name in zip(("decay", "step"), constants(r, block))},
                 norm=r.keep(r.vector(block + "ssm_norm.weight", dv)), key_heads=nk, value_heads=nv, key=dk, value=dv,
                 tiled=is_tiled, inputs=r.memory_bytes, states=r.memory_bytes + inputs, epsilon=s.epsilon)  # fmt: skip
    for name, value in facts.items():
        d[0][name] = value
    r.has_state = True
    r.memory_bytes += inputs + 4 * nv * -(-dv // STRIP) * STRIP * dk
    r.need(4 * max((kernel - 1) * max(dk, dv), 3 * STRIP + dk))
    r.row("delta_net", more=r.keep(d), barrier=1)
    matrix = r.matrix(block + "ssm_out.weight", s.width, nv * dv)
    r.wide(nv * dv)
    a = r.quantise("delta", out, nv * dv, [matrix])
    r.product(a, matrix, (r.x, r.x_stride), add=1, barrier=1)
