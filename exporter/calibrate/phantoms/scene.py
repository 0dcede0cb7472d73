"""What is on a phantom: patient, study, findings, devices, and how they are chosen."""

from dataclasses import dataclass

from exporter.calibrate.phantoms.stream import Stream

SIZES_MM = (8, 12, 17, 25, 36)
"""Diameters of measured findings; neighbours differ by about a half."""
SIDES = ("left", "right")
MILD = ("mild", "moderate", "severe")
SMALL = ("small", "moderate", "large")


@dataclass(frozen=True)
class Kind:
    """A kind of finding or device: what varies about it.

    ``group``: of each group at most one finding is on an image. ``grades``: words for severity,
    mildest first. ``places``: parts of the organ it can lie in.
    """

    name: str
    group: int = 0
    sided: bool = False
    measured: bool = False
    grades: tuple[str, ...] = ()
    organ: str | None = None
    places: tuple[str, ...] = ()


@dataclass(frozen=True)
class Region:
    """A body region as one modality shows it, with all that can be found there."""

    modality: str
    anatomy: str
    findings: tuple[Kind, ...]
    devices: tuple[Kind, ...]
    commented: tuple[str, ...]
    aspects: tuple[float, ...]
    """Width divided by height."""


@dataclass(frozen=True)
class Item:
    """A finding or a device as drawn. ``side`` is the patient's own side."""

    kind: Kind
    side: str | None = None
    grade: int | None = None
    mm: int | None = None
    place: str | None = None

    @property
    def severity(self) -> str | None:
        """The word for the grade, or None for a finding that has no grades."""
        return None if self.grade is None else self.kind.grades[self.grade]

    @property
    def x_sign(self) -> int:
        """-1 for the picture's left half, 1 for its right half: radiological convention."""
        return 1 if self.side == "left" else -1


@dataclass(frozen=True)
class Patient:
    """A patient and the traits that all of the patient's images share."""

    name: str
    girth: float
    noise: float
    gain: float
    shift: float


@dataclass(frozen=True)
class Scene:
    """Everything that a phantom shows; ``absent`` are the commented findings that are not there."""

    region: Region
    findings: tuple[Item, ...]
    device: Item | None
    absent: tuple[str, ...]
    height: int
    width: int


REGIONS = (
    Region(
        "x-ray",
        "chest",
        (
            Kind("nodule", 0, sided=True, measured=True, organ="lung"),
            Kind("consolidation", 1, sided=True, grades=MILD, organ="lung"),
            Kind("pleural effusion", 1, sided=True, grades=SMALL),
            Kind("pneumothorax", 1, sided=True, grades=("small", "large")),
        ),
        (
            Kind("pacemaker", sided=True),
            Kind("endotracheal tube"),
            Kind("central venous catheter", sided=True),
        ),
        ("pneumothorax", "pleural effusion"),
        (0.82, 0.9, 1.0, 1.12),
    ),
    Region(
        "ct",
        "abdomen",
        (
            Kind("cyst", 0, sided=True, measured=True, organ="kidney"),
            Kind("lesion", 0, measured=True, organ="liver"),
            Kind("kidney stone", 1, sided=True, organ="kidney"),
            Kind("ascites", 1, grades=MILD),
        ),
        (Kind("drainage catheter", sided=True), Kind("aortic stent")),
        ("ascites", "kidney stone"),
        (1.12, 1.25, 1.36),
    ),
    Region(
        "mri",
        "brain",
        (
            Kind("mass", 0, sided=True, measured=True, places=("frontal lobe", "occipital lobe")),
            Kind(
                "infarct",
                0,
                sided=True,
                grades=("small", "large"),
                places=("frontal lobe", "occipital lobe"),
            ),
            Kind("hydrocephalus", 1, grades=MILD),
        ),
        (Kind("ventricular shunt", sided=True),),
        ("hydrocephalus",),
        (0.8, 0.88, 1.0),
    ),
    Region(
        "mri",
        "lumbar spine",
        (
            Kind("cyst", 0, sided=True, measured=True, organ="psoas muscle"),
            Kind("disc herniation", 1, sided=True, grades=MILD),
            Kind("compression fracture", 1, grades=("mild", "severe")),
        ),
        (Kind("pedicle screw", sided=True),),
        ("compression fracture", "disc herniation"),
        (0.46, 0.5),
    ),
    Region(
        "ultrasound",
        "thyroid",
        (
            Kind("nodule", 0, sided=True, measured=True, organ="thyroid lobe"),
            Kind("cyst", 0, sided=True, measured=True, organ="thyroid lobe"),
            Kind("calcification", 1, sided=True, organ="thyroid lobe"),
            Kind("goiter", 1, grades=MILD),
        ),
        (Kind("biopsy needle", sided=True),),
        ("calcification", "goiter"),
        (1.3, 2.0, 2.15),
    ),
)


def region_of(modality: str, stream: Stream) -> Region:
    """A region that the modality shows; raises ``IndexError`` for an unknown modality."""
    return stream.pick([region for region in REGIONS if region.modality == modality])


def new_patient(name: str, stream: Stream) -> Patient:
    """A patient with drawn traits."""
    return Patient(
        name=name,
        girth=stream.between(0.93, 1.05),
        noise=stream.between(4.0, 11.0),
        gain=stream.between(0.92, 1.08),
        shift=stream.between(-0.02, 0.02),
    )


def _item(kind: Kind, stream: Stream) -> Item:
    return Item(
        kind=kind,
        side=stream.pick(SIDES) if kind.sided else None,
        grade=int(stream.unit() * len(kind.grades)) if kind.grades else None,
        mm=stream.pick(SIZES_MM) if kind.measured else None,
        place=stream.pick(kind.places) if kind.places else None,
    )


def new_scene(region: Region, stream: Stream) -> Scene:
    """Draw what an image of ``region`` shows: up to one finding per group and up to one device."""
    findings: list[Item] = []
    for group, share in ((0, 0.66), (1, 0.56)):
        kinds = [kind for kind in region.findings if kind.group == group]
        if stream.chance(share):
            findings.append(_item(stream.pick(kinds), stream))
    device = _item(stream.pick(region.devices), stream) if stream.chance(0.4) else None
    seen = {item.kind.name for item in findings}
    long_edge, aspect = stream.pick((112, 128, 144)), stream.pick(region.aspects)
    return Scene(
        region=region,
        findings=tuple(findings),
        device=device,
        absent=tuple(name for name in region.commented if name not in seen),
        height=long_edge if aspect < 1 else round(long_edge / aspect),
        width=long_edge if aspect >= 1 else round(long_edge * aspect),
    )
