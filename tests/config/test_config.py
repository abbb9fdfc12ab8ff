"""Configuration: what is written is what is read, and every mistake is one line that names the file
and the key.
"""

import dataclasses
import math
from dataclasses import field, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from video_mae import (
    MaskConfig,
    ModelConfig,
    ObjectiveConfig,
    PretrainConfig,
    load_config,
    save_config,
)
from video_mae.cli import STAGES, _schema
from video_mae.config import DataConfig, EngineConfig, FinetuneConfig, OptimConfig
from video_mae.config.schema import (
    Knobs,
    describe,
    flatten,
    from_dict,
    knob,
    parse,
    section,
    to_dict,
)

ODD = PretrainConfig(
    output="runs/a b: c#1",
    seed=2**62,
    model=ModelConfig.preset(
        "small", num_frames=1, tubelet_size=1, in_channels=1, mean=(0.5,), std=(0.25,)
    ),
    objective=ObjectiveConfig(contrastive_weight=0.1, learn_temperature=True, negatives="batch"),
    mask=MaskConfig(kind="random", ratio=0.75, decoder_mask_ratio=0.5),
    data=DataConfig(source="no", root="1e3", crop_scales=(0.5,)),
    optim=OptimConfig(steps=7, warmup_steps=3, base_lr=1e-9, min_lr=0.0, betas=(0.0, 0.999)),
    engine=EngineConfig(
        zero_stage=3,
        offload="parameters",
        extra={"zero_optimization": {"reduce_bucket_size": 5}, "list": [1, "a"]},
    ),
)

LEAVES = list(flatten(PretrainConfig()))
SECTIONS = [
    f.name
    for f in dataclasses.fields(PretrainConfig)
    if dataclasses.is_dataclass(get_type_hints(PretrainConfig)[f.name])
]


def kind_of(key: str) -> Any:
    schema: Any = PretrainConfig
    for name in key.split("."):
        schema = get_type_hints(schema)[name]
    return schema


def message(tmp_path: Any, text: str, *overrides: str) -> str:
    """The error of a wrong configuration, which must be one line that starts with the file."""
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"wrong\.yaml") as error:
        load_config(path, overrides)
    line = str(error.value)
    assert line.startswith(f"{path}: "), line
    assert "\n" not in line
    return line.removeprefix(f"{path}: ")


@pytest.mark.parametrize("config", [PretrainConfig(), ODD], ids=["default", "odd"])
def test_saved_configuration_is_read_back_equal(tmp_path, config):
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("config", [ODD.model, ODD.objective, ModelConfig(), ObjectiveConfig()])
def test_section_survives_json(config):
    assert from_dict(type(config), to_dict(config), "here") == config


def test_empty_file_is_the_default(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert (
        load_config(tmp_path / "empty.yaml") == PretrainConfig() == parse(None, [], PretrainConfig)
    )


def test_overrides_win_over_the_file_and_the_file_over_the_preset(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model: {preset: giant, decoder_depth: 3, depth: 39}\nmask: {ratio: 0.5}\n")
    config = load_config(
        path, ["model.depth=38", "optim.betas=[0.8, 0.9]", "optim.steps=5", "output=a=b"]
    )
    assert config.model == ModelConfig.preset("giant", decoder_depth=3, depth=38)
    assert (config.mask.ratio, config.optim.betas, config.optim.steps, config.output) == (
        0.5,
        (0.8, 0.9),
        5,
        "a=b",
    )
    assert load_config(path, ["model.preset=small"]).model == ModelConfig.preset(
        "small", decoder_depth=3, depth=39
    )
    assert load_config(path, ["optim.steps=null"]).optim.steps is None


TEXTS = [
    "/data/set #2/train.txt",
    "007",
    "1e3",
    "no",
    "12:30",
    "[a]/t.txt",
    "{a: 1}/t.txt",
    "@x",
    "",
    "a=b=c",
    "${seed}",
    "${",
    "$",
    "\\${x}",
    "\\\\${x}",
    "a\\b",
    "C:\\t\\n",
    "\\",
    "'",
    '"',
    "''",
    '"a"',
    "it's",
    " a",
    "a ",
    " ",
    "\t",
    "a\tb",
    "b\u00e4r \u65e5\u672c \U0001f600",
    "null",
    "~",
    "2020-01-01",
    "true",
    "0x1f",
    "0o7",
    "1_000",
    "-",
    "- a",
    "? a",
    ": a",
    "a: b",
    "a:",
    "#",
    "# a",
    "*a",
    "&a",
    "!a",
    "!!int 3",
    "%a",
    "|",
    ">",
    "---",
    "...",
    "<<",
    "=",
    ".5",
    "1.",
    "-1",
    "+1",
    ".inf",
    ".nan",
    "a\nb",
    "a\r\nb",
    "a\u2028b",
    "a\x85b",
    "a\v\x1b[2J",
    "\ufeffa",
    "b\udce4r",
    "a\xa0b",
    "x" * 5000,
    "a, b",
    "a b c " * 40,
    "y",
    "on",
    "OFF",
    "Null",
    "\\x24{",
    "\u0378",
    "\uffff",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_what_follows_the_equals_sign_and_comes_back_from_the_saved_file(tmp_path, text):
    overrides = [
        f"data.sources.some.source={text}",
        f"data.sources.some.root={text}",
        f"journal.wandb_project={text}",
    ]
    config = parse(None, overrides, PretrainConfig)
    some = config.data.sources["some"]
    assert (some.source, some.root, config.journal.wandb_project) == (text, text, text)
    extra = {"texts": [text], f"key {text}": text}
    config = replace(config, engine=EngineConfig(extra=extra))
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    (tmp_path / "config.yaml").read_bytes().decode("utf-8")


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_the_same_on_the_command_line_of_every_stage(text):
    for stage in STAGES.values():
        schema = _schema(stage)
        for f in dataclasses.fields(schema):
            if get_type_hints(schema)[f.name] is str and f.name not in (
                "ops",
                "presets",
                "compiled",
                "kind",
            ):
                need = {"ProbeConfig": ["train=a", "validation=a"]}.get(schema.__name__, [])
                if f"{f.name}={text}" not in ("output=", "train=", "validation="):
                    assert getattr(parse(None, [*need, f"{f.name}={text}"], schema), f.name) == text


def test_a_list_of_texts_keeps_each_as_it_is_written():
    config = parse(
        None,
        [
            "classifier.num_classes=7",
            "classifier.class_names=[no, 007, 1e3, 12:30, a b, 2020-01-01, '${x} #1, \u00e4']",
        ],
        FinetuneConfig,
    )
    assert config.classifier.class_names == (
        "no",
        "007",
        "1e3",
        "12:30",
        "a b",
        "2020-01-01",
        "${x} #1, \u00e4",
    )
    config = parse(
        None, ["data={source: 007, root: no, stride: 2}", "data.sources={}"], PretrainConfig
    )
    assert (config.data.source, config.data.root, config.data.stride) == ("007", "no", 2)
    config = parse(None, ["data.sources={a: {source: 1e3, weight: 1e3}}"], PretrainConfig)
    assert (config.data.sources["a"].source, config.data.sources["a"].weight) == ("1e3", 1000.0)


def test_numbers_lists_and_null_are_yaml_as_before():
    config = parse(
        None,
        [
            "optim.base_lr=1e-3",
            "optim.betas=[0.5, 1e-1]",
            "optim.steps=null",
            "seed=007",
            "data.flip=yes",
            "model.preset=small",
            "data.value_range=[0, 255]",
            "data.channels=[]",
            "mask.kind='random'",
            "engine.extra={a: {b: 5e8, c: no}, d: [1, x]}",
            "engine.extra.a.c=on",
            "engine.extra.e=1e-3",
        ],
        PretrainConfig,
    )
    assert (config.optim.base_lr, config.optim.betas, config.optim.steps) == (
        1e-3,
        (0.5, 0.1),
        None,
    )
    assert (config.seed, config.data.flip) == (7, True)
    assert (
        config.model.embed_dim,
        config.data.value_range,
        config.data.channels,
        config.mask.kind,
    ) == (384, (0.0, 255.0), (), "random")
    assert config.engine.extra == {"a": {"b": 5e8, "c": True}, "d": [1, "x"], "e": 1e-3}
    assert isinstance(config.optim.base_lr, float)


def test_a_text_in_a_file_is_as_it_is_written_there(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "output: 007\ndata: {source: no, root: 1e3}\njournal:\n  wandb_project: 2020-01-01\nseed: "
        "007\n"
    )
    config = load_config(tmp_path / "c.yaml")
    assert (config.output, config.data.source, config.data.root, config.journal.wandb_project) == (
        "007",
        "no",
        "1e3",
        "2020-01-01",
    )
    assert config.seed == 7
    (tmp_path / "c.yaml").write_bytes("\ufeffoutput: b\u00e4r\r\nseed: 3\r\n".encode())
    assert (load_config(tmp_path / "c.yaml").output, load_config(tmp_path / "c.yaml").seed) == (
        "b\u00e4r",
        3,
    )
    (tmp_path / "c.yaml").write_bytes("output: b\u00e4r\nseed: 3\n".encode("utf-16"))
    assert load_config(tmp_path / "c.yaml").output == "b\u00e4r"


def test_names_of_sources_are_texts_none_of_which_is_lost(tmp_path):
    names = ("no", "off", "007", "7", "1e3", "~", "2020-01-01", "0x7", "=", "a.b", "kinetics-400")
    lines = "".join(f"    {name}: {{source: list/{name}}}\n" for name in names)
    (tmp_path / "c.yaml").write_text(f"data:\n  sources:\n{lines}")
    config = load_config(tmp_path / "c.yaml", ["data.sources.kinetics-400.stride=2"])
    assert {name: source.source for name, source in config.data.sources.items()} == {
        name: f"list/{name}" for name in names
    }
    assert config.data.sources["kinetics-400"].stride == 2
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


def test_anchors_and_merges_are_read_where_they_stand(tmp_path):
    (tmp_path / "c.yaml").write_text("""
data:
  sources:
    a: &a {source: &s 007, root: no, stride: 2}
    b: {stride: 3, <<: *a}
    c: {<<: [*a, {shuffle_window: 5}], root: off}
seed: *s
""")
    config = load_config(tmp_path / "c.yaml")
    found = {
        name: (part.source, part.root, part.stride, part.shuffle_window)
        for name, part in config.data.sources.items()
    }
    assert found == {
        "a": ("007", "no", 2, 10_000),
        "b": ("007", "no", 3, 10_000),
        "c": ("007", "off", 2, 5),
    }
    assert config.seed == 7


BOMB = "engine:\n  extra:\n    a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"    {name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, "without end"),
        ("engine:\n  extra: &a {x: *a}\n", "without end"),
        ("data: &a\n  sources: *a\n", "without end"),
        ("engine: {extra: " + "{a: " * 60 + "1" + "}" * 60 + "}\n", "without end"),
        ("engine: {extra: " + "{a: " * 3000, "not YAML"),
        ("? [a, b]\n: 3\n", "line 1: found a key that is no text"),
        ("engine: {extra: {? {a: 1} : 2}}\n", "no text"),
        ("[a]: 1\n", "no text"),
        ("engine: {extra: {1: a, '1': b}}\n", "duplicate key 1"),
        ("engine: {extra: {<<: {a: 1}, <<: {b: 1}}}\n", "duplicate"),
        (f"seed: {'9' * 5000}\n", "line 1: 9"),
        (f"engine: {{extra: {{a: {'9' * 5000}}}}}\n", "line 1: 9"),
        ('output: "\\UFFFFFFFF"\n', ""),
        ("engine: {extra: {a: !!timestamp x}}\n", "timestamp is not supported"),
        ("engine: {extra: {a: !!bool x}}\n", "x is no bool"),
        ("engine: {extra: {a: !!set {x}}}\n", "set is not supported"),
        ("output: !foo x\n", "line 1: !foo is not supported"),
        ("optim: !!seq {steps: 3}\n", "not supported"),
        ("optim:\n\tsteps: 3\n", "line 2: found character '\\t' (a tab: write blanks)"),
        ('"a\\nb": 1\n', "unknown key a\\x0ab"),
        (f"seed: {'x' * 9000}\n", "seed: 'xx"),
        ("engine: {extra: null}\n", "engine.extra: must hold"),
        ("data: {sources: 3}\n", "data.sources: must hold"),
        ("model: {mean: [.nan, 0, 0]}\n", "model.mean: "),
        ("model: {std: [.inf, 1, 1]}\n", "model.std: "),
    ],
)
def test_a_file_that_no_run_can_mean_is_one_short_line(tmp_path, text, said):
    found = message(tmp_path, text)
    assert said in found
    assert len(found) < 250


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optim.betas=[0.9,", "optim.betas: "),
        ("optim.steps=@x", "optim.steps: "),
        ("classifier.class_names=[a]/t.txt", "classifier.class_names: "),
        ("optim.steps={", "optim.steps: "),
        ("engine.extra=[a]/t", "engine.extra: "),
        ("dta.source=[a]/t", "unknown key dta"),
        ("data.crop=[a]/t", "data.crop: "),
        ("optim.steps=!!python/name:os.system", "optim.steps: "),
        ("optim.betas=" + "[" * 2000, "optim.betas: "),
        ("data=@x", "data: "),
        ("engine.extra={a: 1, a: 2}", "engine.extra: "),
    ],
)
def test_a_parser_never_speaks_without_the_key(override, said):
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        parse(None, [override], FinetuneConfig)
    assert str(error.value).startswith(said)
    assert len(str(error.value)) < 400


class Optional(Knobs):
    """Knobs of kinds that no stage has today."""

    text: str | None = knob(None, "a text or null")
    texts: tuple[str, ...] = knob((), "texts")
    pair: tuple[str, int] = knob(("a", 1), "a text and a number")


def test_a_text_or_null_is_null_by_that_word_alone():
    assert parse(None, ["text=null", "texts=[null_, ~a]"], Optional) == Optional(
        texts=("null_", "~a")
    )
    assert parse(None, ["text=~", "pair=[2, 2]"], Optional) == Optional(text="~", pair=("2", 2))
    assert parse(None, ["text="], Optional).text == ""


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("key", LEAVES)
def test_misspelled_key_is_named_with_its_near_match(tmp_path, key):
    prefix, _, name = key.rpartition(".")
    wrong = f"{prefix}.{name}x".lstrip(".")
    said = message(tmp_path, "", f"{wrong}=1")
    assert wrong in said
    assert f"did you mean {name}" in said


@pytest.mark.parametrize("name", SECTIONS)
def test_section_must_be_a_mapping_under_its_name(tmp_path, name):
    assert "did you mean" in message(tmp_path, f"{name}s: {{}}\n") or name == "mask"
    for value in ("3", "[1, 2]", "null", "text"):
        assert message(tmp_path, f"{name}: {value}\n").startswith(f"{name}: ")


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("optim.depth", "model.depth"),
        ("micro_batch", "optim.micro_batch"),
        ("optm.steps", "optim"),
        ("model.ratio", "mask.ratio"),
        ("optim.micro_bach", "micro_batch"),
    ],
)
def test_key_in_the_wrong_place_is_told_where_it_belongs(tmp_path, key, near):
    assert near in message(tmp_path, "", f"{key}=1")


def wrong_values(key: str) -> list[str]:
    """YAML values that no knob of this type takes."""
    kind = kind_of(key)
    if get_origin(kind) is Literal:
        return ["nonsense", "null", "[1]"]
    if get_origin(kind) is tuple:
        wrong_lengths = ["[]"] if get_args(kind)[-1] is Ellipsis else ["[0.5]", "[0.1, 0.2, 0.3]"]
        if flatten(PretrainConfig())[key] == ():
            wrong_lengths = []
        return ["3", "null", "[a, b]", "[null, null]", "{a: 1}", *wrong_lengths]
    if get_origin(kind) is dict:
        return ["3", "[1]", "text"]
    wrong = {
        int: ["many", "1.5", "true", "null", "[1]", "{a: 1}"],
        float: ["much", "true", "null", "[0.1]", "{a: 1}", ".nan"],
        bool: ["maybe", "null", "[true]", "{a: 1}"],
        str: ["null", "[a]", "{a: 1}"],
    }
    return wrong.get(kind, ["many", "1.5", "true", "[1]"])  # the last: int | None


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key in LEAVES for value in wrong_values(key)]
)
def test_value_of_a_wrong_type_is_refused_by_name_in_file_and_override(tmp_path, key, value):
    # on the command line these are texts, of which two have a meaning of their own
    if kind_of(key) is str and key not in ("data.axes", "objective.teacher"):
        assert flatten(parse(None, [f"{key}={value}"], PretrainConfig))[key] == value
    else:
        assert key in message(tmp_path, "", f"{key}={value}")
    *sections, name = key.split(".")
    text = (
        "".join(f"{'  ' * i}{word}:\n" for i, word in enumerate(sections))
        + f"{'  ' * len(sections)}{name}: {value}\n"
    )
    assert key in message(tmp_path, text)


OUT_OF_RANGE = [
    f"{key}=0"
    for key in (
        "model.depth",
        "model.num_heads",
        "model.in_channels",
        "model.embed_dim",
        "model.num_frames",
        "model.height",
        "model.patch_size",
        "model.tubelet_size",
        "model.decoder_depth",
        "model.mlp_ratio",
        "mask.ratio",
        "objective.temperature",
        "optim.micro_batch",
        "optim.accumulation",
        "optim.steps",
        "optim.epochs",
        "optim.eps",
        "data.stride",
        "data.clips_per_video",
        "data.prefetch_batches",
        "journal.log_interval",
        "journal.keep_checkpoints",
        "journal.picture_clips",
        "engine.max_skipped_in_a_row",
    )
]
OUT_OF_RANGE += [
    f"{key}=-1"
    for key in (
        "seed",
        "model.drop_path",
        "objective.contrastive_weight",
        "optim.base_lr",
        "optim.min_lr",
        "optim.weight_decay",
        "optim.clip_grad",
        "optim.warmup_epochs",
        "optim.warmup_steps",
        "data.num_workers",
        "data.max_bad_share",
        "journal.checkpoint_interval",
        "journal.picture_interval",
    )
]
OUT_OF_RANGE += [
    f"{key}=.inf"
    for key in (
        "model.mlp_ratio",
        "model.decoder_mlp_ratio",
        "objective.contrastive_weight",
        "optim.epochs",
        "optim.base_lr",
        "optim.weight_decay",
        "optim.clip_grad",
        "optim.eps",
    )
]
OUT_OF_RANGE += [
    "optim.steps=1000000000000",
    "optim.epochs=1e9",
    "mask.ratio=1",
    "mask.decoder_mask_ratio=0.3",
    "model.drop_path=1",
    "model.height=225",
    "model.num_frames=15",
    "model.num_heads=7",
    "model.decoder_num_heads=5",
    "model.std=[0, 1, 1]",
    "model.mean=[1, 2]",
    "model.in_channels=4",
    "model.mlp_ratio=0.0001",
    "model.preset=bse",
    "model.preset=[1]",
    "optim.betas=[0.9, 1]",
    "optim.min_lr=1",
    "optim.warmup_epochs=900",
    "data.crop_scales=[0.5, 2]",
    "data.max_bad_share=2",
    "data.crop=random_resized",
    "objective.temperature=2",
    "objective.learn_temperature=true",
    "engine.zero_stage=4",
    "engine.offload=parameters",
    "seed=9223372036854775808",
    "output=",
]


@pytest.mark.parametrize("override", OUT_OF_RANGE)
def test_value_out_of_range_is_refused_by_name(tmp_path, override):
    assert override.split("=")[0] in message(tmp_path, "", override)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["optim.steps=5", "optim.warmup_steps=6"], "optim.warmup_steps"),
        (["optim.cooldown_epochs=1"], "optim.cooldown_epochs"),
        (["optim.steps=5", "optim.cooldown_steps=1"], "optim.cooldown_steps"),
        (
            [
                "optim.schedule=constant_cooldown",
                "optim.steps=5",
                "optim.warmup_steps=3",
                "optim.cooldown_steps=3",
            ],
            "optim.cooldown_steps: 3 is above 2",
        ),
        (["stages.small={from_step: 1, hight: 4}"], "stages.small.hight"),
        (["stages.small={mask_ratio: 1}"], "stages.small.mask_ratio"),
        (["engine.offload=optimizer", "engine.zero_stage=0"], "engine.offload"),
        (
            [
                "objective.learn_temperature=true",
                "objective.contrastive_weight=1",
                "objective.temperature=1",
            ],
            "objective.temperature",
        ),
        (["model.embed_dim=9", "model.num_heads=3"], "model.embed_dim"),
        (["data.crop=random_resized", "data.crop_scales=[1.0, 0.2]"], "data.crop"),
    ],
)
def test_knobs_that_contradict_each_other_are_named(tmp_path, overrides, said):
    assert said in message(tmp_path, "", *overrides)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model:\n  depth: 2\n  depth: 3\n", "duplicate key depth"),
        ("seed: 1\nmodel: {}\nseed: 2\n", "duplicate key seed"),
        ("- seed: 1\n", "key: value"),
        ("3\n", ""),
        ("true\n", ""),
        ("seed: {1", "line 1"),
        ("\tseed: 1", "line 1"),
        ("output: ${seed}\n", "${"),
        ("output: ${oc.env:HOME}\n", "${"),
        ("output: ${\n", "${"),
        ("data: {source: 'x${model.depth}'}\n", "${"),
        ("output: !!python/object/apply:os.getcwd []\n", "python/object"),
        ("1: 2\n", "unknown key 1"),
        ("null: 2\n", "key"),
        ("output: a\x00b\n", "control characters"),
        ("seed 1\n", "seed 1"),
    ],
)
def test_file_that_is_no_configuration_says_why(tmp_path, text, said):
    assert said in message(tmp_path, text)


def test_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ValueError, match=r"^[^\n]*binary\.yaml: [^\n]*$"):
        load_config(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    "override",
    [
        "model.depth",
        "=3",
        "--seed=1",
        "",
        "model depth=3",
        "model..depth=1",
        ".=1",
        "seed =1",
        "optim.betas=[0.9,",
        "optim.steps=",
        "model.depth=${seed}",
    ],
)
def test_override_that_is_no_assignment_is_refused(tmp_path, override):
    assert message(tmp_path, "", override)


@pytest.mark.parametrize("schema", [PretrainConfig, ModelConfig, OptimConfig])
def test_help_tells_every_key_with_default_and_meaning(schema):
    text = describe(schema)
    for f in dataclasses.fields(schema):
        assert f.metadata["meaning"] in text
    for key in flatten(schema()):
        assert f"  {key} = " in text
    assert "{tube | random | random_kept | frame}" in text or schema is not PretrainConfig
    assert text.isascii()


class Ranged(Knobs):
    """Knobs with ranges, and a section with other defaults than its own."""

    ratio: float = knob(0.5, "a share", above=0, high=1)
    sides: tuple[int, ...] = knob((2,), "sides", filled=True, low=2, multiple_of=2)
    steps: int | None = knob(None, "a number of steps", low=1)
    model: ModelConfig = section(ModelConfig, "the model", depth=7)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("ratio=0", "ratio: 0.0 must be above 0, at most 1"),
        ("ratio=1.5", "ratio: 1.5 must be above 0, at most 1"),
        ("ratio=.inf", "ratio: inf must be above 0, at most 1"),
        ("sides=[4, 3]", "sides: (4, 3) must be at least 2, a multiple of 2"),
        ("sides=[]", "sides: (empty) must be given"),
        ("steps=0", "steps: 0 must be at least 1, or null"),
        ("model.depth=0", "model.depth: 0 must be at least 1, at most 1024"),
    ],
)
def test_a_range_stands_with_its_knob_and_is_told(override, said):
    with pytest.raises(ValueError, match=r"must") as error:
        parse(None, [override], Ranged)
    assert str(error.value) == said
    for limits in (
        "(above 0, at most 1)",
        "(at least 2, a multiple of 2)",
        "(at least 1, or null)",
    ):
        assert limits in describe(Ranged)


def test_a_section_may_have_other_defaults():
    assert parse(None, [], Ranged).model == ModelConfig(depth=7)
    assert parse(None, ["model.width=64"], Ranged).model == ModelConfig(depth=7, width=64)
    assert parse(None, ["model.preset=large"], Ranged).model == ModelConfig.preset("large")
    assert "model.depth = 7 " in describe(Ranged)


def test_configurations_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PretrainConfig().model.depth = 3  # pyright: ignore[reportAttributeAccessIssue]


class Inner(Knobs):
    """A section of another stage."""

    size: int = knob(1, "a size")


class Other(Knobs):
    """Another stage."""

    inner: Inner = section(Inner, "the inner section")
    table: dict[str, Any] = field(default_factory=dict)


def test_other_stages_are_read_with_the_same_care(tmp_path):
    assert parse(None, ["inner.size=3"], Other) == Other(inner=Inner(size=3))
    for wrong in (["inner.siz=3"], ["inner.size=x"], ["iner.size=3"]):
        with pytest.raises(ValueError, match=r"^[^\n]*inn?er[^\n]*$"):
            parse(None, wrong, Other)


@pytest.mark.parametrize(
    ("config", "grid", "tokens", "values"),
    [
        (ModelConfig(), (8, 14, 14), 1568, 1536),
        (ModelConfig.preset("giant"), (8, 16, 16), 2048, 1176),
        (ModelConfig(num_frames=1, tubelet_size=1), (1, 14, 14), 196, 768),
        (replace(ODD.model, height=32, width=48), (1, 2, 3), 6, 256),
    ],
)
def test_grid_and_sizes(config, grid, tokens, values):
    assert (config.grid, config.num_tokens, config.tubelet_values) == (grid, tokens, values)
    assert math.prod(config.tubelet) * config.in_channels == values


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"model\.preset: .*small, base, large, huge, giant"):
        ModelConfig.preset("tiny")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optim.betas=[0.9]", r"optim\.betas: \[0\.9\] is not of type tuple\[float, float\]"),
        ("optim.micro_batch={a: 1}", r"optim\.micro_batch: \{'a': 1\} is not of type int"),
    ],
)
def test_a_value_of_the_wrong_shape_is_shown_as_it_was_written(tmp_path, override, said):
    (tmp_path / "c.yaml").write_text("{}")
    with pytest.raises(ValueError, match=said):
        load_config(tmp_path / "c.yaml", [override])
