"""Shards of an object store are fetched once, checked on arrival, shared, and bounded."""

import hashlib
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from faulty_proxy import Fault, FaultyProxy
from made_shards import make_samples, write_shards

from ifvit import storage
from ifvit.connections import StoreError
from ifvit.errors import UserError
from ifvit.shards import CacheConfig
from ifvit.shards.cache import FileCache, local_copy
from ifvit.shards.format import LatentSample, ShardError
from ifvit.shards.reader import ShardReader
from ifvit.storage import ContentError

NUM_SHARDS = 6


@pytest.fixture(scope="module")
def samples() -> list[LatentSample]:
    return make_samples(2 * NUM_SHARDS)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, samples: list[LatentSample]) -> Path:
    """Six shards of two samples each."""
    folder = tmp_path_factory.mktemp("local")
    write_shards(folder, samples, [2] * NUM_SHARDS)
    return folder


def copy_to(url: str, folder: Path) -> str:
    for path in folder.iterdir():
        storage.upload(path, storage.join(url, path.name))
    return url


@pytest.fixture
def remote(local: Path) -> Iterator[str]:
    """The same dataset in an object store in memory."""
    url = copy_to(f"memory://{uuid.uuid4().hex}", local)
    yield url
    storage.remove(url)


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are downloaded during the test."""
    names: list[str] = []
    download = storage.download

    def count(url: str, *args: Any) -> None:
        names.append(Path(url).name)
        download(url, *args)

    monkeypatch.setattr(storage, "download", count)
    return names


@pytest.fixture
def open_reader(remote: str, tmp_path: Path) -> Callable[..., ShardReader]:
    """Function that opens the remote dataset with a cache for `num_shards` shards."""

    def open_it(num_shards: float = 2 * NUM_SHARDS) -> ShardReader:
        size = storage.file_size(f"{remote}/shard-00000.tar")
        assert size is not None
        gigabytes = num_shards * size / 1e9
        return ShardReader(remote, CacheConfig(folder=str(tmp_path / "cache"), gigabytes=gigabytes))

    return open_it


def assert_reads(reader: ShardReader, samples: list[LatentSample]) -> None:
    for number, sample in enumerate(samples):
        np.testing.assert_array_equal(reader.moments(number), sample.moments)
        np.testing.assert_array_equal(reader.context(number, 0), sample.contexts[0])
        assert reader.metadata(number) == sample.metadata


def test_only_what_is_read_is_fetched_and_only_once(
    open_reader: Callable[..., ShardReader], samples: list[LatentSample], downloads: list[str]
) -> None:
    reader = open_reader()
    assert downloads == []
    reader.moments(3)
    assert downloads == ["shard-00001.tar"]
    assert_reads(reader, samples)
    assert_reads(open_reader(), samples)  # a restart, or another process of this machine
    assert len(downloads) == len(set(downloads)) == NUM_SHARDS


def test_processes_that_want_a_shard_at_once_fetch_it_once(
    open_reader: Callable[..., ShardReader], downloads: list[str]
) -> None:
    readers = [open_reader() for _ in range(4)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda reader: reader.moments(0), readers * 3))
    assert downloads == ["shard-00000.tar"]


def test_the_cache_stays_within_its_bound_and_evicts_the_least_recently_used(
    open_reader: Callable[..., ShardReader],
    samples: list[LatentSample],
    downloads: list[str],
    tmp_path: Path,
) -> None:
    reader = open_reader(3.5)
    arriving = tmp_path / "cache" / ".another.arriving"
    arriving.touch()
    os.utime(arriving, (0, 0))
    for number in (0, 2, 4, 0, 6):
        reader = open_reader(3.5)  # a new process: reading counts as a use of the file
        reader.moments(number)
        files = filter(Path.is_file, (tmp_path / "cache").iterdir())
        cached = sum(path.stat().st_size for path in files)
        assert cached <= 3.5 * reader.manifest.shards[0].num_bytes
    assert arriving.exists()
    downloads.clear()
    open_reader(3.5).moments(0)
    assert downloads == []
    open_reader(3.5).moments(2)
    assert downloads == ["shard-00001.tar"]
    assert_reads(reader, samples)


def test_an_open_file_outlives_its_eviction(
    open_reader: Callable[..., ShardReader], samples: list[LatentSample], tmp_path: Path
) -> None:
    reader = open_reader()
    reader.moments(0)
    shutil.rmtree(tmp_path / "cache")
    np.testing.assert_array_equal(reader.moments(1), samples[1].moments)


def test_leftovers_of_a_killed_process_are_removed(
    open_reader: Callable[..., ShardReader], tmp_path: Path
) -> None:
    reader = open_reader()
    leftover = tmp_path / "cache" / f".{reader.manifest.shards[0].sha256}.k1ll3d"
    leftover.write_bytes(bytes(100))
    reader.moments(0)
    assert not leftover.exists()


def test_a_copy_that_goes_bad_is_named_and_fetched_anew(
    open_reader: Callable[..., ShardReader], samples: list[LatentSample], tmp_path: Path
) -> None:
    reader = open_reader()
    reader.moments(0)
    path = tmp_path / "cache" / reader.manifest.shards[0].sha256
    path.write_bytes(bytes(path.stat().st_size))
    message = r"shard-00000\.tar: 000000000000\.moments is damaged in the local cache; the copy wa"
    with pytest.raises(ShardError, match=message):
        open_reader().moments(0)
    np.testing.assert_array_equal(open_reader().moments(0), samples[0].moments)


@pytest.mark.parametrize(
    ("name", "what"),
    [("shard-00002.tar", "damaged, .*"), ("shard-00002.index.npz", "index does not match .*")],
)
def test_damage_in_the_store_is_named_when_it_arrives(
    open_reader: Callable[..., ShardReader], remote: str, name: str, what: str
) -> None:
    data = bytearray(storage.read_bytes(f"{remote}/{name}"))
    data[-600] ^= 1
    storage.write_bytes(f"{remote}/{name}", bytes(data))
    reader = open_reader()
    reader.moments(0)
    message = f"{name}: {what}; delete completed/shard-00002.json and run the encode again"
    with pytest.raises(ShardError, match=message):
        reader.moments(4)


@pytest.mark.parametrize("name", ["shard-00002.tar", "shard-00002.index.npz"])
def test_a_missing_object_is_named_when_the_dataset_is_opened(
    open_reader: Callable[..., ShardReader], remote: str, name: str
) -> None:
    storage.remove(f"{remote}/{name}")
    with pytest.raises(ShardError, match=f"{name}: no such file; delete completed"):
        open_reader()


def test_a_disk_that_cannot_hold_the_cache_is_refused(
    open_reader: Callable[..., ShardReader], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = FileCache(CacheConfig(folder=str(tmp_path), gigabytes=2.0))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    cache.check_space(10**9)
    with pytest.raises(UserError, match=r"room for 1\.0 GB only; lower cache\.gigabytes or set"):
        cache.check_space(10**10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(UserError, match=r"room for 0\.0 GB only"):
        open_reader()


def test_an_unreachable_store_is_not_reported_as_damage(
    open_reader: Callable[..., ShardReader], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise StoreError("away")

    reader = open_reader()
    monkeypatch.setattr(storage, "download", fail)
    with pytest.raises(StoreError, match=r"^away$"):
        reader.moments(0)


def test_eviction_leaves_files_alone_that_are_not_of_the_cache(
    open_reader: Callable[..., ShardReader], tmp_path: Path
) -> None:
    reader = open_reader(1.5)
    others = [tmp_path / "cache" / name for name in ("thesis.tex", ".profile", "A" * 64, "0" * 63)]
    for path in others:
        path.write_bytes(bytes(10**6))
        os.utime(path, (0, 0))
    for number in (0, 2, 4, 6):
        reader.moments(number)
    assert all(path.exists() for path in others)


def test_only_a_folder_of_this_user_that_is_new_empty_or_marked_becomes_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "results.csv").touch()
    with pytest.raises(UserError, match=r"thesis: holds files, but no ifvit-cache.*cache\.f"):
        FileCache(CacheConfig(folder=str(thesis)))
    assert [path.name for path in thesis.iterdir()] == ["results.csv"]
    folder = str(tmp_path / "new" / "cache")
    for _ in range(2):
        FileCache(CacheConfig(folder=folder))
    assert stat.S_IMODE(Path(folder).stat().st_mode) == 0o700
    Path(folder).chmod(0o777)
    with pytest.raises(UserError, match="other users own or may change it"):
        FileCache(CacheConfig(folder=folder))
    Path(folder).chmod(0o755)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(UserError, match="other users own or may change it"):
        FileCache(CacheConfig(folder=folder))


def test_a_link_in_a_cache_is_not_followed(
    open_reader: Callable[..., ShardReader], samples: list[LatentSample], tmp_path: Path
) -> None:
    reader = open_reader()
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    (tmp_path / "cache" / reader.manifest.shards[0].sha256).symlink_to(victim)
    (tmp_path / "cache" / reader.manifest.shards[1].sha256).symlink_to(tmp_path / "absent")
    assert_reads(reader, samples)
    assert victim.read_bytes() == b"mine"
    assert not (tmp_path / "absent").exists()


@pytest.mark.s3
def test_a_faulty_store_changes_nothing(
    faulty_s3: FaultyProxy,
    s3_bucket: str,
    local: Path,
    samples: list[LatentSample],
    tmp_path: Path,
) -> None:
    url = copy_to(s3_bucket, local)
    faulty_s3.plan(
        Fault("status", method="GET", key="*shard-00000.tar", times=2),
        Fault("flip", method="GET", key="*shard-00001.tar"),
        Fault("truncate", method="GET", key="*shard-00002.tar"),
        Fault("shorten", method="GET", key="*shard-00003.index.npz"),
        Fault("reset", method="GET", key="*shard-00004.tar"),
    )
    reader = ShardReader(url, CacheConfig(folder=str(tmp_path)))
    assert_reads(reader, samples)
    assert len(faulty_s3.hits) == 6
    assert len(list(tmp_path.iterdir())) == NUM_SHARDS + 2  # and the locks and the marker


def test_a_local_copy_is_fetched_once_and_only_if_it_is_whole(
    remote: str, tmp_path: Path, downloads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    url = f"{remote}/manifest.json"
    content = storage.read_bytes(url)
    sha256 = hashlib.sha256(content).hexdigest()
    for _ in range(2):
        assert local_copy(url, sha256).read_bytes() == content
    assert downloads == ["manifest.json"]
    assert local_copy("somewhere/x", sha256) == Path("somewhere/x")
    with pytest.raises(ContentError, match="damaged"):
        local_copy(url, "0" * 64)
    with pytest.raises(UserError, match="no such file"):
        local_copy(f"{remote}/nothing", "0" * 64)
    [cache] = tmp_path.glob("ifvit-cache-*")
    (cache / "ifvit-cache").unlink()
    with pytest.raises(UserError, match=r"set cache\.folder to a new folder"):
        local_copy(url, sha256)
