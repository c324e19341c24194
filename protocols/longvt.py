"""The tool of LongVT (arXiv 2511.20785): a crop in seconds, called as Qwen calls functions.

    <tool_call>{"name": "crop_video",
     "arguments": {"video_path": ..., "start_time": s, "end_time": s}}</tool_call>

From its public repository (EvolvingLMMs-Lab/LongVT, examples/video_tools/mcp_server.py and
examples/eval/single_inference.py): an overview of 1 frame a second, at most 512, and clips of 1 a second, at
most 128, of at most 50,176 pixels each; a start before 0 or after the end of the video is an error, an end
after it is cut (as its single inference does); at most 5 calls; an answer in <answer> after <think>. The
words are ours. Left out: the path is not read, as an episode is about one video.
"""

import json
import math

from zoom_env import Tool, ZoomEnv, slice_centres

SYSTEM_PROMPT = """You answer a question about a video of which you see some frames. You may call a function \
to see more of it:
{"name": "crop_video", "description": "Frames of a part of the video, one a second", "parameters": \
{"video_path": "string", "start_time": "seconds", "end_time": "seconds"}}
Think inside <think> and </think>. Then either call the function with its name and arguments as JSON,
<tool_call>{"name": "crop_video", "arguments": {"video_path": "...", "start_time": 12.0, "end_time": 20.0}}\
</tool_call>
or give the final answer inside <answer> and </answer>."""
FPS = 1.0  # frames a second of a clip


def parse_crop(text, duration_s, config):
    """{"segment": (start_s, end_s), "fps": frames a second}. Raises ValueError with a text for the policy."""
    try:
        call = json.loads(text, parse_int=float)
    except (ValueError, RecursionError):
        raise ValueError("the call is not JSON") from None
    is_crop = isinstance(call, dict) and call.get("name") == "crop_video"
    if not is_crop or not isinstance(call.get("arguments"), dict):
        raise ValueError('the call needs "name": "crop_video" and "arguments"')
    start_s, end_s = call["arguments"].get("start_time"), call["arguments"].get("end_time")
    if not all(type(x) is float and math.isfinite(x) for x in (start_s, end_s)):
        raise ValueError("start_time and end_time must be numbers of seconds")
    if not 0 <= start_s < end_s:
        raise ValueError("start_time must be 0 or later, and before end_time")
    if start_s >= duration_s:
        raise ValueError(f"start_time is after the end of the video at {duration_s:.2f} s")
    return {"segment": (start_s, min(end_s, duration_s)), "fps": FPS}


def run_crop(env, arguments):
    """One frame a second, at least one and at most zoom_max_frames."""
    start_s, end_s = arguments["segment"]
    most = math.floor((end_s - start_s) * FPS + 1e-6)
    return env.frames_at(slice_centres(start_s, end_s, max(1, min(env.config.zoom_max_frames, most))))


class LongVT(ZoomEnv):
    """Ours but for the tool, the numbers and the words around it."""

    protocol = "longvt"
    tools = {"tool_call": Tool(parse_crop, run_crop, looks_at=lambda arguments: arguments["segment"])}
    settings = {"system_prompt": SYSTEM_PROMPT, "overview_fps": 1.0, "overview_max_frames": 512,
                "zoom_max_frames": 128, "max_zooms": 5, "min_pixels": 784, "max_pixels": 50_176}

    def opening(self, frames):
        path = f"The path of the video is {self.question['video']}; it lasts {self.duration_s:.2f} seconds."
        return [*self.show(frames), *self.with_images("\n".join([*self.question_lines(), path]))]

    def reply(self, turn, frames):
        if frames is None:
            return [f"<tool_response>\n{turn.error}\n</tool_response>"]
        start_s, end_s = turn.calls[0].arguments["segment"]
        said = f"{len(frames)} frames, {start_s:.2f} s to {end_s:.2f} s\n</tool_response>"
        return ["<tool_response>\n", *self.show(frames), said]

    def tag(self, index, frame):
        return ""
