"""KeepCompressed in a Trainer: zeros, shared values and grids through steps, averages, checkpoints and kills."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from killed import Resumable, equal, kill, saving
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lit import Lit, loader, sparsity, trainer
from torch import nn

import lightning_compress as lc
from lightning_compress import codes
from lightning_compress.callbacks.keeping import KeepCompressed
from lightning_compress.functional.ties import Ties
from lightning_compress.sharing import ShareWeights
from lightning_compress.sharing.codes import Codebook

TESTS = Path(__file__).parent
BOOK = torch.tensor([-0.3, -0.1, 0.0, 0.12, 0.25])


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


def shared(zero: bool = True, net: nn.Module | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A network whose weights have five values; half of them, those of `Prune`, are 0."""
    net = plain() if net is None else net
    if zero:
        net = lc.compress(net, [lc.Prune(0.5, scope="layer")]).model
    for target in lc.find(net):
        book = BOOK if zero else BOOK[BOOK != 0]
        code = Codebook(book.to(dtype), None, zero)
        weight = code.project(target.weight.detach())
        if zero:
            weight[target.weight == 0] = 0
        target.weight.data.copy_(weight)
        codes.attach(target.module, target.param, code)
    return net


def mixed() -> nn.Module:
    """One weight with shared values, one on a grid, one with a mask."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))
    net = lc.compress(net, [lc.Prune(0.5, scope="layer"), lc.Quantize(bits=4, include="2")]).model
    code = Codebook(BOOK, None, True)
    weight = code.project(net[0].weight.detach())
    weight[net[0].weight == 0] = 0
    net[0].weight.data.copy_(weight)
    codes.attach(net[0], "weight", code)
    assert [code.kind for *_, code in codes.of(net)] == ["codebook", "affine", "mask"]
    return net


def labels(weight: torch.Tensor) -> np.ndarray:
    """Which entries are equal, by NumPy: an entry's label is the flat index of the first that equals it."""
    flat = weight.detach().numpy().reshape(-1)
    return np.array([int(np.argmax(flat == value)) for value in flat])


class Check(pl.Callback):
    """The weights after every batch; what was equal at first stays equal."""

    def __init__(self) -> None:
        self.first: dict[str, np.ndarray] = {}
        self.values: list[dict[str, np.ndarray]] = []

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.first = {t.key: labels(t.weight) for t in lc.find(module)}

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: object) -> None:
        self.values.append({t.key: t.weight.detach().numpy().copy() for t in lc.find(module)})

    def tied(self) -> bool:
        flat = [(key, value.reshape(-1)) for now in self.values for key, value in now.items()]
        return all(np.array_equal(value, value[self.first[key]]) for key, value in flat)


# -- tied entries, by NumPy --------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(-1, 4), st.floats(-1e3, 1e3, width=32), st.booleans()), max_size=40))
def test_ties_equal_a_loop(entries: list[tuple[int, float, bool]]) -> None:
    label = np.array([e[0] for e in entries], dtype=np.int64)
    x = np.array([e[1] for e in entries], dtype=np.float32)
    sign = np.array([1.0 if e[2] else -1.0 for e in entries])
    total, mean = np.zeros(len(x)), np.zeros(len(x))
    for k in set(label) - {-1}:
        members = label == k
        total[members] = sign[members] * (sign[members] * x[members].astype(np.float64)).sum()
        mean[members] = total[members] / members.sum()
    ties = Ties(torch.from_numpy(label), torch.from_numpy(sign))
    found = ties.mean(torch.from_numpy(x)), ties.sum(torch.from_numpy(x))
    assert np.allclose(found[0].numpy(), mean, rtol=1e-6, atol=1e-6)
    assert np.allclose(found[1].numpy(), total, rtol=1e-6, atol=1e-6)
    assert found[0].dtype == torch.float32 and len(ties) == len(set(label) - {-1})


@given(st.integers(1, 3000), st.floats(-(2.0**90), 2.0**90, width=32))
def test_equal_members_keep_their_bits(n: int, value: float) -> None:
    x = torch.full((n,), value)
    assert torch.equal(Ties(torch.zeros(n, dtype=torch.int64)).mean(x), x)


# -- shared values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["mean", "sum"])
def test_one_step_is_that_of_the_values(mode: str) -> None:
    """Against autograd through a table of values, on a model of one layer."""

    class SGD(Lit):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.5)

    net = shared(net=nn.Sequential(nn.Linear(8, 3, bias=False)))
    weight = net[0].weight.detach().clone()
    trainer(KeepCompressed(mode), max_steps=1, max_epochs=-1).fit(SGD(net), loader())

    values, index = weight.unique(return_inverse=True)
    values.requires_grad_()
    x, y = next(iter(loader()))
    nn.functional.cross_entropy(x @ values[index].T, y).backward()
    gradient = values.grad * (values != 0)
    if mode == "mean":
        gradient = gradient / torch.bincount(index.flatten())
    torch.testing.assert_close(net[0].weight.detach(), (values - 0.5 * gradient).detach()[index])
    assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "adamw-fused", "lbfgs", "rmsprop"])
def test_members_move_together_and_zeros_stay(optimizer: str, tmp_path: Path) -> None:
    class Other(Lit):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return {
                "adam": lambda: torch.optim.Adam(self.parameters(), lr=0.01),
                "sgd": lambda: torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2),
                "adamw-fused": lambda: torch.optim.AdamW(self.parameters(), lr=0.01, fused=True),
                "lbfgs": lambda: torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3),
                "rmsprop": lambda: torch.optim.RMSprop(self.parameters(), lr=1e-3),
            }[optimizer]()

    net, check = shared(), Check()
    before = {t.key: t.weight.detach().clone() for t in lc.find(net)}
    clip = 0.5 if optimizer == "sgd" else None
    lit = Other(net)
    trainer(KeepCompressed(), check, gradient_clip_val=clip).fit(lit, loader())
    assert check.tied() and len(check.values) == 16
    for target in lc.find(net):
        was, now = before[target.key], target.weight.detach()
        assert torch.equal(was == 0, now == 0) and len(now.unique()) <= 5
        assert not torch.signbit(now[now == 0]).any()
        assert (was != now).sum() == (was != 0).sum()  # every value has moved
        code = codes.read(target.module, target.param)
        assert isinstance(code, Codebook) and code.zero and code.matches(now)
    info = lc.save(net, tmp_path / "net.lcz")
    assert info.stale == {} and [t.kind for t in info.tensors if "weight" in t.name] == ["codebook"] * 2
    restored = lc.load(tmp_path / "net.lcz", into=plain())
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), restored.parameters(), strict=True))


def test_training_does_better_than_before() -> None:
    """Acceptance: as few values as before, the same zeros, and a lower loss on what it trains on."""

    def loss(net: nn.Module) -> float:
        x, y = loader().dataset.tensors
        return nn.functional.cross_entropy(net(x), y).item()

    net = shared()
    before, zeros = loss(net), sparsity(net)
    trainer(KeepCompressed(), max_epochs=10).fit(Lit(net), loader())
    assert loss(net) < before - 0.05 and sparsity(net) == zeros
    assert max(len(t.weight.unique()) for t in lc.find(net)) <= 5


def test_without_the_callback_the_values_part() -> None:
    net = shared()
    trainer().fit(Lit(net), loader())
    assert len(net[0].weight.unique()) > 60 and not codes.read(net[0], "weight").matches(net[0].weight)


def test_half_precision_codebooks_are_rounded_at_the_end(tmp_path: Path) -> None:
    net = shared(dtype=torch.float16)
    trainer(KeepCompressed()).fit(Lit(net), loader())
    values = net[0].weight.detach().unique()
    assert torch.equal(values, values.half().float()) and lc.save(net, tmp_path / "net.lcz").stale == {}


def test_weights_in_bfloat16() -> None:
    net = plain().to(torch.bfloat16)
    net = shared(zero=False, net=net, dtype=torch.bfloat16)
    trainer(KeepCompressed(), precision="bf16-true").fit(Lit(net, lr=0.1), loader())
    assert len(net[0].weight.unique()) <= 4 and not torch.equal(net[0].weight.unique(), BOOK[BOOK != 0])
    assert codes.read(net[0], "weight").matches(net[0].weight)


def test_complex_weights_share_values_in_both_planes() -> None:
    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 3, dtype=torch.complex64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x.to(torch.complex64) @ self.weight).abs()

    lc.register(Spectral, lc.Axes(1, 0))
    net = nn.Sequential(Spectral())
    code = Codebook(BOOK)
    net[0].weight.data.copy_(code.project(net[0].weight.detach()))
    codes.attach(net[0], "weight", code)
    first = labels(torch.view_as_real(net[0].weight.detach()))
    trainer(KeepCompressed()).fit(Lit(net), loader())
    now = torch.view_as_real(net[0].weight.detach())
    assert np.array_equal(labels(now), first) and len(now.unique()) == 5
    assert not torch.equal(now.unique(), BOOK)


@pytest.mark.parametrize(
    "options",
    [
        {"clusters": 6},
        {"clusters": 6, "scope": "global"},
        {"clusters": 6, "codebook_bits": 8},
        {"clusters": 6, "block": 2},
        {"strategy": "hash", "ratio": 0.25},
        {"strategy": "bloom", "clusters": 6},
        {"strategy": "adaptive", "ratio": 0.2},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
@pytest.mark.parametrize("mode", ["mean", "sum"])
def test_every_way_of_sharing(options: dict[str, Any], mode: str, tmp_path: Path) -> None:
    """Trained, stored through the code that is left, and as few values as before."""
    first = [lc.Prune(0.5, scope="layer")] if options.get("strategy") != "hash" else []
    wide = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3))
    net = lc.compress(wide, [*first, ShareWeights(**options)]).model
    before = {key: (module.weight.detach().clone(), code) for key, module, _, code in codes.of(net)}
    keep = KeepCompressed(mode)
    trainer(keep).fit(Lit(net), loader())
    assert before
    for key, (weight, code) in before.items():
        now = net.get_submodule(key.removesuffix(".weight")).weight.detach()
        assert not torch.equal(now, weight) and torch.equal(now[weight == 0], weight[weight == 0])
        assert len(now.abs().unique()) <= len(weight.abs().unique())
        assert type(codes.read(net.get_submodule(key.removesuffix(".weight")), "weight")) is type(code)
    info = lc.save(net, tmp_path / "net.lcz")
    assert info.stale == {} and {t.name: t.kind for t in info.tensors if t.name in before} == {
        key: code.kind for key, (_, code) in before.items()
    }


# -- masks and grids ---------------------------------------------------------------------------------------------


def test_masks_hold_and_the_rest_is_free(tmp_path: Path) -> None:
    net = lc.compress(plain(), [lc.Prune(0.6)]).model
    gone, before = net[0].weight == 0, net[0].weight.detach().clone()
    trainer(KeepCompressed()).fit(Lit(net), loader())
    assert torch.equal(net[0].weight == 0, gone) and len(net[0].weight.unique()) > 40
    assert (net[0].weight != before)[~gone].float().mean() > 0.5 and lc.save(
        net, tmp_path / "net.lcz"
    ).stale == {}


@pytest.mark.parametrize(
    "transform",
    [
        lc.Quantize(bits=4),
        lc.Quantize(bits=3, granularity=lc.PerTensor(), symmetric=False),
        lc.Quantize(format=lc.Log2()),
        lc.Quantize(format=lc.MiniFloat(2, 1)),
    ],
    ids=["affine", "asymmetric", "log2", "minifloat"],
)
def test_grids_stay_with_their_scales_and_integers_move(transform: lc.Transform, tmp_path: Path) -> None:
    net = lc.compress(plain(), [transform]).model
    before = {t.key: (t.weight.detach().clone(), codes.read(t.module, t.param)) for t in lc.find(net)}

    class OnGrid(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: object) -> None:
            for target in lc.find(module.net):
                assert before[target.key][1].matches(target.weight)

    trainer(KeepCompressed(hold_zeros=False), OnGrid()).fit(Lit(net), loader())
    for target in lc.find(net):
        weight, code = before[target.key]
        assert codes.read(target.module, target.param) == code and (target.weight != weight).any()
    assert lc.save(net, tmp_path / "net.lcz").stale == {}


def test_small_steps_add_up_as_straight_through_gradients_do() -> None:
    """Against a latent weight that is trained by hand."""

    class SGD(Lit):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.02)

    net = lc.compress(nn.Sequential(nn.Linear(8, 3, bias=False)), [lc.Quantize(bits=3)]).model
    code = codes.read(net[0], "weight")
    scale = code.scale.view(-1, 1)
    latent, ends = net[0].weight.detach().clone(), (code.qmin * scale, code.qmax * scale)
    first = latent.clone()
    for _ in range(2):
        for x, y in loader():
            shown = ((latent / scale).round().clamp(code.qmin, code.qmax) * scale).requires_grad_()
            nn.functional.cross_entropy(x @ shown.T, y).backward()
            latent = torch.minimum(torch.maximum(latent - 0.02 * shown.grad, ends[0]), ends[1])
    expected = (latent / scale).round().clamp(code.qmin, code.qmax) * scale
    trainer(KeepCompressed(hold_zeros=False)).fit(SGD(net), loader())
    torch.testing.assert_close(net[0].weight.detach(), expected, rtol=0, atol=1e-6)
    assert (expected - first).abs().max() > 0.01


def test_pruned_and_quantized_weights_keep_their_zeros() -> None:
    net = lc.compress(plain(), [lc.Prune(0.6), lc.Quantize(bits=4)]).model
    gone = [t.weight == 0 for t in lc.find(net)]
    trainer(KeepCompressed()).fit(Lit(net, lr=0.05), loader())
    assert all(bool((t.weight == 0)[g].all()) for t, g in zip(lc.find(net), gone, strict=True))
    free = lc.compress(plain(), [lc.Prune(0.6), lc.Quantize(bits=4)]).model
    trainer(KeepCompressed(hold_zeros=False)).fit(Lit(free, lr=0.05), loader())
    assert sparsity(free) < 0.5


# -- what happens around it --------------------------------------------------------------------------------------


def test_embeddings_and_biases_with_codes_are_kept() -> None:
    net = plain()
    net = lc.compress(net, [lc.Prune(0.5, include=["0", "0.bias"], scope="layer")]).model
    gone = net[0].bias == 0
    keep = KeepCompressed()
    trainer(keep).fit(Lit(net), loader())
    assert keep.kept == {"net.0.weight": "mask", "net.0.bias": "mask"}
    assert torch.equal(net[0].bias == 0, gone) and gone.any()


def test_steps_skipped_by_amp_leave_everything_as_it_is() -> None:
    class Overflow(Lit):
        def training_step(self, batch: object, batch_idx: int) -> torch.Tensor:
            return super().training_step(batch, batch_idx) * (float("inf") if batch_idx % 2 else 1.0)

    net, check = mixed(), Check()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    keep = KeepCompressed()
    trainer(keep, check, plugins=[MixedPrecision("16-mixed", "cpu", scaler)]).fit(Overflow(net), loader())
    assert keep.steps == 8
    for skipped in range(1, 16, 2):
        before, after = check.values[skipped - 1], check.values[skipped]
        assert all(np.array_equal(before[key], after[key]) for key in before)
    assert all(code.matches(layer.get_parameter(param)) for _, layer, param, code in codes.of(net))


def test_averages_are_kept_too(tmp_path: Path) -> None:
    class Validate(pl.Callback):
        seen = 0

        def on_validation_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            for target in lc.find(module):
                assert len(target.weight.unique()) <= 5
                self.seen += 1

    net, validate = shared(), Validate()
    save = ModelCheckpoint(tmp_path, save_last=True)
    average = EMAWeightAveraging(decay=0.9)
    lit = Lit(net)
    trainer(average, KeepCompressed(), validate, save).fit(lit, loader(), loader())
    assert validate.seen == 4
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)
    for weights in (stored["state_dict"], stored["current_model_state"]):
        assert len(weights["net.0.weight"].unique()) <= 5
    assert not torch.equal(
        stored["state_dict"]["net.0.weight"], stored["current_model_state"]["net.0.weight"]
    )
    assert torch.equal(net[0].weight.detach(), stored["state_dict"]["net.0.weight"])
    assert codes.read(net[0], "weight").matches(net[0].weight)


def test_order_with_averaging_is_checked() -> None:
    with pytest.raises(MisconfigurationException, match=r"KeepCompressed must come after EMAWeightAveraging"):
        trainer(KeepCompressed(), EMAWeightAveraging()).fit(Lit(shared()), loader())
    with pytest.raises(MisconfigurationException, match=r"averages of weights on a grid.*net\.2\.weight"):
        trainer(EMAWeightAveraging(), KeepCompressed()).fit(Lit(mixed()), loader())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            lc.ScheduledPruning(sparsity=0.8),
            r"KeepCompressed and ScheduledPruning both decide.*net\.0\.weight",
        ),
        (lc.QuantizationAwareTraining(8, 8), r"KeepCompressed and QuantizationAwareTraining both decide"),
        (lc.ScheduledRemoval(budget=("macs", 0.5)), r"and ScheduledRemoval.* in one fit"),
        (KeepCompressed(name="second"), r"KeepCompressed and KeepCompressed both decide"),
    ],
    ids=["pruning", "qat", "removal", "twice"],
)
def test_callbacks_that_decide_otherwise_are_refused(other: pl.Callback, message: str) -> None:
    lit = Lit(shared())
    lit.example_input_array = torch.zeros(1, 8)
    with pytest.raises(MisconfigurationException, match=message):
        trainer(other, KeepCompressed()).fit(lit, loader())


def test_pruning_other_layers_is_fine() -> None:
    net = shared()
    codes.remove(net[2], "weight")
    prune = lc.ScheduledPruning(sparsity=0.75, include="net.2", begin=1, end=6, unit="step", every=1)
    trainer(prune, KeepCompressed()).fit(Lit(net), loader())
    assert len(net[0].weight.unique()) <= 5 and (net[2].weight == 0).float().mean() == 0.75


def test_what_cannot_be_kept_is_an_error_or_a_warning() -> None:
    with pytest.raises(ValueError, match=r"mode='median' is unknown; allowed: mean, sum"):
        KeepCompressed("median")
    with pytest.raises(
        MisconfigurationException, match=r"found no compressed weight.*compress the model first"
    ):
        trainer(KeepCompressed()).fit(Lit(), loader())
    net = shared()
    net[0].weight.data[0, 0] += 1.0
    with pytest.warns(UserWarning, match=r"net\.0\.weight is not what its codebook code says"):
        trainer(KeepCompressed()).fit(Lit(net), loader())
    assert len(net[0].weight.unique()) > 60 and len(net[2].weight.unique()) <= 5

    class Frozen(Lit):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([self.net[0].weight], lr=0.1)

    net, keep = shared(), KeepCompressed()
    trainer(keep).fit(Frozen(net), loader())
    assert list(keep.kept) == ["net.0.weight"]
    net, keep = shared(), KeepCompressed(exclude="net.0")
    trainer(keep).fit(Lit(net), loader())
    assert list(keep.kept) == ["net.2.weight"] and len(net[0].weight.unique()) > 60


def test_an_interrupted_fit_leaves_codes_that_fit(tmp_path: Path) -> None:
    class Crash(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *args: object) -> None:
            if trainer.global_step == 5:
                raise RuntimeError("power cut")

    net = mixed()
    with pytest.raises(RuntimeError, match="power cut"):
        trainer(KeepCompressed(), Crash()).fit(Lit(net), loader())
    assert lc.save(net, tmp_path / "net.lcz").stale == {}
    trainer(KeepCompressed()).fit(Lit(net), loader())  # and it may go on
    assert lc.save(net, tmp_path / "net.lcz").stale == {}


def test_copies_and_pickles_hold_no_model() -> None:
    keep = KeepCompressed(include="net.*")
    trainer(keep).fit(Lit(mixed()), loader())
    for other in (copy.deepcopy(keep), pickle.loads(pickle.dumps(keep))):
        assert other.kept == keep.kept and not other._layers
        assert not any(isinstance(v, nn.Module) for v in vars(other).values())


# -- resume ------------------------------------------------------------------------------------------------------


def fit(
    folder: Path, *callbacks: pl.Callback, resume: bool = False, compressed: bool = True
) -> dict[str, object]:
    net = mixed()
    if not compressed:
        for _, layer, param, _ in list(codes.of(net)):
            codes.remove(layer, param)
        net = nn.Sequential(*(copy.deepcopy(layer) for layer in net))
    lit, keep = Lit(net, lr=0.03), KeepCompressed()
    t = trainer(keep, saving(folder), *callbacks, max_epochs=3)
    t.fit(lit, Resumable(loader(64)), ckpt_path=folder / "last.ckpt" if resume else None)
    kept = {
        name: (code.kind, code.arrays(layer.get_parameter(param)))
        for name, layer, param, code in codes.of(net)
    }
    return {"weights": dict(net.state_dict()), "optimizer": t.optimizers[0].state_dict(), "codes": kept}


@pytest.mark.parametrize("compressed", [True, False], ids=["compressed", "plain"])
def test_a_killed_fit_resumes_as_if_it_had_not_been_killed(tmp_path: Path, compressed: bool) -> None:
    """Bit for bit, also on a network that has no codes: the checkpoint says what is kept."""
    whole = fit(tmp_path / "whole")
    saved = kill("test_keeping", tmp_path / "cut", step=22)
    assert saved % 16
    stored = torch.load(tmp_path / "cut" / "last.ckpt", weights_only=True)
    assert set(stored["state_dict"]) == {f"net.{key}" for key in mixed().state_dict()}
    again = fit(tmp_path / "cut", resume=True, compressed=compressed)
    assert equal(whole, again) and len(whole["codes"]) == 3


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    trainer(KeepCompressed(), ModelCheckpoint(tmp_path, save_last=True)).fit(Lit(shared()), loader())
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)
    (state,) = (s for k, s in stored["callbacks"].items() if k.startswith("KeepCompressed"))
    state["kept"]["net.4.weight"] = state["kept"].pop("net.2.weight") | {"place": ["net.4", "weight"]}
    torch.save(stored, tmp_path / "forged.ckpt")
    with pytest.raises(MisconfigurationException, match=r"keeps net\.4\.weight.*Resume with the model"):
        trainer(KeepCompressed(), max_epochs=3).fit(
            Lit(shared()), loader(), ckpt_path=tmp_path / "forged.ckpt"
        )


RANKS = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import lightning.pytorch as pl
import torch
from lightning_compress import codes
from lightning_compress.callbacks.keeping import KeepCompressed
from lit import Lit, loader, trainer
from test_keeping import mixed


class Rank(pl.Callback):
    def on_train_end(self, t, module):
        kept = {{n: code.arrays(m.get_parameter(p)) for n, m, p, code in codes.of(module)}}
        torch.save({{"weights": module.state_dict(), "codes": kept}}, Path({folder!r}, f"rank{{t.global_rank}}.pt"))


lit = Lit(mixed())
t = trainer(KeepCompressed(), Rank(), strategy="ddp_fork", devices=2, max_epochs=2)
t.fit(lit, loader())
assert len(lit.net[0].weight.unique()) <= 5, "at home"
"""


def test_two_ranks_end_with_equal_weights_and_codes(tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(RANKS.format(tests=str(TESTS), folder=str(tmp_path)))
    done = subprocess.run(
        [sys.executable, "run.py"], cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    a, b = (torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1))
    assert equal(a, b) and not torch.equal(a["weights"]["net.0.weight"], mixed()[0].weight)
