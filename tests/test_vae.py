"""The autoencoder over shapes, conditions and precisions, its losses and scores against other
libraries, and bad input."""

import math
import os
import numpy as np, pytest, torch
from scipy.ndimage import gaussian_filter
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
from brainldm.engineering.covariates import Covariate, encode_covariates
from brainldm.engineering.layers import LOGVAR_LIMITS, AttentionBlock, LimitLogvar, check_levels
from brainldm.vae import (
    AutoencoderKL,
    Decoder,
    Encoder,
    ResBlock,
    cyclical_weight,
    image_scores,
    kl_loss,
    laplacian_variance,
    reparameterize,
    run_levels,
    sharpness,
)

COVARIATES = (
    Covariate('slice', 'continuous', range=(0, 31)),
    Covariate('diagnosis', 'categorical', values=('AD', 'NC')),
)
TOLD = encode_covariates(dict(slice=[3, 28], diagnosis=['AD', None]), COVARIATES)
# latent_channels, channels, num_res_blocks, attention_levels, patch
NETS = [
    (2, (8,), 1, (False,), 1),
    (1, (8, 16), 2, (True, False), 1),
    (3, (8, 16), 1, (False, True), 2),
    (4, (16, 8, 24), 1, (False, False, True), 2),
    (8, (8, 16), 0, (False, False), 4),
]


def build(args=NETS[2], **kwargs):
    return AutoencoderKL(
        **dict(
            zip(
                ('latent_channels', 'channels', 'num_res_blocks', 'attention_levels', 'patch'), args
            )
        ),
        **kwargs,
    )


def awake(model):
    "Fill the layers that start at zero, so that every block does something."
    for m in model.modules():
        for last in (getattr(m, 'conv2', None), getattr(m, 'proj', None)):
            if last is not None:
                torch.nn.init.normal_(last.weight, std=0.05)
    return model


def images(*shape, seed=0):
    "Smooth discs on black air, in [-1, 1]."
    gen, (b, h, w) = np.random.default_rng(seed), shape
    y, x = np.mgrid[-1 : 1 : h * 1j, -1 : 1 : w * 1j]
    disc = x**2 + y**2 < 0.6
    return torch.tensor(
        np.stack(
            [
                np.where(
                    disc,
                    np.clip(
                        0.2 + 0.3 * gaussian_filter(gen.standard_normal((h, w)), 1.0) / 0.2, -0.7, 1
                    ),
                    -1,
                )
                for _ in range(b)
            ]
        )
    ).float()[:, None]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize('args', NETS)
@pytest.mark.parametrize('tiles', [(1, 1), (2, 3), (5, 2)])
def test_shapes_also_when_not_square(args, tiles):
    model = build(args)
    f = model.factor
    assert f == args[4] * 2 ** (len(args[1]) - 1)
    x = torch.randn(2, 1, 4 * f * tiles[0], 4 * f * tiles[1])
    mu, logvar = model.encode(x)
    assert mu.shape == logvar.shape == (2, args[0], 4 * tiles[0], 4 * tiles[1])
    recon, mu2, logvar2 = model(x, eps=torch.randn_like(mu))
    assert recon.shape == x.shape
    assert_close((mu2, logvar2), (mu, logvar))
    assert_close(model(x)[0], model.decode(mu))


@pytest.mark.parametrize('args', NETS)
@pytest.mark.parametrize('told', [False, True])
def test_gradient_reaches_every_parameter(args, told):
    model = awake(build(args, covariates=COVARIATES if told else (), cond_channels=8))
    x = torch.randn(2, 1, 8 * model.factor, 4 * model.factor)
    recon, mu, logvar = model(x, TOLD, torch.randn(2, args[0], 8, 4))
    ((recon - x).abs().mean() + kl_loss(mu, logvar)).backward()
    dead = [
        n
        for n, p in model.named_parameters()
        if p.grad is None or not p.grad.any() or not p.grad.isfinite().all()
    ]
    # one value is missing: its null token has a gradient
    quiet = {'conditioner.null'} if told else set()
    # no ResBlock listens
    if told and args[2] == 0:
        quiet |= {n for n in dict(model.named_parameters()) if n.startswith('conditioner')}
    assert not set(dead) - quiet


def test_a_picture_does_not_depend_on_its_neighbours():
    model, x = awake(build()), torch.randn(3, 1, 16, 24)
    assert_close(model(x)[0][1:2], model(x[1:2])[0], atol=1e-5, rtol=1e-4)


def test_output_depends_on_what_is_told():
    model = awake(build(covariates=COVARIATES, cond_channels=8))
    x, z = torch.randn(1, 1, 16, 24).expand(2, -1, -1, -1), torch.randn(1, 3, 4, 6).expand(
        2, -1, -1, -1
    )
    for out in (model.encode(x, TOLD)[0], model.decode(z, TOLD)):
        assert (out[0] - out[1]).abs().max() > 1e-3
    # missing = not told
    assert_close(model.decode(z, {'slice': torch.full((2,), math.nan)}), model.decode(z))
    # a batch may hold more
    assert_close(model.decode(z, {**TOLD, 'image': x}), model.decode(z, TOLD))
    assert model.covariates == COVARIATES and build().covariates == ()
    plain = build()
    assert_close(plain.decode(z, TOLD), plain.decode(z))  # an unconditional model is not told


def test_bfloat16_autocast():
    model, x = awake(build(covariates=COVARIATES, cond_channels=8)), torch.randn(2, 1, 16, 24)
    eps = torch.randn(2, 3, 4, 6)
    with torch.autocast('cpu', torch.bfloat16):
        recon, mu, logvar = model(x, TOLD, eps)
    full = model(x, TOLD, eps)
    # bfloat16 keeps 8 bits
    assert_close([o.float() for o in (recon, mu, logvar)], list(full), atol=0.1, rtol=0.05)
    ((recon.float() - x).abs().mean() + kl_loss(mu.float(), logvar.float())).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.skipif(
    not os.environ.get('BRAINLDM_SLOW'), reason='compiles C++ for a minute; set BRAINLDM_SLOW=1'
)
@pytest.mark.parametrize('told', [False, True])
def test_compiles_as_one_graph(told):
    torch._dynamo.reset()
    model = awake(build(covariates=COVARIATES if told else (), cond_channels=8))
    cond = TOLD if told else None
    x = torch.randn(2, 1, 16, 24)
    encode, decode = (torch.compile(o, fullgraph=True) for o in (model.encode, model.decode))
    with torch.no_grad():
        mu, logvar = encode(x, cond)
        assert_close((mu, logvar), model.encode(x, cond), atol=1e-4, rtol=1e-4)
        assert_close(decode(mu, cond), model.decode(mu, cond), atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- extreme encoders


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize('says', [-6e4, -40.0, 0.0, 12.0, 40.0, 6e4, math.inf, -math.inf])
def test_no_log_variance_breaks_loss_or_sample(says, dtype):
    mu, logvar = torch.tensor([-6e4, 0.0, 300.0, 6e4]).to(dtype), LimitLogvar.apply(
        torch.full((4,), says).to(dtype)
    )
    low, high = LOGVAR_LIMITS
    assert ((logvar >= low) & (logvar <= high)).all() and logvar.dtype == dtype
    z, kl = reparameterize(mu, logvar, torch.tensor([-5.0, 5.0, -5.0, 5.0]).to(dtype)), kl_loss(
        mu, logvar
    )
    assert z.isfinite().all() and kl.isfinite() and z.dtype == kl.dtype == torch.float32


@pytest.mark.parametrize('says', [-50.0, 50.0, 1e4])
def test_an_encoder_that_says_too_much_is_led_back(says):
    "Its bias lies beyond the limits: a plain clamp would give it no gradient for ever."
    model, x = build((1, (8,), 1, (False,), 1)), images(2, 8, 8)
    bias = model.encoder.head[-1].bias
    with torch.no_grad():
        bias[1] = says
    opt = torch.optim.AdamW([bias], lr=abs(says) / 60, weight_decay=0.0)
    for _ in range(30):
        _, mu, logvar = model(x, eps=torch.zeros(2, 1, 8, 8))
        assert (logvar <= 20).all() and (logvar >= -30).all()
        kl = kl_loss(mu, logvar)
        assert kl.isfinite()
        opt.zero_grad()
        kl.backward()
        opt.step()
    assert abs(bias[1]) < 0.8 * abs(says)


def test_ordinary_log_variances_and_not_a_number_pass():
    x = torch.linspace(-30, 20, 51, requires_grad=True)
    assert torch.equal(LimitLogvar.apply(x), x)
    assert torch.equal(
        torch.autograd.grad(LimitLogvar.apply(x), x, torch.full((51,), -3.0))[0],
        torch.full((51,), -3.0),
    )
    assert LimitLogvar.apply(torch.tensor(math.nan)).isnan()  # a fault is not covered up


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_an_extreme_encoder_under_autocast(dtype):
    model, x = build(), images(2, 16, 16)
    with torch.no_grad():
        model.encoder.head[-1].bias.copy_(torch.tensor([3e4] * 3 + [3e4] * 3))
    with torch.autocast('cpu', dtype):
        mu, logvar = model.encode(x)
        z = reparameterize(mu, logvar, 5 * torch.ones_like(mu))
    assert z.isfinite().all() and kl_loss(mu, logvar).isfinite() and logvar.max() == 20


def test_training_lowers_the_error():
    model, x = build((4, (16, 24), 1, (False, False), 2)), images(8, 32, 32)
    opt, errors = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(40):
        recon, mu, logvar = model(x, eps=torch.randn(8, 4, 8, 8))
        error = (recon - x).abs().mean()
        opt.zero_grad()
        (error + 1e-6 * kl_loss(mu, logvar)).backward()
        opt.step()
        errors.append(error.item())
    assert errors[-1] < 0.5 * errors[0]


@pytest.mark.parametrize(
    'shape', [(1, 1, 18, 16), (1, 1, 16, 18), (1, 2, 16, 16), (1, 16, 16), (1, 3, 16, 16)]
)
def test_encode_refuses_other_shapes(shape):
    with pytest.raises(
        ValueError, match=r'AutoencoderKL\.encode: images of shape .* multiples of 4\. '
    ):
        build().encode(torch.zeros(shape))


@pytest.mark.parametrize(
    'channels, attention', [((8, 16), (False,)), ((8,), (False, True)), ((), ())]
)
@pytest.mark.parametrize('make', [AutoencoderKL, Encoder, Decoder])
def test_levels_of_unequal_length_are_refused(make, channels, attention):
    with pytest.raises(
        ValueError,
        match=f'{make.__name__}: {len(channels)} channels and {len(attention)} attention_levels',
    ):
        make(channels=channels, attention_levels=attention)
    with pytest.raises(ValueError, match='equally long'):
        check_levels('here', channels, attention)


def test_channels_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match='Try in_channels=16'):
        build((2, (12,), 1, (False,), 2))


def test_run_levels_tells_residual_blocks_only():
    block = ResBlock(8, 8, emb_channels=4)
    x, emb = torch.randn(2, 8, 4, 6), torch.randn(2, 4)
    levels = torch.nn.ModuleList([torch.nn.ModuleList([torch.nn.Identity(), block])])
    assert_close(run_levels(levels, x, emb), block(x, emb))


def test_encoder_and_decoder_take_other_numbers_of_channels():
    x = torch.randn(2, 3, 16, 24)
    assert Encoder(3, 5, (8, 16), 1, (False, True), 2)(x).shape == (2, 5, 4, 6)
    assert Decoder(5, 3, (8, 16), 1, (False, True), 2)(torch.randn(2, 5, 4, 6)).shape == x.shape


@pytest.mark.parametrize('shape', [(3,), (2, 4, 5, 7)])
def test_kl_is_that_of_torch(shape):
    mu, logvar = 3 * torch.randn(shape, dtype=torch.float64), 2 * torch.randn(
        shape, dtype=torch.float64
    )
    N = torch.distributions.Normal
    want = torch.distributions.kl_divergence(
        N(mu, (logvar / 2).exp()), N(torch.zeros_like(mu), torch.ones_like(mu))
    ).mean()
    assert_close(kl_loss(mu, logvar), want)
    assert want > 0 and kl_loss(torch.zeros(shape), torch.zeros(shape)) == 0


def test_reparameterize_draws_from_the_gaussian():
    n, mu, logvar = 50_000, torch.tensor([[-2.0, 0.5]]), torch.tensor([[-3.0, 1.0]])
    z = reparameterize(mu, logvar, torch.randn(n, 2))
    sd = (logvar / 2).exp()[0]
    # standard errors
    assert ((z.mean(0) - mu[0]).abs() < 4 * sd / n**0.5).all() and (
        (z.std(0) / sd - 1).abs() < 4 / (2 * n) ** 0.5
    ).all()
    assert_close(reparameterize(mu, logvar, torch.zeros(1, 2)), mu)


@pytest.mark.parametrize('ramp', [0.25, 0.5, 1.0])
def test_cyclical_weight_rises_and_starts_again(ramp):
    w = [cyclical_weight(n, 200, 3.0, ramp) for n in range(400)]
    assert w[:200] == w[200:] and w[0] == 0 and max(w) <= 3 and sorted(w[:200]) == w[:200]
    assert w[int(100 * ramp)] == pytest.approx(1.5)


@pytest.mark.parametrize('period, ramp', [(0, 0.5), (-1, 0.5), (10, 0), (10, 1.5)])
def test_cyclical_weight_refuses(period, ramp):
    with pytest.raises(ValueError, match='Expected period >= 1 and ramp in'):
        cyclical_weight(1, period, 1.0, ramp)


def slow_ssim(a, b):
    "SSIM at each pixel from the formula, in float64, with scipy."
    blur = lambda o: gaussian_filter(o, 1.5, truncate=3.5, mode='mirror')
    a, b = (o.double().numpy() / 2 + 0.5 for o in (a, b))
    ma, mb = blur(a), blur(b)
    va, vb, cab = blur(a * a) - ma**2, blur(b * b) - mb**2, blur(a * b) - ma * mb
    return (2 * ma * mb + 1e-4) * (2 * cab + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))


@pytest.mark.parametrize('size', [(32, 32), (24, 40), (64, 48)])
@pytest.mark.parametrize('noise', [0.01, 0.2, 1.0])
def test_scores_against_the_slow_version(size, noise):
    real = images(3, *size)
    recon = (real + noise * torch.randn_like(real)).clamp(-1, 1)
    scores = image_scores(recon, real)
    for i in range(3):
        full, brain = slow_ssim(recon[i, 0], real[i, 0]), (real[i, 0] > -0.8).numpy()
        assert scores['ssim'][i].item() == pytest.approx(full.mean(), abs=2e-4)
        assert scores['ssim_brain'][i].item() == pytest.approx(full[brain].mean(), abs=2e-4)
        mse = ((recon[i] - real[i]).double() / 2).square().mean().item()
        assert scores['psnr'][i].item() == pytest.approx(-10 * math.log10(mse), abs=1e-3)


def test_scores_against_scikit_image():
    metrics = pytest.importorskip('skimage.metrics')
    # air untouched: no border effects
    real = images(2, 64, 64)
    recon = (real + 0.2 * torch.randn_like(real) * (real > -1)).clamp(-1, 1)
    scores = image_scores(recon, real)
    for i in range(2):
        a, b = ((o[i, 0].double().numpy() / 2 + 0.5) for o in (recon, real))
        _, full = metrics.structural_similarity(
            a,
            b,
            data_range=1.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            full=True,
        )
        assert scores['ssim'][i].item() == pytest.approx(full.mean(), abs=1e-3)
        assert scores['psnr'][i].item() == pytest.approx(
            metrics.peak_signal_noise_ratio(b, a, data_range=1.0), abs=1e-3
        )


def test_scores_of_perfect_black_and_empty_pictures():
    real = images(2, 32, 32)
    perfect, black = image_scores(real, real), image_scores(torch.full_like(real, -1), real)
    assert_close(perfect['ssim'], torch.ones(2))
    assert_close(perfect['ssim_brain'], torch.ones(2))
    assert perfect['psnr'].isinf().all()
    assert (black['ssim'] > black['ssim_brain'] + 0.2).all()  # air is right by itself
    # no brain, no score
    assert image_scores(real, torch.full_like(real, -1))['ssim_brain'].isnan().all()
    assert all(v.shape == (1,) for v in image_scores(real[:1], real[:1]).values())


@pytest.mark.parametrize(
    'a, b',
    [
        ((2, 1, 32, 32), (3, 1, 32, 32)),
        ((2, 32, 32), (2, 32, 32)),
        ((2, 3, 32, 32), (2, 3, 32, 32)),
    ],
)
def test_scores_refuse_other_shapes(a, b):
    with pytest.raises(ValueError, match='image_scores: shapes'):
        image_scores(torch.zeros(a), torch.zeros(b))


# ---------------------------------------------------------------- what the lesson states in a
# sentence


def test_an_encoder_without_the_stem_needs_three_times_the_operations():
    "Notebook 02: the same map with the same widths."
    x = torch.randn(8, 1, 64, 64)

    def operations(net):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(x)
        return counter.get_total_flops()

    folded = Encoder(1, 4, (24, 32), 1, (False,) * 2, patch=2)
    full_size = Encoder(1, 4, (24, 24, 32), 1, (False,) * 3, patch=1)
    assert folded(x).shape == full_size(x).shape
    assert operations(full_size) > 3 * operations(folded)
    by_hand = 32 * 32 * (4 * 24 + 2 * 24 * 24) + 16 * 16 * (24 * 32 + 2 * 32 * 32 + 32 * 4)
    assert operations(folded) == 8 * 2 * 9 * by_hand  # 9 c c' h w, each a product and a sum


def test_encoder_and_decoder_mirror_each_other():
    same = dict(channels=(8, 16), attention_levels=(False, True), patch=2)
    assert Encoder(1, 4, **same)(torch.randn(2, 1, 24, 40)).shape == (2, 4, 6, 10)
    decoder = Decoder(2, 1, **same)
    assert decoder(torch.randn(2, 2, 6, 10)).shape == (2, 1, 24, 40)
    assert isinstance(decoder.levels[0][0], AttentionBlock)  # attention where the map is small


def test_laplacian_leaves_out_the_border():
    x = torch.randn(2, 1, 9, 11)
    neighbors = x[..., :-2, 1:-1] + x[..., 2:, 1:-1] + x[..., 1:-1, :-2] + x[..., 1:-1, 2:]
    by_hand = (x[..., 1:-1, 1:-1] - neighbors / 4).flatten(1).var(1, unbiased=False)
    assert_close(laplacian_variance(x, torch.ones_like(x) > 0), by_hand)
    assert laplacian_variance(x, x > 99).isnan().all()


def test_sharpness_by_hand():
    x, inside = torch.randn(2, 1, 9, 11), torch.zeros(2, 1, 9, 11, dtype=torch.bool)
    inside[..., 1:-1, 1:-1] = True  # a frame of air: its neighbors are left out
    half = x.clone()
    half[0] *= 0.5
    # half the contrast: a quarter of the variance
    assert_close(sharpness(half, x, inside)[0], torch.tensor(0.25))
    ramp = torch.arange(11.0).expand(9, 11) + torch.arange(9.0)[:, None]
    slopes = sharpness((x + ramp)[:1], x[:1], inside[:1])
    assert_close(slopes, torch.ones(1), atol=1e-5, rtol=0)  # slopes do not count

    def laplacian(image):
        around = image[:-2, 1:-1] + image[2:, 1:-1] + image[1:-1, :-2] + image[1:-1, 2:]
        return (image[1:-1, 1:-1] - around / 4)[1:-1, 1:-1]

    other = torch.randn(1, 1, 9, 11)
    expected = laplacian(other[0, 0]).var(unbiased=False) / laplacian(x[0, 0]).var(unbiased=False)
    assert_close(sharpness(other, x[:1], inside[:1])[0], expected)
    assert sharpness(x, x, torch.zeros_like(inside)).isnan().all()
