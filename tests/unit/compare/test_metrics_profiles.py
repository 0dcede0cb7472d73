"""Paths, profiles, concepts, intervals and the score of predictions and comparisons."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from exporter.cli.score import score
from exporter.compare.captions.base import NotComputed, Pair, Tally, mean_tally
from exporter.compare.captions.bleu import Bleu
from exporter.compare.captions.chexbert import f1_of_counts, label_tallies
from exporter.compare.captions.concepts import MEDCON_TYPES, Concepts, set_f1
from exporter.compare.captions.prepare import imageclef_text
from exporter.compare.captions.profiles import PROFILES, profile_named, score_profile
from exporter.compare.captions.resample import differences, intervals
from exporter.compare.captions.rouge import Rouge
from exporter.compare.captions.run import MetricPaths, OpenMetrics, chosen_names, open_metrics
from exporter.compare.captions.table import BY_NAME, CAPTION_METRICS, USUAL
from exporter.compare.records import CaptionRow, CaseRow
from exporter.compare.score import (
    Prediction,
    read_cases,
    read_predictions,
    score_comparison,
    score_predictions,
)
from exporter.compare.statistics import bootstrap_ratio
from exporter.core.errors import InputRefused, WrongUsage
from tests.unit.compare import tiny_metrics as tiny

DICTIONARY = (
    "cui\ttypes\tterm\n"
    "C0032227\tT047\tpleural effusion\n"
    "C0013687\tT046\teffusion\n"
    "C0024109\tT023\tlung\n"
    "C0024109\tT023\tlungs\n"
    "C0205091\tT082\tleft\n"
)


@pytest.fixture
def dictionary(tmp_path: Path) -> Path:
    path = tmp_path / "concepts.tsv"
    path.write_text(DICTIONARY, encoding="utf-8")
    return path


def test_the_preparation_is_the_published_one() -> None:
    assert imageclef_text("CT: 3.5 cm Mass (T2-w), 12") == "ct numbernumber cm mass tnumberw number"


def test_concepts_by_hand(dictionary: Path) -> None:
    metric = Concepts(dictionary)
    pairs = [
        # "left" is spatial: no MEDCON group. The longest term wins: no second "effusion".
        Pair("a", "Left pleural effusion", "pleural effusion in the lungs"),
        Pair("b", "a dog", "a cat"),
        Pair("c", "", " "),
        Pair("d", "effusion", "pleural effusion"),
    ]
    found = metric.score(pairs)
    assert list(found["concepts_medcon"].counts[:, 0]) == pytest.approx([2 / 3, 1, 1, 0])
    assert list(found["concepts_all"].counts[:, 0]) == pytest.approx([2 / 4, 0, 1, 0])
    assert {"T047", "T023", "T074", "T028", "T121", "T067", "T042"} <= MEDCON_TYPES
    assert not {"T082", "T061", "T060", "T097"} & MEDCON_TYPES
    assert set_f1({"a"}, set(), empty=1.0) == 0


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("cui term\n", "header is"),
        ("cui\ttypes\tterm\nX1\tT047\tmass\n", "line 2: expected a concept"),
        ("cui\ttypes\tterm\nC0000001\tT47\tmass\n", "line 2"),
        ("cui\ttypes\tterm\n", "no terms"),
    ],
)
def test_a_wrong_dictionary_is_refused(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "concepts.tsv"
    path.write_text(text)
    with pytest.raises(InputRefused, match=why):
        Concepts(path)


def test_a_mean_has_the_interval_of_the_other_tables() -> None:
    rng = np.random.default_rng(0)
    values, patients = rng.random(40), [f"p{i // 3}" for i in range(40)]
    ours = intervals({"x": mean_tally(values)}, patients)["x"]
    theirs = bootstrap_ratio(list(values), [1.0] * 40, patients)
    assert (ours.value, ours.low, ours.high) == pytest.approx(
        (theirs.value, theirs.low, theirs.high), rel=1e-12
    )
    other = rng.random(40)
    less = differences({"x": mean_tally(values)}, {"x": mean_tally(other)}, patients)["x"]
    paired = bootstrap_ratio(list(values - other), [1.0] * 40, patients)
    assert (less.value, less.low, less.high) == pytest.approx(
        (paired.value, paired.low, paired.high), rel=1e-9
    )


def test_bleu_is_resampled_as_a_corpus() -> None:
    """Each draw of patients is scored as the corpus it is, not as a mean of sentences."""
    words = ["a", "b", "c", "d", "e", "f", "g", "h"]
    rng = np.random.default_rng(1)
    pairs = [
        Pair(str(i), " ".join(rng.choice(words, 12)), " ".join(rng.choice(words, 12)))
        for i in range(12)
    ]
    patients = [f"p{i // 2}" for i in range(12)]
    found = intervals({"b": Bleu().score(pairs)["bleu2"]}, patients, resamples=40)["b"]
    draws = np.random.default_rng(20_260_101).multinomial(6, np.full(6, 1 / 6), size=40)
    scores = []
    for counts in draws:
        drawn = [p for i, n in enumerate(counts) for p in pairs[2 * i : 2 * i + 2] * int(n)]
        scores.append(Bleu().score(drawn)["bleu2"].value)
    low, high = np.quantile(scores, [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-9)


def test_one_patient_has_no_interval() -> None:
    found = intervals({"x": mean_tally([0.1, 0.2])}, ["p", "p"])["x"]
    assert found.value == pytest.approx(0.15)
    assert (found.low, found.high) == (-np.inf, np.inf)


def test_macro_and_micro_f1_by_hand() -> None:
    truth, said = np.zeros((2, 14), bool), np.zeros((2, 14), bool)
    truth[:, 1], said[0, 1] = True, True  # Cardiomegaly: 1 of 2 found, F1 2/3
    said[1, 4] = True  # Edema: one too many, F1 0
    found = label_tallies(truth, said)
    assert found["chexbert_micro14"].value == pytest.approx(2 / (2 + 1 + 1))
    assert found["chexbert_macro14"].value == pytest.approx(2 / 3 / 14)
    assert found["chexbert_macro5"].value == pytest.approx(2 / 3 / 5)
    assert f1_of_counts(np.zeros(6), macro=True) == 0


class Fixed:
    """Scores that are what the test says."""

    how = "fixed"

    def __init__(self, **values: float) -> None:
        self._values = values

    def score(self, pairs: list[Pair]) -> dict[str, Tally]:
        return {name: mean_tally([value] * len(pairs)) for name, value in self._values.items()}


def test_profile_is_the_mean_of_means_of_the_reference_study() -> None:
    """Its table 4: similarity 0.870, BERTScore 0.628, ROUGE 0.251, BLEURT 0.315; 0.154 and 0.081."""
    ready = OpenMetrics(
        {
            "similarity": Fixed(similarity_cosine=0.870, similarity_scaled=2.0),
            "bertscore": Fixed(bertscore_recall=0.628, bertscore_f1=0.5),
            "rouge": Fixed(rouge1=0.251),
            "bleurt": Fixed(bleurt=0.315),
            "concepts": Fixed(concepts_medcon=0.154, concepts_all=0.1),
            "alignscore": Fixed(alignscore=0.081),
        },
        {},
    )
    pairs = [Pair("a", "x", "y")]
    found, lost = score_profile(profile_named("imageclef-spec"), ready, pairs)
    assert not lost
    assert round(found["imageclef-spec.relevance"].value, 3) == 0.516
    assert found["imageclef-spec.factuality"].value == pytest.approx(0.1175)
    assert round(found["imageclef-spec.overall"].value, 3) == 0.317
    found, _ = score_profile(profile_named("imageclef-2026-code"), ready, pairs)
    relevance = (2.0 + 0.5 + 0.251 + 0.315) / 4
    assert found["imageclef-2026-code.relevance"].value == pytest.approx(relevance)
    with pytest.raises(WrongUsage, match="imageclef-spec or imageclef-2026-code"):
        profile_named("imageclef")


def test_a_profile_prepares_only_the_parts_it_says() -> None:
    seen: list[str] = []

    class Spy(Fixed):
        def score(self, pairs: list[Pair]) -> dict[str, Tally]:
            seen.extend(p.said for p in pairs)
            return super().score(pairs)

    ready = OpenMetrics({"rouge": Rouge(), "alignscore": Spy(alignscore=0.5)}, dict.fromkeys(("similarity", "bertscore", "bleurt", "concepts"), "absent"))  # fmt: skip
    found, lost = score_profile(PROFILES[0], ready, [Pair("a", "A 3 cm mass.", "a 5 cm Mass")])
    assert seen == ["a 5 cm Mass"]
    assert found["imageclef-spec.rouge1"].value == 1  # both read "a number cm mass"
    assert "lacks similarity_cosine (absent)" in lost["imageclef-spec.relevance"]
    assert "similarity_cosine (absent)" in lost["imageclef-spec.overall"]
    assert "concepts_medcon (absent)" in lost["imageclef-spec.overall"]
    assert "imageclef-spec.overall" not in found


def test_where_weights_are_looked_for(tmp_path: Path) -> None:
    row = BY_NAME["bertscore"]
    environment = {"MEDEXPORT_METRICS": str(tmp_path), "MEDEXPORT_METRIC_BLEURT": "/b"}
    paths = MetricPaths({"chexbert": tmp_path / "c"}, environment)
    assert paths.path(row) == tmp_path / "bertscore"  # type: ignore[arg-type]
    assert paths.path(BY_NAME["bleurt"]) == Path("/b")  # type: ignore[arg-type]
    assert paths.path(BY_NAME["chexbert"]) == tmp_path / "c"  # type: ignore[arg-type]
    assert MetricPaths({}, {"XDG_CACHE_HOME": "/x"}).folder == Path("/x/medexport/metrics")
    opened = open_metrics(["rouge", "bertscore"], paths)
    assert list(opened.ready) == ["rouge"]
    assert (
        f"looked for {tmp_path / 'bertscore'}; expected a BERT" in opened.not_computed["bertscore"]
    )
    with pytest.raises(InputRefused, match="no such file or folder"):
        open_metrics(["chexbert"], paths)


def test_absent_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from exporter.compare.captions import run

    (tmp_path / "bertscore").mkdir()
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    paths = MetricPaths({}, {"MEDEXPORT_METRICS": str(tmp_path)})
    why = open_metrics(["bertscore", "bleurt"], paths).not_computed
    assert why["bertscore"].endswith("install medexport[build] (torch, transformers)")
    assert why["bleurt"].endswith("install medexport[build] (torch, transformers)")


def test_names(tmp_path: Path) -> None:
    assert chosen_names([]) == list(USUAL) == ["rouge", "bleu"]
    assert chosen_names(["all"]) == [row.name for row in CAPTION_METRICS]
    with pytest.raises(WrongUsage, match="no metric 'meteor'; expected rouge, bleu"):
        chosen_names(["meteor"])


def test_every_figure_of_the_table_is_made(dictionary: Path, tmp_path: Path) -> None:
    """The figures that the table promises are those that the metrics give, in that order."""
    (tmp_path / "radgraph.json").write_text(json.dumps(tiny.RADGRAPH))
    tiny.write_bert(tmp_path / "bertscore")
    tiny.write_bleurt(tmp_path / "bleurt")
    tiny.write_alignscore(tmp_path / "alignscore")
    tiny.write_chexbert(tmp_path / "chexbert")
    opened = open_metrics([r.name for r in CAPTION_METRICS],
                          MetricPaths({}, {"MEDEXPORT_METRICS": str(dictionary.parent)}))  # fmt: skip
    assert set(opened.not_computed) == {"similarity"}
    pairs = [Pair("a", "Large effusion", "Large effusion"), Pair("b", "", "Large effusion")]
    for row in CAPTION_METRICS:
        if row.name in opened.ready:
            scored = opened.ready[row.name].score(pairs)
            assert not isinstance(scored, NotComputed)
            assert tuple(scored) == row.figures
            assert all(t.counts.shape[0] == 2 for t in scored.values())
            assert opened.ready[row.name].how


def test_score_of_predictions(dictionary: Path, tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    rows = [
        {"id": "1", "caption": "pleural effusion", "truth": "pleural effusion", "patient": "p"},
        {"id": "2", "caption": "left lung", "truth": "the right lung", "patient": "q"},
    ]
    path.write_text("\n".join(json.dumps(r) for r in rows))
    arguments = [str(path), "--metrics", "rouge,concepts,bertscore", "--profile", "imageclef-spec",
                 "--metric-path", f"concepts={dictionary}"]  # fmt: skip
    result = CliRunner().invoke(score, arguments, env={"MEDEXPORT_METRICS": str(tmp_path / "none")})
    assert result.exception is None, result.output
    lines = {line.split()[0]: line for line in result.stdout.splitlines()[1:]}
    assert "1.000 [1.000, 1.000] (2 images, 2 patients)" in lines["concepts_medcon"]
    assert "not computed: looked for" in lines["bertscore"]
    assert str(tmp_path / "none" / "bertscore") in lines["bertscore"]
    assert "not computed: lacks similarity_cosine (looked for" in lines["imageclef-spec.relevance"]
    assert "imageclef-spec.rouge1" in lines
    again = CliRunner().invoke(score, [*arguments, "--json"])
    found = json.loads(again.stdout)
    assert found["metrics"]["rougeL"]["images"] == 2
    assert found["how"]["concepts"].startswith("dictionary of 5 terms")
    wrong = CliRunner().invoke(score, [str(path), "--metric-path", "rouge=x"])
    assert isinstance(wrong.exception, WrongUsage)


def test_score_alone_keeps_the_built_in_ones() -> None:
    scores = score_predictions([Prediction("a", "a mass", "a mass", "p")])
    assert scores.rouge1 is not None
    assert scores.rouge1.value == 1
    assert (scores.rouge1.low, scores.rouge1.high) == (None, None)
    assert list(scores.metrics) == [*BY_NAME["rouge"].figures, *BY_NAME["bleu"].figures]
    json.dumps(msgspec.to_builtins(scores), allow_nan=False)


def case(i: int, truth: str | None, **captions: str) -> CaseRow:
    rows = {n: CaptionRow(t, 3, False, None, None, None, ()) for n, t in captions.items()}
    return CaseRow(str(i), f"{i}.png", f"p{i}", "ct", truth, None, rows)


def test_score_of_a_comparison(tmp_path: Path) -> None:
    rows = [
        case(1, "a mass in the lung", fp16="a mass in the lung", int4="a mass"),
        case(2, "normal heart", fp16="normal heart", int4="normal heart"),
        case(3, None, fp16="x", int4="y"),
    ]
    path = tmp_path / "cases.jsonl"
    path.write_bytes(b"\n".join(msgspec.json.encode(r) for r in rows))
    scores = score_comparison(read_cases(path))
    assert (scores.images, scores.patients) == (2, 2)
    assert [m.name for m in scores.models] == ["fp16", "int4"]
    assert scores.models[0].differences == {}
    less = scores.models[1].differences["rouge1"]
    assert less.value == pytest.approx((2 * 0.4 / 1.4 - 1) / 2)
    result = CliRunner().invoke(score, [str(tmp_path)])
    assert result.exception is None, result.output
    assert "less the reference" in result.stdout
    path.write_bytes(b"\n".join(msgspec.json.encode(r) for r in [rows[0], case(2, "x", fp16="x")]))
    with pytest.raises(InputRefused, match="case '2' has other models"):
        score_comparison(read_cases(path))
    with pytest.raises(InputRefused, match="no case has a ground-truth"):
        score_comparison([case(1, None, fp16="x")])
    with pytest.raises(InputRefused, match="expected a case"):
        read_cases(_written(tmp_path, '{"id": "1"}'))
    with pytest.raises(InputRefused, match="no predictions"):
        read_predictions(_written(tmp_path, ""))


def _written(folder: Path, text: str) -> Path:
    path = folder / "other.jsonl"
    path.write_text(text)
    return path


def test_concepts_of_a_medcat_pack(tmp_path: Path) -> None:
    """A pack of two concepts made with medcat itself."""
    medcat = pytest.importorskip("medcat.cat", reason="medcat is not installed")
    from medcat.config import Config
    from medcat.model_creation.cdb_maker import CDBMaker
    from medcat.vocab import Vocab

    config = Config()
    config.general.nlp.provider = "regex"
    config.components.linking.similarity_threshold = -1
    table = tmp_path / "concepts.csv"
    table.write_text(
        "cui,name,ontologies,name_status,type_ids,description\n"
        "C0032227,pleural effusion,x,P,T047,\nC0205091,left,x,P,T082,\n"
    )
    vocab = Vocab()
    for i, word in enumerate(("pleural", "effusion", "left")):
        vocab.add_word(word, cnt=10, vec=np.random.RandomState(i).randn(7))
    (tmp_path / "packs").mkdir()
    pack = medcat.CAT(CDBMaker(config).prepare_csvs([str(table)]), vocab, config).save_model_pack(
        str(tmp_path / "packs"), pack_name="tiny"
    )
    found = Concepts(Path(pack)).score([Pair("a", "pleural effusion", "left pleural effusion")])
    assert found["concepts_medcon"].value == 1
    assert found["concepts_all"].value == pytest.approx(2 / 3)
