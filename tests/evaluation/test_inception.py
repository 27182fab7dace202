"""Inception is opened, called and resized for as its file wants it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from made_inception import NUM_FEATURES, Network, save_inception
from PIL import Image
from torchmetrics.image.fid import FrechetInceptionDistance

from ifvit.errors import UserError
from ifvit.evaluation import features as inception
from ifvit.evaluation.features import load_inception
from ifvit.evaluation.metrics import frechet_distance, statistics
from ifvit.images import to_model_range
from ifvit.storage import sha256_of


@pytest.fixture
def path(tmp_path: Path) -> str:
    return save_inception(tmp_path)


def draw_images(count: int, brightest: int) -> np.ndarray:
    rng = np.random.default_rng(brightest)
    return rng.integers(0, brightest, (count, 20, 20, 3), dtype=np.uint8)


def test_a_file_is_identified_by_its_hash_and_gives_features(path: str) -> None:
    found = load_inception(path)
    assert found.identity.sha256 == sha256_of(Path(path))
    assert found(to_model_range(draw_images(3, 255))).shape == (3, NUM_FEATURES)


def test_images_are_resized_as_pytorch_fid_does_it(path: str) -> None:
    pixels = draw_images(1, 255)
    # Bilinear without antialiasing is what PIL does when it enlarges, up to its rounding.
    enlarged = np.asarray(Image.fromarray(pixels[0]).resize((299, 299), Image.Resampling.BILINEAR))
    expected = Network()(torch.from_numpy(enlarged.astype(np.float32)).permute(2, 0, 1)[None], True)
    found = load_inception(path)(to_model_range(pixels))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)


def test_fid_is_that_of_torchmetrics_with_the_same_network(path: str) -> None:
    network = load_inception(path)
    drawn, real = draw_images(30, 255), draw_images(25, 200)

    class Features(torch.nn.Module):
        num_features = NUM_FEATURES

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return network(images / 127.5 - 1).double()

    metric = FrechetInceptionDistance(feature=Features(), normalize=False)
    for pixels, is_real in ((real, True), (drawn, False)):
        metric.update(torch.from_numpy(pixels).permute(0, 3, 1, 2), real=is_real)
    features = [network(to_model_range(pixels)).numpy() for pixels in (drawn, real)]
    found = frechet_distance(*map(statistics, features))
    assert found == pytest.approx(float(metric.compute()), rel=1e-4, abs=1e-4)


def test_the_original_is_downloaded_once_and_checked(
    tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(inception, "_URL", Path(path).as_uri())
    with pytest.raises(UserError, match=r"cannot be downloaded \(invalid hash value"):
        load_inception(inception.ORIGINAL)
    monkeypatch.setattr(inception, "_SHA256", sha256_of(Path(path)))
    found = load_inception(inception.ORIGINAL)
    Path(path).unlink()
    assert load_inception(inception.ORIGINAL).identity == found.identity
    assert found.identity.name == "inception-2015-12-05"


def test_what_is_no_network_is_one_line(
    tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"nowhere\.pt: no such file"):
        load_inception("nowhere.pt")
    (tmp_path / "text.pt").write_text("no network")
    with pytest.raises(UserError, match=r"text\.pt: not a TorchScript file") as caught:
        load_inception(str(tmp_path / "text.pt"))
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    kept = tmp_path / "hub" / "checkpoints" / f"{inception.ORIGINAL}.pt"
    kept.parent.mkdir(parents=True)
    Path(path).rename(kept)
    with pytest.raises(UserError, match="damaged, its sha256 is not f58cb9b6"):
        load_inception(inception.ORIGINAL)
    kept.unlink()
    monkeypatch.setattr(inception, "_URL", (tmp_path / "gone.pt").as_uri())
    with pytest.raises(UserError, match=r"cannot be downloaded .* fetch"):
        load_inception(inception.ORIGINAL)
