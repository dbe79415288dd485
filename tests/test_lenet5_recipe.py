"""The recipe of Deep Compression: what it prints is what a reader of its files would find, and it compresses."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import lightning_compress as lc
from recipes import lenet5

SHORT = "--dense-epochs 4 --epochs 4 --stage-epochs 2 --share-epochs 1 --sparsity 0.7 0.85 --output-dir out"


def cells(printed: str, first: str) -> list[str]:
    """The cells of the printed table row that begins with ``first``."""
    (line,) = (line for line in printed.splitlines() if line.startswith(first + "  "))
    return [cell for cell in re.split(r"\s{2,}", line) if cell]


def test_files_are_what_the_table_says(capsys: pytest.CaptureFixture[str]) -> None:
    lenet5.main(SHORT.split())
    printed = capsys.readouterr().out
    data = lenet5.read(None)
    for sparsity in (0.7, 0.85):
        path = Path(f"out/sparsity_{sparsity}.lcz")
        net = lc.load(path, into=lc.models.LeNet5()).eval()
        info = lc.inspect(path)
        with torch.no_grad():
            top1 = float((net(data["x_test"]).argmax(1) == data["y_test"]).float().mean())
        kept = sum(int((p != 0).sum()) for p in net.parameters())
        row = cells(printed, str(sparsity))
        assert row[1] == f"{kept:,}" and float(row[2]) == pytest.approx(100 * top1, abs=0.05)
        assert row[4] == f"{path.stat().st_size:,}" and float(row[5]) == pytest.approx(
            246_824 / path.stat().st_size, rel=1e-3
        )
        weights = [t.weight for t in lc.find(net)]  # biases are not pruned
        entries, left = (sum(int(f(w)) for w in weights) for f in (torch.numel, torch.count_nonzero))
        assert 0 < left <= round((1 - sparsity) * entries)
        assert info.stale == {} and info.dense_bytes == 246_824
        for name, weight in net.named_parameters():
            assert len(weight.unique()) <= (5 if "bias" in name else 9) or codes_of(info)[name] == "mask"
        assert top1 > 0.7  # of ten classes, after a few seconds
    assert sum("points that may be lost" in line for line in printed.splitlines()) == 1


def codes_of(info: lc.archive.ArchiveInfo) -> dict[str, str]:
    return {tensor.name: tensor.kind for tensor in info.tensors}


def test_a_checkpoint_and_a_pack_are_read(capsys: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(0)
    pack = {
        f"x_{n}": generator.integers(0, 256, (size, 28, 28), dtype=np.uint8)
        for n, size in (("train", 40), ("test", 20))
    }
    pack |= {
        f"y_{n}": generator.integers(0, 10, size, dtype=np.uint8) for n, size in (("train", 40), ("test", 20))
    }
    np.savez("pack.npz", **pack)
    data = lenet5.read(Path("pack.npz"))
    expected = (pack["x_test"][:, None] / 255.0 - 0.1307) / 0.3081
    assert (
        np.allclose(data["x_test"].numpy(), expected, atol=1e-6)
        and data["y_test"].tolist() == pack["y_test"].tolist()
    )
    net = lc.models.LeNet5()
    torch.save(net.state_dict(), "net.pt")
    argv = "--data pack.npz --checkpoint net.pt --epochs 1 --share-epochs 1 --sparsity 0.5 --output-dir out"
    lenet5.main([*argv.split(), "--validation", "10"])
    with torch.no_grad():
        judged = float((net(data["x_train"][30:]).argmax(1) == data["y_train"][30:]).float().mean())
    assert float(cells(capsys.readouterr().out, "dense")[1]) == pytest.approx(100 * judged)


def test_digits_are_split_and_normalized() -> None:
    data = lenet5.read(None)
    assert data["x_train"].shape == (1297, 1, 28, 28) and data["x_test"].shape == (500, 1, 28, 28)
    black = -0.1307 / 0.3081
    assert data["x_train"].min() == pytest.approx(black) and torch.all(
        data["x_test"][:, :, 0] == data["x_test"].min()
    )
    torch.manual_seed(5)
    assert torch.equal(lenet5.read(None)["y_test"], data["y_test"])


def test_augmented_images_are_moved_not_darkened() -> None:
    x = torch.full((64, 1, 28, 28), -0.1307 / 0.3081)
    assert torch.allclose(lenet5.augment(x, 1.0), x)  # black comes in
    x[:, :, 12:16, 12:16] = 2.8
    assert torch.equal(lenet5.augment(x, 0.0), x) or torch.allclose(lenet5.augment(x, 0.0), x, atol=1e-4)
    moved = lenet5.augment(x, 1.0)
    mass = (moved - x[0, 0, 0, 0]).sum((1, 2, 3))
    assert not torch.allclose(moved, x, atol=0.1) and torch.all((mass / mass.mean() - 1).abs() < 0.4)


def test_what_nothing_reads_goes_and_outputs_stay() -> None:
    net, x = lc.models.LeNet5().eval(), torch.randn(4, 1, 28, 28)
    with torch.no_grad():
        net.fc3.weight[:, :50] = 0
        net.fc2.weight[:, 100:] = 0
        net.fc1.weight[:, : 25 * 3] = 0
        before = net(x)
        lenet5.unread(net)
        assert torch.equal(net(x), before)
    assert not net.fc2.weight[:50].any() and not net.fc2.bias[:50].any()
    assert not net.fc1.weight[100:].any() and not net.conv2.weight[:3].any() and net.conv2.weight[3:].all()
    assert all(code.matches(layer.get_parameter(name)) for _, layer, name, code in lc.codes.of(net))


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [lenet5.warm_cosine(i / 100) for i in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[5] == 1.0 and rates[-1] == pytest.approx(0.01)
    assert rates[:6] == sorted(rates[:6]) and rates[5:] == sorted(rates[5:], reverse=True)


def test_the_smallest_file_that_loses_no_more() -> None:
    rows = [[0.9, 10, 99.2, 0.05, 500, 1.0], [0.95, 8, 99.15, 0.1, 400, 2.0], [0.98, 5, 98.9, 0.4, 300, 3.0]]
    assert lenet5.best(rows, 0.1)[-2:] == [400, 2.0] and lenet5.best(rows, 0.5)[-2:] == [300, 3.0]
    assert lenet5.best(rows, 0.01) == [0.01, *["none"] * 4]


def test_sparsities_must_rise(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        lenet5.main(["--sparsity", "0.9", "0.8"])
    assert "must rise" in capsys.readouterr().err


def test_the_page_shows_the_whole_docstring() -> None:
    source = Path(lenet5.__file__).read_text(encoding="utf-8")
    end = next(i for i, line in enumerate(source.splitlines()[1:], 2) if line == '"""')
    page = Path(lenet5.__file__).parents[1] / "docs" / "recipes.md"
    assert f'"recipes/lenet5.py:1:{end - 1}"' in page.read_text(encoding="utf-8")
    assert all(word in (lenet5.__doc__ or "") for word in ("Measured", "seed", "torch", "CPU"))
