"""The plot of embeddings by modality."""

from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from sibra_dist.data.dataset import open_dataset
from sibra_dist.data.presence import Hidden
from sibra_dist.evaluation.gap import SideView
from sibra_dist.evaluation.gap_plot import Panel, draw, project
from tests.evaluation.test_gap import ABSENT, Tabled
from tests.planted import write_planted

SVG = "{http://www.w3.org/2000/svg}"


def panel(folder: Path, **tables: list[list[float]]) -> Panel:
    return project(SideView(Tabled(**tables), open_dataset(write_planted(folder)), Hidden("items")))


def test_points_in_their_plane_of_greatest_variance(tmp_path: Path) -> None:
    """Five of unit length, mean (0.6, 0): variances of x and y, each of five, are 3.2 and 0."""
    found = panel(tmp_path / "dataset", text=[[1.0, 0.0], [3.0, 0.0], ABSENT], image=[[-1.0, 0.0], [9.0, 0.0], [1.0, 0.0]])
    assert found.shares == pytest.approx((1.0, 0.0))
    text, image = found.clouds
    assert (text.name, text.entities, image.entities) == ("text", 2, 3)
    torch.testing.assert_close(text.points[:, 0], torch.tensor([0.4, 0.4], dtype=torch.float64))
    torch.testing.assert_close(image.points[:, 0], torch.tensor([-1.6, 0.4, 0.4], dtype=torch.float64))
    assert text.centroid is not None
    assert image.centroid is not None
    assert float(text.centroid[0]) == pytest.approx(0.4)
    assert float(image.centroid[0]) == pytest.approx(1 / 3 - 0.6)


@pytest.mark.parametrize("nobody", [False, True])
def test_it_is_svg_with_all_points_inside_and_names_by_the_letter(tmp_path: Path, nobody: bool) -> None:
    tables = {"a<b&c": [ABSENT] if nobody else [[1.0, 0.0]] * 3, "image": [ABSENT] if nobody else [[0.0, 1.0]] * 3}
    found = panel(tmp_path / "dataset", **tables)
    root = ElementTree.fromstring(draw([found, found]))
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    circles = [(float(c.attrib["cx"]), float(c.attrib["cy"]), c.attrib["r"]) for c in root.iter(f"{SVG}circle")]
    assert all(0 < x < width and 0 < y < height for x, y, _ in circles)
    assert [sum(r == radius for *_, r in circles) for radius in ("2", "7", "5")] == ([0, 0, 4] if nobody else [12, 4, 4])
    words = [text.text for text in root.iter(f"{SVG}text")]
    assert words.count(f"a<b&c ({0 if nobody else 3} of {0 if nobody else 3} items)") == 2
