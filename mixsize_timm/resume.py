"""What a run needs to go on as if it had not stopped, besides the model: gathered, and put back."""
import hashlib
import logging
import os
import pickle
import shutil
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
from accelerate.utils import broadcast_object_list, gather_object
from timm.task import load_task_ema_checkpoint, resume_task_checkpoint
from torch import nn

from .checkpoint import LAST, check_whole, checkpoints_of, load_checkpoint, run_folder
from .data import MixSizeLoader
from .engine import Progress
from .errors import UsageError, refusing
from .provenance import read_run
from .randomness import random_state, set_random_state
from .saver import CheckpointHistory
from .sharding import full_optimizer_state, load_full_optimizer_state
from .streaming import StreamBatches

_logger = logging.getLogger(__name__)

_NO_OPTIONS = ('params', 'lookahead_step')  # of an optimizer's groups
_HISTORY = ('best', 'num_bad_epochs', 'cooldown_counter', 'last_epoch', '_last_lr')  # of torch's plateau schedule
BadImages = Dict[int, Tuple[str, str]]  # index -> path, reason


def newest_whole(path: str, accelerator: Any) -> str:
    """The checkpoint to go on from: the one named, or the newest of a run that is whole, chosen by the main process.

    Raises:
        UsageError: There is none.
    """
    found: List[Any] = ['', '']
    if accelerator.is_main_process:
        named = run_folder(path) != path
        for folder in [path] if named else checkpoints_of(path):
            try:
                check_whole(folder)
            except (OSError, ValueError) as error:
                found[1] = str(error)
                if not named:
                    _logger.warning('%s: the one before it is used', error)
                continue
            found[0] = folder
            break
    broadcast_object_list(found)
    if not found[0]:
        raise UsageError(found[1] or f'no checkpoint at {path}')
    return found[0]


def training_state(run: Any) -> Dict[str, Any]:
    """What a run needs to go on from where it is, besides the model. Called by every process.

    Args:
        run: A :class:`~mixsize_timm.train.Training`.
    """
    scaler = run.accelerator.scaler
    return {
        'epoch': run.progress.epoch,
        'progress': run.progress.to_dict(),
        'world_size': run.data.plan_world_size,
        'best': run.best,
        'metric': run.metric,
        'history': list(run.history.entries),
        'opt': run.args.opt,
        'optimizer': full_optimizer_state(run.model, run.optimizer),
        'task': [run.task.get_task_state(), run.task.get_task_state(ema=True)],
        'smoother': run.smoother.state_dict() if run.smoother else None,
        'scaler': scaler.state_dict() if scaler else None,
        'plateau': _plateau_state(run.lr_scheduler) if run.args.sched == 'plateau' else None,
        'plan': _plan_digest(run),
        'stream': _stream_layout(run),
        'random': gather_object([random_state()]),
        'buffers': gather_object([_buffers(run)]),
        'bad_images': [[index, *bad] for index, bad in share_bad_images(run.data.loader).items()],
        'wandb': run.wandb_id,
    }


def restore(run: Any, folder: str) -> None:
    """Continue a run of ours from a checkpoint.

    Raises:
        UsageError: It cannot be read, or does not fit the arguments.
    """
    try:
        state = load_checkpoint(folder, run.model, run.ema)
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error
    for ema, task_state in zip((False, True), state['task']):
        if task_state and (not ema or run.ema is not None):
            run.task.load_task_state(task_state, ema=ema)
    if not run.args.no_resume_opt:
        _restore_optimizer(run, state, folder)
    processes = run.accelerator.num_processes
    if len(state['random']) == processes:
        set_random_state(state['random'][run.accelerator.process_index])
        _set_buffers(run, state['buffers'][run.accelerator.process_index])
    else:
        _logger.warning('The run was saved by %d processes and goes on with %d: the batches stay those of %d, and '
                        'dropout is drawn anew', len(state['random']), processes, state['world_size'])
    run.progress = Progress.from_dict(state['progress'])
    _check_place(run, state['plan'])
    _check_stream(run, state.get('stream'))
    share_bad_images(run.data.loader, {index: (name, reason) for index, name, reason in state['bad_images']})
    with refusing():
        run.starts = read_run(run_folder(folder)).get('starts', [])
    in_place = os.path.realpath(run.folder) == os.path.realpath(run_folder(folder))
    if in_place:
        run.wandb_id = state['wandb']
    if in_place and state['metric'] == run.metric:  # else another folder's best, or of another scale
        run.best = state['best']
        run.history = CheckpointHistory(run.folder, run.args.checkpoint_hist, state['history'], run.progress.epoch)


def restore_timms(run: Any, path: str) -> None:
    """Continue a run of timm's script, given its file.

    timm reads its own checkpoints, with torch's unpickler restricted to tensors and plain values.

    Raises:
        UsageError: It cannot be read, or does not fit the arguments.
    """
    with refusing(f'cannot resume {path}'):
        try:
            epoch = resume_task_checkpoint(
                run.task, path, None if run.args.no_resume_opt else run.optimizer, log_info=False)
            if run.ema is not None:
                load_task_ema_checkpoint(run.task, path)
        except pickle.UnpicklingError as error:
            raise ValueError(str(error)) from error
    run.progress = Progress(epoch=epoch or 0, counted=False)


def share_bad_images(loader: Any, known: Optional[BadImages] = None) -> BadImages:
    """Tell the loaders of all processes what images each of them could not read, and what was known before.

    Returns:
        All of them; none for a loader that is not ours.
    """
    if not isinstance(loader, MixSizeLoader):
        return {}
    for found in gather_object([dict(known or {}), dict(loader.bad_images)]):
        loader.bad_images.update(found)
    return dict(sorted(loader.bad_images.items()))


def tidy(run: Any) -> None:
    """Bring the folder of a run that goes on in place to the state of the checkpoint that it goes on from.

    What is newer was torn, and is renamed; what is half written is removed; copies that were not made are.
    """
    run.saver.remove_half_written()
    _set_aside_torn(run)
    if os.path.basename(run.resumed_from) == LAST:
        run.saver.keep_last(run.progress.epoch)


def _set_aside_torn(run: Any) -> None:
    for folder in checkpoints_of(run.folder):
        if os.path.realpath(folder) == os.path.realpath(run.resumed_from):
            return
        shutil.rmtree(folder + '.torn', ignore_errors=True)
        os.replace(folder, folder + '.torn')
        _logger.warning('%s is not gone on from, and is %s.torn now', folder, os.path.basename(folder))


def _restore_optimizer(run: Any, state: Dict[str, Any], path: str) -> None:
    if state['opt'] != run.args.opt:
        raise UsageError(f'{path} was trained with --opt {state["opt"]}, not {run.args.opt}')
    try:
        with _options_of_this_start(run.optimizer) as rates:
            load_full_optimizer_state(run.model, run.optimizer, state['optimizer'])
    except (KeyError, ValueError) as error:
        raise UsageError(f'{path} does not fit the optimizer: resume with the arguments it was started with'
                         ) from error
    if run.smoother and state['smoother']:
        run.smoother.load_state_dict(state['smoother'])
    if run.accelerator.scaler and state['scaler']:
        run.accelerator.scaler.load_state_dict(state['scaler'])
    if run.args.sched == 'plateau' and state['plateau']:
        _restore_plateau(run, state['plateau'], rates)


@contextmanager
def _options_of_this_start(optimizer: Any) -> Iterator[List[Dict[str, Any]]]:
    """Keep an optimizer's options while it is given the state of a run.

    They are those that the run was started with but for what this start says otherwise, and kernels that suit this
    device. What optimizers count stands beside them, but for timm's Lookahead.

    Yields:
        A list that gets the learning rates of each group as the run had them, the first one and the last.
    """
    options = [{key: value for key, value in group.items() if key not in _NO_OPTIONS}
               for group in optimizer.param_groups]
    rates: List[Dict[str, Any]] = []
    yield rates
    for group, stated in zip(optimizer.param_groups, options):
        rates.append({key: group[key] for key in ('initial_lr', 'lr') if key in group})
        group.update(stated)


def _plateau_state(scheduler: Any) -> Dict[str, Any]:
    """State of timm's plateau schedule: its history, and the rates that noise was laid on."""
    return {'history': scheduler.lr_scheduler.state_dict(), 'restore_lr': scheduler.restore_lr}


def _restore_plateau(run: Any, state: Dict[str, Any], rates: List[Dict[str, Any]]) -> None:
    """Put the history of a plateau schedule back, and the rates that it came to if it began with those of today."""
    history = {key: state['history'][key] for key in _HISTORY if key in state['history']}
    run.lr_scheduler.lr_scheduler.load_state_dict(history)
    groups = run.optimizer.param_groups
    if [group['initial_lr'] for group in groups] == [rate.get('initial_lr') for rate in rates]:
        for group, rate in zip(groups, rates):
            group['lr'] = rate['lr']
        run.lr_scheduler.restore_lr = state['restore_lr']


def _plan_digest(run: Any) -> str:
    """Stands for the plan of an epoch that is underway; empty between epochs, and for a loader that is not ours."""
    if not run.progress.step or not isinstance(run.data.loader, MixSizeLoader):
        return ''
    plan, digest = run.data.start_epoch(run.progress.epoch, run.progress.step), hashlib.sha256()
    for array in (plan.size, plan.batch, plan.duplicates, plan.step):
        digest.update(array.tobytes())
    batches = run.data.loader.dataset
    digest.update(batches.identity if isinstance(batches, StreamBatches) else plan.order.tobytes())
    return digest.hexdigest()


def _stream_layout(run: Any) -> Optional[Dict[str, int]]:
    """What the images of data that stream depend on beside seed and epoch; ``None`` for other data."""
    batches = getattr(run.data.loader, 'dataset', None)
    return batches.layout if isinstance(batches, StreamBatches) else None


def _check_place(run: Any, plan: str) -> None:
    """Begin an epoch again that cannot be gone on with."""
    progress = run.progress
    if not progress.step or progress.step == run.data.num_steps and not plan:  # only its validation is left
        return
    if not isinstance(run.data.loader, MixSizeLoader):
        why = "timm's own loader cannot go on inside an epoch"
    elif _plan_digest(run) != plan:
        why = 'the images or the arguments make another plan of the epoch than it was begun with'
    else:
        return
    _logger.warning('%s: epoch %d is trained from its beginning', why, progress.epoch)
    progress.start_epoch(progress.epoch)


def _check_stream(run: Any, layout: Optional[Dict[str, int]]) -> None:
    """Warn of an epoch of data that stream which other workers go on with than began it."""
    here = _stream_layout(run)
    if run.progress.step and layout and here and layout != here:
        _logger.warning(
            'Epoch %d was begun by %d processes of %d data workers and goes on with %d of %d, who read the shards in '
            'another order: some images come twice in it, others not at all', run.progress.epoch,
            layout['processes'], layout['workers'], here['processes'], here['workers'])


def _buffers(run: Any) -> Optional[List[Dict[str, torch.Tensor]]]:
    """Buffers of the model and its average: inside an epoch each process has statistics of its own."""
    if run.accelerator.num_processes == 1:
        return None  # they are in the model's file
    return [{name: buffer.cpu() for name, buffer in model.named_buffers()} for model in _models(run)]


def _set_buffers(run: Any, buffers: Optional[List[Dict[str, torch.Tensor]]]) -> None:
    for model, values in zip(_models(run), buffers or ()):
        for name, buffer in model.named_buffers():
            if name in values:
                buffer.copy_(values[name])


def _models(run: Any) -> List[nn.Module]:
    return [model for model in (run.model, run.ema) if model is not None]
