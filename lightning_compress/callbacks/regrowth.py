"""Masks that move at constant sparsity: which entries a layer starts with, and which it trades while it trains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.functional.masks import count_pruned, topk_mask
from lightning_compress.functional.regrowth import erdos_renyi, exchange, uniform
from lightning_compress.names import name_of
from lightning_compress.pruning.criteria import criterion, magnitude, random
from lightning_compress.pruning.sparsify import Prune
from lightning_compress.targets import Target

GROWTH = ("gradient", "random")
DISTRIBUTIONS = {"erk": erdos_renyi, "uniform": uniform}


class Regrowth:
    """The rule of dynamic sparse training, and the gradients that it has seen.

    Args:
        by: what comes: entries with the largest "gradient" (RigL), or "random" ones (SET).
        share: largest share of a layer's kept entries that is exchanged at once.
        distribution: how many entries each layer keeps: "erk", "uniform", or None, as ``transform`` ranks them.
        transform: sparsity, and the criterion that the first masks are ranked by.

    Attributes:
        regrown: share of the kept entries that came at the last exchange.

    Raises:
        ValueError: an option outside its range, or one that says the same thing in another way.
    """

    def __init__(self, by: str, share: float, distribution: str | None, transform: Prune) -> None:
        if by not in GROWTH:
            raise ValueError(f"regrow={by!r} is unknown; allowed: {', '.join(GROWTH)}, or None.")
        if not 0 < share <= 1:
            raise ValueError(f"regrow_share={share}: allowed is 0 < regrow_share <= 1.")
        if distribution is not None and distribution not in DISTRIBUTIONS:
            raise ValueError(
                f"distribution={distribution!r} is unknown; allowed: {', '.join(DISTRIBUTIONS)}, or None."
            )
        if transform.threshold is not None:
            raise ValueError("regrow= keeps the sparsity constant: give sparsity= in place of threshold=.")
        needs = getattr(criterion(transform.criterion, transform.seed), "needs", ())
        if needs or transform.pattern != "unstructured":
            given = (
                f"criterion={name_of(transform.criterion)!r}" if needs else f"pattern={transform.pattern!r}"
            )
            raise ValueError(
                f"{given} does not go with regrow=: single entries are exchanged, and the first masks are made before "
                "anything is measured: leave it out, or take 'magnitude' or 'random'."
            )
        options = {k: getattr(transform, k) for k in ("scope", "max_layer_sparsity")}
        also = [f"{k}={v!r}" for k, v in options.items() if v != getattr(Prune(), k)]
        also += ["a sparsity for each pattern"] if isinstance(transform.sparsity, Mapping) else []
        if distribution is not None and also:
            raise ValueError(
                f"distribution={distribution!r} says how many entries a layer keeps, and so does {also[0]}: give one."
            )
        self.by, self.share, self.distribution, self.transform = by, share, distribution, transform
        self.regrown = 0.0
        self._gradients: dict[
            str, Tensor
        ] = {}  # absolute values, between a step and the exchange that follows it

    @torch.no_grad()
    def start(
        self, model: nn.Module, targets: Sequence[Target], shares: Mapping[str, float]
    ) -> dict[str, Tensor]:
        """The first masks, exactly at the target sparsity.

        Args:
            model: the module.
            targets: its weights.
            shares: target key -> sparsity, for ``distribution=None``.

        Returns:
            Target key -> mask. Entries that an earlier mask holds at zero are the last to be kept.
        """
        scores, _ = self.transform.scores(model, targets)
        ranked = {
            t.key: scores[t.key].masked_fill(~self.transform.present_mask(t), -torch.inf) for t in targets
        }
        if self.distribution is None:
            everything = {key: torch.ones_like(s, dtype=torch.bool) for key, s in ranked.items()}
            return self.transform.masks(targets, ranked, everything, shares)
        assert isinstance(self.transform.sparsity, float | int)
        shapes = [t.weight.shape for t in targets]
        counts = DISTRIBUTIONS[self.distribution](shapes, self.transform.sparsity)
        return {
            t.key: topk_mask([ranked[t.key]], t.weight.numel() - kept)[0]
            for t, kept in zip(targets, counts, strict=True)
        }

    def see(self, targets: Iterable[Target]) -> None:
        """Keep the gradients, before any entry of theirs is masked; their scale does not matter within a layer.

        Args:
            targets: weights that are about to be updated.
        """
        for target in targets if self.by == "gradient" else ():
            gradient = target.weight.grad
            if gradient is not None:
                dense = gradient.detach().to_dense() if gradient.is_sparse else gradient.detach()
                self._gradients[target.key] = dense.abs()

    def masks(
        self, targets: Sequence[Target], masks: Mapping[str, Tensor], share: float, step: int
    ) -> dict[str, Tensor]:
        """The masks after an exchange.

        Args:
            targets: weights.
            masks: their present masks.
            share: of the kept entries of each layer that are exchanged.
            step: the present optimizer step, for ``by="random"``.

        Returns:
            Target key -> mask; a weight without a gradient keeps its own.

        Raises:
            ValueError: a gradient that is NaN, with the layer's name.
        """
        noise = random((self.transform.seed << 32) + step)
        new = dict(masks)
        for t in targets:
            growth = self._gradients.get(t.key) if self.by == "gradient" else noise(t, None)
            if growth is None:
                continue
            try:
                kept = int(masks[t.key].sum())
                new[t.key] = exchange(magnitude(t, None), growth, masks[t.key], count_pruned(share, kept))
            except ValueError as error:
                raise ValueError(f"{t.key}: {error} Are its weights and gradients finite?") from None
        self._gradients = {}
        came = sum(int((new[key] & ~mask).sum()) for key, mask in masks.items())
        self.regrown = came / max(sum(int(mask.sum()) for mask in masks.values()), 1)
        return new

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"regrown": self.regrown, "gradients": {k: g.cpu() for k, g in self._gradients.items()}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Inverse of ``state_dict``."""
        self.regrown, self._gradients = float(state_dict["regrown"]), dict(state_dict["gradients"])
