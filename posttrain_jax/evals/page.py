"""The template of `report.html`: one page that needs no other file and runs nothing; values are escaped."""

import jinja2

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff;
  max-width: 60rem; margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem; }
h3 { font-size: .95rem; margin: 1.4rem 0 .4rem; }
p.note, td.note { color: #666; }
p.state { color: #666; margin: 0 0 1rem; }
p.verdict { font-size: 1.15rem; margin: .8rem 0; }
table { border-collapse: collapse; width: 100%; }
table.narrow { width: auto; }
th, td { text-align: left; vertical-align: top; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid #eee; }
th { font-weight: 600; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.all td { font-weight: 600; border-top: 1px solid #999; }
img { max-width: 100%; display: block; margin: .6rem 0; }
pre { background: #f6f6f4; padding: .6rem .8rem; overflow-x: auto; white-space: pre-wrap;
  overflow-wrap: anywhere; margin: .2rem 0; font-size: 13px; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 0 1rem; margin-bottom: .9rem; }
.pair .question, .pair .gold { grid-column: 1 / -1; }
.right { color: #1a6b34; } .wrong { color: #a12727; }
@media (max-width: 40rem) { .pair { grid-template-columns: 1fr; } }
"""

BODY = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{{ title }}</title>
<style>{{ style }}</style>
</head>
<body>
<h1>{{ title }}</h1>
<p class="state">{{ state }}</p>
<table class="narrow">
{% for name, value in facts %}
<tr><th>{{ name }}</th><td>{{ value }}</td></tr>
{% endfor %}
</table>

{% if accuracy %}
<h2>Execution accuracy{{ accuracy.where }}</h2>
{% if accuracy.verdict %}<p class="verdict">{{ accuracy.verdict }}</p>{% endif %}
<table class="narrow">
<tr><th>channel</th>{% for head in accuracy.heads %}<th class="number">{{ head }}</th>{% endfor %}</tr>
{% for row in accuracy.rows %}
<tr{% if loop.last %} class="all"{% endif %}>\
<td>{{ row[0] }}</td>{% for cell in row[1:] %}<td class="number">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table>
<p class="note">In brackets: right answers of questions asked. {{ accuracy.note }}</p>
<h3>Verdicts</h3>
<table class="narrow">
<tr><th>verdict</th>{% for head in accuracy.verdict_heads %}<th class="number">{{ head }}</th>{% endfor %}</tr>
{% for row in accuracy.verdicts %}
<tr><td>{{ row[0] }}</td>{% for cell in row[1:] %}<td class="number">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% endif %}

{% if figures %}
<h2>Training</h2>
{% for name, uri in figures %}
<img alt="{{ name }}" src="{{ uri }}">
{% endfor %}
{% endif %}

{% if final %}
<h3>Last values</h3>
<table class="narrow">
{% for name, value in final %}
<tr><td>{{ name }}</td><td class="number">{{ value }}</td></tr>
{% endfor %}
</table>
{% endif %}

{% if groups %}
<h2>Answers</h2>
{% for group in groups %}
<h3>{{ group.title }}</h3>
{% for pair in group.pairs %}
<div class="pair">
<div class="question"><b>{{ pair.question }}</b> <span class="note">{{ pair.channel }}</span></div>
<div class="gold"><pre>{{ pair.gold }}</pre></div>
{% for answer in pair.answers %}
<div><span class="{{ 'right' if answer.correct else 'wrong' }}">{{ answer.when }}: {{ answer.reason }}</span>\
<pre>{{ answer.text }}</pre></div>
{% endfor %}
</div>
{% endfor %}
{% endfor %}
{% endif %}

<h2>Commands</h2>
{% if use %}<p class="note">Use the result:</p>
<pre>{{ use }}</pre>{% endif %}
{% if command %}<p class="note">This run was started with</p>
<pre>{{ command }}</pre>{% endif %}
{% if config %}<details><summary>Resolved config</summary>
<pre>{{ config }}</pre></details>{% endif %}
</body>
</html>
"""


def render(**values) -> str:
  environment = jinja2.Environment(
    autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
  )
  return environment.from_string(BODY).render(style=STYLE, **values)
