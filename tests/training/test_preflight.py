"""What would end a run hours later ends it before the first step."""

from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest

from ifvit.errors import UserError
from ifvit.training import guards as preflight
from ifvit.training.config import TrainConfig
from ifvit.training.guards import MAY_CHANGE, claim_space
from ifvit.training.train import train


def test_a_disk_too_full_for_the_next_checkpoint_is_refused(
    recipe: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", ["free"])
    config = recipe(ema_decays=(0.9, 0.99), max_steps=1)
    train(config)
    files = list(Path(config.run).rglob("*.safetensors"))
    written = sum(path.stat().st_size for path in files)
    assert len(files) == 1 + 3
    free = iter([written, int(0.9 * written)])
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage(free=next(free)))
    claim_space(config)
    with pytest.raises(UserError, match=r"0\.0 GB free, the next checkpoint takes 0\.0 GB; make"):
        claim_space(config)


def test_what_makes_another_run_of_it_may_not_change() -> None:
    fixed = {
        *("backbone", "optim", "seed", "global_batch_size", "caption_dropout", "random_flip"),
        *("ema_decays", "shuffle_window", "min_snr_gamma", "scaling_factor"),
    }
    assert fixed <= TrainConfig.__dataclass_fields__.keys() - MAY_CHANGE


def test_a_run_directory_that_cannot_be_written_is_refused(
    recipe: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/run: cannot be written .* choose another"):
        claim_space(recipe("file/run"))
