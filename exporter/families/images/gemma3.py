"""Images of Gemma 3 with Pillow and numpy: one view of a fixed size, no torch, no transformers.

Computes bit for bit what transformers' ``Gemma3ImageProcessorPil`` (5.x) computes without pan and scan.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image

from exporter.core.errors import InputRefused
from exporter.families.images.clip import ClipImageSettings, read_clip_settings

# Defaults of transformers' class.
DEFAULTS = {
    "size": {"height": 224, "width": 224},
    "resample": int(Image.Resampling.BILINEAR),
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def read_gemma3_settings(raw: Mapping[str, Any], where: str) -> ClipImageSettings:
    """Settings from a parsed preprocessor_config.json; absent and null keys take the defaults.

    Raises `InputRefused` naming `where` on wrong types, sizes that no image could have, and pan and
    scan (further crops of long images), which is not built.
    """
    if raw.get("do_pan_and_scan"):
        raise InputRefused(
            f"{where}: do_pan_and_scan is {raw['do_pan_and_scan']!r}; crops of long images are not "
            "supported, set it to false"
        )
    given = {key: value for key, value in raw.items() if value is not None}
    return read_clip_settings({**DEFAULTS, **given, "do_center_crop": False}, where)
