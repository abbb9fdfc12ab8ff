"""How a converted classifier chooses frames: what its file says, what its classes say, what the
user says, and a note on each guess.
"""

import argparse
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from video_mae import VideoClassifier, load_pretrained
from video_mae.cli import main
from video_mae.convert.facts import Facts
from video_mae.convert.importing import import_model
from video_mae.tools.convert import ConvertConfig, convert

official = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "second_official.py")))
FACTS: dict[str, Any] = {"num_heads": 3, "num_frames": 6, "height": 16, "width": 24}
KINETICS, SOMETHING = official.Size(classes=400), official.Size(classes=174)
GUESSED = {
    "dense": "sampling = dense: not in the source, as usual; "
    "models of Something-Something have sampling=uniform",
    "uniform": "sampling = uniform: not in the source, as Something-Something has 174 classes; "
    "others that many have sampling=dense",
    "stride": "stride = 4: not in the source, as usual",
}


def written(
    folder: Path, state: dict[str, torch.Tensor], wrapper: str = "module", **more: Any
) -> Path:
    torch.save({wrapper: state, **more}, folder / "x.pth")
    return folder / "x.pth"


def frames_of(path: Path, **facts: Any) -> tuple[str, int, list[str]]:
    """(sampling, stride, what was noted of them)."""
    model, report = import_model(path, Facts(**FACTS, **facts))
    assert isinstance(model, VideoClassifier)
    head = model.classifier_config
    return (
        head.sampling,
        head.stride,
        [note for note in report.notes if note.startswith(("sampling", "stride"))],
    )


MAKERS = {
    "videomae": official.videomae_finetuned,
    "mmaction2": official.mmaction_finetuned,
    "mae_st": lambda size: official.mae_st(size, part="classifier"),
}


@pytest.mark.parametrize("project", MAKERS)
def test_a_file_without_its_arguments_is_guessed_by_its_classes_and_says_so(project, tmp_path):
    assert frames_of(written(tmp_path, MAKERS[project](KINETICS))) == (
        "dense",
        4,
        [GUESSED["dense"], GUESSED["stride"]],
    )
    path = written(tmp_path, MAKERS[project](SOMETHING))
    assert frames_of(path) == ("uniform", 4, [GUESSED["uniform"]])
    assert frames_of(path, sampling="dense", stride=2) == ("dense", 2, [])


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({"data_set": "SSV2"}, ("uniform", 4)),
        ({"data_set": "SSV2", "sampling_rate": 2}, ("uniform", 2)),
        ({"data_set": "ssv1"}, ("uniform", 4)),
        ({"data_set": "Something-Something"}, ("uniform", 4)),
        ({"data_set": "Kinetics-400", "sampling_rate": 4}, ("dense", 4)),
        ({"data_set": "Kinetics-710", "sampling_rate": 4, "sparse_sample": True}, ("uniform", 4)),
        ({"data_set": "HMDB51", "sampling_rate": 2, "sparse_sample": False}, ("dense", 2)),
        ({"sparse_sample": True}, ("uniform", 4)),
    ],
)
@pytest.mark.parametrize("size", [KINETICS, SOMETHING], ids=["400", "174"])
def test_arguments_of_the_training_tell_without_a_guess(arguments, found, size, tmp_path):
    path = written(
        tmp_path, official.videomae_finetuned(size), "model", args=argparse.Namespace(**arguments)
    )
    assert frames_of(path) == (*found, [])
    other = "dense" if found[0] == "uniform" else "uniform"
    assert (
        frames_of(path, sampling=other)[2][0]
        == f"sampling = {other}: given, though the source says {found[0]}"
    )


PIPELINES = {
    "train_pipeline = [dict(clip_len=16, frame_interval=2, num_clips=1, type='SampleFrames'), "
    "dict(type='DecordDecode')]\n"
    "test_pipeline = [\n    dict(\n        clip_len=16,\n        frame_interval=2,\n"
    "        num_clips=5,\n        test_mode=True,\n"
    "        type='SampleFrames'),\n]": ("dense", 2),
    'train_pipeline = [dict(type="UniformSample", clip_len=16), '
    'dict(type="Resize", scale=(-1, 256))]': (
        "uniform",
        4,
    ),
    "a = [dict(type='SampleFrames', clip_len=1, frame_interval=1, num_clips=16)]": ("uniform", 4),
    "a = [dict(type='SampleFrames', clip_len=16)]": ("dense", 1),
    "a = [dict(clip_len=16, frame_interval=2, type='mmaction.SampleFrames')]": ("dense", 2),
    "a = [dict(clip_len=16, type='mmaction.datasets.transforms.UniformSample')]": ("uniform", 4),
}


@pytest.mark.parametrize("config", PIPELINES)
def test_the_configuration_in_a_training_file_of_mmaction_tells_it(config, tmp_path):
    path = written(
        tmp_path,
        official.mmaction_finetuned(SOMETHING),
        "state_dict",
        meta={"cfg": config, "epoch": 3},
    )
    assert frames_of(path) == (*PIPELINES[config], [])


def test_a_configuration_whose_pipelines_differ_leaves_it_open(tmp_path):
    config = (
        "a = [dict(type='SampleFrames', frame_interval=2), "
        "dict(type='SampleFrames', frame_interval=4)]"
    )
    path = written(
        tmp_path, official.mmaction_finetuned(KINETICS), "state_dict", meta={"cfg": config}
    )
    assert frames_of(path) == ("dense", 4, [GUESSED["dense"], GUESSED["stride"]])


@pytest.mark.parametrize("interval", ["x", "0", "4.5", "9" * 5000])
def test_a_configuration_with_no_number_of_frames_between_frames_leaves_it_open(interval, tmp_path):
    config = f"a = [dict(type='SampleFrames', frame_interval={interval})]"
    path = written(
        tmp_path, official.mmaction_finetuned(KINETICS), "state_dict", meta={"cfg": config}
    )
    assert frames_of(path) == ("dense", 4, [GUESSED["stride"]])


def test_folders_of_transformers_are_guessed_as_files_are(tmp_path):
    path = written(tmp_path, official.videomae_finetuned(SOMETHING))
    convert(path, tmp_path / "hub", ConvertConfig(**FACTS, format="hugging_face"))
    model, report = import_model(tmp_path / "hub")
    assert isinstance(model, VideoClassifier)
    assert model.classifier_config.sampling == "uniform"
    assert GUESSED["uniform"] in report.notes


def test_an_image_has_no_frames_to_choose(tmp_path):
    size = official.Size(frames=1, tubelet=1, height=24, classes=174)
    path = written(tmp_path, official.mae(size, part="classifier"), "model")
    model, report = import_model(path, Facts(**{**FACTS, "num_frames": 1, "height": 24}))
    assert isinstance(model, VideoClassifier)
    assert not [note for note in report.notes if note.startswith(("sampling", "stride"))]


def test_convert_takes_both_and_corrects_a_model_folder_too(tmp_path, capsys):
    def run(*words: Any) -> str:
        with pytest.raises(SystemExit) as exit_:
            main(["convert", *map(str, words)])
        output = capsys.readouterr()
        return output.out if exit_.value.code == 0 else output.err

    path = written(tmp_path, official.videomae_finetuned(KINETICS))
    facts = [f"{key}={value}" for key, value in FACTS.items()]
    assert GUESSED["dense"] in run(path, tmp_path / "guessed", *facts)
    assert "sampling = " not in run(
        path, tmp_path / "given", *facts, "sampling=uniform", "stride=2"
    )
    text = run(tmp_path / "guessed", tmp_path / "corrected", "sampling=uniform", "stride=2")
    assert (
        "sampling = uniform: given, the model says dense\nstride = 2: given, the model says 4\n"
        in text
    )
    given, corrected = (
        load_pretrained(tmp_path / name, VideoClassifier).classifier_config
        for name in ("given", "corrected")
    )
    assert given == corrected
    assert (given.sampling, given.stride) == ("uniform", 2)
    assert "stride: 0 must be at least 1" in run(path, tmp_path / "no", *facts, "stride=0")
    assert "given" in run(
        tmp_path / "guessed", tmp_path / "hub", "sampling=uniform", "format=hugging_face"
    )


def test_a_model_without_classes_has_no_such_choice(tmp_path):
    path = written(tmp_path, official.videomae_pretraining(official.Size()), "model")
    facts = {**FACTS, "decoder_num_heads": 2}
    with pytest.raises(ValueError, match=r"x\.pth: has no classes, and sampling=\.\.\. is"):
        import_model(path, Facts(**facts, sampling="uniform"))
    convert(path, tmp_path / "model", ConvertConfig(**facts))
    with pytest.raises(
        ValueError,
        match=r"stride: is how frames of a classifier are chosen, and this model is a VideoMAE",
    ):
        load_pretrained(tmp_path / "model", facts=Facts(stride=2))


def test_loading_a_model_folder_can_choose_otherwise_and_warns(tmp_path, caplog):
    path = written(tmp_path, official.videomae_finetuned(KINETICS))
    convert(path, tmp_path / "model", ConvertConfig(**FACTS))
    assert not caplog.messages
    model = load_pretrained(tmp_path / "model", VideoClassifier, facts=Facts(sampling="uniform"))
    assert model.classifier_config.sampling == "uniform"
    assert caplog.messages == [
        f"{tmp_path / 'model'}: sampling = uniform: given, the model says dense"
    ]
    with pytest.raises(ValueError, match="leaves nothing open"):
        load_pretrained(tmp_path / "model", facts=Facts(sampling="uniform", num_heads=3))
