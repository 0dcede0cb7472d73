"""Opens the metrics that are asked for and scores pairs with them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from exporter.compare.captions.base import CaptionMetric, NotComputed, Pair, Tally
from exporter.compare.captions.table import (
    BY_NAME,
    CAPTION_METRICS,
    USUAL,
    BuiltIn,
    CaptionRow,
    FromPath,
)
from exporter.core.errors import InputRefused, WrongUsage

FOLDER_VARIABLE = "MEDEXPORT_METRICS"
ALL = "all"


@dataclass(frozen=True)
class MetricPaths:
    """Where weights are: `given` by option, else MEDEXPORT_METRIC_<NAME>, else the default folder.

    The default folder is MEDEXPORT_METRICS, else medexport/metrics in XDG_CACHE_HOME or ~/.cache.
    """

    given: Mapping[str, Path] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))

    def path(self, row: FromPath) -> Path:
        """Where to look; nothing need be there."""
        named = self.environment.get(f"MEDEXPORT_METRIC_{row.name.upper()}")
        if row.name in self.given:
            return self.given[row.name]
        return Path(named) if named else self.folder / row.file

    @property
    def folder(self) -> Path:
        """The default folder."""
        own = self.environment.get(FOLDER_VARIABLE)
        if own:
            return Path(own)
        cache = self.environment.get("XDG_CACHE_HOME")
        return (Path(cache) if cache else Path.home() / ".cache") / "medexport" / "metrics"


@dataclass(frozen=True)
class OpenMetrics:
    """Metrics ready to score, and why others are not, both by name."""

    ready: Mapping[str, CaptionMetric]
    not_computed: Mapping[str, str]

    @property
    def how(self) -> dict[str, str]:
        """The settings of each metric, by name."""
        return {name: metric.how for name, metric in self.ready.items()}

    def score(self, pairs: Sequence[Pair]) -> tuple[dict[str, Tally], dict[str, str]]:
        """All figures of `pairs` by name, and why a metric has none, by metric."""
        found: dict[str, Tally] = {}
        lost = dict(self.not_computed)
        for name, metric in self.ready.items():
            scored = metric.score(pairs)
            if isinstance(scored, NotComputed):
                lost[name] = scored.reason
            else:
                found |= scored
        return found, lost


def chosen_names(asked: Sequence[str]) -> list[str]:
    """Names of the table, "all" spelled out; the built-in ones when nothing is asked.

    Raises `WrongUsage` for an unknown name.
    """
    names = list(asked) or list(USUAL)
    unknown = [n for n in names if n != ALL and n not in BY_NAME]
    if unknown:
        raise WrongUsage(f"no metric '{unknown[0]}'; expected {', '.join([*BY_NAME, ALL])}")
    return [row.name for row in CAPTION_METRICS if ALL in names or row.name in names]


def open_metrics(names: Sequence[str], paths: MetricPaths) -> OpenMetrics:
    """Open each metric of `names`.

    A metric whose weights or packages are absent is not computed. Raises `InputRefused` when what
    stands at its path is not usable, or when a path given by option does not exist.
    """
    ready: dict[str, CaptionMetric] = {}
    lost: dict[str, str] = {}
    for name in names:
        opened = _open(BY_NAME[name], paths)
        if isinstance(opened, NotComputed):
            lost[name] = opened.reason
        else:
            ready[name] = opened
    return OpenMetrics(ready, lost)


def _open(row: CaptionRow, paths: MetricPaths) -> CaptionMetric | NotComputed:
    if isinstance(row, BuiltIn):
        return row.open()
    path = paths.path(row)
    missing = [m for m in row.modules if find_spec(m) is None]
    install = f"; install medexport[{row.extra}] ({', '.join(missing)})" if missing else ""
    if not path.exists():
        if row.name in paths.given:
            raise InputRefused(f"{path}: no such file or folder; expected {row.holds}")
        return NotComputed(f"looked for {path}; expected {row.holds}{install}")
    if missing:
        return NotComputed(f"found {path}{install}")
    return row.open(path)
