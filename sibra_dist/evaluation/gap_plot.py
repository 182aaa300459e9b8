"""A plot of the embeddings of each modality in their plane of greatest variance, as SVG, a panel for each side."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import torch
import torch.nn.functional as F
from torch import Tensor

from sibra_dist.evaluation.gap import ONE, SideView, centroid, sampled

PLOTTED = 500
"""Entities of each modality, at most."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#f0e442")
"""Told apart by people with any kind of colour vision (Okabe and Ito 2008)."""
SIZE, MARGIN, LINE = 360, 40, 18
"""Of a panel's square, of what is around it, and of a line of text, in pixels."""


@dataclass(frozen=True)
class Cloud:
    """The embeddings of one modality."""

    name: str
    entities: int
    """That have it"""
    points: Tensor
    """float64 [p, 2]: of some of them"""
    centroid: Tensor | None
    """float64 [2]: of all of them; None of nobody"""


@dataclass(frozen=True)
class Panel:
    """The modalities of one side, projected to the plane of greatest variance of their points together."""

    side: str
    shares: tuple[float, float]
    """Of the variance, along each axis"""
    clouds: tuple[Cloud, ...]


@torch.inference_mode()
def project(view: SideView) -> Panel:
    """A panel of all modalities of a side: principal components of up to `PLOTTED` embeddings each, scaled to length 1.

    Where tables are divided over ranks, all call this together.
    """
    points, centroids, counts = [], [], []
    for name in view.names:
        having = view.having(name)
        counts.append(len(having))
        centroids.append(centroid(view.tiles(having, name), len(having)))
        points.append(view.embeddings(sampled(having, PLOTTED), name).cpu().double() / ONE)
    width = max(2, *(part.shape[1] for part in points))
    points, centroids = ([F.pad(part, (0, width - part.shape[-1])) for part in parts] for parts in (points, centroids))
    together = torch.cat(points)
    middle = together.sum(0) / max(len(together), 1)
    variances, directions = torch.linalg.eigh((together - middle).T @ (together - middle))
    axes = directions[:, [-1, -2]]
    # A direction and its opposite are equally good: the one whose greatest coordinate is positive.
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    total = float(variances.sum())
    first, second = (float(variances[place]) / total if total > 0 else 0.0 for place in (-1, -2))
    clouds = (
        Cloud(name, count, (part - middle) @ axes, (center - middle) @ axes if count else None)
        for name, count, part, center in zip(view.names, counts, points, centroids, strict=True)
    )
    return Panel(view.side, (first, second), tuple(clouds))


def draw(panels: Sequence[Panel]) -> str:
    """The panels side by side, as an SVG document; both axes of a panel have one scale."""
    across = SIZE + 2 * MARGIN
    height = SIZE + 2 * MARGIN + LINE * (2 + max(len(panel.clouds) for panel in panels))
    parts = [text for number, panel in enumerate(panels) for text in _panel(panel, number * across + MARGIN, MARGIN)]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{across * len(panels)}" height="{height}" '
            f'viewBox="0 0 {across * len(panels)} {height}" font-family="sans-serif" font-size="12">',
            "<title>Embeddings of entities in each modality</title>",
            '<rect width="100%" height="100%" fill="white"/>',
            *parts,
            "</svg>\n",
        ]
    )


def _panel(panel: Panel, left: int, top: int) -> list[str]:
    drawn = [cloud.points for cloud in panel.clouds] + [c.centroid[None] for c in panel.clouds if c.centroid is not None]
    everything = torch.cat(drawn)
    low, high = (everything.amin(0), everything.amax(0)) if len(everything) else (torch.zeros(2), torch.zeros(2))
    scale = 0.94 * SIZE / max(float((high - low).max()), 1e-9)
    origin = torch.tensor([left + SIZE / 2, top + SIZE / 2])

    def placed(points: Tensor) -> list[list[float]]:
        moved = (points - (low + high) / 2) * scale * torch.tensor([1.0, -1.0]) + origin
        rows: list[list[float]] = moved.tolist()
        return rows

    below = top + SIZE + LINE
    axis = [f"principal component {number}, {share:.0%} of variance" for number, share in enumerate(panel.shares, start=1)]
    parts = [
        _text(left, top - 8, panel.side, ' font-weight="bold"'),
        f'<rect x="{left}" y="{top}" width="{SIZE}" height="{SIZE}" fill="none" stroke="#999999"/>',
        _text(left + SIZE / 2, below, axis[0], ' text-anchor="middle"'),
        _text(left - 8, top + SIZE / 2, axis[1], f' text-anchor="middle" transform="rotate(-90 {left - 8} {top + SIZE / 2})"'),
    ]
    centroids = []
    for number, cloud in enumerate(panel.clouds):
        colour = COLOURS[number % len(COLOURS)]
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2"/>' for x, y in placed(cloud.points))
        parts.append(f'<g fill="{colour}" fill-opacity="0.5">{dots}</g>')
        if cloud.centroid is not None:
            x, y = placed(cloud.centroid[None])[0]
            centroids.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="7" fill="{colour}" stroke="white" stroke-width="2"/>')
        line = below + LINE * (number + 1)
        parts.append(f'<circle cx="{left + 6}" cy="{line - 4}" r="5" fill="{colour}"/>')
        parts.append(_text(left + 18, line, f"{cloud.name} ({len(cloud.points):,} of {cloud.entities:,} {panel.side})"))
    note = _text(left, below + LINE * (len(panel.clouds) + 1), "large: centroids of all that have the modality")
    return [*parts, *centroids, note]


def _text(x: float, y: float, words: str, attributes: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}"{attributes}>{escape(words)}</text>'
