"""From quantities to a verdict: what decides stands first, and how many cases are needed."""

from __future__ import annotations

from exporter.catalog.schema import TaskGate
from exporter.compare.tasks.judge import judge_task
from exporter.compare.tasks.measure import Measured
from exporter.compare.tasks.records import TaskGateReport
from exporter.compare.verdict import Quantity, Verdict
from exporter.compare.wording import verdict_lines


def quantity(name: str, verdict: Verdict, needed: int | None = None) -> Quantity:
    return Quantity(
        name, verdict, 0.1, 0.0, 0.2, None, 0.15, False, 200, 100, "by hand", "seen", needed
    )


def judged(*quantities: Quantity | str, count: int = 200, smoke: bool = False) -> TaskGateReport:
    named = {q.name if isinstance(q, Quantity) else q: q for q in quantities}
    patients = [str(i // 2) for i in range(count)]
    return judge_task(
        "int8", "fp16", Measured({}, {}, named, []), patients, TaskGate(),
        unit="texts", smoke=smoke,
    )  # fmt: skip


def test_all_must_pass() -> None:
    report = judged(quantity("a", "PASS"), quantity("b", "PASS"), "why not")
    assert (report.label, report.count, report.patients) == ("PASS", 200, 100)
    assert report.not_measured == {"why not": "why not"} and report.needed is None


def test_one_failure_is_the_reason() -> None:
    report = judged(
        quantity("a", "PASS"), quantity("b", "INCONCLUSIVE", 300), quantity("c", "FAIL")
    )
    assert report.verdict == "FAIL" and report.reason.startswith("c: seen; 0.1 [0, 0.2]")
    assert len(report.reasons) == 1 and report.needed is None


def test_what_needs_most_stands_first_when_undecided() -> None:
    report = judged(quantity("a", "INCONCLUSIVE", 300), quantity("b", "INCONCLUSIVE", 500))
    assert [r[0] for r in report.reasons] == ["b", "a"] and report.needed == 500
    assert verdict_lines(report)[-1] == (
        "  200 texts of 100 patients; 500 texts would decide it, if it goes on as seen"
    )


def test_no_number_is_named_when_one_is_unknown() -> None:
    report = judged(quantity("a", "INCONCLUSIVE", 300), quantity("b", "INCONCLUSIVE"))
    assert report.reasons[0].startswith("b") and report.needed is None
    assert "no number of texts can be named" in verdict_lines(report)[-1]


def test_few_cases_and_quick_looks_are_smoke_tests() -> None:
    assert judged(quantity("a", "PASS"), count=148).label == "PASS (smoke test)"
    assert judged(quantity("a", "PASS"), count=149).label == "PASS"
    assert judged(quantity("a", "PASS"), smoke=True).label == "PASS (smoke test)"
