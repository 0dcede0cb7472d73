"""Opens a quantized checkpoint of another tool, whichever it is."""

from __future__ import annotations

from pathlib import Path

from exporter.core.errors import InputRefused, WrongUsage
from exporter.core.progress import Progress, silent
from exporter.formats.awq_read import read_awq
from exporter.formats.folder import Imported
from exporter.formats.gptq_read import read_gptq
from exporter.formats.settings import read_settings


def read_checkpoint(
    source: Path,
    out: Path,
    *,
    origin: str = "auto",
    version: int = 0,
    progress: Progress = silent,
) -> Imported:
    """Read a GPTQ or AWQ checkpoint into the empty folder `out` (our quantized folder).

    `origin`: "gptq", "awq", or "auto" for what its settings say; `version` overrules a GPTQ label.
    Raises `InputRefused` for anything that is neither, `WrongUsage` for a version with AWQ.
    """
    if not source.is_dir():
        raise InputRefused(f"{source}: no such folder; expected a GPTQ or AWQ checkpoint")
    method = read_settings(source).method if origin == "auto" else origin
    if method == "awq":
        if version:
            raise WrongUsage("--gptq-version is for GPTQ checkpoints, this one is AWQ")
        return read_awq(source, out, progress=progress)
    return read_gptq(source, out, version=version, progress=progress)
