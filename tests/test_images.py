"""Images of any generator: the same scores as for a run, and an error for whatever cannot be
compared."""

import json
import shutil
from functools import partial

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from brainldm.engineering.configs import AEConfig, DataConfig, PhantomConfig, TrainConfig
from brainldm.engineering.phantom import make_cohort
from brainldm.data import open_dataset
from brainldm.engineering.runs import read_metrics
from brainldm.training import train_autoencoder
from brainldm.engineering.codec import save_images, to_bytes
from brainldm.sampling import BrainLDM
from brainldm.advanced.fidelity import match_rows
from brainldm.engineering.report import (
    check_targets,
    evaluate,
    evaluate_images,
    image_side,
    pair_images,
    read_images,
    report_samples,
    sample_matched,
)
from brainldm.engineering.cli import main
from brainldm.advanced import audit
from brainldm.engineering import report


@pytest.fixture(autouse=True)
def quick_audit(monkeypatch):
    "Few planted copies and trials: what their number shows is tested in test_memorization."
    monkeypatch.setattr(audit, "planted_copies", partial(audit.planted_copies, number=6))
    monkeypatch.setattr(report, "audit_images", partial(audit.audit_images, trials=5))


SHORT = TrainConfig(total_images=96, batch_size=16, warmup_images=16)
BRIEF = TrainConfig(total_images=64, batch_size=16, warmup_images=16, learning_rate=1e-3)
GENERATOR_OPTIONS = dict(
    split="test", features=SHORT, utility=None, detection=BRIEF, channels=(8, 16)
)


@pytest.fixture(scope="module")
def world(own_cache, tmp_path_factory):
    """Data of 36 subjects, 9 of them held out, a run that samples random latents, and its two sets
    of samples in a folder."""
    place = tmp_path_factory.mktemp("images")
    config = DataConfig(size=64, test_fraction=0.25)
    data = make_cohort(
        place / "phantom", PhantomConfig(num_subjects=36, num_slices=6, size=64), progress=False
    )
    dataset = open_dataset(data, config, progress=False)
    train_autoencoder(
        dataset,
        place / "run",
        AEConfig(
            data=config,
            total_images=64,
            batch_size=8,
            channels=(16,),
            attention_levels=(False,),
            patch=8,
            latent_channels=4,
            warmup_images=16,
            validate_every=1_000_000,
            checkpoint_every=1_000_000,
        ),
        progress=False,
    )
    train, held_out = dataset.subset("train"), dataset.subset("test")
    requested = train.manifest.iloc[match_rows(held_out.manifest, train.manifest)]
    model = BrainLDM.load(place / "run")
    samples = torch.cat([sample_matched(model, requested, "stage1", seed) for seed in (0, 1)])
    twice = pd.concat([requested, requested])
    save_images(
        samples,
        place / "images",
        {k: twice[k].tolist() for k in ("slice", "diagnosis", "age", "sex")},
        dict(seed=0),
    )
    return dict(
        place=place,
        data=data,
        dataset=dataset,
        run=place / "run",
        images=place / "images",
        held_out=held_out.manifest,
    )


@pytest.fixture
def folder(world, tmp_path):
    return shutil.copytree(world["images"], tmp_path / "images")


def change(folder, **columns):
    "Rewrite the manifest of a folder."
    table = pd.read_csv(folder / "manifest.csv", dtype=str)
    for k, v in columns.items():
        table = (
            table.drop(columns=k)
            if v is None
            else table.assign(**{k: v(table) if callable(v) else v})
        )
    table.to_csv(folder / "manifest.csv", index=False)


def test_both_ways_give_the_same_numbers(world, folder):
    run = evaluate(world["run"], world["dataset"], "stage1", **GENERATOR_OPTIONS)
    assert len(run["fidelity"]["by_seed"]) == len(run["fidelity"]["excess"]["by_seed"]) == 2
    own = evaluate_images(folder, world["dataset"], run=world["run"], **GENERATOR_OPTIONS)
    # whose weights were audited: of images, nobody knows
    assert run["memorization"].pop("weights") and "weights" not in own["memorization"]
    for name in (
        "n",
        "n_subjects",
        "reading",
        "fidelity",
        "spectrum",
        "detection",
        "conditioning",
        "diversity",
        "memorization",
    ):
        assert json.dumps(run[name]) == json.dumps(own[name]), name
    assert read_metrics(folder)["samples images"] == own and own["n_unused"] == 0
    # no real slice
    assert sorted(o.name for o in (folder / "evaluation").iterdir()) == [
        "images_audit.png",
        "images_synthetic.png",
    ]
    assert len(check_targets(own)) == 4 and report_samples("images", own)["table"]


def test_command(world, folder, capsys):
    evaluate_images(folder, world["dataset"], **GENERATOR_OPTIONS)  # leaves a network in the cache
    assert (
        main(
            [
                "evaluate",
                str(world["data"]),
                "--images",
                str(folder),
                "--split",
                "test",
                "--test-fraction",
                ".25",
                "--no-utility",
                "--json",
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "detection" not in read_metrics(folder)["samples images"]  # left out with the others
    assert (
        json.loads(said[said.index("{") :])["fidelity"]
        == read_metrics(folder)["samples images"]["fidelity"]
    )
    for args, text in (
        ([str(world["data"])], "Expected RUN DATA, or DATA --images FOLDER"),
        ([str(world["run"]), str(world["data"]), "--out", "x"], "--out x without --images"),
        ([str(world["data"]), "--images", str(folder), "--steps", "3"], "--steps does nothing"),
        ([str(world["run"]), str(world["data"]), "--crop", "50"], "--crop does nothing with a run"),
        ([str(world["data"]), "--images", str(world["data"])], "no manifest.csv"),
    ):
        assert main(["evaluate", *args]) == 1
        assert text in capsys.readouterr().err


def test_sets_and_rows(world):
    held_out = world["held_out"]
    table = held_out[["slice", "diagnosis"]].sample(frac=1, random_state=0).reset_index(drop=True)
    sets, rows = pair_images(pd.concat([table] * 3, ignore_index=True), held_out)
    assert (
        len(sets) == 3
        and len(set(np.concatenate(sets))) == 3 * len(held_out)
        and rows.tolist() == list(range(len(held_out)))
    )
    for one in sets:
        assert (
            table.iloc[one % len(table)].reset_index(drop=True)[["slice", "diagnosis"]]
            == held_out[["slice", "diagnosis"]]
        ).all(axis=None)
    some, rows = pair_images(table[3:], held_out)  # three held-out slices get none
    assert (
        len(some) == 1
        and len(some[0]) == len(rows) == len(held_out) - 3
        and len(set(some[0])) == len(rows)
    )
    with pytest.raises(ValueError, match="Expected 50 or more"):
        pair_images(table[:40], held_out)


@pytest.mark.parametrize(
    "columns, text",
    [
        (dict(slice=None), "Expected also slice"),
        (dict(path=None), "Expected also path"),
        (dict(diagnosis=None), "no diagnosis in"),
        (dict(diagnosis="MCI"), "Expected one of AD, NC"),
        (dict(diagnosis=lambda t: t.diagnosis.where(t.index != 3)), "a row without diagnosis"),
        (dict(slice="900"), "Expected 0 to"),
        (dict(age="old"), "age 'old'"),
        (
            dict(path=lambda t: t.path.replace("image_0002.png", "image_0001.png")),
            "copies of another one, such as image_0001.png",
        ),
        (
            dict(path=lambda t: t.path.replace("image_0002.png", "away.png")),
            "away.png.*no such file",
        ),
    ],
)
def test_manifest_is_refused(folder, world, columns, text):
    change(folder, **columns)
    with pytest.raises(ValueError, match=text):
        read_images(folder, world["dataset"].covariates)


def test_images_are_refused(folder, world):
    known = world["dataset"].covariates
    Image.fromarray(np.zeros((32, 32), np.uint8)).save(folder / "image_0002.png")
    with pytest.raises(
        ValueError,
        match=r"64 x 64 \(107, such as image_0000.png\), 32 x 32 \(1, such as image_0002.png\)",
    ):
        read_images(folder, known)
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(folder / "image_0002.png")
    with pytest.raises(ValueError, match="image_0002.png.*8-bit gray"):
        read_images(folder, known)
    (folder / "manifest.csv").unlink()
    for call in (lambda: read_images(folder, known), lambda: image_side(folder)):
        with pytest.raises(
            FileNotFoundError, match="has no manifest.csv. Expected a table with the columns path"
        ):
            call()


def test_jpeg_nifti_and_half_slices(world, tmp_path):
    "Any software: a JPEG, a volume of one plane, and a slice between two positions."
    rng = np.random.default_rng(0)
    a, b = rng.integers(1, 255, (2, 64, 64), dtype=np.uint8)
    Image.fromarray(a).save(tmp_path / "a.jpg", quality=100)
    nib.save(
        nib.Nifti1Image(
            np.ascontiguousarray(np.flipud(b).T)[..., None].astype(np.uint8), np.eye(4)
        ),
        tmp_path / "b.nii.gz",
    )
    pd.DataFrame(
        dict(
            path=["a.jpg", "b.nii.gz"],
            slice=[2, 3],
            slice_asked=["2", "2.5"],
            diagnosis=["AD", "NC"],
        )
    ).to_csv(tmp_path / "manifest.csv", index=False)
    images, table = read_images(tmp_path, world["dataset"].covariates)
    assert (
        images.shape == (2, 64, 64)
        and np.abs(images[0].astype(int) - a).mean() < 3
        and np.corrcoef(images[1].ravel(), b.ravel())[0, 1] > 0.99
    )
    assert (
        table.slice.tolist() == [2.0, 2.5]
        and table.diagnosis.tolist() == ["AD", "NC"]
        and image_side(tmp_path) == 64
    )


def test_sample_writes_what_evaluate_reads(tiny_run, tmp_path):
    assert (
        main(
            [
                "sample",
                str(tiny_run[0]),
                "--n",
                "3",
                "--slice",
                "2",
                "--diagnosis",
                "AD",
                "--steps",
                "2",
                "--out",
                str(tmp_path / "s"),
            ]
        )
        == 0
    )
    images, table = read_images(tmp_path / "s", BrainLDM.load(tiny_run[0]).covariates)
    assert (
        images.shape == (3, 64, 64) and set(table.diagnosis) == {"AD"} and set(table.slice) == {2.0}
    )
    assert to_bytes(torch.zeros(1, 2, 2)).dtype == np.uint8
