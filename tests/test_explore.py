"""The explorers without a browser: pure functions, controls, the class around them, and the server
that is refused or ends."""

import json
import shutil
import socket
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import ipywidgets
import nbformat
import pytest
import torch
from PIL import Image

import brainldm.engineering.explore as explore
from brainldm.engineering.configs import AEConfig, DataConfig
from brainldm.engineering.covariates import Covariate
from brainldm.engineering.stage1 import autoencoder_args, build_autoencoder
from brainldm.engineering.codec import SYNTHETIC, Codec
from brainldm.sampling import BrainLDM
from brainldm.engineering.explore import OPEN, Explorer, to_png

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(
    p for p in (ROOT / "nbs").rglob("[0-9]*.ipynb") if ".ipynb_checkpoints" not in p.parts
)


@pytest.fixture(scope="module")
def model(tiny_run):
    return BrainLDM.load(tiny_run[0], "cpu", precision="no")


def codec(**settings):
    "An untrained autoencoder with codes."
    torch.manual_seed(0)
    config = AEConfig(
        data=DataConfig(size=64), channels=(16,), attention_levels=(False,), patch=8, **settings
    )
    return Codec(build_autoencoder(config.kind, autoencoder_args(config)).eval(), 64)


# --- pure functions


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize(
    "request_", [{}, dict(slice=2, diagnosis="NC", seed=4, guidance_scale=2.0)]
)
def test_frames_end_in_the_sample(model, steps, request_):
    frames = explore.sample_frames(model, steps, **request_)
    assert frames.shape == (steps, 64, 64) and frames.abs().max() <= 1
    torch.testing.assert_close(
        frames[-1], model.sample(1, steps=steps, **request_)[0, 0], rtol=0, atol=0
    )


@pytest.mark.parametrize("n", [2, 5])
def test_between_starts_and_ends_at_its_seeds(model, n):
    way = explore.sample_between(model, 7, 3, n=n, steps=3, slice=1)
    ends = torch.cat([model.sample(1, seed=s, steps=3, slice=1)[0] for s in (7, 3)])
    torch.testing.assert_close(way[[0, -1]], ends, rtol=0, atol=1e-3)  # float32, another batch


def test_between_runs_both_ways(model):
    there, back = (explore.sample_between(model, a, b, n=5, steps=2) for a, b in ((0, 1), (1, 0)))
    torch.testing.assert_close(there, back.flip(0), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        (dict(seed_a=2, seed_b=2), ValueError, "two different seeds"),
        (dict(n=1), ValueError, "n of 2 or more"),
        (dict(seed_a=-1), ValueError, "seed=-1"),
        (dict(steps=0), ValueError, "steps=0"),
        (dict(steps=1.5), TypeError, "steps=1.5"),
        (dict(slice=99), ValueError, "slice=99"),
        (dict(mood="good"), ValueError, "mood"),
        (dict(slice=[1, 2]), ValueError, "2 values of slice"),
    ],
)
def test_between_refuses(model, wrong, error, message):
    with pytest.raises(error, match=message):
        explore.sample_between(model, **wrong)


@pytest.mark.parametrize(
    "k, settings",
    [
        (16, dict(kind="vq", num_embeddings=16, latent_channels=3)),
        (12, dict(kind="fsq", fsq_levels=(4, 3))),
    ],
)
def test_codebook_of_every_kind(k, settings):
    model = codec(**settings)
    images = torch.rand(3, 1, 64, 64) * 2 - 1
    book = explore.read_codebook(model, images)
    assert (
        book["codes"].shape == (3, 8, 8)
        and book["patches"].shape == (k, 8, 8)
        and book["counts"].shape == (8, 8, k)
    )
    for code in range(k):  # the slow way
        at = [(n, i, j) for n, i, j in (book["codes"] == code).nonzero().tolist()]
        mean = sum(
            book["decoded"][n, 0, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8] for n, i, j in at
        ) / max(len(at), 1)
        if at:
            torch.testing.assert_close(book["patches"][code], mean, rtol=1e-4, atol=1e-4)
        else:
            assert book["patches"][code].isnan().all()
    leaf = explore.explore_codes(model, images)
    words = [code for _, code in leaf.controls["code"].options]
    assert sorted(words) == list(range(k))
    for code in (words[0], words[-1]):  # used, and probably not
        leaf.controls["code"].value = code
        assert "message" not in leaf.note.value


def test_noise_explorer_serves_every_schedule():
    noise = explore.explore_noise(torch.rand(16, 16))
    seen = set()
    for name in noise.controls["beta_schedule"].options:
        for zero in (True, False):
            for t in (0, 999) if zero else (999,):
                for k, v in dict(beta_schedule=name, zero_terminal_snr=zero, t=t).items():
                    noise.controls[k].value = v
                assert "message" not in noise.note.value
                seen.add(noise.picture.value)
    assert len(seen) >= 7  # the starts of two kinds may look alike


def test_saved_picture_says_what_it_is():
    image = Image.open(BytesIO(to_png(torch.zeros(3, 5))))
    assert image.info["Description"] == SYNTHETIC and image.size == (5, 3)


# --- controls


@pytest.mark.parametrize(
    "low, high",
    [
        (0, 31),
        (0.0, 4.0),
        (55.1, 88.3),
        (0.61, 0.87),
        (-3.2, 3.9),
        (1100.0, 2004.0),
        (5.0, 5.0),
        (2.2, 2.2),
        (0.0, 299.0),
    ],
)
def test_stops_lie_in_the_range(low, high):
    stops = explore.slider_values(Covariate("x", "continuous", range=(low, high)))
    assert (
        low <= min(stops)
        and max(stops) <= high
        and stops == sorted(set(stops))
        and 1 <= len(stops) <= 300
    )


@pytest.mark.parametrize("values", [("AD", "NC"), ("1", "2", "3"), ("only",)])
def test_categories_come_as_they_are(values):
    control = explore.covariate_control(Covariate("kind", "categorical", values=values))
    assert control.value == values[0] and [v for _, v in control.options] == [OPEN, *values]
    control.value = OPEN
    assert control.label == "open"


def test_what_the_autoencoder_is_told_is_never_open(model):
    class Told:
        covariates = (
            Covariate("slice", "continuous", range=(0, 5)),
            Covariate("sex", "categorical", values=("F", "M")),
        )

        class autoencoder:
            covariates = (Covariate("slice", "continuous", range=(0, 5)),)

    controls = explore.condition_controls(Told)
    assert OPEN not in [v for _, v in controls["slice"].options] and OPEN in [
        v for _, v in controls["sex"].options
    ]


def test_every_choice_can_be_served(model):
    ask = explore.explore_sample(model)
    ask.controls["steps"].value = 1
    for name, control in explore.condition_controls(model).items():
        for _, value in control.options:
            ask.controls[name].value = value
            assert "message" not in ask.note.value, (name, value)
    assert all(
        not c.continuous_update for c in ask.controls.values() if hasattr(c, "continuous_update")
    )


# --- the class


def make(render, scrub="frame", **controls):
    return Explorer(
        render, {k: ipywidgets.IntSlider(v, 0, 20) for k, v in controls.items()}, "f({})", scrub
    )


def gray(level):
    return to_png(torch.full((2, 2), level))


def test_a_state_is_drawn_once():
    calls = []
    e = make(lambda n: calls.append(n) or [gray(n / 20)], n=3)
    for n in (4, 3, 4, 3, 5):
        e.controls["n"].value = n
    assert calls == [3, 4, 5]


@pytest.mark.parametrize(
    "error",
    [
        ValueError("f: n=<7>. Try 8."),
        RuntimeError("x"),
        KeyError("k"),
        AttributeError(),
        MemoryError("full"),
    ],
)
def test_every_error_is_a_message(error):
    def render(n):
        if n == 7:
            raise error
        return [gray(n / 20)]

    e = make(render, n=3)
    before = e.picture.value
    e.controls["n"].value = 7
    assert (
        'role="alert"' in e.note.value
        and "Traceback" not in e.note.value
        and "<7>" not in e.note.value
    )
    assert "stale" in e.picture._dom_classes and e.picture.value == before
    e.controls["n"].value = 8
    assert (
        "stale" not in e.picture._dom_classes
        and "alert" not in e.note.value
        and e.picture.value == gray(8 / 20)
    )


def test_an_error_at_the_start_is_a_message_too():
    def render(n):
        if n == 0:
            raise ValueError("f: nothing. Try more.")
        return [gray(0.1), gray(0.2)]

    e = make(render, n=0)
    assert "Try more" in e.note.value
    e.scrubber.value = 1  # nothing to scrub: no exception
    e.controls["n"].value = 2
    assert e.picture.value == gray(0.2)


def test_it_says_that_it_draws():
    notes = []
    holder = {}

    def render(n):
        if "e" in holder:
            notes.append((holder["e"].note.value, "stale" in holder["e"].picture._dom_classes))
        return [gray(n / 20)]

    holder["e"] = e = make(render, n=3)
    e.controls["n"].value = 4
    assert notes == [("generating …", True)] and "drawing" not in e.note.value


@pytest.mark.parametrize("sizes", [(4, 7, 4), (9, 1, 9), (1, 5, 20), (20, 2, 3)])
def test_the_scrubber_keeps_its_place(sizes):
    e = make(lambda n: [gray(i / 20) for i in range(n)], n=11)
    for place in (11, 6, 1):  # the end, half-way, the start
        e.scrubber.value = place
        for n in sizes:
            e.controls["n"].value = n
            assert (e.scrubber.value, e.scrubber.max) == (1 + round((place - 1) / 10 * (n - 1)), n)
            assert e.picture.value == gray((e.scrubber.value - 1) / 20)
        e.controls["n"].value = 11
        assert e.scrubber.value == place


def test_the_note_is_the_python_that_draws_it(model):
    ask = explore.explore_sample(model)
    ask.controls["age"].value = OPEN
    text = ask.note.value.removeprefix("<code>").removesuffix("</code>").replace("&#x27;", "'")
    frames = eval(text, dict(sample_frames=explore.sample_frames, model=model))
    assert "age" not in text and ask.picture.value == to_png(frames[-1])


# --- the page


def test_page_draws_a_tab_when_it_is_looked_at(tiny_run):
    _, tabs = explore.page(tiny_run[0]).children
    assert isinstance(tabs.children[0], Explorer) and not isinstance(tabs.children[1], Explorer)
    tabs.selected_index = 1
    first, second = tabs.children
    tabs.selected_index = 0
    assert tabs.children == (first, second) and isinstance(second, Explorer)


@pytest.mark.parametrize("name", ["run", "my run", "it's <b>", "schädel"])
def test_written_page_names_its_run(tmp_path, name):
    (tmp_path / "page").mkdir()
    notebook = explore.write_page(tmp_path / name, tmp_path / "page")
    nbformat.validate(nbformat.read(notebook, 4))
    called = []
    source = json.loads(notebook.read_text())["cells"][0]["source"].replace(
        "from brainldm.engineering.explore import page\n", ""
    )
    eval(source, dict(page=called.append))
    assert called == [str(tmp_path / name)]


def test_missing_voila_is_said(tiny_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "voila", None)
    with pytest.raises(ImportError, match=r"pip install 'brainldm\[course\]'"):
        explore.explore(tiny_run[0], 0, open_browser=False)


@pytest.fixture
def served(tmp_path, monkeypatch):
    "Serve with a program in Voila's place; gives what was started and where its folder lay."
    pytest.importorskip("voila")
    started = []
    monkeypatch.setattr(explore.tempfile, "tempdir", str(tmp_path))

    def serve(run, code, open_browser=False):
        def start(notebook, port, log):
            started.append(
                (
                    subprocess.Popen(
                        [sys.executable, "-c", code, str(port)], stdout=log, stderr=log
                    ),
                    notebook,
                )
            )
            return started[-1][0]

        monkeypatch.setattr(explore, "start_server", start)
        explore.explore(run, 0, open_browser)

    yield serve, started
    server, notebook = started[0]
    assert server.poll() is not None and not notebook.parent.exists()  # nothing is left behind
    assert not list(tmp_path.glob("brainldm_*"))


def test_a_server_that_dies_is_reported(tiny_run, served):
    serve, _ = served
    with pytest.raises(RuntimeError, match="ended with status 3.*out of luck"):
        serve(tiny_run[0], "print('out of luck', flush=True); raise SystemExit(3)")


LISTENS = (
    "import socket, sys, time; s = socket.create_server(('127.0.0.1', int(sys.argv[1])));"
    " time.sleep(60)"
)


def test_ctrl_c_ends_the_server(tiny_run, served, monkeypatch, capsys):
    serve, _ = served
    wait = subprocess.Popen.wait
    interrupted = []

    def wait_(self, timeout=None):
        if not interrupted:
            interrupted.append(self)
            raise KeyboardInterrupt
        return wait(self, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", wait_)
    serve(tiny_run[0], LISTENS)
    assert interrupted and "http://127.0.0.1:" in capsys.readouterr().out


@pytest.mark.parametrize("wanted", [True, False])
def test_browser_is_opened_on_demand(tiny_run, served, monkeypatch, capsys, wanted):
    serve, _ = served
    opened = []
    monkeypatch.setattr(explore.webbrowser, "open", opened.append)
    # it says hello once, and leaves
    with pytest.raises(RuntimeError, match="ended with status 0"):
        serve(tiny_run[0], LISTENS.replace("time.sleep(60)", "s.accept(); time.sleep(1)"), wanted)
    assert len(opened) == wanted and all(url in capsys.readouterr().out for url in opened)


@pytest.mark.parametrize("port", [-1, 70000])
def test_impossible_ports(tiny_run, port):
    with pytest.raises(ValueError, match=f"port {port} cannot be used"):
        explore.explore(tiny_run[0], port, open_browser=False)


def test_taken_port(tiny_run):
    with socket.create_server(("127.0.0.1", 0)) as s, pytest.raises(ValueError, match="port=0"):
        explore.explore(tiny_run[0], s.getsockname()[1], open_browser=False)


def test_run_without_denoiser(tiny_run, tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("config.json", "autoencoder.safetensors"):
        shutil.copy(tiny_run[0] / name, tmp_path / "run" / name)
    with pytest.raises(FileNotFoundError, match="brainldm train ldm"):
        explore.explore(tmp_path / "run", 0, open_browser=False)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_stored_notebooks_hold_no_widgets(notebook):
    doc = json.loads(notebook.read_text())
    stored = [
        c["id"]
        for c in doc["cells"]
        for o in c.get("outputs", [])
        if any("widget" in k for k in o.get("data", {}))
    ]
    assert not stored, f"clear the outputs of cells {stored}: a stored widget shows nothing"
    assert "widgets" not in doc["metadata"]
