"""What an optimizer must know of learned steps and clips: their own group, and a place in states from before them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.quantization.training import quantizers


def parameter_groups(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Learned steps and clips apart from all other parameters, for ``configure_optimizers``.

    Steps should not decay: ``weight_decay`` would pull them to zero, and with them the range. The callback puts them
    into the model before ``configure_optimizers`` runs.

    Args:
        module: the LightningModule, or a part of it.

    Returns:
        Parameters of quantizers, and all others, each in the order of ``module.parameters()``. Without the callback
        the first list is empty, which optimizers accept in one of several groups.

    Examples:
        >>> net = nn.Sequential(nn.Linear(4, 2))
        >>> steps, others = parameter_groups(net)
        >>> optimizer = torch.optim.AdamW([{"params": others}, {"params": steps, "weight_decay": 0.0}])
        >>> len(steps), len(others)
        (0, 2)

    Source: Esser et al. 2020, Learned Step Size Quantization.
    """
    ours = {id(p) for q in quantizers(module).values() for p in q.parameters()}
    parameters = list(module.parameters())
    return [p for p in parameters if id(p) in ours], [p for p in parameters if id(p) not in ours]


def remap_optimizer_state(
    optimizer: Optimizer, saved: Mapping[str, Any], ours: Iterable[Tensor]
) -> dict[str, Any] | None:
    """The state of an optimizer from before there were quantizers, as the present one has its parameters.

    Optimizers number their parameters. The saved numbers are given to the parameters that are not ours, in order;
    ours start without state. A group that holds nothing but ours may be missing.

    Args:
        optimizer: the present one.
        saved: ``optimizer.state_dict()`` of the dense run.
        ours: parameters of quantizers.

    Returns:
        A state dict for ``optimizer.load_state_dict``; None if the saved one is not such a dense one.
    """
    ids = {id(p) for p in ours}
    groups = optimizer.param_groups
    if [len(g["params"]) for g in groups] == [len(g["params"]) for g in saved["param_groups"]]:
        return None
    own = [[p for p in g["params"] if id(p) not in ids] for g in groups]
    paired = [i for i, g in enumerate(groups) if own[i] or not g["params"]]
    if len(paired) != len(saved["param_groups"]):
        return None
    state, made, number = {}, [], 0
    matches = dict(zip(paired, saved["param_groups"], strict=True))
    for i, group in enumerate(groups):
        old = matches.get(i)
        if old is not None and len(old["params"]) != len(own[i]):
            return None
        numbers = iter(old["params"] if old is not None else ())
        for offset, parameter in enumerate(group["params"]):
            if id(parameter) not in ids:
                key = next(numbers)
                if key in saved["state"]:
                    state[number + offset] = saved["state"][key]
        options = {
            k: v for k, v in (group if old is None else old).items() if k not in ("params", "param_names")
        }
        made.append({**options, "params": list(range(number, number + len(group["params"])))})
        number += len(group["params"])
    return {**saved, "state": state, "param_groups": made}
