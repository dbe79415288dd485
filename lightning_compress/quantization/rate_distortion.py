"""Quantization for the smallest file: one step for every weight, as coarse as the output bears, and entropy coding."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lightning_compress import codes
from lightning_compress.functional.entropy import encode, entropy_bits
from lightning_compress.functional.rates import cheapest_codes, code_bits
from lightning_compress.functional.rounding import compensated_codes, conditional_variances
from lightning_compress.plans import Plan
from lightning_compress.quantization.codes import Affine
from lightning_compress.quantization.writing import carry_out
from lightning_compress.stats import Calibration, Stats, collect
from lightning_compress.stats.matrices import (
    bias_of,
    collected,
    corrected,
    from_real,
    has_gram,
    real_grams,
    real_matrices,
)
from lightning_compress.stats.tracker import is_spectral
from lightning_compress.targets import Target, survey
from lightning_compress.transform import Transform

_SENSITIVITIES = ("auto", "fisher", "none")
_ROUNDINGS = ("auto", "compensated", "nearest")
_REACH = 32_767  # largest integer: the coders take 65,536 symbols
_PROBE = 1 << 16  # entries of a weight that are looked at to find the step
_SWEEPS = 1
_TRIES = 3  # roundings of all weights until the coded bits are what was asked for
_CLOSE = 0.01  # bits


@dataclass
class _Layer:
    """One weight on its way: its rows, what its inputs say, and how fine its grid must be beside the others'."""

    target: Target
    rows: Tensor
    mask: Tensor | None
    grams: Tensor | None = None
    mean: Tensor | None = None
    sensitivity: float = 1.0
    bias_sensitivity: float = 0.0
    codes: Tensor = field(default_factory=lambda: torch.zeros(0))

    @property
    def size(self) -> int:
        """Real numbers."""
        return self.rows.numel()


@dataclass(frozen=True)
class RateDistortionQuantize(Transform):
    r"""Integers on a grid without a width, for an entropy coder: few bits where the output does not notice.

    ``w^ = s_l q`` with any integer q and one step for each weight tensor, ``s_l = s / sqrt(F_l d_l / G_l)``: F_l is the
    mean Fisher information of its entries, G_l the mean square of its inputs, and d_l the geometric mean of what of
    each input the inputs rounded after it cannot make up for. With these steps the last bit spent on every layer buys
    the same. One number sets s: the coded bits per weight, or the step. Biases are rounded on grids of their own.

    The size is in the archive: ``save`` codes the integers, ``bits`` of them each on average.

    Args:
        bits: coded bits per real number of the weights, in (0, 16); reached within some hundredths.
        step: instead of ``bits``: the step as a share of the root mean square of all weights, > 0; 1 makes some 2 bits,
            every halving one more.
        sensitivity: "fisher": gradients on calibration inputs say how much a layer matters; "none": one step for all
            layers; "auto": the first, if there are inputs.
        rounding: "compensated": errors of one weight are made up for by others of its output; "nearest"; "auto": the
            first, if there are inputs other than white noise, to which it would fit the weights.
        penalty: lambda >= 0 of ``(x - q)^2 + lambda bits(q)``, x in steps: more zeros for larger errors. It helps with
            nearest rounding below some 2 bits (0.05 to 0.1), and harms compensated rounding.
        biases: also round the biases beside the weights (needs sensitivities).
        samples: calibration inputs.
        gradients: inputs of which gradients are taken, one by one.
        seed: seed of drawn inputs, when no calibration is given.
        include: patterns of layer names to take.
        exclude: patterns of layer names to leave.

    Raises:
        ValueError: an option outside its range.

    Examples:
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> result = compress(net, [RateDistortionQuantize(bits=3)], example_input=torch.randn(8, 64))
        >>> result.model[0].weight.unique().numel() < 30
        True

    Source: Sullivan 1996 (uniform grids and entropy coding are within 0.25 bits of the rate-distortion bound at high
        rate); Frantar et al. 2022 (compensated rounding); Choi et al. 2017 (Fisher information in the distortion);
        Wiedemann et al. 2020, DeepCABAC (rate and distortion of weights).
    """

    bits: float = 3.0
    step: float | None = None
    sensitivity: str = "auto"
    rounding: str = "auto"
    penalty: float = 0.0
    biases: bool = True
    samples: int = 256
    gradients: int = 64
    seed: int = 0
    include: str | Sequence[str] = "*"
    exclude: str | Sequence[str] = ()

    stage: ClassVar[str] = "grid"
    refuses_after: ClassVar[Mapping[str, str]] = {
        "grid": "the weights lie on a grid already, and a second one would only add its error"
    }

    def __post_init__(self) -> None:
        for option, value, allowed in (
            ("sensitivity", self.sensitivity, _SENSITIVITIES),
            ("rounding", self.rounding, _ROUNDINGS),
        ):
            if value not in allowed:
                raise ValueError(f"{option}={value!r} is unknown; allowed: {', '.join(allowed)}.")
        if not 0 < self.bits < 16:
            raise ValueError(f"bits={self.bits}: allowed is 0 < bits < 16.")
        if self.step is not None and not 0 < self.step < math.inf:
            raise ValueError(f"step={self.step}: allowed is step > 0.")
        if self.penalty < 0:
            raise ValueError(f"penalty={self.penalty}: allowed is >= 0.")
        if min(self.samples, self.gradients) < 1:
            raise ValueError(f"samples={self.samples}, gradients={self.gradients}: allowed is >= 1.")

    def plan(self, model: nn.Module, data: Calibration | None = None) -> Plan:
        """Decide the integers of every weight; writes nothing.

        Args:
            model: any module.
            data: calibration inputs.

        Returns:
            Integers and step of every weight and bias.

        Raises:
            ValueError: inputs are needed and there are none.
        """
        found = survey(model, self.include, self.exclude)
        inputs = dataclasses.replace(data or Calibration(seed=self.seed), samples=self.samples)
        for option, value in (("sensitivity", self.sensitivity), ("rounding", self.rounding)):
            if value in ("fisher", "compensated") and not inputs.available:
                raise ValueError(
                    f"{option}={value!r} looks at inputs: give compress() data= or example_input=, or leave it 'auto'."
                )
        if not found.targets:
            return Plan({}, dict(found.skipped))
        layers = self._layers(model, found.targets, inputs)
        step, spent = self._round(layers)
        decided: dict[str, dict[str, Any]] = {}
        same = True
        for layer in layers:
            t, scale = layer.target, _scale(layer.sensitivity, step)
            decided[t.key] = _decision(t, t.param, from_real(t, layer.codes), scale)
            rebuilt = scale.double() * layer.codes
            same = same and torch.equal(rebuilt.float(), layer.rows.float())
            self._bias(layer, step, layer.rows - rebuilt, decided)
        described = [inputs.describe(model)] if inputs.available else []
        described.append(f"step={step:.6g} coded_bits={spent:.4f}")
        return Plan(decided, dict(found.skipped), identity=same, data=" ".join(described))

    def apply(self, model: nn.Module, plan: Plan) -> None:
        """Write weights and biases in place and attach the codes.

        Args:
            model: the model of the plan, or a fresh one.
            plan: what ``plan`` returned.

        Raises:
            ValueError: the model has no such layer, or of another shape, or a decision is malformed; nothing is written
                then.
        """
        carry_out(model, plan)

    # -- what the layers see -----------------------------------------------------------------------------------

    def _layers(self, model: nn.Module, targets: Sequence[Target], inputs: Calibration) -> list[_Layer]:
        layers = []
        for t in targets:
            mask = codes.current_mask(t)
            kept = None if mask is None else real_matrices(t, _planes(mask.cpu(), t.weight)) != 0
            layers.append(_Layer(t, real_matrices(t, t.weight.detach().cpu()), kept))
        if not inputs.available:
            return layers
        seen: dict[str, Stats] = {}
        if self.rounding == "compensated" or (self.rounding == "auto" and not inputs.is_noise(model)):
            able = [t for t in targets if has_gram(t) or (is_spectral(t) and t.axes.in_ is not None)]
            fields = {
                t.key: ["gram", *(["input_mean"] if has_gram(t) and bias_of(t) is not None else [])]
                for t in able
            }
            seen = collected(model, able, inputs, fields)
        felt: dict[str, Stats] = {}
        if self.sensitivity != "none":
            few = dataclasses.replace(inputs, samples=min(self.gradients, self.samples))
            felt = collect(model, targets, few, ["gradient", "bias_gradient"])
        for layer in layers:
            key, gained = layer.target.key, 1.0
            gram = seen[key].gram if key in seen else None
            if gram is not None:
                layer.grams, layer.mean = real_grams(layer.target, gram), seen[key].input_mean
                gained = _gained(layer.grams)
            gradient = felt[key].gradient if key in felt else None
            if gradient is not None:
                layer.sensitivity = float(gradient.double().mean()) * gained
                given = felt[key].bias_gradient
                layer.bias_sensitivity = 0.0 if given is None else float(given.double().mean())
        most = max(layer.sensitivity for layer in layers)
        for layer in layers:  # what the output does not feel at all still gets a grid
            layer.sensitivity = max(layer.sensitivity, 1e-8 * most) or 1.0
        return layers

    # -- rounding ----------------------------------------------------------------------------------------------

    def _round(self, layers: Sequence[_Layer]) -> tuple[float, float]:
        """Integers of all layers; returns the step at sensitivity 1 and the coded bits."""
        total = sum(layer.size for layer in layers)
        energy = sum(layer.sensitivity * float(layer.rows.square().sum()) for layer in layers)
        unit = math.sqrt(energy / total) or 1.0
        step = unit * (self.step if self.step is not None else 2.0 ** _solve(layers, unit, self.bits))
        for tried in range(1, _TRIES + 1):
            spent = 0
            for layer in tqdm(layers, desc="RateDistortionQuantize", leave=False, disable=None):
                layer.codes = self._codes(layer, step)
                low = int(layer.codes.min())
                spent += 8 * len(encode((layer.codes - low).to(torch.int32).numpy(), "adaptive")[1])
            excess = spent / total - self.bits
            if self.step is not None or abs(excess) < _CLOSE or tried == _TRIES:
                break
            step *= 2.0**excess
        return step, spent / total

    def _codes(self, layer: _Layer, step: float) -> Tensor:
        scale = _scale(layer.sensitivity, step)
        x = layer.rows / scale.double()
        if layer.mask is not None:
            x = x * layer.mask
        largest = float(x.abs().max())
        if not largest < _REACH / 2:
            raise ValueError(
                f"{layer.target.key}: the grid has more than {_REACH} steps on either side: ask for fewer bits or a "
                "larger step."
            )
        nearest, reach = x.round(), 2 * math.ceil(largest) + 16
        bits = code_bits(nearest, reach) if self.penalty else None
        if layer.grams is None:
            return nearest if bits is None else cheapest_codes(x, bits, self.penalty)
        made = [
            compensated_codes(
                layer.rows[i],
                layer.grams[i],
                scale,
                None,
                -reach,
                reach,
                mask=None if layer.mask is None else layer.mask[i],
                sweeps=0 if bits is not None else _SWEEPS,
                bits=bits,
                penalty=self.penalty,
            )
            for i in range(len(layer.rows))
        ]
        return torch.stack(made).double()

    def _bias(self, layer: _Layer, step: float, error: Tensor, decided: dict[str, dict[str, Any]]) -> None:
        """The bias: shifted by what rounding changes the mean output, and on a grid of its own."""
        t, bias = layer.target, bias_of(layer.target) if has_gram(layer.target) else None
        if bias is None:
            return
        value = bias.detach().cpu()
        if layer.mean is not None:
            value = corrected(t, bias, from_real(t, error), layer.mean)
        if self.biases and layer.bias_sensitivity:
            scale = _scale(layer.bias_sensitivity, step)
            q = (value.double() / scale.double().flatten()).round()
            if float(q.abs().max()) <= _REACH:
                key = f"{t.name}.bias" if t.name else "bias"
                decided[key] = _decision(t, "bias", q, scale)
                return
        if layer.mean is not None:
            decided[t.key]["bias"] = value


def _solve(layers: Sequence[_Layer], unit: float, bits: float) -> float:
    """log2 of the step at which nearest rounding needs so many bits, by order-0 entropy."""
    probes = [layer.rows.flatten()[:: max(1, layer.size // _PROBE)] for layer in layers]
    total = sum(layer.size for layer in layers)

    def spent(log: float) -> float:
        found = 0.0
        for layer, probe in zip(layers, probes, strict=True):
            q = (probe / _scale(layer.sensitivity, unit * 2.0**log).double()).round()
            found += entropy_bits(q.to(torch.int64).numpy()) * layer.size / len(probe)
        return found / total

    low, high = -16.0, 8.0
    for _ in range(16):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > bits else (low, middle)
    return high


def _gained(grams: Tensor) -> float:
    """Geometric mean of what compensation cannot make up for, as a share of the mean square of the inputs."""
    left = [conditional_variances(gram) for gram in grams]
    logs = torch.cat(left).log()
    power = grams.diagonal(dim1=1, dim2=2)
    power = power[power > 0]
    return float(logs.mean().exp() / power.mean()) if len(logs) else 1.0


def _scale(sensitivity: float, step: float) -> Tensor:
    return torch.tensor([[step / math.sqrt(sensitivity)]], dtype=torch.float32)


def _decision(target: Target, param: str, q: Tensor, scale: Tensor) -> dict[str, Any]:
    most = max(1, int(q.abs().max()))
    code = Affine((), 0, (2 * most).bit_length(), scale.flatten(), None, -most, most)
    return {
        "layer": target.name,
        "param": param,
        "kind": code.kind,
        "config": code.config(),
        "arrays": {"codes": q.to(code.dtype), "scale": code.scale},
    }


def _planes(mask: Tensor, weight: Tensor) -> Tensor:
    """A mask as numbers, the same for real and imaginary part."""
    return torch.complex(mask.float(), mask.float()) if weight.is_complex() else mask.float()
