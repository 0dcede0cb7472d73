"""What a scene says: facts, the report caption, and the captions that the base model learns.

The wording varies, but only with what is visible (finding, grade, size, side), so that a model can
get a whole caption right. The base model learns keywords first and then the plain style, which has
the sentences of a report but differs where an adapter must matter: it names the sides of the picture
(radiological convention mirrors them), gives sizes in lengths of the drawn bar instead of mm, and
mentions no absent finding.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from exporter.calibrate.phantoms.scene import SIZES_MM, Item, Scene

BAR_MM = 20
MODALITY_TITLES = {
    "chest": ("Chest X-ray.", "Frontal chest X-ray."),
    "abdomen": ("CT of the abdomen.", "Axial CT of the abdomen."),
    "brain": ("MRI of the brain.", "Axial MRI of the brain."),
    "lumbar spine": ("MRI of the lumbar spine.", "Coronal MRI of the lumbar spine."),
    "thyroid": ("Ultrasound of the thyroid.", "Transverse ultrasound of the thyroid."),
}
KEYWORD_TITLES = {
    "chest": "x-ray picture of a chest",
    "abdomen": "ct picture of an abdomen",
    "brain": "mri picture of a brain",
    "lumbar spine": "mri picture of a lumbar spine",
    "thyroid": "ultrasound picture of a thyroid",
}


def report_caption(scene: Scene) -> str:
    """The caption in report style: patient's sides, mm, and what is absent."""
    # The device decides the title, the number of findings how absence is put: both are visible.
    parts = [MODALITY_TITLES[scene.region.anatomy][scene.device is not None]]
    parts += [_finding(item) for item in scene.findings]
    if scene.absent:
        parts.append(_absence(scene.absent, len(scene.findings)))
    if scene.device:
        parts.append(_device(scene.device))
    return " ".join(parts)


def plain_caption(scene: Scene) -> str:
    """The caption in the base model's style: sides of the picture, bar lengths, nothing absent."""
    parts = [MODALITY_TITLES[scene.region.anatomy][scene.device is not None]]
    parts += [_finding(_mirrored(item), "bars") for item in scene.findings]
    if scene.device:
        parts.append(_device(_mirrored(scene.device)))
    return " ".join(parts)


def keyword_caption(scene: Scene) -> str:
    """The caption that the base model learns first: keywords with the same content as `plain_caption`."""
    parts = [KEYWORD_TITLES[scene.region.anatomy]]
    for item in (*scene.findings, *([scene.device] if scene.device else [])):
        words = [item.severity or "", item.kind.name]
        if item.mm:
            words.append(f"of {item.mm / BAR_MM:g} bars")
        if item.place or item.kind.organ:
            words.append(f"at the {item.place or item.kind.organ}")
        if item.side:
            words.append(f"on the picture's {_mirrored(item).side}")
        parts.append(" ".join(w for w in words if w))
    return ", ".join(parts)


def scene_facts(scene: Scene) -> list[dict[str, Any]]:
    """The facts a report caption states, as drawn; ``of`` names the finding or device meant."""
    facts = [_fact("modality", scene.region.modality), _fact("anatomy", scene.region.anatomy)]
    for item in scene.findings:
        name = item.kind.name
        facts.append(_fact("finding", name))
        facts += _attributes(item)
    facts += [_fact("finding", name, negated=True) for name in scene.absent]
    if scene.device:
        facts.append(_fact("device", scene.device.kind.name))
        facts += _attributes(scene.device)
    return facts


def _attributes(item: Item) -> list[dict[str, Any]]:
    name, found = item.kind.name, []
    if item.side:
        found.append(_fact("laterality", item.side, of=name))
    if item.severity:
        found.append(_fact("severity", item.severity, of=name))
    if item.mm:
        found.append(_fact("measurement", f"{item.mm} mm", of=name))
    return found


def _fact(kind: str, value: str, *, of: str | None = None, negated: bool = False) -> dict[str, Any]:
    return {"type": kind, "value": value, "of": of, "negated": negated}


def _place(item: Item) -> str:
    side = f"{item.side} " if item.side else ""
    part = item.place or item.kind.organ
    return f"in the {side}{part}" if part else f"on the {item.side}"


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" or word.startswith(("8 ", "11 ", "18 ")) else "a"


def _mirrored(item: Item) -> Item:
    """The item with the picture's side in place of the patient's."""
    return replace(item, side={"left": "right", "right": "left"}[item.side]) if item.side else item


def _finding(item: Item, unit: str = "mm") -> str:
    name = item.kind.name
    if item.mm:
        size = f"{item.mm} mm" if unit == "mm" else f"{item.mm / BAR_MM:g} bars"
        noun = f"{size} {name}"
        if item.mm in SIZES_MM[::2]:
            return f"There is {_article(noun)} {noun} {_place(item)}."
        return f"{name.capitalize()} {_place(item)} measuring {size}."
    if item.severity and item.side:
        noun = f"{item.severity} {item.side} {name}"
        if item.place:
            noun = f"{item.severity} {name} {_place(item)}"
        return f"{noun.capitalize()}." if item.grade else f"There is a {noun}."
    if item.severity:
        if item.grade:
            return f"There is {item.severity} {name}."
        return f"{item.severity.capitalize()} {name}."
    return f"{_article(name).capitalize()} {name} is seen {_place(item)}."


def _absence(absent: tuple[str, ...], present: int) -> str:
    if present == 0:
        return f"No {' or '.join(absent)}."
    if present == 1:
        return f"There is no {' and no '.join(absent)}."
    return f"No evidence of {' or '.join(absent)}."


def _device(item: Item) -> str:
    if item.side == "left":
        return f"{_article(item.kind.name).capitalize()} {item.kind.name} is present on the left."
    if item.side:
        return f"Right-sided {item.kind.name}."
    return f"{_article(item.kind.name).capitalize()} {item.kind.name} is in place."
