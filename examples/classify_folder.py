"""Names the action in each video of a folder, each video as a whole.

python examples/classify_folder.py MODEL VIDEOS
MODEL: a classifier, as `load_pretrained` takes it. VIDEOS: a list, a folder, or one video.
`video-mae predict MODEL VIDEOS output=predictions.csv` does it along the videos, and goes on where
it was stopped.
"""

import sys

import torch

from video_mae import classify_video, load_pretrained
from video_mae.config.data import SourceConfig
from video_mae.data import read_annotations


def main() -> None:
    """Prints the most probable class of each video."""
    model = load_pretrained(sys.argv[1])
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    for path in read_annotations(SourceConfig(source=sys.argv[2])).paths:
        try:
            name, probability = classify_video(model, str(path), top=1)[0]
        except ValueError as error:  # a video that cannot be decoded
            print(f"{path}: {error}", file=sys.stderr)
            continue
        print(f"{probability:6.1%}  {name}  {path}", flush=True)


if __name__ == "__main__":
    main()
