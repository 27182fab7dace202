"""The script for machines with a GPU gives only verbs and flags that exist."""

import json
import os
import subprocess
import sys
from pathlib import Path

from ifvit.config import read_config
from ifvit.verbs import VERBS, load

ROOT = Path(__file__).parents[2]
STUB = """#!/bin/sh
if [ "$1" = - ]; then exec {python} "$@"; fi
if [ "$1" = -m ]; then printf '%s\\n' "$@" '' >>{calls}; fi
"""
"""Stands for Python on a machine with a GPU: records every command, and runs only the summary."""


def test_every_command_is_accepted_by_its_verb(tmp_path: Path) -> None:
    stub, calls, out = (tmp_path / name for name in ("python", "calls", "out"))
    stub.write_text(STUB.format(python=sys.executable, calls=calls))
    stub.chmod(0o755)
    ended = subprocess.run(
        ["bash", ROOT / "tools" / "gpu_check.sh", out],
        env=os.environ | {"PYTHON": str(stub), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1, ended.stderr  # the stub measured nothing
    verbs = set()
    for call in calls.read_text().strip().split("\n\n"):
        module, *words = call.split("\n")[1:]
        if module == "ifvit":
            name = next(name for name in (" ".join(words[:2]), words[0]) if name in VERBS)
            check_flags(name, words[len(name.split()) :])
            verbs.add(name)
    assert verbs >= {"encode", "train", "generate", "evaluate", "bench train", "bench checkpoint"}
    report = json.loads((out / "gpu_check.json").read_text())
    assert {step["result"] for step in report["steps"]} == {"passed"}
    assert {target["met"] for target in report["targets"]} == {False}
    assert (out / "gpu_check.md").read_text().count("\n| ") == 1 + len(report["targets"])


def check_flags(name: str, words: list[str]) -> None:
    """Read the configuration; a shipped recipe stands for that of a run, which does not exist."""
    recipe = str(ROOT / "configs" / "train" / "scenes.yaml")
    words = [recipe if word.endswith("runs/plain/config.yaml") else word for word in words]
    verb = VERBS[name]
    read_config(load(verb.config), words, prog=f"ifvit {name}", positional=verb.positional)
