"""The command line: STAGE WORD ... key=value ... ; the only argument parser."""

import argparse
import io
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple, NoReturn

from video_mae.files import FolderError, StorageError, one_line
from video_mae.processes import end_with_launchers

USAGE_ERROR, CANNOT_WRITE = 2, 74
PATIENCE_SECONDS = 30
CONFIG = "CONFIG.yaml"


class Stage(NamedTuple):
    """A row of the command line.

    `module`, imported only when it is asked for, has the dataclass `schema` of all keys (or a
    function of a file that chooses one), and a
    function `start(*words, config) -> int | Callable[[], int]`. It raises ValueError or
    FileNotFoundError for a user's mistake, and returns the exit status, or what still has to run
    and returns it. The word CONFIG.yaml is not passed on: the keys are read from that file. A flag
    is another way to write a key: --some-key for some_key=true, --some-key VALUE for
    some_key=VALUE. A name may be two words.
    """

    meaning: str
    module: str
    schema: str
    words: tuple[str, ...]
    flags: tuple[str, ...] = ()


BENCH_KERNELS = Stage(
    "measure each kernel against everything else that computes it; or compile all of them without "
    "a GPU",
    "benchmark.kernels",
    "KernelBenchConfig",
    (),
    ("--baseline FILE", "--compile-check"),
)
STAGES = {
    "pretrain": Stage(
        "pretrain a model; under `deepspeed --module video_mae pretrain ...` on many devices",
        "training.pretrain",
        "PretrainConfig",
        (CONFIG,),
        ("--from-scratch",),
    ),
    "finetune": Stage(
        "train a pretrained model to name actions; under the launcher as well",
        "training.finetune",
        "FinetuneConfig",
        (CONFIG,),
        ("--from-scratch",),
    ),
    "reconstruct": Stage(
        "draw what a pretrained model makes of the hidden parts of a video",
        "tools.reconstruct",
        "ReconstructConfig",
        ("MODEL_FOLDER", "VIDEO", "PICTURE.png"),
    ),
    "evaluate": Stage(
        "test a classifier on a list of videos: accuracies, predictions, confusions; also under "
        "the launcher",
        "evaluation.evaluate",
        "EvaluateConfig",
        ("MODEL_OR_RUN_FOLDER", "LIST"),
    ),
    "predict": Stage(
        "name the action in a video",
        "evaluation.predict",
        "PredictConfig",
        ("MODEL_OR_RUN_FOLDER", "VIDEO"),
    ),
    "probe": Stage(
        "measure what a frozen encoder knows: linear, attentive and nearest-neighbour probes",
        "evaluation.probe",
        "ProbeConfig",
        ("MODEL_OR_RUN_FOLDER",),
    ),
    "extract": Stage(
        "write the features of clips along videos of any length, with their times; also under the "
        "launcher",
        "evaluation.extract",
        "ExtractConfig",
        ("MODEL_OR_RUN_FOLDER", "LIST_OR_VIDEO", "FOLDER"),
    ),
    "doctor": Stage(
        "check every line and every video of a list, and write a clean one; exit status 0: all is "
        "good, 1: something is bad, 2: a mistake in the command",
        "tools.doctor",
        "DoctorConfig",
        ("LIST",),
    ),
    "convert": Stage(
        "a model of another project as one of ours, or ours as theirs",
        "tools.convert",
        "ConvertConfig",
        ("SOURCE", "DESTINATION"),
    ),
    "plan": Stage(
        "what a run computes, keeps, sends, reads and takes on some GPUs, in seconds and without "
        "them; the keys of a file for finetune are those of finetune",
        "planning.plan",
        "plan_schema",
        (CONFIG,),
        ("--gpus N", "--gpu NAME", "--nodes M"),
    ),
    "bench": BENCH_KERNELS,
    "bench kernels": BENCH_KERNELS,
    "bench step": Stage(
        "measure whole training steps, where their time goes, and Hugging Face's step beside ours",
        "benchmark.step",
        "StepBenchConfig",
        (),
        ("--baseline FILE",),
    ),
    "bench data": Stage(
        "measure the loader beside pytorchvideo's and the official pipeline",
        "benchmark.data",
        "DataBenchConfig",
        (),
        ("--baseline FILE",),
    ),
    "pack": Stage(
        "turn the videos of a list into shards that training reads several times faster; goes on "
        "where it was stopped",
        "tools.pack",
        "PackConfig",
        ("LIST", "FOLDER"),
        (
            "--form FORM",
            "--short-side PIXELS",
            "--fps FPS",
            "--frame-step FRAMES",
            "--gop FRAMES",
            "--crf CRF",
            "--shard-mb MB",
            "--root FOLDER",
            "--num-workers N",
        ),
    ),
    "demo": Stage(
        "render the embedded demo data set into a folder", "tools.demo", "DemoConfig", ("FOLDER",)
    ),
}


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs one stage and exits: 0 done, 2 a mistake in configuration or data, 74 where the disk
    takes nothing more (one line says where), 130 for Ctrl-C, else as the stage says.
    """
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    if arguments is None:
        end_with_launchers()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # names of files and classes that it cannot say, as sys.stderr does
        sys.stdout.reconfigure(errors="backslashreplace")
    left = None
    try:
        left = _start(STAGES[options.stage], options)
        status = left if isinstance(left, int) else left()
    except (ValueError, OSError) as error:
        if left is not None and not isinstance(error, StorageError | FolderError):
            raise
        if os.environ.get("RANK") and os.environ.get("LOCAL_RANK", "0") != "0":
            # the launcher ends all ranks when one exits: the first one is to say why, once
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(PATIENCE_SECONDS)
        print(one_line(f"video-mae {options.stage}: {error}"), file=sys.stderr)
        status = CANNOT_WRITE if isinstance(error, StorageError) else USAGE_ERROR
    except KeyboardInterrupt:
        print(f"video-mae {options.stage}: interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)


class _StageParser(argparse.ArgumentParser):
    """The parser of a stage, whose help ends with every key."""

    stage: Stage | None = None

    def error(self, message: str) -> NoReturn:
        super().error(one_line(message))

    def format_help(self) -> str:
        text = super().format_help()
        if self.stage is None:
            return text
        from video_mae.config.schema import describe

        return f"{text}\nkeys:\n{describe(_schema(self.stage))}\n"


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _StageParser(
        prog="video-mae",
        description="Masked autoencoder pretraining and action recognition on video.",
    )
    # the deepspeed launcher puts it first
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    stages = parser.add_subparsers(
        dest="stage", required=True, metavar="STAGE", parser_class=_StageParser
    )
    for name, stage in STAGES.items():
        command = stages.add_parser(name, help=stage.meaning, description=stage.meaning)
        command.stage = stage
        for word in stage.words:
            command.add_argument(word)
        for flag in stage.flags:
            _add_flag(command, *flag.split(" "))
        command.set_defaults(flags=[])
        command.add_argument(
            "overrides",
            nargs="*",
            metavar="key=value",
            help="any key below, dotted: optim.micro_batch=8",
        )
    name = " ".join(arguments[:2])
    options, more = parser.parse_known_args([name, *arguments[2:]] if name in STAGES else arguments)
    for argument in more:
        if argument.startswith("-") or "=" not in argument:
            parser.error(f"unrecognized arguments: {argument}")
    # argparse leaves over a key=value that follows a flag
    options.overrides += [*options.flags, *more]
    return options


def _add_flag(command: argparse.ArgumentParser, flag: str, value: str = "") -> None:
    key = flag.removeprefix("--").replace("-", "_")
    shown = f"{key}={value or 'true'}"
    how: dict[str, Any] = {"action": "append_const", "const": shown}
    if value:
        how = {"action": "append", "type": f"{key}={{}}".format, "metavar": value}
    command.add_argument(flag, dest="flags", help=shown, **how)


def _start(stage: Stage, options: argparse.Namespace) -> int | Callable[[], int]:
    from video_mae.config.schema import parse

    path = getattr(options, CONFIG, None)
    config = parse(path, options.overrides, _schema(stage, path or ""))
    words = [getattr(options, word) for word in stage.words if word != CONFIG]
    return import_module(f"video_mae.{stage.module}").start(*words, config)


def _schema(stage: Stage, path: str = "") -> type:
    schema = getattr(import_module(f"video_mae.{stage.module}"), stage.schema)
    return schema if isinstance(schema, type) else schema(path)
