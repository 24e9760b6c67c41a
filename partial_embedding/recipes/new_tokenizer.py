"""Another tokenizer for a language model, of another field: its rows learn before the others."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from partial_embedding.recipes.causal_model import CausalModel, TextLines, pretrained
from partial_embedding.recipes.small_language_model import small_language_model, small_tokenizer
from partial_embedding.recipes.text import stdlib_docstrings
from partial_embedding.recipes.text.docstrings import source_of
from partial_embedding.torch import transfer_vocabulary

_MODULES = """
    argparse ast asyncio.base_events calendar collections configparser csv datetime difflib
    email.message fractions gettext http.client inspect ipaddress json.encoder logging mailbox
    optparse pathlib pickle shutil statistics tarfile textwrap threading urllib.parse zipfile
"""
# Characters of a text: enough to tell something, and whole within the length of a small model.
_SHORTEST, _LONGEST = 40, 160


class FieldTexts(TextLines):
    """Texts of the field that a language model is moved to.

    By default paragraphs of the source code of the standard library, a field that its documentation
    tells little of. Its arguments are those of `TextLines`.

    Example:
        >>> data = FieldTexts()
        >>> data.setup("fit")
        >>> len(data.training) > 1000, len(data.validation) > 250
        (True, True)
    """

    def default_texts(self) -> list[str]:
        """Paragraphs of source code."""
        return stdlib_code()


class NewTokenizer(CausalModel):
    """A causal language model that gets a tokenizer of another field.

    Tokens that both tokenizers have keep their rows, which a schedule may unfreeze; the others,
    `missing`, begin from their old pieces. It says what the loss per byte of held-out texts is with
    the old tokenizer, with the new one before training, after the first stage and at the end: a
    byte is the same for both, a token is not.

    Args:
        name: A model of the Hugging Face hub or a local folder. By default a small one, trained
            here on the documentation of the standard library.
        new_tokenizer: The tokenizer that it gets, likewise. By default one of `num_tokens`, trained
            on the texts.
        num_tokens: The tokens of that one.
        body: Train what is not a table, too.
        steps: The optimizer steps that train the small model.
        lr: The learning rate of AdamW.
        weight_decay: The weight decay of AdamW.
        max_new_tokens: How many tokens `predict` adds to a prompt.
        seed: Of the small model.
    """

    def __init__(
        self,
        name: str | None = None,
        new_tokenizer: str | None = None,
        num_tokens: int = 600,
        body: bool = False,
        steps: int = 300,
        lr: float = 3e-3,
        weight_decay: float = 0.01,
        max_new_tokens: int = 20,
        seed: int = 0,
    ) -> None:
        super().__init__(lr, weight_decay, max_new_tokens)
        # The loss per byte, by when it was measured.
        self.losses: dict[str, float] = {}

    def setup(self, stage: str) -> None:
        """Load the model, or train a small one, and move it; a checkpoint has all of it."""
        if self.model is not None or stage != "fit":
            return
        data = self.data_of(FieldTexts)
        own = self.hparams
        self.model, self.tokenizer = (
            pretrained(own["name"])
            if own["name"]
            else small_language_model(stdlib_docstrings().texts, own["steps"], own["seed"])
        )
        self._measure("before")
        new = (
            pretrained(own["new_tokenizer"])[1]
            if own["new_tokenizer"]
            else small_tokenizer(data.training, own["num_tokens"])
        )
        rows = transfer_vocabulary(self.model, self.tokenizer, new)
        self.tokenizer = new
        counts = Counter(row for text in data.training for row in new(text)["input_ids"])
        self.train_tables(rows, counts, own["body"])
        self.print(f"{len(self.vocabulary)} tokens, of which {len(rows)} are new")

    def _measure(self, when: str) -> None:
        data = self.data_of(FieldTexts)
        total, _ = self.total_loss(data.validation, data.max_length, data.batch_size)
        self.losses[when] = total / sum(map(self._bytes, data.validation))
        self.print(f"{when}: loss per byte {self.losses[when]:.4f}")

    def _bytes(self, text: str) -> int:
        """The bytes that the loss is of: the first token is predicted from nothing."""
        found = self.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        return len(text[found[0][1] :].encode()) if found else 0

    def on_train_start(self) -> None:
        """Say what the model can do with the new tokenizer so far."""
        self._measure("after the initialisation")
        self._first = self._trainable()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Say, where other rows begin to train, what the first stage has brought."""
        if "after the first stage" not in self.losses and self._trainable() != self._first:
            self._measure("after the first stage")

    def _trainable(self) -> int:
        return len(self.model.get_input_embeddings().trainable_rows)

    def on_train_end(self) -> None:
        """Say what it has learned, and write the model."""
        self._measure("at the end")
        super().on_train_end()


def stdlib_code() -> list[str]:
    """Give some thousand paragraphs of the standard library's source code, always in one order.

    Example:
        >>> all(40 <= len(text) <= 160 for text in stdlib_code())
        True
    """
    texts: dict[str, None] = {}
    for name in _MODULES.split():
        for paragraph in re.split(r"\n\s*\n", source_of(name)):
            text = " ".join(paragraph.split())
            if _SHORTEST <= len(text) <= _LONGEST and '"""' not in text and text[0] != "#":
                texts[text] = None
    return list(texts)
