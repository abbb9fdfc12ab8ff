"""What a person meets in a console: the page of stages, help, mistakes, a dry run, progress."""

import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml

from video_mae import PretrainConfig
from video_mae.cli import PURPOSES, STAGES, main, schema_of
from video_mae.config import OptimConfig
from video_mae.config.data import ReadConfig, SourceConfig
from video_mae.data.videos import read_annotations
from video_mae.tools.pack import read_items
from video_mae.training.environment import check_devices
from video_mae.training.optim import make_schedule

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "configs").glob("*/*.yaml"))
WITHOUT_TORCH = """
import sys
from video_mae.cli import main
for words in {commands!r}:
    try:
        main(words)
    except SystemExit:
        pass
print("loaded:", sorted({{"torch", "deepspeed", "triton"}} & sys.modules.keys()))
"""
CHECK = """
from video_mae.config.data import ReadConfig
from video_mae.training.environment import check_devices
try:
    check_devices("precision", "bf16", ReadConfig())
except ValueError as error:
    print(error)
"""
FOUR_OF_TEN = """
import time
from video_mae import progress_bar
progress_bar.LINE_SECONDS = {seconds}
with progress_bar.ProgressBar(10) as bar:
    for _ in range(4):
        time.sleep(0.12)
        bar.update()
"""


def status(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_of:
        main(arguments)
    return int(exit_of.value.code or 0)


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """said("pretrain", ...): the one line that a mistake is told in."""

    def line(*arguments: str) -> str:
        assert status(*arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        return error

    return line


def test_every_stage_has_a_purpose_on_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    named = [name for names in PURPOSES.values() for name in names.split(", ")]
    assert sorted([*named, "bench"]) == sorted(STAGES)  # bench alone is `bench kernels`
    assert status() == 0
    page = capsys.readouterr().out
    for name in named:
        assert re.search(rf"^  {name}  ", page, re.MULTILINE), name
    assert max(map(len, page.splitlines())) <= 100
    assert status("--help") == 0
    assert capsys.readouterr().out == page


def test_what_needs_no_torch_does_not_load_it(demo_folder: Path, tmp_path: Path) -> None:
    """So help, mistakes and the keys in which a run differs are told at once."""
    run, config = tmp_path / "run", tmp_path / "config.yaml"
    run.mkdir()
    from video_mae import save_config

    save_config(PretrainConfig(output=str(run)), run / "config.yaml")
    config.write_text(f"output: {run}\n")
    commands = [
        [],
        ["--version"],
        ["recipes"],
        *([*name.split(), "--help", "all"] for name in STAGES),
        ["finetune", str(config), "optim.stepz=3"],
        ["plan", str(config), "optim.stepz=3"],
        ["pretrain", str(config), "optim.base_lr=7", "mask.ratio=0.5", "seed=3"],
    ]
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH.format(commands=commands)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.endswith("loaded: []\n")
    *_, changed = result.stderr.splitlines()
    assert changed == (
        f"video-mae pretrain: {run}: this run was started with seed = 0, now it is 3; with "
        "optim.base_lr = 0.00015, now it is 7.0; with mask.ratio = 0.9, now it is 0.5; set it "
        "back, or choose another output"
    )


def test_versions_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert status("--version") == 0
    first, *more = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"video-mae \d+\.\d+.*", first)
    assert f"torch {torch.__version__.split('+')[0]}" in "\n".join(more)
    assert "GPU" in more[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretain"], "there is no stage pretain, did you mean pretrain?"),
        (["--foo"], "there is no stage --foo: `video-mae` lists them"),
        (["pretrain"], "CONFIG.yaml is missing"),
        (["predict", "model"], "FOLDER_OR_FILES... is missing"),
        (["pretrain", "x.yaml", "--optim.steps=5"], "a key has no dashes: optim.steps=5"),
        (["demo", "folder", "seed"], "`seed` is not of the form key=value"),
        (["pretrain", "--help", "optm"], "--help: optm is no key and no section; there are: all, "),
    ],
)
def test_a_mistake_in_a_command_is_one_line(
    said: Callable[..., str], arguments: list[str], message: str
) -> None:
    assert message in said(*arguments)


def test_flags_are_keys(tmp_path: Path, said: Callable[..., str]) -> None:
    words = ["list", str(tmp_path / "packed")]
    for given in (["--crf", "99", *words], [*words, "--crf=99"], [*words, "crf=99"]):
        assert "crf: 99 must be" in said("pack", *given)


@pytest.mark.parametrize("name", STAGES)
def test_help_shows_ten_keys_and_all_of_them_where_it_is_asked(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def keys(*more: str) -> list[str]:
        assert status(*name.split(), "--help", *more) == 0
        return re.findall(r"^  ([\w.]+) = ", capsys.readouterr().out, re.MULTILINE)

    everything, first = keys("all"), keys()
    assert len(first) == min(10, len(everything))
    assert set(schema_of(STAGES[name]).first_keys.split()) <= set(first) <= set(everything)
    if any(key.startswith("data.") for key in everything):
        assert keys("data") == [key for key in everything if key.startswith("data.")]
    if everything:
        assert keys(first[-1]) == first[-1:]
        assert status(*name.split(), f"--help={first[0]}") == 0


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("optim: {steps: no}", [], "FILE: optim.steps: False is not a whole number, or null"),
        ("", ["optim.steps=x"], "command line: optim.steps: 'x' is not a whole number, or null"),
        ("optim: {steps: no}", ["seed=1"], "FILE: optim.steps: False is not"),
        ("optim: {steps: no}", ["optim.steps=x"], "command line: optim.steps: 'x' is not"),
        (
            "optim: {min_lr: 0.001, base_lr: 0.01}",
            ["optim.base_lr=1e-9"],
            "command line: optim.min_lr: 0.001 is above optim.base_lr",
        ),
        ("", ["seed"], "command line: override `seed` is not of the form key=value"),
        ("", ["mask.kind=tub"], "mask.kind: 'tub' is not one of tube, random, random_kept, frame"),
        ("", ["data.flip=maybe"], "data.flip: 'maybe' is not true or false"),
        ("", ["mask.ratio=much"], "mask.ratio: 'much' is not a number"),
        ("", ["mask.ratio=null"], "mask.ratio: null is not a number"),
        ("", ["optim.betas=[0.9]"], "optim.betas: [0.9] is not a list like [1, 2]"),
        ("classifier: {num_classes: 3}", [], "unknown key classifier (it is one of `video-mae fi"),
        ("", ["freeze_blocks=3"], "unknown key freeze_blocks (it is one of `video-mae finetune`)"),
        ("seed:\t3\n\toptim: 4", [], "(a tab: write blanks)"),
    ],
)
def test_a_mistake_in_a_value_is_told_in_words_and_where_it_is(
    tmp_path: Path, said: Callable[..., str], text: str, overrides: list[str], message: str
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    line = said("pretrain", str(file), *overrides)
    assert message.replace("FILE", str(file)) in line
    assert ("command line" in line) == (str(file) not in line)


def test_recipes_are_listed_with_what_their_headers_say(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert status("recipes") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line[0] != " "] == [
        path.relative_to(ROOT).as_posix() for path in RECIPES
    ]
    for field in ("Source", "Data", "Expected", "Hardware", "Status"):
        assert sum(line.startswith(f"  {field}: ") for line in lines) == len(RECIPES), field
    assert not any(line.startswith("  Command: ") for line in lines)


def test_a_dry_run_tells_what_would_run_and_writes_nothing(
    tiny_file: Path, tiny_finetune_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = [f"output={run}", "optim.accumulation=2", "--dry-run", "data.clips_per_video=2"]
    assert status("pretrain", str(tiny_file), *words) == 0
    assert status("finetune", str(tiny_finetune_file), *words) == 0
    pretrain, finetune = capsys.readouterr().out.split("nothing was written or begun\n")[:2]
    for text in (pretrain, finetune):
        assert "clips of [4, 32, 32, 3]" in text
        assert f"run folder {run}: 0 of 4 steps are done" in text
        assert "32 videos, 2 clips of each" in text
    assert "8 classes" in finetune
    assert not run.exists()


def test_a_dry_run_finds_what_a_run_would_stumble_over(
    tiny_file: Path, tmp_path: Path, said: Callable[..., str]
) -> None:
    config = yaml.safe_load(tiny_file.read_text())
    (tmp_path / "list.txt").write_text("broken.mp4\n")
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    config["data"]["source"] = str(tmp_path / "list.txt")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    line = said(
        "pretrain", str(tmp_path / "config.yaml"), f"output={tmp_path / 'run'}", "--dry-run"
    )
    assert "cannot be decoded" in line
    assert "broken.mp4" in line


def test_a_dry_run_from_scratch_leaves_the_folder_where_it_is(
    tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from video_mae import load_config, save_config

    run = tmp_path / "run"
    (run / "checkpoints" / "step_00000002").mkdir(parents=True)
    save_config(load_config(tiny_file, [f"output={run}", "seed=5"]), run / "config.yaml")
    words = [str(tiny_file), f"output={run}", "--from-scratch", "--dry-run"]
    assert status("pretrain", *words) == 0
    assert "0 of 4 steps are done" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_decoder_on_a_gpu_that_is_not_there_is_refused(
    tiny_file: Path, tmp_path: Path, said: Callable[..., str]
) -> None:
    keys = ["data.decoder=torchcodec", "data.decoder_device=cuda"]
    for words in (
        ["pretrain", str(tiny_file), f"output={tmp_path / 'run'}"],
        ["evaluate", "model", "list"],
        ["extract", "model", "list", "out"],
    ):
        assert "data.decoder_device: cuda needs a GPU" in said(*words, *keys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_launcher_that_is_asked_for_gpus_that_are_not_there_is_refused() -> None:
    """The launcher here starts a process that starts a rank, as that of DeepSpeed does."""
    start = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    inner = start.replace("sys.argv[1]", repr(CHECK))
    command = [sys.executable, "-c", start, inner, "--num_gpus", "8"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("--num_gpus: there is no GPU here")
    check_devices("precision", "bf16", ReadConfig())  # nobody asked for one


def test_lines_that_name_a_file_again_are_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).touch()
    source = tmp_path / "list.txt"
    source.write_text("a.mp4 0\nb.mp4 1\n" * 3)
    told = f"{source}: 4 of its 6 lines name files of earlier ones"
    assert [
        note[: len(told)] for note in read_annotations(SourceConfig(source=str(source))).notes
    ] == [told]
    read_items(str(source), "")
    assert capsys.readouterr().out.startswith(told)
    source.write_text("a.mp4 0\nb.mp4 1\n")
    assert read_annotations(SourceConfig(source=str(source))).notes == ()


def test_a_first_line_that_names_columns_is_told_as_such(tmp_path: Path) -> None:
    source = tmp_path / "list.csv"
    source.write_text("path,label\na.mp4,0\n")
    (tmp_path / "a.mp4").touch()
    assert len(read_annotations(SourceConfig(source=str(source)))) == 1
    with pytest.raises(FileNotFoundError, match=r"names columns, data\.list_format=header"):
        read_annotations(SourceConfig(source=str(source), list_format="label"))


def test_a_step_of_more_videos_than_there_are_is_told() -> None:
    told = "a step takes 64 videos, and there are 21"
    assert told in make_schedule(OptimConfig(micro_batch=64, steps=5), 21, 1, 1)[1]
    assert "there are" not in make_schedule(OptimConfig(micro_batch=21, steps=5), 21, 1, 1)[1]


@pytest.mark.parametrize(
    ("words", "unbuffered"), [("--version", "1"), ("pretrain --help all", ""), ("recipes", "1")]
)
def test_who_has_read_enough_hears_no_more(words: str, unbuffered: str) -> None:
    """As `video-mae ... | head -1`, once head has gone."""
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-m", "video_mae", *words.split()]
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    result = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, text=True, env=env)
    os.close(writes)
    assert (result.returncode, result.stderr) == (128 + signal.SIGPIPE, "")


def test_where_nobody_watches_progress_is_lines_that_tell_when_it_ends() -> None:
    def lines(seconds: float) -> list[str]:
        command = [sys.executable, "-c", FOUR_OF_TEN.format(seconds=seconds)]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        assert result.stdout == ""
        return result.stderr.splitlines()

    assert lines(60) == []
    found = lines(0)
    assert len(found) >= 4
    assert re.search(r"4/10 \[\d\d:\d\d<\d\d:\d\d", found[-1])


@pytest.mark.parametrize("columns", [0, 80])
def test_a_terminal_shows_a_bar_also_where_it_does_not_know_its_size(columns: int) -> None:
    import fcntl
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", columns // 3, columns, 0, 0))
    command = [sys.executable, "-c", FOUR_OF_TEN.format(seconds=60)]
    subprocess.run(command, stderr=theirs, stdout=theirs, check=True)
    os.close(theirs)
    shown = b""
    with suppress(OSError):  # at its end
        while piece := os.read(ours, 10_000):
            shown += piece
    os.close(ours)
    assert b"4/10 [" in shown


def test_a_shell_completes_stages_keys_and_files(tmp_path: Path) -> None:
    (tmp_path / "video-mae").write_text(f'#!/bin/sh\nexec {sys.executable} -m video_mae "$@"\n')
    (tmp_path / "video-mae").chmod(0o755)
    (tmp_path / "a video.mp4").touch()

    def found(*words: str) -> set[str]:
        """What is offered for the last word."""
        ask = (
            'eval "$(video-mae --completion)"; compopt() { :; }; COMP_WORDS=("$@")\n'
            "COMP_CWORD=$(($# - 1)); _video_mae; printf '%s\\n' \"${COMPREPLY[@]}\"\n"
            "complete -p video-mae >&2"
        )
        result = subprocess.run(
            ["bash", "-c", ask, "bash", "video-mae", *words],
            capture_output=True,
            text=True,
            check=True,
            cwd=tmp_path,
            env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        )
        assert "-F _video_mae" in result.stderr
        return set(result.stdout.splitlines())

    assert found("pre") == {"predict", "pretrain"}
    assert found("ben") == {"bench"}
    benchmarks = {name.split()[1] for name in STAGES if name.startswith("bench ")}
    assert benchmarks | {"ops="} <= found("bench", "")
    assert found("bench", "step", "pre") == {"presets=", "precision="}
    assert found("pretrain", "optim.st") == {"optim.steps="}
    # files beside keys; alone they are left to the shell, as where a value begins
    assert {"all_scores=", "a video.mp4"} <= found("evaluate", "a") | found("evaluate", "")
    assert found("predict", "a v") == {""}
    assert found("pretrain", "data.source", "=", "data") == {""}
