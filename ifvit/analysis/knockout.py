"""A network whose text is switched off in some of its blocks, and the file of what that changes.

`analyze knockout` writes the file; studies read it. Blocks are counted from 0, as everywhere.

Shapes: B samples, L image tokens with time and registers, D width, C latent channels, S latent
size.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ifvit import storage
from ifvit.analysis.atlas import Window
from ifvit.analysis.run_analysis import RunAnalysis
from ifvit.conditions import Condition
from ifvit.errors import UserError
from ifvit.evaluation.held_out_loss import NUM_TIMES
from ifvit.evaluation.metrics import Estimate
from ifvit.evaluation.rows import Protocol
from ifvit.evaluation.runs import step_files
from ifvit.models.backbone import EncodedCondition
from ifvit.models.blocks import BlockInputs
from ifvit.models.config import UPDATES_TEXT, FusionTransformerConfig, NullContext, parse_fusion
from ifvit.models.fusion_transformer import FusionTransformer
from ifvit.models.layers import repeat_rows
from ifvit.records import NonNegativeInt, PositiveInt, Sha256, record

FOLDER = "analysis/knockout"
"""Folder of a run that holds its files."""

Kind = Literal["off", "only"]
"""Text is off in the window, or on in the window only."""
KINDS: tuple[Kind, ...] = get_args(Kind)


class KnockedOut(nn.Module):
    """A backbone whose image tokens see the null condition in some blocks, the caption in others.

    It runs on two rows per sample that share image tokens: one with the caption, one with the null
    condition. After each block the image tokens of both are those of the null row where text is
    off, and those of the caption's row elsewhere. The text of each row goes on by itself, also
    where blocks update it. Modulation by pooled text is a part of the block.
    """

    def __init__(self, backbone: FusionTransformer, null: Condition, off: Collection[int]) -> None:
        """Switch text off in the blocks `off`; `null`, one row on the device, is no caption."""
        super().__init__()
        self._backbone, self._null = backbone, null
        self._off = frozenset(off)

    @property
    def config(self) -> FusionTransformerConfig:
        """Configuration of the backbone."""
        return self._backbone.config

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self._backbone.device

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the weights."""
        return self._backbone.dtype

    def encode_condition(self, condition: Condition) -> EncodedCondition:
        """Encode conditions as the backbone does."""
        return self._backbone.encode_condition(condition)

    def forward(
        self, latents: Tensor, timesteps: Tensor, condition: Condition | EncodedCondition
    ) -> Tensor:
        """Predict from latents (B, C, S, S) at timesteps (B,) and B conditions.

        Guidance gives 2 B conditions, of which the second half is the null condition. The second
        half of the result is then the prediction of the unchanged backbone for it.
        """
        backbone, count = self._backbone, len(latents)
        null = backbone.encode_condition(self._null).expand(count)
        if not isinstance(condition, EncodedCondition):
            condition = backbone.encode_condition(condition)
        is_guided = len(condition.tokens) > count
        pairs = condition if is_guided else condition.append(null)
        with _switch_text(backbone, self._off):
            with_text, without = backbone(latents, timesteps, pairs).chunk(2)
        # Pooled text modulates the head as it modulates the last block.
        is_off = len(self.config.blocks) - 1 in self._off
        predicted: Tensor = without if is_off else with_text
        if not is_guided:
            return predicted
        return torch.cat([predicted, backbone(latents, timesteps, null)])


@contextmanager
def _switch_text(backbone: FusionTransformer, off: Collection[int]) -> Iterator[None]:
    """Within this context, image tokens see the second half of the conditions in the blocks `off`.

    In all other blocks they see the first half. The backbone is called with 2 B conditions for B
    latents, of which it repeats the rows of image tokens where they first see text.
    """
    last = len(backbone.config.blocks) - 1
    handles = []
    for number in backbone.config.text_blocks:
        block, half = backbone.blocks[number], int(number in off)
        if backbone.config.blocks[number] not in UPDATES_TEXT:
            handles.append(block.register_forward_pre_hook(partial(_select_inputs, half)))
        handles.append(
            block.register_forward_hook(partial(_select_tokens, half, repeat=number == last))
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _select_inputs(
    half: int, _: nn.Module, given: tuple[Tensor, BlockInputs]
) -> tuple[Tensor, BlockInputs]:
    """Give a block that leaves text unchanged one half of what it sees of the conditions.

    The other half of its image tokens would be thrown away. The text passes through whole.
    """
    tokens, inputs = given
    pair = inputs.keys_values
    return tokens, replace(
        inputs,
        keys_values=pair and (pair[0].chunk(2)[half], pair[1].chunk(2)[half]),
        visible=None if inputs.visible is None else inputs.visible.chunk(2)[half],
        vector=None if inputs.vector is None else inputs.vector.chunk(2)[half],
    )


def _select_tokens(
    half: int,
    _: nn.Module,
    given: tuple[Tensor, BlockInputs],
    output: tuple[Tensor, Tensor],
    *,
    repeat: bool,
) -> tuple[Tensor, Tensor]:
    """Replace the image tokens after a block (2 B or B, L, D) by those of one half, (B, L, D).

    After the last block they are repeated, because the head expects a row per condition.
    """
    tokens, text = output
    num_rows = len(text)
    chosen = tokens.chunk(2)[half] if len(tokens) == num_rows else tokens
    return repeat_rows(chosen, num_rows) if repeat else chosen, text


@record
class KnockoutProtocol:
    """How the changes were measured; only equal protocols can be compared."""

    windows: Literal["all", "blocks"]
    num_samples: PositiveInt
    """Samples of the held-out loss."""
    seed: int
    """Seed of their noise."""
    shards_sha256: Sha256
    """Hash of the hashes of the held-out shards."""
    null_context: NullContext
    alignment: Protocol | None
    """How images were sampled and measured; None: none were."""


@record
class KnockoutRow:
    """Changes against the unchanged network, means over the same samples with the same noise."""

    kind: Kind
    first: NonNegativeInt
    last: NonNegativeInt
    held_out_loss: Estimate
    by_timestep: tuple[Estimate, ...]
    """Change of the held-out loss at the timesteps (k + 1/2) / 8."""
    clip_score: Estimate | None = None
    """Raw cosine; measured for single blocks, as is `scene_accuracy`."""
    scene_accuracy: Estimate | None = None
    """Share of images whose count, colour, kind and relation are right."""

    @property
    def window(self) -> Window:
        """First and last block of the window."""
        return self.first, self.last


@record
class KnockoutAnalysis(RunAnalysis):
    """Where one network uses text."""

    target: str
    """What the held-out loss is the error of; losses compare only where it is equal."""
    protocol: KnockoutProtocol
    held_out_loss: Estimate
    """That of the unchanged network, as are the next two."""
    clip_score: Estimate | None
    scene_accuracy: Estimate | None
    rows: tuple[KnockoutRow, ...]
    """First all windows of `off`, then all of `only`."""

    def __post_init__(self) -> None:
        """Raise UserError unless there is a row for each window of the map, in order."""
        expected = [*product(KINDS, list_windows(self.fusion, self.protocol.windows))]
        if [(row.kind, row.window) for row in self.rows] != expected:
            raise UserError(f"rows: expected the windows of fusion {self.fusion}, off and only")
        if any(len(row.by_timestep) != NUM_TIMES for row in self.rows):
            raise UserError(f"by_timestep: expected {NUM_TIMES} changes")

    def changes(self, kind: Kind) -> dict[Window, KnockoutRow]:
        """Return the rows of one kind by window."""
        return {row.window: row for row in self.rows if row.kind == kind}

    @property
    def predictions(self) -> dict[Window, float]:
        """Held-out loss with text in one window only, by window: what the atlas compares."""
        return {
            window: self.held_out_loss.value + row.held_out_loss.value
            for window, row in self.changes("only").items()
        }


def list_windows(fusion: str, kind: Literal["all", "blocks"] = "all") -> list[Window]:
    """Return the windows between the first and the last block with text, sorted.

    Raises UserError for a map without text.
    """
    numbers = [number for number, entry in enumerate(parse_fusion(fusion)) if entry != "image"]
    if not numbers:
        raise UserError(f"fusion {fusion}: no block sees text")
    span = range(numbers[0], numbers[-1] + 1)
    if kind == "blocks":
        return [(number, number) for number in span]
    return [(first, last) for first in span for last in span if first <= last]


def blocks_without_text(fusion: str, kind: Kind, window: Window) -> frozenset[int]:
    """Return the numbers of the text blocks that a window switches off."""
    first, last = window
    return frozenset(
        number
        for number, entry in enumerate(parse_fusion(fusion))
        if entry != "image" and (first <= number <= last) == (kind == "off")
    )


def read_knockout(run: str) -> KnockoutAnalysis | None:
    """Read the analysis of the newest step in a run's folder; None if there is none.

    Raises UserError for a damaged file.
    """
    files = step_files(storage.join(run, FOLDER), ".json")
    return storage.read_sealed(KnockoutAnalysis, files[-1][1]) if files else None
