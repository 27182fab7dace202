"""Which settings of sampling are stored with images and numbers, and how older records are read."""

import json
from dataclasses import asdict

import pytest

from ifvit.sampling.config import (
    DateConfig,
    GenerateConfig,
    RegulationConfig,
    SamplingConfig,
    flatten_settings,
    nest_settings,
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


def test_records_are_read_as_they_are_and_as_they_were() -> None:
    config = SamplingConfig(num_steps=7)
    record = {"trim": 1, "sampling": config.settings}
    idle = json.loads(json.dumps(asdict(config)))
    del idle["batch_size"]
    flat = {name: value for name, value in config.settings.items() if name != "method"}
    for stored in (record, {"trim": 1, "sampling": idle}, {"trim": 1} | flat):
        assert nest_settings(stored) == record
    assert nest_settings(flatten_settings(record)) == record
