"""What is known of machines, and what is assumed of them: machines.yaml."""

from pathlib import Path
from types import SimpleNamespace

from video_mae.config.schema import read_keys

FACTS = SimpleNamespace(**read_keys(Path(__file__).with_name("machines.yaml")))
