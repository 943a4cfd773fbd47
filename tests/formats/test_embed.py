"""`python -m speechjax.embed`: arrays in the three kinds of places, and what cannot be read."""

import numpy as np
import pytest
import soundfile

import speechjax
from speechjax import embed
from speechjax.errors import UserError


@pytest.fixture(scope="module")
def audio(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audio")
    (folder / "deep").mkdir()
    for k, name in enumerate(("one.wav", "deep/two.flac")):
        sound = np.rint(3000 * np.random.default_rng(k).normal(size=9000 - 1000 * k)).clip(-30000, 30000)
        soundfile.write(folder / name, sound.astype(np.int16), 16000)
    return folder


def pcm(audio, name):
    return soundfile.read(audio / name, dtype="int16")[0]


def test_arrays_are_the_models(workdirs, audio, tmp_path, caplog):
    model = speechjax.load(workdirs / "hubert")
    wanted = {name: model.features(pcm(audio, name), layer=0) for name in ("one.wav", "deep/two.flac")}
    call = [f"--workdir={workdirs / 'hubert'}", "--layer=0", str(audio)]
    for out in ("x.npz", "x.safetensors", "x"):
        assert embed.run([*call, f"--out={tmp_path / out}"]) == 0
    with np.load(tmp_path / "x.npz", allow_pickle=False) as file:
        found = dict(file)
    import safetensors.numpy

    for arrays in (found, safetensors.numpy.load_file(tmp_path / "x.safetensors"),
                   {name: np.load(tmp_path / "x" / f"{name}.npy", allow_pickle=False) for name in wanted}):  # fmt: skip
        assert arrays.keys() == wanted.keys()
        for name, array in wanted.items():
            np.testing.assert_allclose(arrays[name], array, atol=1e-6)
    assert np.abs(wanted["one.wav"] - model.features(pcm(audio, "one.wav"))).max() > 1e-2, "another layer"
    with caplog.at_level("INFO", logger="speechjax"):
        embed.run([*call, f"--out={tmp_path / 'x'}"])
    assert ": 0 recordings" in caplog.text  # all there already


def test_all_layers_and_broken_files(workdirs, audio, tmp_path, caplog):
    (tmp_path / "bad.wav").write_text("no audio")
    call = [f"--workdir={workdirs / 'hubert'}", "--layer=all", str(tmp_path / "bad.wav"), str(audio / "one.wav")]
    assert embed.run([*call, f"--out={tmp_path / 'x.npz'}"]) == 1
    assert "bad.wav: not audio" in caplog.text
    model = speechjax.load(workdirs / "hubert")
    with np.load(tmp_path / "x.npz") as file:
        assert file["one.wav"].shape == (model.layers + 1, model.frames(9000), model.width)
        assert list(file) == ["one.wav"]


def test_mistakes(workdirs, audio, tmp_path, capsys):
    (tmp_path / "x.npz").touch()
    for out, message in ((tmp_path / "x.npz", "there already"), (tmp_path / "none" / "x.npz", "no such folder")):
        with pytest.raises(UserError, match=message):
            embed.run([f"--workdir={workdirs / 'hubert'}", f"--out={out}", str(audio)])
    with pytest.raises(UserError, match="layer=7"):
        embed.run([f"--workdir={workdirs / 'hubert'}", f"--out={tmp_path / 'y'}", "--layer=7", str(audio)])
    with pytest.raises(SystemExit):
        embed.run(["--workdir=x", "--out=y", "--layer=top", "z"])
    assert "last, all or a number" in capsys.readouterr().err


def test_two_recordings_of_one_name_are_refused(workdirs, audio, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "one.wav").write_bytes((audio / "one.wav").read_bytes())
    call = [f"--workdir={workdirs / 'hubert'}", f"--out={tmp_path / 'x.npz'}", str(audio), str(tmp_path / "other")]
    with pytest.raises(UserError, match=r"several recordings would be called one\.wav"):
        embed.run(call)
