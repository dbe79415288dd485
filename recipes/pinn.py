"""Train a physics-informed network on Burgers' equation, and make it smaller without any data.

    python recipes/pinn.py --data pinn_references.npz

``u_t + u u_x = (0.01 / pi) u_xx`` on x in [-1, 1], t in [0, 1], with u(x, 0) = -sin(pi x) and u(-1, t) = u(1, t) = 0: a
sine wave that steepens into a shock. The network sees the equation only, never a solution. What compresses it draws
points of the domain and compares with the network's own answers. The file of ``--data`` holds a reference solution
(``burgers_x``, ``burgers_t``, ``burgers_u``; M. Raissi's); errors to it are relative L2 over its grid.

Measured, relative L2 to the network on 4,096 other points, and to the reference:

                         parameters  file_bytes  to the network  to the reference
    network                  16,705      55,590   0.00 %          0.69 %
    8 bits                   16,705      18,261   0.18 %          0.69 %
    6 bits                   16,705      14,065   0.80 %          0.97 %
    4 bits                   16,705       9,770   4.73 %          4.69 %
    50 % zeros               16,705      28,940  13.86 %         13.93 %
    80 % zeros               16,705      12,942  31.23 %         31.54 %
    student 25 %              4,257      14,812   1.50 %          1.77 %
    student 25 %, 8 bits      4,257       5,657   1.55 %          1.78 %
    student 10 %              1,701       6,210   2.37 %          2.59 %
    student 10 %, 8 bits      1,701       2,754   2.48 %          2.69 %
    student 5 %                 883       3,475   3.30 %          3.48 %
    student 5 %, 8 bits         883       1,771   3.35 %          3.52 %

2,500 steps of 1,024 points trained the network, 1,500 of 256 each student, which began with random weights at 99 % to
101 %. One run, seed 0. Machine: 2 shared cores of an Intel Xeon at 2.1 GHz, CPU only, beside ten other processes, where
the network took 12 minutes and a student one. Python 3.11, torch 2.15.0, lightning 2.6.6.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

import lightning_compress as lc
from lightning_compress import tables
from lightning_compress.distillation.datafree import DataFreeDistillation
from lightning_compress.distillation.result import compare
from lightning_compress.stats.samplers import synthesize

VISCOSITY = 0.01 / math.pi
DOMAIN = [(-1.0, 1.0), (0.0, 1.0)]  # x, t
INPUT = torch.zeros(1, 2)


def network() -> nn.Module:
    """Two coordinates to one field: 32 frequencies, four hidden layers."""
    net: nn.Module = lc.models.PINN(2, 1, (64, 64, 64, 64), fourier_features=32, fourier_scale=0.5)
    return net


def residual(net: nn.Module, points: Tensor) -> Tensor:
    """``u_t + u u_x - nu u_xx`` [N, 1] at points (x, t) [N, 2]."""
    points = points.detach().requires_grad_()
    u = net(points)
    first = torch.autograd.grad(u.sum(), points, create_graph=True)[0]
    u_x, u_t = first[:, :1], first[:, 1:]
    u_xx = torch.autograd.grad(u_x.sum(), points, create_graph=True)[0][:, :1]
    return u_t + u * u_x - VISCOSITY * u_xx


class LitBurgers(LightningModule):
    """A network that learns the equation, its initial state and its walls.

    Args:
        net: (x, t) to u.
        lr: of Adam, falling to zero along half a cosine.
        steps: of the training.
        weight: of the initial state and the walls in the loss.
    """

    def __init__(self, net: nn.Module, lr: float, steps: int, weight: float = 10.0) -> None:
        super().__init__()
        self.net = net
        self.save_hyperparameters(ignore="net")
        x, t = torch.linspace(-1, 1, 256), torch.linspace(0, 1, 128)
        start = torch.stack([x, torch.zeros_like(x)], 1)
        walls = torch.cat([torch.stack([torch.full_like(t, side), t], 1) for side in (-1.0, 1.0)])
        self.register_buffer("points", torch.cat([start, walls]), persistent=False)
        given = torch.cat([-torch.sin(math.pi * x), torch.zeros(len(walls))])
        self.register_buffer("given", given[:, None], persistent=False)

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        inside = residual(self.net, batch[0]).square().mean()
        known = (self.net(self.points) - self.given).square().mean()
        loss = inside + self.hparams.weight * known
        self.log_dict({"loss": loss, "equation": inside, "conditions": known})
        return loss

    def configure_optimizers(self) -> Any:
        adam = torch.optim.Adam(self.net.parameters(), lr=self.hparams.lr)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(adam, self.hparams.steps)
        return {"optimizer": adam, "lr_scheduler": {"scheduler": falling, "interval": "step"}}


def train(net: nn.Module, options: argparse.Namespace) -> nn.Module:
    """Adam, on new points at every step."""
    draws = synthesize(net, "uniform", (2,), bounds=DOMAIN, seed=options.seed)
    Trainer(
        max_steps=options.max_steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=CSVLogger(options.output_dir, name="csv"),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=options.log_every,
    ).fit(LitBurgers(net, options.lr, options.max_steps), draws.loader(options.batch_size, options.max_steps))
    return net.eval()


def compressed(net: nn.Module, options: argparse.Namespace) -> dict[str, nn.Module]:
    """The network by name of what was done to it, all without data."""
    found = {"network": net}
    for bits in (8, 6, 4):
        found[f"{bits} bits"] = lc.compress(net, [lc.Quantize(bits=bits)]).model
    for share in (0.5, 0.8):
        found[f"{share:.0%} zeros"] = lc.compress(net, [lc.Prune(share)]).model
    free = DataFreeDistillation(
        INPUT,
        bounds=DOMAIN,
        init=options.init,
        seed=options.seed,
        options={"steps": options.distill_steps, "lr": options.distill_lr},
    )
    for ratio, result in free.run(net, tuple(options.ratios)).items():
        print(f"{result}\n")
        found[f"student {ratio:.0%}"] = result.model
        eight = lc.compress(result.model, [lc.Quantize(bits=8)]).model
        found[f"student {ratio:.0%}, 8 bits"] = eight
    return found


def report(networks: dict[str, nn.Module], options: argparse.Namespace) -> None:
    """Files, sizes, and errors to the network and to the reference."""
    net = networks["network"]
    held_out = synthesize(net, "uniform", (2,), bounds=DOMAIN, seed=options.seed).held_out()
    points = held_out(4096)
    grid = solution = None
    if options.data:
        pack = np.load(options.data)
        x, t = (torch.from_numpy(pack[f"burgers_{axis}"]).float() for axis in "xt")
        grid = torch.cartesian_prod(x, t)
        solution = torch.from_numpy(pack["burgers_u"]).float().reshape(-1, 1)
    rows = []
    for name, model in networks.items():
        info = lc.save(model, options.output_dir / f"{name.replace(' ', '_').replace('%', '')}.lcz")
        off = compare(net, model, [points], "regression").relative_l2
        to_reference = math.nan
        if solution is not None:
            with torch.no_grad():
                to_reference = float((model(grid) - solution).norm() / solution.norm())
        rows.append([name, lc.cost(model).params, info.file_bytes, f"{off:.2%}", f"{to_reference:.2%}"])
    print(tables.text(["", "parameters", "file_bytes", "to the network", "to the reference"], rows))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, help=".npz file with a reference solution, for errors only")
    parser.add_argument("--checkpoint", type=Path, help="weights of a network that this recipe has trained")
    parser.add_argument("--max-steps", type=int, default=2500)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--distill-steps", type=int, default=1500)
    parser.add_argument("--distill-lr", type=float, default=3e-3)
    parser.add_argument("--init", default="random", choices=["random", "teacher"], help="how students begin")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.1, 0.05], help="of parameters")
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/pinn"))
    options = parser.parse_args(argv)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    seed_everything(options.seed, workers=True, verbose=False)
    net = network()
    if options.checkpoint:
        net.load_state_dict(torch.load(options.checkpoint, weights_only=True))
    else:
        train(net, options)
        torch.save(net.state_dict(), options.output_dir / "network.pt")
    report(compressed(net.eval(), options), options)


if __name__ == "__main__":
    main()
