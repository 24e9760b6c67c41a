"""The rows that a layer reserves for a schedule."""

from collections.abc import Mapping
from os import PathLike
from typing import Any

import numpy as np

from partial_embedding.schedule import Schedule
from partial_embedding.vocabulary import Ids, Vocabulary


def schedule_rows(
    schedule: Schedule | Mapping[str, Any] | str | PathLike[str],
    num_rows: int,
    vocabulary: Vocabulary | None = None,
) -> Ids:
    """The rows that a schedule ever trains, for `PartialEmbedding(reserve_rows=…)`.

    Args:
        schedule: A `Schedule`, a mapping, or the path of a YAML file.
        num_rows: The number of rows V of the table.
        vocabulary: What the rows mean, for schedules that ask for it.

    Returns:
        Sorted ids without duplicates, int64, shape (R,).

    Raises:
        InputError: The schedule is malformed, or does not fit the table or the vocabulary.

    Example:
        >>> stages = [{"epoch": 0, "rows": [4]}, {"epoch": 2, "rows": {"range": [0, 2]}}]
        >>> schedule_rows({"stages": stages}, 5)
        array([0, 1, 4])
    """
    stages = Schedule.parse(schedule).stages
    return np.unique(np.concatenate([s.rows.resolve(num_rows, vocabulary) for s in stages]))
