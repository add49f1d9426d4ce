"""Drives the distribution's Chromium without a screen and without a network."""

import base64
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
DRIVERS = ("chromedriver", "chromium.chromedriver")


def what_is_missing() -> str | None:
    """Why no browser can be driven here, None if one can."""
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "selenium is not installed (pip install 'lion-st[test]')"
    for kind, names in (("browser", BROWSERS), ("driver", DRIVERS)):
        if not any(map(shutil.which, names)):
            return f"there is no {kind} among {', '.join(names)} (Debian: apt-get install chromium chromium-driver)"
    return None


@contextmanager
def open_browser(width: int = 1280, height: int = 900) -> Iterator[Any]:
    """A browser that reaches 127.0.0.1 alone, and keeps a log of all it asks for."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = next(filter(None, map(shutil.which, BROWSERS)))
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--no-proxy-server",
        "--lang=en",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        f"--window-size={width},{height}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(next(filter(None, map(shutil.which, DRIVERS))))
    browser = webdriver.Chrome(options=options, service=service)
    try:
        yield browser
    finally:
        browser.quit()


def asked_addresses(browser: Any) -> list[str]:
    """What pages have asked for since the last call."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]


def wait(browser: Any, condition: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    """Wait until a condition is true and return its value."""
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait

    waiting = WebDriverWait(browser, seconds, 0.05, (StaleElementReferenceException,))
    return waiting.until(lambda _: condition(), f"no {what} within {seconds:.0f} s")


def set_screen(browser: Any, width: int, height: int, dark: bool = False) -> None:
    """Set the size of the window's contents and whether the reader prefers dark pages."""
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
    )
    feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


def save_screenshot(browser: Any, file: Path, longest: int | None = None) -> None:
    """Write a PNG of the whole page, down to `longest` pixels."""
    size = browser.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
    height = size["height"] if longest is None else min(longest, size["height"])
    clip = {"x": 0, "y": 0, "width": size["width"], "height": height, "scale": 1}
    shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    file.write_bytes(base64.b64decode(shot["data"]))
