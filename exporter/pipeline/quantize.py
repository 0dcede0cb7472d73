"""The quantize stage by itself: any scheme on a merged folder, with the export that calibration needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from exporter.core.artifact import partial_path
from exporter.core.progress import Progress, silent
from exporter.pipeline.budget import read_budget
from exporter.pipeline.calibrated import open_calibration, quantize_calibrated
from exporter.pipeline.mixed import MixedJob, quantize_mixed
from exporter.pipeline.stages import export_folder
from exporter.pipeline.static8 import quantize_static
from exporter.quantizers.run import quantize_model
from exporter.quantizers.schemes import find_scheme


@dataclass(frozen=True)
class QuantizeOptions:
    """What `medexport quantize` is given: as for `BuildRequest`."""

    scheme: str
    threads: int
    calibration: str = "phantoms-calib"
    calibration_samples: int = 128
    calibration_seed: int = 0
    prompt: str | None = None
    max_size: str | None = None
    max_kl: float | None = None


def quantize_folder(
    source: Path, out: Path, options: QuantizeOptions, *, progress: Progress = silent
) -> None:
    """Quantize the merged folder `source` into the empty folder `out`.

    A calibrated scheme needs the float16 graphs, which are written beside `out` and removed; a
    killed run begins anew (`medexport build` goes on). Raises as the quantizers do.
    """
    scheme = find_scheme(options.scheme)
    budget = read_budget(options.max_size, options.max_kl, mixed=bool(scheme.choices))
    if not scheme.calibrated:
        quantize_model(source, out, scheme, threads=options.threads, progress=progress)
        return
    calibration = open_calibration(
        options.calibration,
        options.calibration_samples,
        options.prompt,
        None,
        seed=options.calibration_seed,
    )
    with TemporaryDirectory(prefix=f"{partial_path(out).name}-", dir=out.parent) as folder:
        exported, scratch = Path(folder) / "fp16", Path(folder) / "scratch"
        exported.mkdir()
        export_folder(source, exported, accuracy_level=0, progress=progress)
        if scheme.choices:
            quantize_mixed(
                MixedJob(
                    merged=source,
                    exported=exported,
                    out=out,
                    scheme=scheme,
                    calibration=calibration,
                    budget=budget,
                    scratch=scratch,
                    threads=options.threads,
                    progress=progress,
                )
            )
            return
        quantize = quantize_static if scheme.method == "smoothquant" else quantize_calibrated
        quantize(
            source,
            exported,
            out,
            scheme,
            calibration,
            scratch,
            threads=options.threads,
            progress=progress,
        )
