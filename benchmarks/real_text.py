"""Validation accuracy on real sentences, for four ways of training the same table.

    python benchmarks/real_text.py FOLDER

FOLDER holds `sentence_polarity/rt-polarity.pos` and `.neg` (Pang and Lee 2005, 10,662 sentences
from film reviews) and `glove.twitter.27B.25d.12k.txt` (GloVe). Prints a table in Markdown.
"""

import csv
import statistics
import sys
import tempfile
from pathlib import Path

from partial_embedding.recipes.lightning_cli import run_lightning

CONFIG = Path(__file__).parents[1] / "configs" / "text_classification.yaml"
VECTORS = "glove.twitter.27B.25d.12k.txt"
SEEDS = (0, 1, 2)
SCHEDULES = {
    "no row": ["none"],
    "missing rows": ["missing"],
    "missing rows, all from epoch 4": ["missing", "all"],
    "all rows": ["all"],
}


def write_csv(folder: Path, path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        for label in ("neg", "pos"):
            source = folder / "sentence_polarity" / f"rt-polarity.{label}"
            for line in source.read_text(encoding="latin-1").splitlines():
                rows.writerow([line.strip(), label])


def accuracies(rows: list[str], seed: int, texts: Path, vectors: Path) -> tuple[float, float]:
    """Of the last epoch, and of the best one."""
    stages = [f"{{epoch: {4 * i}, rows: {name}}}" for i, name in enumerate(rows)]
    cli = run_lightning(
        "fit",
        [
            f"--config={CONFIG}",
            f"--data.path={texts}",
            f"--data.vectors={vectors}",
            f"--data.seed={seed}",
            f"--seed_everything={seed}",
            f"--rows.schedule={{stages: [{', '.join(stages)}]}}",
            f"--trainer.default_root_dir={texts.parent}",
            "--trainer.enable_progress_bar=false",
        ],
    )
    best = cli.config_init.best.best_model_score
    return float(cli.trainer.callback_metrics["val_accuracy"]), float(best)


def main(folder: Path) -> None:
    table = ["| rows that train | last epoch | by seed | best epoch |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as temporary:
        texts = Path(temporary) / "texts.csv"
        write_csv(folder, texts)
        for name, rows in SCHEDULES.items():
            found = [accuracies(rows, seed, texts, folder / VECTORS) for seed in SEEDS]
            last, best = zip(*found, strict=True)
            seeds = ", ".join(f"{100 * value:.1f}" for value in last)
            table.append(
                f"| {name} | {100 * statistics.mean(last):.1f} % | {seeds} | "
                f"{100 * statistics.mean(best):.1f} % |"
            )
            print(table[-1], flush=True)
    print("\n".join(table))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
