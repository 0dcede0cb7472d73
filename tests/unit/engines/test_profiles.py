"""Optimization profiles: consistent, wide enough for what the model's own preparer makes, refused if not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.core.errors import InputRefused
from exporter.engines.profiles import Shapes, problems, read_profiles, tuned
from exporter.families.table import family_of
from exporter.runtimes.trt import PARTS
from exporter.runtimes.trt_decoder import BUCKET, MASK, PAST, bucket
from tests.support.tensorrt_site import PROMPT, pictures, write_standard
from tests.support.tiny_llava import write_tiny_llava


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    return write_standard(
        write_tiny_llava(folder / "model", kind="llava_next"), folder / "exported"
    )


def inside(shape: tuple[int, ...], allowed: Shapes) -> bool:
    pairs = zip(allowed.min, shape, allowed.max, strict=True)
    return all(low <= size <= high for low, size, high in pairs)


@pytest.mark.parametrize("name", ["exported", "llava"])
def test_profiles_cover_what_real_prompts_make(name: str, request: Any) -> None:
    folder: Path = request.getfixturevalue(name)
    config = json.loads((folder / "model" / "config.json").read_text())
    preparer = family_of(config).open_preparer(folder / "model")
    profiles = read_profiles(folder / "export.json")
    assert tuple(profiles) == PARTS
    assert list(problems(profiles)) == []
    (vision,), (embed,) = (profiles[p].values() for p in PARTS[:2])
    prefill, decode = profiles[PARTS[2]].values()
    context = preparer.generation.max_positions
    for image in pictures():
        prepared = preparer.prepare([image], PROMPT)
        for feed in prepared.vision:
            for tensor, array in feed.items():
                assert inside(array.shape, vision[tensor]), (tensor, array.shape)
        length = len(prepared.input_ids)
        assert inside((1, length), embed["input_ids"])
        assert inside((1, length), prefill[MASK])
        assert inside((1, length, prefill["inputs_embeds"].max[2]), prefill["inputs_embeds"])
        # Whatever the caption's length, the bucket that holds it is one that the engine takes.
        for room in {1, 64, 300, context - length}:
            places = bucket(min(length + room, context), decode["past_key_values.0.key"].max[2])
            heads, width = (decode["past_key_values.0.key"].max[i] for i in (1, 3))
            for tensor in (n for n in decode if n.startswith(PAST)):
                assert inside((1, heads, places, width), decode[tensor])
            assert inside((1, places + 1), decode[MASK])
            assert places + 1 >= min(length + room, context)


def test_the_decode_profile_is_tuned_for_buckets(exported: Path) -> None:
    prefill, decode = read_profiles(exported / "export.json")[PARTS[2]].values()
    assert decode[MASK].opt == (1, BUCKET + 1)
    assert decode["past_key_values.1.value"].opt[2] == BUCKET
    assert decode["past_key_values.1.value"].max[2] == 511
    # Nothing else moves, and what has no past is left alone.
    stated = json.loads((exported / "export.json").read_text())["standard"]["profiles"]
    assert list(decode["inputs_embeds"].opt) == [1, 1, 64]
    assert list(prefill[MASK].opt) == stated[PARTS[2]]["prefill"][MASK]["opt"]
    assert tuned({"pixel_values": Shapes((1,), (2,), (3,))}) == {
        "pixel_values": Shapes((1,), (2,), (3,))
    }


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_buckets_hold_the_text_and_no_more_than_the_engine_takes(capacity: int, most: int) -> None:
    if capacity - 1 > most:
        with pytest.raises(InputRefused, match="positions"):
            bucket(capacity, most)
        return
    places = bucket(capacity, most)
    assert max(capacity - 1, 1) <= places <= most
    assert places % BUCKET == 0 or places == most
    assert places - (capacity - 1) < BUCKET or capacity == 1


Change = Callable[[dict[str, Any]], None]


def wrong_dialect(found: dict[str, Any]) -> None:
    found["dialect"] = "ort"


def no_profiles(found: dict[str, Any]) -> None:
    found["standard"]["profiles"] = {}


def no_decode(found: dict[str, Any]) -> None:
    del found["standard"]["profiles"][PARTS[2]]["decode"]


def upside_down(found: dict[str, Any]) -> None:
    found["standard"]["profiles"][PARTS[0]][PARTS[0]]["pixel_values"]["opt"][1] = 99


def other_rank(found: dict[str, Any]) -> None:
    found["standard"]["profiles"][PARTS[0]][PARTS[0]]["pixel_values"]["min"].pop()


def below_zero(found: dict[str, Any]) -> None:
    found["standard"]["profiles"][PARTS[0]][PARTS[0]]["pixel_values"]["min"][0] = -1


def no_numbers(found: dict[str, Any]) -> None:
    found["standard"]["profiles"][PARTS[0]][PARTS[0]]["pixel_values"]["min"] = "all"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (wrong_dialect, "dialect 'ort'"),
        (no_profiles, "no optimization profiles of 'vision_encoder'"),
        (no_decode, r"profiles \['prefill'\] of decoder_model_merged; expected prefill and decode"),
        (upside_down, r"pixel_values from \[1, 1, 3, 32, 32\] over \[1, 99"),
        (other_rank, "pixel_values from"),
        (below_zero, "pixel_values from"),
        (no_numbers, "standard.profiles: Expected `array`"),
    ],
)
def test_a_record_that_no_engine_can_be_built_from_is_refused(
    change: Change, says: str, exported: Path, tmp_path: Path
) -> None:
    found = json.loads((exported / "export.json").read_text())
    change(found)
    path = tmp_path / "export.json"
    path.write_text(json.dumps(found))
    with pytest.raises(InputRefused, match=says) as caught:
        read_profiles(path)
    assert "export again" in str(caught.value) and "\n" not in str(caught.value)


def test_the_ranges_are_numbers_of_places(exported: Path) -> None:
    keep = read_profiles(exported / "export.json")[PARTS[2]]["prefill"]["num_logits_to_keep"]
    assert keep.values and keep.min == (1,)
    assert np.prod(keep.max) >= 300
