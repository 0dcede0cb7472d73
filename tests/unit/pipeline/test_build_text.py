"""What `medexport build` prints at its end."""

from __future__ import annotations

from exporter.pipeline.build import WIDTH, checks_text, count_stages
from exporter.quantizers.schemes import find_scheme

FOUND = (
    "against fp16 on 240 images of 80 patients: INCONCLUSIVE: "
    + "int4-gptq 43 % of the bytes, " * 6
)


def test_checks_are_lines_of_a_name_and_what_was_found() -> None:
    text = checks_text({"comparison": FOUND, "parity": "not run"})
    lines = text.splitlines()
    assert lines[0].startswith("checks   comparison: against fp16 on 240 images")
    assert lines[-1] == "         parity: not run"
    assert len(lines) > 3
    assert all(len(line) <= WIDTH for line in lines)
    assert not set(text) & set("{}'")
    # Nothing is lost by wrapping.
    assert " ".join(" ".join(lines[:-1]).split()) == f"checks comparison: {FOUND}".strip()


def test_float_weights_for_float16_arithmetic_are_a_stage_of_their_own() -> None:
    """Beside the reference, which computes in float32: nothing is counted beyond the last stage."""
    fp16, int4 = find_scheme("fp16"), find_scheme("int4-rtn")
    assert count_stages([fp16], compare=True) == 7
    assert count_stages([fp16], compare=True, half=True) == 8
    assert count_stages([int4], compare=True, half=True) == count_stages([int4], compare=True)
    assert count_stages([fp16], compare=False, half=True) == count_stages([fp16], compare=False)
