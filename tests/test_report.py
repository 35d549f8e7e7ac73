"""Reports of whole, half and odd runs; a run that evaluates itself; nobody's scan on a page that
travels."""

import json
import shutil
from html.parser import HTMLParser

import pytest
import torch

from brainldm.engineering.configs import AEConfig, DataConfig, LDMConfig, PriorConfig
from brainldm.engineering.covariates import Covariate
from brainldm.data import open_dataset
from brainldm.vae import AutoencoderKL
from brainldm.unet import UNet
from brainldm.training import train_autoencoder, train_ldm
from brainldm.engineering.codec import default_conditions
from brainldm.sampling import BrainLDM, Sampler
from brainldm.advanced.prior import train_prior
from brainldm.engineering import report as report_module
from brainldm.engineering.cli import main
from brainldm.advanced.evaluation import merge_metrics, reconstruction_scores, show_number
from brainldm.engineering.report import (
    check_targets,
    evaluate,
    figure_uri,
    realism_rows,
    report,
    report_numbers,
    report_samples,
    sample_by_condition,
    sample_matched,
)


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.text = [], [], ''
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [
            v for k, v in attrs if k in ('src', 'href', 'srcset', 'action', 'poster')
        ]

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope='module')
def model(tiny_run):
    return BrainLDM.load(tiny_run[0], device='cpu', precision='no')


@pytest.fixture(scope='module')
def dataset(tiny_run):
    return open_dataset(
        tiny_run[1], DataConfig(size=64, validate_fraction=0.2, test_fraction=0.2), progress=False
    )


@pytest.fixture
def copy(tiny_run, tmp_path):
    return shutil.copytree(tiny_run[0], tmp_path / 'run')


@pytest.mark.parametrize('name', ['<b>x', 'a & b', '"quoted"', 'ünï'])
def test_report_stands_alone(tiny_run, tmp_path, name):
    run = shutil.copytree(tiny_run[0], tmp_path / name)
    page = Page(report(run, steps=3).read_text(encoding='utf-8'))
    assert (
        name in page.text
        and 'b' not in page.tags
        and 'script' not in page.tags
        and 'link' not in page.tags
    )
    assert page.addresses and all(o.startswith('data:image/') for o in page.addresses)
    assert 'url(' not in page.text and 'http' not in page.text


def test_markup_in_conditions_is_escaped(copy):
    settings = json.loads((copy / 'config.json').read_text())
    settings['autoencoder']['data']['layout'] = '<script>alert(1)</script>'
    (copy / 'config.json').write_text(json.dumps(settings))
    assert 'script' not in Page(report(copy, steps=2).read_text()).tags


@pytest.mark.parametrize(
    'gone',
    [
        ['ldm.safetensors'],
        ['metrics.json'],
        ['log.jsonl'],
        ['samples'],
        ['ldm.safetensors', 'log.jsonl', 'samples', 'train_mean.safetensors'],
    ],
)
def test_report_of_what_is_there(copy, gone):
    merge_metrics(copy, 'other', dict(a=float('nan')))
    for name in gone:
        shutil.rmtree(copy / name) if (copy / name).is_dir() else (copy / name).unlink()
    page = Page(report(copy, steps=2).read_text())
    assert ('no diffusion model' in page.text) == ('ldm.safetensors' in gone) and (
        'Nothing was logged' in page.text
    ) == ('log.jsonl' in gone)
    assert 'Not measured yet' in page.text


def test_report_with_numbers(copy, model, dataset):
    scores = reconstruction_scores(model, dataset.subset('test'), copy)
    merge_metrics(copy, 'reconstruction test', scores)
    text = Page(report(copy, steps=2).read_text()).text
    # one test subject
    assert (
        show_number(scores['ssim']) in text
        and show_number(scores['baseline_mean_slice']['ssim_brain']) in text
        and 'n/a' in text
    )


def test_report_refuses(tiny_run, tmp_path):
    for place in (tmp_path / 'nowhere', tmp_path, tiny_run[1]):
        with pytest.raises(FileNotFoundError, match='not a run folder'):
            report(place)
    (tmp_path / 'config.json').write_text('{}')
    with pytest.raises((FileNotFoundError, ValueError)):
        report(tmp_path)
    assert not (tmp_path / 'report.html').exists()


def test_grids_of_odd_runs(model):
    "No conditions; one slice position; an autoencoder with covariates of its own."
    parts = dict(
        schedule=model.schedule, latent_mean=model.latent_mean, latent_std=model.latent_std
    )
    free = Sampler(model.autoencoder, 64, UNet(4, (16,), 1, (True,), 2, (), 16).eval(), **parts)
    assert len(sample_by_condition(free, columns=3, steps=2)[0].axes) == 3
    flat = (
        Covariate('slice', 'continuous', range=(4.0, 4.0)),
        Covariate('diagnosis', 'categorical', values=('AD', 'NC', 'MCI')),
    )
    one = Sampler(model.autoencoder, 64, UNet(4, (16,), 1, (True,), 2, flat, 16).eval(), **parts)
    assert len(sample_by_condition(one, columns=3, steps=2)[0].axes) == 3
    auto = AutoencoderKL(
        4,
        (16,),
        1,
        (False,),
        8,
        covariates=(
            Covariate('site', 'categorical', values=('a', 'b')),
            Covariate('age', 'continuous', range=(50.0, 90.0)),
        ),
    )
    told = Sampler(auto, 64, model.unet, **parts)
    assert default_conditions(told) == dict(site='a', age=70.0)
    grid, walk = sample_by_condition(told, columns=40, steps=1)
    assert len(grid.axes) == 2 * 6 and len(walk.axes) == 2 * 8


def test_slices_without_brain_are_named():
    scores = dict(
        ssim=0.5,
        ssim_brain=None,
        psnr=20.0,
        sharpness=None,
        interval_95=dict(ssim=None, ssim_brain=None),
        n_subjects=1,
        n_slices=2,
        n_slices_without_brain=1,
        baseline_mean_slice=dict(ssim=0.4, ssim_brain=None, psnr=None, sharpness=None),
    )
    section = report_numbers({'reconstruction test': scores})
    assert (
        section['table'][1][5] == 'n/a [n/a, n/a]'
        and '1 of the slices of test have no brain' in section['text']
    )


PART = dict(
    copies=0,
    threshold=0.8,
    near=0.01,
    level=0.5,
    p_value=0.5,
    most_of_one=1,
    p_subject=0.5,
    highest=0.6,
)
AUDIT = dict(
    whole=PART,
    half=PART,
    copies=0,
    copied_subjects=0,
    n_train_subjects=139,
    n=640,
    n_reference=1_900,
    n_reference_subjects=159,
    alpha=0.01,
    power={
        'none': dict(failed=0, trials=100, interval_95=(0.0, 0.04)),
        'mirrored': dict(caught=100, trials=100, interval_95=(0.96, 1.0)),
    },
    near=0.01,
    allowed=0.02,
    verdict='passed',
    reason='no sample is a copy',
)


def judged(**change):
    one = dict(
        frechet=2.0,
        kid=0.01,
        precision=0.9,
        recall=0.9,
        density=1.0,
        coverage=0.9,
        n=640,
        interval_95=dict(kid=[-0.1, 0.2], recall=[0.8, 0.95]),
    )
    excess = dict(kid=0.01, interval_95=[-0.03, 0.04])
    fidelity = dict(
        synthetic=one,
        reference=one,
        by_seed=[one, one],
        by_rotation=[one] * 5,
        n_reference_seen=0,
        excess=dict(excess, by_seed=[excess, excess]),
    )
    effect = {
        k: dict(value=1.0, interval_95=None)
        for k in ('slice_error', 'diagnosis_effect', 'fine_detail')
    }
    scores = dict(
        n=640,
        n_subjects=20,
        split='validate',
        seed=0,
        options={},
        reading=dict(
            slice=dict(error=0.9, interval_95=None, baseline=8.0),
            sex=dict(auc=None, interval_95=None, baseline=0.5),
        ),
        fidelity=fidelity,
        conditioning=dict(synthetic=effect, train=effect, held_out=effect, slices=[1]),
        diversity={
            k: dict(ms_ssim=0.7, interval_95=[0.69, 0.71])
            for k in ('synthetic', 'train', 'held_out')
        },
        memorization=AUDIT,
        utility={k: dict(auc=0.8, interval_95=[0.75, 0.85]) for k in ('real', 'synthetic', 'both')},
    )
    return {**json.loads(json.dumps(scores)), **change}


def test_targets():
    assert [o[4] for o in check_targets(judged())] == [
        'reached'
    ] * 5 and 'not reached' not in report_samples('ldm', judged())['text']
    scores = judged()
    scores['fidelity']['excess'].update(kid=0.3, interval_95=[0.2, 0.4])
    assert [o[4] for o in check_targets(scores)] == ['missed'] + [
        'reached'
    ] * 4 and 'than those of other real subjects' in report_samples('ldm', scores)['text']
    # held-out subjects that are far from all others: nothing changes
    scores['fidelity']['synthetic']['kid'] = scores['fidelity']['reference']['kid'] = 1.0
    assert check_targets(scores)[0][4] == 'missed'
    # too few subjects to say
    scores['fidelity']['excess'].update(kid=0.01, interval_95=[-0.2, 0.2])
    assert (
        check_targets(scores)[0][4] == 'unclear'
        and 'excess KID over real subjects: unclear.' in report_samples('ldm', scores)['text']
    )
    part = report_samples('ldm', judged(fidelity=dict(judged()['fidelity'], n_reference_seen=3)))
    assert 'was trained on 3 of them' in part['text'] and [
        o[0] for o in part['table'] if 'seed' in o[0]
    ] == ['excess KID, all seeds', 'excess KID, seed 1', 'excess KID, seed 2']
    old = judged(fidelity={k: dict(kid=0.01) for k in ('synthetic', 'baseline')})
    assert (
        'earlier version' in report_samples('ldm', old)['text']
        and not report_samples('ldm', old)['table']
    )
    assert len(check_targets({k: v for k, v in judged().items() if k != 'utility'})) == 4


REALISM = dict(
    spectrum=dict(
        synthetic={
            '8-16': dict(
                ratio=0.91, interval_95=[0.85, 0.97], reference=1.02, by_rotation=[0.99, 1.05]
            ),
            '16-24': dict(ratio=0.72, interval_95=None, reference=None, by_rotation=[1.0, 1.0]),
        },
        reconstructed={
            '8-16': dict(ratio=1.01, interval_95=[1.0, 1.02], reference=None, by_rotation=[])
        },
    ),
    detection=dict(
        auc=0.987,
        interval_95=[0.97, 0.99],
        n=[320, 640],
        control=dict(auc=0.512, interval_95=[0.4, 0.62], n=[640, 320]),
    ),
)


def test_spectrum_and_detection_beside_what_scans_get():
    first, second, classifier = realism_rows(judged(**REALISM))
    assert first[:3] == [
        'power over that of scans, 8-16 cycles',
        '0.91 [0.85, 0.97]; reconstructions 1.01 [1.00, 1.02]',
        '1.02 (rotations 0.99 to 1.05)',
    ]
    assert second[1:3] == ['0.72 [n/a, n/a]', 'n/a (rotations 1.00 to 1.00)']
    assert classifier[1:3] == ['0.987 [0.970, 0.990]', 'control 0.512 [0.400, 0.620]']
    no_autoencoder = dict(REALISM['spectrum'], reconstructed=None)
    assert realism_rows(dict(spectrum=no_autoencoder))[0][1] == '0.91 [0.85, 0.97]'
    part = report_samples('ldm', judged(**REALISM))
    assert all(o in part['table'] for o in (first, second, classifier))
    assert 'was not measured' not in part['text'] and '0.5 if it cannot tell' in part['text']


def test_scores_without_spectrum_and_detection_are_still_shown():
    assert realism_rows(judged()) == []
    part = report_samples('ldm', judged())
    assert not any('classifier of samples' in o[0] for o in part['table'])
    assert 'tell them from scans was not measured' in part['text']


def test_evaluate_prints_spectrum_and_detection(tiny_run, monkeypatch, capsys):
    monkeypatch.setattr(report_module, 'evaluate', lambda *args, **options: judged(**REALISM))
    monkeypatch.setattr(report_module, 'report', lambda run: run / 'report.html')
    assert main(['evaluate', str(tiny_run[0]), str(tiny_run[1])]) == 0
    said = capsys.readouterr().out.splitlines()
    line = 'classifier of samples and scans, AUC: 0.987 [0.970, 0.990]; real control 0.512'
    assert [o for o in said if o.startswith(line)]
    assert [o for o in said if o.startswith('power over that of scans, 8-16 cycles: 0.91')]


def test_both_are_on_the_page_and_on_the_card(copy):
    merge_metrics(copy, 'samples ldm', judged(**REALISM))
    page = Page(report(copy, steps=2).read_text()).text
    for text in (page, (copy / 'README.md').read_text()):
        for part in ('0.987', 'control 0.512', 'reconstructions 1.01'):
            assert part in text, part


def test_scores_are_on_the_page(copy):
    merge_metrics(
        copy,
        'samples ldm',
        judged(
            memorization=dict(
                AUDIT,
                verdict='failed',
                copies=7,
                copied_subjects=3,
                reason='7 samples copy slices of 3 train subjects',
            )
        ),
    )
    text = Page(report(copy, steps=2).read_text()).text
    for part in (
        'audit failed',
        'Look at the most similar pairs',
        '7 of 640',
        'mirrored',
        '100 of 100',
        'missed',
        'MNI152',
    ):
        assert part in text, part
    assert 'has not been audited' not in text


def test_an_audit_of_an_earlier_version_is_no_audit(copy):
    merge_metrics(
        copy,
        'samples ldm',
        judged(
            memorization=dict(
                share=0.01, allowed=0.02, verdict='passed', n=640, pixel=dict(share=0.01)
            )
        ),
    )
    text = Page(report(copy, steps=2).read_text()).text
    assert 'not audited' in text and 'audit passed' not in text


@pytest.mark.parametrize(
    'layout, shown', [('phantom', True), ('oasis', False), ('manifest', False)]
)
def test_real_pictures_stay_home(copy, layout, shown):
    settings = json.loads((copy / 'config.json').read_text())
    settings['autoencoder']['data']['layout'] = layout
    (copy / 'config.json').write_text(json.dumps(settings))
    merge_metrics(copy, 'samples ldm', judged())
    (copy / 'evaluation').mkdir()
    for name in ('synthetic', 'audit', 'pairs'):
        (copy / 'evaluation' / f'ldm_{name}.png').write_bytes(name.encode())
    real = {figure_uri(o.read_bytes()) for o in (copy / 'samples').glob('autoencoder_*.png')} | {
        figure_uri(b'pairs')
    }
    assert bool(real & set(Page(report(copy, steps=2).read_text()).addresses)) == shown
    assert (
        figure_uri(b'pairs') in Page(report(copy, steps=2, real_images=True).read_text()).addresses
    )
    assert not real & set(Page(report(copy, steps=2, real_images=False).read_text()).addresses)


def test_draw_like_asks_what_the_rows_say(model, dataset):
    rows = dataset.manifest.iloc[[3, 20]]
    requested = {c.name: rows[c.name].tolist() for c in model.covariates}
    torch.testing.assert_close(
        sample_matched(model, rows, steps=2, seed=5), model.sample(2, **requested, steps=2, seed=5)
    )
    assert sample_matched(model, rows, 'stage1').shape == (2, 1, 64, 64)


@pytest.mark.parametrize('told', [None, ()])
def test_codes_that_are_told_the_diagnosis(told, dataset, tmp_path):
    """An autoencoder with codes that knows diagnosis and no slice: each generator is told what it
    knows, and random codes are sampled by slice position."""
    shared, sizes = dict(
        total_images=16, batch_size=8, warmup_images=8, validate_every=1_000, checkpoint_every=1_000
    ), dict(channels=(16,), attention_levels=(False,))
    run = tmp_path / 'run'
    train_autoencoder(
        dataset,
        run,
        AEConfig(
            kind='vq',
            covariates=('diagnosis',),
            data=dataset.config,
            patch=8,
            latent_channels=4,
            num_embeddings=12,
            **sizes,
            **shared,
        ),
        progress=False,
    )
    train_prior(
        dataset,
        run,
        PriorConfig(covariates=('slice',), embed_dim=16, num_layers=1, num_heads=2, **shared),
        progress=False,
    )
    train_ldm(
        dataset,
        run,
        LDMConfig(
            covariates=told, num_res_blocks=1, cond_channels=16, preview_steps=2, **sizes, **shared
        ),
        progress=False,
    )
    assert 'Sampled code by code' in report(run, steps=2).read_text()
    rows, model = dataset.manifest.iloc[[0, 5, 12, 17]], BrainLDM.load(run)
    requested = {k: rows[k].tolist() for k in ('slice', 'diagnosis')}
    torch.testing.assert_close(
        sample_matched(model, rows, 'stage1'), model.sample_stage1(4, **requested)
    )
    assert not torch.equal(
        model.sample_stage1(4, **requested),
        model.sample_stage1(4, diagnosis=requested['diagnosis']),
    )


def test_evaluate_refuses(copy, dataset, tmp_path):
    with pytest.raises(ValueError, match='not what the autoencoder was trained on: image of'):
        evaluate(
            copy,
            type(dataset)(
                dataset.images, dataset.manifest.assign(hash='0' * 32), dataset.covariates
            ),
        )
    with pytest.raises(FileNotFoundError):
        evaluate(tmp_path / 'nowhere', dataset)
