"""How fast the recipes get augmented batches, beside the usual pipeline of PIL.

    python scripts/benchmark_input.py --dataset_name /path/to/cifar100

Four rows, each with batches of 128 images in an order drawn anew:

  ours          uint8 tensors, a batch at a time through DataLoader, and recipes/cifar100.py's
                augmentation: rotation, flip and shift of each image's own, in one interpolation
  ours, plain   the same without augmentation, as in recipes/mnist.py and recipes/cifar10.py
  PIL           the dataset itself (with_transform): each image decoded from its file, flipped and
                transformed by PIL to the same distribution, turned into a float tensor, stacked
  PIL, plain    the same without augmentation

The rows take turns, in an order drawn anew for each round; the table has medians and quartiles of
images per second of processor time (what a core does, whoever else is on the machine), and of how
many times faster that is than PIL in the same round.
Writes input.json and input.md (the table) to --output.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from measuring import at_least, markdown, record, spread, take_turns
from PIL import Image
from torch.utils.data import DataLoader

from hf_adalip.recipe.image.augment import RandomAffine
from hf_adalip.recipe.image.data import ImageDataset, load_image_dataset

PACKAGES = ["torch", "datasets", "numpy", "pillow"]
BATCH = 128
AUGMENT = RandomAffine(degrees=15, translate=(0.1, 0.1), hflip=0.5)  # as in recipes/cifar100.py


def ours(data: ImageDataset, augment: bool) -> Iterator[torch.Tensor]:
    for batch in DataLoader(data, BATCH, shuffle=True, collate_fn=data.collate):
        images, labels = batch["pixel_values"], batch["labels"]
        if augment:
            images, _ = AUGMENT(images, labels, torch.rand(len(labels), AUGMENT.draws))
        yield images


def with_pil(split: Any, column: str, augment: bool) -> Iterator[torch.Tensor]:
    def transform(rows: dict[str, Any]) -> dict[str, Any]:
        pictures = [changed(picture) if augment else picture for picture in rows[column]]
        return {"pixel_values": [to_tensor(picture) for picture in pictures]}

    for batch in DataLoader(split.with_transform(transform), BATCH, shuffle=True):
        yield batch["pixel_values"]


def to_tensor(picture: Image.Image) -> torch.Tensor:
    pixels = np.asarray(picture)
    pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy()).float().div_(255.0)


def changed(picture: Image.Image) -> Image.Image:
    """Flipped, rotated and shifted; black comes in from outside, for PIL knows no other border."""
    if random.random() < AUGMENT.hflip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    width, height = picture.size
    angle = random.uniform(-AUGMENT.degrees, AUGMENT.degrees)
    right, down = (random.uniform(-share, share) for share in AUGMENT.translate)
    shift = (right * width, down * height)
    return picture.rotate(angle, Image.Resampling.BILINEAR, translate=shift)


def rate(batches: Callable[[], Iterator[torch.Tensor]], images: int) -> dict[str, float]:
    """Images per second of processor time, of so many images in whole batches."""
    start, seen = time.process_time(), 0
    for batch in batches():
        seen += len(batch)
        if seen >= images:
            break
    return {"images_per_second": seen / (time.process_time() - start)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset_name", default="uoft-cs/cifar100", help="(uoft-cs/cifar100)")
    parser.add_argument("--label_column_name", default="fine_label", help="(fine_label)")
    parser.add_argument("--images", type=at_least(BATCH), default=2560, help="a row takes (2560)")
    parser.add_argument("--rounds", type=at_least(2), default=20, help="(20)")
    parser.add_argument("--threads", type=at_least(1), default=1, help="of torch (1)")
    parser.add_argument("--seed", type=int, default=0, help="(0)")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark"), metavar="DIR")
    parser.set_defaults(device=torch.device("cpu"))
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    random.seed(args.seed)

    data = load_image_dataset(args.dataset_name, label_column_name=args.label_column_name)
    split = datasets.load_dataset(args.dataset_name, split="train")
    images = [name for name, kind in split.features.items() if isinstance(kind, datasets.Image)]
    split = split.select_columns(images)
    pipelines = {
        "ours": lambda: ours(data.train, augment=True),
        "PIL": lambda: with_pil(split, images[0], augment=True),
        "ours, plain": lambda: ours(data.train, augment=False),
        "PIL, plain": lambda: with_pil(split, images[0], augment=False),
    }
    runs = {name: partial(rate, batches, args.images) for name, batches in pipelines.items()}
    rates = {
        name: found["images_per_second"]
        for name, found in take_turns(runs, args.rounds, args.seed).items()
    }
    rows, found = [], {**record(args, PACKAGES), "images": args.images, "rows": {}}
    for name, values in rates.items():
        peer = rates[name.replace("ours", "PIL")]
        times = spread([a / b for a, b in zip(values, peer, strict=True)])
        found["rows"][name] = {"images_per_second": spread(values), "times_pil": times}
        rows.append([name, shown(spread(values), ",.0f"), shown(times, ".1f")])
    table = markdown(["", "images/s of a core", "times PIL"], rows)
    machine, versions = found["machine"], found["versions"]
    caption = (
        f"{args.dataset_name}, batches of {BATCH}; {machine['processor']}, {found['threads']} of "
        f"{machine['cpus']} threads, torch {versions['torch']}, pillow {versions.get('pillow')}, "
        f"{found['date']}; medians and quartiles of {args.rounds} rounds. `{found['command']}`"
    )
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "input.json").write_text(json.dumps(found, indent=2) + "\n")
    (args.output / "input.md").write_text(f"{table}\n\n{caption}\n")
    print(f"{table}\n\n{caption}")


def shown(found: dict[str, float], how: str) -> str:
    return f"{found['median']:{how}} ({found['q1']:{how}} to {found['q3']:{how}})"


if __name__ == "__main__":
    main()
