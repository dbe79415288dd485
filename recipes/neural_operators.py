"""Train, compress and judge neural operators (FNO, TFNO, UNO, CODANO) at several resolutions.

    python recipes/neural_operators.py train --model fno --data darcy_16_32.npz --epochs 40
    python recipes/neural_operators.py prune --model fno --sparsity 0.5 --finetune-epochs 10
    python recipes/neural_operators.py factorize --model codano --rank-ratio 0.1
    python recipes/neural_operators.py quantize --model fno --checkpoint fno.pt --precision int8 --mode static
    python recipes/neural_operators.py combine --checkpoint fno.pt --params-ratio 0.5 --sparsity 0.5 --bits 4
    python recipes/neural_operators.py sweep prune --checkpoint fno.pt --data darcy_16_32.npz --sparsity 0.1 0.3 0.5

The verbs are download, train, evaluate, prune, factorize, drop-layers, truncate, quantize, combine and sweep;
``VERB --help`` lists the options of one. Without ``--data`` Darcy flow is generated (once; needs SciPy), without
``--checkpoint`` a small operator is trained first. ``combine`` factorizes, then trains on while zeros come along a
schedule and steps of grids are learned.

Measured on 25 Darcy test fields: relative L2 error in % at 16 / at 32, training at 16 on 1,000 fields (an ``.npz``
pack), FNO of 191,881 real numbers, seed 0, one run each:

                                                L2              file_bytes
    train --epochs 40 --lr 3e-3                  9.36 / 11.50      637,979
      neuraloperator's own Trainer, the same     9.41 / 11.47
    train --epochs 40 --lr 5e-4                 12.61 / 14.44      637,486
      neuraloperator's own Trainer, the same    12.50 / 14.33
    train --model codano --epochs 20 --lr 3e-3  12.74 / 14.85      392,910
      quantize --precision int8 --data-free     12.80 / 14.81      105,143
      quantize --precision int8                 12.75 / 14.84      105,123

From another checkpoint, trained for 40 epochs (9.04 / 10.97, 638,905 bytes, 767,524 as plain float32):

    quantize --precision int8 --data-free        9.05 / 10.97      172,297
    quantize --precision int8                    9.05 / 10.97      172,288
    quantize --precision int4                   10.10 / 11.67       85,782
      --finetune-epochs 10 --finetune-lr 1e-3    9.07 / 11.05       85,939
    prune --sparsity 0.5                        24.94 / 25.68      339,818
      --finetune-epochs 10 --finetune-lr 1e-3    9.16 / 11.24      339,296
    factorize --params-ratio 0.5                 9.15 / 11.16      314,774
      --no-activation-aware --scheme channel_in 24.95 / 25.79      314,968
    combine --params-ratio 0.6 --sparsity 0 --bits 8 --mode weight --scheme channel_in --finetune-epochs 0
                                                 9.09 / 11.04      109,072

40 epochs of the FNO take two to four minutes. Machine: 2 shared cores of an Intel Xeon at 2.1 GHz, CPU only. Python
3.11, torch 2.15.0, lightning 2.6.6, neuraloperator 2.0.0.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import lightning_compress as lc
from lightning_compress import plots
from lightning_compress.archive import dense_bytes
from lightning_compress.benchmark.evaluate import Evaluation, evaluate
from lightning_compress.checkpoints import load_weights
from lightning_compress.functional.darcy import darcy
from lightning_compress.metrics import RelativeH1Error, RelativeL2Error
from lightning_compress.quantization import parameter_groups
from lightning_compress.spectral import is_factorized, spectral_layers
from lightning_compress.tables import text

# -- data ----------------------------------------------------------------------------------------------------

Pairs = tuple[Tensor, Tensor]  # inputs and outputs, [N, 1, H, W] each


class Fields(NamedTuple):
    """Pairs to train on at one resolution, and to test on at several; outputs in physical units."""

    train: Pairs
    test: dict[int, Pairs]

    @property
    def mean(self) -> float:
        return float(self.train[1].mean())

    @property
    def std(self) -> float:
        return float(self.train[1].std())

    def loaders(self, batch_size: int = 25) -> dict[str, DataLoader]:
        return {str(size): DataLoader(TensorDataset(*pairs), batch_size) for size, pairs in self.test.items()}


def read(options: argparse.Namespace) -> Fields:
    """What ``--data`` names: a pack, a folder of neuraloperator's Darcy files, or "generate"."""
    if options.data == "generate":
        stored = packed(generated(options))
    elif Path(options.data).is_dir():
        stored = downloaded(options)
    elif Path(options.data).is_file():
        stored = packed(Path(options.data))
    else:
        raise SystemExit(
            f"--data {options.data}: no such file or folder. Give an .npz pack, a folder that the verb download "
            "filled, or --data generate."
        )
    sizes = sorted(stored["test"])
    if options.resolutions:
        sizes = sorted(options.resolutions)
    elif len(sizes) == 1 and sizes[0] % 4 == 0:
        sizes = [sizes[0] // 4, sizes[0] // 2, sizes[0]]
    able = [size for size in sizes if any(s % size == 0 for s in stored["train"])]
    train = options.train_resolution or min(able or stored["train"])
    return Fields(
        at(stored["train"], train, options.train_size),
        {size: at(stored["test"], size, options.test_size) for size in sizes},
    )


def at(stored: dict[int, tuple[np.ndarray, np.ndarray]], size: int, limit: int | None) -> Pairs:
    """The first pairs at a resolution: stored, or every so many points of the finest that allows it."""
    source = size if size in stored else max((s for s in stored if s % size == 0), default=None)
    if source is None:
        raise SystemExit(
            f"no fields at resolution {size}: the data has {sorted(stored)}; give one of these or a divisor."
        )
    every = slice(None, None, source // size)
    x, y = (
        torch.from_numpy(np.ascontiguousarray(v[:limit, every, every], np.float32))[:, None]
        for v in stored[source]
    )
    return x, y


def packed(path: Path) -> dict[str, dict[int, tuple[np.ndarray, np.ndarray]]]:
    """An .npz with ``x_train_16``, ``y_train_16``, ``x_test_16``, ... [N, 16, 16], or ``x_train``, ... of one size."""
    stored: dict[str, dict[int, tuple[np.ndarray, np.ndarray]]] = {"train": {}, "test": {}}
    with np.load(path) as pack:
        for key in pack:
            found = re.fullmatch(r"x_(train|test)((?:_\d+)?)", key)
            if found:
                x, y = pack[key], pack["y" + key[1:]]
                stored[found[1]][x.shape[-1]] = x, y
    if not (stored["train"] and stored["test"]):
        raise SystemExit(f"{path} holds no x_train..., y_train..., x_test..., y_test... of fields [N, H, W].")
    return stored


def generated(options: argparse.Namespace) -> Path:
    """Darcy flow from the library's own solver, as a pack in ``--root``; made once."""
    size, seed = max(options.resolutions or (32,)), options.seed
    counts = {"train": options.train_size or 200, "test": options.test_size or 50}
    path = options.root / f"darcy_{counts['train']}_{counts['test']}_{size}_seed{seed}.npz"
    if not path.exists():
        options.root.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(seed)
        pack = {}
        for part, count in counts.items():
            bar = tqdm(range(count), desc=f"Darcy flow {size} x {size}, {part}", delay=2)
            a, u = (
                torch.cat(v) for v in zip(*(darcy(1, size, generator=generator) for _ in bar), strict=True)
            )
            pack |= {f"x_{part}_{size}": (a == a.max()).numpy(), f"y_{part}_{size}": u.numpy()}
        if (
            size % 2 == 0 and not options.resolutions
        ):  # half of the default size is stored for its name's sake
            pack |= {key.replace(str(size), str(size // 2)): v[:, ::2, ::2] for key, v in pack.items()}
        np.savez_compressed(path, **pack)
    return path


def downloaded(options: argparse.Namespace) -> dict[str, dict[int, tuple[np.ndarray, np.ndarray]]]:
    """The files of the verb ``download``, through neuraloperator's own loader."""
    from neuralop.data.datasets import DarcyDataset

    folder = Path(options.data)
    sizes = sorted(int(f.stem.rpartition("_")[2]) for f in folder.glob("darcy_test_*.pt"))
    stored: dict[str, dict[int, tuple[np.ndarray, np.ndarray]]] = {"train": {}, "test": {}}
    for size in sizes:
        everything = {"n_train": options.train_size or 1000, "n_tests": [options.test_size or 100]}
        resolution = {"train_resolution": size, "test_resolutions": [size]}
        batches = {"batch_size": 1, "test_batch_sizes": [1]}
        data = DarcyDataset(
            folder, **everything, **resolution, **batches, encode_output=False, download=False
        )
        for part, pairs in (("train", data.train_db), ("test", data.test_dbs[size])):
            stored[part][size] = pairs.x[:, 0].numpy(), pairs.y[:, 0].numpy()
    if not sizes:
        raise SystemExit(f"{folder} holds no darcy_test_*.pt: run the verb download with --root {folder}.")
    return stored


def download(options: argparse.Namespace) -> None:
    """Fetch neuraloperator's Darcy files into ``--root`` and look whether they are whole."""
    from neuralop.data.datasets import DarcyDataset

    sizes = sorted(options.resolutions or (16, 32, 64, 128))
    try:
        DarcyDataset(options.root, 1, [1] * len(sizes), 1, [1] * len(sizes), sizes[0], sizes)
    except (OSError, AssertionError, RuntimeError) as error:  # requests' errors are OSErrors
        raise SystemExit(
            f"neuraloperator could not fetch its Darcy files ({type(error).__name__}: {error}). Without a network use "
            "--data FILE (an .npz pack) or --data generate."
        ) from error
    rows = []
    for size in sizes:
        for part in ("train", "test"):
            file = options.root / f"darcy_{part}_{size}.pt"
            fields = torch.load(file, weights_only=True)
            x, y = fields["x"], fields["y"]
            if not x.shape == y.shape == (len(x), size, size) or not bool(y.isfinite().all()):
                raise SystemExit(
                    f"{file} holds x {tuple(x.shape)} and y {tuple(y.shape)}: delete it, try again."
                )
            rows.append([file.name, len(x), size, file.stat().st_size])
    print(text(["file", "pairs", "size", "bytes"], rows))
    print(f"Use them with --data {options.root}")


# -- models --------------------------------------------------------------------------------------------------


def build(config: dict[str, Any]) -> nn.Module:
    """A fresh operator."""
    sizes = {
        "n_modes": config["n_modes"],
        "hidden_channels": config["width"],
        "n_layers": config["layers"],
    }
    rank = {"rank": config["rank"]} if config["model"] == "tfno" else {}
    return lc.models.build(config["model"], **sizes, **rank)


class LitOperator(LightningModule):
    """An operator that is trained on normalized outputs with the relative L2 error; AdamW, cosine learning rate.

    Args:
        net: the operator.
        fields: what it is trained and validated on.
        options: lr, weight_decay, batch_size, augment.
    """

    def __init__(self, net: nn.Module, fields: Fields, options: argparse.Namespace) -> None:
        super().__init__()
        self.net, self.fields, self.options = net, fields, options
        self.mean, self.std = fields.mean, fields.std
        self.example_input_array = fields.train[0][:1]

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Pairs, batch_idx: int) -> Tensor:
        x, y = batch
        if self.options.augment == "transpose":  # x and y change places: on a square, a solution again
            swapped = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5
            x, y = (torch.where(swapped, v.mT, v) for v in (x, y))
        loss = relative_l2(self(x), (y - self.mean) / self.std)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Pairs, batch_idx: int, dataloader_idx: int = 0) -> None:
        error = relative_l2(self(batch[0]) * self.std + self.mean, batch[1])
        name = f"val_l2_{list(self.fields.test)[dataloader_idx]}"
        self.log(name, error, prog_bar=True, add_dataloader_idx=False, batch_size=len(batch[0]))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(*self.fields.train), self.options.batch_size, shuffle=True)

    def val_dataloader(self) -> list[DataLoader]:
        return list(self.fields.loaders().values())

    def configure_optimizers(self) -> dict[str, Any]:
        # Learned quantization steps should not decay, and Adam moves them by the learning rate whatever their size.
        steps, others = parameter_groups(self)
        groups = [{"params": others}, {"params": steps, "weight_decay": 0.0, "lr": self.options.lr / 100}]
        optimizer = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=self.options.lr, weight_decay=self.options.weight_decay
        )
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, self.trainer.estimated_stepping_batches, eta_min=1e-6
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}


def relative_l2(prediction: Tensor, y: Tensor) -> Tensor:
    error, size = ((v.flatten(1)).norm(dim=1) for v in (prediction - y, y))
    return (error / size).mean()


def fit(lit: LitOperator, epochs: int, name: str, callbacks: Sequence[Callback] = ()) -> None:
    out = lit.options.output_dir
    monitor = lc.CompressionMonitor(every_n_epochs=max(1, epochs // 4))
    Trainer(
        max_epochs=epochs,
        callbacks=[*callbacks, monitor],
        logger=[CSVLogger(out, name=f"{name}_csv"), TensorBoardLogger(out, name=f"{name}_tensorboard")],
        enable_checkpointing=False,
        log_every_n_steps=10,
        default_root_dir=out,
        accelerator=lit.options.accelerator,
    ).fit(lit)
    lit.cpu()


# -- trained operators ---------------------------------------------------------------------------------------


class Trained(NamedTuple):
    """An operator, what it was built from, and how its outputs become physical: ``std * output + mean``."""

    net: nn.Module
    config: dict[str, Any]
    mean: float
    std: float

    def physical(self, y: Tensor) -> Tensor:
        return y * self.std + self.mean


def trained(options: argparse.Namespace, fields: Fields) -> Trained:
    """The checkpoint, or an operator trained now.

    A JSON file beside the checkpoint (``train`` and the other verbs write one) says how to build the operator and how
    its outputs were normalized; without one, the options and the training data do.
    """
    if not options.checkpoint:
        return train(options, fields)
    described = options.checkpoint.with_suffix(".json")
    known = json.loads(described.read_text()) if described.is_file() else {}
    config = known.get("config", configuration(options))
    net = load_weights(build(config), options.checkpoint).eval()
    return Trained(net, config, known.get("mean", fields.mean), known.get("std", fields.std))


def configuration(options: argparse.Namespace) -> dict[str, Any]:
    config = {"model": options.model, "width": options.width or WIDTHS[options.model]}
    layers = options.layers or LAYERS[options.model]
    return config | {"n_modes": options.n_modes, "layers": layers, "rank": options.rank}


WIDTHS = {"fno": 24, "tfno": 24, "uno": 16, "codano": 8}
LAYERS = {"fno": 4, "tfno": 4, "uno": 4, "codano": 2}


def train(options: argparse.Namespace, fields: Fields) -> Trained:
    config = configuration(options)
    seed_everything(options.seed, workers=True, verbose=False)
    lit = LitOperator(build(config), fields, options)
    fit(lit, options.epochs, options.model)
    result = Trained(lit.net.eval(), config, lit.mean, lit.std)
    file = options.output_dir / f"{options.model}.pt"
    tensors = {k: v for k, v in result.net.state_dict().items() if isinstance(v, Tensor)}
    torch.save(tensors, file)
    write(file, result, options, evaluated(result.net, result, fields))
    return result


def evaluated(
    net: nn.Module, original: Trained, fields: Fields, baseline: nn.Module | None = None
) -> Evaluation:
    """Errors in physical units at all resolutions; timed with one thread, where other work disturbs least."""
    metrics = {"L2": RelativeL2Error(dims=2), "H1": RelativeH1Error(dims=2)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return evaluate(
            net, fields.loaders(), metrics, baseline=baseline, postprocess=original.physical, runs=10
        )
    finally:
        torch.set_num_threads(threads)


def write(file: Path, original: Trained, options: argparse.Namespace, result: Evaluation) -> None:
    """The JSON beside a checkpoint or archive: how to read it, how it was made, how good it is."""
    asked = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if not callable(v)}
    known = {"config": original.config, "mean": original.mean, "std": original.std, "options": asked}
    known |= {"compression_ratio": compression_ratio(original, result)}
    file.with_suffix(".json").write_text(json.dumps(known | {"evaluation": result.to_json()}, indent=2))


# -- methods -------------------------------------------------------------------------------------------------


def which(options: argparse.Namespace, names: Sequence[str]) -> dict[str, list[str]]:
    """Patterns of ``--include``, or these, and of ``--exclude``."""
    return {"include": list(options.include or names), "exclude": list(options.exclude)}


def given(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The options among these that were given, and that the verb has."""
    return {name: value for name in names if (value := getattr(options, name, None)) is not None}


def prune(options: argparse.Namespace, net: nn.Module) -> list[lc.Transform]:
    where = which(options, list(spectral_layers(net)))
    return [lc.Prune(options.sparsity, criterion=options.criterion, scope=options.scope, **where)]


def factorize(options: argparse.Namespace, net: nn.Module) -> list[lc.Transform]:
    how = given(options, "rank_ratio", "energy_ratio", "params_ratio", "budget") or {"rank_ratio": 0.5}
    if "budget" in how:
        how["budget"] = tuple(how["budget"])
    how |= given(options, "scheme", "activation_aware", "real_channel", "damping")
    where = which(options, list(spectral_layers(net)))
    return [*merged(net, where), lc.Factorize(**how, **where)]


def merged(net: nn.Module, where: dict[str, list[str]], growing: bool = True) -> list[lc.Transform]:
    """Neuraloperator's factors (of TFNO and CODANO) as one weight: all, or where they store as many numbers as it."""
    held = []
    for name, layer in spectral_layers(net, **where).items():
        if is_factorized(layer):
            stored = sum(p.numel() for p in layer.weight.parameters())
            if growing or math.prod(layer.weight.shape) <= stored:
                held.append(name)
    return [lc.MergeFactors(include=held)] if held else []


def drop_layers(options: argparse.Namespace, net: nn.Module) -> list[lc.Transform]:
    how = given(options, "ratio", "count")
    if options.names:
        how = {"layers": tuple(options.names)}
    return [
        lc.DropLayers(
            options.unit, **how or {"ratio": 0.25}, criterion=options.criterion, **which(options, ["*"])
        )
    ]


def truncate(options: argparse.Namespace, net: nn.Module) -> list[lc.Transform]:
    how = given(options, "keep_ratio", "energy_ratio") or {"keep_ratio": 0.5}
    if options.modes:
        how = {"modes": tuple(options.modes)}
    return [lc.TruncateModes(**how, **which(options, ["*"]))]


def quantize(options: argparse.Namespace, net: nn.Module) -> list[lc.Transform]:
    """Once for each weight: CODANO's Tucker factors of full rank are as large as their product, and are merged."""
    if options.precision == "fp32":
        return []
    where = which(options, ["*"])
    return [*merged(net, where, growing=False), rounded(options, where)]


def rounded(options: argparse.Namespace, where: dict[str, list[str]]) -> lc.Transform:
    """Floats, and ``--mode weight``, round weights only; activations never get fewer than 8 bits."""
    if not options.precision.startswith("int"):
        return lc.Quantize(format=options.precision, **where)
    bits = int(options.precision.removeprefix("int"))
    activations: dict[str, Any] = {}
    if options.mode != "weight":
        activations = {"activation_bits": max(bits, 8), "mode": options.mode}
        activations |= {"activation_calibrator": options.activation_calibrator}
    weights = {"granularity": options.granularity, "calibrator": options.calibrator}
    return lc.Quantize(bits, **weights, **activations, **where)


def combine(options: argparse.Namespace, net: nn.Module) -> list[lc.Transform]:
    """Low rank, zeros in what is left, few bits; ``--include`` is for the first two."""
    everywhere = {"include": ["*"], "exclude": list(options.exclude)}
    zeros = prune(options, net) if options.sparsity else []
    return [*factorize(options, net), *zeros, rounded(options, everywhere)]


class Verb(NamedTuple):
    """A method: its transforms, and the options that say how strong it is, one of which a sweep takes."""

    transforms: Callable[[argparse.Namespace, nn.Module], list[lc.Transform]]
    strengths: tuple[str, ...] = ()
    finetune_epochs: int = 0


VERBS = {
    "prune": Verb(prune, ("sparsity",)),
    "factorize": Verb(factorize, ("rank_ratio", "energy_ratio", "params_ratio")),
    "drop-layers": Verb(drop_layers, ("ratio", "count")),
    "truncate": Verb(truncate, ("keep_ratio", "energy_ratio")),
    "quantize": Verb(quantize, ("precision",)),
    "combine": Verb(combine, finetune_epochs=20),
}


def transforms(options: argparse.Namespace, original: Trained) -> list[lc.Transform]:
    partial = [lc.PartialFourier()] if options.partial_fourier else []
    return [*VERBS[options.method].transforms(options, original.net), *partial]


def compressed(
    options: argparse.Namespace, original: Trained, fields: Fields, todo: Sequence[lc.Transform]
) -> Any:
    """Post-training, with calibration inputs from the training fields or (``--data-free``) like one of them."""
    x = fields.train[0]
    data = None if options.data_free else x[:256]
    return lc.compress(original.net, todo, example_input=x[:1], data=data, seed=options.seed)


def finetuned(options: argparse.Namespace, original: Trained, fields: Fields) -> nn.Module:
    """Train on what the structural methods left, while zeros come along a schedule and steps of grids are learned."""
    todo = transforms(options, original)
    gradual = [t for t in todo if isinstance(t, lc.Prune | lc.Quantize)]
    before = [t for t in todo if t not in gradual]
    net = compressed(options, original, fields, before).model if before else copy.deepcopy(original.net)
    callbacks: list[Callback] = []
    for transform in gradual:
        where = {k: [f"net.{p}" for p in getattr(transform, k)] for k in ("include", "exclude")}
        asked = dataclasses.replace(transform, **where)  # the operator is the LightningModule's net
        if isinstance(asked, lc.Prune):
            callbacks.append(lc.ScheduledPruning(asked, begin=0.0, end=0.5, every=5))
        else:
            callbacks.append(lc.QuantizationAwareTraining(transform=asked, method="lsq"))
    stages = [(options.finetune_epochs, options.finetune_lr, callbacks)]
    if options.warm_epochs:  # first without zeros and grids
        stages.insert(0, (options.warm_epochs, options.warm_lr, []))
    for epochs, lr, given in stages:
        again = argparse.Namespace(**vars(options) | {"lr": lr})
        seed_everything(options.seed, workers=True, verbose=False)
        lit = LitOperator(net.train(), fields, again)
        fit(lit, epochs, options.method, given)
        net = lc.finalize(lit).net
    return net


def run(options: argparse.Namespace) -> None:
    """Compress once, and show the original, the compressed and the fine-tuned operator."""
    fields = read(options)
    original = trained(options, fields)
    result = compressed(options, original, fields, transforms(options, original))
    print(result.coverage)
    keep(result.model, options.method, original, options, fields)
    if options.finetune_epochs:
        better = finetuned(options, original, fields)
        keep(better, f"{options.method}_finetuned", original, options, fields)


def keep(
    net: nn.Module, name: str, original: Trained, options: argparse.Namespace, fields: Fields
) -> Evaluation:
    """Judge against the original, print, write the archive and its description."""
    result = evaluated(net, original, fields, original.net)
    file = options.output_dir / f"{original.config['model']}_{name.replace('-', '_')}.lcz"
    lc.save(net, file)
    write(file, original, options, result)
    smaller = f"{compression_ratio(original, result):.2f} x smaller than its numbers as float32"
    print(f"\n{name}: {file}, {smaller}\n{result}")
    return result


def compression_ratio(original: Trained, result: Evaluation) -> float:
    """Bytes of the original's numbers as float32 over bytes of the archive."""
    return dense_bytes(original.net) / result.rows[0].file_bytes


def sweep(options: argparse.Namespace) -> None:
    """One method at several strengths: a table and a figure of what is lost and what is saved."""
    fields = read(options)
    original = trained(options, fields)
    key = next(iter(given(options, *VERBS[options.method].strengths)))
    strengths = getattr(options, key)
    results = []
    for strength in strengths:
        once = argparse.Namespace(**vars(options) | {key: strength})
        net = compressed(once, original, fields, transforms(once, original)).model
        name = f"{options.method}_{strength}"
        results.append(keep(net, name, original, once, fields))
        if options.finetune_epochs:
            better = finetuned(once, original, fields)
            keep(better, f"{name}_finetuned", original, once, fields)
    sizes = list(fields.loaders())
    header = [key, *(f"{m} % at {s}" for s in sizes for m in ("L2", "H1")), "file_bytes", "macs", "x smaller"]
    table = [
        [
            s,
            *(100 * r[n].errors[m] for n in sizes for m in ("L2", "H1")),
            r[sizes[0]].file_bytes,
            r[sizes[0]].macs,
            compression_ratio(original, r),
        ]
        for s, r in zip(strengths, results, strict=True)
    ]
    base = [results[0][n].baseline for n in sizes]
    errors = [100 * row.errors[m] for row in base for m in ("L2", "H1")]
    ratio = dense_bytes(original.net) / base[0].file_bytes
    print("\n" + text(header, [["original", *errors, base[0].file_bytes, base[0].macs, ratio], *table]))
    print(f"\nfigure: {figure(options, key, strengths, results, sizes)}")


def figure(
    options: argparse.Namespace, key: str, strengths: list[Any], results: list[Evaluation], sizes: list[str]
) -> Path:
    """Two by two panels over the strength, a curve for each resolution."""
    quantities = {
        "change of relative L2 error, %": lambda row: 100 * row.change("L2"),
        "file_bytes": lambda row: row.file_bytes,
        "peak_memory_bytes": lambda row: row.peak_memory_bytes,
        "MACs per sample": lambda row: row.macs,
    }
    panels = {
        title: {f"{n} x {n}": [of(result[n]) for result in results] for n in sizes}
        for title, of in quantities.items()
    }
    axes = plots.trade_off(strengths, panels, key)
    path = options.output_dir / f"sweep_{options.method.replace('-', '_')}.png"
    axes[0].figure.savefig(path, dpi=150)
    return path


def evaluate_verb(options: argparse.Namespace) -> None:
    fields = read(options)
    found = trained(options, fields)
    base = None
    if options.baseline:
        base = trained(argparse.Namespace(**vars(options) | {"checkpoint": options.baseline}), fields).net
    result = evaluated(found.net, found, fields, base)
    print(result)
    write(options.output_dir / f"{found.config['model']}_evaluated", found, options, result)


def train_verb(options: argparse.Namespace) -> None:
    fields = read(options)
    result = train(options, fields)
    print(evaluated(result.net, result, fields))


# -- command line --------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = top.add_subparsers(dest="verb", required=True)
    simple = {"download": download, "train": train_verb, "evaluate": evaluate_verb}
    for name, do in simple.items():
        verb = verbs.add_parser(name, help=do.__doc__)
        common(verb)
        verb.set_defaults(do=do)
        if name == "evaluate":
            verb.add_argument("--baseline", type=Path, help="another checkpoint, to compare with")
    sweeps = verbs.add_parser("sweep", help=sweep.__doc__).add_subparsers(dest="method", required=True)
    for name, method in VERBS.items():
        for parent, do in ((verbs, run), (sweeps, sweep))[: 2 if method.strengths else 1]:
            verb = parent.add_parser(name)
            common(verb)
            compressing(verb)
            group = verb.add_mutually_exclusive_group(required=parent is sweeps) if method.strengths else verb
            strength, instead = group.add_argument, group.add_argument
            if parent is sweeps:
                strength, instead = partial(group.add_argument, nargs="+"), lambda *names, **options: None
            OPTIONS[name](verb.add_argument, strength, instead)
            verb.set_defaults(do=do, method=name, finetune_epochs=method.finetune_epochs)
    return top


def common(verb: argparse.ArgumentParser) -> None:
    add = verb.add_argument
    add("--model", "--model-type", choices=list(WIDTHS), default="fno")
    add("--checkpoint", type=Path, help=".pt, .safetensors, .ckpt or .lcz; left out, one is trained")
    add("--data", default="generate", help=".npz pack, folder of the verb download, or generate")
    add("--root", type=Path, default=Path("data"), help="where downloaded and generated fields lie")
    add("--resolutions", type=int, nargs="+", help="grid points per side to evaluate at")
    add("--train-resolution", type=int, help="default: the smallest of them")
    add("--train-size", type=int, help="so many training pairs")
    add("--test-size", type=int, help="so many test pairs")
    add("--width", type=int, help=f"channels; default {WIDTHS}")
    add("--n-modes", type=int, nargs="+", default=[8, 8], help="frequencies per axis")
    add("--layers", type=int, help=f"default {LAYERS}")
    add("--rank", type=float, default=0.5, help="of TFNO's weights")
    add("--epochs", type=int, default=40)
    add("--batch-size", type=int, default=32)
    add("--lr", type=float, default=5e-4)
    add("--weight-decay", type=float, default=1e-4)
    add("--augment", choices=["none", "transpose"], default="none", help="while training; for square domains")
    add("--accelerator", default="cpu", help="Lightning's: cpu, gpu, auto")
    add("--seed", type=int, default=0)
    add("--output-dir", type=Path, default=Path("outputs/neural_operators"))


def compressing(verb: argparse.ArgumentParser) -> None:
    add = verb.add_argument
    add("--finetune-epochs", type=int, default=0)
    add("--finetune-lr", type=float, default=5e-4)
    add("--warm-epochs", type=int, default=0, help="before those: what structural methods left, nothing else")
    add("--warm-lr", type=float, default=3e-3)
    add("--include", nargs="+", help="patterns of layer names; default: spectral layers, for quantize all")
    add("--exclude", nargs="+", default=())
    add("--data-free", action="store_true", help="calibrate with drawn inputs like one field")
    add("--partial-fourier", action="store_true", help="also compute kept frequencies only (exact, faster)")


# Of one verb: ``strength`` adds what a sweep takes several of, ``instead`` other ways to say it, which a sweep lacks.
Add = Callable[..., Any]


def prune_options(add: Add, strength: Add, instead: Add) -> None:
    strength("--sparsity", type=float, default=0.5)
    ranking(add)


def factorize_options(add: Add, strength: Add, instead: Add) -> None:
    for name in ("--rank-ratio", "--energy-ratio", "--params-ratio"):
        strength(name, type=float)
    instead(
        "--budget", type=share, nargs=2, metavar=("UNIT", "SHARE"), help="of params, macs or rank, all layers"
    )
    low_rank(add)


def drop_options(add: Add, strength: Add, instead: Add) -> None:
    strength("--ratio", type=float, help="default 0.25")
    strength("--count", type=int)
    instead("--names", nargs="+", help="the units to leave out")
    add("--unit", default="block", choices=["block", "spectral", "layer"])
    add("--criterion", default="bypass_error")


def truncate_options(add: Add, strength: Add, instead: Add) -> None:
    strength("--keep-ratio", type=float, help="of the modes of each axis; default 0.5")
    strength("--energy-ratio", type=float)
    instead("--modes", type=int, nargs="+", help="kept along each axis, as in the constructor")


def quantize_options(add: Add, strength: Add, instead: Add) -> None:
    strength("--precision", type=precision, default="int8", help="fp32 fp16 bf16 int2 ... int16")
    rounding(add)


def combine_options(add: Add, strength: Add, instead: Add) -> None:
    add("--params-ratio", type=float, default=0.5)
    add("--sparsity", type=float, default=0.5)
    add("--bits", type=lambda bits: precision(f"int{bits}"), dest="precision", default="4", metavar="BITS")
    for of in (low_rank, ranking, rounding):
        of(add)


def ranking(add: Add) -> None:
    add("--scope", default="global", choices=["global", "layer", "row"])
    add("--criterion", default="magnitude")


def low_rank(add: Add) -> None:
    add("--scheme", default="auto", help="channel_in, channel_out, channel, modes, tucker, cp, tt or auto")
    add("--activation-aware", action=argparse.BooleanOptionalAction, default=True, help="best for outputs")
    add("--real-channel", action="store_true", help="real channel factors, which need fewer transforms")
    add("--damping", type=float, default=1e-2, help="of the inputs' Gram matrix, in mean eigenvalues")


def rounding(add: Add) -> None:
    add("--mode", default="static", choices=["static", "dynamic", "weight"])
    add("--granularity", default="per_channel")
    add("--calibrator", default="mse")
    add("--activation-calibrator", default="mse")


def share(word: str) -> str | float:
    return word if word in ("params", "macs", "rank") else float(word)


def precision(name: str) -> str:
    if name not in ("fp32", "fp16", "bf16", *(f"int{bits}" for bits in range(2, 17))):
        raise argparse.ArgumentTypeError(f"{name!r}: allowed are fp32, fp16, bf16 and int2 to int16")
    return name


OPTIONS = {
    "prune": prune_options,
    "factorize": factorize_options,
    "drop-layers": drop_options,
    "truncate": truncate_options,
    "quantize": quantize_options,
    "combine": combine_options,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a verb; options may be written with underscores too."""
    asked = sys.argv[1:] if argv is None else argv
    options = parser().parse_args([re.sub(r"^--[^=]+", lambda m: m[0].replace("_", "-"), a) for a in asked])
    options.output_dir.mkdir(parents=True, exist_ok=True)
    seed_everything(options.seed, workers=True, verbose=False)
    options.do(options)


if __name__ == "__main__":
    main()
