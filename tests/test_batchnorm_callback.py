"""BatchNormReestimation: the statistics are those of the inputs, at the right moment, everywhere, and can be undone."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lit import Lit, loader, trainer
from torch import nn

import lightning_compress as lc
from lightning_compress.callbacks.batchnorm import BatchNormReestimation


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, 3)
    )


def expected(lit, x):
    """Of the first layer, by hand."""
    seen = x.double() @ lit.net[0].weight.detach().double().T
    return seen.mean(0).float(), seen.var(0).float()


def statistics(lit):
    return lit.net[1].running_mean.clone(), lit.net[1].running_var.clone()


def close(a, b):
    return all(torch.allclose(x, y, atol=1e-5) for x, y in zip(a, b, strict=True))


def images():
    return loader().dataset.tensors[0]


class Watch(pl.Callback):
    """The statistics when validation starts."""

    def __init__(self):
        self.seen = []

    def on_validation_start(self, trainer, pl_module):
        self.seen.append(statistics(pl_module))


def test_the_last_validation_and_checkpoint_have_the_new_statistics(tmp_path):
    again, lit, watch = BatchNormReestimation(), Lit(net()), Watch()
    save = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=-1, filename="{epoch}", save_last=True)
    t = trainer(again, watch, save)
    t.fit(lit, loader(), loader())
    assert close(statistics(lit), expected(lit, images()))
    assert close(watch.seen[-1], statistics(lit)) and not close(watch.seen[0], expected(lit, images()))
    for file in ("last.ckpt", "epoch=1.ckpt"):
        weights = torch.load(tmp_path / file, weights_only=True)["state_dict"]
        assert torch.equal(weights["net.1.running_mean"], lit.net[1].running_mean), file
    first = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["state_dict"]
    assert not torch.equal(first["net.1.running_mean"], lit.net[1].running_mean)
    # what the file is scored by is what it holds
    scored = float(t.callback_metrics["val_loss"])
    assert trainer().validate(Lit(net()), loader(), ckpt_path=tmp_path / "epoch=1.ckpt", verbose=False) == [
        {"val_loss": pytest.approx(scored, abs=1e-6)}
    ]


@pytest.mark.parametrize(
    "options",
    [{"max_epochs": 2}, {"max_steps": 13, "max_epochs": -1}, {"max_epochs": 2, "limit_train_batches": 8}],
)
def test_without_validation_too(options, tmp_path):
    lit = Lit(net())
    save = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=0, save_last=True)
    trainer(BatchNormReestimation(), save, **options).fit(lit, loader())
    x = images()[: 20 if "max_steps" in options else 32]  # five batches of the second epoch
    assert close(statistics(lit), expected(lit, x))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(saved["net.1.running_var"], lit.net[1].running_var)


def test_only_so_many_samples():
    lit = Lit(net())
    trainer(BatchNormReestimation(samples=10)).fit(lit, loader())
    assert close(statistics(lit), expected(lit, images()[:10]))


def test_at_every_validation():
    lit, values = Lit(net()), []

    class Check(pl.Callback):
        def on_validation_start(self, trainer, pl_module):
            assert not trainer.sanity_checking or not values

        def on_validation_batch_start(self, trainer, pl_module, *args):
            if not trainer.sanity_checking:
                n = 4 * min(8, trainer.fit_loop.epoch_loop.batch_progress.current.ready)
                values.append(close(statistics(pl_module), expected(pl_module, images()[:n])))

    t = trainer(
        BatchNormReestimation(at="validation"), Check(), num_sanity_val_steps=2, val_check_interval=0.5
    )
    t.fit(lit, loader(), loader(8))
    assert values == [True] * 8


def test_early_stopping_is_measured_after_the_validation_that_stops():
    lit = Lit(net(), lr=0.0)
    stop = EarlyStopping("val_loss", patience=1)
    t = trainer(BatchNormReestimation(), stop, max_epochs=50)
    t.fit(lit, loader(), loader())
    assert t.current_epoch < 49 and close(statistics(lit), expected(lit, images()))


def test_restore_and_a_resumed_restore(tmp_path):
    plain, lit = Lit(net()), Lit(net())
    again = BatchNormReestimation()
    trainer().fit(plain, loader())
    t = trainer(again)
    torch.manual_seed(0)
    t.fit(lit, loader())
    t.save_checkpoint(tmp_path / "end.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), lit.parameters(), strict=True))
    assert not close(statistics(lit), statistics(plain))
    again.restore(lit)
    assert all(torch.equal(a, b) for a, b in zip(statistics(lit), statistics(plain), strict=True))
    later, fresh = BatchNormReestimation(), Lit(net())
    trainer(later).validate(fresh, loader(), ckpt_path=tmp_path / "end.ckpt", verbose=False)
    later.restore(fresh)
    assert close(statistics(fresh), statistics(plain)) and later.shifts == again.shifts
    with pytest.raises(ValueError, match="nothing to restore"):
        BatchNormReestimation().restore(lit)


def test_what_changed_is_logged(tmp_path):
    log, again, plain = CSVLogger(tmp_path), BatchNormReestimation(), Lit(net())
    trainer().fit(plain, loader())
    lit = Lit(net())
    trainer(again, logger=log).fit(lit, loader())
    (mean, var), (old_mean, old_var) = statistics(lit), statistics(plain)
    means = float(((mean - old_mean).abs() / old_var.sqrt()).mean())
    logs = float((var / old_var).log().abs().mean())
    assert again.shifts == {"net.1": (pytest.approx(means, rel=1e-4), pytest.approx(logs, rel=1e-4))}
    lines = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    assert "compress/batchnorm/mean_shift" in lines and "compress/batchnorm/var_shift" in lines


def test_pruned_weights_are_what_is_measured():
    lit = Lit(net())
    trainer(lc.ScheduledPruning(sparsity=0.8), BatchNormReestimation()).fit(lit, loader())
    assert close(statistics(lit), expected(lit, images()))
    with pytest.raises(MisconfigurationException, match="must come after ScheduledPruning"):
        trainer(BatchNormReestimation(), lc.ScheduledPruning(sparsity=0.8)).fit(Lit(net()), loader())


@pytest.mark.parametrize("val", [True, False])
def test_averaged_weights_are_what_is_measured(tmp_path, val):
    for averaging in (
        EMAWeightAveraging(decay=0.9),
        StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1),
    ):
        lit, watch = Lit(net()), Watch()
        data = [loader(), loader()] if val else [loader()]
        trainer(averaging, BatchNormReestimation(), watch, max_epochs=3).fit(lit, *data)
        assert close(statistics(lit), expected(lit, images())), type(averaging)
    with pytest.raises(MisconfigurationException, match="must come after EMAWeightAveraging"):
        trainer(BatchNormReestimation(), EMAWeightAveraging()).fit(Lit(net()), loader())


def test_checkpoints_of_averaged_weights_have_their_statistics(tmp_path):
    lit = Lit(net())
    save = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=-1, filename="{epoch}")
    trainer(EMAWeightAveraging(decay=0.9), BatchNormReestimation(), save).fit(lit, loader(), loader())
    weights = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["state_dict"]
    saved = Lit(net())
    saved.load_state_dict(weights)
    assert close(statistics(saved), expected(saved, images()))


class Parts(Lit):
    """``training_step`` calls the parts and not ``forward``, which there is none of."""

    forward = pl.LightningModule.forward

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


def test_a_module_without_forward_is_measured_by_the_part_that_is_called():
    lit = Parts(net())
    again = BatchNormReestimation()
    trainer(again).fit(lit, loader())
    assert close(statistics(lit), expected(lit, images())) and list(again.shifts) == ["net.1"]


def test_two_parts_need_a_name():
    class Two(Parts):
        def __init__(self):
            super().__init__(net())
            self.head = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.head(self.net(batch[0])), batch[1])

    lit = Two()
    with pytest.warns(UserWarning, match=r"calls net, head one by one: say which with attribute="):
        trainer(BatchNormReestimation()).fit(lit, loader())
    lit = Two()
    trainer(BatchNormReestimation(attribute="net")).fit(lit, loader())
    assert close(statistics(lit), expected(lit, images()))


def test_inputs_by_name_and_several_inputs():
    class Named(Lit):
        def forward(self, x, *, scale, shift=0.0):
            return self.net(x * scale + shift)

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0], scale=2.0, shift=batch[0] + 1), batch[1])

    lit = Named(net())
    trainer(BatchNormReestimation()).fit(lit, loader())
    assert close(statistics(lit), expected(lit, 3 * images() + 1))


def test_what_cannot_be_measured_is_refused_or_told():
    with pytest.raises(MisconfigurationException, match="Lit has no BatchNorm layer with running statistics"):
        trainer(BatchNormReestimation()).fit(Lit(), loader())
    with pytest.raises(ValueError, match=r"'nett' fits no layer"):
        trainer(BatchNormReestimation(include="nett")).fit(Lit(net()), loader())
    with pytest.raises(MisconfigurationException, match=r"attribute='x'.*no such submodule"):
        trainer(BatchNormReestimation(attribute="x")).fit(Lit(net()), loader())
    with pytest.raises(ValueError, match="at='start' is unknown; allowed: end, validation"):
        BatchNormReestimation(at="start")

    class Broken(Lit):
        def forward(self, x):
            return self.net(x) if self.training else x.nothing

    before, lit = Lit(net()), Broken(net())
    trainer().fit(before, loader())
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="leaves the statistics as they are. AttributeError"):
        trainer(BatchNormReestimation()).fit(lit, loader())
    assert close(statistics(lit), statistics(before))


def test_nothing_is_left_behind():
    lit, again = Lit(net()), BatchNormReestimation()
    keys, modes = list(lit.state_dict()), [m.training for m in lit.modules()]

    class Copy(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            copy.deepcopy(pl_module)
            assert pickle.loads(pickle.dumps(again))._inputs == {}

    trainer(again, Copy()).fit(lit, loader(), loader())
    assert list(lit.state_dict()) == keys and not any(m._forward_pre_hooks for m in lit.modules())
    assert [m.training for m in lit.modules()] == modes
    first = statistics(lit)
    trainer(again).fit(lit, loader())  # a second fit trains on and is measured again
    assert not close(first, statistics(lit)) and close(statistics(lit), expected(lit, images()))
    trainer(again, fast_dev_run=True).fit(Lit(net()), loader(), loader())


RANKS = """
import sys
sys.path.insert(0, {tests!r})
import lightning.pytorch as pl
import torch
from lightning_compress.callbacks.batchnorm import BatchNormReestimation
from lit import Lit, loader, trainer
from test_batchnorm_callback import close, expected, net, statistics


class Rank(pl.Callback):
    seen = []

    def on_train_batch_start(self, t, module, batch, batch_idx):
        self.seen.append(batch[0])

    def on_train_end(self, t, module):
        own = close(statistics(module), expected(module, torch.cat(self.seen)))
        assert own == (t.global_rank == 0), "each rank sees other samples, and rank zero measures for both"
        torch.save(statistics(module), f"rank{{t.global_rank}}.pt")


options = {{"strategy": "ddp_fork", "devices": 2, "max_epochs": 1}}
trainer(BatchNormReestimation(), Rank(), **options).fit(Lit(net()), loader())
"""


def test_rank_zero_measures_for_all(tmp_path):
    (tmp_path / "run.py").write_text(RANKS.format(tests=str(Path(__file__).parent)))
    done = subprocess.run(
        [sys.executable, "run.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    a, b = (torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_random_numbers_and_training_are_untouched():
    """Measuring before every validation changes nothing that training sees, dropout included."""
    plain, lit = Lit(net()), Lit(net())
    for module, extra in ((plain, ()), (lit, (BatchNormReestimation(at="validation"),))):
        torch.manual_seed(5)
        trainer(*extra, val_check_interval=0.25).fit(module, loader(), loader(8))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), lit.parameters(), strict=True))
