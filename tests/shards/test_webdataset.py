"""Shards are plain WebDataset tars, which webdataset decodes without our code."""

from pathlib import Path

import numpy as np
import pytest
from made_shards import make_samples, write_shards
from webdataset import WebDataset


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("flipped", [False, True])
def test_webdataset_decodes_every_member(tmp_path: Path, labelled: bool, flipped: bool) -> None:
    feature_shape = (4, 6) if flipped else None
    samples = make_samples(7, labelled=labelled, flipped=flipped, feature_shape=feature_shape)
    manifest = write_shards(tmp_path, samples, (4, 3))
    urls = [str(tmp_path / f"{entry.name}.tar") for entry in manifest.shards]
    decoded = list(WebDataset(urls, shardshuffle=False).decode())
    assert [row["__key__"] for row in decoded] == [sample.key for sample in samples]
    for row, sample in zip(decoded, samples, strict=True):
        np.testing.assert_array_equal(row["moments.npy"], sample.moments)
        assert row["moments.npy"].dtype == np.float16
        assert row["json"]["captions"] == list(sample.metadata.captions)
        assert ("context.npy" in row, row.get("cls")) == (not labelled, sample.label)
        if not labelled:
            np.testing.assert_array_equal(row["context.npy"], sample.context)
            np.testing.assert_array_equal(row["context_lengths.npy"], sample.context_lengths)
        assert ("flipped.npy" in row) == flipped
        if flipped:
            np.testing.assert_array_equal(row["flipped.npy"], sample.flipped)
            np.testing.assert_array_equal(row["flipped_features.npy"], sample.flipped_features)
        assert ("features.npy" in row, "flipped_features.npy" in row) == (flipped, flipped)
