"""A source that somebody else wrote, named in the recipe as `module:Class`."""

from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.config import EncodeConfig
from data_pipeline.encode import encode
from ifvit.errors import UserError
from ifvit.shards import ShardReader

MODULE = '''
from pathlib import Path
from data_pipeline.sources.base import ListedSource
from data_pipeline.sources.base import CaptionedImage

class Reversed(ListedSource):
    """The images of one folder, the last one first, captioned by their names."""

    classes = ()

    def __init__(self, images, captions):
        paths = sorted(Path(images).iterdir(), reverse=True)
        super().__init__([
            CaptionedImage(
                key=path.stem, image_id=path.stem, name=path.name,
                read=path.read_bytes, captions=(path.stem,),
            )
            for path in paths
        ])

    def report(self):
        return f"{len(self.images)} images, last one first"
'''


@pytest.fixture
def own(config: EncodeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EncodeConfig:
    (tmp_path / "own_source_of_a_test.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return replace(config, source="own_source_of_a_test:Reversed", captions=None)


def test_a_source_of_ones_own_is_encoded(
    own: EncodeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    encode(own)
    assert "10 images, last one first" in capsys.readouterr().out
    reader = ShardReader(own.output)
    names = [path.stem for path in sorted(Path(own.images).iterdir(), reverse=True)]
    assert [reader.metadata(sample).captions for sample in range(10)] == [(n,) for n in names]


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("cocoa", "expected one of coco, folder, webdataset, table, or package.module:Class"),
        ("no_such_module:Class", "No module named 'no_such_module'; is its folder in PYTHONPATH"),
        ("own_source_of_a_test:Missing", "no attribute 'Missing'"),
    ],
)
def test_a_source_that_cannot_be_found_is_one_line(
    own: EncodeConfig, source: str, named: str
) -> None:
    with pytest.raises(UserError, match=f"source: {source}.*{named}"):
        encode(replace(own, source=source))


def test_captions_without_a_text_encoder_are_refused(own: EncodeConfig) -> None:
    with pytest.raises(UserError, match="text_encoder: not set"):
        encode(replace(own, text_encoder=None))
