"""The verdicts on a task for continuous integration: JUnit XML, one suite per candidate."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from exporter.compare.tasks.records import TaskGateReport
from exporter.compare.verdict import Quantity
from exporter.compare.wording import bound_text


def task_junit(reports: Sequence[TaskGateReport]) -> bytes:
    """One test case per quantity: a failure for FAIL, an error for INCONCLUSIVE, else skipped or passed.

    What could not be measured is skipped, and so is what a smoke test leaves undecided.
    """
    root = Element("testsuites", name="medexport compare")
    for report in reports:
        title = f"medexport gate: {report.candidate} against {report.reference} ({report.label})"
        suite = SubElement(root, "testsuite", name=_clean(title))
        for quantity in report.quantities:
            _add(suite, quantity, smoke=report.smoke)
        for name, why in report.not_measured.items():
            case = SubElement(suite, "testcase", classname="medexport.gate", name=name)
            SubElement(case, "skipped", message=_clean(f"not measured: {why}"), type="skipped")
        _count(suite)
    _count(root)
    indent(root)
    data: bytes = tostring(root, encoding="utf-8", xml_declaration=True)
    return data + b"\n"


def _add(suite: Element, quantity: Quantity, *, smoke: bool) -> None:
    case = SubElement(suite, "testcase", classname="medexport.gate", name=quantity.name)
    text = f"{quantity.said}; {bound_text(quantity)}"
    if quantity.verdict == "FAIL":
        SubElement(case, "failure", message=_clean(text), type="failure")
    elif quantity.verdict == "INCONCLUSIVE":
        kind = "skipped" if smoke else "error"
        more = f"{quantity.needed} cases would decide" if quantity.needed else "undecided"
        SubElement(case, kind, message=_clean(f"INCONCLUSIVE: {text}; {more}"), type=kind)
    SubElement(case, "system-out").text = _clean(text)


def _count(element: Element) -> None:
    outcomes = {"tests": "testcase", "failures": "failure", "errors": "error", "skipped": "skipped"}
    for attribute, tag in outcomes.items():
        element.set(attribute, str(len(element.findall(f".//{tag}"))))


def _clean(text: str) -> str:
    """XML 1.0 has no control characters; texts may."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)
