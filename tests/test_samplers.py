"""The samplers against diffusers, against data with a known answer, and against bad input."""

import math
import pytest, torch
from torch.testing import assert_close
from brainldm.advanced import solvers as V
from brainldm import scheduler as S
from brainldm.engineering.configs import BETA_SCHEDULES
from test_scheduler import KINDS, NAMES, pair, rand

diffusers = pytest.importorskip('diffusers')


def denoise(model_fn, x, schedule, num_inference_steps, sampler='ddim', *args, **kwargs):
    "As `scheduler.denoise`, with the samplers by the names that the command line knows."
    sampler = V.SOLVERS.get(sampler, sampler)
    return S.denoise(model_fn, x, schedule, num_inference_steps, sampler, *args, **kwargs)


@pytest.mark.parametrize('spacing', S.SPACINGS)
@pytest.mark.parametrize('T', [10, 128, 1000])
def test_timesteps_are_those_of_diffusers(T, spacing):
    theirs = diffusers.DDIMScheduler(num_train_timesteps=T, timestep_spacing=spacing)
    for n in range(1 + (spacing == 'linspace'), T + 1):
        ours = S.sampling_timesteps(n, T, spacing)
        assert (
            len(ours) == n
            and all(a > b for a, b in zip(ours, ours[1:]))
            and 0 <= ours[-1]
            and ours[0] < T
        )
        assert S.sampling_timesteps(n, T, spacing, n // 3) == ours[n // 3 :]
        exact = [
            (T * i / n if spacing == 'trailing' else (T - 1) * (i - 1) / max(n - 1, 1))
            for i in range(n, 0, -1)
        ]
        theirs.set_timesteps(n)
        got = theirs.timesteps.tolist()
        # a half may round either way there, where the step count is not exact in binary
        if spacing != 'leading':
            assert len(got) >= n and all(
                a == b or abs(e % 1 - 0.5) < 1e-6 for a, b, e in zip(ours, got, exact)
            ), n
            assert ours[0] == T - 1
        else:
            assert ours == got
        assert spacing == 'trailing' or ours[-1] == 0


@pytest.mark.parametrize('n', [1, 7, 15, 50])
def test_timesteps_of_their_dpm_solver(n):
    """Its trailing list is ours.

    Its other two are ours of one step more without step 0, where next to no noise is left."""
    for spacing in S.SPACINGS:
        theirs = diffusers.DPMSolverMultistepScheduler(timestep_spacing=spacing)
        theirs.set_timesteps(n)
        ours = (
            S.sampling_timesteps(n, 1000)
            if spacing == 'trailing'
            else S.sampling_timesteps(n + 1, 1000, spacing)[:-1]
        )
        assert theirs.timesteps.tolist() == ours


@pytest.mark.parametrize('n', [1, 4, 7, 50])
@pytest.mark.parametrize('spacing', ['trailing', 'leading'])
@pytest.mark.parametrize('prediction_type,zero', KINDS)
@pytest.mark.parametrize('name', list(NAMES))
def test_ddpm_steps_are_those_of_diffusers(name, prediction_type, zero, spacing, n, monkeypatch):
    ours, theirs = pair(diffusers.DDPMScheduler, name, prediction_type, zero, spacing=spacing)
    theirs.alphas_cumprod = ours.abar  # their rules, our precision
    theirs.set_timesteps(n)
    x, ts = rand(0, 3, 2, 5), S.sampling_timesteps(n, 1000, spacing)
    assert ts == theirs.timesteps.tolist()
    for t, t_prev in zip(ts, ts[1:] + [-1]):
        pred, noise = rand(t + 1, 3, 2, 5), rand(t + 2, 3, 2, 5)
        monkeypatch.setattr(
            'diffusers.schedulers.scheduling_ddpm.randn_tensor', lambda *_, **__: noise
        )
        want = theirs.step(pred, t, x).prev_sample
        # theirs adds none at t=0
        x = S.ddpm_step(pred, x, t, t_prev, ours, noise if t > 0 else 0 * noise)
        if t_prev < 0:
            want = x if t > 0 else want  # theirs: noise of variance 1e-20
        assert_close(x, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('eta', [0.0, 0.5, 1.0])
@pytest.mark.parametrize('n', [1, 4, 50])
@pytest.mark.parametrize('spacing', ['trailing', 'leading'])
@pytest.mark.parametrize('prediction_type,zero', KINDS)
@pytest.mark.parametrize('name', list(NAMES))
def test_ddim_steps_are_those_of_diffusers(name, prediction_type, zero, spacing, n, eta):
    ours, theirs = pair(diffusers.DDIMScheduler, name, prediction_type, zero, spacing=spacing)
    theirs.alphas_cumprod = ours.abar
    theirs.set_timesteps(n)  # n divides T, or diffusers' t_prev differs
    x, ts = rand(0, 3, 2, 5), S.sampling_timesteps(n, 1000, spacing)
    for t, t_prev in zip(ts, ts[1:] + [-1]):
        pred, noise = rand(t + 1, 3, 2, 5), rand(t + 2, 3, 2, 5)
        want = theirs.step(pred, t, x, eta=eta, variance_noise=noise if eta else None).prev_sample
        # with eta=1 diffusers can take the root of a 0 that rounding has made negative
        if want.isnan().any():
            assert eta == 1
            want = S.ddpm_step(pred, x, t, t_prev, ours, noise)
        x = S.ddim_step(pred, x, t, t_prev, ours, eta, noise)
        assert_close(x, want, atol=1e-5, rtol=1e-5)


def dpm_pair(name, prediction_type, zero, ts):
    "The two, theirs with sigmas in float64 for the steps `ts`."
    ours = S.NoiseSchedule(1000, name, zero_terminal_snr=zero, prediction_type=prediction_type)
    theirs = diffusers.DPMSolverMultistepScheduler(
        beta_schedule=NAMES[name], prediction_type=prediction_type, rescale_betas_zero_snr=zero
    )
    theirs.set_timesteps(timesteps=ts)
    theirs.sigmas = torch.cat(
        [((1 - ours.abar) / ours.abar).sqrt()[ts], torch.zeros(1, dtype=torch.float64)]
    )
    return ours, theirs


@pytest.mark.parametrize('n', [2, 4, 10, 14, 15, 20, 50])
@pytest.mark.parametrize('spacing', S.SPACINGS)
@pytest.mark.parametrize('prediction_type,zero', KINDS)
@pytest.mark.parametrize('name', list(NAMES))
def test_dpm_solver_steps_are_those_of_diffusers(name, prediction_type, zero, spacing, n):
    """Given the same estimates, the same steps.

    Where the chain ends at exact noise theirs puts a tiny signal in its place and we do
    not: there both are begun after that first step, which needs no memory and is DDIM's."""
    ts = S.sampling_timesteps(n, 1000, spacing)
    skip = 1 if zero and ts[0] == 999 else 0
    if skip == n:
        return
    ours, theirs = dpm_pair(name, prediction_type, zero, ts)
    theirs.set_begin_index(skip)
    x, before = rand(0, 3, 2, 5), None
    for t, t_prev in list(zip(ts, ts[1:] + [-1]))[skip:]:
        # an estimate that drifts slowly
        truth, eps = rand(1, 3, 2, 5) + t / 1000 * rand(2, 3, 2, 5), rand(3, 3, 2, 5)
        if prediction_type != 'sample':
            eps = (x - ours.abar[t].sqrt() * truth) / (1 - ours.abar[t]).sqrt()
        pred = S.targets(truth, eps, t, ours.abar, prediction_type)
        want = theirs.step(pred, t, x).prev_sample  # computed in float32 there
        estimate = S.to_x0_eps(pred, x, t, ours.abar, prediction_type)[0]
        x, before = V.dpmpp_2m_step(pred, x, t, t_prev, ours, before), (estimate, t)
        assert_close(x, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('start', [0, 3, 9])
@pytest.mark.parametrize('sampler', V.SOLVERS)
def test_the_loop_is_that_of_diffusers(sampler, start, monkeypatch):
    "A whole walk, from noise or from half-way (image-to-image), with a network that is a formula."
    ours = S.NoiseSchedule(zero_terminal_snr=False)
    net, ts, x = gaussian_network(1.0, 0.5, ours), S.sampling_timesteps(10, 1000), rand(5, 3, 2)
    if sampler == 'dpmpp':
        theirs = dpm_pair('cosine', 'v_prediction', False, ts)[1]
    else:
        theirs = pair(
            dict(ddim=diffusers.DDIMScheduler, ddpm=diffusers.DDPMScheduler)[sampler],
            'cosine',
            'v_prediction',
            False,
        )[1]
        theirs.alphas_cumprod = ours.abar
        theirs.set_timesteps(10)
    if sampler == 'dpmpp':
        theirs.set_begin_index(start)
    noise = torch.Generator().manual_seed(3)
    monkeypatch.setattr(
        'diffusers.schedulers.scheduling_ddpm.randn_tensor',
        lambda s, **_: torch.randn(s, generator=noise, dtype=torch.float64),
    )
    got, want = (
        denoise(net, x, ours, 10, sampler, start=start, generator=torch.Generator().manual_seed(3)),
        x,
    )
    for t in ts[start:]:
        want = theirs.step(net(want, torch.full((3,), t)), t, want).prev_sample
    assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('n', [1, 4, 50])
@pytest.mark.parametrize('spacing', ['trailing', 'leading'])
@pytest.mark.parametrize('prediction_type,zero', KINDS)
def test_inversion_is_that_of_diffusers(prediction_type, zero, spacing, n):
    """Given the same answers, the same steps upward.

    The first starts at clean data, of which no network knows: ours reads the answer as one
    about step 0, theirs as one about no noise at all, where v is the noise (off by 0.6 % of
    x0) and an answer of type `sample` cannot be read."""
    ours, theirs = pair(
        diffusers.DDIMInverseScheduler, 'cosine', prediction_type, zero, spacing=spacing
    )
    theirs.alphas_cumprod = ours.abar
    theirs.set_timesteps(n)
    seen, preds = [], [rand(k, 3, 2, 5) for k in range(1, n + 1)]

    def net(x, t):
        seen.append((x, int(t[0])))
        return preds[len(seen) - 1]

    last = V.invert(net, rand(0, 3, 2, 5), ours, n, spacing)
    ts = theirs.timesteps.tolist()
    assert [t for _, t in seen] == [0, *ts[:-1]]
    for i, (x, goal) in enumerate(zip([x for x, _ in seen], [*[x for x, _ in seen[1:]], last])):
        if i or prediction_type == 'epsilon':
            assert_close(goal, theirs.step(preds[i], ts[i], x).prev_sample, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('eta', [0.0, 0.3, 1.0])
def test_a_perfect_network_is_led_back_to_the_data(eta):
    schedule = S.NoiseSchedule()
    x0, gen = rand(0, 5, 3), torch.Generator().manual_seed(1)

    def perfect(xt, t):
        a = schedule.abar[t[0]]
        return S.targets(
            x0, (xt - a.sqrt() * x0) / (1 - a).sqrt(), t, schedule.abar, 'v_prediction'
        )

    for n in (1, 3, 20):
        assert_close(denoise(perfect, rand(1, 5, 3), schedule, n, eta=eta, generator=gen), x0)


def gaussian_network(m, s, schedule):
    "The best possible answer when the data are N(m, s**2)."

    def model(xt, t):
        a = schedule.abar[t[0]]
        x0 = m + a.sqrt() * s * s / (a * s * s + 1 - a) * (xt - a.sqrt() * m)
        eps = (xt - a.sqrt() * x0) / (1 - a).sqrt()
        return S.targets(x0, eps, t, schedule.abar, schedule.prediction_type)

    return model


def ddim_std(s, schedule, ts):
    "Each step projects (root abar * s, root 1-abar) on the next such vector: one cosine a step."
    spot = lambda t: torch.tensor(
        [schedule.abar[t].sqrt() * s, (1 - schedule.abar[t]).sqrt()] if t >= 0 else [s, 0.0],
        dtype=torch.float64,
    )
    return s * math.prod(
        torch.nn.functional.cosine_similarity(spot(t), spot(p), dim=0).item()
        for t, p in zip(ts, ts[1:] + [-1])
    )


def ddpm_std(s, schedule, ts):
    """The step forgets that x0 is uncertain given xt: the variance falls behind the truth by that
    much each time."""
    a_ = lambda t: schedule.abar[t].item() if t >= 0 else 1.0
    true = lambda a: a * s * s + 1 - a  # variance of xt when the chain is exact
    lag = 0.0
    for t, p in zip(ts, ts[1:] + [-1]):
        a, b = a_(t), a_(p)
        keep = math.sqrt(a / b) * true(b) / true(a)  # regression of x_prev on xt
        lag = keep**2 * lag + (math.sqrt(b) * (1 - a / b) / (1 - a)) ** 2 * s * s * (1 - a) / true(
            a
        )
    return math.sqrt(true(1.0) - lag)


@pytest.mark.parametrize('n', [1, 5, 50, 1000])
@pytest.mark.parametrize('sampler,eta', [('ddim', 0.0), ('ddim', 1.0), ('ddpm', 0.0)])
@pytest.mark.parametrize('prediction_type', ['v_prediction', 'sample'])
@pytest.mark.parametrize('name', BETA_SCHEDULES)
def test_gaussian_closed_form(name, prediction_type, sampler, eta, n):
    m, s, num = 3.0, 0.5, 10_000
    schedule = S.NoiseSchedule(beta_schedule=name, prediction_type=prediction_type)
    got = denoise(
        gaussian_network(m, s, schedule),
        rand(n, num, 1),
        schedule,
        n,
        sampler,
        eta,
        torch.Generator().manual_seed(n),
    )
    want = (ddim_std if sampler == 'ddim' and not eta else ddpm_std)(
        s, schedule, S.sampling_timesteps(n, 1000)
    )
    assert abs(got.mean() - m) < 5 * want / num**0.5 + 1e-9  # standard error of a mean
    assert abs(got.std() - want) < 5 * want / (2 * num) ** 0.5 + 1e-9  # and of a standard deviation
    if n == 1000:
        assert abs(want / s - 1) < 0.02  # many steps: the truth itself


def test_dpm_solver_is_of_second_order():
    """Between two finite noise levels, steps even in lambda: double the steps, a quarter of the
    error (DDIM: half)."""
    T = 20_000
    schedule = S.NoiseSchedule(T)
    lam, z, s, m = (
        schedule.snr.log() / 2,
        rand(0, 50, 1),
        torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64),
        1.0,
    )
    net = gaussian_network(m, s, schedule)
    exact = (
        lambda t: schedule.abar[t].sqrt() * m
        + (schedule.abar[t] * s * s + 1 - schedule.abar[t]).sqrt() * z
    )

    def error(n, use_memory):
        ts = [int((lam - l).abs().argmin()) for l in torch.linspace(-2, 2, n + 1)]
        x, before = exact(ts[0]), None
        for t, t_prev in zip(ts, ts[1:]):
            pred = net(x, torch.full((len(x),), t))
            estimate = S.to_x0_eps(pred, x, t, schedule.abar, 'v_prediction')[0]
            x, before = V.dpmpp_2m_step(
                pred, x, t, t_prev, schedule, before if use_memory else None
            ), (estimate, t)
        return (x - exact(ts[-1])).abs().max().item()

    for n in (10, 20, 40):
        assert abs(math.log2(error(n, False) / error(2 * n, False)) - 1) < 0.15
        assert abs(math.log2(error(n, True) / error(2 * n, True)) - 2) < 0.3


@pytest.mark.parametrize('prediction_type,zero', KINDS)
@pytest.mark.parametrize('name', list(NAMES))
def test_dpm_solver_beats_ddim_against_the_exact_answer(name, prediction_type, zero):
    schedule = S.NoiseSchedule(1000, name, zero_terminal_snr=zero, prediction_type=prediction_type)
    z, m, s, a = (
        rand(0, 500, 4),
        3.0,
        torch.tensor([2.0, 1.0, 0.5, 0.25], dtype=torch.float64),
        schedule.abar[-1],
    )
    net, start = gaussian_network(m, s, schedule), a.sqrt() * m + (a * s * s + 1 - a).sqrt() * z
    off = {
        k: (denoise(net, start, schedule, 15, k) - (m + s * z)).pow(2).mean().sqrt()
        for k in ('ddim', 'dpmpp')
    }
    assert off['dpmpp'] < 0.6 * off['ddim']
    for n in (1, 2, 3):
        if zero:
            assert_close(*(denoise(net, start, schedule, n, k) for k in ('ddim', 'dpmpp')))


@pytest.mark.parametrize('spacing', S.SPACINGS)
@pytest.mark.parametrize('prediction_type,zero', KINDS)
@pytest.mark.parametrize('name', BETA_SCHEDULES)
def test_there_and_back(name, prediction_type, zero, spacing):
    "The error of the round trip falls with the steps, by one more power with each correction."
    schedule = S.NoiseSchedule(1000, name, zero_terminal_snr=zero, prediction_type=prediction_type)
    m, s = 1.0, torch.tensor([1.5, 0.5], dtype=torch.float64)
    x0, net = m + s * rand(0, 200, 2), gaussian_network(m, s, schedule)

    def off(n, refine, start=0):
        back = denoise(
            net,
            V.invert(net, x0, schedule, n, spacing, start, refine),
            schedule,
            n,
            spacing=spacing,
            start=start,
        )
        return (back - x0).pow(2).mean().sqrt().item()

    assert (
        off(100, 0) < 0.6 * off(50, 0) < 0.1
        and off(100, 1) < 0.4 * off(50, 1) < 0.02
        and off(100, 2) < 1e-3
    )
    assert off(50, 2, start=25) < 1e-3


def test_ddim_with_all_the_noise_is_ddpm():
    schedule = S.NoiseSchedule(beta_schedule='linear')
    x, pred, noise = rand(0, 4, 3), rand(1, 4, 3), rand(2, 4, 3)
    for t, p in ((999, 998), (999, 500), (500, 499), (20, 0), (0, -1)):
        assert_close(
            S.ddim_step(pred, x, t, p, schedule, 1.0, noise),
            S.ddpm_step(pred, x, t, p, schedule, noise),
        )


def test_dtype_follows_the_latents_and_a_bfloat16_answer_does_not_spoil_them():
    schedule = S.NoiseSchedule()
    for dtype in (torch.float32, torch.float64):
        for sampler in V.SOLVERS:
            assert (
                denoise(
                    lambda x, t: x.bfloat16(), rand(0, 2, 3).to(dtype), schedule, 6, sampler
                ).dtype
                == dtype
            )
        assert (
            V.invert(
                lambda x, t: 0.1 * x.bfloat16(), rand(0, 2, 3).to(dtype), schedule, 6, refine=1
            ).dtype
            == dtype
        )


def test_same_seed_same_samples_and_callback_sees_every_step():
    schedule, seen = S.NoiseSchedule(), []

    def draw(seed):
        return denoise(
            lambda x, t: 0 * x,
            rand(0, 2, 3),
            schedule,
            6,
            'ddpm',
            generator=torch.Generator().manual_seed(seed),
        )

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    denoise(
        lambda x, t: 0 * x,
        rand(0, 2, 3),
        schedule,
        6,
        callback=lambda i, t, xt, x0: seen.append((i, t, xt.shape, x0.shape)),
    )
    assert [(i, t) for i, t, *_ in seen] == list(enumerate(S.sampling_timesteps(6, 1000)))


@pytest.mark.parametrize('steps', [4, 10, 25])
def test_flow_is_rectified_flow_as_diffusers_has_it(steps):
    """DDIM on the schedule 'flow' takes the Euler steps of a flow-matching scheduler, for any
    network."""
    schedule = S.NoiseSchedule(beta_schedule='flow')
    a, b = schedule.abar.sqrt(), (1 - schedule.abar).sqrt()
    gen = torch.Generator().manual_seed(0)
    noise, pull = torch.randn(3, 2, 5, 7, generator=gen, dtype=torch.float64), torch.randn(
        3, 2, 5, 7, generator=gen, dtype=torch.float64
    )

    # any function of place and time on the straight road
    def speed(y, s):
        return torch.tanh(y) * (1 - s) + pull * s

    def network(xt, t):  # the same, asked for v on the circle
        s = (t.flatten()[0].item() + 1) / 1000
        y = xt * ((1 - s) ** 2 + s**2) ** 0.5
        i = int(t.flatten()[0])
        return (speed(y, s) - (b[i] - a[i]) * xt) / (a[i] + b[i])

    ours = denoise(network, noise, schedule, steps, 'ddim')
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)
    times = [(t + 1) / 1000 for t in S.sampling_timesteps(steps, 1000)]
    theirs.set_timesteps(sigmas=times)
    y = noise.clone()
    for s, t in zip(times, theirs.timesteps):
        y = theirs.step(speed(y, s), t, y).prev_sample
    # theirs keeps its times in float32; our last step keeps 1e-6 of the signal
    torch.testing.assert_close(ours, y, rtol=2e-4, atol=2e-4)


x, T = torch.zeros(2, 3), 1000


@pytest.mark.parametrize(
    'call,error,says',
    [
        (lambda: S.sampling_timesteps(0, T), ValueError, 'num_inference_steps=0'),
        (lambda: S.sampling_timesteps(1, T, 'linspace'), ValueError, 'Expected 2 to'),
        (lambda: S.sampling_timesteps(5, T, start=5), ValueError, 'start=5'),
        (lambda: S.sampling_timesteps(5, T, start=-1), ValueError, 'start=-1'),
        (
            lambda: V.dpmpp_2m_step(x, x, 5, 4, S.NoiseSchedule(), (x, 5)),
            ValueError,
            'from t=5 to t_prev=5',
        ),
        (lambda: V.dpmpp_2m_step(x, x, 5, 5, S.NoiseSchedule()), ValueError, 't_prev=5'),
        (
            lambda: denoise(lambda x, t: x, x, S.NoiseSchedule(), 5, start=7),
            ValueError,
            'start=7',
        ),
        (
            lambda: denoise(lambda x, t: x, x, S.NoiseSchedule(), 5, 'dpmpp', eta=0.5),
            ValueError,
            "sampler='dpmpp_2m_step'",
        ),
        (
            lambda: denoise(lambda x, t: x, x, S.NoiseSchedule(), 5, 'ddpm', eta=1.0),
            ValueError,
            "sampler='ddpm'",
        ),
        (
            lambda: V.invert(lambda x, t: x, x, S.NoiseSchedule(), 5, refine=-1),
            ValueError,
            'refine=-1',
        ),
        (
            lambda: V.invert(lambda x, t: x, x, S.NoiseSchedule(), 0),
            ValueError,
            'num_inference_steps=0',
        ),
        (lambda: S.sampling_timesteps(T + 1, T), ValueError, '1 to num_train_timesteps=1000'),
        (lambda: S.sampling_timesteps(5.0, T), TypeError, '5.0'),
        (lambda: S.sampling_timesteps(True, T), TypeError, 'True'),
        (lambda: S.sampling_timesteps(5, T, 'even'), ValueError, "'even'"),
        (lambda: S.ddim_step(x, x, 5, 5, S.NoiseSchedule()), ValueError, 't_prev=5'),
        (lambda: S.ddim_step(x, x, 5, -2, S.NoiseSchedule()), ValueError, 't_prev=-2'),
        (lambda: S.ddpm_step(x, x, 1000, 5, S.NoiseSchedule(), x), ValueError, 't=1000'),
        (lambda: S.ddim_step(x, x, 5, 4, S.NoiseSchedule(), eta=0.5), ValueError, 'no noise'),
        (
            lambda: S.ddim_step(x, x, 5, 4, S.NoiseSchedule(), eta=1.5, noise=x),
            ValueError,
            'eta=1.5',
        ),
        (
            lambda: denoise(lambda x, t: x, x, S.NoiseSchedule(), 5, sampler='euler'),
            ValueError,
            "'euler'",
        ),
    ],
)
def test_bad_input_is_refused_by_name(call, error, says):
    with pytest.raises(error) as e:
        call()
    assert says in str(e.value) and 'Expected' in str(e.value)


@pytest.mark.parametrize(
    'options',
    [
        dict(sampler='ddpm'),
        dict(sampler='ddim', eta=0.7),
        dict(sampler='dpmpp'),
        dict(sampler='ddim'),
    ],
    ids=str,
)
def test_an_image_does_not_depend_on_its_batch(options):
    """Fresh noise from one generator an image: five together are what three and two, or each
    alone, are. A network without sums makes it exact."""
    x, schedule = rand(0, 5, 2, 3), S.NoiseSchedule()

    def walk(at):
        return denoise(
            lambda x, t: 0.3 * x,
            x[at],
            schedule,
            6,
            generator=[torch.Generator().manual_seed(i) for i in at],
            **options,
        )

    together = walk(range(5))
    assert torch.equal(torch.cat([walk(range(3)), walk([3, 4])]), together)
    assert torch.equal(torch.cat([walk([i]) for i in range(5)]), together)
    if options != dict(sampler='ddim') and options['sampler'] != 'dpmpp':
        assert not torch.equal(
            walk([0, 1]),
            denoise(
                lambda x, t: 0.3 * x,
                x[:2],
                schedule,
                6,
                generator=[torch.Generator().manual_seed(i) for i in (7, 1)],
                **options,
            ),
        )


def test_as_many_generators_as_images():
    with pytest.raises(ValueError, match='fresh_noise: 2 generators for 3 images. Expected'):
        denoise(
            lambda x, t: x,
            rand(0, 3, 2),
            S.NoiseSchedule(),
            2,
            'ddpm',
            generator=[torch.Generator()] * 2,
        )


def test_any_step_function_samples():
    "A step of one's own takes the place of a name, and sees the estimate of one step ago."
    schedule, seen = S.NoiseSchedule(), []

    def step(pred, xt, t, t_prev, schedule, before):
        seen.append(before)
        return S.ddim_step(pred, xt, t, t_prev, schedule)

    x, model_fn = rand(0, 3, 2), gaussian_network(1.0, 0.5, schedule)
    assert torch.equal(
        S.denoise(model_fn, x, schedule, 4, step), S.denoise(model_fn, x, schedule, 4)
    )
    assert seen[0] is None and [t for _, t in seen[1:]] == S.sampling_timesteps(4, 1000)[:-1]
    with pytest.raises(ValueError, match="sampler='step'"):
        S.denoise(model_fn, x, schedule, 4, step, eta=0.5)


def test_the_bound_is_a_weighted_squared_error_and_tight_in_the_limit():
    "Two posteriors of one width: their divergence is the change of the SNR times the error of x0."
    schedule = S.NoiseSchedule(prediction_type='sample')
    x0, guess, xt = rand(0, 4, 2), rand(1, 4, 2), rand(2, 4, 2)
    for t, t_prev in ((500, 499), (999, 600), (40, 10), (1, 0)):
        a, b = (S.ddpm_step(o, xt, t, t_prev, schedule, torch.zeros_like(xt)) for o in (x0, guess))
        sigma = S.ddpm_step(guess, xt, t, t_prev, schedule, torch.ones_like(xt)) - b
        want = (schedule.snr[t_prev] - schedule.snr[t]) / 2 * (x0 - guess).square()
        assert_close((a - b).square() / (2 * sigma**2), want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize('name', BETA_SCHEDULES)
def test_ddim_is_an_euler_step_of_the_probability_flow(name):
    schedule = S.NoiseSchedule(beta_schedule=name)
    xt, v = rand(0, 4, 2), rand(1, 4, 2)
    for t, t_prev in ((900, 500), (500, 499), (30, 0)):
        a, a_prev = S.step_abar(t, t_prev, schedule)
        eps = S.to_x0_eps(v, xt, t, schedule.abar, 'v_prediction')[1]
        euler = xt / a**0.5 + ((1 / a_prev - 1) ** 0.5 - (1 / a - 1) ** 0.5) * eps
        assert_close(S.ddim_step(v, xt, t, t_prev, schedule) / a_prev**0.5, euler)
