"""The hooks on one optimizer, between which its own maths sees rows in the place of tables."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import LBFGS, Optimizer

from partial_embedding.errors import InputError
from partial_embedding.torch.blocks import Block
from partial_embedding.torch.dry_run import LISTS, Group, State
from partial_embedding.torch.engines import refuse_flat
from partial_embedding.torch.hooks import refuse_orphan
from partial_embedding.torch.inspection import (
    KEY,
    StateLayout,
    inspect_optimizer,
    kind_of,
    options_of,
)
from partial_embedding.torch.saving import (
    Entries,
    begin_afresh,
    check,
    into_state_dict,
    is_marked,
    mark,
    restore,
    take_from,
    without_tables,
)
from partial_embedding.torch.shards import check_sharding, is_sharded, local
from partial_embedding.torch.table import PartialTable, tables_of
from partial_embedding.torch.table_state import TableState, clear_history
from partial_embedding.torch.trainable_rows import waiting
from partial_embedding.torch.unheld import refuse_lost, refuse_what_cannot_train

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Rowwise:
    """The hooks on one optimizer, and the state of its tables; `names` are of parameters by id."""

    def __init__(self, optimizer: Optimizer, lazy: bool, names: Mapping[int, str]) -> None:
        self.optimizer = optimizer
        self.lazy = lazy
        self.tables: dict[int, TableState] = {}  # by the id of the parameter
        self._names = names
        self._layouts: dict[Any, StateLayout] = {}
        self._add_tables()
        if not self.tables:
            raise InputError(
                f"the optimizer holds the weight of a table. Received {type(optimizer).__name__} "
                "without any PartialEmbedding. Build it from model.parameters()."
            )
        # Whatever the optimizer remembers already, of its own or from a checkpoint of ours.
        _, entries = without_tables(vars(optimizer))
        check(optimizer, self.tables, entries, before_steps=True)
        restore(optimizer, self.tables, take_from(optimizer))
        self._loading: Entries = {}
        self._blocks: list[_Lent] = []
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_state_dict_pre_hook(self._before_saving),
            optimizer.register_state_dict_post_hook(self._save),
            optimizer.register_load_state_dict_pre_hook(self._before_loading),
            optimizer.register_load_state_dict_post_hook(self._load),
        ]
        vars(optimizer)["_rowwise"] = self

    def stand_closest(self) -> None:
        """Put our hooks next to the maths, so that those of others see tables as they are."""
        before, after, *_ = self._hooks
        vars(self.optimizer)["_optimizer_step_pre_hooks"].move_to_end(before.id)
        vars(self.optimizer)["_optimizer_step_post_hooks"].move_to_end(after.id, last=False)

    def _add_tables(self) -> list[tuple[TableState, Group]]:
        """Serve all tables that the optimizer holds; gives the state of new ones, and groups."""
        new = [
            (group, parameter, table)
            for group, parameter, table in held_tables(self.optimizer)
            if id(parameter) not in self.tables
        ]
        for _, parameter, table in new:
            if not table.is_attached_to(parameter):
                table.attach()  # to what was put there past its own `register_parameter`
            waiting.discard(table)
        # All of them or none.
        made = [(self._state_of(one, table, group), group) for group, one, table in new]
        for state, _ in made:
            self.tables[id(state.parameter)] = state
            state.table.steppers.add(state)
        return made

    def _state_of(self, parameter: nn.Parameter, table: PartialTable, group: Group) -> TableState:
        name = self._names.get(id(parameter)) or _name_in(group, parameter) or repr(table)
        check_sharding(parameter, table)
        refuse_flat(table.leaf_weight, table)
        refuse_what_cannot_train(table, name)
        layout, unscaled = self._layout_of(parameter, group)
        return TableState(name, table, parameter, layout, self.lazy, unscaled, options_of(group))

    def _layout_of(self, parameter: nn.Parameter, group: Group) -> tuple[StateLayout, str | None]:
        options = {key: value for key, value in group.items() if key != KEY}
        key = (kind_of(options), parameter.dtype, parameter.device, parameter.dim())
        if key not in self._layouts:
            self._layouts[key] = inspect_optimizer(self.optimizer, options, local(parameter))
        layout = self._layouts[key]
        if is_sharded(parameter) and (layout.sparse or not layout.elementwise):
            raise InputError(
                "processes that share a table by rows need an optimizer that moves each row by "
                f"itself, from a dense gradient. Received {type(self.optimizer).__name__}. Take "
                "AdamW, for example; or leave the table out of the engine, whole in each process."
            )
        if self.lazy and not layout.elementwise:
            raise InputError(
                "lazy=True is for optimizers that move each row by itself. Received "
                f"{type(self.optimizer).__name__}, which looks across rows. Leave lazy=False."
            )
        return layout, _why_unscaled(self.optimizer, layout, group)

    # Around the optimizer's maths

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Arguments | None:
        if optimizer is not self.optimizer:
            return None  # a step of the parent class, made by the stand-in in the midst of its own
        self._forget_blocks()
        places = self._find_tables()
        self._follow_state()
        self._follow_history()  # here, since LBFGS looks its history up before the closure
        # The maths runs on a stand-in with groups of its own. The user's optimizer thus holds its
        # tables at any time: while the closure runs, for other hooks, and after an exception.
        self._stand_in = stand_in = self._make_stand_in(places)
        args = (stand_in, *args[1:])
        if not all(state.layout.closes for state in self.tables.values()):
            self._gather(stand_in, places)
            return args, kwargs
        return with_gradients(args, kwargs, lambda: self._gather(stand_in, places), self._scatter)

    def _find_tables(self) -> list[list[int]]:
        """Where in each group the tables stand; refuses to go on without one of them."""
        groups = [group["params"] for group in self.optimizer.param_groups]
        # Once a step, and by what costs next to nothing: a model may have thousands of parameters.
        hooked = (p for group in groups for p in group if p._backward_hooks)
        if any(id(p) not in self.tables and any(tables_of(p)) for p in hooked):
            # A group came, or a parameter became a table's.
            for state, group in self._add_tables():
                state.adopt_from(self.optimizer, group)
        for state in self.tables.values():
            if not state.parameter.requires_grad or not any(tables_of(state.parameter)):
                refuse_lost(self.optimizer, state.table, state.parameter, state.name)
        places = [[i for i, p in enumerate(group) if id(p) in self.tables] for group in groups]
        all_there = sum(map(len, places)) == len(self.tables)
        if all_there and all(s.parameter.shape[1:] == s.row_shape for s in self.tables.values()):
            return places
        held = {id(p) for group in groups for p in group}
        gone = next(
            state.name
            for key, state in self.tables.items()
            if key not in held or state.parameter.shape[1:] != state.row_shape
        )
        raise InputError(
            "a prepared optimizer holds its tables, whole, for as long as it steps. "
            f"Received {type(self.optimizer).__name__} without {gone!r}, which an engine that "
            "flattens or shards parameters takes out (FSDP, DeepSpeed), or your own code. Keep the "
            "table out of the engine, in an optimizer of its own; or call "
            "detach_rowwise(optimizer) if it is to go."
        )

    def _make_stand_in(self, places: list[list[int]]) -> Optimizer:
        """The same optimizer, but for groups of its own where there are tables."""
        groups = [
            {**group, "params": list(group["params"])} if has_tables else group
            for group, has_tables in zip(self.optimizer.param_groups, places, strict=True)
        ]
        # Not by its constructor, of which nothing is known, and which may make state.
        stand_in: Optimizer = object.__new__(type(self.optimizer))
        self._attributes = {**vars(self.optimizer), "param_groups": groups}
        if isinstance(self.optimizer, LBFGS):
            self._attributes["_params"] = groups[0]["params"]  # the list of its one group
        vars(stand_in).update(self._attributes)
        return stand_in

    def _take_over(self) -> None:
        """Give the user's optimizer what the maths wrote into the stand-in."""
        for key, value in vars(self._stand_in).items():
            if value is not self._attributes.get(key):
                vars(self.optimizer)[key] = value
        # Not strict: the groups of blocks that step by themselves come after the user's.
        groups = zip(self.optimizer.param_groups, self._stand_in.param_groups, strict=False)
        for group, seen in groups:
            if group is not seen:
                group.update({key: v for key, v in seen.items() if key not in LISTS})

    @torch.no_grad()
    def _gather(self, stand_in: Optimizer, places: list[list[int]]) -> None:
        """Put compact parameters in the place of the tables."""
        for state in self.tables.values():
            _check_averaged(state)
        own, lent = self.optimizer.param_groups, stand_in.param_groups
        for group, seen, at in zip(own, lent[: len(own)], places, strict=True):
            if not at:
                continue
            # A closure may have set a rate.
            seen.update({key: value for key, value in group.items() if key not in LISTS})
            params, names = list(group["params"]), list(group.get("param_names", ()))
            for i in reversed(at):
                made = self._blocks_of(self.tables[id(params[i])], group, lent)
                params[i : i + 1] = made
                names[i : i + 1] = names[i : i + 1] * len(made)
            if not params and isinstance(self.optimizer, LBFGS):
                # It cannot flatten nothing, and a gradient of zero ends its step at once.
                params.append(nn.Parameter(group["params"][0].new_zeros(1)))
            seen["params"][:] = params  # in place: LBFGS keeps the list itself
            if "param_names" in group:
                seen["param_names"] = names

    def _blocks_of(
        self, state: TableState, group: Group, groups: list[Group]
    ) -> list[nn.Parameter]:
        if not state.has_options_of(group):
            # What a step itself changes is for a dry run what it was at first.
            options = {k: v for k, v in group.items() if k not in state.layout.in_group}
            options = {**options, **copy.deepcopy(state.layout.begun)}
            layout, state.unscaled = self._layout_of(state.parameter, options)
            state.change_layout(layout, options_of(options))
        if state.sync() and state.layout.flat:
            raise InputError(
                "rows change between the steps of an optimizer with one history for all. Received "
                f"other rows of {state.name!r} in a closure of {type(self.optimizer).__name__}. "
                "Call set_trainable_rows before step()."
            )
        # Looked for only where there can be any: a group may have thousands of parameters.
        there, own = dist.is_available() and dist.is_initialized(), is_sharded(state.parameter)
        of_two_kinds = there and any(is_sharded(one) != own for one in group["params"])
        shared: list[nn.Parameter] = []
        for block in state.blocks(self.optimizer, group):
            if not state.layout.flat:
                self.optimizer.state[block.parameter] = state.gather_state(block)
            alone: Group | None = None
            cohort = block.cohort
            if (
                state.layout.in_group
                or not cohort.rate_scale.is_plain
                or (group.get("fused") and cohort.is_new)
                or of_two_kinds
            ):
                # A count or a rate kept in the group would be one for all cohorts, and fused
                # kernels cannot mix first steps with later ones, nor any DTensors with plain
                # parameters: such a cohort steps in a group of its own, which no learning-rate
                # scheduler sees.
                alone = self._group_for(block, state, group)
                groups.append(alone)
            else:
                shared.append(block.parameter)
            self._blocks.append(_Lent(state, block, group, alone))
        return shared

    def _group_for(self, block: Block, state: TableState, group: Group) -> Group:
        own = {k: v for k, v in group.items() if k not in state.layout.in_group}
        begun = copy.deepcopy(state.layout.begun)  # some optimizers count in place
        if "param_names" in own:
            own["param_names"] = [state.name]
        if not (rate_scale := block.cohort.rate_scale).is_plain:
            own["lr"] = own["lr"] * rate_scale.factor(block.cohort.steps)
        return {**own, **begun, **block.cohort.group_state, "params": [block.parameter]}

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if optimizer is not self.optimizer:
            return
        self._count_steps()
        self._take_over()
        self._scatter()
        if not all(is_marked(optimizer, state) for state in self.tables.values()):
            mark(optimizer, self.tables)

    def _count_steps(self) -> None:
        """Count a step for each cohort that warms up; called when one was really made."""
        scaled = [lent.block for lent in self._blocks if not lent.block.cohort.rate_scale.is_plain]
        if not scaled:
            return
        # A fused optimizer is called by the scaler also where it then skips the step by itself.
        found_inf = getattr(self.optimizer, "found_inf", None)
        if found_inf is not None and found_inf:
            return
        for block in scaled:
            block.cohort.steps += block.parameter.grad is not None

    @torch.no_grad()
    def _scatter(self) -> None:
        """Write the rows back, and take their state."""
        lent_out = self._blocks
        states = self._forget_blocks()
        for lent, state in zip(lent_out, states, strict=True):
            lent.state.check_state(state, self.optimizer)
        for lent, state in zip(lent_out, states, strict=True):
            cohort = lent.block.cohort
            lent.state.scatter(lent.block, state, self.optimizer, lent.options)
            if lent.alone is not None:
                keys = lent.state.layout.in_group & lent.alone.keys()
                cohort.group_state = {key: lent.alone[key] for key in keys}

    def _forget_blocks(self) -> list[State]:
        """Take the blocks' state out of the optimizer, after a step or one that was cut short."""
        lent_out, self._blocks = self._blocks, []
        return [self.optimizer.state.pop(lent.block.parameter, {}) for lent in lent_out]

    def _follow_state(self) -> None:
        """Go on from what there is where somebody has emptied the optimizer's state, or set it."""
        kept = self.optimizer.state
        for state in self.tables.values():
            if state.was_marked and KEY not in kept.get(state.parameter, ()):
                groups = self.optimizer.param_groups
                own = next(g for g in groups if any(p is state.parameter for p in g["params"]))
                state.adopt_from(self.optimizer, own)

    def _follow_history(self) -> None:
        """Clear LBFGS's one flat history for all parameters when its length no longer fits."""
        changed = [state.sync() for state in self.tables.values() if state.layout.flat]
        if any(changed):
            clear_history(self.optimizer)

    # Around the optimizer's state_dict

    def _before_saving(self, optimizer: Optimizer) -> None:
        self._forget_blocks()
        self._follow_state()
        # Rows may have changed since the last step, and what is saved belongs to those of now.
        self._follow_history()
        for state in self.tables.values():
            state.sync()

    def _save(self, optimizer: Optimizer, state_dict: State) -> State:
        return into_state_dict(optimizer, self.tables, state_dict)

    def _before_loading(self, optimizer: Optimizer, state_dict: State) -> State:
        self._forget_blocks()
        # Past torch, which would cast it to the dtype of the weight.
        own, entries = without_tables(state_dict)
        check(optimizer, self.tables, entries)
        self._loading = entries
        return own

    def _load(self, optimizer: Optimizer) -> None:
        restore(optimizer, self.tables, self._loading)
        self._loading = {}

    def detach(self) -> None:
        """Take the hooks off; state that the constructor makes is made anew."""
        self._forget_blocks()
        for hook in self._hooks:
            hook.remove()
        del vars(self.optimizer)["_rowwise"]
        for state in self.tables.values():
            if isinstance(state.table, PartialTable):  # and no plain one by now
                state.table.steppers.discard(state)
        if any(state.layout.flat for state in self.tables.values()):
            clear_history(self.optimizer)
        eager = {key for key, state in self.tables.items() if state.layout.eager}
        begin_afresh(self.optimizer, eager)


class _Lent(NamedTuple):
    """A block that the stand-in steps, with the user's group that holds its table."""

    state: TableState
    block: Block
    group: Group
    alone: Group | None  # the group that the block steps in by itself, if it does

    @property
    def options(self) -> Group:
        """The user's group, with the learning rate that the block was stepped at."""
        if self.alone is None or self.block.cohort.rate_scale.is_plain:
            return self.group
        return {**self.group, "lr": self.alone["lr"]}


def with_gradients(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    then: Callable[[], None],
    before: Callable[[], None] = lambda: None,
) -> Arguments:
    """The arguments of a step that calls `then` when it has its gradients.

    That is now, or after each call of a closure, `before` which something may be called, too.
    """
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if not callable(closure):  # some steps take other things
        then()
        return args, kwargs

    def evaluate() -> Any:
        before()
        loss = closure()
        then()
        return loss

    if len(args) > 1:
        return (args[0], evaluate, *args[2:]), kwargs
    return args, {**kwargs, "closure": evaluate}


# What an optimizer holds


def held_tables(optimizer: Optimizer) -> Iterator[tuple[Group, nn.Parameter, PartialTable]]:
    """The parameters of tables among those of an optimizer, not wrapped, with their groups."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            refuse_orphan(parameter)
            for table in tables_of(parameter):
                yield group, parameter, table
                break  # those that are tied have one row set


def _name_in(group: Group, parameter: nn.Parameter) -> str | None:
    names = zip(group["params"], group.get("param_names", ()), strict=False)
    return next((name for one, name in names if one is parameter), None)


def _check_averaged(state: TableState) -> None:
    is_own = state.parameter.grad is not None and state.table.awaits_average
    if is_own and state.table.averaging_group(state.parameter) is not None:
        raise InputError(
            "gradients of tables are averaged over all processes before a step. Received "
            f"that of {state.name!r} as this process made it. Call "
            "average_gradients(optimizer) after backward; in Lightning, call "
            "self.manual_backward(loss) for loss.backward()."
        )


def _why_unscaled(optimizer: Optimizer, layout: StateLayout, group: Group) -> str | None:
    """Why rows cannot have a learning rate of their own, or None where they can."""
    name = type(optimizer).__name__
    if layout.flat:
        return f"{name}, which has one rate for all parameters"
    if "lr" in layout.in_group or not isinstance(group.get("lr"), int | float | Tensor):
        return f"{name}, whose parameter groups have no lr of the user's"
    if not layout.alone:
        return f"{name}, which keeps something of each parameter group outside the group"
    return None
