"""How long the mapping of many keys takes: models that nobody would want to map by hand."""

import time
from collections.abc import Callable, Iterator

from .baselines import Method
from .pairs import Entry

Listing = list[Entry]
_WORDS = {
    "attn": ("self_attn", "attention"),
    "q": ("q_proj", "wq"),
    "k": ("k_proj", "wk"),
    "v": ("v_proj", "wv"),
    "o": ("o_proj", "wo"),
    "one": ("input_layernorm", "attention_norm"),
    "two": ("post_attention_layernorm", "ffn_norm"),
    "w1": ("gate_proj", "w1"),
    "w2": ("down_proj", "w2"),
    "w3": ("up_proj", "w3"),
    "gate": ("gate", "router"),
    "moe": ("mlp", "feed_forward"),
}
_HERE, _THERE = ({part: names[side] for part, names in _WORDS.items()} for side in (0, 1))


def _experts(say: dict[str, str], top: str, layers: int, experts: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{top}.embed.weight", (32000, 2048)
    for i in range(layers):
        at = f"{top}.layers.{i}"
        for one in "qkvo":
            yield f"{at}.{say['attn']}.{say[one]}.weight", (512, 2048) if one in "kv" else (2048, 2048)
        for one in ("one", "two"):
            yield f"{at}.{say[one]}.weight", (2048,)
        yield f"{at}.{say['moe']}.{say['gate']}.weight", (experts, 2048)
        for j in range(experts):
            for one in ("w1", "w2", "w3"):
                yield f"{at}.{say['moe']}.experts.{j}.{say[one]}.weight", (2048, 768) if one == "w2" else (768, 2048)
    yield f"{top}.norm.weight", (2048,)


def _funnel(say: dict[str, str], top: str, layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for i in range(layers):
        at, size = f"{top}.layers.{i}", 64 + 8 * i
        for one in "qkvo":
            yield f"{at}.{say['attn']}.{say[one]}.weight", (size, size)
            yield f"{at}.{say['attn']}.{say[one]}.bias", (size,)
        for one in ("one", "two"):
            yield f"{at}.{say[one]}.weight", (size,)
            yield f"{at}.{say[one]}.bias", (size,)


def _listed(rows: Iterator[tuple[str, tuple[int, ...]]]) -> Listing:
    return [Entry(key, shape, "float32") for key, shape in rows]


# What it is called, and how it is made: the same model under two sets of names.
CASES: dict[str, Callable[[dict[str, str], str], Iterator[tuple[str, tuple[int, ...]]]]] = {
    "48 layers of 68 experts": lambda say, top: _experts(say, top, 48, 68),
    "every block of another width": lambda say, top: _funnel(say, top, 417),
    "120 layers of 276 experts": lambda say, top: _experts(say, top, 120, 276),
}


def timed(name: str, method: Method) -> tuple[int, int, float]:
    """The number of keys, how many of them were mapped, and the seconds it took."""
    source, target = _listed(CASES[name](_HERE, "model")), _listed(CASES[name](_THERE, "net"))
    began = time.process_time()
    found = method(source, target)
    return len(target), len(found), time.process_time() - began
