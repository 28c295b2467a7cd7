"""Statistics of an image set in batch normalisation: by hand, in caches, and refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from featcache import CacheSet, FeatureCache
from featcache import domain_statistics as ds
from featcache.console import Interrupted
from featcache.embedding import Embedder
from featcache.errors import InputError
from featcache.extraction import choose_images, extract
from featcache.settings import ExtractionConfig, TrainingConfig
from featcache.training import train
from tests import tiny

N = 40


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    tiny.make_data(root, 64)
    return train(TrainingConfig(**tiny.basic_training(root, root / "run") | {"epochs": 2}))


@pytest.fixture(scope="module")
def dark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images unlike those of training, of which one cannot be read."""
    root = tmp_path_factory.mktemp("dark")
    tiny.make_data(root, N, seed=1)
    for path in (root / "images").iterdir():
        with Image.open(path) as image:
            Image.fromarray((np.asarray(image) // 4).astype(np.uint8)).save(path)
    (root / "images" / "i007.png").write_bytes(b"this is no image")
    return root


@pytest.fixture
def config(run: Path, dark: Path, tmp_path: Path) -> Callable[..., ExtractionConfig]:
    def of(**changes: Any) -> ExtractionConfig:
        options: dict[str, Any] = {
            "run": str(run),
            "images": str(dark / "images"),
            "out": str(tmp_path / "x.h5"),
            "batch_size": 64,
            "device": "cpu",
            "workers": 0,
            "threads": 1,
            "domain_statistics": 0.5,
        }
        return ExtractionConfig(**options | changes)

    return of


def cache_of(config: ExtractionConfig) -> FeatureCache:
    path = extract(config)
    assert path is not None
    return FeatureCache(path)


def pixels_of(folder: Path, ids: list[str]) -> torch.Tensor:
    """(n, 3, s, s) normalised as the run does it: by the means and deviations of ImageNet."""
    found = []
    for name in ids:
        with Image.open(folder / "images" / f"{name}.png") as image:
            found.append(np.asarray(image.convert("RGB"), np.float32).transpose(2, 0, 1) / 255)
    mean = np.array([0.485, 0.456, 0.406], np.float32)[:, None, None]
    std = np.array([0.229, 0.224, 0.225], np.float32)[:, None, None]
    return torch.from_numpy((np.stack(found) - mean) / std)


def test_every_layer_takes_its_share_of_what_it_sees(
    config: Callable[..., ExtractionConfig], dark: Path
) -> None:
    settings = config(domain_statistics=0.8)
    embedder = Embedder.load(settings)
    before = copy.deepcopy(embedder.network)
    images = choose_images(settings)
    n = ds.take_statistics(embedder, images, settings)
    assert n == N - 1
    a = 0.8 * n / (n + 32)

    x = pixels_of(dark, [name for name in images.ids.tolist() if name != "i007"])
    first, second = (layer for layer in before.modules() if isinstance(layer, nn.BatchNorm2d))
    own_first, own_second = (
        layer for layer in embedder.network.modules() if isinstance(layer, nn.BatchNorm2d)
    )
    with torch.no_grad():
        # What the second layer sees, the first one has normalised by the images alone.
        y = before.body[0](x)
        mean, var = y.mean((0, 2, 3)), y.var((0, 2, 3), unbiased=True)
        z = (y - mean[:, None, None]) / torch.sqrt(y.var((0, 2, 3), unbiased=False) + first.eps)[
            :, None, None
        ]
        z = z * first.weight[:, None, None] + first.bias[:, None, None]
        w = before.body[4](before.body[3](torch.relu(z)))
    for layer, own, seen in ((first, own_first, y), (second, own_second, w)):
        mean, var = seen.mean((0, 2, 3)), seen.var((0, 2, 3), unbiased=True)
        torch.testing.assert_close(own.running_mean, (1 - a) * layer.running_mean + a * mean)
        torch.testing.assert_close(own.running_var, (1 - a) * layer.running_var + a * var)
        assert own.momentum == layer.momentum
    assert not any(module.training for module in embedder.network.modules())
    for name, values in before.state_dict().items():
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(values, embedder.network.state_dict()[name]), name


def test_features_come_nearer_to_those_of_training(
    config: Callable[..., ExtractionConfig], run: Path, tmp_path: Path
) -> None:
    tiny.make_data(tmp_path / "home", N, seed=1)
    home = cache_of(
        config(
            images=str(tmp_path / "home" / "images"),
            out=str(tmp_path / "h.h5"),
            domain_statistics=0,
        )
    )
    apart = []
    for share in (0.0, 0.5, 1.0):
        cache = cache_of(config(out=str(tmp_path / f"{share}.h5"), domain_statistics=share))
        X = cache.features[cache.valid][:, 0].astype(float)
        H = home.features[cache.valid][:, 0].astype(float)
        apart.append(np.linalg.norm(X - H))
    assert apart[0] > apart[1] > apart[2]


def test_what_the_cache_says(config: Callable[..., ExtractionConfig], tmp_path: Path) -> None:
    plain = cache_of(config(out=str(tmp_path / "p.h5"), domain_statistics=0))
    half = cache_of(config())
    other = cache_of(config(out=str(tmp_path / "o.h5"), domain_statistics=0.25))
    assert "domain_statistics" not in plain.provenance
    assert half.provenance["domain_statistics"] == 0.5
    assert half.network_name == plain.network_name + " domain_statistics=0.5"
    assert len({plain.network_id, half.network_id, other.network_id}) == 3
    assert half.weight is not None
    assert half.weight.tolist() == plain.weight.tolist()
    with pytest.raises(ValueError, match="network"):
        CacheSet([plain, half])[plain.network_id, "nowhere"]


def test_another_image_set_has_the_same_network_id(
    config: Callable[..., ExtractionConfig], tmp_path: Path
) -> None:
    tiny.make_data(tmp_path / "more", 12, seed=5, prefix="m")
    more = cache_of(config(images=str(tmp_path / "more" / "images"), out=str(tmp_path / "m.h5")))
    assert more.network_id == cache_of(config()).network_id


def test_an_image_does_not_depend_on_its_batch_nor_a_stop(
    config: Callable[..., ExtractionConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Statistics are made once more, the same, where a stopped extraction goes on."""
    monkeypatch.setattr("featcache.extraction.ROWS_A_BLOCK", 8)
    whole = cache_of(config(out=str(tmp_path / "whole.h5"), batch_size=8))
    calls = Embedder.__call__

    def stop(self: Embedder, pixels: torch.Tensor) -> Any:
        stop.left -= 1  # type: ignore[attr-defined]
        if not stop.left:  # type: ignore[attr-defined]
            raise Interrupted("stopped")
        return calls(self, pixels)

    stop.left = 3  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setattr(Embedder, "__call__", stop)
        with pytest.raises(Interrupted):
            extract(config(batch_size=8))
    assert FeatureCache(extract(config(batch_size=8))).features.tobytes() == (
        whole.features.tobytes()
    )


def test_few_images_say_little(
    config: Callable[..., ExtractionConfig], dark: Path, tmp_path: Path
) -> None:
    (tmp_path / "one").write_text("i001\ni007\n")
    ids = str(tmp_path / "one")
    one = cache_of(config(ids=ids))
    plain = cache_of(config(ids=ids, out=str(tmp_path / "p.h5"), domain_statistics=0))
    assert one.features.tobytes() == plain.features.tobytes()


def test_many_images_are_drawn(
    config: Callable[..., ExtractionConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ds, "IMAGES", 10)
    settings = config(batch_size=4)
    assert ds.take_statistics(Embedder.load(settings), choose_images(settings), settings) in (9, 10)


def test_a_network_without_such_layers_is_refused_before_anything_is_written(
    config: Callable[..., ExtractionConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Embedder.load.__func__  # type: ignore[attr-defined]

    def without(cls: type[Embedder], settings: ExtractionConfig) -> Embedder:
        embedder: Embedder = load(cls, settings)
        for at in (1, 5):
            embedder.network.body[at] = nn.Identity()
        return embedder

    monkeypatch.setattr(Embedder, "load", classmethod(without))
    with pytest.raises(InputError, match="TinyNet has no batch normalisation"):
        extract(config())
    assert not list(tmp_path.glob("x.h5*"))


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_is_from_0_to_1(config: Callable[..., ExtractionConfig], share: float) -> None:
    with pytest.raises(InputError, match="--domain-statistics"):
        config(domain_statistics=share)
