"""Checkpoints on disk: what is wrong with one that cannot be loaded, and saves that may be killed any time,
of a policy, and of a run that is to go on.

A folder is Hugging Face's format plus zoom_config.json. Its weights are in files whose names are used once,
and model.safetensors.index.json says which files they are. A save writes all of it beside the old checkpoint;
that the new index takes the old one's place is the commit; then the old weights go. So at every moment the
folder loads with the whole weights of one save, and a save takes the room of a second one. The small files
(config.json, tokenizer, zoom_config.json) come just before the index: a kill between them can leave new ones
beside old weights, which matters only where one run saves over another run's.
"""

import json
import os
import re
import secrets
import shutil
import zipfile
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import (AutoTokenizer, GenerationConfig, PreTrainedConfig,
                          Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessor)

from common import UserError, first_line, read_text
from model import Policy, PolicyError
from training.environment import find_env_config, load_env_config
from training.memory import out_of_memory

INDEX = "model.safetensors.index.json"
OBJECTS = ("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
           "tokenizer.json", "tokenizer_config.json", "zoom_config.json", INDEX,
           "pytorch_model.bin.index.json")
LFS = b"version https://git-lfs"
AGAIN = "download or copy it again"
EXPORT_BYTES = int(2e9)  # of a file of the exported weights, which is made in memory


# -------------------------------------------------------------------------------------------------- load
@contextmanager
def loading(name):
    """What goes wrong in it, but for memory that runs out, is a PolicyError: one line that names the
    checkpoint."""
    try:
        yield
    except BaseException as error:  # the tokenizers' Rust code raises what is no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)) or out_of_memory(error):
            raise
        reason = error if isinstance(error, UserError) else f"{first_line(error)}; {AGAIN}"
        raise PolicyError(f"cannot load {name}: {reason}") from None


def load_policy(name_or_path, device="cpu", dtype=torch.float32, env_config=None, read=None):
    """Loads a Qwen2.5-VL checkpoint by its name on the Hugging Face hub or its folder.

    env_config: what a run plays, see `run_environment`; by default what the checkpoint was trained with.
    `read` makes the parts otherwise (scale/sharding.py). Raises PolicyError, whatever is wrong with it."""
    with loading(name_or_path):
        policy = Policy(*(read or read_checkpoint)(name_or_path, dtype, device))
        if fault := parts_fault(policy):
            raise PolicyError(fault)
    if env_config:
        policy.env_config = replace(env_config, frame_unit=policy.frame_unit)
    return policy


def read_checkpoint(name_or_path, dtype, device):
    """What a Policy is made of: transformers' model, tokenizer, image processor, settings of the environment.

    `name_or_path` is a folder or a name on the Hugging Face hub. Raises what is wrong, mostly UserError."""
    check_checkpoint(name_or_path)
    hf, loaded = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        name_or_path, dtype=dtype, attn_implementation="sdpa", output_loading_info=True)
    if missing := sorted(loaded["missing_keys"]):
        raise UserError(f"it lacks the weights {', '.join(missing[:3])} ({len(missing)} in all); {AGAIN}")
    return hf.to(device).eval(), *read_parts(name_or_path)


def read_parts(name_or_path):
    """Tokenizer, image processor and settings of the environment."""
    return (AutoTokenizer.from_pretrained(name_or_path), Qwen2VLImageProcessor.from_pretrained(name_or_path),
            load_env_config(name_or_path))


def check_checkpoint(name_or_path):
    """Raises UserError for what can be seen to be wrong before it is loaded."""
    path = Path(name_or_path)
    find_env_config(name_or_path)  # raises where there is no such folder
    fault = folder_fault(path) if path.exists() else config_fault(PreTrainedConfig.get_config_dict(str(path))[0])
    if fault:
        raise UserError(fault)


def find_checkpoint(name_or_path):
    """The folder of a checkpoint, which is downloaded if it is a name on the hub."""
    check_checkpoint(name_or_path)
    path = Path(name_or_path)
    if path.exists():
        return path
    return Path(snapshot_download(str(name_or_path), ignore_patterns=["*.bin", "*.pth"]))


def folder_fault(path):
    """Why the folder `path` cannot be loaded as a checkpoint, and what to do; None if nothing is seen."""
    if (path / "adapter_config.json").is_file():
        return "it is an adapter; merge it into its base model (peft: merge_and_unload) and name the result"
    if not (path / "config.json").is_file():
        return "it is not a checkpoint folder (it has no config.json)"
    for name in OBJECTS:
        if (path / name).is_file() and (fault := object_fault(path / name)):
            return fault
    if fault := config_fault(json.loads(read_text(path / "config.json"))):
        return fault
    either = ("preprocessor_config.json", "processor_config.json"), ("tokenizer.json", "vocab.json")
    for name, other in either:
        if not (path / name).is_file() and not (path / other).is_file():
            return f"it has no {name}; copy that file from the model that it was made from"
    return weights_fault(path)


def object_fault(file):
    """Why a file cannot be used that has to hold a JSON object, or None."""
    with open(file, "rb") as opened:
        if opened.read(len(LFS)) == LFS:
            return f"{file.name} is a Git LFS pointer, not the file; run git lfs pull in its folder"
    try:
        kind = type(json.loads(read_text(file)))
    except (UserError, ValueError, RecursionError):
        return f"{file.name} is not JSON; {AGAIN}"
    return None if kind is dict else f"{file.name} is not a JSON object; {AGAIN}"


def config_fault(config):
    """Why a checkpoint cannot be used, by its config.json, or None."""
    if (kind := config.get("model_type")) != "qwen2_5_vl":
        return f"it holds a model of type {kind}, not qwen2_5_vl; name a Qwen2.5-VL checkpoint"
    for part in (config, config.get("text_config")):
        for key in ("quantization_config", "compression_config"):
            if isinstance(part, dict) and part.get(key):
                how = part[key].get("quant_method") if isinstance(part[key], dict) else None
                return f"it is quantised ({how or key}), which cannot be trained; name the unquantised one"


def weights_fault(path):
    """Why weights cannot be used, or None: of the files that transformers would read, in its order."""
    names = None
    for name in ("model.safetensors", INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json"):
        if (path / name).is_file():
            names = [name]
            if name.endswith("index.json"):
                names = json.loads(read_text(path / name)).get("weight_map")
                names = set(names.values()) if isinstance(names, dict) else set()
                if not names or not all(isinstance(n, str) for n in names):
                    return f"{name} names no weight files; {AGAIN}"
                names = sorted(names)
            break
    if names is None:
        return "it has no weights (model.safetensors or model.safetensors.index.json)"
    for name in names:
        file = path / name
        if not file.is_file():
            return f"its weight file {name} is missing; {AGAIN}"
        with open(file, "rb") as opened:
            if opened.read(len(LFS)) == LFS:
                return f"{name} is a Git LFS pointer, not the weights; run git lfs pull in its folder"
        try:
            if name.endswith(".safetensors"):
                with safe_open(file, "pt"):  # reads the header, which says how long the file is
                    pass
            else:
                torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        except Exception as error:
            return f"{name} is cut off or no weight file ({first_line(error)}); {AGAIN}"


def parts_fault(policy):
    """The same of a policy that was just loaded: weights are looked at, tokenizer and image processor do
    their work once."""
    unit, vision = policy.frame_unit, policy.visual.config
    if not policy.tokenizer.encode("<answer>\n", add_special_tokens=False, split_special_tokens=True):
        return f"its tokenizer makes no tokens of a text; {AGAIN}"
    weights = [(name, weight) for name, weight in policy.hf.named_parameters() if not weight.is_meta]
    if bad := [name for name, weight in weights if not weight.isfinite().all()]:
        return f"its weights {', '.join(bad[:3])} are not finite ({len(bad)} in all); {AGAIN}"
    try:
        frame = torch.zeros(3, unit, unit, dtype=torch.uint8)
        pixels = policy.image_processor([frame], do_resize=False, return_tensors="pt")["pixel_values"]
        patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size ** 2
        fits = pixels.shape == (vision.spatial_merge_size ** 2, patch) and pixels.isfinite().all()
        for colours in (policy.image_processor.image_mean, policy.image_processor.image_std):
            fits = fits and len(colours) == vision.in_channels  # a single one would be taken for all
    except Exception as error:
        return f"its preprocessor_config.json cannot be used ({first_line(error)}); {AGAIN}"
    return None if fits else f"its preprocessor_config.json does not fit config.json; {AGAIN}"


# -------------------------------------------------------------------------------------------------- save
def save_policy(policy, path):
    """Writes a checkpoint into the folder `path`, in the compute dtype; other files there stay. Raises
    UserError, and then the old weights are as they were.

    A model.safetensors would be read before the index: where there is one, its removal is the commit."""
    path, mark = Path(path), secrets.token_hex(4)
    temporary, written = path / f"saving-{mark}.tmp", []
    try:
        path.mkdir(parents=True, exist_ok=True)
        sweep(path)
        temporary.mkdir()
        write_checkpoint(policy, temporary, mark)
        for file in temporary.iterdir():
            sync(file)
        # weights first, which nothing names yet, the index last
        for file in sorted(temporary.iterdir(), key=lambda f: (f.name == INDEX, f.suffix != ".safetensors")):
            if file.suffix == ".safetensors":
                written.append(path / file.name)
            if file.name == INDEX:
                sync(path)
            os.replace(file, path / file.name)
        written = []
        sync(path)
        (path / "model.safetensors").unlink(missing_ok=True)
        if (path / "adapter_config.json").exists():  # else the folder would be read as an adapter
            os.replace(path / "adapter_config.json", path / "adapter_config.json.old")
        sync(path)
        sweep(path)
    except Exception as error:
        for file in written:
            file.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"cannot save {path}: {reason}; make room, or choose another --out") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_checkpoint(policy, folder, mark):
    """All files of a checkpoint; its weight files have `mark` in their names."""
    hf, generation = policy.hf, policy.hf.generation_config
    try:
        hf.generation_config = GenerationConfig()  # save_pretrained refuses some that are published
        hf.save_pretrained(folder, max_shard_size=EXPORT_BYTES)
    finally:
        hf.generation_config = generation
    generation.to_json_file(folder / "generation_config.json")
    policy.tokenizer.save_pretrained(folder)
    policy.image_processor.save_pretrained(folder)
    settings = json.dumps(asdict(policy.env_config), indent=1)
    (folder / "zoom_config.json").write_text(settings, encoding="utf-8")
    config = json.loads(read_text(folder / "config.json"))
    for part in (config, config.get("text_config"), config.get("vision_config")):
        if part:
            part["dtype"] = str(policy.dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    weight_map, size = {}, 0
    for number, file in enumerate(sorted(folder.glob("*.safetensors")), 1):
        name = f"model-{mark}-{number:05d}.safetensors"
        with safe_open(file, "pt") as weights:
            weight_map |= {key: name for key in weights.keys()}
        size += file.stat().st_size
        file.rename(folder / name)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True), encoding="utf-8")


def sweep(path):
    """Removes what a killed save left, and weights that a newer checkpoint has replaced."""
    for folder in path.glob("saving*.tmp"):
        shutil.rmtree(folder, ignore_errors=True)
    if (path / "model.safetensors").is_file() or not (path / INDEX).is_file() or weights_fault(path):
        return  # the index is not what counts
    kept = set(json.loads(read_text(path / INDEX))["weight_map"].values())
    for file in path.iterdir():
        ours = re.fullmatch(r"model-[\w-]+\.safetensors|pytorch_model.*\.bin(\.index\.json)?", file.name)
        if ours and file.name not in kept:
            file.unlink(missing_ok=True)


def sync(path):
    """Waits until a file, or which names a folder holds, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
