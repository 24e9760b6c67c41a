"""Draw `late_unfreeze.png`: the first steps of rows that begin to train at step 1000.

Two tables learn the same noisy targets with the same AdamW. Half of the rows are frozen for the
first 1000 steps, then all train. In one table a gradient hook masks what is frozen and the stock
optimizer goes on; in the other `rowwise` steps the rows. A third table is made of the late rows
alone and has a fresh optimizer, made at step 1000: what a beginning looks like.

Why the kick: Adam divides its averages by 1 - β^t to make up for their start from zero, and counts
t for the whole parameter. For a row that joins at t = 1001 nothing is made up for any more, while
its averages do start from zero; the second one, of squares, is the slower of the two, so what is
divided by is far too small for hundreds of steps.

Run it with `python docs/late_unfreeze.py`; it takes a few seconds.
"""

from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import torch
from torch import Tensor, nn

from partial_embedding.torch import PartialEmbedding, rowwise

mpl.use("Agg")
from matplotlib import pyplot as plt  # after the choice of the backend

ROWS, LATE, WIDTH = 20, 10, 32  # the last ten rows are late
JOIN, AFTER, SHOWN_BEFORE = 1000, 100, 15
LR = 1e-3

MASKED = "stock AdamW, frozen rows masked by a gradient hook"
ROWWISE = "rowwise(AdamW): begins as if fresh"
FRESH = "the late rows alone, a fresh AdamW at step 1000"


def gradient_source() -> Callable[[Tensor, int], Tensor]:
    """A loss: the squared distance to targets that are seen through noise, the same in each run."""
    targets = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))

    def loss(rows: Tensor, step: int) -> Tensor:
        noise = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(step + 2))
        seen = (targets + 0.3 * noise)[-len(rows) :]
        return (rows - seen).square().sum() / 2

    return loss


def adamw(table: nn.Module) -> torch.optim.AdamW:
    """The optimizer of all three runs."""
    # Without weight decay: with it, rows that are only masked would move while they are frozen.
    return torch.optim.AdamW(table.parameters(), lr=LR, weight_decay=0.0)


def sizes_of_updates(
    table: nn.Embedding,
    optimizer: torch.optim.Optimizer,
    steps: range,
    at_join: Callable[[], None] = lambda: None,
) -> list[float]:
    """Train, and measure by how much an element of the late rows moves in each step.

    Returns:
        The mean over late rows and columns of |change|, in units of the learning rate.
    """
    loss = gradient_source()
    ids = torch.arange(table.num_embeddings)
    sizes: list[float] = []
    for step in steps:
        if step == JOIN:
            at_join()
        before = table.weight.detach()[-LATE:].clone()
        optimizer.zero_grad()
        loss(table(ids), step).backward()
        optimizer.step()
        sizes.append(((table.weight.detach()[-LATE:] - before).abs().mean() / LR).item())
    return sizes


def run_all() -> dict[str, list[float]]:
    """The sizes of updates in each of the three runs, from the first step that is drawn."""
    whole, tail = range(JOIN + AFTER), range(JOIN, JOIN + AFTER)
    zeros = torch.zeros(ROWS, WIDTH)

    masked = nn.Embedding.from_pretrained(zeros.clone(), freeze=False)
    frozen = {"rows": True}
    late = torch.arange(ROWS).unsqueeze(1) >= ROWS - LATE
    masked.weight.register_hook(lambda g: g.masked_fill(late, 0.0) if frozen["rows"] else g)

    partial = PartialEmbedding.from_pretrained(zeros.clone(), trainable_rows=range(ROWS - LATE))
    alone = nn.Embedding.from_pretrained(zeros[-LATE:].clone(), freeze=False)
    sizes = {
        MASKED: sizes_of_updates(masked, adamw(masked), whole, lambda: frozen.update(rows=False)),
        ROWWISE: sizes_of_updates(
            partial, rowwise(adamw(partial), partial), whole, lambda: partial.unfreeze_rows("all")
        ),
        FRESH: sizes_of_updates(alone, adamw(alone), tail),
    }
    late_rows = partial.weight.detach()[-LATE:].numpy()
    if late_rows.tobytes() != alone.weight.detach().numpy().tobytes():
        raise SystemExit("rowwise and the fresh optimizer differ: the picture would not be true.")
    return sizes


def draw(sizes: dict[str, list[float]], path: Path) -> None:
    """Draw the steps around the one at which the late rows join."""
    plt.rcParams.update({"font.size": 10.5, "font.family": "DejaVu Sans"})
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=100, layout="constrained")
    steps = range(JOIN - SHOWN_BEFORE, JOIN + AFTER)
    red, blue = "#c8452f", "#2463a6"
    axes.axvspan(steps[0], JOIN - 0.5, color="#f0efec", zorder=0)
    axes.plot(steps, sizes[MASKED][steps[0] :], color=red, linewidth=2.2, label=MASKED)
    axes.plot(steps, sizes[ROWWISE][steps[0] :], color=blue, linewidth=2.6, label=ROWWISE)
    axes.plot(
        range(JOIN, JOIN + AFTER),
        sizes[FRESH],
        color="white",
        linewidth=1.4,
        linestyle=(0, (2, 3)),
        zorder=4,
    )
    # The dashes lie on the blue line; in the legend they need it behind them too.
    beneath, dashes = (
        plt.Line2D([], [], color=blue, linewidth=2.6),
        plt.Line2D([], [], color="white", linewidth=1.4, linestyle=(0, (2, 3))),
    )
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        [*handles, (beneath, dashes)],
        [*labels, f"{FRESH} (same bits)"],
        frameon=False,
        loc="upper right",
        bbox_to_anchor=(1.0, 1.0),
    )
    peak = max(sizes[MASKED])
    at = sizes[MASKED].index(peak)
    axes.annotate(
        f"{peak:.1f} × lr",
        (at, peak),
        (at, peak + 0.14),
        color=red,
        fontweight="bold",
        ha="center",
    )
    axes.annotate(
        f"first step\n{sizes[MASKED][JOIN]:.1f} × lr",
        (JOIN, sizes[MASKED][JOIN]),
        (JOIN - 12.5, sizes[MASKED][JOIN] + 0.15),
        color=red,
        arrowprops={"arrowstyle": "-", "color": red, "linewidth": 0.8},
    )
    axes.annotate(
        f"first step {sizes[ROWWISE][JOIN]:.1f} × lr",
        (JOIN, sizes[ROWWISE][JOIN]),
        (JOIN + 8, 1.55),
        color=blue,
        arrowprops={"arrowstyle": "-", "color": blue, "linewidth": 0.8},
    )
    axes.text(JOIN - SHOWN_BEFORE / 2 - 0.5, 0.3, "frozen", ha="center", color="#77736b")
    axes.set_title(
        "The kick: rows that begin to train after 1000 steps of AdamW",
        loc="left",
        fontweight="bold",
    )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("mean |update| of an element, in units of lr")
    axes.set_xlim(steps[0], steps[-1])
    axes.set_ylim(-0.15, peak * 1.18)
    axes.grid(axis="y", color="#e4e2dd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    results = run_all()
    draw(results, Path(__file__).with_suffix(".png"))
    for label, sizes in results.items():
        print(f"{label}: first {sizes[-AFTER]:.2f}, largest {max(sizes[-AFTER:]):.2f} × lr")
