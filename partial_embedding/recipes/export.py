"""The trained table as a file of word vectors, and its vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Protocol

from pytorch_lightning import Callback, LightningModule, Trainer

from partial_embedding.files import shown
from partial_embedding.recipes.vectors import save_vectors
from partial_embedding.rows.vocabulary import Vocabulary
from partial_embedding.rows.vocabulary_file import write_vocabulary
from partial_embedding.torch import PartialEmbedding

VectorSuffix = Literal["vec", "txt", "bin", "vec.gz", "txt.gz", "bin.gz"]


class _WithTable(Protocol):
    embedding: PartialEmbedding
    vocabulary: Vocabulary


class ExportVectors(Callback):
    """Writes the trained table as word vectors, which gensim loads, when `fit` ends.

    The file is `vectors.vec`, or of another suffix, in the run's log folder. Beside it lies
    `vocabulary.tsv`: each token with its count and whether it had a vector, which
    `partial-embedding schedule` reads.

    The module has a `PartialEmbedding` named `embedding`, and the `vocabulary` of its rows.

    Args:
        suffix: Which of word2vec's formats: `vec` and `txt` are text, `bin` is binary.

    Raises:
        InputError: A value of the table is not finite, or a token has a tab or line break.
    """

    def __init__(self, suffix: VectorSuffix = "vec") -> None:
        self.suffix = suffix
        self.path: Path | None = None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        if not trainer.is_global_zero:
            return
        module: _WithTable = pl_module  # type: ignore[assignment]  # what the docstring asks for
        path = Path(trainer.log_dir or trainer.default_root_dir) / f"vectors.{self.suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        table = module.embedding.weight.detach().float().cpu().numpy()
        save_vectors(path, module.vocabulary.tokens, table)
        write_vocabulary(path.with_name("vocabulary.tsv"), module.vocabulary)
        self.path = path
        print(f"vectors: {shown(path)}")
