"""Generations as machine code: children are made in place and undone, and only what changed is evaluated again.

Which gates take part is a set of bits, found anew for every child that touches one of them: a walk from the outputs
backwards that visits these gates alone and sums up their energy. Of them a child evaluates those that were mutated or
were not evaluated in the parent, and those that read a value that changed; what it overwrites is logged. Children whose
mutations touch no gate that takes part are not evaluated at all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lightning_compress.functional.compiled import compiled

Array = npt.NDArray[Any]
ERROR, ENERGY, DELAY, GATES, DEPTH = range(5)  # of a cost
IMPROVED, EVALUATED, INHERITED, STAGNATION, KEPT, CHANGED = range(6)  # of the counters
UNKNOWN = -1  # a delay or depth that nothing has asked for
DEBRUIJN = 0x03F79D71B4CB0A89
# Unsigned numbers as indices spare a look whether they count from the end.
_ONE, _TWO, _THREE, _SIX, _LOW = (np.uint64(v) for v in (1, 2, 3, 6, 63))


class Sizes(NamedTuple):
    """Numbers that stay."""

    inputs: int
    pad: int  # bit of a pin, less its number: the first gate begins a word
    gates: int
    outputs: int
    datasets: int
    offspring: int
    moves: int
    limit: int
    absolute: bool
    front: int


class Fixed(NamedTuple):
    """Arrays that stay."""

    column: Array  # int32 [gates + 1]; the last one is that of the outputs
    low: Array  # int64 [columns + 1], how many inputs a gate there may use
    first: Array  # int64 [columns + 1], the first gate pin it may use
    span: Array  # int64 [columns + 1], how many pins
    ids: Array  # int32, functions that a gene may have
    uses: Array  # uint8 [101], 1: a, 2: b, 3: both
    energy: Array  # int64 [101], 1e-6 pJ
    delay: Array  # int64 [101], 1e-3 additions
    counts: Array  # int64 [101], 0 for a wire
    targets: Array  # int32 [datasets, outputs]
    weights: Array  # int64 [datasets, outputs]
    places: Array  # int64 [64], place of a single bit by its product with the de Bruijn number


class State(NamedTuple):
    """Arrays that change; ``genes``, ``cost``, ``random``, ``counters`` and the front are all that a restart needs."""

    genes: Array  # int32
    cost: Array  # int64 [5], of the parent
    random: Array  # uint64 [1]
    counters: Array  # int64 [6]
    values: Array  # int32 [pins * datasets], valid where the parent's gates take part
    on: Array  # uint64, one bit a pin: it takes part in the parent
    now: Array  # uint64, likewise in the child
    chosen: Array  # uint64, in the best child
    touched: Array  # uint64, gates to be evaluated whatever they read
    changed: Array  # uint8 [pins], all zero between children
    log: Array  # int32 [gates], pins whose values were overwritten
    old: Array  # int32 [gates * datasets]
    moves: Array  # int32 [3, moves]: gene, before, after
    best: Array  # int32 [2, moves], of the best child: gene, after
    candidate: Array  # int64 [5], cost of a child
    champion: Array  # int64 [5]
    far: Array  # int64 [2, pins], delay and depth of pins
    front: Array  # int64 [front + 1, 4]: error, energy, delay, gates
    kept: Array  # int32 [front + 1, genes]


@compiled(inline="always")
def gate(f: Any, a: Any, b: Any, s: int) -> Any:
    """The value of function f of two int8 numbers in a data set; the same as ``functions.apply``."""
    if f == 0:
        v = 127 - a
    elif f == 1:
        v = a + b
    elif f == 2:
        v = a - b
    elif f == 3:
        v = a * b
    elif f == 4:
        v = -a
    elif f == 5:
        v = a - 128
    elif f == 6:
        v = a >> 2
    elif f == 7:
        v = a >> 1
    elif f == 8:
        v = a & b
    elif f == 9:
        v = a | b
    elif f == 10:
        v = a ^ b
    elif f == 11:
        v = ~a
    elif f == 12:
        v = a << 1
    elif f == 13:
        v = a + 1
    elif f == 14:
        v = a - 1
    elif f == 15:
        v = a >> 3
    elif f == 16:
        v = a >> 4
    elif f == 17:
        v = a >> 5
    elif f == 18:
        v = a << 2
    elif f == 19:
        v = a << 3
    elif f == 20:
        v = a << 4
    elif f == 21:
        v = a << 5
    elif f == 22:
        v = 1
    elif f == 23:
        v = -1
    elif f == 24:
        v = 0
    elif f == 25:
        v = -128
    elif f == 26:
        v = 127
    elif f == 27:
        v = b if s & 1 else a
    elif f == 28:
        v = 0 if s & 1 else a
    else:
        v = a
    return ((v + 128) & 255) - 128


@compiled(inline="always")
def lowest(bits: Any, places: Array) -> Any:
    """The place of the lowest bit that is set."""
    return places[((bits & (~bits + _ONE)) * np.uint64(DEBRUIJN)) >> np.uint64(58)]


@compiled()
def walk(
    n: Sizes, genes: Array, uses: Array, energy: Array, counts: Array, places: Array, now: Array, cost: Array
) -> None:
    """Which gates take part, what energy they need and how many there are: from the outputs backwards."""
    shift, first, pad = n.pad + n.inputs, 3 * n.gates, np.uint64(n.pad)
    now[:] = 0
    for o in range(n.outputs):
        p = np.uint64(genes[first + o]) + pad
        now[p >> _SIX] |= _ONE << (p & _LOW)
    total, count = 0, 0
    for w in range(
        len(now) - 1, (shift >> 6) - 1, -1
    ):  # operands stand further left, so no word is visited again
        done = np.uint64(0)
        while now[w] & ~done:  # again only if a gate of this word reads another one of it
            bits = now[w] & ~done
            done |= bits
            while bits:
                at = _THREE * np.uint64((w << 6) + lowest(bits, places) - shift)
                bits &= bits - _ONE
                f = np.uint64(genes[at + _TWO])
                used = np.uint64(uses[f])
                total += energy[f]
                count += counts[f]
                a, b = np.uint64(genes[at]) + pad, np.uint64(genes[at + _ONE]) + pad
                now[a >> _SIX] |= (used & _ONE) << (a & _LOW)  # branches would be hard to foresee
                now[b >> _SIX] |= (used >> _ONE) << (b & _LOW)
    cost[ENERGY], cost[GATES] = total, count


@compiled()
def sweep(
    n: Sizes,
    genes: Array,
    uses: Array,
    places: Array,
    on: Array,
    now: Array,
    touched: Array,
    values: Array,
    changed: Array,
    log: Array,
    old: Array,
) -> int:
    """Evaluate what has to be, in order; returns how many pins have another value, which are logged."""
    inputs, sets, shift = np.uint64(n.inputs), np.uint64(n.datasets), n.pad + n.inputs
    found, quiet = 0, True
    for w in range(shift >> 6, len(now)):
        fresh = now[w] & ~on[w]
        must = fresh | (now[w] & touched[w])
        bits = must if quiet else now[w]
        while bits:
            place = lowest(bits, places)
            bits &= bits - _ONE
            bit, g = _ONE << np.uint64(place), np.uint64((w << 6) + place - shift)
            at = _THREE * g
            a, b, f = np.uint64(genes[at]), np.uint64(genes[at + _ONE]), np.uint64(genes[at + _TWO])
            if not (must & bit) and not (changed[a] | changed[b] << 1) & uses[f]:
                continue
            p = inputs + g
            other = False
            for d in range(n.datasets):
                s = np.uint64(d)
                v = gate(np.int64(f), values[a * sets + s], values[b * sets + s], d)
                old[found * n.datasets + d] = values[p * sets + s]
                other = other or v != values[p * sets + s]
                values[p * sets + s] = v
            if other:
                log[found] = p
                found += 1
                if not (fresh & bit):  # all who read a fresh gate are to be evaluated anyway
                    changed[p] = 1
                    if quiet:
                        quiet = False
                        bits = now[w] & ~(bit | (bit - _ONE))
    for i in range(found):
        changed[log[i]] = 0
    return found


@compiled()
def summed_error(n: Sizes, genes: Array, values: Array, targets: Array, weights: Array) -> Any:
    """Of all outputs in all data sets."""
    total, first = 0, 3 * n.gates
    for d in range(n.datasets):
        for o in range(n.outputs):
            gap = np.int64(values[np.uint64(genes[first + o] * n.datasets + d)] - targets[d, o])
            total += weights[d, o] * (abs(gap) if n.absolute else gap * gap)
    return total


@compiled()
def farthest(
    n: Sizes,
    genes: Array,
    uses: Array,
    delay: Array,
    counts: Array,
    places: Array,
    now: Array,
    far: Array,
    cost: Array,
) -> None:
    """Delay and depth of the circuit, into a cost."""
    inputs, shift = n.inputs, n.pad + n.inputs
    for w in range(shift >> 6, len(now)):
        bits = now[w]
        while bits:
            g = (w << 6) + lowest(bits, places) - shift
            bits &= bits - _ONE
            f = genes[3 * g + 2]
            late, deep = 0, 0
            if uses[f] & 1:
                a = genes[3 * g]
                late, deep = far[0, a], far[1, a]
            if uses[f] & 2:
                b = genes[3 * g + 1]
                late, deep = max(late, far[0, b]), max(deep, far[1, b])
            far[0, inputs + g] = late + delay[f]
            far[1, inputs + g] = deep + counts[f]
    late, deep = 0, 0
    for o in range(n.outputs):
        p = genes[3 * n.gates + o]
        late, deep = max(late, far[0, p]), max(deep, far[1, p])
    cost[DELAY], cost[DEPTH] = late, deep


@compiled()
def mutate(
    n: Sizes,
    genes: Array,
    uses: Array,
    column: Array,
    low: Array,
    first: Array,
    span: Array,
    ids: Array,
    random: Array,
    on: Array,
    touched: Array,
    moves: Array,
) -> tuple[int, bool]:
    """Draw up to ``moves`` genes anew; returns how many have another value, and whether one of them matters."""
    count, matters = 0, False
    length, choices, last, shift = np.uint64(len(genes)), np.uint64(len(ids)), 3 * n.gates, n.pad + n.inputs
    x = random[0]
    wanted: Any = -1
    while wanted:
        x ^= x << np.uint64(13)
        x ^= x >> np.uint64(7)
        x ^= x << np.uint64(17)
        drawn = x * np.uint64(0x2545F4914F6CDD1D)
        high, rest = drawn >> np.uint64(32), drawn & np.uint64(0xFFFFFFFF)
        if wanted < 0:
            wanted = 1 + np.int64((high * np.uint64(n.moves)) >> np.uint64(32))
            continue
        wanted -= 1
        place = np.int64((high * length) >> np.uint64(32))
        g = place // 3 if place < last else np.int64(n.gates)
        part = place - 3 * g if place < last else np.int64(3)
        if part == 2:
            value = np.int64(ids[np.int64((rest * choices) >> np.uint64(32))])
        else:
            c = column[g]
            value = np.int64((rest * np.uint64(span[c])) >> np.uint64(32))
            if value >= low[c]:
                value += first[c] - low[c]
        before = genes[place]
        if value == before:
            continue
        moves[0, count], moves[1, count], moves[2, count] = place, before, value
        count += 1
        genes[place] = value
        if part == 3:
            matters = True
        else:
            p = g + shift
            if (on[p >> 6] >> np.uint64(p & 63)) & _ONE and (
                part == 2 or (uses[genes[3 * g + 2]] >> part) & 1
            ):
                matters = True
                touched[p >> 6] |= _ONE << np.uint64(p & 63)
    random[0] = x
    return count, matters


@compiled()
def better(cost: Array, other: Array, limit: int) -> Any:
    """1 if a cost is better than another one, 0 if both are alike, -1 if it is worse, 2 if the delays decide."""
    if cost[ERROR] > limit or other[ERROR] > limit:
        return np.sign(other[ERROR] - cost[ERROR])
    if cost[ENERGY] != other[ENERGY]:
        return np.sign(other[ENERGY] - cost[ENERGY])
    if cost[ERROR] != other[ERROR]:
        return np.sign(other[ERROR] - cost[ERROR])
    if cost[DELAY] == UNKNOWN:
        return 2
    if cost[DELAY] != other[DELAY]:
        return np.sign(other[DELAY] - cost[DELAY])
    if cost[GATES] != other[GATES]:
        return np.sign(other[GATES] - cost[GATES])
    return np.sign(other[DEPTH] - cost[DEPTH])


@compiled()
def dominated(front: Array, count: int, cost: Array, delays: bool) -> bool:
    """Whether a kept trade-off is nowhere worse; without delays these are left out."""
    for k in range(count):
        if (
            front[k, ERROR] <= cost[ERROR]
            and front[k, ENERGY] <= cost[ENERGY]
            and front[k, GATES] <= cost[GATES]
            and (not delays or front[k, DELAY] <= cost[DELAY])
        ):
            return True
    return False


@compiled()
def keep(most: int, front: Array, kept: Array, count: int, cost: Array, genes: Array) -> int:
    """Put a circuit among the trade-offs, in the place of those that it dominates; the most crowded one goes."""
    k = 0
    while k < count:
        if (
            front[k, ERROR] >= cost[ERROR]
            and front[k, ENERGY] >= cost[ENERGY]
            and front[k, DELAY] >= cost[DELAY]
            and front[k, GATES] >= cost[GATES]
        ):
            count -= 1
            front[k] = front[count]
            kept[k] = kept[count]
        else:
            k += 1
    front[count] = cost[:4]
    kept[count] = genes
    count += 1
    if count > most:
        worst = crowded(front[:count])
        count -= 1
        front[worst] = front[count]
        kept[worst] = kept[count]
    return count


@compiled()
def crowded(points: Array) -> int:
    """The row whose neighbours along all axes are nearest (NSGA-II's crowding distance); ends are never taken."""
    count = len(points)
    distance = np.zeros(count)
    for k in range(points.shape[1]):
        rank = np.argsort(points[:, k], kind="mergesort")
        width = points[rank[-1], k] - points[rank[0], k]
        if width == 0:
            continue
        distance[rank[0]] = np.inf
        distance[rank[-1]] = np.inf
        for i in range(1, count - 1):
            distance[rank[i]] += (points[rank[i + 1], k] - points[rank[i - 1], k]) / width
    worst = 0
    for i in range(count):
        if distance[i] <= distance[worst]:
            worst = i
    return worst


@compiled()
def generations(n: Sizes, t: Fixed, s: State, most: int, patience: int, collect: bool, zero: bool) -> int:
    """Up to so many generations; ends earlier with an improvement, when patience is over or nothing is left to gain.

    Args:
        n: sizes.
        t: arrays that stay.
        s: arrays that change.
        most: generations.
        patience: generations without improvement.
        collect: whether trade-offs are kept.
        zero: an error of zero is all that is wanted.

    Returns:
        How many took place.
    """
    column, low, first, span, ids, uses, energy, delay, counts, targets, weights, places = (
        t  # plain names are faster
    )
    genes, cost, random, counters, values, on, now, last, touched, changed, log, old = s[:12]
    moves, best, candidate, champion, far, front, kept = s[12:]
    sets, shift = n.datasets, n.pad + n.inputs
    counters[IMPROVED] = 0
    done = 0
    while done < most and counters[STAGNATION] < patience:
        if cost[ERROR] == 0 and (zero or cost[ENERGY] == 0):
            break
        done += 1
        champion[:] = cost
        chosen, improved, changes = 0, False, False
        for _ in range(n.offspring):
            count, matters = mutate(n, genes, uses, column, low, first, span, ids, random, on, touched, moves)
            found = 0
            if matters:
                counters[EVALUATED] += 1
                walk(n, genes, uses, energy, counts, places, now, candidate)
                found = sweep(n, genes, uses, places, on, now, touched, values, changed, log, old)
                counters[CHANGED] += found
                candidate[ERROR] = summed_error(n, genes, values, targets, weights)
                candidate[DELAY], candidate[DEPTH] = UNKNOWN, UNKNOWN
            else:
                counters[INHERITED] += 1
                candidate[:] = cost
            verdict = better(candidate, champion, n.limit)
            new = (
                collect
                and matters
                and (
                    candidate[ERROR] < cost[ERROR]
                    or candidate[ENERGY] < cost[ENERGY]
                    or candidate[GATES] < cost[GATES]
                )
                and not dominated(front, counters[KEPT], candidate, False)
            )
            if candidate[DELAY] == UNKNOWN and (new or (verdict >= 0 and candidate[ERROR] <= n.limit)):
                farthest(n, genes, uses, delay, counts, places, now, far, candidate)
                verdict = better(candidate, champion, n.limit)
            if new:
                counters[KEPT] = keep(n.front, front, kept, counters[KEPT], candidate, genes)
            if verdict >= 0:
                champion[:] = candidate
                best[0, :count] = moves[0, :count]
                best[1, :count] = moves[2, :count]
                last[:] = now
                chosen, changes, improved = count, matters, improved or verdict > 0
            for j in range(count - 1, -1, -1):
                genes[moves[0, j]] = moves[1, j]
            for i in range(found):
                for d in range(sets):
                    values[log[i] * sets + d] = old[i * sets + d]
            if matters:
                touched[:] = 0
        for j in range(chosen):
            g = best[0, j] // 3
            genes[best[0, j]] = best[1, j]
            if g < n.gates:
                p = g + shift
                touched[p >> 6] |= _ONE << np.uint64(p & 63)
        if changes:
            sweep(n, genes, uses, places, on, last, touched, values, changed, log, old)
            on[:] = last
        touched[:] = 0
        cost[:] = champion
        counters[STAGNATION] += 1
        if improved:
            counters[STAGNATION], counters[IMPROVED] = 0, 1
            if collect:
                if cost[DELAY] == UNKNOWN:
                    farthest(n, genes, uses, delay, counts, places, on, far, cost)
                if not dominated(front, counters[KEPT], cost, True):
                    counters[KEPT] = keep(n.front, front, kept, counters[KEPT], cost, genes)
            break
    return done


@compiled()
def settle(n: Sizes, t: Fixed, s: State) -> None:
    """Evaluate everything, for genes that were just put there, and measure it."""
    s.on[:] = 0
    s.touched[:] = 0
    walk(n, s.genes, t.uses, t.energy, t.counts, t.places, s.now, s.cost)
    sweep(n, s.genes, t.uses, t.places, s.on, s.now, s.touched, s.values, s.changed, s.log, s.old)
    s.on[:] = s.now
    s.cost[ERROR] = summed_error(n, s.genes, s.values, t.targets, t.weights)
    farthest(n, s.genes, t.uses, t.delay, t.counts, t.places, s.on, s.far, s.cost)
