"""The documentation site: what its sources hold, that Sphinx builds it, how it behaves in a
browser; and that the page about one's own data runs.

BRAINLDM_SHOTS=folder keeps screenshots. CHROMIUM=path picks the browser."""

import ast
import functools
import http.server
import importlib
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
from PIL import Image

from brainldm.engineering.configs import TrainConfig
from brainldm.engineering.tables import read_subjects
from brainldm.engineering.report import evaluate
from brainldm.engineering.cli import main

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
docs = importlib.import_module("docs")
YOUR_DATA = (ROOT / "docs" / "your_data.md").read_text(encoding="utf-8")
MODULES = {m.name: m for m in docs.modules()}


# Lessons


@pytest.mark.parametrize("notebook", docs.notebooks(), ids=lambda p: p.stem)
def test_a_lesson_shows_what_is_for_readers(notebook):
    cells = docs.lesson(notebook)["cells"]
    code = [c for c in cells if c["cell_type"] == "code"]
    outputs = [(c, o) for c in code for o in c["outputs"]]
    assert code and not [
        c for c in code if re.search(r"^#\||nbdev_export|default_exp", c["source"], re.M)
    ]
    assert not [o for _, o in outputs if any("widget" in kind for kind in o.get("data", {}))]
    assert not [o for _, o in outputs if re.search(r"\d+%\|.*it/s|\r", o.get("text", ""))]
    for cell in (c for c, o in outputs if "image/png" in o.get("data", {})):
        alt = cell["metadata"]["mystnb"]["image"]["alt"]
        assert len(alt) > 10 and not re.search(r"[$`\n]|\*\*|\]\(", alt), alt


@pytest.mark.parametrize(
    "code, before, alt",
    [
        ("show_grid(x, title='A claim')", "Prose.", "A claim"),
        ("ax.set_title('left'); ax.set(title='right')", "Prose.", "left; right"),
        ("ax.set_title('left'); fig.suptitle('Both')", "Prose.", "Both"),
        ("ax.set_title(f'SSIM falls with noise: {a:.2f}')", "Prose.", "SSIM falls with noise"),
        (
            "plt.plot(x, dict(title='no figure'))",
            "First. **What one should see here.** Then more.",
            "What one should see here.",
        ),
        ("plt.plot(x)", "# Head\n\nOne. See [the `line`](a.md) rise:", "See the line rise"),
        ("%matplotlib inline\nplt.plot(x)", "", "Figure drawn by the code above"),
    ],
)
def test_alt_text_is_the_title_or_the_claim(code, before, alt):
    assert docs.alt_text(code, before) == alt


def test_hidden_cells_go_and_exported_cells_can_be_linked_to():
    raw = [
        dict(cell_type="code", id="a", source="#| hide\nsecret", outputs=[]),
        dict(cell_type="code", id="b", source=["#| export\n", "def f(): pass"], outputs=[]),
        dict(cell_type="code", id="c", source="#| default_exp data", outputs=[]),
        dict(cell_type="code", id="d", source="#| slow\nrun()", outputs=[]),
    ]
    assert [c["source"] for c in docs.lesson_cells(raw, "01_x")] == [
        "(01_x-b)=",
        "def f(): pass",
        "run()",
    ]


def test_progress_bars_and_widgets_go_from_outputs():
    bar = dict(
        output_type="stream",
        name="stderr",
        text="subjects:   0%|          | 0/6\rsubjects: 100%|##########| 6/6 [00:01<00:00]\n",
    )
    assert docs.shown_output(bar) is None
    assert docs.shown_output(dict(bar, text="a\rb\n100%|#| 1/1\nc"))["text"] == "b\nc"
    both = {"text/plain": "x", "application/vnd.jupyter.widget-view+json": {}}
    assert docs.shown_output(dict(output_type="display_data", data=both))["data"] == {
        "text/plain": "x"
    }
    lines = [dict(output_type="stream", name="stdout", text=f"{i}\n") for i in range(3)]
    assert [o["text"] for o in docs.streams_joined(lines)] == ["0\n1\n2\n"]


# API pages


@pytest.mark.parametrize("name", MODULES)
def test_the_api_page_names_everything_public_and_every_argument(name):
    module, page = MODULES[name], docs.api_page(MODULES[name])
    real = importlib.import_module(f"brainldm.{name}")
    assert set(module.public) == {n for n, _ in module.named()} == set(real.__all__)
    for public in real.__all__:
        thing = getattr(real, public)
        found = re.search(
            rf"^:::::{{py:(?:function|class|data)}} {public}\b.*?^:::::$", page, re.M | re.S
        )
        assert found, public
        if inspect.isfunction(thing):  # Python's own idea of the signature
            for argument, about in inspect.signature(thing).parameters.items():
                stars = {about.VAR_POSITIONAL: "*", about.VAR_KEYWORD: "**"}.get(about.kind, "")
                row = re.search(rf"^\| `{re.escape(stars + argument)}` \| (.*?) \|", found[0], re.M)
                assert row and row[1].strip(), f"{public}({argument})"


def test_every_source_link_has_a_cell():
    targets = {
        c["source"][1:-2]
        for p in docs.notebooks()
        for c in docs.lesson(p)["cells"]
        if re.fullmatch(r"\([\w-]+\)=", c["source"])
    }
    links = {
        link for m in MODULES.values() for link in re.findall(r"\]\(#([\w-]+)\)", docs.api_page(m))
    }
    assert links and links <= targets


def test_arguments_keep_their_comments(tmp_path):
    (tmp_path / "m.py").write_text('''"Doc."
__all__ = ['f', 'N']
# %% ../nbs/01_x.ipynb #ab
def f(
    a:int|None, # First, in [0, 1]
    *,
    b='x', # Second
    **more, # Rest
)->int: # A number
    "Do."
N = 3 # How many
''')
    page = docs.api_page(docs.Module(tmp_path / "m.py"))
    assert (
        "{py:function} f(a, *, b='x', **more)" in page
        and "| `a` | First, in \\[0, 1\\] | `int \\| None` |  |" in page
    )
    assert (
        "| `**more` | Rest |" in page
        and "**Returns** `int`: A number" in page
        and "How many" in page
        and "](#01_x-ab)" in page
    )


# The map of the modules

GRAPH = {n: docs.imports(m, set(MODULES)) for n, m in MODULES.items()}


def test_the_map_keeps_every_path_and_no_detour():
    assert docs.reduced(dict(a={"b", "c"}, b={"c"}, c=set())) == dict(a={"b"}, b={"c"}, c=set())
    small = docs.reduced(GRAPH)
    assert all(docs.reachable(small, n) == docs.reachable(GRAPH, n) for n in GRAPH)
    for a, to in small.items():
        for b in to:  # without this arrow b would be lost
            assert b not in docs.reachable(small | {a: to - {b}}, a)


def test_the_imports_are_those_of_python():
    for name, found in GRAPH.items():
        package = f"brainldm.{name}".rpartition(".")[0]
        written = re.findall(r"^\s*from (\.*[\w.]*) import", MODULES[name].text, re.M)
        requested = {importlib.util.resolve_name(w, package) for w in written}
        assert found == {a.removeprefix("brainldm.") for a in requested} & set(MODULES) - {name}


def test_the_map_is_drawn_without_overlaps():
    svg = ET.fromstring(docs.map_svg(docs.reduced(GRAPH), 'About "all" & <each>'))
    space = "{http://www.w3.org/2000/svg}"
    assert svg.get("aria-label") == 'About "all" & <each>'
    boxes = {
        a.get("href").removeprefix("api/").removesuffix(".html"): tuple(
            float(a.find(space + "rect").get(k)) for k in ("x", "y", "width", "height")
        )
        for a in svg.iter(space + "a")
    }
    assert set(boxes) == set(MODULES)
    width, height = map(float, svg.get("viewBox").split()[2:])
    for name, (x, y, w, h) in boxes.items():
        assert 0 <= x and x + w <= width and 0 <= y and y + h <= height
        assert not [
            n
            for n, (u, v, _, _) in boxes.items()
            if n != name and abs(x - u) < w and abs(y - v) < h
        ], name
        assert all(boxes[b][1] > y for b in GRAPH[name])  # what is imported lies below


# The page about one's own data


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", YOUR_DATA, re.M | re.S)


SHORT = {
    "phantom practice": "--num-slices 14 --size 64",
    "train autoencoder": (
        "--total-images 64 --batch-size 8 --channels 16 --attention-levels False --validate-every"
        " 1000000"
    ),
    "train ldm": (
        "--total-images 64 --batch-size 8 --channels 16 --attention-levels True --num-heads 2"
        " --cond-channels 16 --validate-every 1000000"
    ),
    "sample": "--steps 2",
    "evaluate": "--steps 2",
    "report": "--steps 2",
}
# the judge of `evaluate`, hardly trained
JUDGE = dict(features=TrainConfig(total_images=64, batch_size=16), channels=(16,))


def run_line(line):
    """One line of the page: `brainldm` in this process, in its shortest form; everything else in a
    shell."""
    line, _, otherwise = line.partition("||")
    if not line.startswith("brainldm "):
        return subprocess.run(["bash", "-ec", line], check=True)
    words = shlex.split(line.replace("--preset laptop", "--preset tiny"), comments=True)[1:]
    more = next((v for k, v in SHORT.items() if " ".join(words).startswith(k)), "")
    if "--total-images" in words:  # lengthened: longer than the short form of the first training
        more = more.replace("--total-images 64", "--total-images 96")
    status = main([*words, *shlex.split(more)])
    assert status == 0 or otherwise, line
    return status


@pytest.mark.slow
def test_the_page_about_your_data_runs(tmp_path, monkeypatch, capsys):
    "All its shell commands, in order, as a reader would type them; only numbers are smaller."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("brainldm.engineering.cli.evaluate", functools.partial(evaluate, **JUDGE))
    said = []
    for block in blocks("bash"):
        for line in block.strip().splitlines():
            capsys.readouterr()
            status = run_line(line)
            said.append((line, status, capsys.readouterr().out))
    faulty = next(out for line, status, out in said if "not yet" in line)
    for line in (o for o in blocks("text")[-1].splitlines() if o):
        assert line in faulty, line
    healthy = [status for line, status, _ in said if line == "brainldm check scans"]
    assert healthy == [0]
    assert len(list(Path("runs/mine/samples/generated_000").glob("*.png"))) >= 4
    assert list(Path("runs/example/samples/generated_000").glob("*.png"))


def test_the_tables_of_your_data_are_read(tmp_path, monkeypatch):
    """Its Python blocks: an OASIS table becomes a table of subjects, pictures with names of one's
    own become a manifest."""
    monkeypatch.chdir(tmp_path)
    Path("oasis_cross-sectional.csv").write_text(
        "ID,M/F,Hand,Age,Educ,SES,MMSE,CDR,eTIV,nWBV,ASF,Delay\nOAS1_0001_MR1,F,R,74,2,3,29,0,1344,0.743,1.306,N/A\n"
        "OAS1_0002_MR1,M,R,80,4,1,21,0.5,1147,0.81,1.531,N/A\nOAS1_0003_MR1,F,R,20,,,,,1100,0.8,1.6,N/A\n"
    )
    people, images = blocks("python")
    exec(people, {})
    table = read_subjects("oasis_subjects.csv")
    assert table.diagnosis.tolist()[:2] == ["NC", "AD"] and table.diagnosis.isna().tolist() == [
        False,
        False,
        True,
    ]
    Path("pictures").mkdir()
    for person in ("P01", "P07", "P11", "P12"):
        for k in (30, 31):
            # no two alike
            Image.effect_noise((64, 64), 60).save(f"pictures/{person}-z{k:03d}.png")
    exec(images, {})
    Path("pictures/subjects.csv").write_text("subject,diagnosis\nP01,NC\nP07,AD\nP11,NC\nP12,AD\n")
    assert main(["check", "pictures", "--size", "64"]) == 0
    Path("table.csv").write_text(blocks("text")[1])
    assert read_subjects("table.csv").diagnosis.isna().tolist() == [False, False, True]


def test_every_fault_has_its_remedy():
    "The table of the page and the faults of the code."
    trees = [ast.parse(path.read_text()) for path in (ROOT / "brainldm").rglob("*.py")]
    calls = [
        n
        for tree in trees
        for n in ast.walk(tree)
        if isinstance(n, ast.Call) and getattr(n.func, "id", "") in ("DataFault", "as_faults")
    ]
    at = {"DataFault": 0, "as_faults": 1}
    kinds = {
        n.args[at[n.func.id]].value
        for n in calls
        if len(n.args) > at[n.func.id] and isinstance(n.args[at[n.func.id]], ast.Constant)
    }
    rows = re.search(r"\| it says \|.*?\n\n", YOUR_DATA, re.S)[0]
    named = {
        k
        for line in rows.strip().splitlines()
        for k in re.findall(r"`([\w -]+)`", line.split("|")[1])
    }
    # those are chosen by conditions in `find_duplicates`, `name_subjects`
    assert named == kinds | {"duplicate", "two volumes", "contrast"}


# The built site

needs_sphinx = pytest.mark.skipif(
    not (find_spec("sphinx") and find_spec("myst_nb") and find_spec("furo")),
    reason="no Sphinx: the docs extra is not installed",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The site, built once as `make docs` does."
    to = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "docs.py", to], capture_output=True, text=True
    )
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stdout + done.stderr
    return to / "html"


class Page(HTMLParser):
    "Links, anchors and pictures of a page."

    def __init__(self, path):
        super().__init__()
        self.links, self.ids, self.loads, self.images = [], set(), [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.ids |= {found["id"]} if "id" in found else set()
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        if (
            tag == "link"
            and found.get("rel") in ("stylesheet", "icon")
            or tag in ("script", "img", "iframe")
        ):
            self.loads.append(found.get("src") or found.get("href") or "")
        if tag == "img":
            self.images.append((found.get("src"), found.get("alt")))


@needs_sphinx
def test_links_resolve_and_pictures_have_words(site):
    pages = {p: Page(p) for p in site.rglob("*.html")}
    assert {p.relative_to(ROOT).with_suffix(".html").as_posix() for p in docs.notebooks()} | {
        f"api/{n}.html" for n in MODULES
    } <= {p.relative_to(site).as_posix() for p in pages}
    lost = []
    for path, page in pages.items():
        assert all(alt and alt.strip() for _, alt in page.images), path
        # nothing is asked of others
        assert not [o for o in page.loads if re.match(r"(https?:)?//", o)], path
        for link in page.links:
            where = urlparse(link)
            if where.scheme or where.netloc:
                continue
            target = (path.parent / unquote(where.path)).resolve() if where.path else path
            if not target.is_file() or (
                where.fragment
                and target in pages
                and unquote(where.fragment) not in pages[target].ids
            ):
                lost.append((path.name, link))
    assert not lost


# In a browser

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and find_spec("playwright")), reason="no Chromium or no playwright"
)
ARGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync".split()
)
SEEN = [
    "index",
    "docs/your_data",
    "nbs/04_scheduler",
    "nbs/engineering/39_cli",
    "api/sampling",
    "modules",
]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def url(site):
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(site))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser(url):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as pw:
        b = pw.chromium.launch(executable_path=CHROMIUM, headless=True, args=ARGS)
        yield b
        b.close()


@pytest.fixture(params=[(1280, 900), (390, 844)], ids=["wide", "phone"])
def page(request, browser, url):
    "A browser page that notes what it complains of and what it asks of others."
    page = browser.new_page(viewport=dict(zip(("width", "height"), request.param)))
    page.set_default_timeout(120_000)
    page.complaints = []
    page.on("console", lambda m: page.complaints.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: page.complaints.append(str(e)))
    page.on(
        "request",
        lambda r: (
            page.complaints.append(r.url) if not r.url.startswith((url, "data:", "blob:")) else None
        ),
    )
    yield page
    assert not page.complaints
    page.close()


@needs_sphinx
@needs_browser
def test_pages_in_a_browser(page, url):
    for name in SEEN:
        page.goto(f"{url}/{name}.html", wait_until="load")
        maths = page.locator(".math").count()
        if maths:
            page.wait_for_function(
                "n => document.querySelectorAll('mjx-container > svg').length >= n", arg=maths
            )
            assert not page.locator("[data-mml-node=merror]").count()
        assert (
            page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
        ), name
        assert page.evaluate("[...document.images].every(i => i.alt.trim())")
        assert page.evaluate(
            "Promise.all([...document.images].map(async i => { i.loading = 'eager'; await"
            " i.decode(); return i.naturalWidth > 0 })).then(a => a.every(Boolean))"
        )
        if folder := os.environ.get("BRAINLDM_SHOTS"):
            page.screenshot(
                path=str(
                    Path(folder)
                    / f"docs_{page.viewport_size['width']}_{name.replace('/', '_')}.png"
                )
            )


@needs_sphinx
@needs_browser
def test_the_map_leads_to_the_modules(page, url):
    page.goto(f"{url}/modules.html")
    assert "cli imports" in page.locator("svg.modules[role=img]").get_attribute("aria-label")
    page.locator("svg.modules a", has_text="sampling").click()
    page.wait_for_url("**/api/sampling.html")


@needs_sphinx
@needs_browser
def test_the_search_finds_a_name(page, url):
    page.goto(f"{url}/search.html?q=BrainLDM", wait_until="load")
    page.locator("#search-results li a").first.wait_for()
    found = page.locator("#search-results li a").evaluate_all(
        "o => o.map(a => a.getAttribute('href'))"
    )
    assert any("api/sampling.html" in o for o in found)
