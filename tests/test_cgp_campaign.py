"""Campaigns: the same files from any executor and any split, after any interruption; scripts that a shell can read."""

import json
import os
import shutil
import signal
import subprocess
import time
import warnings
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_compress.cgp import campaign
from lightning_compress.cgp.campaign import running, single
from lightning_compress.cgp.campaign.processes import Processes
from lightning_compress.cgp.campaign.states import HEARTBEAT, alone, stands
from lightning_compress.cgp.campaign.statistics import Growing, lines_of
from lightning_compress.cgp.campaign.texts import details, differences, rebuild, settings_of, train_data
from lightning_compress.cgp.experiments import Experiment, Place
from lightning_compress.cgp.gates.circuit import Circuit
from lightning_compress.cgp.gates.functions import FUNCTIONS
from lightning_compress.cgp.search.evolution import evolve
from lightning_compress.cgp.search.problem import Problem
from lightning_compress.cgp.search.settings import Settings, run_seed
from lightning_compress.energy import EnergyTable, Operation

SMALL = {
    "rows": 4,
    "cols": 4,
    "patience": 100,
    "generations": 300,
    "offspring": 4,
    "mutation": 0.1,
    "front": 8,
}
SMALL |= {"seed_circuit": "random"}


def experiment(name: str = "a", seed: int = 1, runs: int = 6, **options: object) -> Experiment:
    random = np.random.default_rng(seed)
    problem = Problem.of([random.integers(-20, 20, 4)], [random.integers(-128, 128, 40)])
    chosen = Settings(**{**SMALL, "error_threshold": 30.0, "seed": seed, **options})
    return Experiment(name, problem, chosen, (Place("fc.weight", np.arange(40)),), runs)


def contents(folder: Path, *, but: tuple[str, ...] = ("config.json",)) -> dict[str, list[str] | bytes]:
    """Every file; of statistics the cells, without times."""
    found: dict[str, list[str] | bytes] = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in but):
        name = file.relative_to(folder).as_posix()
        if "statistics/" in name:
            found[name] = [",".join([*line.split(",")[:2], *line.split(",")[3:]]) for line in lines_of(file)]
        else:
            found[name] = file.read_bytes()
    return found


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two experiments of six runs, one after the other in this process."""
    folder = tmp_path_factory.mktemp("serial")
    campaign.plan([experiment("a", 1), experiment("b", 2)], folder, log_error="all")
    outcomes = campaign.run(folder)
    assert [(o.folder.name, o.run, o.status) for o in outcomes] == [
        (n, r, "finished") for n in "ab" for r in range(6)
    ]
    return folder


def test_files_of_an_experiment(serial: Path) -> None:
    """Each against the evolution itself, done here again."""
    folder = campaign.Folder.open(serial / "a")
    wanted = experiment("a", 1)
    used: Counter[int] = Counter()
    for run in range(6):
        result = evolve(wanted.problem, Settings(**{**vars(wanted.settings), "seed": run_seed(1, run)}))
        rows = campaign.read_rows(folder.statistics(run))
        assert (
            ",".join(rows[0])
            == ",".join(campaign.COLUMNS)
            == (
                "run,generation,timestamp,error,quantized_energy,energy,area,quantized_delay,delay,depth,gate_count,"
                "chromosome"
            )
        )
        assert [
            (int(r["run"]), int(r["generation"]), int(r["error"]), int(r["quantized_energy"])) for r in rows
        ] == [(run, row.generation, row.error, row.energy) for row in result.history]
        for row, cells in zip(result.history, rows, strict=True):
            cost = Circuit.from_text(cells["chromosome"]).cost()
            assert (
                (cost.gate_count, cost.depth)
                == (row.gate_count, row.depth)
                == (int(cells["gate_count"]), int(cells["depth"]))
            )
            assert round(cost.energy_pj * 1e6) == row.energy == round(float(cells["energy"]) * 1e6)
            assert (
                round(cost.delay * 1e3)
                == row.delay
                == int(cells["quantized_delay"])
                == round(float(cells["delay"]) * 1e3)
            )
            assert cells["area"] == ""
        best = Circuit.from_text(folder.chromosome(run).read_text())
        assert best.genome.tolist() == result.best.circuit.genome.tolist()
        weights = np.loadtxt(folder.weights(run), dtype=int)
        assert weights.tolist() == wanted.problem.decode(wanted.problem.outputs(best))[0].tolist()
        front = campaign.read_rows(folder.front(run))
        assert [int(r["error"]) for r in front] == [s.error for s in result.front]
        assert [Circuit.from_text(r["chromosome"]).genome.tolist() for r in front] == [
            s.circuit.genome.tolist() for s in result.front
        ]
        needed, reached = list(best.outputs), set()  # backwards, gate by gate
        while needed:
            gate = int(needed.pop()) - best.grid.inputs
            if gate >= 0:
                reached.add(gate)
                needed += best.operands(gate)
        used.update(int(best.gates[gate, 2]) for gate in reached)
    lines = [line.split(",") for line in folder.gate_statistics.read_text().splitlines()]
    assert lines[0] == ["function", "name", "count"]
    assert {int(number): int(count) for number, _, count in lines[1:]} == {f: used[f] for f in FUNCTIONS}
    assert len(used) > 3


def test_processes_give_the_same_files(serial: Path, tmp_path: Path) -> None:
    campaign.plan([experiment("a", 1), experiment("b", 2)], tmp_path, log_error="all")
    seen: list[single.Outcome] = []
    outcomes = campaign.run(tmp_path, jobs=2, on_progress=seen.append)
    assert [o.run for o in outcomes] == [*range(6), *range(6)] and {o.status for o in outcomes} == {
        "finished"
    }
    assert len(seen) == 12 and set(seen) == set(outcomes)
    assert contents(tmp_path, but=()) == contents(serial, but=())
    before = contents(tmp_path)
    assert {o.status for o in campaign.run([tmp_path / "a", tmp_path / "a", tmp_path])} == {"skipped"}
    assert contents(tmp_path) == before


def test_dask_gives_the_same_files(serial: Path, tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    campaign.plan([experiment("a", 1), experiment("b", 2)], tmp_path, log_error="all")
    cluster = distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None, protocol="inproc://"
    )
    with cluster, distributed.Client(cluster) as client:
        outcomes = campaign.run(tmp_path, executor=client)
    assert len(outcomes) == 12 and {o.status for o in outcomes} == {"finished"}
    assert contents(tmp_path, but=()) == contents(serial, but=())


def test_three_batches_merged_are_one_experiment(serial: Path, tmp_path: Path) -> None:
    folders = campaign.plan([experiment("a", 1), experiment("b", 2)], tmp_path, batches=3, log_error="all")
    assert [f.name for f in folders] == [f"{n}_batch_{i}" for n in "ab" for i in range(3)]
    assert [campaign.Folder.open(f).config.numbers for f in folders[:3]] == [
        range(2),
        range(2, 4),
        range(4, 6),
    ]
    with pytest.raises(
        ValueError, match=r"a_batch_0 \(runs 0-1 have not finished\); a_batch_1 \(runs 2-3 .*allow_missing"
    ):
        campaign.merge(tmp_path, "a")
    campaign.run([tmp_path / "a_batch_2", tmp_path / "a_batch_0"])
    with pytest.raises(ValueError, match=r"missing: a_batch_1 \(runs 2-3 have not finished\)\."):
        campaign.merge(tmp_path, "a")
    some = campaign.merge(tmp_path, "a", allow_missing=True)
    assert campaign.status(some).folders[0].missing == (2, 3)
    campaign.run(tmp_path / "a_batch_1")
    merged = campaign.merge(tmp_path, "a")
    assert merged == some == tmp_path / "a"
    extra = merged / "train_statistics" / "fitness" / "statistics.csv"
    parts = [campaign.Folder.open(merged).statistics(run) for run in range(6)]
    assert lines_of(extra) == [line for part in parts for line in lines_of(part)]
    extra.unlink()
    assert contents(merged, but=()) == contents(serial / "a", but=())
    assert campaign.status(merged).finished

    lean = campaign.merge(tmp_path, "a", mode="lean", top=2, into=tmp_path / "short")
    joined = lean / "train_statistics" / "fitness" / "statistics.csv"
    assert lines_of(joined) == [line for part in parts for line in lines_of(part)[-2:]]
    assert not (lean / "front").exists()
    assert contents(lean / "cgp_configs") == contents(serial / "a" / "cgp_configs")

    shutil.rmtree(tmp_path / "a_batch_1")
    with pytest.raises(ValueError, match=r"missing: a_batch_1 \(no folder\)"):
        campaign.merge(tmp_path, "a")
    assert [f.planned for f in campaign.status(tmp_path).folders if f.batch == 1] == [False, True]
    with pytest.raises(FileNotFoundError, match="no batches of 'c'; it has those of: a, b"):
        campaign.merge(tmp_path, "c")
    with pytest.raises(ValueError, match="another experiment"):
        campaign.merge(tmp_path, "a", allow_missing=True, into=tmp_path / "b_batch_0")
    with pytest.raises(ValueError, match="top >= 1"):
        campaign.merge(tmp_path, "a", top=3)


def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    long = experiment(runs=1, rows=8, cols=8, generations=400_000, patience=400_000, error_threshold=2.0)
    [whole] = campaign.plan([long], tmp_path / "whole")
    [cut] = campaign.plan([long], tmp_path / "cut")
    folder, pool = campaign.Folder.open(cut), Processes(1)
    future = pool.submit(single.execute, cut, 0, 0.0)
    while not (folder.state(0).exists() and json.loads(folder.state(0).read_text())["rows"] > 5):
        assert not future.done(), future.result()
        time.sleep(0.01)
    [victim] = pool._alive
    os.kill(victim.pid, signal.SIGKILL)
    with pytest.raises(BrokenProcessPool, match="exit code -9"):
        future.result()
    state = json.loads(folder.state(0).read_text())
    assert not state["finished"] and stands(folder, 0) == "running"
    kept = lines_of(folder.statistics(0))[: state["rows"]]
    with folder.statistics(0).open("a") as file:  # rows behind the state, and one that was cut off
        file.write("0,1,0.0,1,1,0.1,,1,0.1,1,1,\n0,17,0.")
    folder.state(0).with_name(".state.0.json.0123.tmp").touch()  # a state that was being written
    pool.shutdown()

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning would say that the run began anew
        assert campaign.run(cut)[0].status == "finished"
    campaign.run(whole)
    assert lines_of(folder.statistics(0))[: len(kept)] == kept  # with their times
    assert contents(cut, but=()) == contents(whole, but=())
    assert len(lines_of(folder.statistics(0))) > state["rows"]
    times = [float(row["timestamp"]) for row in campaign.read_rows(folder.statistics(0))]
    assert times == sorted(times)


@pytest.mark.parametrize("damage", ["", "{}", "[1]", '{"identity": 1', "rows", "evolution", "lost"])
def test_a_damaged_state_begins_anew(serial: Path, tmp_path: Path, damage: str) -> None:
    """A run is a function of its seed: from the beginning it comes to the same end."""
    [path] = campaign.plan([experiment("a", 1, runs=6)], tmp_path, log_error="all")
    folder = campaign.Folder.open(path)
    evolution = single.Evolution(folder.experiment.problem, folder.experiment.settings)
    evolution.run(lambda e: len(e.history) == 4)
    state = single.State(4, False, "", evolution.generation, evolution.state_dict())
    rows = Growing(folder.statistics(0), 0)
    for row in evolution.history:
        rows.append(f"0,{row.generation}" + ",," * 5 + "\n")
    rows.close()
    state.save(folder, 0)
    values = json.loads(folder.state(0).read_text())
    if damage in ("rows", "evolution"):
        values[damage] = {"rows": 3, "evolution": {"genome": []}}[damage]
        folder.state(0).write_text(json.dumps(values))
    elif damage == "lost":
        folder.statistics(0).unlink()
    else:
        folder.state(0).write_text(damage)
    with pytest.warns(UserWarning, match=r"1 of 6 runs:\n.*run 0: finished: the run began anew"):
        campaign.run(path)
    assert contents(tmp_path / "a", but=()) == contents(serial / "a", but=())


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    [path] = campaign.plan([experiment(runs=2)], tmp_path)
    assert campaign.plan([experiment(runs=2)], tmp_path) == [path]
    with pytest.raises(
        ValueError, match=r"a was planned with another .*runs: 2 there, 3 here; settings.rows: 4 there, 5"
    ):
        campaign.plan([experiment(runs=3, rows=5)], tmp_path)
    with pytest.raises(ValueError, match=r"sha256.train.data: .* there, .* here"):
        campaign.plan([experiment(seed=2, runs=2)], tmp_path)
    campaign.run(path)
    file = path / "config.json"
    text = file.read_text()
    file.write_text(text.replace('"mutation": 0.1', '"mutation": 0.2'))
    for asked in (campaign.run, campaign.status):
        with pytest.raises(ValueError, match=r"state.0.json: .*settings.mutation: 0.1 there, 0.2 here"):
            asked(path)
    file.write_text(text)
    (path / "train.data").write_text("1 2 3 4\n5\n")
    with pytest.raises(ValueError, match=r"train\.data lacks or was changed"):
        campaign.run(path)
    file.write_text(text[:50])
    with pytest.raises(ValueError, match="config"):
        campaign.run(path)
    with pytest.raises(FileNotFoundError, match="Plan first"):
        campaign.run(tmp_path / "nothing")


def test_other_default_costs_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [path] = campaign.plan([experiment()], tmp_path)
    other = EnergyTable({**EnergyTable.default().operations, 1: Operation(1, "a + b", 0.5, 1.0)})
    monkeypatch.setattr(EnergyTable, "default", lambda: other)
    with pytest.raises(
        ValueError, match=r"gate_parameters.csv: this version has other default costs: function 1"
    ):
        campaign.read(path)


@pytest.mark.parametrize(
    ("names", "options", "match"),
    [
        (("a", "a"), {}, "stand twice: a"),
        (("a",), {"batches": 4}, "'a' has 6.*batches=4"),
        (("a",), {"batches": 0}, "batches=0"),
        ((), {}, "no experiments"),
        (("a/b",), {}, "experiment 'a/b'"),
        (("..",), {}, "experiment '..'"),
        (("a",), {"log_error": "some"}, "log_error='some'"),
        (("a",), {"log_error": -1}, "log_error=-1"),
        (("a",), {"statistics": "zip"}, "allowed: csv, csv.zip"),
    ],
)
def test_plans_that_are_refused_write_nothing(
    tmp_path: Path, names: tuple[str, ...], options: dict[str, object], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        campaign.plan([experiment(name) for name in names], tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


def test_areas(tmp_path: Path) -> None:
    """They are given where all gates of a circuit have one."""
    known = {
        n: Operation(n, o.name, o.energy_pj, o.delay, float(n))
        for n, o in EnergyTable.default().operations.items()
    }
    [path] = campaign.plan([experiment("a", 1, 1, energy=EnergyTable(known))], tmp_path, log_error="all")
    campaign.run(path)
    rows = campaign.read_rows(campaign.Folder.open(path).statistics(0))
    for row in rows:
        circuit = Circuit.from_text(row["chromosome"])
        numbers = circuit.gates[circuit.active(), 2]
        assert float(row["area"]) == numbers[numbers != 100].sum()
    assert campaign.read(path).settings.table[3].area_um2 == 3.0


def test_zipped_statistics_and_logged_chromosomes(serial: Path, tmp_path: Path) -> None:
    whole = [line.split(",", 11) for line in lines_of(campaign.Folder.open(serial / "a").statistics(0))]
    [path] = campaign.plan([experiment("a", 1)], tmp_path / "zip", statistics="csv.zip", log_error=60_000)
    campaign.run(path)
    folder = campaign.Folder.open(path)
    assert sorted(f.name for f in folder.statistics(0).parent.iterdir()) == [
        f"statistics.{r}.csv.zip" for r in range(6)
    ]
    found = [line.split(",", 11) for line in lines_of(folder.statistics(0))]
    assert [cells[3:11] for cells in found] == [cells[3:11] for cells in whole]
    logged = [cells[11].strip() for cells in found]
    assert logged == [cells[11].strip() if int(cells[3]) <= 60_000 else "" for cells in whole]
    assert any(logged) and not all(logged)
    [again] = campaign.plan([experiment("a", 1)], tmp_path / "again", statistics="csv.zip", log_error=60_000)
    campaign.run(again, jobs=1)
    assert contents(again) == contents(path)


@pytest.mark.parametrize(("generations", "phases"), [(300, 1), (5000, 2)])
def test_the_last_row_has_a_chromosome_where_the_threshold_is_out_of_reach(
    tmp_path: Path, generations: int, phases: int
) -> None:
    """In phase 2 the threshold is what phase 1 came to; a run that ends before has none that is good enough."""
    wanted = experiment("a", 1, 1, error_threshold=0.0, generations=generations)
    [path] = campaign.plan([wanted], tmp_path)
    campaign.run(path)
    folder = campaign.Folder.open(path)
    rows = campaign.read_rows(folder.statistics(0))
    history = evolve(wanted.problem, wanted.settings).history
    assert {row.phase for row in history} == set(range(1, phases + 1)) and history[-1].error > 0
    assert [bool(row["chromosome"]) for row in rows] == [
        row.phase == 2 or (phases == 1 and row is history[-1]) for row in history
    ]
    assert rows[-1]["chromosome"] == folder.chromosome(0).read_text().rstrip("\n") or phases == 2


def fails_once(path: Path, run: int, every: float) -> single.Outcome:
    """Run 1 ends its process or raises, the first time; run 2 always."""
    marker = path / f"failed.{run}"
    if run == 1 and not marker.exists():
        marker.touch()
        if (path / "kill").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError("disk full")
    if run == 2:
        raise OSError("disk gone")
    return single.execute(path, run, every)


@pytest.mark.parametrize("kill", [False, True])
def test_failed_runs_are_tried_again_and_others_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill: bool
) -> None:
    [path] = campaign.plan([experiment(runs=4)], tmp_path)
    if kill:
        (path / "kill").touch()
    monkeypatch.setattr(running, "execute", fails_once)
    with pytest.warns(UserWarning, match=r"1 of 4 runs:\n.*a, run 2: failed: OSError: disk gone"):
        outcomes = campaign.run(path, jobs=2 if kill else 1)
    assert [(o.status, o.attempts) for o in outcomes] == [
        ("finished", 1),
        ("finished", 2),
        ("failed", 2),
        ("finished", 1),
    ]
    assert campaign.status(path).folders[0].missing == (2,)
    monkeypatch.undo()
    assert [o.status for o in campaign.run(path)] == ["skipped", "skipped", "finished", "skipped"]
    [other] = campaign.plan([experiment(runs=4)], tmp_path / "other")
    campaign.run(other)
    assert contents(path, but=("kill", "failed.1")) == contents(other, but=())


def test_an_executor_that_is_broken_is_reported(tmp_path: Path) -> None:
    class Broken(ThreadPoolExecutor):
        def submit(self, fn, /, *args, **kwargs):  # type: ignore[no-untyped-def]
            if args[1] >= 1:
                raise BrokenProcessPool("a worker is gone")
            return super().submit(fn, *args, **kwargs)

    [path] = campaign.plan([experiment(runs=3)], tmp_path)
    with Broken(1) as pool, pytest.warns(UserWarning, match="2 of 3 runs"):
        outcomes = campaign.run(path, executor=pool)
    assert [(o.status, o.attempts) for o in outcomes] == [("finished", 1), ("failed", 0), ("failed", 0)]
    assert "BrokenProcessPool: a worker is gone" in outcomes[1].reason


def test_an_interrupt_ends_the_processes(tmp_path: Path) -> None:
    endless = experiment(runs=2, generations=None, patience=2**60, error_threshold=2.0)
    [path] = campaign.plan([endless], tmp_path)
    folder = campaign.Folder.open(path)
    with pytest.raises(KeyboardInterrupt), running._executor(None, 2) as pool:
        futures = [pool.submit(single.execute, path, run) for run in range(2)]
        while not all(folder.state(run).exists() for run in range(2)):
            assert not any(future.done() for future in futures)
            time.sleep(0.01)
        raise KeyboardInterrupt
    assert all(isinstance(future.exception(timeout=30), BrokenProcessPool) for future in futures)


def test_errors_that_cannot_be_pickled_come_home_as_words() -> None:
    pool = Processes(1)
    with pytest.raises(RuntimeError, match="no pickle"):
        pool.submit(raises_strangely).result()
    assert pool.submit(abs, -3).result() == 3
    pool.shutdown()


def raises_strangely() -> None:
    error = ValueError("no pickle")
    error.future = Future()  # type: ignore[attr-defined]
    raise error


def test_two_do_not_work_on_one_run(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    [path] = campaign.plan([experiment(runs=1)], tmp_path)
    with (
        alone(campaign.Folder.open(path).lock(0)) as free,
        pytest.warns(UserWarning, match="another process works"),
    ):
        assert free
        assert campaign.run(path)[0].status == "running"
    assert campaign.run(path)[0].status == "finished"
    with pytest.raises(ValueError, match="not 7"):
        single.execute(path, 7)


def test_status(tmp_path: Path) -> None:
    folders = campaign.plan(
        [experiment("a", 1), experiment("b b".replace(" ", "-"), 2)], tmp_path / "my runs", batches=2
    )
    campaign.run(folders[0])
    folder = campaign.Folder.open(folders[1])
    for run in (3, 4):
        single.State(0, False, "", 0).save(folder, run)
    old = time.time() - HEARTBEAT - 5
    os.utime(folder.state(4), (old, old))
    found = campaign.status(tmp_path / "my runs")
    assert [f.folder.name for f in found.folders] == ["a_batch_0", "a_batch_1", "b-b_batch_0", "b-b_batch_1"]
    part = found.folders[1]
    assert (part.finished, part.running, part.unfinished, part.missing) == ((), (3,), (4,), (5,))
    assert found.folders[0].finished == (0, 1, 2) and not found.folders[0].rest and not found.finished
    quoted = " ".join(f"'{f}'" for f in folders[1:])
    assert found.command == f"{campaign.overview.COMMAND} {quoted}"
    assert str(found).splitlines()[3].split() == ["a_batch_1", "0", "3", "4", "5"]
    assert str(found).endswith(found.command)
    assert campaign.status(folders[0]).finished and campaign.status(folders[0]).command == ""


@pytest.mark.parametrize("system", ["pbs", "slurm"])
@pytest.mark.parametrize("scratch", [None, "10gb"])
def test_scripts(tmp_path: Path, system: str, scratch: str | None) -> None:
    folders = campaign.plan([experiment("a", 1)], tmp_path / "it's here", batches=2)
    texts = campaign.script(
        tmp_path / "it's here", system, name="job", time="24:00:00", cpus=4, memory="2GB", scratch=scratch
    )
    for number, (text, folder) in enumerate(zip(texts, folders, strict=True)):
        assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).stderr == ""
        wanted = {
            "pbs": [f"#PBS -N job_{number}", "#PBS -l walltime=24:00:00", "ncpus=4:mem=2gb"],
            "slurm": [f"--job-name=job_{number}", "--time=24:00:00", "--cpus-per-task=4", "--mem=2G\n"],
        }[system]
        wanted += {"pbs": ["scratch_local=10gb"], "slurm": ["--tmp=10G"]}[system] if scratch else []
        assert [w for w in wanted if w not in text] == []
        assert ("scratch" in text.lower() or "--tmp" in text) == bool(scratch)
        # What the shell makes of the command: the folder is one word.
        shown = text.replace(campaign.overview.COMMAND, "printf '%s|'")
        told = subprocess.run(["bash"], input=shown, text=True, capture_output=True, check=True).stdout
        assert told == f"{folder.resolve()}|--jobs|4|"


def test_templates(tmp_path: Path) -> None:
    campaign.plan([experiment("a", 1)], tmp_path)
    template = "#!/bin/bash\n#X {name} {time} {cpus} {mem}\nawk '{ print }' ${HOME:-${X}}/x\n{command}\n"
    given = {"name": "n", "time": "1:00:00", "cpus": 2, "memory": "512M"}
    [text] = campaign.script(tmp_path, "pbs", template=template, **given)
    assert text.startswith(
        "#!/bin/bash\n#X n 1:00:00 2 512mb\nawk '{ print }' ${HOME:-${X}}/x\nlightning-compress "
    )
    for wrong, options, match in [
        (template + "{queue}", {}, "{queue} is unknown"),
        (
            template.replace("{mem}", "1"),
            {},
            "{mem} is missing; needed are {name} {time} {cpus} {mem} {command}",
        ),
        (template, {"scratch": "1gb"}, "{scratch} is missing"),
        (template + "{scratch}", {}, "{scratch} has no value"),
        (None, {"time": "tomorrow"}, "time"),
        (None, {"memory": "4 apples"}, "memory"),
        (None, {"name": "a\n#PBS -q x"}, "name"),
        (None, {"cpus": 0}, "cpus"),
        (None, {"scratch": "1"}, "scratch"),
    ]:
        with pytest.raises(ValueError, match=match):
            campaign.script(tmp_path, "pbs", template=wrong, **{**given, **options})
    with pytest.raises(ValueError, match="allowed: pbs, slurm"):
        campaign.script(tmp_path, "lsf", **given)


@pytest.mark.parametrize("system", ["pbs", "slurm"])
def test_script_of_dask(system: str) -> None:
    given = {"name": "job", "time": "24:00:00", "cpus": 4, "memory": "2gb"}
    try:
        import dask_jobqueue  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match=r"pip install lightning-compress\[cluster\]"):
            campaign.dask_script(system, **given)
        return
    text = campaign.dask_script(system, **given)
    assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).stderr == ""
    assert "24:00:00" in text and "job" in text and "=4" in text


@settings(max_examples=60)
@given(st.data())
def test_texts_rebuild_problems(data: st.DataObject) -> None:
    sets, width, outputs = (data.draw(st.integers(low, 4)) for low in (1, 1, 0))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    counts = random.integers(0, 3, (sets, outputs))
    wires = tuple(random.integers(0, width + outputs, random.integers(0, 9)) for _ in range(sets))
    inputs = random.integers(-128, 128, (sets, width)).astype(np.int8)
    targets = random.integers(-128, 128, (sets, outputs)).astype(np.int8)
    problem = Problem(inputs, targets, counts, wires, int(random.integers(0, width + 1)))
    places = [Place(f"layer{i}.weight", random.permutation(12)[: len(w)] + 5) for i, w in enumerate(wires)]
    lines = train_data(problem)
    assert [line.count("x") for line in lines.split("\n")[1::2]] == (counts == 0).sum(1).tolist()
    again, found = rebuild(lines, json.loads(json.dumps(details(problem, places))))
    for name in ("inputs", "targets", "counts"):
        assert getattr(again, name).dtype == getattr(problem, name).dtype
        np.testing.assert_array_equal(getattr(again, name), getattr(problem, name))
    assert again.loaded == problem.loaded
    for a, b in zip(
        [*again.wires, *(p.positions for p in found)], [*wires, *(p.positions for p in places)], strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert [p.key for p in found] == [p.key for p in places]


def test_settings_come_back() -> None:
    table = EnergyTable({**EnergyTable.default().operations, 1: Operation(1, "a + b", 0.5, 1.0, 2.5)})
    for chosen in (Settings(), Settings(functions=(1, 2, 12), energy=table, look_back=3, generations=7)):
        config = json.loads(json.dumps(chosen.config()))
        assert settings_of(config).config() == chosen.config()
        assert settings_of(config).functions == chosen.functions
        assert settings_of(config).table[1].area_um2 == chosen.table[1].area_um2 or chosen.energy is None
    with pytest.raises(ValueError, match="another version"):
        settings_of({**Settings().config(), "colour": 1})


@given(
    st.recursive(
        st.integers(0, 3), lambda v: st.dictionaries(st.sampled_from("abc"), v, max_size=3), max_leaves=6
    )
)
def test_nothing_differs_from_itself(value: object) -> None:
    assert differences(value, json.loads(json.dumps(value))) == []
    assert differences({"x": {"y": value}}, {"x": {"y": -1}})[0].startswith("x.y: ")


def test_rows_are_cut_where_told(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    rows = Growing(file, 0)
    for n in range(4):
        rows.append(f"{n},x\n")
    rows.close()
    with file.open("a") as more:
        more.write("4,")
    Growing(file, 2).close()
    assert lines_of(file) == ["0,x\n", "1,x\n"]
    with pytest.raises(ValueError, match="has 2 whole rows, its state names 3"):
        Growing(file, 3)
    Growing(file, 0).close()
    assert lines_of(file) == []
