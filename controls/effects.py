"""What clips did: the same questions with the clips shown and with others, side by side.

At temperature 0 all is the same up to and with the first zoom; questions where it is not, as sums may differ
in their last bits with what is played together, are counted as `parted`. The clip helped where the answer is
right with it and wrong without, and harmed where it is the other way.
"""

from collections import defaultdict

from training.tables import ratio, short_table

COLUMNS = {
    "policy": "{policy}", "clips": "{mode}", "kind": "{kind}", "n": "{num_questions}", "zoomed": "{zoomed}",
    "right shown": "{right_shown:.1%}", "right altered": "{right_altered:.1%}", "helped": "{helped}",
    "harmed": "{harmed}", "none": "{none}", "parted": "{parted:d}"}
ZOOMED = "zoomed"  # the row of all questions with a zoom


def effects(shown, altered):
    """A dict for each question that was played in both ways and has a grade. Arguments: lists of episodes,
    as eval.py writes them."""
    known, rows = {e["number"]: e for e in shown}, []
    for e in altered:
        before = known.get(e["number"])
        if before is None or before["right"] is None or e["right"] is None:
            continue
        was, now = before["right"] >= 0.5, e["right"] >= 0.5
        calls = before["calls"]
        same = calls[0]["turn"] + 1 if calls else len(before["turns"])
        rows.append({
            "policy": e["policy"], "mode": e["mode"], "number": e["number"], "question": e["question"],
            "kind": e["kind"], "zooms": len(calls), "right_shown": was, "right_altered": now,
            "effect": "none" if was == now else "helped" if was else "harmed",
            "parted": before["turns"][:same] != e["turns"][:same]})
    return rows


def effect_rows(rows):
    """The rows of the table of what `effects` gives for one policy and one sort of clips: all, those with a
    zoom, and each kind."""
    groups = defaultdict(list, {"all": rows, ZOOMED: [row for row in rows if row["zooms"]]})
    for row in rows:
        groups[row["kind"]].append(row)
    return [summed(kind, group) for kind, group in groups.items() if group]


def summed(kind, rows):
    count = lambda effect: sum(row["effect"] == effect for row in rows)
    return {
        "policy": rows[0]["policy"], "mode": rows[0]["mode"], "kind": kind, "num_questions": len(rows),
        "zoomed": sum(row["zooms"] > 0 for row in rows),
        "right_shown": ratio(sum(row["right_shown"] for row in rows), len(rows)),
        "right_altered": ratio(sum(row["right_altered"] for row in rows), len(rows)),
        "helped": count("helped"), "harmed": count("harmed"), "none": count("none"),
        "parted": sum(row["parted"] for row in rows) or None}


def report(rows):
    """The table as text."""
    return "what seeing the clips did\n" + short_table(COLUMNS, rows)
