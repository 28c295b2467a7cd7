"""The recipe of the challenge: its commands are real ones, and lead to a submission."""

from __future__ import annotations

import csv
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import featcache.cli
import heads.cli
from examples.inclusive_images import hours
from featcache.console import from_arguments
from featcache.networks import FACTS
from featcache.settings import ConcatConfig, ExtractionConfig, TrainingConfig
from tests import tiny
from tests.tiny import ROOT

MAKEFILE = ROOT / "examples" / "inclusive_images" / "Makefile"


def planned(*words: str) -> list[list[str]]:
    """The commands that make would run."""
    command = ["make", "--no-print-directory", "-n", "-f", str(MAKEFILE), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    lines = done.stdout.replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines]


def parsed(words: list[str]) -> tuple[str, object]:
    """The verb, and what its parser makes of the options; SystemExit if it knows them not."""
    parsers = {"featcache": featcache.cli.parser, "heads": heads.cli.parser}
    return words[1], parsers[words[0]]().parse_args(words[1:])


def of_project(commands: list[list[str]]) -> list[list[str]]:
    """Only those of featcache and heads, without what starts them on several GPUs."""
    found = []
    for words in commands:
        if words[0] == "torchrun":
            assert words[1:5] == ["--standalone", "--nproc-per-node", "8", "-m"]
            words = words[words.index("--") + 1 :]
        if words[0] in ("featcache", "heads"):
            found.append(words)
    return found


# ------------------------------------------------------------------------ the commands


def test_the_recipe_is_of_the_six_networks() -> None:
    commands = of_project(planned("submission"))
    trained = [words[words.index("--arch") + 1] for words in commands if words[1] == "train"]
    assert trained == list(FACTS)
    assert list(hours.micro_batches()) == trained


@pytest.mark.parametrize("gpus", ["1", "8"])
def test_every_command_is_one_that_the_command_lines_know(gpus: str) -> None:
    verbs = []
    for words in of_project(planned("submission", "report", f"GPUS={gpus}")):
        verb, arguments = parsed(words)
        verbs.append(verb)
        if verb == "train":
            config = from_arguments(TrainingConfig, arguments)
            assert config.batch_size % (config.micro_batch * int(gpus)) == 0
        if verb == "concat":
            assert len(from_arguments(ConcatConfig, arguments, caches=arguments.caches).caches) == 6
        if verb == "extract":
            from_arguments(ExtractionConfig, arguments)
    counts = {verb: verbs.count(verb) for verb in verbs}
    assert counts == {
        "train": 6, "extract": 18, "concat": 3, "fit": 14, "adapt": 7, "blend": 1, "predict": 1,
        "report": 1,
    }  # fmt: skip


def test_one_network_is_not_put_beside_itself() -> None:
    verbs = [words[1] for words in of_project(planned("submission", "NETWORKS=resnet101"))]
    assert "concat" not in verbs
    assert verbs.count("fit") == 2


@pytest.mark.parametrize("arch", FACTS)
def test_one_command_makes_all_of_a_network(arch: str) -> None:
    verbs = [words[1] for words in of_project(planned(arch))]
    assert sorted(verbs) == sorted(["train", *["extract"] * 3, "fit", "fit", "adapt"])


def test_another_list_of_networks_makes_all_anew(tmp_path: Path) -> None:
    def concatenated(networks: str) -> list[list[str]]:
        words = [f"{tmp_path}/caches/stage_1/all.h5", f"OUT={tmp_path}", f"NETWORKS={networks}"]
        stamp = ["make", "-f", str(MAKEFILE), f"{tmp_path}/networks", *words[1:]]
        subprocess.run(stamp, check=True, cwd=ROOT, capture_output=True)
        return [words for words in of_project(planned(*words)) if words[1] == "concat"]

    folder = tmp_path / "caches" / "stage_1"
    folder.mkdir(parents=True)
    for name in ("a", "b", "c"):
        (tmp_path / "trained").mkdir(exist_ok=True)
        (tmp_path / "trained" / name).touch()
        (folder / f"{name}.h5").touch()
    assert len(concatenated("a b")[0]) == 6
    (folder / "all.h5").touch()
    assert concatenated("a b") == []
    (again,) = concatenated("a b c")
    assert [Path(word).stem for word in again[2:5]] == ["a", "b", "c"]
    assert not (folder / "all.h5").exists()


# --------------------------------------------------------- a small imitation of the challenge


TINY = {
    "NETWORKS": "test_resnet test_efficientnet",
    "HELD_OUT": "16",
    "EPOCHS": "2",
    "BATCH": "16",
    "MICRO": "8",
    "VIEWS": "1",
    "WORKERS": "0",
    "TRAIN_OPTIONS": "--image-size 32 --warmup-steps 2 --lr 0.01 --threads 1 --device cpu",
    "EXTRACT_OPTIONS": "--threads 1 --device cpu",
    "FIT_OPTIONS": "--cv 2 --dropout 0.1,0.5",
}


def imitate(root: Path) -> None:
    """Folders and files with the names, headers and traits of the challenge's downloads."""
    train = {f"{k:016x}": labels for k, labels in enumerate(images(root / "train", 80, 0))}
    stage_1 = {f"{k:024x}": labels for k, labels in enumerate(images(root / "stage_1", 48, 1))}
    images(root / "stage_2", 20, 2)
    for folder, length in (("train", 16), ("stage_1", 24), ("stage_2", 24)):
        named = root / {"train": "train", "stage_1": "stage_1_test_images"}.get(
            folder, "stage_2_images"
        )
        named.mkdir()
        for k, file in enumerate(sorted((root / f"{folder}_drawn" / "images").iterdir())):
            file.rename(named / f"{k:0{length}x}.png")
    table = ["ImageID", "Source", "LabelName", "Confidence"]
    human = [[i, "verification", label, 1] for i, labels in train.items() for label in labels]
    write(root / "train_human_labels.csv", table, [*human, ["f" * 16, "verification", "/m/red", 1]])
    machine = [[i, "machine", "/m/white", 0.7] for i in list(train)[::9]]
    write(root / "train_machine_labels.csv", table, [*machine, [f"{1:016x}", "machine", "/m/x", 1]])
    names = sorted({label for labels in train.values() for label in labels})
    write(root / "classes-trainable.csv", ["label_code"], [[name] for name in names])
    described = [[name, name.removeprefix("/m/")] for name in (*names, "/m/x")]
    write(root / "class-descriptions.csv", ["label_code", "description"], described)
    tuning = [[i, " ".join(labels)] for i, labels in list(stage_1.items())[:40] if labels]
    write(root / "tuning_labels.csv", None, [*tuning, ["e" * 24, "/m/red"]])


def images(folder: Path, n: int, seed: int) -> list[list[str]]:
    """Drawn below FOLDER_drawn/images; the labels of each, with at least one."""
    found = tiny.make_data(folder.with_name(f"{folder.name}_drawn"), n, seed)
    return [[f"/m/{colour}" for colour in labels] for labels in found.values()]


def write(path: Path, header: list[str] | None, rows: list[list[object]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([*([] if header is None else [header]), *rows])


def make(*words: str) -> subprocess.CompletedProcess[str]:
    python = shlex.quote(sys.executable)
    command = [
        "make", "--no-print-directory", "-f", str(MAKEFILE), *words,
        *(f"{name}={value}" for name, value in TINY.items()),
        f"FEATCACHE={python} -m featcache", f"HEADS={python} -m heads",
        f"CONCAT={python} -m featcache concat",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment
    )


def test_a_training_that_was_stopped_is_not_taken_for_a_finished_one(tmp_path: Path) -> None:
    """SIGTERM ends a training with a checkpoint and status 0; `true` does no less."""
    out = tmp_path / "work"
    command = ["make", "-f", str(MAKEFILE), f"{out}/trained/resnet101", f"OUT={out}"]
    done = subprocess.run(
        [*command, "FEATCACHE=true"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode != 0
    assert "the same command goes on" in done.stdout
    assert not (out / "trained" / "resnet101").exists()


@pytest.mark.slow
def test_from_the_downloads_to_a_submission(tmp_path: Path) -> None:
    data, out = tmp_path / "challenge", tmp_path / "work"
    data.mkdir()
    imitate(data)
    where = [f"DATA={data}", f"OUT={out}"]
    done = make("submission", *where)
    assert done.returncode == 0, done.stderr
    with (out / "submission.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image_id"] for row in rows] == [f"{k:024x}" for k in range(20)]
    predicted = {label for row in rows for label in row["labels"].split()}
    assert predicted
    assert predicted <= {"/m/blue", "/m/green", "/m/red", "/m/white"}
    assert (out / "runs" / "test_resnet" / "missing_images.txt").read_text().split() == ["f" * 16]
    again = make("submission", "test_resnet", *where)
    assert again.returncode == 0
    assert "featcache" not in again.stdout  # nothing is made twice


# --------------------------------------------------------------------------- what it takes


def cost(device: str = "cpu") -> hours.Cost:
    return hours.Cost("resnet101", device, 50e6, 40e9, 100e6, 0.1e9, 2.0)


def test_hours_follow_from_images_and_rate() -> None:
    images = 1_643_042 + 100_000 / 3
    assert hours.hours_an_epoch(images / 3600) == pytest.approx(1)
    assert hours.hours_of_extraction(1000.0, 2) == pytest.approx(232_229 / 3.6e6)


def test_what_a_gpu_was_measured_to_do_goes_before_an_assumption() -> None:
    assert cost().rate_on_gpu(100.0) == pytest.approx(2500)
    assert cost("NVIDIA A10").rate_on_gpu(100.0) == 2.0
    hours_of_an_epoch = f"{hours.hours_an_epoch(5.0):.2g}"
    assert hours_of_an_epoch in hours.table([cost()], rate=5.0)


def test_memory_is_state_copies_and_activations() -> None:
    assert cost().memory(128) == pytest.approx(16 * 50e6 + 0.1e9 + 128 * 100e6)


def test_what_the_recipe_gives_to_a_gpu_of_24_gb_fits() -> None:
    costs = hours.read_costs()
    assert [cost.network for cost in costs] == list(FACTS)
    for cost in costs:
        assert cost.memory(hours.micro_batches()[cost.network]) < 22e9
