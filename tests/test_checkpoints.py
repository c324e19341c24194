"""Checkpoint folders: each fault is one PolicyError line, end tokens end a turn, and a save may be killed."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import random_policy
from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration

from common import UserError
from model import Policy, PolicyError, Sampled, encode
from training.checkpoints import load_policy
from rollout import Episode
from training import checkpoints
from training.checkpoints import INDEX, save_policy
from zoom_env import Message

ROOT = Path(__file__).resolve().parent.parent
JSONS = ["config.json", "zoom_config.json", "tokenizer.json", "preprocessor_config.json",
         "generation_config.json"]
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 3\n"
# For each folder a child that saves checkpoints 1, 2, ... over each other until it is killed.
SAVE_FOREVER = """
import os, sys, torch
sys.path[:0] = sys.argv[1:3]
from test_checkpoints import fill, small_policy
from training.checkpoints import save_policy
for folder in sys.argv[3:]:
    if child := os.fork():
        os.waitpid(child, 0)
        print("dead", flush=True)
        continue
    print(os.getpid(), flush=True)
    policy = small_policy()
    for k in range(1, 10_000):
        save_policy(fill(policy, k), folder)
        print(k, flush=True)
"""


def small_policy():
    """A random policy of one layer."""
    return random_policy(layers=1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_policy(small_policy(), folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of a small checkpoint, for a fault."""
    shutil.copytree(saved, tmp_path / "model")
    return tmp_path / "model"


def weight_file(folder):
    return next(folder.glob("model-*.safetensors"))


def change(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refusal(folder):
    """The one line with which a checkpoint is refused; it names the folder."""
    with pytest.raises(PolicyError) as raised:
        load_policy(folder)
    line = str(raised.value)
    assert "\n" not in line and str(folder) in line and len(line) < 600
    return line


# -------------------------------------------------------------------------------------------- what is refused
def as_bin(folder):
    """The same weights as pytorch_model.bin."""
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    torch.save(hf.state_dict(), folder / "pytorch_model.bin")
    for file in [weight_file(folder), folder / INDEX]:
        file.unlink()
    return folder / "pytorch_model.bin"


def as_one_file(folder):
    weight_file(folder).rename(folder / "model.safetensors")
    (folder / INDEX).unlink()
    return folder / "model.safetensors"


@pytest.mark.parametrize("form", [weight_file, as_one_file, as_bin])
def test_weights_that_are_none(folder, form):
    file = form(folder)
    load_policy(folder)
    whole = file.read_bytes()
    for content, say in ((LFS.encode(), "git lfs pull"), (whole[:-1000], "again"), (whole[:4], "again"),
                         (b"", "again"), (random.Random(0).randbytes(5000), "again"), (b"<!DOC", "again")):
        file.write_bytes(content)
        line = refusal(folder)
        assert file.name in line and say in line
    file.unlink()
    assert "weight" in refusal(folder)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_named(folder, policy, value):
    """Else an evaluation says that nothing is right, and sampling fails."""
    policy = policy.frozen_copy()
    policy.language_model.layers[0].mlp.up_proj.weight[1, 2] = value
    save_policy(policy, folder)
    assert "layers.0.mlp.up_proj.weight are not finite (1 in all)" in refusal(folder)


def test_a_tokenizer_may_be_smaller_than_the_embedding_but_not_larger(folder, policy):
    tokenizer = load_policy(folder).tokenizer
    tokenizer.add_tokens(["<one more>"])
    tokenizer.save_pretrained(folder)
    line = refusal(folder)
    assert "tokenizer" in line and "embedding" in line
    padded = policy.frozen_copy()
    padded.hf.resize_token_embeddings(len(tokenizer) + 60)
    save_policy(padded, folder)
    assert load_policy(folder).head.out_features == len(tokenizer) + 60


@pytest.mark.parametrize("how", ["awq", "gptq", "bitsandbytes", "fp8", "compressed-tensors"])
def test_quantised(folder, how):
    change(folder / "config.json", quantization_config={"quant_method": how, "bits": 4})
    line = refusal(folder)
    assert how in line and "unquantised" in line


def test_other_models_and_adapters(folder):
    for kind in ("qwen2_vl", "qwen3_vl", "llama", None, 5, ["qwen2_5_vl"]):
        change(folder / "config.json", model_type=kind)
        assert str(kind) in refusal(folder)
    (folder / "adapter_config.json").write_text("{}")
    assert "adapter" in refusal(folder) and "merge" in refusal(folder)
    (folder / "config.json").unlink()
    assert "adapter" in refusal(folder)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "tokenizer.json"])
def test_missing_files_are_named(folder, name):
    (folder / name).unlink()
    assert name in refusal(folder)


@pytest.mark.parametrize("name", [*JSONS, "tokenizer_config.json", INDEX])
def test_json_files_that_hold_something_else(folder, name):
    for content in (LFS, "", "[1]", "null", "5", "{", "[" * 100_000, '"\ud800"'):
        (folder / name).write_bytes(content.encode(errors="surrogatepass"))
        assert name in refusal(folder)


@pytest.mark.parametrize("seed", range(50))
def test_random_bytes(saved, tmp_path, seed):
    """In any file: whole, or a piece in its middle, which may also leave something that can be loaded."""
    rng = random.Random(seed)
    names = [*JSONS, weight_file(saved).name, "tokenizer_config.json", INDEX]
    for file in saved.iterdir():
        os.link(file, tmp_path / file.name)
    file = tmp_path / names[seed % len(names)]
    content = bytearray(file.read_bytes())
    file.unlink()
    whole, start = seed < 25, rng.randrange(min(len(content), 3000))
    content[0 if whole else start:None if whole else start + 20] = rng.randbytes(rng.choice([1, 8, 20, 3000]))
    file.write_bytes(content)
    try:
        load_policy(tmp_path)
        assert not whole
    except PolicyError as error:
        assert "\n" not in str(error) and str(tmp_path) in str(error)


WRONG = [("config.json", key, value) for key, value in (
    ("text_config", 5), ("text_config", {"hidden_size": "x"}), ("vision_config", []),
    ("vision_config", {"depth": None}), ("text_config", {"num_hidden_layers": -1.5}),
    ("quantization_config", "awq"))]
WRONG += [("zoom_config.json", key, value) for key, value in (
    ("overview_fps", "2"), ("max_zooms", 2.5), ("max_zooms", None), ("system_prompt", 5),
    ("zoom_max_frames", True), ("overview_fps", float("nan")), ("overview_fps", float("inf")),
    ("overview", ["auto"]), ("unknown", 1))]
WRONG += [("preprocessor_config.json", key, value) for key, value in (
    ("patch_size", "x"), ("patch_size", 16), ("merge_size", None), ("image_mean", "x"),
    ("image_std", [0, 0, 0]), ("image_mean", [1.0]), ("temporal_patch_size", 0))]
WRONG += [("generation_config.json", "eos_token_id", value) for value in (
    "2", [2, None], [[2]], {"a": 2}, 2.5, True)]
WRONG += [("tokenizer.json", key, value) for key, value in (
    ("model", 5), ("model", None), ("added_tokens", "x"), ("decoder", []),
    ("pre_tokenizer", {"type": "None"}))]


@pytest.mark.parametrize("name, key, value", WRONG)
def test_wrong_types(folder, name, key, value):
    change(folder / name, **{key: value})
    refusal(folder)


@pytest.mark.parametrize("name", ["im_start", "im_end", "vision_start", "vision_end", "image_pad"])
def test_a_tokenizer_without_a_special_token(folder, name):
    token = f"<|{name}|>"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((folder / name).read_text().replace(token, token.replace("|>", "_|>")))
    assert token in refusal(folder)


def test_names_that_are_no_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    for name in (tmp_path / "file", tmp_path / "nothing", "nothing", "./a\0b", "/" + "x" * 400):
        with pytest.raises(PolicyError):
            load_policy(name)


def test_only_stopping_the_program_escapes(folder, monkeypatch):
    class Panic(BaseException):
        """As Rust code raises it."""

    for error, seen in ((Panic("x\ny"), PolicyError), (MemoryError(), PolicyError),
                        (KeyboardInterrupt(), KeyboardInterrupt)):
        def fail(*args, error=error, **kwargs):
            raise error
        monkeypatch.setattr("training.checkpoints.AutoTokenizer.from_pretrained", fail)
        with pytest.raises(seen):
            load_policy(folder)


# ------------------------------------------------------------------------------------------------- end tokens
@pytest.mark.parametrize("eos", [None, 5, [5, 7], 10_000_000])
def test_all_end_tokens_of_the_checkpoint_end_a_turn(policy, eos):
    policy = policy.frozen_copy()
    policy.hf.generation_config = GenerationConfig(eos_token_id=eos)
    policy = Policy(policy.hf, policy.tokenizer, policy.image_processor, policy.env_config)
    endoftext = policy.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    also = eos if isinstance(eos, list) else [] if eos is None else [eos]
    assert policy.end_tokens == {policy.im_end, endoftext, *also}
    said = policy.tokenizer.encode("<answer>A</answer>")
    for end in (policy.im_end, endoftext, *(i for i in also if i < 100)):
        e = Episode(encode(policy, [Message("user", ["which?"])]), [*said, end], [0.0] * (len(said) + 1))
        before = len(e.dialogue.ids)
        assert e.turn_is_over(policy) and not Episode(e.dialogue, said).turn_is_over(policy)
        assert e.end_turn(policy) == "<answer>A</answer>" and not e.truncated
        newline = policy.tokenizer.encode("\n")
        after = newline if end == policy.im_end else [policy.im_end, *newline]
        assert e.dialogue.ids[before:] == [*said, end, *after]
        assert e.dialogue.trained[before:] == [True] * (len(said) + 1) + [False] * len(after)


def test_end_tokens_are_saved(folder):
    change(folder / "generation_config.json", eos_token_id=[2, 33], temperature=1e-6, do_sample=False)
    policy = load_policy(folder)
    assert {2, 33} <= policy.end_tokens and policy.end_tokens == policy.frozen_copy().end_tokens
    save_policy(policy, folder)  # transformers refuses to write such settings
    assert load_policy(folder).end_tokens == policy.end_tokens


def test_ids_of_a_padded_vocabulary_do_no_harm(policy):
    policy = policy.frozen_copy()
    policy.hf.resize_token_embeddings(len(policy.tokenizer) + 60)
    policy = Policy(policy.hf, policy.tokenizer, policy.image_processor, policy.env_config)
    last = policy.head.out_features - 1
    assert not policy.can_close_tag[last]
    said = [*policy.tokenizer.encode("a"), last, *policy.tokenizer.encode("</video_zoom>")]
    e = Episode(encode(policy, [Message("user", ["x"])]), said[:2], [0.0] * 2)
    assert not e.turn_is_over(policy)
    e.turn_ids, e.turn_log_probs = said, [0.0] * len(said)
    assert e.turn_is_over(policy) and e.end_turn(policy) == "a</video_zoom>"
    encode(policy, [Message("assistant", [Sampled([last], [0.0])])], e.dialogue)


# ------------------------------------------------------------------------------------------------------ saves
def one_value(folder):
    """The value that all weights of a checkpoint have."""
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    values = {v for p in load_policy(folder).parameters() for v in p.unique().tolist()}
    assert len(values) == 1 and values == {v for p in hf.parameters() for v in p.unique().tolist()}
    return values.pop()


def fill(policy, value):
    with torch.no_grad():
        for p in policy.parameters():
            p.fill_(value)
    return policy


def kill_saves(root, delays_s, program=SAVE_FOREVER):
    """Kills a save at so many seconds after the first checkpoint stood, in a folder of its own each time.

    Yields (folder, number of the last save that was reported)."""
    folders = [Path(root) / f"killed{number}" for number in range(len(delays_s))]
    command = [sys.executable, "-c", program, ROOT, ROOT / "tests", *folders]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        for folder, delay_s in zip(folders, delays_s):
            child, reported = int(process.stdout.readline()), process.stdout.readline()
            time.sleep(delay_s)
            os.kill(child, signal.SIGKILL)
            while (line := process.stdout.readline()) != "dead\n":
                reported = line
            yield folder, int(reported)


def test_a_killed_save_leaves_a_whole_checkpoint(tmp_path):
    rng = random.Random()
    for folder, reported in kill_saves(tmp_path, [rng.uniform(0.05, 1) for _ in range(2)]):
        assert one_value(folder) in (reported, reported + 1)
        save_policy(fill(small_policy(), 0.5), folder)
        assert one_value(folder) == 0.5
        assert not list(folder.glob("*.tmp")) and len(list(folder.glob("*.safetensors"))) == 1


class Stop(BaseException):
    """Ends a save between two of its steps, as a kill does: nothing of it is cleaned up."""


@pytest.mark.parametrize("before", ["new", "model.safetensors", "bin", "both"])
def test_every_step_of_a_save_leaves_a_whole_checkpoint(tmp_path, monkeypatch, before):
    """Over what an earlier version or another program wrote, too."""
    old, new = fill(small_policy(), 1.0), fill(small_policy(), 2.0)
    start = tmp_path / "start"
    save_policy(old, start)
    (start / "metrics.jsonl").write_text("mine")
    (start / "other.safetensors").write_text("mine")
    if before == "model.safetensors":
        as_one_file(start)
    elif before == "bin":
        as_bin(start)
    elif before == "both":
        old.hf.save_pretrained(start)
    steps, values = 0, []
    while True:
        folder = tmp_path / f"after{steps}"
        shutil.copytree(start, folder)
        left = steps

        def step(original):
            def counted(*args, **kwargs):
                nonlocal left
                if left == 0:
                    raise Stop
                left -= 1
                return original(*args, **kwargs)
            return counted

        with monkeypatch.context() as patch:
            patch.setattr("os.replace", step(os.replace))
            patch.setattr("training.checkpoints.Path.unlink", step(Path.unlink))
            patch.setattr("training.checkpoints.shutil.rmtree", lambda *args, **kwargs: None)
            try:
                save_policy(new, folder)
                done = True
            except Stop:
                done = False
        values.append(one_value(folder))
        assert (folder / "metrics.jsonl").read_text() == (folder / "other.safetensors").read_text() == "mine"
        if done:
            break
        steps += 1
    assert steps >= 8 and values == sorted(values) and values[0] == 1.0 and values[-1] == 2.0
    save_policy(old, folder)
    assert one_value(folder) == 1.0 and not list(folder.glob("*.tmp")) and not list(folder.glob("*.bin"))
    assert len(list(folder.glob("model*.safetensors"))) == 1


def test_all_that_the_index_names_is_on_the_disk_before_it(tmp_path, monkeypatch):
    """Else a power cut could leave the new index and half of the new weights."""
    save_policy(fill(small_policy(), 1.0), tmp_path)
    on_disk, lacking, fsync, replace = set(), [], os.fsync, os.replace
    inode = lambda file: os.stat(file).st_ino

    def synced(descriptor):
        on_disk.add(os.fstat(descriptor).st_ino)
        return fsync(descriptor)

    def replaced(source, target):
        if Path(target).name == INDEX:
            new = [file for file in tmp_path.glob("*.safetensors") if file not in old]
            lacking.append([f for f in (source, tmp_path, *new) if inode(f) not in on_disk] if new else "all")
        on_disk.discard(inode(tmp_path))  # it holds another name now
        return replace(source, target)

    old = set(tmp_path.glob("*.safetensors"))
    monkeypatch.setattr("os.fsync", synced)
    monkeypatch.setattr("os.replace", replaced)
    save_policy(fill(small_policy(), 2.0), tmp_path)
    assert lacking == [[]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_a_save_is_of_the_compute_dtype_tied_or_not(tmp_path, dtype, tied):
    policy = small_policy().to(dtype)
    if not tied:
        policy.hf.config.tie_word_embeddings = policy.hf.config.text_config.tie_word_embeddings = False
        policy.hf.lm_head.weight = torch.nn.Parameter(policy.head.weight.detach() + 1)
    save_policy(policy, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    name = str(dtype).removeprefix("torch.")
    assert [part["dtype"] for part in (config, config["text_config"], config["vision_config"])] == [name] * 3
    index = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    assert ("lm_head.weight" in index) == (not tied)
    for loaded in (load_policy(tmp_path, dtype="auto").hf,
                   Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path, dtype="auto")):
        assert (loaded.lm_head.weight is loaded.model.language_model.embed_tokens.weight) == tied
        for (key, a), b in zip(policy.hf.state_dict().items(), loaded.state_dict().values(), strict=True):
            assert a.dtype == b.dtype == dtype and torch.equal(a, b), key


def test_many_shards(tmp_path, monkeypatch):
    policy = random_policy()
    monkeypatch.setattr(checkpoints, "EXPORT_BYTES", 500_000)
    for _ in range(2):
        save_policy(policy, tmp_path)
        names = {file.name for file in tmp_path.glob("*.safetensors")}
        index = json.loads((tmp_path / INDEX).read_text())
        assert len(names) > 3 and names == set(index["weight_map"].values())
    for a, b in zip(policy.hf.parameters(), load_policy(tmp_path).hf.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_full_disk_is_one_line_and_the_old_checkpoint_stays(tmp_path):
    save_policy(fill(small_policy(), 1.0), tmp_path)
    files = sorted(f.name for f in tmp_path.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (100, 60_000, 500_000):  # bytes a file: config.json, tokenizer.json, weights are larger
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(UserError) as raised:
                save_policy(fill(small_policy(), 2.0), tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert str(tmp_path) in str(raised.value) and "\n" not in str(raised.value)
        assert one_value(tmp_path) == 1.0 and sorted(f.name for f in tmp_path.iterdir()) == files


@pytest.mark.parametrize("refused", range(10))
def test_a_read_only_folder_is_one_line_and_the_old_checkpoint_stays(tmp_path, monkeypatch, refused):
    """Also one that turns read-only between two steps, as disks do that have an error."""
    save_policy(fill(small_policy(), 1.0), tmp_path)
    calls, replace = [], os.replace

    def read_only(*args):
        calls.append(args)
        if len(calls) > refused:
            raise OSError(30, "Read-only file system")
        return replace(*args)
    monkeypatch.setattr("os.replace", read_only)
    if refused == 9:  # it has 9 files
        return save_policy(fill(small_policy(), 2.0), tmp_path)
    with pytest.raises(UserError, match="Read-only file system") as raised:
        save_policy(fill(small_policy(), 2.0), tmp_path)
    assert "\n" not in str(raised.value)
    assert one_value(tmp_path) == 1.0


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "sub", "/proc/nothing"):
        with pytest.raises(UserError, match="cannot save"):
            save_policy(small_policy(), path)
    assert (tmp_path / "file").read_text() == "x"
