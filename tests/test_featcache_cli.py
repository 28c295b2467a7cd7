"""The command ``featcache``: statuses, one-line errors, and what its verbs print."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import featcache
from featcache import FeatureCache
from featcache.cli import main
from featcache.settings import ExtractionConfig, ImportConfig, TrainingConfig
from tests import tiny

Settings = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    tiny.make_data(root, 40)
    return root


@pytest.fixture(scope="module")
def trained(data: Path) -> Path:
    """The folder of a run, made by the command."""
    options = tiny.basic_training(data, data / "run") | {"epochs": 1}
    assert main(["train", *tiny.options(**options)]) == 0
    return data / "run"


@pytest.fixture(scope="module")
def extracted(trained: Path, data: Path) -> Path:
    """A cache, made by the command."""
    assert main(["extract", *tiny.options(**extraction(trained, data, data / "x.h5"))]) == 0
    return data / "x.h5"


def extraction(run: Path, data: Path, out: Path) -> dict[str, Any]:
    return {
        "run": str(run),
        "images": str(data / "images"),
        "labels": [str(data / "labels.csv")],
        "out": str(out),
        "views": "tta",
        "device": "cpu",
        "workers": 0,
        "threads": 1,
    }


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that wrong use gives."""
    capsys.readouterr()
    try:
        status = main(words)
    except SystemExit as end:  # argparse
        status = int(str(end.code))
    assert status == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("featcache")
    return line


# ------------------------------------------------------------------------------- help


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("train", ["--" + f.name.replace("_", "-") for f in fields(TrainingConfig)]),
        ("import", ["--" + f.name.replace("_", "-") for f in fields(ImportConfig)]),
        ("extract", ["--" + f.name.replace("_", "-") for f in fields(ExtractionConfig)]),
        ("info", ["CACHE.h5"]),
        ("verify", ["CACHE.h5", "status 1"]),
        ("merge", ["PART.h5", "--out", "--mixed", "--overwrite"]),
    ],
)
def test_help_names_every_option(
    capsys: pytest.CaptureFixture[str], verb: str, words: list[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for word in [*words, "--debug"]:
        assert word in text
    # An option without an explanation would be followed by the next one at once.
    assert "(default: None)" not in text
    assert "(default: )" not in text


@pytest.mark.parametrize("verb", ["train", "extract"])
def test_help_says_what_a_label_file_is(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for part in ("image_id,labels (class ids separated by spaces)", "LabelName,Confidence"):
        assert part in text
    assert "an id is the file's name without its ending" in text


@pytest.mark.parametrize("verb", ["train", "import"])
def test_help_says_what_a_list_of_classes_is(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Its header is either of these two, and no other with such a column."""
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    assert "a file label_code,description or label_code" in " ".join(
        capsys.readouterr().out.split()
    )


def test_help_of_the_whole_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for flag, words in [
        ("--help", ["train", "import", "extract", "info", "verify", "merge", "examples:"]),
        ("--version", [featcache.__version__]),
    ]:
        with pytest.raises(SystemExit) as end:
            main([flag])
        assert end.value.code == 0
        text = capsys.readouterr().out
        assert all(word in text for word in words)


def test_the_flags_shown_in_the_help_are_those_of_the_contract() -> None:
    """Names that scripts rely on."""
    training = {f.name for f in fields(TrainingConfig)}
    assert training >= {
        "images", "labels", "arch", "out", "classes", "validation", "image_size", "epochs",
        "batch_size", "device", "seed", "overwrite",
    }  # fmt: skip
    names = {f.name for f in fields(ExtractionConfig)}
    assert names >= {"run", "images", "out", "labels", "ids", "views", "overwrite"}
    assert {f.name for f in fields(ImportConfig)} >= {"arch", "weights", "classes", "out"}


# ------------------------------------------------------------------------- wrong use


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "required: VERB"),
        (["prune"], "invalid choice: 'prune'"),
        (["train"], "required: --images, --labels, --arch, --out"),
        (["extract", "--run", "r"], "required: --images, --out"),
        (["import", "--arch", "resnet18"], "required: --weights, --classes, --out"),
        (["import", "--interpolation", "area"], "--interpolation: invalid choice: 'area'"),
        (["train", "--epochs", "many"], "--epochs: invalid int value: 'many'"),
        (["train", "--schedule", "step"], "--schedule: invalid choice: 'step'"),
        (["info"], "required: CACHE.h5"),
        (["info", "x.h5", "--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_wrong_words_are_one_line(
    capsys: pytest.CaptureFixture[str], words: list[str], complaint: str
) -> None:
    line = refusal(capsys, *words)
    assert complaint in line
    assert "--help" in line


WRONG_TRAINING: list[tuple[dict[str, Any], list[str]]] = [
    ({"images": "nowhere"}, ["nowhere: no such directory", "--images"]),
    ({"images": "empty"}, ["empty: no image files", ".png"]),
    ({"images": "others"}, ["others: none of the 40 labelled images", "'i000'", "named by their"]),
    ({"labels": ["gone.csv"]}, ["gone.csv: no such file", "check"]),
    ({"labels": ["header.csv"]}, ["header.csv, line 1", "'name,kind'", "'image_id,labels'"]),
    ({"labels": ["row.csv"]}, ["row.csv, line 3", "expected 2 fields"]),
    ({"classes": "gone.csv"}, ["gone.csv: no such file"]),
    ({"classes": "header.csv"}, ["header.csv, line 1", "label_code"]),
    ({"descriptions": "header.csv"}, ["header.csv, line 1", "label_code,description"]),
    ({"arch": "resnet51"}, ["'resnet51'", "did you mean", "resnet50", "package.module:factory"]),
    ({"arch": "nothing.like:it"}, ["'nothing.like:it'", "cannot import 'nothing"]),
    ({"arch": "tests.tiny:nothing"}, ["tests.tiny has no function 'nothing'"]),
    ({"arch": "tests.tiny:SIDE"}, ["tests.tiny has no function 'SIDE'"]),
    ({"arch": "tests.tiny:write_lists"}, ["'tests.tiny:write_lists'", "TypeError"]),
    ({"model_kwargs": ["width"]}, ["--model-kwargs 'width'", "keyword=value"]),
    ({"model_kwargs": ["depth=3"]}, ["'tests.tiny:network'", "depth"]),
    ({"device": "tpu0"}, ["--device 'tpu0'", "auto, cpu or cuda"]),
    ({"validation": "some"}, ["--validation 'some'", "file of ids"]),
    ({"validation": "0"}, ["--validation 0", "at least one"]),
    ({"validation": "40"}, ["--validation 40", "40 of 40", "at least one"]),
    ({"validation": "1.5"}, ["--validation 1.5", "a share below 1"]),
    ({"validation": "-3"}, ["--validation -3", "a whole number"]),
    ({"validation": "other-ids.txt"}, ["other-ids.txt: none of its ids"]),
    ({"augment": "photos"}, ["'photos'", "photo-strong"]),
    ({"augment": "tests.tiny:gone"}, ["tests.tiny has no function 'gone'"]),
    ({"optimizer": "gradient"}, ["--optimizer 'gradient'"]),
    ({"image_size": 0}, ["--image-size 0", "at least 1"]),
    ({"out": "labels.csv"}, ["labels.csv"]),
    ({"out": "others"}, ["others: not empty and not a run", "another --out"]),
]


@pytest.fixture
def here(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with files of several faults."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "others").mkdir()
    tiny.draw([], np.random.default_rng(0)).save(tmp_path / "others" / "other.png")
    shutil.copy(data / "labels.csv", tmp_path)
    (tmp_path / "header.csv").write_text("name,kind\na,b\n")
    (tmp_path / "row.csv").write_text("image_id,labels\ni000,red\ni001,red,blue\n")
    (tmp_path / "other-ids.txt").write_text("other\n")
    return tmp_path


@pytest.mark.parametrize(("changes", "words"), WRONG_TRAINING, ids=str)
def test_wrong_training_is_refused_in_one_line(
    data: Path,
    here: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    words: list[str],
) -> None:
    options = tiny.basic_training(data, here / "run") | changes
    line = refusal(capsys, "train", *tiny.options(**options))
    for word in words:
        assert word in line
    assert not (here / "run").exists()


WRONG_EXTRACTION: list[tuple[dict[str, Any], list[str]]] = [
    ({"run": "nowhere"}, ["nowhere: no config.json there", "featcache train"]),
    ({"run": "labels.csv"}, ["labels.csv: no config.json there"]),
    ({"images": "nowhere"}, ["nowhere: no such directory", "--images"]),
    ({"images": "empty"}, ["empty: no image files"]),
    ({"ids": "gone.txt"}, ["gone.txt"]),
    ({"ids": "other-ids.txt"}, ["other-ids.txt: none of its 1 ids", "'other'"]),
    ({"labels": ["header.csv"]}, ["header.csv, line 1"]),
    ({"views": "ttaa"}, ["'ttaa'", "eval, tta, strong"]),
    ({"views": "strong", "view_count": 0}, ["--view-count 0", "at least 1"]),
    ({"views": "tta", "view_count": 9}, ["--view-count 9", "--views tta has none; leave it out"]),
    ({"views": "eval", "view_count": 0}, ["--view-count 0", "--views eval has none"]),
    ({"views": "tests.tiny:draw"}, ["'tests.tiny:draw': TypeError: draw() takes"]),
    ({"batch_size": 0}, ["--batch-size 0", "at least 1"]),
    ({"device": "cuda:x"}, ["--device 'cuda:x'"]),
    ({"out": "empty"}, ["empty: is a folder"]),
    ({"out": "labels.csv"}, ["labels.csv: exists already", "--overwrite"]),
    ({"out": "labels.csv/x.h5"}, ["labels.csv"]),
]


@pytest.mark.parametrize(("changes", "words"), WRONG_EXTRACTION, ids=str)
def test_wrong_extraction_is_refused_in_one_line(
    trained: Path,
    data: Path,
    here: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    words: list[str],
) -> None:
    options = extraction(trained, data, here / "y.h5") | changes
    line = refusal(capsys, "extract", *tiny.options(**options))
    for word in words:
        assert word in line
    assert not (here / "y.h5").exists()


@pytest.mark.parametrize("verb", ["train", "extract"])
def test_cuda_where_there_is_none(
    trained: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "out"
    options = (
        tiny.basic_training(data, out) if verb == "train" else extraction(trained, data, out)
    ) | {"device": "cuda"}
    line = refusal(capsys, verb, *tiny.options(**options))
    assert "--device cuda: torch sees 0 CUDA devices" in line
    assert "--device cpu" in line


def test_an_augmentation_that_makes_something_else(
    trained: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Said in one line from a worker process as well."""
    monkeypatch.setattr(tiny, "shaken", lambda image, size, rng: image.resize((5, 5)))
    for workers in (0, 1):
        options = tiny.basic_training(data, tmp_path / "run") | {"workers": workers}
        line = refusal(capsys, "train", *tiny.options(**options))
        assert "'tests.tiny:shaken' made an image of 5 x 5 pixels" in line
        options = extraction(trained, data, tmp_path / "y.h5") | {"views": "tests.tiny:shaken"}
        line = refusal(capsys, "extract", *tiny.options(**options | {"workers": workers}))
        assert "must return 16 x 16" in line


def test_debug_shows_where(here: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = tiny.basic_training(data, here / "run") | {"labels": ["gone.csv"]}
    assert main(["train", *tiny.options(**options), "--debug"]) == 2
    error = capsys.readouterr().err
    assert "Traceback (most recent call last)" in error
    assert error.splitlines()[-1].startswith("featcache: gone.csv: no such file")


# ------------------------------------------------------------------- what verbs print


def test_train_and_extract_say_what_they_do(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = tiny.basic_training(data, tmp_path / "run") | {"epochs": 2, "warmup_steps": 2}
    assert main(["train", *tiny.options(**options)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    first, *epochs, last, following = printed.out.splitlines()
    assert "24 training and 16 validation images, 4 classes, tests.tiny:network at 16 px" in first
    assert ["epoch 1/2" in epochs[0], "epoch 2/2" in epochs[1], len(epochs)] == [True, True, 2]
    assert last.startswith(f"{tmp_path / 'run'}: best validation F2 0.")
    assert following.startswith(f"next: featcache extract --run {tmp_path / 'run'} ")
    options = extraction(tmp_path / "run", data, tmp_path / "x.h5")
    assert main(["extract", *tiny.options(**options)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "40 of 40 images have labels" in printed.out
    assert "40 / 40 images" in printed.out
    assert main(["info", str(tmp_path / "x.h5")]) == 0
    assert printed.out.endswith(capsys.readouterr().out)


def test_info_is_one_screen(extracted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(extracted)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert 5 < len(lines) <= 40
    assert all(len(line) <= 100 or str(extracted) in line for line in lines)
    text = "\n".join(lines)
    for word in [
        str(extracted),
        "tests.tiny:network",
        "40",
        "7 views (eval, flip, ",
        "of 16, float16",
        "4 classes",
    ]:
        assert word in text


def test_verify_names_the_damaged_rows(
    extracted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "damaged.h5"
    shutil.copy(extracted, damaged)
    features = FeatureCache(damaged).features
    whole = damaged.read_bytes()
    at = whole.index(features.tobytes()) + features[:17].nbytes
    damaged.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    assert main(["verify", str(extracted)]) == 0
    assert "every block has its hash" in capsys.readouterr().out
    assert main(["verify", str(extracted), str(damaged)]) == 1
    good, bad = capsys.readouterr().out.splitlines()
    assert str(extracted) in good
    assert bad.startswith(f"{damaged}: damaged in rows 0 to 39")
    assert "--overwrite" in bad


@pytest.mark.parametrize("verb", ["info", "verify"])
def test_one_cache_of_several_that_is_none_holds_up_no_other(
    here: Path, extracted: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    (here / "cut.h5").write_bytes(extracted.read_bytes()[:5000])
    assert main([verb, "cut.h5", str(extracted), "gone.h5"]) == 1
    out, err = capsys.readouterr()
    assert str(extracted) in out
    first, second = err.splitlines()
    assert first.startswith("featcache: cut.h5: not a readable cache")
    assert second.startswith("featcache: gone.h5: no such file")
    assert main([verb, "cut.h5", "gone.h5"]) == 2


@pytest.mark.parametrize("verb", ["info", "verify"])
def test_what_is_no_cache_is_refused(
    here: Path, extracted: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    (here / "cut.h5").write_bytes(extracted.read_bytes()[:5000])
    for name in ("gone.h5", "labels.csv", "cut.h5", "empty"):
        assert name in refusal(capsys, verb, name)


# ------------------------------------------------------------------- optional packages


@pytest.mark.parametrize("package", ["torch", "torchvision", "timm", "PIL", "safetensors"])
@pytest.mark.parametrize("verb", ["train", "extract"])
def test_a_missing_package_is_said_with_its_extra(
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
    package: str,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    options = (
        tiny.basic_training(data, tmp_path / "out")
        if verb == "train"
        else extraction(tmp_path, data, tmp_path / "out")
    )
    line = refusal(capsys, verb, *tiny.options(**options))
    assert f"needs {package}," in line
    assert "pip install 'featcache-heads[extract]'" in line


HEAVY = ("torch", "torchvision", "timm", "PIL", "safetensors", "matplotlib")


@pytest.mark.parametrize(
    "statement",
    [
        "import featcache",
        "from featcache import FeatureCache",
        "import heads",
        "import heads; [getattr(heads, name) for name in heads.__all__]",
        "import featcache.cli; featcache.cli.parser()",
        "import heads.cli; heads.cli.parser()",
    ],
)
def test_imports_leave_heavy_packages_alone(statement: str) -> None:
    code = f"{statement}; import sys; print(*[m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tiny.ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


def test_caches_are_read_without_any_of_them(extracted: Path) -> None:
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({HEAVY}))\n"
        "from featcache import FeatureCache; from featcache.cli import main\n"
        "cache = FeatureCache(sys.argv[1]); cache.training(); cache.x('flip')\n"
        "sys.exit(main(['info', sys.argv[1]]) + main(['verify', sys.argv[1]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(extracted)],
        cwd=tiny.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_python_m_featcache() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "featcache", "info", "gone.h5"],
        cwd=tiny.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("featcache: gone.h5:")
