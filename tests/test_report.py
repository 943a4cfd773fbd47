"""The report page: whole on any workdir, escaped, and really drawn from the metrics."""

import json
import re

import matplotlib.image
import numpy as np
import pytest

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


def test_pictures_with_their_sound(tmp_path):
    (tmp_path / "report").mkdir()
    for name in ("picture_20.png", "picture_20.wav", "picture_100.png"):
        (tmp_path / "report" / name).write_bytes(b"")
    page = write_report(tmp_path).read_text()
    assert page.index("picture_100.png") < page.index("picture_20.png")  # newest first
    assert re.search(r"<audio[^>]*picture_20\.wav", page)
    assert "picture_100.wav" not in page


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
