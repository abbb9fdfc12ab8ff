"""Every container with every codec, by every decoder: a frame asked for alone is the one that
reading in order gives.
"""

import os

import pytest
import video_matrix as matrix

from video_mae.decoding import decoders
from video_mae.decoding.inspection import describe
from video_mae.decoding.isolation import decoder_process

SECONDS = 60.0
NAMES = [name for name in decoders.NAMES if not decoders.problem(name)]
PACKED = "MPEG-4, packed B-frames"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("matrix")


@pytest.mark.parametrize(
    ("container", "codec"),
    matrix.CASES,
    ids=[f"{container}-{codec}" for container, codec in matrix.CASES],
)
def test_a_frame_alone_is_that_of_reading_in_order_or_the_decoder_is_passed_over(
    container, codec, folder
):
    path = str(matrix.place(folder, container, codec))
    in_order = matrix.in_order(path)
    if codec != PACKED:
        assert in_order == list(range(matrix.NUM_FRAMES))
    trusted_with = describe(path).trusted_with
    assert "pyav" in trusted_with
    for name in NAMES:
        read_by, fallback, numbers = decoder_process().call(
            matrix.alone, path, name, seconds=SECONDS
        )
        assert read_by == (name if name in trusted_with else "pyav")
        assert bool(fallback) == (read_by != name)
        assert numbers == (in_order if read_by == name else in_order[:: len(in_order) // 2]), name


def test_the_table_of_the_documentation_is_the_one_of_these_files(folder):
    text = matrix.DOCS.read_text(encoding="utf-8")
    assert matrix.with_table(text, matrix.table(folder)) == text, (
        f"python {os.path.relpath(matrix.__file__)} writes it"
    )
