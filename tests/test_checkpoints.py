"""Checkpoints of policies: each fault is one line, end tokens end a turn, a save replaces any other."""

import json
import random
import shutil

import pytest
import torch
from test_safe_files import Stop, end_at_each_call, fill, one_value, small_policy
from tiny import DEVICE, full_copy, random_policy
from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration

from model import Policy, PolicyError, Sampled, encode
from rollout import Episode
from training import checkpoints
from training.checkpoints import INDEX, load_policy, save_policy
from zoom_env import Message, ZoomEnv

JSONS = ["config.json", "zoom_config.json", "tokenizer.json", "preprocessor_config.json",
         "generation_config.json"]
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 3\n"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_policy(random_policy(layers=1), folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of a small checkpoint, for a fault."""
    shutil.copytree(saved, tmp_path / "model")
    return tmp_path / "model"


def weight_file(folder):
    return next(folder.glob("model-*.safetensors"))


def changed(file, **changes):
    """The content of a JSON file with other values."""
    return json.dumps(json.loads(file.read_text()) | changes).encode()


def refusal(folder):
    """The one line with which a checkpoint is refused; it names the folder."""
    with pytest.raises(PolicyError) as raised:
        load_policy(folder)
    line = str(raised.value)
    assert "\n" not in line and line.startswith(f"cannot load {folder}: ") and len(line) < 600
    assert line.count("cannot load") == 1
    return line


def not_refused(cases):
    """Of cases (file, its content or None, what the line says) those that are not refused so."""
    wrong = []
    for file, content, says in cases:
        before = file.read_bytes()
        file.unlink()
        if content is not None:
            file.write_bytes(content)
        try:
            line = refusal(file.parent)
        except BaseException as error:
            line = repr(error)
        file.write_bytes(before)
        if not line.startswith("cannot load") or says not in line:
            wrong.append((file.name, content and content[:200], line))
    return wrong


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


@pytest.mark.parametrize("form", [weight_file, pytest.param(as_one_file, marks=pytest.mark.slow),
                                  pytest.param(as_bin, marks=pytest.mark.slow)])
def test_weights_that_are_none(folder, form):
    file = form(folder)
    load_policy(folder)
    whole = file.read_bytes()
    contents = [whole[:-1000], whole[:4], b"", random.Random(0).randbytes(5000), b"<!DOC"]
    assert not_refused([(file, LFS.encode(), "git lfs pull"), (file, None, "weight"),
                        *((file, content, f"{file.name} is cut off") for content in contents)]) == []


@pytest.mark.device
def test_weights_that_are_not_finite_are_named(folder, policy):
    """Else an evaluation says that nothing is right, and sampling fails."""
    policy = full_copy(policy)
    policy.language_model.layers[0].mlp.up_proj.weight[1, 2] = float("nan")
    policy.language_model.layers[1].mlp.up_proj.weight[1, 2] = float("-inf")
    save_policy(policy, folder)
    line = refusal(folder)
    assert "layers.0.mlp.up_proj.weight, " in line
    assert "layers.1.mlp.up_proj.weight are not finite (2 in all)" in line


def test_a_tokenizer_may_be_smaller_than_the_embedding_but_not_larger(folder, policy):
    tokenizer = load_policy(folder).tokenizer
    tokenizer.add_tokens(["<one more>"])
    tokenizer.save_pretrained(folder)
    line = refusal(folder)
    assert "tokenizer" in line and "embedding" in line
    padded = full_copy(policy)
    padded.hf.resize_token_embeddings(len(tokenizer) + 60)
    save_policy(padded, folder)
    assert load_policy(folder).head.out_features == len(tokenizer) + 60


def test_quantised_models_other_models_and_adapters(folder):
    config = folder / "config.json"
    quantised = [{name: {"quant_method": how, "bits": 4}}
                 for name in ("quantization_config", "compression_config")
                 for how in ("awq", "gptq", "bitsandbytes", "fp8", "compressed-tensors")]
    quantised += [{"text_config": json.loads(config.read_text())["text_config"] | part} for part in quantised]
    cases = [(config, changed(config, **part), "unquantised") for part in quantised]
    cases += [(config, changed(config, model_type=kind), str(kind))
              for kind in ("qwen2_vl", "qwen3_vl", "llama", None, 5, ["qwen2_5_vl"])]
    assert not_refused(cases) == []
    (folder / "adapter_config.json").write_text("{}")
    assert "adapter" in refusal(folder) and "merge" in refusal(folder)
    config.unlink()
    assert "adapter" in refusal(folder)


def test_files_that_are_missing_or_hold_something_else_are_named(folder):
    needed = ("config.json", "preprocessor_config.json", "tokenizer.json")
    cases = [(folder / name, None, name) for name in needed]
    contents = (LFS, "", "[1]", "null", "5", "{", "[" * 100_000, '"\ud800"')
    cases += [(folder / name, content.encode(errors="surrogatepass"), name)
              for name in (*JSONS, "tokenizer_config.json", INDEX) for content in contents]
    cases += [(folder / INDEX, json.dumps({"weight_map": names}).encode(), INDEX)
              for names in ({}, [], None, "x", {"a": 5}, {"a": None})]
    cases += [(folder / INDEX, b'{"weight_map": {"a": "other.safetensors"}}', "other.safetensors is missing")]
    assert not_refused(cases) == []


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
    ("image_std", [0, 0, 0]), ("image_mean", [1.0]), ("temporal_patch_size", 0), ("merge_size", 1))]
WRONG += [("generation_config.json", "eos_token_id", value) for value in (
    "2", [2, None], [[2]], {"a": 2}, 2.5, True)]
WRONG += [("tokenizer.json", key, value) for key, value in (
    ("model", 5), ("model", None), ("added_tokens", "x"), ("decoder", []),
    ("pre_tokenizer", {"type": "None"}))]


def test_wrong_types(folder):
    cases = [(folder / name, changed(folder / name, **{key: value}), "") for name, key, value in WRONG]
    assert not_refused(cases) == []


def test_a_tokenizer_without_a_special_token(saved, tmp_path):
    lines = {}
    for name in ("im_start", "im_end", "vision_start", "vision_end", "image_pad"):
        token, folder = f"<|{name}|>", tmp_path / name
        shutil.copytree(saved, folder)
        for file in (folder / "tokenizer.json", folder / "tokenizer_config.json"):
            file.write_text(file.read_text().replace(token, token.replace("|>", "_|>")))
        lines[token] = refusal(folder)
    assert [token for token, line in lines.items() if token not in line] == []


def test_names_that_are_no_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    for name in (tmp_path / "file", tmp_path / "nothing", "nothing", "./a\0b", "/" + "x" * 400):
        with pytest.raises(PolicyError) as raised:
            load_policy(name)
        assert str(raised.value).count(str(name)) == 1 and "\n" not in str(raised.value)


def test_only_stopping_the_program_escapes(folder, monkeypatch):
    class Panic(BaseException):
        """As Rust code raises it."""

    for error, seen in ((Panic("x\ny"), PolicyError), (MemoryError(), MemoryError),
                        (KeyboardInterrupt(), KeyboardInterrupt)):
        def fail(*args, error=error, **kwargs):
            raise error
        monkeypatch.setattr("training.checkpoints.AutoTokenizer.from_pretrained", fail)
        with pytest.raises(seen):
            load_policy(folder)


# ------------------------------------------------------------------------------------------------- end tokens
def test_all_end_tokens_of_the_checkpoint_end_a_turn(policy):
    for eos in (None, 5, [5, 7], 10_000_000):
        assert_end_tokens_end_a_turn(policy, eos)


def assert_end_tokens_end_a_turn(policy, eos):
    policy = full_copy(policy)
    policy.hf.generation_config = GenerationConfig(eos_token_id=eos)
    policy = Policy(policy.hf, policy.tokenizer, policy.image_processor, policy.env_config)
    endoftext = policy.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    also = eos if isinstance(eos, list) else [] if eos is None else [eos]
    assert policy.end_tokens == {policy.im_end, endoftext, *also}
    said = policy.tokenizer.encode("<answer>A</answer>")
    for end in (policy.im_end, endoftext, *(i for i in also if i < 100)):
        e = Episode(encode(policy, [Message("user", ["which?"])]), [*said, end], [0.0] * (len(said) + 1), env=ZoomEnv)
        before = len(e.dialogue.ids)
        assert e.turn_is_over(policy) and not Episode(e.dialogue, said, env=ZoomEnv).turn_is_over(policy)
        assert e.end_turn(policy) == "<answer>A</answer>" and not e.truncated
        newline = policy.tokenizer.encode("\n")
        after = newline if end == policy.im_end else [policy.im_end, *newline]
        assert e.dialogue.ids[before:] == [*said, end, *after]
        assert e.dialogue.trained[before:] == [True] * (len(said) + 1) + [False] * len(after)


def test_end_tokens_are_saved(folder):
    file = folder / "generation_config.json"
    file.write_bytes(changed(file, eos_token_id=[2, 33], temperature=1e-6, do_sample=False))
    policy = load_policy(folder)
    assert {2, 33} <= policy.end_tokens and policy.end_tokens == policy.frozen_copy().end_tokens
    save_policy(policy, folder)  # transformers refuses to write such settings
    assert load_policy(folder).end_tokens == policy.end_tokens


def test_ids_of_a_padded_vocabulary_do_no_harm(policy):
    policy = full_copy(policy)
    policy.hf.resize_token_embeddings(len(policy.tokenizer) + 60)
    policy = Policy(policy.hf, policy.tokenizer, policy.image_processor, policy.env_config)
    last = policy.head.out_features - 1
    assert not policy.can_close_tag[last]
    said = [*policy.tokenizer.encode("a"), last, *policy.tokenizer.encode("</video_zoom>")]
    e = Episode(encode(policy, [Message("user", ["x"])]), said[:2], [0.0] * 2, env=ZoomEnv)
    assert not e.turn_is_over(policy)
    e.turn_ids, e.turn_log_probs = said, [0.0] * len(said)
    assert e.turn_is_over(policy) and e.end_turn(policy) == "a</video_zoom>"
    encode(policy, [Message("assistant", [Sampled([last], [0.0])])], e.dialogue)


# ------------------------------------------------------------------------------------------------------ saves
def old_checkpoint(folder, form):
    """A checkpoint whose weights are all 1, as it, an earlier version or another program wrote it."""
    old = fill(random_policy(layers=1), 1.0)
    save_policy(old, folder)
    if form == "one file":
        as_one_file(folder)
    elif form == "bin":
        as_bin(folder)
    elif form == "one file and an index":
        old.hf.save_pretrained(folder)
    (folder / "other.safetensors").write_text("mine")


def transformers_value(folder):
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    values = {v for p in hf.parameters() for v in p.unique().tolist()}
    assert len(values) == 1
    return values.pop()


FORMS = "one file", "bin", "one file and an index"


@pytest.mark.device
def test_a_save_takes_the_place_of_any_checkpoint(tmp_path):
    for form in FORMS:
        folder = tmp_path / form
        old_checkpoint(folder, form)
        assert one_value(folder) == transformers_value(folder) == 1.0
        save_policy(fill(small_policy(), 2.0), folder)
        assert one_value(folder) == transformers_value(folder) == 2.0, form
        assert len(list(folder.glob("model*.safetensors"))) == 1 and not list(folder.glob("*.bin"))
        assert (folder / "other.safetensors").read_text() == "mine"


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_every_step_of_a_save_over_any_checkpoint_leaves_a_whole_one(tmp_path, form):
    old_checkpoint(tmp_path / "start", form)
    new = fill(small_policy(), 2.0)
    save = lambda folder: save_policy(new, folder)
    for folder, value in end_at_each_call(tmp_path / "start", Stop(), save, one_value):
        assert value == transformers_value(folder) and (folder / "other.safetensors").read_text() == "mine"


@pytest.mark.device
@pytest.mark.parametrize("dtype, tied", [(torch.float32, True), (torch.bfloat16, False)])
def test_a_save_is_of_the_compute_dtype_tied_or_not(tmp_path, dtype, tied):
    policy = random_policy(layers=1).to(dtype)
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
            assert a.dtype == b.dtype == dtype and torch.equal(a.cpu(), b), key


@pytest.mark.device
def test_many_shards(tmp_path, monkeypatch):
    policy = random_policy()
    monkeypatch.setattr(checkpoints, "EXPORT_BYTES", 500_000)
    for _ in range(2):
        save_policy(policy, tmp_path)
        names = {file.name for file in tmp_path.glob("*.safetensors")}
        index = json.loads((tmp_path / INDEX).read_text())
        assert len(names) > 3 and names == set(index["weight_map"].values())
    loaded = load_policy(tmp_path, device=DEVICE)
    for a, b in zip(policy.hf.parameters(), loaded.hf.parameters(), strict=True):
        assert torch.equal(a, b)
