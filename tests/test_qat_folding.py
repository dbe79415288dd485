"""BatchNorm folded while training: against plain training, against an explicit fold, in resume and in files."""

import copy
import pickle

import lightning.pytorch as pl
import pytest
import torch
from killed import equal
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lit import Lit, loader, trainer
from torch import nn

import lightning_compress as lc
from lightning_compress.callbacks.quantization import QuantizationAwareTraining
from lightning_compress.quantization.folded import fold_of
from lightning_compress.quantization.quantizers import InputQuantizer
from lightning_compress.quantization.training import quantizers

METHODS = ("fake_quant", "lsq", "pact")
PAIRS = {"net.0": "net.1", "net.3": "net.4", "net.7": "net.8"}


def qat(method="lsq", bits=4, **options):
    return QuantizationAwareTraining(
        bits, options.pop("inputs", bits), method, edge_layers_bits=None, fold_batchnorm=True, **options
    )


def network():
    """A convolution without bias, a grouped one with bias, and a linear layer before their BatchNorms."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6, momentum=None), nn.ReLU(), nn.Flatten(),
        nn.Linear(96, 8), nn.BatchNorm1d(8, eps=1e-3), nn.ReLU(), nn.Linear(8, 3),
    )  # fmt: skip
    for norm in (net[1], net[4], net[8]):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return net


def batches():
    return loader(32, 8, (1, 8, 8))


class Check(pl.Callback):
    """Copies of the module after every training step."""

    def __init__(self):
        self.seen, self.gradients = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        own = {n: p.grad.clone() for n, p in pl_module.named_parameters() if "quantizer" not in n}
        self.gradients.append(own)

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.seen.append({k: v.clone() for k, v in pl_module.state_dict().items()})


def explicit(net):
    """The folded network by the definition: rounded weights, biases, no BatchNorm; and its own copy of the inputs."""
    layers = []
    for i, layer in enumerate(net):
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            continue
        made = layer
        if isinstance(layer, nn.Conv2d | nn.Linear):
            weight, bias = layer._parameters["weight"].detach(), layer.bias
            bias = torch.zeros(len(weight)) if bias is None else bias.detach()
            norm = net[i + 1] if f"net.{i}" in PAIRS else None
            if norm is not None:
                factor = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
                weight = weight * factor.reshape(-1, *[1] * (weight.dim() - 1))
                bias = norm.bias.detach() + (bias - norm.running_mean) * factor
            quantizer = layer._modules["weight_quantizer"]
            steps = quantizer.step.detach().reshape(-1, *[1] * (weight.dim() - 1))
            top = 2 ** (quantizer.bits - 1) - 1
            made = copy.deepcopy(layer)
            made.__class__ = type(layer)._plain_class
            inputs = made._modules.pop("input_quantizer", None)
            del made._modules["weight_quantizer"]
            vars(made).pop("_fold", None)
            made.weight = nn.Parameter((weight / steps).round().clamp(-top, top) * steps)
            made.bias = nn.Parameter(bias)
            layers += [inputs] if isinstance(inputs, nn.Module) else []
        layers.append(made)
    return nn.Sequential(*layers).eval()


def test_without_rounding_a_fit_is_that_of_the_plain_network_in_values_statistics_and_gradients():
    """Sixteen bits round little: then the corrected fold is BatchNorm itself, also in its gradients."""
    plain, folded = Lit(network(), 1e-3), Lit(network(), 1e-3)
    a, b = Check(), Check()
    trainer(a, max_epochs=1).fit(plain, batches())
    trainer(qat("fake_quant", 16, inputs=None, freeze_batchnorm=None), b, max_epochs=1).fit(folded, batches())
    assert fold_of(folded.net[0]) and fold_of(folded.net[0]) is fold_of(folded.net[1])
    assert a.gradients[0].keys() == b.gradients[0].keys() and list(a.seen[0]) == list(b.seen[0])
    for key, gradient in a.gradients[0].items():
        torch.testing.assert_close(b.gradients[0][key], gradient, rtol=2e-3, atol=2e-4)
    for key in a.seen[0]:
        if "running" in key or "tracked" in key:
            torch.testing.assert_close(b.seen[0][key], a.seen[0][key], rtol=1e-3, atol=1e-4)
    assert float(folded.net[1].weight.grad.abs().sum()) > 0 and int(folded.net[1].num_batches_tracked) == 4


@pytest.mark.parametrize("bits", [2, 4])
def test_statistics_are_bit_for_bit_those_of_batchnorm_on_the_unrounded_convolution(bits):
    lit = Lit(network())
    trainer(qat(bits=bits, inputs=None), max_epochs=1).fit(lit, batches())
    lit.train()
    x = torch.randn(8, 1, 8, 8)
    layer, norm = lit.net[0], lit.net[1]
    reference = nn.BatchNorm2d(4)
    reference.load_state_dict(norm.state_dict())
    lit.net[:2](x)
    reference(nn.functional.conv2d(x, layer._parameters["weight"]))
    assert equal(dict(reference.state_dict()), dict(norm.state_dict()))


def test_the_moving_phase_is_the_definition():
    lit = Lit(network())
    trainer(qat(bits=3, inputs=None), max_epochs=1).fit(lit, batches())
    lit.train()
    layer, norm, x = lit.net[3], lit.net[4], torch.randn(8, 4, 6, 6)
    w, step = layer._parameters["weight"].detach(), layer.weight_quantizer.step.detach()[:, None, None, None]
    run = (norm.running_var + norm.eps).sqrt()
    wide = w * (norm.weight / run).detach()[:, None, None, None]
    rounded = (wide / step).round().clamp(-3, 3) * step
    z = nn.functional.conv2d(x, w, layer.bias, groups=2)
    mean, batch = z.mean((0, 2, 3)), (z.var((0, 2, 3), correction=0) + norm.eps).sqrt()
    shift = norm.bias + norm.weight * (layer.bias - mean) / batch
    expected = (
        nn.functional.conv2d(x, rounded, groups=2) * (run / batch)[:, None, None] + shift[:, None, None]
    )
    torch.testing.assert_close(lit.net[3:5](x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("inputs", [None, 4])
def test_the_frozen_phase_is_an_explicit_fold_and_every_parameter_learns(inputs):
    lit, check = Lit(network()), Check()
    trainer(qat(inputs=inputs, begin=0.25, freeze_batchnorm=0.5), check, max_epochs=2).fit(lit, batches())
    frozen = [{k: v for k, v in s.items() if "running" in k} for s in check.seen[3:]]
    assert all(equal(frozen[0], later) for later in frozen)
    for gradients in check.gradients[-2:]:
        assert [n for n, g in gradients.items() if not g.any()] == []
    x = torch.randn(9, 1, 8, 8)
    lit.eval()
    torch.testing.assert_close(explicit(lit.net)(x), lit(x), rtol=1e-4, atol=1e-4)
    frozen_norms = lit.train()
    for name in PAIRS.values():
        frozen_norms.get_submodule(name).eval()
    assert torch.equal(lit(x), lit.eval()(x))  # frozen, training and eval mode are one


@pytest.mark.parametrize("method", METHODS)
def test_finalized_archived_and_fused_networks_are_the_module_in_eval_mode(tmp_path, method):
    lit = Lit(network())
    prune = lc.ScheduledPruning(sparsity=0.5, begin=1, end=6, unit="step", every=1)
    trainer(qat(method), prune).fit(lit, batches())
    keys = list(Lit(network()).state_dict())
    x, small = torch.randn(9, 1, 8, 8), lc.finalize(lit.eval())
    with torch.no_grad():
        assert torch.equal(small(x), lit(x)) and not torch.equal(small(x), Lit(network()).eval()(x))
        assert list(small.state_dict()) == list(lit.state_dict()) == keys and not quantizers(small)
        assert type(small.net[1]) is nn.BatchNorm2d and fold_of(small.net[1]) is fold_of(small.net[0]) is None
        for name in PAIRS:
            layer = small.get_submodule(name)
            code, kept = lc.codes.read(layer, "weight"), prune.masks[f"{name}.weight"]
            assert code.kind == "affine" and code.width == 4 and code.matches(layer.weight)
            assert not kept.all() and not layer.weight[~kept].any()
        lc.save(small.net, tmp_path / "net.lcz")
        fresh = lc.load(tmp_path / "net.lcz", into=network()).eval()
        assert torch.equal(fresh(x), lit(x))
        fused = lc.compress(small.net, [lc.FuseBatchNorm()], example_input=x).model
        assert not any(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in fused)
        outputs = fused(x), lit(x)
        inputs = [m for m in fused.modules() if isinstance(m, InputQuantizer)]
        assert len(inputs) == 4 and (outputs[0] - outputs[1]).abs().median() < 1e-5


@pytest.mark.parametrize("epoch", [0, 1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_resume_is_exact_and_checkpoints_are_plain(tmp_path, method, epoch):
    def callbacks():
        prune = lc.ScheduledPruning(sparsity=0.5, begin=0.1, end=0.9, every=3)
        return qat(method, begin=0.1, freeze_batchnorm=0.6), prune

    save = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    whole, again = Lit(network()), Lit(network())
    a = trainer(*callbacks(), save, max_epochs=4)
    a.fit(whole, batches(), batches())
    stored = torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)["state_dict"]
    Lit(network()).load_state_dict(stored)
    b = trainer(*callbacks(), max_epochs=4)
    b.fit(again, batches(), batches(), ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
    assert equal(dict(whole.state_dict()), dict(again.state_dict()))
    states = ({n: q.state() for n, q in quantizers(m).items()} for m in (whole, again))
    assert equal(*states) and equal(a.callback_metrics, b.callback_metrics)
    assert equal(a.optimizers[0].state_dict()["state"], b.optimizers[0].state_dict()["state"])


def test_modules_copy_and_pickle_with_their_folds():
    lit = Lit(network())
    trainer(qat(), max_epochs=1).fit(lit, batches())
    x = torch.randn(5, 1, 8, 8)
    for other in (copy.deepcopy(lit), pickle.loads(pickle.dumps(lit))):
        fold = fold_of(other.net[0])
        assert fold.norm is other.net[1] and fold.quantizer is other.net[0].weight_quantizer
        assert torch.equal(other.eval()(x), lit.eval()(x))
        assert [n for n, _ in other.named_parameters()] == [n for n, _ in lit.named_parameters()]


def test_what_cannot_be_folded_stays_and_is_named():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.ConvTranspose2d(1, 2, 2), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2, affine=False),
        nn.Flatten(), nn.Linear(98, 3),
    )  # fmt: skip
    lit = Lit(net)
    with pytest.warns(UserWarning, match="folds nothing") as met:
        trainer(qat(), max_epochs=1).fit(lit, batches())
    text = "".join(str(w.message) for w in met)
    assert "ConvTranspose2d is not a linear" in text and "affine=False" in text
    lit.eval()
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(lc.finalize(lit)(x), lit(x))
    with pytest.warns(UserWarning, match=r"behind net\.0, net\.3, net\.7 has seen no batch"):
        trainer(qat(), max_epochs=1).fit(Lit(network()), batches())
    with pytest.raises(ValueError, match="outputs=True would round between"):
        qat(outputs=True)

    class Replace(pl.Callback):
        def setup(self, trainer, pl_module, stage):
            pl_module.net[1] = nn.SyncBatchNorm(4)

    with pytest.raises(MisconfigurationException, match=r"behind net\.0 was replaced after setup"):
        trainer(qat(), Replace()).fit(Lit(network()), batches())
