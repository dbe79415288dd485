"""Distillation as a LightningModule: the sum it minimizes, the hidden teacher, the student's own steps, errors."""

import copy
import pickle
import warnings

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from killed import equal
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lit import Lit, loader, trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import lightning_compress as lc
from lightning_compress.distillation.losses import (
    attention_loss,
    decoupled_kd_loss,
    feature_loss,
    kd_loss,
    regression_loss,
    relational_loss,
    sobolev_loss,
)
from lightning_compress.distillation.module import Distillation
from lightning_compress.schedules import Schedule, linear


def mlp(width: int = 16, seed: int = 0, outputs: int = 3, inputs: int = 8) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, outputs))


def conv(width: int, seed: int = 0, stride: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, stride=stride),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 3),
    )


def batch(n: int = 6, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, *(shape or (8,))), torch.randint(0, 3, (n,))


def fit(module: pl.LightningModule, *callbacks: pl.Callback, data=None, **options) -> pl.Trainer:
    t = trainer(*callbacks, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        t.fit(module, loader() if data is None else data, options.get("val_dataloaders"))
    return t


# -- the sum -------------------------------------------------------------------------------------------------


def test_total_is_the_mix_of_both_losses():
    student, teacher = mlp(4), mlp(seed=1)
    x, y = batch()
    module = Distillation(student, teacher, temperature=3.0, alpha=0.7)
    expected = 0.7 * kd_loss(student(x), teacher(x), 3.0) + 0.3 * F.cross_entropy(student(x), y)
    for given in ((x, y), [x, y], {"x": x, "y": y}):
        assert torch.allclose(module.training_step(given, 0), expected)
    for given in (x, (x,), {"x": x}):  # no labels: the teacher alone
        assert torch.allclose(module.training_step(given, 0), kd_loss(student(x), teacher(x), 3.0))


@pytest.mark.parametrize("loss", ["mse", "relative_l2", "relational", "dkd"])
def test_losses_by_name(loss):
    student, teacher = mlp(4), mlp(seed=1)
    x, y = batch()
    s, t = student(x), teacher(x)
    expected = {
        "mse": regression_loss(s, t),
        "relative_l2": regression_loss(s, t, "relative_l2"),
        "relational": relational_loss(s, t),
        "dkd": decoupled_kd_loss(s, t, y, 2.0),
    }
    module = Distillation(student, teacher, loss, alpha=1.0, temperature=2.0)
    assert torch.allclose(module.training_step((x, y), 0), expected[loss])
    if loss == "dkd":  # without labels: of the class that the teacher chooses
        chosen = decoupled_kd_loss(s, t, t.argmax(1), 2.0)
        assert torch.allclose(module.training_step(x, 0), chosen)


def test_options_of_the_loss_and_of_the_task():
    student, teacher = mlp(4), mlp(seed=1)
    x, y = batch()
    options = {"w_tc": 0.0, "w_nc": 1.0}
    module = Distillation(
        student, teacher, "dkd", alpha=0.5, loss_options=options, task_loss=lambda z, y: z.sum()
    )
    expected = decoupled_kd_loss(student(x), teacher(x), y, 4.0, 0.0, 1.0) / 2 + student(x).sum() / 2
    assert torch.allclose(module.training_step((x, y), 0), expected)


def test_float_targets_mean_regression():
    student, teacher = mlp(4), mlp(seed=1)
    x, y = torch.randn(5, 8), torch.randn(5, 3)
    module = Distillation(student, teacher, "mse", alpha=0.25)
    expected = 0.25 * F.mse_loss(student(x), teacher(x)) + 0.75 * F.mse_loss(student(x), y)
    assert torch.allclose(module.training_step((x, y), 0), expected)


def by_hand(student_output, teacher_output, given):
    return (student_output - teacher_output).abs().max() + given[0].mean()


def test_a_function_as_loss_gets_outputs_and_batch():
    student, teacher = mlp(4), mlp(seed=1)
    x, y = batch()
    expected = (student(x) - teacher(x)).abs().max() + x.mean()
    for loss in (by_hand, f"{__name__}.by_hand"):
        module = Distillation(student, teacher, loss, alpha=1.0)
        assert torch.allclose(module.training_step((x, y), 0), expected)


def test_sobolev_sees_the_slopes_of_both():
    student, teacher = mlp(4).double(), mlp(seed=1).double()
    x = torch.randn(5, 8, dtype=torch.float64)
    module = Distillation(student, teacher, "sobolev", loss_options={"weight": 0.5})
    found = module.training_step(x, 0)
    leaf = x.clone().requires_grad_()
    assert torch.allclose(found, sobolev_loss(student(leaf), teacher(leaf), leaf, 0.5))
    found.backward()
    assert student[0].weight.grad.abs().max() > 0 and teacher[0].weight.grad is None
    assert not x.requires_grad


def test_outputs_with_logits_and_tuples():
    class Named(nn.Module):
        def __init__(self, net, wrap):
            super().__init__()
            self.net, self.wrap = net, wrap

        def forward(self, x):
            return self.wrap(self.net(x))

    x, y = batch()
    student, teacher = mlp(4), mlp(seed=1)
    expected = Distillation(student, teacher).training_step((x, y), 0)
    wraps = [lambda z: {"hidden": z - 1, "logits": z}, lambda z: (z, None)]
    for wrap in wraps:
        module = Distillation(Named(student, wrap), Named(teacher, wrap))
        assert torch.allclose(module.training_step((x, y), 0), expected)


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        ("constant", [1.0] * 4),
        ("linear", [0.0, 0.25, 0.5, 0.75]),
        (Schedule(linear, 1, 3, start=1.0, end=0.0), [1.0, 1.0, 0.5, 0.0]),
        ({0.0: 0.5, 0.5: 1.0}, [0.5, 0.5, 1.0, 1.0]),
    ],
)
def test_the_schedule_scales_the_distillation_part_over_optimizer_steps(schedule, shares):
    class Total(Distillation):
        def training_step(self, batch, batch_idx):
            total = super().training_step(batch, batch_idx)
            x, y = batch
            task = F.cross_entropy(self.student(x), y)
            taught = kd_loss(self.student(x), self.teacher(x))
            seen.append(((total - 0.1 * task) / (0.9 * taught)).item())
            return total

    seen: list[float] = []
    module = Total(mlp(4), mlp(seed=1), schedule=schedule)
    fit(module, max_epochs=1, accumulate_grad_batches=2)
    assert seen == pytest.approx([s for s in shares for _ in range(2)], abs=1e-5)


# -- teacher -------------------------------------------------------------------------------------------------


def test_the_teacher_is_no_part_of_the_module(tmp_path):
    """Acceptance 2, and behaviour 54: no gradient, statistics unchanged, in no checkpoint, optimizer or count."""
    student, teacher = conv(4), conv(8, seed=1)
    before = copy.deepcopy(teacher.state_dict())
    module = Distillation(student, teacher, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    assert {id(p) for p in module.parameters()} == {id(p) for p in student.parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*(num_workers|val_dataloader|many workers|LeafSpec).*")
        t = trainer(ModelCheckpoint(tmp_path, save_last=True), max_epochs=1)
        t.fit(module, loader(shape=(3, 8, 8)))
    assert equal(dict(teacher.state_dict()), dict(before))
    assert not any(m.training for m in teacher.modules()) and student.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    held = {id(p) for group in t.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in student.parameters()}
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert {key.partition(".")[0] for key in checkpoint["state_dict"]} == {"student"}
    assert not torch.equal(student[0].weight, conv(4)[0].weight)
    module.train()
    assert not teacher.training


def test_the_teacher_moves_and_is_cast_with_the_module():
    teacher = conv(8)
    module = Distillation(conv(4), teacher)
    module.double()
    assert teacher[0].weight.dtype == torch.float64 and module.teacher is teacher
    module.to("meta")
    assert {t.device.type for t in teacher.state_dict().values()} == {"meta"}


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed", "32-true"])
def test_precisions(precision):
    student, teacher = mlp(4), mlp(seed=1)
    module = Distillation(student, teacher, features={"0": "0"}, example_input=torch.zeros(1, 8))

    def cast(rows):
        x, y = torch.utils.data.default_collate(rows)
        return (x.to(dtype) if "true" in precision else x), y

    dtype = {"64-true": torch.float64, "bf16-true": torch.bfloat16}.get(precision, torch.float32)
    data = DataLoader(loader().dataset, 4, collate_fn=cast)
    t = fit(module, data=data, precision=precision, max_epochs=1)
    assert student[0].weight.dtype == teacher[0].weight.dtype == module.projections["0"].weight.dtype == dtype
    assert torch.isfinite(t.callback_metrics["compress/distill/kd_loss"])


def test_copies_and_pickles_have_a_teacher_of_their_own():
    module = Distillation(Lit(mlp(4)), mlp(seed=1))
    x, y = batch()
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.teacher is not module.teacher and other.student is not module.student
        assert torch.equal(other.training_step((x, y), 0), module.training_step((x, y), 0))
        other.double()
        assert module.teacher[0].weight.dtype == torch.float32


def test_the_same_training_without_the_class():
    """Ten steps by hand give the same weights, bit for bit."""
    student, teacher = mlp(4), mlp(seed=1)
    module = Distillation(copy.deepcopy(student), teacher, optimizer=lambda p: torch.optim.Adam(p, lr=0.01))
    fit(module, max_epochs=1)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
    for x, y in loader():
        optimizer.zero_grad()
        z = student(x)
        (0.9 * kd_loss(z, teacher(x)) + (1 - 0.9) * F.cross_entropy(z, y)).backward()
        optimizer.step()
    assert equal(dict(module.student.state_dict()), dict(student.state_dict()))


# -- a plain student in a Trainer ----------------------------------------------------------------------------


def test_what_is_logged(tmp_path):
    logger = CSVLogger(tmp_path)
    module = Distillation(mlp(4), mlp(seed=1))
    t = trainer(logger=logger, log_every_n_steps=1, max_epochs=1)
    t.fit(module, loader(), loader())
    x, y = loader().dataset.tensors
    same = (module.student(x).argmax(1) == module.teacher(x).argmax(1)).float().mean()
    assert t.callback_metrics["compress/distill/agreement"].item() == pytest.approx(same.item())
    assert t.callback_metrics["val_loss"].item() == pytest.approx(
        F.cross_entropy(module.student(x), y).item(), rel=1e-5
    )
    assert {"compress/distill/kd_loss", "compress/distill/task_loss"} <= set(t.logged_metrics)
    tested = t.test(module, loader(), verbose=False)[0]
    assert tested["compress/distill/agreement"] == pytest.approx(same.item()) and "test_loss" in tested
    answers = torch.cat(t.predict(module, loader()))
    assert torch.equal(answers, torch.cat([module.student(b[0]) for b in loader()]))


def test_without_validation_likeness_is_logged_in_training():
    module = Distillation(mlp(4), mlp(seed=1), "mse")
    t = fit(module, max_epochs=1)
    assert "compress/distill/relative_l2" in t.callback_metrics
    assert "compress/distill/agreement" not in t.callback_metrics


def test_a_scheduler_is_stepped_after_every_step():
    module = Distillation(
        mlp(4),
        mlp(seed=1),
        optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
        scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.5**step),
    )
    t = fit(module, max_steps=3)
    assert t.optimizers[0].param_groups[0]["lr"] == 0.125


def test_the_student_alone_loads_its_weights(tmp_path):
    module = Distillation(mlp(4), mlp(seed=1), features={"0": "0"}, example_input=torch.zeros(1, 8))
    fit(module, ModelCheckpoint(tmp_path, save_last=True), max_epochs=1)
    for given in (tmp_path / "last.ckpt", torch.load(tmp_path / "last.ckpt", weights_only=True)):
        alone = mlp(4, seed=5)
        alone.load_state_dict(Distillation.student_state_dict(given))
        assert equal(dict(alone.state_dict()), dict(module.student.state_dict()))
    compiled = {"student._orig_mod.0.weight": torch.ones(1)}
    assert list(Distillation.student_state_dict(compiled)) == ["0.weight"]
    with pytest.raises(ValueError, match=r"its keys are 0\.weight"):
        Distillation.student_state_dict({"0.weight": torch.ones(1)})


def test_hyperparameters_are_numbers_and_strings_and_load_again(tmp_path):
    module = Distillation(
        mlp(4), mlp(seed=1), by_hand, features={"0": "0"}, task_loss=F.mse_loss, alpha=0.6, schedule="cubic",
        example_input=torch.zeros(1, 8),
    )  # fmt: skip
    flat = [*module.hparams.items(), *module.hparams["features"].items()]
    assert all(isinstance(v, int | float | str) for k, v in flat if k != "features")
    module.loss = "kd"
    module.task_loss = F.cross_entropy
    fit(module, ModelCheckpoint(tmp_path, save_last=True), max_epochs=1)
    again = Distillation.load_from_checkpoint(
        tmp_path / "last.ckpt", student=mlp(4, seed=7), teacher=mlp(seed=1)
    )
    assert again.loss is by_hand and again.alpha == 0.6 and again.task_loss is F.mse_loss
    assert equal(dict(again.state_dict()), dict(module.state_dict()))  # the projection is made while loading
    assert "task_loss" not in Distillation(mlp(4), mlp(seed=1), task_loss=lambda z, y: z.sum()).hparams


# -- a LightningModule as student ----------------------------------------------------------------------------


class Student(Lit):
    """Its own metric, optimizer, scheduler, hooks and extra checkpoint entry; and it counts."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__(net or mlp(4))
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(3, average="micro")
        self.calls: list[str] = []

    def training_step(self, batch, batch_idx):
        self.calls.append("step")
        x, y = batch
        z = self(x * 2)  # what the student sees, the teacher must see
        loss = F.cross_entropy(z, y)
        self.accuracy(z, y)
        self.log("train_accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log_dict({"train_loss": loss, "doubled": 2 * loss})
        return {"loss": loss, "answers": z.detach()}

    def on_train_epoch_end(self):
        self.calls.append("epoch_end")
        self.log("seen", float(len(self.calls)))

    def on_train_start(self):
        self.calls.append("train_start")

    def setup(self, stage):
        self.calls.append("setup" if stage == "fit" else "other")

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.last = outputs["answers"]

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    def on_save_checkpoint(self, checkpoint):
        checkpoint["note"] = "mine"

    def train_dataloader(self):
        return loader()


def test_the_student_s_own_step_runs_once_per_batch_and_logs():
    """Acceptance 3."""
    student, teacher = Student(), mlp(seed=1)
    module = Distillation(student, teacher, alpha=0.5)
    t = trainer(max_epochs=2)
    t.fit(module, val_dataloaders=loader())  # its own training loader
    assert student.calls == ["setup", "train_start", *["step"] * 8, "epoch_end", *["step"] * 8, "epoch_end"]
    logged = set(t.callback_metrics)
    assert {
        "train_loss",
        "doubled",
        "train_accuracy_step",
        "train_accuracy_epoch",
        "seen",
        "val_loss",
    } <= logged
    assert {"compress/distill/kd_loss", "compress/distill/task_loss", "compress/distill/agreement"} <= logged
    assert t.callback_metrics["compress/distill/task_loss"] == t.callback_metrics["train_loss"]
    assert 0 <= t.callback_metrics["train_accuracy_epoch"] <= 1 and student.last.shape == (4, 3)
    assert t.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.25)


def test_the_total_of_a_lightning_student():
    student, teacher = Student(), mlp(seed=1)
    module = Distillation(student, teacher, alpha=0.5)
    x, y = batch()
    z = student.net(2 * x)
    expected = 0.5 * kd_loss(z, teacher(2 * x)) + 0.5 * F.cross_entropy(z, y)
    result = module.training_step((x, y), 0)
    assert torch.allclose(result["loss"], expected) and torch.equal(result["answers"], z)


def test_a_student_that_calls_only_its_network_or_several_times():
    class Inner(Lit):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1]) + 0 * self(batch[0] + 1).sum()

    class Never(Lit):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net[2](self.net[1](self.net[0](batch[0]))), batch[1])

    class Skips(Lit):
        def training_step(self, batch, batch_idx):
            return None

    x, y = batch()
    lit, teacher = Inner(mlp(4)), mlp(seed=1)
    both = [kd_loss(lit(a), teacher(a)) for a in (x, x + 1)]
    found = Distillation(lit, teacher, alpha=1.0).training_step((x, y), 0)
    assert torch.allclose(found, (both[0] + both[1]) / 2)
    with pytest.raises(MisconfigurationException, match=r"Never calls neither .* Call self\(x\)"):
        Distillation(Never(mlp(4)), teacher).training_step((x, y), 0)
    assert Distillation(Skips(mlp(4)), teacher).training_step((x, y), 0) is None


def test_best_of_a_lightning_student(tmp_path):
    """Acceptance 3: ``test("best")`` works, and the student's entry is in the checkpoint."""
    module = Distillation(Student(), mlp(seed=1))
    best = ModelCheckpoint(tmp_path, monitor="compress/distill/agreement", mode="max")
    t = trainer(best, max_epochs=2)
    t.fit(module, loader(), loader())
    assert "test_loss" in t.test(module, loader(), ckpt_path="best", verbose=False)[0]
    assert torch.load(best.best_model_path, weights_only=True)["note"] == "mine"
    alone = Student()
    alone.load_state_dict(Distillation.student_state_dict(best.best_model_path))
    assert t.validate(module, loader(), verbose=False)[0]["val_loss"] > 0


def test_its_optimizer_also_trains_the_projections():
    student = Student()
    module = Distillation(student, mlp(seed=1), features={"net.0": "0"}, example_input=torch.zeros(1, 8))
    start = module.projections["0"].weight.clone()
    t = fit(module, max_epochs=2)
    (group,) = t.optimizers[0].param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in module.parameters()}
    assert not torch.equal(start, module.projections["0"].weight)
    assert "projections" not in " ".join(student.state_dict())


def test_given_optimizers_replace_the_student_s():
    module = Distillation(Student(), mlp(seed=1), optimizer=lambda p: torch.optim.Adam(p, lr=0.3))
    assert isinstance(fit(module, max_epochs=1).optimizers[0], torch.optim.Adam)


# -- features ------------------------------------------------------------------------------------------------


def test_hints_beside_kd_are_projected_and_pooled():
    student, teacher = conv(4, stride=2), conv(6, seed=1)
    x, y = batch(5, 3, 8, 8)
    module = Distillation(
        student, teacher, alpha=0.5, features={"1": "1"}, feature_weight=3.0, example_input=x[:1]
    )
    p = module.projections["0"]
    assert p.weight.shape == (6, 4) and [n for n, _ in module.named_parameters()][-2:] == [
        "projections.0.weight",
        "projections.0.bias",
    ]
    student.eval()
    f_s = torch.einsum("oi,nihw->nohw", p.weight, student[:2](x)) + p.bias[:, None, None]
    f_t = F.avg_pool2d(teacher[:2](x), 2)
    hint = 3 * (f_s - f_t).square().mean()
    expected = 0.5 * (kd_loss(student(x), teacher(x)) + hint) + 0.5 * F.cross_entropy(student(x), y)
    assert torch.allclose(module.training_step((x, y), 0), expected, rtol=1e-5)


def test_losses_of_features():
    student, teacher = conv(4).eval(), conv(6, seed=1).eval()
    x, _ = batch(5, 3, 8, 8)
    f = [net[:2](x) for net in (student, teacher)]
    g = [net[:5](x) for net in (student, teacher)]
    names = {"1": "1", "4": "4"}
    relational = Distillation(student, teacher, "relational", features=names)
    assert torch.allclose(relational.training_step(x, 0), relational_loss(*f) + relational_loss(*g))
    attention = Distillation(student, teacher, "attention", features={"1": "1"}, feature_weight=2.0)
    assert torch.allclose(attention.training_step(x, 0), 2 * attention_loss([f[0]], [f[1]]))
    assert not attention.projections and not relational.projections
    feature = Distillation(student, teacher, "feature", features={"4": "4"}, example_input=x)
    projected = F.linear(g[0], feature.projections["0"].weight, feature.projections["0"].bias)
    assert torch.allclose(feature.training_step(x, 0), feature_loss([projected], [g[1]]))
    contrastive = Distillation(student, teacher, "contrastive", features={"1": "1"}, example_input=x)
    assert contrastive.projections["0"].weight.shape == (6, 4)
    assert torch.isfinite(contrastive.training_step(x, 0))


def test_tokens_and_sequences_of_channels():
    class Tokens(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.embed, self.head = nn.Linear(3, width), nn.Linear(width, 2)

        def forward(self, x):
            return self.head(self.embed(x).mean(1))

    x = torch.randn(4, 7, 3)
    module = Distillation(Tokens(4), Tokens(6), "feature", features={"embed": "embed"}, example_input=x)
    assert module.projections["0"].weight.shape == (6, 4)
    assert torch.isfinite(module.training_step(x, 0))
    sequence = [
        nn.Sequential(nn.Conv1d(3, w, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(7 * w, 2))
        for w in (4, 6)
    ]
    x = torch.randn(4, 3, 7)
    for layer in ("0", "1"):
        module = Distillation(*sequence, "feature", features={layer: layer}, example_input=x)
        assert module.projections["0"].weight.shape == (6, 4)
        assert torch.isfinite(module.training_step(x, 0))


def test_sizes_are_read_from_the_data_set_before_the_optimizer_is_made():
    """Without taking a batch from the loader, drawing random numbers, or touching BatchNorm or the mode."""
    student = conv(4)
    module = Distillation(student, conv(6, seed=1), features={"1": "1"})
    assert not module.projections
    data = loader(shape=(3, 8, 8))
    shuffled = DataLoader(data.dataset, 4, shuffle=True)
    orders = []

    class Seen(pl.Callback):
        def on_train_batch_start(self, t, module, batch, batch_idx):
            orders.append(batch[1])
            assert module.student[1].num_batches_tracked == batch_idx

    for net in (module, Distillation(conv(4), conv(6, seed=1))):
        pl.seed_everything(3, verbose=False)
        t = fit(net, Seen(), data=shuffled, max_epochs=1)
    assert equal(orders[:8], orders[8:])
    fit(module, data=shuffled, max_epochs=1)
    assert len(t.optimizers[0].param_groups[0]["params"]) == 6
    assert len(list(module.parameters())) == 8 and student.training


def test_sizes_that_cannot_be_read_ask_for_an_example():
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([batch(1, 3, 8, 8)])

    module = Distillation(conv(4), conv(6), features={"1": "1"})
    with pytest.raises(MisconfigurationException, match="example_input"):
        fit(module, data=DataLoader(Endless(), batch_size=None))
    with pytest.raises(ValueError, match=r"forward pass .* failed \(RuntimeError.*example_input"):
        Distillation(conv(4), conv(6), features={"1": "1"}, example_input=torch.zeros(1, 2, 8, 8))


def test_no_hook_is_left_behind():
    student, teacher = conv(4), conv(6, seed=1)
    module = Distillation(student, teacher, features={"1": "1"}, example_input=torch.zeros(1, 3, 8, 8))
    module.training_step(batch(2, 3, 8, 8), 0)
    with pytest.raises(RuntimeError):
        module.training_step(batch(2, 1, 8, 8), 0)
    for net in (module, teacher):
        for m in net.modules():
            assert not (m._forward_hooks or m._forward_pre_hooks or m._forward_hooks_with_kwargs)


def test_compiled_networks():
    """The prefix of ``torch.compile`` does not count in names, and what is inside is seen."""
    student, teacher = conv(4), conv(6, seed=1)
    x, y = batch(2, 3, 8, 8)
    options = {"features": {"1": "1"}, "example_input": x}
    student.eval()
    expected = Distillation(student, teacher, **options).training_step((x, y), 0)
    compiled = [torch.compile(net, backend="eager") for net in (student, teacher)]
    module = Distillation(*compiled, **options)
    assert torch.allclose(module.training_step((x, y), 0), expected, rtol=1e-4)
    found = Distillation.student_state_dict(module.state_dict())
    assert set(found) == set(student.state_dict())


def test_averaged_weights(tmp_path):
    """The average holds the projections too; sizes found too late for it are refused."""
    module = Distillation(mlp(4), mlp(seed=1), features={"0": "0"}, example_input=torch.zeros(1, 8))
    average = WeightAveraging(avg_fn=lambda mean, new, n: new)
    fit(module, average, ModelCheckpoint(tmp_path, save_last=True), max_epochs=2)
    keys = set(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    assert keys == set(module.state_dict()) and "projections.0.weight" in keys
    late = Distillation(mlp(4), mlp(seed=1), features={"0": "0"})
    with pytest.raises(MisconfigurationException, match=r"WeightAveraging .* example_input"):
        fit(late, WeightAveraging())


# -- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"loss": "kl"}, "loss='kl' is unknown; allowed: kd, dkd"),
        ({"loss": "feature"}, "loss='feature' compares layers"),
        ({"loss": "attention"}, "features="),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"alpha": 1.5}, "alpha=1.5"),
        ({"feature_weight": -1.0}, "feature_weight=-1.0"),
        ({"schedule": "slow"}, "schedule='slow' is unknown"),
        ({"features": {"0": "layer2"}}, "teacher .Sequential. has no layer 'layer2'; the nearest names are"),
        ({"features": {"9": "0"}}, "student .* has no layer '9'"),
        ({"loss_options": {"w_nc": 1.0}}, "w_nc; loss='kd' takes class_axis"),
        ({"loss": "dkd", "loss_options": {"p": 1.0}}, "takes w_tc, w_nc"),
    ],
)
def test_options_that_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        Distillation(mlp(4), mlp(seed=1), **options)


def test_the_nearest_names_are_the_nearest():
    with pytest.raises(ValueError, match=r"nearest names are layer3\.2\.conv2, layer3"):
        Distillation(lc.models.resnet20(), lc.models.resnet20(), features={"layer3.2.conv2d": "layer3"})


def test_layers_that_cannot_be_matched_are_named_with_their_shapes():
    student, teacher = conv(4), conv(6, seed=1)
    with pytest.raises(ValueError, match=r"'1' gives \(2, 4, 8, 8\) and teacher layer '5' \(2, 3\)"):
        Distillation(student, teacher, features={"1": "5"}, example_input=torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"'4'.*'4'.*positions"):
        module = Distillation(student, teacher, "attention", features={"4": "4"})
        module.training_step(torch.zeros(2, 3, 8, 8), 0)

    class Silent(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(8, 3), nn.Linear(8, 3)

        def forward(self, x):
            return self.used(x)

    with pytest.raises(ValueError, match=r"layers of the student gave no tensor .*: unused"):
        Distillation(Silent(), mlp(), features={"unused": "0"}, example_input=torch.zeros(1, 8))


def test_outputs_that_cannot_be_compared():
    x, y = batch()
    with pytest.raises(ValueError, match=r"\(6, 2\), the teacher's \(6, 3\).*output width"):
        Distillation(mlp(4, outputs=2), mlp(), "mse").training_step(x, 0)
    with pytest.raises(ValueError, match="student returned str"):

        class Words(nn.Linear):
            def forward(self, x):
                return "words"

        Distillation(Words(8, 3), mlp()).training_step(x, 0)
    with pytest.raises(ValueError, match="the batch has 3 parts"):
        Distillation(mlp(4), mlp()).training_step((x, y, y), 0)
    with pytest.raises(ValueError, match="mapping with image"):
        Distillation(mlp(4), mlp()).training_step({"image": x}, 0)
    with pytest.raises(ValueError, match=r"output has shape \(6, 3\), the target \(6,\)"):
        Distillation(mlp(4), mlp()).training_step((x, torch.zeros(6)), 0)


def test_a_teacher_that_overflows_names_the_batch():
    teacher = mlp(seed=1)
    teacher[2].bias.data[0] = float("nan")
    with pytest.raises(ValueError, match="batch 0 of epoch 0: 4 of 12 values of the teacher"):
        fit(Distillation(mlp(4), teacher))


def test_students_that_are_their_own_teacher():
    net = mlp()
    with pytest.raises(ValueError, match="the same module"):
        Distillation(net, net)
    with pytest.raises(ValueError, match=r"share 0.0.weight, 0.0.bias, 0.2.weight"):
        Distillation(nn.Sequential(net), net)


def test_lightning_students_that_cannot_be_used():
    class Manual(Lit):
        def __init__(self):
            super().__init__(mlp(4))
            self.automatic_optimization = False

    with pytest.raises(ValueError, match="Manual optimizes by hand"):
        Distillation(Manual(), mlp())
    with pytest.raises(ValueError, match="leave task_loss out"):
        Distillation(Lit(mlp(4)), mlp(), task_loss=F.cross_entropy)
    with pytest.raises(ValueError, match="leave scheduler= out"):
        Distillation(Lit(mlp(4)), mlp(), scheduler=lambda o: None)
    with pytest.raises(ValueError, match="no training_step"):
        Distillation(pl.LightningModule(), mlp())
    with pytest.raises(ValueError, match="compile its network"):
        Distillation(torch.compile(Lit(mlp(4)), backend="eager"), mlp())


def test_a_schedule_of_an_endless_training():
    module = Distillation(mlp(4), mlp(), schedule="linear")
    with pytest.raises(MisconfigurationException, match="max_steps or max_epochs"):
        fit(module, max_epochs=-1)


def test_a_student_that_makes_its_layers_late():
    class Late(Lit):
        def __init__(self):
            super().__init__(nn.Identity())

        def configure_model(self):
            if not isinstance(self.net, nn.Sequential):
                self.net = mlp(4)

    module = Distillation(Late(), mlp(seed=1), features={"net.0": "0"})
    t = fit(module, max_epochs=1)
    assert module.projections["0"].weight.shape == (16, 4)
    assert len(t.optimizers[0].param_groups[0]["params"]) == 6
