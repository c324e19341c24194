"""How fast a GRPO step is, and how much memory log-probabilities take, beside TRL and beside the plain ways.

    python bench/bench_update.py                     all rows; those against TRL only where it can be imported
    python bench/bench_update.py --only packed       some of them: step, packed, memory
    python bench/bench_update.py --json rows.json    also writes the rows: name, ours, peer, ratio, goal, met

All on the CPU in float32, on random weights. A ratio says how many times faster, or smaller, ours is: the medians over
the trials, everyone in turn in one run, after one step that does not count.

    step      a whole GRPO step of 8 questions x 8 rollouts: one turn of 64 tokens each, log-probabilities, one AdamW
              step, no reference model. Ours is `rollout` and `update`; the peer is trl.GRPOTrainer with the same
              weights, prompts (asserted token by token) and frames. Rewards are random. On a CPU, TRL (1.16) puts the
              prompts' positions through the vocabulary, too, and on a GPU only the completions'; "completions only"
              makes it do so here.
    packed    forward and backward of `token_log_probs` on 4 groups, each packed as one sequence, against the same
              code without groups; 512 tokens of prompt and 8 replies of 128
    memory    peak memory of forward and backward for 300 trained tokens of 8192, above what the process had before,
              against the logits of all positions; each in a process of its own. The plain way takes 16 GB. Linux.

    pip install trl                              (what the rows of `step` need)
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from demo.synthetic import write_video  # noqa: E402
from demo.tiny_base import CHAT_TEMPLATE, make_tokenizer  # noqa: E402
from model import Dialogue, Policy, encode, token_log_probs  # noqa: E402
from rollout import rollout  # noqa: E402
from training.weights import MasterWeights  # noqa: E402
from video import Frame  # noqa: E402
from zoom_env import EnvConfig, LAST_TURN, ZoomEnv  # noqa: E402
from rl import Config, group_advantages, update  # noqa: E402
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessor  # noqa: E402

QUESTIONS, GROUP, NEW_TOKENS, SIDE = 8, 8, 64, 28
ENV = EnvConfig(overview_fps=2.0, overview_max_frames=16, max_zooms=0, min_pixels=SIDE * SIDE, max_pixels=SIDE * SIDE,
                system_prompt="Answer.")
WORDS = ["system\nuser\nassistant\n", "Answer.", "What happens?\nThe video lasts 8.00 seconds. 16 frames of it:\n",
         "<frame0_time0.25s>\n", LAST_TURN]


# ------------------------------------------------------------------------------------------------------ the tiny model
def make_model(vocab_size, layers=2, intermediate_size=256):
    """(transformers' model, tokenizer, image processor): a Qwen2.5-VL whose vocabulary is padded to `vocab_size`."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(WORDS * 100)
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in
           ("image_pad", "video_pad", "vision_start", "vision_end", "im_end", "endoftext")}
    hf = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=vocab_size, hidden_size=128, intermediate_size=intermediate_size, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=2, initializer_range=0.09, max_position_embeddings=16_384,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]},
            bos_token_id=ids["endoftext"], eos_token_id=ids["im_end"], pad_token_id=ids["endoftext"]),
        vision_config=dict(
            depth=2, hidden_size=64, initializer_range=0.09, intermediate_size=128, num_heads=2, out_hidden_size=128,
            window_size=112, fullatt_block_indexes=[1], tokens_per_second=2),
        image_token_id=ids["image_pad"], video_token_id=ids["video_pad"], vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"], tie_word_embeddings=True))
    hf.model.visual.requires_grad_(False)
    return hf, tokenizer, Qwen2VLImageProcessor(size={"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE})


@torch.no_grad()
def never_end(hf):
    """Weights with which <|im_end|> and <|endoftext|> are never sampled, so that all turns are of full length: a
    direction that all tokens share and these two point against."""
    embedding = hf.model.language_model.embed_tokens.weight
    embedding[:, 0] = 3.0
    embedding[[hf.config.text_config.eos_token_id, hf.config.text_config.pad_token_id], 0] = -3.0


def random_dialogue(policy, prompt, reply):
    """Random text: `prompt` a list of ids, `reply` the number of trained tokens after it."""
    dialogue = Dialogue(prompt_length=len(prompt))
    dialogue.add(prompt)
    dialogue.add(torch.randint(policy.hf.lm_head.out_features, (reply,)).tolist(), trained=True)
    return dialogue


def difference(a, b):
    """The largest difference, relative to the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()


# ---------------------------------------------------------------------------------------------------- a whole GRPO step
def make_questions(folder, number):
    """Questions about videos of 8 s that are in no cache yet."""
    rng, questions = np.random.default_rng(number), []
    for i in range(QUESTIONS):
        name = f"{number}-{i}.mp4"
        coarse = rng.integers(0, 256, (32, 4, 4, 3), dtype=np.uint8)
        write_video(folder / name, [np.kron(image, np.ones((SIDE // 4, SIDE // 4, 1), np.uint8)) for image in coarse], 4)
        questions.append({"id": name, "video": name, "question": "What happens?", "options": None, "answer": "A",
                          "answer_type": "multiple_choice", "evidence": None})
    return questions


class Ours:
    def __init__(self, hf, tokenizer, image_processor, folder):
        self.policy, self.folder = Policy(hf, tokenizer, image_processor, ENV), folder
        self.config = Config(batch_size=QUESTIONS, mini_batch_size=QUESTIONS, group_size=GROUP, kl_weight=0.0,
                             entropy_weight=0.0, max_turn_tokens=NEW_TOKENS, max_rows=QUESTIONS * GROUP,
                             gradient_checkpointing=False)
        self.masters = MasterWeights(self.policy)
        self.optimizer = torch.optim.AdamW(self.masters.parameters, lr=self.config.lr, betas=(0.9, 0.95),
                                           weight_decay=0.0)
        self.steps = 0

    def step(self):
        """Seconds, split into (rollout, update), and the tokens that were sampled."""
        questions, cpu = make_questions(self.folder, self.steps), torch.device("cpu")
        self.steps += 1
        began = time.perf_counter()
        self.policy.eval()
        groups, skipped = rollout(self.policy, questions, GROUP, self.config, root=self.folder)
        for group, advantages in zip(groups, group_advantages(torch.rand(QUESTIONS, GROUP)).tolist()):
            for e, advantage in zip(group, advantages):
                e.dialogue.advantage = advantage
        played = time.perf_counter()
        self.policy.train()
        metrics = update(self.masters, groups, self.optimizer, self.config, 0, cpu)
        ended = time.perf_counter()
        assert not skipped and metrics["updates"] == 1 and metrics["mismatch"] < 1e-4, (skipped, metrics)
        return (played - began, ended - played), round(metrics["trained_tokens"])


class TRL:
    def __init__(self, hf, tokenizer, image_processor, folder, completions_only):
        from datasets import Dataset
        from PIL import Image
        from transformers import Qwen2_5_VLProcessor, Qwen2VLVideoProcessor, TrainerCallback
        from trl import GRPOConfig, GRPOTrainer

        processor = Qwen2_5_VLProcessor(image_processor, tokenizer, Qwen2VLVideoProcessor(), CHAT_TEMPLATE)
        policy, rows = Policy(copy.deepcopy(hf), tokenizer, image_processor, ENV), []
        for question in make_questions(folder, 0):
            messages = ZoomEnv(question, ENV, folder).reset()
            images = [Image.fromarray(item.image.permute(1, 2, 0).numpy())
                      for message in messages for item in message.content if isinstance(item, Frame)]
            prompt = [{"role": message.role, "content": [
                {"type": "image"} if isinstance(item, Frame) else {"type": "text", "text": item}
                for item in message.content]} for message in messages]
            text = processor.apply_chat_template(prompt, add_generation_prompt=True)
            self.prompt_ids = processor(text=text, images=images)["input_ids"][0]
            assert self.prompt_ids == encode(policy, messages).ids  # both sides read the same
            rows.append({"prompt": prompt, "images": images})
        test = self

        class Clock(TrainerCallback):
            def on_step_begin(self, *args, **kwargs):
                test.began = time.perf_counter()

            def on_step_end(self, *args, **kwargs):
                test.seconds = time.perf_counter() - test.began

        def random_rewards(completion_ids, **kwargs):
            self.tokens = sum(map(len, completion_ids))
            return torch.rand(len(completion_ids)).tolist()

        self.completions_only = completions_only
        self.trainer = GRPOTrainer(
            hf, random_rewards, processing_class=processor, train_dataset=Dataset.from_list(rows), callbacks=[Clock()],
            args=GRPOConfig(
                str(folder / "trl"), use_cpu=True, bf16=False, per_device_train_batch_size=QUESTIONS * GROUP,
                num_generations=GROUP, max_completion_length=NEW_TOKENS, max_steps=1, num_iterations=1, beta=0.0,
                temperature=1.0, top_p=1.0, top_k=0, learning_rate=1e-6, lr_scheduler_type="constant",
                weight_decay=0.0, gradient_checkpointing=False, logging_strategy="no", save_strategy="no",
                report_to="none", disable_tqdm=True))

    def step(self):
        import trl.trainer.utils as utils
        before = utils._use_triton
        if self.completions_only:  # that function only says there which positions are scored
            utils._use_triton = lambda device: True
        self.trainer.train()
        utils._use_triton = before
        return (self.seconds,), self.tokens


def step_rows(trials):
    try:
        import trl
        import trl.trainer.utils
    except ImportError as error:
        print(f"TRL left out: {error}")
        return []
    rows, expected = [], QUESTIONS * GROUP * NEW_TOKENS
    for vocab_size, goal in ((151_936, 8), (2048, 3)):
        with tempfile.TemporaryDirectory() as folder:
            hf, *rest = make_model(vocab_size)
            never_end(hf)
            runners = {"TRL": TRL(copy.deepcopy(hf), *rest, Path(folder), False)}
            if hasattr(trl.trainer.utils, "_use_triton"):
                runners["TRL, completions only"] = TRL(copy.deepcopy(hf), *rest, Path(folder), True)
            prompt_tokens = len(runners["TRL"].prompt_ids)
            runners = {"ours": Ours(hf, *rest, Path(folder))} | runners
            seconds, tokens = {who: [] for who in runners}, {}
            for trial in range(trials + 1):
                for who, runner in runners.items():
                    taken, tokens[who] = runner.step()
                    assert abs(tokens[who] - expected) <= 0.01 * expected, (who, tokens[who], expected)
                    if trial:
                        seconds[who].append(taken)
        embedding = hf.lm_head.weight.numel()
        others = sum(p.numel() for p in hf.parameters()) - embedding
        print(f"step, vocabulary {vocab_size}: TRL {trl.__version__}, {others:,} parameters and {embedding:,} of the "
              f"embedding, prompts of {prompt_tokens} tokens, tokens sampled in a step: "
              + ", ".join(f"{who} {n}" for who, n in tokens.items()))
        print("    ours: rollout {:.2f} s, update {:.2f} s".format(*map(statistics.median, zip(*seconds["ours"]))))
        ours = statistics.median(map(sum, seconds.pop("ours")))
        for who, taken in seconds.items():
            peer = statistics.median(map(sum, taken))
            rows.append(row(f"GRPO step, vocabulary {vocab_size}, against {who}", ours, peer, goal if who == "TRL" else None))
    return rows


# ------------------------------------------------------------------------------------------------- packed against plain
def packed_rows(trials):
    policy = Policy(*make_model(2048, layers=4, intermediate_size=384), ENV)  # the demo's decoder
    parameters, groups = [p for p in policy.parameters() if p.requires_grad], []
    for _ in range(4):
        prompt = torch.randint(2048, (512,)).tolist()
        groups.append([random_dialogue(policy, prompt, 128) for _ in range(8)])
    ways = {"packed": groups, "plain": [[d] for group in groups for d in group]}
    seconds, results = {way: [] for way in ways}, {}
    for trial in range(trials + 1):
        for way, batch in ways.items():
            policy.zero_grad()
            began = time.perf_counter()
            log_probs, _ = token_log_probs(policy, batch)
            log_probs.mean().backward()
            if trial:
                seconds[way].append(time.perf_counter() - began)
            results[way] = log_probs.detach(), torch.cat([p.grad.flatten() for p in parameters])
    off = [difference(a, b) for a, b in zip(results["packed"], results["plain"], strict=True)]
    print("packed: largest relative difference of log-probabilities {:.1e}, of gradients {:.1e}".format(*off))
    assert max(off) < 1e-4, off
    return [row("update, packed against plain", *(statistics.median(seconds[way]) for way in ways), 2.5)]


# ------------------------------------------------------------------------------------------------------------ memory
def plain_log_probs(policy, dialogue):
    """Log-probabilities the plain way: the logits of all positions."""
    ids = torch.tensor([dialogue.ids])
    positions = torch.tensor(dialogue.positions).T[:, None]

    def attend(layer, query, key, value):
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2)

    hidden = policy.hidden_states(ids, positions, attend)
    log_p = torch.log_softmax(policy.hf.lm_head(hidden[:, :-1]), dim=-1)
    log_p = log_p.gather(2, ids[:, 1:, None])[0, :, 0]
    return log_p[torch.tensor(dialogue.trained[1:])]


def memory_of(way):
    """Runs in a process of its own: prints the peak in bytes and the log-probabilities as JSON."""
    policy = Policy(*make_model(151_936), ENV)

    def run(length, trained):
        dialogue = random_dialogue(policy, torch.randint(151_936, (length - trained,)).tolist(), trained)
        log_probs = token_log_probs(policy, [[dialogue]])[0] if way == "ours" else plain_log_probs(policy, dialogue)
        log_probs.mean().backward()
        return log_probs.tolist()

    def status(key):  # ru_maxrss would be the parent's peak where that was higher
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024

    run(64, 8)  # the libraries' own buffers, and the gradients
    before = status("VmRSS")
    values = run(8192, 300)
    print(json.dumps([status("VmHWM") - before, values]))


def memory_rows(trials):
    peaks, values = {}, {}
    for way in ("ours", "plain"):
        child = subprocess.run([sys.executable, __file__, "--memory_of", way], stdout=subprocess.PIPE, text=True)
        if child.returncode:
            print(f"memory left out: {way} ended with status {child.returncode} (-9: not enough memory)")
            return []
        peaks[way], values[way] = json.loads(child.stdout)
    off = difference(torch.tensor(values["ours"]), torch.tensor(values["plain"]))
    print(f"memory: largest relative difference of log-probabilities {off:.1e}")
    assert off < 1e-4, off
    return [row("log-probabilities, peak memory, vocabulary 151936, 8192 tokens, 300 trained",
                peaks["ours"] / 1e9, peaks["plain"] / 1e9, 10, "GB")]


def row(name, ours, peer, goal, unit="s"):
    ratio = peer / ours
    return {"name": name, "ours": ours, "peer": peer, "unit": unit, "ratio": ratio, "goal": goal,
            "met": None if goal is None else ratio >= goal}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"step": step_rows, "packed": packed_rows, "memory": memory_rows}
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts), help="the rows to measure")
    parser.add_argument("--json", help="file for the rows")
    parser.add_argument("--trials", type=int, default=3, help="timings of each (default 3)")
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        return memory_of(args.memory_of)
    rows = [r for name in args.only for r in parts[name](args.trials)]
    print(f"{'':78}{'ours':>9}{'peer':>9}{'times better':>14}{'goal':>6}{'met':>5}")
    for r in rows:
        met = {None: "", True: "yes", False: "NO"}[r["met"]]
        print(f"{r['name']:78}{r['ours']:6.2f} {r['unit']:2}{r['peer']:6.2f} {r['unit']:2}{r['ratio']:14.1f}"
              f"{r['goal'] or '':>6}{met:>5}")
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
