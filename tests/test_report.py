"""The report: curves, answers, tables, files."""
import csv
import json
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mixsize_timm.curves import all_answers, answer_lines, compare, format_table, make_curves, size_range
from mixsize_timm.plots import against_gmacs, against_size, pareto_front
from mixsize_timm.report import REPORT_FILES, write_report


def checkpoint(name, top1, sizes=(16, 24, 32, 48), crop=None, training=None, calibrated=200, own=None):
    rows = []
    for i, (size, value) in enumerate(zip(sizes, top1)):
        rows.append({
            'img_size': size, 'images': 360, 'gmacs': size**2 / 1000, 'loss': 1 - value / 100, 'top1': value,
            'top5': 100., 'top1_low': value - 2, 'top1_high': min(value + 2, 100), 'loss_uncalibrated': 2.,
            'top1_uncalibrated': (own or top1)[i], 'top5_uncalibrated': 100.,
            **({'crop_pct': crop} if crop else {})})
    return {'name': name, 'checkpoint': f'runs/{name}', 'model': 'resnet18', 'calibrated': calibrated,
            'training': training, 'results': rows, 'data': {'split': 'validation'}}


FIXED = checkpoint('fixed', [10, 60, 97, 20], training={'gmacs': 100., 'seconds': 50., 'steps': 10})
MIXED = checkpoint('mixed', [95, 97, 98.5, 98], training={'gmacs': 120., 'seconds': 40., 'steps': 10},
                   own=[50, 90, 95, 80])


def test_the_four_answers():
    fixed, mixed = make_curves([FIXED, MIXED])
    answers = compare(mixed, fixed)
    assert answers['match_size'] == 24 and answers['fewer_operations'] == pytest.approx(32**2 / 24**2)
    assert answers['best'] == 98.5 and answers['best_size'] == 32
    assert answers['error_reduction'] == pytest.approx(0.5)
    assert answers['training_gmacs'] == pytest.approx(1.2) and answers['training_seconds'] == pytest.approx(0.8)
    assert answers['range'] == (32, 48) and answers['baseline_range'] == (32, 32)
    lines = answer_lines(answers)
    assert len(lines) == 4
    assert 'at 24 px' in lines[0] and '1.78 times fewer operations' in lines[0] and '97.00 % at 32 px' in lines[0]
    assert 'an error 50% lower' in lines[1] and '1.20 times the operations' in lines[2]
    assert 'from 32 to 48 px' in lines[3]


def test_answers_where_there_is_nothing_to_boast_of():
    worse, perfect = make_curves([checkpoint('worse', [1, 2, 3, 4]), checkpoint('perfect', [99, 100, 100, 100])])
    lines = answer_lines(compare(worse, perfect))
    assert 'no size reaches the best accuracy of perfect (100.00 % at 24 px)' in lines[0]
    assert 'error' not in lines[1] and 'not known' in lines[2]
    assert 'higher' in answer_lines(compare(worse, make_curves([FIXED])[0]))[1]
    assert all_answers([worse, perfect], None) == []


def test_checkpoints_of_one_name_are_averaged():
    seeds = [checkpoint('mixed', [90, 92, 94, 96]), checkpoint('mixed', [92, 94, 96, 98])]
    curve, = make_curves(seeds)
    assert curve.runs == 2 and curve.value == (91, 93, 95, 97)
    assert curve.low == (90, 92, 94, 96) and curve.high == (92, 94, 96, 98)
    assert curve.training == {}
    assert curve.rows[0]['loss'] == pytest.approx(0.09)


def test_each_crop_is_a_curve_of_its_own():
    part = checkpoint('a', [90, 92], (32, 48), crop=0.875)
    part['results'] += checkpoint('a', [91, 93], (32, 48), crop=1.0)['results']
    curves = make_curves([part])
    assert [curve.label for curve in curves] == ['a, crop 0.875', 'a, crop 1']
    assert curves[1].value == (91, 93)
    base = checkpoint('b', [80, 81], (32, 48), crop=1.0)
    assert [(part['name'], part['baseline']) for part in all_answers(make_curves([part, base]), 'b')] == [
        ('a, crop 0.875', 'b'), ('a, crop 1', 'b')]  # b has no other crop
    base['results'] += checkpoint('b', [70, 71], (32, 48), crop=0.875)['results']
    answers = all_answers(make_curves([base, part]), 'b')
    assert [(part['name'], part['baseline'], part['baseline_best']) for part in answers] == [
        ('a, crop 0.875', 'b, crop 0.875', 71), ('a, crop 1', 'b, crop 1', 81)]


@given(st.lists(st.tuples(st.floats(0.1, 100), st.floats(0, 100)), min_size=1, max_size=20))
def test_the_pareto_front_is_what_nothing_dominates(points):
    front = pareto_front(points)
    assert front and all(a[0] < b[0] and a[1] < b[1] for a, b in zip(front, front[1:]))
    for cost, value in points:
        assert any(x <= cost and y >= value for x, y in front)
    assert set(front) <= set(points)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=10))
def test_the_range_is_around_the_best_and_within_a_point(values):
    sizes = tuple(range(16, 16 + 8 * len(values), 8))
    curve, = make_curves([checkpoint('a', values, sizes)])
    first, last = (sizes.index(size) for size in size_range(curve))
    assert first <= curve.best <= last
    assert all(value >= max(values) - 1 for value in values[first:last + 1])
    for outside in (first - 1, last + 1):
        assert not 0 <= outside < len(values) or values[outside] < max(values) - 1


def test_the_table_has_a_line_a_size_and_their_mean():
    table = format_table(make_curves([FIXED, MIXED]))
    lines = table.splitlines()
    assert lines[0] == 'fixed' and lines[8] == 'mixed'
    assert lines[1].split('  ')[0] == 'img_size' and 'top-1 own statistics' in lines[1]
    assert re.search(r'24 +60.00 +58.00 - 62.00 +60.00 +100.00', lines[3])
    assert re.search(r'mean +46.75', lines[6]) and re.search(r'mean +97.12 +78.75', lines[14])
    assert len({len(line) for line in lines[1:7]}) == 1
    mixed, alone = format_table(make_curves([FIXED, FIXED, MIXED])).split('\n\n')
    assert mixed.startswith('fixed, mean of 2 runs') and 'own statistics' in mixed and '95 %' not in mixed
    assert alone.startswith('mixed\n') and '95 % interval' in alone
    alone = format_table(make_curves([checkpoint('a', [1, 2], (8, 16), calibrated=0)]))
    assert 'statistics' not in alone and alone.splitlines()[0].startswith('img_size')


class References(HTMLParser):
    """What a page would fetch."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ('src', 'href', 'xlink:href') and value
                       and not value.startswith('#')]
        if tag in ('script', 'link', 'iframe'):
            self.found.append(tag)


def test_the_report_is_whole_and_needs_no_network(tmp_path):
    document = {'metric': 'top1', 'baseline': 'fixed', 'settings': {'command': 'mixsize evaluate <a> & b'},
                'checkpoints': [FIXED, MIXED]}
    write_report(str(tmp_path), document)
    assert {path.name for path in tmp_path.iterdir()} == set(REPORT_FILES)
    page = (tmp_path / 'report.html').read_text()
    references = References()
    references.feed(page)
    assert references.found == [] and page.count('<svg') == 2
    assert 'mixsize evaluate &lt;a&gt; &amp; b' in page
    assert 'mixed against fixed' in page and '1.78 times fewer operations' in page and '98.50' in page
    kept = json.loads((tmp_path / 'sizes.json').read_text())
    assert kept['checkpoints'] == [FIXED, MIXED] and kept['answers'][0]['match_size'] == 24
    rows = list(csv.DictReader((tmp_path / 'sizes.csv').open()))
    assert len(rows) == 8 and rows[5]['name'] == 'mixed' and rows[5]['img_size'] == '24' and rows[5]['top1'] == '97'
    with Image.open(tmp_path / 'accuracy-against-size.png') as image:
        assert image.width == 1600
    before = (tmp_path / 'accuracy-against-size.svg').read_bytes()
    write_report(str(tmp_path), document)
    assert (tmp_path / 'accuracy-against-size.svg').read_bytes() == before


def drawn(plot, checkpoints):
    figure = plot(make_curves(checkpoints), 'Top-1 accuracy (%)')
    figure.draw_without_rendering()
    return figure, figure.axes[0], figure.legends[0]


@pytest.mark.parametrize('plot', [against_size, against_gmacs])
def test_plots_have_units_and_a_legend_beside_the_curves(plot):
    figure, axes, legend = drawn(plot, [FIXED, MIXED, *(checkpoint(f'a rather long name {i}', [i, 2, 3, 4])
                                                        for i in range(6))])
    assert axes.get_ylabel() == 'Top-1 accuracy (%)'
    assert axes.get_xlabel() in ('Image size (px)', 'Operations per image (GMACs)')
    box = legend.get_window_extent()
    assert not box.overlaps(axes.get_window_extent()) and box.x0 >= 0 and box.x1 <= figure.bbox.width
    fonts = [text.get_fontsize() for text in (*legend.get_texts(), *axes.get_xticklabels(), axes.xaxis.label)]
    assert min(fonts) >= 9  # of a figure 8 inches wide: pixels at 800, no less than 12


def test_the_bands_say_what_they_are():
    seeds = [checkpoint('mixed', [90, 92, 94, 96]), checkpoint('mixed', [92, 94, 96, 98])]
    assert drawn(against_size, seeds)[1].get_title() == (
        'Bands: mean of several runs, from the lowest to the highest')
    assert drawn(against_size, [*seeds, FIXED])[1].get_title() == (
        'Bands: one run with its 95 % interval; mean of several runs, from the lowest to the highest')


def test_the_ticks_are_the_sizes():
    _, axes, _ = drawn(against_size, [FIXED, MIXED])
    assert list(axes.get_xticks()) == [16, 24, 32, 48]
    assert [label.get_text() for label in axes.get_xticklabels()] == ['16', '24', '32', '48']
    _, axes, _ = drawn(against_size, [checkpoint('a', [1] * 40, range(16, 336, 8))])
    assert len(axes.get_xticks()) <= 12 and set(axes.get_xticks()) <= set(range(16, 336, 8))


def test_labels_on_the_axis_of_operations_do_not_run_into_each_other():
    for factor in (1, 3):
        sizes = tuple(factor * size for size in (16, 24, 32, 48, 224))
        figure, axes, _ = drawn(against_gmacs, [checkpoint('a', [1, 2, 3, 4, 5], sizes)])
        low, high = axes.get_xlim()
        boxes = sorted((label.get_window_extent() for tick, label in zip(axes.get_xticks(), axes.get_xticklabels())
                        if low <= tick <= high), key=lambda box: box.x0)
        assert len(boxes) >= 3 and all(a.x1 < b.x0 for a, b in zip(boxes, boxes[1:]))
