"""A text classifier from the command line: train, measure, and predict into a file; no code.

The three commands are at the end, and run in Lightning or in Keras, whichever is installed. In a
shell each begins with `partial-embedding`; here Python runs them. The files are made here: texts
with labels, and word vectors that half of the words lack.
"""

import csv
import random
from pathlib import Path

from partial_embedding.cli import main

random.seed(0)
WORDS = {
    "good": [f"good{i}" for i in range(20)],
    "bad": [f"bad{i}" for i in range(20)],
    "neither": [f"word{i}" for i in range(60)],
}


def a_text(label: str) -> str:
    return " ".join(random.choices(WORDS[label], k=4) + random.choices(WORDS["neither"], k=6))


def write_texts(path: str, count: int) -> list[str]:
    labels = [random.choice(["good", "bad"]) for _ in range(count)]
    with Path(path).open("w", newline="") as file:
        csv.writer(file).writerows([["text", "label"], *((a_text(x), x) for x in labels)])
    return labels


write_texts("reviews.csv", 400)
labels = write_texts("test.csv", 100)
known = [word for words in WORDS.values() for word in words[::2]]
lines = [f"{word} {' '.join(f'{random.gauss(0, 1):.3f}' for _ in range(16))}" for word in known]
Path("vectors.txt").write_text("\n".join(lines) + "\n")

COMMANDS = """\
fit --data.path reviews.csv --data.vectors vectors.txt --model.encoder mean --model.lr 0.02
test --ckpt_path last --data.test_path test.csv
predict --ckpt_path last --data.test_path test.csv --output predictions.csv
"""
for command in COMMANDS.splitlines():
    print(f"$ partial-embedding {command}")
    assert main(command.split()) == 0

with Path("predictions.csv").open(newline="") as file:
    predicted = [row["label"] for row in csv.DictReader(file)]
right = sum(one == other for one, other in zip(predicted, labels, strict=True)) / len(labels)
print(f"right: {right:.0%}")
assert right > 0.9
