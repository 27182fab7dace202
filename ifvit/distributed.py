"""World: which process this is, as the launcher's environment tells it."""

import os
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class World:
    """One process among `size`; `rank` 0 writes the files that exist once."""

    rank: int
    size: int
    local_rank: int

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    @classmethod
    def from_environment(cls) -> "World":
        """RANK, WORLD_SIZE and LOCAL_RANK as torchrun and accelerate set them; alone without."""
        return cls(
            rank=int(os.environ.get("RANK", "0")),
            size=int(os.environ.get("WORLD_SIZE", "1")),
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        )
