"""TensorRT engines on the machine that runs them: build and prove, or check."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exporter.cli.console import Console, print_json

if TYPE_CHECKING:
    from exporter.engines.site import Rebuilt

PATH = click.Path(path_type=Path)
MIB = 2**20


@click.group()
def engine() -> None:
    """TensorRT engines for a bundle: build them where they will run, and check them.

    The code has not been run on hardware so far; docs/engines.md says what was checked.
    """


@engine.command()
@click.argument("bundle", type=PATH)
@click.option(
    "--out",
    type=PATH,
    metavar="DIR",
    help="Default: beside BUNDLE, BUNDLE.engines/GPU. What is there stays until the new ones passed.",
)
@click.option(
    "--workspace",
    type=click.IntRange(min=1),
    metavar="MIB",
    help="GPU memory that a kernel may use. Default: as much as there is.",
)
@click.option(
    "--level",
    type=click.IntRange(0, 5),
    default=3,
    show_default=True,
    help="Builder optimization level: 0 builds fast, 5 tries most.",
)
@click.option("--version-compatible", is_flag=True, help="Later TensorRT versions run them too.")
@click.option("--weight-streaming", is_flag=True, help="Weights may stay in host memory (slow).")
@click.option("--tf32", is_flag=True, help="Round float32 products to 10 bits of mantissa.")
@click.option("--eval", "evaluation", default="phantoms-eval", show_default=True, metavar="SET")
@click.option(
    "--cases", type=click.IntRange(min=1), default=4, show_default=True, help="Golden cases."
)
@click.option(
    "--threads", type=click.IntRange(min=1), help="For the ONNX graph. Default: all cores."
)
@click.option("--verify/--no-verify", "check_files", default=True, help="Check all files first.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def build(bundle: Path, as_json: bool, **options: Any) -> None:
    """Build engines from BUNDLE's graphs on this machine, and prove them on golden cases.

    Their captions must have the tokens that the graphs give; engines that say something else are
    deleted (exit 1), and the ONNX graphs stay in use.
    """
    from exporter.pipeline.engines import SiteRequest, build_site_engines

    console = Console()
    console.begin("engine build", bundle.name)
    start = time.perf_counter()
    options["workspace"] = options["workspace"] and options["workspace"] * MIB
    made = build_site_engines(bundle, SiteRequest(**options), progress=console.advance)
    console.end(time.perf_counter() - start, cached=False, note=str(made.report.folder))
    if as_json:
        print_json(_as_json(made))
        return
    for record in made.report.records:
        click.echo(f"{record.part}: {record.bytes / 1e6:.2f} MB in {record.seconds:.1f} s")
    sources = ", ".join(sorted({c.source for c in made.test.cases}))
    click.echo(f"self-test: {len(made.test.cases)} captions as expected ({sources})")
    click.echo(f"decode step as CUDA graph: {made.test.step_graph}")
    click.echo(str(made.report.folder))


@engine.command()
@click.argument("bundle", type=PATH)
@click.option(
    "--engines", type=PATH, metavar="DIR", help="Default: the site's, else the bundle's own."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def check(bundle: Path, engines: Path | None, as_json: bool) -> None:
    """Would this machine be ready to run BUNDLE's engines?

    Compares their records with the machine and the graphs, and loads them. Where they are refused
    (exit 3, or 5 without TensorRT or a GPU) a run uses the ONNX graphs, and says so.
    """
    from exporter.core.errors import EnvironmentLacks, InputRefused
    from exporter.engines.machine import engine_folder, this_machine
    from exporter.engines.preflight import open_engines
    from exporter.pipeline.engines import require_engine_bundle

    require_engine_bundle(bundle)
    try:
        with this_machine() as machine:
            folder = engines or engine_folder(bundle, machine.memory.facts)
            open_engines(bundle / "model", folder, machine.trt, machine.memory).close()
            gpu, version = machine.memory.facts.name, machine.trt.__version__
    except (EnvironmentLacks, InputRefused) as error:
        if as_json:
            print_json({"ready": False, "runtime": "onnxruntime", "fallback": str(error)})
        raise type(error)(f"not ready: {error}; until then the ONNX graphs are used") from error
    if as_json:
        print_json(
            {
                "ready": True, "runtime": "tensorrt", "fallback": None, "folder": str(folder),
                "gpu": gpu, "tensorrt": version,
            }
        )  # fmt: skip
        return
    click.echo(f"ready: {folder} on {gpu} with TensorRT {version}")


def _as_json(made: Rebuilt) -> dict[str, Any]:
    import msgspec

    return {
        "folder": str(made.report.folder),
        "seconds": made.report.seconds,
        "bytes": made.report.bytes,
        "engines": [msgspec.to_builtins(r) for r in made.report.records],
        "self_test": msgspec.to_builtins(made.test),
    }


COMMANDS = (engine,)
