"""Writes docs/models.md: what works for which system, each claim with the test that proves it.

    python tools/write_models.py [--check]

Run it after a change to profiles/models or to the families' contract tests; a test compares the file
with what this script would write, and the tests it names with those there are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from exporter.catalog.profiles import find_model, model_profiles
from exporter.catalog.schema import AdapterRecipe, ModelProfile
from exporter.families.table import TASK_FAMILIES

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/models.md"
CONTRACT = "tests/contract/test_families.py"

# The row of tests/support/family_cases.py that stands for a published model_type, where it is of
# another name.
CASES: Mapping[str, tuple[str, ...]] = {
    "blip-2": ("blip2-opt",),
    "smolvlm": ("idefics3",),
    "llava_mistral": ("llava-med",),
    "llava_next": ("llava_next-mistral", "llava_next-llama"),
    "mini_gpt4": ("xraygpt",),
    "moondream1": ("moondream2",),
    "vision-encoder-decoder": ("vit-gpt2",),
    "cnn_transformer": ("cnn-transformer",),
}
# Column, and the contract's test that proves it.
PROOFS: Mapping[str, str] = {
    "ONNX, tokens of `generate`": "test_tokens_equal_generate",
    "logits within 1e-4": "test_logits_equal_forward_at_two_shapes",
    "tiles": "test_features_of_each_number_of_tiles",
    "padded batch": "test_a_batch_of_two_with_padding",
    "int8, int4": "test_quantized_models_stay_near",
    "adapter": "test_an_adapter_merges_and_is_proven",
    "adapter keys": "test_key_layouts_of_adapters_merge_alike",
    "without torch": "test_it_runs_without_torch",
}
# Columns whose tests are in files of their own, with the same rows.
APART: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "`standard`": (
        "tests/contract/test_standard.py",
        (
            "test_operators_are_those_of_the_parser",
            "test_logits_at_two_shapes",
            "test_greedy_tokens",
            "test_quantized_models_equal_the_ort_dialects",
        ),
    ),
    "whole build": (
        "tests/e2e/test_family_builds.py",
        ("test_the_command_line_builds_and_compares",),
    ),
}
# Rows whose adapters have one key layout in every version; a test holds them against the rows.
ONE_LAYOUT = ("blip2-opt", "cnn-transformer")
# The calibrated schemes are tested apart: test file by family, or by model_type where the decoder counts.
CALIBRATED: Mapping[str, str] = {
    "idefics3": "tests/unit/calibrate/test_quantized_walk.py",
    "llava": "tests/unit/calibrate/test_quantized_walk.py (the same Llama block)",
    "mini_gpt4": "tests/unit/families/test_blip2.py::test_calibrated_schemes_stay_near",
    "qwen_vl": "tests/contract/test_qwen.py::test_calibrated_schemes_stay_near",
    **dict.fromkeys(
        ("moondream", "idefics", "vision_encoder_decoder", "cnn_transformer", "blip-2"),
        "tests/unit/calibrate/test_block_kinds.py (int4-gptq; AWQ and `mixed` are refused)",
    ),
}
# The contract of models that do not caption: column, and the test that proves it.
TASK_CONTRACT = "tests/contract/test_tasks.py"
# What a row of that contract does not have, and why; a test holds the table against the rows.
NO_ADAPTER: Mapping[str, str] = {"cris": "trained whole, no adapter"}
NO_PADDING: Mapping[str, str] = {
    "cris": "texts have one length",
    "medclip": "pools padding too, as published",
    "siglip": "texts have one length, and padding is seen",
}
TASK_PROOFS: Mapping[str, str] = {
    "graphs equal torch": "test_graphs_equal_torch",
    "padding": "test_padding_does_not_change_a_row",
    "preparer": "test_the_preparer_does_what_the_library_does",
    "int8, int4": "test_quantized_graphs_stay_near",
    "adapter": "test_an_adapter_merges_and_is_proven",
    "without torch": "test_it_runs_without_torch",
}
INTRODUCTION = """\
# Models: what works, and the test that says so

Written by `tools/write_models.py`; do not edit. `medexport models` lists the same profiles.

No published weights can be had where this is developed. Each architecture is exercised with small
random configurations of the real classes in the published layout, and the profiles' names and sizes
are checked against the published facts (`tests/unit/test_profiles.py`). The columns are tests of
[{contract}](../{contract}); a cell is the test's parameter.

{columns}
{apart}
- calibrated: GPTQ, AWQ and `mixed`, which walk the decoder block by block.

"adapter keys" are those of older versions of transformers, of the model without its head, and of the
published class. "whole build" is `medexport build` with comparison, `verify`, and `run` without torch.

"""
RECIPES = """
### Adapter recipes

What the profiles say that adapters of the model were trained on (the captioning study's, where it has the
model). The column "adapter" trains this and finds each target in the family's modules.
`medexport build` says where an adapter differs from it.

"""
TASKS = """
## Working: other tasks

Zero-shot classification and retrieval, masks, text encoders, summaries. The columns are tests of
[{contract}](../{contract}); schemes that are calibrated on captions, and the `standard` dialect, are
refused for these models.

{columns}

"""


def case_of(profile: ModelProfile) -> str:
    """The contract's row for a profile; a test holds that there is one."""
    kind = profile.facts.model_type
    cases = CASES.get(kind, (kind,))
    if len(cases) < 2:
        return cases[0]
    text = profile.facts.config.get("text_config.model_type", "llama")
    return next((c for c in cases if c.endswith(f"-{text}")), cases[0])


def calibrated(profile: ModelProfile) -> str:
    """The calibrated schemes' test, or why they are refused."""
    found = CALIBRATED.get(profile.family) or CALIBRATED.get(profile.facts.model_type)
    return found or "refused: calibration does not know its decoder's blocks"


def render() -> str:
    """The page."""
    working, planned = [], []
    for name in model_profiles():
        profile = find_model(name)
        (planned if profile.status == "plan-only" else working).append(profile)
    columns = "\n".join(f"- {title}: `{test}`" for title, test in PROOFS.items())
    apart = "\n".join(_apart(title) for title in APART)
    introduction = INTRODUCTION.format(contract=CONTRACT, columns=columns, apart=apart)
    parts = [introduction, "## Working\n\n"]
    header = ["model", "family", "licence", "`--int4`", *PROOFS, *APART, "calibrated"]
    parts.append(_table(header, (_row(p) for p in working if p.family not in TASK_FAMILIES)))
    parts.append(RECIPES)
    header = ["model", "modules", "`lora_alpha` / `r`"]
    parts.append(_table(header, [_recipe_row(p, p.adapter) for p in working if p.adapter]))
    columns = "\n".join(f"- {title}: `{test}`" for title, test in TASK_PROOFS.items())
    parts.append(TASKS.format(contract=TASK_CONTRACT, columns=columns))
    header = ["model", "task", "family", "licence", *TASK_PROOFS]
    parts.append(_table(header, (_task_row(p) for p in working if p.family in TASK_FAMILIES)))
    if planned:
        parts.append("\n## Planned only\n\n`medexport plan` knows them; `build` refuses them.\n\n")
        rows = [[p.name, p.family, " ".join(p.notes)] for p in planned]
        parts.append(_table(["model", "family", "why not yet"], rows))
    return "".join(parts)


def task_case_of(profile: ModelProfile) -> str:
    """The row of tests/support/task_cases.py that stands for a profile: its published model_type."""
    return profile.facts.model_type


def _task_row(profile: ModelProfile) -> list[str]:
    licence = (profile.hub.licence if profile.hub else None) or "not stated"
    task = TASK_FAMILIES[profile.family].TASK
    case = task_case_of(profile)
    without = {"adapter": NO_ADAPTER, "padding": NO_PADDING}
    proofs = [without.get(title, {}).get(case, f"`[{case}]`") for title in TASK_PROOFS]
    return [profile.name, task, profile.family, licence, *proofs]


def _row(profile: ModelProfile) -> list[str]:
    case = case_of(profile)
    licence = (profile.hub.licence if profile.hub else None) or "not stated"
    proofs = ["one layout" if _lacks(title, case) else f"`[{case}]`" for title in (*PROOFS, *APART)]
    scheme = profile.schemes.get("int4", "-")
    return [profile.name, profile.family, licence, scheme, *proofs, calibrated(profile)]


def _lacks(title: str, case: str) -> bool:
    return title == "adapter keys" and case in ONE_LAYOUT


def _apart(title: str) -> str:
    path, tests = APART[title]
    return f"- {title}: [{path}](../{path}), {', '.join(f'`{test}`' for test in tests)}"


def _recipe_row(profile: ModelProfile, recipe: AdapterRecipe) -> list[str]:
    scaling = "not published" if recipe.scaling is None else f"{recipe.scaling:g}"
    return [profile.name, ", ".join(f"`{target}`" for target in recipe.targets), scaling]


def _table(header: list[str], rows: Iterator[list[str]] | list[list[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write the page, or with --check say whether it is current."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    text = render()
    if options.check:
        return 0 if PAGE.read_text(encoding="utf-8") == text else 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
