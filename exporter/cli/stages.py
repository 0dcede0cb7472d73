"""One stage each: the same functions as `medexport build`, on folders the user names."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from exporter.cli.console import Console, print_json

FOLDER = click.Path(path_type=Path)


def out_option(command: Any) -> Any:
    """The folder that a stage writes."""
    text = "Must not exist."
    return click.option("--out", type=FOLDER, required=True, metavar="DIR", help=text)(command)


def evaluation_options(command: Any) -> Any:
    """Options that say on which cases and how models are run."""
    for option in (
        click.option("--threads", type=click.IntRange(min=1), help="Default: the usable cores."),
        click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True),
        click.option("--prompt", help="Default: the evaluation set's."),
        click.option(
            "--limit",
            type=click.IntRange(min=0),
            default=0,
            help="N cases spread over the set; 0: all.",
        ),
        click.option(
            "--eval", "evaluation", default="phantoms-eval", show_default=True, metavar="SET"
        ),
    ):
        command = option(command)
    return command


def in_folder(name: str, out: Path, make: Callable[[Path, Console], Any]) -> Any:
    """Run one stage into `out`, which appears only when it is finished, with progress."""
    from exporter.core.artifact import atomic_directory

    console = Console()
    console.begin(name, "")
    start = time.perf_counter()
    with atomic_directory(out) as folder:
        result = make(folder, console)
    console.end(time.perf_counter() - start, cached=False, note=str(out))
    return result


@click.command()
@click.argument("checkpoint", type=FOLDER)
@click.option("--adapter", "adapters", type=FOLDER, multiple=True, metavar="DIR")
@click.option("--prove/--no-prove", default=True, help="Compare merged logits with the adapter's.")
@out_option
def merge(checkpoint: Path, adapters: tuple[Path, ...], prove: bool, out: Path) -> None:
    """Merge adapters into CHECKPOINT in float and prove that the merge changed it."""
    from exporter.pipeline.stages import merge_and_prove

    def make(folder: Path, console: Console) -> None:
        merge_and_prove(checkpoint, adapters, folder, prove=prove, progress=console.advance)

    in_folder("merge", out, make)


@click.command()
@click.argument("source", type=FOLDER)
@click.option("--scheme", required=True, metavar="NAME", help="See `medexport schemes`.")
@click.option("--threads", type=click.IntRange(min=1), help="Default: the usable cores.")
@out_option
def quantize(source: Path, scheme: str, threads: int | None, out: Path) -> None:
    """Quantize the merged model folder SOURCE."""
    from exporter.quantizers.run import quantize_model
    from exporter.quantizers.schemes import find_scheme
    from exporter.runtimes.threads import usable_cores

    chosen, cores = find_scheme(scheme), threads or usable_cores()

    def make(folder: Path, console: Console) -> None:
        quantize_model(source, folder, chosen, threads=cores, progress=console.advance)

    in_folder("quantize", out, make)


@click.command()
@click.argument("source", type=FOLDER)
@click.option("--float32", is_flag=True, help="Store float weights in 32 bits, for parity.")
@click.option("--target", default="auto", show_default=True, metavar="NAME")
@out_option
def export(source: Path, float32: bool, target: str, out: Path) -> None:
    """Write the ONNX graphs of a merged or quantized folder SOURCE."""
    from exporter.pipeline.stages import export_folder
    from exporter.pipeline.targets import choose_target

    level = choose_target(target).accuracy_level

    def make(folder: Path, console: Console) -> None:
        export_folder(
            source, folder, accuracy_level=level, float32=float32, progress=console.advance
        )

    in_folder("export", out, make)


@click.command()
@click.option("--merged", type=FOLDER, required=True, metavar="DIR", help="The torch reference.")
@click.option("--fp32", type=FOLDER, required=True, metavar="DIR", help="Its --float32 export.")
@click.option(
    "--candidate",
    "candidates",
    type=(str, FOLDER, FOLDER),
    multiple=True,
    metavar="NAME QUANTIZED EXPORTED",
)
@evaluation_options
@out_option
def parity(
    merged: Path,
    fp32: Path,
    candidates: tuple[tuple[str, Path, Path], ...],
    out: Path,
    evaluation: str,
    **options: Any,
) -> None:
    """Compare each graph with torch: features, logits, greedy tokens."""
    from exporter.pipeline.stages import check_graphs_against_torch, open_evaluation

    pairs = {name: (quantized, exported) for name, quantized, exported in candidates}
    cases = open_evaluation(evaluation, **options)

    def make(folder: Path, console: Console) -> None:
        check_graphs_against_torch(merged, fp32, pairs, folder, cases, progress=console.advance)

    in_folder("parity", out, make)


@click.command()
@click.option("--reference", type=FOLDER, required=True, metavar="DIR", help="As a rule fp16.")
@click.option(
    "--candidate",
    "candidates",
    type=(str, FOLDER),
    multiple=True,
    required=True,
    metavar="NAME EXPORTED",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@evaluation_options
@out_option
def compare(
    reference: Path,
    candidates: tuple[tuple[str, Path], ...],
    out: Path,
    as_json: bool,
    evaluation: str,
    **options: Any,
) -> None:
    """Compare exported models with a reference: quality, latency, memory, bytes."""
    import msgspec

    from exporter.compare.table import comparison_table
    from exporter.pipeline.stages import compare_exported, open_evaluation

    cases = open_evaluation(evaluation, **options)

    def make(folder: Path, console: Console) -> Any:
        rows = dict(candidates)
        return compare_exported(
            reference, rows, folder, cases, lineage={}, progress=console.advance
        )

    comparison = in_folder("compare", out, make)
    if as_json:
        print_json(msgspec.to_builtins(comparison))
    else:
        click.echo(comparison_table(comparison))


@click.command()
@click.option("--exported", type=FOLDER, required=True, metavar="DIR")
@click.option(
    "--resolved", type=FOLDER, required=True, metavar="FILE", help="From `resolve --json`."
)
@click.option("--scheme", required=True, metavar="NAME")
@click.option("--target", default="auto", show_default=True, metavar="NAME")
@click.option("--parity", type=FOLDER, metavar="DIR", help="What `medexport parity` wrote.")
@click.option("--comparison", type=FOLDER, metavar="DIR", help="What `medexport compare` wrote.")
@click.option("--prompt", help="Default: the profile's.")
@click.option("--sign-key", type=FOLDER, metavar="FILE", help="From `medexport keygen`.")
@out_option
def package(out: Path, **options: Any) -> None:
    """Put an exported model and its reports into a bundle with a manifest."""
    from exporter.pipeline.stages import PackageFolders, package_folders

    given = PackageFolders(**options)

    def make(folder: Path, _: Console) -> None:
        package_folders(folder, out.name, given)

    in_folder("package", out, make)


COMMANDS = (merge, quantize, export, parity, compare, package)
