"""How far a run or a dataset is, read from its folder."""

import json
from datetime import timedelta
from typing import cast

import yaml

from ifvit import storage


def describe_progress(verb: str, run: str) -> str:
    """One short line for people; empty for verbs that leave no trace on the way."""
    if verb == "train":
        return _describe_training(run)
    if verb == "encode":
        done = len(storage.list_names(storage.join(run, "receipts")))
        return f"{done} shards"
    return ""


def _describe_training(run: str) -> str:
    row = _last_row(run)
    if row is None:
        return "no step yet"
    recipe = yaml.safe_load(storage.read_bytes(storage.join(run, "config.yaml")))
    step, total = int(row["step"]), int(recipe["max_steps"])
    seconds = (total - step) * recipe["global_batch_size"] / row["samples_per_s"]
    latest = storage.join(run, "checkpoints", "latest")
    checkpoint = storage.read_bytes(latest).decode().strip() if storage.exists(latest) else "none"
    return (
        f"step {step}/{total}, {row['samples_per_s']:.1f} samples/s, "
        f"{timedelta(seconds=round(seconds))} left, checkpoint {checkpoint}"
    )


def _last_row(run: str) -> dict[str, float] | None:
    """The newest row of metrics.jsonl; None before the first."""
    url = storage.join(run, "metrics.jsonl")
    lines = storage.read_bytes(url).decode().splitlines() if storage.exists(url) else []
    whole = [line for line in lines[-2:] if line.endswith("}")]  # the last may be half written
    return cast(dict[str, float], json.loads(whole[-1])) if whole else None
