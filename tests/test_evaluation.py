"Evaluation: floors, intervals that do not exist, JSON that everybody can read, and reports of whole, half and odd runs."
import json
import shutil
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import torch

from brainldm.data import Covariate, DataConfig, SliceDataset, open_dataset
from brainldm.evaluation import (draw_by_condition, json_safe, mean_slice_floor, merge_metrics, middle_conditions, never_seen, read_metrics,
                                 reconstruction_scores, report, report_numbers, score_slices, show_number, subject_interval)
from brainldm.sampling import BrainLDM, Sampler
from brainldm.unet import UNet
from brainldm.vae import AutoencoderKL


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__(); self.tags,self.addresses,self.text = [],[],''; self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag); self.addresses += [v for k,v in attrs if k in ('src', 'href', 'srcset', 'action', 'poster')]

    def handle_data(self, data): self.text += data


@pytest.fixture(scope='module')
def model(tiny_run): return BrainLDM.load(tiny_run[0], device='cpu', precision='no')


@pytest.fixture(scope='module')
def dataset(tiny_run): return open_dataset(tiny_run[1], DataConfig(size=64, validate_fraction=.2, test_fraction=.2), progress=False)


@pytest.fixture
def copy(tiny_run, tmp_path): return shutil.copytree(tiny_run[0], tmp_path/'run')


def test_floor_is_the_train_mean(dataset, tiny_run):
    train = dataset.subset('train')
    for k in range(6):
        rows = np.flatnonzero(train.manifest['slice']==k)
        torch.testing.assert_close(mean_slice_floor(tiny_run[0], [k])[0], train.__getitems__(rows)['image'].mean(0), rtol=0, atol=1e-5)
    assert never_seen(tiny_run[0], np.array([0, 5, 6, -1]))==2


def test_scores_do_not_depend_on_batches(model, dataset, tiny_run):
    a,b = (score_slices(model, dataset, tiny_run[0], batch_size=n) for n in (5, 64))
    pd.testing.assert_frame_equal(a, b, rtol=1e-3)
    assert len(a)==len(dataset) and a.subject.tolist()==dataset.manifest.subject.tolist()


@pytest.mark.parametrize('people', [1, 2])
def test_no_interval_for_one_or_two(people):
    assert subject_interval(pd.Series(np.arange(8.)), pd.Series([i%people for i in range(8)])) is None


def test_interval():
    values,who = pd.Series([1., 2., 3., np.nan, np.nan]),pd.Series(['a', 'b', 'c', 'c', 'd'])
    low,high = subject_interval(values, who)
    assert 1<=low<2<high<=3
    assert subject_interval(values, who)==subject_interval(values, who, seed=0)
    assert subject_interval(values.set_axis([9, 8, 7, 6, 5]), who)==(low, high)            # the index does not matter
    assert subject_interval(pd.Series([1., 2., np.nan]), pd.Series(['a', 'b', 'c'])) is None


def test_slices_without_brain_are_counted(model, dataset, tiny_run):
    images = np.array(dataset.images[:4]); images[1] = 0
    scores = reconstruction_scores(model, SliceDataset(images, dataset.manifest[:4].reset_index(drop=True), dataset.covariates), tiny_run[0])
    assert scores['n_slices_without_brain']==1 and scores['ssim_brain'] is not None and np.isfinite(scores['ssim_brain'])
    assert scores['interval_95']['ssim'] is None and json.loads(json.dumps(scores, allow_nan=False))==scores
    scores = reconstruction_scores(model, SliceDataset(images[1:2], dataset.manifest[1:2].reset_index(drop=True), dataset.covariates), tiny_run[0])
    assert scores['ssim_brain'] is None and scores['floor_mean_slice']['ssim_brain'] is None
    section = report_numbers({'reconstruction test': scores})
    assert section['table'][1][5]=='n/a [n/a, n/a]' and '1 of the slices of test have no brain' in section['text']


def test_people_of_the_training_are_noticed(model, dataset, tiny_run):
    for split,n in (('test', 0), ('train', dataset.subset('train').manifest.subject.nunique())):
        assert reconstruction_scores(model, dataset.subset(split), tiny_run[0])['n_subjects_in_training']==n


def test_size_must_fit(model, dataset, tiny_run):
    with pytest.raises(ValueError, match='DataConfig'): score_slices(model, SliceDataset(dataset.images[:, :32, :32], dataset.manifest, dataset.covariates), tiny_run[0])


@pytest.mark.parametrize('value, text', [(None, 'n/a'), (float('nan'), 'n/a'), (float('inf'), 'n/a'), (.5, '0.500'), (np.float32(.25), '0.250')])
def test_show_number(value, text): assert show_number(value)==text


def test_metrics_hold_no_nan(tmp_path):
    merge_metrics(tmp_path, 'a', dict(x=float('nan'), y=[float('-inf'), 1.], z=(2, None)))
    merge_metrics(tmp_path, 'b', {})
    assert 'NaN' not in (tmp_path/'metrics.json').read_text() and read_metrics(tmp_path)=={'a': dict(x=None, y=[None, 1.], z=[2, None]), 'b': {}}
    assert json_safe('text')=='text'
    for broken in ('{', '[1]'):
        (tmp_path/'metrics.json').write_text(broken)
        with pytest.raises(ValueError, match='read_metrics'): merge_metrics(tmp_path, 'c', {})
        assert (tmp_path/'metrics.json').read_text()==broken


@pytest.mark.parametrize('name', ['<b>x', 'a & b', '"quoted"', 'ünï'])
def test_report_stands_alone(tiny_run, tmp_path, name):
    run = shutil.copytree(tiny_run[0], tmp_path/name)
    page = Page(report(run, steps=3).read_text(encoding='utf-8'))
    assert name in page.text and 'b' not in page.tags and 'script' not in page.tags and 'link' not in page.tags
    assert page.addresses and all(o.startswith('data:image/') for o in page.addresses)
    assert 'url(' not in page.text and 'http' not in page.text


def test_markup_in_conditions_is_escaped(copy):
    settings = json.loads((copy/'config.json').read_text())
    settings['autoencoder']['data']['layout'] = '<script>alert(1)</script>'
    (copy/'config.json').write_text(json.dumps(settings))
    assert 'script' not in Page(report(copy, steps=2).read_text()).tags


@pytest.mark.parametrize('gone', [['ldm.safetensors'], ['metrics.json'], ['log.jsonl'], ['samples'], ['ldm.safetensors', 'log.jsonl', 'samples', 'train_mean.safetensors']])
def test_report_of_what_is_there(copy, gone):
    merge_metrics(copy, 'other', dict(a=float('nan')))
    for name in gone: shutil.rmtree(copy/name) if (copy/name).is_dir() else (copy/name).unlink()
    page = Page(report(copy, steps=2).read_text())
    assert ('no diffusion model' in page.text)==('ldm.safetensors' in gone) and ('Nothing was logged' in page.text)==('log.jsonl' in gone)
    assert 'Not measured yet' in page.text


def test_report_with_numbers(copy, model, dataset):
    scores = reconstruction_scores(model, dataset.subset('test'), copy)
    merge_metrics(copy, 'reconstruction test', scores)
    text = Page(report(copy, steps=2).read_text()).text
    assert show_number(scores['ssim']) in text and show_number(scores['floor_mean_slice']['ssim_brain']) in text and 'n/a' in text     # one test person


def test_report_refuses(tiny_run, tmp_path):
    for place in (tmp_path/'nowhere', tmp_path, tiny_run[1]):
        with pytest.raises(FileNotFoundError, match='not a run folder'): report(place)
    (tmp_path/'config.json').write_text('{}')
    with pytest.raises((FileNotFoundError, ValueError)): report(tmp_path)
    assert not (tmp_path/'report.html').exists()


def test_grids_of_odd_runs(model):
    "No conditions; one slice position; an autoencoder with covariates of its own."
    parts = dict(schedule=model.schedule, latent_mean=model.latent_mean, latent_std=model.latent_std)
    free = Sampler(model.autoencoder, 64, UNet(4, (16,), 1, (True,), 2, (), 16).eval(), **parts)
    assert len(draw_by_condition(free, columns=3, steps=2)[0].axes)==3
    flat = (Covariate('slice', 'continuous', range=(4., 4.)), Covariate('diagnosis', 'categorical', values=('AD', 'NC', 'MCI')))
    one = Sampler(model.autoencoder, 64, UNet(4, (16,), 1, (True,), 2, flat, 16).eval(), **parts)
    assert len(draw_by_condition(one, columns=3, steps=2)[0].axes)==3
    auto = AutoencoderKL(4, (16,), 1, (False,), 8, covariates=(Covariate('site', 'categorical', values=('a', 'b')), Covariate('age', 'continuous', range=(50., 90.))))
    told = Sampler(auto, 64, model.unet, **parts)
    assert middle_conditions(told)==dict(site='a', age=70.)
    grid,walk = draw_by_condition(told, columns=40, steps=1)
    assert len(grid.axes)==2*6 and len(walk.axes)==2*8
