"""The majority of several samples of a question, and a gate: zoom only where direct answers disagree.

What a vote cost is what was computed: the prompt, with the overview's frames, once, and all that each sample
said and looked at. A gate costs its direct answers and, where it zooms, the episode with zooms; the frames of
the overview, the same in both, count once, its tokens twice, as the two prompts end otherwise.
"""

import hashlib
from collections import Counter

from grading import concluded, normalise, plain, read_letter
from training.tables import known_sum, mean

SUMS = ("frames", "tokens", "generated", "zooms", "hits", "hits_known", "invalid", "refused", "untagged",
        "calls_without_tool")


# ------------------------------------------------------------------------------------------------------ votes
def meaning(answer, question):
    """What an answer text says, so that two that say the same are equal; None where it says nothing."""
    if answer is None:
        return None
    if question["answer_type"] == "multiple_choice":
        return read_letter(answer[:10_000], question.get("options") or [])
    return normalise(concluded(plain(answer[:10_000]))) or None


def vote(samples, question):
    """One dict for the samples of a question, dicts as eval.py's `record` makes them, in the order in which
    they are numbered. It is the first one with the answer that most give, of several such answers the one
    that was given first, with the cost of all. disagreeing: how many do not say the same."""
    said = [meaning(sample["answer"], question) for sample in samples]
    counts = Counter(answer for answer in said if answer is not None)
    most = max(counts.values(), default=0)
    winner = next((place for place, answer in enumerate(said) if counts.get(answer) == most), 0)
    costs = {key: known_sum(samples, key) for key in SUMS}
    again = len(samples) - 1
    costs["frames"] -= again * samples[0]["overview_frames"]
    if costs["tokens"] is not None:  # some servers do not count them
        costs["tokens"] -= again * (samples[0]["prompt_tokens"] or 0)
    return samples[winner] | costs | {"disagreeing": len(samples) - most, "samples": samples}


# ------------------------------------------------------------------------------------------------------- gate
def half(question):
    """0 or 1: the half that a question row belongs to, with all of its video; each chooses the other's
    threshold."""
    return hashlib.sha256(str(question["video"]).encode()).digest()[0] % 2


def gated(direct, zoomed, threshold):
    """What a gate makes of a question's two lines: it zooms where more samples disagree than `threshold`."""
    zooms = direct["disagreeing"] > threshold
    line = zoomed if zooms else direct
    costs = {}
    if zooms:
        costs = {key: known_sum([direct, zoomed], key) for key in ("tokens", "generated", "seconds")}
    return line | costs | {"disagreeing": direct["disagreeing"], "threshold": threshold, "gate_zooms": zooms}


def choose_threshold(pairs, votes):
    """The threshold, -1 (always zoom) to `votes` (never), with the most right answers on pairs of (direct,
    zoomed) lines; of equal ones that with the fewest frames, then the highest. 0 where none has a grade."""
    graded = [pair for pair in pairs if pair[0]["right"] is not None]
    if not graded:
        return 0

    def worth(threshold):
        lines = [gated(*pair, threshold) for pair in graded]
        return sum(line["right"] >= 0.5 for line in lines), -mean(line["frames"] for line in lines), threshold

    return max(range(-1, votes + 1), key=worth)


def gate(direct, zoomed, mode, votes, questions):
    """The lines of a gate, from those of direct answers and of zooms, and its thresholds in words. questions:
    {number: row}."""
    zooms = {line["number"]: line for line in zoomed}
    pairs = [(line, zooms[line["number"]]) for line in direct if line["number"] in zooms]
    half_of = lambda pair: half(questions[pair[0]["number"]])
    of_half = lambda which: [pair for pair in pairs if half_of(pair) == which]
    thresholds = [choose_threshold(of_half(1), votes), choose_threshold(of_half(0), votes)]
    lines = [gated(*pair, thresholds[half_of(pair)]) for pair in pairs]
    words = f"over {' / '.join(map(str, thresholds))} of {votes}"
    kept = lambda line: {key: value for key, value in line.items() if key != "samples"}
    return [kept(line) | {"mode": mode} for line in lines], words
