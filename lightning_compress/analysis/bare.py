"""State dicts without their model: layers that hold the weights, and plain chains that can run again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_compress.pipelines.keys import unknown

_PREFIXES = ("module.", "_orig_mod.", "model.")
_LAYERS: dict[int, type[nn.Module]] = {2: nn.Linear, 3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_ACTIVATIONS: dict[str, Any] = {
    "tanh": torch.tanh,
    "relu": functional.relu,
    "sigmoid": torch.sigmoid,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "elu": functional.elu,
    "leaky_relu": functional.leaky_relu,
    "softplus": functional.softplus,
    "sin": torch.sin,
}
REBUILD = "mlp:"


def stripped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without ``module.``, ``_orig_mod.`` or ``model.`` in front of all names.

    Args:
        tensors: name -> tensor.

    Returns:
        The same tensors.

    Examples:
        >>> from lightning_compress.analysis.bare import stripped
        >>> list(stripped({"module.model.0.weight": torch.zeros(1), "module.model.0.bias": torch.zeros(1)}))
        ['0.weight', '0.bias']
    """
    found = dict(tensors)
    for prefix in _PREFIXES * len(_PREFIXES):
        if found and all(name.startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    return found


def holder(tensors: Mapping[str, Tensor]) -> nn.Module:
    """A model that has these tensors under their names and cannot run.

    A real ``weight`` of two axes is held by a Linear, of three to five by a convolution; everything else by modules
    without a type.

    Args:
        tensors: name -> tensor.

    Returns:
        The model in eval mode; its state dict has the same names.

    Examples:
        >>> from lightning_compress.analysis.bare import holder
        >>> net = holder({"fc.weight": torch.zeros(3, 2), "fc.bias": torch.zeros(3), "scale": torch.ones(1)})
        >>> net.fc, sorted(net.state_dict())
        (Linear(in_features=2, out_features=3, bias=True), ['fc.bias', 'fc.weight', 'scale'])
    """
    groups: dict[str, dict[str, Tensor]] = {"": {}}
    for name, tensor in tensors.items():
        path, _, last = name.rpartition(".")
        steps = path.split(".") if path else []
        for i in range(len(steps)):
            groups.setdefault(".".join(steps[: i + 1]), {})
        groups[path][last] = tensor
    modules = {path: _layer(held) for path, held in groups.items()}
    for path, module in modules.items():
        if path:
            parent, _, last = path.rpartition(".")
            modules[parent]._modules[last] = module
    return modules[""].eval()


class Chain(nn.Module):
    """Linear layers in a row with an activation between them, from the tensors of a state dict.

    Args:
        tensors: weights [out, in] and biases, in order.
        activation: "tanh", "relu", "sigmoid", "gelu", "silu", "elu", "leaky_relu", "softplus" or "sin".

    Raises:
        ValueError: an unknown activation; tensors that are none of such layers; shapes that do not chain.

    Examples:
        >>> from lightning_compress.analysis.bare import Chain
        >>> net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
        >>> x = torch.randn(3, 2)
        >>> torch.equal(Chain(net.state_dict(), "tanh")(x), net(x))
        True
    """

    def __init__(self, tensors: Mapping[str, Tensor], activation: str) -> None:
        super().__init__()
        if activation not in _ACTIVATIONS:
            raise ValueError(unknown(activation, _ACTIVATIONS, "rebuild='mlp:...': unknown activation"))
        self.activation = activation
        held = holder(tensors)
        if isinstance(held, nn.Linear):
            raise ValueError("rebuild='mlp:...' needs layers with names, such as '0.weight'.")
        self._modules.update(held._modules)
        self.chain = [name for name, module in self.named_modules() if isinstance(module, nn.Linear)]
        extra = set(tensors) - {f"{name}.{part}" for name in self.chain for part in ("weight", "bias")}
        if extra or not self.chain:
            raise ValueError(
                f"rebuild='mlp:{activation}' needs Linear layers alone, and {min(extra, default='nothing')} is none of "
                "one: pass model= instead."
            )
        for one, two in zip(self.chain, self.chain[1:], strict=False):
            out, into = self.get_submodule(one).out_features, self.get_submodule(two).in_features
            if out != into:
                raise ValueError(
                    f"rebuild='mlp:{activation}': {one} returns {out} features and {two} takes {into}, so they are no "
                    "chain of layers: pass model= instead."
                )
        self.eval()

    @property
    def in_features(self) -> int:
        """Features that it takes."""
        return int(self.get_submodule(self.chain[0]).in_features)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """The layers in order, the activation after all but the last.

        Args:
            x: [N, in].

        Returns:
            [N, out].
        """
        for name in self.chain:
            x = self.get_submodule(name)(x)
            x = x if name == self.chain[-1] else _ACTIVATIONS[self.activation](x)
        return x


def _layer(held: Mapping[str, Tensor]) -> nn.Module:
    """The module that holds these tensors of its own."""
    weight = held.get("weight")
    real = weight is not None and weight.is_floating_point()
    known = set(held) <= {"weight", "bias"} and real and weight is not None
    if known and weight is not None and weight.dim() in _LAYERS and 0 not in weight.shape:
        kind: Any = _LAYERS[weight.dim()]
        sizes = (weight.shape[1], weight.shape[0], *([tuple(weight.shape[2:])] if weight.dim() > 2 else []))
        module: nn.Module = kind(*sizes, bias="bias" in held, device="meta")
    else:
        module = nn.Module()
    for name, tensor in held.items():
        plain = tensor.detach().clone()
        if not (plain.is_floating_point() or plain.is_complex()) or name.startswith("running_"):
            module.register_buffer(name, plain)
        else:
            module._parameters[name] = nn.Parameter(plain)
    return module
