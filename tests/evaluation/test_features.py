"""Networks are loaded and called as their files require; features are collected in order."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from made_inception import NUM_FEATURES, inception_tensors, save_inception, save_script
from made_statistics import frechet_distance, statistics
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance

from ifvit.distributed import ProcessGroup, World
from ifvit.errors import UserError
from ifvit.evaluation import features
from ifvit.evaluation.features import (
    ORIGINAL,
    FeatureNetwork,
    FeatureSet,
    Inception,
    Networks,
    collect_features,
    load_inception,
)
from ifvit.evaluation.metrics import estimate_frechet
from ifvit.images import Pixels, to_model_range
from ifvit.shards.format import EncoderIdentity
from ifvit.storage import sha256_of


@pytest.fixture
def path(tmp_path: Path) -> str:
    return save_inception(tmp_path)


def sample_images(count: int, brightest: int) -> np.ndarray:
    rng = np.random.default_rng(brightest)
    return rng.integers(0, brightest, (count, 20, 20, 3), dtype=np.uint8)


def test_a_network_is_identified_by_its_hash_and_gives_features(path: str) -> None:
    found = load_inception(path)
    assert found.identity.sha256 == sha256_of(Path(path))
    assert found.embed(to_model_range(sample_images(3, 255))).shape == (3, NUM_FEATURES)


def test_images_are_resized_as_pytorch_fid_does_it(path: str) -> None:
    pixels = sample_images(1, 255)
    # Bilinear without antialiasing is what PIL does when it enlarges; its mode F does not round.
    channels = [Image.fromarray(pixels[0, :, :, c].astype(np.float32)) for c in range(3)]
    size, bilinear = (299, 299), Image.Resampling.BILINEAR
    enlarged = np.stack([np.asarray(channel.resize(size, bilinear)) for channel in channels])
    expected = Inception(inception_tensors())(torch.from_numpy(enlarged)[None])
    found = load_inception(path).embed(to_model_range(pixels))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)


def test_fid_is_that_of_torchmetrics_with_the_same_network(path: str) -> None:
    network = load_inception(path)
    sampled, real = sample_images(30, 255), sample_images(25, 200)

    class Features(torch.nn.Module):
        num_features = NUM_FEATURES

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return network.embed(images / 127.5 - 1).double()

    metric = FrechetInceptionDistance(feature=Features(), normalize=False)
    for pixels, is_real in ((real, True), (sampled, False)):
        metric.update(torch.from_numpy(pixels).permute(0, 3, 1, 2), real=is_real)
    both = [network.embed(to_model_range(pixels)).numpy() for pixels in (sampled, real)]
    found = frechet_distance(*map(statistics, both))
    assert found == pytest.approx(float(metric.compute()), rel=1e-4, abs=1e-4)


def test_the_original_network_is_downloaded_once_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_script(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(features, "_URL", Path(path).as_uri())
    with pytest.raises(UserError, match=r"cannot be downloaded \(invalid hash value"):
        load_inception(ORIGINAL)
    monkeypatch.setattr(features, "_SHA256", sha256_of(Path(path)))
    found = load_inception(ORIGINAL)
    Path(path).unlink()
    assert load_inception(ORIGINAL).identity == found.identity
    assert found.identity.name == "inception-2015-12-05"


def test_torchscript_is_loaded_only_if_it_is_the_published_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: object, **kwargs: object) -> None:
        raise AssertionError("the code of a stranger ran")

    script = Path(save_script(tmp_path))
    renamed = tmp_path / "script.safetensors"
    renamed.write_bytes(script.read_bytes())
    monkeypatch.setattr(torch.jit, "load", load)
    with pytest.raises(UserError, match=r"inception\.pt: .* its sha256 is not f58cb9b6"):
        load_inception(str(script))
    with pytest.raises(UserError, match=r"script\.safetensors: not the tensors of Inception"):
        load_inception(str(renamed))


def test_the_network_is_that_of_torch_fidelity() -> None:
    tensors = inception_tensors()
    assert sum(name.endswith("conv.weight") for name in tensors) == 94
    side = torch.arange(299.0)
    channels = [side[:, None] % 256 + 0 * side, side % 97 * 2 + 0 * side[:, None]]
    image = torch.stack([*channels, (side[:, None] + side) % 256])
    found = Inception(tensors)(image[None])
    assert found.shape == (1, NUM_FEATURES)
    # FeatureExtractorInceptionV3 of torch-fidelity 0.4.0 with these tensors and this image.
    golden = torch.tensor([0.14405981, 0.00244566, 2.54810977, 0.0])
    torch.testing.assert_close(found[0, :4], golden, rtol=1e-4, atol=1e-5)
    assert float(found.mean()) == pytest.approx(0.47420281, rel=1e-4)
    assert float(found.std()) == pytest.approx(0.72266376, rel=1e-4)


def test_a_file_that_is_not_a_network_is_one_line(
    tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"nowhere\.pt: no such file"):
        load_inception("nowhere.pt")
    tensors = inception_tensors()
    name = "Mixed_6c.branch7x7_2.conv.weight"
    wrong = {
        name: {key: value for key, value in tensors.items() if key != name},
        "IndexError": tensors | {name: torch.zeros(3, 3)},
        "RuntimeError": tensors | {name: torch.zeros(4, 5, 1, 7)},
    }
    for words, content in wrong.items():
        save_file(content, path)
        with pytest.raises(UserError, match=f"not the tensors of Inception v3 .*{words}") as caught:
            load_inception(path)
        assert str(caught.value).isprintable()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    kept = tmp_path / "hub" / "checkpoints" / f"{ORIGINAL}.pt"
    kept.parent.mkdir(parents=True)
    Path(path).rename(kept)
    with pytest.raises(UserError, match="damaged or another network, its sha256 is not f58cb9b6"):
        load_inception(ORIGINAL)
    kept.unlink()
    monkeypatch.setattr(features, "_URL", (tmp_path / "gone.pt").as_uri())
    with pytest.raises(UserError, match=r"cannot be downloaded .* fetch"):
        load_inception(ORIGINAL)


IMAGES = np.random.default_rng(0).integers(0, 256, (7, 2, 2, 3), dtype=np.uint8)


def networks_of(name: str, embed: Callable[[Tensor], Tensor]) -> Networks:
    identity = EncoderIdentity(name=name, sha256="0" * 64)
    network = FeatureNetwork(embed=embed, identity=identity)
    return Networks(clip=None, features={name: network}, device="cpu")  # type: ignore[arg-type]


def flatten(images: Tensor) -> Tensor:
    return images.flatten(start_dim=1)


def collect(
    network: Callable[[Tensor], Tensor], images: Pixels, positions: list[int], part: list[int]
) -> FeatureSet:
    group = ProcessGroup(World(rank=0, size=1, local_rank=0))
    batches = np.split(images, [3])
    parts = {"eye": np.array(part)}
    return collect_features(networks_of("eye", network), batches, positions, parts, group)["eye"]


def test_statistics_cover_all_images_and_the_part_keeps_its_own_order() -> None:
    positions, part = [6, 0, 5, 1, 4, 2, 3], [4, 0, 6]
    found = collect(flatten, IMAGES[positions], positions, part)
    features = IMAGES.transpose(0, 3, 1, 2).reshape(7, -1) / 127.5 - 1
    np.testing.assert_allclose(found.part, features[part], atol=1e-6)
    np.testing.assert_allclose(found.statistics.mean, features.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(found.statistics.covariance, np.cov(features.T), atol=1e-6)
    assert found.statistics.num_samples == 7


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_features_that_are_not_finite_are_refused(value: float) -> None:
    def broken(images: Tensor) -> Tensor:
        return flatten(images).index_fill(1, torch.tensor([2]), value)

    with pytest.raises(UserError, match="eye: features are not finite"):
        collect(broken, IMAGES, list(range(7)), [0])


def test_30_000_samples_need_no_more_memory_than_their_features() -> None:
    count, width, batch = 30_000, 128, 500

    def network(images: Tensor) -> Tensor:
        return torch.randn(len(images), width)

    group = ProcessGroup(World(rank=0, size=1, local_rank=0))
    batches = (np.zeros((batch, 8, 8, 3), np.uint8) for _ in range(count // batch))
    tracemalloc.start()
    found = collect_features(
        networks_of("clip", network), batches, range(count), {"clip": np.arange(count)}, group
    )["clip"]
    distance = estimate_frechet(found.part, found.statistics, found.statistics)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.part.shape == (count, width)
    assert distance.num_samples == count
    # Twice the features, while they are put in order, and the draws of the bootstrap.
    assert peak < 2 * count * width * 4 + 40e6
