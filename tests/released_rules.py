"""The released code's rules as plain code of our own: what protocols/released.py must equal. Written from the public
repository zsgvivo/VideoZoomer, and held once against its own functions (README). Sentences are given as `texts`."""

import json
import re

import numpy as np
from PIL import Image

LIMIT, MOST_IMAGES, GENERATIONS = 16, 128, 5
END_TOKEN, PAD = "<|im_end|>", "<|image_pad|>"


class Video:
    """All frames of a video, in the order of presentation, and its average rate."""

    def __init__(self, frames, rate):
        self.frames, self.rate = frames, rate


def glance(video, fps=0.5, most=64):
    numbers = list(range(0, len(video.frames), max(1, round(video.rate / fps))))
    if len(numbers) > most:
        numbers = np.linspace(0, len(video.frames) - 1, most, dtype=int).tolist()
    return numbers


def shrink(image, most=100_352, least=25_088):
    height, width = image.shape[:2]
    image = Image.fromarray(image)
    if height * width > most:
        factor = np.sqrt(most / (height * width))
        new_width, new_height = int(width * factor), int(height * factor)
        if new_height * new_width < least:
            factor = np.sqrt(least / (new_height * new_width))
            new_height, new_width = int(new_height * factor), int(new_width * factor)
        image = image.resize((new_width, new_height), Image.LANCZOS)
    return image


def clip(video, texts, start, end, fps):
    """Numbers of frames, or an error text."""
    try:
        count = int(fps * (end - start))
        if count > LIMIT:
            raise ValueError(texts["too_many"].replace("{count}", str(count)).replace("{limit}", str(LIMIT)))
        total = len(video.frames)
        first, last = int(start * video.rate), int(end * video.rate)
        first = max(0, min(first, total - 1))
        last = max(first, min(last, total - 1))
        return np.linspace(first, last, count).astype(int).tolist()
    except Exception as error:
        return texts["not_shown"].replace("{error}", str(error))


def tool(video, texts, contents):
    """What a call gives: numbers of frames, or an error text."""
    try:
        objects = [json.loads(found) for content in contents for found in re.findall(r"\{.*?\}", content)]
        assert len(objects) == 1
        try:
            start, end = float(objects[0]["segment"][0]), float(objects[0]["segment"][1])
            fps = float(objects[0]["fps"])
        except Exception as error:
            raise ValueError(texts["bad_input"].replace("{error}", str(error)).replace("{input}", str(objects[0])))
    except Exception as error:
        return texts["bad_call"].replace("{error}", str(error))
    return clip(video, texts, start, end, fps)


def tagged(video, texts, numbers):
    return "".join(texts["frame"].replace("{index}", str(i)).replace("{time}", f"{n / video.rate:.2f}")
                   + f"<|vision_start|>{PAD}<|vision_end|>" for i, n in enumerate(numbers))


def dialogue(tokenizer, processor, texts, system, problem, video, turns, largest_id=151_664):
    """(ids, trained, images): the whole dialogue where the policy says these turns, as far as it goes; ids with one pad for
    each token of an image, images as PIL."""
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
    end, pad = tokenizer.convert_tokens_to_ids([END_TOKEN, PAD])
    numbers = glance(video)
    prompt = (f"<|im_start|>system\n{system}{END_TOKEN}\n<|im_start|>user\n"
              f"{problem.replace('<image>', tagged(video, texts, numbers))}{END_TOKEN}\n<|im_start|>assistant\n")
    ids, images = encode(prompt), [shrink(video.frames[n]) for n in numbers]
    mask, said = [0] * len(ids), []
    for iteration, text in enumerate(turns):
        response = [i for i in encode(text) if i <= largest_id]
        response += [] if end in response else [end]
        ids, mask = ids + response, mask + [1] * len(response)
        decoded = tokenizer.decode(response, skip_special_tokens=True)
        said.append(decoded)
        contents = re.findall(r"<video_zoom>(.*?)</video_zoom>", decoded, re.DOTALL)
        if not contents or len(images) >= MOST_IMAGES or iteration == GENERATIONS - 1:
            break
        result = tool(video, texts, contents)
        if isinstance(result, str):
            reply = result + texts["after_error"]
        else:
            reply = texts["before_frames"] + tagged(video, texts, result) + texts["after_frames"]
            images += [shrink(video.frames[n]) for n in result]
        if iteration == GENERATIONS - 2:
            reply += texts["last_round"]
        new = encode(f"<|im_start|>user\n{reply}{END_TOKEN}\n<|im_start|>assistant\n")
        ids, mask = ids + new, mask + [0] * len(new)
    # one token a square of 2 x 2 patches
    size = {"shortest_edge": 3_136, "longest_edge": 12_845_056}
    patches = processor(images=images, size=size, return_tensors="pt")
    sizes, out, trained = iter((patches["image_grid_thw"].prod(-1) // 4).tolist()), [], []
    for i, flag in zip(ids, mask):
        times = next(sizes) if i == pad else 1
        out, trained = out + [i] * times, trained + [bool(flag)] * times
    return out, trained, patches, said


def format_reward(said):
    """Of the texts of an episode's turns."""
    answer = r"^<think>.*</think>.*<answer>.*</answer>$"
    call = r"^<think>.*</think>.*<video_zoom>.*</video_zoom>"
    once = lambda text, tag: (text.count(f"<{tag}>"), text.count(f"</{tag}>")) == (1, 1)
    answers = lambda text: bool(re.match(answer, text, re.DOTALL)) and once(text, "answer") and "<video_zoom>" not in text

    def calls(text):
        try:
            inside = json.loads(re.findall(r"<video_zoom>(.*?)</video_zoom>", text, re.DOTALL)[-1])
            count = int(float(inside["fps"]) * (float(inside["segment"][1]) - float(inside["segment"][0])))
        except Exception:
            return False
        return (count <= LIMIT and bool(re.match(call, text, re.DOTALL)) and once(text, "video_zoom")
                and "<answer>" not in text and "</answer>" not in text)

    if len(said) == 1:
        return int(answers(said[0].strip()))
    return int(all(calls(text.strip()) for text in said[:-1]) and answers(said[-1]))


def random_turn(rng, duration):
    """A turn of any kind: calls within and over the limit, moved into the video, empty, malformed, beside an answer."""
    start = rng.choice([0, rng.uniform(0, duration), rng.uniform(0, duration), duration - 1, duration + 5, -3.5])
    length = rng.choice([0, 0.4, 1, 4, 8, 33, -2, rng.uniform(0, 2 * duration)])
    fps = rng.choice([0.5, 1, 2, 4, rng.uniform(0.1, 8), 16 / length if length else 1, 16.5 / length if length else 1])
    numbers = [round(start, 3), round(start + length, 3)]
    call = rng.choice([
        json.dumps({"segment": numbers, "fps": fps}), json.dumps({"segment": numbers, "fps": fps}),
        json.dumps({"segment": numbers, "fps": fps}), json.dumps({"fps": str(fps), "segment": list(map(str, numbers)), "why": "x"}),
        json.dumps({"segment": numbers}), json.dumps({"segment": numbers[:1], "fps": fps}), json.dumps({"segment": "12", "fps": 1}),
        json.dumps({"segment": numbers, "fps": None}), json.dumps({"segment": numbers, "fps": {"a": 1}}), "{}", "", "no JSON",
        f'{{"segment": {numbers}, "fps": {fps}}} {{"segment": {numbers}, "fps": {fps}}}', f'{{"segment": {numbers}, "fps": NaN}}',
        f'{{"segment": {numbers},\n "fps": {fps}}}', f'{{"segment": {numbers}, "fps": Infinity}}', f'{{"segment": {numbers}, "fps": 1e999}}',
        f"{{'segment': {numbers}, 'fps': {fps}}}", f'x {{"segment": {numbers}, "fps": {fps}}} y', '{"segment": [1' + "0" * 400 + ', 2], "fps": 1}',
    ])
    zoom, answer, thought = f"<video_zoom>{call}</video_zoom>", "<answer>B</answer>", "<think>I look.</think>"
    return rng.choice([
        thought + zoom, thought + zoom, thought + zoom, thought + zoom, thought + "\n" + zoom, zoom, f"<think>{zoom}</think>", thought + answer + zoom,
        thought + zoom + zoom, thought + f"<video_zoom>{call}", thought + answer, f"{thought} so {answer}", answer, "<think>hm",
        f"{thought}{answer}\n", f" {thought}{answer}", f"{thought}<answer>B", f"{thought}{answer}{answer}", f"{thought}{zoom} and so", thought,
    ])


def random_turns(rng, duration):
    """Up to five turns; most of the first ones are calls."""
    turns, zooms = [random_turn(rng, duration) for _ in range(GENERATIONS)], rng.randint(0, GENERATIONS)
    for i in range(zooms):
        while "<video_zoom>" not in turns[i] or "</video_zoom>" not in turns[i]:
            turns[i] = random_turn(rng, duration)
    if zooms < GENERATIONS and rng.random() < 0.7:
        turns[zooms] = "<think>I see.</think><answer>B</answer>"
    return turns
