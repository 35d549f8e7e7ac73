"""The schedule, the mixture and the questions against diffusers, against closed forms, and against
bad input."""

import dataclasses, json, math
import pytest, torch
from torch.testing import assert_close
from brainldm import scheduler as S
from brainldm.engineering.configs import PREDICTION_TYPES, ScheduleConfig

diffusers = pytest.importorskip('diffusers')
NAMES = dict(linear='linear', scaled_linear='scaled_linear', cosine='squaredcos_cap_v2')
KINDS = [(p, z) for p in PREDICTION_TYPES for z in (False, True) if not (p == 'epsilon' and z)]


def pair(cls, beta_schedule, prediction_type, zero, T=1000, spacing='trailing', **kwargs):
    """Our schedule and the diffusers scheduler of the same name, the latter raised to float64 so
    that only rules differ."""
    ours = S.NoiseSchedule(
        T, beta_schedule, zero_terminal_snr=zero, prediction_type=prediction_type
    )
    theirs = cls(
        num_train_timesteps=T,
        beta_schedule=NAMES[beta_schedule],
        prediction_type=prediction_type,
        clip_sample=False,
        rescale_betas_zero_snr=zero,
        timestep_spacing=spacing,
        **kwargs
    )
    return ours, theirs


def rand(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize('T', [2, 10, 100, 1000])
@pytest.mark.parametrize('zero', [False, True])
@pytest.mark.parametrize('name', list(NAMES))
def test_schedule_is_that_of_diffusers(name, zero, T):
    ours, theirs = pair(diffusers.DDPMScheduler, name, 'v_prediction', zero, T)
    # theirs is a float32 product of T terms
    assert_close(ours.abar.float(), theirs.alphas_cumprod, atol=1e-5, rtol=0)
    assert (
        ours.abar.dtype == torch.float64
        and (ours.abar.diff() < 0).all()
        and 0 <= ours.abar[-1] < ours.abar[0] < 1
    )
    assert (ours.abar[-1] == 0) == zero
    assert ours.abar is ours.abar  # made once
    assert_close(ours.snr, ours.abar / (1 - ours.abar))


@pytest.mark.parametrize('name', list(NAMES))
def test_noise_and_velocity_are_those_of_diffusers(name):
    ours, theirs = pair(diffusers.DDPMScheduler, name, 'v_prediction', True)
    theirs.alphas_cumprod = ours.abar
    x0, eps, t = rand(0, 4, 2, 3, 5), rand(1, 4, 2, 3, 5), torch.tensor([0, 1, 500, 999])
    assert_close(S.add_noise(x0, eps, t, ours.abar), theirs.add_noise(x0, eps, t))
    assert_close(S.targets(x0, eps, t, ours.abar, 'v_prediction'), theirs.get_velocity(x0, eps, t))


def test_min_snr_weights_are_those_of_diffusers():
    train = pytest.importorskip('diffusers.training_utils')
    ours, theirs = pair(diffusers.DDPMScheduler, 'scaled_linear', 'epsilon', False)
    t = torch.arange(1000)
    snr = train.compute_snr(theirs, t)
    want = dict(
        epsilon=snr.clamp(max=5) / snr,
        v_prediction=snr.clamp(max=5) / (snr + 1),
        sample=snr.clamp(max=5),
    )
    for kind, w in want.items():
        assert_close(S.min_snr_weight(t, ours.abar, kind), w, rtol=1e-3, atol=1e-6)
    assert_close(
        S.min_snr_weight(t, ours.abar, 'v_prediction', 5.0, 1.0),
        (5 / (snr + 1)).clamp(max=1),
        rtol=1e-3,
        atol=1e-6,
    )


@pytest.mark.parametrize('prediction_type,zero', KINDS)
@pytest.mark.parametrize('shape', [(3,), (3, 2), (3, 2, 5, 7), (2, 1, 3, 4, 5)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_round_trip(prediction_type, zero, shape, dtype):
    abar = S.NoiseSchedule(50, zero_terminal_snr=zero, prediction_type=prediction_type).abar
    x0, eps, t = rand(0, *shape).to(dtype), rand(1, *shape).to(dtype), torch.arange(shape[0]) * 24
    xt = S.add_noise(x0, eps, t, abar)
    x0_hat, eps_hat = S.to_x0_eps(
        S.targets(x0, eps, t, abar, prediction_type), xt, t, abar, prediction_type
    )
    assert x0_hat.dtype == eps_hat.dtype == dtype
    tol = dict(atol=1e-4, rtol=0) if dtype == torch.float32 else dict(atol=1e-9, rtol=0)
    assert_close(x0_hat, x0, **tol)
    assert_close(eps_hat, eps, **tol)
    # one t for all
    for i in range(shape[0]):
        assert_close(S.add_noise(x0[i : i + 1], eps[i : i + 1], int(t[i]), abar), xt[i : i + 1])


@pytest.mark.parametrize('prediction_type', ['v_prediction', 'sample'])
def test_last_step_holds_noise_only_and_is_handled_exactly(prediction_type):
    abar = S.NoiseSchedule(prediction_type=prediction_type).abar
    x0, eps, t = rand(0, 2, 3), rand(1, 2, 3), torch.tensor([999, 999])
    assert torch.equal(S.add_noise(x0, eps, t, abar), eps)
    got = S.to_x0_eps(S.targets(x0, eps, t, abar, prediction_type), eps, t, abar, prediction_type)
    assert torch.equal(got[0], x0) and torch.equal(got[1], eps)


def test_small_noise_is_exact_in_float32():
    abar = S.NoiseSchedule().abar
    got = S.add_noise(torch.zeros(1, 1), torch.ones(1, 1), torch.tensor([0]), abar).double().item()
    assert (
        abs(got / math.sqrt(1 - abar[0]) - 1) < 1e-6
    )  # 1-abar taken in float32 would be off by 1e-3


def test_schedule_survives_json_and_pickle_and_equals_itself():
    import copy, pickle

    schedule = S.NoiseSchedule(100, 'scaled_linear', 0.001, 0.01, False, 'epsilon')
    schedule.abar
    again = S.NoiseSchedule(**json.loads(json.dumps(dataclasses.asdict(schedule))))
    assert (
        again == schedule
        and torch.equal(again.abar, schedule.abar)
        and hash(again) == hash(schedule)
    )
    assert copy.deepcopy(schedule) == schedule == pickle.loads(pickle.dumps(schedule))
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.beta_end = 0.5


x = torch.zeros(2, 3)


@pytest.mark.parametrize(
    'call,error,says',
    [
        (lambda: S.NoiseSchedule(1), ValueError, '2 or more'),
        (lambda: S.NoiseSchedule(10.0), TypeError, 'whole number'),
        (lambda: S.NoiseSchedule(True), TypeError, 'whole number'),
        (lambda: S.NoiseSchedule(beta_schedule='cosin'), ValueError, "'cosin'"),
        (lambda: S.NoiseSchedule(beta_start=0.0), ValueError, 'beta_start=0.0'),
        (lambda: S.NoiseSchedule(beta_end=1.0), ValueError, 'beta_end=1.0'),
        (
            lambda: S.NoiseSchedule(beta_start=0.1, beta_end=0.01),
            ValueError,
            'beta_start <= beta_end',
        ),
        (lambda: S.NoiseSchedule(prediction_type='noise'), ValueError, "'noise'"),
        (lambda: S.NoiseSchedule(prediction_type='epsilon'), ValueError, 'zero_terminal_snr=True'),
        (
            lambda: S.to_x0_eps(x, x, 5, S.NoiseSchedule().abar, 'epsilon'),
            ValueError,
            'v_prediction',
        ),
        (lambda: S.add_noise(x, x, torch.tensor([1]), S.NoiseSchedule().abar), ValueError, '(1,)'),
        (
            lambda: S.add_noise(x, x, torch.tensor([1.0, 2.0]), S.NoiseSchedule().abar),
            ValueError,
            'torch.int64',
        ),
        (lambda: S.add_noise(x.int(), x, 5, S.NoiseSchedule().abar), TypeError, 'torch.int32'),
        (lambda: S.add_noise(x, x, -1, S.NoiseSchedule().abar), ValueError, 't=-1'),
        (lambda: S.add_noise(x, x, 1000, S.NoiseSchedule().abar), ValueError, 't=1000'),
        (lambda: S.targets(x, x, 5, S.NoiseSchedule().abar, 'v'), ValueError, "'v'"),
        (
            lambda: S.min_snr_weight(torch.tensor([1]), S.NoiseSchedule().abar, 'v'),
            ValueError,
            "'v'",
        ),
    ],
)
def test_bad_input_is_refused_by_name(call, error, says):
    with pytest.raises(error) as e:
        call()
    assert says in str(e.value) and 'Expected' in str(e.value)


def test_a_negative_step_in_a_tensor_is_not_read_from_the_end():
    with pytest.raises(IndexError):
        S.add_noise(x, x, torch.tensor([0, -1]), S.NoiseSchedule().abar)


def test_tables_follow_from_settings():
    settings = ScheduleConfig(50, 'linear', zero_terminal_snr=False, prediction_type='epsilon')
    schedule = S.noise_schedule(settings)
    assert isinstance(schedule, S.NoiseSchedule) and S.noise_schedule(schedule) is schedule
    assert dataclasses.asdict(schedule) == dataclasses.asdict(settings)
    assert schedule.abar.equal((1 - S.linear_betas(50)).cumprod(0))
    S.check_terminal_signal(settings)
    with pytest.raises(ValueError, match='of the signal is left'):
        S.check_terminal_signal(dataclasses.replace(settings, beta_schedule='cosine'))
