"""A picture of a colony: who stands near whom, and the cosines of all pairs of gammas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from organism import OrganismError
from swarm.topology import Topology


def places(cosines: np.ndarray) -> np.ndarray:
    """float64 [n, 2]: points whose distances are, as far as a plane allows, those of the gammas' directions, √(2 − 2·cosine)
    (classical scaling: the two largest eigenvectors of the centred cosines). What cannot be compared counts as orthogonal."""
    known = np.nan_to_num(cosines.astype(np.float64), nan=0.0)
    np.fill_diagonal(known, 1.0)
    centre = np.eye(len(known)) - 1 / max(1, len(known))
    values, vectors = np.linalg.eigh(centre @ known @ centre)
    plane = vectors[:, ::-1][:, :2] * np.sqrt(np.maximum(values[::-1][:2], 0))
    return plane if plane.shape[1] == 2 else np.zeros((len(known), 2))


def draw(seen: Topology, names: Mapping[str, str], path: str) -> None:
    """Write the picture as .png, .svg or .pdf. Raises OrganismError where matplotlib or what could be drawn is missing."""
    if not seen.ids:
        raise OrganismError("There is nobody to draw: `organism swarm up -n 4` starts a colony.")
    try:
        import matplotlib
    except ImportError as error:
        raise OrganismError("Pictures need matplotlib: pip install -e '.[plot]'.") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = [names.get(id, id) for id in seen.ids]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5.5), layout="constrained")
    _draw_places(left, seen, labels)
    _draw_cosines(right, seen, labels)
    coherence = "nobody can be compared yet" if seen.coherence is None else f"coherence {seen.coherence:.2f}"
    figure.suptitle(f"{len(labels)} organisms, {coherence}")
    try:
        figure.savefig(Path(path).expanduser(), dpi=120)
    except (OSError, ValueError) as error:
        raise OrganismError(f"The picture {path} cannot be written: {error}.") from error
    finally:
        plt.close(figure)


def _draw_places(axes, seen: Topology, labels: Sequence[str]) -> None:
    at = places(seen.cosines)
    index = {id: k for k, id in enumerate(seen.ids)}
    for a, b, cosine in seen.resonances:
        axes.plot(
            *at[[index[a], index[b]]].T,
            color="tab:green",
            alpha=0.3 + 0.5 * (cosine - 0.8) / 0.2,
            linewidth=1,
            zorder=1,
        )
    compared = [bool(np.isfinite(row).any()) for row in seen.cosines]
    colours = [
        "tab:red" if id in seen.outliers else "tab:blue" if known else "lightgrey"
        for id, known in zip(seen.ids, compared)
    ]
    axes.scatter(*at.T, c=colours, s=60, zorder=2)
    for k, (label, point) in enumerate(zip(labels, at)):  # above and below in turns: points may lie on each other
        axes.annotate(label, point, xytext=(6, (4, -11, 15)[k % 3]), textcoords="offset points", fontsize=8)
    axes.margins(0.15)
    axes.set_aspect("equal", "datalim")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(
        "Near: grown in the same direction. Lines: resonance.\nRed: outliers. Grey: cannot be compared yet", fontsize=9
    )


def _draw_cosines(axes, seen: Topology, labels: Sequence[str]) -> None:
    shown = axes.imshow(seen.cosines, vmin=-1, vmax=1, cmap="RdBu_r")
    axes.figure.colorbar(shown, ax=axes, shrink=0.8)
    if len(labels) <= 40:
        axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7)
        axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.set_title("Cosine of each pair of gammas", fontsize=9)
