"""The page of a report: one HTML file that needs nothing else and asks for nothing, and its table as Markdown for papers.

Every text that comes from data or configs is escaped; the samples stand in the page as JSON and are shown as text by its script.
"""

import json
from base64 import b64encode
from collections.abc import Iterable, Sequence
from hashlib import sha256
from html import escape
from importlib.resources import files
from typing import Any

from jaxrlhf.evaluation.baselines import beside
from jaxrlhf.evaluation.curves import estimate
from jaxrlhf.formatting import escape_markdown, markdown_table
from jaxrlhf.report.arms import Arm, Column, as_text, table
from jaxrlhf.report.costs import PARTS
from jaxrlhf.report.drawing import Figure

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src '{}'; img-src data:; form-action 'none'; base-uri 'none'"
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
            "<nav>" + "".join(f'<a href="#{at}">{name}</a>' for at, name in SECTIONS) + "</nav></header>",
            "<main>",
            _missing(arms, problems),
            _results(arms),
            _figures(figures, absent),
            _samples(*samples),
            _origin(arms),
            "</main>",
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
    lines = [f"<li>{escape(problem)}</li>" for problem in problems]
    for said, names in missing_by_text(arms):
        lines.append(f"<li><b>{escape(names)}</b>: {escape(said)}</li>")
    return f'<div class="notes"><ul>{"".join(lines)}</ul></div>' if lines else ""


def missing_by_text(arms: Sequence[Arm]) -> list[tuple[str, str]]:
    """(what is missing, of which runs): the same thing said once."""
    by_text: dict[str, list[str]] = {}
    for arm in arms:
        for view in arm.views:
            seed = f" (seed {view.run.seed})" if len(arm.views) > 1 else ""
            for said in dict.fromkeys(view.run.missing):
                by_text.setdefault(said, []).append(f"{arm.name}{seed}")
    return [(said, ", ".join(names)) for said, names in by_text.items()]


def _results(arms: Sequence[Arm]) -> str:
    columns, rows = table(arms)
    several = any(len(arm.views) > 1 for arm in arms)
    head = [_th("arm", "text", "name", "ascending")] + ([_th("seeds", "", "of which the means are")] if several else [])
    head += [_th(column.title, "", column.meaning) for column in columns] + [_th("state", "text", "", "ascending")]
    lines = []
    for row in rows:
        cells = [f'<td class="text">{escape(row["arm"])}</td>'] + (
            [f'<td data-value="{row["seeds"]}">{row["seeds"]}</td>'] if several else []
        )
        cells += [_cell(row, column, rows) for column in columns] + [f'<td class="text">{escape(row["state"])}</td>']
        lines.append(f"<tr>{''.join(cells)}</tr>")
    note = " Means ± one standard error over seeds." if several else ""
    legend = "; ".join(f"<b>{escape(column.title)}</b>: {escape(column.meaning)}" for column in columns)
    said = "".join(f"<li>{escape(line)}</li>" for line in findings(arms))
    return (
        f'<section id="results"><h2>Results</h2><p>A click on a heading sorts.{note}</p><div class="box"><table id="summary">'
        f"<thead><tr>{''.join(head)}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
        f'<ul class="findings">{said}</ul><details><summary>What the columns mean</summary><p>{legend}.</p></details></section>'
    )


def _th(title: str, kind: str, meaning: str, first: str = "descending") -> str:
    cls = f' class="{kind}"' if kind else ""
    return f'<th scope="col"{cls} data-first="{first}" title="{escape(meaning, quote=True)}"><button>{escape(title)}</button></th>'


BEST = ("gold", "win_rate")  # columns in which more is better, whatever else is so


def _cell(row: dict[str, Any], column: Column, rows: Sequence[dict[str, Any]]) -> str:
    value = row[column.key]
    known = [one[column.key].mean for one in rows if one[column.key] is not None]
    best = column.key in BEST and len(known) > 1 and value is not None and value.mean == max(known) and min(known) < max(known)
    raw = "" if value is None else repr(value.mean)
    return f'<td data-value="{raw}"{" class=best" if best else ""}>{as_text(value, column.digits)}</td>'


def findings(arms: Sequence[Arm]) -> list[str]:
    """Sentences computed from the curves; every one holds whichever way they came out."""
    lines = []
    for arm in arms:
        said = [text for text in (_peak_said(arm), _gap_said(arm)) if text]
        lines += [f"{arm.name}: {'; '.join(said)}."] if said else []
    named = {f"{arm.name} (seed {arm.first.run.seed})" if len(arm.views) > 1 else arm.name: arm.first.run for arm in arms}
    lines += beside({name: (run.rounds, run.baselines) for name, run in named.items()})
    behind = [arm for arm in arms if len(arm.compared) < len(arm.views)]
    lines += [
        f"{arm.name}: means are of the {len(arm.compared)} of {len(arm.views)} seeds with the most finished rounds." for arm in behind
    ]
    lines += sorted({note for arm in arms for view in arm.views for note in view.run.notes})
    seeds = {view.run.seed for arm in arms for view in arm.views}
    if len(arms) > 1 and len(seeds) == 1:
        lines.append("All arms have one seed; differences between them need several before they mean anything.")
    return lines


def _peak_said(arm: Arm) -> str:
    known = [view.curve for view in arm.compared if len(view.curve.points) > 1 and view.curve.points[-1].gold is not None]
    lost = [curve for curve in known if curve.lost]
    if not known:
        return ""
    if len(known) > 1:
        return f"gold ended below its peak in {len(lost)} of {len(known)} seeds"
    peak = known[0].peak
    if not lost or peak is None:
        return "gold is highest at the end"
    return f"gold was highest {f'in round {peak.round}' if peak.round else 'at SFT'} ({peak.gold:.3f}) and ends {known[0].lost:.3f} lower"


def _gap_said(arm: Arm) -> str:
    gap = estimate([view.curve.gap for view in arm.compared])
    if gap is None:
        return ""
    amount = as_text(gap._replace(mean=abs(gap.mean)), 2)
    return f"at the end the reward models believe in a gain {amount} σ {'larger' if gap.mean > 0 else 'smaller'} than gold's"


def _figures(figures: Sequence[Figure], absent: Sequence[tuple[str, str]]) -> str:
    drawn = "\n".join(
        f'<figure id="figure-{f.name}"{" class=wide" if f.name == WIDE else ""}><h3>{escape(f.title)}</h3>{f.inline}'
        f"<figcaption>{escape(f.caption)}</figcaption></figure>"
        for f in figures
    )
    rest = "".join(f"<li><b>{escape(title)}</b>: {escape(why)}</li>" for title, why in absent)
    left = f"<details><summary>{len(absent)} figures have nothing to show</summary><ul>{rest}</ul></details>" if absent else ""
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
    several = any(len(arm.views) > 1 for arm in arms)
    head = ["arm", *(["seeds"] if several else []), *(column.title for column in columns)]
    body = [
        [escape_markdown(row["arm"]), *([str(row["seeds"])] if several else []), *(as_text(row[c.key], c.digits) for c in columns)]
        for row in rows
    ]
    lines = [f"# {escape_markdown(title)}", "", markdown_table(head, body, ":--", "--:"), ""]
    lines += [f"- {column.title}: {column.meaning}." for column in columns]
    lines += ["- Figures are means ± one standard error over seeds."] if several else []
    lines += ["", *(f"- {escape_markdown(line)}" for line in findings(arms))]
    lines += [f"- Missing: {escape_markdown(f'{names}: {said}')}" for said, names in missing_by_text(arms)]
    lines += [f"- Missing: {escape_markdown(problem)}" for problem in problems]
    return "\n".join(lines) + "\n"
