"""Several backends and plaintext on one machine, in turns, so that their ratios hold.

A round runs a session of every contender, three new processes each, with plaintext before each
of them; every round starts with another contender. What slows the machine for a minute slows
all of them, and ratios are taken round by round.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from .. import models
from ..errors import ParityError
from ..net import link
from ..parties.timeouts import Timeouts
from . import contenders, environment, parity
from .contenders import Entry, PeerEntry
from .measure import PLAINTEXT_REPEAT, Measurement
from .observation import combine, describe_model, describe_network
from .schema import Comparison, Contender, Latency, Ratio, Round, Spread
from .stability import judge

PLAINTEXT: Final = "plaintext"
DEFAULT: Final = ("fss", "crypten", "crypten-all", "crypten-stock-all")


@dataclass(frozen=True)
class Plan:
    """What to compare.

    Attributes:
        model: as named on the command line.
        contenders: names of backends or peers, with ``-all`` behind for the all-ReLU version of
            the model. Plaintext takes part in any case.
        repeat: inferences of each contender in a round, each on images of its own.
        warmup: inferences before these in a round, not counted.
        plan: the server's precision, of backend fss.
        spu_python: of the environment of SecretFlow SPU, if there is one.
    """

    model: str
    contenders: tuple[str, ...] = DEFAULT
    rounds: int = 5
    repeat: int = 4
    warmup: int = 1
    batch: int = 1
    threads: int = 1
    device: str = "cpu"
    network: str = "loopback"
    timeouts: Timeouts = field(default_factory=Timeouts)
    plan: str = "default"
    spu_python: str | None = None


def compare(
    plan: Plan, *, progress: Callable[[str, int, int], None] = lambda text, done, total: None
) -> Comparison:
    """Run a comparison. A contender that fails takes no further part, and the result says why.

    Args:
        progress: told what runs next, how many sessions are done and of how many; outside
            timed regions.

    Raises:
        UsageError: a model, network or contender that does not exist.
        PiError: what became of the first contender, if none could run.
    """
    link.parse(plan.network)
    names = [name for name in dict.fromkeys(plan.contenders) if name != PLAINTEXT]
    for name in names:
        contenders.check(name)
    described = environment.describe()
    measurement = _measurement(plan)
    timer = measurement.plaintext()
    with tempfile.TemporaryDirectory(prefix="pi-bench-") as folder:
        entries = [
            contenders.enter(name, measurement, Path(folder), plan.spu_python) for name in names
        ]
        ends = []
        for number in range(plan.rounds):
            for place in range(len(entries)):
                entry = entries[(number + place) % len(entries)]
                if entry.failure is not None:
                    continue
                done = number * len(entries) + place
                progress(f"round {number + 1}, {entry.name}", done, plan.rounds * len(entries))
                timer.run(PLAINTEXT_REPEAT)
                entry.run()
            failures = [entry.failure for entry in entries if entry.failure is not None]
            if failures and len(failures) == len(entries):
                raise failures[0]
            timer.run(PLAINTEXT_REPEAT)
            ends.append(len(timer.blocks()))
    ran = [entry for entry in entries if entry.failure is None]
    rounds = [_round(block, ran, number) for number, block in enumerate(_cut(timer.blocks(), ends))]
    results = [entry.result() for entry in entries]
    measured = [one for entry in ran for one in entry.measured]
    plaintext = timer.result()
    network = describe_network(plan.network, combine(measured) if measured else {})
    return Comparison(
        environment=described,
        model=describe_model(measurement.graph),
        network=network,
        threads_per_party=plan.threads,
        batch_size=plan.batch,
        plaintext=plaintext,
        contenders=results,
        ratios=ratios(results, rounds),
        rounds=rounds,
        stability=judge(
            {
                f"{one.name} {'online' if one.online else 'whole'}": one.latency_ms
                for one in results
                if one.latency_ms
            },
            plaintext.latency_ms,
            plaintext_drift=timer.drift(),
            threads=plan.threads,
            environment=described,
            network=network,
        ),
    )


def ratios(results: Sequence[Contender], rounds: Sequence[Round]) -> list[Ratio]:
    """Every contender that ran over plaintext, then all the others over the first of them."""
    ran = [one for one in results if one.not_run is None]
    plaintext = [r.plaintext_ms for r in rounds]
    over_plaintext = [
        Ratio(one.name, PLAINTEXT, _spread([r.online_ms[one.name] for r in rounds], plaintext))
        for one in ran
    ]
    return over_plaintext + [_over(one, ran[0], rounds) for one in ran[1:]]


def check_answers(comparison: Comparison, *, agreement: float, tolerance: float | None) -> None:
    """As :func:`~pi_system.bench.parity.check_parity`, of every contender that ran.

    Raises:
        ParityError: naming the first whose answers are not plaintext's.
    """
    for one in comparison.contenders:
        if one.accuracy is None:
            continue
        trained = parity.is_trained(one.model.dataset)
        try:
            parity.check_parity(
                one.accuracy, trained=trained, agreement=agreement, tolerance=tolerance
            )
        except ParityError as error:
            raise ParityError(f"{one.name}: {error}") from error


def _measurement(plan: Plan) -> Measurement:
    graph = models.resolve(plan.model)
    images, labels = models.images(graph, plan.repeat * plan.batch)
    return Measurement(
        model=plan.model,
        graph=graph,
        backend="",
        images=images,
        labels=labels,
        batch=plan.batch,
        threads=plan.threads,
        device=plan.device,
        network=plan.network,
        repeat=plan.repeat,
        warmup=plan.warmup,
        timeouts=plan.timeouts,
        plan=plan.plan,
    )


def _round(
    plaintext: Iterable[Sequence[float]], ran: Sequence[Entry | PeerEntry], number: int
) -> Round:
    offline = {one.name: one.offline_ms(number) for one in ran}
    return Round(
        plaintext_ms=Latency.of(value for block in plaintext for value in block).values,
        online_ms={one.name: one.online_ms(number) for one in ran},
        offline_ms={name: values for name, values in offline.items() if values is not None},
    )


def _cut(blocks: Sequence[Sequence[float]], ends: Sequence[int]) -> list[Sequence[Sequence[float]]]:
    return [blocks[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _over(one: Contender, other: Contender, rounds: Sequence[Round]) -> Ratio:
    online_latency = _spread(
        [r.online_ms[one.name] for r in rounds], [r.online_ms[other.name] for r in rounds]
    )
    if not (one.online and one.offline and other.online and other.offline):
        return Ratio(one.name, other.name, online_latency)
    return Ratio(
        contender=one.name,
        over=other.name,
        online_latency=online_latency,
        offline_latency=_spread(
            [r.offline_ms[one.name] for r in rounds], [r.offline_ms[other.name] for r in rounds]
        ),
        online_bytes=_quotient(one.online.bytes.total, other.online.bytes.total),
        offline_bytes=_quotient(one.offline.bytes.total, other.offline.bytes.total),
        round_trips=_quotient(one.online.round_trips, other.online.round_trips),
    )


def _spread(above: Iterable[Sequence[float]], below: Iterable[Sequence[float]]) -> Spread:
    values = [
        round(statistics.median(a) / statistics.median(b), 4)
        for a, b in zip(above, below, strict=True)
    ]
    return Spread(round(statistics.median(values), 4), min(values), max(values), values)


def _quotient(above: float, below: float) -> float | None:
    return round(above / below, 4) if below else None
