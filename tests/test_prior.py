"The code prior for maintainers: no peeking, cache, chances, baselines, files, accidents, refusals."

import json
import math
import shutil
import signal
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from test_training import Crash, make_dataset

from brainldm.engineering.configs import (
    PRIOR_PRESETS,
    AEConfig,
    DataConfig,
    PriorConfig,
    check_config,
)
from brainldm.engineering.devices import pick_precision
from brainldm.engineering.covariates import Covariate
from brainldm.data import SliceDataset
from brainldm.engineering.loop import infer, seeded
from brainldm.engineering.runs import Checkpoint, load_weights, read_config, read_log
from brainldm.engineering.stage1 import load_autoencoder
from brainldm.training import train_autoencoder
from brainldm.advanced.prior import (
    CodeSampler,
    CodeTransformer,
    cache_codes,
    code_baselines,
    code_bits,
    code_cells,
    code_costs,
    code_probabilities,
    context_positions,
    load_prior,
    next_logits,
    pick_codes,
    prior_loss,
    sample_uniform,
    train_prior,
)
from brainldm.advanced import prior as module

AE = AEConfig(
    total_images=40,
    batch_size=4,
    log_every=2,
    warmup_images=8,
    validate_every=1_000,
    checkpoint_every=1_000,
    data=DataConfig(size=32),
    channels=(8, 16),
    latent_channels=3,
    attention_levels=(False, False),
    patch=4,
    kind='vq',
    num_embeddings=12,
)
PRIOR = PriorConfig(
    total_images=80,
    batch_size=4,
    log_every=2,
    warmup_images=16,
    validate_every=40,
    checkpoint_every=24,
    embed_dim=16,
    num_layers=2,
    num_heads=2,
    replace_codes=0.1,
    label_smoothing=0.1,
    ema_images=20,
)
COVARIATES = (
    Covariate('diagnosis', 'categorical', values=('AD', 'NC')),
    Covariate('slice', 'continuous', range=(0, 4)),
)


@pytest.fixture(autouse=True)
def quick_figures(monkeypatch):
    "Sampling takes most of the time of a tiny run."
    from brainldm.engineering import stage1

    for o in (module, stage1):
        monkeypatch.setattr(o, 'show_grid', lambda *args, **kwargs: plt.figure(figsize=(1, 1)))


@pytest.fixture(scope='module')
def dataset():
    return make_dataset()


@pytest.fixture(scope='module')
def vq(dataset, tmp_path_factory):
    "A run with a VQVAE and nothing else. Read only."
    run = tmp_path_factory.mktemp('vq') / 'run'
    train_autoencoder(dataset, run, AE, progress=False)
    return run


@pytest.fixture(scope='module')
def straight(dataset, vq, tmp_path_factory):
    "A run with a prior that was never stopped. Read only."
    run = tmp_path_factory.mktemp('straight') / 'run'
    shutil.copytree(vq, run)
    train_prior(dataset, run, PRIOR, progress=False)
    return run


def awake(num_embeddings=12, side=4, covariates=COVARIATES, **sizes):
    "A transformer that listens to everything: a fresh one's layers add nothing."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = CodeTransformer(
            num_embeddings,
            side,
            covariates,
            **{'embed_dim': 16, 'num_layers': 2, 'num_heads': 2, 'code_dim': 3, **sizes},
        )
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.3)
        net.vectors[:-1].normal_()
    return net.eval()


def told(n, covariates=COVARIATES):
    return (
        dict(diagnosis=torch.arange(n) % 3 - 1, slice=torch.linspace(0, 1, n)) if covariates else {}
    )


def random_codes(n=3, k=12, side=4, seed=0):
    return torch.randint(k, (n, side**2), generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------ no peeking


class Peeking(CodeTransformer):
    "The predecessors' fault: each place is given its own code."

    def embed(self, codes, cond, drop, start):
        x = super().embed(codes, cond, drop, start)
        own = self.codes(torch.cat([codes, codes[:, :1]], dim=1))
        return x + torch.cat([x.new_zeros(len(x), len(self.covariates), x.shape[2]), own], dim=1)


def test_codes_of_one_vector_are_alike_where_they_are_scored():
    net, same = awake(), random_codes()
    with torch.no_grad():
        net.head.weight.zero_()
        net.head.bias.zero_()
        net.codes.weight.zero_()
        net.vectors[5] = net.vectors[4]
        same[:, 2] = 4
        other = same.clone()
        other[:, 2] = 5
        assert torch.equal(net(same[:, :-1]), net(other[:, :-1])) and torch.equal(
            net(same[:, :-1])[..., 4], net(same[:, :-1])[..., 5]
        )
        other[:, 2] = 6
        assert not torch.equal(net(same[:, :-1]), net(other[:, :-1]))


def learn_random(kind, steps=120, k=8):
    """Train on codes that nobody can predict, new ones each step; bits per code of the last
    quarter, and their standard error."""
    torch.manual_seed(0)
    net = kind(k, 4, embed_dim=16, num_layers=2, num_heads=2)
    opt, gen, bits = torch.optim.AdamW(net.parameters(), 1e-2), torch.Generator().manual_seed(0), []
    config = replace(PRIOR, dropout=0.0, replace_codes=0.0, label_smoothing=0.0)
    for _ in range(steps):
        loss, logs = prior_loss(
            net, dict(latent=torch.randint(k, (32, 4, 4), generator=gen)), gen, 0, config, (), k
        )
        opt.zero_grad()
        loss.backward()
        opt.step()
        bits.append(logs['bits'])
    bits = torch.stack(bits[-steps // 4 :])
    return bits.mean().item(), bits.std().item() / len(bits) ** 0.5


def test_random_codes_cost_their_entropy():
    bits, se = learn_random(CodeTransformer)
    assert 3 - 4 * se <= bits < 3.1


def test_the_same_test_catches_a_network_that_peeks():
    assert learn_random(Peeking)[0] < 2


@pytest.mark.parametrize('precision', ['no', 'bf16'])
@pytest.mark.parametrize('covariates', [(), COVARIATES])
def test_a_later_code_never_changes_an_earlier_prediction(precision, covariates):
    net, codes = awake(covariates=covariates), random_codes()
    answer = infer(net, precision)
    base = answer(codes[:, :-1], told(3, covariates))
    for j in range(15):
        changed = codes.clone()
        changed[:, j] = (changed[:, j] + 1) % 12
        logits = answer(changed[:, :-1], told(3, covariates))
        assert torch.equal(logits[:, : j + 1], base[:, : j + 1])
        # and every later prediction listens
        assert all((logits[:, i] != base[:, i]).any() for i in range(j + 1, 16))


def test_neighbours_are_written_before_and_next_to_it():
    for side in (1, 2, 5):
        near = context_positions(side)
        for place, (last, *above) in enumerate(near.tolist()):
            i, j = divmod(place, side)
            assert last == place - 1
            assert above == [
                (i - 1) * side + j + d if i and 0 <= j + d < side else -1 for d in (0, -1, 1)
            ]


def test_outside_the_map_is_no_code():
    net = awake()
    net(torch.empty(1, 0, dtype=torch.int64)).sum().backward()
    heard = net.codes.weight.grad.abs().sum(1)
    assert heard[12] > 0 and not heard[:12].any()


# ------------------------------------------------------------------ cache


@pytest.mark.parametrize('side', [1, 3, 4])
@pytest.mark.parametrize('covariates', [(), COVARIATES])
@pytest.mark.parametrize('precision', ['no', 'bf16'])
def test_cached_logits_equal_uncached(side, covariates, precision):
    net, codes, n = (
        awake(side=side, covariates=covariates),
        random_codes(side=side),
        len(covariates),
    )
    cond, answer = told(3, covariates), infer(net, precision)
    base, cache, start = answer(codes[:, :-1], cond), infer(net, precision, 'new_cache')(3), 0
    assert cache.dtype == (torch.bfloat16 if precision == 'bf16' else torch.float32)
    for m in range(side**2):
        logits = answer(codes[:, :m], cond, cache=cache, start=start)
        # bf16: 8 bits, a few layers
        close = dict(atol=1e-4, rtol=1e-4) if precision == 'no' else dict(atol=0.3, rtol=0.1)
        torch.testing.assert_close(logits[:, -1], base[:, m], **close)
        start = n + m + 1


@pytest.mark.parametrize(
    'options',
    [
        {},
        dict(guidance_scale=2.0),
        dict(guidance_scale=0.0),
        dict(top_k=3),
        dict(temperature=0.5, top_p=0.7),
    ],
)
@pytest.mark.parametrize('rows', [0, 2])
def test_cached_sampling_writes_the_same_codes(options, rows):
    net, u, cond = awake(), torch.rand(3, 16, generator=torch.Generator().manual_seed(1)), told(3)
    prompt = random_codes().view(3, 4, 4)[:, :rows] if rows else None
    with torch.no_grad():
        fast, slow = (
            net.generate(u, cond, prompt=prompt, cached=o, **options) for o in (True, False)
        )
    assert torch.equal(fast, slow) and fast.shape == (3, 4, 4)
    if rows:
        assert torch.equal(fast[:, :rows], prompt)
    assert not torch.equal(
        fast, net.generate(1 - u - 1e-3, cond, prompt=prompt, **options).detach()
    )


def test_without_covariates_guidance_changes_nothing():
    net, u = awake(covariates=()), torch.rand(2, 16)
    assert torch.equal(net.generate(u), net.generate(u, guidance_scale=3.0))


def test_empty_prompt_is_no_prompt():
    net, u = awake(), torch.rand(2, 16)
    assert torch.equal(
        net.generate(u, told(2)),
        net.generate(u, told(2), prompt=torch.empty(2, 0, 4, dtype=torch.int64)),
    )


# ------------------------------------------------------------------ conditions


def test_dropped_is_never_told_and_guidance_is_a_line():
    net, codes, cond = awake(), random_codes()[:, :7], told(3)
    with torch.no_grad():
        nothing = net(codes, cond, torch.ones(3, 2, dtype=torch.bool))
        torch.testing.assert_close(nothing, net(codes))
        torch.testing.assert_close(
            net(codes, cond, torch.tensor([[False, True]] * 3)),
            net(codes, {'diagnosis': cond['diagnosis']}),
        )
        conditional = net(codes, cond)
        assert (conditional - nothing).abs().amax((1, 2)).min() > 1e-3  # every map hears something
        for scale in (0.0, 1.0, 2.5):
            want = nothing[:, -1] + scale * (conditional[:, -1] - nothing[:, -1])
            torch.testing.assert_close(
                next_logits(net, codes, cond, scale, None, 0), want, atol=1e-5, rtol=1e-4
            )


def test_dropout_is_training_alone():
    dry, wet, known = awake(), awake(dropout=0.5), random_codes(3)[:, :10]
    one, other, again = (seeded(o, lambda: wet.train()(known, told(3))) for o in (0, 1, 0))
    assert torch.equal(one, again) and (one - other).abs().amax((1, 2)).min() > 1e-3
    torch.testing.assert_close(wet.eval()(known, told(3)), dry(known, told(3)))


def test_loss_hides_what_it_is_told_to_hide():
    net, batch = awake(), dict(latent=random_codes(8).view(8, 4, 4), **told(8))

    def bits(gen=0, **change):
        config = replace(
            PRIOR,
            **{
                **dict(
                    dropout=0.0,
                    replace_codes=0.0,
                    label_smoothing=0.0,
                    covariate_dropout=0.0,
                    condition_dropout=0.0,
                ),
                **change,
            },
        )
        return prior_loss(net, batch, torch.Generator().manual_seed(gen), 0, config, COVARIATES, 12)

    codes = batch['latent']
    full = code_bits(net, codes, told(8)).mean()
    torch.testing.assert_close(bits()[1]['bits'], full)
    torch.testing.assert_close(
        bits(condition_dropout=1.0)[1]['bits'], code_bits(net, codes, {}).mean()
    )
    torch.testing.assert_close(
        bits(covariate_dropout=1.0)[1]['bits'], code_bits(net, codes, {}).mean()
    )
    assert bits(replace_codes=0.5)[1]['bits'] != full
    smooth, logs = bits(label_smoothing=0.2)
    torch.testing.assert_close(logs['bits'], full)  # the log is not smoothed
    with torch.no_grad():
        logits = net(codes.flatten(1)[:, :-1], told(8))
    nats = -logits.log_softmax(2)
    # a fifth of the target on all codes alike
    torch.testing.assert_close(smooth, 0.8 * full * math.log(2) + 0.2 * nats.mean())


# ------------------------------------------------------------------ chances


def slow_chances(logits, temperature, top_k, top_p):
    "As the papers say it, one row and one code at a time."
    rows = []
    for row in logits.double():
        p = (row / temperature).softmax(0)
        order = sorted(range(len(p)), key=lambda i: -p[i].item())[: top_k or len(p)]
        total, held_out, keep = sum(p[i] for i in order), 0.0, []
        for i in order:
            if top_p < 1 and held_out >= top_p * total:
                break
            keep.append(i)
            held_out += p[i]
        rows.append(
            torch.stack([p[i] if i in keep else p[i] * 0 for i in range(len(p))])
            / sum(p[i] for i in keep)
        )
    return torch.stack(rows)


@pytest.mark.parametrize('top_k', [None, 1, 3, 50])
@pytest.mark.parametrize('top_p', [1.0, 0.9, 0.5, 1e-9])
@pytest.mark.parametrize('temperature', [0.3, 1.0, 2.0])
def test_chances_against_a_slow_version(temperature, top_k, top_p):
    logits = 2 * torch.randn(5, 20, generator=torch.Generator().manual_seed(2))
    probabilities, order = code_probabilities(logits, temperature, top_k, top_p)
    assert (probabilities.diff(dim=1) <= 0).all()
    torch.testing.assert_close(
        torch.zeros(5, 20).scatter(1, order, probabilities).double(),
        slow_chances(logits, temperature, top_k, top_p),
        atol=1e-6,
        rtol=1e-5,
    )


def test_extreme_chances():
    one = torch.full((1, 5), -1e4)
    one[0, 3] = 1e4
    probabilities, order = code_probabilities(one, 0.01, None, 0.5)
    assert order[0, 0] == 3 and probabilities[0].tolist() == [1, 0, 0, 0, 0]
    even, _ = code_probabilities(torch.zeros(1, 4), top_k=2)
    assert even[0].tolist() == [0.5, 0.5, 0, 0]  # ties: exactly two are kept


def test_darts_land_as_often_as_the_chances_say():
    probabilities, order = torch.tensor([0.5, 0.25, 0.125, 0.125, 0.0]), torch.tensor(
        [4, 0, 3, 1, 2]
    )
    n = 800
    u = torch.arange(n) / n
    codes = pick_codes(probabilities.expand(n, -1), order.expand(n, -1), u)
    assert torch.bincount(codes, minlength=5).tolist() == [200, 100, 0, 100, 400]
    # a line that ends before the dart: rounding, in small
    short = torch.tensor([[0.5, 0.25, 0.0]])
    assert pick_codes(short, torch.arange(3)[None], torch.tensor([0.9])) == 1


def test_a_code_that_is_not_allowed_is_never_written():
    net = awake()
    with torch.no_grad():
        for seed in range(20):
            u = sample_uniform(2, 16, seed)
            codes = net.generate(u, told(2), top_k=2).flatten(1)
            logits = net(codes[:, :-1], told(2))
            assert (logits > logits.gather(2, codes[..., None])).sum(2).max() < 2


def test_greedy_is_the_most_probable_code():
    net, cond = awake(), told(3)
    with torch.no_grad():
        codes = net.generate(torch.rand(3, 16), cond, top_k=1)
        assert torch.equal(codes, net.generate(torch.zeros(3, 16), cond))
        assert torch.equal(net(codes.flatten(1)[:, :-1], cond).argmax(2).view(3, 4, 4), codes)


# ------------------------------------------------------------------ baselines


def slow_floor(train, train_cells, held_out, held_cells, k, strengths):
    out = torch.empty(held_out.shape, dtype=torch.float64)
    for index in np.ndindex(*held_out.shape):
        p = 1 / k
        for here, there, s in zip(train_cells, held_cells, strengths):
            own = train[here == there[index]]
            p = ((own == held_out[index]).sum().item() + s * p) / (len(own) + s)
        out[index] = -math.log2(p)
    return out


def test_floors_against_a_slow_version():
    gen = torch.Generator().manual_seed(0)
    # numbers with gaps
    slices, subjects = 3 * torch.arange(4).repeat(10) - 1, [f's{i//4}' for i in range(40)]
    train, held_out = (
        torch.randint(6, (n, 3, 3), generator=gen) * torch.randint(2, (n, 3, 3), generator=gen)
        for n in (40, 8)
    )
    found = code_baselines(train, slices, subjects, held_out, slices[:8], 6)
    assert list(found) == ['uniform', 'histogram', 'place', 'place_slice'] and all(
        o.shape == (8,) for o in found.values()
    )
    torch.testing.assert_close(found['uniform'], torch.full((8,), math.log2(6)))
    # every fifth subject, in the order of their names
    aside = torch.tensor([o in ('s0', 's5') for o in subjects])
    train, held_out = train.flatten(1), held_out.flatten(1)
    slices = (slices + 1) // 3
    early, late, all_train, all_held = (
        code_cells(o, 9) for o in (slices[~aside], slices[aside], slices, slices[:8])
    )
    strengths = []
    for level, name in enumerate(('histogram', 'place', 'place_slice'), 1):
        price = lambda s: slow_floor(
            train[~aside], early[:level], train[aside], late[:level], 6, [*strengths, s]
        ).mean()
        strengths.append(min((2.0**o for o in range(-3, 11)), key=price))
        want = slow_floor(train, all_train[:level], held_out, all_held[:level], 6, strengths)
        torch.testing.assert_close(found[name], want.mean(1).float())


def test_floors_find_what_is_there():
    gen = torch.Generator().manual_seed(0)
    slices = torch.arange(8).repeat(30)
    subjects = [f's{i//8}' for i in range(240)]
    rule = torch.randint(16, (8, 4, 4), generator=gen)
    fixed = rule[slices]  # place and slice decide the code
    found = code_baselines(fixed, slices, subjects, fixed[:16], slices[:16], 16)
    assert found['place_slice'].mean() < 0.1 and found['place'].mean() > 1
    noise = torch.randint(16, (240, 4, 4), generator=gen)
    found = code_baselines(
        noise,
        slices,
        subjects,
        torch.randint(16, (400, 4, 4), generator=gen),
        slices.repeat(2)[:400],
        16,
    )
    # nothing to find: not much is lost by looking
    assert all(3.99 < o.mean() < 4.05 for o in found.values())


def test_prices_of_a_run(straight, dataset):
    model = CodeSampler.load(straight, 'cpu', 'no')
    found = code_costs(model, dataset)
    held_out = dataset.subset('test')
    codes = cache_codes(model.autoencoder, held_out, progress=False)
    assert list(found) == ['prior', 'uniform', 'histogram', 'place', 'place_slice'] and all(
        o.shape == (5,) for o in found.values()
    )
    assert torch.equal(found['prior'], code_bits(model.prior, codes, held_out.conditions))
    with pytest.raises(ValueError, match="no row of split 'nobody'"):
        code_costs(model, dataset, 'nobody')


# ------------------------------------------------------------------ training


def weights(run):
    return load_weights(run / 'prior.safetensors')[0]


def same(a, b):
    for one, two in (
        (weights(a), weights(b)),
        (Checkpoint(a / 'state' / 'prior').load()[0], Checkpoint(b / 'state' / 'prior').load()[0]),
    ):
        assert set(one) == set(two) and all(torch.equal(one[k], two[k]) for k in one)
    assert load_weights(a / 'prior.safetensors')[1] == load_weights(b / 'prior.safetensors')[1]
    assert [o for o in read_log(a / 'log.jsonl') if o['stage'] == 'prior'] == [
        o for o in read_log(b / 'log.jsonl') if o['stage'] == 'prior'
    ]


def strike(monkeypatch, at, what):
    "Let training meet an accident after `at` maps, once."
    loss, left = module.prior_loss, [1]

    def struck(model, batch, generator, seen, *args, **kwargs):
        if seen == at and left:
            left.pop()
            if what == 'crash':
                raise Crash
            signal.raise_signal(signal.SIGINT)
        return loss(model, batch, generator, seen, *args, **kwargs)

    monkeypatch.setattr(module, 'prior_loss', struck)


@pytest.mark.parametrize('what,at', [('ctrl-c', 36), ('crash', 36), ('ctrl-c', 4), ('crash', 76)])
def test_resumed_is_the_same_as_never_stopped(
    what, at, dataset, vq, straight, tmp_path, monkeypatch
):
    run = tmp_path / 'run'
    shutil.copytree(vq, run)
    strike(monkeypatch, at, what)
    with pytest.raises(Crash if what == 'crash' else KeyboardInterrupt):
        train_prior(dataset, run, PRIOR, progress=False)
    train_prior(dataset, run, PRIOR, resume=True, progress=False)
    same(straight, run)


def test_stopped_before_the_first_look_leaves_a_usable_file(dataset, vq, tmp_path, monkeypatch):
    run = tmp_path / 'run'
    shutil.copytree(vq, run)
    strike(monkeypatch, 4, 'ctrl-c')
    with pytest.raises(KeyboardInterrupt):
        train_prior(dataset, run, PRIOR, progress=False)
    assert load_prior(run)[1]['val_bits'] is None and load_prior(run)[1]['images'] == 8


def test_best_weights_are_kept_and_told(dataset, vq, tmp_path, monkeypatch):
    run, scores = tmp_path / 'run', iter([5.0, 3.0, 4.0, 6.0])
    shutil.copytree(vq, run)
    seen = {}

    def scripted(prior, *args):
        bits = next(scores)
        seen[bits] = {k: v.clone() for k, v in prior.state_dict().items()}
        return torch.tensor([bits])

    monkeypatch.setattr(module, 'code_bits', scripted)
    net = train_prior(dataset, run, replace(PRIOR, validate_every=20), progress=False)
    info = load_prior(run)[1]
    assert (info['images'], info['val_bits'], info['images_trained']) == (40, 3.0, 80)
    assert all(torch.equal(v, seen[3.0][k]) for k, v in net.state_dict().items())
    looks = [o for o in read_log(run / 'log.jsonl') if o['stage'] == 'prior' and 'val_bits' in o]
    assert [(o['images'], o['val_bits'], o['best_images']) for o in looks] == [
        (24, 5.0, 24),
        (40, 3.0, 40),
        (64, 4.0, 40),
        (80, 6.0, 40),
    ]


@pytest.mark.parametrize('what', ['ctrl-c', 'crash'])
def test_a_resumed_training_remembers_its_best(what, dataset, vq, tmp_path, monkeypatch):
    run, scores, best = tmp_path / 'run', iter([3.0, 5.0]), []
    shutil.copytree(vq, run)

    def scripted(prior, *args):
        best.append({k: v.clone() for k, v in prior.state_dict().items()})
        return torch.tensor([next(scores)])

    # looked at after 40 and 80 maps, saved after 48
    monkeypatch.setattr(module, 'code_bits', scripted)
    strike(monkeypatch, 60, what)
    with pytest.raises((Crash, KeyboardInterrupt)):
        train_prior(dataset, run, PRIOR, progress=False)
    net = train_prior(dataset, run, PRIOR, resume=True, progress=False)
    assert (load_prior(run)[1]['images'], load_prior(run)[1]['val_bits']) == (40, 3.0)
    assert all(torch.equal(v, best[0][k]) for k, v in net.state_dict().items())


def test_finished_run_is_left_alone(dataset, straight, monkeypatch):
    before = {o: o.stat().st_mtime_ns for o in straight.rglob('*')}
    monkeypatch.setattr(module, 'run_stage', lambda *a, **k: pytest.fail('trained again'))
    net = train_prior(dataset, straight, PRIOR, resume=True)
    assert {o: o.stat().st_mtime_ns for o in straight.rglob('*')} == before
    assert (
        all(torch.equal(v, weights(straight)[k]) for k, v in net.state_dict().items())
        and not net.training
    )


def test_what_a_run_says(straight, dataset):
    record = [o for o in read_log(straight / 'log.jsonl') if o['stage'] == 'prior']
    assert all({'loss', 'bits', 'learning_rate'} <= set(o) or 'val_bits' in o for o in record)
    assert read_config(straight)['prior']['config']['embed_dim'] == 16
    assert len(list((straight / 'samples').glob('prior_*.png'))) == 2
    net, info = load_prior(straight)
    book = load_autoencoder(straight)[0].quantizer.codebook
    torch.testing.assert_close(
        net.vectors, torch.cat([(book - book.mean(0)) / book.std(0), torch.zeros(1, 3)])
    )
    held_out = dataset.subset('validate')
    precision = pick_precision('auto', torch.device('cpu'))
    codes = cache_codes(load_autoencoder(straight)[0], held_out, precision, progress=False)
    assert codes.shape == (5, 4, 4) and codes.dtype == torch.int64
    assert (
        abs(code_bits(net, codes, held_out.conditions, precision).mean().item() - info['val_bits'])
        < 1e-6
    )


@pytest.mark.parametrize(
    'change',
    [
        dict(precision='bf16'),
        dict(precision='no', accumulate=2),
        dict(covariates=()),
        dict(covariates=('slice',), dropout=0.0),
    ],
)
def test_other_settings(change, dataset, vq, tmp_path):
    run = tmp_path / 'run'
    shutil.copytree(vq, run)
    net = train_prior(
        dataset, run, replace(PRIOR, total_images=16, validate_every=16, **change), progress=False
    )
    model = CodeSampler.load(run, 'cpu', precision=change.get('precision', 'no'))
    requested = {'slice': 2} if 'covariates' not in change or change['covariates'] else {}
    images = model.sample(2, **requested)
    assert (
        images.shape == (2, 1, 32, 32) and images.isfinite().all() and images.dtype == torch.float32
    )
    assert [c.name for c in net.covariates] == [c.name for c in model.covariates]


def test_codes_of_fsq(dataset, tmp_path):
    config = replace(AE, kind='fsq', fsq_levels=(4, 3), latent_channels=2)
    train_autoencoder(dataset, tmp_path / 'run', config, progress=False)
    net = train_prior(
        dataset,
        tmp_path / 'run',
        replace(PRIOR, total_images=16, validate_every=16),
        progress=False,
    )
    assert net.num_embeddings == 12
    assert CodeSampler.load(tmp_path / 'run', 'cpu', 'no').sample(2).shape == (2, 1, 32, 32)


def test_prices_in_the_words_of_the_run(dataset, straight):
    """Of subjects who are all healthy, NC is the first and only value; the prior calls it the
    second."""
    model, rows = (
        CodeSampler.load(straight, 'cpu', 'no'),
        dataset.manifest[dataset.manifest.diagnosis == 'NC'],
    )
    parts = (
        SliceDataset(dataset.images[rows.index], rows.reset_index(drop=True), o)
        for o in (dataset.covariates, None)
    )
    a, b = (code_costs(model, o, 'train')['prior'] for o in parts)
    assert torch.equal(a, b)


def test_floors_need_somebody_to_set_aside():
    maps, slices = torch.zeros(3, 2, 2, dtype=torch.int64), torch.arange(3)
    with pytest.raises(ValueError, match='code_baselines: 1 train subject'):
        code_baselines(maps, slices, ['a'] * 3, maps, slices, 4)
    assert all(
        o.isfinite().all()
        for o in code_baselines(maps, slices, ['a', 'a', 'b'], maps, slices, 4).values()
    )


def test_presets_and_settings():
    for config in PRIOR_PRESETS.values():
        check_config(config)
    for change in (
        dict(dropout=1.0),
        dict(dropout=-0.1),
        dict(label_smoothing=1.0),
        dict(replace_codes=2.0),
        dict(embed_dim=0),
        dict(num_layers=0),
    ):
        with pytest.raises(ValueError, match=f'check_config: {next(iter(change))}='):
            check_config(replace(PRIOR, **change))


# ------------------------------------------------------------------ refusals


def test_refusals_of_training(dataset, vq, straight, tmp_path):
    kl = tmp_path / 'kl'
    train_autoencoder(dataset, kl, replace(AE, kind='kl', total_images=4), progress=False)
    with pytest.raises(ValueError, match='AutoencoderKL, whose latents are no codes.*--kind vq'):
        train_prior(dataset, kl, PRIOR)
    with pytest.raises(TypeError, match='whose latents are no codes'):
        cache_codes(load_autoencoder(kl)[0], dataset)
    with pytest.raises(ValueError, match='not what the autoencoder was trained on'):
        train_prior(make_dataset(1), vq, PRIOR)
    with pytest.raises(FileExistsError, match='already has a trained'):
        train_prior(dataset, straight, PRIOR)
    with pytest.raises(ValueError, match='embed_dim=32, was 16'):
        train_prior(dataset, straight, replace(PRIOR, embed_dim=32), resume=True)
    with pytest.raises(FileNotFoundError):
        train_prior(dataset, tmp_path / 'nothing', PRIOR)
    for change in (dict(embed_dim=18, num_heads=4), dict(dropout=1.0), dict(num_heads=0)):
        with pytest.raises(ValueError, match=next(iter(change))):
            train_prior(dataset, vq, replace(PRIOR, **change))
    shutil.copytree(vq, tmp_path / 'half')
    settings = read_config(vq)
    settings['autoencoder']['config']['total_images'] = 1_000
    (tmp_path / 'half' / 'config.json').write_text(json.dumps(settings))
    with pytest.raises(ValueError, match='has seen 40 of 1,000'):
        train_prior(dataset, tmp_path / 'half', PRIOR)
    for run in (vq, kl):
        assert 'prior' not in read_config(run)  # nothing was begun


def test_refusals_of_files(straight, vq, tmp_path):
    with pytest.raises(FileNotFoundError, match='no file prior.safetensors'):
        load_prior(vq)
    run = tmp_path / 'run'
    shutil.copytree(straight, run)
    shutil.copy(run / 'autoencoder.safetensors', run / 'prior.safetensors')
    with pytest.raises(ValueError, match="of kind 'vq'"):
        load_prior(run)
    net, autoencoder = awake(13), load_autoencoder(vq)[0]
    with pytest.raises(
        ValueError, match='a prior of 13 codes, 4 x 4 places, and an autoencoder of 12 codes'
    ):
        CodeSampler(autoencoder, 32, net)
    with pytest.raises(ValueError, match='on 8 x 8'):
        CodeSampler(autoencoder, 64, awake())


ODD_NUMBERS = [
    (dict(temperature=0), ValueError, 'temperature=0'),
    (dict(temperature=math.nan), ValueError, 'temperature=nan'),
    (dict(temperature='hot'), TypeError, "'hot'"),
    (dict(temperature=math.inf), ValueError, 'inf'),
    (dict(top_k=0), ValueError, 'top_k=0'),
    (dict(top_k=2.5), TypeError, 'top_k=2.5'),
    (dict(top_k=True), TypeError, 'True'),
    (dict(top_p=0), ValueError, 'top_p=0'),
    (dict(top_p=1.5), ValueError, 'top_p=1.5'),
    (dict(top_p=None), TypeError, 'None'),
    (dict(guidance_scale=-1), ValueError, 'guidance_scale=-1'),
    (dict(guidance_scale=math.nan), ValueError, 'nan'),
    (dict(guidance_scale=None), TypeError, 'None'),
]


@pytest.mark.parametrize('options,error,words', ODD_NUMBERS)
def test_odd_numbers(options, error, words):
    with pytest.raises(error, match=words):
        awake().generate(torch.rand(2, 16), **options)


ODD_REQUESTS = [
    (dict(n=0), ValueError, 'n=0'),
    (dict(seed=-1), ValueError, 'seed=-1'),
    (dict(batch_size=0), ValueError, 'batch_size=0'),
    (dict(n=1.5), TypeError, 'n=1.5'),
    (dict(guidance_scale=-1), ValueError, 'guidance_scale=-1'),
    (dict(slice=9), ValueError, 'slice=9'),
    (dict(diagnosis='XX'), ValueError, 'XX'),
    (dict(age=70), ValueError, 'age'),
    (dict(n=2, slice=[1, 2, 3]), ValueError, '3 values of slice'),
    (dict(temperature=0), ValueError, 'temperature=0'),
    (dict(prompt=torch.zeros(1, 4, 4, dtype=torch.int64)), ValueError, 'fewer than 4 rows'),
    (
        dict(n=2, prompt=torch.zeros(1, 2, 4, dtype=torch.int64)),
        ValueError,
        r'Expected \(2, rows, 4\)',
    ),
    (dict(prompt=torch.zeros(1, 2, 5, dtype=torch.int64)), ValueError, 'prompt of shape'),
    (dict(prompt=torch.zeros(1, 2, 4)), TypeError, 'float32'),
    (dict(prompt=torch.full((1, 2, 4), 12)), ValueError, 'codes from 12 to 12'),
    (dict(prompt=torch.full((1, 2, 4), -1)), ValueError, 'codes from -1'),
]


@pytest.mark.parametrize('options,error,words', ODD_REQUESTS)
def test_odd_requests(options, error, words, straight):
    with pytest.raises(error, match=words):
        CodeSampler.load(straight, 'cpu', 'no').sample(**options)


def test_odd_codes():
    net = awake()
    for codes, error, words in (
        (torch.zeros(2, 16, dtype=torch.int64), ValueError, 'm less than 16'),
        (torch.zeros(2, 3, 3, dtype=torch.int64), ValueError, r'\(2, 3, 3\)'),
        (torch.zeros(2, 5), TypeError, 'float32'),
        (torch.zeros(2, 5, dtype=torch.int32), TypeError, 'int32'),
    ):
        with pytest.raises(error, match=words):
            net(codes)
    with pytest.raises(ValueError, match=r'Expected \(b, 16\)'):
        net.generate(torch.rand(2, 15))
    codes = random_codes()[:, :5]
    with pytest.raises(ValueError, match='start=7 without a cache'):
        net(codes, start=7)
    with pytest.raises(ValueError, match='start=6 with a cache. Expected 0, or with a cache 7'):
        net(codes, start=6, cache=net.new_cache(3))


# ------------------------------------------------------------------ sampling


def test_a_picture_depends_on_seed_and_number_alone(straight):
    model = CodeSampler.load(straight, 'cpu', 'no')
    requested = dict(slice=[0, 1, 2, 3, 4], diagnosis=['AD', 'NC', None, 'AD', 'NC'])
    together, apart = (model.sample(5, **requested, seed=3, batch_size=o) for o in (5, 2))
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=0)
    assert torch.equal(together, model.sample(5, **requested, seed=3, batch_size=5))
    assert not torch.equal(together, model.sample(5, **requested, seed=4, batch_size=5))
    assert together.min() >= -1 and together.max() <= 1


def test_a_begun_brain_is_completed(straight, dataset):
    model = CodeSampler.load(straight, 'cpu', 'no')
    images = dataset.subset('test').__getitems__([0, 1])['image']
    codes = model.codes(images)
    torch.testing.assert_close(model.decode_codes(codes), model.reconstruct(images))
    u = sample_uniform(2, 16, 0)
    made = model.prior.generate(u, prompt=codes[:, :2])
    assert torch.equal(made[:, :2], codes[:, :2]) and not torch.equal(made[:, 2:], codes[:, 2:])
    torch.testing.assert_close(
        model.sample(2, prompt=codes[:, :2], batch_size=1),
        model.decode_codes(made),
        atol=1e-5,
        rtol=0,
    )


def test_a_conditional_autoencoder_must_be_told(dataset, tmp_path):
    train_autoencoder(dataset, tmp_path / 'run', replace(AE, covariates=('slice',)), progress=False)
    train_prior(
        dataset,
        tmp_path / 'run',
        replace(PRIOR, total_images=16, validate_every=16, covariates=('diagnosis',)),
        progress=False,
    )
    model = CodeSampler.load(tmp_path / 'run', 'cpu', 'no')
    assert [c.name for c in model.covariates] == ['diagnosis', 'slice']
    with pytest.raises(ValueError, match='no value of slice'):
        model.sample(2)
    assert model.sample(2, slice=3, diagnosis='AD').shape == (2, 1, 32, 32)
