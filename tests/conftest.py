"One tiny trained run, shared by all tests that need one."

import os

import pytest
import torch

torch.set_num_threads(1)  # several workers share the cores: see Makefile


@pytest.fixture(scope='session', autouse=True)
def own_cache(tmp_path_factory):
    "Tests leave nothing in the user's cache."
    before = os.environ.get('BRAINLDM_CACHE')
    os.environ['BRAINLDM_CACHE'] = str(tmp_path_factory.mktemp('cache'))
    yield
    if before is None:
        del os.environ['BRAINLDM_CACHE']
    else:
        os.environ['BRAINLDM_CACHE'] = before


@pytest.fixture(scope='session')
def tiny_run(own_cache, tmp_path_factory):
    """(run folder, data folder): 6 phantom subjects, 6 slices each, 64 x 64, a handful of steps of
    both stages. Read only: copy before you change it."""
    from brainldm.engineering.configs import DataConfig
    from brainldm.data import open_dataset
    from brainldm.engineering.configs import PhantomConfig
    from brainldm.engineering.phantom import make_cohort
    from brainldm.engineering.configs import AEConfig
    from brainldm.training import train_autoencoder
    from brainldm.engineering.configs import LDMConfig
    from brainldm.training import train_ldm

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp('tiny')
    config = DataConfig(size=64, validate_fraction=0.2, test_fraction=0.2)
    data = make_cohort(
        folder / 'phantom', PhantomConfig(num_subjects=6, num_slices=6, size=64), progress=False
    )
    dataset = open_dataset(data, config, progress=False)
    shared = dict(warmup_images=16, validate_every=1_000_000, checkpoint_every=1_000_000)
    train_autoencoder(
        dataset,
        folder / 'run',
        AEConfig(
            data=config,
            total_images=64,
            batch_size=8,
            channels=(16,),
            attention_levels=(False,),
            patch=8,
            latent_channels=4,
            **shared,
        ),
        progress=False,
    )
    train_ldm(
        dataset,
        folder / 'run',
        LDMConfig(
            total_images=64,
            batch_size=8,
            channels=(16,),
            attention_levels=(True,),
            num_res_blocks=1,
            num_heads=2,
            cond_channels=16,
            ema_images=32,
            preview_steps=2,
            **shared,
        ),
        progress=False,
    )
    return folder / 'run', data
