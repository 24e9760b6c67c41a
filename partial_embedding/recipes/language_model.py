"""New tokens for a causal language model: texts, and a model of which only their rows learn."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from partial_embedding.errors import InputError
from partial_embedding.files import shown
from partial_embedding.recipes.causal_model import CausalModel, TextLines, pretrained
from partial_embedding.recipes.small_language_model import small_language_model
from partial_embedding.recipes.text import stdlib_docstrings
from partial_embedding.recipes.text.reading import read_texts
from partial_embedding.rows.token_text import printable
from partial_embedding.torch import add_tokens
from partial_embedding.torch.row_files import save_rows

# Texts that are compared before and after, and new tokens whose neighbours are shown.
_COMPARED = 32
_SHOWN = 5
_NEIGHBOURS = 3


class TokenTexts(TextLines):
    """Texts, and the tokens that a language model is to learn from them.

    Only texts with a new token are trained on: no other has anything to teach.

    Args:
        tokens: The new tokens, or a file with one on each line.
        max_length: As for `TextLines`, and so are all others.
        batch_size: Likewise.
        **settings: Likewise.

    Example:
        >>> data = TokenTexts(["iterable"])
        >>> data.setup("fit")
        >>> data.tokens, len(data.training) > 2000
        (['iterable'], True)
    """

    def __init__(
        self, tokens: list[str] | str, max_length: int = 64, batch_size: int = 16, **settings: Any
    ) -> None:
        super().__init__(max_length=max_length, batch_size=batch_size, **settings)
        self.tokens = read_texts(tokens) if isinstance(tokens, str) else tokens

    def default_texts(self) -> Sequence[str]:
        """The docstrings of the standard library."""
        return stdlib_docstrings().texts

    def chosen(self, texts: list[str], module: CausalModel) -> list[str]:
        """Those of some texts in which the tokenizer finds a new token; none at all is refused."""
        found = self.with_new_tokens(texts, module)
        if not found:
            raise InputError(
                "new tokens are learned from texts that have them. Received none with any of "
                f"{', '.join(self.tokens[:_SHOWN])} among {len(texts)}. Check their spelling, or "
                "name texts that have them as data.path."
            )
        return found

    def with_new_tokens(self, texts: list[str], module: CausalModel) -> list[str]:
        """Those of some texts in which the tokenizer finds a new token; there may be none."""
        new = set(module.tokenizer.convert_tokens_to_ids(self.tokens))
        return [text for text in texts if new & set(module.tokenizer(text)["input_ids"])]

    def without_tokens(self, texts: list[str]) -> list[str]:
        """Some texts but for the new tokens, as for a model to which they are new."""
        new = re.compile("|".join(map(re.escape, self.tokens)), re.IGNORECASE)
        return [new.sub(" ", text) for text in texts]


class NewTokens(CausalModel):
    """A causal language model that learns the rows of new tokens, and nothing else.

    It says before and after training what the loss is on held-out texts with and without the new
    tokens, how far the logits of texts without them are from the original model's, and which
    tokens are nearest to the new ones; then the rows lie in `rows.safetensors` beside the log, and
    the whole model in a folder that plain `transformers` loads.

    Args:
        name: A model of the Hugging Face hub or a local folder. By default a small one, randomly
            initialized and trained here, in less than a minute, on the texts without the tokens.
        init: What new rows begin from, as for `add_tokens`.
        lr: The learning rate of AdamW.
        weight_decay: The weight decay of AdamW.
        max_new_tokens: How many tokens `predict` adds to a prompt.
    """

    def __init__(
        self,
        name: str | None = None,
        init: Literal["pieces", "mean"] = "pieces",
        lr: float = 1e-2,
        weight_decay: float = 0.01,
        max_new_tokens: int = 20,
    ) -> None:
        super().__init__(lr, weight_decay, max_new_tokens)
        self.rows: list[int] = []

    def setup(self, stage: str) -> None:
        """Load the model, or train a small one, and add the tokens; a checkpoint has all of it."""
        if self.rows or stage != "fit":
            return
        data = self.data_of(TokenTexts)
        name = self.hparams["name"]
        self.model, self.tokenizer = (
            pretrained(name) if name else small_language_model(data.without_tokens(data.training))
        )
        # A token that the original model does not know cannot be in a text compared with it.
        validation = zip(data.validation, data.without_tokens(data.validation), strict=True)
        unchanged = [text for text, rest in validation if text == rest]
        self._unchanged = unchanged[:_COMPARED]
        self._columns = self.model.get_input_embeddings().weight.shape[0]
        self._logits = self._logits_of(self._unchanged, data.max_length)
        self.rows = add_tokens(self.model, self.tokenizer, data.tokens, self.hparams["init"])
        self.train_tables(self.rows)

    def _logits_of(self, texts: list[str], max_length: int) -> Tensor:
        """The logits of the original tokens, one after the other, shape (N, V)."""
        logits = [
            output.logits[batch["attention_mask"] > 0][:, : self._columns].cpu()
            for batch, output in self.measured(texts, max_length, _COMPARED)
        ]
        return torch.cat(logits) if logits else torch.zeros(0, self._columns)

    def _mean_loss(self, texts: list[str], data: TokenTexts) -> float:
        total, count = self.total_loss(texts, data.max_length, data.batch_size)
        return total / count if count else float("nan")

    # Before and after

    def _say(self, when: str) -> None:
        data = self.data_of(TokenTexts)
        having = data.with_new_tokens(data.validation, self)
        known = set(having)
        without = [text for text in data.validation if text not in known][: 4 * _COMPARED]
        self.print(
            f"{when}: loss on {len(having)} texts with new tokens "
            f"{self._mean_loss(having, data):.3f}, on {len(without)} without "
            f"{self._mean_loss(without, data):.3f}"
        )
        now = self._logits_of(self._unchanged, data.max_length)
        apart = (now - self._logits).abs().max().item() if len(now) else 0.0
        self.print(
            f"{when}: logits of {len(self._unchanged)} texts without new tokens differ from the "
            f"original model's by {apart:.1e} at most"
        )
        for row in self.rows[:_SHOWN]:
            near = f"near {self.vocabulary.tokens[row]!r}: {self._nearest(row)}"
            self.print(f"{when}: {printable(near)}")

    @torch.no_grad()
    def _nearest(self, row: int) -> str:
        table = self.model.get_input_embeddings().weight
        near = F.cosine_similarity(table, table[row : row + 1])
        near[row] = -2  # less than any cosine: it is not its own neighbour
        best = near.topk(min(_NEIGHBOURS, len(near))).indices.tolist()
        return ", ".join(f"{self.vocabulary.tokens[i]} {near[i]:.2f}" for i in best)

    def on_train_start(self) -> None:
        """Say what the model can do with the new tokens so far."""
        self._say("before")

    def on_train_end(self) -> None:
        """Say what it has learned, and write the rows and the model."""
        self._say("after")
        if self.trainer.is_global_zero and self.trainer.log_dir:
            path = Path(self.trainer.log_dir) / "rows.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            save_rows(self.model, path, self.tokenizer)
            print(f"rows: {shown(path)}")
        super().on_train_end()
