"""The field, compiled: the twin of chapter 4's reference, which says the same in NumPy.

A context mixer over a tree of tokens (the ideas of lpaq and zpaq, moved from bits to a weight-balanced tree whose leaves
are tokens). A token costs about seven binary decisions. For each decision every context offers what it has seen at this
node: an adaptive probability, a pair of small counts, which an adaptive map turns into a second probability, and, as long
as that leads this way, the token that came last in this context, trusted by how many times in a row it came. Match models
add what followed the last time the recent past was the same. A logistic mixer weighs all of it, several weight sets at a
time, and two adaptive maps correct its answer.

Prediction comes first, along the whole path, with everything as it was before the token; learning follows along the same
path. So the walk that reads a text and the dense pass over all tokens give the very same probabilities.

Functions take plain arrays (a tuple of arrays costs an atomic count at every access: four times slower). They are, with
V tokens, C contexts, M match models, G = M + C guesses, S selectors, I inputs of the mixer (3C + G + 1, padded to a
multiple of 16) and D = 64 rows of scratch:

    the tree     nodes int32 [V-1, 7] (columns below), rank int32 [V] (leaf position of a token), leaf int32 [V] (its
                 inverse), text uint8 (the tokens' bytes, joined), starts int64 [V+1] (where each token's bytes begin)
    constants    curves float32 [2, 4096] (stretch by the upper 12 bits of p; squash on [-12, 12] in steps of 1/128),
                 rates int64 [2, 1024] (of slots and of maps, by visits, 16 bits of fraction), mixer_rates float32 [1024]
                 (of a weight set, by its visits), transitions uint8 [2, 256] (a pair of counts after a bit),
                 sets int64 [S+1] (first row of each selector's weight sets)
    what learns  table uint32 [16 (lines + 1)] (cache lines of two buckets; the last stays empty), successors uint32
                 [C, power of two] (hash of a context -> check of 8 bits, times in a row, token), maps uint32 [C+G, 256]
                 (pair of counts, or confidence of a guess -> 22 bits of probability, 10 of visits), weights float32
                 [rows, I], visits int32 [rows], final float32 [20 (C+1), S] (the second layer), apm float32
                 [V-1 + power of two, 33] (corrections by node, then by hash of previous token and node),
                 match_table uint32 [M, power of two] (hash of the last tokens -> position behind them)
    what moves   history uint16 [power of two] (a ring once it has its full size), registers int64 [16], rolling uint64 [8]
                 (hashes of words and indentation, the last eight bytes), costs float64 [2] (of the last token in nats, and
                 their running mean)
    scratch      hashes uint64 [C] (the contexts of the next token), guess int64 [2, G] (leaf position that each match
                 model, then each context expects, or -1; its confidence), trusted float32 [G] (what its map makes of
                 that confidence, stretched), buckets int64 [groups, C] (of each group of
                 nodes met), keys uint64 [groups, C], inputs float32 [D, I], rows int64 [D, S+2] (weight sets chosen, row
                 of `final`, second row of `apm`), dots float32 [D, S+2] (each selector's answer, the mix, the mix as a
                 probability), path int64 [2, D] (nodes from the root to a token, and turns)
"""

import math
import threading

import numpy as np

from organs.kernels import ground
from organs.kernels.calls import entry
from organs.kernels.ground import INT, VOID, instruction, jit, library, log, sigmoid

u32, u64, f32 = np.uint32, np.uint64, np.float32

LOW, MID, HIGH, LEFT, RIGHT, GROUP, LOCAL = range(7)  # columns of nodes; children: a node, or -1 - leaf
POSITION, LEARNED, MATCHES = 0, 1, 2  # registers; from MATCHES on, four for each match model:
POINTER, LENGTH, MISSES, MINIMUM = range(4)
WORD, WORD1, WORD2, INDENT, INDENTING, BYTES = range(6)  # rolling
STRETCH, SQUASH = range(2)  # curves
SLOT_RATE, MAP_RATE = range(2)  # rates
LEVELS = 3  # tree levels a bucket holds: 7 slots
DEPTHS = 64  # rows of scratch: no path is longer
DEPTH_SETS = 20  # depths that the mixer tells apart
HASH1, HASH2 = u64(0xD6E8FEB86659FD93), u64(0x9E3779B97F4A7C15)
inlined = jit(fastmath=True, forceinline=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)


def _emit_prefetch(b, address):
    how = INT(0), INT(3), INT(1)  # read, keep in all caches, data
    prefetch = library("llvm.prefetch.p0", VOID, ground.BYTES, INT, INT, INT)
    prefetch(b, b.inttoptr(address, ground.BYTES), *how)


_prefetch_line = instruction("void(int64)", _emit_prefetch)


@inlined
def _prefetch(words, index):
    """Ask the memory for words[index], 32 bits, which is needed soon."""
    _prefetch_line(words.ctypes.data + 4 * index)


# --- Contexts, which are hashes of what came before. ---


@inlined
def _mix(h, x):
    h = (h + x + u64(1)) * HASH1
    return h ^ (h >> u64(29))


@inlined
def _past(history, position, back):
    """The token `back` steps ago (1 = the last), 0 before the beginning."""
    return u64(history[(position - back) & (len(history) - 1)]) if position >= back else u64(0)


@inlined
def _set_contexts(hashes, history, registers, rolling):
    """Hash the contexts of the next token: orders of tokens, suffixes of bytes, words, indentation, match."""
    recent, word, position = rolling[BYTES], rolling[WORD], registers[POSITION]
    order = u64(1)
    for k in range(4):
        order = _mix(order, _past(history, position, k + 1))
        hashes[k] = order
    hashes[4] = word
    hashes[5] = word + rolling[WORD1] * u64(3)
    if len(hashes) > 6:
        hashes[6] = u64(1)
        hashes[7] = _mix(_mix(order, _past(history, position, 5)), _past(history, position, 6))
        hashes[8] = word + rolling[WORD2] * u64(5)
        hashes[9] = _mix(rolling[INDENT], recent & u64(0xFF))
        for k in range(1, 6):  # the last k bytes, however they were split into tokens
            hashes[9 + k] = recent & ((u64(1) << u64(8 * k)) - u64(1))
        expected = _expected(history, registers)
        hashes[15] = expected
        hashes[16] = _mix(rolling[WORD1], _past(history, position, 1))
        hashes[17] = _mix(word, rolling[INDENT])
        hashes[18] = _mix(expected, _past(history, position, 1))
    for c in range(len(hashes)):
        hashes[c] = _mix(hashes[c], u64(1000 + c)) * HASH2


@inlined
def _expected(history, registers):
    """Hash of the token that the longest match expects and of how long it is; 0 without a match."""
    for k in range(2):
        at, length = registers[MATCHES + 4 * k + POINTER], registers[MATCHES + 4 * k + LENGTH]
        if at > 0 and length > 0:
            return _mix(_mix(u64(history[at & (len(history) - 1)]), u64(min(length, 15))), u64(0))
    return u64(0)


@inlined
def _advance(text, starts, match_table, history, registers, rolling, token, learn):
    """Move history, words, indentation and matches past `token`."""
    history[registers[POSITION] & (len(history) - 1)] = token
    registers[POSITION] += 1
    if starts[token] == starts[token + 1]:  # a special: a document begins or ends
        for k in range(6):
            rolling[k] = u64(0)
        rolling[INDENTING] = u64(1)
    for k in range(starts[token], starts[token + 1]):
        _advance_byte(rolling, u64(text[k]))
    for k in range(len(match_table)):
        _advance_match(match_table, history, registers, k, token, learn)


@inlined
def _advance_byte(rolling, byte):
    rolling[BYTES] = (rolling[BYTES] << u64(8)) | byte
    if u64(65) <= byte <= u64(90):
        byte += u64(32)
    if u64(97) <= byte <= u64(122) or byte >= u64(128):
        rolling[WORD] = _mix(rolling[WORD], byte)
    elif rolling[WORD] != u64(0):
        rolling[WORD2], rolling[WORD1], rolling[WORD] = rolling[WORD1], rolling[WORD], u64(0)
    if byte == u64(10):
        rolling[INDENT], rolling[INDENTING] = u64(0), u64(1)
    elif rolling[INDENTING] != u64(0):
        rolling[INDENT] = _mix(rolling[INDENT], byte)
        if byte != u64(32):
            rolling[INDENTING] = u64(0)


@inlined
def _advance_match(match_table, history, registers, k, token, learn):
    """Follow the match, or look for a new one where the last `minimum` tokens were seen before."""
    first, mask, position = MATCHES + 4 * k, len(history) - 1, registers[POSITION]
    at, length, misses = registers[first + POINTER], registers[first + LENGTH], registers[first + MISSES]
    minimum = registers[first + MINIMUM]
    if at > 0:
        if history[at & mask] == token:
            length += 1
        else:  # carry on behind the surprise: texts resemble each other with small differences
            length, misses = 0, misses + 1
        at += 1
        if misses > 8 or position - at >= mask - 64:
            at, length, misses = 0, 0, 0
    if position >= minimum:
        h = u64(0)
        for back in range(1, minimum + 1):
            h = _mix(h, u64(history[(position - back) & mask]))
        cell = np.int64(h >> u64(40)) & (match_table.shape[1] - 1)
        if at == 0 or length < minimum:
            candidate = np.int64(match_table[k, cell])
            if candidate > 0 and position - candidate < mask - 64:
                same, limit = 0, min(32, candidate)
                while same < limit and history[(candidate - 1 - same) & mask] == history[(position - 1 - same) & mask]:
                    same += 1
                if same >= minimum:
                    at, length, misses = candidate, same, 0
        if learn:
            match_table[k, cell] = u32(position)
    registers[first + POINTER], registers[first + LENGTH], registers[first + MISSES] = at, length, misses


@inlined
def _cell(successors, hashed):
    return np.int64(hashed >> u64(36)) & (successors.shape[1] - 1)


@inlined
def _expect(rank, curves, successors, maps, history, registers, hashes, guess, trusted):
    """Where the matches and the contexts' last tokens lead, and how far each is to be trusted."""
    matches = guess.shape[1] - len(hashes)
    for k in range(matches):
        at, length = registers[MATCHES + 4 * k + POINTER], registers[MATCHES + 4 * k + LENGTH]
        guess[0, k] = rank[history[at & (len(history) - 1)]] if at > 0 else -1
        guess[1, k] = length if length < 16 else min(15 + ((length - 16) >> 2), 23)
        if registers[MATCHES + 4 * k + MISSES] > 0:
            guess[1, k] = 24 + min(length >> 1, 7)
    for c in range(len(hashes)):
        entry = successors[c, _cell(successors, hashes[c])]
        known = (entry >> u32(24)) == u32(hashes[c] & u64(0xFF)) and (entry & u32(0xFF0000)) != u32(0)
        guess[0, matches + c] = rank[np.int64(entry & u32(0xFFFF))] if known else -1
        guess[1, matches + c] = np.int64((entry >> u32(16)) & u32(0xFF))
    for g in range(guess.shape[1]):
        trusted[g] = curves[STRETCH, np.int64(maps[len(hashes) + g, guess[1, g]] >> u32(20))]


@inlined
def _learn_successors(successors, hashes, token):
    """In every context, this token came last."""
    for c in range(len(hashes)):
        cell, check = _cell(successors, hashes[c]), u32(hashes[c] & u64(0xFF))
        entry = successors[c, cell]
        times = (entry >> u32(16)) & u32(0xFF)
        again = (entry >> u32(24)) == check and times > u32(0) and (entry & u32(0xFFFF)) == u32(token)
        times = min(times + u32(1), u32(31)) if again else u32(1)
        successors[c, cell] = (check << u32(24)) | (times << u32(16)) | u32(token)


# --- The table: cache lines of two buckets; a bucket holds a check word and the slots of three levels of the tree. ---


@inlined
def _key(context, group):
    h = (context + u64(group) * HASH1) * HASH2
    return h ^ (h >> u64(31))


@inlined
def _line(table, key):
    """First word of the cache line a key belongs to: its upper half scaled to the number of lines."""
    lines = u64((len(table) >> 4) - 1)
    return np.int64(((key >> u64(32)) * lines) >> u64(32)) << 4


@inlined
def _check(key):
    return u32(key & u64(0xFFFF)) | u32(0x10000)


@inlined
def _locate(table, hashes, node, buckets, keys, row):
    """Find every context's bucket for the group of nodes that begins at `node`; the empty line where there is none."""
    for c in range(len(hashes)):
        key = _key(hashes[c], node)
        bucket = _line(table, key)
        if table[bucket] != _check(key):
            bucket = bucket + 8 if table[bucket + 8] == _check(key) else len(table) - 16
        keys[row, c], buckets[row, c] = key, bucket


@inlined
def _claim(table, buckets, keys, row):
    """Make sure that every context has its bucket: where there is none, the one that has seen less is emptied for it."""
    for c in range(buckets.shape[1]):
        check = _check(keys[row, c])
        bucket = buckets[row, c]
        if table[bucket] != check:
            bucket = _line(table, keys[row, c])
            if table[bucket] != check:
                if table[bucket + 8] == check or _seen(table[bucket + 9]) < _seen(table[bucket + 1]):
                    bucket += 8
                if table[bucket] != check:
                    table[bucket] = check
                    for k in range(1, 8):
                        table[bucket + k] = u32(0)
            buckets[row, c] = bucket


@inlined
def _seen(slot):
    """Sum of a slot's pair of counts."""
    return ((slot >> u32(12)) & u32(15)) + ((slot >> u32(8)) & u32(15))


# --- One decision: what each context says, the mixer, the correction. ---


@inlined
def _evaluate(
    nodes,
    curves,
    sets,
    table,
    maps,
    weights,
    final,
    apm,
    guess,
    trusted,
    buckets,
    inputs,
    rows,
    dots,
    node,
    depth,
    i,
    group,
    previous,
):
    """Probability that the token lies in the right half of `node`; leaves its workings in row i of the scratch."""
    contexts, depth = buckets.shape[1], min(depth, DEPTH_SETS - 1)
    seen = _slot_inputs(curves, table, maps, buckets, inputs, nodes[node, LOCAL], i, group)
    rows[i, 0] = _guess_inputs(nodes, guess, trusted, inputs, node, i, contexts)
    rows[i, 1] = sets[1] + node
    rows[i, 2] = sets[2] + seen * DEPTH_SETS + depth
    rows[i, 3] = sets[3] + previous
    rows[i, 4] = seen * DEPTH_SETS + depth
    hashed = (u64(previous) * u64(4099) + u64(node)) * HASH2
    rows[i, 5] = len(nodes) + (np.int64(hashed >> u64(40)) & (len(apm) - len(nodes) - 1))
    return _answer(weights, final, apm, inputs, rows, dots, node, i)


@inlined
def _slot_inputs(curves, table, maps, buckets, inputs, local, i, group):
    """Three inputs a context: the slot's probability, stretched and plain, and what the map says of its counts.

    A slot is 16 bits of probability, two counts of 4 bits, 8 bits of visits; 0 = never seen. Returns how many were seen.
    """
    contexts, seen = buckets.shape[1], 0
    for c in range(contexts):
        slot = table[buckets[group, c] + local]
        known = slot != u32(0)
        cell = maps[c, np.int64((slot >> u32(8)) & u32(0xFF))]
        inputs[i, c] = curves[STRETCH, np.int64(slot >> u32(20))] if known else f32(0)
        inputs[i, contexts + c] = curves[STRETCH, np.int64(cell >> u32(20))] if known else f32(0)
        inputs[i, 2 * contexts + c] = f32(slot >> u32(16)) * f32(4 / 65536) - f32(2) if known else f32(0)
        seen += known
    return seen


@inlined
def _guess_inputs(nodes, guess, trusted, inputs, node, i, contexts):
    """One input for each guess that leads below this node; returns the row of the match selector."""
    low, mid, high, match_set = nodes[node, LOW], nodes[node, MID], nodes[node, HIGH], 0
    for g in range(guess.shape[1]):
        signed = trusted[g] if guess[0, g] >= mid else -trusted[g]
        inputs[i, 3 * contexts + g] = signed if low <= guess[0, g] < high else f32(0)
    inputs[i, 3 * contexts + guess.shape[1]] = f32(0.3)  # bias
    for k in range(guess.shape[1] - contexts - 1, -1, -1):
        if low <= guess[0, k] < high:
            match_set = 1 + 32 * k + guess[1, k]
    return match_set


@inlined
def _answer(weights, final, apm, inputs, rows, dots, node, i):
    """Weight sets -> second layer -> two adaptive maps -> the probability that counts."""
    selectors, total = final.shape[1], f32(0)
    for k in range(selectors):
        row, dot = rows[i, k], f32(0)
        for j in range(weights.shape[1]):
            dot += weights[row, j] * inputs[i, j]
        dot = min(max(dot, f32(-12)), f32(12))
        dots[i, k] = dot
        total += final[rows[i, selectors], k] * dot
    p = sigmoid(total)
    dots[i, selectors], dots[i, selectors + 1] = total, p
    left, share = _apm_cell(total)
    row = rows[i, selectors + 1]
    by_node = apm[node, left] * (f32(1) - share) + apm[node, left + 1] * share
    by_previous = apm[row, left] * (f32(1) - share) + apm[row, left + 1] * share
    p = f32(0.35) * p + f32(0.2) * by_node + f32(0.45) * by_previous
    return np.float64(min(max(p, f32(5e-5)), f32(1 - 5e-5)))


@inlined
def _apm_cell(stretched):
    """Left neighbour of a stretched probability among the 33 points of a map, and how far it is beyond it."""
    place = (min(max(stretched, f32(-7.999)), f32(7.999)) + f32(8)) * f32(2)
    left = np.int64(place)
    return left, place - f32(left)


# --- Learning, along the path that was just predicted. ---


@inlined
def _toward(cell, bit, rates):
    """An adaptive map's cell (22 bits of probability, 10 of visits) after it has seen a bit."""
    visits, p = np.int64(cell) & 1023, np.int64(cell) >> 10
    p += (((bit << 22) - p) * rates[MAP_RATE, visits]) >> 16
    return u32((min(max(p, 64), (1 << 22) - 64) << 10) | min(visits + 1, 400))


@inlined
def _learn_slots(table, maps, rates, transitions, buckets, local, bit, group):
    for c in range(buckets.shape[1]):
        at = buckets[group, c] + local
        slot = np.int64(table[at])
        counts, visits, p = (slot >> 8) & 255, slot & 255, slot >> 16
        if slot == 0:
            p = 32768
        else:
            maps[c, counts] = _toward(maps[c, counts], bit, rates)
        p += ((bit * 65535 - p) * rates[SLOT_RATE, visits]) >> 16
        table[at] = u32((p << 16) | (np.int64(transitions[bit, counts]) << 8) | min(visits + 1, 255))


@inlined
def _learn_guesses(nodes, maps, rates, guess, node, bit, contexts):
    for g in range(guess.shape[1]):
        if nodes[node, LOW] <= guess[0, g] < nodes[node, HIGH]:
            right = np.int64(np.int64(guess[0, g] >= nodes[node, MID]) == bit)
            maps[contexts + g, guess[1, g]] = _toward(maps[contexts + g, guess[1, g]], right, rates)


@inlined
def _learn_mixer(curves, mixer_rates, weights, visits, final, apm, inputs, rows, dots, node, bit, i):
    """Each weight set learns from its own error, the second layer from the mix's, both maps from the bit."""
    selectors, target = final.shape[1], f32(bit)
    step, second = f32(0.002) * (target - dots[i, selectors + 1]), rows[i, selectors]
    for k in range(selectors):
        row, dot = rows[i, k], dots[i, k]
        final[second, k] += step * dot
        error = target - curves[SQUASH, np.int64((dot + f32(12)) * f32(128) + f32(0.5))]
        gain = error * mixer_rates[visits[row]]
        visits[row] = min(visits[row] + 1, 1023)
        for j in range(weights.shape[1]):
            weights[row, j] += gain * inputs[i, j]
    left, share = _apm_cell(dots[i, selectors])
    row, near, far = rows[i, selectors + 1], f32(0.02) * (f32(1) - share), f32(0.02) * share
    apm[node, left] += near * (target - apm[node, left])
    apm[node, left + 1] += far * (target - apm[node, left + 1])
    apm[row, left] += near * (target - apm[row, left])
    apm[row, left + 1] += far * (target - apm[row, left + 1])


# --- Walks through the tree: one path, or the likeliest part of it. ---


@inlined
def _walk(nodes, rank, path, token):
    """Write the path to a token; returns its length."""
    node, length = np.int64(0), 0
    while node >= 0:
        right = np.int64(rank[token] >= nodes[node, MID])
        path[0, length], path[1, length] = node, right
        node = np.int64(nodes[node, LEFT + right])
        length += 1
    return length


@inlined
def _fetch_path(nodes, rank, table, successors, hashes, token):
    """Ask for the cache lines of the path to the token that comes next."""
    node, depth = np.int64(0), 0
    for c in range(len(hashes)):
        _prefetch(successors, c * successors.shape[1] + _cell(successors, hashes[c]))
    while node >= 0:
        if depth % LEVELS == 0:
            _fetch_group(table, hashes, node)
        node = np.int64(nodes[node, LEFT + np.int64(rank[token] >= nodes[node, MID])])
        depth += 1


@inlined
def _fetch_group(table, hashes, node):
    """Ask for the cache lines of the group of nodes that begins at `node`."""
    for c in range(len(hashes)):
        _prefetch(table, _line(table, _key(hashes[c], node)))


@inlined
def _heaviest(masses, ranges, count, floor):
    """The range to split next: the heaviest that is no leaf, the rightmost of equals; -1 if all are below the floor."""
    best, heaviest = -1, floor
    for k in range(count):
        if ranges[0, k] >= 0 and masses[k] >= heaviest:
            best, heaviest = k, masses[k]
    return best


@inlined
def _split(nodes, starts, masses, ranges, best, right, count):
    """Put both halves of range `best` in its place; ranges int64 [2, K]: node (or -1 - leaf) and depth."""
    node, depth, mass = ranges[0, best], ranges[1, best] + 1, masses[best]
    for k in range(count, best + 1, -1):
        starts[k], masses[k], ranges[0, k], ranges[1, k] = (
            starts[k - 1],
            masses[k - 1],
            ranges[0, k - 1],
            ranges[1, k - 1],
        )
    masses[best], ranges[0, best], ranges[1, best] = mass * (1 - right), nodes[node, LEFT], depth
    starts[best + 1], masses[best + 1] = nodes[node, MID], mass * right
    ranges[0, best + 1], ranges[1, best + 1] = nodes[node, RIGHT], depth


@inlined
def _describe(registers, costs, matches, guess, masses, ranges, count, scalars, row):
    """The six scalars beside a view: entropy, top p, match length, has match, last cost, recent cost."""
    entropy, top, length, matched = 0.0, 0.0, np.int64(0), 0.0
    for k in range(count):
        entropy -= masses[k] * log(f32(masses[k]))
    for k in range(count):
        if ranges[0, k] < 0:
            top = max(top, masses[k])
    for k in range(matches):
        if guess[0, k] >= 0:
            length, matched = max(length, registers[MATCHES + 4 * k + LENGTH]), 1.0
    scalars[row, 0], scalars[row, 1], scalars[row, 2] = entropy / 2 - 1, 2 * top - 1, math.log1p(np.float64(length)) - 1
    scalars[row, 3], scalars[row, 4], scalars[row, 5] = matched, min(costs[0], 10.0) / 3 - 0.5, costs[1] / 2 - 0.5


# --- Entry points. ---


def read(*arguments: np.ndarray | float) -> None:
    """Predict each token, then learn it (or only move past it).

    arguments: what the tree, constants, what learns and what moves are, then tokens int64 [N], learn, bits float64 [N], floor
    and the views before each token: cut_starts int64 [N or 0, K], cut_masses float64 [N or 0, K], scalars float64 [N or 0, 6];
    with one row more than tokens, also the view after the last. bits, views: the answer.
    """
    _read(*arguments, *_reading.scratch(arguments))


def dense(*arguments: np.ndarray) -> None:
    """Probability of every token, unpruned. arguments: as of `read`, but behind what moves only out float64 [V]: the answer,
    in token order."""
    nodes = len(arguments[0])
    _dense(*arguments, *_scratch(_sizes(arguments), nodes, 1), np.ones(nodes), np.zeros(nodes, np.int64))


class _Reading(threading.local):
    """The scratch of this thread's last read, which most likely fits the next one: compiled code does not allocate."""

    sizes: tuple[int, ...] = ()
    arrays: tuple[np.ndarray, ...] = ()

    def scratch(self, arguments: tuple) -> tuple[np.ndarray, ...]:
        nodes, width, sizes = len(arguments[0]), arguments[-3].shape[1], _sizes(arguments)
        if self.sizes != (nodes, width, *sizes):
            more = np.zeros((2, DEPTHS), np.int64), np.zeros((2, width), np.int64), np.zeros(nodes, np.int64)
            self.sizes, self.arrays = (nodes, width, *sizes), (*_scratch(sizes, max(width, DEPTHS), DEPTHS), *more)
        return self.arrays


_reading = _Reading()


def _sizes(arguments: tuple) -> tuple[int, int, int, int]:
    """Contexts, match models, S + 1, I."""
    return len(arguments[11]), len(arguments[17]), len(arguments[9]), arguments[13].shape[1]


def _scratch(sizes: tuple[int, int, int, int], groups: int, depths: int) -> tuple[np.ndarray, ...]:
    """hashes, guess, trusted, buckets, keys, inputs, rows, dots. inputs are padded with zeros."""
    contexts, matches, sets, inputs = sizes
    guesses = matches + contexts
    return (
        np.zeros(contexts, u64), np.zeros((2, guesses), np.int64), np.zeros(guesses, f32),
        np.zeros((groups, contexts), np.int64), np.zeros((groups, contexts), u64),
        np.zeros((depths, inputs), f32), np.zeros((depths, sets + 1), np.int64),
        np.zeros((depths, sets + 1), f32),
    )  # fmt: skip


@entry(fastmath=True)
def _read(
    nodes, rank, leaf, text, starts, curves, rates, mixer_rates, transitions, sets,
    table, successors, maps, weights, visits, final, apm, match_table, history, registers, rolling, costs,
    tokens, learn, bits, floor, cut_starts, cut_masses, scalars,
    hashes, guess, trusted, buckets, keys, inputs, rows, dots, path, ranges, ordinal,
):  # fmt: skip
    """See `read`. path, ranges int64 [2, K] and ordinal int64 [V-1] (a group's row in buckets) are scratch too."""
    matches, contexts, width = len(match_table), len(successors), cut_starts.shape[1]
    _set_contexts(hashes, history, registers, rolling)
    for i in range(max(len(tokens), len(cut_starts))):
        previous = np.int64(_past(history, registers[POSITION], 1))
        _expect(rank, curves, successors, maps, history, registers, hashes, guess, trusted)
        learning, node, token = i < len(tokens), np.int64(0), np.int64(0)
        if i < len(cut_starts):  # split the heaviest range until all are light, or the width is used up
            at, masses, count, groups = cut_starts[i], cut_masses[i], 1, 0
            at[0], masses[0], ranges[0, 0], ranges[1, 0] = 0, 1.0, 0, 0
            while count < width:
                best = _heaviest(masses, ranges, count, floor)
                if best < 0:
                    break
                node = ranges[0, best]
                if nodes[node, LOCAL] == 1:
                    _locate(table, hashes, node, buckets, keys, groups)
                    ordinal[node] = groups
                    groups += 1
                right = _evaluate(nodes, curves, sets, table, maps, weights, final, apm, guess, trusted, buckets, inputs, rows, dots,
                                  node, ranges[1, best], 0, ordinal[nodes[node, GROUP]], previous)  # fmt: skip
                _split(nodes, at, masses, ranges, best, right, count)
                count += 1
                for half in range(best, best + 2):  # where a half begins a group, its buckets will be needed soon
                    child = ranges[0, half]
                    if child >= 0 and masses[half] >= floor and nodes[child, LOCAL] == 1:
                        _fetch_group(table, hashes, child)
            _describe(registers, costs, matches, guess, masses, ranges, count, scalars, i)
        if not learning:
            break
        token, p = tokens[i], 1.0
        length = _walk(nodes, rank, path, token)
        for depth in range(length):
            group = depth // LEVELS
            if depth % LEVELS == 0:
                _locate(table, hashes, path[0, depth], buckets, keys, group)
            right = _evaluate(nodes, curves, sets, table, maps, weights, final, apm, guess, trusted, buckets, inputs, rows, dots,
                              path[0, depth], depth, depth, group, previous)  # fmt: skip
            p *= right if path[1, depth] else 1 - right
        costs[0] = -math.log(p)
        bits[i] = costs[0] * (1 / math.log(2))
        costs[1] += 0.05 * (costs[0] - costs[1])
        if learn:
            _learn_successors(successors, hashes, token)
        _advance(text, starts, match_table, history, registers, rolling, token, learn)
        _set_contexts(hashes, history, registers, rolling)
        if not learn:
            continue
        if i + 1 < len(tokens):
            _fetch_path(nodes, rank, table, successors, hashes, tokens[i + 1])
        registers[LEARNED] += 1
        for depth in range(length):
            node, bit, group = path[0, depth], path[1, depth], depth // LEVELS
            if depth % LEVELS == 0:
                _claim(table, buckets, keys, group)
            _learn_mixer(curves, mixer_rates, weights, visits, final, apm, inputs, rows, dots, node, bit, depth)
            _learn_slots(table, maps, rates, transitions, buckets, nodes[node, LOCAL], bit, group)
            _learn_guesses(nodes, maps, rates, guess, node, bit, contexts)


@entry(fastmath=True)
def _dense(
    nodes, rank, leaf, text, starts, curves, rates, mixer_rates, transitions, sets,
    table, successors, maps, weights, visits, final, apm, match_table, history, registers, rolling, costs,
    out, hashes, guess, trusted, buckets, keys, inputs, rows, dots, masses, depths,
):  # fmt: skip
    """See `dense`. Parents come before children; masses float64 [V-1], all 1, and depths int64 [V-1] are scratch too."""
    _set_contexts(hashes, history, registers, rolling)
    _expect(rank, curves, successors, maps, history, registers, hashes, guess, trusted)
    previous = np.int64(_past(history, registers[POSITION], 1))
    for node in range(len(nodes)):
        if nodes[node, LOCAL] == 1:
            _locate(table, hashes, node, buckets, keys, node)
        right = _evaluate(nodes, curves, sets, table, maps, weights, final, apm, guess, trusted, buckets, inputs, rows, dots,
                          node, depths[node], 0, nodes[node, GROUP], previous)  # fmt: skip
        for turn in range(2):
            mass, child = masses[node] * (right if turn else 1 - right), nodes[node, LEFT + turn]
            if child >= 0:
                masses[child], depths[child] = mass, depths[node] + 1
            else:
                out[leaf[-1 - child]] = mass


def warm() -> None:
    """Compile, or load, both entry points."""
    from organism import Field, FieldConfig

    for contexts in ("full", "lite"):
        field = Field(
            [bytes([i]) for i in range(256)] + [b""] * 3, FieldConfig(contexts=contexts, table_mb=1), engine="numba"
        )
        field.read(np.arange(65, 90), views=True)
        field.dense()
