"Evaluation: baselines, intervals, JSON that everybody can read."

import json
import multiprocessing
import os
import time

import numpy as np
import pandas as pd
import pytest
import torch

from brainldm.engineering.configs import DataConfig
from brainldm.engineering.covariates import Covariate
from brainldm.data import SliceDataset, open_dataset
from brainldm.vae import AutoencoderKL
from brainldm.engineering.runs import read_metrics
from brainldm.engineering.codec import Codec
from brainldm.sampling import BrainLDM
from brainldm.advanced.evaluation import (
    count_new_positions,
    json_safe,
    lock_metrics,
    mean_slice_baseline,
    merge_metrics,
    reconstruction_scores,
    score_slices,
    show_number,
    subject_interval,
)
from brainldm.advanced import evaluation


@pytest.fixture(scope='module')
def model(tiny_run):
    return BrainLDM.load(tiny_run[0], device='cpu', precision='no')


@pytest.fixture(scope='module')
def dataset(tiny_run):
    return open_dataset(
        tiny_run[1], DataConfig(size=64, validate_fraction=0.2, test_fraction=0.2), progress=False
    )


def test_floor_is_the_train_mean(dataset, tiny_run):
    train = dataset.subset('train')
    for k in range(6):
        rows = np.flatnonzero(train.manifest['slice'] == k)
        torch.testing.assert_close(
            mean_slice_baseline(tiny_run[0], [k])[0],
            train.__getitems__(rows)['image'].mean(0),
            rtol=0,
            atol=1e-5,
        )
    assert count_new_positions(tiny_run[0], np.array([0, 5, 6, -1])) == 2


def test_scores_do_not_depend_on_batches(model, dataset, tiny_run):
    a, b = (score_slices(model, dataset, tiny_run[0], batch_size=n) for n in (5, 64))
    pd.testing.assert_frame_equal(a, b, rtol=1e-3)
    assert len(a) == len(dataset) and a.subject.tolist() == dataset.manifest.subject.tolist()


def test_new_data_is_told_in_the_words_of_the_run(dataset, tiny_run):
    """Of subjects who are all healthy, NC is the first and only value; the run may call it the
    second."""
    torch.manual_seed(0)
    known = [c for c in dataset.covariates if c.name == 'diagnosis']
    auto = AutoencoderKL(4, (16,), 1, (False,), 8, covariates=known)
    for p in auto.parameters():
        torch.nn.init.normal_(p, std=0.1)
    rows = dataset.manifest[dataset.manifest.diagnosis == 'NC']
    parts = (
        SliceDataset(dataset.images[rows.index], rows.reset_index(drop=True), o)
        for o in (dataset.covariates, [Covariate('diagnosis', 'categorical', values=('NC',))])
    )
    scores = [reconstruction_scores(Codec(auto.eval(), 64), o, tiny_run[0]) for o in parts]
    assert known[0].values == ('AD', 'NC') and scores[0] == scores[1]


@pytest.mark.parametrize('people', [1, 2])
def test_no_interval_for_one_or_two(people):
    assert (
        subject_interval(pd.Series(np.arange(8.0)), pd.Series([i % people for i in range(8)]))
        is None
    )


def test_interval():
    values, who = pd.Series([1.0, 2.0, 3.0, np.nan, np.nan]), pd.Series(['a', 'b', 'c', 'c', 'd'])
    low, high = subject_interval(values, who)
    assert 1 <= low < 2 < high <= 3
    assert subject_interval(values, who) == subject_interval(values, who, seed=0)
    # the index does not matter
    assert subject_interval(values.set_axis([9, 8, 7, 6, 5]), who) == (low, high)
    assert subject_interval(pd.Series([1.0, 2.0, np.nan]), pd.Series(['a', 'b', 'c'])) is None


def test_slices_without_brain_are_counted(model, dataset, tiny_run):
    images = np.array(dataset.images[:4])
    images[1] = 0
    scores = reconstruction_scores(
        model,
        SliceDataset(images, dataset.manifest[:4].reset_index(drop=True), dataset.covariates),
        tiny_run[0],
    )
    assert (
        scores['n_slices_without_brain'] == 1
        and scores['ssim_brain'] is not None
        and np.isfinite(scores['ssim_brain'])
    )
    assert (
        scores['interval_95']['ssim'] is None
        and json.loads(json.dumps(scores, allow_nan=False)) == scores
    )
    scores = reconstruction_scores(
        model,
        SliceDataset(images[1:2], dataset.manifest[1:2].reset_index(drop=True), dataset.covariates),
        tiny_run[0],
    )
    assert scores['ssim_brain'] is None and scores['baseline_mean_slice']['ssim_brain'] is None


def test_people_of_the_training_are_noticed(model, dataset, tiny_run):
    for split, n in (('test', 0), ('train', dataset.subset('train').manifest.subject.nunique())):
        assert (
            reconstruction_scores(model, dataset.subset(split), tiny_run[0])[
                'n_subjects_in_training'
            ]
            == n
        )


def test_size_must_fit(model, dataset, tiny_run):
    with pytest.raises(ValueError, match='DataConfig'):
        score_slices(
            model,
            SliceDataset(dataset.images[:, :32, :32], dataset.manifest, dataset.covariates),
            tiny_run[0],
        )


@pytest.mark.parametrize(
    'value, text',
    [
        (None, 'n/a'),
        (float('nan'), 'n/a'),
        (float('inf'), 'n/a'),
        (0.5, '0.500'),
        (np.float32(0.25), '0.250'),
        (0.0, '0.000'),
        (0.00026500, '0.000265'),
        (-0.0398, '-0.0398'),
        (1 / 3, '0.333'),
    ],
)
def test_show_number(value, text):
    assert show_number(value) == text


def test_metrics_hold_no_nan(tmp_path):
    merge_metrics(tmp_path, 'a', dict(x=float('nan'), y=[float('-inf'), 1.0], z=(2, None)))
    merge_metrics(tmp_path, 'b', {})
    assert 'NaN' not in (tmp_path / 'metrics.json').read_text() and read_metrics(tmp_path) == {
        'a': dict(x=None, y=[None, 1.0], z=[2, None]),
        'b': {},
    }
    assert json_safe('text') == 'text'
    for broken in ('{', '[1]'):
        (tmp_path / 'metrics.json').write_text(broken)
        with pytest.raises(ValueError, match='read_metrics'):
            merge_metrics(tmp_path, 'c', {})
        assert (tmp_path / 'metrics.json').read_text() == broken


def measure(run, name, gate):
    gate.wait()
    for i in range(5):
        merge_metrics(run, f'{name} {i}', dict(a=i))


@pytest.mark.skipif(os.name == 'nt', reason='forks')
def test_two_processes_measure_at_once(tmp_path, monkeypatch):
    """Four processes put in five measurements each, and take their time between reading and
    writing: none is lost."""

    def slow(run, read=read_metrics):
        found = read(run)
        time.sleep(0.02)
        return found

    monkeypatch.setattr(evaluation, 'read_metrics', slow)
    fork = multiprocessing.get_context('fork')
    gate = fork.Barrier(4)
    workers = [fork.Process(target=measure, args=(tmp_path, name, gate)) for name in 'abcd']
    for o in workers:
        o.start()
    for o in workers:
        o.join(60)
    assert [o.exitcode for o in workers] == [0] * 4
    assert set(read_metrics(tmp_path)) == {f'{name} {i}' for name in 'abcd' for i in range(5)}


def test_a_measurement_does_not_wait_for_ever(tmp_path):
    with lock_metrics(tmp_path):
        with pytest.raises(
            RuntimeError, match='another process has held .* Expected'
        ), lock_metrics(tmp_path, seconds=0.1):
            pass
    merge_metrics(tmp_path, 'a', {})  # free again
