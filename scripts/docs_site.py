"""What `make docs` adds to mkdocs: pages lie at their paths in the repository, formulas are MathML,
and nothing on a page asks the network.
"""

import re
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import fromstring

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

from video_mae.cli import STAGES, schema_of
from video_mae.config.explain import describe

ROOT = Path(__file__).resolve().parents[1]
WANTED = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "LICENSE",
    "docs/*",
    "configs/*/*.yaml",
    "examples/*.py",
    "experiments/*.md",
    "benchmarks/README.md",
    "benchmarks/results/**/*",
)
"""What pages are made of, and what they link to."""
KEYS = re.compile("<!-- keys of (\\w+) -->")
ASKS = re.compile(r"""<(?:script|img|iframe|source)[^>]*\ssrc=["']?(?:https?:)?//""")
LINKS = re.compile(r"<link[^>]*>")
OTHERS = re.compile(
    r"""rel=["']?(?:stylesheet|icon|preload|preconnect)[^>]*href=["']?(?:https?:)?//"""
)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Has ```math fences formatted here."""
    fence = {"name": "math", "class": "math", "format": formula}
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [fence]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The files of the theme and of plugins, and those of the repository."""
    found = [
        file for file in files if not Path(file.abs_src_path or "/").is_relative_to(ROOT / "docs")
    ]
    for pattern in WANTED:
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file():
                place = path.relative_to(ROOT).as_posix()
                found.append(File.generated(config, place, abs_src_path=str(path)))
    return Files(found)


def on_page_markdown(markdown: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Puts what `video-mae STAGE --help all` prints where `<!-- keys of STAGE -->` stands."""

    def keys(found: re.Match[str]) -> str:
        return f"### {found[1]}\n\n```text\n{describe(schema_of(STAGES[found[1]]))}\n```"

    return KEYS.sub(keys, markdown)


def on_post_page(output: str, page: Any, config: MkDocsConfig) -> str:
    """Ends the build where a page would fetch something. Raises: PluginError."""
    asked = ASKS.findall(output) + [link for link in LINKS.findall(output) if OTHERS.search(link)]
    if asked:
        raise PluginError(f"{page.file.src_uri}: asks the network: {asked[0]}")
    return output


def formula(source: str, *_: Any, **__: Any) -> str:
    """A formula as MathML, which browsers draw by themselves."""
    text = convert(source.replace(r"\_", "_"), display="block")
    fromstring(text)  # not half a formula
    return f'<div style="overflow: auto hidden; padding: 0.5em 0">{text}</div>'
