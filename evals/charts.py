"""Line charts as SVG. Axes span the data; colours and dashes are classes of evals/html.py."""

import math
from html import escape
from typing import NamedTuple

LEFT, RIGHT, TOP, BOTTOM = 52, 348, 10, 176  # of the plot, in a picture of 360 x 214
MOST_POINTS = 240  # of a line; longer ones are means of neighbours


class Line(NamedTuple):
    name: str
    kind: str  # its class: und, gen, win, lose, right, or "" for grey
    points: list[tuple]  # (x, y) or (x, y, low, high), in the order of x


class Axes(NamedTuple):
    """From data to the picture."""

    left: float
    right: float
    low: float
    high: float

    def x(self, value: float) -> float:
        return LEFT + (RIGHT - LEFT) * (value - self.left) / (self.right - self.left)

    def y(self, value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (value - self.low) / (self.high - self.low)


def axes_of(lines: list[Line], named: bool) -> Axes:
    """The range of all points and intervals, and a little more; a single value has a range, too.

    Shares, and what else is in [0, 1], stay in it.
    """
    points = [p for line in lines for p in line.points]
    xs = [p[0] for p in points]
    ys = [y for p in points for y in p[1:]]
    beside = 0.3 if named or min(xs) == max(xs) else 0  # names stand under their points
    margin = 0.06 * (max(ys) - min(ys)) or 0.1 * abs(max(ys)) or 1
    low = min(ys) - margin
    high = max(ys) + margin
    if 0 <= min(ys) and max(ys) <= 1:
        low = max(low, 0)
        high = min(high, 1)
    return Axes(min(xs) - beside, max(xs) + beside, low, high)


def ticks(low: float, high: float, most: int) -> list[tuple[float, str]]:
    """At most so many round numbers in a range, each with its text."""
    step = grid_step((high - low) / most)
    first = math.ceil(low / step)
    values = [i * step + 0.0 for i in range(first, math.floor(high / step) + 1)]
    if step < 1e-3 or high >= 1e6:
        return [(v, f"{v:.3g}") for v in values]
    decimals = max(0, -math.floor(math.log10(step)))
    return [(v, f"{v:.{decimals}f}".replace("-", "−")) for v in values]


def grid_step(least: float) -> float:
    """The smallest of 1, 2, 5, 10 times a power of ten that is not below `least`."""
    power = 10 ** math.floor(math.log10(least))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= least * (1 - 1e-9))


def averaged(points: list[tuple]) -> int:
    """How many points of a line a point of its picture is the mean of."""
    return math.ceil(len(points) / MOST_POINTS)


def thinned(points: list[tuple]) -> list[tuple]:
    """Means of neighbouring points, where there are more than a chart can show."""
    size = averaged(points)
    if size == 1:
        return points
    chunks = [points[i : i + size] for i in range(0, len(points), size)]
    return [tuple(sum(column) / len(chunk) for column in zip(*chunk)) for chunk in chunks]


def chart(title: str, lines: list[Line], names: list[str] | None = None, shade: str = "") -> str:
    """A titled chart with its legend. names: of x = 0, 1, …, else x are training steps.

    shade: what the area between the first two lines is.
    """
    size = max(averaged(line.points) for line in lines)
    lines = [line._replace(points=thinned(line.points)) for line in lines]
    axes = axes_of(lines, names is not None)
    parts = ['<svg viewBox="0 0 360 214" role="img">', f"<title>{escape(title)}</title>"]
    for value, text in ticks(axes.low, axes.high, 6):
        kind = "zero" if value == 0 else "rule"
        parts.append(f'<path class="{kind}" d="M{LEFT} {axes.y(value):.1f}H{RIGHT}"/>')
        parts.append(label(LEFT - 6, axes.y(value) + 4, text, "end"))
    at = list(enumerate(names)) if names else x_ticks(axes)
    for value, text in at:
        parts.append(f'<path class="tick" d="M{axes.x(value):.1f} {BOTTOM}v4"/>')
        parts.append(label(axes.x(value), BOTTOM + 17, text))
    parts.append(f'<path class="tick" d="M{LEFT} {BOTTOM}H{RIGHT}"/>')
    if names is None:
        unit = "training step" + (f"; a point is the mean of {size} steps" if size > 1 else "")
        parts.append(label((LEFT + RIGHT) / 2, BOTTOM + 34, unit))
    if shade:
        first, second = ([place(axes, p) for p in line.points] for line in lines[:2])
        parts.append(f'<path class="shade" d="M{" L".join([*first, *reversed(second)])}Z"/>')
    for line in lines:
        parts += drawn(axes, line)
    legend = "".join(swatch(line) for line in lines)
    if shade:
        legend += f'<span class="key"><i class="shade"></i>{escape(shade)}</span>'
    return (f'<div class="title">{escape(title)}</div><div class="keys">{legend}</div>'
            + "".join(parts) + "</svg>")


def x_ticks(axes: Axes) -> list[tuple[float, str]]:
    """Whole steps."""
    step = max(1, round(grid_step((axes.right - axes.left) / 6)))
    first = math.ceil(axes.left / step) * step
    return [(v, str(v)) for v in range(first, math.floor(axes.right) + 1, step)]


def drawn(axes: Axes, line: Line) -> list[str]:
    """A line, and marks where points are few or have intervals."""
    kind = line.kind or "grey"
    path = " L".join(place(axes, p) for p in line.points)
    parts = [f'<path class="line {kind}" d="M{path}"/>']
    for p in line.points:
        x, y = axes.x(p[0]), axes.y(p[1])
        if len(p) == 4:
            low, high = axes.y(p[2]), axes.y(p[3])
            parts.append(f'<path class="bar {kind}" d="M{x:.1f} {low:.1f}V{high:.1f}"/>')
        if len(line.points) <= 12:
            parts.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>')
    return parts


def place(axes: Axes, point: tuple) -> str:
    return f"{axes.x(point[0]):.1f} {axes.y(point[1]):.1f}"


def label(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def swatch(line: Line) -> str:
    """A line's sample and name."""
    kind = line.kind or "grey"
    return ('<span class="key"><svg class="swatch" viewBox="0 0 26 8">'
            f'<path class="line {kind}" d="M1 4H25"/></svg>{escape(line.name)}</span>')


# ----------------------------------------------------------------------------------------- training
