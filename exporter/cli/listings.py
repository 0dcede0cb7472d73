"""What there is: models, targets, schemes, metrics, and this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from exporter.cli.console import print_json, print_table

if TYPE_CHECKING:
    from exporter.catalog.schema import ModelProfile, TargetProfile

TARGETS = ("name", "for a model", "bandwidth", "SM", "10^12 dense op/s", "TensorRT", "machine")
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
    """The model profiles: what each does, what --int4 stores it as, in which dialects it is exported.

    docs/models.md names the test of every claim.
    """
    from exporter.catalog.profiles import model_profiles
    from exporter.families.table import TASK_FAMILIES
    from exporter.pipeline.resolve import scheme_named

    tasks = {name: family.TASK for name, family in TASK_FAMILIES.items()}
    rows: list[tuple[object, ...]] = [
        (
            p.name,
            ", ".join(p.aliases),
            tasks.get(p.family, "caption"),
            p.family,
            scheme_named(p, "int4"),
            "ort" if p.family in tasks else "ort, standard",
            p.facts.parameters or "unknown",
            _weights_of(p),
            p.facts.confidence or "-",
            "yes" if p.status == "ready" else "plan only: no family code yet",
        )
        for p in model_profiles().values()
    ]
    head = ("name", "alias", "task", "family", "int4", "dialects", "parameters", "weights", "facts")
    _show((*head, "builds"), rows, as_json)


def _weights_of(profile: ModelProfile) -> str:
    if profile.builtin:
        return "shipped with medexport"
    return profile.hub.id if profile.hub else "no repository: --weights DIR"


@click.command()
@JSON
def targets(as_json: bool) -> None:
    """The machines a bundle can be made for; --json has the source of each fact."""
    import msgspec

    from exporter.catalog.profiles import target_profiles
    from exporter.pipeline.targets import machine_targets, unknown_gpu

    if as_json:
        print_json([msgspec.to_builtins(t) for t in target_profiles().values()])
        return
    print_table(TARGETS, [_target_row(t) for t in target_profiles().values()])
    click.echo(f"this machine: {', '.join(t.name for t in reversed(machine_targets()))}")
    if left_out := unknown_gpu():
        click.echo(left_out)


def _target_row(target: TargetProfile) -> tuple[str, ...]:
    memory, bandwidth = target.memory, target.bandwidth_gbs
    usable = f"{memory.usable_bytes / 1e9:.1f} GB" if memory else "-"
    versions = target.tensorrt.summary() if target.tensorrt else "-"
    return (
        target.name,
        usable,
        f"{bandwidth.value:g} GB/s" if bandwidth else "-",
        target.compute_capability.value if target.compute_capability else "-",
        " ".join(f"{name} {rate.value:g}" for name, rate in target.rates.items()),
        versions,
        target.title,
    )


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
    """What the comparison and `medexport score` measure, what each needs and costs."""
    from exporter.compare.captions.run import MetricPaths
    from exporter.compare.captions.table import COST
    from exporter.compare.metrics import all_metrics

    rows: list[tuple[object, ...]] = [
        (m.name, m.unit, m.better, f"{m.seconds:g}" if m.seconds else "-", m.what, m.needs or "-")
        for m in all_metrics()
    ]
    _show(("name", "unit", "better", "cost", "what", "needs"), rows, as_json)
    if not as_json:
        click.echo(f"cost: {COST}")
        click.echo(f"weights are looked for in {MetricPaths().folder}, or --metric-path NAME=PATH")


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
