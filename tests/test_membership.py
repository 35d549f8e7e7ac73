"""Membership inference: what is planted is found, a control stands beside it, and every generator
can be attacked."""

import numpy as np
import pytest

from brainldm.engineering.configs import DataConfig
from brainldm.data import open_dataset
from brainldm.sampling import BrainLDM
from brainldm.advanced.audit import (
    attack_auc,
    denoising_errors,
    mean_slice_errors,
    membership_inference,
)


@pytest.fixture(scope='module')
def model(tiny_run):
    return BrainLDM.load(tiny_run[0], device='cpu', precision='no')


@pytest.fixture(scope='module')
def dataset(tiny_run):
    return open_dataset(
        tiny_run[1], DataConfig(size=64, validate_fraction=0.2, test_fraction=0.2), progress=False
    )


@pytest.mark.parametrize('leak', [0.0, 0.2])
def test_a_planted_leak_is_found_beside_its_control(leak):
    rng = np.random.default_rng(0)
    who = np.repeat(np.arange(80), 5)
    member = who < 60
    errors = rng.normal(1, 0.1, 80)[who] + rng.normal(0, 0.02, 400) - leak * member
    found = attack_auc(errors, member, who)
    assert (found['n_members'], found['n_others']) == (60, 20)
    assert found['control'] == pytest.approx(0.5, abs=0.03) and found['excess'] == pytest.approx(
        found['auc'] - found['control']
    )
    assert found['control_interval_95'][0] < 0.45 and found['control_interval_95'][1] > 0.55
    assert found['auc'] > 0.85 if leak else found['interval_95'][0] < 0.5 < found['interval_95'][1]


def test_scales_of_columns_do_not_matter():
    rng = np.random.default_rng(1)
    errors, who = rng.random((40, 3)), np.repeat(np.arange(10), 4)
    first, second = (
        attack_auc(o, who < 6, who, splits=5) for o in (errors, errors * [1, 50, 0.01])
    )
    assert first['auc'] == pytest.approx(second['auc'])


def test_denoising_errors_do_not_depend_on_the_batch(model, dataset):
    train = dataset.subset('train')
    one, other = (denoising_errors(model, train, (0.1, 0.6), batch_size=b) for b in (5, 64))
    assert one.shape == (len(train), 2) and np.isfinite(one).all()
    np.testing.assert_allclose(one, other, rtol=1e-4)
    assert not np.allclose(one, denoising_errors(model, train, (0.1, 0.6), seed=1))


def test_mean_slice_errors_leave_the_own_subject_out(dataset):
    train = dataset.subset('train')
    images, table = train.images.astype(float) / 127.5, train.manifest
    i = 7
    rest = np.flatnonzero((table['slice'] == table['slice'][i]) & (table.index != i))
    want = ((images[i] - images[rest].mean(0)) ** 2).mean()
    assert mean_slice_errors(train, train, leave_one_out=True)[i] == pytest.approx(want, rel=1e-3)


def test_every_part_of_a_run_is_attacked(model, dataset):
    found = membership_inference(model, dataset.subset('train'), dataset.subset('validate'))
    assert set(found) == {'mean slice, without the run', 'reconstruction error', 'denoising error'}
    for o in found.values():
        assert (
            0 <= o['auc'] <= 1
            and o['n_members'] == dataset.subset('train').manifest.subject.nunique()
        )
