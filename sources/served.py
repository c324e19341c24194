"""A policy behind an OpenAI-compatible server: what plays its episodes, as rollout.py's Engine plays ours.

    vllm serve DIR --limit-mm-per-prompt '{"image": 128}'
    OPENAI_API_KEY=... python eval.py --base_url http://localhost:8000/v1 --model DIR --data questions.jsonl

The environment, its messages and the grader are those of local play, and --model's zoom_config.json says what
is played (without --model the paper's). Here messages become a request, by the openai package (pip install
openai), which brings retries, time-outs and connections; and what comes back becomes the text of a turn. What
vLLM, SGLang, transformers serve and clouds do otherwise:

    stop strings   left out, kept, or unknown to it: a call is closed where it stopped, and cut off behind
    a thought      in a field of its own (reasoning, reasoning_content) stands before the text again
    sampling       top_k and repetition_penalty are sent as -1 and 1: vLLM would take the checkpoint's
    parameters     these, seed, stop and the like are left out where it refuses them by name, or fails at stop
                   as transformers serve does; a warning and the settings beside the numbers say so
    images         data URLs, PNG as the environment made them, or JPEG; more than it takes: the question is
                   skipped, and the reason says so
    context        too long at first: skipped; later the episode ends, as one beyond --max_response_tokens
    cut off        finish reason "length" ends the episode, as --max_turn_tokens does here
    busy, broken   429, 5xx and a connection that fails: asked again until --timeout_s; no JSON, no choice, an
                   answer that breaks off: asked again twice

Each answer is a line of answers.jsonl before it is used, by a hash of all that was asked: a run that was
killed asks again only what was on its way. A question without an answer is skipped, and asked by the same
command; where the server fails at several in a row the run ends. Redirects are not followed. The key, from
OPENAI_API_KEY, and the server's address stand in no file, the key in no output.
"""

import asyncio
import base64
import hashlib
import io
import json
import os
import re
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from PIL import Image

from common import UserError, first_line, warn
from model import stop_strings, until_call
from protocols import make_env
from training import run_folder
from video import VideoError
from zoom_env import Message, ZoomEnv

RETRIES = 5  # of a request, by the package, each later than the one before
PAUSE_S = 5.0  # before as many tries more
TRIES = 3  # of an answer that cannot be read
FAILURES = 8  # the run ends after so many failed questions in a row, and no fewer than --concurrency
MOST_BYTES = 20_000_000  # of an answer
NO_KEY = "none"
NEUTRAL = {"top_k": -1, "repetition_penalty": 1.0}
SAMPLING = {"top_p", *NEUTRAL}
MAY_LACK = {"seed", "stop", "temperature", "max_tokens", *SAMPLING}  # what a server may refuse
REFUSES = re.compile(r"un(supported|known|recogni[sz]ed|expected)|not (support|permit|allow)|extra|"
                     r"only the default|invalid param", re.IGNORECASE)
REFUSES_VALUE = re.compile(r"(must|should) be|expects|cannot both|(greater|less) than", re.IGNORECASE)
TOO_LONG = re.compile(r"context.{0,8}(length|window|limit|size)|maximum (prompt|model|input) length|"
                      r"(input|prompt|token count).{0,60}(too long|exceed)|too many tokens", re.IGNORECASE)
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
    image_format: str | None = None  # of frames: jpeg, or else png, which is exact
    max_tokens_total: int | None = None  # of a server's prompts and answers, after which the run stops


MAY_DIFFER = ("base_url", "concurrency", "timeout_s", "max_tokens_total")  # when a run goes on


class NoAnswer(Exception):
    """A question could not be asked, or was not answered: why, in a line."""


class ServerFails(NoAnswer):
    """The server failed, whatever the question."""


class TooLong(Exception):
    """The dialogue is longer than the server's context."""


class Said(NamedTuple):
    """An answer. Tokens are None where the server does not count them."""

    text: str
    cut_off: bool
    prompt_tokens: int | None
    generated: int | None
    without: tuple = ()  # names of parameters that were left out


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
            try:
                row = json.loads(line)
                self.keep(row.pop("asked"), Said(**row | {"without": tuple(row["without"])}))
            except (ValueError, LookupError, TypeError, AttributeError):  # after a power cut
                continue

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
    played. key_name: variable with its key; where there is none OPENAI_API_KEY."""

    def __init__(self, config, answers, env_config=None, key_name="OPENAI_API_KEY"):
        try:
            import openai
        except ImportError:
            raise UserError("to ask a server: pip install openai") from None
        if config.image_format not in (None, "png", "jpeg"):
            raise UserError(f"--image_format must be png or jpeg, not {config.image_format}")
        self.openai, self.config, self.env_config = openai, config, env_config
        self.key = (os.environ.get(key_name) or os.environ.get("OPENAI_API_KEY") or NO_KEY).strip()
        if not self.key.isascii():
            raise UserError("the server's key has letters that no key has")
        try:
            address = urlsplit(config.base_url)
            self.hidden = [name for name in (address.netloc, address.hostname) if name]  # in what is shown
        except ValueError:
            self.hidden = []
        if not self.hidden:
            raise UserError(f"{config.base_url} is no address such as http://localhost:8000/v1")
        self.answers = Answers(answers)
        self.left_out = set()  # parameters that it refuses
        self.answered = False  # whether it has answered since the start
        self.counts_none = False  # whether it was said that it does not count tokens
        self.failures = 0  # questions in a row at which it failed
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
                raise UserError(f"--base_url: no list of models is there ({self.words_of(error)}); most "
                                "addresses end with /v1, else give --served_model") from None
            return wanted
        if not wanted and len(names) != 1:
            raise UserError(f"give --served_model: one of {', '.join(names[:20]) or 'none'}")
        if wanted and wanted not in names:  # it may be known by more names than are listed
            warn(f"the server lists no model {wanted}, but {', '.join(names[:20]) or 'none'}")
        return wanted or names[0]

    async def ask(self, client, messages, temperature, max_tokens, seed, tools=()):
        """The Said to messages in the API's form. tools: tags of calls at which it ends. Raises NoAnswer,
        TooLong, and UserError where nothing more is asked."""
        body = {"model": self.model, "messages": messages, "max_tokens": max_tokens, "seed": seed,
                "temperature": temperature}
        body |= {"top_p": 1.0} if temperature else {}
        body |= {"stop": list(stop_strings(tools))} if tools else {}
        asked = hashlib.sha256(json.dumps(body).encode()).hexdigest()
        limit = self.config.max_tokens_total
        if asked not in self.answers.known and limit is not None and self.answers.tokens >= limit:
            self.ended = self.ended or UserError(
                f"stopped after {self.answers.tokens} tokens, --max_tokens_total {limit}; the same command "
                "with more of them goes on")
        if self.ended:
            raise self.ended
        said = await self.answers.get(asked, lambda: self.request(client, body, tools))
        self.failures = 0
        if limit is not None and said.prompt_tokens is None and not self.counts_none:
            warn("the server counts no tokens: --max_tokens_total does nothing")
            self.counts_none = True
        return said

    def note_failure(self, error):
        """A question got a ServerFails: after several in a row nothing more is asked."""
        self.failures += 1
        if self.failures >= max(FAILURES, self.config.concurrency):
            self.ended = self.ended or UserError(f"the server failed at {self.failures} questions in a row "
                                                 f"({error}); the same command goes on")

    async def request(self, client, body, tools):
        """The Said to a request, which is sent as often as it takes."""
        unread, last = 0, ""
        try:
            async with asyncio.timeout(self.config.timeout_s):
                while True:
                    try:
                        raw, without = await self.adapted(client, body)
                        return said_in(raw, tools)._replace(without=tuple(sorted(without)))
                    except (ValueError, LookupError, TypeError, AttributeError) as error:
                        unread, last = unread + 1, f"its answer cannot be read ({first_line(error)})"
                        if unread == TRIES:
                            raise ServerFails(last) from None
                    except self.openai.APIError as error:
                        last = self.words_of(error)
                        if refusal := self.refusal(error):
                            raise refusal from None
                        await asyncio.sleep(max(PAUSE_S, wished_s(error)))
        except TimeoutError:
            more = f": {last}" if last else ""
            raise ServerFails(f"no answer within --timeout_s {self.config.timeout_s:g}{more}") from None

    def refusal(self, error):
        """What is raised where the server will not answer; None where it may, later."""
        status, words, whole = getattr(error, "status_code", None), self.words_of(error), whole_of(error)
        if status is None or status in (408, 409, 429):
            return None
        if status in (401, 402, 404) or 300 <= status < 400 or status == 403 and not self.answered:
            return UserError(f"--base_url: {words}")
        if TOO_LONG.search(whole):
            return TooLong(words)
        if status >= 500:
            return None
        if TOO_MANY_IMAGES.search(whole):
            return NoAnswer(f"{words}; of vLLM --limit-mm-per-prompt says how many images it takes")
        return NoAnswer(words)

    async def adapted(self, client, body):
        """(bytes of the answer, names of what was left out) of a request, without the parameters that the
        server refuses. Those are left out of later ones, too, once it has answered without them."""
        without = self.left_out & {*body, *NEUTRAL}
        while True:
            try:
                raw = await self.send(client, body, without)
                break
            except self.openai.APIStatusError as error:
                refused = (self.refused_by(error) & {*body, *NEUTRAL}) - without
                if not refused:
                    raise
                without |= refused
        self.answered = True
        if new := without - self.left_out - {"max_tokens"}:
            warn(f"the server refuses {', '.join(sorted(new))}: what it does by itself counts")
        self.left_out |= without
        return raw, without - {"max_tokens"}

    def refused_by(self, error):
        """The names of the parameters that an error refuses. Where nothing was answered yet an internal error
        may be for `stop`: transformers serve has one for every model that sees."""
        words, named = whole_of(error), getattr(error, "param", None)
        if TOO_LONG.search(words):
            return set()
        if error.status_code == 500 and not self.answered:
            return {"stop"}
        if error.status_code not in (400, 422):
            return set()
        may_lack = MAY_LACK if REFUSES.search(words) else SAMPLING if REFUSES_VALUE.search(words) else set()
        return {named} & may_lack or {name for name in may_lack if re.search(rf"\b{name}\b", words)}

    async def send(self, client, body, without):
        """One request. Returns the bytes of the answer. Raises the package's errors, and ValueError for an
        answer, or the words of an error, that break off or are too long."""
        given = {name: value for name, value in body.items() if name not in without}
        if "max_tokens" in without:
            given["max_completion_tokens"] = body["max_tokens"]
        more = {name: value for name, value in NEUTRAL.items() if name not in without}
        create, raw = client.chat.completions.with_streaming_response.create, bytearray()
        try:
            async with create(**given, extra_body=more) as response:
                async for part in response.iter_bytes():
                    raw += part
                    if len(raw) > MOST_BYTES:
                        break
        except self.openai.APIError:
            raise
        except Exception as error:  # of whatever carries it
            raise ValueError(f"it broke off: {type(error).__name__}") from None
        if len(raw) > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES} bytes")
        return bytes(raw)

    def words_of(self, error):
        """An error in one line, without the key and the server's address."""
        about, status = getattr(error, "body", None), getattr(error, "status_code", None)
        for key in ("error", "message", "detail"):
            while isinstance(about, list) and about:
                about = about[0]
            about = about.get(key) or about if isinstance(about, dict) else about
        text = about if isinstance(about, str) else json.dumps(about) if about else str(error)
        lines = text.strip().splitlines()
        words = lines[0] if lines else type(error).__name__
        if isinstance(error, TimeoutError | self.openai.APIConnectionError):
            words = f"cannot reach the server ({type(error.__cause__ or error).__name__})"
        if status and 300 <= status < 400:
            words = "it points to another address, which is not followed; give that one"
        words = words.replace(self.key, "***") if self.key != NO_KEY else words
        for name in self.hidden:
            words = words.replace(name, "the server")
        return " ".join(f"status {status}: {words}".split())[:300] if status else words


def whole_of(error):
    """All that an error says."""
    body = getattr(error, "body", None)
    return json.dumps(body, ensure_ascii=False).replace("\\n", " ") if body else str(error)


def said_in(raw, tools=()):
    """The Said in the bytes of an answer. Raises NoAnswer for one that the server refuses, and ValueError,
    LookupError, TypeError, AttributeError."""
    answer = json.loads(raw)
    choice, usage = answer["choices"][0], answer.get("usage") or {}
    message, reason = choice["message"], choice.get("finish_reason")
    text, thought = message.get("content"), message.get("reasoning_content") or message.get("reasoning")
    if isinstance(text, list):
        text = "".join(part.get("text") or "" for part in text)
    if reason == "content_filter" or message.get("refusal"):
        raise NoAnswer("the server refuses to answer it")
    if text is None and not thought and reason != "length":
        raise ValueError(f"no text, finish reason {reason}")
    if thought and not (text or "").strip():  # nothing came after it, so nothing says that it had an end
        text, thought = "<think>" + thought.removesuffix("<|im_end|>"), None
    # the text ends with its call, whatever stands behind or in the thought
    text = until_call(with_stop(text or "", choice, stop_strings(tools)), tools)
    cut_off = reason == "length" and not text.endswith(stop_strings(tools))
    if thought and not text.lstrip().startswith("<think>"):
        text = f"<think>{thought}</think>{text}"
    return Said(text, cut_off, usage.get("prompt_tokens"), usage.get("completion_tokens"))


def wished_s(error):
    """The seconds for which a server wants to be left alone."""
    headers = error.response.headers if hasattr(error, "response") else {}
    try:
        return min(3600.0, float(headers.get("retry-after") or 0))
    except ValueError:  # a date
        return 0.0


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
        """As of rollout.Episode, None where the server does not count; and which parameters it refused."""
        counts = dict.fromkeys(("tokens", "generated", "prompt_tokens"))
        if self.said and not any(None in (said.prompt_tokens, said.generated) for said in self.said):
            last = self.said[-1]
            counts = {"tokens": last.prompt_tokens + last.generated,
                      "generated": sum(said.generated for said in self.said),
                      "prompt_tokens": self.said[0].prompt_tokens}
        return counts | {"refused_parameters": sorted({name for said in self.said for name in said.without})}


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
        groups, skipped = [[] for _ in questions], {}
        unopened, opening = deque(range(len(questions))), set()
        ready = deque()  # (question, sample, environment, messages)

        async def work():
            while (ready or unopened or opening) and not self.server.ended:
                if not ready and not unopened:
                    await asyncio.sleep(0.01)  # samples come when a video that another one opens is there
                    continue
                number = ready[0][0] if ready else unopened.popleft()
                try:
                    if not ready:  # a question's video is read once, for all samples
                        await open_all(number)
                        continue
                    number, sample, env, messages = ready.popleft()
                    e = ServedEpisode(env.fork(), [*messages], sample, number)
                    await self.play_one(client, e)
                except UserError as error:  # the others end with their next turn
                    self.server.ended = self.server.ended or error
                    return
                except (VideoError, NoAnswer, TooLong) as error:
                    if isinstance(error, ServerFails) and number not in skipped:
                        self.server.note_failure(error)
                    skipped[number] = str(error)
                    continue
                groups[number].append(e)
                if on_end:
                    on_end(e)

        async def open_all(number):
            opening.add(number)
            try:
                begun = await asyncio.to_thread(self.open, make, questions[number])
                ready.extend((number, sample, *begun) for sample in range(self.group_size))
            finally:
                opening.remove(number)

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
        question = e.env.question
        while not e.env.done:
            words = f"{self.seed} {question['id']} {question['question']} {e.number} {len(e.said)}"
            seed = int.from_bytes(hashlib.sha256(words.encode()).digest()[:4]) >> 1
            try:
                said = await self.server.ask(client, e.messages, self.config.temperature,
                                             self.config.max_turn_tokens, seed, e.env.tools)
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
            reply = await asyncio.to_thread(e.env.step, said.text)
            if said.cut_off:
                e.truncated = True
                e.env.end()
            more = await asyncio.to_thread(self.in_api_form, [Message("assistant", [said.text]), *reply])
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
            parts = [item if isinstance(item, str) else self.image_part(item) for item in message.content
                     if item != ""]  # some servers refuse empty ones
            if all(isinstance(part, str) for part in parts):
                written.append({"role": message.role, "content": "".join(parts)})
            else:
                parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
                written.append({"role": message.role, "content": parts})
        return written

    def image_part(self, frame):
        kind, file = self.server.config.image_format or "png", io.BytesIO()
        how = {"compress_level": 1} if kind == "png" else {"quality": 95}
        Image.fromarray(frame.image.permute(1, 2, 0).contiguous().numpy()).save(file, kind, **how)
        data = base64.b64encode(file.getvalue()).decode()
        return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{data}"}}

    def release(self):
        """It holds nothing."""


def same_model(out, what, name):
    """Notes in the run of the folder `out` which model it asks. Raises UserError where it began with
    another."""
    before = run_folder.note(out).get(what)
    if before not in (None, name):
        raise UserError(f"{out} was begun with the {what} {before}, not {name}; give another --out")
    run_folder.note(out, **{what: name})
