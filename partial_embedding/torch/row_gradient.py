"""A gradient of a whole table that holds only the rows that have one.

Backward leaves a sparse gradient in `weight.grad`, which most of what looks at gradients refuses:
clipping, scaling, most optimizers. A hook of the table puts this in its place: to them it is a
dense tensor of shape (V, D), and what they commonly do to gradients costs its rows alone. Whatever
it does not know, it does to the dense tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from partial_embedding.torch.rowcopy import distinct, sum_rows

aten = torch.ops.aten


@dataclass(eq=False, slots=True)
class _Rows:
    """What a gradient holds; all that are detached from one another share it.

    Args:
        ids: The rows, int64, shape (n,); None for all rows.
        values: Their values, shape (n, D).
        summed: Whether each row occurs once, rising. Until something needs it, rows stay as
            backward gave them: the optimizer sums them anyway, in the same order.
    """

    ids: Tensor | None
    values: Tensor
    summed: bool


def _in_its_memory(name: str) -> Any:
    """A method of the dense gradient, which is held from then on."""

    def method(grad: RowGradient, *args: Any, **options: Any) -> Any:
        dense = grad.become_dense()
        result = getattr(dense, name)(*args, **options)
        return grad if result is dense else result

    return method


class RowGradient(Tensor):
    """A gradient of shape (V, D) whose rows are zero but for those that it holds.

    Args:
        ids: The rows, which may repeat, int64, shape (n,).
        values: What to add to each, shape (n, D).
        num_rows: The rows V of the table.
        summed: Whether the rows are known to be rising, without repetition.

    Example:
        >>> from partial_embedding.torch import PartialEmbedding
        >>> table = PartialEmbedding(1000, 4, trainable_rows=[2, 7])
        >>> table(torch.tensor([1, 2, 2])).sum().backward()
        >>> table.weight.grad
        RowGradient(1 of 1000 rows, 4 columns)
        >>> torch.nn.utils.clip_grad_norm_(table.weight, 1.0)
        tensor(4.)
        >>> table.weight.grad[2]
        tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """

    _held: _Rows

    # Functions come straight to `__torch_dispatch__`, and what they give is a plain tensor.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(  # noqa: D102  # the class describes its arguments
        cls, ids: Tensor | None, values: Tensor, num_rows: int, summed: bool = False
    ) -> RowGradient:
        return cls._around(_Rows(ids, values, summed), (num_rows, *values.shape[1:]))

    @classmethod
    def _around(cls, held: _Rows, shape: Sequence[int]) -> RowGradient:
        made: RowGradient = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=held.values.dtype, device=held.values.device
        )
        made._held = held
        return made

    # What it holds

    def entries(self) -> tuple[Tensor, Tensor] | None:
        """The rows, which may repeat, and what to add to each; None if all rows are held."""
        held = self._held
        return None if held.ids is None else (held.ids, held.values)

    def _summed(self) -> _Rows:
        """What is held, with repeated rows summed, as backward sums them for a dense gradient."""
        held = self._held
        if held.ids is not None and not held.summed:
            found, places = distinct(held.ids, len(self))
            held.values = sum_rows(places, held.values, len(found))
            held.ids, held.summed = found, True
        return held

    def _add(self, ids: Tensor, values: Tensor) -> None:
        """Add what another backward pass gave."""
        # Each pass is summed by itself and then added, since a dense gradient's rounding is that.
        held, other = self._summed(), RowGradient(ids, values, len(self))._summed()
        assert held.ids is not None
        assert other.ids is not None
        held.ids = torch.cat([held.ids, other.ids])
        held.values, held.summed = torch.cat([held.values, other.values]), False
        self._summed()

    def to_dense(self, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        """The dense gradient, a tensor of its own."""
        held = self._held
        if held.ids is None:
            dense = held.values.clone()
        else:
            dense = sum_rows(held.ids, held.values, len(self))
        return dense if dtype is None else dense.to(dtype)

    def become_dense(self) -> Tensor:
        """Hold all rows from now on, for whoever writes into them."""
        if self._held.ids is not None:
            dense = self.to_dense()
            self._held.ids, self._held.values, self._held.summed = None, dense, True
        return self._held.values

    # What code for sparse tensors asks for

    def coalesce(self) -> Tensor:
        """A sparse tensor with each row once."""
        self._summed()
        return self.to_sparse()

    def to_sparse(self, sparse_dim: int = 1, **options: Any) -> Tensor:
        """A sparse tensor, by default along the axis of the rows alone."""
        held = self._held
        if sparse_dim != 1 or options or held.ids is None:
            return self.to_dense().to_sparse(sparse_dim, **options)
        return torch.sparse_coo_tensor(
            held.ids.unsqueeze(0),
            held.values,
            self.shape,
            check_invariants=False,
            is_coalesced=held.summed,
        )

    def is_coalesced(self) -> bool:
        """Whether each row is held once."""
        return self._summed().summed

    def indices(self) -> Tensor:
        """The rows, rising, int64, shape (1, n)."""
        return self.coalesce().indices()

    def values(self) -> Tensor:
        """The values of the rows, shape (n, D); what is written there is written here."""
        return self.coalesce().values() if self._held.ids is None else self._summed().values

    _indices, _values = indices, values

    def _nnz(self) -> int:
        return self.indices().shape[1]

    # What a tensor without memory of its own must say for itself

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        held = self._held
        if held.ids is None:
            return f"RowGradient({held.values!r})"
        count = len(self._summed().values)
        shape = f"{count} of {len(self)} rows, {math.prod(self.shape[1:])} columns"
        return f"RowGradient({shape})"

    def __deepcopy__(self, memo: dict[int, Any]) -> RowGradient:
        copied: RowGradient = memo.setdefault(id(self), self.clone())
        return copied

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        held = self._summed()
        return RowGradient, (held.ids, held.values, len(self), True)

    def tolist(self) -> Any:
        """As for a dense gradient."""
        return self.to_dense().tolist()

    def share_memory_(self) -> RowGradient:
        """Move what is held to memory that processes share."""
        held = self._held
        for one in (held.values,) if held.ids is None else (held.ids, held.values):
            one.share_memory_()
        return self

    def is_shared(self) -> bool:
        """Whether processes share what is held."""
        return bool(self._held.values.is_shared())

    # These go to memory past all of torch's functions. Here there is none, which ends the process.
    # `untyped_storage` and `data_ptr` do not: compilers ask for them, and read nothing there.
    numpy, apply_, __dlpack__ = map(_in_its_memory, ("numpy", "apply_", "__dlpack__"))

    @property
    def data(self) -> Tensor:
        """The same gradient, past autograd."""
        return self.detach()

    @data.setter
    def data(self, new: Tensor) -> None:
        # `module.to(dtype)` moves gradients so; the shape and dtype lie in torch's own part.
        Tensor.data.__set__(self, new)  # type: ignore[attr-defined]
        self._held = new._held if isinstance(new, RowGradient) else _Rows(None, new, True)

    # What torch's functions do

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares a placeholder
        cls,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Do what the rows allow on the rows, and all else on the dense tensor."""
        kwargs = kwargs or {}
        by_row = _BY_ROW.get(func)
        result = NotImplemented if by_row is None else by_row(func, *args, **kwargs)
        return _on_dense(func, args, kwargs) if result is NotImplemented else result


def entries_of(grad: Tensor) -> tuple[Tensor, Tensor] | None:
    """The rows of a gradient, which may repeat, and what to add to each; None for a dense one."""
    if isinstance(grad, RowGradient):
        return grad.entries()
    return sparse_entries(grad) if grad.layout == torch.sparse_coo else None


def sparse_entries(grad: Tensor) -> tuple[Tensor, Tensor]:
    """The same of a sparse tensor, past autograd."""
    # Not coalesced: that would sort all ids, and change the order of the sums.
    return grad._indices()[0], grad._values()


def as_tensor(grad: Tensor) -> Tensor:
    """A gradient for which `entries_of` gives None as a tensor with memory of its own."""
    return grad.become_dense() if isinstance(grad, RowGradient) else grad


def _on_dense(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    declared = func._schema.arguments

    def dense(value: Any, shared: bool) -> Any:
        if not isinstance(value, RowGradient):
            return value
        # Whoever writes into it, or takes a view to write there later, must reach what is held.
        return value.become_dense() if shared else value.to_dense()

    def given(value: Any, argument: Any) -> Any:
        shared = argument is not None and argument.alias_info is not None
        return tree_map(lambda leaf: dense(leaf, shared), value)

    by_name = {argument.name: argument for argument in declared}
    result = func(
        *(given(value, argument) for value, argument in zip(args, declared, strict=False)),
        **{name: given(value, by_name.get(name)) for name, value in kwargs.items()},
    )
    first = declared[0].alias_info if declared else None
    writes = first is not None and first.is_write
    return args[0] if writes and args and isinstance(args[0], RowGradient) else result


def _values(value: Any) -> Any:
    return value._summed().values if isinstance(value, RowGradient) else value


_DIVISIONS = {aten.div.Tensor, aten.div_.Tensor}
_DIVISIONS |= {aten._foreach_div_.Tensor, aten._foreach_div_.Scalar}


def _keep_zero(func: Any, values: Iterable[Any]) -> bool:
    """Whether all tensors hold one number by which zero, times or through it, stays zero."""
    for value in tree_leaves(list(values)):
        if isinstance(value, Tensor):
            if value.dim() > 1 or value.numel() != 1:
                return False
            # A GPU would have to wait for the answer. There a factor that is not finite spoils the
            # rows that are held and no others.
            if value.is_cuda:
                continue
            if not value.isfinite():
                return False
        elif isinstance(value, float) and not math.isfinite(value):
            return False
        if func in _DIVISIONS and value is not None and not value:
            return False
    return True


def _mapped(func: Any, grad: Any, *others: Any, **options: Any) -> Any:
    """A function of each element that leaves zero as it is."""
    if not isinstance(grad, RowGradient) or not _keep_zero(func, others):
        return NotImplemented
    held = grad._summed()
    return RowGradient(held.ids, func(held.values, *others, **options), len(grad), True)


def _copied(func: Any, grad: RowGradient, **options: Any) -> Any:
    if options.get("layout", torch.strided) not in (None, torch.strided):
        return NotImplemented
    # A copy costs no more than that; but a sum in another dtype would round in another way.
    held = grad._held if func is aten.clone.default else grad._summed()
    values = func(held.values, **options)
    ids = None if held.ids is None else held.ids.to(values.device)
    return RowGradient(ids, values, len(grad), held.summed)


def _changed(func: Any, target: Any, *others: Any, **options: Any) -> Any:
    """A function that writes into a tensor or a list of them, and leaves zero as it is."""
    if not _keep_zero(func, others):
        return NotImplemented
    func(tree_map(_values, target), *others, **options)
    return None if isinstance(target, list) else target


def _clamped(
    func: Any, target: Any, low: float | None = None, high: float | None = None, **options: Any
) -> Any:
    low, high = options.get("min", low), options.get("max", high)
    bounds = low if low is not None else 0.0, high if high is not None else 0.0
    if any(isinstance(bound, Tensor) for bound in bounds) or not bounds[0] <= 0 <= bounds[1]:
        return NotImplemented
    func(_values(target), low, high)
    return target


def _clamped_list(func: Any, target: list[Any], bound: float) -> Any:
    lower = func is aten._foreach_clamp_min_.Scalar
    if bound > 0 if lower else bound < 0:
        return NotImplemented
    func([_values(one) for one in target], bound)
    return None


def _emptied(func: Any, target: Any) -> Any:
    def empty(grad: Any) -> Any:
        if not isinstance(grad, RowGradient):
            return grad
        held = grad._held
        held.ids, held.summed = held.values.new_zeros(0, dtype=torch.int64), True
        held.values = held.values.new_zeros(0, *held.values.shape[1:])
        return held.values

    func(tree_map(empty, target))
    return None if isinstance(target, list) else target


def _norm(func: Any, grads: Any, order: Any = 2, *others: Any, **options: Any) -> Any:
    """The norm of all elements; zeros count in none whose order is positive."""
    if any(other not in (None, False) for other in others) or not order > 0:
        return NotImplemented

    def rows(grad: Any) -> Any:
        values = _values(grad)
        # The largest of nothing is an error, and here it is zero.
        return values if values.numel() else values.new_zeros(1)

    return func(tree_map(rows, grads), order, **options)


def _shared(func: Any, grad: RowGradient) -> RowGradient:
    """Another tensor over what this one holds."""
    return RowGradient._around(grad._held, grad.shape)


def _sum(func: Any, one: Any, other: Any, alpha: float = 1) -> Any:
    if alpha != 1:
        return NotImplemented
    if not isinstance(one, RowGradient):
        one, other = other, one  # a sum is the same both ways
    added = entries_of(other) if isinstance(other, Tensor) else None
    if one.entries() is None or added is None or one.dtype != other.dtype:
        return NotImplemented
    total: RowGradient = one.clone()
    total._add(*added)
    return total


def _added(func: Any, target: Any, other: Any, alpha: Any = 1) -> Any:
    added = entries_of(other) if isinstance(other, Tensor) else None
    if added is None:
        return NotImplemented
    if isinstance(target, RowGradient):
        if alpha != 1 or target.entries() is None or target.dtype != other.dtype:
            return NotImplemented
        target._add(*added)
        return target
    if target.shape != other.shape or not isinstance(other, RowGradient):
        return NotImplemented
    # As SGD's step does. By the same function as for the whole, so that the bits are the same.
    held = other._summed()
    assert held.ids is not None
    rows = target.index_select(0, held.ids).add_(held.values, alpha=alpha)
    return target.index_copy_(0, held.ids, rows)


def _added_lists(func: Any, targets: list[Any], others: list[Any], alpha: Any = 1) -> Any:
    pairs = zip(targets, others, strict=True)
    plain = [pair for pair in pairs if not any(isinstance(one, RowGradient) for one in pair)]
    if plain:
        func([target for target, _ in plain], [other for _, other in plain], alpha=alpha)
    for target, other in zip(targets, others, strict=True):
        if isinstance(target, RowGradient) or isinstance(other, RowGradient):
            target.add_(other, alpha=alpha)


def _table() -> Iterator[tuple[Callable[..., Any], list[Any]]]:
    yield _mapped, [aten.mul.Tensor, aten.neg.default, aten.abs.default, aten.isnan.default]
    yield _mapped, [aten.div.Tensor]
    yield _copied, [aten.clone.default, aten._to_copy.default]
    yield _changed, [aten.mul_.Tensor, aten.neg_.default]
    yield _changed, [aten._foreach_mul_.Tensor, aten._foreach_mul_.Scalar]
    yield _changed, [aten._amp_foreach_non_finite_check_and_unscale_.default]
    yield _changed, [aten.div_.Tensor, aten._foreach_div_.Tensor, aten._foreach_div_.Scalar]
    yield _clamped, [aten.clamp_.default]
    yield _clamped_list, [aten._foreach_clamp_min_.Scalar, aten._foreach_clamp_max_.Scalar]
    yield _emptied, [aten.zero_.default, aten._foreach_zero_.default]
    yield _norm, [aten.linalg_vector_norm.default, aten._foreach_norm.Scalar]
    yield _shared, [aten.detach.default, aten.alias.default]
    yield _sum, [aten.add.Tensor]
    yield _added, [aten.add_.Tensor]
    yield _added_lists, [aten._foreach_add_.List]


_BY_ROW = {function: by_row for by_row, functions in _table() for function in functions}

# What was saved with a gradient in it, such as a momentum that is one, loads with weights alone.
torch.serialization.add_safe_globals([RowGradient])
