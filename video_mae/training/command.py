"""A training run as a command: alone in its folder, its ranks watching one another, and all of them
leaving together.
"""

from collections.abc import Callable
from typing import Any

from video_mae.config.world import World
from video_mae.data.dataset import UndecodableError
from video_mae.processes import hold_folder
from video_mae.training.engine import leave
from video_mae.training.heartbeat import heartbeat
from video_mae.training.loop import STOPPED_BY_POLICY, Training


def command(training: Training[Any]) -> Callable[[], int]:
    """Takes the run folder; what is returned trains, and returns the exit status.

    Raises: ValueError where another process has the folder; StorageError.
    """
    if World.from_environment().rank == 0:
        training.introduction += hold_folder(training.folder)

    def run() -> int:
        with heartbeat(training.folder, training.config.engine.stall_seconds):
            try:
                exit_status = training.run()
                # a launcher ends the rest as soon as one is gone
                training.engine.gather(exit_status)
            except UndecodableError as error:
                exit_status = STOPPED_BY_POLICY
                training.journal.say(f"stopped: {error}", anywhere=True)
                training.journal.say(training.engine.writer.settle(wait=True))
        leave()
        return exit_status

    return run
