"""The verb `evolve`: circuits that compute weights, one by one or in campaigns, and what they are worth.

Reading order: `experiments` (which weights from which), `train` (here and now), `campaign` (folders, runs, clusters),
`measures` (`metrics`, `sensitivity`), `circuits` (`break-even`, `export`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from jsonargparse import ArgumentParser, Namespace

from lightning_compress.cli.evolve import campaign, circuits, measures, train

_Action = tuple[str, Callable[[ArgumentParser], None], Callable[[Namespace], int | None]]
_CAMPAIGN: dict[str, _Action] = {
    "plan": ("write the folders of the experiments of a preset", campaign.plan_options, campaign.plan_),
    "run": ("work on all runs that have not finished", campaign.run_options, campaign.run_),
    "status": ("show how far the runs are", campaign.folder_options, campaign.status_),
    "script": ("print job scripts for a cluster", campaign.script_options, campaign.script_),
    "report": ("show the best circuits, and draw them", campaign.report_options, campaign.report),
}


def _campaign_options(parser: ArgumentParser) -> None:
    _add(parser, "step", _CAMPAIGN)


def _campaign(options: Namespace) -> int | None:
    return _CAMPAIGN[options.step][2](options[options.step])


_ACTIONS: dict[str, _Action] = {
    "train": (
        "compute weights of a network by circuits and write an .lcz archive",
        train.train_options,
        train.train,
    ),
    "campaign": ("many runs, here or on a cluster", _campaign_options, _campaign),
    "merge": ("join the batches of an experiment", campaign.merge_options, campaign.merge_),
    "metrics": ("measure the network with the circuits' weights", measures.metrics_options, measures.metrics),
    "sensitivity": (
        "measure the network with a constant added to weights",
        measures.sensitivity_options,
        measures.sensitivity_,
    ),
    "break-even": (
        "weigh the energy of computing weights against that of reading them",
        circuits.break_even_options,
        circuits.break_even_,
    ),
    "export": ("write a circuit as Python or Verilog", circuits.export_options, circuits.export),
}


def evolve_options(parser: ArgumentParser) -> None:
    """Actions of `evolve`; the parser must stand below its own parent already."""
    _add(parser, "action", _ACTIONS)


def evolve(options: Namespace) -> int | None:
    """Carry out one action."""
    return _ACTIONS[options.action][2](options[options.action])


def _add(parser: ArgumentParser, dest: str, actions: Mapping[str, _Action]) -> None:
    below = parser.add_subcommands(dest=dest)
    for name, (description, add_options, _) in actions.items():
        action = ArgumentParser(
            description=f"{description[0].upper()}{description[1:]}.", exit_on_error=False
        )
        below.add_subcommand(name, action, help=description)
        add_options(action)
