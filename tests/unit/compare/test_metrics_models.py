"""Metrics with weights, on tiny models: against numbers of the original libraries on the same files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from exporter.compare.captions.alignscore import AlignScore, context_chunks
from exporter.compare.captions.base import NotComputed, Pair, Tally
from exporter.compare.captions.bertscore import BertScore
from exporter.compare.captions.bleurt import Bleurt
from exporter.compare.captions.chexbert import CheXbert
from exporter.compare.captions.prepare import sentences
from exporter.compare.captions.radgraph import RadGraph
from exporter.compare.captions.similarity import Similarity
from exporter.core.errors import InputRefused
from tests.unit.compare import tiny_metrics as tiny

NUMBERS = json.loads((Path(__file__).parent / "metric_numbers.json").read_text())
PAIRS = [Pair(str(i), truth, said) for i, (truth, said) in enumerate(NUMBERS["pairs"])]


def scores(tally: Tally) -> np.ndarray:
    return np.asarray(tally.counts[:, 0])


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_bert(tmp_path_factory.mktemp("bertscore") / "bert")


@pytest.mark.parametrize("layer", [2, 3])
def test_bertscore_equals_the_original_library(bert: Path, layer: int) -> None:
    found = BertScore(bert, layer).score(PAIRS)
    for name, expected in NUMBERS[f"bertscore_layer{layer}"].items():
        np.testing.assert_allclose(scores(found[f"bertscore_{name}"]), expected, atol=1e-5)


def test_bertscore_equals_the_installed_library(bert: Path) -> None:
    library = pytest.importorskip("bert_score", reason="bert-score is not installed")
    precision, recall, f1 = library.score(
        [p.said for p in PAIRS], [p.truth for p in PAIRS], model_type=str(bert), num_layers=3,
        idf=True, nthreads=0, batch_size=1, device="cpu",
    )  # fmt: skip
    found = BertScore(bert).score(PAIRS)
    for name, expected in (("precision", precision), ("recall", recall), ("f1", f1)):
        np.testing.assert_allclose(scores(found[f"bertscore_{name}"]), expected, atol=1e-5)


def test_bertscore_of_roberta_equals_the_original_library(tmp_path: Path) -> None:
    """Numbers from transformers 4, where the first word is tokenized as one after a space."""
    found = BertScore(tiny.write_roberta(tmp_path / "m"), 2).score(PAIRS)
    for name, expected in NUMBERS["bertscore_roberta_layer2"].items():
        np.testing.assert_allclose(scores(found[f"bertscore_{name}"]), expected, atol=1e-5)


def test_vocabulary_files_without_tokenizer_json(bert: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "slow"
    shutil.copytree(bert, folder)
    (folder / "tokenizer.json").unlink()
    found = BertScore(folder, 2).score(PAIRS)
    expected = NUMBERS["bertscore_layer2"]["f1"]
    np.testing.assert_allclose(scores(found["bertscore_f1"]), expected, atol=1e-5)
    (folder / "vocab.txt").unlink()
    with pytest.raises(InputRefused, match=r"the tokenizer has \d+ tokens and the model 1\d\d"):
        BertScore(folder)


def test_bertscore_of_blank_and_of_equal_captions(bert: Path) -> None:
    pairs = [Pair("a", "", " "), Pair("b", "a mass", ""), Pair("c", "left lung", "left lung")]
    f1 = scores(BertScore(bert).score(pairs)["bertscore_f1"])
    assert f1 == pytest.approx([1.0, 0.0, 1.0])


def test_bertscore_without_any_idf_counts_tokens_equally(bert: Path) -> None:
    # One ground truth: every one of its tokens has idf log(2 / 2) = 0.
    found = BertScore(bert).score([Pair("a", "left lung", "a mass")])
    assert 0 < found["bertscore_recall"].value < 1
    assert np.isfinite(found["bertscore_f1"].value)


def test_bertscore_refuses_a_layer_there_is_not(bert: Path) -> None:
    with pytest.raises(InputRefused, match="layer 9; expected 1 to 3"):
        BertScore(bert, 9)


@pytest.mark.parametrize(("name", "embedding"), [("bleurt", 16), ("bleurt_plain", None)])
def test_bleurt_equals_the_pytorch_port(tmp_path: Path, name: str, embedding: int | None) -> None:
    found = Bleurt(tiny.write_bleurt(tmp_path / "m", embedding)).score(PAIRS)
    np.testing.assert_allclose(scores(found["bleurt"]), NUMBERS[name], atol=1e-5)


def test_bleurt_refuses_a_head_of_another_task(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="classifier.weight' is missing"):
        Bleurt(tiny.write_bert(tmp_path / "m"))


def test_chexbert_equals_the_original_library(tmp_path: Path) -> None:
    metric = CheXbert(tiny.write_chexbert(tmp_path / "m"))
    for side, texts in (("truth", [p.truth for p in PAIRS]), ("said", [p.said for p in PAIRS])):
        np.testing.assert_array_equal(metric.labels(texts), NUMBERS["chexbert_labels"][side])
    found = metric.score(PAIRS)
    for name, expected in NUMBERS["chexbert"].items():
        assert found[f"chexbert_{name}"].value == pytest.approx(expected, abs=1e-12)


def test_radgraph_equals_the_original_library(tmp_path: Path) -> None:
    path = tmp_path / "radgraph.json"
    path.write_text(json.dumps(tiny.RADGRAPH))
    pairs = [Pair(str(i), a, b) for i, (a, b) in enumerate(tiny.RADGRAPH_PAIRS)]
    found = RadGraph(path).score(pairs)
    assert not isinstance(found, NotComputed)
    for i, level in enumerate(("simple", "partial", "complete")):
        expected = [row[i] for row in NUMBERS["radgraph"]]
        assert scores(found[f"radgraph_{level}"]) == pytest.approx(expected, abs=1e-12)
    lost = RadGraph(path).score([Pair("x", "Large effusion", "Something else")])
    assert isinstance(lost, NotComputed)
    assert "Something else" in lost.reason


@pytest.mark.parametrize(
    "broken",
    [
        {"0": {"text": "a"}},
        {"0": {"text": "a", "entities": {"1": {"tokens": "a", "label": "x", "relations": [["m", "7"]]}}}},
        {"0": []},
    ],
)  # fmt: skip
def test_radgraph_refuses_other_json(tmp_path: Path, broken: dict[str, object]) -> None:
    path = tmp_path / "radgraph.json"
    path.write_text(json.dumps(broken))
    with pytest.raises(InputRefused, match="expected"):
        RadGraph(path)


def test_alignscore_equals_transformers(tmp_path: Path) -> None:
    """The published arithmetic on transformers' own model and tokenizer, one input at a time."""
    import torch
    from safetensors.torch import load_file
    from transformers import RobertaConfig, RobertaModel, RobertaTokenizer

    folder = tiny.write_alignscore(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    settings = json.loads((folder / "config.json").read_text())
    model = RobertaModel(RobertaConfig(**settings)).eval()
    own = {n.removeprefix("base_model."): t for n, t in tensors.items() if n.startswith("base")}
    assert not model.load_state_dict(own, strict=False).missing_keys
    tokenizer = RobertaTokenizer.from_pretrained(folder)
    pairs = [Pair(str(i), a, b) for i, (a, b) in enumerate(tiny.ALIGN_PAIRS)]
    expected = []
    for pair in pairs:
        chunks, claims = context_chunks(pair.truth), sentences(pair.said)
        block = np.zeros((len(chunks), len(claims)))
        for i, chunk in enumerate(chunks):
            for j, claim in enumerate(claims):
                fits = len(tokenizer(claim, add_special_tokens=False)["input_ids"]) + 4 < 128
                cut = "only_first" if fits else True
                inputs = tokenizer(
                    chunk, claim, truncation=cut, max_length=128, return_tensors="pt"
                )
                assert inputs["input_ids"].shape[1] <= 128
                with torch.no_grad():
                    pooled = model(
                        inputs["input_ids"], attention_mask=inputs["attention_mask"]
                    ).pooler_output
                    logits = pooled @ tensors["tri_layer.weight"].T + tensors["tri_layer.bias"]
                block[i, j] = torch.softmax(logits, -1)[0, 0]
        expected.append(block.max(0).mean())
    assert len(context_chunks(tiny.LONG)) > 1
    found = AlignScore(folder).score(pairs)
    np.testing.assert_allclose(scores(found["alignscore"]), expected, atol=1e-5)
    blank = AlignScore(folder).score([Pair("a", "", ""), Pair("b", "a", ""), Pair("c", "", "a")])
    assert list(scores(blank["alignscore"])) == [1.0, 0.0, 0.0]


def test_chunks_of_the_context_as_published() -> None:
    text = " ".join(["One two three four five six seven eight nine ten."] * 80)
    # 800 words: 800 // 350 + 1 = 3 pieces wanted, 80 // 3 = 26 sentences each.
    assert [len(sentences(c)) for c in context_chunks(text)] == [26, 26, 26, 2]
    assert context_chunks("") == [""]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("No mass. A cyst of 1.5 cm (Fig. 2). Normal!", ["No mass.", "A cyst of 1.5 cm (Fig. 2).", "Normal!"]),
        ("Seen by Dr. A. Smith in 2020.", ["Seen by Dr. A. Smith in 2020."]),
        ("  ", []),
        ("no capital. here", ["no capital. here"]),
    ],
)  # fmt: skip
def test_sentences(text: str, expected: list[str]) -> None:
    assert sentences(text) == expected


def test_similarity_equals_transformers(tmp_path: Path) -> None:
    import torch
    from PIL import Image
    from tokenizers import Tokenizer
    from transformers import CLIPImageProcessor, CLIPModel

    folder = tiny.write_clip(tmp_path / "clip")
    model = CLIPModel.from_pretrained(folder).eval()
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path in paths:
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(path)
    texts = ["a mass in the left lung", "normal heart", "chest ray showing small effusion"]
    pairs = [Pair(p.stem, "", text, p) for p, text in zip(paths, texts, strict=True)]
    found = Similarity(folder).score(pairs)
    assert not isinstance(found, NotComputed)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    processor = CLIPImageProcessor.from_pretrained(folder)
    for i, pair in enumerate(pairs):
        ids = torch.tensor([tokenizer.encode(pair.said).ids])
        pixels = processor(Image.open(paths[i]), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            cosine = model(ids, pixels).logits_per_image / model.logit_scale.exp()
        assert scores(found["similarity_cosine"])[i] == pytest.approx(cosine.item(), abs=1e-5)
        scaled = scores(found["similarity_scaled"])[i]
        assert scaled == pytest.approx(2.5 * max(cosine.item(), 0.0), abs=3e-5)
    lost = Similarity(folder).score([Pair("q", "", "a mass")])
    assert isinstance(lost, NotComputed)


def test_refuses_what_could_run_code(bert: Path, tmp_path: Path) -> None:
    import shutil

    evil = tmp_path / "evil"
    shutil.copytree(bert, evil)
    settings = json.loads((evil / "config.json").read_text())
    (evil / "config.json").write_text(json.dumps(settings | {"auto_map": {"AutoModel": "x.Y"}}))
    with pytest.raises(InputRefused, match="auto_map"):
        BertScore(evil)
    (evil / "config.json").write_text(json.dumps(settings | {"model_type": "custom"}))
    with pytest.raises(InputRefused, match="model_type is 'custom'"):
        BertScore(evil)
    (evil / "config.json").write_text(json.dumps(settings))
    (evil / "model.safetensors").rename(evil / "pytorch_model.bin")
    with pytest.raises(InputRefused, match="pytorch_model.bin'; expected safetensors"):
        BertScore(evil)


def test_refuses_weights_of_another_size(tmp_path: Path) -> None:
    folder = tiny.write_bert(tmp_path / "m")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 4}))
    with pytest.raises(InputRefused, match="are missing"):
        BertScore(folder)
    (folder / "config.json").write_text(json.dumps(settings | {"intermediate_size": 40}))
    with pytest.raises(InputRefused, match="of another shape"):
        BertScore(folder)
