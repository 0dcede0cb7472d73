"""The verdict for machines: JUnit XML for continuous integration, JSON with a schema number."""

from __future__ import annotations

from typing import Any
from xml.etree.ElementTree import Element, SubElement, indent, tostring

import msgspec

from exporter.compare.verdict import GateReport, Quantity
from exporter.compare.wording import bound_text


def junit_xml(report: GateReport) -> bytes:
    """One test case per quantity: a failure for FAIL, an error for INCONCLUSIVE, skipped if not measured.

    A smoke test's inconclusive quantities are skipped: it was not expected to decide them.
    """
    name = f"medexport gate: {report.candidate} against {report.reference}"
    counts = {"failures": 0, "errors": 0, "skipped": 0}
    suite = Element("testsuite", name=_clean(f"{name} ({report.label})"))
    for quantity in report.quantities:
        case = _case(suite, quantity.name)
        text = f"{quantity.said}; {bound_text(quantity)}"
        if quantity.verdict == "FAIL":
            _outcome(case, "failure", text, counts)
        elif quantity.verdict == "INCONCLUSIVE":
            _outcome(case, "skipped" if report.smoke else "error", _undecided(quantity), counts)
        SubElement(case, "system-out").text = _clean(text)
    for quantity_name, why in report.not_measured.items():
        _outcome(_case(suite, quantity_name), "skipped", f"not measured: {why}", counts)
    total = len(report.quantities) + len(report.not_measured)
    for key, count in {"tests": total, **counts}.items():
        suite.set(key, str(count))
    root = Element("testsuites", suite.attrib | {"name": "medexport check"})
    root.append(suite)
    indent(root)
    data: bytes = tostring(root, encoding="utf-8", xml_declaration=True)
    return data + b"\n"


_OUTCOMES = {"failure": "failures", "error": "errors", "skipped": "skipped"}


def _case(suite: Element, name: str) -> Element:
    return SubElement(suite, "testcase", classname="medexport.gate", name=name)


def _outcome(case: Element, kind: str, text: str, counts: dict[str, int]) -> None:
    SubElement(case, kind, message=_clean(text), type=kind)
    counts[_OUTCOMES[kind]] += 1


def _undecided(quantity: Quantity) -> str:
    more = f"{quantity.needed} images would decide" if quantity.needed else "undecided"
    return f"INCONCLUSIVE: {quantity.said}; {bound_text(quantity)}; {more}"


def _clean(text: str) -> str:
    """XML 1.0 has no control characters; captions may."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def gate_json(report: GateReport) -> dict[str, Any]:
    """The report as plain values; `schema` is its version."""
    found: dict[str, Any] = msgspec.to_builtins(report)
    return found | {"label": report.label, "reason": report.reason}
