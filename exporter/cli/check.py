"""Regression checks: a new bundle against a released one."""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exporter.cli.console import Console, print_json
from exporter.cli.score import score

if TYPE_CHECKING:
    from exporter.bundle.manifest import Manifest
    from exporter.catalog.schema import Gate
    from exporter.compare.check import Question
    from exporter.compare.verdict import GateReport

PATH = click.Path(path_type=Path)
OWN_REPORT = Path("reports") / "compare.json"
SMOKE_CASES = 20


@click.command()
@click.argument("bundle", type=PATH)
@click.option(
    "--baseline",
    type=PATH,
    metavar="BUNDLE|REPORT",
    help="A released bundle, or a compare.json. Default: BUNDLE's own, from when it was packaged.",
)
@click.option("--row", metavar="NAME", help="The model of a REPORT. Default: its first candidate.")
@click.option(
    "--eval",
    "evaluation",
    metavar="SET",
    help="Default: the shipped set of what the model does (phantoms-eval, reports-eval).",
)
@click.option("--limit", type=click.IntRange(min=0), default=0, help="N cases; 0: all.")
@click.option("--smoke", is_flag=True, help=f"{SMOKE_CASES} cases; only a failure is an error.")
@click.option("--junit", type=PATH, metavar="FILE", help="Write JUnit XML.")
@click.option("--work", type=PATH, metavar="DIR", help="Keep finished processes here, and go on.")
@click.option("--threads", type=click.IntRange(min=1), help="Default: the usable cores.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def check(bundle: Path, as_json: bool, junit: Path | None, **options: Any) -> None:
    """Hold BUNDLE to a baseline: does it still say what was released?

    The margins are those of the model's profile. Exit code 0: passed, 1: failed, 4: inconclusive.
    """
    from exporter.pipeline.task_checks import task_of

    if (bundle / "model").is_dir() and task_of(bundle / "model"):
        _check_task(bundle, _Asked(**options), junit, as_json)
        return
    _check_captions(bundle, _Asked(**options), junit, as_json)


def _check_captions(bundle: Path, asked: _Asked, junit: Path | None, as_json: bool) -> None:
    from exporter.compare.gate import enforce
    from exporter.compare.junit import gate_json, junit_xml
    from exporter.compare.table import gate_table
    from exporter.core.artifact import write_atomic

    report = _run(bundle, asked)
    if junit:
        write_atomic(junit, junit_xml(report))
    if as_json:
        print_json(gate_json(report))
    else:
        click.echo(gate_table(report))
    enforce(report, smoke=asked.smoke)


def _check_task(bundle: Path, asked: _Asked, junit: Path | None, as_json: bool) -> None:
    """The same for a model that does something else than caption: both bundles are run."""
    from exporter.bundle.verify import verify_bundle
    from exporter.compare.junit import gate_json, junit_xml
    from exporter.core.artifact import write_atomic
    from exporter.core.errors import WrongUsage
    from exporter.pipeline.task_checks import TaskQuestion, compare_task_models

    if asked.baseline is None or not (asked.baseline / "model").is_dir() or asked.row:
        raise WrongUsage(
            "a model that does not caption is held to a bundle: give --baseline BUNDLE"
        )
    console = Console()
    console.begin("check", bundle.name)
    start = time.perf_counter()
    manifest = verify_bundle(bundle, None).manifest
    verify_bundle(asked.baseline, None)
    limit = asked.limit or (SMOKE_CASES if asked.smoke else 0)
    question = TaskQuestion(asked.evaluation, limit, threads=asked.threads)
    models = {"baseline": asked.baseline / "model", "new": bundle / "model"}
    with ExitStack() as stack:
        work = asked.work or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="medexport-check-"))
        )
        work.mkdir(parents=True, exist_ok=True)
        found = compare_task_models(models, manifest, work, question, progress=console.advance)
    report = found.gate("new")
    console.end(time.perf_counter() - start, cached=False, note=report.label)
    if junit:
        write_atomic(junit, junit_xml(report))
    if as_json:
        print_json(gate_json(report))
    else:
        click.echo(found.to_text())
    found.enforce("new", smoke=asked.smoke)


@dataclass(frozen=True)
class _Asked:
    """The options of `medexport check`."""

    baseline: Path | None
    row: str | None
    evaluation: str | None
    limit: int
    smoke: bool
    work: Path | None
    threads: int | None


def _run(bundle: Path, asked: _Asked) -> GateReport:
    from exporter.bundle.verify import verify_bundle
    from exporter.compare.check import check_bundles

    console = Console()
    console.begin("check", bundle.name)
    start = time.perf_counter()
    manifest = verify_bundle(bundle, None).manifest
    against = _baseline(bundle, asked.baseline)
    question = _question(manifest, against, asked)
    with ExitStack() as stack:
        work = asked.work or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="medexport-check-"))
        )
        report = check_bundles(
            bundle / "model", against, question, work,
            gate=_margins(manifest), smoke=asked.smoke, row=asked.row, progress=console.advance,
        )  # fmt: skip
    console.end(time.perf_counter() - start, cached=False, note=report.label)
    return report


def _baseline(bundle: Path, baseline: Path | None) -> Path:
    """The exported model folder of a bundle (verified), or a compare.json."""
    from exporter.bundle.verify import verify_bundle
    from exporter.core.errors import WrongUsage

    if baseline is None:
        found = bundle / OWN_REPORT
        if not found.is_file():
            raise WrongUsage(f"{bundle} was packaged without a comparison; give --baseline BUNDLE")
        return found
    if not baseline.is_dir():
        return baseline
    if (baseline / "compare.json").is_file():
        return baseline / "compare.json"
    verify_bundle(baseline, None)
    return baseline / "model"


def _question(manifest: Manifest, against: Path, asked: _Asked) -> Question:
    """The cases and the prompt: a report's own prompt, else the new bundle's."""
    from exporter.compare.check import Question
    from exporter.compare.compare import read_comparison
    from exporter.pipeline.evaluation import IMAGES, open_evaluation
    from exporter.runtimes.threads import usable_cores

    prompt, length = manifest.usage.prompt, manifest.usage.max_new_tokens
    if against.is_file():
        earlier = read_comparison(against)
        prompt, length = earlier.prompt, earlier.max_new_tokens
    limit = asked.limit or (SMOKE_CASES if asked.smoke else 0)
    chosen = open_evaluation(
        asked.evaluation or IMAGES, limit=limit, prompt=prompt, max_new_tokens=length
    )
    return Question(chosen.cases, prompt, length, asked.threads or usable_cores())


def _margins(manifest: Manifest) -> Gate:
    """The margins of the profile that the bundle was made from; the usual ones without a profile."""
    from exporter.catalog.profiles import model_profiles
    from exporter.catalog.schema import Gate

    profile = model_profiles().get(manifest.lineage.base.name)
    return profile.gate if profile else Gate()


COMMANDS = (check, score)
