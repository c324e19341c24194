"""Before the first rollout: is the compiled decode step right, which may never have run on this device?"""

import copy

import torch

from generation import ROW_UNIT, KVCache, Row, decode_hidden, prefill, sample
from model import Dialogue, Piece, attend_pieces, pack

PROMPT, TURN = 32, 16  # tokens of the text


@torch.no_grad()
def check_decoder(decoder):
    """Compares the compiled (and captured) decode step of a Decoder with the plain one. Both are fed a short
    text, and the log-probabilities of the likeliest next tokens are compared with those of one pass over the
    whole text, as training makes it. Where the RMS error of the compiled step is above twice that of the
    plain one, a warning says so and rollouts go on plain.

    Keeps the two errors as the decoder's `errors`; does nothing where nothing is compiled."""
    if decoder.path == "plain":
        return
    policy = decoder.policy
    ids = [(7 * i) % min(1000, len(policy.tokenizer)) for i in range(PROMPT + TURN)]
    scored = score(policy, ids)
    # the two steps, at temperature 0, where `decode` gives the likeliest token's log-probability
    compiled, plain = copy.copy(decoder), copy.copy(decoder)
    compiled.graphs, compiled.temperature, plain.temperature = {}, 0, 0
    plain.layers, plain.capture = decode_hidden, False
    decoder.errors = rms_error(compiled, ids, scored), rms_error(plain, ids, scored)
    # the verdict
    if compiled.layers is decode_hidden:  # it did not compile, and said so
        decoder.layers, decoder.capture, decoder.path = decode_hidden, False, "plain"
    elif not decoder.errors[0] <= 2 * decoder.errors[1] + 1e-5:  # nan, too
        decoder.give_up("the compiled decode step's log-probabilities are off by {:.1e}, "
                        "the plain one's by {:.1e}".format(*decoder.errors))


def score(policy, ids):
    """Log-probability of the likeliest token after each of the last TURN tokens, (TURN,)."""
    dialogue = Dialogue()
    dialogue.add(ids)
    text = pack(policy, [Piece(dialogue, 0, len(ids))])
    attend = lambda layer, q, k, v: attend_pieces(q, k, v, text.spans, lambda piece: None)
    hidden = policy.hidden_states(text.ids, text.positions, attend, text.is_image, text.features)
    _, log_probs = sample(policy, hidden[0, PROMPT:], temperature=0)
    return log_probs.cpu()


def rms_error(decoder, ids, scored):
    """How far a decoder's log-probabilities are from `scored` in four rows that are made to say the text."""
    policy = decoder.policy
    prompt = Dialogue(prompt_length=PROMPT)
    prompt.add(ids[:PROMPT])
    decoder.cache = cache = KVCache(policy, 4, 1e18, ROW_UNIT)
    place = cache.add_prompt(PROMPT, 4)
    rows = [Row(prompt, place=place, number=number, cached=PROMPT) for number in range(4)]
    cache.reserve(4, PROMPT)
    prefill(policy, cache, [(place, prompt)], rows, 0)
    said = []
    for token in ids[PROMPT:]:
        for row in rows:
            row.turn_ids.append(token)
        _, log_probs = decoder.decode(rows, 1)
        said.append(torch.tensor(log_probs)[:, 0])
    return (torch.stack(said, dim=1) - scored).square().mean().sqrt().item()  # (4, TURN)
