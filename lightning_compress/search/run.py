"""``search(model, space)``: the loop of proposing, evaluating and remembering."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any

import numpy as np
from torch import nn

from lightning_compress import archive
from lightning_compress.compress import compress
from lightning_compress.functional.tradeoff import hypervolume, pareto
from lightning_compress.metrics import Task
from lightning_compress.pipelines.config import CompressionConfig
from lightning_compress.pipelines.errors import OutputError
from lightning_compress.pipelines.keys import unknown
from lightning_compress.pipelines.limits import Limits
from lightning_compress.search.assemble import Assembler
from lightning_compress.search.greedy import greedy
from lightning_compress.search.journal import Journal, Values
from lightning_compress.search.objectives import Objective, Problem, names_of
from lightning_compress.search.processes import Work
from lightning_compress.search.propose import BACKENDS, proposer
from lightning_compress.search.result import Row, SearchResult
from lightning_compress.search.space import Genome, space_of
from lightning_compress.stats import Calibration
from lightning_compress.stats.keeping import Kept
from lightning_compress.steps import fingerprint


def search(
    model: nn.Module,
    space: Mapping[str, Mapping[str, Any]] | CompressionConfig,
    *,
    objectives: Sequence[Objective] = ("size_fraction", "error"),
    population: int = 24,
    generations: int = 20,
    target_ratio: float | None = None,
    backend: str = "evolution",
    resume: str | os.PathLike[str] | None = None,
    seed: int = 0,
    example_input: Any = None,
    data: Any = None,
    task: Task | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    reference: Sequence[float] | None = None,
    executor: Executor | None = None,
    coder: str = "auto",
    progress: Callable[[int, float], None] | None = None,
) -> SearchResult:
    r"""Find the best compromises between size, error and cost, with settings of their own for every layer.

    A genome holds a number for every layer and setting of the space. Evolution (NSGA-II) starts from settings that are
    good layer by layer (``search.greedy``) and random ones, and keeps what no other model beats everywhere. Sizes are
    lengths of really encoded archives. ``population * generations`` different models are evaluated, the first
    generation among them; same seed, same models, in whatever order an executor finishes them.

    Args:
        model: any module; it is left as it is.
        space: layer name or pattern -> setting -> range: sparsity, rank_ratio (reals), bits, clusters (integers),
            ``keep: true`` (blocks that may be left out); see ``search.space_of``. Or a configuration, whose compression
            types say which settings, and whose target, seed and coder hold where none are given here.
        objectives: what is to be small: "size_fraction" (file bytes / dense bytes), "error" (``OutputErrorRate``),
            "macs", "latency_ms", or functions of the compressed model.
        population: models in a generation, >= 2.
        generations: >= 1, the first one included.
        target_ratio: size fraction to keep, for ``SearchResult.best``.
        backend: "evolution"; "random", the baseline; or "optuna", its Parzen estimator.
        resume: file of evaluations; a search that was killed goes on from it to the same result.
        seed: of everything drawn.
        example_input: one input, to draw inputs, count and time with.
        data: inputs for the error, as for ``compress``; all of them are used.
        task: "classification" or "regression"; None: by the axes of the output.
        options: transform name -> further options, such as ``{"Quantize": {"calibrator": "minmax"}}``.
        reference: what the hypervolume is measured from, one value for each objective; None: 1 for size fraction and
            error, for others what the original has.
        executor: of ``concurrent.futures`` or alike, such as dask's ``Client.get_executor()``; None evaluates one after
            the other. Model, inputs and functions must be picklable.
        coder: entropy coder of the archives.
        progress: is called after every generation with its number and the hypervolume.

    Returns:
        The Pareto set, everything that was evaluated, and the models on demand.

    Raises:
        ValueError: an option out of range, a space that does not fit the model, or a file of another search.

    Examples:
        >>> from lightning_compress.search import search
        >>> net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> found = search(net, {"*": {"bits": (2, 8)}}, data=torch.randn(64, 16), population=6, generations=2)
        >>> row = found.best(size_fraction=0.9)
        >>> row.values["size_fraction"] <= 0.9, len(found.evaluated)
        (True, 12)

    Source: Deb et al. 2002, NSGA-II; Wang et al. 2019, HAQ (bits per layer under a budget).
    """
    if population < 2 or generations < 1:
        raise ValueError(
            f"population={population}, generations={generations}: allowed are population >= 2, generations >= 1."
        )
    if backend not in BACKENDS:
        raise ValueError(unknown(backend, BACKENDS, "unknown backend"))
    if isinstance(space, CompressionConfig):
        target_ratio = space.target_ratio if target_ratio is None else target_ratio
        seed, coder = seed or space.seed, space.coder if coder == "auto" else coder
    target = {} if target_ratio is None else {"target_ratio": target_ratio}
    Limits(target)
    names = names_of(objectives)
    if "latency_ms" in names:
        warnings.warn(
            "latency_ms is noisy, the more so beside other work: compare candidates again with benchmark().",
            stacklevel=2,
        )
    compress(model, [])  # weights that are not finite are refused before any work
    inputs = Calibration(example_input=example_input, data=data, seed=seed, origin=model, kept=Kept())
    error = OutputError(model, inputs, task) if "error" in names else None
    x = inputs.example(model)
    if x is None and {"macs", "latency_ms"} & set(names):
        raise ValueError("macs and latency_ms need an input: give example_input= or data=.")
    genes = space_of(model, space, x)
    layers = list(dict.fromkeys(gene.layer for gene in genes.genes if gene.kind != "keep"))
    problem = Problem(
        Assembler(model, layers, options, x),
        genes,
        tuple(objectives),
        error,
        x,
        archive.dense_bytes(model),
        coder,
    )
    if reference is None:
        reference = _reference(problem, model, names)
    if len(reference) != len(names):
        raise ValueError(f"reference={list(reference)}: give one value for each of {', '.join(names)}.")

    about = {
        "model": fingerprint(model),
        "space": genes.describe(),
        "objectives": list(names),
        "population": population,
        "backend": backend,
        "seed": seed,
        "options": {name: {k: str(v) for k, v in rest.items()} for name, rest in (options or {}).items()},
    }
    journal = Journal(resume, about)
    if journal.start is None:
        batches = error.batches if error is not None else [] if x is None else [x]
        journal.begin(
            greedy(problem.assembler, genes, batches, population // 2) if backend != "random" else []
        )
    proposing = proposer(backend, genes, journal.start or [], seed, len(names))
    evaluate: Work[Genome, Values] = Work(problem, executor)
    evaluated: dict[Genome, Values] = {}
    volumes: list[float] = []
    for generation in range(generations):
        asked = proposing.ask(population)
        fresh = [genome for genome in dict.fromkeys(asked) if genome not in journal.known]
        for genome, values in zip(fresh, evaluate(fresh), strict=True):
            journal.add(genome, values)
        evaluated |= {genome: journal.known[genome] for genome in asked}
        proposing.tell(asked, [journal.known[genome] for genome in asked])
        volumes.append(hypervolume(np.array([*evaluated.values()]), np.array(reference, dtype=float)))
        if progress is not None:
            progress(generation, volumes[-1])
    every = tuple(
        Row(genome, dict(zip(names, values, strict=True)), genes.settings(genome))
        for genome, values in evaluated.items()
    )
    front = pareto(np.array([*evaluated.values()]))
    return SearchResult(
        problem=problem,
        objectives=names,
        rows=tuple(every[i] for i in front),
        evaluated=every,
        hypervolume=tuple(volumes),
        reference=tuple(map(float, reference)),
        target={"size_fraction": target_ratio} if target_ratio and "size_fraction" in names else {},
        backend=backend,
        seed=seed,
    )


def _reference(problem: Problem, model: nn.Module, names: Sequence[str]) -> list[float]:
    usual = {"size_fraction": 1.0, "error": 1.0}
    rest = [] if set(names) <= set(usual) else problem.values(model)
    return [usual[name] if name in usual else rest[i] for i, name in enumerate(names)]
