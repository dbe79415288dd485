"""RateDistortionQuantize: its sums against brute force, the rate that was asked for, what it leaves alone."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import lightning_compress as lc
from lightning_compress import codes
from lightning_compress.functional.rates import cheapest_codes, code_bits
from lightning_compress.functional.rounding import compensated_codes, conditional_variances
from lightning_compress.stats import Calibration, collect
from lightning_compress.stats.matrices import from_real, real_grams, real_matrices

QUANTIZE = lc.RateDistortionQuantize


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(24 * 16, 10),
    ).eval()


def correlated(seed: int = 1, n: int = 64) -> Tensor:
    torch.manual_seed(seed)
    return nn.functional.avg_pool2d(torch.randn(n, 3, 12, 12), 5, 1, 2) * 3


# Pure functions


@given(
    st.lists(st.floats(-6, 6), min_size=1, max_size=30),
    st.lists(st.floats(0, 9), min_size=11, max_size=11),
    st.floats(0, 1),
)
def test_cheapest_of_the_two_neighbours(values: list[float], prices: list[float], penalty: float) -> None:
    bits = torch.tensor(prices, dtype=torch.float64)
    found = cheapest_codes(torch.tensor(values, dtype=torch.float64), bits, penalty)
    for x, q in zip(values, found.tolist(), strict=True):
        nearest = min(max(round(x), -5), 5)
        lower = nearest - (nearest > 0) + (nearest < 0)
        costs = {k: (x - k) ** 2 + penalty * prices[k + 5] for k in (nearest, lower)}
        assert costs[int(q)] == pytest.approx(min(costs.values()), abs=1e-12)


def test_code_bits_are_a_distribution_and_follow_the_counts() -> None:
    q = torch.tensor([0] * 70 + [1] * 20 + [-1] * 10)
    bits = code_bits(q, 4)
    assert float((2.0**-bits).sum()) == pytest.approx(1)
    assert float(bits[4]) == pytest.approx(-math.log2(0.7), abs=0.01)
    assert float(bits[3]) > float(bits[5]) > float(bits[4])
    assert bool(bits.isfinite().all())


def test_conditional_variances_are_residuals_of_regression() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 5)) @ rng.normal(size=(5, 5))
    gram = x.T @ x
    order = np.argsort(-np.diag(gram))
    expected = []
    for position, j in enumerate(order):
        later = x[:, order[position + 1 :]]
        left = x[:, j] - (later @ np.linalg.lstsq(later, x[:, j], rcond=None)[0] if later.size else 0)
        expected.append(left @ left)
    found = conditional_variances(torch.from_numpy(gram), damp=0)
    assert found.numpy() == pytest.approx(np.array(expected), rel=1e-9)


def test_compensation_with_prices_and_no_penalty_is_compensation() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(6, 20), torch.randn(100, 20) @ torch.randn(20, 20)
    gram, scale = x.T @ x, torch.full((1, 1), 0.3)
    bits = torch.zeros(2 * 40 + 1)
    plain = compensated_codes(weight, gram, scale, None, -40, 40)
    priced = compensated_codes(weight, gram, scale, None, -40, 40, bits=bits, penalty=0.0)
    same = (plain == priced).all(1)  # rows that were not given back to nearest
    assert int(same.sum()) >= 5


def spectral() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    operator = lc.models.build("fno", n_modes=(4, 4), hidden_channels=6, n_layers=2).eval()
    return operator, torch.randn(12, 1, 8, 8)


def test_complex_weights_as_real_matrices() -> None:
    pytest.importorskip("neuralop")
    operator, x = spectral()
    target = next(t for t in lc.find(operator) if t.weight.is_complex())
    gram = collect(operator, [target], Calibration(data=x), ["gram"])[target.key].gram
    assert gram is not None
    error = torch.randn(target.weight.shape, dtype=torch.complex128)
    rows, grams = real_matrices(target, error), real_grams(target, gram)
    assert torch.equal(torch.view_as_complex(from_real(target, rows).contiguous()), error)
    modes = error.movedim((1, 0), (-2, -1)).flatten(0, -3)
    wanted = torch.einsum("moi,mij,moj->mo", modes, gram.flatten(0, -3), modes.conj()).real
    assert torch.allclose(torch.einsum("moi,mij,moj->mo", rows, grams, rows), wanted)


# The transform


@pytest.mark.parametrize("bits", [1.5, 3.0, 5.0])
@pytest.mark.parametrize("inputs", [True, False])
def test_the_archive_takes_the_bits_that_were_asked_for(bits: float, inputs: bool, tmp_path) -> None:
    model = net()
    result = lc.compress(model, [QUANTIZE(bits=bits)], data=[correlated()] if inputs else None)
    weights = [t.weight for t in lc.find(result.model)]
    info = lc.save(result.model, tmp_path / "net.lcz")
    stored = {t.name: t for t in info.tensors}
    total = sum(stored[t.key].stored_bytes for t in lc.find(result.model))
    assert 8 * total / sum(w.numel() for w in weights) == pytest.approx(bits, abs=0.12)
    assert {stored[t.key].kind for t in lc.find(result.model)} == {"affine"}
    assert not info.stale
    fresh = lc.load(tmp_path / "net.lcz", into=net(5))
    assert all(
        torch.equal(a, b)
        for a, b in zip(fresh.state_dict().values(), result.model.state_dict().values(), strict=True)
    )


def test_steps_follow_sensitivity_and_half_a_step_is_a_bit_more() -> None:
    model, x = net(), correlated()
    options = {"rounding": "nearest", "gradients": 64}
    found = {
        step: lc.compress(model, [QUANTIZE(step=step, **options)], data=[x]).model for step in (0.5, 0.25)
    }
    seen = collect(model, lc.find(model), Calibration(data=[x], samples=64), ["gradient"])
    steps = {t.key: float(codes.read(t.module, t.param).scale) for t in lc.find(found[0.5])}
    product = [steps[key] * math.sqrt(float(stats.gradient.mean())) for key, stats in seen.items()]
    assert product == pytest.approx([product[0]] * len(product), rel=1e-4)
    for t in lc.find(found[0.25]):
        assert float(codes.read(t.module, t.param).scale) == pytest.approx(steps[t.key] / 2, rel=1e-6)
    lengths = {step: _coded(made) for step, made in found.items()}
    assert lengths[0.25] - lengths[0.5] == pytest.approx(1, abs=0.1)


def _coded(model: nn.Module) -> float:
    from lightning_compress.functional.entropy import entropy_bits

    bits = total = 0.0
    for t in lc.find(model):
        q = codes.read(t.module, t.param).arrays(t.weight.detach())["codes"]
        bits, total = bits + entropy_bits(q.numpy()), total + q.numel()
    return bits / total


def _error(model: nn.Module, original: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((model(x) - original(x)).norm() / original(x).norm())


def test_compensation_and_sensitivity_pay_at_equal_bits() -> None:
    model, x, unseen = net(), correlated(), correlated(7)
    errors = {
        how: _error(lc.compress(model, [QUANTIZE(bits=2.5, **how_)], data=[x]).model, model, unseen)
        for how, how_ in {
            "both": {},
            "nearest": {"rounding": "nearest"},
            "plain": {"rounding": "nearest", "sensitivity": "none"},
        }.items()
    }
    assert errors["both"] < 0.8 * errors["nearest"] < 0.8 * errors["plain"] * 1.1


def test_white_noise_is_not_compensated_for() -> None:
    model = net()
    auto = lc.compress(model, [QUANTIZE(step=0.5)], example_input=torch.zeros(1, 3, 12, 12)).model
    nearest = lc.compress(
        model, [QUANTIZE(step=0.5, rounding="nearest")], example_input=torch.zeros(1, 3, 12, 12)
    ).model
    assert torch.equal(auto[0].weight, nearest[0].weight)


def test_a_penalty_makes_more_zeros_and_fewer_bits() -> None:
    model = net()
    plain, priced = (
        lc.compress(model, [QUANTIZE(step=0.8, penalty=penalty)]).model for penalty in (0.0, 0.15)
    )
    zeros = [sum(int((t.weight == 0).sum()) for t in lc.find(m)) for m in (plain, priced)]
    assert zeros[1] > zeros[0]
    assert _coded(priced) < _coded(plain)


def test_masks_stay() -> None:
    model = lc.compress(net(), [lc.Prune(0.6)]).model
    small = lc.compress(model, [QUANTIZE(bits=2)], data=[correlated()]).model
    for before, after in zip(lc.find(model), lc.find(small), strict=True):
        assert not bool(after.weight[before.weight == 0].any())


def test_complex_weights_are_rounded_with_less_error_than_to_nearest() -> None:
    pytest.importorskip("neuralop")
    operator, x = spectral()
    made = {
        how: lc.compress(operator, [QUANTIZE(bits=3, rounding=how)], data=[x]).model
        for how in ("compensated", "nearest")
    }
    assert _error(made["compensated"], operator, x) < 0.7 * _error(made["nearest"], operator, x)
    code = next(codes.read(t.module, t.param) for t in lc.find(made["compensated"]) if t.weight.is_complex())
    assert code.scale.numel() == 1


def test_biases_get_grids_of_their_own_unless_told_not_to() -> None:
    model, x = net(), correlated()
    made = lc.compress(model, [QUANTIZE(bits=3)], data=[x]).model
    assert codes.read(made[0], "bias") is not None
    assert codes.read(lc.compress(model, [QUANTIZE(bits=3, biases=False)], data=[x]).model[0], "bias") is None
    shifted = (made[0].bias - model[0].bias).abs().max()
    assert 0 < float(shifted) < float(model[0].bias.abs().max())


def test_a_second_grid_is_refused_and_a_first_time_through_again_changes_nothing() -> None:
    model = lc.compress(net(), [QUANTIZE(bits=3)]).model
    with pytest.raises(ValueError, match="second one would only add its error"):
        lc.compress(model, [QUANTIZE(bits=3)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 0}, "0 < bits < 16"),
        ({"bits": 16}, "0 < bits < 16"),
        ({"step": -1.0}, "step > 0"),
        ({"penalty": -0.1}, "allowed is >= 0"),
        ({"sensitivity": "hessian"}, "auto, fisher, none"),
        ({"rounding": "up"}, "auto, compensated, nearest"),
        ({"samples": 0}, "allowed is >= 1"),
    ],
)
def test_options_out_of_range(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QUANTIZE(**options)


def test_what_cannot_be_done_says_why() -> None:
    with pytest.raises(ValueError, match="looks at inputs"):
        lc.compress(net(), [QUANTIZE(rounding="compensated")])
    with pytest.raises(ValueError, match="more than 32767 steps"):
        lc.compress(net(), [QUANTIZE(step=1e-7)])
    with pytest.raises(lc.NothingChangedError, match="changed nothing"):
        lc.compress(nn.Sequential(nn.BatchNorm1d(4)), [QUANTIZE()])
