"""Leaving units out: entries of the lists of neural operators, and modules that others take the place of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_compress.names import clean
from lightning_compress.pruning.operators import remember
from lightning_compress.pruning.units import BLOCKS, CODANO, is_a
from lightning_compress.spectral import is_spectral
from lightning_compress.targets import plain_class


class Bypass(nn.Module):
    """In place of a block that was left out: its first argument, whatever else it is given.

    Examples:
        >>> Bypass()(torch.ones(2), None, mask=3)
        tensor([1., 1.])
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The first argument."""
        return args[0] if args else next(iter(kwargs.values()))


class NoSpectral(nn.Module):
    """In place of a spectral convolution that was left out: zeros of the same shape, or what it is given, resampled.

    Args:
        layer: the spectral convolution.
        passes: whether the input goes through.

    Examples:
        >>> from neuralop.layers.spectral_convolution import SpectralConv
        >>> NoSpectral(SpectralConv(2, 3, (4, 4)), passes=False)(torch.ones(1, 2, 8, 8), output_shape=(6, 6)).shape
        torch.Size([1, 3, 6, 6])
    """

    def __init__(self, layer: Any, passes: bool) -> None:
        super().__init__()
        self.passes, self.out_channels = passes, layer.out_channels
        self.resolution_scaling_factor = layer.resolution_scaling_factor

    def forward(self, x: Tensor, output_shape: Sequence[int] | None = None) -> Tensor:
        """Zeros or the input, at the sizes that the layer had given back."""
        if self.passes:
            return self.transform(x, output_shape)
        sizes = tuple(x.shape[2:])
        if output_shape is not None:
            sizes = tuple(output_shape)
        elif self.resolution_scaling_factor is not None:
            sizes = tuple(
                round(n * factor) for n, factor in zip(sizes, self.resolution_scaling_factor, strict=True)
            )
        return x.new_zeros(x.shape[0], self.out_channels, *sizes)

    def transform(self, x: Tensor, output_shape: Sequence[int] | None = None) -> Tensor:
        """What the layer does to the input of a skip connection beside it."""
        from neuralop.layers.spectral_convolution import SpectralConv

        resampled: Tensor = SpectralConv.transform(self, x, output_shape)
        return resampled

    def extra_repr(self) -> str:
        """What it gives back."""
        return "the input" if self.passes else "zeros"


def drop(model: nn.Module, decided: Mapping[str, Mapping[str, Any]]) -> None:
    """Leave units out, in place.

    Args:
        model: any module.
        decided: unit name -> ``Unit.how``.

    Raises:
        ValueError: the model does not have such a unit, or no other would be left; nothing is changed then.
    """
    modules = {clean(name): module for name, module in model.named_modules(remove_duplicate=False)}
    entries: dict[nn.Module, list[int]] = {}
    others: dict[nn.Module, nn.Module] = {}
    for name, how in decided.items():
        if how.get("kind") == "entry":
            owner = modules.get(str(how.get("of")))
            _check_entry(name, owner, how)
            entries.setdefault(owner, []).append(how["index"])  # type: ignore[arg-type]
        else:
            others[modules.get(name, model)] = _substitute(name, modules.get(name), how)
    for owner, indices in entries.items():
        if len(set(indices)) != len(indices) or len(indices) >= owner.n_layers:  # type: ignore[operator]
            raise ValueError(
                f"the plan leaves out blocks {sorted(indices)} of {owner.n_layers}: one must stay, and each goes once."
            )
    for old, new in others.items():
        new.train(old.training)
        for parent in list(model.modules()):
            for child, module in parent._modules.items():
                if module is old:
                    parent._modules[child] = new
    for owner, indices in entries.items():
        for index in sorted(indices, reverse=True):
            (_drop_attention if is_a(owner, CODANO) else _drop_block)(model, owner, index)


def _check_entry(name: str, owner: Any, how: Mapping[str, Any]) -> None:
    known = owner is not None and (is_a(owner, BLOCKS) or is_a(owner, CODANO))
    index, layers = how.get("index"), how.get("layers")
    fits = known and type(index) is int and owner.n_layers == layers and 0 <= index < owner.n_layers
    if not fits:
        raise ValueError(
            f"the plan leaves out {name}, one of {layers} blocks, which this model does not have: "
            "apply it to the architecture it was made for."
        )


def _substitute(name: str, module: Any, how: Mapping[str, Any]) -> nn.Module:
    """What takes the place of a module."""
    kind, passes = how.get("kind"), bool(how.get("passes"))
    if module is not None and kind == "spectral" and is_spectral(module):
        fits = list(module.weight.shape) == list(how.get("shape", ()))
        if fits and (not passes or module.in_channels == module.out_channels):
            return NoSpectral(module, passes)
    named = module is not None and plain_class(module).__name__ == how.get("class")
    if named and kind in ("identity", "bypass"):
        return nn.Identity() if kind == "identity" else Bypass()
    raise ValueError(
        f"the plan leaves out {name} ({how.get('class', kind)}), which this model does not have: "
        "apply it to the architecture it was made for."
    )


def _drop_block(model: nn.Module, blocks: Any, index: int) -> None:
    """One entry of ``FNOBlocks``: of every list, and in the counts of the blocks and of the models that call them."""
    for name in ("convs", "fno_skips", "channel_mlp", "channel_mlp_skips"):
        if getattr(blocks, name, None) is not None:
            del getattr(blocks, name)[index]
    if blocks.norm is not None:
        del blocks.norm[blocks.n_norms * index : blocks.n_norms * (index + 1)]
    before = blocks.n_layers
    for owner in [m for m in model.modules() if blocks in m.children()] + [blocks]:
        if vars(owner).get("n_layers") != before:
            continue
        owner.n_layers = before - 1
        remember(owner, n_layers=before - 1)
        _shorten(owner, "resolution_scaling_factor", index)


def _drop_attention(model: nn.Module, codano: Any, index: int) -> None:
    """One attention layer of CODANO with its settings; the ends of skip connections are counted anew."""
    del codano.attention_layers[index]
    codano.n_layers -= 1
    remember(codano, n_layers=codano.n_layers)
    for name in ("n_modes", "n_heads", "per_layer_scale_factors", "attention_scalings"):
        _shorten(codano, name, index)
    if codano.horizontal_skips_map is not None:
        moved = {i: i - (i > index) for i in range(codano.n_layers + 1)}
        skips = codano.horizontal_skips_map.items()
        codano.horizontal_skips_map = {moved[end]: moved[start] for end, start in skips}
        if codano.use_horizontal_skip_connection:
            held = codano.skip_map_module.items()
            codano.skip_map_module = nn.ModuleDict({str(moved[int(end)]): m for end, m in held})


def _shorten(owner: Any, name: str, index: int) -> None:
    """Take one entry out of a list of settings, on a copy: users' own lists may be shared."""
    values = getattr(owner, name, None)
    if isinstance(values, list | tuple):
        setattr(owner, name, type(values)([*values[:index], *values[index + 1 :]]))
        remember(owner, **{name: getattr(owner, name)})
