"""Codes and factors: shares that add up, subjects found again, whom a decoder believes, codes of
every kind."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from brainldm.engineering.covariates import Covariate
from brainldm.data import SliceDataset
from brainldm.vae import AutoencoderKL
from brainldm.vqgan import FSQ, VQVAE, VectorQuantizer
from brainldm.engineering.codec import Codec
from brainldm.advanced.factors import (
    codebook_usage,
    decode_conditioned,
    flat_codes,
    plot_codebook_usage,
    subject_retrieval,
    subject_slice_table,
    swap_effects,
    variance_fractions,
)

seeds = st.integers(0, 2**31)
HEIGHT = Covariate('slice', 'continuous', range=(0, 5))
SEX = Covariate('sex', 'categorical', ('F', 'M'))


# -- who and where


@given(seeds, st.integers(2, 6), st.integers(2, 5))
@settings(max_examples=30, deadline=None)
def test_shares_add_up_and_do_not_mind_a_rotation(seed, people, heights):
    rng = np.random.default_rng(seed)
    v = rng.normal(size=(people * heights, 7))
    s, k = np.divmod(np.arange(people * heights), heights)
    if len(v) < 3:
        return
    a, b = (
        variance_fractions(o, s, k)
        for o in (v, v @ np.linalg.qr(rng.normal(size=(7, 7)))[0] * 3 + 1)
    )
    assert abs(a['subject'] + a['slice'] + a['rest'] - 1) < 1e-9 and min(a.values()) > -1e-9
    assert all(abs(a[o] - b[o]) < 1e-9 for o in a)
    swapped = variance_fractions(v, k, s)
    assert abs(swapped['subject'] - a['slice']) < 1e-9


def test_retrieval_does_not_mind_the_height():
    rng = np.random.default_rng(0)
    s, k = np.divmod(np.arange(60), 6)
    v = rng.normal(size=(60, 9))
    a, b = subject_retrieval(v, s, k), subject_retrieval(v + 50 * rng.normal(size=(6, 9))[k], s, k)
    np.testing.assert_array_equal(a, b)
    assert np.isnan(np.diagonal(a)).all() and a.shape == (6, 6)


@pytest.mark.parametrize('drop', [slice(1, None), slice(0, -1)])
def test_a_missing_slice_is_refused(drop):
    s, k = np.divmod(np.arange(12), 4)
    with pytest.raises(ValueError, match='every subject at every position'):
        subject_slice_table('f', np.eye(12)[drop], s[drop], k[drop])
    with pytest.raises(ValueError, match='every subject at every position'):
        subject_slice_table('f', np.eye(12), s, np.where(k == 3, 2, k))


def test_swap_tells_latent_from_told():
    latent_values, condition_values = np.arange(4.0), np.arange(3.0)
    assert swap_effects(
        latent_values[:, None] + 0 * condition_values, latent_values, condition_values
    ) == dict(latent=1, condition=0) and swap_effects(
        0 * latent_values[:, None] + condition_values, latent_values, condition_values
    ) == dict(
        latent=0, condition=1
    )


def test_swap_needs_two_values():
    for latent_values, condition_values in ((np.ones(3), np.arange(2)), (np.arange(3), np.ones(2))):
        with pytest.raises(ValueError, match='two values'):
            swap_effects(np.zeros((3, 2)), latent_values, condition_values)


# -- codes, and what a decoder is told


def images(n=7, size=32):
    images = np.random.default_rng(0).integers(0, 256, size=(n, size, size)).astype(np.uint8)
    table = pd.DataFrame(
        dict(
            subject=[f's{i}' for i in range(n)],
            slice=np.arange(n) % 6,
            sex=['F', 'M', 'F', None, 'M', 'F', 'M'][:n],
            split='train',
        )
    )
    return SliceDataset(images, table, [HEIGHT, SEX])


@pytest.mark.parametrize('quantizer', [lambda: VectorQuantizer(12, 4), lambda: FSQ((3, 4))])
@pytest.mark.parametrize('covariates', [(), (HEIGHT, SEX)])
def test_codes_are_counted_with_their_pixels(quantizer, covariates):
    torch.manual_seed(0)
    q = quantizer()
    model, data = (
        VQVAE(
            q,
            8,
            channels=(8,),
            attention_levels=(False,),
            patch=4,
            covariates=covariates,
            cond_channels=8,
        ).eval(),
        images(),
    )
    counts, patches = codebook_usage(model, data, batch_size=3)
    assert counts.sum() == 7 * 64 and patches.shape == (12, 4, 4)
    # means of means are the mean
    total = (patches.nan_to_num() * counts[:, None, None]).sum() / 16 / counts.sum()
    torch.testing.assert_close(
        total, data.__getitems__(range(7))['image'].mean(), rtol=1e-4, atol=1e-4
    )
    assert torch.equal(patches.isnan().all((1, 2)), counts == 0)
    flat = flat_codes(
        model,
        torch.arange(5),
        3,
        dict(slice=torch.rand(5), sex=torch.arange(5) % 2) if covariates else None,
    )
    assert flat.shape == (5, 1, 12, 12) and flat.abs().max() <= 1
    plt.close(plot_codebook_usage(dict(a=counts, b=torch.ones(30))))


def test_told_values_go_where_they_should():
    torch.manual_seed(0)
    model = AutoencoderKL(
        2,
        channels=(8,),
        attention_levels=(False,),
        patch=4,
        covariates=(HEIGHT, SEX),
        cond_channels=8,
    )
    codec, z, sex = Codec(model.eval(), 32), torch.randn(3, 2, 8, 8), torch.tensor([0, 1, 1])
    out = decode_conditioned(
        codec, z, 'slice', torch.tensor([0.0, 0.5, 1.0, float('nan')]), dict(sex=sex)
    )
    assert out.shape == (3, 4, 1, 32, 32)
    torch.testing.assert_close(
        out[1:2, 1],
        codec.decode(z[1:2], dict(slice=torch.tensor([0.5]), sex=sex[1:2])),
        rtol=1e-4,
        atol=1e-5,
    )
    assert decode_conditioned(
        codec, z, 'sex', torch.tensor([0, 1]), dict(slice=torch.rand(3))
    ).shape == (3, 2, 1, 32, 32)
    plain = Codec(AutoencoderKL(2, channels=(8,), attention_levels=(False,), patch=4), 32)
    with pytest.raises(ValueError, match="not conditioned on 'slice'"):
        decode_conditioned(plain, z, 'slice', torch.zeros(2))
