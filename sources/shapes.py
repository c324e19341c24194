"""Options, answers and times in the shapes of annotation files, brought to ours; what is not clear is named.

    options    ["a", "b"]   ["A. a", "B. b"]   {"A": "a", "B": "b"}   "['a', 'b']"
               or at the end of the question's text: (A) a, A) a, A. a, A.a, A：a, a line each or in one line
               or there, where the answer names one of them: (a) a, （ａ）a, 1. a, ① a, ii) a
    answer     B   b   B.   (B)   <answer>B</answer>   B. b   the text of an option   its mark: (b), 2, ②, ii

What cannot be read raises RowFault.
"""

import ast
import json
import math
import re
import unicodedata

from grading import LETTERS, normalise, option_texts

MARK = r"[(\[（【]?([A-Z])[.)\]:、．）：】]"  # of an option: (A), A), A., A：
LINE_MARK = re.compile(rf"^[^\S\n]*{MARK}(?![A-Z]\.)", re.MULTILINE)  # at the beginning of a line
WORD_MARK = re.compile(rf"(?:^|(?<=\s)){MARK}(?=\s*\S)")  # anywhere, with a text behind it
HEADER = re.compile(r"(?:\n\s*(?i:options?|choices|candidates)\s*[:：]?"
                    r"|\s(?:Options?|Choices|Candidates)[:：])\s*$")  # before the options in the question
NAMED = re.compile(rf"""[\s(\[（【*"'.]*([A-Za-z])[\s)\]）】*"'.:：,]*|(?i:{MARK})\s*(\S.*)""", re.DOTALL)
# marks of other kinds, in their order: letters of any case and width, numbers, Roman numbers
KINDS = (list(LETTERS.lower()), [str(number) for number in range(1, 27)],
         "i ii iii iv v vi vii viii ix x".split())
OTHER = r"(?:[(\[（【]?([A-Za-zＡ-Ｚａ-ｚ]|\d{1,2}|[ivxIVX]{2,4})[.)\]:、．）：】](?!\d)|([Ⅰ-ⅿ①-ⓩ]))"
OTHER_LINE = re.compile(rf"^[^\S\n]*{OTHER}", re.MULTILINE)
OTHER_WORD = re.compile(rf"(?<=\s){OTHER}(?=\s*\S)")
FILLING = ("", "n/a", "na", "nan", "null", "-")  # of a table's columns of options, behind the last one

# LaTeX that begins like an escape, without its first letter
TAB = ("(?:heta|imes|ext(?:bf|it|rm|tt|sf|sc|color|style|normal)?|au|ilde|frac|binom|riangle[a-z]*|herefore"
       "|anh)")
RETURN = "(?:ho|ight[a-z]*|angle|ceil|floor)"
LINE = ("(?:u|eq?|eg|ot|otin|abla|leq|geq|mid|exists|earrow|warrow|sim|cong|parallel|onumber|less|gtr"
        "|su[bp]set(?:eq)?|[rRlL](?:ight|eft)arrow)")
LATEX = f"(?:t(?:{TAB}|an|o|op)|n{LINE})(?![A-Za-z])"
# a path of Windows; what JSON and Python write after a backslash; a backslash with something else behind it
ESCAPE = re.compile(rf"""(?<!\w)[C-Zc-z]:(?:\\\w[\w.-]*){{2,}}|\\(?:[\\'"/]|(?!{LATEX})[nt]|r(?=\\n|['"])"""
                    r"|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U00[01][0-9a-fA-F]{5}|)")
# what JSON makes of a backslash that was not escaped; also characters that no text has
EATEN = re.compile(rf"[\b\f](?=[A-Za-z])|\t(?={TAB}(?![A-Za-z]))|\r(?={RETURN}(?![A-Za-z]))"
                   r"|\n(?=(?:abla|eq|otin)(?![A-Za-z]))")
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


def control_in(value):
    """The first control character in a text, or in the texts of a list or dict at any depth; or None."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return next(filter(None, map(control_in, value)), None)
    found = CONTROL.search(str(value))
    return found[0] if found else None


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
        field = "?\n" + without_control(value)
        found = split_options(field)
        before, value, after = found if found[1] else split_others(field, KINDS[0])
        if not value or before != "?" or after:
            raise RowFault("options are not a list", repr(text[:60]))
    if isinstance(value, dict):
        by_letter = {str(key).strip(" .()").upper(): text for key, text in value.items()}
        if sorted(by_letter) != list(LETTERS[:len(by_letter)]):
            raise RowFault("options have other keys than letters", ", ".join(by_letter)[:60])
        value = [by_letter[letter] for letter in sorted(by_letter)]
    if not isinstance(value, list):
        raise RowFault("options are not a list", str(value)[:60])
    while value and value[-1] is None:  # a table's columns behind the last option
        value = value[:-1]
    if any(isinstance(option, dict | list) for option in value):
        raise RowFault("an option is no text", str(value)[:60])
    options = ["" if option is None else without_control(str(option)).strip() for option in value]
    # nothing, or a letter alone, is an option without text where the others have letters and texts
    filled = [f"{letter}. \0" if option == "" or re.fullmatch(MARK, option, re.IGNORECASE) else option
              for letter, option in zip(LETTERS, options)] + options[len(LETTERS):]
    texts = option_texts(filled)
    if texts == filled or set(texts) == {"\0"}:
        return options
    return [text.strip("\0").strip() for text in texts]


def without_filling(options, right):
    """Options without what fills a table's columns behind the last one. The right one, whose letter is given,
    is no filling."""
    if not isinstance(options, list):
        return options
    options = ["" if option is None else option for option in options]
    while len(options) > LETTERS.index(right) + 1 and str(options[-1]).strip().lower() in FILLING:
        options.pop()
    return options


def split_options(text):
    """(question, options, after) of a text with its options, A first; (text, [], "") where there are none.

    They stand a line each, with nothing between them; `after` are the lines behind the last one. Or they end
    the text in one line, where each letter's mark is there once."""
    in_line = list(WORD_MARK.finditer(text))
    brackets = all(mark[0][0] in "([（【" for mark in in_line)
    if len(in_line) < (2 if brackets else 3) or in_line != last_list(in_line, KINDS[0]):
        in_line = []
    return split_at(text, last_list(LINE_MARK.finditer(text), KINDS[0]), in_line)


def split_others(text, names):
    """As `split_options`, of marks with these names, of KINDS; in one line they follow a question's end."""
    in_line = last_list(OTHER_WORD.finditer(text), names)
    if in_line and not re.search(r"[?.:？。：]\s*$", text[:in_line[0].start()]):
        in_line = []
    return split_at(text, last_list(OTHER_LINE.finditer(text), names), in_line)


def split_at(text, lines, in_line):
    """(question, options, after) of a text with these marks at the beginning of lines, or else those in one
    line; (text, [], "") where they mark no options."""
    marks = lines or in_line
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    options = [text[mark.end():end] for mark, end in zip(marks, ends)]
    behind = []
    if lines:
        parts = [option.partition("\n") for option in options]
        options, behind = [first for first, _, _ in parts], [more.strip() for _, _, more in parts]
    broken = not lines and any(not option.strip() or "\n" in option.strip() for option in options)
    if not options or any(behind[:-1]) or broken:
        return text.strip(), [], ""
    question = HEADER.sub("", text[:marks[0].start()]).strip()
    return question, [option.strip() for option in options], "".join(behind)


def last_list(marks, names):
    """From these matches of marks the last two or more that have all the names, from the first on; or []."""
    marks = [mark for mark in marks if mark_name(mark) in names]
    found = [mark_name(mark) for mark in marks]
    start = max((i for i, name in enumerate(found) if name == names[0]), default=0)
    found = found[start:]
    return marks[start:] if len(found) > 1 and found == names[:len(found)] else []


def mark_name(match):
    """A mark as KINDS have it: of Ｂ, (b) and ⓑ it is b, of ② it is 2."""
    found = next(filter(None, match.groups()))
    return unicodedata.normalize("NFKC", found).strip("().").lower()


def split_named(text, answer, kinds=KINDS):
    """(question, options, after, answer): as `split_options`, and also where options have other marks and the
    answer names one of these, which gives a letter, or is an option's text. Without such an answer they may
    mark anything that a question lists: events to put in order, statements."""
    capitals = split_options(text)
    if capitals[1]:
        return *capitals, answer
    said = unicodedata.normalize("NFKC", unwrap(answer))
    named = re.match(rf"(?:{OTHER}|(\w{{1,4}})$)\s*(.*)", said, re.DOTALL)
    name, rest = (mark_name(named), named[4]) if named else ("", said)
    for names in kinds:
        found = split_others(text, names)
        letter = LETTERS[names.index(name)] if name in names[:len(found[1])] else None
        if letter and (not rest or letter in texts_that_fit(rest, found[1])):
            return *found, letter
        if len(texts_that_fit(said, found[1])) == 1:
            return *found, said
    return *capitals, answer


def without_numbers(options, answer):
    """(options, answer): of 1. red, 2. blue, where the answer is 2, it makes red, blue and B."""
    question, texts, after, letter = split_named("\n".join(["?", *options]), answer, KINDS[1:])
    if texts_that_fit(unwrap(answer), options) or (question, len(texts), after) != ("?", len(options), ""):
        return options, answer
    return texts, letter


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
    """The letter of the right option, which the answer names by its letter, its text, or both.

    Of several options that are this very text it is the last, and "" names an empty option, as in MLVU's own
    code (github.com/JUNJIE99/MLVU evaluation/multiple_choice_evaluation/choice_bench.py, qa_template).

    is_letter: a letter is one, and not the text of an option: of A. C, B. B, C. A it means the third; and ""
    is no answer."""
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    said = "" if answer is None else unwrap(answer)
    letters = LETTERS[:len(options)]
    # a letter, with what stands around it, and perhaps the option's text
    fits = set()
    if match := NAMED.fullmatch(unicodedata.normalize("NFKC", said)):
        letter, text = (match[1] or match[2]).upper(), match[3]
        if letter in letters and (text is None or letter in texts_that_fit(text, options)):
            fits.add(letter)
    if not (fits and is_letter):
        fits |= texts_that_fit(said, options)
    if answer == "" and not is_letter:
        fits = {letter for letter, option in zip(LETTERS, options) if option == ""}
    if len({options[LETTERS.index(letter)] for letter in fits}) == 1:
        fits = {max(fits)}
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
    pairs. A moment ends where it starts."""
    if not isinstance(value, list):
        parts = re.split(r"\s*[,;、]\s*", str(value).strip())
        value = [re.split(r"\s*[-–—~]\s*", part) for part in parts]
    segments = []
    for ends in value:
        if not isinstance(ends, list) or len(ends) != 2:
            raise RowFault("a time reference cannot be read", repr(value)[:60])
        start_s, end_s = map(seconds, ends)
        if start_s > end_s:
            raise RowFault("a time reference is reversed", f"{start_s:g} s to {end_s:g} s")
        segments.append([start_s, end_s])
    return segments
