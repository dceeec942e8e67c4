"""Drawings of shapes, and a small network that learns to tell them apart in a few seconds.

python shapes.py triangle > triangle.png
"""

import sys
from io import BytesIO

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn

SHAPES = ("circle", "square", "triangle")
SIDES = {"square": 4, "triangle": 3}
SIZE = 32


def draw(shape, rng):
    """Draw a shape of any size at any place, light on dark or dark on light."""
    radius, turn = rng.uniform(8, 14), rng.uniform(-20, 20)
    x, y = rng.uniform(radius, SIZE - radius, 2)
    paper, ink = rng.permutation([rng.integers(100), rng.integers(155, 256)]).tolist()
    image = Image.new("L", (SIZE, SIZE), paper)
    pen = ImageDraw.Draw(image)
    if shape in SIDES:
        pen.regular_polygon((x, y, radius), SIDES[shape], rotation=turn, fill=ink)
    else:
        pen.circle((x, y), radius, fill=ink)
    return image


def pixels(image):
    """Return a grey image as the network takes it: float32 of shape (1, 32, 32), -0.5 to 0.5."""
    return np.asarray(image, np.float32)[np.newaxis] / 255 - 0.5


def train(steps=200):
    """Return a network that has seen 64 new drawings in each step; always the same one."""
    rng = np.random.default_rng(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build()
    optimizer = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=steps)
    for _ in range(steps):
        labels = rng.integers(len(SHAPES), size=64)
        images = np.stack([pixels(draw(SHAPES[label], rng)) for label in labels])
        loss = nn.functional.cross_entropy(network(torch.from_numpy(images)), torch.tensor(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def build():
    return nn.Sequential(
        *block(1, 16, 8, stride=4, padding=2),
        *block(16, 32, 3),
        *block(32, 32, 3),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, len(SHAPES)),
    )


def block(before, after, kernel, **options):
    return nn.Conv2d(before, after, kernel, **options), nn.BatchNorm2d(after), nn.ReLU()


def png(image):
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


if __name__ == "__main__":
    sys.stdout.buffer.write(png(draw(sys.argv[1], np.random.default_rng())))
