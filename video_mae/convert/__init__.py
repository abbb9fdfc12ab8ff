"""Models of other projects as ours, and ours as theirs."""

from video_mae.convert.architecture import Facts
from video_mae.convert.importing import Report, import_model

__all__ = ["Facts", "Report", "import_model"]
