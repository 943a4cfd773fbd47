"""What the input benchmark measures: ways to read the same audio, ours and others', each a function of no arguments.

A reader reads the whole corpus some times over, in random order, and says what it has read.
"""

import contextlib
import importlib.util
import io
import itertools
import json
import os
import random
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile

from speechjax.data import pipeline
from speechjax.data.array_record import write_tfds
from speechjax.data.decode import SAMPLE_RATE, BadAudio
from speechjax.data.prepare import prepare
from speechjax.data.shards import Shards, shard_name
from speechjax.data.sources import open_source
from speechjax.errors import UserError

KINDS = ("wav", "flac")
LONGEST = 15.625  # s of a row, as wav2vec 2.0 cuts it
_FRAME_LEN = (320, 80)
_PEER_BATCH = 16  # files; some 130 s of utterances


class Read(NamedTuple):
    """What a reader has read: `samples` of audio in arrays of `room` samples."""

    samples: int
    room: int


@dataclass(frozen=True)
class Reader:
    """A row of the table.  `kind` says which bare reader it is to be compared with: shards, wav or flac."""

    name: str
    kind: str
    read: Callable[[], Read]
    shapes: list[list[int]] | None = None


@dataclass(frozen=True)
class Corpus:
    """One corpus in all its forms, and how often a reader reads it."""

    folder: Path
    batch_seconds: float
    passes: int

    def files(self, kind: str) -> list[str]:
        return sorted(map(str, (self.folder / kind).glob(f"*.{kind}")))

    def passes_of(self, kind: str) -> int:
        """Decoding FLAC costs so much more that fewer passes are as exact."""
        return max(1, self.passes // 2) if kind == "flac" else self.passes


def make_corpus(source: str, hours: float, folder: Path) -> None:
    """The first `hours` of a source: files in wav/ and flac/, prepared sets, TFDS data sets in tfds/.

    Raises `UserError` where the folder holds another corpus.
    """
    # Before the first import: TensorFlow prints start-up notices.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    done, wanted = folder / "corpus.json", {"source": source, "hours": hours}
    if done.exists():
        if json.loads(done.read_text(encoding="utf-8")) != wanted:
            raise UserError(f"--keep={folder} holds another corpus; name another folder, or empty it")
        return
    if any(folder.iterdir()):
        raise UserError(f"--keep={folder} holds something else; name another folder, or empty it")
    for kind in KINDS:
        (folder / kind).mkdir()
    room = hours * 3600 * SAMPLE_RATE
    for number, item in enumerate(open_source(source).items()):
        if room <= 0:
            break
        try:
            audio = item.read()
        except BadAudio:
            continue
        room -= len(audio)
        for kind in KINDS:
            soundfile.write(folder / kind / f"{number:06d}.{kind}", audio, SAMPLE_RATE, subtype="PCM_16")
    for kind in KINDS:
        prepare(open_source(f"folder:{folder / kind}"), folder / f"{kind}-in-place", copy=False, progress=False)
    prepare(open_source(f"folder:{folder / 'wav'}"), folder / "shards", progress=False)
    write_tfds(folder / "shards", folder / "tfds", "pcm")
    _write_default_tfds(folder / "shards", folder / "tfds" / "int64")
    done.write_text(json.dumps(wanted), encoding="utf-8")


def _write_default_tfds(shards: Path, place: Path) -> None:
    """The set as TFDS stores audio by default: every sample as a 64 bit integer, in TFRecord files."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.dataset_info import DatasetIdentity

    place.mkdir(parents=True)
    version, module = tfds.core.Version("1.0.0"), "speechjax.data.bench_readers"
    identity = DatasetIdentity(name="int64", version=version, data_dir=str(place), module_name=module)
    features = tfds.features.FeaturesDict({"audio": tfds.features.Audio(sample_rate=SAMPLE_RATE)})
    info = tfds.core.DatasetInfo(builder=identity, features=features)
    info.set_file_format(tfds.core.FileFormat.TFRECORD)
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=4_096)
    opened = Shards(shards)
    with contextlib.redirect_stdout(io.StringIO()):  # a progress bar that cannot be switched off
        writer.initialize_splits(["train"])
        for row, length in enumerate(opened.index["length"].tolist()):
            audio = np.empty(length, np.int16)
            opened.read_into(row, 0, audio)
            writer.add_examples({"train": [{"audio": audio.astype(np.int64)}]})
        writer.close_all()


# ---- bare


def bare_readers(corpus: Corpus) -> list[Reader]:
    """Each kind's decoder and nothing else: an array for every recording, thrown away."""
    opened = Shards(corpus.folder / "shards")
    pieces = [
        (opened.folder / f"{shard_name(row['shard'])}.pcm", int(row["offset"]), int(row["length"]))
        for row in opened.index
    ]

    def read_pcm(piece: tuple[Path, int, int]) -> int:
        path, offset, length = piece
        return len(np.fromfile(path, np.int16, length, offset=offset))

    def read_file(path: str) -> int:
        return len(soundfile.read(path, dtype="int16")[0])

    def reader(name: str, kind: str, read: Callable[[Any], int], what: list) -> Reader:
        def run() -> Read:
            samples = sum(map(read, _shuffled(what, corpus.passes_of(kind))))
            return Read(samples, samples)

        return Reader(name, kind, run)

    return [
        reader("bare fromfile", "shards", read_pcm, pieces),
        *(reader("bare soundfile", kind, read_file, corpus.files(kind)) for kind in KINDS),
    ]


def _shuffled(what: list, passes: int) -> Iterable[Any]:
    return itertools.chain.from_iterable(random.sample(what, len(what)) for _ in range(passes))


# ---- ours


def our_readers(corpus: Corpus) -> list[Reader]:
    """The pipeline, over shards and over files in place."""
    return [
        _pipeline(corpus, "speechjax", "shards", "shards"),
        _pipeline(corpus, "speechjax, filled rows", "shards", "shards", fill=True),
        *(_pipeline(corpus, "speechjax, in place", kind, f"{kind}-in-place") for kind in KINDS),
    ]


def _pipeline(corpus: Corpus, name: str, kind: str, folder: str, fill: bool = False) -> Reader:
    data = pipeline.open_data(
        source=f"shards:{corpus.folder / folder}", seed=0, row_divisor=1, frame_len=_FRAME_LEN,
        segment_align=_FRAME_LEN[0], workdir=None, temperature=1.0, crop_seconds=LONGEST,
        batch_seconds=corpus.batch_seconds, shapes=1 if fill else 4, fill=fill, row_multiple=1, min_seconds=0.0,
        valid_seconds=0.0, include="", exclude="", text="", text_steps="", max_bad_share=0.0, cache_dir="",
    )  # fmt: skip
    stream = data.train_batches(0, 10**9)  # one for all repeats: starting it is no part of a long training

    def run() -> Read:
        samples = room = 0
        for batch in itertools.islice(stream, corpus.passes_of(kind) * data.batches_per_epoch):
            samples += int(batch["lengths"].sum())
            room += batch["audio"].size
        return Read(samples, room)

    return Reader(name, kind, run, [list(spec["audio"][0]) for spec in data.specs])


# ---- others


def other_readers(corpus: Corpus) -> tuple[list[Reader], list[str]]:
    """(TFDS as it comes, and the loaders of other projects that are installed; what is skipped and why)."""
    readers, skipped = [_tfds_reader(corpus)], []
    for module, make in (("torch", _torch_readers), ("lhotse", _lhotse_readers)):
        missing = [name for name in sorted({"torch", module}) if importlib.util.find_spec(name) is None]
        if missing:
            absent = " and ".join(missing) + (" is" if len(missing) == 1 else " are")
            skipped.append(f"{module}: {absent} not installed (pip install torch lhotse)")
        else:
            readers += [reader for kind in KINDS for reader in make(corpus, kind)]
    return readers, skipped


def _tfds_reader(corpus: Corpus) -> Reader:
    import tensorflow_datasets as tfds

    builder: Any = tfds.builder_from_directory(corpus.folder / "tfds" / "int64")
    passes = corpus.passes_of("flac")  # it costs as much

    def run() -> Read:
        # Cached in memory, which is TFDS's default for small sets, it would not be read at all.
        config = tfds.ReadConfig(try_autocache=False)
        samples = 0
        for _ in range(passes):
            dataset = builder.as_dataset(split="train", shuffle_files=True, read_config=config)
            samples += sum(len(example["audio"]) for example in tfds.as_numpy(dataset))
        return Read(samples, samples)

    return Reader("TFDS Audio (int64)", "shards", run)


def _torch_readers(corpus: Corpus, kind: str) -> list[Reader]:
    import torch  # pyright: ignore[reportMissingImports]
    from torch.utils.data import DataLoader, RandomSampler  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(1)  # to its advantage: the threads that help to pad a batch spin in between

    class Files(torch.utils.data.Dataset):
        files = corpus.files(kind)

        def __len__(self) -> int:
            return len(self.files)

        def __getitem__(self, k: int) -> torch.Tensor:
            return torch.from_numpy(soundfile.read(self.files[k], dtype="int16")[0])

    def collate(clips: list[torch.Tensor]) -> tuple[torch.Tensor, int]:
        return torch.nn.utils.rnn.pad_sequence(clips, batch_first=True), sum(map(len, clips))

    def run(workers: int) -> Read:
        # One loader for all passes; it must end, because only then does the CPU time of its workers count.
        sampler = RandomSampler(Files(), num_samples=corpus.passes_of(kind) * len(Files()))
        loader = DataLoader(Files(), batch_size=_PEER_BATCH, sampler=sampler, collate_fn=collate, num_workers=workers)
        samples = room = 0
        for audio, valid in loader:
            samples, room = samples + valid, room + audio.numel()
        return Read(samples, room)

    return [Reader(f"PyTorch, {workers} workers", kind, lambda workers=workers: run(workers)) for workers in (0, 2)]


def _lhotse_readers(corpus: Corpus, kind: str) -> list[Reader]:
    from lhotse import CutSet, Recording  # pyright: ignore[reportMissingImports]
    from lhotse.dataset import DynamicBucketingSampler  # pyright: ignore[reportMissingImports]
    from lhotse.dataset.collation import collate_audio  # pyright: ignore[reportMissingImports]

    cuts = CutSet.from_cuts(Recording.from_file(path).to_cut() for path in corpus.files(kind))

    def run() -> Read:
        samples = room = 0
        for seed in range(corpus.passes_of(kind)):
            with warnings.catch_warnings():  # of manifests that are too large for memory
                warnings.simplefilter("ignore", UserWarning)
                sampler = DynamicBucketingSampler(
                    cuts, max_duration=corpus.batch_seconds, num_buckets=4, shuffle=True, seed=seed
                )
            for batch in sampler:
                audio, lengths = collate_audio(batch)
                samples, room = samples + int(lengths.sum()), room + audio.numel()
        return Read(samples, room)

    return [Reader("lhotse", kind, run)]


# ---- preparing


def preparations(corpus: Corpus) -> list[Reader]:
    """Making shards, once a source: from files, and from a TFDS data set in ArrayRecord files."""
    sources = {f"{kind.upper()} files": f"folder:{corpus.folder / kind}" for kind in KINDS}
    sources["TFDS ArrayRecord"] = "tfds:pcm:train"

    def reader(name: str, source: str) -> Reader:
        def run() -> Read:
            folder = corpus.folder / "scratch"
            try:
                with _tfds_folder(corpus.folder / "tfds"):
                    prepare(open_source(source), folder, progress=False)
                samples = int(Shards(folder).index["length"].sum())
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            return Read(samples, samples)

        return Reader(f"preparing {name}", "prepare", run)

    return [reader(*named) for named in sources.items()]


@contextlib.contextmanager
def _tfds_folder(folder: Path) -> Iterator[None]:
    before = os.environ.get("TFDS_DATA_DIR")
    os.environ["TFDS_DATA_DIR"] = str(folder)
    try:
        yield
    finally:
        del os.environ["TFDS_DATA_DIR"]
        if before is not None:
            os.environ["TFDS_DATA_DIR"] = before
