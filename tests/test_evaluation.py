"Evaluation: floors, intervals, JSON that everybody can read; distances, pairs, effects and audits beside closed forms, loops and other libraries."
import json

import numpy as np
import pandas as pd
import pytest
import torch

from brainldm.data import Covariate, DataConfig, SliceDataset, open_dataset
from brainldm.evaluation import (FeatureNet, age_slope, audit_line, augment, condition_effects, coverage_scores, csf_share, diagnosis_effect, diversity_scores,
                                 feature_net, fidelity_scores, fine_detail, frechet_distance, json_safe, kernel_distance, leave_out_interval, match_rows, mean_slice_floor,
                                 memorization_audit, merge_metrics, nearest_rows, nearest_slices, never_seen, pair_similarity, picture_features, read_metrics, read_pictures,
                                 reading_scores, reconstruction_scores, same_condition_pairs, score_slices, show_number, subject_auc, subject_interval, train_feature_net,
                                 utility_scores, ventricle_slices, without_means)
from brainldm.loop import TrainConfig
from brainldm.sampling import BrainLDM


@pytest.fixture(scope='module')
def model(tiny_run): return BrainLDM.load(tiny_run[0], device='cpu', precision='no')


@pytest.fixture(scope='module')
def dataset(tiny_run): return open_dataset(tiny_run[1], DataConfig(size=64, validate_fraction=.2, test_fraction=.2), progress=False)


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


@pytest.mark.parametrize('size', [64, 128, 256])
def test_fluid_of_discs(size):
    yy,xx = np.mgrid[:size, :size]-size/2+.5; radius = np.hypot(yy, xx)/size
    grey = np.where(radius<.1, .05, np.where(radius<.4, .7, 0.))
    x = torch.tensor(grey*2-1, dtype=torch.float32)[None, None].repeat(2, 1, 1, 1); x[1] = -1
    share = csf_share(x)
    assert share[0]==pytest.approx(1/16, abs=.006) and np.isnan(share[1]) and np.isnan(fine_detail(x)[1]) and fine_detail(x)[0]<1e-3
    assert csf_share(x.to(torch.bfloat16))[0]==pytest.approx(share[0], abs=1e-3)


def test_effects(train, held, net):
    share,table = csf_share(train),train.manifest
    assert diagnosis_effect(share, table.diagnosis, table['slice'])>1.5 and diagnosis_effect(share, table.diagnosis, table['slice'], ('NC', 'AD'))<-1.5
    assert age_slope(share, table.age, table['slice'], table.diagnosis)>0
    assert np.isnan(without_means([1., 2., 3.], ['a', 'a', None])[2]) and without_means([1., 2., 3.], ['a', 'a', 'b']).tolist()==[-.5, .5, 0.]
    assert ventricle_slices([1., 1., 3., 2.], [0, 0, 1, 2], .5).tolist()==[1, 2]
    out = condition_effects(net, held, held.manifest, np.arange(8))
    assert out['diagnosis_effect']['value']>1 and out['diagnosis_effect']['interval_95'][0]<out['diagnosis_effect']['value']<out['diagnosis_effect']['interval_95'][1]
    alone = condition_effects(net, held.__getitems__(range(8))['image'], held.manifest[:8], np.arange(8))      # one person: no groups, no interval
    assert np.isnan(alone['diagnosis_effect']['value']) and alone['slice_error']['interval_95'] is None


@pytest.mark.parametrize('size, scales', [(32, 2), (64, 3), (128, 4), (256, 5)])
def test_ms_ssim_beside_torchmetrics(size, scales):
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as ms_ssim
    x = torch.rand(4, 1, size, size, generator=torch.Generator().manual_seed(0))
    x = torch.nn.functional.avg_pool2d(x, 5, 1, 2)
    weights = np.array([.0448, .2856, .3001, .2363, .1333])[:scales]
    want = ms_ssim(x[1:2], x[3:4], data_range=1., betas=tuple(weights/weights.sum())).item()
    assert pair_similarity(x*2-1, np.array([[1, 3], [2, 2]])).tolist()==pytest.approx([want, 1.], abs=1e-5)


def test_diversity(held):
    pairs = same_condition_pairs(held.manifest, most=10_000)
    assert len(pairs)==8*2*6 and (held.manifest.subject.to_numpy()[pairs[:, 0]]!=held.manifest.subject.to_numpy()[pairs[:, 1]]).all()
    real = held.__getitems__(range(len(held)))['image']
    scores = diversity_scores(dict(real=real, same=real[:8].repeat(8, 1, 1, 1)), held.manifest)
    assert scores['same']['ms_ssim']>.999>scores['real']['ms_ssim'] and scores['real']['n_pairs']==96
    with pytest.raises(ValueError, match='no two'): same_condition_pairs(held.manifest[:8])


def test_utility_refuses_without_diagnosis(train, held):
    with pytest.raises(ValueError, match='Leave this measure out'): utility_scores(dict(real=train), SliceDataset(held.images, held.manifest, held.covariates[:1]), SHORT)
    scores = utility_scores(dict(real=train), held, SHORT, channels=(8, 8), seeds=2)['real']
    assert scores['auc']==pytest.approx(np.mean(scores['auc_by_seed'])) and len(scores['auc_by_seed'])==2


@pytest.mark.parametrize('part', [1, 7, 100])
def test_nearest_rows_beside_a_loop(part):
    rng = torch.Generator().manual_seed(0)
    a,b = torch.randn(13, 5, generator=rng),torch.randn(40, 5, generator=rng)
    distance,row = nearest_rows(a, b.split(part))
    loop = torch.stack([(b-o).norm(dim=1) for o in a]).min(1)
    torch.testing.assert_close(distance, loop.values, rtol=1e-4, atol=1e-5); torch.testing.assert_close(row, loop.indices)


@pytest.mark.parametrize('noise', [0., .01, .02])                                        # discs differ by little else than their own noise, 0.02
def test_planted_copies_are_found(train, held, net, noise):
    rows = match_rows(held.manifest, train.manifest)
    copies = train.__getitems__(rows)['image']
    copies = (copies+noise*torch.randn(copies.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
    away = nearest_slices(net, held, train)
    audit = memorization_audit(nearest_slices(net, copies, train), away)
    assert audit['verdict']=='failed' and audit['pixel']['share']>.5
    assert nearest_slices(net, copies, train).pixel_row.tolist()==rows.tolist()
    assert memorization_audit(away, away)['verdict']=='passed'


def test_audit_line(tmp_path):
    assert 'not audited' in audit_line(tmp_path)
    merge_metrics(tmp_path, 'samples prior', dict(memorization=dict(share=.015, allowed=.02, verdict='passed', n=640)))
    assert 'audit passed. 1.5% of 640' in audit_line(tmp_path, 'prior') and 'not audited' in audit_line(tmp_path, 'ldm')
