"""Penalties on entries and groups of a weight that make many of them small, each with its slope; shrinking steps.

A penalty is a function ``u -> P [..], dP/du`` of magnitudes ``u = |w| >= 0`` by group: a list of blocks [.., G, n], as
``Layout.blocks`` gives them. The gradient for the weight is ``dP/du w/|w|``, with 0 where w = 0. So complex entries
count by their modulus, and a group of norm 0 adds value 0 and gradient 0. Nothing is differentiated at run time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_compress.functional import penalties
from lightning_compress.functional.layouts import Layout, wide
from lightning_compress.functional.masks import count_pruned, topk_mask

Blocks = Sequence[Tensor]
GroupPenalty = Callable[[Blocks], tuple[Tensor, list[Tensor]]]


def penalty(weight: Tensor, layout: Layout, rule: GroupPenalty) -> tuple[Tensor, Tensor]:
    """Value and gradient of a penalty, in float32 for weights of fewer bits.

    Args:
        weight: w [.., *layout.shape], real or complex; leading axes run over several weights.
        layout: which entries are one group.
        rule: one of this module, its options filled in.

    Returns:
        P [..], and dP/dw (for complex w: ``dP/dRe w + i dP/dIm w``, as PyTorch's gradients are).

    Examples:
        >>> weight = torch.tensor([[3.0, -4.0], [0.0, 0.0]])
        >>> value, gradient = penalty(weight, Layout.of("channel", (2, 2), 0, 1), group_lasso)
        >>> round(value.item(), 4), [[round(g, 4) for g in row] for row in gradient.tolist()]
        (7.0711, [[0.8485, -1.1314], [0.0, 0.0]])
    """
    weight = wide(weight)
    value, slopes = rule(layout.blocks(weight.abs()))
    return value, layout.restore(slopes) * weight.sgn()


# -- penalties on groups -----------------------------------------------------------------------------------


def within(rule: penalties.Penalty, blocks: Blocks, mean: bool = False) -> tuple[Tensor, list[Tensor]]:
    """A penalty on every group, added up: ``P = sum_g rule(u_g)``, or the mean over groups.

    Args:
        rule: function ``u [.., n] -> value [..], slope [.., n]``.
        blocks: u, magnitudes [.., G, n].
        mean: divide by the number of groups.

    Returns:
        P [..] and dP/du.

    Examples:
        >>> from lightning_compress.functional.penalties import l1_l2
        >>> within(l1_l2, [torch.eye(3)], mean=True)[0].item()
        1.0
    """
    share = 1 / sum(b.shape[-2] for b in blocks) if mean else 1.0
    found = [rule(b) for b in blocks]
    value = torch.stack([v.sum(-1) for v, _ in found]).sum(0) * share
    return value, [slope * share if mean else slope for _, slope in found]


def l1(blocks: Blocks) -> tuple[Tensor, list[Tensor]]:
    """Sum of magnitudes: ``P = sum |w|``.

    Args:
        blocks: magnitudes [.., G, n].

    Returns:
        P [..] and dP/du.

    Examples:
        >>> l1([torch.tensor([[3.0, 4.0], [0.0, 0.0]])])[0].item()
        7.0

    Source: Tibshirani 1996 (lasso); on scales of BatchNorm: Liu et al. 2017, Network Slimming.
    """
    return within(penalties.nuclear, blocks)


def l2(blocks: Blocks) -> tuple[Tensor, list[Tensor]]:
    """Sum of squares: ``P = sum |w|^2``.

    Args:
        blocks: magnitudes [.., G, n].

    Returns:
        P [..] and dP/du.

    Examples:
        >>> l2([torch.tensor([[3.0, 4.0], [0.0, 0.0]])])[0].item()
        25.0
    """
    return within(lambda u: (u.square().sum(-1), 2 * u), blocks)


def group_lasso(blocks: Blocks) -> tuple[Tensor, list[Tensor]]:
    """Sum of group norms: ``P = sum_g sqrt(m_g) |w_g|_2`` with m_g entries in group g.

    Args:
        blocks: magnitudes [.., G, m].

    Returns:
        P [..] and dP/du.

    Examples:
        >>> round(group_lasso([torch.tensor([[3.0, 4.0], [0.0, 0.0]])])[0].item(), 4)
        7.0711

    Source: Yuan & Lin 2006, Model Selection and Estimation in Regression with Grouped Variables.
    """

    def rule(u: Tensor) -> tuple[Tensor, Tensor]:
        root, norm = math.sqrt(u.shape[-1]), torch.linalg.vector_norm(u, dim=-1, keepdim=True)
        return root * norm.squeeze(-1), u * (root / norm).where(norm > 0, 0)

    return within(rule, blocks)


def l1_l2_intra(blocks: Blocks, squared: bool = False) -> tuple[Tensor, list[Tensor]]:
    """Few large entries in every group: ``P = mean_g |w_g|_1 / |w_g|_2``, or the mean of the squares.

    Args:
        blocks: magnitudes [.., G, n].
        squared: take the squares.

    Returns:
        P [..] and dP/du.

    Examples:
        >>> round(l1_l2_intra([torch.tensor([[3.0, 4.0], [0.0, 0.0]])])[0].item(), 4)
        0.7

    Source: Hoyer 2004; Yang et al. 2020, DeepHoyer (squared).
    """
    return within(lambda u: penalties.l1_l2(u, squared), blocks, mean=True)


def l1_l2_inter(blocks: Blocks, squared: bool = False) -> tuple[Tensor, list[Tensor]]:
    """Few large groups: ``P = |v|_1 / |v|_2`` with ``v_g = |w_g|_2``, or its square.

    Args:
        blocks: magnitudes [.., G, n].
        squared: take the square.

    Returns:
        P [..] and dP/du.

    Examples:
        >>> l1_l2_inter([torch.tensor([[3.0, 4.0], [0.0, 0.0]])])[0].item()
        1.0

    Source: Yang et al. 2020, DeepHoyer (group form).
    """
    norms = [torch.linalg.vector_norm(b, dim=-1) for b in blocks]
    value, slope = penalties.l1_l2(torch.cat(norms, -1), squared)
    parts = torch.split(slope, [v.shape[-1] for v in norms], -1)
    factors = [(s / v).where(v > 0, 0) for s, v in zip(parts, norms, strict=True)]
    return value, [b * f[..., None] for b, f in zip(blocks, factors, strict=True)]


def hoyer(blocks: Blocks) -> tuple[Tensor, list[Tensor]]:
    """One minus Hoyer's sparseness of every group: ``P = mean_g 1 - (sqrt(n) - |w_g|_1/|w_g|_2) / (sqrt(n) - 1)``.

    Args:
        blocks: magnitudes [.., G, n].

    Returns:
        P [..] in [0, 1] and dP/du.

    Examples:
        >>> round(hoyer([torch.tensor([[1.0, 1.0], [0.0, 1.0]])])[0].item(), 6)
        0.5

    Source: Hoyer 2004, Non-negative Matrix Factorization with Sparseness Constraints.
    """
    return within(penalties.hoyer, blocks, mean=True)


def scad(blocks: Blocks, lam: float, a: float = 3.7) -> tuple[Tensor, list[Tensor]]:
    """Smoothly clipped absolute deviation of every entry: ``P = sum rho(|w|)``, which leaves large entries alone.

    Args:
        blocks: magnitudes [.., G, n].
        lam: > 0, in the unit of w; entries beyond ``a lam`` are free. See ``lightning_compress.functional.penalties``.
        a: > 2.

    Returns:
        P [..] and dP/du.

    Raises:
        ValueError: lam or a outside its range.

    Examples:
        >>> round(scad([torch.tensor([[9.0, 2.0, 0.5]])], lam=1.0)[0].item(), 4)
        4.6648

    Source: Fan & Li 2001, Variable Selection via Nonconcave Penalized Likelihood.
    """
    return within(lambda u: penalties.scad(u, lam, a), blocks)


PENALTIES: dict[str, Callable[..., tuple[Tensor, list[Tensor]]]] = {
    "l1": l1,
    "l2": l2,
    "group_lasso": group_lasso,
    "l1_l2_intra": l1_l2_intra,
    "l1_l2_inter": l1_l2_inter,
    "hoyer": hoyer,
    "scad": scad,
}


# -- steps that shrink -------------------------------------------------------------------------------------


def soft_threshold(weight: Tensor, layout: Layout, amount: float | Tensor, groups: bool = False) -> Tensor:
    """The proximal step of l1 or of the group lasso, which makes exact zeros.

    ``w <- w max(1 - amount / |w|, 0)``; of groups: ``w_g <- w_g max(1 - amount sqrt(m_g) / |w_g|_2, 0)``.

    Args:
        weight: w [.., *layout.shape], real or complex.
        layout: which entries are one group.
        amount: learning rate times strength, >= 0; a tensor [..] has one for each weight.
        groups: shrink groups instead of entries.

    Returns:
        The new weight, at least in single precision.

    Examples:
        >>> weight = torch.tensor([[3.0, -4.0], [0.1, 0.1]])
        >>> layout = Layout.of("channel", (2, 2), 0, 1)
        >>> soft_threshold(weight, layout, 0.5)
        tensor([[ 2.5000, -3.5000], [ 0.0000,  0.0000]])
        >>> soft_threshold(weight, layout, 5 / 2**0.5 / 2, groups=True)
        tensor([[ 1.5000, -2.0000], [ 0.0000,  0.0000]])

    Source: Daubechies et al. 2004 (soft threshold); Yuan & Lin 2006 (groups).
    """
    weight = wide(weight)
    less = torch.as_tensor(amount, dtype=weight.real.dtype, device=weight.device)[..., None, None]
    factors = []
    for u in layout.blocks(weight.abs()):
        norm = torch.linalg.vector_norm(u, dim=-1, keepdim=True) if groups else u
        share = less * math.sqrt(u.shape[-1]) if groups else less
        factors.append((1 - share / norm).clamp_min(0).where(norm > 0, 0).expand(u.shape))
    return weight * layout.restore(factors)


# -- scores of groups --------------------------------------------------------------------------------------


def mean_magnitudes(weight: Tensor, layout: Layout) -> list[Tensor]:
    """Mean |w| of every group.

    Args:
        weight: w [.., *layout.shape].
        layout: which entries are one group.

    Returns:
        [.., G] for each block.

    Examples:
        >>> mean_magnitudes(torch.tensor([[3.0, -4.0], [0.0, 1.0]]), Layout.of("channel", (2, 2), 0, 1))
        [tensor([3.5000, 0.5000])]
    """
    return [b.mean(-1) for b in layout.blocks(wide(weight).abs())]


def lowest(weight: Tensor, layout: Layout, share: float) -> Tensor:
    """The groups with the lowest mean |w|: ``floor(share G + 0.5)`` of G, at most G - 1.

    Args:
        weight: w, of the layout's shape.
        layout: which entries are one group.
        share: in [0, 1].

    Returns:
        Bool tensor of the weight's shape, True in these groups.

    Examples:
        >>> lowest(torch.tensor([[3.0, -4.0], [0.0, 1.0]]), Layout.of("channel", (2, 2), 0, 1), 0.5)
        tensor([[False, False],
                [ True,  True]])
    """
    scores = mean_magnitudes(weight, layout)
    total = sum(s.numel() for s in scores)
    kept = topk_mask(scores, min(count_pruned(share, total), total - 1))
    return layout.restore([~k[:, None].expand(shape) for k, shape in zip(kept, layout.counts, strict=True)])


def near_zero(sizes: Tensor, below: float = 0.01) -> Tensor:
    """Share of sizes that are at most ``below`` of their mean; 1 if all are 0.

    Args:
        sizes: [.., G], >= 0.
        below: > 0.

    Returns:
        [..] in [0, 1].

    Examples:
        >>> near_zero(torch.tensor([1.0, 1.0, 0.001, 0.0])).item()
        0.5
    """
    return (sizes <= below * sizes.mean(-1, keepdim=True)).to(sizes.dtype).mean(-1)
