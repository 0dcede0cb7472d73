"""Optimization profiles as export.json states them, checked and given to TensorRT."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from exporter.core.errors import InputRefused
from exporter.core.modelfiles import read_json
from exporter.runtimes.trt import PARTS
from exporter.runtimes.trt_decoder import MASK, PAST, PROFILES, bucket

AGAIN = "export again with `--dialect standard` by this medexport"


class Shapes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Least, likely and greatest shape of an input; with `values` the numbers in it instead."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]
    values: bool = False


Profile = Mapping[str, Shapes]
PartProfiles = Mapping[str, Profile]


def read_profiles(export_record: Path) -> dict[str, PartProfiles]:
    """Profiles by part (a graph's stem) and name, in the order in which engines have them.

    Raises `InputRefused` when the file is of another dialect, lacks a part or contradicts itself.
    """
    found = read_json(export_record)
    standard = found.get("standard")
    if found.get("dialect") != "standard" or not isinstance(standard, dict):
        raise InputRefused(
            f"{export_record}: dialect '{found.get('dialect')}'; TensorRT needs 'standard': {AGAIN}"
        )
    try:
        profiles = msgspec.convert(
            standard.get("profiles"), dict[str, dict[str, dict[str, Shapes]]]
        )
    except msgspec.ValidationError as error:
        raise InputRefused(f"{export_record}: standard.profiles: {error}; {AGAIN}") from error
    if lost := [p for p in PARTS if not profiles.get(p)]:
        raise InputRefused(
            f"{export_record}: no optimization profiles of '{lost[0]}'; they are measured with the "
            f"model's own tokenizer: {AGAIN}"
        )
    ordered = {part: _ordered(export_record, part, profiles[part]) for part in PARTS}
    for problem in problems(ordered):
        raise InputRefused(f"{export_record}: {problem}; {AGAIN}")
    return ordered


def problems(profiles: Mapping[str, PartProfiles]) -> Iterator[str]:
    """What no engine could be built with: ranks that differ, least above likely above greatest, a
    likely past that no text has.
    """
    for part, named in profiles.items():
        for name, inputs in named.items():
            for tensor, shapes in inputs.items():
                rows = list(zip(shapes.min, shapes.opt, shapes.max, strict=False))
                same = len(shapes.min) == len(shapes.opt) == len(shapes.max)
                if not same or not all(0 <= low <= likely <= high for low, likely, high in rows):
                    yield (
                        f"profile '{name}' of {part}: {tensor} from {list(shapes.min)} over "
                        f"{list(shapes.opt)} to {list(shapes.max)}"
                    )


def tuned(profile: Profile) -> Profile:
    """The decoder's profile for one token, tuned for a past of the length that the runtime gives it.

    The runtime decodes with pasts of whole buckets (`trt_decoder.bucket`), never of the prompt's
    own length.
    """
    pasts = {n: s for n, s in profile.items() if n.startswith(PAST)}
    if not pasts:
        return profile
    first = next(iter(pasts.values()))
    places = bucket(first.opt[2] + 1, first.max[2])
    changed = {
        n: msgspec.structs.replace(s, opt=(*s.opt[:2], places, *s.opt[3:]))
        for n, s in pasts.items()
    }
    mask = msgspec.structs.replace(profile[MASK], opt=(profile[MASK].opt[0], places + 1))
    return {**profile, **changed, MASK: mask}


def add_profiles(trt_builder: Any, config: Any, network: Any, profiles: PartProfiles) -> None:
    """Give `profiles` to a builder config, in their order.

    Raises `InputRefused` when they are not for this network's inputs, or TensorRT refuses one.
    """
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    shape_inputs = {i.name for i in inputs if i.is_shape_tensor}
    for name, shapes in profiles.items():
        if shapes.keys() != {i.name for i in inputs}:
            raise InputRefused(
                f"profile '{name}' is for the inputs {sorted(shapes)}, the graph has "
                f"{sorted(i.name for i in inputs)}; {AGAIN}"
            )
        profile = trt_builder.create_optimization_profile()
        for tensor, found in shapes.items():
            if tensor in shape_inputs and not found.values:
                raise InputRefused(
                    f"profile '{name}': shapes follow from the values of {tensor}, and it has no range "
                    f"of values; {AGAIN}"
                )
            if found.values and tensor not in shape_inputs:
                continue  # a number that only takes part in the computation has no range
            set_range = profile.set_shape_input if found.values else profile.set_shape
            try:
                set_range(tensor, found.min, found.opt, found.max)
            except ValueError as error:
                raise InputRefused(f"profile '{name}': {tensor}: {error}; {AGAIN}") from error
        if config.add_optimization_profile(profile) < 0:
            raise InputRefused(f"TensorRT does not take the profile '{name}'; {AGAIN}")


def _ordered(path: Path, part: str, named: PartProfiles) -> PartProfiles:
    if set(named) == set(PROFILES):
        prefill, decode = (named[name] for name in PROFILES)
        return {PROFILES[0]: prefill, PROFILES[1]: tuned(decode)}
    if len(named) != 1 or part == PARTS[-1]:
        expected = " and ".join(PROFILES) if part == PARTS[-1] else "one"
        raise InputRefused(
            f"{path}: profiles {sorted(named)} of {part}; expected {expected}; {AGAIN}"
        )
    return named
