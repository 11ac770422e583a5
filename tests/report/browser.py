"""Headless Chromium through ChromeDriver's HTTP protocol, with only the standard library."""

import base64
import contextlib
import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip


def find():
    """(chromium, chromedriver), or None."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


class Page:
    """A tab. width, height: of the viewport, in CSS pixels."""

    def __init__(self, base):
        self._base = base

    def _post(self, what, body):
        request = urllib.request.Request(
            f"{self._base}/{what}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def cdp(self, command, **parameters):
        return self._post("goog/cdp/execute", {"cmd": command, "params": parameters})

    def open(self, path, width, height=900, dark=False):
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.cdp("Emulation.setEmulatedMedia", features=scheme)
        phone = width < 600
        self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self._post("url", {"url": path.absolute().as_uri()})

    def script(self, text):
        return self._post("execute/sync", {"script": text, "args": []})

    def picture(self, path):
        """Write a PNG of the whole page to `path`."""
        shot = self.cdp("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def accessibility(self):
        """[(role, name, level or None)] of what a screen reader is told, in order."""
        out = []
        for node in self.cdp("Accessibility.getFullAXTree")["nodes"]:
            if not node.get("ignored"):
                level = [p["value"]["value"] for p in node.get("properties", []) if p["name"] == "level"]
                names = [node.get(key, {}).get("value", "") for key in ("role", "name")]
                out.append((*names, level[0] if level else None))
        return out


@contextlib.contextmanager
def opened():
    """Opens a browser and yields its Page. Raises RuntimeError if the browser does not start."""
    chromium, driver = find()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen([driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            base, options = (
                f"http://127.0.0.1:{port}",
                {"binary": chromium, "args": [*FLAGS, f"--user-data-dir={profile}"]},
            )
            wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
            session = _begin(Page(base), wanted)
            try:
                yield Page(f"{base}/session/{session}")
            finally:
                request = urllib.request.Request(f"{base}/session/{session}", method="DELETE")
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(request, timeout=20).close()
        finally:
            process.terminate()
            process.wait(10)


def _begin(page, wanted):
    error = None
    for _ in range(60):
        try:
            return page._post("session", wanted)["sessionId"]
        except urllib.error.HTTPError as refused:
            raise RuntimeError(refused.read().decode(errors="replace")) from refused
        except OSError as early:  # it does not listen yet
            error = early
            time.sleep(0.25)
    raise RuntimeError(f"ChromeDriver does not answer: {error}")
