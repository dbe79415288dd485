"""The recipe runs for a few steps on drawn images; its teacher answers what the network answers."""

import importlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import lightning_compress as lc

pytestmark = pytest.mark.usefixtures("recipes")


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    """Options that name a checkpoint and a folder of packs: 30 training and 16 test images."""
    draw = np.random.default_rng(0)
    pixels, labels = draw.integers(0, 256, (46, 3, 32, 32), dtype=np.uint8), draw.integers(0, 10, 46)
    np.savez(tmp_path / "cifar10_train_0.npz", x_train_delta=pixels[:30], y_train=labels[:30])
    np.savez(tmp_path / "cifar10_test.npz", x_test=pixels[30:].transpose(0, 2, 3, 1), y_test=labels[30:])
    torch.save(lc.models.ResNetCIFAR(20).state_dict(), tmp_path / "net.pt")
    paths = [
        "--data",
        str(tmp_path),
        "--checkpoint",
        str(tmp_path / "net.pt"),
        "--output-dir",
        str(tmp_path / "out"),
    ]
    return [
        *paths,
        "--arch",
        "resnet20",
        "--depth",
        "8",
        "--width",
        "4",
        "--train-size",
        "24",
        "--batch-size",
        "8",
    ]


@pytest.mark.parametrize("judged", [[], ["--validation", "6", "--loss", "dkd"]])
def test_both_students_are_trained_and_compared(given, tmp_path, capsys, judged):
    recipe = importlib.import_module("distill_cifar")
    recipe.main([*given, *judged, "--max-steps", "4", "--seeds", "0", "1", "--log-every", "1"])
    printed = capsys.readouterr().out
    rows = {line.split("  ")[0]: re.findall(r"[+-]?\d+\.\d+%", line) for line in printed.splitlines()}
    alone, distilled, gains = (
        [float(v[:-1]) for v in rows[name]] for name in ("student, alone", "student, distilled", "difference")
    )
    assert len(alone) == len(distilled) == len(gains) == 4  # two seeds, mean, deviation
    for i in range(2):
        assert gains[i] == pytest.approx(distilled[i] - alone[i], abs=0.011)
    assert gains[2] == pytest.approx((gains[0] + gains[1]) / 2, abs=0.011)
    net = lc.models.ResNetCIFAR(8, width=4)
    net.load_state_dict(torch.load(tmp_path / "out" / "distilled_1.pt"))
    images, labels = (
        recipe.read(given[1], False, None)
        if not judged
        else tuple(x[24:] for x in recipe.read(given[1], True, 30))
    )
    found = (recipe.logits(net, images).argmax(1) == labels).float().mean()
    assert 100 * found.item() == pytest.approx(distilled[1], abs=0.006)


def test_the_remembered_teacher_answers_what_the_network_answers():
    """To images as they are and mirrored, whichever the step draws, in both columns of the numbers."""
    recipe = importlib.import_module("distill_cifar")
    net, images = lc.models.ResNetCIFAR(8).eval(), torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    answers = torch.cat([recipe.logits(net, view) for view in (images, images.flip(3))]).clone()
    teacher, lit = recipe.Remembered(answers), recipe.LitThin(8, 4, 0.1, 6)
    module = recipe.Distillation(lit, teacher, alpha=1.0)
    seen = []
    lit.register_forward_hook(lambda m, args, out: seen.append(args))
    module.training_step((images, torch.zeros(6, dtype=torch.long), torch.arange(6)), 0)
    (shown, numbers), = seen  # fmt: skip
    assert {int(n) // 6 for n in numbers} == {0, 1}
    with torch.no_grad():
        assert torch.allclose(teacher(shown, numbers), net(shown), atol=1e-4)
