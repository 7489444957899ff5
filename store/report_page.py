"""The HTML of a report. Everything is in the page: styles, pictures, texts. No script."""

import datetime
from typing import Any


def render(**values: Any) -> str:
    """The page; every value is escaped."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": _number, "share": lambda value: "-" if value is None else f"{value:.1%}", "short": _short}
    return environment.from_string(PAGE).render(**values, today=datetime.date.today().isoformat())


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"


def _short(value: object) -> str:
    text = str(value)
    return text[:12] if len(text) >= 32 and all(letter in "0123456789abcdef" for letter in text) else text


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ facts.store.path.name }}: reference store</title>
<style>
:root { --line: #dde2e8; --soft: #f5f7f9; --ink: #1d2733; --mute: #5b6876; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: 1rem; font: 16px/1.5 system-ui, sans-serif; color: var(--ink); }
h1 { font-size: 1.5rem; margin: .5rem 0 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
p { margin: .4rem 0; } .mute { color: var(--mute); font-size: .9rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .6rem; margin: 1rem 0; }
.tile { background: var(--soft); border-radius: .5rem; padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.3rem; font-variant-numeric: tabular-nums; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
figure { margin: 0; } img { width: 100%; height: auto; } figcaption { font-size: .9rem; color: var(--mute); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
td, th { padding: .25rem .7rem .25rem 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
td:first-child, th:first-child { text-align: left; }
td.text { text-align: left; white-space: normal; overflow-wrap: anywhere; }
tr.differs td { background: #fdeee6; }
details { border: 1px solid var(--line); border-radius: .5rem; padding: .5rem .8rem; margin: .5rem 0; }
summary { cursor: pointer; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; background: var(--soft); padding: .6rem; border-radius: .4rem; margin: .3rem 0; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: .6rem; }
.figures, .sides { margin-top: .8rem; } th.text { text-align: left; }
@media (max-width: 30rem) { table { font-size: .8rem; } td, th { padding-right: .5rem; } }
.chosen { border-left: 4px solid #2e7d4f; } .rejected { border-left: 4px solid #b5482f; }
pre i { font-style: normal; border-radius: 2px; } pre, .key i { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
.key { font-size: .85rem; } .key i { font-style: normal; white-space: nowrap; padding: .1rem .35rem; margin-right: .2rem; border-radius: 2px; }
.l1 { background: #fff0c9; } .l2 { background: #fdd17f; } .l3 { background: #f0982f; } .l4 { background: #8c3d04; color: #fff; }
.u1, .u2, .u3, .u4 { text-decoration: overline; } .d1, .d2, .d3, .d4 { text-decoration: underline; }
.u1 { background: #dcebf7; } .u2 { background: #b0d2ee; } .u3 { background: #65a9dc; } .u4 { background: #0b4f8a; color: #fff; }
.d1 { background: #fff0c9; } .d2 { background: #fdd17f; } .d3 { background: #f0982f; } .d4 { background: #8c3d04; color: #fff; }
@media print { details { break-inside: avoid-page; } details::details-content { content-visibility: visible; } }
</style>
</head>
<body>
{% set identity = facts.store.identity %}{% set manifest = facts.store.manifest %}{% set s = facts.summary %}
{% macro picture(name, caption) %}
<figure><img alt="{{ caption }}" src="data:image/png;base64,{{ pictures[name] }}"><figcaption>{{ caption }}</figcaption></figure>
{% endmacro %}
{% macro quantiles(rows, names) %}
<div class="wide"><table><tr><th></th>{% for name in names %}<th>{{ name }}</th>{% endfor %}</tr>
{% for title, values in rows %}
<tr><td>{{ title }}</td>{% for value in values %}<td>{{ value|number }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% endmacro %}
{% macro completion(side) %}{% for piece in side.pieces %}<i{% if piece.shade %} class="{{ piece.shade }}"{% endif %} title="{{ piece.title }}">{{ piece.text }}</i>{% endfor %}
{% if side.more %}<span class="mute"> {{ side.more }}</span>{% endif %}{% endmacro %}
{% macro key(by_difference) %}
{% if by_difference %}
<p class="key">Each token by its change, there minus here, in nats.
Lower there, underlined: {% for step in change_steps|reverse %}<i class="d{{ loop.revindex }}">-{{ step }}</i>{% endfor %}
Higher there, overlined: {% for step in change_steps %}<i class="u{{ loop.index }}">+{{ step }}</i>{% endfor %}
<span class="mute">Hold the pointer over a token for its numbers.</span></p>
{% else %}
<p class="key">Each token by its probability: one half or more is left plain, less is darker.
{% for step in ["less than 1/2", "1/10", "1/100", "1/1000"] %}<i class="l{{ loop.index }}">{{ step }}</i>{% endfor %}
<span class="mute">Hold the pointer over a token for its log-prob in nats.</span></p>
{% endif %}
{% endmacro %}
{% macro reading(extremes) %}
{% if extremes and not sums_only %}{{ key(extremes[0].by_difference) }}{% endif %}
{% for extreme in extremes %}
<h3>{{ extreme.title }}</h3>
{% for pair in extreme.pairs %}
<details><summary>row {{ pair.row }}: {{ pair.value|number }} nats
<span class="mute">chosen {{ pair.ref_chosen_logps|number }} over {{ pair.num_chosen_tokens|number }} tokens,
rejected {{ pair.ref_rejected_logps|number }} over {{ pair.num_rejected_tokens|number }}</span></summary>
<p class="mute">pair_id {{ pair.pair_id }}{% for name, value in pair.source.items() %} · {{ name }}: {{ value }}{% endfor %}</p><pre>{{ pair.prompt }}</pre>
<div class="sides"><div><b>chosen</b><pre class="chosen">{{ completion(pair.chosen) }}</pre></div>
<div><b>rejected</b><pre class="rejected">{{ completion(pair.rejected) }}</pre></div></div></details>
{% endfor %}
{% endfor %}
{% endmacro %}
<h1>{{ facts.store.path.name }}</h1>
<p class="mute">Reference log-probs of {{ identity.model }}{% if identity.revision %}@{{ identity.revision }}{% endif %} on {{ identity.dataset }}
({{ identity.dtype }}, max length {{ "{:,}".format(identity.max_length) }}{% if turns %}, {{ turns }} alone{% endif %}); page made {{ today }}</p>
{% if sums_only %}<p><b>This store was {{ sums_only }}.</b> Means per token are sums divided by counts.</p>{% endif %}
<div class="tiles">
<div class="tile"><b>{{ s.num_pairs|number }}</b>pairs of {{ identity.num_rows|number }} rows</div>
<div class="tile"><b>{{ s.prefers|share }}</b>the reference prefers chosen, by sum</div>
<div class="tile"><b>{{ s.mean_prefers|share }}</b>the same, per token</div>
<div class="tile"><b>{{ s.chosen_longer|share }}</b>chosen is the longer side</div>
<div class="tile"><b>{{ s.chosen_truncated|share }}</b>of chosen truncated ({{ s.rejected_truncated|share }} of rejected)</div>
</div>
{% if s.num_pairs %}
<h2>Lengths</h2>
{{ quantiles([("prompt, tokens", s.prompt), ("chosen", s.chosen), ("rejected", s.rejected)], ["p50", "p90", "p95", "p99", "max"]) }}
<div class="figures">
{{ picture("lengths.png", "Scored tokens per pair") }}
{{ picture("truncation.png", "Pairs of this store that are whole under a shorter max length" + ("" if sums_only else "; train --max-length takes any value up to the store's")) }}
</div>
<h2>Reference margins</h2>
{{ quantiles([("sums, nats", s.margins), ("per token", s.mean_margins)], ["p5", "p25", "p50", "p75", "p95"]) }}
<p class="mute">Correlation of the summed margin with the difference in length: {{ s.margin_with_length|number }}. Close to -1, the sum mostly says which side is shorter.</p>
<div class="figures">
{{ picture("margins.png", "Sums: right of the line the reference already prefers chosen. The outermost bars hold what lies beyond.") }}
{{ picture("margins_per_token.png", "Per token, as length-normalized losses see it") }}
</div>
<h2>Log-probs</h2>
<div class="figures">
{{ picture("logprob_by_length.png", "Sum against length") }}
{% if "logprob_by_position.png" in pictures %}
{{ picture("logprob_by_position.png", "Per token, by position in the completion (a sample of the pairs)") }}
{% endif %}
</div>
{% for column, rows, count in facts.groups %}
<h2>By {{ column }}</h2>
<div class="wide"><table><tr><th></th><th>pairs</th><th>chosen, tokens</th><th>rejected</th><th>prefers chosen, sum</th><th>per token</th><th>margin, nats</th><th>per token</th></tr>
{% for each in rows %}
<tr><td>{{ "(null)" if each.value is none else each.value }}</td><td>{{ each.num_pairs|number }}</td><td>{{ each.chosen|number }}</td><td>{{ each.rejected|number }}</td><td>{{ each.prefers|share }}</td><td>{{ each.mean_prefers|share }}</td><td>{{ each.margin|number }}</td><td>{{ each.mean_margin|number }}</td></tr>
{% endfor %}
</table></div>
<p class="mute">Lengths and margins are medians.{% if count > rows|length %} {{ rows|length }} of {{ count }} values.{% endif %}</p>
{% endfor %}
{% else %}
<p>The store has no pair: no row could be scored.</p>
{% endif %}
{% if comparison %}
{% set c = comparison.summary %}
<h2>Compared with {{ comparison.other.path.name }}</h2>
<p class="mute">"there" is {{ comparison.other.path }}; joined by pair_id; changes are there minus here, in nats.</p>
<div class="tiles">
<div class="tile"><b>{{ c.both|number }}</b>pairs in both; {{ c.only_here|number }} only here, {{ c.only_there|number }} only there</div>
<div class="tile"><b>{{ c.flipped|share }}</b>change sides, by sum ({{ c.mean_flipped|share }} per token)</div>
<div class="tile"><b>{{ c.correlation|number }}</b>correlation of the margins ({{ c.mean_correlation|number }} per token)</div>
<div class="tile"><b>{{ c.same_counts|share }}</b>have the same token counts</div>
</div>
{{ quantiles([("margin, change", c.margin_change), ("chosen, change", c.chosen_change), ("rejected, change", c.rejected_change)], ["p5", "p25", "p50", "p75", "p95"]) }}
<p class="mute">Largest change of a sum: {{ c.largest_chosen|number }} (chosen), {{ c.largest_rejected|number }} (rejected).</p>
<div class="figures">
{{ picture("compared_margins.png", "Margins, here against there; the line is equality") }}
{{ picture("compared_change.png", "Change of the margin") }}
</div>
<div class="wide" style="margin-top: 1rem"><table><tr><th>identity</th><th class="text">here</th><th class="text">there</th></tr>
{% for name, here, there, differs in comparison.identity %}
<tr{% if differs %} class="differs"{% endif %}><td>{{ name }}</td><td class="text">{{ here|short }}</td><td class="text">{{ there|short }}</td></tr>
{% endfor %}
</table></div>
{{ reading(comparison.extremes) }}
{% endif %}
{% if facts.extremes %}
<h2>Pairs to read</h2>
{% if not decoded %}<p>Token ids, not text: the store's tokenizer could not be loaded.</p>{% endif %}
{{ reading(facts.extremes) }}
{% endif %}
{% if manifest.counts or manifest.unscorable %}
<h2>Noticed</h2>
<div class="wide"><table>
{% for name, count in manifest.counts|dictsort %}
<tr><td>{{ count|number }}</td><td class="text">{{ counts.get(name, name) }}<br><span class="mute">{{ manifest.examples.get(name, "") }}</span></td></tr>
{% endfor %}
{% for reason, rows in manifest.unscorable|groupby("reason") %}
<tr><td>{{ rows|length|number }}</td><td class="text">not in the store: {{ reason }} <span class="mute">(row {{ rows[0].row }})</span></td></tr>
{% endfor %}
</table></div>
{% endif %}
<h2>Identity and provenance</h2>
<div class="wide"><table>
{% for name, value in identity.to_json().items() %}<tr><td>{{ name }}</td><td class="text">{{ value }}</td></tr>
{% endfor %}
<tr><td>shards</td><td class="text">{{ manifest.shards|length|number }}</td></tr>
<tr><td>scored tokens</td><td class="text">{{ manifest.num_completion_tokens|number }} in completions; the model computed {{ manifest.model_tokens|number }} positions</td></tr>
{% for name, value in manifest.provenance|dictsort %}<tr><td>{{ name }}</td><td class="text">{{ value }}</td></tr>
{% endfor %}
</table></div>
</body>
</html>
"""
