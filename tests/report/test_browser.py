"""Pages as a browser shows them: nothing is clipped, broken or asked of the network, on a desk and
on a phone.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import browser
import pytest
import run_folders

from video_mae.report.compare import CompareConfig, start
from video_mae.report.page import write_report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        browser.program() is None, reason=f"none of {', '.join(browser.PROGRAMS)} is installed"
    ),
]
SCREENS = {"desk": (1280, 800, "light", False), "phone": (390, 844, "dark", True)}


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Tab]:
    with browser.browser(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("runs")
    runs = {
        "pretraining": run_folders.pretraining(base / "demo", finished=False, steps=840),
        "fine-tuning": run_folders.evaluation(run_folders.fine_tuning(base / "tuned")),
        "60 classes": run_folders.evaluation(base / "test", 60, 400),
    }
    shutil.copytree(base / "demo", base / "demo.earlier_1")
    pages = {name: write_report(folder) for name, folder in runs.items()}
    pages["comparison"] = base / "compare.html"
    folders = [str(base / name) for name in ("demo", "demo.earlier_1", "tuned", "test")]
    start(folders, CompareConfig(output=str(pages["comparison"])))
    return pages


@pytest.mark.parametrize("name", ["pretraining", "fine-tuning", "60 classes", "comparison"])
@pytest.mark.parametrize("screen", SCREENS)
def test_a_page_is_whole(tab: browser.Tab, pages: dict[str, Path], name: str, screen: str) -> None:
    tab.open(pages[name], *SCREENS[screen])
    assert tab.run(browser.FAULTS) == []
    assert tab.errors == []
    assert tab.requests == []


def test_a_curve_tells_its_values_under_the_mouse(tab: browser.Tab, pages: dict[str, Path]) -> None:
    tab.open(pages["pretraining"], *SCREENS["desk"])
    place = tab.run(
        "(() => {const one = document.querySelector('[data-figure]'); one.scrollIntoView();"
        "const box = one.getBoundingClientRect();"
        "return [box.left + box.width / 2, box.top + box.height / 3]})()"
    )
    tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=place[0], y=place[1])
    text = tab.run(
        "new Promise(done => setTimeout(() => done("
        "document.querySelector('.hoverlayer').textContent), 500))"
    )
    assert "demo: loss" in text


def test_the_checks_of_a_page_can_fail(tab: browser.Tab, pages: dict[str, Path]) -> None:
    """They find what is wrong in a page that was spoilt."""
    page = pages["pretraining"].with_name("spoilt.html")
    text = pages["pretraining"].read_text()
    text = text.replace("margin: {l: 10", "margin: {autoexpand: false, l: 0").replace(
        "UklGR", "UklGQ", 1
    )
    text = text.replace("<h1>", '<img src="http://127.0.0.1:9/x.png"><h1 style="width: 3000px">')
    page.write_text(text)
    tab.open(page, *SCREENS["desk"])
    faults = " ".join(tab.run(browser.FAULTS))
    assert "page: 3" in faults
    assert "clipped: " in faults
    assert faults.count("picture: ") >= 2
    assert tab.errors  # the policy of the page refused the picture
    tab.errors.clear()
    tab.requests.clear()
