"""A remote file system for tests: fake://PATH is a folder on this disk that only Beam's file systems reach."""

import os
import shutil
import time

from apache_beam.io.filesystem import FileMetadata
from apache_beam.io.localfilesystem import LocalFileSystem

ROOT = "FAKE_STORAGE"  # environment variables, which a launcher in a process of its own inherits
SECONDS_A_RECORDING = "FAKE_STORAGE_SECONDS"
SCHEME = "fake://"


class FakeStorage(LocalFileSystem):
    created: list[str] = []  # noqa: RUF012 - one list for all instances: a new one is made for every call
    broken: set[str] = set()  # noqa: RUF012 - files that exist and cannot be read

    @classmethod
    def scheme(cls):
        return "fake"

    def join(self, basepath, *paths):
        return "/".join([basepath.rstrip("/"), *paths])

    def exists(self, path):
        return os.path.exists(_real(path))

    def mkdirs(self, path):
        super().mkdirs(_real(path))

    def metadata(self, path):
        return FileMetadata(path, os.path.getsize(_real(path)), os.path.getmtime(_real(path)))

    def _list(self, dir_or_prefix):
        if not self.exists(dir_or_prefix):  # as HDFS does, and the local file system does not
            raise OSError(f"{dir_or_prefix} does not exist")
        for folder, _, names in os.walk(_real(dir_or_prefix)):
            for path in (os.path.join(folder, name) for name in names):
                if os.path.exists(path):  # storage has no dangling links
                    yield self.metadata(SCHEME + os.path.relpath(path, os.environ[ROOT]))

    def open(self, path, *args, **kwargs):
        if path in self.broken:
            raise RuntimeError("503\nthe bucket is on fire")
        if path.endswith(".wav"):
            time.sleep(float(os.environ.get(SECONDS_A_RECORDING, 0)))
        return super().open(_real(path), *args, **kwargs)

    def create(self, path, *args, **kwargs):
        self.created.append(path)
        return super().create(_real(path), *args, **kwargs)

    def delete(self, paths):
        for path in paths:
            shutil.rmtree(_real(path))


def _real(path: str) -> str:
    assert path.startswith(SCHEME), path
    return os.path.join(os.environ[ROOT], path.removeprefix(SCHEME))
