"""``pi-bench compare``: several backends beside plaintext."""

from __future__ import annotations

from pathlib import Path

import click

from .. import common
from . import options


@click.command()
@click.option(
    "--contender", "contenders", multiple=True, metavar="NAME",
    help="A backend; crypten-stock, CrypTen as distributed; spu-semi2k or spu-cheetah, SecretFlow "
    "SPU (see --spu-python). With -all behind (crypten-all): on the version of the model that "
    "keeps every ReLU. Again for more. "
    "[default: fss, crypten, crypten-all, crypten-stock-all]",
)  # fmt: skip
@click.option(
    "--rounds", type=click.IntRange(1), default=5, show_default=True,
    help="Every contender runs once in each, with new processes.",
)  # fmt: skip
@click.option(
    "--spu-python", metavar="FILE", envvar="PI_SPU_PYTHON", show_envvar=True,
    help="Python of an environment with SecretFlow SPU, for its contenders "
    "(benchmarks/README.md, Peers).",
)  # fmt: skip
@options.setting(
    repeat=4,
    repeat_help="Inferences of each contender in a round.",
    warmup_help="Inferences before these, in each round, that are not counted.",
)
@common.output_options
def compare(
    setting: options.Setting,
    contenders: tuple[str, ...],
    rounds: int,
    spu_python: str | None,
    format_: str,
    output: Path | None,
) -> None:
    """Measure several backends beside plaintext, in turns, so that their ratios hold.

    Ratios are taken in each round and given as median, least and largest. What cannot run is
    listed with the reason. Exit code 4 when private answers are not plaintext's.

    \b
    Examples:
      pi-bench compare --model demo
      pi-bench compare --model random:resnet18@49600 --format json --output compare.json
    """
    common.check_output(output)
    from ...bench.compare import DEFAULT as ALL
    from ...bench.compare import Plan, check_answers
    from ...bench.compare import compare as run_comparison
    from ...bench.comparison_table import print_comparison
    from ...bench.schema import flatten
    from ..progress import Progress

    plan = Plan(
        contenders=contenders or ALL, rounds=rounds, spu_python=spu_python, **setting.common()
    )
    with Progress() as progress:
        comparison = run_comparison(plan, progress=progress)
    value = comparison.to_json()
    common.emit(
        value,
        format_=format_,
        output=output,
        table=lambda console: print_comparison(console, comparison),
        rows=lambda: [flatten(contender) for contender in value["contenders"]],
    )
    options.warn(comparison.stability.warnings, format_, output)
    check_answers(comparison, **setting.parity())
