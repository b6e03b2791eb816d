"""A result for people."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from .schema import Accuracy, FixedPoint, Latency, Result


def print_result(console: Console, result: Result, *, predictions: bool, layers: bool) -> None:
    """Phases, bytes, round trips, the ratio to plaintext, agreement; then what was asked for."""
    model, online = result.model, result.online
    table = Table(
        title=(
            f"{model.name}: {model.relu_kept:,} of {model.relu_total:,} ReLUs, {result.backend}, "
            f"{result.network.name}, {result.threads_per_party} thread(s) per party, "
            f"batch {result.batch_size}"
        )
    )
    for column in ("phase", "median", "min", "client to server", "server to client", "dealer"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    setup, offline = result.setup.bytes, result.offline.bytes
    table.add_row("plaintext", *_times(result.plaintext.latency_ms), "", "", "")
    table.add_row(
        "setup (once)",
        f"{result.setup.seconds:.2f} s",
        "",
        size(setup.client_to_server),
        size(setup.server_to_client),
        size(setup.total - setup.client_to_server - setup.server_to_client),
    )
    table.add_row(
        "offline",
        *_times(result.offline.latency_ms),
        size(offline.client_to_server),
        size(offline.server_to_client),
        size(offline.total - offline.client_to_server - offline.server_to_client),
    )
    table.add_row(
        "online",
        *_times(online.latency_ms),
        size(online.bytes.client_to_server),
        size(online.bytes.server_to_client),
        "none",
    )
    console.print(table)
    if layers:
        _print_layers(console, result)
    if predictions:
        _print_predictions(console, result)
    accuracy = result.accuracy
    console.print(
        f"Online: {result.slowdown:.1f} x plaintext's latency, {online.round_trips:g} round trips, "
        f"{size(online.bytes.total)} ({size(online.relu_bytes)} for ReLUs)."
    )
    print_work(console, online.work_ms)
    agreed = round(accuracy.argmax_agreement * accuracy.answers)
    console.print(
        f"Agreement with plaintext: {agreed} of {accuracy.answers} answers, "
        f"largest logit error {accuracy.max_abs_error:.2g}{stated(result.fixed_point, accuracy)}."
    )
    if accuracy.correct is not None:
        console.print(
            f"Correct: {accuracy.correct} of {accuracy.images} images privately, "
            f"{accuracy.plaintext_correct} in plaintext."
        )
    for warning in result.stability.warnings:
        console.print(f"[yellow]unstable:[/yellow] {warning}")


def print_work(
    console: Console, work_ms: Mapping[str, Mapping[str, float]], *, prefix: str = ""
) -> None:
    """Where an inference's time goes, a line per party that told; nothing if none did."""
    for role, kinds in work_ms.items():
        if kinds:
            spent = ", ".join(f"{kind} {ms:.2f}" for kind, ms in kinds.items())
            console.print(f"{prefix}{role}, ms of an inference: {spent}.", markup=False)


def stated(plan: FixedPoint | None, accuracy: Accuracy) -> str:
    """What the plan says of the error, behind an error measured; nothing without a plan."""
    if plan is None:
        return ""
    return f" (the {plan.plan} plan states {plan.error:.2g}), {accuracy.retries} retries"


def size(count: int) -> str:
    """Bytes with a decimal unit."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"


def _times(latency: Latency) -> tuple[str, str]:
    return f"{latency.median:.1f} ms", f"{latency.min:.1f} ms"


def _print_layers(console: Console, result: Result) -> None:
    table = Table(title="Online, by layer")
    for column in ("layer", "kind", "ReLUs kept", "client to server", "server to client"):
        table.add_column(
            column, justify="left" if column in ("layer", "kind") else "right", overflow="fold"
        )
    table.add_column("server ms", justify="right")
    table.add_column("client ms", justify="right")
    for layer in result.online.layers:
        table.add_row(
            layer.name,
            layer.op,
            f"{layer.relus_kept:,} / {layer.relus_total:,}" if layer.op == "relu" else "",
            size(layer.bytes.client_to_server),
            size(layer.bytes.server_to_client),
            *("" if ms is None else f"{ms:.2f}" for ms in layer.milliseconds.values()),
        )
    console.print(table)


def _print_predictions(console: Console, result: Result) -> None:
    table = Table(title="Predictions")
    for column in ("image", "label", "private", "plaintext", "equal"):
        table.add_column(column, justify="right" if column == "image" else "left")
    for row in result.predictions:
        table.add_row(
            str(row.image),
            row.label or "",
            row.private,
            row.plaintext,
            "yes" if row.equal else "[red]NO[/red]",
        )
    console.print(table)


def over_rounds(least: float, most: float, rounds: int) -> str:
    """Of a ratio, for people: how far it went, and in how many rounds."""
    return "in one round" if rounds == 1 else f"{span(least, most)} in {rounds} rounds"


def span(least: float, most: float) -> str:
    """Two ratios, for people: 0.89 to 1.31."""
    return f"{significant(least)} to {significant(most)}"


def significant(value: float) -> str:
    """Three digits, without an exponent: 0.94, 22.3, 10,900."""
    text = f"{value:.3g}"
    return f"{float(text):,.0f}" if "e+" in text else text
