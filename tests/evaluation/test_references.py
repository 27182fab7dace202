"""Real images give the same numbers from their folder, from a file, and to several processes."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from held_out_scenes import NUM_IMAGES, HeldOut
from made_inception import NUM_FEATURES, save_inception

from ifvit.cli import main
from ifvit.config import dump_config
from ifvit.errors import UserError
from ifvit.evaluation.config import EvaluateConfig, MakeReferenceConfig
from ifvit.evaluation.evaluate import evaluate
from ifvit.evaluation.references import make_reference, read_real_image
from ifvit.evaluation.rows import MetricsRow, estimates_of, read_row


@pytest.fixture
def config(config: EvaluateConfig, tmp_path: Path) -> EvaluateConfig:
    protocol = dataclasses.replace(
        config.protocol, num_samples=18, inception=save_inception(tmp_path), scenes=False
    )
    return dataclasses.replace(config, protocol=protocol)


@pytest.fixture
def reference(config: EvaluateConfig, held_out: HeldOut, tmp_path: Path) -> str:
    file = str(tmp_path / "reference.npz")
    make_reference(
        MakeReferenceConfig(
            output=file,
            images=held_out.images,
            image_size=64,
            protocol=config.protocol,
            device="cpu",
        )
    )
    return file


def assert_equal(first: MetricsRow, second: MetricsRow, rel: float) -> None:
    assert first.protocol == second.protocol
    ours, others = estimates_of(first), estimates_of(second)
    assert set(ours) == set(others) >= {"fid", "kid", "cmmd", "frechet_distance", "clip_score"}
    for name, estimate in ours.items():
        expected = dataclasses.astuple(others[name])
        assert dataclasses.astuple(estimate) == pytest.approx(expected, rel=rel, abs=1e-6), name


def test_a_reference_file_gives_the_numbers_of_its_folder(
    config: EvaluateConfig, reference: str, run: str
) -> None:
    (from_images,) = evaluate(config)
    by_file = dataclasses.replace(config, images=None, reference=reference)
    assert evaluate(by_file) == [from_images], "the row is there: the protocols are the same"
    Path(run, "evaluation/test/w2/step_00000007.json").unlink()
    (from_file,) = evaluate(by_file)
    assert_equal(from_file, from_images, rel=1e-6)
    assert from_file.protocol.num_reference_images == NUM_IMAGES

    stored = np.load(reference, allow_pickle=False)
    assert stored["inception.covariance"].shape == (NUM_FEATURES, NUM_FEATURES)
    assert stored["clip.part"].shape == (NUM_IMAGES, 64)
    assert str(stored["images_sha256"]) == from_file.protocol.reference_sha256


@pytest.mark.distributed
def test_two_processes_measure_what_one_measures(config: EvaluateConfig, run: str) -> None:
    recipe = Path(run, "evaluate.yaml")
    recipe.write_text(dump_config(config))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    verb = ["--standalone", "-m", "ifvit", "evaluate", "--config", str(recipe)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, *verb], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step_00000007.json") == 1
    together = read_row(f"{run}/evaluation/test/w2/step_00000007.json")
    alone_config = dataclasses.replace(config, output=str(Path(run, "alone")))
    (alone,) = evaluate(alone_config)
    assert_equal(together, alone, rel=1e-3)


def test_a_file_that_is_not_a_reference_is_one_line(
    config: EvaluateConfig, reference: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(message: str, **changes: object) -> None:
        changed = dataclasses.replace(config, **{"images": None, "reference": reference} | changes)
        with pytest.raises(UserError, match=message) as caught:
            evaluate(changed)
        assert "\n" not in str(caught.value)

    (tmp_path / "text.npz").write_text("no arrays")
    np.savez(tmp_path / "other.npz", mu=np.zeros(3))
    damaged = bytearray(Path(reference).read_bytes())
    refuse("no such file", reference=str(tmp_path / "gone.npz"))
    refuse(r"text\.npz: .*not a reference", reference=str(tmp_path / "text.npz"))
    refuse(r"other\.npz: .*not a reference", reference=str(tmp_path / "other.npz"))
    (tmp_path / "new").mkdir()
    other = dataclasses.replace(config.protocol, inception=save_inception(tmp_path / "new", 1))
    refuse("no features by inception", protocol=other)
    place = damaged.index(b"clip.mean.npy") + 200
    damaged[place] ^= 0xFF
    Path(reference).write_bytes(damaged)
    refuse(r"reference\.npz: damaged")
    assert not Path(config.weights, "evaluation").exists(), "refused before any image is made"
    words = ["evaluate", "--weights", "w", "--shards", "s", "--images", "i", "--reference", "r"]
    with pytest.raises(SystemExit):
        main(words)
    assert "give images or reference, not both" in capsys.readouterr().err


def test_a_broken_real_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff not an image")
    with pytest.raises(UserError, match=r"broken\.jpg"):
        read_real_image(tmp_path / "broken.jpg", 64)
