#!/usr/bin/env python3
"""Draw docs/img/architecture.png and docs/img/what_trains.png: the system, and what each method
trains.

    python scripts/draw_diagrams.py --output docs/img
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from chatglm.commands import Parser, run_command  # noqa: E402
from predictor.pictures import new_figure, save_figure  # noqa: E402

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRAINED, FROZEN = "tab:orange", "#dde3ea"
OF_PROGRAM, OF_FILES = "#cfe2f3", "#fff2cc"
LAYERS = 4

# name -> (centre x, centre y, text, colour); a unit is about two centimetres.
BOXES = {
    "rows": (1.2, 4.2, "rows of any format\ntexts, preferences", OF_FILES),
    "base": (1.2, 2.6, "ChatGLM, GLM-4,\nLlama, Qwen", OF_FILES),
    "train": (
        4.0,
        3.4,
        "train.py on DeepSpeed\nLoRA, P-Tuning, freeze, all;\nDPO, PPO, GRPO",
        OF_PROGRAM,
    ),
    "model": (6.9, 3.4, "tuned model,\nadapter or prefix", OF_FILES),
    "answers": (6.9, 1.4, "predict, evaluate,\ncollect_lengths", OF_PROGRAM),
    "predictor": (4.0, 1.4, "--task predictor:\nlength distributions", OF_PROGRAM),
    "scheduler": (
        9.9,
        3.4,
        "server: policies by\npredicted length,\ndeployers, engines",
        OF_PROGRAM,
    ),
    "gateway": (9.9, 1.4, "gateway before vLLM,\nSGLang, Ollama, ...", OF_PROGRAM),
    "clients": (12.7, 2.4, "clients of OpenAI's\nAPI, the page", OF_FILES),
}
ARROWS = (
    ("rows", "train", ""),
    ("base", "train", ""),
    ("train", "model", ""),
    ("model", "answers", ""),
    ("answers", "predictor", "lengths"),
    ("model", "scheduler", ""),
    ("scheduler", "clients", ""),
    ("gateway", "clients", ""),
)
WIDTH, HEIGHT = 2.2, 1.0


def draw_architecture(path: Path) -> None:
    """The loop: train, answer, learn the lengths, serve by them, learn from what was served."""
    figure = new_figure()
    figure.set_size_inches(12, 4.6)
    panel = bare_panel(figure.subplots(), (0, 14), (0, 5.2))
    for x, y, text, color in BOXES.values():
        draw_box(panel, x, y, WIDTH, HEIGHT, color, text)
    for begin, end, label in ARROWS:
        draw_arrow(panel, edge_towards(begin, end), edge_towards(end, begin), label)
    # The predictor's lines go around the boxes between it and what it serves.
    draw_path(panel, [(4.0, 0.9), (4.0, 0.45), (9.9, 0.45), (9.9, 0.9)], "predicted lengths")
    draw_path(panel, [(8.4, 0.45), (8.4, 3.1), (8.8, 3.1)], "")
    draw_path(panel, [(9.9, 3.9), (9.9, 4.7), (5.4, 4.7), (5.4, 1.6), (5.1, 1.6)], "served lengths")
    save_figure(figure, path)


def edge_towards(begin: str, end: str) -> tuple[float, float]:
    """Where the line from one box to another leaves the first."""
    x, y, *_ = BOXES[begin]
    to_x, to_y, *_ = BOXES[end]
    if abs(to_x - x) >= WIDTH:
        return x + (WIDTH / 2 if to_x > x else -WIDTH / 2), y
    return x, y + (HEIGHT / 2 if to_y > y else -HEIGHT / 2)


def draw_methods(path: Path) -> None:
    """A stack of layers for each method, what trains in orange."""
    figure = new_figure()
    figure.set_size_inches(12, 4.2)
    titles = ("freeze", "P-Tuning v1", "P-Tuning v2", "LoRA", "all")
    for panel, title in zip(figure.subplots(1, len(titles)), titles):
        bare_panel(panel, (-0.4, 5.2), (-0.7, 6.4))
        panel.set_title(title, fontsize=11)
        draw_stack(panel, title)
    figure.suptitle("orange trains, grey stays as it was", fontsize=9)
    save_figure(figure, path)


def draw_stack(panel: "Axes", method: str) -> None:
    whole = TRAINED if method == "all" else FROZEN
    draw_box(panel, 2.4, 0.0, 2.8, 0.6, whole, "embedding")
    draw_box(panel, 2.4, 6.0, 2.8, 0.6, whole, "output")
    for layer in range(LAYERS):
        y = 1.1 + 1.25 * layer
        last = method == "freeze" and layer == LAYERS - 1
        draw_box(panel, 2.4, y, 2.8, 0.8, TRAINED if last else whole, f"layer {layer + 1}")
        if method == "P-Tuning v2":
            draw_box(panel, 0.4, y, 0.9, 0.8, TRAINED, "K, V")
        if method == "LoRA":
            draw_box(panel, 0.15, y, 0.4, 0.8, TRAINED, "A")
            draw_box(panel, 0.65, y, 0.4, 0.8, TRAINED, "B")
    if method == "P-Tuning v1":
        draw_box(panel, 0.4, 0.0, 0.9, 0.6, TRAINED, "vectors")


def bare_panel(panel: "Axes", x: tuple[float, float], y: tuple[float, float]) -> "Axes":
    panel.set(xlim=x, ylim=y)
    panel.axis("off")
    return panel


def draw_box(
    panel: "Axes", x: float, y: float, width: float, height: float, color: str, text: str
) -> None:
    """A box with its text, by its centre."""
    from matplotlib.patches import FancyBboxPatch

    corner = (x - width / 2, y - height / 2)
    style = "round,pad=0,rounding_size=0.1"
    panel.add_patch(
        FancyBboxPatch(corner, width, height, boxstyle=style, facecolor=color, edgecolor="gray")
    )
    panel.text(x, y, text, ha="center", va="center", fontsize=8)


def draw_arrow(
    panel: "Axes", begin: tuple[float, float], end: tuple[float, float], label: str
) -> None:
    panel.annotate("", end, begin, arrowprops={"arrowstyle": "->", "color": "dimgray"})
    if label:
        middle = ((begin[0] + end[0]) / 2, (begin[1] + end[1]) / 2 + 0.1)
        panel.text(*middle, label, ha="center", fontsize=7, color="dimgray")


def draw_path(panel: "Axes", points: list[tuple[float, float]], label: str) -> None:
    """Straight lines through points, an arrow at the last; the label above the second line."""
    panel.plot(*zip(*points[:-1]), color="dimgray", linewidth=1, linestyle="--")
    arrow = {"arrowstyle": "->", "color": "dimgray", "linestyle": "--"}
    panel.annotate("", points[-1], points[-2], arrowprops=arrow)
    middle = ((points[1][0] + points[2][0]) / 2, points[1][1] + 0.08)
    panel.text(*middle, label, ha="center", fontsize=7, color="dimgray")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="draw_diagrams.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, help="a folder")
    flags = parser.parse_args(argv)

    def draw() -> None:
        draw_architecture(flags.output / "architecture.png")
        draw_methods(flags.output / "what_trains.png")

    return run_command(parser.prog, draw)


if __name__ == "__main__":
    sys.exit(main())
