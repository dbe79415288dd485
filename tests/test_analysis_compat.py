"""The earlier framework's names do what this library's own do."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import lightning_compress as lc
from lightning_compress.analysis import analyze
from lightning_compress.analysis.compat import ModelCompressionFramework, compress_model
from lightning_compress.distillation.datafree import distill
from lightning_compress.distillation.student import make_student

EXAMPLE = torch.zeros(1, 32)
SMALL = {
    "techniques": ["clustered", "pruned_magnitude_0.5"],
    "combine": False,
    "samples": 40,
    "progress": False,
}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 4)).eval()


def same(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_one_call_analyzes_and_writes_every_file(tmp_path: Path):
    out = tmp_path / "out"
    found = compress_model(net(), True, True, output_dir=out, example_input=EXAMPLE, **SMALL)
    direct = analyze(net(), example_input=EXAMPLE, **SMALL)
    assert [(r.name, r.file_bytes, r.ber) for r in found.rows] == [
        (r.name, r.file_bytes, r.ber) for r in direct.rows
    ]
    names = {p.name for p in out.iterdir()}
    assert {"report.html", "results.json", "compression_report.txt", "ber_compression_analysis.txt"} <= names
    assert {"compression_analysis.png", "ber_compression_analysis.png"} <= names
    for row in json.loads((out / "results.json").read_text(encoding="utf-8"))["rows"]:
        path = out / "compressed_models" / f"{row['name']}.lcz"
        assert path.stat().st_size == row["file_bytes"]
        lc.load(path, net())


def test_a_path_and_no_trade_off(tmp_path: Path):
    torch.save({"state_dict": net().state_dict()}, tmp_path / "net.pth")
    given = {"model": net(), "example_input": EXAMPLE, "output_dir": tmp_path / "out"}
    found = compress_model(tmp_path / "net.pth", analyze_ber_tradeoff=False, **given, **SMALL)
    assert all(row.status == "ok" and row.ber == row.ber for row in found.rows)
    assert not [p for p in (tmp_path / "out").iterdir() if p.name.startswith("ber_")]


def test_methods_are_the_transforms():
    framework = ModelCompressionFramework(net(), example_input=EXAMPLE)
    assert same(
        framework.apply_magnitude_pruning(0.4), lc.compress(net(), [lc.Prune(0.4, scope="layer")]).model
    )
    assert same(
        framework.apply_log2_quantization(6), lc.compress(net(), [lc.Quantize(6, format="log2")]).model
    )
    assert same(framework.model, net())  # left as it was
    plain = make_student(net(), 0.25, example_input=EXAMPLE)
    assert same(framework.create_student_model(0.25, train=False), plain)
    trained = distill(net(), plain, example_input=EXAMPLE, steps=5).model
    assert same(framework.create_student_model(0.25, steps=5), trained)


def test_framework_writes_where_it_was_told(tmp_path: Path):
    framework = ModelCompressionFramework(
        net().state_dict(), model=net(), example_input=EXAMPLE, output_dir=tmp_path / "out", seed=3
    )
    found = framework.compress_model(train_students=False, **SMALL)
    assert found.about.seed == 3 and (tmp_path / "out" / "report.html").is_file()
    with pytest.raises(ValueError, match="unknown technique"):
        framework.compress_model(techniques=["pruned_magnitued"])
