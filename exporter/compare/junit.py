"""The verdict for machines: JUnit XML for continuous integration, JSON with a schema number."""

from __future__ import annotations

from typing import Any
from xml.etree.ElementTree import Element, SubElement, indent, tostring

import msgspec

from exporter.compare.verdict import Judged, Quantity
from exporter.compare.wording import bound_text

OUTCOMES = {"tests": "testcase", "failures": "failure", "errors": "error", "skipped": "skipped"}


def junit_xml(*reports: Judged) -> bytes:
    """A suite for each verdict, a test case for each of its quantities.

    A failure for FAIL, an error for INCONCLUSIVE, skipped if not measured. A smoke test's
    inconclusive quantities are skipped: it was not expected to decide them.
    """
    root = Element("testsuites", name="medexport gate")
    for report in reports:
        name = f"medexport gate: {report.candidate} against {report.reference} ({report.label})"
        suite = SubElement(root, "testsuite", name=_clean(name))
        for quantity in report.quantities:
            _add(suite, quantity, report)
        for missing, why in report.not_measured.items():
            _outcome(_case(suite, missing), "skipped", f"not measured: {why}")
        _count(suite)
    _count(root)
    indent(root)
    data: bytes = tostring(root, encoding="utf-8", xml_declaration=True)
    return data + b"\n"


def _add(suite: Element, quantity: Quantity, report: Judged) -> None:
    case, text = _case(suite, quantity.name), f"{quantity.said}; {bound_text(quantity)}"
    if quantity.verdict == "FAIL":
        _outcome(case, "failure", text)
    elif quantity.verdict == "INCONCLUSIVE":
        unit = report.counted()[1]
        more = f"{quantity.needed} {unit} would decide" if quantity.needed else "undecided"
        kind = "skipped" if report.smoke else "error"
        _outcome(case, kind, f"INCONCLUSIVE: {text}; {more}")
    SubElement(case, "system-out").text = _clean(text)


def _case(suite: Element, name: str) -> Element:
    return SubElement(suite, "testcase", classname="medexport.gate", name=name)


def _outcome(case: Element, kind: str, text: str) -> None:
    SubElement(case, kind, message=_clean(text), type=kind)


def _count(element: Element) -> None:
    for attribute, tag in OUTCOMES.items():
        element.set(attribute, str(len(element.findall(f".//{tag}"))))


def _clean(text: str) -> str:
    """XML 1.0 has no control characters; captions may."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def gate_json(report: Judged) -> dict[str, Any]:
    """The report as plain values; `schema` is its version."""
    found: dict[str, Any] = msgspec.to_builtins(report)
    return found | {"label": report.label, "reason": report.reason}
