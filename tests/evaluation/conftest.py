"""Held-out scenes in real shards, and a run folder with an untrained backbone."""

from pathlib import Path

import pytest
from encoded_scenes import encode_scenes
from held_out_scenes import NUM_IMAGES, HeldOut, save_run

from ifvit.evaluation.config import EvaluateConfig, ProtocolConfig
from ifvit.sampling.config import SamplingConfig
from ifvit.shards.format import read_manifest


@pytest.fixture(scope="session")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> HeldOut:
    folder = tmp_path_factory.mktemp("scenes")
    shards = encode_scenes(folder, "val2014", NUM_IMAGES, seed=3)
    return HeldOut(shards=shards, manifest=read_manifest(shards), images=str(folder / "val2014"))


@pytest.fixture
def run(held_out: HeldOut, tmp_path: Path) -> str:
    return save_run(tmp_path / "run", held_out.manifest)


@pytest.fixture
def config(held_out: HeldOut, run: str) -> EvaluateConfig:
    return EvaluateConfig(
        weights=run,
        shards=held_out.shards,
        images=held_out.images,
        protocol=ProtocolConfig(
            name="test",
            num_samples=20,
            sampling=SamplingConfig(num_steps=2, batch_size=8),
            clip="scenes/clip",
            paper_prefix="",
            scenes=True,
        ),
        device="cpu",
    )
