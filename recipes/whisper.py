"""Compress a speech model of Whisper's shapes: low rank, shared values, mixed precision; then ONNX.

    python recipes/whisper.py --model-size tiny --target-ratio 0.25 --benchmark
    python recipes/whisper.py --checkpoint FOLDER --compression-types low_rank mixed_precision --benchmark

Measured with ``--compression-types low_rank mixed_precision --rank-ratio 0.3 --target-ratio 0.25 --benchmark --runs 3``
on the network of Whisper tiny as transformers builds it, with random weights (37,760,640 numbers, 151,042,560 bytes as
float32) and a spectrogram of noise, so nothing here says what would be recognized:

                                     file_bytes    of float32   output error   MACs
    coded, nothing else              123,989,864   0.821        0              20,500,786,176
    factorized to 0.3 of the ranks    95,460,784   0.632        1.079          13,959,588,864
    and 4 or 8 bits                   25,054,165   0.166        1.093          13,959,588,864

    ONNX, int8 weights                49,520,639   0.328        0.029 at most from PyTorch; inputs stay float32
    ONNX, the same as float32        195,880,925   1.297        1.6e-6

Random weights have no low rank: factors destroy the outputs, and rounding adds little. A trained model must be judged
by its own data. ONNX files are longer than the archive: 4 bits take a byte there, nothing is entropy-coded, and the
table of tokens is in them twice, once turned for the output layer. Other work ran on the machine, so the clock says
only that int8 weights alone are no faster in ONNX Runtime. One run, seed 0, two minutes of one core. Machine: 2 shared
cores of an Intel Xeon at 2.1 GHz, CPU only. Python 3.11, torch 2.15.0, transformers 5.23.0, onnxruntime 1.31.1.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import lightning_compress as lc
from lightning_compress.checkpoints import load_weights
from lightning_compress.pipelines import TargetResult, compress_to
from lightning_compress.quantization.assignment import KINDS, kinds_of
from lightning_compress.tables import text

MELS, FRAMES, POSITIONS, TOKENS = 80, 3000, 448, 51865
#        width, layers of encoder and of decoder, heads
SIZES = {
    "micro": (64, 1, 2),  # to look at what happens: 300 frames and 1000 tokens
    "tiny": (384, 4, 6),
    "base": (512, 6, 8),
    "small": (768, 12, 12),
    "medium": (1024, 24, 16),
    "large": (1280, 32, 20),
}
TYPES = ("low_rank", "pruning", "weight_sharing", "mixed_precision")

# -- models: (log-mel spectrogram, tokens so far) -> logits of the next tokens -----------------------------------------


class Whisper(nn.Module):
    """A Whisper of Hugging Face that takes and gives plain tensors.

    Args:
        net: ``WhisperForConditionalGeneration``.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        net.config.use_cache = False

    def forward(self, mel: Tensor, tokens: Tensor) -> Tensor:
        # Without a mask, transformers looks for packed sequences by operations that ONNX lacks.
        seen = torch.ones_like(tokens)
        return self.net(input_features=mel, decoder_input_ids=tokens, decoder_attention_mask=seen).logits


class Block(nn.Module):
    """Attention to itself, to what was heard if it belongs to the decoder, and a feed-forward part."""

    def __init__(self, width: int, heads: int, listens: bool) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.cross_attn = nn.MultiheadAttention(width, heads, batch_first=True) if listens else None
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3 if listens else 2))

    def forward(self, x: Tensor, heard: Tensor | None = None) -> Tensor:
        future = None  # which positions a token must not see
        if heard is not None:
            future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        y = self.norms[0](x)
        x = x + self.self_attn(y, y, y, attn_mask=future, need_weights=False)[0]
        if self.cross_attn is not None:
            x = x + self.cross_attn(self.norms[1](x), heard, heard, need_weights=False)[0]
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norms[-1](x))))


class WhisperLike(nn.Module):
    """The same widths and depths of PyTorch's own layers, for machines without transformers.

    Args:
        width: of every layer but the inner one of a feed-forward part, which has four times as many.
        layers: of the encoder, and of the decoder.
        heads: of every attention.
        frames: of the spectrogram.
        tokens: in the vocabulary.
    """

    def __init__(self, width: int, layers: int, heads: int, frames: int, tokens: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(MELS, width, 3, padding=1)
        self.conv2 = nn.Conv1d(width, width, 3, stride=2, padding=1)
        self.register_buffer("waves", sinusoids(frames // 2, width))
        self.encoder = nn.ModuleList(Block(width, heads, False) for _ in range(layers))
        self.embed_tokens, self.embed_positions = nn.Embedding(tokens, width), nn.Embedding(POSITIONS, width)
        self.decoder = nn.ModuleList(Block(width, heads, True) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, mel: Tensor, tokens: Tensor) -> Tensor:
        x = nn.functional.gelu(self.conv1(mel))
        x = nn.functional.gelu(self.conv2(x)).transpose(1, 2) + self.waves
        for block in self.encoder:
            x = block(x)
        heard = self.norms[0](x)
        y = self.embed_tokens(tokens) + self.embed_positions.weight[: tokens.shape[1]]
        for block in self.decoder:
            y = block(y, heard)
        return self.norms[1](y) @ self.embed_tokens.weight.T


def sinusoids(length: int, width: int) -> Tensor:
    """Sines and cosines of falling frequency, as in the paper."""
    rates = torch.exp(-np.log(10000) / (width // 2 - 1) * torch.arange(width // 2))
    angles = torch.arange(length)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def build(options: argparse.Namespace) -> nn.Module:
    """The network, from a checkpoint or with seeded random weights."""
    torch.manual_seed(options.seed)
    given = options.checkpoint
    if given is not None and given.is_dir():
        from transformers import WhisperForConditionalGeneration

        return Whisper(WhisperForConditionalGeneration.from_pretrained(given, local_files_only=True)).eval()
    width, layers, heads = SIZES[options.model_size]
    frames, tokens = (300, 1000) if options.model_size == "micro" else (FRAMES, TOKENS)
    if options.plain:
        net: nn.Module = WhisperLike(width, layers, heads, frames, tokens)
        return (net if given is None else load_weights(net, given)).eval()
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    parts = {"layers": layers, "attention_heads": heads, "ffn_dim": 4 * width}
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in parts.items()}
    special = dict.fromkeys(
        ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"), tokens - 1
    )
    config = WhisperConfig(
        vocab_size=tokens, d_model=width, max_source_positions=frames // 2, **sides, **special
    )
    inner = WhisperForConditionalGeneration(config)
    return Whisper(inner if given is None else load_weights(inner, given)).eval()


def inputs(net: nn.Module, options: argparse.Namespace) -> dict[str, Tensor]:
    """A spectrogram of noise and a few tokens: nothing here judges what is recognized."""
    generator = torch.Generator().manual_seed(options.seed)
    if isinstance(net, Whisper):
        frames, tokens = 2 * net.net.config.max_source_positions, net.net.config.vocab_size
        mels = net.net.config.num_mel_bins
    else:
        frames, tokens, mels = 2 * len(net.waves), net.embed_tokens.num_embeddings, MELS
    mel = torch.randn(1, mels, frames, generator=generator)
    return {"mel": mel, "tokens": torch.randint(tokens, (1, 8), generator=generator)}


# -- compression -------------------------------------------------------------------------------------------------------


def methods(net: nn.Module, options: argparse.Namespace) -> list[dict[str, dict[str, Any]]]:
    """What is applied, in order. What is not asked for by an option is turned until the target is reached."""
    types, tables = options.compression_types, tables_of(net)
    everything = ["*", *tables]  # embeddings are touched only when they are named
    steps: list[dict[str, dict[str, Any]]] = []
    if "low_rank" in types:
        given = {} if options.rank_ratio is None else {"rank_ratio": options.rank_ratio}
        # Convolutions are a hundredth of the weights; the output layer is the table of tokens.
        steps.append({"Factorize": {"exclude": ["*conv*", *tables], **given}})
    if "pruning" in types:
        steps.append({"Prune": {} if options.sparsity is None else {"sparsity": options.sparsity}})
    bits = bits_by_name(net, dict(options.bits)) if "mixed_precision" in types else {}
    if "weight_sharing" in types:
        # With mixed precision, b bits are 2^b values.
        clusters = {name: 2**b for name, b in bits.items()} or options.num_clusters
        given = {} if clusters is None else {"clusters": clusters}
        steps.append({"ShareWeights": {"strategy": options.sharing_strategy, "include": everything, **given}})
    elif "mixed_precision" in types:
        steps.append({"Quantize": {"include": everything, **({"bits": bits} if bits else {})}})
    return steps


def bits_by_name(net: nn.Module, bits: dict[str, int]) -> dict[str, int]:
    """Bits by kind of layer as bits by name, which holds for the factors of a layer too; 8 for the others."""
    targets = lc.find(net, ["*", *tables_of(net)])
    kinds = kinds_of(net, targets)
    found = {
        f"{t.name}*": bits[kind] for t in targets for kind in KINDS if kind in kinds[t.key] & bits.keys()
    }
    patterns = {name: width for name, width in bits.items() if name not in KINDS}
    return patterns | found | {"*": 8} if bits else {}


def tables_of(net: nn.Module) -> list[str]:
    """Names of the embeddings."""
    return [name for name, part in net.named_modules() if isinstance(part, nn.Embedding)]


def compressed(net: nn.Module, x: dict[str, Tensor], options: argparse.Namespace) -> TargetResult:
    return compress_to(
        net,
        methods(net, options),
        target_ratio=options.target_ratio,
        example_input=x,
        data=[x],
        task="regression",
        seed=options.seed,
        evaluations=options.evaluations,
    )


# -- ONNX --------------------------------------------------------------------------------------------------------------


def onnx(net: nn.Module, x: dict[str, Tensor], path: Path, runs: int) -> list[list[Any]]:
    """Write files for ONNX Runtime and time them: rows of a table; what cannot be written is said."""
    missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"no ONNX file: {', '.join(missing)} not installed")
        return []
    import onnxruntime

    settings, rows = onnxruntime.SessionOptions(), []
    settings.intra_op_num_threads = torch.get_num_threads()
    for precision in ("int8", "float32"):
        file = path.with_name(f"{path.stem}_{precision}{path.suffix}")
        try:
            written = lc.export_onnx(net, x, file, precision=precision, dynamic_axes=False)
        except (ImportError, ValueError, RuntimeError) as error:
            print(f"no {precision} ONNX file: {' '.join(str(error).split())[:200]}")
            continue
        session = onnxruntime.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])
        feed = {node.name: x[node.name].numpy() for node in session.get_inputs()}
        session.run(None, feed)
        times = []
        for _ in range(runs):
            start = time.perf_counter()
            session.run(None, feed)
            times.append((time.perf_counter() - start) * 1e3)
        rows.append([file.name, written.file_bytes, float(np.median(times)), written.max_difference])
    return rows


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model-size", choices=SIZES, default="tiny")
    parser.add_argument("--checkpoint", type=Path, help="folder of Hugging Face, or a file of tensors")
    parser.add_argument(
        "--plain", action="store_true", help="PyTorch's own layers, though transformers is there"
    )
    parser.add_argument(
        "--compression-types",
        nargs="+",
        choices=TYPES,
        default=["low_rank", "weight_sharing", "mixed_precision"],
    )
    parser.add_argument(
        "--target-ratio", type=float, default=0.5, help="bytes of the file / bytes as float32"
    )
    parser.add_argument(
        "--sharing-strategy", default="cluster", choices=["cluster", "hash", "adaptive", "bloom"]
    )
    parser.add_argument("--num-clusters", type=int, help="values of a layer; left out, as the target asks")
    parser.add_argument("--rank-ratio", type=float, help="share of full rank; left out, as the target asks")
    parser.add_argument("--sparsity", type=float, help="share of zeros; left out, as the target asks")
    parser.add_argument(
        "--bits",
        nargs="*",
        type=lambda pair: (pair.partition("=")[0], int(pair.partition("=")[2])),
        default=[("attention", 8), ("ffn", 4), ("embedding", 8)],
        metavar="KIND=BITS",
        help=f"of mixed precision, for kinds {', '.join(KINDS)}, or patterns; others have 8",
    )
    parser.add_argument("--evaluations", type=int, default=8, help="strengths to try for the target")
    parser.add_argument(
        "--benchmark", action="store_true", help="time, memory, every layer; and ONNX Runtime"
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/whisper"))
    return parser


def main(argv: list[str] | None = None) -> None:
    options = parser().parse_args(argv)
    options.plain = options.plain or importlib.util.find_spec("transformers") is None
    out: Path = options.output_dir
    out.mkdir(parents=True, exist_ok=True)

    net = build(options)
    x = inputs(net, options)
    result = compressed(net, x, options)
    (out / "report.txt").write_text(str(result))
    print(f"target {options.target_ratio} {'met' if result.target_met else 'NOT met'}: {result.reached}")
    rows = [[s.name, s.file_bytes, s.sparsity, s.mean_bits, s.error] for s in result.stages]
    print(text(["stage", "file_bytes", "sparsity", "mean bits", "output error"], rows))
    info = lc.save(result.model, out / "whisper.lcz")
    if info.file_bytes != result.reached["file_bytes"]:
        raise RuntimeError(
            f"{info.file_bytes} bytes were written, {result.reached['file_bytes']} were reported."
        )
    (out / "stats.json").write_text(json.dumps(result.stats, indent=2))
    if options.checkpoint is None:
        print("Weights are random: sizes, times and errors of outputs say nothing about recognition.")
    if options.benchmark:
        measure(net, result.model, x, options)


def measure(net: nn.Module, small: nn.Module, x: dict[str, Tensor], options: argparse.Namespace) -> None:
    """Time and memory in PyTorch, then in ONNX Runtime: compressed first, exported last."""
    out: Path = options.output_dir
    report = lc.benchmark(
        small, x, baseline=net, warmup=1, runs=options.runs, output=out / "benchmark_results.json"
    )
    hidden = {
        "layers": (),
        "baseline": dataclasses.replace(report.baseline, layers=()),
    }  # they are in the file
    print(dataclasses.replace(report, **hidden))
    rows = onnx(small, x, out / "whisper.onnx", options.runs)
    if rows:
        print(text(["ONNX Runtime", "file_bytes", "latency_ms", "largest difference from PyTorch"], rows))


if __name__ == "__main__":
    main()
