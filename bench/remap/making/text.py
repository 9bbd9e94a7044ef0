"""Pairs of language and speech models, from their original names to Hugging Face's, by the scripts that transformers 4.46 ships.

Traced at a reduced width with the real depth. The originals' names are those that the scripts ask for, in the order of the
originals' modules, or alphabetical where the original is JAX.
"""

import importlib
import sys
import tempfile
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers as hf

from .llm import main
from .out import write
from .scripts import Row, State, caught, conv, linear, made, norm, script

WAY = "transformers 4.46 {} traced at a reduced width"


def t5x() -> None:
    module = script("t5", "convert_t5x_checkpoint_to_pytorch")
    config = hf.T5Config(
        vocab_size=2008,
        d_model=64,
        d_kv=8,
        d_ff=128,
        num_layers=8,
        num_heads=6,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )

    def attention(at: str) -> Iterator[Row]:
        for name in ("key", "out", "query", "value"):
            yield f"{at}/{name}/kernel", (48, 64) if name == "out" else (64, 48)

    def rows() -> Iterator[Row]:
        yield "token_embedder/embedding", (2008, 64)
        for side in ("encoder", "decoder"):
            yield f"{side}/{side}_norm/scale", (64,)
            yield f"{side}/relpos_bias/rel_embedding", (6, 32)
            for i in range(8):
                at = f"{side}/layers_{i}"
                yield from attention(f"{at}/{'attention' if side == 'encoder' else 'self_attention'}")
                if side == "decoder":
                    yield from attention(f"{at}/encoder_decoder_attention")
                    yield f"{at}/pre_cross_attention_layer_norm/scale", (64,)
                yield (
                    f"{at}/{'pre_attention_layer_norm' if side == 'encoder' else 'pre_self_attention_layer_norm'}/scale",
                    (64,),
                )
                yield f"{at}/pre_mlp_layer_norm/scale", (64,)
                for name in ("wi_0", "wi_1", "wo"):
                    yield f"{at}/mlp/{name}/kernel", (128, 64) if name == "wo" else (64, 128)
        yield "decoder/logits_dense/kernel", (64, 2008)

    def convert(state: State) -> State:
        flat = {tuple(key.split("/")): tensor.numpy() for key, tensor in state.items()}
        with mock.patch.object(module.traverse_util, "flatten_dict", lambda given: given):
            new = module.convert_t5x_to_pytorch(
                {"target": flat}, num_layers=8, num_decoder_layers=8, is_encoder_only=False
            )
        return module.make_state_dict(new, False)

    write(
        "t5x_t5_1_1_small__hf_t5",
        "t5",
        "dev",
        made(sorted(rows())),
        hf.T5ForConditionalGeneration(config).state_dict(),
        convert,
        WAY.format("convert_t5x"),
    )


def siglip() -> None:
    module = script("siglip", "convert_siglip_to_hf")
    config = hf.SiglipConfig(
        text_config={
            "hidden_size": 96,
            "intermediate_size": 384,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "vocab_size": 2000,
        },
        vision_config={"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 12, "num_attention_heads": 12},
    )
    state: State = {}
    for old, _ in module.create_rename_keys(config):
        shape: tuple[int, ...] = (96,)
        if "MultiHead" in old:
            shape = (
                (12, 8, 96)
                if old.endswith("out/kernel")
                else (96,)
                if "/out/" in old
                else (96, 12, 8)
                if old.endswith("kernel")
                else (12, 8)
            )
        elif "Dense_0" in old:
            shape = (96, 384) if old.endswith("kernel") else (384,)
        elif "Dense_1" in old:
            shape = (384, 96) if old.endswith("kernel") else (96,)
        shape = {
            "params/img/embedding/kernel": (16, 16, 3, 96), "params/img/pos_embedding": (1, 196, 96), "params/img/MAPHead_0/probe": (1, 1, 96),
            "params/txt/Embed_0/embedding": (2000, 96), "params/txt/pos_embedding": (1, 64, 96), "params/txt/head/kernel": (96, 96),
            "params/t": (1,), "params/b": (1,),
        }.get(old, shape)  # fmt: skip
        state[old] = torch.zeros(shape)
    for name in ("key", "query", "value"):
        at = f"params/img/MAPHead_0/MultiHeadDotProductAttention_0/{name}"
        state |= {f"{at}/kernel": torch.zeros(96, 12, 8), f"{at}/bias": torch.zeros(12, 8)}

    def convert(state: State) -> State:
        arrays: Any = {key: tensor.numpy() for key, tensor in state.items()}
        for old, new in module.create_rename_keys(config):
            module.rename_key(arrays, old, new, config)
        module.read_in_q_k_v_head(arrays, config)
        return arrays

    target = hf.SiglipModel(config).state_dict()
    write(
        "big_vision_siglip_base__hf_siglip",
        "siglip",
        "held",
        dict(sorted(state.items())),
        target,
        convert,
        WAY.format("convert_siglip"),
    )


def mixtral() -> None:
    module = script("mixtral", "convert_mixtral_weights_to_hf")
    params = {
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "hidden_size": 64,
        "num_key_value_heads": 2,
        "num_local_experts": 8,
        "intermediate_size": 112,
        "vocab_size": 500,
        "rms_norm_eps": 1e-5,
    }
    rows: list[Row] = [("tok_embeddings.weight", (500, 64)), ("norm.weight", (64,)), ("output.weight", (500, 64))]
    for i in range(8):
        at = f"layers.{i}"
        rows += [(f"{at}.attention.w{one}.weight", (16, 64) if one in "kv" else (64, 64)) for one in "qkvo"]
        rows += [
            (f"{at}.attention_norm.weight", (64,)),
            (f"{at}.ffn_norm.weight", (64,)),
            (f"{at}.block_sparse_moe.gate.weight", (8, 64)),
        ]
        rows += [(f"{at}.block_sparse_moe.{one}", (896, 64)) for one in ("w1", "w2", "w3")]
    config = hf.MixtralConfig(
        vocab_size=500,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
    )

    def convert(state: State) -> State:
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(module, "read_json", lambda path: params):
            return caught(
                lambda: module.write_model(folder, folder, "7B"),
                hf.MixtralForCausalLM,
                lambda path, **_: dict(state) if "00" in path else {},
            )

    write(
        "mistral_mixtral__hf_mixtral",
        "mixtral",
        "dev",
        made(rows),
        hf.MixtralForCausalLM(config).state_dict(),
        convert,
        WAY.format("convert_mixtral (8 of 32 layers)"),
    )


def gemma() -> None:
    module = script("gemma", "convert_gemma_weights_to_hf")
    config = hf.GemmaConfig(
        vocab_size=1000,
        hidden_size=128,
        intermediate_size=1024,
        num_hidden_layers=18,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=16,
    )
    rows: list[Row] = [("embedder.weight", (1000, 128))]
    for i in range(18):
        at = f"model.layers.{i}"
        rows += linear(f"{at}.self_attn.qkv_proj", 160, 128, False)
        rows += linear(f"{at}.self_attn.o_proj", 128, 128, False)
        rows += [row for one in ("gate_proj", "up_proj") for row in linear(f"{at}.mlp.{one}", 1024, 128, False)]
        rows += linear(f"{at}.mlp.down_proj", 128, 1024, False)
        rows += [(f"{at}.{one}.weight", (128,)) for one in ("input_layernorm", "post_attention_layernorm")]
    rows += [("model.norm.weight", (128,))]

    def convert(state: State) -> State:
        loaded = {"model_state_dict": state | {"freqs_cis": torch.zeros(1)}}
        return caught(lambda: module.write_model(".", ".", config), hf.GemmaForCausalLM, lambda *_, **__: loaded)

    write(
        "google_gemma_2b__hf_gemma_2b",
        "gemma",
        "dev",
        made(rows),
        hf.GemmaForCausalLM(config).state_dict(),
        convert,
        WAY.format("convert_gemma"),
    )


def olmo() -> None:
    module = script("olmo", "convert_olmo_weights_to_hf")
    given = {
        "n_layers": 16,
        "n_heads": 16,
        "d_model": 128,
        "max_sequence_length": 64,
        "vocab_size": 800,
        "multi_query_attention": False,
        "mlp_ratio": 8,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "weight_tying": True,
    }
    rows: list[Row] = [("transformer.wte.weight", (800, 128))]
    for i in range(16):
        at = f"transformer.blocks.{i}"
        rows += [*linear(f"{at}.attn_out", 128, 128, False), *linear(f"{at}.ff_out", 128, 512, False)]
        rows += [*linear(f"{at}.att_proj", 384, 128, False), *linear(f"{at}.ff_proj", 1024, 128, False)]
    config = hf.OlmoConfig(
        vocab_size=800,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=16,
        num_attention_heads=16,
        tie_word_embeddings=True,
    )

    def convert(state: State) -> State:
        new: State = {}

        def save(part: Any, path: str) -> None:
            new.update(part)

        stop = mock.patch.object(module, "OlmoConfig", side_effect=KeyboardInterrupt)
        with (
            tempfile.TemporaryDirectory() as folder,
            mock.patch("torch.load", lambda *_, **__: state),
            mock.patch("torch.save", save),
            stop,
        ):
            (module.Path(folder) / "config.yaml").write_text("")
            with mock.patch.object(module.yaml, "safe_load", lambda text: {"model": given}):
                try:
                    module.write_model(folder, folder)
                except KeyboardInterrupt:
                    return new
        raise AssertionError

    write(
        "ai2_olmo_1b__hf_olmo_1b",
        "olmo",
        "held",
        made(rows),
        hf.OlmoForCausalLM(config).state_dict(),
        convert,
        WAY.format("convert_olmo"),
    )


def nemotron() -> None:
    module = script("nemotron", "convert_nemotron_nemo_to_hf")
    hidden, heads, groups, ffn, layers = 128, 16, 4, 512, 32
    rows: list[Row] = [("model.embedding.word_embeddings.weight", (900, hidden))]
    for i in range(layers):
        at = f"model.decoder.layers.{i}"
        rows += linear(f"{at}.self_attention.linear_proj", hidden, hidden, False)
        rows += [
            (f"{at}.self_attention.linear_qkv.layer_norm_weight", (hidden,)),
            (f"{at}.self_attention.linear_qkv.layer_norm_bias", (hidden,)),
        ]
        rows += linear(f"{at}.self_attention.linear_qkv", hidden + 2 * groups * 8, hidden, False)
        rows += [
            (f"{at}.mlp.linear_fc1.layer_norm_weight", (hidden,)),
            (f"{at}.mlp.linear_fc1.layer_norm_bias", (hidden,)),
        ]
        rows += [
            *linear(f"{at}.mlp.linear_fc1", ffn, hidden, False),
            *linear(f"{at}.mlp.linear_fc2", hidden, ffn, False),
        ]
    rows += [*norm("model.decoder.final_layernorm", hidden), *linear("model.output_layer", 900, hidden, False)]
    config = hf.NemotronConfig(
        vocab_size=900,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
    )

    def convert(state: State) -> State:
        new: State = {}
        cfg = mock.MagicMock(hidden_size=hidden, num_attention_heads=heads, num_layers=layers, ffn_hidden_size=ffn)
        cfg.get = lambda name, default=None: {"num_query_groups": groups}.get(name, default)
        model = mock.MagicMock(cfg=cfg, state_dict=lambda: state)
        with (
            mock.patch.object(module, "Trainer"),
            mock.patch.object(module, "MegatronGPTModel") as made,
            mock.patch("torch.save", lambda given, path: new.update(given)),
        ):
            made.restore_from.return_value = model
            module.convert("x", "./x", precision="32", cpu_only=True)
        return new

    with mock.patch("torch.Tensor.to", lambda self, *_, **__: self):
        write(
            "nemo_nemotron__hf_nemotron",
            "nemotron",
            "dev",
            made(rows),
            hf.NemotronForCausalLM(config).state_dict(),
            convert,
            WAY.format("convert_nemotron"),
        )


def recurrent_gemma() -> None:
    module = script("recurrent_gemma", "convert_recurrent_gemma_to_hf")
    config = hf.RecurrentGemmaConfig(
        vocab_size=700,
        hidden_size=80,
        intermediate_size=480,
        num_hidden_layers=13,
        num_attention_heads=10,
        lru_width=80,
        num_key_value_heads=1,
        head_dim=8,
    )
    rows: list[Row] = [("embedder.input_embedding", (700, 80))]
    for i, kind in enumerate(config.layers_block_type):
        at = f"blocks.{i}"
        rows += [(f"{at}.temporal_pre_norm.scale", (80,))]
        if kind == "recurrent":
            inside = f"{at}.recurrent_block"
            rows += [
                *linear(f"{inside}.linear_y", 80, 80),
                *linear(f"{inside}.linear_x", 80, 80),
                *linear(f"{inside}.linear_out", 80, 80),
            ]
            rows += [
                (f"{inside}.conv_1d.w", (4, 80)),
                (f"{inside}.conv_1d.b", (80,)),
                (f"{inside}.rg_lru.a_param", (80,)),
            ]
            rows += [
                (f"{inside}.rg_lru.{one}.{leaf}", (10, 8, 8) if leaf == "w" else (10, 8))
                for one in ("input_gate", "a_gate")
                for leaf in "wb"
            ]
        else:
            inside = f"{at}.attention_block"
            rows += [
                *linear(f"{inside}.proj_q", 80, 80, False),
                *linear(f"{inside}.proj_k", 8, 80, False),
                *linear(f"{inside}.proj_v", 8, 80, False),
            ]
            rows += linear(f"{inside}.proj_final", 80, 80)
        rows += [
            (f"{at}.channel_pre_norm.scale", (80,)),
            (f"{at}.mlp_block.ffw_up.w", (2, 80, 240)),
            (f"{at}.mlp_block.ffw_up.b", (2, 1, 1, 240)),
        ]
        rows += linear(f"{at}.mlp_block.ffw_down", 80, 240)
    rows += [("final_norm.scale", (80,))]

    def convert(state: State) -> State:
        return caught(
            lambda: module.write_model(".", ".", config), hf.RecurrentGemmaForCausalLM, lambda *_, **__: state
        )

    write(
        "google_recurrentgemma_2b__hf_recurrentgemma",
        "recurrent_gemma",
        "dev",
        made(rows),
        hf.RecurrentGemmaForCausalLM(config).state_dict(),
        convert,
        WAY.format("convert_recurrent_gemma (13 of 26 layers)"),
    )


def rwkv() -> None:
    module = script("rwkv", "convert_rwkv_checkpoint_to_hf")
    config = hf.RwkvConfig(vocab_size=900, hidden_size=96, num_hidden_layers=12, intermediate_size=384)
    rows: list[Row] = [("emb.weight", (900, 96))]
    for i in range(12):
        at = f"blocks.{i}"
        rows += [*norm(f"{at}.ln1", 96), *norm(f"{at}.ln2", 96), *(norm(f"{at}.ln0", 96) if not i else ())]
        rows += [(f"{at}.att.{one}", (96,)) for one in ("time_decay", "time_first")]
        rows += [(f"{at}.att.time_mix_{one}", (1, 1, 96)) for one in "kvr"]
        rows += [
            row for one in ("key", "value", "receptance", "output") for row in linear(f"{at}.att.{one}", 96, 96, False)
        ]
        rows += [(f"{at}.ffn.time_mix_{one}", (1, 1, 96)) for one in "kr"]
        rows += [
            *linear(f"{at}.ffn.key", 384, 96, False),
            *linear(f"{at}.ffn.receptance", 96, 96, False),
            *linear(f"{at}.ffn.value", 96, 384, False),
        ]
    rows += [*norm("ln_out", 96), *linear("head", 900, 96, False)]
    write(
        "blinkdl_rwkv4__hf_rwkv",
        "rwkv",
        "held",
        made(rows),
        hf.RwkvForCausalLM(config).state_dict(),
        module.convert_state_dict,
        WAY.format("convert_rwkv"),
    )


def musicgen() -> None:
    module = script("musicgen", "convert_musicgen_transformers")
    size = 128
    config = hf.MusicgenDecoderConfig(
        vocab_size=256,
        hidden_size=size,
        ffn_dim=512,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_codebooks=4,
        max_position_embeddings=64,
    )
    rows: list[Row] = []
    rows += linear("condition_provider.conditioners.description.output_proj", size, 96)
    rows += [(f"emb.{i}.weight", (257, size)) for i in range(4)]
    for i in range(24):
        at = f"transformer.layers.{i}"
        rows += [
            (f"{at}.self_attn.in_proj_weight", (3 * size, size)),
            *linear(f"{at}.self_attn.out_proj", size, size, False),
        ]
        rows += [
            *linear(f"{at}.linear1", 512, size, False),
            *linear(f"{at}.linear2", size, 512, False),
            *norm(f"{at}.norm1", size),
            *norm(f"{at}.norm2", size),
        ]
        rows += [
            (f"{at}.cross_attention.in_proj_weight", (3 * size, size)),
            *linear(f"{at}.cross_attention.out_proj", size, size, False),
            *norm(f"{at}.norm_cross", size),
        ]
    rows += [*norm("out_norm", size), *(row for i in range(4) for row in linear(f"linears.{i}", 256, size, False))]
    write("audiocraft_musicgen_small__hf_musicgen_decoder", "musicgen", "dev", made(rows), hf.MusicgenForCausalLM(config).state_dict(),
          lambda state: module.rename_state_dict(dict(state), size)[0], WAY.format("convert_musicgen"))  # fmt: skip


def glm() -> None:
    module = script("glm", "convert_glm_weights_to_hf")
    config = hf.GlmConfig(
        vocab_size=600,
        hidden_size=128,
        intermediate_size=428,
        num_hidden_layers=40,
        num_attention_heads=16,
        num_key_value_heads=2,
        head_dim=8,
        attention_bias=True,
        pad_token_id=0,
    )
    rows: list[Row] = [
        ("transformer.embedding.word_embeddings.weight", (600, 128)),
        ("transformer.rotary_pos_emb.inv_freq", (4,)),
    ]
    for i in range(40):
        at = f"transformer.encoder.layers.{i}"
        rows += [
            (f"{at}.input_layernorm.weight", (128,)),
            *linear(f"{at}.self_attention.query_key_value", 160, 128),
            *linear(f"{at}.self_attention.dense", 128, 128, False),
        ]
        rows += [
            (f"{at}.post_attention_layernorm.weight", (128,)),
            *linear(f"{at}.mlp.dense_h_to_4h", 856, 128, False),
            *linear(f"{at}.mlp.dense_4h_to_h", 128, 428, False),
        ]
    rows += [
        ("transformer.encoder.final_layernorm.weight", (128,)),
        *linear("transformer.output_layer", 600, 128, False),
    ]
    write(
        "thudm_glm4_9b__hf_glm",
        "glm",
        "held",
        made(rows),
        hf.GlmForCausalLM(config).state_dict(),
        lambda state: module.convert_state_dict(state, config),
        WAY.format("convert_glm"),
    )


def megatron_gpt2() -> None:
    module = script("megatron_gpt2", "convert_megatron_gpt2_checkpoint")
    size, layers = 128, 24
    config = hf.GPT2Config(vocab_size=800, n_positions=96, n_embd=size, n_layer=layers, n_head=16)
    rows: list[Row] = [
        ("embedding.word_embeddings.weight", (800, size)),
        ("embedding.position_embeddings.weight", (96, size)),
    ]
    for i in range(layers):
        at = f"transformer.layers.{i}"
        rows += [
            *norm(f"{at}.input_layernorm", size),
            *linear(f"{at}.attention.query_key_value", 3 * size, size),
            *linear(f"{at}.attention.dense", size, size),
        ]
        rows += [
            *norm(f"{at}.post_attention_layernorm", size),
            *linear(f"{at}.mlp.dense_h_to_4h", 4 * size, size),
            *linear(f"{at}.mlp.dense_4h_to_h", size, 4 * size),
        ]
    rows += norm("transformer.final_layernorm", size)

    def convert(state: State) -> State:
        lm: dict[str, Any] = {
            "embedding": {
                "word_embeddings": {"weight": state["embedding.word_embeddings.weight"]},
                "position_embeddings": {"weight": state["embedding.position_embeddings.weight"]},
            }
        }
        lm["transformer"] = {
            key.removeprefix("transformer."): tensor for key, tensor in state.items() if key.startswith("transformer.")
        }
        return module.convert_megatron_checkpoint(
            None, {"model": {"language_model": lm}, "checkpoint_version": 3.0}, config
        )

    write(
        "megatron_gpt2_345m__hf_gpt2_medium",
        "megatron",
        "held",
        made(rows),
        hf.GPT2LMHeadModel(config).state_dict(),
        convert,
        WAY.format("convert_megatron_gpt2"),
    )


def opt() -> None:
    module = script("opt", "convert_opt_original_pytorch_checkpoint_to_pytorch")
    size = 96
    config = hf.OPTConfig(
        vocab_size=900,
        hidden_size=size,
        num_hidden_layers=12,
        ffn_dim=4 * size,
        num_attention_heads=12,
        max_position_embeddings=62,
        word_embed_proj_dim=size,
    )
    rows: list[Row] = [
        ("decoder.version", (1,)),
        ("decoder.embed_tokens.weight", (900, size)),
        ("decoder.embed_positions.weight", (64, size)),
    ]
    for i in range(12):
        at = f"decoder.layers.{i}"
        rows += [
            *linear(f"{at}.self_attn.qkv_proj", 3 * size, size),
            *linear(f"{at}.self_attn.out_proj", size, size),
            *norm(f"{at}.self_attn_layer_norm", size),
        ]
        rows += [
            *linear(f"{at}.fc1", 4 * size, size),
            *linear(f"{at}.fc2", size, 4 * size),
            *norm(f"{at}.final_layer_norm", size),
        ]
    rows += [*norm("decoder.layer_norm", size), *linear("decoder.output_projection", 900, size, False)]

    def convert(state: State) -> State:
        with mock.patch("torch.load", lambda *_, **__: dict(state)):
            return module.load_checkpoint("x")

    write(
        "metaseq_opt_125m__hf_opt_125m",
        "opt",
        "held",
        made(rows),
        hf.OPTModel(config).state_dict(),
        convert,
        WAY.format("convert_opt: k, v, q are fused in that order"),
    )


def wav2vec2() -> None:
    module = script("wav2vec2", "convert_wav2vec2_original_pytorch_checkpoint_to_pytorch")
    size = 96
    config = hf.Wav2Vec2Config(
        hidden_size=size,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=4 * size,
        conv_dim=(64,) * 7,
        vocab_size=32,
        num_conv_pos_embedding_groups=8,
    )
    rows: list[Row] = [("w2v_encoder.w2v_model.mask_emb", (size,))]
    for i in range(7):
        rows += conv(
            f"w2v_encoder.w2v_model.feature_extractor.conv_layers.{i}.0",
            64,
            64 if i else 1,
            config.conv_kernel[i],
            bias=False,
        )
        rows += norm(f"w2v_encoder.w2v_model.feature_extractor.conv_layers.{i}.2", 64) if not i else ()
    rows += linear("w2v_encoder.w2v_model.post_extract_proj", size, 64)
    rows += [
        ("w2v_encoder.w2v_model.encoder.pos_conv.0.bias", (size,)),
        ("w2v_encoder.w2v_model.encoder.pos_conv.0.weight_g", (1, 1, 128)),
        ("w2v_encoder.w2v_model.encoder.pos_conv.0.weight_v", (size, 12, 128)),
    ]
    for i in range(12):
        at = f"w2v_encoder.w2v_model.encoder.layers.{i}"
        rows += [
            row
            for one in ("k_proj", "v_proj", "q_proj", "out_proj")
            for row in linear(f"{at}.self_attn.{one}", size, size)
        ]
        rows += [
            *norm(f"{at}.self_attn_layer_norm", size),
            *linear(f"{at}.fc1", 4 * size, size),
            *linear(f"{at}.fc2", size, 4 * size),
            *norm(f"{at}.final_layer_norm", size),
        ]
    rows += [
        *norm("w2v_encoder.w2v_model.encoder.layer_norm", size),
        *norm("w2v_encoder.w2v_model.layer_norm", 64),
        *linear("w2v_encoder.proj", 32, size),
    ]
    target = hf.Wav2Vec2ForCTC(config)

    def convert(state: State) -> State:
        model = hf.Wav2Vec2ForCTC(config).double()
        module.recursively_load_weights(SimpleNamespace(state_dict=lambda: state), model, False)
        tagged = model.state_dict()
        return {
            key: tensor
            for key, tensor in tagged.items()
            if tensor.flatten()[0] >= 1 and tensor.double().eq(tensor.double().floor()).all()
        }

    write(
        "fairseq_wav2vec2_base_ctc__hf_wav2vec2",
        "wav2vec2",
        "dev",
        made(rows),
        target.state_dict(),
        convert,
        WAY.format("convert_wav2vec2"),
    )


def encodec() -> None:
    module = script("encodec", "convert_encodec_checkpoint_to_pytorch")
    config = hf.EncodecConfig()
    # The script knows the names of the older weight norm only: weight_g and weight_v.
    with mock.patch.object(
        importlib.import_module("transformers.models.encodec.modeling_encodec").nn.utils.parametrizations,
        "weight_norm",
        torch.nn.utils.weight_norm,
    ):
        target, model = hf.EncodecModel(config), hf.EncodecModel(config).double()
    new = target.state_dict()
    tables = {**module.MAPPING_ENCODER, **module.MAPPING_DECODER}
    state: State = {}
    for old, ours in tables.items():
        # The shapes are the target's.
        for leaf in (
            "bias",
            "weight_g",
            "weight_v",
            *(f"{kind}_{one}_l{i}" for i in range(2) for kind in ("weight", "bias") for one in ("ih", "hh")),
        ):
            if f"{ours}.{leaf}" in new:
                state[f"{old}.{leaf}"] = torch.zeros(new[f"{ours}.{leaf}"].shape)
    encoder = {key: tensor for key, tensor in state.items() if key.startswith("encoder")}
    decoder = {key: tensor for key, tensor in state.items() if key.startswith("decoder")}
    books = {
        f"quantizer.vq.layers.{i}._codebook.{leaf}": torch.zeros(new[f"quantizer.layers.{i}.codebook.{leaf}"].shape)
        for i in range(32)
        for leaf in ("inited", "cluster_size", "embed", "embed_avg")
    }

    def convert(state: State) -> State:
        module.recursively_load_weights(state, model, "encodec_24khz")
        return {
            key: tensor
            for key, tensor in model.state_dict().items()
            if tensor.flatten()[0] >= 1 and tensor.double().eq(tensor.double().floor()).all()
        }

    write(
        "encodec_24khz__hf_encodec",
        "encodec",
        "dev",
        encoder | decoder | books,
        new,
        convert,
        WAY.format("convert_encodec").replace(" at a reduced width", ""),
    )


def persimmon() -> None:
    module = script("persimmon", "convert_persimmon_weights_to_hf")
    size = 128
    config = hf.PersimmonConfig(
        vocab_size=700, hidden_size=size, intermediate_size=4 * size, num_hidden_layers=36, num_attention_heads=16
    )
    rows: list[Row] = [("language_model.embedding.word_embeddings.weight", (700, size))]
    for i in range(36):
        at = f"language_model.encoder.layers.{i}"
        rows += [
            *norm(f"{at}.input_layernorm", size),
            *linear(f"{at}.self_attention.query_key_value", 3 * size, size),
            *linear(f"{at}.self_attention.dense", size, size),
        ]
        rows += [
            *norm(f"{at}.self_attention.q_layernorm", 8),
            *norm(f"{at}.self_attention.k_layernorm", 8),
            (f"{at}.self_attention.rotary_emb.inv_freq", (4,)),
        ]
        rows += [
            *norm(f"{at}.post_attention_layernorm", size),
            *linear(f"{at}.mlp.dense_h_to_4h", 4 * size, size),
            *linear(f"{at}.mlp.dense_4h_to_h", size, 4 * size),
        ]
    rows += [*norm("language_model.encoder.final_layernorm", size), ("word_embeddings_for_head.weight", (700, size))]
    write(
        "adept_persimmon_8b__hf_persimmon",
        "persimmon",
        "held",
        made(rows),
        hf.PersimmonForCausalLM(config).state_dict(),
        module.rename_state_dict,
        WAY.format("convert_persimmon"),
    )


MAKERS = {
    one.__name__: one
    for one in (
        t5x,
        siglip,
        mixtral,
        gemma,
        olmo,
        nemotron,
        recurrent_gemma,
        rwkv,
        musicgen,
        glm,
        megatron_gpt2,
        opt,
        wav2vec2,
        encodec,
        persimmon,
    )
}

if __name__ == "__main__":
    np.seterr(all="raise")
    main(MAKERS, sys.argv[1:])
