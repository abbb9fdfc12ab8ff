"""Headless Chromium over its debugging pipe: pages as a person sees them, without any package."""

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECONDS = 120.0
# What a person would call clipped, overflowing or broken. Texts of plots are measured against the
# plot that they are in; what scrolls by itself may be wider than the page.
FAULTS = """
(async () => {
  const faults = [];
  const page = document.documentElement;
  for (const details of document.querySelectorAll("details")) details.open = true;
  if (page.scrollWidth > innerWidth + 1) faults.push(`page: ${page.scrollWidth} wide`);
  const scrolls = (one) => one.closest(".scroll") !== null;
  for (const one of document.querySelectorAll("main *:not(svg *)")) {
    const box = one.getBoundingClientRect();
    if (box.width && box.right > innerWidth + 1 && !scrolls(one) && !one.closest("svg"))
      faults.push(`right of the page: ${one.tagName} ${one.textContent.slice(0, 40)}`);
  }
  for (const plot of document.querySelectorAll("[data-figure]")) {
    const frame = plot.getBoundingClientRect();
    if (!plot.querySelector(".main-svg")) faults.push("a plot that is not drawn");
    if (!plot.querySelector(".trace, .hm, image, .plot .point, .barlayer path")) faults.push("an empty plot");
    const boxes = [];
    for (const text of plot.querySelectorAll("svg text")) {
      const box = text.getBoundingClientRect();
      if (!box.width || !box.height) continue;
      for (const [other, words] of boxes)
        if (Math.min(box.right, other.right) - Math.max(box.left, other.left) > 2 &&
            Math.min(box.bottom, other.bottom) - Math.max(box.top, other.top) > 4)
          faults.push(`overlapping: ${words} and ${text.textContent}`);
      boxes.push([box, text.textContent]);
      if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1 || box.bottom > frame.bottom + 1)
        faults.push(`clipped: ${text.textContent}`);
    }
  }
  const images = [...document.images];
  await Promise.all(images.map((one) => one.decode().catch(() => faults.push(`picture: ${one.alt}`))));
  for (const one of images) if (one.naturalWidth < 2) faults.push(`picture: ${one.alt}`);
  return faults;
})()
"""


class Tab:
    """A page; `errors` of its console and `requests` for anything but itself are collected."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from, self._number = to_browser, from_browser, 0
        self._rest, self._session = b"", None
        self.errors: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, page: Path, width: int, height: int, scheme: str, touch: bool = False) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=touch,
        )
        self.call("Emulation.setTouchEmulationEnabled", enabled=touch)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[feature])
        self._loaded = False
        self.call("Page.navigate", url=page.resolve().as_uri())
        while not self._loaded:
            self._read()

    def run(self, script: str) -> Any:
        options = {"expression": script, "awaitPromise": True, "returnByValue": True}
        answer = self.call("Runtime.evaluate", **options)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def picture(self, file: Path) -> None:
        """All of the page."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True, format="png")
        file.write_bytes(base64.b64decode(shot["data"]))

    def print(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self.call("Page.printToPDF")["data"]))

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._from, 1 << 20)
            assert part, "the browser has ended"
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\0")
        event = json.loads(line)
        self._take(event.get("method", ""), event.get("params", {}))
        return event

    def _take(self, method: str, of: dict[str, Any]) -> None:
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Runtime.exceptionThrown":
            self.errors.append(str(of["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and of["type"] in ("error", "warning", "assert"):
            self.errors.append(str(of["args"]))
        elif method == "Log.entryAdded" and of["entry"]["level"] in ("error", "warning"):
            self.errors.append(str(of["entry"]))
        elif method == "Network.requestWillBeSent":
            url = of["request"]["url"]
            if not url.startswith(("file:", "data:", "blob:", "about:")):
                self.requests.append(url)


def program() -> str | None:
    """The browser of this machine, if it has one."""
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


@contextmanager
def browser(profile: Path) -> Iterator[Tab]:
    """A browser that ends with the block."""
    name = program()
    assert name is not None
    (to_read, to_write), (from_read, from_write) = os.pipe(), os.pipe()
    options = "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run"
    command = f'exec "$0" {options} --remote-debugging-pipe "--user-data-dir=$1" 3<&{to_read} 4>&{from_write}'
    process = subprocess.Popen(
        ["bash", "-c", command, name, str(profile)],
        pass_fds=(to_read, from_write),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_read)
    os.close(from_write)
    try:
        yield Tab(to_write, from_read)
    finally:
        os.close(to_write)
        os.close(from_read)
        process.terminate()
        process.wait(SECONDS)
        time.sleep(0.2)  # its processes leave the profile
