"""The private answers beside plaintext's."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ParityError, UsageError
from ..graph.ir import Graph
from .schema import Accuracy, Prediction

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
Inferences = list[dict[str, Any]]
"""Of a client's report, as JSON: ``images`` (rows of the images given) and their ``logits``."""


def accuracy(inferences: Inferences, expected: Floats, labels: Labels | None) -> Accuracy:
    """Agreement of all answers with plaintext.

    Args:
        expected: plaintext logits (N, classes) of all images.
        labels: (N,).

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
    return Accuracy(
        images=len(first),
        answers=len(rows),
        argmax_agreement=float(agree.mean()),
        max_abs_error=float(np.abs(private - expected[rows]).max()),
        correct=None if hits is None else int(hits.sum()),
        plaintext_correct=None if plain_hits is None else int(plain_hits.sum()),
    )


def predictions(
    inferences: Inferences, expected: Floats, labels: Labels | None, graph: Graph
) -> list[Prediction]:
    """The first answer for every image, by the class names of ``graph`` where it has them."""
    classes = graph.metadata.get("classes")
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
                label=None if labels is None else name(int(labels[image])),
                private=name(private),
                plaintext=name(plaintext),
                equal=private == plaintext,
                max_abs_error=round(float(np.abs(np.array(logits) - expected[image]).max()), 6),
            )
    return [first[image] for image in sorted(first)]


def check_parity(accuracy: Accuracy, *, trained: bool, agreement: float, tolerance: float) -> None:
    """Compare with plaintext as strictly as the model allows.

    A trained model must give plaintext's class in at least the fraction ``agreement`` of the
    answers; the logits of random weights nearly tie and are held to ``tolerance`` instead.

    Raises:
        ParityError: they do not.
    """
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
