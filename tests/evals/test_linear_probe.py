"""The linear probe on closed cases, against plain scikit-learn, and its controls on real speech."""

from pathlib import Path

import jax.numpy as jnp
import librosa
import numpy as np
import pytest
import soundfile
import soxr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from speechjax.errors import UserError
from speechjax.evals import _linear_probe as linear_probe
from speechjax.evals._linear_probe import leave_one_group_out

SPEAKERS = ("anna", "ben", "carla", "dan")
WORDS = ("yes", "no", "maybe")


@pytest.fixture(autouse=True, scope="module")
def _one_blas_thread():
    """As the probe does for its own fits: several BLAS pools on few cores wait for each other most of the time."""
    with threadpool_limits(1):
        yield


def _clusters(separation: float, *, per_cell: int = 15, n_features: int = 8, seed: int = 0):
    """Gaussian clusters, one per word, shifted by speaker: features, labels, groups."""
    rng = np.random.default_rng(seed)
    labels, groups = np.meshgrid(np.repeat(WORDS, per_cell), SPEAKERS)
    labels, groups = labels.ravel(), groups.ravel()
    word_means, speaker_means = rng.normal(0, separation, (3, n_features)), rng.normal(0, 1, (4, n_features))
    means = word_means[np.searchsorted(sorted(WORDS), labels)] + speaker_means[np.searchsorted(SPEAKERS, groups)]
    return means + rng.normal(0, 1, means.shape), labels, groups


def _plain_classifier(strength: float):
    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, tol=1e-6, max_iter=10000))


def test_separable_words_are_all_recognised():
    result = leave_one_group_out(*_clusters(20.0))
    assert result["accuracy"] == dict.fromkeys(SPEAKERS, 100.0)
    assert result["mean"] == 100.0
    assert result["unconverged"] == 0


def test_shuffled_labels_are_at_chance():
    features, labels, groups = _clusters(20.0, per_cell=50)
    labels = np.random.default_rng(1).permutation(labels)
    # 600 answers, correct with probability 1/3: standard deviation 1.9 points; five of them.
    assert abs(leave_one_group_out(features, labels, groups)["mean"] - 100 / 3) < 5 * 1.9


def test_what_only_one_speaker_does_is_not_credited():
    rng = np.random.default_rng(2)
    _, labels, groups = _clusters(0.0, per_cell=50)
    codes = {(word, speaker): rng.normal(0, 1, 30) for word in WORDS for speaker in SPEAKERS}
    features = np.array([codes[cell] for cell in zip(labels, groups, strict=True)]) + rng.normal(0, 0.1, (600, 30))
    inside, outside, answers, wanted = train_test_split(features, labels, random_state=0)
    assert _plain_classifier(1.0).fit(inside, answers).score(outside, wanted) == 1.0
    # All examples of a word and speaker share a code, so a speaker's accuracy is k/3 by luck: 12 draws at 1/3.
    assert leave_one_group_out(features, labels, groups)["mean"] < 75.0


def test_a_test_speaker_has_no_part_in_its_own_classifier():
    features, labels, groups = _clusters(0.7)
    before = leave_one_group_out(features, labels, groups)
    mine = groups == "ben"
    flipped = np.where(mine, WORDS[0], labels)
    after = leave_one_group_out(np.where(mine[:, None], 1e3 * features, features), flipped, groups)
    unseen = leave_one_group_out(features, flipped, groups, held_out=["ben"])
    assert after["strength"]["ben"] == before["strength"]["ben"] == unseen["strength"]["ben"]
    # Same classifier, other question: how often does it answer WORDS[0]? Only a plain fit without ben can tell.
    kept = np.zeros(len(labels), bool)
    kept[np.random.default_rng(0).permutation(len(labels))[: round(0.9 * len(labels))]] = True
    plain = _plain_classifier(unseen["strength"]["ben"]).fit(features[kept & ~mine], labels[kept & ~mine])
    assert unseen["accuracy"]["ben"] == pytest.approx(100 * plain.score(features[mine], flipped[mine]), abs=1e-9)
    others = [speaker for speaker in SPEAKERS if speaker != "ben"]
    assert [after["accuracy"][s] for s in others] != [before["accuracy"][s] for s in others], "the change does nothing"


@pytest.mark.parametrize(
    ("n_features", "separation"), [(8, 0.3), (400, 0.1)]
)  # fewer and more features than the 135 training examples
def test_a_fixed_penalty_agrees_with_plain_scikit_learn(monkeypatch, n_features, separation):
    monkeypatch.setattr(linear_probe, "STRENGTHS", (0.01,))
    features, labels, groups = _clusters(separation, n_features=n_features)
    result = leave_one_group_out(features, labels, groups, train_share=1.0)

    def plain(strength: float) -> dict[str, float]:
        return {
            s: 100
            * _plain_classifier(strength)
            .fit(features[groups != s], labels[groups != s])
            .score(features[groups == s], labels[groups == s])
            for s in SPEAKERS
        }

    # float32 and a tolerance of 1e-4 may move an example that lies on a boundary: one of 45 is 2.2 points.
    assert result["accuracy"] == pytest.approx(plain(0.01), abs=2.3)
    assert result["accuracy"] != pytest.approx(plain(100.0), abs=2.3)


def test_the_penalty_is_that_of_a_nested_leave_one_speaker_out():
    features, labels, groups = _clusters(0.25, n_features=60)
    chosen = leave_one_group_out(features, labels, groups, train_share=1.0)["strength"]
    for tested in SPEAKERS:
        losses = np.zeros(len(linear_probe.STRENGTHS))
        for inner in set(SPEAKERS) - {tested}:
            train, test = (groups != tested) & (groups != inner), groups == inner
            for i, strength in enumerate(linear_probe.STRENGTHS):
                plain = _plain_classifier(strength).fit(features[train], labels[train])
                losses[i] += log_loss(labels[test], plain.predict_proba(features[test]), labels=plain.classes_)
        assert chosen[tested] == linear_probe.STRENGTHS[losses.argmin()]
        assert linear_probe.STRENGTHS[0] < chosen[tested] < linear_probe.STRENGTHS[-1], "an end would prove little"


def test_every_layer_is_scored_as_if_it_were_alone_and_the_best_is_chosen_without_the_tested_speaker():
    weak, labels, groups = _clusters(0.1, n_features=40)
    strong, _, _ = _clusters(0.6, n_features=40)
    # Layer 2 knows all of ben's labels and nobody else's: whoever trains without him must not choose it.
    hers = np.where((groups == "ben")[:, None], 5 * np.eye(40)[np.searchsorted(sorted(WORDS), labels)], weak)
    layers = [weak, strong[:, :30], hers]  # widths may differ
    found = leave_one_group_out(layers, labels, groups)
    for layer in range(3):
        alone = leave_one_group_out(layers[layer], labels, groups)
        assert found["layers"][layer] == alone["accuracy"]
        for speaker in SPEAKERS:
            if found["layer"][speaker] == layer:
                assert found["accuracy"][speaker] == alone["accuracy"][speaker]
                assert found["strength"][speaker] == alone["strength"][speaker]
    assert found["layer"] == dict.fromkeys(SPEAKERS, 1)


def test_penalties_weaker_than_the_best_are_tried_until_the_likelihood_falls(monkeypatch):
    tried = []
    fit = linear_probe._logistic.Problem.fit
    monkeypatch.setattr(
        linear_probe._logistic.Problem, "fit",
        lambda self, which, strengths, *rest: tried.append(set(strengths)) or fit(self, which, strengths, *rest),
    )  # fmt: skip
    result = leave_one_group_out(*_clusters(0.15, n_features=60))
    best = max(linear_probe.STRENGTHS.index(strength) for strength in result["strength"].values())
    assert tried[:-1] == [{strength} for strength in linear_probe.STRENGTHS[: best + 2]]
    assert best + 2 < len(linear_probe.STRENGTHS), "an end would prove little"
    assert tried[-1] == set(result["strength"].values())  # the scored classifiers


def test_held_out_tests_only_these_speakers():
    data = _clusters(0.7)
    everyone, some = leave_one_group_out(*data), leave_one_group_out(*data, held_out=["dan", "anna"])
    assert list(some["accuracy"]) == ["dan", "anna"]
    for key in ("accuracy", "strength"):
        assert some[key] == {speaker: everyone[key][speaker] for speaker in ("dan", "anna")}


def test_a_seed_draws_the_training_examples():
    data = _clusters(0.5)
    results = [leave_one_group_out(*data, seed=seed) for seed in (0, 0, 1, 2)]
    assert results[0] == results[1]
    assert len({result["mean"] for result in results}) > 1
    whole = [leave_one_group_out(*data, seed=seed, train_share=1.0)["accuracy"] for seed in (0, 1)]
    assert whole[0] == whole[1]


def test_two_speakers_leave_none_to_choose_the_penalty_on():
    features, labels, groups = _clusters(20.0)
    two = np.isin(groups, SPEAKERS[:2])
    result = leave_one_group_out(features[two], labels[two], groups[two])
    assert result["accuracy"] == {"anna": 100.0, "ben": 100.0}
    assert set(result["strength"].values()) == {linear_probe._DEFAULT_STRENGTH}


def test_a_constant_feature_changes_nothing():
    features, labels, groups = _clusters(0.7)
    constant = np.full((len(labels), 1), 0.1)
    with_constant = leave_one_group_out(np.hstack([features, constant]), labels, groups)
    assert with_constant["accuracy"] == leave_one_group_out(features, labels, groups)["accuracy"]


def test_fits_cut_short_are_counted_and_do_not_warn(monkeypatch):
    monkeypatch.setattr(linear_probe, "_MAX_ITERATIONS", 1)
    assert leave_one_group_out(*_clusters(0.5))["unconverged"] == len(SPEAKERS)


def test_a_label_missing_from_inner_training_is_no_obstacle():
    features, labels, groups = _clusters(20.0)
    keep = (labels != "maybe") | np.isin(groups, ["anna", "ben"])
    result = leave_one_group_out(features[keep], labels[keep], groups[keep])
    assert result["mean"] == 100.0
    keep = (labels != "maybe") & ((labels == "yes") | np.isin(groups, ["anna", "ben"]))
    assert leave_one_group_out(features[keep], labels[keep], groups[keep])["mean"] == 100.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": ["anna"] * 180}, "at least 2 groups .* only anna"),
        ({"held_out": ["ben", "zoe"]}, "no group zoe to hold out; there are anna, ben, carla, dan"),
        ({"labels": ["only ben"] * 180}, "all training examples have the same label"),
        ({"groups": ["anna"] * 3}, r"\(180, 8\), \(180,\) and \(3,\)"),
        ({"features": np.full((180, 8), np.nan)}, "NaN"),
    ],
)
def test_mistakes_are_named(change, message):
    data = dict(zip(("features", "labels", "groups"), _clusters(1.0), strict=True)) | change
    with pytest.raises(UserError, match=message):
        leave_one_group_out(**data)


def test_a_word_that_one_speaker_alone_says_is_refused():
    features, labels, groups = _clusters(1.0)
    labels = np.where((groups == "ben") & (labels == "no"), "nope", labels)
    with pytest.raises(UserError, match="without group 'ben' no training example has the label 'nope'"):
        leave_one_group_out(features, labels, groups)
    assert set(leave_one_group_out(features, labels, groups, held_out=["anna"])["accuracy"]) == {"anna"}


def test_pool():
    frames = np.array([[1, 10], [3, 10], [8, 10]], np.float16)
    expected = [4, 10, np.std([1, 3, 8]), 0, 1, 10, 3, 10, 8, 10]
    np.testing.assert_allclose(linear_probe.pool(frames), expected, rtol=1e-12)
    assert linear_probe.pool(frames).dtype == np.float64
    assert linear_probe.pool(frames[:1]).shape == (10,)  # thirds of a single frame overlap
    with pytest.raises(UserError, match="without a single frame"):
        linear_probe.pool(frames[:0])


def test_pool_on_the_device_is_the_same():
    from speechjax.evals import probe

    lengths = np.array([1, 2, 3, 7, 20], np.int32)
    frames = np.random.default_rng(0).standard_normal((5, 20, 3)).astype(np.float32)
    pooled = probe.pool(jnp.asarray(frames), jnp.asarray(lengths))
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(pooled[row], linear_probe.pool(frames[row, :length]), rtol=1e-5, atol=1e-6)


def _recordings(sample_rate: int) -> list[np.ndarray]:
    rng = np.random.default_rng(4)
    tones = [librosa.chirp(fmin=100, fmax=3000, sr=sample_rate, length=n) for n in (450, 3000, 9000, 20001, 9000)]
    return [(0.5 * tone + 0.01 * rng.standard_normal(len(tone))).astype(np.float32) for tone in tones]


@pytest.mark.parametrize("sample_rate", [8000, 16000])
def test_mfcc_statistics_are_those_of_each_recording_alone(sample_rate):
    audio = _recordings(sample_rate)
    statistics = linear_probe.mfcc_statistics(audio, sample_rate=sample_rate)
    assert statistics.shape == (5, 65)
    framing = {"n_fft": sample_rate // 40, "hop_length": sample_rate // 100, "n_mels": 26}
    for waveform, row in zip(audio, statistics, strict=True):
        mfcc = librosa.feature.mfcc(y=waveform, sr=sample_rate, n_mfcc=13, **framing)
        np.testing.assert_allclose(row, linear_probe.pool(mfcc.T), rtol=1e-4, atol=5e-4)  # as in test_features


def test_log_mel_statistics_are_those_of_each_recording_alone():
    audio = _recordings(16000)
    statistics = linear_probe.log_mel_statistics(audio)
    assert statistics.shape == (5, 400)
    for waveform, row in zip(audio, statistics, strict=True):
        mel = librosa.feature.melspectrogram(y=waveform, sr=16000, n_fft=400, hop_length=160, n_mels=80)
        np.testing.assert_allclose(row, linear_probe.pool(librosa.power_to_db(mel).T), rtol=1e-4, atol=5e-4)


def test_statistics_take_int16_mixed_with_float_in_few_static_shapes():
    audio = _recordings(16000)
    pcm = [np.round(waveform * 32767).astype(np.int16) for waveform in audio]
    mixed = [pcm[0], *[(waveform / 32768).astype(np.float32) for waveform in pcm[1:]]]
    np.testing.assert_array_equal(linear_probe.log_mel_statistics(pcm), linear_probe.log_mel_statistics(mixed))
    shapes = {batch.shape for _, batch, _ in linear_probe._padded_batches(audio, 16000)}
    assert shapes == {(131, 8000), (65, 16000), (32, 32000)}  # 2^20 samples at most
    with pytest.raises(UserError, match="recording 1 holds no samples"):
        linear_probe.mfcc_statistics([audio[0], audio[0][:0]])


@pytest.mark.slow
def test_controls_on_spoken_digits_of_unheard_speakers(real_speech: Path):
    paths = sorted((real_speech / "fsdd").glob("*.wav"))
    digits, speakers = zip(*(path.stem.split("_")[:2] for path in paths), strict=True)
    audio = [soxr.resample(soundfile.read(path, dtype="float32")[0], 8000, 16000) for path in paths]
    result = leave_one_group_out(linear_probe.mfcc_statistics(audio), digits, speakers)
    # Found: 75.2 (george 63, jackson 81, lucas 64, nicolas 69, theo 88, yweweler 86).
    assert result["mean"] == pytest.approx(75.2, abs=1.0)
    assert min(result["accuracy"].values()) > 58.0
    assert max(result["accuracy"], key=lambda speaker: result["accuracy"][speaker]) == "theo"
    # Without the cosine transform, which decorrelates, speakers generalise less: 65.7.
    log_mel = leave_one_group_out(linear_probe.log_mel_statistics(audio), digits, speakers, held_out=["theo", "lucas"])
    assert log_mel["accuracy"] == pytest.approx({"theo": 76.6, "lucas": 60.4}, abs=2.5)
