"""``pi-bench audit``: what the parties say to each other, recorded and tested."""

from __future__ import annotations

from pathlib import Path

import click

from ...backends import DEFAULT
from .. import common
from . import options

SABOTAGES = ("reused-mask", "biased-mask", "unmasked-value", "truncated-mask")


@click.command()
@options.model
@click.option("--backend", default=DEFAULT, show_default=True, help="Backend to audit.")
@click.option(
    "--images", type=click.IntRange(8, 10_000), default=32, show_default=True,
    help="Inferences to record, an even number: half of one image, half of different ones.",
)  # fmt: skip
@common.plan_option
@options.batch
@options.threads
@click.option(
    "--sabotage", type=click.Choice(SABOTAGES), default=None,
    help="Have the audit's own parties misbehave on purpose; it must find out (exit code 6).",
)  # fmt: skip
@click.option(
    "--prove", type=click.IntRange(1, 1000), default=None, metavar="ROUNDS",
    help="Instead of one audit, so many without sabotage, which must pass, and with each kind, "
    "which must fail.",
)  # fmt: skip
@common.output_options
def audit(
    model: str,
    backend: str,
    images: int,
    plan: str,
    batch: int,
    threads: int,
    sabotage: str | None,
    prove: int | None,
    format_: str,
    output: Path | None,
) -> None:
    """Record what server, client and dealer send, and test that it tells nothing.

    Lists every kind of message, its width and what covers it; tests that covered values are
    uniform and independent of the image, that no seed, key or item of material comes twice, and
    that neither image nor weights lie open. Exit code 6 if anything is found; a fault is found by
    chance alone once in a million audits.

    \b
    Examples:
      pi-bench audit --model demo
      pi-bench audit --sabotage reused-mask
      pi-bench audit --prove 20 --format json --output audit.json
    """
    from ...errors import UsageError

    common.check_output(output)
    if sabotage is not None and prove is not None:
        raise UsageError("--prove takes every kind of sabotage in turn; leave --sabotage out")
    if images % 2:
        raise UsageError(f"--images must be even, got {images}")
    from ...backends import base

    base.check(backend)
    from ...bench.audit import proof, table
    from ...bench.audit.report import Audit
    from ...bench.audit.report import audit as run_audit
    from ...models import images as model_images
    from ...models import resolve

    graph = resolve(model)
    array, _ = model_images(graph, images // 2 * batch)
    wanted = Audit(graph, array, images, backend, plan, batch, threads, sabotage)
    if prove is not None:
        trials = proof.prove(wanted, prove, progress=options.say)
        value = proof.to_json(wanted, trials)
        common.emit(
            value,
            format_=format_,
            output=output,
            table=lambda console: table.print_trials(console, trials),
            rows=lambda: [{**row, "smallest_p": min(row["smallest_p"])} for row in value["trials"]],
        )
        proof.raise_if_wrong(trials)
        return
    report = run_audit(wanted, progress=options.say)
    common.emit(
        report.to_json(),
        format_=format_,
        output=output,
        table=lambda console: table.print_report(console, report),
        rows=report.flat,
    )
    report.raise_if_failed()
