"""The recipe and the benchmark of channels run for a few steps, and the command line removes them."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import lightning_compress as lc
from lightning_compress import cli
from lightning_compress.checkpoints import load_weights

pytestmark = pytest.mark.usefixtures("recipes")


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    """Options that name a checkpoint and a folder of packs: 24 training and 16 test images."""
    draw = np.random.default_rng(0)
    pixels, labels = draw.integers(0, 256, (40, 3, 32, 32), dtype=np.uint8), draw.integers(0, 10, 40)
    np.savez(tmp_path / "cifar10_train_0.npz", x_train_delta=pixels[:24], y_train=labels[:24])
    np.savez(tmp_path / "cifar10_test.npz", x_test=pixels[24:].transpose(0, 2, 3, 1), y_test=labels[24:])
    torch.save(lc.models.resnet20().state_dict(), tmp_path / "net.pt")
    return ["--data", str(tmp_path), "--checkpoint", str(tmp_path / "net.pt")]


def row(printed: str, first: str) -> list[str]:
    """The cells of the last printed table row that begins with this one."""
    lines = [line.split("  ") for line in printed.splitlines() if line.startswith(first + "  ")]
    return [cell.strip() for cell in lines[-1] if cell.strip()]


# -- recipe --------------------------------------------------------------------------------------------------


def test_remove_and_fine_tune(given, tmp_path, capsys):
    out = tmp_path / "out"
    steps = ["--max-steps", "2", "--batch-size", "8", "--log-every", "1", "--samples", "8", "--reestimate"]
    importlib.import_module("cifar_channels").main([*given, *steps, "--output-dir", str(out)])
    printed = capsys.readouterr().out
    x = torch.zeros(1, 3, 32, 32)
    dense = lc.models.resnet20()
    macs = {
        name: lc.cost(lc.load(out / f"{name}.lcz", into=lc.models.resnet20()), x).macs
        for name in ("removed", "fused")
    }
    for name in ("dense", "removed", "fine-tuned", "fused"):
        assert f"{(out / f'{name}.lcz').stat().st_size:,}" in row(printed, name)
    assert 1.65 <= lc.cost(dense, x).macs / macs["removed"] < 1.69
    assert macs["fused"] == macs["removed"] and f"{macs['removed']:,.0f}" in row(printed, "fine-tuned")
    before, after = (lc.load(out / f"{n}.lcz", into=lc.models.resnet20()) for n in ("removed", "fine-tuned"))
    assert [p.shape for p in before.parameters()] == [p.shape for p in after.parameters()]
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    assert list((out / "csv" / "fine_tune").rglob("metrics.csv"))


def test_settings_are_chosen_on_images_that_do_not_train(given):
    recipe = importlib.import_module("cifar_channels")
    main = recipe.held_out
    options = recipe.argparse.Namespace(data=given[1], validation=10, train_size=None, limit_test=None)
    images, labels = main(options)
    everything, all_labels = recipe.read(given[1], True, None)
    assert (
        options.train_size == 14
        and torch.equal(images, everything[14:])
        and torch.equal(labels, all_labels[14:])
    )
    options.validation = 0
    assert torch.equal(main(options)[0], recipe.read(given[1], False, None)[0])


def test_what_the_teacher_adds_to_the_loss(monkeypatch):
    """Loss = (1 - a) cross-entropy + a T^2 KL(teacher / T || student / T), and the teacher is no part of the module."""
    recipe = importlib.import_module("cifar_channels")
    monkeypatch.setattr(recipe, "augment", lambda images: images)
    monkeypatch.setattr(recipe, "normalize", lambda images: images)
    student, teacher = nn.Linear(5, 10).double(), nn.Linear(5, 10).double()
    x, labels = torch.randn(7, 5, dtype=torch.float64), torch.randint(10, (7,))

    def soft(net: nn.Module, t: float) -> np.ndarray:
        z = net(x).detach().numpy() / t
        e = np.exp(z - z.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)

    hard = -np.log(soft(student, 1.0)[np.arange(7), labels.numpy()]).mean()
    p, q = soft(teacher, 3.0), soft(student, 3.0)
    taught = 9.0 * (p * np.log(p / q)).sum(1).mean()
    for share in (0.0, 0.7, 1.0):
        lit = recipe.LitTaught("resnet20", None, 0.1, share, 3.0)
        assert not any(p is q for p in lit.parameters() for q in lit.teacher[0].parameters())
        lit.net, lit.teacher = student, (teacher,)
        monkeypatch.setattr(lit, "log", lambda *_: None)
        loss = lit.training_step((x, labels), 0)
        assert loss.item() == pytest.approx((1 - share) * hard + share * taught, rel=1e-12)
    assert {id(p) for p in lit.parameters()} == {id(p) for p in student.parameters()}
    loss.backward()
    assert teacher.weight.grad is None and student.weight.grad is not None


# -- benchmark -----------------------------------------------------------------------------------------------


def test_latency(given, capsys):
    pytest.importorskip("onnxruntime")
    small = [
        "--batch-sizes",
        "2",
        "--runs",
        "2",
        "--runtimes",
        "eager",
        "onnxruntime",
        "--layers",
        "--fuse",
    ]
    latency = importlib.import_module("latency")
    latency.main(
        [*given[2:], *small, "--channels-last", "--cpu-time", "--include", "layer2.*", "--round-to", "8"]
    )
    printed = capsys.readouterr().out
    assert row(printed, "original")[1:] == ["269,722", "40,551,040"]
    ratio = 40_551_040 / int(row(printed, "small")[2].replace(",", ""))
    assert abs(ratio - 2) < 0.04
    for runtime in ("eager", "onnxruntime"):
        cells = row(printed, runtime)
        assert cells[1] == "2" and float(cells[6]) == pytest.approx(ratio, abs=1e-3)
        assert float(cells[4]) / ratio == pytest.approx(float(cells[7]), rel=1e-3)
    cells = row(printed, "layer2.1.conv1")
    assert cells[1:5] == ["Conv2d", "2,359,296", "589,824", "4"]


def test_a_runtime_that_is_not_there_is_left_out(monkeypatch, capsys):
    latency = importlib.import_module("latency")

    def none(*_: object) -> None:
        raise RuntimeError("no compiler here\nand a long story")

    monkeypatch.setattr(torch, "compile", lambda net, **_: none)
    latency.main(
        [
            "--model",
            "lenet5",
            "--size",
            "28",
            "--channels",
            "1",
            "--batch-sizes",
            "1",
            "--runs",
            "2",
            "--runtimes",
            "compile",
            "eager",
        ]
    )
    printed = capsys.readouterr().out
    assert "compile is left out: RuntimeError: no compiler here\n" in printed
    assert row(printed, "eager")[1] == "1" and not any(
        line.startswith("compile  ") for line in printed.splitlines()
    )


def test_networks_of_torchvision_have_a_latency_too(capsys):
    pytest.importorskip("torchvision")
    importlib.import_module("latency").main(
        [
            "--model",
            "squeezenet1_1",
            "--size",
            "32",
            "--batch-sizes",
            "1",
            "--runs",
            "2",
            "--runtimes",
            "eager",
        ]
    )
    cells = row(capsys.readouterr().out, "eager")
    assert 1.95 < float(cells[6]) < 2.1


def test_calls_take_turns():
    """By a clock that each call advances: times are those of the calls, and the order is one of each."""
    turns, order, now = importlib.import_module("turns"), [], [0.0]

    def call(name: str, seconds: float) -> None:
        order.append(name)
        now[0] += seconds * len(order)

    calls = {"a": lambda: call("a", 0.001), "b": lambda: call("b", 0.002)}
    times = turns.passes(calls, 3, warmup=1, clock=lambda: now[0])
    assert order == ["a", "b"] * 4
    np.testing.assert_allclose(times["a"], [3.0, 5.0, 7.0])
    np.testing.assert_allclose(times["b"], [8.0, 12.0, 16.0])
    np.testing.assert_allclose(turns.paired(times["a"], times["b"]), [2.0, 2.0])


# -- command line --------------------------------------------------------------------------------------------


def command(line: str, *more: str) -> int:
    """Exit code of the command line, for words without spaces and then others."""
    return cli.main([*line.split(), *more])


def test_channels_on_the_command_line(capsys):
    torch.save(lc.models.LeNet5().state_dict(), "net.pt")
    line = "remove-channels --model lenet5 --checkpoint net.pt --example-shape 1 1 28 28 --round-to 4"
    assert command(f"{line} --state_dict small.pt --output small.lcz", "--budget", "[macs, 0.5]") == 0
    printed = capsys.readouterr().out
    assert f"{Path('small.lcz').stat().st_size:,}" in printed and "MACs" in printed
    x = torch.randn(2, 1, 28, 28)
    dense = load_weights(lc.models.LeNet5(), "net.pt").eval()
    rule = lc.RemoveChannels(budget=("macs", 0.5), round_to=4)
    same = lc.compress(dense, [rule], example_input=x[:1]).model
    small = lc.load("small.lcz", into=lc.models.LeNet5().eval())
    assert torch.equal(small(x), same(x)) and lc.cost(small, x).macs <= 0.5 * lc.cost(dense, x).macs
    state = torch.load("small.pt", weights_only=True)
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in same.state_dict().items()}
    line = "benchmark --model lenet5 --checkpoint small.lcz --baseline net.pt --example-shape 1 1 28 28"
    assert command(line) == 0
    assert f"{lc.cost(same, x[:1]).macs:,.0f}" in row(capsys.readouterr().out, "macs")


def test_ratios_by_name_and_folded_batchnorm_on_the_command_line(capsys):
    line = "remove-channels --model resnet20 --example-shape 1 3 32 32 --fuse --output inner.lcz"
    assert command(line, "--ratio", '{"layer3.*.conv1": 0.5}') == 0, capsys.readouterr().err
    inner = lc.load("inner.lcz", into=lc.models.resnet20().eval())
    assert inner.layer3[1].conv1.out_channels == 32 and inner.layer2[1].conv1.out_channels == 32
    assert inner.conv1.out_channels == 16 and isinstance(inner.bn1, nn.Identity)


def test_channels_that_are_zero_already(capsys):
    """What `prune --pattern channel` has zeroed is what `--ratio silent` removes."""
    zeroed = "--pattern channel --scope layer --sparsity 0.5 --exclude fc3"
    for line in (
        f"prune --model lenet5 {zeroed} --output zeros.lcz",
        "remove-channels --model lenet5 --checkpoint zeros.lcz --ratio silent --example-shape 1 1 28 28 "
        "--output gone.lcz",
    ):
        assert command(line) == 0, capsys.readouterr().err
    zeros, gone = (lc.load(f, into=lc.models.build("lenet5").eval()) for f in ("zeros.lcz", "gone.lcz"))
    assert [gone.conv1.out_channels, gone.conv2.out_channels, gone.fc1.out_features] == [3, 8, 60]
    x = torch.randn(3, 1, 28, 28)
    torch.testing.assert_close(gone(x), zeros(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options, wanted",
    [
        ("--ratio 0.5", "--example_shape, e.g. 1 3 32 32, or inputs with --data"),
        ("--ratio 0.5 --data normal", "--example_shape, e.g. 1 3 32 32, or inputs with --data"),
        ("--ratio 1.0 --example-shape 1 1 28 28", "0 <= ratio < 1"),
        ("--budget [time,0.5] --example-shape 1 1 28 28", "'macs', 'params' or 'latency'"),
        ("--budget [macs,0.0001] --example-shape 1 1 28 28", "cannot be met"),
    ],
)
def test_what_the_command_line_refuses(options, wanted, capsys):
    assert command(f"remove-channels --model lenet5 {options} --output no.lcz") == 2
    err = capsys.readouterr().err
    assert wanted in err and err.count("\n") == 1 and not Path("no.lcz").exists()
