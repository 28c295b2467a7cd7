"""Training learns, can be stopped at any moment, and says what is wrong."""

from __future__ import annotations

import csv
import json
import math
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from featcache import InputError, batches, runs
from featcache.cli import main
from featcache.console import Interrupted
from featcache.losses import summed_loss
from featcache.runs import Run
from featcache.settings import TrainingConfig
from featcache.training import Trainer, train
from tests import tiny
from tests.tiny import basic_training as basic

EPOCHS, STEPS = 3, 6  # of the basic settings: 48 training images in batches of 8
Settings = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    tiny.make_data(root, 64)
    return root


@pytest.fixture
def settings(data: Path, tmp_path: Path) -> Settings:
    """Options of a short training; the keyword arguments go before."""
    return lambda **changes: basic(data, tmp_path / "run") | changes


@pytest.fixture(scope="module")
def nursery() -> Iterator[tiny.Nursery]:
    with tiny.Nursery() as nursery:
        yield nursery


@pytest.fixture(scope="module")
def unbroken(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of the settings as they are, never stopped."""
    return train(TrainingConfig(**basic(data, tmp_path_factory.mktemp("unbroken") / "run")))


def log(run: Path) -> list[dict[str, str]]:
    """log.csv without the columns of time, which may differ between two sittings."""
    with open(run / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for column in ("seconds", "images_per_second", "waiting"):
            assert float(row.pop(column)) >= 0
    return rows


def weights(run: Path) -> bytes:
    return (run / "weights.safetensors").read_bytes()


def assert_same_run(run: Path, other: Path) -> None:
    assert weights(run) == weights(other)
    assert log(run) == log(other)
    names = {item.name for item in run.iterdir()}
    assert names == {item.name for item in other.iterdir()}
    for name in names - {"weights.safetensors", "log.csv", "checkpoint.pt", "config.json"}:
        assert (run / name).read_bytes() == (other / name).read_bytes(), name


def snapshot(run: Path) -> dict[str, tuple[int, bytes]]:
    return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in run.iterdir()}


# ----------------------------------------------------------------------- learning


@pytest.mark.parametrize("held_out", ["1", "33"])
def test_a_last_validation_batch_of_one_image_counts(held_out: str, tmp_path: Path) -> None:
    tiny.make_data(tmp_path, 48)
    more = {"epochs": 1, "batch_size": 8, "validation": held_out}
    run = train(TrainingConfig(**basic(tmp_path, tmp_path / "run") | more))
    assert 0 < float(log(run)[0]["f2"]) <= 1


def test_labels_without_a_positive_are_refused(tmp_path: Path) -> None:
    ids = list(tiny.make_data(tmp_path, 16))
    empty = tmp_path / "empty.csv"
    empty.write_text("image_id,labels\n" + "".join(f"{i},\n" for i in ids))
    with pytest.raises(InputError, match=r"empty\.csv: no positive label of a class to train"):
        train(TrainingConfig(**basic(tmp_path, tmp_path / "run") | {"labels": [str(empty)]}))


def test_training_learns(tmp_path: Path) -> None:
    labels = list(tiny.make_data(tmp_path, 128).values())
    run = train(
        TrainingConfig(
            **basic(tmp_path, tmp_path / "run")
            | {"epochs": 20, "batch_size": 16, "validation": "32", "lr": 0.03}
        )
    )
    rows = log(run)
    assert float(rows[-1]["train_loss"]) < 0.4 * float(rows[0]["train_loss"])
    assert float(rows[-1]["loss"]) < 0.5 * float(rows[0]["loss"])
    # Always naming all four colours is the best that can be done blindly.
    blind = np.mean([5 * len(y) / (4 * len(y) + 4) for y in labels])
    assert blind < 0.75
    assert max(float(row["f2"]) for row in rows) > 0.92


def test_the_first_loss_is_that_of_the_label_frequencies(data: Path, settings: Settings) -> None:
    trainer = Trainer(TrainingConfig(**settings()))
    positives = trainer.data.train_labels.positives.toarray()
    prior = (positives.sum(0) + 0.5) / (len(positives) + 1)
    entropy = -(positives * np.log(prior) + (1 - positives) * np.log(1 - prior)).sum(1).mean()
    with torch.no_grad():
        trainer.network.last.weight.zero_()
    images = batches.ViewImages(
        trainer.data.train, batches.Recipe("eval", 0, 0, trainer.preprocessing)
    )
    rows = np.arange(len(positives))
    pixels = torch.stack([torch.from_numpy(images[row][1][0]) for row in rows.tolist()])
    loss = summed_loss(trainer.forward(pixels), trainer.targets(rows, trainer.device))
    assert loss.mean().item() == pytest.approx(entropy, rel=1e-5)


def test_rates_warm_up_and_follow_a_cosine(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = recorded(monkeypatch)
    train(TrainingConfig(**settings(epochs=2)))
    expected = [
        0.02 * min(1, (t + 1) / 4) * (1 + math.cos(math.pi * t / (2 * STEPS))) / 2
        for t in range(2 * STEPS)
    ]
    assert [rate for rate, _ in steps] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("warmup", "said"), [(6, None), (8, "only late: 8 of 12"), (500, "never: 500 of 12")]
)
def test_a_warm_up_as_long_as_the_training_is_said(
    settings: Settings, capsys: pytest.CaptureFixture[str], warmup: int, said: str | None
) -> None:
    """The default is made for hundreds of thousands of images."""
    train(TrainingConfig(**settings(epochs=2, warmup_steps=warmup)))
    printed = capsys.readouterr().out
    assert ("--warmup-steps" in printed) == (said is not None)
    assert said is None or f"reaches --lr 0.02 {said}" in printed


# -------------------------------------------------------------------------- seeds


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_same_seed_same_bytes_whatever_the_workers(
    settings: Settings, unbroken: Path, workers: int
) -> None:
    torch.manual_seed(workers)  # what the process did before must not matter
    assert_same_run(train(TrainingConfig(**settings(workers=workers))), unbroken)


def test_another_seed_is_another_run(settings: Settings, unbroken: Path) -> None:
    run = train(TrainingConfig(**settings(seed=1, epochs=1)))
    assert weights(run) != weights(unbroken)
    assert log(run)[0]["train_loss"] != log(unbroken)[0]["train_loss"]


# ---------------------------------------------------------------- stopping, step by step


def recorded(
    monkeypatch: pytest.MonkeyPatch, stop_after: Callable[[int], bool] = lambda done: False
) -> list[tuple[float, float]]:
    """(learning rate, loss) of all steps from now on; SIGINT arrives in the steps told."""
    steps: list[tuple[float, float]] = []
    real = Trainer.step

    def step(trainer: Trainer, batch: batches.Batch) -> float:
        loss = real(trainer, batch)
        steps.append((trainer.optimizer.param_groups[0]["lr"], loss))
        if stop_after(len(steps)):
            signal.raise_signal(signal.SIGINT)
        return loss

    monkeypatch.setattr(Trainer, "step", step)
    return steps


def result(f2: float, loss: float = 1.0) -> dict[str, float]:
    """What an evaluation returns."""
    return {"loss": loss, "f2": f2, "threshold": 0.1}


PLATEAU = {"schedule": "plateau", "patience": 1, "reduction": 0.5, "epochs": 5}
FALLING = [0.5, 0.4, 0.3, 0.3, 0.2]  # F2 after each epoch; a plateau ends with the third


@pytest.mark.parametrize("changes", [{}, PLATEAU], ids=["cosine", "plateau"])
@pytest.mark.parametrize("every", [1, 4, STEPS])
def test_stopped_after_every_few_steps_it_takes_the_same_steps(
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    every: int,
) -> None:
    if changes:
        monkeypatch.setattr(Trainer, "evaluate", lambda t: result(FALLING[t.state.epoch]))
    with monkeypatch.context() as patch:
        expected = recorded(patch)
        whole = train(TrainingConfig(**settings(out=str(tmp_path / "whole"), **changes)))
    assert len(expected) == changes.get("epochs", EPOCHS) * STEPS
    if changes:
        assert [expected[e * STEPS + 4][0] for e in range(5)] == [0.02] * 3 + [0.01] * 2
    steps = recorded(monkeypatch, stop_after=lambda done: done % every == 0)
    config = TrainingConfig(**settings(**changes))
    sittings = 0
    while True:
        sittings += 1
        try:
            train(config)
            break
        except Interrupted:
            assert len(steps) == sittings * every
    assert sittings == len(expected) // every + 1
    assert steps == expected
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("after", [1, STEPS - 1, STEPS, STEPS + 1, EPOCHS * STEPS])
def test_stopped_once_it_takes_the_same_steps(
    settings: Settings, unbroken: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    steps = recorded(monkeypatch, stop_after=lambda done: done == after)
    with pytest.raises(Interrupted, match=rf"stopped at step {after} of {EPOCHS * STEPS}"):
        train(TrainingConfig(**settings()))
    run = train(TrainingConfig(**settings()))
    assert len(steps) == EPOCHS * STEPS
    assert_same_run(run, unbroken)


def test_a_signal_during_evaluation_costs_nothing(
    settings: Settings, unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Trainer.evaluate

    def evaluate(trainer: Trainer) -> dict[str, float]:
        signal.raise_signal(signal.SIGTERM)
        return real(trainer)

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    with pytest.raises(Interrupted):
        train(TrainingConfig(**settings()))
    monkeypatch.undo()
    assert len(log(Path(settings()["out"]))) == 1
    assert_same_run(train(TrainingConfig(**settings())), unbroken)


def test_a_second_signal_does_not_wait_for_the_end_of_a_step(
    settings: Settings, unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Trainer.step

    def step(trainer: Trainer, batch: batches.Batch) -> float:
        if trainer.state.epoch == 1:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return real(trainer, batch)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(KeyboardInterrupt):
        train(TrainingConfig(**settings()))
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.undo()
    assert_same_run(train(TrainingConfig(**settings())), unbroken)


# ------------------------------------------------------------------------ real signals


def assert_was_interrupted(run: Path, error: str) -> None:
    """One line that says how to go on, and a checkpoint on the way."""
    assert len(error.splitlines()) == 1
    assert "stopped at step" in error
    assert "the same command goes on from there" in error
    state = runs.load_checkpoint(run / "checkpoint.pt", torch.device("cpu"))["state"]
    assert 0 < state["epoch"] * STEPS + state["step"] < EPOCHS * STEPS


def test_ctrl_c_in_a_real_process(settings: Settings, unbroken: Path, tmp_path: Path) -> None:
    arguments = tiny.options(**settings(augment="tests.tiny:sleepy", checkpoint_minutes=0))
    process = tiny.start("train", *arguments, output=tmp_path / "log")
    tiny.wait_for((tmp_path / "run" / "checkpoint.pt").exists, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert_was_interrupted(tmp_path / "run", (tmp_path / "log.err").read_text())
    assert main(["train", *arguments]) == 0
    assert_same_run(tmp_path / "run", unbroken)


def test_sigterm_to_the_whole_group(
    nursery: tiny.Nursery, settings: Settings, unbroken: Path, tmp_path: Path
) -> None:
    """As a batch system sends it: to workers as well, which leave the decision to the parent."""
    arguments = tiny.options(
        **settings(augment="tests.tiny:sleepy", checkpoint_minutes=0, workers=1)
    )
    code = """
pid = child(lambda: (os.setsid(), cli.main(["train", *options]))[1], errors=out / "errors")
while not (out / "run" / "checkpoint.pt").exists():
    time.sleep(0.01)
os.killpg(pid, signal.SIGTERM)
answer = ended(pid)
"""
    assert nursery.run(code, out=tmp_path, options=arguments) == 0
    assert_was_interrupted(tmp_path / "run", (tmp_path / "errors").read_text())
    assert main(["train", *arguments]) == 0
    assert_same_run(tmp_path / "run", unbroken)


# ------------------------------------------------------------------------------- kills


@pytest.mark.parametrize("torn", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_kill_at_any_call_changes_nothing(
    nursery: tiny.Nursery, tmp_path: Path, torn: bool
) -> None:
    """Before each call that changes something on disk, or in the middle of a write."""
    tiny.make_data(tmp_path, 12)
    options = basic(tmp_path, tmp_path / "whole") | {
        "validation": "4", "augment": "none", "batch_size": 4, "epochs": 2,
    }  # fmt: skip
    whole = train(TrainingConfig(**options))
    del options["out"]
    code = """
def command(k):
    return ["train", *options, "--out", str(out / f"killed-{k}")]

def killed(k):
    return ended(child(lambda: (arm(k, torn), cli.main(command(k)))[1])) == -signal.SIGKILL

k = 1
while killed(k):
    k += 1
assert ended(child(lambda: max(cli.main(command(j)) for j in range(1, k)))) == 0
answer = k
"""
    count = nursery.run(code, out=tmp_path, options=tiny.options(**options), torn=torn)
    # Some 3 calls for each of 4 files at the beginning and of 3 after each epoch.
    assert count > 25
    for k in range(1, count):
        assert_same_run(tmp_path / f"killed-{k}", whole)


@pytest.mark.slow
def test_a_kill_at_any_call_of_a_replacement_changes_nothing(
    nursery: tiny.Nursery, settings: Settings, unbroken: Path, tmp_path: Path
) -> None:
    older = train(TrainingConfig(**settings(epochs=1, seed=4)))
    code = """
k = 1
command = ["train", *options, "--overwrite"]
while ended(child(lambda: (arm(k, True), cli.main(command))[1])) != 0:
    k += 1
answer = k
"""
    assert nursery.run(code, options=tiny.options(**settings())) > 25
    assert_same_run(older, unbroken)


@pytest.mark.parametrize("kills", [3, pytest.param(12, marks=pytest.mark.slow)])
def test_random_kills_change_nothing(
    nursery: tiny.Nursery, settings: Settings, unbroken: Path, tmp_path: Path, kills: int
) -> None:
    code = """
chance, runs, done = random.Random(kills), 1, 0
while done < kills:
    command = ["train", *options, "--out", str(out / f"run-{runs}")]
    pid = child(lambda: cli.main(command))
    time.sleep(chance.uniform(0.1, 0.8))
    os.kill(pid, signal.SIGKILL)
    if ended(pid) == 0:  # it came to its end: begin another one
        runs += 1
    else:
        done += 1
assert ended(child(lambda: cli.main(command))) == 0
answer = runs
"""
    options = settings(augment="tests.tiny:sleepy", checkpoint_minutes=0)
    del options["out"]
    count = nursery.run(code, out=tmp_path, options=tiny.options(**options), kills=kills)
    for k in range(1, count + 1):
        if (tmp_path / f"run-{k}").exists():
            assert_same_run(tmp_path / f"run-{k}", unbroken)


def test_what_killed_processes_left_is_removed(
    settings: Settings, unbroken: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("checkpoint.pt", "weights.safetensors", "config.json"):
        (run / f".{name}.x8k2_a9b").write_bytes(b"half of a file")
    assert_same_run(train(TrainingConfig(**settings())), unbroken)


def test_two_processes_do_not_train_one_run(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    code = (
        "import sys; from pathlib import Path; from featcache.journal import Lock\n"
        "lock = Lock(Path(sys.argv[1]) / '.lock', Path(sys.argv[1]))\n"
        "print('locked', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(InputError, match="run: is being written by another process"):
            train(TrainingConfig(**settings()))
        other.kill()
    train(TrainingConfig(**settings(epochs=1)))


# ---------------------------------------------------------------------------- plateau


def test_plateaus_reduce_the_rate_and_end_the_training(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "evaluate", lambda trainer: result(0.5))
    changes = {"schedule": "plateau", "epochs": 100, "patience": 1, "max_reductions": 2}
    run = train(TrainingConfig(**settings(lr=0.01, warmup_steps=0, reduction=0.1, **changes)))
    # The first evaluation is the best one; each pair after it is a plateau, the third ends it.
    rates = [float(row["lr"]) for row in log(run)]
    assert rates == pytest.approx([1e-2] * 3 + [1e-3] * 2 + [1e-4] * 2)
    kept = snapshot(run)
    assert train(TrainingConfig(**settings(lr=0.01, warmup_steps=0, reduction=0.1, **changes)))
    assert snapshot(run) == kept


def test_the_best_weights_are_kept_not_the_last(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, torch.Tensor]] = []

    def evaluate(trainer: Trainer) -> dict[str, float]:
        seen.append({name: t.clone() for name, t in trainer.network.state_dict().items()})
        return result([0.3, 0.6, 0.6][len(seen) - 1])

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    run = train(TrainingConfig(**settings()))
    kept = safetensors.torch.load(weights(run))
    for k, same in enumerate([False, True, False]):
        assert all(torch.equal(kept[name], t) for name, t in seen[k].items()) == same


# --------------------------------------------------------------- an existing folder


def test_overwrite_begins_anew(settings: Settings, unbroken: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    tiny.make_data(broken)
    (broken / "images" / "i001.png").write_bytes(b"no image")
    old = settings(images=str(broken / "images"), epochs=1, seed=3)
    run = train(TrainingConfig(**old))
    assert (run / "unreadable_images.csv").exists()
    assert_same_run(train(TrainingConfig(**settings(overwrite=True))), unbroken)


def test_stopping_a_replacement_says_how_to_go_on(
    settings: Settings, unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = recorded(monkeypatch, stop_after=lambda done: done == 8)
    with pytest.raises(Interrupted, match="the same command without --overwrite goes on"):
        train(TrainingConfig(**settings(overwrite=True)))
    assert_same_run(train(TrainingConfig(**settings())), unbroken)
    assert len(steps) == EPOCHS * STEPS


def test_other_settings_are_refused_with_both_values(settings: Settings) -> None:
    run = train(TrainingConfig(**settings(epochs=1)))
    kept = snapshot(run)
    with pytest.raises(InputError) as caught:
        train(TrainingConfig(**settings(epochs=1, lr=0.5, model_kwargs=["width=4"], workers=1)))
    message = str(caught.value)
    assert str(run) in message
    assert "--overwrite" in message
    assert "lr: 0.02 there, 0.5 now" in message
    assert "model_kwargs: [] there, ['width=4'] now" in message
    assert "workers" not in message  # may change
    assert "batch_size" not in message  # is equal
    assert snapshot(run) == kept


def test_other_labels_in_the_same_file_are_refused(settings: Settings, tmp_path: Path) -> None:
    label_sets = tiny.make_data(tmp_path / "data")
    file = tmp_path / "data" / "labels.csv"
    options = settings(images=str(tmp_path / "data" / "images"), labels=[str(file)], epochs=1)
    run = train(TrainingConfig(**options))
    kept = snapshot(run)
    first = next(iter(label_sets))
    label_sets[first] = sorted({"red", "blue"} ^ set(label_sets[first]))
    tiny.write_lists(file, label_sets)
    with pytest.raises(InputError, match=r"images: .*sha256.* there, .*sha256.* now"):
        train(TrainingConfig(**options))
    assert snapshot(run) == kept


def test_a_folder_with_other_files_is_refused(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="run: not empty and not a run; give another --out"):
        train(TrainingConfig(**settings()))
    assert [item.name for item in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_a_run_that_cannot_be_written_is_refused_before_anything_else(
    settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "run"
    with pytest.raises(InputError, match=rf"{out}: cannot be written .* is no folder\); choose"):
        train(TrainingConfig(**settings(out=str(out), labels=[str(tmp_path / "nowhere.csv")])))


@pytest.mark.parametrize("text", ["{", "[]", '{"architectures": ["other"]}', '{"format": 99}'])
def test_a_configuration_of_something_else_is_refused(
    settings: Settings, tmp_path: Path, text: str
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"run/config\.json: (damaged|not the format 1)") as caught:
        train(TrainingConfig(**settings()))
    assert len(str(caught.value).splitlines()) == 1
    assert (tmp_path / "run" / "config.json").read_text() == text


def test_a_finished_run_is_left_alone(
    settings: Settings, unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = snapshot(unbroken)
    steps = recorded(monkeypatch)
    assert train(TrainingConfig(**settings(out=str(unbroken)))) == unbroken
    assert steps == []
    assert snapshot(unbroken) == kept


# --------------------------------------------------------------------- faulty images


@pytest.fixture
def flawed(tmp_path: Path) -> tuple[Path, dict[str, list[str]]]:
    """Data of which two labelled images do not exist and three cannot be read."""
    root = tmp_path / "flawed"
    label_sets = tiny.make_data(root)
    for name in ("gone", "a-ghost"):
        label_sets[name] = ["red"]
    tiny.write_lists(root / "labels.csv", label_sets)
    (root / "images" / "i003.png").write_bytes(b"this is no image")
    (root / "images" / "i011.png").write_bytes(b"")
    whole = (root / "images" / "i020.png").read_bytes()
    (root / "images" / "i020.png").write_bytes(whole[: len(whole) // 2])
    tiny.draw(["red"], np.random.default_rng(0)).save(root / "images" / "unlabelled.png")
    return root, label_sets


def test_missing_and_unreadable_images_are_listed_and_skipped(
    flawed: tuple[Path, dict[str, list[str]]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root, _ = flawed
    (root / "held.txt").write_text("i000\ni003\ni005\n")
    options = basic(root, tmp_path / "run") | {"validation": str(root / "held.txt"), "epochs": 2}
    seen = []
    real = Trainer.forward

    def forward(trainer: Trainer, pixels: torch.Tensor) -> torch.Tensor:
        seen.extend((trainer.network.training, bool(image.any())) for image in pixels)
        return real(trainer, pixels)

    trainer = Trainer(TrainingConfig(**options))
    monkeypatch.setattr(Trainer, "forward", forward)
    trainer.path.mkdir()
    assert trainer.open_run()
    trainer.run()
    assert (trainer.path / "missing_images.txt").read_text() == "gone\na-ghost\n"
    with open(trainer.path / "unreadable_images.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["image_id", "reason"]
    # i003 is held out; the others train, whichever of two epochs shows them.
    assert [name for name, _ in rows] == ["i011", "i020"]
    assert rows[0][1] == "the file is empty"
    assert len(log(trainer.path)) == 2
    assert all(shown for _, shown in seen)  # no blank images stand in for unreadable ones
    # 45 images in batches of 8 are 40 an epoch, less those that are unreadable.
    assert 2 * 40 - 4 <= sum(trained for trained, _ in seen) < 2 * 40
    assert sum(not trained for trained, _ in seen) == 2 * 2
    capsys.readouterr()
    train(TrainingConfig(**options))
    printed = capsys.readouterr().out
    assert "45 training and 3 validation images" in printed
    assert "2 labelled images have no file" in printed
    assert "missing_images.txt" in printed


def test_nothing_readable_is_said(tmp_path: Path) -> None:
    label_sets = tiny.make_data(tmp_path, 12)
    options = basic(tmp_path, tmp_path / "run") | {"validation": str(tmp_path / "held.txt")}
    (tmp_path / "held.txt").write_text("i000\ni001\n")
    for name in list(label_sets)[2:]:
        (tmp_path / "images" / f"{name}.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"no image .* \(i\d+: the file is empty\); check"):
        train(TrainingConfig(**options))
    assert not (tmp_path / "run" / "weights.safetensors").exists()


@pytest.mark.parametrize("when", ["step", "evaluation"])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(
    settings: Settings, unbroken: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    real = Trainer.forward

    def forward(trainer: Trainer, pixels: torch.Tensor) -> torch.Tensor:
        logits = real(trainer, pixels)
        due = trainer.network.training and trainer.state.epoch == 1
        return logits * math.inf if due else logits

    def evaluate(trainer: Trainer) -> dict[str, float]:
        return result(0.5, math.nan if trainer.state.epoch == 1 else 1.0)

    config = TrainingConfig(**settings())
    if when == "step":
        monkeypatch.setattr(Trainer, "forward", forward)
        match = "the loss is (nan|inf) at epoch 2, step 0"
    else:
        monkeypatch.setattr(Trainer, "evaluate", evaluate)
        match = "the validation loss is nan after epoch 2"
    with pytest.raises(InputError, match=match) as caught:
        train(config)
    message = str(caught.value)
    assert "--lr" in message
    if when == "step":
        first = batches.epoch_batches(len(Trainer(config).data.train), 8, 0, 1)
        ids = Trainer(config).data.train.ids[[row for _, row in next(iter(first))]]
        assert " ".join(ids) in message
    monkeypatch.undo()
    state = runs.load_checkpoint(Path(config.out) / "checkpoint.pt", torch.device("cpu"))
    assert state["state"]["epoch"] == 1
    assert all(torch.isfinite(tensor).all() for tensor in state["network"].values())
    if when == "step":
        assert_same_run(train(config), unbroken)  # the state was that of a whole epoch


# ------------------------------------------------------------------- files of the run


@pytest.fixture
def file_size_limit() -> Iterator[Callable[[int], None]]:
    """Files of this process can grow to so many bytes only, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(("size", "name"), [(20_000, "checkpoint.pt"), (3_000, "weights")])
def test_a_full_disk_keeps_the_last_checkpoint(
    settings: Settings,
    unbroken: Path,
    monkeypatch: pytest.MonkeyPatch,
    file_size_limit: Callable[[int], None],
    size: int,
    name: str,
) -> None:
    config = TrainingConfig(**settings())
    run = Path(config.out)
    with monkeypatch.context() as patch:
        recorded(patch, stop_after=lambda done: done == STEPS - 2)
        with pytest.raises(Interrupted):
            train(config)
    kept = snapshot(run)
    file_size_limit(size)
    try:
        with pytest.raises(InputError, match=f"{name}.*make room.*the same command") as caught:
            train(config)
    finally:
        file_size_limit(resource.RLIM_INFINITY)
    assert len(str(caught.value).splitlines()) == 1
    assert snapshot(run)["checkpoint.pt"] == kept["checkpoint.pt"]
    assert not list(run.glob(".*"))
    assert_same_run(train(config), unbroken)


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "list", "other"])
def test_a_damaged_checkpoint_is_refused_in_one_line(
    settings: Settings, data: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    options = settings(epochs=1)
    path = train(TrainingConfig(**options)) / "checkpoint.pt"
    whole = path.read_bytes()
    if damage == "list":
        torch.save([1, 2], path)
    elif damage == "other":
        state = torch.load(path, weights_only=True)
        state["network"].pop("last.weight")
        torch.save(state, path)
    else:
        path.write_bytes(
            {"cut": whole[: len(whole) // 2], "empty": b"", "garbage": b"?" * 99}[damage]
        )
    damaged = path.read_bytes()
    capsys.readouterr()
    assert main(["train", *tiny.options(**options)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(path) in line
    assert "--overwrite" in line
    assert path.read_bytes() == damaged


def test_a_checkpoint_is_data_and_no_program(unbroken: Path, tmp_path: Path) -> None:
    state = torch.load(unbroken / "checkpoint.pt", weights_only=True)
    assert set(state) == {"state", "network", "optimizer", "plateau"}

    class Program:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"state": Program()}, tmp_path / "evil.pt")
    with pytest.raises(InputError, match=r"evil\.pt: not a readable checkpoint") as caught:
        runs.load_checkpoint(tmp_path / "evil.pt", torch.device("cpu"))
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "ran").exists()


def test_tied_weights_can_be_saved(tmp_path: Path) -> None:
    network = tiny.TinyNet(4)
    network.register_parameter("again", network.last.weight)
    runs.save_weights(tmp_path / "w.safetensors", network)
    state = safetensors.torch.load_file(tmp_path / "w.safetensors")
    assert torch.equal(state["again"], network.last.weight)
    assert torch.equal(state["last.weight"], network.last.weight)


def test_config_says_what_everything_was_resolved_to(
    settings: Settings, unbroken: Path, data: Path
) -> None:
    config = json.loads((unbroken / "config.json").read_text())
    assert config["config"] == settings(out=str(unbroken)) | {
        key: value for key, value in config["config"].items() if key not in settings()
    }
    assert set(config["config"]) == set(TrainingConfig.__dataclass_fields__)
    assert config["network"] == {"arch": "tests.tiny:network", "num_classes": 4, "kwargs": {}}
    assert config["preprocessing"]["image_size"] == tiny.SIDE
    assert len(config["preprocessing"]["mean"]) == 3
    assert (config["device"], config["precision"], config["threads"]) == ("cpu", "float32", 1)
    assert config["versions"]["torch"] == torch.__version__
    counts = {k: config["images"][k] for k in ("train", "validation", "missing")}
    assert counts == {"train": 48, "validation": 16, "missing": 0}


def test_the_run_can_be_opened(unbroken: Path) -> None:
    run = Run.open(unbroken)
    assert run.classes.tolist() == sorted(tiny.COLOURS)
    assert run.names.tolist() == run.classes.tolist()
    assert run.preprocessing.mean == tuple(run.config["preprocessing"]["mean"])
    network = run.load_network()
    assert not network.training
    saved = safetensors.torch.load_file(unbroken / "weights.safetensors")
    assert all(torch.equal(saved[name], t) for name, t in network.state_dict().items())


def test_classes_have_the_order_of_the_class_list(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "classes.csv").write_text("label_code,description\nwhite,Weiß\nred,\nblue,Blau\n")
    changes = {"classes": str(tmp_path / "classes.csv"), "epochs": 1}
    run = train(TrainingConfig(**settings(**changes, descriptions=changes["classes"])))
    assert Run.open(run).classes.tolist() == ["white", "red", "blue"]
    assert Run.open(run).names.tolist()[0] == "Weiß"
    assert Run.open(run).load_network().last.out_features == 3


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, r"no config\.json there; give the --out of `featcache train`"),
        ("config.json", b"{'", r"config\.json: damaged"),
        ("config.json", b'{"format": 7}', r"config\.json: not the format 1"),
        ("weights.safetensors", None, r"no weights\.safetensors yet"),
        (
            "weights.safetensors",
            b"??",
            r"weights\.safetensors: does not fit --arch 'tests.tiny:network'",
        ),
        ("classes.csv", None, r"classes\.csv: no such file"),
    ],
)
def test_an_incomplete_run_is_refused(
    unbroken: Path, tmp_path: Path, file: str, content: bytes | None, message: str
) -> None:
    for name, (_, text) in snapshot(unbroken).items():
        (tmp_path / name).write_bytes(text)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        Run.open(tmp_path).load_network()
    assert str(tmp_path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_no_validation_image_trains(
    settings: Settings, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: set[str] = set()
    real = batches.TrainingImages.__getitem__

    def recording(images: batches.TrainingImages, item: tuple[int, int]) -> Any:
        trained.add(str(images.images.ids[item[1]]))
        return real(images, item)

    monkeypatch.setattr(batches.TrainingImages, "__getitem__", recording)
    run = train(TrainingConfig(**settings(epochs=1)))
    held = (run / "validation_ids.txt").read_text().split()
    assert len(set(held)) == 16
    every = {path.stem for path in (data / "images").iterdir()}
    assert trained == every - set(held)
    # The same file holds the same images out of another run.
    ids = str(run / "validation_ids.txt")
    again = train(TrainingConfig(**settings(epochs=1, out=str(tmp_path / "b"), validation=ids)))
    assert (again / "validation_ids.txt").read_text().split() == held


def test_sizes_that_the_network_cannot_take_are_said(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"'tests\.tiny:network' takes no images of 1 x 1 pixels .*size"
    ):
        Trainer(TrainingConfig(**settings(image_size=1)))


def test_features_that_cannot_be_told_are_never_trained(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'tests\.tiny:doubled': its logits are not features"):
        Trainer(TrainingConfig(**settings(arch="tests.tiny:doubled")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "--batch-size 0: give at least 1"),
        ({"epochs": 0}, "--epochs 0: give at least 1"),
        ({"workers": -1}, "--workers -1: give at least 0"),
        ({"seed": -1}, "--seed -1: give at least 0"),
        ({"lr": 0.0}, "--lr 0.0: give a positive number"),
        ({"lr": math.nan}, "--lr nan: give a positive number"),
        ({"reduction": 1.0}, "--reduction 1.0: give a factor between 0 and 1"),
        ({"smoothing": 1.0}, "--smoothing 1.0: give a share"),
        ({"optimizer": "sdg"}, "--optimizer 'sdg'"),
        ({"augment": "foto"}, "augmentation 'foto' is unknown"),
    ],
)
def test_senseless_settings_are_refused(
    settings: Settings, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        train(TrainingConfig(**settings(**changes)))
    assert not (tmp_path / "run").exists()
