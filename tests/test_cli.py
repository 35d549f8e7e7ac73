"""The command as subjects use it: whole jobs, and every kind of bad input."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from brainldm.engineering import cli
from brainldm.engineering.cli import main
from brainldm.engineering.runs import load_weights, save_weights
from brainldm.vae import AutoencoderKL

TINY = (
    "--preset tiny --total-images 80 --log-every 5 --validate-every 40 --checkpoint-every 40".split()
)


@pytest.fixture(autouse=True)
def no_traceback(monkeypatch):
    monkeypatch.delenv("BRAINLDM_DEBUG", raising=False)


def snapshot(folder):
    "Every file below a folder with its content."
    return {p.relative_to(folder): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def copy_run(run, to):
    "The shared run is read only; this one may be changed."
    return Path(shutil.copytree(run, to))


def refused(capsys, *words):
    "Run a command that must fail with one clear message; gives the message."
    capsys.readouterr()
    status = main([str(w) for w in words])
    out = capsys.readouterr()
    assert status == 1
    assert "Traceback" not in out.err
    # progress bars come before it
    before, sign, message = out.err.rpartition("brainldm: error: ")
    assert sign and "Expected" in message, out.err
    return message


@pytest.fixture
def images(tmp_path):
    "A well-formed OASIS folder of noise: 4 subjects, 3 slices each."
    rng = np.random.default_rng(0)
    for split, subjects in dict(train=(1, 2), validate=(3,), test=(4,)).items():
        folder = tmp_path / "data" / f"keras_png_slices_{split}"
        folder.mkdir(parents=True)
        for subject in subjects:
            for k in range(3):
                image = rng.integers(0, 256, (64, 64), np.uint8)
                Image.fromarray(image).save(
                    folder / f"case_{subject:03d}_slice_{k}.nii.png", format="png"
                )
    return tmp_path / "data"


def one(images):
    return images / "keras_png_slices_train" / "case_001_slice_1.nii.png"


def test_check_of_good_data(images, capsys):
    assert main(["check", str(images)]) == 0
    out = capsys.readouterr().out
    assert "oasis" in out and "4 subjects" in out and "no fault" in out


def text_file(p):
    one(p).write_text("not an image")


def truncated(p):
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64), np.uint8)).save(
        one(p), format="jpeg"
    )
    one(p).write_bytes(one(p).read_bytes()[:400])


def empty(p):
    one(p).write_bytes(b"")


def blank(p):
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(one(p), format="png")


def colour(p):
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)).save(
        one(p), format="png"
    )


def sixteen_bit(p):
    Image.fromarray(np.random.default_rng(1).integers(0, 60_000, (64, 64)).astype(np.uint16)).save(
        one(p), format="png"
    )


def other_size(p):
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 80), np.uint8)).save(
        one(p), format="png"
    )


def bad_name(p):
    one(p).rename(one(p).with_name("brain.png"))


def twin(p):
    (p / "keras_png_slices_train" / "case_002_slice_0.nii.png").write_bytes(one(p).read_bytes())


@pytest.mark.parametrize(
    "fault", [text_file, truncated, empty, blank, colour, sixteen_bit, other_size, bad_name, twin]
)
def test_faulty_pictures_are_named_and_not_trained_on(images, tmp_path, capsys, fault):
    fault(images)
    before = snapshot(images)
    assert main(["check", str(images)]) == 1
    assert "case_001_slice_1" in capsys.readouterr().out or fault is bad_name
    message = refused(capsys, "train", "autoencoder", images, "--run", tmp_path / "run", *TINY)
    assert "--skip-faulty" in message
    assert not (tmp_path / "run").exists() and snapshot(images) == before


def test_skip_faulty_says_what_it_left_out(images, tmp_path, capsys):
    text_file(images)
    assert (
        main(
            [
                "train",
                "autoencoder",
                str(images),
                "--run",
                str(tmp_path / "run"),
                "--skip-faulty",
                *TINY,
            ]
        )
        == 0
    )
    assert "case_001_slice_1" in capsys.readouterr().out


@pytest.mark.parametrize("options", ["by name", "by image"])
def test_a_leak_is_always_refused(images, tmp_path, capsys, options):
    train = images / "keras_png_slices_train"
    target = "case_001_slice_0.nii.png" if options == "by name" else "case_009_slice_0.nii.png"
    (images / "keras_png_slices_validate" / target).write_bytes(
        (train / "case_001_slice_0.nii.png").read_bytes()
    )
    assert main(["check", str(images)]) == 1
    for extra in ([], ["--skip-faulty"]):
        message = refused(
            capsys, "train", "autoencoder", images, "--run", tmp_path / "run", *TINY, *extra
        )
        assert "001" in message
    assert not (tmp_path / "run").exists()


def test_missing_and_empty_folders(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for folder in ("missing", "empty"):
        assert folder in refused(capsys, "check", tmp_path / folder)
        assert folder in refused(
            capsys, "train", "autoencoder", tmp_path / folder, "--run", tmp_path / "run"
        )
    assert not (tmp_path / "run").exists()


def test_volume_with_nan(tmp_path, capsys):
    nib = pytest.importorskip("nibabel")
    vol = np.random.default_rng(0).random((16, 18, 5), np.float32)
    (tmp_path / "volumes").mkdir()
    for name in ("sub-01", "sub-02", "sub-03"):
        nib.save(
            nib.Nifti1Image(vol * 100 + len(name), np.eye(4)),
            tmp_path / "volumes" / f"{name}_T1w.nii.gz",
        )
        vol = vol[::-1] ** 2
    vol = vol.copy()
    vol[3, 3, 3] = np.nan
    nib.save(nib.Nifti1Image(vol, np.eye(4)), tmp_path / "volumes" / "sub-03_T1w.nii.gz")
    assert main(["check", str(tmp_path / "volumes")]) == 1
    assert "sub-03" in capsys.readouterr().out
    assert "sub-03" in refused(
        capsys, "train", "autoencoder", tmp_path / "volumes", "--run", tmp_path / "run", *TINY
    )


def test_a_folder_that_is_not_a_run_is_left_alone(images, capsys):
    before = snapshot(images)
    for words in (
        ["train", "autoencoder", images, "--run", images],
        ["train", "ldm", images, "--run", images],
        ["reconstruct", images, images],
        ["sample", images],
        ["report", images],
    ):
        refused(capsys, *words, *(TINY if words[0] == "train" else ()))
    assert snapshot(images) == before


def test_json_is_one_object(tiny_run, tmp_path, capsys):
    run, data = copy_run(tiny_run[0], tmp_path / "run"), tiny_run[1]
    capsys.readouterr()
    assert main(["reconstruct", str(run), str(data), "--split", "test", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert set(scores["baseline_mean_slice"]) >= {"ssim", "ssim_brain"}
    assert scores["n_slices"] >= scores["n_subjects"] >= 1 and scores["n_subjects_in_training"] == 0
    assert 0 < scores["ssim"] <= 1 and 0 < scores["baseline_mean_slice"]["ssim"] <= 1


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--diagnosis FTD", "FTD"),
        ("--slice 99", "slice=99"),
        ("--slice -1", "slice=-1"),
        ("--age 400", "age=400"),
        ("--guidance-scale -1", "guidance_scale"),
        ("--guidance-scale nan", "guidance_scale"),
        ("--steps 5000", "5000"),
        ("--steps 0", "0"),
        ("--condition apoe=e4", "apoe"),
        ("--condition apoe", "apoe"),
        ("--n 0", "n=0"),
        ("--sex X", "'X'"),
        ("--seed -1", "seed"),
    ],
)
def test_requests_that_cannot_be_served(tiny_run, tmp_path, capsys, flags, named):
    assert named in refused(
        capsys, "sample", tiny_run[0], "--out", tmp_path / "out", *flags.split()
    )
    assert not (tmp_path / "out").exists()


def test_sample_does_not_overwrite(tiny_run, tmp_path, capsys):
    words = ["sample", tiny_run[0], "--n", 2, "--steps", 2, "--out", tmp_path / "out"]
    assert main([str(w) for w in words]) == 0
    before = snapshot(tmp_path / "out")
    assert {
        "image_0000.png",
        "image_0001.png",
        "manifest.csv",
        "grid.png",
        "denoising.gif",
    } == {p.name for p in before}
    refused(capsys, *words)
    assert snapshot(tmp_path / "out") == before


def count_decoded(monkeypatch):
    "How many images pass the decoder from now on."
    counts, call = [], AutoencoderKL.decode
    monkeypatch.setattr(
        AutoencoderKL,
        "decode",
        lambda self, z, *args: counts.append(len(z)) or call(self, z, *args),
    )
    return counts


@pytest.mark.parametrize("n, shown", [(9, 4), (2, 2)])
def test_a_film_of_four_decodes_four(tiny_run, tmp_path, monkeypatch, n, shown):
    counts = count_decoded(monkeypatch)
    assert (
        main(
            [
                "sample",
                str(tiny_run[0]),
                "--n",
                str(n),
                "--steps",
                "5",
                "--out",
                str(tmp_path / "out"),
            ]
        )
        == 0
    )
    assert sum(counts) == 5 * shown + n  # each step of the film, then each image once
    with Image.open(tmp_path / "out" / "denoising.gif") as film:
        assert film.n_frames in (5, 6) and film.size == (64 * shown, 64)  # equal frames are one


@pytest.mark.skipif(os.name == "nt", reason="forks")
def test_two_samplings_at_once_get_a_folder_each(tmp_path):
    """Eight processes ask for the next folder at the same moment, and one holds a name that was
    asked for."""

    def ask(k):
        gate.wait()
        places.put(
            [cli.output_folder(None, tmp_path / "samples" / "generated").name for _ in range(20)]
        )

    fork = multiprocessing.get_context("fork")
    gate, places = fork.Barrier(8), fork.Queue()
    workers = [fork.Process(target=ask, args=(k,)) for k in range(8)]
    for o in workers:
        o.start()
    names = sum((places.get(timeout=60) for _ in workers), [])
    for o in workers:
        o.join(60)
    assert sorted(names) == [f"generated_{i:03d}" for i in range(160)]


def test_two_sample_commands_at_once(tiny_run, tmp_path, monkeypatch):
    """The second command runs from start to end while the first one samples: both succeed, and
    nothing is mixed."""
    run = copy_run(tiny_run[0], tmp_path / "run")
    words, call, inner = (
        ["sample", str(run), "--n", "1", "--steps", "1", "--seed"],
        cli.sample_across_processes,
        [],
    )

    def slow(*args):
        if not inner:
            inner.append(None)
            inner.append(main([*words, "1"]))
        return call(*args)

    monkeypatch.setattr(cli, "sample_across_processes", slow)
    assert main([*words, "0"]) == 0 and inner == [None, 0]
    seeds = {
        p.parent.name: p.read_text().splitlines()[1]
        for p in (run / "samples").glob("generated_*/manifest.csv")
    }
    assert set(seeds) == {"generated_000", "generated_001"} and len(set(seeds.values())) == 2


@pytest.mark.parametrize("words", ["--n 0", "--guidance-scale -1", "--diagnosis FTD"])
def test_a_refused_command_leaves_no_folder(tiny_run, tmp_path, capsys, words):
    run = copy_run(tiny_run[0], tmp_path / "run")
    refused(capsys, "sample", run, *words.split())
    assert not list((run / "samples").glob("generated_*"))


def test_run_without_checkpoint(tiny_run, tmp_path, capsys):
    run = copy_run(tiny_run[0], tmp_path / "run")
    (run / "ldm.safetensors").unlink()
    assert "train ldm" in refused(capsys, "sample", run)
    (run / "autoencoder.safetensors").unlink()
    assert "autoencoder.safetensors" in refused(capsys, "reconstruct", run, tiny_run[1])


def test_checkpoint_of_another_architecture(tiny_run, tmp_path, capsys):
    run = copy_run(tiny_run[0], tmp_path / "run")
    tensors, about = load_weights(run / "autoencoder.safetensors")
    name = next(iter(tensors))
    save_weights(
        run / "autoencoder.safetensors", dict(tensors, **{name: tensors[name][:1].clone()}), about
    )
    assert name in refused(capsys, "reconstruct", run, tiny_run[1])
    (run / "autoencoder.safetensors").write_bytes(
        (run / "autoencoder.safetensors").read_bytes()[:1000]
    )
    assert "autoencoder.safetensors" in refused(capsys, "reconstruct", run, tiny_run[1])


@pytest.mark.parametrize(
    "words, advice",
    [
        ("demo --preset tiny --num-subjects 6 --out {0}", "The same command goes on."),
        (
            "train autoencoder {1} --run {0} --preset tiny",
            "The same command with --resume goes on.",
        ),
    ],
)
def test_who_stops_is_told_how_to_go_on(words, advice, tiny_run, tmp_path, capsys, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt("autoencoder is saved at 8 of 80 images.")

    monkeypatch.setattr("brainldm.training.train_autoencoder", stopped)
    assert main(words.format(tmp_path / "out", tiny_run[1]).split()) == 130
    assert capsys.readouterr().err.endswith(
        f"brainldm: stopped. autoencoder is saved at 8 of 80 images. {advice}\n"
    )


def test_resume_with_other_settings(tiny_run, capsys):
    run, data = tiny_run
    message = refused(
        capsys,
        "train",
        "autoencoder",
        data,
        "--run",
        run,
        "--preset",
        "tiny",
        "--resume",
        "--learning-rate",
        "0.5",
    )
    assert "learning_rate" in message


@pytest.mark.parametrize(
    "flag",
    [
        "--batch-size 0",
        "--learning-rate -1",
        "--total-images 0",
        "--accumulate 3",
        "--log-with nobody",
    ],
)
def test_settings_with_which_training_cannot_work(images, tmp_path, capsys, flag):
    name = flag.split()[0].strip("-").replace("-", "_")
    assert name in refused(
        capsys, "train", "autoencoder", images, "--run", tmp_path / "run", *TINY, *flag.split()
    )


def test_ldm_refuses_other_data(tiny_run, images, tmp_path, capsys):
    run = copy_run(tiny_run[0], tmp_path / "run")
    (run / "ldm.safetensors").unlink()
    assert "not what the autoencoder was trained on" in refused(
        capsys, "train", "ldm", images, "--run", run, "--preset", "tiny", "--resume"
    )


def test_the_command_itself(tmp_path):
    "Installed as a program: one message, no traceback, exit status 1."
    command = [Path(sys.executable).parent / "brainldm", "check", tmp_path / "nowhere"]
    out = subprocess.run(
        command, capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS="1")
    )
    assert out.returncode == 1 and out.stdout == ""
    assert (
        out.stderr.startswith("brainldm: error: ")
        and "Traceback" not in out.stderr
        and "nowhere" in out.stderr
    )


def test_evaluate_says_that_so_few_slices_prove_nothing(tiny_run, tmp_path, capsys):
    run = copy_run(tiny_run[0], tmp_path / "run")
    assert "50 or more" in refused(
        capsys, "evaluate", run, tiny_run[1], "--no-utility", "--steps", "2"
    )
    assert not (run / "report.html").exists() and not (run / "metrics.json").exists()


def test_explore_wants_a_run(tmp_path, capsys):
    refused(capsys, "explore", tmp_path / "nowhere", "--no-browser")


def test_scales_of_single_covariates(tiny_run, tmp_path, capsys):
    run = copy_run(tiny_run[0], tmp_path / "run")
    words = [
        "sample",
        str(run),
        "--n",
        "1",
        "--diagnosis",
        "AD",
        "--slice",
        "3",
        "--steps",
        "2",
        "--scale",
        "diagnosis=2",
        "slice=1.5",
    ]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    assert "diagnosis" in (tmp_path / "out" / "manifest.csv").read_text()
    assert "Expected one of them" in refused(capsys, *words, "--guidance-scale", "3")
    assert "name=value" in refused(capsys, *words[:-2], "diagnosis")
    assert "requested" in refused(capsys, *words[:-2], "age=2")


def test_a_column_of_ones_own_is_learned_and_asked_for(images, tmp_path, capsys):
    (images / "subjects.csv").write_text(
        "subject,apoe,mmse\n001,e3,29\n002,e4,21\n003,e4,\n004,,25\n"
    )
    run = tmp_path / "run"
    said = refused(capsys, "train", "autoencoder", images, "--run", run, *TINY, "--columns", "apeo")
    assert "apeo" in said and "apoe" in said and not run.exists()
    assert (
        main(
            [
                "train",
                "autoencoder",
                str(images),
                "--run",
                str(run),
                *TINY,
                "--columns",
                "apoe",
                "mmse",
            ]
        )
        == 0
    )
    assert main(["train", "ldm", str(images), "--run", str(run), *TINY]) == 0
    capsys.readouterr()
    assert (
        main(["sample", str(run), "--n", "2", "--steps", "2", "--condition", "apoe=e4", "mmse=25"])
        == 0
    )
    assert "apoe (e3|e4), mmse (21 to 29)" in capsys.readouterr().out
    assert "apoe='e2'" in refused(capsys, "sample", run, "--condition", "apoe=e2")
    assert "mmse=40" in refused(capsys, "sample", run, "--condition", "mmse=40")


def test_the_error_is_the_last_line_of_a_log(tiny_run, tmp_path):
    """Notes go to the one stream and the error to the other; a file that holds both must end with
    the error."""
    (tmp_path / 'file').write_text('')
    env = dict(os.environ, OMP_NUM_THREADS='1', BRAINLDM_CACHE=str(tmp_path / 'file' / 'cache'))
    command = [
        sys.executable,
        '-m',
        'brainldm.engineering.cli',
        'train',
        'autoencoder',
        str(tiny_run[1]),
        '--run',
        str(tmp_path / 'run'),
        '--preset',
        'tiny',
    ]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, timeout=300
    )
    assert done.returncode == 1 and 'note:' in done.stdout
    assert (
        done.stdout.strip().splitlines()[-1].startswith('brainldm: error:')
        and 'BRAINLDM_CACHE' in done.stdout.strip().splitlines()[-1]
    )


@pytest.mark.parametrize("flag", [["--size", "64"], ["--crop=200"], ["--no-to-gray"]])
@pytest.mark.parametrize("stage", ["ldm", "prior", "volume"])
def test_flags_of_the_data_at_a_later_stage_are_explained(stage, flag, capsys):
    message = refused(capsys, "train", stage, "data", "--run", "run", *flag)
    assert message.startswith(f"train {stage}: {flag[0].partition('=')[0]}. Expected no setting")
