"""Our networks beside those of MONAI and diffusers at equal size: training and inference, memory,
fraction of the machine's peak.

python tests/benchmarks/networks.py                      # the laptop preset, 128 x 128, float32
and bf16 python tests/benchmarks/networks.py --preset gpu --size 256 --batch-size 32
--unet-batch-size 128

A training step is forward, error, backward and AdamW. Every network gets the same batch; peers
of the UNet get ready condition tokens."""

import multiprocessing
import resource
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Literal

import pandas as pd
import psutil
import torch
import tyro
from peers import Side, autoencoders, latents, images, unets, vqvaes
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
    ratio,
    seconds,
)
from torch.optim import AdamW
from torch.utils.flop_counter import FlopCounterMode

TARGETS = dict(autoencoder='>= 2.5', codes='>= 2.5', unet='>= 1.3')


@dataclass
class Networks(Job):
    "Ours against MONAI's and diffusers'."

    preset: Literal['tiny', 'laptop', 'gpu'] = 'laptop'  # Whose sizes
    size: int = 128  # Side of the images
    batch_size: int = 8  # Images a step
    unet_batch_size: int = 8  # Latents a step
    # Which networks
    kinds: tuple[Literal['autoencoder', 'codes', 'unet'], ...] = ('autoencoder', 'codes', 'unet')
    # float32, and mixed precision
    precisions: tuple[Literal['no', 'bf16'], ...] = ('no', 'bf16')
    memory: bool = True  # Measure the peak of memory, each in a process of its own


def sides(kind: str, job: Networks, device) -> tuple[dict[str, Side], dict]:
    "The networks of one kind, ours first, and their batch."
    if kind == 'unet':
        return unets(job.preset), latents(job.unet_batch_size, job.preset, device, job.size)
    made = (
        vqvaes(job.preset, device)
        if kind == 'codes'
        else autoencoders(job.preset, job.size, device)
    )
    return made, images(job.batch_size, job.size, device)


def trainer(side: Side, batch: dict, device, precision: str) -> Callable:
    "A function that does one training step."
    net = side.net.to(device).train()
    optimizer = AdamW(net.parameters(), 1e-5, fused=device.type in ('cpu', 'cuda'))

    def step():
        with autocast(device, precision):
            loss = side.loss(net, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def answerer(side: Side, batch: dict, device, precision: str) -> Callable:
    "A function that asks the network once, without gradient."
    net = side.net.to(device).eval()

    def answer():
        with torch.inference_mode(), autocast(device, precision):
            side.answer(net, batch)

    return answer


def flops(call: Callable) -> int:
    "Multiplications and additions of matrices and convolutions in one call, two for each pair."
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def matrix_peak(device, precision: str, clock: str, tries: int = 5) -> float:
    """The fastest product of two square matrices, in operations a second: what this machine can do
    here and now."""
    n = 2048 if device.type == 'cpu' else 8192
    a, b = (torch.randn(n, n, device=device, dtype=DTYPES[precision]) for _ in range(2))
    a @ b
    return 2 * n**3 / min(seconds(lambda: a @ b, clock, device) for _ in range(tries))


def memory_of(kind: str, name: str, job: Networks, precision: str) -> float:
    """MB that two training steps need beyond the loaded program and its weights; run it in a fresh
    process."""
    device, _ = device_and_precision(job)
    made, batch = sides(kind, job, device)
    step = trainer(made[name], batch, device, precision)
    del made
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = psutil.Process().memory_info().rss
    step()
    step()
    if device.type == 'cuda':
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    unit = 1 if psutil.MACOS else 1024  # of ru_maxrss
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before) / 1e6


def in_fresh_process(call: Callable, *args):
    "The answer of a function that had a whole process to itself."
    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
        return pool.submit(call, *args).result()


def compare(kind: str, precision: str, job: Networks, device):
    "One kind of network in one precision: rows of the table."
    made, batch = sides(kind, job, device)
    peak, rows, n, ours = (
        matrix_peak(device, precision, job.clock),
        [],
        len(next(iter(batch.values()))),
        next(iter(made)),
    )
    for what, make in (('training', trainer), ('inference', answerer)):
        calls = {name: make(side, batch, device, precision) for name, side in made.items()}
        t, work = interleave(calls, job, device), {
            name: flops(call) for name, call in calls.items()
        }
        for name, side in made.items():
            target = TARGETS[kind] if what == 'training' else ''
            faster = ratio(t[name], t[ours], target) if name != ours else {}
            rows.append(
                dict(
                    what=f'{kind} {what} {DTYPES[precision]}'.replace('torch.', '')
                    + (f': brainldm / {name}' if name != ours else ': brainldm'),
                    **faster,
                    images_a_second=n / t[name].median(),
                    parameters=count(side.net),
                    gflop_an_image=work[name] / n / 1e9,
                    share_of_peak=work[name] / t[name].median() / peak,
                )
            )
            if what == 'training' and job.memory:
                rows[-1]['peak_mb'] = in_fresh_process(memory_of, kind, name, job, precision)
    return rows, peak


def main(job: Networks):
    device, _ = device_and_precision(job)
    rows, peaks = [], {}
    for precision in job.precisions:
        for kind in job.kinds:
            more, peaks[f'{kind} {precision}'] = compare(kind, precision, job, device)
            rows += more
    table = pd.DataFrame(rows)
    columns = ['what', 'ratio', 'q1', 'q3', 'target']
    table = table[columns + [o for o in table if o not in columns]].fillna({'target': ''})
    where = dict(
        machine(job, device, ' and '.join(job.precisions)),
        preset=job.preset,
        size=job.size,
        batch_size=job.batch_size,
        unet_batch_size=job.unet_batch_size,
        matrix_peak_gflops={k: round(v / 1e9, 1) for k, v in peaks.items()},
    )
    return publish(
        'networks',
        table,
        job,
        where,
        draw_ratios('The same work beside MONAI and diffusers', 'our images a second / theirs'),
    )


if __name__ == '__main__':
    main(tyro.cli(Networks))
