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
import time
import zipfile
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import (AutoTokenizer, GenerationConfig, PreTrainedConfig,
                          Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessor)
from transformers.utils import cached_file

from common import UserError, gather, read_text
from model import PolicyError
from zoom_env import EnvConfig

INDEX = "model.safetensors.index.json"
OBJECTS = ("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
           "tokenizer.json", "tokenizer_config.json", "zoom_config.json", INDEX,
           "pytorch_model.bin.index.json")
LFS = b"version https://git-lfs"
AGAIN = "download or copy it again"
FILE_BYTES = 256e6  # of tensors in a file of a run's checkpoint
EXPORT_BYTES = int(2e9)  # of a file of the exported weights, which is made in memory


# -------------------------------------------------------------------------------------------------- load
@contextmanager
def loading(name):
    """What goes wrong in it is a PolicyError: one line that names the checkpoint."""
    try:
        yield
    except BaseException as error:  # the tokenizers' Rust code raises what is no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        reason = error if isinstance(error, UserError) else f"{first_line(error)}; {AGAIN}"
        raise PolicyError(f"cannot load {name}: {reason}") from None


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
    path, name = Path(name_or_path), str(name_or_path)
    if not path.exists() and (name.startswith((".", "/", "~", "runs/")) or "/" not in name):
        raise UserError("there is no checkpoint folder of that name")
    fault = folder_fault(path) if path.exists() else config_fault(PreTrainedConfig.get_config_dict(name)[0])
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


def find_env_config(name_or_path):
    """The path of a checkpoint's zoom_config.json, fetched where it is a name on the hub, or None."""
    path = Path(name_or_path)
    if path.is_dir():
        return path / "zoom_config.json" if (path / "zoom_config.json").is_file() else None
    found = cached_file(str(name_or_path), "zoom_config.json", _raise_exceptions_for_missing_entries=False,
                        _raise_exceptions_for_connection_errors=False)
    return found and Path(found)


def load_env_config(name_or_path):
    """The environment settings of a checkpoint, else the paper's. Raises UserError."""
    from sources.protocols import PROTOCOLS  # which settings name
    if not (path := find_env_config(name_or_path)):
        return EnvConfig()
    settings = json.loads(read_text(path))
    try:
        for f in fields(EnvConfig):
            value = settings.get(f.name, getattr(EnvConfig(), f.name))
            fits = isinstance(value, (int, float) if f.type is float else f.type)
            if not fits or isinstance(value, bool) or value in (float("inf"), -float("inf")):
                raise ValueError(f"{f.name} must be a finite {f.type.__name__}, not {value!r}"[:200])
        if settings.get("protocol", "videozoomer") not in PROTOCOLS:
            raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}")
        return EnvConfig(**settings)
    except (TypeError, ValueError) as error:
        raise UserError(f"zoom_config.json: {first_line(error)}; correct it or remove it") from None


def first_line(error):
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


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


# ----------------------------------------------------------------------------- checkpoints of a run, to go on
class Shard(NamedTuple):
    """Rows of a tensor that one process writes: rows `start` .. of a tensor of `shape`."""

    name: str
    rows: torch.Tensor
    start: int
    shape: tuple


def save_run(out, step, shards, state, rank_state, keep):
    """Writes out/checkpoints/step_N, from which a run can go on with any number of processes. All of them
    call it. What stands there is safetensors and JSON; nothing is ever unpickled.

    Args:
        shards: Shards, made one at a time; of all processes together each row once.
        state: a dict for JSON, the first process's counts. rank_state: the same, of each process.
        keep: how many checkpoints stay, the newest.
    Returns the seconds it took. Its commit is that the folder gets its name, so a kill at any moment leaves
    the last one whole; one of the same step stays as it is, as no folder can take the place of another at
    once. Raises UserError, on all processes, if one of them cannot write."""
    began = time.time()
    rank, folder = (dist.get_rank() if dist.is_initialized() else 0), Path(out) / "checkpoints"
    temporary, target = folder / f"step_{step}.tmp", folder / f"step_{step}"
    parts, error = [], None
    try:
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob("*.tmp"):
                shutil.rmtree(left, ignore_errors=True)
            temporary.mkdir()
    except OSError as failed:
        error = failed.strerror or first_line(failed)
    agree(error, target)
    # each process its rows
    try:
        for number, group in enumerate(grouped(shards), 1):
            file = temporary / f"rank{rank}-{number:05d}.safetensors"
            save_file({f"{i}": shard.rows for i, shard in enumerate(group)}, file)
            sync(file)
            parts += [(shard.name, list(shard.shape), file.name, f"{i}", shard.start, len(shard.rows))
                      for i, shard in enumerate(group)]
            group.clear()  # enumerate holds it while the next one is made
    except Exception as failed:  # safetensors has errors of its own
        error = getattr(failed, "strerror", None) or first_line(failed)
    agree(error, target)
    parts, rank_states = gather(parts), gather([rank_state])
    # the first one says what stands where, and gives the folder its name
    try:
        if rank == 0:
            tensors = {}
            for name, shape, *part in parts:
                tensors.setdefault(name, {"shape": shape, "parts": []})["parts"].append(part)
            index = {"step": step, "state": state, "rank_states": rank_states, "tensors": tensors}
            (temporary / "checkpoint.json").write_text(json.dumps(index), encoding="utf-8")
            sync(temporary / "checkpoint.json")
            sync(temporary)
            if not target.is_dir():
                os.replace(temporary, target)
            sync(folder)
            for old in run_folders(out)[:-keep]:
                os.replace(old, old.with_suffix(".tmp"))  # half of it never stands under its name
            for left in folder.glob("*.tmp"):
                shutil.rmtree(left, ignore_errors=True)  # the next save tries again
    except OSError as failed:
        error = failed.strerror or first_line(failed)
    agree(error, target)
    return time.time() - began


def grouped(shards):
    """Lists of shards, on the CPU, of at most FILE_BYTES or one: a file is made in memory before it is
    written. A larger shard is cut into several. Tensors without rows are left out."""
    group, size = [], 0
    for name, rows, start, shape in shards:
        most = max(1, int(FILE_BYTES // max(1, rows[:1].nbytes)))  # rows in a file
        for first in range(0, len(rows), most):
            part = rows[first:first + most].detach()
            if group and size + part.nbytes > FILE_BYTES:
                yield group
                group, size = [], 0
            part = part.cpu().contiguous()  # a file at a time
            group.append(Shard(name, part, start + first, shape))
            size += part.nbytes
    if group:
        yield group


def agree(error, target):
    """Raises UserError on all processes if one of them has an error. Only the first one removes what is half
    written: a late one could delete the next save's folder."""
    errors = gather([error] if error else [])
    if errors:
        if not dist.is_initialized() or dist.get_rank() == 0:
            shutil.rmtree(target.with_suffix(".tmp"), ignore_errors=True)
        last = run_folders(target.parents[1])
        stays = f"{last[-1].name} stays, from which the run can go on" if last else "there is no earlier one"
        raise UserError(f"cannot save {target}: {errors[0]}; {stays}; make room and start again")


def run_folders(out):
    """The checkpoints of a run, the newest last."""
    number = lambda path: int(path.name.removeprefix("step_"))
    return sorted((path for path in (Path(out) / "checkpoints").glob("step_*")
                   if re.fullmatch(r"step_\d+", path.name)), key=number)


class SavedRun:
    """A checkpoint of a run: `step`, `state` and `rank_states` as they were given, and rows of tensors."""

    def __init__(self, folder):
        self.folder, self.files = Path(folder), {}
        with self._reading():
            index = json.loads(read_text(self.folder / "checkpoint.json"))
            self.step, self.state, self.rank_states = index["step"], index["state"], index["rank_states"]
            self.tensors = index["tensors"]

    @contextmanager
    def _reading(self):
        try:
            yield
        except Exception as error:  # safetensors has errors of its own
            reason = error if isinstance(error, UserError) else first_line(error)
            raise UserError(f"{self.folder} cannot be read: {reason}; remove that folder, and the run goes "
                            "on from the one before") from None

    def read_into(self, name, rows, start, shape):
        """Fills `rows` with rows `start` .. of a tensor. Raises UserError if it is not there, or another."""
        with self._reading():
            if name not in self.tensors:
                raise UserError(f"it has no {name}")
            saved, at = self.tensors[name], start
            if saved["shape"] != list(shape):
                raise UserError(f"{name} has shape {saved['shape']}, not {list(shape)}")
            for file, key, first, length in sorted(saved["parts"], key=lambda part: part[2]):
                low, high = max(first, start), min(first + length, start + len(rows))
                if low == at < high:
                    target = rows[low - start:high - start]
                    part = self._read(file, key, low - first, high - first)
                    if (part.shape, part.dtype) != (target.shape, target.dtype):
                        raise UserError(f"rows of {name} are {part.dtype} {list(part.shape)} in {file}, not "
                                        f"{target.dtype} {list(target.shape)}")
                    target.copy_(part)
                    at = high
            if at < start + len(rows):
                raise UserError(f"row {at} of {name} is missing")

    def _read(self, file, key, start, stop):
        try:
            if file not in self.files:
                self.files[file] = safe_open(self.folder / file, "pt")
            return self.files[file].get_slice(key)[start:stop]
        except Exception as error:
            raise UserError(f"{file}: {first_line(error)}") from None
