"""Options, answers and times in the shapes of annotation files, brought to ours; what is not clear is named.

    options    ["a", "b"]   ["A. a", "B. b"]   {"A": "a", "B": "b"}   "['a', 'b']"
               or at the end of the question's text: (A) a, A) a, A. a, A.a, A：a, a line each or in one line
    answer     B   b   B.   (B)   <answer>B</answer>   B. b   the text of an option

What cannot be read raises RowFault.
"""

import ast
import json
import math
import re

from grading import LETTERS, normalise, option_texts

MARK = r"[(\[（【]?([A-Z])[.)\]:、．）：】]"  # of an option: (A), A), A., A：
MARKED = re.compile(rf"\s*{MARK}(?![A-Z]\.)\s*(.*)")  # an option with its letter
LINE_MARK = re.compile(rf"^[^\S\n]*{MARK}(?![A-Z]\.)", re.MULTILINE)  # at the beginning of a line
WORD_MARK = re.compile(rf"(?:^|(?<=\s)){MARK}(?=\s*\S)")  # anywhere, with a text behind it
HEADER = re.compile(r"(?:\n\s*(?i:options?|choices|candidates)\s*[:：]?"
                    r"|\s(?:Options?|Choices|Candidates)[:：])\s*$")  # before the options in the question
NAMED = re.compile(rf"""[\s(\[（【*"'.]*([A-Za-z])[\s)\]）】*"'.:：,]*|{MARK}\s*(\S.*)""", re.DOTALL)

# LaTeX that begins like an escape, without its first letter
TAB = ("(?:heta|imes|ext(?:bf|it|rm|tt|sf|sc|color|style|normal)?|au|ilde|frac|binom|riangle[a-z]*|herefore"
       "|anh)")
RETURN = "(?:ho|ight[a-z]*|angle|ceil|floor)"
LATEX = f"(?:t(?:{TAB}|an|o|op)|n(?:u|eq?|eg|ot|otin|abla|leq|geq|mid|exists|earrow|warrow))(?![A-Za-z])"
# a path of Windows; what JSON and Python write after a backslash; a backslash with something else behind it
ESCAPE = re.compile(rf"""(?<!\w)[C-Zc-z]:(?:\\\w[\w.-]*){{2,}}|\\(?:[\\'"/]|(?!{LATEX})[nt]|r(?=\\n|['"])"""
                    r"|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U00[01][0-9a-fA-F]{5}|)")
# what JSON makes of a backslash that was not escaped; also characters that no text has
EATEN = re.compile(rf"[\b\f](?=[A-Za-z])|\t(?={TAB}(?![A-Za-z]))|\r(?={RETURN}(?![A-Za-z]))")
CONTROL = re.compile(rf"{EATEN.pattern}|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


class RowFault(ValueError):
    """RowFault(reason, details): what is wrong with a row. Rows with the same fault have the same reason, as
    they are counted by it."""

    def __str__(self):
        return ": ".join(filter(None, self.args))


def without_nan(value):
    """A value in which nan is None, at any depth: files that pandas wrote have it where nothing is."""
    if isinstance(value, dict):
        return {key: without_nan(inside) for key, inside in value.items()}
    if isinstance(value, list):
        return [without_nan(inside) for inside in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def first_of(raw, *keys):
    """The first of these fields that is there and says something. Raises KeyError."""
    for key in keys:
        if raw.get(key) not in (None, "", []):
            return raw[key]
    raise KeyError(keys[0])


def letter_at(index):
    """The letter of an option that is counted from 0."""
    if not re.fullmatch(r"1?\d(\.0)?", str(index)):
        raise RowFault("no right option", f"its number is {str(index)[:60]}")
    return LETTERS[int(float(index))]


# ---------------------------------------------------------------------------------------------------- options
def read_list(value):
    """A list, from a list or from the text of one, as JSON or Python writes it; but a backslash that stands
    before LaTeX or another thing that they do not write so is one, as if it were escaped."""
    if isinstance(value, str):
        text = escaped(value.strip())
        for read in (json.JSONDecoder(strict=False).decode, ast.literal_eval):
            try:
                value = read(text)
                break
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
    return value


def escaped(text):
    """The text of a list with each backslash doubled that begins no escape of JSON or Python."""
    is_raw = any(match[0] == "\\" for match in ESCAPE.finditer(text))

    def mend(match):
        line_end = is_raw and match[0] == r"\\" and not text[match.end():][:1].isalpha()  # of a matrix
        if match[0] == "\\" or line_end or match[0][0] != "\\":
            return match[0].replace("\\", r"\\")
        return match[0].replace(r"\/", "/")

    return ESCAPE.sub(mend, text)


def without_control(text):
    """A text without control characters: what was a backslash and a letter is that again, others become
    spaces."""
    return CONTROL.sub(" ", EATEN.sub(lambda match: json.dumps(match[0])[1:-1], text))


def read_options(value):
    """The options' texts without their letters, [] where there are none."""
    text, value = value, read_list(value)
    joined = isinstance(text, str) and isinstance(value, list) and len(value) < 2  # texts without commas
    if joined and re.search(r"['\"]\s+['\"]", text):
        raise RowFault("options are an array as NumPy prints it", text[:60])
    if value in (None, "", [], {}):
        return []
    if isinstance(value, str):
        before, value, after = split_options("?\n" + value)
        if not value or before != "?" or after:
            raise RowFault("options are not a list", repr(text[:60]))
    if isinstance(value, dict):
        by_letter = {str(key).strip(" .()").upper(): text for key, text in value.items() if text is not None}
        if sorted(by_letter) != list(LETTERS[:len(by_letter)]):
            raise RowFault("options have other keys than letters", ", ".join(by_letter)[:60])
        value = [by_letter[letter] for letter in sorted(by_letter)]
    if not isinstance(value, list):
        raise RowFault("options are not a list", str(value)[:60])
    options = ["" if option is None else str(option).strip() for option in value]
    # a letter alone is an option without text where the others have letters and texts
    marked = [match[2] for match in map(MARKED.fullmatch, options) if match]
    lettered = len(marked) == len(options) and any(marked)
    if "" in options or lettered and "" in marked:
        raise RowFault("an option is empty", str(options)[:60])
    return [option.strip() for option in option_texts(options)]


def split_options(text):
    """(question, options, after) of a text with its options, A first; (text, [], "") where there are none.

    They stand a line each, with nothing between them; `after` are the lines behind the last one. Or they end
    the text in one line, where each letter's mark is there once."""
    text = text.rstrip()
    # a line each: from the last A on
    marks = list(LINE_MARK.finditer(text))
    firsts = [i for i, mark in enumerate(marks) if mark[1] == "A"]
    marks = marks[firsts[-1]:] if firsts else []
    if len(marks) > 1 and in_order(marks):
        question, pieces = cut(text, marks)
        options, behind = [], []
        for piece in pieces:
            option, _, more = piece.partition("\n")
            options.append(option.strip())
            behind.append(more.strip())
        if any(behind[:-1]):
            return text.strip(), [], ""
        return question, options, behind[-1]
    # in one line: (A) a (B) b, or A. a B. b C. c
    marks = list(WORD_MARK.finditer(text))
    brackets = all(mark[0][0] in "([（【" for mark in marks)
    if len(marks) >= (2 if brackets else 3) and in_order(marks):
        question, pieces = cut(text, marks)
        options = [piece.strip() for piece in pieces]
        if all(options):
            return question, options, ""
    return text.strip(), [], ""


def in_order(marks):
    """Whether these matches of MARK are A, B, C, ..."""
    return "".join(mark[1] for mark in marks) == LETTERS[:len(marks)]


def cut(text, marks):
    """(the text before the first mark, the texts behind each mark)."""
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    pieces = [text[mark.end():end] for mark, end in zip(marks, ends)]
    return HEADER.sub("", text[:marks[0].start()]).strip(), pieces


def without_options(text, options):
    """The question's text without the options, where it ends with the same ones as are given."""
    question, inside, after = split_options(text)
    same = [normalise(option) for option in inside] == [normalise(option) for option in options]
    return question if question and same and not after else text.strip()


# ---------------------------------------------------------------------------------------------------- answers
def unwrap(answer):
    """An answer's text without <answer> and \\boxed{}."""
    answer = without_control(str(answer)).strip()
    if tagged := re.findall(r"<answer>(.*?)</answer>", answer, re.DOTALL):
        answer = tagged[-1].strip()
    if boxed := re.fullmatch(r"\$?\\boxed\{(.*)\}\$?", answer, re.DOTALL):
        answer = boxed[1].strip()
    return answer


def read_answer(answer, options, is_letter=False):
    """The letter of the right option, which the answer names by its letter, its text, or both. is_letter: a
    letter is one, and not the text of an option: of A. C, B. B, C. A it means the third."""
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    said = "" if answer is None else unwrap(answer)
    letters = LETTERS[:len(options)]
    # a letter, with what stands around it, and perhaps the option's text
    fits = set()
    if match := NAMED.fullmatch(said):
        letter, text = (match[1] or match[2]).upper(), match[3]
        if letter in letters and (text is None or letter in texts_that_fit(text, options)):
            fits.add(letter)
    if not (fits and is_letter):
        fits |= texts_that_fit(said, options)
    if len(fits) > 1:
        raise RowFault("the answer fits two options", f"{said[:60]!r} fits {', '.join(sorted(fits))}")
    if not fits:
        raise RowFault("no right option", f"the answer is {said[:60]!r}, of {len(options)} options")
    return fits.pop()


def texts_that_fit(text, options):
    """Letters of the options with this text; where there is none, but for case and punctuation at the end;
    where there is none again, but for articles and all punctuation."""
    bare = lambda text: " ".join(text.split()).strip(" .,:;").casefold()
    for form in (str, bare, normalise):
        if found := {letter for letter, option in zip(LETTERS, options) if form(text) == form(option) != ""}:
            return found
    return set()


# ------------------------------------------------------------------------------------------------------ times
def seconds(text):
    """Seconds of a time as 1:02:03.5, 02:03 or 123, also with a comma."""
    match = re.fullmatch(r"\s*(?:(?:(\d+):)?(\d+):)?(\d+(?:[.,]\d+)?)\s*", str(text))
    if not match:
        raise RowFault("a time cannot be read", repr(str(text)[:60]))
    hours, minutes, rest = match.groups()
    return int(hours or 0) * 3600 + int(minutes or 0) * 60 + float(rest.replace(",", "."))


def read_segments(value):
    """[[start_s, end_s], ...] of "00:15-00:19", of several of these with commas between, or of a list of
    pairs."""
    if not isinstance(value, list):
        parts = re.split(r"\s*[,;、]\s*", str(value).strip())
        value = [re.split(r"\s*[-–—~]\s*", part) for part in parts]
    segments = []
    for ends in value:
        if len(ends) != 2:
            raise RowFault("a time reference cannot be read", repr(ends)[:60])
        start_s, end_s = map(seconds, ends)
        if start_s > end_s:
            raise RowFault("a time reference is reversed", f"{start_s:g} s to {end_s:g} s")
        if start_s == end_s:
            raise RowFault("a time reference is empty", f"{start_s:g} s to {end_s:g} s")
        segments.append([start_s, end_s])
    return segments
