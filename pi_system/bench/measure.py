"""One measurement: three local parties and plaintext in the same run, put into one result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ..graph.execute import run as run_plaintext
from ..graph.ir import Graph
from ..parties.local import LocalRun, run_local
from ..parties.timeouts import Timeouts
from . import environment, parity
from .observation import Observation, describe_model, describe_network
from .plaintext import PlaintextTimer
from .schema import Result
from .stability import judge

PLAINTEXT_REPEAT = 10
_CHUNK = 100


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
        plan: the server's precision.
        every: list the predictions of all images, however many.
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
    plan: str = "default"
    every: bool = False

    def session(self, progress: Callable[[int, int], None] = lambda done, total: None) -> LocalRun:
        """The private part."""
        return LocalRun(
            model=self.model,
            backend=self.backend,
            images=self.images,
            batch=self.batch,
            threads=self.threads,
            device=self.device,
            network=self.network,
            repeat=self.repeat,
            warmup=self.warmup,
            timeouts=self.timeouts,
            plan=self.plan,
            progress=progress,
        )

    def plaintext(self) -> PlaintextTimer:
        """Plaintext on one batch of the images."""
        held = self.images[np.arange(self.batch) % len(self.images)]
        return PlaintextTimer(self.graph, held, self.threads)


def measure(plan: Measurement, *, progress: Callable[[str], None] = lambda text: None) -> Result:
    """Run a measurement.

    Args:
        progress: told what happens, outside timed regions.

    Raises:
        UsageError: a model, backend or image that does not fit.
        PiError: a party failed.
    """
    described = environment.describe()
    expected = _plaintext(plan.graph, plan.images)
    timer = plan.plaintext()
    progress("plaintext, before")
    timer.run(PLAINTEXT_REPEAT)
    progress("private inference in three processes")
    local = run_local(plan.session(lambda done, total: progress(f"{done} of {total} inferences")))
    progress("plaintext, after")
    timer.run(PLAINTEXT_REPEAT)

    seen = Observation.of(plan.graph, local)
    plaintext = timer.result()
    network = describe_network(plan.network, seen.measured)
    inferences, facts = local.client["inferences"], local.client["facts"]
    return Result(
        environment=described,
        model=describe_model(plan.graph),
        backend=plan.backend,
        network=network,
        threads_per_party=plan.threads,
        batch_size=plan.batch,
        plaintext=plaintext,
        setup=seen.setup,
        offline=seen.offline,
        online=seen.online,
        accuracy=parity.accuracy(inferences, expected, plan.labels, facts),
        peak_memory_mb=seen.peak_memory_mb,
        stability=judge(
            {"online": seen.online.latency_ms},
            plaintext.latency_ms,
            plaintext_drift=timer.drift(),
            threads=plan.threads,
            environment=described,
            network=network,
        ),
        predictions=parity.predictions(inferences, expected, plan.labels, plan.graph, plan.every),
        fixed_point=parity.fixed_point(plan.plan, facts),
    )


def _plaintext(graph: Graph, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Logits of any number of images, in little memory."""
    chunks = range(0, len(images), _CHUNK)
    return np.concatenate([run_plaintext(graph, images[at : at + _CHUNK]) for at in chunks])
