"""What a run says is said once, is valid JSON, and a full disk is a clear message."""

import io
import json
import wave

import numpy as np
import pytest
from rich.console import Console

from speechjax.clock import StepClock
from speechjax.display import display
from speechjax.errors import UserError
from speechjax.logs import Logs, read_metrics


def quiet() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=300)


def logs_at(workdir, start_step=0, **options):
    return Logs(workdir, total_steps=100, start_step=start_step, console=quiet(), **options)


def lines(workdir):
    return (workdir / "metrics.jsonl").read_bytes().splitlines(keepends=True)


def test_entries_are_json_lines_and_nan_is_null(tmp_path):
    with logs_at(tmp_path) as logs:
        logs.write(20, "train", {"loss": 1.5, "grad_norm": float("nan"), "x": float("inf")})
    [line] = lines(tmp_path)
    assert json.loads(line) == {"step": 20, "split": "train", "loss": 1.5, "grad_norm": None, "x": None}


def test_resume_trims_what_will_be_logged_again_and_keeps_the_rest_byte_for_byte(tmp_path):
    with logs_at(tmp_path) as logs:
        for step in (10, 20, 30):
            logs.write(step, "train", {"loss": 1 / step})
    kept = lines(tmp_path)[:2]
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 40, "split": "tr')  # killed in the middle of a write
    with logs_at(tmp_path, start_step=20) as logs:
        assert lines(tmp_path) == kept
        logs.write(30, "train", {"loss": 9.0})
    assert [e["step"] for e in read_metrics(tmp_path)] == [10, 20, 30]
    with logs_at(tmp_path, start_step=0):
        pass
    assert lines(tmp_path) == []


def test_another_process_writes_nothing(tmp_path):
    with logs_at(tmp_path, enabled=False) as logs:
        logs.write(1, "train", {"loss": 1.0})
        logs.alarm(1, "collapse", "message")
        logs.table("t", ["a"], [["b"]])
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_has_the_scalars(tmp_path):
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

    with logs_at(tmp_path) as logs:
        logs.write(7, "train", {"loss": 1.5})
    [file] = (tmp_path / "tensorboard").iterdir()
    data, found = file.read_bytes(), []
    while data:  # TFRecord: length, its checksum, the record, its checksum
        size = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + size])
        found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
        data = data[16 + size :]
    assert found == [(7, "train/loss", 1.5)]


def test_picture_with_its_sound_and_only_the_newest_stay(tmp_path):
    with logs_at(tmp_path) as logs:
        for step in range(1, 8):
            logs.picture(step, "masks", np.full((8, 10, 3), 30 * step, np.uint8))
            logs.audio(step, "masks", np.arange(160, dtype=np.int16), 16000)
        with pytest.raises(ValueError):
            logs.picture(9, "masks", np.zeros((8, 10), np.uint8))
    names = sorted(p.name for p in (tmp_path / "report").iterdir())
    assert names == sorted(f"masks_{s}.{kind}" for s in (4, 5, 6, 7) for kind in ("png", "wav"))
    with wave.open(str(tmp_path / "report/masks_7.wav")) as sound:
        assert np.array_equal(np.frombuffer(sound.readframes(160), "<i2"), np.arange(160))


def test_alarm_speaks_once_until_it_clears(tmp_path):
    with logs_at(tmp_path) as logs:
        for step, current in ((1, {"a": "bad"}), (2, {"a": "bad"}), (3, {}), (4, {"a": "bad"})):
            logs.alarms(step, current)
    found = [(e["step"], e["message"]) for e in read_metrics(tmp_path)]
    assert found == [(1, "bad"), (3, None), (4, "bad")]


def test_progress_line_has_chance_and_eta(tmp_path):
    now = [0.0]
    logs = logs_at(tmp_path, clock=lambda: now[0])
    logs.progress(10, {"loss": 4.0})
    now[0] = 5.0
    logs.progress(20, {"accuracy": 0.5, "chance_accuracy": 0.01})
    out = logs._console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "step 20/100 | acc 50.0% (chance 1.0%) | eta 0:00:40" in out
    logs.close()


def test_table_is_kept_once(tmp_path):
    with logs_at(tmp_path) as logs:
        for _ in range(2):
            logs.table("Probe", ["features", "mean"], [["this encoder", "71.0"]])
    assert (tmp_path / "report/tables.txt").read_text().count("this encoder") == 1


def test_unwritable_workdir_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to the workdir"):
        logs_at(tmp_path / "file")


def test_full_disk_is_a_clear_error(tmp_path):
    logs = logs_at(tmp_path)
    logs._metrics.close()
    logs._metrics = open("/dev/full", "ab", buffering=0)
    with pytest.raises(UserError, match="No space left"):
        logs.write(1, "train", {"loss": 1.0})
    logs.close()


class TestStepClock:
    def test_shares_and_rates(self):
        now = [0.0]
        clock = StepClock(clock=lambda: now[0])

        def spend(seconds):
            now[0] += seconds

        for _ in range(4):
            with clock.input_wait():
                spend(0.5)
            spend(1.5)
            clock.step(36.0)
        with clock.pause():
            spend(100)
        found = clock.read_and_reset()
        assert found["steps_per_second"] == pytest.approx(0.5)
        assert found["input_wait_share"] == pytest.approx(0.25)
        assert found["audio_hours_per_second"] == pytest.approx(4 * 0.01 / 8)
        assert found["seconds"] == pytest.approx(8)

    def test_reset(self):
        now = [0.0]
        clock = StepClock(clock=lambda: now[0])
        now[0] = 3.0
        clock.step(1.0)
        clock.read_and_reset()
        now[0] = 4.0
        clock.step(1.0)
        assert clock.read_and_reset()["steps_per_second"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("name", "shown"),
    [("accuracy_low", "50.0%"), ("eer_worst", "50.00%"), ("false_rejects_0.1_high", "50.0%"), ("bleu_gap", "0.5")],
)
def test_limits_and_groups_are_shown_like_what_they_belong_to(name, shown):
    assert display(name).number(0.5) == shown
