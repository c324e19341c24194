"""What answers say: wordings that were graded by hand before the reader was written; and which rows of a file
can be used."""

import json
import locale
import random
import sys
import time

import pytest

from answers import AMBIGUOUS_LETTERS, CLEAR_LETTERS, CLEAR_OTHERS, WRONG_OTHERS
from common import RunConfig, UserError, read_text, write_jsonl
from grading import grade, last_answer, normalise, option_texts, plain, read_letter, read_times, read_untagged
from sources.read import read_questions, read_trajectories
from sources.rows import question_error, trajectory_error
from training.environment import run_environment, with_chosen_frames

COLOURS = ["blue", "red", "a yellow car", "Both A and B"]
CHOICE = {"answer_type": "multiple_choice", "options": COLOURS, "answer": "B"}


def check_all(cases, holds):
    """Whether `holds(*case)` of each case; names all of those where it does not, or raises."""
    wrong = []
    for case in cases:
        try:
            if holds(*case):
                continue
            said = ""
        except Exception as error:
            said = f": {type(error).__name__}: {error}"
        wrong.append(repr(case)[:200] + said[:200])
    assert not wrong, f"{len(wrong)} of {len(cases)} cases:\n" + "\n".join(wrong)


# -------------------------------------------------------------------------- the wordings of answers.py
def test_clear_answers_are_read_and_ambiguous_ones_are_not():
    letters = [(text, options, letter) for options, letter, texts in CLEAR_LETTERS for text in texts]
    none = [(text, options, None) for options, texts in AMBIGUOUS_LETTERS for text in texts]
    assert len(letters) >= 400 and len(none) >= 100
    check_all(letters + none, lambda text, options, letter: (
        read_letter(text, options) == letter and all(
            grade(text, {"answer_type": "multiple_choice", "options": options, "answer": other})
            == (other == letter) for other in "ABCD")))
    others = [(kind, truth, text, score) for score, cases in ((1, CLEAR_OTHERS), (0, WRONG_OTHERS))
              for kind, truth, texts in cases for text in texts]
    check_all(others, lambda kind, truth, text, score: (
        grade(text, {"answer_type": kind, "answer": truth}) == pytest.approx(score)))


# ---------------------------------------------------------------------------------- one letter: B, of COLOURS
LETTER_ALONE = [
    "B", "b", "B.", "b.", "B)", "(B)", "(b)", "[B]", "{B}", "<B>", "**B**", "**B.**", "*B*", "__B__", "_B_",
    "`B`", "'B'", "\"B\"", "“B”", "‘B’", "「B」", " B\n", "\tB ", "B\u00a0", "B!", "B。", "- B", "* B", "> B",
    "# B", "- **B**", "（B）", "Ｂ", "（Ｂ）", "【B】", "Ｂ．", "𝐁", "Ⓑ", "\u200bB", "\ufeffB", "✅ B", "<b>B</b>",
    "<strong>B.</strong>", "<answer>B</answer>", "B<br>", "B<|im_end|>", "```\nB\n```", "(B).", "((B))", "B:",
    "B,", "**(B)**",
]
IN_LATEX = [
    "$B$", "$$B$$", "\\(B\\)", "\\[B\\]", "\\boxed{B}", "$\\boxed{B}$", "\\boxed{(B)}", "\\boxed{\\text{B}}",
    "\\boxed{\\mathbf{B}}", "\\boxed{\\textbf{B}}", "\\boxed{\\mathrm{B}}", "\\boxed{\\mathbf{(B)}}",
    "\\text{B}", "\\mathbf{B}", "\\textbf{B}", "\\boxed{B. red}", "\\boxed{\\text{B. red}}",
    "\\boxed{\\text{B}. red}", "\\boxed{ B }", "\\boxed{B.}", "\\\\boxed{B}", "\\boxed{{B}}",
    "\\\\boxed{{B}}", "\\fbox{B}", "\\boxed{b}", "The answer is \\boxed{B}.",
    "The answer is $\\boxed{\\text{B}}$.", "A car can be seen. \\boxed{B}",
    "Option A is blue, so I answer\n\n\\boxed{B}", "\\boxed{\\text{red}}", "\\boxed{red}",
    "\\boxed{B} and once more \\boxed{B}", "**Answer:** $\\boxed{B}$", "$\\textbf{(B)}$",
    "\\boxed{\\text{Option B}}", "\\boxed{\\text{The answer is B}}", "\\[\n\\boxed{B}\n\\]",
]
LETTER_FIRST = [
    "B. red", "B: red", "B:red", "(B) red", "B) red", "B)red", "B.red", "B red", "B, red", "B - red",
    "B – red", "B — red", "B—red", "B-red", "B -> red", "B → red", "B = red", "B (red)", "B(red)", "B; red",
    "B | red", "[B] red", "**B**: red", "**B. red**", "**B.** red", "**B** - red", "`B`: red", "B. \"red\"",
    "B: 'red'", "B. the red", "B. Red.", "(b) red", "b) red", "b. red", "b: red", "B. The red", "B.\nred",
    "B\nred", "B\n\nred", "（B）red", "B．red", "B：red", "B、红色", "B、 红色", "B。红色", "B，红色", "B. 红色", "B（红色）",
    "【B】红色", "B. text", "B\nIt is red.", "B\n\nExplanation: a red car is seen.",
    "B\n\nA red car drives past.", "B.\n\nIt is red", "B, because it is red", "B because it is red",
    "B since it is red", "B. It is red, not blue.", "B, not A", "B not A", "B, rather than A", "B (not A)",
    "B. A red car drives past.", "B. I think that it is red.", "B; not C, not D.",
    "B\nReason: the car of team A is red", "B. It has vitamin C.", "B. Option A is wrong.",
    "B: person C drives it", "B. Options like A are incorrect, e.g. blue.", "B, i.e. red.",
    "B, as the car is red", "B is correct.", "B is the correct answer", "B is the answer.", "(B) is right",
    "B is correct because the car is red", "B seems best", "B is the best option", "B is most likely correct",
    "B... it is red", "B [red]", "B, the red one",
]
PHRASES = [
    "Option B", "option b", "Option (B)", "Option B.", "Option B: red", "option B is correct",
    "Option B is right.", "Choice B", "Answer B", "Answer (B)", "Answer: B", "answer: b", "ANSWER: B",
    "Answer:B", "Answer : B", "Answer - B", "Answer = B", "Answer→B", "Ans: B", "Ans. B", "**Answer**: B",
    "**Answer:** B", "**Answer: B**", "### Answer: B", "Answer: (B)", "Answer: [B]", "Answer: **B**",
    "Answer: B. red", "Answer: B red", "Answer: red", "Answer: option B", "Answer:\nB", "Answer:\n\n**B**",
    "Answer is B", "Answer is option B", "Answer is: B", "The answer is B", "The answer is B.",
    "The answer is: B", "The answer is (B)", "The answer is **B**.", "The answer is 'B'",
    "The answer is \"B\".", "The answer is b.", "The answer is option B.", "The answer is the option B.",
    "The answer is letter B", "The answer is B: red", "The answer is B, red.", "The answer is B red",
    "The answer is B because it is red", "The answer is B, not A.", "The answer is red",
    "The answer is the red.", "The correct answer is (B)", "The correct answer is B) red",
    "The correct option is (B)", "The correct option is B.", "The correct choice is B",
    "The best answer is: B", "The best option is B", "The right answer is B.", "The most likely answer is B",
    "The answer would be B", "The answer should be B.", "The answer must be B", "The answer is likely B",
    "The answer is most likely (B).", "The answer is probably B.", "The answer is clearly B!",
    "The final answer is B", "Final answer: B", "Final Answer: **B**", "**Final Answer**\nB",
    "My answer is B", "My final answer is B.", "My guess is B", "My choice: B", "Correct answer: B",
    "Correct option: B", "Best option: (B)", "Best Option: B", "Selected option: B", "Correct: B",
    "The letter is B", "Prediction: B", "Response: B", "So the answer is B.", "So, the answer is B",
    "Therefore, the answer is B.", "Thus the correct option is (B) red.", "Hence the answer is B", "So B.",
    "So, B.", "Thus, B.", "Therefore (B).", "Therefore, B is correct.", "Hence B",
    "Therefore, the correct answer is option B.", "I choose B", "I choose (B).", "I choose option B",
    "I pick B", "I select B", "I would choose B.", "I'd say B", "I would go with B",
    "I'm going with option B.", "I'll go with B.", "I opt for B", "I think B", "I think it is B",
    "I think it's B.", "I think the answer is B.", "I believe B is correct", "I guess B",
    "I believe the answer is (B)", "It is B.", "It's B", "It must be B", "It should be (B).", "That is B",
    "It is option B.", "Based on the frames, the answer is (B).",
    "Based on the video, the correct answer is B. red", "Based on the frames, option B is correct.",
    "The answer to the question is B.", "Sure! The answer is B.",
    "The option that best describes the car is (B).", "The answer that fits best is option B.",
    "The car is red (B).", "B. Option A does not match, and C was not shown.", "The car is red. (B)",
    "The car is red.\nB", "The car is red.\n\n**B**", "The car is red. B", "The car is red. B.",
    "A red car is seen, so the answer is B.", "A red car is seen. Answer: B",
    "I see a car. I think it is red. Answer: B", "It is not A, so the answer is B.",
    "A is wrong, so the answer is B.", "The answer is not A, it is B.",
    "Option A is incorrect. Option C is incorrect. The answer is B.",
    "Answer: B\nExplanation: A red car is seen.", "The answer is B\n\nThe car of person A is red.",
    "Looking closer, option (B) matches.", "Yes. B", "red", "Red.", "RED", "the red", "\"red\"", "**red**",
    "red!", " red \n", "The answer is: red.", "Answer: **red**",
    "The answer is in the last frame. The answer is red.",
]
CHINESE = [
    "答案是B", "答案是 B", "答案是B。", "答案：B", "答案:B", "答案为B", "答案选B", "答案是（B）", "答案是选项B", "正确答案是B", "正确答案：B。",
    "正确答案为 (B)", "正确选项是B", "最终答案：B", "所以答案是B。", "因此，答案是B", "因此选B", "所以选B。", "故选B", "故选：B", "选B", "选 B", "选B。",
    "选择B", "我选B", "我选择B。", "应选B", "应该选B", "应该是B", "选项B", "选项B正确", "B选项", "B选项正确", "B正确", "B是正确的", "B是正确答案",
    "答案应该是B", "答案是B，红色", "答案是B、红色", "答案是B，不是A", "不是A，选B", "车是红色的，所以选B。", "根据视频，答案是B。", "根据画面，正确选项为（B）。",
    "视频中有一辆车。\n答案：B", "**答案：B**",
]
B_OF_COLOURS = LETTER_ALONE + IN_LATEX + LETTER_FIRST + PHRASES + CHINESE

# -------------------------------------------------------------------------------- no letter, or more than one
AMBIGUOUS = [
    "A or B", "B or C", "A and B", "A and C", "A, B", "A,B", "A, B, C", "A/B", "A & B", "(A) (B)", "(A)(B)",
    "(A) or (B)", "(A), (B)", "[A, B]", "AB", "ABC", "A B", "A;B", "A|B", "A + B", "a or b", "a, b",
    "a and b", "A or maybe B", "A (or B)", "A. blue or B. red", "A. blue\nB. red", "A: blue, B: red",
    "Either A or B", "either (A) or (B)", "both B and C", "A? B?", "between A and B", "A, perhaps B",
    "A, maybe B", "A or b", "B, C", "B\nC", "B. C", "B.\n\nC.", "A, B and C are correct",
    "The answer is A or B", "The answer is A and C.", "The answer is A. No, B.",
    "The answer is A. Wait, it is B.", "Answer: A\nAnswer: B", "Answer: A, B", "Answer: A/B",
    "A. Actually, B.", "A. No wait, B is correct.", "A is correct, or B", "I choose A or B",
    "I think A, or C", "The answer is A, but it could be B", "B. So the answer is A.", "A and B are correct",
    "B is correct. A is correct.", "A -> B", "A → B → C", "A > B", "Option A or option B", "Options A and B",
    "B or E", "E or B", "\\boxed{A or B}", "\\boxed{A} or \\boxed{B}", "\\boxed{A, B}",
    "\\boxed{A}\\boxed{B}", "$A$ or $B$", "blue or red", "blue, red", "A或B", "A和B", "A、B", "A，B", "选A或B",
    "选A和C", "答案是A、B", "答案是A。不，是B。", "答案：A，B", "选A还是选B", "A与B", "not A, but B or C", "A/B/C/D", "A. B. C. D.",
    "A) B)", "first A, then B",
]
NEGATED = [
    "not B", "Not B.", "not (B)", "not option B", "It is not B", "It is not B.", "It isn't B", "It's not B",
    "It cannot be B.", "The answer is not B", "The answer isn't B.", "The answer is not option B",
    "The correct answer is not (B).", "Answer: not B", "B is wrong", "B is not correct", "B isn't correct.",
    "B is incorrect.", "Option B is wrong.", "Option B is not correct", "I would not choose B",
    "I don't think it is B", "I do not pick B.", "I don't believe B is correct", "neither A nor B",
    "Neither B nor C.", "anything but B", "any option except B", "never B", "B is false", "(B) is ruled out",
    "The answer can't be B", "The wrong answer is B", "不是B", "不选B", "答案不是B", "不是B。", "B不对", "B错误", "B是错的",
    "B不正确", "排除B", "非B", "B选项错误",
]
NO_LETTER = [
    "", "  ", "\n", ".", "()", "$$", "\\boxed{}", "\\boxed{ }", "\\boxed{\\text{}}", "**", "```", "?",
    "Because", "bad", "a dog", "I see a car", "I see a car.", "A red car is seen", "A car is seen", "A car.",
    "A man walks", "A bus", "The answer is a car", "The answer is a red bus", "It is a car",
    "So a car drives past", "Answer: a bus", "I think so", "I am not sure.", "I cannot tell.", "I don't know",
    "Both are seen", "Team B wins", "He takes vitamin C", "person B is red", "U.S. flag", "B.C. 300",
    "A.M. radio", "a.m.", "e.g. red", "i.e. red", "C++", "B+", "B2", "4B", "B-roll footage", "A-frame",
    "D-day", "C section", "C major chord", "B the boat", "E", "E.", "F.", "(E)", "The answer is E",
    "\\boxed{E}", "Z", "I", "选E", "X marks the spot", "Cannot be determined", "none", "None of the above",
    "all of them", "blue red", "the", "an", "yellow", "car", "Both", "0", "2", "B's car", "Plan B",
    "I would need to look closer.", "As a result, it stops.", "It is as long as a bus.", "红色", "我不知道",
    "视频里有一辆车", "T恤", "B超检查",
]
CONTRADICTED = [
    "A. red", "A: red", "(A) red", "A) red", "A - red", "A\nred", "A (red)", "A.red", "a. red", "a) red",
    "C red", "C. blue", "D: red", "\\boxed{A. red}", "The answer is A. red", "The answer is A: red.",
    "Answer: (A) red", "So the answer is C, blue.", "A. Red.", "**A. red**", "A, red", "A = red",
    "A. both A and B", "A. red. The car is red.", "A\nred\nThe car is red.",
]
NONE_OF_COLOURS = AMBIGUOUS + NEGATED + NO_LETTER + CONTRADICTED


def test_the_graded_set_is_large_and_says_each_thing_once():
    forms = B_OF_COLOURS + NONE_OF_COLOURS
    assert len(forms) == len(set(forms)) > 450


def test_one_letter_is_named():
    check_all([(text,) for text in B_OF_COLOURS], lambda text: (
        read_letter(text, COLOURS) == "B" == read_letter(text, ["A. blue", "B. red", "C. a yellow car"])
        and grade(text, CHOICE) == 1 and grade(text, CHOICE | {"answer": "A"}) == 0))


def test_no_letter_is_named():
    check_all([(text,) for text in NONE_OF_COLOURS], lambda text: (
        read_letter(text, COLOURS) is None
        and not any(grade(text, CHOICE | {"answer": letter}) for letter in "ABCD")))
    assert grade(None, CHOICE) == 0


FORMS = ["{}", "({})", "{}.", "**{}**", "\\boxed{{{}}}", "The answer is {}.", "Answer: {}", "Answer: ({})",
         "I choose {}.", "{} because it fits", "{}\nIt fits.", "{}. It fits.", "答案是{}。", "选{}",
         "Option {} is correct.", "{} is correct.", "It is seen ({})", "{} - it fits", "I think it is {}."]


def test_every_letter_is_read_like_b():
    """Forms of B, as any of 26 letters: pronouns and articles are letters where they stand like one."""
    options = [f"thing {number}" for number in range(26)]
    letters = [*enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZ")]
    check_all([(form.format(letter), index, letter) for index, letter in letters for form in FORMS],
              lambda text, index, letter: (
                  read_letter(text, options) == letter and read_letter(text, options[:index]) is None))
    for text in ("I think", "I think so.", "I am sure", "I see a thing", "I do not know", "A thing",
                 "A man and I walk"):
        assert read_letter(text, options) is None, text
    assert read_letter("I think it is B, as far as I see", options) == "B"


# --------------------------------------------------------------------------------------- options of all kinds
OPTIONS = [  # options, [(answer, letter that it names)]
    (COLOURS, [
        ("D", "D"), ("D. Both A and B", "D"), ("(D) both A and B", "D"), ("Both A and B", "D"),
        ("\\boxed{D. Both A and B}", "D"), ("The answer is both A and B", "D"), ("D, both A and B.", "D"),
        ("D - Both A and B", "D"), ("The answer is D. Both A and B.", "D"), ("D: Both A and B are seen", "D"),
        ("C", "C"), ("A yellow car", "C"), ("a yellow car.", "C"), ("C. A yellow car", "C"),
        ("yellow car", "C"), ("The yellow car.", "C"), ("C a yellow car", "C")]),
    (["B", "A", "C"], [
        ("B", "B"), ("A", "A"), ("A. B", "A"), ("B. A", "B"), ("A: B", "A"), ("A. A", None),
        ("The answer is A. B", "A"), ("The answer is B.", "B")]),
    (["B", "C", "A"], [("(C)", "C")]),
    (["2", "0", "5", "1"], [
        ("2", "A"), ("5", "C"), ("5.", "C"), ("D", "D"), ("The answer is 0.", "B"), ("B. 0", "B"),
        ("B. 5", None), ("Answer: 1", "D"), ("7", None), ("２", "A")]),
    (["2", "0"], [("B 0", "B")]),
    (["3", "-3"], [("-3", "B"), ("−3", "B"), ("A. 3", "A"), ("A. -3", None)]),
    (["-3", "3"], [("3", "B")]),
    (["−3", "3"], [("3", "B")]),
    (["15", "1.5"], [("1.5", "B")]),
    (["50", "50%"], [("50%", "B")]),
    (["4", "$5"], [("$5", "B")]),
    (["蓝色", "红色", "绿色"], [("红色", "B"), ("红色。", "B"), ("B、红色", "B"), ("A、红色", None), ("答案是红色", "B")]),
    (["蓝色", "红色"], [("答案：B。红色", "B"), ("B 红色", "B"), ("B红色", "B"), ("A。红色", None)]),
    (["裙子", "T恤"], [("T恤", "B")]),
    (["A man walks.", "A man runs."], [
        ("A man walks.", "A"), ("A man runs.", "B"), ("A man runs", "B"), ("A. A man walks.", "A"),
        ("A. A man runs.", None), ("B. A man runs.", "B"), ("A man sits", None)]),
    (["Yes", "No", "I don't know", "Maybe"], [("I don't know", "C"), ("C. I don't know", "C")]),
    (["blue", "a red car"], [("A red car", "B")]),
    (["red car", "blue"], [("A red car", "A")]),
    (["A is walking", "B is walking"], [("A is walking", "A"), ("B is walking", "B")]),
    (["B is walking", "A is walking"], [("B is walking", "A")]),
    (["FM radio", "A. M. radio"], [("A. M. radio", "B"), ("B. A. M. radio", "B")]),
    (["FM radio", "A.M. radio"], [("A.M. radio", "B")]),
    (["P.M.", "A.M."], [("A.M.", "B")]),
    (["UK flag", "U.S. flag"], [("U.S. flag", "B")]),
    (["C", "C++", "C#"], [("C++", "B"), ("C", "C"), ("B. C++", "B")]),
    (["dress", "T-shirt"], [("T-shirt", "B")]),
    ([">", "<"], [("<", "B"), ("B. <", "B")]),
    (["<b>", "<i>"], [("<i>", "B")]),
    (["x > y", "x < y"], [("x < y", "B")]),
    (["Team A", "Team B"], [("Team B", "B")]),
    (["Team B", "Team A"], [("Team A", "B"), ("A. Team B", "A")]),
    (["none", "Plan A, then plan B"], [("Plan A, then plan B", "B")]),
    (["A. blue", "B. red"], [("B", "B"), ("red", "B"), ("A", "A")]),
    (["(A) blue", "(B) red"], [("B. red", "B")]),
    (["A、blue", "B、red"], [("(B) red", "B")]),
    (["A.blue", "B.red"], [("B、red", "B"), ("A. red", None)]),
    (["a) blue", "b) red"], [("blue", "A")]),
    (["A：blue", "B：red"], [("B: red", "B")]),
    (["A -> B", "B -> A"], [("A -> B", "A"), ("B -> A", "B"), ("B. B -> A", "B")]),
    (["BA", "AB"], [("AB", "B")]),
    (["Yes", "No"], [("Yes", "A"), ("No", "B"), ("No.", "B"), ("No, B.", "B")]),
    (["A. Apples.", "B. Candles.", "C. Berries.", "D. The three kinds are of the same number."], [
        ("Candles.", "B"), ("The three kinds are of the same number", "D")]),
    (["(A) 1636", "(B) 1366", "(C) 1363", "(D) 1633"], [("C", "C"), ("1633", "D")]),
    (["(A) A paper", "(B) A leaf", "(C) A photo"], [("a leaf", "B")]),
    (["A paper", "A leaf", "A photo"], [("A leaf", "B")]),
    # two options with the same words name none; nor does nothing
    (["red", "red"], [("red", None)]),
    (["red", "."], [("", None)]),
    ([], [("B", None)]),
]
OPTION_LETTERS = [  # options, their texts
    (["A. one", "B. two", "C. three"], ["one", "two", "three"]),
    (["A.one", "B.two", "C.three"], ["one", "two", "three"]),
    (["A、一", "B、二", "C、三", "D、四"], ["一", "二", "三", "四"]), (["a) one", "b) two"], ["one", "two"]),
    (["(A) x", "(B) y"], ["x", "y"]), (["(a) x", "(b) y"], ["x", "y"]), (["[A] x", "[B] y"], ["x", "y"]),
    (["A: x", "B: y"], ["x", "y"]), (["A:x", "B:y"], ["x", "y"]), (["A．x", "B．y"], ["x", "y"]),
    (["A：x", "B：y"], ["x", "y"]), (["（A）x", "（B）y"], ["x", "y"]), (["Ａ．x", "Ｂ．y"], ["x", "y"]),
    ([" A. x ", "\nB. y\n"], ["x", "y"]), (["A. blue", "(B) red", "C) green"], ["blue", "red", "green"]),
    (["A. A", "B. B"], ["A", "B"]), (["A. B", "B. A"], ["B", "A"]),
    (["A. A. M. radio", "B. FM radio"], ["A. M. radio", "FM radio"]), (["A. 1.5", "B. 2"], ["1.5", "2"]),
    (["A. x", "B. x"], ["x", "x"]), (["A.1", "B.2"], ["1", "2"]),
]
NO_LETTERS_OF_THEIR_OWN = [
    ["A. M. radio", "FM radio"], ["A.M. radio", "B.C. 300"], ["a cat", "b cat"], ["a cat", "a dog"],
    ["A", "B"], ["A.", "B."], ["(A)", "(B)"], ["A man", "B man"], ["B. x", "A. y"], ["A. x", "y"],
    ["x", "B. y"], ["A. x", "B"], ["A, B", "B, C"], ["A、B", "B、C"], ["A.B", "B.C"], ["A-B", "B-C"],
    ["A - B", "B - C"], ["Apple: red", "Banana: green"], ["A. x", "A. y"],
    [*(f"{letter}. x{letter}" for letter in "ABCDEFGH"), "I.V. line"], ["A/B", "B/C"], ["", ""],
    ["1. x", "2. y"], ["I.V. line", "drip"], ["AA. x", "BB. y"],
]


def test_options_of_all_kinds():
    check_all([(text, options, letter) for options, answers in OPTIONS for text, letter in answers],
              lambda text, options, letter: read_letter(text, options) == letter)


def test_letters_that_options_carry_are_taken_off_where_all_carry_theirs():
    cases = OPTION_LETTERS + [(options, options) for options in NO_LETTERS_OF_THEIR_OWN]
    check_all(cases, lambda options, texts: option_texts(options) == texts and (
        option_texts(texts) == texts or texts == ["A. M. radio", "FM radio"]))


# -------------------------------------------------------------------------- numbers, segments, words, no tags
NUMBERS = [  # answer, truth, score
    ("-3", -3, 1), ("−3", -3, 1), ("–3", -3, 1), ("－3", -3, 1), ("‑3", -3, 1), ("﹣3", -3, 1), ("—3", -3, 1),
    ("−3", 3, 0), ("–3", 3, 0), ("－３", 3, 0), ("－３", -3, 1), ("−3.5", -3.5, 1), ("−1,234", -1234, 1),
    ("minus 3", -3, 1), ("minus 3", 3, 0), ("negative 3", 3, 0), ("负3", -3, 1), ("负3", 3, 0),
    ("The answer is −3.", -3, 1), ("$-3$", -3, 1), ("**−3**", -3, 1), ("1e−3", 0.001, 1), ("+3", 3, 1),
    ("３", 3, 1), ("１，２３４", 1234, 1), ("１２．５", 12.5, 1), ("3", 3, 1), ("3.", 3, 1), ("3.0", 3, 1),
    ("1,234", 1234, 1), ("1,234", 1, 0), ("3 to 5", 3, 0), ("3 to 5", 5, 0), ("3-5", 3, 0), ("3–5", 5, 0),
    ("3-5", -5, 0), ("3 or 4", 3, 0), ("65-80", 65, 0), ("50%", 50, 1), ("50 %", 50, 1), ("50％", 50, 1),
    ("about 3", 3, 1), ("approximately 3 cars", 3, 1), ("~3", 3, 1), ("≈ 3", 3, 1), ("3 s", 3, 1),
    ("3 times", 3, 1), ("3次", 3, 1), ("共3次。", 3, 1), ("\\boxed{3}", 3, 1),
    ("Frames 2 and 5 show it: \\boxed{3}", 3, 1), ("\\boxed{\\text{3}}", 3, 1), ("`3`", 3, 1),
    ("<b>3</b>", 3, 1), ("F-16", 16, 1), ("F-16", -16, 0), ("x = -3", -3, 1), ("(-3)", -3, 1),
    ("Answer: 3", 3, 1), ("Answer - 3", 3, 1), ("answer—3", 3, 1), ("10²", 10, 0), ("10²", 102, 0),
    ("2½", 2, 0), ("5 m²", 5, 1), ("three", 3, 0), ("5 m²", 52, 0), ("3/4", 3, 0), ("1{,}234", 1234, 1),
    ("12,34", 12, 0), ("1e400", 7, 0), ("٣", 3, 1), ("3*4", 34, 0), ("3 4", 34, 0), ("", 0, 0),
    ("\\boxed{3} or \\boxed{4}", 3, 0), ("\u200b3", 3, 1), ("3\u00a0", 3, 1), ("-", 0, 0), ("3:05", 3, 0),
    ("1 234", 1234, 0), ("7", 7, 1), ("7.0", "7", 1), ("There are 7 cars.", 7, 1), ("1,234.5", 1234.5, 1),
    (".5", 0.5, 1), ("1e3", 1000, 1), ("3", -3, 0), ("7 or 8", 7, 0), ("7.1", 7, 0), ("seven", 7, 0),
    ("9" * 400, 7, 0), ("nan", 7, 0), (None, 0, 0),
]
SEGMENT = [  # all mean 65 s to 80 s
    "01:05 - 01:20", "1:05 - 1:20", "1:05-1:20", "1:05–1:20", "1:05—1:20", "1:05 − 1:20", "1:05‑1:20",
    "1:05~1:20", "1:05～1:20", "01:05 to 01:20", "00:01:05 to 00:01:20", "00:01:05 - 00:01:20",
    "0:01:05-0:01:20", "00:01:05.000 --> 00:01:20.000", "00:01:05,000 --> 00:01:20,000", "from 1:05 to 1:20",
    "from 1:05.0 to 1:20.0", "between 1:05 and 1:20", "[01:05, 01:20]", "[1:05,1:20]", "(1:05, 1:20)",
    "１：０５－１：２０", "1 min 5 s to 1 min 20 s", "1 min 5 s - 1 min 20 s", "1min5s-1min20s", "1m5s-1m20s",
    "1m 05s to 1m 20s", "1 minute 5 seconds to 1 minute 20 seconds",
    "1 minute and 5 seconds to 1 minute and 20 seconds",
    "between 1 minute and 5 seconds and 1 minute and 20 seconds",
    "1 minute, 5 seconds to 1 minute, 20 seconds", "1 min 5 to 1 min 20", "1分5秒到1分20秒", "1分05秒－1分20秒",
    "1分钟5秒至1分钟20秒", "65s-80s", "65 s - 80 s", "65s to 80s", "65-80s", "65 to 80", "65-80", "65–80", "65 − 80",
    "65—80", "65 - 80", "65 -80", "65~80", "65～80秒", "[65, 80]", "[65,80]", "[65.0, 80.0]", "(65, 80)",
    "[65s, 80s]", "65, 80", "65.0 to 80.0 seconds", "65 to 80 secs", "65 seconds to 80 seconds",
    "between 65 and 80 seconds", "from 65 s until 80 s", "６５－８０", "从65秒到80秒", "第65秒至第80秒", "**65** to **80**",
    "\\boxed{[65, 80]}", "$[65, 80]$", "`[65, 80]`", "The event lasts from 65 to 80 seconds.",
    "It happens between 01:05 and 01:20 in the video.", "Answer: 1:05-1:20", "65.00s → 80.00s", "65s–1:20",
    "1:05 to 80 s", "65 to 1 min 20 s", "start: 65, end: 80", "1:05s to 1:20s", "65 sec. to 80 sec.",
    "0 h 1 min 5 s to 0 h 1 min 20 s", "from 1 min 5 s (inclusive) to 1 min 20 s",
]
SEGMENT_OTHER = [  # answer, truth, score
    ("from 1:05.5 to 1:20", [65.5, 80], 1), ("1:05:00 - 1:20:00", [3900, 4800], 1),
    ("1 h to 1 h 5 min", [3600, 3900], 1), ("1.5 min to 2 min", [90, 120], 1),
    ("1 min to 2 min", [60, 120], 1), ("1 to 2 minutes", [60, 120], 1), ("1-2 min", [60, 120], 1),
    ("1h2m3s-1h2m4s", [3723, 3724], 1), ("30 s to 1 min", [30, 60], 1), ("75:10-75:20", [4510, 4520], 1),
    ("0:05-0:10", [5, 10], 1), ("1:05 - 1:35", [65, 80], 0.5), ("[-5, 10]", [5, 10], 0),
    ("-5 to 10", [5, 10], 0), ("−5 to 10", [5, 10], 0), ("from -5 to 10", [5, 10], 0),
    ("1:20 - 1:05", [65, 80], 0), ("1:75 - 1:80", [135, 140], 0), ("1:60:00 - 2:00:00", [7200, 7200.5], 0),
    ("1:05", [1, 5], 0), ("65", [65, 80], 0), ("1:05:10", [65, 80], 0), ("0:0:1:05 - 0:0:1:20", [65, 80], 0),
    ("1:2:3:4", [1, 7384], 0), ("at 3 frames, 65 to 80", [65, 80], 0), ("", [65, 80], 0),
    ("1:05 to 1:20 to 1:30", [65, 80], 0), ("0 to " + "9" * 400, [65, 80], 0),
    ("9" * 400 + ":05 to 1", [65, 80], 0), ("nan to inf", [65, 80], 0), ("1 min 5 s", [60, 65], 0),
    ("1 min and 5 s", [5, 60], 0), ("[.5, 3]", [0.5, 3], 1), ("- 65 to 80", [65, 80], 1),
    ("1:05.", [1, 5], 0), ("[10, 20]", [10, 20], 1), ("10.0 s to 20.0 s", [10, 20], 1),
    ("10-20", [10, 20], 1), ("[15, 25]", [10, 20], 1 / 3), ("[12, 17]", [10, 20], 0.5),
    ("[0, 40]", [10, 20], 0.25), ("[20, 30]", [10, 20], 0), ("[30, 40]", [10, 20], 0),
    ("[20, 10]", [10, 20], 0), ("[10, 10]", [10, 20], 0), ("10", [10, 20], 0), ("10 12 20", [10, 20], 0),
    ("0 to " + "9" * 400, [10, 20], 0), ("", [10, 20], 0), (None, [10, 20], 0),
]
OPEN = [  # answer, truth, score
    ("Ｐａｒｉｓ", "Paris", 1), ("**Paris**", "Paris", 1), ("café", "café", 1), ("J. Smith", "K. Smith", 0),
    ("A. Smith", "B. Smith", 0), ("$\\text{Paris}$", "Paris", 1), ("\\boxed{Paris}", "Paris", 1),
    ("−3 degrees", "-3 degrees", 1), ("3 degrees", "-3 degrees", 0), ("巴黎。", "巴黎", 1),
    ("“Paris”", "Paris", 1), ("A", "A", 1), ("a_b", "a_b", 1), ("Paris\n", "paris", 1), ("Paris", "Paris", 1),
    ("the  paris.", "Paris", 1), ("A red car!", "red car", 1), ("12", 12, 1), ("B", "A", 0),
    ("London", "Paris", 0), ("Paris or London", "Paris", 0), ("", "Paris", 0), (None, "Paris", 0),
]
UNTAGGED = [  # turn, answer in it, letter
    ("B", "B", "B"), ("The answer is B.", "The answer is B.", "B"),
    ("I see a car.\nIt is red.\nAnswer: B", "Answer: B", "B"), ("<think>A or C?</think>B", "B", "B"),
    ("<think>A or C?\n</think>\n\nThe answer is (B).\n\n", "The answer is (B).", "B"),
    ("It is red.\n\n**B**\n", "**B**", "B"), ("It is red.\n```\nB\n```", "B", "B"), ("hm</think>B", "B", "B"),
    ("A\n---\nB\n---\n", "B", "B"), ("<think>a</think>A<think>b</think>B", "B", "B"), ("", None, None),
    (" \n", None, None), ("<think>B</think>", None, None), ("<think>B</think>\n\n", None, None),
    ("A\nIt is blue.", "It is blue.", None), ("A or\r\nB", "B", "B"), ("Answer:\nB.\n\n", "B.", "B"),
    ("x" * 1_000_000 + "\nB", "B", "B"), ("答案是A。\n不，答案是B。", "不，答案是B。", "B"), ("...\n", None, None),
    ("A\n\\boxed{B}", "\\boxed{B}", "B"),
]


def test_numbers_segments_and_words():
    segments = [(text, [65, 80], 1) for text in SEGMENT] + SEGMENT_OTHER
    kinds = {"number": NUMBERS, "segment": segments, "open_ended": OPEN}
    cases = [(kind, *case) for kind, some in kinds.items() for case in some]
    check_all(cases, lambda kind, text, truth, score: (
        grade(text, {"answer_type": kind, "answer": truth}) == pytest.approx(score)))


def test_times_in_a_text():
    assert read_times("at 0:07, 1 min 5 s, 1 h, then 80") == [7, 65, 3600, 80]
    assert read_times("none") == [] == read_times("1:75")


def test_a_turn_without_tags_answers_with_its_last_line():
    check_all(UNTAGGED, lambda text, said, letter: (
        read_untagged(text) == said and grade(read_untagged(text), CHOICE) == (letter == "B")))


def test_the_last_answer_of_a_text():
    check_all([("<answer>A</answer> <answer> B\n</answer>", "B"), (" B ", "B"), ("<answer>B", "B"), ("", ""),
               ("B</answer>", "B"), ("<answer></answer>", "")], lambda text, said: last_answer(text) == said)


# --------------------------------------------------------------------------------------------- any text, fast
PIECES = [
    "A", "B", " ", "\n", ".", ",", "(", ")", "[", "]", "{", "}", "$", "*", "_", "`", "'", "\"", "<", ">", "/",
    "|", "-", "—", "=", ":", "1", "9", "1:", "1,", "a", "b", "is ", "not ", "or ", "the ", "answer ",
    "answer is ", "the answer is the option ", "option ", "I ", "I think ", "it is ", "so ", "A is ", "B or ",
    "not B ", "\\boxed{", "\\boxed", "\\text{", "\\text", "\\", "\\(", "<b", "<|", "答案", "答案是", "选", "不", "是",
    "。", "、", "min ", "1 min ", "1 s ", "1:1:", "and ", "ﷺ", "\u200b", "½", "²", "́", "\u0000", "\ud83d", "＄",
    "𝐁", "Answer: A\n", "A, ", "A and ", "(A) or ", ". A ", "A. ", "A: no\n", "I choose ", "Final answer: ",
    "so A, ", "A, but ", "maybe ", "not sure the ",
    "either ", "+ ", "- ", "(a b ", "$x", "' ", "'x", "\"x", "*x", "5,",
    "% ", "?", "likely ", "final ", "、", "；", "A、", "A和", "或",
]
KINDS = [CHOICE, {"answer_type": "number", "answer": 7}, {"answer_type": "segment", "answer": [1, 2]},
         {"answer_type": "open_ended", "answer": "red"}]
LIMIT_S = 0.5  # of a grading; a reader that is quadratic in such texts takes minutes


def grades_in_time(text):
    for question in KINDS:
        start = time.process_time()
        if not 0 <= grade(text, question) <= 1 or time.process_time() - start > LIMIT_S:
            return False
    return True


@pytest.mark.parametrize("step", [pytest.param(5, marks=pytest.mark.slow), 13])
def test_ten_thousand_characters_of_anything_take_no_time(step):
    rng = random.Random(0)
    texts = []
    for piece in PIECES[::step]:
        texts += ["B" + piece * 10_000, "the answer is " + piece * 10_000 + "B",
                  "".join(rng.choice([piece, rng.choice(PIECES)]) for _ in range(10_000))]
    check_all([(text,) for text in texts], grades_in_time)


def test_grading_a_long_answer_takes_no_time():
    check_all([(text,) for text in (
        "\\boxed{x" + " " * 800 + "y", "\\boxed{x" + "}" * 9000 + "y", "\\boxed{" * 100_000,
        "A" + ")" * 1_000_000 + "x", "answer is option " * 50_000, "1," * 500_000, "9" * 1_000_000)],
        grades_in_time)


def test_long_options_take_no_time():
    options = ["a " * 5000, "a " * 4999 + "b", "A or " * 2000, "x" * 10_000]
    start = time.process_time()
    for text in ("B. " + "a " * 4999 + "c", "x" * 10_000, "The answer is " + "a " * 4990,
                 "A. " + "A or " * 1990, *options):
        read_letter(text, options)
    assert time.process_time() - start < 1


@pytest.mark.parametrize("number", [pytest.param(10_000, marks=pytest.mark.slow), 2000])
def test_no_text_can_raise(number):
    rng = random.Random(0)
    texts = ["".join(rng.choice(PIECES) for _ in range(rng.randint(0, 12))) for _ in range(number)]
    check_all([(text,) for text in texts], lambda text: (
        read_letter(text, COLOURS) in (None, *"ABCD") and isinstance(plain(text), str)
        and isinstance(normalise(text), str) and all(0 <= grade(text, question) <= 1 for question in KINDS)))


# ---------------------------------------------------------------------- rows of files, before they are played
ROW = {"id": "1", "video": "a.mp4", "question": "Which?", "options": ["blue", "red"], "answer": "B",
       "answer_type": "multiple_choice", "source": "x", "evidence": [[1, 2.5]], "meta": {"kind": "detail"}}
NUMBER = ROW | {"answer_type": "number", "answer": 7}
SEGMENT_ROW = ROW | {"answer_type": "segment", "answer": [1, 2]}
WORDS = ROW | {"answer_type": "open_ended", "answer": "Paris", "options": None}
CUT, HUGE, NAN, INF = "a\ud83d", 10**400, float("nan"), float("inf")
DEEP = json.loads("[" * 900 + "]" * 900)


def without(row, key):
    return {k: v for k, v in row.items() if k != key}


GOOD_ROWS = [
    ROW, NUMBER, SEGMENT_ROW, WORDS, ROW | {"answer": "b"}, ROW | {"answer": " B "}, ROW | {"evidence": None},
    ROW | {"evidence": []}, ROW | {"meta": None}, ROW | {"meta": {}}, ROW | {"source": None},
    without(ROW, "source"), without(without(ROW, "meta"), "evidence"), NUMBER | {"answer": "7"},
    NUMBER | {"answer": 0}, NUMBER | {"answer": -1.5}, NUMBER | {"answer": "-1e3"},
    NUMBER | {"options": None}, SEGMENT_ROW | {"answer": [0, 0.5]}, WORDS | {"answer": 12},
    WORDS | {"options": []}, WORDS | {"answer": "巴黎"}, ROW | {"overview_frames": [0, 3.0]},
    ROW | {"overview_frames": None}, ROW | {"question": "Which 🎬?\u2028é\u0000"},
    ROW | {"options": ["A. x", "B. y"]}, ROW | {"options": ["A", "B"]}, ROW | {"options": ["C", "C++", "C#"]},
    ROW | {"options": [str(n) for n in range(26)], "answer": "Z"},
    ROW | {"meta": {"n": [1, {"a": None}], "kind": None}}, ROW | {"more": [1, "x"]},
    *(ROW | {"options": value} for value in (
        ["red", "Red"], ["red", "red"], ["red", ""], ["", ""], ["red", " "], ["A. red", "B. red "],
        ["a", "b", "b"])),
    ROW | {"evidence": [[1, 1]]}, ROW | {"evidence": [[0, 0], [1, 2]]},
    ROW | {"meta": {"uniform_accuracy": {"8": 0.5}, "kind": "detail", "duration_s": 120.0}},
]
BAD_ROWS = [
    None, [], "x", 3, True,
    *(without(ROW, key) for key in ("id", "video", "question", "answer", "answer_type")),
    *(ROW | {key: value} for key in ("id", "video", "question", "answer_type") for value in (
        None, "", " ", 3, 1.5, True, False, ["a"], {"a": 1}, [], {}, CUT, NAN, HUGE)),
    # the letter
    *(ROW | {"answer": value} for value in (
        "AB", "", " ", "C", "BA", "ABC", "B.", "(B)", "red", 1, 1.0, True, None, ["B"], {"B": 1}, CUT, NAN,
        "B\ud83d", "ß", "Ｂ", "\n", "B B")),
    # options
    *(ROW | {"options": value} for value in (
        None, [], ["red"], ["red", 3], ["red", None], ["red", True],
        ["red", ["x"]], "AB", {}, 0, "", {"A": "x", "B": "y"},
        ["red", CUT], ["red", NAN], True, [str(n) for n in range(27)], [""] * 27)),
    WORDS | {"options": ["x", ""]}, NUMBER | {"options": ["7", " "]},
    WORDS | {"options": "x"}, WORDS | {"options": {}},
    WORDS | {"options": [str(n) for n in range(27)]},
    # numbers, segments and words
    *(NUMBER | {"answer": value} for value in (
        NAN, INF, -INF, HUGE, -HUGE, 10**5000, "nan", "inf", "-Infinity", "1e999", "seven", "1,234", " ",
        True, False, [7], {"n": 7}, CUT, "7" + CUT)),
    *(SEGMENT_ROW | {"answer": value} for value in (
        [1], [1, 2, 3], [], [2, 1], [1, 1], [-1, 2], ["1", "2"], "12", "[1, 2]", [NAN, 2], [1, NAN], [1, INF],
        [-INF, 1], [1, HUGE], [True, 2], [0, True], [None, 1], [[1], [2]], {"0": 1, "1": 2}, 3, True,
        [1, "2"], [1, CUT])),
    *(WORDS | {"answer": value} for value in (
        " ", ".", "?!", "a\ud83d", True, ["x"], {"x": 1}, NAN, INF, HUGE, "**")),
    # evidence, frames, the rest
    *(ROW | {"evidence": value} for value in (
        "", "x", 0, 3, True, False, {}, {"a": 1}, [1, 2], [[1]], [[1, 2, 3]], [[2, 1]], [[-1, 2]], [[-1, -1]],
        [[1, NAN]], [[1, INF]], [[NAN, NAN]], [[1, HUGE]], [["1", "2"]], ["12"], [None], [[None, 2]],
        [[0, True]], [[1, 2], [4, 3]], [[1, 2], []], [{}], [[[1], [2]]], [[1, 2], "34"])),
    *(ROW | {"overview_frames": value} for value in (
        "all", "", 0, 3, True, False, {}, [NAN], [INF], [-INF], [-1], [HUGE], ["1"], [True], [None], [[1]],
        [1, "2"], [CUT])),
    *(ROW | {"meta": value} for value in (
        "", "x", 0, 1, True, False, [], [1], {"a": NAN}, {"a": [1, {"b": INF}]}, {"a": CUT}, {CUT: 1},
        {"a": ["x", {"b": CUT}]}, {"kind": ["x"]}, {"kind": 3}, {"kind": {}}, {"kind": CUT}, {"a": 10**5000},
        {"uniform_accuracy": {"8": 0.5}}, {"uniform_accuracy": {}, "kind": "detail", "duration_s": "120"})),
    *(ROW | {"source": value} for value in (3, True, ["x"], {}, CUT)), ROW | {CUT: 1}, ROW | {"more": NAN},
    ROW | {"more": CUT}, ROW | {"video": "a\0.mp4"}, ROW | {"answer_type": "letter"},
    ROW | {"answer_type": "x\ny" * 5000}, NUMBER | {"answer": "seven\n" * 5000},
]
TRAJECTORIES = [  # what is otherwise than in a good one, whether it is good
    ({}, True), ({"learn": [False, True]}, True), ({"provenance": None}, True),
    ({"provenance": {"max_zooms": 1}}, True), ({"turns": ["x", ""]}, True), ({"kind": "exemplar"}, True),
    *(({"turns": value}, False) for value in (
        None, [], "xy", ["x"], ["x", 3], ["x", None], ["x", CUT], [["x"], "y"], {"x": 1, "y": 2}, 3, True,
        ["x", NAN])),
    *(({"learn": value}, False) for value in (
        None, [], [True], [True] * 3, [1, 1], [0, 1], ["true", "true"], [None, True], "tt", {}, True,
        [True, NAN], {"a": True, "b": True}, [[True], True])),
    *(({"provenance": value}, False) for value in (
        "x", 3, [], [1], {"max_zooms": None}, {"max_zooms": "4"}, {"max_zooms": -1}, {"max_zooms": True},
        {"max_zooms": 1.5}, {"seed": NAN}, {"teacher": CUT})),
    *(({"question": value}, False) for value in (None, [], "x", {}, ROW | {"answer": "AB"})),
]


def is_one_line(reason):
    """Whether a reason is a short line that can be printed."""
    return bool(reason) and len(reason.splitlines()) == 1 and len(reason) < 300 and bool(reason.encode())


def test_rows_that_can_be_used():
    check_all([(row,) for row in GOOD_ROWS], lambda row: (
        question_error(row) is None and question_error(json.loads(json.dumps(row))) is None))


def test_rows_that_can_not():
    check_all([(row,) for row in BAD_ROWS], lambda row: (
        is_one_line(question_error(row))
        and trajectory_error({"question": row, "turns": ["x"], "learn": [True]})))


def test_trajectory_rows():
    def holds(change, is_good):
        reason = trajectory_error({"question": ROW, "turns": ["x", "y"], "learn": [True, True]} | change)
        return reason is None if is_good else len(reason.splitlines()) == 1

    check_all(TRAJECTORIES, holds)
    check_all([(row,) for row in (None, [], "x", 3, {})], trajectory_error)


# ---------------------------------------------------------------------------------------------- files of rows
def lines_of(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def test_a_row_ends_at_the_end_of_its_line_alone(tmp_path):
    path = tmp_path / "q.jsonl"

    def holds(inside, ending):
        text = f"What{inside}now{inside}"
        raw = lines_of(ROW | {"question": "QQ"}, ROW | {"id": "2"}).replace("QQ", text)  # not escaped either
        path.write_bytes(raw.replace("\n", ending).encode())
        rows, bad = read_questions(path, 0)
        path.write_bytes((raw + "{").encode())
        cut, places = read_questions(path, 0.5)
        return (not bad and [row["id"] for row in rows] == ["1", "2"] and rows[0]["question"] == text
                and len(cut) == 2 and [where for where, _ in places] == ["line 3"])  # as an editor counts

    check_all([(inside, ending) for ending in ("\n", "\r\n", "\n\n \n") for inside in (
        "\u2028", "\u2029", "\x85", "\x0c", "\x0b", "\x1c", "\x1d", "\x1e", "\t", "é🎬", "\ufeff", "\xa0")],
        holds)


def test_a_byte_order_mark_costs_nothing(tmp_path):
    """Of questions, also in the middle of files that were joined; of prompts and chosen frames."""
    path = tmp_path / "q.jsonl"
    first, second = lines_of(ROW, ROW | {"id": "2"}), lines_of(ROW | {"id": "3"})
    path.write_bytes(first.encode("utf-8-sig") + second.encode("utf-8-sig"))
    rows, bad = read_questions(path, 0)
    assert not bad and [row["id"] for row in rows] == ["1", "2", "3"]
    (tmp_path / "zoom_config.json").write_bytes("{}".encode("utf-8-sig"))
    (tmp_path / "prompt").write_bytes("Regarde bien, é.\n".encode("utf-8-sig"))

    def prompt(name):
        config = RunConfig(system_prompt=str(tmp_path / name))
        return run_environment(tmp_path, config).system_prompt

    assert prompt("prompt") == "Regarde bien, é."
    (tmp_path / "prompt").write_bytes("Look.".encode("utf-16"))
    for name in ("prompt", "nothing"):
        with pytest.raises(UserError, match=f"cannot read .*{name}"):
            prompt(name)
    chosen = [{"video_name": "x/a.mp4", "question": "Which?", "frame_idx": [3]}]
    (tmp_path / "f.json").write_bytes(json.dumps(chosen).encode("utf-8-sig"))
    choose = lambda: with_chosen_frames([ROW], RunConfig(overview=str(tmp_path / "f.json"), max_bad=0))
    assert choose() == ({0: ROW | {"overview_frames": [3.0]}}, [])
    for text in ("[" * 100_000, json.dumps([chosen[0] | {"frame_idx": [HUGE]}]), "9" * 5000, "{", "3"):
        (tmp_path / "f.json").write_text(text)
        with pytest.raises(UserError, match="cannot read --overview"):
            choose()


def test_files_in_another_encoding_are_one_line(tmp_path):
    path = tmp_path / "q.json"
    config = RunConfig(overview=str(path))
    for data in (*(lines_of(ROW).encode(name) for name in ("utf-16", "utf-16-le", "utf-16-be", "utf-32")),
                 b"\xff\xfe", b"\x00\x01\xfe",
                 lines_of(ROW | {"question": "Wo ist Käse?"}).encode("latin-1"), None):
        if data is None:
            path.unlink()
            path.mkdir()
        else:
            path.write_bytes(data)
        for read in (lambda: read_questions(path, 1), lambda: read_text(path),
                     lambda: with_chosen_frames([ROW], config)):
            with pytest.raises(UserError, match="cannot read .*q.json") as raised:
                read()
            assert len(str(raised.value).splitlines()) == 1
    with pytest.raises(UserError, match="cannot read"):
        read_text("a\0b")


def test_rows_that_break_a_reader_are_bad_rows(tmp_path):
    path, good = tmp_path / "q.jsonl", lines_of(*(ROW | {"id": str(n)} for n in range(20)))
    deep = json.dumps(ROW | {"meta": {"x": DEEP}})  # as deep as that may do
    bad_lines = [
        "[" * 100_000, '{"a":' * 100_000, '{"meta": ' + "[" * 990 + "]" * 990 + "}", "9" * 5000,
        '{"id": ' + "9" * 5000 + "}", deep, json.dumps(NUMBER | {"answer": HUGE}),
        json.dumps(NUMBER | {"answer": NAN}), json.dumps(ROW | {"question": CUT}), "null", "[]", '"x"', "{}",
        "{", '{"id": "1"', lines_of(ROW).strip() + ",", json.dumps(ROW | {"evidence": [[0, HUGE]]})]
    path.write_text(good + "\n".join(bad_lines))
    rows, bad = read_questions(path, 1)
    expected = {f"line {21 + n}" for n, line in enumerate(bad_lines) if line != deep}
    assert len(rows) in (20, 21) and expected <= {where for where, _ in bad}
    assert all(len(reason.splitlines()) == 1 and len(reason) < 400 for _, reason in bad)
    with pytest.raises(UserError, match="line 21"):
        read_questions(path, 0.1)
    rows = [{"question": ROW, "turns": ["x", text], "learn": [True, True]} for text in ("y", CUT)]
    path.write_text("\n".join(map(json.dumps, rows)))
    rows, bad = read_trajectories(path, 0.5)
    assert len(rows) == 1 and bad[0][0] == "line 2" and "turns" in bad[0][1]


@pytest.mark.skipif(sys.flags.utf8_mode, reason="this interpreter reads all files as UTF-8")
def test_files_are_utf_8_whatever_the_locale(tmp_path):
    """What was read is written and read again, with a locale that knows ASCII alone."""
    row = ROW | {"question": "Où est le café ☕\u2028？", "options": ["蓝色", "红色"]}
    chosen = [{"video_name": "x/a.mp4", "question": row["question"], "frame_idx": [3]}]
    (tmp_path / "q.jsonl").write_bytes(lines_of(row).encode())
    (tmp_path / "f.json").write_bytes(json.dumps(chosen, ensure_ascii=False).encode())
    before = locale.setlocale(locale.LC_CTYPE)
    locale.setlocale(locale.LC_CTYPE, "C")
    try:
        (tmp_path / "plain").write_bytes("é".encode())
        with pytest.raises(UnicodeDecodeError):
            (tmp_path / "plain").read_text()
        rows, _ = read_questions(tmp_path / "q.jsonl", 0)
        write_jsonl(tmp_path / "w.jsonl", rows)
        again, _ = read_questions(tmp_path / "w.jsonl", 0)
        known, _ = with_chosen_frames(rows, RunConfig(overview=str(tmp_path / "f.json"), max_bad=0))
    finally:
        locale.setlocale(locale.LC_CTYPE, before)
    assert rows == again == [row] and known[0]["overview_frames"] == [3.0]
    assert json.loads((tmp_path / "w.jsonl").read_bytes()) == row
