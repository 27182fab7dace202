"""Every format: 300 random mutations each give an equal result or one clear line.

A file is replaced (by nothing, a folder, a pipe, a device, a link, deep nesting, another encoding),
its bytes are changed, or values of its JSON are replaced by odd ones. The verdict on one reading:

- equal: the result of the intact file;
- refused: a UserError of one printable line;
- other: another result, which is legal where the file is the user's own (a table, captions, a
  recipe, a tar, prompts, an image, a pipeline that diffusers writes), where an attacker made seals
  and hashes fit (every second mutation), and where only whole rows are missing or repeated;
- BAD: any other exception, another result of a sealed file, more than 20 s or 500 MB, control
  characters on the terminal, a process or a connection, and reading or writing outside the folder.
"""

import sys
from pathlib import Path

import pytest
import torch
from fuzzed_data import DATA
from fuzzed_runs import RUNS
from fuzzed_studies import STUDIES
from mutations import Maker, fuzz

NUM_MUTATIONS = 300
MAKERS: tuple[Maker, ...] = (*DATA, *RUNS, *STUDIES)


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__.removeprefix("make_"))
def test_a_damaged_file_gives_an_equal_result_or_one_clear_line(
    make: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)
    problems = []
    for format in make(tmp_path / "made"):
        sandbox = tmp_path / format.name.replace("/", "_")
        tally = fuzz(format, sandbox, NUM_MUTATIONS)
        problems += tally.problems
        with capsys.disabled():
            sys.stdout.write(f"\n{format.name:40} {tally}")
    assert not problems, "\n".join(problems[:20])
