"""The method: masking, positions, the vision transformer, the objective, and the same model for
other clips.
"""

from video_mae.model.vit import Encoder, VideoClassifier, VideoMAE, VideoMAEOutput

__all__ = ["Encoder", "VideoClassifier", "VideoMAE", "VideoMAEOutput"]
