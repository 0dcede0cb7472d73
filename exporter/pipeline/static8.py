"""The scheme `int8-static`: a vision part that multiplies in 8 bits, its inputs' ranges calibrated.

Layers are chosen by what they do to the vision part's own features: each alone, then all together.
Both passes run the vision graph itself, so that any kind of vision part will do.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from exporter.core.artifact import write_atomic
from exporter.core.cases import prompt_for
from exporter.core.digest import canonical_json
from exporter.core.errors import InputRefused, WrongUsage
from exporter.core.modelfiles import read_config
from exporter.core.progress import Progress, silent
from exporter.core.static8 import StaticMatrix
from exporter.core.tensors import Checkpoint
from exporter.families.base import Feed, VisionSpec
from exporter.families.table import family_of
from exporter.graphs.parts import write_vision
from exporter.graphs.probe import GatedSource, WatchingSource
from exporter.graphs.static import gate_input, watch_output
from exporter.pipeline.calibrated import CALIBRATION, Calibration
from exporter.quantizers.plan import plan_layers
from exporter.quantizers.run import write_model
from exporter.quantizers.schemes import Scheme
from exporter.quantizers.smooth import Observed, Smoothed, SmoothSettings, smooth, static_matrix
from exporter.quantizers.static_layers import (
    Group,
    StaticTensors,
    Verdict,
    folded,
    input_groups,
    keep_within,
)
from exporter.runtimes.images import open_image
from exporter.runtimes.ort_session import open_session

Array = NDArray[np.float32]
FEATURES = "image_features"
GRAPH = "vision_encoder.onnx"
# Images whose features are compared for every layer, and inputs kept of each matrix.
PARITY_FEEDS, ROWS = 2, 512


def quantize_static(
    merged: Path,
    exported: Path,
    out: Path,
    scheme: Scheme,
    calibration: Calibration,
    scratch: Path,
    *,
    threads: int,
    progress: Progress = silent,
) -> str:
    """Quantize `merged` into the empty folder `out`: `scheme`, with the vision part in static 8 bits.

    `exported` is a float export, for tokenizer and settings; `scratch` holds graphs meanwhile.
    Returns how many matrices stay in float16. Raises `WrongUsage` without
    vision matrices, and as `quantize_model` does.
    """
    config = read_config(merged / "config.json")
    family = family_of(config)
    tower = family.tower_spec(config)
    checkpoint = Checkpoint.open(merged)
    plan = plan_layers(checkpoint, family.decoder_spec(config), tower, scheme)
    names = tuple(p.name for p in plan if p.method == "smoothquant")
    if not names:
        raise WrongUsage(f"scheme {scheme.name}: this model has no vision matrices; use int8")
    preparer = family.open_preparer(exported / "model")
    cases = calibration.cases

    def feeds() -> Iterator[Feed]:
        for case in cases:
            yield from preparer.prepare(
                [open_image(case.image)], prompt_for(calibration.prompt, case.modality)
            ).vision

    settings = SmoothSettings()
    turned = frozenset(p.name for p in plan if p.turned)
    work = _Work(merged, tower, checkpoint, scratch, threads, settings, turned)
    seen = work.observe(names, feeds, len(cases), progress)
    groups = input_groups(seen, tower)
    chosen = {group: work.choose(group, seen) for group in groups}
    samples = [feed for feed, _ in zip(feeds(), range(PARITY_FEEDS), strict=False)]
    verdict = work.judge(groups, chosen, samples, progress)
    ready = StaticTensors(checkpoint, groups, chosen, verdict)
    final = tuple(ready.planned(p) for p in plan)
    write_model(merged, out, scheme, ready, plan=final, threads=threads, progress=progress)
    record = calibration.options() | {"images": len(cases), "vision": verdict.document()}
    write_atomic(out / CALIBRATION, canonical_json(record))
    return f"{len(verdict.left)} of {len(names)} vision matrices stay in float16"


@dataclass(frozen=True)
class _Work:
    """Where the graphs of one quantization come from and go."""

    merged: Path
    tower: VisionSpec
    checkpoint: Checkpoint
    scratch: Path
    threads: int
    settings: SmoothSettings
    turned: frozenset[str]

    def weight(self, name: str) -> Array:
        """A matrix ``[N, K]``."""
        values = self.checkpoint.float32(name)
        return np.ascontiguousarray(values.T) if name in self.turned else values

    def observe(
        self,
        names: Sequence[str],
        feeds: Callable[[], Iterator[Feed]],
        count: int,
        progress: Progress,
    ) -> dict[str, Observed]:
        """What each matrix is multiplied with, over all feeds."""
        folder = self._empty("watched")
        source = WatchingSource(self.merged, frozenset(names))
        write_vision(folder, self.tower, source, 0)
        session = open_session(folder / GRAPH, self.threads)
        outputs = [o.name for o in session.get_outputs() if o.name != FEATURES]
        seen: dict[str, Observed] = {}
        for number, feed in enumerate(feeds()):
            progress(min(number, count), 2 * count, "input ranges")
            found = dict(zip(outputs, session.run(outputs, dict(feed)), strict=True))
            for name in names:
                low, high, rows = (found[watch_output(name, w)] for w in ("low", "high", "rows"))
                now = Observed(low, high, _spread(rows, max(1, ROWS // count)))
                seen[name] = _joined(seen[name], now) if name in seen else now
        if not seen:
            raise InputRefused("no calibration image; expected at least one")
        return seen

    def choose(self, group: Group, seen: Mapping[str, Observed]) -> Smoothed:
        """Alpha and input grid of one group."""
        weights = [self.weight(name) for name in group.names]
        norm = self.checkpoint.float32(f"{group.norm}.weight") if group.norm else None
        first = group.names[0]
        return smooth(weights, seen[first], self.settings, norm=norm, name=first)

    def judge(
        self,
        groups: Sequence[Group],
        chosen: Mapping[Group, Smoothed],
        feeds: Sequence[Feed],
        progress: Progress,
    ) -> Verdict:
        """Run the features with each matrix alone in 8 bits, then with all that may stay so."""
        changed: dict[str, Array] = {}
        static: dict[str, StaticMatrix] = {}
        for group in groups:
            for name in group.names:
                weight = self.weight(name)
                static[name] = static_matrix(weight, chosen[group])
                changed[name] = folded(weight, chosen[group])
            if group.norm:
                for part in (f"{group.norm}.weight", f"{group.norm}.bias"):
                    changed[part] = folded(self.checkpoint.float32(part), chosen[group])
        folder = self._empty("gated")
        write_vision(folder, self.tower, GatedSource(self.merged, changed, static), 0)
        session = open_session(folder / GRAPH, self.threads)
        gates = {i.name for i in session.get_inputs()} & {gate_input(n) for n in static}

        def features(names: Sequence[str]) -> Array:
            on = {gate_input(n) for n in names}
            values = {g: np.full(1, float(g in on), np.float32) for g in gates}
            runs = [session.run([FEATURES], {**feed, **values})[0].ravel() for feed in feeds]
            return np.concatenate(runs)

        plain = features(())
        size = float(np.linalg.norm(plain))

        def moved(names: Sequence[str]) -> float:
            return float(np.linalg.norm(features(names) - plain)) / size if size else 0.0

        alone: dict[str, float] = {}
        stacked: dict[str, str] = {}
        for number, group in enumerate(groups):
            progress(len(groups) + number, 2 * len(groups), "features by matrix")
            gated = [name for name in group.names if gate_input(name) in gates]
            # A matrix without a gate is stacked upon the one of its group that has one.
            stacked |= {name: gated[0] for name in group.names if name not in gated}
            alone |= {name: moved((name,)) for name in gated}
        verdict = keep_within(alone, moved, self.settings)
        for name, first in stacked.items():
            verdict.errors[name] = verdict.errors[first]
            if first in verdict.left:
                verdict.left[name] = verdict.left[first]
        return verdict

    def _empty(self, name: str) -> Path:
        folder = self.scratch / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder


def _joined(a: Observed, b: Observed) -> Observed:
    rows = np.concatenate((a.rows, b.rows))
    if len(rows) > 2 * ROWS:
        rows = rows[::2]
    return Observed(np.minimum(a.low, b.low), np.maximum(a.high, b.high), rows)


def _spread(rows: Array, count: int) -> Array:
    """At most `count` of the rows, at equal distances."""
    return rows[np.arange(min(count, len(rows))) * len(rows) // min(count, len(rows))]
