"""The weights of a language model that have a row for each token, and how all of them change size.

They change together or not at all: everything is found and checked first, then all new values are
made, and only assignments follow, which do not fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from partial_embedding.errors import InputError
from partial_embedding.torch.grow import mean_row, note_height, replace_rows
from partial_embedding.torch.replace import find_table

# Under which modules have what speaks of tokens.
_CONFIGURATIONS = ("config", "generation_config")
# What models and configurations call the number of rows.
_SIZES = ("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input", "n_words")


class VocabularyTables:
    """Input embeddings, output heads, and what else has an entry for each token of a vocabulary.

    Args:
        model: A `transformers` model, or one that `peft` has wrapped.

    Raises:
        InputError: The model has no such tables, or has them for two vocabularies.

    Example:
        >>> import transformers
        >>> config = transformers.GPT2Config(vocab_size=3, n_embd=4, n_layer=1, n_head=1)
        >>> tables = VocabularyTables(transformers.GPT2LMHeadModel(config))
        >>> tables.grow(2)
        >>> tables.input, tables.model.lm_head
        (Embedding(5, 4), Linear(in_features=4, out_features=5, bias=False))
    """

    def __init__(self, model: Any) -> None:
        if not callable(getattr(model, "get_input_embeddings", None)):
            raise InputError(
                "tokens are those of a model of transformers. Received a "
                f"{type(model).__name__}. For another model call replace_embedding."
            )
        self.model = model
        for name in ("get_input_embeddings", "get_output_embeddings"):
            if hasattr(_asked(model, name), "modules_to_save"):
                raise InputError(
                    "tokens are added to a model's own tables. Received a "
                    f"{type(model).__name__} in which peft has a copy of one for each adapter. "
                    "Leave input and head out of modules_to_save: the rows of new tokens learn and "
                    "are saved without."
                )
        # The modules, the input embedding first; of those that share a weight, the first.
        self.tables: list[Any] = [find_table(model, None)]
        self._heads: list[nn.Linear] = []
        for module in model.modules():
            for name in ("get_input_embeddings", "get_per_layer_input_embeddings"):
                self._add_embedding(_asked(module, name))
            # What BART and its like make their tables of, and Marian keeps beside its own two.
            self._add_embedding(getattr(module, "shared", None))
        for module in model.modules():
            self._add_head(_asked(module, "get_output_embeddings"))
        self._check_one_vocabulary()
        self._beside = list(self._find_beside())

    @property
    def input(self) -> Any:
        """The input embedding."""
        return self.tables[0]

    @property
    def num_rows(self) -> int:
        """The rows that every table has."""
        return min(len(table.weight) for table in self.tables)

    def parameters(self) -> Iterator[tuple[Any, str]]:
        """Tables and their parameters' names: the weights, and the biases of heads, each once."""
        seen = {id(None)}
        for table in self.tables:
            for attribute in ("weight", "bias"):
                parameter = getattr(table, attribute, None)
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield table, attribute

    # Finding

    def _add(self, module: Any) -> None:
        shared = any(table.weight is module.weight for table in self.tables)
        # A head that is tied to a table and has a bias is one more table.
        if not shared or getattr(module, "bias", None) is not None:
            self.tables.append(find_table(self.model, module))

    def _add_embedding(self, embedding: Any) -> None:
        # A table of another size belongs to a tokenizer of its own, as InstructBLIP's second one.
        if isinstance(embedding, nn.Embedding) and len(embedding.weight) == len(self.input.weight):
            self._add(embedding)

    def _add_head(self, head: Any) -> None:
        if head is None:
            return
        linear = next((m for m in head.modules() if isinstance(m, nn.Linear)), None)
        if linear is None:
            raise InputError(
                "an output head is a linear layer, not quantized (GPTQ, AWQ and HQQ make another "
                f"of it). Received a {type(head).__name__}. Load the head as it is, or train rows "
                "of the input alone, with replace_embedding."
            )
        if not any(linear is known for known in self._heads):
            self._heads.append(linear)
            self._add(linear)

    def _check_one_vocabulary(self) -> None:
        for module in self.model.modules():
            config = getattr(module, "config", None)
            shared = getattr(config, "share_encoder_decoder_embeddings", True)
            decoder = getattr(module, "decoder", None) if hasattr(module, "encoder") else None
            own = _asked(decoder, "get_input_embeddings")
            first = _asked(module, "get_input_embeddings")
            two_sizes = isinstance(own, nn.Embedding) and len(own.weight) != len(self.input.weight)
            if not shared or (two_sizes and first is self.input):
                raise InputError(
                    "a token has the same row in every table. Received a "
                    f"{type(module).__name__} whose encoder and decoder have a vocabulary each. "
                    "Call resize_token_embeddings and replace_embedding for each table."
                )
        for table in self.tables:
            for option in ("num_additional_embeddings", "out_additional_features"):
                if getattr(table, option, 0):
                    raise InputError(
                        "a token's row lies in one table. Received a "
                        f"{type(table).__name__} with {option}={getattr(table, option)}, whose "
                        "last tokens have another. Train that one with replace_embedding."
                    )

    def _find_beside(self) -> Iterator[tuple[nn.Module, str]]:
        """What lies beside a head with an entry for each token, such as BART's logits bias."""
        known = {id(getattr(table, attribute)) for table, attribute in self.parameters()}
        for head in self._heads:
            parent = _parent_of(self.model, head)
            whole = parent.modules() if not hasattr(parent, "config") else [parent]
            for owner in whole:
                for name, value in (*owner._parameters.items(), *owner._buffers.items()):
                    if value is None or id(value) in known or len(head.weight) not in value.shape:
                        continue
                    if value.numel() != len(head.weight):
                        raise InputError(
                            "a head is one linear layer. Received a "
                            f"{type(parent).__name__} that has {name!r} of the shape "
                            f"{tuple(value.shape)} too. For such a model call replace_embedding."
                        )
                    known.add(id(value))
                    yield owner, name

    # Changing

    def check_can_change(self) -> None:
        """Refuse a model in which an adapter has wrapped a table, which cannot grow then."""
        for name in ("get_input_embeddings", "get_output_embeddings"):
            found = _asked(self.model, name)
            if hasattr(found, "base_layer") or hasattr(found, "original_module"):
                raise InputError(
                    "tables that grow are the model's own. Received a "
                    f"{type(self.model).__name__} in which a {type(found).__name__} wraps one, "
                    "which does not grow. Leave input and head out of what peft adapts."
                )

    def grow(self, count: int) -> None:
        """Give each table more rows: the mean of those that it has."""
        self.change(lambda rows: torch.cat([rows, mean_row(rows).expand(count, *rows.shape[1:])]))

    def change(self, make: Callable[[Tensor], Tensor]) -> None:
        """Replace the rows of all tables, and what else has an entry for each token.

        `make` gives the new rows of the old ones. A model whose tables cannot change is refused.
        """
        self.check_can_change()
        before = {len(table.weight) for table in self.tables}
        parameters = [getattr(table, attribute) for table, attribute in self.parameters()]
        with torch.no_grad():
            made = [make(parameter.data) for parameter in parameters]
            beside = [
                (owner, name, make(getattr(owner, name).data.flatten()))
                for owner, name in self._beside
            ]
        gain = len(made[0]) - len(parameters[0])
        for parameter, rows in zip(parameters, made, strict=True):
            replace_rows(parameter, rows)
        for owner, name, values in beside:
            old = getattr(owner, name)
            old.data = values.view(*old.shape[:-1], -1)
        for table in self.tables:
            note_height(self.model, table)
        self._write_sizes({rows: rows + gain for rows in before})

    def _write_sizes(self, sizes: dict[int, int]) -> None:
        # Each once: what one size becomes may be another.
        for owner in (*self.model.modules(), *configurations_in(self.model)):
            for name in _SIZES:
                now = vars(owner).get(name)
                if type(now) is int and now in sizes:
                    setattr(owner, name, sizes[now])


def _asked(module: Any, name: str) -> Any:
    try:
        return getattr(module, name)()
    except (NotImplementedError, AttributeError):  # a part without words, such as one for images
        return None


def _parent_of(model: nn.Module, module: nn.Module) -> nn.Module:
    path = next(path for path, found in model.named_modules() if found is module)
    return model.get_submodule(path.rpartition(".")[0])


def configurations_in(model: nn.Module) -> Iterator[Any]:
    """The configurations of `transformers` in a model, and those within them, each once."""
    found = [getattr(m, name, None) for m in model.modules() for name in _CONFIGURATIONS]
    seen: set[int] = set()
    for config in found:  # it grows as it goes
        if hasattr(config, "to_dict") and id(config) not in seen:
            seen.add(id(config))
            yield config
            found += vars(config).values()
