"""Before the first rollout: is the decode step right that nobody has run on this device yet?"""

import copy

import torch

from generation import ROW_UNIT, KVCache, Row, decode_hidden, prefill
from model import Dialogue, attend_pieces


@torch.no_grad()
def check_decoder(mine):
    """Compares the compiled (and captured) decode step of a Decoder, `mine`, with the plain one. Both are fed
    a short text; the log-probabilities of the likeliest tokens are compared with those of a float32 pass.
    Where the RMS error of the compiled step is above twice that of the plain one, a warning says so and
    rollouts go on plain.

    Keeps the two errors as its `errors`; does nothing where nothing is compiled."""
    if mine.path == "plain":
        return
    # the truth: a text of 48 tokens, 32 of which are its prompt, in float32
    policy = mine.policy
    ids = [(7 * i) % min(1000, len(policy.tokenizer)) for i in range(48)]
    prompt, whole = Dialogue(prompt_length=32), Dialogue()
    prompt.add(ids[:32])
    whole.add(ids)
    hidden = float32_hidden(policy, whole)[32:]
    exact = (hidden @ policy.head.weight.float().T).log_softmax(1).amax(1).cpu()  # (tokens,)

    def error(decoder):
        # four rows of one prompt, each of which is made to say the text
        decoder.cache = cache = KVCache(policy, 4, 1e18, ROW_UNIT)
        place = cache.add_prompt(32, 4)
        rows = [Row(prompt, place=place, number=number, cached=32) for number in range(4)]
        cache.reserve(4, 32)
        prefill(policy, cache, [(place, prompt)], rows, 0)
        off = []
        for token, log_prob in zip(ids[32:], exact):
            for row in rows:
                row.turn_ids.append(token)
            off.append(torch.tensor(decoder.decode(rows, 1)[1]) - log_prob)
        return torch.stack(off).square().mean().sqrt().item()

    # the two steps, at temperature 0, where `decode` gives the likeliest token's log-probability
    compiled, plain = copy.copy(mine), copy.copy(mine)
    compiled.graphs, compiled.temperature, plain.temperature = {}, 0, 0
    plain.layers, plain.capture = decode_hidden, False
    mine.errors = error(compiled), error(plain)
    # the verdict
    if compiled.layers is decode_hidden:  # it did not compile, and said so
        mine.layers, mine.capture, mine.path = decode_hidden, False, "plain"
    elif not mine.errors[0] <= 2 * mine.errors[1] + 1e-5:  # nan, too
        mine.give_up("the compiled decode step's log-probabilities are off by {:.1e}, "
                     "the plain one's by {:.1e}".format(*mine.errors))


def float32_hidden(policy, dialogue):
    """Hidden states (T, hidden) of a dialogue of text by a plain pass in float32, one layer at a time."""
    lm = policy.language_model
    ids = torch.tensor([dialogue.ids], device=policy.device)
    positions = torch.tensor(dialogue.positions, device=policy.device).T[:, None]
    hidden = lm.embed_tokens(ids).float()
    rotary = lm.rotary_emb(hidden, positions)
    spans = [slice(0, len(dialogue.ids))]
    for layer in lm.layers:
        attend = lambda number, q, k, v: attend_pieces(q, k, v, spans, lambda piece: None)
        hidden = copy.deepcopy(layer).float()(hidden, position_embeddings=rotary, attend=attend)
    return copy.deepcopy(lm.norm).float()(hidden)[0]
