"""What users of compression in Lightning asked for and did not get, one test a wish.

The numbers are those of the list of user reports this library was built from; wishes about logging are in
``test_monitor.py``, about the command line in ``test_cli.py``, about several processes in ``test_distributed.py``.
"""

import copy
import gc
import pickle
import warnings
from itertools import permutations

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.profilers import AdvancedProfiler
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lit import Lit, loader, sparsity, trainer
from torch import nn

import lightning_compress as lc
from lightning_compress.functional.masks import count_pruned
from lightning_compress.targets import find

N = 8 * 16 + 16 * 3


def pruning(**options):
    return lc.ScheduledPruning(
        **{"sparsity": 0.5, "begin": 1, "end": 6, "unit": "step", "every": 1, **options}
    )


def load(path):
    """As a stranger would: plain tensors only."""
    return torch.load(path, weights_only=True)


class BatchNormLit(Lit):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)))


def test_01_resume_keeps_masks_from_the_first_step_on(tmp_path):
    class FirstStep(pl.Callback):
        zeros = None

        def on_train_batch_end(self, trainer, pl_module, *args):
            self.zeros = self.zeros or [(t.weight == 0).clone() for t in find(pl_module)]

    whole = Lit()
    trainer(pruning(), max_epochs=4).fit(whole, loader())
    save = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    trainer(pruning(), save, max_epochs=4).fit(Lit(), loader())
    again, first = Lit(), FirstStep()
    trainer(pruning(), first, max_epochs=4).fit(again, loader(), ckpt_path=tmp_path / "epoch=1.ckpt")
    masked = load(tmp_path / "epoch=1.ckpt")["state_dict"]
    assert all((z | (masked[t.key] != 0)).all() for z, t in zip(first.zeros, find(again), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_02_checkpoint_keys_are_the_plain_modules(tmp_path):
    save = ModelCheckpoint(tmp_path, save_last=True, save_top_k=-1, every_n_train_steps=1)
    trainer(pruning(), save).fit(Lit(), loader())
    files = list(tmp_path.glob("*.ckpt"))
    assert len(files) == 17
    for file in files:
        assert list(load(file)["state_dict"]) == list(Lit().state_dict())


def test_03_weights_only_checkpoints_are_plain_sparse_files(tmp_path):
    trainer(pruning(), ModelCheckpoint(tmp_path, save_last=True, save_weights_only=True)).fit(Lit(), loader())
    assert sparsity(Lit.load_from_checkpoint(tmp_path / "last.ckpt")) == 0.5


def test_04_rewinding_is_off_by_default_and_uses_copies():
    lit = Lit()
    start = {k: v.clone() for k, v in lit.state_dict().items()}
    prune = pruning(rewind=True, end=6, every=2)

    class AfterUpdate(pl.Callback):
        checked = 0

        def on_train_batch_end(self, trainer, pl_module, *args):
            if prune.steps in (3, 5, 6):  # begin=1, every=2, end=6
                for t in find(pl_module):
                    kept = prune.masks[t.key]
                    assert torch.equal(t.weight[kept], start[t.key][kept])
                    assert prune._initial[t.key].data_ptr() != t.weight.data_ptr()
                    self.checked += 1

    check = AfterUpdate()
    trainer(prune, check).fit(lit, loader())
    assert check.checked == 6
    assert not pruning().rewind


def test_05_one_callback_fits_twice_validates_tests_and_predicts():
    prune, lit = pruning(), Lit()
    t = trainer(prune)
    t.fit(lit, loader(), loader())
    t.fit_loop.max_epochs = 4
    t.fit(lit, loader(), loader())
    t.validate(lit, loader())
    t.test(lit, loader())
    t.predict(lit, loader())
    trainer(prune).fit(lit, loader())
    copy.deepcopy(lit)
    assert sparsity(lit) == 0.5


def test_06_logged_sparsity_counts_each_weight_once(tmp_path):
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3))
    net[2].weight = net[0].weight
    lit, log = Lit(net), CSVLogger(tmp_path)
    t = trainer(pruning(sparsity=0.75), logger=log)
    t.fit(lit, loader())
    weights = [net[0].weight, net[3].weight]
    independent = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    assert (
        float(t.callback_metrics["compress/sparsity"]) == pytest.approx(independent) == pytest.approx(66 / 88)
    )


def test_07_sparsity_reaches_tensorboard(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = TensorBoardLogger(tmp_path)
    trainer(pruning(), logger=log, log_every_n_steps=2).fit(Lit(), loader())
    events = accumulator.EventAccumulator(log.log_dir)
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {
        "compress/sparsity",
        "compress/target_sparsity",
        "compress/sparsity/net.0",
        "compress/sparsity/net.2",
    } <= tags
    assert events.Scalars("compress/sparsity")[-1].value == 0.5


@pytest.mark.parametrize("schedule", ["constant", "cubic"])
def test_08_sparsity_is_absolute_and_does_not_compound(schedule):
    lit = Lit()
    trainer(lc.ScheduledPruning(sparsity=0.5, schedule=schedule), max_epochs=4).fit(lit, loader())
    assert sparsity(lit) == 0.5


def test_09_norms_biases_and_embeddings_are_left_alone_by_default():
    class Embedded(Lit):
        def __init__(self):
            super().__init__(
                nn.Sequential(
                    nn.Embedding(3, 6), nn.Flatten(), nn.Linear(48, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)
                )
            )

        def forward(self, x):
            return self.net((x > 0).long())

    lit = Embedded()
    trainer(pruning(sparsity=0.9)).fit(lit, loader())
    for name, parameter in lit.named_parameters():
        pruned = name in ("net.2.weight", "net.4.weight")
        assert bool((parameter == 0).any()) == pruned, name


def test_10_a_users_own_mask_buffer_does_no_harm(tmp_path):
    class Causal(Lit):
        def __init__(self):
            super().__init__()
            self.register_buffer("causal_mask", torch.ones(3, 3).tril())

    save = ModelCheckpoint(tmp_path, save_last=True)
    trainer(pruning(), save, max_epochs=1).fit(Causal(), loader())
    lit = Causal()
    trainer(pruning()).fit(lit, loader(), ckpt_path=tmp_path / "last.ckpt")
    assert sparsity(lit.net) == 0.5 and torch.equal(lit.causal_mask, torch.ones(3, 3).tril())


HOOKS = [
    "on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_before_backward",
    "on_after_backward", "on_before_optimizer_step", "on_train_batch_end", "on_validation_start",
    "on_validation_epoch_end", "on_validation_end", "on_train_epoch_end", "on_train_end", "on_fit_end",
]  # fmt: skip


@pytest.mark.parametrize("first", [True, False])
def test_11_the_module_copies_and_pickles_in_every_hook(first):
    seen = set()

    def check(hook):
        def run(self, trainer, pl_module, *args):
            seen.add(hook)
            twin = copy.deepcopy(pl_module)
            back = pickle.loads(pickle.dumps(pl_module))
            for other in (twin, back):
                assert all(
                    torch.equal(a, b) for a, b in zip(other.parameters(), pl_module.parameters(), strict=True)
                )
                assert (
                    type(other.on_load_checkpoint).__name__ == "method"
                    and other.on_load_checkpoint.__self__ is other
                )

        return run

    copier = type("Copier", (pl.Callback,), {h: check(h) for h in HOOKS})()
    callbacks = [copier, pruning()] if first else [pruning(), copier]
    trainer(*callbacks, max_epochs=1).fit(Lit(), loader(), loader(4))
    assert seen == set(HOOKS)


@pytest.mark.parametrize("averaging", ["ema", "swa"])
def test_12_averaged_weights_reach_the_target_or_the_order_is_refused(tmp_path, averaging):
    def average():
        return (
            EMAWeightAveraging(decay=0.9)
            if averaging == "ema"
            else StochasticWeightAveraging(1e-2, swa_epoch_start=1)
        )

    class Validated(pl.Callback):
        found = None

        def on_validation_end(self, trainer, pl_module):
            self.found = sparsity(pl_module)

    seen, save = Validated(), ModelCheckpoint(tmp_path, save_last=True)
    lit = BatchNormLit() if averaging == "swa" else Lit()
    trainer(average(), pruning(), seen, save, max_epochs=4).fit(lit, loader(), loader())
    assert sparsity(lit) == seen.found == 0.5
    saved = type(lit)()
    plain = averaging == "ema"  # the state of Lightning's own SWA callback holds a class in older torch
    saved.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=plain)["state_dict"])
    assert sparsity(saved) == 0.5
    with pytest.raises(MisconfigurationException, match=f"must come after {type(average()).__name__}"):
        trainer(pruning(), average()).fit(BatchNormLit(), loader(), loader())


def test_13_pruning_and_fake_quantization_in_one_fit():
    class FakeQuantized(nn.Linear):
        """A user's own quantization-aware layer: rounds to sixteenths with a straight-through gradient."""

        def quantized(self):
            return self.weight + ((self.weight * 16).round() / 16 - self.weight).detach()

        def forward(self, x):
            return nn.functional.linear(x, self.quantized(), self.bias)

    lit = Lit(nn.Sequential(FakeQuantized(8, 16), nn.ReLU(), FakeQuantized(16, 3)))
    trainer(pruning(sparsity=0.75)).fit(lit, loader())
    assert sparsity(lit) == 0.75
    for layer in (lit.net[0], lit.net[2]):
        on_grid = layer.quantized() * 16
        assert torch.equal(on_grid, on_grid.round()) and not on_grid[layer.weight == 0].any()


def test_14_one_configuration_serves_rebuilt_models():
    masks = []
    for _ in range(2):
        prune = pruning(include="net.0")
        trainer(prune).fit(Lit(), loader())
        masks.append(prune.masks)
    assert list(masks[0]) == ["net.0.weight"] and torch.equal(*(m["net.0.weight"] for m in masks))


def test_15_the_best_checkpoint_scores_what_it_scored(tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="val_loss")
    lit = Lit()
    t = trainer(pruning(end=20), best, max_epochs=3)
    t.fit(lit, loader(), loader())
    (again,) = trainer().validate(Lit(), loader(), ckpt_path=best.best_model_path)
    assert again["val_loss"] == pytest.approx(float(best.best_model_score), abs=1e-7)


def test_16_best_means_best_at_target(tmp_path):
    class Worse(Lit):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", float(self.current_epoch))  # the first epoch looks best

    best = ModelCheckpoint(tmp_path, monitor="compress/at_target/val_loss")
    lit = Worse()
    trainer(pruning(sparsity=0.8, end=20, gate="val_loss"), best, max_epochs=5).fit(lit, loader(), loader())
    assert sparsity(Worse.load_from_checkpoint(best.best_model_path)) == count_pruned(0.8, N) / N
    assert float(best.best_model_score) == 2.0
    with pytest.raises(
        MisconfigurationException, match=r"gate='loss' is not a logged metric; logged are: .*val_loss"
    ):
        trainer(pruning(gate="loss")).fit(Lit(), loader(), loader())


def test_26_structure_is_replayed_before_weights_load(tmp_path):
    fused = lc.compress(BatchNormLit().eval().net, [lc.FuseBatchNorm()]).model
    lit = BatchNormLit()
    lit.net = fused
    save = ModelCheckpoint(tmp_path, save_last=True)
    trainer(pruning(), save, max_epochs=1).fit(lit, loader())
    fresh = BatchNormLit()
    (result,) = trainer(pruning()).test(fresh, loader(), ckpt_path=tmp_path / "last.ckpt")
    (expected,) = trainer().test(lit, loader())
    assert result == expected and not any(isinstance(m, nn.BatchNorm1d) for m in fresh.modules())
    again, whole = BatchNormLit(), lit
    trainer(pruning()).fit(again, loader(), ckpt_path=tmp_path / "last.ckpt")
    assert again.state_dict().keys() == whole.state_dict().keys() and sparsity(again) == 0.5


def test_27_every_parameter_is_in_one_optimizer_group_at_train_start():
    class Count(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            owned = [id(p) for o in trainer.optimizers for g in o.param_groups for p in g["params"]]
            assert sorted(owned) == sorted(id(p) for p in pl_module.parameters() if p.requires_grad)

    trainer(pruning(), lc.BatchNormFusion(), Count()).fit(BatchNormLit(), loader())


def test_28_modules_built_in_configure_model_are_found():
    class Late(pl.LightningModule):
        def configure_model(self):
            if not hasattr(self, "net"):
                self.net = Lit().net

        forward = Lit.forward
        configure_optimizers = Lit.configure_optimizers
        lr = 1e-2

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

    lit = Late()
    trainer(pruning()).fit(lit, loader())
    assert sparsity(lit) == 0.5


def test_31_resume_restores_the_frozen_parts_too(tmp_path):
    class HalfFrozen(BatchNormLit):
        def __init__(self):
            super().__init__()
            self.net[0].requires_grad_(False)

        def on_train_epoch_start(self):
            self.net[1].eval()

    class Flags(pl.Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_end(self, trainer, pl_module, *args):
            modes = {n: m.training for n, m in pl_module.named_modules()}
            self.seen.append((modes, {n: p.requires_grad for n, p in pl_module.named_parameters()}))

    save, whole, resumed = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}"), Flags(), Flags()
    trainer(pruning(), save, whole).fit(HalfFrozen(), loader())
    trainer(pruning(), resumed).fit(HalfFrozen(), loader(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert resumed.seen == whole.seen[8:]


def test_36_copies_of_callbacks_hold_no_model_trainer_or_loader():
    class CopyAll(pl.Callback):
        sizes = ()

        def on_train_batch_end(self, trainer, pl_module, *args):
            kept = [c for c in trainer.callbacks if c is not self]
            self.sizes = [len(pickle.dumps(c)) for c in kept]
            for c in kept:
                twin = copy.deepcopy(c)
                bad = [
                    o
                    for o in gc.get_referents(twin.__dict__)
                    if isinstance(o, nn.Module | pl.Trainer | torch.optim.Optimizer)
                ]
                assert not bad and not {"log", "log_dict"} & twin.__dict__.keys()
                assert c.log.__self__ is pl_module  # Lightning lends these for a run

    class Big(BatchNormLit):
        def __init__(self):
            super().__init__()
            self.register_buffer("ballast", torch.zeros(100_000))

    check = CopyAll()
    others = lc.BatchNormFusion(), lc.CompressionMonitor(), lc.LowRankRegularization()
    trainer(*others, pruning(), lc.QuantizationAwareTraining(), check).fit(Big(), loader())
    assert max(check.sizes) < 20_000


def test_37_validating_averages_that_were_never_updated_is_said():
    class Later(EMAWeightAveraging):
        def should_update(self, step_idx=None, epoch_idx=None):
            return step_idx is not None and step_idx >= 12

    with pytest.warns(UserWarning, match="Later has not averaged anything yet"):
        trainer(Later(), pruning()).fit(Lit(), loader(), loader())


def test_38_no_buffers_so_averages_keep_the_masks(tmp_path):
    class Buffers(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            assert not list(pl_module.buffers())

    prune, save, lit = pruning(sparsity=0.7), ModelCheckpoint(tmp_path, save_last=True), Lit()
    trainer(EMAWeightAveraging(decay=0.9), prune, Buffers(), save).fit(lit, loader())
    saved = load(tmp_path / "last.ckpt")["state_dict"]
    for key, mask in prune.masks.items():
        assert torch.equal(saved[key] != 0, mask) and torch.equal(lit.get_parameter(key) != 0, mask)


def test_41_compiled_submodules_keep_their_plain_names(tmp_path):
    def lit(compiled):
        module = Lit()
        if compiled:
            module.net = torch.compile(module.net, backend="eager")
        return module

    a = pruning(include="net.0*")
    trainer(a, ModelCheckpoint(tmp_path, save_last=True), max_epochs=1).fit(lit(True), loader())
    b, plain = pruning(include="net.0*"), lit(False)
    checkpoint = load(tmp_path / "last.ckpt")
    state = checkpoint["callbacks"][a.state_key]
    assert list(state["masks"]) == ["net.0.weight"]
    b.load_state_dict(state)
    trainer(b).fit(plain, loader())
    assert sparsity(plain.net[0]) == 0.5 and sparsity(plain.net[2]) == 0


def test_43_every_checkpoint_loads_with_weights_only(tmp_path):
    save = ModelCheckpoint(tmp_path, save_last=True, save_top_k=-1, every_n_train_steps=2)
    callbacks = [pruning(rewind=True), lc.BatchNormFusion(), lc.CompressionMonitor(), save]
    trainer(*callbacks).fit(BatchNormLit(), loader(), loader())
    for file in tmp_path.glob("*.ckpt"):
        assert "callbacks" in load(file)
    trainer(*[pruning(rewind=True), lc.BatchNormFusion(), lc.CompressionMonitor()], max_epochs=3).fit(
        BatchNormLit(), loader(), ckpt_path=tmp_path / "last.ckpt"
    )


def test_44_several_optimizers_count_once():
    class Adversarial(Lit):
        def __init__(self):
            super().__init__()
            self.other = nn.Linear(3, 3)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(nn.functional.cross_entropy(self.other(self(batch[0])), batch[1]))
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.Adam(self.net.parameters()), torch.optim.Adam(self.other.parameters())]

    prune, lit = lc.ScheduledPruning(sparsity=0.5, begin=0.25, end=0.5, every=1), Adversarial()
    t = trainer(prune)
    t.fit(lit, loader())
    assert t.global_step == 32 and prune.steps == 16 and prune.span == (4, 8)
    assert sparsity(lit) == count_pruned(0.5, N + 9) / (N + 9)
    limited = lc.ScheduledPruning(sparsity=0.5, begin=0.5, end=1.0, every=1)
    trainer(limited, max_epochs=-1, max_steps=24).fit(Adversarial(), loader())
    assert limited.finished and limited.span == (6, 11)


def test_45_train_and_eval_flags_are_as_the_user_left_them():
    def modes(module):
        return {n: m.training for n, m in module.named_modules()}

    lit = BatchNormLit()
    lit.net[1].eval()
    before = modes(lit)
    t = trainer(pruning(), lc.BatchNormFusion(), lc.CompressionMonitor())
    t.fit(lit, loader(), loader())
    after_fit = modes(lit)
    t.validate(lit, loader(), verbose=False)
    plain = BatchNormLit()
    plain.net[1].eval()
    reference = trainer()
    reference.fit(plain, loader(), loader())
    assert after_fit == modes(plain)
    reference.validate(plain, loader(), verbose=False)
    assert modes(lit) == modes(plain) and before["net.1"] is False
    lc.finalize(lit)
    assert modes(lit) == modes(plain)


def test_46_validate_before_fit_leaks_no_inference_tensors():
    lit = BatchNormLit()
    t = trainer(pruning(), lc.BatchNormFusion(), lc.CompressionMonitor())
    t.validate(lit, loader(), verbose=False)
    t.fit(lit, loader(), loader())
    assert sparsity(lit) == count_pruned(0.5, N) / N


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_47_an_error_leaves_no_hooks_behind(error):
    class Broken(BatchNormLit):
        def training_step(self, batch, batch_idx):
            if self.global_step == 5:
                raise error("stop")
            return super().training_step(batch, batch_idx)

    lit = Broken()
    clean = BatchNormLit()
    t = trainer(pruning(), lc.BatchNormFusion(), lc.CompressionMonitor())
    with pytest.raises((error, SystemExit)):
        t.fit(lit, loader())
    assert not t.optimizers[0]._optimizer_step_post_hooks
    own = {k for k in lit.__dict__ if not k.startswith("_")} - {"prepare_data_per_node"}
    assert own == {k for k in clean.__dict__ if not k.startswith("_")} - {"prepare_data_per_node"}
    for module in lit.modules():
        hooks = [v for k, v in module.__dict__.items() if "hooks" in k and isinstance(v, dict)]
        assert not any(hooks)
    lit(torch.randn(2, 8))


def test_48_early_stopping_before_the_schedule_ends(tmp_path):
    def stop():
        return EarlyStopping("val_loss", patience=1, min_delta=100.0)

    with pytest.warns(
        UserWarning,
        match=r"stopped at optimizer step 16, before the pruning schedule ends at step 40.*protect_schedule",
    ):
        trainer(pruning(end=40), stop(), max_epochs=8).fit(Lit(), loader(), loader())
    lit = Lit()
    t = trainer(pruning(end=40, protect_schedule=True), stop(), max_epochs=8)
    t.fit(lit, loader(), loader())
    assert sparsity(lit) == 0.5 and t.global_step < 64


def test_49_the_order_of_callbacks_changes_nothing_or_is_refused():
    results = []
    for order in permutations(range(3)):
        callbacks = [pruning(), lc.BatchNormFusion(), lc.CompressionMonitor()]
        lit = BatchNormLit()
        trainer(*(callbacks[i] for i in order)).fit(lit, loader(), loader())
        fused = callbacks[1].fused
        results.append([*lit.state_dict().values(), *fused.state_dict().values()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_51_slashes_in_metric_names(tmp_path):
    best = ModelCheckpoint(
        tmp_path,
        monitor="compress/at_target/val_loss",
        filename="best-{epoch}",
        auto_insert_metric_name=False,
    )
    profiler = AdvancedProfiler(dirpath=tmp_path, filename="profile", dump_stats=True)
    t = trainer(
        pruning(gate="val_loss"), lc.BatchNormFusion(), lc.CompressionMonitor(), best, profiler=profiler
    )
    t.fit(BatchNormLit(), loader(), loader())
    assert [p.name for p in tmp_path.glob("*.ckpt")] == ["best-0.ckpt"] or list(tmp_path.glob("best-*.ckpt"))
    assert not [p for p in tmp_path.iterdir() if p.is_dir() and p.name.startswith("best")]
    assert list(tmp_path.glob("fit-profile*"))


def test_58_configured_callbacks_pickle():
    for callback in (
        pruning(schedule="linear", gate="val_loss"),
        pruning(schedule={0.5: 0.5, 1.0: 1.0}),
        lc.BatchNormFusion(),
        lc.CompressionMonitor(),
    ):
        twin = pickle.loads(pickle.dumps(callback))
        assert twin.state_key == callback.state_key and twin.state_dict() == callback.state_dict()


def test_no_warning_in_an_ordinary_fit():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="lightning_compress")
        warnings.filterwarnings("error", message=".*lightning_compress.*")
        trainer(pruning(), max_epochs=1).fit(Lit(), loader(), loader())
