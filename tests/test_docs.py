"""What the documents say: files and keys that they name are there, their commands are right, what
needs no GPU and no data is run, and figures are those of the files that they come from.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from contextlib import suppress
from pathlib import Path

import pytest
import run_folders
import torch
import yaml
from documents import (
    BY_STRANGER,
    INLINE,
    PAGES,
    ROOT,
    Block,
    MissingWordError,
    blocks,
    check,
    name_of,
    words_of,
)

from video_mae import (
    ClassifierConfig,
    ModelConfig,
    VideoClassifier,
    VideoMAE,
    save_model_folder,
)
from video_mae.cli import STAGES, main, schema_of
from video_mae.config.schema import knobs_of

PATH = re.compile(
    r"`((?:video_mae|kernels|tests|configs|docs|scripts|examples|experiments|benchmarks)/[\w./*-]*)`"
)
ALL = [block for page in PAGES for block in blocks(page)]
LANGUAGES = {"sh", "python", "yaml", "json", "text", "math"}
# what else stands in blocks of a shell
PROGRAMS = re.compile(
    r"\w+=.*|awk|cp|deepspeed|docker|eval|export|make|pip|printf|python|rm|sbatch|scripts/gpu_run.sh|srun"
    r"|torchrun|until|video-mae|\.venv/bin/python"
)
MODEL = ModelConfig(
    num_frames=4,
    height=32,
    width=32,
    patch_size=8,
    embed_dim=32,
    depth=2,
    num_heads=2,
    decoder_embed_dim=16,
    decoder_depth=1,
    decoder_num_heads=2,
)
# text of a page -> whether it is a key of some stage; names of files and of Python look alike
KEY = re.compile(
    r"`((?:mask|objective|data|optim|engine|journal|probe|classifier|validation|augment|lora)"
    r"\.\w+)(?:=[^`]*)?`"
)
FILES = ("md", "jsonl", "json", "txt", "csv", "py", "yaml", "onnx")


RUN_HERE = [block for block in ALL if not block.needs and block.page != BY_STRANGER]
PYTHON = [block for block in RUN_HERE if block.language == "python"]


def named(block: Block) -> str:
    return f"{block.page}:{block.line}"


def test_the_way_of_a_clip_names_each_file_once_and_few():
    rows = re.findall(
        r"^\| \d+ \| `([\w/.]+)`", (ROOT / "docs" / "way_of_a_clip.md").read_text(), re.M
    )
    assert 10 < len(rows) <= 25
    assert len(set(rows)) == len(rows)
    for row in rows:
        assert (ROOT / row).is_file(), row


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_a_page_names_are_there(page):
    text = page.read_text()
    for name in PATH.findall(text):
        assert list(ROOT.glob(name.rstrip("/"))), name
    for target in re.findall(r"\]\((?!https?:|#|\.\.\.)([^)#\s]+)", text):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_keys_that_a_page_names_exist(page):
    known = {key for stage in STAGES.values() for key in knobs_of(schema_of(stage))}
    for key in KEY.findall(page.read_text()):
        if key.rpartition(".")[2] not in FILES:
            assert key in known, key


def test_every_page_is_in_the_navigation_of_the_site():
    text = re.sub(r"!!\S+", "", (ROOT / "mkdocs.yml").read_text())
    listed = re.findall(r": (\S+\.md)'?$", yaml.safe_dump(yaml.safe_load(text)["nav"]), re.M)
    assert len(set(listed)) == len(listed)
    assert {name_of(page) for page in PAGES} <= set(listed)
    for name in listed:
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("extra", ["docs", "serve"])
def test_what_an_extra_brings_is_pinned(extra: str):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = (ROOT / "constraints.txt").read_text().lower()
    for requirement in project["optional-dependencies"][extra]:
        name = re.split(r"[\[>]", requirement)[0]
        assert re.search(rf"^{name}==", pinned, re.M), name


@pytest.mark.parametrize("block", ALL, ids=named)
def test_a_block_is_of_a_known_kind_and_its_commands_are_right(block: Block):
    assert block.language in LANGUAGES
    if block.language == "python":
        compile(block.text, block.page, "exec")
        for line in re.findall(r"^from video_mae[\w.]* import [^(\n]+$", block.text, re.M):
            exec(line, {})
    if block.language == "json":
        json.loads("{" + block.text + "}")
    if block.language != "sh":
        return
    makefile = (ROOT / "Makefile").read_text()
    for line in block.lines:
        commands = words_of(line)
        program, *rest = shlex.split(line.partition(" # ")[0])
        assert PROGRAMS.fullmatch(program), line
        for words in commands:
            check(words)
        if program == "make":
            assert re.search(rf"^{rest[0]}:", makefile, re.M), line
        if program in ("python", ".venv/bin/python") and rest[0] != "-m":
            assert (ROOT / rest[0]).is_file(), line
        assert block.needs or program == "video-mae", line


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_within_a_text_are_right(page):
    if page.name == "CHANGELOG.md":  # which tells of what was
        return
    for command in INLINE.findall(page.read_text()):
        words = re.sub(r"\s+", " ", command).split(" ")[1:]
        if any("..." in word for word in words) or words[0].isupper():
            continue
        assert words[0] in {*STAGES, "bench"} or words[0].startswith("-"), command
        with suppress(MissingWordError):
            check(words)


def test_the_first_screen_of_the_readme():
    """One sentence, one picture, two commands, one table, whose figures are those of the files."""
    first = (ROOT / "README.md").read_text().partition("\n## ")[0]
    assert first.count("\n![") == 1
    commands = next(blocks(ROOT / "README.md")).lines
    assert len(commands) == 2
    rows = re.findall(r"^\| (.*?) \| (.*) \| .*?\]\((.*?)\) \|$", first, re.M)
    assert len(rows) == first.count("\n|") - 2 >= 4
    for _, figures, place in rows:
        if place[0] == "#":
            continue
        text = (ROOT / place).read_text()
        found = re.findall(r"\*\*(.*?)\*\*", figures)
        assert found
        for figure in found:
            assert re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d.])", text), (figure, place)


@pytest.fixture
def workshop(
    demo_folder: Path,
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """What the pages take for granted: models, runs, videos, lists, and the recipes."""
    folder = tmp_path / "here"
    (folder / "data").mkdir(parents=True)
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "data" / "demo").symlink_to(demo_folder)
    (folder / "videos").symlink_to(demo_folder / "train")
    videos = [line.split()[0] for line in (demo_folder / "train.txt").read_text().splitlines()]
    for name in ("one", "two", "dog", "cat", "clip"):
        (folder / f"{name}.mp4").symlink_to(demo_folder / videos[0])
    lines = [f"data/demo/{video} {number % 3}" for number, video in enumerate(videos)]
    (folder / "list.txt").write_text("\n".join(lines) + "\n")
    for number, video in enumerate(videos):
        (folder / f"v_Archery_g{number // 4:02}_c{number % 4:02}.mp4").symlink_to(
            demo_folder / video
        )
    grouped = sorted(path.name for path in folder.glob("v_*.mp4"))
    (folder / "ucf101.txt").write_text("".join(f"{name} 0\n" for name in grouped))
    rows = [f"data/demo/{video},{place % 3},{place % 4}" for place, video in enumerate(videos)]
    (folder / "list.csv").write_text("\n".join(["path,label,person", *rows]) + "\n")
    for run, model in models.items():
        (folder / "runs" / run).mkdir(parents=True)
        (folder / "runs" / run / "model").symlink_to(model)
    for run in ("pixels", "features", "scratch"):
        shutil.copytree(models["pretrain"].parent / "run", folder / "runs" / run)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    head = ClassifierConfig(num_classes=6, stride=2, head_init_scale=1.0)
    save_model_folder(folder / "pretrain", VideoMAE(MODEL))
    save_model_folder(folder / "finetune", VideoClassifier(MODEL, head))
    run_folders.pretraining(folder / "run")
    return {name: folder / name for name in ("pretrain", "finetune")}


@pytest.mark.slow
@pytest.mark.usefixtures("workshop", "quiet_process")
@pytest.mark.parametrize(
    "block", [block for block in RUN_HERE if block.language == "sh"], ids=named
)
def test_commands_of_a_page_run(block: Block, monkeypatch: pytest.MonkeyPatch):
    for line in block.lines:
        for words in words_of(line):
            keys = knobs_of(schema_of(STAGES[words[0]])) if words and words[0] in STAGES else {}
            # decoding processes of their own would take longer to start than all of it
            words += [f"{key}=0" for key in keys if key.rpartition(".")[2] == "num_workers"]
            with pytest.raises(SystemExit) as ended:
                main(words)
            assert not ended.value.code, line


@pytest.mark.slow
@pytest.mark.usefixtures("workshop", "quiet_process")
@pytest.mark.parametrize("page", sorted({block.page for block in PYTHON}))
def test_python_of_a_page_runs(page: str):
    names: dict[str, object] = {}
    for block in PYTHON:
        if block.page == page:
            # lines of a traceback are those of the page
            exec(compile("\n" * block.line + block.text, page, "exec"), names)


def block_with(text: str, page: str = "docs/benchmarks_step_by_step.md") -> Block:
    (found,) = (block for block in ALL if block.page == page and text in block.text)
    return found


def test_the_official_lists_become_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("ucfTrainTestlist", "data/ucf101", "data/ssv2", "labels"):
        os.makedirs(folder)
    official = {
        "classInd.txt": "1 ApplyEyeMakeup\n2 Archery\n",
        "trainlist01.txt": "Archery/v_Archery_g08_c01.avi 2\n",
        "testlist01.txt": "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi\nArchery/a.avi\n",
    }
    for name, text in official.items():
        Path("ucfTrainTestlist", name).write_text(text)
    subprocess.run(block_with("awk").text, shell=True, check=True)
    assert Path("data/ucf101/train_split1.txt").read_text() == "Archery/v_Archery_g08_c01.avi 1\n"
    assert [
        line.split()[1] for line in Path("data/ucf101/test_split1.txt").read_text().splitlines()
    ] == ["0", "1"]
    assert Path("data/ucf101/classes.txt").read_text() == "ApplyEyeMakeup\nArchery\n"

    Path("labels/labels.json").write_text('{"Closing something": "1", "Bending something": "0"}')
    entry = {"id": "74225", "template": "Closing [something]"}
    for part in ("train", "validation"):
        Path(f"labels/{part}.json").write_text(json.dumps([entry]))
    exec(block_with("import json").text, {})
    assert Path("data/ssv2/val.txt").read_text() == "74225.webm 1\n"
    assert Path("data/ssv2/classes.txt").read_text() == "Bending something\nClosing something\n"
