"""The report page: whole on any workdir, escaped, and really drawn from the metrics."""

import json
import re

import matplotlib.image
import numpy as np
import pytest

from speechjax import curves
from speechjax.pictures import mask_picture
from speechjax.report import write_report


def write_metrics(workdir, entries):
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))


def entry(step, **values):
    return {
        "step": step,
        "split": "train",
        "loss": 5 - step / 100,
        "contrastive": 4.5,
        "chance_contrastive": 4.6,
        **values,
    }


def test_run_that_has_just_started(tmp_path):
    page = write_report(tmp_path).read_text()
    assert "Nothing logged yet" in page


def test_curves_numbers_and_alarms(tmp_path):
    alarm = {"step": 30, "split": "alarm", "name": "codebook_collapse", "message": "perplexity 2 < 5"}
    entries = [entry(s, code_perplexity=50.0, novel_metric=float(s), grad_norm=None) for s in range(10, 60, 10)]
    write_metrics(tmp_path, [*entries, alarm])
    page = write_report(tmp_path).read_text()
    for name in ("curves_loss.png", "curves_codebook.png", "curves_other.png"):
        assert f'src="{name}"' in page
        assert matplotlib.image.imread(tmp_path / "report" / name).std() > 0.01  # something is drawn
    assert "curves_optimization" not in page  # only nulls there
    assert "perplexity 2 &lt; 5" in page
    assert "chance 4.6" in page


def test_curve_changes_with_the_metrics(tmp_path):
    write_metrics(tmp_path, [entry(10), entry(20)])
    write_report(tmp_path)
    before = (tmp_path / "report/curves_loss.png").read_bytes()
    write_metrics(tmp_path, [entry(10), entry(20, loss=99.0)])
    write_report(tmp_path)
    assert (tmp_path / "report/curves_loss.png").read_bytes() != before


def test_everything_is_escaped_and_links_are_relative(tmp_path):
    evil = "<script>alert(1)</script>"
    (tmp_path / "config.json").write_text(json.dumps({"data": {"source": evil}}))
    (tmp_path / "rejected.jsonl").write_text(json.dumps({"id": evil, "reason": evil}) + "\n")
    (tmp_path / "report").mkdir()
    (tmp_path / "report/probe.json").write_text(json.dumps({"title": evil, "columns": [evil], "rows": [[evil]]}))
    write_metrics(tmp_path, [entry(10), {"step": 1, "split": "alarm", "name": evil, "message": evil}])
    page = write_report(tmp_path).read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 7
    assert not re.search(r'(src|href)="(/|https?:|file:)', page)


def test_names_of_files_that_are_not_text(tmp_path):
    name = b"caf\xe9.wav".decode("utf-8", "surrogateescape")
    (tmp_path / "rejected.jsonl").write_text(json.dumps({"id": name, "reason": "truncated"}) + "\n")
    assert b"caf\\udce9.wav: truncated" in write_report(tmp_path).read_bytes()


def test_pictures_with_their_sound_by_name(tmp_path):
    (tmp_path / "report").mkdir()
    for name in ("picture_20.png", "picture_20.wav", "picture_100.png", "units_map_7.png", "units_map_30.png"):
        (tmp_path / "report" / name).write_bytes(b"")
    page = write_report(tmp_path).read_text()
    assert page.index("picture_100.png") < page.index("picture_20.png")  # newest first
    assert re.search(r"<audio[^>]*picture_20\.wav", page)
    assert "picture_100.wav" not in page
    predicts, units = page.index("<h2>What it predicts</h2>"), page.index("<h2>Units map</h2>")
    assert predicts < page.index("picture_20.png") < units < page.index("units_map_30.png")
    assert page.count("<summary>1 before</summary>") == 2
    assert page.index("units_map_30.png") < page.index("units_map_7.png")


def table(**changes):
    return {"title": "T", "columns": ["features", "all"], "rows": [["this encoder", "61.0"]]} | changes


def test_every_table_is_shown_and_other_files_are_not(tmp_path):
    folder = tmp_path / "report"
    folder.mkdir()
    (folder / "probe.json").write_text(json.dumps(table(title="first title")))
    (folder / "abx.json").write_text(json.dumps(table(title="second title", rows=[["log-mel", 12.5]])))
    (folder / "evaluate.json").write_text(json.dumps({"step": 3, "evals": {}}))
    (folder / "list.json").write_text("[1, 2]")
    (folder / "torn.json").write_text('{"title": "x", "columns"')
    page = write_report(tmp_path).read_text()
    assert page.index("<h2>Abx</h2><p>second title") < page.index("<h2>Probe</h2><p>first title")
    assert "<td>log-mel</td><td>12.5</td>" in page
    assert page.count("<table>") == 2


@pytest.mark.parametrize(
    "plot",
    [
        dict(lines={"this encoder": [61.0, 55.0], "untrained": [50.0, 50.5]}, levels={"log-mel": 67.0, "MFCC": 80.0}),
        dict(lines={k: [20.0, 50.0] for k in "abcd"}, spread={k: [3.0, 1.0] for k in "abcd"}),
    ],
)
def test_a_table_with_a_plot(tmp_path, plot):
    folder = tmp_path / "report"
    folder.mkdir()
    plot = dict(x=[1, 20], xlabel="hidden state", ylabel="accuracy in %") | plot
    (folder / "probe_layers.json").write_text(json.dumps(table(plot=plot)))
    assert '<img src="table_probe_layers.png"' in write_report(tmp_path).read_text()
    before = matplotlib.image.imread(folder / "table_probe_layers.png")
    assert before.std() > 0.01
    for part in ("levels", "spread"):
        (folder / "probe_layers.json").write_text(json.dumps(table(plot={k: v for k, v in plot.items() if k != part})))
        write_report(tmp_path)
        after = matplotlib.image.imread(folder / "table_probe_layers.png")
        assert (part in plot) == (before.shape != after.shape or bool((before != after).any()))


# What tasks report, as they name it; a metric that a person would look for elsewhere is a mistake of the table.
FAMILY = {
    "hubert": ({"loss", "masked", "accuracy"}, {"prediction_perplexity"}, set()),
    "data2vec": ({"loss", "regression"}, set(), {"prediction_variance", "feature_variation"}),
    "apc": ({"loss", "prediction", "mse", "rmse"}, set(), {"output_deviation"}),
    "distill": ({"loss", "l1", "cosine", "similarity_1", "similarity_2"}, set(), {"prediction_variance"}),
    "mae": ({"loss", "reconstruction", "frame_error"}, set(), {"output_deviation"}),
    "autoencode": ({"loss", "reconstruction"}, {"code_perplexity", "commitment", "unused_codes"}, {"output_deviation"}),
}
BESIDE = {
    "hubert": {"chance_masked", "chance_accuracy", "target_perplexity"},
    "data2vec": {"chance_regression", "target_variance"},
    "apc": {"chance_prediction", "chance_rmse", "copy_error", "copy_rmse", "linear_error", "linear_rmse",
            "target_deviation"},
    "distill": {"chance_l1", "chance_cosine", "chance_similarity", "target_variance"},
    "mae": {"chance_reconstruction", "interpolation_error", "target_deviation"},
    "autoencode": {"chance_reconstruction", "target_deviation"},
}  # fmt: skip


@pytest.mark.parametrize("task", FAMILY)
def test_metrics_of_every_objective_find_their_figure_and_what_to_compare_with(task):
    names = set().union(*FAMILY[task]) | BESIDE[task]
    known = dict.fromkeys(sorted(names))
    assert {name for name in names if curves.reference_of(name, known)} == BESIDE[task]
    own = names - BESIDE[task]
    found = {figure: {n for n in own if curves.figure_of(n, known) == figure} for figure in curves.ORDER}
    assert tuple(found[figure] for figure in ("loss", "codebook", "variation")) == FAMILY[task]
    for name in own:
        if name.startswith("similarity"):
            assert curves.chance_of(name, known) == "chance_similarity"


def test_an_objective_of_ones_own_is_grouped_by_its_chance_level():
    known = {"alignment": 0, "chance_alignment": 0, "wobble": 0, "score": 0, "score_random": 0, "rate_mfcc": 0}
    assert curves.figure_of("alignment", known) == "loss"
    assert curves.figure_of("wobble", known) == "other"
    assert curves.reference_of("score_random", known) == "score"
    assert curves.reference_of("rate_mfcc", known) is None  # no "rate" that it would be a control of
    assert set(curves.FIGURES) | {"other"} == set(curves.ORDER)


def test_cards_have_chance_levels_and_the_newest_evaluation_its_controls(tmp_path):
    hubert = [{"step": 10, "split": "train", "loss": 4.0, "masked": 4.0, "chance_masked": 4.6, "accuracy": 0.2,
               "chance_accuracy": 0.05, "prediction_perplexity": 31.25}]  # fmt: skip
    scores = {"score_random": 51.2, "score_mfcc": 80.4}
    probes = [{"step": s, "split": "probe", "score": 50.0 + s, **scores} for s in (5, 10)]
    write_metrics(tmp_path, [*hubert, *probes])
    page = write_report(tmp_path).read_text()
    text = re.sub(r"<[^>]+>", "|", page)
    assert re.search(r"\|20\.0%\|+chance 5\.0%\|+Accuracy\|", text)
    assert re.search(r"\|4\|+chance 4\.6\|+Loss on masked frames\|", text)
    assert re.search(r"\|31\.2\|+Perplexity of the predictions\|", text)
    assert re.search(r"\|60\.0\|+untrained 51\.2, MFCC 80\.4\|+probe: Accuracy of the linear probe, %\|", text)
    assert "55.0" not in text


def test_a_reference_is_drawn_where_it_belongs(tmp_path):
    """The grey line changes the panel of its metric, and makes none of its own."""
    sizes = {}
    for name, extra in (
        ("alone", {}),
        ("beside", {"chance_rmse": 0.9, "copy_rmse": 0.8}),
        ("own", {"novel": 1}),
    ):
        (tmp_path / name).mkdir()
        write_metrics(tmp_path / name, [{"step": s, "split": "train", "rmse": 0.5, **extra} for s in (1, 2)])
        write_report(tmp_path / name)
        sizes[name] = matplotlib.image.imread(tmp_path / name / "report/curves_loss.png")
    assert sizes["alone"].shape == sizes["beside"].shape
    assert (sizes["alone"] != sizes["beside"]).any()
    assert {path.name for path in (tmp_path / "beside/report").glob("*.png")} == {"curves_loss.png"}
    assert (tmp_path / "own/report/curves_other.png").exists()


def test_torn_files_do_not_break_the_page(tmp_path):
    (tmp_path / "config.json").write_text('{"data": ')
    (tmp_path / "metrics.jsonl").write_text(json.dumps(entry(10)) + '\n{"step": 2')
    assert "<h1>" in write_report(tmp_path).read_text()


class TestMaskPicture:
    rng = np.random.default_rng(0)
    mel = rng.standard_normal((100, 80))
    codes = np.where(np.arange(50) < 25, 3, -1)
    mask = np.arange(50) < 25

    def test_masked_frames_look_different(self):
        shown = mask_picture(self.mel, self.mask, self.codes, self.codes, 1.0, "t")
        plain = mask_picture(self.mel, ~self.mask, self.codes, self.codes, 1.0, "t")
        assert shown.dtype == np.uint8
        assert shown.shape[2] == 3
        assert (shown != plain).mean() > 0.05

    def test_agreement_is_shown(self):
        right = mask_picture(self.mel, self.mask, self.codes, self.codes, 1.0, "t")
        wrong = mask_picture(self.mel, self.mask, self.codes, np.where(self.codes == 3, 4, -1), 1.0, "t")
        assert (right != wrong).any()

    def test_shapes_that_do_not_fit(self):
        with pytest.raises(ValueError):
            mask_picture(self.mel, self.mask[:10], self.codes, self.codes, 1.0, "t")
