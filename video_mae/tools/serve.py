"""A page on which a video is dropped and named, for the browsers of this machine."""

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from video_mae.config.clips import LookConfig
from video_mae.config.tools import NoKeys
from video_mae.convert.model_folder import load_pretrained
from video_mae.evaluation.extract import file_name
from video_mae.evaluation.look import draw_videos, look
from video_mae.evaluation.predict import classify_video
from video_mae.extras import require_package
from video_mae.model.vit import VideoClassifier


def start(model: str, config: NoKeys) -> int:
    """Shows the page until Ctrl-C; GRADIO_SERVER_NAME and GRADIO_SERVER_PORT say where."""
    require_package("gradio")
    import gradio  # pyright: ignore[reportMissingImports]

    loaded = load_pretrained(model, VideoClassifier)
    has_time = loaded.config.num_frames > 1
    with TemporaryDirectory() as folder:

        def answer(video: str) -> tuple[dict[str, float], str]:
            """The classes of a video with their probabilities, and what `look` draws of it."""
            classes = classify_video(loaded, video)
            draw_videos(loaded, [video], LookConfig(output=folder), partial(look, loaded))
            picture = Path(folder) / file_name(video, "mp4" if has_time else "png")
            return dict(classes), str(picture)

        looked = gradio.Video if has_time else gradio.Image
        page = gradio.Interface(
            answer, gradio.Video(), [gradio.Label(), looked()], flagging_mode="never"
        )
        # what is wrong with a video, in words
        page.launch(show_error=True)
    return 0
