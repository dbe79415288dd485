"""Search: its parts against brute force, its models against compress(), and its promises: seed, resume, executors."""

import copy
import csv
import itertools
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

import lightning_compress as lc
from lightning_compress.functional.tradeoff import hypervolume, pareto
from lightning_compress.pipelines import CompressionConfig
from lightning_compress.search import SearchResult, nsga, search, space_of
from lightning_compress.search.assemble import Assembler
from lightning_compress.search.greedy import greedy
from lightning_compress.search.journal import Journal
from lightning_compress.search.objectives import WORST
from lightning_compress.search.propose import Evolution, Random

ROOT = Path(__file__).resolve().parent.parent
SPACE = {"*": {"sparsity": (0, 0.95), "bits": (2, 8)}}
FAST = {"Quantize": {"calibrator": "minmax"}}


def points(axes: int = 2) -> st.SearchStrategy[Any]:
    """Small integers, so that ties are common."""
    shape = st.tuples(st.integers(1, 12), st.just(axes))
    return hnp.arrays(np.float64, shape, elements=st.integers(0, 6).map(float))


def beats(a: Any, b: Any) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


# -- pure functions --------------------------------------------------------------------------------------------


@given(st.integers(1, 3).flatmap(points))
def test_ranks_are_those_of_the_definition(array: Any) -> None:
    left, wanted, level = set(range(len(array))), {}, 0
    while left:
        front = {i for i in left if not any(beats(array[j], array[i]) for j in left)}
        wanted |= dict.fromkeys(front, level)
        left, level = left - front, level + 1
    assert nsga.ranks(array).tolist() == [wanted[i] for i in range(len(array))]


@given(st.integers(1, 3).flatmap(points))
def test_the_front_is_what_nothing_beats_each_once(array: Any) -> None:
    wanted = {tuple(p) for p in array if not any(beats(q, p) for q in array)}
    found = [tuple(array[i]) for i in pareto(array)]
    assert found == sorted(wanted)


@given(st.integers(1, 4).flatmap(points))
def test_hypervolume_counts_the_cells_of_a_grid(array: Any) -> None:
    """With integer values it is the number of unit cells between the points and the reference."""
    reference = 5
    cells = itertools.product(range(reference), repeat=array.shape[1])
    wanted = sum(any(all(p <= c) for p in array) for c in map(np.array, cells))
    assert hypervolume(array, np.full(array.shape[1], float(reference))) == wanted


@given(points())
def test_crowding_by_hand(array: Any) -> None:
    room = nsga.crowding(array)
    for i, value in enumerate(room):
        total, end = 0.0, False
        for axis in array.T:
            order = sorted(range(len(axis)), key=lambda k: (axis[k], k))
            place = order.index(i)
            if place in (0, len(order) - 1):
                end = True
            elif axis.max() > axis.min():
                total += (axis[order[place + 1]] - axis[order[place - 1]]) / (axis.max() - axis.min())
        assert (np.isinf(value)) if end else value == pytest.approx(total)


@given(points(), st.integers(1, 12))
def test_survivors_are_never_of_a_worse_front(array: Any, count: int) -> None:
    alive = nsga.survivors(array, count)
    level = nsga.ranks(array)
    assert len(set(alive.tolist())) == len(alive) == min(count, len(array))
    gone = [i for i in range(len(array)) if i not in alive]
    assert all(level[i] <= level[j] for i in alive for j in gone)


@given(st.integers(0, 2**32 - 1))
def test_children_stay_in_range_and_integers_stay_integers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    low, high = np.array([0.0, 0.0, 2.0]), np.array([1.0, 0.0, 9.0])
    integer = np.array([False, False, True])
    a, b = np.array([0.1, 0.0, 2.0]), np.array([0.9, 0.0, 9.0])
    child = nsga.mutate(nsga.crossover(a, b, rng), low, high, integer, rng)
    assert (child >= low).all() and (child <= high).all() and child[2] == round(child[2])
    assert child[2] in (2, 3, 8, 9)  # of a parent, or one step from it


def test_the_better_of_two_wins() -> None:
    level, room = np.array([0, 1, 0]), np.array([1.0, 9.0, 5.0])
    drawn = [nsga.tournament(level, room, np.random.default_rng(i)) for i in range(300)]
    counts = np.bincount(drawn, minlength=3) / 300  # 1/9, 3/9 and 5/9 in order of merit
    assert abs(counts - [3 / 9, 1 / 9, 5 / 9]).max() < 0.08


# -- space -----------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Layers of every kind: convolution, embedding, attention, a block that can be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(3)))
        self.conv = nn.Conv1d(16, 8, 3)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embedding(x)
        x = self.blocks(self.attention(x, x, x, need_weights=False)[0])
        return self.head(self.conv(x.transpose(1, 2)).mean(2))


@pytest.fixture
def net() -> nn.Module:
    return Net().eval()


TOKENS = torch.randint(12, (16, 6), generator=torch.Generator().manual_seed(0))


def test_a_layer_takes_the_entry_that_names_it_best(net: nn.Module) -> None:
    table = {
        "*": {"sparsity": (0, 0.9)},
        "blocks.*": {"bits": (2, 4), "sparsity": [0, 0.5, 0.75]},
        "conv": {"rank_ratio": (0.2, 1.0), "sparsity": (0, 0.9)},
        "head": {},
        "embedding": {"bits": (3, 5)},
        "blocks.1": {"keep": True},
    }
    genes = {(g.layer, g.kind): g for g in space_of(net, table, TOKENS).genes}
    assert {key for key, _ in genes if key.startswith("attention")} == {
        "attention.in_proj_weight",
        "attention.out_proj.weight",
    }
    assert genes["blocks.0.0.weight", "sparsity"].values == (0, 0.5, 0.75)
    assert genes["blocks.0.0.weight", "bits"].values == (2, 3, 4)
    [shared] = space_of(net, {"conv": {"clusters": (2, 32)}}).genes
    assert shared.values == (2, 3, 4, 6, 8, 11, 16, 23, 32) and shared.value(shared.at(1)) == 2
    assert genes["conv.weight", "rank_ratio"].real and genes["embedding.weight", "bits"].values == (3, 4, 5)
    assert ("blocks.1", "keep") in genes and not any(key.startswith("head") for key, _ in genes)
    strong = {k: g.value(g.at(1)) for k, g in genes.items()}
    assert strong["blocks.0.0.weight", "bits"] == 2 and strong["conv.weight", "rank_ratio"] == 0.2
    assert strong["blocks.1", "keep"] == 0


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"*": {"sparsty": (0, 1)}}, "did you mean 'sparsity'"),
        ({"nothing": {"bits": (2, 4)}}, "nothing"),
        ({"*": {"bits": (2, 4)}, "conv": {"clusters": (2, 4)}}, "bits and clusters"),
        ({"*": {"bits": 4}}, r"bits=4 for .*give \(low, high\)"),
        ({"*": {"bits": (2, 17)}}, r"allowed are different integers in \[1, 16\]"),
        ({"*": {"bits": (1, 4), "sparsity": (0, 0.5)}}, r"integers in \[2, 16\]"),
        ({"*": {"bits": (2.5, 4)}}, "different integers"),
        ({"*": {"sparsity": (0.5, 0.5)}}, "different numbers"),
        ({"*": {"rank_ratio": (0, 1)}}, "rank_ratio"),
        ({"*": {}}, "the space has no gene"),
        ({"head": {"keep": True}}, "fits no block that can be left out; these are: blocks.0"),
        ([], "a space is a mapping"),
    ],
)
def test_spaces_that_cannot_be_meant_are_refused(net: nn.Module, table: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        space_of(net, table, TOKENS)


def test_a_configuration_names_settings_by_its_types(net: nn.Module) -> None:
    def kinds(*types: str) -> set[str]:
        return {g.kind for g in space_of(net, CompressionConfig(compression_types=types)).genes}

    assert kinds("evolutionary") == {"sparsity", "bits"}
    assert kinds("evolutionary", "low_rank", "mixed_precision") == {"rank_ratio", "bits"}
    assert kinds("weight_sharing", "wanda") == {"clusters", "sparsity"}


# -- assembling ------------------------------------------------------------------------------------------------

TABLE: dict[str, Any] = {
    "blocks.0.0": {"sparsity": (0, 0.95), "bits": (2, 8)},
    "attention*": {"rank_ratio": (0.1, 1.0), "sparsity": (0, 0.9)},
    "blocks.2.0": {"rank_ratio": (0.05, 0.3), "bits": (2, 8)},
    "conv": {"sparsity": (0, 0.9)},
    "embedding": {"rank_ratio": (0.05, 0.3), "bits": (2, 4)},
    "blocks.1": {"keep": True},
}


def same(a: nn.Module, b: nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(t, other[n]) for n, t in one.items())


SHARED = {
    "blocks.*": {"sparsity": (0, 0.9), "clusters": (2, 32)},
    "embedding": {"rank_ratio": (0.05, 0.3), "clusters": (2, 9)},
    "blocks.1": {"keep": True},
}


@pytest.mark.parametrize("table", [TABLE, SHARED], ids=["quantized", "shared"])
def test_models_are_those_of_compress_and_do_not_depend_on_what_came_before(
    net: nn.Module, table: dict[str, Any]
) -> None:
    space = space_of(net, table, TOKENS)
    layers = list(dict.fromkeys(g.layer for g in space.genes if g.kind != "keep"))
    warm = Assembler(net, layers, FAST, TOKENS)
    before = copy.deepcopy(net.state_dict())
    rng = np.random.default_rng(0)
    for i in range(8):
        genome = space.random(rng)
        settings = space.settings((float(i % 2), *genome[1:]))  # the first gene: the block stays, or does not
        model, transforms = warm.build(settings)
        cold, _ = Assembler(net, layers, FAST, TOKENS).build(settings)
        expected = lc.compress(net, transforms, example_input=TOKENS).model
        assert same(model, expected) and same(cold, expected)
        lc.save(model, f"{i}.lcz")
        lc.save(cold, "cold.lcz")
        assert Path(f"{i}.lcz").read_bytes() == Path("cold.lcz").read_bytes()
        restored = lc.load(f"{i}.lcz", into=Net().eval())
        assert torch.equal(restored(TOKENS), model(TOKENS)) and not lc.inspect(f"{i}.lcz").stale
        assert (type(model.blocks[1]).__name__ == "Bypass") == (i % 2 == 0)
        shares = {k: s["sparsity"] for k, s in settings.items() if "sparsity" in s and "rank_ratio" not in s}
        for key, share in shares.items():
            if not (key.startswith("blocks.1") and i % 2 == 0):
                weight = dict(model.named_parameters())[key]
                assert int((weight == 0).sum()) >= int(share * weight.numel() + 0.5)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_what_is_remembered_is_bounded(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_compress.search import assemble

    monkeypatch.setattr(assemble, "_CACHE_BYTES", 4000)
    space = space_of(net, {"blocks.*": {"bits": (2, 8)}})
    assembler = Assembler(net, [g.layer for g in space.genes])
    for seed in range(10):
        assembler.build(space.settings(space.random(np.random.default_rng(seed))))
        held = sum(assemble._nbytes(plan) for plan in assembler._plans.values())
        assert held == assembler._bytes <= 4000


@pytest.mark.filterwarnings("ignore:.*outputs of the model are constant zero")
def test_options_under_which_layers_depend_on_one_another_are_refused(net: nn.Module) -> None:
    with pytest.raises(ValueError, match="did you mean 'Quantize'"):
        Assembler(net, ["head.weight"], {"Quantise": {}})
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4))
    assembler = Assembler(model, ["0.weight"], {"Prune": {"pattern": "channel"}})
    with pytest.raises(ValueError, match=r"also changes 0\.bias"):
        assembler.build({"0.weight": {"sparsity": 0.5}})


def test_greedy_points_lose_less_than_uniform_ones_of_the_same_size(small: nn.Module) -> None:
    space = space_of(small, SPACE)
    assembler = Assembler(small, [g.layer for g in space.genes[::2]], FAST)
    found = greedy(assembler, space, [DATA], 8)
    assert len(found) == len(set(found)) >= 4
    sizes = [lc.archive.size_of(assembler.build(space.settings(g))[0]) for g in found]
    assert sizes == sorted(sizes) and sizes[-1] > 1.5 * sizes[0]
    assert greedy(assembler, space, [], 3) == greedy(assembler, space, [], 16)[:3]


# -- search ----------------------------------------------------------------------------------------------------


def trained() -> nn.Module:
    """A small classifier of four clusters, as good as they allow."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
        labels = torch.arange(4).repeat(64)
        x = torch.randn(4, 8)[labels] + 0.7 * torch.randn(256, 8)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), labels).backward()
            optimizer.step()
    return model.requires_grad_(False).eval()


DATA = torch.randn(128, 8, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def small() -> nn.Module:
    return trained()


def run(model: nn.Module, **options: Any) -> SearchResult:
    defaults = {"data": DATA, "population": 8, "generations": 3, "options": FAST}
    return search(model, SPACE, **defaults | options)


def rows(result: SearchResult) -> list[Any]:
    return [(row.genome, dict(row.values)) for row in result.evaluated]


def test_evolution_beats_chance_on_five_seeds(small: nn.Module) -> None:
    """At equal evaluations; docs/methods/search.md has the figures of LeNet-5."""
    for seed in range(5):
        one, other = (run(small, backend=b, generations=4, seed=seed) for b in ("evolution", "random"))
        assert len(one.evaluated) == len(other.evaluated) == 32
        assert one.hypervolume[-1] > other.hypervolume[-1]


def test_values_are_those_of_the_files_and_outputs(small: nn.Module) -> None:
    result = run(small)
    assert result.hypervolume == tuple(sorted(result.hypervolume)) and len(result.hypervolume) == 3
    dense = 4 * sum(p.numel() for p in small.parameters())
    for row in result:
        model = result.model(row)
        size = lc.save(model, "row.lcz").file_bytes
        assert row.values["size_fraction"] == size / dense == Path("row.lcz").stat().st_size / dense
        changed = (model(DATA).argmax(1) != small(DATA).argmax(1)).double().mean()
        assert row.values["error"] == pytest.approx(float(changed))
        assert same(lc.compress(small, result.transforms(row)).model, model)
    every = np.array([list(row.values.values()) for row in result.evaluated])
    assert not any(beats(p, list(row.values.values())) for p in every for row in result)
    assert result.hypervolume[-1] == pytest.approx(hypervolume(every, np.array([1.0, 1.0])))


class Backwards(Executor):
    """Runs what was submitted last first, and only when somebody waits."""

    def __init__(self) -> None:
        self.jobs: list[Any] = []

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        executor = self

        class Job(Future):  # type: ignore[type-arg]
            def result(self, timeout: Any = None) -> Any:
                while executor.jobs:
                    job, call = executor.jobs.pop()
                    job.set_result(call())
                return super().result(timeout)

        job: Future[Any] = Job()
        self.jobs.append((job, lambda: fn(*args, **kwargs)))
        return job


def test_executors_change_nothing(small: nn.Module) -> None:
    sizes = {"population": 6, "generations": 2}
    alone = run(small, **sizes)
    assert rows(run(small, executor=Backwards(), **sizes)) == rows(alone)
    with ThreadPoolExecutor(3) as pool:
        assert rows(run(small, executor=pool, **sizes)) == rows(alone)
    with ProcessPoolExecutor(
        1, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        assert rows(run(small, executor=pool, **sizes)) == rows(alone)


def test_dask_is_an_executor_too(small: nn.Module) -> None:
    distributed = pytest.importorskip("distributed")
    with distributed.Client(
        processes=False, n_workers=1, threads_per_worker=2, dashboard_address=None
    ) as client:
        assert rows(run(small, generations=1, executor=client.get_executor())) == rows(
            run(small, generations=1)
        )


def test_same_seed_same_search_and_another_seed_another(small: nn.Module) -> None:
    state = torch.get_rng_state()
    assert rows(run(small)) == rows(run(small))
    assert rows(run(small)) != rows(run(small, seed=1))
    assert torch.equal(torch.get_rng_state(), state)


SCRIPT = """
import importlib, os, signal, sys
import torch
torch.set_num_threads(1)
import test_search
from lightning_compress.search.journal import Journal

class Killed(Journal):
    def add(self, genome, values):
        super().add(genome, values)
        if len(self.known) == int(sys.argv[1]):
            with self.path.open("a") as file:
                file.write('{"genome": [0.1, ')  # a line that the process did not finish
            os.kill(os.getpid(), signal.SIGKILL)

importlib.import_module("lightning_compress.search.run").Journal = Killed
test_search.run(test_search.trained(), resume=sys.argv[2])
"""


def test_a_killed_search_goes_on_to_the_same_front(small: nn.Module) -> None:
    after = 13
    file = Path("search.jsonl").resolve()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(after), str(file)],
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert len(file.read_text().splitlines()) == after + 3  # header, start, and half a line
    again = run(small, resume=file)
    straight = run(small)
    assert rows(again) == rows(straight) and again.rows == straight.rows
    assert len(file.read_text().splitlines()) == 24 + 2
    calls = []
    more = run(small, resume=file, generations=4, progress=lambda *seen: calls.append(seen))
    assert rows(more)[:24] == rows(straight) and [number for number, _ in calls] == [0, 1, 2, 3]


def test_files_of_other_searches_are_refused(small: nn.Module) -> None:
    run(small, resume="a.jsonl", generations=1)
    for options, what in (
        ({"seed": 1}, "seed"),
        ({"objectives": ("size_fraction",)}, "objectives"),
        ({"backend": "random"}, "backend"),
    ):
        with pytest.raises(ValueError, match=rf"a\.jsonl is of a search with another {what}"):
            run(small, resume="a.jsonl", generations=1, **options)
    other = copy.deepcopy(small)
    other[0].weight.data.mul_(2)
    with pytest.raises(ValueError, match="another model"):
        run(other, resume="a.jsonl")
    Path("b.jsonl").write_text("hello\n")
    with pytest.raises(ValueError, match="is no file of a search"):
        run(small, resume="b.jsonl")
    text = Path("a.jsonl").read_text()
    Path("a.jsonl").write_text(text + "nonsense\n")
    with pytest.raises(ValueError, match=r"a\.jsonl: line 11 is no evaluation"):
        run(small, resume="a.jsonl", generations=1)
    with pytest.raises(ValueError, match="make it first"):
        run(small, resume="no/such/folder.jsonl")


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=5))
def test_journals_keep_every_bit(pairs: list[tuple[float, float]]) -> None:
    Path("j.jsonl").unlink(missing_ok=True)
    first = Journal("j.jsonl", {"seed": 0})
    for i, pair in enumerate(pairs):
        first.add((float(i), *pair), pair)
    assert Journal("j.jsonl", {"seed": 0}).known == first.known


def test_the_best_under_a_target_is_told_truthfully(small: nn.Module) -> None:
    result = run(small, target_ratio=0.4)
    best = result.best()
    assert best is not None and result.target_met
    fits = [row.values for row in result.evaluated if row.values["size_fraction"] <= 0.4]
    assert best.values["error"] == min(values["error"] for values in fits)
    assert best == result.best(size_fraction=0.4) and "size_fraction <= 0.4" in str(result)
    nothing = run(small, target_ratio=0.001)
    assert nothing.best() is None and not nothing.target_met and "no row" in str(nothing)
    assert result.best(size_fraction=2.0, error=2.0) == result.rows[0]
    with pytest.raises(ValueError, match="macs is no objective here"):
        result.best(macs=3)


def macs_of_head(model: nn.Module) -> float:
    return float(sum(p.numel() for p in model[4].parameters()))


def test_other_objectives(small: nn.Module) -> None:
    space = {"*": {"rank_ratio": (0.05, 1.0)}}
    result = search(
        small, space, objectives=("macs", "error", macs_of_head), data=DATA, population=6, generations=2
    )
    assert result.objectives == ("macs", "error", "macs_of_head")
    for row in result:
        model = result.model(row)
        assert row.values["macs_of_head"] == macs_of_head(model)
    assert len({row.values["macs"] for row in result.evaluated}) > 3
    with pytest.warns(UserWarning, match="latency_ms is noisy"):
        timed = search(
            small, SPACE, objectives=("latency_ms",), data=DATA, population=2, generations=1, options=FAST
        )
    assert all(row.values["latency_ms"] > 0 for row in timed.evaluated)


def broken(model: nn.Module) -> float:
    return float("nan")


def test_values_that_are_not_finite_are_the_worst(small: nn.Module) -> None:
    result = run(small, objectives=("size_fraction", broken), generations=2, reference=(1.0, 1.0))
    assert all(row.values["broken"] == WORST for row in result.evaluated) and result.hypervolume[-1] == 0


def test_rows_are_written_and_drawn(small: nn.Module) -> None:
    result = run(small, target_ratio=0.4)
    result.save("front.json")
    result.save("front.csv")
    stored = json.loads(Path("front.json").read_text())
    assert [row["values"] for row in stored["rows"]] == [dict(row.values) for row in result]
    assert stored["evaluations"] == 24 and stored["target_met"] is True
    with open("front.csv") as file:
        table = list(csv.DictReader(file))
    assert [float(line["size_fraction"]) for line in table] == [row.values["size_fraction"] for row in result]
    for line, row in zip(table, result, strict=True):
        assert float(line["0.weight bits"]) == row.settings["0.weight"]["bits"]
    with pytest.raises(ValueError, match=r"allowed endings are \.csv and \.json"):
        result.save("front.txt")
    pytest.importorskip("matplotlib")
    ax = result.plot()
    drawn = ax.lines[0].get_xydata().tolist()
    assert drawn == [list(row.values.values()) for row in result]
    assert len(ax.collections[0].get_offsets()) == 24 and ax.lines[1].get_xdata()[0] == 0.4


def test_optuna_is_a_backend(small: nn.Module) -> None:
    pytest.importorskip("optuna")
    one, other = (run(small, backend="optuna") for _ in range(2))
    assert rows(one) == rows(other) and 8 < len(one.evaluated) <= 24


@pytest.mark.parametrize("kind", [Evolution, Random])
def test_no_genome_is_proposed_twice(kind: Any, small: nn.Module) -> None:
    space = space_of(small, {"0": {"bits": (2, 8)}, "2": {"bits": (2, 8)}})
    proposer = kind(space, [], 0)
    seen = []
    for _ in range(4):
        asked = proposer.ask(10)
        proposer.tell(asked, [(sum(g), -sum(g)) for g in asked])
        seen += asked
    assert len(set(seen)) == len(seen) == 40  # of 49


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"population": 1}, "population=1"),
        ({"generations": 0}, "generations=0"),
        ({"backend": "evolve"}, "unknown backend 'evolve'"),
        ({"objectives": ("eror",)}, "did you mean 'error'"),
        ({"objectives": ()}, "give at least one"),
        ({"objectives": ("error", "error")}, "each once"),
        ({"target_ratio": 2}, "0 < target_ratio < 1"),
        ({"data": None}, "give data=, or example_input="),
        ({"data": None, "objectives": ("macs",)}, "macs and latency_ms need an input"),
        ({"reference": (1.0,)}, "give one value for each of size_fraction, error"),
    ],
)
def test_what_cannot_be_meant_is_refused(small: nn.Module, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(small, **options)
