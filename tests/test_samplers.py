"""Inputs without data: what each sampler draws, which one is chosen, and that nothing else changes."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lightning_compress as lc
from lightning_compress.stats import Calibration, match_batchnorm
from lightning_compress.stats.samplers import Sampler, choose_kind, synthesize, takes_coordinates
from lightning_compress.stats.synthesis import _Mismatch

LINEAR = nn.Linear(2, 1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normed(channels: int = 3) -> nn.Module:
    """Convolutions with BatchNorm statistics of inputs that are not standard normal."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(channels, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
    )
    smooth = nn.functional.avg_pool2d(torch.randn(256, channels, 18, 18), 5, 1, 2) * 4 + 1
    for norm in (net[1], net[4]):
        norm.momentum = None
    with torch.no_grad():
        for _ in range(2):
            net.train()(smooth)
    return net.eval()


def test_normal_has_the_moments_of_the_example_by_channel() -> None:
    example = torch.randn(64, 2, 8, 8, generator=generator()) * torch.tensor([0.5, 4.0]).view(1, 2, 1, 1) + 3
    x = synthesize(LINEAR, "normal", example)(512, generator(1))
    for channel in range(2):
        assert abs(float(x[:, channel].mean() - example[:, channel].mean())) < 0.1
        assert abs(float(x[:, channel].std() / example[:, channel].std()) - 1) < 0.02
    plain = synthesize(LINEAR, "normal", (2, 8, 8))(512)
    assert (
        plain.shape == (512, 2, 8, 8)
        and abs(float(plain.mean())) < 0.02
        and abs(float(plain.std()) - 1) < 0.02
    )


def test_uniform_fills_its_box_without_gaps() -> None:
    sampler = synthesize(LINEAR, "uniform", (2,), bounds=[(-1, 1), (0, 3)])
    x = sampler(1024)
    assert float(x[:, 0].min()) >= -1 and float(x[:, 1].max()) <= 3
    cells, _, _ = np.histogram2d(*x.numpy().T, bins=16, range=[(-1, 1), (0, 3)])
    assert np.all(cells == 4)  # a Sobol sequence puts as many points into every one of these boxes
    random, _, _ = np.histogram2d(*(torch.rand(1024, 2, generator=generator()).numpy().T), bins=16)
    assert random.min() == 0
    assert not torch.equal(sampler(64, generator(1)), sampler(64, generator(2)))
    images = synthesize(LINEAR, "uniform", (3, 4, 4), bounds=(0, 1))(200)
    assert images.shape == (200, 3, 4, 4) and float(images.min()) >= 0 and float(images.max()) <= 1
    assert synthesize(LINEAR, "uniform", (3, 4, 4)).describe() == "uniform on [-1, 1] seed=0"


def test_bounds_come_from_the_example_if_it_tells_any() -> None:
    points = torch.tensor([[0.0, 10.0], [2.0, 30.0], [1.0, 11.0]])
    assert synthesize(LINEAR, "uniform", points).name == "uniform (Sobol) on [0, 2] x [10, 30]"
    assert synthesize(LINEAR, "uniform", points[:1]).name == "uniform (Sobol) on [-1, 1] x [-1, 1]"
    for bad in ([(1, 0), (0, 1)], [(0, 1)] * 3, (2, 2)):
        with pytest.raises(ValueError, match="2 such pairs"):
            synthesize(LINEAR, "uniform", points, bounds=bad)


def test_fields_are_smooth_and_two_valued_where_the_example_is() -> None:
    x = synthesize(LINEAR, "grf", (1, 32, 32))(16)
    assert float((x[..., 1:] - x[..., :-1]).square().mean() / x.var()) < 0.5  # 2 in white noise
    mask = (torch.arange(64).view(1, 1, 8, 8) % 4 == 0).float() * 9 + 3
    assert set(synthesize(LINEAR, "grf", mask)(4).unique().tolist()) == {3.0, 12.0}


def test_statistics_loss_falls_and_the_model_stays() -> None:
    net = normed()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    random = torch.get_rng_state()
    sampler = synthesize(net, "bn_stats", (3, 18, 18), pool=32, steps=120, progress=False)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.equal(random, torch.get_rng_state()) and not net.training

    def loss(x: Tensor) -> float:
        with torch.no_grad(), _Mismatch(net) as match:
            return float(match.of(net, x))

    assert loss(sampler(24)) < 0.1 * loss(torch.randn(24, 3, 18, 18, generator=generator()))


def test_stock_is_shifted_flipped_and_partly_kept_back() -> None:
    net = normed(1)
    stock = match_batchnorm(net, torch.zeros(1, 1, 18, 18), 16, steps=3, progress=False)
    sampler = synthesize(net, "bn_stats", (1, 18, 18), pool=16, steps=3, progress=False)
    sums = {round(float(v), 3) for v in stock.double().sum((1, 2, 3))}  # neither changes the sum

    def drawn(of: Sampler, n: int) -> set[float]:
        return {round(float(v), 3) for v in of(n, generator(3)).double().sum((1, 2, 3))}

    train, held = drawn(sampler, 12), drawn(sampler.held_out(), 4)
    assert len(train) == 12 and len(held) == 4 and train | held == sums
    assert not any(torch.equal(a, b) for a in sampler(12) for b in stock)
    assert len(sampler(40)) == 40
    with pytest.raises(ValueError, match="BatchNorm"):
        synthesize(nn.Conv2d(3, 4, 3), "bn_stats", (3, 8, 8))
    with pytest.raises(ValueError, match="pool"):
        synthesize(net, "bn_stats", (1, 18, 18), pool=2)


def test_auto_chooses_and_says_why() -> None:
    pinn = lc.models.PINN(2, 1, (8, 8), fourier_features=4)
    auto = synthesize(pinn, "auto", torch.zeros(1, 2))
    assert auto.name.startswith("uniform (Sobol)") and "2 coordinates" in auto.reason
    assert choose_kind(normed(), torch.zeros(1, 3, 18, 18))[0] == "bn_stats+grf"
    assert choose_kind(lc.models.LeNet5(), torch.zeros(1, 1, 28, 28)) == (
        "grf",
        "images, which are smooth as random fields are",
    )
    assert choose_kind(lc.models.MLP(), torch.zeros(1, 784))[0] == "normal"
    field = nn.Sequential(nn.Conv2d(1, 2, 1))
    field.spectrum = nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))
    assert choose_kind(field, torch.zeros(1, 1, 8, 8))[0] == "grf"
    assert not takes_coordinates(nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4)), torch.zeros(1, 2))
    assert not takes_coordinates(pinn, torch.zeros(1, 2, dtype=torch.long))


def test_mixtures_have_equal_shares() -> None:
    mixed = synthesize(LINEAR, "uniform+normal", (1, 6, 6), bounds=(50, 51))
    x = mixed(11)
    assert [bool((sample > 20).all()) for sample in x] == [True] * 5 + [False] * 6
    assert mixed.name == "uniform on [50, 51] and normal"


def test_structure_and_types_of_the_example() -> None:
    example = {"x": torch.zeros(1, 3, dtype=torch.float64), "tokens": torch.tensor([[4, 9]])}
    drawn: Any = synthesize(LINEAR, "normal", example)(7)
    assert drawn["x"].shape == (7, 3) and drawn["x"].dtype == torch.float64
    assert set(drawn["tokens"].flatten().tolist()) <= {4, 9} and drawn["tokens"].shape == (7, 2)
    pair = synthesize(LINEAR, "normal", (torch.zeros(1, 3), torch.zeros(1, 2)))
    assert [t.shape[1] for t in pair(2)] == [3, 2]
    both = nn.Bilinear(3, 2, 1)
    calibration = Calibration(example_input=None, data=pair, samples=40)
    assert all(isinstance(batch, tuple) and len(batch) == 2 for batch in calibration.batches(both))
    assert calibration.describe(both) == "synthetic:normal n=40 seed=0"


def test_loaders_repeat_and_leave_the_global_state() -> None:
    sampler = synthesize(LINEAR, "normal", (3,), seed=4)
    loader = sampler.loader(5, 4)
    random = torch.get_rng_state()
    first, again = ([x for (x,) in loader] for _ in range(2))
    assert torch.equal(random, torch.get_rng_state())
    assert len(loader) == len(first) == 4 and all(map(torch.equal, first, again))
    assert len({x.sum().item() for x in first}) == 4
    longer = [x for (x,) in sampler.loader(5, 6)]
    assert all(map(torch.equal, first, longer))  # batch i is the same whatever the length
    other = [x for (x,) in sampler.held_out().loader(5, 4)]
    assert not any(torch.equal(a, b) for a in first for b in other)
    with pytest.raises(ValueError, match="batch_size=0"):
        sampler.loader(0, 1)


def test_functions_are_samplers_and_errors_say_what_is_allowed() -> None:
    def squares(n: int, source: torch.Generator) -> Tensor:
        return torch.rand(n, 2, generator=source) ** 2

    sampler = synthesize(LINEAR, squares, seed=9)
    assert sampler.describe() == "squares seed=9" and synthesize(LINEAR, sampler) is sampler
    assert torch.equal(sampler(3), squares(3, generator(9)))
    with pytest.raises(ValueError, match="normal, uniform, grf, bn_stats"):
        synthesize(LINEAR, "gauss", (2,))
    with pytest.raises(ValueError, match="example input"):
        synthesize(LINEAR, "normal")
    with pytest.raises(ValueError, match="those of 'bn_stats'"):
        synthesize(LINEAR, "normal", (2,), pool=8)
