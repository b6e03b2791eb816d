"""The private answers beside plaintext's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ParityError, UsageError
from ..graph.ir import Graph
from .schema import Accuracy, FixedPoint, Prediction

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
Inferences = list[dict[str, Any]]
"""Of a client's report, as JSON: ``images`` (rows of the images given) and their ``logits``."""
LISTED = 100
"""Predictions that a result lists; of more images only those that differ from plaintext."""
TOLERANCE = 0.1
"""Of a random model's logits, where the backend states no error."""


def accuracy(
    inferences: Inferences,
    expected: Floats,
    labels: Labels | None,
    facts: Mapping[str, Any] | None = None,
) -> Accuracy:
    """Agreement of all answers with plaintext.

    Args:
        expected: plaintext logits (N, classes) of all images.
        labels: (N,).
        facts: of the client's report.

    Raises:
        UsageError: the answers have another shape.
    """
    rows = np.array([image for inference in inferences for image in inference["images"]])
    private = np.array([row for inference in inferences for row in inference["logits"]])
    if private.shape[1:] != expected.shape[1:]:
        raise UsageError(f"the answers have shape {private.shape[1:]}, not {expected.shape[1:]}")
    agree = private.argmax(1) == expected[rows].argmax(1)
    _, first = np.unique(rows, return_index=True)
    hits = None if labels is None else private[first].argmax(1) == labels[rows[first]]
    plain_hits = None if labels is None else expected.argmax(1) == labels
    error = np.abs(private - expected[rows]).max(axis=1)
    facts = facts or {}
    stated = facts.get("error")
    return Accuracy(
        images=len(first),
        answers=len(rows),
        argmax_agreement=float(agree.mean()),
        max_abs_error=float(error.max()),
        correct=None if hits is None else int(hits.sum()),
        plaintext_correct=None if plain_hits is None else int(plain_hits.sum()),
        retries=facts.get("retries", 0),
        stated_error=stated,
        beyond_stated=0 if stated is None else int((error > stated).sum()),
    )


def fixed_point(plan: str, facts: Mapping[str, Any]) -> FixedPoint | None:
    """The plan called ``plan`` by the facts of a client's report, if its backend has plans."""
    names = ("f_x", "opened_bits", "ring_bits", "error", "retry_rate")
    return FixedPoint(plan, *(facts[name] for name in names)) if "f_x" in facts else None


def predictions(
    inferences: Inferences, expected: Floats, labels: Labels | None, graph: Graph, every: bool
) -> list[Prediction]:
    """The first answer for every image, by the class names of ``graph`` where it has them.

    Args:
        every: list all, however many they are.
    """
    classes = graph.metadata.get("classes")
    known = isinstance(classes, list | tuple) and len(classes) == expected.shape[1]

    def name(index: int) -> str:
        return str(classes[index]) if known and classes is not None else str(index)

    first: dict[int, Prediction] = {}
    for inference in inferences:
        for image, logits in zip(inference["images"], inference["logits"], strict=True):
            if image in first:
                continue
            runner_up, best = np.partition(expected[image], -2)[-2:]
            private, plaintext = int(np.argmax(logits)), int(expected[image].argmax())
            first[image] = Prediction(
                image=image,
                label=None if labels is None else name(int(labels[image])),
                private=name(private),
                plaintext=name(plaintext),
                equal=private == plaintext,
                max_abs_error=round(float(np.abs(np.array(logits) - expected[image]).max()), 6),
                plaintext_margin=round(float(best - runner_up), 6),
            )
    listed = every or len(first) <= LISTED
    return [first[image] for image in sorted(first) if listed or not first[image].equal]


def check_parity(
    accuracy: Accuracy, *, trained: bool, agreement: float, tolerance: float | None
) -> None:
    """Compare with plaintext as strictly as the model allows.

    A trained model must give plaintext's class in at least the fraction ``agreement`` of the
    answers; the logits of random weights nearly tie and are held to ``tolerance`` instead, or
    where that is ``None`` to what the backend states.

    Raises:
        ParityError: they do not.
    """
    if tolerance is None:
        tolerance = TOLERANCE if accuracy.stated_error is None else accuracy.stated_error
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


def is_trained(dataset: str | None) -> bool:
    """Whether answers mean anything, by the data set in a model's public metadata."""
    return dataset not in (None, "random")
