"""A source of your own, named in the recipe as `module:Class`."""

from dataclasses import replace
from pathlib import Path

import pytest
from encoded_files import finish, image_files

from data_pipeline.config import EncodeConfig
from data_pipeline.sources import open_source
from data_pipeline.sources.base import CaptionedImage
from ifvit.config import read_config
from ifvit.errors import UserError
from ifvit.shards.reader import ShardReader

MODULE = '''
from pathlib import Path
from data_pipeline.sources.base import CaptionedImage, ListedSource

class Reversed(ListedSource):
    """The images of one folder in reverse order, captioned by their names."""

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
        return f"{len(self.images)} images in reverse order"
'''


@pytest.fixture
def own(config: EncodeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EncodeConfig:
    (tmp_path / "own_source_of_a_test.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    source = "own_source_of_a_test:Reversed"
    return replace(config, source=source, captions=None, allow_plugins=True)


def test_your_own_source_is_encoded(own: EncodeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    finish(own)
    assert "10 images in reverse order" in capsys.readouterr().out
    reader = ShardReader(own.output)
    names = [path.stem for path in reversed(image_files(own))]
    assert [reader.metadata(sample).captions for sample in range(10)] == [(n,) for n in names]


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("cocoa", "expected one of coco, folder, webdataset, table, .* or package.module:Class"),
        ("no_such_module:Class", "No module named 'no_such_module'; is its folder in PYTHONPATH"),
        ("own_source_of_a_test:Missing", "no attribute 'Missing'"),
        ("os:popen", "expected a subclass of data_pipeline.sources.base.Source"),
        ("builtins:str", "expected a subclass of data_pipeline.sources.base.Source"),
        (":x", "Empty module name"),
    ],
)
def test_an_unknown_source_is_one_line(own: EncodeConfig, source: str, named: str) -> None:
    with pytest.raises(UserError, match=f"source: {source}.*{named}"):
        open_source(replace(own, source=source))


def test_code_of_a_recipe_is_not_even_imported_without_the_flag(
    own: EncodeConfig, tmp_path: Path
) -> None:
    (tmp_path / "harmful.py").write_text("raise SystemExit('the code ran')")
    with pytest.raises(UserError, match=r"harmful:X is code .*--allow_plugins"):
        open_source(replace(own, source="harmful:X", allow_plugins=False))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("source: harmful:X\nallow_plugins: true\nimages: x\noutput: y\nvae: z\n")
    with pytest.raises(UserError, match="allow_plugins is set by the flag --allow_plugins only"):
        read_config(EncodeConfig, ["--config", str(recipe)], prog="ifvit encode")
    recipe.write_text("source: harmful:X\nimages: x\noutput: y\nvae: z\n")
    argv = ["--config", str(recipe), "--allow_plugins"]
    assert read_config(EncodeConfig, argv, prog="ifvit encode").allow_plugins


def test_an_image_without_caption_and_label_is_an_error() -> None:
    with pytest.raises(UserError, match=r"x\.jpg: no caption and no label"):
        CaptionedImage(key="0", image_id=0, name="x.jpg", read=bytes)
