"""From a scene to a picture: one function per body region, one for every device."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from exporter.calibrate.phantoms import body, organs
from exporter.calibrate.phantoms.canvas import Canvas
from exporter.calibrate.phantoms.scene import Patient, Scene
from exporter.calibrate.phantoms.stream import Stream

Painter = Callable[[Canvas, Scene, Patient, Stream], None]

PAINTERS: dict[str, Painter] = {
    "chest": body.chest,
    "abdomen": body.abdomen,
    "brain": body.brain,
    "lumbar spine": organs.lumbar_spine,
    "thyroid": organs.thyroid,
}


def _scale_bar(canvas: Canvas) -> None:
    """A white bar 20 mm long near the lower left corner."""
    mm_u = canvas.px_per_mm / canvas.width
    low = 1.0 - 3.0 * canvas.px_per_mm / canvas.height
    canvas.paint(canvas.line((3 * mm_u, low), (23 * mm_u, low), 1.6), 255.0)


def draw(scene: Scene, patient: Patient, stream: Stream) -> NDArray[np.uint8]:
    """The picture of a scene, uint8 [scene.height, scene.width].

    Raises ``KeyError`` for a body region that nobody can paint.
    """
    canvas = Canvas(scene.height, scene.width)
    PAINTERS[scene.region.anatomy](canvas, scene, patient, stream)
    canvas.pixels *= patient.gain
    canvas.add(stream.grain(scene.height, scene.width), patient.noise)
    _scale_bar(canvas)
    return canvas.gray()
