"Sampling: requests, seeds, guidance, edits, and every way in which a run folder can be wrong."

import dataclasses
import shutil
from copy import deepcopy

import pytest
import torch

from brainldm.engineering.configs import DataConfig
from brainldm.engineering.covariates import Covariate, encode_covariates
from brainldm.data import open_dataset
from brainldm.vae import AutoencoderKL
from brainldm.unet import UNet
from brainldm.engineering.runs import load_weights, save_weights
from brainldm.engineering.stage2 import load_denoiser
from brainldm.engineering.codec import mix_conditions, prepare_conditions
from brainldm.sampling import (
    BrainLDM,
    AUTOGUIDANCE,
    Sampler,
    autoguide,
    conditional_denoiser,
    guide,
    sample_noise,
    skipped_steps,
    slerp,
    standard_deviation,
)


@pytest.fixture(scope='module')
def model(tiny_run):
    return BrainLDM.load(tiny_run[0], device='cpu', precision='no')


@pytest.fixture
def copy(tiny_run, tmp_path):
    "A run of one's own, to damage."
    return shutil.copytree(tiny_run[0], tmp_path / 'run')


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    'options', [dict(), dict(sampler='dpmpp'), dict(sampler='ddpm'), dict(eta=0.6)], ids=str
)
@pytest.mark.parametrize('batch_size', [1, 3, 50])
def test_batches_do_not_matter(model, batch_size, options):
    requested = dict(
        options,
        slice=[0, 1, 2, 3, 4, 5, None],
        diagnosis=['AD', 'NC', None, 'AD', 'NC', None, 'AD'],
        steps=4,
        seed=9,
        guidance_scale=2.0,
    )
    same(model.sample(7, batch_size=batch_size, **requested), model.sample(7, **requested))


@pytest.mark.parametrize(
    'options', [dict(), dict(sampler='dpmpp'), dict(sampler='ddpm'), dict(eta=0.6)], ids=str
)
def test_parts_of_a_request_do_not_matter(model, options):
    "Image 3 is image 3: in one go, or when another process begins with it."
    options = dict(options, steps=4, slice=2, seed=3)
    same(
        torch.cat([model.sample(3, **options), model.sample(4, first=3, **options)]),
        model.sample(7, **options),
    )


def test_first_three_of_eight(model):
    same(model.sample(8, steps=4, slice=2, seed=3)[:3], model.sample(3, steps=4, slice=2, seed=3))


@pytest.mark.parametrize(
    'options',
    [
        dict(sampler='ddpm'),
        dict(sampler='dpmpp', steps=5),
        dict(eta=0.5),
        dict(guidance_scale=3.0, guidance_interval=(0.2, 0.8)),
        dict(
            guidance_scale=dict(slice=2.0, diagnosis=0.0),
            slice=2,
            diagnosis='AD',
            guidance_rescale=0.7,
        ),
        dict(steps=1),
        dict(steps=37, n=1),
        dict(guidance_scale=0.0),
        dict(guidance_scale=7.5),
    ],
)
def test_repeats_itself(model, options):
    options = dict(dict(n=2, steps=3, seed=1), **options)
    a, b = model.sample(**options), model.sample(**options)
    assert (
        a.shape == (options['n'], 1, 64, 64)
        and a.isfinite().all()
        and a.min() >= -1
        and a.max() <= 1
    )
    same(a, b)


def test_noise_is_named_by_seed_and_number():
    noise = sample_noise(50, (2, 3, 5), 7)
    assert torch.equal(sample_noise(20, (2, 3, 5), 7, start=30), noise[30:])
    assert (
        len({o.numpy().tobytes() for s in range(20) for o in sample_noise(20, (2, 3, 5), s)}) == 400
    )


def test_noise_is_standard_and_of_each_image_its_own():
    many = sample_noise(400, (4, 5, 7), seed=0)  # 56,000 numbers
    error = many.numel() ** -0.5  # standard error of their mean
    assert abs(many.mean()) < 5 * error and abs(many.var() - 1) < 5 * 2**0.5 * error
    rows = many.flatten(1)
    similar = (rows @ rows.T / rows.shape[1]).fill_diagonal_(0).abs().max()
    assert similar < 6 * 140**-0.5  # of 79,800 pairs of 140 numbers each
    swapped = sample_noise(1, (4, 5, 7), seed=0, start=1) * sample_noise(1, (4, 5, 7), seed=1)
    assert swapped.mean().abs() < 5 * 140**-0.5  # (0, 1) and (1, 0) have nothing in common


def test_standard_deviation_by_row():
    rows = torch.tensor([[[1.0, 3.0]], [[0.0, 0.0]]])
    same(standard_deviation(rows), torch.tensor([[[2**0.5]], [[0.0]]]))


@pytest.mark.parametrize(
    'requested, message',
    [
        (dict(diagnosis='MCI'), 'Expected one of AD, NC'),
        (dict(weight=70), "unknown condition 'weight'"),
        (dict(slice=6), 'Expected 0 to 5'),
        (dict(slice=-1), 'Expected 0 to 5'),
        (dict(age=200), 'age=200'),
        (dict(slice=float('inf')), 'slice=inf'),
        (dict(slice='top'), 'Expected a number'),
        (dict(n=3, slice=[1, 2]), 'Try n=2'),
        (dict(guidance_scale=-1), 'guidance_scale=-1'),
        (dict(guidance_scale=float('nan')), 'guidance_scale=nan'),
        (dict(guidance_scale=float('inf')), 'guidance_scale=inf'),
        (dict(steps=1001), 'steps=1001'),
        (dict(steps=0), 'steps=0'),
        (dict(seed=-1), 'seed=-1'),
        (dict(n=0), 'n=0'),
        (dict(batch_size=0), 'batch_size=0'),
        (dict(sampler='heun'), "sampler='heun'"),
        (dict(eta=2), 'eta=2'),
        (dict(sampler='dpmpp', eta=0.5), "sampler='dpmpp'"),
        (dict(guidance_interval=(0.8, 0.2)), 'guidance_interval=(0.8, 0.2)'),
        (dict(guidance_interval=(0, 2)), 'fractions'),
        (dict(guidance_interval=(0.5,)), 'two fractions'),
        (dict(guidance_rescale=1.5), 'guidance_rescale=1.5'),
        (dict(guidance_rescale=float('nan')), 'guidance_rescale=nan'),
        (dict(autoguidance=0.5), 'autoguidance=0.5'),
        (dict(autoguidance=float('nan')), 'autoguidance=nan'),
        (dict(autoguidance=float('inf')), 'autoguidance=inf'),
        (dict(autoguidance=2), 'has no early network'),
        (dict(guidance_scale=dict(slice=2.0)), 'Expected one of nothing'),
        (dict(slice=1, guidance_scale=dict(diagnosis=2.0)), "'diagnosis'. Expected one of slice"),
        (dict(slice=1, guidance_scale=dict(slice=-1.0)), 'Expected 0 or more'),
    ],
)
def test_bad_requests(model, requested, message):
    with pytest.raises(ValueError) as e:
        model.sample(**requested)
    assert message in str(e.value) and 'Expected' in str(e.value)


@pytest.mark.parametrize(
    'requested',
    [
        dict(n=2.5),
        dict(steps='30'),
        dict(seed=1.0),
        dict(guidance_scale='2'),
        dict(guidance_scale=None),
        dict(autoguidance='2'),
        dict(autoguidance=True),
        dict(n=True),
        dict(slice=1, guidance_scale=dict(slice='2')),
    ],
)
def test_bad_types(model, requested):
    with pytest.raises(TypeError, match='sample: '):
        model.sample(**requested)


@pytest.fixture(scope='module')
def network():
    "A denoiser of two covariates with random weights, and something to ask it: (unet, x, t, cond)."
    covariates = (
        Covariate('a', 'categorical', values=('x', 'y')),
        Covariate('b', 'continuous', range=(0, 9)),
    )
    torch.manual_seed(0)
    unet = UNet(4, (16,), 1, (True,), 2, covariates, 16).eval().requires_grad_(False)
    for p in unet.parameters():
        torch.nn.init.normal_(p, std=0.1)  # a fresh network answers 0
    return (
        unet,
        torch.randn(3, 4, 8, 8),
        torch.tensor([1, 500, 999]),
        encode_covariates(dict(a=['x', 'y', 'x'], b=[0, 4, None]), covariates),
    )


close = dict(rtol=1e-3, atol=1e-4)


def test_guidance_is_two_separate_passes(network):
    unet, x, t, cond = network
    a, b = unet(x, t, cond), unet(x, t, cond, torch.ones(3, 2, dtype=torch.bool))
    assert (a - b).abs().max() > 1e-3
    for w in (0.0, 0.5, 1.0, 4.0):
        torch.testing.assert_close(guide(unet, cond, ['a', 'b'], w)(x, t), b + w * (a - b), **close)


def test_guidance_by_covariate_is_one_pass_each(network):
    unet, x, t, cond = network
    full, no_a, no_b = (
        unet(x, t, cond),
        unet(x, t, dict(b=cond['b'])),
        unet(x, t, dict(a=cond['a'])),
    )
    for wa, wb in ((0.0, 1.0), (1.0, 3.0), (2.0, 5.0), (1.0, 1.0)):
        torch.testing.assert_close(
            guide(unet, cond, ['a', 'b'], dict(b=wb, a=wa))(x, t),
            full + (wa - 1) * (full - no_a) + (wb - 1) * (full - no_b),
            **close
        )


def test_guidance_in_an_interval_and_its_cost(network):
    unet, x, t, cond = network
    calls = []

    def counting(x, t, cond, drop):
        calls.append(len(x))
        return unet(x, t, cond, drop)

    plain, full = unet(x, t, cond), guide(unet, cond, ['a', 'b'], 4.0)(x, t)
    # of t = 1, 500, 999 only the second is inside
    got = guide(counting, cond, ['a', 'b'], 4.0, (500, 999))(x, t)
    torch.testing.assert_close(got[[0, 2]], plain[[0, 2]], **close)
    torch.testing.assert_close(got[1], full[1], **close)
    guide(counting, cond, ['a', 'b'], 4.0, (2, 400))(x, t)  # none inside: no second half
    guide(counting, cond, ['a', 'b'], dict(a=2.0, b=1.0))(x, t)  # a scale of 1 costs nothing
    guide(counting, cond, ['a', 'b'], dict(a=2.0, b=3.0))(x, t)
    assert calls == [6, 3, 6, 9]


def test_rescale_keeps_direction_and_sets_the_spread(network):
    unet, x, t, cond = network
    plain, full = unet(x, t, cond), guide(unet, cond, ['a', 'b'], 6.0)(x, t)
    for share in (0.3, 1.0):
        got = guide(unet, cond, ['a', 'b'], 6.0, rescale=share)(x, t)
        torch.testing.assert_close(
            torch.cosine_similarity(got.flatten(1), full.flatten(1)), torch.ones(3), **close
        )
        torch.testing.assert_close(
            standard_deviation(got),
            (1 - share) * standard_deviation(full) + share * standard_deviation(plain),
            **close
        )


def test_autoguidance_goes_from_the_early_answer_through_the_own(network):
    unet, x, t, cond = network
    early = copy_of(unet)
    for p in early.parameters():
        p.mul_(0.5)
    strong, weak = (guide(o, cond, ['a', 'b']) for o in (unet, early))
    a, b = strong(x, t), weak(x, t)
    assert (a - b).abs().max() > 1e-3
    for w in (1.0, 1.5, 3.0):
        torch.testing.assert_close(autoguide(strong, weak, w)(x, t), b + w * (a - b), **close)


def test_autoguidance_of_a_model(model):
    "On by default where there is an early network, asked under the same guidance; off at 1."
    twice = Sampler(
        model.autoencoder,
        model.size,
        model.unet,
        model.schedule,
        model.latent_mean,
        model.latent_std,
        early=copy_of(model.unet),
    )
    requested = dict(n=2, steps=3, slice=2, diagnosis='AD', seed=4)
    same(twice.sample(**requested), model.sample(**requested))  # two equal networks: nothing to add
    for p in twice.early.parameters():
        p.mul_(0.5)
    plain = twice.sample(**requested, autoguidance=1)
    same(plain, model.sample(**requested))
    assert model.pick_autoguidance(None) == 1 and twice.pick_autoguidance(None) == AUTOGUIDANCE
    default = twice.sample(**requested)
    same(default, twice.sample(**requested, autoguidance=AUTOGUIDANCE))
    assert (default - plain).abs().max() > 1e-2
    x, t = torch.randn(2, *model_shape(twice)), torch.tensor([500, 500])
    cond = prepare_conditions(twice, dict(slice=2, diagnosis='AD'), 2, dict(steps=3), 0, 2)
    options = dict(guidance_scale=2.0)
    own, full = (
        conditional_denoiser(twice, cond, dict(options, **o))(x, t)
        for o in ({}, dict(autoguidance=3.0))
    )
    twice.unet, twice.early = twice.early, twice.unet
    weak = conditional_denoiser(twice, cond, options)(x, t)
    torch.testing.assert_close(full, weak + 3 * (own - weak), rtol=1e-3, atol=1e-3)


def model_shape(model):
    side = model.size // model.autoencoder.factor
    return model.autoencoder.latent_channels, side, side


def copy_of(network):
    return deepcopy(network).requires_grad_(False)


def test_covariates_in_another_order_and_set(model):
    "The autoencoder may know what the denoiser does not, in another order."
    known = model.covariates
    torch.manual_seed(0)
    own = Covariate('scanner', 'categorical', values=('1.5T', '3T'))
    auto = AutoencoderKL(4, (16,), 1, (False,), 8, covariates=(own, known[1], known[0]))
    for p in auto.parameters():
        torch.nn.init.normal_(p, std=0.05)
    both = Sampler(auto, 64, model.unet, model.schedule, model.latent_mean, model.latent_std)
    assert [c.name for c in both.covariates] == [*(c.name for c in known), 'scanner']
    a, b = (both.sample(2, steps=2, slice=1, diagnosis='AD', scanner=o) for o in own.values)
    assert a.shape == (2, 1, 64, 64) and (a - b).abs().max() > 1e-5
    with pytest.raises(ValueError, match='no value of scanner'):
        both.sample(2, steps=2, slice=1, diagnosis='AD')
    with pytest.raises(ValueError, match='Expected one of 1.5T, 3T'):
        both.sample(1, slice=1, diagnosis='AD', scanner='7T')
    with pytest.raises(ValueError, match='no value of scanner'):
        both.encode(torch.zeros(1, 1, 64, 64))


def test_an_unconditional_denoiser(model):
    unet = UNet(4, (16,), 1, (True,), 2, (), 16).eval()
    free = Sampler(model.autoencoder, 64, unet, model.schedule, model.latent_mean, model.latent_std)
    assert free.sample(2, steps=2, guidance_scale=3.0).shape == (2, 1, 64, 64)
    with pytest.raises(ValueError, match='no condition'):
        free.sample(1, diagnosis='AD')


def test_callback_sees_each_step_of_each_batch(model):
    seen = []
    last = model.sample(5, steps=3, batch_size=2, callback=lambda i, t, p: seen.append((i, len(p))))
    assert seen == [(i, n) for n in (2, 2, 1) for i in range(3)] and len(last) == 5


@pytest.mark.parametrize('batch_size, decoded', [(8, 4 * 3 + 8), (2, 4 * 3 + 8), (3, 4 * 3 + 8)])
def test_only_what_is_watched_is_decoded(model, monkeypatch, batch_size, decoded):
    seen, counts = [], []
    monkeypatch.setattr(
        model.autoencoder,
        'decode',
        lambda z, *args, call=model.autoencoder.decode: counts.append(len(z)) or call(z, *args),
    )
    options, watched = dict(
        steps=3, seed=1, batch_size=batch_size, slice=list(range(6)) + [0, 1]
    ), [0, 2, 5, 6]
    last = model.sample(8, watched=watched, callback=lambda i, t, p: seen.append((i, p)), **options)
    assert sum(counts) == decoded and sum(len(p) for _, p in seen) == 4 * 3
    for i in range(3):
        shown = torch.cat([p for k, p in seen if k == i])
        everything = []
        model.sample(
            8, callback=lambda k, t, p: everything.append(p) if k == i else None, **options
        )
        same(shown, torch.cat(everything)[watched])
    same(last, model.sample(8, **options))


@pytest.mark.parametrize(
    'watched, error', [([8], ValueError), ([-1], ValueError), ([0.5], TypeError)]
)
def test_what_cannot_be_watched(model, watched, error):
    with pytest.raises(error, match='sample: watched=.*Expected'):
        model.sample(8, steps=1, watched=watched, callback=print)


def scans(tiny_run, n):
    return open_dataset(tiny_run[1], DataConfig(size=64), progress=False).__getitems__(range(n))[
        'image'
    ]


def test_samplers_agree_with_many_steps(model):
    a, b = (
        model.sample(2, steps=60, sampler=o, slice=2, diagnosis='AD', seed=3)
        for o in ('ddim', 'dpmpp')
    )
    assert (a - b).abs().mean() < 0.02


def test_image_to_image(model, tiny_run):
    images, requested = scans(tiny_run, 5), dict(slice=2, diagnosis='NC')
    same(
        model.image_to_image(images, 1.0, steps=6, seed=4, **requested),
        model.sample(5, steps=6, seed=4, **requested),
    )
    for sampler in ('ddim', 'dpmpp', 'ddpm'):
        options = dict(steps=10, sampler=sampler, seed=4, **requested)
        for b in (1, 2):
            same(
                model.image_to_image(images, 0.5, batch_size=b, **options),
                model.image_to_image(images, 0.5, **options),
            )
    far = [
        (model.image_to_image(images, w, steps=20, **requested) - model.reconstruct(images))
        .abs()
        .mean()
        for w in (0.1, 0.5, 1.0)
    ]
    assert far[0] < far[1] < far[2]
    assert torch.equal(images, scans(tiny_run, 5))  # what came in stays as it was


def test_counterfactual(model, tiny_run):
    images, known = scans(tiny_run, 3), dict(slice=[0.0, 1.0, 2.0], diagnosis='NC')
    back = {
        (steps, refine): (
            (
                model.encode_standard(
                    model.counterfactual(images, {}, known, steps=steps, refine=refine)
                )
                - model.encode_standard(model.reconstruct(images))
            )
            .abs()
            .mean()
            .item()
        )
        for steps, refine in ((6, 0), (24, 0), (24, 2))
    }
    assert back[24, 2] < back[24, 0] < back[6, 0]  # more steps, and corrections, come back better
    requested = dict(steps=6, refine=1)
    same(
        model.counterfactual(images, dict(diagnosis='AD'), known, batch_size=2, **requested),
        model.counterfactual(images, dict(diagnosis='AD'), known, **requested),
    )
    a, b = (model.counterfactual(images, o, known, **requested) for o in ({}, dict(slice=5.0)))
    assert (a - b).abs().max() > 1e-6  # a network of a handful of steps hardly hears
    a, b = (
        model.counterfactual(images, dict(slice=5.0), known, strength=o, steps=10)
        for o in (0.1, 1.0)
    )
    assert (a - model.reconstruct(images)).abs().mean() < (
        b - model.reconstruct(images)
    ).abs().mean()


def test_interpolate(model, tiny_run):
    a, b = scans(tiny_run, 2).split(1)
    way = model.interpolate(a, b, 5, dict(slice=[0.0, 4.0], sex='F'), steps=10, batch_size=2)
    assert way.shape == (5, 1, 64, 64) and way.isfinite().all()
    for end, i, k in ((a, 0, 0.0), (b, -1, 4.0)):
        same(
            way[i:] if i else way[:1],
            model.counterfactual(end, {}, dict(slice=k, sex='F'), steps=10),
        )
    moves = (way[1:] - way[:-1]).abs().mean((1, 2, 3))
    assert moves.min() > 0


def test_slerp_stays_on_the_sphere():
    a, b = sample_noise(2, (3, 5, 7), 0)
    b = b / b.norm() * a.norm()
    arc = slerp(a, b, torch.linspace(0, 1, 9))
    torch.testing.assert_close(arc.flatten(1).norm(dim=1), a.norm().expand(9))
    torch.testing.assert_close(
        slerp(a, b, torch.tensor([0.25]))[0], slerp(b, a, torch.tensor([0.75]))[0]
    )


def test_slerp_between_a_point_and_itself():
    "Rounding puts the cosine above 1, or the angle at 0."
    for i in range(50):
        a = sample_noise(1, (4, 8, 8), 0, i)[0]
        for b in (a, 2 * a, a + 1e-6):
            torch.testing.assert_close(
                slerp(a, b, torch.linspace(0, 1, 3)),
                torch.stack([a, (a + b) / 2, b]),
                rtol=1e-4,
                atol=1e-4,
            )


def test_conditions_between_two_ends():
    u = torch.linspace(0, 1, 5)
    got = mix_conditions(
        dict(
            slice=torch.tensor([0.0, 1.0]),
            age=torch.tensor([torch.nan] * 2),
            diagnosis=torch.tensor([1, 1]),
        ),
        u,
    )
    assert (
        torch.equal(got['slice'], u)
        and got['age'].isnan().all()
        and got['diagnosis'].tolist() == [1] * 5
    )


def test_edits_of_a_conditional_autoencoder(model, tiny_run):
    """What the autoencoder must hear is asked for, encoded with the old value and decoded with the
    new one."""
    own = Covariate('scanner', 'categorical', values=('1.5T', '3T'))
    torch.manual_seed(0)
    auto = AutoencoderKL(4, (16,), 1, (False,), 8, covariates=(own,))
    for p in auto.parameters():
        torch.nn.init.normal_(p, std=0.05)
    both, images = Sampler(
        auto, 64, model.unet, model.schedule, model.latent_mean, model.latent_std
    ), scans(tiny_run, 2)
    one, other = (
        both.counterfactual(images, dict(scanner=o), dict(scanner='3T'), steps=3)
        for o in own.values
    )
    assert (one - other).abs().max() > 1e-5
    assert (
        both.image_to_image(images, 0.5, steps=3, scanner='3T').shape
        == both.interpolate(*images.split(1), 2, dict(scanner='3T'), steps=3).shape
    )
    for call in (
        lambda: both.image_to_image(images),
        lambda: both.counterfactual(images, {}),
        lambda: both.interpolate(*images.split(1)),
    ):
        with pytest.raises(ValueError, match='no value of scanner'):
            call()
    with pytest.raises(ValueError, match="guidance_scale for 'scanner'"):
        both.sample(1, scanner='3T', guidance_scale=dict(scanner=2.0))


@pytest.mark.parametrize(
    'call, error, message',
    [
        (lambda m, p: m.image_to_image(p, 0.0), ValueError, 'strength=0.0'),
        (lambda m, p: m.image_to_image(p, 1.5), ValueError, 'strength=1.5'),
        (lambda m, p: m.image_to_image(p, 0.01, steps=10), ValueError, 'one step or more'),
        (lambda m, p: m.image_to_image(p * 127), ValueError, 'Try images/127.5-1'),
        (lambda m, p: m.image_to_image(p[0]), ValueError, 'Expected (n, 1, 64, 64)'),
        (lambda m, p: m.image_to_image(p[..., :32]), ValueError, 'shape'),
        (lambda m, p: m.image_to_image(p.numpy()), TypeError, 'Expected a float tensor'),
        (lambda m, p: m.image_to_image(p.byte()), TypeError, 'torch.uint8'),
        (lambda m, p: m.image_to_image(p, weight=3), ValueError, 'weight'),
        (lambda m, p: m.image_to_image(p, seed=-1), ValueError, 'seed=-1'),
        (lambda m, p: m.image_to_image(p, sampler='heun'), ValueError, 'heun'),
        (lambda m, p: m.image_to_image(p * float('nan')), ValueError, 'nan'),
        (lambda m, p: m.counterfactual(p, dict(weight=3)), ValueError, 'weight'),
        (lambda m, p: m.counterfactual(p, dict(diagnosis='MCI')), ValueError, 'AD, NC'),
        (lambda m, p: m.counterfactual(p, {}, dict(slice=[1.0])), ValueError, '1 values of slice'),
        (lambda m, p: m.counterfactual(p, {}, strength=-1), ValueError, 'strength=-1'),
        (lambda m, p: m.counterfactual(p, {}, refine=-1), ValueError, 'refine=-1'),
        (lambda m, p: m.counterfactual(p, {}, steps=0), ValueError, 'steps=0'),
        (lambda m, p: m.counterfactual(p[:0], {}), ValueError, 'shape (0,'),
        (lambda m, p: m.counterfactual(p, {}, batch_size=0), ValueError, 'batch_size=0'),
        (lambda m, p: m.interpolate(p, p[:1]), ValueError, '2 and 1 images'),
        (lambda m, p: m.interpolate(*p.split(1), 1), ValueError, 'n=1'),
        (lambda m, p: m.interpolate(*p.split(1), 2.5), TypeError, 'n=2.5'),
        (
            lambda m, p: m.interpolate(*p.split(1), 3, dict(diagnosis=['AD', 'NC'])),
            ValueError,
            'diagnosis differs',
        ),
        (
            lambda m, p: m.interpolate(*p.split(1), 3, dict(age=[70, None])),
            ValueError,
            'age differs',
        ),
    ],
)
def test_bad_edits(model, tiny_run, call, error, message):
    with pytest.raises(error) as e:
        call(model, scans(tiny_run, 2))
    assert message in str(e.value) and 'Expected' in str(e.value)


def test_skipped_steps_are_those_of_diffusers():
    for steps in (1, 7, 30):
        for strength in (0.2, 0.5, 0.99, 1.0):
            if int(steps * strength):
                assert skipped_steps(steps, strength) == max(
                    steps - min(int(steps * strength), steps), 0
                )


def test_not_a_number_is_an_error(copy):
    tensors, about = load_weights(copy / 'ldm.safetensors')
    save_weights(
        copy / 'ldm.safetensors',
        {k: v * float('nan') if k.startswith('ema.up.head') else v for k, v in tensors.items()},
        about,
    )
    # a broken file is named when it is read
    with pytest.raises(ValueError, match='not finite, first in .*head'):
        BrainLDM.load(copy)
    save_weights(copy / 'ldm.safetensors', tensors, about)
    model = BrainLDM.load(copy)
    # and numbers that break later, when they do
    for p in model.unet.up.head.parameters():
        p.data.fill_(float('nan'))
    with pytest.raises(RuntimeError, match='precision'):
        model.sample(1, steps=2)


@pytest.mark.parametrize('name', ['config.json', 'autoencoder.safetensors'])
def test_run_without(copy, name):
    (copy / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        BrainLDM.load(copy)


@pytest.mark.parametrize('name', ['ldm.safetensors', 'autoencoder.safetensors'])
@pytest.mark.parametrize('keep', [0, 7, 500, -1])
def test_truncated(copy, name, keep):
    (copy / name).write_bytes((copy / name).read_bytes()[:keep])
    with pytest.raises(ValueError, match='cannot be read'):
        BrainLDM.load(copy)


def test_files_swapped(copy):
    shutil.copy(copy / 'autoencoder.safetensors', copy / 'ldm.safetensors')
    with pytest.raises(ValueError, match="Expected 'ldm'"):
        BrainLDM.load(copy)


def test_another_architecture(copy):
    tensors, about = load_weights(copy / 'ldm.safetensors')
    wide = dict(about, args=dict(about['args'], channels=[32]))
    save_weights(copy / 'ldm.safetensors', tensors, wide)
    with pytest.raises(ValueError, match='another architecture'):
        BrainLDM.load(copy)
    save_weights(
        copy / 'ldm.safetensors', tensors, dict(about, args=dict(about['args'], in_channels=8))
    )
    with pytest.raises(ValueError, match='two files of one run'):
        BrainLDM.load(copy)


def test_load_options(tiny_run):
    ema, raw = (
        BrainLDM.load(tiny_run[0], weights=o, device='cpu', precision='no').sample(1, steps=3)
        for o in ('ema', 'raw')
    )
    assert not torch.equal(ema, raw)
    half = BrainLDM.load(tiny_run[0], device='cpu', precision='bf16').sample(1, steps=3)
    assert (half - ema).abs().mean() < 0.1
    for wrong in (dict(weights='best'), dict(precision='fp8'), dict(device='gpu')):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            BrainLDM.load(tiny_run[0], **wrong)
    assert load_denoiser(tiny_run[0], 4)['schedule'].num_train_timesteps == 1000


def test_schedule_travels_with_the_weights(copy):
    tensors, about = load_weights(copy / 'ldm.safetensors')
    save_weights(
        copy / 'ldm.safetensors',
        tensors,
        dict(about, schedule=dict(about['schedule'], num_train_timesteps=50)),
    )
    model = BrainLDM.load(copy)
    assert dataclasses.asdict(model.schedule)['num_train_timesteps'] == 50
    assert model.sample(1, steps=50).isfinite().all()  # as many steps as the chain has
    with pytest.raises(ValueError, match='Expected 1 to 50'):
        model.sample(1, steps=51)
