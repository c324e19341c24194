"""Where zooms go against where the evidence is, by number of the zoom within its episode.

    hit       it overlaps the evidence, or holds one of its moments
    recall    share of the evidence's seconds that its segment covers; of evidence of moments alone, of these
    so far    the same of all zooms up to this one
    overlap   seconds that both have over seconds that either has; none for moments, which have no length
    inside    it lies within the zoom before it, and is shorter
"""

from training.tables import mean, ratio, short_table

COLUMNS = {
    "policy": "{policy}", "mode": "{mode}", "zoom": "{nth}", "zooms": "{num_zooms}",
    "with evidence": "{num_with_evidence}", "hit": "{hit:.1%}", "recall": "{recall:.1%}",
    "so far": "{recall_so_far:.1%}", "overlap": "{overlap:.1%}", "seconds": "{length_s:.1f}",
    "inside the one before": "{inside:.1%}", "of right answers": "{inside_where_right:.1%}"}
EDGE_S = 1e-6  # within which two ends are equal


def calls_of(env):
    """A dict for each call that was carried out in an episode: where it looked, in seconds within the video."""
    for number, turn in enumerate(env.turns):
        for call in turn.calls if turn.kind == "call" else ():
            start_s, end_s = env.tools[call.tool].looks_at(call.arguments)
            segment = max(0.0, start_s), min(max(start_s, end_s), env.duration_s)
            yield {"turn": number, "segment": segment, "frames": call.num_frames, "hit": call.hit}


def zoom_rows(episode, question):
    """A dict for each zoom of an episode, as eval.py writes it; of a vote, for those of each sample."""
    if "samples" in episode:
        labels = {key: episode[key] for key in ("policy", "mode", "number")}
        return [row | {"sample": place} for place, sample in enumerate(episode["samples"])
                for row in zoom_rows(labels | sample, question)]
    rows, segments, evidence = [], [], question.get("evidence") or []
    for nth, call in enumerate(episode.get("calls") or [], 1):
        segment = call["segment"]
        before = segments[-1] if segments else None
        segments.append(segment)
        rows.append({
            "policy": episode["policy"], "mode": episode["mode"], "number": episode["number"],
            "question": episode["question"], "kind": episode["kind"], "right": episode["right"], "nth": nth,
            "segment": segment, "frames": call["frames"], "hit": call["hit"],
            "recall": recall([segment], evidence), "recall_so_far": recall(segments, evidence),
            "overlap": overlap(segment, evidence), "inside": before and lies_inside(segment, before)})
    return rows


def by_number(rows):
    """Table rows of what `zoom_rows` gives for one policy and mode: all zooms, the first ones, .."""
    numbers = sorted({row["nth"] for row in rows})
    groups = [("all", rows)] + [(nth, [row for row in rows if row["nth"] == nth]) for nth in numbers]
    return [summed(nth, group) for nth, group in groups if group]


def summed(nth, rows):
    known = [row for row in rows if row["hit"] is not None]
    right = [row for row in rows if row["right"] is not None and row["right"] >= 0.5]
    return {
        "policy": rows[0]["policy"], "mode": rows[0]["mode"], "nth": nth, "num_zooms": len(rows),
        "num_with_evidence": len(known), "hit": ratio(sum(row["hit"] for row in known), len(known)),
        **{key: mean(row[key] for row in known) for key in ("recall", "recall_so_far", "overlap")},
        "length_s": mean(row["segment"][1] - row["segment"][0] for row in rows),
        "inside": mean(row["inside"] for row in rows),
        "inside_where_right": mean(row["inside"] for row in right)}


def report(rows):
    """The table as text."""
    return "where zooms go\n" + short_table(COLUMNS, rows)


# -------------------------------------------------------------------------------------------- seconds of time
def joined(segments):
    """Segments, ascending, where those that touch are one."""
    ends = []
    for start_s, end_s in sorted(segments):
        if ends and start_s <= ends[-1][1]:
            ends[-1][1] = max(ends[-1][1], end_s)
        else:
            ends.append([start_s, end_s])
    return ends


def length_s(segments):
    return sum(end_s - start_s for start_s, end_s in joined(segments))


def shared_s(segments, others):
    """Seconds that are in both."""
    parts = [(max(a, c), min(b, d)) for a, b in joined(segments) for c, d in joined(others)]
    return sum(max(0.0, end_s - start_s) for start_s, end_s in parts)


def recall(segments, evidence):
    """The share of the evidence, [start_s, end_s] pairs, that segments cover; None where there is none."""
    if total_s := length_s(evidence):
        return shared_s(segments, evidence) / total_s
    seen = [any(start <= moment <= end for start, end in segments) for moment, _ in evidence]
    return mean(seen)


def overlap(segment, evidence):
    """Intersection over union; None where the evidence has no length."""
    if not length_s(evidence):
        return None
    both_s = shared_s([segment], evidence)
    return both_s / (length_s([segment]) + length_s(evidence) - both_s)


def lies_inside(segment, before):
    """Whether a segment is a part of another one."""
    (start, end), (first, last) = segment, before
    within = first - EDGE_S <= start and end <= last + EDGE_S
    return within and end - start < last - first - EDGE_S
