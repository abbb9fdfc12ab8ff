"""Packages that a plain install does not bring; one that is missing is told with pip's command."""

from importlib.util import find_spec

EXTRAS = {
    "decord": "decord",
    "fsspec": "remote",
    "gradio": "serve",
    "matplotlib": "plots",
    "onnxscript": "onnx",
    "pybullet": "people",
    "skimage": "demo",
    "tensorboard": "tensorboard",
    "tifffile": "tiff",
    "torchcodec": "torchcodec",
    "transformers": "transformers",
    "wandb": "wandb",
}
"""Of each package that is imported where it is used, the extra of pyproject.toml that brings it."""


class MissingPackageError(ImportError, ValueError):
    """A package is not installed; the message says how to install it."""


def require_package(package: str, needed_for: str = "") -> None:
    """To be called before an import. needed_for: the key that asks for the package.

    Raises: MissingPackageError, which is an ImportError, and a ValueError for a user's mistake.
    """
    if find_spec(package) is None:
        key = f"{needed_for}: " if needed_for else ""
        command = f"pip install 'video-mae[{EXTRAS[package]}]'"
        raise MissingPackageError(f"{key}{package} is not installed; {command}", name=package)
