"""Why a number is not finite, found out once one was: the teacher's answers, or the student's loss of some samples.

A teacher in half precision overflows where a feature or a logit passes 65,504. It answers the same again, so nothing is
looked at while losses are finite: the answers of a bad step are asked for once more.
"""

from collections.abc import Callable, Sequence

import torch

from skd_dist.contracts import Batch, LossTerms, Outputs
from skd_dist.errors import UserError
from skd_dist.link.ask_ahead import AskAhead
from skd_dist.plan import StageSpec

_MAX_NAMED_SAMPLES = 5

Share = Callable[[str], list[str]]
"""This student's text -> those of all, the same on each. Collective."""


class BadAnswers:
    """Which of a teacher's answers to this student are not finite."""

    def __init__(self) -> None:
        self._keys: dict[str, list[str]] = {}

    def look_at(self, batch: Batch, answer: Outputs) -> None:
        """Look at the answer to a batch; its samples that do not count are passed over."""
        for name, output in answer.items():
            good = output.flatten(1).isfinite().all(1)
            if keys := _bad_keys(batch, good.tolist()):
                self._keys.setdefault(f"{name} in {str(output.dtype).removeprefix('torch.')}", []).extend(keys)

    def refuse(self, where: str, share: Share) -> None:
        """Collective.

        Args:
            where: what was done with the answers.

        Raises:
            UserError: on every student, if any of them was given an answer that is not finite.
        """
        own = ", ".join(f"{what} of {' '.join(keys[:_MAX_NAMED_SAMPLES])}" for what, keys in self._keys.items())
        if found := _by_student(share(own)):
            raise UserError(
                f"{where}: the teacher's answers are not finite",
                got=found,
                do="give --teacher-dtype bf16 or fp32 (or other weights, if it has one of these already)",
            )


def loss_not_finite(
    stage: StageSpec, step: int, loss: float, seen: Sequence[tuple[LossTerms, Batch]], ask: AskAhead, share: Share
) -> UserError:
    """The same error on every student, with samples of all of them. Collective.

    Args:
        loss: of the step, over all students.
        seen: this student's micro-batches of the step.
        ask: gives the teacher's answers to them again.

    Raises:
        UserError: it is the teacher's fault.
    """
    where, bad = f"stage {stage.name}, step {step}", [bad_keys(terms, batch) for terms, batch in seen]
    answers = BadAnswers()
    for batch, answer in ask.stream([batch for _, batch in seen] if any(bad) else [], stage.teacher_outputs):
        answers.look_at(batch, answer or {})
    answers.refuse(where, share)
    keys = [key for found in bad for key in found]
    return UserError(
        f"{where}: the loss is not finite",
        got=f"{loss} from {_by_student(share(' '.join(keys[:_MAX_NAMED_SAMPLES]))) or 'no single sample'}",
        do="nothing was updated; lower --lr, or look at these samples",
    )


def bad_keys(terms: LossTerms, batch: Batch) -> list[str]:
    """Keys of the samples that count and whose loss is not finite."""
    finite = torch.stack([term.per_sample.detach().isfinite() for term in terms.values()]).all(0)
    return _bad_keys(batch, finite.tolist())


def _bad_keys(batch: Batch, good: Sequence[bool]) -> list[str]:
    counts = batch.valid.tolist()
    return [key for key, is_good, is_valid in zip(batch.keys, good, counts, strict=True) if is_valid and not is_good]


def _by_student(texts: Sequence[str]) -> str:
    return ", ".join(f"student {rank}: {text}" for rank, text in enumerate(texts) if text)
