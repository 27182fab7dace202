"""A few kills of a real run; tools/kill_train.py does as many as one likes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "kill_train.py"


@pytest.mark.s3
@pytest.mark.distributed
@pytest.mark.slow
def test_a_run_killed_on_the_way_to_a_store_ends_as_if_left_alone(
    s3_bucket: str, shards: str
) -> None:
    command = [sys.executable, str(TOOL), s3_bucket, "--kills", "3", "--steps", "45"]
    command += ["--window", "2"]
    hunt = subprocess.run(
        [*command, "--worlds", "1", "2", "--shards", shards],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=600,
    )
    report = json.loads(hunt.stdout[hunt.stdout.index("{") :])
    assert report["kills"] >= 1
    assert report["logged_losses"] == 45
    assert report["max_loss_difference"] < 1e-5
