"""Alignment methods as they take part in sampling, and how the settings choose them."""

import math
from collections import ChainMap
from collections.abc import Callable, Container, Mapping, Sequence

from torch import Tensor

from ifvit.diffusion.guidance import AlignmentMethod, Bias, Change, FunctionEvaluation
from ifvit.diffusion.sampler import BuildMethod, Sampler
from ifvit.errors import UserError
from ifvit.models.clip import load_clip, load_token_spans
from ifvit.models.config import FusionUViTConfig
from ifvit.models.image_reward import load_image_reward
from ifvit.models.weights import WeightsInfo
from ifvit.sampling.alignment.date import (
    Objective,
    Score,
    clip_score_of,
    image_reward_of,
    update_context,
    weighted_sum,
)
from ifvit.sampling.alignment.regulation import BlockBias, find_targets
from ifvit.sampling.config import DateConfig, SamplingConfig
from ifvit.sampling.load import require_text_encoder


class Date:
    """Moves the context of each prompt so that the image it leads to scores higher."""

    def __init__(
        self,
        config: DateConfig,
        updates: Container[int],
        score: Score,
        decode: Callable[[Tensor], Tensor],
    ) -> None:
        """`updates`: evaluations to update before, from 0.

        `decode` turns scaled latents (B, C, S, S) into images (B, 3, H, W), differentiably.
        """
        self._config = config
        self._updates = updates
        self._score = score
        self._decode = decode
        self._original: Tensor | None = None

    def before(self, evaluation: FunctionEvaluation) -> Change:
        """Update the context where it is due."""
        if self._original is None:
            self._original = evaluation.context
        if evaluation.index not in self._updates:
            return Change()
        start = self._original if self._config.start == "original" else evaluation.context

        def score(context: Tensor) -> Tensor:
            return self._score(self._decode(evaluation.predict_clean(context)))

        return Change(context=update_context(start, score, self._config.radius))


class Regulation:
    """Biases the attention of fused blocks in the first evaluations."""

    def __init__(self, biases: Mapping[int, Bias], num_evaluations: int) -> None:
        self._biases = biases
        self._num_evaluations = num_evaluations

    def before(self, evaluation: FunctionEvaluation) -> Change:
        """The biases, as long as they apply."""
        return Change(biases=self._biases if evaluation.index < self._num_evaluations else {})


class Together:
    """Several methods at once, each blind to the others: DATE looks ahead without biases."""

    def __init__(self, methods: Sequence[AlignmentMethod]) -> None:
        self._methods = methods

    def before(self, evaluation: FunctionEvaluation) -> Change:
        """The context of the method that changes it, and everybody's biases."""
        changes = [method.before(evaluation) for method in self._methods]
        contexts = [change.context for change in changes if change.context is not None]
        biases = ChainMap(*(dict(change.biases) for change in changes))
        return Change(context=contexts[-1] if contexts else None, biases=biases)


_NUM_REGULATED = 5
_EVALUATIONS_PER_STEP = {"dpm_solver_pp_fast": 3}


def build_method(
    config: SamplingConfig, sampler: Sampler, info: WeightsInfo, objective: Objective | None = None
) -> BuildMethod | None:
    """Choose the alignment method of the settings, for `generate_images`; None for `plain`.

    `objective` replaces the scores that DATE raises by its settings. Raises UserError for settings
    that do not fit the backbone or, when a batch comes, its prompts.
    """
    if config.method == "plain":
        return None
    require_text_encoder(info)
    builders: list[BuildMethod] = []
    if config.method in ("date", "both"):
        builders.append(_date(config, sampler, info, objective))
    if config.method in ("regulate", "both"):
        builders.append(_regulation(config, sampler, info))
    return lambda prompts: Together([build(prompts) for build in builders])


def date_updates(config: SamplingConfig) -> tuple[int, ...]:
    """The evaluations before which DATE updates, each at the start of a step of the solver."""
    wanted = config.date.evaluations
    if wanted is None:
        wanted = tuple(range(0, config.num_steps, config.date.every))
    starts = {_next_start(index, config) for index in wanted}
    return tuple(sorted(start for start in starts if start < config.num_steps))


def _next_start(index: int, config: SamplingConfig) -> int:
    """The first evaluation from `index` on that starts a step; within one nothing may change."""
    length = _EVALUATIONS_PER_STEP.get(config.solver, 1)
    return math.ceil(index / length) * length


def _date(
    config: SamplingConfig, sampler: Sampler, info: WeightsInfo, objective: Objective | None
) -> BuildMethod:
    if objective is None:
        objective = _objective(config.date, info, str(sampler.backbone.device))
    updates = date_updates(config)
    return lambda captions: Date(config.date, updates, objective(captions), sampler.decode)


def _objective(config: DateConfig, info: WeightsInfo, device: str) -> Objective:
    terms: list[tuple[float, Objective]] = []
    if config.clip_weight:
        scorer = load_clip(config.clip or require_text_encoder(info).name, device)
        terms.append((config.clip_weight, clip_score_of(scorer)))
    if config.image_reward_weight:
        model = load_image_reward(config.image_reward, device)
        terms.append((config.image_reward_weight, image_reward_of(model)))
    return weighted_sum(terms)


def _regulation(config: SamplingConfig, sampler: Sampler, info: WeightsInfo) -> BuildMethod:
    shape = sampler.backbone.config
    if not isinstance(shape, FusionUViTConfig):
        raise UserError(
            f"method {config.method}: attention regulation knows the blocks of a fusion backbone, "
            f"not those of a {type(sampler.backbone).__name__}; use date or plain"
        )
    if shape.conditioning == "adaln":
        raise UserError(
            f"method {config.method}: under conditioning adaln no attention goes to text; "
            "use date or plain"
        )
    settings = config.regulation
    blocks = settings.blocks
    if blocks is None:
        blocks = middle_blocks(shape.num_fused_blocks)
    if not all(0 <= block < shape.num_fused_blocks for block in blocks):
        raise UserError(
            f"regulation.blocks {list(blocks)}: this backbone has the fused blocks "
            f"0 ... {shape.num_fused_blocks - 1}"
        )
    token_spans = load_token_spans(require_text_encoder(info).name, shape.context_length)
    num_evaluations = _next_start(math.ceil(settings.share_of_steps * config.num_steps), config)
    side = shape.latent_size // shape.patch_size

    def regulate(captions: Sequence[str]) -> Regulation:
        targets = find_targets(captions, settings.targets, token_spans)
        if not targets.present.any():
            return Regulation({}, 0)
        targets = targets.to(sampler.backbone.device)
        biases = {block: BlockBias(targets, side, settings.mass) for block in blocks}
        return Regulation(biases, num_evaluations)

    return regulate


def middle_blocks(num_fused_blocks: int) -> tuple[int, ...]:
    """The middle five fused blocks, or all if there are fewer."""
    surplus = max(0, num_fused_blocks - _NUM_REGULATED) // 2
    return tuple(range(surplus, num_fused_blocks - surplus))
