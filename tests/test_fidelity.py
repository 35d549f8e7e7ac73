"""Fidelity: a evaluate of brains, distances, balls and intervals beside formulas, loops and other
libraries."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from brainldm.engineering.configs import TrainConfig
from brainldm.engineering.covariates import Covariate
from brainldm.data import SliceDataset
from brainldm.advanced import fidelity
from brainldm.advanced.fidelity import (
    BANDS,
    POSITIVE,
    PROPORTION,
    FeatureNet,
    augment,
    band_power,
    compare_with_reference,
    coverage_scores,
    detection_scores,
    evaluator_rows,
    evaluator_scores,
    excess_distance,
    feature_net,
    fidelity_scores,
    frechet_distance,
    image_features,
    interval_within,
    jackknife_means,
    kernel_distance,
    kernel_terms,
    leave_out_interval,
    match_rows,
    pick_rows,
    power_ratio,
    predict_covariates,
    reference_rotations,
    shift_pixels,
    subject_auc,
    train_detector,
    train_feature_net,
)

COVARIATES = (
    Covariate('slice', 'continuous', range=(0.0, 7.0)),
    Covariate('diagnosis', 'categorical', values=('AD', 'NC')),
    Covariate('age', 'continuous', range=(50.0, 90.0)),
)
SHORT = TrainConfig(total_images=96, batch_size=16, warmup_images=16)


def cohort(people, seed=0, size=32, split='train'):
    """Discs with a dark hole: wide for AD, a little wider with age; sliding with the slice.

    Two groups of equal size, eight slices each."""
    rng, rows, images = np.random.default_rng(seed), [], []
    yy, xx = np.mgrid[:size, :size] - size / 2 + 0.5
    for p in range(people):
        diagnosis, age, base = ('AD', 'NC')[p % 2], rng.uniform(50, 90), rng.normal() * 0.3
        for k in range(8):
            hole = 3.0 + 1.5 * (diagnosis == 'AD') + 0.02 * (age - 70) + base
            gray = np.where(np.hypot(yy - k / 4, xx) < hole, 8, 200) * (np.hypot(yy, xx) < 13)
            images.append(
                np.clip(gray + rng.normal(size=gray.shape) * 3 * (gray > 0), 0, 255).astype(
                    np.uint8
                )
            )
            rows.append(
                dict(
                    path=f'{seed}_{p}_{k}',
                    subject=f'{seed}_{p}',
                    slice=k,
                    diagnosis=diagnosis,
                    age=age,
                    split=split,
                )
            )
    return SliceDataset(np.stack(images), pd.DataFrame(rows), list(COVARIATES))


@pytest.fixture(scope='module')
def train():
    return cohort(16)


@pytest.fixture(scope='module')
def held_out():
    return cohort(8, seed=1, split='validate')


@pytest.fixture(scope='module')
def net(train):
    return train_feature_net(train, SHORT, channels=(16, 24))


def test_match_rows(train, held_out):
    rows = match_rows(held_out.manifest, train.manifest)
    found = train.manifest.iloc[rows].reset_index(drop=True)
    pd.testing.assert_frame_equal(
        found[['slice', 'diagnosis']], held_out.manifest[['slice', 'diagnosis']]
    )
    assert len(set(rows)) == len(rows) and not np.array_equal(
        rows, match_rows(held_out.manifest, train.manifest, seed=1)
    )
    shuffled = held_out.manifest.sample(frac=1, random_state=0)  # the index does not matter
    assert (
        train.manifest.iloc[match_rows(shuffled, train.manifest)]['slice'].to_numpy()
        == shuffled['slice'].to_numpy()
    ).all()
    bare = held_out.manifest.drop(columns='diagnosis')
    assert (
        train.manifest.iloc[match_rows(bare, train.manifest)]['slice'].to_numpy()
        == bare['slice'].to_numpy()
    ).all()
    with pytest.raises(ValueError, match='match_rows: 8 held-out rows'):
        match_rows(train.manifest, held_out.manifest)


@pytest.mark.parametrize('size', [32, 48, 128])
@pytest.mark.parametrize('channels', [(8, 16), (8, 16, 24)])
def test_feature_net_shapes(size, channels):
    net = FeatureNet(COVARIATES, channels)
    x = torch.randn(3, 1, size, size).clamp(-1, 1)
    assert net.features(x).shape == (3, channels[-1]) and {
        k: tuple(v.shape) for k, v in net(x).items()
    } == dict(slice=(3, 1), diagnosis=(3, 2), age=(3, 1))
    with torch.autocast('cpu', torch.bfloat16):
        assert net.features(x).dtype == torch.float32
    assert 3e5 < sum(o.numel() for o in FeatureNet(COVARIATES).parameters()) < 1e6


def test_augment_depends_on_its_generator_alone():
    x = torch.rand(4, 1, 32, 32)
    state = torch.get_rng_state()
    a, b, c = (augment(x, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(state, torch.get_rng_state())


def test_feature_net_is_kept(train, tmp_path):
    both = SliceDataset(
        train.images,
        train.manifest.assign(hash=[f'{i:032x}' for i in range(len(train))]),
        train.covariates,
    )
    net = feature_net(tmp_path, both, SHORT, channels=(8, 8))
    torch.testing.assert_close(
        image_features(feature_net(tmp_path, both), train), image_features(net, train)
    )
    in_evaluator = pick_rows(train, evaluator_rows(train.manifest))
    # the same seed
    torch.testing.assert_close(
        image_features(train_feature_net(in_evaluator, SHORT, (8, 8)), train),
        image_features(net, train),
    )
    assert (net.fraction, feature_net(tmp_path, both).fraction) == (0.5, 0.5)
    other = SliceDataset(train.images, both.manifest.assign(hash='f' * 32), train.covariates)
    with pytest.raises(ValueError, match='remove the file'):
        feature_net(tmp_path, other)
    with pytest.raises(ValueError, match='train rows alone'):
        train_feature_net(
            SliceDataset(train.images, train.manifest.assign(split='test'), train.covariates), SHORT
        )


def test_readings(train, held_out, net):
    read = predict_covariates(net, held_out)
    assert list(read) == ['slice', 'diagnosis', 'age'] and read.diagnosis.between(0, 1).all()
    torch.testing.assert_close(
        image_features(net, held_out),
        image_features(net, held_out.__getitems__(range(len(held_out)))['image']),
    )
    scores = evaluator_scores(net, held_out)
    assert (
        set(scores) == {'slice', 'diagnosis', 'age'}
        and scores['diagnosis']['baseline'] == 0.5
        and json.loads(json.dumps(scores, allow_nan=False)) == scores
    )
    lost = SliceDataset(
        held_out.images,
        held_out.manifest.assign(
            diagnosis=None,
            age=np.where(held_out.manifest['slice'] < 4, np.nan, held_out.manifest.age),
        ),
        held_out.covariates,
    )
    assert evaluator_scores(net, lost)['diagnosis']['auc'] is None and np.isfinite(
        evaluator_scores(net, lost)['age']['error']
    )


def test_auc_beside_sklearn():
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    truth, score = rng.random(40) < 0.4, rng.integers(6, size=40)  # ties
    assert subject_auc(score, truth, range(40))[0] == pytest.approx(roc_auc_score(truth, score))
    low, high = subject_auc(score, truth, range(40))[1]
    assert 0 <= low < high <= 1
    # no resample holds both groups: no interval
    assert subject_auc(np.arange(8.0), np.arange(8) == 7, range(8), num_resamples=0) == (1.0, None)


@pytest.mark.parametrize('n, d', [(60, 3), (200, 8)])
def test_distances_beside_formulas(n, d):
    from scipy.linalg import sqrtm

    rng = np.random.default_rng(n)
    a, b = rng.normal(size=(n, d)), rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + 0.3
    ca, cb = np.cov(a.T), np.cov(b.T)
    formula = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * sqrtm(ca @ cb).real)
    a, b = torch.from_numpy(a), torch.from_numpy(b)
    assert frechet_distance(a, b) == pytest.approx(formula, rel=1e-6) and frechet_distance(
        a, a
    ) == pytest.approx(0, abs=1e-8)
    state = torch.get_rng_state()
    kid = kernel_distance(a, b)
    # torchmetrics shuffles; nobody else's chance is touched
    assert torch.equal(state, torch.get_rng_state())
    k = lambda x, y: ((x @ y.T) / d + 1) ** 3
    within = sum((k(o, o).sum() - k(o, o).diagonal().sum()) / (n * (n - 1)) for o in (a, b))
    across = (k(a, b).sum() - k(a, b).diagonal().sum()) / (n * (n - 1))
    assert kid == pytest.approx((within - 2 * across).item(), rel=1e-9)
    from torchmetrics.image.kid import KernelInceptionDistance

    # the same, but for the n pairs of rows with the same number
    metric = KernelInceptionDistance(torch.nn.Identity(), subsets=1, subset_size=n)
    metric.update(a, real=True)
    metric.update(b, real=False)
    assert metric.compute()[0].item() == pytest.approx(
        (within - 2 * k(a, b).mean()).item(), rel=1e-9
    )


def test_coverage_of_crowds():
    rng = np.random.default_rng(0)
    a, b = (torch.from_numpy(rng.normal(size=(80, 4))) for _ in range(2))
    scores = coverage_scores(a, b)
    assert scores['precision'] == pytest.approx(coverage_scores(b, a)['recall']) and all(
        v > 0.5 for v in scores.values()
    )
    assert coverage_scores(a, b[:1].repeat(80, 1))['recall'] < 0.2  # one image, again and again
    who = np.repeat(np.arange(20), 4)
    crowd = a[::4].repeat_interleave(4, 0) + 1e-6 * torch.from_numpy(rng.normal(size=(80, 4)))
    # a brain's own slices are no neighbors
    assert coverage_scores(crowd, b, who)['precision'] > coverage_scores(crowd, b)['precision']


def test_fidelity_refuses_few():
    x = torch.randn(64, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match='50 or more'):
        fidelity_scores(x[:40], x[:40], range(40))
    with pytest.raises(ValueError, match='as many of each'):
        fidelity_scores(x, x[:60], range(64))
    with pytest.warns(UserWarning, match='A covariance needs 128 or more'):
        fidelity_scores(torch.randn(60, 64), torch.randn(60, 64), range(60), num_resamples=2)
    scores = fidelity_scores(
        x, torch.randn(64, 8, dtype=torch.float64), np.repeat(range(8), 8), num_resamples=10
    )
    assert set(scores['interval_95']) == {
        'frechet',
        'kid',
        'precision',
        'recall',
        'density',
        'coverage',
    } and all(a <= scores[k] <= b for k, (a, b) in scores['interval_95'].items())
    assert (
        all(
            0 <= scores['interval_95'][k][0] and scores['interval_95'][k][1] <= 1
            for k in ('precision', 'recall', 'coverage')
        )
        and scores['interval_95']['frechet'][0] > 0
    )
    assert fidelity_scores(x, x, ['a', 'b', 'c', 'd'] * 16, num_resamples=2)['interval_95'] == {}


def test_leave_out_interval_beside_the_textbook():
    v = np.random.default_rng(0).normal(size=300)
    low, high = leave_out_interval(
        lambda at: dict(m=v[at].mean()), range(300), num_resamples=1_000
    )['m']
    assert (
        high - low == pytest.approx(2 * 1.96 * v.std() / 300**0.5, rel=0.12)
        and low < v.mean() < high
    )


# -- slices that come in subjects

PLACES = np.cumsum(np.random.default_rng(5).normal(size=(8, 12)), 0)
PLACES = 0.7 * (PLACES - PLACES.mean(0)) / PLACES.std(0)


def slices_of(rng, subjects, shift=0.0, each=False, between=0.6):
    """Features of eight slices a subject: position, subject, noise.

    `each`: every slice of a subject of its own. (8 subjects, 12)"""
    n = 8 * subjects if each else subjects
    x = PLACES + between * rng.normal(size=(n, 1, 12)) + 0.35 * rng.normal(size=(n, 8, 12)) + shift
    return torch.from_numpy(x[np.arange(n), np.arange(n) % 8] if each else x.reshape(-1, 12))


def dealt(rng, pool, held_out, rotations=5):
    """Rows of a pool of subjects beside `held_out` of them, as `match_rows` deals them: at each
    position other subjects in each rotation."""
    order = [rng.permutation(pool) for _ in range(8)]
    return [
        np.stack(
            [order[k][(r * held_out + np.arange(held_out)) % pool] * 8 + k for k in range(8)], 1
        ).ravel()
        for r in range(rotations)
    ]


def test_kid_of_slices_in_subjects():
    """Two sets of 20 x 32 slices of one distribution: the usual estimator says 0.23, pairs of
    different subjects 0."""
    rng, found, usual = np.random.default_rng(0), [], []
    who = np.repeat(np.arange(20), 32)
    k = lambda x, y: ((x @ y.T) / 32 + 1) ** 3
    for _ in range(60):
        a, b = (
            torch.from_numpy(
                ((rng.normal(size=(20, 1, 32)) + rng.normal(size=(20, 32, 32))) / 2**0.5).reshape(
                    -1, 32
                )
            )
            for _ in range(2)
        )
        found.append(kernel_distance(a, b, who, who))
        usual.append(
            (
                sum((k(o, o).sum() - k(o, o).diagonal().sum()) / (640 * 639) for o in (a, b))
                - 2 * k(a, b).mean()
            ).item()
        )
    assert 0.15 < np.mean(usual) < 0.3 and abs(np.mean(found)) < 4 * np.std(found) / 60**0.5 < 0.03
    for name in ('subjects', 'others'):  # either side counts
        assert kernel_distance(a, b, **{name: who}) != kernel_distance(a, b)


def test_jackknife_beside_a_loop():
    rng = np.random.default_rng(1)
    a, b, who, own = (
        slices_of(rng, 6),
        slices_of(rng, 6),
        np.repeat(list('cabdef'), 8),
        np.arange(48) % 7,
    )
    left = jackknife_means(*kernel_terms(a, b, who, own), who)
    loop = [
        kernel_distance(a[at], b[at], who[at], own[at])
        for at in (np.flatnonzero(who != o) for o in 'cabdef')
    ]
    np.testing.assert_allclose(left, loop, rtol=1e-9)


def test_recall_is_the_same_for_two_perfect_generators():
    """Real slices in subjects, and images sampled one by one: both perfect.

    Neighbors of one subject on one side only made them differ."""
    rng, new, old = np.random.default_rng(2), [], []
    who = np.repeat(np.arange(20), 8)
    for _ in range(40):
        held_out, pool, perfect = (
            slices_of(rng, 20, between=0.9),
            slices_of(rng, 20, between=0.9),
            slices_of(rng, 20, each=True, between=0.9),
        )
        rows = dealt(rng, 20, 20, 1)[0]
        beside = coverage_scores(held_out, perfect, who)['recall']
        new.append(coverage_scores(held_out, pool[rows], who, rows // 8)['recall'] - beside)
        old.append(coverage_scores(held_out, pool[rows], who)['recall'] - beside)
    assert (
        abs(np.mean(new)) < 3 * np.std(new) / 40**0.5 + 0.005 and np.mean(old) < np.mean(new) - 0.01
    )


# the truth of 1,800 subjects
@pytest.mark.parametrize('shift, truth', [(0.0, 0.0), (0.15, 0.079), (0.4, 0.654)])
def test_excess_interval_holds_the_truth(shift, truth):
    """95 of 100 intervals should.

    At a truth of 0 a jackknife of pairs is too wide by up to sqrt(2) (Efron & Stein 1981)."""
    rng, hold = np.random.default_rng(3), []
    who = np.repeat(np.arange(20), 8)
    for _ in range(200):
        held_out, pool = slices_of(rng, 20), slices_of(rng, 60)
        rows = dealt(rng, 60, 20)
        low, high = excess_distance(
            held_out,
            [slices_of(rng, 20, shift, each=True)],
            [pool[o] for o in rows],
            who,
            [o // 8 for o in rows],
        )['interval_95']
        hold.append(low <= truth <= high)
    assert 0.88 <= np.mean(hold) <= (0.995 if shift == 0 else 0.99), np.mean(hold)


def test_proportions_hold_the_truth():
    rng, found, names = np.random.default_rng(4), [], ['precision', 'recall', 'coverage']
    who = np.repeat(np.arange(16), 8)
    for _ in range(200):
        held_out, other = slices_of(rng, 16), slices_of(rng, 16, each=True, between=0.8)

        def score(at):
            return coverage_scores(held_out[at], other[at], who[at])

        spans = leave_out_interval(score, who, 20, spans=dict.fromkeys(names, PROPORTION))
        found.append([(score(np.arange(128))[k], *spans[k]) for k in names])
    value, low, high = np.transpose(found)  # each (3, 200)
    assert low.min() >= 0 and high.max() <= 1
    for name, k in zip(names, range(3)):
        assert (
            0.88 <= np.mean((low[k] <= value[k].mean()) & (value[k].mean() <= high[k])) <= 0.995
        ), name


@pytest.mark.parametrize('span', [PROPORTION, (-1.0, 1.0), POSITIVE, (-np.inf, np.inf)])
def test_intervals_keep_to_their_range(span):
    for value in (
        ([span[0]] if np.isfinite(span[0]) else [-3.0])
        + [0.2, 0.999]
        + ([1.0] if span[1] == 1 else [40.0])
    ):
        for error in (0.0, 0.01, 0.5, 5.0):
            low, high = interval_within(value, error, span, n=20)
            assert (
                span[0] <= low <= value + 1e-12
                and value - 1e-12 <= high <= span[1]
                and np.isfinite([low, high]).all()
            )
    assert (
        interval_within(0.5, 0.1, PROPORTION) == pytest.approx((0.3175, 0.6825), abs=1e-4)
        and interval_within(1.0, 0.0, PROPORTION, 20)[0] < 0.9
    )


def test_rotations_take_subjects_the_network_has_not_seen(train, held_out):
    from brainldm.data import SliceDataset

    table = pd.concat(
        [train.manifest]
        + [train.manifest.assign(subject=train.manifest.subject + f'_{i}') for i in range(2)],
        ignore_index=True,
    )
    in_evaluator = evaluator_rows(table)
    sets, seen = reference_rotations(held_out.manifest, table, in_evaluator)
    assert seen == 0 and len(sets) == 5 and not in_evaluator[np.concatenate(sets)].any()
    for rows in sets:
        got = table.iloc[rows].reset_index(drop=True)
        assert (
            len(set(rows)) == len(held_out)
            and (got['slice'] == held_out.manifest['slice']).all()
            and (got.diagnosis == held_out.manifest.diagnosis).all()
        )
    # 24 subjects, 8 at a time: three rotations without one row twice
    assert not set(sets[0]) & set(sets[1])
    # two subjects are left: too few
    few, known = reference_rotations(
        held_out.manifest, train.manifest, np.arange(len(train)) < 8 * 14
    )
    assert known > 0 and len(few) == 5
    by = table.assign(in_evaluator=in_evaluator).groupby('subject').in_evaluator
    assert by.nunique().eq(1).all() and table[in_evaluator].groupby(
        'diagnosis'
    ).subject.nunique().to_dict() == dict(AD=12, NC=12)
    np.testing.assert_array_equal(
        evaluator_rows(table.sample(frac=1, random_state=1)),
        in_evaluator[table.sample(frac=1, random_state=1).index],
    )


def test_scores_beside_their_reference():
    rng, who = np.random.default_rng(6), np.repeat(np.arange(20), 8)
    held_out, pool = slices_of(rng, 20), slices_of(rng, 60)
    rows = dealt(rng, 60, 20)
    sets = [slices_of(rng, 20, 0.4, each=True) for _ in range(2)]
    out = compare_with_reference(
        held_out, sets, [pool[o] for o in rows], who, [o // 8 for o in rows], num_resamples=5
    )
    assert (
        len(out['by_seed']) == 2
        and len(out['by_rotation']) == 5
        and out['excess']['interval_95'][0] > 0
    )
    assert out['excess']['kid'] == pytest.approx(
        np.mean([o['kid'] for o in out['by_seed']]) - out['reference']['kid']
    )
    assert out['by_seed'][0]['recall'] == out['synthetic']['recall'] and json.loads(
        json.dumps(out)
    ) == json.loads(json.dumps(out, allow_nan=False))
    assert out['reference']['kid'] == pytest.approx(
        np.mean([kernel_distance(held_out, pool[o], who, o // 8) for o in rows])
    )


def radius_of(size):
    cycles = np.fft.fftfreq(size) * size
    return np.hypot(*np.meshgrid(cycles, cycles))


def test_power_of_a_point_is_flat_and_a_filter_leaves_its_square():
    point = torch.full((2, 1, 128, 128), -1.0, dtype=torch.float64)
    point[0, 0, 3, 70] = point[1, 0, 64, 64] = 1.0
    flat = band_power(point)
    assert list(flat) == ['0-8', '8-16', '16-24', '24-32', '32-48'] and len(flat) == 2
    np.testing.assert_allclose(flat, 1 / 128**2, rtol=1e-9)
    # a Gaussian of 1.3 pixels, as its transfer function
    transfer = np.exp(-2 * (np.pi * 1.3 * radius_of(128) / 128) ** 2)
    waves = torch.fft.fft2(point + 1) * torch.tensor(transfer)
    soft = band_power(torch.fft.ifft2(waves).real - 1)
    for name, a, b in zip(flat, (0.5, *BANDS[1:]), BANDS[1:]):
        ring = (radius_of(128) >= a) & (radius_of(128) < b)
        np.testing.assert_allclose(soft[name] / flat[name], (transfer[ring] ** 2).mean(), rtol=1e-9)


@pytest.mark.parametrize('k', [3, 8, 20, 40])
@pytest.mark.parametrize('way', [(1, 0), (0, 1), (0.6, 0.8)])
def test_a_wave_is_in_its_band_alone(k, way):
    y, x = np.mgrid[:128, :128] / 128
    turns = [round(k * o) for o in way]
    wave = 0.5 * np.cos(2 * np.pi * (turns[0] * y + turns[1] * x)) + 0.3
    power = band_power(torch.tensor(wave)[None, None]).iloc[0]
    cycles = np.hypot(*turns)
    name = next(f'{a}-{b}' for a, b in zip(BANDS, BANDS[1:]) if a <= cycles < b)
    assert power[name] > 1e-3 and power.drop(name).max() < 1e-20


def test_white_noise_is_flat():
    noise = 0.3 * torch.randn(60, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    for name, value in band_power(noise).mean().items():
        # gray values halve it; 5 standard errors over the smallest ring, 98 different waves
        assert value == pytest.approx(0.15**2, rel=5 / (60 * 98) ** 0.5), name


def test_bands_below_the_nyquist_frequency_and_sizes_that_have_none():
    sizes = {16: 1, 32: 2, 48: 3, 64: 4, 95: 4, 96: 5, 128: 5}
    for size, n in sizes.items():
        assert band_power(torch.zeros(1, 1, size, size)).shape == (1, n)
    for shape in ((1, 1, 14, 14), (1, 1, 64, 48)):
        with pytest.raises(ValueError, match='band_power: images of'):
            band_power(torch.zeros(shape))
    for edges in ((0, 1, 8), (8, 8, 12), (8, 4)):
        with pytest.raises(ValueError, match='band_power: no wave in'):
            band_power(torch.zeros(1, 1, 64, 64), edges)


def test_power_ratio_beside_other_subjects(train, held_out):
    scans = held_out.__getitems__(range(len(held_out)))['image']
    who = held_out.manifest.subject
    other = pick_rows(train, match_rows(held_out.manifest, train.manifest))
    out = power_ratio(scans / 2, held_out, who, [held_out, other], num_resamples=20)
    assert list(out) == ['0-8', '8-16'] and json.loads(json.dumps(out)) == json.loads(
        json.dumps(out, allow_nan=False)
    )
    for name, o in out.items():
        # half the contrast is a quarter of the power, for whichever subjects are left
        assert o['ratio'] == pytest.approx(0.25) and o['interval_95'] == pytest.approx((0.25, 0.25))
        first, second = o['by_rotation']
        assert first == pytest.approx(1) and o['reference'] == pytest.approx((1 + second) / 2)
        assert second == pytest.approx(
            band_power(other)[name].mean() / band_power(scans)[name].mean()
        )
    assert power_ratio(scans, held_out, who, num_resamples=2)['0-8']['reference'] is None
    few = held_out.manifest.subject.str[-1].isin(['0', '1', '2']).to_numpy()
    part = pick_rows(held_out, few)
    assert power_ratio(part, part, part.manifest.subject)['0-8']['interval_95'] is None
    with pytest.raises(ValueError, match='64 real rows beside 9'):
        power_ratio(scans[:9], held_out, who)
    with pytest.raises(ValueError, match='no power in 0-8, 8-16'):
        power_ratio(scans, torch.zeros_like(scans), who)


def test_shifts_keep_gray_values():
    x = torch.full((40, 1, 20, 24), -1.0)
    x[:, :, 8:11, 9:13] = torch.rand(40, 1, 3, 4, generator=torch.Generator().manual_seed(1))
    a, b, c = (shift_pixels(x, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c) and a.shape == x.shape
    assert torch.equal(a.flatten(1).sort().values, x.flatten(1).sort().values)
    assert torch.equal(shift_pixels(x, torch.Generator(), shift=0), x)


DETECT = TrainConfig(
    total_images=640, batch_size=16, warmup_images=64, learning_rate=1e-3, precision='no'
)


def test_a_detector_finds_blur_and_no_difference_where_there_is_none(train, held_out):
    rows = match_rows(held_out.manifest, train.manifest)
    fresh = cohort(8, seed=2)
    same = fresh.__getitems__(match_rows(held_out.manifest, fresh.manifest))['image']
    soft = torch.nn.functional.avg_pool2d(same, 3, 1, 1, count_include_pad=False)
    found = {
        k: detection_scores([o], rows, train, held_out, DETECT)
        for k, o in dict(same=same, soft=soft).items()
    }
    assert found['soft']['auc'] > 0.95 and found['soft']['interval_95'][0] > 0.5
    low, high = found['same']['interval_95']
    assert low < 0.5 < high
    low, high = found['soft']['control']['interval_95']
    assert low < 0.5 < high and found['soft']['control'] == found['same']['control']
    assert json.loads(json.dumps(found)) == json.loads(json.dumps(found, allow_nan=False))


def test_what_a_detector_is_tested_on_it_has_not_seen(train, held_out, monkeypatch):
    "No sample, no condition of a subject and no subject is on both sides."
    rows = match_rows(held_out.manifest, train.manifest)
    number = pd.factorize(train.manifest.subject)[0]  # subjects as gray values: 0 to 15
    plain = np.broadcast_to(np.uint8(number)[:, None, None], train.images.shape)
    numbered = SliceDataset(plain, train.manifest, train.covariates)
    gray = np.uint8(100 + number[rows])
    # a sample shows its subject and, in a corner, its number
    pixels = np.broadcast_to(gray[:, None, None], (2, len(rows), 32, 32)).copy()
    pixels[:, :, 0, 0] = np.arange(2 * len(rows)).reshape(2, -1)
    sets = [torch.tensor(o)[:, None].float() / 127.5 - 1 for o in pixels]
    learned, tested = [], []
    monkeypatch.setattr(
        fidelity, 'train_detector', lambda real, other, config: learned.append((real, other))
    )
    monkeypatch.setattr(
        fidelity,
        'detection_auc',
        lambda net, real, other, who, others, n: tested.append((real, other, who, others)) or {},
    )
    detection_scores(sets, rows, numbered, held_out, DETECT)

    def subjects(images):
        return set((images[:, 5, 5] % 100).tolist())

    (scans, samples), (again, control) = learned
    (real, unseen, who, beside), (every, control_unseen, _, _) = tested
    assert not set(samples[:, 0, 0].tolist()) & set(unseen[:, 0, 0].tolist())
    assert len(samples) + len(unseen) == 2 * len(rows) and min(len(samples), len(unseen)) > 20
    assert subjects(samples) <= subjects(scans) and not subjects(samples) & subjects(unseen)
    assert np.array_equal(scans, again) and len(every) == len(held_out)
    groups = [subjects(o) for o in (scans, control, control_unseen)]
    assert [len(o) for o in groups] == [8, 4, 4] and len(set.union(*groups)) == 16
    # scan and sample of a row stand beside each other
    np.testing.assert_array_equal(np.tile(who, 2), beside)
    assert len(real) == len(unseen) // 2


def test_a_detector_learns_equally_from_sets_of_unequal_size():
    rng = np.random.default_rng(0)
    few, many = (rng.integers(0, 255, (n, 16, 16)).astype(np.uint8) for n in (4, 40))
    short = TrainConfig(total_images=32, batch_size=16, warmup_images=16)
    nets = [train_detector(few, many, short) for _ in range(2)]
    x = torch.zeros(2, 1, 16, 16)
    assert not nets[0].training and torch.equal(nets[0](x), nets[1](x))


def test_a_detector_needs_subjects_in_each_group(train, held_out):
    three = pick_rows(train, np.arange(len(train)) < 3 * 8)
    rows = np.arange(24).repeat(3)[: len(held_out)]
    with pytest.raises(ValueError, match='detection_scores: 3 train subjects make groups of'):
        detection_scores([torch.zeros(len(rows), 1, 32, 32)], rows, three, held_out, DETECT)
