"""What the trackers of a run are told: Weights & Biases and TensorBoard, through Accelerate."""
import argparse
import os
from typing import Any, Dict, List, Optional

from accelerate import Accelerator


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
