"""The loader: worker processes that decode, and survive the signals that the trainer handles."""

import os
import signal
import threading
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from video_mae.config import DataConfig
from video_mae.data.dataset import Sample, collate

TIMEOUT_SECONDS = 300
"""Without a batch for so long the loader raises: a worker hangs in a decoder, or the disk does."""


def make_loader(dataset: Dataset[Sample], sampler: Sampler[Any], data: DataConfig, pin: bool) -> "DataLoader[Sample]":
    """Batches of the sampler's micro-batches, in its order, the same for any data.num_workers; iterating gives `Batch`."""
    workers = data.num_workers
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        pin_memory=pin,
        num_workers=workers,
        prefetch_factor=data.prefetch_batches if workers else None,
        persistent_workers=workers > 0,
        timeout=TIMEOUT_SECONDS if workers else 0,
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=start_worker if workers else None,
    )


def start_worker(_: int) -> None:
    """What a decoding process does first: one thread, and signals that are meant for the trainer are left to it."""
    torch.set_num_threads(1)
    # Ctrl-C and a scheduler's SIGTERM reach the whole process group; the trainer finishes its step and saves, and needs batches for it.
    # Only the trainer's own SIGTERM counts. A thread waits for it because a handler would not run while a decoder hangs.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_leave_with_trainer, daemon=True).start()


def _leave_with_trainer() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
