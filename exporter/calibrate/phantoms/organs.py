"""Painters for the tall and the wide pictures: lumbar spine MRI and thyroid ultrasound."""

from exporter.calibrate.phantoms.canvas import Canvas
from exporter.calibrate.phantoms.scene import Item, Patient, Scene
from exporter.calibrate.phantoms.stream import Stream

_VERTEBRAE = 5


def _spine_finding(canvas: Canvas, item: Item, middle: float, stream: Stream) -> None:
    sign = item.x_sign
    if item.kind.name == "cyst":
        u, v = middle + sign * 0.3, stream.between(0.36, 0.64)
        canvas.paint(canvas.disc(u, v, (item.mm or 0) + 2.5), 20.0)
        canvas.paint(canvas.disc(u, v, item.mm or 0), 250.0)
    elif item.kind.name == "disc herniation":
        v = 0.1 + 0.16 * (1 + int(stream.unit() * 4)) + 0.0
        reach = (0.1, 0.17, 0.26)[item.grade or 0]
        u = middle + sign * (0.17 + reach / 2)
        canvas.paint(canvas.ellipse(u, v, reach / 2 + 0.04, 0.026), 0.0)


def lumbar_spine(canvas: Canvas, scene: Scene, patient: Patient, stream: Stream) -> None:
    """A coronal lumbar spine: five bright vertebrae, dark discs, psoas muscles at both sides."""
    middle, girth = 0.5 + patient.shift, patient.girth
    canvas.pixels += 95.0
    for sign in (-1, 1):
        canvas.paint(canvas.ellipse(middle + sign * 0.3, 0.55, 0.15 * girth, 0.42, 2.0), 62.0)
    canvas.paint(canvas.box(middle - 0.19, 0.03, middle + 0.19, 0.97), 75.0)
    crushed = [
        (int(stream.unit() * _VERTEBRAE), item.grade or 0)
        for item in scene.findings
        if item.kind.name == "compression fracture"
    ]
    for level in range(_VERTEBRAE):
        top, bottom = 0.115 + 0.16 * level, 0.245 + 0.16 * level
        shade = 180.0
        for broken, grade in crushed:
            if broken == level:
                top, shade = top + (0.045, 0.09)[grade], 235.0
        canvas.paint(canvas.box(middle - 0.17, top, middle + 0.17, bottom), shade)
    for item in reversed(scene.findings):
        _spine_finding(canvas, item, middle, stream)
    if scene.device is not None:
        sign = scene.device.x_sign
        for level in (1, 3):
            v = 0.18 + 0.16 * level
            tail = (middle + sign * 0.42, v - 0.02)
            canvas.paint(canvas.line((middle + sign * 0.02, v), tail, 3.4), 0.0)
            canvas.paint(canvas.line((middle + sign * 0.02, v), tail, 1.6), 255.0)


def _thyroid_finding(canvas: Canvas, item: Item, middle: float, stream: Stream) -> None:
    sign = item.x_sign
    u, v = middle + sign * stream.between(0.24, 0.28), stream.between(0.48, 0.54)
    if item.kind.name == "nodule":
        canvas.paint(canvas.disc(u, v, (item.mm or 0) + 3.0), 30.0)
        canvas.paint(canvas.disc(u, v, item.mm or 0), 225.0)
    elif item.kind.name == "cyst":
        canvas.paint(canvas.disc(u, v, (item.mm or 0) + 2.5), 215.0)
        canvas.paint(canvas.disc(u, v, item.mm or 0), 0.0)
    elif item.kind.name == "calcification":
        for du, dv in ((-0.03, 0.0), (0.0, 0.05), (0.03, -0.01)):
            canvas.paint(canvas.disc(middle + sign * 0.38 + du, 0.42 + dv, 3.6), 255.0)


def thyroid(canvas: Canvas, scene: Scene, patient: Patient, stream: Stream) -> None:
    """A transverse ultrasound: speckle, dark trachea in the middle, a lobe at either side."""
    middle = 0.5 + patient.shift
    canvas.pixels += 58.0
    canvas.paint(canvas.box(-1.0, -1.0, 2.0, 0.09), 135.0)
    swollen = [item.grade or 0 for item in scene.findings if item.kind.name == "goiter"]
    height = (0.3, 0.36, 0.42)[swollen[0]] if swollen else 0.24
    width = 0.19 if swollen else 0.17
    for sign in (-1, 1):
        lobe = canvas.ellipse(middle + sign * 0.26, 0.54, width * patient.girth, height)
        canvas.paint(lobe, 128.0)
    canvas.paint(canvas.box(middle - 0.12, 0.48, middle + 0.12, 0.6), 128.0)
    canvas.paint(canvas.ellipse(middle, 0.74, 0.085, 0.2), 205.0)
    canvas.paint(canvas.ellipse(middle, 0.76, 0.065, 0.17), 6.0)
    speckle = stream.grain(canvas.height, canvas.width)
    canvas.pixels *= 1.0 + 0.45 * speckle
    for item in scene.findings:
        _thyroid_finding(canvas, item, middle, stream)
    if scene.device is not None:
        sign = scene.device.x_sign
        start, tip = (middle + sign * 0.49, 0.1), (middle + sign * 0.2, 0.42)
        canvas.paint(canvas.line(start, tip, 3.4), 0.0)
        canvas.paint(canvas.line(start, tip, 1.8), 255.0)
