import base64
import html
import io
import json
import re
import shutil
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from PIL import Image

import report
from common import UserError
from demo.synthetic import TINY_ENV
from eval import record
from findings import compare, plots
from model import Dialogue
from rollout import Episode
from training import tables
from zoom_env import ZoomEnv

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = "<script>alert(1)</script>"


def play(question, root, texts):
    """What eval.py writes of an episode of these turns."""
    env = ZoomEnv(question, TINY_ENV, root)
    env.reset()
    for text in texts:
        env.step(text)
    return record(Episode(Dialogue(ids=[0] * 7), env=env))


def make_row(runs, name, root, questions, turns):
    """A row's folder, as ablations.py leaves it, of the episodes with turns(question)."""
    folder = runs / "demo/0/stages" / name
    folder.mkdir(parents=True)
    episodes = [{"policy": name, "mode": "zoom", "number": number, "seconds": 0.1}
                | play(question, root, turns(question)) for number, question in enumerate(questions)]
    rows, _ = tables.table_rows(name, "zoom", episodes, dict(enumerate(questions)))
    settings = tables.environment_settings(TINY_ENV) | {"temperature": 0.0}
    (folder / "results.json").write_text(json.dumps([rows[0] | {"settings": settings}]))
    (folder / "episodes.jsonl").write_text("".join(json.dumps(episode) + "\n" for episode in episodes))
    (folder / "metrics.jsonl").write_text("".join(
        json.dumps({"step": n, "accuracy": n / 9, "zooms": 1.0}) + "\n" for n in range(9)))
    (runs / "demo/0/rows" / name).mkdir(parents=True)
    (runs / "demo/0/rows" / name / "result.json").write_text(json.dumps({
        "row": name, "suite": "demo", "seed": 0,
        "commands": ["python eval.py"], "commits": ["0123"], "made_with": "torch 2, CPU", "seconds": 60.0, "data": str(root / "test.jsonl"),
        "stages": [str(folder)]} | compare.summary(folder, "zoom", root / "test.jsonl", folder)))


@pytest.fixture
def runs(data, tmp_path):
    """Results of two rows: `full` zooms on the evidence and is right, `no-rl` zooms badly and is wrong."""
    root = tmp_path / "data"
    root.mkdir()
    (root / "videos").symlink_to(data[0] / "videos")
    questions = [json.loads(line) for line in open(data[0] / "test.jsonl")]
    questions[0] |= {"id": EVIL, "question": EVIL}
    (root / "test.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    zoom = '<think>{}</think><video_zoom>{{"segment": [{:.2f}, {:.2f}], "fps": {}}}</video_zoom>'

    def well(question):
        looks = [zoom.format(EVIL, start, end, 4) for start, end in question["evidence"] or []]
        return [*looks[:4], f"<think>so</think><answer>{question['answer']}</answer>"]

    def badly(question):
        wrong = "B" if question["answer"] == "A" else "A"
        looks = [zoom.format("", 0, 8, fps) for fps in (9, 1)]
        return [*looks, f"<think></think><answer>{wrong}</answer>"]

    make_row(tmp_path / "runs", "full", root, questions, well)
    make_row(tmp_path / "runs", "no-rl", root, questions, badly)
    return tmp_path / "runs"


def results_in(runs):
    """As ablations.read_results gives them."""
    files = {name: runs / "demo/0/rows" / name / "result.json" for name in ("full", "no-rl")}
    return {"demo": {name: {0: json.loads(path.read_text())} for name, path in files.items()}}


def page_data(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


# --------------------------------------------------------------------------------------------------- the page
def test_the_report_replays_what_was_seen(runs):
    report.write_report(runs, results_in(runs))
    page = (runs / "report.html").read_text()
    data = page_data(page)
    dialogues = data["dialogues"]
    assert [(d["policy"], d["right"]) for d in dialogues] == \
        [("demo 0 full", "yes")] * 5 + [("demo 0 no-rl", "no")] * 5
    questions = [json.loads(line) for line in open(runs.parent / "data/test.jsonl")]
    for dialogue, question in zip(dialogues, questions * 2):
        assert dialogue["truth"] == question["answer"]
        assert dialogue["evidence"] == (question["evidence"] or [])
        assert len(dialogue["overview"]["times"]) == 9
    bad = dialogues[5]
    assert [bool(turn["error"]) for turn in bad["turns"]] == [True, False, False]
    assert bad["turns"][1]["segments"] == [[0, 8]]
    assert bad["turns"][1]["look"]["times"] == [0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5]
    # the same overview is in the file once
    assert bad["overview"]["picture"] == dialogues[0]["overview"]["picture"]
    assert all(url.startswith("data:image/jpeg;base64,") for url in data["pictures"])
    assert "<td>full</td>" in page and "RL adds to the cold start" in page
    # nothing of the data is markup, and nothing is fetched
    assert EVIL not in page and data["dialogues"][0]["question"] == EVIL
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:|#)|url\((?!#)|@import""", page)


def test_dialogues_show_the_clips_that_the_policy_saw(runs):
    """Grey ones, another video's, or none, as eval.py --clips showed them."""
    result, questions = results_in(runs)["demo"]["full"][0], runs.parent / "data/test.jsonl"
    other = json.loads(questions.read_text().splitlines()[0]) | {"video": "videos/train_0000.mp4"}
    questions.write_text(questions.read_text() + json.dumps(other) + "\n")
    clips = {}
    for how in ("shown", "grey", "other", "none"):
        result["figures"]["settings"]["clips"] = how
        found, pictures = report.dialogues([result])
        look = found[0]["turns"][0]["look"]
        assert found[0]["turns"][0]["segments"] and bool(look["times"]) == (how != "none")
        if look["times"]:
            image = base64.b64decode(pictures[look["picture"]].partition(",")[2])
            clips[how] = np.asarray(Image.open(io.BytesIO(image)), dtype=int)
    assert abs(clips["grey"] - 128).max() <= 1
    for how in ("grey", "other"):
        assert clips[how].shape == clips["shown"].shape and abs(clips[how] - clips["shown"]).max() > 50


def test_videos_that_are_gone_cost_their_dialogues_only(runs, capsys):
    questions = runs.parent / "data/test.jsonl"
    questions.write_text(questions.read_text().replace("videos/", "gone/"))
    report.write_report(runs, results_in(runs))
    assert page_data((runs / "report.html").read_text())["dialogues"] == []
    assert "its dialogue is left out" in capsys.readouterr().err


def test_dialogues_that_are_not_there_are_one_line(runs, capsys):
    (runs / "demo/0/stages/full/episodes.jsonl").unlink()
    report.write_report(runs, results_in(runs))
    assert "the dialogues of full are left out" in capsys.readouterr().err
    assert '"policy": "demo 0 no-rl"' in (runs / "report.html").read_text()


def test_no_results_are_one_line(tmp_path):
    with pytest.raises(UserError, match="has no results yet"):
        report.write_report(tmp_path, {})


def test_without_matplotlib_there_are_tables_and_one_line(runs, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report.write_report(runs, results_in(runs))
    page = (runs / "report.html").read_text()
    assert "<table>" in page and "<svg" not in page
    assert "pip install matplotlib" in capsys.readouterr().err
    with pytest.raises(UserError, match="pip install matplotlib"):
        plots.picture(results_in(runs)["demo"], 0, runs / "picture.png")


def test_tables_are_escaped():
    block = compare.markdown(["a|b", "<i>"], [["x < y", "1 | 2"]])
    assert html.unescape(block.splitlines()[2]) == r"| x < y | 1 \| 2 |"
    assert report.as_html(block) == (
        '<div class="wide" tabindex="0"><table><tr><th>a|b</th><th>&lt;i&gt;</th></tr>'
        "<tr><td>x &lt; y</td><td>1 | 2</td></tr></table></div>")


# -------------------------------------------------------------------------------------------- with matplotlib
def test_curves_and_the_picture(runs):
    pytest.importorskip("matplotlib")
    rows = results_in(runs)["demo"]
    svg = plots.curves("demo", rows, plots.pyplot())
    assert svg.startswith("<svg") and ">no-rl<" in svg and ">RL step<" in svg
    assert "currentColor" in svg and plots.INK not in svg
    for name in ("frames", "tokens", "seconds"):
        assert f">{name} a question<" in svg
    plots.picture(rows, 0, runs / "picture.svg")
    drawn = (runs / "picture.svg").read_text()  # with the texts beside their letters' outlines
    assert "<!-- before RL: &lt;answer&gt;" in drawn and "<!-- after RL: &lt;answer&gt;" in drawn


def test_the_picture_needs_a_question_that_rl_has_turned(runs):
    pytest.importorskip("matplotlib")
    shutil.copy(runs / "demo/0/stages/no-rl/episodes.jsonl", runs / "demo/0/stages/full/episodes.jsonl")
    with pytest.raises(UserError, match="no wrong answer"):
        plots.picture(results_in(runs)["demo"], 0, runs / "picture.png")


# ----------------------------------------------------------------------------------------------- in a browser
WATCH = """<script>
const said = [];
window.onerror = (...what) => said.push("error: " + what[0]);
window.alert = () => said.push("alert");
for (const level of ["error", "warn"]) console[level] = (...what) => said.push(level + ": " + what);
</script>"""
DRIVE = """<script>
addEventListener("load", async () => {
  const found = { said }, cards = () => [...document.querySelectorAll("article")];
  const until = async ready => { while (!ready()) await new Promise(done => setTimeout(done, 20)); };
  const choose = (name, value) => {
    const select = document.querySelector(`select[name=${name}]`);
    select.value = value;
    select.dispatchEvent(new Event("change"));
  };
  cards()[0].scrollIntoView();
  await until(() => cards()[0].querySelector("img")?.naturalWidth);
  found.all = cards().length;
  found.drawn = cards().filter(card => card.querySelector("img")).length;
  found.title = cards()[0].querySelector("strong").textContent;
  found.images = cards()[0].querySelectorAll("img").length;
  found.loaded = cards()[0].querySelector("img").naturalWidth;
  found.text = cards()[0].querySelector("pre").textContent;
  const [zoom] = cards()[0].querySelectorAll(".zoom");
  found.zoom = [zoom.style.left, zoom.style.width];
  for (const key of "jjk") document.activeElement.dispatchEvent(
    new KeyboardEvent("keydown", { key, bubbles: true }));
  found.focused = cards().indexOf(document.activeElement);
  choose("right", "no");
  found.wrong = cards().length;
  choose("kind", "holistic");
  found.holistic = document.querySelector("output").textContent;
  choose("right", "");
  found.both = document.querySelector("output").textContent;
  choose("policy", "demo 0 full");
  found.one = cards().length;
  found.wide = document.documentElement.scrollWidth > innerWidth;
  fetch("ADDRESS", { method: "POST", mode: "no-cors", body: JSON.stringify(found) });
});
</script>"""


class Listener(BaseHTTPRequestHandler):
    """Keeps the first text that is sent to it, as its server's `got`."""

    def do_POST(self):
        self.server.got = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no chromium here")
def test_the_page_in_a_browser(runs, tmp_path):
    """With 1,000 dialogues, of which those in view are drawn."""
    report.write_report(runs, results_in(runs))
    page = (runs / "report.html").read_text()
    data = page_data(page)
    as_block = lambda data: json.dumps(data).replace("<", "\\u003c")
    block, dialogues = as_block(data), data["dialogues"]
    dialogues[0]["turns"][0]["look"] = {"picture": None, "times": []}  # as with --clips none
    page = page.replace(block, as_block(data | {"dialogues": 100 * dialogues}))
    driven = tmp_path / "driven.html"
    log = tmp_path / "log"
    with HTTPServer(("127.0.0.1", 0), Listener) as server, log.open("w") as said:
        server.timeout = 100
        server.got = "nothing was sent"
        drive = DRIVE.replace("ADDRESS", f"http://127.0.0.1:{server.server_port}/")
        driven.write_text(page.replace("<style>", WATCH + "<style>", 1).replace("</html>", drive + "</html>"))
        browser = subprocess.Popen(
            [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync",
             f"--user-data-dir={tmp_path / 'profile'}", "--window-size=390,800", "--enable-logging=stderr",
             "--remote-debugging-port=0", driven.as_uri()], stderr=said)
        try:
            server.handle_request()
        finally:
            browser.terminate()
            browser.wait(60)
    assert "CONSOLE" not in log.read_text()
    assert server.got.startswith("{"), log.read_text()[-2000:]
    found = json.loads(server.got)
    assert found.pop("drawn") < 50
    holistic = sum(d["kind"] == "holistic" for d in dialogues)
    first = dialogues[0]
    (start, end), *_ = first["turns"][0]["segments"]
    left, width = (float(text.removesuffix("%")) for text in found.pop("zoom"))
    assert left == pytest.approx(100 * start / first["length"], abs=0.01)
    assert width == pytest.approx(100 * (end - start) / first["length"], abs=0.01)
    assert found == {
        "said": [], "all": 1000, "title": EVIL, "images": len(first["turns"]) - 1, "loaded": 9 * plots.STRIP_PIXELS,
        "text": first["turns"][0]["text"], "focused": 0, "wrong": 500, "wide": False,
        "holistic": f"{50 * holistic} of 1000", "both": f"{100 * holistic} of 1000", "one": 50 * holistic}
