"""Several processes train as one would: the same steps, the same scores, the same stops."""

from __future__ import annotations

import csv
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from featcache.errors import InputError
from featcache.settings import TrainingConfig
from featcache.training import Trainer, train
from featcache.world import World, joined
from tests import tiny

ALL = """
def process(rank):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    return cli.main(["train", *options[rank % len(options)]])
pids = [child(lambda: process(rank), errors=out / f"errors-{rank}") for rank in range(size)]
"""


@pytest.fixture(scope="module")
def nursery() -> Iterator[tiny.Nursery]:
    with tiny.Nursery() as nursery:
        yield nursery


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """62 images of which two cannot be read."""
    root = tmp_path_factory.mktemp("data")
    tiny.make_data(root, 62)
    for name in ("i006", "i041"):
        (root / "images" / f"{name}.png").write_bytes(b"no image")
    (root / "held.txt").write_text("".join(f"i{k:03d}\n" for k in range(0, 62, 5)))
    return root


def settings(data: Path, out: Path, **changes: Any) -> dict[str, Any]:
    held_out = {"validation": str(data / "held.txt"), "arch": "tests.tiny:separate"}
    return tiny.basic_training(data, out) | held_out | changes


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def together(
    nursery: tiny.Nursery, out: Path, options: dict[str, Any], size: int = 2, then: str = ""
) -> list[int]:
    """Exit statuses of processes that train one run."""
    code = ALL + then + "answer = [ended(pid) for pid in pids]"
    words = [tiny.options(**options)]
    answer: list[int] = nursery.run(code, out=out, options=words, size=size, port=free_port())
    return answer


def log(run: Path) -> list[dict[str, float]]:
    with open(run / "log.csv", newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def assert_close_runs(run: Path, other: Path, columns: tuple[str, ...]) -> None:
    rows, others = log(run), log(other)
    assert len(rows) == len(others) > 1
    for row, expected in zip(rows, others, strict=True):
        for column in columns:
            assert row[column] == pytest.approx(expected[column], rel=2e-5), column


EVERYTHING = ("lr", "train_loss", "loss", "f2", "threshold")


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"micro_batch": 2, "ema": 0.9, "clip": 1.0},
        {"schedule": "plateau", "patience": 0, "loss": "asymmetric", "monitor": "loss"},
    ],
    ids=["plain", "parts", "plateau"],
)
def test_two_processes_are_one_with_the_doubled_batch(
    nursery: tiny.Nursery, data: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Of a network in which images do not meet: within rounding, validation included."""
    one = train(TrainingConfig(**settings(data, tmp_path / "one", **changes)))
    two = settings(data, tmp_path / "two", **changes)
    assert together(nursery, tmp_path, two) == [0, 0]
    assert_close_runs(tmp_path / "two", one, EVERYTHING)
    for name in ("unreadable_images.csv", "validation_ids.txt", "classes.csv"):
        assert (tmp_path / "two" / name).read_bytes() == (one / name).read_bytes()
    runs = (one, tmp_path / "two")
    first, second = (safetensors.torch.load_file(r / "weights.safetensors") for r in runs)
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_with_batch_normalisation_the_parts_must_be_the_same(
    nursery: tiny.Nursery, data: Path, tmp_path: Path
) -> None:
    """Then every step is that of one process, dropout included; running statistics, and so
    validation, differ a little: the mean over processes against one part after the other."""
    changes = {"arch": "tests.tiny:network", "micro_batch": 4}
    one = train(TrainingConfig(**settings(data, tmp_path / "one", **changes)))
    options = settings(data, tmp_path / "two", **changes)
    assert together(nursery, tmp_path, options) == [0, 0]
    assert_close_runs(tmp_path / "two", one, ("lr", "train_loss"))
    for row, expected in zip(log(tmp_path / "two"), log(one), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=0.2)


@pytest.mark.slow
def test_processes_stop_together_and_go_on_in_any_number(
    nursery: tiny.Nursery, data: Path, tmp_path: Path
) -> None:
    options = settings(data, tmp_path / "run", micro_batch=2, augment="tests.tiny:sleepy")
    options["checkpoint_minutes"] = 0
    wait = """
while not (out / "run" / "checkpoint.pt").exists():
    time.sleep(0.01)
os.kill(pids[1], signal.SIGTERM)
os.kill(pids[1], signal.SIGTERM)
"""
    assert together(nursery, tmp_path, options, then=wait) == [0, 0]
    assert "the same command goes on" in (tmp_path / "errors-0").read_text()
    assert not (tmp_path / "run" / "README.md").exists()
    alone = train(TrainingConfig(**settings(data, tmp_path / "whole", micro_batch=2)))
    for size in (4, 2):
        kill = f"""
time.sleep({0.4 if size == 4 else 0})
{"[os.kill(pid, signal.SIGKILL) for pid in pids]" if size == 4 else ""}
"""
        together(nursery, tmp_path, options, size=size, then=kill)
    assert_close_runs(tmp_path / "run", alone, EVERYTHING)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["loss", "folder", "data"])
def test_no_process_waits_for_one_that_has_failed(
    nursery: tiny.Nursery, data: Path, tmp_path: Path, fault: str
) -> None:
    options = settings(data, tmp_path / "run")
    if fault == "loss":
        options |= {"lr": 1e30, "optimizer": "sgd", "warmup_steps": 0}
    if fault == "folder":
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "thesis.tex").write_text("years of work")
    words = [tiny.options(**options)]
    if fault == "data":
        (tmp_path / "held.txt").write_text("i001\ni002\n")
        words.append(tiny.options(**options | {"validation": str(tmp_path / "held.txt")}))
    code = ALL + "answer = [ended(pid) for pid in pids]"
    port = free_port()
    assert nursery.run(code, out=tmp_path, options=words, size=2, port=port) == [2, 2]
    message = {
        "loss": "not finite|the loss is",
        "folder": "not empty and not a run",
        "data": "the processes see different images or labels",
    }[fault]
    for rank in range(2):
        text = (tmp_path / f"errors-{rank}").read_text()
        assert any(part in text for part in message.split("|")), text


@pytest.mark.slow
def test_torchrun_itself(data: Path, tmp_path: Path) -> None:
    """As a person types it; SIGTERM to torchrun reaches all, and the command goes on."""
    options = settings(
        data, tmp_path / "run", augment="tests.tiny:sleepy", checkpoint_minutes=0, epochs=4
    )
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
        "--master-port", str(free_port()), "-m", "--", "featcache", "train",
        *tiny.options(**options),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tiny.ROOT)}
    with open(tmp_path / "printed", "wb") as printed:
        process = subprocess.Popen(command, env=environment, stdout=printed, stderr=printed)
        tiny.wait_for((tmp_path / "run" / "checkpoint.pt").exists, process)
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        process.wait(120)
        assert "stopped at step" in (tmp_path / "printed").read_text()
        assert subprocess.run(command, env=environment, check=False, stdout=printed).returncode == 0
    assert len(log(tmp_path / "run")) == 4
    whole = train(TrainingConfig(**options | {"out": str(tmp_path / "whole")}))
    assert_close_runs(tmp_path / "run", whole, EVERYTHING)


def test_one_process_needs_nobody() -> None:
    world = World(torch.device("cpu"))
    network = torch.nn.BatchNorm1d(2)
    assert world.wrap(network) is network
    assert world.share(3) == 3
    assert world.gather("a") == ["a"]
    assert world.first_does(lambda: 5) == world.one_a_machine_before(lambda: 5) == 5
    values = torch.tensor([1.0, 2.0])
    assert world.add_up(values).tolist() == [1, 2]
    world.share_statistics(network)
    assert network.running_mean is not None
    assert network.running_mean.tolist() == [0, 0]


def test_without_torchrun_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with joined("cpu") as world:
        assert (world.rank, world.size, world.first) == (0, 1, True)


@pytest.mark.parametrize(("batch", "micro", "size"), [(8, 3, 2), (8, 8, 2), (7, 2, 3)])
def test_steps_that_cannot_be_dealt_out_evenly_are_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int, micro: int, size: int
) -> None:
    config = TrainingConfig(**settings(data, tmp_path / "run", batch_size=batch, micro_batch=micro))
    # As if the others were there: nothing is exchanged before the steps are divided.
    monkeypatch.setattr(World, "one_a_machine_before", lambda world, action: action())
    monkeypatch.setattr(World, "gather", lambda world, value: [value])
    with pytest.raises(
        InputError, match=f"--batch-size {batch}: .* parts of {micro} .* {size} proc"
    ):
        Trainer(config, World(torch.device("cpu"), 0, size))
