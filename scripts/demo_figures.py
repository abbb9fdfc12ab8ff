"""What `make demo` ends with: the figures of its runs, as these have written them."""

import json
from pathlib import Path
from typing import Any

from video_mae.files import read_jsonl

RUNS = Path("runs")


def read(folder: str) -> dict[str, Any]:
    """The metrics of a run. Raises: FileNotFoundError."""
    return json.loads((RUNS / folder / "metrics.json").read_text())


def main() -> None:
    """Prints accuracies on videos of photographs that no training has seen: of frozen features
    while they were learned, and fine-tuned beside random weights.
    """
    num_classes = len((Path("data") / "demo" / "classes.txt").read_text().splitlines())
    print(f"\ntop-1 on videos of unseen photographs, {num_classes} actions")
    print(f"{'chance':38}{1 / num_classes:>8.1%}")
    for line in read_jsonl(RUNS / "demo" / "metrics.jsonl"):
        if "probe_ridge" in line:
            what = f"frozen, linear, after step {line['step']}"
            print(f"{what:38}{line['probe_ridge']:>8.1%}")
    pretrained, scratch = (read(f"demo_{run}")["top1"] for run in ("finetuned", "scratch"))
    print(f"{'fine-tuned':38}{pretrained:>8.1%}")
    print(f"{'the same from random weights':38}{scratch:>8.1%}")
    if pretrained <= scratch:
        print(
            "minutes of pretraining were too few to help here: experiments/README.md has what "
            "longer ones do"
        )
    for what in (
        "demo/report.html",
        "demo/unseen",
        "demo/reconstructions",
        "demo_finetuned/best",
        "demo_finetuned/report.html",
        "demo_finetuned/predictions.jsonl",
    ):
        print(f"  {RUNS / what}")


if __name__ == "__main__":
    main()
