"""The command `partial-embedding schedule`: what a schedule will do, before any training."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from partial_embedding.errors import InputError, refused_at
from partial_embedding.files import read_yaml, write_text
from partial_embedding.monitor.figures import Line, lasting, standalone, trainable_figure
from partial_embedding.recipes.prepare_texts import TextSettings, prepare_texts
from partial_embedding.recipes.settings import CommandParser, positive, read_config, read_settings
from partial_embedding.recipes.text import PADDING, count_tokens, read_texts, tokenize
from partial_embedding.recipes.vectors import build_table, read_vectors
from partial_embedding.rows.vocabulary import Vocabulary
from partial_embedding.rows.vocabulary_file import read_vocabulary
from partial_embedding.schedule import Schedule, Start, schedules_by_table
from partial_embedding.schedule.preview import Planned, boundaries, plan, plan_text

# Some seconds' worth.
_MOST_CHANGES = 10_000
_MOST_LINES = 1000


def schedule_command(args: Sequence[str]) -> None:
    """Print, and draw on request, which rows a schedule trains when."""
    given = _parser().parse_args(args)
    config = read_yaml(given.file, "schedule")
    if not isinstance(config, Mapping):
        raise InputError(
            f"{given.file}: a schedule is a mapping with the key 'stages' or 'preset'. "
            f"Received: {config!r}. Put stages under 'stages:'."
        )
    schedule = _chosen(given.file, config, given.table)
    parts = read_config(given.file) if "rows" in config else {}
    vocabulary, steps_of_config = _table(given, config, parts)
    num_rows = given.rows or (len(vocabulary) if vocabulary is not None else 0)
    if not num_rows:
        raise InputError(
            "a schedule is planned for a table. Received neither --vocab nor --rows. Pass a "
            "vocabulary, one token a line, --texts to count one from, or the number of rows."
        )
    last = parts.get("trainer", {}).get("max_epochs")
    if not isinstance(last, int) or last < 1:  # -1 is Lightning's word for no end
        last = _last_epoch(schedule) + 1
    epochs, steps = given.epochs or last, given.steps_per_epoch or steps_of_config
    if steps is None and schedule.moves_within_epochs:
        raise InputError(
            "this schedule moves within epochs. Received no --steps-per-epoch. Pass the optimizer "
            "steps of an epoch."
        )
    planned = _planned(given, schedule, num_rows, vocabulary, epochs, steps or 1)
    lines = plan_text(schedule, planned, num_rows, epochs)
    print(*lines[:_MOST_LINES], sep="\n")
    if len(lines) > _MOST_LINES:
        print(f"and {len(lines) - _MOST_LINES:,} changes more")
    if given.picture is not None:
        unit = "step" if schedule.moves_within_epochs else "epoch"
        points = [(float(getattr(change, unit)), change.trainable) for change in planned]
        end = float(epochs * (steps or 1) if unit == "step" else epochs)
        drawn = [Line("as planned", lasting(points, end), stepped=True)]
        figure = trainable_figure(drawn, num_rows, end, unit, str(given.file))
        write_text(given.picture, standalone(figure))
        print(f"picture: {given.picture}")


def _planned(
    given: argparse.Namespace,
    schedule: Schedule,
    num_rows: int,
    vocabulary: Vocabulary | None,
    epochs: int,
    steps: int,
) -> list[Planned]:
    """The plan; what it lacks is refused with the option that gives it."""
    if any(islice(boundaries(schedule, epochs, steps), _MOST_CHANGES, None)):
        raise InputError(
            f"a plan shows up to {_MOST_CHANGES:,} changes of rows. Received a schedule that makes "
            f"more in {epochs:,} epochs. Pass fewer --epochs."
        )
    if given.new is not None and given.new > num_rows:
        raise InputError(
            f"--new is how many of the table's rows are new, at most {num_rows:,}. Received: "
            f"{given.new:,}. Pass fewer, or more --rows."
        )
    new = None if given.new is None else np.arange(num_rows - given.new, num_rows)
    padding = None if vocabulary is None else vocabulary.index.get(PADDING)
    try:
        return plan(schedule, num_rows, vocabulary, epochs, steps, padding, new)
    except InputError as error:
        advice = ""
        if new is None and "grow_table" in str(error):  # nothing has grown yet here
            advice = " To plan it, pass --new."
        elif vocabulary is None and "no vocabulary" in str(error):
            advice = " To plan it, pass --vocab or --texts."
        raise InputError(f"{given.file}: {error}{advice}") from None


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "schedule", "Print which rows a schedule trains when, before any training."
    )
    parser.add_argument(
        "file", type=Path, help="a schedule, or a configuration with rows.schedule; YAML"
    )
    parser.add_argument("--vocab", type=Path, help="tokens, one a line, or a vocabulary.tsv")
    parser.add_argument("--texts", help="texts to count a vocabulary from, as fit takes them")
    parser.add_argument("--vectors", help="with --texts: word vectors, which some tokens lack")
    parser.add_argument("--rows", type=positive, help="the rows of the table, without --vocab")
    parser.add_argument("--new", type=positive, help="how many rows, the last ones, are new")
    parser.add_argument("--table", help="the table, where the file has a schedule for several")
    parser.add_argument("--epochs", type=positive, help="the epochs of the run")
    parser.add_argument("--steps-per-epoch", type=positive, help="optimizer steps in an epoch")
    parser.add_argument("--picture", type=_picture, help="draw to this .svg file")
    return parser


def _picture(text: str) -> Path:
    path = Path(text)
    if path.suffix != ".svg":
        raise argparse.ArgumentTypeError(f"an .svg file. Received: {text!r}")
    return path


def _chosen(path: Path, config: Mapping[str, Any], table: str | None) -> Schedule:
    rows = config.get("rows")
    value = rows["schedule"] if isinstance(rows, Mapping) and "schedule" in rows else config
    with refused_at(str(path)):
        schedules = schedules_by_table(value)
    if table is None and len(schedules) == 1:
        return next(iter(schedules.values()))
    if table not in schedules:
        named = sorted(str(name) for name in schedules if name is not None)
        raise InputError(
            f"{path}: --table is one of {named}. Received: {table!r}. Pass --table {named[0]}, for "
            "example."
            if named
            else f"{path}: there is one schedule for all tables. Received --table {table!r}. "
            "Leave it out."
        )
    return schedules[table]


def _table(
    given: argparse.Namespace, config: Mapping[str, Any], parts: Mapping[str, dict[str, Any]]
) -> tuple[Vocabulary | None, int | None]:
    """The vocabulary of the table, and the steps of an epoch, as far as they are known."""
    if given.vocab is not None:
        return read_vocabulary(given.vocab), None
    if given.texts is not None:
        vocabulary = count_tokens(map(tokenize, read_texts(given.texts, say=print)))
        if given.vectors is not None:
            _, vocabulary = build_table(vocabulary, read_vectors(given.vectors))
        return vocabulary, None
    data = config.get("data") or {}
    if given.rows is not None or not parts or not isinstance(data, Mapping):
        return None, None
    if not str(data.get("class_path", "TextData")).endswith("TextData"):
        return None, None  # of a class that only its framework can make
    settings = read_settings(TextSettings, "data", parts.get("data", {}))
    texts = prepare_texts(settings, print)
    return texts.vocabulary, -(-len(texts.training) // settings.batch_size)


def _last_epoch(schedule: Schedule) -> int:
    if schedule.cycle is not None and schedule.units == ("epoch",):
        return 2 * int(schedule.cycle) - 1
    starts = [stage.start for stage in schedule.stages]
    return max(int(s.at) if isinstance(s, Start) and s.unit == "epoch" else 0 for s in starts)
