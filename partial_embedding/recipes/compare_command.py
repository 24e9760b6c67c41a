"""The command `partial-embedding compare`: the same run with other rows, and which was best."""

from __future__ import annotations

import argparse
import contextlib
import statistics
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from partial_embedding.errors import InputError
from partial_embedding.files import shown
from partial_embedding.monitor.record import read_record
from partial_embedding.recipes.settings import CommandParser, positive, read_config

# The rows that train from the start; the last is the schedule of the configuration.
_WAYS = {"frozen": "none", "missing": "missing", "all": "all", "staged": None}


def compare_command(args: Sequence[str]) -> None:
    """Train a configuration with frozen, missing and all rows, and by its schedule.

    Each way is trained once for each seed. What is compared is the best of the epochs. Options that
    it does not know are those of `fit`.
    """
    given, options = _parser().parse_known_args(args)
    config = read_config(given.config, ("rows", "trainer"))
    if "schedule" not in config.get("rows", {}):
        raise InputError(
            f"{given.config}: a schedule is compared with training without. Received none. Write "
            "one under rows.schedule."
        )
    root = Path(given.root or config.get("trainer", {}).get("default_root_dir", "runs"))
    found: dict[str, list[float]] = {}
    folders = []
    for way, rows in _WAYS.items():
        own = [f"--config={given.config}", *options]
        if rows is not None:
            own.append(f"--rows.schedule={{stages: [{{epoch: 0, rows: {rows}}}]}}")
        for seed in range(given.seeds):
            folder = _fit(own, root / way, seed)
            folders.append(folder)
            found.setdefault(way, []).append(_best(folder, given.metric, given.mode))
            print(f"{way}, seed {seed}: {given.metric} {found[way][-1]:.4f}", flush=True)
    for line in verdict(found, given.metric, given.mode):
        print(line)
    print(f"partial-embedding report {' '.join(map(shown, folders))} shows them side by side")


def verdict(found: dict[str, list[float]], metric: str, mode: str) -> list[str]:
    r"""Lines that say what the runs of each way reached, and whether one was ahead of the others.

    Example:
        >>> runs = {"frozen": [0.5, 0.52], "all": [0.7, 0.74], "staged": [0.73, 0.77]}
        >>> print(*verdict(runs, "val_accuracy", "max"), sep="\n")
        val_accuracy, mean and range over 2 seeds
        frozen   0.5100  0.5000 to 0.5200
        all      0.7200  0.7000 to 0.7400
        staged   0.7500  0.7300 to 0.7700
        best: staged; but all is within the range of its seeds
    """
    sign = 1 if mode == "max" else -1
    means = {way: statistics.fmean(values) for way, values in found.items()}
    seeds = len(next(iter(found.values())))
    lines = [f"{metric}, mean and range over {seeds} seed{'s' if seeds > 1 else ''}"]
    for way, values in found.items():
        lines.append(f"{way:<8} {means[way]:.4f}  {min(values):.4f} to {max(values):.4f}")
    best = max(means, key=lambda way: sign * means[way])
    others = {way: max(sign * v for v in values) for way, values in found.items() if way != best}
    near = [way for way, most in others.items() if most >= min(sign * v for v in found[best])]
    end = "; one seed says little" if seeds == 1 else ""
    if near:
        are = "are" if len(near) > 1 else "is"
        end = f"; but {' and '.join(near)} {are} within the range of its seeds"
    return [*lines, f"best: {best}{end}"]


def _fit(args: list[str], root: Path, seed: int) -> Path:
    """Train, with what it says in a file beside the run, and give the run's folder."""
    args = [*args, f"--trainer.default_root_dir={root}"]
    root.mkdir(parents=True, exist_ok=True)
    log = (root / "fit.log").open("a", encoding="utf-8")
    with log, contextlib.redirect_stdout(log):
        if find_spec("pytorch_lightning") is None:
            from partial_embedding.recipes.keras_commands import fit_command

            return fit_command([*args, f"--data.seed={seed}"])
        from partial_embedding.recipes.lightning_cli import run_lightning

        quiet = "--trainer.enable_progress_bar=false"
        cli = run_lightning("fit", [*args, quiet, f"--seed_everything={seed}"])
        return Path(str(cli.trainer.log_dir))


def _best(folder: Path, metric: str, mode: str) -> float:
    scores = read_record(folder).scores
    values = [score.metrics[metric] for score in scores if metric in score.metrics]
    if not values:
        known = sorted({name for score in scores for name in score.metrics})
        raise InputError(
            f"runs are compared by what their validations measure: {', '.join(known)}. Received: "
            f"{metric!r}. Pass one of these as --metric."
        )
    return max(values) if mode == "max" else min(values)


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "compare",
        "Train frozen, missing and all rows, and by schedule; say which was best.",
        usage="partial-embedding compare CONFIG [--seeds N] [--metric NAME] [options of fit]",
    )
    parser.add_argument("config", type=Path, help="a configuration of fit, with a schedule")
    parser.add_argument("--seeds", type=positive, default=3, help="runs of each way, by default 3")
    parser.add_argument("--metric", default="val_accuracy", help="by default val_accuracy")
    parser.add_argument("--mode", choices=("max", "min"), default="max", help="by default max")
    parser.add_argument("--trainer.default_root_dir", dest="root", help="the folder of the runs")
    return parser
