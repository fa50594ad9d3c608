"""A comparison of runs as tables: on a screen, in a paper (LaTeX), in a page (Markdown), for a program (CSV)."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence

from cml_dist.experiments.compare import Comparison, Variant
from cml_dist.run.interval import Estimate
from cml_dist.telemetry import text

Table = tuple[str, list[str], list[list[str]]]
"""Title, columns and rows."""


def shown(score: str, value: float, form: str = ".2f") -> str:
    """An accuracy (a fraction) in per cent, without the sign; an MSE with four digits."""
    is_share = score == "accuracy"
    return text.MISSING if not math.isfinite(value) else f"{100 * value:{form}}" if is_share else f"{value:#.4g}"


def interval(score: str, value: Estimate, form: str = ".2f") -> str:
    """A mean, and the half width of its interval if there is one."""
    half = f" ± {shown(score, value.ci95)}" if math.isfinite(value.ci95) else ""
    return f"{shown(score, value.mean, form)}{half}"


def slope(score: str, variant: Variant) -> str:
    """Of the last validations, per 1,000 meta-steps."""
    return text.MISSING if variant.last_slope is None else shown(score, variant.last_slope, "+.2f")


def score_column(score: str) -> str:
    """What a column of such figures is called."""
    return f"{text.score_label(score)} (%)" if score == "accuracy" else text.score_label(score)


def tables(found: Comparison) -> list[Table]:
    """Scores, differences to the baseline, and costs, each small enough for a narrow screen."""
    kind, baseline = found.score, found.variants[0].name

    def scores(v: Variant) -> list[str]:
        return [str(len(v.runs)), interval(kind, v.over_episodes), shown(kind, v.over_seeds.se), slope(kind, v)]

    def difference(v: Variant) -> list[str]:
        if v.difference is None:
            return ["baseline", *[text.MISSING] * 3]
        seeds = v.difference.over_seeds
        half = f"± {shown(kind, seeds.ci95)}" if math.isfinite(seeds.ci95) else text.MISSING
        return [interval(kind, v.difference.over_episodes, "+.2f"), shown(kind, seeds.se), half, _p(seeds.p)]

    def costs(v: Variant) -> list[str]:
        steps = text.MISSING if v.steps_to_reach is None else f"{v.steps_to_reach:,.0f}"
        return [text.duration(v.seconds), steps, text.number(v.peak_memory_gib, 3)]

    test = f"{found.split} split, {found.episodes:,} episodes "
    test += "(±: 95 % over these episodes; s.e. over seeds; slope: of the last validations, per 1,000 steps)"
    differs = f"Paired difference to {baseline} (s.e., 95 % and p over seeds)"
    blocks: list[tuple[str, list[str], Callable[[Variant], list[str]]]] = [
        (test, ["seeds", score_column(kind), "s.e.", "slope"], scores),
        (differs, ["difference", "s.e.", "95 %", "p"], difference),
        ("Training", ["time", f"steps to {100 * found.reach:g} %", "peak GiB"], costs),
    ]
    return [
        (title, ["variant", *columns], [[variant.name, *cells(variant)] for variant in found.variants])
        for title, columns, cells in (blocks if len(found.variants) > 1 else blocks[::2])
    ]


def _p(value: float) -> str:
    return text.MISSING if math.isnan(value) else "< 0.0001" if value < 1e-4 else f"{value:.4f}"


def as_csv(found: Comparison) -> str:
    """Numbers as they are, scores and differences as parts of 1 or as MSE; what is not known is empty."""
    of = [f"{kind}_{key}" for kind in ("episodes", "seeds") for key in ("ci95", "se", "p")]
    columns = ["variant", "runs", "seeds", found.score, "episodes_ci95", "seeds_se", "paired_seeds", "difference"]
    columns += [f"difference_{key}" for key in of]
    columns += ["seconds", f"steps_to_{found.reach:g}", "last_slope", "peak_memory_gib"]
    rows = []
    for v in found.variants:
        differs: Sequence[object] = [None] * (2 + len(of))
        if (d := v.difference) is not None:
            each = [getattr(one, key) for one in (d.over_episodes, d.over_seeds) for key in ("ci95", "se", "p")]
            differs = [" ".join(map(str, d.seeds)), d.over_episodes.mean, *each]
        row = [v.name, " ".join(run.folder for run in v.runs), " ".join(str(run.seed) for run in v.runs)]
        row += [v.over_episodes.mean, v.over_episodes.ci95, v.over_seeds.se, *differs]
        row += [v.seconds, v.steps_to_reach, v.last_slope, v.peak_memory_gib]
        rows.append(row)
    return csv_text(columns, rows)


def csv_text(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Cells as they are; what is not known, or no finite number, is empty."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([None if isinstance(x, float) and not math.isfinite(x) else x for x in row] for row in rows)
    return file.getvalue()


def markdown(all_of_them: Sequence[Table], notes: Sequence[str] = ()) -> str:
    """A heading and a table each, and below each the notes."""
    below = "".join(f"\n{text.markdown(note)}\n" for note in notes)
    return "\n".join(
        f"**{text.markdown(title)}**\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows) + below
        for title, rows in (
            (title, [[*map(text.markdown, columns)], ["---"] * len(columns), *([*map(text.markdown, r)] for r in rows)])
            for title, columns, rows in all_of_them
        )
    )


def latex(all_of_them: Sequence[Table], notes: Sequence[str] = ()) -> str:
    """A ``tabular`` each, of the package booktabs, with the notes as its last lines."""
    parts = []
    for title, columns, rows in all_of_them:
        head, *body = (" & ".join(map(_latex, row)) + r" \\" for row in (columns, *rows))
        shape = "l" + "r" * (len(columns) - 1)
        lines = [rf"\begin{{tabular}}{{{shape}}}", r"\toprule", head, r"\midrule", *body]
        lines += [r"\midrule"] * bool(notes) + [
            rf"\multicolumn{{{len(columns)}}}{{l}}{{{_latex(n)}}} \\" for n in notes
        ]
        lines.append(r"\bottomrule")
        parts.append("\n".join([f"% {text.line(title)}", *lines, r"\end{tabular}", ""]))
    return "\n".join(parts)


_LATEX = {**{char: f"\\{char}" for char in "#$%&_{}"}, "\\": r"\textbackslash{}", "~": r"\textasciitilde{}"}
_LATEX |= {"^": r"\textasciicircum{}", "±": r"$\pm$", "<": "$<$"}


def _latex(cell: str) -> str:
    return "".join(_LATEX.get(char, char) for char in text.line(cell))
