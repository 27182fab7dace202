"""The proxy causes the planned faults, and none when healthy."""

import os
import urllib.error
import urllib.request
from http.client import IncompleteRead, RemoteDisconnected

import fsspec
import pytest
from faulty_proxy import Fault, FaultyProxy

pytestmark = pytest.mark.s3
BODY = bytes(range(256)) * 4096


@pytest.fixture
def url(faulty_s3: FaultyProxy, s3_bucket: str) -> str:
    """A public object of one MiB, as a plain HTTP address at the proxy."""
    key = f"{s3_bucket}/object"
    files = fsspec.filesystem("s3")
    files.pipe_file(key, BODY)
    files.chmod(key, "public-read")
    return key.replace("s3://", f"{faulty_s3.endpoint}/")


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return bytes(answer.read())


def test_s3fs_works_through_a_healthy_proxy(faulty_s3: FaultyProxy, s3_bucket: str) -> None:
    assert os.environ["AWS_ENDPOINT_URL"] == faulty_s3.endpoint
    files = fsspec.filesystem("s3")
    with files.open(f"{s3_bucket}/a b/+ä", "wb", block_size=5 << 20) as file:
        file.write(BODY * 11)  # several parts
    assert files.cat_file(f"{s3_bucket}/a b/+ä") == BODY * 11
    assert files.cat_file(f"{s3_bucket}/a b/+ä", start=-256) == BODY[:256]
    assert files.info(f"{s3_bucket}/a b/+ä")["size"] == 11 << 20
    assert [name.rsplit("/", 1)[1] for name in files.ls(f"{s3_bucket}/a b")] == ["+ä"]
    assert faulty_s3.hits == []


def test_faults_strike_the_requests_that_they_name(faulty_s3: FaultyProxy, url: str) -> None:
    faulty_s3.plan(Fault("status", method="GET", key="*/object", first=2, times=2, status=500))
    seen = []
    for _ in range(4):
        try:
            seen.append(len(get(url)))
        except urllib.error.HTTPError as error:
            seen.append(error.code)
    assert seen == [len(BODY), 500, 500, len(BODY)]
    assert len(faulty_s3.hits) == 2
    faulty_s3.plan(Fault("shorten"), Fault("flip", first=2))
    assert get(url) == BODY[: len(BODY) // 2]
    assert sum(a != b for a, b in zip(get(url), BODY, strict=True)) == 1


def test_a_broken_connection_is_an_error(faulty_s3: FaultyProxy, url: str) -> None:
    for kind, error in (
        ("drop", RemoteDisconnected),
        ("lose_answer", RemoteDisconnected),
        ("truncate", IncompleteRead),
        ("reset", (ConnectionResetError, IncompleteRead)),
    ):
        faulty_s3.plan(Fault(kind))  # type: ignore[arg-type]
        with pytest.raises(error):
            get(url)
        assert get(url) == BODY
    faulty_s3.plan(Fault("hang"))
    with pytest.raises(TimeoutError):
        urllib.request.urlopen(url, timeout=0.2)


def test_a_lost_answer_is_to_a_request_that_was_done(
    faulty_s3: FaultyProxy, s3_bucket: str
) -> None:
    faulty_s3.plan(Fault("lose_answer", method="PUT", times=None))
    files = fsspec.filesystem("s3", config_kwargs={"retries": {"max_attempts": 1}})
    files.retries = 1
    with pytest.raises(Exception, match="closed"):
        files.pipe_file(f"{s3_bucket}/x", b"done")
    faulty_s3.plan()
    assert files.cat_file(f"{s3_bucket}/x") == b"done"
