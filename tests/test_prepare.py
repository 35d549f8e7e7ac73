"""A raw folder becomes a cohort: it goes on where it stopped, overwrites nothing, leaves originals
as they are, and says of every head what became of it."""

import importlib
import json
import os
import shutil
import signal
import warnings
from importlib.util import find_spec
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from brainldm.engineering import cohort
from brainldm.engineering.checks import DataFault
from brainldm.engineering.cli import main
from brainldm.engineering.cohort import prepare_cohort
from brainldm.engineering.configs import PrepareConfig
from brainldm.engineering.prepare import LIMITS, Prepared

GOOD, DOUBTFUL, NO_HEAD = 1, 2, 3  # What the stand-in below makes of a head: its first voxel
MEASURES = dict(
    dice=0.97,
    correlation=0.6,
    volume_ml=1400.0,
    edge_cm2=0.0,
    smallest_scale=0.95,
    largest_scale=1.05,
    clipped=0.01,
)
ONE = PrepareConfig(workers=1)  # In this process, where stand-ins count


@pytest.fixture
def prepared(monkeypatch):
    "The heavy steps, replaced; the heads that were prepared, and the masks that came with them."
    seen = []

    def prepare_head(image, mask=None):
        code = int(np.asanyarray(image.dataobj).flat[0])
        seen.append((code, None if mask is None else np.asanyarray(mask.dataobj)))
        if code == NO_HEAD:
            raise DataFault("label map", "0.9 of the foreground equals its neighbors")
        doubt = ["dice 0.5; expected 0.93 to 1 (not found)"] * (code == DOUBTFUL)
        measures = MEASURES | (dict(dice=0.5) if doubt else {})
        return Prepared(np.full((4, 5, 6), 9, np.uint8), np.eye(4), np.eye(4), measures, doubt, [])

    monkeypatch.setattr(cohort, "prepare_head", prepare_head)
    monkeypatch.setattr(cohort, "make_montage", lambda volume: b"strip")
    return seen


def put(root, *heads):
    "Write tiny volumes: name and what becomes of it."
    for name, code in heads:
        path = root / f"{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(np.full((5, 6, 7), code, np.int16), np.eye(4)), path)
    return root


def snapshot(folder):
    "Content and time of every file."
    return {
        p.relative_to(folder).as_posix(): (p.read_bytes(), p.stat().st_mtime_ns)
        for p in Path(folder).rglob("*")
        if p.is_file()
    }


THREE = (("P01", GOOD), ("P02", DOUBTFUL), ("P03", NO_HEAD))


def test_a_refused_head_is_in_no_manifest_until_it_is_accepted(tmp_path, prepared, capsys):
    raw, out = put(tmp_path / "raw", *THREE), tmp_path / "out"
    (raw / "subjects.csv").write_text("subject,diagnosis,age\nP01,NC,70\nP02,AD,80\nP03,AD,81\n")
    before = snapshot(raw)
    assert main(["prepare", str(raw), str(out), "--workers", "1"]) == 1
    said = capsys.readouterr().out
    assert "3 heads: 1 good, 2 refused" in said and "refused: P03: label map" in said
    assert pd.read_csv(out / "manifest.csv").path.tolist() == ["volumes/P01.nii.gz"]
    quality = pd.read_csv(out / "quality.csv")
    assert quality.name.tolist() == ["P03", "P02", "P01"]  # the doubtful ones first
    page = (out / "quality.html").read_text()
    assert page.index("P03") < page.index("P02") < page.index("P01") and "as private as" in page
    # the doubtful head was looked at, and the one that is no head was moved away
    (raw / "P03.nii.gz").rename(tmp_path / "P03.nii.gz")
    assert main(["prepare", str(raw), str(out), "--workers", "1", "--accept", "P02"]) == 0
    manifest = pd.read_csv(out / "manifest.csv")
    assert manifest.subject.tolist() == ["P01", "P02"] and len(prepared) == 3
    subjects = pd.read_csv(out / "subjects.csv")
    assert subjects.diagnosis.tolist() == ["NC", "AD"] and subjects.age.tolist() == [70, 80]
    (tmp_path / "P03.nii.gz").rename(raw / "P03.nii.gz")
    assert snapshot(raw) == before


def test_accepting_nobody_is_an_error(tmp_path, prepared):
    raw, out = put(tmp_path / "raw", *THREE), tmp_path / "out"
    with pytest.raises(ValueError, match="accept 'P2', and there is no such head"):
        prepare_cohort(raw, out, PrepareConfig(workers=1, accept=("P2",)), progress=False)
    with pytest.raises(ValueError, match="accept 'P03', of which there is no volume"):
        prepare_cohort(raw, out, PrepareConfig(workers=1, accept=("P03",)), progress=False)
    assert len(prepared) == 3  # the second call had nothing left to do


def test_it_goes_on_where_it_was_stopped(tmp_path, prepared, monkeypatch):
    raw, out = put(tmp_path / "raw", *((f"P{i:02d}", GOOD) for i in range(4))), tmp_path / "out"
    whole = cohort.prepare_head

    def stopped(image, mask=None):
        if len(prepared) == 2:
            raise KeyboardInterrupt
        return whole(image, mask)

    monkeypatch.setattr(cohort, "prepare_head", stopped)
    with pytest.raises(KeyboardInterrupt):
        prepare_cohort(raw, out, ONE, progress=False)
    assert len(list((out / "records").glob("*.json"))) == 2
    assert not (out / "manifest.csv").exists()
    # a volume without its record is not done: the record is written last
    (out / "records" / "P01.json").unlink()
    first = snapshot(out / "volumes")["P00.nii.gz"]
    monkeypatch.setattr(cohort, "prepare_head", whole)
    found = prepare_cohort(raw, out, ONE, progress=False)
    assert found.ok and len(found.quality) == 4 and len(prepared) == 2 + 3
    assert snapshot(out / "volumes")["P00.nii.gz"] == first
    prepare_cohort(raw, out, ONE, progress=False)
    assert len(prepared) == 5


def test_a_source_that_changed_is_named_and_left(tmp_path, prepared):
    raw, out = put(tmp_path / "raw", ("P01", GOOD), ("P02", GOOD)), tmp_path / "out"
    prepare_cohort(raw, out, ONE, progress=False)
    kept = snapshot(out / "volumes")
    put(raw, ("P02", DOUBTFUL))
    os.utime(raw / "P02.nii.gz", (1, 1))
    found = prepare_cohort(raw, out, ONE, progress=False)
    bad = found.quality[found.quality.status == "refused"]
    assert bad.name.tolist() == ["P02"] and "has changed since" in bad.reasons.iloc[0]
    assert snapshot(out / "volumes") == kept and not found.ok
    assert pd.read_csv(out / "manifest.csv").subject.tolist() == ["P01"]
    (out / "records" / "P02.json").unlink()  # what the note says
    found = prepare_cohort(raw, out, ONE, progress=False)
    assert not found.quality.reasons.str.contains("changed").any() and not found.ok


def test_another_visit_under_the_same_name_is_left_out(tmp_path, prepared):
    """The volume of one visit is never joined to the row of another."""
    raw, out = tmp_path / "raw", tmp_path / "out"
    for visit in ("ses-1", "ses-2"):
        put(raw, (f"sub-01/{visit}/anat/sub-01_{visit}_T1w", GOOD))
    prepare_cohort(raw, out, ONE, progress=False)
    last = PrepareConfig(workers=1, session="last")
    found = prepare_cohort(raw, out, last, progress=False)
    assert not found.ok and "sub-01_ses-2_T1w.nii.gz now" in found.quality.reasons.iloc[0]
    assert not len(pd.read_csv(out / "manifest.csv"))


def test_one_head_that_fails_does_not_stop_the_others(tmp_path, prepared, monkeypatch):
    raw, out = put(tmp_path / "raw", *THREE), tmp_path / "out"
    whole = cohort.prepare_head

    def failing(image, mask=None):
        if int(np.asanyarray(image.dataobj).flat[0]) == NO_HEAD:
            raise RuntimeError("Total Mass of the image was zero")
        return whole(image, mask)

    monkeypatch.setattr(cohort, "prepare_head", failing)
    found = prepare_cohort(raw, out, ONE, progress=False)
    reasons = found.quality.set_index("name").reasons
    assert "failed: RuntimeError: Total Mass" in reasons["P03"] and len(found.quality) == 3


def test_a_repaired_file_is_tried_again_and_a_moved_folder_is_the_same(tmp_path, prepared):
    raw, out = put(tmp_path / "raw", *THREE), tmp_path / "out"
    assert not prepare_cohort(raw, out, ONE, progress=False).ok
    put(raw, ("P03", GOOD))  # fetched again
    found = prepare_cohort(raw, out, ONE, progress=False)
    status = found.quality.set_index("name").status
    assert status["P03"] == "good" and len(prepared) == 4
    moved = shutil.copytree(raw, tmp_path / "moved", copy_function=shutil.copyfile)
    found = prepare_cohort(moved, out, ONE, progress=False)
    assert len(prepared) == 4 and any("RAW was at" in o for o in found.notes)
    assert found.quality.set_index("name").status["P01"] == "good"


def test_what_was_accepted_stays_accepted(tmp_path, prepared):
    raw, out = put(tmp_path / "raw", *THREE[:2]), tmp_path / "out"
    prepare_cohort(raw, out, ONE, progress=False)
    assert prepare_cohort(raw, out, PrepareConfig(workers=1, accept=("P02",)), progress=False).ok
    assert prepare_cohort(raw, out, ONE, progress=False).ok
    (raw / "P02.nii.gz").unlink()
    found = prepare_cohort(raw, out, ONE, progress=False)
    assert any("RAW has no more" in o and "P02" in o for o in found.notes)


def test_two_calls_at_once(tmp_path, prepared):
    raw, out = put(tmp_path / "raw", ("P01", GOOD)), tmp_path / "out"
    out.mkdir()
    with cohort.one_at_a_time(out):
        with pytest.raises(ValueError, match="another call is at work"):
            prepare_cohort(raw, out, ONE, progress=False)


def test_a_new_head_joins_the_others(tmp_path, prepared):
    raw, out = put(tmp_path / "raw", ("P01", GOOD)), tmp_path / "out"
    prepare_cohort(raw, out, ONE, progress=False)
    put(raw, ("P02", GOOD))
    found = prepare_cohort(raw, out, ONE, progress=False)
    assert len(prepared) == 2 and found.quality.name.tolist() == ["P01", "P02"]
    (raw / "P01.nii.gz").unlink()  # its record stays, and it is no longer used
    prepare_cohort(raw, out, ONE, progress=False)
    assert pd.read_csv(out / "manifest.csv").subject.tolist() == ["P02"]
    assert (out / "volumes" / "P01.nii.gz").is_file()


def test_nothing_of_somebody_else_is_written_over(tmp_path, prepared):
    raw, other = put(tmp_path / "raw", ("P01", GOOD)), put(tmp_path / "other", ("P01", DOUBTFUL))
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.tex").write_text("mine")
    before = snapshot(raw)
    with pytest.raises(ValueError, match="is not empty and holds no prepare.json"):
        prepare_cohort(raw, taken, ONE, progress=False)
    assert [o.name for o in taken.iterdir()] == ["thesis.tex"]
    for inside in (raw, raw / "prepared", raw / "derivatives" / "new"):
        with pytest.raises(ValueError, match="inside of the raw folder|is not empty"):
            prepare_cohort(raw, inside, ONE, progress=False)
    out = tmp_path / "out"
    prepare_cohort(raw, out, ONE, progress=False)
    with pytest.raises(ValueError, match="was prepared from"):
        prepare_cohort(other, out, ONE, progress=False)
    about = json.loads((out / "prepare.json").read_text())
    (out / "prepare.json").write_text(json.dumps(about | dict(version=0)))
    with pytest.raises(ValueError, match=r"version 0\)"):
        prepare_cohort(raw, out, ONE, progress=False)
    assert snapshot(raw) == before and len(prepared) == 1


def test_no_table_is_said(tmp_path, prepared):
    raw = put(tmp_path / "raw", ("P01", GOOD))
    found = prepare_cohort(raw, tmp_path / "out", ONE, progress=False)
    assert "no table of subjects was found: --subjects FILE names one" in found.notes
    assert found.ok and (tmp_path / "out" / "subjects.csv").read_text() == "subject\nP01\n"


def test_a_mask_that_came_with_a_head_goes_with_it(tmp_path, prepared):
    raw = tmp_path / "fmriprep"
    for end, code in (("preproc_T1w", GOOD), ("brain_mask", 7)):
        put(raw, (f"sub-01/anat/sub-01_desc-{end}", code), (f"sub-02/anat/sub-02_desc-{end}", code))
    (raw / "sub-02/anat/sub-02_desc-brain_mask.nii.gz").unlink()
    found = prepare_cohort(raw, tmp_path / "out", ONE, progress=False)
    assert found.ok and [(code, mask is None) for code, mask in prepared] == [(1, False), (1, True)]
    assert (prepared[0][1] == 7).all()


def test_visits_have_names_of_their_own(tmp_path, prepared):
    raw, out = tmp_path / "bids", tmp_path / "out"
    visits = [f"sub-01/ses-{o}/anat/sub-01_ses-{o}_T1w" for o in ("M00", "M12")]
    put(raw, *((o, GOOD) for o in (*visits, "sub-02/ses-M00/anat/sub-02_ses-M00_T1w")))
    every = PrepareConfig(workers=1, session="all")
    assert prepare_cohort(raw, out, every, progress=False).ok
    manifest = pd.read_csv(out / "manifest.csv")
    assert manifest[["subject", "session"]].values.tolist() == [
        ["sub-01", "ses-M00"],
        ["sub-01", "ses-M12"],
        ["sub-02", "ses-M00"],
    ]
    assert manifest.path.is_unique and all((out / o).is_file() for o in manifest.path)


def test_brats_needs_no_word_of_its_user(tmp_path, prepared):
    "One contrast of four, no label map, and the table that calls its subjects Brats20ID."
    raw, out = tmp_path / "raw", tmp_path / "out"
    names = [f"BraTS20_Training_{i:03d}" for i in (1, 2)]
    for kind in ("t1", "t1ce", "t2", "flair", "seg"):
        put(raw, *((f"{o}/{o}_{kind}", GOOD) for o in names))
    survival = "Brats20ID,Age,Survival_days\nBraTS20_Training_001,60.5,9\n"
    (raw / "survival_info.csv").write_text(survival)
    found = prepare_cohort(raw, out, ONE, progress=False)
    assert found.ok and [Path(o).name for o in found.quality.path] == [
        f"{o}_t1.nii.gz" for o in names
    ]
    subjects = pd.read_csv(out / "subjects.csv")
    assert subjects.age.tolist()[0] == 60.5 and subjects.age.isna().tolist() == [False, True]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no kill -9 here")
def test_a_worker_that_is_killed_says_so(tmp_path, monkeypatch):
    def killed(job, one_core):
        import os
        import signal

        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(cohort, "process_job", killed)
    raw, out = put(tmp_path / "raw", ("P01", GOOD), ("P02", GOOD)), tmp_path / "out"
    with pytest.raises(RuntimeError, match="a worker was killed, with 2 at work.*fewer --workers"):
        prepare_cohort(raw, out, PrepareConfig(workers=2), progress=False)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the trial forks")
@pytest.mark.parametrize("name", ["four_classes", "lfs", "datalad", "png_classes", "stacks"])
def test_the_trial_of_layouts_ends_as_it_should(name, tmp_path, monkeypatch):
    "The quick rows of `tests/benchmarks/raw_to_sample.py`: images, and what is refused."
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "benchmarks"))
    trial = importlib.import_module("raw_to_sample")
    row = trial.ROWS[name]
    done, memory = trial.run_row(row, tmp_path)
    ends, right = trial.judge(row, done, tmp_path)
    assert right, (ends, done[-1]["said"])
    assert len(done) == (1 if row.refused else 4) and memory > 0


@pytest.mark.skipif(
    not (find_spec("SimpleITK") and find_spec("deepbet")), reason="extra prepare is not installed"
)
def test_a_raw_head_becomes_an_aligned_brain(tmp_path, capsys):
    "One synthetic head with skull, tilted and stored as PSR, through all steps."
    from brainldm.engineering.heads import synthetic_head
    from brainldm.engineering.prepare import load_template

    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    head = synthetic_head(3, (2.4, 2.4, 2.6), "PSR", (8, -5, 4), (6, -9, 12))
    nib.save(head, raw / "P01.nii.gz")
    before = snapshot(raw)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(["prepare", str(raw), str(out), "--workers", "1"]) == 0
    assert "1 heads: 1 good" in capsys.readouterr().out and snapshot(raw) == before
    image, template = nib.load(out / "volumes" / "P01.nii.gz"), load_template()
    assert image.shape == template.image.shape and np.allclose(image.affine, template.affine)
    brain = np.asarray(image.dataobj)
    inside, expected = brain > 0, template.mask
    assert brain.dtype == np.uint8
    assert 2 * (inside & expected).sum() / (inside.sum() + expected.sum()) > 0.93
    assert np.corrcoef(brain[expected], template.image[expected])[0, 1] > LIMITS["correlation"][0]
    assert 190 <= np.median(brain[template.white]) <= 210
    assert json.loads((out / "prepare.json").read_text())["planes"] == [72, 104]
    assert (out / "montages" / "P01.png").stat().st_size > 10_000
