"""The rows that a layer reserves for a schedule."""

from collections.abc import Mapping
from os import PathLike
from typing import Any

import numpy as np

from partial_embedding.rows import Config
from partial_embedding.rows.vocabulary import Ids, Vocabulary
from partial_embedding.schedule import Schedule


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


def compact(ids: Ids, num_rows: int) -> Config:
    """Rows as plain values, short where they can be: configs of layers are stored as JSON.

    Args:
        ids: Sorted ids without duplicates, shape (n,).
        num_rows: The number of rows V of the table.

    Returns:
        What `Rows.parse` reads.

    Example:
        >>> compact(np.array([2, 3]), 5), compact(np.array([1, 3]), 5), compact(np.arange(5), 5)
        ({'range': [2, 4]}, {'ids': [1, 3]}, 'all')
    """
    if ids.size in (0, num_rows):
        return "all" if ids.size else "none"
    if ids[-1] - ids[0] + 1 == ids.size:
        return {"range": [int(ids[0]), int(ids[-1]) + 1]}
    return {"ids": ids.tolist()}
