"""Fine-tuning runs in this process in which parts of the encoder stay as they are, or have low-rank
updates: what they train, leave, keep in a checkpoint, and refuse.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checkpoint_files import saved_state
from torch.utils.flop_counter import FlopCounterMode

from video_mae import VideoClassifier, load_pretrained, save_model_folder
from video_mae.config import FinetuneConfig, LoraConfig
from video_mae.data.dataset import ValidationClips, collate
from video_mae.data.videos import read_validation_videos
from video_mae.model.lora import choose_trained
from video_mae.tools.convert import ConvertConfig, convert
from video_mae.training.finetune import Finetuning, prepare, run
from video_mae.training.loop import DONE
from video_mae.training.optim import parameter_groups

Tiny = Callable[..., FinetuneConfig]

pytestmark = [pytest.mark.trains_here, pytest.mark.usefixtures("quiet_process")]


@pytest.fixture
def pretrained(tiny_finetune: Tiny, tmp_path: Path) -> Path:
    """A classifier of the tiny run's architecture, whose weights bf16 would round."""
    torch.manual_seed(5)
    config = tiny_finetune()
    save_model_folder(tmp_path / "pretrained", VideoClassifier(config.model, config.classifier))
    return tmp_path / "pretrained"


def state(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_pretrained(folder).state_dict()


def is_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) for name in ours
    )


@pytest.mark.parametrize(
    "changes",
    [
        [
            "lora.rank=3",
            "lora.targets=attention_mlp",
            "engine.zero_stage=0",
            "engine.precision=bf16",
        ],
        ["lora.rank=3", "freeze_blocks=1", "engine.zero_stage=1"],
        ["freeze_blocks=2", "engine.zero_stage=2", "engine.offload=optimizer"],
        [
            "freeze_blocks=1",
            "engine.zero_stage=3",
            "engine.precision=bf16",
            "engine.offload=parameters",
            "engine.activation_checkpointing=true",
        ],
    ],
    ids=["lora0", "both1", "head2", "half3"],
)
def test_a_model_folder_and_a_checkpoint_hold_the_model_that_was_validated(
    tiny_finetune: Tiny, pretrained: Path, tmp_path: Path, changes: list[str]
) -> None:
    config = tiny_finetune(
        *changes, f"checkpoint={pretrained}", "validation.interval=4", "optim.base_lr=1"
    )
    assert run(prepare(config)) == DONE
    folder = Path(config.output)
    before, after = state(pretrained), state(folder / "model")
    assert before.keys() == after.keys()
    patches = "encoder.patch_embed.weight"
    assert torch.equal(before[patches], after[patches])
    assert not torch.equal(before[patches].bfloat16().float(), before[patches])
    convert(folder / "checkpoints" / "step_00000004", tmp_path / "again", ConvertConfig())
    assert is_same(state(tmp_path / "again"), after)

    model, clips = (
        load_pretrained(folder / "model", VideoClassifier),
        ValidationClips(read_validation_videos(config), config),
    )
    batch = collate([clips[index] for index in range(8)])
    with torch.no_grad():
        loss = F.cross_entropy(model(batch.clip_BTHWC), batch.label_B).item()
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    (val_loss,) = [line["val_loss"] for line in lines if "val_loss" in line]
    is_rounded = config.engine.precision == "bf16"
    assert val_loss == pytest.approx(loss, rel=1e-2 if is_rounded else 1e-5)
    # a model without what the encoder has learned would not do
    model.load_state_dict({key: before[key] for key in before if "blocks" in key}, strict=False)
    with torch.no_grad():
        other = F.cross_entropy(model(batch.clip_BTHWC), batch.label_B).item()
    assert (abs(other - loss) > 1e-3) == ("freeze_blocks=2" not in changes)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_run_goes_on_with_the_frozen_weights_that_it_began_with(
    tiny_finetune: Tiny, pretrained: Path, stage: int
) -> None:
    config = tiny_finetune(
        f"checkpoint={pretrained}",
        "lora.rank=2",
        "journal.checkpoint_interval=2",
        f"engine.zero_stage={stage}",
        "engine.precision=bf16",
    )
    assert run(prepare(config)) == DONE
    folder = Path(config.output)
    before = state(folder / "model")
    shutil.rmtree(folder / "checkpoints" / "step_00000004")
    # the run that it started from was trained further
    torch.manual_seed(6)
    save_model_folder(pretrained, VideoClassifier(config.model, config.classifier))
    assert run(prepare(config)) == DONE
    assert is_same(state(folder / "model"), before)


def test_the_optimizer_and_the_log_know_only_what_is_trained(
    tiny_finetune: Tiny, pretrained: Path
) -> None:
    config = tiny_finetune(
        f"checkpoint={pretrained}", "freeze_blocks=1", "lora.rank=3", "lora.targets=attention_mlp"
    )
    run(prepare(config))
    folder = Path(config.output)
    state = saved_state(folder / "checkpoints" / "step_00000004")
    moments = [len(state[name]) for name in state if name.startswith("exp_avg/")]
    # A and B of query, key, value and projection, then of the MLP of width 128, in 1 block
    factors = 4 * 3 * (32 + 32) + 2 * 3 * (32 + 128)
    assert sum(moments) == factors + 2 * 32 + 8 * 33  # fc_norm and head
    assert "  0.00206 million parameters are trained\n" in (folder / "log.txt").read_text()


def test_factors_learn_at_the_rate_of_their_layer_and_decay_as_matrices_do(
    tiny_finetune: Tiny,
) -> None:
    config = tiny_finetune("model.depth=3")
    model = VideoClassifier(config.model, config.classifier)
    choose_trained(model, 1, LoraConfig(rank=2, targets="attention_mlp"))
    found = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in parameter_groups(model, 0.05, 0.5):
        for parameter in group["params"]:
            found[names[id(parameter)]] = group["lr_scale"], group["weight_decay"]
    assert found.pop("fc_norm.weight") == found.pop("fc_norm.bias") == (1, 0)
    assert (found.pop("head.weight"), found.pop("head.bias")) == ((1, 0.05), (1, 0))
    for name, facts in found.items():
        block = int(name.split(".")[2])
        assert facts == (0.5 ** (3 - block), 0.05), name
        assert ".lora." in name
    assert len(found) == 2 * 4 * 2


@pytest.mark.parametrize(("rank", "freeze_blocks"), [(0, 0), (0, 1), (0, 3), (2, 0), (2, 2)])
def test_a_step_counts_as_what_it_multiplies(
    tiny_finetune: Tiny, rank: int, freeze_blocks: int
) -> None:
    config = tiny_finetune(
        "checkpoint=somewhere",
        "model.depth=4",
        f"freeze_blocks={freeze_blocks}",
        f"lora.rank={rank}",
        "lora.targets=attention_mlp",
        "engine.kernels=reference",
    )
    training: Any = SimpleNamespace(config=config, introduction=[])
    model, macs = Finetuning.make_model(training)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 4, 32, 32, 3, dtype=torch.uint8)).sum().backward()
    # the factors are 2 of 32 wide, and some inputs need no gradient
    assert 3 * 2 * macs == pytest.approx(counter.get_total_flops(), rel=0.15)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["freeze_blocks=3"], "freeze_blocks: 3 is too many: there are model.depth = 2"),
        (["freeze_blocks=-1"], "freeze_blocks: -1 must be at least 0"),
        (
            ["freeze_blocks=2", "lora.rank=4"],
            "freeze_blocks: 2 is too many: there are model.depth = 2, of which lora.rank needs one",
        ),
        (
            ["lora.rank=33"],
            "lora.rank: 33 is more than a matrix can have: model.embed_dim = 32",
        ),
        (["lora.alpha=0", "lora.rank=1"], "lora.alpha: 0.0 must be above 0"),
        (["lora.targets=mlp"], "lora.targets"),
        (["lora.ranks=8"], "unknown key lora.ranks (did you mean rank?)"),
        (["lora.rank=8", "checkpoint="], "checkpoint: (empty) would freeze random weights"),
        (["freeze_blocks=1", "checkpoint="], "checkpoint: (empty) would freeze random weights"),
    ],
)
def test_what_cannot_be_frozen_or_updated_is_refused_in_one_line(
    tiny_finetune: Tiny, overrides: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match="command line: ") as error:
        tiny_finetune("checkpoint=somewhere", *overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
