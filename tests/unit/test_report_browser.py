"""The page of ``cml-dist report`` in a real browser: it renders, zooms, fits, is reached by keyboard, can be read."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from image_sets import write_set
from test_compare import write_run
from test_report import report, write_curves

from cml_dist.cli import main

pytestmark = pytest.mark.slow

CONTRAST = """
const light = colour => {
  const [r, g, b] = colour.match(/[\\d.]+/g).map(Number).slice(0, 3).map(v => v / 255)
    .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b;
};
const behind = node => {
  for (; node; node = node.parentElement) {
    const colour = getComputedStyle(node).backgroundColor;
    if (!colour.startsWith("rgba")) return colour;
  }
  return "rgb(255, 255, 255)";
};
const ratio = (one, other) => {
  const [a, b] = [light(one), light(other)].sort((x, y) => y - x);
  return (a + .05) / (b + .05);
};
const found = [];
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
for (let text; text = walk.nextNode();) {
  const node = text.parentElement, style = getComputedStyle(node), inside = node.namespaceURI.endsWith("svg");
  if (!text.data.trim() || ["STYLE", "SCRIPT"].includes(node.tagName)) continue;
  found.push([ratio(inside ? style.fill : style.color, behind(node)), text.data]);
}
for (const line of document.querySelectorAll(".swatch line")) found.push([ratio(getComputedStyle(line).stroke, "rgb(255, 255, 255)"), "swatch"]);
found.sort((x, y) => x[0] - y[0]);
found[0]
"""  # noqa: E501


class Browser:
    """A page of a headless Chromium by its DevTools protocol, with all that it complained of or asked for."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket, self.number = socket, 0
        self.complaints: list[str] = []
        self.asked: list[str] = []
        self.loaded = False

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        await self.socket.send_json({"id": self.number, "method": method, "params": params})
        while (told := await self._next()).get("id") != self.number:
            pass
        assert "error" not in told, told
        return told["result"]

    async def _next(self) -> dict[str, Any]:
        told = await self.socket.receive_json(timeout=60)
        name, what = told.get("method"), told.get("params", {})
        if name == "Runtime.exceptionThrown" or name in ("Log.entryAdded", "Runtime.consoleAPICalled"):
            self.complaints.append(str(what))
        elif name == "Network.requestWillBeSent":
            self.asked.append(what["request"]["url"])
        self.loaded |= name == "Page.loadEventFired"
        return told

    async def run(self, script: str) -> Any:
        found = await self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def open(self, page: Path, width: int) -> None:
        for domain in ("Runtime", "Log", "Page", "Network"):
            await self.call(f"{domain}.enable")
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        await self.call("Emulation.setDeviceMetricsOverride", **size)
        self.loaded = False
        await self.call("Page.navigate", url=page.as_uri())
        while not self.loaded:
            await self._next()

    async def press(self, key: str, **how: Any) -> None:
        for kind in ("keyDown", "keyUp"):
            await self.call("Input.dispatchKeyEvent", type=kind, key=key, **how)

    async def mouse(self, kind: str, x: float, y: float) -> None:
        await self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)


async def in_browser(profile: Path, use: Any) -> None:
    flags = (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--remote-debugging-port=0",
        f"--user-data-dir={profile}",
    )
    program = shutil.which("chromium") or shutil.which("google-chrome")
    process = subprocess.Popen(
        [program, *flags, f"--user-data-dir={profile}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        port, waited = profile / "DevToolsActivePort", 0.0
        while not port.exists() or len(port.read_text().split()) < 2:
            assert process.poll() is None and waited < 60, "the browser does not start"
            await asyncio.sleep(0.1)
            waited += 0.1
        where = f"http://127.0.0.1:{port.read_text().split()[0]}"
        async with aiohttp.ClientSession() as session:
            async with session.put(f"{where}/json/new?about:blank") as answer:
                target = (await answer.json(content_type=None))["webSocketDebuggerUrl"]
            async with session.ws_connect(target, max_msg_size=0) as socket:
                await use(Browser(socket))
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """Of two tests with sample episodes, ten made-up variants of long names, and a warning of each kind."""
    if not (shutil.which("chromium") or shutil.which("google-chrome")):
        if os.environ.get("CI") and shutil.which("apt-get") and os.geteuid() == 0:
            subprocess.run(["apt-get", "install", "--yes", "-q", "chromium"], capture_output=True, timeout=600)
        if not shutil.which("chromium"):
            pytest.skip("needs chromium (apt-get install chromium)")
    root = tmp_path_factory.mktemp("page")
    data = write_set(root / "set", size=16)
    small = ("domain.ways=2", "domain.queries=2", "model.filters=4", "train.steps=1", "eval.val_episodes=1")
    for seed in (0, 1):
        words = (f"domain.root={data}", f"run.dir={root / 'runs' / f'own-{seed}'}", f"run.seed={seed}")
        assert main(["train", "my_images", *words, *small, "eval.every=0", "eval.episodes=4"]) == 0
    for shots in (1, 5):
        for filters in range(8, 13):
            words = (f"domain.shots={shots}", f"model.filters={filters}", "method.adapts=[head,last:2,body.block1.*]")
            write_curves(write_run(root / f"runs/{shots}-{filters}", [0.1, 0.2, 0.4], *words, state="stopped"))
    report(root / "runs", out=root / "page.html", words=())
    return root / "page.html"


@pytest.mark.parametrize("width", [390, 1440])
def test_the_page_renders_fits_zooms_and_can_be_read(page, tmp_path, width):
    async def use(browser: Browser) -> None:
        await browser.open(page, width)
        assert await browser.run("document.querySelectorAll('figure > svg').length") >= 5
        assert (
            await browser.run("[...document.images].every(image => image.naturalWidth > 0) && document.images.length")
            > 4
        )
        assert await browser.run("document.documentElement.scrollWidth") <= width
        wide = (
            "[...document.body.querySelectorAll('*')].filter(node => !node.closest('.table, svg') && "
            f"node.getBoundingClientRect().right > {width} + .5).map(node => node.outerHTML.slice(0, 200))"
        )
        assert await browser.run(wide) == []
        least, what = await browser.run(CONTRAST)
        assert least >= 4.5, what

        where = "document.querySelector('[data-zoom] svg').getBoundingClientRect()"
        labels = "[...document.querySelectorAll('[data-zoom]:first-of-type svg text')].map(node => node.textContent)"
        await browser.run("document.querySelector('[data-zoom] svg').scrollIntoView({block: 'center'})")
        x, y, w, h = await browser.run(f"(box => [box.x, box.y, box.width, box.height])({where})")
        whole = await browser.run(labels)
        await browser.mouse("mousePressed", x + 0.4 * w, y + 0.3 * h)
        await browser.mouse("mouseMoved", x + 0.6 * w, y + 0.5 * h)
        await browser.mouse("mouseReleased", x + 0.6 * w, y + 0.5 * h)
        drawn = await browser.run(labels)
        assert drawn != whole and all(label not in drawn for label in ("10", "40"))
        limits = "[...document.querySelectorAll('[data-zoom] svg')].filter(svg => svg.innerHTML.includes('NaN')).length"
        assert await browser.run(limits) == 0

        # By keyboard alone: every button, table and curve, and back to the whole by its key.
        wanted = await browser.run("document.querySelectorAll('button, [tabindex]').length")
        await browser.run("document.body.focus(); window.met = new Set()")
        for _ in range(wanted + 5):  # past the end it begins anew
            await browser.press("Tab", code="Tab", windowsVirtualKeyCode=9)
            await browser.run("met.add(document.activeElement)")
        left = "[...document.querySelectorAll('button, [tabindex]')].filter(node => !met.has(node))"
        assert await browser.run(f"{left}.map(node => node.outerHTML.slice(0, 200))") == []
        await browser.run("document.querySelector('[data-zoom] svg').focus()")
        await browser.press("0", text="0")
        assert await browser.run(labels) == whole
        await browser.run("document.querySelector('[data-variant]').focus()")
        await browser.press("Enter", code="Enter", windowsVirtualKeyCode=13, text="\r")
        hidden = "[...document.querySelectorAll('[data-curve=\"1\"]')].map(node => getComputedStyle(node).display)"
        assert set(await browser.run(hidden)) == {"none"}

        assert browser.complaints == []
        assert [url[:60] for url in browser.asked if not url.startswith("data:")] == [page.as_uri()[:60]]

    asyncio.run(in_browser(tmp_path / "profile", use))
