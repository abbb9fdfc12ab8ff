"""What `make demo` ends with: the figures of its runs, as their metrics.json have them."""

import json
from pathlib import Path
from typing import Any

RUNS = Path("runs")
KINDS = (
    ("linear", "linear probe"),
    ("attentive", "attentive probe"),
    ("knn", "nearest neighbours"),
)


def read(folder: str) -> dict[str, Any]:
    """The metrics of a run. Raises: FileNotFoundError."""
    return json.loads((RUNS / folder / "metrics.json").read_text())


def main() -> None:
    """Prints accuracies on videos of photographs that no training has seen, pretrained beside
    random weights.
    """
    probes = [read(f"demo_probe_{weights}")["probes"] for weights in ("pretrained", "random")]
    tuned = [read(f"demo_{run}") for run in ("finetuned", "scratch")]
    print(f"top-1 on {tuned[0]['videos']} videos of unseen photographs, 8 actions, chance 12.5 %")
    print(f"{'':22}{'pretrained':>12}{'random weights':>16}")
    for kind, words in KINDS:
        print(
            f"{words:22}"
            + "".join(
                f"{probe[kind]['test']['top1']:>{width}.1%}"
                for probe, width in zip(probes, (12, 16), strict=True)
            )
        )
    print(
        f"{'fine-tuned':22}"
        + "".join(
            f"{metrics['top1']:>{width}.1%}" for metrics, width in zip(tuned, (12, 16), strict=True)
        )
    )
    for what in (
        "demo/report.html",
        "demo/unseen.png",
        "demo/reconstructions",
        "demo_finetuned/best",
        "demo_finetuned/report.html",
        "demo_finetuned/confusion.png",
        "demo_finetuned/predictions.jsonl",
    ):
        print(f"  {RUNS / what}")


if __name__ == "__main__":
    main()
