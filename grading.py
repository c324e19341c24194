"""Grading: what an answer text says, however it is wrapped. Nothing raises, all is linear.

    number     about −3 s -> -3; two numbers are wrong
    segment    01:05 – 1 min 20 s -> 65 s to 80 s
    letter     in four stages, each a function or a pattern below:
      plain    width, LaTeX, markup     （B）   **B**   $B$   \\boxed{\\mathbf{B}}   <b>B</b>             -> B
      lead     the letter comes first   b   (b)   B. red   B - red   B、红色   B\\nIt is red.   B, not A   -> B
      phrase   words lead to it         So the answer is B.   I'd choose (B)   B is correct   答案是B    -> B
      text     of one option            red   The red.   The answer is red.   B red          -> its letter

A letter counts where it stands for an option (not in: A car, I think, T-shirt, team B) and is not denied (not
B; B is wrong). Two letters name none (A or B; The answer is A. No, B.), nor one with another option's text.
"""

import math
import re
import unicodedata

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # of options


def grade(answer, question):
    """How right an answer text is, from 0 to 1: exact for a letter, a number (relative 1e-6) or normalised
    text, the intersection over union for a time segment."""
    if answer is None:
        return 0.0
    truth, kind = question["answer"], question["answer_type"]
    answer = answer[:10_000]
    if kind == "multiple_choice":
        return float(read_letter(answer, question.get("options") or []) == str(truth).strip().upper())
    if kind == "number":
        numbers = [float(n.replace(",", "")) for n in NUMBER.findall(MINUS.sub("-", plain(answer)))]
        return float(len(numbers) == 1 and math.isclose(numbers[0], float(truth), rel_tol=1e-6, abs_tol=1e-9))
    if kind == "segment":
        times_s = read_times(plain(answer))
        if len(times_s) != 2 or not times_s[0] < times_s[1]:
            return 0.0
        both = max(0.0, min(times_s[1], truth[1]) - max(times_s[0], truth[0]))
        return both / (times_s[1] - times_s[0] + truth[1] - truth[0] - both)
    return float(bool(normalise(truth)) and normalise(answer) == normalise(truth))


def read_untagged(text):
    """The answer text of a turn without <answer> tags: its last line with a word, after </think> if there is
    one; or None."""
    lines = [line.strip() for line in text.rpartition("</think>")[2].splitlines() if re.search(r"\w", line)]
    return lines[-1] if lines else None


def last_answer(text):
    """What stands in the last <answer> of a text, or all of it where there is none."""
    return text.rpartition("<answer>")[2].partition("</answer>")[0].strip()


# ------------------------------------------------------------------------------------------------ plain text
SMALL = "²³¹¼-¾⁰-₉⅐-⅟①-⒛⓪-⓿"  # no digits of a number: 10² is not 102


def plain(text):
    """A text without what it is wrapped in: wide letters, kinds of dashes, LaTeX (what is boxed, if anything,
    is all that was said), HTML, markdown, quotes. Lines stay lines."""
    fold = lambda match: unicodedata.normalize("NFKC", match[0])
    text = re.sub(rf"(?<=\d)[{SMALL}]+", lambda match: " ^ " + fold(match), text)
    text = re.sub(rf"[^{SMALL}]+", fold, text)[:20_000].translate(str.maketrans("‘’【】", "''[]"))
    text = re.sub("[\u00ad\u200b-\u200f\u2060\ufeff]", "", text)
    text = re.sub(r"(?<=[^\W\d_])\s*[—―]+", " - ", text)  # after a word it is no sign
    text = re.sub(r"\\+", r"\\", re.sub(r"[‐-―−]", "-", text)).replace("{,}", ",")
    for _ in range(3):  # nested
        text = re.sub(r"\\(?:text|math)[a-z]*\s*\{([^{}]*)\}", r" \1 ", text)
    if boxes := re.findall(r"(?:boxed|fbox)\s*\{+([^{}]*)\}", text):
        text = " or ".join(dict.fromkeys(box.strip() for box in boxes))
    text = re.sub(r"\\(?:[a-zA-Z]+|[()\[\],;:!])?|[{}]|\$(?!\d)", " ", text)
    text = re.sub(r"<(?![A-Z]>)[/|]*[a-zA-Z][^<>]{0,60}>", " ", text)
    text = re.sub(r"(?m)^[^\S\n]*[#>]+|[*`\"“”„«»「」『』]|\b_+|(?<!_)_+\b|\B'|'\B", " ", text)
    return re.sub(r" ?\n\s*", "\n", re.sub(r"[^\S\n]+", " ", text)).strip()


def normalise(text):
    """Lower case, without markup, articles, punctuation and extra white space."""
    text = re.sub(r"\b(?:a|an|the) (?=[a-z])", "", plain(str(text)).lower())  # an article, not the answer "A"
    return " ".join(word.strip(".") for word in re.sub(r"[^\w\s.%-]", " ", text).split()).strip()


# ----------------------------------------------------------------------------------------- numbers and times
NUMBER = re.compile(r"(?:(?<![\w-])[-+])?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,3})?|\.\d+)")
MINUS = re.compile(r"(?:\b(?:minus|negative)\s+|负)(?=[\d.])", re.IGNORECASE)
N, HOUR = r"(\d+(?:\.\d+)?|\.\d+)", r"\s*(?:h(?:ou)?rs?|h|小时)(?![a-z])"
MINUTE = r"\s*(?:min(?:ute)?s?|m|分钟?)(?![a-z])"
TIME = re.compile(rf"""(?<![\d:])(?<!\d\.)(?:
    (?:(\d+):(?=[0-5]?\d:))?(\d+):([0-5]?\d(?:\.\d+|,\d{{3}})?)(?![\d:])  # 1:05, 00:01:05.5
    | (?:{N}{HOUR}[\s,]*)?{N}{MINUTE}  # 1 min, 1 min 5 s
      (?:\s*(?:,|and\b)?\s*([0-5]?\d(?:\.\d+)?)(?![\d.:]|{HOUR}|{MINUTE}))?
    | {N}{HOUR} | {N}(?![\d:]))""", re.VERBOSE | re.IGNORECASE)  # 1 h; 65, in seconds


def read_times(text):
    """All times in a plain text, in seconds; none if one of them is negative."""
    if re.search(r"(?:^|[\[(,:]|\b(?:to|and|from)\b)\s*-[\d.]", text):
        return []
    one_unit = rf"(?<![\d:.]){N}(\s*(?:-|~|to|and|到|至)\s*)(?={N}({MINUTE}|{HOUR})\W*$)"  # 1 to 2 min
    text = re.sub(one_unit, r"\1\4\2", text)
    units = (3600, 60, 1, 3600, 60, 1, 3600, 1)
    return [sum(float(x.replace(",", ".")) * unit for x, unit in zip(match.groups(), units) if x)
            for match in TIME.finditer(text)]


# ------------------------------------------------------------------------------------------------- a letter
def option_texts(options):
    """Options without the letters that they carry ("C.three", "D、four", "(a) x"), where each carries its own:
    "a cat", "I.V. line", "A、B" and "(a)(c)(b)" carry none."""
    own = r"(?!\(\w\)\(\w\))\s*[(\[（【]?(?i:[{}{}])[.)\]:、．）：】](?:\s+|(?![A-Z](?![A-Za-z])))(?=\S)"
    owns = [re.match(own.format(letter, chr(ord(letter) + 0xFEE0)), option)  # as wide as Ａ, too
            for letter, option in zip(LETTERS, options)]
    texts = [option[own.end():].strip() for own, option in zip(owns, options) if own]
    return texts if len(texts) == len(options) else list(options)


# A letter that stands for an option comes first, or after a sign or one of these words ...
LETTER = r"([A-Za-z])(?![A-Za-z0-9'_+#])"
# in these lists of words _ is a space and * a word's beginning
any_of = lambda words: rf"\b(?i:{'|'.join(words.split())})\b".replace("_", r"\s").replace("*", r"\w+")
LEADS = any_of("""
    is are be was it's that's like as that for to on of from go_with going_with or and nor else but then
    wait also vs versus either both neither between first answers? ans options? choices? letters? final
    correct so thus therefore hence yes no sure okay choose choosing pick select guess say think believe
    conclude vote makes? making maybe perhaps likely indeed *ly""")
BEFORE = rf"""(?:^ | [,:;(\[/&|>=→、。\n]\s* | (?<![MDv][rs])[.!?)\]+-]\s+ | \s(?=[A-Z]\)) | {LEADS}\.?\s+
    | (?<=[是选择项案为答和或者与及])\s* | (?:所以|因此)\s*)[(\[]{{0,3}}"""
# ... and before a sign; if a capital ("a because" is none), also before these words, or that it is right.
SIGN = r"(?=\s*(?:$ | [,:;!?)\]/&|>=→+。、…] | \.(?!\w\b) | -+[\s>])) | (?=\n)"
WORD = any_of("not but rather instead because since as it_is I_think for_sure")
IS = any_of("is seems looks appears would_be must_be should_be") + r"(?:\sto\sbe)?"
CORRECT = any_of("correct right true best answer accurate appropriate")
RIGHT = rf"""[)\]]?(?:\s?(?:选项)?[是为]?[正对] | \s(?:best\s)?{any_of("matches fits describes the_correct")}
    | \s{IS}(?:\s{any_of("the my most final *ly")})*\s{CORRECT})"""
# A weak mention names none, but hinders another letter: A or ..., A is blue.
WEAK = rf"""\W{{0,3}}\bor\b | \s(?:and|nor)\b | \s?[和或与还及都]
    | (?<=[^I])(?!{RIGHT})\s{any_of("is are was to then with vs versus no wait maybe perhaps")}"""
MENTION = re.compile(rf"""{BEFORE}{LETTER}(?:(?P<weak>(?i:{WEAK})) | {SIGN}
    | (?<=[A-Z])(?:(?=\s*[(\[] | \s?[选项因] | \s{WORD}) | {RIGHT}))""", re.VERBOSE)
# It is denied where these come before it, with nothing between but such words and other letters, or after it.
DENIES = any_of("""not never cannot neither nor except than instead_of unlike wrong incorrect false exclude
    eliminate rules?_out anything_but everything_but all_but doubt""")
BETWEEN = any_of("""the an? option choice letter answer correct right choose pick select go going with be is
    to it that think believe say *ly""")
DENIED = re.compile(rf"""(?:{DENIES} | ^(?i:no)\b | n't\b | [不非别除])
    (?:[\s(\[:] | [是选项应该答案能会可择了] | {BETWEEN})*
    (?:[A-Z][)\]]?\s*(?:[,/] | (?:or|nor|and)\b | 就是)\s*[(\[]?)*$""", re.VERBOSE)
WRONG = any_of("wrong incorrect false unlikely impossible ruled_out eliminated excluded")
DENIED_AFTER = re.compile(rf"""[)\]]?\s?(?:(?:is|are|was|were|would|can|could|do|does|must)\s?(?:not|n't)\b
    | cannot\b | \w{{2,12}}\s(?:\w{{2,12}}\s)?{WRONG} | \W{{0,2}}(?i:no|wrong|incorrect|false)\W*$
    | (?:选项)?是?[不错])""", re.VERBOSE)
SEPARATOR = re.compile(r"^(?:[\s)\].,:;、。=→|(\[]|[-=]+>|-+(?=\s))+")  # between a letter and its option's text


def read_letter(text, options):
    """The letter of the option that an answer text names, or None; above is how."""
    options, said = option_texts(options), plain(text)
    letters = LETTERS[:len(options)]
    bare = lambda text: text.strip(" \n.,:;)]").casefold()  # first: C++ is not C
    known = [(form, [form(option) for option in options]) for form in (bare, normalise)]

    def owner(text):
        """The letter of the only option with this text, or None."""
        for form, forms in known:
            if (same := form(text)) and forms.count(same) == 1:
                return letters[forms.index(same)]

    def whole(text):
        """The letter, where a letter, an option's text or both are all that is said; else None."""
        first = re.match(rf"[^\w+#=~!¬≠]*{LETTER}(.*)", text, re.DOTALL)
        if first and first[1].upper() in letters and not re.search(r"[\w+#=]", first[2]):
            return first[1].upper()  # before the texts: the prompt asks for it
        if letter := owner(text):
            return letter
        if first and first[1] in (owner(SEPARATOR.sub("", first[2])), owner(first[2].removeprefix("-"))):
            return first[1]  # B red, B-red

    # a letter, an option's text, or both are all that is said
    if letter := whole(said) or owner(text):
        return letter
    # or all that is said after the last "answer"
    leads = list(re.finditer(r"(?i)\b(?:answer|option|choice)\b(?: is)?\s*:?|答案[是为]?:?", said))
    if leads and (letter := whole(said[leads[-1].end():])):  # The answer is red
        said = f"{said[:leads[-1].end()]} {letter}"
    # an option that names letters itself counts as its own letter
    for letter, option in zip(letters, options):
        if len(option) > 1 and re.search(rf"\b{LETTER}", option):  # D. Both A and B
            said = re.sub(rf"(?<!\w){re.escape(option)}(?!\w)", letter, said, flags=re.IGNORECASE)
    # one letter is mentioned and not denied
    mentions = [match for match in MENTION.finditer(said) if not is_denied(said, *match.span(1))]
    named = [m for m in mentions if m["weak"] is None]
    if len({m[1].upper() for m in mentions}) != 1 or not named or named[0][1].upper() not in letters:
        return None
    # and no other option's text follows it
    letter = named[0][1].upper()
    rest = SEPARATOR.sub("", said[named[0].end(1):])
    for part in (rest, rest.partition("\n")[0], re.split(r"[.;。](?:\s|$)", rest)[0]):
        if owner(part):
            return letter if owner(part) == letter else None  # A. red
    return letter


def is_denied(said, start, end):
    """Whether the letter at [start, end) of a text is denied by what stands before or after it."""
    return bool(DENIED.search(said[max(0, start - 60):start]) or DENIED_AFTER.match(said, end))
