"""Running statistics of BatchNorm, measured again after the weights before it have changed."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from lightning_compress.names import clean, matches
from lightning_compress.plans import Plan
from lightning_compress.stats import Calibration
from lightning_compress.stats.running import call, observing
from lightning_compress.targets import survey
from lightning_compress.transform import Transform


@dataclass(frozen=True)
class ReestimateBatchNorm(Transform):
    r"""Replace the running mean and variance of BatchNorm by those of the calibration inputs.

    Rounded or pruned weights shift the values that BatchNorm sees, and its stored statistics no longer fit. They
    become the mean and the unbiased variance over all samples and positions together, of what each layer sees in
    eval mode (dropout off) when the layers before it already have their new statistics:

    ``mu = (1 - m) * mu_old + m * mean(x)``, ``var = (1 - m) * var_old + m * n / (n - 1) * mean((x - mean(x))^2)``

    The layers are measured one after the other, each in a pass over the inputs that ends where it begins: that is
    exact, whatever the batches, and costs about half as many forward passes as there are layers.

    Give real data: synthesized inputs know no more than the old statistics.

    Args:
        samples: calibration inputs.
        momentum: share m of the new statistics in [0, 1]; None is 1, the plain statistics of the inputs.
        include: patterns of names of BatchNorm layers to measure.
        exclude: patterns of names to leave.

    Raises:
        ValueError: samples or momentum outside their range, a pattern that fits no layer, no inputs, or values that
            are not finite.

    Examples:
        >>> net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1)).eval()
        >>> net[0].weight.data.fill_(2.0)
        tensor([[2.]])
        >>> data = torch.tensor([[1.0], [2.0], [3.0]])
        >>> tuned = compress(net, [ReestimateBatchNorm()], data=data).model
        >>> tuned[1].running_mean, tuned[1].running_var
        (tensor([4.]), tensor([4.]))

    Source: Wu and Johnson 2021, Rethinking "Batch" in BatchNorm (precise statistics); Sun et al. 2019, Hybrid 8-bit
    Floating Point Training and Inference (re-tuning after quantization).
    """

    samples: int = 256
    momentum: float | None = None
    include: str | Sequence[str] = "*"
    exclude: str | Sequence[str] = ()

    stage: ClassVar[str] = "structure"

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples={self.samples}: allowed is >= 1.")
        if self.momentum is not None and not 0 <= self.momentum <= 1:
            raise ValueError(f"momentum={self.momentum}: allowed is 0 <= momentum <= 1, or None.")

    def plan(self, model: nn.Module, data: Calibration | None = None) -> Plan:
        """Measure the statistics; the model is left as it was.

        Args:
            model: any module.
            data: calibration inputs.

        Returns:
            BatchNorm name -> running mean and variance, float64.

        Raises:
            ValueError: no inputs, or values that are not finite.
        """
        survey(model, self.include, self.exclude)  # raises for a pattern that fits nothing
        norms, skipped = self._norms(model)
        if self.momentum == 0 or not norms:
            return Plan({}, skipped, identity=self.momentum == 0)
        if data is None or not data.available:
            raise ValueError(
                "ReestimateBatchNorm measures what layers see: give compress() data= or example_input=."
            )
        inputs = dataclasses.replace(data, samples=self.samples)
        share = 1.0 if self.momentum is None else self.momentum
        found, unseen = _measure(model, norms, inputs, share)
        return Plan(found, skipped | unseen, data=inputs.describe(model))

    def apply(self, model: nn.Module, plan: Plan) -> None:
        """Write the statistics in place.

        Args:
            model: the model of the plan, or a fresh one.
            plan: what ``plan`` returned.

        Raises:
            ValueError: there is no such BatchNorm, or with other channels; nothing is written then.
        """
        modules = {clean(name): module for name, module in model.named_modules()}
        for name, decided in plan.layers.items():
            mean = getattr(modules.get(name), "running_mean", None)
            if mean is None or mean.shape != decided["running_mean"].shape:
                raise ValueError(
                    f"the plan has statistics of {len(decided['running_mean'])} channels for {name}, which in this "
                    f"model is {modules.get(name)}: apply it to the architecture it was made for."
                )
        with torch.no_grad():
            for name, decided in plan.layers.items():
                for buffer, value in decided.items():
                    modules[name].get_buffer(buffer).copy_(value)

    def _norms(self, model: nn.Module) -> tuple[dict[str, _BatchNorm], dict[str, str]]:
        """BatchNorm layers to measure by name, and why others are left."""
        include = [self.include] if isinstance(self.include, str) else list(self.include)
        exclude = [self.exclude] if isinstance(self.exclude, str) else list(self.exclude)
        norms: dict[str, _BatchNorm] = {}
        skipped: dict[str, str] = {}
        for raw, norm in model.named_modules():
            name = clean(raw)
            if not isinstance(norm, _BatchNorm):
                continue
            if norm.running_mean is None or norm.running_var is None:
                skipped[name] = "it has no running statistics"
            elif norm.momentum == 0:
                skipped[name] = "its statistics are frozen (momentum=0)"
            elif any(matches(p, name) for p in exclude) or not any(matches(p, name) for p in include):
                skipped[name] = "left out by include and exclude"
            else:
                norms[name] = norm
        return norms, skipped or ({} if norms else {type(model).__name__: "it has no BatchNorm layer"})


def reestimate_batchnorm(model: nn.Module, data: Any, *, momentum: float | None = None) -> dict[str, str]:
    """As ``ReestimateBatchNorm``, in place and outside of ``compress``.

    Args:
        model: any module.
        data: a ``Calibration``, or what it takes as ``data``: batches or a loader, of which all samples are used.
        momentum: share of the new statistics; None is 1.

    Returns:
        BatchNorm name -> why its statistics stay as they are.

    Raises:
        ValueError: as ``ReestimateBatchNorm``.

    Examples:
        >>> norm = nn.BatchNorm1d(1)
        >>> reestimate_batchnorm(norm, [torch.tensor([[1.0], [2.0]]), torch.tensor([[6.0]])])
        {}
        >>> norm.running_mean, norm.running_var
        (tensor([3.]), tensor([7.]))
    """
    inputs = data if isinstance(data, Calibration) else Calibration(data=data, samples=sys.maxsize)
    transform = ReestimateBatchNorm(samples=inputs.samples, momentum=momentum)
    plan = transform.plan(model, inputs)
    transform.apply(model, plan)
    return plan.skipped


class _Reached(BaseException):
    """Ends a forward pass; no ``except Exception`` of a user's code holds it up."""


class _Moments:
    """Mean and sum of squared deviations per channel of a layer's inputs, over its calls in many forward passes.

    Args:
        calls: how often the layer runs in one pass, which ends with the last of them.
    """

    def __init__(self, calls: int) -> None:
        self.calls = calls
        self.seen = 0
        self.count = 0
        self.mean: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def add(self, norm: nn.Module, args: Any) -> None:
        """A forward pre-hook: take the layer's input in (Chan et al. 1979)."""
        x = args[0].detach().double().transpose(0, 1).flatten(1)
        count, (variance, mean) = x.shape[1], torch.var_mean(x, 1, correction=0)
        away, total = mean - self.mean, self.count + count
        self.mean = self.mean + away * count / total
        self.squares = self.squares + variance * count + away.square() * self.count * count / total
        self.count, self.seen = total, self.seen + 1
        if self.seen % self.calls == 0:
            raise _Reached


def _measure(
    model: nn.Module, norms: Mapping[str, _BatchNorm], inputs: Calibration, share: float
) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    """Buffer name -> value for each layer, and why some layers have none."""
    found: dict[str, dict[str, Tensor]] = {}
    with observing(model):  # it puts the buffers back
        calls = _calls(model, norms, inputs)
        unseen = {name: "the forward pass does not reach it" for name in norms if name not in calls}
        for name in tqdm(calls, desc="BatchNorm statistics", unit="layer", leave=False, delay=2):
            moments = _Moments(calls[name])
            with _hooked(norms[name], moments.add):
                for batch in inputs.batches(model):
                    with suppress(_Reached):
                        call(model, batch)
            if moments.count < 2:
                unseen[name] = "one value per channel reaches it, a variance needs two"
                continue
            found[name] = {}
            for key, new in (
                ("running_mean", moments.mean),
                ("running_var", moments.squares / (moments.count - 1)),
            ):
                buffer = norms[name].get_buffer(key)
                value = (1 - share) * buffer.double() + share * new
                if not bool(value.isfinite().all()):
                    raise ValueError(
                        f"the inputs of {name} are not finite: check the data and the weights before it."
                    )
                buffer.copy_(value)  # the layers behind it see what they will see
                found[name][key] = value.cpu()
    return found, unseen


def _calls(model: nn.Module, norms: Mapping[str, _BatchNorm], inputs: Calibration) -> dict[str, int]:
    """How often each layer runs in one forward pass, in the order in which they first run."""
    names = {norm: name for name, norm in norms.items()}
    order: list[str] = []
    with ExitStack() as stack:
        for norm in norms.values():
            stack.enter_context(_hooked(norm, lambda layer, args: order.append(names[layer])))
        call(model, next(iter(inputs.batches(model))))
    return dict(Counter(order))


@contextmanager
def _hooked(norm: nn.Module, hook: Any) -> Iterator[None]:
    handle = norm.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
