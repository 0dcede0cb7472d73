"""Captions scored alone: predictions, or what a comparison kept."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exporter.cli.console import print_json, print_table

if TYPE_CHECKING:
    from exporter.compare.caption_figures import MetricsAsked
    from exporter.compare.labelled import LabelScores
    from exporter.compare.score import ComparisonScores, PredictionScores

PATH = click.Path(path_type=Path)
CASES = "cases.jsonl"


@click.command()
@click.argument("predictions", type=PATH)
@click.option(
    "--eval", "evaluation", metavar="SET", help="Where ground truth and images are, by id."
)
@click.option(
    "--metrics", metavar="NAME,...", help="Of `medexport metrics`; all. Default: those built in."
)
@click.option("--profile", "profiles", multiple=True, metavar="NAME", help="An average of metrics.")
@click.option(
    "--metric-path", "paths", multiple=True, metavar="NAME=PATH", help="A metric's weights or data."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def score(predictions: Path, evaluation: str | None, as_json: bool, **options: Any) -> None:
    """Score PREDICTIONS (JSON lines with id, caption and, without --eval, truth) alone.

    PREDICTIONS may be the folder of a comparison (or its cases.jsonl): then every model in it is scored,
    with paired differences from its reference. Lines with labels instead of captions (probabilities and
    labels, ranked and relevant, tags and true_tags) get calibration, AUROC, recall at k or entity F1.
    """
    import msgspec

    from exporter.compare.labelled import is_labelled, read_labelled, score_labelled
    from exporter.compare.score import (
        read_cases,
        read_predictions,
        score_comparison,
        score_predictions,
    )
    from exporter.pipeline.evaluation import open_evaluation

    if predictions.is_file() and is_labelled(predictions):
        _show_labelled(score_labelled(read_labelled(predictions)), as_json=as_json)
        return
    asked = _asked(**options)
    cases = open_evaluation(evaluation).cases if evaluation else ()
    kept = predictions / CASES if predictions.is_dir() else predictions
    if kept.name == CASES:
        compared = score_comparison(read_cases(kept), cases, asked)
        if as_json:
            print_json(msgspec.to_builtins(compared))
        else:
            _show_comparison(compared)
        return
    scores = score_predictions(read_predictions(predictions), cases, asked)
    if as_json:
        print_json(msgspec.to_builtins(scores))
    else:
        _show(scores)


def _asked(metrics: str | None, profiles: tuple[str, ...], paths: tuple[str, ...]) -> MetricsAsked:
    from exporter.compare.caption_figures import MetricsAsked
    from exporter.compare.captions.run import MetricPaths
    from exporter.compare.captions.table import BY_NAME, FromPath
    from exporter.core.errors import WrongUsage

    given: dict[str, Path] = {}
    for text in paths:
        name, found, path = text.partition("=")
        if not found or not path or not isinstance(BY_NAME.get(name), FromPath):
            known = ", ".join(n for n, row in BY_NAME.items() if isinstance(row, FromPath))
            raise WrongUsage(f"--metric-path {text}: expected NAME=PATH with NAME of {known}")
        given[name] = Path(path)
    names = tuple(n.strip() for n in (metrics or "").split(",") if n.strip())
    return MetricsAsked(names, profiles, MetricPaths(given))


def _show(scores: PredictionScores) -> None:
    from exporter.compare.wording import DASH, interval, percent

    click.echo(f"{scores.images} predictions, {scores.patients} patients, {scores.missing} missing")
    width = max([17, *(len(n) + 2 for n in (*scores.metrics, *scores.not_computed))])
    for name, figure in scores.metrics.items():
        click.echo(f"{name:<{width}}{interval(figure)}")
    for name, why in scores.not_computed.items():
        click.echo(f"{name:<{width}}not computed: {why}")
    truth = scores.truth
    recall = interval(truth.recall, share=True) if truth else DASH
    click.echo(f"{'facts right':<{width}}{recall}")
    click.echo(f"{'facts precision':<{width}}{percent(truth.precision) if truth else DASH}")
    for kind, (right, total) in (truth.by_kind if truth else {}).items():
        click.echo(f"  {kind:<{width - 2}}{right}/{total}")


def _show_labelled(scores: LabelScores, *, as_json: bool) -> None:
    import msgspec

    from exporter.compare.wording import interval, number

    if as_json:
        print_json(msgspec.to_builtins(scores))
        return
    click.echo(f"{scores.cases} cases, {scores.patients} patients")
    width = max(len(n) + 2 for n in (*scores.figures, *scores.not_computed))
    for name, figure in scores.figures.items():
        known = figure.low is not None
        click.echo(f"{name:<{width}}{interval(figure) if known else number(figure.value, 3)}")
    for name, why in scores.not_computed.items():
        click.echo(f"{name:<{width}}not computed: {why}")


def _show_comparison(scores: ComparisonScores) -> None:
    from exporter.compare.wording import interval

    click.echo(f"{scores.images} images, {scores.patients} patients; 95 % intervals over patients")
    rows: list[tuple[object, ...]] = []
    for model in scores.models:
        for name, figure in model.metrics.items():
            less = model.differences.get(name)
            rows.append(
                (
                    model.name,
                    name,
                    interval(figure, cases=False),
                    interval(less, signed=True, cases=False) if less else "reference",
                )
            )
    print_table(("model", "figure", "value", "less the reference"), rows)
    for name, why in (scores.models[0].not_computed if scores.models else {}).items():
        click.echo(f"{name}: not computed: {why}")


COMMANDS = (score,)
