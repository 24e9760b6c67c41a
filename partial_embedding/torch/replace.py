"""Existing models: make their embeddings and heads partly trainable in place, and plain again."""

from __future__ import annotations

import sys
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from partial_embedding.errors import InputError, check_flags
from partial_embedding.rows import Rows
from partial_embedding.rows.rows import RowsLike
from partial_embedding.rows.vocabulary import Ids
from partial_embedding.torch.embedding import PartialEmbedding, PartialEmbeddingBag, check_sparse
from partial_embedding.torch.head import PartialLinear
from partial_embedding.torch.rowset import shown
from partial_embedding.torch.table import PartialTable, check_model

_PARTIAL: dict[type[nn.Module], type[PartialTable]] = {
    nn.Embedding: PartialEmbedding,
    nn.EmbeddingBag: PartialEmbeddingBag,
    nn.Linear: PartialLinear,
}


def replace_embedding(
    model: nn.Module,
    name: str | nn.Module | None = None,
    trainable_rows: RowsLike = "all",
    *,
    sparse: bool = True,
) -> dict[str, nn.Module]:
    """Train only chosen rows of an embedding or a head that a model has already.

    The module stays where and what it is, with its weight, hooks and name, and becomes partly
    trainable: an `nn.Embedding` a `PartialEmbedding`, an `nn.EmbeddingBag` a
    `PartialEmbeddingBag`, an `nn.Linear` a `PartialLinear`, and a subclass that scales or casts its
    output goes on doing so. So does every other module that has the same weight: ties stay, and
    optimizers that were made before go on holding it.

    Args:
        model: Any module.
        name: The dotted name of the module or the end of it, or the module; by default the input
            embedding of a `transformers` model, or the one embedding that there is.
        trainable_rows: `"all"`, `"none"`, ids, a boolean mask of length V, a `range`, a `slice` or
            `Rows`. If there are any, the weight requires gradients from here on.
        sparse: Give the weight a sparse gradient; see `PartialEmbedding`.

    Returns:
        Every module that has the weight, by name, the one that was asked for first. Modules of
        other kinds, which only share the weight, are left as they are: the gradient that they give
        loses its frozen rows too.

    Raises:
        InputError: The name fits no module or several weights, the rows do not fit the table or
            differ from those of a table that it is tied to, or the weight is quantized or sharded.
            The model is then as it was.

    Example:
        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
        >>> model[1].weight = model[0].weight
        >>> list(replace_embedding(model, "0", trainable_rows=[8, 9]))
        ['0', '1']
        >>> model
        Sequential(
          (0): PartialEmbedding(10, 4, sparse=True, trainable_rows=2)
          (1): PartialLinear(in_features=4, out_features=10, bias=False, trainable_rows=2)
        )
    """
    table = find_table(model, name)
    check_replaceable(model, table, sparse)
    ids = _checked_rows(model, table, trainable_rows)
    return train_only(model, table, ids, sparse)


def restore_embedding(model: nn.Module) -> list[str]:
    """Make all partly trainable tables of a model plain ones again, with the rows they learned.

    Modules, weights, ties and keys stay what they are. Call
    `partial_embedding.torch.detach_rowwise` first on an optimizer that goes on being used.

    Args:
        model: Any module.

    Returns:
        The names of the modules.

    Raises:
        InputError: A table is of a class of your own that is derived from one of this library's.
            The model is then as it was.

    Example:
        >>> model = nn.Sequential(nn.Embedding(10, 4))
        >>> _ = replace_embedding(model, trainable_rows=[8, 9])
        >>> restore_embedding(model)
        ['0']
        >>> model
        Sequential(
          (0): Embedding(10, 4)
        )
    """
    check_model(model)
    tables = {n: m for n, m in model.named_modules() if isinstance(m, PartialTable)}
    plain = {name: _plain_class(name, type(table)) for name, table in tables.items()}
    if "peft" in sys.modules:
        from partial_embedding.torch.peft_rows import leave_adapters

        leave_adapters(model)
    for name, table in tables.items():
        _make_plain(table, plain[name])
    return list(tables)


# Finding


def find_table(model: nn.Module, name: str | nn.Module | None) -> Any:
    """The embedding or head that is meant, as for `replace_embedding`.

    Raises:
        InputError: There is none, there are several, or its weight is no plain matrix.
    """
    check_model(model)
    candidates: dict[str, Any] = {
        path: module
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, tuple(_PARTIAL))
    }
    if isinstance(name, str):
        fitting = {n: m for n, m in candidates.items() if n == name} or {
            n: m for n, m in candidates.items() if n.endswith(f".{name}")
        }
    elif name is not None:
        fitting = {n: m for n, m in candidates.items() if m is name}
    else:
        fitting = _input_embeddings(model, candidates)
    if len({id(module.weight) for module in fitting.values()}) != 1:
        asked = "no name" if name is None else f"a {type(name).__name__}"
        asked = repr(name) if isinstance(name, str) else asked
        embeddings = [n for n, m in candidates.items() if not isinstance(m, nn.Linear)]
        listed = ", ".join(map(repr, fitting or embeddings)) or "none"
        raise InputError(
            f"one embedding or linear layer is meant. Received {asked}, which fits "
            f"{len(fitting) or 'none'}; {'these' if fitting else 'the embeddings'} are: {listed}. "
            "Pass a whole name, or the module."
        )
    (path, found), *_ = fitting.items()
    _check_weight(path, found)
    return found


def _input_embeddings(model: Any, candidates: dict[str, Any]) -> dict[str, Any]:
    embeddings = {n: m for n, m in candidates.items() if not isinstance(m, nn.Linear)}
    if not callable(getattr(model, "get_input_embeddings", None)):
        return embeddings
    try:
        asked = model.get_input_embeddings()
        # Of one that has another for some of its tokens, as IDEFICS has, itself.
        within = {asked} if isinstance(asked, nn.Embedding) else set(asked.modules())
    except (NotImplementedError, AttributeError):  # a model without words, such as one for sound
        return embeddings
    return {name: module for name, module in embeddings.items() if module in within}


def users_of(model: nn.Module, table: Any) -> list[tuple[str, nn.Module]]:
    """The modules that have a table's weight, by name, the table itself first."""
    having = [
        (name, module)
        for name, module in model.named_modules()
        if any(parameter is table.weight for parameter in module._parameters.values())
    ]
    return sorted(having, key=lambda item: item[1] is not table)


# Checks, before anything is changed


def _check_weight(name: str, module: Any) -> None:
    weight = module._parameters.get("weight")
    if weight is None:
        raise InputError(
            f"a partly trainable weight is a parameter. Received {name!r}, whose weight is "
            "computed. Remove its parametrization first."
        )
    # Quantized and sharded weights are parameters or tensors of classes of their own.
    kinds = [k for k in (type(weight), type(weight.data)) if k not in (nn.Parameter, Tensor)]
    if kinds or not weight.is_floating_point():
        kind = kinds[0].__name__ if kinds else str(weight.dtype)
        raise InputError(
            "a partly trainable weight is a plain floating-point tensor, whole on its device. "
            f"Received {name!r}, whose weight is a {kind}. Load the model without quantization "
            "and sharding."
        )
    hook = getattr(module, "_hf_hook", None)
    if any(getattr(part, "offload", False) for part in (hook, *getattr(hook, "hooks", ()))):
        raise InputError(
            "a partly trainable weight stays on its device. Received "
            f"{name!r}, which is off-loaded between its uses. Keep it on a device in device_map."
        )
    if weight.dim() != 2:
        raise InputError(
            f"a table is a matrix of rows by columns. Received {name!r} of the shape "
            f"{tuple(weight.shape)}. Name a module with one."
        )


def check_replaceable(model: nn.Module, table: Any, sparse: bool) -> None:
    """Refuse a table that could not be replaced with all that has its weight."""
    check_flags(sparse=sparse)
    for name, module in users_of(model, table):
        if isinstance(module, PartialTable):
            continue
        _check_forward(name, module)
        by_frequency, mode = (getattr(module, n, None) for n in ("scale_grad_by_freq", "mode"))
        check_sparse(sparse, bool(by_frequency), mode, f" for {name!r}")


def _checked_rows(model: nn.Module, table: Any, trainable_rows: RowsLike) -> Ids:
    if isinstance(trainable_rows, Tensor):
        trainable_rows = trainable_rows.detach().cpu().numpy()
    ids = Rows.parse(trainable_rows).resolve(table.weight.shape[0])
    asked = torch.from_numpy(ids)
    asked = asked[asked != _padding_row(model, table)]
    for name, module in users_of(model, table):
        if not isinstance(module, PartialTable) or not module.has_frozen_rows:
            continue
        now = module.trainable_rows.cpu()
        if not torch.equal(now, asked):
            raise InputError(
                f"a table and all that is tied to it train the same rows. Received "
                f"{shown(asked)}, while {name!r} trains {shown(now)}. Call set_trainable_rows on "
                "one of them."
            )
    return ids


def _check_forward(name: str, module: Any) -> None:
    plain = next((base for base in _PARTIAL if isinstance(module, base)), None)
    if getattr(module, "max_norm", None) is None or type(module).forward is plain.forward:  # type: ignore[union-attr]  # only embeddings have a max_norm
        return
    raise InputError(
        "max_norm scales frozen rows too, but where this library does it. Received "
        f"{name!r}, a {type(module).__name__} with max_norm and a forward of its own. Use an "
        "nn.Embedding."
    )


def _padding_row(model: nn.Module, table: Any) -> int:
    rows = [getattr(module, "padding_idx", None) for _, module in users_of(model, table)]
    return next((row for row in rows if row is not None), -1)


# The change itself. A module gets another class, as torch's own parametrizations give it: it stays
# the same object, with its hooks, and whoever refers to it need not be found.


def train_only(model: nn.Module, table: Any, ids: Ids, sparse: bool) -> dict[str, nn.Module]:
    """Make a table and all that has its weight, which are returned, partly trainable.

    `find_table` and `check_replaceable` come first, and `ids` are sorted.
    """
    users = dict(users_of(model, table))
    for module in users.values():
        if isinstance(module, tuple(_PARTIAL)) and not isinstance(module, PartialTable):
            _make_partial(module, sparse)
    table.set_trainable_ids(ids)
    if getattr(model, "peft_config", None):
        from partial_embedding.torch.peft_rows import stand_beside_adapters

        stand_beside_adapters(model)
    if len(ids):
        table.weight.requires_grad_(True)
        for module in users.values():
            if isinstance(module, PartialLinear) and module.bias is not None:
                module.bias.requires_grad_(True)
    return users


def _make_partial(module: Any, sparse: bool) -> None:
    if not isinstance(module, nn.Linear):
        module._sparse_before = module.sparse
    module.sparse = sparse
    module.__class__ = _partial_class(type(module))
    module.attach()


def _make_plain(table: Any, plain: type[nn.Module]) -> None:
    table.detach()
    if isinstance(table, PartialLinear):
        vars(table).pop("sparse", None)
    else:
        table.sparse = vars(table).pop("_sparse_before", False)
    table.__class__ = plain


def _partial_class(plain: type[nn.Module]) -> type[PartialTable]:
    if (own := _PARTIAL.get(plain)) is not None:
        return own
    partial = next(partial for base, partial in _PARTIAL.items() if issubclass(plain, base))
    # First the subclass, which scales or casts what the partial table, now its parent, looks up.
    made = type(
        f"Partial{plain.__name__}",
        (plain, partial),
        {
            "__doc__": plain.__doc__,
            "__module__": plain.__module__,
            "__reduce_ex__": _reduce,
            "_plain_class": plain,
        },
    )
    return cast(type[PartialTable], made)


def _plain_class(name: str, partial: type[PartialTable]) -> type[nn.Module]:
    if "_plain_class" in vars(partial):
        return cast(type[nn.Module], vars(partial)["_plain_class"])
    for plain, own in _PARTIAL.items():
        if partial is own:
            return plain
    raise InputError(
        "tables that are made plain again are this library's own, or were replaced by it. Received "
        f"{name!r}, a {partial.__name__}. Put a module of another class in its place yourself."
    )


def _reduce(table: Any, protocol: int) -> tuple[Any, ...]:
    """How a table whose class was made here is copied and pickled: by the class it was made of."""
    return _remade, (vars(type(table))["_plain_class"],), table.__getstate__()


def _remade(plain: type[nn.Module]) -> PartialTable:
    partial = _partial_class(plain)
    return partial.__new__(partial)


# What happens to a module from outside. No hook of the module itself is asked when another takes
# its place, or when `peft` adapts the model that it is in, so these are hooks of the process.


def _stay_partial(parent: nn.Module, name: str, new: Any) -> None:
    """Where a plain module takes a table's place with its rows in another number, train the same.

    `transformers.resize_token_embeddings` does so to a head that is not tied.
    """
    old: Any = parent._modules.get(name)
    if not isinstance(old, PartialTable) or _PARTIAL.get(type(new)) is not type(old):
        return
    rows, before = new.weight, old.weight
    count = min(len(rows), len(before))
    if len(rows) == len(before) or rows.shape[1:] != before.shape[1:] or rows.is_meta:
        return
    if torch.equal(rows[:count], before[:count].to(rows)):
        _make_partial(new, old.sparse)
        new.row_set = old.row_set.resized_to(len(rows)).to(rows.device)


def _meet_peft(parent: nn.Module, name: str, part: nn.Module | None) -> nn.Module | None:
    """Let what `peft` puts into a model know the tables there."""
    if not hasattr(sys.modules.get("peft"), "PeftModel"):
        return None
    # Not at the top: peft is an optional package, and loads many others.
    from partial_embedding.torch.peft_rows import meet

    return meet(parent, name, part)


register_module_module_registration_hook(_stay_partial)
register_module_module_registration_hook(_meet_peft)  # type: ignore[arg-type]  # torch takes what it returns
