"""Post-training quantization: weights onto their grid in place, quantizers in front of the layers' inputs."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_compress import codes
from lightning_compress.functional.groups import Granularity, PerChannel
from lightning_compress.plans import Plan
from lightning_compress.quantization import activations, assignment, rounding, sensitivity
from lightning_compress.quantization.equalize import equalize
from lightning_compress.quantization.grids import Format, Grid, format_of
from lightning_compress.quantization.quantizers import InputQuantizer
from lightning_compress.quantization.writing import carry_out, decided_value, other_changes
from lightning_compress.stats import Calibration, Stats
from lightning_compress.stats.matrices import bias_of, collected, corrected, has_gram
from lightning_compress.tables import reasons
from lightning_compress.targets import Target, survey
from lightning_compress.transform import Transform

_MODES = ("static", "dynamic")
_ROUNDINGS = ("nearest", "compensated")


@dataclass(frozen=True)
class Quantize(Transform):
    r"""Round weights, and if asked for activations, to few bits.

    ``w^ = s (clip(round(w / s) + z, qmin, qmax) - z)`` with a scale s per group of weights; the weights are replaced in
    place and keep how they can be stored (integers and scales) beside them. Activations are rounded where a layer takes
    them in. A model quantized like this is smaller, not faster: speed comes with ``export_onnx``.

    Args:
        bits: 1 to 16 for all weights; a mapping from layer name, pattern or kind (conv linear embedding attention ffn
            output spectral, "*") to bits; or "auto": measured, under ``budget``.
        activation_bits: 2 to 16 for the inputs of all layers, or a mapping; None leaves activations alone.
        mode: "static" (one scale, from calibration) or "dynamic" (the range of each batch).
        format: number format of the weights: "int", "log2", "e4m3", "e5m2", "e3m4", "e2m1", "fp16", "bf16", or a
            ``Log2`` or ``MiniFloat``. Activations are integers.
        symmetric: whether the zero point of the weights is 0.
        narrow: leave the most negative integer out, so that the grid is symmetric.
        granularity: which weights share a scale: ``PerTensor()``, ``PerChannel(axis=None)``, ``PerGroup(size)``;
            also "per_tensor", "per_channel", "per_group:SIZE".
        calibrator: rule for the scales: minmax percentile entropy sawb lsq mse.
        activation_calibrator: the same for activations (not sawb).
        percentile: for the calibrators of that name, in (50, 100].
        scale: "float", or "po2": scales of weights and activations are powers of two, so that float32 sums are exact
            and an integer runtime gives the same bits.
        rounding: "nearest", or "compensated": what rounding one weight does to the layer's output is made up for by the
            weights that are rounded after it (needs inputs; linear layers and convolutions).
        bias_correction: shift biases by what rounding changes the mean output (needs inputs and biases).
        equalize: first even out the ranges of neighbouring layers (needs an example input, and BatchNorm folded).
        outputs: also quantize what layers return, except where it only goes through ReLU, pooling or reshaping into
            one other quantized layer: an integer runtime then computes every convolution in integers.
        edge_bits: bits of weights and activations of the first and last executed layer; None: like the others.
        budget: for bits="auto": mean bits per weight.
        candidates: for bits="auto": numbers of bits to choose from.
        sensitivity: what "auto" measures: "output", "fisher", "weight", or "auto" (output, if there are inputs).
        samples: calibration inputs.
        seed: seed of drawn inputs, when no calibration is given.
        include: patterns of layer names to take.
        exclude: patterns of layer names to leave.

    Raises:
        ValueError: an option outside its range, or options that do not go together.

    Examples:
        >>> net = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> small = compress(net, [Quantize(bits=2)]).model
        >>> [len(small[i].weight[0].unique()) <= 3 for i in (0, 2)]
        [True, True]

    Source: Jacob et al. 2018 (integer grids); Krishnamoorthi 2018 (per channel); Nagel et al. 2019 (bias correction,
        equalization); Frantar et al. 2022 (compensated rounding); Cai et al. 2020 (bits by sensitivity).
    """

    bits: int | str | Mapping[str, int] = 8
    activation_bits: int | Mapping[str, int] | None = None
    mode: str = "static"
    format: Format = "int"
    symmetric: bool = True
    narrow: bool = True
    granularity: Granularity | str = PerChannel()
    calibrator: str = "mse"
    activation_calibrator: str = "percentile"
    percentile: float = 99.99
    scale: str = "float"
    rounding: str = "nearest"
    bias_correction: bool = False
    equalize: bool = False
    outputs: bool = False
    edge_bits: int | None = None
    budget: float | None = None
    candidates: Sequence[int] = (2, 3, 4, 6, 8)
    sensitivity: str = "auto"
    samples: int = 256
    seed: int = 0
    include: str | Sequence[str] = "*"
    exclude: str | Sequence[str] = ()

    structural: ClassVar[bool] = True  # as far as activations go: see structure()
    stage: ClassVar[str] = "grid"
    refuses_after: ClassVar[Mapping[str, str]] = {
        "grid": "the weights lie on a grid or share values already; give every layer its bits in one "
        "Quantize(bits={pattern: bits}), and shared values theirs by ShareWeights(codebook_bits=8); to quantize some "
        "layers and share the others, quantize first: ShareWeights leaves these alone"
    }

    def __post_init__(self) -> None:
        for option, value, allowed in (
            ("mode", self.mode, _MODES),
            ("rounding", self.rounding, _ROUNDINGS),
            ("sensitivity", self.sensitivity, sensitivity.MEASURES),
        ):
            if value not in allowed:
                raise ValueError(f"{option}={value!r} is unknown; allowed: {', '.join(allowed)}.")
        if isinstance(self.bits, str) and self.bits != "auto":
            raise ValueError(f"bits={self.bits!r}: allowed are 1 to 16, a mapping, or 'auto'.")
        if (self.bits == "auto") != (self.budget is not None):
            raise ValueError(
                f"bits={self.bits!r} and budget={self.budget}: bits='auto' needs budget= (mean bits per weight), "
                "and nothing else takes it."
            )
        widths = [*self._values(self.bits), *(self.candidates if self.bits == "auto" else ())]
        edge = [] if self.edge_bits is None else [self.edge_bits]
        for width in [*widths, *edge]:
            self.grid(width)
        for width in [*self._values(self.activation_bits), *(edge if self.activation_bits else [])]:
            if not 2 <= width <= 16:
                raise ValueError(f"activation_bits={width}: allowed is 2 <= activation_bits <= 16.")
        if self.activation_calibrator in activations.SYMMETRIC_ONLY:
            raise ValueError(f"activation_calibrator={self.activation_calibrator!r} is for weights only.")
        self.grid(8 if format_of(self.format) == "int" else 4, self.activation_calibrator)
        if self.rounding == "compensated" and format_of(self.format) != "int":
            raise ValueError(f"rounding='compensated' is for format='int', not {self.format!r}.")
        if self.outputs and (self.activation_bits is None or self.mode == "dynamic"):
            raise ValueError("outputs=True needs activation_bits and mode='static'.")
        if self.samples < 1:
            raise ValueError(f"samples={self.samples}: allowed is >= 1.")
        if not 50 < self.percentile <= 100:
            raise ValueError(f"percentile={self.percentile}: allowed is 50 < percentile <= 100.")

    @staticmethod
    def _values(bits: Any) -> list[int]:
        if bits is None or isinstance(bits, str):
            return []
        return list(bits.values()) if isinstance(bits, Mapping) else [bits]

    def grid(self, bits: int, calibrator: str | None = None) -> Grid:
        """How the grid of a weight with so many bits is chosen.

        Args:
            bits: 1 to 16.
            calibrator: another rule than the transform's.

        Returns:
            The rule.
        """
        return Grid(
            bits,
            self.format,
            self.symmetric,
            self.narrow,
            self.granularity,
            calibrator or self.calibrator,
            self.percentile,
            self.scale,
        )

    # -- plan ------------------------------------------------------------------------------------------------

    def plan(self, model: nn.Module, data: Calibration | None = None) -> Plan:
        """Decide the grid of every weight and activation; writes nothing.

        Args:
            model: any module.
            data: calibration inputs, for everything that looks at activations.

        Returns:
            Integers, scales and new biases of every target; quantizers of every layer.

        Raises:
            ValueError: inputs are needed and there are none; a mapping that fits nothing; a budget that cannot be met.
        """
        inputs = dataclasses.replace(data or Calibration(seed=self.seed), samples=self.samples)
        work = copy.deepcopy(model) if self.equalize else model
        notes = []
        if self.equalize:
            pairs, apart = equalize(work, inputs.example(model))
            notes.append(f"equalized={len(pairs)} pairs")
            if not pairs:
                raise ValueError(f"equalize=True, but no two layers can be equalized:{reasons(apart)}")
        found = survey(work, self.include, self.exclude)
        skipped = dict(found.skipped)
        order = assignment.execution_order(work, found.targets, inputs.example(model))
        kinds = assignment.kinds_of(work, order, order[-1] if order else None)
        edges = [order[i].key for i in (0, -1)] if order and self.edge_bits is not None else []
        fixed = {key: int(self.edge_bits or 0) for key in edges}
        widths, note = self._widths(work, order, kinds, fixed, inputs)
        skipped |= {t.key: f"no entry of bits={self.bits} fits" for t in order if t.key not in widths}
        targets = [t for t in order if t.key in widths]
        seen, source = self._seen(work, targets, inputs)
        layers = {t.key: self._weight(t, widths[t.key], seen.get(t.key)) for t in targets}
        kept = all(self._holds(t, layers[t.key]) for t in targets)  # weights that are on their grids already
        if self.equalize:
            layers |= other_changes(model, work, layers)
        rounded = self._activations(targets, kinds, fixed, seen, skipped)
        if self.outputs:
            passed = activations.passed_on(work, targets, inputs.example(model))
            rounded = {
                name: d if name not in passed else activations.without_output(d)
                for name, d in rounded.items()
            }
        for t in targets:
            rounding.make_bias_an_integer(t, layers[t.key], rounded.get(t.name, {}).get("input_quantizer"))
        for name, decided in rounded.items():
            layers[f"{name}.input" if name else "input"] = {"layer": name, **decided}
        described = " ".join(part for part in (source, note, *notes) if part)
        return Plan(layers, skipped, identity=bool(targets) and kept, data=described)

    @staticmethod
    def _holds(target: Target, decided: Mapping[str, Any]) -> bool:
        weight = target.weight.detach()
        return torch.equal(decided_value(decided, weight)[0], weight.cpu())

    def _widths(
        self,
        model: nn.Module,
        targets: list[Target],
        kinds: Mapping[str, set[str]],
        fixed: Mapping[str, int],
        inputs: Calibration,
    ) -> tuple[dict[str, int], str]:
        """Bits of every target, and how they were found."""
        if isinstance(self.bits, int):
            return {t.key: fixed.get(t.key, self.bits) for t in targets}, ""
        if isinstance(self.bits, Mapping):
            return {**assignment.assign(self.bits, targets, kinds, "bits"), **fixed}, ""
        assert self.budget is not None
        how = self.sensitivity
        if how == "auto":
            how = "output" if inputs.available else "weight"
        candidates, free = sorted(set(self.candidates)), [t for t in targets if t.key not in fixed]

        def rounded(target: Target, bits: int) -> Tensor:
            weight = target.weight.detach()
            return self.grid(bits).code(weight, target.axes.out).project(weight)

        losses = sensitivity.measure(model, free, candidates, rounded, how, inputs)
        widths, solved = sensitivity.allocate(losses, targets, candidates, self.budget, fixed)
        sizes = {t.key: t.weight.numel() for t in targets}
        mean = sum(sizes[key] * bits for key, bits in widths.items()) / sum(sizes.values())
        return widths, f"sensitivity={how} mean_bits={mean:.4f} gap={solved.gap:.3g}"

    def _seen(
        self, model: nn.Module, targets: list[Target], inputs: Calibration
    ) -> tuple[dict[str, Stats], str]:
        """What the chosen options need to know of the layers' inputs."""
        wanted: dict[str, list[str]] = {t.key: [] for t in targets}
        for t in targets:
            matrix = has_gram(t)
            if self.rounding == "compensated" and matrix:
                wanted[t.key].append("gram")
            if self.bias_correction and matrix and bias_of(t) is not None:
                wanted[t.key].append("input_mean")
            if self.activation_bits is not None and self.mode == "static" and activations.refusal(t) is None:
                wanted[t.key] += ["input_range", "histogram"]
                wanted[t.key] += ["output_range", "output_histogram"] if self.outputs else []
        if not any(wanted.values()):
            return {}, ""
        if not inputs.available:
            raise ValueError(
                "static activations, compensated rounding and bias correction look at inputs: give compress() data= "
                "or example_input=, or use mode='dynamic', rounding='nearest'."
            )
        return collected(model, targets, inputs, wanted), inputs.describe(model)

    def _weight(self, target: Target, bits: int, seen: Stats | None) -> dict[str, Any]:
        """Integers, scales and bias of one target."""
        weight = target.weight.detach()
        if bits == 1 and codes.current_mask(target) is not None:
            raise ValueError(f"{target.key} has a mask, and one bit has no zero: give it 2 bits or more.")
        code = self.grid(bits).code(weight, target.axes.out)
        arrays = code.arrays(weight)
        gram = seen.gram if seen is not None and self.rounding == "compensated" and bits > 1 else None
        if gram is not None:
            arrays["codes"] = rounding.compensated(target, code, gram).to(arrays["codes"].dtype)
        decided: dict[str, Any] = {
            "layer": target.name,
            "param": target.param,
            "kind": code.kind,
            "config": code.config(),
            "arrays": arrays,
        }
        bias = bias_of(target)
        if self.bias_correction and seen is not None and seen.input_mean is not None and bias is not None:
            error = weight.cpu().double() - code.rebuild(arrays, weight.dtype).double()
            decided["bias"] = corrected(target, bias, error, seen.input_mean)
        if gram is None and not self.equalize:
            del arrays["codes"]  # they follow from the weight: plans of large models stay small
            decided["shape"] = [*weight.shape]
        return decided

    def _activations(
        self,
        targets: list[Target],
        kinds: Mapping[str, set[str]],
        fixed: Mapping[str, int],
        seen: Mapping[str, Stats],
        skipped: dict[str, str],
    ) -> dict[str, dict[str, Any]]:
        """Configuration of the quantizers of every layer."""
        if self.activation_bits is None:
            return {}
        if isinstance(self.activation_bits, int):
            widths = {t.key: fixed.get(t.key, self.activation_bits) for t in targets}
        else:
            assigned = assignment.assign(self.activation_bits, targets, kinds, "activation_bits")
            widths = assigned | {t.key: fixed[t.key] for t in targets if t.key in fixed}
        found: dict[str, dict[str, Any]] = {}
        for t in targets:
            why = activations.refusal(t)
            if t.key not in widths or t.name in found:
                continue
            if why is not None:
                skipped[f"{t.name}.input"] = why
            elif self.mode == "dynamic":
                found[t.name] = {"input_quantizer": InputQuantizer(widths[t.key]).config()}
            else:
                rule = widths[t.key], self.activation_calibrator, self.percentile, self.scale
                found[t.name] = activations.static(seen[t.key], *rule)
        return found

    # -- apply -----------------------------------------------------------------------------------------------

    @classmethod
    def structure(cls, plan: Plan) -> Plan:
        """The quantizers of activations; weights are in the weights.

        Args:
            plan: what ``plan`` returned.

        Returns:
            A plan without weights.
        """
        kept = {name: decided for name, decided in plan.layers.items() if "param" not in decided}
        return Plan(kept, data=plan.data)

    def apply(self, model: nn.Module, plan: Plan) -> None:
        """Write weights and biases in place, attach the codes, and put the quantizers into the layers.

        Args:
            model: the model of the plan, or a fresh one.
            plan: what ``plan`` returned.

        Raises:
            ValueError: the model has no such layer, or of another shape, or a decision is malformed; nothing is written
                then.
        """
        carry_out(model, plan)
