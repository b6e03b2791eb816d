"""One party of SecretFlow SPU, run by path under the Python that has it; see :mod:`.secretflow`.

It imports nothing of this project, and ``spu`` and ``jax`` only when it runs. The server is SPU's
first party and holds the weights, the client is the second and holds the images.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

ROLES = SERVER, CLIENT = "server", "client"


def forward(
    nodes: Sequence[Mapping[str, Any]],
    masks: Mapping[str, Any],
    weights: Mapping[str, Any],
    images: Any,
    xp: Any,
    conv: Callable[..., Any],
) -> Any:
    """Logits (N, classes) of images (N, C, H, W).

    Only kept ReLUs are computed: their positions are gathered from a layer, compared in one call
    and put back by another gather.

    Args:
        nodes: of a graph's header.
        masks: (NumPy, bool) and weights: by the graph's names of tensors.
        xp: ``numpy`` or ``jax.numpy``.
        conv: of (images, weight, stride, padding, dilation), NCHW, without bias.
    """
    values: dict[str, Any] = {}
    for node in nodes:
        name, attrs = node["name"], node["attrs"]
        given = [values[source] for source in node["inputs"]]
        first = given[0] if given else images
        match node["op"]:
            case "input":
                value = images
            case "conv":
                weight, groups = weights[f"{name}.weight"], attrs["groups"]
                geometry = [tuple(attrs[key]) for key in ("stride", "padding", "dilation")]
                parts = zip(
                    xp.split(first, groups, axis=1), xp.split(weight, groups, axis=0), strict=True
                )
                value = xp.concatenate([conv(*part, *geometry) for part in parts], axis=1)
                value = value + weights[f"{name}.bias"].reshape(1, -1, 1, 1)
            case "linear":
                value = xp.matmul(first, weights[f"{name}.weight"].T) + weights[f"{name}.bias"]
            case "affine":
                channels = (1, -1, *[1] * (first.ndim - 2))
                scale, shift = (weights[f"{name}.{part}"] for part in ("scale", "shift"))
                value = first * scale.reshape(channels) + shift.reshape(channels)
            case "add":
                value = sum(given[1:], start=first)
            case "concat":
                value = xp.concatenate(given, axis=1)
            case "avgpool":
                windows = _windows(first, attrs, 0.0, xp)
                value = sum(windows[1:], start=windows[0]) * (1.0 / len(windows))
            case "maxpool":
                value, *others = _windows(first, attrs, _BELOW, xp)
                for other in others:
                    value = xp.maximum(value, other)
            case "flatten":
                value = first.reshape(first.shape[0], -1)
            case "relu":
                value = _relu(first, masks[f"{name}.mask"], xp)
            case unknown:
                raise ValueError(f"node {name}: SPU is given no {unknown}")
        values[name] = value
    return values[nodes[-1]["name"]]


_BELOW = -float(1 << 16)
"""Beside the edge of a maximum; below any activation, and in the range of the fixed point."""


def _windows(images: Any, attrs: Mapping[str, Any], edge: float, xp: Any) -> list[Any]:
    """The images under each position of a pooling window, all of the output's shape."""
    (kh, kw), (sh, sw), (ph, pw) = (attrs[key] for key in ("kernel", "stride", "padding"))
    if ph or pw:
        around = ((0, 0), (0, 0), (ph, ph), (pw, pw))
        images = xp.pad(images, around, constant_values=edge)
    height, width = images.shape[2:]
    down, across = height - kh + 1, width - kw + 1
    return [
        images[:, :, i : i + down : sh, j : j + across : sw] for i in range(kh) for j in range(kw)
    ]


def _relu(values: Any, mask: Any, xp: Any) -> Any:
    import numpy as np

    if mask.all():
        return xp.maximum(values, 0)
    if not mask.any():
        return values
    kept = np.flatnonzero(mask).astype(np.int32)
    order = np.arange(mask.size, dtype=np.int32)
    order[kept] = mask.size + np.arange(kept.size, dtype=np.int32)
    flat = values.reshape(values.shape[0], -1)
    compared = xp.maximum(xp.take(flat, kept, axis=1, mode="clip"), 0)
    both = xp.concatenate([flat, compared], axis=1)
    return xp.take(both, order, axis=1, mode="clip").reshape(values.shape)


def run(role: str, task: Mapping[str, Any]) -> dict[str, Any]:
    """Take part in a session.

    Args:
        task: ``protocol`` and ``fraction_bits``; ``model``, by role the folder of ``graph.json``
            and ``tensors.npz``; ``images``, a file for the client; ``addresses`` of both,
            HOST:PORT, and the ``interface`` whose bytes count; ``batch``, ``repeat``, ``warmup``,
            ``threads``; ``started``, a time.

    Returns:
        The role's report; the client's has everything.
    """
    import jax
    import numpy as np
    import spu
    from spu import libspu
    from spu.utils import frontend

    rank = ROLES.index(role)
    link, config = _connect(libspu, rank, task)
    runtime, io = spu.Runtime(link, config), spu.Io(len(ROLES), config)
    with open(os.path.join(task["model"][role], "graph.json")) as file:
        header = json.load(file)
    with np.load(os.path.join(task["model"][role], "tensors.npz"), allow_pickle=False) as stored:
        tensors = {name: stored[name] for name in stored.files}
    masks = {name: tensors[name] for name in tensors if name.endswith(".mask")}
    names = list(header["weights"])

    def conv(images: Any, weight: Any, stride: Any, padding: Any, dilation: Any) -> Any:
        around = [(size, size) for size in padding]
        return jax.lax.conv_general_dilated(images, weight, stride, around, rhs_dilation=dilation)

    def network(images: Any, *weights: Any) -> Any:
        named = dict(zip(names, weights, strict=True))
        return forward(header["nodes"], masks, named, images, jax.numpy, conv)

    batch, secret = task["batch"], libspu.Visibility.VIS_SECRET
    shapes = [[batch, *header["nodes"][0]["shape"]], *header["weights"].values()]
    program, _ = frontend.compile(
        frontend.Kind.JAX,
        network,
        [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes],
        {},
        ["images", *names],
        [secret] * len(shapes),
        lambda outputs: ["logits"],
    )

    def give(name: str, value: Any, owner: int) -> None:
        if rank == owner:
            shares = io.make_shares(value, secret, owner)
            _send(link, 1 - rank, shares[1 - rank])
            runtime.set_var(name, shares[rank])
        else:
            runtime.set_var(name, _receive(libspu, link, owner))

    for name in names:
        give(name, tensors.get(name), ROLES.index(SERVER))
    images = np.load(task["images"], allow_pickle=False) if role == CLIENT else None
    seconds, inferences = [], []
    before = after = carried = None
    setup = time.time() - task["started"]
    for number in range(-task["warmup"], task["repeat"]):
        link.barrier()
        if number == 0:
            before = interface_bytes(task["interface"])
        started = time.perf_counter()
        chosen, held = [], None
        if images is not None:
            chosen = [(max(number, 0) * batch + i) % len(images) for i in range(batch)]
            held = images[chosen]
        give("images", held, ROLES.index(CLIENT))
        runtime.run(program)
        mine = runtime.get_var("logits")
        if role == SERVER:
            _send(link, 1 - rank, mine)
            continue
        logits = io.reconstruct([_receive(libspu, link, 1 - rank), mine])
        taken = time.perf_counter() - started
        if number >= 0:
            seconds.append(taken)
            inferences.append({"images": chosen, "logits": np.asarray(logits).tolist()})
    link.barrier()
    after = interface_bytes(task["interface"])
    if before is not None and after is not None:
        carried = (after - before) / task["repeat"]
    return {
        "setup_seconds": setup,
        "seconds": seconds,
        "interface_bytes": carried,
        "inferences": inferences,
        "peak_memory": peak_memory(),
        "settings": _settings(spu.__version__, config),
    }


def _connect(libspu: Any, rank: int, task: Mapping[str, Any]) -> tuple[Any, Any]:
    """SPU's own link and the configuration of its runtime."""
    ends = libspu.link.Desc()
    ends.recv_timeout_ms = ends.http_timeout_ms = 1000 * task["timeout"]
    for role, address in zip(ROLES, task["addresses"], strict=True):
        ends.add_party(role, address)
    protocol = getattr(libspu.ProtocolKind, task["protocol"])
    config = libspu.RuntimeConfig(protocol, libspu.FieldType.FM64, task["fraction_bits"])
    config.max_concurrency = task["threads"]
    # Each input stays whole with its owner, who alone knows it, for as long as the protocol can.
    config.experimental_enable_colocated_optimization = True
    return libspu.link.create_brpc(ends, rank), config


def _settings(version: str, config: Any) -> dict[str, Any]:
    settings = {
        "version": version,
        "protocol": config.protocol.name,
        "field": config.field.name,
        "fraction_bits": config.fxp_fraction_bits,
    }
    if settings["protocol"] == "SEMI2K":
        settings["triples"] = config.beaver_type.name
    return settings


def _send(link: Any, to: int, share: Any) -> None:
    chunks = list(share.share_chunks)
    for part in (share.meta, str(len(chunks)), *chunks):
        link.send(to, part)


def _receive(libspu: Any, link: Any, source: int) -> Any:
    share = libspu.Share()
    share.meta = link.recv(source)
    share.share_chunks = [link.recv(source) for _ in range(int(link.recv(source)))]
    return share


def interface_bytes(interface: str = "lo") -> int | None:
    """What a network interface has carried since the system started, in both directions."""
    try:
        with open("/proc/net/dev") as file:
            lines = [line.partition(":") for line in file]
    except OSError:
        return None
    counters = [rest.split() for name, _, rest in lines if name.strip() == interface]
    if not counters:
        return None
    received, sent = int(counters[0][0]), int(counters[0][8])
    return received if interface == "lo" else received + sent


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], json.loads(sys.argv[2]))), flush=True)
    os._exit(0)  # its link's threads complain of an orderly end
