"""Make a torch optimizer step the trainable rows of tables, and nothing else of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from partial_embedding.errors import InputError
from partial_embedding.torch.ddp import average, group_of
from partial_embedding.torch.inspection import Anatomy, examine, first_state
from partial_embedding.torch.row_parameters import RowParameter, row_parameters_in
from partial_embedding.torch.saving import (
    KEY,
    check_state_dict,
    from_state_dict,
    into_state_dict,
)
from partial_embedding.torch.table_state import Block, TableState, clear_history
from partial_embedding.torch.trial import Group, State

OptimizerT = TypeVar("OptimizerT", bound=Optimizer)


def rowwise(optimizer: OptimizerT, model: nn.Module, lazy: bool = False) -> OptimizerT:
    """Make an optimizer step only the trainable rows of the tables in a model.

    While the optimizer's own maths runs, a table's entry in `param_groups` is replaced by compact
    parameters, one for each cohort of rows; then the rows are written back and the entry returns.
    Frozen rows are thus out of reach of weight decay, momentum and everything else, trainable ones
    move as parameters of their own, and time and memory follow their number.

    Args:
        optimizer: Any `torch.optim.Optimizer` whose state is per row or shared by all rows.
        model: The module whose `PartialEmbedding`s the optimizer holds.
        lazy: Step only the rows that the batch touched, as `torch.optim.SparseAdam` does; the step
            count is shared by the cohort. For optimizers that move each row by itself.

    Returns:
        The same optimizer. A deep copy of it is a plain one: torch copies no hooks.

    Raises:
        InputError: The optimizer cannot be served exactly, is prepared already, or holds none of
            the model's tables.

    Example:
        >>> from partial_embedding.torch import PartialEmbedding
        >>> table = PartialEmbedding(10, 4, trainable_rows=[7, 2])
        >>> before = table.weight.detach().clone()
        >>> optimizer = rowwise(torch.optim.AdamW(table.parameters(), weight_decay=0.1), table)
        >>> table(torch.tensor([1, 2])).sum().backward()
        >>> optimizer.step()
        >>> (table.weight != before).any(dim=1).nonzero().flatten()
        tensor([2, 7])
    """
    Rowwise(optimizer, model, lazy)
    return optimizer


def detach_rowwise(optimizer: Optimizer) -> None:
    """Make an optimizer a plain one again; its state of the tables begins afresh.

    Args:
        optimizer: An optimizer that `rowwise` prepared.

    Raises:
        InputError: It was not prepared.
    """
    handle = prepared(optimizer)
    if handle is None:
        raise InputError(
            f"only an optimizer that rowwise prepared can be detached. Received a plain "
            f"{type(optimizer).__name__}."
        )
    handle.detach()


def average_gradients(optimizer: Optimizer) -> None:
    """Average the gradients of tables over the processes of `distributed_data_parallel`.

    Call it in every process after each backward pass that a step follows, before gradients are
    unscaled or clipped and before other rows are set. The Lightning callback does so by itself.
    Nothing is done for tables that are not wrapped, or that `DistributedDataParallel` reduces.

    Args:
        optimizer: An optimizer that `rowwise` prepared.

    Raises:
        InputError: It was not prepared, or processes train different rows.
    """
    handle = prepared(optimizer)
    if handle is None:
        raise InputError(
            "gradients of tables are averaged for an optimizer that rowwise prepared. Received a "
            f"plain {type(optimizer).__name__}. Call rowwise(optimizer, model) first."
        )
    handle.average()


def prepared(optimizer: Optimizer) -> Rowwise | None:
    """What `rowwise` attached to an optimizer, or None.

    Args:
        optimizer: Any optimizer.
    """
    return getattr(optimizer, "_rowwise", None)


class Rowwise:
    """The hooks on one optimizer, and the state of its tables.

    Args:
        optimizer: The optimizer to prepare.
        model: The module whose tables it holds.
        lazy: Step only rows that the batch touched.

    Raises:
        InputError: As for `rowwise`.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module, lazy: bool) -> None:
        if prepared(optimizer) is not None:
            raise InputError(
                "an optimizer is prepared once. Received one that is. Call detach_rowwise first."
            )
        self.optimizer = optimizer
        self.tables: dict[int, TableState] = {}  # by the id of the weight
        held = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for name, table in row_parameters_in(model):
            if (group := held.get(id(table.weight))) is not None:
                self._add(name, table, group, lazy)
        if not self.tables:
            raise InputError(
                f"the optimizer holds the weight of a table. Received {type(optimizer).__name__} "
                "without any of the model's PartialEmbeddings. Build it from model.parameters()."
            )
        # Whatever the optimizer remembers already, of its own or from a checkpoint of ours.
        check_state_dict(optimizer, self.tables, vars(optimizer))
        from_state_dict(optimizer, self.tables)
        self._entered: list[tuple[Group, list[nn.Parameter], list[str] | None]] = []
        self._blocks: list[tuple[TableState, Block, Group, Group]] = []
        self._stepping = False
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_state_dict_pre_hook(self._before_saving),
            optimizer.register_state_dict_post_hook(self._save),
            optimizer.register_load_state_dict_pre_hook(self._before_loading),
            optimizer.register_load_state_dict_post_hook(self._load),
        ]
        vars(optimizer)["_rowwise"] = self

    def _add(self, name: str, table: RowParameter, group: Group, lazy: bool) -> None:
        options = {key: value for key, value in group.items() if key != KEY}
        anatomy = examine(self.optimizer, options, table.weight)
        if lazy and not anatomy.elementwise:
            raise InputError(
                "lazy=True is for optimizers that move each row by itself. Received "
                f"{type(self.optimizer).__name__}, which looks across rows. Leave lazy=False."
            )
        unscaled = _why_unscaled(self.optimizer, anatomy, group)
        self.tables[id(table.weight)] = TableState(name, table, anatomy, lazy, unscaled)

    # Among several processes

    def average(self) -> None:
        """Average the gradients of tables that DDP leaves; all processes call this."""
        found: dict[Any, dict[str, RowParameter]] = {}
        for state in self.tables.values():
            if (group := group_of(state.table)) is not None:
                found.setdefault(group, {})[state.name] = state.table
        for group, tables in found.items():
            average(tables, group)
            for parameter in tables.values():
                parameter.table.is_averaged = True

    def _check_averaged(self) -> None:
        for state in self.tables.values():
            parameter = state.table
            if parameter.weight.grad is None or parameter.table.is_averaged:
                continue
            if group_of(parameter) is not None:
                raise InputError(
                    "gradients of tables are averaged over all processes before a step. Received "
                    f"that of {state.name!r} as this process made it. Call "
                    "average_gradients(optimizer) after backward; in Lightning, call "
                    "self.manual_backward(loss) for loss.backward()."
                )

    # Around the optimizer's maths

    @torch.no_grad()
    def enter(self) -> None:
        """Put compact parameters in the place of the tables.

        Raises:
            InputError: A gradient that the processes should share was not averaged.
        """
        self.leave()
        self._check_averaged()
        for group in list(self.optimizer.param_groups):
            params: list[nn.Parameter] = group["params"]
            if not any(id(p) in self.tables for p in params):
                continue
            names = group.get("param_names")
            self._entered.append((group, list(params), names))
            stand_ins: list[nn.Parameter] = []
            stand_in_names: list[str] = []
            for i, param in enumerate(params):
                table = self.tables.get(id(param))
                made = [param] if table is None else self._stand_in(table, group)
                stand_ins += made
                stand_in_names += [names[i]] * len(made) if names else []
            if not stand_ins and isinstance(self.optimizer, LBFGS):
                # It cannot flatten nothing, and a gradient of zero ends its step at once.
                stand_ins.append(nn.Parameter(torch.zeros(1, device=params[0].device)))
            if names:
                group["param_names"] = stand_in_names
            params[:] = stand_ins  # in place: LBFGS keeps the list itself

    def _stand_in(self, table: TableState, group: Group) -> list[nn.Parameter]:
        table.follow_rows()
        blocks = list(table.blocks(self.optimizer, group))
        shared: list[nn.Parameter] = []
        for block in blocks:
            if not table.anatomy.flat:
                self.optimizer.state[block.parameter] = table.lend_state(block)
            stepped_in = group
            cohort = block.cohort
            alone = table.anatomy.in_group or not cohort.rate_scale.is_plain
            if alone or (group.get("fused") and cohort.is_new):
                # A count or a rate kept in the group would be one for all cohorts, and fused
                # kernels cannot mix first steps with later ones: such a cohort steps in a group of
                # its own, which no learning-rate scheduler sees.
                stepped_in = self._group_for(block, table, group)
                self.optimizer.param_groups.append(stepped_in)
            else:
                shared.append(block.parameter)
            self._blocks.append((table, block, group, stepped_in))
        return shared

    def _group_for(self, block: Block, table: TableState, group: Group) -> Group:
        own = {k: v for k, v in group.items() if k not in table.anatomy.in_group}
        begun = copy.deepcopy(table.anatomy.begun)  # some optimizers count in place
        if "param_names" in own:
            own["param_names"] = [table.name]
        if not (rate_scale := block.cohort.rate_scale).is_plain:
            own["lr"] = own["lr"] * rate_scale.factor(block.cohort.steps)
        return {**own, **begun, **block.cohort.group_state, "params": [block.parameter]}

    def _count_steps(self) -> None:
        """Count a step for each cohort that warms up; called when one was really made."""
        scaled = [block for _, block, _, _ in self._blocks if not block.cohort.rate_scale.is_plain]
        if not scaled:
            return
        # A fused optimizer is called by the scaler also where it then skips the step by itself.
        found_inf = getattr(self.optimizer, "found_inf", None)
        if found_inf is not None and found_inf:
            return
        for block in scaled:
            block.cohort.steps += block.parameter.grad is not None

    def _follow_history(self) -> None:
        """Clear LBFGS's one flat history for all parameters when its length no longer fits."""
        changed = [table.follow_rows() for table in self.tables.values() if table.anatomy.flat]
        if any(changed):
            clear_history(self.optimizer)

    @torch.no_grad()
    def leave(self) -> None:
        """Write the rows back and put the tables into their place again; idle when not entered."""
        self._stepping = False
        if not self._entered:
            return
        blocks, self._blocks = self._blocks, []
        entered, self._entered = self._entered, []
        # The groups first, so that an error below leaves an optimizer that holds its tables.
        temporary = {
            id(stepped_in) for _, _, group, stepped_in in blocks if stepped_in is not group
        }
        groups = self.optimizer.param_groups
        groups[:] = [group for group in groups if id(group) not in temporary]
        for group, params, names in entered:
            group["params"][:] = params
            if names:
                group["param_names"] = names
        states = [self.optimizer.state.pop(block.parameter, {}) for _, block, _, _ in blocks]
        for (table, _, _, _), state in zip(blocks, states, strict=True):
            table.check_state(state, self.optimizer)
        for (table, block, group, stepped_in), state in zip(blocks, states, strict=True):
            table.take_back(block, state, self.optimizer, _options(block, group, stepped_in))
            if block.parameter.grad is None:
                table.table.weight.grad = None  # zeroed by whoever saw the block
            if stepped_in is not group:
                keys = table.anatomy.in_group & stepped_in.keys()
                block.cohort.group_state = {key: stepped_in[key] for key in keys}

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._stepping:
            self.leave()  # the last step raised before its end
        self._follow_history()  # here, since LBFGS looks its history up before the closure
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            if not self._entered:
                self.enter()
            self._stepping = True
            return None
        wrapped = self._around(closure)
        if len(args) > 1:
            return (args[0], wrapped, *args[2:]), kwargs
        return args, {**kwargs, "closure": wrapped}

    def _around(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """A closure that sees the tables, and after which the optimizer sees the blocks."""

        def evaluate() -> Any:
            self.leave()
            loss = closure()
            if not self._entered:  # Lightning has entered already, before it clipped
                self.enter()
            self._stepping = True
            return loss

        return evaluate

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._count_steps()
        self.leave()

    # Around the optimizer's state_dict

    def _before_saving(self, optimizer: Optimizer) -> None:
        self.leave()
        # Rows may have changed since the last step, and what is saved belongs to those of now.
        self._follow_history()
        for table in self.tables.values():
            table.follow_rows()

    def _save(self, optimizer: Optimizer, state_dict: State) -> State:
        return into_state_dict(optimizer, self.tables, state_dict)

    def _before_loading(self, optimizer: Optimizer, state_dict: State) -> None:
        self.leave()
        check_state_dict(optimizer, self.tables, state_dict)

    def _load(self, optimizer: Optimizer) -> None:
        from_state_dict(optimizer, self.tables)

    def detach(self) -> None:
        """Take the hooks off; state that the constructor makes is made anew."""
        self.leave()
        for hook in self._hooks:
            hook.remove()
        del vars(self.optimizer)["_rowwise"]
        for served in self.tables.values():
            served.table.ask_about_rates(None)
        if any(table.anatomy.flat for table in self.tables.values()):
            clear_history(self.optimizer)
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                table = self.tables.get(id(param))
                if table is not None and table.anatomy.eager:
                    self.optimizer.state[param] = first_state(self.optimizer, group, param)


def _options(block: Block, group: Group, stepped_in: Group) -> Group:
    """The user's group with the learning rate that the block was stepped at."""
    return group if block.cohort.rate_scale.is_plain else {**group, "lr": stepped_in["lr"]}


def _why_unscaled(optimizer: Optimizer, anatomy: Anatomy, group: Group) -> str | None:
    """Why rows cannot have a learning rate of their own, or None where they can."""
    name = type(optimizer).__name__
    if anatomy.flat:
        return f"{name}, which has one rate for all parameters"
    if "lr" in anatomy.in_group or not isinstance(group.get("lr"), int | float | Tensor):
        return f"{name}, whose parameter groups have no lr of the user's"
    return None
