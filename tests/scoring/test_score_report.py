"""Tables cell by cell; figures: what they show is there, and odd inputs do not break them."""

import json
import math

import numpy as np
import pytest

from speechjax.logs import Logs
from speechjax.scoring import (
    bootstrap,
    calibration,
    classes,
    detection,
    figures,
    groups,
    report,
    robustness,
    verification,
    words,
)
from speechjax.scoring.bootstrap import Difference, Interval

NAN = math.nan


def test_error_rates_and_confusions():
    found = words.align_words(["a b c d", "a b", "x"], ["a b c d", "a e e", ""])
    table = report.error_rates("errors", {"ours": found}, blocks=["u", "u", "v"])
    assert table["rows"][0][:4] == ["ours", 3, 7, "42.9"]
    assert table["rows"][0][5:] == ["14.3", "14.3", "14.3", "66.7"]
    assert len(table["columns"]) == len(table["rows"][0])
    alone = report.error_rates("errors", {"ours": words.align_words(["a b"], ["a"])})
    assert alone["rows"][0][4] == "-", "one utterance has no interval"
    found = words.align_words(["a b", "a c", "x", "y"], ["a c", "a b", "", "y z"])
    assert report.confusions("errors", found)["rows"] == [
        ["x", "left out", "", 1], ["", "put in", "z", 1], ["b", "taken for", "c", 1], ["c", "taken for", "b", 1],
    ]  # fmt: skip
    assert report.confusions("errors", words.align_words(["a a a"], ["b b"]), most=1)["rows"] == [
        ["a", "taken for", "b", 2]
    ]


def test_classes_and_reliability():
    counts = classes.confusion_matrix([0, 0, 0, 1, 1], [0, 0, 1, 0, 0], 3)
    assert report.per_class("classes", counts, ["yes", "no", "other"])["rows"] == [
        ["yes", 3, "66.7", "50.0", "57.1", "no (1)"],
        ["no", 2, "0.0", "0.0", "0.0", "yes (2)"],
        ["other", 0, "-", "-", "-", "-"],
    ]
    table = calibration.reliability([0.55, 0.95, 0.95], [0, 1, 0], bins=10)
    assert report.reliability("bins", table)["rows"] == [
        ["50.0 to 60.0", 1, "55.0", "0.0"], ["90.0 to 100.0", 2, "95.0", "50.0"],
    ]  # fmt: skip


def test_detection_tables():
    errors = verification.error_rates([1, 3, 5, 0, 2, 4], [1, 1, 1, 0, 0, 0])
    table = report.verification_costs("speakers", {"ours": errors}, p_targets=(0.5,))
    assert (table["columns"], table["rows"]) == (["", "EER, %", "minDCF(0.5)"], [["ours", "33.33", "0.667"]])
    limits = verification.CostIntervals(Interval(1 / 3, 0.25, 0.5), (Interval(2 / 3, NAN, NAN),))
    table = report.verification_costs("speakers", {"ours": errors}, p_targets=(0.5,), intervals=limits)
    assert table["rows"] == [["ours", "33.33", "0.667"], ["95 % interval", "25.00 to 50.00", "-"]]
    curve = detection.Curve(np.array([0.1, 0.2, np.inf]), np.array([0, 0.25, 1]), np.array([9.0, 0.9, 0]))
    table = report.false_rejects("words", {"hey": curve}, per_hour=(0.5, 1))
    assert table["columns"][1:] == [f"false rejects, % at {rate} false alarms/h" for rate in ("0.5", "1")]
    assert table["rows"] == [["hey", "100.0", "25.0"]]
    limits = [Interval(1.0, 0.5, 1.0), Interval(0.25, 0.125, 0.5)]
    table = report.false_rejects("words", {"hey": curve}, per_hour=(0.5, 1), intervals=limits)
    assert table["rows"][1] == ["95 % interval", "50.0 to 100.0", "12.5 to 50.0"]


def test_groups_comparisons_and_conditions():
    found = groups.ratio_by_group([1, 1, 4, 4, 3], np.full(5, 10), ["a", "a", "b", "b", "c"], min_size=2)
    table = report.groups("WER, %", found)
    assert table["title"] == "WER, %: gap 30.0 between b and a, 115% of the score of all"
    assert [row[:3] for row in table["rows"]] == [
        ["b", 2, "40.0"], ["a", 2, "10.0"], ["c (not compared)", 1, "30.0"], ["all", 5, "26.0"],
    ]  # fmt: skip
    assert table["rows"][0][3] == "40.0 to 40.0"
    assert table["rows"][2][3] == "-"
    rows = report.comparison("two", {"b - a": Difference(Interval(-0.021, -0.03, 0.001), 0.97)})["rows"]
    assert rows == [["b - a", "-2.1", "-3.0 to 0.1", "97.0"]]
    scores = {"ours": {"clean": Interval(0.1, 0.05, 0.15), "white 0 dB": Interval(0.4, NAN, NAN)}}
    assert report.conditions("noise", scores)["rows"] == [["clean", "10.0 (5.0 to 15.0)"], ["white 0 dB", "40.0 (-)"]]


def test_the_tables_are_those_of_the_logs(tmp_path):
    found = groups.ratio_by_group([1, 1, 4, 4], np.full(4, 10), ["a", "a", "b", "b"], min_size=2)
    table = report.groups("WER, %", found)
    with Logs(tmp_path, total_steps=1, start_step=0) as logs:
        logs.table(table["title"], table["columns"], table["rows"])
        logs.save_json("accents", table)
    assert "gap 30.0 between b and a" in (tmp_path / "report" / "tables.txt").read_text()
    assert json.loads((tmp_path / "report" / "accents.json").read_text()) == table


# ---- figures


def pictures() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    good, bad = (verification.error_rates(rng.normal(d * (np.arange(90) < 40)), np.arange(90) < 40) for d in (9, 0))
    table = calibration.reliability([0.5, 0.9], [0, 1])
    curve = detection.Curve(np.array([0.1, 0.2, np.inf]), np.array([0, 0.25, 1]), np.array([9.0, 0.9, 0]))
    none = detection.Curve(np.array([np.inf]), np.array([1.0]), np.array([0.0]))
    counts = np.array([[3, 1, 0], [0, 200, 1], [0, 0, 0]])
    conditions = robustness.conditions(white=(10, 0), reverberation=(0.3,))
    # A percentile interval beside its score, and none.
    scores = {"clean": Interval(0.1, 0.11, 0.2), "white 10 dB": Interval(0.2, 0.21, 0.3),
              "white 0 dB": Interval(0.3, NAN, NAN), "T60 0.3 s": Interval(0.3, 0.2, 0.4)}  # fmt: skip
    return {
        "reliability": figures.reliability_diagram({"one": table, "two": table}, "title"),
        "confusion": figures.confusion_picture(counts, ["a$b", "中", "long name"], "title"),
        "many classes": figures.confusion_picture(np.eye(30, dtype=int), [str(k) for k in range(30)], "title"),
        "det": figures.det_curves({"perfect": good, "chance": bad}, "title"),
        "wake word": figures.false_reject_curves({"one": curve, "none": none}, "title"),
        "conditions": figures.condition_curves({"a": scores, "b": scores}, conditions, "WER, %", "title"),
    }


def test_pictures_are_what_the_logs_want_and_show_something(tmp_path):
    with Logs(tmp_path, total_steps=1, start_step=0) as logs:
        for name, image in pictures().items():
            assert image.dtype == np.uint8
            assert 300 < image.shape[0] < 1300
            assert image.std() > 10, name
            logs.picture(1, name, image)
    assert len(list((tmp_path / "report").glob("*.png"))) == 6


def test_a_better_system_lies_nearer_to_the_corner():
    """The ink of a DET curve: that of a good system is below the diagonal of chance."""
    rng = np.random.default_rng(0)
    target = np.arange(4000) < 2000
    ink = {}
    for name, distance in (("good", 3.0), ("poor", 0.3)):
        errors = verification.error_rates(rng.normal(distance * target), target)
        image = figures.det_curves({name: errors}, "title").astype(int)
        blue = (image[..., 2] - image[..., 0] > 90) & (np.arange(image.shape[0])[:, None] > 120)  # below the legend
        assert blue.sum() > 600, "a curve, not only the dot on it"
        ink[name] = np.argwhere(blue).mean(axis=0)
    assert ink["good"][0] > ink["poor"][0] + 40
    assert ink["good"][1] < ink["poor"][1] - 40


def test_every_figure_takes_intervals_of_the_bootstrap():
    interval = bootstrap.interval([1, 2, 3], [9, 9, 9], resamples=50)
    (condition,) = robustness.conditions(white=(5,))[1:]
    scores = {"a": {"clean": interval, condition.name: interval}}
    assert figures.condition_curves(scores, [condition], "WER, %", "title").ndim == 3
    with pytest.raises(KeyError):
        figures.condition_curves({"a": {}}, [condition], "WER, %", "title")
