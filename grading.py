"""Grading: what an answer text says, however it is wrapped. Nothing raises, all is linear.

    number     about −3 s -> -3; two numbers are wrong
    segment    01:05 – 1 min 20 s -> 65 s to 80 s
    letter     in four stages, each a function or a pattern below:
      plain    width, LaTeX, markup     （B）   **B**   $B$   \\boxed{\\mathbf{B}}   <b>B</b>      -> B
      whole    it is all that is said   b   (b)   B. red   B - red   B、红色   red   The red.   -> B
      claim    a clause names it        B, not A   So the answer is B.   B is correct   答案是B -> B
      mention  where none does, but only one is mentioned   As seen, option (B) matches.    -> B

A letter counts where it stands for an option (not in: A car, I think, T-shirt, team B) and is not denied (not
B; B is wrong; A, B and C are wrong denies the three). A claim (the answer is B) outweighs what is mentioned
before it or noted after it (A is a trap). Claims that differ name none (The answer is A. No, B.), unless
a later one says that it is final (Final answer: B, or \\boxed{B}) and nothing behind it differs. Doubt behind
a claim (or A; maybe A; A is also possible) undoes it. This holds for numbers, segments and words, too.
"""

import bisect
import itertools
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
    said = concluded(plain(answer))
    if kind == "number":
        numbers = [float(n.replace(",", "")) for n in NUMBER.findall(MINUS.sub("-", said))]
        return float(len(numbers) == 1 and math.isclose(numbers[0], float(truth), rel_tol=1e-6, abs_tol=1e-9))
    if kind == "segment":
        times_s = read_times(said)
        if len(times_s) != 2 or not times_s[0] < times_s[1]:
            return 0.0
        both = max(0.0, min(times_s[1], truth[1]) - max(times_s[0], truth[0]))
        return both / (times_s[1] - times_s[0] + truth[1] - truth[0] - both)
    words = normalise(concluded(plain(str(truth))))
    return float(words != "" and normalise(said) == words)


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
FANCY = str.maketrans("‘’【】“”„", "''[]\"\"\"")
BOXED = re.compile(r"\\?(?:boxed|fbox)\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")  # \boxed{\frac{\pi}{2}}
LAYOUT = r"\\(?:left|right|q?quad|displaystyle|large|centering|begin|end|bf|rm|it|tt|sf)(?![a-zA-Z])"


def plain(text):
    """A text without what it is wrapped in: wide letters, kinds of dashes, LaTeX (what is boxed is a final
    answer), HTML, markdown, quotes. Signs that are part of a word stay: C++, F*, 5', $5. Lines stay lines."""
    fold = lambda match: unicodedata.normalize("NFKC", match[0])
    text = re.sub(rf"(?<=\d)[{SMALL}]+", lambda match: "^" + fold(match), text)
    text = re.sub(rf"[^{SMALL}]+", fold, text)[:20_000].translate(FANCY)
    text = re.sub("[\u00ad\u200b-\u200f\u2060\ufe0f\ufeff✅✓✔☑]", "", text)
    text = re.sub(r"(?<=[^\W\d_])\s*[—―]+", " - ", text)  # after a word it is no sign
    text = re.sub(r"\\+", r"\\", re.sub(r"[‐-―−]", "-", text)).replace("{,}", ",")
    for _ in range(3):  # nested
        text = re.sub(r"\\(?:text|math)[a-z]*\s*\{([^{}]*)\}", r" \1 ", text)
    text = BOXED.sub(r"\nFinal answer: \1\n", text)
    text = re.sub(r"\\(?:[lL]ong)?[rR]ightarrow|\\to(?![a-z])", " → ", text)
    text = re.sub(r"\$\$|(?<!\\)\$(?=\S)([^$\n]*)(?<=[^\s\\])\$(?!\d)", r" \1 ", text)  # $x$, but $5 and $6
    text = re.sub(rf"{LAYOUT}|\\[()\[\],;:!]|[{{}}]|(?<!\d)\$(?!\d)", " ", text).replace("\\", " ")
    text = re.sub(r"<(?![A-Z]>)[/|]*[a-zA-Z][^<>]{0,60}>", " ", text)
    text = re.sub(r"(?m)^[^\S\n]*(?:(?:#+|>+|[*+-])[^\S\n]|[-=_*]{3,}$)|\*\*+|~~|[`«»「」『』《》]", " ", text)
    text = re.sub(r"(?<![\w*])\*([^*\n]*)\*|(?<!\w)\*(?=\w)|\b_+|(?<!_)_+\b", r"\1 ", text)
    text = re.sub(r"(?<!\w)(['\"])([^'\"\n]{0,99})\1(?!\w)|(?<!\d)\"", r" \2 ", text)
    return re.sub(r" ?\n\s*", "\n", re.sub(r"[^\S\n]+", " ", text)).strip()


def normalise(text):
    """Lower case, without markup, articles, brackets, punctuation that ends a word, and extra white space."""
    text = re.sub(r"\b(?:a|[Aa]n|[Tt]he|AN|THE) (?=[^\W\d_])|^A (?=[^\W\d_])", "", plain(str(text)))
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text.lower())  # thousands
    text = re.sub(r"(?<![.,;:!?。、…])[.,;:!?。、…]+(?!\S)|[()\[\]]", " ", text)
    text = re.sub(r" ?([%+*/^=<>&~-]) ?", r"\1", " ".join(text.split()))
    return re.sub(r"(?<=[^\W\d_]{2})-(?=[^\W\d_]{2})", " ", text)


# ----------------------------------------------------------------------------------- what leads to an answer
# in these lists of words _ is a space and * a word's beginning
any_of = lambda words: rf"\b(?i:{'|'.join(words.split())})\b".replace("_", r"\s").replace("*", r"\w+")
IS = any_of("is would_be should_be must_be has_to_be seems appears remains") + r"(?:\sto\sbe\b)?"
NOUNS = any_of("""answer ans (?:correct|right|best)_(?:option|choice|one|letter) choice letter selection pick
    guess selected selected_option option_that""")
FINAL = re.compile(rf"""(?:(?P<final>\b[Ff](?i:inal)\s | 最终) | (?<!\w))
    (?:{NOUNS}(?:(?:(?!\s[(\[]?[A-Z]\b)[^.:?\n]){{0,40}}?\s{IS}(?:\s{any_of("most *ly")})*
        | (?=\s*[:=\n] | \s-\s))
      | {any_of("I we")}(?:'d|'ll|'m|'re|\swould|\swill|\sam|\sfinally)?\s
        {any_of("choose pick select vote opt_for go_with going_with")}
      | {any_of("so thus hence therefore")}[,:]?(?=\s[(\[]?[A-Z]\b[)\]]?(?:[,.]|$))
      | (?:答案 | 选择?(?!项))(?:应该)?[是为选]*)\s*[:=]?\s*""", re.VERBOSE)
SENTENCE_END = re.compile(r"""(?:(?<=\d) | (?<=[\s\d][a-z]) | (?<=\w{3}) | (?<=[^\w\s.])
    | (?<=[\u3400-\u9fff]))[.!?;](?=\s+[^\sa-z]) | [。\n]""", re.VERBOSE)  # not: J. Smith, 65 sec. to 80
NOTE = re.compile(r",? (?:not|rather|because|since)\b")  # It is B, not A
# Behind an answer these words undo it.
DOUBT = re.compile(any_of("""or maybe perhaps might may could can_be possibl[ey] probably also too either both
    otherwise unless alternatively equally actually instead rather wait hmm+ hold_on sorry correction I_mean
    second_thought unsure not_sure""") + r"|\b(?i:no)\b\s*[,.!-]|或|可能|也|还是|其实|等等|不[，,]")
# It is denied where these come before it, with nothing between but such words and other letters.
DENIES = any_of("""not never cannot neither nor except than instead_of unlike wrong incorrect false excludes?
    exclud(?:ed|ing) eliminat(?:e|es|ed|ing) rul(?:e|es|ed|ing)_out anything_but everything_but all_but
    none_of doubt (?:wrong|incorrect|false),?_(?:and_)?so_(?:is|are)
    (?:at_first|first|initially),?_I_(?:had_)?(?:thought|believed|guessed)""")
BETWEEN = any_of("""the an? options? choices? letter answer correct right choose pick select go going with be
    is was to it that think believe say both sure certain if whether *ly""")
ITEM = r"[(\[]?[A-Z](?![A-Za-z0-9])[)\]]?"
AND = r",?\s?(?:\b(?:and|or|nor)\b | [&和或与及] | 就是)\s?(?:options?\s)?"
DENIED = re.compile(rf"""(?:{DENIES} | ^(?i:no)\b | n't\b | [不非别除])
    (?:[\ (\[] | [是选项应该答案能会可择了] | {BETWEEN})* (?:{ITEM}(?:\s?[,/、]\s?|{AND}))*[(\[]?\Z""", re.VERBOSE)


def is_denied(text, end):
    """Whether what stands before a place of a text denies what comes there."""
    return bool(DENIED.search(text[max(0, end - 60):end]))


def leads_in(text):
    """The words that lead to an answer in a plain text, but for "I don't think the answer is"."""
    return [lead for lead in FINAL.finditer(text) if not is_denied(text, lead.end())]


def concluded(text):
    """What the last words that lead to an answer in a plain text lead to, up to the sentence's end; the whole
    text where there are none, where they lead to different answers or where doubt follows."""
    leads = [lead for lead in leads_in(text) if re.search(r"\w", text[lead.end():lead.end() + 9])]
    ends = [match.start() for match in leads[1:]] + [len(text)]
    said, is_final = [], False
    for lead, end in zip(leads, ends):
        if lead["final"] and not is_final:
            said, is_final = [], True
        stop = SENTENCE_END.search(text, lead.end(), end)
        end = stop.start() if stop else end
        said.append(NOTE.split(text[lead.end():end].strip())[0].rstrip(".,"))
    if len({part.casefold() for part in said}) != 1 or DOUBT.search(text, end):
        return text
    return said[0]


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
LETTER = r"([A-Za-z])(?![A-Za-z0-9'_+#*])"
LEADS = any_of("""
    is are be was it it's that's like as that for to on from go_with going_with or and nor else but then
    wait also vs versus either both neither between first answers? ans options? choices? letters? final
    correct so thus therefore hence yes no sure okay choose choosing pick select guess say think believe mean
    conclude vote makes? making maybe perhaps otherwise likely indeed only leaves leaving left_with *ly""")
BEFORE = rf"""(?:^ | [,:;(\[&|>=→、。\n]\s* | (?<=[A-Z)\]\s])/\s* | (?<![MDv][rs])[.!?)\]+-]\s+
    | \s(?=[A-Z]\)) | {LEADS}\.?\s+ | (?<=[是选择项案为答和或者与及])\s* | (?:所以|因此)\s*)[(\[]{{0,3}}"""
# ... and before a sign, or that it is right, or, if a capital ("a because" is none), before these words.
SIGN = r"(?=\s*(?:$ | [,:;!?)\]/&|>=→+。、…] | \.(?!\w\b) | -+[\s>])) | (?=\n)"
SEEMS = any_of("looks looked seems seemed appears appeared would_be") + r"(?:\sto\sbe)?"
CORRECT = rf"(?:\s{any_of('the my most final *ly')})*\s" + any_of("""correct right true best answer accurate
    most_likely most_plausible most_probable most_appropriate most_suitable""")
RIGHT = rf"""(?P<right>\s(?!would){IS}{CORRECT}) | [)\]]?(?:\s{SEEMS}{CORRECT} | \s?(?:选项)?[是为]?[正对]
    | \s(?:best\s)?{any_of("matches fits describes is_consistent_with the_correct")})"""
WORD = any_of("not but rather instead because since as it_is I_think for_sure")
# A weak mention names none, but hinders another letter: A or ..., A is blue.
WEAK = rf"""\W{{0,3}}\b(?i:or)\b | \s(?i:and|nor)\b | \s?[和或与还及都] | (?<=[B-HJ-Z])\s[a-z] | (?<=[^I])
    \s{any_of("is are was to then with vs versus no wait maybe perhaps might may could would if")}"""
MENTION = re.compile(rf"""{BEFORE}{LETTER}(?:(?:{RIGHT}) | {SIGN}
    | (?<=[A-Z])(?=\s*[(\[] | \s?[选项因] | \s{WORD}) | (?=(?P<weak>{WEAK})))""", re.VERBOSE)
LISTED = re.compile(rf"(?<![A-Za-z0-9])([A-Z])[)\]]?{AND}[(\[]?\Z", re.VERBOSE)
# It is denied where these come after it or after the list that it is in.
WRONG = any_of("wrong incorrect false unlikely impossible ruled_out eliminated excluded out")
DENIED_AFTER = re.compile(rf"""[)\]]?
    (?:(?:\s?[,/、]\s?{ITEM}){{0,25}}{AND}{ITEM}
    | (?:\s?[,/、]\s?{ITEM}){{1,25}}(?=\s(?:are|were|do|can)\b | 都))?
    (?:\s?(?:(?:is|are|was|were|would|can|could|do|does|did|must)\s?(?:not|n't|never)\b | cannot\b)
    | \s\w{{2,12}}\s(?:\w{{2,12}}\s){{0,2}}{WRONG} | \W{{0,2}}(?i:no|wrong|incorrect|false)\W*$
    | \s?[):\]-]\s?(?i:is\s)?(?i:no|not|wrong|incorrect|false)\b | \s?[✗✘❌]
    | [^.!?;\n]{{0,60}}\bbut\s(?:it|that|this|they)\s?(?:is|are|was|were|'s)\s(?:\w{{2,12}}\s)?{WRONG}
    | (?:选项)?[都也均]?是?[不错])""", re.VERBOSE)
SEPARATOR = re.compile(r"^(?:[\s)\].,:;、。=→|(\[]|[-=]+>|-+(?=\s))+")  # between a letter and its option's text
CLAUSE_END = re.compile(r"[.!?;](?=\s+[^\sa-z]|\)|$)|[。\n]|\s(?=\([^()]{0,99}\w\s\w)")
# All that may come before a letter that a clause begins with: So it is B.
BEGINNING = re.compile(rf"(?:\W|\b(?i:I|we|the|would|'d|'ll|am)\b|(?!\b(?i:options?|choices?)\b){LEADS})*")


def read_letter(text, options):
    """The letter of the option that an answer text names, or None; above is how."""
    options, said = option_texts(options), plain(text)
    letters = LETTERS[:len(options)]
    bare = lambda text: text.strip(" \n.,:;)]").casefold()  # first: C++ is not C
    known = [(form, [form(option) for option in options]) for form in (bare, normalise)]

    def owners(text):
        """The letters of the options with this text."""
        for form, forms in known:
            same = form(text)
            if same and same in forms:
                return [letter for letter, other in zip(letters, forms) if other == same]
        return []

    def whole(text):
        """The letter, where a letter, an option's text or both are all that is said; else None."""
        first = re.match(rf"[^\w+#=~!¬≠]*{LETTER}(.*)", text, re.DOTALL)
        if first and first[1].upper() in letters and not re.search(r"[\w+#=]", first[2]):
            return first[1].upper()  # before the texts: the prompt asks for it
        if len(named := owners(text)) == 1:
            return named[0]
        if first and first[1] in owners(SEPARATOR.sub("", first[2])) + owners(first[2].removeprefix("-")):
            return first[1]  # B red, B-red

    # a letter, an option's text, or both are all that is said, or all after the words that lead to it
    said = re.sub(r"^(?:I think )?(?:[Ii]t is|[Ii]t's|[Tt]hat is) ", "", said)
    if letter := whole(said) or whole(text):
        return letter
    leads = leads_in(said)
    if leads and (letter := whole(said[leads[-1].end():])):
        said = f"{said[:leads[-1].end()]}{letter}"
    # an option that names letters itself counts as its own letter
    for letter, option in zip(letters, options):
        if len(option) > 1 and re.search(rf"\b{LETTER}", option):  # D. Both A and B
            said = re.sub(rf"(?<!\w){re.escape(option)}(?!\w)", letter, said, flags=re.IGNORECASE)
    # one letter is claimed or, where none is, mentioned
    mentions = mentions_in(said, letters)
    strong = [mention for mention in mentions if mention["weak"] is None]
    named = claimed(said, mentions, whole)
    if not named and strong:
        named = {mention[1].upper() for mention in mentions}
    if len(named) != 1 or not named <= set(letters):
        return None
    # and no other option's text follows it
    ends = [mention.end(1) for mention in strong if mention[1].upper() in named]
    for end in ends[:1] + ends[-1:]:
        rest = SEPARATOR.sub("", said[end:])
        for part in (rest, rest.partition("\n")[0], re.split(r"[.;。](?:\s|$)", rest)[0]):
            if not named & set(owners(part) or named):  # A. red
                return None
    return named.pop()


def claimed(said, mentions, whole):
    """The letters that a plain text claims, with those that doubt behind them names. A clause claims what
    comes after words that lead to an answer, what it says is right and a letter that it begins with."""
    leads = {lead.start(): lead for lead in leads_in(said)}
    within = {place for lead in leads.values() for place in range(lead.start() + 1, lead.end() + 1)}
    ends = {match.end() for match in CLAUSE_END.finditer(said)} - within
    places = [mention.start(1) for mention in mentions]
    led = set()  # letters that words lead to, or that are called right
    begun = set()  # letters that clauses begin with
    doubted = set()  # letters in doubts behind the last claim
    is_final = False
    for start, end in itertools.pairwise(sorted({0, len(said), *leads, *ends})):
        lead = leads.get(start)
        clause = said[lead.end() if lead else start:end]
        here = mentions[bisect.bisect_left(places, start):bisect.bisect_left(places, end)]
        found = {mention[1].upper() for mention in here}
        if lead and (letter := whole(NOTE.split(clause)[0])):
            found = {letter}
        is_led = lead or any(mention["right"] for mention in here)
        is_begun = False
        strong = [mention.start(1) for mention in here if mention["weak"] is None]
        if strong and (end in ends or end not in leads):
            before = said[start:strong[0]][:99]
            is_begun = BEGINNING.fullmatch(before) and not DOUBT.search(before)
        if found and (is_led or is_begun) and not clause.rstrip().endswith("?"):
            if lead and lead["final"] and not is_final:
                led, begun, is_final = set(), set(), True
            if is_led:
                led |= found
            else:
                begun |= found
            doubted = set()
        elif DOUBT.search(clause):
            doubted |= found
    if led:
        several_begun = len(begun) > 1  # a list of the options
        return led | doubted | (set() if several_begun else begun)
    if begun:
        return begun | doubted | {mention[1].upper() for mention in mentions if mention["weak"] is None}
    return set()


def mentions_in(said, letters):
    """The mentions of letters in a plain text, but for those that are denied and for ends of lists of other
    things (scene A or B)."""
    places, mentions = set(), []
    for mention in MENTION.finditer(said):
        start, end = mention.span(1)
        head = LISTED.search(said, max(0, start - 9), start)
        if head and head.start(1) not in places:
            continue
        places.add(start)
        is_letter = mention[1].isupper() or mention[1].upper() in letters
        if is_letter and not is_denied(said, start) and not DENIED_AFTER.match(said, end):
            mentions.append(mention)
    return mentions
