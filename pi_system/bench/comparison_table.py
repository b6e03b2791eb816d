"""A comparison for people."""

from __future__ import annotations

from typing import Final

from rich.console import Console
from rich.table import Table

from .schema import Comparison, Contender, Latency, Ratio
from .table import over_rounds, print_work, significant, size, stated

WHOLE: Final = "*"
"""Marks the figures of peers, whose phases cannot be told apart."""


def print_comparison(console: Console, comparison: Comparison) -> None:
    """All contenders beside plaintext, their ratios, who could not run and why."""
    model, rounds = comparison.model, len(comparison.rounds)
    table = Table(
        title=(
            f"{model.name}: {model.relu_kept:,} of {model.relu_total:,} ReLUs, "
            f"{comparison.network.name}, {comparison.threads_per_party} thread(s) per party, "
            f"batch {comparison.batch_size}, {rounds} rounds"
        )
    )
    for column in (
        "contender", "ReLUs", "online ms (min)", "x plain", "online", "trips", "offline ms",
        "offline", "setup",
    ):  # fmt: skip
        table.add_column(column, justify="left" if column == "contender" else "right")
    plaintext = comparison.plaintext.latency_ms
    table.add_row("plaintext", f"{model.relu_kept:,}", _times(plaintext), "1", *[""] * 5)
    over = {(ratio.contender, ratio.over): ratio for ratio in comparison.ratios}
    for one in comparison.contenders:
        if one.online is not None or one.whole is not None:
            _add_row(table, one, over[one.name, "plaintext"])
    console.print(table)
    if any(one.whole for one in comparison.contenders):
        console.print(f"{WHOLE} the whole inference; bytes as the loopback interface counted them.")
    for ratio in comparison.ratios:
        console.print(_sentence(ratio, rounds), markup=False)
    for one in comparison.contenders:
        if one.online is not None:
            print_work(console, one.online.work_ms, prefix=f"{one.name}, ")
        if one.accuracy is not None:
            agreed = round(one.accuracy.argmax_agreement * one.accuracy.answers)
            console.print(
                f"{one.name}: {agreed} of {one.accuracy.answers} answers as in plaintext, "
                f"largest logit error {one.accuracy.max_abs_error:.2g}"
                f"{stated(one.fixed_point, one.accuracy)}.",
                markup=False,
            )
        if one.whole is not None and one.whole.settings:
            settings = ", ".join(f"{k} {v}" for k, v in one.whole.settings.items())
            console.print(f"{one.name}: {settings}.", markup=False)
        if one.not_run is not None:
            console.print(f"{one.name} not run: {one.not_run}", markup=False)
    for warning in comparison.stability.warnings:
        console.print(f"[yellow]unstable:[/yellow] {warning}")


def _add_row(table: Table, one: Contender, ratio: Ratio) -> None:
    cells = [one.name, f"{one.model.relu_kept:,}"]
    factor = significant(ratio.online_latency.median)
    if one.whole is not None:
        carried = one.whole.interface_bytes
        cells += [f"{WHOLE} {_times(one.whole.latency_ms)}", factor]
        cells += ["" if carried is None else size(round(carried)), *[""] * 4]
    else:
        assert one.online and one.offline and one.setup
        cells += [_times(one.online.latency_ms), factor, size(one.online.bytes.total)]
        cells += [f"{one.online.round_trips:g}", f"{one.offline.latency_ms.median:,.1f}"]
        cells += [size(one.offline.bytes.total), f"{one.setup.seconds:.2f} s"]
    table.add_row(*cells)


def _sentence(ratio: Ratio, rounds: int) -> str:
    latency = ratio.online_latency
    offline = None if ratio.offline_latency is None else ratio.offline_latency.median
    text = (
        f"{ratio.contender} / {ratio.over}: {significant(latency.median)} x online latency "
        f"({over_rounds(latency.min, latency.max, rounds)})"
    )
    for factor, what in (
        (ratio.online_bytes, "online bytes"),
        (ratio.round_trips, "round trips"),
        (offline, "offline latency"),
        (ratio.offline_bytes, "offline bytes"),
    ):
        if factor is not None:
            text += f", {significant(factor)} x {what}"
    return text + "."


def _times(latency: Latency) -> str:
    return f"{latency.median:,.1f} ({latency.min:,.1f})"
