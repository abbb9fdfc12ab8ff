"""The recipes that are not about video, shrunk and run on data made here: pictures, bands, volumes,
and pictures with videos.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from video_mae import load_pretrained, random_mask
from video_mae.config import PretrainConfig, load_config
from video_mae.training.checkpoint import step_name
from video_mae.training.loop import DONE
from video_mae.training.picture import reconstruction_frames
from video_mae.training.pretrain import prepare, run

pytestmark = [pytest.mark.trains_here, pytest.mark.usefixtures("quiet_process")]

RECIPES = Path(__file__).resolve().parents[2] / "configs" / "pretrain"
STEPS = 24
SHRINK = [
    "model.height=32",
    "model.width=32",
    "model.patch_size=8",
    "model.embed_dim=32",
    "model.depth=2",
    "model.num_heads=2",
    "model.decoder_embed_dim=16",
    "model.decoder_depth=1",
    "model.decoder_num_heads=2",
    "data.num_workers=0",
    "optim.global_batch=4",
    "optim.micro_batch=4",
    f"optim.steps={STEPS}",
    "optim.warmup_steps=2",
    "optim.base_lr=0.4",
    "optim.min_lr=0",
    "engine.precision=fp32",
    "engine.zero_stage=0",
    "journal.log_interval=1",
    "journal.checkpoint_interval=8",
    "journal.picture_interval=0",
]
RAW = ["objective.normalize=none", "objective.pixels=unit"]  # a target that is learned in few steps


def scene(number: int, frame: int = 0, channels: int = 3) -> np.ndarray:
    """A soft picture in [0, 1], 44 x 52: a slope that moves with the frame and has another strength
    in each channel.
    """
    rows, columns = np.mgrid[0:44, 0:52] / 52
    slope = 0.5 + 0.5 * np.sin(3 * columns + number + frame / 8) * np.cos(2 * rows)
    return slope[..., None] * np.linspace(0.3, 1, channels)


def write_pictures(folder: Path) -> Path:
    for number in range(9):
        path = folder / f"class {number % 2}" / f"{number}.{('png', 'jpg', 'webp')[number % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((255 * scene(number)).astype(np.uint8)).save(path)
    return folder


def write_bands(folder: Path) -> Path:
    """Reflectance times 10,000, as Sentinel-2's files have it: 13 bands a file, in one page or as
    planes.
    """
    folder.mkdir(parents=True)
    for number in range(8):
        bands_HWC = (4000 * scene(number, channels=13)).astype(np.uint16)
        if number % 2:
            tifffile.imwrite(
                folder / f"{number}.tif",
                bands_HWC,
                photometric="minisblack",
                planarconfig="contig",
                compression="zlib",
            )
        else:
            tifffile.imwrite(
                folder / f"{number}.tif",
                bands_HWC.transpose(2, 0, 1),
                photometric="minisblack",
                planarconfig="separate",
            )
    return folder


def write_volumes(folder: Path) -> Path:
    """Hounsfield units, of 5 to 12 slices: clips of 8 are longer than some."""
    folder.mkdir(parents=True)
    for number in range(8):
        slices = np.stack([scene(number, frame, 1)[..., 0] for frame in range(5 + number)])
        np.save(folder / f"{number}.npy", (-300 + 600 * slices).astype(np.int16))
    return folder


def write_videos(folder: Path, demo_folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "list.txt").write_text(
        "".join(f"{path} 0\n" for path in sorted(demo_folder.rglob("*.mp4"))[:6])
    )
    return folder / "list.txt"


Make = Callable[..., PretrainConfig]


@pytest.fixture
def make(tmp_path: Path, demo_folder: Path) -> Make:
    """make("volume_base", "key=value", ...): the shrunk recipe with its data."""
    data = tmp_path / "data"

    def config(name: str, *overrides: str) -> PretrainConfig:
        if not data.exists():
            sources: dict[str, Callable[[], list[str]]] = {
                "mae_image_base": lambda: [f"data.source={write_pictures(data)}"],
                "remote_sensing_base": lambda: [f"data.source={write_bands(data)}"],
                "volume_base": lambda: [
                    f"data.source={write_volumes(data)}",
                    "model.num_frames=8",
                    "model.tubelet_size=4",
                ],
                "joint_image_video_base": lambda: [
                    f"data.sources.imagenet.source={write_pictures(data / 'pictures')}",
                    "model.num_frames=4",
                    f"data.sources.ssv2.source={write_videos(data / 'videos', demo_folder)}",
                    "mask.ratio=0.75",
                ],
            }
            made.extend(sources[name]())
        return load_config(
            RECIPES / f"{name}.yaml", [*SHRINK, *made, f"output={tmp_path / 'run'}", *overrides]
        )

    made: list[str] = []
    return config


def lines(config: PretrainConfig, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(config.output) / file).read_text().splitlines()]


def losses(config: PretrainConfig) -> list[float]:
    return [line["loss"] for line in lines(config)]


def weights(config: PretrainConfig) -> bytes:
    return (Path(config.output) / "model" / "model.safetensors").read_bytes()


NAMES = ["mae_image_base", "remote_sensing_base", "volume_base", "joint_image_video_base"]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_learns_and_goes_on_bit_for_bit_where_it_was_stopped(
    make: Make, name: str
) -> None:
    config = make(name, *RAW)
    assert run(prepare(config)) == DONE
    written, model = losses(config), weights(config)
    assert len(written) == STEPS
    assert np.mean(written[-4:]) < 0.6 * np.mean(written[:3]), written
    assert not (Path(config.output) / "quarantine.jsonl").exists()
    assert (Path(config.output) / "reconstructions" / f"step_{STEPS:08d}.png").stat().st_size > 1000
    assert load_pretrained(Path(config.output) / "model").config == config.model
    newest = Path(config.output) / "checkpoints" / step_name(STEPS)
    (newest / "MANIFEST.json").unlink()  # as if the run had died while it saved
    assert run(prepare(config)) == DONE
    assert "resumed after step 16" in (Path(config.output) / "log.txt").read_text()
    assert losses(config) == written
    assert weights(config) == model


@pytest.mark.parametrize("name", ["joint_image_video_base", "remote_sensing_base"])
def test_a_run_is_the_same_with_any_number_of_workers(
    make: Make, tmp_path: Path, name: str
) -> None:
    alone, helped = (
        make(
            name,
            "optim.steps=5",
            f"data.num_workers={n}",
            f"output={tmp_path / str(n)}",
            "data.clips_per_video=2",
        )
        for n in (0, 2)
    )
    run(prepare(alone))
    run(prepare(helped))
    assert losses(alone) == losses(helped)
    assert weights(alone) == weights(helped)


def test_a_joint_run_tells_the_shares_of_its_sources(make: Make) -> None:
    config = make(
        "joint_image_video_base",
        "optim.steps=2",
        "data.sources.imagenet.weight=3",
        "data.sources.ssv2.weight=1",
    )
    run(prepare(config))
    log = (Path(config.output) / "log.txt").read_text()
    assert "15 videos" in log
    assert (
        "75.0% of the samples from data.sources.imagenet (9 files), 25.0% of the "
        "samples from data.sources.ssv2 (6 files)" in log
    )
    with pytest.raises(ValueError, match=r"this run was started with data\.sources = .*weight=3"):
        prepare(
            make(
                "joint_image_video_base",
                "optim.steps=2",
                "data.sources.imagenet.weight=2",
                "data.sources.ssv2.weight=1",
            )
        )


@pytest.mark.parametrize("normalize", ["channel", "tubelet", "none"])
def test_clips_of_sixteen_bits_are_drawn_as_those_of_eight(normalize: Any) -> None:
    clip_BTHWC = torch.randint(256, (2, 4, 16, 24, 5), dtype=torch.uint8)
    mask = random_mask(torch.tensor([3, 4]), (2, 2, 3), 0.5)
    predicted_BMP = torch.rand(2, 6, 2 * 8 * 8 * 5)
    eight, sixteen = (
        reconstruction_frames(
            clip, mask.visible_BV, mask.masked_BM, predicted_BMP, (2, 8, 8), normalize
        )
        for clip in (clip_BTHWC, clip_BTHWC.to(torch.uint16) * 257)
    )
    assert all(torch.equal(one, other) for one, other in zip(eight[:3], sixteen[:3], strict=True))


def test_files_that_do_not_fit_are_quarantined_while_the_run_goes_on(make: Make) -> None:
    config = make("remote_sensing_base", "optim.steps=6", "data.max_bad_share=0.5")
    tifffile.imwrite(
        Path(config.data.source) / "a.tif",
        np.zeros((44, 52, 4), np.uint16),
        photometric="minisblack",
        planarconfig="contig",
    )
    (Path(config.data.source) / "b.npy").write_bytes(b"no array")
    assert run(prepare(config)) == DONE
    reasons = {
        Path(line["path"]).name: (line["decoder"], line["reason"])
        for line in lines(config, "quarantine.jsonl")
    }
    assert reasons == {
        "a.tif": ("tifffile", "has 4 channels, data.channels asks for 12, counted from 0"),
        "b.npy": (
            "numpy",
            r"the magic string is not correct; expected b'\x93NUMPY', got b'no arr'",
        ),
    }


def test_a_model_of_other_channels_is_refused_before_the_run_begins(make: Make) -> None:
    config = make("remote_sensing_base", "data.channels=[]")
    with pytest.raises(
        ValueError,
        match=r"data\.source: no file can be used of the first 3: .*0\.tif: tifffile: "
        r"gives 13 channels",
    ):
        prepare(config)
    assert not Path(config.output).exists()
