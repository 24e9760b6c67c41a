"""Another tokenizer in stages, beside all rows at once and everything at once, three seeds.

    python benchmarks/new_tokenizer.py [--seeds 3] [--report benchmarks/new_tokenizer.md]

The stages are those of configs/new_tokenizer.yaml.
"""

from __future__ import annotations

import argparse
import logging
import statistics
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from pytorch_lightning import Trainer, seed_everything

from partial_embedding.callbacks.lightning import RowUnfreezing
from partial_embedding.recipes.new_tokenizer import FieldTexts, NewTokenizer

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "new_tokenizer.yaml"
AT_ONCE = {"stages": [{"epoch": 0, "rows": "all"}]}
WHEN = ("before", "after the initialisation", "after the first stage", "at the end")


def run(config: dict[str, Any], schedule: Any, body: bool, seed: int) -> dict[str, float]:
    """The losses per byte of one run."""
    seed_everything(seed, verbose=False)
    module = NewTokenizer(**{**config["model"]["init_args"], "body": body, "seed": seed})
    data = FieldTexts(**config["data"]["init_args"], seed=seed)
    Trainer(
        max_epochs=config["trainer"]["max_epochs"],
        accelerator="cpu",
        callbacks=[RowUnfreezing(schedule)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    ).fit(module, data)
    return module.losses


def shown(losses: list[dict[str, float]], when: str) -> str:
    found = [each[when] for each in losses if when in each]
    if not found:
        return "-"
    spread = statistics.stdev(found) if len(found) > 1 else 0.0
    return f"{statistics.mean(found):.3f} ± {spread:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--report", type=Path, help="write the table to this Markdown file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    ways = {
        "rows in stages": (config["rows"]["schedule"], False),
        "all rows at once": (AT_ONCE, False),
        "rows in stages, with the body": (config["rows"]["schedule"], True),
        "everything at once": (AT_ONCE, True),
    }
    lines = [
        "# Another tokenizer for a language model",
        "",
        "Loss per byte, in nats, of held-out source code, for a small Llama that was trained on "
        "documentation and gets a tokenizer of source code; the same steps and rates for all. "
        f"Means and standard deviations of {args.seeds} seeds, of model and data.",
        f"torch {torch.__version__}, transformers {version('transformers')}. Made by "
        "`python benchmarks/new_tokenizer.py --report benchmarks/new_tokenizer.md`.",
        "",
        f"| | {' | '.join(WHEN)} |",
        "|---|" + "---:|" * len(WHEN),
    ]
    for name, (schedule, body) in ways.items():
        losses = [run(config, schedule, body, seed) for seed in range(args.seeds)]
        lines.append(f"| {name} | {' | '.join(shown(losses, when) for when in WHEN)} |")
        print(lines[-1], flush=True)
    if args.report:
        args.report.write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
