"""Hostile and damaged files: one clear line, nothing executed, nothing written."""

import argparse
import pickle
import re
import runpy
import sys
import time
import types
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from video_mae import load_pretrained
from video_mae.cli import main
from video_mae.convert.facts import Facts
from video_mae.convert.importing import import_model
from video_mae.tools.convert import ConvertConfig, convert

hostile = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "hostile_files.py")))
HOSTILE, STATE, saved = hostile.HOSTILE, hostile.STATE, hostile.saved
FACTS: dict[str, Any] = hostile.FACTS


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_or_damaged_file_is_refused_in_one_line(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, said = HOSTILE[case]
    path = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    facts: dict[str, Any] = {} if path.is_dir() else FACTS
    began = time.perf_counter()
    with pytest.raises((ValueError, FileNotFoundError), match=said) as error:
        convert(path, tmp_path / "out" / "model", ConvertConfig(**facts))
    assert "\n" not in str(error.value)
    assert path.name in str(error.value)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        load_pretrained(path, facts=Facts(**facts) if facts else None)
    assert time.perf_counter() - began < 20
    assert sorted(tmp_path.rglob("*")) == before  # nothing was written, nothing executed


SIZE = hostile.SIZE
FILES = {
    "videomae": hostile.STATE,
    "fine-tuned": hostile.official.videomae_finetuned(SIZE),
    "mae_st": hostile.official.mae_st(SIZE),
    "layer scale": hostile.official.videomae_pretraining(SIZE, layer_scale=True),
    "mmaction2": hostile.official.mmaction_finetuned(SIZE),
    "mae_st, fine-tuned": hostile.official.mae_st(SIZE, part="classifier"),
}


@pytest.mark.parametrize("name", FILES)
def test_no_tensor_can_be_lost_or_change_its_shape_unnoticed(name, tmp_path):
    state, path = FILES[name], tmp_path / "x.pth"
    once = {re.sub(r"\.\d+\.", ".*.", key): key for key in state}.values()  # of the blocks, one
    import_model(saved({"model": state})(tmp_path), Facts(**FACTS))
    for key in once:
        longer = torch.cat([state[key], state[key][:1]])
        for change in ({}, {key: longer}):
            saved(
                {
                    "model": {
                        **{other: tensor for other, tensor in state.items() if other != key},
                        **change,
                    }
                }
            )(tmp_path)
            if key == "backbone.pos_embed" and not change:  # it is computed
                continue
            with pytest.raises(ValueError, match=r"^[^\n]*x\.pth: [^\n]*$"):
                import_model(path, Facts(**FACTS))


def test_the_bombs_do_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for case in ("system in the weights", "eval in the weights", "plain pickle of protocol 4"):
        path = HOSTILE[case][0](tmp_path)
        content = (
            pickle.loads(path.read_bytes())
            if case.startswith("plain")
            else torch.load(path, weights_only=False)
        )
        assert content
        assert (tmp_path / "EXECUTED").exists()
        (tmp_path / "EXECUTED").unlink()


def test_the_command_line_says_it_and_ends_with_status_2(tmp_path, capsys):
    path = HOSTILE["eval in the weights"][0](tmp_path)
    with pytest.raises(SystemExit) as exit_:
        main(["convert", str(path), str(tmp_path / "model")])
    assert exit_.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert sorted(child.name for child in tmp_path.iterdir()) == ["x.pth"]


def test_objects_that_are_only_data_are_let_through_and_stay_inert(tmp_path, monkeypatch):
    names = ["mmengine", "mmengine.logging", "mmengine.logging.history_buffer"]
    modules = {name: types.ModuleType(name) for name in names}
    kind = type("HistoryBuffer", (), {"__module__": names[-1]})
    setattr(modules[names[-1]], kind.__name__, kind)
    buffer = kind()
    vars(buffer).update(values=torch.ones(3).numpy(), count=3)
    with monkeypatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        path = saved(
            {
                "model": STATE,
                "message_hub": {"loss": buffer},
                "args": argparse.Namespace(output=tmp_path, num_frames=6),
            }
        )(tmp_path)
    _, report = import_model(path, Facts(**{**FACTS, "num_frames": None}))
    assert set(report.left_out) == {"message_hub", "args"}
    assert not set(names) & set(sys.modules)


def test_objects_that_hold_each_other_are_counted_once(tmp_path):
    laughter: list[Any] = [torch.zeros(1)]
    for _ in range(200):
        laughter = [laughter, laughter]
    laughter.append(laughter)
    _, report = import_model(
        saved({"model": STATE, "optimizer": laughter})(tmp_path), Facts(**FACTS)
    )
    assert report.left_out["optimizer"].endswith("list with 1 tensors")


def test_an_object_under_many_keys_is_counted_with_the_first(tmp_path):
    shared = [torch.zeros(1)] * 100_000  # over and over, it would take minutes
    _, report = import_model(
        saved({"model": STATE, **{f"k{i}": shared for i in range(1000)}})(tmp_path), Facts(**FACTS)
    )
    assert report.left_out["k0"].endswith("list with 1 tensors")
    assert {report.left_out[f"k{i}"] for i in range(1, 1000)} == {"not part of the weights: list"}


def test_a_long_key_is_told_in_short(tmp_path):
    _, report = import_model(saved({"model": STATE, "k" * 10**6: 1})(tmp_path), Facts(**FACTS))
    assert list(report.left_out) == ["k" * 500]


def test_a_file_without_checksums_is_read_and_one_of_a_wrong_one_is_not(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        path = saved({"model": STATE})(tmp_path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert not any(entry.CRC for entry in zipfile.ZipFile(path).infolist())
    model, _ = import_model(path, Facts(**FACTS))
    path = saved({"model": STATE})(tmp_path)
    plain, _ = import_model(path, Facts(**FACTS))
    assert all(
        torch.equal(tensor, plain.state_dict()[name]) for name, tensor in model.state_dict().items()
    )
    content = path.read_bytes()
    value = STATE["encoder.blocks.1.attn.proj.weight"].numpy().tobytes()
    path.write_bytes(content.replace(value, value[:-4] + bytes(4)))
    with pytest.raises(
        ValueError, match=r"x\.pth: encoder\.blocks\.1\.attn\.proj\.weight: is damaged"
    ):
        import_model(path, Facts(**FACTS))


def test_a_failing_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    path = saved({"model": STATE})(tmp_path)
    for target, form in (
        ("video_mae.convert.model_folder.save_file", "model"),
        ("video_mae.convert.model_folder.save_file", "hugging_face"),
        ("torch.save", "official"),
    ):
        config = ConvertConfig(**FACTS, format=form)  # pyright: ignore[reportArgumentType]
        with monkeypatch.context() as patch:
            patch.setattr(target, full)
            with pytest.raises(OSError, match="No space"):
                convert(path, tmp_path / "out", config)
        assert [child.name for child in tmp_path.iterdir()] == ["x.pth"]
