"""What is kept of each epoch: the summary, and what Weights & Biases and TensorBoard are told, through Accelerate."""
import argparse
import csv
import os
from typing import Any, Dict, List, Optional

from accelerate import Accelerator


def append_summary(path: str, row: Dict[str, Any]) -> None:
    """Append an epoch to the summary, a CSV file; one with other columns, of a resumed run, is written anew with all.

    timm's ``update_summary`` has each row under the header of the first.
    """
    rows: List[Dict[str, Any]] = []
    if os.path.exists(path):
        with open(path, newline='', encoding='utf-8') as file:
            rows = [{name: row[name] for name in row if name} for row in csv.DictReader(file)]
    columns = list(dict.fromkeys([*(rows[0] if rows else ()), *row]))
    anew = not rows or len(columns) > len(rows[0])
    with open(path + '.new' if anew else path, 'w' if anew else 'a', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, columns, restval='')
        if anew:
            writer.writeheader()
        writer.writerows([*rows, row] if anew else [row])
    if anew:
        os.replace(path + '.new', path)


def open_trackers(args: argparse.Namespace, accelerator: Accelerator, folder: str, wandb_id: Optional[str] = None
                  ) -> Optional[str]:
    """Start the trackers that the arguments ask for, in a run's folder and with its arguments.

    Args:
        args: The arguments.
        accelerator: Its trackers are started.
        folder: The run's folder.
        wandb_id: The run of Weights & Biases that goes on, where ``--wandb-resume-id`` names none.

    Returns:
        The run of Weights & Biases, on the process that has it.
    """
    if not accelerator.log_with:
        return None
    accelerator.project_configuration.logging_dir = folder
    wandb: Dict[str, Any] = dict(name=os.path.basename(folder), tags=args.wandb_tags)
    if args.wandb_resume_id:
        wandb.update(id=args.wandb_resume_id, resume='must')
    elif wandb_id:
        wandb.update(id=wandb_id, resume='allow')
    config = dict(vars(args))
    if args.log_tensorboard:  # it takes no lists
        config = {name: value if isinstance(value, (bool, int, float, str)) else str(value)
                  for name, value in config.items()}
    accelerator.init_trackers(args.wandb_project or 'mixsize-timm', config=config, init_kwargs={'wandb': wandb})
    return next((tracker.run.id for tracker in accelerator.trackers if tracker.name == 'wandb'), wandb_id)


def log_sizes(accelerator: Accelerator, results: List[Dict[str, float]], step: int) -> None:
    """Log the metrics at each image size as a table and as curves against the size.

    Args:
        accelerator: Its trackers are told.
        results: A row for each size: ``img_size`` and the metrics.
        step: Step of the run that the table belongs to.
    """
    if not results or not accelerator.is_main_process:
        return
    columns: List[Any] = [name for name, value in results[0].items() if isinstance(value, (int, float))
                          and name not in ('images', 'gmacs') and not name.endswith(('_low', '_high'))]
    rows = [[row[name] for name in columns] for row in results]
    for tracker in accelerator.trackers:
        if tracker.name == 'wandb':
            import wandb

            table = wandb.Table(columns=columns, data=rows)
            plots = {f'sizes/{name}': wandb.plot.line(table, 'img_size', name, title=f'{name} against image size')
                     for name in columns[1:]}
            tracker.log({'sizes': table, **plots}, step=step)
        else:
            for row in results:  # the size takes the place of the step, which makes it the axis
                for name in columns[1:]:
                    tracker.tracker.add_scalar(f'sizes/{name}', row[name], row['img_size'])
