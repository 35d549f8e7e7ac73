"""Analysis: probes that are right about nothing, folds that keep subjects together, a bottleneck
that depends on nothing else."""

import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from brainldm.engineering.covariates import Covariate
from brainldm.scheduler import NoiseSchedule, add_noise
from brainldm.unet import UNet
from brainldm.sampling import sample_noise
from brainldm.analysis import auc, bottleneck_features, check_vectors, embed, plot_embedding
from brainldm.advanced.latents import (
    assign_folds,
    describe_probe,
    fold_predictions,
    neighborhood_preservation,
    probe,
    shuffle_target,
)

seeds = st.integers(0, 2**31)
HEIGHT = Covariate('slice', 'continuous', range=(0, 5))
SEX = Covariate('sex', 'categorical', ('F', 'M'))


def cohort(rng, people=30, looks=6, d=20):
    return np.repeat(np.arange(people), looks), rng.normal(size=(people * looks, d))


def test_umap_is_imported_when_it_is_needed():
    code = "import brainldm.analysis, sys; assert 'umap' not in sys.modules"
    subprocess.run([sys.executable, '-c', code], check=True)


# -- maps


@pytest.mark.parametrize('method', ['pca', 'tsne'])
def test_a_seed_names_a_map(method):
    v = np.random.default_rng(0).normal(size=(40, 8))
    a, b = (embed(v, method, seed=3, n_neighbors=5) for _ in range(2))
    assert a.shape == (40, 2) and np.isfinite(a).all()
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('shape', [(5, 2), (4, 300)])
def test_small_tables_have_a_map(shape):
    assert embed(np.random.default_rng(0).normal(size=shape), 'pca', n_neighbors=2).shape == (
        shape[0],
        2,
    )


def test_tensors_of_any_kind():
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(
        np.abs(embed(x, 'pca')), np.abs(embed(x.bfloat16().requires_grad_(), 'pca')), atol=0.1
    )


@pytest.mark.parametrize(
    'bad, match',
    [
        (np.zeros(5), 'Expected'),
        (np.zeros((2, 3)), 'three rows'),
        (np.full((5, 3), np.inf), '5 of 5 rows'),
        (np.zeros((5, 1)), 'two columns'),
    ],
)
def test_bad_vectors(bad, match):
    with pytest.raises(ValueError, match=match):
        embed(bad, 'pca')


@pytest.mark.parametrize('k', [0, 1, 20, 100])
def test_bad_neighbours(k):
    with pytest.raises(ValueError, match=f'n_neighbors={k}'):
        embed(np.eye(20), 'tsne', n_neighbors=k)


def test_neighbours_survive_a_rotation():
    rng = np.random.default_rng(0)
    v = rng.normal(size=(50, 4))
    assert neighborhood_preservation(v, v @ np.linalg.qr(rng.normal(size=(4, 4)))[0], 7) == 1


def test_embedding_of_many_kinds():
    table = pd.DataFrame(
        dict(
            sub=[f's{i}' for i in range(30)],
            sex=['F', None, 'M'] * 10,
            age=np.arange(30.0),
            flag=[True, False] * 15,
        )
    )
    fig = plot_embedding(
        np.random.default_rng(0).normal(size=(30, 2)), table, tuple(table), 'title'
    )
    panels = {ax.get_title(): ax for ax in fig.axes if ax.get_title()}
    assert panels['sub'].get_legend() is None and len(panels['sex'].get_legend().texts) == 2
    assert fig.get_size_inches()[0] <= 7.5
    plt.close(fig)


def test_missing_values_are_gray_and_every_value_has_a_mark():
    table = pd.DataFrame(dict(kind=['a', 'b', None, 'a'], size=[1.0, np.nan, 3.0, 4.0]))
    fig = plot_embedding(np.arange(8.0).reshape(4, 2), table, ('kind', 'size'))
    counts = [[len(o.get_offsets()) for o in ax.collections] for ax in fig.axes[:2]]
    assert counts == [[1, 2, 1], [1, 3]]  # gray first, then a, b; then numbers
    plt.close(fig)


@pytest.mark.parametrize(
    'points, names, match',
    [(4, ('sex',), "no column 'sex'"), (3, ('kind',), '3 points and 4 rows')],
)
def test_maps_without_their_rows_or_columns(points, names, match):
    with pytest.raises(ValueError, match=match):
        plot_embedding(np.zeros((points, 2)), pd.DataFrame(dict(kind=list('abca'))), names)


def test_other_methods_and_tables_are_refused():
    with pytest.raises(ValueError, match='one of umap, tsne, pca'):
        embed(np.eye(20), 'lda')
    with pytest.raises(ValueError, match='Try latents.flatten'):
        check_vectors('here', torch.zeros(4, 2, 3, 3))
    with pytest.raises(ValueError, match='first row 2'):
        check_vectors('here', [[1.0, 2.0], [3.0, 4.0], [np.nan, 5.0]])
    half = torch.ones(4, 3, dtype=torch.bfloat16, requires_grad=True)
    assert check_vectors('here', half).dtype == np.float64


# -- probes


@given(seeds, st.integers(2, 5), st.integers(10, 25), st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_people_are_dealt_whole(seed, folds, people, looks):
    rng = np.random.default_rng(seed)
    who = rng.permutation(np.repeat(np.arange(people), looks))
    y = rng.integers(2, size=people).astype(float)[who]
    fold = assign_folds(y, who, folds, rng)
    table = pd.DataFrame(dict(who=who, fold=fold, y=y))
    assert (table.groupby('who').fold.nunique() == 1).all() and set(fold) == set(range(folds))
    by = table.drop_duplicates('who').groupby('fold')
    assert by.size().max() - by.size().min() <= 1 and by.y.sum().max() - by.y.sum().min() <= 1


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_shuffles_keep_what_they_must(seed):
    rng = np.random.default_rng(seed)
    who = rng.permutation(np.repeat(np.arange(12), 4))
    fold = (who * 7) % 12 % 3
    label, height = rng.integers(2, size=12).astype(float)[who], rng.normal(size=48)
    a, b = (shuffle_target(o, who, fold, rng) for o in (label, height))
    assert all(len(set(a[who == i])) == 1 for i in range(12)) and all(
        a[fold == i].sum() == label[fold == i].sum() for i in range(3)
    )
    assert (
        all(sorted(b[who == i]) == sorted(height[who == i]) for i in range(12))
        and (b != height).any()
    )


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_auc_turns_over(seed):
    rng = np.random.default_rng(seed)
    p, y = rng.normal(size=20).round(1), rng.permutation([0] * 8 + [1] * 12)
    assert abs(auc(p, y) + auc(-p, y) - 1) < 1e-12 and abs(auc(p, y) - auc(np.exp(p), y)) < 1e-12


def test_probe_of_nothing_is_right_about_nothing():
    """Of 60 questions without an answer, some 5 % should fall outside the baseline; at most 8 of
    60 is 3.0 standard deviations off."""
    rng = np.random.default_rng(0)
    outside, scores = 0, []
    for seed in range(60):
        who, v = cohort(rng)
        v = v + 2 * rng.normal(size=(30, 20))[who]  # brains differ
        o = probe(v, rng.permutation([0, 1] * 15)[who], who, seed=seed, shuffles=60)
        outside += not o['baseline_95'][0] <= o['score'] <= o['baseline_95'][1]
        scores.append(o['score'])
    # AUC of 30: standard error .11/sqrt(60)=.014
    assert outside <= 8 and abs(np.mean(scores) - 0.5) < 0.06


def test_rows_as_groups_cheat():
    rng = np.random.default_rng(1)
    who, v = cohort(rng, d=60)
    v = 0.3 * v + rng.normal(size=(30, 60))[who]
    y = rng.permutation([0, 1] * 15)[who]
    assert (
        probe(v, y, who, shuffles=5)['score']
        < 0.75
        < 0.9
        < probe(v, y, np.arange(len(v)), shuffles=5)['score']
    )


def test_probe_does_not_mind_order_names_or_units():
    rng = np.random.default_rng(2)
    who, v = cohort(rng)
    y = rng.permutation([0, 1] * 15)[who]
    v[:, 0] += y
    a = probe(v, y, who, shuffles=5)
    b = probe(
        torch.from_numpy(v * 5 + 3),
        pd.Series(np.where(y, 'b', 'a')),
        [f'sub-{i:02d}' for i in who],
        shuffles=5,
    )
    assert abs(a['score'] - b['score']) < 1e-6 and a['num_subjects'] == b['num_subjects'] == 30
    assert describe_probe(a).startswith(f"AUC {a['score']:.2f} [") and describe_probe(a).endswith(
        '30 subjects'
    )


def test_a_number_about_people_is_scored_by_people():
    rng = np.random.default_rng(3)
    who, v = cohort(rng, 40)
    age = rng.uniform(50, 90, size=40)[who]
    v[:, 2] += (age - 70) / 10
    o = probe(v, age, who)
    assert (
        o['metric'] == 'R2'
        and o['num_subjects'] == 40
        and o['score'] > 0.4
        and o['baseline'] < 0.05
    )


def test_a_dead_feature_says_nothing():
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(20, 3)), rng.normal(size=(20, 1))
    fold = np.arange(20) % 4
    dead = np.concatenate([x, np.ones((20, 3))], 1)
    # d doubles, so the penalty halves
    np.testing.assert_allclose(
        fold_predictions(dead, y, fold, 0.5), fold_predictions(x, y, fold, 1.0), atol=1e-10
    )


def test_a_row_of_nobody_is_refused():
    who = np.repeat(np.arange(20.0), 3)
    who[4] = np.nan
    with pytest.raises(ValueError, match='1 rows without'):
        probe(np.eye(60), np.arange(60.0), who)


@pytest.mark.parametrize(
    'target, match',
    [
        (np.array(['a', 'b', None] * 20, dtype=object), '20 rows without'),
        (np.array([0, 1, -1] * 20), '20 rows without'),
        (np.zeros(60), '1 categories'),
        (np.array(list('abc') * 20), '3 categories'),
        (np.zeros(59), '59 targets'),
    ],
)
def test_probe_refuses(target, match):
    with pytest.raises(ValueError, match=match):
        probe(np.random.default_rng(0).normal(size=(60, 3)), target, np.repeat(np.arange(20), 3))


# -- networks


@pytest.fixture(scope='module')
def unet():
    torch.manual_seed(0)
    return UNet(3, (16, 32), 1, (False, True), 2, (HEIGHT, SEX), 16).eval()


@torch.no_grad()
def deepest(unet, z, cond):
    t, abar = torch.full((5,), 200), NoiseSchedule().abar
    return unet.bottleneck(
        add_noise(z, sample_noise(5, tuple(z.shape[1:]), 0), t, abar), t, cond
    ).mean((2, 3))


@pytest.mark.parametrize('precision', ['no', 'bf16'])
@pytest.mark.parametrize('batch_size', [1, 3, 64])
def test_bottleneck_does_not_depend_on_batches(unet, precision, batch_size):
    z, cond = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0)), dict(
        slice=torch.rand(5), sex=torch.arange(5) % 2
    )
    for c in (cond, None, {'sex': cond['sex']}):
        a, b = (
            bottleneck_features(unet, z, NoiseSchedule(), 200, c, precision=precision, batch_size=n)
            for n in (batch_size, 5)
        )
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4 if precision == 'no' else 0.1)
        if c is cond and precision == 'no':
            torch.testing.assert_close(a, deepest(unet, z, c), rtol=1e-3, atol=1e-4)
        assert a.shape == (5, 32) and a.dtype == torch.float32 and not a.requires_grad


def test_bottleneck_at_the_last_step_sees_noise_alone(unet):
    a, b = (
        bottleneck_features(unet, o * torch.ones(4, 3, 8, 8), NoiseSchedule(), 999)
        for o in (-5.0, 5.0)
    )
    torch.testing.assert_close(a, b)
    assert not torch.equal(
        a, bottleneck_features(unet, torch.ones(4, 3, 8, 8), NoiseSchedule(), 999, seed=1)
    )


def test_not_conditioned_is_hidden(unet):
    z = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    steps, hidden = torch.full((4,), 300), torch.ones(4, 2, dtype=torch.bool)
    noised = add_noise(z, sample_noise(4, (3, 8, 8), 0), steps, NoiseSchedule().abar)
    with torch.no_grad():
        expected = unet.bottleneck(noised, steps, drop=hidden).mean((2, 3))
    found = bottleneck_features(unet, z, NoiseSchedule(), 300)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('t', [-1, 1000, 2.5])
def test_bottleneck_refuses_a_step(unet, t):
    with pytest.raises(ValueError, match='t='):
        bottleneck_features(unet, torch.zeros(2, 3, 8, 8), NoiseSchedule(), t)
