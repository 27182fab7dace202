"""What a test needs from outside: a real S3 server, a real SLURM cluster, a real browser.

Where one is missing the test skips and names the command that starts it.
IFVIT_TEST_REQUIRE=s3,slurm,browser turns that skip into a failure: CI cannot pass by skipping.
"""

import os
import shutil
import subprocess
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import fsspec
import pytest
from faulty_proxy import FaultyProxy


def s3_answers() -> bool:
    """Whether an S3 server is there, by whatever HTTP status."""
    try:
        urllib.request.urlopen(os.environ.get("AWS_ENDPOINT_URL", "http://127.0.0.1:1"), timeout=10)
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def browser_is_there() -> bool:
    """Whether Debian's Chromium and its driver are installed."""
    return all(shutil.which(name) for name in ("chromium", "chromedriver"))


def slurm_answers() -> bool:
    """Whether SLURM's controller is there."""
    if shutil.which("sinfo") is None:
        return False
    return subprocess.run(["sinfo"], capture_output=True, timeout=60, check=False).returncode == 0


SERVERS: dict[str, tuple[Callable[[], bool], str]] = {
    "s3": (cache(s3_answers), "no S3 server; start one with: eval $(tools/s3_server.sh up)"),
    "browser": (cache(browser_is_there), "no Chromium; install it with: tools/browser.sh up"),
    "slurm": (cache(slurm_answers), "no SLURM; start it with: tools/slurm_cluster.sh up"),
}


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip, or fail where it is required, a test whose server is not there."""
    required = os.environ.get("IFVIT_TEST_REQUIRE", "").split(",")
    for name, (answers, remedy) in SERVERS.items():
        if item.get_closest_marker(name) and not answers():
            if name in required:
                pytest.fail(remedy, pytrace=False)
            pytest.skip(remedy)


@pytest.fixture
def s3_bucket() -> Iterator[str]:
    """`s3://bucket/prefix` of this test alone, emptied afterwards; for tests marked `s3`."""
    with s3_prefix() as url:
        yield url


@pytest.fixture(scope="module")
def s3_module_bucket() -> Iterator[str]:
    """The same for all tests of a module."""
    with s3_prefix() as url:
        yield url


@contextmanager
def s3_prefix() -> Iterator[str]:
    """A prefix that nobody else uses, emptied afterwards."""
    url = f"s3://ifvit-tests/{uuid.uuid4().hex}"
    files = fsspec.filesystem("s3", use_listings_cache=False)
    files.makedirs("s3://ifvit-tests", exist_ok=True)
    yield url
    files = fsspec.filesystem("s3", use_listings_cache=False)
    if files.exists(url):
        files.rm(url, recursive=True)


@pytest.fixture
def faulty_s3(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """A healthy proxy before the S3 server, which this process and its children now talk to."""
    s3 = fsspec.get_filesystem_class("s3")
    with FaultyProxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        s3.clear_instance_cache()  # file systems remember the endpoint that they were made with
        yield proxy
    s3.clear_instance_cache()
