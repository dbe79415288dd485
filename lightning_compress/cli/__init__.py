"""The command line, ``lightning-compress VERB``: compress a trained network, export it, look into files, measure.

A verb is a pair: a function that adds its options to a parser, and one that does the work (in `methods`, `recipes`,
`analysis`, `evolve` and `files`; what they share is in `networks`). Input that cannot be used ends in one line on
stderr and exit code 2.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from lightning_compress.cli import analysis, evolve, files, methods, recipes

_OPTION = re.compile(r"(?<=^--)\w[\w-]*")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: arguments; those of the process if None. Option names may be written with dashes or underscores.

    Returns:
        Exit code: 0; 1 if all was done but a target is not met; or 2 for input that cannot be used, with one line on
        stderr.

    Examples:
        >>> main(["inspect", "missing.lcz"])
        2
    """
    given = sys.argv[1:] if argv is None else argv
    try:
        options = _parser().parse_args(
            [_OPTION.sub(lambda name: name[0].replace("-", "_"), a) for a in given]
        )
        return _VERBS[options.verb][2](options[options.verb]) or 0
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ArgumentError, ValueError, OSError, ImportError) as error:
        print(f"lightning-compress: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


_Verb = tuple[str, Callable[[ArgumentParser], None], Callable[[Namespace], int | None]]
_VERBS: dict[str, _Verb] = {
    "prune": (
        "zero weights of a trained network and write an .lcz archive",
        methods.prune_options,
        methods.prune,
    ),
    "remove-channels": (
        "take channels out of a trained network and write an .lcz archive",
        methods.remove_channels_options,
        methods.remove_channels,
    ),
    "factorize": (
        "write weights as products of thinner ones and write an .lcz archive",
        methods.factorize_options,
        methods.factorize,
    ),
    "share": (
        "let the weights of a trained network share few values and write an .lcz archive",
        methods.share_options,
        methods.share,
    ),
    "quantize": (
        "put a trained network on few bits and write an .lcz archive",
        methods.quantize_options,
        methods.quantize,
    ),
    "run": (
        "compress a trained network as a recipe says, as much as a target asks for",
        recipes.run_options,
        recipes.run,
    ),
    "search": (
        "search for the best settings of every layer and write the best archive under a target",
        recipes.search_options,
        recipes.find,
    ),
    "analyze": (
        "try every technique on a trained network and report what it can bear",
        analysis.analyze_options,
        analysis.run,
    ),
    "evolve": (
        "compute weights by circuits: train, campaign, merge, metrics, sensitivity, break-even, export",
        evolve.evolve_options,
        evolve.evolve,
    ),
    "export": (
        "write a quantized network as an ONNX file of integers",
        files.export_options,
        files.export,
    ),
    "inspect": ("check an .lcz archive and show what it holds", files.inspect_options, files.inspect),
    "benchmark": ("time a network and measure its memory", files.benchmark_options, files.measure),
}


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="lightning-compress", description="Compress trained PyTorch networks.", exit_on_error=False
    )
    verbs = parser.add_subcommands(dest="verb")
    for name, (description, add_options, _) in _VERBS.items():
        verb = ArgumentParser(description=f"{description[0].upper()}{description[1:]}.", exit_on_error=False)
        verbs.add_subcommand(name, verb, help=description)
        add_options(verb)  # afterwards, for a verb may have verbs of its own
    return parser
