"""The alignment methods as they take part in sampling, each for one batch of prompts."""

from collections import ChainMap
from collections.abc import Callable, Container, Mapping, Sequence

from torch import Tensor

from ifvit.models.attention import Bias
from ifvit.sampling.alignment.config import DateConfig
from ifvit.sampling.alignment.date import update_context
from ifvit.sampling.alignment.objectives import Score
from ifvit.sampling.method import AlignmentMethod, Change, Evaluation


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

    def before(self, evaluation: Evaluation) -> Change:
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

    def before(self, evaluation: Evaluation) -> Change:
        """The biases, as long as they apply."""
        return Change(biases=self._biases if evaluation.index < self._num_evaluations else {})


class Together:
    """Several methods at once, each blind to the others: DATE looks ahead without biases."""

    def __init__(self, methods: Sequence[AlignmentMethod]) -> None:
        self._methods = methods

    def before(self, evaluation: Evaluation) -> Change:
        """The context of the method that changes it, and everybody's biases."""
        changes = [method.before(evaluation) for method in self._methods]
        contexts = [change.context for change in changes if change.context is not None]
        biases = ChainMap(*(dict(change.biases) for change in changes))
        return Change(context=contexts[-1] if contexts else None, biases=biases)
