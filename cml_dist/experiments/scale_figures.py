"""Pictures of a scaling study, from what its ``scale.json`` holds: what is projected is dashed, grey and hollow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cml_dist.experiments.report_figures import SIZE, Drawn, drawn, legend_below, log_where_wide, new_figure, style
from cml_dist.experiments.scale_results import PARTS

PART_COLOURS = dict(zip(PARTS, ("#1f5fae", "#c9a227", "#b3460b", "#13733e", "#9aa3ad"), strict=True))
PROJECTED = "#7a7a7a"
ERRORS = "Bars: standard errors."


def draw_study(study: Mapping[str, Any]) -> Iterator[Drawn]:
    """The figures for which enough was measured."""
    cells = study["cells"]
    if len({c["world"] for c in cells}) > 1:
        yield _scaling(study)
    yield _split(cells)
    yield _memory(cells)
    smallest = min(c["world"] for c in cells)
    alone = [c for c in cells if c["world"] == smallest]
    for key in ("parameters", *sorted({key for c in alone for key in c["settings"]})):
        points = [(c["parameters"] if key == "parameters" else c["settings"].get(key), c) for c in alone]
        points = [(x, c) for x, c in points if isinstance(x, (int, float))]
        if len({x for x, _ in points}) > 1:
            yield _growth(key, points, smallest)


def variant_numbers(cells: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Of each variant the number of its colour, from 1."""
    return {variant: n for n, variant in enumerate(dict.fromkeys(c["variant"] for c in cells), start=1)}


def _scaling(study: Mapping[str, Any]) -> Drawn:
    kinds = list(dict.fromkeys(p["kind"] for p in study["scaling"]))
    with new_figure(1, len(kinds), squeeze=False) as (figure, (row,)):
        for kind, axes in zip(kinds, row, strict=True):
            strong = kind == "strong"
            of, by, label = ("speedup", 1, "speed-up") if strong else ("efficiency", 100, "efficiency (%)")
            for variant, number in variant_numbers(study["cells"]).items():
                for points, look in (
                    (study["scaling"], {**style(number), "marker": "o", "label": variant}),
                    (study["projected"], {"color": PROJECTED, "linestyle": "--", "marker": "os^vD<>p"[number % 8],
                                          "markerfacecolor": "white", "label": f"{variant}, projected"}),
                ):  # fmt: skip
                    if own := [p for p in points if p["variant"] == variant and p["kind"] == kind]:
                        values, errors = ([by * p[of][at] for p in own] for at in (0, 1))
                        axes.errorbar([p["world"] for p in own], values, errors, markersize=4, capsize=2, **look)
            worlds = sorted({p["world"] for of in ("scaling", "projected") for p in study[of] if p["kind"] == kind})
            ideal = [world / worlds[0] if strong else 100 for world in worlds]
            axes.plot(worlds, ideal, ":", color="0.6")
            axes.set_xscale("log", base=2)
            axes.set_xticks(worlds, [str(world) for world in worlds])
            if strong:
                axes.set_yscale("log", base=2)
                axes.set_yticks(ideal, [f"{speed:g}" for speed in ideal])
            else:
                axes.set_ylim(0, 1.06 * axes.get_ylim()[1])
            axes.minorticks_off()
            axes.set(title=f"{kind} scaling", xlabel="processes", ylabel=label)
        legend_below(figure, row[-1])
        caption = f"Strong: the same meta-step; weak: the same episodes a process. Dotted: ideal. {ERRORS}"
        return drawn(figure, row[-1], "scaling", "Scaling with processes", caption)


def _split(cells: list[dict[str, Any]]) -> Drawn:
    with new_figure(size=(SIZE[0], 1.1 + 0.3 * len(cells))) as (figure, axes):
        left = [0.0] * len(cells)
        for part, colour in PART_COLOURS.items():
            widths = [100 * c["parts"][part][0] / sum(c["parts"][p][0] for p in PARTS) for c in cells]
            axes.barh(range(len(cells)), widths, left=left, color=colour, height=0.7, label=part)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        names = [f"{_short(c['variant'])}, N={c['world']}, {c['episodes']} ep." for c in cells]
        axes.set_yticks(range(len(cells)), names, fontsize=7)
        axes.margins(y=0.01)
        axes.invert_yaxis()
        axes.set(xlabel="% of a meta-step", xlim=(0, 100))
        legend_below(figure, axes)
        caption = "Waiting: for slower processes. Medians over meta-steps of the means over processes."
        return drawn(figure, axes, "split", "Where the time goes", caption)


def _short(name: str, most: int = 34) -> str:
    """Both of its ends: variants differ at either."""
    return name if len(name) <= most else f"{name[: most // 2 - 3]}...{name[-most // 2 :]}"


def _memory(cells: list[dict[str, Any]]) -> Drawn:
    mib = 2**20
    with new_figure() as (figure, axes):
        for variant, number in variant_numbers(cells).items():
            own = [c for c in cells if c["variant"] == variant]
            planned, measured = ([c[of] / mib for c in own] for of in ("planned_memory", "memory"))
            axes.plot(planned, measured, "o", color=style(number)["color"], markersize=5, label=variant)
        every = [c[of] / mib for c in cells for of in ("planned_memory", "memory")]
        ends = [min(every) / 1.3, max(every) * 1.3]
        axes.plot(ends, ends, ":", color="0.6")
        axes.set(xlabel="planned (MiB)", ylabel="measured (MiB)", xlim=ends, ylim=ends)
        log_where_wide(axes, "xy", every)
        legend_below(figure, axes)
        caption = "Of the busiest process at its largest moment, by cml-dist plan and as measured. Dotted: equal."
        return drawn(figure, axes, "memory", "Memory, measured and planned", caption)


def _growth(key: str, points: list[tuple[float, dict[str, Any]]], world: int) -> Drawn:
    """Seconds of an episode over numbers; a line for variants that differ in nothing else."""
    free = "model.backbone" if key == "parameters" else key
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for x, c in points:
        rest = ", ".join(f"{k.rpartition('.')[2]}={v}" for k, v in c["settings"].items() if k != free) or "all"
        lines.setdefault(rest, []).append((x, *(value / c["each"] for value in c["seconds"])))
    with new_figure() as (figure, axes):
        for number, (rest, line) in enumerate(lines.items(), start=1):
            x, y, errors = zip(*sorted(line), strict=True)
            axes.errorbar(x, y, errors, marker="o", markersize=4, capsize=2, label=rest, **style(number))
        axes.set(xlabel=key, ylabel="seconds an episode")
        log_where_wide(axes, "y", [y for line in lines.values() for _, y, _ in line])
        if key == "parameters":
            log_where_wide(axes, "x", [x for x, _ in points])
        else:
            ticks = sorted({x for x, _ in points})
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        if len(lines) > 1:
            legend_below(figure, axes)
        caption = f"Of a process, in worlds of {world}. {ERRORS}"
        return drawn(figure, axes, f"growth-{key.rpartition('.')[2]}", f"Growth with {key}", caption)
