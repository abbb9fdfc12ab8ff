"""Which videos are alike: a vector of each from a frozen encoder, and its nearest neighbours.

python examples/features_and_neighbours.py MODEL VIDEOS [NUM_NEIGHBOURS]
MODEL: what `load_pretrained` takes. VIDEOS: a list, a folder, or one video.
"""

import sys

import torch
from torch.nn.functional import normalize

from video_mae import ClassifierConfig, load_pretrained
from video_mae.config.data import SourceConfig
from video_mae.data import read_annotations
from video_mae.evaluation.features import FrozenEncoder, clips_of
from video_mae.evaluation.predict import views_of


def main() -> None:
    """Prints each video with its nearest neighbours."""
    name, source = sys.argv[1:3]
    num_neighbours = int(sys.argv[3]) if len(sys.argv) > 3 else 3
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_pretrained(name)
    encoder, trained = FrozenEncoder(model, device), clips_of(model)
    # the middle of a video, with the frames chosen as in the training of the model
    frames = ClassifierConfig(num_classes=1, sampling=trained.sampling, stride=trained.stride)
    views = views_of(model.config, frames, num_clips=1, num_crops=1)

    paths = [str(path) for path in read_annotations(SourceConfig(source=source)).paths]
    vectors = [encoder(views.read(path).clips()).pooled_BD.mean(dim=0) for path in paths]
    vectors_MD = torch.stack(vectors)
    vectors_MD = normalize(vectors_MD - vectors_MD.mean(dim=0), dim=1)
    similarity_MM = (vectors_MD @ vectors_MD.T).fill_diagonal_(-torch.inf)
    found = similarity_MM.topk(min(num_neighbours, len(paths) - 1), dim=1)
    for path, similar, places in zip(paths, *found, strict=True):
        print(path)
        for cosine, place in zip(similar.tolist(), places.tolist(), strict=True):
            print(f"  {cosine:6.3f}  {paths[place]}")


if __name__ == "__main__":
    main()
