"""What there is: models, targets, schemes, metrics, and this machine."""

from __future__ import annotations

from typing import Any

import click

from exporter.cli.console import print_json, print_table

JSON = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")


def _show(header: tuple[str, ...], rows: list[tuple[object, ...]], as_json: bool) -> None:
    if as_json:
        keys = [h.replace(" ", "_") for h in header]
        print_json([dict(zip(keys, row, strict=True)) for row in rows])
    else:
        print_table(header, rows)


@click.command()
@JSON
def models(as_json: bool) -> None:
    """The model profiles."""
    from exporter.catalog.profiles import model_profiles

    rows: list[tuple[object, ...]] = [
        (
            p.name,
            ", ".join(p.aliases),
            p.family,
            p.facts.parameters or "unknown",
            p.hub.id if p.hub else "shipped with medexport",
            p.facts.confidence or "-",
        )
        for p in model_profiles().values()
    ]
    _show(("name", "alias", "family", "parameters", "weights", "facts"), rows, as_json)


@click.command()
@JSON
def targets(as_json: bool) -> None:
    """The machines a bundle can be made for."""
    from exporter.catalog.profiles import target_profiles

    rows: list[tuple[object, ...]] = [
        (t.name, t.provider, t.title) for t in target_profiles().values()
    ]
    _show(("name", "provider", "machine"), rows, as_json)


@click.command()
@JSON
def schemes(as_json: bool) -> None:
    """The quantization schemes."""
    from exporter.quantizers.schemes import SCHEMES

    rows: list[tuple[object, ...]] = [
        (s.name, s.method, "yes" if s.calibrated else "no", s.title) for s in SCHEMES.values()
    ]
    _show(("name", "method", "calibration", "what it does"), rows, as_json)


@click.command()
@JSON
def metrics(as_json: bool) -> None:
    """What the comparison measures."""
    from exporter.compare.metrics import METRICS

    rows: list[tuple[object, ...]] = [(m.name, m.unit, m.better, m.what) for m in METRICS]
    _show(("name", "unit", "better", "what"), rows, as_json)


@click.command()
@JSON
def doctor(as_json: bool) -> None:
    """Examine this machine: cores, memory, disk, providers, and what each extra would add."""
    from exporter.pipeline.doctor import examine

    findings = examine()
    if as_json:
        print_json(findings)
        return
    for name, value in findings["machine"].items():
        click.echo(f"{name:22} {value}")
    rows: list[tuple[Any, ...]] = [
        (
            e["extra"],
            "complete" if not e["missing"] else "lacks " + ", ".join(e["missing"]),
            e["adds"],
        )
        for e in findings["extras"]
    ]
    print_table(("extra", "state", "adds"), rows)


COMMANDS = (models, targets, schemes, metrics, doctor)
