"""The report of an evaluation: results as files, plots and a page. Apart from the curves: drawing is slow to import."""
import csv
import os
import tempfile
from typing import Any, Dict

import jinja2

from . import plots
from .curves import METRIC_NAMES, SIZES_FILE, all_answers, answer_lines, make_curves, table_cells, write_sizes

REPORT_FILES = (SIZES_FILE, 'sizes.csv', 'report.html', *(
    f'{plot}.{kind}' for plot in plots.PLOTS for kind in plots.FORMATS))


def write_report(folder: str, document: Dict[str, Any]) -> None:
    """Write the results as files: ``sizes.json``, ``sizes.csv``, the plots as PNG and SVG, ``report.html``.

    Args:
        folder: An existing folder.
        document: ``metric``, ``baseline`` (a name, or ``None``), ``settings`` (names and values to be shown), and
            ``checkpoints``: each with ``name``, ``checkpoint``, ``model``, ``calibrated`` (batches), ``training``,
            ``data`` (names and values to be shown) and ``results``, the rows of
            :func:`~mixsize_timm.measure.measure_sizes`. The answers are added.
    """
    metric = document['metric']
    curves = make_curves(document['checkpoints'], metric)
    document['answers'] = answers = all_answers(curves, document['baseline'])
    with tempfile.TemporaryDirectory(dir=folder) as aside:  # all is whole before any of it stands in its place
        write_sizes(os.path.join(aside, SIZES_FILE), document)
        with open(os.path.join(aside, 'sizes.csv'), 'w', encoding='utf-8', newline='') as file:
            rows = [{'name': checkpoint['name'], 'checkpoint': checkpoint['checkpoint'], **row}
                    for checkpoint in document['checkpoints'] for row in checkpoint['results']]
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
            writer.writeheader()
            writer.writerows(rows)
        images = plots.draw(aside, curves, METRIC_NAMES.get(metric, metric))
        environment = jinja2.Environment(loader=jinja2.PackageLoader(__package__, '.'), autoescape=True,
                                         trim_blocks=True, lstrip_blocks=True)
        page = environment.get_template('report.html.jinja').render(
            document=document, images=images, tables=[(curve, table_cells(curve, metric)) for curve in curves],
            answers=[(part, [line.partition(': ') for line in answer_lines(part)]) for part in answers])
        with open(os.path.join(aside, 'report.html'), 'w', encoding='utf-8') as file:
            file.write(page)
        for name in REPORT_FILES:
            os.replace(os.path.join(aside, name), os.path.join(folder, name))
