"""Which int8 values to compute from which others, at least cost: a Steiner tree on 256 numbers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lightning_compress.cgp.gates.functions import FUNCTIONS, WIRE, apply
from lightning_compress.energy import EnergyTable
from lightning_compress.functional.compiled import compiled

Array = npt.NDArray[Any]
LOW = 128  # values are counted from -128, so that they are indices
NONE = -1
_NEVER = 1 << 62
_UNIT = 1 << 12  # 1e-6 pJ; every operation costs 1 besides, so that of equal energies the fewest gates win


class Operations(NamedTuple):
    """Functions as tables of values 0 to 255, which stand for -128 to 127."""

    constants: Array  # int64 [n, 2]: value, function
    unary: Array  # int64 [n, 256]
    unary_ids: Array  # int64 [n]
    binary: Array  # int64 [n, 256, 256]
    binary_ids: Array  # int64 [n]


class Derivation(NamedTuple):
    """How values are computed; index v + 128."""

    function: Array  # int64 [256], -1: not computed
    a: Array  # int64 [256], the value that it is computed from, -1: none
    b: Array  # int64 [256], likewise
    level: Array  # int64 [256], columns to the left of it that are needed, at least; -1: not there


@lru_cache(maxsize=8)
def operations(functions: tuple[int, ...]) -> Operations:
    """Tables of those functions that do not depend on the data set; wires give nothing new.

    Args:
        functions: ids.

    Returns:
        The tables.
    """
    values = np.arange(-128, 128)
    ids = [f for f in functions if not FUNCTIONS[f].selects and f != WIRE]
    unary = [f for f in ids if FUNCTIONS[f].uses_a and not FUNCTIONS[f].uses_b]
    binary = [f for f in ids if FUNCTIONS[f].uses_b]
    constants = [(int(apply(f, 0, 0)) + LOW, f) for f in ids if not FUNCTIONS[f].uses_a]
    one = [apply(f, values, values).astype(np.int64) + LOW for f in unary]
    two = [apply(f, values[:, None], values[None]).astype(np.int64) + LOW for f in binary]
    return Operations(
        np.array(constants, np.int64).reshape(-1, 2),
        np.array(one, np.int64).reshape(-1, 256),
        np.array(unary, np.int64),
        np.array(two, np.int64).reshape(-1, 256, 256),
        np.array(binary, np.int64),
    )


def derive(
    there: Array,
    wanted: Array,
    functions: Sequence[int],
    table: EnergyTable,
    *,
    levels: int,
    gate_pj: float = 0.0,
    way: str = "dense",
) -> Derivation:
    """Compute some values from others, with little energy in all.

    Step by step the derivation is chosen that gives most wanted values for its cost; values that only wiring separates
    from it count as given. All 256 values from 0 need 63 operations that cost something, which is the minimum: so many
    values neither are there nor come out of a free operation on another value.

    Args:
        there: bool [256], which values v are there: index v + 128.
        wanted: bool [256], which ones are needed.
        functions: ids that may be used.
        table: costs.
        levels: longest chain of operations, >= 1.
        gate_pj: price of every operation beside its energy, >= 0: the higher, the fewer there are.
        way: "dense", as said above; "plain": add the cheapest value that one operation gives, needed or not, until all
            needed ones are there; "shallow": whatever so many levels lead to is there, for more energy.

    Returns:
        The derivation; wanted values that cannot be had have level -1. Nothing is in it that no wanted value needs.

    Examples:
        >>> import numpy as np
        >>> from lightning_compress.cgp.search.derivation import derive
        >>> from lightning_compress.energy import EnergyTable
        >>> three, twelve = (np.arange(-128, 128) == v for v in (3, 12))
        >>> derivation = derive(three, twelve, range(27), EnergyTable.default(), levels=4)
        >>> int(derivation.function[12 + 128]), int(derivation.a[12 + 128]) - 128  # 12 = 3 << 2
        (18, 3)

    References:
        Voronenko and Püschel, "Multiplierless multiple constant multiplication", ACM TALG 2007; Charikar et al.,
        "Approximation algorithms for directed Steiner problems", 1999 (the choice by density).
    """
    ops = operations(tuple(sorted(set(functions))))
    constant_costs, unary_costs, binary_costs = (
        np.array([_cost(table[int(f)].energy_pj + gate_pj) for f in ids], np.int64)
        for ids in (ops.constants[:, 1], ops.unary_ids, ops.binary_ids)
    )
    near = _near(ops.unary, unary_costs < _UNIT)
    tables = ops.constants, ops.unary, ops.binary, constant_costs, unary_costs, binary_costs
    if way == "shallow":
        function, a, b, level = _shallow(there, wanted, *tables, levels)
    else:
        function, a, b, level = _search(there, wanted, near, *tables, levels, way == "plain")
    ids = np.concatenate([ops.constants[:, 1], ops.unary_ids, ops.binary_ids, [NONE]])
    return Derivation(ids[function], a, b, level)


def _cost(energy_pj: float) -> int:
    return round(min(energy_pj, 1e6) * 1e6) * _UNIT + 1


def _near(unary: Array, free: Array) -> Array:
    """Bool [256, 256]: which values free operations make of a value, itself among them."""
    reached = np.eye(256, dtype=np.float32)
    for row in unary[free]:
        reached[np.arange(256), row] = 1
    for _ in range(8):  # 2^8 operations
        following = np.minimum(reached @ reached, 1)
        if (following == reached).all():
            break
        reached = following
    return reached > 0


@compiled()
def _search(
    there: Array,
    wanted: Array,
    near: Array,
    constants: Array,
    unary: Array,
    binary: Array,
    constant_costs: Array,
    unary_costs: Array,
    binary_costs: Array,
    levels: int,
    plain: bool,
) -> tuple[Array, Array, Array, Array]:
    """The loop of ``derive``; functions are numbered as in the tables: constants, unary, binary."""
    have = there.copy()
    level = np.where(there, 0, -1)
    made = np.full((3, 256), -1, np.int64)  # function, a, b
    by = np.full((3, 256), -1, np.int64)  # likewise, of the cheapest derivation
    # of one operation on what is there: cost, level, and itself
    step_cost, step_level = np.full(256, _NEVER), np.full(256, _NEVER)
    step = np.full((3, 256), -1, np.int64)
    cost, depth = np.empty(256, np.int64), np.empty(256, np.int64)
    stack = np.empty(1024, np.int64)
    least = _NEVER  # cost of an operation
    for costs in (constant_costs, unary_costs, binary_costs):
        for c in costs:
            least = min(least, c)
    cheapest_pair = _NEVER
    for c in binary_costs:
        cheapest_pair = min(cheapest_pair, c)
    first_unary, first_binary = len(constants), len(constants) + len(unary)
    for k in range(len(constants)):
        v = constants[k, 0]
        if constant_costs[k] < step_cost[v]:
            step_cost[v], step_level[v], step[0, v] = constant_costs[k], 1, k
    for v in range(256):
        if have[v]:
            _steps(
                v,
                have,
                level,
                levels,
                unary,
                unary_costs,
                binary,
                binary_costs,
                len(constants),
                step_cost,
                step_level,
                step,
            )
    while True:
        left, most = 0, 0
        for v in range(256):
            left += wanted[v] and not have[v]
        if not left:
            break
        goal = wanted & ~have
        for v in range(0 if plain else 256):
            gain = 0
            for x in range(256):
                gain += near[v, x] and goal[x]
            most = max(most, gain)
        deep = False
        while True:
            # Knuth's generalization of Dijkstra's search; without "deep", no pairs but of values that are there.
            for v in range(256):
                cost[v], depth[v] = (0, level[v]) if have[v] else (step_cost[v], step_level[v])
                by[0, v], by[1, v], by[2, v] = step[0, v], step[1, v], step[2, v]
            settled = have.copy()
            choice, best, nearest = -1, 0.0, _NEVER
            while True:
                u = -1
                for v in range(256):
                    if not settled[v] and (u < 0 or (cost[v], depth[v]) < (cost[u], depth[u])):
                        u = v
                if u < 0 or cost[u] >= _NEVER or (not plain and most / cost[u] < best):
                    break
                settled[u] = True
                if plain:
                    choice = u
                    break
                if goal[u]:
                    nearest = min(nearest, cost[u])
                gain = 0
                for x in range(256):
                    gain += near[u, x] and goal[x]
                if gain / cost[u] > best:
                    choice, best = u, gain / cost[u]
                if depth[u] == levels:
                    continue
                for k in range(len(unary)):
                    w, c = unary[k, u], cost[u] + unary_costs[k]
                    if not settled[w] and (c, depth[u] + 1) < (cost[w], depth[w]):
                        cost[w], depth[w] = c, depth[u] + 1
                        by[0, w], by[1, w], by[2, w] = first_unary + k, u, -1
                if deep:
                    for v in range(256):
                        if not settled[v] or depth[v] == levels:
                            continue
                        for k in range(2 * len(binary)):
                            a, b = (u, v) if k & 1 else (v, u)
                            w = binary[k >> 1, a, b]
                            c, d = cost[a] + cost[b] + binary_costs[k >> 1], max(depth[a], depth[b]) + 1
                            if not settled[w] and (c, d) < (cost[w], depth[w]):
                                cost[w], depth[w] = c, d
                                by[0, w], by[1, w], by[2, w] = first_binary + (k >> 1), a, b
            # Two values of which one is not there cost at least this much.
            if deep or plain or not len(binary) or nearest <= cheapest_pair + least:
                break
            deep = True
        if choice < 0:
            break
        top = 1
        stack[0] = choice
        while top:
            w = stack[top - 1]
            a, b = by[1, w], by[2, w]
            if have[w]:
                top -= 1
            elif a >= 0 and not have[a]:
                stack[top] = a
                top += 1
            elif b >= 0 and not have[b]:
                stack[top] = b
                top += 1
            else:
                top -= 1
                have[w] = True
                above = 0
                if a >= 0:
                    above = level[a]
                if b >= 0:
                    above = max(above, level[b])
                level[w] = above + 1
                made[0, w], made[1, w], made[2, w] = by[0, w], a, b
                _steps(
                    w,
                    have,
                    level,
                    levels,
                    unary,
                    unary_costs,
                    binary,
                    binary_costs,
                    len(constants),
                    step_cost,
                    step_level,
                    step,
                )
    _drop(wanted, made, level)
    return made[0], made[1], made[2], level


@compiled()
def _drop(wanted: Array, made: Array, level: Array) -> None:
    """Leave out what no wanted value needs: operands stand on lower levels."""
    needed = wanted.copy()
    for depth in range(level.max(), 0, -1):
        for w in range(256):
            if level[w] == depth:
                for part in (1, 2):
                    if needed[w] and made[part, w] >= 0:
                        needed[made[part, w]] = True
                if not needed[w]:
                    level[w] = -1
                    made[0, w], made[1, w], made[2, w] = -1, -1, -1


@compiled()
def _shallow(
    there: Array,
    wanted: Array,
    constants: Array,
    unary: Array,
    binary: Array,
    constant_costs: Array,
    unary_costs: Array,
    binary_costs: Array,
    levels: int,
) -> tuple[Array, Array, Array, Array]:
    """Every wanted value by the cheapest operation on what can be there one level before, the shallowest values first.

    ``cost[l, v]`` is the least that v takes within l levels if nothing is shared; what is there already costs nothing.
    A value that is needed earlier than it is there is derived once more, and only that stays.
    """
    first_unary, first_binary = len(constants), len(constants) + len(unary)
    cost = np.full((levels + 1, 256), _NEVER)
    last = levels
    for v in range(256):
        if there[v]:
            cost[0, v] = 0
    for depth in range(1, levels + 1):
        before, now = cost[depth - 1], cost[depth]
        now[:] = before
        for k in range(len(constants)):
            now[constants[k, 0]] = min(now[constants[k, 0]], constant_costs[k])
        for a in range(256):
            if before[a] >= _NEVER:
                continue
            for k in range(len(unary)):
                now[unary[k, a]] = min(now[unary[k, a]], before[a] + unary_costs[k])
            for b in range(256):
                if before[b] < _NEVER:
                    for k in range(len(binary)):
                        w = binary[k, a, b]
                        now[w] = min(now[w], before[a] + before[b] + binary_costs[k])
        if (now == before).all():
            last = depth
            break
    level, made = np.where(there, 0, -1), np.full((3, 256), -1, np.int64)
    stack = np.empty((4 * levels + 4, 5), np.int64)  # value, most levels, function, operands
    left = np.empty(256, np.int64)  # what a value as an operand adds
    for depth in range(1, last + 1):
        for target in range(256):
            if not wanted[target] or cost[depth, target] >= _NEVER or cost[depth - 1, target] < _NEVER:
                continue
            stack[0, 0], stack[0, 1], stack[0, 2] = target, last, -1
            top = 1
            while top:
                v, most, chosen = stack[top - 1, 0], stack[top - 1, 1], stack[top - 1, 2]
                if 0 <= level[v] <= most:
                    top -= 1
                    continue
                if chosen < 0:
                    for u in range(256):
                        left[u] = 0 if 0 <= level[u] < most else cost[most - 1, u]
                    best, a, b = _NEVER, -1, -1
                    for k in range(len(constants)):
                        if constants[k, 0] == v and constant_costs[k] < best:
                            best, chosen, a, b = constant_costs[k], k, -1, -1
                    for u in range(256):
                        if left[u] >= best:
                            continue
                        for k in range(len(unary)):
                            if unary[k, u] == v and left[u] + unary_costs[k] < best:
                                best, chosen, a, b = left[u] + unary_costs[k], first_unary + k, u, -1
                        for w in range(256):
                            if left[u] + left[w] >= best:
                                continue
                            for k in range(len(binary)):
                                if binary[k, u, w] == v and left[u] + left[w] + binary_costs[k] < best:
                                    best, chosen = left[u] + left[w] + binary_costs[k], first_binary + k
                                    a, b = u, w
                    stack[top - 1, 2], stack[top - 1, 3], stack[top - 1, 4] = chosen, a, b
                a, b, ready, above = stack[top - 1, 3], stack[top - 1, 4], True, 0
                for operand in (a, b):
                    if operand >= 0 and not 0 <= level[operand] < most:
                        stack[top, 0], stack[top, 1], stack[top, 2] = operand, most - 1, -1
                        top += 1
                        ready = False
                    elif operand >= 0:
                        above = max(above, level[operand])
                if ready:
                    top -= 1
                    level[v] = above + 1
                    made[0, v], made[1, v], made[2, v] = chosen, a, b
    _drop(wanted, made, level)
    return made[0], made[1], made[2], level


@compiled()
def _steps(
    x: int,
    have: Array,
    level: Array,
    levels: int,
    unary: Array,
    unary_costs: Array,
    binary: Array,
    binary_costs: Array,
    first: int,
    step_cost: Array,
    step_level: Array,
    step: Array,
) -> None:
    """What a value that has just come gives alone and together with others that are there."""
    if level[x] >= levels:
        return
    for k in range(len(unary)):
        w = unary[k, x]
        if (unary_costs[k], level[x] + 1) < (step_cost[w], step_level[w]):
            step_cost[w], step_level[w] = unary_costs[k], level[x] + 1
            step[0, w], step[1, w], step[2, w] = first + k, x, -1
    for v in range(256):
        if not have[v] or level[v] >= levels:
            continue
        for k in range(2 * len(binary)):
            a, b = (x, v) if k & 1 else (v, x)
            w, d = binary[k >> 1, a, b], max(level[a], level[b]) + 1
            if (binary_costs[k >> 1], d) < (step_cost[w], step_level[w]):
                step_cost[w], step_level[w] = binary_costs[k >> 1], d
                step[0, w], step[1, w], step[2, w] = first + len(unary) + (k >> 1), a, b
