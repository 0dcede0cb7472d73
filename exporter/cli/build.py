"""`medexport build`, `plan` and `resolve`: the whole way, and what it would be."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exporter.cli.console import Console, print_json, print_table

if TYPE_CHECKING:
    from exporter.graphs.export import Dialect
    from exporter.pipeline.outlook import Outlook


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
            help="Profile, profile file or model folder (./NAME where a profile has that name).",
        ),
    ):
        command = option(command)
    return command


ONE_SCHEME = "give exactly one of --int4, --int8 and --scheme NAME"
# The form of 4-bit blocks: options of build, plan and quantize.
GROUP_SIZE = click.option(
    "--group-size",
    type=click.Choice(["32", "64", "128"]),
    help="Values that share one scale in 4-bit parts; default: the scheme's own.",
)
SYMMETRIC = click.option(
    "--symmetric/--asymmetric",
    default=None,
    help="4-bit blocks without or with zero points; default: the scheme's own.",
)


def scheme_options(command: Any) -> Any:
    """Options that say how to quantize and for which target."""
    options: tuple[Any, ...] = (
        click.option(
            "--target",
            default="auto",
            show_default=True,
            metavar="NAME",
            help="See `medexport targets`.",
        ),
        click.option(
            "--max-kl",
            type=float,
            metavar="NATS",
            help="--scheme mixed: as small as this mean KL per token allows.",
        ),
        click.option(
            "--max-size",
            metavar="SIZE",
            help="--scheme mixed: bytes of weights (300MB) or share of float16 (0.3); "
            "default: those of uniform int4.",
        ),
        SYMMETRIC,
        GROUP_SIZE,
        click.option("--scheme", metavar="NAME", help="See `medexport schemes`."),
        click.option("--int8", is_flag=True, help="Same as --scheme int8."),
        click.option("--int4", is_flag=True, help="The profile's best 4-bit scheme."),
    )
    for option in options:
        command = option(command)
    return command


def take_scheme(options: dict[str, Any]) -> str | None:
    """Take what says which scheme out of a command's options; None when nothing was given.

    The form of 4-bit blocks becomes part of the name. Raises UsageError on several schemes, and on a
    form without a scheme.
    """
    int4, int8, scheme = (options.pop(key) for key in ("int4", "int8", "scheme"))
    form = {key: options.pop(key) for key in ("group_size", "symmetric")}
    asked = [s for s in ("int4" if int4 else "", "int8" if int8 else "", scheme or "") if s]
    if len(asked) > 1 or (not asked and any(value is not None for value in form.values())):
        raise click.UsageError(ONE_SCHEME)
    return with_blocks(asked[0], **form) if asked else None


def with_blocks(scheme: str, group_size: str | None, symmetric: bool | None) -> str:
    """`scheme` with what --group-size and --symmetric ask for."""
    from exporter.quantizers.schemes import variant_name

    return variant_name(scheme, int(group_size) if group_size else None, symmetric)


@click.command()
@model_options
@scheme_options
@click.option(
    "--format", "form", default="onnx", type=click.Choice(["onnx", "tensorrt"]), show_default=True
)
@click.option(
    "--dialect",
    type=click.Choice(["ort", "standard"]),
    help="Operators of the graphs; default: ort, with --format tensorrt standard.",
)
@click.option(
    "--compute",
    type=click.Choice(["float32", "float16"]),
    default="float32",
    show_default=True,
    help="What activations are. float16: for TensorRT, or (dialect ort) for `run --device cuda`.",
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
@click.option(
    "--calibration-samples",
    type=click.IntRange(min=0),
    default=128,
    show_default=True,
    help="Images drawn from it; 0: all.",
)
@click.option(
    "--calibration-seed",
    type=int,
    default=0,
    show_default=True,
    help="Which images are drawn; recorded in the manifest.",
)
@click.option("--prompt", help="Instruction given with each image; default: the profile's.")
@click.option(
    "--modality-aware",
    is_flag=True,
    help="The profile's instruction that names the modality of each image ({modality} in a prompt).",
)
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
    "--robustness",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Also compare on N images slightly changed (5 captions each, not gated); 0: none.",
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
def build(model: str, form: str, as_json: bool, **options: Any) -> None:
    """Merge, quantize, export, verify, compare and package a model.

    The bundle is written whatever the comparison says; the exit code is the gate's verdict.
    """
    from exporter.pipeline.build import build_bundle
    from exporter.pipeline.request import BuildRequest

    asked = options.pop("dialect")
    if form == "tensorrt" and asked == "ort":
        raise click.UsageError("--format tensorrt needs the graphs of --dialect standard")
    dialect: Dialect = asked or ("standard" if form == "tensorrt" else "ort")
    name = take_scheme(options)
    if name is None:
        raise click.UsageError(ONE_SCHEME)
    if options["robustness"] and not options["compare"]:
        raise click.UsageError("--robustness is part of the comparison; leave out --no-compare")
    out = options.pop("out") or Path(f"{Path(model).name}-{name}")
    request = BuildRequest(model=model, scheme=name, out=out, dialect=dialect, **options)
    result = build_bundle(request, Console())
    engines = _engines(out) if form == "tensorrt" else {}
    if as_json:
        print_json(result.to_json() | ({"engines": engines} if engines else {}))
    else:
        click.echo(result.to_text())
        for name, value in engines.items():
            click.echo(f"engines  {name}: {value}")
    result.enforce()


def _engines(bundle: Path) -> dict[str, str]:
    """Build the engines of a bundle where there is TensorRT; elsewhere say what to do."""
    from exporter.core.errors import EnvironmentLacks
    from exporter.pipeline.engines import SiteRequest, build_site_engines

    console = Console()
    console.begin("engines", bundle.name)
    start = time.perf_counter()
    try:
        made = build_site_engines(bundle, SiteRequest(check_files=False), progress=console.advance)
    except EnvironmentLacks as error:
        console.end(time.perf_counter() - start, cached=False, note="none built on this machine")
        return {"none here": str(error), "on the target": f"medexport engine build {bundle}"}
    console.end(time.perf_counter() - start, cached=False, note=str(made.report.folder))
    return {"folder": str(made.report.folder), "self-test": f"{len(made.test.cases)} captions"}


@click.command()
@model_options
@scheme_options
@click.option("--context", type=click.IntRange(min=1), help="Positions of the key-value cache.")
@click.option(
    "--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Texts at a time."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def plan(context: int | None, batch: int, as_json: bool, **options: Any) -> None:
    """Predict fit and speed of each scheme on a target and, with a scheme and weights at hand, say
    what build would do with every tensor. Nothing is downloaded or converted.
    """
    from exporter.pipeline.outlook import make_outlook
    from exporter.pipeline.resolve import weights_at_hand

    asked = take_scheme(options)
    model, weights = options["model"], options["weights"]
    outlook = make_outlook(model, weights, asked, options["target"], context=context, batch=batch)
    report = None
    if asked and weights_at_hand(model, weights):
        from exporter.pipeline.plan import make_plan

        report = make_plan(scheme=asked, **options)
    if report is None and (options["max_size"] or options["max_kl"]):
        raise click.UsageError("--max-size and --max-kl need --scheme mixed and --weights DIR")
    if as_json:
        print_json((report.to_json() if report else {}) | {"fit": outlook.to_json()})
        return
    _show_outlook(outlook)
    if report:
        print_table(("stored as", "matrices", "MB"), report.rows())
        click.echo(report.to_text())


def _show_outlook(outlook: Outlook) -> None:
    from exporter.pipeline.outlook import HEADER

    click.echo(outlook.headline())
    for part in outlook.targets:
        click.echo()
        print_table(HEADER, part.rows())
        for line in part.to_lines():
            click.echo(line)
    click.echo(outlook.assumptions() + "\n")
    if items := outlook.items():
        print_table((f"memory of {outlook.asked}", "", ""), items)
        click.echo()


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
