"""TensorRT engines on the machine that runs them: build and prove, or check."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exporter.cli.console import Console, print_json

if TYPE_CHECKING:
    from exporter.bundle.manifest import Manifest
    from exporter.engines.golden import Golden
    from exporter.engines.site import Rebuilt

PATH = click.Path(path_type=Path)
MIB = 2**20
# Where a bundle keeps the optimization profiles of its graphs, and what its models said.
EXPORT, COMPARISON, CASES = "export.json", "compare.json", "cases.jsonl"


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
    console = Console()
    console.begin("engine build", bundle.name)
    start = time.perf_counter()
    made = _build(bundle, _Asked(**options), console)
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

    if not (bundle / "model" / "onnx").is_dir():
        raise InputRefused(f"{bundle}: no model/onnx folder; expected a bundle")
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


@dataclass(frozen=True)
class _Asked:
    """The options of `medexport engine build`."""

    out: Path | None
    workspace: int | None
    level: int
    version_compatible: bool
    weight_streaming: bool
    tf32: bool
    evaluation: str
    cases: int
    threads: int | None
    check_files: bool


def _build(bundle: Path, asked: _Asked, console: Console) -> Rebuilt:
    from exporter.bundle.manifest import read_manifest
    from exporter.bundle.verify import verify_bundle
    from exporter.core.errors import InputRefused
    from exporter.engines.options import EngineOptions
    from exporter.engines.site import rebuild
    from exporter.runtimes.trt_api import load_tensorrt

    load_tensorrt()  # before gigabytes are read
    if asked.check_files:
        manifest = verify_bundle(bundle, progress=console.advance).manifest
    else:
        manifest = read_manifest(bundle)
    record = bundle / "reports" / EXPORT
    if manifest.dialect != "standard" or not record.is_file():
        lacks = (
            f"has no reports/{EXPORT}" if manifest.dialect == "standard" else "is not for TensorRT"
        )
        raise InputRefused(
            f"{bundle}: its dialect is '{manifest.dialect}' and it {lacks}; expected graphs of the "
            "standard dialect with their optimization profiles: build it with --format tensorrt"
        )
    options = EngineOptions(
        version_compatible=asked.version_compatible,
        weight_streaming=asked.weight_streaming,
        tf32=asked.tf32,
        level=asked.level,
        workspace=asked.workspace and asked.workspace * MIB,
    )
    return rebuild(
        bundle,
        record,
        _golden(bundle, manifest, asked),
        out=asked.out,
        options=options,
        threads=asked.threads,
        progress=console.advance,
    )


def _golden(bundle: Path, manifest: Manifest, asked: _Asked) -> Golden:
    """Cases of an image set, with the tokens that the bundle's own comparison recorded for them."""
    from exporter.core.digest import sha256_file
    from exporter.engines.golden import Golden, GoldenCase
    from exporter.pipeline.evaluation import open_evaluation

    usage = manifest.usage
    chosen = open_evaluation(
        asked.evaluation,
        limit=asked.cases,
        prompt=usage.prompt,
        max_new_tokens=usage.max_new_tokens,
    )
    said = _recorded(bundle, manifest)
    cases = [
        GoldenCase(c.id, c.image, said.get((c.id, sha256_file(c.image)))) for c in chosen.cases
    ]
    return Golden(cases, usage.prompt, usage.max_new_tokens)


def _recorded(bundle: Path, manifest: Manifest) -> dict[tuple[str, str], tuple[int, ...]]:
    """Tokens of the bundle's captions by case and image digest, where it was asked what its users ask."""
    from exporter.compare.check import read_cases
    from exporter.compare.compare import read_comparison

    reports, usage = bundle / "reports", manifest.usage
    if not ((reports / COMPARISON).is_file() and (reports / CASES).is_file()):
        return {}
    comparison = read_comparison(reports / COMPARISON)
    if (comparison.prompt, comparison.max_new_tokens) != (usage.prompt, usage.max_new_tokens):
        return {}
    rows = read_cases(reports / CASES)
    return {
        (case, row.sha256): row.captions[manifest.scheme].ids
        for case, row in rows.items()
        if manifest.scheme in row.captions and row.captions[manifest.scheme].ids
    }


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
