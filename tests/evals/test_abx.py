"""ABX: warping against a plain dynamic program, triplets against enumeration, the averages in closed form."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from hypothesis import example, given, settings
from hypothesis import strategies as st

from speechjax import config as configs
from speechjax import sharding
from speechjax.errors import UserError
from speechjax.evals import _abx, _dtw, _frames
from speechjax.evals._abx import Block, Item, items_of_phones, plan_blocks, read_items, score
from speechjax.evals.abx import ABX
from speechjax.train import Job

# float32 sums of up to 60 distances below 1
TOLERANCE = dict(rtol=2e-5, atol=1e-6)


# ---- distances


def plain_dtw(cells: np.ndarray) -> float:
    """Cost of the cheapest path, divided by the length found by going back, the diagonal first."""
    cost = np.full(cells.shape, np.inf)
    for i, j in np.ndindex(*cells.shape):
        before = [cost[i - a, j - b] for a, b in ((1, 1), (1, 0), (0, 1)) if i >= a and j >= b]
        cost[i, j] = cells[i, j] + (min(before) if before else 0)

    def length(i, j):
        if (i, j) == (0, 0):
            return 1
        steps = [(i - a, j - b) for a, b in ((1, 1), (1, 0), (0, 1)) if i >= a and j >= b]
        least = min(cost[s] for s in steps)
        best = [s for s in steps if cost[s] == least]
        if (i - 1, j - 1) in best:
            return 1 + length(i - 1, j - 1)
        return 1 + min(length(*s) for s in best)

    last = (cells.shape[0] - 1, cells.shape[1] - 1)
    return cost[last] / length(*last)


def warp(cells_list):
    """Through the batched programs, every pair with a matrix of its own."""
    warper = _dtw.Warper(len(cells_list))
    zero = np.zeros(1, np.int64)
    for p, cells in enumerate(cells_list):
        warper.add(cells, (zero, zero), tuple(np.array([n]) for n in cells.shape), p)
    return warper.result()


@pytest.mark.parametrize("levels", [0, 3])  # whole numbers: sums are exact, and ties common
def test_warping_equals_the_plain_dynamic_program(levels):
    rng = np.random.default_rng(levels)
    shapes = [(1, 1), (1, 5), (7, 1), (4, 4), (8, 3), (5, 12), (16, 2), (9, 9), *rng.integers(1, 20, (40, 2)).tolist()]
    cells = [rng.random(s).astype(np.float32) for s in shapes]
    cells = [np.floor(c * levels).astype(np.float32) for c in cells] if levels else cells
    wanted = [plain_dtw(c.astype(np.float64)) for c in cells]
    np.testing.assert_allclose(warp(cells), wanted, **TOLERANCE)
    # What is symmetric in the pair stays so, ties included.
    np.testing.assert_allclose(warp([c.T for c in cells]), wanted, **TOLERANCE)
    unwarped = [np.mean([c[min(i, len(c) - 1), min(i, c.shape[1] - 1)] for i in range(max(c.shape))]) for c in cells]
    assert not np.allclose(unwarped, wanted, rtol=0.01)  # negative control: the program has paths to choose from


def test_cells_beyond_a_pair_do_not_count():
    rng = np.random.default_rng(0)
    cells = rng.random((6, 7)).astype(np.float32)
    padded = np.full((2, 8, 8), 1e9, np.float32)
    padded[0, :6, :7] = padded[1, :6, :7] = cells
    padded[1, 6:] = -1e9
    found = np.asarray(_dtw.warped(padded, np.array([6, 6]), np.array([7, 7])))
    np.testing.assert_allclose(found, plain_dtw(cells), **TOLERANCE)


def test_angular_distance_in_closed_form():
    frames = np.array([[1, 0], [2, 0], [0, 3], [-1, 0], [1, 1], [0, 0]], np.float32)
    found = _dtw.frame_distances(frames[:1], frames, "angular")[0]
    np.testing.assert_allclose(found, [0, 0, 0.5, 1, 0.25, 0.5], atol=1e-6)
    # Equal frames are at exactly 0 wherever they stand, or ties between equal codes would be decided by rounding.
    noise = np.random.default_rng(0).normal(size=(50, 300)).astype(np.float32)
    assert not np.diag(_dtw.frame_distances(noise, noise, "angular")).any()


def test_kl_distance_against_the_definition():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(5, 7)), rng.normal(size=(4, 7))
    p, q = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (a, b))
    wanted = [[0.5 * np.sum(x * np.log(x / y) + y * np.log(y / x)) for y in q] for x in p]
    np.testing.assert_allclose(_dtw.frame_distances(a, b, "kl"), wanted, rtol=1e-4, atol=1e-6)


# ---- triplets


def enumerate_abx(items, frames, *, across):
    """The error by the definition: every triplet, then the averages one after the other."""
    cells = {}
    for a, b, x in itertools.product(range(len(items)), repeat=3):
        one, other, third = items[a], items[b], items[x]
        same_place = {(i.before, i.after) for i in (one, other, third)}
        if a == x or one.phone != third.phone or one.phone == other.phone or len(same_place) > 1:
            continue
        if one.speaker != other.speaker or (one.speaker != third.speaker) != across:
            continue
        ax, bx = (plain_dtw(_dtw.frame_distances(frames[k], frames[x], "angular")) for k in (a, b))
        wrong = 0.5 if abs(ax - bx) < 1e-6 else float(ax > bx)
        key = (one.phone, other.phone, (one.speaker, third.speaker), same_place.pop())
        cells.setdefault(key, []).append(wrong)
    triplets = sum(map(len, cells.values()))
    values = {key: np.mean(wrong) for key, wrong in cells.items()}
    for size in (3, 2):
        groups = {}
        for key, value in values.items():
            groups.setdefault(key[:size], []).append(value)
        values = {key: np.mean(group) for key, group in groups.items()}
    return float(np.mean(list(values.values()))) if values else float("nan"), triplets


def random_items(seed, count=26):
    rng = np.random.default_rng(seed)
    pick = lambda names: names[int(rng.integers(len(names)))]  # noqa: E731
    items = [Item(0, 0, 1, pick("pqr"), pick("xy"), "z", pick(["s", "t", "u"])) for _ in range(count)]
    # Few directions: some frames are equal, so ties happen.
    codes = np.eye(4, dtype=np.float32)
    return items, [codes[rng.integers(0, 4, int(rng.integers(1, 4)))] for _ in items]


def measure(items, frames, **options):
    plan = plan_blocks(items, **(dict(context="within", max_items=0, max_speakers=0, seed=0) | options))
    phones = [item.phone for item in items]
    return [score(blocks, _abx.distances(blocks, frames, "angular"), phones) for blocks in plan]


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 2**31))
@example(0)
def test_errors_equal_those_of_every_triplet_enumerated(seed):
    items, frames = random_items(seed)
    for found, across in zip(measure(items, frames), (False, True), strict=True):
        error, triplets = enumerate_abx(items, frames, across=across)
        assert found.triplets == triplets
        assert found.error == pytest.approx(error, abs=1e-6, nan_ok=True)


def test_averages_are_over_contexts_then_speakers_then_phones():
    """One speaker has two contexts, the other one; weighing triplets alike would give another number."""
    phones = ["p", "p", "q"]
    right, wrong = np.float32([[0, 1, 2], [1, 0, 2], [2, 2, 0]]), np.float32([[0, 2, 1], [2, 0, 1], [1, 1, 0]])
    three = np.arange(3)
    blocks = [
        Block(("a",), ("s",), three, three), Block(("b",), ("s",), three, three), Block(("a",), ("t",), three, three),
    ]  # fmt: skip
    # Speaker s: 1 and 0 in two contexts, so 1/2; t: 0.  Contexts alike would give 1/3, not 1/4.
    found = score(blocks, [wrong, right, right], phones)
    assert (found.error, found.triplets) == (0.25, 6)
    # q has no second instance, so only (p, q) is a pair; another phone pair counts as much as all of that.
    more = Block(("a",), ("u",), np.arange(3, 6), np.arange(3, 6))
    assert score([*blocks, more], [wrong, right, right, wrong], [*phones, "m", "m", "n"]).error == (0.25 + 1) / 2


def test_ties_count_half():
    three = np.arange(3)
    assert score([Block((), ("s",), three, three)], [np.zeros((3, 3), np.float32)], ["p", "p", "q"]).error == 0.5


def many_items(speakers=4, each=6, phones="abcdef"):
    return [Item(0, 0, 1, phone, "x", "y", f"s{s}") for s in range(speakers) for phone in phones for _ in range(each)]


def test_perfect_features_give_0_and_random_ones_50():
    items, rng = many_items(), np.random.default_rng(0)
    perfect = {phone: rng.normal(size=(5, 8)).astype(np.float32) for phone in "abcdef"}
    lengths = rng.integers(3, 9, len(items))
    # The same five frames, each held for another time: nothing to a warped path.
    stretched = [
        perfect[i.phone][np.sort(np.r_[0:5, rng.integers(0, 5, n)])] for i, n in zip(items, lengths, strict=True)
    ]
    assert [found.error for found in measure(items, stretched)] == [0, 0]
    noise = [rng.normal(size=(int(n), 8)).astype(np.float32) for n in lengths]
    for found in measure(items, noise):
        assert found.triplets > 10_000
        # 144 items: the pairs' distances depend on each other; 12 seeds spread by 0.006.
        assert found.error == pytest.approx(0.5, abs=0.03)


def test_a_speaker_in_the_features_is_an_error_across_speakers_only():
    items, rng = many_items(), np.random.default_rng(0)
    phone = {p: rng.normal(size=6) for p in "abcdef"}
    # Each speaker calls phones by other names: consistent, but only for himself.
    turned = {f"s{s}": rng.permutation(6) for s in range(4)}
    frames = [np.float32(phone[i.phone][turned[i.speaker]])[None].repeat(3, axis=0) for i in items]
    within, across = measure(items, frames)
    assert within.error == 0
    assert across.error > 0.2


def test_caps_are_kept_and_drawn_by_the_seed():
    items = many_items(speakers=5, each=9)
    within, across = plan_blocks(items, context="within", max_items=4, max_speakers=2, seed=1)
    assert all(len(block.ab) == 6 * 4 for block in (*within, *across))
    assert sorted({b.speakers[0] for b in across}) == [f"s{s}" for s in range(5)]
    assert len(across) == 5 * 2
    same, _ = plan_blocks(items, context="within", max_items=4, max_speakers=2, seed=1)
    other, _ = plan_blocks(items, context="within", max_items=4, max_speakers=2, seed=2)
    assert np.array_equal(same[0].ab, within[0].ab)
    assert not np.array_equal(other[0].ab, within[0].ab)


def test_any_context_compares_what_within_context_does_not():
    items = [Item(0, 0, 1, p, before, "z", "s") for p, before in (("p", "x"), ("p", "y"), ("q", "x"))]
    assert plan_blocks(items, context="within", max_items=0, max_speakers=0, seed=0) == ([], [])
    [block], _ = plan_blocks(items, context="any", max_items=0, max_speakers=0, seed=0)
    assert sorted(block.ab.tolist()) == [0, 1, 2]


# ---- items


def test_items_of_an_alignment():
    phones = [("sil", 0, 0.1), ("k", 0.1, 0.2), ("a", 0.2, 0.35), ("t", 0.35, 0.4), ("s", 0.4, 0.5), ("SIL", 0.5, 0.6)]
    found = items_of_phones(3, phones, "ann", "triphone")
    assert found == [Item(3, 0.1, 0.4, "a", "k", "t", "ann"), Item(3, 0.2, 0.5, "t", "a", "s", "ann")]
    assert [(i.onset, i.offset) for i in items_of_phones(3, phones, "ann", "phone")] == [(0.2, 0.35), (0.35, 0.4)]
    assert items_of_phones(3, phones, "ann", "phone", "de")[0][3:6] == ("de:a", "de:k", "de:t")


def test_item_files(tmp_path):
    file = tmp_path / "a.item"
    head = "#file onset offset #phone prev-phone next-phone speaker\n"
    file.write_text(head + "1-2 0.5 0.75 AA B C 19\nother 0 1 AA B C 19\n\n")
    assert read_items(str(file), {"1-2": 7}) == ([Item(7, 0.5, 0.75, "AA", "B", "C", "19")], 1)
    file.write_text(head + "1-2 0.5 x AA B C 19\n")
    with pytest.raises(UserError, match=r"a\.item:2: expected"):
        read_items(str(file), {})
    file.write_text("1-2 0.5 0.75 AA B C 19\n")
    with pytest.raises(UserError, match=r"a\.item:1: an item file begins with"):
        read_items(str(file), {})
    with pytest.raises(UserError, match="cannot read the item file"):
        read_items(str(tmp_path / "none"), {})


@pytest.mark.parametrize("centre", [0.0, 200.0])
def test_frames_of_a_stretch_are_those_whose_centres_lie_inside(centre):
    timing = _frames.Timing(320, centre)
    rng = np.random.default_rng(0)
    limits = [*np.sort(rng.uniform(0, 2, (200, 2)), axis=1).tolist(), [0.1, 0.2], [0.0, 0.02]]
    for start, end in limits:
        first, stop = timing.between(start, end)
        centres = np.arange(400) * 320 + centre
        inside = np.flatnonzero((centres >= 16000 * start - 1e-3) & (centres < 16000 * end - 1e-3))
        assert list(range(first, stop)) == inside.tolist()


# ---- the evaluator


class Sheet:
    """Stands in for the logs."""

    def __init__(self):
        self.saved = {}

    def table(self, title, columns, rows):
        self.title, self.columns, self.rows = title, columns, rows

    def save_json(self, name, content):
        self.saved[name] = json.loads(json.dumps(content))


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """A manifest of 12 recordings of 3 speakers: phones are pitches, the level is the speaker; s2 is silent on d."""
    folder = tmp_path_factory.mktemp("spoken")
    rng, lines, rate = np.random.default_rng(0), [], 16000
    for k in range(12):
        audio, phones, speaker = [], [], k % 3
        for symbol in ["x", *rng.permutation(list("abcab")), "x"]:
            count = int(rng.integers(1600, 2600))
            tone = np.sin(2 * np.pi * dict(x=250, a=500, b=1000, c=3000)[symbol] * np.arange(count) / rate)
            begin = sum(map(len, audio)) / rate
            audio.append(tone * (0.1 + 0.1 * speaker) + 0.003 * rng.standard_normal(count))
            phones.append([symbol, begin, begin + count / rate])
        soundfile.write(folder / f"{k}.wav", np.concatenate(audio), rate)
        lines.append(dict(audio_filepath=f"{k}.wav", speaker=f"s{speaker}", phones=phones))
    (folder / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    config = configs.load("configs/pretrain/wav2vec2.py:size=tiny,smoke")
    config.unlock()
    config.data.cache_dir = str(tmp_path_factory.mktemp("cache"))
    mesh = sharding.make_mesh(data=-1, fsdp=1)
    return Job(configs.make_task(config), config, None, mesh, tmp_path_factory.mktemp("work"), Sheet())  # pyright: ignore


def evaluate(job, **options):
    with jax.set_mesh(job.mesh):
        evaluator = ABX(job, every=1, **options)
        variables = _frames.random_variables(job, evaluator.recordings, seed=1)
        return evaluator(*variables, 5, "abx")


@pytest.mark.slow
def test_the_table_has_every_control_and_the_errors_mean_something(job, spoken):
    found = evaluate(job, source=f"manifest:{spoken}/m.jsonl", context="any", span="phone", layers="all")
    assert set(found) == {
        f"{kind}{row}" for kind in ("within", "across") for row in ("", "_random", "_log_mel", "_mfcc")
    }
    for control in ("log_mel", "mfcc"):  # steady tones of different pitch
        assert found[f"within_{control}"] < 5
        assert found[f"across_{control}"] < 15
    assert found["within"] != found["within_random"]  # other weights, both untrained
    rows = [row[0] for row in job.logs.rows]
    assert rows == ["this encoder, layer 0", "this encoder, layer 1", "random-initialised encoder", "log-mel", "MFCC"]
    assert job.logs.saved["abx"]["rows"] == job.logs.rows
    assert float(job.logs.rows[1][1]) == pytest.approx(found["within"], abs=0.006)  # two decimals


def test_items_get_the_frames_of_their_own_time(job, spoken):
    """Spectra with an encoder's timing tell the tones apart; taken for those of 0.1 s later they do not."""

    def spectra(params, extra, batch):
        starts = 320 * jnp.arange(batch["audio"].shape[1] // 320 - 1)
        frames = batch["audio"][:, starts[:, None] + jnp.arange(400)[None]].astype(jnp.float32)
        return jnp.log1p(jnp.abs(jnp.fft.rfft(frames)))[:, None], batch["lengths"] // 320 - 1

    with jax.set_mesh(job.mesh):
        evaluator = ABX(job, every=1, source=f"manifest:{spoken}/m.jsonl", context="any", span="phone")
        assert evaluator._features.timing == (320, 200)  # frames of 400 samples, centred on their middle
        errors = [
            evaluator._measure(_frames.Features(_frames.Timing(320, 200 - late), jax.jit(spectra)), None, None)[0]
            for late in (0, 1600)
        ]
    assert errors[0]["within"].error < 0.05
    assert errors[0]["across"].error < 0.05
    assert errors[1]["within"].error > 0.2


def test_mistakes_are_named(job, spoken, tmp_path):
    source = f"manifest:{spoken}/m.jsonl"
    plain = tmp_path / "plain.jsonl"
    lines = [json.loads(line) for line in (spoken / "m.jsonl").read_text().splitlines()]
    for line in lines:
        line["audio_filepath"] = str(spoken / line["audio_filepath"])
    plain.write_text("".join(json.dumps({k: v for k, v in line.items() if k != "phones"}) + "\n" for line in lines))
    mute = tmp_path / "mute.jsonl"
    mute.write_text("".join(json.dumps({k: v for k, v in line.items() if k != "speaker"}) + "\n" for line in lines))
    stranger = tmp_path / "stranger.item"
    stranger.write_text("#file onset offset #phone prev-phone next-phone speaker\nnobody 0 1 a b c s\n")
    for options, message in (
        (dict(source=source, context="some"), "abx.context='some': choose within or any"),
        (dict(source=source, distance="cosine"), "abx.distance='cosine': choose angular or kl"),
        (dict(source=source, context="any", layer=9), "abx.layer=9: there are the hidden states 0 to 1"),
        (dict(source=source, context="any", layers="1"), "abx.layers='1': choose one"),
        (dict(source=f"manifest:{plain}"), "no recording has phones with times"),
        (dict(source=f"manifest:{mute}"), "has phones but no speaker"),
        (dict(source=source, item=str(stranger)), "none of its recordings is in"),
        (dict(source=source, max_items=-1), "abx.max_items=-1"),
    ):
        with jax.set_mesh(job.mesh), pytest.raises(UserError, match=message):
            ABX(job, every=1, **options)


def test_without_a_source_nothing_is_measured(job):
    assert ABX(job, every=1)(None, None, 0, "abx") == {}


def test_a_recording_gone_since_is_silence_not_a_crash(job, spoken, monkeypatch):
    from speechjax.data.shards import UnreadableError

    records = _frames.open_source(job, f"manifest:{spoken}/m.jsonl")
    with jax.set_mesh(job.mesh):
        recordings = _frames.batched(job, records, range(3))
        compute = lambda params, extra, batch: (batch["audio"][:, None, :, None], batch["lengths"])  # noqa: E731
        features = _frames.Features(_frames.Timing(1, 0), compute)
        whole = dict(_frames.sweep(job, recordings, features, None, None))
        read = type(records).read_into

        def broken(self, i, start, out):
            if i == 1:
                raise UnreadableError("gone")
            read(self, i, start, out)

        monkeypatch.setattr(type(records), "read_into", broken)
        found = dict(_frames.sweep(job, recordings, features, None, None))
    for n in range(3):
        np.testing.assert_array_equal(found[n], 0 * whole[n] if n == 1 else whole[n])
