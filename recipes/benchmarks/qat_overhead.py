"""What quantization-aware training adds to a step: ResNet-20, batches of 64 images, all fits in turns.

    python recipes/benchmarks/qat_overhead.py

Weights and inputs of the 20 layers have 4 bits. Compared are this library's methods, the fake-quantize modules of
``torch.ao.quantization`` in front of the same layers (weights by channel, inputs by tensor; moving-average observers
or learned scales), and the layers of Brevitas, which takes part where it is installed. torchao 0.18 has no such
modules for convolutions. Steps are timed as ``turns.py`` says.

Measured with ``--steps 45`` (seed 0), one thread on a shared two-core x86-64 machine that was busy with other work, so
that milliseconds are twice those of a quiet one; the ratios are of neighbouring steps. torch 2.15.0, lightning 2.6.6,
brevitas 0.13.4:

    training step              median ms  ratio to plain  lower quartile  upper quartile
    -------------------------  ---------  --------------  --------------  --------------
    plain                          566.9               1               1               1
    lsq                            725.9           1.253             1.2           1.376
    fake_quant                     694.4           1.202           1.108           1.267
    fake_quant, mse                990.9            1.73           1.609           1.876
    pact                           735.6            1.27           1.174           1.362
    torch.ao, observed             761.7           1.342            1.28           1.471
    torch.ao, observed, fused      736.4           1.316           1.232           1.428
    torch.ao, learned              892.9           1.562           1.471           1.631
    brevitas                       1,025           1.778           1.682           1.855
"""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Callable

import torch
import turns
from lightning.pytorch import Callback
from torch import Tensor, nn

from lightning_compress.callbacks.quantization import QuantizationAwareTraining
from lightning_compress.models import resnet20

BITS = 4
Fit = Callable[[nn.Module], tuple[nn.Module, list[Callback]]]


def ours(method: str, calibrator: str | None = None) -> Fit:
    options = {} if calibrator is None else {"calibrator": calibrator}
    return lambda net: (
        net,
        [QuantizationAwareTraining(BITS, BITS, method, edge_layers_bits=None, **options)],
    )


class Rounded(nn.Module):
    """A layer behind the fake-quantize modules of another library, for its input and its weight."""

    def __init__(self, layer: nn.Module, of_input: nn.Module, of_weight: nn.Module) -> None:
        super().__init__()
        self.layer, self.of_input, self.of_weight = layer, of_input, of_weight

    def forward(self, x: Tensor) -> Tensor:
        x, weight = self.of_input(x), self.of_weight(self.layer.weight)
        if isinstance(self.layer, nn.Linear):
            return nn.functional.linear(x, weight, self.layer.bias)
        return self.layer._conv_forward(x, weight, self.layer.bias)


def with_torch(kind: str) -> Fit:
    """Modules of torch.ao in front of every layer: kind is the name of their class."""
    from torch.ao.quantization import (
        MovingAverageMinMaxObserver,
        MovingAveragePerChannelMinMaxObserver,
        fake_quantize,
    )
    from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize

    half = 2 ** (BITS - 1)
    of_input = {"quant_min": 0, "quant_max": 2 * half - 1, "dtype": torch.quint8}
    of_weight = {"quant_min": 1 - half, "quant_max": half - 1, "dtype": torch.qint8}
    of_weight |= {"qscheme": torch.per_channel_symmetric, "ch_axis": 0}
    observers = MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver

    def make(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
        if kind != "_LearnableFakeQuantize":
            module = getattr(fake_quantize, kind)
            return module(observers[0], **of_input), module(observers[1], **of_weight)
        learned = {"use_grad_scaling": True, "scale": 0.1}
        pair = (
            _LearnableFakeQuantize(observers[0], **of_input, **learned),
            _LearnableFakeQuantize(observers[1], channel_len=len(layer.weight), **of_weight, **learned),
        )
        for module in pair:
            module.enable_param_learning()
        return pair

    def install(net: nn.Module) -> tuple[nn.Module, list[Callback]]:
        for name, layer in list(net.named_modules()):
            if isinstance(layer, nn.Conv2d | nn.Linear):
                parent, _, child = name.rpartition(".")
                setattr(net.get_submodule(parent), child, Rounded(layer, *make(layer)))
        return net, []

    return install


def brevitas(net: nn.Module) -> tuple[nn.Module, list[Callback]]:
    """Its own layers: weights by the largest value of a channel, input scales learned after one step of statistics."""
    from brevitas import nn as bnn
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat, Uint8ActPerTensorFloat

    first = next(m for m in net.modules() if isinstance(m, nn.Conv2d))  # the images have negative values
    for name, layer in list(net.named_modules()):
        kind = {nn.Conv2d: bnn.QuantConv2d, nn.Linear: bnn.QuantLinear}.get(type(layer))
        if kind is None:
            continue
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding")
        names = names if isinstance(layer, nn.Conv2d) else ("in_features", "out_features")
        signed = layer is first
        made = kind(
            **{n: getattr(layer, n) for n in names},
            bias=layer.bias is not None,
            weight_quant=Int8WeightPerChannelFloat,
            weight_bit_width=BITS,
            input_quant=Int8ActPerTensorFloat if signed else Uint8ActPerTensorFloat,
            input_bit_width=BITS,
            input_collect_stats_steps=1,
        )
        parent, _, child = name.rpartition(".")
        setattr(net.get_submodule(parent), child, made)
    return net, []


FITS: dict[str, Fit] = {
    "plain": lambda net: (net, []),
    "lsq": ours("lsq"),
    "fake_quant": ours("fake_quant"),
    "fake_quant, mse": ours("fake_quant", "mse"),
    "pact": ours("pact"),
    "torch.ao, observed": with_torch("FakeQuantize"),
    "torch.ao, observed, fused": with_torch("FusedMovingAvgObsFakeQuantize"),
    "torch.ao, learned": with_torch("_LearnableFakeQuantize"),
    "brevitas": brevitas,
}


def main(argv: list[str] | None = None) -> None:
    parser = turns.options(__doc__, steps=60, batch_size=64)
    parser.add_argument("--only", nargs="*", default=list(FITS), choices=list(FITS), help="besides plain")
    options = turns.parse(parser, argv)
    warnings.filterwarnings("ignore", ".*deprecated.*")
    names = [name for name in FITS if name in ("plain", *options.only)]
    if "brevitas" in names and importlib.util.find_spec("brevitas") is None:
        names.remove("brevitas")
        print("brevitas is not installed, so it is left out: pip install brevitas")
    net = resnet20()
    times = turns.step_times(
        {name: FITS[name](copy.deepcopy(net)) for name in names},
        turns.images(options.batch_size),
        steps=options.steps,
        warmup=options.warmup,
        batch_size=options.batch_size,
        threads=options.threads,
    )
    print(turns.table(times))


if __name__ == "__main__":
    main()
