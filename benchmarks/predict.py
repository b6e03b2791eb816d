"""Everything that ``pi-bench predict`` is judged by, measured anew: what it is fitted to, what it
is checked against, and the errors. For an idle machine, about 10 minutes. Each row is written when
it is measured; rows that are there are not measured again, so that a run that was stopped goes on
when it is called again without --anew.

python benchmarks/predict.py
python benchmarks/tables.py predict benchmarks/results/predict.json
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
BENCH = [sys.executable, "-m", "pi_system.cli.bench"]
BUSY = 0.5
"""Load per processor above which the machine is not idle."""


def main() -> None:
    """Measure what the folder lacks, fit and check."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder")
    parser.add_argument("--anew", action="store_true", help="forget earlier measurements")
    parser.add_argument("--busy", action="store_true", help="measure on a busy machine")
    given = parser.parse_args()
    fit, check = (given.results / f"predict-{name}.json" for name in ("fit", "check"))
    if given.anew:
        for path in (fit, check):
            path.unlink(missing_ok=True)
    load = os.getloadavg()[0]
    if load > BUSY * len(os.sched_getaffinity(0)) and not given.busy:
        raise SystemExit(f"the machine is busy (load {load:.1f}); wait, or give --busy")
    for path in (fit, check):
        scenario = HERE / "scenarios" / f"{path.stem}.toml"
        subprocess.run(
            [*BENCH, "sweep", str(scenario), "--output", str(path)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
    output = given.results / "predict.json"
    asked = ["--fit", str(fit), "--check", str(check), "--format", "json", "--output", str(output)]
    subprocess.run([*BENCH, "predict", *asked], check=True)


if __name__ == "__main__":
    main()
