"""Rows of openbmb/UltraFeedback as preference pairs.

Columns: `instruction`; `completions`, a list of records with `response`, and `annotations`, which holds for each of
helpfulness, honesty, instruction_following and truthfulness a record whose `Rating` is "1" to "5" or "N/A".

The rule: a completion's rating is the mean of its aspects' numbers. The best completion is chosen and the worst
rejected, of equals the one listed first. A row whose best and worst rate the same is left out as `ties`, one with fewer
than two rated, non-empty completions as `unrated`. (`overall_score`, from a separate critique, is not read: a
critique's 1 is recorded there as 10, see the card of argilla/ultrafeedback-binarized-preferences.) Deviation: the
completions' own `custom_system_prompt` is no part of the prompt, since the two answers of a pair were given under
different ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen3f.data.sources.adapters.rows import LeftOut, Row, RowFault, check_text, list_of_dicts, text_of

ASPECTS = ("helpfulness", "honesty", "instruction_following", "truthfulness")
DEFAULT = "ultrafeedback"


@dataclass(frozen=True)
class Preference:
    """A prompt, as messages, with the better and the worse answer and their ratings (1 to 5)."""

    prompt: tuple[dict[str, str], ...]
    chosen: str
    rejected: str
    ratings: tuple[float, float]


def ultrafeedback(row: Row) -> Preference:
    """The pair of a row, by the module's rule. Raises RowFault, LeftOut."""
    instruction = text_of(row, "instruction")
    rated = []
    for i, completion in enumerate(list_of_dicts(row, "completions")):
        where = f"{row.name}, completion {i + 1},"
        rating = _rating(completion.get("annotations"), where)
        response = check_text(completion.get("response"), where, "response", may_be_empty=True)
        if rating is not None and response.strip():
            rated.append((rating, response))
    if len(rated) < 2:
        raise LeftOut("unrated")
    chosen = max(rated, key=lambda entry: entry[0])  # max and min give the first of equals
    rejected = min(rated, key=lambda entry: entry[0])
    if chosen[0] == rejected[0]:
        raise LeftOut("ties")
    prompt = ({"role": "user", "content": instruction},)
    return Preference(prompt, chosen[1], rejected[1], (chosen[0], rejected[0]))


def _rating(annotations: Any, where: str) -> float | None:
    """The mean of the aspects that are rated; None if none is."""
    if not isinstance(annotations, Mapping):
        raise RowFault("invalid_rows", f"{where} has no record under 'annotations': copy the data set again.")
    numbers = []
    for aspect in ASPECTS:
        record = annotations.get(aspect)
        written = record.get("Rating") if isinstance(record, Mapping) else None
        if written in (None, "N/A"):
            continue
        try:
            number = float(written)
        except (TypeError, ValueError, OverflowError):
            number = 0.0
        if not 1 <= number <= 5:
            raise RowFault(
                "invalid_rows", f"{where} has the {aspect} Rating {written!r:.80}: write '1' to '5' or 'N/A'."
            )
        numbers.append(number)
    return sum(numbers) / len(numbers) if numbers else None
