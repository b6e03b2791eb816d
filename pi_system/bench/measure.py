"""One measurement: three local parties and plaintext in the same run, put into one result."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import IntegrityError, ParityError, UsageError
from ..graph.execute import run as run_plaintext
from ..graph.ir import Graph
from ..net.link import parse
from ..parties.local import LocalRun, run_local
from ..parties.timeouts import Timeouts
from . import environment
from .plaintext import PlaintextTimer
from .schema import (
    Accuracy,
    Latency,
    Model,
    Network,
    Offline,
    Online,
    OnlineTraffic,
    Prediction,
    Result,
    Setup,
)
from .stability import judge
from .traffic import Logs

_PLAINTEXT_REPEAT = 10


@dataclass(frozen=True)
class Measurement:
    """What to measure.

    Attributes:
        model: as named on the command line.
        graph: the same model, for plaintext.
        images: (N, C, H, W), normalised.
        labels: (N,) or None.
        network: see :func:`pi_system.net.link.parse`.
        repeat: at least so many inferences; every image is classified at least once.
    """

    model: str
    graph: Graph
    backend: str
    images: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64] | None = None
    batch: int = 1
    threads: int = 1
    device: str = "cpu"
    network: str = "loopback"
    repeat: int = 5
    warmup: int = 1
    timeouts: Timeouts = field(default_factory=Timeouts)


def measure(plan: Measurement, *, progress: Callable[[str], None] = lambda text: None) -> Result:
    """Run a measurement.

    Args:
        progress: told what happens, outside timed regions.

    Raises:
        UsageError: a model, backend or image that does not fit.
        PiError: a party failed.
    """
    described = environment.describe()
    expected = run_plaintext(plan.graph, plan.images)
    held = plan.images[np.arange(plan.batch) % len(plan.images)]
    timer = PlaintextTimer(plan.graph, held, plan.threads)
    progress("plaintext, before")
    timer.run(_PLAINTEXT_REPEAT)
    progress("private inference in three processes")
    local = run_local(
        LocalRun(
            model=plan.model,
            backend=plan.backend,
            images=plan.images,
            batch=plan.batch,
            threads=plan.threads,
            device=plan.device,
            network=plan.network,
            repeat=plan.repeat,
            warmup=plan.warmup,
            timeouts=plan.timeouts,
        )
    )
    progress("plaintext, after")
    timer.run(_PLAINTEXT_REPEAT)

    report = local.client
    digest = plan.graph.sha256()
    if report["sha256"] != digest:
        raise IntegrityError("the server's model is not the plaintext one; has it changed?")
    logs = Logs.of(local.server["meter"], report["meter"])
    inferences = report["inferences"]
    numbers = [inference["number"] for inference in inferences]
    online = Latency.of(inference["online_seconds"] for inference in inferences)
    plaintext = timer.result()
    traffic = logs.phase("online", numbers)
    layers = logs.layers(plan.graph, numbers)
    parties = {"client": report, "server": local.server, "dealer": local.dealer}
    return Result(
        environment=described,
        model=_model(plan.graph, digest),
        backend=plan.backend,
        network=_network(plan.network, report),
        threads_per_party=plan.threads,
        batch_size=plan.batch,
        plaintext=plaintext,
        setup=Setup(round(report["setup_seconds"], 4), logs.phase("setup")),
        offline=Offline(
            Latency.of(inference["offline_seconds"] for inference in inferences),
            logs.phase("offline", numbers),
            **logs.offline_parts(plan.graph, plan.batch, numbers),
        ),
        online=Online(
            latency_ms=online,
            bytes=OnlineTraffic(traffic.client_to_server, traffic.server_to_client),
            relu_bytes=sum(layer.bytes.total for layer in layers if layer.op == "relu"),
            round_trips=statistics.median(logs.online_round_trips(n) for n in numbers),
            layers=layers,
        ),
        accuracy=_accuracy(inferences, expected, plan.labels),
        peak_memory_mb={
            role: round(party["peak_memory"] / 1e6, 1) for role, party in parties.items()
        },
        stability=judge(
            online,
            plaintext.latency_ms,
            plaintext_drift=timer.drift(),
            threads=plan.threads,
            environment=described,
        ),
        predictions=_predictions(inferences, expected, plan),
    )


def check_parity(result: Result, *, trained: bool, agreement: float, tolerance: float) -> None:
    """Compare with plaintext as strictly as the model allows.

    A trained model must give plaintext's class in at least the fraction ``agreement`` of the
    answers; the logits of random weights nearly tie and are held to ``tolerance`` instead.

    Raises:
        ParityError: they do not.
    """
    accuracy = result.accuracy
    if trained and accuracy.argmax_agreement < agreement:
        raise ParityError(
            f"{accuracy.argmax_agreement:.2%} of the private answers are plaintext's, "
            f"{agreement:.2%} are wanted (largest logit error {accuracy.max_abs_error:.3g})"
        )
    if not trained and not accuracy.max_abs_error <= tolerance:
        raise ParityError(
            f"a private logit is {accuracy.max_abs_error:.3g} from plaintext's, "
            f"allowed are {tolerance:g}"
        )


def _model(graph: Graph, digest: str) -> Model:
    dataset = graph.metadata.get("dataset")
    return Model(
        name=str(graph.metadata.get("name", "unnamed")),
        dataset=None if dataset is None else str(dataset),
        relu_total=graph.relu_total,
        relu_kept=graph.relu_kept,
        relu_layers=sum(graph.kept(node) > 0 for node in graph.relus),
        sha256=digest,
    )


def _network(name: str, report: dict[str, Any]) -> Network:
    link = parse(name)
    return Network(
        name,
        None if link is None else link.rtt_ms,
        None if link is None else link.mbps,
        {
            "rtt_ms": round(1000 * statistics.median(report["round_trip_seconds"]), 4),
            "mbps": round(report["megabits"], 1),
        },
    )


def _accuracy(
    inferences: list[dict[str, Any]],
    expected: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64] | None,
) -> Accuracy:
    rows = np.array([image for inference in inferences for image in inference["images"]])
    private = np.array([row for inference in inferences for row in inference["logits"]])
    if private.shape[1:] != expected.shape[1:]:
        raise UsageError(f"the answers have shape {private.shape[1:]}, not {expected.shape[1:]}")
    agree = private.argmax(1) == expected[rows].argmax(1)
    _, first = np.unique(rows, return_index=True)
    hits = None if labels is None else private[first].argmax(1) == labels[rows[first]]
    plain_hits = None if labels is None else expected.argmax(1) == labels
    return Accuracy(
        images=len(first),
        answers=len(rows),
        argmax_agreement=float(agree.mean()),
        max_abs_error=float(np.abs(private - expected[rows]).max()),
        correct=None if hits is None else int(hits.sum()),
        plaintext_correct=None if plain_hits is None else int(plain_hits.sum()),
    )


def _predictions(
    inferences: list[dict[str, Any]], expected: npt.NDArray[np.float32], plan: Measurement
) -> list[Prediction]:
    classes = plan.graph.metadata.get("classes")
    known = isinstance(classes, list | tuple) and len(classes) == expected.shape[1]

    def name(index: int) -> str:
        return str(classes[index]) if known and classes is not None else str(index)

    first: dict[int, Prediction] = {}
    for inference in inferences:
        for image, logits in zip(inference["images"], inference["logits"], strict=True):
            if image in first:
                continue
            private, plaintext = int(np.argmax(logits)), int(expected[image].argmax())
            first[image] = Prediction(
                image=image,
                label=None if plan.labels is None else name(int(plan.labels[image])),
                private=name(private),
                plaintext=name(plaintext),
                equal=private == plaintext,
                max_abs_error=round(float(np.abs(np.array(logits) - expected[image]).max()), 6),
            )
    return [first[image] for image in sorted(first)]
