"""How near a GPU's limits decoding, prefill and the update come, on the true shapes of Qwen2.5-VL with random weights.

    python bench/bench_gpu.py --shape 3B             prints a table; 7B, too
    python bench/bench_gpu.py --json rows.json       also writes the rows: name, ours, peer, ratio, goal, met
    python bench/bench_gpu.py --profile              also the ten largest kernels of a decode step and of an update
    python bench/bench_gpu.py --shape tiny --device cpu        tries the script; the numbers say nothing

One question with 64 frames of 120 tokens, 16 rollouts that have zoomed twice, 16 frames each; compute in bfloat16.

    check      how far the compiled step's log-probabilities are from those of a pass, as "ours"; the plain step's as
               "peer". Goal: 0.5, as training/decoder_check.py has it
    decode     one token of all 16 rows, as "ours"; as "peer" the time in which a copy as fast as the fastest one measured
               would have read the weights and all cached keys and values once. Goal: 0.6
    prefill    prompt and replies through the network, against the time that their matrix products would take at the
               fastest measured product's speed (two operations a weight and token, and the attention's). Goal: 0.45
    update     forward and backward of `token_log_probs` on the packed group with gradient checkpointing and float32
               master gradients, likewise, with four times as many operations, as the forward pass is computed twice; the
               vocabulary's for trained tokens alone. Goal: 0.45. 7B needs more than 80 GB
    rollout    16 whole rollouts of a question about a video, up to 3 zooms, against transformers' `generate` each turn.
               Here the ratio says how many times faster ours is. Goal: 5

"plain" rows are the same step launched one operation after the other, as with --no-compile. What the compiled step
computes is checked before it is timed. A measurement that fails is a row that says why, and the exit status is 1 then.
"""

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "bench")]
import bench_rollout  # noqa: E402
import rollout as engine  # noqa: E402
from on_device import card, device_of, free_unused, largest_kernels, synchronize  # noqa: E402
from common import first_line  # noqa: E402
from generation import ROW_UNIT, Decoder, KVCache, prefill  # noqa: E402
from model import Policy, Sampled, encode, fill_features, token_log_probs  # noqa: E402
from rollout import Episode  # noqa: E402
from training.decoder_check import check_decoder  # noqa: E402
from training.weights import MasterWeights  # noqa: E402
from video import Frame  # noqa: E402
from protocols import PROTOCOLS  # noqa: E402
from zoom_env import EnvConfig, Message  # noqa: E402

SHAPES = {  # of Qwen2.5-VL's config.json
    "tiny": dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=256,
                 vocab_size=2048, tie_word_embeddings=True),
    "3B": dict(hidden_size=2048, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2, intermediate_size=11008,
               vocab_size=151_936, tie_word_embeddings=True),
    "7B": dict(hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, intermediate_size=18944,
               vocab_size=152_064, tie_word_embeddings=False)}
MEASUREMENTS = ["check", "decode", "prefill", "rollout", "update"]  # in this order
GROUP, TURN = 16, 200  # rollouts, tokens of a turn
# frames of the overview and of a zoom, and their height and width: 120 tokens
SCENE = dict(turn=TURN, overview=64, zoomed=16, height=280, width=336)
TINY_SCENE = dict(turn=20, overview=8, zoomed=2, height=56, width=56)


def scene_of(shape):
    return TINY_SCENE if shape == "tiny" else SCENE


def make_policy(shape, device, dtype, layers=None):
    """Random weights; `layers`: fewer than the shape's."""
    small = bench_rollout.make_policy()
    text = SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {})
    config = small.hf.config.to_dict()
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6] if shape == "tiny" else [16, 24, 24]}
    config["text_config"] |= text | {"rope_parameters": rope, "layer_types": ["full_attention"] * text["num_hidden_layers"],
                                     "max_position_embeddings": 128_000, "max_window_layers": text["num_hidden_layers"]}
    config["tie_word_embeddings"] = text["tie_word_embeddings"]
    if shape != "tiny":
        config["vision_config"] |= dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16,
                                        fullatt_block_indexes=[7, 15, 23, 31])
    config["vision_config"]["out_hidden_size"] = text["hidden_size"]
    torch.set_default_dtype(dtype)
    with torch.device(device):
        hf = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config))
    torch.set_default_dtype(torch.float32)
    scene = scene_of(shape)
    pixels = scene["height"] * scene["width"]
    env = EnvConfig(overview_max_frames=scene["overview"], overview_fps=2.0, min_pixels=int(0.9 * pixels),
                    max_pixels=pixels, system_prompt="You see a video.")
    size = {"shortest_edge": env.min_pixels, "longest_edge": env.max_pixels}
    return Policy(hf.eval(), small.tokenizer, Qwen2VLImageProcessor(size=size), env).freeze_vision()


def frames(number, scene, seed):
    """Message items: so many frames of noise, with their tags."""
    size = number, 3, scene["height"], scene["width"]
    images = torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return [item for i, image in enumerate(images) for item in (f"<frame{i}_time{i}.00s>", Frame(float(i), image))]


def make_group(policy, shape):
    """16 episodes that end within their third turn, of which one token is sampled."""
    scene = scene_of(shape)
    tokens, opening = scene["turn"], Message("user", ["What happens?", *frames(scene["overview"], scene, 0)])
    prompt = encode(policy, [Message("system", ["You see a video."]), opening])
    group, vocabulary = [], policy.head.out_features
    for number in range(GROUP):
        d = prompt.fork()
        for turn in range(2):
            said = torch.randint(vocabulary, (tokens,)).tolist()
            reply = Message("user", ["Here.", *frames(scene["zoomed"], scene, 2 * number + turn + 1)])
            encode(policy, [Message("assistant", [Sampled(said, [-1.0] * tokens)]), reply], d)
        group.append(Episode(d, number=number))
    fill_features(policy, [e.dialogue for e in group])
    return group


def seconds(task, device, trials):
    taken = []
    for trial in range(trials + 1):
        synchronize(device)
        began = time.perf_counter()
        task()
        synchronize(device)
        if trial:
            taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def limits(device, small):
    """(bytes a second of a copy, read and written; operations a second of a matrix product)"""
    n, size = (1024, 2 ** 24) if small else (8192, 2 ** 31)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source), device, 5), 2 * n ** 3 / seconds(lambda: a @ b, device, 5)


def linear_weights(policy):
    """Numbers of weights in the decoder's linear layers, and in the head."""
    linear = [m for m in policy.language_model.modules() if isinstance(m, torch.nn.Linear)]
    return sum(m.weight.numel() for m in linear), policy.head.weight.numel()


def attention_operations(policy, spans):
    """Of both products; spans: (queries, tokens that they see)."""
    config = policy.language_model.config
    return sum(4 * n * seen for n, seen in spans) * config.hidden_size * config.num_hidden_layers


def add_kernels(what, task, device, rows):
    """Rows of the kernels that take most of a task's time."""
    largest, total = largest_kernels(task, device)
    for name, seconds, calls in largest:
        rows.append({"name": what, "kernel": name, "seconds": seconds, "calls": calls,
                     "share": seconds / max(total, 1e-12)})
        print(f"{what}: {seconds * 1e3:9.3f} ms {seconds / max(total, 1e-12):5.0%} {calls:6} x {name[:100]}")


class Generation:
    """Prefill and decode steps of a group."""

    def __init__(self, policy, group, args):
        self.policy, self.group, self.args = policy, group, args
        self.prompt = group[0].prompt_length
        self.own = len(group[0].dialogue.ids) - self.prompt
        self.cache = KVCache(policy, GROUP, 1e18, ROW_UNIT)

    @torch.no_grad()
    def fill(self):
        """Prompt and replies run, and then each row has a token that is not in the cache."""
        self.cache.clear()
        place = self.cache.add_prompt(self.prompt, GROUP)
        for e in self.group:
            e.turn_ids, e.place, e.cached = [], place, self.prompt
        self.cache.reserve(GROUP, self.own + 80)
        prefill(self.policy, self.cache, [(place, self.group[0].dialogue)], self.group, 0)

    def prefill(self, peer_s, rows):
        name = f"prefill, {self.args.shape}, against the matrix products' time"
        taken = seconds(self.fill, self.policy.device, self.args.trials)
        bench_rollout.add_row(rows, name, taken, peer_s, 0.45)

    @torch.no_grad()
    def check(self, rows):
        """The compiled step, in a CUDA graph where there are such, against the plain one."""
        decoder = Decoder(self.policy, self.cache, 1.0, None, True)
        check_decoder(decoder)
        print(f"decode step: {decoder.path}")
        compiled, plain = decoder.errors
        name = f"check, {self.args.shape}, error of the step {decoder.path}"
        bench_rollout.add_row(rows, name, compiled + 1e-5, plain + 1e-5, 0.5)
        if decoder.path == "plain":
            raise RuntimeError("the compiled decode step was given up")

    @torch.no_grad()
    def decode(self, bandwidth, rows):
        """Steps: compiled, in a CUDA graph where there are such, and plain."""
        self.fill()
        for e in self.group:
            e.turn_ids = [0]
        linear = [m.weight for m in self.policy.language_model.modules() if isinstance(m, torch.nn.Linear)]
        read = sum(w.nbytes for w in (*linear, self.policy.head.weight))
        token = sum(t[0, :, 0].nbytes for pair in self.cache.own for t in pair)
        read += token * (self.prompt + GROUP * self.own)
        for way in ("compiled", "plain"):
            decoder = Decoder(self.policy, self.cache, 1.0, None, way == "compiled")
            taken = seconds(lambda: decoder.decode(self.group, 16), self.policy.device, self.args.trials) / 16
            name = f"decode, {self.args.shape}, {decoder.path}, against reading all once"
            bench_rollout.add_row(rows, name, taken, read / bandwidth, 0.6 if way == "compiled" else None)
            if way == "compiled" and self.args.profile:
                add_kernels(f"a decode step, {self.args.shape}", lambda: decoder.decode(self.group, 1),
                            self.policy.device, rows)


def measure_rollout(policy, args, rows):
    on_cuda = policy.device.type == "cuda"
    theirs = copy.deepcopy(policy.hf, {id(p): p for p in policy.hf.parameters()})  # on the same weights
    bench_rollout.looping(theirs)
    engine.Episode.turn_is_over = bench_rollout.scripted_end
    PROTOCOLS["videozoomer"] = bench_rollout.ScriptedEnv
    bench_rollout.GROUP, bench_rollout.NUM_QUESTIONS = GROUP, 1
    bench_rollout.write_scripts(3, (100, 300) if on_cuda else (4, 8))
    with tempfile.TemporaryDirectory() as folder:
        questions = bench_rollout.make_videos(Path(folder))
        ours = lambda: bench_rollout.play(policy, questions, folder, 1.0, GROUP)
        ours()  # decodes the frames, for both
        bench_rollout.compare(f"rollout, {args.shape}", {
            "ours": ours, "generate": lambda: bench_rollout.play_by_generate(theirs, policy, questions, folder, 1.0),
        }, args.trials, {"generate": 5.0}, rows)


def measure_update(policy, group, peer_s, args, rows):
    """Forward and backward passes of the whole group, gradients added up in float32."""
    policy.train()
    policy.checkpoint_layers()
    masters = MasterWeights(policy)

    def update():
        log_probs, _ = token_log_probs(policy, [[e.dialogue for e in group]])
        log_probs.mean().backward()
        for master in masters.parameters:
            master.grad = None

    name = f"update, {args.shape}, against the matrix products' time"
    bench_rollout.add_row(rows, name, seconds(update, policy.device, args.trials), peer_s, 0.45)
    if args.profile:
        add_kernels(f"an update, {args.shape}", update, policy.device, rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="3B")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", help="file for the rows")
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=MEASUREMENTS)
    parser.add_argument("--profile", action="store_true", help="the ten largest kernels, too")
    args = parser.parse_args()
    device, rows, failed = device_of(args.device), [], False
    torch.manual_seed(0)
    bandwidth, speed = limits(device, args.shape == "tiny")
    print(f"{card(device)}: copy {bandwidth / 1e9:.0f} GB/s, matrix product {speed / 1e12:.1f} TFLOP/s")
    policy = make_policy(args.shape, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    body, head = linear_weights(policy)
    group = make_group(policy, args.shape)
    generation = Generation(policy, group, args)
    prompt, own = generation.prompt, generation.own
    print(f"{args.shape}: {body + head:,} linear weights; prompt {prompt} tokens, then {own} in each of {GROUP} rows")
    needed = 2 * body * (prompt + GROUP * own) + attention_operations(policy, [
        (prompt, prompt / 2), (GROUP * own, prompt + own / 2)])
    trained = sum(sum(e.dialogue.trained) for e in group)
    update_s = (4 * needed + 8 * head * trained) / speed
    print(f"{'':60}{'ours s':>9}{'peer s':>9}{'ratio':>8}{'goal':>6}{'met':>5}")
    tasks = {"check": lambda: generation.check(rows),
             "decode": lambda: generation.decode(bandwidth, rows),
             "prefill": lambda: generation.prefill(needed / speed, rows),
             "rollout": lambda: measure_rollout(policy, args, rows),
             "update": lambda: measure_update(policy, group, update_s, args, rows)}
    for name in MEASUREMENTS:
        if name not in args.only:
            continue
        try:
            tasks[name]()
        except Exception as error:  # the others are measured all the same
            traceback.print_exc()
            rows.append({"name": f"{name}, {args.shape}", "failed": first_line(error)})
            failed = True
            del error
            free_unused(device)
        if args.json:
            Path(args.json).write_text(json.dumps(rows, indent=1))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
