"""pi-bench from the command line."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import jsonschema
import numpy as np
import numpy.typing as npt
import pytest

from pi_system.bench.schema import json_schema
from pi_system.cli import bench, common


@pytest.fixture(autouse=True)
def sigterm() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def run(
    parties: Callable[[], dict[str, int]], toy_model: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    def command(*arguments: str, backend: str = "Plain") -> tuple[int, str, str]:
        model = ("--model", str(toy_model), "--backend", f"toy_backends:{backend}")
        code = common.run(bench.cli, ["run", *model, *arguments])
        return code, *capsys.readouterr()

    return command


def test_run_prints_one_json_object_of_the_schema_and_nothing_else(
    run: Callable[..., tuple[int, str, str]],
) -> None:
    code, out, err = run("--format", "json", "--repeat", "2")
    assert code == 0
    data = json.loads(out)
    jsonschema.validate(data, json_schema())
    assert data["backend"] == "toy_backends:Plain" and data["accuracy"]["images"] == 1
    assert all(line.startswith("unstable: ") for line in err.splitlines())


def test_wrong_answers_are_shown_and_end_in_code_4(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path, toy_images: npt.NDArray[np.float32]
) -> None:
    np.save(tmp_path / "x.npy", toy_images)
    code, out, err = run(
        *("--images-file", str(tmp_path / "x.npy"), "--repeat", "1", "--predictions"),
        backend="Wrong",
    )
    assert code == 4
    assert "NO" in out and "Agreement with plaintext: " in out
    assert err.splitlines()[-1].startswith("error: ") and "are wanted" in err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--network", "lte"), "give loopback, lan, wan or RTT:MBPS"),
        (("--backend", "none"), "unknown backend 'none'"),
        (("--model", "nowhere"), "no model 'nowhere'"),
        (("--images-file", "none.npy"), "cannot read none.npy"),
        (("--images", "1", "--images-file", "none.npy"), "not both"),
        (("--output", "none/x.json"), "there is no folder none"),
        (("--repeat", "0"), "Invalid value for '--repeat'"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(
    run: Callable[..., tuple[int, str, str]], arguments: tuple[str, ...], text: str
) -> None:
    code, out, err = run(*arguments)
    assert code == 2 and out == "" and text in err


def test_images_of_a_wrong_shape_are_refused(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    np.save(tmp_path / "x.npy", np.zeros((1, 1, 8, 8), np.float32))
    code, _, err = run("--images-file", str(tmp_path / "x.npy"))
    assert code == 2 and "(1, 1, 8, 8)" in err


def test_env_describes_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert common.run(bench.cli, ["env", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["cores"] >= 1
    assert common.run(bench.cli, ["env"]) == 0
    assert "packages.torch" in capsys.readouterr().out


def test_regress_passes_a_like_result_and_ends_in_code_3_on_a_slowdown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "run-demo-fss.json"
    data = json.loads(source.read_text())
    latency = data["online"]["latency_ms"]
    latency["values"] = [2 * value for value in latency["values"]]
    slower, other = tmp_path / "slower.json", tmp_path / "other.json"
    slower.write_text(json.dumps(data))
    other.write_text("[]")
    assert common.run(bench.cli, ["regress", str(source), str(source)]) == 0
    assert common.run(bench.cli, ["regress", str(source), str(slower)]) == 3
    out, err = capsys.readouterr()
    assert "WORSE" in out and "worse than before: online.latency_ms x 2.0" in err
    for bad in (other, tmp_path / "none.json"):
        assert common.run(bench.cli, ["regress", str(source), str(bad)]) == 2
        assert str(bad) in capsys.readouterr().err
