"""Where linear layers are computed: the C kernels on the CPU, or a torch device.

``cpu`` is the kernels (or NumPy), ``cuda`` and ``cuda:N`` are torch on a GPU; ``torch:cpu`` runs
the GPU's code on the CPU, for tests. Torch is imported for the latter alone.
"""

from __future__ import annotations

from collections.abc import Callable

from .linear import RingConv
from .program import Conv
from .ring import Words
from .wide import WideConv, to_panels

Product = Callable[[Words, Words], Words]
"""x and an addend to the convolution plus the addend."""


def check(name: str) -> None:
    """Refuse a device that is not there.

    Raises:
        UsageError: no such device, or not on this machine.
    """
    if name != "cpu":
        from . import limbs

        limbs.find(name)


def narrow(
    name: str,
    op: Conv,
    source: tuple[int, ...],
    weight: Words,
    n: int,
    bits: int,
    *,
    batch: int = 1,
    threads: int = 1,
) -> RingConv:
    """A convolution with weights in [-2^(bits-1), 2^(bits-1)): the server's."""
    if name == "cpu":
        return RingConv(op, source, weight, n, bits, batch=batch, threads=threads)
    from . import limbs

    return limbs.TorchConv(op, source, weight, n, bits, device=limbs.find(name))


def wide(name: str, op: Conv, source: tuple[int, ...], weight: Words, n: int) -> Product:
    """A convolution with weights (O, I/groups, kh, kw) anywhere in the ring: the dealer's."""
    if name == "cpu":
        return WideConv(op, source, to_panels(op, weight), n)
    from . import limbs

    return limbs.TorchConv(op, source, weight, n, device=limbs.find(name))
