"""Networks: which can be built, where their features are, and what identifies them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from featcache.errors import InputError
from featcache.networks import (
    FACTS,
    NetworkSpec,
    autocast,
    checkpoint_gradients,
    classifier,
    classifier_name,
    network_id,
    recorded_features,
    refuse_unfit,
    resolve_device,
    resolve_precision,
    resolve_preprocessing,
    training_spec,
)
from featcache.settings import parse_kwargs
from featcache.views import Preprocessing

K = 7
# A family each, the smallest of it.
SMALL = [
    "test_byobnet",
    "test_convnext",
    "test_efficientnet",
    "test_maxvit",
    "test_mambaout",
    "test_nfnet",
    "test_resnet",
    "test_vit",
    "test_vit_relpos",
    "dla46x_c",  # ends in a convolution of 1 x 1
    "edgenext_xx_small",
    "efficientvit_m0",
    "fasternet_t0",
    "ghostnet_050",
    "mobilenetv3_small_050",
    "mobilevit_xxs",
    "pvt_v2_b0",
    "repghostnet_050",
    "starnet_s050",
    "xcit_nano_12_p16_224",
]
LARGE = [
    "beit_base_patch16_224",
    "cait_xxs24_224",
    "coat_tiny",
    "convmixer_768_32",
    "dpn48b",  # ends in a convolution of 1 x 1
    "eva02_tiny_patch14_224",
    "focalnet_tiny_srf",
    "gcvit_xxtiny",
    "hrnet_w18_small",
    "inception_v4",
    "mixer_s32_224",
    "mvitv2_tiny",
    "poolformer_s12",
    "regnety_002",
    "resnetv2_50x1_bit",  # ends in a convolution of 1 x 1
    "rexnet_100",
    "swin_tiny_patch4_window7_224",
    "tf_efficientnetv2_b0",
    "tresnet_m",
    "vgg11",
    "xception41p",
]
UNTELLABLE = [
    "crossvit_tiny_240",  # two branches, averaged
    "deit_tiny_distilled_patch16_224",  # two tokens with a layer each, averaged
    "efficientformer_l1",
    "efficientformerv2_s0",
    "levit_128s",  # two layers, averaged; so are those of the next one
    "swiftformer_xs",
    "volo_d1_224",  # adds the maximum over patches
    "gemma4_vit_167m_enc",  # no classifier
]
CONTEST = ["pnasnet5large", "nasnetalarge", "senet154", "resnet152", "resnet101", "densenet121"]


def known(names: list[str]) -> list[str]:
    """Those that this version of timm has; some families are younger than the oldest allowed."""
    return [name for name in names if timm.is_model(name)]


MODULE = '''
"""Networks of a user's own."""
import torch
from torch import nn


class Net(nn.Module):
    """Two linear layers, of which the second is the last."""

    def __init__(self, num_classes, width=5, bias=True):
        super().__init__()
        self.stem = nn.Linear(12, width)
        self.last = nn.Linear(width, num_classes, bias=bias)

    def forward(self, x):
        return self.last(torch.relu(self.stem(x.flatten(1))))


class Lying(Net):
    """Says that its stem is its classifier."""

    def get_classifier(self):
        return self.stem


def net(num_classes, **kwargs):
    return Net(num_classes, **kwargs)


def lying(num_classes):
    return Lying(num_classes)


class Pair(Net):
    def forward(self, x):
        return super().forward(x), x


class Tokens(Net):
    """Its last layer works on a sequence, of which the mean is the answer."""

    def forward(self, x):
        return self.last(torch.relu(self.stem(x.flatten(1)))[:, None].expand(-1, 3, -1)).mean(1)


class Idle(Net):
    """Never calls its last layer."""

    def forward(self, x):
        return torch.nn.functional.linear(self.stem(x.flatten(1)), self.last.weight)


def pair(num_classes):
    return Pair(num_classes)


def tokens(num_classes):
    return Tokens(num_classes)


def idle(num_classes):
    return Idle(num_classes)


def convolutional(num_classes):
    return nn.Sequential(nn.Conv2d(3, num_classes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def stubborn(num_classes):
    """Always a thousand outputs."""
    return Net(1000)


def number(num_classes):
    return num_classes


def broken(num_classes):
    raise RuntimeError("needs at least 4 GB")
'''


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of an importable module with networks."""
    (tmp_path / "own_networks.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "own_networks"


def pixels(size: int = 160) -> torch.Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))


# -------------------------------------------------------------------- building


def input_size(arch: str) -> int:
    """Side of the images that timm made the model for."""
    return int(timm.get_pretrained_cfg(arch).input_size[-1])


@pytest.mark.parametrize(
    "arch",
    [
        *known(SMALL),
        *[pytest.param(arch, marks=pytest.mark.slow) for arch in known(LARGE + CONTEST)],
    ],
)
def test_features_times_last_layer_are_the_logits(arch: str) -> None:
    torch.manual_seed(0)
    spec = NetworkSpec(arch, K)
    network = spec.build().eval()
    layer = classifier(network, spec)
    size = 224 if arch in CONTEST else input_size(arch)
    with torch.no_grad(), recorded_features(layer) as seen:
        logits = network(pixels(size))
    assert logits.shape == (2, K)
    (features,) = seen
    weight = layer.weight.detach().double().reshape(K, -1)
    assert features.shape == (2, weight.shape[1])
    bias = 0 if layer.bias is None else layer.bias.detach().double()
    again = features.double() @ weight.T + bias
    torch.testing.assert_close(logits.double(), again, rtol=1e-5, atol=1e-5)
    assert float(features.std()) > 0
    refuse_unfit(network, spec, resolve_preprocessing(network, size))


@pytest.mark.parametrize("arch", known(UNTELLABLE))
def test_a_model_whose_features_cannot_be_told_is_refused_by_name(arch: str) -> None:
    torch.manual_seed(0)

    def build() -> None:
        spec = NetworkSpec(arch, K)
        network = spec.build().eval()
        refuse_unfit(network, spec, resolve_preprocessing(network, input_size(arch)))

    with pytest.raises(InputError, match="penultimate features cannot be told") as caught:
        build()
    assert repr(arch) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_other_uses_of_a_network_that_does_not_fit(own_module: str) -> None:
    for factory, size, message in [
        ("net", 3, "takes no images of 3 x 3 pixels"),
        ("pair", 2, "makes outputs of shape ()"),
        ("tokens", 2, r"its logits are not features @ W0.T + b0 of its last layer 'last'"),
        ("idle", 2, r"its logits are not features @ W0.T + b0 of its last layer 'last'"),
    ]:
        spec = NetworkSpec(f"own_networks:{factory}", K)
        torch.manual_seed(0)
        network = spec.build().eval()
        with pytest.raises(InputError, match=re.escape(message)) as caught:
            refuse_unfit(network, spec, Preprocessing(image_size=size))
        assert repr(spec.arch) in str(caught.value)
    spec = NetworkSpec("own_networks:net", K)
    refuse_unfit(spec.build().eval(), spec, Preprocessing(image_size=2))


WIDTHS = [
    ("pnasnet5large", 4320),
    ("nasnetalarge", 4032),
    ("senet154", 2048),
    ("resnet152", 2048),
    ("resnet101", 2048),
    ("densenet121", 1024),
]


@pytest.mark.parametrize("arch", CONTEST)
def test_what_is_recorded_of_a_network_is_so(arch: str) -> None:
    facts = FACTS[arch]
    assert (arch, facts.features) in WIDTHS
    spec = training_spec(arch, K, {})
    assert spec.kwargs == facts.kwargs
    with torch.device("meta"):
        network = spec.build()
    assert float(getattr(network, "drop_rate", 0)) == facts.kwargs.get("drop_rate", 0) or any(
        isinstance(m, nn.Dropout) and m.p == facts.kwargs["drop_rate"] for m in network.modules()
    )
    assert not any("aux" in name for name, _ in network.named_modules())
    if facts.checkpointing:
        checkpoint_gradients(network, spec)
    else:
        with pytest.raises(InputError, match=f"{arch!r} cannot do it"):
            checkpoint_gradients(network, spec)


def test_the_user_s_options_go_before_what_is_recorded() -> None:
    assert training_spec("nasnetalarge", K, {}).kwargs == {"drop_rate": 0.5}
    assert training_spec("nasnetalarge", K, {"drop_rate": 0.1}).kwargs == {"drop_rate": 0.1}
    assert training_spec("resnet18", K, {"drop_rate": 0.1}).kwargs == {"drop_rate": 0.1}


@pytest.mark.parametrize(("arch", "width"), WIDTHS)
def test_large_networks_have_the_features_that_are_documented(arch: str, width: int) -> None:
    spec = NetworkSpec(arch, K)
    with torch.device("meta"):  # shapes without memory or arithmetic
        network = spec.build().eval()
        layer = classifier(network, spec)
        with torch.no_grad(), recorded_features(layer) as seen:
            logits = network(torch.empty(1, 3, 224, 224))
    assert layer.in_features == width
    assert seen[0].shape == (1, width)
    assert logits.shape == (1, K)


def test_a_network_of_ones_own(own_module: str) -> None:
    spec = NetworkSpec("own_networks:net", K, {"width": 9})
    network = spec.build()
    assert classifier_name(network, spec) == "last"
    assert classifier(network, spec).in_features == 9
    spec = NetworkSpec("own_networks:net", K, {"bias": False})
    assert classifier(spec.build(), spec).bias is None


def test_of_two_layers_of_a_size_the_last_is_the_classifier(own_module: str) -> None:
    spec = NetworkSpec("own_networks:net", K, {"width": K})
    assert classifier_name(spec.build(), spec) == "last"


def test_a_claimed_classifier_must_have_the_outputs(own_module: str) -> None:
    spec = NetworkSpec("own_networks:lying", K)
    assert classifier_name(spec.build(), spec) == "last"


@pytest.mark.parametrize(
    ("arch", "kwargs", "message"),
    [
        ("resnet10", {}, "did you mean .*resnet101"),
        ("mobilenetv3_smal_050", {}, "did you mean .*mobilenetv3_small_050"),
        ("@@@", {}, "not a timm model; see timm.list_models"),
        ("test_efficientnet", {"no_such_option": 1}, "no_such_option"),
        ("test_efficientnet", {"num_classes": 3}, "num_classes"),
        ("test_vit", {"act_layer": "nonsense"}, "nonsense"),
        ("own_networks:net", {"depth": 3}, "depth"),
        ("own_networks:net", {"width": "wide"}, "wide"),
        ("own_networks:absent", {}, "absent"),
        ("own_networks:MODULE", {}, "MODULE"),
        ("no_such_module_here:net", {}, "no_such_module_here"),
        ("own_networks:convolutional", {}, "no linear last layer with 7 outputs"),
        ("own_networks:stubborn", {}, "no linear last layer with 7 outputs"),
        ("own_networks:number", {}, "returned int, no nn.Module"),
        ("own_networks:broken", {}, "needs at least 4 GB"),
    ],
)
def test_what_cannot_be_built_is_said_in_one_line(
    own_module: str, arch: str, kwargs: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        NetworkSpec(arch, K, kwargs).build()
    assert repr(arch) in str(caught.value)
    if kwargs:
        assert all(name in str(caught.value) for name in kwargs)


def test_the_seed_of_torch_decides_the_weights(own_module: str) -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        spec = NetworkSpec("own_networks:net", K)
        return classifier(spec.build(), spec).weight

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_keyword_arguments_are_read_as_json_where_they_can_be() -> None:
    pairs = ["width=16", "rate=1e-3", "act=silu", "deep=true", "sizes=[1, 2]", "eq=a=b", "none="]
    assert parse_kwargs(pairs) == {
        "width": 16,
        "rate": 1e-3,
        "act": "silu",
        "deep": True,
        "sizes": [1, 2],
        "eq": "a=b",
        "none": "",
    }
    with pytest.raises(InputError, match="'width': expected keyword=value"):
        parse_kwargs(["width"])


# ------------------------------------------------------------------- recording


def test_only_the_newest_input_is_kept_and_nothing_after_the_end() -> None:
    layer = nn.Linear(3, 2)
    first, second, third = torch.rand(3, 4, 3, generator=torch.Generator().manual_seed(0))
    with recorded_features(layer) as seen:
        assert seen == []
        layer(first)
        layer(second)
        assert len(seen) == 1
        assert torch.equal(seen[0], second)
    layer(third)
    assert torch.equal(seen[0], second)


def test_recording_ends_after_an_error_too() -> None:
    layer = nn.Linear(3, 2)
    kept: list[list[torch.Tensor]] = []

    def fail() -> None:
        with recorded_features(layer) as seen:
            kept.append(seen)
            layer(torch.rand(1, 5))

    with pytest.raises(RuntimeError):
        fail()
    kept[0].clear()
    layer(torch.rand(1, 3))
    assert kept[0] == []


# -------------------------------------------------------------------- identity


class Normalised(nn.Module):
    """Parameters, buffers and a counter; the order in which they are registered can be turned."""

    def __init__(self, turned: bool = False) -> None:
        super().__init__()
        layers = {"norm": nn.BatchNorm1d(4), "last": nn.Linear(4, K)}
        for name in reversed(layers) if turned else layers:
            self.add_module(name, layers[name])


def normalised(turned: bool = False) -> Normalised:
    torch.manual_seed(0)
    return Normalised(turned)


PREPROCESSING = Preprocessing(image_size=32)


def test_identity_survives_what_does_not_change_the_function(tmp_path: Path) -> None:
    network = normalised()
    identity = network_id(network, PREPROCESSING, "last")
    assert len(identity) == 64
    assert network_id(network.eval(), PREPROCESSING, "last") == identity
    turned = normalised(turned=True)
    assert list(turned.state_dict()) != list(network.state_dict())
    turned.load_state_dict(network.state_dict())
    assert network_id(turned, PREPROCESSING, "last") == identity

    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    loaded = Normalised()
    loaded.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    assert network_id(loaded, PREPROCESSING, "last") == identity
    for parameter in loaded.parameters():
        parameter.requires_grad_(False)
    assert network_id(loaded, PREPROCESSING, "last") == identity


def test_identity_does_not_depend_on_the_order_of_memory() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, K))
    identity = network_id(network, PREPROCESSING, "2")
    last = network.to(memory_format=torch.channels_last)
    assert not last[0].weight.is_contiguous()
    assert network_id(last, PREPROCESSING, "2") == identity


@pytest.mark.parametrize("name", ["last.weight", "norm.running_var", "norm.num_batches_tracked"])
def test_identity_changes_with_the_last_bit_of_the_state(name: str) -> None:
    network = normalised()
    before = network_id(network, PREPROCESSING, "last")
    values = network.state_dict()[name].view(-1)
    if values.is_floating_point():
        values[0] = torch.nextafter(values[0], values.new_tensor(torch.inf))
    else:
        values += 1
    assert network_id(network, PREPROCESSING, "last") != before


def test_identity_changes_with_preprocessing_layer_type_and_names() -> None:
    network = normalised()
    plain = [
        PREPROCESSING,
        replace(PREPROCESSING, image_size=33),
        replace(PREPROCESSING, crop=0.9),
        replace(PREPROCESSING, interpolation="bicubic"),
        replace(PREPROCESSING, mean=(0.5, 0.456, 0.406)),
        replace(PREPROCESSING, std=(0.229, 0.224, 0.226)),
    ]
    identities = [network_id(network, preprocessing, "last") for preprocessing in plain]
    identities.append(network_id(network, PREPROCESSING, "norm"))
    wrapped = nn.Sequential(network)
    identities.append(network_id(wrapped, PREPROCESSING, "last"))
    identities.append(network_id(normalised().bfloat16(), PREPROCESSING, "last"))
    assert len(set(identities)) == len(identities)


# --------------------------------------------------------- what fits a network


def test_preprocessing_of_a_network(own_module: str) -> None:
    timm_like = resolve_preprocessing(NetworkSpec("test_vit", K).build(), 96)
    assert timm_like == Preprocessing(96, 1.0, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    own = resolve_preprocessing(NetworkSpec("own_networks:net", K).build(), 48)
    assert own == Preprocessing(image_size=48)


def test_order_of_memory() -> None:
    assert NetworkSpec("senet154", K).memory_format == torch.contiguous_format
    assert NetworkSpec("resnet101", K).memory_format == torch.channels_last


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    assert resolve_device("cpu") == torch.device("cpu")
    for name in ("cuda", "cuda:1"):
        with pytest.raises(InputError, match=f"--device {name}: torch sees 0 CUDA devices"):
            resolve_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == torch.device("cuda")
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(InputError, match="--device cuda:2: torch sees 2 CUDA devices"):
        resolve_device("cuda:2")
    for name in ("gpu", "", "cuda:x"):
        with pytest.raises(InputError, match="use auto, cpu or cuda"):
            resolve_device(name)


def test_precisions() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert resolve_precision("auto", cpu) == "float32"
    assert resolve_precision("auto", cuda) == "bf16"
    assert resolve_precision("bf16", cpu) == "bf16"
    assert resolve_precision("float32", cuda) == "float32"
    layer, x = nn.Linear(3, 2), torch.rand(1, 3)
    for precision, dtype in (("bf16", torch.bfloat16), ("float32", torch.float32)):
        with autocast(precision, cpu):
            assert layer(x).dtype == dtype
    assert layer(x).dtype == torch.float32
