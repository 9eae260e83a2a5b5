"""A headless Chromium that opens a page from disk: what it logs, what it asks for, what it looks like.

Enters: an HTML file. Leaves: JavaScript values, screenshots, a PDF, and every console message, error and request.
Spoken with Chromium's own DevTools protocol over one websocket (https://chromedevtools.github.io/devtools-protocol/).
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from websockets.sync.client import connect

NAMES = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 60  # seconds for the browser to start, or to answer


def find() -> str | None:
    """The path of a Chromium on this machine."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One Chromium with one page: `with Browser() as browser: browser.open(file)`."""

    def __enter__(self) -> Browser:
        with ExitStack() as stack:
            self.home = stack.enter_context(
                tempfile.TemporaryDirectory(prefix="bouquet-chromium-", ignore_cleanup_errors=True)
            )
            options = [
                "--headless=new",
                "--disable-gpu",
                "--hide-scrollbars",
                "--no-first-run",
                "--remote-debugging-port=0",
            ]
            # root has no sandbox
            options += ["--no-sandbox"] * (os.geteuid() == 0) + [f"--user-data-dir={self.home}", "about:blank"]
            self.process = subprocess.Popen([find(), *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            stack.callback(self._end)
            self.socket = stack.enter_context(
                connect(self._page(), max_size=None, compression=None, open_timeout=PATIENCE)
            )
            self.numbers, self.events = itertools.count(1), []
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.send(f"{domain}.enable")
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def _end(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _page(self) -> str:
        """The websocket of its only page, once it is up."""
        file, end = Path(self.home) / "DevToolsActivePort", time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if file.is_file() and (words := file.read_text().split()):
                with urllib.request.urlopen(f"http://127.0.0.1:{words[0]}/json", timeout=PATIENCE) as answer:
                    if pages := [target for target in json.load(answer) if target["type"] == "page"]:
                        return pages[0]["webSocketDebuggerUrl"]
            time.sleep(0.1)
        raise TimeoutError("Chromium did not start")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command and its answer; what happens meanwhile goes to `events`."""
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            told = json.loads(self.socket.recv(PATIENCE))
            if told.get("id") == number:
                assert "error" not in told, told
                return told["result"]
            self.events.append(told)

    def look(self, width: int, height: int = 900, dark: bool = False) -> None:
        """The size of the window in CSS pixels (a phone has 360), and which colours the person prefers."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.send(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        )

    def open(self, file: Path) -> None:
        """Load a file from disk, to its end."""
        self.visit(file.resolve().as_uri())

    def visit(self, url: str) -> None:
        """Load a page, to its end."""
        self.events.clear()
        self.send("Page.navigate", url=url)
        end = time.monotonic() + PATIENCE
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            assert time.monotonic() < end, "the page did not load"
            self.js("1")

    def js(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def key(self, name: str, code: int) -> None:
        """A key pressed and let go, as by a person: ("ArrowLeft", 37)."""
        for kind in ("rawKeyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code)

    def complaints(self) -> list[str]:
        """Console messages, exceptions and the browser's own errors since the page was opened."""
        bad = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [json.dumps(event["params"]) for event in self.events if event["method"] in bad]

    def requests(self) -> list[str]:
        """What the page asked for, beside itself and what it carries."""
        urls = [
            event["params"]["request"]["url"] for event in self.events if event["method"] == "Network.requestWillBeSent"
        ]
        return [url for url in urls if not url.startswith(("data:", "file:"))]

    def picture(self, file: Path, selector: str = "html", margin: int = 0) -> None:
        """A PNG of one element, whole."""
        box = self.js(
            "(r => [r.x + scrollX, r.y + scrollY, r.width,"
            f" r.height])(document.querySelector({selector!r}).getBoundingClientRect())"
        )
        clip = dict(
            zip(
                ("x", "y", "width", "height"),
                (box[0] - margin, box[1] - margin, box[2] + 2 * margin, box[3] + 2 * margin),
                strict=True,
            )
        )
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=True, clip=clip | {"scale": 1})
        file.write_bytes(base64.b64decode(shot["data"]))

    def pdf(self) -> bytes:
        """What a printer would get, A4."""
        return base64.b64decode(self.send("Page.printToPDF", paperWidth=8.27, paperHeight=11.69)["data"])
