"""A headless Chromium, driven through chromedriver by the W3C's WebDriver protocol: HTTP and JSON, no package."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
MISSING = None if CHROMIUM and DRIVER else "no chromium and chromedriver here (Debian: apt-get install chromium-driver)"

KEYS = {
    "Enter": "\ue007", "Escape": "\ue00c", "Tab": "\ue004", "Backspace": "\ue003", "End": "\ue010", "Home": "\ue011",
    "ArrowLeft": "\ue012", "ArrowUp": "\ue013", "ArrowRight": "\ue014", "ArrowDown": "\ue015",
}  # fmt: skip


class Browser:
    """One session. Every method waits until the browser has done it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.opened = 0

    def call(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"].splitlines()[0]) from None

    def open(self, path: Path, fragment: str = "") -> None:
        """Loads a page anew, which a URL that differs in its fragment only would not."""
        self.opened += 1
        self.call("POST", "/url", {"url": f"{path.resolve().as_uri()}?{self.opened}{fragment}"})

    def run(self, script: str, *arguments: Any) -> Any:
        """Returns what a function's body returns in the page."""
        return self.call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def texts(self, selector: str) -> list[str]:
        return self.run("return [...document.querySelectorAll(arguments[0])].map((one) => one.textContent)", selector)

    def click(self, selector: str, text: str = "") -> None:
        """Clicks with the mouse on the middle of the first element that has a text."""
        find = (
            "return [...document.querySelectorAll(arguments[0])].find((one) => one.textContent.includes(arguments[1]))"
        )
        element = self.run(find, selector, text)
        assert element, f"no {selector} with {text!r}"
        self.call("POST", f"/element/{next(iter(element.values()))}/click", {})

    def press(self, *keys: str) -> None:
        """Presses keys one after the other: names, or text."""
        steps: list[dict[str, str]] = []
        for key in (KEYS.get(key, key) for key in keys):
            steps += [{"type": kind, "value": char} for char in key for kind in ("keyDown", "keyUp")]
        self.call("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": steps}]})

    def log(self, kind: str) -> list[dict[str, Any]]:
        """Returns the entries of a log since it was asked for last: ``browser`` (the console), ``performance``."""
        found: list[dict[str, Any]] = self.call("POST", "/se/log", {"type": kind})
        return found

    def requests(self) -> list[str]:
        """Returns the addresses asked for since this was asked for last, without those that a policy forbade."""
        messages = [json.loads(entry["message"])["message"] for entry in self.log("performance")]
        blocked = {one["params"]["requestId"] for one in messages if one["params"].get("blockedReason") == "csp"}
        sent = [one["params"] for one in messages if one["method"] == "Network.requestWillBeSent"]
        return [one["request"]["url"] for one in sent if one["requestId"] not in blocked]

    def size(self, width: int, height: int, dark: bool = False) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.command("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.command("Emulation.setEmulatedMedia", {"features": [scheme]})

    def command(self, name: str, parameters: dict[str, Any]) -> Any:
        return self.call("POST", "/goog/cdp/execute", {"cmd": name, "params": parameters})

    def picture(self) -> bytes:
        return base64.b64decode(self.command("Page.captureScreenshot", {"format": "png"})["data"])


@contextmanager
def browser() -> Iterator[Browser]:
    """Yields a new session of a browser that ends with the block."""
    driver = subprocess.Popen([DRIVER or "", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        port = next(found[1] for line in driver.stdout or () if (found := re.search(r"on port (\d+)\.", line)))
        made = Browser(f"http://127.0.0.1:{port}/session")
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        wanted = {
            "goog:chromeOptions": {"binary": CHROMIUM, "args": arguments},
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        found = made.call("POST", "", {"capabilities": {"alwaysMatch": wanted}})
        made.url += f"/{found['sessionId']}"
        try:
            yield made
        finally:
            made.call("DELETE", "")
    finally:
        driver.terminate()
        driver.wait()
