"""Real images give the same numbers from their folder, from a file, and to several processes."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from held_out_scenes import NUM_IMAGES, HeldOut
from made_inception import NUM_FEATURES, save_inception

from ifvit.cli import main
from ifvit.config import dump_config
from ifvit.distributed import ProcessGroup, World
from ifvit.errors import UserError
from ifvit.evaluation.config import EvaluateConfig, MakeReferenceConfig
from ifvit.evaluation.evaluate import evaluate
from ifvit.evaluation.features import FeatureNetwork, Networks
from ifvit.evaluation.references import (
    RealImages,
    list_images,
    make_reference,
    read_reference,
)
from ifvit.evaluation.rows import MetricsRow, estimates_of
from ifvit.image_rules import ImageRules
from ifvit.shards.format import EncoderIdentity
from ifvit.storage import read_sealed


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


def real_images(*paths: Path, rules: ImageRules | None = None) -> RealImages:
    return RealImages(paths=paths, image_size=64, rules=rules or ImageRules())


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
    together = read_sealed(MetricsRow, f"{run}/evaluation/test/w2/step_00000007.json")
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
    refuse(r"text\.npz: not an intact .npz file", reference=str(tmp_path / "text.npz"))
    refuse(
        r"other\.npz: damaged .*: num_images",
        reference=str(tmp_path / "other.npz"),
    )
    (tmp_path / "new").mkdir()
    other = dataclasses.replace(config.protocol, inception=save_inception(tmp_path / "new", 1))
    refuse("no features by inception", protocol=other)
    place = damaged.index(b"clip.mean.npy") + 200
    damaged[place] ^= 0xFF
    Path(reference).write_bytes(damaged)
    refuse(r"reference\.npz: not an intact")
    assert not Path(config.weights, "evaluation").exists(), "refused before any image is made"
    words = ["evaluate", "--weights", "w", "--shards", "s", "--images", "i", "--reference", "r"]
    with pytest.raises(SystemExit):
        main(words)
    assert "give images or reference, not both" in capsys.readouterr().err


def test_a_broken_real_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff not an image")
    with pytest.raises(UserError, match=r"broken\.jpg"):
        real_images().read(tmp_path / "broken.jpg")


STORED: dict[str, Any] = {
    "num_images": 3,
    "images_sha256": "a" * 64,
    "image_size": 64,
    "resize": "r",
    "image_rules": "background white, EXIF applied, ICC profiles applied",
    "eye.mean": np.zeros(2),
    "eye.covariance": np.eye(2),
    "eye.part": np.zeros((3, 2), np.float32),
    "eye.encoder": "eye",
    "eye.sha256": "b" * 64,
}
NETWORKS = Networks(
    clip=None,  # type: ignore[arg-type]
    features={
        "clip": FeatureNetwork(
            embed=torch.flatten, identity=EncoderIdentity(name="eye", sha256="b" * 64)
        )
    },
    device="cpu",
)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_images": -3}, "num_images is -3"),
        ({"num_images": 10**12}, "clip features"),
        ({"num_images": 1}, "clip features"),
        ({"num_images": 2.5}, "num_images"),
        ({"num_images": np.zeros(9)}, "num_images"),
        ({"images_sha256": "/etc/passwd"}, "images_sha256"),
        ({"image_size": "64"}, "image_size"),
        ({"image_rules": str(ImageRules(background="red"))}, "background red.* --image_rules"),
        ({"eye.mean": np.array([0, np.nan])}, "clip features"),
        ({"eye.mean": np.zeros(3)}, "clip features"),
        ({"eye.mean": np.zeros((2, 1))}, "clip features"),
        ({"eye.mean": np.array(["a", "b"])}, "clip features"),
        ({"eye.covariance": np.array([[1.0, 0.5], [0.0, 1.0]])}, "clip features"),
        ({"eye.covariance": np.full((2, 2), np.inf)}, "clip features"),
        ({"eye.covariance": -np.eye(2)}, "clip features"),
        ({"eye.part": np.zeros((2, 2))}, "clip features"),
        ({"eye.part": np.full((3, 2), np.nan)}, "clip features"),
        ({"eye.sha256": np.zeros(3)}, "no features by clip"),
    ],
)
def test_statistics_that_no_images_have_are_one_line(
    change: dict[str, Any], named: str, tmp_path: Path
) -> None:
    def write(stored: dict[str, Any]) -> str:
        path = tmp_path / "x.npz"
        np.savez(path, **{key.replace("eye.", "clip."): value for key, value in stored.items()})
        return str(path)

    assert read_reference(write(STORED), 64, ImageRules(), NETWORKS).num_images == 3
    with pytest.raises(UserError, match=rf"x\.npz: .*{named}") as raised:
        read_reference(write(STORED | change), 64, ImageRules(), NETWORKS)
    assert str(raised.value).isprintable()


def test_the_hash_of_real_images_covers_their_content_size_and_rules(tmp_path: Path) -> None:
    path, group = tmp_path / "a.png", ProcessGroup(World(rank=0, size=1, local_rank=0))
    path.write_bytes(b"any")
    red, tan = (real_images(path, rules=ImageRules(background=name)) for name in ("red", "tan"))
    digests = {images.hash(group) for images in (red, tan, dataclasses.replace(red, image_size=32))}
    path.write_bytes(b"other")
    assert len(digests | {red.hash(group)}) == 4


def test_a_huge_file_is_refused_before_it_is_hashed(tmp_path: Path) -> None:
    huge = tmp_path / "huge.jpg"
    huge.touch()
    os.truncate(huge, 1 << 40)
    with pytest.raises(UserError, match=r"huge\.jpg: larger than"):
        real_images(huge).hash(ProcessGroup(World(rank=0, size=1, local_rank=0)))


def test_only_real_images_count_as_reference_images(tmp_path: Path) -> None:
    for name in (
        *("a.png", "two_cats/b.JPG", "real_life.png", "grid.png"),
        *(".hidden.png", ".trash/c.png", "deep/.trash/d.png", "__MACOSX/f.png", "e.txt"),
        *("samples/00000.png", "samples/grid.png", "samples/real_00000.png"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "samples/samples.jsonl").write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    names = [path.relative_to(tmp_path).as_posix() for path in list_images(str(tmp_path))]
    expected = ["a.png", "grid.png", "link.png", "real_life.png"]
    assert names == [*expected, "samples/00000.png", "two_cats/b.JPG"]
    (tmp_path / "out.png").symlink_to("/etc/hostname")
    with pytest.raises(UserError, match=r"out\.png' does not lead inside"):
        list_images(str(tmp_path))
    (tmp_path / "out.png").unlink()
    (tmp_path / "cats").symlink_to("two_cats")
    with pytest.raises(UserError, match=r"cats: a link to a folder; put the folder itself there"):
        list_images(str(tmp_path))


@pytest.mark.parametrize("image_id", ["", ".", "..", "/", "a/..", "x" * 10_000, -1, 10**18])
def test_a_strange_image_id_has_no_image(image_id: int | str) -> None:
    images = real_images(Path("images/a.png"), Path("images/000000000042.jpg"))
    assert images.find(image_id) is None
    assert images.find("a.png") == images.paths[0]
    assert images.find(42) == images.paths[1]
