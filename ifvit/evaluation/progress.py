"""Bars for what takes long: how far it is, how fast it goes, when it will be done."""

from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from tqdm import tqdm

from ifvit.distributed import World

Batch = TypeVar("Batch", bound=Sized)


def show_progress(
    batches: Iterable[Batch], total: int, title: str, world: World
) -> Iterator[Batch]:
    """Pass batches on and show, on rank 0, how many of its `total` items have gone by."""
    with tqdm(total=total, unit="image", desc=title, leave=False, disable=not world.is_main) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch))
