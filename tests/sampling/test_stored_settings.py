"""Which settings of sampling are stored with images and numbers, and how older records are read."""

import json

import pytest

from ifvit.sampling.config import (
    DateConfig,
    GenerateConfig,
    RegulationConfig,
    SamplingConfig,
)


@pytest.mark.parametrize(
    ("method", "acting"),
    [
        ("plain", set()),
        ("date", {"date"}),
        ("regulate", {"regulation"}),
        ("both", {"date", "regulation"}),
    ],
)
def test_settings_are_those_that_act(method: str, acting: set[str]) -> None:
    date, regulation = DateConfig(evaluations=(0, 4)), RegulationConfig(blocks=(1,))
    config = SamplingConfig(seed=3, batch_size=7, method=method, date=date, regulation=regulation)
    assert config.settings.keys() & {"date", "regulation"} == acting
    assert config.settings["seed"] == 3
    assert "batch_size" not in config.settings
    assert json.loads(json.dumps(config.settings)) == config.settings
    assert GenerateConfig(**vars(config), weights="run", prompt="x").settings == config.settings
