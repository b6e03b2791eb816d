"""``pi-bench predict``: latency and traffic without running the model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .. import common
from . import options

if TYPE_CHECKING:
    from rich.console import Console

    from ...bench.predict import Check, Fit, Prediction


@click.command()
@click.option(
    "--fit", "fitting", multiple=True, required=True, type=click.Path(path_type=Path),
    metavar="RESULTS", help="Results on loopback that the compute is fitted to: files of pi-bench "
    "run or sweep, or a folder. Again for more; other rows in them are left out.",
)  # fmt: skip
@click.option(
    "--model", "names", multiple=True,
    help="demo, demo-teacher, random:ARCH@RELUS or a path. Again for more.",
)  # fmt: skip
@click.option(
    "--network", "networks", multiple=True, metavar="NAME",
    help="loopback, lan, wan or RTT:MBPS[:LOSS] (ms, Mbit/s, fraction). Again for more. "
    "[default: loopback]",
)  # fmt: skip
@options.batch
@common.plan_option
@click.option(
    "--check", "held_out", multiple=True, type=click.Path(path_type=Path), metavar="RESULTS",
    help="Measurements to predict and set beside; rows that were fitted are left out.",
)  # fmt: skip
@common.output_options
def predict(
    fitting: tuple[Path, ...],
    names: tuple[str, ...],
    networks: tuple[str, ...],
    batch: int,
    plan: str,
    held_out: tuple[Path, ...],
    format_: str,
    output: Path | None,
) -> None:
    """Predict latency, bytes and round trips of a model that was not run here.

    For backend fss. Bytes and round trips are exact; the time of the messages is simulated over
    the network, and compute is fitted to measurements. Latencies are the least, those of an
    undisturbed machine. The error is that of measurements left out of the fit, one by one, and
    architecture by architecture.

    \b
    Examples:
      pi-bench predict --fit relus.json --model random:resnet34@80000 --network wan
      pi-bench predict --fit relus.json --check networks.json
    """
    common.check_output(output)
    from ...bench import predict as predicting
    from ...bench.report import sources
    from ...bench.schema import flatten
    from ...errors import UsageError
    from ..progress import Progress

    if not names and not held_out:
        raise UsageError("name a --model to predict, or measurements to --check")
    if networks and not names:
        raise UsageError("--network goes with --model; --check has its own networks")
    runs = sources.read(fitting).runs
    used = [run for run in runs if predicting.usable(run)]
    if len(used) < len(runs):
        rest = "rows of other backends or networks, or without ReLUs"
        click.echo(f"{len(runs) - len(used)} {rest}, not fitted", err=True)
    with Progress() as progress:
        fitted = predicting.fit(used, progress=progress)
    if len(fitted.architectures) == 1:
        click.echo(
            f"fitted to {fitted.architectures[0]} alone: other networks are a guess", err=True
        )
    predictions = [
        predicting.predict(fitted, name, network, batch=batch, plan=plan)
        for name in names
        for network in networks or (predicting.LOOPBACK,)
    ]
    found = sources.read(held_out).runs if held_out else []
    others = [run for run in found if run not in used]
    with Progress() as progress:
        checks = predicting.check(fitted, others, progress=progress)
    value = predicting.to_json(fitted, predictions, checks)
    common.emit(
        value,
        format_=format_,
        output=output,
        table=lambda console: _print(console, fitted, predictions, checks),
        rows=lambda: [flatten(row) for row in (*value["predictions"], *value["checks"])],
    )


def _print(
    console: Console, fitted: Fit, predictions: list[Prediction], checks: list[Check]
) -> None:
    from rich.table import Table

    from ...bench.predict import PHASES, errors
    from ...bench.table import size

    if predictions:
        table = Table(title="Predicted, of one inference")
        table.add_column("model", overflow="fold")
        for column in ("network", "ReLUs", "online ms", "offline ms", "online", "offline", "trips"):
            table.add_column(column, justify="left" if column == "network" else "right")
        for one in predictions:
            table.add_row(
                one.model + (f" x{one.batch}" if one.batch > 1 else ""),
                one.network,
                f"{one.relus:,}",
                f"{one.online_ms:,.1f}",
                f"{one.offline_ms:,.0f}",
                size(sum(one.online_bytes.values())),
                size(sum(one.offline_bytes.values())),
                str(one.round_trips),
            )
        console.print(table)
    if checks:
        table = Table(title="Predicted and measured, the least latency")
        table.add_column("model", overflow="fold")
        table.add_column("network")
        for column in (
            "online ms",
            "measured",
            "error",
            "offline ms",
            "measured",
            "error",
            "bytes",
        ):
            table.add_column(column, justify="right")
        for check in checks:
            one, measured, error = check.prediction, check.measured_ms, check.error
            table.add_row(
                one.model + (f" x{one.batch}" if one.batch > 1 else ""),
                one.network,
                f"{one.online_ms:,.1f}", f"{measured['online']:,.1f}", f"{error['online']:+.1%}",
                f"{one.offline_ms:,.0f}", f"{measured['offline']:,.0f}", f"{error['offline']:+.1%}",
                "exact" if check.exact else "OTHER",
            )  # fmt: skip
        console.print(table)
    console.print(
        f"Fitted to {fitted.rows} measurements of {', '.join(fitted.architectures)}, "
        f"{fitted.threads} thread(s) per party.",
        markup=False,
    )
    for phase in PHASES:
        said = [f"each left out: {_said(fitted.left_out[phase])}"]
        if fitted.unseen:
            said.append(f"each architecture left out: {_said(fitted.unseen[phase])}")
        if checks:
            said.append(f"checks: {_said(errors(checks, phase))}")
        console.print(f"Error {phase}, median (largest); {'; '.join(said)}.", markup=False)


def _said(error: object) -> str:
    from ...bench.predict import Error

    assert isinstance(error, Error)
    return f"{error.median:.1%} ({error.largest:.1%})"
