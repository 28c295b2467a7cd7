"""Checkpoints from elsewhere: read whatever they are wrapped in, or refused with the difference."""

from __future__ import annotations

import argparse
import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

from featcache import FeatureCache, InputError, runs
from featcache.cli import main
from featcache.importing import import_checkpoint
from featcache.networks import NetworkSpec
from featcache.settings import ImportConfig
from featcache.views import Preprocessing
from tests import tiny

ARCH = "tests.tiny:network"
ONE_LAYER = f"{__name__}:one_layer"
K = 3

State = dict[str, torch.Tensor]
Bring = Callable[..., runs.Run]


def network(seed: int = 0, num_classes: int = K, **kwargs: Any) -> tiny.TinyNet:
    torch.manual_seed(seed)
    made = tiny.TinyNet(num_classes, **kwargs).eval()
    for values in made.buffers():
        if values.is_floating_point():  # running statistics of a network that has seen something
            values.uniform_(0.5, 2.0)
    return made


def state(seed: int = 0, num_classes: int = K, **kwargs: Any) -> State:
    return dict(network(seed, num_classes, **kwargs).state_dict())


def prefixed(prefix: str, values: State) -> State:
    return {prefix + name: value for name, value in values.items()}


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    path = tmp_path / "classes.csv"
    path.write_text('label_code,description\n/m/b,Bee\n/m/a,Ant\n/m/c,"Cat, tabby"\n')
    return path


@pytest.fixture
def bring(tmp_path: Path, classes: Path) -> Bring:
    """Import a checkpoint, given as what to save, and open the run."""

    def bring(content: Any, **options: Any) -> runs.Run:
        file = tmp_path / "weights.pt"
        torch.save(content, file)
        out = tmp_path / "run"
        plain = {"arch": ARCH, "weights": str(file), "classes": str(classes), "out": str(out)}
        import_checkpoint(ImportConfig(**{"image_size": 24, **plain, **options}))
        return runs.Run.open(out)

    return bring


def assert_holds(run: runs.Run, expected: State) -> None:
    found = run.load_network().state_dict()
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def refused(call: Callable[[], object], *parts: str) -> None:
    """One line that has all the parts."""
    with pytest.raises(InputError) as caught:
        call()
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


# ----------------------------------------------------------------- whole way


def test_extraction_needs_no_training(tmp_path: Path, classes: Path) -> None:
    tiny.make_data(tmp_path, n=5)
    safetensors.torch.save_file(state(), tmp_path / "mine.safetensors")
    run, out = tmp_path / "run", tmp_path / "x.h5"
    words = ["--arch", ARCH, "--weights", str(tmp_path / "mine.safetensors")]
    words += ["--classes", str(classes), "--out", str(run), "--image-size", str(tiny.SIDE)]
    words += ["--mean", "0.5,0.25,0", "--std", "1,0.5,0.25"]
    assert main(["import", *words]) == 0
    words = ["--run", str(run), "--images", str(tmp_path / "images"), "--out", str(out)]
    assert main(["extract", *words, "--workers", "0", "--device", "cpu"]) == 0
    cache = FeatureCache(out)
    assert cache.classes.tolist() == ["/m/b", "/m/a", "/m/c"]
    assert cache.class_names.tolist() == ["Bee", "Ant", "Cat, tabby"]
    plain = network()
    for name, features in zip(cache.ids, cache.x("eval"), strict=True):
        image = Image.open(tmp_path / "images" / f"{name}.png").convert("RGB")
        pixels = np.asarray(image, dtype=np.float32) / 255
        x = torch.from_numpy((pixels - [0.5, 0.25, 0]) / [1, 0.5, 0.25]).permute(2, 0, 1).float()
        with torch.inference_mode():
            expected = plain.body(x[None])[0].numpy()
        np.testing.assert_allclose(features, expected, rtol=2e-3, atol=2e-3)
    assert cache.weight is not None
    np.testing.assert_array_equal(cache.weight, plain.last.weight.detach())


def test_what_was_done_is_said(
    tmp_path: Path, classes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"model": state()}, tmp_path / "w.pt")
    words = ["--arch", ARCH, "--weights", str(tmp_path / "w.pt"), "--classes", str(classes)]
    assert main(["import", *words, "--out", str(tmp_path / "run"), "--image-size", "24"]) == 0
    text = capsys.readouterr().out
    for part in (
        "model of",
        "24 x 24 pixels, crop 1, bilinear, mean 0.485,0.456,0.406",
        f"featcache extract --run {tmp_path / 'run'}",
    ):
        assert part in text


def test_a_run_is_the_same_as_a_trained_one_with_its_weights(bring: Bring) -> None:
    run = bring(state(), image_size=30, crop=0.875, interpolation="bicubic", std="1,2,3")
    mean = Preprocessing.mean
    assert run.preprocessing == Preprocessing(30, 0.875, "bicubic", mean, (1.0, 2.0, 3.0))
    assert run.network == NetworkSpec(ARCH, K, {})
    assert run.names.tolist() == ["Bee", "Ant", "Cat, tabby"]


def test_timm_gives_the_mean_that_is_not_given(bring: Bring) -> None:
    spec = NetworkSpec("test_vit", K)
    torch.manual_seed(0)
    run = bring(dict(spec.build().state_dict()), arch="test_vit", image_size=160, std="1,1,1")
    assert (run.preprocessing.mean, run.preprocessing.std) == ((0.5, 0.5, 0.5), (1.0, 1.0, 1.0))


def test_a_list_of_class_ids_alone(bring: Bring, tmp_path: Path) -> None:
    (tmp_path / "ids.csv").write_text("label_code\nz\ny\nx\n")
    run = bring(state(), classes=str(tmp_path / "ids.csv"))
    assert run.classes.tolist() == run.names.tolist() == ["z", "y", "x"]


def test_a_last_layer_that_is_a_convolution(bring: Bring, tmp_path: Path) -> None:
    """Of 1 x 1 on pooled features, which is linear all the same."""
    torch.manual_seed(0)
    dla = NetworkSpec("dla46x_c", K).build().eval()
    run = bring(dict(dla.state_dict()), arch="dla46x_c", image_size=64)
    tiny.make_data(tmp_path, n=3)
    words = ["--run", str(run.path), "--images", str(tmp_path / "images"), "--workers", "0"]
    assert main(["extract", *words, "--out", str(tmp_path / "x.h5"), "--device", "cpu"]) == 0
    cache = FeatureCache(tmp_path / "x.h5")
    assert cache.weight is not None
    assert cache.weight.shape == (K, cache.shape[2])
    layer = dla.get_classifier()
    np.testing.assert_array_equal(cache.weight, layer.weight.detach()[:, :, 0, 0])


# ------------------------------------------------------------------ wrappings


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        OrderedDict,
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": s, "optimizer": {"lr": 0.1}},
        lambda s: {"state_dict_ema": s, "state_dict": state(9)},
        lambda s: {"state_dict": s, "args": argparse.Namespace(lr=0.1), "arch": "tiny"},
        lambda s: prefixed("module.", s),
        lambda s: {"state_dict": prefixed("model.", s), "hyper_parameters": {"lr": 1}},
        lambda s: {"model": prefixed("_orig_mod.module.", s)},
        lambda s: {name: value.double() for name, value in s.items()},
        lambda s: {name: v.bfloat16() if v.is_floating_point() else v for name, v in s.items()},
        lambda s: {name: nn.Parameter(v) if v.is_floating_point() else v for name, v in s.items()},
    ],
)
def test_wrapped_checkpoints(bring: Bring, wrap: Callable[[State], Any]) -> None:
    given = {  # exact in bfloat16
        name: value.bfloat16().float() if value.is_floating_point() else value
        for name, value in state().items()
    }
    assert_holds(bring(wrap(given)), given)


def test_the_part_can_be_chosen(bring: Bring) -> None:
    content = {"state_dict_ema": state(1), "state_dict": state(2), "teacher": state(3)}
    for part, seed in {"": 1, "state_dict": 2, "teacher": 3}.items():
        assert_holds(bring(content, part=part, overwrite=True), state(seed))
    refused(lambda: bring(content, part="student", overwrite=True), "'student'", "teacher")


def test_a_counter_of_batches_may_be_missing(bring: Bring) -> None:
    counters = [name for name in state() if name.endswith("num_batches_tracked")]
    assert counters
    given = {name: value for name, value in state().items() if name not in counters}
    assert_holds(bring(given), given | {name: torch.tensor(0) for name in counters})


@pytest.mark.parametrize("prefix", ["", "module.", "0.1."])
def test_a_beginning_that_the_network_has_itself_stays(bring: Bring, prefix: str) -> None:
    given = {"1.weight": torch.ones(K, 48), "1.bias": torch.zeros(K)}
    if prefix == "0.1.":  # a wrapper whose name the network has: it cannot be told from that
        refused(lambda: bring(prefixed(prefix, given), arch=ONE_LAYER, image_size=4), "0.1.1.bias")
        return
    assert_holds(bring(prefixed(prefix, given), arch=ONE_LAYER, image_size=4), given)


# ------------------------------------------------------------------- refusals


def one_layer(num_classes: int) -> nn.Module:
    """For ``--arch``: only one child has weights, and they are called 1.weight, 1.bias."""
    return nn.Sequential(nn.Flatten(), nn.Linear(48, num_classes))


class Averaged(tiny.TinyNet):
    """Two last layers whose outputs are averaged, as in distilled networks."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.teacher = nn.Linear(16, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(x)
        mean: torch.Tensor = (self.last(x) + self.teacher(x)) / 2
        return mean


def averaged(num_classes: int) -> nn.Module:
    """For ``--arch``."""
    return Averaged(num_classes)


def convolutional(num_classes: int) -> nn.Module:
    """For ``--arch``: no linear layer at all."""
    return nn.Sequential(nn.Conv2d(3, num_classes, 4), nn.Flatten())


def test_another_number_of_classes(bring: Bring, classes: Path, tmp_path: Path) -> None:
    refused(
        lambda: bring({"model": prefixed("module.", state(num_classes=5))}),
        f"{tmp_path / 'weights.pt'}: its last layer last.weight has 5 outputs",
        f"{classes} lists 3 classes",
        "in the order of its outputs",
    )
    assert not (tmp_path / "run").exists()


def test_other_weights_are_refused_with_the_difference(bring: Bring, tmp_path: Path) -> None:
    other = state()
    other["lost.weight"] = other.pop("last.bias")
    refused(lambda: bring(other), "1 missing (last.bias), 1 unexpected (lost.weight)", "--arch")
    refused(lambda: bring(state(width=5)), "13 of another shape (body.0.weight (5, 3, 3, 3) for (8")
    resnet = {f"layer{k}.weight": torch.ones(1) for k in range(9)}
    refused(lambda: bring(resnet), "14 missing (body.0.weight, body.0.bias, body.1.weight and 11 m")
    refused(lambda: bring(resnet), "9 unexpected (layer0.weight, layer1.weight, layer2.weight and")
    assert not (tmp_path / "run").exists()
    assert_holds(bring(state(width=5), model_kwargs=["width=5"]), state(width=5))


def test_features_that_cannot_be_told_are_refused_by_name(bring: Bring) -> None:
    torch.manual_seed(0)
    for factory, message in {
        "averaged": "its logits are not features @ W0.T + b0",
        "convolutional": "no linear last layer with 3 outputs",
    }.items():
        made = globals()[factory](K)
        refused(
            lambda made=made, factory=factory: bring(
                dict(made.state_dict()), arch=f"{__name__}:{factory}"
            ),
            f"'{__name__}:{factory}'",
            message,
        )
    refused(lambda: bring(dict(state()), arch="tests.tiny:doubled"), "'tests.tiny:doubled'")


class Opener:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


def test_a_checkpoint_is_data_and_no_program(bring: Bring, tmp_path: Path) -> None:
    refused(
        lambda: bring({"state_dict": state(), "hook": Opener(tmp_path / "opened")}),
        "weights.pt: holds a ",
        "torch.save(model.state_dict(), FILE)",
    )
    assert not (tmp_path / "opened").exists()
    refused(lambda: bring(network()), "holds a tests.tiny.TinyNet")


@pytest.mark.parametrize("content", [{}, {"epoch": 1, "lr": 0.1}, [torch.ones(1)], torch.ones(2)])
def test_no_weights_by_name(bring: Bring, content: Any) -> None:
    refused(lambda: bring(content), "weights.pt: no weights by name in it", "--part")


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x04" + bytes(200), None])
def test_damaged_files(bring: Bring, tmp_path: Path, name: str, content: bytes | None) -> None:
    path = tmp_path / name
    if content is None:
        save = safetensors.torch.save_file if name.endswith("safetensors") else torch.save
        save(state(), path)
        path.write_bytes(path.read_bytes()[:-300])
    else:
        path.write_bytes(content)
    refused(lambda: bring({}, weights=str(path)), f"{path}: ", "copy it again")


@pytest.mark.parametrize("content", [b"version 2\n", b"<html>not found</html>"])
def test_what_holds_no_object_is_not_accused_of_code(
    bring: Bring, tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        bring({}, weights=str(path))
    assert str(error.value).startswith(f"{path}: not a readable checkpoint; copy it again")
    assert "code" not in str(error.value)


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_a_pointer_of_git_lfs_is_told(bring: Bring, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    refused(lambda: bring({}, weights=str(path)), str(path), "a pointer of git-lfs", "git lfs pull")


def test_other_wrong_use(bring: Bring, tmp_path: Path) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"weights": str(tmp_path / "gone.pt")}, "gone.pt: no such file; check --weights"),
        ({"classes": str(tmp_path / "gone.csv")}, "gone.csv: no such file"),
        ({"arch": "resnet51"}, "did you mean"),
        ({"mean": "0.5"}, "--mean '0.5': expected three numbers"),
        ({"mean": "a,b,c"}, "--mean 'a,b,c': expected three numbers"),
        ({"std": "1,inf,1"}, "--std '1,inf,1': expected three numbers"),
        ({"std": "1,0,1"}, "--std 1,0,1: give positive numbers"),
        ({"image_size": 0}, "--image-size 0"),
        ({"crop": 1.5}, "--crop 1.5"),
        ({"arch": ONE_LAYER, "image_size": 4}, "2 missing (1.weight, 1.bias)"),
    ]
    for options, message in wrong:
        refused(lambda options=options: bring(state(), **options), message)
        assert not (tmp_path / "run").exists()
    given = {"1.weight": torch.ones(K, 48), "1.bias": torch.zeros(K)}
    refused(
        lambda: bring(given, arch=ONE_LAYER, image_size=5), "takes no images of 5 x 5", ONE_LAYER
    )


# --------------------------------------------------------------------- folder


def test_a_run_is_replaced_only_on_demand(bring: Bring, tmp_path: Path) -> None:
    bring(state(1))
    (tmp_path / "run" / runs.CHECKPOINT).write_bytes(b"of a training")
    refused(lambda: bring(state(2)), f"{tmp_path / 'run'}: is a run already", "--overwrite")
    assert_holds(runs.Run.open(tmp_path / "run"), state(1))
    assert_holds(bring(state(2), overwrite=True), state(2))
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {runs.CONFIG, runs.CLASSES, runs.WEIGHTS}


def test_a_file_in_place_of_the_folder_is_told(bring: Bring, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    refused(lambda: bring(state(), out=str(tmp_path / "file")), "file: is a file; give --out")
    deeper = tmp_path / "file" / "run"
    refused(lambda: bring(state(), out=str(deeper)), f"{deeper}: cannot be written", "no folder")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_of_other_files_is_left_alone(bring: Bring, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        refused(lambda o=overwrite: bring(state(), overwrite=o), "not a run, since thesis.tex")
    (tmp_path / "run" / "thesis.tex").rename(tmp_path / "thesis.tex")
    assert_holds(bring(state()), state())


def test_what_a_killed_import_left_is_no_run_and_no_obstacle(
    bring: Bring, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(runs, "write_text", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            bring(state(1))
    refused(lambda: runs.Run.open(tmp_path / "run"), "no config.json there")
    assert_holds(bring(state(2)), state(2))


def _interrupt(*arguments: object) -> None:
    raise KeyboardInterrupt


def test_training_does_not_go_on_in_an_imported_run(
    bring: Bring, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.make_data(tmp_path / "data")
    run = bring(state())
    options = tiny.basic_training(tmp_path / "data", run.path)
    assert main(["train", *tiny.options(**options)]) == 2
    assert str(run.path) in capsys.readouterr().err
    assert_holds(runs.Run.open(run.path), state())


def test_the_configuration_says_where_it_comes_from(bring: Bring, tmp_path: Path) -> None:
    run = bring({"state_dict": state()})
    config = json.loads((run.path / runs.CONFIG).read_text())
    assert config["config"]["weights"] == str(tmp_path / "weights.pt")
    assert config["part"] == "state_dict"


def test_weights_that_are_no_numbers_are_refused_by_name(bring: Bring) -> None:
    broken = state()
    broken["body.0.weight"][0, 0] = torch.nan
    refused(lambda: bring(broken), "weights.pt: body.0.weight has a NaN or an infinity")
