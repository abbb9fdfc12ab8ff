"""What a benchmark leaves behind: files of records that only grow, a comparison with older ones,
pages, plots; and its command.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from video_mae.benchmark import data, kernel_operations, kernels, report, step
from video_mae.benchmark.clock import Ceilings
from video_mae.benchmark.kernels import KernelBenchConfig
from video_mae.benchmark.record import (
    Percentiles,
    Record,
    Results,
    Table,
    append,
    environment,
    read,
    results_file,
    slower_table,
)
from video_mae.cli import main

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
CEILINGS = Ceilings(800e12, 3.0e12)


def cell(
    provider: str,
    ms: float,
    ours: bool = False,
    gate: str = "",
    mode: str = "forward",
    tokens: int = 160,
) -> Record:
    return Record(
        benchmark="kernels",
        op="attention",
        shape=f"s {tokens}",
        dtype="bfloat16",
        provider=provider,
        mode=mode,
        times={"cold": Percentiles(ms, 0.9 * ms, 1.1 * ms), "wall": Percentiles(9.0, 8.0, 10.0)},
        measures={
            "gate": gate,
            "is_ours": ours,
            "is_baseline": provider == "reference",
            "flops": 2e9,
            "bytes": 1e7,
            "tflops": 2 / ms,
            "gbps": 10 / ms,
            "floor_percent": 50.0,
            "peak_mb": tokens,
            "max_error": 1e-3,
            "rms_error": 1e-3,
            "bit_equal": True,
            "batch": 2,
            "heads": 3,
            "width": 64,
            "tokens": tokens,
        },
    )


def test_files_only_grow_and_give_back_what_was_written(tmp_path: Path) -> None:
    file = results_file(str(tmp_path / "results"), environment(CPU), "kernels")
    first = Results(
        {**environment(CPU), "ceilings": CEILINGS._asdict()},
        [cell("reference", 8.0), cell("ours", 1.0, ours=True)],
    )
    part = Results(
        first.header,
        [
            Record(
                benchmark="kernels",
                op="gather",
                shape="s",
                dtype="bfloat16",
                provider="p",
                mode="forward",
                reason="no CUDA",
            )
        ],
    )
    other = Results({**first.header, "date": "2031-01-01"}, [cell("reference", 7.0)])
    before = b""
    for run in (first, part, other):
        append(file, run)
        assert file.read_bytes().startswith(before)
        assert len(file.read_bytes()) > len(before)
        before = file.read_bytes()
    assert read(file) == [Results(first.header, first.records + part.records), other]
    assert {
        "device",
        "driver",
        "torch",
        "triton",
        "cuda",
        "cudnn",
        "revision",
        "date",
        "cpu",
        "threads",
    } <= set(read(file)[0].header)
    file.write_text(file.read_text() + "{}\n")
    with pytest.raises(ValueError, match=r"kernels\.jsonl: line 8 is not a benchmark record"):
        read(file)


def test_a_slow_down_is_found_on_an_equal_device_only() -> None:
    old = Results(
        {"device": "one"}, [cell("a", 1.0), cell("b", 1.0), cell("c", 1.0), cell("wide", 1.0)]
    )
    wide = cell("wide", 1.08)  # slower, but within what its calls vary
    now = Results({"device": "one"}, [cell("a", 1.5), cell("b", 0.5), cell("new", 9.0), wide])
    table = slower_table(now, [old], "old")
    assert [row[3:] for row in table.rows] == [["a", "forward", "cold", "1", "1.5", "1.50"]]
    assert table.notes == ["1 of 6 times are longer"]
    elsewhere = slower_table(now, [Results({"device": "two"}, old.records)], "old")
    assert elsewhere.rows == []
    assert elsewhere.notes == ["nothing to compare: old has no equal cell of one"]
    # the newest counts
    newer = Results({"device": "one"}, [cell("a", 1.5)])
    assert slower_table(now, [old, newer], "old").rows == []


def test_a_page_and_plots_are_made_from_records_alone(tmp_path: Path) -> None:
    file = tmp_path / "kernels.jsonl"
    header = {**environment(CPU), "dtype": "bfloat16", "ceilings": CEILINGS._asdict()}
    for date, factor, lengths in (
        ("2030-01-01", 2.0, (160, 1568)),
        ("2031-01-01", 1.0, (160, 784)),
    ):
        append(
            file,
            Results(
                {**header, "date": date},
                [
                    cell(
                        provider,
                        factor * tokens / 100,
                        ours=provider == "ours",
                        mode=mode,
                        tokens=tokens,
                    )
                    for tokens in lengths
                    for provider in ("reference", "ours")
                    for mode in ("forward", "backward")
                ],
            ),
        )
    made = report.write_page(file, kernels.tables, ["how to read"])
    assert [path.name for path in made] == [
        "kernels.md",
        "kernels_roofline.png",
        "kernels_tokens.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in made[1:])
    page = made[0].read_text()
    order = [
        page.index(words)
        for words in (
            "2031-01-01",
            "### attention: s 160, bfloat16",
            "2030-01-01",
            "### attention: s 1568",
        )
    ]
    assert order == sorted(order)
    # what was measured again replaces it; the ratios are of one run
    assert page.count("### attention: s 160") == 1
    assert "| forward | ours | 1.6 |" in page
    assert "![kernels_roofline](kernels_roofline.png)" in page
    assert "- how to read" in page
    for path in made:
        path.unlink()
    assert [path.read_bytes()[:4] for path in report.write_page(file, kernels.tables)][1:] == [
        b"\x89PNG"
    ] * 2


def test_another_benchmark_has_a_page_without_plots(tmp_path: Path) -> None:
    step = Record(
        benchmark="step",
        op="step",
        shape="base",
        dtype="bfloat16",
        provider="ours",
        mode="full",
        times={"step": Percentiles(1, 1, 1)},
    )
    append(
        tmp_path / "step.jsonl",
        Results({**environment(CPU), "ceilings": CEILINGS._asdict()}, [step]),
    )
    made = report.write_page(
        tmp_path / "step.jsonl",
        lambda run: [Table("steps", ["provider"], [[r.provider] for r in run.records])],
    )
    assert [path.name for path in made] == ["step.md"]
    assert "| ours |" in made[0].read_text()


@pytest.mark.parametrize("benchmark", [data, kernels, step])
def test_the_committed_pages_are_what_their_records_give(benchmark: Any, tmp_path: Path) -> None:
    name = benchmark.__name__.rsplit(".", 1)[1]
    committed = sorted((ROOT / "benchmarks" / "results").glob(f"*/{name}.jsonl"))
    assert committed
    for number, records in enumerate(committed):
        file = tmp_path / str(number) / records.name
        file.parent.mkdir()
        shutil.copy(records, file)
        page = report.write_page(file, benchmark.tables, benchmark.NOTES)[0]
        assert page.read_text() == records.with_suffix(".md").read_text()


def test_tables_are_aligned_and_markdown() -> None:
    table = Table(
        "title", ["name", "ms"], [["a", "1.5"], ["long name", "12"], ["c|d", "-"]], ["a note"]
    )
    assert table.text().splitlines() == [
        "title",
        "name        ms",
        "--------------",
        "a          1.5",
        "long name   12",
        "c|d          -",
        "  a note",
    ]
    assert table.markdown().splitlines()[2:5] == ["| name | ms |", "|---|---|", "| a | 1.5 |"]
    assert "| c/d | - |" in table.markdown()


def status(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_of:
        main(arguments)
    return int(exit_of.value.code or 0)


def test_the_command_measures_writes_and_compares(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # compiling takes long
    monkeypatch.setattr(kernel_operations, "compiled", lambda function: function)
    command = ["bench", "ops=gather", "quick=true", f"output={tmp_path}"]
    assert status(*command) == 0
    (file,) = tmp_path.rglob("kernels.jsonl")
    text = capsys.readouterr().out
    for words in (
        "gather: small",
        "ours auto (reference)",
        "not available: ValueError: gather_tubelets: impl triton",
        torch.__version__,
    ):
        assert words in text
    assert file.with_suffix(".md").exists()
    (run,) = read(file)
    assert run.header["ceilings"]["flops_per_second"] > 1e9
    slow = tmp_path / "old.jsonl"
    append(
        slow,
        Results(
            run.header,
            [
                Record(
                    **{
                        **vars(record),
                        "times": {
                            way: Percentiles(*(ms / 1e3 for ms in times))
                            for way, times in record.times.items()
                        },
                    }
                )
                for record in run.records
            ],
        ),
    )
    assert (
        status(
            "bench",
            "kernels",
            "ops=gather",
            "--baseline",
            str(slow),
            "quick=true",
            f"output={tmp_path}",
        )
        == 0
    )
    assert "5 of 5 times are longer" in capsys.readouterr().out
    assert len(read(file)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ops=gathering"], "ops: gathering is not one of gather, embed"),
        (["shapes=nowhere"], "shapes: no shape has nowhere in its name"),
        (["--baseline", "/no/file.jsonl"], "/no/file.jsonl: no such file"),
        (["dtype=int8"], "dtype"),
        (["baselines=x"], "baseline"),
        (["providers=nobody", "ops=gather"], "providers: no provider has nobody in its name"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status("bench", f"output={tmp_path}", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_help_explains_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert status("bench", "--help") == 0
    text = capsys.readouterr().out
    for f in fields(KernelBenchConfig):
        assert f"  {f.name} = " in text
    assert "--baseline FILE" in text
    assert "--compile-check" in text
    assert status("bench", "kernels", "--help") == 0


def test_the_compile_check_is_an_option_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    check: Callable[[list[str]], int] = lambda arguments: calls.append(arguments) or 1  # noqa: E731
    monkeypatch.setattr("video_mae.kernels.compile_check.main", check)
    assert status("bench", "--compile-check") == 1
    assert status("bench", "compile_check=true") == 1
    assert calls == [[], []]


LACKING = (
    "av",
    "decord",
    "deepspeed",
    "matplotlib",
    "PIL",
    "safetensors",
    "torchcodec",
    "torchvision",
    "transformers",
)


def test_the_module_runs_alone(tmp_path: Path) -> None:
    """With torch, triton, einops, NumPy, PyYAML and tqdm."""
    blocks = "".join(f"sys.modules[{name!r}] = None\n" for name in LACKING)
    (tmp_path / "sitecustomize.py").write_text(f"import sys\n{blocks}")
    command = [
        "-m",
        "video_mae",
        "bench",
        "kernels",
        "quick=true",
        "ops=gather",
        "providers=ours",
        f"output={tmp_path}",
    ]
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    finished = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    assert "gather: small" in finished.stdout
    assert "no plots: " in finished.stdout
    (file,) = tmp_path.rglob("kernels.jsonl")
    assert "gather: small" in file.with_suffix(".md").read_text()
    assert [record.op for results in read(file) for record in results.records] == ["gather"] * 2
