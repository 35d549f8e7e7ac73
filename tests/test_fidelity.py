"Fidelity: a judge of brains, distances, balls and intervals beside formulas, loops and other libraries."
import json

import numpy as np
import pandas as pd
import pytest
import torch

from brainldm.batches import Covariate, SliceDataset
from brainldm.fidelity import (FeatureNet, augment, coverage_scores, feature_net, fidelity_scores, frechet_distance, kernel_distance,
                               leave_out_interval, match_rows, picture_features, read_pictures, reading_scores, subject_auc, train_feature_net)
from brainldm.loop import TrainConfig

COVARIATES = (Covariate('slice', 'continuous', range=(0., 7.)), Covariate('diagnosis', 'categorical', values=('AD', 'NC')), Covariate('age', 'continuous', range=(50., 90.)))
SHORT = TrainConfig(total_images=96, batch_size=16, warmup_images=16)


def cohort(people, seed=0, size=32, split='train'):
    "Discs with a dark hole: wide for AD, a little wider with age; sliding with the slice. Two groups of equal size, eight slices each."
    rng,rows,pictures = np.random.default_rng(seed),[],[]
    yy,xx = np.mgrid[:size, :size]-size/2+.5
    for p in range(people):
        diagnosis,age,base = ('AD', 'NC')[p%2],rng.uniform(50, 90),rng.normal()*.3
        for k in range(8):
            hole = 3.+1.5*(diagnosis=='AD')+.02*(age-70)+base
            grey = np.where(np.hypot(yy-k/4, xx)<hole, 8, 200)*(np.hypot(yy, xx)<13)
            pictures.append(np.clip(grey+rng.normal(size=grey.shape)*3*(grey>0), 0, 255).astype(np.uint8))
            rows.append(dict(path=f'{seed}_{p}_{k}', subject=f'{seed}_{p}', slice=k, diagnosis=diagnosis, age=age, split=split))
    return SliceDataset(np.stack(pictures), pd.DataFrame(rows), list(COVARIATES))


@pytest.fixture(scope='module')
def train(): return cohort(16)


@pytest.fixture(scope='module')
def held(): return cohort(8, seed=1, split='validate')


@pytest.fixture(scope='module')
def net(train): return train_feature_net(train, SHORT, channels=(16, 24))


def test_match_rows(train, held):
    rows = match_rows(held.manifest, train.manifest)
    found = train.manifest.iloc[rows].reset_index(drop=True)
    pd.testing.assert_frame_equal(found[['slice', 'diagnosis']], held.manifest[['slice', 'diagnosis']])
    assert len(set(rows))==len(rows) and not np.array_equal(rows, match_rows(held.manifest, train.manifest, seed=1))
    shuffled = held.manifest.sample(frac=1, random_state=0)                                # the index does not matter
    assert (train.manifest.iloc[match_rows(shuffled, train.manifest)]['slice'].to_numpy()==shuffled['slice'].to_numpy()).all()
    bare = held.manifest.drop(columns='diagnosis')
    assert (train.manifest.iloc[match_rows(bare, train.manifest)]['slice'].to_numpy()==bare['slice'].to_numpy()).all()
    with pytest.raises(ValueError, match='match_rows: 8 unseen rows'): match_rows(train.manifest, held.manifest)


@pytest.mark.parametrize('size', [32, 48, 128])
@pytest.mark.parametrize('channels', [(8, 16), (8, 16, 24)])
def test_feature_net_shapes(size, channels):
    net = FeatureNet(COVARIATES, channels)
    x = torch.randn(3, 1, size, size).clamp(-1, 1)
    assert net.features(x).shape==(3, channels[-1]) and {k: tuple(v.shape) for k,v in net(x).items()}==dict(slice=(3, 1), diagnosis=(3, 2), age=(3, 1))
    with torch.autocast('cpu', torch.bfloat16): assert net.features(x).dtype==torch.float32
    assert 3e5<sum(o.numel() for o in FeatureNet(COVARIATES).parameters())<1e6


def test_augment_depends_on_its_generator_alone():
    x = torch.rand(4, 1, 32, 32)
    state = torch.get_rng_state()
    a,b,c = (augment(x, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(state, torch.get_rng_state())


def test_feature_net_is_kept(train, tmp_path):
    both = SliceDataset(train.images, train.manifest.assign(hash=[f'{i:032x}' for i in range(len(train))]), train.covariates)
    net = feature_net(tmp_path, both, SHORT, channels=(8, 8))
    torch.testing.assert_close(picture_features(feature_net(tmp_path, both), train), picture_features(net, train))
    torch.testing.assert_close(picture_features(train_feature_net(train, SHORT, (8, 8)), train), picture_features(net, train))       # the same seed
    other = SliceDataset(train.images, both.manifest.assign(hash='f'*32), train.covariates)
    with pytest.raises(ValueError, match='remove the file'): feature_net(tmp_path, other)
    with pytest.raises(ValueError, match='train rows alone'): train_feature_net(SliceDataset(train.images, train.manifest.assign(split='test'), train.covariates), SHORT)


def test_readings(train, held, net):
    read = read_pictures(net, held)
    assert list(read)==['slice', 'diagnosis', 'age'] and read.diagnosis.between(0, 1).all()
    torch.testing.assert_close(picture_features(net, held), picture_features(net, held.__getitems__(range(len(held)))['image']))
    scores = reading_scores(net, held)
    assert set(scores)=={'slice', 'diagnosis', 'age'} and scores['diagnosis']['floor']==.5 and json.loads(json.dumps(scores, allow_nan=False))==scores
    lost = SliceDataset(held.images, held.manifest.assign(diagnosis=None, age=np.where(held.manifest['slice']<4, np.nan, held.manifest.age)), held.covariates)
    assert reading_scores(net, lost)['diagnosis']['auc'] is None and np.isfinite(reading_scores(net, lost)['age']['error'])


def test_auc_beside_sklearn():
    from sklearn.metrics import roc_auc_score
    rng = np.random.default_rng(0)
    truth,score = rng.random(40)<.4,rng.integers(6, size=40)                               # ties
    assert subject_auc(score, truth, range(40))[0]==pytest.approx(roc_auc_score(truth, score))
    low,high = subject_auc(score, truth, range(40))[1]
    assert 0<=low<high<=1
    assert subject_auc(np.arange(8.), np.arange(8)==7, range(8), draws=0)==(1., None)      # no resample holds both groups: no interval


@pytest.mark.parametrize('n, d', [(60, 3), (200, 8)])
def test_distances_beside_formulas(n, d):
    from scipy.linalg import sqrtm
    rng = np.random.default_rng(n)
    a,b = rng.normal(size=(n, d)),rng.normal(size=(n, d))@rng.normal(size=(d, d))+.3
    ca,cb = np.cov(a.T),np.cov(b.T)
    formula = ((a.mean(0)-b.mean(0))**2).sum()+np.trace(ca+cb-2*sqrtm(ca@cb).real)
    a,b = torch.from_numpy(a),torch.from_numpy(b)
    assert frechet_distance(a, b)==pytest.approx(formula, rel=1e-6) and frechet_distance(a, a)==pytest.approx(0, abs=1e-8)
    state = torch.get_rng_state(); kid = kernel_distance(a, b)
    assert torch.equal(state, torch.get_rng_state())                                       # torchmetrics shuffles; nobody else's chance is touched
    k = lambda x,y: ((x@y.T)/d+1)**3
    loop = sum((k(o, o).sum()-k(o, o).diagonal().sum())/(n*(n-1)) for o in (a, b))-2*k(a, b).mean()
    assert kid==pytest.approx(loop.item(), rel=1e-9)


def test_coverage_of_crowds():
    rng = np.random.default_rng(0)
    a,b = (torch.from_numpy(rng.normal(size=(80, 4))) for _ in range(2))
    scores = coverage_scores(a, b)
    assert scores['precision']==pytest.approx(coverage_scores(b, a)['recall']) and all(v>.5 for v in scores.values())
    assert coverage_scores(a, b[:1].repeat(80, 1))['recall']<.2                            # one picture, again and again
    who = np.repeat(np.arange(20), 4)
    crowd = a[::4].repeat_interleave(4, 0)+1e-6*torch.from_numpy(rng.normal(size=(80, 4)))
    assert coverage_scores(crowd, b, who)['precision']>coverage_scores(crowd, b)['precision']      # a brain's own slices are no neighbours


def test_fidelity_refuses_few():
    x = torch.randn(64, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match='50 or more'): fidelity_scores(x[:40], x[:40], range(40))
    with pytest.raises(ValueError, match='as many of each'): fidelity_scores(x, x[:60], range(64))
    with pytest.warns(UserWarning, match='A covariance needs 128 or more'): fidelity_scores(torch.randn(60, 64), torch.randn(60, 64), range(60), draws=2)
    scores = fidelity_scores(x, torch.randn(64, 8, dtype=torch.float64), np.repeat(range(8), 8), draws=10)
    assert set(scores['interval_95'])=={'frechet', 'kid', 'precision', 'recall', 'density', 'coverage'} and all(a<=scores[k]<=b or a<b for k,(a,b) in scores['interval_95'].items())
    assert fidelity_scores(x, x, ['a', 'b', 'c', 'd']*16, draws=2)['interval_95']=={}


def test_leave_out_interval_beside_the_textbook():
    v = np.random.default_rng(0).normal(size=300)
    low,high = leave_out_interval(lambda at: dict(m=v[at].mean()), range(300), draws=1_000)['m']
    assert high-low==pytest.approx(2*1.96*v.std()/300**.5, rel=.12) and low<v.mean()<high
