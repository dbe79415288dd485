"""finalize: a plain copy with equal outputs, and nothing of the training left on it."""

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import codes
from lightning_compress.callbacks.fusion import BatchNormFusion
from lightning_compress.callbacks.pruning import ScheduledPruning
from lightning_compress.compress import compress
from lightning_compress.finalize import StandIn, finalize
from lightning_compress.fusion import FuseBatchNorm, fold_on_load
from lightning_compress.models import resnet20
from lightning_compress.pruning.sparsify import Prune
from lightning_compress.transform import applied


def outputs(model: nn.Module, x: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(x)
    return result


def equal(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return list(x) == list(y) and all(torch.equal(x[k], y[k]) for k in x)


def leftovers(module: nn.Module) -> list[Any]:
    """Hooks, and methods that lie on the instance instead of the class."""
    found = [
        h for m in module.modules() for k, v in vars(m).items() if k.endswith("_hooks") for h in v.values()
    ]
    return found + [
        k for m in module.modules() for k, v in vars(m).items() if callable(v) and hasattr(type(m), k)
    ]


def data() -> DataLoader[Any]:
    x = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, (x.mean((1, 2, 3)) > 0).long()), batch_size=4)


class Lit(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.save_hyperparameters()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout())
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def trainer(*callbacks: Callback) -> Trainer:
    options = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return Trainer(callbacks=list(callbacks), max_epochs=1, accelerator="cpu", **options)


def test_compressed_model() -> None:
    model, x = resnet20(), torch.randn(2, 3, 32, 32)
    model = compress(model, [Prune(0.5), FuseBatchNorm()]).model.train()
    small = finalize(model)
    assert model.training
    assert not any(m.training for m in small.modules())
    assert equal(small, model)
    want = outputs(model.eval(), x)
    assert torch.equal(outputs(small, x), want)
    assert [step.name for _, step in applied(small)] == ["Prune", "FuseBatchNorm"]
    kept = {key: code for key, _, _, code in codes.of(model)}
    assert {key: code for key, _, _, code in codes.of(small)} == kept
    assert len(kept) == 20
    assert torch.equal(outputs(pickle.loads(pickle.dumps(small)), x), want)
    assert torch.equal(outputs(copy.deepcopy(small), x), want)
    assert torch.equal(outputs(torch.export.export(small, (x,)).module(), x), want)
    memory = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert not memory & {p.untyped_storage().data_ptr() for p in small.parameters()}


def test_trained_lightning_module() -> None:
    lit, x = Lit(), torch.randn(4, 1, 8, 8)
    runner = trainer(EMAWeightAveraging(), ScheduledPruning(sparsity=0.5), BatchNormFusion())
    runner.fit(lit, data())
    assert lit._trainer is runner
    small = finalize(lit)
    assert lit._trainer is runner
    assert type(small) is Lit
    assert small._trainer is None
    assert small._fabric is None
    assert equal(small, lit)
    assert torch.equal(outputs(small, x), outputs(lit.eval(), x))
    assert leftovers(small) == []
    assert len(list(codes.of(small))) == 2
    assert torch.equal(outputs(pickle.loads(pickle.dumps(small)), x), outputs(small, x))
    assert torch.equal(outputs(torch.export.export(small, (x,)).module(), x), outputs(small, x))
    trainer().fit(small.train(), data())


def test_in_the_middle_of_a_fit() -> None:
    """All hooks and patches are in place then, on the module; none is on the copy."""

    class Snapshot(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                assert len(leftovers(pl_module)) >= 3
                self.copy = finalize(pl_module)
                assert pl_module.training
                assert equal(self.copy, pl_module)

    snapshot, lit = Snapshot(), Lit()
    trainer(ScheduledPruning(sparsity=0.5), BatchNormFusion(), snapshot).fit(lit, data())
    assert leftovers(snapshot.copy) == []
    assert snapshot.copy._trainer is None
    pickle.loads(pickle.dumps(snapshot.copy))


def test_only_hooks_of_this_library_go() -> None:
    model = compress(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).eval(), FuseBatchNorm()).model
    fold_on_load(model)
    model.register_forward_hook(functools.partial(double))
    small, x = finalize(model), torch.randn(4, 3)
    assert len(small._load_state_dict_pre_hooks) == 0
    assert len(model._load_state_dict_pre_hooks) == 1
    assert torch.equal(outputs(small, x), outputs(model, x))
    assert len(small._forward_hooks) == 1


def double(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return 2 * out


def test_methods_replaced_by_users_stay() -> None:
    model = nn.Linear(3, 2)
    model.forward = functools.partial(negative, model.weight)
    x = torch.randn(4, 3)
    assert torch.equal(outputs(finalize(model), x), outputs(model, x))


def negative(weight: Tensor, x: Tensor) -> Tensor:
    return -x @ weight.T


# -- stand-ins -----------------------------------------------------------------------------------------------------


class RoundedLinear(nn.Linear, StandIn):
    """Weights in steps of 1/8 on the way, as a fake-quantized layer has them; an object can change to and from it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.rounded(), self.bias)

    def rounded(self) -> Tensor:
        return (self.weight * 8).round() / 8

    def plain(self) -> nn.Module:
        self.weight.data.copy_(self.rounded())
        self.__class__ = nn.Linear
        return self


class RoundedConv(nn.Conv2d, StandIn):
    """The same for convolutions, but a new object takes over."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, (self.weight * 8).round() / 8, self.bias)

    def plain(self) -> nn.Module:
        layer = nn.Conv2d(self.in_channels, self.out_channels, self.kernel_size)
        layer.load_state_dict(self.state_dict())
        layer.weight.data.copy_((self.weight * 8).round() / 8)
        return layer


def test_stand_ins_become_plain_layers() -> None:
    model = nn.Sequential(RoundedConv(1, 4, 3), nn.Flatten(), nn.Linear(16, 4), nn.Dropout())
    model = compress(model, Prune(0.5, scope="layer")).model
    model[2].__class__ = RoundedLinear
    x = torch.randn(3, 1, 4, 4)
    small = finalize(model)
    assert [type(m) for m in small] == [nn.Conv2d, nn.Flatten, nn.Linear, nn.Dropout]
    assert [type(m) for m in model] == [RoundedConv, nn.Flatten, RoundedLinear, nn.Dropout]
    assert torch.equal(outputs(small, x), outputs(model.eval(), x))
    assert list(small.state_dict()) == list(model.state_dict())
    assert not any(m.training for m in small.modules())
    attached = {key: code for key, _, _, code in codes.of(small)}
    assert attached == {key: code for key, _, _, code in codes.of(model)}
    assert all(code.matches(small.get_parameter(key)) for key, code in attached.items())


@pytest.mark.parametrize("build", [lambda: RoundedLinear(3, 2), lambda: RoundedConv(3, 2, 1)])
def test_the_module_itself_may_be_a_stand_in(build: Any) -> None:
    model, x = build(), torch.randn(2, 3, 1, 1)
    x = x.flatten(1) if isinstance(model, nn.Linear) else x
    small = finalize(model)
    assert type(small) in (nn.Linear, nn.Conv2d)
    assert torch.equal(outputs(small, x), outputs(model, x))


def test_a_shared_stand_in_stays_shared() -> None:
    layer = RoundedConv(2, 2, 1)
    small = finalize(nn.Sequential(layer, nn.ReLU(), layer))
    assert small[0] is small[2]
    assert type(small[0]) is nn.Conv2d


def test_tied_parameters_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    small = finalize(model)
    assert small[0].weight is small[1].weight
    assert small[0].weight is not model[0].weight
