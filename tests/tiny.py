"""What several tests play with: random policies of the demo's architecture, some of which say what ends a
turn, groups of episodes to train on, and the plain way to log-probabilities."""

import copy
import json
import os

import torch

import rl
from demo.synthetic import TINY_PROMPT, synthetic
from demo.tiny_base import make_tiny_model, make_tokenizer
from model import Policy, Sampled, encode, fill_features, token_log_probs
from rollout import Episode
from training.checkpoints import save_policy
from zoom_env import Message, ZoomEnv

DEVICE = torch.device(os.environ.get("TEST_DEVICE", "cpu"))  # pytest --device
torch.backends.cudnn.allow_tf32 = False  # float32 is float32; of products it is the default


def seeded(seed=1):
    """A generator for what is sampled on DEVICE."""
    return torch.Generator(DEVICE).manual_seed(seed)


def random_policy(seed=0, layers=None):
    """A policy on DEVICE. Nothing that is tested with it depends on what was learned."""
    torch.manual_seed(seed)
    texts = [TINY_PROMPT, "The blue scene is at <frame1_time12.04s>, up to <frame2_time20.00s>. A. red"] * 50
    policy = make_tiny_model(make_tokenizer(texts, vocab_size=400)).freeze_vision()
    policy.language_model.layers = policy.language_model.layers[:layers]
    text = policy.hf.config.text_config  # so that it can be saved and loaded
    text.num_hidden_layers, text.layer_types = len(policy.language_model.layers), text.layer_types[:layers]
    return policy.eval().to(DEVICE)


def full_copy(policy):
    """A policy of its own, without gradients: unlike `frozen_copy` with its own vision tower, which a test may
    change."""
    hf = copy.deepcopy(policy.hf).eval().requires_grad_(False)
    return Policy(hf, policy.tokenizer, policy.image_processor, policy.env_config)


def make_place(folder, layers=None, train=10, test=5, seed=3):
    """Questions and trajectories, and a random checkpoint, `model`. Returns the folder."""
    synthetic(folder, train, test, seed)
    save_policy(random_policy(layers=layers), folder / "model")
    return folder


def make_groups(policy, folder, num_groups):
    """Groups of episodes of unequal length with right and wrong answers, whose log-probabilities of sampling
    are off by some noise."""
    questions = [json.loads(line) for line in open(folder / "train.jsonl")][:num_groups]
    noise = torch.Generator().manual_seed(5)
    zoom = '<think>look</think><video_zoom>{"segment": [10, 14], "fps": 1}</video_zoom>'
    groups = []
    for k, question in enumerate(questions):
        group, start = [], ZoomEnv(question, policy.env_config, folder)
        prompt = encode(policy, start.reset())
        for letter in "ABCD"[: 2 + k % 3]:
            episode = Episode(prompt.fork(), env=start.fork())
            num_zooms = "BD".find(letter) + 1
            answer = question["answer"] if num_zooms else letter
            for text in [zoom] * num_zooms + [f"<think>{'so ' * (k + 1)}</think><answer>{answer}</answer>"]:
                ids = policy.tokenizer.encode(text) + ([] if text == zoom else [policy.im_end])
                encode(policy, [Message("assistant", [Sampled(ids, [0.0] * len(ids))])], episode.dialogue)
                encode(policy, episode.env.step(text), episode.dialogue)
            assert episode.env.done
            group.append(episode)
        fill_features(policy, [e.dialogue for e in group])
        with torch.no_grad():
            for e in group:
                log_probs, _ = token_log_probs(policy, [[e.dialogue]])
                noisy = log_probs.cpu() + 0.3 * torch.randn(len(log_probs), generator=noise)
                e.dialogue.sampled_log_probs = noisy.tolist()
        assert rl.set_advantages(group)
        groups.append(group)
    return groups


def shift(episode, offset, start=0, stop=None):
    """Puts the log-probabilities of sampling of an episode's tokens `start` to `stop` off by `offset`."""
    said = episode.dialogue.sampled_log_probs
    said[start:stop] = [p + offset for p in said[start:stop]]


def tied_and_untied():
    """(name, small random policy), whose embedding and head are one tensor, and are not."""
    for name in ("tied", "untied"):
        policy = random_policy(layers=2)
        if name == "untied":
            policy.hf.lm_head.weight = torch.nn.Parameter(torch.randn_like(policy.head.weight) * 0.02)
            policy.hf.config.tie_word_embeddings = policy.hf.config.text_config.tie_word_embeddings = False
        yield name, policy


def plain_log_probs(policy, dialogue, temperature=1.0):
    """What token_log_probs must equal: transformers' own forward pass over the whole sequence, all logits at
    once. (Its top level finds image tokens by their value, which a random policy also says; the dialogue
    knows which are frames.)"""
    model = policy.hf.model
    pixels = policy.image_processor([f.image for f in dialogue.frames], do_resize=False, return_tensors="pt")
    embeds = model.language_model.embed_tokens(torch.tensor([dialogue.ids], device=policy.device))
    pixels = pixels.to(policy.device)
    features = model.visual(pixels["pixel_values"], pixels["image_grid_thw"]).pooler_output
    embeds[0, torch.tensor(dialogue.is_image)] = features
    positions = torch.tensor(dialogue.positions, device=policy.device).T[:, None]
    hidden = model.language_model(inputs_embeds=embeds, position_ids=positions).last_hidden_state[0]
    log_p = torch.log_softmax(policy.hf.lm_head(hidden).float() / temperature, dim=-1)
    trained = [t for t, is_trained in enumerate(dialogue.trained) if is_trained]
    return torch.stack([log_p[t - 1, dialogue.ids[t]] for t in trained])


class ConstantChannel(torch.nn.Module):
    """Wraps the last norm: channel 0 of what it returns is 1."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, hidden):
        hidden = self.norm(hidden).clone()
        hidden[..., 0] = 1.0
        return hidden


def chatty(policy):
    """A copy of a random policy that often says what ends a turn; a random one never would."""
    policy = full_copy(policy)
    policy.language_model.norm = ConstantChannel(policy.language_model.norm)
    weight = 0.3 * policy.head.weight.detach()
    weight[:, 0] = 0.0
    weight[[policy.im_end, *policy.tokenizer.encode("</video_zoom>", add_special_tokens=False)], 0] = 4.0
    # no longer tied to the embedding
    policy.hf.lm_head.weight = torch.nn.Parameter(weight, requires_grad=False)
    return policy


class Restless(torch.nn.Module):
    """Wraps the last norm: what it returns changes a lot with what it gets."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, hidden):
        return torch.sin(10 * self.norm(hidden).float()).to(hidden.dtype)


def restless(policy):
    """A copy of a random policy whose most likely token is another one each time; a random one repeats
    itself."""
    policy = full_copy(policy)
    policy.language_model.norm = Restless(policy.language_model.norm)
    policy.hf.lm_head.weight = torch.nn.Parameter(policy.head.weight.detach().clone())
    with torch.no_grad():
        policy.head.weight[policy.im_end] *= 3  # it ends its turns now and then
    return policy


class ScriptedEnv(ZoomEnv):
    """Zooms, makes an error or answers, as the length of what is said has it."""

    def step(self, text):
        zoom = '<think>t</think><video_zoom>{"segment": [%d, %d], "fps": 1}</video_zoom>'
        number = len(text) + 3 * len(self.turns)
        says = [zoom % (number, number + 5), "nothing", zoom % (40, 43), "<think>t</think><answer>A</answer>"]
        return super().step(says[number % 4])
