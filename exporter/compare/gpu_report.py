"""How a GPU's figures are shown, and how each was measured."""

from __future__ import annotations

from collections.abc import Sequence

from exporter.compare import html
from exporter.compare.gpu import GpuUse
from exporter.compare.records import Row
from exporter.compare.wording import DASH, megabytes, number

HEADER = (
    "model", "process MB", "GPU growth MB", "torch peak MB", "torch reserved MB", "W", "J", "J/token",
)  # fmt: skip


def gpu_use(row: Row) -> GpuUse | None:
    """The GPU's side of a row; None for one that ran on the CPU."""
    return row.memory.gpu if row.memory else None


def held_on_gpu(row: Row) -> int | None:
    """Bytes that the model's process held on the GPU: NVML's figure, else the GPU's growth."""
    use = gpu_use(row)
    if use is None:
        return None
    return use.device if use.process is None else use.process


def gpu_table(rows: Sequence[Row]) -> str:
    """The figures as an HTML table; empty where no model ran on a GPU."""
    cells = [
        (
            row.name,
            *(megabytes(v) for v in (use.process, use.device, use.allocated, use.reserved)),
            number(use.watts, 0),
            number(use.joules),
            number(use.joules_per_token, 2),
        )
        for row in rows
        if (use := gpu_use(row))
    ]
    return html.table("On the GPU: medians over the processes", HEADER, cells) if cells else ""


def gpu_note(row: Row) -> str:
    """One line for the terminal; empty for a row without GPU figures."""
    use = gpu_use(row)
    if use is None:
        return ""
    held = megabytes(held_on_gpu(row))
    parts = [f"{held} MB {'by NVML' if use.process is not None else 'more of the GPU used'}"]
    if use.allocated is not None:
        parts.append(
            f"torch's peak {megabytes(use.allocated)} MB, {megabytes(use.reserved)} reserved"
        )
    if use.watts is not None:
        parts.append(f"{number(use.watts, 0)} W, {number(use.joules_per_token, 2)} J a token")
    return f"{row.name} on the GPU: {', '.join(parts)}."


def gpu_method(rows: Sequence[Row]) -> dict[str, str]:
    """How the figures were measured; nothing where no model ran on a GPU."""
    used = [u for row in rows if (u := gpu_use(row))]
    if not used:
        return {}
    hidden = any(u.process is None for u in used)
    silent = any(u.joules is None for u in used)
    return {
        "gpu": (
            "memory of the process by NVML at its end; growth: the GPU's used memory less what was "
            "used before the model was loaded, other processes included; torch's peaks are of the "
            "whole process; energy of the whole board by its counter while captioning"
            + (f"; the driver hides a process's memory ({DASH})" if hidden else "")
            + (f"; the board has no energy counter ({DASH})" if silent else "")
        )
    }
