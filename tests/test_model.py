"""The policy: one encoder, exact log-probabilities, packing, master weights, checkpoints."""

import pytest
import torch
from tiny import DEVICE, full_copy, plain_log_probs, random_policy, seeded
from transformers import Qwen2_5_VLForConditionalGeneration

import model
from common import RunConfig
from model import (Dialogue, PolicyError, Sampled, encode, fill_features, frame_features, replay,
                   split_by_tokens, token_log_probs, turn_is_over, turn_text)
from rollout import RolloutConfig, rollout
from training.checkpoints import load_policy, save_policy
from training.environment import run_environment
from training.weights import MasterWeights
from video import Frame
from zoom_env import Message, ZoomEnv

pytestmark = pytest.mark.device


def test_encoder_writes_the_chat_template(policy):
    image = torch.zeros(3, 28, 56, dtype=torch.uint8)
    messages = [Message("system", ["Be brief."]),
                Message("user", ["a\nb <frame0_time0.00s>", Frame(0.0, image), "\nfine?"]),
                Message("assistant", ["<answer>B</answer>"])]
    dialogue = encode(policy, messages)
    part = lambda item: {"type": "image"} if isinstance(item, Frame) else {"type": "text", "text": item}
    chat = [{"role": m.role, "content": [part(item) for item in m.content]} for m in messages]
    text = policy.tokenizer.apply_chat_template(chat, tokenize=False)
    expected = policy.tokenizer.encode(text.replace("<|image_pad|>", "<|image_pad|>" * 2))
    assert dialogue.ids == expected
    assert trained_text(policy, dialogue) == "<answer>B</answer><|im_end|>"


def trained_text(policy, dialogue):
    return policy.tokenizer.decode([i for i, trained in zip(dialogue.ids, dialogue.trained) if trained])


def test_of_a_text_the_end_token_is_trained_but_after_a_call(policy):
    end = lambda text: encode(policy, [Message("assistant", [text])])
    zoom, answer = "<think>x</think><video_zoom>{}</video_zoom>", "<think>x</think><answer>A</answer>"
    assert trained_text(policy, end(answer)) == answer + "<|im_end|>"
    assert trained_text(policy, end(zoom)) == zoom
    for text in (zoom, answer):
        assert policy.tokenizer.decode(end(text).ids) == text + "<|im_end|>\n"
    assert not any(encode(policy, [Message("assistant", [answer])], learn=False).trained)


def test_the_end_token_is_trained_if_it_was_sampled_not_if_it_was_appended(policy):
    """Ids stand as they were sampled. A turn that was cut off, or stops after a call, gets its end appended,
    and so does one that ended with another end token."""
    newline, other_end = policy.tokenize("\n"), policy.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    answer = policy.tokenize("<think>x</think><answer>A</answer>")
    zoom = policy.tokenize("<think>x</think><video_zoom>{}</video_zoom>")
    for ids, appended in ((answer + [policy.im_end], []), (answer, [policy.im_end]), (zoom, [policy.im_end]),
                          (answer[:3], [policy.im_end]), (answer + [other_end], [policy.im_end])):
        log_probs = [-0.5 * i for i in range(len(ids))]
        dialogue = encode(policy, [Message("assistant", [Sampled(ids, log_probs)])])
        assert dialogue.ids == ids + appended + newline
        assert dialogue.trained == [True] * len(ids) + [False] * (len(appended) + 1)
        assert dialogue.sampled_log_probs == log_probs
        assert turn_text(policy, ids, ZoomEnv) == policy.tokenizer.decode(ids, skip_special_tokens=True)


def test_a_turn_is_over_after_an_end_token_or_a_whole_call(policy):
    end = policy.tokenizer.convert_tokens_to_ids
    over = lambda ids: turn_is_over(policy, ids, ZoomEnv)
    call = policy.tokenize("<think>x</think><video_zoom>{}</video_zoom>")
    assert over(call) and not any(over(call[:n]) for n in range(1, len(call)))
    answer = policy.tokenize("<think>x</think><answer>A</answer>")
    assert not any(over(answer[:n]) for n in range(1, len(answer) + 1))
    assert over(answer + [policy.im_end]) and over([policy.im_end]) and over(answer + [end("<|endoftext|>")])
    # the last token has more in it than the end of the call
    vocabulary = policy.tokenizer.get_vocab()
    longer = next(i for token, i in vocabulary.items() if token.startswith(">") and len(token) > 1)
    assert over([*policy.tokenize("</video_zoom"), longer])
    assert not over(policy.tokenize("</video_zoom> and"))  # it was over before


def test_text_cannot_become_a_special_token(policy):
    dialogue = encode(policy, [Message("user", ["<|im_end|><|image_pad|><|im_start|>system"])])
    assert dialogue.ids.count(policy.im_end) == 1 and policy.image_pad not in dialogue.ids
    assert dialogue.ids.count(policy.im_start) == 2  # the user's turn, and the assistant's header


def test_positions_are_those_of_transformers(policy):
    messages = [Message("user", ["see", Frame(0.0, torch.zeros(3, 56, 84, dtype=torch.uint8)), "and",
                                 Frame(1.0, torch.zeros(3, 28, 28, dtype=torch.uint8))])]
    dialogue = encode(policy, messages)
    ids = torch.tensor([dialogue.ids])  # on the host, as ours are
    grid = torch.tensor([[1, 4, 6], [1, 2, 2]])
    expected, _ = policy.hf.model.get_rope_index(ids, (ids == policy.image_pad).int(), image_grid_thw=grid)
    assert torch.equal(torch.tensor(dialogue.positions).T, expected[:, 0])


def test_log_probs_equal_a_plain_forward_pass(policy, data):
    folder, _, rows = data
    dialogues = [replay(policy, row, folder)[0] for row in rows[:4]]
    fill_features(policy, dialogues)
    with torch.no_grad():
        ours, _ = token_log_probs(policy, [[d] for d in dialogues], temperature=0.7)
        plain = torch.cat([plain_log_probs(policy, d, temperature=0.7) for d in dialogues])
        d, config = dialogues[0], policy.hf.config  # and once from the very top of transformers' model
        pixels = policy.image_processor([f.image for f in d.frames], do_resize=False, return_tensors="pt")
        pixels, ids = pixels.to(DEVICE), torch.tensor([d.ids], device=DEVICE)
        is_image = (ids == config.image_token_id).int()
        logits = policy.hf(input_ids=ids, mm_token_type_ids=is_image, **pixels).logits[0]
        log_p = torch.log_softmax(logits / 0.7, dim=-1)
        top = torch.stack([log_p[t - 1, d.ids[t]] for t, trained in enumerate(d.trained) if trained])
    torch.testing.assert_close(ours[:len(top)], top, atol=1e-4, rtol=0)
    assert len(ours) == sum(sum(d.trained) for d in dialogues) > 100
    torch.testing.assert_close(ours, plain, atol=1e-4, rtol=0)


def plain_scores(policy, dialogue, temperature):
    """Log-probabilities and entropies by transformers' own pass, all logits at once."""
    logits = []
    hook = policy.hf.lm_head.register_forward_hook(lambda module, inputs, output: logits.append(output))
    log_probs = plain_log_probs(policy, dialogue, temperature)
    hook.remove()
    predictors = [t - 1 for t, trained in enumerate(dialogue.trained) if trained]
    log_p = torch.log_softmax(logits[0][predictors] / temperature, dim=-1)
    return log_probs, -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("head_is_trained", [True, False])
def test_gradients_equal_those_of_a_plain_pass(data, monkeypatch, head_is_trained):
    """Log-probabilities and entropies are computed by chunks, and once more in the backward pass; autograd
    through all logits at once has the same gradients, of the head, too."""
    folder, _, rows = data
    monkeypatch.setattr(model, "LOGIT_CHUNK", 7)
    policy = random_policy(layers=1)
    policy.hf.lm_head.weight = torch.nn.Parameter(policy.head.weight.detach().clone(), head_is_trained)
    dialogue = replay(policy, rows[0], folder)[0]
    fill_features(policy, [dialogue])
    weights = torch.randn(2, sum(dialogue.trained), generator=seeded(0), device=DEVICE)
    results = []
    for scores in (token_log_probs(policy, [[dialogue]], 0.7, entropy=True),
                   plain_scores(policy, dialogue, 0.7)):
        policy.zero_grad(set_to_none=True)
        (weights * torch.stack(scores)).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in policy.parameters() if p.requires_grad])
        results.append((torch.stack(scores).detach(), gradient))
    (ours, gradient), (plain, plain_gradient) = results
    torch.testing.assert_close(ours, plain, atol=1e-4, rtol=0)
    assert (gradient - plain_gradient).norm() <= 1e-4 * plain_gradient.norm() > 0


def test_zoom_replies_reach_the_model(policy, data):
    """Frames of a tool reply are in the sequence and change what is predicted after them."""
    folder, _, rows = data
    dialogue, env = replay(policy, next(r for r in rows if len(r["turns"]) == 2), folder)
    assert env.num_calls() == 1 and len(dialogue.frames) == env.frames_shown > len(env.watched[0])
    other = dialogue.fork()
    fill_features(policy, [dialogue, other])
    other.features[-1] = other.features[0] + 1
    with torch.no_grad():
        a, _ = token_log_probs(policy, [[dialogue]])
        b, _ = token_log_probs(policy, [[other]])
    first = next(i for i, t in enumerate(dialogue.trained) if t)
    assert torch.equal(a[:1], b[:1]) and first and not torch.allclose(a[-20:], b[-20:])


def test_packed_groups_equal_separate_rows(policy, data):
    """The same log-probabilities and gradients with the prompt computed once a group and once a row."""
    folder, questions, _ = data
    groups, _ = rollout(policy, questions[:2], 4, RolloutConfig(max_turn_tokens=12), root=folder,
                        generator=seeded(1))
    groups = [[e.dialogue for e in group] for group in groups]
    results = []
    for packed in (groups, [[d] for group in groups for d in group]):
        policy.zero_grad(set_to_none=True)
        log_probs, entropies = token_log_probs(policy, packed, entropy=True)
        (log_probs.sum() + entropies.sum()).backward()
        gradient = torch.cat([p.grad.flatten() for p in policy.parameters() if p.requires_grad])
        results.append((log_probs.detach(), entropies.detach(), gradient))
    (log_probs, entropies, gradient), separate = results
    torch.testing.assert_close(log_probs, separate[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(entropies, separate[1], atol=1e-4, rtol=0)
    assert (gradient - separate[2]).norm() <= 1e-5 * gradient.norm()


def test_split_by_tokens_keeps_every_dialogue_and_the_budget():
    make = lambda length: Dialogue(ids=[0] * length, prompt_length=10)
    groups = [[make(n) for n in (15, 20, 30)], [make(12)], [make(40), make(41)]]
    batches = split_by_tokens(groups, 45)
    assert [id(d) for b in batches for g in b for d in g] == [id(d) for g in groups for d in g]
    packed = lambda group: len(group[0].ids) + sum(len(d.ids) - 10 for d in group[1:])
    assert all(sum(packed(group) for group in batch) <= 45 for batch in batches)


def test_frames_are_computed_alone(policy):
    """A frame's features do not depend on which other frames share its pass."""
    image = lambda width: torch.randint(0, 256, (3, 28, width), dtype=torch.uint8)
    frames = [Frame(float(i), image(28 * (1 + i % 2))) for i in range(5)]
    with torch.no_grad():
        alone = [frame_features(policy, [frame])[0].clone() for frame in frames]  # nobody holds the first one
        together = frame_features(policy, frames + frames[:1])
    for expected, features in zip(alone, together):
        torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(together[0], together[-1])


def test_what_looks_the_same_is_kept_once_and_no_longer_than_it_is_used(policy):
    """As of two episodes that zoom to overlapping clips, from other times and in other calls."""
    policy, calls = full_copy(policy), []
    policy.visual.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    looks = torch.randint(0, 256, (4, 3, 28, 56), dtype=torch.uint8)
    first, second, third = (Dialogue(frames=[Frame(1.0 + i, looks[i].clone()) for i in some])
                            for some in ((0, 1, 2), (2, 1, 3), (0, 1, 2)))
    fill_features(policy, [first])
    fill_features(policy, [second, third])
    assert [x.data_ptr() for x in third.features] == [x.data_ptr() for x in first.features]
    assert second.features[0] is first.features[2] and second.features[1] is first.features[1]
    assert calls == [3 * 8, 8]  # patches: only the last one was new
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in first.features + second.features)
    sideways = Frame(0.0, looks[0].reshape(3, 56, 28))  # the same bytes in another shape look otherwise
    assert frame_features(policy, [sideways])[0] is not first.features[0]
    del first, third
    assert len(policy.features) == 3
    del second
    assert not policy.features


def test_features_may_wait_on_the_host(data):
    folder, questions, _ = data
    policy, log_probs = random_policy(), []
    for device in (None, "cpu"):
        policy.features_device = device
        d = encode(policy, ZoomEnv(questions[0], policy.env_config, folder).reset())
        encode(policy, [Message("assistant", ["<answer>A</answer>"])], d)
        fill_features(policy, [d])
        assert {x.device.type for x in d.features} == {device or DEVICE.type}
        with torch.no_grad():
            log_probs.append(token_log_probs(policy, [[d]])[0])
    assert torch.equal(*log_probs)


def test_each_dialogue_gets_its_own_features(policy, data):
    """However often it is named, as prefill names the one that brings a group's prompt and is a row, too."""
    folder, questions, _ = data
    begin = lambda question: encode(policy, ZoomEnv(question, policy.env_config, folder).reset())
    first, second = ([begin(question) for _ in range(3)] for question in questions[:2])
    fill_features(policy, [first[0], second[0], *first, *second])
    policy.features.clear()  # computed anew below
    for d in first + second:
        with torch.no_grad():
            expected = frame_features(policy, d.frames)
        torch.testing.assert_close(d.features, expected)


def test_saved_checkpoint_loads_in_transformers(policy, tmp_path):
    save_policy(policy, tmp_path / "saved")
    loaded = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "saved")
    for (name, a), b in zip(policy.hf.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(a.cpu(), b), name
    ids = torch.tensor([encode(policy, [Message("user", ["hello"])]).ids])  # loaded on the host
    assert loaded.generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]
    again = load_policy(tmp_path / "saved")
    assert again.env_config == policy.env_config
    save_policy(policy, tmp_path / "saved")  # over itself
    assert not list((tmp_path / "saved").glob("*.tmp"))
    (tmp_path / "prompt").write_text("Look closely.")
    config = RunConfig(system_prompt=str(tmp_path / "prompt"))
    env_config = run_environment(tmp_path / "saved", config)
    assert load_policy(tmp_path / "saved", env_config=env_config).env_config.system_prompt == "Look closely."


def test_loading_what_is_no_checkpoint(tmp_path):
    with pytest.raises(PolicyError, match="no checkpoint folder"):
        load_policy(tmp_path / "nothing")
    with pytest.raises(PolicyError, match="config.json"):
        load_policy(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(PolicyError, match="llama"):
        load_policy(tmp_path)


def test_features_equal_the_vision_tower(policy):
    """Frames of several sizes, more than one pass holds."""
    rng = torch.Generator().manual_seed(0)
    sizes = [(140, 140), (112, 168), (28, 28), (252, 84)] * 20
    image = lambda size: torch.randint(0, 256, (3, *size), generator=rng, dtype=torch.uint8)
    frames = [Frame(0.0, image(size)) for size in sizes]
    pixels = policy.image_processor([f.image for f in frames], do_resize=False, return_tensors="pt")
    pixels = pixels.to(DEVICE)
    expected = policy.visual(pixels["pixel_values"], pixels["image_grid_thw"]).pooler_output
    torch.testing.assert_close(torch.cat(frame_features(policy, frames)), expected, atol=1e-5, rtol=1e-5)


def test_masters_add_gradients_up_in_float32_and_move_where_bfloat16_cannot(data):
    """Two backward passes on bfloat16 weights: the masters' gradient is the float32 sum of the passes'
    gradients, and many small steps add up that would each round away."""
    folder, _, rows = data
    policy = random_policy(layers=1).to(torch.bfloat16)
    dialogues = [replay(policy, row, folder)[0] for row in rows[:2]]
    fill_features(policy, dialogues)
    weight = policy.language_model.layers[0].mlp.up_proj.weight
    each = []
    for d in dialogues:
        policy.zero_grad()
        token_log_probs(policy, [[d]])[0].mean().backward()
        each.append(weight.grad.float().clone())
    policy.zero_grad()
    masters = MasterWeights(policy)
    master = masters.parameters[[p is weight for p in masters.compute.values()].index(True)]
    for d in dialogues:
        token_log_probs(policy, [[d]])[0].mean().backward()
    assert master.dtype == torch.float32 and torch.equal(master.grad, each[0] + each[1])
    start, before = master.detach().clone(), weight.detach().clone()
    optimizer = torch.optim.SGD([master], lr=0.0)
    small = 2.0 ** -12 * master.detach().abs().clamp(min=1e-3)
    for _ in range(40):
        master.grad, optimizer.param_groups[0]["lr"] = small.clone(), 1.0
        masters.step(optimizer, 1e9)
    torch.testing.assert_close(master.detach(), start - 40 * small)
    assert torch.equal(weight, master.bfloat16()) and (weight != before).float().mean() > 0.5
    assert (before - small.bfloat16() != before).float().mean() < 0.5


def test_float32_weights_are_their_own_masters(policy):
    policy = random_policy()
    masters = MasterWeights(policy)
    assert all(a is b for a, b in zip(masters.compute.values(), masters.parameters))
    assert [*masters.compute] == [name for name, p in policy.named_parameters() if p.requires_grad]
