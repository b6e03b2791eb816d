"""Sweeps: every method honours its budget, resumes to the same bits, is not done twice."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from pi_system import checkpoint, nn
from pi_system.errors import UsageError
from training import data, distill, methods, recipe, report, senet, sweep
from training.cli import cli
from training.loop import Reporter, Row, Run, stored_rows

from .test_loop import Stop, StopAfter, assert_same

BUDGET = 777


@pytest.fixture(scope="module")
def base(cifar10: Path, recipe_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose teacher and sensitivities all runs of this module share."""
    chosen = recipe.load(str(recipe_path))
    folder = tmp_path_factory.mktemp("sweep")
    run = Run(folder / "runs", chosen, data.load("cifar10", cifar10), shared=folder / "shared")
    senet.measure(run)
    return run


def student(base: Run, method: str, budget: int, directory: Path) -> Run:
    given = (0,) * 6 + (budget // 3, budget // 3, budget - 2 * (budget // 3))
    chosen = methods.apply(base.recipe, method, budget, seed=1, relus=given)
    return dataclasses.replace(base, recipe=chosen, directory=directory)


@pytest.mark.parametrize("method", methods.METHODS)
def test_each_method_honours_its_budget(base: Run, method: str, tmp_path: Path) -> None:
    run = student(base, method, BUDGET, tmp_path)
    teacher, result = senet.train(run)
    model, manifest = checkpoint.load(tmp_path / distill.FOLDER)
    kept = nn.count_relus(model).kept
    assert kept == manifest.relu_kept == result.relu_kept
    assert kept == BUDGET or (method == "whole-layers" and kept <= BUDGET)
    assert teacher.relu_kept == teacher.relu_total
    rows = stored_rows(tmp_path)
    assert len(rows) == base.recipe.masks.epochs + base.recipe.finetune.epochs, "same epochs"
    assert manifest.method == run.recipe.method


@pytest.mark.parametrize("method", ["senet", "snl", "senet+", "senet+polish"])
@pytest.mark.parametrize("budget", ["none", "all"])
def test_no_relu_and_every_relu(base: Run, method: str, budget: str, tmp_path: Path) -> None:
    total = 38912
    run = student(base, method, total if budget == "all" else 0, tmp_path)
    _, found = senet.find_masks(run)
    assert nn.count_relus(found).kept == run.recipe.relu_budget
    assert nn.count_relus(found).total == total


@pytest.mark.parametrize("method", ["snl", "senet+", "senet+polish"])
@pytest.mark.parametrize("inside", [False, True])
def test_a_stopped_search_goes_on_to_the_same_bits(
    base: Run, method: str, inside: bool, tmp_path: Path
) -> None:
    whole = student(base, method, BUDGET, tmp_path / "whole")
    senet.train(whole)
    stopped = student(base, method, BUDGET, tmp_path / "stopped")
    with pytest.raises(Stop):
        senet.train(dataclasses.replace(stopped, reporter=StopAfter(1, inside=inside)))
    senet.train(stopped)
    assert_same(stopped.directory, whole.directory)


def test_bf16_trains_and_resumes(base: Run, tmp_path: Path) -> None:
    half = dataclasses.replace(base, recipe=dataclasses.replace(base.recipe, precision="bf16"))
    whole = student(half, "senet", BUDGET, tmp_path / "whole")
    senet.train(whole)
    stopped = student(half, "senet", BUDGET, tmp_path / "stopped")
    with pytest.raises(Stop):
        senet.train(dataclasses.replace(stopped, reporter=StopAfter(3)))
    senet.train(stopped)
    assert_same(stopped.directory, whole.directory)
    full = student(base, "senet", BUDGET, tmp_path / "whole")
    with pytest.raises(UsageError, match="different recipe"):
        senet.train(full)


class Count(Reporter):
    def __init__(self) -> None:
        self.rows: list[Row] = []

    def epoch(self, row: Row) -> None:
        self.rows.append(row)


@pytest.fixture(scope="module")
def swept(base: Run, recipe_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a sweep's TOML and its results."""
    folder = tmp_path_factory.mktemp("swept")
    (folder / "sweep.toml").write_text(
        f'recipe = "{recipe_path}"\nmethods = ["uniform-random", "senet"]\n'
        "budgets = [3000, 777]\nseeds = [1]\n"
    )
    jobs = sweep.load(folder / "sweep.toml")
    assert [job.name for job in jobs[:3]] == [
        "uniform-random-3000-s1",
        "senet-3000-s1",
        "uniform-random-777-s1",
    ]
    # Stopped after its first student.
    run = dataclasses.replace(base, directory=folder / "runs")
    next(sweep.run(jobs, run, folder / "results"))
    assert [p.stem for p in (folder / "results").iterdir()] == [jobs[0].name]
    assert len(list(sweep.run(jobs, run, folder / "results"))) == 3
    return folder


def test_a_sweep_skips_what_is_done(base: Run, swept: Path) -> None:
    seen = Count()
    run = dataclasses.replace(base, directory=swept / "elsewhere", reporter=seen)
    jobs = sweep.load(swept / "sweep.toml")
    assert not list(sweep.run(jobs, run, swept / "results")) and not seen.rows
    other = dataclasses.replace(
        jobs[0], recipe=dataclasses.replace(jobs[0].recipe, relu_budget=2999)
    )
    with pytest.raises(UsageError, match="different recipe"):
        sweep.stored(other, swept / "results")


def test_a_result_says_what_it_is(base: Run, swept: Path) -> None:
    text = (swept / "results" / "senet-777-s1.json").read_text()
    document = json.loads(text)
    assert document["relu_kept"] == sum(layer["relus"] for layer in document["layers"]) == 777
    assert document["seed"] == 1 and document["epochs"] == {"search": 2, "finetune": 2}
    assert [row["stage"] for row in document["curve"]] == ["masks"] * 2 + ["finetune"] * 2
    model, _ = checkpoint.load(swept / "runs" / "senet-777-s1" / "student")
    from training.loop import accuracy

    assert document["test_accuracy"] == accuracy(model, base.dataset.test, base.dataset)
    assert str(swept) not in text


def test_the_command_makes_table_and_plot(swept: Path, cifar10: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        cli,
        ["sweep", str(swept / "sweep.toml"), "--data", str(cifar10), "--run", str(swept / "runs"),
         "--results", str(swept / "results"), "--format", "csv"],
    )  # fmt: skip
    assert done.exit_code == 0 and done.stdout.count("\n") == 5
    plots = [tmp_path / "a.svg", tmp_path / "b.png"]
    for plot in plots:
        made = CliRunner().invoke(cli, ["report", str(swept / "results"), "--plot", str(plot)])
        assert made.exit_code == 0, made.stderr
        assert plot.stat().st_size > 1000
    lines = made.stdout.splitlines()
    assert lines[0].startswith("| method | 777 ReLUs (2.0%) | 3,000 ReLUs (7.7%) |")
    result = json.loads((swept / "results" / "senet-777-s1.json").read_text())
    (row,) = (line for line in lines if line.startswith("| `senet`"))
    assert f"**{100 * result['test_accuracy']:.2f}**" in row.split("|")[2]


def test_half_a_sweep_has_its_table_and_plot(swept: Path, tmp_path: Path) -> None:
    path = tmp_path / "sweep.toml"
    text = (swept / "sweep.toml").read_text()
    text = text.replace('"senet"]', '"senet", "senet-mismatch"]').replace("[1]", "[1, 2]")
    path.write_text(text)
    half = tmp_path / "half"
    half.mkdir()
    for name in ("senet-777-s1", "senet-3000-s1", "uniform-random-777-s1"):
        shutil.copy(swept / "results" / f"{name}.json", half)
    # Of another sweep; it is not reported.
    shutil.copy(half / "senet-777-s1.json", half / "snl-777-s1.json")
    plot = tmp_path / "plot.svg"
    made = CliRunner().invoke(cli, ["report", str(half), "--sweep", str(path), "--plot", str(plot)])
    assert made.exit_code == 0, made.stderr
    assert plot.stat().st_size > 1000
    accuracy = 100 * json.loads((half / "senet-777-s1.json").read_text())["test_accuracy"]
    lines = made.stdout.splitlines()
    assert len(lines) == 7 and "snl" not in made.stdout
    uniform, senet_, mismatch = lines[2:5]
    assert uniform.startswith("| `uniform-random`") and uniform.endswith(", -) | - |")
    assert f"| **{accuracy:.2f}** ({accuracy:.2f}, -) |" in senet_
    # The bars of its title do not end the cell.
    assert mismatch.replace("\\|", "").count("|") == 4 and mismatch.endswith("| - | - |")
    assert lines[-1].endswith("result yet: 9 of 12.")
    assert "9 students without a result yet" in plot.read_text()
    whole = CliRunner().invoke(cli, ["report", str(swept / "results")])
    assert "without a result" not in whole.stdout and ", -" not in whole.stdout
    empty = CliRunner().invoke(cli, ["report", str(tmp_path), "--sweep", str(path)])
    assert empty.exit_code == 2 and "no results" in empty.stderr


def test_unlike_runs_share_no_table(swept: Path, tmp_path: Path) -> None:
    for i, name in enumerate(("senet-777-s1", "senet-3000-s1")):
        document = json.loads((swept / "results" / f"{name}.json").read_text())
        document["epochs"]["finetune"] += i
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    with pytest.raises(UsageError, match="mixes"):
        report.load(tmp_path)
    with pytest.raises(UsageError, match="no results"):
        report.load(tmp_path / "nothing")


def test_the_bundled_sweeps_are_read() -> None:
    folder = Path(__file__).parents[2] / "benchmarks"
    main, ablation = (sweep.load(folder / f"{n}.toml") for n in ("senet", "senet-ablation"))
    assert len(main) == 30 and len(ablation) == 7
    shared = {job.name for job in main} & {job.name for job in ablation}
    assert shared == {"senet-7000-s1", "senet+-7000-s1"}
    digests = {job.name: job.recipe.digest("finetune") for job in main}
    assert all(j.recipe.digest("finetune") == digests[j.name] for j in ablation if j.name in shared)
    assert len({job.recipe.digest("finetune") for job in ablation}) == 7


def test_bad_sweeps(recipe_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "sweep.toml"
    good = f'recipe = "{recipe_path}"\nmethods = ["snl"]\nbudgets = [1]\nseeds = [1]\n'
    for old, new, message in [
        ('["snl"]', '["sln"]', "unknown method 'sln'"),
        ("budgets = [1]", "budgets = []", "budgets"),
        ("seeds = [1]", "seeds = [1, 1]", "repetitions"),
        ("budgets", "budget", "unknown key"),
    ]:
        path.write_text(good.replace(old, new))
        with pytest.raises(UsageError, match=message):
            sweep.load(path)


def test_sweeps_side_by_side_share_the_students_out(base: Run, swept: Path, tmp_path: Path) -> None:
    jobs = sweep.load(swept / "sweep.toml")
    run = dataclasses.replace(base, directory=tmp_path / "runs", cores=1)

    class Rival(Reporter):
        """Goes through the same sweep while the first student is being trained."""

        def __init__(self) -> None:
            self.found: list[str] = []

        def begin(self, stage: str, epochs: int, done: int) -> None:
            if not self.found:
                self.found = ["-"]
                silent = dataclasses.replace(run, reporter=Reporter())
                documents = sweep.run(jobs, silent, tmp_path / "results")
                self.found = [f"{d['method']}-{d['relu_budget']}-s{d['seed']}" for d in documents]

    rival = Rival()
    mine = list(sweep.run(jobs, dataclasses.replace(run, reporter=rival), tmp_path / "results"))
    assert rival.found == [job.name for job in jobs[1:]], "all but the one in training"
    assert [d["method"] for d in mine] == [jobs[0].method]
    assert mine[0]["environment"]["threads"] == 1
    assert all(sweep.stored(job, tmp_path / "results") for job in jobs)


def test_a_sweep_with_given_layer_budgets(recipe_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "given.toml"
    text = f'recipe = "{recipe_path}"\nmethods = ["senet-given", "senet"]\nseeds = [1]\n'
    rows = "relus = [[0, 0, 0, 0, 0, 0, 0, 100, 200], [0, 0, 0, 0, 0, 0, 0, 0, 50]]\n"
    path.write_text(text + "budgets = [300, 50]\n" + rows)
    jobs = sweep.load(path)
    assert [
        (job.name, job.recipe.allocate.rule, sum(job.recipe.allocate.relus)) for job in jobs
    ] == [
        ("senet-given-300-s1", "given", 300),
        ("senet-300-s1", "senet", 0),
        ("senet-given-50-s1", "given", 50),
        ("senet-50-s1", "senet", 0),
    ]
    path.write_text(text + "budgets = [300, 51]\n" + rows)
    with pytest.raises(UsageError, match="add up to \\[300, 50\\], not"):
        sweep.load(path)
