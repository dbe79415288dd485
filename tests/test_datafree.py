"""Data-free distillation: the student gets better, nothing else changes, and what was decided is said."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_compress as lc
from lightning_compress.distillation.datafree import DataFreeDistillation, distill
from lightning_compress.distillation.result import compare
from lightning_compress.distillation.student import make_student
from lightning_compress.distillation.tasks import find_task
from lightning_compress.stats.samplers import synthesize

POINT = torch.zeros(1, 2)


def wave() -> nn.Module:
    """A trained-like map of two coordinates: smooth and of mean 3."""
    torch.manual_seed(0)
    net: Any = lc.models.PINN(2, 1, (32, 32), fourier_features=8, fourier_scale=0.3)
    with torch.no_grad():
        net.layers[-1].bias.fill_(3.0)
        net.layers[-1].weight.mul_(4)
    return net.eval()


def classes() -> nn.Module:
    """Linear layers on 12 features, which name one of 4 classes."""
    torch.manual_seed(0)
    net = lc.models.MLP(12, 4, (32, 32))
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(2)
    return net


def state(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_values_get_close_and_the_teacher_stays() -> None:
    teacher = wave()
    student = make_student(teacher, 0.3, example_input=POINT)
    before, random, numbers = state(teacher), torch.get_rng_state(), np.random.get_state()[1].copy()
    result = distill(teacher, student, example_input=POINT, steps=120, batch_size=64, lr=2e-2)
    assert result.drawn_after.relative_l2 < result.drawn_before.relative_l2 / 3
    assert result.drawn_after.ber < result.drawn_before.ber / 3
    assert result.model is student and not student.training
    assert same(before, state(teacher)) and not teacher.training
    assert all(p.requires_grad for p in teacher.parameters())
    assert torch.equal(random, torch.get_rng_state()) and np.array_equal(numbers, np.random.get_state()[1])
    assert result.task == "regression" and "2 coordinates" in result.task_reason
    assert (
        result.inputs == "uniform (Sobol) on [-1, 1] x [-1, 1] seed=0"
        and "2 coordinates" in result.inputs_reason
    )
    points = synthesize(teacher, "uniform", (2,)).held_out()(1000)
    with torch.no_grad():
        wanted = float((student(points) - teacher(points)).norm() / teacher(points).norm())
    assert result.drawn_after.relative_l2 == pytest.approx(wanted, rel=1e-4) and result.drawn_after.n == 1000


def test_classes_agree_more_and_given_data_are_told_apart() -> None:
    teacher = classes()
    student = make_student(teacher, 0.4, example_input=torch.zeros(1, 12))
    real = torch.randn(300, 12, generator=torch.Generator().manual_seed(5)) * 0.5
    options: Any = {"example_input": (12,), "sampler": "normal", "val_data": real.split(100)}
    result = distill(teacher, student, steps=120, lr=2e-2, batch_size=64, **options)
    assert result.task == "classification" and result.loss == "kd (T = 4)"
    assert result.drawn_after.ber < result.drawn_before.ber / 2
    assert result.data_after is not None and result.data_before is not None and result.data_after.n == 300
    with torch.no_grad():
        wanted = float((teacher.eval()(real).argmax(1) != student(real).argmax(1)).float().mean())
    assert result.data_after.ber == pytest.approx(wanted)
    text = str(result)
    for words in ("drawn inputs", "given data", "normal seed=0", "classification", "before", "after"):
        assert words in text
    assert "relative L2" not in text


def test_same_seed_same_student() -> None:
    def trained(seed: int) -> dict[str, Tensor]:
        teacher = wave()
        student = make_student(teacher, 0.3, example_input=POINT)
        distill(teacher, student, example_input=POINT, steps=5, batch_size=16, val_samples=16, seed=seed)
        return state(student)

    first = trained(0)
    torch.rand(7)
    assert same(first, trained(0)) and not same(first, trained(1))


def test_given_data_train_without_their_labels() -> None:
    teacher = classes()
    x = torch.randn(64, 12, generator=torch.Generator().manual_seed(1))
    loader = DataLoader(TensorDataset(x, torch.zeros(64, dtype=torch.long)), batch_size=16, shuffle=True)
    student = make_student(teacher, 0.4, example_input=x[:1])
    random = torch.get_rng_state()
    result = distill(teacher, student, data=loader, val_data=loader, example_input=x[:1], steps=120, lr=2e-2)
    assert torch.equal(random, torch.get_rng_state())
    assert result.inputs == "data" and result.steps == 120
    assert result.data_after is not None and result.data_before is not None
    assert result.data_after.ber < result.data_before.ber / 2  # all labels are 0; the teacher's are not
    assert float((student(x).argmax(1) == 0).float().mean()) < 0.9


def test_residual_is_part_of_the_loss() -> None:
    """A residual that pulls the answers to 7 wins over a teacher of 3 when it is large."""
    teacher = wave()
    student = make_student(teacher, 0.3, example_input=POINT)
    options: Any = {"example_input": POINT, "steps": 120, "batch_size": 32, "lr": 2e-2, "val_samples": 64}
    result = distill(teacher, student, residual=lambda net, x: 100 * (net(x) - 7), **options)
    with torch.no_grad():
        assert abs(float(student(torch.rand(64, 2)).mean()) - 7) < 0.5
    assert result.loss.endswith("+ residual")
    with pytest.raises(ValueError, match="loss='auto'"):
        distill(teacher, student, residual=lambda net, x: net(x), loss="mse", **options)


def test_students_of_several_sizes() -> None:
    free = DataFreeDistillation(POINT, options={"steps": 80, "batch_size": 32, "lr": 2e-2}, init="random")
    teacher = wave()
    results = free.run(teacher)
    assert list(results) == [0.25, 0.1, 0.05]
    for ratio, result in results.items():
        assert abs(result.ratio / ratio - 1) <= 0.1
        assert result.drawn_after.relative_l2 < result.drawn_before.relative_l2 / 3
    repeated = free.run(teacher, (0.1,))[0.1]
    assert same(state(repeated.model), state(results[0.1].model))


def test_memory_that_runs_out_halves_the_batches_once(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = wave()
    student: Any = make_student(teacher, 0.3, example_input=POINT)
    whole = student.forward

    def forward(x: Tensor) -> Any:
        if student.training and len(x) > 8:
            raise torch.OutOfMemoryError("out of memory")
        return whole(x)

    monkeypatch.setattr(student, "forward", forward)
    options: Any = {"example_input": POINT, "steps": 3, "val_samples": 8}
    with pytest.warns(UserWarning, match="batches of 8"):
        assert distill(teacher, student, batch_size=16, **options).batch_size == 8
    with pytest.raises(torch.OutOfMemoryError), pytest.warns(UserWarning):
        distill(teacher, student, batch_size=64, **options)


def test_several_arguments() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(3, 20), nn.Linear(2, 20), nn.Linear(20, 1)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            z: Tensor = self.out(torch.tanh(self.a(x)) * torch.tanh(self.b(y)))
            return z

    torch.manual_seed(0)
    teacher, example = Product(), (torch.zeros(1, 3), torch.zeros(1, 2))
    student = make_student(teacher, 0.5, example_input=example)
    result = distill(teacher, student, example_input=example, steps=80, batch_size=32, lr=2e-2)
    assert result.drawn_after.relative_l2 < 0.5 * result.drawn_before.relative_l2


def test_tasks() -> None:
    assert find_task(lc.models.LeNet5(), torch.zeros(1, 1, 28, 28)).task == "classification"
    assert find_task(wave(), POINT) == ("regression", "linear layers on 2 coordinates", True)
    fields = lc.models.PINN(2, 3, (8,))
    assert find_task(fields, POINT)[::2] == ("regression", True)
    few = lc.models.MLP(4, 3, (8,))  # could be a classifier of four measurements
    assert find_task(few, torch.zeros(1, 4))[::2] == ("regression", False)
    picture = nn.Conv2d(3, 5, 1)
    assert find_task(picture, torch.zeros(1, 3, 4, 4)).sure is False
    student = make_student(few, 0.6, example_input=torch.zeros(1, 4))
    options: Any = {"example_input": (4,), "steps": 1, "val_samples": 4}
    with pytest.warns(UserWarning, match="task='classification'"):
        distill(few, student, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distill(few, student, task="classification", **options)


def test_errors_equal_numpy() -> None:
    a, b = nn.Linear(3, 4), nn.Linear(3, 4)
    x = torch.randn(50, 3)
    with torch.no_grad():
        f, g = a(x).double().numpy(), b(x).double().numpy()
    values, named = (compare(a, b, x.split(20), task) for task in ("regression", "classification"))
    each = np.linalg.norm(f - g, axis=1) / np.linalg.norm(f, axis=1)
    assert values.ber == pytest.approx(each.mean()) and values.n == 50
    assert values.relative_l2 == pytest.approx(np.linalg.norm(f - g) / np.linalg.norm(f))
    assert named.ber == pytest.approx((f.argmax(1) != g.argmax(1)).mean()) and np.isnan(named.relative_l2)


def test_what_cannot_be() -> None:
    teacher = wave()
    with pytest.raises(ValueError, match="share"):
        distill(teacher, teacher, example_input=POINT, steps=1, val_samples=4)
    with pytest.raises(ValueError, match="must have the same shape"):
        distill(teacher, lc.models.PINN(2, 2, (4,)), example_input=POINT, steps=1, val_samples=4)
    with pytest.raises(ValueError, match="steps=0"):
        distill(teacher, wave(), example_input=POINT, steps=0)
    with pytest.raises(ValueError, match="example input"):
        distill(teacher, wave())
