"""How runs are launched: the ready files, processes that do not know each other, and what a device cannot do."""
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from mixsize_timm import build, processes
from mixsize_timm.args import parse_args
from mixsize_timm.build import create_accelerator
from mixsize_timm.errors import UsageError

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / 'recipes' / 'accelerate').glob('*.yaml'))
LAUNCH = [sys.executable, '-m', 'accelerate.commands.launch', '--config_file']
TRAIN = ['-m', 'mixsize_timm.train', '--device', 'cpu', '--model', 'test_vit', '--num-classes', '2', '--img-size', '32',
         '--mixsize', 'off', '-b', '4', '--epochs', '1', '-j', '0']


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Nothing in the environment tells of processes, and what a run changes of torch is put back."""
    for name in [*processes._WORLDS, *(name for name in os.environ if name.startswith('ACCELERATE_'))]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('CUBLAS_WORKSPACE_CONFIG', ':16:8')  # and deleted behind the test, if it was not there
    monkeypatch.setattr(processes, 'launcher_command', lambda: [])
    before = torch.are_deterministic_algorithms_enabled()
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    benchmark, threads = torch.backends.cudnn.benchmark, torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(before)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn
    torch.backends.cudnn.benchmark = benchmark
    torch.set_num_threads(threads)


def arguments(*argv):
    return parse_args(['--data-dir', 'x', *argv])


# The ready files


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_accelerate_reads_the_file_and_its_header_holds_the_command(path):
    config = load_config_from_file(str(path))
    args = launch_command_parser().parse_args(['--config_file', str(path), '--gpu_ids', 'all', 'script'])
    args, _, _ = _validate_launch_command(args)
    assert args.num_processes == config.num_processes and args.num_machines == config.num_machines
    assert args.mixed_precision == config.mixed_precision
    assert f'accelerate launch --config_file recipes/accelerate/{path.name} ' in path.read_text()
    assert args.use_fsdp == (path.stem == 'fsdp') and (not args.use_fsdp or args.fsdp_version == 2)
    assert args.multi_gpu == (path.stem in ('two_cpu', 'eight_gpus_bf16', 'two_nodes'))


def test_there_is_a_file_for_each_case():
    assert {path.stem for path in FILES} == {'one_cpu', 'two_cpu', 'one_gpu_bf16', 'eight_gpus_bf16', 'fsdp',
                                             'two_nodes'}


def test_the_script_for_slurm_is_told_of_the_end_and_goes_on():
    path = ROOT / 'recipes' / 'accelerate' / 'slurm.sh'
    subprocess.run(['bash', '-n', path], check=True)
    text = path.read_text()
    for part in ('#SBATCH --signal=B:USR1@120', '#SBATCH --requeue', 'trap stop USR1 TERM', '--resume auto',
                 '--experiment', 'scontrol requeue'):
        assert part in text, part


def run_all(commands):
    env = {**os.environ, 'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': '1'}
    running = [subprocess.Popen(list(map(str, command)), env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                text=True) for command in commands]
    try:
        said = [process.communicate(timeout=300) for process in running]
    finally:
        for process in running:
            process.kill()
    for process, (_, errors) in zip(running, said):
        assert process.returncode == 0, errors[-3000:]
    return ''.join(errors for _, errors in said)


def free_port():
    with socket.socket() as place:
        place.bind(('127.0.0.2', 0))
        return place.getsockname()[1]


@pytest.mark.parametrize('nodes', [1, 2])
def test_two_processes_on_cpus_train_together(tmp_path, image_folder, nodes):
    """By the file for one machine, and by that for two: two launchers, which meet at an address of the first."""
    if nodes == 1:
        launchers = [[*LAUNCH, FILES[-1].with_stem('two_cpu')]]
    else:
        shared = [*LAUNCH, FILES[-1].with_stem('two_nodes'), '--num_processes', 2, '--mixed_precision', 'no',
                  '--main_process_ip', '127.0.0.2', '--main_process_port', free_port(), '--machine_rank']
        launchers = [[*shared, rank] for rank in range(2)]
    train = [*TRAIN, '--data-dir', image_folder, '--output', tmp_path, '--experiment', 'run']
    said = run_all([*launcher, *train] for launcher in launchers)
    assert 'on 2 processes of cpu' in said
    state = json.loads((tmp_path / 'run' / 'last' / 'state.json').read_text())
    assert len(dict(state['__items__'])['random']) == 2


# Processes that do not know each other


@pytest.mark.parametrize('name, message', [
    ('WORLD_SIZE', 'WORLD_SIZE is 2, but the processes do not know each other: this one sees 1; on CPUs add'),
    ('OMPI_COMM_WORLD_SIZE', 'on GPUs use torchrun or accelerate launch'),
    ('PMI_SIZE', 'on GPUs use torchrun or accelerate launch'),
    ('SLURM_STEP_NUM_TASKS', 'let srun start one launcher on each machine')])
def test_processes_that_are_alone_are_refused(monkeypatch, name, message):
    monkeypatch.setenv(name, '2')
    with pytest.raises(UsageError, match=message):
        create_accelerator(arguments())


@pytest.mark.parametrize('words, message', [
    ('accelerate launch --cpu --num_processes 2 -m mixsize_timm.train', 'asked for 2 processes and this run has 1'),
    ('python -m accelerate.commands.launch --cpu --num_processes 3 -m mixsize_timm.train', 'asked for 3 processes'),
    ('python /bin/accelerate launch --config_file {file} -m mixsize_timm.train', 'asked for 2 processes'),
    ('accelerate launch --cpu --use_deepspeed train.py', 'DeepSpeed steps inside the backward pass'),
    ('accelerate-launch --use_fsdp train.py', 'FSDP needs GPUs and a launcher')])
def test_a_launcher_that_starts_something_else_than_it_was_asked_for_is_refused(monkeypatch, tmp_path, words, message):
    file = tmp_path / 'config.yaml'
    file.write_text('distributed_type: MULTI_CPU\nuse_cpu: true\nnum_processes: 2\nmixed_precision: "no"\n')
    monkeypatch.setattr(processes, 'launcher_command', lambda: words.format(file=file).split())
    with pytest.raises(UsageError, match=message):
        create_accelerator(arguments())


@pytest.mark.parametrize('words', ['bash', 'accelerate launch --cpu --num_processes 1 -m mixsize_timm.train',
                                   'python -m pytest launch', 'accelerate launch --cpu script.py --num_processes 2',
                                   'accelerate launch --unknown'])
def test_a_launcher_of_one_process_is_not(monkeypatch, words):
    monkeypatch.setattr(processes, 'launcher_command', words.split)
    assert create_accelerator(arguments()).num_processes == 1


@pytest.mark.parametrize('name, message', [
    ('USE_DEEPSPEED=true', 'DeepSpeed steps inside the backward pass, where the smoother never sees the gradient'),
    ('USE_MEGATRON_LM=true', 'Megatron-LM trains models of its own'),
    ('USE_FSDP=true', 'FSDP needs GPUs and a launcher'),
    ('DYNAMO_BACKEND=INDUCTOR', 'configured to compile by itself'),
    ('GRADIENT_ACCUMULATION_STEPS=4', 'use --grad-accum-steps'),
    ('MIXED_PRECISION=fp8', 'fp8 is not supported'),
    ('MIXED_PRECISION=fp16', 'fp16 needs a GPU')])
def test_what_accelerate_would_do_by_itself_is_refused(monkeypatch, name, message):
    name, value = name.split('=')
    monkeypatch.setenv(f'ACCELERATE_{name}', value)
    with pytest.raises(UsageError, match=message):
        create_accelerator(arguments('--device', 'cpu'))


def alike(*ranks):
    told = [(rank, f'machine{rank}', versions, digest) for rank, versions, digest in ranks]
    processes._check_alike(arguments(), told)


def test_ranks_that_disagree_are_named(monkeypatch):
    alike((0, 'torch 2', 'a'), (1, 'torch 2', 'a'))
    with pytest.raises(UsageError, match='ranks must be 0 to 1, each once, not 0, 0'):
        alike((0, 'torch 2', 'a'), (0, 'torch 2', 'a'))
    with pytest.raises(UsageError, match='rank 1 was on machine1 with torch 3, and rank 0 on machine0 with torch 2'):
        alike((0, 'torch 2', 'a'), (1, 'torch 3', 'a'))
    told = [processes._comparable(arguments('--lr', value)) for value in ('0.1', '0.1', '0.2')]
    monkeypatch.setattr(processes, 'gather_object', lambda _: told)
    with pytest.raises(UsageError, match='^rank 2 was started with other arguments than rank 0: lr; lr is 0.2 and on '
                                         'rank 0 0.1$'):
        alike((0, 'torch 2', 'a'), (1, 'torch 2', 'a'), (2, 'torch 2', 'b'))


def test_machines_may_keep_their_images_in_different_places():
    one, other = (processes._digest(parse_args(['--data-dir', place, '-j', workers]))
                  for place, workers in (('x', '2'), ('y', '3')))
    assert one == other != processes._digest(arguments('--lr', '3'))


def test_the_refusal_ends_the_command_with_exit_code_2(monkeypatch, capsys):
    from mixsize_timm.train import main
    monkeypatch.setenv('ACCELERATE_USE_DEEPSPEED', 'true')
    assert main(['--data-dir', 'x']) == 2
    assert capsys.readouterr().err.count('\n') == 1


# Precision and determinism


def an_accelerator(**kwargs):
    """What Accelerate gives on a GPU, as far as it is looked at."""
    values = dict(device=torch.device('cuda'), num_processes=1, is_main_process=True, mixed_precision='no', scaler=None,
                  gradient_accumulation_steps=1, parallelism_config=None,
                  state=SimpleNamespace(dynamo_plugin=SimpleNamespace(backend=build.DynamoBackend.NO)))
    return SimpleNamespace(**{**values, **kwargs})


@pytest.mark.parametrize('units', [True, False])
def test_bf16_is_not_emulated_and_tf32_not_asked_of_a_gpu_without_it(monkeypatch, units):
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: units or including_emulation)
    monkeypatch.setattr(torch.cuda, 'is_tf32_supported', lambda: units)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda: 'an old GPU')
    for argv, precision, message in ((['--mixed-precision', 'bf16'], 'bf16', 'an old GPU has no units for bf16'),
                                     (['--no-tf32'], 'no', 'there is no TF32')):
        accelerator = an_accelerator(mixed_precision=precision)
        if units:
            build._check_accelerator(arguments(*argv), accelerator, precision)
        else:
            with pytest.raises(UsageError, match=message):
                build._check_accelerator(arguments(*argv), accelerator, precision)


@pytest.mark.parametrize('capability, machine, slow', [
    ('AVX2', 'x86_64', True), ('DEFAULT', 'AMD64', True), ('AVX512', 'x86_64', False), ('DEFAULT', 'arm64', False)])
@pytest.mark.parametrize('argv, precision, leave_out', [
    (['--mixed-precision', 'bf16'], 'bf16', '--mixed-precision and --amp'),
    (['--model-dtype', 'bfloat16'], 'no', '--model-dtype'),
    ([], 'no', '')])
def test_bf16_on_a_processor_that_is_slow_at_it_is_said(
        monkeypatch, caplog, capability, machine, slow, argv, precision, leave_out):
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: capability)
    monkeypatch.setattr(build.platform, 'machine', lambda: machine)
    for first in (True, False):
        caplog.clear()
        build._set_backend(arguments(*argv), an_accelerator(
            device=torch.device('cpu'), mixed_precision=precision, is_main_process=first))
        assert caplog.messages == [
            'bf16 is many times slower than float32 on this processor, which has no AVX-512: leave out '
            f'{leave_out}'] * (slow and first and bool(leave_out))


@pytest.mark.parametrize('argv, accelerator, message', [
    ([], dict(mixed_precision='fp16'), 'trains with fp16, not no'),
    ([], dict(parallelism_config=object()), 'parallelism_config is not supported'),
    (['--device', 'cuda:1'], dict(num_processes=2), 'would be that of all 2 processes')])
def test_what_was_not_asked_for_is_refused(argv, accelerator, message):
    with pytest.raises(UsageError, match=message):
        build._check_accelerator(arguments(*argv), an_accelerator(**accelerator), 'no')


@pytest.mark.parametrize('exact', [False, True])
def test_tf32_is_on_for_products_and_convolutions_unless_left_out(exact):
    build._set_backend(arguments(*['--no-tf32'] * exact), an_accelerator())
    assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == (not exact)
    assert torch.backends.cudnn.benchmark


def test_there_is_no_tf32_on_a_cpu():
    with pytest.raises(UsageError, match='there is no TF32 on this cpu'):
        create_accelerator(arguments('--no-tf32'))


def test_deterministic_algorithms_are_switched_on_before_the_device_starts(monkeypatch):
    monkeypatch.delenv('CUBLAS_WORKSPACE_CONFIG')
    create_accelerator(arguments())
    assert not torch.are_deterministic_algorithms_enabled() and 'CUBLAS_WORKSPACE_CONFIG' not in os.environ
    create_accelerator(arguments('--deterministic'))
    assert torch.are_deterministic_algorithms_enabled() and os.environ['CUBLAS_WORKSPACE_CONFIG'] == ':4096:8'
    build._set_backend(arguments('--deterministic'), an_accelerator())
    assert not torch.backends.cudnn.benchmark


# What FSDP cannot be had with


@pytest.mark.parametrize('argv, fsdp2, message', [
    ([], False, 'set fsdp_version: 2'),
    (['--model-ema'], True, '--model-ema cannot be had with FSDP'),
    (['--kd-model-name', 'resnet18'], True, '--kd-model-name cannot be had with FSDP'),
    (['--torchcompile'], True, '--torchcompile cannot be had with FSDP'),
    (['--clip-grad', '1', '--clip-mode', 'agc'], True, 'use norm'),
    (['--opt', 'lamb'], True, '--opt lamb was not tried with FSDP')])
def test_what_a_sharded_model_cannot_do_is_refused(argv, fsdp2, message):
    accelerator = SimpleNamespace(is_fsdp2=fsdp2)
    processes.check_sharding(arguments('--opt', 'adamw'), SimpleNamespace(is_fsdp2=True))
    with pytest.raises(UsageError, match=message):
        processes.check_sharding(arguments(*argv), accelerator)


@pytest.mark.parametrize('variables, threads', [
    ({'OMP_NUM_THREADS': '1'}, None), ({}, None), ({'OMP_NUM_THREADS': '3', 'ACCELERATE_MIXED_PRECISION': 'no'}, None),
    ({'OMP_NUM_THREADS': '1', 'ACCELERATE_MIXED_PRECISION': 'no'}, 6), ({'TORCHELASTIC_RUN_ID': 'x'}, 6),
    ({'OMP_NUM_THREADS': '1', 'TORCHELASTIC_RUN_ID': 'x', 'LOCAL_WORLD_SIZE': '2'}, 3)], ids=str)
def test_the_one_thread_of_a_launcher_becomes_the_cores_and_that_of_a_user_stays(monkeypatch, variables, threads):
    for name in ('OMP_NUM_THREADS', 'TORCHELASTIC_RUN_ID', 'LOCAL_WORLD_SIZE'):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    asked = []
    monkeypatch.setattr(torch, 'set_num_threads', asked.append)
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: range(6), raising=False)
    build._set_backend(parse_args(['--device', 'cpu']), an_accelerator(device=torch.device('cpu')))
    assert asked == ([threads] if threads else [])
