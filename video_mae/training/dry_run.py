"""A run that is checked and told, and not begun."""

from typing import TYPE_CHECKING, Any

import torch

from video_mae.config.world import World
from video_mae.data.sampling import StepSampler
from video_mae.files import say
from video_mae.training.checkpoint import newest
from video_mae.training.run_page import num_parameters

if TYPE_CHECKING:
    from video_mae.training.loop import Training


def dry_run(training: "Training[Any]") -> int:
    """Makes the model without its memory, and the clips of the first video, and tells what a start
    would do. Raises: ValueError where no clip can be made.
    """
    config, steps = training.config, training.schedule.total_steps
    done, training.memory = 0, {}
    found = newest(training.folder / "checkpoints")
    if found and config.has_begun:
        done, training.memory = found[1]["step"], found[1].get("memory", {})
    with torch.device("meta"):
        model, _ = training.make_model()
    parameters = num_parameters(model)
    stream = training.videos.stream(config.seed)
    sampler = StepSampler(len(training.videos), 1, 1, 0, 1, config.seed, 0, 1, stream)
    key, *_ = next(iter(training.arranged(sampler)))
    sample = training.make_dataset()[key]
    state = (
        f"{done} of {steps} steps are done, the others would take "
        f"{training.videos_before(steps) - training.videos_before(done)} videos, "
        f"{config.data.clips_per_video} clips of each"
    )
    if reason := training.reason_to_end(done):
        state = f"already finished, {reason}"
    lines = [
        *training.introduction,
        *map(": ".join, sample.failures),
        f"decoded: {training.videos[sample.index][0]}, clips of {list(sample.clips[0].shape)}",
        f"{training.introduce()}, {parameters / 1e6:.1f} million parameters",
        f"run folder {training.folder}: {state}; a checkpoint has about "
        f"{parameters * 12 / 1e9:.2g} GB",  # float32, and with it the moments of AdamW
        "dry run: nothing was written or begun",
    ]
    if World.from_environment().rank == 0:
        for line in lines:
            say(line)
    return 0
