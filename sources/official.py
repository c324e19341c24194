"""Reads the sentences of the released protocol out of a clone of the paper's public repository.

    python data_prep.py protocol --official DIR --variant train --out released.json

Python files are parsed, not imported and not run; the scripts are read as text. A sentence is known by its
place: what a named function assigns, adds, raises or returns. The expressions in it become {name} (see
released.py); where they are others than expected, or the repository has another shape, that is said and
nothing is written.
"""

import ast
import re
from pathlib import Path
from typing import NamedTuple

from common import UserError, open_folder, read_text, write_json

FOLDER = "verl/workers/rollout/vllm_rollout"
SCRIPTS = {"train": "scripts/train_video.sh", "eval": "scripts/eval_video.sh"}
IMAGE, HEADER, END = "<|vision_start|><|image_pad|><|vision_end|>", "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"


def add_command(commands, show):
    """Adds `protocol` to data_prep.py's subparsers."""
    sub = commands.add_parser("protocol", help="the released protocol's sentences, out of a clone", **show)
    sub.add_argument("--official", required=True, help="clone of github.com/zsgvivo/VideoZoomer")
    sub.add_argument("--variant", choices=SCRIPTS, default="train", help="whose system prompt")
    sub.add_argument("--out", default="released.json", help="file to write, for --protocol")
    sub.set_defaults(run=write_protocol)


def write_protocol(args):
    protocol = read_official(args.official, args.variant)
    open_folder(Path(args.out).parent)
    write_json(Path(args.out), protocol)
    print(f"wrote {args.out}: --protocol {args.out} of sft.py, rl.py and eval.py plays by it")


class Hole(NamedTuple):
    """What is filled in: the source text of an expression, with its format."""

    expression: str


def read_official(folder, variant):
    """{"protocol", "source", "system_prompt", "texts"} of a clone; `variant` is train or eval, whose system
    prompts differ. Raises UserError."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"--official {folder}: no such folder; clone github.com/zsgvivo/VideoZoomer and name it")
    reply = Function(folder / FOLDER / "vllm_async_engine.py", "process_tool_call")
    clip = Function(folder / FOLDER / "function_tools.py", "extract_video_clip")
    read = Function(folder / FOLDER / "function_tools.py", "prepare_tool_call_inputs_video")
    # a reply: header, what is shown or said, a request; what is added to both of them is the same
    shown, failed = reply.sentences("assigns", "tool_call_prompt_message", 2)
    before, after = reply.around(shown, "vision_pad")
    nothing, after_error = reply.around(failed, "tool_outputs")
    last, end = reply.sentences("adds", "tool_call_prompt_message", 2)
    bad_call, = reply.sentences("assigns", "tool_outputs", 1)
    tag, = reply.sentences("assigns", "vision_pad", 1)
    tag = reply.text(tag, {"i": "index", "frame_time[i]:.2f": "time"})
    if not (before.startswith(HEADER) and nothing == HEADER and reply.text(end) == END and tag.endswith(IMAGE)):
        raise reply.error("a reply is not a user message of tagged images")
    # and its errors
    bad_input, = read.sentences("raises", None, 1)
    too_many = next(iter(clip.sentences("assigns", "error_msg", None)), [])
    not_shown, = clip.sentences("returns", None, 1)
    return {"protocol": "released", "source": f"{folder.resolve().name} ({variant})",
            "system_prompt": system_prompt(folder / SCRIPTS[variant]), "texts": {
                "frame": tag.removesuffix(IMAGE),
                "before_frames": before.removeprefix(HEADER), "after_frames": after,
                "bad_call": reply.text(bad_call, {"error_info": "error"}),
                "bad_input": read.text(bad_input, {"e": "error", "json_objects[0]": "input"}),
                "too_many": clip.text(too_many, {"extract_frame_num": "count", "max_frames": "limit"}),
                "not_shown": clip.text(not_shown, {"e": "error"}),
                "after_error": after_error, "last_round": reply.text(last)}}


class Function:
    """A function of a Python file, as a syntax tree. Raises UserError where there is none."""

    def __init__(self, path, name):
        self.path, self.name = path, name
        try:
            tree = ast.parse(read_text(path))
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise UserError(f"cannot read {path}: {error}") from None
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
        self.nodes = [n for f in ast.walk(tree) if isinstance(f, kinds) and f.name == name for n in in_source_order(f)]
        if not self.nodes:
            raise UserError(f"{path} has no function {name}")

    def error(self, what):
        return UserError(f"{self.path}, {self.name}: {what}; is it a clone of github.com/zsgvivo/VideoZoomer?")

    def sentences(self, how, variable, number):
        """The different texts that the function assigns or adds to a variable, raises or returns, in order;
        each is a list of str and Hole. Raises UserError if there are not `number` (None: at least one)."""
        kind, value = {"assigns": (ast.Assign, lambda n: n.value), "adds": (ast.AugAssign, lambda n: n.value),
                       "raises": (ast.Raise, lambda n: n.exc.args[0] if getattr(n.exc, "args", None) else None),
                       "returns": (ast.Return, lambda n: n.value)}[how]
        found = []
        for node in self.nodes:
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            if isinstance(node, kind) and (not variable or any(getattr(t, "id", "") == variable for t in targets)):
                if (said := pieces(value(node))) is not None and said not in found:
                    found.append(said)
        if not found or number not in (None, len(found)):
            what = f"{how} {variable or 'a text'} {len(found)} times, not {number or 'once or more'}"
            raise self.error(what)
        return found

    def around(self, said, expression):
        """The texts before and after the only hole."""
        at = [i for i, piece in enumerate(said) if piece == Hole(expression)]
        if len(at) != 1:
            raise self.error(f"{expression} is not in a reply once")
        return self.text(said[:at[0]]), self.text(said[at[0] + 1:])

    def text(self, said, names={}):
        """As one text, with {name} for the expressions in `names`."""
        for piece in said:
            if isinstance(piece, Hole) and piece.expression not in names:
                raise self.error(f"{{{piece.expression}}} stands in a text where {', '.join(names) or 'nothing'} does")
        return "".join(f"{{{names[p.expression]}}}" if isinstance(p, Hole) else p for p in said)


def in_source_order(node):
    """A node and all in it, in the order of the source."""
    yield node
    for child in ast.iter_child_nodes(node):
        yield from in_source_order(child)


def pieces(node):
    """A text expression as a list of str and Hole, str in one piece; None where it is none."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        found = [node.value]
    elif isinstance(node, ast.JoinedStr):
        found = [p.value if isinstance(p, ast.Constant) else Hole(source(p)) for p in node.values]
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        sides = [pieces(side) or [Hole(ast.unparse(side))] for side in (node.left, node.right)]
        found = sides[0] + sides[1]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "join" and (
            isinstance(getattr(node.args[0], "elt", None), ast.JoinedStr)):
        return pieces(node.args[0].elt)  # "".join(f"..." for each)
    else:
        return None
    joined = []
    for piece in found:
        if joined and type(joined[-1]) is str and type(piece) is str:
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


def source(value):
    """The expression of an f-string's {expression:format}."""
    spec = "".join(p.value for p in value.format_spec.values) if value.format_spec else ""
    return ast.unparse(value.value) + (f":{spec}" if spec else "")


def system_prompt(path):
    """What a script gives to Hydra as 'data.system_prompt="..."': there a backslash counts only before a quote.
    Raises UserError."""
    found = re.search(r"""'data\.system_prompt="((?:[^"\\]|\\.)*)"'""", read_text(path), re.DOTALL)
    if not found:
        raise UserError(f"{path} has no 'data.system_prompt=\"...\"'")
    return re.sub(r'(\\+)"', lambda m: "\\" * (len(m[1]) // 2) + '"', found[1])
