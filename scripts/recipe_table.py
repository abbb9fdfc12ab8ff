"""Prints docs/recipes.md, which is made of the headers of the recipes."""

import re
from pathlib import Path

import yaml

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
STAGES = {
    "pretrain": "Pretraining",
    "finetune": "Fine-tuning",
    "evaluate": "Tests",
    "probe": "Probes",
}
PAGE = """# Recipes

A recipe is a file of `configs/`, in the folder of its stage. Its header has the source, what it
expects, hardware, batch, what differs and the command. It states what differs from its `base`,
another file of the same folder, which has none itself; RUN/config.yaml always holds all of it.
Figures are those of the sources, of their own code and data: none of them was reproduced here.
UNTESTED: nobody has run the recipe with this library at full size; the tests run two steps of each
at a small size. What a source does not state is marked as such in the header.

`optim.global_batch` is the number of videos a step that the learning rate belongs to. It is cut for
the ranks that there are, each of which takes at most `optim.micro_batch` videos at once, so that a
recipe is the same run on any number of GPUs that divides it
([docs/clusters.md](clusters.md#the-same-run-on-any-number-of-gpus) says what stays the same).

This page is made of the files by `scripts/recipe_table.py`.
"""


def header(path: Path) -> dict[str, str]:
    """The title, under "", and the items of a header, each on one line."""
    items, key = {}, ""
    for line in path.read_text().splitlines():
        if not line.startswith("# "):
            break
        found = re.match(r"# ([A-Z]\w+): ", line)
        if found:
            key = found[1]
            line = line[found.end() - 2 :]
        items[key] = f"{items.get(key, '')} {line[2:].strip()}".strip()
    return items


def data_of(path: Path) -> str:
    """The folder, or folders, that a recipe reads."""
    values = yaml.safe_load(path.read_text())
    data = values.get("data", {})
    if "sources" in data:
        return ", ".join(folder(source["source"]) for source in data["sources"].values())
    if "source" in data or "train" in values:
        return folder(data.get("source") or values["train"])
    return data_of(path.parent / values["base"]) if "base" in values else "as given"


def folder(source: str) -> str:
    """The data set of data/NAME/..."""
    return source.split("/")[1]


def cell(text: str) -> str:
    """A text in a row of a table."""
    return text.replace("|", "\\|")


def main() -> None:
    """Prints the page."""
    print(PAGE.strip())
    for stage, name in STAGES.items():
        print(f"\n## {name}\n")
        print("| recipe | what | data | source | published figure | hardware | our status |")
        print("|---|---|---|---|---|---|---|")
        for path in sorted((CONFIGS / stage).glob("*.yaml")):
            items = header(path)
            figure = re.split(r"[.:,;]? [Tt]he source's figures?", items["Expected"])[0].rstrip(".")
            row = [
                f"[{path.stem}](../configs/{stage}/{path.name})",
                items[""].rstrip("."),
                data_of(path),
                items["Source"].rstrip("."),
                figure,
                items["Hardware"].rstrip("."),
                items["Status"].rstrip("."),
            ]
            print(f"| {' | '.join(map(cell, row))} |")


if __name__ == "__main__":
    main()
