"""Results of many measurements in one file, one row each, which a crash leaves whole.

The name's ending says the format: ``.json`` keeps every result whole, in a list; ``.csv`` and
``.parquet`` are tidy tables of its scalars (``online.latency_ms.median``, ...), with the raw
values of each latency as JSON in one cell and without layers and predictions. A row is known
by what was measured, not by when, where or by which commit.
"""

from __future__ import annotations

import importlib.util
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ..errors import IntegrityError, UsageError
from ..files import write_atomic
from .schema import SCHEMA_VERSION, flatten

if TYPE_CHECKING:
    import pandas as pd

FORMATS: Final = (".csv", ".json", ".parquet")
_SHA256: Final = re.compile("[0-9a-f]{64}")


class Key(NamedTuple):
    """What a row measures. ``repeat`` is the number of inferences timed."""

    sha256: str
    backend: str
    network: str
    threads: int
    batch: int
    repeat: int
    plan: str = "default"


class Sheet:
    """The file at ``path``, which need not exist yet.

    Attributes:
        keys: of the rows it has.
    """

    def __init__(self, path: Path) -> None:
        """Read what is there.

        Raises:
            UsageError: a format that is unknown or cannot be had, or a file that cannot be read.
            IntegrityError: the file is damaged, or is something else.
        """
        check_format(path)
        self.path = path
        self._rows: list[dict[str, Any]] = []
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            data = None
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}") from error
        if data is not None:
            self._rows = self._read(data)
        self.keys: set[Key] = set()
        for number, row in enumerate(self._rows, start=1):
            try:
                key = _key(row)
            except (KeyError, TypeError, ValueError) as error:
                raise self._damaged(f"row {number} is no result") from error
            if key in self.keys:
                raise self._damaged(f"row {number} is there twice")
            self.keys.add(key)

    def __len__(self) -> int:
        return len(self._rows)

    def append(self, result: Mapping[str, Any]) -> None:
        """Add a result (:meth:`Result.to_json`) and replace the file.

        Raises:
            UsageError: the file cannot be written.
        """
        row = dict(result) if self.path.suffix == ".json" else tidy(result)
        key = _key(row)
        if key in self.keys:
            raise ValueError(f"{key} is there already")
        rows = [*self._rows, row]
        try:
            write_atomic(self.path, self._write(rows))
        except OSError as error:
            raise UsageError(f"cannot write {self.path}: {error.strerror}") from error
        self._rows = rows
        self.keys.add(key)

    def tidy_rows(self) -> list[dict[str, Any]]:
        """All rows as flat records."""
        return [tidy(row) for row in self._rows] if self.path.suffix == ".json" else self._rows

    def _read(self, data: bytes) -> list[dict[str, Any]]:
        try:
            rows = {".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}[
                self.path.suffix
            ](data)
        except (ValueError, OSError, KeyError, TypeError) as error:  # as pandas and pyarrow do
            raise self._damaged(" ".join(str(error).split())) from error
        if not rows:
            raise self._damaged("it has no rows")
        return rows

    def _write(self, rows: list[dict[str, Any]]) -> bytes:
        if self.path.suffix == ".json":
            return (json.dumps(rows, indent=1, allow_nan=False) + "\n").encode()
        import pandas as pd

        if self.path.suffix == ".csv":
            # As objects, or whole numbers beside an empty cell would turn into fractions.
            frame = pd.DataFrame(rows, dtype=object)
            text: str = frame.to_csv(index=False, lineterminator="\n")
            return text.encode()
        buffer = io.BytesIO()
        pd.DataFrame(rows).convert_dtypes().to_parquet(buffer, write_page_checksum=True)
        return buffer.getvalue()

    def _damaged(self, why: str) -> IntegrityError:
        return IntegrityError(
            f"{self.path} is no whole table of pi-bench sweep ({why}); repair it, or name another "
            "output"
        )


def check_format(path: Path) -> None:
    """Refuse a file name whose format cannot be written.

    Raises:
        UsageError: naming those that can, or what is missing.
    """
    if path.suffix not in FORMATS:
        raise UsageError(f"{path}: the name must end in {', '.join(FORMATS)}")
    if path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise UsageError(f"{path}: Parquet needs the package 'pyarrow', not installed; use .csv")


def tidy(result: Mapping[str, Any]) -> dict[str, Any]:
    """The scalars of a result as one flat record, and each latency's raw values as JSON."""
    record = flatten(dict(result))
    for phase in ("plaintext", "offline", "online"):
        record[f"{phase}.latency_ms.values"] = json.dumps(result[phase]["latency_ms"]["values"])
    return record


def plan_of(row: Mapping[str, Any]) -> str:
    """The plan of a tidy row; that of a backend without plans is the default one."""
    plan = row.get("fixed_point.plan")
    return plan if isinstance(plan, str) and plan else "default"


def _key(row: Mapping[str, Any]) -> Key:
    flat = tidy(row) if "model" in row else row
    if int(flat["schema_version"]) != SCHEMA_VERSION:
        raise ValueError("another schema version")
    key = Key(
        sha256=flat["model.sha256"],
        backend=flat["backend"],
        network=flat["network.name"],
        threads=int(flat["threads_per_party"]),
        batch=int(flat["batch_size"]),
        repeat=len(json.loads(flat["online.latency_ms.values"])),
        plan=plan_of(flat),
    )
    if not _SHA256.fullmatch(key.sha256) or not key.backend or not key.network:
        raise ValueError("no name")
    return key


def _read_json(data: bytes) -> list[dict[str, Any]]:
    rows = json.loads(data)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("it is no list of results")
    return rows


def _read_csv(data: bytes) -> list[dict[str, Any]]:
    import pandas as pd

    if not data.endswith(b"\n"):
        raise ValueError("its last line is cut off")
    # As text, so that writing it again changes nothing.
    frame = pd.read_csv(io.BytesIO(data), dtype=str, keep_default_na=False)
    if frame.isna().any(axis=None):
        raise ValueError("a line is too short")
    return _records(frame)


def _read_parquet(data: bytes) -> list[dict[str, Any]]:
    import pandas as pd

    return _records(pd.read_parquet(io.BytesIO(data), page_checksum_verification=True))


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]
