"""Students: the size that was asked for, of any architecture, and a narrowing that a file can repeat."""

import copy
import importlib
import itertools
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lightning_compress as lc
from lightning_compress.distillation.narrow import Narrow
from lightning_compress.distillation.student import make_student, real_parameters
from lightning_compress.distillation.widths import (
    UnreachableError,
    Width,
    equal_steps,
    evenly,
    fit_widths,
    strongest,
)
from lightning_compress.transform import applied

RATIOS = (0.25, 0.1, 0.05)


class Unknown(nn.Module):
    """An architecture that no list of families has: two branches, one of them with its own parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(3, 24, 5, padding=2)
        self.norm, self.scale = nn.BatchNorm2d(24), nn.Parameter(torch.ones(24, 1, 1))
        self.mix, self.head = nn.Conv2d(24, 40, 3), nn.Linear(40, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.a(x) + self.scale * torch.tanh(self.b(x))))
        out: Tensor = self.head(torch.relu(self.mix(x)).mean((2, 3)))
        return out


class Tokens(nn.Module):
    """A transformer on token numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(50, 48), nn.Parameter(0.02 * torch.randn(1, 6, 48))
        layer = nn.TransformerEncoderLayer(48, 4, 96, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.encoder(self.embed(x) + self.place).mean(1))
        return out


def image(size: int, channels: int = 3) -> Tensor:
    return torch.randn(1, channels, size, size, generator=torch.Generator().manual_seed(0))


def of_torchvision(name: str) -> nn.Module:
    models = pytest.importorskip("torchvision").models
    built: nn.Module = getattr(models, name)(num_classes=100)
    return built


def of_operators(name: str) -> nn.Module:
    pytest.importorskip("neuralop")
    return lc.models.build(name)


TEACHERS: dict[str, tuple[Any, Any]] = {
    "resnet20": (lc.models.resnet20, image(32)),
    "resnet56": (lc.models.resnet56, image(32)),
    "resnet18": (lambda: of_torchvision("resnet18"), image(32)),
    "mobilenet_v2": (lambda: of_torchvision("mobilenet_v2"), image(32)),
    "lenet5": (lc.models.LeNet5, image(28, 1)),
    "mlp": (lc.models.MLP, torch.randn(1, 784)),
    "pinn": (lambda: lc.models.PINN(2, 1, (64,) * 4, fourier_features=64), torch.randn(1, 2)),
    "fno": (lambda: of_operators("fno"), image(16, 1)),
    "uno": (lambda: of_operators("uno"), image(16, 1)),
    "unknown": (Unknown, image(12)),
    "tokens": (Tokens, torch.randint(50, (1, 6))),
}


DEEP = ("resnet56", "resnet18", "mobilenet_v2")  # the hardest size only, for the time it takes


def state(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, Tensor)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", TEACHERS)
def test_size_and_shape(name: str) -> None:
    build, x = TEACHERS[name]
    torch.manual_seed(0)
    teacher = build().eval()
    before, random = state(teacher), torch.get_rng_state()
    held = {id(t) for t in itertools.chain(teacher.parameters(), teacher.buffers())}
    for ratio in RATIOS if name not in DEEP else (0.05,):
        student = make_student(teacher, ratio, example_input=x)
        reached = real_parameters(student) / real_parameters(teacher)
        assert abs(reached / ratio - 1) <= 0.1, (ratio, reached)
        assert type(student) is type(teacher) and student.training
        assert not held & {id(t) for t in itertools.chain(student.parameters(), student.buffers())}
        three = torch.cat([x, x, x])
        answer = student.eval()(three)
        assert answer.shape == teacher(three).shape and bool(answer.isfinite().all())
    assert same(before, state(teacher)) and not teacher.training
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize("name", ["lenet5", "pinn", "unknown", "tokens"])
def test_files_of_students_open_on_the_teachers_architecture(name: str, tmp_path: Any) -> None:
    build, x = TEACHERS[name]
    student = make_student(build(), 0.1, example_input=x, seed=3).eval()
    lc.save(student, tmp_path / "student.lcz")
    fresh = lc.load(tmp_path / "student.lcz", into=build()).eval()
    assert torch.equal(fresh(x), student(x)) and type(fresh) is type(student)
    eight = lc.compress(student, [lc.Quantize(bits=8)]).model
    lc.save(eight, tmp_path / "eight.lcz")
    assert torch.equal(lc.load(tmp_path / "eight.lcz", into=build()).eval()(x), eight(x))
    assert torch.equal(pickle.loads(pickle.dumps(student))(x), student(x))
    assert [step.name for _, step in applied(student)] == ["Narrow"]


def test_seed_decides_and_the_teachers_weights_do_not() -> None:
    first, other = lc.models.LeNet5(), lc.models.LeNet5()
    x = image(28, 1)
    a, b = (make_student(t, 0.1, example_input=x, seed=1) for t in (first, other))
    assert same(state(a), state(b))
    assert not same(state(a), state(make_student(first, 0.1, example_input=x, seed=2)))


def test_students_that_begin_as_their_teacher_hold_its_slices() -> None:
    teacher = nn.Sequential(nn.Linear(3, 20), nn.ReLU(), nn.Linear(20, 2))
    with torch.no_grad():
        teacher[0].weight[5:15] *= 100
        teacher[2].weight[:, 5:15] *= 100
    student: Any = make_student(teacher, 0.5, example_input=torch.ones(1, 3), init="teacher")
    assert len(student[0].weight) == 10
    assert torch.equal(student[0].weight, teacher[0].weight[5:15])
    assert torch.equal(student[2].weight, teacher[2].weight[:, 5:15])
    assert torch.equal(student[2].bias, teacher[2].bias)


def test_random_students_begin_as_fresh_layers() -> None:
    torch.manual_seed(0)
    teacher = Unknown().eval()
    with torch.no_grad():
        for p in teacher.parameters():
            p.mul_(0).add_(7)
        teacher.norm.running_mean.fill_(3)
    student: Any = make_student(teacher, 0.5, example_input=image(12))
    fan_in = student.mix.weight[0].numel()
    assert float(student.mix.weight.detach().abs().max()) <= fan_in**-0.5  # PyTorch's rule for convolutions
    assert 0.5 < float(student.mix.weight.detach().std()) / (fan_in**-0.5 / 3**0.5) < 1.5
    assert bool((student.norm.weight == 1).all()) and bool((student.norm.running_mean == 0).all())
    assert bool((student.scale == 7).all())  # no layer resets it: the mean of what it was


def test_frequencies_keep_their_range() -> None:
    teacher: Any = lc.models.PINN(2, 1, (64, 64), fourier_features=64, fourier_scale=3.0)
    student: Any = make_student(teacher, 0.25, example_input=torch.zeros(1, 2))
    old, new = teacher.features.B, student.features.B
    kept = [next(j for j in range(64) if torch.equal(old[:, j], column)) for column in new.T]
    assert kept == sorted(set(kept)) and 8 <= len(kept) < 64
    sizes, left = old.norm(dim=0), new.norm(dim=0)
    assert left.max() == sizes.max() and left.min() == sizes.min()
    assert student.layers[0].in_features == 2 * len(kept)


def test_a_frozen_teacher_gives_a_student_that_learns() -> None:
    teacher = lc.models.MLP(8, 3, (64, 64)).requires_grad_(False)
    student = make_student(teacher, 0.3, example_input=torch.zeros(1, 8))
    assert all(p.requires_grad for p in student.parameters())
    assert not any(p.requires_grad for p in teacher.parameters())


def test_what_cannot_be_is_said_with_the_nearest() -> None:
    teacher, x = nn.Sequential(nn.Linear(30, 4), nn.ReLU(), nn.Linear(4, 30)), torch.zeros(1, 30)
    with pytest.raises(ValueError, match=r"ratio=0.05 .*narrowest model has 91 parameters.*0\.3321") as error:
        make_student(teacher, 0.05, example_input=x)
    assert "2.weight" in str(error.value)  # what stays, and why
    assert real_parameters(make_student(teacher, 91 / 274, example_input=x)) == 91
    for ratio in (0, 1, -0.1):
        with pytest.raises(ValueError, match="0 < ratio < 1"):
            make_student(teacher, ratio, example_input=x)
    with pytest.raises(ValueError, match="tolerance"):
        make_student(teacher, 0.5, example_input=x, tolerance=0)
    with pytest.raises(ValueError, match="factory=lambda"):
        make_student(teacher, 0.5)
    with pytest.raises(ValueError, match="allowed: random, teacher"):
        make_student(teacher, 0.5, example_input=x, init="zeros")


def test_factory_is_searched_for_the_size() -> None:
    def factory(width: float) -> nn.Module:
        return lc.models.MLP(16, 4, (max(1, round(200 * width)),) * 2)

    teacher = lc.models.MLP(16, 4, (200, 200))
    random = torch.get_rng_state()
    a, b = (make_student(teacher, 0.1, factory=factory, tolerance=0.02, seed=5) for _ in range(2))
    assert abs(real_parameters(a) / real_parameters(teacher) / 0.1 - 1) <= 0.02
    assert same(state(a), state(b)) and torch.equal(random, torch.get_rng_state())
    with pytest.raises(ValueError, match="the nearest has"):
        make_student(teacher, 0.1, factory=lambda width: lc.models.MLP(16, 4, (200, 200)))
    with pytest.raises(ValueError, match="init='teacher' and factory"):
        make_student(teacher, 0.1, factory=factory, init="teacher")


def test_widths_are_multiples_and_layers_keep_a_minimum() -> None:
    teacher = lc.models.MLP(32, 4, (128, 128))
    x = torch.zeros(1, 32)
    student: Any = make_student(teacher, 0.25, example_input=x, round_to=8, tolerance=0.2)
    assert all(layer.out_features % 8 == 0 for layer in student.layers[:-1:2])
    small, x = nn.Sequential(nn.Linear(9, 10), nn.ReLU(), nn.Linear(10, 400)), torch.zeros(1, 9)
    loose: Any = make_student(small, 0.9, example_input=x)
    assert loose[0].out_features >= 8
    tight: Any = make_student(small, 0.3, example_input=x)
    assert tight[0].out_features < 8  # the minimum gives way


def test_a_shallower_teacher_first() -> None:
    teacher, x = lc.models.resnet20().eval(), image(16)
    shallow = lc.compress(teacher, [lc.DropLayers(layers=["layer1.2"])], example_input=x).model
    student = make_student(shallow, 0.2, example_input=x).eval()
    assert [step.name for _, step in applied(student)] == ["DropLayers", "Narrow"]
    assert student(torch.cat([x, x])).shape == (2, 10)


def test_narrow_is_a_transform_like_others() -> None:
    teacher, x = lc.models.LeNet5().eval(), image(28, 1)
    result = lc.compress(teacher, [Narrow(0.3)], example_input=x)
    assert abs(real_parameters(result.model) / real_parameters(teacher) / 0.3 - 1) <= 0.1
    same_size = lc.compress(teacher, [Narrow(1.0)], example_input=x).model
    assert same(state(same_size), state(teacher))
    wrong = copy.deepcopy(result.plan[0])
    wrong.layers["conv1.weight"] = {"shape": [6, 1, 5, 5], "keep": {"0": torch.tensor([99])}}
    fresh = lc.models.LeNet5()
    before = state(fresh)
    with pytest.raises(ValueError, match=r"conv1\.weight"):
        Narrow().apply(fresh, wrong)
    assert same(before, state(fresh))
    with pytest.raises(ValueError, match="example_input"):
        lc.compress(teacher, [Narrow(0.3)])
    for options in ({"ratio": 0.0}, {"ratio": 1.1}, {"round_to": 0}, {"minimum": 0}, {"channels": "best"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            Narrow(**options)  # type: ignore[arg-type]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 3)), min_size=1, max_size=4),
    st.floats(0.05, 0.95),
    st.integers(1, 16),
)
def test_widths_come_close_or_say_that_none_do(sizes: Any, ratio: float, minimum: int) -> None:
    widths = [Width(n, n * times) for n, times in sizes]

    def count(kept: Any) -> int:
        chain = [3, *kept, 2]
        return sum(a * b for a, b in itertools.pairwise(chain))

    whole = count([w.size for w in widths])
    goal = ratio * whole
    try:
        kept = fit_widths(widths, count, goal, tolerance=0.1, minimum=minimum)
    except UnreachableError as error:
        least = count([1] * len(widths))
        assert least <= error.least and abs(error.least - goal) > 0.1 * goal
        if len(widths) == 1:  # then all widths can be tried
            assert all(abs(count([k]) - goal) > 0.1 * goal for k in range(1, widths[0].size + 1))
        return
    assert abs(count(kept) - goal) <= 0.1 * goal
    assert all(1 <= k <= w.size for k, w in zip(kept, widths, strict=True))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=30), st.data())
def test_choices_are_distinct_and_keep_the_ends(values: list[float], data: Any) -> None:
    count = data.draw(st.integers(1, len(values)))
    for chosen in (evenly(len(values), count), strongest(values, count), equal_steps(values, count)):
        assert len(set(chosen)) == count and chosen == sorted(chosen)
        assert chosen[0] >= 0 and chosen[-1] < len(values)
    best = strongest(values, count)
    assert min(values[i] for i in best) >= max((v for i, v in enumerate(values) if i not in best), default=-9)
    if count > 1:
        spread = [values[i] for i in equal_steps(values, count)]
        assert min(spread) == min(values) and max(spread) == max(values)


def test_models_by_name() -> None:
    assert {"mlp", "pinn"} <= set(lc.models.names())
    net: Any = lc.models.build("pinn", in_features=3, out_features=2, hidden=(8,), fourier_features=5)
    x = torch.randn(4, 3)
    phase = 2 * torch.pi * (x.double() @ net.features.B.double())
    wanted = torch.cat([phase.sin(), phase.cos()], 1)
    torch.testing.assert_close(net.features(x).double(), wanted, rtol=1e-5, atol=1e-5)
    assert net(x).shape == (4, 2) and "features.B" in net.state_dict()
    plain: Any = lc.models.PINN(2, 1, (8, 8), activation="silu")
    assert [type(m).__name__ for m in plain.layers] == ["Linear", "SiLU", "Linear", "SiLU", "Linear"]
    for options in ({"hidden": (0,)}, {"activation": "step"}, {"fourier_features": -1}):
        with pytest.raises(ValueError, match=next(iter(options)) if "hidden" not in options else "widths"):
            lc.models.PINN(**options)  # type: ignore[arg-type]
    assert importlib.import_module("lightning_compress.models").MLP is lc.models.MLP
