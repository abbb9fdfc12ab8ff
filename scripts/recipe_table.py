"""Prints docs/recipes.md, which is made of the headers of the recipes."""

import re

from video_mae.tools.recipes import FOLDER, header

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
        for path in sorted((FOLDER / stage).glob("*.yaml")):
            items = header(path)
            figure = re.split(r"[.:,;]? [Tt]he source's figures?", items["Expected"])[0].rstrip(".")
            row = [
                f"[{path.stem}](../configs/{stage}/{path.name})",
                items[""].rstrip("."),
                items["Data"].rstrip("."),
                items["Source"].rstrip("."),
                figure,
                items["Hardware"].rstrip("."),
                items["Status"].rstrip("."),
            ]
            print(f"| {' | '.join(map(cell, row))} |")


if __name__ == "__main__":
    main()
