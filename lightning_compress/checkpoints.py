"""Weights from a checkpoint into a network: plain files of tensors, and the prefix found by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress import archive


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or does not fit; the message says what to do."""


def load_weights(
    model: nn.Module, source: str | Path | Mapping[str, Any], *, prefix: str | None = None
) -> nn.Module:
    """Load a checkpoint into a network: the network's own names, or the same behind one common prefix.

    A checkpoint fits with prefix p if it has ``p + name`` for every name in ``model.state_dict()``, and no other name
    that begins with p. In a checkpoint of the network itself p is empty; in one of a LightningModule p is the
    attribute that holds the network, such as ``net.``. Tensors that do not begin with p (losses, metrics, a teacher)
    are left out. The empty prefix comes first; among several others ``prefix`` must choose. BatchNorm's batch
    counters may be absent.

    Args:
        model: the network, changed in place, or on any error not at all.
        source: ``.safetensors``, ``.lcz``, or a file that ``torch.save`` wrote: a state dict or a Lightning checkpoint.
            No code in it is run. Or the state dict or checkpoint itself.
        prefix: p; found by itself if None.

    Returns:
        The model.

    Raises:
        ValueError: the file is not a checkpoint, or does not fit; the message names the tensors.
        ImportError: the file needs a package that is not installed.

    Examples:
        >>> import tempfile
        >>> net, path = nn.Linear(2, 1), tempfile.mkdtemp() + "/last.ckpt"
        >>> tensors = {f"net.{name}": tensor for name, tensor in net.state_dict().items()}
        >>> torch.save({"state_dict": tensors | {"loss.scale": torch.ones(1)}}, path)
        >>> torch.equal(load_weights(nn.Linear(2, 1), path).weight, net.weight)
        True
    """
    if isinstance(source, Mapping):
        path, found = "the given state dict", _tensors(source, "the given state dict")
    else:
        path = str(source)
        if path.endswith(".lcz"):
            return archive.load(path, into=model)
        found = read_tensors(source)
    own = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    needed = [name for name in own if not name.endswith("num_batches_tracked")]
    fitting = _prefixes(needed, found) if prefix is None else [prefix]
    if len(fitting) > 1 and "" not in fitting:
        raise CheckpointError(
            f"{path} holds {len(fitting)} such networks: choose with --prefix, one of {', '.join(fitting)}."
        )
    chosen = fitting[0] if fitting and "" not in fitting else ""
    inner = {name.removeprefix(chosen): tensor for name, tensor in found.items() if name.startswith(chosen)}
    _check_fit(f"{path} does not fit {type(model).__name__}", inner, own, needed)
    with torch.no_grad():
        for name, tensor in inner.items():
            own[name].copy_(tensor)
    return model


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name.

    Args:
        path: ``.safetensors``, or a file that ``torch.save`` wrote: a state dict, or a dict that holds one as
            ``state_dict``, ``model_state_dict`` or ``model``. No code in it is run.

    Returns:
        Name -> tensor on the CPU.

    Raises:
        ValueError: the file is not a checkpoint.
        ImportError: the file needs a package that is not installed.

    Examples:
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/net.pth"
        >>> torch.save({"model_state_dict": nn.Linear(2, 1).state_dict()}, path)
        >>> list(read_tensors(path))
        ['weight', 'bias']
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}.")
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise ImportError(
                f'{path} needs safetensors: pip install "lightning-compress[recipes]".'
            ) from None
        read: Callable[[Path], Any] = load_file
    else:
        read = _torch_load
    try:
        found = read(path)
    except (
        Exception
    ) as error:  # whatever a damaged file causes; PyTorch's own advice is to run the code in it
        raise CheckpointError(
            f"{path} cannot be read as tensors ({type(error).__name__}): give a state dict, a Lightning checkpoint "
            "or a .safetensors file; a pickled model is not opened, because that would run code from the file."
        ) from error
    return _tensors(found, str(path))


def _tensors(found: Any, path: str) -> dict[str, Tensor]:
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    tensors = {k: v for k, v in found.items() if isinstance(v, Tensor)} if isinstance(found, Mapping) else {}
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors by name: save model.state_dict(), not the model.")
    return tensors


def _torch_load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _prefixes(needed: Sequence[str], found: Mapping[str, Tensor]) -> list[str]:
    """Every prefix ("" or ending in a dot) behind which all needed names are found."""
    if not needed:
        return [""]
    candidates = {name.removesuffix(needed[0]) for name in found if f".{name}".endswith(f".{needed[0]}")}
    return sorted(p for p in candidates if all(p + name in found for name in needed))


def _check_fit(
    what: str, given: Mapping[str, Tensor], own: Mapping[str, Tensor], needed: Sequence[str]
) -> None:
    missing = [name for name in needed if name not in given]
    extra = [name for name in given if name not in own]
    if missing or extra:
        lacks = [f"it lacks {len(missing)} of {len(needed)} tensors ({missing[0]} ...)"] if missing else []
        lacks += [f"it has {len(extra)} that the network has not ({extra[0]} ...)"] if extra else []
        raise CheckpointError(f"{what}: {' and '.join(lacks)}. Is it the same architecture?")
    for name, tensor in given.items():
        if tensor.shape != own[name].shape:
            raise CheckpointError(
                f"{what}: {name} has shape {tuple(tensor.shape)}, in the network {tuple(own[name].shape)}."
            )
