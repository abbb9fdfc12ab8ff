"""The command line: STAGE WORD ... key=value ... ; the only argument parser."""

import io
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib import import_module
from multiprocessing import parent_process
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from video_mae.files import FolderError, StorageError, one_line
from video_mae.processes import end_with_launchers

USAGE_ERROR = 2
PATIENCE_SECONDS = 30
CONFIG = "CONFIG.yaml"


class Stage(NamedTuple):
    """A row of the command line.

    `schema` is the dataclass of all keys (or a function of a file that chooses one), in a module
    that needs no library that takes seconds to load. `module`, imported only when it is to work,
    has a function `start(*words, config) -> int | Callable[[], int]`. It raises ValueError or
    FileNotFoundError for a user's mistake, and returns the exit status, or what still has to run
    and returns it. `words` and `flags` are as the help has them. The word CONFIG.yaml is not passed
    on: the keys are read from that file; a stage without the word has --config FILE for it. A flag
    is another way to write a key: --some-key for some_key=true, --some-key VALUE for
    some_key=VALUE. A name may be two words. A last word with dots is a list.
    """

    meaning: str
    module: str
    schema: str
    words: str = ""
    flags: str = ""


BENCH_KERNELS = Stage(
    "measure each kernel against everything else that computes it; or compile all of them without "
    "a GPU",
    "benchmark.kernels",
    "config.bench.KernelBenchConfig",
    "",
    "--baseline FILE --compile-check",
)
STAGES = {
    "pretrain": Stage(
        "pretrain a model; under `deepspeed --module video_mae pretrain ...` on many devices",
        "training.pretrain",
        "config.PretrainConfig",
        CONFIG,
        "--from-scratch --dry-run",
    ),
    "finetune": Stage(
        "train a pretrained model to name actions; under the launcher as well",
        "training.finetune",
        "config.FinetuneConfig",
        CONFIG,
        "--from-scratch --dry-run",
    ),
    "reconstruct": Stage(
        "draw what a pretrained model makes of the hidden parts of videos, as PNG and MP4",
        "tools.reconstruct",
        "config.clips.ReconstructConfig",
        "MODEL_OR_RUN_FOLDER VIDEO...",
    ),
    "look": Stage(
        "draw the features of a model as colours, and what it attends to in videos, likewise",
        "evaluation.look",
        "config.clips.LookConfig",
        "MODEL_OR_RUN_FOLDER VIDEO...",
    ),
    "evaluate": Stage(
        "test a classifier on a list of videos: accuracies, predictions, confusions; also under "
        "the launcher",
        "evaluation.evaluate",
        "config.evaluation.EvaluateConfig",
        "MODEL_OR_RUN_FOLDER LIST",
    ),
    "predict": Stage(
        "name the action in a video; or along all videos of a folder, into a table; goes on where "
        "it was stopped",
        "evaluation.predict",
        "config.evaluation.PredictConfig",
        "MODEL_OR_RUN_FOLDER FOLDER_OR_FILES...",
    ),
    "probe": Stage(
        "measure what a frozen encoder knows: linear, attentive and nearest-neighbour probes",
        "evaluation.probe",
        "config.evaluation.ProbeConfig",
        "MODEL_OR_RUN_FOLDER",
    ),
    "extract": Stage(
        "write the features of clips along videos of any length, with their times; also under the "
        "launcher",
        "evaluation.extract",
        "config.evaluation.ExtractConfig",
        "MODEL_OR_RUN_FOLDER LIST_OR_VIDEO FOLDER",
    ),
    "compare": Stage(
        "lay runs side by side on one page: figures, curves, the settings that differ",
        "report.compare",
        "report.compare.CompareConfig",
        "RUN...",
    ),
    "doctor": Stage(
        "check every line and every video of a list, and write a clean one; exit status 0: all is "
        "good, 1: something is bad, 2: a mistake in the command",
        "tools.doctor",
        "config.tools.DoctorConfig",
        "LIST",
    ),
    "convert": Stage(
        "a model of another project as one of ours, or ours as theirs",
        "tools.convert",
        "convert.facts.ConvertConfig",
        "SOURCE DESTINATION",
    ),
    "plan": Stage(
        "what a run computes, keeps, sends, reads and takes on some GPUs, without them; the keys "
        "of a file for finetune are those of finetune",
        "planning.plan",
        "config.plan.plan_schema",
        CONFIG,
        "--gpus N --gpu NAME --nodes M",
    ),
    "bench": BENCH_KERNELS,
    "bench kernels": BENCH_KERNELS,
    "bench step": Stage(
        "measure whole training steps, and where their time goes; Hugging Face's step beside ours",
        "benchmark.step",
        "config.bench.StepBenchConfig",
        "",
        "--baseline FILE",
    ),
    "bench data": Stage(
        "measure the loader beside pytorchvideo's and the official pipeline",
        "benchmark.data",
        "config.bench.DataBenchConfig",
        "",
        "--baseline FILE",
    ),
    "pack": Stage(
        "turn the videos of a list into shards that training reads several times faster; goes on "
        "where it was stopped",
        "tools.pack",
        "config.pack.PackConfig",
        "LIST FOLDER",
        "--form FORM --short-side PIXELS --fps FPS --frame-step FRAMES --gop FRAMES --crf CRF "
        "--shard-mb MB --root FOLDER --num-workers N",
    ),
    "split": Stage(
        "divide a list or a folder of classes into lists to train, validate and test on",
        "tools.split",
        "config.tools.SplitConfig",
        "LIST_OR_FOLDER",
    ),
    "push": Stage(
        "send a model with its card to the Hugging Face hub",
        "tools.push",
        "config.tools.PushConfig",
        "MODEL_OR_RUN_FOLDER OWNER/NAME",
    ),
    "serve": Stage(
        "open a page on this machine where a video is dropped and named",
        "tools.serve",
        "config.tools.NoKeys",
        "MODEL_OR_RUN_FOLDER",
    ),
    "demo": Stage(
        "render the embedded demo data set into a folder",
        "tools.demo",
        "config.tools.DemoConfig",
        "FOLDER",
    ),
    "recipes": Stage(
        "list the recipes that came along: their source, data, published figure and hardware",
        "tools.recipes",
        "config.tools.NoKeys",
    ),
}
PURPOSES = {
    "learn from videos": "recipes, plan, pretrain, finetune",
    "use a model": "predict, serve, extract, reconstruct, look",
    "measure": "evaluate, probe, compare, bench kernels, bench step, bench data",
    "prepare videos": "doctor, split, pack, demo",
    "exchange models": "convert, push",
}
"""How the page of `video-mae` alone groups the stages."""
HEAD = """\
video-mae: masked autoencoder pretraining and action recognition on video

  video-mae finetune CONFIG.yaml checkpoint=MODEL data.source=FOLDER   learn to name actions
  video-mae predict runs/finetune VIDEO                                name the one in a video
  video-mae pretrain CONFIG.yaml data.source=FOLDER                    learn without labels"""
FOOT = """
video-mae STAGE --help explains a stage and the keys that matter first, --help all every one of
them; video-mae --version says what is installed."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs one stage and exits: 0 done, 2 a mistake in configuration or data, 74 where the disk
    takes nothing more (one line says where), 130 for Ctrl-C, else as the stage says.
    """
    if arguments is None:
        _prepare_process()
        arguments = sys.argv[1:]
    if isinstance(sys.stdout, io.TextIOWrapper):
        # names of files and classes that it cannot say, as sys.stderr does
        sys.stdout.reconfigure(errors="backslashreplace")
    who, left = "video-mae", None
    try:
        try:
            name, path, words, overrides = _parse(arguments)
            who += f" {name}"
            left = _start(name, path, words, overrides)
            status = left if isinstance(left, int) else left()
        finally:
            _end_with_reader()
    except (ValueError, OSError) as error:
        if left is not None and not isinstance(error, StorageError | FolderError):
            raise
        if os.environ.get("RANK") and os.environ.get("LOCAL_RANK", "0") != "0":
            # the launcher ends all ranks when one exits: the first one is to say why, once
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(PATIENCE_SECONDS)
        print(one_line(f"{who}: {error}"), file=sys.stderr)
        status = os.EX_IOERR if isinstance(error, StorageError) else USAGE_ERROR
    sys.exit(status)


def _prepare_process() -> None:
    """Ends with who started it, and tells of Ctrl-C in one line, and not what libraries say to
    those who write programs.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    warnings.simplefilter("ignore", FutureWarning, append=True)  # -W comes first
    end_with_launchers()


def _end_with_reader() -> None:
    """Ends in silence where whoever reads what is printed has gone, as `head` has at its last line:
    with the status of SIGPIPE, which is ignored, as it would come of any other pipe as well.
    """
    try:
        if isinstance(sys.exception(), BrokenPipeError):
            print()  # may be of another pipe, and what this one has refused need not be kept
        sys.stdout.flush()
    except BrokenPipeError:
        os._exit(128 + signal.SIGPIPE)


def _interrupt(number: int, frame: object) -> NoReturn:
    """Ends as a kill does, which every stage that writes is made for: an exception would be lost in
    a library that takes it for one of its own, or come out of it as a page of others.
    """
    # one says it: not what it has forked, which is about to leave signals to it
    if not parent_process() and os.environ.get("LOCAL_RANK", "0") == "0":
        os.write(2, b"video-mae: interrupted, what is done is kept\n")
    os._exit(128 + number)


def _parse(arguments: Sequence[str]) -> tuple[str, str | None, list[Any], list[str]]:
    """(stage, its file of keys, its words, overrides), or prints what is asked for and exits.

    Raises: ValueError.
    """
    # the deepspeed launcher puts it first
    given = [argument for argument in arguments if not argument.startswith("--local_rank")]
    two_words = " ".join(given[:2])
    if two_words in STAGES:
        given[:2] = [two_words]
    name = given.pop(0) if given else "--help"
    if name in ANSWERS:
        print(ANSWERS[name]())
        sys.exit()
    if name not in STAGES:
        near = " or ".join(get_close_matches(name, STAGES))
        hint = f", did you mean {near}?" if near else ":"
        raise ValueError(f"there is no stage {name}{hint} `video-mae` lists them")
    wanted, path, plain, flagged = STAGES[name].words.split(), None, [], []
    takes_value = dict(re.findall(r"(--\S+)( [A-Z]+)?", STAGES[name].flags))
    left = iter(given)
    for argument in left:
        flag, _, value = argument.partition("=")
        if flag in ("-h", "--help"):
            print(_help(name, value or next(left, "")))
            sys.exit()
        elif flag in takes_value:
            value = value or (next(left, "") if takes_value[flag] else "true")
            flagged.append(f"{flag[2:].replace('-', '_')}={value}")
        elif flag == "--config" and CONFIG not in wanted:
            path = value or next(left, "")
        elif argument.startswith("-"):
            raise ValueError(f"{flag}: no such flag; a key has no dashes: {argument.lstrip('-')}")
        else:
            plain.append(argument)
    num = len(wanted)
    words, keys = plain[:num], plain[num:]
    if wanted and wanted[-1].endswith("..."):
        last = plain[num - 1 :]
        # a file that is there is no key
        listed = [text for text in last if "=" not in text or os.path.lexists(text)]
        keys = [text for text in last if text not in listed]
        words[num - 1 :] = [listed] if listed else []
    if len(words) < num:
        raise ValueError(f"{wanted[len(words)]} is missing; `video-mae {name} --help` explains")
    if CONFIG in wanted:
        path = words.pop(0)
    return name, path, words, keys + flagged


def _help(name: str, part: str) -> str:
    """Of a stage, with the keys that are asked for."""
    from video_mae.config.explain import describe

    stage = STAGES[name]
    usage = f"{name} {stage.words} {stage.flags}"
    if CONFIG not in stage.words:
        usage += " --config FILE"
    return (
        f"video-mae {' '.join(usage.split())} key=value ...\n\n{stage.meaning}\n\n"
        f"{describe(schema_of(stage), part)}"
    )


def _completion() -> str:
    """What a shell is to evaluate."""
    return Path(__file__).with_name("completion.bash").read_text()


def _page() -> str:
    """All stages by their purposes, and what most people want."""
    lines = [HEAD]
    for purpose, names in PURPOSES.items():
        lines.append(f"\n{purpose}:")
        for name in names.split(", "):
            lines.append(f"  {name:15}{STAGES[name].meaning.split(';')[0]}")
    return "\n".join([*lines, FOOT])


def _versions() -> str:
    """What is installed, and the GPUs that the driver knows."""
    from video_mae.report.record import versions

    lines = [f"{package} {version}" for package, version in versions().items()]
    gpus = os.popen("nvidia-smi -L 2>/dev/null").read()
    return "\n".join([*lines, gpus.strip() or f"no GPU, {os.cpu_count()} cores"])


ANSWERS = {"-h": _page, "--help": _page, "--version": _versions, "--completion": _completion}


def _start(
    name: str, path: str | None, words: list[Any], overrides: list[str]
) -> int | Callable[[], int]:
    from video_mae.config.schema import parse

    stage = STAGES[name]
    config = parse(path, overrides, schema_of(stage, path or ""))
    if stage.module.startswith("training."):
        # before PyTorch is loaded, which takes seconds
        from video_mae.training.run_folder import check_same_run

        check_same_run(config.cut())
    if sys.stderr.isatty() and "RANK" not in os.environ:
        print(f"video-mae {name}: starts", file=sys.stderr)
    return import_module(f"video_mae.{stage.module}").start(*words, config)


def schema_of(stage: Stage, path: str = "") -> Any:
    """The keys of a stage."""
    module, _, name = stage.schema.rpartition(".")
    schema = getattr(import_module(f"video_mae.{module}"), name)
    return schema if isinstance(schema, type) else schema(path)
