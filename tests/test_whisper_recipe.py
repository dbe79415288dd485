"""The recipe for Whisper: with transformers and without, what it writes is what it reports."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

import lightning_compress as lc
from recipes import whisper


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    whisper.main(["--model-size", "micro", "--output-dir", "out", *argv])
    return capsys.readouterr().out


def options(*argv: str) -> object:
    return whisper.parser().parse_args(["--model-size", "micro", *argv])


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without transformers."""
    real = whisper.importlib.util.find_spec
    monkeypatch.setattr(
        whisper.importlib.util, "find_spec", lambda name: None if name == "transformers" else real(name)
    )
    monkeypatch.setitem(sys.modules, "transformers", None)


@pytest.mark.usefixtures("plain")
def test_without_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    printed = run(capsys, "--target-ratio", "0.2", "--benchmark", "--runs", "1", "--evaluations", "4")
    stats = json.loads(Path("out/stats.json").read_text())
    size = Path("out/whisper.lcz").stat().st_size
    assert stats["compressed_size"] == size and stats["size_fraction"] == size / stats["original_size"]
    assert stats["target_met"] == (stats["size_fraction"] <= 0.2)
    assert stats["techniques_applied"] == ["Factorize", "ShareWeights"]
    assert "say nothing about recognition" in printed
    report = json.loads(Path("out/benchmark_results.json").read_text())
    assert report["file_bytes"] == size < report["baseline"]["file_bytes"]
    assert {layer["name"] for layer in report["baseline"]["layers"]} >= {"conv1", "decoder.0.cross_attn"}
    made = options()
    made.plain = True
    net, x = whisper.build(made), whisper.inputs(whisper.build(made), made)
    assert isinstance(net, whisper.WhisperLike)
    small = lc.load("out/whisper.lcz", into=whisper.build(made)).eval()
    with torch.no_grad():
        before, after = net(**x), small(**x)
    error = lc.OutputErrorRate("regression")
    error.update(before, after)
    (stage,) = (line for line in printed.splitlines() if line.startswith("ShareWeights  "))
    assert float(re.split(r"\s{2,}", stage)[4]) == pytest.approx(float(error.compute()), rel=1e-3)
    pytest.importorskip("onnxruntime")
    sizes = [Path(f"out/whisper_{precision}.onnx").stat().st_size for precision in ("int8", "float32")]
    assert sizes[0] < 0.5 * sizes[1]  # shared values are a byte each and a table


@pytest.mark.usefixtures("plain")
def test_onnx_files_are_those_of_the_compressed_model(capsys: pytest.CaptureFixture[str]) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    argv = (
        "--compression-types",
        "low_rank",
        "mixed_precision",
        "--rank-ratio",
        "0.5",
        "--target-ratio",
        "0.3",
    )
    printed = run(capsys, *argv, "--benchmark", "--runs", "1")
    made = options()
    made.plain = True
    net = whisper.build(made)
    x = whisper.inputs(net, made)
    small = lc.load("out/whisper.lcz", into=net).eval()
    session = runtime.InferenceSession("out/whisper_float32.onnx", providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {node.name: x[node.name].numpy() for node in session.get_inputs()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(y), small(**x), rtol=1e-3, atol=1e-4)
    for precision in ("int8", "float32"):
        size = Path(f"out/whisper_{precision}.onnx").stat().st_size
        (row,) = (line for line in printed.splitlines() if line.startswith(f"whisper_{precision}.onnx"))
        assert f"{size:,}" in row
    assert (
        Path("out/whisper_int8.onnx").stat().st_size < 0.6 * Path("out/whisper_float32.onnx").stat().st_size
    )


def test_with_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    argv = ("--compression-types", "weight_sharing", "--num-clusters", "16", "--target-ratio", "0.25")
    run(capsys, *argv)
    net = whisper.build(options())
    assert isinstance(net.net, transformers.WhisperForConditionalGeneration)
    x = whisper.inputs(net, options())
    assert x["mel"].shape == (1, 80, 300) and net(**x).shape == (1, 8, 1000)
    small = lc.load("out/whisper.lcz", into=whisper.build(options()))
    inner = small.net.model
    assert inner.decoder.embed_tokens.weight is small.net.proj_out.weight
    for layer in (inner.decoder.embed_tokens, inner.encoder.layers[0].fc1, inner.encoder.conv1):
        assert len(layer.weight.unique()) <= 16
    assert all(
        torch.equal(a, b)
        for a, b in zip(net.parameters(), whisper.build(options()).parameters(), strict=True)
    )


def test_checkpoints_of_both_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    original = whisper.build(options("--seed", "3"))
    original.net.save_pretrained("folder")
    torch.save(original.net.state_dict(), "weights.pt")
    for given in ("folder", "weights.pt"):
        again = whisper.build(options("--checkpoint", given))
        assert torch.equal(again.net.model.encoder.conv1.weight, original.net.model.encoder.conv1.weight)
        assert torch.equal(again.net.proj_out.weight, original.net.proj_out.weight)
    printed = run(
        capsys, "--checkpoint", "folder", "--compression-types", "mixed_precision", "--target-ratio", "0.3"
    )
    assert "random" not in printed


def test_bits_are_given_by_kind_and_reach_the_factors() -> None:
    made = options("--bits", "ffn=3", "conv=6", "*.cross_attn=5")
    made.plain = True
    net = whisper.build(made)
    bits = whisper.bits_by_name(net, dict(made.bits))
    assert bits["encoder.0.fc1*"] == bits["decoder.0.fc2*"] == 3 and bits["conv1*"] == 6 and bits["*"] == 8
    assert bits["*.cross_attn"] == 5 and not any("self_attn" in name for name in bits)
    small = lc.compress(net, [lc.Factorize(0.5, include="*fc1"), lc.Quantize(bits=bits)]).model
    assert len(small.encoder[0].fc1.first.weight[0].unique()) <= 7
    assert len(small.encoder[0].fc2.weight[0].unique()) <= 7 and len(small.conv2.weight[0].unique()) <= 63
    assert whisper.bits_by_name(net, {}) == {}


@pytest.mark.parametrize(("size", "parameters"), [("tiny", 37_760_640), ("base", 72_593_920)])
def test_sizes_are_those_of_whisper(size: str, parameters: int) -> None:
    """Without allocating them; PyTorch's attention has a bias of keys, which Whisper's has not."""
    width, layers, heads = whisper.SIZES[size]
    with torch.device("meta"):
        net = whisper.WhisperLike(width, layers, heads, whisper.FRAMES, whisper.TOKENS)
    keys = 3 * layers * width  # of two attentions in the decoder and one in the encoder
    fixed = whisper.FRAMES // 2 * width  # Whisper's positions of the encoder count as parameters
    assert sum(p.numel() for p in net.parameters()) - keys + fixed == parameters


def test_future_tokens_are_not_seen() -> None:
    made = options()
    made.plain = True
    net = whisper.build(made)
    x = whisper.inputs(net, made)
    other = {**x, "tokens": torch.cat([x["tokens"][:, :5], x["tokens"][:, 5:] + 1], dim=1)}
    with torch.no_grad():
        a, b = net(**x), net(**other)
    torch.testing.assert_close(a[:, :5], b[:, :5], rtol=0, atol=1e-5)
    assert not torch.allclose(a[:, 5:], b[:, 5:], atol=1e-3)


def test_the_page_shows_the_whole_docstring() -> None:
    source = Path(whisper.__file__).read_text(encoding="utf-8")
    end = next(i for i, line in enumerate(source.splitlines()[1:], 2) if line == '"""')
    page = Path(whisper.__file__).parents[1] / "docs" / "recipes.md"
    assert f'"recipes/whisper.py:1:{end - 1}"' in page.read_text(encoding="utf-8")
    assert all(word in (whisper.__doc__ or "") for word in ("Measured", "seed", "torch", "CPU", "random"))
