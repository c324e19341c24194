"""No tool: frames, the question, and a plain request for what the grader reads.

The baseline of `--mode uniform`: a base model that has never seen a tool is scored as benchmarks score it, by
whatever it says, a bare "B" included. Frames carry no tags; the words are ours.
"""

from grading import last_answer
from zoom_env import Turn, ZoomEnv

ASKS = {
    "multiple_choice": "Answer with the letter of the right option only.",
    "number": "Answer with one number only.",
    "segment": "Answer with the start and the end in seconds only, such as 12.0 - 20.5.",
    "open_ended": "Answer with a few words only.",
}


class Direct(ZoomEnv):
    """One turn, whose whole text is the answer."""

    protocol = "direct"
    tools = {}
    settings = {"system_prompt": "You are a helpful assistant.", "max_zooms": 0}

    def opening(self, frames):
        asks = ASKS[self.question["answer_type"]]
        return [*self.show(frames), *self.with_images("\n".join([*self.question_lines(), asks]))]

    def tag(self, index, frame):
        return ""

    def parse(self, text):
        """After a thought, and inside the last <answer> if there is one."""
        said = last_answer(text.rpartition("</think>")[2])
        return Turn(text, "answer", True, answer=said, untagged="<answer>" not in text)
