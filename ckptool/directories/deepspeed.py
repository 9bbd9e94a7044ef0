"""DeepSpeed's checkpoints: a directory of one save (a tag), or the one above it, whose file ``latest`` names a tag.

    latest                                                  text: global_step10
    global_step10/
      mp_rank_00_model_states.pt                            module, shapes and the rest; ZeRO-0: all there is
      zero_pp_rank_R_mp_rank_00_model_states.pt             ZeRO-3: the same of each process, without the weights
      [bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt      ZeRO: a process's part of the fp32 weights (`zero`)
      layer_NN-model_states.pt                              pipeline: the module's layers, mp_rank_SS of each stage
      layer_L_expert_E_mp_rank_00_model_states.pt           mixture of experts: what is not in ``module``
      zero/NAME/fp32.pt                                     universal: one file for each weight

The tree is that of the first file of model states, with the fp32 weights in its ``module``.
Source: ``runtime/engine.py``, ``utils/zero_to_fp32.py`` and ``checkpoint/ds_to_universal.py`` of DeepSpeed 0.19.8.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from math import prod
from typing import Any, NamedTuple

from ckptool.core.checkpoint import Checkpoint
from ckptool.core.dtypes import DTYPES
from ckptool.core.tensor import Derived, TensorInfo, computed_as, is_countable, shaped
from ckptool.core.tree import PyObject, as_mapping, brief, ordered_dict, walk, with_content
from ckptool.directories import deepspeed_files as files
from ckptool.directories import zero
from ckptool.directories.names import sets_in
from ckptool.errors import CkptoolError, FormatError, IncompleteError, UnsupportedError, listed
from ckptool.io.files import is_directory, names_in
from ckptool.io.paths import join
from ckptool.io.probe import Probe

LABEL = "deepspeed"


def matches(probe: Probe) -> bool:
    """Returns whether it is such a directory; one with files that a known loader takes is not."""
    if not probe.is_directory or any(found.loader for found in sets_in(probe.names)):
        return False
    return any(found(probe.path, probe.names) for found in (files.is_tag, files.latest_in, files.tags_in))


def read(probe: Probe, open_: Callable[[str], Checkpoint]) -> Checkpoint:
    """Returns the checkpoint: the headers of its files are read.

    Raises: IncompleteError for files that are missing; UnsupportedError for weights split over tensor-parallel
    processes, and for experts that names do not join; FormatError, LimitError.
    """
    directory, notes = files.choose(probe.path, probe.names)
    try:
        saved = files.Saved(directory, open_)
        weights = _Weights(saved)
        state, module = weights.read()
    except CkptoolError as error:
        error.path = error.path or directory
        raise
    return Checkpoint(
        {**state, "module": module},
        root=("module",),
        format=LABEL,
        url=directory,
        nbytes=saved.nbytes,
        names=tuple(saved.pickled),
        notes=(*notes, *weights.said(), *saved.beside()),
    )


class _Parts(NamedTuple):
    """The flat tensors of each process; ``sizes``: how many processes share each group, of ZeRO-1 and 2."""

    is_stage_3: bool
    groups: list[list[TensorInfo]]
    sizes: list[Any]
    paddings: list[Any]


class _Weights:
    """Puts the weights together. ``notes``: {what is to be said of keys: the keys}.

    ``held``: the names of what the optimizer keeps of each weight.
    """

    def __init__(self, saved: files.Saved) -> None:
        self.saved = saved
        self.notes: dict[str, list[str]] = {}
        self.held: dict[str, None] = {}

    def note(self, what: str, *keys: str) -> None:
        self.notes.setdefault(what, []).extend(keys)

    def said(self) -> list[str]:
        """Returns the notes as text."""
        notes = [f"{what}: {listed(keys)}" if keys else what for what, keys in self.notes.items()]
        parts = [name for name in self.saved.used if name.endswith("_optim_states.pt")]
        if self.held or parts:
            where = f"in {len(parts)} *_optim_states.pt" if parts else "beside the weights"
            held = f" ({', '.join(self.held)})" if self.held else ""
            notes.append(f"the optimizer's state{held} lies {where}, and is not read")
        return notes

    def read(self) -> tuple[Mapping[Any, Any], Any]:
        """Returns (the model states, the module with its weights)."""
        if "zero" in self.saved.names and is_directory(join(self.saved.directory, "zero")):
            return self._universal()
        if self.saved.layers:
            return self._pipeline()
        ranks = sorted({mp for mp, _ in (*self.saved.models, *self.saved.optims)})
        self._refuse_parallel(len(ranks))
        if not ranks:
            raise IncompleteError("a file is missing: mp_rank_00_model_states.pt")
        parts = self._parts(ranks[0])
        states = self._states(ranks[0], parts)
        state = states[0]
        self._refuse_parallel(state.get("mp_world_size"))
        if state.get("module") is None:
            raise IncompleteError("its module is in files of layers, which are missing: layer_00-model_states.pt, ...")
        state = {**state, "module": _extended(state["module"], self._experts(state))}
        if (parts := self._needed(parts, state)) is None:
            return state, state["module"]
        frozen = self._frozen(states, parts.is_stage_3)
        module = self._joined(state, self._trained(state, parts), frozen, placeholders=parts.is_stage_3)
        there = as_mapping(module) or {}
        shapes = (name for group in _groups_of_shapes(state["param_shapes"]) for name in group)
        if gone := [name for name in shapes if name not in there]:
            raise IncompleteError(f"trained by some processes only, and in no file of experts: {listed(gone)}")
        return {**state, **_NO_ZERO}, module

    def _refuse_parallel(self, *counts: Any) -> None:
        """Raises UnsupportedError if tensors are split over several processes."""
        many = max((count for count in counts if type(count) is int), default=1)
        if many > 1 or self.saved.parallel:
            several = f"{many} " if many > 1 else ""
            named = f" ({listed(self.saved.parallel, 3)})" if self.saved.parallel else ""
            raise UnsupportedError(
                f"its weights are split over {several}model-parallel ranks{named}: along which dimension each one is, "
                "the files do not say; DeepSpeed's ds_to_universal.py joins them, and what it writes is read here"
            )

    def _needed(self, parts: _Parts | None, state: Mapping[Any, Any]) -> _Parts | None:
        """Returns the parts if the fp32 weights can be made of them. Raises: IncompleteError if they are missing."""
        shapes = state.get("param_shapes")
        if shapes is None:
            if parts is not None:
                self.note("its fp32 weights are in files without the shapes (no param_shapes): module was read")
            return None
        if parts is None:
            like = next((name for (_, rank), name in self.saved.models.items() if rank >= 0), "")
            name = "zero_pp_rank_0_mp_rank_00_optim_states.pt"
            rest = "" if like else "; mp_rank_00_model_states.pt alone has the weights in the dtype of the run: name it"
            raise IncompleteError(f"its fp32 weights are in files that are missing: {name}, ...{rest}")
        return parts

    # --- the parts of the processes ---

    def _parts(self, mp: int) -> _Parts | None:
        """Returns the flat tensors of all processes of a model-parallel rank; None if there are no such files."""
        there = [name for (other, rank), name in self.saved.optims.items() if other == mp and rank >= 0]
        if not there:
            return None
        if "offloaded_tensors" in self.saved.names:
            raise UnsupportedError(
                "its fp32 weights are in the files of NVMe offload (offloaded_tensors): not supported"
            )
        first = self._optimizer(there[0])
        count: Any = first.get("partition_count")
        sizes = count if isinstance(count, list) else []
        if isinstance(count, list):
            count = max((one for one in count if type(one) is int), default=0)
        names = self.saved.processes(self.saved.optims, mp, count if type(count) is int and count > 0 else len(there))
        key = "fp32_flat_groups" if "fp32_flat_groups" in first else "single_partition_of_fp32_groups"
        groups = [self._groups(first if name == there[0] else self._optimizer(name), key, name) for name in names]
        self.held |= dict.fromkeys(_state_names(first))
        return _Parts(key == "fp32_flat_groups", groups, sizes, first.get("param_alignment_paddings") or [])

    def _optimizer(self, name: str) -> dict[Any, Any]:
        found = as_mapping(self.saved.mapping(name).get("optimizer_state_dict"))
        if found is None:
            raise FormatError("has no optimizer_state_dict", join(self.saved.directory, name))
        return found

    def _groups(self, optimizer: Mapping[Any, Any], key: str, name: str) -> list[TensorInfo]:
        path = join(self.saved.directory, name)
        if not isinstance(found := optimizer.get(key), list):
            what = "local_sub_partitions_of_fp32_groups"
            older = ", but those of an older version, which is not supported" if what in optimizer else ""
            raise UnsupportedError(f"has no fp32 weights of ZeRO ({key}){older}", path)
        try:
            return [zero.flattened(tensor, f"{key}[{number}]") for number, tensor in enumerate(found)]
        except FormatError as error:
            error.path = path
            raise

    def _states(self, mp: int, parts: _Parts | None) -> list[dict[Any, Any]]:
        """Returns the model states: those of each process for ZeRO-3 with frozen parameters, else those of one."""
        models = self.saved.models
        if parts is None or not parts.is_stage_3:
            if (mp, -1) in models:
                return [self._state(models[mp, -1])]
            if parts is not None or (mp, 0) not in models:
                raise IncompleteError(f"a file is missing: mp_rank_{mp:02d}_model_states.pt")
            return [self._state(models[mp, 0])]
        if all(other != mp or rank < 0 for other, rank in models):
            raise IncompleteError(f"a file is missing: zero_pp_rank_0_mp_rank_{mp:02d}_model_states.pt")
        names = self.saved.processes(models, mp, len(parts.groups))
        first = self._state(names[0])
        return [first, *map(self._state, names[1:] if as_mapping(first.get("frozen_param_shapes")) else ())]

    def _state(self, name: str) -> dict[Any, Any]:
        found = self.saved.mapping(name)
        if "module" not in found:
            raise FormatError("holds no model states of DeepSpeed: no module", join(self.saved.directory, name))
        return found

    def _trained(self, state: Mapping[Any, Any], parts: _Parts) -> dict[str, TensorInfo]:
        """Returns the parameters that the optimizer has, in fp32."""
        groups = _groups_of_shapes(state.get("param_shapes"))
        if parts.is_stage_3:
            return zero.cut_each({name: shape for group in groups for name, shape in group.items()}, parts.groups)
        world = len(parts.groups)
        made: dict[str, TensorInfo] = {}
        if any(len(tensors) != len(groups) for tensors in parts.groups):
            found = sorted({len(tensors) for tensors in parts.groups})
            raise FormatError(
                f"its processes have {listed(found)} groups of weights, and there are shapes of {len(groups)}"
            )
        for number, shapes in enumerate(groups):
            if number < len(parts.sizes) and parts.sizes[number] != world:
                continue  # of experts, which only some processes share
            paddings = parts.paddings[number] if number < len(parts.paddings) else [0] * len(shapes)
            if (
                not isinstance(paddings, list)
                or len(paddings) != len(shapes)
                or any(type(pad) is not int or not 0 <= pad < 1 << 40 for pad in paddings)
            ):
                raise FormatError(f"param_alignment_paddings of {len(shapes)} parameters: {brief(paddings)}")
            made |= zero.cut_in_turn(shapes, [tensors[number] for tensors in parts.groups], paddings)
        return made

    def _frozen(self, states: Sequence[Mapping[Any, Any]], in_parts: bool) -> dict[str, TensorInfo]:
        """Returns the parameters that no optimizer has, as far as they are saved beside the module."""
        made: dict[str, TensorInfo] = {}
        fragments = [as_mapping(state.get("frozen_param_fragments")) or {} for state in states]
        for name, shape in _shapes(states[0].get("frozen_param_shapes") or {}).items():
            found = [of_process.get(name) for of_process in fragments]
            if any(tensor is None for tensor in found):
                raise IncompleteError(f"{name}: is frozen, and not all processes saved their part of it")
            if in_parts:
                made |= zero.cut_each({name: shape}, [[zero.flattened(tensor, name)] for tensor in found])
            elif isinstance(found[0], TensorInfo) and found[0].shape == shape:
                made[name] = found[0]
            else:
                raise FormatError(f"{name}: is frozen, of shape {brief(shape)}, and saved as {brief(found[0])}")
        return made

    # --- the module ---

    def _joined(
        self,
        state: Mapping[Any, Any],
        trained: Mapping[str, TensorInfo],
        frozen: Mapping[str, TensorInfo],
        *,
        placeholders: bool = False,
        sliced: bool = False,
    ) -> Any:
        """Returns the module with its fp32 weights, in its own order.

        ``placeholders``: it has tensors of size 0 in place of parameters; ``sliced``: parts of them. A parameter that
        shares another's memory is that one. What is in fp32 nowhere is as it is in the module.
        """
        node = state.get("module")
        module = as_mapping(node) or {}
        if not trained.keys() <= module.keys():  # Megatron-DeepSpeed's are nested
            nested = {".".join(map(str, path)): value for path, value in walk(module) if isinstance(value, TensorInfo)}
            node, module = (nested, nested) if trained.keys() <= nested.keys() else (node, module)
        if not placeholders:  # what is in the module too is tied there
            frozen = {key: tensor for key, tensor in frozen.items() if key not in module}
        shared = {
            key: source
            for key, source in (as_mapping(state.get("shared_params")) or {}).items()
            if type(key) is type(source) is str
        }
        buffers = set(_buffers(state))
        alike = {
            value.view: trained[key]
            for key, value in module.items()
            if isinstance(value, TensorInfo) and key in trained and value.numel
        }
        wide: dict[object, Derived] = {}
        made: dict[Any, Any] = {}
        for key, value in module.items():
            if not isinstance(value, TensorInfo):
                made[key] = value
                continue
            found, source = trained.get(key), shared.get(key)
            if found is not None and not sliced and value.numel and value.shape != found.shape:
                raise FormatError(f"{key}: has shape {brief(found.shape)} in fp32, and {brief(value.shape)} in module")
            if found is None and key not in frozen and source is not None:
                found = trained.get(source, frozen.get(source))
                if found is not None and value.numel and value.shape != found.shape:
                    found = None
            if found is None and value.numel:
                found = alike.get(value.view)
            if found is not None:
                made[key] = found
            elif key in buffers:
                made[key] = _widened(value, wide)
            elif key in frozen or not placeholders or value.shape != (0,):
                made[key] = frozen.get(key, value)
                self.note(f"{_AS_SAVED}, {made[key].dtype}", key)
            else:
                self.note("only placeholders of size 0 are saved of these, which are left out", key)
        if more := {key: tensor for key, tensor in {**frozen, **trained}.items() if key not in made}:
            self.note("in fp32 or frozen, and without a key in module, so added behind it", *more)
            made |= more
        for key, source in shared.items():
            if key not in made and source in made:
                made[key] = made[source]
        if apart := [key for key, source in shared.items() if key in trained and source in trained]:
            self.note("share memory with another parameter in the model, and are saved on their own here", *apart)
        return made if node is None else with_content(node, made)

    # --- other ways to save ---

    def _experts(self, state: Mapping[Any, Any]) -> dict[str, TensorInfo]:
        """Returns the weights of experts, which are in files of their own.

        Raises: UnsupportedError if their names do not say which expert they are of; IncompleteError.
        """
        experts = self.saved.experts
        if state.get("ds_autoep_layers") or state.get("autoep_layers"):
            raise UnsupportedError(
                "its experts were split by AutoEP, which is not supported: DeepSpeed's ds_to_universal.py joins them, "
                "and what it writes is read here"
            )
        counts = state.get("num_experts")
        layers = sorted({layer for layer, _ in experts})
        if not isinstance(counts, list) or any(type(count) is not int for count in counts) or -1 in layers:
            counts = [1 + max(expert for other, expert in experts if other == layer) for layer in layers]
        else:
            layers = [*range(len(counts))]
        wanted = ((layer, expert) for layer, count in zip(layers, counts, strict=True) for expert in range(count))
        if gone := [*islice((key for key in wanted if key not in experts), 9)]:
            names = [
                f"{f'layer_{layer}_' * (layer >= 0)}expert_{expert}_mp_rank_00_model_states.pt"
                for layer, expert in gone
            ]
            raise IncompleteError(f"files of experts are missing: {listed(names)}")
        made: dict[str, TensorInfo] = {}
        for (_, expert), name in sorted(experts.items()):
            for key, tensor in self.saved.mapping(name).items():
                if not isinstance(tensor, TensorInfo) or f".deepspeed_experts.{expert}." not in str(key) or key in made:
                    path = join(self.saved.directory, name)
                    raise UnsupportedError(
                        f"{key!r} is no weight of expert {expert} by its name: name this file to read it", path
                    )
                made[key] = tensor
        return made

    def _pipeline(self) -> tuple[Mapping[Any, Any], Any]:
        """Returns (model states, module) of a PipelineModule: the keys of each layer behind its number."""
        self._refuse_parallel()
        module: dict[Any, Any] = {}
        for number, name in sorted(self.saved.layers.items()):
            module |= {f"{number}.{key}": value for key, value in self.saved.mapping(name).items()}
        if gone := [
            *islice((number for number in range(max(self.saved.layers)) if number not in self.saved.layers), 100)
        ]:
            self.note("without a file, as layers without a state_dict are", *(f"layer_{number:02d}" for number in gone))
        states: list[dict[Any, Any]] = []
        trained: dict[str, TensorInfo] = {}
        for stage in sorted(mp for mp, rank in self.saved.models if rank < 0):
            states.append(self._state(self.saved.models[stage, -1]))
            if (parts := self._needed(self._parts(stage), states[-1])) is not None:
                trained |= self._trained(states[-1], parts)
        if other := [key for key in trained if key not in module]:
            self.note("fp32 weights of no key in the files of layers, not read", *other)
        if any(state.get("optimizer") for state in states):
            self.note(f"the optimizer's states of {len(states)} stages are not read")
        state = {**(states[0] if states else {}), "optimizer": None, "module": ordered_dict(module)}
        if not trained:
            return state, state["module"]
        state |= _NO_ZERO
        buffers = [name for one in states for name in _buffers(one)]
        trained = {key: tensor for key, tensor in trained.items() if key in module}
        return state, self._joined({**state, "buffer_names": buffers}, trained, {})

    def _universal(self) -> tuple[Mapping[Any, Any], Any]:
        """Returns (model states, module) of what ds_to_universal.py wrote."""
        saved, found = self.saved, {}
        for name in sorted(names_in(join(saved.directory, "zero")), key=_in_order):
            held = names_in(join(saved.directory, "zero", name))
            if held and "fp32.pt" not in held:
                raise IncompleteError(f"a file is missing: zero/{name}/fp32.pt")
            if held:
                found[name] = saved.tree(join("zero", name, "fp32.pt"))
                self.held |= dict.fromkeys(one.removesuffix(".pt") for one in sorted(held) if one != "fp32.pt")
        names = [name for _, name in sorted(saved.models.items())]
        states = [self._state(names[0])] if names else [{}]
        groups = [
            *_groups_of_shapes(states[0].get("param_shapes") or []),
            _shapes(states[0].get("frozen_param_shapes") or {}),
        ]
        shapes = {name: shape for group in groups[:-1] for name, shape in group.items()}
        sliced = len({mp for mp, _ in saved.models}) > 1
        trained = {
            name: _universal_weight(name, value, None if sliced else shapes.get(name)) for name, value in found.items()
        }
        if gone := [name for name in shapes if name not in trained]:
            raise IncompleteError(f"files are missing: {listed(f'zero/{name}/fp32.pt' for name in gone)}")
        placeholders = any(rank >= 0 for _, rank in saved.models)
        if placeholders and as_mapping(states[0].get("frozen_param_shapes")) and not sliced:
            states += [self._state(name) for name in names[1:]]
        frozen = {} if sliced or not names else self._frozen(states, placeholders)
        module = self._joined(states[0], trained, frozen, placeholders=placeholders, sliced=sliced)
        return {**states[0], **_NO_ZERO}, module


def _in_order(name: str) -> list[tuple[int, str]]:
    """Returns a key that sorts names by their numbers."""
    return [(len(part) if part.isdecimal() else 0, part) for part in name.split(".")]


def _universal_weight(name: str, value: Any, shape: tuple[int, ...] | None) -> TensorInfo:
    """Returns the tensor in a file of a universal checkpoint: from ZeRO-3 it is flat. Raises: FormatError."""
    holder = as_mapping(value)
    tensor = value if holder is None else holder.get("param")
    if not isinstance(tensor, TensorInfo):
        raise FormatError(f"zero/{name}/fp32.pt has {brief(value)}: expected a tensor, or a dict with param")
    if shape is None or tensor.shape == shape or (holder and holder.get("vocab_tensor")):
        return tensor
    if tensor.numel != prod(shape):
        raise FormatError(
            f"{name}: has shape {brief(tensor.shape)} in zero/{name}/fp32.pt, and {brief(shape)} in the model"
        )
    return shaped(zero.flattened(tensor, name), shape)


def _extended(node: Any, more: Mapping[str, TensorInfo]) -> Any:
    """Returns the module with the weights of experts. Raises: FormatError for one that it has itself."""
    module = as_mapping(node) or {}
    if both := [key for key in more if key in module]:
        raise FormatError(f"in module and in a file of an expert: {listed(both)}")
    return with_content(node, {**module, **more}) if more else node


def _buffers(state: Mapping[Any, Any]) -> list[str]:
    """Returns the names of the module's buffers. Raises: FormatError."""
    names = state.get("buffer_names") or []
    if not isinstance(names, list) or any(type(name) is not str for name in names):
        raise FormatError(f"its buffer_names are {brief(names)}")
    return names


def _groups_of_shapes(node: Any) -> list[dict[str, tuple[int, ...]]]:
    """Returns {parameter: shape} of each group. Raises: FormatError."""
    groups = [_shapes(group) for group in (node if isinstance(node, list) else [node])]
    names = [name for group in groups for name in group]
    if len(set(names)) < len(names):
        raise FormatError("a parameter is in two groups of param_shapes")
    return groups


def _shapes(node: Any) -> dict[str, tuple[int, ...]]:
    made = {}
    for name, size in (as_mapping(node) or {}).items():
        given = size.args[0] if isinstance(size, PyObject) and type(size).qualname == "Size" and size.args else size
        numbers = isinstance(given, (tuple, list)) and all(type(number) is int and number >= 0 for number in given)
        if type(name) is not str or not numbers or not is_countable(tuple(given)):
            raise FormatError(f"the shape of {brief(name)} is {brief(given)}")
        made[name] = tuple(given)
    return made


def _widened(tensor: TensorInfo, made: dict[object, Derived]) -> TensorInfo:
    """Returns a buffer in fp32 if it has a narrower dtype; names of the same elements stay tied."""
    row = DTYPES[tensor.dtype]
    if row.kind != "float" or row.bits >= 32 or tensor.kind != "dense":
        return tensor
    return computed_as(tensor, made.setdefault(tensor.view, Derived("cast", (tensor,))), "float32")


def _state_names(optimizer: Mapping[Any, Any]) -> list[str]:
    """Returns the names of what an optimizer keeps of its parameters: exp_avg, ..."""
    base = optimizer.get("base_optimizer_state", optimizer.get("optimizer_state_dict"))
    state = base if isinstance(base, list) else (as_mapping(base) or {}).get("state")
    each = state if isinstance(state, list) else (as_mapping(state) or {}).values()
    return [*dict.fromkeys(str(name) for one in each for name in as_mapping(one) or ())][:9]


_NO_ZERO = dict.fromkeys(("param_shapes", "frozen_param_shapes", "shared_params", "frozen_param_fragments"))
"""What DeepSpeed writes of a model that is not in parts."""

_AS_SAVED = "not among the fp32 weights (frozen parameters, experts), so taken in the dtype of the run"
