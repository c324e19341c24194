"""Results that stay: a line for each row, suite and seed, with what was right in each question.

Runs are large and stay where they were made; this file goes with the code. Tables are made of the runs that are
there and, where one is not, of its line: so rows can be made on several days and machines, and intervals and
differences can be computed again from what is here. A line stays in the file, but is in no table, where the
row's flags have changed since, or where other results of its suite and seed are of other questions, of
another base or, where it evaluates the policy of another row, of another policy, until it is made again."""

import json

from common import write_jsonl

PARTS = "right", "zooms"  # of a question
NEEDED = {"kinds", "unanswered", "inside"}  # without these a result is of an earlier version


def of_runs(runs, rows, stages_of):
    """(found, stale): {suite: {row: {seed: result}}} of the Rows that there are in the folder `runs`, and the
    (suite, row, seed) of those of which a stage would be run anew, or was.

    stages_of: (Row, suite, seed, folder) -> its Stages."""
    found, stale = {}, set()
    for row in rows:
        for path in sorted(runs.glob(f"*/*/rows/{row.name}/result.json")):
            *_, suite, seed = path.parents[2].parts
            result, data = json.loads(path.read_text()), path.parents[2] / "data"
            missing = [name for name in ("sft", "train", "test") if not (data / f"{name}.jsonl").exists()]
            if missing:
                print(f"{path} is taken for gone, as {data / missing[0]}.jsonl is")
                continue
            if not NEEDED <= result.keys():
                print(f"{row.name} is left out: {path} is of an earlier version; its command writes it anew")
                stale.add((suite, row.name, int(seed)))
                continue
            made = [stage.result() for stage in stages_of(row, suite, int(seed), path.parents[2])]
            if row.mode == result["mode"] and [m and m["begun"] for m in made] == result["begun"]:
                found.setdefault(suite, {}).setdefault(row.name, {})[int(seed)] = result
            else:
                print(f"{row.name} is left out: {path} is of other flags or inputs")
                stale.add((suite, row.name, int(seed)))
    return found, stale


def packed(result):
    """A result without its folders, with lists in place of a dict for each question."""
    questions = result["questions"]
    videos = list(dict.fromkeys(question["video"] for question in questions.values()))
    places = {video: place for place, video in enumerate(videos)}
    lists = {"number": list(questions), "videos": videos,
             "video": [places[question["video"]] for question in questions.values()]}
    lists |= {part: [question[part] for question in questions.values()] for part in PARTS}
    return {key: value for key, value in result.items() if key != "stages"} | {"questions": lists}


def unpacked(line):
    """The result that `packed` made a line of."""
    lists = line["questions"]
    each = zip(lists["number"], lists["video"], *(lists[part] for part in PARTS))
    questions = {number: {"video": lists["videos"][video], **dict(zip(PARTS, values))}
                 for number, video, *values in each}
    return line | {"questions": questions}


def of_its_policy(result, row, there):
    """Whether the policy that a result of `row` evaluates is that of the row `of`. there: the suite's
    results, {row: {seed: result}}; `row.of` has to be among them before."""
    policy = there.get(row.of, {}).get(result["seed"])
    evaluated = lambda result: result["begun"][-1]["inputs"]  # the checkpoint and the questions
    return policy is None or evaluated(result) == evaluated(policy)


def with_kept(found, stale, path, rows, made_of):
    """What `of_runs` has found and the results of the file `path` that are neither found nor stale, in the
    order of the Rows; writes all of them there again. made_of: (Row, suite) -> what its result has as
    "made_of". Says what is left out."""
    by_name = {row.name: row for row in rows}
    inputs = {(suite, seed): result["inputs"] for suite, there in found.items()
              for results in there.values() for seed, result in results.items()}
    lines = open(path, encoding="utf-8").readlines() if path.exists() else []
    left_out = []
    order = {name: place for place, name in enumerate(by_name)}
    results = sorted(map(json.loads, lines), key=lambda result: order.get(result["row"], len(order)))
    for result in map(unpacked, results):
        suite, name, seed = result["suite"], result["row"], result["seed"]
        there = found.setdefault(suite, {}).setdefault(name, {})
        if seed in there:
            continue
        if (suite, name, seed) in stale:
            left_out.append(result)
        elif name not in by_name or result["made_of"] != made_of(by_name[name], suite):
            print(f"{suite} {seed} {name} is left out: it was made with other flags")
            left_out.append(result)
        elif not NEEDED <= result.keys():
            print(f"{suite} {seed} {name} is left out: it is of an earlier version")
            left_out.append(result)
        elif inputs.setdefault((suite, seed), result["inputs"]) != result["inputs"]:
            print(f"{suite} {seed} {name} is left out: it is of other questions, or of another base")
            left_out.append(result)
        elif not of_its_policy(result, by_name[name], found[suite]):
            print(f"{suite} {seed} {name} is left out: {by_name[name].of} has another policy now")
            left_out.append(result)
        else:
            there[seed] = result
    ordered = {suite: {name: dict(sorted(there[name].items())) for name in by_name if there.get(name)}
               for suite, there in sorted(found.items()) if any(there.values())}
    every = [result for there in ordered.values() for results in there.values() for result in results.values()]
    write_jsonl(path, map(packed, every + left_out))
    return ordered
