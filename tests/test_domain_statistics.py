"""Statistics of an image set in batch normalisation: by hand, in caches, and refused."""

from __future__ import annotations

import copy
import os
import signal
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
from featcache.merging import merge
from featcache.settings import ExtractionConfig, TrainingConfig
from featcache.summary import summary
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
    both = CacheSet([plain.path, half.path], image_set=lambda cache: "set", recursive=False)
    assert len(both.networks) == 2
    assert both[half.network_id, "set"].path == half.path
    assert "domain_statistics" in summary(half)


def test_another_image_set_has_the_same_network_id(
    config: Callable[..., ExtractionConfig], tmp_path: Path
) -> None:
    tiny.make_data(tmp_path / "more", 12, seed=5, prefix="m")
    more = cache_of(config(images=str(tmp_path / "more" / "images"), out=str(tmp_path / "m.h5")))
    assert more.network_id == cache_of(config()).network_id


def test_a_stopped_extraction_goes_on_to_the_same_features(
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


def test_one_image_says_nothing(
    config: Callable[..., ExtractionConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another one cannot be read."""
    (tmp_path / "one").write_text("i001\ni007\n")
    ids = str(tmp_path / "one")
    one = cache_of(config(ids=ids))
    assert "0.0% of 0 images' own statistics; fewer than two" in capsys.readouterr().out
    plain = cache_of(config(ids=ids, out=str(tmp_path / "p.h5"), domain_statistics=0))
    assert one.features.tobytes() == plain.features.tobytes()


@pytest.mark.parametrize("batch_size", [1, 2])
def test_few_images_say_little(
    config: Callable[..., ExtractionConfig],
    tmp_path: Path,
    batch_size: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "few").write_text("i001\ni002\ni003\ni007\n")
    few = str(tmp_path / "few")
    plain, some = (
        cache_of(
            config(
                ids=few, out=str(tmp_path / f"{s}.h5"), domain_statistics=s, batch_size=batch_size
            )
        )
        for s in (0.0, 1.0)
    )
    # Two pairs are looked at, of which one has an image that cannot be read.
    assert f"{2 / (2 + 32):.1%} of 2 images' own statistics\n" in capsys.readouterr().out
    moved = np.linalg.norm(some.features[:3].astype(float) - plain.features[:3].astype(float))
    assert 0 < moved < 0.3 * np.linalg.norm(plain.features[:3].astype(float))


def test_many_images_are_drawn_at_random(
    config: Callable[..., ExtractionConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ds, "IMAGES", 10)
    seen: list[list[int]] = []
    loader = ds.loader

    def watched(dataset: Any, order: list[list[int]], *rest: Any) -> Any:
        seen.append([row for rows in order for row in rows])
        return loader(dataset, order, *rest)

    monkeypatch.setattr(ds, "loader", watched)
    for seed in (0, 0, 1):
        settings = config(batch_size=4, seed=seed)
        ds.take_statistics(Embedder.load(settings), choose_images(settings), settings)
    assert [len(set(rows)) for rows in seen] == [10, 10, 10]
    assert seen[0] == seen[1]
    assert sorted(seen[0]) != sorted(seen[2])
    assert max(seen[0]) >= 20


class Droppy(nn.BatchNorm2d):
    """As timm's, which hold dropout and an activation, and with a forward pass of its own."""

    def __init__(self, like: nn.BatchNorm2d) -> None:
        super().__init__(like.num_features)
        self.load_state_dict(like.state_dict())
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum,  # type: ignore[arg-type]
            self.eps,
        )
        dropped: torch.Tensor = self.drop(y)
        return dropped


def test_what_is_inside_a_layer_does_not_train(config: Callable[..., ExtractionConfig]) -> None:
    settings = config()
    plain, droppy = Embedder.load(settings), Embedder.load(settings)
    for at in (1, 5):
        droppy.network.body[at] = Droppy(droppy.network.body[at]).eval()  # type: ignore[operator,index]
    for embedder in (plain, droppy):
        ds.take_statistics(embedder, choose_images(settings), settings)
    for own, other in zip(
        ds.normalised_layers(plain.network), ds.normalised_layers(droppy.network), strict=True
    ):
        torch.testing.assert_close(own.running_mean, other.running_mean)
        torch.testing.assert_close(own.running_var, other.running_var)
        assert (own.training, other.training) == (False, False)


class Frozen(nn.BatchNorm2d):
    """Looks at no batch."""

    def __init__(self, like: nn.BatchNorm2d) -> None:
        super().__init__(like.num_features)
        self.load_state_dict(like.state_dict())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )


def test_a_frozen_layer_stays_as_it_is(config: Callable[..., ExtractionConfig]) -> None:
    settings = config()
    embedder = Embedder.load(settings)
    body: Any = embedder.network.body
    body[1] = Frozen(body[1])
    first, second = (copy.deepcopy(body[at].state_dict()) for at in (1, 5))
    ds.take_statistics(embedder, choose_images(settings), settings)
    assert torch.equal(body[1].running_mean, first["running_mean"])
    assert torch.equal(body[1].running_var, first["running_var"])
    assert not torch.equal(body[5].running_mean, second["running_mean"])

    body[5] = Frozen(body[5])
    with pytest.raises(InputError, match=r"0\.5: no layer of TinyNet takes any"):
        ds.take_statistics(embedder, choose_images(settings), settings)


def test_a_file_that_changes_meanwhile_stops_it_before_a_row_is_written(
    config: Callable[..., ExtractionConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its statistics would be those of other images than a run that goes on would see."""
    tiny.make_data(tmp_path / "d", 6, seed=3)
    settings = config(images=str(tmp_path / "d" / "images"))
    took, written = ds.take_statistics, []
    sound = (tmp_path / "d" / "images" / "i002.png").read_bytes()

    def change(*arguments: Any, **more: Any) -> int:
        (tmp_path / "d" / "images" / "i002.png").write_bytes(sound[:40])
        return took(*arguments, **more)

    monkeypatch.setattr("featcache.extraction.take_statistics", change)
    monkeypatch.setattr("featcache.writing.CacheWriter.write", lambda *_: written.append(1))
    with pytest.raises(InputError, match="i002"):
        extract(settings)
    assert not written


def test_a_stop_while_looking(
    config: Callable[..., ExtractionConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the only batch; the network is as it was."""
    settings = config()
    embedder = Embedder.load(settings)
    before = copy.deepcopy(embedder.network.state_dict())
    forward = Embedder.forward

    def stopped(self: Embedder, pixels: torch.Tensor) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, pixels)

    monkeypatch.setattr(Embedder, "forward", stopped)
    with pytest.raises(Interrupted, match="goes on"):
        ds.take_statistics(embedder, choose_images(settings), settings)
    after = embedder.network.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items() if "num_batches" not in k)


def test_finished_caches_of_other_images_are_not_merged(
    config: Callable[..., ExtractionConfig], tmp_path: Path
) -> None:
    (tmp_path / "first").write_text("".join(f"i{i:03d}\n" for i in range(20)))
    (tmp_path / "second").write_text("".join(f"i{i:03d}\n" for i in range(20, N)))
    paths = [
        str(cache_of(config(ids=str(tmp_path / part), out=str(tmp_path / f"{part}.h5"))).path)
        for part in ("first", "second")
    ]
    with pytest.raises(InputError, match=r"0\.5 of the statistics of its own images"):
        merge(paths, str(tmp_path / "merged.h5"))


def test_processes_that_share_the_images(
    config: Callable[..., ExtractionConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featcache.extraction.ROWS_A_BLOCK", 8)
    whole = cache_of(config(out=str(tmp_path / "whole.h5"), batch_size=8))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        extract(config(batch_size=8))
    shared = FeatureCache(tmp_path / "x.h5")
    assert shared.features.tobytes() == whole.features.tobytes()


def test_one_is_1(run: Path) -> None:
    made = [
        ExtractionConfig(str(run), "i", "o", domain_statistics=s) for s in (1, 1.0, np.float64(1))
    ]
    assert len({ds.shared_id("n", c.domain_statistics) for c in made}) == 1


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
