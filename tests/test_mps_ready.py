"""Ready for devices without float64 and with fewer operations (Apple's MPS), as far as a CPU can
tell.

A mode watches every call of torch. What a model computes with is marked as being on such a
device: its weights, and whatever was sent there by `.to(device)` or made there by `device=`.
The mark passes to all that is computed from it, until `.cpu()` takes it off. On the way nothing
marked may be float64, be read by numpy, or be sampled with another border than zeros: all of
these raise on MPS and pass on a CPU."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from brainldm.engineering.configs import AEConfig, DataConfig
from brainldm.data import open_dataset
from brainldm.engineering.stage1 import (
    autoencoder_args,
    build_autoencoder,
    init_codebook_from_data,
    validate_autoencoder,
)
from brainldm.sampling import BrainLDM
from brainldm.advanced.volume import BrainVolumes, NeighborUNet, sample_shared_noise
from brainldm.advanced.prior import CodeSampler, CodeTransformer, code_bits
from brainldm.advanced.evaluation import codebook_scores
from brainldm.advanced.fidelity import FeatureNet, augment, image_features
from brainldm.advanced.audit import CopySearch, nearest_copies

ROOT = Path(__file__).parents[1]


class NotThere(RuntimeError):
    "What MPS would have refused."


class Small(TorchFunctionMode):
    "A device without float64: marks what lies on it, and raises where that device would."

    def __init__(self, *models):
        super().__init__()
        self.marked = {}
        for model in models:
            self.mark([*model.parameters(), *model.buffers()])

    # kept alive: ids are not used twice
    def mark(self, out):
        self.marked |= {id(o): o for o in tree_leaves(out) if isinstance(o, torch.Tensor)}

    def has(self, o):
        return isinstance(o, torch.Tensor) and id(o) in self.marked

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        here, name = any(map(self.has, tree_leaves((args, kwargs)))), getattr(func, '__name__', '')
        if here and name in ('numpy', '__array__'):
            raise NotThere(f'{name} of a tensor on the device')
        if (
            here
            and name == 'grid_sample'
            and (
                (*args, *['zeros'] * 4)[3] != 'zeros'
                or kwargs.get('padding_mode', 'zeros') != 'zeros'
                or args[0].ndim != 4
            )
        ):
            raise NotThere('grid_sample')
        out = func(*args, **kwargs)
        targets = [
            o for o in (*args[1:], *kwargs.values()) if isinstance(o, torch.device) or self.has(o)
        ]
        if name in ('cpu', 'tolist', 'item') or name == 'to' and 'cpu' in (*args, *kwargs.values()):
            return out.clone() if isinstance(out, torch.Tensor) else out
        if name == 'to' and targets and not here:
            out = out.clone()  # a copy that is there
        if (
            here
            and not name.startswith('is_')
            or name == 'to'
            and targets
            or isinstance(kwargs.get('device'), torch.device)
        ):
            self.mark(out)
            bad = [
                o
                for o in tree_leaves(out)
                if isinstance(o, torch.Tensor) and o.dtype == torch.float64
            ]
            if bad:
                raise NotThere(f'float64 in {name}')
        return out


@pytest.mark.parametrize(
    'wrong',
    [
        lambda x: x.double(),
        lambda x: x.sum() * torch.ones(2, dtype=torch.float64),
        lambda x: x.to(torch.float64),
        lambda x: x.numpy(),
        lambda x: (x + 1).sum().double(),
        lambda x: F.grid_sample(
            x.view(1, 1, 1, 2), torch.zeros(1, 1, 1, 2), padding_mode='border', align_corners=False
        ),
        lambda x: torch.zeros(2, device=torch.device('cpu'), dtype=torch.float64),
        lambda x: torch.zeros(2, dtype=torch.float64).to(torch.device('cpu')),
    ],
)
def test_the_trap_catches(wrong):
    x = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    with Small() as small:
        small.mark(x)
        with pytest.raises(NotThere):
            wrong(x)
        # the host may
        assert x.cpu().double().numpy().tolist() == [1.0, 1.0] and torch.ones(2).double().sum() == 2


@pytest.fixture(scope='module')
def dataset(tiny_run):
    return open_dataset(
        tiny_run[1], DataConfig(size=64, validate_fraction=0.2, test_fraction=0.2), progress=False
    )


def vq(dataset):
    config = AEConfig(
        data=DataConfig(size=64),
        kind='vq',
        num_embeddings=8,
        channels=(16,),
        attention_levels=(False,),
        patch=8,
        latent_channels=4,
    )
    torch.manual_seed(0)
    return build_autoencoder('vq', autoencoder_args(config, ()))


@pytest.mark.parametrize(
    'options',
    [
        dict(),
        dict(sampler='ddpm', guidance_scale=2.0),
        dict(sampler='dpmpp', guidance_scale=dict(slice=2.0)),
        dict(eta=0.5, guidance_scale=3.0, guidance_rescale=0.5, guidance_interval=(0.2, 0.8)),
    ],
    ids=str,
)
def test_sampling(tiny_run, options):
    model = BrainLDM.load(tiny_run[0], device='cpu', precision='no')
    with Small(model.autoencoder, model.unet) as small:
        small.mark([model.latent_mean, model.latent_std])
        assert model.sample(
            3,
            steps=3,
            slice=2,
            diagnosis='AD',
            batch_size=2,
            callback=lambda i, t, p: p.numpy(),
            **options,
        ).numpy().shape == (3, 1, 64, 64)


def test_edits_and_random_latents(tiny_run, dataset):
    model, x = (
        BrainLDM.load(tiny_run[0], device='cpu', precision='no'),
        dataset.__getitems__([0, 1])['image'],
    )
    with Small(model.autoencoder, model.unet) as small:
        small.mark([model.latent_mean, model.latent_std])
        for out in (
            model.image_to_image(x, 0.5, steps=4, sampler='ddpm'),
            model.counterfactual(x, dict(diagnosis='AD'), steps=3),
            model.interpolate(x[:1], x[1:], 3, steps=3),
            model.sample_stage1(2),
            model.reconstruct(x),
        ):
            out.numpy()


def test_volumes(tiny_run):
    flat = BrainLDM.load(tiny_run[0], device='cpu', precision='no')
    deep = BrainVolumes(
        flat.autoencoder,
        flat.size,
        NeighborUNet(flat.unet),
        flat.schedule,
        flat.latent_mean,
        flat.latent_std,
    )
    with Small(flat.autoencoder, flat.unet, deep.unet) as small:
        small.mark([flat.latent_mean, flat.latent_std])
        deep.sample_volume(1, steps=2, diagnosis='AD').numpy()
        sample_shared_noise(flat, 1, 0.5, steps=2).numpy()


def test_codes(dataset):
    auto, prior = vq(dataset), CodeTransformer(
        8, 8, dataset.covariates, embed_dim=16, num_layers=1, num_heads=2
    )
    model, batch = CodeSampler(
        auto, 64, prior, heights=next(c for c in dataset.covariates if c.name == 'slice')
    ), dataset.__getitems__([0, 1, 2])
    with Small(auto, prior):
        init_codebook_from_data(auto, dataset, 0)
        model.sample(2, slice=1, guidance_scale=2.0, top_k=4).numpy()
        model.sample_stage1(2, slice=1).numpy()
        code_bits(prior, model.codes(batch['image'].to(torch.device('cpu'))).cpu(), batch).numpy()
        codebook_scores(model, dataset)


@pytest.mark.parametrize('kind', ['kl', 'vq'])
def test_validation(kind, dataset, tmp_path):
    config = AEConfig(
        data=DataConfig(size=64),
        kind=kind,
        num_embeddings=8,
        channels=(16,),
        attention_levels=(False,),
        patch=8,
        latent_channels=4,
    )
    model, batch = build_autoencoder(kind, autoencoder_args(config, ())), dataset.__getitems__(
        [0, 1, 2]
    )
    with Small(model) as small:
        small.mark(batch)
        validate_autoencoder(model, batch, tmp_path / 'a.png')


def test_features(dataset):
    torch.manual_seed(0)
    net = FeatureNet(dataset.covariates, (8, 16), norm_num_groups=4)
    with Small(net) as small:
        x = dataset.__getitems__([0, 1, 2])['image']
        small.mark(x)
        augment(x, torch.Generator().manual_seed(0))
        assert image_features(net, dataset).numpy().dtype == np.float64
        assert nearest_copies(CopySearch(dataset), x).shape == (3, 4)


def test_a_moved_image_is_what_border_padding_gives():
    """The augmentation, without noise and contrast, against grid_sample with the border repeated,
    also for images that are not square."""
    x = torch.rand(5, 1, 12, 20, generator=torch.Generator().manual_seed(0)) * 2 - 1
    got = augment(x, torch.Generator().manual_seed(3), contrast=0.0, noise=0.0)
    theta = torch.eye(2, 3).repeat(5, 1, 1)
    theta[:, :, 2] = (
        (torch.rand(5, 2, generator=torch.Generator().manual_seed(3)) * 2 - 1) * 2 * 3.0 / 20
    )
    want = F.grid_sample(
        x,
        F.affine_grid(theta, x.shape, align_corners=False),
        padding_mode='border',
        align_corners=False,
    )
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


STATISTICS = 'audit evaluation factors fidelity report'.split()  # of features that lie on the CPU
# cohorts, counts of codes, tables of noise: made there
ON_CPU = 'phantom prior scheduler'.split()


@pytest.mark.parametrize(
    'path', sorted((ROOT / 'brainldm').rglob('[a-z]*.py')), ids=lambda p: p.stem
)
def test_no_network_is_asked_for_what_mps_lacks(path):
    """`.double()` comes after `.cpu()`, torch.float64 does not occur, and grid_sample pads with
    zeros."""
    nodes = [
        n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, (ast.Attribute, ast.Call))
    ]
    border = [
        n.lineno
        for n in nodes
        if isinstance(n, ast.Call)
        and ast.unparse(n.func).endswith('grid_sample')
        and 'padding_mode' in {k.arg for k in n.keywords}
    ]
    double = [
        n.lineno
        for n in nodes
        if isinstance(n, ast.Attribute)
        and (
            n.attr == 'double'
            and not ast.unparse(n.value).endswith('.cpu()')
            or ast.unparse(n) in ('torch.float64', 'torch.double')
        )
    ]
    assert (
        path.stem in ON_CPU or not border
    ), f'lines {border}. Expected padding with zeros. Try F.pad(..., mode="replicate") before.'
    assert (
        path.stem in STATISTICS + ON_CPU or not double
    ), f'lines {double}. Expected statistics on the CPU. Try layers.double_on_cpu.'
