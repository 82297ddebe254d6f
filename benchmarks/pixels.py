"""How far the loader's pixels are from timm's, and those of scaled decoding from those of full decoding.

    python benchmarks/pixels.py --data-dir ../shared/data/clothing

Each image is cropped and flipped alike (the same seed): by timm's transform on the PIL image, by ours on the decoded
tensor, and by ours on what scaled decoding gives. Differences are of uint8 pixels, in grey levels of 255.
"""
import random
from typing import Any, Dict, List

import timm.data
import torch
from common import make_parser, parse_args, print_table, write

from mixsize_timm.images import OpenedImage, Part
from mixsize_timm.randomness import seed_for
from mixsize_timm.transforms import TensorTransform

SIZES = (96, 128, 224)
TIMM, OURS, SCALED = 'timm', 'ours', 'ours, scaled decoding'


def picture(image: torch.Tensor) -> List[float]:
    """Mean, deviation, and sharpness (mean difference of neighbours) of an image's pixels."""
    pixels = image.float()
    return [pixels.mean().item(), pixels.std().item(), (pixels[..., 1:] - pixels[..., :-1]).abs().mean().item()]


def measure_size(files: List[str], size: int, interpolation: str) -> Dict[str, Any]:
    """Differences and statistics over all images at one size."""
    transform = timm.data.create_transform(size, is_training=True, color_jitter=None, interpolation=interpolation,
                                           use_prefetcher=True)
    ours = TensorTransform(transform)
    pixels: Dict[str, List[torch.Tensor]] = {TIMM: [], OURS: [], SCALED: []}
    denominators = []
    for number, path in enumerate(files):
        with open(path, 'rb') as file:
            data = file.read()

        def made(apply: Any, number: int = number) -> torch.Tensor:
            seed_for(number)
            return apply()

        size = OpenedImage(data).size
        part = ours.part(size, made(lambda: ours.box(size)))  # noqa: B023
        denominators.append(part.denominator)
        full, scaled = (OpenedImage(data).decode(lambda size, needed=needed: needed)
                        for needed in (Part(part.bottom), part))
        pil = OpenedImage(data).pil()
        pixels[TIMM].append(made(lambda: transform(pil)))  # noqa: B023
        pixels[OURS].append(made(lambda: ours(full)))  # noqa: B023
        pixels[SCALED].append(made(lambda: ours(scaled)))  # noqa: B023
    stacked = {name: torch.stack(images).float() for name, images in pixels.items()}
    return {
        'size': size, 'interpolation': interpolation, 'images': len(files),
        'decoded at': {str(d): denominators.count(d) / len(files) for d in sorted(set(denominators))},
        'differences': {f'{a} - {b}': {
            'mean': (stacked[a] - stacked[b]).abs().mean().item(),
            'part of pixels over 2': ((stacked[a] - stacked[b]).abs() > 2).float().mean().item(),
        } for a, b in ((OURS, TIMM), (SCALED, OURS))},
        'pictures': {name: torch.tensor([picture(image) for image in images]).mean(0).tolist()
                     for name, images in pixels.items()}}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument('--data-dir', required=True, help='folder of images as timm takes it')
    parser.add_argument('--split', default='train')
    parser.add_argument('--images', type=int, default=600)
    args = parse_args(parser, 'pixels')
    torch.set_num_threads(1)
    samples = sorted(timm.data.create_dataset('', root=args.data_dir, split=args.split).reader.samples)
    files = [path for path, _ in random.Random(0).sample(samples, min(args.images, len(samples)))]
    results = [measure_size(files, size, interpolation) for size in SIZES for interpolation in ('bilinear', 'bicubic')]
    write(args, results)
    rows = []
    for row in results:
        parts = ' '.join(f'1/{d}: {part:.0%}' for d, part in row['decoded at'].items())
        for pair, difference in row['differences'].items():
            rows.append([row['size'], row['interpolation'], pair, difference['mean'],
                         f'{difference["part of pixels over 2"]:.1%}', parts if pair.startswith(SCALED) else ''])
    print_table(['size', 'interpolation', 'difference', 'mean', 'pixels over 2', 'decoded at'], rows)
    print()
    print_table(['size', 'interpolation', 'arm', 'mean', 'deviation', 'sharpness'],
                [[row['size'], row['interpolation'], name, *values] for row in results
                 for name, values in row['pictures'].items()])


if __name__ == '__main__':
    main()
