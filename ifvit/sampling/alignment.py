"""Training-free alignment methods: DATE, and how the settings choose and combine methods.

`generate` and `evaluate` call `build_methods`; `GuidedPredictor` calls the resulting methods before
each function evaluation. `ifvit.sampling.regulation` holds attention regulation.

Shapes: B batch, M text tokens, D context width, H, W image.
"""

import math
from collections.abc import Callable, Container, Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.nn import functional

from ifvit.diffusion.guidance import AlignmentMethod, Change, FunctionEvaluation
from ifvit.diffusion.sampler import BuildMethods, Sampler
from ifvit.errors import UserError
from ifvit.models.clip import ClipScorer, load_clip
from ifvit.models.config import FusionTransformerConfig
from ifvit.models.image_reward import load_image_reward
from ifvit.models.text_encoders import load_token_spans
from ifvit.models.weights import WeightsInfo
from ifvit.sampling.config import DateConfig, SamplingConfig
from ifvit.sampling.load import require_text_encoder
from ifvit.sampling.regulation import BlockBias, Regulation, find_targets

Objective = Callable[[Tensor, Sequence[str]], Tensor]
"""Images (B, 3, H, W), nominally in [-1, 1] but not clamped, and their prompts => scores (B,).

Scores are differentiable with respect to the images; larger is better.
"""

_NUM_REGULATED = 5
_EVALUATIONS_PER_STEP = {"dpm_solver_pp_fast": 3, "heun": 2}


def build_methods(
    config: SamplingConfig, sampler: Sampler, info: WeightsInfo, objective: Objective | None = None
) -> BuildMethods | None:
    """Choose the alignment methods of the settings, for `generate_images`; None for `plain`.

    `objective` replaces the scores in DATE's settings. Raises UserError for settings that do not
    fit the backbone or, when the methods of a batch are built, its prompts.
    """
    if config.method == "plain":
        return None
    require_text_encoder(info)
    backbone = sampler.backbone.config
    if isinstance(backbone, FusionTransformerConfig) and not backbone.text_blocks:
        raise UserError(f"method {config.method}: no block of this backbone sees text; use plain")
    builders: list[Callable[[Sequence[str]], AlignmentMethod]] = []
    if config.method in ("date", "both"):
        if objective is None:
            objective = _load_objective(config.date, info, str(sampler.backbone.device))
        updates = date_updates(config)
        builders.append(partial(Date, config.date, updates, objective, sampler.decode))
    if config.method in ("regulate", "both"):
        builders.append(_regulation_builder(config, sampler, info))
    return lambda prompts: [build(prompts) for build in builders]


class Date:
    """Diffusion Adaptive Text Embedding (Na et al. 2025, arXiv 2510.23974).

    Moves the context of each prompt so that the image it leads to scores higher.
    """

    def __init__(
        self,
        config: DateConfig,
        updates: Container[int],
        objective: Objective,
        decode: Callable[[Tensor], Tensor],
        prompts: Sequence[str],
    ) -> None:
        """`updates`: numbers of the evaluations to update before; `decode`: `Sampler.decode`."""
        self._config = config
        self._updates = updates
        self._objective = objective
        self._decode = decode
        self._prompts = prompts
        self._original: Tensor | None = None

    def before(self, evaluation: FunctionEvaluation) -> Change:
        """Update the context if an update is due."""
        if self._original is None:
            self._original = evaluation.context
        if evaluation.index not in self._updates:
            return Change()
        latest = evaluation.context
        start = self._original if self._config.start == "original" else latest

        def score(context: Tensor) -> Tensor:
            images = self._decode(evaluation.predict_clean(context))
            return self._objective(images, self._prompts)

        return Change(context=update_context(start, latest, score, self._config.radius))


def update_context(
    start: Tensor, latest: Tensor, score: Callable[[Tensor], Tensor], radius: float
) -> Tensor:
    """Take one step start + rho g / |g| with g = grad h(latest), the norm over a sample's entries.

    Contexts are (B, M, D), scores h (B,). With start = latest, the step maximises the first-order
    expansion of h in the ball of radius rho around it. The authors' --init_org starts from the
    original context, but takes the gradient at the latest one, too. A sample without gradient gets
    its start. The result carries no graph.
    """
    point = latest.detach().requires_grad_()
    with torch.enable_grad():
        # Samples are independent, so the gradient of the sum is each sample's own gradient.
        (gradient,) = torch.autograd.grad(score(point).sum(), point)
    norm = gradient.flatten(1).norm(dim=1)[:, None, None]
    direction = torch.where(norm > 0, gradient / norm, 0.0)
    return start + radius * direction


def clip_score_of(scorer: ClipScorer) -> Objective:
    """Return the cosine of CLIP features of image and prompt, without a prompt prefix."""

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        # As in DATE: bilinear, and without a clamp, which would remove gradients.
        size = (scorer.image_size, scorer.image_size)
        resized = functional.interpolate(images, size, mode="bilinear")
        return (scorer.embed_images(resized) * scorer.embed_texts(list(prompts))).sum(dim=1)

    return score


def date_updates(config: SamplingConfig) -> tuple[int, ...]:
    """Return the numbers of the evaluations before which DATE updates; each starts a step."""
    wanted = config.date.evaluations
    if wanted is None:
        wanted = tuple(range(0, config.num_steps, config.date.every))
    starts = {_next_start(index, config) for index in wanted}
    return tuple(sorted(start for start in starts if start < config.num_steps))


def _next_start(index: int, config: SamplingConfig) -> int:
    """First evaluation from `index` on that starts a step; a step must see a single context."""
    length = _EVALUATIONS_PER_STEP.get(config.solver, 1)
    return math.ceil(index / length) * length


@lru_cache(maxsize=1)  # evaluate builds the method anew for every guidance scale
def _load_objective(config: DateConfig, info: WeightsInfo, device: str) -> Objective:
    """Load the scores h_i that have a weight w_i; the objective is sum_i w_i h_i."""
    terms: list[tuple[float, Objective]] = []
    if config.clip_weight:
        encoder = require_text_encoder(info)
        if config.clip is None and not encoder.settings.keeps_padding:
            raise UserError(
                f"date.clip: the text encoder of the weights, {encoder.name}, is no CLIP; name the "
                "CLIP whose score DATE raises, or set date.clip_weight to 0"
            )
        scorer = load_clip(config.clip or encoder.name, device)
        terms.append((config.clip_weight, clip_score_of(scorer)))
    if config.image_reward_weight:
        reward = load_image_reward(config.image_reward, device).score
        terms.append((config.image_reward_weight, reward))
    return lambda images, prompts: torch.stack(
        [weight * objective(images, prompts) for weight, objective in terms]
    ).sum(dim=0)


def _regulation_builder(
    config: SamplingConfig, sampler: Sampler, info: WeightsInfo
) -> Callable[[Sequence[str]], Regulation]:
    """Check the settings against the backbone, and prepare what all batches share."""
    backbone, settings = sampler.backbone.config, config.regulation
    if not isinstance(backbone, FusionTransformerConfig) or not backbone.text_key_blocks:
        raise UserError(
            f"method {config.method}: the image tokens of this backbone attend to no text; "
            "use date or plain"
        )
    blocks = settings.blocks or middle_blocks(backbone.text_key_blocks)
    if not set(blocks) <= set(backbone.text_key_blocks):
        raise UserError(
            f"regulation.blocks {list(blocks)}: in fusion {backbone.fusion!r}, image tokens attend "
            f"to text in the blocks {', '.join(map(str, backbone.text_key_blocks))}"
        )
    token_spans = load_token_spans(require_text_encoder(info))
    num_evaluations = _next_start(math.ceil(settings.share_of_steps * config.num_steps), config)

    def regulate(prompts: Sequence[str]) -> Regulation:
        targets = find_targets(prompts, settings.targets, token_spans, sampler.backbone.device)
        if not targets.present.any():
            return Regulation({}, 0)
        biases = {block: BlockBias(backbone, block, targets) for block in blocks}
        return Regulation(biases, num_evaluations)

    return regulate


def middle_blocks(blocks: tuple[int, ...]) -> tuple[int, ...]:
    """Return the middle five of these numbers of blocks, or all if there are fewer."""
    start = max(0, len(blocks) - _NUM_REGULATED) // 2
    return blocks[start : start + _NUM_REGULATED]
