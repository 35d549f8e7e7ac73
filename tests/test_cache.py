"The cache of prepared images: no room, no home, no pixels sent to workers, no work done twice."

import errno
import os
import pickle
import pwd
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from test_covariates import cohort
from test_data import make_volume

from brainldm.engineering.configs import DataConfig
from brainldm.engineering.files import cache_folder, unpack
from brainldm.engineering.cache import memmap_location, one_process
from brainldm.data import check_dataset, open_dataset
from brainldm.engineering.cli import main
from brainldm.engineering import cache, files, layouts
from brainldm import data

CONFIG = DataConfig(size=24)


def opened(folder, cache, **options):
    return open_dataset(
        folder, DataConfig(**{'size': 24, **options}), progress=False, cache_dir=cache
    )


# ---- a full disk


def test_a_disk_without_room_is_a_message(tmp_path, monkeypatch, capsys):
    place = cohort(tmp_path / 'in', n=5)
    monkeypatch.setenv('BRAINLDM_CACHE', str(tmp_path / 'cache'))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(cache.shutil, 'disk_usage', lambda o: usage._replace(free=1000))
    assert (
        main(
            [
                'train',
                'autoencoder',
                str(place),
                '--run',
                str(tmp_path / 'run'),
                '--preset',
                'tiny',
                '--size',
                '32',
            ]
        )
        == 1
    )
    said = capsys.readouterr().err
    assert 'is full' in said and 'BRAINLDM_CACHE' in said
    assert not list((tmp_path / 'cache').iterdir()) and not (tmp_path / 'run').exists()


def test_a_disk_that_fills_up_while_writing(tmp_path, monkeypatch):
    "What the system says while bytes are written comes back as a message, and half a cache goes."
    place = cohort(tmp_path / 'in', n=5)

    def full(*a, **kw):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(cache, 'map_files', full)
    with pytest.raises(OSError, match='Expected room') as e:
        opened(place, tmp_path / 'cache')
    assert e.value.errno == errno.ENOSPC and not list((tmp_path / 'cache').iterdir())


@pytest.mark.skipif(
    not sys.platform.startswith('linux') or os.geteuid() != 0, reason='mounts a small disk'
)
def test_a_small_disk(tmp_path):
    """A memory map of a file without room kills the process with a bus error; writing is refused
    in words."""
    place, small = cohort(tmp_path / 'in', n=5, size=64), tmp_path / 'small'
    small.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=16k', 'tmpfs', small]).returncode:
        pytest.skip('no tmpfs')
    try:
        code = (
            'import sys, types; from brainldm import data; from brainldm.engineering import'
            ' cache\ncache.shutil.disk_usage = lambda o: types.SimpleNamespace(free=1e9)          '
            ' # a quota does not show there\ntry: data.open_dataset(sys.argv[1],'
            ' data.DataConfig(size=64), False, sys.argv[2])\nexcept OSError as e: print(e)'
        )
        done = subprocess.run(
            [sys.executable, '-c', code, place, small / 'cache'], capture_output=True, text=True
        )
        assert done.returncode == 0 and 'is full' in done.stdout, done
        assert not [o for o in small.rglob('*') if o.is_file()]
    finally:
        subprocess.run(['umount', small], check=True)


# ---- no home, nothing to write to


@pytest.mark.skipif(os.name != 'posix', reason='homes as of Unix')
def test_a_user_without_home(monkeypatch, tmp_path):
    for name in ('HOME', 'XDG_CACHE_HOME', 'BRAINLDM_CACHE'):
        monkeypatch.delenv(name, raising=False)

    def nobody(uid):
        raise KeyError(uid)

    monkeypatch.setattr(pwd, 'getpwuid', nobody)
    with pytest.raises(OSError, match='Set BRAINLDM_CACHE'):
        cache_folder()
    monkeypatch.setenv('BRAINLDM_CACHE', str(tmp_path))
    assert cache_folder() == tmp_path


@pytest.mark.parametrize('archive', [False, True])
def test_a_cache_that_cannot_be_made(tmp_path, monkeypatch, archive):
    (tmp_path / 'file').write_text('no folder')
    monkeypatch.setenv('BRAINLDM_CACHE', str(tmp_path / 'file/cache'))
    place = cohort(tmp_path / 'in', n=5)
    if archive:
        place = Path(shutil.make_archive(tmp_path / 'packed', 'zip', place))
    with pytest.raises(OSError, match='BRAINLDM_CACHE'):
        (unpack if archive else lambda o: open_dataset(o, CONFIG, progress=False))(place)


# ---- what goes to a worker process


def test_a_dataset_is_pickled_as_a_place(tmp_path):
    whole = opened(cohort(tmp_path / 'in', n=30, size=96), tmp_path / 'cache', size=96)
    train = whole.subset('train')
    for dataset in (whole, train, whole.subset('test')):
        sent = pickle.dumps(dataset)
        back = pickle.loads(sent)
        assert (
            len(sent) < dataset.images.nbytes / 4
            and (back.images == dataset.images).all()
            and isinstance(back.images, np.memmap)
        )
        assert (
            back.manifest.equals(dataset.manifest)
            and back.covariates == dataset.covariates
            and back.config == dataset.config
        )
        assert back[1]['image'].equal(dataset[1]['image'])
    assert (
        memmap_location(np.zeros((2, 8, 8), np.uint8)) is None
        and memmap_location(whole.images[::2]) is None
    )
    by_hand = data.SliceDataset(np.array(whole.images), whole.manifest)
    assert (pickle.loads(pickle.dumps(by_hand)).images == whole.images).all()


# ---- once for all processes


@pytest.fixture
def counted(monkeypatch):
    "How often a file is decoded; its clock says that the data are old enough to be remembered."
    seen, lock = [], threading.Lock()

    def decode(path, *a):
        with lock:
            seen.append(path.name)
        return files.decode_file(path, *a)

    for module in (layouts, cache):
        monkeypatch.setattr(module, 'decode_file', decode)
    monkeypatch.setattr(cache.time, 'time', lambda now=time.time: now() + 60)
    return seen


def test_work_is_done_once(tmp_path, counted):
    "Four that open the same data at the same time look at each file once, and prepare it once."
    place = cohort(tmp_path / 'in', n=6)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: opened(place, tmp_path / 'cache'), range(4)))
    assert len(counted) == 2 * 12 and all((o.images == found[0].images).all() for o in found)
    assert all(o.manifest.equals(found[0].manifest) for o in found)
    # no lock is left
    assert not [o for o in (tmp_path / 'cache').iterdir() if o.name.startswith('.')]


def test_what_a_look_found_is_told_again(tmp_path, counted, capsys):
    "Faults and notes of a remembered look are those of the look itself; `check` looks itself."
    vol = np.random.default_rng(0).uniform(1, 900, (24, 24, 4)).astype(np.float32)
    for i in range(4):
        make_volume(tmp_path / f'in/sub-{i}.nii.gz', vol + i)
    (tmp_path / 'in/sub-9.nii.gz').write_bytes((tmp_path / 'in/sub-0.nii.gz').read_bytes()[:900])
    look, looks = cache.CachedInspection(tmp_path), []
    for _ in range(2):
        looks.append(check_dataset(tmp_path / 'in', CONFIG, False, look))
        look.keep()
    assert len(counted) == 5 and str(looks[0]) == str(looks[1]) and not looks[0].ok
    assert looks[0].manifest.equals(looks[1].manifest) and str(
        check_dataset(tmp_path / 'in', CONFIG, False)
    ) == str(looks[0])
    assert len(counted) == 10


def test_a_changed_file_is_seen(tmp_path, counted):
    "Another content under the same name, size and time: the system notes when a file was changed."
    place = cohort(tmp_path / 'in', n=6)
    first = opened(place, tmp_path / 'cache').manifest
    one, other = (place / f'images/s{i:03d}_0.png' for i in (0, 1))
    about = one.stat()
    one.write_bytes(other.read_bytes())
    os.utime(one, ns=(about.st_atime_ns, about.st_mtime_ns))
    with pytest.raises(ValueError, match='same image|the same'):
        opened(place, tmp_path / 'cache')
    assert first.hash.is_unique


def test_fresh_files_are_not_remembered(tmp_path, monkeypatch):
    # clocks of file systems are coarse
    monkeypatch.setattr(cache.time, 'time', lambda now=time.time: now() - 60)
    opened(cohort(tmp_path / 'in', n=5), tmp_path / 'cache')
    assert not (tmp_path / 'cache/looks').exists()


def test_the_others_wait(tmp_path, capsys):
    started, free = threading.Event(), threading.Event()

    def first():
        with one_process(tmp_path, tmp_path / 'data'):
            started.set()
            free.wait(20)

    with ThreadPoolExecutor(2) as pool:
        pool.submit(first)
        started.wait(20)

        def second():
            with one_process(tmp_path, tmp_path / 'data'):
                return free.is_set()

        answer = pool.submit(second)
        with one_process(tmp_path, tmp_path / 'others'):
            pass  # other data do not wait
        time.sleep(1.2)
        free.set()
        assert answer.result(20)
    assert 'waiting for another process' in capsys.readouterr().out
