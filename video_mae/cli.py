"""The command line: STAGE CONFIG.yaml key=value ... ; the only argument parser."""

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from video_mae.config import PretrainConfig, load_config
from video_mae.schema import describe, parse

USAGE_ERROR = 2
PATIENCE_SECONDS = 30


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs one stage and exits: 0 done, 2 a mistake in configuration or data (one line says where), else as the stage says."""
    options = _parser().parse_args(arguments)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    try:
        go = STAGES[options.stage](options)
    except (ValueError, FileNotFoundError) as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(PATIENCE_SECONDS)  # the launcher kills all ranks when one exits: the first one is to say why, once
        print(f"video-mae {options.stage}: {error}", file=sys.stderr, flush=True)
        sys.exit(USAGE_ERROR)
    sys.exit(go())


def _pretrain(options: argparse.Namespace) -> Callable[[], int]:
    from video_mae.engine import leave
    from video_mae.pretrain import prepare, run

    plan = prepare(load_config(options.config, options.overrides, PretrainConfig))

    def go() -> int:
        status = run(plan)
        leave()
        return status

    return go


def _reconstruct(options: argparse.Namespace) -> Callable[[], int]:
    from video_mae.reconstruct import ReconstructConfig, reconstruct

    reconstruct(options.model, options.video, options.picture, parse(None, options.overrides, ReconstructConfig))
    print(f"picture {options.picture}")
    return lambda: 0


def _demo(options: argparse.Namespace) -> Callable[[], int]:
    from video_mae.demo import DemoConfig, make_demo_data

    make_demo_data(options.folder, parse(None, options.overrides, DemoConfig))
    print(f"demo data {options.folder}")
    return lambda: 0


STAGES: dict[str, Callable[[argparse.Namespace], Callable[[], int]]] = {"pretrain": _pretrain, "reconstruct": _reconstruct, "demo": _demo}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="video-mae", description="Masked autoencoder pretraining on video.")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher puts it first
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    pretrain = _stage(stages, "pretrain", "pretrain a model; under `deepspeed --module video_mae pretrain ...` on many devices",
                      lambda: PretrainConfig)
    pretrain.add_argument("config", metavar="CONFIG.yaml")
    reconstruct = _stage(stages, "reconstruct", "draw what a pretrained model makes of the hidden parts of a video", _reconstruct_schema)
    for name in ("model", "video", "picture"):
        reconstruct.add_argument(name, metavar={"model": "MODEL_FOLDER", "video": "VIDEO", "picture": "PICTURE.png"}[name])
    demo = _stage(stages, "demo", "render the embedded demo data set into a folder", _demo_schema)
    demo.add_argument("folder", metavar="FOLDER")
    for stage in (pretrain, reconstruct, demo):
        stage.add_argument("overrides", nargs="*", metavar="key=value", help="any key below, dotted: optim.micro_batch=8")
    return parser


def _demo_schema() -> type:
    from video_mae.demo import DemoConfig

    return DemoConfig


def _reconstruct_schema() -> type:
    from video_mae.reconstruct import ReconstructConfig

    return ReconstructConfig


def _stage(stages: Any, name: str, meaning: str, schema: Callable[[], type]) -> argparse.ArgumentParser:
    class Help(argparse.Action):
        def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
            print(f"{parser.format_help()}\nkeys:\n{describe(schema())}")
            parser.exit()

    parser: argparse.ArgumentParser = stages.add_parser(name, help=meaning, description=meaning, add_help=False)
    parser.add_argument("-h", "--help", action=Help, nargs=0, help="show this and every key with its default and meaning")
    return parser
