"""One stage each: the same functions as `medexport build`, on folders the user names."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exporter.cli.build import GROUP_SIZE, SYMMETRIC, with_blocks
from exporter.cli.console import Console, print_json

if TYPE_CHECKING:
    from exporter.graphs.export import Compute, Dialect

FOLDER = click.Path(path_type=Path)
DEVICE = click.option(
    "--device",
    type=click.Choice(("cpu", "cuda")),
    default="cpu",
    show_default=True,
    help="cuda: the first NVIDIA GPU; nothing falls back to the CPU.",
)


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
@GROUP_SIZE
@SYMMETRIC
@click.option(
    "--calibration",
    default="phantoms-calib",
    show_default=True,
    metavar="SET",
    help="Images for schemes that need them.",
)
@click.option("--calibration-samples", type=click.IntRange(min=0), default=128, show_default=True)
@click.option("--calibration-seed", type=int, default=0, show_default=True)
@click.option("--prompt", help="Default: the calibration set's.")
@click.option("--max-size", metavar="SIZE", help="--scheme mixed: bytes (300MB) or share (0.3).")
@click.option("--max-kl", type=float, metavar="NATS", help="--scheme mixed: KL per token.")
@click.option("--threads", type=click.IntRange(min=1), help="Default: the usable cores.")
@out_option
def quantize(
    source: Path,
    out: Path,
    threads: int | None,
    scheme: str,
    group_size: str | None,
    symmetric: bool | None,
    **options: Any,
) -> None:
    """Quantize the merged model folder SOURCE."""
    from exporter.pipeline.quantize import QuantizeOptions, quantize_folder
    from exporter.runtimes.threads import usable_cores

    name = with_blocks(scheme, group_size, symmetric)
    given = QuantizeOptions(scheme=name, threads=threads or usable_cores(), **options)

    def make(folder: Path, console: Console) -> None:
        quantize_folder(source, folder, given, progress=console.advance)

    in_folder("quantize", out, make)


@click.command()
@click.argument("source", type=FOLDER)
@click.option("--float32", is_flag=True, help="Store float weights in 32 bits, for parity.")
@click.option("--target", default="auto", show_default=True, metavar="NAME")
@click.option(
    "--dialect",
    type=click.Choice(("ort", "standard")),
    default="ort",
    show_default=True,
    help="standard: ai.onnx operators alone, for TensorRT's parser; symmetric blocks only.",
)
@click.option(
    "--compute",
    type=click.Choice(("float32", "float16")),
    default="float32",
    show_default=True,
    help="What activations are. float16: for TensorRT, or (dialect ort) for `run --device cuda`.",
)
@out_option
def export(
    source: Path,
    float32: bool,
    target: str,
    dialect: Dialect,
    compute: Compute,
    out: Path,
) -> None:
    """Write the ONNX graphs of a merged or quantized folder SOURCE."""
    from exporter.core.errors import WrongUsage
    from exporter.pipeline.stages import export_folder
    from exporter.pipeline.targets import choose_target

    if compute == "float16" and float32:
        raise WrongUsage("--compute float16 and --float32 exclude each other")
    level = choose_target(target).accuracy_level

    def make(folder: Path, console: Console) -> None:
        export_folder(
            source,
            folder,
            accuracy_level=level,
            float32=float32,
            dialect=dialect,
            compute=compute,
            progress=console.advance,
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
    from exporter.pipeline.evaluation import open_evaluation
    from exporter.pipeline.stages import check_graphs_against_torch

    pairs = {name: (quantized, exported) for name, quantized, exported in candidates}
    cases = open_evaluation(evaluation, **options)

    def make(folder: Path, console: Console) -> None:
        check_graphs_against_torch(merged, fp32, pairs, folder, cases, progress=console.advance)

    in_folder("parity", out, make)


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="REFERENCE MODEL...")
@click.option(
    "--eval",
    "evaluation",
    metavar="SET",
    help="Default: the shipped set of what the models do (phantoms-eval, reports-eval).",
)
@click.option("--limit", type=click.IntRange(min=0), default=0, help="N cases; 0: all.")
@click.option("--prompt", help="Default: that of the first bundle, else the evaluation set's.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="Default: the first bundle's.")
@click.option("--threads", type=click.IntRange(min=1), help="Default: the usable cores.")
@click.option(
    "--robustness",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Also on N images slightly changed (5 captions each, not gated); 0: none.",
)
@DEVICE
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@click.option("--out", type=FOLDER, metavar="DIR", help="Keep the reports here. Must not exist.")
def compare(models: tuple[str, ...], out: Path | None, as_json: bool, **options: Any) -> None:
    """Compare models with a REFERENCE: quality, latency, memory, bytes.

    Each is a bundle, an exported folder, a merged or quantized folder (run by torch), or (not the
    first) predictions: a .jsonl file, or a folder with predictions.jsonl, of lines with id and
    caption. NAME=PATH names it in the tables.
    """
    import msgspec

    from exporter.compare.compare import Comparison
    from exporter.compare.table import comparison_table
    from exporter.pipeline.compared import Asked, compare_any

    def make(folder: Path, console: Console) -> Any:
        return compare_any(models, folder, Asked(**options), progress=console.advance)

    with ExitStack() as stack:
        if out is None:
            place = stack.enter_context(tempfile.TemporaryDirectory(prefix="medexport-compare-"))
        comparison = in_folder("compare", out or Path(place) / "compare", make)
    if as_json:
        print_json(msgspec.to_builtins(comparison))
    elif isinstance(comparison, Comparison):
        click.echo(comparison_table(comparison))
    else:
        click.echo(comparison.to_text())


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
