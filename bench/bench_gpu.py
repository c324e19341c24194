"""How near a GPU's limits decoding, prefill and the update come, on the true shapes of Qwen2.5-VL with random weights.

    python bench/bench_gpu.py --shape 3B             prints a table; 7B, too
    python bench/bench_gpu.py --json rows.json       also writes the rows: name, ours, peer, ratio, goal, met
    python bench/bench_gpu.py --shape tiny --device cpu        tries the script; the numbers say nothing

One question with 64 frames of 120 tokens, 16 rollouts that have zoomed twice, 16 frames each; compute in bfloat16.

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
computes is checked against a float32 pass first.
"""

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "bench")]
import bench_rollout  # noqa: E402
import rollout as engine  # noqa: E402
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
GROUP, TURN, HEIGHT, WIDTH = 16, 200, 280, 336  # rollouts, tokens of a turn, size of a frame (120 tokens)


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
    pixels = HEIGHT * WIDTH
    env = EnvConfig(overview_max_frames=64, overview_fps=2.0, min_pixels=pixels - 8000, max_pixels=pixels, system_prompt="You see a video.")
    size = {"shortest_edge": env.min_pixels, "longest_edge": env.max_pixels}
    return Policy(hf.eval(), small.tokenizer, Qwen2VLImageProcessor(size=size), env).freeze_vision()


def frames(number, seed):
    images = torch.randint(0, 256, (number, 3, HEIGHT, WIDTH), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return [item for i, image in enumerate(images) for item in (f"<frame{i}_time{i}.00s>", Frame(float(i), image))]


def make_group(policy):
    """16 episodes that end within their third turn, of which one token is sampled."""
    prompt = encode(policy, [Message("system", ["You see a video."]), Message("user", ["What happens?", *frames(64, 0)])])
    group, vocabulary = [], policy.head.out_features
    for number in range(GROUP):
        d = prompt.fork()
        for turn in range(2):
            said = torch.randint(vocabulary, (TURN,)).tolist()
            encode(policy, [Message("assistant", [Sampled(said, [-1.0] * TURN)]),
                            Message("user", ["Here.", *frames(16, 2 * number + turn + 1)])], d)
        group.append(Episode(d, number=number))
    fill_features(policy, [e.dialogue for e in group])
    return group


def seconds(task, device, trials):
    taken = []
    for trial in range(trials + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        task()
        if device.type == "cuda":
            torch.cuda.synchronize()
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


@torch.no_grad()
def measure_generation(policy, group, args, prefill_s, bandwidth, rows):
    """Prefill, and decode steps: compiled, in a CUDA graph where there are such, and plain."""
    device = policy.device
    prompt, own = group[0].prompt_length, len(group[0].dialogue.ids) - group[0].prompt_length
    cache = KVCache(policy, GROUP, 1e18, ROW_UNIT)

    def fill():
        cache.clear()
        place = cache.add_prompt(prompt, GROUP)
        for e in group:
            e.turn_ids, e.place, e.cached = [], place, prompt
        cache.reserve(GROUP, own + 80)
        return prefill(policy, cache, [(place, group[0].dialogue)], group, 0)

    if "prefill" in args.only:
        bench_rollout.add_row(rows, f"prefill, {args.shape}, against the matrix products' time",
                              seconds(fill, device, args.trials), prefill_s, 0.45)
    if "decode" not in args.only:
        return
    fill()
    for e in group:
        e.turn_ids = [0]
    linear = [m.weight for m in policy.language_model.modules() if isinstance(m, torch.nn.Linear)]
    read = sum(w.nbytes for w in (*linear, policy.head.weight))
    read += sum(t[0, :, 0].nbytes for pair in cache.own for t in pair) * (prompt + GROUP * own)
    for way in ("compiled", "plain"):
        decoder = Decoder(policy, cache, 1.0, None, way == "compiled")
        check_decoder(decoder)
        if decoder.errors:
            print(f"decode step: {decoder.path}; log-probabilities off by {decoder.errors[0]:.1e}, plain {decoder.errors[1]:.1e}")
        taken = seconds(lambda: decoder.decode(group, 16), device, args.trials) / 16
        bench_rollout.add_row(rows, f"decode, {args.shape}, {way}, against reading all once", taken, read / bandwidth,
                              0.6 if way == "compiled" else None)


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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="3B")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", help="file for the rows")
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=["decode", "prefill", "update", "rollout"])
    args = parser.parse_args()
    device, rows = torch.device(args.device), []
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
        print(torch.cuda.get_device_name(device))
    bandwidth, speed = limits(device, args.shape == "tiny")
    print(f"copy {bandwidth / 1e9:.0f} GB/s, matrix product {speed / 1e12:.1f} TFLOP/s")
    policy = make_policy(args.shape, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    body, head = linear_weights(policy)
    group = make_group(policy)
    prompt, own = group[0].dialogue.prompt_length, len(group[0].dialogue.ids) - group[0].dialogue.prompt_length
    print(f"{args.shape}: {body + head:,} linear weights; prompt {prompt} tokens, then {own} in each of {GROUP} rows")
    needed = 2 * body * (prompt + GROUP * own) + attention_operations(policy, [
        (prompt, prompt / 2), (GROUP * own, prompt + own / 2)])
    print(f"{'':60}{'ours s':>9}{'peer s':>9}{'ratio':>8}{'goal':>6}{'met':>5}")
    if {"decode", "prefill"} & {*args.only}:
        measure_generation(policy, group, args, needed / speed, bandwidth, rows)
    if "rollout" in args.only:
        measure_rollout(policy, args, rows)
    if "update" in args.only:
        trained = sum(sum(e.dialogue.trained) for e in group)
        policy.train()
        policy.checkpoint_layers()
        masters = MasterWeights(policy)

        def update():
            log_probs, _ = token_log_probs(policy, [[e.dialogue for e in group]])
            log_probs.mean().backward()
            for master in masters.parameters:
                master.grad = None

        bench_rollout.add_row(rows, f"update, {args.shape}, against the matrix products' time",
                              seconds(update, device, args.trials), (4 * needed + 8 * head * trained) / speed, 0.45)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
