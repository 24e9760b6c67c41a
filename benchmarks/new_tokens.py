"""New tokens in a language model: one step beside PEFT's trainable tokens, and the losses.

    python benchmarks/new_tokens.py [--rows 32000 128000 256000] [--report benchmarks/new_tokens.md]

Both train the same rows of the same model on the same batches, and take turns within one run.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor

from partial_embedding.torch import replace_embedding, rowwise

WIDTH = 512
NEW = 20
BATCH, LENGTH = 2, 32
STEPS = 10
OPTIONS = {"lr": 1e-2, "weight_decay": 0.1}

Step = Callable[[Tensor], tuple[float, float, float]]


def language_model(num_rows: int) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=num_rows,
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=8,
            tie_word_embeddings=True,
            pad_token_id=None,
        )
    )


def training(model: Any, optimizer: torch.optim.Optimizer) -> Step:
    """A step that gives the loss and the seconds of forward, and of backward and optimizer."""

    def step(ids: Tensor) -> tuple[float, float, float]:
        optimizer.zero_grad()
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        middle = time.perf_counter()
        loss.backward()
        optimizer.step()
        return loss.item(), middle - start, time.perf_counter() - middle

    return step


def ours(model: Any, rows: list[int]) -> Step:
    model.requires_grad_(False)
    replace_embedding(model, trainable_rows=rows)
    trainable = [p for p in model.parameters() if p.requires_grad]
    return training(model, rowwise(torch.optim.AdamW(trainable, **OPTIONS), model))


def of_peft(model: Any, rows: list[int]) -> Step:
    adapted = peft.get_peft_model(model, peft.TrainableTokensConfig(token_indices=rows))
    trainable = [p for p in adapted.parameters() if p.requires_grad]
    return training(adapted, torch.optim.AdamW(trainable, **OPTIONS))


CONTENDERS: dict[str, Callable[[Any, list[int]], Step]] = {"ours": ours, "PEFT": of_peft}


def resident(key: str) -> float:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def peak_of(step: Step, ids: Tensor) -> float:
    """MiB that a step needs at its peak beyond what lay in memory before it; Linux only."""
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    step(ids)
    return resident("VmHWM") - before


def batches(num_rows: int) -> list[Tensor]:
    """Batches in which every fourth token is a new one."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(STEPS):
        ids = torch.randint(num_rows - NEW, (BATCH, LENGTH), generator=generator)
        ids[:, ::4] = torch.randint(
            num_rows - NEW, num_rows, ids[:, ::4].shape, generator=generator
        )
        made.append(ids)
    return made


def measure(num_rows: int) -> tuple[list[str], float]:
    """The lines of the table for one size, and how far the losses are apart at most."""
    rows = list(range(num_rows - NEW, num_rows))
    model = language_model(num_rows)
    steps = {name: make(copy.deepcopy(model), rows) for name, make in CONTENDERS.items()}
    del model
    seen: dict[str, list[tuple[float, float, float]]] = {name: [] for name in steps}
    for ids in batches(num_rows):
        for name, step in steps.items():
            seen[name].append(step(ids))
    gap = max(abs(a[0] - b[0]) for a, b in zip(seen["ours"], seen["PEFT"], strict=True))
    peaks = {name: peak_of(step, ids) for name, step in steps.items()}
    # The first steps make state.
    ms = {
        name: [1e3 * statistics.median(s[part] for s in done[2:]) for part in (1, 2)]
        for name, done in seen.items()
    }
    return [
        f"| {num_rows:,} | {name} | {forward:.0f} | {backward:.0f} | "
        f"{backward / ms['ours'][1]:.2f} | {peaks[name]:.0f} |"
        for name, (forward, backward) in ms.items()
    ], gap


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[32_000, 128_000, 256_000])
    parser.add_argument("--report", type=Path, help="write the table to this Markdown file")
    args = parser.parse_args()
    lines = [
        "# New tokens in a language model",
        "",
        f"A Llama of one layer, D = {WIDTH}, tied head, {NEW} new tokens of V, {BATCH}×{LENGTH} "
        f"tokens a step, fp32, AdamW with weight decay on the new rows alone; medians of "
        f"{STEPS - 2} steps in which ours and PEFT's trainable tokens take turns. MiB: what a step "
        "takes at its peak beyond what was resident before it; 0 where that was enough.",
        f"torch {torch.__version__}, peft {version('peft')}, {torch.get_num_threads()} CPU "
        f"thread(s), {platform.machine()}. "
        "Made by `python benchmarks/new_tokens.py --report benchmarks/new_tokens.md`.",
        "",
        "| V | | forward, ms | backward and optimizer, ms | times ours | MiB at the peak |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    gaps = []
    for num_rows in args.rows:
        measured, gap = measure(num_rows)
        print("\n".join(measured), flush=True)
        lines += measured
        gaps.append(gap)
    lines += ["", f"The losses of the {STEPS} steps differ by {max(gaps):.0e} at most.", ""]
    print(lines[-2])
    if args.report:
        args.report.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
