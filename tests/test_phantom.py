"""What a maintainer needs to know about brainldm.engineering.phantom: same bytes everywhere, files
that agree, errors, interruptions."""

import hashlib, json, subprocess, sys
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from brainldm.engineering.configs import PhantomConfig
from brainldm.engineering.phantom import (
    integrate,
    jacobian_determinant,
    make_cohort,
    make_subject,
    sample_subject,
    sample_warp,
)
from brainldm.engineering import phantom

SMALL = dict(num_slices=4, size=40)


def hash_of(vol):
    return hashlib.sha256(vol.tobytes()).hexdigest()


def files(root):
    return {
        p.relative_to(root).as_posix(): p.read_bytes()
        for p in sorted(Path(root).rglob('*'))
        if p.is_file()
    }


@pytest.fixture(scope='module')
def cohorts(tmp_path_factory):
    root = tmp_path_factory.mktemp('cohorts')
    return {
        f: make_cohort(root / f, PhantomConfig(num_subjects=4, format=f, **SMALL), progress=False)
        for f in ('png', 'nifti')
    }


# ---- the same bytes, whoever asks
# ----------------------------------------------------------------------------------


def test_other_process():
    "A fresh process, with another number of subjects and of threads, samples the same subject."
    code = (
        "import hashlib, torch; torch.set_num_threads(2)\nfrom brainldm.engineering.phantom import"
        " PhantomConfig,"
        " make_subject\nprint(hashlib.sha256(make_subject(PhantomConfig(num_subjects=9,"
        f" **{SMALL}), 3).vol.tobytes()).hexdigest())"
    )
    out = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert out == hash_of(make_subject(PhantomConfig(num_subjects=4, **SMALL), 3).vol)


def test_order_and_number_do_not_matter():
    many, few = (PhantomConfig(num_subjects=n, **SMALL) for n in (50, 3))
    backwards = [make_subject(many, i) for i in (2, 1, 0)][::-1]
    for a, b in zip(backwards, [make_subject(few, i) for i in range(3)]):
        assert (a.subject, a.diagnosis, a.age, a.sex, a.atrophy) == (
            b.subject,
            b.diagnosis,
            b.age,
            b.sex,
            b.atrophy,
        )
        assert (
            hash_of(a.vol) == hash_of(b.vol)
            and (a.ventricle_fraction == b.ventricle_fraction).all()
        )


def test_people_and_seeds_differ():
    seen = {
        hash_of(make_subject(PhantomConfig(num_subjects=3, seed=s, **SMALL), i).vol)
        for s in (0, 1)
        for i in range(3)
    }
    assert len(seen) == 6


def test_streams_are_apart():
    """Diagnosis must not follow from the numbers that give the age: [seed, 0, 0] and [seed] would
    be one stream."""
    first = [sample_subject(PhantomConfig(seed=s), 0) for s in range(400)]
    ad, age = np.array([p.diagnosis == 'AD' for p in first]), np.array([p.age for p in first])
    assert abs(np.corrcoef(ad, age)[0, 1]) < 4 / 400**0.5


def test_anatomy_is_the_same_at_every_size():
    a, b = (make_subject(PhantomConfig(num_slices=4, size=s), 5) for s in (48, 96))
    assert a.atrophy == b.atrophy
    np.testing.assert_allclose(a.ventricle_fraction, b.ventricle_fraction, atol=0.01)
    coarse = b.vol.reshape(4, 48, 2, 48, 2).mean((2, 4))
    assert np.corrcoef(a.vol.ravel(), coarse.ravel())[0, 1] > 0.97


def test_same_cohort_twice(cohorts, tmp_path):
    for form, out in cohorts.items():
        again = make_cohort(
            tmp_path / form, PhantomConfig(num_subjects=4, format=form, **SMALL), progress=False
        )
        assert files(again) == files(out)


# ---- what is in the images
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize('num_slices,size', [(1, 16), (2, 33), (32, 64), (7, 128)])
def test_shapes_and_background(num_slices, size):
    subject = make_subject(PhantomConfig(num_slices=num_slices, size=size), 1)
    assert subject.vol.shape == (num_slices, size, size) and subject.vol.dtype == np.uint8
    assert (
        subject.ventricle_fraction.shape == (num_slices,)
        and (0 <= subject.ventricle_fraction).all()
    )
    assert (subject.ventricle_fraction < 0.3).all()
    assert 0.2 < (subject.vol > 0).mean() < 0.6
    assert max(subject.vol[:, [0, -1]].max(), subject.vol[:, :, [0, -1]].max()) == 0


def test_front_is_up():
    """The ventricles' front horns lie close together, the back horns (atria) far apart, at the
    height of slice 8 of 32."""
    t, origin = phantom.load_template()
    p = torch.tensor(phantom.slice_points(PhantomConfig(size=208)).numpy())[8] - torch.tensor(
        origin
    )
    v = phantom.sample_maps(torch.from_numpy(t['ventricle'])[None], p)[0].numpy() > 0.5
    rows, cols = np.nonzero(v)
    spread = np.abs(cols - 103.5)
    assert spread[rows < np.median(rows)].mean() < spread[rows > 120].mean()


def test_nobody_is_folded():
    for i in range(25):
        subject = sample_subject(PhantomConfig(num_subjects=25, seed=3), i)
        warp = sample_warp(np.random.default_rng(i), subject.atrophy)
        assert jacobian_determinant(warp / phantom.GRID_MM).min() > 0


def test_forth_and_back_is_nowhere():
    flow = torch.from_numpy(
        np.stack(
            [phantom.smooth_noise(np.random.default_rng(i), (20, 24, 22), 4.0) for i in range(3)]
        )
    )
    forth, back = integrate(flow), integrate(-flow)
    here = torch.stack(
        torch.meshgrid(*[torch.arange(n) for n in flow.shape[1:]], indexing='ij'), -1
    ).float()
    there = here + forth.permute(1, 2, 3, 0)
    left = forth + phantom.sample_maps(back, there)
    assert left[:, 4:-4, 4:-4, 4:-4].abs().max() < 0.1 * flow.abs().max()


def test_more_disease_more_fluid():
    fluid = [
        make_subject(
            PhantomConfig(ad_fraction=1, ad_effect=e, **SMALL), 2
        ).ventricle_fraction.mean()
        for e in (-3, 0, 3)
    ]
    assert fluid[0] < fluid[1] < fluid[2]


@pytest.mark.parametrize('share', [0, 0.25, 0.5, 1])
def test_share_of_patients(share):
    found = [
        sample_subject(PhantomConfig(num_subjects=200, ad_fraction=share, seed=7), i).diagnosis
        == 'AD'
        for i in range(200)
    ]
    assert abs(np.mean(found) - share) <= 0.01


# ---- what is in the files
# -----------------------------------------------------------------------------------------


def test_tables_agree(cohorts):
    for form, out in cohorts.items():
        people, slices = pd.read_csv(out / 'subjects.csv'), pd.read_csv(out / 'slices.csv')
        assert list(people.columns) == ['subject', 'diagnosis', 'age', 'sex'] and len(people) == 4
        assert (
            list(slices.columns) == ['path', 'subject', 'slice', 'ventricle_fraction']
            and len(slices) == 16
        )
        listed = set(slices.path) | {'phantom.json', 'slices.csv', 'subjects.csv'}
        assert listed == set(files(out))
        for i, (name, rows) in enumerate(slices.groupby('subject')):
            subject = make_subject(PhantomConfig(num_subjects=4, **SMALL), i)
            assert name == subject.subject and list(rows.slice) == [0, 1, 2, 3]
            np.testing.assert_allclose(
                rows.ventricle_fraction, subject.ventricle_fraction, atol=1e-6
            )
            assert tuple(people.iloc[i]) == (
                subject.subject,
                subject.diagnosis,
                subject.age,
                subject.sex,
            )


def test_both_formats_hold_the_same_pixels(cohorts):
    for name in ('sub-0001', 'sub-0004'):
        volume = np.asarray(nib.load(cohorts['nifti'] / f'volumes/{name}.nii.gz').dataobj)
        for k in range(4):
            with Image.open(cohorts['png'] / f'images/{name}_slice_{k:02d}.png') as pixels:
                assert pixels.mode == 'L' and (np.asarray(pixels) == volume[:, ::-1, k].T).all()


def test_nifti_header(cohorts):
    image = nib.load(cohorts['nifti'] / 'volumes/sub-0002.nii.gz')
    assert image.shape == (40, 40, 4) and image.get_data_dtype() == np.uint8
    assert nib.aff2axcodes(image.affine) == ('R', 'A', 'S')
    np.testing.assert_allclose(image.header.get_zooms(), (208 / 40, 208 / 40, 31 / 3), rtol=1e-5)
    np.testing.assert_allclose(image.affine[:3, 3], (-104 + 2.6, -17 - 104 + 2.6, 0), atol=1e-4)
    assert image.header['sform_code'] == 4 and image.header.get_xyzt_units()[0] == 'mm'
    np.testing.assert_allclose(image.get_qform(), image.affine, atol=1e-4)


def test_note(cohorts):
    note = json.loads((cohorts['png'] / 'phantom.json').read_text())
    assert PhantomConfig(**note['config']) == PhantomConfig(num_subjects=4, format='png', **SMALL)


# ---- errors and interruptions
# -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'setting,error',
    [
        (dict(num_subjects=0), ValueError),
        (dict(num_subjects=True), TypeError),
        (dict(num_slices=0), ValueError),
        (dict(size=1e2), TypeError),
        (dict(size=4096), ValueError),
        (dict(seed=-1), ValueError),
        (dict(seed=None), TypeError),
        (dict(format='jpg'), ValueError),
        (dict(ad_fraction=1.2), ValueError),
        (dict(ad_fraction=float('nan')), ValueError),
        (dict(age_min='60'), TypeError),
        (dict(age_min=80, age_max=60), ValueError),
        (dict(noise_sigma=-1), ValueError),
    ],
)
def test_bad_settings(setting, error):
    with pytest.raises(error, match=f'PhantomConfig: .*{list(setting)[0]}.*Expected .*Try '):
        PhantomConfig(**setting)


@pytest.mark.parametrize('index', [-1, 60, 1.5, '0', None])
def test_bad_number(index):
    with pytest.raises(ValueError, match='make_subject: index=.*Expected .*0 to 59.*Try'):
        make_subject(PhantomConfig(), index)


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full/mine.txt').write_text('keep')
    (tmp_path / 'file').write_text('keep')
    for name in ('full', 'file'):
        with pytest.raises(FileExistsError, match='make_cohort: .*Expected .*Try'):
            make_cohort(tmp_path / name, PhantomConfig(num_subjects=1, **SMALL), progress=False)
    assert files(tmp_path) == {'file': b'keep', 'full/mine.txt': b'keep'}
    (tmp_path / 'empty').mkdir()
    assert (
        make_cohort(tmp_path / 'empty', PhantomConfig(num_subjects=1, **SMALL), progress=False)
        / 'phantom.json'
    ).is_file()


@pytest.mark.parametrize('stop', [KeyboardInterrupt, OSError])
def test_interrupted_cohort(tmp_path, monkeypatch, stop):
    "Half a cohort leaves nothing behind, and the same command then works."
    config, whole = PhantomConfig(num_subjects=3, **SMALL), phantom.make_subject

    def fails(config, index):
        if index == 2:
            raise stop('stopped')
        return whole(config, index)

    monkeypatch.setattr(phantom, 'make_subject', fails)
    with pytest.raises(stop):
        make_cohort(tmp_path / 'a/b', config, progress=False)
    assert not files(tmp_path)
    monkeypatch.setattr(phantom, 'make_subject', whole)
    assert (make_cohort(tmp_path / 'a/b', config, progress=False) / 'phantom.json').is_file()


def test_note_comes_last(tmp_path, monkeypatch):
    "Stopped while moving into place, the folder has no phantom.json."
    replace, moved = phantom.os.replace, []

    def fails(a, b):
        moved.append(Path(b).name)
        if Path(b).name == 'phantom.json':
            raise OSError('disk gone')
        replace(a, b)

    monkeypatch.setattr(phantom.os, 'replace', fails)
    with pytest.raises(OSError, match='disk gone'):
        make_cohort(tmp_path / 'c', PhantomConfig(num_subjects=1, **SMALL), progress=False)
    assert moved[-1] == 'phantom.json' and not (tmp_path / 'c/phantom.json').exists()
