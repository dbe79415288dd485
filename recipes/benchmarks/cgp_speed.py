"""Children per second of an evolution of circuits, beside the loop that one would write first, in numba and in C.

    python recipes/benchmarks/cgp_speed.py [--grids 64x16 256x31] [--rounds 9]

The plain loop copies the parent, mutates the copy, finds the gates that take part, evaluates them all, and sums up
error and energy. Random numbers and rules are the same, so that all walk through the same circuits; their genomes are
compared at the end. One core, 1 % mutation, 8 children a generation, 150 inputs, 256 outputs (every int8 value), from a
random circuit (phase 1: error) and from the one that gives all values (phase 2: energy). All take turns; ratios are of
neighbouring runs of the same generations. Children that change no gate that takes part are not evaluated by ours.

The second table takes stages away one after the other, with children that are never kept: what they add is the time of
that stage. Mutation and error alone are the limit of what faster evaluation could reach.

Measured with the defaults on a two-core x86-64 machine, numba 0.68.1, gcc 12.2.0:

    grid    start   loop   children/s  evaluated/s  ours is faster by  lower quartile  upper quartile
    ------  ------  -----  ----------  -----------  -----------------  --------------  --------------
    64x16   random  ours      357,018      335,256                  1               1               1
    64x16   random  numba     176,418      176,418              1.997           1.992           2.036
    64x16   random  C         222,902      222,902              1.573           1.565           1.624
    64x16   adder   ours      590,137      515,400                  1               1               1
    64x16   adder   numba     214,653      214,653              2.788           2.749           2.825
    64x16   adder   C         382,440      382,440              1.563           1.543           1.636
    256x31  random  ours      126,325      120,596                  1               1               1
    256x31  random  numba      34,166       34,166              3.671           3.635           3.689
    256x31  random  C          29,844       29,844              4.217           4.137           4.289
    256x31  adder   ours      300,099      254,432                  1               1               1
    256x31  adder   numba      43,417       43,417              6.857           6.791           7.038
    256x31  adder   C          76,291       76,291               3.95           3.902           3.959

    ns a child                           64x16 random  64x16 adder  256x31 random  256x31 adder
    -----------------------------------  ------------  -----------  -------------  ------------
    mutation, undo                                337          293          1,468         1,375
    which gates take part                       1,127          742          2,678         1,271
    evaluation, undo                              874          450          2,593           759
    error                                         369          299            511           380
    gates that take part                          519          272          1,007           274
    pins that change a child                     11.9          6.7           32.3           9.4
    limit children/s                        1,416,405    1,689,920        505,475       569,935

    reference in Python, 64x16: 705 children/s
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit

from lightning_compress import tables
from lightning_compress.cgp import Problem, Settings
from lightning_compress.cgp.search import loops
from lightning_compress.cgp.search.engine import Compiled
from lightning_compress.cgp.search.reference import Reference
from lightning_compress.cgp.search.seeds import adder, random_circuit

SEED, FOREVER = 1, 1 << 60
ERROR, ENERGY, DELAY, GATES, DEPTH = range(5)
STAGES = ("mutation, undo", "which gates take part", "evaluation, undo", "error")

C_SOURCE = r"""
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    int64_t offspring, moves, inputs, gates, outputs, limit, choices;
    const int32_t *column, *ids, *targets;
    const int64_t *low, *first, *span, *energy, *delay, *counts, *weights;
    const uint8_t *uses;
    int32_t *parent, *child, *best, *values;
    int64_t *cost, *far;
    uint8_t *active;
    uint64_t *random;
} Search;

static int32_t gate(int32_t f, int32_t a, int32_t b) {
    int32_t v = a;
    switch (f) {
        case 0: v = 127 - a; break;       case 1: v = a + b; break;    case 2: v = a - b; break;
        case 3: v = a * b; break;         case 4: v = -a; break;       case 5: v = a - 128; break;
        case 6: v = a >> 2; break;        case 7: v = a >> 1; break;   case 8: v = a & b; break;
        case 9: v = a | b; break;         case 10: v = a ^ b; break;   case 11: v = ~a; break;
        case 12: v = a * 2; break;        case 13: v = a + 1; break;   case 14: v = a - 1; break;
        case 15: v = a >> 3; break;       case 16: v = a >> 4; break;  case 17: v = a >> 5; break;
        case 18: v = a * 4; break;        case 19: v = a * 8; break;   case 20: v = a * 16; break;
        case 21: v = a * 32; break;       case 22: v = 1; break;       case 23: v = -1; break;
        case 24: v = 0; break;            case 25: v = -128; break;    case 26: v = 127; break;
        case 28: v = a; break;
    }
    return (int8_t)v;
}

static uint64_t draw(uint64_t *random) {
    uint64_t x = *random;
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    *random = x;
    return x * 0x2545F4914F6CDD1DULL;
}

static void mutate(const Search *s, int32_t *genes) {
    int64_t last = 3 * s->gates, wanted = 1 + (int64_t)(((draw(s->random) >> 32) * (uint64_t)s->moves) >> 32);
    while (wanted--) {
        uint64_t drawn = draw(s->random), high = drawn >> 32, rest = drawn & 0xFFFFFFFFULL;
        int64_t place = (int64_t)((high * (uint64_t)(last + s->outputs)) >> 32);
        if (place < last && place % 3 == 2) {
            genes[place] = s->ids[(rest * (uint64_t)s->choices) >> 32];
        } else {
            int32_t c = s->column[place < last ? place / 3 : s->gates];
            int64_t value = (int64_t)((rest * (uint64_t)s->span[c]) >> 32);
            genes[place] = (int32_t)(value >= s->low[c] ? value + s->first[c] - s->low[c] : value);
        }
    }
}

static void measure(const Search *s, const int32_t *genes, int64_t *cost) {
    const int32_t *ends = genes + 3 * s->gates;
    memset(s->active, 0, s->inputs + s->gates);
    for (int64_t o = 0; o < s->outputs; o++) s->active[ends[o]] = 1;
    for (int64_t g = s->gates - 1; g >= 0; g--)
        if (s->active[s->inputs + g]) {
            uint8_t uses = s->uses[genes[3 * g + 2]];
            if (uses & 1) s->active[genes[3 * g]] = 1;
            if (uses & 2) s->active[genes[3 * g + 1]] = 1;
        }
    int64_t energy = 0, count = 0, error = 0;
    for (int64_t g = 0; g < s->gates; g++)
        if (s->active[s->inputs + g]) {
            const int32_t *gene = genes + 3 * g;
            s->values[s->inputs + g] = gate(gene[2], s->values[gene[0]], s->values[gene[1]]);
            energy += s->energy[gene[2]];
            count += s->counts[gene[2]];
        }
    for (int64_t o = 0; o < s->outputs; o++) {
        int64_t gap = s->values[ends[o]] - s->targets[o];
        error += s->weights[o] * gap * gap;
    }
    cost[0] = error; cost[1] = energy; cost[2] = -1; cost[3] = count; cost[4] = -1;
}

static void farthest(const Search *s, const int32_t *genes, int64_t *cost) {  /* only where ties ask for it */
    int64_t pins = s->inputs + s->gates, late = 0, deep = 0;
    for (int64_t g = 0; g < s->gates; g++)
        if (s->active[s->inputs + g]) {
            const int32_t *gene = genes + 3 * g;
            uint8_t uses = s->uses[gene[2]];
            int64_t l = 0, d = 0;
            for (int part = 0; part < 2; part++)
                if (uses >> part & 1) {
                    if (s->far[gene[part]] > l) l = s->far[gene[part]];
                    if (s->far[pins + gene[part]] > d) d = s->far[pins + gene[part]];
                }
            s->far[s->inputs + g] = l + s->delay[gene[2]];
            s->far[pins + s->inputs + g] = d + s->counts[gene[2]];
        }
    for (int64_t o = 0; o < s->outputs; o++) {
        int32_t p = genes[3 * s->gates + o];
        if (s->far[p] > late) late = s->far[p];
        if (s->far[pins + p] > deep) deep = s->far[pins + p];
    }
    cost[2] = late; cost[4] = deep;
}

static int sign(int64_t v) { return (v > 0) - (v < 0); }

static int better(const Search *s, const int32_t *genes, int64_t *cost, const int64_t *other) {
    if (cost[0] > s->limit || other[0] > s->limit) return sign(other[0] - cost[0]);
    if (cost[1] != other[1]) {
        if (cost[1] < other[1]) farthest(s, genes, cost);
        return sign(other[1] - cost[1]);
    }
    if (cost[0] != other[0]) {
        if (cost[0] < other[0]) farthest(s, genes, cost);
        return sign(other[0] - cost[0]);
    }
    farthest(s, genes, cost);
    if (cost[2] != other[2]) return sign(other[2] - cost[2]);
    if (cost[3] != other[3]) return sign(other[3] - cost[3]);
    return sign(other[4] - cost[4]);
}

void search(const Search *s, int64_t generations) {
    int64_t champion[5], candidate[5], genes = 3 * s->gates + s->outputs;
    while (generations--) {
        int chosen = 0;
        memcpy(champion, s->cost, sizeof champion);
        for (int64_t k = 0; k < s->offspring; k++) {
            memcpy(s->child, s->parent, genes * sizeof *s->child);
            mutate(s, s->child);
            measure(s, s->child, candidate);
            if (better(s, s->child, candidate, champion) >= 0) {
                memcpy(champion, candidate, sizeof champion);
                memcpy(s->best, s->child, genes * sizeof *s->best);
                chosen = 1;
            }
        }
        if (chosen) {
            memcpy(s->parent, s->best, genes * sizeof *s->best);
            memcpy(s->cost, champion, sizeof champion);
        }
    }
}

void start(const Search *s) {
    measure(s, s->parent, s->cost);
    farthest(s, s->parent, s->cost);
}
"""


@njit
def _draw(random: Any) -> Any:
    x = random[0]
    x ^= x << np.uint64(13)
    x ^= x >> np.uint64(7)
    x ^= x << np.uint64(17)
    random[0] = x
    return x * np.uint64(0x2545F4914F6CDD1D)


@njit
def _mutate(n: Any, t: Any, genes: Any, random: Any) -> None:
    last, low32 = 3 * n.gates, np.uint64(0xFFFFFFFF)
    wanted = 1 + np.int64(((_draw(random) >> np.uint64(32)) * np.uint64(n.moves)) >> np.uint64(32))
    for _ in range(wanted):
        drawn = _draw(random)
        high, rest = drawn >> np.uint64(32), drawn & low32
        place = np.int64((high * np.uint64(len(genes))) >> np.uint64(32))
        if place < last and place % 3 == 2:
            genes[place] = t.ids[np.int64((rest * np.uint64(len(t.ids))) >> np.uint64(32))]
        else:
            c = t.column[place // 3 if place < last else n.gates]
            value = np.int64((rest * np.uint64(t.span[c])) >> np.uint64(32))
            genes[place] = value + t.first[c] - t.low[c] if value >= t.low[c] else value


@njit
def _measure(n: Any, t: Any, genes: Any, values: Any, active: Any, cost: Any) -> None:
    active[:] = 0
    for o in range(n.outputs):
        active[genes[3 * n.gates + o]] = 1
    for g in range(n.gates - 1, -1, -1):
        if active[n.inputs + g]:
            uses = t.uses[genes[3 * g + 2]]
            if uses & 1:
                active[genes[3 * g]] = 1
            if uses & 2:
                active[genes[3 * g + 1]] = 1
    energy, count, error = 0, 0, 0
    for g in range(n.gates):
        if active[n.inputs + g]:
            f = genes[3 * g + 2]
            values[n.inputs + g] = loops.gate(f, values[genes[3 * g]], values[genes[3 * g + 1]], 0)
            energy += t.energy[f]
            count += t.counts[f]
    for o in range(n.outputs):
        gap = np.int64(values[genes[3 * n.gates + o]] - t.targets[0, o])
        error += t.weights[0, o] * gap * gap
    cost[ERROR], cost[ENERGY], cost[GATES], cost[DELAY], cost[DEPTH] = error, energy, count, -1, -1


@njit
def _farthest(n: Any, t: Any, genes: Any, active: Any, far: Any, cost: Any) -> None:
    for g in range(n.gates):
        if active[n.inputs + g]:
            f, late, deep = genes[3 * g + 2], 0, 0
            for part in range(2):
                if (t.uses[f] >> part) & 1:
                    late, deep = (
                        max(late, far[0, genes[3 * g + part]]),
                        max(deep, far[1, genes[3 * g + part]]),
                    )
            far[0, n.inputs + g], far[1, n.inputs + g] = late + t.delay[f], deep + t.counts[f]
    late, deep = 0, 0
    for o in range(n.outputs):
        p = genes[3 * n.gates + o]
        late, deep = max(late, far[0, p]), max(deep, far[1, p])
    cost[DELAY], cost[DEPTH] = late, deep


@njit
def _better(n: Any, t: Any, genes: Any, active: Any, far: Any, cost: Any, other: Any) -> Any:
    if cost[ERROR] > n.limit or other[ERROR] > n.limit:
        return np.sign(other[ERROR] - cost[ERROR])
    verdict = np.sign(other[ENERGY] - cost[ENERGY])
    if verdict == 0:
        verdict = np.sign(other[ERROR] - cost[ERROR])
    if verdict >= 0:
        _farthest(n, t, genes, active, far, cost)
    for part in (DELAY, GATES, DEPTH):
        if verdict == 0:
            verdict = np.sign(other[part] - cost[part])
    return verdict


@njit
def _search(n: Any, t: Any, parent: Any, cost: Any, random: Any, values: Any, generations: int) -> None:
    child, best, active = parent.copy(), parent.copy(), np.zeros(n.inputs + n.gates, np.uint8)
    champion, candidate, far = cost.copy(), cost.copy(), np.zeros((2, n.inputs + n.gates), np.int64)
    for generation in range(generations + 1):
        if generation == 0:  # measure the parent
            _measure(n, t, parent, values, active, cost)
            _farthest(n, t, parent, active, far, cost)
            continue
        champion[:] = cost
        chosen = False
        for _ in range(n.offspring):
            child[:] = parent
            _mutate(n, t, child, random)
            _measure(n, t, child, values, active, candidate)
            if _better(n, t, child, active, far, candidate, champion) >= 0:
                champion[:] = candidate
                best[:] = child
                chosen = True
        if chosen:
            parent[:] = best
            cost[:] = champion


@njit
def _stages(n: Any, t: Any, s: Any, children: int, most: int) -> None:
    """Children with the first stages only, none of which is kept."""
    for _ in range(children):
        count, matters = loops.mutate(
            n, s.genes, t.uses, t.column, t.low, t.first, t.span, t.ids, s.random, s.on, s.touched, s.moves
        )
        if matters and most > 0:
            loops.walk(n, s.genes, t.uses, t.energy, t.counts, t.places, s.now, s.candidate)
            if most > 1:
                found = loops.sweep(
                    n, s.genes, t.uses, t.places, s.on, s.now, s.touched, s.values, s.changed, s.log, s.old
                )
                if most > 2:
                    s.candidate[ERROR] = loops.summed_error(n, s.genes, s.values, t.targets, t.weights)
                for i in range(found):
                    s.values[s.log[i]] = s.old[i]
        if matters:
            s.touched[:] = 0
        for j in range(count - 1, -1, -1):
            s.genes[s.moves[0, j]] = s.moves[1, j]


class Numba:
    """The plain loop, compiled by numba.

    Args:
        engine: not yet used, with the problem, the first parent and the random numbers.
    """

    def __init__(self, engine: Compiled) -> None:
        self.engine, s = engine, engine.state
        self.arrays = s.genes.copy(), s.cost.copy(), s.random.copy(), s.values.copy()

    def run(self, generations: int) -> None:
        """Go on."""
        _search(self.engine.sizes, self.engine.fixed, *self.arrays, generations)

    def genome(self) -> Any:
        """Of the parent."""
        return self.arrays[0]


class C(Numba):
    """The plain loop, compiled by the C compiler of this machine."""

    NUMBERS = ("offspring", "moves", "inputs", "gates", "outputs", "limit")
    FIXED = (
        "column",
        "ids",
        "targets",
        "low",
        "first",
        "span",
        "energy",
        "delay",
        "counts",
        "weights",
        "uses",
    )

    def __init__(self, engine: Compiled) -> None:
        super().__init__(engine)
        (genes, cost, random, values), fixed = self.arrays, engine.fixed
        pins = len(values)
        own = [genes, genes.copy(), genes.copy(), values, cost, np.zeros(2 * pins, np.int64)]
        self.kept = [getattr(fixed, name) for name in self.FIXED] + own + [np.zeros(pins, np.uint8), random]
        fields: list[Any] = [(name, ctypes.c_int64) for name in (*self.NUMBERS, "choices")]
        fields += [(f"array_{i}", ctypes.c_void_p) for i in range(len(self.kept))]
        kind = type("Search", (ctypes.Structure,), {"_fields_": fields})
        numbers = [getattr(engine.sizes, name) for name in self.NUMBERS]
        self.search = kind(*numbers, len(fixed.ids), *(array.ctypes.data for array in self.kept))
        library().start(ctypes.byref(self.search))

    def run(self, generations: int) -> None:
        """Go on."""
        library().search(ctypes.byref(self.search), ctypes.c_int64(generations))


class Ours:
    """The engine of ``evolve``.

    Args:
        engine: ready to go.
        phase: 1 or 2.
    """

    def __init__(self, engine: Compiled | Reference, phase: int) -> None:
        self.engine, self.phase = engine, phase

    def run(self, generations: int) -> None:
        """Go on."""
        while generations:
            done = self.engine.advance(generations, FOREVER, self.phase)
            if not done:
                raise RuntimeError("nothing is left to gain: fewer children, or a smaller grid.")
            generations -= done

    def genome(self) -> Any:
        """Of the parent."""
        return self.engine.genome()


@functools.cache
def library() -> Any:
    """The plain loop in C."""
    with tempfile.TemporaryDirectory() as folder:
        source, built = Path(folder) / "plain.c", Path(folder) / "plain.so"
        source.write_text(C_SOURCE, encoding="utf-8")
        flags = ["-O3", "-march=native", "-shared", "-fPIC"]
        subprocess.run([shutil.which("cc") or "cc", *flags, "-o", str(built), str(source)], check=True)
        return ctypes.CDLL(str(built))


def problem_of() -> Problem:
    """150 inputs, and an output for every int8 value."""
    inputs = np.random.default_rng(SEED).normal(0, 20, 150).round().clip(-128, 127).astype(np.int8)
    return Problem.of([inputs], [np.arange(-128, 128)], multiplex=False)


def engine_of(kind: type[Any], settings: Settings, start: str) -> Any:
    """An engine in phase 1 (random start), or in phase 2 (adder)."""
    problem = problem_of()
    grid, ids = settings.grid(problem), settings.ids(1)
    if start == "adder":
        genome = adder(problem, grid, ids, settings.table).genome
    else:
        genome = random_circuit(grid, ids, np.random.default_rng(SEED)).genome
    engine = kind(problem, settings, genome, SEED)
    engine.weigh(problem.counts, 0)
    if start == "adder":
        engine.collect()
    return engine


def compare(settings: Settings, start: str, rounds: int, generations: int) -> list[dict[str, Any]]:
    """All loops in turns, each the same generations; rows of the first table."""
    ours = Ours(engine_of(Compiled, settings, start), 2 if start == "adder" else 1)
    loops_of: dict[str, Any] = {"ours": ours, "numba": Numba(engine_of(Compiled, settings, start))}
    if shutil.which("cc"):
        loops_of["C"] = C(engine_of(Compiled, settings, start))
    for loop in loops_of.values():
        loop.run(1)  # compiles
    began = np.array(ours.engine.counters[1:3])
    seconds: dict[str, list[float]] = {name: [] for name in loops_of}
    for turn in range(rounds):
        names = list(loops_of)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            begin = time.perf_counter()
            loops_of[name].run(generations)
            seconds[name].append(time.perf_counter() - begin)
    for name, loop in loops_of.items():
        if not np.array_equal(loop.genome(), ours.genome()):
            raise RuntimeError(
                f"{name} came to another circuit than ours from the {start} start: ratios mean nothing."
            )
    evaluated, inherited = np.array(ours.engine.counters[1:3]) - began
    share = evaluated / (evaluated + inherited)
    rows = []
    for name, times in seconds.items():
        rate = settings.offspring * generations / np.array(times)
        ratio = np.quantile(np.array(times) / seconds["ours"], [0.25, 0.5, 0.75])
        rows.append(
            {
                "grid": f"{settings.rows}x{settings.cols}",
                "start": start,
                "loop": name,
                "children/s": int(np.median(rate)),
                "evaluated/s": int(np.median(rate) * (share if name == "ours" else 1)),
                "ours is faster by": float(ratio[1]),
                "lower quartile": float(ratio[0]),
                "upper quartile": float(ratio[2]),
            }
        )
    return rows


def profile(settings: Settings, start: str, rounds: int, children: int) -> list[dict[str, Any]]:
    """What stages add, ns a child, and how much work there is; rows of the second table."""
    phase, generations = 2 if start == "adder" else 1, -(-children // settings.offspring)
    still, full = (Ours(engine_of(Compiled, settings, start), phase) for _ in range(2))
    for loop in (still, full):
        loop.run(generations)
    engine = still.engine
    runs: list[Callable[[], None]] = [
        functools.partial(_stages, engine.sizes, engine.fixed, engine.state, children, k)
        for k in range(len(STAGES))
    ]
    runs.append(functools.partial(full.run, generations))
    times = np.zeros((rounds + 1, len(runs)))
    for turn in range(rounds + 1):  # the first one compiles
        for k, run in enumerate(runs):
            begin = time.perf_counter()
            run()
            times[turn, k] = (time.perf_counter() - begin) / children * 1e9
    added = np.median(np.diff(times[1:], axis=1, prepend=0), axis=0)
    counters = full.engine.counters
    taking_part = int(sum(int(word).bit_count() for word in full.engine.state.on))
    work = {
        "gates that take part": taking_part,
        "pins that change a child": counters[5] / max(1, counters[1]),
        "not evaluated %": 100 * counters[2] / (counters[1] + counters[2]),
        "limit children/s": int(1e9 / (added[0] + added[3])),
    }
    named = dict(zip((*STAGES, "choice, other circuits"), added.tolist(), strict=True))
    return [
        {"grid": f"{settings.rows}x{settings.cols}", "start": start}
        | {f"{k} ns": v for k, v in named.items()}
        | work
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Columns are the keys."""
    return tables.text(list(rows[0]), [list(row.values()) for row in rows])


def main(argv: list[str] | None = None) -> dict[str, list[dict[str, Any]]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--grids", nargs="+", default=["64x16", "256x31"], metavar="ROWSxCOLS")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each loop (9)")
    parser.add_argument("--children", type=int, default=20_000, help="of each turn (20,000)")
    parser.add_argument("--reference", type=int, default=2, help="generations of the reference in Python (2)")
    options = parser.parse_args(argv)
    speeds: list[dict[str, Any]] = []
    shares: list[dict[str, Any]] = []
    for grid in options.grids:
        rows, cols = map(int, grid.split("x"))
        settings = Settings(rows=rows, cols=cols)
        generations = -(-options.children // settings.offspring)
        for start in ("random", "adder"):
            speeds += compare(settings, start, options.rounds, generations)
            shares += profile(settings, start, options.rounds, options.children)
    print(f"{table(speeds)}\n\n{table(shares)}")
    if options.reference:
        rows, cols = map(int, options.grids[0].split("x"))
        settings = Settings(rows=rows, cols=cols)
        slow = Ours(engine_of(Reference, settings, "random"), 1)
        begin = time.perf_counter()
        slow.run(options.reference)
        rate = settings.offspring * options.reference / (time.perf_counter() - begin)
        print(f"\nreference in Python, {options.grids[0]}: {rate:,.3g} children/s")
    return {"speeds": speeds, "shares": shares}


if __name__ == "__main__":
    main()
