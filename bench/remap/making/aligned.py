"""The true mapping between two implementations of one model: modules are paired in the order in which they run.

It is a proposal until the weights of one, loaded into the other by it, give the same output; random weights, so that a swap of
two tensors shows.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

State = dict[str, torch.Tensor]
Convert = Callable[[State], State]
Leaf = tuple[str, dict[str, torch.Tensor]]


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Random weights and statistics under which outputs stay in range."""
    draw = torch.Generator().manual_seed(seed)
    for key, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=draw)
        if key.endswith("running_var"):
            tensor.copy_(noise.abs() * 0.3 + 0.8)
        elif tensor.ndim <= 1:
            tensor.copy_(noise * 0.2 + (0.0 if key.endswith(("bias", "mean")) else 1.0))
        else:
            tensor.copy_(noise / max(1, tensor[0].numel()) ** 0.5 * 1.2)


def _own(module: nn.Module) -> dict[str, torch.Tensor]:
    gone = module._non_persistent_buffers_set
    own = {name: one for name, one in module._parameters.items() if one is not None}
    return own | {name: one for name, one in module._buffers.items() if one is not None and name not in gone}


def leaves(model: nn.Module, run: Callable[[nn.Module], Any]) -> tuple[list[Leaf], Any]:
    """The modules that hold tensors and nothing else, in the order in which they first run; and the output."""
    seen: dict[str, dict[str, torch.Tensor]] = {}
    hooks = []
    for name, module in model.named_modules():
        own = _own(module)
        if own and not any(_own(child) for child in list(module.modules())[1:]):
            hooks.append(
                module.register_forward_pre_hook(lambda _, __, name=name, own=own: seen.setdefault(name, own) and None)
            )
    with torch.no_grad():
        output = run(model)
    for hook in hooks:
        hook.remove()
    return list(seen.items()), output


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(size for size in tensor.shape if size != 1)


def _alike(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(_shape(one[name]) == _shape(other[name]) for name in one)


def _joins(whole: dict[str, torch.Tensor], parts: Sequence[dict[str, torch.Tensor]]) -> bool:
    if any(part.keys() != whole.keys() for part in parts) or not all(whole[name].ndim for name in whole):
        return False
    return all(
        sum(part[name].shape[0] for part in parts) == whole[name].shape[0]
        and all(_shape(part[name])[1:] == _shape(whole[name])[1:] for part in parts)
        for name in whole
    )


def _letter(name: str) -> int:
    last = name.split(".")[-1].lower()
    return next((number for number, words in enumerate(("q", "k", "v")) if words in last.replace("qkv", "")), 9)


def _told(some: list[Leaf]) -> str:
    return ", ".join(f"{name} {[tuple(one.shape) for one in own.values()][:1]}" for name, own in some)


def earlier(word: str, back: bool = False) -> Callable[[list[Leaf]], list[Leaf]]:
    """An order in which a block's shortcut, the child of that name, comes before its siblings, or after them."""

    def order(given: list[Leaf]) -> list[Leaf]:
        def block(name: str) -> str | None:
            segments = name.split(".")
            return ".".join(segments[: segments.index(word)]) + "." if word in segments else None

        blocks = {one for name, _ in given if (one := block(name)) is not None}
        out, done = [], set()
        for name, _ in given:
            inside = max((one for one in blocks if name.startswith(one)), key=len, default=None)
            if inside is None:
                out.append((name, _))
            elif inside not in done:
                done.add(inside)
                members = [leaf for leaf in given if leaf[0].startswith(inside)]
                out += sorted(members, key=lambda leaf: (block(leaf[0]) == inside) == back)
        return out

    return order


def steps(ours: list[Leaf], theirs: list[Leaf]) -> list[tuple[list[Leaf], list[Leaf]]]:
    """Groups that belong together: one and one, or one and the two or three that it holds, in order."""
    best: dict[tuple[int, int], tuple[int, int]] = {(0, 0): (0, 0)}
    for i in range(len(ours) + 1):
        for j in range(len(theirs) + 1):
            if (i, j) not in best:
                continue
            if i < len(ours) and j < len(theirs) and _alike(ours[i][1], theirs[j][1]):
                best.setdefault((i + 1, j + 1), (i, j))
            for many in (2, 3):
                if (
                    i < len(ours)
                    and j + many <= len(theirs)
                    and _joins(ours[i][1], [one for _, one in theirs[j : j + many]])
                ):
                    best.setdefault((i + 1, j + many), (i, j))
                if (
                    j < len(theirs)
                    and i + many <= len(ours)
                    and _joins(theirs[j][1], [one for _, one in ours[i : i + many]])
                ):
                    best.setdefault((i + many, j + 1), (i, j))
    end = (len(ours), len(theirs))
    if end not in best:
        i, j = max(best)
        raise ValueError(
            f"{len(ours)} and {len(theirs)} modules; they part at {_told(ours[i - 2 : i + 3])} / {_told(theirs[j - 2 : j + 3])}"
        )
    groups = []
    while end != (0, 0):
        begin = best[end]
        groups.append((ours[begin[0] : end[0]], theirs[begin[1] : end[1]]))
        end = begin
    return groups[::-1]


def aligned(
    source: nn.Module,
    target: nn.Module,
    run: Callable[[nn.Module], Any],
    run_target: Callable[[nn.Module], Any] | None = None,
    output: Callable[[Any], torch.Tensor] = lambda given: given,
    output_target: Callable[[Any], torch.Tensor] | None = None,
    extra: dict[str, str | tuple[str, str]] | None = None,
    order: Callable[[list[Leaf]], list[Leaf]] = lambda given: given,
    order_target: Callable[[list[Leaf]], list[Leaf]] = lambda given: given,
    tolerance: float = 1e-3,
) -> tuple[Convert, str]:
    """The conversion from source to target, proved by equal outputs; and the words that say so.

    ``extra``: target key -> source key, for what no module of its own holds.
    """
    for module in [*source.eval().modules(), *target.eval().modules()]:
        if hasattr(module, "eps"):  # two libraries may differ in it, which is no matter of names
            module.eps = 1e-5
    randomise(source)
    ours, given = leaves(source, run)
    theirs, _ = leaves(target, run_target or run)
    groups = steps(order(ours), order_target(theirs))

    def convert(state: State) -> State:
        made: State = {}
        for mine, yours in groups:
            yours = sorted(yours, key=lambda leaf: _letter(leaf[0])) if len(yours) > 1 else yours
            mine = sorted(mine, key=lambda leaf: _letter(leaf[0])) if len(mine) > 1 else mine
            for name in mine[0][1]:
                whole = [state[f"{path}.{name}"] for path, _ in mine]
                joined = torch.cat(whole, 0) if len(whole) > 1 else whole[0]
                begin = 0
                for path, own in yours:
                    if len(yours) == 1:
                        made[f"{path}.{name}"] = joined.reshape(own[name].shape)
                    else:
                        made[f"{path}.{name}"] = joined[begin : begin + own[name].shape[0]].reshape(own[name].shape)
                    begin += own[name].shape[0] if own[name].ndim else 0
        shapes = {key: tensor.shape for key, tensor in target.state_dict().items()}
        for key, other in (extra or {}).items():
            made[key] = state[other].reshape(shapes[key]) if isinstance(other, str) else other(state)
        return made

    converted = convert(dict(source.state_dict()))
    missing = target.load_state_dict(converted, strict=False)
    assert not missing.unexpected_keys, missing.unexpected_keys
    with torch.no_grad():
        got = (output_target or output)((run_target or run)(target))
    want = output(given)
    error = float((got - want).abs().max() / want.abs().max())
    assert want.std() > 0, "an output of one number proves nothing"
    assert error < tolerance, f"outputs differ by {error:.2g}; missing {missing.missing_keys[:8]}"
    left = set(source.state_dict()) - {f"{path}.{name}" for mine, _ in groups for path, own in mine for name in own}
    left -= {one for one in (extra or {}).values() if isinstance(one, str)}
    said = f"modules paired in the order in which they run; proved by equal outputs (rel err {error:.1g})"
    print("   left:", sorted(left)[:6], "missing:", missing.missing_keys[:6], f"err {error:.1g}")
    return convert, said
