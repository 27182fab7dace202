"""Encoding from and into a real object store, healthy and faulty: the dataset of a local run."""

import hashlib
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from encoded_files import finish, hashes, image_files, undisturbed_hashes, without_markers
from faulty_proxy import Fault, FaultyProxy

from data_pipeline.config import EncodeConfig, InspectConfig, MergeConfig, ShardsConfig
from data_pipeline.encode import encode
from data_pipeline.shard_tools import inspect_shards, merge, stats, verify
from ifvit import storage
from ifvit.connections import StoreError
from ifvit.errors import UserError

pytestmark = pytest.mark.s3


def remote_hashes(url: str) -> dict[str, str]:
    """Hash of every object of a dataset, by name relative to `url`."""
    markers = [f"completed/{name}" for name in storage.list_names(f"{url}/completed")]
    names = [name for name in storage.list_names(url) if name != "completed"] + markers
    return {name: hashlib.sha256(storage.read_bytes(f"{url}/{name}")).hexdigest() for name in names}


@pytest.fixture
def expected(config: EncodeConfig) -> dict[str, str]:
    """Hashes of the files of a local run."""
    return undisturbed_hashes(config)


def test_a_store_receives_the_files_of_a_local_run(
    config: EncodeConfig, expected: dict[str, str], s3_bucket: str
) -> None:
    config = replace(config, output=s3_bucket)
    encode(replace(config, num_tasks=2, task=1))
    encode(replace(config, num_tasks=2, task=0))
    assert remote_hashes(s3_bucket) == expected
    storage.remove(f"{s3_bucket}/shard-00001.tar")
    encode(config)
    assert remote_hashes(s3_bucket) == expected


def test_every_verb_of_shards_reads_and_writes_a_store(
    config: EncodeConfig, s3_bucket: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    encode(replace(config, output=f"{s3_bucket}/a"))
    other = json.loads(Path(config.captions).read_text())
    for entry in [*other["images"], *other["annotations"]]:
        entry["id" if "file_name" in entry else "image_id"] += 1000
    Path(config.captions).write_text(json.dumps(other))
    encode(replace(config, output=f"{s3_bucket}/b", samples_per_shard=5))
    url = f"{s3_bucket}/c"
    merge(MergeConfig(urls=[f"{s3_bucket}/a", f"{s3_bucket}/b"], output=url))
    verify(ShardsConfig(url=url))
    stats(ShardsConfig(url=url))
    inspect_shards(InspectConfig(url=url, grid=str(tmp_path / "grid.png")))
    out = capsys.readouterr().out
    assert "5 shards, 20 images, 38 captions: every hash" in out
    assert "38; 1 to 3, mean 1.90 per image" in out
    assert "36x42" in out


def test_verify_names_damaged_objects_by_their_url(
    config: EncodeConfig, s3_bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    encode(replace(config, output=s3_bucket))
    data = bytearray(storage.read_bytes(f"{s3_bucket}/shard-00001.tar"))
    data[700] ^= 1
    storage.write_bytes(f"{s3_bucket}/shard-00001.tar", bytes(data))
    storage.remove(f"{s3_bucket}/shard-00002.index.npz")
    capsys.readouterr()
    with pytest.raises(UserError, match="2 problems"):
        verify(ShardsConfig(url=s3_bucket))
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{s3_bucket}/shard-00001.tar: content does not match")
    assert second.startswith(f"{s3_bucket}/shard-00002.index.npz: no such file")


def test_faults_during_uploads_change_nothing(
    config: EncodeConfig, expected: dict[str, str], s3_bucket: str, faulty_s3: FaultyProxy
) -> None:
    faulty_s3.plan(
        Fault("status", method="PUT", key="*.tar", times=2),
        Fault("drop", method="PUT", key="*.index.npz"),
        Fault("lose_answer", method="PUT", key="*/completed/*", first=2),
        Fault("status", method="PUT", key="*/manifest.json", status=500),
    )
    encode(replace(config, output=s3_bucket))
    assert len(faulty_s3.hits) == 5
    faulty_s3.plan()
    assert remote_hashes(s3_bucket) == expected


def test_a_store_that_stays_down_is_one_line_and_loses_nothing(
    config: EncodeConfig,
    expected: dict[str, str],
    s3_bucket: str,
    faulty_s3: FaultyProxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("IFVIT_STORE_PATIENCE", "0.5")
    faulty_s3.plan(Fault("status", method="PUT", key="*/shard-00001.tar", times=None))
    with pytest.raises(StoreError, match=r"shard-00001\.tar"):
        encode(replace(config, output=s3_bucket))
    assert not storage.exists(f"{s3_bucket}/manifest.json")
    assert storage.exists(f"{s3_bucket}/completed/shard-00000.json")
    assert not storage.exists(f"{s3_bucket}/completed/shard-00001.json")
    faulty_s3.plan()
    encode(replace(config, output=s3_bucket))
    assert remote_hashes(s3_bucket) == expected


def upload_images(config: EncodeConfig, url: str) -> EncodeConfig:
    for path in image_files(config):
        storage.upload(path, f"{url}/images/{path.name}")
    return replace(config, images=f"{url}/images")


def test_images_come_from_a_store(
    config: EncodeConfig, expected: dict[str, str], s3_bucket: str, faulty_s3: FaultyProxy
) -> None:
    remote = upload_images(config, s3_bucket)
    faulty_s3.plan(Fault("reset", method="GET", key="*.jpg", times=3))
    encode(remote)
    assert len(faulty_s3.hits) == 3
    assert without_markers(hashes(config)) == without_markers(expected)


def test_a_failing_store_does_not_count_as_broken_images(
    config: EncodeConfig, s3_bucket: str, faulty_s3: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = upload_images(config, s3_bucket)
    monkeypatch.setenv("IFVIT_STORE_PATIENCE", "0.5")
    faulty_s3.plan(Fault("status", method="GET", key="*.jpg", first=7, times=None))
    with pytest.raises(StoreError, match=r"\.jpg"):
        encode(replace(remote, tolerate=10))
    assert not Path(config.output, "completed", "shard-00002.json").exists()


def test_tars_come_from_a_store_each_as_a_whole(
    config: EncodeConfig, s3_bucket: str, faulty_s3: FaultyProxy
) -> None:
    folder = Path(config.images).parent
    for number, path in enumerate(image_files(config)[:4]):
        path.with_suffix(".txt").write_text(f"photo {number}")
        with tarfile.open(folder / f"0000{number // 2}.tar", "a") as tar:
            for part in (path, path.with_suffix(".txt")):
                tar.add(part, part.name)
    (folder / "00000_stats.json").write_text('{"successes": 2}')
    for name in ("00000.tar", "00001.tar", "00000_stats.json"):
        storage.upload(folder / name, f"{s3_bucket}/tars/{name}")
    recipe = replace(config, source="webdataset", captions=None, images=str(folder))
    encode(recipe)
    faulty_s3.requests.clear()
    faulty_s3.plan(Fault("truncate", method="GET", key="*/00001.tar"))
    remote = replace(recipe, images=f"{s3_bucket}/tars/{{00000..00001}}.tar", output=f"{folder}/r")
    assert finish(remote).num_samples == 4
    assert len(faulty_s3.hits) == 1
    assert sum(request.endswith("/00000.tar") for request in faulty_s3.requests) <= 5
    assert without_markers(hashes(remote)) == without_markers(hashes(recipe))
