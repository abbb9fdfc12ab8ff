"""The videos of a list in memory: where each is, and its label.

M videos.
"""

import hashlib
import os
from abc import abstractmethod
from array import array
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray


class Places(Sequence[Any]):
    """Where the videos of a list are: all of them paths, or all of them Members."""

    @property
    @abstractmethod
    def digest(self) -> bytes:
        """Of all of them in their order."""


class Paths(Places):
    """Paths in the bytes that they take, and 8 more: a million `str` take three times as much.

    Where workers fork, each copies all the objects that it touches, as Python counts references.
    """

    def __init__(self) -> None:
        self._text, self._ends = bytearray(), array("q")

    def append(self, path: str) -> None:
        """Adds a path."""
        self._text += os.fsencode(path)
        self._ends.append(len(self._text))

    @property
    def digest(self) -> bytes:
        digest = hashlib.sha256(self._text)
        digest.update(self._ends)
        return digest.digest()

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]  (no slices)
        index = range(len(self._ends))[index]
        return os.fsdecode(
            bytes(self._text[self._ends[index - 1] if index else 0 : self._ends[index]])
        )


class VideoList(Sequence[tuple[Any, dict[str, int]]]):
    """Videos and their labels: videos[index] is (place, {"label": label}) as in pytorchvideo's
    LabeledVideoPaths; -1 is no label.

    notes: what is to be told about where they come from, each a line.
    """

    def __init__(
        self, places: Places, label_M: NDArray[np.int64], notes: Sequence[str] = ()
    ) -> None:
        self.places, self.label_M, self.notes = places, label_M, tuple(notes)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[Any, dict[str, int]]:  # pyright: ignore[reportIncompatibleMethodOverride]  (no slices)
        return self.places[index], {"label": int(self.label_M[index])}

    def labelled(self, label_M: NDArray[np.int64]) -> Self:
        """The same videos with other labels."""
        return type(self)(self.places, label_M, self.notes)

    def digest(self) -> str:
        """Of all places and labels in their order: another for another list, whatever its name."""
        return hashlib.sha256(
            self.places.digest + np.ascontiguousarray(self.label_M).data
        ).hexdigest()
