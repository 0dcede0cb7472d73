"""The verdict as data: one per gated quantity, and the one over all (schema version 1)."""

from __future__ import annotations

from typing import Literal

import msgspec

from exporter.catalog.schema import Gate

GATE_SCHEMA = 1
# Images without a flip that show a flip rate under 2 per cent at 95 per cent confidence.
ENOUGH_IMAGES = 149
Verdict = Literal["PASS", "FAIL", "INCONCLUSIVE"]


class Quantity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One gated quantity.

    low and high are one-sided 95 per cent bounds (None: unbounded); at_least and at_most are the
    margins (None: none on that side). `needed` is the number of images that would decide an
    inconclusive quantity if it goes on as seen (None: cannot be named). `share`: shown in per cent.
    """

    name: str
    verdict: Verdict
    value: float
    low: float | None
    high: float | None
    at_least: float | None
    at_most: float | None
    share: bool
    images: int
    patients: int
    method: str
    said: str
    needed: int | None = None


class Judged(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The verdict on one candidate, whatever was compared; `reason` is the likeliest cause.

    `smoke`: asked for, or too few cases to show a rate under 2 per cent. `quantities` are in the
    order of cause; `not_measured` says what could not be gated and why.
    """

    schema: int
    candidate: str
    reference: str
    verdict: Verdict
    reasons: tuple[str, ...]
    smoke: bool
    patients: int
    needed: int | None
    quantities: tuple[Quantity, ...]
    not_measured: dict[str, str] = {}

    def counted(self) -> tuple[int, str]:
        """How many cases were compared, and what a case is."""
        raise NotImplementedError

    @property
    def reason(self) -> str:
        """What decided, the likeliest cause first."""
        return self.reasons[0]

    @property
    def label(self) -> str:
        """The verdict as every output names it."""
        return f"{self.verdict} (smoke test)" if self.smoke else self.verdict

    def quantity(self, name: str) -> Quantity:
        """The quantity called `name`. Raises KeyError."""
        for quantity in self.quantities:
            if quantity.name == name:
                return quantity
        raise KeyError(name)


class GateReport(Judged, frozen=True, kw_only=True):
    """The verdict on a captioner."""

    images: int
    margins: Gate

    def counted(self) -> tuple[int, str]:
        """See `Judged.counted`."""
        return self.images, "images"
