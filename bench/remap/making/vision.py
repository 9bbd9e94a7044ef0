"""Pairs of vision models, from their original names to Hugging Face's, by the scripts that transformers 4.46 ships.

The originals' names come from timm where it has kept them, else they are those that the scripts ask for, in the order of the
originals' modules.
"""

import re
import sys
from typing import Any

import timm
import torch
import transformers as hf

from .llm import main
from .out import write
from .scripts import Row, State, conv, linear, made, norm, renamed, script

WAY = "transformers 4.46 {} traced"


def _with(state: State, after: str, key: str, tensor: torch.Tensor) -> State:
    """The state with one more key behind another."""
    out: State = {}
    for old, value in state.items():
        out[old] = value
        if old == after:
            out[key] = tensor
    return out


def beit() -> None:
    module = script("beit", "convert_beit_unilm_to_pytorch")
    config = hf.BeitConfig(
        hidden_size=192, num_attention_heads=12, intermediate_size=768, use_relative_position_bias=True, num_labels=1000
    )
    state = timm.create_model("beit_base_patch16_224", embed_dim=192, num_heads=12).state_dict()
    for i in range(12):
        state = _with(
            state,
            f"blocks.{i}.attn.relative_position_bias_table",
            f"blocks.{i}.attn.relative_position_index",
            torch.zeros(197, 197, dtype=torch.long),
        )
    state = {key: state[key] for key in state if "k_bias" not in key}

    def convert(state: State) -> State:
        renamed(module, state, module.create_rename_keys(config))
        module.read_in_q_k_v(state, config)
        return state

    write(
        "unilm_beit_base__hf_beit",
        "beit",
        "dev",
        state,
        hf.BeitForImageClassification(config).state_dict(),
        convert,
        WAY.format("convert_beit"),
    )


def dinov2() -> None:
    module = script("dinov2", "convert_dinov2_to_hf")
    config = hf.Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14)
    state = _with(
        timm.create_model("vit_small_patch14_dinov2").state_dict(), "pos_embed", "mask_token", torch.zeros(1, 384)
    )

    def convert(state: State) -> State:
        renamed(module, state, module.create_rename_keys(config))
        module.read_in_q_k_v(state, config)
        return state

    write(
        "fb_dinov2_small__hf_dinov2",
        "dinov2",
        "held",
        state,
        hf.Dinov2Model(config).state_dict(),
        convert,
        WAY.format("convert_dinov2"),
    )


def yolos() -> None:
    module = script("yolos", "convert_yolos_to_pytorch")
    config = hf.YolosConfig(
        hidden_size=192,
        num_hidden_layers=12,
        num_attention_heads=3,
        intermediate_size=768,
        image_size=[800, 1333],
        num_labels=91,
        use_mid_position_embeddings=False,
    )
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict()
    new = hf.YolosForObjectDetection(config).state_dict()
    state = {f"backbone.{key}": tensor for key, tensor in vit.items()}
    state["backbone.pos_embed"] = torch.zeros(new["vit.embeddings.position_embeddings"].shape)
    state = _with(state, "backbone.cls_token", "backbone.det_token", torch.zeros(1, 100, 192))
    head: list[Row] = [
        row
        for one, out in (("class_embed", 92), ("bbox_embed", 4))
        for i in range(3)
        for row in linear(f"{one}.layers.{i}", out if i == 2 else 192, 192)
    ]
    target = hf.YolosForObjectDetection(config)
    write(
        "hust_yolos_ti__hf_yolos",
        "yolos",
        "held",
        state | made(head),
        target.state_dict(),
        lambda state: module.convert_state_dict(state, target),
        WAY.format("convert_yolos"),
    )


def detr() -> None:
    import torchvision

    module = script("detr", "convert_detr_original_pytorch_checkpoint_to_pytorch")
    config = hf.DetrConfig(use_pretrained_backbone=False, num_labels=91, use_timm_backbone=True)
    target = hf.DetrForObjectDetection(config).state_dict()
    rows: list[Row] = []

    def attention(at: str) -> list[Row]:
        return [
            (f"{at}.in_proj_weight", (768, 256)),
            (f"{at}.in_proj_bias", (768,)),
            *linear(f"{at}.out_proj", 256, 256),
        ]

    for side, norms in (("encoder", 2), ("decoder", 3)):
        for i in range(6):
            at = f"transformer.{side}.layers.{i}"
            rows += attention(f"{at}.self_attn") + (attention(f"{at}.multihead_attn") if norms == 3 else [])
            rows += [*linear(f"{at}.linear1", 2048, 256), *linear(f"{at}.linear2", 256, 2048)]
            rows += [row for one in range(norms) for row in norm(f"{at}.norm{one + 1}", 256)]
    rows += [*norm("transformer.decoder.norm", 256), *linear("class_embed", 92, 256)]
    rows += [row for i in range(3) for row in linear(f"bbox_embed.layers.{i}", 4 if i == 2 else 256, 256)]
    rows += [("query_embed.weight", (100, 256)), *conv("input_proj", 256, 2048, 1, 1)]
    body = torchvision.models.resnet50(norm_layer=torchvision.ops.FrozenBatchNorm2d).state_dict()
    body = {f"backbone.0.body.{key}": tensor for key, tensor in body.items() if not key.startswith("fc.")}

    def convert(state: State) -> State:
        renamed(module, state, module.rename_keys)
        state = module.rename_backbone_keys(state)
        module.read_in_q_k_v(state)
        kept = ("class_labels_classifier", "bbox_predictor")
        return {key if key.startswith(kept) else f"model.{key}": tensor for key, tensor in state.items()}

    write("fb_detr_r50__hf_detr", "detr", "dev", made(rows) | body, target, convert, WAY.format("convert_detr"))


def pvt_v2() -> None:
    module = script("pvt_v2", "convert_pvt_v2_to_pytorch")
    config = hf.PvtV2Config(num_labels=1000)
    sizes, ratios = config.hidden_sizes, config.sr_ratios
    rows: list[Row] = []
    for i, (size, ratio, depth) in enumerate(zip(sizes, ratios, config.depths, strict=True)):
        kernel = config.patch_sizes[i]
        rows += [
            *conv(f"patch_embed{i + 1}.proj", size, sizes[i - 1] if i else 3, kernel, kernel),
            *norm(f"patch_embed{i + 1}.norm", size),
        ]
        for j in range(depth):
            at, wide = f"block{i + 1}.{j}", size * config.mlp_ratios[i]
            rows += [
                *norm(f"{at}.norm1", size),
                *linear(f"{at}.attn.q", size, size),
                *linear(f"{at}.attn.kv", 2 * size, size),
                *linear(f"{at}.attn.proj", size, size),
            ]
            rows += (
                [*conv(f"{at}.attn.sr", size, size, ratio, ratio), *norm(f"{at}.attn.norm", size)] if ratio > 1 else []
            )
            rows += [
                *norm(f"{at}.norm2", size),
                *linear(f"{at}.mlp.fc1", wide, size),
                *conv(f"{at}.mlp.dwconv.dwconv", wide, 1, 3, 3),
                *linear(f"{at}.mlp.fc2", size, wide),
            ]
        rows += norm(f"norm{i + 1}", size)
    rows += linear("head", 1000, sizes[-1])
    state = made(rows)

    def convert(state: State) -> State:
        renamed(module, state, module.create_rename_keys(config))
        module.read_in_k_v(state, config)
        return state

    write(
        "whai_pvt_v2_b0__hf_pvt_v2",
        "pvt",
        "dev",
        state,
        hf.PvtV2ForImageClassification(config).state_dict(),
        convert,
        WAY.format("convert_pvt_v2"),
    )
    from timm.models.pvt_v2 import checkpoint_filter_fn

    model = timm.create_model("pvt_v2_b0")
    write(
        "whai_pvt_v2_b0__timm_pvt_v2_b0",
        "pvt",
        "dev",
        state,
        model.state_dict(),
        lambda state: checkpoint_filter_fn(state, model),
        "timm checkpoint_filter_fn traced",
    )


def sam() -> None:
    module = script("sam", "convert_sam_to_hf")
    size, vision = 96, 192
    config = hf.SamConfig(vision_config={"hidden_size": vision, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 256, "output_channels": size, "global_attn_indexes": [2, 5, 8, 11], "window_size": 7},
                          mask_decoder_config={"hidden_size": size, "mlp_dim": 768, "num_attention_heads": 8, "iou_head_hidden_dim": size}, prompt_encoder_config={"hidden_size": size, "image_size": 256})  # fmt: skip
    new = hf.SamModel(config).state_dict()
    # The inverse of the script's table, longest words first; the order is that of segment-anything's modules.
    table = {new_word: old for old, new_word in module.KEYS_TO_MODIFY_MAPPING.items()}
    rows: list[Row] = []
    for key, tensor in new.items():
        if key == "shared_image_embedding.positional_embedding":
            continue
        old = key
        if match := re.match(
            r"(mask_decoder\.output_hypernetworks_mlps\.\d+)\.(proj_in|layers\.0|proj_out)\.(.*)", key
        ):
            old = f"{match[1]}.layers.{('proj_in', 'layers.0', 'proj_out').index(match[2])}.{match[3]}"
        head = re.match(r"(mask_decoder\.iou_prediction_head)\.(proj_in|layers\.0|proj_out)\.(.*)", key)
        if head:
            old = f"{head[1]}.layers.{('proj_in', 'layers.0', 'proj_out').index(head[2])}.{head[3]}"
        for word in sorted(table, key=len, reverse=True):
            only = {"iou": not head, "lay": key.startswith("vision_encoder")}
            old = old.replace(word, table[word]) if only.get(word[:3], True) else old
        rows.append((old, tuple(tensor.shape)))
    state = made(rows)
    ours = module.replace_keys(dict(state))
    assert set(ours) >= set(new), sorted(set(new) - set(ours))[:5]
    order = ["image_encoder", "prompt_encoder.pe_layer", "prompt_encoder.point", "prompt_encoder.not_a", "prompt_encoder.mask", "prompt_encoder.no_mask",
             "mask_decoder.transformer", "mask_decoder.iou_token", "mask_decoder.mask_tokens", "mask_decoder.output_up", "mask_decoder.output_hyper", "mask_decoder.iou_pred"]  # fmt: skip
    state = dict(
        sorted(state.items(), key=lambda row: next(i for i, start in enumerate(order) if row[0].startswith(start)))
    )
    write(
        "fb_sam_vit_b__hf_sam",
        "sam",
        "held",
        state,
        new,
        module.replace_keys,
        WAY.format("convert_sam (reduced width); names by the inverse of its table"),
    )


def timesformer() -> None:
    module = script("timesformer", "convert_timesformer_to_pytorch")
    size = 192
    config = hf.TimesformerConfig(hidden_size=size, num_attention_heads=12, intermediate_size=4 * size, num_labels=400)
    rows: list[Row] = [
        ("model.cls_token", (1, 1, size)),
        ("model.pos_embed", (1, 197, size)),
        ("model.time_embed", (1, 8, size)),
        *conv("model.patch_embed.proj", size, 3, 16, 16),
    ]
    for i in range(12):
        at = f"model.blocks.{i}"
        rows += [
            *norm(f"{at}.norm1", size),
            *linear(f"{at}.attn.qkv", 3 * size, size),
            *linear(f"{at}.attn.proj", size, size),
            *norm(f"{at}.temporal_norm1", size),
        ]
        rows += [
            *linear(f"{at}.temporal_attn.qkv", 3 * size, size),
            *linear(f"{at}.temporal_attn.proj", size, size),
            *linear(f"{at}.temporal_fc", size, size),
        ]
        rows += [
            *norm(f"{at}.norm2", size),
            *linear(f"{at}.mlp.fc1", 4 * size, size),
            *linear(f"{at}.mlp.fc2", size, 4 * size),
        ]
    rows += [*norm("model.norm", size), *linear("model.head", 400, size)]
    write("fb_timesformer_base__hf_timesformer", "timesformer", "dev", made(rows), hf.TimesformerForVideoClassification(config).state_dict(),
          lambda state: module.convert_state_dict(state, config), WAY.format("convert_timesformer") + " at a reduced width")  # fmt: skip


def videomae() -> None:
    module = script("videomae", "convert_videomae_to_pytorch")
    size, inner = 192, 96
    config = hf.VideoMAEConfig(
        hidden_size=size,
        num_attention_heads=12,
        intermediate_size=4 * size,
        decoder_hidden_size=inner,
        decoder_num_attention_heads=6,
        decoder_intermediate_size=4 * inner,
        use_mean_pooling=False,
    )

    def block(at: str, size: int) -> list[Row]:
        rows: list[Row] = [
            *norm(f"{at}.norm1", size),
            (f"{at}.attn.q_bias", (size,)),
            (f"{at}.attn.v_bias", (size,)),
            (f"{at}.attn.qkv.weight", (3 * size, size)),
        ]
        return [
            *rows,
            *linear(f"{at}.attn.proj", size, size),
            *norm(f"{at}.norm2", size),
            *linear(f"{at}.mlp.fc1", 4 * size, size),
            *linear(f"{at}.mlp.fc2", size, 4 * size),
        ]

    rows: list[Row] = [("mask_token", (1, 1, inner)), *conv("encoder.patch_embed.proj", size, 3, 2, 16, 16)]
    rows += [row for i in range(12) for row in block(f"encoder.blocks.{i}", size)] + [*norm("encoder.norm", size)]
    rows += [row for i in range(4) for row in block(f"decoder.blocks.{i}", inner)] + [
        *norm("decoder.norm", inner),
        *linear("decoder.head", 1536, inner),
    ]
    rows += [*linear("encoder_to_decoder", inner, size, False)]
    write("mcg_videomae_base__hf_videomae", "videomae", "held", made(rows), hf.VideoMAEForPreTraining(config).state_dict(),
          lambda state: module.convert_state_dict(state, config), WAY.format("convert_videomae") + " at a reduced width")  # fmt: skip


def focalnet() -> None:
    module = script("focalnet", "convert_focalnet_to_hf_format")
    depths, levels, windows = [2, 2, 6, 2], [3, 3, 3, 3], [3, 3, 3, 3]
    config = hf.FocalNetConfig(
        embed_dim=48,
        hidden_sizes=[96, 192, 384, 384],
        depths=depths,
        focal_levels=levels,
        focal_windows=windows,
        num_labels=1000,
    )
    rows: list[Row] = [*conv("patch_embed.proj", 48, 3, 4, 4), *norm("patch_embed.norm", 48)]
    for i, depth in enumerate(depths):
        size = 48 * 2**i
        for j in range(depth):
            at = f"layers.{i}.blocks.{j}"
            rows += [
                *norm(f"{at}.norm1", size),
                *linear(f"{at}.modulation.f", 2 * size + levels[i] + 1, size),
                *conv(f"{at}.modulation.h", size, size, 1, 1),
                *linear(f"{at}.modulation.proj", size, size),
            ]
            rows += [
                row
                for k in range(levels[i])
                for row in conv(
                    f"{at}.modulation.focal_layers.{k}.0", size, 1, windows[i] + 2 * k, windows[i] + 2 * k, bias=False
                )
            ]
            rows += [
                *norm(f"{at}.norm2", size),
                *linear(f"{at}.mlp.fc1", 4 * size, size),
                *linear(f"{at}.mlp.fc2", size, 4 * size),
            ]
        rows += (
            [*conv(f"layers.{i}.downsample.proj", 2 * size, size, 2, 2), *norm(f"layers.{i}.downsample.norm", 2 * size)]
            if i < 3
            else []
        )
    rows += [*norm("norm", 384), *linear("head", 1000, 384)]
    target = hf.FocalNetForImageClassification(config)

    def convert(state: State) -> State:
        new = {module.rename_key(key): tensor for key, tensor in state.items()}
        return {
            key
            if key.startswith("classifier")
            else f"focalnet.{key}"
            if not key.startswith("focalnet")
            else key: tensor
            for key, tensor in new.items()
        }

    write(
        "ms_focalnet_tiny__hf_focalnet",
        "focalnet",
        "held",
        made(rows),
        target.state_dict(),
        convert,
        WAY.format("convert_focalnet") + " at half the width",
    )


def mobilevit() -> None:
    module = script("mobilevit", "convert_mlcvnets_to_pytorch")
    config = hf.MobileViTConfig(num_labels=1000)
    target = hf.MobileViTForImageClassification(config)
    new = target.state_dict()
    rows: list[Row] = []
    for key, tensor in new.items():
        # The original's names, by hand from ml-cvnets; the script must give back exactly the target's.
        for old, ours in _ML_CVNETS:
            key = re.sub(old, ours, key)
        rows.append((key, tuple(tensor.shape)))
    state = made(rows)
    # There q, k and v are one.
    out: State = {}
    for key, tensor in state.items():
        if match := re.match(r"(.*)\.(query|key|value)\.(weight|bias)$", key):
            if match[2] == "query":
                out[f"{match[1]}.qkv_proj.{match[3]}"] = torch.zeros(3 * tensor.shape[0], *tensor.shape[1:])
        else:
            out[key] = tensor
    ours = module.convert_state_dict(dict(out), target)
    assert set(ours) == set(new), (sorted(set(ours) - set(new))[:4], sorted(set(new) - set(ours))[:4])
    write(
        "mlcvnets_mobilevit_s__hf_mobilevit",
        "mobilevit",
        "dev",
        out,
        new,
        lambda state: module.convert_state_dict(state, target),
        WAY.format("convert_mlcvnets"),
    )


_ML_CVNETS = [
    (r"^mobilevit\.", ""),
    (r"^conv_stem\.convolution\.", "conv_1.block.conv."),
    (r"^conv_stem\.normalization\.", "conv_1.block.norm."),
    (r"^conv_1x1_exp\.convolution\.", "conv_1x1_exp.block.conv."),
    (r"^conv_1x1_exp\.normalization\.", "conv_1x1_exp.block.norm."),
    (r"^classifier\.", "classifier.fc."),
    (r"^encoder\.layer\.0\.layer\.(\d)\.", r"layer_1.\1."),
    (r"^encoder\.layer\.1\.layer\.(\d)\.", r"layer_2.\1."),
    (r"^encoder\.layer\.(\d)\.downsampling_layer\.", lambda match: f"layer_{int(match[1]) + 1}.0."),
    (r"^encoder\.layer\.(\d)\.(?=conv_kxk)", lambda match: f"layer_{int(match[1]) + 1}.1.local_rep."),
    (r"^encoder\.layer\.(\d)\.(?=conv_1x1)", lambda match: f"layer_{int(match[1]) + 1}.1.local_rep."),
    (r"^encoder\.layer\.(\d)\.(conv_projection|fusion)\.", lambda match: f"layer_{int(match[1]) + 1}.1.{match[2]}."),
    (
        r"^encoder\.layer\.(\d)\.layernorm\.",
        lambda match: f"layer_{int(match[1]) + 1}.1.global_rep.{(2, 4, 3)[int(match[1]) - 2]}.",
    ),
    (
        r"^encoder\.layer\.(\d)\.transformer\.layer\.(\d)\.",
        lambda match: f"layer_{int(match[1]) + 1}.1.global_rep.{match[2]}.",
    ),
    (r"layernorm_before\.", "pre_norm_mha.0."),
    (r"layernorm_after\.", "pre_norm_ffn.0."),
    (r"attention\.attention\.", "pre_norm_mha.1."),
    (r"attention\.output\.dense\.", "pre_norm_mha.1.out_proj."),
    (r"intermediate\.dense\.", "pre_norm_ffn.1."),
    (r"output\.dense\.", "pre_norm_ffn.4."),
    (r"\.(expand_1x1)\.", r".block.exp_1x1."),
    (r"\.(conv_3x3)\.", r".block.conv_3x3."),
    (r"\.(reduce_1x1)\.", r".block.red_1x1."),
    (r"conv_kxk\.", "conv_3x3."),
    (r"conv_projection\.", "conv_proj."),
    (r"\.convolution\.", ".block.conv."),
    (r"\.normalization\.", ".block.norm."),
]


def hifigan() -> None:
    module = script("speecht5", "convert_hifigan")
    config = hf.SpeechT5HifiGanConfig(upsample_initial_channel=128)
    model = hf.SpeechT5HifiGan(config).double()
    new: Any = hf.SpeechT5HifiGan(config)
    with_norm = hf.SpeechT5HifiGan(config)
    torch.manual_seed(0)
    rows: list[Row] = []
    from unittest import mock

    with mock.patch.object(torch.nn.utils.parametrizations, "weight_norm", torch.nn.utils.weight_norm):
        with_norm.apply_weight_norm()
        names = [("conv_pre", "input_conv"), *((f"upsampler.{i}", f"upsamples.{i}.1") for i in range(4))]
        names += [
            (f"resblocks.{i}.convs{one}.{j}", f"blocks.{i}.convs{one}.{j}.1")
            for i in range(12)
            for one in (1, 2)
            for j in range(3)
        ]
        names += [("conv_post", "output_conv.1")]
        shapes = {key: tuple(tensor.shape) for key, tensor in with_norm.state_dict().items()}
        for ours, old in names:
            rows += [(f"{old}.{leaf}", shapes[f"{ours}.{leaf}"]) for leaf in ("bias", "weight_g", "weight_v")]

        def convert(state: State) -> State:
            with mock.patch.object(type(model), "remove_weight_norm", lambda self: None):
                module.load_weights(state, model, config)
            tagged = model.state_dict()
            return {key: tensor for key, tensor in tagged.items() if key not in ("mean", "scale")}

        write(
            "parallel_wavegan_hifigan__hf_speecht5_hifigan",
            "hifigan",
            "held",
            made(rows),
            with_norm.state_dict(),
            convert,
            WAY.format("convert_hifigan (before weight norm is removed)"),
        )
    del new


MAKERS = {
    one.__name__: one
    for one in (beit, dinov2, yolos, detr, pvt_v2, sam, timesformer, videomae, focalnet, mobilevit, hifigan)
}

if __name__ == "__main__":
    main(MAKERS, sys.argv[1:])
