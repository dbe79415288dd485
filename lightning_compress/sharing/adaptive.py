"""Which strategy, and how many values, every weight gets: the least loss under a size."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from lightning_compress.functional.allocate import multiple_choice_knapsack
from lightning_compress.functional.groups import real
from lightning_compress.functional.lengths import encoded_bytes
from lightning_compress.sharing.build import Entries
from lightning_compress.sharing.codes import SharedCode
from lightning_compress.stats import Calibration
from lightning_compress.stats.sensitivity import losses
from lightning_compress.tables import reasons
from lightning_compress.targets import Target

_CLUSTERS = tuple(2**b for b in range(1, 9))
_HASHED = (8, 16)  # numbers for each bucket
_FILTERED = (4, 16, 64)  # values in a filter, of pruned weights

Option = tuple[str, SharedCode | None]
Maker = Callable[[Entries, int, str], SharedCode]  # weight, K and strategy -> code


def choose(
    model: nn.Module,
    targets: Sequence[Target],
    parts: Mapping[str, Entries],
    make: Maker,
    ratio: float,
    sensitivity: str,
    data: Calibration,
) -> tuple[dict[str, SharedCode | None], str]:
    """The code of every weight, or None, of least total loss under a size.

    Options: clusters of 2, 4, .. 256 values; hashes of n/8 and n/16 values; of pruned weights filters of 4, 16 and 64
    values; and the weight as it is. Each is encoded as an archive would do it: sizes are lengths of streams.

    Args:
        model: the model of the targets; it is left as it was.
        targets: weights.
        parts: target key -> weight.
        make: makes a code.
        ratio: the size of all codes over that of the weights as float32.
        sensitivity: how losses are measured, one of ``lightning_compress.stats.sensitivity.MEASURES``.
        data: calibration inputs, for a sensitivity that needs them.

    Returns:
        Target key -> code, and which option each got.

    Raises:
        ValueError: the size cannot be reached, or inputs are needed and there are none.

    Source: Sinha and Zoltners 1979, The Multiple-Choice Knapsack Problem; Cai et al. 2020, ZeroQ.
    """
    if not targets:
        return {}, ""
    how = sensitivity
    if how == "auto":
        how = "output" if data.available else "weight"
    if how != "weight" and not data.available:
        raise ValueError(f"sensitivity={how!r} looks at inputs: give compress() data= or example_input=.")
    options = {t.key: _options(parts[t.key], make) for t in targets}
    pairs = [(t, option) for t in targets for option in options[t.key]]

    def replaced(target: Target, option: Option) -> Tensor:
        weight = target.weight.detach()
        return weight if option[1] is None else option[1].project(weight)

    found = iter(losses(model, pairs, replaced, how, data))
    lost = [[next(found) for _ in options[t.key]] for t in targets]
    sizes = [[_bytes(parts[t.key], option) for option in options[t.key]] for t in targets]
    dense = 4 * sum(real(t.weight).numel() for t in targets)
    budget, least = math.floor(ratio * dense), sum(map(min, sizes))
    if budget < least:
        raise ValueError(
            f"ratio={ratio:.4g} of {dense:,} bytes cannot be reached: the smallest codes take {least:,} bytes, "
            f"so allowed is ratio >= {least / dense:.4g}."
        )
    solved = multiple_choice_knapsack(lost, sizes, budget)
    taken = {t.key: options[t.key][i] for t, i in zip(targets, solved.choice, strict=True)}
    note = f"sensitivity={how} bytes={solved.cost} of {budget} gap={solved.gap:.3g}"
    listed = reasons({key: name for key, (name, _) in taken.items()})
    return {key: code for key, (_, code) in taken.items()}, f"{note};{listed}\n"


def _options(part: Entries, make: Maker) -> list[Option]:
    numbers = real(part.weight).numel()
    wanted = [("cluster", count) for count in _CLUSTERS]
    wanted += [("hash", math.ceil(numbers / share)) for share in _HASHED]
    wanted += [("bloom", count) for count in _FILTERED if part.mask is not None]
    found: list[Option] = [("as it is", None)]
    for strategy, count in wanted:
        code = make(part, count, strategy)
        if code.bits(part.weight) < part.bits:
            found.append((f"{strategy} {count}", code))
    return found


def _bytes(part: Entries, option: Option) -> int:
    _, code = option
    if code is not None:
        return encoded_bytes(code.arrays(part.weight))
    weight = part.weight.cpu()
    if part.mask is None:
        return encoded_bytes({"weight": weight})
    return encoded_bytes({"mask": part.mask, "values": weight[part.mask]})
