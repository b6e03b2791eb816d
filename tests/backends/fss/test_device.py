"""Linear layers on a torch device, tested on the CPU: the code is the same as on a GPU."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from fss_networks import Sessions, images, planned, random_graph, residual
from hypothesis import given, settings
from hypothesis import strategies as st
from wide_cases import Case, cases, exact

from pi_system.backends.base import Options
from pi_system.backends.fss import limbs
from pi_system.backends.fss.limbs import TorchConv
from pi_system.backends.fss.linear import RingConv
from pi_system.backends.fss.program import Conv
from pi_system.backends.fss.ring import Words, reduce
from pi_system.errors import UsageError
from pi_system.graph.execute import run

CPU = torch.device("cpu")
many = settings(deadline=None, max_examples=60)


@many
@given(cases())
def test_any_words(case: Case) -> None:
    conv = TorchConv(case.op, case.source, case.weight, case.n, device=CPU)
    assert np.array_equal(reduce(conv(case.x, case.add), case.n), exact(case))


@many
@given(cases(), st.integers(1, 20), st.sampled_from(("uniform", "lowest", "highest")))
def test_narrow_weights(case: Case, bits: int, kind: str) -> None:
    half = 1 << (bits - 1)
    whole = {
        "uniform": (case.weight % np.uint64(2 * half)).astype(np.int64) - half,
        "lowest": np.full(case.weight.shape, -half),
        "highest": np.full(case.weight.shape, half - 1),
    }[kind]
    weight: Words = whole.astype(np.int64).view(np.uint64)
    narrow = Case(case.op, case.source, case.x, weight, case.add, case.n)
    conv = TorchConv(case.op, case.source, weight, case.n, bits, device=CPU)
    assert np.array_equal(reduce(conv(case.x, case.add), case.n), exact(narrow))


@pytest.mark.parametrize("channels", [1, 455, 456, 512])
@pytest.mark.parametrize("bits", [None, 9, 12, 16])
def test_sums_at_the_bound_are_exact(channels: int, bits: int | None) -> None:
    """Inputs of all ones, weights all lowest: the largest sums there can be."""
    op = Conv("y", ("x",), (2, 1, 1), "y", (2, channels, 3, 3))
    x = np.full((1, channels, 3, 3), 2**64 - 1, np.uint64)
    x[0, 0, 0, 0] -= np.uint64(1)
    for value in (-1 << (bits or 64) - 1, (1 << (bits or 64) - 1) - 1, -1, 0x5555):
        if bits is not None and value == 0x5555:
            continue
        weight = np.full(op.weight_shape, value, np.int64).view(np.uint64)
        conv = TorchConv(op, (channels, 3, 3), weight, 64, bits, device=CPU)
        case = Case(op, (channels, 3, 3), x, weight, None, 64)
        assert np.array_equal(conv(x), exact(case))
        assert np.array_equal(conv(x), RingConv(op, (channels, 3, 3), weight, 64, bits)(x))


def test_limbs_are_as_long_as_the_bound_allows() -> None:
    """Its room is spent on kernel and channels, of one group."""
    for channels, kernel, groups, room in ((512, 3, 1, 41), (512, 1, 1, 45), (1, 3, 64, 50)):
        op = Conv("y", ("x",), (64, 4, 4), "y", (64, channels, kernel, kernel), groups=groups)
        width, ((at, _),) = limbs._cut(op, np.zeros(op.weight_shape, np.uint64), 64, 12)
        assert (width, at) == (room - 12, 0)
        width, parts = limbs._cut(op, np.zeros(op.weight_shape, np.uint64), 64, None)
        assert width + parts[1][0] == room


@pytest.mark.parametrize("seed", range(4))
def test_sessions(seed: int) -> None:
    graph, plan = planned(random_graph(seed) if seed else residual())
    x = images(graph, 2)
    with Sessions(graph, Options(batch=2, device="torch:cpu")) as sessions:
        sessions.offline(3)
        error = np.abs(sessions.online(x) - run(graph, x)).max()
        methods = {conv.method for conv in sessions.server._convs.values()}
    assert methods == {"float64 limbs on cpu"}
    assert error <= min(plan.error, 24 * 2.0**-plan.f_x)


@pytest.mark.parametrize("name", ["", "tpu", "mps", "meta", "cpu:1", "cuda:x", "torch:cuda"])
def test_unknown_devices_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="cpu, cuda"):
        limbs.find(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_missing_gpu_is_named() -> None:
    for device in ("cuda", "cuda:3"):
        with pytest.raises(UsageError, match="CUDA"):
            limbs.find(device)


def test_the_default_device_needs_no_torch() -> None:
    code = "import sys; from pi_system.backends.fss import device; device.check('cpu'); "
    code += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
