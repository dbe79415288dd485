"""What to try next: by evolution, by chance, or as optuna says; each is asked for genomes and told their values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from lightning_compress.functional.tradeoff import Floats
from lightning_compress.search import nsga
from lightning_compress.search.space import Genome, Space

_ATTEMPTS = 50


class Proposer(ABC):
    """Proposes genomes, generation by generation; the same seed and values give the same genomes.

    Args:
        space: the genes.
        start: genomes to begin with.
        seed: of everything drawn.
    """

    def __init__(self, space: Space, start: Sequence[Genome], seed: int) -> None:
        self.space, self.start, self.seed = space, list(start), seed
        self.generation = 0
        self.asked: set[Genome] = set()

    def ask(self, count: int) -> list[Genome]:
        """The next genomes, none of which was asked for before (unless the space has no others).

        Args:
            count: how many.

        Returns:
            Genomes.
        """
        rng = np.random.default_rng([self.seed, self.generation])
        found: list[Genome] = []
        for _ in range(count):
            genome = self.propose(len(found), rng)
            for attempt in range(_ATTEMPTS):
                if genome not in self.asked:
                    break
                near = attempt < _ATTEMPTS // 2
                genome = self.again(genome, rng) if near else self.space.random(rng)
            self.asked.add(genome)
            found.append(genome)
        self.generation += 1
        return found

    @abstractmethod
    def propose(self, position: int, rng: np.random.Generator) -> Genome:
        """One genome.

        Args:
            position: in its generation.
            rng: source of randomness.

        Returns:
            The genome; it may be a known one.
        """

    def again(self, genome: Genome, rng: np.random.Generator) -> Genome:
        """Another one in the place of a genome that is known.

        Args:
            genome: the known one.
            rng: source of randomness.

        Returns:
            The genome.
        """
        return self.space.random(rng)

    @abstractmethod
    def tell(self, genomes: Sequence[Genome], values: Sequence[tuple[float, ...]]) -> None:
        """Learn what the genomes of the last generation are worth.

        Args:
            genomes: what `ask` returned.
            values: of their objectives.
        """


class Random(Proposer):
    """Uniformly drawn genomes; the starting points are not used."""

    def propose(self, position: int, rng: np.random.Generator) -> Genome:
        """Any genome."""
        return self.space.random(rng)

    def tell(self, genomes: Sequence[Genome], values: Sequence[tuple[float, ...]]) -> None:
        """Nothing is learned."""


class Evolution(Proposer):
    """NSGA-II: starting points and random ones first; then children of the best, which live on beside them."""

    def __init__(self, space: Space, start: Sequence[Genome], seed: int) -> None:
        super().__init__(space, start, seed)
        self._genes: list[Genome] = []
        self._points = np.zeros((0, 0))
        self._order: Any = None

    def propose(self, position: int, rng: np.random.Generator) -> Genome:
        """A starting point or a child of two that won a tournament."""
        if self.generation == 0:
            return self.start[position] if position < len(self.start) else self.space.random(rng)
        level, room = self._order
        a, b = (np.array(self._genes[nsga.tournament(level, room, rng)]) for _ in range(2))
        return self._mutated(nsga.crossover(a, b, rng), rng)

    def again(self, genome: Genome, rng: np.random.Generator) -> Genome:
        """The same one, mutated once more."""
        return self._mutated(np.array(genome), rng)

    def _mutated(self, genes: Floats, rng: np.random.Generator) -> Genome:
        space = self.space
        return space.tidy(nsga.mutate(genes, space.low, space.high, space.integer, rng))

    def tell(self, genomes: Sequence[Genome], values: Sequence[tuple[float, ...]]) -> None:
        """Parents and children compete; as many as there are children stay."""
        every = [*self._genes, *genomes]
        told = np.array(values)
        points = np.concatenate([self._points, told]) if self._genes else told
        alive = nsga.survivors(points, max(len(genomes), len(self._genes)))
        self._genes, self._points = [every[i] for i in alive], points[alive]
        self._order = nsga.order(self._points)


class Optuna(Proposer):
    """Optuna's multi-objective tree-structured Parzen estimator, on the same space."""

    def __init__(self, space: Space, start: Sequence[Genome], seed: int, objectives: int) -> None:
        super().__init__(space, start, seed)
        try:
            import optuna
        except ImportError:
            raise ImportError(
                "backend='optuna' needs optuna: pip install 'lightning-compress[search]'."
            ) from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study = optuna.create_study(
            directions=["minimize"] * objectives, sampler=optuna.samplers.TPESampler(seed=seed)
        )
        for genome in start:
            self._study.enqueue_trial({str(i): self._plain(i, v) for i, v in enumerate(genome)})
        self._trials: list[Any] = []

    def ask(self, count: int) -> list[Genome]:
        """What optuna suggests, known or not: it must be told of what it has asked for."""
        self.generation += 1
        return [self.propose(i, np.random.default_rng(0)) for i in range(count)]

    def _plain(self, position: int, number: float) -> float:
        return number if self.space.genes[position].real else int(number)

    def propose(self, position: int, rng: np.random.Generator) -> Genome:
        """What optuna suggests."""
        trial = self._study.ask()
        self._trials.append(trial)
        numbers = []
        for i, gene in enumerate(self.space.genes):
            low, high = gene.bounds
            numbers.append(
                trial.suggest_float(str(i), low, high)
                if gene.real
                else trial.suggest_int(str(i), int(low), int(high))
            )
        return self.space.tidy(np.array(numbers, dtype=np.float64))

    def tell(self, genomes: Sequence[Genome], values: Sequence[tuple[float, ...]]) -> None:
        """Tell optuna, in the order of the genomes."""
        for trial, value in zip(self._trials, values, strict=True):
            self._study.tell(trial, list(value))
        self._trials = []


def proposer(backend: str, space: Space, start: Sequence[Genome], seed: int, objectives: int) -> Proposer:
    """The proposer of a name.

    Args:
        backend: "evolution", "random" or "optuna".
        space: the genes.
        start: genomes to begin with.
        seed: of everything drawn.
        objectives: how many there are.

    Returns:
        A new proposer.
    """
    if backend == "optuna":
        return Optuna(space, start, seed, objectives)
    return {"evolution": Evolution, "random": Random}[backend](space, start, seed)


BACKENDS: Collection[str] = ("evolution", "random", "optuna")
