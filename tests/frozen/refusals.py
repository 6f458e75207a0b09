"""Inputs that are refused, as they would be typed in a folder with ``yamls/``, a trained run and some images."""

import shlex
from typing import Any

from tests.frozen.commands import Commands
from tests.frozen.old_files import MODEL, RUN, unpack

RESULTS = 'images/results.json'
ROUTE = '{start: 2, end: -4, selection_rate: 0.5}'
DECODER = '{mask_ratio: 0.5, decoder_depth: 2, decoder_hidden_size: 48, decoder_num_heads: 4}'

REFUSED = f"""
# Words of the command line
tarin yamls/digits.yaml
train
train yamls/digits.yaml --what
train yamls/digits.yaml --optimizer.lr=1
train yamls/digits.yaml optimizer.lr
plan yamls/digits.yaml --ranks 0
# Files
train nowhere.yaml
train broken.yaml
train circle.yaml
train orphan.yaml
train list.yaml
train yamls/digits.yaml load_path=nowhere.pt
train yamls/digits.yaml 'data={{name: latents, local: nowhere}}' callbacks.digits_quality=null
train yamls/digits.yaml 'callbacks.evaluation={{reference: nowhere, features: digits, num_samples: 20, interval: 1ba}}'
# A wrong name, at every depth
train yamls/digits.yaml sed=3
train yamls/digits.yaml model.dept=3
train yamls/digits.yaml data.nmae=digits
train yamls/digits.yaml model.name=dti
train yamls/digits.yaml objective.name=flow
train yamls/digits.yaml optimizer.name=adamv
train yamls/digits.yaml optimizer.betas_=3
train yamls/digits.yaml scheduler.t_wramup=2ba
train yamls/digits.yaml objective.time_distribution.name=logitnormal
train yamls/digits.yaml objective.time_distribution.mena=1
train yamls/digits.yaml 'algorithms.tred={ROUTE}'
train yamls/digits_tread.yaml algorithms.tread.selction_rate=0.3
train yamls/digits.yaml 'callbacks.sample_gird={{}}'
train yamls/digits.yaml callbacks.sample_grid.sampler=foo
train yamls/digits.yaml 'loggers.mlflw={{}}'
train yamls/digits.yaml 'parallelism_config={{fsdp: {{state_dict_typ: full}}}}'
# A wrong type or a value out of range
train yamls/digits.yaml optimizer.lr=fast
train yamls/digits.yaml max_duration=700
train yamls/digits.yaml scheduler.t_warmup=20
train yamls/digits.yaml precision=fp33
train yamls/digits.yaml seed=-1
train yamls/digits.yaml label_dropout=1.0
train yamls/digits.yaml latent_scale=-1
train yamls/digits.yaml 'latent_scale=[1.0, 2.0]'
train yamls/digits.yaml model.patch_size=3
train yamls/digits.yaml model.num_heads=5
train yamls/digits.yaml global_train_batch_size=2000
train yamls/digits.yaml device_train_microbatch_size=7
train yamls/digits.yaml algorithms.ema.decay=2
train yamls/digits.yaml 'algorithms.power_ema={{widths: [0.5]}}'
train yamls/digits.yaml 'algorithms.power_ema={{interval: 5}}'
train yamls/digits_tread.yaml algorithms.tread.end=9
train yamls/digits_tread.yaml algorithms.tread.selection_rate=1.5
train yamls/digits_tread.yaml algorithms.tread.end_time=0.5
train yamls/digits.yaml 'run_name=${{nowhere}}'
# Settings that do not fit each other
plan yamls/digits.yaml --ranks 3
train yamls/digits.yaml 'autoencoder={{name: kl, path: x}}'
train yamls/digits.yaml algorithms.ema=null
train yamls/digits.yaml 'algorithms.composer_ema={{half_life: 10ba}}'
train yamls/digits.yaml 'algorithms.maskdit={DECODER}'
train yamls/digits_maskdit.yaml 'algorithms.tread={ROUTE}'
train yamls/digits_lightning.yaml 'algorithms.tread={ROUTE}' 'algorithms.tread.token_arguments=[x]'
train yamls/digits_mamba2.yaml 'algorithms.tread={ROUTE}' 'algorithms.tread.token_arguments=[x]'
train yamls/digits_lightning.yaml 'objective={{name: edm}}' 'algorithms.maskdit={DECODER}'
train yamls/digits.yaml 'algorithms.direction_schedule={{start_time: 0.1dur}}'
train yamls/digits_maskdit.yaml 'algorithms.direction_schedule={{start_time: 0.1dur}}'
train yamls/digits.yaml 'algorithms.cutmix={{}}'
train yamls/digits.yaml 'algorithms.low_precision_layernorm={{}}'
train yamls/digits_fasterdit.yaml latent_scale=2.0
train yamls/digits.yaml model.learn_sigma=true
train yamls/digits_ddpm.yaml model.learn_sigma=false
train yamls/digits_ddpm.yaml callbacks.sample_grid.num_steps=2000
train yamls/digits.yaml callbacks.sample_grid.sampler=ddpm
train yamls/digits.yaml compile=true 'compile_config={{}}'
train yamls/digits.yaml save_folder=null autoresume=true
train yamls/digits.yaml run_name=kept
# What this machine has not
train yamls/digits.yaml device=gpu
train yamls/digits.yaml precision=amp_bf16
train yamls/digits_mamba2.yaml model.kernel=fused
# After training
sample nowhere --out x
sample {RUN}
sample yamls --out x
sample {RUN} --out x --weights foo
sample {RUN} --out x --weights posthoc:0.5
sample {RUN} --out x --weights posthoc:0.2
sample {RUN} --out x --count 0
sample {RUN} --out x --seed -1
sample {RUN} --out x --classes 11
sample {RUN} --out x --guidance sparse
sample {RUN} --out x --guidance auto --guidance-scale 2
sample {RUN} --out x --sampler foo
sample {RUN} --out x --sampler ddpm
sample {RUN} --out x --steps 0
sample {RUN} --out x --format jpg
sample {RUN} --out x model.depth=3
sample {RUN} --out images --count 5
sample {MODEL} --out x --weights raw
evaluate nowhere --reference images --features digits
evaluate images
evaluate images --reference nowhere --features digits
evaluate images --reference images/images --features digits --metrics is
evaluate images --reference images --features digits --metrics fdi
evaluate images --reference images --features digits --count 3
evaluate {RUN} --reference images --features digits
evaluate {RUN} --reference images --features digits --count 4 --weights foo
sweep {RUN} --out x
sweep nowhere --reference images --features digits --out x
sweep {RUN} --reference images --features digits --out x --samples 1
sweep {RUN} --reference images --features digits --out x --interval 1
sweep {RUN} --reference images --features digits --out x --guidance-scale
compare {RESULTS}
compare {RESULTS} nowhere
compare {RESULTS} yamls
compare {RESULTS} {RUN}
compare {RESULTS} {RESULTS}#nobody
compare {RESULTS} {RESULTS} --metric foo
export nowhere
export {RUN} --out model.pt
export {RUN} --out {MODEL}
export {RUN} --out x.safetensors --weights posthoc:0.13
export {RUN} --out x.safetensors --allow-inexact
export {MODEL} --out x.safetensors --weights raw
import nowhere --out x.safetensors
import {MODEL} --out x.safetensors --layout dit
import {MODEL} --out x.safetensors --layout foo
import {MODEL} --out x.safetensors --route 1,2
inspect nowhere
inspect {RUN} --samples 0
inspect {RUN} --times 2
inspect {RUN} --data nowhere
inspect {RUN} --weights foo
"""

LINES = tuple(line for line in REFUSED.splitlines() if line and not line.startswith('#'))

WRONG_FILES = {
    'broken.yaml': 'run_name: [broken\n',
    'circle.yaml': 'extends: circle.yaml\n',
    'orphan.yaml': 'extends: nowhere.yaml\n',
    'list.yaml': '- run_name: list\n',
}


def record_refusals(commands: Commands) -> dict[str, Any]:
    """Exit code, message, and files that were written all the same, of each of ``LINES``."""
    unpack(commands.folder)
    for name, text in WRONG_FILES.items():
        (commands.folder / name).write_text(text)
    commands.succeed('sample', RUN, '--count', '4', '--steps', '2', '--out', 'images')
    how = ('--reference', 'images/images', '--features', 'digits', '--cache', 'cache')
    commands.succeed('evaluate', 'images', *how)
    return {line: _refusal(commands, line) for line in LINES}


def _refusal(commands: Commands, line: str) -> dict[str, Any]:
    words = shlex.split(line)
    if words[0] == 'train' and len(words) > 1 and 'max_duration' not in line:
        words.append('max_duration=1ba')  # were it accepted by mistake, it should not take minutes to show
    before = _files(commands)
    done = commands(*words)
    return {
        'code': done.returncode,
        'out': commands.normalised(done.stdout),
        'err': commands.normalised(done.stderr),
        'written': sorted(_files(commands) - before),
    }


def _files(commands: Commands) -> set[str]:
    paths = commands.folder.rglob('*')
    return {str(path.relative_to(commands.folder)) for path in paths if not path.name.startswith('.')}
