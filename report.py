"""One HTML file of the runs of ablations.py: `python ablations.py --report` writes it.

It has the tables, curves where matplotlib is installed, and dialogues to filter: of each row, in its first
seed, the same first questions, MOST_DIALOGUES in all. What was seen is read from the videos again.
The page needs no network. Dialogues are data, a JSON block, whose texts the page shows as texts, never as
markup; a dialogue and its pictures are put into the page as it comes into view.
"""

import base64
import html
import io
import json
import re
from pathlib import Path

from common import UserError, warn
from controls.altered import with_other_videos
from findings import compare
from findings.plots import curves, pyplot, replay, strip
from training.tables import kind_of
from video import VideoError

MOST_DIALOGUES = 1000


# ------------------------------------------------------------------------------------------------- dialogues
def dialogues(results):
    """(dialogues, pictures as data URLs): dicts for the page, which name pictures by their place."""
    found, pictures = [], {}
    share = MOST_DIALOGUES // max(1, len(results))
    for result in results:
        folder = Path(result["stages"][-1])
        missing = [path for path in (folder / "episodes.jsonl", Path(result["data"])) if not path.exists()]
        if missing:
            warn(f"{missing[0]} is not there: the dialogues of {result['row']} are left out")
            continue
        questions = compare.read_lines(result["data"])
        if result["figures"]["settings"].get("clips") == "other":
            questions = with_other_videos(
                dict(enumerate(questions)), questions, Path(result["data"]).parent, result["seed"])
        for episode in compare.episodes_of(folder, result["figures"]["mode"])[:share]:
            question = questions[episode["number"]]
            try:
                env = replay(result, episode, question)
            except (VideoError, UserError, ValueError, LookupError) as error:  # or settings that name a file
                warn(f"{question['id']}: {error}; its dialogue is left out")
                continue
            looks = []
            for frames in env.watched:
                if not frames:
                    looks.append({"picture": None, "times": []})
                    continue
                file = io.BytesIO()
                strip(frames).save(file, "JPEG", quality=85)
                url = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
                number = pictures.setdefault(url, len(pictures))
                looks.append({"picture": number, "times": [round(frame.time_s, 2) for frame in frames]})
            clips, turns = iter(looks[1:]), []
            for turn in env.turns:
                turns.append({"text": turn.text, "error": turn.error, "segments": [
                    call.arguments["segment"] for call in turn.calls if "segment" in call.arguments],
                    "look": next(clips, None) if turn.kind == "call" else None})
            found.append({
                "policy": f"{result['suite']} {result['seed']} {result['row']}", "kind": kind_of(question),
                "right": "waits" if episode["right"] is None else "yes" if episode["right"] >= 0.5 else "no",
                "zooms": str(episode["zooms"]), "id": question["id"], "question": question["question"],
                "options": env.options(), "truth": str(question["answer"]), "answer": str(episode["answer"]),
                "length": env.duration_s, "evidence": question.get("evidence") or [], "overview": looks[0],
                "turns": turns})
    return found, list(pictures)


# ------------------------------------------------------------------------------------------------------ page
def as_html(block):
    """A block of the Markdown that findings/compare.py writes."""
    escape = lambda text: html.escape(html.unescape(text.strip().replace("\\|", "|")))
    if block.startswith("#"):
        level = block.index(" ")
        return f"<h{level}>{escape(block[level:])}</h{level}>"
    if not block.startswith("|"):
        return f"<p>{escape(block)}</p>"
    head, _, *lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in block.splitlines()]
    cells = lambda tag, line: "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in line)
    body = "".join(f"<tr>{cells('td', line)}</tr>" for line in lines)
    return f'<div class="wide" tabindex="0"><table><tr>{cells("th", head)}</tr>{body}</table></div>'


def write_report(runs, found):
    """Writes report.html into the folder `runs`. found: {suite: {row: {seed: result}}}. Raises UserError."""
    parts, results = [], []
    if not found:
        raise UserError(f"{runs} has no results yet; python ablations.py makes them")
    plt = pyplot()
    if plt is None:
        warn("there are no curves in the report: pip install matplotlib")
    for suite, rows in found.items():
        parts += map(as_html, compare.suite_page(suite, rows)[0])
        if plt:
            parts.append(f'<div class="wide" tabindex="0">{curves(suite, rows, plt)}</div>')
        results += [seeds[min(seeds)] for seeds in rows.values()]
    shown, pictures = dialogues(results)
    data = json.dumps({"dialogues": shown, "pictures": pictures}).replace("<", "\\u003c")
    out = Path(runs) / "report.html"
    temporary = out.with_suffix(".tmp")
    head, middle, end = re.split("TABLES|DATA", PAGE)
    temporary.write_text("".join([head, "\n".join(parts), middle, data, end]), encoding="utf-8")
    temporary.replace(out)
    print(f"wrote {out}: {len(results)} runs, {len(shown)} dialogues")


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Ablations</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; font: 15px/1.45 system-ui, sans-serif }
body { max-width: 76rem; margin: auto; padding: 1rem }
.wide { overflow-x: auto } .wide svg { min-width: 60rem; width: 100%; height: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px }
td, th { padding: .15rem .5rem; text-align: left; border-bottom: 1px solid #8884; white-space: nowrap }
form { position: sticky; top: 0; background: Canvas; padding: .5rem 0; z-index: 1 }
label { margin-right: 1rem } article { border: 1px solid #8886; border-left: 5px solid #c33; margin: .6rem 0;
 padding: .5rem .8rem; border-radius: 4px; min-height: 12rem; overflow-wrap: anywhere }
article.yes { border-left-color: #3a3 } article > p { margin: .2rem 0 }
.look { overflow-x: auto; font-size: 10px } .look div { display: inline-grid;
 text-align: center } .look img { grid-column: 1 / -1; max-width: none }
.line { position: relative; height: 12px; background: #8883; margin: 2px 0 }
.line i { position: absolute; top: 0; bottom: 0; min-width: 2px; background: #47c }
.line i.evidence { background: #e92; top: 3px; bottom: 3px } pre { white-space: pre-wrap; margin: .3rem 0 }
.error { color: #c55 }
</style>
TABLES
<h2>Dialogues</h2>
<p>The line is the video; blue is the zoom, orange the evidence. Keys j and k go to the next one and back.</p>
<form></form><div id="list"></div>
<script type="application/json" id="data">DATA</script>
<script>
const { dialogues, pictures } = JSON.parse(document.getElementById("data").textContent);
const form = document.querySelector("form"), list = document.getElementById("list");
function add(parent, tag, text, name) {  // texts are texts: no markup is read from the data
  const made = parent.appendChild(document.createElement(tag));
  if (text !== undefined) made.textContent = text;
  if (name) made.className = name;
  return made;
}
const selects = ["policy", "kind", "right", "zooms"].map(field => {
  const select = add(add(form, "label", field + " "), "select");
  select.name = field;
  for (const value of ["", ...new Set(dialogues.map(d => d[field]))]) {
    const option = add(select, "option", value || "all");
    option.value = value;
  }
  select.addEventListener("change", show);
  return select;
});
const count = add(form, "output");
function look(parent, what, length, segments, evidence) {
  if (what.times.length) {
    const strip = add(add(parent, "div", undefined, "look"), "div"), image = add(strip, "img");
    image.src = pictures[what.picture];
    image.alt = what.times.length + " frames";
    strip.style.gridTemplateColumns = `repeat(${what.times.length}, 1fr)`;
    what.times.forEach(time => add(strip, "span", time.toFixed(1)).style.gridRow = 2);
  }
  const line = add(parent, "div", undefined, "line");
  const mark = ([start, end], name) => {
    const bar = add(line, "i", undefined, name);
    bar.style.left = 100 * start / length + "%";
    bar.style.width = 100 * (end - start) / length + "%";
  };
  segments.forEach(pair => mark(pair, "zoom"));
  evidence.forEach(pair => mark(pair, "evidence"));
}
function fill(card, d) {
  look(card, d.overview, d.length, [], d.evidence);
  for (const turn of d.turns) {
    add(card, "pre", turn.text);
    if (turn.error) add(card, "p", turn.error, "error");
    if (turn.look) look(card, turn.look, d.length, turn.segments, d.evidence);
  }
  add(card, "p", "answer: " + d.answer + "   truth: " + d.truth);
}
const observer = new IntersectionObserver(entries => {
  for (const { isIntersecting, target } of entries) if (isIntersecting) {
    observer.unobserve(target);
    fill(target, dialogues[target.dataset.number]);
  }
}, { rootMargin: "600px" });
function show() {
  observer.disconnect();
  list.replaceChildren();
  dialogues.forEach((d, number) => {
    if (selects.some(s => s.value && s.value !== d[s.name])) return;
    const card = add(list, "article", undefined, d.right);
    card.tabIndex = 0;
    card.dataset.number = number;
    add(card, "p", [d.policy, d.kind, d.id].join("  ·  "));
    add(card, "strong", d.question);
    add(card, "p", d.options.join("   "));
    observer.observe(card);
  });
  count.textContent = list.childElementCount + " of " + dialogues.length;
}
addEventListener("keydown", event => {
  const step = { j: 1, k: -1 }[event.key], cards = [...list.children];
  if (!step || event.target.tagName === "SELECT") return;
  const now = cards.indexOf(document.activeElement.closest("article"));
  cards[Math.min(cards.length - 1, Math.max(0, now + step))]?.focus();
});
show();
</script></html>
"""
