"""New tokens in a language model: Hugging Face's Trainer, beside PEFT's trainable tokens.

    python benchmarks/new_tokens.py [--rows 32000 128000 256000] [--report benchmarks/new_tokens.md]

Both train the same rows and the same LoRA on the same batches, in trainers that take turns.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from partial_embedding.torch import replace_embedding

WIDTH = 512
NEW = 20
BATCH, LENGTH = 2, 32
STEPS = 8
ROUNDS = 2


def language_model(num_rows: int, tied: bool) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=num_rows,
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=8,
            tie_word_embeddings=tied,
            pad_token_id=None,
        )
    )


def lora(**options: Any) -> Any:
    return peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=8, **options)


def ours(model: Any, rows: list[int], tied: bool) -> Any:
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, lora())
    for name in ["embed_tokens", *([] if tied else ["lm_head"])]:
        replace_embedding(adapted, name, trainable_rows=rows)
    return adapted


def of_peft(model: Any, rows: list[int], tied: bool) -> Any:
    torch.manual_seed(1)
    tables = dict.fromkeys(["embed_tokens", *([] if tied else ["lm_head"])], rows)
    return peft.get_peft_model(model, lora(trainable_token_indices=tables))


CONTENDERS: dict[str, Callable[[Any, list[int], bool], Any]] = {"ours": ours, "PEFT": of_peft}


def resident(key: str) -> float:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


class Meter(transformers.TrainerCallback):
    """The computing time of each step, its loss, and the memory it needs beyond what was there."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.peaks: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Begin to measure."""
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        self.before = resident("VmRSS")
        self.start = time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Keep what a step took."""
        self.seconds.append(time.process_time() - self.start)
        self.peaks.append(resident("VmHWM") - self.before)

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        """Keep the loss."""
        self.losses += [logs["loss"]] if "loss" in logs else []


def examples(num_rows: int) -> list[dict[str, Any]]:
    """Texts in which every fourth token is a new one."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(STEPS * BATCH):
        ids = torch.randint(num_rows - NEW, (LENGTH,), generator=generator)
        ids[::4] = torch.randint(num_rows - NEW, num_rows, ids[::4].shape, generator=generator)
        made.append({"input_ids": ids, "labels": ids})
    return made


def run(model: Any, data: list[dict[str, Any]]) -> Meter:
    meter = Meter()
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder,
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            learning_rate=1e-2,
            weight_decay=0.1,
            max_grad_norm=1.0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        transformers.Trainer(model, arguments, train_dataset=data, callbacks=[meter]).train()
    return meter


def measure(num_rows: int, tied: bool) -> tuple[list[str], float]:
    """The lines of the table for one size, and how far the losses are apart at most."""
    rows, data = list(range(num_rows - NEW, num_rows)), examples(num_rows)
    plain = language_model(num_rows, tied)
    seen: dict[str, list[Meter]] = {name: [] for name in CONTENDERS}
    for _ in range(ROUNDS):
        for name, make in CONTENDERS.items():
            seen[name].append(run(make(copy.deepcopy(plain), rows, tied), data))
    gap = max(
        abs(a - b) for a, b in zip(seen["ours"][0].losses, seen["PEFT"][0].losses, strict=True)
    )
    # The first steps make state.
    ms = {
        name: 1e3 * statistics.median(s for meter in meters for s in meter.seconds[2:])
        for name, meters in seen.items()
    }
    mib = {
        name: max(p for meter in meters for p in meter.peaks[2:]) for name, meters in seen.items()
    }
    kind = "tied" if tied else "untied"
    return [
        f"| {num_rows:,} | {kind} | {name} | {ms[name]:.0f} | {ms[name] / ms['PEFT']:.2f} | "
        f"{mib[name]:.0f} |"
        for name in CONTENDERS
    ], gap


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[32_000, 128_000, 256_000])
    parser.add_argument("--report", type=Path, help="write the table to this Markdown file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    lines = [
        "# New tokens in a language model",
        "",
        f"A Llama of one layer, D = {WIDTH}, LoRA on its attention, {NEW} new tokens of V, "
        f"{BATCH}×{LENGTH} tokens a step, fp32: Hugging Face's Trainer as it comes, with AdamW, "
        "weight decay and clipping. Ours beside PEFT's trainable tokens, in trainers that take "
        f"turns; medians of {ROUNDS * (STEPS - 2)} steps, whose time is what the process computed. "
        "MiB: what a step takes at its peak beyond what was resident before it.",
        f"torch {torch.__version__}, transformers {version('transformers')}, "
        f"peft {version('peft')}, one CPU thread, {platform.machine()}. "
        "Made by `python benchmarks/new_tokens.py --report benchmarks/new_tokens.md`.",
        "",
        "| V | head | | a step, ms | of PEFT's | MiB at the peak |",
        "|---:|---|---|---:|---:|---:|",
    ]
    gaps = []
    for num_rows in args.rows:
        for tied in (True, False):
            measured, gap = measure(num_rows, tied)
            print("\n".join(measured), f"losses {gap:.0e} apart", flush=True)
            lines += measured
            gaps.append(gap)
    lines += ["", f"The losses of the {STEPS} steps differ by {max(gaps):.0e} at most.", ""]
    if args.report:
        args.report.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
