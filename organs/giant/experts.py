"""Mixtures of experts: a layer's feed-forward in which a router chooses a few of many small ones for every token.

One operation does all of it. A single token: every thread finds the chosen experts by itself, then takes its share of their
panels, all experts together; the router's weight rides on the activations inside, so that the way back only adds up. A
prompt: tokens are sorted by expert, each expert's tokens become tiles (or, where they are few, single ones) that pass a panel
together; threads share first the experts, then the columns of the output, so that nothing is added to by two of them and the
order of sums is fixed.

A shared expert, which every token passes, is a family of its own with one member. Where an expert's panels are is read from
a table at every step: so an expert may be elsewhere in the next one, or not in memory at all (organs/giant/residency.py).

Sources: Shazeer et al. (arXiv 1701.06538), Mixtral (2401.04088), OLMoE (2409.02060), gpt-oss (2508.10925).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from organs.giant.engine import (
    BLOCK,
    HELP,
    TILE,
    address,
    atomic_add,
    atomic_load,
    barrier,
    exp,
    f4,
    floats,
    ground,
    i8,
    jit,
    longs,
    operation,
    record_at,
)
from organs.giant.engine import _call_tile as call_tile
from organs.giant.engine import _gate as gate_by
from organs.giant.engine import _root_mean_square as root_mean_square
from organs.giant.engine import _share as share
from organs.giant.gguf import GGUFError, GGUFFile
from organs.giant.products import (
    BYTES,
    ROWS,
    aligned,
    copy_plain,
    pack,
    panel_bytes,
    quantise_double,
    quantise_narrow,
    quantise_wide,
)
from organs.giant.program import Matrix, Recorder, Shape
from organs.giant.residency import Residency, await_expert, desk, learn, publish

FORMS = ("narrow", "wide", "double", "plain")  # numbers of forms in records
FEW = max(1, TILE // 2)  # an expert's last tokens are a tile if there are at least so many, else single ones
GROUP = 32  # tokens of an expert that pass its panels together
SILU, GELU, CLAMPED = range(3)  # activations; the last is gpt-oss's
ALL, CHOSEN, APART = range(3)  # softmax over all experts, or over the chosen ones; a sigmoid each
CLAMP, SLOPE = f4(7.0), f4(1.702)  # of gpt-oss's activation
MOST_USED = 256  # experts a token may use

_WAY = ("kernel", "kernel_one", "blocks", "panel_bytes", "form", "form_one", "bias", "bias_stride")
FAMILY = np.dtype(
    [(n, i8) for n in ("experts", "where", "inside", "activation", "hidden", "hidden_stride", "single_gate", "single_up")]
    + [(f"{way}_{n}", i8) for way in ("gate", "up", "down") for n in _WAY], align=True,
)  # fmt: skip
"""A family of like experts. `where`: int64 [experts, 3], addresses of the panels of gate, up and down; `inside`: numbers
between up and down, a multiple of 32; `hidden`: room for those of every position, quantised; `single_*`: where a single
token's activations are in a thread's own memory; of each way: kernels for a tile and for one token, the forms of activations
that those take, float32 biases [experts, …] or 0."""

MIXTURE = np.dtype(
    [(n, i8) for n in ("experts", "used", "gating", "normalised", "logits", "logits_stride", "bias", "shared_logit",
                       "families", "chosen", "weights", "items", "places", "shares", "most_places", "tally", "trouble", "layer", "panels",
                       "desk", "kept", "late", "results", "results_stride")] + [("scale", np.float64)], align=True,
)  # fmt: skip
"""A layer's mixture. `logits`: float32 [n, …], the router's; `shared_logit`: the shared expert's gate, likewise, 0 for none;
`families`: the address of two FAMILY records; `chosen` int64 and `weights` float32 [n, used + 1]; those stay until the
layer's next step, so that they can be looked at; of a prompt: `items` [.., 4]
(family, expert, first place, tokens), `places` (token) and `shares` (weight); `trouble`: where the number of
a layer is put whose router gave no numbers; `desk`: see residency.py, 0 where all experts are in memory; `kept`: room for a
copy of the input, which experts of a later wave take too, after the first ones have added to it; `late` [used]: whether an expert
of a single token was away when it was wanted; `results` float32 [used + 1, …]: what came out of each."""

FAMILY_BYTES = FAMILY.itemsize
_mixture = record_at(MIXTURE)
_family_at = record_at(FAMILY)


@jit(forceinline=True, **HELP)
def _family(address, number):
    return _family_at(address + number * FAMILY_BYTES)


# --- Routing. ---


@jit(**HELP)
def _route(e, t, chosen, weights):
    """The experts of token t, best first, and their weights; weights[used] is the shared expert's. False if there is a NaN."""
    n, k = e.experts, e.used
    x = floats(e.logits + t * e.logits_stride, 0, n)
    best, ids = floats(weights, 0, k + 1), longs(chosen, k)
    for j in range(k):
        best[j], ids[j] = f4(-3e38), -1
    lowest, sound = f4(-3e38), True
    for i in range(n):
        v = x[i]
        if e.bias and e.gating == CHOSEN:
            v += floats(e.bias, i, 1)[0]
        if ground.as_int(v) & 0x7F800000 == 0x7F800000:  # by its bits: fast mathematics knows no NaN
            sound = False
        if v > lowest or (i < k and ids[k - 1] < 0):
            j = k - 1
            while j > 0 and (ids[j - 1] < 0 or v > best[j - 1]):
                best[j], ids[j] = best[j - 1], ids[j - 1]
                j -= 1
            best[j], ids[j] = v, i
            if ids[k - 1] >= 0:
                lowest = best[k - 1]
    if not sound:
        for j in range(k):
            best[j], ids[j] = f4(0), j
    top, total = best[0], f4(0)
    if e.gating == APART:
        for j in range(k):
            best[j] = f4(1) / (f4(1) + exp(-ground.maximum(best[j], f4(-80))))
            total += best[j]
    else:
        for i in range(n if e.gating == ALL and not e.normalised else 0):
            total += exp(x[i] - top)
        for j in range(k):
            best[j] = exp(best[j] - top)
            if e.gating != ALL or e.normalised:
                total += best[j]
    if e.gating != APART or e.normalised:
        for j in range(k):
            best[j] /= total
    for j in range(k):
        best[j] *= f4(e.scale)
    best[k] = f4(1)
    if e.shared_logit:
        g = floats(e.shared_logit + t * e.logits_stride, 0, 1)[0]
        best[k] = f4(1) / (f4(1) + exp(-ground.maximum(g, f4(-80))))
    if not sound:
        longs(e.trouble, 1)[0] = e.layer + 1
    return sound


# --- Inside of an expert. ---


@jit(**HELP)
def _into(form, x, n, factors, factor, tile, T, t):
    """Quantise n blocks as token t of a tile of T, in the form of that number."""
    if form == 0:
        quantise_narrow(x, n, factors, factor, tile, T, t)
    elif form == 1:
        quantise_wide(x, n, factors, factor, tile, T, t)
    elif form == 2:
        quantise_double(x, n, factors, factor, tile, T, t)
    else:
        copy_plain(x, n, factors, factor, tile, T, t)


@jit(**HELP)
def _size(form):
    """Bytes of a block of 32 activations of one token."""
    return 48 if form == 0 else (128 if form == 3 else 80)


@jit(**HELP)
def _biased(x, bias, T):
    """x [T, 32] += bias [32]."""
    added = floats(bias, 0, BLOCK)
    for t in range(T):
        row = floats(x, t * BLOCK, BLOCK)
        for i in range(BLOCK):
            row[i] += added[i]


@jit(**HELP)
def _activate(gate, up, n, kind):
    """gate [n] becomes act(gate) · up; gpt-oss: min(gate, 7) · sigmoid(1.702 gate) · (1 + up), up cut to ±7."""
    if kind != CLAMPED:
        gate_by(gate, up, n, kind == GELU)
        return
    g, u = floats(gate, 0, n), floats(up, 0, n)
    for i in range(n):
        x, y = min(g[i], CLAMP), min(max(u[i], -CLAMP), CLAMP)
        g[i] = x / (f4(1) + exp(-ground.maximum(SLOPE * x, f4(-80)))) * (y + f4(1))


@jit(**HELP)
def _through(f, expert, p, x_gate, x_up, single, gate):
    """Two panels of gate and of up, of a tile or one token: gate [T, 32] becomes what is inside of the expert."""
    T = 1 if single else TILE
    where, up = longs(f.where + 24 * expert, 3), gate + 128 * T
    for i in range(2):
        panel, at = 2 * p + i, 64 * i
        weight = where[0] + panel * f.gate_panel_bytes
        call_tile(f.gate_kernel_one if single else f.gate_kernel, weight, x_gate, gate + at, f.gate_blocks, 128, 0)
        weight = where[1] + panel * f.up_panel_bytes
        call_tile(f.up_kernel_one if single else f.up_kernel, weight, x_up, up + at, f.up_blocks, 128, 0)
    if f.gate_bias:
        _biased(gate, f.gate_bias + expert * f.gate_bias_stride + 128 * p, T)
        _biased(up, f.up_bias + expert * f.up_bias_stride + 128 * p, T)
    _activate(gate, up, BLOCK * T, f.activation)


# --- A single token. ---


@jit(**HELP)
def _one(r, m, e):
    k, space = e.used, m.own + m.scratch
    chosen, weights = longs(space, k), floats(space + 8 * MOST_USED, 0, k + 1)
    is_sound = _route(e, 0, space, space + 8 * MOST_USED)
    if m.thread == 0:
        longs(e.chosen, k)[:] = chosen
    gate = space + 20 * MOST_USED + 64
    if e.desk:
        if m.thread == 0:
            _ask(e, chosen, is_sound)
        barrier(m)
        _one_from_disk(r, m, e, chosen, weights, gate)
        return
    routed, shared = _family(e.families, 0), _family(e.families, 1)
    pairs = routed.inside // BLOCK
    own = k * pairs
    first, end = share(own + shared.experts * shared.inside // BLOCK, m)
    for item in range(first, end):
        if item < own:
            _pair_in(r, m, routed, chosen[item // pairs], item // pairs, item % pairs, weights[item // pairs], gate)
        else:
            _pair_in(r, m, shared, i8(0), i8(0), item - own, weights[k], gate)
    barrier(m)
    first, end = share(e.panels, m)
    for slot in range(k + shared.experts):
        f = routed if slot < k else shared
        expert, place = (chosen[slot], slot) if slot < k else (i8(0), i8(0))
        _out(f, expert, place, r.input, first, end, 1)
        if f.down_bias:
            _add_bias(f, expert, weights[slot], r.input, first, end)


@jit(**HELP)
def _pair_in(r, m, f, expert, place, p, weight, gate):
    """A single token: 32 numbers of what is inside of an expert, times its weight, quantised."""
    _through(f, expert, p, m.own + f.single_gate, m.own + f.single_up, True, gate)
    h = f.hidden + place * f.hidden_stride + p * _size(f.down_form_one)
    _into(f.down_form_one, gate, 1, r.ones, weight, h, 1, 0)


@jit(**HELP)
def _out(f, expert, place, x, first, end, is_added):
    """Panels first to end of x = (or +=) an expert's result for a single token."""
    down, h = longs(f.where + 24 * expert, 3)[2], f.hidden + place * f.hidden_stride
    for p in range(first, end):
        call_tile(f.down_kernel_one, down + p * f.down_panel_bytes, h, x + 64 * p, f.down_blocks, 64, is_added)


# --- A single token, with experts on disk. ---


@jit(**HELP)
def _ask(e, chosen, is_sound):
    """The first thread's: want the chosen experts, and note which of them are late."""
    d, k, where = desk(e.desk), e.used, _family(e.families, 0).where
    d.count = k
    longs(d.wanted, k)[:] = chosen
    if is_sound:
        learn(d, e.layer, e.logits, e.bias if e.gating == CHOSEN else 0, chosen[k - 1])
    publish(d, e.layer)
    late = longs(e.late, k)
    for slot in range(k):
        late[slot] = atomic_load(where + 24 * chosen[slot]) == 0


@jit(**HELP)
def _one_from_disk(r, m, e, chosen, weights, gate):
    """Experts that are there go all their way before those that have to be waited for. Threads share each expert; what comes out
    of them is added up at the end, in the order that it has in memory."""
    routed, shared, k = _family(e.families, 0), _family(e.families, 1), e.used
    late = longs(e.late, k)
    first, end = share(shared.inside // BLOCK if shared.experts else i8(0), m)
    for p in range(first, end):
        _pair_in(r, m, shared, i8(0), i8(0), p, weights[k], gate)
    for is_late in range(2):
        if is_late and not late.any():
            break
        _some_through(r, m, e, chosen, weights, gate, is_late)
    first, end = share(e.panels, m)
    for slot in range(k + shared.experts):
        f = routed if slot < k else shared
        if slot < k and not _is_there(m, e, f, False, chosen[slot]):
            continue
        out = floats(r.input, ROWS * first, ROWS * (end - first))
        more = floats(e.results + slot * e.results_stride, ROWS * first, ROWS * (end - first))
        for i in range(len(out)):
            out[i] += more[i]
        if f.down_bias:
            _add_bias(f, chosen[slot] if slot < k else i8(0), weights[slot], r.input, first, end)


@jit(**HELP)
def _some_through(r, m, e, chosen, weights, gate, is_late):
    """The results of the experts that are late, or of those that are not and of the shared one, whose inside is there."""
    routed, shared, k = _family(e.families, 0), _family(e.families, 1), e.used
    late = longs(e.late, k)
    first, end = share(routed.inside // BLOCK, m)
    for slot in range(k):
        if late[slot] == is_late and _is_there(m, e, routed, False, chosen[slot]):
            for p in range(first, end):
                _pair_in(r, m, routed, chosen[slot], slot, p, weights[slot], gate)
    barrier(m)
    first, end = share(e.panels, m)
    for slot in range(k):
        if late[slot] == is_late and _is_there(m, e, routed, False, chosen[slot]):
            _out(routed, chosen[slot], slot, e.results + slot * e.results_stride, first, end, 0)
    if shared.experts and not is_late:
        _out(shared, i8(0), i8(0), e.results + k * e.results_stride, first, end, 0)


@jit(**HELP)
def _is_there(m, e, f, is_shared, expert):
    """Whether an expert is in memory, after waiting for it; if reading failed, it is not, and the step ends with an error."""
    return e.desk == 0 or is_shared or await_expert(desk(e.desk), f.where + 24 * expert, m)


@jit(**HELP)
def _add_bias(f, expert, weight, x, first, end):
    """Columns of panels first to end of x += weight · the expert's bias."""
    n = ROWS * (end - first)
    out, bias = floats(x, ROWS * first, n), floats(f.down_bias + expert * f.down_bias_stride, ROWS * first, n)
    for i in range(n):
        out[i] += weight * bias[i]


# --- A prompt. ---


@jit(**HELP)
def _sort(e, n):
    """Fill items, places and shares of n tokens, the shared expert's first; the number of items."""
    width = e.used + 1
    chosen, weights = longs(e.chosen, n * width), floats(e.weights, 0, n * width)
    shared = _family(e.families, 1)
    tally = longs(e.tally, e.experts)
    tally[:] = 0
    for t in range(n):
        for j in range(e.used):
            tally[chosen[t * width + j]] += 1
    places, shares = longs(e.places, e.most_places), floats(e.shares, 0, e.most_places)
    count, place = 0, 0
    if shared.experts:
        count, place = _cut(e, 1, 0, n, 0, 0)
        for t in range(n):
            places[t], shares[t] = t, weights[t * width + e.used]
    for expert in range(e.experts):
        tokens, tally[expert] = tally[expert], place
        if tokens > 0:
            count, place = _cut(e, 0, expert, tokens, count, place)
    for t in range(n):
        for j in range(e.used):
            at = tally[chosen[t * width + j]]
            tally[chosen[t * width + j]] += 1
            places[at], shares[at] = t, weights[t * width + j]
    return count


@jit(**HELP)
def _cut(e, family, expert, tokens, count, place):
    """Items of one expert's tokens, at most GROUP each."""
    while tokens > 0:
        take = min(GROUP, tokens)
        item = longs(e.items + 32 * count, 4)
        item[0], item[1], item[2], item[3] = family, expert, place, take
        tiles, singles = _parts(take)
        count, place, tokens = count + 1, place + tiles * TILE + singles, tokens - take
    return count, place


@jit(**HELP)
def _parts(tokens):
    """(tiles, single tokens behind them): a tile that is not full takes as many places as a full one."""
    rest = tokens % TILE
    if rest >= FEW and TILE > 1:
        return tokens // TILE + 1, 0
    return tokens // TILE, rest


@jit(**HELP)
def _fetch(r, e, form, item, space):
    """The tokens of an item, normed and quantised: tiles, then singles."""
    tiles, singles = _parts(item[3])
    places, n_blocks = longs(e.places + 8 * item[2], item[3]), (r.width + BLOCK - 1) // BLOCK
    base = e.kept if e.desk else r.input
    for t in range(tiles * TILE):
        x = base + places[min(t, item[3] - 1)] * r.input_stride
        factor = root_mean_square(x, r.width, r.epsilon) if t < item[3] else f4(0)
        tile = space + t // TILE * n_blocks * TILE * _size(form[0])
        _into(form[0], x, n_blocks, r.norm, factor, tile, TILE, t % TILE)
    space += tiles * n_blocks * TILE * _size(form[0])
    for t in range(tiles * TILE, item[3]):
        x = base + places[t] * r.input_stride
        _into(form[1], x, n_blocks, r.norm, root_mean_square(x, r.width, r.epsilon), space, 1, 0)
        space += n_blocks * _size(form[1])
    return space


@jit(**HELP)
def _item_in(r, m, e, item):
    """What is inside of an expert for the tokens of an item, quantised."""
    f, tokens = _family(e.families, item[0]), item[3]
    shares, n_blocks = floats(e.shares, item[2], tokens), (r.width + BLOCK - 1) // BLOCK
    tiles, singles = _parts(tokens)
    first = m.own + m.scratch
    forms, others = (f.gate_form, f.gate_form_one), (f.up_form, f.up_form_one)
    gate = _fetch(r, e, forms, item, first)
    second = first
    if others != forms:
        second, gate = gate, _fetch(r, e, others, item, gate)
    gate = (gate + 63) // 64 * 64
    for p in range(f.inside // BLOCK):
        x1, x2, h = first, second, f.hidden + item[2] * f.hidden_stride
        for i in range(tiles):
            _through(f, item[1], p, x1, x2, False, gate)
            for t in range(TILE):
                weight = shares[i * TILE + t] if i * TILE + t < tokens else f4(0)
                _into(f.down_form, gate + 128 * t, 1, r.ones, weight, h + p * TILE * _size(f.down_form), TILE, t)
            x1, x2 = x1 + n_blocks * TILE * _size(forms[0]), x2 + n_blocks * TILE * _size(others[0])
            h += TILE * f.hidden_stride
        for i in range(singles):
            _through(f, item[1], p, x1, x2, True, gate)
            weight = shares[tiles * TILE + i]
            _into(f.down_form_one, gate, 1, r.ones, weight, h + p * _size(f.down_form_one), 1, 0)
            x1, x2, h = x1 + n_blocks * _size(forms[1]), x2 + n_blocks * _size(others[1]), h + f.hidden_stride


@jit(**HELP)
def _item_out(r, m, e, item, first, end):
    """x += the columns of panels first to end of one item's results."""
    f, tokens = _family(e.families, item[0]), item[3]
    places, shares = longs(e.places + 8 * item[2], tokens), floats(e.shares, item[2], tokens)
    tiles, singles = _parts(tokens)
    down, space = longs(f.where + 24 * item[1], 3)[2], m.own + m.scratch
    for p in range(first, end):
        weight, h = down + p * f.down_panel_bytes, f.hidden + item[2] * f.hidden_stride
        for i in range(tiles):
            call_tile(f.down_kernel, weight, h, space, f.down_blocks, 64, 0)
            for t in range(min(TILE, tokens - i * TILE)):
                at = r.input + places[i * TILE + t] * r.input_stride
                out, more = floats(at, ROWS * p, ROWS), floats(space, ROWS * t, ROWS)
                for j in range(ROWS):
                    out[j] += more[j]
            h += TILE * f.hidden_stride
        for i in range(singles):
            at = r.input + places[tiles * TILE + i] * r.input_stride
            call_tile(f.down_kernel_one, weight, h, at + 64 * p, f.down_blocks, 64, 1)
            h += f.hidden_stride
    if f.down_bias:
        for t in range(tokens):
            _add_bias(f, item[1], shares[t], r.input + places[t] * r.input_stride, first, end)


@jit(**HELP)
def _many(r, m, e):
    width = e.used + 1
    first, end = share(m.n, m)
    for t in range(first, end):
        _route(e, t, e.chosen + 8 * width * t, e.weights + 4 * width * t)
        if e.desk:
            kept, x = floats(e.kept + t * r.input_stride, 0, r.width), floats(r.input + t * r.input_stride, 0, r.width)
            for i in range(r.width):
                kept[i] = x[i]
    barrier(m)
    tally = longs(e.tally, e.experts + 2)
    if m.thread == 0:
        if e.desk and longs(e.trouble, 1)[0] == 0:
            for t in range(m.n):
                last = longs(e.chosen + 8 * (width * t + e.used - 1), 1)[0]
                learn(desk(e.desk), e.layer, e.logits + t * e.logits_stride, e.bias if e.gating == CHOSEN else 0, last)
        tally[e.experts] = _sort(e, m.n)
        tally[e.experts + 1] = 0
    barrier(m)
    count, turn = tally[e.experts], e.tally + 8 * (e.experts + 1)
    begin = i8(0)
    while begin < count:
        end = _wave(r, m, e, begin, count)
        i = begin + atomic_add(turn, 1)
        while i < end:
            item = longs(e.items + 32 * i, 4)
            if _is_there(m, e, _family(e.families, item[0]), item[0] == 1, item[1]):
                _item_in(r, m, e, item)
            i = begin + atomic_add(turn, 1)
        barrier(m)
        if m.thread == 0:
            tally[e.experts + 1] = 0
        first, last = share(e.panels, m)
        for i in range(begin, end):
            item = longs(e.items + 32 * i, 4)
            if _is_there(m, e, _family(e.families, item[0]), item[0] == 1, item[1]):
                _item_out(r, m, e, item, first, last)
        begin = end
        if begin < count:
            barrier(m)


@jit(**HELP)
def _wave(r, m, e, begin, count):
    """The end of the items that are done together: all, or those of as many experts as there is room for, which are asked for."""
    if e.desk == 0:
        return count
    d = desk(e.desk)
    end, distinct, before = begin, 0, i8(-1)
    for i in range(begin, count):
        item = longs(e.items + 32 * i, 4)
        if item[0] == 0 and item[1] != before:
            distinct, before = distinct + 1, item[1]
            if m.thread == 0:
                longs(d.wanted, distinct)[distinct - 1] = before
        if distinct <= d.wave:
            end = i + 1
    if m.thread == 0:
        d.count = distinct
        publish(d, e.layer)
    barrier(m)
    return end


@operation
def experts(r, m):
    """input [n, width] += Σ weight · expert(norm(input)) over the chosen experts, and the shared one's."""
    e = _mixture(r.more)
    if m.n == 1:
        _one(r, m, e)
    else:
        _many(r, m, e)


# --- Recording. ---


@dataclass(frozen=True)
class Sizes:
    """A mixture, as the metadata says."""

    experts: int
    used: int
    inside: int
    shared: int  # numbers inside of the shared expert
    normalised: bool
    scale: float

    @classmethod
    def of(cls, file: GGUFFile, shape: Shape, normalised: bool) -> Sizes:
        """Raises GGUFError for what is missing or impossible. normalised: what holds where the file does not say."""
        number = lambda key, default=None: file.get(f"{shape.architecture}.{key}", int, default)
        experts, used = number("expert_count"), number("expert_used_count")
        if not 0 < used <= min(experts, MOST_USED):
            raise GGUFError(f"{file.path}: {used} of {experts} experts are used; that makes no model")
        inside = number("expert_feed_forward_length", shape.hidden)
        shared = number("expert_shared_feed_forward_length", inside)
        if inside < 1 or shared < 1 or experts > 1 << 16:
            raise GGUFError(f"{file.path}: {experts} experts of {inside} numbers, shared {shared}: that makes no model")
        scale = file.get(f"{shape.architecture}.expert_weights_scale", float, 1.0)
        normalised = file.get(f"{shape.architecture}.expert_weights_norm", bool, normalised)
        return cls(experts, used, inside, shared, normalised, scale if scale else 1.0)


@dataclass(frozen=True)
class Stack:
    """One way of a family: a matrix for each expert, packed."""

    matrix: Matrix  # the first, which speaks for all
    addresses: np.ndarray  # int64 [experts]


def has_shared(r: Recorder, block: str) -> bool:
    """Whether a layer has a shared expert. Raises GGUFError where a part of it is missing."""
    parts = [r.has(f"{block}ffn_{n}_shexp.weight") for n in ("gate", "up", "down")]
    if not parts[0] and any(parts):
        raise GGUFError(f"{r.file.path}: of {block}'s shared expert only a part is there")
    return parts[0]


def feed_forward(r: Recorder, layer: int, *, normalised: bool, gating: int = ALL, activation: int = SILU,
                 norm: str = "ffn_norm", is_apart: bool = False) -> tuple[int, int]:  # fmt: skip
    """x += the mixture of norm(x): with a shared expert, a fused gate and up, and biases where the file has them.

    is_apart: somebody else computes the router's logits, and the shared expert. Returns the logits' place: (address, bytes from
    token to token).
    """
    s, block = r.shape, f"blk.{layer}."
    sizes = Sizes.of(r.file, s, normalised)
    weights = r.keep(r.vector(f"{block}{norm}.weight", s.width))
    routed = _stacks(r, block, "exps", sizes.experts, sizes.inside, layer if r.is_on_disk else None, sizes.used)
    is_shared = has_shared(r, block) and not is_apart
    shared = _stacks(r, block, "shexp", 0, sizes.shared) if is_shared else None
    routers = [] if is_apart else [r.matrix(block + "ffn_gate_inp.weight", sizes.experts, s.width)]
    if not is_apart and r.has(block + "ffn_gate_inp_shexp.weight"):
        routers.append(r.matrix(block + "ffn_gate_inp_shexp.weight", 1, s.width))
    inputs = [*routers, *(w.matrix for w in routed[:2]), *(w.matrix for w in (shared or [])[:2])]
    a = r.quantise("x", (r.x, r.x_stride), s.width, inputs, weights)
    gate_at = -(-sizes.experts // ROWS) * ROWS  # where among the logits the shared expert's gate is
    logits = r.buffered("logits of experts", gate_at + ROWS)
    gate_at = logits[0] + 4 * gate_at if len(routers) == 2 else 0
    for matrix, target in zip(routers, (logits[0], gate_at)):
        r.product(a, matrix, (target, logits[1]), barrier=int(matrix is routers[-1]))
    families = np.zeros(2, FAMILY)
    most = (
        2 * (r.chunk + TILE) + 2 * r.chunk * sizes.used
    )  # places: tiles are at least half full, but one of the shared expert
    _fill(r, families[0], a, routed, sizes.inside, activation, most, block, "exps")
    if shared:
        _fill(r, families[1], a, shared, sizes.shared, activation, r.chunk + TILE, block, "shexp")
    e = np.zeros(1, MIXTURE)
    if r.residency is not None:
        e[0]["kept"], e[0]["desk"] = r.room("experts' input", r.x_stride * r.chunk), r.residency.desk.ctypes.data
        e[0]["late"], e[0]["results_stride"] = r.room("late experts", 8 * sizes.used), r.x_stride
        e[0]["results"] = r.room("experts' results", r.x_stride * (sizes.used + 1))
    width = sizes.used + 1
    chosen = np.zeros((r.chunk, width), np.int64)
    r.routes[layer] = chosen
    rooms = dict(weights=4 * r.chunk * width, items=32 * most, places=8 * most, shares=4 * most,
                 tally=8 * (sizes.experts + 2))  # fmt: skip
    facts = dict(experts=sizes.experts, used=sizes.used, gating=gating, normalised=sizes.normalised, logits=logits[0],
                 logits_stride=logits[1], shared_logit=gate_at, families=r.keep(families), layer=layer, scale=sizes.scale,
                 panels=-(-s.width // ROWS), trouble=r.trouble.ctypes.data, most_places=most, chosen=r.keep(chosen),
                 **{name: r.room("experts " + name, size) for name, size in rooms.items()})  # fmt: skip
    if r.has(block + "ffn_gate_inp.bias"):
        facts["bias"] = r.keep(r.vector(block + "ffn_gate_inp.bias", sizes.experts))
    for name, value in facts.items():
        e[0][name] = value
    n_blocks = -(-s.width // BLOCK)
    r.need(20 * MOST_USED + 64 + 2 * n_blocks * (GROUP + TILE) * BYTES["plain"] + 256 * TILE + 64 * TILE)
    r.row("experts", input=r.x, input_stride=r.x_stride, width=s.width, norm=weights, ones=r.ones, epsilon=s.epsilon,
          more=r.keep(e), barrier=1)  # fmt: skip
    if r.residency is not None:
        if not is_apart and len(r.residency.layers) == 1:
            _foresee(r, layer, sizes.experts, gating, norm)
            r.rows.insert(1 + _last_embedding(r), r.rows.pop())
        _foresee(r, layer + 1, sizes.experts, gating, norm)
    return logits


def _foresee(r: Recorder, layer: int, experts: int, gating: int, norm: str) -> None:
    """The row that guesses what a layer's router will choose by a state before that layer's attention, if it has a router and is
    no draft's.

    It takes a copy of 8 bits a weight, which a thread reads in a fraction of the time that float32 takes.
    """
    from organs.giant.quantise import quantise

    s, block = r.shape, f"blk.{layer}."
    if layer >= s.layers or not r.has(block + "ffn_gate_inp.weight"):
        return
    form = "Q8_0" if s.width % BLOCK == 0 else "F32"
    panels = -(-experts // ROWS)
    data = aligned(panels * panel_bytes(form, s.width))
    rows = quantise(r.array(block + "ffn_gate_inp.weight", (experts, s.width)), form)
    pack(rows.reshape(-1), form, experts, s.width, data)
    r.keep(data)
    matrix = Matrix(form, experts, s.width, data)
    a = r.quantised("x", s.width, [matrix])
    has_bias = gating == CHOSEN and r.has(block + "ffn_gate_inp.bias")
    r.row("foresee", input=r.x, width=s.width, norm=r.keep(r.vector(f"{block}{norm}.weight", s.width)), epsilon=s.epsilon,
          count=layer, bias=r.keep(r.vector(block + "ffn_gate_inp.bias", experts)) if has_bias else 0, panels=matrix.panels,
          output=r.room("guessed logits", 4 * ROWS * panels), more=r.residency.desk.ctypes.data, **r.kernels(matrix),
          **r.taken(a, matrix), **r.wanted(a, [matrix]))  # fmt: skip


def _last_embedding(r: Recorder) -> int:
    """The number of the last row that embeds tokens."""
    return max(i for i, row in enumerate(r.rows) if row["operation"] == address("embed"))


def _stacks(r: Recorder, block: str, suffix: str, experts: int, inside: int, layer: int | None = None,
            used: int = 0) -> list[Stack]:  # fmt: skip
    """Gate, up and down of a family; experts: 0 for a single one, whose tensors are matrices; layer: where they stay on disk."""
    width, many = r.shape.width, max(experts, 1)
    shape = lambda rows, columns: (experts, rows, columns) if experts else (rows, columns)
    fused = f"{block}ffn_gate_up_{suffix}.weight"
    names = {way: f"{block}ffn_{way}_{suffix}.weight" for way in ("gate", "up", "down")}
    if layer is not None:
        return _stacks_on_disk(r, layer, fused, names, experts, inside, used)
    if r.has(fused):
        halves = [
            r.stack(fused, shape(2 * inside, width), range(first, first + inside), BLOCK) for first in (0, inside)
        ]
    else:
        halves = [r.stack(names[way], shape(inside, width), range(inside), BLOCK) for way in ("gate", "up")]
    stacks = [*halves, r.stack(names["down"], shape(width, inside), range(width), ROWS)]
    return [Stack(first, np.array([first.data.ctypes.data + i * size for i in range(many)], np.int64))
            for first, size in stacks]  # fmt: skip


def _stacks_on_disk(r: Recorder, layer: int, fused: str, names: dict[str, str], experts: int, inside: int,
                    used: int) -> list[Stack]:  # fmt: skip
    """As _stacks, of experts that residency.py brings when they are wanted."""
    width = r.shape.width
    if r.residency is None:
        r.residency = Residency(r.file, width, experts, used, r.shape.layers + 1)  # and perhaps one that drafts
    if r.has(fused):
        info = r.info(fused, (experts, 2 * inside, width))
        parts = [(info, inside, width, first, 2 * inside) for first in (0, inside)]
    else:
        parts = [(r.info(names[way], (experts, inside, width)), inside, width, 0, inside) for way in ("gate", "up")]
    parts.append((r.info(names["down"], (experts, width, inside)), width, inside, 0, width))
    where = r.residency.add(layer, parts)
    nothing = np.empty(0, np.uint8)
    return [
        Stack(Matrix(info.format, rows, columns, nothing), where[:, i])
        for i, (info, rows, columns, _, _) in enumerate(parts)
    ]


def _fill(r: Recorder, f: np.void, a, stacks: list[Stack], inside: int, activation: int, places: int, block: str,
          suffix: str) -> None:  # fmt: skip
    """A FAMILY record of a family's matrices; a: the activations of a single token."""
    inside = -(-inside // BLOCK) * BLOCK
    many = len(stacks[0].addresses)
    f["experts"], f["inside"], f["activation"] = many, inside, activation
    if stacks[0].addresses.base is not None:  # of experts on disk: a table of Residency, which changes
        f["where"] = stacks[0].addresses.ctypes.data
    else:
        f["where"] = r.keep(np.ascontiguousarray(np.stack([s.addresses for s in stacks], 1)))
    gate, up, down = (s.matrix for s in stacks)
    size = max(BYTES[r.form(down)], BYTES[r.form_of_one(down)])
    f["hidden_stride"] = inside // BLOCK * size
    f["hidden"] = r.room(f"experts inside {suffix}", places * int(f["hidden_stride"]))
    f["single_gate"], f["single_up"] = a.one[r.form_of_one(gate)], a.one[r.form_of_one(up)]
    for way, matrix in (("gate", gate), ("up", up), ("down", down)):
        kernels = r.kernels(matrix)
        f[f"{way}_kernel"], f[f"{way}_kernel_one"] = kernels["kernel"], kernels["kernel_one"]
        f[f"{way}_blocks"], f[f"{way}_panel_bytes"] = matrix.blocks, matrix.panel_bytes
        f[f"{way}_form"], f[f"{way}_form_one"] = FORMS.index(r.form(matrix)), FORMS.index(r.form_of_one(matrix))
        name = f"{block}ffn_{way}_{suffix}.bias"
        if r.has(name):
            numbers = -(-matrix.rows // BLOCK) * BLOCK
            bias = np.zeros((many, numbers), np.float32)
            bias[:, : matrix.rows] = r.array(name, (many, matrix.rows) if suffix == "exps" else (matrix.rows,)).reshape(
                many, -1
            )
            f[f"{way}_bias"], f[f"{way}_bias_stride"] = r.keep(bias), 4 * numbers
    if bool(f["gate_bias"]) != bool(f["up_bias"]):
        raise GGUFError(f"{r.file.path}: in {block} gate and up have not both a bias, or none")
