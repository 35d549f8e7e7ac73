"""Crash safety: one process a run folder, kill -9 at any moment, full disks, and a clean way out
on Ctrl-C and SIGTERM."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

from brainldm.engineering.runs import Checkpoint, free_run, load_weights, lock_run, read_log
from brainldm.training import train_autoencoder
from brainldm.engineering import runs, stage1
from brainldm import training
from test_training import AE, make_dataset

HERE = Path(__file__).parent
posix = pytest.mark.skipif(os.name == 'nt', reason='signals of POSIX')


@pytest.fixture(autouse=True)
def quick_figures(monkeypatch):
    monkeypatch.setattr(stage1, 'show_grid', lambda *args, **kwargs: plt.figure(figsize=(1, 1)))


@pytest.fixture(scope='module')
def dataset():
    return make_dataset()


def python(code, *args, **kwargs):
    "A second process."
    return subprocess.Popen(
        [sys.executable, '-c', code, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(
            os.environ, OMP_NUM_THREADS='1', PYTHONPATH=os.pathsep.join([str(HERE), *sys.path])
        ),
        **kwargs,
    )


# ------------------------------------------------------------------ one process a run folder

HOLDER = '''
import sys, time
from brainldm.engineering.runs import lock_run
lock_run(sys.argv[1]); print('locked', flush=True); time.sleep(120)
'''


@pytest.fixture
def holder(tmp_path):
    "Another process that holds tmp_path/run."
    child = python(HOLDER, tmp_path / 'run')
    assert child.stdout.readline() == 'locked\n'
    yield child
    child.kill()
    child.communicate()


def test_the_second_process_is_refused_until_the_first_is_dead(holder, dataset, tmp_path):
    "Also after kill -9, which leaves the file behind: the lock is the operating system's."
    with pytest.raises(
        RuntimeError,
        match='another process is training in .*Expected one at a time.*choose another --run',
    ):
        train_autoencoder(dataset, tmp_path / 'run', AE, progress=False)
    assert os.listdir(tmp_path / 'run') == ['.lock']  # refused before anything was written
    holder.kill()
    holder.wait()
    train_autoencoder(dataset, tmp_path / 'run', AE, progress=False)
    lock_run(tmp_path / 'run')
    free_run(tmp_path / 'run')


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_a_child_does_not_inherit_the_lock(tmp_path):
    "Loading processes may outlive a killed training for seconds; they must not keep the folder."
    reader, writer = os.pipe()
    first = os.fork()
    if not first:
        lock_run(tmp_path / 'run')
        orphan = os.fork()
        if not orphan:
            time.sleep(60)
            os._exit(0)
        os.write(writer, f'{orphan}\n'.encode())
        time.sleep(60)
        os._exit(0)
    orphan = int(os.read(reader, 20))
    try:
        with pytest.raises(RuntimeError, match='another process'):
            lock_run(tmp_path / 'run')
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
        lock_run(tmp_path / 'run')
        free_run(tmp_path / 'run')
    finally:
        os.kill(orphan, signal.SIGKILL)


def test_a_failed_start_leaves_no_lock(dataset, tmp_path):
    train_autoencoder(dataset, tmp_path / 'run', AE, progress=False)
    with pytest.raises(FileExistsError):
        train_autoencoder(dataset, tmp_path / 'run', AE, progress=False)
    # finished: nothing to do
    train_autoencoder(dataset, tmp_path / 'run', AE, resume=True, progress=False)
    assert not runs.LOCKED_RUNS
    child = python(HOLDER, tmp_path / 'run')
    assert child.stdout.readline() == 'locked\n'
    child.kill()
    child.communicate()


def test_whatever_stops_a_training_its_folder_is_free(dataset, tmp_path, monkeypatch):
    def broken(*_):
        raise ValueError('no mean')

    # after the folder is entered, before the first step
    monkeypatch.setattr(training, 'mean_slices', broken)
    with pytest.raises(ValueError, match='no mean'):
        train_autoencoder(dataset, tmp_path / 'run', AE, progress=False)
    assert not runs.LOCKED_RUNS


def test_leftovers_of_the_dead_are_cleared(tmp_path):
    for name in (
        '.config.json.7.part',
        'state/ldm/.000000000008.safetensors.7.part',
        'samples/.ldm_000000008.png.7.part',
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b'half')
    (tmp_path / 'samples' / 'mine.part').touch()
    lock_run(tmp_path)
    free_run(tmp_path)
    assert [o.name for o in tmp_path.rglob('*.part')] == ['mine.part']


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def cannot(file):
        raise OSError(errno.ENOLCK, 'No locks available')

    monkeypatch.setattr(runs, 'lock_file', cannot)
    with pytest.warns(UserWarning, match='cannot be locked'):
        lock_run(tmp_path)
    free_run(tmp_path)


# ------------------------------------------------------------------ kill -9


@posix
def test_killed_at_random_moments_and_resumed(tmp_path):
    "Ten rounds of `tests/benchmarks/kill_rounds.py`: two of each training."
    done = subprocess.run(
        [
            sys.executable,
            HERE / 'benchmarks' / 'kill_rounds.py',
            '--rounds',
            '10',
            '--seed',
            '1',
            '--out',
            tmp_path,
        ],
        capture_output=True,
        text=True,
        timeout=600,
        env=dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=os.pathsep.join(sys.path)),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / 'kill_rounds.json').read_text())
    assert found['ends'] == {'identical': 10} and sum(found['kills'].values()) >= 5


# ------------------------------------------------------------------ full disk


def full(monkeypatch, name, after):
    "Let the disk be full once `after` writes of files called like `name` went through."
    left, opened = [after], Path.open

    def opens(path, mode='r', *args, **kwargs):
        file = opened(path, mode, *args, **kwargs)
        if mode[0] in 'wa' and name in path.name:
            left[0] -= 1
            if left[0] < 0:
                file.write(b'half' if 'b' in mode else '{"half')
                file.close()
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return file

    monkeypatch.setattr(Path, 'open', opens)


@pytest.mark.parametrize(
    'name,after,newest',
    [
        ('0000000000', 1, 24),
        ('autoencoder.safetensors', 1, 24),
        ('log.jsonl', 8, 48),
        ('autoencoder_0', 1, 72),
        ('config.json', 0, None),
        ('csv.gz', 0, None),
        ('train_mean', 0, None),
    ],
)
def test_full_disk_keeps_the_last_good_state(name, after, newest, dataset, tmp_path, monkeypatch):
    """Checkpoint, file for users, log, image, protocol: the error names the file and the way on;
    with room again the run ends as if nothing had been."""
    with monkeypatch.context() as patch:
        full(patch, name, after)
        with pytest.raises(
            OSError,
            match=(
                f'No space left on device while writing .*{name}.*make room, then run the'
                r' command again .a training: with --resume'
            ),
        ) as e:
            train_autoencoder(dataset, tmp_path / 'run', AE, progress=False)
        assert e.value.errno == errno.ENOSPC
    states = Checkpoint(tmp_path / 'run' / 'state' / 'autoencoder')
    assert (states.load()[1]['seen'] if states.files() else None) == newest
    assert not list((tmp_path / 'run').rglob('*.part'))
    train_autoencoder(dataset, tmp_path / 'run', AE, resume=True, progress=False)
    train_autoencoder(dataset, tmp_path / 'whole', AE, progress=False)
    a, b = (load_weights(tmp_path / o / 'autoencoder.safetensors')[0] for o in ('run', 'whole'))
    assert all(torch.equal(a[k], b[k]) for k in b) and read_log(
        tmp_path / 'run' / 'log.jsonl'
    ) == read_log(tmp_path / 'whole' / 'log.jsonl')


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='needs /dev/full')
def test_a_device_that_is_really_full(tmp_path):
    "The kernel's own ENOSPC, for the line of a log."
    log = runs.JsonLog(tmp_path / 'log.jsonl', 'ldm')
    log.path = Path('/dev/full')
    with pytest.raises(OSError, match='No space left on device while writing /dev/full'):
        log.write(8, dict(loss=1.0))


# ------------------------------------------------------------------ Ctrl-C and SIGTERM, from the
# command line


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    "A folder for the command line."
    from brainldm.engineering.configs import PhantomConfig
    from brainldm.engineering.phantom import make_cohort

    return make_cohort(
        tmp_path_factory.mktemp('data') / 'phantom',
        PhantomConfig(num_subjects=6, num_slices=6, size=32),
        progress=False,
    )


COMMAND = 'import sys; from brainldm.engineering.cli import main; sys.exit(main())'
FLAGS = (
    '--size 32 --preset tiny --channels 8 16 --patch 2 --total-images 40000 --batch-size 4'
    ' --log-every 1 --validate-every 1000000 --checkpoint-every 1000000'
)


@posix
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_the_command_line_saves_and_says_how_to_go_on(number, images, tmp_path):
    words = ['train', 'autoencoder', images, '--run', tmp_path / 'run', *FLAGS.split()]
    child = python(COMMAND, *words)
    until = time.time() + 120
    while (
        len(read_log(tmp_path / 'run' / 'log.jsonl')) < 5
        and child.poll() is None
        and time.time() < until
    ):
        time.sleep(0.02)
    child.send_signal(number)
    out, said = child.communicate(timeout=60)
    assert child.returncode == 130, (child.returncode, said)
    assert '--resume' in said and 'Traceback' not in said
    state = Checkpoint(tmp_path / 'run' / 'state' / 'autoencoder').load()
    assert state[1]['seen'] == read_log(tmp_path / 'run' / 'log.jsonl')[-1]['images']
    assert (
        load_weights(tmp_path / 'run' / 'autoencoder.safetensors')[1]['images'] == state[1]['seen']
    )
