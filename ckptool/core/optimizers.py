"""The kind of an optimizer, guessed from the hyper-parameters in its state_dict, which lacks the name.

Source: the ``defaults`` of the classes in ``torch/optim`` (2.13).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckptool.core.tree import as_mapping

_HYPERPARAMETERS: tuple[tuple[str, frozenset[str]], ...] = (
    ("LBFGS", frozenset({"history_size", "line_search_fn"})),
    ("NAdam", frozenset({"momentum_decay", "betas"})),
    ("Adafactor", frozenset({"beta2_decay"})),
    ("Adadelta", frozenset({"rho", "eps"})),
    ("Adagrad", frozenset({"lr_decay", "initial_accumulator_value"})),
    ("ASGD", frozenset({"lambd", "alpha", "t0"})),
    ("Rprop", frozenset({"etas", "step_sizes"})),
    ("RMSprop", frozenset({"alpha", "centered"})),
    ("Muon", frozenset({"ns_steps", "nesterov"})),
    ("Adam", frozenset({"betas", "amsgrad"})),
    ("SGD", frozenset({"momentum", "dampening"})),
    ("RAdam", frozenset({"betas", "decoupled_weight_decay"})),
    ("Adamax", frozenset({"betas", "eps", "weight_decay"})),
    ("SparseAdam", frozenset({"betas", "eps"})),
)
"""The hyper-parameters that identify an optimizer, the most specific first."""


def is_optimizer(node: Any) -> bool:
    """Returns whether a node is a `torch.optim.Optimizer.state_dict()`."""
    mapping = as_mapping(node)
    return mapping is not None and "param_groups" in mapping and "state" in mapping


def describe(state: Mapping[Any, Any]) -> tuple[str, int]:
    """Returns (kind, number of parameters) of an optimizer's state_dict; "an optimizer" if the kind is unknown."""
    groups = state.get("param_groups")
    found = [group for group in groups if isinstance(group, dict)] if isinstance(groups, list) else []
    count = sum(len(group["params"]) for group in found if isinstance(group.get("params"), list))
    options = set(found[0]) if found else set()
    kind = next((name for name, needed in _HYPERPARAMETERS if needed <= options), "an optimizer")
    if kind == "Adam" and _decoupled(found[0], state):
        kind = "AdamW"
    return kind, count


def _decoupled(group: Mapping[str, Any], state: Mapping[Any, Any]) -> bool:
    """Returns whether weight decay is AdamW's: a flag since torch 2.6; before, guessed by AdamW's default of 0.01."""
    if "decoupled_weight_decay" in group:
        return bool(group["decoupled_weight_decay"])
    return as_mapping(state.get("state")) is not None and group.get("weight_decay") == 0.01
