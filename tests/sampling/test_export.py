"""What `ifvit export` writes besides the weights, in which order, and where to."""

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import HFValidationError
from untrained import save_untrained

from ifvit import storage
from ifvit.errors import UserError
from ifvit.models import pretrained
from ifvit.models.weights import load_weights
from ifvit.sampling.config import ExportConfig
from ifvit.sampling.export import export
from ifvit.sampling.load import weights_sha256


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step with its recipe; the data are gone."""
    run = tmp_path_factory.mktemp("run")
    save_untrained(run / "weights/step_00000003/ema")
    (run / "config.yaml").write_text("run: here\nshards: gone/shards\nseed: 17\n")
    return run


def write_metrics(run: Path, weights: str) -> None:
    estimate = {"value": 0.25, "standard_error": 0.0125, "num_samples": 64}
    row = {
        "weights_sha256": weights,
        "protocol": {"sampling": {"num_steps": 50}},
        "clip_score": estimate,
    }
    storage.write_json(str(run / "evaluation/scenes/w2/step_00000003.json"), row)


def read_card(run: Path, folder: Path) -> str:
    export(ExportConfig(weights=str(run), output=str(folder)))
    return (folder / "README.md").read_text()


def test_the_card_tells_recipe_weights_and_what_is_not_known(run: Path, tmp_path: Path) -> None:
    write_metrics(run, "of other weights")
    card = read_card(run, tmp_path)
    assert "| weights | raw |" in card
    assert "seed: 17" in card
    assert "gone/shards/manifest.json: no such file" in card
    assert "have not been evaluated" in card


def test_the_card_shows_metrics_of_these_very_weights(run: Path, tmp_path: Path) -> None:
    digest = weights_sha256(load_weights(str(run))[0])
    write_metrics(run, digest)
    card = read_card(run, tmp_path)
    assert "| clip_score | 0.2500 ± 0.0125 |" in card
    assert "| num_steps | 50 |" in card
    assert digest in card


def test_the_vae_carries_the_scaling_factor_of_the_training(run: Path, tmp_path: Path) -> None:
    export(ExportConfig(weights=str(run), output=str(tmp_path)))
    assert json.loads((tmp_path / "vae/config.json").read_text())["scaling_factor"] == 0.5


def test_the_index_is_written_last(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    monkeypatch.setattr(storage, "upload", lambda path, url: written.append(url))
    export(ExportConfig(weights=str(run), output="s3://bucket/pipeline"))
    assert written[-1] == "s3://bucket/pipeline/model_index.json"
    assert "s3://bucket/pipeline/backbone/config.json" in written


def test_the_hub_gets_the_whole_folder(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploaded: dict[str, list[str]] = {}

    class Hub:
        def create_repo(self, repo_id: str, *, exist_ok: bool) -> None:
            uploaded[repo_id] = []

        def upload_folder(self, *, repo_id: str, folder_path: Path) -> None:
            uploaded[repo_id] = sorted(path.name for path in folder_path.iterdir())

    monkeypatch.setattr(pretrained, "HfApi", Hub)
    export(ExportConfig(weights=str(run), output=str(tmp_path), hub="team/model"))
    assert uploaded == {"team/model": sorted(path.name for path in tmp_path.iterdir())}


def test_a_hub_that_refuses_is_a_user_error(tmp_path: Path, monkeypatch: Any) -> None:
    class Hub:
        def create_repo(self, repo_id: str, *, exist_ok: bool) -> None:
            raise HFValidationError("no such name\nand more")

    monkeypatch.setattr(pretrained, "HfApi", Hub)
    with pytest.raises(UserError, match=r"team/model: the upload .* failed \(no such name\)"):
        pretrained.upload_pretrained(tmp_path, "team/model")
