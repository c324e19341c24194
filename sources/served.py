"""A policy behind an OpenAI-compatible server: what plays its episodes, as rollout.py's Engine plays ours.

    vllm serve DIR --limit-mm-per-prompt '{"image": 128}'
    OPENAI_API_KEY=... python eval.py --base_url http://localhost:8000/v1 --model DIR --data questions.jsonl

The environment, its messages and the grader are those of local play, and --model's zoom_config.json says what
is played (without --model the paper's). Here messages become a request, by the openai package (pip install
openai), which brings retries, time-outs and connections; and what comes back becomes the text of a turn. What
vLLM, SGLang, transformers serve and clouds do otherwise:

    stop strings   left out, kept, or unknown to it: a call is closed where it stopped, and cut off behind
    a thought      in a field of its own (reasoning, reasoning_content) stands before the text again
    parameters     seed, stop and the like that it refuses by name are left out from then on, with a warning
    sampling       top_p, top_k and repetition_penalty are sent as 1, -1, 1: vLLM would take the checkpoint's
    images         data URLs, PNG as the environment made them, or JPEG; more than it takes: the question is
                   skipped, and the reason says so
    context        too long at first: skipped; later the episode ends, as one beyond --max_response_tokens
    cut off        finish reason "length" ends the episode, as --max_turn_tokens does here
    429, 5xx, a connection that breaks, no JSON, no choice: it is asked again; --timeout_s ends a turn

Each answer is a line of answers.jsonl before it is used, by a hash of all that was asked: a run that was
killed asks again only what was on its way. A question without an answer is skipped, and asked by the same
command; after several in a row the run ends. Redirects are not followed. The key (OPENAI_API_KEY) stands in
no file and no output.
"""

import asyncio
import base64
import hashlib
import io
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from common import UserError, first_line, warn
from model import stop_strings, until_call
from protocols import make_env
from video import VideoError
from zoom_env import Message, ZoomEnv

RETRIES = 5  # of a request, by the package, each later than the one before
MOST_BYTES = 20_000_000  # of an answer
FAILURES = 8  # questions without an answer in a row, and as many as are asked at one time: the run ends
TRIES = 3  # of an answer that cannot be read
NO_KEY = "none"
NEUTRAL = {"top_k": -1, "repetition_penalty": 1.0}  # sent, as vLLM would take the checkpoint's
MAY_LACK = {"seed", "stop", "temperature", "top_p", "max_tokens", *NEUTRAL}  # what a server may refuse
REFUSES = re.compile(r"un(supported|known|recogni[sz]ed|expected)|not (support|permit|allow)|extra|"
                     r"only the default|invalid param", re.IGNORECASE)
TOO_LONG = re.compile(r"context.?(length|window)|maximum model length|prompt.{0,20}too long|too many tokens",
                      re.IGNORECASE)
TOO_MANY_IMAGES = re.compile(r"(at most|limit|too many|maximum|exceed).{0,60}(image|multi-?modal)|"
                             r"(image|multi-?modal).{0,60}(at most|limit|too many|maximum|exceed)",
                             re.IGNORECASE)


@dataclass(frozen=True)
class ServedConfig:
    """Settings of what a server plays."""

    base_url: str | None = None  # of an OpenAI-compatible server that plays, such as http://localhost:8000/v1
    served_model: str | None = None  # the model's name there; else the only one that it has
    concurrency: int = 16  # episodes that are played there at one time
    timeout_s: float = 600.0  # seconds that an answer may take, with all retries
    image_format: str = "png"  # of frames: png, exact, or jpeg
    max_tokens_total: int | None = None  # of prompts and answers, after which the run stops


MAY_DIFFER = ("base_url", "concurrency", "timeout_s", "max_tokens_total")  # when a run goes on


class NoAnswer(Exception):
    """A question could not be asked, or was not answered: why, in a line."""


class TooLong(Exception):
    """The dialogue is longer than the server's context."""


class Said(NamedTuple):
    """An answer. Tokens are None where the server does not count them."""

    text: str
    cut_off: bool
    prompt_tokens: int | None
    generated: int | None


# -------------------------------------------------------------------------------------------------- answers
class Answers:
    """Answers by what was asked, each a line of a file before anybody gets it. tokens: of all of them."""

    def __init__(self, path):
        self.path, self.known, self.coming, self.tokens = Path(path), {}, {}, 0
        if not self.path.exists():
            return
        whole, _, cut = self.path.read_bytes().rpartition(b"\n")
        if cut:  # by a kill
            os.truncate(self.path, len(whole) + bool(whole))
        for line in whole.decode(errors="replace").split("\n"):
            if line:
                row = json.loads(line)
                self.keep(row.pop("asked"), Said(**row))

    def keep(self, key, said):
        self.known[key] = said
        self.tokens += (said.prompt_tokens or 0) + (said.generated or 0)

    async def get(self, key, ask):
        """The Said of a key, that of the file or of `ask()`. Who asks the same meanwhile waits for it."""
        if key in self.known:
            return self.known[key]
        if key not in self.coming:
            self.coming[key] = asyncio.ensure_future(self.add(key, ask))
        return await self.coming[key]

    async def add(self, key, ask):
        try:
            said = await ask()
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"asked": key} | said._asdict()) + "\n")
            self.keep(key, said)
            return said
        finally:
            del self.coming[key]


# ------------------------------------------------------------------------------------------------- requests
class Server:
    """A model on a server. Raises UserError where there is no such server or model.

    config: with the settings of ServedConfig. answers: path of the file of Answers. env_config: what is
    played."""

    def __init__(self, config, answers, env_config=None):
        try:
            import openai
        except ImportError:
            raise UserError("to ask a server: pip install openai") from None
        if config.image_format not in ("png", "jpeg"):
            raise UserError(f"--image_format must be png or jpeg, not {config.image_format}")
        self.openai, self.config, self.env_config = openai, config, env_config
        self.key, self.answers = os.environ.get("OPENAI_API_KEY") or NO_KEY, Answers(answers)
        self.left_out = set()  # parameters that it refuses
        self.failures = 0  # questions in a row without an answer
        self.ended = None  # why nothing more is asked, a UserError
        self.model = asyncio.run(self.find_model())

    def client(self):
        """A client; it lives as long as the loop in which it is made."""
        http = self.openai.DefaultAsyncHttpxClient(follow_redirects=False)
        return self.openai.AsyncOpenAI(base_url=self.config.base_url, api_key=self.key, http_client=http,
                                       max_retries=RETRIES, timeout=self.config.timeout_s)

    async def find_model(self):
        """The model's name on the server."""
        wanted = self.config.served_model
        try:
            async with asyncio.timeout(min(60, self.config.timeout_s)), self.client() as client:
                listed = await client.with_options(max_retries=1).models.list()
            names = [model.id for model in listed.data]
        except (TimeoutError, self.openai.APIConnectionError, self.openai.AuthenticationError) as error:
            raise UserError(f"--base_url: {self.words_of(error)}") from None
        except Exception as error:  # some servers have no list
            if not wanted:
                raise UserError(f"give --served_model, as the server names none ({self.words_of(error)})")
            return wanted
        if wanted not in names and (wanted or len(names) != 1):
            raise UserError(f"--served_model must be one of {', '.join(names[:20]) or 'none'}, not {wanted}")
        return wanted or names[0]

    async def ask(self, client, messages, temperature, max_tokens, seed, stop=()):
        """The Said to messages in the API's form. stop: texts at which it ends. Raises NoAnswer, TooLong, and
        UserError where nothing more is asked."""
        body = {"model": self.model, "messages": messages, "max_tokens": max_tokens, "seed": seed,
                "temperature": temperature, "top_p": 1.0} | ({"stop": list(stop)} if stop else {})
        key = hashlib.sha256(json.dumps(body).encode()).hexdigest()
        limit = self.config.max_tokens_total
        if key not in self.answers.known and limit is not None and self.answers.tokens >= limit:
            self.ended = self.ended or UserError(
                f"stopped after {self.answers.tokens} tokens, --max_tokens_total {limit}; the same command "
                "with more of them goes on")
        if self.ended:
            raise self.ended
        try:
            said = await self.answers.get(key, lambda: self.request(client, body))
        except NoAnswer as error:
            self.failures += 1
            if self.failures >= max(FAILURES, self.config.concurrency):
                self.ended = self.ended or UserError(
                    f"no answer to {self.failures} questions in a row ({error}); the same command goes on")
            raise
        self.failures = 0
        return said

    async def request(self, client, body):
        """The Said to a request, which is sent as often as it takes."""
        try:
            async with asyncio.timeout(self.config.timeout_s):
                for left in reversed(range(TRIES)):
                    try:
                        return said_in(await self.adapted(client, body), body.get("stop") or ())
                    except (ValueError, LookupError, TypeError, AttributeError) as error:
                        if not left:
                            raise NoAnswer(f"its answer cannot be read ({first_line(error)})") from None
        except (TimeoutError, self.openai.APITimeoutError):
            raise NoAnswer(f"no answer within --timeout_s {self.config.timeout_s:g}") from None
        except self.openai.APIConnectionError as error:
            raise NoAnswer(self.words_of(error)) from None
        except self.openai.APIStatusError as error:
            raise self.refusal(error) from None

    def refusal(self, error):
        """What is raised where the server has answered with an error."""
        words, status = self.words_of(error), error.status_code
        if TOO_LONG.search(words):
            return TooLong(words)
        if TOO_MANY_IMAGES.search(words):
            return NoAnswer(f"{words}; of vLLM --limit-mm-per-prompt says how many images it takes")
        if status in (401, 403, 404) or 300 <= status < 400:
            return UserError(f"--base_url: {words}")
        return NoAnswer(words)

    async def adapted(self, client, body):
        """The bytes of the answer to a request, without the parameters that the server refuses by name. Those
        are left out of later ones, too, once it has answered without them."""
        without = set(self.left_out)
        while True:
            try:
                raw = await self.send(client, body, without)
                break
            except (self.openai.BadRequestError, self.openai.UnprocessableEntityError) as error:
                refused = self.refused_by(error) - without
                if not refused:
                    raise
                without |= refused
        matters = without - self.left_out - {*NEUTRAL, "max_tokens"}
        if matters:
            warn(f"the server refuses {', '.join(sorted(matters))}: what it does by itself counts")
        self.left_out |= without
        return raw

    def refused_by(self, error):
        """The names of the parameters that an error refuses."""
        words = self.words_of(error)
        if TOO_LONG.search(words) or not REFUSES.search(words):
            return set()
        named = getattr(error, "param", None)
        return {named} & MAY_LACK or {name for name in MAY_LACK if re.search(rf"\b{name}\b", words)}

    async def send(self, client, body, without):
        """One request. Returns the bytes of the answer. Raises the package's errors, and ValueError for an
        answer that breaks off or is too long."""
        create, raw = client.chat.completions.with_streaming_response.create, bytearray()
        given = {name: value for name, value in body.items() if name not in without}
        if "max_tokens" in without:
            given["max_completion_tokens"] = body["max_tokens"]
        more = {name: value for name, value in NEUTRAL.items() if name not in without}
        async with create(**given, extra_body=more) as response:
            parts = response.iter_bytes()
            while len(raw) <= MOST_BYTES:
                try:
                    raw += await anext(parts)
                except StopAsyncIteration:
                    return bytes(raw)
                except Exception as error:  # of whatever carries it
                    raise ValueError(f"it broke off: {type(error).__name__}") from None
        raise ValueError(f"more than {MOST_BYTES} bytes")

    def words_of(self, error):
        """An error in one line, without the key."""
        about, status = getattr(error, "body", None), getattr(error, "status_code", None)
        said = about.get("message") if isinstance(about, dict) else None
        words = said if isinstance(said, str) and said.strip() else first_line(error)
        if isinstance(error, TimeoutError | self.openai.APIConnectionError):
            words = f"cannot reach the server ({type(error.__cause__ or error).__name__})"
        if status and 300 <= status < 400:
            words = "it points to another address, which is not followed; give that one"
        words = words.replace(self.key, "***") if self.key != NO_KEY else words
        return " ".join(f"status {status}: {words}".split())[:300] if status else words


def said_in(raw, stop=()):
    """The Said in the bytes of an answer. Raises ValueError, LookupError, TypeError, AttributeError."""
    answer = json.loads(raw)
    choice, usage = answer["choices"][0], answer.get("usage") or {}
    message, reason = choice["message"], choice.get("finish_reason")
    text, thought = message.get("content"), message.get("reasoning_content") or message.get("reasoning")
    if isinstance(text, list):
        text = "".join(part.get("text") or "" for part in text)
    if reason == "content_filter" or text is None and not thought:
        raise ValueError(f"no text, finish reason {reason}")
    text = text or ""
    if thought and "</think>" not in text:
        text = f"<think>{thought}</think>{text}"
    return Said(with_stop(text, choice, stop), reason == "length", usage.get("prompt_tokens"),
                usage.get("completion_tokens"))


def with_stop(text, choice, stop):
    """A text with the end of its call, where the server has stopped there and left it out. vLLM and SGLang
    say so; else it is told by a call that lacks nothing else."""
    if any(end in text for end in stop):
        return text
    said = [choice[name] for name in ("stop_reason", "matched_stop") if name in choice]
    if said:
        return text + (said[0] if said[0] in stop else "")
    body = text.rpartition("</think>")[2]
    lacking = [end for end in stop if end.replace("/", "") in body and body.rstrip().endswith("}")]
    return text + lacking[0] if lacking and choice.get("finish_reason") == "stop" else text


# -------------------------------------------------------------------------------------------------- episodes
@dataclass
class ServedEpisode:
    """One that a server plays. messages: the dialogue in the API's form. said: its answers."""

    env: ZoomEnv
    messages: list
    number: int = 0  # among those of its question
    question_number: int = 0
    said: list = field(default_factory=list)
    truncated: bool = False  # a turn or the episode was cut off at a limit

    def forget_frames(self):
        self.messages, self.env.watched = [], self.env.when_watched()

    def token_counts(self):
        """As of rollout.Episode, None where the server does not count."""
        if not self.said or any(None in said[2:] for said in self.said):
            return {"tokens": None, "generated": None, "prompt_tokens": None}
        last = self.said[-1]
        return {"tokens": last.prompt_tokens + last.generated,
                "generated": sum(said.generated for said in self.said),
                "prompt_tokens": self.said[0].prompt_tokens}


class ServedEngine:
    """Plays episodes by a Server, `concurrency` at a time, as rollout.Engine does by a policy.

    Args:
        group_size: episodes a question.
        config: RolloutConfig; of the server's own limits nothing is known.
        seed: of the sampling; each turn of each episode has one of its own.
        begin: given an environment, the messages with which its episode begins."""

    def __init__(self, server, group_size, config, seed=0, begin=ZoomEnv.reset):
        self.server, self.group_size, self.config = server, group_size, config
        self.seed, self.begin = seed, begin

    def play(self, questions, root=".", env_config=None, on_end=None, make_env=make_env):
        """As rollout.Engine.play; left out are also questions that were not answered."""
        env_config = env_config or self.server.env_config
        make = lambda question: make_env(question, env_config, root)
        return asyncio.run(self.play_all(questions, make, on_end))

    async def play_all(self, questions, make, on_end):
        groups, skipped, openings = [[] for _ in questions], {}, {}
        jobs = ((number, sample) for number in range(len(questions)) for sample in range(self.group_size))

        async def work():
            for number, sample in jobs:
                # a question's video is read once
                if sample == 0:
                    opening = asyncio.to_thread(self.open, make, questions[number])
                    openings[number] = asyncio.ensure_future(opening)
                opening = openings[number] if sample < self.group_size - 1 else openings.pop(number)
                try:
                    env, messages = await opening
                    e = ServedEpisode(env.fork(), [*messages], sample, number)
                    await self.play_one(client, e)
                except UserError as error:  # the others end with their next turn
                    self.server.ended = self.server.ended or error
                    return
                except (VideoError, NoAnswer, TooLong) as error:
                    skipped[number] = str(error)
                    continue
                groups[number].append(e)
                if on_end:
                    on_end(e)

        async with self.server.client() as client:
            await asyncio.gather(*(work() for _ in range(self.server.config.concurrency)))
        if self.server.ended:
            raise self.server.ended
        for number in skipped:
            groups[number] = []
        for group in groups:
            group.sort(key=lambda e: e.number)
        return groups, [(questions[number]["id"], reason) for number, reason in skipped.items()]

    def open(self, make, question):
        """(environment, messages in the API's form) with which a question's episodes begin."""
        env = make(question)
        return env, self.in_api_form(self.begin(env))

    async def play_one(self, client, e):
        """Plays an episode to its end. Raises NoAnswer; TooLong for a beginning beyond the context."""
        question, stop = e.env.question, stop_strings(e.env.tools)
        while not e.env.done:
            words = f"{self.seed} {question['id']} {question['question']} {e.number} {len(e.said)}"
            seed = int.from_bytes(hashlib.sha256(words.encode()).digest()[:4]) >> 1
            try:
                said = await self.server.ask(client, e.messages, self.config.temperature,
                                             self.config.max_turn_tokens, seed, stop)
            except TooLong:
                if not e.said:
                    raise
                said = None
            # the reply before was too long: it has not been seen
            if said is None or e.said and self.beyond(said, e.said[0]):
                e.truncated = True
                e.env.end()
                return
            e.said.append(said)
            text = until_call(said.text, e.env.tools)
            reply = await asyncio.to_thread(e.env.step, text)
            if said.cut_off:
                e.truncated = True
                e.env.end()
            more = await asyncio.to_thread(self.in_api_form, [Message("assistant", [text]), *reply])
            e.messages += more

    def beyond(self, said, first):
        """Whether a prompt is longer than a response may be."""
        if None in (said.prompt_tokens, first.prompt_tokens):
            return False
        return said.prompt_tokens - first.prompt_tokens > self.config.max_response_tokens

    def in_api_form(self, messages):
        """Messages of the environment as the API has them."""
        written = []
        for message in messages:
            parts = [item if isinstance(item, str) else self.image_part(item) for item in message.content]
            if all(isinstance(part, str) for part in parts):
                written.append({"role": message.role, "content": "".join(parts)})
            else:
                parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
                written.append({"role": message.role, "content": parts})
        return written

    def image_part(self, frame):
        kind, file = self.server.config.image_format, io.BytesIO()
        how = {"compress_level": 1} if kind == "png" else {"quality": 95}
        Image.fromarray(frame.image.permute(1, 2, 0).contiguous().numpy()).save(file, kind, **how)
        data = base64.b64encode(file.getvalue()).decode()
        return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{data}"}}

    def release(self):
        """It holds nothing."""
