"""Profiles: their facts agree with the real model classes, and mistakes are answered in one line."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import pytest
import yaml

from exporter.calibrate.sets import open_set
from exporter.catalog.profiles import (
    find_model,
    find_target,
    model_profiles,
    read_profile,
    target_profiles,
)
from exporter.catalog.schema import ModelProfile, TargetProfile
from exporter.catalog.shapes import known_config, parameter_count, tensor_table
from exporter.core.data import data_root
from exporter.core.errors import InputRefused, WrongUsage
from exporter.core.modelfiles import read_config
from exporter.core.tensors import Checkpoint
from exporter.families.check import check_config, config_value
from exporter.families.table import FAMILIES, TASK_FAMILIES, config_defaults
from exporter.pipeline.resolve import refuse_plan_only

MODELS = sorted(model_profiles())
READY = [name for name in MODELS if find_model(name).status == "ready"]
BUILTIN = [name for name in MODELS if find_model(name).builtin]
WITH_SHAPES = [name for name in READY if find_model(name).facts.tensor_shapes]
# Published counts, kept here apart from the profiles.
PUBLISHED = {
    "smolvlm-256m": (256484928, 471),
    "smolvlm-500m": (507482304, 489),
    "smolvlm-2.2b": (2246272880, None),
    "smolvlm2-500m": (507482304, None),
}


def nested(profile: ModelProfile) -> dict:
    """A config.json with every known fact written out."""
    config: dict = {
        "model_type": profile.facts.model_type,
        "architectures": [profile.facts.architecture],
        "text_config": {"model_type": "llama"},
        "vision_config": {},
    }
    for key, value in known_config(profile).items():
        section, _, leaf = key.rpartition(".")
        (config.setdefault(section, {}) if section else config)[leaf] = value
    return config


@pytest.fixture(scope="module")
def meta_shapes():
    """Names and shapes of the real transformers model on torch's meta device, by profile."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    made: dict[str, dict[str, tuple[int, ...]]] = {}

    def build(name: str) -> dict[str, tuple[int, ...]]:
        if name not in made:
            profile = find_model(name)
            config = nested(profile)
            config["text_config"]["pad_token_id"] = 0
            kind = getattr(transformers, profile.facts.architecture)
            with torch.device("meta"):
                model = kind(kind.config_class(**config))
            made[name] = {n: tuple(p.shape) for n, p in model.named_parameters()}
        return made[name]

    return build


@pytest.mark.parametrize("name", WITH_SHAPES)
def test_tensor_names_and_shapes_are_those_of_the_real_class(name, meta_shapes):
    assert tensor_table(find_model(name)) == meta_shapes(name)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_counts(name, meta_shapes):
    parameters, tensors = PUBLISHED[name]
    profile = find_model(name)
    assert (profile.facts.parameters, profile.facts.tensors) == (parameters, tensors)
    shapes = meta_shapes(name)
    assert sum(math.prod(s) for s in shapes.values()) == parameters == parameter_count(profile)
    assert tensors in (None, len(shapes))


@pytest.mark.parametrize("name", ["smolvlm-256m", "smolvlm-500m"])
def test_file_size_fits_16_bit_weights_with_a_header(name):
    facts = find_model(name).facts
    header = facts.files["model.safetensors"] - 2 * facts.parameters
    # A safetensors entry takes 80 to 200 bytes: name, dtype, shape, two offsets.
    assert 80 * facts.tensors < header < 200 * facts.tensors


@pytest.mark.parametrize("name", MODELS)
def test_every_profile_is_complete(name):
    profile = find_model(name)
    assert profile.facts.sources
    assert profile.facts.confidence
    assert not profile.facts.config.keys() & profile.facts.inferred.keys()


@pytest.mark.parametrize("name", READY)
def test_what_is_said_to_build_has_family_code(name):
    profile = find_model(name)
    families = {**FAMILIES, **TASK_FAMILIES}
    assert profile.family in families
    assert profile.facts.model_type in families[profile.family].MODEL_TYPES
    # What nobody has published comes by --weights alone.
    known = profile.hub is not None or profile.builtin is not None
    assert known or profile.facts.confidence == "not published"
    assert known_config(profile).keys() <= config_defaults(profile.family).keys()


def test_plan_only_is_refused_in_one_line():
    profile = msgspec.structs.replace(find_model("smolvlm"), status="plan-only")
    with pytest.raises(WrongUsage, match="planned but not built yet.*'idefics3' family") as caught:
        refuse_plan_only(profile)
    assert "\n" not in str(caught.value)
    refuse_plan_only(find_model("smolvlm"))


@pytest.mark.parametrize("name", [n for n in READY if "tile" in find_model(n).facts.preprocessor])
def test_tokens_per_tile_follow_from_the_tower(name):
    profile = find_model(name)
    config, image = known_config(profile), profile.facts.preprocessor
    side = config["vision_config.image_size"] // config["vision_config.patch_size"]
    assert image["tokens_per_tile"] == (side // config["scale_factor"]) ** 2
    assert image["tile"] == config["vision_config.image_size"]
    assert image["longest_edge"] % image["tile"] == 0


@pytest.mark.parametrize("name", WITH_SHAPES)
def test_specs_follow_from_the_facts(name):
    profile = find_model(name)
    family = FAMILIES[profile.family]
    decoder, tower = (
        family.decoder_spec(nested(profile)),
        family.tower_spec(nested(profile)),
    )
    table = tensor_table(profile)
    assert table[decoder.embedding] == (decoder.vocab_size, decoder.hidden_size)
    assert table[f"{decoder.prefix}layers.{decoder.layers - 1}.mlp.down_proj.weight"] == (
        decoder.hidden_size,
        decoder.intermediate_size,
    )
    assert table[tower.projection] == (
        tower.output_size,
        tower.hidden_size * tower.shuffle**2,
    )


@pytest.mark.parametrize("name", BUILTIN)
def test_what_ships_is_what_its_profile_says(name):
    profile = find_model(name)
    folder = data_root("profiles") / profile.builtin.model
    check_config(profile, read_config(folder / "config.json"))
    stored = {n: i.shape for n, i in Checkpoint.open(folder).tensors.items()}
    facts = profile.facts
    assert facts.tensors in (None, len(stored))
    assert facts.parameters in (None, sum(math.prod(s) for s in stored.values()))
    assert not facts.tensor_shapes or stored == tensor_table(profile)
    for adapter in profile.builtin.adapters.values():
        assert (data_root("profiles") / adapter / "adapter_model.safetensors").is_file()
    size = sum(p.stat().st_size for p in folder.parent.rglob("*") if p.is_file())
    assert size < 16_000_000


@pytest.mark.parametrize("name", BUILTIN)
def test_the_prompt_is_that_of_the_image_sets(name):
    profile = find_model(name)
    for images in (profile.evaluation, profile.calibration):
        assert open_set(images).prompt == profile.prompts.default


def test_defaults_are_those_of_the_config_classes():
    transformers = pytest.importorskip("transformers")
    for kind in ("Idefics3Config", "SmolVLMConfig"):
        config = getattr(transformers, kind)(text_config={"model_type": "llama"}).to_dict()
        for key in config_defaults("idefics3"):
            section, _, leaf = key.rpartition(".")
            place = config[section] if section else config
            real = place["rope_parameters"][leaf] if leaf == "rope_theta" else place[leaf]
            empty = {"text_config": {}, "vision_config": {}}
            assert config_value(empty, key, "idefics3") == real, key


def test_alias_finds_the_profile():
    assert find_model("smolvlm").name == "smolvlm-500m"
    assert find_model("smolvlm2").name == "smolvlm2-500m"


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [("smolvlm-500", "smolvlm-500m"), ("SmolVLM2-2.2B", "smolvlm2-2.2b"), ("dmeo", "demo")],
)
def test_unknown_model_suggests_the_nearest(wrong, nearest):
    with pytest.raises(WrongUsage, match=f"no model profile '{wrong}'.*{nearest}") as caught:
        find_model(wrong)
    assert "\n" not in str(caught.value)


def test_unknown_target_suggests_the_nearest():
    with pytest.raises(WrongUsage, match="did you mean cpu-avx512-vnni"):
        find_target("cpu-avx512")


def test_targets_name_a_provider_of_onnxruntime():
    cpus = {n for n, t in target_profiles().items() if t.provider == "CPUExecutionProvider"}
    assert cpus == {"cpu-arm64-dotprod", "cpu-avx2", "cpu-avx512-vnni"}
    others = {t.provider for n, t in target_profiles().items() if n not in cpus}
    assert others == {"CUDAExecutionProvider"}
    assert {t.accuracy_level for t in target_profiles().values()} == {4}


def change(tmp_path: Path, edit) -> Path:
    """A copy of the 500M profile, changed by `edit`."""
    source = data_root("profiles") / "models" / "smolvlm-500m.yaml"
    content = yaml.safe_load(source.read_text(encoding="utf-8"))
    edit(content)
    path = tmp_path / "smolvlm-500m.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("edit", "place"),
    [
        (lambda c: c.update(max_new_tokens="many"), r"`int`, got `str`.*\$\.max_new_tokens"),
        (lambda c: c["facts"].update(tensors=1.5), r"\$\.facts\.tensors"),
        (lambda c: c["facts"]["tensor_shapes"].update(x=["a"]), r"\$\.facts\.tensor_shapes"),
        (lambda c: c.update(prompt="x"), r"unknown field `prompt`"),
        (lambda c: c["prompts"].pop("default"), r"missing required field `default`.*\$\.prompts"),
        (lambda c: c.update(aliases={"a": 1}), r"\$\.aliases"),
        (lambda c: c.update(name="other"), r"name is 'other', expected .*'smolvlm-500m'"),
    ],
)
def test_schema_errors_name_the_place_in_one_line(tmp_path, edit, place):
    path = change(tmp_path, edit)
    with pytest.raises(InputRefused, match=place) as caught:
        read_profile(path, ModelProfile)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"a: [", b"\xff\xfe", b"- 1\n", b"", b"!!python/name:os.system"]
)
def test_what_is_not_a_profile_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "t.yaml"
    path.write_bytes(content)
    with pytest.raises(InputRefused, match=r"t\.yaml") as caught:
        read_profile(path, TargetProfile)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", READY)
def test_a_config_of_the_facts_is_accepted(name):
    profile = find_model(name)
    check_config(profile, nested(profile))


def test_absent_keys_count_with_the_class_default():
    profile = find_model("smolvlm-500m")
    config = nested(profile)
    for section, key in [
        ("text_config", "num_hidden_layers"),
        ("text_config", "head_dim"),
        ("vision_config", "intermediate_size"),
        ("vision_config", "num_hidden_layers"),
        ("vision_config", "layer_norm_eps"),
    ]:
        del config[section][key]
    check_config(profile, config)
    del config["text_config"]["num_attention_heads"]
    with pytest.raises(InputRefused, match="num_attention_heads is 32, expected 15"):
        check_config(profile, config)


def test_rotary_settings_of_either_layout():
    profile = find_model("smolvlm-2.2b")
    config = nested(profile)
    theta = config["text_config"].pop("rope_theta")
    config["text_config"]["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    check_config(profile, config)
    config["text_config"]["rope_parameters"]["rope_theta"] = 10000.0
    with pytest.raises(InputRefused, match="rope_theta is 10000"):
        check_config(profile, config)


def test_another_size_is_refused_with_the_profile_that_fits():
    expected = (
        r"^this is not SmolVLM-500M-Instruct: text_config\.hidden_size is 576, expected 960 "
        r"\(\d more differ\); use --model smolvlm-256m$"
    )
    with pytest.raises(InputRefused, match=expected):
        check_config(find_model("smolvlm-500m"), nested(find_model("smolvlm-256m")))


def test_another_generation_is_refused():
    with pytest.raises(InputRefused, match=r"model_type is smolvlm.*use --model smolvlm2-500m"):
        check_config(find_model("smolvlm"), nested(find_model("smolvlm2-500m")))


def test_a_stranger_is_told_to_give_the_folder():
    config = nested(find_model("smolvlm-500m"))
    config["text_config"]["hidden_size"] = 1024
    with pytest.raises(InputRefused, match="hidden_size is 1024, expected 960; give the folder"):
        check_config(find_model("smolvlm-500m"), config)


def test_inferred_facts_refuse_nothing():
    profile = find_model("smolvlm-500m")
    config = nested(profile)
    assert "text_config.rope_theta" in profile.facts.inferred
    config["text_config"]["rope_theta"] = 5e5
    check_config(profile, config)


@pytest.mark.parametrize("bad", ["wide", True, [960], None])
def test_wrong_types_in_a_config_are_a_difference(bad):
    config = nested(find_model("smolvlm-500m"))
    config["text_config"]["hidden_size"] = bad
    with pytest.raises(InputRefused, match="hidden_size is"):
        check_config(find_model("smolvlm-500m"), config)
