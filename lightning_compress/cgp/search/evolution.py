"""``evolve(problem, settings)``: the search, its phases, its history, and how it goes on after a stop."""

from __future__ import annotations

import base64
import binascii
import hashlib
import math
import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_compress.cgp.gates.circuit import Circuit
from lightning_compress.cgp.search.engine import Compiled
from lightning_compress.cgp.search.problem import Problem
from lightning_compress.cgp.search.reference import Reference
from lightning_compress.cgp.search.seeds import adder, random_circuit
from lightning_compress.cgp.search.settings import EvolutionResult, Row, Settings, Solution, run_seed

ENGINES: dict[str, type[Compiled] | type[Reference]] = {"compiled": Compiled, "reference": Reference}
_ARRAYS: dict[str, Any] = {
    "genes": np.int32,
    "random": np.uint64,
    "counters": np.int64,
    "front": np.int64,
    "kept": np.int32,
}
_FORMAT = 1
_CHUNK = 0.25  # seconds of generations between two looks at the clock


class Evolution:
    """A search that can stop after any generation and go on later, here or elsewhere, as if it had not stopped.

    Phase 1 counts every wanted value once, and ends when ``patience`` generations bring nothing or there is no error.
    An error above the threshold becomes the threshold. Phase 2 counts values as often as they are used, and goes on
    with energy; in it trade-offs are collected.

    Args:
        problem: what is asked for.
        settings: of the search; None takes the defaults.
        engine: "compiled", or "reference": the same in plain Python, thousands of times slower.

    Raises:
        ValueError: an unknown engine.

    Examples:
        >>> from lightning_compress.cgp import Evolution, Problem, Settings
        >>> problem = Problem.of([[3, 4]], [[7, 14, 14, 3]])
        >>> evolution = Evolution(problem, Settings(rows=4, cols=4, patience=100))
        >>> evolution.run().best.error
        0

    Source: Miller and Thomson 2000, Cartesian Genetic Programming; Miller (ed.) 2011, Cartesian Genetic Programming.
    """

    def __init__(
        self, problem: Problem, settings: Settings | None = None, *, engine: str = "compiled"
    ) -> None:
        self.problem, self.settings = problem, settings or Settings()
        if engine not in ENGINES:
            raise ValueError(f"engine={engine!r} is unknown; allowed: {', '.join(ENGINES)}.")
        self.grid = self.settings.grid(problem)
        self.history: list[Row] = []
        self.generation = 0
        self.phase = 0
        self.seconds = 0.0
        self.stopped = ""
        self._limit = 0
        self._engine = ENGINES[engine](
            problem, self.settings, self._start().genome, run_seed(self.settings.seed, 1) | 1
        )

    @property
    def best(self) -> Solution:
        """The parent: no circuit met so far is better."""
        circuit = Circuit(self._engine.genome(), self.grid)
        return Solution(circuit, self._engine.cost()[0], circuit.cost(self.settings.table))

    @property
    def evaluations(self) -> int:
        """Children that were evaluated."""
        return self._engine.counters[1]

    @property
    def inherited(self) -> int:
        """Children with no change that matters, which were not."""
        return self._engine.counters[2]

    @property
    def front(self) -> tuple[Solution, ...]:
        """Trade-offs met in phase 2, by rising error; the best circuit is among them."""
        rows = self._engine.trade_offs()
        best = self._engine.cost()[:4]
        if not any(all(a <= b for a, b in zip(cost, best, strict=True)) for cost, _ in rows):
            rows.append((best, self._engine.genome()))
        rows.sort(key=lambda row: row[0])
        found = []
        for cost, genes in rows:
            circuit = Circuit(genes, self.grid)
            found.append(Solution(circuit, cost[0], circuit.cost(self.settings.table)))
        return tuple(found)

    def run(self, callback: Callback | None = None) -> EvolutionResult:
        """Go on to the end.

        Args:
            callback: called with the evolution after every new row of the history, and about once a second; it may save
                ``state_dict()``, and stops the search by returning True.

        Returns:
            What was found.
        """
        self.stopped = "" if self.stopped == "callback" else self.stopped
        began, most, seen = time.monotonic() - self.seconds, 64, self.seconds
        if not self.phase:
            self._begin(1)
            self._look(callback)
        while not self.stopped:
            before, rows, started = self.generation, len(self.history), time.monotonic()
            self._step(most, began)
            if self.generation - before == most:
                took = max(time.monotonic() - started, 1e-6)
                most = max(1, min(1 << 20, int(most * min(4.0, _CHUNK / took))))
            if len(self.history) > rows or self.seconds - seen > 1:
                seen = self.seconds
                self._look(callback)
        return EvolutionResult(
            self.problem,
            self.settings,
            self.best,
            self.front,
            tuple(self.history),
            self.generation,
            self.evaluations,
            self.inherited,
            self.stopped,
        )

    def state_dict(self) -> dict[str, Any]:
        """All that another evolution of the same problem and settings needs to go on, as JSON values."""
        saved: dict[str, npt.NDArray[Any]] = self._engine.dump()
        return {
            "format": _FORMAT,
            "settings": self.settings.config(),
            "problem": digest(self.problem),
            "phase": self.phase,
            "limit": self._limit,
            "generation": self.generation,
            "seconds": self.seconds,
            "stopped": self.stopped,
            "history": [list(vars(row).values()) for row in self.history],
            **{name: _packed(array) for name, array in saved.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another evolution stood; nothing changes if that is not possible.

        Args:
            state: what ``state_dict`` returned.

        Raises:
            ValueError: a state of another problem or other settings (lists the differences), or a damaged one.
        """
        config = self.settings.config()
        try:
            if state["format"] != _FORMAT:
                raise ValueError(f"its format is {state['format']}, and {_FORMAT} is known")
            given = state["settings"]
            differ = [
                f"{k}={given.get(k)!r} there, {v!r} here" for k, v in config.items() if given.get(k) != v
            ]
            if state["problem"] != digest(self.problem):
                differ.append("another problem")
            if differ:
                raise ValueError("; ".join(differ))
            arrays = {name: _unpacked(state[name], dtype) for name, dtype in _ARRAYS.items()}
            phase, limit, generation = (int(state[k]) for k in ("phase", "limit", "generation"))
            history = [Row(*row) for row in state["history"]]
            seconds, stopped = float(state["seconds"]), str(state["stopped"])
            if phase:
                self._engine.restore(arrays, self._weights(phase), limit)
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"the state is damaged ({error!r}): begin anew.") from error
        except ValueError as error:
            raise ValueError(
                f"the state cannot be used: {error}. Begin anew, or give what belongs to it."
            ) from error
        self.phase, self._limit, self.generation = phase, limit, generation
        self.history, self.seconds, self.stopped = history, seconds, stopped

    def _start(self) -> Circuit:
        ids = self.settings.ids(self.problem.datasets)
        if self.settings.seed_circuit == "adder":
            return adder(self.problem, self.grid, ids, self.settings.table)
        return random_circuit(self.grid, ids, np.random.default_rng(self.settings.seed))

    def _weights(self, phase: int) -> npt.NDArray[np.int64]:
        counts = self.problem.counts
        return (counts > 0).astype(np.int64) if phase == 1 else counts

    def _begin(self, phase: int) -> None:
        """Phase 1 of what was just made, or phase 2."""
        weights = self._weights(phase)
        number = self.problem.weights if phase == 2 else int(weights.sum())
        self.phase, self._limit = phase, math.floor(self.settings.limit(number) + 1e-9)
        self._engine.weigh(weights, self._limit)
        error = self._engine.cost()[0]
        if phase == 2:
            if error > self._limit:
                self._limit = error
                self._engine.weigh(weights, error)
            self._engine.collect()
        self._record()
        if not self.grid.outputs:
            self.stopped = "no outputs"

    def _step(self, most: int, began: float) -> None:
        """Some generations, or the next phase."""
        left = most if self.settings.generations is None else self.settings.generations - self.generation
        self.generation += self._engine.advance(min(most, left), self.settings.patience, self.phase)
        self.seconds = time.monotonic() - began
        improved, stagnation = self._engine.counters[0], self._engine.counters[3]
        error, energy = self._engine.cost()[:2]
        if improved:
            self._record()
        perfect = error == 0 and (self.phase == 1 or energy == 0)
        if not perfect and stagnation < self.settings.patience:
            self.stopped = "generations" if self.generation == self.settings.generations else ""
        elif self.phase == 1:
            self._begin(2)
        else:
            self.stopped = "perfect" if perfect else "patience"

    def _record(self) -> None:
        error, energy, delay, gates, depth = self._engine.cost()
        row = self.generation, self.phase, round(self.seconds, 3), error, energy, delay, depth, gates
        self.history.append(Row(*row))

    def _look(self, callback: Callback | None) -> None:
        if callback is not None and callback(self) and not self.stopped:
            self.stopped = "callback"


Callback = Callable[[Evolution], bool | None]


def evolve(
    problem: Problem,
    settings: Settings | None = None,
    *,
    callback: Callback | None = None,
    resume: Mapping[str, Any] | None = None,
    engine: str = "compiled",
) -> EvolutionResult:
    """Search for a circuit that gives the wanted weights with little energy.

    The same problem and settings give the same circuits on every machine, however often the search was stopped.

    Args:
        problem: inputs and wanted weights.
        settings: of the search; None takes the defaults.
        callback: called with the ``Evolution`` after every new row of its history and about once a second; returning
            True stops it.
        resume: ``Evolution.state_dict()`` of a search that was stopped.
        engine: "compiled" or "reference".

    Returns:
        The best circuit, the front of trade-offs and the history.

    Raises:
        ValueError: a state of another problem or other settings.

    Examples:
        >>> from lightning_compress.cgp import Problem, Settings, evolve
        >>> result = evolve(Problem.of([[0]], [list(range(-8, 8))]), Settings(rows=8, cols=8, patience=200))
        >>> result.met, result.best.cost.energy_pj < 0.03
        (True, True)

    Source: Miller and Thomson 2000, Cartesian Genetic Programming.
    """
    evolution = Evolution(problem, settings, engine=engine)
    if resume is not None:
        evolution.load_state_dict(resume)
    return evolution.run(callback)


def digest(problem: Problem) -> str:
    """What tells a problem from others.

    Args:
        problem: any.

    Returns:
        32 hexadecimal digits.

    Examples:
        >>> from lightning_compress.cgp import Problem
        >>> from lightning_compress.cgp.search.evolution import digest
        >>> digest(Problem.of([[1]], [[2]])) == digest(Problem.of([[1]], [[3]]))
        False
    """
    text = hashlib.blake2b(digest_size=16)
    arrays: list[npt.NDArray[Any]] = [problem.inputs, problem.targets, problem.counts, *problem.wires]
    for array in arrays:
        text.update(f"{array.dtype} {array.shape} ".encode())
        text.update(np.ascontiguousarray(array).tobytes())
    text.update(f"{problem.loaded}".encode())
    return text.hexdigest()


def _packed(array: npt.NDArray[Any]) -> dict[str, Any]:
    data = zlib.compress(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).tobytes(), 1)
    return {"shape": list(array.shape), "zlib": base64.b64encode(data).decode("ascii")}


def _unpacked(packed: Mapping[str, Any], dtype: Any) -> npt.NDArray[Any]:
    kind = np.dtype(dtype).newbyteorder("<")
    try:
        data = zlib.decompress(base64.b64decode(packed["zlib"], validate=True))
    except (binascii.Error, zlib.error) as error:
        raise ValueError(f"an array is damaged: {error}") from None
    return np.frombuffer(data, dtype=kind).reshape(packed["shape"]).astype(dtype)
