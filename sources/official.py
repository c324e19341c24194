"""Reads the sentences of the released protocol out of a clone of the paper's public repository.

    python data_prep.py protocol --official DIR --variant train --out released.json

Python files are parsed, not imported and not run; the scripts are read as text. A sentence is known by its
place: what a named function assigns, adds, raises or returns. The expressions in it become {name} (see
released.py). Where they are others than expected, or the repository has another shape, an error says so and
nothing is written.
"""

import ast
import re
from pathlib import Path

from common import UserError, open_folder, read_text, write_json

REPOSITORY = "github.com/zsgvivo/VideoZoomer"
FOLDER = "verl/workers/rollout/vllm_rollout"
SCRIPTS = {"train": "scripts/train_video.sh", "eval": "scripts/eval_video.sh"}
IMAGE, HEADER = "<|vision_start|><|image_pad|><|vision_end|>", "<|im_start|>user\n"
END = "<|im_end|>\n<|im_start|>assistant\n"
HOLE = "\0"  # stands before and after an expression in a text


def add_command(commands, show):
    """Adds `protocol` to data_prep.py's subparsers."""
    sub = commands.add_parser("protocol", help="the released protocol's sentences, out of a clone", **show)
    sub.add_argument("--official", required=True, help=f"clone of {REPOSITORY}")
    sub.add_argument("--variant", choices=SCRIPTS, default="train", help="whose system prompt")
    sub.add_argument("--out", default="released.json", help="file to write, for --protocol")
    sub.set_defaults(run=write_protocol)


def write_protocol(args):
    protocol = read_official(args.official, args.variant)
    open_folder(Path(args.out).parent)
    write_json(Path(args.out), protocol)
    print(f"wrote {args.out}: --protocol {args.out} of sft.py, rl.py and eval.py plays by it")


def read_official(folder, variant):
    """{"protocol", "source", "system_prompt", "texts"} of a clone; `variant` is train or eval, whose system
    prompts differ. Raises UserError."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"--official {folder}: no such folder; clone {REPOSITORY} and name it")
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
    is_user = before.startswith(HEADER) and nothing == HEADER and reply.text(end) == END
    if not is_user or not tag.endswith(IMAGE):
        raise reply.error("a reply is not a user message of tagged images")
    # and its errors
    bad_input, = read.sentences("raises", "", 1)
    too_many, *_ = clip.sentences("assigns", "error_msg", None)
    not_shown, = clip.sentences("returns", "", 1)
    texts = {
        "frame": tag.removesuffix(IMAGE),
        "before_frames": before.removeprefix(HEADER),
        "after_frames": after,
        "bad_call": reply.text(bad_call, {"error_info": "error"}),
        "bad_input": read.text(bad_input, {"e": "error", "json_objects[0]": "input"}),
        "too_many": clip.text(too_many, {"extract_frame_num": "count", "max_frames": "limit"}),
        "not_shown": clip.text(not_shown, {"e": "error"}),
        "after_error": after_error,
        "last_round": reply.text(last),
    }
    return {"protocol": "released", "source": f"{folder.resolve().name} ({variant})",
            "system_prompt": system_prompt(folder / SCRIPTS[variant]), "texts": texts}


class Function:
    """A function of a Python file, and the texts in it. In a text an expression that is filled in, with its
    format, stands between two HOLEs. Raises UserError where there is no such function."""

    def __init__(self, path, name):
        self.path, self.name = path, name
        try:
            tree = ast.parse(read_text(path))
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise UserError(f"cannot read {path}: {error}") from None
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
        functions = [node for node in ast.walk(tree) if isinstance(node, kinds) and node.name == name]
        if not functions:
            raise UserError(f"{path} has no function {name}")
        nodes = [node for function in functions for node in ast.walk(function) if isinstance(node, ast.stmt)]
        self.statements = sorted(nodes, key=lambda node: node.lineno)

    def error(self, what):
        return UserError(f"{self.path}, {self.name}: {what}; is it a clone of {REPOSITORY}?")

    def sentences(self, how, variable, number):
        """The different texts that the function assigns or adds to a variable, raises or returns, in the
        order of the source.

        how: assigns, adds, raises, returns; the last two have "" for a variable. Raises UserError if there
        are not `number` texts (None: at least one)."""
        found = []
        for statement in self.statements:
            *place, value = meaning(statement)
            said = template(value)
            if place == [how, variable] and said is not None and said not in found:
                found.append(said)
        if not found or number not in (None, len(found)):
            what = f"{how} {variable or 'a text'} {len(found)} times, not {number or 'once or more'}"
            raise self.error(what)
        return found

    def around(self, said, expression):
        """The texts before and after an expression, which must be the only one."""
        parts = said.split(hole(expression))
        if len(parts) != 2:
            raise self.error(f"{expression} is not in a reply once")
        return self.text(parts[0]), self.text(parts[1])

    def text(self, said, names={}):
        """A text with {name} for the expressions in `names`. Raises UserError where it has others."""
        def name(match):
            if match[1] not in names:
                expected = ", ".join(names) or "nothing"
                raise self.error(f"{{{match[1]}}} stands in a text where {expected} does")
            return f"{{{names[match[1]]}}}"

        return re.sub(hole("(.*?)"), name, said)


def hole(expression):
    return HOLE + expression + HOLE


def meaning(statement):
    """(what a statement does, to which variable, the expression); nothing is done with None."""
    match statement:
        case ast.Assign(targets=[ast.Name(id=variable)], value=value):
            return "assigns", variable, value
        case ast.AugAssign(target=ast.Name(id=variable), value=value):
            return "adds", variable, value
        case ast.Raise(exc=ast.Call(args=[value, *_])):
            return "raises", "", value
        case ast.Return(value=value):
            return "returns", "", value
    return "", "", None


def template(node):
    """A text expression as a text with holes; None where it is no text."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(map(template, values))
        case ast.FormattedValue(value=value, format_spec=None):
            return hole(ast.unparse(value))
        case ast.FormattedValue(value=value, format_spec=spec):
            return hole(f"{ast.unparse(value)}:{template(spec)}")
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            sides = [(side, template(side)) for side in (left, right)]
            return "".join(hole(ast.unparse(side)) if text is None else text for side, text in sides)
        case ast.Call(func=ast.Attribute(attr="join"), args=[ast.ListComp(elt=ast.JoinedStr() as each)]):
            return template(each)  # "".join([f"..." for each])
    return None


def system_prompt(path):
    """What a script gives to Hydra as 'data.system_prompt="..."': there a backslash counts only before a
    quote. Raises UserError."""
    found = re.search(r"""'data\.system_prompt="((?:[^"\\]|\\.)*)"'""", read_text(path), re.DOTALL)
    if not found:
        raise UserError(f"{path} has no 'data.system_prompt=\"...\"'")
    return re.sub(r'(\\+)"', lambda m: "\\" * (len(m[1]) // 2) + '"', found[1])
