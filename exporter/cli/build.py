"""`medexport build`, `plan` and `resolve`: the whole way, and what it would be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from exporter.cli.console import Console, print_json, print_table


def model_options(command: Any) -> Any:
    """Options that say which model: shared by build, plan and resolve."""
    for option in (
        click.option("--offline", is_flag=True, help="Never use the network."),
        click.option(
            "--adapter",
            "adapters",
            multiple=True,
            metavar="DIR",
            help="Peft adapter folder, or a built-in one by name; may be given more than once.",
        ),
        click.option(
            "--weights",
            type=click.Path(path_type=Path),
            metavar="DIR",
            help="Folder of the checkpoint; default: the profile's own.",
        ),
        click.option(
            "--model",
            required=True,
            metavar="NAME|DIR",
            help="Profile, profile file or model folder.",
        ),
    ):
        command = option(command)
    return command


def scheme_options(command: Any) -> Any:
    """Options that say how to quantize and for which target."""
    for option in (
        click.option(
            "--target",
            default="auto",
            show_default=True,
            metavar="NAME",
            help="See `medexport targets`.",
        ),
        click.option("--scheme", metavar="NAME", help="See `medexport schemes`."),
        click.option("--int8", is_flag=True, help="Same as --scheme int8."),
        click.option("--int4", is_flag=True, help="The profile's best 4-bit scheme."),
    ):
        command = option(command)
    return command


def chosen_scheme(int4: bool, int8: bool, scheme: str | None) -> str:
    """The one scheme asked for; raises UsageError on none or several."""
    asked = [s for s in ("int4" if int4 else "", "int8" if int8 else "", scheme or "") if s]
    if len(asked) != 1:
        raise click.UsageError("give exactly one of --int4, --int8 and --scheme NAME")
    return asked[0]


@click.command()
@model_options
@scheme_options
@click.option(
    "--format", "form", default="onnx", type=click.Choice(["onnx", "tensorrt"]), show_default=True
)
@click.option(
    "--also",
    multiple=True,
    metavar="NAME",
    help="A further scheme to build and compare, not packaged.",
)
@click.option(
    "--eval",
    "evaluation",
    metavar="SET",
    help="Evaluation set: a shipped name or a folder; default: the profile's.",
)
@click.option(
    "--calibration",
    metavar="SET",
    help="Calibration set of schemes that need one; default: the profile's.",
)
@click.option("--calibration-samples", type=click.IntRange(min=0), default=128, show_default=True)
@click.option("--prompt", help="Instruction given with each image; default: the evaluation set's.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The bundle; must not exist. Default: NAME-SCHEME.",
)
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Where stages lie; default: OUT.work. Kept, so that a later build reuses them.",
)
@click.option(
    "--resume/--no-resume", default=True, help="Reuse finished stages (default) or make all again."
)
@click.option(
    "--limit",
    type=click.IntRange(min=0),
    default=0,
    help="Compare on the first N cases only; 0: all.",
)
@click.option(
    "--compare/--no-compare",
    default=True,
    help="Without comparison the bundle says that there was none.",
)
@click.option(
    "--sign-key",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Private key of `medexport keygen`.",
)
@click.option(
    "--threads", type=click.IntRange(min=1), help="Default: the cores this process may use."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def build(
    model: str, form: str, int4: bool, int8: bool, scheme: str | None, as_json: bool, **options: Any
) -> None:
    """Merge, quantize, export, verify, compare and package a model.

    The bundle is written whatever the comparison says; the exit code is the gate's verdict.
    """
    from exporter.pipeline.build import build_bundle
    from exporter.pipeline.request import BuildRequest

    if form == "tensorrt":
        from exporter.core.errors import EnvironmentLacks

        raise EnvironmentLacks(
            "--format tensorrt is not available in this version; build --format onnx, "
            "which onnxruntime runs on the CPU"
        )
    name = chosen_scheme(int4, int8, scheme)
    out = options.pop("out") or Path(f"{Path(model).name}-{name}")
    request = BuildRequest(model=model, scheme=name, out=out, **options)
    result = build_bundle(request, Console())
    if as_json:
        print_json(result.to_json())
    else:
        click.echo(result.to_text())
    result.enforce()


@click.command()
@model_options
@scheme_options
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def plan(int4: bool, int8: bool, scheme: str | None, as_json: bool, **options: Any) -> None:
    """Say what build would do: layers, bits, bytes. Nothing is converted."""
    from exporter.pipeline.plan import make_plan

    report = make_plan(scheme=chosen_scheme(int4, int8, scheme), **options)
    if as_json:
        print_json(report.to_json())
        return
    print_table(("stored as", "matrices", "MB"), report.rows())
    click.echo(report.to_text())


@click.command()
@model_options
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def resolve(
    as_json: bool, model: str, weights: Path | None, adapters: tuple[str, ...], offline: bool
) -> None:
    """Find profile, checkpoint and adapters, check their headers, print their digests."""
    from exporter.pipeline.resolve import resolve as find

    found = find(model, weights, adapters, offline=offline).summary()
    if as_json:
        print_json(found)
        return
    base = found["base"]
    click.echo(f"{found['model']} ({found['title']}), family {found['family']}")
    click.echo(f"base     {base['path']}  sha256 {base['digest']}")
    click.echo(f"         {found['tensors']} tensors, {found['weight_bytes'] / 1e6:.1f} MB")
    for adapter in found["adapters"]:
        click.echo(f"adapter  {adapter['path']}  sha256 {adapter['digest']}")


COMMANDS = (build, plan, resolve)
