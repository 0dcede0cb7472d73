"""Painters for chest X-ray, abdominal CT and brain MRI.

All coordinates are fractions of the picture; the patient's left is on the picture's right
(``Item.x_sign``).
"""

from exporter.calibrate.phantoms.canvas import Canvas, Mask
from exporter.calibrate.phantoms.scene import Item, Patient, Scene
from exporter.calibrate.phantoms.stream import Stream


def _lungs(canvas: Canvas, middle: float, girth: float) -> dict[int, Mask]:
    return {
        sign: canvas.ellipse(middle + sign * 0.225 * girth, 0.5, 0.17 * girth, 0.36)
        for sign in (-1, 1)
    }


def _chest_finding(canvas: Canvas, item: Item, lung: Mask, middle: float, stream: Stream) -> None:
    sign, grade = item.x_sign, item.grade or 0
    if item.kind.name == "consolidation":
        reach = (0.62, 0.47, 0.12)[grade]
        patch = lung * (canvas.v > reach) * (canvas.v < 0.78)
        speckle = stream.grain(canvas.height, canvas.width)
        canvas.paint(patch, 150.0, 0.9)
        canvas.add(patch * speckle, 70.0)
    elif item.kind.name == "pleural effusion":
        level = (0.72, 0.58, 0.42)[grade]
        canvas.paint(lung * (canvas.v > level), 225.0)
    elif item.kind.name == "pneumothorax":
        depth = (0.24, 0.46)[grade] * 0.34
        rim = middle + sign * (0.225 + 0.17 - depth)
        outer = (canvas.u - rim) * sign > 0
        canvas.paint(lung * outer, 0.0)
        canvas.paint(canvas.line((rim, 0.2), (rim, 0.8), 1.5) * lung, 235.0)
    else:
        spot = canvas.disc(
            middle + sign * stream.between(0.19, 0.25), stream.between(0.3, 0.4), item.mm or 0
        )
        canvas.paint(spot, 240.0)


def _chest_device(canvas: Canvas, item: Item, middle: float) -> None:
    sign = item.x_sign
    if item.kind.name == "pacemaker":
        u = middle + sign * 0.36
        canvas.paint(canvas.box(u - 0.055, 0.1, u + 0.055, 0.2), 255.0)
        canvas.paint(canvas.line((u, 0.2), (middle + 0.05, 0.62), 1.6), 255.0)
    elif item.kind.name == "endotracheal tube":
        for edge in (-0.018, 0.018):
            canvas.paint(canvas.line((middle + edge, 0.0), (middle + edge, 0.36), 1.4), 255.0)
    else:
        bend = (middle + sign * 0.06, 0.16)
        canvas.paint(canvas.line((middle + sign * 0.3, 0.02), bend, 1.5), 255.0)
        canvas.paint(canvas.line(bend, (middle + sign * 0.06, 0.5), 1.5), 255.0)


def chest(canvas: Canvas, scene: Scene, patient: Patient, stream: Stream) -> None:
    """A frontal chest radiograph: dark lungs, ribs, spine, heart towards the patient's left."""
    middle = 0.5 + patient.shift
    canvas.paint(canvas.ellipse(middle, 0.55, 0.47 * patient.girth, 0.56, 4.0), 125.0)
    lungs = _lungs(canvas, middle, patient.girth)
    for lung in lungs.values():
        canvas.paint(lung, 48.0)
        for rib in range(7):
            v = 0.2 + 0.095 * rib
            canvas.paint(canvas.line((0.1, v + 0.03), (0.9, v), 1.6) * lung, 82.0)
    canvas.paint(canvas.box(middle - 0.035, 0.0, middle + 0.035, 1.0), 165.0, 0.7)
    canvas.paint(canvas.ellipse(middle + 0.06, 0.66, 0.13, 0.15, 2.0), 170.0)
    for item in reversed(scene.findings):
        _chest_finding(canvas, item, lungs[item.x_sign], middle, stream)
    if scene.device is not None:
        _chest_device(canvas, scene.device, middle)


def _abdomen_finding(canvas: Canvas, item: Item, middle: float, stream: Stream) -> None:
    sign = item.x_sign
    if item.kind.name == "kidney stone":
        canvas.paint(canvas.disc(middle + sign * 0.19, 0.72, 5.0), 255.0)
    elif item.kind.name == "cyst":
        u, v = middle + sign * stream.between(0.24, 0.28), stream.between(0.56, 0.62)
        canvas.paint(canvas.disc(u, v, (item.mm or 0) + 2.5), 235.0)
        canvas.paint(canvas.disc(u, v, item.mm or 0), 12.0)
    elif item.kind.name == "lesion":
        spot = canvas.disc(middle - stream.between(0.15, 0.23), 0.31, item.mm or 0)
        canvas.paint(spot, 62.0)


def _ascites(canvas: Canvas, grade: int, middle: float, girth: float) -> None:
    thickness = (0.05, 0.1, 0.16)[grade]
    whole = canvas.ellipse(middle, 0.5, 0.43 * girth, 0.42)
    inner = canvas.ellipse(middle, 0.5 + thickness, 0.43 * girth - thickness, 0.42 - thickness / 2)
    canvas.paint(whole * (1.0 - inner) * (canvas.v < 0.72), 40.0)


def _abdomen_device(canvas: Canvas, item: Item, middle: float) -> None:
    if item.kind.name == "aortic stent":
        canvas.paint(canvas.disc(middle, 0.6, 13.0), 255.0)
        canvas.paint(canvas.disc(middle, 0.6, 8.0), 90.0)
        return
    sign = item.x_sign
    tip = (middle + sign * 0.13, 0.47)
    canvas.paint(canvas.line((middle + sign * 0.5, 0.4), tip, 2.2), 255.0)
    canvas.paint(canvas.disc(*tip, 8.0), 255.0)
    canvas.paint(canvas.disc(*tip, 3.5), 60.0)


def abdomen(canvas: Canvas, scene: Scene, patient: Patient, stream: Stream) -> None:
    """An axial CT: fat ring, liver on the patient's right, spine, aorta, two kidneys."""
    middle, girth = 0.5 + patient.shift, patient.girth
    canvas.paint(canvas.ellipse(middle, 0.5, 0.47 * girth, 0.47), 70.0)
    canvas.paint(canvas.ellipse(middle, 0.5, 0.43 * girth, 0.42), 112.0)
    canvas.paint(canvas.ellipse(middle - 0.19, 0.33, 0.21 * girth, 0.2), 160.0)
    canvas.paint(canvas.ellipse(middle + 0.2, 0.3, 0.12, 0.11), 88.0)
    for item in scene.findings:
        if item.kind.name == "ascites":
            _ascites(canvas, item.grade or 0, middle, girth)
    canvas.paint(canvas.ellipse(middle, 0.78, 0.075, 0.1), 235.0)
    canvas.paint(canvas.disc(middle, 0.6, 10.0), 170.0)
    for sign in (-1, 1):
        canvas.paint(canvas.ellipse(middle + sign * 0.22, 0.68, 0.085, 0.12), 185.0)
    for item in scene.findings:
        _abdomen_finding(canvas, item, middle, stream)
    if scene.device is not None:
        _abdomen_device(canvas, scene.device, middle)


def _brain_finding(canvas: Canvas, item: Item, middle: float, stream: Stream) -> None:
    front = item.place == "frontal lobe"
    u = middle + item.x_sign * stream.between(0.19, 0.22)
    v = stream.between(0.27, 0.3) if front else stream.between(0.68, 0.72)
    if item.kind.name == "mass":
        canvas.paint(canvas.disc(u, v, (item.mm or 0) + 3.0), 25.0)
        canvas.paint(canvas.disc(u, v, item.mm or 0), 245.0)
    elif item.kind.name == "infarct":
        radius = (0.06, 0.13)[item.grade or 0]
        canvas.paint(canvas.ellipse(u, v, radius * 1.25, radius, 3.0), 30.0)


def brain(canvas: Canvas, scene: Scene, patient: Patient, stream: Stream) -> None:
    """An axial brain: bright scalp, dark skull, gray brain, ventricles, midline."""
    middle, girth = 0.5 + patient.shift, patient.girth
    canvas.paint(canvas.ellipse(middle, 0.5, 0.46 * girth, 0.475), 215.0)
    canvas.paint(canvas.ellipse(middle, 0.5, 0.43 * girth, 0.445), 12.0)
    canvas.paint(canvas.ellipse(middle, 0.5, 0.4 * girth, 0.415), 128.0)
    folds = stream.grain(canvas.height, canvas.width)
    canvas.add(folds * canvas.ellipse(middle, 0.5, 0.4 * girth, 0.415), 14.0)
    canvas.paint(canvas.line((middle, 0.1), (middle, 0.9), 1.3), 60.0)
    widths = [0.028]
    widths += [
        (0.055, 0.085, 0.12)[item.grade or 0]
        for item in scene.findings
        if item.kind.name == "hydrocephalus"
    ]
    for item in scene.findings:
        _brain_finding(canvas, item, middle, stream)
    wide = widths[-1]
    for sign in (-1, 1):
        canvas.paint(canvas.ellipse(middle + sign * (0.02 + wide), 0.48, wide, 0.1 + wide), 200.0)
        canvas.paint(canvas.ellipse(middle + sign * (0.02 + wide), 0.48, wide * 0.55, 0.08), 225.0)
    if scene.device is not None:
        sign = scene.device.x_sign
        tip = (middle + sign * 0.05, 0.46)
        canvas.paint(canvas.line((middle + sign * 0.47, 0.3), tip, 3.6), 0.0)
        canvas.paint(canvas.line((middle + sign * 0.47, 0.3), tip, 1.8), 255.0)
