"""The audit: effects and pairs beside closed forms, loops and other libraries.

Copies: test_memorization.py."""

import numpy as np
import pytest
import torch

from brainldm.advanced.audit import (
    age_slope,
    condition_effects,
    csf_fraction,
    diagnosis_effect,
    diversity_scores,
    pair_similarity,
    same_condition_pairs,
    utility_scores,
    ventricle_slices,
    remove_group_means,
)
from brainldm.data import SliceDataset
from brainldm.advanced.fidelity import fine_detail
from test_fidelity import SHORT, held_out, net, train  # fixtures: discs with a dark hole


@pytest.mark.parametrize('size', [64, 128, 256])
def test_fluid_of_discs(size):
    yy, xx = np.mgrid[:size, :size] - size / 2 + 0.5
    radius = np.hypot(yy, xx) / size
    gray = np.where(radius < 0.1, 0.05, np.where(radius < 0.4, 0.7, 0.0))
    x = torch.tensor(gray * 2 - 1, dtype=torch.float32)[None, None].repeat(2, 1, 1, 1)
    x[1] = -1
    fraction = csf_fraction(x)
    assert (
        fraction[0] == pytest.approx(1 / 16, abs=0.006)
        and np.isnan(fraction[1])
        and np.isnan(fine_detail(x)[1])
        and fine_detail(x)[0] < 1e-3
    )
    assert csf_fraction(x.to(torch.bfloat16))[0] == pytest.approx(fraction[0], abs=1e-3)


def test_effects(train, held_out, net):
    fraction, table = csf_fraction(train), train.manifest
    assert (
        diagnosis_effect(fraction, table.diagnosis, table['slice']) > 1.5
        and diagnosis_effect(fraction, table.diagnosis, table['slice'], ('NC', 'AD')) < -1.5
    )
    assert age_slope(fraction, table.age, table['slice'], table.diagnosis) > 0
    assert np.isnan(
        remove_group_means([1.0, 2.0, 3.0], ['a', 'a', None])[2]
    ) and remove_group_means([1.0, 2.0, 3.0], ['a', 'a', 'b']).tolist() == [-0.5, 0.5, 0.0]
    assert ventricle_slices([1.0, 1.0, 3.0, 2.0], [0, 0, 1, 2], 0.5).tolist() == [1, 2]
    out = condition_effects(net, held_out, held_out.manifest, np.arange(8))
    assert (
        out['diagnosis_effect']['value'] > 1
        and out['diagnosis_effect']['interval_95'][0]
        < out['diagnosis_effect']['value']
        < out['diagnosis_effect']['interval_95'][1]
    )
    # one subject: no groups, no interval
    alone = condition_effects(
        net, held_out.__getitems__(range(8))['image'], held_out.manifest[:8], np.arange(8)
    )
    assert (
        np.isnan(alone['diagnosis_effect']['value']) and alone['slice_error']['interval_95'] is None
    )


@pytest.mark.parametrize('size, scales', [(32, 2), (64, 3), (128, 4), (256, 5)])
def test_ms_ssim_beside_torchmetrics(size, scales):
    from torchmetrics.functional.image import (
        multiscale_structural_similarity_index_measure as ms_ssim,
    )

    x = torch.rand(4, 1, size, size, generator=torch.Generator().manual_seed(0))
    x = torch.nn.functional.avg_pool2d(x, 5, 1, 2)
    weights = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333])[:scales]
    want = ms_ssim(x[1:2], x[3:4], data_range=1.0, betas=tuple(weights / weights.sum())).item()
    assert pair_similarity(x * 2 - 1, np.array([[1, 3], [2, 2]])).tolist() == pytest.approx(
        [want, 1.0], abs=1e-5
    )


def test_diversity(held_out):
    pairs = same_condition_pairs(held_out.manifest, most=10_000)
    assert (
        len(pairs) == 8 * 2 * 6
        and (
            held_out.manifest.subject.to_numpy()[pairs[:, 0]]
            != held_out.manifest.subject.to_numpy()[pairs[:, 1]]
        ).all()
    )
    real = held_out.__getitems__(range(len(held_out)))['image']
    scores = diversity_scores(dict(real=real, same=real[:8].repeat(8, 1, 1, 1)), held_out.manifest)
    assert (
        scores['same']['ms_ssim'] > 0.999 > scores['real']['ms_ssim']
        and scores['real']['n_pairs'] == 96
    )
    with pytest.raises(ValueError, match='no two'):
        same_condition_pairs(held_out.manifest[:8])


def test_utility_refuses_without_diagnosis(train, held_out):
    with pytest.raises(ValueError, match='Leave this measure out'):
        utility_scores(
            dict(real=train),
            SliceDataset(held_out.images, held_out.manifest, held_out.covariates[:1]),
            SHORT,
        )
    scores = utility_scores(dict(real=train), held_out, SHORT, channels=(8, 8), seeds=2)['real']
    assert (
        scores['auc'] == pytest.approx(np.mean(scores['auc_by_seed']))
        and len(scores['auc_by_seed']) == 2
    )
