"""Every loss against a second computation in NumPy and float64, and what holds for all of them."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lightning_compress as lc
from lightning_compress.distillation.losses import (
    attention_loss,
    contrastive_loss,
    decoupled_kd_loss,
    feature_loss,
    kd_loss,
    regression_loss,
    relational_loss,
    sobolev_loss,
)

SEEDS = st.integers(0, 2**16)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return (p * (np.log(p) - np.log(q))).sum(-1)


# -- references ----------------------------------------------------------------------------------------------


@given(SEEDS, st.integers(1, 5), st.integers(2, 6), st.floats(0.3, 20))
def test_kd_is_t_squared_kl(seed, n, c, temperature):
    s, t = normal(seed, n, c), normal(seed + 1, n, c) * 3
    expected = temperature**2 * kl(softmax(t.numpy() / temperature), softmax(s.numpy() / temperature)).mean()
    assert kd_loss(s, t, temperature).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_the_gradient_of_kd_hardly_depends_on_t_when_it_is_large():
    """That is what T² is for: with small logits the gradient tends to (z_s − z_t) / (C N), both centred."""
    s, t = normal(0, 6, 5).requires_grad_(), normal(1, 6, 5)
    (gradient,) = torch.autograd.grad(kd_loss(s, t, 1e3), s)
    centred = (s - s.mean(1, keepdim=True)) - (t - t.mean(1, keepdim=True))
    assert torch.allclose(gradient, centred.detach() / (5 * 6), atol=1e-3)


@given(SEEDS, st.integers(1, 5), st.integers(2, 6), st.floats(0.5, 8))
def test_decoupled_kd_is_its_two_parts(seed, n, c, temperature):
    s, t = normal(seed, n, c), normal(seed + 1, n, c) * 2
    labels = torch.randint(c, (n,), generator=torch.Generator().manual_seed(seed))
    total = 0.0
    for z, y, label in zip(s.numpy(), t.numpy(), labels.tolist(), strict=True):
        p, q = softmax(y / temperature), softmax(z / temperature)
        pair = [np.array([v[label], 1 - v[label]]) for v in (p, q)]
        others = [np.delete(v, label) / (1 - v[label]) for v in (p, q)]
        total += temperature**2 * (1.5 * kl(*pair) + 4.0 * kl(*others))
    found = decoupled_kd_loss(s, t, labels, temperature, w_tc=1.5, w_nc=4.0).item()
    assert found == pytest.approx(total / n, rel=1e-7, abs=1e-10)


@given(SEEDS, st.integers(1, 4), st.integers(3, 6))
def test_kd_is_the_two_parts_with_the_teacher_s_own_weight(seed, n, c):
    """KL(p_t ‖ p_s) = KL of pairs + (1 − p_y) KL of the others (Zhao et al. 2022, equation 5), sample by sample."""
    for row in range(n):
        s, t = normal(seed + row, 1, c), normal(seed + row + 50, 1, c)
        y = torch.tensor([row % c])
        rest = 1 - float(torch.softmax(t / 2, 1)[0, y])
        assert decoupled_kd_loss(s, t, y, 2.0, 1.0, rest).item() == pytest.approx(kd_loss(s, t, 2.0).item())


def test_positions_count_like_samples():
    s, t = normal(0, 2, 5, 3, 4), normal(1, 2, 5, 3, 4)
    rows = [x.movedim(1, -1).reshape(-1, 5) for x in (s, t)]
    assert torch.allclose(kd_loss(s, t), kd_loss(*rows))
    assert torch.allclose(kd_loss(s, t, class_axis=-1), kd_loss(s.reshape(-1, 4), t.reshape(-1, 4)))
    labels = torch.randint(5, (2, 3, 4))
    assert torch.allclose(decoupled_kd_loss(s, t, labels), decoupled_kd_loss(*rows, labels.flatten()))


def test_extreme_logits_stay_finite():
    s, t = torch.tensor([[1e4, -1e4, 0.0]]).requires_grad_(), torch.tensor([[-1e4, 1e4, 0.0]])
    for loss in (kd_loss(s, t, 1.0), decoupled_kd_loss(s, t, torch.tensor([1]), 1.0)):
        (gradient,) = torch.autograd.grad(loss, s)
        assert torch.isfinite(loss) and torch.isfinite(gradient).all() and loss > 100


def test_features_are_compared_at_the_smaller_size():
    a, b = normal(0, 2, 3, 8, 4), normal(1, 2, 3, 4, 4)
    halved = a.numpy().reshape(2, 3, 4, 2, 4).mean(3)
    expected = ((halved - b.numpy()) ** 2).mean()
    assert feature_loss([a], [b]).item() == pytest.approx(expected)
    assert feature_loss([b], [a]).item() == pytest.approx(expected)
    assert feature_loss([a, b], [b, a]).item() == pytest.approx(2 * expected)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_attention_maps(p):
    s, t = normal(0, 3, 4, 6, 6), normal(1, 3, 7, 3, 3)
    maps = []
    for f in (s, t):
        q = (np.abs(f.numpy()) ** p).sum(1)
        q = q.reshape(3, 3, q.shape[1] // 3, 3, q.shape[2] // 3).mean((2, 4)).reshape(3, -1)
        maps.append(q / np.linalg.norm(q, axis=1, keepdims=True))
    assert attention_loss([s], [t], p).item() == pytest.approx(((maps[0] - maps[1]) ** 2).mean())


def huber(a: np.ndarray, b: np.ndarray) -> float:
    d = np.abs(np.asarray(a) - np.asarray(b))
    return float(np.where(d < 1, d**2 / 2, d - 0.5).mean())


@given(SEEDS, st.integers(3, 6), st.integers(1, 4))
def test_relations_of_pairs_and_triples(seed, n, width):
    s, t = normal(seed, n, width) * 3 + 10, normal(seed + 1, n, width + 1, 2)
    distances, angles = [], []
    for x in (s.numpy(), t.reshape(n, -1).numpy()):
        pairs = np.array([np.linalg.norm(x[i] - x[j]) for i, j in itertools.permutations(range(n), 2)])
        distances.append(pairs / pairs.mean())
        cosines = []
        for i, j, k in itertools.permutations(range(n), 3):
            a, b = x[i] - x[j], x[k] - x[j]
            cosines.append(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
        angles.append(np.array(cosines))
    expected = 1.5 * huber(*distances) + 0.5 * huber(*angles)
    assert relational_loss(s, t, 1.5, 0.5).item() == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_relations_of_few_or_equal_samples_are_finite():
    for n in (1, 2, 3):
        x = torch.zeros(n, 4).requires_grad_()
        loss = relational_loss(x + 0 * x.sum(), normal(0, n, 4, dtype=torch.float32))
        assert torch.isfinite(loss)
        if loss.requires_grad:
            assert torch.isfinite(torch.autograd.grad(loss, x)[0]).all()


def test_contrastive_loss_is_cross_entropy_of_similarities():
    s, t = normal(0, 5, 3, 2), normal(1, 5, 3, 2)
    a, b = (f.numpy().mean(2) for f in (s, t))
    a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (a, b))
    expected = -np.log(softmax(a @ b.T / 0.2).diagonal()).mean()
    assert contrastive_loss(s, t, 0.2).item() == pytest.approx(expected)
    same = torch.ones(7, 3)
    assert contrastive_loss(same, same).item() == pytest.approx(math.log(7), rel=1e-5)


@given(SEEDS, st.booleans())
def test_regression_losses(seed, is_complex):
    def draw(k):
        x = normal(seed + k, 4, 2, 5)
        return torch.complex(x, normal(seed + k + 9, 4, 2, 5)) if is_complex else x

    s, t = draw(0), draw(1)
    a, b = s.numpy(), t.numpy()
    assert regression_loss(s, t).item() == pytest.approx((np.abs(a - b) ** 2).mean())
    each = np.linalg.norm((a - b).reshape(4, -1), axis=1) / np.linalg.norm(b.reshape(4, -1), axis=1)
    assert regression_loss(s, t, "relative_l2").item() == pytest.approx(each.mean())
    assert regression_loss(s, t, "h1").item() == pytest.approx(lc.RelativeH1Error(dims=1)(s, t).item())


def test_single_values_are_one_field():
    s, t = normal(0, 50, 1), normal(1, 50, 1)
    expected = float((s - t).norm() / t.norm())
    assert regression_loss(s, t, "relative_l2").item() == pytest.approx(expected)
    assert regression_loss(s[:, 0], t[:, 0], "relative_l2").item() == pytest.approx(expected)
    assert regression_loss(s, 0 * t, "relative_l2").item() == 0


def test_relative_l2_leaves_out_what_has_no_norm():
    s, t = torch.ones(2, 3), torch.tensor([[0.0, 0, 0], [2, 2, 2]])
    assert regression_loss(s, t, "relative_l2").item() == pytest.approx(0.5)


# -- sobolev -------------------------------------------------------------------------------------------------


class Field(torch.nn.Module):
    def __init__(self, seed: int, inputs: int = 2, outputs: int = 3) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(normal(seed, 5, inputs))
        self.b = torch.nn.Parameter(normal(seed + 1, outputs, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.a.T) @ self.b.T


def test_slopes_are_those_of_finite_differences():
    student, teacher = Field(0), Field(7)
    x = normal(3, 6, 2).requires_grad_()
    h, slopes = 1e-6, []
    with torch.no_grad():
        for net in (student, teacher):
            step = [(net(x + h * e) - net(x - h * e)) / (2 * h) for e in torch.eye(2, dtype=x.dtype)]
            slopes.append(torch.stack(step, -1))
        expected = (student(x) - teacher(x)).square().mean() + 0.3 * (slopes[0] - slopes[1]).square().mean()
    assert sobolev_loss(student(x), teacher(x), x, 0.3).item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_gradient_of_the_sobolev_loss_is_that_of_finite_differences():
    """Acceptance 10."""
    student, teacher = Field(0), Field(7)
    x = normal(3, 6, 2).requires_grad_()

    def value() -> torch.Tensor:
        return sobolev_loss(student(x), teacher(x), x, 0.7)

    value().backward()
    assert all(p.grad is None for p in teacher.parameters())
    h = 1e-6
    for p in student.parameters():
        for index in [(0, 0), (2, 1)]:
            with torch.no_grad():
                p[index] += h
            up = value().item()
            with torch.no_grad():
                p[index] -= 2 * h
            down = value().item()
            with torch.no_grad():
                p[index] += h
            assert p.grad[index].item() == pytest.approx((up - down) / (2 * h), rel=1e-5, abs=1e-8)


# -- what holds for all --------------------------------------------------------------------------------------


def losses():
    y = torch.tensor([0, 2, 1, 2])
    return {
        "kd": kd_loss,
        "dkd": lambda s, t: decoupled_kd_loss(s, t, y),
        "feature": lambda s, t: feature_loss([s], [t]),
        "attention": lambda s, t: (
            attention_loss([s[..., None]], [t[..., None]]) + attention_loss([s[:, None]], [t[:, None]])
        ),
        "relational": relational_loss,
        "contrastive": contrastive_loss,
        "mse": regression_loss,
        "relative_l2": lambda s, t: regression_loss(s, t, "relative_l2"),
        "h1": lambda s, t: regression_loss(s[:, None], t[:, None], "h1"),
    }


@pytest.mark.parametrize("name", losses())
def test_zero_at_equality_and_no_gradient_for_the_teacher(name):
    loss = losses()[name]
    t = normal(1, 4, 3).requires_grad_()
    s = t.detach().clone().requires_grad_()
    equal = loss(s, t)
    if name != "contrastive":
        assert equal.item() == pytest.approx(0, abs=1e-12)
        if equal.requires_grad:
            (at_equality,) = torch.autograd.grad(equal, s)
            assert torch.allclose(at_equality, torch.zeros_like(s), atol=1e-9)
    s = normal(2, 4, 3).requires_grad_()
    value = loss(s, t)
    value.backward()
    assert value > 0 and s.grad.abs().max() > 0 and t.grad is None


@pytest.mark.parametrize("name", losses())
def test_half_precision_is_computed_in_float32(name):
    """Also where autocast would take matrix products in bfloat16."""
    loss = losses()[name]
    s, t = (normal(k, 4, 3, dtype=torch.bfloat16) for k in (0, 1))
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(s, t)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(loss(s.double(), t.double()).item(), rel=1e-4)


@pytest.mark.parametrize("name", [n for n in losses() if n != "dkd"])
def test_complex_values(name):
    s, t = (torch.complex(normal(k, 4, 3), normal(k + 5, 4, 3)) for k in (0, 1))
    value = losses()[name](s, t)
    assert not value.is_complex() and torch.isfinite(value) and value > 0


# -- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda z: kd_loss(z, z[:, :2]), r"\(4, 3\) and \(4, 2\)"),
        (lambda z: kd_loss(z, z, 0.0), "temperature=0.0"),
        (lambda z: kd_loss(z[:, :1], z[:, :1]), "no 2 classes"),
        (lambda z: decoupled_kd_loss(z, z, torch.zeros(3, dtype=torch.long)), r"integers of shape \(4,\)"),
        (lambda z: decoupled_kd_loss(z, z, torch.zeros(4)), "float32"),
        (lambda z: feature_loss([z], []), "1 features of the student and 0"),
        (lambda z: feature_loss([z], [z[:, :2]]), r"\(4, 3\) and \(4, 2\)"),
        (lambda z: attention_loss([z], [z]), "positions"),
        (lambda z: relational_loss(z, z[:2]), "4 samples of the student and 2"),
        (lambda z: contrastive_loss(z, z[:, :2]), r"\(4, 3\) and \(4, 2\)"),
        (lambda z: regression_loss(z, z, "l1"), "allowed: mse, relative_l2, h1"),
        (lambda z: regression_loss(z, z[:, :1]), r"\(4, 3\) and \(4, 1\)"),
        (lambda z: sobolev_loss(z, z, z), "requires_grad"),
    ],
)
def test_what_does_not_fit_is_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call(normal(0, 4, 3))
