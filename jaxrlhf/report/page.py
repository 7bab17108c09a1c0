"""The page of a report: one HTML file that needs nothing else and asks for nothing, and its table as Markdown for papers.

Every text that comes from data or configs is escaped; the samples stand in the page as JSON and are shown as text by its script.
"""

import json
from base64 import b64encode
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from html import escape
from importlib.resources import files
from typing import Any

from jaxrlhf.evaluation.baselines import beside
from jaxrlhf.evaluation.curves import NO_ERROR
from jaxrlhf.evaluation.findings import findings as said_of
from jaxrlhf.evaluation.findings import notes_of
from jaxrlhf.evaluation.intervals import chance_beyond
from jaxrlhf.files import REPORT_MARKS
from jaxrlhf.formatting import escape_markdown, markdown_table
from jaxrlhf.report.arms import Arm, Column, as_text, best_of, origin, table
from jaxrlhf.report.costs import PARTS
from jaxrlhf.report.drawing import Figure
from jaxrlhf.report.runs import RunRead

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src '{}'; img-src data:; form-action 'none'; base-uri 'none'"
MADE_BY = REPORT_MARKS[0]
WIDE = "overoptimisation"
SECTIONS = (("results", "Results"), ("figures", "Figures"), ("samples-section", "Samples"), ("origin", "Config and lineage"))


def page(
    title: str,
    arms: Sequence[Arm],
    figures: Sequence[Figure],
    absent: Sequence[tuple[str, str]],
    samples: tuple[dict[str, Any], str],
    problems: Sequence[str],
    *,
    made: str,
    version: str | None = None,
) -> str:
    """The whole file. `made`: when; `version`: of a served page, which then asks its own server whether there is a newer one."""
    style, script = (files("jaxrlhf.report").joinpath("assets", name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    script = f"\n{script}"  # as it stands between its tags: its hash is what the policy lets run
    policy = POLICY.format("sha256-" + b64encode(sha256(script.encode()).digest()).decode()) + ("; connect-src 'self'" if version else "")
    served = f' data-version="{escape(version, quote=True)}"' if version else ""
    runs = sum(len(arm.views) for arm in arms)
    body = "\n".join(
        (
            f"<header><h1>{escape(title)}</h1>",
            f"<p>{runs} run{'s' if runs != 1 else ''} in {len(arms)} arm{'s' if len(arms) != 1 else ''} · made {escape(made)}"
            + ('<span class="live"> · kept fresh while it is served</span>' if version else "")
            + "</p>",
            f"<p>{escape(origin(arms))}</p>" if arms else "",
            "<nav>" + "".join(f'<a href="#{at}">{name}</a>' for at, name in SECTIONS) + "</nav></header>",
            "<main>",
            _missing(arms, problems),
            _results(arms),
            _figures(figures, absent),
            _samples(*samples),
            _origin(arms),
            "</main>",
            MADE_BY,
            "<footer>Made by <code>jaxrlhf report</code> from the run folders alone. Colours: Okabe and Ito (2008).</footer>",
        )
    )
    return (
        f'<!doctype html>\n<html lang="en"{served}>\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="referrer" content="no-referrer">\n'
        f'<link rel="icon" href="data:,">\n<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n'
        f"<body>\n{body}\n<script>{script}</script>\n</body>\n</html>\n"
    )


def as_json(value: Any) -> str:
    """JSON that can stand inside a script element: no `<` of its own, so no </script> and no comment."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _missing(arms: Sequence[Arm], problems: Sequence[str]) -> str:
    """What the guards of the runs have said, and what is missing."""
    guards, missing = ([f"<b>{escape(names)}</b>: {escape(said)}" for said, names in one] for one in (_guards(arms), missing_by_text(arms)))
    lines = [f"<li>{line}</li>" for line in (*guards, *map(escape, problems), *missing)]
    return f'<div class="notes"><ul>{"".join(lines)}</ul></div>' if lines else ""


def _guards(arms: Sequence[Arm]) -> list[tuple[str, str]]:
    return _by_text(arms, lambda run: run.guards)


def missing_by_text(arms: Sequence[Arm]) -> list[tuple[str, str]]:
    return _by_text(arms, lambda run: run.missing)


def _by_text(arms: Sequence[Arm], of: Callable[[RunRead], Sequence[str]]) -> list[tuple[str, str]]:
    """(what is said, of which runs): the same thing said once."""
    found: dict[str, list[str]] = {}
    for arm in arms:
        for view in arm.views:
            seed = f" (seed {view.run.seed})" if len(arm.views) > 1 else ""
            for said in dict.fromkeys(of(view.run)):
                found.setdefault(said, []).append(f"{arm.name}{seed}")
    return [(said, ", ".join(names)) for said, names in found.items()]


def _results(arms: Sequence[Arm]) -> str:
    columns, rows = table(arms)
    several = any(len(arm.views) > 1 for arm in arms)
    errors = errors_said(arms, columns, rows)
    columns, alike = varying(columns, rows)
    head = [_th("arm", "text", "name", "ascending")] + ([_th("seeds", "", "of which the means are")] if several else [])
    states = any(row["state"] != "finished" for row in rows)
    head += [_th(column.title, "", column.meaning) for column in columns] + ([_th("state", "text", "", "ascending")] if states else [])
    best = {column.key: best_of(arms, column) for column in columns if column.key in BEST}
    lines = []
    for row in rows:
        cells = [f'<td class="text">{escape(row["arm"])}</td>'] + (
            [f'<td data-value="{row["seeds"]}">{row["seeds"]}</td>'] if several else []
        )
        cells += [_cell(row, column, best.get(column.key) == row["arm"]) for column in columns]
        cells += [f'<td class="text">{escape(row["state"])}</td>'] if states else []
        lines.append(f"<tr>{''.join(cells)}</tr>")
    legend = "; ".join(f"<b>{escape(column.title)}</b>: {escape(column.meaning)}" for column in columns)
    said = "".join(f"<li>{escape(line)}</li>" for line in findings(arms))
    return (
        f'<section id="results"><h2>Results</h2><p>A click on a heading sorts. {escape(f"{errors} {alike}".strip())}</p>'
        f'<div class="box"><table id="summary"><thead><tr>{"".join(head)}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
        f'<ul class="findings">{said}</ul><details><summary>What the columns mean</summary><p>{legend}.</p></details></section>'
    )


def errors_said(arms: Sequence[Arm], columns: Sequence[Column], rows: Sequence[dict[str, Any]]) -> str:
    """What stands beside a figure of the table, and what is highlighted in it."""
    over: dict[str, list[str]] = {}
    for column in columns:
        n = sorted({row["intervals"][column.key].n for row in rows if column.key in row["intervals"]})
        if n:
            over.setdefault(f"n = {', '.join(map(str, n))}" if all(n) else "n not kept", []).append(column.title)
    which = "; ".join(f"{n}: {', '.join(titles)}" for n, titles in over.items())
    said = [f"Brackets: 95 % over one seed's prompts, of accuracy and ECE over the pairs that gold decides ({which})."] if over else []
    several = [len(arm.compared) for arm in arms if len(arm.compared) > 1]
    if several:
        chance = f"with n = {min(several)} seeds one comparison is beyond by chance in {100 * chance_beyond(min(several)):.0f} % of cases"
        coloured = f"Coloured: more than two above every other arm, seed by seed; {chance}."
        said.insert(0, f"±: one standard error over seeds. {NO_ERROR} {coloured}")
    return " ".join(said)


def varying(columns: Sequence[Column], rows: Sequence[dict[str, Any]]) -> tuple[list[Column], str]:
    """The columns in which some arm differs from another (gold always), and the others in a sentence."""
    texts = {column.key: {cell_text(row, column) for row in rows} for column in columns}
    kept = [column for column in columns if len(rows) == 1 or len(texts[column.key]) > 1 or column.key in BEST]
    alike = [f"{column.title} {' '.join(next(iter(texts[column.key]))).strip()}" for column in columns if column not in kept]
    return kept, f"The same in all arms: {', '.join(alike)}." if alike else ""


def cell_text(row: dict[str, Any], column: Column) -> tuple[str, str]:
    """(figure, or mean ± standard error over seeds; the interval over prompts in brackets, or nothing)."""
    one, digits = row["intervals"].get(column.key), column.digits
    text = as_text(row[column.key], digits, sign=column.key == "difference")
    return text, "" if one is None else f"[{one.low:,.{digits}f}, {one.high:,.{digits}f}]"


def _th(title: str, kind: str, meaning: str, first: str = "descending") -> str:
    cls = f' class="{kind}"' if kind else ""
    return f'<th scope="col"{cls} data-first="{first}" title="{escape(meaning, quote=True)}"><button>{escape(title)}</button></th>'


BEST = ("gold", "win_rate")  # columns in which more is better, whatever else is so


def _cell(row: dict[str, Any], column: Column, best: bool) -> str:
    value, (text, interval) = row[column.key], cell_text(row, column)
    small = f'<span class="soft">{interval}</span>' if interval else ""
    return f'<td data-value="{"" if value is None else repr(value.mean)}"{" class=best" if best else ""}>{text}{small}</td>'


def findings(arms: Sequence[Arm]) -> list[str]:
    """What the figures say beyond their intervals, and what the runs note."""
    lines = said_of([trial for arm in arms for trial in arm.trials])
    named = {f"{arm.name} (seed {arm.first.run.seed})" if len(arm.views) > 1 else arm.name: arm.first.run for arm in arms}
    lines += beside({name: (run.rounds, run.baselines) for name, run in named.items()})
    behind = [arm for arm in arms if len(arm.compared) < len(arm.views)]
    lines += [
        f"{arm.name}: means are of the {len(arm.compared)} of {len(arm.views)} seeds with the most finished rounds." for arm in behind
    ]
    return lines + notes_of((arm.name, view.run.notes) for arm in arms for view in arm.views)


def _figures(figures: Sequence[Figure], absent: Sequence[tuple[str, str]]) -> str:
    drawn = "\n".join(
        f'<figure id="figure-{f.name}"{" class=wide" if f.name == WIDE else ""}><h3>{escape(f.title)}</h3>{f.inline}'
        f"<figcaption>{escape(f.caption)}</figcaption></figure>"
        for f in figures
    )
    rest = "".join(f"<li><b>{escape(title)}</b>: {escape(why)}</li>" for title, why in absent)
    left = f"<details><summary>Figures with nothing to show: {len(absent)}</summary><ul>{rest}</ul></details>" if absent else ""
    where = "<p>Also as SVG and PNG in <code>figures/</code> beside this page.</p>" if figures else ""
    return f'<section id="figures"><h2>Figures</h2>{where}<div class="figures">{drawn}</div>{left}</section>'


def _samples(data: dict[str, Any], said: str) -> str:
    if not data["rows"]:
        return f'<section id="samples-section"><h2>Samples</h2><p>{escape(said)}</p></section>'
    titles = {"kl": "KL (nats)", "length": "tokens"}
    heads = "".join(
        f'<th scope="col" data-key="{name}" data-first="{"descending" if name in ("gold", "proxy", "kl", "length") else "ascending"}"'
        f"{' class=text' if name in ('prompt', 'response', 'reference') else ''}><button>{titles.get(name, name)}</button></th>"
        for name in data["columns"]
    )
    return (
        f'<section id="samples-section"><h2>Samples</h2><p>{escape(said)} KL: log π − log π_SFT of the response. Proxy: the round\'s own '
        'reward model.</p><div class="controls"><label>arm <select id="arm"><option value="">all</option></select></label>'
        '<label>round <select id="round"></select></label><label>ended <select id="ended"><option value="">all</option>'
        '<option value="yes">yes</option><option value="no">no</option></select></label>'
        '<label>text <input id="filter" type="search" placeholder="in prompt, response, reference"></label>'
        '<span id="count" class="soft" aria-live="polite"></span></div>'
        f'<div class="box" id="samples"><table id="sample-table"><thead><tr>{heads}</tr></thead><tbody></tbody></table></div>'
        '<p class="controls"><button id="more" hidden>show more</button></p>'
        f'<script type="application/json" id="sample-data">{as_json(data)}</script></section>'
    )


def _origin(arms: Sequence[Arm]) -> str:
    parts = []
    for arm in arms:
        run = arm.first.run
        rows = [[one["stage"], one["hash"], one["from"], one["on"], f"{one['seconds']:.0f}", one["finished"]] for one in arm.first.lineage]
        models = _table(("model", "hash", "made from", "by or on", "seconds", "finished"), rows) if rows else "<p>No model is finished.</p>"
        costs = _costs(arm)
        seeds = ", ".join(str(view.run.seed) for view in arm.views)
        folders = "".join(f"<li><code>{escape(str(view.run.folder))}</code></li>" for view in arm.views)
        parts.append(
            f"<details{' open' if len(arms) == 1 else ''}><summary><b>{escape(arm.name)}</b> · method {escape(run.method)} · seed "
            f'{escape(seeds)}</summary><ul class="soft">{folders}</ul>{models}{costs}'
            f"<details><summary>config.yaml</summary><pre>{escape(run.config_text) or 'missing'}</pre></details></details>"
        )
    return f'<section id="origin"><h2>Config and lineage</h2>{"".join(parts)}</section>'


def _costs(arm: Arm) -> str:
    """Seconds and FLOPs by part, of the first seed, and why a count is not known."""
    seconds, (flops, reasons) = arm.first.seconds, arm.first.flops
    rows = [
        [part, f"{seconds[part]:,.1f}", "not known" if (n := flops[part]) is None else f"{n:.3g}"]
        for part in PARTS
        if seconds[part] or flops[part] != 0
    ]
    why = "".join(f"<li>{escape(reason)}</li>" for reason in reasons)
    counted = f'<p>FLOPs that are not known:</p><ul class="soft">{why}</ul>' if why else ""
    return f"<details><summary>Cost</summary>{_table(('part', 'seconds', 'FLOPs'), rows)}{counted}</details>"


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col" class="text">{escape(title)}</th>' for title in titles)
    body = "".join("<tr>" + "".join(f'<td class="text">{escape(cell)}</td>' for cell in row) + "</tr>" for row in rows)
    return f'<div class="box"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def markdown(title: str, arms: Sequence[Arm], problems: Sequence[str]) -> str:
    """The summary table for a paper, what its columns mean, and what is missing."""
    columns, rows = table(arms)
    errors = errors_said(arms, columns, rows)
    columns, alike = varying(columns, rows)
    several = any(len(arm.views) > 1 for arm in arms)
    head = ["arm", *(["seeds"] if several else []), *(column.title for column in columns)]
    body = [
        [escape_markdown(row["arm"]), *([str(row["seeds"])] if several else []), *(" ".join(cell_text(row, c)).strip() for c in columns)]
        for row in rows
    ]
    lines = [f"# {escape_markdown(title)}", ""]
    lines += [f"- {escape_markdown(f'{names}: {said}')}" for said, names in _guards(arms)]
    lines += ["", markdown_table(head, body, ":--", "--:"), ""]
    lines += [f"- {column.title}: {column.meaning}." for column in columns]
    lines += [f"- {escape_markdown(line)}" for line in (errors, alike) if line]
    lines += ["", *(f"- {escape_markdown(line)}" for line in findings(arms))]
    lines += [f"- Missing: {escape_markdown(f'{names}: {said}')}" for said, names in missing_by_text(arms)]
    lines += [f"- Missing: {escape_markdown(problem)}" for problem in problems]
    return "\n".join([*lines, "", MADE_BY]) + "\n"
