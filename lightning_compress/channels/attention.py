"""Multi-head attention with fewer heads, or fewer inputs, than PyTorch's own code allows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DecoupledAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` whose heads need not fill the embedding: ``num_heads head_dim`` inner features.

    A layer gets this class when it loses heads or embedding channels; parameters, keys and results stay those of the
    original: ``softmax(q k^T / sqrt(head_dim)) v`` for every head, projected back.

    Examples:
        >>> layer = nn.MultiheadAttention(8, 2, batch_first=True).eval()
        >>> x = torch.randn(1, 3, 8)
        >>> before = layer(x, x, x)[0]
        >>> layer.__class__ = DecoupledAttention
        >>> torch.allclose(before, layer(x, x, x)[0], atol=1e-6)
        True

    Source: Vaswani et al. 2017, Attention Is All You Need.
    """

    _plain_class = nn.MultiheadAttention

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """False, so that PyTorch's fused encoder layer, which derives all sizes from one, is not used."""
        return False

    @_qkv_same_embed_dim.setter
    def _qkv_same_embed_dim(self, value: bool) -> None:
        """PyTorch sets it in its constructor and when an older pickle is read."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention.forward``."""
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal=True says what attn_mask= is: give the mask too.")
        batched = query.dim() == 3
        q, k, v = (x if batched else x.unsqueeze(1 - self.batch_first) for x in (query, key, value))
        if not self.batch_first:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        q, k, v = (self._heads(x) for x in self._project(q, k, v))
        keys = k.shape[2]
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (
                torch.cat([x, self._heads(b.expand(len(x), 1, -1))], 2)
                for x, b in ((k, self.bias_k), (v, self.bias_v))
            )
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        mask = self._mask(q, k.shape[2] - keys, attn_mask, key_padding_mask)
        rate = self.dropout if self.training else 0.0
        if not need_weights:
            out, weights = F.scaled_dot_product_attention(q, k, v, mask, rate), None
        else:
            scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = F.dropout(weights, rate) if rate else weights
            out = weights @ v
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if not self.batch_first:
            out = out.transpose(0, 1)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            out = out.squeeze(1 - self.batch_first)
            weights = None if weights is None else weights.squeeze(0)
        return out, weights

    def _project(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        biases: Any = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        if self.in_proj_weight is not None:
            weights: Any = self.in_proj_weight.chunk(3)
        else:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        first, second, third = (F.linear(x, w, b) for x, w, b in zip((q, k, v), weights, biases, strict=True))
        return first, second, third

    def _heads(self, x: Tensor) -> Tensor:
        """[batch, length, heads x features] -> [batch, heads, length, features]."""
        return x.reshape(*x.shape[:2], -1, self.head_dim).transpose(1, 2)

    def _mask(self, q: Tensor, added: int, mask: Tensor | None, padding: Tensor | None) -> Tensor | None:
        """Both masks as one that is added to the scores, [batch or 1, heads or 1, queries or 1, keys]."""

        def additive(given: Tensor) -> Tensor:
            if given.dtype == torch.bool:
                given = torch.zeros_like(given, dtype=q.dtype).masked_fill_(given, -torch.inf)
            return F.pad(given.to(q.dtype), (0, added))

        parts = []
        if mask is not None:
            wide = additive(mask)
            parts.append(wide.reshape(len(q), -1, *wide.shape[1:]) if wide.dim() == 3 else wide[None, None])
        if padding is not None:
            wide = additive(padding)
            parts.append((wide[None] if wide.dim() == 1 else wide)[:, None, None])
        return sum(parts[1:], parts[0]) if parts else None


def numbers(layer: nn.Module) -> dict[str, tuple[str, int]]:
    """Where the numbers of channels that a layer of PyTorch holds, and that its operations do not show, come from.

    Args:
        layer: any module; attention layers and whole transformers have such numbers.

    Returns:
        Attribute -> name of a parameter inside the layer, and its axis.

    Examples:
        >>> numbers(nn.MultiheadAttention(4, 2))["embed_dim"]
        ('out_proj.weight', 0)
    """
    if isinstance(layer, nn.MultiheadAttention):
        joint = layer.in_proj_weight is not None
        found = {"embed_dim": ("out_proj.weight", 0)}
        for number, own in (("kdim", "k_proj_weight"), ("vdim", "v_proj_weight")):
            found[number] = ("in_proj_weight" if joint else own, 1)
        return found
    if isinstance(layer, nn.Transformer):
        first = next(
            (key for key, _ in layer.named_parameters() if key.endswith("self_attn.out_proj.weight")), None
        )
        return {"d_model": (first, 0)} if first is not None else {}
    return {}


@contextmanager
def decoupled(model: nn.Module) -> Iterator[None]:
    """Attention layers run the code that they would have if they lost heads; afterwards they are as before.

    Args:
        model: any module.

    Yields:
        Nothing.
    """
    changed = [layer for layer in model.modules() if type(layer) is nn.MultiheadAttention]
    try:
        for layer in changed:
            layer.__class__ = DecoupledAttention
        yield
    finally:
        for layer in changed:
            layer.__class__ = nn.MultiheadAttention


def decouple(model: nn.Module) -> None:
    """Give attention layers whose sizes no longer follow from each other the class that allows it, in place.

    Args:
        model: any module.
    """
    for layer in model.modules():
        if type(layer) is not nn.MultiheadAttention:
            continue
        width, inner = layer.out_proj.weight.shape
        query = layer.q_proj_weight if layer.in_proj_weight is None else layer.in_proj_weight
        if {inner, query.shape[1], layer.embed_dim, layer.num_heads * layer.head_dim} != {width}:
            layer.__class__ = DecoupledAttention
    for stack in model.modules():
        if isinstance(
            stack, nn.TransformerEncoder
        ):  # padded inputs would be packed, which only PyTorch's code reads
            changed = any(isinstance(layer, DecoupledAttention) for layer in stack.modules())
            stack.use_nested_tensor = stack.use_nested_tensor and not changed
