"""The memorization audit: copies are found, in every disguise and however few; slices of other
subjects are not."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch

from brainldm.engineering.configs import DataConfig, PhantomConfig
from brainldm.engineering.phantom import make_cohort
from brainldm.data import SliceDataset, open_dataset
from brainldm.engineering.sharing import audit_verdicts
from brainldm.advanced.evaluation import merge_metrics
from brainldm.advanced.audit import (
    KINDS,
    CopySearch,
    audit_images,
    audit_power,
    audit_statistics,
    audit_summary,
    candidate_moves,
    excess_p_values,
    extreme_threshold,
    folding_maps,
    memorization_audit,
    nearest_copies,
    plant_copies,
    reference_rows,
    smooth,
    transform_maps,
)


def all_images(dataset):
    return dataset.__getitems__(range(len(dataset)))['image']


@pytest.fixture(scope='module')
def splits(tmp_path_factory):
    "Thirty synthetic subjects, four slices each: (train, held-out)."
    folder = tmp_path_factory.mktemp('copies')
    data = make_cohort(
        folder / 'phantom', PhantomConfig(num_subjects=30, num_slices=4, size=128), progress=False
    )
    dataset = open_dataset(data, DataConfig(size=128, test_fraction=0.3), progress=False)
    return dataset.subset('train'), dataset.subset('test')


@pytest.fixture(scope='module')
def search(splits):
    return CopySearch(splits[0])


@pytest.fixture(scope='module')
def audited(splits):
    "(audit, samples, reference) of held-out slices that stand for samples."
    train, held_out = splits
    return audit_images(all_images(held_out), train, held_out, trials=20)


def judge(images, search, splits, reference, power):
    owners = splits[0].manifest.subject.to_numpy()
    return memorization_audit(
        audit_statistics(nearest_copies(search, images), reference, owners), power
    )


@pytest.mark.parametrize('kind', KINDS)
def test_every_disguise_is_found(kind, splits, search):
    train, held_out = splits
    rows = np.arange(0, len(train), 7)
    copies = plant_copies(
        kind,
        train.__getitems__(rows)['image'],
        all_images(held_out)[: len(rows)],
        torch.Generator().manual_seed(0),
    )
    assert (
        copies.shape == (len(rows), 1, 128, 128)
        and copies.min() >= -1.001
        and copies.max() <= 1.001
    )
    found, away = nearest_copies(search, copies), nearest_copies(search, held_out)
    column = 'half' if kind == 'one half' else 'whole'
    same = (
        train.manifest.subject.to_numpy()[found[f'{column}_row']]
        == train.manifest.subject.to_numpy()[rows]
    )
    assert same.all() and found[column].min() > away[column].max()


def test_power_is_measured_and_held_out_subjects_raise_no_alarm(audited):
    power = audited[0]['power']
    assert list(power) == ['none', *KINDS] and all(o['trials'] == 20 for o in power.values())
    assert power['none']['failed'] == 0
    assert sum(power[k]['caught'] >= 19 for k in KINDS) >= 8  # of ten, with 21 train subjects
    assert power['verbatim']['caught'] == 20 and power['mirrored']['caught'] == 20
    # Clopper and Pearson, k = n
    assert power['verbatim']['interval_95'][0] == pytest.approx(0.025 ** (1 / 20), abs=1e-6)


@pytest.mark.parametrize('n, copies', [(640, 12), (50, 3), (50, 1), (640, 1)])
def test_a_few_verbatim_copies_fail(n, copies, splits, search, audited):
    "12 of 640 were 1.875 %: passed; 3 of 50 were unclear."
    _, away, reference = audited
    stolen = nearest_copies(search, splits[0].__getitems__(range(copies))['image'])
    honest = away.iloc[np.resize(np.arange(len(away)), n - copies)]
    owners = splits[0].manifest.subject.to_numpy()
    audit = memorization_audit(
        audit_statistics(pd.concat([stolen, honest], ignore_index=True), reference, owners),
        audited[0]['power'],
    )
    assert audit['verdict'] == 'failed' and audit['copies'] == copies
    assert f'{copies} samples' in audit['reason']


def test_passed_needs_power(audited, splits):
    audit, found, reference = audited
    owners = splits[0].manifest.subject.to_numpy()
    statistics = audit_statistics(found.assign(whole=0.1, half=0.1), reference, owners)
    full = {'none': dict(failed=0, trials=100)} | {k: dict(caught=100, trials=100) for k in KINDS}
    assert memorization_audit(statistics)['verdict'] == 'unclear'
    assert memorization_audit(statistics, full)['verdict'] == 'passed'
    blind = memorization_audit(statistics, full | {'blurred': dict(caught=94, trials=100)})
    assert blind['verdict'] == 'unclear' and 'blurred' in blind['reason']


def test_one_train_subject_again_and_again(audited, splits):
    "Each sample alone is no copy, but too many of them resemble one and the same train subject."
    _, found, reference = audited
    owners = splits[0].manifest.subject.to_numpy()
    level = {
        k: (np.quantile(reference[k], 0.99) + reference[k].max()) / 2 for k in ('whole', 'half')
    }
    lean = found.assign(whole=level['whole'] + 1e-3, whole_row=0)
    statistics = audit_statistics(lean, reference, owners)
    assert statistics['copies'] == 0 and statistics['whole']['most_of_one'] == len(lean)
    assert memorization_audit(statistics)['verdict'] == 'failed'


def test_p_values_count_subjects():
    who = np.repeat(np.arange(40), 10)
    spread, one = np.arange(400) % 50 == 0, who == 3

    def p(hits, groups, k):
        return excess_p_values(hits, np.arange(400) % 7, who, groups, (k, k))[0]

    apart, together = np.arange(100), np.repeat(np.arange(5), 20)
    assert p(spread, apart, 0) == 1 and p(spread, apart, 20) < 0.01 and p(spread, apart, 3) > 0.1
    # twenty slices of one subject are one subject
    assert p(one, together, 20) > 0.05 > 0.01 > p(spread, apart, 20)


def test_threshold_holds_its_level():
    """Ten slices a subject, correlated within: a false alarm in fewer than alpha of the audits,
    and not absurdly far away."""
    rng, alarms, n = np.random.default_rng(0), 0, 100

    def honest(people, each):
        return 0.4 + 0.05 * rng.normal(size=(people, 1)) + 0.05 * rng.normal(size=(people, each))

    for _ in range(300):
        u = extreme_threshold(
            np.tanh(honest(60, 10)).ravel(), np.repeat(np.arange(60), 10), n, 0.05
        )
        alarms += np.tanh(honest(n, 1)).max() >= u
        assert 0.5 < u < 0.95
    assert alarms <= 0.05 * 300 + 3 * math.sqrt(300 * 0.05 * 0.95)
    assert extreme_threshold([0.1, 0.2], ['a', 'b'], 10, 0.01) == 1


def test_one_subject_under_two_names_does_not_blind_the_audit():
    rng = np.random.default_rng(0)
    values, who = np.tanh(rng.normal(0.4, 0.05, 600)), np.repeat(np.arange(60), 10)
    before = extreme_threshold(values, who, 100, 0.01)
    values[0] = values[590] = 0.97
    assert before < extreme_threshold(values, who, 100, 0.01) < 0.9


@pytest.mark.parametrize('size', [64, 128, 256])
def test_candidate_moves_are_close_enough(size):
    "A shift of up to 3 pixels is within one pixel of the frame of 128 of a candidate."
    moves = candidate_moves(size)
    shifts = moves[(moves[:, 2] == 0) & (moves[:, 3] == 1) & (moves[:, 4] == 1), :2] * 64
    for goal in itertools.product(np.linspace(-3, 3, 13) * 128 / size, repeat=2):
        assert (shifts - torch.tensor(goal)).abs().amax(1).min() <= 1.01
    assert len(moves) == 2 * (len(shifts) + 8)


@pytest.mark.parametrize('size', [48, 64, 100, 256])
def test_other_sizes_and_no_slice_positions(size, splits):
    train, _ = splits
    small = torch.nn.functional.interpolate(
        all_images(train)[:24], size, mode='bilinear', antialias=True
    )
    table = train.manifest[:24].drop(columns=['slice'])
    images = ((small[:, 0] + 1) * 127.5).round().clamp(0, 255).byte().numpy()
    found = nearest_copies(CopySearch(SliceDataset(images, table, [])), small.flip(-1))
    assert found.whole_row.tolist() == list(range(24)) and found.whole.min() > 0.9


def test_a_slice_is_found_whatever_its_label_and_batch(splits, search):
    images = all_images(splits[0])[[5, 9, 14]]
    together = nearest_copies(search, images)
    alone = pd.concat([nearest_copies(search, o[None]) for o in images], ignore_index=True)
    pd.testing.assert_frame_equal(together, alone, atol=1e-5)
    assert together.whole_row.tolist() == [5, 9, 14]


def test_a_subject_is_not_compared_with_itself(splits, search):
    train, _ = splits
    who = train.manifest.subject.to_numpy()
    found = nearest_copies(search, train, who)
    assert (
        (who[found.whole_row] != who).all()
        and (who[found.half_row] != who).all()
        and found.whole.max() < 0.97
    )


def test_black_images_and_constant_ones():
    maps = folding_maps(torch.stack([torch.full((1, 64, 64), v) for v in (-1.0, 1.0, 0.0)]))
    assert maps.isfinite().all() and maps[0].abs().max() == 0


def test_moves_and_blur_beside_scipy():
    from scipy.ndimage import gaussian_filter, rotate

    image = torch.rand(1, 1, 33, 47, generator=torch.Generator().manual_seed(0))
    want = gaussian_filter(image[0, 0].numpy(), 1.3, mode='constant', truncate=8)
    np.testing.assert_allclose(smooth(image, 1.3)[0, 0].numpy(), want, atol=1e-5)
    blob = smooth(torch.nn.functional.pad(torch.rand(1, 21, 21), (10, 10, 10, 10)), 2.0)
    turned = transform_maps(blob, torch.tensor([[0.0, 0.0, math.radians(20), 1.0, 1.0]]))[0].numpy()
    either = [rotate(blob[0].numpy(), a, reshape=False, order=1) for a in (20, -20)]
    assert min(np.abs(turned - o).max() for o in either) < 0.02


def test_reference_takes_every_subject():
    who = np.repeat(list('abcdefg'), [9, 9, 9, 9, 9, 9, 2])
    rows = reference_rows(who, most=21)
    assert set(who[rows]) == set('abcdefg') and len(rows) <= 21 and len(set(rows)) == len(rows)


def test_verdicts_of_earlier_versions_are_none(tmp_path, audited):
    earlier = dict(share=0.015, allowed=0.02, verdict='passed', n=640, pixel={}, feature={})
    merge_metrics(tmp_path, 'samples prior', dict(memorization=earlier))
    assert 'not audited' in audit_summary(tmp_path, 'prior') and 'not audited' in audit_summary(
        tmp_path, 'ldm'
    )
    merge_metrics(tmp_path, 'samples ldm', dict(memorization=audited[0]))
    assert f"audit {audited[0]['verdict']}" in audit_summary(tmp_path)
    assert audit_verdicts(
        {'samples a': [], 'samples b': {}, 'samples c': dict(memorization=1), 'bits': 3}
    ) == dict.fromkeys('abc', 'not audited')


def test_no_subject_is_named(audited, splits):
    text = str(audited[0])
    assert not [o for o in splits[0].manifest.subject.unique() if o in text]


def test_few_held_out_subjects_are_enough_to_run(audited, splits):
    _, found, reference = audited
    owners = splits[0].manifest.subject.to_numpy()
    one = found.assign(subject='x')
    power = audit_power(
        {'verbatim': found.assign(whole=1.0, half=1.0)},
        one,
        reference[reference.split == 'train'],
        owners,
        trials=3,
    )
    assert power['verbatim']['caught'] == 3
