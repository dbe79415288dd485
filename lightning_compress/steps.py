"""Running one transform: plan, apply, and measure what really changed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import nn

from lightning_compress import tables
from lightning_compress.names import clean
from lightning_compress.plans import Plan
from lightning_compress.stats import Calibration
from lightning_compress.transform import Coverage, NothingChangedError, Step, Transform, record

Digests = dict[str, tuple[bytes, int, bool]]


def digests(model: nn.Module) -> Digests:
    """Name -> (hash of the bytes, number of bytes, is a parameter) of every parameter and buffer, shared ones once."""
    found = {}
    for group, is_parameter in ((model.named_parameters(), True), (model.named_buffers(), False)):
        for name, tensor in group:
            dense = tensor if tensor.layout == torch.strided else tensor.to_dense()
            raw = dense.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            found[clean(name)] = (
                hashlib.blake2b(raw.data, digest_size=16).digest(),
                dense.nbytes,
                is_parameter,
            )
    return found


def fingerprint(model: nn.Module) -> str:
    """Short name of a model's tensors: equal for equal names and bytes.

    Args:
        model: any module.

    Returns:
        16 hexadecimal digits.

    Examples:
        >>> fingerprint(nn.ReLU()) == fingerprint(nn.ReLU()) != fingerprint(nn.Linear(1, 1))
        True
    """
    joined = hashlib.sha256()
    for name, (digest, *_) in sorted(digests(model).items()):
        joined.update(name.encode() + digest)
    return joined.hexdigest()[:16]


def measured(before: Digests, model: nn.Module, skipped: Mapping[str, str]) -> Coverage:
    """What differs from before, by tensor.

    Args:
        before: what ``digests`` gave.
        model: the model now.
        skipped: full parameter name -> why it was left alone; kept for those that did not change.

    Returns:
        The coverage.
    """
    after = digests(model)
    changed = {
        n: before[n][1] if n in before else 0
        for n in before.keys() | after.keys()
        if before.get(n) != after.get(n)
    }
    total = sum(size for _, size, is_parameter in before.values() if is_parameter)
    hit = sum(before[n][1] for n in changed if n in before and before[n][2])
    order = [*before, *(n for n in after if n not in before)]
    named = {n: changed[n] for n in order if n in changed}
    return Coverage(
        named, {k: v for k, v in skipped.items() if k not in changed}, total, hit / total if total else 0.0
    )


def run_step(
    model: nn.Module,
    transform: Transform,
    data: Calibration | None = None,
    *,
    plan: Plan | None = None,
    before: Digests | None = None,
) -> Step:
    """Plan and apply one transform in place, measure what changed, and record the step on the model.

    Args:
        model: any module.
        transform: the method.
        data: calibration inputs.
        plan: of the transform for this model, if it is made already.
        before: digests of the model, if they are made already.

    Returns:
        The step, with the whole plan.

    Raises:
        NothingChangedError: no tensor changed, and the plan is not an identity.
    """
    plan = transform.plan(model, data) if plan is None else plan
    before = digests(model) if before is None else before
    transform.apply(model, plan)
    coverage = measured(before, model, plan.skipped)
    name = type(transform).__name__
    if not coverage.changed and not plan.identity:
        why = (
            f"no layer fits:{tables.reasons(plan.skipped)}" if plan.skipped else "every tensor is as it was."
        )
        why = why if before else "the model has no parameters."
        raise NothingChangedError(f"{name} changed nothing: {why}")
    step = Step(name, transform.config(), plan, coverage)
    record(model, step)
    return step
