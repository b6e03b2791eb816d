"""Convolutions with weights that fill their words, given or expanded, against integers."""

from __future__ import annotations

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from wide_cases import Case, cases, exact

from pi_system.backends.fss import kernels, prg
from pi_system.backends.fss.prg import KeyStream
from pi_system.backends.fss.ring import Words, reduce
from pi_system.backends.fss.wide import WideConv, from_panels, panel_shape, to_panels

LEVELS = ("numpy", "portable", "avx2", "vaes", "auto")

many = settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def run(conv: WideConv, case: Case, level: str) -> Words:
    with kernels.using(level):
        return reduce(conv(case.x, case.add), case.n)


@many
@given(cases())
def test_given_weights(level: str, case: Case) -> None:
    conv = WideConv(case.op, case.source, to_panels(case.op, case.weight), case.n)
    assert np.array_equal(run(conv, case, level), exact(case))


@many
@given(cases(), st.binary(min_size=16, max_size=16))
def test_weights_from_a_key(level: str, case: Case, key: bytes) -> None:
    """Expanded inside a kernel or outside, they are the words of AES-128-CTR from zero on."""
    cipher = Cipher(AES(key), CTR(bytes(16))).encryptor()
    size = int(np.prod(panel_shape(case.op)))
    words = np.frombuffer(cipher.update(bytes(8 * size)), "<u8").astype(np.uint64)
    weight = from_panels(case.op, words)
    conv = WideConv(case.op, case.source, KeyStream(key), case.n)
    expected = exact(Case(case.op, case.source, case.x, weight, case.add, case.n))
    assert np.array_equal(run(conv, case, level), expected)


@pytest.mark.parametrize("channels", [63, 64, 127])
def test_a_key_gives_the_same_weights_in_long_panels(level: str, channels: int) -> None:
    """Streams of every length modulo the kernels' own block of blocks."""
    from pi_system.backends.fss.program import Conv

    op = Conv("y", ("x",), (33, 2, 2), "y", (33, channels, 3, 3), padding=(1, 1))
    x = np.random.default_rng(0).integers(0, 2**64, (1, channels, 2, 2), np.uint64)
    stream = KeyStream.of(bytes(16), "b")
    words = stream.open().words(int(np.prod(panel_shape(op)))).reshape(panel_shape(op))
    source = (channels, 2, 2)
    with kernels.using(level):
        kept, expanded = (WideConv(op, source, b, 64)(x) for b in (words, stream))
    assert np.array_equal(kept, expanded)


@many
@given(cases(largest=40))
def test_panels_there_and_back(case: Case) -> None:
    assert np.array_equal(from_panels(case.op, to_panels(case.op, case.weight)), case.weight)


def test_streams_go_on_where_they_stopped() -> None:
    seed = prg.fresh_seed()
    whole = prg.Stream(seed, "a").words(100)
    parts = prg.Stream(seed, "a")
    assert np.array_equal(np.concatenate([parts.words(n) for n in (1, 30, 0, 69)]), whole)
    assert not np.array_equal(prg.Stream(seed, "b").words(100), whole)


def test_keys_are_not_shown() -> None:
    assert "ab" not in repr(KeyStream(b"ab" * 8))
