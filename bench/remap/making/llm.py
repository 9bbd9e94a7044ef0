"""Pairs of language models, by the conversions of litgpt and torchtune: from Hugging Face's names to theirs.

Traced at a reduced width, with the real depth and numbers of heads.
"""

import sys
from collections import defaultdict
from typing import Any

import torch
import transformers as hf

from .out import write

WAY = "litgpt {} traced at a reduced width"


def litgpt(name: str, family: str, half: str, config: str, model: Any, copy: str, **small: Any) -> None:
    """A pair by one of litgpt's copy_weights functions."""
    from litgpt import GPT, Config
    from litgpt.scripts import convert_hf_checkpoint as conversions

    made = Config.from_name(config, **small)
    function = getattr(conversions, copy)
    arguments = function.__code__.co_varnames[: function.__code__.co_argcount]

    def convert(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        new: dict[str, torch.Tensor] = {}
        # What both hold once is given once, as in the file.
        given: dict[str, Any] = {"config": made, "state_dict": new, "hf_weights": state}
        if "qkv_weights" in arguments:
            given["qkv_weights"] = defaultdict(lambda: defaultdict(dict)) if copy == "copy_weights_phi" else {}
        function(**{key: value for key, value in given.items() if key in arguments})
        return new

    target = GPT(made).state_dict()
    write(name, family, half, model.state_dict(), target, convert, WAY.format(copy))


def pythia() -> None:
    config = hf.GPTNeoXConfig(
        vocab_size=3144, hidden_size=128, num_hidden_layers=16, num_attention_heads=8, intermediate_size=512
    )
    litgpt("hf_pythia_1b__litgpt_pythia_1b", "gpt_neox", "dev", "pythia-1b", hf.GPTNeoXForCausalLM(config), "copy_weights_gpt_neox",
           n_embd=128, n_head=8, head_size=16, n_query_groups=8, intermediate_size=512, padded_vocab_size=3144)  # fmt: skip


def falcon() -> None:
    config = hf.FalconConfig(
        vocab_size=4064,
        hidden_size=568,
        num_hidden_layers=32,
        num_attention_heads=71,
        multi_query=True,
        tie_word_embeddings=False,
    )
    litgpt("hf_falcon_7b__litgpt_falcon_7b", "falcon", "held", "falcon-7b", hf.FalconForCausalLM(config), "copy_weights_falcon",
           n_embd=568, n_head=71, head_size=8, n_query_groups=1, intermediate_size=2272, padded_vocab_size=4064)  # fmt: skip


def phi() -> None:
    config = hf.PhiConfig(
        vocab_size=3200, hidden_size=256, intermediate_size=1024, num_hidden_layers=32, num_attention_heads=32
    )
    litgpt("hf_phi_2__litgpt_phi_2", "phi", "dev", "phi-2", hf.PhiForCausalLM(config), "copy_weights_phi",
           n_embd=256, n_head=32, head_size=8, n_query_groups=32, intermediate_size=1024, padded_vocab_size=3200)  # fmt: skip


def gemma2() -> None:
    config = hf.Gemma2Config(
        vocab_size=4000,
        hidden_size=288,
        intermediate_size=1152,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
    )
    litgpt("hf_gemma2_2b__litgpt_gemma2_2b", "gemma", "dev", "Gemma-2-2b", hf.Gemma2ForCausalLM(config), "copy_weights_gemma_2",
           n_embd=288, n_head=8, head_size=32, n_query_groups=4, intermediate_size=1152, padded_vocab_size=4000)  # fmt: skip


def qwen25() -> None:
    config = hf.Qwen2Config(
        vocab_size=4744,
        hidden_size=112,
        intermediate_size=608,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
    )
    litgpt("hf_qwen25_05b__litgpt_qwen25_05b", "qwen", "held", "Qwen2.5-0.5B", hf.Qwen2ForCausalLM(config), "copy_weights_qwen_2_5",
           n_embd=112, n_head=14, head_size=8, n_query_groups=2, intermediate_size=608, padded_vocab_size=4744)  # fmt: skip


def olmo2() -> None:
    config = hf.Olmo2Config(
        vocab_size=3140, hidden_size=256, intermediate_size=688, num_hidden_layers=32, num_attention_heads=32
    )
    litgpt("hf_olmo2_7b__litgpt_olmo2_7b", "olmo", "held", "OLMo-2-1124-7B", hf.Olmo2ForCausalLM(config), "copy_weights_olmo2",
           n_embd=256, n_head=32, head_size=8, n_query_groups=32, intermediate_size=688, padded_vocab_size=3140)  # fmt: skip


MAKERS = {"pythia": pythia, "falcon": falcon, "phi": phi, "gemma2": gemma2, "qwen25": qwen25, "olmo2": olmo2}


def main(makers: dict[str, Any], names: list[str]) -> None:
    """Makes the pairs of these names, or all; one that fails does not stop the others."""
    import traceback

    for name in names or makers:
        try:
            makers[name]()
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            print("FAILED", name, type(error).__name__, str(error)[:700], where.filename, where.lineno, flush=True)


if __name__ == "__main__":
    main(MAKERS, sys.argv[1:])
