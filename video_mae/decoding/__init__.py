"""From files to frames, in processes of their own. Nothing here imports torch, so that such a
process starts fast.
"""

from video_mae.decoding.choices import Choose
from video_mae.decoding.frames import (
    ANIMATION,
    READERS,
    VIDEO_EXTENSIONS,
    Decoded,
    decode,
    decoder_version,
    is_video,
    read_clip,
    resolve_decoder,
    stream,
    times_and_start,
)
from video_mae.decoding.media import Member, Place, Reading, VideoDecodeError
