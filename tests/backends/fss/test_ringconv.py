"""Ring convolutions: every instruction set and algorithm against plain integer arithmetic."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pi_system.backends.fss import ringconv
from pi_system.backends.fss.ringconv import ALGORITHMS, INSTRUCTION_SETS, Words

ROOT = Path(__file__).parents[3]
RINGS = (16, 32, 48, 52, 58, 62, 64)
LOST = {
    "winograd-f2": 2, "winograd-f4f2": 2, "winograd-f4": 2, "winograd-s4s2": 1, "winograd-s4": 2,
}  # fmt: skip

many = settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The source as it stands, or else the installed extension."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    sources = sorted((ROOT / "native").glob("ringconv*.c"))
    if compiler is not None and sources:
        target = tmp_path_factory.mktemp("native") / "ringconv.so"
        flags = ["-O3", "-std=c11", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread"]
        subprocess.run([compiler, *flags, "-o", target, *sources], check=True)
        return ringconv.load(target)
    found = ringconv.installed()
    if found is None:
        pytest.skip("neither a compiler nor the extension")
    return found


@dataclass(frozen=True)
class Case:
    x: Words
    weight: Words
    add: Words | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    n: int

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        out, _, kh, kw = self.weight.shape
        h, w = (
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, p, d, k, s in zip(
                self.x.shape[2:], self.padding, self.dilation, (kh, kw), self.stride, strict=True
            )
        )
        return len(self.x), out, h, w

    def expected(self, dtype: type = np.uint64) -> Words:
        """By the definition, in 64-bit words or (``object``) in Python integers."""
        (ph, pw), (sh, sw), (dh, dw) = self.padding, self.stride, self.dilation
        x = np.pad(self.x, ((0, 0), (0, 0), (ph, ph), (pw, pw))).astype(dtype)
        weight = self.weight.astype(dtype)
        total = np.zeros(self.output_shape, dtype) if self.add is None else self.add.astype(dtype)
        _, out, h, w = self.output_shape
        _, inner, kh, kw = self.weight.shape
        per = out // self.groups
        for o in range(out):
            first = o // per * inner
            for c in range(inner):
                for i in range(kh):
                    for j in range(kw):
                        rows = slice(i * dh, i * dh + sh * (h - 1) + 1, sh)
                        cols = slice(j * dw, j * dw + sw * (w - 1) + 1, sw)
                        total[:, o] += weight[o, c, i, j] * x[:, first + c, rows, cols]
        return total

    def prepare(
        self, kernels: ctypes.CDLL, algorithm: str | None = None, instructions: str | None = None,
        winograd: bool = True,
    ) -> ringconv.RingConvKernel | None:  # fmt: skip
        return ringconv.prepare(
            weight=self.weight,
            input_shape=self.x.shape[1:],
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            n=self.n,
            winograd=winograd,
            force=(algorithm, instructions),
            kernels=kernels,
        )

    def check(self, kernels: ctypes.CDLL) -> set[str]:
        """Compare all that can run; returns the algorithms that did."""
        expected, seen = self.expected(), set()
        for instructions in INSTRUCTION_SETS:
            for algorithm in (None, *ALGORITHMS):
                kernel = self.prepare(kernels, algorithm, instructions)
                if kernel is None:
                    continue
                if algorithm is not None:
                    assert kernel.algorithm == algorithm
                    seen.add(algorithm)
                same(kernel(self.x, self.add), expected, self.n, f"{instructions} {algorithm}")
        return seen


def same(found: Words, expected: Words, n: int, label: str = "") -> None:
    wrong = ((found - expected) << np.uint64(64 - n)) != 0
    assert not wrong.any(), f"{label}: {wrong.mean():.1%} wrong"


def case(
    seed: int, *, n: int, images: int = 1, groups: int = 1, inner: int = 4, outer: int = 4,
    size: tuple[int, int] = (8, 8), kernel: tuple[int, int] = (3, 3),
    stride: tuple[int, int] = (1, 1), padding: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1), bits: int = 12, extreme: bool = False, add: bool = True,
) -> Case:  # fmt: skip
    rng = np.random.default_rng(seed)

    def words(*shape: int) -> Words:
        return rng.integers(0, 2**64, shape, dtype=np.uint64)

    x = words(images, groups * inner, *size)
    weight = (words(groups * outer, inner, *kernel).view(np.int64) >> (64 - bits)).view(np.uint64)
    if extreme:  # all digits at -2^15 or 2^15 - 1, all weights at a bound
        edges = np.array([0x8000800080008000, 0x7FFF7FFF7FFF7FFF, 0x8000800080007FFF], np.uint64)
        x[:] = rng.choice(edges[: int(rng.integers(1, 4))], x.shape)
        bounds = np.array([-(1 << (bits - 1)), (1 << (bits - 1)) - 1], np.int64).view(np.uint64)
        weight[:] = rng.choice(bounds[: int(rng.integers(1, 3))], weight.shape)
    made = Case(x, weight, None, stride, padding, dilation, groups, n)
    return Case(x, weight, words(*made.output_shape) if add else None, stride, padding, dilation,
                groups, n)  # fmt: skip


pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@many
@given(
    seed=st.integers(0, 2**32),
    n=st.sampled_from(RINGS),
    images=st.integers(1, 3),
    groups=st.sampled_from([1, 1, 2, 3]),
    inner=st.integers(1, 9),
    outer=st.sampled_from([1, 2, 8, 15, 16, 17, 33]),
    size=st.tuples(st.integers(7, 12), st.integers(7, 12)),
    kernel=pairs,
    stride=pairs,
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=pairs,
    bits=st.sampled_from([2, 11, 13, 16, 17, 23, 24, 40, 64]),
    extreme=st.booleans(),
    add=st.booleans(),
)
def test_any_shape(kernels: ctypes.CDLL, **shape: object) -> None:
    case(**shape).check(kernels)  # type: ignore[arg-type]


@many
@given(
    seed=st.integers(0, 2**32),
    n=st.sampled_from(RINGS),
    images=st.integers(1, 3),
    groups=st.sampled_from([1, 1, 2]),
    inner=st.integers(1, 9),
    outer=st.sampled_from([1, 16, 19]),
    size=st.tuples(st.integers(1, 19), st.integers(1, 19)),
    stride=st.sampled_from([(1, 1), (2, 2)]),
    padding=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    bits=st.sampled_from([2, 11, 13, 16, 17, 40, 64]),
    extreme=st.booleans(),
)
def test_three_by_three(kernels: ctypes.CDLL, **shape: object) -> None:
    made = case(**shape)  # type: ignore[arg-type]
    seen = made.check(kernels)
    for algorithm in ALGORITHMS:
        strided = algorithm.startswith("winograd-s")
        fast = algorithm.startswith("winograd")
        fits = not fast or (strided == (made.stride == (2, 2)))
        assert (algorithm in seen) == (fits and made.n + LOST.get(algorithm, 0) <= 64)


@pytest.mark.parametrize("bits", [12, 16, 64])
@pytest.mark.parametrize("stride", [1, 2])
def test_long_sums_at_the_bounds(kernels: ctypes.CDLL, bits: int, stride: int) -> None:
    """Many channels, so that sums must be cut into segments."""
    for seed in range(4):
        made = case(seed, n=62 + 2 * (seed % 2), inner=300, outer=17, size=(5, 6), bits=bits,
                    stride=(stride, stride), extreme=seed < 3)  # fmt: skip
        made.check(kernels)


def test_blocks_of_rows_and_of_images(kernels: ctypes.CDLL) -> None:
    """Large enough to be done in several blocks, with a remainder."""
    for shape in (
        {"inner": 32, "outer": 32, "size": (45, 33)},
        {"inner": 32, "outer": 32, "size": (37, 50), "stride": (2, 2)},
        {"inner": 32, "outer": 40, "size": (4, 4), "images": 37},
        {"inner": 40, "outer": 32, "size": (5, 3), "images": 23, "stride": (2, 2)},
    ):
        case(5, n=62, **shape).check(kernels)  # type: ignore[arg-type]


@many
@given(seed=st.integers(0, 2**32), n=st.integers(1, 64), bits=st.integers(1, 64))
def test_python_integers(kernels: ctypes.CDLL, seed: int, n: int, bits: int) -> None:
    """Modulo 2^n for every n, weights of every size, against unbounded integers."""
    made = case(seed, n=n, inner=3, outer=2, size=(5, 4), bits=bits)
    expected = (made.expected(object) % 2**n).astype(np.uint64)
    for algorithm in ALGORITHMS:
        kernel = made.prepare(kernels, algorithm)
        if kernel is not None:
            same(kernel(made.x, made.add), expected, n, algorithm)


def test_words_above_the_ring_do_not_count(kernels: ctypes.CDLL) -> None:
    made = case(1, n=52)
    junk = np.uint64(0xABC) << np.uint64(52)
    for algorithm in ALGORITHMS:
        kernel = made.prepare(kernels, algorithm)
        if kernel is not None:
            same(kernel(made.x ^ junk, made.add), made.expected(), 52)
    negative = Case(made.x, made.weight & np.uint64(2**52 - 1), made.add, made.stride,
                    made.padding, made.dilation, 1, 52)  # fmt: skip
    kernel = negative.prepare(kernels)
    assert kernel is not None
    same(kernel(made.x, made.add), made.expected(), 52)


def test_linear_layer_and_depthwise(kernels: ctypes.CDLL) -> None:
    linear = case(2, n=64, inner=512, outer=100, size=(1, 1), kernel=(1, 1), padding=(0, 0))
    linear.check(kernels)
    depthwise = case(3, n=64, inner=1, outer=1, groups=40, size=(9, 9), images=2)
    kernel = depthwise.prepare(kernels)
    assert kernel is not None and kernel.algorithm == "plain"
    depthwise.check(kernels)


def test_choice(kernels: ctypes.CDLL) -> None:
    for n, allowed in ((64, {"direct"}), (62, {"winograd-f4", "winograd-f4f2", "winograd-f2"})):
        kernel = case(0, n=n, inner=64, outer=64, size=(16, 16)).prepare(kernels)
        assert kernel is not None and kernel.algorithm in allowed
    forbidden = case(0, n=52, inner=64, outer=64, size=(16, 16)).prepare(kernels, winograd=False)
    assert forbidden is not None and forbidden.algorithm == "direct"


def test_output_may_be_the_addend(kernels: ctypes.CDLL) -> None:
    for groups in (1, 4):
        made = case(4, n=64, groups=groups, inner=4 // groups, outer=8 // groups)
        assert made.add is not None
        for algorithm in ALGORITHMS:
            kernel = made.prepare(kernels, algorithm)
            if kernel is not None:
                out = made.add.copy()
                assert kernel(made.x, out, out) is out
                same(out, made.expected(), 64, algorithm)


def test_wrong_arrays_are_refused(kernels: ctypes.CDLL) -> None:
    made = case(6, n=64)
    kernel = made.prepare(kernels)
    assert kernel is not None and made.add is not None
    frozen = made.add.copy()
    frozen.flags.writeable = False
    for x, add, out in (
        (made.x[:, :2], None, None),
        (made.x.view(np.int64), None, None),
        (made.x[..., ::-1], None, None),
        (made.x, made.add[..., :1], None),
        (made.x, None, made.add[..., ::-1]),
        (made.x, None, frozen),
    ):
        with pytest.raises(ValueError, match=r"must be|read-only"):
            kernel(x, add, out)


@pytest.mark.parametrize(
    "change",
    [{"n": 0}, {"n": 65}, {"groups": 3}, {"stride": (0, 1)}, {"padding": (-1, 0)},
     {"input_shape": (4, 2, 2)}, {"weight": np.zeros((4, 4, 3, 3), np.int32)},
     {"weight": np.zeros((4, 0, 3, 3), np.int64)}],
)  # fmt: skip
def test_impossible_convolutions_are_refused(
    kernels: ctypes.CDLL, change: dict[str, object]
) -> None:
    good = {"weight": np.zeros((4, 4, 3, 3), np.int64), "input_shape": (4, 8, 8), "n": 64}
    with pytest.raises(ValueError, match=r"ring|weight"):
        ringconv.prepare(**{**good, **change}, kernels=kernels)  # type: ignore[arg-type]


@many
@given(
    seed=st.integers(0, 2**32),
    n=st.sampled_from([2, 17, *RINGS]),
    data=st.data(),
    images=st.integers(1, 2),
    inner=st.integers(1, 9),
    outer=st.sampled_from([1, 5, 16, 19]),
    size=st.tuples(st.integers(1, 19), st.integers(1, 19)),
    stride=st.sampled_from([(1, 1), (2, 2)]),
    bits=st.sampled_from([2, 11, 64]),
    add=st.booleans(),
)
def test_truncation_and_zone_check(
    kernels: ctypes.CDLL, n: int, data: st.DataObject, **shape: object
) -> None:
    """In the same pass, with each instruction set and algorithm, and any number of threads."""
    made = case(n=n, **shape)  # type: ignore[arg-type]
    f = data.draw(st.integers(0, n - 1))
    v = made.expected() & np.uint64(2**n - 1)
    edge = np.uint64(2 ** (n - 1))
    distance = int(np.where(v >= edge, v - edge, edge - v).min())
    bound = data.draw(st.sampled_from([0, distance, distance + 1, 2 ** (n - 1) - 1]))
    bound = min(bound, 2 ** (n - 1) - 1)
    near = bool((((v - edge + np.uint64(bound)) & np.uint64(2**n - 1)) < 2 * bound).any())
    truncated = (v << np.uint64(64 - n)).view(np.int64) >> np.int64(64 - n + f)
    for instructions in INSTRUCTION_SETS:
        for algorithm in ALGORITHMS:
            kernel = made.prepare(kernels, algorithm, instructions)
            if kernel is None:
                continue
            for threads in (1, 3):
                found = kernel.truncated(made.x, made.add, f=f, bound=bound, threads=threads)
                assert (found[0].view(np.int64) == truncated).all(), (instructions, algorithm)
                assert found[1] == near, (instructions, algorithm)


def test_truncation_out_of_range_is_refused(kernels: ctypes.CDLL) -> None:
    made = case(0, n=20)
    kernel = made.prepare(kernels)
    assert kernel is not None
    for f, bound in ((-1, 0), (20, 0), (3, -1), (3, 2**19)):
        with pytest.raises(ValueError, match="no shift by"):
            kernel.truncated(made.x, f=f, bound=bound)


@pytest.mark.parametrize("threads", [2, 3, 64, 1000])
def test_threads_change_nothing(kernels: ctypes.CDLL, threads: int) -> None:
    """Bit for bit, also above the ring; more threads than there is work for among them."""
    for shape in (
        {"inner": 32, "outer": 40, "size": (33, 17), "images": 2},
        {"inner": 32, "outer": 32, "size": (18, 19), "stride": (2, 2)},
        {"inner": 1, "outer": 1, "groups": 7, "size": (5, 5)},
        {"inner": 40, "outer": 10, "size": (1, 1), "kernel": (1, 1), "padding": (0, 0)},
    ):
        made = case(11, n=58, **shape)  # type: ignore[arg-type]
        for algorithm in ALGORITHMS:
            kernel = made.prepare(kernels, algorithm)
            if kernel is not None:
                alone = kernel(made.x, made.add)
                assert (kernel(made.x, made.add, threads=threads) == alone).all()


def test_threads_after_a_fork(kernels: ctypes.CDLL) -> None:
    made = case(12, n=58, inner=16, outer=32, size=(16, 16))
    kernel = made.prepare(kernels)
    assert kernel is not None
    same(kernel(made.x, made.add, threads=2), made.expected(), 58)
    child = os.fork()
    if not child:
        fine = False
        try:
            same(kernel(made.x, made.add, threads=2), made.expected(), 58)
            fine = True
        finally:
            os._exit(0 if fine else 1)
    for _ in range(1000):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.01)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert status == 0


def test_prepared_size(kernels: ctypes.CDLL) -> None:
    """Without fast convolutions: 2 bytes for narrow weights, 8 for wide ones, and a little."""
    for bits, size in ((12, 2), (64, 8)):
        made = case(13, n=64, inner=64, outer=64, size=(8, 8), bits=bits)
        kernel = made.prepare(kernels, winograd=False)
        assert kernel is not None
        assert size * made.weight.size <= kernel.nbytes <= 1.05 * size * made.weight.size


def test_threads_share_a_kernel(kernels: ctypes.CDLL) -> None:
    made = case(7, n=62, inner=16, outer=32, size=(16, 16))
    kernel = made.prepare(kernels, "winograd-f4")
    assert kernel is not None
    expected, failures = made.expected(), []

    def work() -> None:
        for _ in range(30):
            try:
                same(kernel(made.x, made.add, threads=2), expected, 62)
            except AssertionError as error:
                failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ringconv, "installed", lambda: None)
    assert ringconv.features() == "numpy"
    weight = np.ones((1, 1, 1, 1), np.int64)
    assert ringconv.prepare(weight=weight, input_shape=(1, 1, 1), n=64) is None
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"nothing")
    with pytest.raises(OSError):
        ringconv.load(broken)
