"""The page of `explore` in a real browser. Skipped where playwright, Chromium or Voila is missing.

BRAINLDM_SHOTS=folder keeps screenshots. CHROMIUM=path picks the browser."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from brainldm.engineering.runs import load_weights, save_weights

sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium"),
    pytest.mark.skipif(not find_spec("voila"), reason="no voila"),
]

ARGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
SLOW = 300_000  # ms for the first image: imports on a busy machine
SERVE = """import signal, sys
from brainldm.engineering.explore import explore
signal.signal(signal.SIGINT, signal.default_int_handler)                   # a parent in the background may ignore it
explore(sys.argv[1], 0, open_browser=False)"""


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    """The tiny run with a denoiser that hears its conditions: a few steps of training leave it
    nearly deaf."""
    folder = Path(shutil.copytree(tiny_run[0], tmp_path_factory.mktemp("browser") / "run"))
    tensors, about = load_weights(folder / "ldm.safetensors")
    loud = {k: v * (8 if "conditioner" in k and v.ndim > 1 else 1) for k, v in tensors.items()}
    save_weights(folder / "ldm.safetensors", loud, about)
    return folder


@pytest.fixture(scope="module")
def url(run, tmp_path_factory):
    "A page, served as a user would; ended by Ctrl-C, which must leave nothing behind."
    home = tmp_path_factory.mktemp("home")
    env = dict(os.environ, OMP_NUM_THREADS="1", TMPDIR=str(home), PYTHONUNBUFFERED="1")
    for k in (
        "JUPYTER_CONFIG_DIR",
        "JUPYTER_DATA_DIR",
        "JUPYTER_RUNTIME_DIR",
        "IPYTHONDIR",
        "MPLCONFIGDIR",
    ):
        env[k] = str(tmp_path_factory.mktemp("jupyter") / k.lower())
    server = subprocess.Popen(
        [sys.executable, "-c", SERVE, run],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said, found = "", None
    for line in server.stdout:  # a library may have a word to say before it
        said, found = said + line, re.match(r"http://127\.0\.0\.1:(\d+)", line)
        if found:
            break
    assert found, said
    yield found[0]
    server.send_signal(signal.SIGINT)
    assert server.wait(60) == 0 and "Traceback" not in server.stdout.read()
    left = [p.name for p in home.iterdir() if p.name.startswith(("brainldm_", "voila_"))]
    assert not left
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", int(found[1])), 2)


class Page:
    "A browser page that notes what it complains of and what it asks of others."

    def __init__(self, browser, url, width, height):
        self.page = browser.new_page(viewport=dict(width=width, height=height))
        self.page.set_default_timeout(60_000)
        self.complaints, self.outside = [], []
        self.page.on(
            "console", lambda m: self.complaints.append(m.text) if m.type == "error" else None
        )
        self.page.on("pageerror", lambda e: self.complaints.append(str(e)))
        self.page.on(
            "request",
            lambda r: (
                self.outside.append(r.url)
                if not re.match(r"(https?|ws)://127\.0\.0\.1:|data:|blob:", r.url)
                else None
            ),
        )
        self.page.route(re.compile(r"^https?://(?!127\.0\.0\.1:)"), lambda route: route.abort())
        # the cell runs during this
        self.page.goto(url, timeout=SLOW, wait_until="domcontentloaded")
        self.page.locator(".brainldm code").first.wait_for(timeout=SLOW)

    @property
    def explorer(self):
        return self.page.locator(".brainldm:visible")

    def pixels(self):
        "What is painted, without the file around it."
        return self.explorer.locator("img").evaluate(
            """async i => { await i.decode(); const c = document.createElement('canvas');
            c.width = i.naturalWidth; c.height = i.naturalHeight; const x = c.getContext('2d'); x.drawImage(i, 0, 0);
            return Array.from(x.getImageData(0, 0, c.width, c.height).data).join(); }"""
        )

    def press(self, name, key):
        "Move the slider that stands beside a name by one key; focus it, never click."
        box = self.explorer.locator(
            ".widget-inline-hbox", has=self.page.get_by_text(name, exact=True)
        )
        box.get_by_role("slider").focus()
        self.page.keyboard.press(key)

    def says(self, words):
        sync_api.expect(self.explorer.locator("code, .message")).to_contain_text(
            words, timeout=120_000
        )

    def shot(self, name):
        if folder := os.environ.get("BRAINLDM_SHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.page.wait_for_timeout(600)
            self.page.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as pw:  # Debian's browser: its own would be downloaded
        b = pw.chromium.launch(executable_path=CHROMIUM, headless=True, args=ARGS)
        yield b
        b.close()


@pytest.fixture(scope="module")
def wide(browser, url):
    page = Page(browser, url, 1200, 900)
    yield page
    assert not page.complaints and not page.outside  # no console error, nothing asked of others
    page.page.close()


def changes(page, act, words):
    "Whether the painted image is another one after an act, once the page says that it is done."
    before = page.pixels()
    act()
    page.says(words)
    return page.pixels() != before


def test_every_control_changes_the_picture(wide):
    wide.shot("wide")
    assert changes(wide, lambda: wide.press("seed", "ArrowRight"), "seed=1)")
    assert changes(wide, lambda: wide.press("slice", "ArrowLeft"), "slice=2,")
    assert changes(wide, lambda: wide.press("guidance", "ArrowRight"), "guidance_scale=1.5")
    assert changes(
        wide, lambda: wide.explorer.locator("select").first.select_option("NC"), "diagnosis='NC'"
    )
    assert not changes(wide, lambda: None, "diagnosis='NC'")  # and an image at rest stays


def test_open_is_no_value(wide):
    wide.explorer.locator("select").first.select_option("open")
    wide.says("sample_frames(model, slice=2, age=")  # no diagnosis in the call
    sync_api.expect(wide.explorer.locator("select").first).to_have_value(re.compile("0|open"))
    wide.press("slice", "Home")
    wide.says("sample_frames(model, age=")


def test_the_scrubber_changes_the_picture(wide):
    last = wide.pixels()
    wide.press("step", "Home")
    wide.page.wait_for_timeout(1500)
    first = wide.pixels()
    assert first != last
    wide.press("step", "End")
    wide.page.wait_for_timeout(1500)
    assert wide.pixels() == last


def test_between_two_brains(wide):
    wide.page.get_by_role("tab").nth(1).click()
    wide.says("sample_between(model")
    wide.shot("between")
    before = wide.pixels()
    wide.press("way", "Home")
    wide.page.wait_for_timeout(1500)
    assert wide.pixels() != before
    assert changes(wide, lambda: wide.press("seed, right", "ArrowRight"), "seed_b=2)")


def test_a_refusal_is_a_message(wide):
    wide.press("seed, right", "Home")
    wide.says("Expected two different seeds")
    wide.shot("message")
    assert "Traceback" not in wide.page.inner_text("body")
    wide.press("seed, right", "ArrowRight")
    wide.says("seed_b=1)")


def test_on_a_phone(browser, url):
    phone = Page(browser, url, 390, 844)
    phone.shot("phone")
    assert phone.page.evaluate("document.documentElement.scrollWidth") <= 390
    phone.pixels()  # painted by now
    for control in phone.explorer.locator(
        ".widget-inline-hbox:has([role=slider]), select, img"
    ).all():
        box = control.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["height"] >= 24
    tracks = phone.explorer.locator(".noUi-target").all()
    assert len(tracks) == 6  # slice, age, guidance, steps, seed, and the scrubber
    for track in tracks:
        assert track.bounding_box()["width"] >= 120  # room for a thumb
    assert changes(phone, lambda: phone.press("seed", "ArrowRight"), "seed=1)")
    assert not phone.complaints and not phone.outside
    phone.page.close()
