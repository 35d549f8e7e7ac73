"Training for maintainers: exact resume after every accident, refusals, files, several processes."

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import fields, replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from brainldm.engineering.configs import (
    AUGMENTED,
    AEConfig,
    DataConfig,
    LDMConfig,
    bare_type,
    check_config,
)
from brainldm.engineering.plotting import plot_history
from brainldm.data import SliceDataset
from brainldm.scheduler import NoiseSchedule
from brainldm.engineering.runs import (
    HARMLESS,
    Checkpoint,
    load_weights,
    open_run,
    read_config,
    read_log,
)
from brainldm.engineering.stage1 import load_autoencoder
from brainldm.engineering.stage2 import load_denoiser
from brainldm.training import train_autoencoder, train_ldm
from brainldm.engineering import runs, stage1, stage2
from brainldm import training

AE = AEConfig(
    total_images=80,
    batch_size=4,
    log_every=2,
    warmup_images=16,
    validate_every=40,
    checkpoint_every=24,
    data=DataConfig(size=32),
    channels=(8, 16),
    latent_channels=2,
    attention_levels=(False, False),
    patch=2,
)
LDM = LDMConfig(
    total_images=80,
    batch_size=4,
    log_every=2,
    warmup_images=16,
    validate_every=40,
    checkpoint_every=24,
    channels=(8, 16),
    num_res_blocks=1,
    attention_levels=(False, True),
    num_heads=2,
    cond_channels=8,
    ema_images=20,
    preview_steps=1,
    dropout=0.1,  # what it samples must be found again on resume
    early_images=32,
)
STAGES = {
    'autoencoder': (train_autoencoder, AE, 'autoencoder_loss'),
    'ldm': (train_ldm, LDM, 'ldm_loss'),
}
# the module in which a training looks for its loss
HOME = {'autoencoder_loss': training, 'ldm_loss': training}


@pytest.fixture(autouse=True)
def quick_figures(monkeypatch):
    "Sampling takes most of the time of a tiny run; `straight` samples."
    for home in (stage1, stage2):
        monkeypatch.setattr(home, 'show_grid', lambda *args, **kwargs: plt.figure(figsize=(1, 1)))


class Crash(BaseException):
    "Stands for a power cut: nothing may be saved on the way out."


def make_dataset(seed=0, size=32):
    gen = np.random.default_rng(seed)
    rows = [
        (f'{s}_{k}.png', -1, f'sub-{s}', k, 'AD' if s % 2 else 'NC', split)
        for s, split in enumerate(['train'] * 4 + ['validate', 'test'])
        for k in range(5)
    ]
    table = pd.DataFrame(rows, columns=['path', 'plane', 'subject', 'slice', 'diagnosis', 'split'])
    table['hash'] = [f'{seed}-{i}' for i in range(len(table))]
    grid = np.linspace(-1, 1, size)
    blobs = np.exp(
        -4
        * (
            (grid[None, :, None] - gen.uniform(-0.5, 0.5, (len(table), 1, 1))) ** 2
            + (grid[None, None] - gen.uniform(-0.5, 0.5, (len(table), 1, 1))) ** 2
        )
    )
    return SliceDataset((255 * blobs).astype(np.uint8), table)


@pytest.fixture(scope='module')
def dataset():
    return make_dataset()


@pytest.fixture(scope='module')
def straight(dataset, tmp_path_factory):
    "Both stages, never stopped."
    run = tmp_path_factory.mktemp('straight') / 'run'
    train_autoencoder(dataset, run, AE, progress=False)
    train_ldm(dataset, run, LDM, progress=False)
    return run


def weights(run, stage):
    return load_weights(Path(run) / f'{stage}.safetensors')[0]


def same(a, b, stage):
    "Everything that a stage leaves behind: weights, resumable state, log and images."
    for one, two in (
        (weights(a, stage), weights(b, stage)),
        (Checkpoint(a / 'state' / stage).load()[0], Checkpoint(b / 'state' / stage).load()[0]),
    ):
        assert set(one) == set(two) and all(torch.equal(one[k], two[k]) for k in one)
    assert [o for o in read_log(a / 'log.jsonl') if o['stage'] == stage] == [
        o for o in read_log(b / 'log.jsonl') if o['stage'] == stage
    ]
    assert {o.name for o in (a / 'samples').glob(f'{stage}*')} == {
        o.name for o in (b / 'samples').glob(f'{stage}*')
    }


def begin(stage, straight, run):
    "A run folder in which `stage` is to be trained."
    if stage == 'ldm':
        run.mkdir()
        for name in ('autoencoder.safetensors', 'log.jsonl'):
            shutil.copy(straight / name, run / name)
        (run / 'config.json').write_text(
            json.dumps({'autoencoder': read_config(straight)['autoencoder']})
        )
        lines = [
            o for o in (run / 'log.jsonl').read_text().splitlines(True) if '"autoencoder"' in o
        ]
        (run / 'log.jsonl').write_text(''.join(lines))


def strike(monkeypatch, name, at, what):
    "Let the loss called `name` meet an accident after `at` images, once."
    loss, left = getattr(HOME[name], name), [1]

    def struck(model, batch, generator, seen, *args, **kwargs):
        if seen == at and left and torch.is_grad_enabled():  # not in validation
            left.pop()
            if what == 'ctrl-c':
                signal.raise_signal(signal.SIGINT)
            elif what == 'sigterm':
                signal.raise_signal(signal.SIGTERM)
            else:
                raise Crash
        return loss(model, batch, generator, seen, *args, **kwargs)

    monkeypatch.setattr(HOME[name], name, struck)


# ------------------------------------------------------------------ stop and resume

ACCIDENTS = [('ctrl-c', 36, 40), ('crash', 36, 24), ('crash', 4, None)]
EDGES = [('ctrl-c', 0, 8), ('ctrl-c', 76, 80), ('sigterm', 44, 48), ('crash', 72, 72)]


@pytest.mark.parametrize(
    'stage,what,at,newest',
    [(s, *o) for s in STAGES for o in ACCIDENTS] + [('autoencoder', *o) for o in EDGES],
)
def test_resumed_is_the_same_as_never_stopped(
    stage, what, at, newest, dataset, straight, tmp_path, monkeypatch
):
    function, config, loss = STAGES[stage]
    run = tmp_path / 'run'
    begin(stage, straight, run)
    strike(monkeypatch, loss, at, what)
    with pytest.raises(Crash if what == 'crash' else KeyboardInterrupt):
        function(dataset, run, config, progress=False)
    states = Checkpoint(run / 'state' / stage).files()
    assert (int(states[-1].stem) if states else None) == newest
    function(dataset, run, config, resume=True, progress=False)
    same(straight, run, stage)


@pytest.mark.parametrize('stage', STAGES)
def test_resume_after_several_accidents(stage, dataset, straight, tmp_path, monkeypatch):
    function, config, loss = STAGES[stage]
    run = tmp_path / 'run'
    begin(stage, straight, run)
    for at, what in ((12, 'crash'), (20, 'ctrl-c'), (52, 'crash'), (64, 'ctrl-c')):
        strike(monkeypatch, loss, at, what)
        with pytest.raises((Crash, KeyboardInterrupt)):
            function(dataset, run, config, resume=True, progress=False)
    function(dataset, run, config, resume=True, progress=False)
    same(straight, run, stage)


@pytest.mark.parametrize(
    'change',
    [
        dict(accumulate=2),
        dict(precision='bf16'),
        dict(kl_period=32, kl_weight=0.1),
        dict(latent_noise=0.2, augment=AUGMENTED),
        dict(covariates=('slice', 'diagnosis')),
    ],
)
def test_resume_with_other_settings(change, dataset, tmp_path, monkeypatch):
    config = replace(AE, **change)
    train_autoencoder(dataset, tmp_path / 'a', config, progress=False)
    strike(monkeypatch, 'autoencoder_loss', 40, 'crash')  # a loss is told where its update began
    with pytest.raises(Crash):
        train_autoencoder(dataset, tmp_path / 'b', config, progress=False)
    train_autoencoder(dataset, tmp_path / 'b', config, resume=True, progress=False)
    same(tmp_path / 'a', tmp_path / 'b', 'autoencoder')


def test_harmless_settings_may_change_on_resume(dataset, straight, tmp_path, monkeypatch):
    strike(monkeypatch, 'autoencoder_loss', 36, 'ctrl-c')
    with pytest.raises(KeyboardInterrupt):
        train_autoencoder(dataset, tmp_path / 'run', AE, progress=False)
    train_autoencoder(
        dataset,
        tmp_path / 'run',
        replace(AE, checkpoint_every=8, validate_every=80, log_every=3),
        resume=True,
        progress=False,
    )
    a, b = weights(straight, 'autoencoder'), weights(tmp_path / 'run', 'autoencoder')
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize('fails', ['export', 'state'])
def test_crash_around_the_last_checkpoint(fails, dataset, straight, tmp_path, monkeypatch):
    """Between writing the file for users and the state, in either order of death, a resumed run
    ends with both."""
    write = runs.write_atomic

    def dies(path, data):
        if (fails == 'state' and path.name == '000000000080.safetensors') or (
            fails == 'export'
            and path.name == 'autoencoder.safetensors'
            and b'"images\\":80' in data.replace(b' ', b'')
        ):
            raise Crash
        write(path, data)

    monkeypatch.setattr(runs, 'write_atomic', dies)
    with pytest.raises(Crash):
        train_autoencoder(dataset, tmp_path / 'run', AE, progress=False)
    monkeypatch.setattr(runs, 'write_atomic', write)
    train_autoencoder(dataset, tmp_path / 'run', AE, resume=True, progress=False)
    same(straight, tmp_path / 'run', 'autoencoder')
    assert load_weights(tmp_path / 'run' / 'autoencoder.safetensors')[1]['images'] == 80


def test_truncated_newest_state_falls_back(dataset, straight, tmp_path, monkeypatch):
    strike(monkeypatch, 'autoencoder_loss', 60, 'crash')
    with pytest.raises(Crash):
        train_autoencoder(dataset, tmp_path / 'run', AE, progress=False)
    newest = Checkpoint(tmp_path / 'run' / 'state' / 'autoencoder').files()[-1]
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.warns(UserWarning, match='going back to an older state'):
        train_autoencoder(dataset, tmp_path / 'run', AE, resume=True, progress=False)
    same(straight, tmp_path / 'run', 'autoencoder')


@pytest.mark.parametrize('stage', STAGES)
def test_finished_run_is_left_alone(stage, dataset, straight, monkeypatch):
    function, config, _ = STAGES[stage]
    before = {o: o.stat().st_mtime_ns for o in straight.rglob('*')}
    monkeypatch.setattr(runs, 'fit', lambda *a, **k: pytest.fail('trained again'))
    model = function(dataset, straight, config, resume=True)
    assert {o: o.stat().st_mtime_ns for o in straight.rglob('*')} == before
    own, file = model.state_dict(), weights(straight, stage)
    assert (
        all(
            torch.equal(v, file[k if stage == 'autoencoder' else f'ema.{k}'])
            for k, v in own.items()
        )
        and not model.training
    )


def test_lost_file_of_a_finished_run_is_written_again(dataset, straight, tmp_path):
    shutil.copytree(straight, tmp_path / 'run')
    for name in ('autoencoder', 'ldm'):
        (tmp_path / 'run' / f'{name}.safetensors').unlink()
        STAGES[name][0](dataset, tmp_path / 'run', STAGES[name][1], resume=True, progress=False)
        same(straight, tmp_path / 'run', name)


def test_second_ctrl_c_stops_at_once(dataset, tmp_path, monkeypatch):
    def impatient(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(training, 'autoencoder_loss', impatient)
    # a job in the background starts without a handler
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            train_autoencoder(dataset, tmp_path / 'run', AE, progress=False)
        assert not Checkpoint(tmp_path / 'run' / 'state' / 'autoencoder').files()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_training_in_a_thread(dataset, straight, tmp_path):
    thread = threading.Thread(
        target=train_autoencoder, args=(dataset, tmp_path / 'run', AE, False, False)
    )
    thread.start()
    thread.join()
    same(straight, tmp_path / 'run', 'autoencoder')


def test_global_chance_does_not_matter(dataset, straight, tmp_path):
    torch.manual_seed(7)
    train_autoencoder(dataset, tmp_path / 'run', AE, progress=False)
    same(straight, tmp_path / 'run', 'autoencoder')


def test_loading_processes_change_nothing(dataset, straight, tmp_path, monkeypatch):
    strike(monkeypatch, 'autoencoder_loss', 36, 'ctrl-c')
    config = replace(AE, num_workers=2)
    with pytest.raises(KeyboardInterrupt):
        train_autoencoder(dataset, tmp_path / 'run', config, progress=False)
    train_autoencoder(dataset, tmp_path / 'run', config, resume=True, progress=False)
    same(straight, tmp_path / 'run', 'autoencoder')


CHILD = '''
import sys; sys.path.insert(0, {tests!r})
import torch; torch.set_num_threads(1)
from pathlib import Path
from test_training import *
import time
slow = training.autoencoder_loss
def loss(*args, **kwargs): time.sleep(.2); return slow(*args, **kwargs)
training.autoencoder_loss = loss
train_autoencoder(make_dataset(), Path({run!r}), AE, progress=False)
'''


@pytest.mark.skipif(os.name == 'nt', reason='signals of POSIX')
def test_real_signals_from_outside(dataset, straight, tmp_path):
    """A real process, hit while it runs: Ctrl-C saves on the way out, kill -9 does not; both
    resume to the same run."""
    start = lambda name: subprocess.Popen(
        [
            sys.executable,
            '-c',
            CHILD.format(tests=str(Path(__file__).parent), run=str(tmp_path / name)),
        ],
        stderr=subprocess.PIPE,
        env=dict(os.environ, OMP_NUM_THREADS='1'),
    )
    children, struck, until = (
        {'int': (start('int'), signal.SIGINT), 'kill': (start('kill'), signal.SIGKILL)},
        set(),
        time.time() + 120,
    )
    while len(struck) < 2 and time.time() < until:
        for name, (child, number) in children.items():
            if name not in struck and (
                len(read_log(tmp_path / name / 'log.jsonl')) >= 4 or child.poll() is not None
            ):
                child.send_signal(number)
                struck.add(name)  # both, before one is waited for
        time.sleep(0.01)
    errors = {
        name: child.communicate(timeout=60)[1].decode() for name, (child, _) in children.items()
    }
    assert 'KeyboardInterrupt' in errors['int'] and children['int'][0].returncode, errors['int']
    assert children['kill'][0].returncode == -signal.SIGKILL, errors['kill']
    for name in children:
        assert name == 'kill' or Checkpoint(tmp_path / name / 'state' / 'autoencoder').files()
        train_autoencoder(dataset, tmp_path / name, AE, resume=True, progress=False)
        same(straight, tmp_path / name, 'autoencoder')


# ------------------------------------------------------------------ refusals


def changed(config, f):
    "The same configuration with one field another."
    v = getattr(config, f.name)
    if f.name == 'data':
        return replace(config, data=replace(v, crop=24))
    if f.name == 'schedule':
        return replace(config, schedule=NoiseSchedule(beta_schedule='linear'))
    if f.name == 'covariates':
        return replace(config, covariates=('slice',))
    if f.name == 'augment':
        return replace(config, augment=AUGMENTED)
    if f.name == 'precision':
        return replace(config, precision='bf16' if v != 'bf16' else 'no')
    if f.name in ('log_with', 'init_from'):
        return replace(config, **{f.name: 'wandb'})
    # more of them is another matter: test_origins.py
    if f.name == 'total_images':
        return replace(config, total_images=v - 2)
    kinds = dict(kind='vq', codebook_start='uniform', adversarial_loss='hinge', denoiser='another')
    if f.name in kinds:
        return replace(config, **{f.name: kinds[f.name]})
    if f.name == 'snr_gamma':
        return replace(config, snr_gamma=5.0 if v is None else None)
    if isinstance(v, bool):
        return replace(config, **{f.name: not v})
    if isinstance(v, tuple):
        return replace(
            config, **{f.name: tuple(not o if isinstance(o, bool) else o + 8 for o in v)}
        )
    return replace(config, **{f.name: v / 2 + 0.25 if isinstance(v, float) else v + 2})


@pytest.mark.parametrize('stage', STAGES)
def test_every_setting_is_compared_on_resume(stage, dataset, straight):
    config = STAGES[stage][1]
    for f in fields(config):
        other = changed(config, f)
        if f.name in HARMLESS:
            open_run(straight, stage, other, dataset, resume=True)
            continue
        with pytest.raises(ValueError, match=rf'begun with other settings: {f.name}'):
            open_run(straight, stage, other, dataset, resume=True)
    with pytest.raises(ValueError, match='learning_rate=.*seed='):
        open_run(straight, stage, replace(config, seed=9, learning_rate=0.5), dataset, resume=True)


@pytest.mark.parametrize('stage', STAGES)
def test_existing_stage_needs_resume(stage, dataset, straight):
    with pytest.raises(FileExistsError, match='Add --resume'):
        STAGES[stage][0](dataset, straight, STAGES[stage][1], progress=False)


def test_other_data_is_refused(straight):
    with pytest.raises(ValueError, match='image of sub-0 slice 0: other pixels.*and 27 more'):
        train_autoencoder(make_dataset(1), straight, AE, resume=True, progress=False)


@pytest.mark.parametrize(
    'content',
    [
        {'note.txt': 'mine'},
        {'config.json': '{"model_type": "bert"}'},
        {'config.json': '[1, 2]'},
        {'config.json': 'not json'},
    ],
)
@pytest.mark.parametrize('resume', [False, True])
def test_foreign_folder_is_left_alone(content, resume, dataset, tmp_path):
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises((FileExistsError, ValueError), match='Choose another --run'):
        train_autoencoder(dataset, tmp_path, AE, resume=resume, progress=False)
    assert {o.name: o.read_text() for o in tmp_path.iterdir()} == content


def test_a_file_in_the_place_of_a_run(dataset, tmp_path):
    (tmp_path / 'run').write_text('x')
    with pytest.raises(FileExistsError, match='is not a run folder'):
        train_autoencoder(dataset, tmp_path / 'run', AE, progress=False)


def test_nothing_is_left_by_a_refused_start(dataset, tmp_path):
    for config, match in (
        (replace(AE, batch_size=0), 'batch_size=0'),
        (replace(AE, data=DataConfig(size=64)), 'size=64'),
        (replace(AE, covariates=('weight',)), "'weight'"),
        (replace(AE, patch=5), 'multiple of 20'),
        (replace(AE, precision='fp16'), 'fp16'),
    ):
        if config.precision == 'fp16' and torch.cuda.is_available():
            continue
        with pytest.raises(ValueError, match=match):
            train_autoencoder(dataset, tmp_path / 'run', config, progress=False)
        assert not (tmp_path / 'run').exists()


def test_a_state_of_another_architecture(dataset, straight, tmp_path, monkeypatch):
    shutil.copytree(straight, tmp_path / 'run')
    settings = read_config(tmp_path / 'run')
    settings['autoencoder']['config']['channels'] = [16, 24]
    (tmp_path / 'run' / 'config.json').write_text(json.dumps(settings))
    with pytest.raises(ValueError, match='another architecture'):
        train_autoencoder(
            dataset, tmp_path / 'run', replace(AE, channels=(16, 24)), resume=True, progress=False
        )


def refuses(kind, name):
    "Whether a configuration with a bad number is refused by name."
    for bad, error in (
        (-1, ValueError),
        (math.nan, (ValueError, TypeError)),
        (math.inf, (ValueError, TypeError)),
        ('8', TypeError),
        (None, TypeError),
        (True, TypeError),
    ):
        with pytest.raises(error, match=f'check_config: {name}='):
            check_config(replace(kind(), **{name: bad}))


@pytest.mark.parametrize('name', [f.name for f in fields(AEConfig) if bare_type(f) in (int, float)])
def test_no_number_goes_unchecked(name):
    refuses(AEConfig, name)


# ------------------------------------------------------------------ when it blows up


@pytest.mark.parametrize('stage', STAGES)
def test_nan_stops_and_keeps_the_last_good_state(stage, dataset, straight, tmp_path, monkeypatch):
    function, config, name = STAGES[stage]
    run, loss = tmp_path / 'run', getattr(HOME[name], name)
    begin(stage, straight, run)

    def poisoned(model, batch, generator, seen, *args, **kwargs):
        value, logs = loss(model, batch, generator, seen, *args, **kwargs)
        return (value * math.nan if seen >= 36 and torch.is_grad_enabled() else value), logs

    monkeypatch.setattr(HOME[name], name, poisoned)
    with pytest.raises(RuntimeError, match='Expected a finite number.*smaller learning_rate'):
        function(dataset, run, config, progress=False)
    tensors, info = Checkpoint(run / 'state' / stage).load()
    assert info['seen'] == 24 and all(v.isfinite().all() for v in tensors.values())
    assert all(v.isfinite().all() for v in weights(run, stage).values())


def test_large_learning_rate(dataset, tmp_path):
    with pytest.raises(RuntimeError, match='fit: .*Expected a finite number'):
        train_autoencoder(
            dataset,
            tmp_path / 'run',
            replace(AE, learning_rate=1e12, total_images=400, precision='no'),
            progress=False,
        )


# ------------------------------------------------------------------ what a run leaves behind


def test_returned_and_stored_networks_are_the_same(dataset, straight):
    model = train_autoencoder(dataset, straight, AE, resume=True)
    x = dataset.__getitems__([0, 7, 29])['image']
    with torch.no_grad():
        a, b = model(x)[0], load_autoencoder(straight)[0](x)[0]
    assert torch.equal(a, b) and 'forward' not in vars(model)


def test_the_early_network_is_the_average_of_that_time(dataset, straight, tmp_path):
    "Kept as it was after `early_images`, whatever was learned later, and only then written."
    seen = {}

    def watch(learner, images, means):
        seen[images] = {k: v.clone() for k, v in learner.ema.module.state_dict().items()}
        file = tmp_path / 'ldm.safetensors'
        if file.is_file() and images <= LDM.early_images:
            assert not any(k.startswith('early.') for k in load_weights(file)[0])

    train_autoencoder(dataset, tmp_path, AE, progress=False)
    train_ldm(dataset, tmp_path, LDM, progress=False, callback=watch)
    stored = load_weights(tmp_path / 'ldm.safetensors')[0]
    early = {k: stored['early.' + k] for k in seen[32]}
    assert all(torch.equal(early[k], v) for k, v in seen[32].items())
    assert any(not torch.equal(early[k], stored['ema.' + k]) for k in early)
    plain = load_weights(straight / 'ldm.safetensors')[0]
    assert all(torch.equal(v, plain[k]) for k, v in stored.items())
    denoiser = load_denoiser(tmp_path, AE.latent_channels)
    assert all(torch.equal(v, early[k]) for k, v in denoiser['early'].state_dict().items())


def test_a_run_without_an_early_network(dataset, tmp_path):
    train_autoencoder(dataset, tmp_path, AE, progress=False)
    train_ldm(dataset, tmp_path, replace(LDM, early_images=0), progress=False)
    assert 'early' not in load_denoiser(tmp_path, AE.latent_channels)
    with pytest.raises(ValueError, match='early_images=80 would change nothing'):
        check_config(replace(LDM, early_images=80))


def test_run_folder(straight, dataset):
    assert {o.name for o in straight.iterdir()} == {
        '.lock',
        'autoencoder.safetensors',
        'ldm.safetensors',
        'config.json',
        'given',
        'log.jsonl',
        'samples',
        'state',
        'train_mean.safetensors',
    }
    for stage in STAGES:
        assert [int(o.stem) for o in Checkpoint(straight / 'state' / stage).files()] == [72, 80]
        rows = [o for o in read_log(straight / 'log.jsonl') if o['stage'] == stage and 'loss' in o]
        assert [o['images'] for o in rows] == list(range(8, 81, 8)) and all(
            {'grad_norm', 'learning_rate'} <= set(o) for o in rows
        )
        assert read_config(straight)[stage]['train_subjects'] == sorted(
            dataset.subset('train').manifest.subject.unique()
        )
        plot_history(read_log(straight / 'log.jsonl'), stage)
        plot_history([rows[0]], stage)


def test_conditional_autoencoder(dataset, tmp_path):
    train_autoencoder(
        dataset,
        tmp_path / 'run',
        replace(AE, covariates=('slice', 'diagnosis'), total_images=16),
        progress=False,
    )
    assert [c.name for c in load_autoencoder(tmp_path / 'run')[0].covariates] == [
        'slice',
        'diagnosis',
    ]


# ------------------------------------------------------------------ files


@pytest.mark.parametrize('cut', [0, 1, 7, 8, 60, -1])
def test_broken_files_are_named(cut, straight, tmp_path):
    (tmp_path / 'autoencoder.safetensors').write_bytes(
        (straight / 'autoencoder.safetensors').read_bytes()[:cut]
    )
    with pytest.raises(ValueError, match='autoencoder.safetensors cannot be read'):
        load_autoencoder(tmp_path)


def test_all_states_broken(dataset, straight, tmp_path):
    shutil.copytree(straight, tmp_path / 'run')
    for o in Checkpoint(tmp_path / 'run' / 'state' / 'autoencoder').files():
        o.write_bytes(b'')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with pytest.raises(ValueError, match='cannot be read'):
            train_autoencoder(dataset, tmp_path / 'run', AE, resume=True, progress=False)
