"""Pages looked at in headless Chromium, driven through ChromeDriver's WebDriver protocol (W3C)."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ARGUMENTS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking")
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's own name of a reference
START_S, ANSWER_S = 30.0, 120.0


class Browser:
    """One window."""

    def __init__(self, port: int):
        self._root = f"http://127.0.0.1:{port}"
        wanted = {
            "goog:chromeOptions": {"args": list(ARGUMENTS)},
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        session = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._root += f"/session/{session['sessionId']}"

    def open(self, page: Path) -> None:
        """Open a file."""
        self._call("POST", "/url", {"url": page.resolve().as_uri()})

    def emulate(self, *, width: int, scheme: str, height: int = 900) -> None:
        """Be a screen of that size whose owner prefers `light` or `dark`."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        for command, values in (
            ("Emulation.setDeviceMetricsOverride", size),
            ("Emulation.setEmulatedMedia", media),
        ):
            self._call("POST", "/goog/cdp/execute", {"cmd": command, "params": values})

    def run(self, script: str) -> Any:
        """What a script returns."""
        return self._call("POST", "/execute/sync", {"script": script, "args": []})

    def wait_for(self, condition: str) -> None:
        """Until a script's expression is true."""
        deadline = time.monotonic() + ANSWER_S
        while not self.run(f"return Boolean({condition})"):
            assert time.monotonic() < deadline, self.run("return document.body.innerText")
            time.sleep(0.1)

    def type(self, selector: str, text: str) -> None:
        """Type into an element."""
        found = self._call("POST", "/element", {"using": "css selector", "value": selector})
        self._call("POST", f"/element/{found[ELEMENT]}/value", {"text": text})

    def complaints(self) -> list[str]:
        """What the console has been told so far, requests that failed among it."""
        return [one["message"] for one in self._call("POST", "/se/log", {"type": "browser"})]

    def close(self) -> None:
        """Close the window."""
        self._call("DELETE", "")

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        request = urllib.request.Request(
            self._root + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=ANSWER_S) as response:
            return json.load(response)["value"]


@contextmanager
def open_browser() -> Iterator[Browser]:
    """A browser without a window on any screen; the test is skipped where there is none."""
    driver = shutil.which("chromedriver")
    if driver is None:
        pytest.skip("needs Chromium and ChromeDriver (Debian: chromium, chromium-driver)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([driver, f"--port={port}"], stdout=subprocess.DEVNULL)
    try:
        _wait_for_port(port)
        browser = Browser(port)
        try:
            yield browser
        finally:
            browser.close()
    finally:
        process.terminate()
        process.wait()


def _wait_for_port(port: int) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < deadline, "ChromeDriver does not answer"
            time.sleep(0.1)
