"""Models and images by name: the bundled ones, random ones, and exported directories.

Torch is imported only where a model is traced: an exported one needs none.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import sys
import tokenize
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from .errors import IntegrityError, UsageError
from .graph import serialize
from .graph.ir import Array, Graph, Node

RANDOM_CLASSES: Final = 100
RANDOM_INPUT: Final = (3, 32, 32)
BAD_NPY: Final = (
    ValueError, EOFError, MemoryError, RecursionError, SyntaxError, TypeError,
    tokenize.TokenError,
)  # fmt: skip
"""What NumPy may raise for a file that is no whole ``.npy``."""
_SEED: Final = 20230501
_BUNDLED: Final = {"demo": "student", "demo-teacher": "teacher"}
PLANS_NAME: Final = "plans.json"
"""Beside a checkpoint: metadata that exporting it adds, made for exactly its weights."""
_RANDOM: Final = re.compile(
    r"random:(?P<arch>[a-z0-9_]+?)(?:w(?P<width>[0-9]{1,4}))?@(?P<relus>all|[0-9]{1,9})"
)

# Max-normalised ReLU sensitivity of ResNet-18 on CIFAR-100, stem first: what SENet's published
# layer budgets imply.
RESNET18_SENSITIVITY: Final = (
    0.0572, 0.1854, 0.2129, 0.2506, 0.2758, 0.3549, 0.4884, 0.5102, 0.5568, 0.6739, 0.8143,
    0.8277, 0.8623, 0.9410, 0.9902, 0.9986, 1.0,
)  # fmt: skip


def resolve(name: str) -> Graph:
    """The model called ``name``.

    Args:
        name: ``demo`` (the bundled student), ``demo-teacher``, ``random:ARCH@RELUS`` or
            ``random:ARCH@all`` (published width, or ``random:resnet18w16@...``), or the
            directory of an exported model.

    Raises:
        UsageError: there is no such model.
        IntegrityError: its files are corrupt.
    """
    if name in _BUNDLED:
        return _bundled(name)
    if name.startswith("random:"):
        match = _RANDOM.fullmatch(name)
        if match is None:
            raise UsageError(
                f"{name!r} is not random:ARCH@RELUS, such as random:resnet18@49600 or "
                "random:resnet18w16@all"
            )
        width = None if match["width"] is None else int(match["width"])
        relus = None if match["relus"] == "all" else int(match["relus"])
        return random_graph(match["arch"], width=width, relus=relus)
    path = Path(name)
    if not path.exists():
        raise UsageError(
            f"no model {name!r}: it is none of {', '.join(_BUNDLED)}, random:ARCH@RELUS, and "
            "not a directory"
        )
    if (path / "manifest.json").exists() and not (path / serialize.HEADER_NAME).exists():
        raise UsageError(f"{name} is a checkpoint; export it first: pi-export {name} -o OUT")
    return serialize.load(path)


def from_checkpoint(directory: Path, name: str | None = None, *, plans: bool = True) -> Graph:
    """Read a checkpoint and export it.

    Args:
        plans: with the fixed-point plans beside it; without, they may be of other weights.

    Raises:
        UsageError: there is none.
        IntegrityError: it is corrupt.
    """
    from . import checkpoint
    from .graph.trace import export

    model, manifest = checkpoint.load(directory)
    facts = dataclasses.asdict(manifest)
    for key in ("version", "relu_kept"):
        del facts[key]
    if plans:
        facts |= _plans(directory)
    facts["name"] = name or f"{manifest.arch}-{manifest.dataset}-{manifest.relu_kept}"
    return export(model, manifest.input_shape, metadata=_json(facts))


def weights_hash(directory: Path) -> str:
    """The SHA-256 of a checkpoint's weights file."""
    return hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()


def _plans(directory: Path) -> dict[str, Any]:
    """The metadata in a checkpoint's plans file, if it has one.

    Raises:
        IntegrityError: it is corrupt, or was made for other weights.
    """
    path = directory / PLANS_NAME
    if not path.is_file():
        return {}
    try:
        document = json.loads(path.read_bytes())
        weights, metadata = document["weights_sha256"], dict(document["metadata"])
    except (ValueError, TypeError, KeyError) as error:
        raise IntegrityError(f"{path} is corrupt: {error}") from error
    if weights != weights_hash(directory):
        raise IntegrityError(
            f"{path} was made for other weights; make it again: "
            f"pi-export {directory} --calibrate IMAGES --plans-only"
        )
    return metadata


def from_file(
    spec: str, shape: Sequence[int], *, relus: int | None = None, seed: int = _SEED
) -> Graph:
    """Build a user's own network and export it. This runs the user's file.

    Args:
        spec: ``file.py:factory``; calling the factory without arguments gives an ``nn.Module``.
        shape: its input, (C, H, W).
        relus: keep this many ReLUs at random positions, equally many per layer as far as a
            layer has them; ``None`` keeps the network's own masks (all ReLUs if it has none).

    Raises:
        UsageError: the file, the factory or the budget is wrong.
        UnsupportedLayer: the network cannot be exported.
    """
    from .graph.trace import export

    model = _build(spec)
    name = type(model).__name__
    graph = export(model, shape, metadata={"name": name, "dataset": "unknown"})
    if relus is None:
        return graph
    if graph.relu_kept < graph.relu_total:
        raise UsageError(f"{name} has masks of its own; export it without a number of ReLUs")
    graph = with_random_masks(
        graph, relus, [1.0] * len(graph.relus), np.random.default_rng([seed, 2])
    )
    metadata = {**graph.metadata, "masks": "random positions, not trained"}
    return dataclasses.replace(graph, metadata=metadata)


def _build(spec: str) -> Any:
    from importlib.util import module_from_spec, spec_from_file_location

    from torch.nn import Module

    file, _, attribute = spec.rpartition(":")
    path = Path(file)
    if not file or not attribute.isidentifier():
        raise UsageError(f"{spec!r} is not file.py:factory")
    if path.suffix != ".py" or not path.is_file():
        raise UsageError(f"no Python file {file!r}")
    found = spec_from_file_location(f"_pi_user_{path.stem}", path)
    assert found is not None and found.loader is not None
    module = module_from_spec(found)
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    sys.modules[found.name] = module
    try:
        found.loader.exec_module(module)
        factory = getattr(module, attribute, None)
        if not callable(factory):
            raise UsageError(f"{file} defines no factory {attribute!r}")
        model = factory()
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"{spec} failed: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(folder)
        del sys.modules[found.name]
    if not isinstance(model, Module):
        raise UsageError(f"{spec} returned a {type(model).__name__}, expected an nn.Module")
    return model


def demo_images() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """The bundled test images: pixels (N, 3, 32, 32) of 0 to 255, and their labels (N,).

    Raises:
        UsageError: this installation has none.
        IntegrityError: they are corrupt.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    file = resources.files(__package__) / "demo" / "images.safetensors"
    if not file.is_file():
        raise UsageError("this installation has no bundled images (pi_system/demo is incomplete)")
    try:
        data = load(file.read_bytes())
        pixels, labels = data["pixels"], data["labels"]
    except (SafetensorError, KeyError, ValueError) as error:
        raise IntegrityError(f"the bundled images are corrupt: {error}") from error
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or labels.shape != pixels.shape[:1]:
        raise IntegrityError("the bundled images are corrupt: unexpected shapes")
    return pixels, labels.astype(np.int64)


def images(
    graph: Graph, count: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64] | None]:
    """``count`` normalised images a model can be tried on, and their labels if they have any.

    They are the bundled test images (repeated when there are too few) if the model was trained
    on their data set, else random ones.
    """
    if graph.metadata.get("dataset") == "cifar100" and graph.input.shape == RANDOM_INPUT:
        pixels, labels = demo_images()
        chosen = np.arange(count) % len(pixels)
        return normalise(pixels[chosen], graph.metadata), labels[chosen]
    return random_images(count, graph.input.shape), None


def random_images(count: int, shape: tuple[int, ...], seed: int = _SEED) -> npt.NDArray[np.float32]:
    """Images (N, *shape) of standard normal pixels, as normalised ones are on average."""
    generator = np.random.default_rng([seed, 1])
    return generator.standard_normal((count, *shape), dtype=np.float32)


def read_images(path: Path, graph: Graph) -> npt.NDArray[np.float32]:
    """Images of a ``.npy`` file: pixels 0 to 255 as uint8, normalised here, or floats as they
    are; (N, C, H, W), or (C, H, W) for one.

    Raises:
        UsageError: the file is missing, is no such array, or does not fit the model.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    except BAD_NPY as error:
        raise UsageError(f"{path} is not a .npy file of numbers: {error}") from error
    if not isinstance(array, np.ndarray):
        raise UsageError(f"{path} is not a .npy file of one array")
    array = array[None] if array.ndim == 3 else array
    if array.ndim != 4 or array.shape[1:] != graph.input.shape or not len(array):
        expected = ", ".join(map(str, graph.input.shape))
        raise UsageError(f"{path} holds {array.shape}, the model takes (N, {expected})")
    if array.dtype == np.uint8:
        return normalise(array, graph.metadata)
    if array.dtype.kind != "f" or not np.isfinite(array).all():
        raise UsageError(f"{path} holds {array.dtype}, expected uint8 pixels or finite floats")
    return array.astype(np.float32)


def normalise(
    pixels: npt.NDArray[np.uint8], metadata: Mapping[str, Any]
) -> npt.NDArray[np.float32]:
    """Pixels (N, C, H, W) of 0 to 255 to (pixel / 255 - mean) / std, by channel.

    Raises:
        UsageError: the model's metadata lack ``mean`` and ``std`` of C values.
    """
    channels = pixels.shape[1]
    try:
        mean, std = (np.asarray(metadata[k], np.float32) for k in ("mean", "std"))
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError("the model does not say how its images are normalised") from error
    if not np.isfinite([*mean.flat, *std.flat]).all() or not (std > 0).all():
        raise UsageError("the model's mean or std of a pixel is not a number it can be")
    if mean.shape != (channels,) or std.shape != (channels,):
        raise UsageError(f"the model's images have {mean.size} channels, these have {channels}")
    scaled = pixels.astype(np.float32) / np.float32(255)
    result: npt.NDArray[np.float32] = (scaled - mean[:, None, None]) / std[:, None, None]
    return result


def random_graph(
    arch: str, *, width: int | None = None, relus: int | None = None, seed: int = _SEED
) -> Graph:
    """An architecture with random weights in a trained network's range and random masks.

    Layer budgets follow the stage 1 rule with ResNet-18's published sensitivities, by depth;
    the positions are drawn uniformly. The same arguments give the same graph.

    Args:
        width: channels of the first stage; ``None`` is the published width.
        relus: ReLUs kept, ``None`` for all.

    Raises:
        UsageError: an unknown architecture, or more ReLUs than it has.
    """
    from . import nn
    from .graph.trace import export
    from .nn.zoo import DEFAULT_WIDTH, input_shape

    if arch not in DEFAULT_WIDTH:
        raise UsageError(f"unknown architecture {arch!r}; known: {', '.join(DEFAULT_WIDTH)}")
    if width == DEFAULT_WIDTH[arch]:
        width = None
    suffix = "" if width is None else f"w{width}"
    metadata = {
        "name": f"random:{arch}{suffix}@{'all' if relus is None else relus}",
        "arch": arch,
        "width": width or DEFAULT_WIDTH[arch],
        "dataset": "random",
        "seed": seed,
    }
    model = nn.build(arch, classes=RANDOM_CLASSES, width=width)
    graph = export(model, input_shape(arch), metadata=metadata)
    if relus is not None:
        depth = np.linspace(0, 1, len(graph.relus))
        known = np.linspace(0, 1, len(RESNET18_SENSITIVITY))
        sensitivity = np.interp(depth, known, RESNET18_SENSITIVITY)
        generator = np.random.default_rng([seed, 2])
        graph = with_random_masks(graph, relus, sensitivity.tolist(), generator)
    # After the masks: where a ReLU is gone, twice as much gets through.
    return with_random_weights(graph, np.random.default_rng([seed, 0]))


def with_random_masks(
    graph: Graph, relus: int, sensitivity: list[float], generator: np.random.Generator
) -> Graph:
    """The graph with exactly ``relus`` ReLUs kept at random positions, layer by layer as
    :func:`~pi_system.nn.budget.allocate` divides them."""
    from .nn.budget import allocate

    sizes = [int(np.prod(node.shape)) for node in graph.relus]
    tensors = dict(graph.tensors)
    counts = allocate(sizes, sensitivity, relus)
    for node, size, kept in zip(graph.relus, sizes, counts, strict=True):
        mask = np.zeros(size, np.bool_)
        mask[generator.choice(size, kept, replace=False, shuffle=False)] = True
        tensors[f"{node.name}.mask"] = mask.reshape(node.shape)
    return dataclasses.replace(graph, tensors=tensors)


def with_random_weights(graph: Graph, generator: np.random.Generator) -> Graph:
    """Random weights scaled by what they do to random images, as batch norm would.

    Every channel of a conv, linear or affine node gets mean about 0 and standard deviation 1
    before its ReLU; half that at the end of a residual branch, so that sums stay small, and 3
    for the logits. Computed in float64, so that thread counts do not show in the result.
    """
    import torch

    from .graph import execute

    tensors = dict(graph.tensors)
    values = {graph.input.name: random_images(4, graph.input.shape).astype(np.float64)}
    readers = graph.consumers()
    with torch.inference_mode():
        for node in graph.nodes[1:]:
            inputs = [torch.from_numpy(values[name]) for name in node.inputs]
            if node.op in ("conv", "linear", "affine"):
                _draw(tensors, node, generator)
                double = {
                    k: v.astype(np.float64)
                    for k, v in tensors.items()
                    if k.rpartition(".")[0] == node.name
                }
                step = execute.step(dataclasses.replace(graph, tensors=double), node)
                output = step(inputs).numpy()
                target = 3.0 if node is graph.output else 1.0
                branch = readers[node.name]
                if target == 1.0 and branch and all(r.op == "add" for r in branch):
                    target = 0.5
                values[node.name] = _rescale(tensors, node, output, target)
            else:
                values[node.name] = execute.step(graph, node)(inputs).numpy()
    return dataclasses.replace(graph, tensors=tensors)


def _draw(tensors: dict[str, Array], node: Node, generator: np.random.Generator) -> None:
    weight, bias = ("scale", "shift") if node.op == "affine" else ("weight", "bias")
    shape = tensors[f"{node.name}.{weight}"].shape
    draw = generator.standard_normal(shape, dtype=np.float32)
    if node.op == "affine":
        draw = np.abs(draw) + 1
    else:
        draw *= np.float32(np.prod(shape[1:]) ** -0.5)
    tensors[f"{node.name}.{weight}"] = draw
    tensors[f"{node.name}.{bias}"] = np.zeros(shape[0], np.float32)


def _rescale(
    tensors: dict[str, Array], node: Node, output: npt.NDArray[np.float64], target: float
) -> npt.NDArray[np.float64]:
    weight, bias = ("scale", "shift") if node.op == "affine" else ("weight", "bias")
    axes = (0, *range(2, output.ndim))
    mean = output.mean(axis=axes)
    if node.op == "linear":
        # A handful of images is too few for a statistic per logit.
        scale = np.full_like(mean, target / max(float((output - mean).std()), 1e-6))
    else:
        scale = target / np.maximum(output.std(axis=axes), 1e-6)
    old = tensors[f"{node.name}.{weight}"]
    column = scale.reshape(-1, *[1] * (old.ndim - 1))
    tensors[f"{node.name}.{weight}"] = (old * column).astype(np.float32)
    tensors[f"{node.name}.{bias}"] = (-mean * scale).astype(np.float32)
    per_channel = (-1, *[1] * (output.ndim - 2))
    result: npt.NDArray[np.float64] = (output - mean.reshape(per_channel)) * scale.reshape(
        per_channel
    )
    return result


def _bundled(name: str) -> Graph:
    folder = resources.files(__package__) / "demo" / _BUNDLED[name]
    if not (folder / "manifest.json").is_file():
        raise UsageError(
            f"this installation has no {name} model (pi_system/demo/{_BUNDLED[name]} is missing); "
            "use random:resnet18w16@12500 or an exported model"
        )
    with resources.as_file(folder) as path:
        return from_checkpoint(path, name)


def _json(value: Any) -> Any:
    """Tuples to lists, so that metadata read back compare equal."""
    if isinstance(value, Mapping):
        return {key: _json(item) for key, item in value.items()}
    return [_json(item) for item in value] if isinstance(value, tuple | list) else value
