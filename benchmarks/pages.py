"""Put the tables of ``tables.py`` into the pages that show them, where they say so:

    <!-- table: compare benchmarks/results/compare-demo.json -->
    (what was there is replaced)
    <!-- end of table -->

python benchmarks/pages.py
python benchmarks/pages.py --check
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import tables

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")
_TABLE = re.compile(r"(<!-- table: (.*?) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def rendered(text: str) -> str:
    """A page with its tables as the result files have them."""
    return _TABLE.sub(_table, text)


def _table(found: re.Match[str]) -> str:
    begin, command, end = found.groups()
    name, *patterns = command.split()
    files = [str(path) for pattern in patterns for path in sorted(ROOT.glob(pattern))]
    if not files:
        raise SystemExit(f"no result file for the table: {command}")
    return f"{begin}\n{tables.main([name, *files])}\n\n{end}"


def main() -> None:
    """Rewrite the pages, or say which differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing; fail if one would")
    check = parser.parse_args().check
    old = {page: page.read_text() for page in PAGES}
    new = {page: rendered(text) for page, text in old.items()}
    differ = [page.relative_to(ROOT).as_posix() for page in PAGES if old[page] != new[page]]
    if check and differ:
        raise SystemExit(f"not as the result files are: {', '.join(differ)}; run {parser.prog}")
    if not check:
        for page, text in new.items():
            page.write_text(text)


if __name__ == "__main__":
    main()
