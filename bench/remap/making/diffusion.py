"""Pairs of diffusion models: from the names of latent-diffusion to those of diffusers, by its single-file conversions.

The originals' modules are listed as latent-diffusion makes them: attention before norms in a block, and the decoder's levels from
the last to the first.
"""

import re
import sys
from collections.abc import Iterator

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils as conversions

from .llm import main
from .out import write
from .scripts import State

_RESNET = [
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
]
_BLOCK = [
    ("norm", "norm"),
    ("proj_in", "proj_in"),
    *(
        (f"transformer_blocks.0.{one}", f"transformer_blocks.0.{one}")
        for one in ("attn1", "ff", "attn2", "norm1", "norm2", "norm3")
    ),
    ("proj_out", "proj_out"),
]


def _pick(new: State, ours: str, old: str, parts: list[tuple[str, str]]) -> Iterator[tuple[str, torch.Tensor]]:
    for one, other in parts:
        for key, tensor in new.items():
            if key.startswith(f"{ours}.{one}."):
                yield f"{old}.{other}.{key.removeprefix(f'{ours}.{one}.')}", tensor


def unet() -> None:
    model = UNet2DConditionModel(
        block_out_channels=(32, 64, 128, 128), cross_attention_dim=96, attention_head_dim=8, norm_num_groups=8
    )
    new = model.state_dict()
    rows: State = {}

    def add(ours: str, old: str, parts: list[tuple[str, str]]) -> None:
        rows.update(
            (f"model.diffusion_model.{key}", torch.zeros(tensor.shape)) for key, tensor in _pick(new, ours, old, parts)
        )

    def plain(ours: str, old: str) -> None:
        rows.update(
            (f"model.diffusion_model.{old}.{leaf}", torch.zeros(new[f"{ours}.{leaf}"].shape))
            for leaf in ("weight", "bias")
        )

    plain("time_embedding.linear_1", "time_embed.0")
    plain("time_embedding.linear_2", "time_embed.2")
    plain("conv_in", "input_blocks.0.0")
    for i in range(4):
        for j in range(2):
            add(f"down_blocks.{i}.resnets.{j}", f"input_blocks.{1 + 3 * i + j}.0", _RESNET)
            add(f"down_blocks.{i}.attentions.{j}", f"input_blocks.{1 + 3 * i + j}.1", _BLOCK)
        if i < 3:
            plain(f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{3 * i + 3}.0.op")
    for at, (kind, parts) in enumerate((("resnets.0", _RESNET), ("attentions.0", _BLOCK), ("resnets.1", _RESNET))):
        add(f"mid_block.{kind}", f"middle_block.{at}", parts)
    for i in range(4):
        for j in range(3):
            add(f"up_blocks.{i}.resnets.{j}", f"output_blocks.{3 * i + j}.0", _RESNET)
            add(f"up_blocks.{i}.attentions.{j}", f"output_blocks.{3 * i + j}.1", _BLOCK)
        if i < 3:
            plain(f"up_blocks.{i}.upsamplers.0.conv", f"output_blocks.{3 * i + 2}.{2 if i else 1}.conv")
    plain("conv_norm_out", "out.0")
    plain("conv_out", "out.2")
    assert len(rows) == len(new), (len(rows), len(new))
    config = {**model.config, "class_embed_type": None, "addition_embed_type": None}
    write(
        "ldm_sd15_unet__diffusers_unet",
        "unet",
        "dev",
        rows,
        new,
        lambda state: conversions.convert_ldm_unet_checkpoint(state, config),
        "diffusers convert_ldm_unet_checkpoint traced at a tenth of the width",
    )


def vae() -> None:
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 64, 128, 128),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=8,
    )
    new = model.state_dict()
    names: dict[str, torch.Tensor] = {}
    for key, tensor in new.items():
        old = key
        old = re.sub(r"encoder\.down_blocks\.(\d)\.resnets\.(\d)\.", r"encoder.down.\1.block.\2.", old)
        old = re.sub(r"encoder\.down_blocks\.(\d)\.downsamplers\.0\.", r"encoder.down.\1.downsample.", old)
        old = re.sub(
            r"decoder\.up_blocks\.(\d)\.resnets\.(\d)\.",
            lambda match: f"decoder.up.{3 - int(match[1])}.block.{match[2]}.",
            old,
        )
        old = re.sub(
            r"decoder\.up_blocks\.(\d)\.upsamplers\.0\.", lambda match: f"decoder.up.{3 - int(match[1])}.upsample.", old
        )
        old = re.sub(r"mid_block\.resnets\.(\d)\.", lambda match: f"mid.block_{int(match[1]) + 1}.", old)
        old = (
            old.replace("mid_block.attentions.0.", "mid.attn_1.")
            .replace("group_norm.", "norm.")
            .replace("to_out.0.", "proj_out.")
        )
        old = (
            re.sub(r"\.to_([qkv])\.", r".\1.", old)
            .replace("conv_norm_out", "norm_out")
            .replace("conv_shortcut", "nin_shortcut")
        )
        shape = (*tensor.shape, 1, 1) if ".attn_1." in old and tensor.ndim == 2 else tensor.shape
        names[f"first_stage_model.{old}"] = torch.zeros(shape)

    def place(key: str) -> tuple[object, ...]:
        order = [
            "encoder.conv_in",
            "encoder.down",
            "encoder.mid",
            "encoder.norm",
            "encoder.conv_out",
            "decoder.conv_in",
            "decoder.mid",
            "decoder.up",
            "decoder.norm",
            "decoder.conv_out",
            "quant",
            "post_quant",
        ]
        key = key.removeprefix("first_stage_model.")
        block = {"block_1": 0, "attn_1": 1, "block_2": 2}
        level = re.search(r"(?:down|up)\.(\d)", key)
        inner = next((number for word, number in block.items() if f"mid.{word}" in key), 0)
        inside = [number for number, word in enumerate(("block.0.", "block.1.", "block.2.", "sample.")) if word in key]
        leaf = next(
            (
                number
                for number, word in enumerate(
                    (".norm1.", ".conv1.", ".norm2.", ".conv2.", ".nin_", ".norm.", ".q.", ".k.", ".v.", ".proj_out.")
                )
                if word in key
            ),
            0,
        )
        first = next(i for i in reversed(range(len(order))) if key.startswith(order[i]))
        return first, int(level[1]) if level else 0, inner, inside, leaf

    state = dict(sorted(names.items(), key=lambda row: place(row[0])))
    config = dict(model.config)
    write(
        "ldm_sd15_vae__diffusers_vae",
        "vae",
        "held",
        state,
        new,
        lambda state: conversions.convert_ldm_vae_checkpoint(state, config),
        "diffusers convert_ldm_vae_checkpoint traced at a quarter of the width",
    )


MAKERS = {"unet": unet, "vae": vae}

if __name__ == "__main__":
    main(MAKERS, sys.argv[1:])
