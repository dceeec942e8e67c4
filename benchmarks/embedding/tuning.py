"""Which settings suit a peer best: all that are worth a try, under the load that counts."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from embedding.comparison import Comparison

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from embedding.contenders import Contender, Settings
    from embedding.servers import Bench


def run(
    bench: Bench, chosen: list[Contender], args: argparse.Namespace, folder: Path
) -> dict[str, Any]:
    """Measure each contender with each combination of the settings tried for it."""
    comparison = Comparison(bench, args, folder)
    entries = {
        label(contender, settings): (contender, settings)
        for contender in chosen
        for settings in combinations(contender)
    }
    comparison.run(entries)
    return {
        "results": {name: comparison.results(name) for name in entries},
        "best": {each.name: best(comparison, each) for each in chosen},
        "least_cosine": comparison.cosines,
        "failures": comparison.failures,
    }


def combinations(contender: Contender) -> list[Settings]:
    """Return all settings that are tried; those not named keep what was chosen."""
    values = itertools.product(*contender.tried.values())
    return [
        {**contender.chosen, **dict(zip(contender.tried, each, strict=True))} for each in values
    ]


def label(contender: Contender, settings: Settings) -> str:
    return f"{contender.name} " + " ".join(f"{key}={value}" for key, value in settings.items())


def best(comparison: Comparison, contender: Contender) -> dict[str, Settings]:
    """Return the settings with the highest rate, by number of connections."""
    return {
        str(connections): max(
            combinations(contender),
            key=lambda each: comparison.median(label(contender, each), connections),
        )
        for connections in comparison.args.connections
    }
