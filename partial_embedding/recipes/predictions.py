"""What a model says of texts, as a CSV file."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from partial_embedding.files import refuse_no_file, shown, write_atomically
from partial_embedding.recipes.settings import check_range
from partial_embedding.rows.token_text import printable


def output_of(given: str | None, typed: bool, root: Path) -> str | Path:
    """Where it goes: where it was asked for, to the terminal for what was typed, or into a file.

    What cannot be a file is refused here, before the model is asked.
    """
    output = given or ("-" if typed else root / "predictions.csv")
    if output != "-":
        refuse_no_file(output, "predictions are written to a file")
    return output


def write_predictions(
    output: str | Path,
    texts: Sequence[str],
    probabilities: NDArray[np.float32],
    names: Sequence[str],
    top_k: int = 1,
) -> None:
    """Write the `top_k` likeliest classes of each text, given their probabilities, shape (N, C).

    Example:
        >>> write_predictions("-", ["a joy"], np.array([[0.25, 0.75]]), ["neg", "pos"], top_k=2)
        text,label,probability,label_2,probability_2
        a joy,pos,0.7500,neg,0.2500
    """
    check_range("top_k", top_k, 1)
    ranked = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
    header = ["text", "label", "probability"]
    for place in range(2, ranked.shape[1] + 1):
        header += [f"label_{place}", f"probability_{place}"]
    rows = [
        [text, *(cell for c in classes for cell in (names[c], f"{shares[c]:.4f}"))]
        for text, classes, shares in zip(texts, ranked, probabilities, strict=True)
    ]
    write_table(output, header, rows)


def write_table(output: str | Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a CSV file; for `-` to the terminal, without what would move the cursor there."""
    if str(output) == "-":
        table = csv.writer(sys.stdout, lineterminator="\n")
        seen = sys.stdout.isatty()
        table.writerows([printable(c) for c in row] if seen else row for row in (header, *rows))
        return
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    with (
        write_atomically(output) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        csv.writer(file, lineterminator="\n").writerows([header, *rows])
    print(f"predictions: {shown(output)}")
