"""``pi-export`` from the command line, a user's own network included."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from pi_system import models
from pi_system.cli import common
from pi_system.cli.export import command
from pi_system.errors import IntegrityError
from pi_system.graph import execute, serialize

OWN = '''
"""A network the package has never heard of."""
import torch
import torch.nn.functional as F
from torch import nn
from helper import CLASSES


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 8, 1)
        self.branch = nn.Conv2d(8, 4, 3, padding=2, dilation=2)
        self.fc = nn.Linear(12, CLASSES)

    def forward(self, x):
        x = self.act(self.bn(self.stem(x)))
        y = self.point(self.act(self.depthwise(x)))
        y += x
        x = F.max_pool2d(F.relu(y), 2)
        x = torch.cat([x, self.branch(x).relu_()], dim=1)
        x = F.avg_pool2d(x, x.shape[-2:])
        return self.fc(x.view(x.size(0), -1))


def build():
    torch.manual_seed(1)
    return Own()


def broken():
    raise RuntimeError("no weights here")


def gelu():
    return nn.Sequential(nn.Conv2d(3, 3, 1), nn.GELU())


def nothing():
    return 3
'''


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "helper.py").write_text("CLASSES = 7\n")
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


def test_a_users_own_network(tmp_path: Path, own: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--from", f"{own}:build", "--input", "3x16x12", "-o", str(out)]
    result = CliRunner().invoke(command, [*arguments, "--format", "json", "--parity", "random"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    model, parity = document["model"], document["parity"]
    assert model["name"] == "Own" and model["classes"] == 7
    assert model["relu_total"] == model["relu_kept"] == 3 * 8 * 192 + 4 * 48
    assert model["relu_total_without_stem"] == model["relu_total"] - 8 * 192
    assert [layer["op"] for layer in model["layers"]].count("relu") == 4
    assert parity["argmax_agreement"] == 1 and len(parity["nodes"]) == len(model["layers"])
    graph = serialize.load(out)
    assert graph.sha256() == model["sha256"]
    import importlib.util
    import sys

    sys.path.insert(0, str(tmp_path))
    try:
        spec = importlib.util.spec_from_file_location("own_again", own)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(tmp_path))
    images = models.random_images(4, (3, 16, 12))
    with torch.no_grad():
        expected = module.build().eval()(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(execute.run(graph, images), expected, rtol=1e-4, atol=1e-5)


def test_random_positions_are_said_to_be_random(own: Path) -> None:
    arguments = ["--from", f"{own}:build", "--input", "3x16x12", "--relus", "600"]
    result = CliRunner().invoke(command, [*arguments, "--format", "csv"])
    assert result.exit_code == 0, result.output
    assert "random positions" in result.stderr
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    kept = [int(row["relu_kept"]) for row in rows if row["op"] == "relu"]
    assert sum(kept) == 600 and max(kept) - min(kept) <= 1


def test_the_table_shows_both_counts(tmp_path: Path) -> None:
    result = CliRunner().invoke(command, ["random:resnet10w2@1000", "--parity", "random"])
    assert result.exit_code == 0, result.output
    assert "as SENet counts" in result.stdout and "as SNL counts" in result.stdout
    assert "9,728" in result.stdout and "7,680" in result.stdout
    assert "argmax agrees" in result.stdout
    assert result.stderr == ""


def test_parity_on_a_file_and_its_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    serialize.save(tmp_path / "m", models.random_graph("resnet10", width=2))
    np.save(tmp_path / "x.npy", models.random_images(2, (3, 32, 32)))
    arguments = [str(tmp_path / "m"), "--parity", str(tmp_path / "x.npy"), "--format", "json"]
    assert common.run(command, arguments) == 0
    assert json.loads(capsys.readouterr().out)["parity"]["images"] == 2
    assert common.run(command, [*arguments, "--fractional-bits", "3"]) == 4
    captured = capsys.readouterr()
    assert json.loads(captured.out)["parity"]["fractional_bits"] == 3
    assert captured.err.startswith("error: 3 fractional bits") and captured.err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments,message",
    [
        ([], "give either"),
        (["demo", "--from", "OWN:build", "--input", "3x8x8"], "give either"),
        (["--from", "OWN:build"], "--from needs --input"),
        (["--from", "OWN:build", "--input", "3x8"], "not CxHxW"),
        (["--from", "OWN:build", "--input", "1x8x8"], "does not run on"),
        (["--from", "OWN:missing", "--input", "3x8x8"], "no factory 'missing'"),
        (["--from", "OWN:broken", "--input", "3x8x8"], "RuntimeError: no weights here"),
        (["--from", "OWN:nothing", "--input", "3x8x8"], "expected an nn.Module"),
        (["--from", "OWN:gelu", "--input", "3x8x8"], "layer 1: GELU"),
        (["--from", "OWN:build", "--input", "3x8x8", "--relus", "99999"], "outside 0 to"),
        (["--from", "nofile.py:build", "--input", "3x8x8"], "no Python file"),
        (["--from", "OWN", "--input", "3x8x8"], "not file.py:factory"),
        (["nowhere"], "no model"),
        (["random:resnet10w2@all", "--relus", "3"], "go with --from"),
        (["random:resnet10w2@all", "--output", "no/such/dir/x"], "no folder"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(
    own: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert common.run(command, [a.replace("OWN", str(own)) for a in arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""


def test_plans_are_calibrated_at_export(tmp_path: Path) -> None:
    """By default on stand-ins, with a warning; on the samples given where there are any."""
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "helper.py").write_text("CLASSES = 4")
    base = ["--from", f"{tmp_path}/own.py:build", "--input", "3x16x16"]
    result = CliRunner().invoke(command, [*base, "-o", str(tmp_path / "a")])
    assert result.exit_code == 0, result.output
    assert "warning: plans calibrated on synthetic images" in result.stderr
    samples = np.random.default_rng(0).normal(size=(9, 3, 16, 16)).astype(np.float32)
    np.save(tmp_path / "samples.npy", 3 * samples)
    result = CliRunner().invoke(
        command,
        [*base, "-o", str(tmp_path / "b"), "--calibrate", str(tmp_path / "samples.npy")],
    )
    assert result.exit_code == 0, result.output
    assert "warning" not in result.stderr
    first, second = (serialize.load(tmp_path / name).metadata["fss_plan"] for name in "ab")
    assert second["calibrated_on"] == "9 images of samples.npy"
    for level in ("default", "high"):
        limit = second[level]["input_limit"]
        assert limit == pytest.approx(2 * 3 * np.abs(samples).max()) != first[level]["input_limit"]


def test_plans_of_a_checkpoint_stay_with_its_weights(tmp_path: Path) -> None:
    source = Path(models.__file__).parent / "demo" / "student"
    folder = tmp_path / "student"
    shutil.copytree(source, folder)
    stored = models.from_checkpoint(folder).metadata["fss_plan"]
    assert stored == models.resolve("demo").metadata["fss_plan"]
    assert stored["calibrated_on"] == "512 images of train.bin"
    again = [str(folder), "--calibrate", "bundled", "--calibrate-images", "2", "--plans-only"]
    result = CliRunner().invoke(command, again)
    assert result.exit_code == 0, result.output
    assert models.from_checkpoint(folder).metadata["fss_plan"]["calibrated_on"] == (
        "2 bundled images"
    )
    path = folder / "plans.json"
    path.write_text(path.read_text().replace('weights_sha256": "', 'weights_sha256": "0'))
    with pytest.raises(IntegrityError, match="other weights"):
        models.from_checkpoint(folder)
    result = CliRunner().invoke(command, again)
    assert result.exit_code == 0, result.output
    assert "fss_plan" in models.from_checkpoint(folder).metadata
