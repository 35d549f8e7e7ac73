"""From the raw folder to the first sample, in every layout that people have.

python tests/benchmarks/raw_to_sample.py [--rows NAME ...] [--work FOLDER]

Each row builds a small folder on the spot, out of synthetic heads and phantoms, and types the
commands that its user would type: `prepare` where it holds volumes, `check`, `train autoencoder`,
`train ldm`, `sample`. A row ends in a conditioned sample, or in a refusal that names the remedy.
The exit status is 1 if a row does not end as it should. What the gate makes of
broken heads is measured by `prepare.py`."""

import argparse
import contextlib
import json
import os
import re
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from unittest.mock import patch

import nibabel as nib
import numpy as np
import pandas as pd
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from PIL import Image

from brainldm.engineering import heads as heads_module
from brainldm.engineering.configs import PhantomConfig
from brainldm.engineering.heads import ORIENTATIONS, VOXELS, synthetic_head
from brainldm.engineering.phantom import make_subject

NUM_SUBJECTS = 4  # Heads of a row: two trained on, one to validate on, one to test on
SCALE = 2.4  # Voxels of the heads, mm: a fifteenth of the voxels of a scan
NUM_PHANTOMS, NUM_SLICES = 6, 6  # Of the rows of images
SHORT = '--preset tiny --total-images 32'  # As short as a training can be
COMMAND = re.compile(r'(?:train )?\w+')  # The command without its words


# The subjects


@dataclass
class Subject:
    "A synthetic head, with what a table says of it."

    number: int
    image: nib.Nifti1Image  # Raw, with skull and neck
    mask: nib.Nifti1Image  # Where its brain is
    diagnosis: str
    age: int
    sex: str

    def brain(self):
        "The head without its skull."
        voxels = np.where(self.mask.dataobj, self.image.dataobj, 0)
        return nib.Nifti1Image(voxels, self.image.affine)


@lru_cache(maxsize=None)
def make_head(number, visit=0, voxel_mm=(SCALE,) * 3, axes='RAS', still=False):
    "One visit of a subject, lying otherwise in the scanner than the visit before, and its mask."
    rng = np.random.default_rng([number, visit])
    about = dict(
        voxel_mm=voxel_mm,
        axes=axes,
        tilt=(0, 0, 0) if still else tuple(rng.normal(0, 6, 3)),
        shift_mm=(0, 0, 0) if still else tuple(rng.normal(0, 6, 3)),
        ventricle_mm=1 + 2 * (number % 2),
    )
    image = synthetic_head(number, **about)
    head, affine = heads_module.head_around_template()
    inside = np.pad(heads_module.load_template().mask, heads_module.PAD).astype(np.float32)
    with patch.object(heads_module, 'head_around_template', lambda: (inside, affine)):
        mask = synthetic_head(number, **about, bias=0, noise=0)
    brain = nib.Nifti1Image((np.asarray(mask.dataobj) > 500).astype(np.uint8), image.affine)
    ages = np.random.default_rng(number).integers(60, 90)
    return Subject(number, image, brain, ('NC', 'AD')[number % 2], int(ages), 'FM'[number // 2 % 2])


def make_subjects(**about):
    "The cohort."
    return [make_head(i, **about) for i in range(NUM_SUBJECTS)]


def save(image, path):
    "Write a volume, and the folders above it."
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)


def turn(image, axes):
    "Store an image with other axes."
    ornt = ornt_transform(io_orientation(image.affine), axcodes2ornt(axes))
    return image.as_reoriented(ornt)


def write_table(path, rows, **settings):
    "Write a table of subjects."
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(path, index=False, **settings)


# The layouts: each writes its folder


def put_bids(root, visits=('M00', 'M12')):
    "BIDS, raw, two sessions of each subject."
    rows = []
    for o in make_subjects():
        name = f'sub-{o.number+1:02d}'
        for i, visit in enumerate(visits):
            anat = root / name / f'ses-{visit}' / 'anat'
            save(make_head(o.number, i).image, anat / f'{name}_ses-{visit}_T1w.nii.gz')
        row = dict(participant_id=name, diagnosis=o.diagnosis, age=o.age, sex=o.sex)
        rows.append(row)
    write_table(root / 'participants.tsv', rows, sep='\t')
    about = '{"Name": "x", "BIDSVersion": "1.9.0"}'
    (root / 'dataset_description.json').write_text(about)


def put_adni(root):
    "A download tree of ADNI, with the table that its archive gives."
    rows = []
    for o in make_subjects():
        subject = f'{o.number+2:03d}_S_{295+o.number:04d}'
        for kind, number in (('MP-RAGE', 45108), ('MP-RAGE_REPEAT', 45208), ('Localizer', 45308)):
            image = f'I{number+o.number}'
            folder = root / 'ADNI' / subject / kind / '2006-04-18_08_20_30.0' / image
            name = f'ADNI_{subject}_MR_{kind}_Br_20070217012345678_S13408_{image}.nii'
            save(o.image, folder / name)
            row = {'Image Data ID': image, 'Subject': subject, 'Sex': o.sex, 'Age': o.age}
            row['Group'] = dict(NC='CN').get(o.diagnosis, o.diagnosis)
            rows.append(row | {'Visit': 'sc', 'Description': kind, 'Acq Date': '4/18/2006'})
    write_table(root / 'ADNI1_Screening_1.5T_11_30_2026.csv', rows)


def oasis_table():
    "The table of OASIS-1, which rates dementia and gives no diagnosis."
    return [
        {
            'ID': f'OAS1_{o.number+1:04d}_MR1',
            'M/F': o.sex,
            'Hand': 'R',
            'Age': o.age,
            'Educ': 2,
            'SES': 3,
            'MMSE': 29,
            'CDR': 0.5 if o.diagnosis == 'AD' else 0,
            'eTIV': 1344,
            'nWBV': 0.743,
            'ASF': 1.306,
            'Delay': 'N/A',
        }
        for o in make_subjects()
    ]


def put_oasis_disc(root):
    "A disc of OASIS-1: Analyze, whose headers do not say where left is."
    for o in make_subjects():
        name = f'OAS1_{o.number+1:04d}_MR1'
        image = turn(o.image, 'ASL')
        header = np.diag([*image.header.get_zooms()[:3], 1])
        analyze = nib.AnalyzeImage(np.asarray(image.dataobj), header)
        for place in ('RAW/{}_mpr-1_anon', 'PROCESSED/MPRAGE/SUBJ_111/{}_mpr_n4_anon_sbj_111'):
            save(analyze, root / 'disc1' / name / f'{place.format(name)}.hdr')
        save(
            analyze,
            root / 'disc1' / name / f'FSL_SEG/{name}_mpr_n4_anon_111_t88_masked_gfc_fseg.hdr',
        )
    write_table(root / 'oasis_cross-sectional.csv', oasis_table())


def put_oasis_nifti(root):
    "OASIS-1 as NIfTI in one folder, with its workbook."
    for o in make_subjects():
        save(o.image, root / f'OAS1_{o.number+1:04d}_MR1_mpr-1_anon.nii.gz')
    pd.DataFrame(oasis_table()).to_excel(root / 'oasis_cross-sectional.xlsx', index=False)


def plain_table(names):
    "A table as a researcher keeps it."
    pairs = zip(names, make_subjects())
    return [dict(ID=name, Group=o.diagnosis, Age=o.age, Sex=o.sex) for name, o in pairs]


def put_freesurfer(root):
    "A subjects folder of FreeSurfer: 256 cubed, 1 mm."
    from nibabel.processing import resample_from_to

    affine = np.array([[-1, 0, 0, 128], [0, 0, 1, -128], [0, -1, 0, 128], [0, 0, 0, 1.0]])
    grid = ((256,) * 3, affine)
    names = [f'P{o.number+1:02d}' for o in make_subjects()]
    for name, o in zip([*names, 'fsaverage'], [*make_subjects(), make_head(0)]):
        head = np.asarray(resample_from_to(o.image, grid, order=1).dataobj)
        mask = np.asarray(resample_from_to(o.mask, grid, order=0).dataobj)
        head = (head * (110 / np.percentile(head[mask > 0], 90))).clip(0, 255).astype(np.uint8)
        for file, voxels in (('T1', head), ('brainmask', head * mask), ('aseg', 41 * mask)):
            save(nib.MGHImage(voxels.astype(np.uint8), affine), root / name / f'mri/{file}.mgz')
    write_table(root / 'demographics.csv', plain_table(names))


def put_fmriprep(root):
    "Derivatives of fMRIPrep, and the table in the raw folder."
    rows = []
    for o in make_subjects():
        name = f'sub-{o.number+1:02d}'
        anat = root / 'fmriprep' / name / 'anat'
        for space in ('', '_space-MNI152NLin2009cAsym_res-2'):
            save(o.image, anat / f'{name}{space}_desc-preproc_T1w.nii.gz')
            save(o.mask, anat / f'{name}{space}_desc-brain_mask.nii.gz')
            save(o.mask, anat / f'{name}{space}_dseg.nii.gz')
        rows.append(dict(participant_id=name, group=o.diagnosis, age=o.age, sex=o.sex))
    write_table(root / 'raw' / 'participants.tsv', rows, sep='\t')


def put_cat12(root):
    "What CAT12 left beside the scans."
    names = [f'P{o.number+1:02d}' for o in make_subjects()]
    for name, o in zip(names, make_subjects(still=True)):
        save(make_head(o.number).image, root / f'{name}.nii')
        save(o.brain(), root / f'mri/wm{name}.nii')
        for maps in ('mwp1', 'mwp2', 'p0'):
            save(o.brain(), root / f'mri/{maps}{name}.nii')
        save(o.mask, root / f'mri/y_{name}.nii')
    write_table(root / 'subjects.csv', plain_table(names), sep=';')


def put_orientations(root):
    "One folder, five orders of axes and five voxel sizes."
    rows = []
    for i, (axes, voxel) in enumerate(zip(ORIENTATIONS, VOXELS)):
        o = make_head(i, axes=axes, voxel_mm=tuple(SCALE * v for v in voxel))
        save(o.image, root / f'scan{i+1:03d}.nii.gz')
        rows.append(dict(subject=f'scan{i+1:03d}', diagnosis=o.diagnosis, age=o.age, sex=o.sex))
    write_table(root / 'subjects.csv', rows)


def write_series(image, folder, patient):
    "Write a head as an axial series of DICOM."
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

    folder.mkdir(parents=True)
    turned = turn(image, 'LPS')
    voxels = np.asarray(turned.dataobj).astype(np.uint16)
    lps = np.diag([-1.0, -1, 1, 1]) @ turned.affine
    size = np.linalg.norm(lps[:3, :3], axis=0)
    cosines = lps[:3, :3] / size
    study, series, frame = (generate_uid(entropy_srcs=[patient, o]) for o in 'abc')
    for k in range(voxels.shape[2]):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = MRImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[series, str(k)])
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds = FileDataset(None, {}, file_meta=meta, preamble=b'\0' * 128)
        ds.SOPClassUID, ds.SOPInstanceUID = MRImageStorage, meta.MediaStorageSOPInstanceUID
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = study, series, frame
        ds.PatientID, ds.PatientName, ds.Modality = patient, 'nobody', 'MR'
        ds.StudyDate, ds.StudyTime, ds.Manufacturer = '20200102', '101010', 'SIEMENS'
        ds.SeriesDescription = ds.ProtocolName = 'T1_MPRAGE_SAG'
        ds.SeriesNumber, ds.InstanceNumber, ds.AcquisitionNumber = 3, k + 1, 1
        ds.ImageType = ['ORIGINAL', 'PRIMARY', 'M', 'ND']
        ds.MRAcquisitionType, ds.ScanningSequence, ds.SequenceVariant = '3D', 'GR', 'SP'
        ds.EchoTime, ds.RepetitionTime, ds.MagneticFieldStrength = 3.0, 2300.0, 3.0
        ds.SliceThickness = ds.SpacingBetweenSlices = round(float(size[2]), 4)
        ds.PixelSpacing = [round(float(size[1]), 4), round(float(size[0]), 4)]
        ds.ImageOrientationPatient = [float(v) for v in cosines[:, :2].T.round(6).ravel()]
        place = (lps @ [0, 0, k, 1])[:3]
        ds.ImagePositionPatient = [float(v) for v in place.round(4)]
        ds.SliceLocation = float(place[2].round(4))
        ds.Rows, ds.Columns = voxels.shape[1], voxels.shape[0]
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, 'MONOCHROME2'
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
        ds.PixelData = voxels[:, :, k].T.tobytes()
        pydicom.dcmwrite(folder / f'IM{k:04d}', ds, enforce_file_format=True)


def put_dicom(root):
    "A folder of DICOM for each patient, files without a suffix."
    names = [f'P{o.number+1:03d}' for o in make_subjects()]
    for name, o in zip(names, make_subjects()):
        write_series(o.image, root / name / 'STUDY1' / 'SERIES3', name)
    write_table(root / 'patients.csv', plain_table(names))


def put_classes(root):
    "Volumes in class folders; the folders are the table."
    for o in make_subjects():
        save(o.image, root / o.diagnosis / f'P{o.number+1:02d}.nii.gz')


def put_folders(root):
    "One folder a subject, all files called alike."
    names = [f'P{o.number+1:02d}' for o in make_subjects()]
    for name, o in zip(names, make_subjects()):
        save(o.image, root / name / 'T1.nii.gz')
    write_table(root / 'subjects.csv', plain_table(names))


def put_brats(root):
    "BraTS: four contrasts without skull, and a label map; its two tables."
    rows, grades = [], []
    for o in make_subjects(still=True):
        name = f'BraTS20_Training_{o.number+1:03d}'
        for kind in ('t1', 't1ce', 't2', 'flair'):
            save(o.brain(), root / name / f'{name}_{kind}.nii')
        save(o.mask, root / name / f'{name}_seg.nii')
        rows.append(dict(Brats20ID=name, Age=o.age, Survival_days=300, Extent_of_Resection='GTR'))
        grades.append(dict(Grade='HGG', BraTS_2020_subject_ID=name))
    write_table(root / 'survival_info.csv', rows)
    write_table(root / 'name_mapping.csv', grades)


def put_lfs(root):
    "A repository whose large files were never fetched."
    for i in range(NUM_SUBJECTS):
        path = root / f'sub-{i+1:02d}' / 'anat' / f'sub-{i+1:02d}_T1w.nii.gz'
        path.parent.mkdir(parents=True)
        path.write_text(
            'version https://git-lfs.github.com/spec/v1\noid sha256:' + 64 * '0' + '\nsize 9\n'
        )


def put_datalad(root):
    "A data set of DataLad that was cloned and not fetched."
    for i in range(NUM_SUBJECTS):
        path = root / f'sub-{i+1:02d}' / 'anat' / f'sub-{i+1:02d}_T1w.nii.gz'
        path.parent.mkdir(parents=True)
        path.symlink_to('../../.git/annex/objects/Xx/0q/MD5E-s9--0.nii.gz/MD5E-s9--0.nii.gz')


# Images of slices


@lru_cache(maxsize=1)
def make_phantoms():
    "Slices of each phantom, with what a table says of it."
    config = PhantomConfig(num_subjects=NUM_PHANTOMS, num_slices=NUM_SLICES, size=64)
    return [make_subject(config, i) for i in range(NUM_PHANTOMS)]


def put_images(root, name, color=False):
    "Write every slice under the name that `name` gives it: a function of number, diagnosis, slice."
    for i, o in enumerate(make_phantoms()):
        for k, image in enumerate(o.vol):
            path = root / name(i, o.diagnosis, k)
            path.parent.mkdir(parents=True, exist_ok=True)
            shown = Image.fromarray(image)
            (shown.convert('RGB') if color else shown).save(path)


def put_stacks(root):
    "PNG stacks with names of one's own, and a table."
    put_images(root, lambda i, d, k: f'P{i+1:02d}-z{k+30:03d}.png')
    rows = [
        dict(subject=f'P{i+1:02d}', diagnosis=o.diagnosis, age=int(o.age), sex=o.sex)
        for i, o in enumerate(make_phantoms())
    ]
    write_table(root / 'subjects.csv', rows)


KAGGLE = dict(NC='Non Demented', AD='Mild Dementia')


def put_kaggle_oasis(root):
    "The OASIS images of Kaggle: color JPEG in class folders."
    put_images(
        root,
        lambda i, d, k: f'{KAGGLE[d]}/OAS1_{i+1:04d}_MR1_mpr-1_{k+100}.jpg',
        color=True,
    )


def put_png_classes(root):
    "The ADNI images that circulate: class folders in splits."
    parts = ('train', 'train', 'train', 'train', 'test', 'test')
    put_images(root, lambda i, d, k: f'AD_NC/{parts[i]}/{d}/{218391+i}_{k+70}.jpeg')


def put_four_classes(root):
    "The four-class set of Kaggle, whose names do not say whose a slice is."
    folders = dict(NC='Non_Demented/nonDem', AD='Mild_Demented/mildDem')
    put_images(root, lambda i, d, k: f'{folders[d]}{i*NUM_SLICES+k}.jpg')


# The table


@dataclass
class Row:
    "A layout, what its user types, and how that must end."

    title: str
    build: Callable  # Writes the raw folder
    prepare: str | None = ''  # Flags of `prepare`; None where there are images
    data: str = ''  # Flags of `check` and `train`
    condition: str = '--diagnosis AD'  # Of the sample
    own: int = 0  # Lines of the user's own making
    refused: str = ''  # What the refusal says; empty where it ends in a sample
    below: str = ''  # Folder in the raw folder that is given


ROWS = dict(
    bids=Row('BIDS, two sessions', put_bids),
    bids_all=Row('the same, every session', put_bids, '--session all', own=1),
    adni=Row('ADNI tree and IDA table', put_adni),
    oasis_disc=Row('OASIS-1 disc (Analyze)', put_oasis_disc),
    oasis_nifti=Row('OASIS NIfTI and workbook', put_oasis_nifti),
    freesurfer=Row('FreeSurfer subjects folder', put_freesurfer),
    fmriprep=Row(
        'fMRIPrep derivatives',
        put_fmriprep,
        '--subjects RAW/raw/participants.tsv',
        own=1,
        below='fmriprep',
    ),
    cat12=Row('CAT12', put_cat12),
    orientations=Row('five orientations and voxel sizes, CSV', put_orientations),
    dicom=Row('DICOM', put_dicom),
    classes=Row('class folders AD, NC of volumes', put_classes),
    folders=Row('one folder a subject', put_folders),
    brats=Row(
        'BraTS (label map never an image)',
        put_brats,
        condition='--age 75',
    ),
    stacks=Row(
        'PNG stacks',
        put_stacks,
        None,
        "--pattern '{subject}-z{slice}.png'",
        own=1,
    ),
    kaggle_oasis=Row(
        'Kaggle OASIS JPEG',
        put_kaggle_oasis,
        None,
        '--to-gray',
        f"--diagnosis '{KAGGLE['AD']}'",
        own=1,
    ),
    png_classes=Row('PNG class folders in splits', put_png_classes, None),
    four_classes=Row(
        'Kaggle four-class', put_four_classes, None, refused='do not say whose|no split can|subject'
    ),
    lfs=Row('Git LFS pointers', put_lfs, refused='git lfs pull'),
    datalad=Row('DataLad links', put_datalad, refused='datalad get'),
)


def commands_of(row):
    "What the user types, in the folder where RAW lies."
    raw = '/'.join(['RAW', *[row.below] * bool(row.below)])
    data, out = raw, []
    if row.prepare is not None:
        data = 'prepared'
        # one worker: seconds and memory are then those of one head
        out.append(f'prepare {raw} prepared {row.prepare} --workers 1')
    out += [
        f'check {data} {row.data} --preset tiny',
        f'train autoencoder {data} --run run {row.data} {SHORT}',
        f'train ldm {data} --run run {SHORT}',  # the run knows how its data are read
        f'sample run {row.condition} --n 1',
    ]
    return [re.sub(' +', ' ', o).strip() for o in out]


def run_commands(row, folder):
    "Type the commands one after the other, until one is refused; note what each said."
    from brainldm.engineering.cli import main

    os.chdir(folder)
    for command in commands_of(row):
        start, said = time.perf_counter(), folder / 'said.txt'
        with said.open('w') as f, contextlib.redirect_stdout(f), contextlib.redirect_stderr(f):
            try:
                status = main(shlex.split(command)) or 0
            except SystemExit as e:
                status = e.code if isinstance(e.code, int) else 1
                print(e.code)
            except Exception:
                traceback.print_exc()
                status = 70
        note = dict(
            command=command,
            status=status,
            seconds=time.perf_counter() - start,
            said=said.read_text(),
        )
        with (folder / 'commands.jsonl').open('a') as f:
            f.write(json.dumps(note) + '\n')
        if status:
            return


def run_row(row, folder):
    "Run a row in a process of its own: what each command said, peak memory in GB."
    row.build(folder / 'RAW')
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        try:
            run_commands(row, folder)
        finally:
            os._exit(0)
    _, _, usage = os.wait4(pid, 0)
    done = [json.loads(o) for o in (folder / 'commands.jsonl').read_text().splitlines()]
    return done, usage.ru_maxrss / 2**20


def judge(row, done, folder):
    "How a row ended, and whether it should."
    last = done[-1]
    if row.refused:
        right = last['status'] == 1 and re.search(row.refused, last['said'])
        return f"refused by `{last['command'].split()[0]}`", bool(right)
    images = list((folder / 'run/samples').glob('generated_*/*.png'))
    if last['status'] or not last['command'].startswith('sample'):
        return f"status {last['status']} of `{last['command']}`", False
    return f'a sample ({row.condition[2:]})', bool(images)


def main():
    "Run the rows and print the table."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rows', nargs='+', choices=list(ROWS), default=list(ROWS))
    parser.add_argument('--work', type=Path, help='new folder that is kept; else a temporary one')
    args = parser.parse_args()
    import brainldm.engineering.cohort  # noqa: F401  what each row's process needs is imported once
    import brainldm.engineering.report  # noqa: F401

    lines, good = [], True
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        os.environ['BRAINLDM_CACHE'] = str((work / 'cache').resolve())
        for name in args.rows:
            row, folder = ROWS[name], (work / name).resolve()
            folder.mkdir(parents=True)
            done, memory = run_row(row, folder)
            ends, right = judge(row, done, folder)
            good &= right
            heads = len(list((folder / 'prepared/records').glob('*.json')))
            total = sum(o['seconds'] for o in done)
            cells = [
                row.title,
                ', '.join(' '.join(COMMAND.match(o['command'])[0].split()) for o in done),
                str(row.own),
                ends + '' * right + ' **wrong**' * (not right),
                f"{done[0]['seconds']/heads:.0f}" if heads else '',
                f'{memory:.1f}',
                f'{total:.0f}',
            ]
            lines.append(f"| {' | '.join(cells)} |")
            print(f'{time.strftime("%H:%M:%S")} {lines[-1]}', flush=True)
            for o in done if not right else ():
                print(
                    f"$ brainldm {o['command']}\n{o['said'][-3000:]}\n[{o['status']}]", flush=True
                )
    head = '| row | commands | own lines | ends in | s a head | memory, GB | seconds |'
    print(f"\n{head}\n|{'---|'*7}", *lines, sep='\n')
    return 0 if good else 1


if __name__ == '__main__':
    sys.exit(main())
