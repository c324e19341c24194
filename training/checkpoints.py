"""Checkpoints of a policy: loading, what is wrong with one that cannot be loaded, and saving.

A checkpoint is a folder in Hugging Face's format plus zoom_config.json. A save writes its weights into files
whose names are used once; model.safetensors.index.json says which files they are. That the new index takes
the old one's place is the commit (training/safe_files.py); then the old weights go. So at every moment the
folder loads with the whole weights of one save, and a save takes the room of a second checkpoint. The small
files (config.json, tokenizer, zoom_config.json) move just before the index: a kill between them can leave
new ones beside old weights, which matters only where one run saves over another's.
"""

import json
import re
import secrets
import zipfile
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import (AutoTokenizer, GenerationConfig, PreTrainedConfig,
                          Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessor)

from common import UserError, first_line, read_text, write_json
from model import Policy, PolicyError
from training.environment import find_env_config, load_env_config
from training.memory import out_of_memory
from training.safe_files import (commit_files, make_temporary, reason_of, remove_leftovers, set_mode, sync,
                                 temporary_of)

INDEX = "model.safetensors.index.json"
# the files that hold a JSON object
OBJECTS = ("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
           "tokenizer.json", "tokenizer_config.json", "zoom_config.json", INDEX,
           "pytorch_model.bin.index.json")
LFS = b"version https://git-lfs"  # how a file begins that Git LFS has not fetched
AGAIN = "download or copy it again"
EXPORT_BYTES = int(2e9)  # of a file of saved weights, which is made in memory


# ------------------------------------------------------------------------------------------------------- load
@contextmanager
def loading(name):
    """A context in which what goes wrong, but for memory that runs out, is a PolicyError: one line that names
    the checkpoint."""
    try:
        yield
        return
    except (KeyboardInterrupt, SystemExit):
        raise
    except UserError as error:
        reason = str(error).removeprefix(f"cannot load {name}: ")
    except BaseException as error:  # the tokenizers' Rust code raises what is no Exception
        if out_of_memory(error):
            raise
        reason = f"{first_line(error)}; {AGAIN}"
    raise PolicyError(f"cannot load {name}: {reason}")


def load_policy(name, device="cpu", dtype=torch.float32, env_config=None, read=None):
    """Loads a Qwen2.5-VL checkpoint.

    Args:
        name: a folder, or a name on the Hugging Face hub. dtype: of all weights; "auto": as they are saved.
        env_config: what a run plays, see `run_environment`; by default what the checkpoint was trained with.
        read: makes the parts in another way than `read_checkpoint` (scale/sharding.py).
    Raises PolicyError, whatever is wrong with it."""
    with loading(name):
        policy = Policy(*(read or read_checkpoint)(name, dtype, device))
        if fault := parts_fault(policy):
            raise UserError(fault)
    if env_config:
        policy.env_config = replace(env_config, frame_unit=policy.frame_unit)
    return policy


def read_checkpoint(name, dtype, device):
    """What a Policy is made of: transformers' model, tokenizer, image processor, settings of the environment.

    `name` is a folder or a name on the hub. Raises UserError, or what transformers raises."""
    check_checkpoint(name)
    hf, loaded = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        name, dtype=dtype, attn_implementation="sdpa", output_loading_info=True)
    if missing := sorted(loaded["missing_keys"]):
        raise UserError(f"it lacks the weights {', '.join(missing[:3])} ({len(missing)} in all); {AGAIN}")
    return hf.to(device).eval(), *read_parts(name)


def read_parts(name):
    """Tokenizer, image processor and settings of the environment."""
    return (AutoTokenizer.from_pretrained(name), Qwen2VLImageProcessor.from_pretrained(name),
            load_env_config(name))


def check_checkpoint(name):
    """Raises UserError for what can be seen to be wrong before it is loaded."""
    find_env_config(name)  # raises where there is no such folder
    path = Path(name)
    if path.exists():
        fault = folder_fault(path)
    else:
        fault = config_fault(PreTrainedConfig.get_config_dict(str(name))[0])
    if fault:
        raise UserError(fault)


def find_checkpoint(name):
    """The folder of a checkpoint, which is downloaded if `name` is one on the hub. Raises UserError."""
    check_checkpoint(name)
    path = Path(name)
    if path.exists():
        return path
    return Path(snapshot_download(str(name), ignore_patterns=["*.bin", "*.pth"]))


# ---------------------------------------------------------------------------------------------- what is wrong
# Each function returns why something cannot be used, and what to do; or None, if nothing is seen.
def folder_fault(path):
    """Of a folder."""
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
    """Of a file that has to hold a JSON object."""
    if fault := lfs_fault(file):
        return fault
    try:
        value = json.loads(read_text(file))
    except (UserError, ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        return f"{file.name} is not a JSON object; {AGAIN}"


def lfs_fault(file):
    """Of a file that Git LFS may not have fetched."""
    with open(file, "rb") as opened:
        if opened.read(len(LFS)) == LFS:
            return f"{file.name} is a Git LFS pointer, not the file; run git lfs pull in its folder"


def config_fault(config):
    """Of the content of a config.json."""
    if (kind := config.get("model_type")) != "qwen2_5_vl":
        return f"it holds a model of type {kind}, not qwen2_5_vl; name a Qwen2.5-VL checkpoint"
    for part in (config, config.get("text_config")):
        for key in ("quantization_config", "compression_config"):
            if isinstance(part, dict) and part.get(key):
                how = part[key].get("quant_method") if isinstance(part[key], dict) else None
                return f"it is quantised ({how or key}), which cannot be trained; name the unquantised one"


def weights_fault(path):
    """Of a folder's weight files."""
    try:
        names = weight_files(path)
    except UserError as error:
        return str(error)
    for name in names:
        file = path / name
        if not file.is_file():
            return f"its weight file {name} is missing; {AGAIN}"
        if fault := lfs_fault(file):
            return fault
        try:
            if name.endswith(".safetensors"):
                with safe_open(file, "pt"):  # reads the header, which says how long the file is
                    pass
            else:
                torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        except Exception as error:
            return f"{name} is cut off or no weight file ({first_line(error)}); {AGAIN}"


def weight_files(path):
    """The names of the weight files in a folder that transformers would read. Raises UserError."""
    for name in ("model.safetensors", INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json"):
        if not (path / name).is_file():
            continue
        if not name.endswith("index.json"):
            return [name]
        try:
            files = json.loads(read_text(path / name))["weight_map"].values()
            names = sorted({str(Path(file)) for file in files})
        except (ValueError, LookupError, TypeError, AttributeError):
            names = []
        if not names:
            raise UserError(f"{name} names no weight files; {AGAIN}")
        return names
    raise UserError(f"it has no weights (model.safetensors or {INDEX})")


def parts_fault(policy):
    """Of a policy that was loaded: its weights are looked at, and its tokenizer and image processor do their
    work once."""
    unit, vision, pictures = policy.frame_unit, policy.visual.config, policy.image_processor
    if not policy.tokenizer.encode("<answer>\n", add_special_tokens=False, split_special_tokens=True):
        return f"its tokenizer makes no tokens of a text; {AGAIN}"
    bad = [name for name, weight in policy.hf.named_parameters()
           if not weight.is_meta and not weight.isfinite().all()]
    if bad:
        return f"its weights {', '.join(bad[:3])} are not finite ({len(bad)} in all); {AGAIN}"
    try:
        frame = torch.zeros(3, unit, unit, dtype=torch.uint8)
        pixels = pictures([frame], do_resize=False, return_tensors="pt")["pixel_values"]
        # a single number would be taken for all colours
        theirs = (pictures.patch_size, pictures.merge_size, pictures.temporal_patch_size,
                  len(pictures.image_mean), len(pictures.image_std))
    except Exception as error:
        return f"its preprocessor_config.json cannot be used ({first_line(error)}); {AGAIN}"
    needed = (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size,
              vision.in_channels, vision.in_channels)
    if theirs != needed or not pixels.isfinite().all():
        return f"its preprocessor_config.json does not fit config.json; {AGAIN}"


# ------------------------------------------------------------------------------------------------------- save
def save_policy(policy, path):
    """Writes a checkpoint into the folder `path`, in the policy's dtype; other files there stay. Raises
    UserError, and then the old weights are as they were.

    transformers reads a model.safetensors rather than the index: where there is one, its removal is the
    commit."""
    path = Path(path)
    temporary = temporary_of(path / "checkpoint")
    try:
        make_temporary(temporary)
        remove_old_weights(path)
        write_checkpoint(policy, temporary)
        for file in temporary.iterdir():
            sync(file)
        commit_files(temporary, last=INDEX)
        (path / "model.safetensors").unlink(missing_ok=True)
        sync(path)
        remove_old_weights(path)
    except Exception as error:
        reason = reason_of(error)
        raise UserError(f"cannot save {path}: {reason}; make room, or choose another --out") from error
    finally:
        remove_leftovers(path)


def write_checkpoint(policy, folder):
    """Writes all files of a checkpoint into an empty folder."""
    hf, generation = policy.hf, policy.hf.generation_config
    for config in (hf.config, hf.config.text_config, hf.config.vision_config):
        config.dtype = policy.dtype
    try:
        hf.generation_config = GenerationConfig()  # save_pretrained refuses some that are published
        hf.save_pretrained(folder, max_shard_size=EXPORT_BYTES)
    finally:
        hf.generation_config = generation
    generation.to_json_file(folder / "generation_config.json")
    policy.tokenizer.save_pretrained(folder)
    policy.image_processor.save_pretrained(folder)
    write_json(folder / "zoom_config.json", asdict(policy.env_config))
    # the weight files get names that no other save has, and the index names them
    mark, weight_map, size = secrets.token_hex(4), {}, 0
    for file in sorted(folder.glob("model*.safetensors")):
        named = file.rename(folder / file.name.replace("model", f"model-{mark}"))
        set_mode(named)
        with safe_open(named, "pt") as weights:
            weight_map |= dict.fromkeys(weights.keys(), named.name)
        size += named.stat().st_size
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


def remove_old_weights(path):
    """Removes weight files that the index does not name: those before a newer save, those of a killed one."""
    if (path / "model.safetensors").is_file() or not (path / INDEX).is_file() or weights_fault(path):
        return  # the index is not what is read
    kept = weight_files(path)
    for file in path.iterdir():
        ours = re.fullmatch(r"model-[\w-]+\.safetensors|pytorch_model.*\.bin(\.index\.json)?", file.name)
        if ours and file.name not in kept:
            file.unlink(missing_ok=True)
