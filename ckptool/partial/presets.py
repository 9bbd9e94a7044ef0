"""Init presets for whole models, as data: an init rule for each role of a tensor in its layer, or for a key pattern."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Preset:
    """A recipe for a whole model; of the rows that fit a tensor, the last wins.

    A tensor that no row fits gets torch's default. Integer tensors (indices, masks) other than counters are kept.
    """

    source: str
    """Whose recipe it is, and where it stands."""
    rows: tuple[tuple[str, str, str], ...]
    """[what a tensor is (`linear weight`) or a key pattern, the rule, the reason or ""]."""


_RELU = "mode=fan_out,nonlinearity=relu"

_HEAD = (
    ("linear weight", "normal(0,0.01)", ""),
    ("linear bias", "zeros", ""),
    ("conv bias", "zeros", ""),
    ("batchnorm weight", "ones", "gamma"),
    ("batchnorm bias", "zeros", "beta"),
    ("running mean", "zeros", ""),
    ("running var", "ones", ""),
    ("counter", "zeros", ""),
    ("norm weight", "ones", ""),
    ("norm bias", "zeros", ""),
)

_NORMS = (("norm weight", "ones", ""), ("norm bias", "zeros", ""))

_NAMED = "no layer: known by its name"

_POSITIONS = (
    "*pos_embed", "*pos_embedding", "*position_embeddings", "*relative_position_bias_table",
    "*dist_token", "*distillation_token", "*mask_token",
)  # fmt: skip


def _transformer(rule: str) -> tuple[tuple[str, str, str], ...]:
    weights = ("linear", "attention", "embedding", "transposed")
    biases = ("linear", "attention", "transposed")
    return (
        *((f"{kind} weight", rule, "") for kind in weights),
        *((f"{kind} bias", "zeros", "") for kind in biases),
        *_NORMS,
    )


PRESETS = {
    "kaiming": Preset(
        "torchvision's VGG and ResNet: He et al. 2015 for convolutions, normal(0, 0.01) for linear layers",
        (("conv weight", f"kaiming_normal({_RELU})", "He et al. 2015"), *_HEAD),
    ),
    "kaiming_uniform": Preset(
        "kaiming, with the uniform distribution of the same variance",
        (("conv weight", f"kaiming_uniform({_RELU})", "He et al. 2015"), *_HEAD),
    ),
    "xavier": Preset(
        "Glorot & Bengio 2010 for convolutions, the rest as kaiming",
        (("conv weight", "xavier_uniform", "Glorot & Bengio 2010"), *_HEAD),
    ),
    "xavier_normal": Preset(
        "xavier, with the normal distribution of the same variance",
        (("conv weight", "xavier_normal", "Glorot & Bengio 2010"), *_HEAD),
    ),
    "resnext": Preset(
        "by key, as prlz77/ResNeXt.pytorch: models/model.py",
        (
            ("*conv*.weight", "kaiming_normal(mode=fan_out)", "'conv' in the key"),
            ("*bn*.weight", "ones", "'bn' in the key"),
            ("*.bias", "zeros", ""),
            ("classifier.weight", "kaiming_normal", ""),
        ),
    ),
    "bert": Preset(
        "google-research/bert: truncated at two standard deviations, 0.02",
        _transformer("trunc_normal(std=0.02,a=-0.04,b=0.04)"),
    ),
    "vit": Preset(
        "timm's init_weights_vit_timm; the patch convolution as torch does",
        (
            *_transformer("trunc_normal(std=0.02)"),
            *((name, "trunc_normal(std=0.02)", _NAMED) for name in _POSITIONS),
            *((name, "normal(std=1e-6)", _NAMED) for name in ("*cls_token", "*class_token", "*reg_token")),
        ),
    ),
    "gpt2": Preset(
        "transformers' GPT2; its residual projections further want *.c_proj.weight=normal(0,0.02/sqrt(2*layers))",
        (
            *_transformer("normal(0,0.02)"),
            *((f"*.{name}.weight", "normal(0,0.02)", "(in, out) in transformers") for name in ("c_attn", "c_fc")),
            ("*.c_proj.weight", "normal(0,0.02)", "(in, out) in transformers"),
            *((f"*.{name}.bias", "zeros", "") for name in ("c_attn", "c_fc", "c_proj")),
            ("*.attn.bias", "keep", "the causal mask of older files"),
            ("*.attn.masked_bias", "keep", "what it masks with"),
        ),
    ),
}


def described() -> list[str]:
    """Returns a listing of all presets: the name and source of each, then its rows."""
    lines = []
    for name, preset in PRESETS.items():
        lines.append(f"{name}  {preset.source}")
        width = max(len(fits) for fits, _, _ in preset.rows)
        lines += [f"  {fits:{width}}  {rule}" + (f"  ({why})" if why else "") for fits, rule, why in preset.rows]
    return lines
