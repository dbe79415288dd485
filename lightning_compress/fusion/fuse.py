"""The transform: which BatchNorm goes into which layer, and why the others stay."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from lightning_compress.connections import (
    LAYERS,
    NORMS,
    TRANSPOSED,
    Connections,
    Watch,
    output,
    tensors_in,
    tensors_of,
    trace,
)
from lightning_compress.fusion.fold import (
    affine,
    channels,
    fold_into,
    fold_tensors,
    make_bias,
    on_grid,
    rescaled,
)
from lightning_compress.names import clean, matches
from lightning_compress.plans import Plan
from lightning_compress.stats import Calibration
from lightning_compress.stats.running import observing
from lightning_compress.targets import plain_class, replace_modules, survey
from lightning_compress.transform import Transform, applied

_TOLERANCE = 1e-5  # of the largest output, in float32
_Pairs = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class FuseBatchNorm(Transform):
    r"""Fold BatchNorm layers, as they are in eval mode, into the linear or convolution layer beside them.

    ``W' = W * gamma / sigma`` on the output axis and ``b' = beta + (b - mu) * gamma / sigma``, with
    ``sigma = sqrt(var + eps)`` from the running statistics; without affine parameters gamma = 1, beta = 0. The
    layer keeps its weight Parameter and gets a bias if it had none; the BatchNorm becomes ``nn.Identity``.
    Zeros of a pruned weight stay zeros and its mask stays attached; a quantized weight keeps its integers, and their
    scales take the factors in.

    A BatchNorm goes into the layer before it, whose output must be exactly and only its input; otherwise into
    the linear or convolution layer after it that alone reads its output, unless that one pads. With an
    ``example_input`` the pairs are found by following the tensors of one forward pass. Without one they are
    read from the code: by symbolic tracing of the largest submodules that can be traced, and by neighbourhood
    in ``nn.Sequential`` where that fails; a submodule is then taken to be used through its own ``forward``.
    Every BatchNorm that stays is listed with the reason.

    Args:
        include: patterns of layer names; a pair is folded if one fits the BatchNorm or its layer.
        exclude: patterns of layer names; a pair stays if one fits the BatchNorm or its layer.
        check: with an ``example_input``, compare the outputs before and after, and undo every pair that
            changes them by more than 1e-5 of the largest (in proportion for types shorter than float32).

    Raises:
        ValueError: a pattern fits no layer.

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()).eval()
        >>> fused = compress(net, [FuseBatchNorm()], example_input=torch.zeros(1, 1, 8, 8)).model
        >>> [type(layer).__name__ for layer in fused], list(fused.state_dict())
        (['Conv2d', 'Identity', 'ReLU'], ['0.weight', '0.bias'])

    Source: Jacob et al. 2018, Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference, section 3.2.
    """

    include: str | Sequence[str] = "*"
    exclude: str | Sequence[str] = ()
    check: bool = True

    structural: ClassVar[bool] = True
    stage: ClassVar[str] = "fusion"

    def plan(self, model: nn.Module, data: Calibration | None = None) -> Plan:
        """Find the pairs; everything runs on copies of the model.

        Args:
            model: any module.
            data: its ``example_input`` is run; without one the code is read.

        Returns:
            BatchNorm name -> layer, place ("after" or "before" the layer) and eps.

        Raises:
            ValueError: a pattern fits no layer.
        """
        survey(model, self.include, self.exclude)  # raises for a pattern that fits nothing
        if not any(isinstance(m, NORMS) for m in model.modules()):
            return Plan({}, {type(model).__name__: "it has no BatchNorm layer"})
        x = None if data is None else data.example_input
        probe = copy.deepcopy(model)
        if x is None:
            seen = Connections()
            with observing(probe):
                trace(probe, seen)
            return Plan(*self._pairs(probe, seen))
        watch = Watch(probe)
        before = output(probe, x, watch)
        if any(plain_class(m) is not type(m) for m in model.modules()):
            before = output(_bare(copy.deepcopy(model)), x)
        pairs, skipped = self._pairs(probe, watch.seen)
        failed = self._failing(model, pairs, x, before) if self.check else {}
        pairs = {name: pair for name, pair in pairs.items() if name not in failed}
        return Plan(pairs, skipped | failed, data="example_input")

    def apply(self, model: nn.Module, plan: Plan) -> None:
        """Fold the pairs in place.

        Args:
            model: the model of the plan, or a fresh one, whose own statistics are then folded.
            plan: what ``plan`` returned.

        Raises:
            ValueError: a layer of the plan is missing or has other channels; nothing is written then.
        """
        self._fuse(model, plan, fold=True)

    def restructure(self, model: nn.Module, plan: Plan) -> None:
        """Make room for the biases and take the BatchNorm away; nothing is folded.

        Args:
            model: a fresh one, whose values are loaded afterwards.
            plan: what ``plan`` returned.

        Raises:
            ValueError: as ``apply``.
        """
        self._fuse(model, plan, fold=False)

    def _fuse(self, model: nn.Module, plan: Plan, *, fold: bool) -> None:
        modules = {clean(name): module for name, module in model.named_modules(remove_duplicate=False)}
        for name, pair in plan.layers.items():
            layer: Any = modules.get(pair["layer"])
            norm: Any = modules.get(name)
            fits = isinstance(layer, LAYERS) and isinstance(norm, NORMS) and norm.running_var is not None
            if not fits or channels(layer, pair["place"]) != len(norm.running_var):
                raise ValueError(
                    f"the plan folds {name} into {pair['layer']}, which in this model are {norm} and {layer}: "
                    "apply it to the architecture it was made for."
                )
        identities: dict[nn.Module, nn.Module] = {}
        for name, pair in plan.layers.items():
            if fold:
                fold_into(modules[pair["layer"]], modules[name], pair["place"], pair["eps"])
            else:
                make_bias(modules[pair["layer"]])
            identities[modules[name]] = nn.Identity().train(modules[name].training)
        replace_modules(model, identities)

    def _failing(self, model: nn.Module, pairs: _Pairs, x: Any, before: Any) -> dict[str, str]:
        """BatchNorm name -> why its pair is undone: all pairs are tried at once, and singly if that fails."""
        if not pairs or self._harm(model, pairs, x, before) is None:
            return {}
        kept: _Pairs = {}
        failed: dict[str, str] = {}
        for name, pair in pairs.items():
            harm = self._harm(model, kept | {name: pair}, x, before)
            if harm is None:
                kept[name] = pair
            else:
                failed[name] = f"undone: with it in {pair['layer']}, {harm}"
        return failed

    def _harm(self, model: nn.Module, pairs: _Pairs, x: Any, before: Any) -> str | None:
        probe = copy.deepcopy(model)
        self.apply(probe, Plan(pairs))
        try:
            gap = _difference(before, output(_bare(probe), x))
        except Exception as error:  # the user's forward may look at what BatchNorm had, and fail in any way
            return f"the model fails: {error!r}"
        return None if gap <= _TOLERANCE else f"outputs change by {gap:.1e} (allowed is {_TOLERANCE:.0e})"

    def _pairs(self, model: nn.Module, seen: Connections) -> tuple[_Pairs, dict[str, str]]:
        """BatchNorm name -> pair, and BatchNorm name -> why it has none."""
        names = {module: clean(name) for name, module in model.named_modules()}
        tied = _tied(model)
        folded: dict[nn.Module | None, nn.Module] = {}  # BatchNorm -> the layer before it that took it in
        pairs: _Pairs = {}
        skipped: dict[str, str] = {}
        for norm in (m for m in model.modules() if isinstance(m, NORMS)):
            source = seen.source.get(norm)
            reader = next((m for m, made_by in seen.source.items() if made_by is norm), None)
            reasons = [r for r in (_unfit(norm, seen), _unfit_statistics(norm)) if r]
            options = [] if reasons else [("after", folded.get(source, source)), ("before", reader)]
            for place, layer in options:
                if not isinstance(layer, LAYERS):
                    continue
                chain = dict.fromkeys([source, layer] if place == "after" else [norm])
                why = self._unwanted(names[norm], names[layer]) or _refusal(
                    layer, norm, place, seen, tied, [m for m in chain if m is not None]
                )
                if why is None:
                    pairs[names[norm]] = {"layer": names[layer], "place": place, "eps": float(norm.eps)}
                    if place == "after":
                        folded[norm] = layer
                    break
                reasons.append(f"{why} ({names[layer]})")
            else:
                unrelated = "its input is not exactly the output of a linear or convolution layer"
                skipped[names[norm]] = reasons[0] if reasons else unrelated
        return pairs, skipped

    def _unwanted(self, *names: str) -> str | None:
        include, exclude = ([p] if isinstance(p, str) else list(p) for p in (self.include, self.exclude))
        blocked = [p for p in exclude if matches(p, *names)]
        if blocked:
            return f"excluded by {blocked[0]!r}"
        return None if any(matches(p, *names) for p in include) else f"no include pattern of {include} fits"


def _unfit(layer: nn.Module, seen: Connections) -> str | None:
    """Why a layer cannot take part, whatever its partner."""
    kind, base = plain_class(layer), next(c for c in (*LAYERS, *NORMS) if isinstance(layer, c))
    inherited = (getattr(kind, f, None) is getattr(base, f, None) for f in ("forward", "_conv_forward"))
    if hasattr(type(layer), "weight"):
        return "its weight is computed on the way: by a torch parametrization or by fake quantization"
    if "forward" in vars(layer) or not all(inherited):
        return f"{kind.__name__} has a forward of its own"
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "it has forward hooks, which may change what it computes"
    if not seen.calls[layer]:
        return "not reached: the forward pass does not call it, or the code cannot be traced (give an example_input)"
    if seen.calls[layer] > 1:
        return f"it runs {seen.calls[layer]} times in one forward pass"
    if layer in seen.touched:
        return "its own tensors are also used outside of its call"
    return None


def _unfit_statistics(norm: Any) -> str | None:
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics"
    finite = all(bool(t.isfinite().all()) for t in affine(tensors_of(norm), norm.eps))
    return None if finite else "its parameters or statistics are not finite"


def _refusal(
    layer: Any, norm: Any, place: str, seen: Connections, tied: set[int], chain: Sequence[nn.Module]
) -> str | None:
    """Why this layer cannot take this BatchNorm in; ``chain`` are the layers whose outputs lie between them."""
    why = _unfit(layer, seen)
    if why:
        return why
    if any(len(seen.users[module]) > 1 for module in chain):
        return "the tensor between them is also used, or changed in place, elsewhere"
    slot = "output_quantizer" if place == "after" else "input_quantizer"
    if plain_class(layer) is not type(layer) and slot in layer._modules:
        return f"its {slot.partition('_')[0]} is quantized, between it and BatchNorm"
    if on_grid(layer) is not None and rescaled(layer, norm, place, norm.eps) is None:
        return "its weight lies on a grid that cannot take the factors in: put FuseBatchNorm before Quantize"
    if id(layer) in tied:
        return "its weight or bias is shared with another layer"
    if layer.weight.is_complex():
        return "its weight is complex"
    flat = isinstance(layer, nn.Linear) and isinstance(norm, nn.BatchNorm2d | nn.BatchNorm3d)
    dims = seen.dims.get(chain[0], layer.weight.dim())
    if flat or dims != layer.weight.dim() or channels(layer, place) != norm.num_features:
        side = "output" if place == "after" else "input"
        return f"{type(norm).__name__} normalizes another axis than the layer's {side} channels"
    if place == "before" and isinstance(layer, TRANSPOSED):
        return "a transposed convolution spreads the shift unevenly"
    if place == "before" and _pads(layer):
        return "the layer pads with zeros, which are not zeros before BatchNorm"
    return None


def _pads(layer: Any) -> bool:
    padding = getattr(layer, "padding", "valid")
    if isinstance(padding, str):
        return padding == "same" and max(layer.kernel_size) > 1
    return any(padding)


def _tied(model: nn.Module) -> set[int]:
    """Ids of modules with a parameter that another module holds too."""
    holders: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), set()).add(id(module))
    return {module for modules in holders.values() if len(modules) > 1 for module in modules}


def _bare(model: nn.Module) -> nn.Module:
    """The model without quantizers of activations: a change of 1e-7 could flip a rounding, and so look like harm."""
    for module in model.modules():
        module.__class__ = plain_class(module)
    return model


def _difference(before: Any, after: Any) -> float:
    """Largest ``max|a - b| / max|a|`` of the outputs in float32's terms; infinite where they are not alike."""
    worst = 0.0
    for a, b in zip(tensors_in(before), tensors_in(after), strict=True):
        if not (a.is_floating_point() or a.is_complex()) or not a.numel():
            continue
        coarse = max(1.0, torch.finfo(a.dtype).eps / torch.finfo(torch.float32).eps)
        wide = torch.complex128 if a.is_complex() else torch.float64
        a, b = a.to("cpu", wide), b.to("cpu", wide)
        same = (a == b) | (a.isnan() & b.isnan())
        gap = (a - b).abs().nan_to_num(math.inf).masked_fill(same, 0).max().item()
        size = a.abs().nan_to_num(0, posinf=0).max().item()
        worst = max(worst, gap / (size * coarse) if size else math.inf if gap else 0.0)
    return worst


# -- weights from before the fusion ------------------------------------------------------------------------


def fold_on_load(model: nn.Module) -> None:
    """Let a fused module also load a ``state_dict`` from before the fusion, folding its BatchNorm on the way.

    Args:
        model: a module that ``FuseBatchNorm`` was applied to, or that has such parts; nothing happens to
            another one, and twice is once.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).eval()
        >>> fused = compress(net, [FuseBatchNorm()]).model
        >>> fold_on_load(fused)
        >>> fused.load_state_dict(net.state_dict())
        <All keys matched successfully>
    """
    modules = {clean(name): module for name, module in model.named_modules()}
    for prefix in {prefix for prefix, step in applied(model) if step.name == FuseBatchNorm.__name__}:
        hooks = modules[prefix]._load_state_dict_pre_hooks.values()
        if not any(getattr(hook, "hook", None) is _fold_incoming for hook in hooks):
            modules[prefix].register_load_state_dict_pre_hook(_fold_incoming)


def _fold_incoming(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Replace the BatchNorm entries of a state dict by folded weights, as the module's own fusion did."""
    modules = {clean(name): (f"{prefix}{name}.", part) for name, part in module.named_modules()}
    steps = [step for at, step in applied(module) if not at and step.name == FuseBatchNorm.__name__]
    for name, pair in (item for step in steps for item in step.plan.layers.items()):
        norm, _identity = modules.get(name, ("", None))
        at, layer = modules.get(pair["layer"], ("", None))
        if layer is None or f"{norm}running_var" not in state_dict or f"{at}weight" not in state_dict:
            continue
        entries = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        statistics = {entry: state_dict.pop(f"{norm}{entry}", None) for entry in entries}
        state_dict[f"{at}weight"], state_dict[f"{at}bias"] = fold_tensors(
            layer,
            state_dict[f"{at}weight"],
            state_dict.get(f"{at}bias"),
            statistics,
            pair["place"],
            pair["eps"],
        )
