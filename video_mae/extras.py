"""Packages that a plain install does not bring: one that is missing is told with the pip command."""

from importlib.util import find_spec

EXTRAS = {
    "decord": "decord",
    "fsspec": "remote",
    "imagecodecs": "tiff",
    "matplotlib": "plots",
    "skimage": "demo",
    "tensorboard": "tensorboard",
    "tifffile": "tiff",
    "torchcodec": "torchcodec",
    "wandb": "wandb",
}
"""Of each package that is imported where it is used, the extra of pyproject.toml that brings it."""


def has_package(package: str) -> bool:
    """Whether a package is installed; it is not imported."""
    return find_spec(package) is not None


def require_package(package: str) -> None:
    """To be called before the import. Raises: ModuleNotFoundError saying how to install it."""
    if not has_package(package):
        command = f"pip install 'video-mae[{EXTRAS[package]}]'"
        raise ModuleNotFoundError(f"{package} is not installed; {command}", name=package)
