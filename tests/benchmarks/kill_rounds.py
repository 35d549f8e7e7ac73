"""kill -9 at random moments of every training, also inside the writing of a file; then resume, and
compare all bits.

Each round forks a process that trains a small network, kills it, and lets fresh processes
resume until one reaches the end: one in three of those is killed as well. Half of the kills
come from outside at a random time; the others strike inside a write: with a part of the bytes
in the temporary file, before or after its new name, or in the middle of a line of the log. What
a round leaves must equal, bit for bit, what a run left that nobody disturbed: weights, states,
log, images, and no half-written file."""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from brainldm.engineering import stage1, stage2
from brainldm.advanced import prior
from brainldm.engineering import runs
from brainldm import training
from brainldm.advanced import volume
from brainldm.engineering.runs import Checkpoint, load_weights, read_log
from test_training import AE, LDM, make_dataset

VQ = replace(
    AE,
    kind='vq',
    num_embeddings=12,
    adversarial=True,
    adversarial_start=40,
    discriminator_warmup=16,
    discriminator_channels=(8, 16),
)
PRIOR = prior.PriorConfig(
    total_images=80,
    batch_size=4,
    log_every=2,
    warmup_images=16,
    validate_every=40,
    checkpoint_every=24,
    embed_dim=16,
    num_layers=2,
    num_heads=2,
    ema_images=20,
)
VOLUME = volume.VolumeConfig(
    total_images=80,
    batch_size=4,
    log_every=2,
    warmup_images=16,
    validate_every=40,
    checkpoint_every=24,
    ema_images=20,
    preview_steps=1,
)
JOBS = {
    'autoencoder': ('autoencoder', training.train_autoencoder, AE, None),
    'codes and discriminator': ('autoencoder', training.train_autoencoder, VQ, None),
    'ldm': ('ldm', training.train_ldm, LDM, 'autoencoder'),
    'prior': ('prior', prior.train_prior, PRIOR, 'codes and discriminator'),
    # name -> stage, training, settings, the job before it in its run folder
    'volume': ('volume', volume.train_volume, VOLUME, 'ldm'),
}


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def arm(strike, rng, count):
    """Let this process die inside the `strike`-th write (None: never); `count` is told of every
    write."""
    left = [strike]

    def struck(kind, die):
        if count:
            count(kind)
        if left[0] is None:
            return
        left[0] -= 1
        if left[0] < 0:
            die()
            kill()

    fsync, move, note = os.fsync, os.replace, runs.JsonLog.write

    def half_file(number):
        struck('file', lambda: os.ftruncate(number, int(rng.random() * os.fstat(number).st_size)))
        fsync(number)

    def half_name(a, b):
        struck('before its name', lambda: None)
        move(a, b)
        struck('after its name', lambda: None)

    def half_line(log, seen, record):
        def die():
            with log.path.open('a') as f:
                f.write(
                    json.dumps(dict(stage=log.stage, images=seen, **record))[: rng.randrange(1, 60)]
                )

        struck('line', die)
        note(log, seen, record)

    os.fsync, os.replace, runs.JsonLog.write = half_file, half_name, half_line


def train(job, run, dataset, resume, strike=None, seed=0, count=None):
    "A new process that trains; its number."
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        # sampling takes most of the time
        for o in (stage1, stage2, prior, volume):
            o.show_grid = lambda *args, **kwargs: plt.figure(figsize=(1, 1))
        arm(strike, random.Random(seed), count)
        _, function, config, _ = JOBS[job]
        function(dataset, run, config, resume=resume, progress=False)
        status = 0
    except BaseException as e:
        print(f'{job}: {type(e).__name__}: {e}', file=sys.stderr, flush=True)
    finally:
        os._exit(status)


def wait(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def left_behind(run, stage):
    """Everything that a stage leaves, to compare.

    A third, older state may lie there, if a kill struck before it was forgotten."""
    parts = {f'weights {k}': v for k, v in load_weights(run / f'{stage}.safetensors')[0].items()}
    for path in Checkpoint(run / 'state' / stage).files()[-2:]:
        parts |= {f'state {path.stem} {k}': v for k, v in load_weights(path)[0].items()}
    log = {
        f"log {o['images']} {'val' if any(k.startswith('val_') for k in o) else 'train'}": o
        for o in read_log(run / 'log.jsonl')
        if o['stage'] == stage
    }
    return (
        parts | log | {
            f'image {o.name}': o.read_bytes() for o in (run / 'samples').glob(f'{stage}*')
        }
    )


def differences(a, b):
    "Names of what is not equal, bit for bit."
    same = lambda x, y: torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
    return sorted({*a} ^ {*b}) + [k for k in a if k in b and not same(a[k], b[k])]


def prepare(job, home, dataset):
    """The folder in which a job starts, what the undisturbed job left, its seconds and its number
    of writes."""
    stage, _, _, before = JOBS[job]
    start = home / f'{job}: start'
    whole = home / f'{job}: whole'
    if before:
        shutil.copytree(home / f'{before}: whole', start)
        shutil.copytree(start, whole)
    tally, begun = home / f'{job}: writes', time.time()

    def count(kind):
        with tally.open('a') as f:
            f.write(kind + '\n')

    if status := wait(train(job, whole, dataset, False, count=count)):
        raise RuntimeError(f'kill_rounds: the undisturbed {job} ended with status {status}.')
    return (
        stage,
        start,
        left_behind(whole, stage),
        time.time() - begun,
        len(tally.read_text().splitlines()),
    )


def one_round(job, prepared, home, dataset, rng):
    "Kill, resume, perhaps kill again, ...; what happened."
    stage, start, want, seconds, writes = prepared
    run, kills, resumed = home / 'round', [], 0
    while True:
        if not kills:  # the first, or one that was faster than its killer
            shutil.rmtree(run, ignore_errors=True)
            if start.exists():
                shutil.copytree(start, run)
        deadly = not kills or (len(kills) < 4 and rng.random() < 1 / 3)
        inside = deadly and rng.random() < 0.5
        child = train(
            job,
            run,
            dataset,
            bool(kills),
            rng.randrange(writes) if inside else None,
            rng.randrange(2**30),
        )
        if deadly and not inside:
            time.sleep(rng.random() * seconds)
            os.kill(child, signal.SIGKILL)
        status = wait(child)
        resumed += bool(kills)
        if status == -signal.SIGKILL:
            kills.append('inside a write' if inside else 'from outside')
        elif status:
            found = f'failed with status {status}'
            break
        elif kills:
            found = (
                f'different: {differ[:3]}'
                if (differ := differences(left_behind(run, stage), want))
                else 'identical'
            )
            break
    halves = [str(o.relative_to(run)) for o in run.rglob('*.part')]
    if found == 'identical' and halves:
        found = f'left {halves}'
    shutil.rmtree(run)
    return kills, resumed, found


def main(rounds=200, seed=0, jobs=tuple(JOBS), out=Path('runs/benchmarks'), progress=True):
    "Play the rounds, job after job in turn; the summary."
    matplotlib.use('Agg')
    torch.set_num_threads(1)  # one thread: a fork takes no other along
    dataset, rng, begun = make_dataset(), random.Random(seed), time.time()
    with tempfile.TemporaryDirectory() as folder:
        home, found, kills, resumes = Path(folder), Counter(), Counter(), 0
        needed = set(jobs)
        for o in reversed(JOBS):
            needed |= {JOBS[o][3]} if o in needed and JOBS[o][3] else set()
        prepared = {o: prepare(o, home, dataset) for o in JOBS if o in needed}
        for n in range(rounds):
            job = jobs[n % len(jobs)]
            struck, resumed, end = one_round(job, prepared[job], home, dataset, rng)
            found[end] += 1
            kills.update(struck)
            resumes += resumed
            if progress:
                print(
                    f'{n+1:4} {job:17} killed {len(struck)} x {", ".join(struck):60} {end}',
                    flush=True,
                )
    summary = dict(
        rounds=rounds,
        kills=dict(kills),
        resumes=resumes,
        ends=dict(found),
        jobs=list(jobs),
        seed=seed,
        torch=torch.__version__,
        seconds=round(time.time() - begun),
    )
    if out:
        out.mkdir(parents=True, exist_ok=True)
        (out / 'kill_rounds.json').write_text(json.dumps(summary, indent=1))
    return summary


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=200, help='how many runs to disturb')
    parser.add_argument('--seed', type=int, default=0, help='of the moments')
    parser.add_argument(
        '--jobs', nargs='+', default=list(JOBS), choices=list(JOBS), help='which trainings'
    )
    parser.add_argument(
        '--out', type=Path, default=Path('runs/benchmarks'), help='where kill_rounds.json goes'
    )
    args = parser.parse_args()
    summary = main(args.rounds, args.seed, tuple(args.jobs), args.out)
    print(json.dumps(summary, indent=1))
    sys.exit(summary['ends'] != {'identical': args.rounds})
