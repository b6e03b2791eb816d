"""Ring convolutions against torch's float32 ones, layer by layer of a CIFAR ResNet-18.

    python benchmarks/micro_ringconv.py --n 62 --batch 1

One thread, unless more are asked for. All layers run one after another, as in an inference, so
that weights come from memory; layers of one shape share their input, and what is added (the
server's h, another for every layer) is replaced by the truncated result. The figure of a layer
class is the least of all rounds, and ratios compare those sums.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from pi_system.backends.fss import ringconv


@dataclass(frozen=True)
class Layer:
    name: str
    inner: int
    outer: int
    size: int
    kernel: int = 3
    stride: int = 1


def resnet18() -> list[Layer]:
    layers = [Layer("stem", 3, 64, 32), *[Layer("64@32", 64, 64, 32)] * 4]
    for inner, size in ((64, 32), (128, 16), (256, 8)):
        outer = 2 * inner
        same = Layer(f"{outer}@{size // 2}", outer, outer, size // 2)
        down = Layer(f"{outer}@{size // 2} /2", inner, outer, size, 3, 2)
        skip = Layer(f"{outer}@{size // 2} 1x1/2", inner, outer, size, 1, 2)
        layers += [down, same, skip, same, same]
    return [*layers, Layer("fc", 512, 100, 1, 1)]


Step = tuple[str, Callable[[], object]]


def ring_steps(
    layers: list[Layer], n: int, batch: int, bits: int, winograd: bool, force: str | None,
    threads: int, instructions: str | None,
    kernels: ctypes.CDLL | None,
) -> tuple[list[Step], dict[str, str], int]:  # fmt: skip
    rng = np.random.default_rng(0)
    steps, chosen, held = [], {}, 0
    inputs: dict[tuple[int, ...], ringconv.Words] = {}
    for layer in layers:
        fan = layer.inner * layer.kernel**2
        weight = rng.normal(0, (2 / fan) ** 0.5, (layer.outer, layer.inner, *[layer.kernel] * 2))
        scaled = np.rint(weight * (2 ** (min(bits, 53) - 1) / np.abs(weight).max()))
        words = scaled.astype(np.int64) << (bits - min(bits, 53))

        def prepare(
            algorithm: str | None, layer: Layer = layer, words: np.ndarray = words
        ) -> ringconv.RingConvKernel | None:
            return ringconv.prepare(
                weight=words, input_shape=(layer.inner, layer.size, layer.size),
                stride=(layer.stride, layer.stride), padding=(layer.kernel // 2,) * 2, n=n,
                winograd=winograd, batch=batch, force=(algorithm, instructions), kernels=kernels,
            )  # fmt: skip

        kernel = prepare(force) or prepare(None)
        if kernel is None:
            raise SystemExit("the extension is not built")
        shape = batch, layer.inner, layer.size, layer.size
        if shape not in inputs:
            inputs[shape] = rng.integers(0, 2**64, shape, dtype=np.uint64)
        x, add = inputs[shape], np.zeros((batch, *kernel.output_shape), np.uint64)

        def run(
            kernel: ringconv.RingConvKernel = kernel, x: ringconv.Words = x,
            add: ringconv.Words = add,
        ) -> object:  # fmt: skip
            return kernel.truncated(x, add, add, f=10, bound=1 << 20, threads=threads)

        steps.append((layer.name, run))
        chosen[layer.name] = kernel.algorithm
        held += kernel.nbytes
    return steps, chosen, held


def torch_steps(layers: list[Layer], batch: int, layout: torch.memory_format) -> list[Step]:
    steps: list[Step] = []
    inputs: dict[tuple[int, ...], torch.Tensor] = {}
    for layer in layers:
        conv = nn.Conv2d(layer.inner, layer.outer, layer.kernel, layer.stride, layer.kernel // 2)
        module = conv.eval().to(memory_format=layout)
        shape = batch, layer.inner, layer.size, layer.size
        x = inputs.setdefault(shape, torch.randn(shape).to(memory_format=layout))
        steps.append((layer.name, lambda module=module, x=x: module(x)))
    return steps


def least(steps: list[Step], rounds: int) -> tuple[dict[str, float], float]:
    """Least ms of each layer's class (summed over its layers), and of a whole round."""
    best: dict[str, float] = {}
    whole = float("inf")
    for _ in range(rounds):
        spent: dict[str, float] = {}
        begin = last = time.perf_counter()
        for name, run in steps:
            run()
            now = time.perf_counter()
            spent[name] = spent.get(name, 0.0) + 1e3 * (now - last)
            last = now
        whole = min(whole, 1e3 * (last - begin))
        best = {name: min(ms, best.get(name, ms)) for name, ms in spent.items()}
    return best, whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--n", type=int, default=62, help="bits of the ring")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--bits", type=int, default=11, help="bits of the weights")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--instructions", choices=ringconv.INSTRUCTION_SETS)
    parser.add_argument("--no-winograd", action="store_true")
    parser.add_argument("--force", choices=ringconv.ALGORITHMS, help="where it can be had")
    parser.add_argument(
        "--library", dest="kernels", type=Path, help="instead of the installed extension"
    )
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    kernels = None if args.kernels is None else ringconv.load(args.kernels)
    layers = resnet18()
    begin = time.perf_counter()
    steps, chosen, held = ring_steps(
        layers,
        args.n,
        args.batch,
        args.bits,
        not args.no_winograd,
        args.force,
        args.threads,
        args.instructions,
        kernels,
    )
    spent = time.perf_counter() - begin
    ring, ring_whole = least(steps, args.rounds)
    with torch.inference_mode():
        columns = [
            least(torch_steps(layers, args.batch, layout), args.rounds)
            for layout in (torch.contiguous_format, torch.channels_last)
        ]
    print(f"{'layers':14} {'ring ms':>8} {'torch ms: NCHW':>15} {'NHWC':>8}  algorithm")
    for name, ms in ring.items():
        theirs = [column[name] for column, _ in columns]
        count = sum(layer.name == name for layer in layers)
        print(f"{name:12} {count} {ms:8.3f} {theirs[0]:15.3f} {theirs[1]:8.3f}  {chosen[name]}")
    sums = [sum(column.values()) for column in (ring, *(column for column, _ in columns))]
    print(f"{'sum':14} {sums[0]:8.3f} {sums[1]:15.3f} {sums[2]:8.3f}")
    print(f"prepared in {spent:.2f} s (weights drawn too), {held / 2**20:.1f} MiB")
    print(f"{'whole round':14} {ring_whole:8.3f} {columns[0][1]:15.3f} {columns[1][1]:8.3f}")


if __name__ == "__main__":
    main()
