"""The arrows of the house, checked on the source: who may import whom."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Each part may import itself, the parts named here and third-party packages.
BASE = {"errors", "config", "files"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "config": {"errors"},
    "files": {"errors"},
    "nn": {"errors"},
    "checkpoint": BASE | {"nn"},
    "graph": BASE | {"nn"},
    "net": {"errors"},
    "models": BASE | {"nn", "checkpoint", "graph", "demo"},
    "backends": BASE | {"graph", "net"},
    "backends.crypten": BASE | {"graph", "net", "backends.base"},
    "backends.fss": BASE | {"graph", "net", "backends.base"},
    "parties": BASE | {"graph", "net", "backends", "models"},
    "bench": BASE | {"graph", "net", "backends", "parties", "models"},
    "cli": BASE | {"nn", "checkpoint", "graph", "net", "backends", "parties", "bench", "models"},
    # Budgets that meet a latency need this backend's cost and the network it is for.
    "training": BASE | {"nn", "checkpoint", "training", "bench.cost", "net.link"},
    "__init__": set(),
}


def _modules() -> list[tuple[str, Path]]:
    found = []
    for top in ("pi_system", "training"):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found.append((".".join(parts), path))
    return found


def _part(module: str) -> str:
    """``pi_system.backends.crypten.party`` -> ``backends.crypten``; ``training.x`` -> training."""
    names = module.split(".")
    if names[0] == "training":
        return "training"
    if len(names) < 2:
        return "__init__"
    if names[1] == "backends" and len(names) > 3:
        return ".".join(names[1:3])
    return names[1]


def _imports(module: str, path: Path) -> set[str]:
    package = module.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, node.module] if node.module else base)
            # "from .. import nn" names a package, "from ..nn import build" a thing in one.
            found |= {f"{name}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("pi_system", "training")}


def _allowed(part: str, target: str) -> bool:
    allowed = ALLOWED[part] | {part}
    names = target.split(".")
    if names[0] == "training":
        return part == "training"
    inner = names[1:]
    if inner[:1] == ["__version__"]:
        return True
    return any(inner[: len(a.split("."))] == a.split(".") for a in allowed)


@pytest.mark.parametrize("module,path", _modules(), ids=lambda v: v if isinstance(v, str) else "")
def test_arrows_run_one_way(module: str, path: Path) -> None:
    part = _part(module)
    assert part in ALLOWED, f"{module}: a part of the house nobody drew; add it to ALLOWED"
    wrong = sorted(t for t in _imports(module, path) if not _allowed(part, t))
    assert not wrong, f"{module} ({part}) may not import {wrong}"


def test_the_check_can_fail() -> None:
    assert not _allowed("net", "pi_system.graph.ir.Graph")
    assert not _allowed("backends.fss", "pi_system.backends.crypten.party")
    assert not _allowed("bench", "training.data")
    assert _allowed("parties", "pi_system.backends.base.get")
