"""Seeds and corrections make right tuples, against Python's own integers."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from crypten_trio import one_relu
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from pi_system.backends.crypten import tape as tapes
from pi_system.backends.crypten.prg import Stream
from pi_system.backends.crypten.tape import Request
from pi_system.errors import ProtocolError

RING = 1 << 64
KEYS = bytes(range(32)), bytes(range(32, 64))


def opened(request: Request, index: int = 0) -> list[Any]:
    """The tuple in the clear, as arrays of Python integers."""
    first, second = (request.shares(Stream(key, index), rank) for rank, key in enumerate(KEYS))
    first.append(request.correction(*(Stream(key, index) for key in KEYS)))
    values = [[s.numpy().astype(object) % RING for s in shares] for shares in (first, second)]
    xor = {"and": (True, True, True), "bit": (True, False)}.get(request.kind, (False,) * 3)
    return [a ^ b if x else (a + b) % RING for a, b, x in zip(*values, xor, strict=True)]


def test_products() -> None:
    a, b, c = opened(Request.of("mul", (2, 3, 2, 2), (3, 1, 1)))
    assert (c == a * b % RING).all()
    a, b, c = opened(Request.of("matmul", (2, 5), (5, 3)))
    assert (c == a.dot(b) % RING).all()
    a, b, c = opened(Request.of("and", (2, 1, 7), (2, 1, 7)))
    assert (c == a & b).all()
    bit, value = opened(Request.of("bit", (50,)))
    assert (bit == value).all() and set(bit) == {0, 1}


def test_convolution_with_everything() -> None:
    options = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "groups": 2}
    request = Request.of("conv2d", (2, 4, 5, 6), (6, 2, 3, 2), **options)
    a, b, c = opened(request)
    padded = np.zeros((2, 4, 7, 10), object)
    padded[:, :, 1:-1, 2:-2] = a
    result = np.zeros(request.product_size, object)
    for n, o, y, x in itertools.product(*map(range, result.shape)):
        for i, ky, kx in itertools.product(range(2), range(3), range(2)):
            source = padded[n, 2 * (o // 3) + i, 2 * y + ky, x + 2 * kx]
            result[n, o, y, x] += source * b[o, i, ky, kx]
    assert (c == result % RING).all()
    floats = F.conv2d(torch.zeros(2, 4, 5, 6), torch.zeros(6, 2, 3, 2), None, **options)
    assert request.product_size == tuple(floats.shape)


def test_inferences_have_material_of_their_own() -> None:
    request = Request.of("mul", (100,), (100,))
    values = [v for index in range(3) for array in opened(request, index) for v in array]
    assert len(set(values)) == len(values)


def test_stream_is_aes_in_counter_mode() -> None:
    key = bytes(range(32))
    ecb = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    blocks = b"".join(ecb.update((7).to_bytes(8, "big") + i.to_bytes(8, "big")) for i in range(5))
    stream = Stream(key, 7)
    got = torch.cat([stream.ring((2, 2)).flatten(), stream.ring((0,)), stream.ring((6,))])
    assert got.numpy().astype("<i8").tobytes() == blocks


def test_stream_is_uniform() -> None:
    values = Stream(KEYS[0]).ring((20_000,))
    ones = np.unpackbits(values.numpy().view(np.uint8)).reshape(-1, 64).mean(axis=0)
    assert np.abs(ones - 0.5).max() < 5 * 0.5 / 20_000**0.5
    assert set(Stream(KEYS[0]).ring((100,), bits=1).tolist()) == {0, 1}


def test_tape_travels() -> None:
    tape = tapes.of_graph(one_relu(0.5), 2)
    assert tapes.from_json(tapes.to_json(tape)) == tape
    assert tapes.sha256(tape) != tapes.sha256(tapes.of_graph(one_relu(0.5), 3))


CONV = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1}


@pytest.mark.parametrize(
    "item",
    [
        None,
        ["mul", [[1]], {}],
        ["square", [[1]], {}],
        ["mul", [[2], [3]], {}],
        ["mul", [[2], [True]], {}],
        ["mul", [[2], [-1]], {}],
        ["mul", [[2], [2.0]], {}],
        ["mul", [[1 << 14], [1 << 14, 1]], {}],
        ["mul", [[2], [2]], {"groups": 1}],
        ["and", [[2], [1]], {}],
        ["bit", [[1 << 28]], {}],
        ["matmul", [[2, 3], [4, 2]], {}],
        ["conv2d", [[1, 1, 4, 4], [1, 1, 3, 3]], {}],
        ["conv2d", [[1, 1, 4, 4], [1, 1, 5, 5]], CONV],
        ["conv2d", [[1, 1, 4, 4], [1, 2, 3, 3]], CONV],
        ["conv2d", [[1, 1, 4, 4], [1, 1, 3, 3]], CONV | {"stride": [0, 1]}],
        ["conv2d", [[1, 1, 4, 4], [1, 1, 3, 3]], CONV | {"groups": [1, 1]}],
        ["conv2d", [[1, 1, 4, 4], [1, 1, 3, 3]], CONV | {"padding": 1}],
        ["conv2d", [[1, 1, 4, 4], [1, 1, 3, 3]], CONV | {"padding": [1 << 20, 1 << 20]}],
        ["conv2d", [[1, 2, 4, 4], [3, 1, 3, 3]], CONV | {"groups": 2}],
        ["mul", 3, {}],
        ["mul", [[2], [2]], 3],
    ],
)
def test_malformed_requests_are_refused(item: Any) -> None:
    with pytest.raises(ProtocolError):
        tapes.from_json([item])


@settings(max_examples=50, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
        max_leaves=12,
    )
)
def test_any_json_is_a_tape_or_a_protocol_error(data: Any) -> None:
    try:
        tape = tapes.from_json(data)
    except ProtocolError:
        return
    assert all(isinstance(request, Request) for request in tape)
