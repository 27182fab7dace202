"""Files by URL: whole or not at all, checked on arrival, and patient with a store that fails."""

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from ifvit import object_store, storage
from ifvit.errors import UserError
from ifvit.object_store import ContentError, StoreError


class FaultyFileSystem(MemoryFileSystem):  # type: ignore[misc]
    """Objects in memory behind a store that misbehaves as planned."""

    protocol = "faulty"
    faults: dict[str, list[Any]] = {}  # noqa: RUF012
    calls: list[str] = []  # noqa: RUF012

    def _fault(self, name: str) -> Any:
        self.calls.append(name)
        fault = self.faults[name].pop(0) if self.faults.get(name) else None
        if isinstance(fault, Exception):
            raise fault
        return fault

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        fault = self._fault("pipe_file")
        super().pipe_file(path, value[:-1] if fault == "truncate" else value, mode=mode)

    def put_file(self, lpath: str, rpath: str, **kwargs: Any) -> None:
        fault = self._fault("put_file")
        data = Path(lpath).read_bytes()
        super().pipe_file(rpath, b"?" + data[1:] if fault == "flip" else data)

    def get_file(self, rpath: str, lpath: str, **kwargs: Any) -> None:
        fault = self._fault("get_file")
        data = self.cat_file(rpath)
        # As s3fs leaves it behind: of the full size, with holes.
        Path(lpath).write_bytes(bytes(len(data)) if fault else data)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FaultyFileSystem]]:
    fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
    FaultyFileSystem.faults, FaultyFileSystem.calls = {}, []
    FaultyFileSystem.store.clear()
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    yield FaultyFileSystem
    FaultyFileSystem.store.clear()


@pytest.mark.parametrize("root", ["local", "faulty://bucket"])
def test_round_trip(root: str, tmp_path: Path, store: type[FaultyFileSystem]) -> None:
    base = str(tmp_path / "x") if root == "local" else root
    url = storage.join(base, "a", "b.json")
    assert not storage.exists(url)
    assert storage.file_size(url) is None
    storage.write_json(url, {"n": 1})
    assert storage.read_json(url) == {"n": 1}
    assert storage.file_size(url) == len(storage.read_bytes(url))
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"content")
    storage.upload(source, storage.join(base, "a", "c"))
    assert storage.list_names(storage.join(base, "a")) == ["b.json", "c"]
    storage.download(storage.join(base, "a", "c"), target, hashlib.sha256(b"content").hexdigest())
    assert target.read_bytes() == b"content"
    storage.remove(storage.join(base, "a"))
    storage.remove(storage.join(base, "a"))
    assert storage.list_names(storage.join(base, "a")) == []
    assert sorted(path.name for path in tmp_path.rglob(".*")) == []


@pytest.mark.parametrize("root", ["local", "faulty://bucket"])
def test_create_succeeds_once(root: str, tmp_path: Path, store: type[FaultyFileSystem]) -> None:
    url = storage.join(str(tmp_path) if root == "local" else root, "lease")
    assert storage.create(url, b"mine")
    assert not storage.create(url, b"theirs")
    assert storage.read_bytes(url) == b"mine"


@pytest.mark.parametrize("fault", [OSError(5, "503"), TimeoutError(), "truncate"])
def test_a_write_is_repeated_until_the_store_holds_it(
    fault: object, store: type[FaultyFileSystem]
) -> None:
    store.faults = {"pipe_file": [fault, fault]}
    storage.write_bytes("faulty://bucket/x", b"content")
    assert storage.read_bytes("faulty://bucket/x") == b"content"
    assert store.calls.count("pipe_file") == 3


def test_an_upload_that_arrives_changed_is_repeated(
    tmp_path: Path, store: type[FaultyFileSystem]
) -> None:
    store.faults = {"put_file": ["flip", OSError(5, "500")]}
    (tmp_path / "source").write_bytes(b"content")
    storage.upload(tmp_path / "source", "faulty://bucket/x")
    assert storage.read_bytes("faulty://bucket/x") == b"content"


def test_a_full_sized_corrupt_download_is_repeated(
    tmp_path: Path, store: type[FaultyFileSystem]
) -> None:
    storage.write_bytes("faulty://bucket/x", b"content")
    store.faults = {"get_file": ["holes", OSError(5, "reset")]}
    path = tmp_path / "x"
    storage.download("faulty://bucket/x", path, hashlib.sha256(b"content").hexdigest())
    assert path.read_bytes() == b"content"


def test_damage_at_rest_is_named_and_nothing_published(
    tmp_path: Path, store: type[FaultyFileSystem]
) -> None:
    storage.write_bytes("faulty://bucket/x", b"damaged")
    with pytest.raises(ContentError, match="faulty://bucket/x: damaged"):
        storage.download("faulty://bucket/x", tmp_path / "x", hashlib.sha256(b"").hexdigest())
    assert list(tmp_path.iterdir()) == []


def test_patience_ends_with_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, store: type[FaultyFileSystem]
) -> None:
    monkeypatch.setenv("IFVIT_STORE_PATIENCE", "0")
    store.faults = {"pipe_file": [ConnectionError("refused")]}
    with pytest.raises(StoreError, match=r"faulty://bucket/x: the store fails \(refused\)"):
        storage.write_bytes("faulty://bucket/x", b"content")


def test_a_refusal_is_not_repeated(store: type[FaultyFileSystem]) -> None:
    store.faults = {"pipe_file": [PermissionError("SignatureDoesNotMatch"), None]}
    with pytest.raises(StoreError, match=r"refuses access .*AWS_ACCESS_KEY_ID"):
        storage.write_bytes("faulty://bucket/x", b"content")
    assert store.calls == ["pipe_file"]


def test_absence_is_an_answer(tmp_path: Path, store: type[FaultyFileSystem]) -> None:
    with pytest.raises(UserError, match="no such file"):
        storage.read_bytes("faulty://bucket/x")
    with pytest.raises(UserError, match="no such file"):
        storage.download("faulty://bucket/x", tmp_path / "x")


@pytest.mark.parametrize("num_bytes", [100, 128, 200, 256])
def test_the_expected_etag_is_that_of_s3(
    num_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "PART_BYTES", 64)
    data = bytes(range(num_bytes % 256)) or bytes(num_bytes)
    (tmp_path / "x").write_bytes(data)
    parts = [hashlib.md5(data[i : i + 64]).digest() for i in range(0, len(data), 64)]
    joined = f"{hashlib.md5(b''.join(parts)).hexdigest()}-{len(parts)}"
    expected = hashlib.md5(data).hexdigest() if len(data) < 128 else joined
    assert object_store._file_etag(tmp_path / "x") == expected
