"Square images, the cache, covariates, batches that resume."

import json
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from test_data import CONFIG, look, make_oasis, image, save
from torch.testing import assert_close
from torch.utils.data import DataLoader

from brainldm.engineering.configs import DataConfig
from brainldm.engineering.covariates import Covariate, encode_covariates, find_covariates
from brainldm.engineering.cache import fingerprint, prepare_image
from brainldm.data import ShuffledBatches, SliceDataset, eval_batches, list_slices, open_dataset
from brainldm.data import prepare_dataset
from brainldm.engineering import cache

# ---- square images and cache


def test_prepare_picture():
    p = image(3, 32, 32)
    assert (prepare_image(p, 32) == p).all()  # nothing to do: bytes unchanged
    wide = image(3, 40, 32)
    padded = prepare_image(wide, 40)
    assert (padded[:, 4:36] == wide).all() and not padded[:, :4].any() and not padded[:, 36:].any()
    assert (prepare_image(wide, 20, crop=20) == wide[10:30, 6:26]).all()
    with pytest.raises(ValueError, match='crop=41'):
        prepare_image(wide, 32, crop=41)
    flat = np.full((64, 64), 77, np.uint8)
    assert (prepare_image(flat, 16) == 77).all() and (prepare_image(flat, 100) == 77).all()
    checker = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    # antialiased: not one of the two colors
    assert np.abs(prepare_image(checker, 16).astype(int) - 127).max() <= 8


def test_crop_too_large_is_said(tmp_path):
    with pytest.raises(ValueError, match='crop=64'):
        open_dataset(
            make_oasis(tmp_path),
            DataConfig(size=32, crop=64),
            progress=False,
            cache_dir=tmp_path / 'cache',
        )
    assert not list((tmp_path / 'cache').iterdir())  # no half cache is left


def caches(folder):
    "The caches in a folder; beside them may lie records of looks."
    return [o for o in folder.iterdir() if (o / 'images.npy').exists()]


@pytest.fixture
def cohort(tmp_path):
    return make_oasis(tmp_path / 'in'), tmp_path / 'cache'


def cached(cohort, **kw):
    return open_dataset(
        cohort[0], DataConfig(**{'size': 32, **kw}), progress=False, cache_dir=cohort[1]
    )


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads /proc')
def test_no_file_is_open_when_its_folder_is_renamed(cohort, monkeypatch):
    "Windows renames no folder that holds an open or a mapped file."
    rename, seen = Path.rename, []

    def look(self, target):
        seen.append(str(self) in Path('/proc/self/maps').read_text())
        return rename(self, target)

    monkeypatch.setattr(Path, 'rename', look)
    cached(cohort)
    assert seen == [False]


@pytest.mark.parametrize(
    'values', [dict(age=[]), dict(age=[], sex=['F', 'M']), dict(age=[70, 71], sex=['F'] * 3)]
)
def test_lists_that_fit_no_number_of_rows(values):
    known = [
        Covariate('age', 'continuous', range=(60, 90)),
        Covariate('sex', 'categorical', values=('F', 'M')),
    ]
    with pytest.raises(
        ValueError, match=f"encode_covariates: {len(values['age'])} values of 'age'"
    ):
        encode_covariates(values, known)


def test_cache_is_reused_and_keyed(cohort, monkeypatch):
    first = cached(cohort)
    assert isinstance(first.images, np.memmap) and first.images.dtype == np.uint8
    folder = caches(cohort[1])[0]
    assert sorted(o.name for o in folder.iterdir()) == ['images.npy', 'manifest.csv', 'meta.json']
    assert json.loads((folder / 'meta.json').read_text())['data'] == fingerprint(first.manifest)
    with monkeypatch.context() as m:
        m.setattr(cache, 'write_cache', lambda *a: pytest.fail('written again'))
        assert (cached(cohort).images == first.images).all()
    cached(cohort, size=16)
    cached(cohort, crop=24)
    assert len(caches(cohort[1])) == 3
    save(cohort[0] / 'keras_png_slices_train/case_001_slice_0.nii.png', image(5555))
    assert (
        fingerprint(cached(cohort).manifest) != fingerprint(first.manifest)
        and len(caches(cohort[1])) == 4
    )


def test_cache_moves_with_the_data(cohort, monkeypatch):
    cached(cohort)
    moved = cohort[0].rename(cohort[0].with_name('elsewhere'))
    monkeypatch.setattr(cache, 'write_cache', lambda *a: pytest.fail('written again'))
    open_dataset(moved, DataConfig(size=32), progress=False, cache_dir=cohort[1])


@pytest.mark.parametrize('damage', ['flip', 'cut', 'no meta', 'bad meta', 'no images', 'pickle'])
def test_damaged_cache_is_made_anew(cohort, damage):
    first = np.array(cached(cohort).images)
    folder = caches(cohort[1])[0]
    images, meta = folder / 'images.npy', folder / 'meta.json'
    raw = images.read_bytes()
    if damage == 'flip':
        images.write_bytes(raw[:-9] + bytes([raw[-9] ^ 255]) + raw[-8:])
    if damage == 'cut':
        images.write_bytes(raw[:-100])
    if damage == 'no meta':
        meta.unlink()
    if damage == 'bad meta':
        meta.write_text('[1')
    if damage == 'no images':
        images.unlink()
    if damage == 'pickle':
        np.save(images, np.array([{}], dtype=object), allow_pickle=True)
    assert (cached(cohort).images == first).all() and images.read_bytes() == raw


def test_interrupted_cache_leaves_nothing(cohort, monkeypatch):
    count = iter(range(10**6))

    def stop(*a):
        if next(count) == 12:
            raise KeyboardInterrupt
        return prepare_image(*a)

    with monkeypatch.context() as m:
        m.setattr(cache, 'prepare_image', stop)
        with pytest.raises(KeyboardInterrupt):
            cached(cohort)
    assert not list(cohort[1].iterdir())
    assert len(cached(cohort)) == 30


def test_processes_that_build_at_once(cohort):
    code = (
        "import sys; from brainldm.data import DataConfig, open_dataset;"
        " print(open_dataset(sys.argv[1], DataConfig(size=32), False,"
        " sys.argv[2]).images[:].sum())"
    )
    runs = [
        subprocess.Popen(
            [sys.executable, '-c', code, *map(str, cohort)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    a, b = (o.communicate(timeout=60)[0] for o in runs)
    assert [o.returncode for o in runs] == [0, 0] and a == b and len(caches(cohort[1])) == 1


def test_lost_race_for_the_cache(cohort, monkeypatch):
    first = np.array(cached(cohort).images)
    folder = caches(cohort[1])[0]
    # not there, still not there, then another process was faster
    answers = iter([False, False, True])
    monkeypatch.setattr(cache, 'cache_is_complete', lambda o: next(answers))
    monkeypatch.setattr(cache.shutil, 'rmtree', lambda o, **kw: None)
    assert (
        (cached(cohort).images == first).all()
        and (folder / 'meta.json').exists()
        and next(answers, None) is None
    )


def test_file_changed_after_the_check(cohort):
    report = look(cohort[0])
    save(cohort[0] / 'keras_png_slices_train/case_001_slice_0.nii.png', image(5555))
    with pytest.raises(RuntimeError, match='changed since'):
        prepare_dataset(report.manifest, cohort[0], CONFIG, cohort[1], False)
    with pytest.raises(ValueError, match='check_dataset'):
        prepare_dataset(list_slices(cohort[0], CONFIG).manifest, cohort[0], CONFIG, cohort[1])


def test_two_runs_agree(cohort, tmp_path):
    a, b = (open_dataset(cohort[0], CONFIG, progress=False, cache_dir=tmp_path / o) for o in 'ab')
    assert fingerprint(a.manifest) == fingerprint(b.manifest) and (a.images == b.images).all()


# ---- covariates, data set and batches


def test_covariates():
    m = pd.DataFrame(
        dict(
            slice=[0, 31, 40],
            diagnosis=['NC', 'AD', 'AD'],
            age=[60.0, 80.0, 95.0],
            sex=['F', None, 'M'],
            split=['train', 'train', 'test'],
        )
    )
    covs = find_covariates(m)
    assert covs == [
        Covariate('slice', 'continuous', range=(0, 31)),
        Covariate('diagnosis', 'categorical', values=('AD', 'NC')),
        Covariate('age', 'continuous', range=(60, 80)),
        Covariate('sex', 'categorical', values=('F',)),
    ]
    assert [Covariate(**json.loads(json.dumps(vars(o)))) for o in covs] == covs
    assert [
        o.name
        for o in find_covariates(
            m.assign(apoe=['e3', None, 'e4']), DataConfig(columns=('apoe', 'age'))
        )
    ] == ['slice', 'diagnosis', 'age', 'sex', 'apoe']
    with pytest.raises(ValueError, match="'height'"):
        find_covariates(m, DataConfig(columns=('height',)))
    got = encode_covariates(
        dict(slice=[0, 31, 15.5], diagnosis='AD', age=[None, 70, 60], sex=[None, 'F', 'F']), covs
    )
    assert_close(got['slice'], torch.tensor([0, 1, 0.5]))
    assert_close(got['diagnosis'], torch.tensor([0, 0, 0]))
    assert_close(got['age'], torch.tensor([np.nan, 0.5, 0], dtype=torch.float32), equal_nan=True)
    assert_close(got['sex'], torch.tensor([-1, 0, 0]))
    with pytest.raises(ValueError, match='one of AD, NC'):
        encode_covariates(dict(diagnosis='MCI'), covs)
    with pytest.raises(ValueError, match="unknown condition 'weight'"):
        encode_covariates(dict(weight=3), covs)
    with pytest.raises(ValueError, match='Expected a number'):
        encode_covariates(dict(age='old'), covs)
    # M was never seen in train
    with pytest.raises(ValueError, match='sex='):
        encode_covariates(m, covs)
    with pytest.raises(ValueError, match='2 values'):
        encode_covariates(dict(age=[1, 2], slice=[1, 2, 3]), covs)
    one = Covariate('slice', 'continuous', range=(5, 5))
    assert encode_covariates(dict(slice=5), [one])['slice'].item() == 0
    for bad in (
        dict(kind='x'),
        dict(kind='continuous'),
        dict(kind='categorical', values=()),
        dict(kind='continuous', range=(2, 1)),
    ):
        with pytest.raises(ValueError):
            Covariate('a', **bad)


def test_dataset(cohort):
    (cohort[0] / 'subjects.csv').write_text(
        'subject,diagnosis\n' + ''.join(f'{i:03d},{"AD" if i%2 else "NC"}\n' for i in range(1, 10))
    )
    ds = cached(cohort)
    batch = ds.__getitems__([3, 0])
    assert batch['image'].shape == (2, 1, 32, 32) and batch['image'].dtype == torch.float32
    assert_close(batch['image'][1, 0], torch.from_numpy(np.array(ds.images[0])).float() / 127.5 - 1)
    assert ds[3]['image'].equal(batch['image'][0]) and ds[3]['slice'] == batch['slice'][0]
    test = ds.subset('test')
    assert (
        set(test.manifest.split) == {'test'}
        and test.covariates == ds.covariates
        and isinstance(test.images, np.memmap)
    )
    assert test.conditions['diagnosis'][-1] == -1  # subject 010 has no row
    full = torch.cat([o['image'] for o in eval_batches(ds, 7)])
    assert full.shape == (30, 1, 32, 32) and full[11].equal(ds[11]['image'])
    with pytest.raises(ValueError, match='no row of split'):
        test.subset('train')
    with pytest.raises(ValueError, match='one row an image'):
        SliceDataset(ds.images[:3], ds.manifest)
    with pytest.raises(IndexError):
        ds[30]


@pytest.mark.parametrize('n,batch_size', [(10, 3), (7, 7), (3, 8), (1, 4), (64, 16)])
def test_shuffled_batches(n, batch_size):
    flat = [i for b in islice(ShuffledBatches(n, batch_size, seed=1), n * 2) for i in b]
    for epoch in range(len(flat) // n):
        assert sorted(flat[epoch * n : (epoch + 1) * n]) == list(range(n))
    for start in (0, 1, 5):  # batch k does not depend on where we start
        assert list(islice(ShuffledBatches(n, batch_size, 1, start), 3)) == list(
            islice(ShuffledBatches(n, batch_size, 1), start, start + 3)
        )
    if n > 9:
        assert next(iter(ShuffledBatches(n, batch_size, 2))) != next(
            iter(ShuffledBatches(n, batch_size, 1))
        )


def test_bad_batches():
    with pytest.raises(ValueError):
        ShuffledBatches(0, 4, 0)


@pytest.mark.parametrize('workers', [0, 2])
def test_loader(cohort, workers):
    ds = cached(cohort).subset('train')

    def loader(start=0):
        return DataLoader(
            ds,
            batch_sampler=ShuffledBatches(len(ds), 4, 0, start),
            collate_fn=dict,
            num_workers=workers,
        )

    batches = list(islice(loader(), 6))
    expected = [ds.__getitems__(o) for o in islice(ShuffledBatches(len(ds), 4, 0), 6)]
    for a, b in zip(batches, expected):
        assert a.keys() == b.keys()
        for k in a:
            assert_close(a[k], b[k], equal_nan=True)
    assert_close(next(iter(loader(3)))['image'], expected[3]['image'])
