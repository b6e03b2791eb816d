"""Graphs on disk and on the wire. Everything read is checked before it is believed.

On disk a graph is a directory: ``graph.json`` (nodes, metadata, version, two SHA-256) and
``tensors.safetensors`` (masks as booleans). On the wire a public graph is a JSON header, its
length before it, and one bit per activation position after it.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as dump_tensors

from ..errors import IntegrityError, PiError, ProtocolError, UsageError
from ..files import write_atomic
from . import validate
from .ir import TENSORS, Array, Attribute, Graph, Node

VERSION: Final = 1
HEADER_NAME: Final = "graph.json"
TENSORS_NAME: Final = "tensors.safetensors"
MAX_HEADER_BYTES: Final = 8 << 20
MAX_WIRE_BYTES: Final = 64 << 20
_MAX_DEPTH: Final = 32
_MAGIC: Final = b"PIGRAPH1"


def save(path: Path, graph: Graph) -> str:
    """Write ``graph`` to the directory ``path``; each file appears whole or not at all.

    Returns:
        The graph's SHA-256.

    Raises:
        UsageError: ``path`` is a file, or cannot be written.
    """
    validate.check(graph, weights=True, error=UsageError)
    tensors = dump_tensors({k: np.ascontiguousarray(graph.tensors[k]) for k in graph.tensors})
    digest = graph.sha256()
    header = _encode(graph, digest, hashlib.sha256(tensors).hexdigest())
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_atomic(path / TENSORS_NAME, tensors)
        write_atomic(path / HEADER_NAME, header)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
    return digest


def load(path: Path) -> Graph:
    """Read the graph in the directory ``path``.

    Raises:
        UsageError: there is none.
        IntegrityError: a file is corrupt, truncated, of another graph or of another version.
    """
    header_path, tensors_path = path / HEADER_NAME, path / TENSORS_NAME
    try:
        header = header_path.read_bytes()
        tensors = tensors_path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"{path} holds no exported model: cannot read {error.filename}: {error.strerror}"
        ) from error

    def fail(reason: str) -> NoReturn:
        raise IntegrityError(f"{header_path}: {reason}")

    document = _parse(header, fail)
    if document.get("version") != VERSION:
        fail(f"not a graph of version {VERSION}")
    stated = document.get("tensors_sha256")
    if hashlib.sha256(tensors).hexdigest() != stated:
        raise IntegrityError(f"{tensors_path} is corrupt, truncated or of another model")
    try:
        values: dict[str, Array] = load_tensors(tensors)
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise IntegrityError(f"{tensors_path} is corrupt: {error}") from error
    graph = _graph(document, values, fail)
    validate.check(graph, weights=True, error=IntegrityError)
    # The file has one spelling, so comparing bytes catches every change there is.
    if _encode(graph, graph.sha256(), str(stated)) != header:
        fail("corrupt, or of another model")
    return graph


def to_bytes(graph: Graph) -> bytes:
    """A graph's public part (:meth:`Graph.public`) as one message."""
    public = graph.public()
    header = json.dumps(public.header(), separators=(",", ":")).encode()
    masks = [
        np.packbits(public.tensor(node, "mask").reshape(-1)).tobytes() for node in public.relus
    ]
    return b"".join([_MAGIC, struct.pack("<I", len(header)), header, *masks])


def from_bytes(data: bytes | bytearray | memoryview) -> Graph:
    """Read what a peer's :func:`to_bytes` wrote, trusting nothing in it.

    Raises:
        ProtocolError: it is not exactly a valid public graph.
    """

    def fail(reason: str) -> NoReturn:
        raise ProtocolError(f"the peer's model is not valid: {reason}")

    data = bytes(data) if len(data) <= MAX_WIRE_BYTES else fail(f"{len(data)} bytes are too many")
    start = len(_MAGIC) + 4
    if len(data) < start or not data.startswith(_MAGIC):
        fail("unknown format")
    (size,) = struct.unpack_from("<I", data, len(_MAGIC))
    if size > min(MAX_HEADER_BYTES, len(data) - start):
        fail("truncated")
    graph = _graph(_parse(data[start : start + size], fail), {}, fail)
    masks: dict[str, Array] = {}
    position = start + size
    for node in graph.relus:
        if min(node.shape, default=0) < 1:
            fail(f"node {node.name[:80]!r} has no positions")
        count = int(np.prod(node.shape, dtype=object))
        length = (count + 7) // 8
        if length > len(data) - position:
            fail("truncated")
        packed = np.frombuffer(data, np.uint8, length, position)
        bits = np.unpackbits(packed)
        if bits[count:].any():
            fail("a mask has bits beyond its end")
        masks[f"{node.name}.mask"] = bits[:count].astype(np.bool_).reshape(node.shape)
        position += length
    if position != len(data):
        fail(f"{len(data) - position} bytes too many")
    public = Graph(graph.nodes, masks, graph.metadata)
    validate.check(public, weights=False, error=ProtocolError)
    return public


def _encode(graph: Graph, digest: str, tensors_digest: str) -> bytes:
    document = {
        "version": VERSION,
        "sha256": digest,
        "tensors_sha256": tensors_digest,
        **graph.header(),
    }
    return (json.dumps(document, indent=1) + "\n").encode()


def _parse(data: bytes, fail: Callable[[str], NoReturn]) -> dict[str, Any]:
    if len(data) > MAX_HEADER_BYTES:
        fail(f"larger than {MAX_HEADER_BYTES} bytes")
    try:
        document = json.loads(data, parse_constant=lambda name: fail(f"{name} is not a number"))
    except (ValueError, RecursionError) as error:
        fail(f"corrupt: {error}")
    if not isinstance(document, dict):
        fail("not an object")
    return document


def _graph(
    document: dict[str, Any], tensors: dict[str, Array], fail: Callable[[str], NoReturn]
) -> Graph:
    nodes, metadata = document.get("nodes"), document.get("metadata")
    if not isinstance(nodes, list) or not isinstance(metadata, dict):
        fail("has no nodes or no metadata")
    if len(nodes) > validate.MAX_NODES:
        fail(f"more than {validate.MAX_NODES} nodes")
    if not _shallow(metadata):
        fail("its metadata are nested too deeply")
    try:
        return Graph(tuple(_node(item) for item in nodes), tensors, metadata)
    except ValueError as error:
        if isinstance(error, PiError):
            raise
        fail(str(error)[:300])


def _shallow(value: Any) -> bool:
    """Whether ``value`` is nested so little that whoever walks it later can."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return not level


def _node(item: object) -> Node:
    if not isinstance(item, dict) or set(item) != {"name", "op", "inputs", "shape", "attrs"}:
        raise ValueError("a node is not what it should be")
    name, op, inputs, attrs = item["name"], item["op"], item["inputs"], item["attrs"]
    if not isinstance(name, str) or not isinstance(op, str) or op not in TENSORS:
        raise ValueError(f"node {str(name)[:80]!r}: unknown kind")
    if not isinstance(inputs, list) or not all(isinstance(i, str) for i in inputs):
        raise ValueError(f"node {name[:80]!r}: its inputs are not names")
    if not isinstance(attrs, dict):
        raise ValueError(f"node {name[:80]!r}: its attributes are not an object")
    values: dict[str, Attribute] = {
        key: _integers(value) if isinstance(value, list) else _integer(value)
        for key, value in attrs.items()
    }
    return Node(name, op, tuple(inputs), _integers(item["shape"]), values)


def _integers(value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > 8:
        raise ValueError("a list of integers is expected")
    return tuple(_integer(v) for v in value)


def _integer(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) > 1 << 40:
        raise ValueError("an integer is expected")
    return value
