"""Files are written whole or not at all, checked on arrival, and retried when a store fails."""

import errno
import hashlib
import json
import os
import random
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from aiohttp import ClientPayloadError
from botocore.exceptions import EndpointConnectionError
from fsspec.implementations.memory import MemoryFileSystem

from ifvit import connections, storage
from ifvit.connections import StoreError
from ifvit.errors import UserError
from ifvit.records import dump_rows
from ifvit.storage import ContentError


class FaultyFileSystem(MemoryFileSystem):  # type: ignore[misc]
    """Object store in memory that fails as planned."""

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
        self._fault("pipe_file")
        super().pipe_file(path, value, mode=mode)

    def put_file(self, lpath: str, rpath: str, **kwargs: Any) -> None:
        data = Path(lpath).read_bytes()
        stored = {"truncate": data[:-1], "flip": b"?" + data[1:]}
        super().pipe_file(rpath, stored.get(self._fault("put_file"), data))

    def get_file(self, rpath: str, lpath: str, **kwargs: Any) -> None:
        fault = self._fault("get_file")
        data = self.cat_file(rpath)
        # As s3fs leaves it behind: of the full size, with holes.
        arrives = {"holes": bytes(len(data)), "truncate": data[:-1]}
        Path(lpath).write_bytes(arrives.get(fault, data))


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
    assert json.loads(storage.read_bytes(url)) == {"n": 1}
    assert storage.file_size(url) == len(storage.read_bytes(url))
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"content")
    storage.upload(source, storage.join(base, "a", "c"))
    assert storage.list_names(storage.join(base, "a")) == ["b.json", "c"]
    storage.write_bytes(storage.join(base, "a", "folder", "d"), b"")
    states = storage.list_states(storage.join(base, "a"))
    sizes = {name: state and state.num_bytes for name, state in states.items()}
    assert sizes == {"b.json": storage.file_size(url), "c": 7, "folder": None}
    storage.remove(storage.join(base, "a", "folder"))
    storage.write_bytes(storage.join(base, "a", ".half"), b"")
    assert [Path(name).name for name in storage.walk_files(base)] == [".half", "b.json", "c"]
    storage.download(storage.join(base, "a", "c"), target, hashlib.sha256(b"content").hexdigest())
    assert target.read_bytes() == b"content"
    storage.remove(storage.join(base, "a"))
    storage.remove(storage.join(base, "a"))
    assert storage.list_names(storage.join(base, "a")) == []
    assert storage.list_states(storage.join(base, "a")) == {}
    assert storage.walk_files(base) == []
    assert sorted(path.name for path in tmp_path.rglob(".*")) == []


WRITES: dict[str, Callable[[str, Path], object]] = {
    "write": lambda url, source: storage.write_bytes(url, source.read_bytes()),
    "upload": lambda url, source: storage.upload(source, url),
    "download": lambda url, source: storage.download(str(source), Path(url)),
    "create": lambda url, source: storage.create(url, source.read_bytes()),
}


@pytest.mark.parametrize("kind", WRITES)
def test_a_file_is_on_disk_before_it_has_its_name_and_then_its_name_is(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, path = tmp_path / "source", tmp_path / "folder" / "x"
    source.write_bytes(b"content")
    synced = []

    def sync(descriptor: int) -> None:
        held = Path(f"/proc/self/fd/{descriptor}").readlink()
        assert path.parent in (held, held.parent)  # a rename from elsewhere might be a copy
        synced.append(("name" if held.is_dir() else held.read_bytes(), path.exists()))

    monkeypatch.setattr(os, "fsync", sync)
    WRITES[kind](str(path), source)
    # A lease need not outlive a crash of the machine.
    assert synced == [(b"content", False), ("name", True)][: 1 if kind == "create" else 2]
    assert path.read_bytes() == b"content"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
@pytest.mark.parametrize("kind", WRITES)
def test_the_umask_decides_who_reads_a_published_file(
    umask: int, kind: str, tmp_path: Path
) -> None:
    source, path = tmp_path / "source", tmp_path / "folder" / "x"
    source.write_bytes(b"content")
    before = os.umask(umask)
    try:
        WRITES[kind](str(path), source)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o777 & ~umask


@pytest.mark.parametrize(
    "url",
    [
        *("http://host/x", "https://host/x", "file:///etc/passwd", "file:x", "gs://bucket/x"),
        *("s3://bucket/x::memory://y", "simplecache::s3://bucket/x", "memory://a::b", "~/x"),
        *(
            "zip://x::http://host",
            "S3://bucket/x",
            "a\0b",
            "s3://http://host/x",
            "s3://",
            "s3:///x",
        ),
        *("s3://bucket/a\nb", "s3://bucket/\ud800", f"s3://bucket/{'x' * 2000}"),
    ],
)
def test_a_url_of_a_protocol_that_the_user_has_not_allowed_is_refused(
    url: str, tmp_path: Path
) -> None:
    actions: list[Callable[[], object]] = [
        lambda: connections.is_remote(url),
        lambda: storage.exists(url),
        lambda: storage.read_bytes(url),
        lambda: storage.write_bytes(url, b""),
        lambda: storage.create(url, b""),
        lambda: storage.download(url, tmp_path / "x"),
        lambda: storage.upload(tmp_path / "x", url),
        lambda: storage.remove(url),
    ]
    for action in actions:
        with pytest.raises(UserError, match="expected a") as raised:
            action()
        assert str(raised.value).isprintable()


def test_a_protocol_that_the_environment_names_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert connections.is_remote("memory://x")
    monkeypatch.delenv("IFVIT_PROTOCOLS")
    with pytest.raises(UserError, match="IFVIT_PROTOCOLS"):
        connections.is_remote("memory://x")
    assert connections.is_remote("s3://bucket/x")
    assert connections.is_remote("hf://datasets/team/name")
    assert not connections.is_remote("folder/a::b")


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "large"])
def test_only_regular_files_of_a_bounded_size_are_read(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with path.open("wb") as file:
            file.truncate(1 << 40)  # takes no space on disk
    with pytest.raises(UserError, match=r"x: (not a regular file|larger than the allowed 100 b)"):
        storage.read_bytes(str(path), 100)
    if kind != "large":
        with pytest.raises(UserError, match="x: not a regular file"):
            storage.download(str(path), tmp_path / "copy")
        with pytest.raises(UserError, match="x: not a regular file"):
            storage.sha256_of(path)
    with pytest.raises(UserError, match="x/y: no such file"):
        storage.read_bytes(f"{tmp_path}/x/y")


def test_an_object_beyond_the_bound_is_not_fetched(store: type[FaultyFileSystem]) -> None:
    storage.write_bytes("faulty://bucket/x", b"content")
    assert storage.read_bytes("faulty://bucket/x", 7) == b"content"
    with pytest.raises(UserError, match="larger than the allowed 6 bytes"):
        storage.read_bytes("faulty://bucket/x", 6)


def test_sealed_records_and_rows_come_back(tmp_path: Path) -> None:
    url = str(tmp_path / "x")
    storage.write_sealed(url, {"n": 1})
    assert storage.read_sealed(dict[str, int], url) == {"n": 1}
    storage.write_bytes(url, dump_rows([{"n": 1}, {"n": 2}]))
    assert storage.read_rows(dict[str, int], url) == [{"n": 1}, {"n": 2}]


def test_one_process_creates_a_file_also_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", fail)
    url = str(tmp_path / "lease")
    assert storage.create(url, b"mine")
    assert not storage.create(url, b"theirs")
    assert storage.read_bytes(url) == b"mine"


@pytest.mark.parametrize("root", ["local", "faulty://bucket"])
def test_an_interrupted_write_leaves_nothing(
    root: str, tmp_path: Path, store: type[FaultyFileSystem]
) -> None:
    def write_half(url: str) -> None:
        with storage.write_file(url) as path:
            path.write_bytes(b"half")
            raise KeyboardInterrupt

    url = storage.join(str(tmp_path) if root == "local" else root, "x")
    with pytest.raises(KeyboardInterrupt):
        write_half(url)
    assert not storage.exists(url)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_disk_does_not_look_like_an_absent_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    url = str(tmp_path / "x")
    assert not storage.exists(f"{Path(__file__)}/x")
    monkeypatch.setattr(os, "stat", fail)
    with pytest.raises(UserError, match=rf"{url}: Stale file handle; check the disk"):
        storage.exists(url)


@pytest.mark.parametrize("root", ["local", "faulty://bucket"])
def test_create_succeeds_once(root: str, tmp_path: Path, store: type[FaultyFileSystem]) -> None:
    url = storage.join(str(tmp_path) if root == "local" else root, "lease")
    assert storage.create(url, b"mine")
    assert not storage.create(url, b"theirs")
    assert storage.read_bytes(url) == b"mine"


def precondition_failed() -> OSError:
    """Build the exception that s3fs raises for the answer 412 of Ceph."""
    cause = Exception()
    cause.response = {"ResponseMetadata": {"HTTPStatusCode": 412}}  # type: ignore[attr-defined]
    error = OSError(errno.EINVAL, None)
    error.__cause__ = cause
    return error


@pytest.mark.parametrize("there", [b"mine", b"theirs"])
def test_a_creator_that_finds_the_file_compares_its_content(
    there: bytes, store: type[FaultyFileSystem]
) -> None:
    storage.write_bytes(
        "faulty://bucket/lease", there
    )  # perhaps by a try of this process whose answer was lost
    for refusal in (None, precondition_failed()):
        store.calls.clear()
        store.faults = {"pipe_file": [OSError(5, "503"), refusal]}
        assert storage.create("faulty://bucket/lease", b"mine") == (there == b"mine")
        assert store.calls == ["pipe_file", "pipe_file"]
        assert storage.read_bytes("faulty://bucket/lease") == there


@pytest.mark.parametrize(
    "fault",
    [
        OSError(5, "503"),
        TimeoutError(),
        EndpointConnectionError(endpoint_url="http://store"),
        ClientPayloadError(),
        "truncate",
        "flip",
    ],
)
def test_a_write_is_repeated_until_the_store_holds_it(
    fault: object, store: type[FaultyFileSystem]
) -> None:
    store.faults = {"put_file": [fault, fault]}
    storage.write_bytes("faulty://bucket/x", b"content")
    assert storage.read_bytes("faulty://bucket/x") == b"content"
    assert store.calls.count("put_file") == 3


@pytest.mark.parametrize(
    ("faults", "sha256"),
    [
        (["holes", OSError(5, "reset")], hashlib.sha256(b"content").hexdigest()),
        (["truncate"], None),
    ],
)
def test_a_corrupt_download_is_repeated(
    faults: list[Any], sha256: str | None, tmp_path: Path, store: type[FaultyFileSystem]
) -> None:
    storage.write_bytes("faulty://bucket/x", b"content")
    store.faults = {"get_file": faults}
    storage.download("faulty://bucket/x", tmp_path / "x", sha256)
    assert (tmp_path / "x").read_bytes() == b"content"


def test_damage_at_rest_is_named_and_nothing_published(
    tmp_path: Path, store: type[FaultyFileSystem]
) -> None:
    storage.write_bytes("faulty://bucket/x", b"damaged")
    with pytest.raises(ContentError, match="faulty://bucket/x: damaged"):
        storage.download("faulty://bucket/x", tmp_path / "x", hashlib.sha256(b"").hexdigest())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        (ConnectionError("refused"), r"x: the store fails \(refused\)"),
        (FileNotFoundError("NoSuchBucket"), "x: no such bucket; create it first"),
        (PermissionError("SignatureDoesNotMatch"), r"refuses access .*AWS_ACCESS_KEY_ID"),
    ],
)
def test_a_failing_store_is_one_clear_line(
    fault: Exception, named: str, monkeypatch: pytest.MonkeyPatch, store: type[FaultyFileSystem]
) -> None:
    monkeypatch.setenv("IFVIT_STORE_PATIENCE", "0")
    store.faults = {"put_file": [fault]}
    with pytest.raises(StoreError, match=named):
        storage.write_bytes("faulty://bucket/x", b"content")
    assert store.calls == ["put_file"]


def test_pauses_grow_but_not_for_ever(
    monkeypatch: pytest.MonkeyPatch, store: type[FaultyFileSystem]
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    store.faults = {"put_file": [ConnectionError("refused")] * 9}
    storage.write_bytes("faulty://bucket/x", b"content")
    assert pauses == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 15.0, 15.0]


def test_an_absent_file_is_a_user_error(tmp_path: Path, store: type[FaultyFileSystem]) -> None:
    with pytest.raises(UserError, match="no such file"):
        storage.read_bytes("faulty://bucket/x")
    with pytest.raises(UserError, match="no such file"):
        storage.download("faulty://bucket/x", tmp_path / "x")


@pytest.mark.parametrize("num_bytes", [100, 128, 200, 256])
def test_the_expected_etag_is_that_of_s3(
    num_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "PART_BYTES", 64)
    data = bytes(range(num_bytes % 256)) or bytes(num_bytes)
    (tmp_path / "x").write_bytes(data)
    parts = [hashlib.md5(data[i : i + 64]).digest() for i in range(0, len(data), 64)]
    joined = f"{hashlib.md5(b''.join(parts)).hexdigest()}-{len(parts)}"
    expected = hashlib.md5(data).hexdigest() if len(data) < 128 else joined
    assert connections._expected_etag(tmp_path / "x") == expected


def test_clients_are_shared_by_threads_but_not_by_processes_or_accounts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "one")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    first = connections.filesystem("s3://bucket/x")
    assert connections.filesystem("s3://bucket/y") is first
    assert not first.dircache.use_listings_cache  # other writers exist
    monkeypatch.setattr(os, "getpid", lambda: -1)  # as in a forked child
    assert connections.filesystem("s3://bucket/x") is not first
    monkeypatch.undo()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "two")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert connections.filesystem("s3://bucket/x") is not first


def test_a_name_from_a_file_stays_in_its_folder_here_and_in_an_object_store(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "link").symlink_to(tmp_path)
    assert storage.join_inside(str(tmp_path / "run"), "a/b") == f"{tmp_path}/run/a/b"
    assert storage.join_inside("s3://bucket/run", "a/b") == "s3://bucket/run/a/b"
    for folder in (str(tmp_path / "run"), "s3://bucket/run"):
        for name in ("../x", "/etc/passwd", "", "a//b"):
            with pytest.raises(UserError, match="does not lead inside"):
                storage.join_inside(folder, name)
    with pytest.raises(UserError, match="does not lead inside"):
        storage.join_inside(str(tmp_path / "run"), "link/x")


@pytest.mark.parametrize("patience", ["ten", "nan", "-1"])
def test_a_patience_that_is_no_number_is_one_line(
    monkeypatch: pytest.MonkeyPatch, patience: str
) -> None:
    monkeypatch.setenv("IFVIT_STORE_PATIENCE", patience)
    with pytest.raises(UserError, match=f"IFVIT_STORE_PATIENCE is {patience}; it must be"):
        storage.exists("s3://bucket/x")


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("IFVIT_STORE_PATIENCE", "0.1")
    fsspec.get_filesystem_class("hf").clear_instance_cache()
    with pytest.raises(StoreError, match=r"hf://datasets/team/name: the store fails"):
        storage.list_names("hf://datasets/team/name")
    fsspec.get_filesystem_class("hf").clear_instance_cache()
