"""pi-bench from the command line."""

from __future__ import annotations

import csv
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import jsonschema
import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner

from pi_system.bench.schema import json_schema
from pi_system.cli import bench, common
from pi_system.models import demo_images


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


@pytest.mark.parametrize("relus", [0, 100])
def test_fss_is_the_default_backend_and_tells_where_the_time_goes(
    parties: Callable[[], dict[str, int]], capsys: pytest.CaptureFixture[str], relus: int
) -> None:
    arguments = ["--model", f"random:resnet10w2@{relus}", "--repeat", "3", "--format", "json"]
    assert common.run(bench.cli, ["run", *arguments, "--tolerance", "0.5"]) == 0
    data = json.loads(capsys.readouterr().out)
    jsonschema.validate(data, json_schema())
    online = data["online"]
    assert data["backend"] == "fss" and data["model"]["relu_kept"] == relus
    if not relus:  # the image goes out and the logits come back
        assert online["round_trips"] == 1
    work = online["work_ms"]["server"]
    assert set(work) == {"linear", "local", "wait"} | ({"gates"} if relus else set())
    assert 0 < sum(work.values()) < 1.1 * online["latency_ms"]["max"]


def test_compare_prints_each_format_and_judges_the_answers(
    parties: Callable[[], dict[str, int]],
    toy_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def command(*contenders: str, format_: str) -> tuple[int, str, str]:
        names = [word for name in contenders for word in ("--contender", f"toy_backends:{name}")]
        arguments = ["--model", str(toy_model), "--rounds", "1", "--repeat", "1", *names]
        code = common.run(bench.cli, ["compare", *arguments, "--format", format_])
        return code, *capsys.readouterr()

    code, out, err = command("Plain", "Absent", format_="json")
    assert code == 0
    data = json.loads(out)
    jsonschema.validate(data, json_schema("compare"))
    assert [one["not_run"] is None for one in data["contenders"]] == [True, False]
    assert all(line.startswith("unstable: ") for line in err.splitlines())

    code, out, err = command("Wrong", format_="csv")
    assert code == 4 and err.splitlines()[-1].startswith("error: toy_backends:Wrong: ")
    (row,) = csv.DictReader(out.splitlines())
    assert row["name"] == "toy_backends:Wrong" and float(row["online.latency_ms.median"]) > 0

    code, out, err = command("Plain", format_="table")
    assert code == 0 and "plaintext" in out and "unstable: " in out and err == ""


def test_compare_and_sweep_measure_with_the_plan_asked_for(
    parties: Callable[[], dict[str, int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = "random:resnet10w2@100"
    compared = ["--model", model, "--contender", "fss", "--rounds", "1", "--repeat", "1"]
    compared += ["--plan", "high", "--tolerance", "9", "--format", "json"]
    assert common.run(bench.cli, ["compare", *compared]) == 0
    (one,) = json.loads(capsys.readouterr().out)["contenders"]
    assert one["fixed_point"]["plan"] == "high"

    scenario, output = tmp_path / "x.toml", tmp_path / "out.csv"
    scenario.write_text(f'[[grid]]\nmodels = ["{model}"]\nrepeat = 1\nwarmup = 0\n')
    asked = ["sweep", str(scenario), "--output", str(output)]
    for plan, said in (("high", "1 measured, 0"), ("default", "1 measured, 0"), ("high", "0 mea")):
        assert common.run(bench.cli, [*asked, "--plan", plan]) == 0
        assert capsys.readouterr().err.startswith(said)
    rows = csv.DictReader(output.read_text().splitlines())
    assert [row["fixed_point.plan"] for row in rows] == ["high", "default"]


def test_sweep_writes_its_table_and_says_what_failed(
    parties: Callable[[], dict[str, int]],
    toy_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    scenario, output = tmp_path / "x.toml", tmp_path / "out.csv"
    scenario.write_text(
        f'[[grid]]\nmodels = ["{toy_model}"]\nrepeat = 1\n'
        'backends = ["toy_backends:Plain", "toy_backends:Absent"]\n'
    )
    code = common.run(bench.cli, ["sweep", str(scenario), "--output", str(output)])
    out, err = capsys.readouterr()
    first, failed, error = err.splitlines()
    assert code == 2 and "network loopback" in out
    assert first == "1 measured, 0 were there"
    assert failed.startswith("not measured: ") and "no 'Absent'" in failed
    assert error.startswith("error: ") and "no 'Absent'" in error
    (row,) = csv.DictReader(output.read_text().splitlines())
    assert row["backend"] == "toy_backends:Plain"

    output.write_bytes(output.read_bytes()[:-2])
    code = common.run(bench.cli, ["sweep", str(scenario), "--output", str(output)])
    assert code == 6 and "its last line is cut off" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("compare", "--contender", "none"), "unknown backend 'none'"),
        (("compare", "--network", "moon"), "no network 'moon'"),
        (("compare", "--output", "none/x.json"), "there is no folder none"),
        (("sweep", "none.toml", "--output", "x.csv"), "cannot read none.toml"),
        (("sweep", "none.toml", "--output", "none/x.csv"), "there is no folder none"),
        (("sweep", "none.toml"), "Missing option '--output'"),
    ],
)
def test_compare_and_sweep_refuse_bad_input_at_once(
    arguments: tuple[str, ...], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert common.run(bench.cli, list(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == "" and text in err


def test_env_describes_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert common.run(bench.cli, ["env", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["cores"] >= 1
    assert common.run(bench.cli, ["env"]) == 0
    assert "packages.torch" in capsys.readouterr().out


def test_images_and_labels_of_cifars_binary_version(tmp_path: Path) -> None:
    """Two label bytes and 3,072 of pixels: the fine label counts; a .npy says the same."""
    pixels, labels = demo_images()
    pixels, labels = pixels[:3], labels[:3]
    records = [bytes([19 - label % 20, label]) + image.tobytes()
               for image, label in zip(pixels, labels.tolist(), strict=True)]  # fmt: skip
    (tmp_path / "test.bin").write_bytes(b"".join(records))
    np.save(tmp_path / "test.npy", pixels)
    np.save(tmp_path / "labels.npy", labels)
    both = []
    for files in (
        ["--images-file", str(tmp_path / "test.bin")],
        [
            "--images-file",
            str(tmp_path / "test.npy"),
            "--labels-file",
            str(tmp_path / "labels.npy"),
        ],
    ):
        command = ["run", *files, "--warmup", "0", "--repeat", "1", "--format", "json"]
        result = CliRunner().invoke(bench.cli, [*command, "--agreement", "0", "--plan", "high"])
        assert result.exit_code == 0, result.output
        both.append(json.loads(result.stdout))
    for data in both:
        assert data["accuracy"]["images"] == 3
        assert data["accuracy"]["beyond_stated"] == 0
        assert data["fixed_point"]["plan"] == "high"
    assert [row["label"] for row in both[0]["predictions"]] == [
        row["label"] for row in both[1]["predictions"]
    ]
    assert both[0]["accuracy"]["plaintext_correct"] == both[1]["accuracy"]["plaintext_correct"]
    for name, arguments in (
        ("whole file", ["--images-file", str(tmp_path / "cut.bin")]),
        ("labels", ["--images-file", str(tmp_path / "test.bin"),
                    "--labels-file", str(tmp_path / "few.npy")]),
        ("goes with", ["--labels-file", str(tmp_path / "few.npy")]),
    ):  # fmt: skip
        (tmp_path / "cut.bin").write_bytes(b"".join(records)[:-1])
        np.save(tmp_path / "few.npy", labels[:2])
        result = CliRunner().invoke(bench.cli, ["run", *arguments])
        assert result.exception is not None and name in str(result.exception)


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
