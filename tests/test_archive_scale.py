"""The benchmark of archives by size, at its smallest, in processes of its own."""

import pytest

from recipes.benchmarks import archive_scale


@pytest.mark.parametrize("method", ["prune", "quantize4"])
def test_a_row_has_every_phase_and_its_peak(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = archive_scale.main(["--millions", "0.1", "--method", method])
    net = archive_scale.Transformer(*archive_scale.SHAPES[0.1])
    sizes = [p.nbytes for p in net.parameters()]
    assert row["params"] == sum(sizes) // 4
    assert row["model"] == pytest.approx(sum(sizes) / 2**20)
    assert row["layer"] == pytest.approx(max(sizes) / 2**20)
    assert 1000 < row["save"]["result"] < sum(sizes)
    assert row["load"]["result"] is True
    for phase in ("compress", "save", "load"):
        assert row[phase]["seconds"] > 0
        assert 0 <= row[phase]["peak"] < 30
    printed = capsys.readouterr().out
    assert f"{row['params']:,}" in printed and f"{row['save']['result']:,}" in printed


def test_peaks_are_those_of_the_work_and_not_of_what_was_held_or_freed_before() -> None:
    script = "\n".join(
        (
            "import json, torch",
            "from recipes.benchmarks.archive_scale import measured",
            "warm = lambda: torch.zeros(10).sum()",
            "held = torch.ones(30 << 18)",  # 30 MB
            "torch.ones(80 << 18)",  # 80 MB, freed
            "found = [measured(lambda: torch.ones(n << 18).sum().item(), warm)['peak'] for n in (5, 50, 5)]",
            "print(json.dumps(found))",
        )
    )
    small, large, again = archive_scale.child("-c", script)
    assert 5 <= small < 15 and 50 <= large < 60 and 5 <= again < 15
