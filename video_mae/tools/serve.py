"""A page on which a video is dropped and named, for the browsers of this machine."""

from video_mae.config.schema import Knobs
from video_mae.convert.model_folder import load_pretrained
from video_mae.evaluation.predict import classify_video
from video_mae.extras import require_package
from video_mae.model.vit import VideoClassifier


class ServeConfig(Knobs):
    """`video-mae serve MODEL_OR_RUN_FOLDER`."""


def start(model: str, config: ServeConfig) -> int:
    """Shows the page until Ctrl-C; GRADIO_SERVER_NAME and GRADIO_SERVER_PORT say where."""
    require_package("gradio")
    import gradio  # pyright: ignore[reportMissingImports]

    loaded = load_pretrained(model, VideoClassifier)

    page = gradio.Interface(
        lambda video: dict(classify_video(loaded, video)),
        gradio.Video(),
        gradio.Label(),
        flagging_mode="never",
    )
    # what is wrong with a video, in words
    page.launch(show_error=True)
    return 0
