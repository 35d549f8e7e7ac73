"""What a sampler costs beside the bare network, and images a second beside diffusers.

python tests/benchmarks/sampling.py                      # the laptop preset's networks, batches
of 8 and 32, 30 steps python tests/benchmarks/sampling.py --preset gpu --batch-sizes 64

Fresh weights: no time depends on what they learned. Decoding is timed apart and left out of the
ratios."""

from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import pandas as pd
import torch
import tyro
from peers import COVARIATES, Side, diffusers_unet, latents, our_autoencoder, our_unet
from timing import (
    DTYPES,
    Job,
    autocast,
    count,
    device_and_precision,
    draw_ratios,
    interleave,
    machine,
    publish,
    quartiles,
    ratio,
)

from brainldm.engineering.configs import PRESETS
from brainldm.scheduler import NoiseSchedule, denoise
from brainldm.advanced.solvers import SOLVERS
from brainldm.engineering.loop import infer
from brainldm.sampling import BrainLDM, conditional_denoiser

TARGET = '<= 1.05'


@dataclass
class Sampling(Job):
    "Samplers against the bare network and against diffusers."

    preset: Literal['tiny', 'laptop', 'gpu'] = 'laptop'  # Whose networks
    batch_sizes: tuple[int, ...] = (8, 32)  # Images at a time
    steps: int = 30  # Network calls


def bare(side: Side, batch: dict, steps: int, device, precision):
    "The network alone, as often as the sampler asks it; weights are cast once for all calls."
    with torch.inference_mode(), autocast(device, precision):
        for _ in range(steps):
            side.answer(side.net, batch)


def diffusers_loop(side: Side, batch: dict, steps: int, device, precision):
    "What a diffusers pipeline does between noise and decoder."
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        1000,
        beta_schedule='squaredcos_cap_v2',
        clip_sample=False,
        prediction_type='v_prediction',
        timestep_spacing='trailing',
        rescale_betas_zero_snr=True,
    )
    scheduler.set_timesteps(steps, device=device)
    x = batch['latent']
    with torch.no_grad(), autocast(device, precision):
        for t in scheduler.timesteps:
            answer = side.answer(side.net, dict(batch, latent=x, t=t))
            x = scheduler.step(answer.to(x.dtype), t, x).prev_sample


def our_loop(model: BrainLDM, cond: dict, batch: dict, sampler: str, steps: int):
    "From noise to latents, as `BrainLDM.sample` does it."
    options = dict(steps=steps, sampler=sampler)
    return denoise(
        conditional_denoiser(model, cond, options),
        batch['latent'],
        model.schedule,
        steps,
        SOLVERS[sampler],
        generator=torch.Generator().manual_seed(0),
    )


def whole(model: BrainLDM, n: int, sampler: str, steps: int):
    "Everything that a user's call does, decoding included."
    return model.sample(n, diagnosis='AD', slice=16, steps=steps, sampler=sampler, batch_size=n)


def make_model(preset, device, precision):
    """A BrainLDM with fresh weights; diffusers' UNet of equal size, in float32 for autocast and in
    the precision itself."""
    size, ours = PRESETS[preset][0].data.size, our_unet(preset)
    autoencoder = our_autoencoder(preset, size, device).net.to(device).eval()
    z = torch.zeros(1, autoencoder.latent_channels, 1, 1, device=device)
    model = BrainLDM(
        autoencoder, size, ours.net.to(device).eval(), NoiseSchedule(), z, z + 1, precision
    )
    theirs = diffusers_unet(preset, count(ours.net))
    low = replace(theirs, net=deepcopy(theirs.net).to(device, DTYPES[precision]).eval())
    theirs.net.to(device).eval()
    return model, ours, theirs, low


def compare(model, ours, theirs, low, n, job, device, precision):
    "All contestants at one batch size: rows of the table."
    batch = latents(n, job.preset, device)
    cond = {c.name: batch[c.name] for c in COVARIATES}
    low_batch = {
        k: v.to(DTYPES[precision]) if v.is_floating_point() else v for k, v in batch.items()
    }
    contestants = {
        'network': partial(bare, ours, batch, job.steps, device, precision),
        **{f'denoise, {o}': partial(our_loop, model, cond, batch, o, job.steps) for o in SOLVERS},
        **{f'sample, {o}': partial(whole, model, n, o, job.steps) for o in SOLVERS},
        'decode': partial(model.decode_standard, batch['latent']),
        'call by call': lambda: [
            infer(ours.net, precision)(batch['latent'], batch['t'], cond) for _ in range(job.steps)
        ],
        'diffusers, autocast': partial(diffusers_loop, theirs, batch, job.steps, device, precision),
        'diffusers, own precision': partial(
            diffusers_loop, low, low_batch, job.steps, device, 'no'
        ),
    }
    t = interleave(contestants, job, device)

    def row(what, over, under, target=''):
        return dict(
            what=f'{what}, batch {n}',
            **ratio(over, under, target),
            seconds=over.median(),
            other=under.median(),
        )

    rows = [row(f'{o}, loop / network', t[f'denoise, {o}'], t.network, TARGET) for o in SOLVERS]
    rows += [
        row(
            f'{o}, sample() less decoding / network',
            t[f'sample, {o}'] - t.decode,
            t.network,
            TARGET,
        )
        for o in SOLVERS
    ]
    rows += [
        row('network, call by call / at once', t['call by call'], t.network),
        row('decoding / network', t.decode, t.network),
    ]
    rows += [
        row(f'images a second / {o}', t[o], t['denoise, ddim'], '>= 1.0')
        for o in ('diffusers, autocast', 'diffusers, own precision')
    ]
    return rows, {k: quartiles(v) for k, v in t.items()}


def main(job: Sampling):
    device, precision = device_and_precision(job)
    model, ours, theirs, low = make_model(job.preset, device, precision)
    rows, seconds = [], {}
    for n in job.batch_sizes:
        more, seconds[n] = compare(model, ours, theirs, low, n, job, device, precision)
        rows += more
    where = dict(
        machine(job, device, precision),
        preset=job.preset,
        steps=job.steps,
        parameters={
            'brainldm': count(ours.net),
            'diffusers': count(theirs.net),
            'brainldm autoencoder': count(model.autoencoder),
        },
    )
    return publish(
        'sampling',
        pd.DataFrame(rows),
        job,
        where,
        draw_ratios(
            'Sampling beside the bare network and beside diffusers', 'ratio, median and quartiles'
        ),
        seconds=seconds,
    )


if __name__ == '__main__':
    main(tyro.cli(Sampling))
