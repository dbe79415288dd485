"""Images and labels to measure classifiers on: an .npz file, or a data set of torchvision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress.cli.networks import InputError
from lightning_compress.tables import listing

SPLITS = ("test", "train")
_DIGITS = (0.1307,), (0.3081,)
_NORMAL = {  # mean and standard deviation of the channels
    "mnist": _DIGITS,
    "qmnist": _DIGITS,
    "emnist": _DIGITS,  # as for networks that were trained on MNIST
    "cifar10": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
DATASETS = tuple(_NORMAL)


def dataset_options(parser: ArgumentParser) -> None:
    """Add the options that `loader` reads."""
    parser.add_argument("--dataset", default="mnist", help=", ".join(DATASETS))
    parser.add_argument("--split", default="test", help=", ".join(SPLITS))
    parser.add_argument(
        "--data",
        required=True,
        help="an .npz file with x_test, y_test, x_train and y_train; or a folder with the data set of torchvision",
    )
    parser.add_argument("--download", action="store_true", help="let torchvision fetch it into that folder")
    parser.add_argument("--limit", type=int, help="only the first so many images")
    parser.add_argument("--mean", type=float, nargs="+", help="of the channels, in place of the usual ones")
    parser.add_argument("--std", type=float, nargs="+", help="likewise")
    parser.add_argument("--batch_size", type=int, default=500, help="images at a time")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that load images")


def loader(options: Namespace) -> DataLoader[tuple[Tensor, ...]]:
    """Batches of normalized images (N, C, H, W) and labels, in order."""
    for name, allowed in (("dataset", DATASETS), ("split", SPLITS)):
        if options[name] not in allowed:
            raise InputError(f"--{name} {options[name]}: allowed are {', '.join(allowed)}.")
    if options.batch_size < 1 or options.num_workers < 0 or (options.limit is not None and options.limit < 1):
        raise InputError(
            f"--batch_size {options.batch_size}, --num_workers {options.num_workers}, --limit {options.limit}: allowed "
            "are a batch size and a limit >= 1, and workers >= 0."
        )
    file = Path(options.data)
    images, labels = _pack(file, options.split) if file.is_file() else _torchvision(file, options)
    x, y = torch.from_numpy(_planes(images[: options.limit])), torch.from_numpy(labels[: options.limit])
    mean, std = (
        torch.tensor(given or usual)
        for given, usual in zip((options.mean, options.std), _NORMAL[options.dataset], strict=True)
    )
    if {len(mean), len(std)} - {1, x.shape[1]}:
        raise InputError(
            f"--dataset {options.dataset}: {len(mean)} means and {len(std)} standard deviations for {x.shape[1]} "
            "channels: give --mean and --std with one for each."
        )
    x = (x.float() / 255 - mean[:, None, None]) / std[:, None, None]
    return DataLoader(
        TensorDataset(x, y.long()), options.batch_size, num_workers=options.num_workers, shuffle=False
    )


def _pack(file: Path, split: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    try:
        pack = np.load(file, allow_pickle=False)
        if not isinstance(pack, np.lib.npyio.NpzFile):
            raise ValueError("it holds one array")
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"--data {file} is no .npz file: {error}") from error
    with pack:
        lacking = [name for name in (f"x_{split}", f"y_{split}") if name not in pack]
        if lacking:
            held = listing(list(pack)) or "nothing"
            raise InputError(f"--data {file} lacks {' and '.join(lacking)}; it has {held}.")
        images, labels = pack[f"x_{split}"], pack[f"y_{split}"]
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or labels.shape != images.shape[:1]:
        raise InputError(
            f"--data {file}: images {images.dtype} {images.shape} and labels {labels.shape}; needed are uint8 images "
            "(N, H, W), (N, H, W, 3) or (N, C, H, W), and a label for each."
        )
    return images, labels.astype(np.int64)


def _torchvision(folder: Path, options: Namespace) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    try:
        from torchvision import datasets
    except ImportError:
        raise ImportError(
            f"--data {folder} is no .npz file, and data sets need torchvision: pip install "
            "'lightning-compress[vision]'."
        ) from None
    name, shared = options.dataset, {"train": options.split == "train", "download": options.download}
    makers: dict[str, Callable[[], Any]] = {
        "mnist": lambda: datasets.MNIST(folder, **shared),
        "qmnist": lambda: datasets.QMNIST(folder, **shared),
        "emnist": lambda: datasets.EMNIST(folder, split="digits", **shared),
        "cifar10": lambda: datasets.CIFAR10(folder, **shared),
    }
    if not folder.is_dir() and not options.download:
        raise InputError(
            f"--data {folder} is no file and no folder: give an .npz file, or the folder of torchvision's {name}."
        )
    try:
        found = makers[name]()
    except RuntimeError as error:  # not there
        raise InputError(
            f"--data {folder} has no {name} of torchvision ({error}): add --download."
        ) from error
    images, labels = np.asarray(found.data), np.asarray(found.targets)
    if name == "emnist":  # stored with rows and columns exchanged
        images = images.transpose(0, 2, 1)
    return images, (labels[:, 0] if labels.ndim == 2 else labels).astype(np.int64)


def _planes(images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """(N, C, H, W)."""
    if images.ndim == 3:
        images = images[:, None]
    elif images.shape[-1] == 3:
        images = images.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(images)
