"""What pages of a run share: one look, light and dark, and a frame that needs no other file and runs nothing.

Values are escaped; a page's own template is given to `render`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jinja2
import markupsafe

STYLE = """
:root { color-scheme: light dark; --text: #222; --soft: #5c5c5c; --back: #fff; --box: #f6f6f4; --rule: #ddd;
  --faint: #ebebeb;
  --right: #1a6b34; --wrong: #a12727; --link: #1f5a96;
  --c0: #1f5a96; --c1: #c2540a; --c2: #2c7a2c; --c3: #b3263e; --c4: #6f4aa8; --c5: #7a5234; --c6: #b8368f;
    --c7: #5f6770;
  --c8: #7d7a00; --c9: #07818f; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e4e2; --soft: #a9a9a6; --back: #16181b; --box:
  #22252a; --rule: #3b3f45;
  --faint: #2b2f34; --right: #6fcf8a; --wrong: #ff8f8f; --link: #8fc1f5;
  --c0: #6fb1f2; --c1: #ff9d5c; --c2: #7fd67f; --c3: #ff8296; --c4: #bfa2f2; --c5: #d0a583; --c6: #f58fd4;
    --c7: #aab2bb;
  --c8: #d4d04a; --c9: #58d0dd; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back);
  max-width: 78rem; margin: 2rem auto; padding: 0 1.25rem; overflow-wrap: anywhere; }
body > p, ul.findings { max-width: 52rem; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; border-bottom: 1px solid var(--rule); padding-bottom: .2rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
a { color: var(--link); }
nav { margin: .4rem 0 1rem; display: flex; flex-wrap: wrap; gap: .2rem 1rem; }
.note { color: var(--soft); }
p.state { color: var(--soft); margin: 0 0 .4rem; }
p.verdict { font-size: 1.15rem; margin: .8rem 0; }
ul.findings { padding-left: 1.1rem; } ul.findings li { margin: .35rem 0; }
.scroll { overflow-x: auto; overflow-wrap: normal; margin: .4rem 0 1rem; }
table { border-collapse: collapse; }
th, td { text-align: left; vertical-align: top; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid
  var(--faint); }
th { font-weight: 600; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.best { font-weight: 700; } td.best::after { content: " *"; }
td.meaning { font-size: 13px; padding-top: 0; } tr.value td { border: none; padding-bottom: 0; }
table.values { width: 100%; max-width: 52rem; } table.values tr.value td:first-child { width: 70%; }
table.settings td, table.settings th { max-width: 26rem; overflow-wrap: anywhere; min-width: 4rem; }
table.settings th { overflow-wrap: normal; } table.settings th.number { white-space: normal; max-width: 10rem; }
table.settings .name { position: sticky; left: 0; background: var(--back); min-width: 8rem; max-width: 18rem; }
@media (min-width: 50rem) { table.settings .name { min-width: 14rem; } }
tr.all td { font-weight: 600; border-top: 1px solid var(--soft); }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(21rem, 100%), 1fr)); gap: .8rem
  1.4rem; margin: .6rem 0; }
figure { margin: 0; min-width: 0; }
figcaption { font-size: 13px; line-height: 1.4; } figcaption b { font-size: 14px; }
.key { white-space: nowrap; margin-left: .7rem; }
.key::before { content: ""; display: inline-block; width: 1.1em; height: 0;
  border-top: 3px solid currentColor; vertical-align: middle; margin-right: .35em; }
.key { color: var(--c); }
svg { width: 100%; height: auto; display: block; }
svg text { font-size: 11px; fill: var(--soft); }
svg .grid { stroke: var(--faint); } svg .zero { stroke: var(--soft); }
svg path { fill: none; }
svg .line, svg .points { stroke: var(--c); stroke-width: 1.6; } svg .faint { stroke: var(--c); stroke-width:
  .8; opacity: .35; }
svg circle.points, svg circle.line { fill: var(--c); stroke: none; } svg .bar, svg .dot { fill: var(--c); }
  svg .dot { opacity: .6; }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); } .c4 { --c:
  var(--c4); }
.c5 { --c: var(--c5); } .c6 { --c: var(--c6); } .c7 { --c: var(--c7); } .c8 { --c: var(--c8); } .c9 { --c:
  var(--c9); }
pre { background: var(--box); padding: .6rem .8rem; overflow-x: auto; white-space: pre-wrap;
  overflow-wrap: anywhere; margin: .2rem 0; font-size: 13px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr)); gap: .2rem
  1rem; margin-bottom: 1.2rem; }
.pair > * { min-width: 0; }
.right { color: var(--right); } .wrong { color: var(--wrong); }
summary { cursor: pointer; }
"""

FRAME = """\
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
{% if links | default(()) %}
<nav>{% for name, address in links %}<a href="{{ address }}">{{ name }}</a>{% endfor %}</nav>
{% endif %}
<h1>{{ title }}</h1>
{% block body %}{% endblock %}
</body>
</html>
"""

MACROS = """\
{% macro panel(p) %}
<figure><figcaption><b>{{ p.title }}</b>\
{% for key in p.keys %}<span class="key c{{ key.colour }}">{{ key.name }}</span>{% endfor %}
{% if p.note %}<br><span class="note">{{ p.note }}</span>{% endif %}</figcaption>
{{ p.svg }}</figure>
{% endmacro %}
{% macro pair(one) %}
<div class="question"><b>{{ one.question }}</b> <span class="note">{{ one.channel }}</span></div>
<span class="note">expected</span><pre>{{ one.gold }}</pre>
<div class="pair">
{% for answer in one.answers %}
<div><span class="{{ '' if answer.correct is none else 'right' if answer.correct else 'wrong' }}">{{ answer.when }}\
{% if answer.reason %}: {{ answer.reason }}{% endif %}</span>\
<pre>{{ answer.text }}</pre></div>
{% endfor %}
</div>
{% endmacro %}
"""


@functools.cache
def _environment() -> jinja2.Environment:
  return jinja2.Environment(
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    loader=jinja2.DictLoader({"frame": FRAME, "macros": MACROS}),
  )


def render(
  body: str, *, more_style: str = "", macros: Mapping[str, str] | None = None, **values
) -> str:
  """A whole page of a template for its body; `title`, and `links` of (name, address), are the frame's.

  macros: {name: further macros}, which may call those of `page`.
  """
  imports = '{% extends "frame" %}{% import "macros" as page %}'
  more = {
    name: _environment().from_string('{% import "macros" as page %}' + text).module
    for name, text in (macros or {}).items()
  }
  text = f"{imports}{{% block body %}}{body}{{% endblock %}}"
  style = markupsafe.Markup(STYLE + more_style)  # ours: in a style element nothing is unescaped
  return _environment().from_string(text).render(style=style, **more, **values)
