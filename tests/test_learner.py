"""Parts of a step, averaged weights, other losses, less memory: and stopping with all of it."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from featcache import InputError, batches, runs
from featcache.cli import main
from featcache.console import Interrupted
from featcache.runs import Run
from featcache.settings import TrainingConfig
from featcache.training import Trainer, train
from tests import tiny
from tests.test_training import assert_same_run, log, recorded, result

Settings = Callable[..., dict[str, Any]]
STEPS = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    tiny.make_data(root, 64)
    return root


@pytest.fixture
def settings(data: Path, tmp_path: Path) -> Settings:
    return lambda **changes: tiny.basic_training(data, tmp_path / "run") | changes


def weights(run: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = safetensors.torch.load_file(run / "weights.safetensors")
    return found


def assert_close(run: Path, other: Path) -> None:
    for row, expected in zip(log(run), log(other), strict=True):
        for column, value in row.items():
            assert float(value) == pytest.approx(float(expected[column]), rel=1e-4), column
    second = weights(other)
    for name, tensor in weights(run).items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-3, atol=1e-4)


# ----------------------------------------------------------------------- stopping


EVERYTHING = {
    "ema": 0.8,
    "micro_batch": 3,
    "clip": 1.0,
    "loss": "asymmetric",
    "smoothing": 0.1,
    "schedule": "plateau",
    "monitor": "loss",
    "patience": 0,
    "optimizer": "adamw",
}


@pytest.mark.parametrize("every", [1, 4])
def test_stopped_and_killed_with_everything_on_it_takes_the_same_steps(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    with monkeypatch.context() as patch:
        expected = recorded(patch)
        whole = train(TrainingConfig(**settings(out=str(tmp_path / "whole"), **EVERYTHING)))
    steps = recorded(monkeypatch, stop_after=lambda done: done % every == 0)
    while True:
        try:
            run = train(TrainingConfig(**settings(**EVERYTHING)))
            break
        except Interrupted:
            continue
    assert steps == expected
    assert_same_run(run, whole)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_the_status_tells_a_batch_system_that_all_is_well(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, number: int, status: int
) -> None:
    real = Trainer.step

    def step(trainer: Trainer, parts: Iterable[batches.Batch]) -> float:
        signal.raise_signal(number)
        return real(trainer, parts)

    monkeypatch.setattr(Trainer, "step", step)
    assert main(["train", *tiny.options(**settings())]) == status
    assert (Path(settings()["out"]) / "checkpoint.pt").exists()


# -------------------------------------------------------------------------- parts


@pytest.mark.parametrize("micro", [1, 3, 4, 7])
def test_parts_make_the_step_of_the_whole_batch(
    settings: Settings, tmp_path: Path, micro: int
) -> None:
    options = settings(arch="tests.tiny:separate")
    whole = train(TrainingConfig(**options | {"out": str(tmp_path / "whole")}))
    assert_close(train(TrainingConfig(**options | {"micro_batch": micro})), whole)


def test_the_resolved_parts_are_written_down(settings: Settings, tmp_path: Path) -> None:
    run = train(TrainingConfig(**settings(micro_batch=4, epochs=1)))
    config = json.loads((run / "config.json").read_text())
    assert (config["micro_batch"], config["processes"]) == (4, 1)
    with pytest.raises(InputError, match="micro_batch: 4 there, 8 now"):
        train(TrainingConfig(**settings(epochs=1)))


# ------------------------------------------------------------------------ average


def test_the_average_is_what_is_validated_kept_and_extracted(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []
    real = Trainer.evaluate

    def evaluate(trainer: Trainer) -> dict[str, float]:
        averaged, plain = trainer.evaluated.state_dict(), trainer.network.state_dict()
        seen.append(tuple({k: t.clone() for k, t in s.items()} for s in (averaged, plain)))
        expected = trainer.evaluated(torch.zeros(1, 3, tiny.SIDE, tiny.SIDE))
        trainer.network.eval()
        grey = torch.tensor([round(255 * m) for m in trainer.preprocessing.mean]).view(1, 3, 1, 1)
        pixels = grey.expand(1, 3, tiny.SIDE, tiny.SIDE).to(torch.uint8)
        torch.testing.assert_close(trainer.forward(pixels), expected, rtol=0.05, atol=0.05)
        trainer.network.train()
        return result([0.3, 0.6, 0.5][len(seen) - 1])

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    run = train(TrainingConfig(**settings(ema=0.9)))
    kept = weights(run)
    averaged, plain = seen[1]
    assert all(torch.equal(kept[name], tensor) for name, tensor in averaged.items())
    assert not all(torch.equal(kept[name], tensor) for name, tensor in plain.items())
    loaded = Run.open(run).load_network().state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in loaded.items())
    assert real is not evaluate


def test_an_average_learns_too(tmp_path: Path) -> None:
    tiny.make_data(tmp_path, 128)
    options = tiny.basic_training(tmp_path, tmp_path / "run")
    more = {"epochs": 20, "batch_size": 16, "validation": "32", "lr": 0.03, "ema": 0.99}
    run = train(TrainingConfig(**options | more))
    assert max(float(row["f2"]) for row in log(run)) > 0.9


# ------------------------------------------------------------------------- plateau


def test_the_loss_can_be_what_is_to_improve(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F2 falls throughout; the loss rises from the third evaluation on."""
    losses = [3.0, 2.0, 2.5, 2.4, 2.3]
    monkeypatch.setattr(
        Trainer, "evaluate", lambda t: result(0.9 - 0.1 * t.state.epoch, losses[t.state.epoch])
    )
    changes = {"schedule": "plateau", "monitor": "loss", "patience": 1, "reduction": 0.5}
    run = train(TrainingConfig(**settings(epochs=5, warmup_steps=0, **changes)))
    rates = [float(row["lr"]) for row in log(run)]
    assert rates == pytest.approx([0.02] * 4 + [0.01])
    state = runs.load_checkpoint(run / "checkpoint.pt", torch.device("cpu"))["state"]
    assert state["best"] == -2.0
    assert "| 0.8000 (at 0.100) |" in (run / "README.md").read_text()


# --------------------------------------------------------------------- less memory


def small(**changes: Any) -> dict[str, Any]:
    return {"arch": "test_resnet", "image_size": 32, "epochs": 1, "micro_batch": 4} | changes


def test_activations_computed_twice_make_the_same_step(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = recorded(monkeypatch)
    train(TrainingConfig(**settings(**small())))
    once = steps[:]
    steps.clear()
    options = settings(**small(out=str(tmp_path / "twice"), gradient_checkpointing=True))
    train(TrainingConfig(**options))
    assert np.array(steps) == pytest.approx(np.array(once), rel=1e-4)


def test_networks_that_cannot_do_it_are_named(settings: Settings) -> None:
    with pytest.raises(InputError, match=r"'tests\.tiny:network' cannot do it; lower --micro"):
        Trainer(TrainingConfig(**settings(gradient_checkpointing=True)))


def test_a_compiled_network_is_the_same_run(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the compiler's cheapest back end: the plumbing is ours, the kernels are not."""
    plain = train(TrainingConfig(**settings(out=str(tmp_path / "plain"), ema=0.9)))
    compiled: list[Any] = []
    real = torch.compile

    def compile(network: Any) -> Any:
        compiled.append(real(network, backend="eager"))
        return compiled[-1]

    monkeypatch.setattr(torch, "compile", compile)
    run = train(TrainingConfig(**settings(compile=True, ema=0.9)))
    assert len(compiled) == 1
    assert_close(run, plain)
    assert weights(run).keys() == weights(plain).keys()  # without a prefix of the compiler's


# ---------------------------------------------------------------------- faults


def test_the_images_of_a_bad_step_are_listed(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(TrainingConfig(**settings(batch_size=12, out=str(tmp_path / "whole"))))
    options = settings(batch_size=12)
    real = Trainer.forward

    def forward(trainer: Trainer, pixels: torch.Tensor) -> torch.Tensor:
        due = trainer.network.training and trainer.state.epoch == 1
        return real(trainer, pixels) * (math.nan if due else 1)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "forward", forward)
        with pytest.raises(InputError, match=r"the loss is nan .* all in bad_batch\.txt"):
            train(TrainingConfig(**options))
    listed = (tmp_path / "run" / "bad_batch.txt").read_text().split()
    trainer = Trainer(TrainingConfig(**options))
    items = next(iter(batches.epoch_batches(len(trainer.data.train), 12, 0, 1)))
    assert listed == trainer.data.train.ids[[row for _, row in items]].tolist()
    assert_same_run(train(TrainingConfig(**options)), whole)  # the list goes as well


def test_weights_that_are_not_finite_are_never_saved(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finite loss can have gradients that are not."""
    real = Trainer.step

    def step(trainer: Trainer, parts: Iterable[batches.Batch]) -> float:
        loss = real(trainer, parts)
        if trainer.done == 8:
            with torch.no_grad():
                next(trainer.network.parameters()).fill_(math.inf)
        return loss

    monkeypatch.setattr(Trainer, "step", step)
    config = TrainingConfig(**settings(checkpoint_minutes=0))
    with pytest.raises(InputError, match="weights are not finite at epoch 2, step 3"):
        train(config)
    saved = runs.load_checkpoint(Path(config.out) / "checkpoint.pt", torch.device("cpu"))
    assert (saved["state"]["epoch"], saved["state"]["step"]) == (1, 2)
    assert all(t.isfinite().all() for t in saved["network"].values())


# -------------------------------------------------------------- earlier versions


LATER = (
    "least_area", "no_flip", "colour", "randaugment", "micro_batch", "monitor", "loss",
    "positive_weight", "ema", "gradient_checkpointing", "compile", "label_cache",
)  # fmt: skip


def test_a_run_of_an_earlier_version_goes_on(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(TrainingConfig(**settings(out=str(tmp_path / "whole"))))
    with monkeypatch.context() as patch:
        recorded(patch, stop_after=lambda done: done == STEPS + 2)
        with pytest.raises(Interrupted):
            train(TrainingConfig(**settings()))
    run = tmp_path / "run"
    config = json.loads((run / "config.json").read_text())
    for name in LATER:
        del config["config"][name]
    del config["micro_batch"], config["processes"]
    (run / "config.json").write_text(json.dumps(config))
    saved = torch.load(run / "checkpoint.pt", weights_only=True)
    for row in saved["state"]["log"]:
        del row["images_per_second"], row["waiting"]
    torch.save(saved, run / "checkpoint.pt")
    with pytest.raises(InputError, match=r"ema: 0\.0 there, 0\.5 now"):
        train(TrainingConfig(**settings(ema=0.5)))
    train(TrainingConfig(**settings()))
    assert (run / "weights.safetensors").read_bytes() == (
        whole / "weights.safetensors"
    ).read_bytes()
    with open(run / "log.csv") as file:
        header, first, *_ = (line.rstrip("\n").split(",") for line in file)
    assert header[-2:] == ["images_per_second", "waiting"]
    assert first[-2:] == ["", ""]


def test_a_checkpoint_without_an_average_is_no_checkpoint_with_one(settings: Settings) -> None:
    run = train(TrainingConfig(**settings(ema=0.5, epochs=1)))
    saved = torch.load(run / "checkpoint.pt", weights_only=True)
    del saved["average"]
    torch.save(saved, run / "checkpoint.pt")
    with pytest.raises(InputError, match=r"does not fit this run \('average'\)"):
        train(TrainingConfig(**settings(ema=0.5, epochs=1)))


# ------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ema": 1.0}, "--ema 1.0: give a share"),
        ({"positive_weight": 0.0}, "--positive-weight 0.0: give a positive"),
        ({"micro_batch": -1}, "--micro-batch -1: give at least 0"),
        ({"augment": "photo", "least_area": 0.0}, "--least-area 0.0: give a share above 0"),
        ({"augment": "photo", "randaugment": 31}, "--randaugment 31: give at most 30"),
        ({"randaugment": 7}, "--randaugment says how --augment photo works, which --augment tests"),
        ({"no_flip": True}, "--no-flip says how"),
    ],
)
def test_senseless_settings_are_refused(
    settings: Settings, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        TrainingConfig(**settings(**changes))
