"""Real servers for tests: S3, SLURM and a browser.

A test without its server is skipped and names the command that starts the server.
IFVIT_TEST_REQUIRE=s3,slurm,browser turns the skip into a failure, for CI.
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

os.environ["IFVIT_PROTOCOLS"] = "memory,faulty"


def s3_answers() -> bool:
    """Whether an S3 server answers, with any HTTP status."""
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
    """Whether the SLURM controller answers."""
    if shutil.which("sinfo") is None:
        return False
    return subprocess.run(["sinfo"], capture_output=True, timeout=60, check=False).returncode == 0


SERVERS: dict[str, tuple[Callable[[], bool], str]] = {
    "s3": (cache(s3_answers), "no S3 server; start one with: eval $(tools/s3_server.sh up)"),
    "browser": (cache(browser_is_there), "no Chromium; install it with: tools/browser.sh up"),
    "slurm": (cache(slurm_answers), "no SLURM; start it with: tools/slurm_cluster.sh up"),
}


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose server is missing, or fail it if the server is required."""
    required = os.environ.get("IFVIT_TEST_REQUIRE", "").split(",")
    for name, (answers, remedy) in SERVERS.items():
        if item.get_closest_marker(name) and not answers():
            if name in required:
                pytest.fail(remedy, pytrace=False)
            pytest.skip(remedy)


@pytest.fixture
def num_kills() -> int:
    """SIGKILLs in each test that kills at random moments; IFVIT_TEST_KILLS=100 asks for more."""
    return int(os.environ.get("IFVIT_TEST_KILLS", "6"))


@pytest.fixture
def s3_bucket() -> Iterator[str]:
    """`s3://bucket/prefix` for one test, emptied afterwards; for tests marked `s3`."""
    with s3_prefix() as url:
        yield url


@pytest.fixture(scope="module")
def s3_module_bucket() -> Iterator[str]:
    """`s3://bucket/prefix` for all tests of a module."""
    with s3_prefix() as url:
        yield url


@contextmanager
def s3_prefix() -> Iterator[str]:
    """Yield an unused prefix, and empty it afterwards."""
    url = f"s3://ifvit-tests/{uuid.uuid4().hex}"
    files = fsspec.filesystem("s3", use_listings_cache=False)
    files.makedirs("s3://ifvit-tests", exist_ok=True)
    yield url
    files = fsspec.filesystem("s3", use_listings_cache=False)
    if files.exists(url):
        files.rm(url, recursive=True)


@pytest.fixture
def faulty_s3(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """Healthy proxy in front of the S3 server, for this process and its children."""
    s3 = fsspec.get_filesystem_class("s3")
    with FaultyProxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        s3.clear_instance_cache()  # file systems remember the endpoint that they were made with
        yield proxy
    s3.clear_instance_cache()
