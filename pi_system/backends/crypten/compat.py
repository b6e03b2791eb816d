"""CrypTen 0.4.1, mended. Every change to it is here; :func:`load` imports it and applies them.

=====================  ======================================================================
mend                   without it
=====================  ======================================================================
moved import           ``import crypten`` fails: ``torch.onnx._internal.registration`` moved
warnings               importing it warns of invalid escape sequences (an error under ``-W error``)
generator              shares, zero shares and triples come from MT19937 seeded with 32 bits:
                       312 elements give away all the others
decode                 negative values a little above an integer decode exactly 1.0 too low
encode                 fixed-point values are cut towards zero: half a unit of bias
provider               the default lets party 0 know every triple (TFP); its trusted third party
                       takes its seeds from ``torch.randint`` and pickles
communicator           needs ``torch.distributed``; its own byte counter is off by default,
                       counts an exchange twice and leaves framing and seeds out
pickle                 ``send_obj`` and ``load`` trust what a peer or a file pickled
conversion             a ``RuntimeError`` inside A2B (say, a shape) is taken for a lack of
                       memory, and the conversion run again by another protocol: tuples are
                       burnt and the parties fall out of step
product                each party computes three products per multiplication where two will do
configuration          ``debug.validation_mode`` opens every value, ``mpc.provider`` chooses TFP;
                       now fixed, and read without 30 us of YAML machinery at every attribute
autograd               every operation keeps a tape of its operands
=====================  ======================================================================

Known and not mended:

- Truncation after a product is local: an element v is off by about 2^(64 - 2f), a catastrophe,
  with probability |v| 2^(2f - 64), |v| 2^-32 with the f = 16 fractional bits used here; otherwise
  it is off by at most one unit in the last place. A full ResNet-18 fails on about one image in
  7,000.
- Convolutions on a GPU are computed in limbs of 22 bits, chosen without regard to the number of
  channels, and come out wrong from about 256 channels on. :func:`check_device` refuses a GPU.

CrypTen keeps its state in module globals. The mends look it up in a context variable instead
(:func:`activate`), so that each thread of a process may hold a session of its own.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any, Final, NoReturn, Protocol

import torch
from torch import Tensor

from ...errors import RefusedError, UsageError

VERSION: Final = "0.4.1"
ADVICE: Final = (
    "the crypten backend needs CrypTen: pip install --no-deps crypten==0.4.1 && "
    "pip install pyyaml omegaconf onnx"
)
PRECISION_BITS: Final = 16
"""Fractional bits of every fixed-point value, CrypTen's own default."""

_OLD_REGISTRATION: Final = "torch.onnx._internal.registration"
_NEW_REGISTRATION: Final = "torch.onnx._internal.torchscript_exporter.registration"


# -- what a session puts in the place of CrypTen's globals ----------------------------------------


class RingStream(Protocol):
    """A source of ring elements, such as :class:`.prg.Stream`."""

    def ring(self, size: Sequence[int], *, bits: int = 64) -> Tensor: ...


@dataclass(frozen=True)
class State:
    """One party's communicator, tuple provider and streams.

    ``previous`` and ``following`` are the streams shared with the parties before and after this
    one, which zero shares are made of; ``local`` is known to this party alone.
    """

    communicator: Any
    provider: Any
    previous: RingStream
    following: RingStream
    local: RingStream


_loading = threading.Lock()
_state: ContextVar[State | None] = ContextVar("crypten_state", default=None)


@contextmanager
def activate(state: State, *, allow_first_party: bool = False) -> Iterator[None]:
    """Let CrypTen compute with ``state`` in this thread until the block ends.

    Args:
        allow_first_party: for tests, permit the provider that lets party 0 know every triple.

    Raises:
        RefusedError: such a provider without that permission.
    """
    if getattr(state.provider, "NAME", None) != "dealer" and not allow_first_party:
        raise RefusedError("only the dealer may provide triples; CrypTen's own TFP and TTP may not")
    token = _state.set(state)
    try:
        yield
    finally:
        _state.reset(token)


def _current() -> State:
    state = _state.get()
    if state is None:
        raise RefusedError("CrypTen is used outside a session of this package")
    return state


class _Generators:
    """Stands in for ``crypten.generators[name][device]``."""

    def __getitem__(self, name: str) -> _Generators | RingStream:
        streams = {"prev": "previous", "next": "following", "local": "local"}
        if name not in streams:
            raise RefusedError(f"CrypTen's {name!r} generator is not cryptographic; not replaced")
        return _ByDevice(getattr(_current(), streams[name]))


class _ByDevice(_Generators):
    def __init__(self, stream: RingStream) -> None:
        self._stream = stream

    def __getitem__(self, device: Any) -> RingStream:
        check_device(str(device))
        return self._stream


# -- loading --------------------------------------------------------------------------------------


def require() -> None:
    """Check without importing that CrypTen is there.

    Raises:
        UsageError: it is not; the message says how to get it.
    """
    if importlib.util.find_spec("crypten") is None:
        raise UsageError(ADVICE)


def load() -> ModuleType:
    """Import CrypTen and apply every mend; a second call does nothing.

    Raises:
        UsageError: CrypTen or something it imports is missing, or it is another version.
    """
    with _loading:
        return _load()


@functools.cache
def _load() -> ModuleType:
    require()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        crypten = _import()
    if crypten.__version__ != VERSION:
        raise UsageError(f"CrypTen {crypten.__version__} is installed; {ADVICE}")
    for mend in (
        _mend_generator,
        _mend_encoder,
        _mend_provider,
        _mend_communicator,
        _mend_pickle,
        _mend_conversion,
        _mend_product,
        _mend_configuration,
    ):
        mend(crypten)
    crypten.set_grad_enabled(False)
    return crypten


def import_unmended() -> ModuleType:
    """Import CrypTen as distributed, in a process that never calls :func:`load`.

    Only the import that newer versions of torch broke is mended.

    Raises:
        UsageError: CrypTen or something it imports is missing.
    """
    require()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _import()


def check_device(device: str) -> None:
    """Refuse anything but the CPU.

    Raises:
        UsageError: another device.
    """
    if torch.device(device).type != "cpu":
        raise UsageError(
            f"the crypten backend runs on the CPU only, not on {device}: CrypTen's convolutions "
            "are wrong on a GPU"
        )


def _import() -> ModuleType:
    alias = importlib.util.find_spec(_OLD_REGISTRATION) is None
    if alias:
        sys.modules[_OLD_REGISTRATION] = importlib.import_module(_NEW_REGISTRATION)
    try:
        return importlib.import_module("crypten")
    except ImportError as error:
        raise UsageError(f"{error}; {ADVICE}") from error
    finally:
        if alias:
            del sys.modules[_OLD_REGISTRATION]


def _refusing(what: str) -> Any:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise RefusedError(f"CrypTen's {what} is refused")

    return refuse


# -- the mends ------------------------------------------------------------------------------------


def _mend_generator(crypten: Any) -> None:
    def ring_element(
        size: Any, ring_size: int = 2**64, generator: Any = None, device: Any = None
    ) -> Tensor:
        if ring_size != 2**64:
            raise RefusedError("only the ring of 64 bits is used")
        return kbit_tensor(size, 64, generator, device)

    def kbit_tensor(
        size: Any, bitlength: int | None = None, generator: Any = None, device: Any = None
    ) -> Tensor:
        check_device(str(device or "cpu"))
        stream: RingStream = generator or crypten.generators["local"]["cpu"]
        return stream.ring(size, bits=bitlength or 64)

    crypten.generators = _Generators()
    for name, replacement in (
        ("generate_random_ring_element", ring_element),
        ("generate_kbit_random_tensor", kbit_tensor),
    ):
        original = getattr(crypten.common.rng, name)
        for module in [m for n, m in sys.modules.items() if n.split(".")[0] == "crypten"]:
            if getattr(module, name, None) is original:
                setattr(module, name, replacement)
    for name in ("_setup_prng", "_sync_seeds", "manual_seed"):
        setattr(crypten, name, _refusing(f"{name} (a predictable generator)"))


def _mend_encoder(crypten: Any) -> None:
    encoder = crypten.encoder.FixedPointEncoder
    encode = encoder.encode

    def encode_nearest(self: Any, x: Any, device: Any = None) -> Any:
        if isinstance(x, Tensor) and x.is_floating_point():
            return torch.round(self._scale * x.double()).long()
        return encode(self, x, device=device)

    def decode(self: Any, tensor: Tensor | None) -> Tensor | None:
        if tensor is None or self._scale == 1:
            return tensor
        values: Tensor = tensor.double() / self._scale
        return values.float()

    encoder.encode = encode_nearest
    encoder.decode = decode


def _mend_provider(crypten: Any) -> None:
    crypten.mpc.get_default_provider = lambda: _current().provider
    crypten.mpc.ttp_required = lambda: False
    for name in ("_init", "uninit"):
        setattr(crypten.mpc.provider.TrustedThirdParty, name, _refusing("TTP"))
    crypten.mpc.provider.TTPServer.__init__ = _refusing("TTP server")


def _mend_communicator(crypten: Any) -> None:
    communicator = crypten.communicator
    communicator.get = lambda: _current().communicator
    communicator.is_initialized = lambda: _state.get() is not None
    communicator._init = communicator.uninit = _refusing("communicator")
    for name in ("init", "init_thread", "uninit"):
        setattr(crypten, name, _refusing(f"{name}(); sessions are made by this package"))


def _mend_pickle(crypten: Any) -> None:
    crypten.common.serial.restricted_loads = _refusing("unpickling")
    for name in ("load", "load_from_party", "save", "save_from_party"):
        setattr(crypten, name, _refusing(f"{name}() (a pickle)"))


def _mend_conversion(crypten: Any) -> None:
    converters = crypten.mpc.primitives.converters
    binary = crypten.mpc.primitives.BinarySharedTensor

    def to_binary(arithmetic: Any) -> Any:
        shares = [binary(arithmetic.share, src=source) for source in range(2)]
        result = binary.stack(shares).sum(dim=0)
        result.encoder = arithmetic.encoder
        return result

    converters._A2B = to_binary


def _mend_product(crypten: Any) -> None:
    """Beaver (1991): z = c + epsilon * (b + delta) + a * delta, where party 0 alone adds delta."""

    def product(op: str) -> Any:
        compute = getattr(torch, op)

        def multiply(x: Any, y: Any, **options: Any) -> Any:
            state = _current()
            a, b, c = state.provider.generate_additive_triple(x.size(), y.size(), op, **options)
            epsilon, delta = state.communicator.all_reduce(
                [x.share - a.share, y.share - b.share], batched=True
            )
            right = b.share + delta if state.communicator.get_rank() == 0 else b.share
            c.share += compute(epsilon, right, **options)
            c.share += compute(a.share, delta, **options)
            return c

        return multiply

    for op in ("mul", "matmul", "conv2d"):
        setattr(crypten.mpc.primitives.beaver, op, product(op))


class _Fixed(SimpleNamespace):
    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise RefusedError(f"CrypTen's configuration is fixed; {name} is not set")


def _mend_configuration(crypten: Any) -> None:
    for name, value in (
        ("communicator.verbose", False),
        ("debug.debug_mode", False),
        ("debug.validation_mode", False),
        ("encoder.precision_bits", PRECISION_BITS),
        ("mpc.active_security", False),
        ("mpc.protocol", "beaver"),
        ("mpc.provider", "TTP"),
    ):
        crypten.cfg[name] = value
    sections = {str(name): _Fixed(**section) for name, section in crypten.cfg.config.items()}
    crypten.cfg.config = _Fixed(**sections)
    kind = type(crypten.cfg)
    for name in ("__setattr__", "__setitem__", "temp_override", "load_config", "set_config"):
        setattr(kind, name, _refusing("configuration, once fixed,"))
