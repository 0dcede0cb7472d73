"""Checkpoints of other tools: write ours as GPTQ, read GPTQ and AWQ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from exporter.cli.console import Console
from exporter.cli.stages import FOLDER, in_folder, out_option

TARGETS = ("gptq", "gptq-v2", "bnb-nf4", "medexport")


@click.command()
@click.argument("source", type=FOLDER)
@click.option(
    "--to",
    "target",
    type=click.Choice(TARGETS),
    required=True,
    help="gptq: version 1 (zero points less one); bnb-nf4: for transformers with bitsandbytes; "
    "medexport: a quantized folder to export.",
)
@click.option(
    "--from",
    "origin",
    type=click.Choice(("auto", "gptq", "awq")),
    default="auto",
    show_default=True,
    help="What SOURCE is, for --to medexport.",
)
@click.option(
    "--only-decoder",
    is_flag=True,
    help="Write the vision part and the head in float16, for loaders that quantize blocks only.",
)
@click.option(
    "--gptq-version",
    type=click.IntRange(1, 2),
    help="Read SOURCE as this version whatever its label says.",
)
@out_option
def convert(
    source: Path,
    target: str,
    origin: str,
    only_decoder: bool,
    gptq_version: int | None,
    out: Path,
) -> None:
    """Convert between our quantized folder and the checkpoints of other tools.

    SOURCE is what `medexport quantize` wrote (--to gptq, gptq-v2; with scheme bnb-nf4: --to
    bnb-nf4), or a GPTQ or AWQ checkpoint (--to medexport).
    """
    from exporter.core.errors import WrongUsage

    if target == "medexport":
        if only_decoder:
            raise WrongUsage("--only-decoder belongs to --to gptq and gptq-v2")
        notes = in_folder("convert", out, _reading(source, origin, gptq_version))
    else:
        if origin != "auto" or gptq_version:
            raise WrongUsage("--from and --gptq-version belong to --to medexport")
        if only_decoder and target == "bnb-nf4":
            raise WrongUsage("--only-decoder belongs to --to gptq and gptq-v2")
        notes = in_folder("convert", out, _writing(source, target, only_decoder))
    for note in notes:
        click.echo(f"note: {note}")


def _reading(source: Path, origin: str, version: int | None) -> Any:
    from exporter.formats.read import read_checkpoint

    def make(folder: Path, console: Console) -> tuple[str, ...]:
        found = read_checkpoint(
            source, folder, origin=origin, version=version or 0, progress=console.advance
        )
        return found.notes

    return make


def _writing(source: Path, target: str, only_decoder: bool) -> Any:
    if target == "bnb-nf4":
        return _writing_bnb(source)
    from exporter.formats.gptq_write import GptqOptions, write_gptq

    options = GptqOptions(version=1 if target == "gptq" else 2, only_decoder=only_decoder)

    def make(folder: Path, console: Console) -> list[str]:
        written = write_gptq(source, folder, options, progress=console.advance)
        quantized = f"{len(written.quantized)} matrices quantized as {target}"
        floats = [f"'{n}' is float16: {why}" for n, why in written.dequantized.items()]
        return [quantized, *floats, *written.warnings]

    return make


def _writing_bnb(source: Path) -> Any:
    from exporter.formats.bnb_write import write_bnb

    def make(folder: Path, console: Console) -> list[str]:
        written = write_bnb(source, folder, progress=console.advance)
        return [f"{len(written.quantized)} matrices in NF4"]

    return make


COMMANDS = (convert,)
