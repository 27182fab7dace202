"""A rerun of the encode job: it makes only what is missing, with the same bytes."""

import multiprocessing
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from encoded_files import finish, hashes, image_files, truncate, undisturbed_hashes

from data_pipeline.config import EncodeConfig
from data_pipeline.encode import encode
from ifvit.errors import UserError
from ifvit.models.config import TextOptions


def test_a_rerun_encodes_nothing_and_changes_no_byte(
    config: EncodeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, tolerate=1)
    truncate(image_files(config)[5])
    encode(config)
    before = hashes(config)
    monkeypatch.setattr("data_pipeline.shard_io.write_shard", None)
    encode(config)
    assert hashes(config) == before


def test_the_marker_of_the_only_shard_may_be_deleted(config: EncodeConfig) -> None:
    config = replace(config, samples_per_shard=100)
    encode(config)
    before = undisturbed_hashes(config)
    Path(config.output, "completed/shard-00000.json").unlink()
    encode(config)
    assert hashes(config) == before


def test_a_manifest_without_completion_markers_is_not_replaced(config: EncodeConfig) -> None:
    manifest = Path(config.output, "manifest.json")
    manifest.parent.mkdir(parents=True)
    manifest.write_text('{"name": "another program"}')
    with pytest.raises(UserError, match=r"holds a manifest.json that no encode job wrote there"):
        encode(config)
    assert manifest.read_text() == '{"name": "another program"}'


@pytest.mark.parametrize(
    "lost",
    [
        "shard-00001.tar",
        "shard-00001.index.npz",
        "completed/shard-00000.json",
        "manifest.json",
        "null_context.npy",
    ],
)
def test_a_lost_file_is_made_again_with_the_same_bytes(config: EncodeConfig, lost: str) -> None:
    encode(replace(config, num_workers=5))
    before = undisturbed_hashes(config)
    Path(config.output, lost).unlink()
    encode(config)
    assert hashes(config) == before


def test_a_rerun_may_use_another_batch_size(config: EncodeConfig) -> None:
    encode(config)
    before = hashes(config)
    Path(config.output, "shard-00001.tar").unlink()
    finish(replace(config, batch_size=1))
    after = hashes(config)
    assert set(after) == set(before)
    changed = [name for name in before if after[name] != before[name]]
    assert all("shard-00001" in name or name == "manifest.json" for name in changed)


def test_cut_shards_damaged_markers_and_leftovers_are_replaced(config: EncodeConfig) -> None:
    encode(config)
    before, output = hashes(config), Path(config.output)
    tar = output / "shard-00001.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    marker = output / "completed" / "shard-00002.json"
    marker.write_text(marker.read_text().replace("e", "f", 1))
    for name in ("shard-00001.tar", "shard-00001.index.npz", "manifest.json", "null_context.npy"):
        (output / f".{name}.0a1b2c3d").write_bytes(b"half")
    (output / "completed" / ".shard-00001.json.0a1b2c3d").write_bytes(b"half")
    encode(config)
    assert hashes(config) == before


def test_hidden_files_of_the_user_are_kept(config: EncodeConfig) -> None:
    output = Path(config.output)
    output.mkdir()
    names = (".manifest.json.backup", ".shard-00000.tar.notes", ".shard-00000")
    for name in names:
        (output / name).write_text("mine")
    encode(config)
    assert all((output / name).read_text() == "mine" for name in names)


def test_unfinished_files_of_another_process_are_kept(config: EncodeConfig) -> None:
    config = replace(config, num_tasks=2)
    encode(replace(config, task=0))
    manifest = Path(config.output, ".manifest.json.0a1b2c3d")
    manifest.write_bytes(b"half")
    finish(replace(config, task=1))
    assert manifest.exists()


def test_jobs_killed_at_random_moments_end_with_the_undisturbed_dataset(
    config: EncodeConfig, num_kills: int
) -> None:
    config = replace(config, samples_per_shard=1, batch_size=1)
    expected = undisturbed_hashes(config)
    context = multiprocessing.get_context("fork")  # spawned processes take seconds to import torch
    chance = random.Random(0)
    killed_between_shards = 0

    def find_markers() -> list[Path]:
        return sorted(Path(config.output).glob("completed/*.json"))

    for _ in range(num_kills):
        process = context.Process(target=encode, args=(config,))
        process.start()
        num_markers = chance.randrange(10)
        while process.is_alive() and len(find_markers()) < num_markers:
            time.sleep(0.002)
        process.join(chance.uniform(0.0, 0.1))
        process.kill()
        process.join()
        markers = find_markers()
        killed_between_shards += 0 < len(markers) < 10
        for marker in chance.sample(markers, len(markers) // 2):
            marker.unlink()
    assert killed_between_shards
    encode(config)
    assert hashes(config) == expected


def test_marker_and_manifest_are_deleted_before_a_shard_is_replaced(
    config: EncodeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode(config)
    Path(config.output, "shard-00001.tar").unlink()

    def stop(*_: Any) -> None:
        assert not Path(config.output, "manifest.json").exists()
        assert not Path(config.output, "completed", "shard-00001.json").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr("data_pipeline.shard_io.write_shard", stop)
    with pytest.raises(KeyboardInterrupt):
        encode(config)


def test_an_output_of_another_job_is_an_error_that_names_the_difference(
    config: EncodeConfig, other_encoders: EncodeConfig
) -> None:
    encode(config)
    others = {
        "vae_sha256 is .*": {"vae": other_encoders.vae},
        "text_encoder_sha256 is .*": {"text_encoder": other_encoders.text_encoder},
        "dtype is float16 there, float32 now": {"dtype": "float32"},
        "precision is fp32 there, bf16 now; text.precision is .*": {"precision": "bf16"},
        "text.state is last there, penultimate now": {"text": TextOptions(state="penultimate")},
        "text.template is {} there, a {} now": {"text": TextOptions(template="a {}")},
        "image_size is 32 there, 40 now": {"image_size": 40},
        "samples_per_shard is 4 there, 5 now": {"samples_per_shard": 5},
        "flip is False there, True now": {"flip": True},
    }
    for what, fields in others.items():
        with pytest.raises(UserError, match=rf"\({what}\); choose another output folder"):
            encode(replace(config, **fields))
    annotations = Path(config.captions)
    annotations.write_text(
        annotations.read_text().replace("COCO_train2014_000000000003", "renamed")
    )
    with pytest.raises(UserError, match="source_sha256"):
        encode(config)
