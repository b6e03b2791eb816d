"""Reports in the JUnit XML form that pipelines read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree


@dataclass(frozen=True)
class Case:
    """One check: failed if there is a ``failure``, left out if there is a reason to skip it."""

    group: str
    name: str
    failure: str | None = None
    skipped: str | None = None


def to_xml(suite: str, cases: Sequence[Case]) -> bytes:
    """One suite as an XML document in UTF-8."""
    counts = {
        "tests": len(cases),
        "failures": sum(case.failure is not None for case in cases),
        "errors": 0,
        "skipped": sum(case.skipped is not None for case in cases),
        "time": 0,
    }
    numbers = {name: str(count) for name, count in counts.items()}
    root = ElementTree.Element("testsuites", numbers)
    inner = ElementTree.SubElement(root, "testsuite", {"name": suite, **numbers})
    for case in cases:
        one = ElementTree.SubElement(
            inner, "testcase", {"classname": case.group, "name": case.name, "time": "0"}
        )
        if case.failure is not None:
            failure = ElementTree.SubElement(one, "failure", {"message": case.failure})
            failure.text = case.failure
        elif case.skipped is not None:
            ElementTree.SubElement(one, "skipped", {"message": case.skipped})
    ElementTree.indent(root)
    document: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return document + b"\n"
