"""Pairs of two implementations of one model, from timm, torchvision, transformers and pytorchcv."""

import timm
import torch
import torchvision.models as tv
import transformers as hf
from torch import nn

from .aligned import aligned, earlier
from .out import write

torch.manual_seed(0)


def image(size: int = 224) -> torch.Tensor:
    """A random image; numbers differ everywhere."""
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(5))


def both(
    name: str, family: str, half: str, source: nn.Module, target: nn.Module, size: int = 224, **options: object
) -> None:
    """A pair of models that both take an image and give logits."""
    shown = image(size)

    def logits(given: object) -> torch.Tensor:
        given = getattr(given, "logits", given)
        return given[0] if isinstance(given, tuple) else given

    options.setdefault("run", lambda model: model(shown))
    options.setdefault("output", logits)
    convert, said = aligned(source, target, **options)
    write(name, family, half, source.state_dict(), target.state_dict(), convert, said)


def cv(name: str) -> nn.Module:
    """A model of pytorchcv."""
    from pytorchcv.model_provider import get_model

    return get_model(name, pretrained=False)


def tm(name: str, **options: object) -> nn.Module:
    """A model of timm."""
    return timm.create_model(name, pretrained=False, **options)


def mobilevitv2() -> None:
    """Both keep apple's structure."""
    target = hf.MobileViTV2ForImageClassification(hf.MobileViTV2Config(num_labels=1000))
    both("timm_mobilevitv2_100__hf_mobilevitv2", "mobilevit", "dev", tm("mobilevitv2_100"), target, 256)


def mobilenet_v1() -> None:
    """hf has TensorFlow's padding, which an odd size makes equal."""
    target = hf.MobileNetV1ForImageClassification(hf.MobileNetV1Config(num_labels=1000, tf_padding=False))
    both("timm_mobilenetv1_100__hf_mobilenet_v1", "mobilenet_v1", "held", tm("mobilenetv1_100"), target)


MAKERS = {
    "squeezenet": lambda: both(
        "tv_squeezenet1_0__pytorchcv_squeezenet_v1_0", "squeezenet", "dev", tv.squeezenet1_0(), cv("squeezenet_v1_0")
    ),
    "regnet_tv_timm": lambda: both(
        "tv_regnet_y_400mf__timm_regnety_004",
        "regnet",
        "dev",
        tv.regnet_y_400mf(),
        tm("regnety_004"),
        order=earlier("proj", back=True),
    ),
    "mnasnet": lambda: both("tv_mnasnet1_0__timm_mnasnet_100", "mnasnet", "held", tv.mnasnet1_0(), tm("mnasnet_100")),
    "inception3": lambda: both(
        "tv_inception_v3__timm_inception_v3",
        "inception",
        "dev",
        tv.inception_v3(aux_logits=False, transform_input=False, init_weights=False),
        tm("inception_v3"),
        299,
    ),
    "dla": lambda: both("timm_dla34__pytorchcv_dla34", "dla", "dev", tm("dla34"), cv("dla34")),
    "dpn": lambda: both("timm_dpn68__pytorchcv_dpn68", "dpn", "held", tm("dpn68"), cv("dpn68")),
    "xception": lambda: both(
        "timm_xception__pytorchcv_xception",
        "xception",
        "dev",
        tm("legacy_xception"),
        cv("xception"),
        299,
        order_target=earlier("identity_conv", back=True),
    ),
    "inception4": lambda: both(
        "timm_inception_v4__pytorchcv_inceptionv4", "inception", "dev", tm("inception_v4"), cv("inceptionv4"), 299
    ),
    "inception_resnet": lambda: both(
        "timm_inception_resnet_v2__pytorchcv_inceptionresnetv2",
        "inception",
        "dev",
        tm("inception_resnet_v2"),
        cv("inceptionresnetv2"),
        299,
    ),
    "hrnet": lambda: both(
        "timm_hrnet_w18_small__pytorchcv_hrnet_w18_small_v1",
        "hrnet",
        "held",
        tm("hrnet_w18_small"),
        cv("hrnet_w18_small_v1"),
        order_target=earlier("identity_conv", back=True),
    ),
    "senet": lambda: both(
        "timm_seresnet50__pytorchcv_seresnet50b",
        "senet",
        "dev",
        tm("seresnet50"),
        cv("seresnet50b"),
        order_target=earlier("identity_conv", back=True),
    ),
    "selecsls": lambda: both(
        "timm_selecsls42b__pytorchcv_selecsls42b", "selecsls", "held", tm("selecsls42b"), cv("selecsls42b")
    ),
    "mixnet": lambda: both("timm_mixnet_s__pytorchcv_mixnet_s", "mixnet", "held", tm("mixnet_s"), cv("mixnet_s")),
    "alexnet": lambda: both("tv_alexnet__pytorchcv_alexnetb", "alexnet", "held", tv.alexnet(), cv("alexnetb")),
    "resnest": lambda: both(
        "timm_resnest26d__pytorchcv_resnesta26",
        "resnest",
        "dev",
        tm("resnest26d"),
        cv("resnestabc26"),
        order_target=earlier("identity_block", back=True),
    ),
    "pnasnet": lambda: both(
        "timm_pnasnet5large__pytorchcv_pnasnet5large", "nasnet", "held", tm("pnasnet5large"), cv("pnasnet5large"), 331
    ),
    "fbnet": lambda: both("timm_fbnetc_100__pytorchcv_fbnet_cb", "fbnet", "held", tm("fbnetc_100"), cv("fbnet_cb")),
    "spnasnet": lambda: both(
        "timm_spnasnet_100__pytorchcv_spnasnet", "spnasnet", "dev", tm("spnasnet_100"), cv("spnasnet")
    ),
    "regnet_timm_hf": lambda: both(
        "timm_regnety_040__hf_regnet",
        "regnet",
        "dev",
        tm("regnety_040"),
        hf.RegNetForImageClassification(
            hf.RegNetConfig(depths=[2, 6, 12, 2], hidden_sizes=[128, 192, 512, 1088], groups_width=64, num_labels=1000)
        ),
    ),
}

MAKERS |= {one.__name__: one for one in (mobilevitv2, mobilenet_v1)}


def main(names: list[str]) -> None:
    """Makes the pairs of these names, or all."""
    import traceback

    for name in names or MAKERS:
        try:
            MAKERS[name]()
        except Exception as error:
            print("FAILED", name, str(error)[:700], traceback.extract_tb(error.__traceback__)[-1].lineno, flush=True)


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
