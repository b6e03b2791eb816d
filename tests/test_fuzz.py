"""A short run of ``fuzz.py`` in a process of its own, and whether it can fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FUZZ = Path(__file__).with_name("fuzz.py")
MEMORY = 64 << 20


def run(*arguments: str) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(FUZZ), *arguments], stdout=subprocess.PIPE, text=True
    )
    report: dict[str, Any] = json.loads(done.stdout)
    return done.returncode, report


def test_mutated_frames_end_in_an_answer_or_a_clear_error(
    pytestconfig: pytest.Config,
) -> None:
    frames = pytestconfig.getoption("--fuzz-frames")
    code, report = run("--frames", str(frames), "--seed", "1")
    assert report["failures"] == []
    assert code == 0 and report["frames"] >= frames
    assert report["memory_growth"] < MEMORY
    # Every target was reached, and some messages of each were found out.
    assert len(report["outcomes"]) >= 20
    for name, outcomes in report["outcomes"].items():
        assert sum(outcomes.values()) - outcomes.get("accepted", 0) > 0, name


@pytest.mark.parametrize("sabotage", ["crash", "hang", "memory", "garbled"])
def test_the_fuzzer_finds_what_it_looks_for(sabotage: str) -> None:
    code, report = run(
        "--frames", "300", "--sabotage", sabotage, "--live", "0", "--patience", "0.5"
    )
    assert code == 1
    assert any(failure["target"] == "sabotage" for failure in report["failures"])
